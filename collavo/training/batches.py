"""From samples to tensors: rows read, images decoded, maps gridded, texts rendered and packed, sequences padded.

All of it happens in the loader's worker processes.
"""

import math
import signal
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import nlargest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from collavo.dataset import decoded_image, opened_parquet
from collavo.errors import Rejected, UserError
from collavo.model.packing import PADDING, SHARED, packed_positions
from collavo.model.processing import CollavoProcessor
from collavo.model.prompt import Kind, RenderedPrompt
from collavo.panoptic.index_png import panoptic_map_of
from collavo.panoptic.maps import PanopticMap, build_panoptic_map
from collavo.row_checks import check_record
from collavo.storage import is_local
from collavo.training.batch_plan import Batch, Sample, rows_in_use
from collavo.training.lengths import object_list, turns_of
from collavo.training.row_index import RowGroup, RowIndex
from schemas.categories import COCO_PANOPTIC, CategorySet
from schemas.crayon_row import Segment

IGNORED = -100
"""Label of tokens that the loss does not cover."""

_COLUMNS = ("image_id", "image", "width", "height", "panoptic_map", "segments", "instructions", "conversations")
_LATE_COLUMNS = ("image_id", "image", "width", "height", "panoptic_map")
"""What the index could not check, since it does not read pictures and maps."""


_TEXT_COLUMNS = tuple(name for name in _COLUMNS if name != "image")
"""What a prompt is made of. Pictures are nearly all of a row's bytes."""

_RENDERED_AT_MOST = 16
"""Samples among which the one that takes most memory is looked for."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence about one image, or a dialogue about none, not yet padded."""

    kind: Kind
    image_id: str
    input_ids: torch.Tensor
    """int64 [tokens]."""

    labels: torch.Tensor
    """int64 [tokens]: the token itself where it is supervised, `IGNORED` elsewhere."""

    sequence_ids: torch.Tensor
    """int64 [tokens]: which of the packed instructions a token belongs to; see `collavo.model.packing`."""

    pixel_values: torch.Tensor | None = None
    """float32 [3, height, width]; None, as the maps are, without an image."""

    semantic_ids: torch.Tensor | None = None
    numbering_ids: torch.Tensor | None = None
    """The crayon map, int64 [rows, columns] each."""


class Skipped(NamedTuple):
    """A sample that could not be prepared, and why."""

    kind: Kind
    image_id: str
    reason: str
    detail: str


@dataclass(slots=True)
class MicroBatch:
    """Padded sequences: `inputs` for the model's forward, and whose images they are about; no inputs where all of its
    samples were skipped."""

    kind: Kind
    image_ids: list[str]
    inputs: dict[str, torch.Tensor]
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def supervised_tokens(self) -> int:
        return int((self.inputs["labels"] != IGNORED).sum()) if self.inputs else 0

    def pin_memory(self) -> "MicroBatch":
        """Called by the loader, so that the copy to the GPU runs beside the computation."""
        self.inputs = {name: tensor.pin_memory() for name, tensor in self.inputs.items()}
        return self


_KEPT_FOOTERS = 64
"""Of files whose row groups are read one by one: a footer may be larger than a row group of a few small pictures."""


class RowReader:
    """Reads rows by their number and keeps the last row groups in memory.

    Args:
        kept_rows: how many rows to keep, see `collavo.training.batch_plan.rows_in_use`.
        columns: to read of them.
    """

    def __init__(self, row_groups: Sequence[RowGroup], kept_rows: int, columns: Sequence[str] = _COLUMNS) -> None:
        self._columns = list(columns)
        self._groups = row_groups
        self._first_rows = [group.first_row for group in row_groups]
        self._kept_rows = kept_rows
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()

    def read(self, row: int) -> dict[str, Any]:
        """Read a row, as plain values.

        Raises:
            Rejected: `unreadable_rows` if its row group is damaged where the index did not look, in pictures and maps.
            UserError: if its file is not the one that was indexed, or its disk or store refuses.
        """
        number = bisect_right(self._first_rows, row) - 1
        if number not in self._tables:
            group = self._groups[number]
            try:
                with opened_parquet(group.file, footer=self._footers.get(group.file)) as parquet:
                    footer = parquet.metadata
                    if same := _is_indexed(group, footer):
                        self._tables[number] = parquet.read_row_group(group.group, columns=self._columns)
                        self._footers[group.file] = footer
            except UserError as error:
                if not _is_damage(error.__cause__):  # the same sample may be read tomorrow
                    raise UserError(str(error), 1) from error
                detail = f"row group {group.group} of {error}"
                raise Rejected("unreadable_rows", detail, f"row {row}") from error
            if not same:
                raise UserError(f"{group.file}: was replaced while it was read; leave data alone until a run ends", 1)
            while len(self._tables) > 1 and sum(map(len, self._tables.values())) > self._kept_rows:
                self._tables.popitem(last=False)
            if len(self._footers) > _KEPT_FOOTERS:
                self._footers.popitem(last=False)
        self._tables.move_to_end(number)
        return self._tables[number].slice(row - self._first_rows[number], 1).to_pylist()[0]


def _is_damage(error: BaseException | None) -> bool:
    """Tell what Arrow finds wrong in a file's bytes from what a disk or a store refuses."""
    is_arrow_s_own = type(error) is OSError and error.errno is None
    return is_arrow_s_own or isinstance(error, pa.ArrowException | UnicodeDecodeError)


def _is_indexed(group: RowGroup, footer: pq.FileMetaData) -> bool:
    """Tell whether a file has a row group as the index knows it; another file would lend other rows its numbers."""
    if group.group >= footer.num_row_groups:
        return False
    found = footer.row_group(group.group)
    return (found.num_rows, found.total_byte_size) == (group.rows, group.bytes)


class ExampleDataset(Dataset[Example | Skipped | UserError]):
    """Samples, as examples; the index is the sample itself.

    Args:
        image_root: the folder that image paths in the rows start from.
        categories: the set of the rows' classes.
        ranks: as of `collavo.training.batch_plan.rows_in_use`.
    """

    def __init__(
        self,
        index: RowIndex,
        processor: CollavoProcessor,
        image_root: Path | None = None,
        categories: CategorySet = COCO_PANOPTIC,
        ranks: int = 1,
    ) -> None:
        self.index = index
        self._reader = RowReader(index.row_groups, kept := rows_in_use(index.row_groups, ranks))
        self._text_reader = RowReader(index.row_groups, kept, _TEXT_COLUMNS)
        self._processor = processor
        self._image_root = image_root
        self._categories = categories

    @property
    def is_local(self) -> bool:
        """Whether all rows lie on disks of this machine."""
        return all(is_local(group.file) for group in self.index.row_groups)

    def __getitem__(self, sample: Sample) -> Example | Skipped | UserError:
        # An error is returned, not raised: what a worker process raises arrives with its whole traceback as message.
        try:
            return self.example(sample)
        except Rejected as error:
            return Skipped(sample.kind, error.entry_id, error.reason, str(error))
        except UserError as error:
            return error

    def example(self, sample: Sample) -> Example:
        """Make the example of a sample.

        Raises:
            UserError: if rows refer to their images and there is no root.
            Rejected: if its image or map is missing or damaged, or its text cannot be rendered or is too long.
        """
        record = self._reader.read(sample.row)
        try:
            check_record({name: record[name] for name in _LATE_COLUMNS}, self._categories)
            prompts = self._prompts(sample, record)
            packed = pack_prompts(prompts, self._processor.image_token_id)
            if (length := len(packed[0])) > self.index.max_length:
                raise Rejected("too_long_sequence", f"{length:,} tokens")
            pixels = panoptic = None
            if _has_map(record):
                pixels = decoded_image(record["image"]["path"], record["image"]["bytes"], self._image_root)
                if sample.kind == "caption":  # the signal has no part in alignment
                    panoptic = build_panoptic_map(np.zeros(pixels.shape[:2], np.int32), (), self._categories)
                else:
                    segments = tuple(map(Segment.from_record, record["segments"]))
                    size_wh = (pixels.shape[1], pixels.shape[0])
                    panoptic = panoptic_map_of(record["panoptic_map"]["bytes"], segments, self._categories, size_wh)
        except Rejected as error:
            raise Rejected(error.reason, str(error), record["image_id"]) from error
        return example_of(self._processor, sample.kind, record["image_id"], prompts, pixels, panoptic)

    def longest(self, samples: Iterable[Sample], supervised_weight: float = 0) -> tuple[Sample, int, int] | None:
        """Find the sample whose sequence takes most memory, its tokens, and how many of them are supervised; None
        without any.

        Samples know bounds of their lengths. Those with the highest are rendered, for their tokens.

        Args:
            supervised_weight: what a supervised token takes beside what each token does.
        """
        found = []
        for sample in nlargest(_RENDERED_AT_MOST, samples, key=lambda sample: sample.tokens):
            with suppress(Rejected):
                prompts = self._prompts(sample, self._text_reader.read(sample.row))
                input_ids, labels, _ = pack_prompts(prompts, self._processor.image_token_id)
                found.append((sample, len(input_ids), int((labels != IGNORED).sum())))
        return max(found, key=lambda one: one[1] + supervised_weight * one[2], default=None)

    def prompt_of(self, batch: Batch) -> RenderedPrompt | None:
        """Return the first prompt of a batch, to show it; None if no sample of it can be rendered."""
        for sample in batch.samples:
            with suppress(Rejected):
                return self._prompts(sample, self._text_reader.read(sample.row))[0]
        return None

    def collate_or_error(self, examples: Sequence[Example | Skipped | UserError]) -> MicroBatch | UserError:
        """Make a micro-batch of what could be prepared, or return the first error."""
        for example in examples:
            if isinstance(example, UserError):
                return example
        whole = [example for example in examples if isinstance(example, Example)]
        skipped = [example for example in examples if isinstance(example, Skipped)]
        if not whole:
            return MicroBatch(skipped[0].kind, [], {}, skipped)
        batch = collate(whole, self._processor.tokenizer.pad_token_id)
        batch.skipped = skipped
        return batch

    def _prompts(self, sample: Sample, record: dict[str, Any]) -> list[RenderedPrompt]:
        objects = self.index.texts[sample.kind].objects_of(sample.row, sample.numbers)
        return prompts_of(self._processor, record, sample.kind, sample.numbers, objects, _has_map(record))


def prompts_of(
    processor: CollavoProcessor,
    record: Mapping[str, Any],
    kind: Kind,
    numbers: Sequence[int],
    objects: Sequence[int],
    has_image: bool,
) -> list[RenderedPrompt]:
    """Render texts of a row.

    Args:
        record: the row, as plain values.
        numbers: the row's instructions to render, or its one dialogue.
        objects: how many recognised objects each prompt begins with; `NO_LIST` for a prompt without a list.

    Raises:
        Rejected: if a text cannot be rendered.
    """
    return [
        processor.render(turns_of(record, kind, number), object_list(record, listed) if has_image else None, has_image)
        for number, listed in zip(numbers, objects, strict=True)
    ]


def example_of(
    processor: CollavoProcessor,
    kind: Kind,
    image_id: str,
    prompts: Sequence[RenderedPrompt],
    pixels: np.ndarray | None = None,
    panoptic: PanopticMap | None = None,
) -> Example:
    """Make an example of prompts about one picture, or about none.

    Args:
        pixels: uint8 RGB [height, width, 3], with its map.
    """
    packed = pack_prompts(prompts, processor.image_token_id)
    if pixels is None or panoptic is None:
        return Example(kind, image_id, *packed)
    picture = processor.picture_inputs([pixels], [panoptic])
    return Example(kind, image_id, *packed, **{name: tensor[0] for name, tensor in picture.items()})


def _has_map(record: Mapping[str, Any]) -> bool:
    return record["panoptic_map"] is not None and record["panoptic_map"]["bytes"] is not None


def pack_prompts(
    prompts: Sequence[RenderedPrompt], image_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pack several prompts about one image into one sequence that holds the image once.

    All prompts are alike up to the last image token. What follows it in each is appended in turn.

    Returns:
        input_ids, labels and sequence_ids, int64 [tokens] each. A single prompt is all `SHARED`.
    """
    first = prompts[0].input_ids
    if image_token_id not in first:  # a dialogue about no image, which is never packed
        return torch.tensor(first), torch.tensor(prompts[0].labels), torch.full((len(first),), SHARED)
    shared = len(first) - first[::-1].index(image_token_id)
    input_ids, labels = list(first[:shared]), [IGNORED] * shared
    sequence_ids = [SHARED] * shared
    for number, prompt in enumerate(prompts, start=1):
        input_ids += prompt.input_ids[shared:]
        labels += prompt.labels[shared:]
        sequence_ids += [number if len(prompts) > 1 else SHARED] * (len(prompt.input_ids) - shared)
    return torch.tensor(input_ids), torch.tensor(labels), torch.tensor(sequence_ids)


def collate(examples: Sequence[Example], pad_token_id: int) -> MicroBatch:
    """Pad on the right and stack.

    With packed sequences among the examples, the inputs have `sequence_ids` and `position_ids`. Without, no token looks
    at padding, which stands behind it. So there is no `attention_mask`: each layer would keep a copy of it for the
    backward pass, and faster kernels take none.
    """

    def padded(name: str, value: int) -> torch.Tensor:
        return pad_sequence([getattr(e, name) for e in examples], batch_first=True, padding_value=value)

    sequence_ids = padded("sequence_ids", PADDING)
    inputs = {"input_ids": padded("input_ids", pad_token_id), "labels": padded("labels", IGNORED)}
    with_image = [example for example in examples if example.pixel_values is not None]
    for name in ("pixel_values", "semantic_ids", "numbering_ids") if with_image else ():
        inputs[name] = torch.stack([getattr(example, name) for example in with_image])
    if (sequence_ids > SHARED).any():
        inputs |= {"sequence_ids": sequence_ids, "position_ids": packed_positions(sequence_ids)}
    return MicroBatch(examples[0].kind, [example.image_id for example in examples], inputs)


def micro_batches(batch: Batch, size: int, rank: int = 0, ranks: int = 1) -> list[list[Sample]]:
    """Cut one rank's share of a batch into pieces that fit into memory, each of sequences of about the same length."""
    of_rank = len(batch.samples) // ranks
    share = sorted(batch.samples[rank * of_rank : (rank + 1) * of_rank], key=lambda sample: sample.tokens)
    return [share[start : start + size] for start in range(0, len(share), size)]


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask a run to stop: those of schedulers, of Ctrl-C, and of a terminal that was closed."""


def _ignore_signals(_: int) -> None:
    """Let a worker outlive what is sent to a whole group of processes: the main process takes its last step first."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def build_loader(
    dataset: ExampleDataset, samples: Sequence[list[Sample]], workers: int, pin_memory: bool, ahead: int = 1
) -> Iterator[MicroBatch]:
    """Load micro-batches in the order of the plan; samples that cannot be prepared are skipped.

    Args:
        samples: those of each micro-batch.
        workers: processes that read and decode; 0 for none beside this one.
        ahead: micro-batches to prepare before they are asked for, at least. A step takes all of its own at its
            beginning, and a GPU should not wait for them.

    Raises:
        UserError: if rows refer to their images and there is no root, or a worker process dies.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=samples,  # any iterable of lists of indices will do, and here an index is a sample
        collate_fn=dataset.collate_or_error,
        num_workers=workers,
        prefetch_factor=max(4, math.ceil(ahead / workers)) if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        # A store's client has threads, which a forked process lacks: there its first request would wait for ever.
        multiprocessing_context="spawn" if workers and not dataset.is_local else None,
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
            f"one of {workers} processes that read the data died ({str(error).splitlines()[0]}); it ran out of memory, "
            "or in a container of /dev/shm; use fewer workers, or none, so that the training process reads the data"
        ) from error
