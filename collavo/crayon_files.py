"""Crayon data on disk: which files make up a data set, and their rows."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.crayon_row import CrayonRow, SchemaError, check_schema

_SHARD_NAME = re.compile(r"crayon-\d{5}-of-(\d{5})\.parquet")


class DataError(ValueError):
    """Data cannot be used; the message is one line that names the flag, what was found and what would work."""


def crayon_files(paths: Sequence[str]) -> list[Path]:
    """The Parquet files that `--data` names, checked to be crayon data of this version, with no shard missing.

    Args:
        paths: files, or folders whose `*.parquet` are meant.

    Raises:
        DataError: for a path that is not there, a file that is not crayon data, or an incomplete set of shards.
    """
    files = sorted({file for path in paths for file in _files_of(Path(path))})
    for file in files:
        try:
            check_schema(pq.read_schema(file), str(file))
        except SchemaError as error:
            raise DataError(f"--data: {error}") from error
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"--data {file}: cannot be read as Parquet ({str(error).strip()})") from error
    for folder in {file.parent for file in files}:
        _check_complete(folder, [file.name for file in files if file.parent == folder])
    return files


def read_rows(files: Sequence[Path]) -> Iterator[CrayonRow]:
    """All rows of some files, in order, a bounded number in memory."""
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=50):
            yield from map(CrayonRow.from_record, batch.to_pylist())


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"--data {path}: there is no such file; build data with pipelines/build_crayon.py")
    files = list(path.glob("*.parquet"))
    if not files:
        raise DataError(f"--data {path}: the folder holds no .parquet file")
    return files


def _check_complete(folder: Path, names: Sequence[str]) -> None:
    for total in {int(match[1]) for name in names if (match := _SHARD_NAME.fullmatch(name))}:
        found = sum(name.endswith(f"-of-{total:05d}.parquet") for name in names)
        if found < total:
            raise DataError(f"--data {folder}: {found} of {total} shards; name them all, or build the data again")
