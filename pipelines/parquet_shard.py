"""One Parquet file of crayon rows, written so that readers like it.

Row groups of about 100 rows, so that shuffled reading costs little; image bytes stored as they are, since they are
compressed already, and zstd for the rest; a page index; SHA-256 taken while writing.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage import open_write
from schemas.crayon_row import CRAYON_SCHEMA, CrayonRow, metadata_of

ROWS_PER_GROUP = 100
BYTES_PER_GROUP = 32 << 20
"""A row group ends at whichever of the two comes first."""

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


class ShardWriter:
    """Writes rows to a new file; `close` makes it whole."""

    def __init__(self, uri: str, facts: Mapping[str, Any]) -> None:
        self._file = _HashingFile(open_write(uri))
        self._schema = CRAYON_SCHEMA.with_metadata({**CRAYON_SCHEMA.metadata, **metadata_of(facts)})
        columns = [leaf for column in self._schema for leaf in _leaf_columns(column)]
        self._writer = pq.ParquetWriter(
            self._file,
            self._schema,
            compression={column: "none" if column == "image.bytes" else "zstd" for column in columns},
            use_dictionary=list(_DICTIONARY_COLUMNS),
            write_page_index=True,
        )
        self._records: list[dict[str, Any]] = []
        self._bytes = 0
        self.rows = 0

    def write(self, row: CrayonRow) -> None:
        self._records.append(row.as_record())
        self._bytes += len(row.image_bytes or b"") + len(row.panoptic_png)
        self.rows += 1
        if len(self._records) >= ROWS_PER_GROUP or self._bytes >= BYTES_PER_GROUP:
            self._flush()

    def close(self, late_facts: Mapping[str, Any]) -> tuple[int, str]:
        """Finish the file, adding facts that only its rows could tell; its size in bytes and its SHA-256."""
        self._flush()
        self._writer.add_key_value_metadata(metadata_of(late_facts))
        self._writer.close()
        self._file.close()
        return self._file.size, self._file.sha256

    def _flush(self) -> None:
        if self._records:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._records, schema=self._schema))
        self._records = []
        self._bytes = 0


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
    """The Parquet paths below a column, e.g. `sources.list.element`."""
    if pa.types.is_struct(column.type):
        return [f"{column.name}.{leaf}" for child in column.type for leaf in _leaf_columns(child)]
    if pa.types.is_list(column.type):
        element = column.type.value_field.with_name("element")
        return [f"{column.name}.list.{leaf}" for leaf in _leaf_columns(element)]
    return [column.name]
