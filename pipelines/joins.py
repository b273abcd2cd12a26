"""Files of drafts are joined where shards would ask a store too often.

Each shard reads a piece of each file. With twice as many pictures both are twice as many, so that the pieces of files
as workers write them, of 64 MB at most, become single drafts. Then a step before the shards joins files, each draft
being read and written once more: to so few that a shard's pieces are large, or, where these would be too large for a
worker's disk, to files of a bounded size, which the next such step divides into ranges of shards and joins anew.
On a disk nothing is joined.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from posixpath import join
from typing import Final, Literal, NamedTuple

import apache_beam as beam
from apache_beam.pvalue import AsDict, AsSingleton, TaggedOutput
from apache_beam.transforms.combiners import TupleCombineFn

from collavo.instructions.choose import stable_hash
from pipelines.records import Packed, packed, unpacked
from pipelines.spill import DRAFTS, HELD_BYTES, SpilledDraft, join_files, shard_of

JOINED_BYTES = 4 << 30
"""Aim of the largest joined file, which passes through a worker's disk."""

LEAST_JOINED_BYTES = 256 << 20
"""Aim of the smallest one."""

_ROWS_PER_REQUEST = 40
"""Files are joined where the shards' requests are more than one for so many rows."""

_ROWS_PER_REQUEST_JOINED = 100
"""Afterwards they are at most one for so many."""

_ROWS_PER_PIECE = 200
"""Of a joined file that is divided, about."""

_LARGEST_DRAFT = 1 << 20
"""Where drafts are larger than this on average, moving them costs more than asking for them."""

_STEPS = 3
"""Enough for a thousand million pictures."""

_KEPT: Final = "kept"
Kept = TaggedOutput[Literal["kept"], Packed]


class Join(NamedTuple):
    """A step that joins files: of each range of so many shards, to so many files."""

    shards: int
    files: int


def plan_joins(sizes: tuple[int, int, int], shard_counts: dict[str, int]) -> tuple[Join, ...]:
    """Choose the steps that join files, none where shards find large pieces in them as they are.

    Args:
        sizes: number of files, of drafts in them, and of the drafts' bytes.
        shard_counts: number of shards of each split.
    """
    files, rows, size = sizes
    shards = max(1, sum(shard_counts.values()))
    parts = max(1, -(-size * 6 // (5 * shards * HELD_BYTES)))  # of a piece, where a shard is too large to be held
    reads = shards * parts
    few = max(1, min(rows // (reads * _ROWS_PER_REQUEST_JOINED), size // LEAST_JOINED_BYTES))
    saved, added = (files - few) * reads, (files + few) * len(shard_counts)
    if files * reads * _ROWS_PER_REQUEST <= rows or saved <= added or size > rows * _LARGEST_DRAFT:
        return ()
    bounded = max(1, -(-size // JOINED_BYTES))
    if bounded <= few:
        return (Join(shards, few),)
    steps = [Join(shards, bounded)]
    ranges = 1
    while steps[-1].files > few and len(steps) < _STEPS:
        ranges *= max(2, rows // (bounded * _ROWS_PER_PIECE))
        together = -(-shards // ranges)
        steps.append(Join(together, max(1, -(-size * together // (shards * JOINED_BYTES)))))
    return tuple(steps)


class JoinDrafts(beam.PTransform):
    """Joins the files of drafts, and returns the places that these have then, in packs.

    A step that is repeated writes other files, as the workers that drafted do.
    """

    def __init__(self, work: str, shard_counts: AsDict) -> None:
        super().__init__()
        self._folder = join(work, DRAFTS)
        self._shard_counts = shard_counts

    def expand(self, drafts: beam.PCollection) -> beam.PCollection:
        plan = AsSingleton(
            drafts
            | "Sizes" >> beam.Map(_sizes)
            | "SumSizes" >> beam.CombineGlobally(TupleCombineFn(sum, sum, sum))
            | "Plan" >> beam.Map(plan_joins, self._shard_counts)
        )
        for step in range(_STEPS):
            divide = beam.FlatMap(divided, plan, step, self._shard_counts)
            parts = drafts | f"Divide{step}" >> divide.with_outputs(_KEPT, main="parts")
            joined = (
                parts.parts | f"GroupByFile{step}" >> beam.GroupByKey() | f"Join{step}" >> beam.Map(_join, self._folder)
            )
            drafts = [parts[_KEPT], joined] | f"Joined{step}" >> beam.Flatten()
        return drafts


def _sizes(pack: Packed) -> tuple[int, int, int]:
    return 1, pack[0], sum(place.block.length for place in unpacked(pack))


def divided(
    pack: Packed, plan: tuple[Join, ...], step: int, shard_counts: dict[str, int]
) -> Iterator[tuple[tuple[str, int, int], Packed] | Kept]:
    """Divide the drafts of a file into those that go to different joined files; without such a step, keep them."""
    if step >= len(plan):
        yield TaggedOutput(_KEPT, pack)
        return
    shards, files = plan[step]
    parts: dict[tuple[str, int, int], list[SpilledDraft]] = defaultdict(list)
    for place in unpacked(pack):
        range_ = shard_of(place.key, shard_counts[place.split]) // shards
        parts[place.split, range_, stable_hash("file", place.block.uri) % files].append(place)
    for part, places in parts.items():
        yield part, packed(places)


def _join(part: tuple[tuple[str, int, int], Iterable[Packed]], folder: str) -> Packed:
    return join_files([place for pack in part[1] for place in unpacked(pack)], folder)
