"""Encoded image bytes in, upright RGB pixels out: the one place where images are opened.

Builder, trainer and evaluation all decode here, so that they see the same pixels: EXIF orientation applied, first
frame of an animation, grey and palette and CMYK and 16-bit brought to 8-bit RGB, transparency dropped. What cannot be
decoded is refused with a reason; what is larger than a bound is refused before its pixels are allocated.
"""

import io
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from collavo.errors import Rejected

MAX_PIXELS = 50_000_000
"""Default bound on width x height; a larger image is refused before decoding (150 MB as RGB)."""

HARD_MAX_PIXELS = 2 * int(Image.MAX_IMAGE_PIXELS or 0)
"""Where Pillow itself refuses to go on; no bound above it has an effect."""

# Raster formats that say what they are: EPS runs an interpreter on untrusted input, TGA has no mark to know it by, and
# the size that an ICO states is not the one that it decodes to. MPO, of phones, is opened as JPEG.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# Not `ImageOps.exif_transpose`: it writes the EXIF anew, and fails on damaged tags that have no part in turning.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_JPEG_SEGMENTS = {*range(0xC0, 0xD0), *range(0xDA, 0xFF)}
"""Markers that a length follows."""

_JPEG_SCAN, _JPEG_END = 0xDA, b"\xff\xd9"
_MARKER_IN_JPEG_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""The end of entropy-coded data, in which 0xFF is followed by 0 or is a restart marker."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image file says before its pixels are decoded; `size_wh` is that of the upright image."""

    format: str
    size_wh: tuple[int, int]


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to upright RGB.

    Args:
        data: the file's bytes, in any of Pillow's raster formats; the file name's extension plays no part.
        max_pixels: bound on width x height.

    Returns:
        uint8 array [height, width, 3].

    Raises:
        Rejected: with reason `not_an_image`, `oversized_image` or `broken_image`.
    """
    with _opened(data, max_pixels) as image:
        try:
            image.load()
            turn = _TURNS.get(_orientation(image))
            return np.asarray(_to_rgb(image if turn is None else image.transpose(turn)))
        except Exception as error:  # Pillow's decoders raise a dozen types on damaged data
            raise _broken(image, error) from error


def verify_image(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Make sure that an image decodes to its last byte, without keeping its pixels.

    Of a JPEG whose segments are whole from start to end, only the headers are decoded. That says what a full decode
    would: truncation shows in the segments, and of damage inside the entropy-coded data, such as flipped bits, libjpeg
    makes wrong pixels without complaint, here as there. Any other file is decoded, and that alone refuses one; a JPEG
    at an eighth of its size, which reads all of its data for about half the time.

    Raises:
        Rejected: as `decode_rgb`.
    """
    if headers := _jpeg_without_entropy_data(data):
        with suppress(Rejected):
            return _decoded_header(headers, max_pixels)
    return _decoded_header(data, max_pixels)


def _decoded_header(data: bytes, max_pixels: int) -> ImageHeader:
    with _opened(data, max_pixels) as image:
        width, height = image.size
        try:
            image.draft("RGB", (max(width // 8, 1), max(height // 8, 1)))
            image.load()
            if _orientation(image) in (5, 6, 7, 8):
                width, height = height, width
        except Exception as error:
            raise _broken(image, error) from error
        return ImageHeader(image.format or "", (width, height))


def _jpeg_without_entropy_data(data: bytes) -> bytes:
    """A JPEG's segments alone, tables and scan headers included; empty unless they are plainly whole.

    libjpeg reads this as a file that was damaged in its entropy-coded data: it fills in, and checks all the rest.
    """
    kept = [data[:2]]
    position = 2 if data.startswith(b"\xff\xd8") else len(data)
    has_scan = False
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] in _JPEG_SEGMENTS:
        marker = data[position + 1]
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        kept.append(data[position:end])
        if marker == _JPEG_SCAN:
            has_scan = True
            following = _MARKER_IN_JPEG_SCAN.search(data, end)
            if following is None:
                break
            end = following.start()
        position = end
    if has_scan and data[position : position + 2] == _JPEG_END:
        return b"".join(kept) + _JPEG_END
    return b""


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd tags; the bound below decides
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise Rejected("oversized_image", f"{error}") from error
    except UnidentifiedImageError as error:
        raise Rejected("not_an_image", f"{len(data)} bytes beginning with {data[:8]!r}") from error
    except Exception as error:
        raise Rejected("broken_image", f"{type(error).__name__}: {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise Rejected("oversized_image", f"{width} x {height} is more than {max_pixels} pixels")
    return image


def _broken(image: Image.Image, error: Exception) -> Rejected:
    return Rejected("broken_image", f"{image.format} of {image.width} x {image.height}: {error}")


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1..8, of an image that is loaded: loading turns a TIFF by itself and clears its tag."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        image = Image.fromarray((np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
