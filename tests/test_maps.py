import numpy as np
import pytest
from conftest import PERSON, SKY, id_maps, panoptic_maps
from hypothesis import given
from hypothesis import strategies as st

from collavo.errors import Rejected
from collavo.panoptic.maps import PanopticMap, SegmentInfo, build_panoptic_map


def same(one: PanopticMap, other: PanopticMap) -> bool:
    return one.segments == other.segments and np.array_equal(one.index_map, other.index_map)


@given(id_maps(), st.data())
def test_what_is_measured_is_what_one_mask_per_segment_says(ids: np.ndarray, data: st.DataObject):
    infos = [
        SegmentInfo(
            int(id_), data.draw(st.integers(0, 132)), data.draw(st.booleans()), data.draw(st.none() | st.just(0.5))
        )
        for id_ in np.unique(ids[ids > 0])
    ]
    panoptic = build_panoptic_map(ids, infos)
    assert {s.id for s in panoptic.segments} == {info.id for info in infos}
    assert np.array_equal(panoptic.index_map == 0, ids == 0)
    for position, segment in enumerate(panoptic.segments, start=1):
        mask = ids == segment.id
        rows, columns = np.nonzero(mask)
        assert segment.area == mask.sum()
        assert segment.box_xyxy == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.array_equal(panoptic.index_map == position, mask)
        info = next(info for info in infos if info.id == segment.id)
        assert (segment.label, segment.is_crowd, segment.score) == (info.label, info.is_crowd, info.score)


@given(panoptic_maps(labels=(PERSON, SKY)), st.randoms())
def test_the_order_of_the_listed_segments_plays_no_part(panoptic: PanopticMap, random):
    infos = [SegmentInfo(s.id, s.label, s.is_crowd) for s in panoptic.segments]
    ids = np.array([0, *(s.id for s in panoptic.segments)], dtype=np.uint32)[panoptic.index_map]
    assert same(panoptic, build_panoptic_map(ids, random.sample(infos, len(infos))))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((15, 17), np.uint8),  # 255 segments, the most that a palette shows
        ((16, 16), np.uint16),
        ((1, 1300), np.uint16),
        ((1300, 1), np.uint16),
    ],
)
def test_the_map_is_as_wide_as_its_segments_need(shape: tuple[int, int], dtype: type):
    ids = np.arange(1, shape[0] * shape[1] + 1).reshape(shape)
    panoptic = build_panoptic_map(ids, [SegmentInfo(id_, PERSON) for id_ in ids.ravel().tolist()])
    assert panoptic.index_map.dtype == dtype
    assert np.array_equal(np.sort(panoptic.index_map, axis=None), ids.ravel())


def test_an_image_without_segments_has_an_empty_map():
    panoptic = build_panoptic_map(np.zeros((3, 4), dtype=np.uint32), [])
    assert panoptic.segments == () and panoptic.index_map.tolist() == [[0] * 4] * 3


@pytest.mark.parametrize(
    ("listed", "reason", "detail"),
    [
        ([5, 9, 9], "repeated_segment", "id 9 is listed twice"),
        ([0, 5, 9], "repeated_segment", "id 0 is listed, which stands for no label; count from 1"),
        ([5], "unlisted_segment", "id 9"),
        ([], "unlisted_segment", "id 5"),
        ([5, 9, 300], "empty_segment", "segment 300"),  # listed, but without a pixel
    ],
)
def test_a_map_and_a_list_that_contradict_each_other_are_refused(listed: list[int], reason: str, detail: str):
    ids = np.array([[5, 5, 9], [0, 5, 9]], dtype=np.uint32)
    with pytest.raises(Rejected, match=detail) as refusal:
        build_panoptic_map(ids, [SegmentInfo(id_, PERSON) for id_ in listed])
    assert refusal.value.reason == reason
