"""Panoptic quality: how well predicted maps agree with true ones, class by class.

As panopticapi counts it. A predicted and a true segment of one class match where their overlap is more than half of
their union; unknown pixels belong to no union. Crowds are neither found nor missed, and a prediction that lies mostly
on unknown pixels or in a crowd of its class is no mistake. A class's quality is the sum of the overlaps of its matches
by matches + half the false + half the missed segments.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from collavo.panoptic.maps import PanopticMap
from schemas.categories import CategorySet


class ClassQuality(NamedTuple):
    """Of one class over all pictures."""

    quality: float
    """0 to 1."""

    truth: int
    """True segments, crowds aside."""

    found: int
    """Those that a prediction matches."""

    wrong: int
    """Predicted segments that match none."""


class PanopticQuality:
    """Counts over pictures.

    Args:
        categories: the set of true and of predicted maps.
    """

    def __init__(self, categories: CategorySet) -> None:
        self._categories = categories
        # Of each class: the sum of overlaps, and how many segments matched, were wrong, were missed.
        self._counts = np.zeros((len(categories), 4))

    def add(self, truth: PanopticMap, predicted: PanopticMap) -> None:
        """Compare the maps of a picture, which have the same size."""
        true, found = truth.segments, predicted.segments
        pairs = truth.index_map.astype(np.int64) * (len(found) + 1) + predicted.index_map
        shared = np.bincount(pairs.ravel(), minlength=(len(true) + 1) * (len(found) + 1))
        shared = shared.reshape(len(true) + 1, len(found) + 1)  # row and column 0 are unknown pixels
        areas, found_areas = shared.sum(1), shared.sum(0)
        matched = set()
        for position, segment in enumerate(true, start=1):
            if segment.is_crowd:
                continue
            best = 0.0
            for other, candidate in enumerate(found, start=1):
                overlap = shared[position, other]
                if candidate.label != segment.label or not overlap:
                    continue
                union = areas[position] + found_areas[other] - overlap - shared[0, other]
                if overlap > union / 2:  # which only one can do
                    best = overlap / union
                    matched.add(other)
            self._counts[segment.label] += (best, 1, 0, 0) if best else (0, 0, 0, 1)
        for other, candidate in enumerate(found, start=1):
            if other not in matched:
                crowds = sum(
                    shared[position, other]
                    for position, segment in enumerate(true, start=1)
                    if segment.is_crowd and segment.label == candidate.label
                )
                if shared[0, other] + crowds <= found_areas[other] / 2:
                    self._counts[candidate.label, 2] += 1

    def by_class(self) -> Mapping[str, ClassQuality]:
        """Return the quality of every class that a true or a predicted map holds, by its display name."""
        return {
            category.display_name: ClassQuality(
                float(overlaps / (found + (wrong + missed) / 2)), int(found + missed), int(found), int(wrong)
            )
            for category, (overlaps, found, wrong, missed) in zip(self._categories, self._counts, strict=True)
            if found + wrong + missed
        }

    def mean(self) -> float:
        """Return the mean over the classes of `by_class`; 0 where there is none."""
        qualities = [each.quality for each in self.by_class().values()]
        return sum(qualities) / max(len(qualities), 1)
