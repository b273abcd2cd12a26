"""Crayon colours: one hue per class, one shade of it per instance."""

import colorsys
from collections.abc import Sequence
from functools import cache

from schemas.categories import CATEGORIES
from schemas.crayon_row import Segment

UNKNOWN_RGB = (0, 0, 0)

# Shades go light and dark in turn, so that number 2 differs from number 1 more than a neighbour in a ramp would.
_LIGHTNESS_STEPS = (0.0, 0.16, -0.16, 0.28, -0.28, 0.08, -0.08, 0.22, -0.22)


@cache
def crayon_color(label: int, numbering: int) -> tuple[int, int, int]:
    """The RGB colour of instance `numbering` of class `label`; number 1 has COCO's own colour of the class."""
    red, green, blue = (channel / 255 for channel in CATEGORIES[label].color_rgb)
    if numbering <= 1:
        return CATEGORIES[label].color_rgb
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    cycle, step = divmod(numbering - 1, len(_LIGHTNESS_STEPS))
    lightness = min(max(lightness + _LIGHTNESS_STEPS[step], 0.15), 0.9)
    shade = colorsys.hls_to_rgb((hue + 0.03 * cycle) % 1, lightness, saturation)
    return tuple(round(channel * 255) for channel in shade)  # type: ignore[return-value]


def segment_palette(segments: Sequence[Segment]) -> list[tuple[int, int, int]]:
    """Colours by pixel value of an index map: unknown first, then the segments in order."""
    return [UNKNOWN_RGB, *(crayon_color(segment.label, segment.numbering) for segment in segments)]
