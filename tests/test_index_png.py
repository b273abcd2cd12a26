import io

import numpy as np
import pytest
from conftest import CAR, PERSON, SKY, panoptic_maps, segment
from hypothesis import given
from PIL import Image

from collavo.panoptic.colors import crayon_color
from collavo.panoptic.index_png import decode_index_map, encode_index_map
from collavo.panoptic.maps import PanopticMap, SegmentInfo, build_panoptic_map
from schemas.categories import COCO_PANOPTIC


@given(panoptic_maps(max_side=9))
def test_index_maps_come_back_and_show_in_crayon_colours(panoptic: PanopticMap):
    data = encode_index_map(panoptic)
    assert np.array_equal(decode_index_map(data), panoptic.index_map)
    image = Image.open(io.BytesIO(data))
    assert image.mode == "P"  # which any viewer shows in colour
    shown = np.asarray(image.convert("RGB"))
    assert not shown[panoptic.index_map == 0].any()
    for position, segment_ in enumerate(panoptic.segments, start=1):
        color = crayon_color(COCO_PANOPTIC[segment_.label], segment_.numbering)
        assert (shown[panoptic.index_map == position] == color).all()


@pytest.mark.parametrize(("segments", "mode"), [(255, "P"), (256, "I;16"), (1300, "I;16")])
def test_maps_of_many_segments_come_back(segments: int, mode: str):
    ids = np.arange(1, segments + 1).repeat(2).reshape(2, -1)
    panoptic = build_panoptic_map(ids, [SegmentInfo(id_, PERSON) for id_ in range(1, segments + 1)])
    data = encode_index_map(panoptic)
    decoded = decode_index_map(data)
    assert decoded.dtype == panoptic.index_map.dtype and np.array_equal(decoded, panoptic.index_map)
    assert Image.open(io.BytesIO(data)).mode == mode


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_maps_with_many_borders_come_back(dtype: type):
    index_map = np.random.default_rng(0).integers(0, 200 if dtype == np.uint8 else 60_000, (37, 41), dtype=dtype)
    data = encode_index_map(PanopticMap(index_map, tuple([segment(id=i) for i in range(1, 200)])))
    assert np.array_equal(decode_index_map(data), index_map)


def test_every_instance_of_a_class_has_a_colour_of_its_own():
    for thing in COCO_PANOPTIC.things:
        assert len({crayon_color(thing, numbering) for numbering in range(21)}) == 21


def test_the_first_of_a_class_has_cocos_colour_and_the_next_a_clearly_other_one():
    for category in COCO_PANOPTIC:
        assert crayon_color(category, 1) == category.color_rgb
        assert np.abs(np.subtract(category.color_rgb, crayon_color(category, 2))).max() > 40


def test_two_people_a_car_and_a_crowd_differ_in_the_palette():
    segments = [
        segment(id=1),
        segment(id=2, numbering=2),
        segment(id=3, numbering=0, is_crowd=True),
        segment(id=4, label=CAR),
        segment(id=5, label=SKY),
    ]
    image = Image.open(
        io.BytesIO(encode_index_map(PanopticMap(np.arange(6, dtype=np.uint8).reshape(2, 3), tuple(segments))))
    )
    assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) == 6
