"""Write and read the `panoptic_map` column: an index map as a PNG that any viewer shows in crayon colours.

Up to 255 segments it is a palette PNG, one byte per pixel, with the crayon colours as palette; above that it is 16-bit
grey. The encoder is our own, since a map is no photograph: the difference of a row from the row above is nearly all
zeros, and zlib-ng compresses it by its runs alone. That takes a fifth of the time of Pillow's encoder and two thirds of
the bytes.
"""

import io
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image
from zlib_ng import zlib_ng

from collavo.errors import Rejected
from collavo.images import fault_in_image
from collavo.panoptic.colors import segment_palette
from collavo.panoptic.maps import PanopticMap
from schemas.categories import CategorySet
from schemas.crayon_row import Segment

_PALETTE, _GREY = 3, 0
_FILTER_UP = 2


def encode_index_map(panoptic: PanopticMap) -> bytes:
    """Write the index map of a panoptic map as PNG."""
    index_map = panoptic.index_map
    height, width = index_map.shape
    in_colour = index_map.dtype == np.uint8
    rows = index_map if in_colour else index_map.astype(">u2").view(np.uint8)
    filtered = np.empty((height, 1 + rows.shape[1]), dtype=np.uint8)
    filtered[:, 0] = _FILTER_UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    runs = zlib_ng.compressobj(strategy=zlib_ng.Z_RLE)
    header = struct.pack(">IIBBBBB", width, height, 8 if in_colour else 16, _PALETTE if in_colour else _GREY, 0, 0, 0)
    colors = segment_palette(panoptic.segments, panoptic.categories) if in_colour else []
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            _chunk(b"PLTE", bytes(channel for color in colors for channel in color)) if in_colour else b"",
            _chunk(b"IDAT", runs.compress(filtered.data) + runs.flush()),
            _chunk(b"IEND", b""),
        )
    )


def decode_index_map(data: bytes) -> np.ndarray:
    """Decode a `panoptic_map` to its index map, uint8 or uint16 [height, width].

    Raises:
        Rejected: `broken_map`.
    """
    try:
        index_map = np.asarray(Image.open(io.BytesIO(data), formats=("PNG",)))
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged data
        raise Rejected("broken_map", f"not a readable PNG: {fault_in_image(data, error)}") from error
    if index_map.ndim != 2 or index_map.dtype.kind not in "ui":
        raise Rejected("broken_map", f"a map has one whole number a pixel, not {index_map.shape} of {index_map.dtype}")
    return index_map


def panoptic_map_of(
    data: bytes, segments: Sequence[Segment], categories: CategorySet, size_wh: tuple[int, int]
) -> PanopticMap:
    """Read a `panoptic_map` back, checked against the segments and the size of its row.

    Raises:
        Rejected: `broken_map`.
    """
    index_map = decode_index_map(data)
    if index_map.shape != size_wh[::-1]:
        raise Rejected("broken_map", f"the map is {index_map.shape[1]} x {index_map.shape[0]}, the image {size_wh}")
    if (last := int(index_map.max())) > len(segments):
        raise Rejected("broken_map", f"the map points to segment {last} of {len(segments)}")
    if outside := _outside_its_box(index_map, segments):
        raise Rejected(
            "broken_map", f"the map shows segment {outside.id} outside its box; is the order of segments new?"
        )
    return PanopticMap(index_map, tuple(segments), categories)


def _outside_its_box(index_map: np.ndarray, segments: Sequence[Segment]) -> Segment | None:
    """Find a segment with a pixel that its box does not hold, among every eighth pixel of every eighth row.

    Where another tool has sorted or replaced segments, pixels point to wrong ones.
    """
    height, width = index_map.shape
    boxes_xyxy = np.array([(0, 0, width, height), *(segment.box_xyxy for segment in segments)], dtype=np.float32)
    sampled, x, y = index_map[::8, ::8], np.arange(0, width, 8), np.arange(0, height, 8)[:, None]
    x_min, y_min, x_max, y_max = boxes_xyxy.T[:, sampled]
    outside = sampled[(x < x_min) | (x >= x_max) | (y < y_min) | (y >= y_max)]
    return segments[int(outside[0]) - 1] if outside.size else None


def _chunk(name: bytes, data: bytes) -> bytes:
    checksum = zlib_ng.crc32(data, zlib_ng.crc32(name))
    return b"".join((struct.pack(">I", len(data)), name, data, struct.pack(">I", checksum)))
