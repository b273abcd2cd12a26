"""Read COCO's panoptic PNGs: a pixel's segment id is R + 256 G + 65536 B; 0 is unlabelled.

Source: the COCO panoptic data format, https://cocodataset.org/#format-data.
"""

import io
import struct
from collections.abc import Collection
from contextlib import suppress

import numpy as np
from kornia_rs.io import decode_image_png_u8
from PIL import Image

from collavo.errors import Rejected
from collavo.images import fault_in_image
from collavo.panoptic.maps import IdRuns, id_runs

_GREY_MODES = ("1", "L", "I;16", "I;16B", "I")

_VOID = {1: 0xFF, 2: 0xFFFF, 3: 0xFFFFFF}
"""The largest value of a pixel, by its bytes; other formats have it for what nobody labelled."""


def decode_segment_runs(data: bytes, size_wh: tuple[int, int], listed_ids: Collection[int] | None = None) -> IdRuns:
    """Read the segment ids out of a COCO panoptic PNG, as the runs of the map.

    In grey masks of 1, 8 or 16 bits, a pixel is the id itself. In one with a palette, its colour holds the id, as where
    an RGB mask was made smaller; unless only the palette's numbers are ids that the annotation lists. The largest
    value, white or 255 of a grey mask, becomes 0, unlabelled, where the annotation does not list it.

    Args:
        data: the file's bytes.
        size_wh: width and height that the mask must have, those of its image.
        listed_ids: the ids that the annotation lists, by which palettes are understood, and channels in the wrong order
            are found out.

    Raises:
        Rejected: `broken_mask` where it is not a PNG that decodes, `mask_size_mismatch` where its size is another,
            `unlisted_segment` where its channels are blue, green, red.
    """
    pixels = _decode(data, size_wh, listed_ids)
    if pixels.ndim == 2:
        runs = id_runs(pixels)
        return runs._replace(ids=_without_void(runs.ids, _VOID.get(pixels.dtype.itemsize, 0), listed_ids))
    # By bytes, of which few differ from the pixel before: to put ids together for all pixels would take five times
    # as long.
    channels = pixels.reshape(-1)
    differs = np.empty(channels.size, dtype=bool)
    np.not_equal(channels[3:], channels[:-3], out=differs[3:])
    differs[:: 3 * pixels.shape[1]] = True
    places = np.flatnonzero(differs) // 3
    starts = places[np.flatnonzero(np.diff(places, prepend=-1))]
    ids = pixels.reshape(-1, 3)[starts] @ np.array([1, 1 << 8, 1 << 16])
    ids = _without_void(ids, _VOID[3], listed_ids)
    if listed_ids is not None:
        _check_channels(ids, pixels.reshape(-1, 3)[starts], listed_ids)
    return IdRuns(pixels.shape[:2], starts, ids)


def _without_void(ids: np.ndarray, void: int, listed_ids: Collection[int] | None) -> np.ndarray:
    """Put 0 in place of the largest value, unless it is an id or nobody knows."""
    if listed_ids is None or void in listed_ids:
        return ids
    return np.where(ids == void, 0, ids)


def _check_channels(ids: np.ndarray, colors_rgb: np.ndarray, listed_ids: Collection[int]) -> None:
    """Refuse a mask whose ids are listed only once red and blue are swapped: OpenCV wrote it."""
    listed = np.array(sorted({0, _VOID[3], *listed_ids}))
    strange = ~np.isin(ids, listed)
    if not strange.any():
        return
    swapped = colors_rgb @ np.array([1 << 16, 1 << 8, 1])
    if np.isin(swapped, listed).all():
        found = ids[strange][0]
        detail = "read as blue, green, red, all ids are listed: write the mask with its channels in the order of RGB"
        raise Rejected("unlisted_segment", f"pixels carry id {found}, which no segment has; {detail}")


def _decode(data: bytes, size_wh: tuple[int, int], listed_ids: Collection[int] | None) -> np.ndarray:
    """Decode the pixels: uint8 [height, width, 3], or integer [height, width] of a grey mask.

    kornia-rs takes a fifth of Pillow's time. It gets files of the kind that COCO's masks are, 8-bit RGB without
    interlacing. Pillow decodes all others, and decides about those that kornia-rs refuses.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBBBBB", *size_wh, 8, 2, 0, 0, 0)):
        with suppress(Exception):
            return decode_image_png_u8(data, size_wh[::-1], "rgb")
    try:
        mask = Image.open(io.BytesIO(data), formats=("PNG",))
        if mask.size == size_wh:
            if mask.mode in _GREY_MODES:
                return np.asarray(mask, dtype=np.uint8 if mask.mode == "1" else None)
            if mask.mode == "LA":
                return np.asarray(mask.getchannel("L"))
            rgb = np.asarray(mask.convert("RGB"))
            if mask.mode == "P" and listed_ids is not None:
                listed = [0, *listed_ids]
                numbers, places = np.unique(np.asarray(mask), return_index=True)
                colors = rgb.reshape(-1, 3)[places] @ np.array([1, 1 << 8, 1 << 16])
                if not np.isin(colors, listed).all() and np.isin(numbers, [*listed, _VOID[1]]).all():
                    return np.asarray(mask)
            return rgb
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged data
        raise Rejected("broken_mask", f"not a readable PNG: {fault_in_image(data, error)}") from error
    found, expected = f"{mask.width} x {mask.height}", f"{size_wh[0]} x {size_wh[1]}"
    raise Rejected("mask_size_mismatch", f"the mask is {found}, its image {expected}")
