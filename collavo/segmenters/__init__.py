"""Panoptic segmenters: RGB images in, panoptic maps out.

The pipeline and the chat know a segmenter only as a `Segmenter`. Each implementation has a module of its own, which
imports its framework: `universal` (transformers) and `detectron2` (Panoptic-FPN). Annotations need no model;
`collavo.sources.coco_panoptic` reads them.
"""

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from collavo.categories import categories_of_checkpoint, unseen_by_checkpoint
from collavo.embedded import SCENES, TINY
from collavo.errors import UserError, first_line
from collavo.panoptic.maps import PanopticMap, build_panoptic_map
from collavo.panoptic.thresholds import THRESHOLD_PRESETS
from schemas.categories import COCO_PANOPTIC, CategorySet

_CLASSES = {"transformers": ("universal", "UniversalSegmenter"), "detectron2": ("detectron2", "Detectron2Segmenter")}
"""Modules and classes of the segmenters, by their names: the frameworks."""

SEGMENTERS = tuple(_CLASSES)

SEGMENTER_CHOICES = ("auto", "none", *SEGMENTERS)
"""What `open_segmenter` takes."""


DEFAULT_CHECKPOINT = "facebook/mask2former-swin-large-coco-panoptic"
"""Of transformers: the paper's, a Mask2Former."""

UNFAMILIAR = (
    "The segmenter knows no pictures like this one, so much of what it names will be wrong; choose another one."
)
"""What a user is told of a picture whose map is marked `unfamiliar`."""


class Segmenter(Protocol):
    """What every panoptic segmenter offers."""

    categories: CategorySet
    """The set that its maps are made in."""

    facts: dict[str, Any]
    """Checkpoint, revision, input size, thresholds, device and dtype: what a data set records to be repeatable."""

    def segment(self, images: Sequence[np.ndarray]) -> list[PanopticMap]:
        """Segment a batch.

        Args:
            images: uint8 RGB arrays [height, width, 3], of any sizes.

        Returns:
            one map per image, in order, of the image's height and width; a map without segments where nothing is found.
        """
        ...


class NoSegmenter:
    """Recognise nothing, so that the model has only the image."""

    categories = COCO_PANOPTIC
    facts: dict[str, Any] = {"segmenter": "none"}  # noqa: RUF012  # the protocol's attribute

    def segment(self, images: Sequence[np.ndarray]) -> list[PanopticMap]:
        return [build_panoptic_map(np.zeros(image.shape[:2], dtype=np.int32), ()) for image in images]


def load_segmenter(name: str, **options: Any) -> Segmenter:
    """Load one of `SEGMENTERS` and import its framework, which no other function here does.

    Args:
        options: keyword arguments of its class.

    Raises:
        UserError: if its framework or checkpoint is missing or unsuitable, or the device is missing or too small.
    """
    module, class_name = _CLASSES[name]
    segmenter: Segmenter = getattr(importlib.import_module(f"{__name__}.{module}"), class_name)(**options)
    return segmenter


def checkpoint_categories(
    name: str, checkpoint: str | None, known_set: CategorySet | None = None
) -> tuple[CategorySet, frozenset[str]]:
    """Read from a segmenter's checkpoint, without loading it, the set of classes that it names.

    Args:
        name: one of `SEGMENTERS`.
        checkpoint: None for the segmenter's default.
        known_set: as of `collavo.categories.categories_of_labels`.

    Returns:
        the set, and the names of those classes that its training was shown in no picture, as far as it says so.

    Raises:
        UserError: if nobody here knows which of its classes are things.
    """
    if name != "transformers" or checkpoint is None or checkpoint == SCENES:
        return COCO_PANOPTIC, frozenset()
    from collavo.hub import find_checkpoint  # which imports the hub's client

    try:
        folder = find_checkpoint(checkpoint, weights=())
    except OSError:
        return COCO_PANOPTIC, frozenset()  # loading it says what is wrong
    return categories_of_checkpoint(folder, checkpoint, known_set), unseen_by_checkpoint(folder)


def check_checkpoint(name: str, checkpoint: str | None) -> None:
    """Make sure that a segmenter's checkpoint is here or can be downloaded, without the seconds that torch needs.

    Args:
        name: one of `SEGMENTERS`; only that of transformers is checked.
        checkpoint: None for the segmenter's default.

    Raises:
        UserError: if it cannot be had.
    """
    if name != "transformers" or checkpoint == SCENES:
        return
    from collavo.hub import find_checkpoint  # as above

    try:
        find_checkpoint(checkpoint or DEFAULT_CHECKPOINT, weights=())
    except OSError as error:
        raise unusable_checkpoint(checkpoint or DEFAULT_CHECKPOINT, error) from error


def unusable_checkpoint(checkpoint: str, error: Exception) -> UserError:
    """Say why a checkpoint of transformers cannot be loaded, and what would work."""
    return UserError(
        f"{checkpoint}: {first_line(error).rstrip('.')}. Use a folder that holds config.json and model.safetensors, or "
        f"a Hugging Face model id that can be downloaded from here, such as {DEFAULT_CHECKPOINT}; {SCENES}, the "
        "embedded one, knows drawn scenes only"
    )


_TAKEN = {
    "none": (),
    "transformers": ("checkpoint", "preset", "input_size"),
    "detectron2": ("checkpoint", "config"),
}
"""The options that each kind of segmenter looks at."""


def open_segmenter(
    name: str,
    device: str,
    *,
    checkpoint: str | None = None,
    config: str | None = None,
    preset: str | None = None,
    input_size: int | None = None,
    base: str | None = None,
) -> Segmenter:
    """Load the segmenter that goes with a model that answers questions.

    Args:
        name: one of `SEGMENTER_CHOICES`. `auto` is transformers: with the embedded checkpoint for a model made from the
            embedded base, which knows drawn scenes only, and with the paper's checkpoint for all others.
        checkpoint: None for the segmenter's default.
        config: of detectron2.
        preset: of the thresholds of transformers'; None for those of the checkpoint.
        input_size: of transformers, in pixels; None for the checkpoint's own way.
        base: what the answering model was trained on, as `collavo.runs.base_of` tells it.

    Raises:
        UserError: as `load_segmenter`, and for an option that this segmenter would not look at.
    """
    if name == "auto":
        name, checkpoint = "transformers", checkpoint or (SCENES if base == TINY else None)
    given = {"checkpoint": checkpoint, "config": config, "preset": preset, "input_size": input_size}
    if idle := [option for option, value in given.items() if value is not None and option not in _TAKEN[name]]:
        raise UserError(f"{name} has no use for {idle[0]} {given[idle[0]]}")
    if name == "none":
        return NoSegmenter()
    options: dict[str, Any] = {"device": device, "checkpoint": checkpoint, "config": config}
    if name == "transformers":
        thresholds = THRESHOLD_PRESETS[preset] if preset else None
        options |= {"thresholds": thresholds, "batch_size": 1, "input_size": input_size}
    return load_segmenter(name, **{key: value for key, value in options.items() if value is not None})
