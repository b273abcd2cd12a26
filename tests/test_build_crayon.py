"""The build, end to end: what a user gets out of it."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import jsonlines
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builds import (
    IDS,
    PICTURE,
    REPOSITORY,
    CocoFolder,
    DataSet,
    build,
    planned,
    scene_sources,
    status_of,
    tiny_mask2former,
)
from conftest import coco_png, encoded, needs_scenes_model
from PIL import Image

from collavo.images import decode_rgb
from collavo.panoptic.index_png import decode_index_map
from collavo.parquet_writer import CrayonFileWriter
from collavo.scenes import write_scenes
from collavo.sources import records
from pipelines.sources import divide_records
from schemas.categories import COCO_PANOPTIC
from schemas.crayon_row import CRAYON_SCHEMA, TASKS, file_facts

COUNT = 12
TWO_SHARDS = ["--num_shards", 2, "--validation_ratio", 0.4]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder / "scenes", COUNT, size_wh=(96, 72))
    return folder / "scenes"


@pytest.fixture(scope="module")
def built(scenes, tmp_path_factory) -> DataSet:
    return build(tmp_path_factory.mktemp("built") / "out", *scene_sources(scenes), *TWO_SHARDS)


def check_sums(data: DataSet) -> None:
    """The manifest agrees with the rows, the rejects and itself."""
    manifest, rows, rejects = data.manifest, data.rows, data.rejects
    assert manifest["rows"] == len(rows) == sum(file["rows"] for file in manifest["files"])
    assert Counter(reject["reason"] for reject in rejects) == manifest["rejects"]
    assert Counter(reject["source"] for reject in rejects) == manifest["rejects_by_source"]
    assert Counter(manifest["inputs_in_rows"]) + Counter(manifest["rejects_by_source"]) == manifest["inputs"]
    assert Counter(i.task for row in rows.values() for i in row.instructions) == manifest["instructions"]
    assert Counter(row.split for row in rows.values()) == manifest["rows_by_split"]
    assert Counter(source for row in rows.values() for source in row.sources) == manifest["rows_by_source"]
    assert sum(len(row.conversations) for row in rows.values()) == manifest["conversations"]
    assert all(set(reject) == {"id", "source", "stage", "reason", "detail"} for reject in rejects)
    assert all(value.strip() for reject in rejects for value in reject.values())
    assert [file["name"] for file in manifest["files"]] == [file.name for file in data.files]
    assert [file["bytes"] for file in manifest["files"]] == [file.stat().st_size for file in data.files]
    assert [file["sha256"] for file in manifest["files"]] == [
        hashlib.sha256(file.read_bytes()).hexdigest() for file in data.files
    ]


@needs_scenes_model
def test_one_command_draws_scenes_and_makes_a_data_set_of_them(tmp_path, monkeypatch, capsys):
    """By default a network looks at the scenes."""
    monkeypatch.setenv("COLUMNS", "50")
    data = build(tmp_path / "out", "--scenes", 5, "--scene_size", "96x72")
    check_sums(data)
    (facts,) = data.manifest["segmenters"]
    assert facts["checkpoint"] == "scenes"
    scores = [found.score for row in data.rows.values() for found in row.segments]
    assert scores and None not in scores
    assert sorted(data.rows) == [f"images/scene-{i:06d}.jpg" for i in range(5)]
    assert data.manifest["instructions"].keys() == set(TASKS)
    assert all(row.sources == ("scenes",) and row.conversations for row in data.rows.values())
    report = (tmp_path / "out" / "report.html").read_text()
    assert "scene-0000" in report and "<img" in report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out_scenes"]
    assert {path.name for path in data.folder.iterdir()} - {file.name for file in data.files} == {
        *("README.md", "manifest.json", "rejects.jsonl", "report.html"),
    }
    shown = capsys.readouterr().out
    assert "report.html" in shown and "out/*.parquet" in shown
    assert max(map(len, shown.partition("Data: ")[0].splitlines()[1:])) <= 50
    assert all(f"{task} {count}" in shown for task, count in data.manifest["instructions"].items())


def test_the_real_photograph_keeps_what_is_published_of_it(tmp_path, real):
    data = build(
        tmp_path / "out",
        *("--coco_panoptic", real / "coco" / "panoptic.json", "--coco_images", real / "coco" / "images"),
        *("--llava_json", real / "llava_sample.json", "--image_root", real, "--segmenter", "annotations"),
    )
    rows = data.rows
    (row,) = (row for row in rows.values() if row.has_image)
    (talk,) = (row for row in rows.values() if not row.has_image)
    published = json.loads((real / "coco" / "panoptic.json").read_text())["annotations"][0]["segments_info"]
    assert len(row.segments) == len(published) == 18
    by_id = {segment.id: segment for segment in row.segments}
    for info in published:
        x, y, width, height = info["bbox"]
        assert by_id[info["id"]].box_xyxy == (x, y, x + width, y + height)
        assert by_id[info["id"]].area == info["area"]
    people = [segment for segment in row.segments if segment.category == "person"]
    assert sorted(person.numbering for person in people if not person.is_crowd) == list(range(1, 14))
    assert [person.numbering for person in people if person.is_crowd] == [0]
    assert row.image_bytes == (real / "coco" / "images" / "000000142238.jpg").read_bytes()

    entries = json.loads((real / "llava_sample.json").read_text())
    assert row.sources == ("coco", "llava")
    assert [d.as_record() for d in row.conversations] == [
        {"id": entry["id"], "turns": entry["conversations"]} for entry in entries[:2]
    ]
    assert [dialogue.id for dialogue in talk.conversations] == ["text-only-1"]
    assert [(reject["id"], reject["reason"]) for reject in data.rejects] == [("missing-1", "missing_file")]
    check_sums(data)


def test_rows_carry_what_the_sources_hold(built, scenes):
    check_sums(built)
    annotations = json.loads((scenes / "panoptic.json").read_text())["annotations"]
    dialogues = json.loads((scenes / "dialogues.json").read_text())
    rows = built.rows
    assert len(rows) == COUNT
    for annotation in annotations:
        row = rows[f"images/{annotation['file_name'].removesuffix('.png')}.jpg"]
        found = {segment.id: (segment.area, segment.box_xyxy, segment.is_crowd) for segment in row.segments}
        assert found == {
            info["id"]: (info["area"], (x, y, x + width, y + height), bool(info["iscrowd"]))
            for info in annotation["segments_info"]
            for x, y, width, height in [info["bbox"]]
        }
        assert row.image_bytes == (scenes / row.image_path).read_bytes()
        assert row.image_sha256 == hashlib.sha256(row.image_bytes).hexdigest()
        assert {dialogue.id for dialogue in row.conversations} == {
            entry["id"] for entry in dialogues if entry["image"] == row.image_path
        }
        assert row.license_id == 1 and row.sources == ("coco", "llava")


def test_the_panoptic_map_points_into_the_segments(built):
    for row in built.rows.values():
        index_map = decode_index_map(row.panoptic_png)
        assert index_map.shape == (row.height, row.width)
        assert np.bincount(index_map.ravel(), minlength=len(row.segments) + 1)[1:].tolist() == [
            segment.area for segment in row.segments
        ]


def test_files_are_those_that_the_contract_states(built):
    for file in built.files:
        parquet = pq.ParquetFile(file)
        assert parquet.schema_arrow.remove_metadata() == CRAYON_SCHEMA.remove_metadata()
        for column in CRAYON_SCHEMA:
            assert parquet.schema_arrow.field(column.name) == column
        facts = file_facts(parquet.metadata.metadata)
        assert facts["schema_version"] == 2 and facts["categories"]["name"] == COCO_PANOPTIC.name
        assert facts["instructions"]["seed"] == 0 and facts["code_version"]
        assert [json.loads(segmenter) for segmenter in facts["segmenters"]] == built.manifest["segmenters"]
        assert len(facts["templates_sha256"]) == 64
    assert built.manifest["segmenters"] == [{"name": "annotations"}]
    assert sorted(path.name for path in built.folder.iterdir()) == [
        *("README.md", "manifest.json", "rejects.jsonl", "report.html"),
        *("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"),
        *("validation-00000-of-00002.parquet", "validation-00001-of-00002.parquet"),
    ]
    for file in built.files:
        assert set(pq.read_table(file, columns=["split"])["split"].to_pylist()) == {file.name.partition("-")[0]}


def test_datasets_finds_both_splits_and_shows_both_pictures_decoded(built, tmp_path):
    splits = datasets.load_dataset(str(built.folder), cache_dir=str(tmp_path))
    rows = built.rows
    assert {name: len(split) for name, split in splits.items()} == built.manifest["rows_by_split"]
    assert set(splits) == {"train", "validation"}
    loaded = splits["train"]
    for record in loaded.select(range(2)):
        row = rows[record["image_id"]]
        assert record["image"].size == record["panoptic_map"].size == (row.width, row.height)
        assert np.array_equal(np.asarray(record["image"].convert("RGB")), decode_rgb(row.image_bytes))
        assert np.array_equal(np.asarray(record["panoptic_map"]), decode_index_map(row.panoptic_png))


def test_datasets_takes_no_data_set_for_an_earlier_one_in_a_folder_of_the_same_name(built, tmp_path):
    for task in ("counting", "class_to_binary"):
        again = build(tmp_path / task / "out", "--from_crayon", built.folder / "*.parquet", "--tasks", task)
        loaded = datasets.load_dataset(str(again.folder), split="train", cache_dir=str(tmp_path / "cache"))
        assert {i["task"] for row in loaded["instructions"] for i in row} == {task}


def test_a_reference_data_set_holds_paths_instead_of_bytes(scenes, built, tmp_path):
    references = build(tmp_path / "out", *scene_sources(scenes), "--image_storage", "reference", *TWO_SHARDS)
    for image_id, row in references.rows.items():
        assert row.image_bytes is None
        assert (scenes / row.image_path).read_bytes() == built.rows[image_id].image_bytes
    without_images = [name for name in CRAYON_SCHEMA.names if name != "image"]
    assert references.table.select(without_images) == built.table.select(without_images)


@pytest.mark.slow  # a process of its own; what a killed build had loaded says nearly the same
def test_an_annotations_build_loads_no_torch(tmp_path):
    coco = coco_of(tmp_path / "coco", {"a.png": 1})
    code = (
        "import sys; from pipelines.command import main; status = main(sys.argv[1:]); "
        "print(status, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    arguments = [*map(str, [*coco.flags(), *ANNOTATED, "--output", tmp_path / "out"])]
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "0 []"


def test_a_network_that_no_image_needs_need_not_be_in_reach(scenes, built, tmp_path):
    by_annotations = [word for word in scene_sources(scenes) if word not in ("--segmenter", "annotations")]
    data = build(tmp_path / "out", *by_annotations, *TWO_SHARDS, "--segmenter_checkpoint", "org/absent")
    assert data.rows == built.rows


# --- new instructions for finished rows


def test_finished_rows_get_the_same_instructions_from_the_same_arguments_and_others_from_others(built, tmp_path):
    again = build(tmp_path / "out", "--from_crayon", built.folder / "*.parquet", "--num_shards", 2)
    assert again.table == built.table
    assert [h for _, h in again.hashes] == [h for _, h in built.hashes]
    old_facts = file_facts(pq.read_metadata(again.files[0]).metadata)

    flags = ["--seed", 1, "--tasks", "counting", "box_to_class", "--overwrite"]
    changed = build(again.folder, "--from_crayon", again.folder, *flags)
    check_sums(changed)
    assert changed.table.drop(["instructions"]) == built.table.drop(["instructions"])
    assert changed.table["instructions"] != built.table["instructions"]
    assert changed.manifest["instructions"].keys() == {"counting", "box_to_class"}
    assert changed.manifest["inputs"] == {"crayon": COUNT} and changed.rejects == []
    assert file_facts(pq.read_metadata(changed.files[0]).metadata)["segmenters"] == old_facts["segmenters"]


def test_new_instructions_are_those_of_a_build_with_the_same_flags(scenes, built, tmp_path):
    phrasebook = tmp_path / "mine.json"
    phrasings = {"counting": [{"id": "c", "question": "{plural}?", "present": "{count}", "absent": "no {plural}"}]}
    phrasebook.write_text(json.dumps(phrasings))
    flags = ["--seed", 5, "--negative_ratio", 0.5, "--templates", phrasebook, "--num_shards", 1]
    direct = build(tmp_path / "direct", *scene_sources(scenes), *flags, "--validation_ratio", 0.4)
    renewed = build(tmp_path / "renewed", "--from_crayon", built.folder, *flags)
    assert renewed.table == direct.table
    assert direct.manifest["instructions"].keys() == {"counting"}  # the only one in the user's file


# --- every input leaves one trace


def lying() -> bytes:
    """A picture 8 pixels wide and 6 high, stored lying on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (6, 8), "red"), "JPEG", exif=exif)


def listed(*segments: tuple[int, int], is_crowd: int = 0) -> dict[str, object]:
    """An annotation's segments, given their ids and category ids."""
    return {"segments_info": [{"id": i, "category_id": c, "iscrowd": is_crowd} for i, c in segments]}


NOISE_16_BIT = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (6, 8), dtype=np.uint16))

IMAGE_CASES = {
    # Becomes a row, whatever the file calls itself.
    "plain.jpg": (PICTURE, {}, "row"),
    "turned.jpg": (lying(), {}, "row"),
    "deep.png": (encoded(NOISE_16_BIT), {}, "row"),
    "dots/and spaces/ünï.v2.jpg": (PICTURE, {}, "row"),
    "lying_mask.jpg": (lying(), {"mask": coco_png(IDS.T)}, "row"),
    "crowded.jpg": (PICTURE, listed((7, 1), (300, 3), is_crowd=1), "row"),
    # Is refused.
    "absent.jpg": (None, {}, ("read", "missing_file")),
    "cut.jpg": (PICTURE[:-40], {}, ("decode", "broken_image")),
    "text.jpg": (b"<html>404</html>", {}, ("decode", "not_an_image")),
    "huge.png": (encoded(Image.new("1", (100, 101))), {}, ("decode", "oversized_image")),
    "unknown_class.jpg": (PICTURE, listed((7, 12), (300, 3)), ("list", "unknown_category")),
    "unlisted.jpg": (PICTURE, listed((7, 1)), ("segment", "unlisted_segment")),
    "empty_segment.jpg": (PICTURE, listed((7, 1), (300, 1), (9, 1)), ("segment", "empty_segment")),
    "twice_listed.jpg": (PICTURE, listed((7, 1), (300, 1), (7, 1)), ("segment", "repeated_segment")),
    "narrow_mask.jpg": (PICTURE, {"mask": coco_png(IDS[:, :-1])}, ("segment", "mask_size_mismatch")),
    "broken_mask.jpg": (PICTURE, {"mask": b"\x89PNG\r\n"}, ("segment", "broken_mask")),
    "no_mask.jpg": (PICTURE, {"mask": None}, ("segment", "missing_file")),
    "mask_outside.jpg": (PICTURE, {"file_name": "../images/x.png", "mask": None}, ("list", "path_escapes_root")),
    "../outside.jpg": (None, {}, ("list", "path_escapes_root")),
}


def own(name: str, data: bytes | None) -> bytes | None:
    """The bytes of a case's file, which no other file has: what follows the end of a picture is ignored."""
    return data + name.encode() if data and name not in ("cut.jpg", "text.jpg") else data


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> tuple[CocoFolder, DataSet]:
    folder = tmp_path_factory.mktemp("cases")
    coco = CocoFolder(folder / "coco")
    for name, (data, changes, _) in IMAGE_CASES.items():
        coco.add(name, own(name, data), **changes)
    coco.json["images"] += [
        {"id": 900, "file_name": "unannotated.jpg"},
        {"id": 1, "file_name": "second_of_id_1.jpg"},
    ]
    (folder / "coco" / "images" / "unannotated.jpg").write_bytes(own("unannotated.jpg", PICTURE))
    coco.json["annotations"] += [
        coco.json["annotations"][0],
        {"image_id": 999, "file_name": "999.png", "segments_info": []},
    ]
    turns = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Nobody. \ud83d\ude00 <b>"}]
    entries = [
        {"id": "plain", "image": "plain.jpg", "conversations": turns},
        {"id": "other", "image": "plain.jpg", "conversations": turns[::-1]},
        {"id": "other extension", "image": "deep.jpg", "conversations": turns},
        {"id": "listed", "image": [str(folder / "coco" / "images" / "turned.jpg")], "conversations": turns},
        {"id": "again", "image": "plain.jpg", "conversations": turns},
        {"id": "plain", "image": "plain.jpg", "conversations": turns},
        {"id": "text", "conversations": [{"from": "human", "value": "Who?"}, turns[1]]},
        {"id": "several", "image": ["plain.jpg", "deep.png"], "conversations": turns},
        {"id": "robot", "image": "plain.jpg", "conversations": [{"from": "robot", "value": "?"}]},
        {"id": "no turns", "image": "plain.jpg", "conversations": []},
        {"id": "number", "image": 5, "conversations": turns},
        {"id": "outside", "image": "../../x.jpg", "conversations": turns},
        {"id": "absent", "image": "nowhere/x.jpg", "conversations": turns},
        {"id": "of a cut image", "image": "cut.jpg", "conversations": turns},
        "not an object",
        {"image": "plain.jpg", "conversations": [{"from": "human"}]},
    ]
    (folder / "llava.json").write_text(json.dumps(entries))
    llava = ["--llava_json", folder / "llava.json", "--image_root", folder / "coco" / "images"]
    arguments = [*coco.flags(), *llava, "--segmenter", "annotations", "--max_pixels", 10_000]
    return coco, build(folder / "out", *arguments)


@pytest.mark.parametrize("name", IMAGE_CASES)
def test_every_annotated_image_becomes_a_row_or_a_reject_with_its_reason(traced, name):
    coco, data = traced
    data_of_file, _, outcome = IMAGE_CASES[name]
    entry_id = str(next(image["id"] for image in coco.json["images"] if image["file_name"] == name))
    # A second annotation of image 1 is a reject of its own.
    rejects = [
        r for r in data.rejects if (r["source"], r["id"]) == ("coco", entry_id) and r["reason"] != "duplicate_id"
    ]
    if outcome == "row":
        assert rejects == []
        row = data.rows[name]
        assert (row.width, row.height, row.image_path, row.image_bytes) == (8, 6, name, own(name, data_of_file))
        assert decode_rgb(row.image_bytes).shape == (6, 8, 3)
        assert [(segment.id, segment.area) for segment in row.segments] == [(7, 24), (300, 24)]
    else:
        assert [(reject["stage"], reject["reason"]) for reject in rejects] == [outcome]


def test_entries_that_no_image_belongs_to_are_rejected(traced):
    _, data = traced
    found = [(r["id"], r["stage"], r["reason"]) for r in data.rejects if r["source"] == "coco"]
    assert found.count(("1", "list", "duplicate_id")) == 2  # a second image and a second annotation of the id
    assert ("999", "list", "unknown_image") in found
    assert ("900", "segment", "no_annotation") in found


def test_every_dialogue_ends_in_a_row_or_a_reject(traced):
    _, data = traced
    found = Counter((r["id"], r["stage"], r["reason"]) for r in data.rejects if r["source"] == "llava")
    assert found == Counter(
        [
            ("plain", "merge", "duplicate_entry"),
            ("several", "list", "several_images"),
            ("other", "list", "turns_do_not_alternate"),
            ("robot", "list", "malformed_entry"),
            ("no turns", "list", "malformed_entry"),
            ("number", "list", "malformed_entry"),
            ("outside", "list", "path_escapes_root"),
            ("absent", "read", "missing_file"),
            ("of a cut image", "decode", "broken_image"),
            ("#14", "list", "malformed_entry"),
            ("#15", "list", "malformed_entry"),
        ]
    )
    rows = data.rows
    assert [dialogue.id for dialogue in rows["plain.jpg"].conversations] == ["again", "plain"]
    assert rows["plain.jpg"].conversations[0].turns == (
        ("human", "<image>\nWho?"),
        ("gpt", "Nobody. \U0001f600 <b>"),
    )
    assert [dialogue.id for dialogue in rows["deep.png"].conversations] == ["other extension"]
    assert [dialogue.id for dialogue in rows["turned.jpg"].conversations] == ["listed"]
    (talk,) = (row for row in rows.values() if not row.has_image)
    assert talk.image_id == "llava.json#6" and [dialogue.id for dialogue in talk.conversations] == ["text"]
    assert talk.as_record()["image"] is None and talk.instructions == () and talk.sources == ("llava",)


def test_inputs_are_rows_and_rejects_by_source(traced):
    _, data = traced
    check_sums(data)
    assert data.manifest["inputs"] == {"coco": len(IMAGE_CASES) + 4, "llava": 16}
    with jsonlines.open(data.folder / "rejects.jsonl") as lines:
        assert sum(1 for _ in lines) == sum(data.manifest["rejects"].values())


# --- one picture, one row, one split


def numbered(number: int) -> bytes:
    """A picture of its own for each number."""
    return encoded(Image.new("RGB", (8, 6), (number, 90, 7)))


def coco_of(folder: Path, names: dict[str, int]) -> CocoFolder:
    """Annotated pictures by name and number."""
    coco = CocoFolder(folder)
    for name, number in names.items():
        coco.add(name, numbered(number))
    return coco


ANNOTATED = ["--segmenter", "annotations"]


@pytest.fixture(scope="module")
def by_tiny_model(tmp_path_factory) -> list[object]:
    """Flags for a model of random weights, where no annotation is found."""
    checkpoint = tiny_mask2former(tmp_path_factory.mktemp("model"))
    return ["--segmenter_checkpoint", checkpoint, "--segmenter_input_size", 64, "--device", "cpu"]


def test_the_same_picture_under_several_names_is_one_row(by_tiny_model, tmp_path):
    coco = coco_of(tmp_path / "coco", {"a.png": 1, "copy/b.png": 1, "c.png": 2})
    (tmp_path / "talks").mkdir()
    (tmp_path / "talks" / "renamed.png").write_bytes(numbered(2))
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Nobody."}]
    (tmp_path / "l.json").write_text(json.dumps([{"id": "d", "image": "renamed.png", "conversations": turns}]))
    llava = ["--llava_json", tmp_path / "l.json", "--image_root", tmp_path / "talks"]
    data = build(tmp_path / "out", *coco.flags(), *llava, *by_tiny_model)
    copied, row = data.rows["coco/images/a.png"], data.rows["coco/images/c.png"]
    assert len(data.rows) == 2 and copied.other_paths == ("coco/images/copy/b.png",)
    assert row.other_paths == ("talks/renamed.png",) and row.sources == ("coco", "llava")
    assert [dialogue.id for dialogue in row.conversations] == ["d"] and row.segments[0].score is None
    assert data.manifest["merged"] == 2 and data.manifest["inputs_in_rows"] == {"coco": 3, "llava": 1}
    check_sums(data)


def test_the_split_follows_the_picture_and_stays_when_others_come(tmp_path):
    splits = []
    for name, names in [
        ("few", {f"{i}.png": i for i in range(10)}),
        ("more", {f"moved/x{i}.png": i for i in range(20)}),
    ]:
        coco = coco_of(tmp_path / name, names)
        data = build(tmp_path / f"{name}_out", *coco.flags(), *ANNOTATED, "--validation_ratio", 0.4)
        splits.append({row.image_sha256: row.split for row in data.rows.values()})
    few, more = splits
    assert len(few) == 10 and set(few.values()) == {"train", "validation"}
    assert few.items() <= more.items() and len(more) == 20


def test_a_sources_split_wins_and_a_picture_that_one_source_holds_out_is_in_no_other_split(tmp_path):
    train = coco_of(tmp_path / "train", {f"t{i}.png": i for i in range(12)})
    held_out = coco_of(tmp_path / "held_out", {f"v{i}.png": i for i in range(10, 16)})
    (train_json, train_images), (json_, images) = (c.flags()[1::2] for c in (train, held_out))
    sources = ["--coco_panoptic", train_json, json_, "--coco_images", train_images, images]
    # Half of the pictures of either source are of the other split by their hash.
    flags = ["--coco_split", "train", "validation", "--validation_ratio", 0.5]
    data = build(tmp_path / "out", *sources, *ANNOTATED, *flags)
    splits = {row.image_id.rpartition("/")[2]: row.split for row in data.rows.values()}
    assert splits == {f"t{i}.png": "train" for i in range(10)} | {f"v{i}.png": "validation" for i in range(10, 16)}
    check_sums(data)


def test_dialogues_and_pictures_can_be_held_out_too(by_tiny_model, tmp_path):
    for folder, first in (("talked", 0), ("seen", 4)):
        (tmp_path / folder).mkdir()
        for number in range(first, first + 4):
            (tmp_path / folder / f"{number}.png").write_bytes(numbered(number))
    says = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Hello"}]
    entries = [{"id": str(n), "image": f"{n}.png", "conversations": says} for n in range(4)]
    (tmp_path / "talk.json").write_text(json.dumps(entries))
    talked = ["--llava_json", tmp_path / "talk.json", "--image_root", tmp_path / "talked"]
    flags = [*by_tiny_model, *talked, "--images", tmp_path / "seen", "--validation_ratio", 0.5]
    data = build(tmp_path / "out", *flags, "--llava_split", "validation", "--images_split", "train")
    splits = {row.image_id.rpartition("/")[2]: row.split for row in data.rows.values()}
    assert splits == {f"{n}.png": "validation" if n < 4 else "train" for n in range(8)}


def test_an_image_has_no_more_questions_than_asked_and_no_listing_of_a_crowd(scenes, built, tmp_path):
    sizes = sorted(len(row.segments) for row in built.rows.values())
    most = sizes[len(sizes) // 2]
    flags = ["--from_crayon", built.folder, "--tasks", "list_objects", "counting", "--max_listed_objects", most]
    listing = build(tmp_path / "listing", *flags).rows.values()
    assert {len(row.segments) for row in listing if "list_objects" in {i.task for i in row.instructions}} == {
        size for size in sizes if size <= most
    }
    assert most < sizes[-1] and max(len(row.instructions) for row in listing) > 5
    few = build(tmp_path / "few", *flags, "--max_instructions", 5).rows.values()
    assert max(len(row.instructions) for row in few) == 5


def test_a_class_that_the_map_leaves_out_is_unknown_in_a_picture_that_stays(tmp_path, capsys):
    coco = CocoFolder(tmp_path / "coco")
    coco.add("a.png", numbered(1))
    (tmp_path / "map.json").write_text('{"sky": "", "persom": ""}')
    data = build(tmp_path / "out", *coco.flags(), *ANNOTATED, "--category_map", tmp_path / "map.json")
    (row,) = data.rows.values()
    assert [(s.id, s.category, s.area) for s in row.segments] == [(7, "person", 24)]
    assert row.panoptic_png and decode_index_map(row.panoptic_png)[0].tolist() == [1] * 4 + [0] * 4
    assert "no source has 'persom'" in capsys.readouterr().out
    check_sums(data)


def test_finished_data_sets_become_one_with_each_picture_once(built, tmp_path):
    row = built.rows["images/scene-000000.jpg"]
    with (tmp_path / "other.parquet").open("wb") as file:
        writer = CrayonFileWriter(file, {}, COCO_PANOPTIC)
        writer.write(dataclasses.replace(row, image_id="z.jpg", image_path="z.jpg"))
        writer.close({})
    both = build(tmp_path / "both", "--from_crayon", built.folder, tmp_path / "other.parquet")
    assert both.rows.keys() == built.rows.keys() and both.rows[row.image_id].other_paths == ("z.jpg",)
    check_sums(both)


def test_a_data_set_keeps_its_split_and_its_rows_of_text(by_tiny_model, tmp_path, caplog):
    says = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    rows = [{"image": {"bytes": numbered(1), "path": "a.png"}, "messages": says}, {"image": None, "messages": says}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "validation-0.parquet")
    data = build(
        tmp_path / "out",
        *by_tiny_model,
        "--dataset",
        tmp_path / "validation-0.parquet",
        "--dataset_split",
        "validation",
    )
    picture, text = (data.rows[f"validation-0.parquet/00000{i}"] for i in (0, 1))
    assert picture.width and text.width is None and text.image_bytes is None
    assert picture.split == text.split == "validation"
    assert picture.conversations[0].turns == text.conversations[0].turns == (("human", "Hi"), ("gpt", "Hello"))
    assert not caplog.records  # Beam warns of outputs that a step does not declare
    check_sums(data)


def test_a_data_set_makes_the_same_rows_however_its_row_groups_are_divided(by_tiny_model, tmp_path, monkeypatch):
    rows = [{"image": numbered(i)} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=2)
    flags = [*by_tiny_model, "--dataset", tmp_path / "d.parquet"]
    whole = build(tmp_path / "whole", *flags)
    monkeypatch.setattr(records, "_BYTES_PER_PART", 1)
    (part,) = planned(*flags, "--output", tmp_path / "divided").job.record_parts
    assert [each.groups for each in divide_records(part)] == [(0,), (1,), (2,)]
    assert build(tmp_path / "divided", *flags).hashes == whole.hashes and len(whole.rows) == 6


def test_images_of_a_data_set_that_no_model_sees_are_rejected(by_tiny_model, tmp_path):
    coco = coco_of(tmp_path / "coco", {"a.png": 1})
    pq.write_table(pa.Table.from_pylist([{"image": numbered(2)}]), tmp_path / "d.parquet")
    flags = [*coco.flags(), *ANNOTATED, "--dataset", tmp_path / "d.parquet"]
    assert status_of(*flags, "--output", tmp_path / "out") == 1  # nothing is left of it
    model = [*by_tiny_model, "--dataset", tmp_path / "d.parquet"]
    data = build(tmp_path / "out", *coco.flags(), *model)  # what a failed build says of itself is in nobody's way
    assert data.manifest["inputs_in_rows"] == {"coco": 1, "dataset": 1}
    check_sums(data)


def test_a_path_in_brackets_is_printed_as_it_is(tmp_path, capfd):
    coco = CocoFolder(tmp_path / "coco")
    coco.add("a.jpg", PICTURE)
    output = tmp_path / "out[v2]"
    assert status_of(*coco.flags(), "--segmenter", "annotations", "--output", output) == 0
    assert f"{output}/*.parquet" in capfd.readouterr().out
