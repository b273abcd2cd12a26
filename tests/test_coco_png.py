import io

import numpy as np
import pytest
from conftest import coco_png, encoded, id_maps
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from collavo.errors import Rejected
from collavo.panoptic.coco_png import decode_segment_runs


def decode_ids(data: bytes, size_wh: tuple[int, int]) -> np.ndarray:
    """The map that the runs stand for, none of which could be longer."""
    runs = decode_segment_runs(data, size_wh)
    assert (runs.starts[1:][np.diff(runs.ids) == 0] % size_wh[0] == 0).all()
    return np.repeat(runs.ids, runs.lengths).reshape(runs.size_hw)


@given(id_maps())
def test_ids_come_back_out_of_a_coco_png(ids: np.ndarray):
    assert np.array_equal(decode_ids(coco_png(ids), ids.shape[::-1]), ids)


def test_a_mask_of_many_million_pixels_is_read():
    ids = np.zeros((2600, 2000), dtype=np.uint32)
    ids[::1300, ::7] = 0x030201
    assert np.array_equal(decode_ids(coco_png(ids), (2000, 2600)), ids)


@pytest.mark.parametrize(
    ("pixel", "segment_id"),
    [
        ((0, 0, 0), 0),  # unlabelled
        ((255, 0, 0), 255),  # the largest id of one channel
        ((1, 1, 0), 257),  # spills into green: a reader of red alone says 1
        ((0, 0, 1), 65536),
        ((255, 255, 255), 16777215),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])  # the latter two out of other people's tools
def test_a_pixel_is_read_as_coco_packs_it(pixel: tuple[int, int, int], segment_id: int, mode: str):
    mask = Image.new("RGB", (3, 2), pixel)
    mask = mask.quantize(1) if mode == "P" else mask.convert(mode)
    assert decode_ids(encoded(mask), (3, 2)).tolist() == [[segment_id] * 3] * 2


@pytest.mark.parametrize(("dtype", "ids"), [(np.uint8, [0, 7, 255]), (np.uint16, [0, 7, 40000])])
def test_a_grey_pixel_is_an_id(dtype: type, ids: list[int]):
    assert decode_ids(encoded(Image.fromarray(np.array([ids], dtype))), (3, 1)).tolist() == [ids]


def test_a_mask_of_one_bit_or_with_alpha_is_grey_too():
    grey = Image.fromarray(np.array([[0, 7, 200]], np.uint8))
    assert decode_ids(encoded(Image.fromarray(np.array([[False, True, True]]))), (3, 1)).tolist() == [[0, 1, 1]]
    assert decode_ids(encoded(grey.convert("LA")), (3, 1)).tolist() == [[0, 7, 200]]


@pytest.mark.parametrize(("listed", "ids"), [([1, 2], [[0, 1, 2]]), ([128, 32768], [[0, 128, 32768]]), ([5], None)])
def test_a_palette_holds_colours_or_numbers_whichever_are_listed(listed: list[int], ids: list[list[int]] | None):
    mask = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])  # as VOC's masks
    runs = decode_segment_runs(encoded(mask), (3, 1), listed)
    assert np.repeat(runs.ids, runs.lengths).reshape(runs.size_hw).tolist() == (ids or [[0, 128, 32768]])


@pytest.mark.parametrize(
    ("mask", "void"),
    [
        (Image.fromarray(np.array([[0, 7, 255]], np.uint8)), 255),
        (Image.fromarray(np.array([[0, 7, 65535]], np.uint16)), 65535),
        (Image.open(io.BytesIO(coco_png(np.array([[0, 7, 0xFFFFFF]], np.uint32)))), 0xFFFFFF),
        (Image.open(io.BytesIO(coco_png(np.array([[0, 7, 0xFFFFFF]], np.uint32)))).quantize(3), 0xFFFFFF),
    ],
)
def test_the_largest_value_is_unlabelled_unless_it_is_listed(mask: Image.Image, void: int):
    for listed, ids in (([7], [0, 7, 0]), ([7, void], [0, 7, void])):
        runs = decode_segment_runs(encoded(mask), (3, 1), listed)
        assert np.repeat(runs.ids, runs.lengths).tolist() == ids


def test_255_of_a_palette_is_unlabelled_and_white_may_be_the_colour_of_a_number():
    mask = Image.fromarray(np.array([[0, 1, 255]], np.uint8), "P")
    mask.putpalette([0, 0, 0, 255, 255, 255, *[9] * 253 * 3])
    runs = decode_segment_runs(encoded(mask), (3, 1), [1])
    assert np.repeat(runs.ids, runs.lengths).tolist() == [0, 1, 0]
    binary = Image.fromarray(np.array([[0, 1, 1]], np.uint8), "P")
    binary.putpalette([0, 0, 0, 255, 255, 255])
    runs = decode_segment_runs(encoded(binary), (3, 1), [1])
    assert np.repeat(runs.ids, runs.lengths).tolist() == [0, 1, 1]


def test_channels_in_the_order_of_opencv_are_found_out_by_the_ids_that_are_listed():
    rgb = np.asarray(Image.open(io.BytesIO(coco_png(np.array([[7, 300]], np.uint32)))))
    data = encoded(Image.fromarray(rgb[..., ::-1].copy()))
    with pytest.raises(Rejected, match="id 458752, which no segment has; read as blue, green, red") as error:
        decode_segment_runs(data, (2, 1), [7, 300])
    assert error.value.reason == "unlisted_segment"


def test_a_mask_of_another_size_is_refused_with_both_sizes():
    mask = encoded(Image.new("RGB", (3, 2)))
    with pytest.raises(Rejected, match="the mask is 3 x 2, its image 2 x 3") as refusal:
        decode_ids(mask, (2, 3))
    assert refusal.value.reason == "mask_size_mismatch"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        coco_png(np.arange(40_000).reshape(200, 200))[:-2000],
        encoded(Image.new("RGB", (200, 200)), "JPEG"),  # lossy: its ids would be noise
    ],
)
def test_what_is_no_whole_png_is_refused(data: bytes):
    with pytest.raises(Rejected) as refusal:
        decode_ids(data, (200, 200))
    assert refusal.value.reason == "broken_mask" and " object at 0x" not in str(refusal.value)


@settings(max_examples=100)
@given(st.data())
def test_damaged_masks_are_refused_or_have_the_pixels_that_pillow_finds(data: st.DataObject):
    ids = np.add.outer(np.arange(9) // 3, np.arange(11) // 4) * 70_001
    damaged = bytearray(coco_png(ids))
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=2)):
        damaged[place] = data.draw(st.integers(0, 255))
    file = bytes(damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))])
    try:
        pixels = np.asarray(Image.open(io.BytesIO(file), formats=("PNG",)).convert("RGB"))
    except Exception:
        pixels = np.empty((0, 0, 3))
    if pixels.shape == (9, 11, 3):
        assert np.array_equal(decode_ids(file, (11, 9)), pixels @ np.array([1, 256, 65536]))
    else:
        with pytest.raises(Rejected):
            decode_ids(file, (11, 9))
