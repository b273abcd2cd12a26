"""Which samples make up which step.

Every step is of one kind: crayon instructions or dialogues. The plan walks through the data in windows of a few row
groups, in shuffled order; within a window all samples are shuffled, and so are the batches of both kinds. What does
not fill a batch is carried into the next window. So every file is read about once, in order of use; and since the plan
of an epoch follows from the seed alone, a resumed run skips what is done, and each rank takes its share of each batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from collavo.training.row_index import Kind, RowGroup, RowIndex

ROWS_PER_WINDOW = 1000
"""Rows whose samples are shuffled together; a reader that keeps twice as many reads each of them once."""


class Sample(NamedTuple):
    """One sequence: some instructions of a row, or one of its dialogues; `numbers` are their places in the row."""

    kind: Kind
    row: int
    numbers: tuple[int, ...]


class Batch(NamedTuple):
    """The samples of one optimizer step, over all ranks."""

    kind: Kind
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What determines a plan beside the data."""

    batch_size: int
    seed: int
    instructions_per_sequence: int
    """Instructions of an image that share one sequence, at most."""

    max_tokens: int
    """Bound on the text of a sequence, in tokens."""

    crayon_share: float | None = None
    """Share of crayon samples; None for the data's own. The kind there is too much of is thinned out evenly."""


def plan_epoch(index: RowIndex, kinds: Sequence[Kind], options: PlanOptions, epoch: int) -> list[Batch]:
    """All batches of an epoch, in order.

    A last batch of each kind that cannot be filled is left out; which samples these are differs by epoch.

    Args:
        kinds: those that take part: both for instruction tuning, `crayon` alone for Crayon Prompt Tuning.
    """
    rng = np.random.Generator(np.random.Philox(key=[options.seed, epoch]))
    samples_by_window = [
        [sample for group in window for sample in _samples_of(group, index, kinds, options, rng)]
        for window in _windows(index.row_groups, rng)
    ]
    kept = _kept_shares(samples_by_window, options.crayon_share)
    waiting: dict[Kind, list[Sample]] = {kind: [] for kind in kinds}
    batches: list[Batch] = []
    for samples in samples_by_window:
        ready: list[Batch] = []
        for number in rng.permutation(len(samples)):
            sample = samples[number]
            if rng.random() >= kept[sample.kind]:
                continue
            queue = waiting[sample.kind]
            queue.append(sample)
            if len(queue) == options.batch_size:
                ready.append(Batch(sample.kind, tuple(queue)))
                queue.clear()
        batches += [ready[number] for number in rng.permutation(len(ready))]
    return batches


def _windows(groups: Sequence[RowGroup], rng: np.random.Generator) -> Iterator[list[RowGroup]]:
    window: list[RowGroup] = []
    for number in rng.permutation(len(groups)):
        window.append(groups[number])
        if sum(group.rows for group in window) >= ROWS_PER_WINDOW:
            yield window
            window = []
    if window:
        yield window


def _samples_of(
    group: RowGroup, index: RowIndex, kinds: Sequence[Kind], options: PlanOptions, rng: np.random.Generator
) -> Iterator[Sample]:
    for row in range(group.first_row, group.first_row + group.rows):
        if "crayon" in kinds:
            numbers, lengths = index.texts["crayon"].of_row(row)
            order = rng.permutation(len(numbers))
            yield from (Sample("crayon", row, pack) for pack in _packs(numbers[order], lengths[order], options))
        if "dialogue" in kinds:
            numbers, _ = index.texts["dialogue"].of_row(row)
            yield from (Sample("dialogue", row, (number,)) for number in numbers.tolist())


def _packs(numbers: np.ndarray, lengths: np.ndarray, options: PlanOptions) -> Iterator[tuple[int, ...]]:
    """Instructions of one row, in sequences that are neither too many nor too long."""
    pack: list[int] = []
    tokens = 0
    for number, length in zip(numbers.tolist(), lengths.tolist(), strict=True):
        if pack and (len(pack) == options.instructions_per_sequence or tokens + length > options.max_tokens):
            yield tuple(pack)
            pack, tokens = [], 0
        pack.append(number)
        tokens += length
    if pack:
        yield tuple(pack)


def _kept_shares(samples_by_window: Sequence[Sequence[Sample]], crayon_share: float | None) -> dict[Kind, float]:
    """The share of each kind's samples to keep, so that what is left mixes as asked."""
    counts: dict[Kind, int] = {"crayon": 0, "dialogue": 0}
    for samples in samples_by_window:
        for sample in samples:
            counts[sample.kind] += 1
    if crayon_share is None or not all(counts.values()):
        return {"crayon": 1.0, "dialogue": 1.0}
    if not 0 < crayon_share < 1:
        return {"crayon": float(crayon_share == 1), "dialogue": float(crayon_share == 0)}
    wanted_ratio = crayon_share / (1 - crayon_share)
    ratio = counts["crayon"] / counts["dialogue"]
    return {"crayon": min(1.0, wanted_ratio / ratio), "dialogue": min(1.0, ratio / wanted_ratio)}
