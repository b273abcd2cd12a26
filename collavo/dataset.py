"""Crayon data on disk: which files make up a data set, its rows, a row's picture, and the Parquet files they lie in.

Files are written so that readers like them: row groups of about 100 rows, so that shuffled reading costs little;
image bytes stored as they are, since they are compressed already, and zstd for the rest; a page index.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from collavo.categories import read_categories
from collavo.errors import Rejected, UserError
from collavo.images import decode_rgb
from collavo.sources.image_paths import checked_relative
from collavo.storage import open_random
from schemas.categories import COCO_PANOPTIC, CategorySet
from schemas.crayon_row import CRAYON_SCHEMA, METADATA_PREFIX, SCHEMA_VERSION, CrayonRow, file_facts, metadata_of

ROWS_PER_GROUP = 100
BYTES_PER_GROUP = 32 << 20
"""A row group ends at whichever of the two comes first."""

_ROWS_IN_MEMORY = 50
_SHARD_NAME = re.compile(r"(crayon|train|validation)-\d{5}-of-(\d{5})\.parquet")

_DICTIONARY_COLUMNS = (
    "sources.list.element",
    "split",
    "segments.list.element.category",
    "instructions.list.element.task",
    "instructions.list.element.label",
    "instructions.list.element.polarity",
    "instructions.list.element.template_id",
    "conversations.list.element.turns.list.element.from",
)


def find_files(paths: Sequence[str]) -> list[Path]:
    """Find the Parquet files of one data set or several, checked to be crayon data, with no shard missing.

    Files that another tool has written again - `datasets`, pandas, Polars, DuckDB - are as good as our own: columns may
    be of wider types, and metadata may be gone.

    Args:
        paths: files, or folders whose `*.parquet` are meant.

    Raises:
        UserError: for a path that is not there, a file that is not crayon data, or an incomplete set of shards.
    """
    files = sorted({file for path in paths for file in _files_of(Path(path))})
    for file in files:
        check_schema(_schema_of(file), str(file))
    for folder in {file.parent for file in files}:
        _check_complete(folder, [file.name for file in files if file.parent == folder])
    return files


def category_set(files: Sequence[Path | str]) -> CategorySet:
    """Read the set of classes that the rows of some files have.

    Raises:
        UserError: where files have different sets.
    """
    sets = {str(file): _category_set_of(file) for file in files}
    first_file, first = next(iter(sets.items()))
    for file, other in sets.items():
        if [c.name for c in other] != [c.name for c in first]:
            raise UserError(f"{file} has the classes of {other.name}, {first_file} those of {first.name}")
    return first


def notes(files: Sequence[Path | str]) -> list[str]:
    """Say what a user should know of some files, a line each."""
    old = [file for file in files if schema_version(_schema_of(file)) == 1]
    if not old:
        return []
    return [f"{len(old)} files, {old[0]} first, are of schema version 1: their rows have no image_sha256"]


def check_splits(files: Sequence[Path]) -> None:
    """Refuse data sets that hold the same picture in different splits: a model would be judged on what it has seen.

    Raises:
        UserError: naming two files and how many pictures they share so.
    """
    if len({file.parent for file in files}) < 2:  # in one data set, a picture has one row
        return
    seen: dict[bytes, tuple[str, Path]] = {}
    crossing: list[tuple[Path, Path]] = []
    for file in files:
        if "image_sha256" not in _schema_of(file).names:
            continue
        table = pq.read_table(file, columns=["image_sha256", "split"])
        for digest, split in zip(table["image_sha256"].to_pylist(), table["split"].to_pylist(), strict=True):
            if digest is None:
                continue
            other_split, other = seen.setdefault(bytes.fromhex(digest), (split, file))
            if other_split != split:
                crossing.append((other, file))
    if crossing:
        other, file = crossing[0]
        raise UserError(
            f"{len(crossing)} pictures are in one split of {other.parent} and in the other of {file.parent}; merge the "
            f"data sets with build_crayon.py --from_crayon {other.parent} {file.parent}"
        )


def read_rows(files: Sequence[Path], split: str | None = None) -> Iterator[CrayonRow]:
    """Read the rows of some files, in order, a bounded number in memory.

    Args:
        split: `train` or `validation`; None for all rows.
    """
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=_ROWS_IN_MEMORY):
            wanted = batch.filter(pc.equal(batch["split"], split)) if split else batch
            yield from map(CrayonRow.from_record, wanted.to_pylist())


def count_rows(files: Sequence[Path], split: str | None = None) -> int:
    """Count the rows of some files, of one split or all."""
    if split is None:
        return sum(pq.read_metadata(file).num_rows for file in files)
    return sum(pc.sum(pc.equal(pq.read_table(file, columns=["split"])["split"], split)).as_py() or 0 for file in files)


def image_bytes(path: str, data: bytes | None, image_root: Path | None) -> bytes:
    """Read the encoded image of a row.

    Args:
        path, data: the row's `image`; `data` is None where the row refers to its image.
        image_root: the folder that such paths start from.

    Raises:
        UserError: where the row refers to its image and no root is given.
        Rejected: `missing_file`, `unreadable_file`, `path_escapes_root` or `bad_path`.
    """
    if data is not None:
        return data
    if image_root is None:
        raise UserError(
            f"the rows refer to their images ({path}) and do not hold them; image_root must name their folder"
        )
    file = image_root / checked_relative(path)
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise Rejected("missing_file", str(file)) from error
    except OSError as error:
        raise Rejected("unreadable_file", f"{file}: {error.strerror}") from error


def decoded_image(path: str, data: bytes | None, image_root: Path | None) -> np.ndarray:
    """Decode the image of a row as upright RGB, uint8 [height, width, 3].

    Raises:
        UserError, Rejected: as `image_bytes`, and as `collavo.images.decode_rgb`.
    """
    return decode_rgb(image_bytes(path, data, image_root))


def schema_version(schema: pa.Schema) -> int:
    """Return the version of the crayon row that a file has; where its metadata are gone, its columns tell."""
    stated = (schema.metadata or {}).get(f"{METADATA_PREFIX}schema_version".encode())
    if stated is not None and stated.isdigit():
        return int(stated)
    return 1 if "image_sha256" not in schema.names else SCHEMA_VERSION


def check_schema(schema: pa.Schema, path: str) -> None:
    """Refuse a file that does not hold crayon rows of this version or of version 1.

    Raises:
        UserError: in one line, naming `path`, what was found and what was expected.
    """
    version = schema_version(schema)
    if version > SCHEMA_VERSION:
        raise UserError(f"{path}: crayon schema version {version}, but this code reads version {SCHEMA_VERSION}")
    expected = [column for column in CRAYON_SCHEMA if version > 1 or column.name not in _NEW_IN_VERSION_2]
    missing = [column.name for column in expected if column.name not in schema.names]
    if missing:
        found = ", ".join(schema.names[:6])
        raise UserError(
            f"{path}: not crayon data, for it has no column {', '.join(map(repr, missing[:4]))}; "
            f"its columns are {found}; build data with pipelines/build_crayon.py"
        )
    for column in expected:
        found = schema.field(column.name).type
        is_float = column.name in _NULLABLE_NUMBERS and pa.types.is_floating(found)
        if not (is_float or _holds(found, column.type)):
            raise UserError(f"{path}: column {column.name!r} is {found}, but crayon data has {column.type}")


_NEW_IN_VERSION_2 = ("image_sha256", "other_paths")

_NULLABLE_NUMBERS = ("license_id", "width", "height")
"""pandas makes floats of whole numbers some of which are null; `CrayonRow.from_record` turns them back."""


def _holds(found: pa.DataType, expected: pa.DataType) -> bool:
    """Tell whether values of one type are values of another to Python: wider integers, large strings, fields in another
    order, and columns without any value."""
    types = pa.types
    if types.is_null(found):
        return True
    if types.is_dictionary(found):
        return _holds(found.value_type, expected)
    if types.is_struct(expected):
        names = [field.name for field in found] if types.is_struct(found) else []
        return all(f.name in names and _holds(found.field(f.name).type, f.type) for f in expected)
    if types.is_list(expected):
        is_list = types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
        return is_list and _holds(found.value_type, expected.value_type)
    kinds = (
        (types.is_integer,),
        (types.is_floating, types.is_integer),
        (types.is_boolean,),
        (types.is_string, types.is_large_string, types.is_string_view),
        (types.is_binary, types.is_large_binary, types.is_binary_view),
    )
    return any(kind[0](expected) and any(is_kind(found) for is_kind in kind) for kind in kinds)


def _schema_of(file: Path | str) -> pa.Schema:
    try:
        with open_random(str(file)) as opened:
            return pq.read_schema(opened)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as Parquet ({str(error).strip()})") from error


def _category_set_of(file: Path | str) -> CategorySet:
    """Return the set that a file's metadata state; for a file without, the one that its segments show."""
    schema = _schema_of(file)
    stated = file_facts(schema.metadata or {}).get("categories")
    if stated:
        return CategorySet.from_records(stated["name"], stated["categories"])
    if schema_version(schema) == 1:
        return COCO_PANOPTIC
    seen: dict[int, Mapping[str, Any]] = {}
    with open_random(str(file)) as opened:
        for batch in pq.ParquetFile(opened).iter_batches(columns=["segments"]):
            seen.update({s["label"]: s for row in batch["segments"].to_pylist() for s in row or ()})
    in_coco = all(
        label < len(COCO_PANOPTIC) and COCO_PANOPTIC[label].display_name == s["category"] for label, s in seen.items()
    )
    if in_coco:
        return COCO_PANOPTIC
    # Another tool dropped the metadata: classes that no segment has keep their place, but not their name.
    records = []
    for label in range(max(seen) + 1):
        unnamed = {"category_id": -1 - label, "category": f"unnamed {label}", "is_thing": False}
        segment = seen.get(label, unnamed)
        records.append({"id": segment["category_id"], "name": segment["category"], "isthing": segment["is_thing"]})
    return read_categories(records, str(file))


class RowGroupWriter:
    """Writes records to a new Parquet file, a row group whenever enough of them have come.

    Args:
        file: open for writing.
        raw: columns, by their Parquet path, that are compressed already and stored as they are.
        options: further ones of `pyarrow.parquet.ParquetWriter`.
    """

    def __init__(self, file: Any, schema: pa.Schema, raw: Sequence[str], **options: Any) -> None:
        columns = [leaf for column in schema for leaf in _leaf_columns(column)]
        compression = {column: "none" if column in raw else "zstd" for column in columns}
        self._schema = schema
        self._writer = pq.ParquetWriter(file, schema, compression=compression, write_page_index=True, **options)
        self._records: list[dict[str, Any]] = []
        self._bytes = 0
        self.rows = 0

    def write(self, record: dict[str, Any], size: int) -> None:
        """Add a record that takes about `size` bytes; the file grows when its row group is full."""
        self._records.append(record)
        self._bytes += size
        self.rows += 1
        if len(self._records) >= ROWS_PER_GROUP or self._bytes >= BYTES_PER_GROUP:
            self._flush()

    def close(self, metadata: Mapping[bytes, bytes] | None = None) -> None:
        """Write what is left, and metadata that only all records together could tell."""
        self._flush()
        if metadata:
            self._writer.add_key_value_metadata(metadata)
        self._writer.close()

    def _flush(self) -> None:
        if self._records:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._records, schema=self._schema))
        self._records, self._bytes = [], 0


class CrayonFileWriter:
    """Writes crayon rows to a new file; `close` makes it whole and tells its size and SHA-256.

    Args:
        file: open for writing.
        facts: of the build, for the file's metadata.
        categories: the set of the rows' classes, for the metadata too.
    """

    def __init__(self, file: BinaryIO, facts: Mapping[str, Any], categories: CategorySet = COCO_PANOPTIC) -> None:
        stated = {"name": categories.name, "categories": categories.as_records()}
        metadata = {**CRAYON_SCHEMA.metadata, **metadata_of({**facts, "categories": stated})}
        schema = CRAYON_SCHEMA.with_metadata(metadata)
        self._file = _HashingFile(file)
        self._writer = RowGroupWriter(self._file, schema, ["image.bytes"], use_dictionary=list(_DICTIONARY_COLUMNS))

    def write(self, row: CrayonRow) -> None:
        self._writer.write(row.as_record(), len(row.image_bytes or b"") + len(row.panoptic_png or b""))

    def close(self, late_facts: Mapping[str, Any]) -> tuple[int, str]:
        """Finish the file, adding facts that only its rows could tell; its size in bytes and its SHA-256."""
        self._writer.close(metadata_of(late_facts))
        self._file.close()
        return self._file.size, self._file.sha256


class _HashingFile:
    """A file that hashes and counts what is written to it."""

    closed = False  # asked for by pyarrow

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        self.closed = True

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


def _leaf_columns(column: pa.Field) -> list[str]:
    """Return the Parquet paths below a column, e.g. `sources.list.element`."""
    if pa.types.is_struct(column.type):
        return [f"{column.name}.{leaf}" for child in column.type for leaf in _leaf_columns(child)]
    if pa.types.is_list(column.type):
        element = column.type.value_field.with_name("element")
        return [f"{column.name}.list.{leaf}" for leaf in _leaf_columns(element)]
    return [column.name]


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file; build data with pipelines/build_crayon.py")
    files = list(path.glob("*.parquet"))
    if not files:
        raise UserError(f"{path}: the folder holds no .parquet file")
    return files


def _check_complete(folder: Path, names: Sequence[str]) -> None:
    for kind, total in {(match[1], match[2]) for name in names if (match := _SHARD_NAME.fullmatch(name))}:
        found = sum(name.startswith(f"{kind}-") and name.endswith(f"-of-{total}.parquet") for name in names)
        if found < int(total):
            raise UserError(
                f"{folder}: {found} of {int(total)} files {kind}-*.parquet; name them all, or build the data again"
            )
