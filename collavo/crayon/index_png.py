"""The `panoptic_map` column: an index map as a PNG that any viewer shows in crayon colours.

Up to 255 segments it is a palette PNG, one byte a pixel, the palette being the crayon colours; above that 16-bit grey.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from collavo.crayon.colors import segment_palette
from schemas.crayon_row import Segment

# On maps of flat regions level 1 is a third of level 6's time for a fifth more bytes, and a map is small beside its
# image.
_COMPRESS_LEVEL = 1


def encode_index_map(index_map: np.ndarray, segments: Sequence[Segment]) -> bytes:
    """Write a uint8 or uint16 index map [height, width] as PNG."""
    image = Image.fromarray(index_map)
    if index_map.dtype == np.uint8:
        image.putpalette([channel for color in segment_palette(segments) for channel in color])
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=_COMPRESS_LEVEL)
    return encoded.getvalue()


def decode_index_map(data: bytes) -> np.ndarray:
    """Read back the index map [height, width], uint8 or uint16, out of a `panoptic_map`."""
    return np.asarray(Image.open(io.BytesIO(data), formats=("PNG",)))
