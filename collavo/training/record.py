"""What a run records about itself: `train_args.json`, and the fingerprint of its checkpoints."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from collavo.runs import TRAIN_ARGS
from collavo.training.arguments import TrainArguments

# Arguments that change neither what is learned nor in which order, so that a resumed run may change them. The place of
# the data is one of them: checksums identify the data.
_FREE_ARGUMENTS = (
    "data", "image_root", "resume", "overwrite", "output_dir", "micro_batch_size", "device", "gradient_checkpointing",
    "attention", "workers", "max_skipped_ratio", "log_steps", "eval_steps", "eval_batches", "checkpoint_steps",
    "keep_checkpoints", "report_to",
)  # fmt: skip


def fingerprint(arguments: TrainArguments, files: Sequence[Path]) -> str:
    """Identify what a run learns from what, and in which order: its data and the arguments that matter."""
    kept = {name: value for name, value in asdict(arguments).items() if name not in _FREE_ARGUMENTS}
    facts = {"arguments": kept, "data": [_footer_sha256(file) for file in files]}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def write_train_args(
    folder: Path,
    arguments: TrainArguments,
    files: Sequence[Path],
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
        "adapter_names": list(adapters),
        "projector_trained": projector_trained,
        "dtype": dtype,
        "files": {str(file): _footer_sha256(file) for file in files},
        "ranks": ranks,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "collavo")},
    }
    (folder / TRAIN_ARGS).write_text(json.dumps(facts, indent=2) + "\n")


def _footer_sha256(file: Path) -> str:
    """SHA-256 of a Parquet file's footer, which says where every page lies and how large it is.

    It stands for the whole file, which may be hundreds of gigabytes.
    """
    with file.open("rb") as stream:
        stream.seek(-8, 2)
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(-8 - length, 2)
        return hashlib.sha256(stream.read(length)).hexdigest()
