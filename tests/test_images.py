import io
import struct
import zlib

import numpy as np
import pytest
from conftest import encoded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from collavo.errors import Rejected
from collavo.images import decode_rgb, verify_image

WIDTH, HEIGHT = 24, 16
PIXELS = np.add.outer(np.arange(HEIGHT) * 7, np.arange(WIDTH) * 5)[..., None] + np.array([0, 20, 40])
PIXELS = PIXELS.astype(np.uint8)
PHOTO = Image.fromarray(PIXELS)
GREY = PIXELS[..., 0]

ORIENTATION = 0x0112


def outcome(function, data: bytes, **options) -> tuple[str, object]:
    """What a function says of an image: its size, or why it is refused."""
    try:
        result = function(data, **options)
    except Rejected as error:
        return "refused", error.reason
    return "accepted", result.shape[1::-1] if isinstance(result, np.ndarray) else result.size_wh


def decoded(data: bytes) -> np.ndarray:
    """The pixels of an image, on whose size the cheap verification agrees."""
    rgb = decode_rgb(data)
    assert rgb.dtype == np.uint8 and rgb.ndim == 3
    assert verify_image(data).size_wh == (rgb.shape[1], rgb.shape[0])
    return rgb


def refusal(data: bytes, **options) -> Rejected:
    """Why an image is refused, on which the cheap verification agrees."""
    with pytest.raises(Rejected) as by_decoding:
        decode_rgb(data, **options)
    with pytest.raises(Rejected) as by_verifying:
        verify_image(data, **options)
    assert by_decoding.value.reason == by_verifying.value.reason
    return by_decoding.value


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(Image.fromarray((GREY * 3).astype(np.uint8)))
    return image


def as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)


LOSSLESS_CASES = {
    "RGB PNG": (PHOTO, "PNG", {}, PIXELS),
    "RGBA PNG, its transparency dropped": (with_alpha(PHOTO.copy()), "PNG", {}, PIXELS),
    "RGBA WebP": (with_alpha(PHOTO.copy()), "WEBP", {"lossless": True, "exact": True}, PIXELS),
    "grey PNG": (Image.fromarray(GREY), "PNG", {}, as_rgb(GREY)),
    "grey with alpha": (with_alpha(Image.fromarray(GREY)), "PNG", {}, as_rgb(GREY)),
    "1-bit PNG": (Image.fromarray(GREY > 90), "PNG", {}, as_rgb((GREY > 90) * 255)),
    "16-bit grey PNG, scaled and not clipped": (
        Image.fromarray(GREY.astype(np.uint16) * 300),
        "PNG",
        {},
        as_rgb(GREY.astype(np.uint16) * 300 // 256),
    ),
    "16-bit grey TIFF": (
        Image.fromarray(GREY.astype(np.uint16) * 300),
        "TIFF",
        {},
        as_rgb(GREY.astype(np.uint16) * 300 // 256),
    ),
    "32-bit TIFF out of the 16-bit range": (
        Image.fromarray(np.where(GREY > 90, 1 << 20, -5).astype(np.int32)),
        "TIFF",
        {},
        as_rgb((GREY > 90) * 255),
    ),
    "BMP": (PHOTO, "BMP", {}, PIXELS),
}


@pytest.mark.parametrize("case", LOSSLESS_CASES)
def test_every_mode_comes_out_as_rgb(case: str):
    image, format, options, expected = LOSSLESS_CASES[case]
    assert np.array_equal(decoded(encoded(image, format, **options)), expected)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
@pytest.mark.parametrize("options", [{}, {"transparency": 2}])
def test_palette_images_show_their_palette(format: str, options: dict):
    palette = np.array([[250, 10, 0], [0, 200, 90], [30, 60, 90]], dtype=np.uint8)
    image = Image.fromarray((GREY % 3).astype(np.uint8))
    image.putpalette(palette.tobytes())
    assert np.array_equal(decoded(encoded(image, format, **options)), palette[GREY % 3])


@pytest.mark.filterwarnings("error")  # a warning per image would drown a job's log
def test_a_palette_with_several_degrees_of_transparency_shows_its_colours():
    image = PHOTO.quantize(4)
    data = encoded(image, transparency=bytes([255, 0, 128, 7]))
    assert np.array_equal(decoded(data), np.asarray(image.convert("RGB")))


def test_cmyk_jpegs_keep_their_colours():
    image = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    assert np.abs(decoded(encoded(image, "JPEG", quality=95)).astype(int) - (200, 40, 90)).max() <= 3


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_the_first_frame_stands_for_an_animation(format: str):
    first, second = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    data = encoded(first, format, save_all=True, append_images=[second], duration=100)
    assert np.abs(decoded(data).astype(int) - (255, 0, 0)).max() <= 3


SHORT, ASCII, BYTE, UNDEFINED = 3, 2, 1, 7


@pytest.mark.parametrize("kind, value", [(SHORT, 0), (SHORT, 9), (ASCII, ord("6")), (BYTE, 6), (UNDEFINED, 6)])
def test_an_orientation_that_exif_does_not_know_turns_nothing(kind: int, value: int):
    entry = struct.pack("<HHI4s", ORIENTATION, kind, 1, bytes([value, 0, 0, 0]))
    data = encoded(PHOTO, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4))
    assert verify_image(data).orientation == 1
    assert np.array_equal(decode_rgb(data), decode_rgb(encoded(PHOTO, "JPEG")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_images_are_turned_upright(format: str, orientation: int):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(PHOTO, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(decoded(data), np.asarray(expected))


def test_damaged_exif_that_has_no_part_in_turning_is_let_be():
    resolution_unit = (0x0128, 2, 4, b"abc\0")  # a text where a number belongs; Pillow's exif_transpose fails on it
    entries = [(ORIENTATION, 3, 1, b"\x06\0\0\0"), resolution_unit]
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + b"".join(struct.pack("<HHI4s", *e) for e in entries) + bytes(4)
    assert decoded(encoded(PHOTO, "JPEG", exif=exif)).shape == (WIDTH, HEIGHT, 3)


@pytest.mark.parametrize("size_wh", [(1, 1), (3, 20), (20, 3), (7, 9), (8, 8), (17, 9)])
def test_jpegs_of_a_few_pixels_are_images(size_wh: tuple[int, int]):
    assert decoded(encoded(PHOTO.resize(size_wh), "JPEG")).shape == (*reversed(size_wh), 3)


@pytest.mark.parametrize(
    "data",
    [
        bytes(1000),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # which Pillow would hand to Ghostscript
        b"\x00\x00\x02" + bytes(9) + b"\x08\x00\x08\x00\x18\x00" + bytes(192),  # a TGA: any bytes may pass for one
    ],
)
def test_what_is_no_image_is_told_apart_from_a_damaged_one(data: bytes):
    assert refusal(data).reason == "not_an_image"


@pytest.mark.parametrize(
    "data, looks_like",
    [
        (b"", "it is empty"),
        ("# Grüße\n\nA text.\n".encode() * 20, "it begins like text"),
        (b"\n<html><body>Not Found</body></html>", "an HTML page"),
        (b"%PDF-1.4\n", "a PDF; convert"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC; convert"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL; convert"),
        (b"PK\x03\x04\x14\0", "a zip archive; unpack"),
        (b"\x1f\x8b\x08\0", "gzip; unpack"),
        (b"images/".ljust(257, b"\0") + b"ustar\x0000", "a tar archive; unpack"),
        (b"PAR1\x15\x04", "a Parquet file"),
        (b"\x93NUMPY\x01\0", "its 8 bytes begin with"),
    ],
)
def test_a_refusal_names_the_kind_of_file_and_the_remedy(data: bytes, looks_like: str):
    assert looks_like in str(refusal(data))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_truncated_images_are_refused(format: str, share: float):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, format)
    assert refusal(data[: int(len(data) * share)]).reason == "broken_image"


@settings(max_examples=150)
@given(
    st.sampled_from([("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("WEBP", {})]),
    st.data(),
)
def test_verification_accepts_what_decodes_and_nothing_else(format: tuple[str, dict], data: st.DataObject):
    damaged = bytearray(encoded(PHOTO, format[0], **format[1]))
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    file = bytes(damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))])
    assert outcome(verify_image, file) == outcome(decode_rgb, file)


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"restart_marker_blocks": 1}, {"subsampling": 0, "optimize": True}],
    ids=["baseline", "progressive", "restart markers", "optimized"],
)
def test_verification_refuses_jpegs_cut_anywhere_that_do_not_decode(options: dict):
    thumbnail = encoded(PHOTO.resize((8, 8)), "JPEG")  # its own end of image, inside the EXIF, is not the file's
    whole = encoded(PHOTO, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail, **options)
    assert thumbnail in whole
    for length in range(len(whole) + 1):
        for file in (whole[:length], whole[:length] + b"\xff\xd9", whole[:length] + whole[length + 1 :]):
            assert outcome(verify_image, file) == outcome(decode_rgb, file), length
    assert outcome(verify_image, whole + b"trailer")[0] == "accepted"


def test_wrong_bits_in_the_data_of_a_jpeg_make_wrong_pixels_that_nobody_notices():
    whole = encoded(PHOTO, "JPEG")
    start = whole.index(b"\xff\xda") + 20
    zeroed = whole[:start] + bytes(len(whole) - start - 2) + whole[-2:]
    assert outcome(verify_image, zeroed) == outcome(decode_rgb, zeroed) == ("accepted", (WIDTH, HEIGHT))


def png_header(width: int, height: int) -> bytes:
    """The first bytes of a PNG that holds no pixel: decoding it would find it broken, not oversized."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"
    )


@pytest.mark.parametrize("side", [7_072, 12_000, 60_000])  # ours, beyond Pillow's warning, beyond its error
def test_decompression_bombs_are_refused_by_their_header(side: int):
    assert refusal(png_header(side, side)).reason == "oversized_image"
    assert refusal(png_header(20, 20)).reason == "broken_image"


def test_the_bound_on_pixels_is_inclusive():
    data = encoded(PHOTO)
    assert outcome(decode_rgb, data, max_pixels=WIDTH * HEIGHT)[0] == "accepted"
    error = refusal(data, max_pixels=WIDTH * HEIGHT - 1)
    assert error.reason == "oversized_image" and "24 x 16 is more than 383 pixels" in str(error)


def test_the_real_photograph_decodes(real):
    data = (real / "coco" / "images" / "000000142238.jpg").read_bytes()
    assert decoded(data).shape == (427, 640, 3)
    assert verify_image(data).format == "JPEG"


def test_pixels_from_0_to_1_are_refused_and_not_turned_black():
    refused = refusal(encoded(Image.fromarray(np.full((4, 6), 0.3, dtype=np.float32)), "TIFF"))
    assert refused.reason == "broken_image" and "fractions" in str(refused)


def test_a_damaged_jpeg_is_reported_with_its_own_size():
    data = encoded(PHOTO.resize((320, 240)), "JPEG")
    with pytest.raises(Rejected, match="JPEG of 320 x 240: "):
        verify_image(data[: len(data) * 3 // 4])
