import numpy as np
import pytest
from conftest import coco_png, encoded, id_maps
from hypothesis import given
from PIL import Image

from collavo.images import ImageError
from collavo.panoptic.coco_png import decode_segment_ids


@given(id_maps())
def test_ids_come_back_out_of_a_coco_png(ids: np.ndarray):
    decoded = decode_segment_ids(coco_png(ids), ids.shape[::-1])
    assert decoded.dtype == np.uint32 and np.array_equal(decoded, ids)


def test_a_mask_of_many_million_pixels_is_read():  # Pillow then keeps it in several pieces
    ids = np.zeros((2600, 2000), dtype=np.uint32)
    ids[::1300, ::7] = 0x030201
    assert np.array_equal(decode_segment_ids(coco_png(ids), (2000, 2600)), ids)


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
    assert decode_segment_ids(encoded(mask), (3, 2)).tolist() == [[segment_id] * 3] * 2


def test_a_mask_of_another_size_is_refused_with_both_sizes():
    mask = encoded(Image.new("RGB", (3, 2)))
    with pytest.raises(ImageError, match="the mask is 3 x 2, its image 2 x 3") as refusal:
        decode_segment_ids(mask, (2, 3))
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
    with pytest.raises(ImageError) as refusal:
        decode_segment_ids(data, (200, 200))
    assert refusal.value.reason == "broken_mask"
