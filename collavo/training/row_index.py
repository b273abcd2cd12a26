"""What a data set holds, without its images: where each row lies, and how long its texts are.

The text columns are read once, at the start. The plan of the batches follows from this index alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from collavo.errors import UserError
from collavo.model.prompt import KINDS, Kind
from schemas.crayon_row import TASKS


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group of a file, the unit of reading. Row numbers count over the whole data set, from `first_row` on."""

    file: Path
    group: int
    first_row: int
    rows: int


@dataclass(frozen=True, slots=True)
class Texts:
    """All instructions, or all dialogues, in order of their rows.

    Those of a row are `offsets[row]:offsets[row + 1]`. `numbers` are their places in the row's own list, `lengths` are
    upper bounds of their tokens.
    """

    offsets: np.ndarray
    numbers: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def of_row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers and lengths of a row's texts."""
        part = slice(self.offsets[row], self.offsets[row + 1])
        return self.numbers[part], self.lengths[part]


@dataclass(frozen=True, slots=True)
class RowIndex:
    """The texts of one split. Rows of other splits keep their numbers, but have no texts here."""

    row_groups: tuple[RowGroup, ...]
    texts: dict[Kind, Texts]
    too_long: dict[Kind, int]
    """How many texts were left out because they do not fit into a sequence."""

    has_null_images: bool
    """Whether some row refers to its image instead of holding it."""


def build_row_index(
    files: Sequence[Path],
    split: str,
    token_bound: Callable[[str], int],
    max_tokens: int,
    tasks: Sequence[str] = TASKS,
) -> RowIndex:
    """Index the rows of a split.

    Args:
        files: crayon data, already checked by `collavo.dataset.find_files`.
        split: `train` or `validation`.
        token_bound: returns an upper bound of the tokens of a text.
        max_tokens: longer texts are left out and counted.
        tasks: instructions of other tasks are ignored.

    Raises:
        UserError: if the split has no rows.
    """
    groups: list[RowGroup] = []
    collected: dict[Kind, _Collector] = {kind: _Collector(token_bound, max_tokens) for kind in KINDS}
    null_images = False
    rows = rows_in_split = 0
    for file in files:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            null_images |= _has_null_images(parquet, group)
            table = parquet.read_row_group(group, columns=["split", "instructions", "conversations"])
            groups.append(RowGroup(file, group, rows, table.num_rows))
            rows += table.num_rows
            for record in table.to_pylist():
                wanted = record["split"] == split
                rows_in_split += wanted
                asked, said = enumerate(record["instructions"]), enumerate(record["conversations"])
                collected["crayon"].add_row(
                    [(i, [r["question"], r["answer"]]) for i, r in asked if wanted and r["task"] in tasks]
                )
                collected["dialogue"].add_row([(i, [t["value"] for t in d["turns"]]) for i, d in said if wanted])
    if not rows_in_split:
        raise UserError(f"none of the {rows} rows is in the split {split!r}")
    return RowIndex(
        tuple(groups),
        {kind: collector.texts() for kind, collector in collected.items()},
        {kind: collector.too_long for kind, collector in collected.items()},
        null_images,
    )


@dataclass(slots=True)
class _Collector:
    """Gathers the `Texts` of one kind, row by row."""

    token_bound: Callable[[str], int]
    max_tokens: int
    too_long: int = 0
    offsets: list[int] = field(default_factory=lambda: [0])
    numbers: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add_row(self, texts: Sequence[tuple[int, Sequence[str]]]) -> None:
        for number, parts in texts:
            length = sum(map(self.token_bound, parts))
            if length > self.max_tokens:
                self.too_long += 1
            else:
                self.numbers.append(number)
                self.lengths.append(length)
        self.offsets.append(len(self.numbers))

    def texts(self) -> Texts:
        return Texts(np.array(self.offsets), np.array(self.numbers, np.int32), np.array(self.lengths, np.int32))


def _has_null_images(parquet: pq.ParquetFile, group: int) -> bool:
    """Tell from the statistics in a file's footer, without reading an image."""
    columns = map(parquet.metadata.row_group(group).column, range(parquet.metadata.num_columns))
    statistics = {column.path_in_schema: column.statistics for column in columns}
    of_bytes, of_paths = statistics.get("image.bytes"), statistics.get("image.path")
    if of_bytes is None or of_paths is None:
        return True
    # A dialogue about no image has neither bytes nor a path.
    return bool(of_bytes.null_count > of_paths.null_count)
