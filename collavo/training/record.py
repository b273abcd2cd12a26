"""What a run records about itself: `train_args.json`, and in its checkpoints what a resumed run must not change."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from posixpath import dirname
from typing import Any

from collavo.embedded import find_embedded
from collavo.folders import write_whole
from collavo.model_card import licence_of
from collavo.runs import TRAIN_ARGS
from collavo.storage import open_random
from collavo.training.arguments import TrainArguments

# Arguments that change neither what is learned nor in which order, so that a resumed run may change them; the length of
# the run, which it may extend; and the place of the data, which are known by their checksums, as models are.
_FREE_ARGUMENTS = (
    "epochs", "max_steps", "cpt_max_steps",
    "data", "image_root", "resume", "overwrite", "output_dir", "micro_batch_size", "device", "gradient_checkpointing",
    "attention", "workers", "max_skipped_ratio", "log_steps", "eval_steps", "max_eval_samples", "checkpoint_steps",
    "keep_checkpoints", "report_to",
)  # fmt: skip


def learned_from(arguments: TrainArguments, files: Sequence[str]) -> dict[str, Any]:
    """Say what a run learns from and in which order: the arguments that matter, and checksums of data and models."""
    kept = {name: value for name, value in asdict(arguments).items() if name not in _FREE_ARGUMENTS}
    models = {name: kept[name] and _model_sha256(Path(kept[name])) for name in ("preset", "projector")}
    facts = {"arguments": kept, "data": [[file, footer_sha256(file)] for file in files], "models": models}
    return dict(json.loads(json.dumps(facts)))  # as a checkpoint gives it back


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the arguments and data files in which two runs differ, see `learned_from`."""
    names = dict.fromkeys([*before["arguments"], *now["arguments"]])
    pairs = {name: (before["arguments"].get(name), now["arguments"].get(name)) for name in names}
    # A model may have moved, and another may lie where it was.
    sums = {name: (before.get("models", {}).get(name), new) for name, new in now.get("models", {}).items()}
    moved = {name for name, (old, new) in sums.items() if old and old == new}
    found = [
        f"--{name} was {_said(old)}, is {_said(new)}"
        for name, (old, new) in pairs.items()
        if old != new and name not in moved
    ]
    replaced = [name for name, (old, new) in sums.items() if old and new and old != new]
    found += [f"the model of --{name} has changed" for name in replaced if pairs[name][0] == pairs[name][1]]
    # A file may have moved, and two files may be alike.
    (old_sums, new_sums) = (Counter(checksum for _, checksum in facts["data"]) for facts in (before, now))
    gone = [file for file, checksum in before["data"] if old_sums[checksum] > new_sums[checksum]]
    new = [file for file, checksum in now["data"] if new_sums[checksum] > old_sums[checksum]]
    changed = [file for file in new if file in gone]
    found += [f"{file} has changed" for file in changed]
    found += [f"{file} was among the data" for file in gone if file not in changed]
    return found + [f"{file} was not among the data" for file in new if file not in changed]


def files_as_before(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[list[str]]:
    """Return the data files of a run, with their checksums, in the order that the same files had before they moved.

    Rows are numbered in that order, and the plan of the batches follows from their numbers.
    """
    alike: defaultdict[str, list[list[str]]] = defaultdict(list)
    for entry in now["data"]:
        alike[entry[1]].append(entry)
    return [alike[checksum].pop(0) for _, checksum in before["data"]]


def _said(value: Any) -> str:
    return " ".join(value) or "nothing" if isinstance(value, list) else str(value)


def write_train_args(
    folder: Path,
    arguments: TrainArguments,
    files: Sequence[str],
    adapters: Sequence[str],
    projector_trained: bool,
    dtype: str,
    ranks: int,
) -> None:
    """Write `train_args.json`: all arguments, and on what and with which libraries the run was trained.

    Args:
        adapters: names of the adapters that the run will hold.
        projector_trained: whether it will hold a projector.
        dtype: of the computation.
        ranks: processes.
    """
    facts = {
        **asdict(arguments),
        "base": arguments.base,
        "base_sha256": embedded.sha256 if (embedded := find_embedded(arguments.base)) else None,
        "adapter_names": list(adapters),
        "projector_trained": projector_trained,
        "dtype": dtype,
        "files": {file: footer_sha256(file) for file in files},
        # An export is made elsewhere, or later, where paths of the data lead nowhere.
        "data_licences": sorted({licence_of(Path(folder))["license_name"] for folder in set(map(dirname, files))}),
        "ranks": ranks,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "collavo")},
    }
    write_whole(folder / TRAIN_ARGS, json.dumps(facts, indent=2) + "\n")


def _model_sha256(model: Path) -> str | None:
    """SHA-256 of the beginnings of a model's files, which stand for gigabytes; None for what is no place on a disk."""
    if not model.exists():
        return None
    digest = hashlib.sha256()
    for file in [*model.glob("config.json"), *sorted(model.glob("*.safetensors"))] if model.is_dir() else [model]:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()


def footer_sha256(file: str) -> str:
    """SHA-256 of a Parquet file's footer, which says where every page lies and how large it is.

    It stands for the whole file, which may be hundreds of gigabytes.
    """
    with open_random(file) as stream:
        stream.seek(-8, 2)
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(-8 - length, 2)
        return hashlib.sha256(stream.read(length)).hexdigest()
