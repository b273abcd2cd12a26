"""What a data set holds, without its images: where each row lies, and how long its texts are.

The text columns are read once, at the start. The plan of the batches follows from this index alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from posixpath import basename
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from collavo.dataset import opened_parquet, read_records
from collavo.errors import LeftOut, Rejected
from collavo.model.prompt import KINDS, Kind
from collavo.row_checks import check_record
from collavo.training.lengths import NO_LIST, LengthLimit
from schemas.categories import COCO_PANOPTIC, CategorySet
from schemas.crayon_row import SPLITS, TASKS

_COLUMNS = (
    "image_id", "image_sha256", "width", "height", "license_id", "split", "segments", "instructions", "conversations",
)  # fmt: skip

_NO_ROW: dict[str, Any] = {"image_id": "", "width": None, "instructions": (), "conversations": ()}


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group of a file, the unit of reading. Row numbers count over the whole data set, from `first_row` on."""

    file: str
    group: int
    first_row: int
    rows: int
    bytes: int
    """Of its columns before compression, by which a file is known to be still the same."""


@dataclass(frozen=True, slots=True)
class Texts:
    """All instructions, or all dialogues, in order of their rows.

    Those of a row are `offsets[row]:offsets[row + 1]`. `numbers` are their places in the row's own list, `lengths` and
    `objects` what they take of a sequence, see `collavo.training.lengths.Fitted`.
    """

    offsets: np.ndarray
    numbers: np.ndarray
    lengths: np.ndarray
    objects: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def of_row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers and lengths of a row's texts."""
        part = slice(self.offsets[row], self.offsets[row + 1])
        return self.numbers[part], self.lengths[part]

    def objects_of(self, row: int, numbers: Sequence[int]) -> list[int]:
        """Return how many objects the prompts of some texts of a row list."""
        part = slice(self.offsets[row], self.offsets[row + 1])
        listed = dict(zip(self.numbers[part].tolist(), self.objects[part].tolist(), strict=True))
        return [listed[number] for number in numbers]


@dataclass(frozen=True, slots=True)
class RowIndex:
    """The texts of one split. Rows of other splits keep their numbers, but have no texts here."""

    row_groups: tuple[RowGroup, ...]
    texts: dict[Kind, Texts]
    left_out: LeftOut
    """Damaged rows of all splits, texts that do not fit into a sequence, and object lists that do not fit in whole."""

    max_length: int
    """Tokens of a sequence at most."""

    has_null_images: bool
    """Whether some row refers to its image instead of holding it."""


def build_row_indexes(
    files: Iterable[str],
    limit: LengthLimit,
    tasks: Sequence[str] = TASKS,
    categories: CategorySet = COCO_PANOPTIC,
    kinds: Sequence[Kind] = KINDS,
) -> dict[str, RowIndex]:
    """Index the rows of all splits, by split.

    Args:
        files: crayon data, already checked by `collavo.dataset.find_files`.
        limit: tells what fits; what does not is left out and counted.
        tasks: instructions of other tasks are ignored.
        categories: the set of the rows' classes.
        kinds: of the texts to index.

    Raises:
        UserError: if a file cannot be read.
    """
    groups: list[RowGroup] = []
    left_out = {split: LeftOut() for split in SPLITS}
    collected = {split: {kind: _Collector(kind, limit, left_out[split]) for kind in kinds} for split in SPLITS}
    null_images = False
    rows = 0
    for file in files:
        with opened_parquet(file) as parquet:
            columns = [column for column in _COLUMNS if column in parquet.schema_arrow.names]
            for group in range(parquet.num_row_groups):
                null_images |= _has_null_images(parquet, group)
                first_row = rows
                for record in read_records(parquet, columns, group):
                    rows += 1
                    usable = _usable(record, categories, f"row {rows} of {basename(file)}", left_out.values())
                    for split, of_split in collected.items():
                        wanted = usable if usable and usable["split"] == split else _NO_ROW
                        for kind, collector in of_split.items():
                            collector.add_row(wanted, _numbers_of(wanted, kind, tasks))
                size = parquet.metadata.row_group(group).total_byte_size
                groups.append(RowGroup(file, group, first_row, rows - first_row, size))
    return {
        split: RowIndex(
            tuple(groups),
            {kind: collector.texts() for kind, collector in of_split.items()},
            left_out[split],
            limit.max_length,
            null_images,
        )
        for split, of_split in collected.items()
    }


@dataclass(slots=True)
class _Collector:
    """Gathers the `Texts` of one kind, row by row."""

    kind: Kind
    limit: LengthLimit
    left_out: LeftOut
    offsets: list[int] = field(default_factory=lambda: [0])
    columns: list[tuple[int, int, int]] = field(default_factory=list)

    def add_row(self, record: dict[str, Any], numbers: Sequence[int]) -> None:
        for number, fitted in zip(numbers, self.limit.fit(self.kind, numbers, record), strict=True):
            name = f"{record['image_id']}[{number}]"
            if isinstance(fitted, Rejected):
                self.left_out.add(fitted.reason, name, str(fitted))
                continue
            if fitted.shortened:
                reason = "object_list" if fitted.objects == NO_LIST else "rest_of_object_list"
                self.left_out.add(reason, name, f"{max(fitted.objects, 0)} of {len(record['segments'])} kept")
            self.columns.append((number, fitted.tokens, fitted.objects))
        self.offsets.append(len(self.columns))

    def texts(self) -> Texts:
        columns = np.array(self.columns, np.int32).reshape(-1, 3)
        return Texts(np.array(self.offsets), *columns.T)


def _numbers_of(record: Mapping[str, Any], kind: Kind, tasks: Sequence[str]) -> Sequence[int]:
    """List the places of the texts of one kind in a row."""
    if kind == "crayon":
        return [number for number, asked in enumerate(record["instructions"]) if asked["task"] in tasks]
    if kind == "caption" and record["width"] is None:  # a dialogue about no image shows the projector nothing
        return []
    return range(len(record["conversations"]))


def _usable(
    record: dict[str, Any] | Rejected, categories: CategorySet, place: str, left_out: Iterable[LeftOut]
) -> dict[str, Any] | None:
    """Return a row that can be learned from; count any other."""
    try:
        if isinstance(record, Rejected):
            raise record
        check_record(record, categories)
        return record
    except Rejected as error:
        for of_split in left_out:
            of_split.add(error.reason, place, str(error))
        return None


def _has_null_images(parquet: pq.ParquetFile, group: int) -> bool:
    """Tell from the statistics in a file's footer, without reading an image."""
    columns = map(parquet.metadata.row_group(group).column, range(parquet.metadata.num_columns))
    statistics = {column.path_in_schema: column.statistics for column in columns}
    of_bytes, of_paths = statistics.get("image.bytes"), statistics.get("image.path")
    if of_bytes is None or of_paths is None:
        return parquet.metadata.row_group(group).num_rows > 0
    # A dialogue about no image has neither bytes nor a path.
    return bool(of_bytes.null_count > of_paths.null_count)
