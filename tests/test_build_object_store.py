"""The build with nothing on a local disk: sources and output in an S3 store."""

import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from builds import PICTURE, build, planned, scene_sources, status_of, tiny_mask2former
from PIL import Image
from stores import Store, s3_store

from collavo import object_store, storage
from collavo.errors import StoreFault
from collavo.scenes import write_scenes
from pipelines import joins, launch
from pipelines.command import main
from pipelines.graph import build_graph
from pipelines.job import Publication
from pipelines.publish import publish


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    write_scenes(folder, 4, size_wh=(96, 72))
    (folder / "images" / "scene-000002.jpg").unlink()
    Image.new("RGB", (8, 6)).save(folder / "images" / "unannotated.png")
    return folder


@pytest.fixture(scope="module")
def store(scenes) -> Iterator[Store]:
    with s3_store() as store:
        for file in filter(Path.is_file, scenes.rglob("*")):
            store.put(f"in/{file.relative_to(scenes)}", file.read_bytes())
        storage._file_system.cache_clear()
        yield store


def sources(folder: str) -> list[str]:
    """Flags for annotated scenes, dialogues about them, and a listing of the same folder."""
    flags = [*scene_sources(Path("/scenes")), "--images", "/scenes/images/"]
    return [str(value).replace("/scenes", folder) for value in flags]


def joined_twice(sizes: tuple[int, int, int], shard_counts: dict[str, int]) -> tuple[joins.Join, ...]:
    """As where pictures are so many that files of drafts are joined."""
    return joins.Join(2, 2), joins.Join(1, 1)


def test_a_store_gets_the_files_that_a_disk_gets_and_they_are_replaced_when_asked(
    scenes, store, tmp_path, monkeypatch, capsys
):
    local = build(tmp_path / "out", *sources(str(scenes)), "--num_shards", 2)
    flags = [*sources("s3://bucket/in"), "--output", "s3://bucket/out"]
    store.requests.clear()
    assert main([*flags, "--num_shards", "2"]) == 0
    asked = Counter(line.rpartition(" ")[0] for line in store.requests)
    folders = ("GET /bucket/in/images/", "GET /bucket/in/panoptic/")
    inputs = {line: count for line, count in asked.items() if line.startswith(folders)}
    assert set(inputs.values()) == {1}  # each picture and mask once, and so each name that a missing one might have
    assert asked.total() - len(inputs) < 25
    made = store.objects("out/")
    assert sorted(made) == sorted(path.name for path in local.folder.iterdir())
    for file in local.files:
        assert made[file.name] == file.read_bytes()
    rejects = made["rejects.jsonl"].replace(b"s3://bucket/in", str(scenes).encode())
    assert sorted(rejects.splitlines()) == sorted((local.folder / "rejects.jsonl").read_bytes().splitlines())
    assert sorted(reject["reason"] for reject in local.rejects) == ["missing_file", "missing_file", "no_annotation"]

    assert main(flags) == 2 and "--output s3://bucket/out holds a data set" in capsys.readouterr().err
    assert store.objects("out/") == made
    monkeypatch.setattr(joins, "plan_joins", joined_twice)
    store.requests.clear()
    assert main([*flags, "--num_shards", "2", "--overwrite", "--direct_num_workers", "1"]) == 0
    assert sum("PUT" in line and "/drafts/" in line for line in store.requests) > 2
    again = store.objects("out/")
    assert all(again[file.name] == file.read_bytes() for file in local.files)

    store.put("out/train-00001-of-00002.parquet", made["train-00000-of-00001.parquet"])  # of more shards than the next
    assert main([*flags, "--num_shards", "1", "--validation_ratio", "0", "--overwrite"]) == 0
    files = ["README.md", "manifest.json", "rejects.jsonl", "report.html", "train-00000-of-00001.parquet"]
    assert sorted(store.objects("out/")) == files
    again = build(tmp_path / "again", "--from_crayon", "s3://bucket/out/*.parquet")
    assert [file.read_bytes() for file in again.files] == [store.objects("out/")[files[-1]]]


@pytest.mark.parametrize("pattern", ["", "/", "/**", "/**/*"])
def test_folders_that_a_console_marks_are_no_files(store, pattern):
    for name in ("", "cats/"):
        store.put(f"marked/{name}", b"")
    for name in ("a.jpg", "cats/big/b.jpg", "cats/empty.jpg"):
        store.put(f"marked/{name}", b"" if "empty" in name else b"jpeg")
    found = storage.list_files(f"s3://bucket/marked{pattern}")
    assert found == [f"s3://bucket/marked/{name}" for name in ("a.jpg", "cats/big/b.jpg", "cats/empty.jpg")]


def test_a_tar_in_a_store_is_read_in_large_pieces(store, tmp_path):
    (tmp_path / "shard").mkdir()
    for number in range(4):
        Image.effect_noise((200, 200), 60 + number).save(tmp_path / "shard" / f"{number}.png")
    shutil.make_archive(str(tmp_path / "0"), "tar", tmp_path / "shard")
    store.put("tars/0.tar", (tmp_path / "0.tar").read_bytes())
    store.requests.clear()
    flags = ["--dataset", "s3://bucket/tars/", "--segmenter", "none", "--direct_num_workers", 1]
    assert len(build(tmp_path / "out", *flags).rows) == 4
    # Once for what its columns are, once for its pictures.
    assert sum("GET /bucket/tars/0.tar" in line for line in store.requests) <= 4


def test_two_workers_ask_a_store_twenty_times_beside_its_pictures(store, tmp_path):
    write_scenes(tmp_path, 24, size_wh=(64, 48))
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        store.put(f"many/{file.relative_to(tmp_path)}", file.read_bytes())
    flags = [str(flag).replace("/scenes", "s3://bucket/many") for flag in scene_sources(Path("/scenes"))]
    store.requests.clear()
    assert status_of(*flags, "--output", "s3://bucket/asked", "--direct_num_workers", 2, "--validation_ratio", 0.3) == 0
    asked = [*store.requests]
    made = json.loads(store.objects("asked/")["manifest.json"])
    assert made["rows_by_split"]["train"] and made["rows_by_split"]["validation"]
    assert not [name for name in store.objects("asked/") if name.startswith(".")]
    pictures = ("GET /bucket/many/images/", "GET /bucket/many/panoptic/")
    others = [line for line in asked if not line.startswith(pictures)]
    drafts = Counter(line.partition(" ")[0] for line in others if "/drafts/" in line)
    assert drafts["GET"] == drafts["PUT"]  # each file once for both splits
    assert len(others) <= 20


def test_a_stopped_build_goes_on_from_a_store_and_its_files_of_drafts_are_joined(store, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(joins, "plan_joins", joined_twice)
    network = ["--segmenter_checkpoint", tiny_mask2former(tmp_path / "checkpoint"), "--segmenter_input_size", 64]
    flags = ["--images", "s3://bucket/in/images/", *network, "--device", "cpu", "--num_shards", 2]
    whole = build(tmp_path / "out", *flags)
    store.put("in/images/broken.jpg", b"no picture")
    stopped = [*flags, "--output", "s3://bucket/stopped"]
    assert status_of(*stopped, "--max_reject_ratio", 0) == 1
    assert "of finished pictures are kept in s3://bucket/stopped/.segmented" in capfd.readouterr().err
    assert [name for name in store.objects("stopped/") if name.endswith(".arrow")]
    storage.delete(["s3://bucket/in/images/broken.jpg"])
    store.requests.clear()
    assert status_of(*stopped, "--resume") == 0
    assert sum("PUT" in line and "/drafts/" in line for line in store.requests) > 2
    made = store.objects("stopped/")
    assert json.loads(made["manifest.json"])["seconds"]["segment"] == 0  # the network saw nothing
    assert [made[file.name] for file in whole.files] == [file.read_bytes() for file in whole.files]
    assert not [name for name in made if name.startswith(".")]


def published_twice(publication: Publication, *rest: Any) -> None:
    """As where a worker dies while it removes what is no longer needed, and the runner tries again."""
    publish(publication, *rest)
    with storage.open_write(f"{publication.work}/drafts/left.arrow") as file:
        file.write(b"some drafts")
    publish(publication, *rest)


def test_a_publication_that_is_tried_again_while_it_cleans_up_leaves_the_data_whole(store, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.graph.publish", published_twice)
    network = ["--segmenter_checkpoint", tiny_mask2former(tmp_path / "checkpoint"), "--segmenter_input_size", 64]
    store.put("in/images/broken.jpg", b"no picture")
    flags = ["--images", "s3://bucket/in/images/", *network, "--device", "cpu", "--output", "s3://bucket/twice"]
    assert status_of(*flags) == 0
    storage.delete(["s3://bucket/in/images/broken.jpg"])
    made = store.objects("twice/")
    assert (
        json.loads(made["manifest.json"])["rejects"] == {"not_an_image": 1} and b"broken.jpg" in made["rejects.jsonl"]
    )
    assert not [name for name in made if name.startswith(".")]


def test_a_job_that_is_launched_again_as_from_a_template_publishes_what_it_reads_then(store):
    store.put("daily/1.jpg", PICTURE)
    job = planned("--images", "s3://bucket/daily/", "--segmenter", "none", "--output", "s3://bucket/again").job
    for number in (1, 2):
        store.put(f"daily/{number}.jpg", PICTURE + bytes([number]))
        with beam.Pipeline(runner=FnApiRunner()) as pipeline:
            build_graph(pipeline, job)
        made = store.objects("again/")
        assert json.loads(made["manifest.json"])["rows"] == number
        assert not [name for name in made if name.startswith(".")]


def test_shards_get_their_names_several_at_once(scenes, tmp_path, monkeypatch):
    """S3 copies each in seconds."""
    together = threading.Barrier(2)

    def put_in_place(source: str, destination: str) -> None:
        together.wait(60)
        storage.put_in_place(source, destination)

    monkeypatch.setattr("pipelines.publish.put_in_place", put_in_place)
    flags = ["--num_shards", 4, "--coco_split", "train", "--llava_split", "train", "--images_split", "train"]
    assert len(build(tmp_path / "out", *sources(str(scenes)), *flags, "--direct_num_workers", 1).files) == 2


def test_what_a_killed_launcher_left_is_told_and_removed_when_asked(store, capsys):
    flags = [*sources("s3://bucket/in"), "--output", "s3://bucket/left"]
    store.put("left/.work-0123/drafts/some.arrow", b"some drafts")
    assert (
        main(flags) == 2 and "a stopped build left 0 bytes of finished pictures and 11 bytes" in capsys.readouterr().err
    )
    assert main([*flags, "--discard"]) == 0
    assert not [name for name in store.objects("left/") if name.startswith(".")]


@pytest.mark.parametrize(
    "flags",
    [
        ["--images", "s3://nowhere/*.jpg", "--segmenter_checkpoint", "scenes"],
        ["--coco_panoptic", "s3://nowhere/panoptic.json", "--coco_images", "s3://nowhere/images"],
    ],
)
def test_a_bucket_that_is_not_there_is_said_in_one_line(flags, store, tmp_path, capsys):
    assert main([*flags, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "s3://nowhere/" in line and f"error: {flags[0]}" in line


@pytest.mark.parametrize(
    ("last_request", "named"),
    [
        ("^$", "s3://bucket/dies"),
        pytest.param(r"GET /bucket\?.*dies", "s3://bucket/in/panoptic.json", marks=pytest.mark.slow),
        pytest.param("GET /bucket/in/panoptic.json", "s3://bucket/in/", marks=pytest.mark.slow),
        pytest.param("PUT /bucket/dies/.*arrow", "s3://bucket/dies/", marks=pytest.mark.slow),
        ("PUT /bucket/dies/.*parquet", "s3://bucket/dies/"),
        pytest.param("PUT /bucket/dies/README.md", "s3://bucket/dies/manifest.json", marks=pytest.mark.slow),
        pytest.param("PUT /bucket/dies/manifest.json", "s3://bucket/dies/", marks=pytest.mark.slow),
    ],
)
def test_a_store_that_dies_at_any_moment_is_one_line_and_leaves_nothing_whole(
    last_request, named, store, monkeypatch, capsys
):
    monkeypatch.setattr(object_store, "_MOST_RETRIES", 1)
    storage._file_system.cache_clear()
    storage.delete(["s3://bucket/dies/"])
    flags = [*sources("s3://bucket/in"), "--output", "s3://bucket/dies", "--num_shards", "2"]
    with store.dying_after(last_request):
        status = main([*flags, "--direct_num_workers", "1"])
    *_, line = capsys.readouterr().err.splitlines()
    assert status == 1 and line.startswith("build_crayon.py: error: ") and named in line and "(after 1 retries)" in line
    assert ("manifest.json" in store.objects("dies/")) == ("manifest" in last_request)
    assert main([*flags, "--overwrite", "--discard"]) == 0
    assert not [name for name in store.objects("dies/") if name.startswith(".")]


def test_what_a_store_refuses_is_said_in_one_line_whichever_process_it_happened_in(scenes, tmp_path):
    publication = planned(*scene_sources(scenes), "--output", tmp_path / "out").job.publication
    fault = StoreFault("s3://bucket/out/a.arrow: Access Denied")
    shown = [
        f"Traceback (most recent call last):\n  File ...\ncollavo.errors.StoreFault: {fault}\n\nDuring handling of ...",
        f"StoreFault: {fault} [while running 'WriteShards']",
    ]
    for error in (fault, *map(RuntimeError, shown)):
        assert str(launch._explained(error, publication, local=True)) == str(fault)
