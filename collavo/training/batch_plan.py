"""Which samples make up which step.

Every step is of one kind: crayon instructions or dialogues. Shuffling all samples freely would read every row group
many times over. So the plan goes through the row groups in random order, some of them at a time (a window), and
shuffles the samples and the batches of a window. Samples that do not fill a batch wait for the next window. Each row
group is thus read about once, in order of use.

That several ranks together read it about once too, row groups are dealt to lanes, a batch takes as many samples from
each lane as from any other, and its samples stand in the order of their lanes: lanes 0 and 1 of 8 are the first
quarter of every batch. A rank that takes such a quarter reads the row groups of two lanes and no other.

    window            row groups 5, 2, 7, 0, ...
    lanes             5 | 2 | 7 | 0, each shuffled in itself
    batch             s5 s5 | s2 s2 | s7 s7 | s0 s0
    ranks, here two   -------------   -------------

The plan of an epoch is a function of the seed and the data, whatever the number of ranks. That is what makes resuming
exact (a resumed run skips the batches that are done), also on other ranks, and lets each rank compute its share of each
batch without asking the others.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from collavo.model.prompt import Kind
from collavo.training.row_index import RowGroup, RowIndex

ROWS_PER_WINDOW = 1000
"""Rows whose samples are shuffled together, about. A reader that keeps three times as many in memory reads each row
group once: a waiting sample is used within the next window."""


MOST_LANES = 8
"""As many ranks read each row group once; of more ranks, several read the same one."""

_PIECES = 4 * MOST_LANES
"""A data set of fewer row groups is dealt in parts of row groups, so that lanes get about equal shares."""


class Sample(NamedTuple):
    """One sequence: some instructions of a row, or one of its dialogues; `numbers` are their places in the row."""

    kind: Kind
    row: int
    numbers: tuple[int, ...]


class Batch(NamedTuple):
    """The samples of one optimizer step, over all ranks, in the order of their lanes."""

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
        [list(_samples_of(rows, index, kinds, options, rng)) for rows in window]
        for window in _windows(index.row_groups, rng)
    ]
    counts = Counter(sample.kind for window in windows for piece in window for sample in piece)
    kept = _kept_shares(counts, options.crayon_share)
    lanes = _Lanes(math.gcd(options.batch_size, MOST_LANES), options.batch_size, counts)
    batches: list[Batch] = []
    for window in windows:
        for piece in window:
            # Draws a number even where all are kept, so that a share changes the selection and not the order.
            lanes.deal([sample for sample in piece if rng.random() < kept[sample.kind]])
        ready = lanes.batches(rng, is_last=window is windows[-1])
        # Both kinds are spread over the window.
        batches += [ready[number] for number in rng.permutation(len(ready))]
    return batches


class _Lanes:
    """Samples that wait for a batch, by lane and kind.

    Args:
        number: of lanes; it divides the batch size.
        counts: samples of the epoch by kind.
    """

    def __init__(self, number: int, batch_size: int, counts: Counter[Kind]) -> None:
        self._batch_size = batch_size
        self._counts = counts
        self._dealt: list[Counter[Kind]] = [Counter() for _ in range(number)]
        self._fresh: dict[Kind, list[list[Sample]]] = {kind: [[] for _ in range(number)] for kind in counts}
        self._waiting: dict[Kind, list[list[Sample]]] = {kind: [[] for _ in range(number)] for kind in counts}

    def deal(self, samples: Sequence[Sample]) -> None:
        """Give samples to the lane that has got the fewest of their kinds so far."""
        of_kind = Counter(sample.kind for sample in samples)

        def burden(lane: int) -> float:
            return sum(count * self._dealt[lane][kind] / self._counts[kind] ** 2 for kind, count in of_kind.items())

        lane = min(range(len(self._dealt)), key=burden)
        self._dealt[lane] += of_kind
        for sample in samples:
            self._fresh[sample.kind][lane].append(sample)

    def batches(self, rng: np.random.Generator, is_last: bool) -> list[Batch]:
        """Make all batches that have equal shares of all lanes; in the end, also those that have not."""
        found = []
        for kind, waiting in self._waiting.items():
            for lane, fresh in enumerate(self._fresh[kind]):
                waiting[lane] += [fresh[number] for number in rng.permutation(len(fresh))]
                fresh.clear()
            share = self._batch_size // len(waiting)
            for _ in range(min(map(len, waiting)) // share):
                found.append(Batch(kind, tuple(sample for samples in waiting for sample in samples[:share])))
                for samples in waiting:
                    del samples[:share]
            if is_last:
                found += self._uneven_batches(kind, waiting)
        return found

    def _uneven_batches(self, kind: Kind, waiting: Sequence[Sequence[Sample]]) -> Iterator[Batch]:
        """Spread what every lane has left over as many batches as it fills."""
        places = sorted(
            ((number + 0.5) / len(samples), lane, number)
            for lane, samples in enumerate(waiting)
            for number in range(len(samples))
        )
        for first in range(0, len(places) - self._batch_size + 1, self._batch_size):
            of_batch = sorted(place[1:] for place in places[first : first + self._batch_size])
            yield Batch(kind, tuple(waiting[lane][number] for lane, number in of_batch))


def _windows(groups: Sequence[RowGroup], rng: np.random.Generator) -> Iterator[list[range]]:
    """Yield the rows of some row groups at a time, in random order and in pieces that go to one lane each."""
    window: list[range] = []
    for number in rng.permutation(len(groups)):
        first, rows = groups[number].first_row, groups[number].rows
        # Row groups of other tools may be large; were a lane to get one of them whole, the others would wait for it.
        parts = max(-(-_PIECES // len(groups)), rows * MOST_LANES // ROWS_PER_WINDOW)
        window += [
            range(edge, end) for edge, end in pairwise(first + rows * part // parts for part in range(parts + 1))
        ]
        # Where each lane gets as many pieces as any other, few samples have to wait for the next window.
        if len(window) % MOST_LANES == 0 and sum(map(len, window)) >= 0.8 * ROWS_PER_WINDOW:
            yield window
            window = []
    if window:
        yield window


def _samples_of(
    rows: range, index: RowIndex, kinds: Sequence[Kind], options: PlanOptions, rng: np.random.Generator
) -> Iterator[Sample]:
    for row in rows:
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
