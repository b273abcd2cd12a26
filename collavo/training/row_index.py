"""What a data set holds, without its images: where each row lies, and how long its texts are.

The text columns are read once, at the start. The plan of the batches follows from this index alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from collavo.dataset import LeftOut, check_record, opened_parquet, read_records
from collavo.errors import Rejected
from collavo.model.prompt import KINDS, Kind
from schemas.categories import COCO_PANOPTIC
from schemas.crayon_row import TASKS

_COLUMNS = (
    "image_id", "image_sha256", "width", "height", "license_id", "split", "segments", "instructions", "conversations",
)  # fmt: skip

_NO_ROW: dict[str, Any] = {"image_id": "", "width": None, "instructions": (), "conversations": ()}

TOO_LONG: dict[Kind, str] = {
    "crayon": "too_long_instruction",
    "dialogue": "too_long_dialogue",
    "caption": "too_long_caption",
}
"""By what name texts that do not fit into a sequence are counted."""


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
    left_out: LeftOut
    """Damaged rows of all splits, and texts that do not fit into a sequence."""

    has_null_images: bool
    """Whether some row refers to its image instead of holding it."""


def build_row_index(
    files: Sequence[Path],
    split: str,
    count_tokens: Callable[[str], int],
    max_tokens: int,
    tasks: Sequence[str] = TASKS,
    classes: int = len(COCO_PANOPTIC),
    kinds: Sequence[Kind] = KINDS,
) -> RowIndex:
    """Index the rows of a split.

    Args:
        files: crayon data, already checked by `collavo.dataset.find_files`.
        split: `train` or `validation`.
        count_tokens: returns the tokens of a text, with those of the markers around it.
        max_tokens: longer texts are left out and counted.
        tasks: instructions of other tasks are ignored.
        classes: how many the data have.
        kinds: of the texts to index.

    Raises:
        UserError: if a file cannot be read.
    """
    groups: list[RowGroup] = []
    left_out = LeftOut()
    collected: dict[Kind, _Collector] = {kind: _Collector(kind, count_tokens, max_tokens, left_out) for kind in kinds}
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
                    usable = _usable(record, classes, f"row {rows} of {file.name}", left_out)
                    wanted = usable if usable and usable["split"] == split else _NO_ROW
                    for kind, collector in collected.items():
                        collector.add_row(wanted["image_id"], _texts_of(wanted, kind, tasks))
                groups.append(RowGroup(file, group, first_row, rows - first_row))
    return RowIndex(
        tuple(groups),
        {kind: collector.texts() for kind, collector in collected.items()},
        left_out,
        null_images,
    )


@dataclass(slots=True)
class _Collector:
    """Gathers the `Texts` of one kind, row by row."""

    kind: Kind
    count_tokens: Callable[[str], int]
    max_tokens: int
    left_out: LeftOut
    offsets: list[int] = field(default_factory=lambda: [0])
    numbers: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add_row(self, name: str, texts: Sequence[tuple[int, Sequence[str]]]) -> None:
        for number, parts in texts:
            # Bytes bound the tokens and cost nothing; where they do not fit, the tokens themselves decide.
            length = sum(len(part.encode()) for part in parts)
            if length > self.max_tokens:
                length = sum(map(self.count_tokens, parts))
            if length > self.max_tokens:
                self.left_out.add(TOO_LONG[self.kind], f"{name}[{number}]")
            else:
                self.numbers.append(number)
                self.lengths.append(length)
        self.offsets.append(len(self.numbers))

    def texts(self) -> Texts:
        return Texts(np.array(self.offsets), np.array(self.numbers, np.int32), np.array(self.lengths, np.int32))


def turns_of(dialogue: Mapping[str, Any], kind: Kind) -> list[tuple[str, str]]:
    """Return what a text of a row's dialogue holds: all its turns, or for a caption those up to the first answer."""
    turns = [(turn["from"], turn["value"]) for turn in dialogue["turns"]]
    answers = [number for number, (speaker, _) in enumerate(turns, start=1) if speaker == "gpt"]
    return turns[: answers[0]] if kind == "caption" and answers else turns


def _texts_of(record: Mapping[str, Any], kind: Kind, tasks: Sequence[str]) -> list[tuple[int, list[str]]]:
    """List the texts of one kind in a row: their places, and their parts."""
    if kind == "crayon":
        asked = enumerate(record["instructions"])
        return [(number, [i["question"], i["answer"]]) for number, i in asked if i["task"] in tasks]
    if kind == "caption" and record["width"] is None:  # a dialogue about no image shows the projector nothing
        return []
    said = enumerate(record["conversations"])
    return [(number, [text for _, text in turns_of(dialogue, kind)]) for number, dialogue in said]


def _usable(record: dict[str, Any] | Rejected, classes: int, place: str, left_out: LeftOut) -> dict[str, Any] | None:
    """Return a row that can be learned from; count any other."""
    try:
        if isinstance(record, Rejected):
            raise record
        check_record(record, classes)
        return record
    except Rejected as error:
        left_out.add(error.reason, place, str(error))
        return None


def _has_null_images(parquet: pq.ParquetFile, group: int) -> bool:
    """Tell from the statistics in a file's footer, without reading an image."""
    columns = map(parquet.metadata.row_group(group).column, range(parquet.metadata.num_columns))
    statistics = {column.path_in_schema: column.statistics for column in columns}
    of_bytes, of_paths = statistics.get("image.bytes"), statistics.get("image.path")
    if of_bytes is None or of_paths is None:
        return True
    # A dialogue about no image has neither bytes nor a path.
    return bool(of_bytes.null_count > of_paths.null_count)
