"""Checkpoints: what a resumed run needs to continue as if it had never stopped.

    RUN/checkpoints/step-000500/weights.safetensors      queries, connector and adapters
    RUN/checkpoints/step-000500/optimizer.safetensors    AdamW's moments, by the weight's name
    RUN/checkpoints/step-000500/state.json               where the run stands, and what it learns from

There is no state of a random generator to save: the plan of the batches follows from the seed (`batch_plan`), and the
model has no dropout. Position, weights and moments are all. No pickles, which could run code when they are loaded.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from collavo.errors import LeftOut, UserError, first_line
from collavo.folders import whole_folder, writing
from collavo.training import record

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands: how many steps of a phase (`cpt` or `cit`) are done, and how many over all phases."""

    phase: str
    phase_steps: int
    total_steps: int
    skipped: LeftOut = field(default_factory=LeftOut)
    """Samples that could not be prepared until then."""


def save_checkpoint(
    run: Path,
    position: Position,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    learned_from: Mapping[str, Any],
    keep: int,
) -> None:
    """Write a checkpoint, whole or not at all, and remove all but the last `keep`.

    Args:
        parameters: what has learned or is learning, by name.
        learned_from: data and arguments, see `collavo.training.record`; the checkpoint is refused under others.

    Raises:
        UserError: if the disk refuses; the checkpoints before are kept.
    """
    place = run / "checkpoints" / f"step-{position.total_steps:06d}"
    with writing(place), whole_folder(place) as folder:
        save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, folder / WEIGHTS)
        # By name, where torch's own state dict counts parameters in the order in which the optimizer was given them.
        moments = {
            f"{entry}/{name}": value.detach().cpu().contiguous()
            for name, parameter in parameters.items()
            for entry, value in optimizer.state.get(parameter, {}).items()
        }
        save_file(moments, folder / OPTIMIZER)
        state = {name: getattr(position, name) for name in ("phase", "phase_steps", "total_steps")}
        skipped = {"counts": position.skipped.counts, "named": position.skipped.named}
        state |= {"skipped": skipped, "learned_from": learned_from}
        (folder / STATE).write_text(json.dumps(state, indent=2))
        for file in folder.iterdir():  # older ones go now, and a machine that is taken away loses what is in memory
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)  # what stays of it, the next checkpoint tries to remove again


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    # By number: from a million on, they have a digit more.
    return sorted((run / "checkpoints").glob("step-*"), key=lambda path: (len(path.name), path.name))


def phase_of(checkpoint: Path) -> str:
    """Return the phase in which a checkpoint was written.

    Raises:
        UserError: if it is damaged.
    """
    with _readable(checkpoint):
        phase: str = json.loads((checkpoint / STATE).read_text())["phase"]
    return phase


def read_position(checkpoint: Path, learned_from: dict[str, Any]) -> Position:
    """Read where a checkpoint stands, and put the data files of `learned_from` into the order that they had in it.

    Raises:
        UserError: if it was made from other data or with other arguments, which it names, or is damaged.
    """
    with _readable(checkpoint):
        state = json.loads((checkpoint / STATE).read_text())
        before, skipped = state.pop("learned_from"), state.pop("skipped")
        position = Position(**state, skipped=LeftOut(Counter(skipped["counts"]), skipped["named"]))
        differing = record.differences(before, learned_from)
    if differing:
        raise UserError(
            f"{checkpoint}: {'; '.join(differing)}; go on with what the run began with, or train into another folder"
        )
    learned_from["data"] = record.files_as_before(before, learned_from)
    return position


def load_weights(checkpoint: Path, parameters: Mapping[str, torch.Tensor]) -> None:
    """Put a checkpoint's weights into parameters, in place.

    Raises:
        UserError: if the names differ, or the file is damaged.
    """
    with _readable(checkpoint):
        weights = load_file(checkpoint / WEIGHTS)
    if differing := set(weights) ^ set(parameters):
        raise UserError(f"{checkpoint}: {len(differing)} weights do not match, such as {min(differing)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def load_optimizer(checkpoint: Path, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's moments into an optimizer. Weights that have not learned yet have none, as before.

    Raises:
        UserError: if the file is damaged.
    """
    with _readable(checkpoint):
        moments = load_file(checkpoint / OPTIMIZER)
    for key, tensor in moments.items():
        entry, _, name = key.partition("/")
        parameter = parameters[name]
        # AdamW keeps its step count on the CPU, the moments beside the weight. All are copies, for what was loaded maps
        # the file, and on NFS a file that is still mapped cannot be removed with its folder.
        optimizer.state[parameter][entry] = tensor.to("cpu" if entry == "step" else parameter.device, copy=True)


@contextmanager
def _readable(checkpoint: Path) -> Iterator[None]:
    """Say in one line that a checkpoint is damaged, or that another version wrote it.

    Raises:
        UserError: if what the block reads is not as it was written.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{checkpoint}: damaged, or written by another version ({type(error).__name__}: {first_line(error)}); "
            "delete it to go on from the one before it"
        ) from error
