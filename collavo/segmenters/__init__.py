"""Panoptic segmenters: a batch of RGB arrays in, panoptic maps out.

`Segmenter` is all that the pipeline and the chat know of them. Each implementation sits in a module named after it and
imports its framework there: `mask2former` (transformers) and `detectron2` (Panoptic-FPN). Annotations need no model and
are read by `collavo.coco_panoptic`.
"""

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from collavo.panoptic.maps import PanopticMap

_CLASSES = {"mask2former": "Mask2FormerSegmenter", "detectron2": "Detectron2Segmenter"}

SEGMENTERS = tuple(_CLASSES)
"""Names for a flag; each is also the name of its module."""


class Segmenter(Protocol):
    """What every panoptic segmenter offers."""

    facts: dict[str, Any]
    """Checkpoint, revision, input size, thresholds, device and dtype: what a data set must record to be repeatable."""

    def segment(self, images: Sequence[np.ndarray]) -> list[PanopticMap]:
        """Segment a batch.

        Args:
            images: uint8 RGB arrays [height, width, 3], of any sizes.

        Returns:
            one map per image, at the image's own size, in order; an image in which nothing is found has no segments.
        """
        ...


def load_segmenter(name: str, **options: Any) -> Segmenter:
    """Load one of `SEGMENTERS`, importing its framework only now.

    Args:
        name: `mask2former` or `detectron2`.
        options: keyword arguments of its class.

    Raises:
        UserError: where its framework or checkpoint is missing or unsuitable.
        collavo.device.UserError: where the device asked for is missing or too small.
    """
    segmenter: Segmenter = getattr(importlib.import_module(f"{__name__}.{name}"), _CLASSES[name])(**options)
    return segmenter
