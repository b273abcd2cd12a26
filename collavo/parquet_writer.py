"""Writes crayon rows, and the records of an export, to Parquet files.

Files are written so that readers like them: row groups of about 100 rows, so that shuffled reading costs little;
image bytes stored as they are, since they are compressed already, and zstd for the rest; a page index.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.categories import COCO_PANOPTIC, CategorySet
from schemas.crayon_row import CRAYON_SCHEMA, CrayonRow, metadata_of

ROWS_PER_GROUP = 100
BYTES_PER_GROUP = 32 << 20
"""A row group ends at whichever of the two comes first."""

_LEAST_ROWS_PER_GROUP, _GROUPS = 8, 64
"""A small data set has row groups of fewer rows, but not below the first, so that there are as many as the second: with
few, several ranks of a training read many of them twice (`collavo.training.batch_plan`)."""

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


class RowGroupWriter:
    """Writes records to a new Parquet file, a row group whenever enough of them have come.

    Args:
        file: open for writing.
        raw: columns, by their Parquet path, that are compressed already and stored as they are.
        rows_per_group: rows of a row group at most.
        options: further ones of `pyarrow.parquet.ParquetWriter`.
    """

    def __init__(
        self, file: Any, schema: pa.Schema, raw: Sequence[str], rows_per_group: int = ROWS_PER_GROUP, **options: Any
    ) -> None:
        empty = pa.BufferOutputStream()
        pq.write_table(schema.empty_table(), empty)
        leaves = pq.read_metadata(pa.BufferReader(empty.getvalue())).schema
        columns = [leaves.column(number).path for number in range(len(leaves))]
        compression = {column: "none" if column in raw else "zstd" for column in columns}
        self._schema = schema
        self._writer = pq.ParquetWriter(file, schema, compression=compression, write_page_index=True, **options)
        self._records: list[dict[str, Any]] = []
        self._bytes = 0
        self._rows_per_group = rows_per_group
        self.rows = 0

    def write(self, record: dict[str, Any], size: int) -> None:
        """Add a record that takes about `size` bytes; the file grows when its row group is full."""
        self._records.append(record)
        self._bytes += size
        self.rows += 1
        if len(self._records) >= self._rows_per_group or self._bytes >= BYTES_PER_GROUP:
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
        expected_rows: of all files of its split, about; None for many.
    """

    def __init__(
        self,
        file: BinaryIO,
        facts: Mapping[str, Any],
        categories: CategorySet = COCO_PANOPTIC,
        expected_rows: int | None = None,
    ) -> None:
        stated = {"name": categories.name, "categories": categories.as_records()}
        metadata = {**CRAYON_SCHEMA.metadata, **metadata_of({**facts, "categories": stated})}
        schema = CRAYON_SCHEMA.with_metadata(metadata)
        self._file = _HashingFile(file)
        rows = ROWS_PER_GROUP
        if expected_rows is not None:
            rows = min(max(expected_rows // _GROUPS, _LEAST_ROWS_PER_GROUP), ROWS_PER_GROUP)
        dictionaries = list(_DICTIONARY_COLUMNS)
        self._writer = RowGroupWriter(self._file, schema, ["image.bytes"], rows, use_dictionary=dictionaries)

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
