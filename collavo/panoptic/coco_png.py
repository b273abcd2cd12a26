"""COCO's panoptic PNG: a pixel's segment id is R + 256 G + 65536 B, and 0 is unlabelled.

Source: the COCO panoptic data format, https://cocodataset.org/#format-data.
"""

import io

import numpy as np
import pyarrow as pa
from PIL import Image

from collavo.images import ImageError


def decode_segment_ids(data: bytes, size_wh: tuple[int, int]) -> np.ndarray:
    """Read the segment ids out of a COCO panoptic PNG.

    Args:
        data: the file's bytes.
        size_wh: width and height that the mask must have, those of its image.

    Returns:
        uint32 [height, width].

    Raises:
        ImageError: `broken_mask` where it is not a PNG that decodes, `mask_size_mismatch` where its size is another.
    """
    try:
        mask = Image.open(io.BytesIO(data), formats=("PNG",))
        if mask.size == size_wh:
            # Pillow keeps RGB in four bytes a pixel: the id in little-endian order, and a byte to clear.
            ids = np.frombuffer(_memory(mask if mask.mode == "RGB" else mask.convert("RGB")), dtype="<u4") & 0xFFFFFF
            return ids.reshape(mask.height, mask.width)
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged data
        raise ImageError("broken_mask", f"not a readable PNG: {error}") from error
    found, expected = f"{mask.width} x {mask.height}", f"{size_wh[0]} x {size_wh[1]}"
    raise ImageError("mask_size_mismatch", f"the mask is {found}, its image {expected}")


def _memory(image: Image.Image) -> pa.Buffer | bytes:
    """The four bytes a pixel that Pillow holds of an RGB image."""
    try:
        return pa.array(image).flatten().buffers()[1]  # as they lie there: to copy them takes half as long as to decode
    except ValueError:  # above some four million pixels they lie in several pieces
        return image.tobytes("raw", "RGBX")
