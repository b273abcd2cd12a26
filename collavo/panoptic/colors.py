"""Crayon colours: one hue per class, one shade of it per instance."""

import colorsys
from collections.abc import Sequence
from functools import cache

import numpy as np

from collavo.panoptic.maps import PanopticMap
from schemas.categories import MAX_NUMBERING, Category, CategorySet
from schemas.crayon_row import Segment

UNKNOWN_RGB = (0, 0, 0)

_LIGHTNESS_RANGE = (0.15, 0.9)

# Steps of the golden section put every shade into a wide gap between the earlier ones.
_LIGHTNESS_STEP = 0.618034


@cache
def crayon_color(category: Category, numbering: int) -> tuple[int, int, int]:
    """Choose the RGB colour of instance `numbering` of a class.

    Number 1 has the class's own colour. Numbers 2 to 20 differ from it and from each other in lightness. All
    segments without a number (0) share one more shade.
    """
    if numbering == 1:
        return category.color_rgb
    step = (numbering or MAX_NUMBERING + 1) - 1
    hue, lightness, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in category.color_rgb))
    darkest, lightest = _LIGHTNESS_RANGE
    span = lightest - darkest
    lightness = darkest + (lightness - darkest + step * _LIGHTNESS_STEP * span) % span
    red, green, blue = (round(channel * 255) for channel in colorsys.hls_to_rgb(hue, lightness, saturation))
    return red, green, blue


def segment_palette(segments: Sequence[Segment], categories: CategorySet) -> list[tuple[int, int, int]]:
    """List the colours of an index map's pixel values: first unknown, then the segments in order."""
    return [UNKNOWN_RGB, *(crayon_color(categories[segment.label], segment.numbering) for segment in segments)]


def crayon_overlay(image: np.ndarray, panoptic: PanopticMap, opacity: float = 0.6) -> np.ndarray:
    """Lay the crayon map over its image; unknown pixels show the image alone.

    Args:
        image: uint8 RGB [height, width, 3].

    Returns:
        uint8 RGB of the same shape.
    """
    colors = np.array(segment_palette(panoptic.segments, panoptic.categories), dtype=np.float32)[panoptic.index_map]
    weight = np.where(panoptic.index_map > 0, np.float32(opacity), np.float32(0))[..., None]
    return (image * (1 - weight) + colors * weight).round().astype(np.uint8)
