"""The training loop that made both embedded models.

Each step draws its own scenes by number, so the loop needs no data set, no epochs and no shuffling. Step s of a command
is the same on every machine, and a stopped run continues from its last checkpoint.
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
from torch import nn
from torch.utils.data import DataLoader, Dataset

from collavo.progress import Progress
from collavo.training import checkpoint

TRAIN_SCENES_SEED = 1_000_003
"""Seed of the scenes for pre-training. The build and all evaluations use other seeds."""


_NO_DATA: dict[str, Any] = {"arguments": {}, "data": []}
"""What checkpoints say that a run learns from."""


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """Length and speed of a run. The learning rate rises linearly, then falls along a cosine to 1 % of its peak."""

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
    options: LoopOptions,
    console: Console,
) -> None:
    """Train all weights of a model, log to `run/metrics.jsonl`, and continue from a checkpoint if `run` holds one.

    Args:
        run: folder for the log and the checkpoints.
        examples: step s takes the examples from s * batch_size on.
        collate: makes a batch of a list of examples.
        loss_of: returns the loss of a batch.

    Raises:
        FloatingPointError: if a gradient is not finite.
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
    with Progress(console) as progress:
        bar = progress.add("training", options.steps, first)
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
            progress.update(bar, done, note=f"loss {losses[-1]:.3f}")
            if done % options.log_steps == 0 or done == options.steps:
                log_line(run, {"step": done, "loss": sum(losses) / len(losses), "seconds": time.monotonic() - began})
                losses.clear()
            if done % options.checkpoint_steps == 0 or done == options.steps:
                checkpoint.save_checkpoint(
                    run, checkpoint.Position("scratch", done, done), state, optimizer, _NO_DATA, keep=2
                )


def _resume(run: Path, state: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Load the last checkpoint and return the number of steps that it has done."""
    checkpoints = checkpoint.list_checkpoints(run)
    if not checkpoints:
        return 0
    checkpoint.load_weights(checkpoints[-1], state)
    checkpoint.load_optimizer(checkpoints[-1], state, optimizer)
    return checkpoint.read_position(checkpoints[-1], _NO_DATA).total_steps


def _decay_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Apply weight decay to matrices, but not to norms, biases and single vectors."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    others = [p for p in parameters.values() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _rate(step: int, options: LoopOptions) -> float:
    """Return the learning rate of a step, as a share of its peak."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(options.steps - options.warmup_steps, 1)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def log_line(run: Path, values: dict[str, Any]) -> None:
    """Add a line to the log of a run; fractions are rounded."""
    rounded = {name: round(value, 5) if isinstance(value, float) else value for name, value in values.items()}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(rounded) + "\n")
