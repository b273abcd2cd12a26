"""Decode encoded images to upright RGB: the one place where images are opened.

The builder, the trainer and whatever asks a model all decode here, so that they see the same pixels: with EXIF
orientation applied, of the first frame of an animation, with grey, palette, CMYK and 16-bit images converted to 8-bit
RGB, without transparency. An image that cannot be decoded is refused with a reason. An image above a bound is refused
before memory for its pixels is allocated.
"""

import codecs
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
"""Pillow's own bound; a higher one has no effect."""

# Raster formats that can be told by their first bytes. Left out are EPS, which runs an interpreter on untrusted input,
# TGA, which begins like anything, and ICO, which decodes to another size than it states. The MPO of phones is a JPEG.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

_OTHER_FORMATS: tuple[tuple[bytes, str], ...] = (
    (rb"%PDF", "a PDF; convert its pages to images"),
    (rb"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1)", "HEIC; convert it to JPEG or PNG"),
    (rb"....ftyp(?!avi[fs])|....(moov|mdat|wide)|RIFF....AVI |\x1aE\xdf\xa3", "a video; extract its frames as images"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL; convert it to JPEG or PNG"),
    (rb"PK\x03\x04", "a zip archive; unpack it"),
    (rb"\x1f\x8b", "gzip; unpack it"),
    (rb".{257}ustar", "a tar archive; unpack it, or read it as a data set that holds its images"),
    (rb"PAR1", "a Parquet file; read it as a data set that holds its images"),
    (rb"version https://git-lfs", "a Git LFS pointer; git lfs pull fetches the file itself"),
    (rb"\s*(<\?xml[^>]*>\s*)?<svg", "SVG; render it as PNG"),
    (rb"\s*<(!doctype )?html", "an HTML page, perhaps of a failed download; fetch the image again"),
)
"""How files begin that people take for images, and what to do with them."""

_JPEG_SEGMENTS = {*range(0xC0, 0xD0), *range(0xDA, 0xFF)}
"""JPEG markers with a length after them; the others stand alone."""

_JPEG_SCAN, _JPEG_END = 0xDA, b"\xff\xd9"
_MARKER_IN_JPEG_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""The marker that ends entropy-coded data. Inside such data, 0xFF is followed by 0 or by a restart marker's number."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image file says about itself."""

    format: str
    """Pillow's name, such as `JPEG`."""

    size_wh: tuple[int, int]
    """Of the upright image."""

    orientation: int = 1
    """EXIF's, 1 to 8; 1 for an image that is stored upright."""


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to upright RGB.

    Args:
        data: the file's bytes, in one of Pillow's raster formats.
        max_pixels: bound on width x height.

    Returns:
        uint8 array [height, width, 3].

    Raises:
        Rejected: with reason `not_an_image`, `oversized_image` or `broken_image`.
    """
    with _opened(data, max_pixels) as image:
        try:
            return rgb_pixels(image)
        except Exception as error:  # Pillow's decoders raise a dozen types on damaged data
            raise _broken(image, image.size, error) from error


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """Turn an image that Pillow has opened into what `decode_rgb` makes of its file.

    Raises:
        ValueError: for pixels from 0 to 1.
    """
    _load(image)
    # Not `ImageOps.exif_transpose`: it fails on damaged tags that have nothing to do with turning.
    return turn_upright(np.asarray(_to_rgb(image)), _orientation(image))


def format_and_turned(data: bytes) -> tuple[str, bool]:
    """Read an image's format, by Pillow's name, and whether EXIF says to turn it; its pixels are not decoded.

    Raises:
        Rejected: as `decode_rgb`, for damage to the header only.
    """
    with _opened(data, HARD_MAX_PIXELS) as image:
        return image.format or "", _orientation(image) != 1


def verify_image(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Make sure that an image decodes to its last byte, without keeping its pixels.

    A full decode costs most of a build's time, so a JPEG is not decoded if its segments are plainly whole from start to
    end: libjpeg then gets the segments without the entropy-coded data between them, and checks them alone. The verdict
    is the same. A truncated file lacks segments or their end. For damage inside the entropy-coded data, such as flipped
    bits, libjpeg makes wrong pixels and reports nothing, in a full decode too.

    All other files are decoded; only that refuses an image. A JPEG is decoded to an eighth of its size, which reads all
    of its data in about half the time.

    Raises:
        Rejected: as `decode_rgb`.
    """
    if headers := _jpeg_without_entropy_data(data):
        with suppress(Rejected):
            return _decoded_header(headers, max_pixels)
    return _decoded_header(data, max_pixels)


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an array [height, width, ...] in the frame of an image as stored, such as its mask, as EXIF turns the image.

    Args:
        orientation: EXIF's, 1 to 8.
    """
    turned = {
        2: lambda: pixels[:, ::-1],
        3: lambda: pixels[::-1, ::-1],
        4: lambda: pixels[::-1],
        5: lambda: pixels.swapaxes(0, 1),
        6: lambda: np.rot90(pixels, -1),
        7: lambda: np.rot90(pixels, 2).swapaxes(0, 1),
        8: lambda: np.rot90(pixels),
    }
    return np.ascontiguousarray(turned[orientation]()) if orientation in turned else pixels


def _decoded_header(data: bytes, max_pixels: int) -> ImageHeader:
    with _opened(data, max_pixels) as image:
        width, height = image.size
        try:
            image.draft("RGB", (max(width // 8, 1), max(height // 8, 1)))
            _load(image)
            orientation = _orientation(image)
            if orientation in (5, 6, 7, 8):
                width, height = height, width
        except Exception as error:
            raise _broken(image, (width, height), error) from error
        return ImageHeader(image.format or "", (width, height), orientation)


def _jpeg_without_entropy_data(data: bytes) -> bytes:
    """Keep a JPEG's segments only, among them its tables and scan headers; empty unless they are plainly whole.

    libjpeg takes the result for a file whose entropy-coded data are damaged: it fills in pixels, and checks all else.
    """
    kept = [data[:2]]
    position = 2 if data.startswith(b"\xff\xd8") else len(data)
    has_scan = False
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] in _JPEG_SEGMENTS:
        marker = data[position + 1]
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        kept.append(data[position:end])
        if marker == _JPEG_SCAN:  # its header; entropy-coded data of unstated length follow
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
            warnings.simplefilter("ignore")  # of large images, which the bound below decides about, and of odd tags
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise Rejected("oversized_image", f"{error}") from error
    except UnidentifiedImageError as error:
        raise Rejected("not_an_image", f"not an image: {fault_in_image(data, error)}") from error
    except Exception as error:
        raise Rejected("broken_image", f"{type(error).__name__}: {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise Rejected("oversized_image", f"{width} x {height} is more than {max_pixels} pixels")
    return image


def fault_in_image(data: bytes, error: Exception) -> str:
    """Say what is wrong with a file that Pillow cannot open: its own words name an address in memory alone."""
    return _kind_of_file(data) if isinstance(error, UnidentifiedImageError) else str(error)


def _kind_of_file(data: bytes) -> str:
    """Say what a file that is no image looks like, and what to do with it where that is clear."""
    for beginning, kind in _OTHER_FORMATS:
        if re.match(beginning, data, re.DOTALL | re.IGNORECASE):
            return f"it is {kind}"
    if not data:
        return "it is empty"
    with suppress(UnicodeDecodeError):  # the decoder lets the 200 bytes end within a character
        text = codecs.getincrementaldecoder("utf-8")().decode(data[:200])
        if all(character.isprintable() or character.isspace() for character in text):
            return "it begins like text"
    return f"its {len(data)} bytes begin with {data[:8]!r}"


def _broken(image: Image.Image, size_wh: tuple[int, int], error: Exception) -> Rejected:
    width, height = size_wh
    return Rejected("broken_image", f"{image.format} of {width} x {height}: {error}")


def _orientation(image: Image.Image) -> int:
    """Read EXIF's orientation, 1..8; any other value turns nothing, as in viewers. Loading turns a TIFF upright and
    clears its tag, so load first to turn pixels."""
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _load(image: Image.Image) -> None:
    """Decode the pixels.

    Raises:
        ValueError: for those from 0 to 1, as of some TIFFs, which would all become black.
    """
    image.load()
    if image.mode == "F" and np.max(image.getextrema()) <= 1:
        raise ValueError("its pixels are fractions, from 0 to 1; store them in 8 or 16 bits")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        image = Image.fromarray((np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
