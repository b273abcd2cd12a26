"""From samples to tensors: rows read, images decoded, maps gridded, texts rendered, sequences padded.

All of it happens in the loader's workers. A worker keeps the row groups it has read until the plan has moved on, so
that one worker reads every byte once.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from collavo.errors import Rejected, UserError
from collavo.images import decode_rgb
from collavo.instructions.text import format_objects_with_boxes
from collavo.model.packing import PADDING, SHARED, packed_positions
from collavo.model.processing import CollavoProcessor
from collavo.model.prompt import RenderedPrompt
from collavo.panoptic.index_png import decode_index_map
from collavo.panoptic.maps import PanopticMap
from collavo.sources.image_paths import checked_relative
from collavo.training.batch_plan import ROWS_PER_WINDOW, Batch, Sample
from collavo.training.row_index import Kind, RowGroup, RowIndex
from schemas.crayon_row import Segment

IGNORED = -100
"""Label of tokens that the loss does not cover."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence about one image, not yet padded.

    `sequence_ids` tell packed instructions apart (see `collavo.model.packing`); the maps are int64 [rows, columns],
    the pixels float32 [3, height, width], all else int64 [tokens].
    """

    kind: Kind
    image_id: str
    input_ids: torch.Tensor
    labels: torch.Tensor
    sequence_ids: torch.Tensor
    pixel_values: torch.Tensor
    semantic_ids: torch.Tensor
    numbering_ids: torch.Tensor


@dataclass(slots=True)
class MicroBatch:
    """Padded sequences: `inputs` for the model's forward, and who they are."""

    kind: Kind
    image_ids: list[str]
    inputs: dict[str, torch.Tensor]

    @property
    def supervised_tokens(self) -> int:
        return int((self.inputs["labels"] != IGNORED).sum())

    def pin_memory(self) -> "MicroBatch":
        self.inputs = {name: tensor.pin_memory() for name, tensor in self.inputs.items()}
        return self


class RowReader:
    """Rows by their number, the last row groups kept in memory."""

    def __init__(self, row_groups: Sequence[RowGroup], columns: Sequence[str], kept_rows: int) -> None:
        self._groups = row_groups
        self._first_rows = [group.first_row for group in row_groups]
        self._columns = list(columns)
        self._kept_rows = kept_rows
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()

    def read(self, row: int) -> dict[str, Any]:
        number = bisect_right(self._first_rows, row) - 1
        if number not in self._tables:
            group = self._groups[number]
            self._tables[number] = pq.ParquetFile(group.file).read_row_group(group.group, columns=self._columns)
            while len(self._tables) > 1 and sum(map(len, self._tables.values())) > self._kept_rows:
                self._tables.popitem(last=False)
        self._tables.move_to_end(number)
        record: dict[str, Any] = self._tables[number].slice(row - self._first_rows[number], 1).to_pylist()[0]
        return record


@dataclass(frozen=True, slots=True)
class ExampleOptions:
    """How rows become examples."""

    object_list: str
    """Which prompts begin with the recognised objects: `dialogues`, `all` or `none`."""

    image_root: Path | None
    """Where rows that refer to their image find it."""


class ExampleDataset(Dataset[Example | UserError]):
    """Samples, as examples; the index is the sample itself.

    What is wrong with a sample comes as its example: raised in a worker process, an error would arrive with that
    process's traceback for a message.
    """

    def __init__(
        self,
        index: RowIndex,
        processor: CollavoProcessor,
        options: ExampleOptions,
    ) -> None:
        self.index = index
        if index.has_null_images and options.image_root is None:
            raise UserError("--data: its rows refer to their images; --image_root must name the folder they lie in")
        columns = ("image_id", "image", "width", "height", "panoptic_map", "segments", "instructions", "conversations")
        self._reader = RowReader(index.row_groups, columns, kept_rows=2 * ROWS_PER_WINDOW)
        self._processor = processor
        self._options = options

    def __getitem__(self, sample: Sample) -> Example | UserError:
        try:
            return self.example(sample)
        except UserError as error:
            return error

    def example(self, sample: Sample) -> Example:
        """The example of a sample.

        Raises:
            UserError: where its image is missing or damaged.
        """
        record = self._reader.read(sample.row)
        segments = [Segment.from_record(segment) for segment in record["segments"]]
        prompts = self._prompts(sample, record, segments)
        input_ids, labels, sequence_ids = pack_prompts(prompts, self._processor.image_token_id)
        panoptic = PanopticMap(decode_index_map(record["panoptic_map"]["bytes"]), tuple(segments))
        picture = self._processor.picture_inputs([self._image(record)], [panoptic])
        return Example(
            kind=sample.kind,
            image_id=record["image_id"],
            input_ids=input_ids,
            labels=labels,
            sequence_ids=sequence_ids,
            **{name: tensor[0] for name, tensor in picture.items()},
        )

    def prompt_of(self, sample: Sample) -> RenderedPrompt:
        """The first prompt of a sample, to be looked at."""
        record = self._reader.read(sample.row)
        return self._prompts(sample, record, [Segment.from_record(segment) for segment in record["segments"]])[0]

    def _prompts(self, sample: Sample, record: dict[str, Any], segments: Sequence[Segment]) -> list[RenderedPrompt]:
        listed = self._options.object_list == "all" or (
            self._options.object_list == "dialogues" and sample.kind == "dialogue"
        )
        size_wh = (record["width"], record["height"])
        objects = format_objects_with_boxes(segments, size_wh) if listed else None
        if sample.kind == "dialogue":
            turns = record["conversations"][sample.numbers[0]]["turns"]
            return [self._processor.render([(turn["from"], turn["value"]) for turn in turns], objects)]
        asked = [record["instructions"][number] for number in sample.numbers]
        return [self._processor.render([("human", i["question"]), ("gpt", i["answer"])], objects) for i in asked]

    def _image(self, record: dict[str, Any]) -> np.ndarray:
        try:
            data = record["image"]["bytes"]
            if data is None:
                assert self._options.image_root is not None  # checked where the data set was made
                data = (self._options.image_root / checked_relative(record["image"]["path"])).read_bytes()
            return decode_rgb(data)
        except (Rejected, OSError) as error:
            raise UserError(f"--data: image of {record['image_id']}: {error}") from error


def pack_prompts(
    prompts: Sequence[RenderedPrompt], image_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Several prompts about one image as one sequence that holds the image once.

    Returns:
        input_ids, labels and sequence_ids, int64 [tokens] each. A single prompt is all `SHARED`.
    """
    first = prompts[0].input_ids
    shared = len(first) - first[::-1].index(image_token_id)
    input_ids, labels = list(first[:shared]), [IGNORED] * shared
    sequence_ids = [SHARED] * shared
    for number, prompt in enumerate(prompts, start=1):
        input_ids += prompt.input_ids[shared:]
        labels += prompt.labels[shared:]
        sequence_ids += [number if len(prompts) > 1 else SHARED] * (len(prompt.input_ids) - shared)
    return torch.tensor(input_ids), torch.tensor(labels), torch.tensor(sequence_ids)


def collate(examples: Sequence[Example], pad_token_id: int) -> MicroBatch:
    """Pad on the right and stack; with packed sequences among them, sequence ids take the place of an attention
    mask."""

    def padded(name: str, value: int) -> torch.Tensor:
        return pad_sequence([getattr(e, name) for e in examples], batch_first=True, padding_value=value)

    sequence_ids = padded("sequence_ids", PADDING)
    inputs = {
        "input_ids": padded("input_ids", pad_token_id),
        "labels": padded("labels", IGNORED),
        "pixel_values": torch.stack([example.pixel_values for example in examples]),
        "semantic_ids": torch.stack([example.semantic_ids for example in examples]),
        "numbering_ids": torch.stack([example.numbering_ids for example in examples]),
    }
    if (sequence_ids > SHARED).any():
        inputs |= {"sequence_ids": sequence_ids, "position_ids": packed_positions(sequence_ids)}
    else:
        inputs |= {"attention_mask": (sequence_ids != PADDING).long()}
    return MicroBatch(examples[0].kind, [example.image_id for example in examples], inputs)


def micro_batches(batch: Batch, size: int, rank: int, ranks: int) -> list[list[Sample]]:
    """One rank's share of a batch, in pieces that fit its memory."""
    share = batch.samples[rank::ranks]
    return [list(share[start : start + size]) for start in range(0, len(share), size)]


def build_loader(
    dataset: ExampleDataset, samples: Sequence[list[Sample]], pad_token_id: int, workers: int, pin_memory: bool
) -> Iterator[MicroBatch]:
    """Micro-batches in the order of the plan.

    Raises:
        UserError: where an image is missing or damaged, or a worker process dies.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=samples,  # its indices are samples
        collate_fn=partial(_collate_or_error, pad_token_id=pad_token_id),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
    )
    try:
        for piece in loader:
            if isinstance(piece, UserError):
                raise piece
            yield piece
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"--workers {workers}: a process that reads the data died ({str(error).splitlines()[0]}); memory, or in a "
            "container /dev/shm, is too small for it; lower --workers, 0 reads in the training process"
        ) from error


def _collate_or_error(examples: Sequence[Example | UserError], pad_token_id: int) -> MicroBatch | UserError:
    whole = [example for example in examples if isinstance(example, Example)]
    errors = [example for example in examples if isinstance(example, UserError)]
    return errors[0] if errors else collate(whole, pad_token_id)
