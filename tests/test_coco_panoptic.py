import io
import json
import tracemalloc

import pytest

from collavo.errors import Rejected, UserError
from collavo.panoptic.maps import SegmentInfo
from collavo.sources.coco_panoptic import AnnotatedImage, Annotation, segment_infos, stream_annotated_images
from schemas.categories import COCO_PANOPTIC

IMAGES = [
    {"id": 7, "file_name": "train/b.jpg", "license": 3, "width": 4, "height": 2},
    {"id": 3, "file_name": "train/a.jpg"},
    {"id": 9, "file_name": "c.jpg", "license": "CC BY"},  # a licence that is no COCO number
]
LABELS = {1: 0, 200: 132}
PERSON = {"id": 65536, "category_id": 1, "iscrowd": 0, "area": 9, "bbox": [0, 0, 3, 3]}
ANNOTATIONS = [
    {"image_id": 3, "file_name": "a.png", "segments_info": [PERSON, {"id": 5, "category_id": 200, "iscrowd": 1}]},
    {"image_id": 7, "file_name": "b.png", "segments_info": []},
]


def streamed(images=IMAGES, annotations=ANNOTATIONS, **more) -> list[AnnotatedImage | Rejected]:
    text = json.dumps({"info": {}, **more, "images": images, "annotations": annotations, "categories": []})
    return read(text)


def read(text: str) -> list[AnnotatedImage | Rejected]:
    return list(stream_annotated_images(io.BytesIO(text.encode()), "panoptic.json", LABELS))


def reasons(entries: list[AnnotatedImage | Rejected]) -> list[tuple[str, str]]:
    return [(e.entry_id, e.reason) for e in entries if isinstance(e, Rejected)]


def test_annotated_images_come_first_then_those_without():
    assert streamed() == [
        AnnotatedImage("3", "train/a.jpg", None, None, Annotation("a.png", ((65536, 0, 0), (5, 132, 1)))),
        AnnotatedImage("7", "train/b.jpg", 3, (4, 2), Annotation("b.png", ())),
        AnnotatedImage("9", "c.jpg", None, None, None),
    ]


def test_the_order_of_the_two_lists_in_the_file_plays_no_part():
    text = json.dumps({"annotations": ANNOTATIONS, "images": IMAGES})
    assert read(text) == streamed()


@pytest.mark.parametrize(
    ("images", "annotations", "expected"),
    [
        ([*IMAGES, IMAGES[0]], ANNOTATIONS, [("7", "duplicate_id")]),
        (IMAGES, [*ANNOTATIONS, ANNOTATIONS[0]], [("3", "duplicate_id")]),
        (IMAGES, [*ANNOTATIONS, ANNOTATIONS[0] | {"image_id": 8}], [("8", "unknown_image")]),
        ([*IMAGES, {"id": 1}], ANNOTATIONS, [("", "malformed_entry")]),
        ([*IMAGES, {"id": 1, "file_name": None}], ANNOTATIONS, [("", "malformed_entry")]),
    ],
)
def test_entries_that_make_no_row_come_as_errors_beside_the_others(images, annotations, expected):
    entries = streamed(images, annotations)
    assert reasons(entries) == expected
    assert [entry for entry in entries if isinstance(entry, AnnotatedImage)] == streamed()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "premature EOF"),
        ("not json", "to its end"),
        ("[]", "no 'images'"),
        ('{"images": []}', "no 'images'"),
        (
            '{"images": [{"id": 1, "coco_url": "x/1.jpg"}]}',
            "an image needs 'id' and 'file_name', found {'id': 1, 'coco_url'",
        ),
        (json.dumps({"images": IMAGES, "annotations": ANNOTATIONS})[:-20], "premature EOF"),  # truncated in the second
        (json.dumps({"images": IMAGES})[:-20], "premature EOF"),
        (json.dumps({"images": ["a.jpg"]}), "AttributeError"),
        # an instances file, the one that people mix up with the panoptic one
        (
            json.dumps({"images": IMAGES, "annotations": [{"image_id": 3, "bbox": [1, 2, 3, 4], "category_id": 1}]}),
            "no 'segments_info', so it is not panoptic",
        ),
    ],
)
def test_what_is_not_coco_panoptic_is_refused_in_one_line(text: str, found: str):
    with pytest.raises(UserError) as refusal:
        read(text)
    assert found in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_large_file_is_read_as_a_stream(tmp_path):
    path = tmp_path / "panoptic.json"
    segments = [{"id": i, "category_id": 1, "iscrowd": 0, "bbox": [0, 0, 10, 10], "area": 100} for i in range(1, 60)]
    images = [{"id": i, "file_name": f"{i:012}.jpg"} for i in range(350)]
    annotations = [{"image_id": i, "file_name": f"{i:012}.png", "segments_info": segments} for i in range(350)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    with path.open("rb") as file:
        tracemalloc.start()
        count = sum(1 for _ in stream_annotated_images(file, "panoptic.json", LABELS))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert count == 350
    assert peak < path.stat().st_size / 2  # loaded whole it would take several times its size


def test_the_real_file_is_read(real):
    with (real / "coco" / "panoptic.json").open("rb") as file:
        (image,) = stream_annotated_images(file, "panoptic.json", {c.category_id: c.label for c in COCO_PANOPTIC})
    assert (image.entry_id, image.file_name, image.license_id) == ("142238", "000000142238.jpg", 2)
    assert image.annotation.mask_name == "000000142238.png" and len(image.annotation.segments) == 18


def test_segments_of_an_annotation_are_told_by_their_labels():
    assert segment_infos([(5, 0, 0), (9, 132, 1)]) == [SegmentInfo(5, 0), SegmentInfo(9, 132, is_crowd=True)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"segments_info": [PERSON | {"category_id": 12}]}, "unknown_category"),  # not in the file's own list
        ({"segments_info": [PERSON | {"category_id": None}]}, "malformed_entry"),
        ({"segments_info": [PERSON | {"iscrowd": "often"}]}, "malformed_entry"),
        ({"segments_info": [PERSON | {"id": -1}]}, "malformed_entry"),
        ({"segments_info": None}, "malformed_entry"),
        ({"file_name": None}, "malformed_entry"),
    ],
)
def test_an_annotation_that_cannot_be_used_leaves_the_others(change: dict, reason: str):
    entries = streamed(annotations=[ANNOTATIONS[0] | change, ANNOTATIONS[1]])
    assert reasons(entries) == [("3", reason)]
    assert [e.entry_id for e in entries if isinstance(e, AnnotatedImage)] == ["7", "9"]


def test_numbers_are_read_as_people_write_them():
    (image, *_) = streamed(
        [{"id": "3", "file_name": "a.jpg"}],
        [{"image_id": 3.0, "file_name": "a.png", "segments_info": [PERSON | {"id": "5", "iscrowd": None}]}],
    )
    assert image.annotation == Annotation("a.png", ((5, 0, 0),))
