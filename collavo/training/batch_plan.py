"""Which samples make up which step.

Every step is of one kind: crayon instructions or dialogues. Shuffling all samples freely would read every row group
many times over. So the plan goes through the row groups in random order, some of them at a time (a window);
within a window, all samples are shuffled, and so are the batches of both kinds. Samples that do not fill a batch wait
for the next window. Each file is thus read about once, in order of use.

The plan of an epoch is a function of the seed and nothing else. That is what makes resuming exact (a resumed run skips
the batches that are done) and lets each rank compute its share of each batch without asking the others.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from collavo.model.prompt import Kind
from collavo.training.row_index import RowGroup, RowIndex

ROWS_PER_WINDOW = 1000
"""Rows whose samples are shuffled together. A reader that keeps twice as many in memory reads each of them once: a
waiting sample is used within the next window."""


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
    """What a plan depends on, beside the data."""

    batch_size: int
    seed: int
    instructions_per_sequence: int
    """Instructions of an image that share one sequence, at most."""

    max_tokens: int
    """Bound on the text of a sequence, in tokens."""

    crayon_share: float | None = None
    """Share of crayon samples, between 0 and 1 exclusive; the kind with too many is thinned out at random. None keeps
    all samples."""


def plan_epoch(index: RowIndex, kinds: Sequence[Kind], options: PlanOptions, epoch: int) -> list[Batch]:
    """Plan all batches of an epoch, in order.

    The last samples of each kind, which fill no batch, are left out; which samples these are differs by epoch.

    Args:
        kinds: of the samples; the phase decides.
    """
    # Philox gives the same numbers on every machine, and an independent stream for each key.
    rng = np.random.Generator(np.random.Philox(key=[options.seed, epoch]))
    windows = [
        [sample for group in window for sample in _samples_of(group, index, kinds, options, rng)]
        for window in _windows(index.row_groups, rng)
    ]
    kept = _kept_shares(Counter(sample.kind for window in windows for sample in window), options.crayon_share)
    waiting: dict[Kind, list[Sample]] = {kind: [] for kind in kinds}
    batches: list[Batch] = []
    for samples in windows:
        ready: list[Batch] = []
        for number in rng.permutation(len(samples)):
            sample = samples[number]
            # Draws a number even where all are kept, so that a share changes the selection and not the order.
            if rng.random() >= kept[sample.kind]:
                continue
            queue = waiting[sample.kind]
            queue.append(sample)
            if len(queue) == options.batch_size:
                ready.append(Batch(sample.kind, tuple(queue)))
                queue.clear()
        # Batches of the scarcer kind fill up late in a window; shuffled, both kinds are spread over it.
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
            order = rng.permutation(len(numbers))  # other instructions share a sequence in each epoch
            yield from (Sample("crayon", row, pack) for pack in _packs(numbers[order], lengths[order], options))
        for kind in (kind for kind in kinds if kind != "crayon"):
            numbers, _ = index.texts[kind].of_row(row)
            yield from (Sample(kind, row, (number,)) for number in numbers.tolist())


def _packs(numbers: np.ndarray, lengths: np.ndarray, options: PlanOptions) -> Iterator[tuple[int, ...]]:
    """Divide the instructions of a row into sequences that are neither too many nor too long."""
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


def _kept_shares(counts: Counter[Kind], crayon_share: float | None) -> dict[Kind, float]:
    """Return the share of each kind's samples to keep, so that the rest has the wanted mix; the scarcer kind stays
    whole."""
    if crayon_share is None or len(counts) < 2:
        return dict.fromkeys(counts, 1.0)
    wanted_ratio = crayon_share / (1 - crayon_share)
    ratio = counts["crayon"] / counts["dialogue"]
    return {"crayon": min(1.0, wanted_ratio / ratio), "dialogue": min(1.0, ratio / wanted_ratio)}
