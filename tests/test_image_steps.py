import dataclasses
import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builds import planned
from conftest import CAR, PERSON, coco_png, encoded
from PIL import Image

from collavo.images import MAX_PIXELS, decode_rgb
from collavo.panoptic.index_png import decode_index_map
from collavo.panoptic.maps import build_panoptic_map
from collavo.sources.coco_panoptic import Annotation
from pipelines import spill
from pipelines.image_steps import (
    draft_dialogue,
    draft_known,
    draft_row,
    fetch_files,
    merge_drafts,
    read_images,
    segment_by_annotation,
    split_of,
)
from pipelines.job import CrayonJob
from pipelines.records import Draft, ImageTask, Input, LoadedImage, Mention, SegmentedImage
from schemas.crayon_row import Dialogue

IDS = np.array([[5, 5, 5, 0], [5, 300, 300, 0], [5, 300, 300, 0]], dtype=np.uint32)
PHOTO = Image.fromarray(np.arange(36, dtype=np.uint8).reshape(3, 4, 3))
JOB = planned("--segmenter", "annotations", "--output", "/nowhere/out").job
SEGMENTS = ((5, PERSON, 0), (300, CAR, 0))


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


def job(mask_frame: str = JOB.mask_frame, **output: Any) -> CrayonJob:
    return dataclasses.replace(JOB, mask_frame=mask_frame, output=dataclasses.replace(JOB.output, **output))


def read(task: ImageTask, with_rgb: bool = False) -> LoadedImage:
    (image,), rejects = read_images(fetch_files(task, not with_rgb), MAX_PIXELS, with_rgb)
    assert rejects == []
    return image


def draft_of(image: LoadedImage, **changes: Any) -> Draft:
    """The draft of an image that shows nothing."""
    empty = build_panoptic_map(np.zeros(image.size_wh[::-1], dtype=np.uint32), [])
    return draft_row(SegmentedImage(image, empty, "{}"), job(**changes))


def draft_annotated(image: LoadedImage, **changes: Any) -> Draft:
    segmented = segment_by_annotation(image, job(**changes))
    assert isinstance(segmented, SegmentedImage)
    return draft_row(segmented, job(**changes))


def mask_reasons(image: LoadedImage, mask_frame: str = "auto") -> list[tuple[str, str, str]]:
    """The rejects of an image whose annotation cannot be used."""
    outcome = segment_by_annotation(image, job(mask_frame=mask_frame))
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
    row = draft_of(image).row
    assert row.image_id == row.image_path == on_disk and row.image_bytes == (tmp_path / on_disk).read_bytes()


def test_files_that_differ_only_in_their_extension_are_images_of_their_own(tmp_path):
    for name in ("cat.jpg", "cat.png"):
        (tmp_path / name).write_bytes(encoded(PHOTO, "JPEG" if name == "cat.jpg" else "PNG"))
    talk = Dialogue("d", (("human", "Hi"),))
    mentions = (
        mention(tmp_path, "cat.gif", "llava", dialogue=talk),  # not there: means the one that is
        mention(tmp_path, "cat.jpg"),
        mention(tmp_path, "cat.png"),
    )
    images, rejects = read_images(fetch_files(ImageTask(mentions), True), MAX_PIXELS, with_rgb=False)
    assert rejects == []
    assert [(image.path, image.task.mentions) for image in images] == [
        ("cat.jpg", mentions[:2]),
        ("cat.png", mentions[2:]),
    ]

    (tmp_path / "cat.jpg").write_bytes(b"no picture")
    (image,), rejects = read_images(fetch_files(ImageTask(mentions), True), MAX_PIXELS, with_rgb=False)
    assert image.path == "cat.png"
    assert {(r.id, r.stage, r.reason) for r in rejects} == {
        ("folder:cat.jpg", "decode", "not_an_image"),
        ("llava:cat.gif", "decode", "not_an_image"),
    }


def test_an_annotation_becomes_segments(tmp_path):
    segmented = segment_by_annotation(read(annotated(tmp_path)), job())
    assert isinstance(segmented, SegmentedImage)
    person, car = segmented.panoptic.segments
    assert (person.id, person.label, person.box_xyxy, person.area) == (5, PERSON, (0, 0, 3, 3), 5)
    assert (car.id, car.label, car.box_xyxy, car.area) == (300, CAR, (1, 1, 3, 3), 4)
    assert json.loads(segmented.segmenter) == {"name": "annotations"}


def test_a_missing_mask_and_a_missing_annotation_reject_the_image(tmp_path):
    task = annotated(tmp_path)
    (tmp_path / "a_mask.png").unlink()
    assert mask_reasons(read(task)) == [("coco:a.jpg", "segment", "missing_file")]
    plain = ImageTask((mention(tmp_path, "a.jpg"),))
    assert mask_reasons(read(plain)) == [("folder:a.jpg", "segment", "no_annotation")]


def test_a_turned_photo_is_annotated_in_its_upright_frame(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, four pixels high and three wide
    lying = PHOTO.transpose(Image.Transpose.ROTATE_90)
    (tmp_path / "a.jpg").write_bytes(encoded(lying, exif=exif))
    image = read(annotated(tmp_path))
    assert image.size_wh == (4, 3)
    assert np.array_equal(decode_rgb(image.image_bytes), np.asarray(PHOTO))
    upright_map = draft_annotated(image).row.panoptic_png
    assert decode_index_map(upright_map).shape == (3, 4)
    lying_mask = read(annotated(tmp_path, mask=coco_png(np.rot90(IDS))))
    assert draft_annotated(lying_mask).row.size_wh == (4, 3)
    assert draft_annotated(lying_mask).row.panoptic_png == upright_map
    assert mask_reasons(lying_mask, "upright") == [("coco:a.jpg", "segment", "mask_size_mismatch")]


def test_a_mask_that_fits_a_turned_photo_either_way_is_not_guessed_at(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (tmp_path / "a.jpg").write_bytes(encoded(PHOTO.rotate(180), exif=exif))
    image = read(annotated(tmp_path))
    assert mask_reasons(image) == [("coco:a.jpg", "segment", "ambiguous_orientation")]
    upright, stored = (draft_annotated(image, mask_frame=frame).row.segments for frame in ("upright", "stored"))
    assert upright[1].box_xyxy == (1, 1, 3, 3) and stored[1].box_xyxy == (1, 0, 3, 2)


def test_a_draft_says_all_but_the_instructions(tmp_path):
    (coco,) = annotated(tmp_path).mentions
    talks = [Dialogue(name, (("human", f"Hi {name}"), ("gpt", "Hello"))) for name in "xy"]
    others = [Mention(Input("llava", talk.id), "coco/a.jpg", coco.uri, dialogue=talk) for talk in talks]
    task = ImageTask((coco, *others))
    draft = draft_annotated(read(task), validation_ratio=0.5)
    row = draft.row
    assert (row.image_id, row.image_path, row.width, row.height) == ("a.jpg", "a.jpg", 4, 3)
    assert row.image_bytes == (tmp_path / "a.jpg").read_bytes()
    assert row.image_sha256 == hashlib.sha256(row.image_bytes).hexdigest()
    assert (row.sources, row.license_id, row.split) == (("coco", "llava"), 3, split_of(row.image_sha256, 0.5))
    assert np.array_equal(decode_index_map(row.panoptic_png), [[1, 1, 1, 0], [1, 2, 2, 0], [1, 2, 2, 0]])
    assert row.conversations == tuple(talks) and row.instructions == ()
    assert draft.inputs == tuple(m.input for m in task.mentions) and not draft.split_stated
    assert set(draft.seconds) == {"read", "decode", "segment", "encode"}


def test_threads_of_a_worker_find_what_a_stopped_build_left_once(tmp_path, monkeypatch):
    """Each would hold a place for all pictures while it does."""
    listings = []

    def list_files(pattern: str) -> list[str]:
        listings.append(pattern)
        time.sleep(0.2)
        return []

    monkeypatch.setattr(spill, "list_files", list_files)
    spill.spilled_pictures.cache_clear()
    image = read(annotated(tmp_path))
    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(draft_known, [image] * 4, [job(resume=True)] * 4)] == [None] * 4
    assert len(listings) == 1


def test_a_reference_holds_the_path_and_no_bytes(tmp_path):
    row = draft_annotated(read(annotated(tmp_path)), image_storage="reference").row
    assert row.image_bytes is None and row.image_path == "a.jpg"


def test_the_split_is_decided_by_a_digest_alone_and_keeps_to_its_ratio():
    ids = [hashlib.sha256(f"{i}".encode()).hexdigest() for i in range(4000)]
    chosen = {ratio: {i for i in ids if split_of(i, ratio) == "validation"} for ratio in (0, 0.05, 0.2, 1)}
    assert chosen[0] == set() and chosen[1] == set(ids)
    assert len(chosen[0.05]) / 4000 == pytest.approx(0.05, abs=0.01)
    assert chosen[0.05] < chosen[0.2]  # a larger share takes nothing out of the smaller one
    assert split_of("80" + "0" * 62, 0.51) == "validation" and split_of("80" + "0" * 62, 0.5) == "train"


def test_a_source_that_names_its_split_is_followed_and_validation_wins_where_two_disagree(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(PHOTO))
    plain, train, held_out = (mention(tmp_path, "a.jpg", split=split) for split in ("", "train", "validation"))
    for mentions, split in [((plain, train), "train"), ((train, held_out, plain), "validation")]:
        for ratio in (0.0, 1.0):
            draft = draft_of(read(ImageTask(mentions)), validation_ratio=ratio)
            assert draft.row.split == split and draft.split_stated


def test_a_dialogue_about_no_image_makes_a_row_without_one_whose_split_follows_its_text():
    talk = Dialogue("d", (("human", "Hi"), ("gpt", "Hello")))
    tasks = [ImageTask((Mention(Input("llava", "d"), f"x.json#{i}", "", dialogue=talk),)) for i in (3, 4)]
    first, moved = (draft_dialogue(task, job(validation_ratio=0.5)) for task in tasks)
    row = first.row
    assert (row.image_id, row.conversations, row.has_image) == ("x.json#3", (talk,), False)
    assert (row.image_sha256, row.image_path, row.width, row.panoptic_png) == (None,) * 4
    assert row.split == moved.row.split and first.inputs == (Input("llava", "d"),)


def test_the_same_bytes_at_two_paths_are_one_draft_with_what_both_bring(tmp_path):
    (tmp_path / "b.jpg").write_bytes(encoded(PHOTO))
    talk = Dialogue("d", (("human", "Hi"), ("gpt", "Hello")))
    first = draft_annotated(read(annotated(tmp_path)))
    second = draft_of(read(ImageTask((mention(tmp_path, "b.jpg", "llava", dialogue=talk),))))
    merged, rejects = merge_drafts(first, second)
    assert rejects == []
    assert (merged.row.image_id, merged.row.other_paths) == ("a.jpg", ("b.jpg",))
    assert merged.row.sources == ("coco", "llava") and merged.row.conversations == (talk,)
    assert merged.row.segments == first.row.segments and merged.inputs == first.inputs + second.inputs
    again, _ = merge_drafts(merged, second)
    assert again.row == merged.row


def test_of_two_finished_rows_that_a_network_made_beside_annotated_ones_both_dialogues_are_kept(tmp_path):
    first = draft_annotated(read(annotated(tmp_path)))
    row = first.row
    talks = [Dialogue(name, (("human", "Hi"), ("gpt", name))) for name in ("first", "second")]
    drafts = []
    for talk, score in zip(talks, (0.5, 0.9), strict=True):
        found = tuple(dataclasses.replace(segment, score=score) for segment in row.segments)
        named = (*first.segmenters, '{"segmenter": "network"}')  # as a finished row has those of its file
        changed = dataclasses.replace(row, segments=found, conversations=(talk,))
        drafts.append(dataclasses.replace(first, row=changed, segmenters=named))
    merged, rejects = merge_drafts(*drafts)
    assert rejects == [] and merged.row.conversations == tuple(talks) and merged.row.segments == drafts[0].row.segments


def test_of_the_same_bytes_with_two_annotations_the_second_is_rejected_and_both_are_named(tmp_path):
    first = draft_annotated(read(annotated(tmp_path)))
    second = draft_annotated(read(annotated(tmp_path, segments=((5, CAR, 0), (300, PERSON, 0)))))
    second = dataclasses.replace(second, row=dataclasses.replace(second.row, image_path="b.jpg"))
    merged, (reject,) = merge_drafts(first, second)
    assert merged is first and (reject.stage, reject.reason) == ("write", "other_annotation")
    assert "a.jpg" in reject.detail and "b.jpg" in reject.detail
