"""Build panoptic maps: every pixel points into one ordered, numbered list of segments.

Area, box and number of each segment are measured here, at full resolution. For speed, the map is first reduced to runs
of equal pixels within a row: a 640 x 480 map has some 5,000 runs, and all later work is on arrays of that length.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from collavo.errors import Rejected
from collavo.panoptic.numbering import number_instances, numbered_order
from schemas.categories import COCO_PANOPTIC, LEFT_OUT, CategorySet
from schemas.crayon_row import Segment


class SegmentInfo(NamedTuple):
    """A segment as a segmenter or an annotation states it, not yet measured."""

    id: int
    label: int
    is_crowd: bool = False
    score: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PanopticMap:
    """A segmented image.

    Args:
        unfamiliar: whether its segmenter says that it knows no pictures like this one.

    `index_map` is uint8 [height, width], uint16 above 255 segments; a pixel holds the position of its segment in
    `segments` plus 1, and 0 where nothing is known. Segments are in the order of their class, then of their number.
    """

    index_map: np.ndarray
    """uint8 [height, width], uint16 above 255 segments: position of the pixel's segment + 1, or 0 for unknown."""

    segments: tuple[Segment, ...]
    categories: CategorySet = COCO_PANOPTIC
    unfamiliar: bool = False


class IdRuns(NamedTuple):
    """An id map as runs of equal pixels, in reading order; a run ends with its row at the latest."""

    size_hw: tuple[int, int]
    starts: np.ndarray
    """int [N]: where each run begins in the flattened map."""

    ids: np.ndarray
    """int [N]: the id of each run's pixels."""

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts, append=self.size_hw[0] * self.size_hw[1])


def id_runs(ids: np.ndarray) -> IdRuns:
    """Find the runs of an integer id map [height, width]."""
    flat = ids.ravel()
    begins = np.empty(flat.size, dtype=bool)
    np.not_equal(flat[1:], flat[:-1], out=begins[1:])
    begins[:: ids.shape[1]] = True
    starts = np.flatnonzero(begins)
    return IdRuns(ids.shape, starts, flat[starts])


def build_panoptic_map(
    ids: np.ndarray | IdRuns, infos: Sequence[SegmentInfo], categories: CategorySet = COCO_PANOPTIC
) -> PanopticMap:
    """Measure, order and number the segments of an id map.

    Args:
        ids: integer [height, width], or its runs; 0 is unlabelled, any other value is the id of an entry of `infos`.
        infos: the segments, in any order; the result does not depend on it. The pixels of those whose label is
            `LEFT_OUT` become unknown.
        categories: the set that their labels are positions in.

    Raises:
        Rejected: `repeated_segment` if an id is listed twice, or 0 is listed; `unlisted_segment` if a pixel's id is not
            listed; `empty_segment` if a listed segment has no pixel.
    """
    runs = ids if isinstance(ids, IdRuns) else id_runs(ids)
    if left_out := [info.id for info in infos if info.label == LEFT_OUT]:
        runs = runs._replace(ids=np.where(np.isin(runs.ids, left_out), 0, runs.ids))
        infos = [info for info in infos if info.label != LEFT_OUT]
    known_ids, places = _known_ids(infos)
    positions = _positions(runs, known_ids)
    areas, boxes_xyxy = _measure(positions, len(known_ids))
    if not areas[1:].all():
        raise Rejected("empty_segment", f"segment {known_ids[1:][areas[1:] == 0][0]} has no pixel")

    listed = [infos[place] for place in places.tolist()]
    return _assembled(positions, listed, areas[1:], boxes_xyxy[1:], categories)


def assemble_panoptic_map(
    ids: np.ndarray,
    infos: Sequence[SegmentInfo],
    areas: np.ndarray,
    boxes_xyxy: np.ndarray,
    categories: CategorySet = COCO_PANOPTIC,
) -> PanopticMap:
    """Order and number the segments of an id map whose areas and boxes are known already.

    Args:
        ids: integer [height, width]; every info has a pixel in it.
        infos: the segments, in any order.
        areas, boxes_xyxy: int [N] and [N, 4], in the order of `infos`.

    Raises:
        Rejected: `repeated_segment` for an id listed twice, or a listed 0.
    """
    known_ids, places = _known_ids(infos)
    listed = [infos[place] for place in places.tolist()]
    return _assembled(_positions(id_runs(ids), known_ids), listed, areas[places], boxes_xyxy[places], categories)


def _known_ids(infos: Sequence[SegmentInfo]) -> tuple[np.ndarray, np.ndarray]:
    """Return 0 and the ids of segments, ascending, and the places of these segments in `infos`.

    Raises:
        Rejected: `repeated_segment` for an id listed twice, or a listed 0.
    """
    ids = np.array([0, *(info.id for info in infos)], dtype=np.int64)
    known_ids, first = np.unique(ids, return_index=True)
    if len(known_ids) != len(ids):
        repeated = next(id_ for id_, count in Counter(ids.tolist()).items() if count > 1)
        what = (
            f"id {repeated} is listed twice" if repeated else "id 0 is listed, which stands for no label; count from 1"
        )
        raise Rejected("repeated_segment", what)
    return known_ids, first[1:] - 1


def _assembled(
    positions: IdRuns, listed: Sequence[SegmentInfo], areas: np.ndarray, boxes_xyxy: np.ndarray, categories: CategorySet
) -> PanopticMap:
    """Assemble the map out of runs that hold, as ids, the position of their segment in `listed`, from 1."""
    labels = np.array([info.label for info in listed], dtype=np.int64)
    is_crowd = np.array([info.is_crowd for info in listed], dtype=bool)
    order = numbered_order(labels, is_crowd, areas, boxes_xyxy)
    numbering = number_instances(labels[order], is_crowd[order])

    new_positions = np.zeros(len(listed) + 1, dtype=np.uint8 if len(listed) < 256 else np.uint16)
    new_positions[order + 1] = np.arange(1, len(listed) + 1)
    index_map = np.repeat(new_positions[positions.ids], positions.lengths).reshape(positions.size_hw)
    areas_list, boxes_list = areas.tolist(), boxes_xyxy.astype(float).tolist()
    segments = []
    for position, number in zip(order.tolist(), numbering.tolist(), strict=True):
        info, box, area = listed[position], tuple(boxes_list[position]), areas_list[position]
        category = categories[info.label]
        segments.append(Segment.of(category, info.id, box, area, number, info.is_crowd, info.score))
    return PanopticMap(index_map, tuple(segments), categories)


def _positions(runs: IdRuns, known_ids: np.ndarray) -> IdRuns:
    """Put in place of each id its position among those that are known."""
    positions = np.searchsorted(known_ids, runs.ids).clip(max=len(known_ids) - 1)
    unlisted = known_ids[positions] != runs.ids
    if unlisted.any():
        raise Rejected("unlisted_segment", f"pixels carry id {runs.ids[unlisted][0]}, which no segment has")
    return runs._replace(ids=positions)


def _measure(positions: IdRuns, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Measure areas [count] and boxes [count, 4] of all segments from their runs."""
    lengths = positions.lengths
    areas = np.zeros(count, dtype=np.int64)
    np.add.at(areas, positions.ids, lengths)
    y, x = np.divmod(positions.starts, positions.size_hw[1])
    boxes_xyxy = np.tile(np.array([np.iinfo(np.int64).max] * 2 + [0] * 2), (count, 1))
    np.minimum.at(boxes_xyxy[:, 0], positions.ids, x)
    np.minimum.at(boxes_xyxy[:, 1], positions.ids, y)
    np.maximum.at(boxes_xyxy[:, 2], positions.ids, x + lengths)
    np.maximum.at(boxes_xyxy[:, 3], positions.ids, y + 1)
    return areas, boxes_xyxy
