import json
from pathlib import Path

import numpy as np
import pytest
from conftest import CAR, PERSON, coco_png, encoded
from PIL import Image

from collavo.images import MAX_PIXELS, decode_rgb
from collavo.panoptic.index_png import decode_index_map
from collavo.panoptic.maps import build_panoptic_map
from collavo.sources.coco_panoptic import Annotation
from pipelines.image_steps import draft_row, read_image, segment_by_annotation, split_of
from pipelines.records import ImageTask, Input, LoadedImage, Mention, Reject, SegmentedImage
from schemas.crayon_row import CrayonRow, Dialogue

IDS = np.array([[5, 5, 5, 0], [5, 300, 300, 0], [5, 300, 300, 0]], dtype=np.uint32)
PHOTO = Image.fromarray(np.arange(36, dtype=np.uint8).reshape(3, 4, 3))
SEGMENTS = ((5, 1, 0), (300, 3, 0))


def mention(folder: Path, path: str, source: str = "folder", **more) -> Mention:
    return Mention(Input(source, f"{source}:{path}"), path, str(folder / path), **more)


def annotated(folder: Path, segments=SEGMENTS, mask: bytes | None = None) -> ImageTask:
    """A COCO image of three rows of four pixels with its mask, on disk."""
    if not (folder / "a.jpg").exists():
        (folder / "a.jpg").write_bytes(encoded(PHOTO))
    (folder / "a_mask.png").write_bytes(coco_png(IDS) if mask is None else mask)
    annotation = Annotation("a_mask.png", segments)
    return ImageTask(
        (mention(folder, "a.jpg", "coco", annotation=annotation, mask_uri=str(folder / "a_mask.png"), license_id=3),)
    )


def read(task: ImageTask, with_rgb: bool = False) -> LoadedImage:
    image, rejects = read_image(task, MAX_PIXELS, with_rgb)
    assert rejects == []
    return image


def row_of(image: LoadedImage) -> CrayonRow:
    """The row of an image that shows nothing."""
    empty = build_panoptic_map(np.zeros(image.size_wh[::-1], dtype=np.uint32), [])
    return draft_row(SegmentedImage(image, empty, "{}"), True, 0.05).row


def read_rejects(task: ImageTask, bound: int = MAX_PIXELS, with_rgb: bool = False) -> list[Reject]:
    """The rejects of an image that cannot be used."""
    image, rejects = read_image(task, bound, with_rgb)
    assert image is None
    return rejects


def mask_reasons(image: LoadedImage) -> list[tuple[str, str, str]]:
    """The rejects of an image whose annotation cannot be used."""
    outcome = segment_by_annotation(image)
    assert isinstance(outcome, list)
    return [(reject.id, reject.stage, reject.reason) for reject in outcome]


def test_an_image_is_read_as_it_is_with_pixels_only_where_they_are_wanted(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(PHOTO))
    task = ImageTask((mention(tmp_path, "a.png"),))
    verified, decoded = read(task), read(task, with_rgb=True)
    assert verified.image_bytes == decoded.image_bytes == (tmp_path / "a.png").read_bytes()
    assert verified.size_wh == decoded.size_wh == (4, 3)
    assert verified.rgb is None and np.array_equal(decoded.rgb, np.asarray(PHOTO))


@pytest.mark.parametrize(
    ("named", "on_disk"),
    [
        ("ocr/a.jpg", "ocr/a.png"),  # as in LLaVA's mix
        ("ocr/a.gif", "ocr/a.JPG"),
        ("ocr.v1/a.2.jpg", "ocr.v1/a.2.jpeg"),
        ("ocr/a", "ocr/a.jpg"),
        ("ocr/a.0001", "ocr/a.0001.webp"),
    ],
)
def test_an_image_with_another_extension_is_found_and_its_row_says_where(tmp_path, named: str, on_disk: str):
    (tmp_path / on_disk).parent.mkdir()
    (tmp_path / on_disk).write_bytes(encoded(PHOTO))
    image = read(ImageTask((mention(tmp_path, named, "llava"),)))
    assert image.uri == str(tmp_path / on_disk)
    assert row_of(image).image_path == on_disk
    assert row_of(image).image_id == image.task.image_id == on_disk.rpartition(".")[0]


def test_a_gif_that_is_called_jpg_is_an_image_like_any_other(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(PHOTO, "GIF"))
    image = read(ImageTask((mention(tmp_path, "a.jpg"),)))
    assert image.size_wh == (4, 3) and row_of(image).image_path == "a.jpg"


def test_of_two_files_with_one_id_the_first_is_kept_and_the_other_rejected(tmp_path):
    for name in ("cat.jpg", "cat.png"):
        (tmp_path / name).write_bytes(encoded(PHOTO))
    talk = Dialogue("d", (("human", "Hi"),))
    mentions = (
        mention(tmp_path, "cat.gif", "llava", dialogue=talk),  # not there: means the one that is
        mention(tmp_path, "cat.jpg"),
        mention(tmp_path, "cat.png"),
    )
    image, rejects = read_image(ImageTask(mentions), MAX_PIXELS, with_rgb=False)
    assert image.uri == str(tmp_path / "cat.jpg") and image.task.mentions == mentions[:2]
    assert [(r.id, r.stage, r.reason) for r in rejects] == [("folder:cat.png", "read", "duplicate_id")]
    assert "cat.jpg" in rejects[0].detail

    (tmp_path / "cat.jpg").write_bytes(b"no picture")
    both = read_rejects(ImageTask(mentions))
    assert {(r.id, r.stage, r.reason) for r in both} == {
        ("folder:cat.png", "read", "duplicate_id"),
        ("folder:cat.jpg", "decode", "not_an_image"),
        ("llava:cat.gif", "decode", "not_an_image"),
    }


@pytest.mark.parametrize(
    ("content", "stage", "reason"),
    [
        (None, "read", "missing_file"),
        (b"404: Not Found", "decode", "not_an_image"),
        (encoded(PHOTO.resize((60, 60)))[:-60], "decode", "broken_image"),
        (encoded(Image.new("1", (60, 60))), "decode", "oversized_image"),
    ],
)
@pytest.mark.parametrize("with_rgb", [False, True])
def test_an_unusable_image_rejects_all_that_name_it(tmp_path, content: bytes | None, stage, reason, with_rgb: bool):
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    task = ImageTask((mention(tmp_path, "a.jpg"), mention(tmp_path, "a.jpg", "llava")))
    bound = 3599 if reason == "oversized_image" else MAX_PIXELS
    rejects = read_rejects(task, bound, with_rgb)
    assert [(r.id, r.source, r.stage, r.reason) for r in rejects] == [
        ("folder:a.jpg", "folder", stage, reason),
        ("llava:a.jpg", "llava", stage, reason),
    ]


def test_an_annotation_becomes_segments(tmp_path):
    segmented = segment_by_annotation(read(annotated(tmp_path)))
    person, car = segmented.panoptic.segments
    assert (person.id, person.label, person.box_xyxy, person.area) == (5, PERSON, (0, 0, 3, 3), 5)
    assert (car.id, car.label, car.box_xyxy, car.area) == (300, CAR, (1, 1, 3, 3), 4)
    assert json.loads(segmented.segmenter) == {"name": "annotations"}


@pytest.mark.parametrize(
    ("segments", "mask", "reason"),
    [
        (SEGMENTS, coco_png(IDS.T), "mask_size_mismatch"),
        (SEGMENTS, b"not a mask", "broken_mask"),
        (((5, 1, 0), (300, 12, 0)), None, "unknown_category"),
        (((5, 1, 0),), None, "unlisted_segment"),
        ((*SEGMENTS, (301, 1, 0)), None, "empty_segment"),
        ((*SEGMENTS, (300, 3, 0)), None, "repeated_segment"),
    ],
)
def test_an_annotation_that_does_not_fit_rejects_the_image(tmp_path, segments, mask: bytes | None, reason: str):
    image = read(annotated(tmp_path, segments, mask))
    assert mask_reasons(image) == [("coco:a.jpg", "segment", reason)]


def test_a_missing_mask_and_a_missing_annotation_reject_the_image(tmp_path):
    task = annotated(tmp_path)
    (tmp_path / "a_mask.png").unlink()
    assert mask_reasons(read(task)) == [("coco:a.jpg", "segment", "missing_file")]
    plain = ImageTask((mention(tmp_path, "a.jpg"),))
    assert mask_reasons(read(plain)) == [("folder:a.jpg", "segment", "no_annotation")]


@pytest.mark.parametrize("with_rgb", [False, True])
def test_a_turned_photo_is_annotated_in_its_upright_frame(tmp_path, with_rgb: bool):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, four pixels high and three wide
    lying = PHOTO.transpose(Image.Transpose.ROTATE_90)
    (tmp_path / "a.jpg").write_bytes(encoded(lying, exif=exif))
    image = read(annotated(tmp_path), with_rgb)
    assert image.size_wh == (4, 3)
    assert np.array_equal(decode_rgb(image.image_bytes), np.asarray(PHOTO))
    row = draft_row(segment_by_annotation(image), True, 0).row
    assert (row.width, row.height) == (4, 3) and decode_index_map(row.panoptic_png).shape == (3, 4)
    lying_mask = annotated(tmp_path, mask=coco_png(np.rot90(IDS)))
    assert mask_reasons(read(lying_mask)) == [("coco:a.jpg", "segment", "mask_size_mismatch")]


def test_a_draft_says_all_but_the_instructions(tmp_path):
    (coco,) = annotated(tmp_path).mentions
    talks = [Dialogue(name, (("human", f"Hi {name}"), ("gpt", "Hello"))) for name in "xy"]
    others = [Mention(Input("llava", talk.id), "coco/a.jpg", coco.uri, dialogue=talk) for talk in talks]
    task = ImageTask((coco, *others))
    draft = draft_row(segment_by_annotation(read(task)), embed_image=True, validation_ratio=0.05)
    row = draft.row
    assert (row.image_id, row.image_path, row.width, row.height) == ("a", "a.jpg", 4, 3)
    assert row.image_bytes == (tmp_path / "a.jpg").read_bytes()
    assert (row.sources, row.license_id, row.split) == (("coco", "llava"), 3, split_of("a", 0.05))
    assert np.array_equal(decode_index_map(row.panoptic_png), [[1, 1, 1, 0], [1, 2, 2, 0], [1, 2, 2, 0]])
    assert row.conversations == tuple(talks) and row.instructions == ()
    assert draft.inputs == tuple(m.input for m in task.mentions) and draft.uri == coco.uri
    assert set(draft.seconds) == {"read", "decode", "segment", "encode"}


def test_a_reference_holds_the_path_and_no_bytes(tmp_path):
    row = draft_row(segment_by_annotation(read(annotated(tmp_path))), embed_image=False, validation_ratio=0).row
    assert row.image_bytes is None and row.image_path == "a.jpg"


def test_the_split_hangs_on_the_image_id_alone_and_keeps_to_its_ratio():
    ids = [f"train2017/{i:012}" for i in range(4000)]
    chosen = {ratio: {i for i in ids if split_of(i, ratio) == "validation"} for ratio in (0, 0.05, 0.2, 1)}
    assert chosen[0] == set() and chosen[1] == set(ids)
    assert len(chosen[0.05]) / 4000 == pytest.approx(0.05, abs=0.01)
    assert chosen[0.05] < chosen[0.2]  # a larger share takes nothing out of the smaller one
    assert split_of("000000142238", 0.83) == "validation" and split_of("000000142238", 0.82) == "train"


def test_the_real_photograph_goes_through_all_steps(real):
    annotation = json.loads((real / "coco" / "panoptic.json").read_text())["annotations"][0]
    segments = tuple((s["id"], s["category_id"], s["iscrowd"]) for s in annotation["segments_info"])
    photo = mention(
        real / "coco" / "images",
        "000000142238.jpg",
        "coco",
        annotation=Annotation(annotation["file_name"], segments),
        mask_uri=str(real / "coco" / "panoptic" / annotation["file_name"]),
    )
    row = draft_row(segment_by_annotation(read(ImageTask((photo,)))), True, 0.05).row
    assert (row.image_id, row.width, row.height, len(row.segments)) == ("000000142238", 640, 427, 18)
