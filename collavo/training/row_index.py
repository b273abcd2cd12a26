"""What a data set holds, without its images: where each row lies, and how long its texts are.

Built by reading the text columns once; everything that decides which samples there are, and in which order, rests on
it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq

from collavo.errors import UserError
from schemas.crayon_row import TASKS

Kind = Literal["crayon", "dialogue"]
"""What a sample is made of: instructions of a row, or one of its dialogues."""

KINDS: tuple[Kind, ...] = ("crayon", "dialogue")


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group of a file, the unit of reading; its rows count on from `first_row` over the whole data set."""

    file: Path
    group: int
    first_row: int
    rows: int


@dataclass(frozen=True, slots=True)
class Texts:
    """The instructions, or the dialogues, of all rows, one after the other; a row's are `offsets[row]:offsets[row +
    1]`.

    `numbers` are their places in the row's list, `lengths` upper bounds of their tokens.
    """

    offsets: np.ndarray
    numbers: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def of_row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[row], self.offsets[row + 1])
        return self.numbers[part], self.lengths[part]


@dataclass(frozen=True, slots=True)
class RowIndex:
    """The texts of one split; rows of other splits are there, without any."""

    row_groups: tuple[RowGroup, ...]
    texts: dict[Kind, Texts]
    too_long: dict[Kind, int]
    """How many were left out because no sequence could hold them."""

    has_null_images: bool


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
        token_bound: an upper bound of the tokens of a text.
        max_tokens: texts that may exceed it are left out, and counted.
        tasks: instructions of other tasks are passed over.

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
                asked = [
                    (i, [r["question"], r["answer"]])
                    for i, r in enumerate(record["instructions"])
                    if r["task"] in tasks
                ]
                said = [(i, [turn["value"] for turn in d["turns"]]) for i, d in enumerate(record["conversations"])]
                collected["crayon"].add_row(asked if wanted else [])
                collected["dialogue"].add_row(said if wanted else [])
    if not rows_in_split:
        raise UserError(f"--data: none of its {rows} rows is in the split {split!r}")
    return RowIndex(
        tuple(groups),
        {kind: collector.texts() for kind, collector in collected.items()},
        {kind: collector.too_long for kind, collector in collected.items()},
        null_images,
    )


class _Collector:
    def __init__(self, token_bound: Callable[[str], int], max_tokens: int) -> None:
        self._token_bound = token_bound
        self._max_tokens = max_tokens
        self._offsets = [0]
        self._numbers: list[int] = []
        self._lengths: list[int] = []
        self.too_long = 0

    def add_row(self, texts: Sequence[tuple[int, Sequence[str]]]) -> None:
        for number, parts in texts:
            length = sum(map(self._token_bound, parts))
            if length > self._max_tokens:
                self.too_long += 1
            else:
                self._numbers.append(number)
                self._lengths.append(length)
        self._offsets.append(len(self._numbers))

    def texts(self) -> Texts:
        return Texts(np.array(self._offsets), np.array(self._numbers, np.int32), np.array(self._lengths, np.int32))


def _has_null_images(parquet: pq.ParquetFile, group: int) -> bool:
    columns = parquet.metadata.row_group(group)
    for number in range(columns.num_columns):
        column = columns.column(number)
        if column.path_in_schema == "image.bytes":
            return bool(column.statistics is None or column.statistics.null_count)
    return True
