"""Read COCO's panoptic PNGs: a pixel's segment id is R + 256 G + 65536 B; 0 is unlabelled.

Source: the COCO panoptic data format, https://cocodataset.org/#format-data.
"""

import io
import struct
from contextlib import suppress

import numpy as np
from kornia_rs.io import decode_image_png_u8
from PIL import Image

from collavo.errors import Rejected
from collavo.panoptic.maps import IdRuns


def decode_segment_runs(data: bytes, size_wh: tuple[int, int]) -> IdRuns:
    """Read the segment ids of a COCO panoptic PNG, as the runs of the map.

    Args:
        data: the file's bytes.
        size_wh: width and height of the image, which the mask must have too.

    Raises:
        Rejected: `broken_mask` if it is no PNG that decodes, `mask_size_mismatch` if it has another size.
    """
    rgb = _decode_rgb(data, size_wh)
    # Runs are found by comparing bytes with those of the pixel before. Ids are put together for the start of each run
    # only: for all pixels it would take five times as long.
    channels = rgb.reshape(-1)
    differs = np.ones(channels.size, dtype=bool)
    np.not_equal(channels[3:], channels[:-3], out=differs[3:])
    differs[:: 3 * rgb.shape[1]] = True
    places = np.flatnonzero(differs) // 3
    starts = places[np.flatnonzero(np.diff(places, prepend=-1))]
    ids = rgb.reshape(-1, 3)[starts] @ np.array([1, 1 << 8, 1 << 16])
    return IdRuns(rgb.shape[:2], starts, ids)


def _decode_rgb(data: bytes, size_wh: tuple[int, int]) -> np.ndarray:
    """Decode the pixels, uint8 [height, width, 3].

    kornia-rs takes a fifth of Pillow's time. It gets files of the kind that COCO's masks are, 8-bit RGB without
    interlacing. Pillow decodes all others, and decides about those that kornia-rs refuses.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBBBBB", *size_wh, 8, 2, 0, 0, 0)):
        with suppress(Exception):
            return decode_image_png_u8(data, size_wh[::-1], "rgb")
    try:
        mask = Image.open(io.BytesIO(data), formats=("PNG",))
        if mask.size == size_wh:
            return np.asarray(mask.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged data
        raise Rejected("broken_mask", f"not a readable PNG: {error}") from error
    found, expected = f"{mask.width} x {mask.height}", f"{size_wh[0]} x {size_wh[1]}"
    raise Rejected("mask_size_mismatch", f"the mask is {found}, its image {expected}")
