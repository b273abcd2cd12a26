"""What questions are about: images with their panoptic maps, out of a data set's rows or segmented here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collavo.embedded import SCENES, TINY
from collavo.errors import Rejected, UserError
from collavo.images import decode_rgb
from collavo.instructions.text import format_objects_with_boxes
from collavo.panoptic.colors import segment_palette
from collavo.panoptic.index_png import decode_index_map
from collavo.panoptic.maps import PanopticMap, build_panoptic_map
from collavo.panoptic.thresholds import PRESETS
from collavo.segmenters import SEGMENTERS, Segmenter, load_segmenter
from collavo.sources.image_paths import checked_relative
from schemas.crayon_row import CrayonRow

SEGMENTER_CHOICES = ("auto", "none", *SEGMENTERS)


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An image, uint8 RGB [height, width, 3], and its panoptic map."""

    image: np.ndarray
    panoptic: PanopticMap

    @property
    def objects(self) -> str:
        """The object list with boxes, as prompts hold it."""
        height, width = self.image.shape[:2]
        return format_objects_with_boxes(self.panoptic.segments, (width, height))


class NoSegmenter:
    """A `Segmenter` that recognises nothing: the model is left to its own eyes."""

    facts: dict[str, Any] = {"segmenter": "none"}  # noqa: RUF012  # the protocol's attribute

    def segment(self, images: Sequence[np.ndarray]) -> list[PanopticMap]:
        return [build_panoptic_map(np.zeros(image.shape[:2], dtype=np.int32), ()) for image in images]


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
    """Load a segmenter by the values of a command's flags.

    Args:
        name: one of `SEGMENTER_CHOICES`; `auto` is mask2former: the embedded one for a model whose base is the embedded
            one, for it has seen drawn scenes only, and the paper's own for all others.
        checkpoint: `--segmenter_checkpoint`; None for the segmenter's default.
        config: `--segmenter_config`, for detectron2.
        preset: `--segmenter_preset`, for mask2former; None for the checkpoint's own.
        input_size: `--segmenter_input_size`, for mask2former; None for the checkpoint's own.
        base: what the model that answers was trained on, see `base_of`.

    Raises:
        UserError: where the checkpoint cannot be used, or a framework is missing.
        UserError: where the device is missing or too small.
    """
    if name == "none":
        return NoSegmenter()
    if name == "auto":
        name, checkpoint = "mask2former", checkpoint or (SCENES if base == TINY else None)
    options: dict[str, Any] = {"device": device, "checkpoint": checkpoint, "config": config}
    if name == "mask2former":
        thresholds = PRESETS[preset] if preset else None
        options |= {"thresholds": thresholds, "batch_size": 1, "input_size": input_size}
    return load_segmenter(name, **{key: value for key, value in options.items() if value is not None})


def segmented(image: np.ndarray, segmenter: Segmenter) -> Picture:
    """An image with the map that a segmenter makes of it."""
    return Picture(image, segmenter.segment([image])[0])


def picture_of_row(row: CrayonRow, image_root: Path | None) -> Picture:
    """A row's image with the row's own map.

    Args:
        image_root: where rows that refer to their image find it.

    Raises:
        UserError: where the image is missing or damaged.
    """
    try:
        data = row.image_bytes
        if data is None:
            if image_root is None:
                raise UserError("--data: its rows refer to their images; --image_root must name the folder they lie in")
            data = (image_root / checked_relative(row.image_path)).read_bytes()
        return Picture(decode_rgb(data), PanopticMap(decode_index_map(row.panoptic_png), row.segments))
    except (Rejected, OSError) as error:
        raise UserError(f"--data: image of {row.image_id}: {error}") from error


def colored(picture: Picture, opacity: float = 0.6) -> np.ndarray:
    """The crayon map over its image: uint8 RGB [height, width, 3]; what is unknown shows the image alone."""
    index_map = picture.panoptic.index_map
    colors = np.array(segment_palette(picture.panoptic.segments), dtype=np.float32)[index_map]
    weight = np.where(index_map > 0, np.float32(opacity), np.float32(0))[..., None]
    return (picture.image * (1 - weight) + colors * weight).round().astype(np.uint8)
