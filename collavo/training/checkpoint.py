"""Checkpoints: all that a resumed run needs to go on as if nothing had happened.

    RUN/checkpoints/step-000500/weights.safetensors      queries, connector and adapters
    RUN/checkpoints/step-000500/optimizer.safetensors    its moments, by the weight's name
    RUN/checkpoints/step-000500/state.json               phase, step, position in the plan

A checkpoint appears whole or not at all: it is written beside its place and then renamed. No pickles.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from collavo.errors import UserError

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: so many steps of a phase (`cpt` or `cit`) are done; `total_steps` counts over phases."""

    phase: str
    phase_steps: int
    total_steps: int


def save_checkpoint(
    run: Path,
    progress: Progress,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    fingerprint: str,
    keep: int,
) -> Path:
    """Write a checkpoint, and remove all but the last `keep`.

    Args:
        parameters: what has been or is being trained, by name.
        fingerprint: identifies data and arguments; a resume under others is refused.
    """
    folder = run / "checkpoints" / f"step-{progress.total_steps:06d}"
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, unfinished / WEIGHTS)
    save_file(_optimizer_tensors(parameters, optimizer), unfinished / OPTIMIZER)
    (unfinished / STATE).write_text(json.dumps({**asdict(progress), "fingerprint": fingerprint}, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def read_progress(checkpoint: Path, fingerprint: str) -> Progress:
    """Where a checkpoint stands.

    Raises:
        UserError: if it was made from other data or with other arguments.
    """
    state = json.loads((checkpoint / STATE).read_text())
    if state.pop("fingerprint") != fingerprint:
        raise UserError(
            f"--resume: {checkpoint} was made from other data or with other arguments; repeat those that "
            "train_args.json of the run holds, or train into another --output_dir"
        )
    return Progress(**state)


def load_weights(checkpoint: Path, parameters: Mapping[str, torch.Tensor]) -> None:
    """Put a checkpoint's weights into parameters, in place.

    Raises:
        UserError: if the names differ.
    """
    weights = load_file(checkpoint / WEIGHTS)
    if differing := set(weights) ^ set(parameters):
        raise UserError(f"{checkpoint}: {len(differing)} weights do not match, such as {min(differing)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def load_optimizer(checkpoint: Path, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's optimizer state back; weights that never learned have none, as before."""
    tensors = load_file(checkpoint / OPTIMIZER)
    for key, tensor in tensors.items():
        entry, _, name = key.partition("/")
        parameter = parameters[name]
        # AdamW keeps its step count on the CPU, the moments beside the weight.
        optimizer.state[parameter][entry] = tensor if entry == "step" else tensor.to(parameter.device)


def _optimizer_tensors(
    parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    return {
        f"{entry}/{name}": value.detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }
