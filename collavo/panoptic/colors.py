"""Crayon colours: one hue per class, one shade of it per instance."""

import colorsys
from collections.abc import Sequence
from functools import cache

from schemas.categories import CATEGORIES, MAX_NUMBERING
from schemas.crayon_row import Segment

UNKNOWN_RGB = (0, 0, 0)

_LIGHTNESS_RANGE = (0.15, 0.9)

# Steps of the golden section: every shade lands in a wide gap that the shades before it left.
_LIGHTNESS_STEP = 0.618034


@cache
def crayon_color(label: int, numbering: int) -> tuple[int, int, int]:
    """The RGB colour of instance `numbering` of class `label`.

    Number 1 has COCO's own colour of the class, 2 to 20 differ from it and from each other in lightness; what has no
    number (0) shares one more shade.
    """
    if numbering == 1:
        return CATEGORIES[label].color_rgb
    step = (numbering or MAX_NUMBERING + 1) - 1
    hue, lightness, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in CATEGORIES[label].color_rgb))
    darkest, lightest = _LIGHTNESS_RANGE
    span = lightest - darkest
    lightness = darkest + (lightness - darkest + step * _LIGHTNESS_STEP * span) % span
    red, green, blue = (round(channel * 255) for channel in colorsys.hls_to_rgb(hue, lightness, saturation))
    return red, green, blue


def segment_palette(segments: Sequence[Segment]) -> list[tuple[int, int, int]]:
    """Colours by pixel value of an index map: unknown first, then the segments in order."""
    return [UNKNOWN_RGB, *(crayon_color(segment.label, segment.numbering) for segment in segments)]
