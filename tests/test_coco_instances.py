"""Instance annotations: scattered over the file, overlapping in the picture."""

import io
import json
import re
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from builds import DataSet, build
from conftest import encoded as image_bytes
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from collavo.errors import Rejected, UserError
from collavo.panoptic.index_png import decode_index_map
from collavo.panoptic.instances import Instance, instances_map, run_lengths
from collavo.panoptic.maps import SegmentInfo
from collavo.sources.coco_instances import stream_image_instances
from schemas.categories import COCO_PANOPTIC

SIZE_WH = (20, 10)


def rectangle(x_min: int, y_min: int, x_max: int, y_max: int) -> list[list[int]]:
    return [[x_min, y_min, x_max, y_min, x_max, y_max, x_min, y_max]]


def encoded(*rectangles: tuple[int, int, int, int]) -> dict[str, Any]:
    mask = np.zeros((SIZE_WH[1], SIZE_WH[0]), dtype=np.uint8, order="F")
    for x_min, y_min, x_max, y_max in rectangles:
        mask[y_min:y_max, x_min:x_max] = 1
    found = coco_mask.encode(mask)
    return {"size": found["size"], "counts": found["counts"].decode()}


def instance(id_: int, segmentation: Any, label: int = 0, is_crowd: bool = False) -> Instance:
    return Instance(SegmentInfo(id_, label, is_crowd), segmentation)


def test_overlaps_go_to_the_smaller_and_boxes_are_each_ones_own() -> None:
    large, small = instance(1, rectangle(0, 0, 10, 10)), instance(2, encoded((6, 4, 16, 8)))
    for both in ([large, small], [small, large]):
        found = instances_map(both, SIZE_WH)
        first, second = found.segments
        assert (first.id, first.box_xyxy, first.area, first.numbering) == (1, (0, 0, 10, 10), 100, 1)
        assert (second.id, second.box_xyxy, second.area, second.numbering) == (2, (6, 4, 16, 8), 40, 2)
        assert found.index_map[5, 7] == 2 and found.index_map[0, 0] == 1 and found.index_map[9, 19] == 0


def test_an_instance_under_others_keeps_a_pixel() -> None:
    same = [instance(1, encoded((2, 2, 8, 8))), instance(2, encoded((2, 2, 8, 8)))]
    found = instances_map(same, SIZE_WH)
    assert [(s.id, s.area, s.box_xyxy) for s in found.segments] == [(1, 36, (2, 2, 8, 8)), (2, 36, (2, 2, 8, 8))]
    assert sorted(np.unique(found.index_map).tolist()) == [0, 1, 2]


def test_many_instances_of_a_large_picture_take_no_more_memory_than_one() -> None:
    size_wh = (2000, 1500)
    many = [instance(i, rectangle(30 * i, 20 * i, 30 * i + 40, 20 * i + 40), i % 3) for i in range(1, 61)]
    peaks = []
    for instances in (many[:1], many):
        tracemalloc.start()
        assert len(instances_map(instances, size_wh).segments) == len(instances)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_crowds_are_not_numbered() -> None:
    crowd = {"size": [10, 20], "counts": [0, 30, 170]}  # uncompressed, as COCO stores them
    found = instances_map([instance(1, crowd, is_crowd=True), instance(2, rectangle(12, 0, 15, 5))], SIZE_WH)
    assert {s.id: s.numbering for s in found.segments} == {1: 0, 2: 1}


@pytest.mark.parametrize(
    "segmentation, reason",
    [
        ([[1, 2]], "broken_mask"),
        ([[1, 2, 3, 4]], "broken_mask"),  # no box
        ([[0, 0, float("nan"), 0, 9, 9]], "broken_mask"),  # pycocotools would end the process
        ([[0, 0, 1e300, 0, 9, 9]], "broken_mask"),
        ([[0, 0, 9, 0, 9, 9, 1]], "broken_mask"),
        ({"size": [10, 20], "counts": 7}, "broken_mask"),
        ({"size": [10, 20], "counts": [10, 50]}, "broken_mask"),  # pycocotools fills the rest from memory
        ({"size": [10, 20], "counts": [10, -5, 195]}, "broken_mask"),
        ({"size": [10, 20], "counts": ""}, "broken_mask"),
        ({"size": [10, 20], "counts": "zzzzzzzz~~~"}, "broken_mask"),
        ({"counts": "abc"}, "broken_mask"),
        ({"size": [20, 10], "counts": [0, 200]}, "mask_size_mismatch"),
        (encoded(), "empty_segment"),
    ],
)
def test_a_mask_that_cannot_be_used_is_told(segmentation: Any, reason: str) -> None:
    with pytest.raises(Rejected) as refused:
        instances_map([instance(1, segmentation)], SIZE_WH)
    assert refused.value.reason == reason


@given(st.data())
def test_compressed_runs_are_read_as_pycocotools_writes_them_and_damaged_ones_are_refused(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    seed, share = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.0, 0.01, 0.5, 1.0]))
    mask = np.random.default_rng(seed).random((height, width)) < share
    text = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    runs = run_lengths(text)
    assert np.array_equal(np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T, mask)
    damaged = bytearray(text)
    for place in data.draw(st.lists(st.integers(0, len(text) - 1), min_size=1, max_size=3)):
        damaged[place] = data.draw(st.integers(0, 127))
    with suppress(Rejected):
        segmentation = {"size": [height, width], "counts": damaged.decode()}
        assert instances_map([instance(1, segmentation)], (width, height)).index_map.shape == mask.shape


def stream(content: Any) -> list[Any]:
    return list(stream_image_instances(io.BytesIO(json.dumps(content).encode()), "instances.json", {1: 0, 3: 2}))


def annotation(id_: Any, image_id: Any, **changes: Any) -> dict[str, Any]:
    plain = {"id": id_, "image_id": image_id, "category_id": 1, "segmentation": [[0, 0, 1, 0, 1, 1]], "iscrowd": 0}
    return {**plain, **changes}


def test_scattered_annotations_come_together() -> None:
    images = [{"id": 1, "file_name": "a.jpg", "width": 4, "height": 3, "license": 2}, {"id": 2, "file_name": "b.jpg"}]
    annotations = [annotation(10, 1), annotation(11, "1", iscrowd=None), annotation(12.0, 1, category_id=3)]
    annotations += [annotation(13 + n, 1, iscrowd=said) for n, said in enumerate(("0", "1", True))]
    annotations += [annotation(20 + n, 1, ignore=said) for n, said in enumerate((0, None, 1, True))]
    first, second = stream({"images": images, "annotations": annotations})
    assert (first.entry_id, first.file_name, first.license_id, first.size_wh) == ("1", "a.jpg", 2, (4, 3))
    assert [i[:3] for i in json.loads(first.instances)] == [
        *([10, 0, 0], [11, 0, 0], [12, 2, 0]),
        *([13, 0, 0], [14, 0, 1], [15, 0, 1]),
        *([20, 0, 0], [21, 0, 0], [22, 0, 1], [23, 0, 1]),
    ]
    assert second.instances is None and second.size_wh is None


@pytest.mark.parametrize(
    "bad, reason",
    [
        (annotation(2, 1, category_id="x"), "malformed_entry"),
        (annotation(3, 1, segmentation=[]), "malformed_entry"),
        (annotation(7, 1, iscrowd="maybe"), "malformed_entry"),
        (annotation(5, 1, category_id=2), "unknown_category"),
    ],
)
def test_an_image_of_which_an_annotation_cannot_be_used_is_one_reject(bad: Any, reason: str) -> None:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}]
    spoiled, image = stream({"images": images, "annotations": [bad, annotation(4, 1), bad, annotation(6, 2)]})
    assert (spoiled.reason, spoiled.entry_id) == (reason, "1") and f"annotation {bad['id']}: " in str(spoiled)
    assert [i[0] for i in json.loads(image.instances)] == [6]


def test_a_file_of_boxes_alone_is_refused_and_does_not_become_pictures_without_objects() -> None:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "without.jpg"}]
    boxes = [annotation(n, 1, segmentation=[], bbox=[0, 0, 1, 1]) for n in (4, 5)]
    with pytest.raises(UserError, match=r"of its annotations can be used; annotation 4: .* a box alone makes no"):
        stream({"images": images, "annotations": boxes})
    assert [image.instances for image in stream({"images": images, "annotations": []})] == [None, None]  # it says so


def test_an_annotation_of_no_image_leaves_the_others() -> None:
    images = [{"id": 1, "file_name": "a.jpg"}]
    rejected, image = stream({"images": images, "annotations": [annotation(2, 9), annotation(4, 1)]})
    assert rejected.reason == "unknown_image" and [i[0] for i in json.loads(image.instances)] == [4]


COCO_THINGS = [{"id": c.category_id, "name": c.name, "supercategory": "any"} for c in COCO_PANOPTIC.things]
"""As `instances_train2017.json` has them: 80, none of which says that it is a thing."""


def build_instances(
    folder: Path,
    categories: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    *flags: object,
    orientation: int = 1,
    stated_wh: tuple[int, int] = SIZE_WH,
) -> DataSet:
    """Build from one picture, `a.jpg`, which EXIF may turn, and of which the JSON states a size."""
    (folder / "train2017").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (folder / "train2017" / "a.jpg").write_bytes(image_bytes(Image.new("RGB", SIZE_WH), "JPEG", exif=exif))
    images = [{"id": 1, "file_name": "a.jpg", "width": stated_wh[0], "height": stated_wh[1], "license": 4}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances_train2017.json").write_text(json.dumps(content))
    sources = ["--coco_instances", folder / "instances_train2017.json", "--coco_images", folder / "train2017"]
    return build(folder / "out", *sources, "--coco_split", "validation", *flags)


def test_cocos_own_instance_file_becomes_rows_of_the_built_in_set(tmp_path: Path) -> None:
    assert len(COCO_THINGS) == 80
    counts = [0, 30, 170]  # uncompressed: the first three columns
    annotations = [
        annotation(10, 1, segmentation=rectangle(4, 0, 14, 10)),
        annotation(11, 1, segmentation=encoded((10, 4, 18, 8)), category_id=3),  # car, in front of the person
        annotation(12, 1, segmentation={"size": [10, 20], "counts": counts}, category_id=1, iscrowd=1),
    ]
    data = build_instances(tmp_path, COCO_THINGS, annotations)
    (row,) = data.rows.values()
    assert (row.image_id, row.split, row.license_id, data.rejects) == ("a.jpg", "validation", 4, [])
    assert [(s.id, s.category, s.category_id, s.is_crowd, s.numbering, s.box_xyxy, s.area) for s in row.segments] == [
        (10, "person", 1, False, 1, (4, 0, 14, 10), 100),
        (12, "person", 1, True, 0, (0, 0, 3, 10), 30),
        (11, "car", 3, False, 1, (10, 4, 18, 8), 32),
    ]
    assert row.panoptic_png
    assert decode_index_map(row.panoptic_png)[5].tolist() == [2] * 3 + [0] + [1] * 6 + [3] * 8 + [0] * 2
    asked = " ".join(i.question for i in row.instructions if i.task == "counting")
    assert " cars" in asked and " people" not in asked  # of whom there is a crowd


def test_a_file_that_calls_most_objects_crowds_as_cvat_does_is_no_silent_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    brushed = {"size": [10, 20], "counts": [0, 30, 170]}
    drawn = [annotation(10, 1, segmentation=rectangle(4, 0, 14, 10))]
    for name, crowds, warns in (("few", 1, False), ("most", 2, True)):
        masks = [annotation(20 + n, 1, segmentation=brushed, category_id=3, iscrowd=1) for n in range(crowds)]
        masks[1:] = [{**mask, "segmentation": {"size": [10, 20], "counts": [170, 30]}} for mask in masks[1:]]
        data = build_instances(tmp_path / name, COCO_THINGS, drawn + masks)
        line = f"{crowds} of {crowds + 1} objects are crowds (iscrowd or ignore is 1), whose classes are not counted"
        assert (line in capsys.readouterr().out) == warns
        assert (line in (data.folder / "report.html").read_text()) == warns


def test_ids_that_no_row_can_hold_are_replaced_by_free_ones(tmp_path: Path) -> None:
    ids = [900100448263, 2, 0, "b", -7, None]  # a crowd of COCO's; Roboflow counts from 0
    annotations = [
        annotation(id_, 1, segmentation=rectangle(3 * place, 0, 3 * place + 3, 5 + place))
        for place, id_ in enumerate(ids)
    ]
    data = build_instances(tmp_path, COCO_THINGS, annotations)
    (row,) = data.rows.values()
    assert data.rejects == [] and {s.id: s.box_xyxy[0] for s in row.segments} == {1: 0, 2: 3, 3: 6, 4: 9, 5: 12, 6: 15}


def test_instances_of_a_picture_of_another_size_are_refused(tmp_path: Path) -> None:
    corner = [annotation(10, 1, segmentation=rectangle(0, 0, 6, 4))]
    for name, stated_wh in {"halved": (40, 20), "turned": (10, 20)}.items():
        with pytest.raises(AssertionError):  # no row is left
            build_instances(tmp_path / name, COCO_THINGS, corner, stated_wh=stated_wh)
        reject = json.loads((tmp_path / name / "out" / "failed-rejects.jsonl").read_text())
        assert reject["reason"] == "mask_size_mismatch" and f"{stated_wh[0]} x {stated_wh[1]}" in reject["detail"]


def test_corners_in_shares_of_the_picture_are_not_taken_for_pixels() -> None:
    with pytest.raises(Rejected, match="shares of the picture; COCO has pixels") as refused:
        instances_map([instance(1, [[0.1, 0.1, 0.5, 0.1, 0.5, 0.5, 0.1, 0.5]])], SIZE_WH)
    assert refused.value.reason == "broken_mask"


def test_a_polygon_need_not_be_in_a_list() -> None:
    (segment,) = instances_map([instance(1, rectangle(2, 1, 5, 4)[0])], SIZE_WH).segments
    assert segment.box_xyxy == (2, 1, 5, 4)


def test_a_polygon_that_encloses_nothing_leaves_the_others() -> None:
    (segment,) = instances_map([instance(1, [*rectangle(2, 1, 5, 4), [7, 7], [8, 8, 9, 9]])], SIZE_WH).segments
    assert segment.box_xyxy == (2, 1, 5, 4)


def test_a_class_that_others_belong_to_is_not_called_absent_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Roboflow adds one for each project, of which nothing is annotated."""
    tree = [("fasteners", "none"), ("bolt", "fasteners"), ("nut", "fasteners"), ("washer", "washer")]
    categories = [{"id": n, "name": name, "supercategory": above} for n, (name, above) in enumerate(tree)]
    data = build_instances(tmp_path, categories, [annotation(10, 1, segmentation=rectangle(0, 0, 5, 5))])
    assert "fasteners: the 'supercategory' of other classes" in capsys.readouterr().out
    (row,) = data.rows.values()
    assert [s.category for s in row.segments] == ["bolt"]
    asked = " ".join(i.question for i in row.instructions if i.polarity == "absent")
    assert "nut" in asked and "washer" in asked and "fastener" not in asked


@pytest.mark.parametrize("name", ["_background_", "__ignore__", "Ignored Regions", "DontCare"])
def test_a_name_for_no_object_is_not_called_absent(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """labelme's converter lists `_background_` first, and every picture of a single class would be asked about it."""
    categories = [{"id": 0, "name": name}, {"id": 1, "name": "pothole"}]
    marked = [annotation(10, 1, segmentation=rectangle(0, 0, 5, 5))]
    (row,) = build_instances(tmp_path / "one", categories, marked).rows.values()
    assert f"{name}: no kind of object, so never called absent" in capsys.readouterr().out
    assert {i.polarity for i in row.instructions} == {None, "present"}
    (tmp_path / "map.json").write_text(json.dumps({name: ""}))
    marked.append(annotation(11, 1, segmentation=rectangle(8, 0, 12, 5), category_id=0))
    flags = ["--category_map", tmp_path / "map.json"]
    (row,) = build_instances(tmp_path / "two", categories, marked, *flags).rows.values()
    assert [s.category for s in row.segments] == ["pothole"] and "no kind" not in capsys.readouterr().out


def test_what_no_file_looks_for_is_not_called_absent(tmp_path: Path) -> None:
    two = [{"id": 1, "name": "Person"}, {"id": 3, "name": "dog"}]
    annotations = [annotation(10, 1, segmentation=rectangle(0, 0, 5, 5))]
    few = build_instances(tmp_path / "few", two, annotations)
    again = build(tmp_path / "again", "--from_crayon", few.folder, "--seed", 5)
    (tmp_path / "map.json").write_text('{"cat": ""}')
    three = [*two, {"id": 4, "name": "cat"}]
    left_out = build_instances(tmp_path / "left_out", three, annotations, "--category_map", tmp_path / "map.json")
    for data in (few, again, left_out):
        (row,) = data.rows.values()
        assert row.segments[0].label == COCO_PANOPTIC.by_key["person"].label
        absent = [i.question for i in row.instructions if i.polarity == "absent"]
        assert absent and all("dog" in question for question in absent)


def test_rows_that_lost_their_metadata_call_absent_what_other_rows_of_their_folder_show(tmp_path, capsys) -> None:
    two = [{"id": 1, "name": "person"}, {"id": 3, "name": "dog"}]
    (tmp_path / "rewritten").mkdir()
    for name, number in (("person", 1), ("dog", 3)):
        corner = [annotation(10, 1, segmentation=rectangle(0, 0, 5, 5 + number), category_id=number)]
        (file,) = build_instances(tmp_path / name, two, corner, "--mask_frame", "stored", orientation=number).files
        bare = pq.read_table(file).replace_schema_metadata(None)  # as pandas leaves a file
        pq.write_table(bare, tmp_path / "rewritten" / f"{name}.parquet")
    data = build(tmp_path / "again", "--from_crayon", tmp_path / "rewritten", "--max_instructions", 90)
    assert f"{tmp_path / 'rewritten'}: another tool has rewritten rows" in capsys.readouterr().out
    assert len(data.rows) == len(two)
    for row in data.rows.values():
        other = "person|people" if row.segments[0].category == "dog" else "dog"
        absent = [i.question for i in row.instructions if i.polarity == "absent"]
        assert absent and all(re.search(other, question) for question in absent)


def test_classes_of_ones_own_are_things_in_an_instance_file(tmp_path: Path) -> None:
    own = [{"id": 1, "name": "Safety Helmet"}, {"id": 3, "name": "Forklift", "supercategory": "none"}]
    (row,) = build_instances(tmp_path, own, [annotation(10, 1, segmentation=rectangle(0, 0, 5, 5))]).rows.values()
    (segment,) = row.segments
    assert (segment.category, segment.is_thing, segment.numbering) == ("safety helmet", True, 1)
    assert "1 safety helmet" in " ".join(i.answer for i in row.instructions if i.task == "counting")


def test_a_class_that_the_map_leaves_out_is_unknown(tmp_path: Path) -> None:
    own = [{"id": 0, "name": "helmet"}, {"id": 3, "name": "ignore"}]
    (tmp_path / "map.json").write_text('{"ignore": ""}')
    annotations = [
        annotation(10, 1, segmentation=rectangle(0, 0, 10, 10), category_id=0),
        annotation(11, 1, segmentation=rectangle(4, 0, 8, 10), category_id=3),
    ]
    data = build_instances(tmp_path, own, annotations, "--category_map", tmp_path / "map.json")
    (row,) = data.rows.values()
    assert [(s.id, s.category, s.area) for s in row.segments] == [(10, "helmet", 100)] and data.rejects == []


def test_the_stated_size_says_whether_instances_are_turned_as_exif_turns_the_image(tmp_path: Path) -> None:
    corner = [annotation(10, 1, segmentation=rectangle(0, 0, 6, 4))]
    stored = build_instances(tmp_path / "stored", COCO_THINGS, corner, orientation=6)
    upright = build_instances(tmp_path / "upright", COCO_THINGS, corner, orientation=6, stated_wh=SIZE_WH[::-1])
    flag = ["--mask_frame", "stored"]
    upside_down = build_instances(tmp_path / "down", COCO_THINGS, corner, *flag, orientation=3)
    for data, size_wh, box_xyxy in [
        (stored, (10, 20), (6, 0, 10, 6)),  # turned to the right: what was top left is top right
        (upright, (10, 20), (0, 0, 6, 4)),
        (upside_down, (20, 10), (14, 6, 20, 10)),
    ]:
        (row,) = data.rows.values()
        assert ((row.width, row.height), row.segments[0].box_xyxy) == (size_wh, box_xyxy)


UNKNOWN = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [annotation(1, "a.jpg")]}
LISTED = {"images": [{"id": 1, "file_name": "a.jpg"}], "categories": []}  # as `image_info_test2017.json`
LVIS = {"images": [{"id": 1, "coco_url": "http://images/train2017/1.jpg", "neg_category_ids": [3]}]}
PANOPTIC = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "segments_info": []}]}


@pytest.mark.parametrize("content", [{}, {"images": []}, [], LVIS, PANOPTIC, UNKNOWN, LISTED])
def test_another_file_is_refused_in_one_line(content: Any) -> None:
    with pytest.raises(UserError, match=r"instances\.json: ") as refused:
        stream(content)
    assert "\n" not in str(refused.value)
