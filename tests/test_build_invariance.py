"""The rows are a matter of the input and the flags alone: not of workers, batches, order or shards."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builds import DataSet, build, scene_sources, tiny_mask2former
from conftest import needs_scenes_model

from collavo.scenes import write_scenes

IN_TWO_PROCESSES = ["--direct_running_mode", "multi_processing", "--direct_num_workers", 2]
IN_TWO_THREADS = ["--direct_running_mode", "multi_threading", "--direct_num_workers", 2]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # threads that wait for each other on busy cores take fifty times as long


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    write_scenes(folder, 9, size_wh=(96, 72))
    for name in ("scene-000003.jpg", "scene-000006.jpg"):  # so that rejects, too, are seen to be the same
        (folder / "images" / name).write_bytes(b"GIF89a")
    return folder


@pytest.fixture(scope="module")
def annotated(scenes, tmp_path_factory) -> DataSet:
    return build(tmp_path_factory.mktemp("annotated") / "out", *scene_sources(scenes), "--num_shards", 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_mask2former(tmp_path_factory.mktemp("model"))


def by_embedded_model(scenes: Path) -> list[object]:
    return ["--images", scenes / "images", "--segmenter_checkpoint", "scenes", "--num_shards", 3]


@pytest.fixture(scope="module")
def seen(scenes, tmp_path_factory) -> DataSet:
    return build(tmp_path_factory.mktemp("seen") / "out", *by_embedded_model(scenes))


def by_model(scenes: Path, checkpoint: Path) -> list[object]:
    return ["--images", scenes / "images", "--segmenter_checkpoint", checkpoint, "--segmenter_input_size", 64]


@pytest.fixture(scope="module")
def segmented(scenes, checkpoint, tmp_path_factory) -> DataSet:
    folder = tmp_path_factory.mktemp("segmented") / "out"
    return build(folder, *by_model(scenes, checkpoint), "--num_shards", 3)


def assert_same(one: DataSet, other: DataSet) -> None:
    """The same rows in the same bytes, and the same rejects, but for the folder of the files that these name."""
    assert one.rows == other.rows
    assert one.hashes == other.hashes
    told, told_before = (
        [{**reject, "detail": reject["detail"].rpartition("/")[2]} for reject in data.rejects] for data in (one, other)
    )
    assert told == told_before


def shuffled(content: Any) -> Any:
    """A JSON file's content with every list of records in another order."""
    for records in content.values() if isinstance(content, dict) else [content]:
        if isinstance(records, list):
            random.Random(1).shuffle(records)
    if isinstance(content, dict):
        for annotation in content["annotations"]:
            annotation["segments_info"].reverse()
    return content


@pytest.mark.parametrize("workers", [IN_TWO_PROCESSES, IN_TWO_THREADS], ids=["processes", "threads"])
def test_annotated_rows_depend_neither_on_workers_nor_on_the_current_folder(
    scenes, annotated, tmp_path, monkeypatch, workers
):
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").write_text("raise RuntimeError('not ours')")
    monkeypatch.chdir(tmp_path)
    assert_same(build(tmp_path / "out", *scene_sources(scenes), "--num_shards", 3, *workers), annotated)


def test_annotated_rows_do_not_depend_on_where_their_sources_lie_nor_on_files_and_order(scenes, annotated, tmp_path):
    there = tmp_path / "elsewhere"
    shutil.copytree(scenes, there)
    content = shuffled(json.loads((scenes / "panoptic.json").read_text()))
    dialogues = shuffled(json.loads((scenes / "dialogues.json").read_text()))
    for part in (0, 1):
        images = content["images"][part::2]
        annotations = [a for a in content["annotations"] if a["image_id"] in {image["id"] for image in images}]
        (tmp_path / f"{part}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
        (tmp_path / f"llava{part}.json").write_text(json.dumps(dialogues[part::2]))
    data = build(
        tmp_path / "out",
        *("--llava_json", tmp_path / "llava1.json", tmp_path / "llava0.json", "--image_root", there),
        *("--coco_panoptic", tmp_path / "1.json", tmp_path / "0.json", "--coco_images", *[there / "images"] * 2),
        *("--coco_masks", *[there / "panoptic"] * 2, "--num_shards", 3, "--segmenter", "annotations"),
    )
    assert_same(data, annotated)


@pytest.mark.parametrize("shards", [1, 100])
def test_the_number_of_shards_changes_files_and_not_rows(scenes, annotated, tmp_path, shards):
    data = build(tmp_path / "out", *scene_sources(scenes), "--num_shards", shards)
    assert data.rows == annotated.rows
    assert sorted(map(str, data.rejects)) == sorted(map(str, annotated.rejects))
    assert len(data.files) <= min(shards, len(data.rows)) and all(file["rows"] for file in data.manifest["files"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch_size", 1],
        ["--max_batch_pixels", 96 * 72 * 3],
        pytest.param(IN_TWO_PROCESSES, marks=pytest.mark.slow),
        IN_TWO_THREADS,
        pytest.param([*IN_TWO_PROCESSES, "--model_copies", 1, "--batch_size", 3], marks=pytest.mark.slow),
    ],
    ids=["one by one", "few pixels", "processes", "threads", "a shared copy"],
)
def test_segmented_rows_do_not_depend_on_batches_and_workers(scenes, checkpoint, segmented, tmp_path, flags):
    data = build(tmp_path / "out", *by_model(scenes, checkpoint), "--num_shards", 3, *flags)
    assert data.rows == segmented.rows
    assert data.rejects == segmented.rejects
    assert any(row.segments for row in data.rows.values())


@pytest.mark.slow
@needs_scenes_model
@pytest.mark.parametrize(
    "flags",
    [["--batch_size", 1], IN_TWO_PROCESSES, IN_TWO_THREADS],
    ids=["one by one", "processes", "threads"],
)
def test_rows_of_the_embedded_segmenter_do_not_depend_on_batches_and_workers(scenes, seen, tmp_path, flags):
    """They are the same in every bit, so that near-ties fall the same way."""
    assert_same(build(tmp_path / "out", *by_embedded_model(scenes), *flags), seen)
    assert any(row.segments for row in seen.rows.values())


def test_segmented_rows_do_not_depend_on_how_their_images_are_named(scenes, checkpoint, segmented, tmp_path):
    names = sorted((path.name for path in (scenes / "images").iterdir()), reverse=True)
    (tmp_path / "list.txt").write_text("\n".join(names))
    _, _, *model = by_model(scenes, checkpoint)
    listed = ["--images", tmp_path / "list.txt", "--image_root", scenes / "images", *model]
    assert build(tmp_path / "listed", *listed).rows == segmented.rows
