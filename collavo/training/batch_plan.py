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
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from collavo.model.prompt import Kind
from collavo.training.row_index import RowGroup, RowIndex

ROWS_PER_WINDOW = 1000
"""Rows whose samples are shuffled together, about, where row groups are small."""

MOST_LANES = 8
"""As many ranks read each row group once; of more ranks, several read the same one."""

_BYTES_PER_WINDOW = 1 << 30
"""Where pictures are large, a window has fewer rows, of about so many bytes."""

MOST_ROWS = 8 * ROWS_PER_WINDOW
"""Rows of a window at most, of whole row groups; other tools write large ones. A row group of more is a window."""


class Sample(NamedTuple):
    """One sequence: some instructions of a row, or one of its dialogues; `numbers` are their places in the row."""

    kind: Kind
    row: int
    numbers: tuple[int, ...]
    tokens: int = 0
    """What its texts take of a sequence, about; see `collavo.training.lengths.Fitted`."""


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
    rows = list(_windows(index.row_groups, rng))
    windows = [[list(_samples_of(group, index, kinds, options, rng)) for group in window] for window in rows]
    counts = Counter(sample.kind for window in windows for group in window for sample in group)
    kept = _kept_shares(counts, options.crayon_share)
    lanes = _Lanes(lanes_of(options.batch_size), options.batch_size, counts)
    batches: list[Batch] = []
    for number, window in enumerate(windows):
        # Draws a number even where all are kept, so that a share changes the selection and not the order.
        groups = [[sample for sample in group if rng.random() < kept[sample.kind]] for group in window]
        if number == len(windows) - 1 or max(map(len, rows[number])) > MOST_ROWS // 2:
            lanes.level(groups)
        else:
            lanes.deal(groups)
        ready = lanes.batches(rng)
        # Both kinds are spread over the window.
        batches += [ready[number] for number in rng.permutation(len(ready))]
    return batches


def evaluation_samples(index: RowIndex, kinds: Sequence[Kind], options: PlanOptions, most: int) -> list[Sample]:
    """Choose samples to measure a loss with: of each kind `most` at most, at even distances over all rows, so that each
    data set has its share."""
    plan = plan_epoch(index, kinds, replace(options, batch_size=1), epoch=0)
    chosen: list[Sample] = []
    for kind in kinds:
        samples = sorted((batch.samples[0] for batch in plan if batch.kind == kind), key=lambda sample: sample.row)
        taken = min(most, len(samples))
        chosen += [samples[number * len(samples) // taken] for number in range(taken)]
    return chosen


def lanes_of(batch_size: int) -> int:
    """Return the number of lanes, of which each gives a batch as many samples as any other."""
    return math.gcd(batch_size, MOST_LANES)


class _Lanes:
    """Samples that wait for a batch, by kind and lane.

    Args:
        number: of lanes; it divides the batch size.
        counts: samples of the epoch by kind.
    """

    def __init__(self, number: int, batch_size: int, counts: Counter[Kind]) -> None:
        self._share = batch_size // number
        self._counts = counts
        self._dealt: list[Counter[Kind]] = [Counter() for _ in range(number)]
        self._waiting: dict[Kind, list[list[Sample]]] = {kind: [[] for _ in range(number)] for kind in counts}
        self._fresh: dict[Kind, list[list[Sample]]] = {kind: [[] for _ in range(number)] for kind in counts}

    def deal(self, groups: Sequence[Sequence[Sample]]) -> None:
        """Give each row group's samples to the lane that has got the fewest of their kinds so far.

        Where there are fewer row groups than lanes, each is shared by lanes that follow each other.
        """
        together = max(len(self._dealt) // len(groups), 1)
        for samples in groups:
            of_kind = Counter(sample.kind for sample in samples)

            def burden(lane: int, of_kind: Counter[Kind] = of_kind) -> float:
                return sum(count * self._dealt[lane][kind] / self._counts[kind] ** 2 for kind, count in of_kind.items())

            first = min(range(0, len(self._dealt), together), key=burden)
            self._dealt[first] += of_kind
            for kind, count in of_kind.items():
                laid = iter([sample for sample in samples if sample.kind == kind])
                for part, fresh in enumerate(self._fresh[kind][first : first + together]):
                    fresh.extend(islice(laid, count * (part + 1) // together - count * part // together))

    def level(self, groups: Sequence[Sequence[Sample]]) -> None:
        """Lay the samples of row groups end to end and cut them so that all lanes have equally many waiting.

        The fewest row groups are cut: one between two lanes that follow each other.
        """
        for kind, waiting in self._waiting.items():
            laid = [sample for samples in groups for sample in samples if sample.kind == kind]
            total = len(laid) + sum(map(len, waiting))
            edges = [total * lane // len(waiting) for lane in range(len(waiting) + 1)]
            for samples, (start, end) in zip(waiting, pairwise(edges), strict=True):
                laid[:0] = samples[end - start :]  # what a lane has too many goes to others
                del samples[end - start :]
            remaining = iter(laid)
            for samples, fresh, (start, end) in zip(waiting, self._fresh[kind], pairwise(edges), strict=True):
                fresh.extend(islice(remaining, end - start - len(samples)))

    def batches(self, rng: np.random.Generator) -> list[Batch]:
        """Make all batches that have equal shares of all lanes."""
        found = []
        for kind, waiting in self._waiting.items():
            for lane, fresh in enumerate(self._fresh[kind]):
                waiting[lane] += [fresh[number] for number in rng.permutation(len(fresh))]
                fresh.clear()
            for _ in range(min(map(len, waiting)) // self._share):
                found.append(Batch(kind, tuple(sample for samples in waiting for sample in samples[: self._share])))
                for samples in waiting:
                    del samples[: self._share]
        return found


def _windows(groups: Sequence[RowGroup], rng: np.random.Generator) -> Iterator[list[range]]:
    """Yield the rows of some row groups at a time, in random order."""
    window: list[range] = []
    size = 0
    for place in rng.permutation(len(groups)):
        group = groups[place]
        window.append(range(group.first_row, group.first_row + group.rows))
        size += group.bytes
        rows, number = sum(map(len, window)), len(window)
        # Of a multiple of the lanes, each gets whole row groups. Where these are large, a window has fewer: with four
        # of them, four ranks still read each of them once.
        is_full = rows >= 0.8 * ROWS_PER_WINDOW or size >= _BYTES_PER_WINDOW
        if (number % MOST_LANES == 0 and is_full) or (number in (1, 2, 4) and 2 * rows > MOST_ROWS):
            yield window
            window, size = [], 0
    if window:
        yield window


def rows_in_use(groups: Sequence[RowGroup], ranks: int = 1) -> int:
    """Return how many rows a reader has to keep in memory to read each row group once, about.

    A waiting sample is used within the next window, and windows differ in size; so those of three suffice,
    and two row groups more.

    Args:
        ranks: that share the lanes, so that each reads as many of them as any other, and no other's.
    """
    largest = max((group.rows for group in groups), default=0)
    bytes_per_row = sum(group.bytes for group in groups) // max(1, sum(group.rows for group in groups))
    usual = min(ROWS_PER_WINDOW, _BYTES_PER_WINDOW // max(1, bytes_per_row))
    window = max(usual, min(MOST_LANES * largest, MOST_ROWS))
    return 3 * window // ranks + 2 * largest


def _samples_of(
    rows: range, index: RowIndex, kinds: Sequence[Kind], options: PlanOptions, rng: np.random.Generator
) -> Iterator[Sample]:
    for row in rows:
        if "crayon" in kinds:
            numbers, lengths = index.texts["crayon"].of_row(row)
            order = rng.permutation(len(numbers))  # other instructions share a sequence in each epoch
            packs = _packs(numbers[order], lengths[order], options)
            yield from (Sample("crayon", row, pack, tokens) for pack, tokens in packs)
        for kind in (kind for kind in kinds if kind != "crayon"):
            texts = zip(*(column.tolist() for column in index.texts[kind].of_row(row)), strict=True)
            yield from (Sample(kind, row, (number,), tokens) for number, tokens in texts)


def _packs(numbers: np.ndarray, lengths: np.ndarray, options: PlanOptions) -> Iterator[tuple[tuple[int, ...], int]]:
    """Divide the instructions of a row into sequences that are neither too many nor too long, with their tokens."""
    pack: list[int] = []
    tokens = 0
    for number, length in zip(numbers.tolist(), lengths.tolist(), strict=True):
        if pack and (len(pack) == options.instructions_per_sequence or tokens + length > options.max_tokens):
            yield tuple(pack), tokens
            pack, tokens = [], 0
        pack.append(number)
        tokens += length
    if pack:
        yield tuple(pack), tokens


def _kept_shares(counts: Counter[Kind], crayon_share: float | None) -> dict[Kind, float]:
    """Return the share of each kind's samples to keep, so that the rest has the wanted mix; the scarcer kind stays
    whole."""
    if crayon_share is None or len(counts) < 2:
        return dict.fromkeys(counts, 1.0)
    wanted_ratio = crayon_share / (1 - crayon_share)
    ratio = counts["crayon"] / counts["dialogue"]
    return {"crayon": min(1.0, wanted_ratio / ratio), "dialogue": min(1.0, ratio / wanted_ratio)}
