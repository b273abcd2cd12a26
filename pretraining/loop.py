"""Training from scratch on drawn scenes: the loop that both embedded models come out of.

Every step draws scenes of its own, by number, so that no epoch, no shuffling and no data set is needed: step s of a
command is the same on every machine, and a run that was stopped goes on where its last checkpoint stands.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import nn
from torch.utils.data import DataLoader, Dataset

from collavo.training.checkpoint import (
    Progress,
    list_checkpoints,
    load_optimizer,
    load_weights,
    read_progress,
    save_checkpoint,
)

TRAIN_SCENES_SEED = 1_000_003
"""Seed of the scenes that the embedded models learn from; the build and every evaluation draw with other seeds."""


@dataclass(frozen=True, slots=True)
class ScratchOptions:
    """How long and how fast; the learning rate rises linearly, then falls in a cosine to a hundredth."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 200
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    log_steps: int = 50
    checkpoint_steps: int = 500
    workers: int = 1


def train_from_scratch(
    run: Path,
    model: nn.Module,
    examples: Dataset[Any],
    collate: Callable[[list[Any]], Any],
    loss_of: Callable[[Any], torch.Tensor],
    options: ScratchOptions,
    console: Console,
) -> None:
    """Train all weights of a model; logs to `run/metrics.jsonl`, goes on from a checkpoint in `run` if there is one.

    Args:
        examples: example i is made of scene i; step s takes those from s * batch_size on.
        loss_of: the loss of a collated batch.
    """
    run.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    state = {**parameters, **dict(model.named_buffers())}
    optimizer = torch.optim.AdamW(_decay_groups(parameters, options.weight_decay), lr=options.learning_rate)
    first = _resume(run, state, optimizer)
    indices = [range(s * options.batch_size, (s + 1) * options.batch_size) for s in range(first, options.steps)]
    loader = DataLoader(examples, batch_sampler=indices, collate_fn=collate, num_workers=options.workers)  # type: ignore[arg-type]
    model.train()
    losses: list[float] = []
    began = time.monotonic()
    with _bar(console) as bar:
        shown = bar.add_task("training", total=options.steps, completed=first, note="")
        for step, batch in enumerate(loader, start=first):
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * _rate(step, options)
            loss = loss_of(batch)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters.values(), options.max_grad_norm)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"step {step}: loss {float(loss)}, gradient norm {float(norm)}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            done = step + 1
            bar.update(shown, completed=done, note=f"loss {losses[-1]:.3f}")
            if done % options.log_steps == 0 or done == options.steps:
                _log(run, {"step": done, "loss": sum(losses) / len(losses), "seconds": time.monotonic() - began})
                losses.clear()
            if done % options.checkpoint_steps == 0 or done == options.steps:
                save_checkpoint(run, Progress("scratch", done, done), state, optimizer, "", keep=2)


def _resume(run: Path, state: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        return 0
    load_weights(checkpoints[-1], state)
    load_optimizer(checkpoints[-1], state, optimizer)
    return read_progress(checkpoints[-1], "").total_steps


def _decay_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed, norms, biases and single vectors are not."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    others = [p for p in parameters.values() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _rate(step: int, options: ScratchOptions) -> float:
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(options.steps - options.warmup_steps, 1)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def _log(run: Path, values: dict[str, float]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({name: round(value, 5) for name, value in values.items()}) + "\n")


def _bar(console: Console) -> Bar:
    return Bar(
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )
