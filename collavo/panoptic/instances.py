"""Panoptic maps out of COCO *instance* annotations: masks that may overlap, and nothing said of the rest of a picture.

Where masks overlap, a pixel belongs to the smaller instance, which usually lies in front. Boxes and areas are those of
each instance's own mask, not of what others leave of it, and pixels of no instance are unknown. An instance that is
covered altogether keeps one pixel of its mask, because a segment without a pixel would vanish from the crayon map.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from collavo.errors import Rejected
from collavo.images import turn_upright
from collavo.panoptic.maps import PanopticMap, SegmentInfo, assemble_panoptic_map
from schemas.categories import COCO_PANOPTIC, CategorySet

_FAR = 1e5
"""Pixels; a corner further out is a mistake."""


class Instance(NamedTuple):
    """One annotated instance; `segmentation` is COCO's: polygons, or a run-length encoding."""

    info: SegmentInfo
    segmentation: Any


class _Part(NamedTuple):
    """A mask as far as it reaches."""

    box_xyxy: tuple[int, int, int, int]
    """In pixels, exclusive at the maximum."""

    mask: np.ndarray
    """bool, of the box's height and width."""


def instances_map(
    instances: Sequence[Instance],
    size_wh: tuple[int, int],
    categories: CategorySet = COCO_PANOPTIC,
    orientation: int = 1,
) -> PanopticMap:
    """Make the panoptic map of an image's instances.

    Args:
        instances: in any order; the result does not depend on it.
        size_wh: of the upright image.
        categories: the set that the labels are positions in.
        orientation: EXIF's, by which masks in the frame of the image as stored are turned; 1 for upright ones.

    Raises:
        Rejected: `broken_mask` for a segmentation that is none, `mask_size_mismatch` for an encoding
            of another size, `empty_segment` for an instance without a pixel, `repeated_segment` for an id listed twice.
    """
    mask_wh = size_wh if orientation < 5 else (size_wh[1], size_wh[0])
    # One mask of the whole picture at a time: hundreds of a large picture are gigabytes.
    parts = [_part(turn_upright(_mask(instance, mask_wh), orientation)) for instance in instances]
    areas = [int(part.mask.sum()) for part in parts]
    if empty := [i.info.id for i, area in zip(instances, areas, strict=True) if not area]:
        raise Rejected("empty_segment", f"instance {empty[0]} has no pixel")
    ids = np.zeros((size_wh[1], size_wh[0]), dtype=np.int64)
    # Largest first, so that smaller ones are painted over it; where areas tie, by id.
    order = sorted(range(len(instances)), key=lambda place: (-areas[place], instances[place].info.id))
    for place in order:
        x_min, y_min, x_max, y_max = parts[place].box_xyxy
        ids[y_min:y_max, x_min:x_max][parts[place].mask] = instances[place].info.id
    _uncover(ids, [(instances[place].info.id, parts[place]) for place in order])
    boxes_xyxy = np.array([part.box_xyxy for part in parts], dtype=np.int64).reshape(-1, 4)
    return assemble_panoptic_map(
        ids, [i.info for i in instances], np.array(areas, dtype=np.int64), boxes_xyxy, categories
    )


def _mask(instance: Instance, size_wh: tuple[int, int]) -> np.ndarray:
    """bool [height, width]"""
    segmentation = instance.segmentation
    try:
        if isinstance(segmentation, list):
            # Converters write the one polygon of an instance without the list around it.
            return _filled(segmentation if isinstance(segmentation[0], list) else [segmentation], size_wh)
        width, height = size_wh
        found = [int(side) for side in segmentation["size"]]
        if found != [height, width]:
            detail = f"the mask of instance {instance.info.id} is {found[1]} x {found[0]}, its image {width} x {height}"
            raise Rejected("mask_size_mismatch", detail)
        counts = segmentation["counts"]
        runs = np.array(counts, dtype=np.int64) if isinstance(counts, list) else run_lengths(counts)
        if (runs < 0).any() or (runs > width * height).any() or runs.sum() != width * height:
            raise ValueError("its runs are not those of all pixels")
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    except Rejected:
        raise
    except Exception as error:  # whatever the segmentation is
        raise Rejected("broken_mask", f"instance {instance.info.id}: not a COCO segmentation ({error})") from error


def _filled(polygons: Sequence[Any], size_wh: tuple[int, int]) -> np.ndarray:
    """bool [height, width], of what polygons enclose; those of a point or a line, beside others, enclose nothing.

    Raises:
        ValueError: for a list that is no polygon; pycocotools takes four numbers for a box.
    """
    if any(len(polygon) % 2 for polygon in polygons):
        raise ValueError("a polygon with half a corner")
    polygons = [polygon for polygon in polygons if len(polygon) >= 6]
    if not polygons:
        raise ValueError("a polygon with less than three corners")
    for polygon in polygons:
        # At a corner that is no number, or is that far, pycocotools' C code runs for hours or ends the process.
        if not (np.abs(np.asarray(polygon, dtype=np.float64)) < _FAR).all():
            raise ValueError("a polygon with a corner that is nowhere near the picture")
    if max(map(max, polygons)) <= 1 < min(size_wh):
        raise ValueError("all corners lie in one pixel, as where they are shares of the picture; COCO has pixels")
    runs = coco_mask.frPyObjects(polygons, size_wh[1], size_wh[0])
    return np.asarray(coco_mask.decode(coco_mask.merge(runs)), dtype=bool)


def run_lengths(text: str | bytes) -> np.ndarray:
    """Read COCO's compressed run lengths: int64 [runs], column by column, the first of background.

    pycocotools reads them too, but makes a mask of whatever is in memory where they end early, and at some damage ends
    the process. A run is written as its difference to the one before the last, five bits a character, the lowest first.

    Raises:
        ValueError: for text that holds no such runs.
    """
    digits = np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(digits & 32 == 0)  # of each run
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or last[-1:] != len(digits) - 1:
        raise ValueError("no run lengths")
    first = np.concatenate(([0], last[:-1] + 1))
    if (last - first).max() > 7:
        raise ValueError("a run of more than 32 bits")
    place = np.arange(len(digits)) - np.repeat(first, last - first + 1)
    values = np.add.reduceat((digits & 31) << 5 * place, first)
    values -= (digits[last] >> 4 & 1) << 5 * (place[last] + 1)  # the sign
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _part(mask: np.ndarray) -> _Part:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return _Part((0, 0, 0, 0), mask[:0, :0])
    x_min, y_min, x_max, y_max = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return _Part((x_min, y_min, x_max, y_max), mask[y_min:y_max, x_min:x_max].copy())


def _uncover(ids: np.ndarray, parts: Sequence[tuple[int, _Part]]) -> None:
    """Give each instance that has lost all its pixels the middle one of its mask, in place, unless that pixel is the
    last one of another."""
    visible, counts = np.unique(ids, return_counts=True)
    left = dict(zip(visible.tolist(), counts.tolist(), strict=True))
    for id_, part in parts:
        if left.get(id_):
            continue
        rows, columns = np.nonzero(part.mask)
        places = (rows + part.box_xyxy[1]) * ids.shape[1] + columns + part.box_xyxy[0]
        nearest = places[np.argsort(np.abs(np.arange(len(places)) - len(places) // 2), kind="stable")]
        for place in nearest:
            owner = int(ids.flat[place])
            if left.get(owner, 0) > 1:
                left[owner] -= 1
                left[id_] = 1
                ids.flat[place] = id_
                break
        else:
            raise Rejected("empty_segment", f"instance {id_} lies wholly under others that have no pixel to spare")
