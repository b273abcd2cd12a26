"""Builds that fail, are killed or get in each other's way: one line for the user, and no half data set."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from builds import PICTURE, CocoFolder, DataSet, build, scene_sources, start, status_of

from collavo import storage
from collavo.scenes import write_scenes
from pipelines import launch, local_workers
from pipelines.command import main


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    write_scenes(folder, 4, size_wh=(96, 72))
    return folder


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory) -> DataSet:
    """A data set that tests take copies of."""
    return build(tmp_path_factory.mktemp("finished") / "out", *scene_sources(scenes))


@pytest.fixture
def old(finished, tmp_path) -> DataSet:
    return DataSet(shutil.copytree(finished.folder, tmp_path / "out"))


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory) -> list[object]:
    """Flags for a source of ten images, of which three are no images."""
    coco = CocoFolder(tmp_path_factory.mktemp("spoilt") / "coco")
    for i in range(10):
        coco.add(f"{i}.jpg", b"no" if i < 3 else PICTURE + bytes([i]))
    return [*coco.flags(), "--segmenter", "annotations"]


WORK = ".out.unfinished/.work-*"


def fails(capfd, *arguments: object) -> str:
    """The one line that the command ends with; it must print nothing else to stderr, and blame a flag with status 2."""
    capfd.readouterr()
    status = main([*map(str, arguments)])
    shown = capfd.readouterr()
    assert "Traceback" not in shown.out + shown.err
    (line,) = shown.err.splitlines()
    assert line.startswith("build_crayon.py: error: ")
    assert status == (2 if line.startswith("build_crayon.py: error: --") else 1)
    return line


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_too_many_rejects_fail_the_job_and_leave_the_old_data_which_fewer_replace(old, spoilt, capfd):
    before = listing(old.folder)
    refused = [*spoilt, "--output", old.folder, "--overwrite", "--max_reject_ratio", 0.2]
    line = fails(capfd, *refused)
    assert "3 of 10 inputs were rejected (3 not_an_image)" in line and "--max_reject_ratio 0.2" in line
    after = listing(old.folder)
    rejects = [json.loads(reject) for reject in after.pop("failed-rejects.jsonl").splitlines()]
    assert [reject["reason"] for reject in rejects] == ["not_an_image"] * 3
    assert f"{old.folder / 'failed-rejects.jsonl'}; the first: {rejects[0]['detail']}" in line
    assert after == before

    allowed = ["--max_reject_ratio", 0.3, "--validation_ratio", 0]  # 3 of 10 is not more than 0.3
    data = build(old.folder, *spoilt, "--overwrite", *allowed)
    assert len(data.rows) == 7 and len(data.rejects) == 3
    assert sorted(listing(data.folder)) == [
        *("README.md", "manifest.json", "rejects.jsonl", "report.html", "train-00000-of-00001.parquet"),
    ]


def test_an_input_that_is_in_no_row_and_no_reject_ends_the_build(old, scenes, monkeypatch):
    before = listing(old.folder)
    monkeypatch.setattr("pipelines.image_steps.ImageTask.inputs", property(lambda task: (task.mentions[0].input,)))
    with pytest.raises(RuntimeError, match=r"inputs do not add up: read {.*'llava': 8.*}, accounted for {'coco': 4}"):
        main([*map(str, scene_sources(scenes)), "--output", str(old.folder), "--overwrite", "--direct_num_workers=1"])
    assert listing(old.folder) == before


def test_a_job_without_a_single_row_fails(tmp_path, capfd):
    coco = CocoFolder(tmp_path / "coco")
    coco.add("a.jpg", b"")
    coco.add("b.jpg", None)
    line = fails(capfd, *coco.flags(), "--segmenter", "annotations", "--output", tmp_path / "out")
    assert "no rows: all 2 inputs were rejected" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["failed-rejects.jsonl"]


def test_data_are_not_replaced_unasked_nor_together_with_another_file(old, spoilt, capfd):
    before = listing(old.folder)
    assert "--overwrite would replace it" in fails(capfd, *spoilt, "--output", old.folder)
    (old.folder / "notes.txt").write_text("mine")
    assert "holds notes.txt" in fails(capfd, *spoilt, "--output", old.folder, "--overwrite")
    (old.folder / "notes.txt").unlink()
    assert listing(old.folder) == before


CUT_COCO = ("--coco_panoptic", '{"images": [{"id": 1, "file_name": "a"}], "annota', "not JSON to its")
OBJECT_FOR_LLAVA = ("--llava_json", '{"a": 1}', "no entries; expected a JSON list")


@pytest.mark.parametrize(
    ("flag", "content", "expected", "mode"),
    [(*CUT_COCO, "in_memory"), (*CUT_COCO, "multi_processing"), (*OBJECT_FOR_LLAVA, "multi_threading")],
)
def test_a_source_that_cannot_be_read_ends_the_job_in_one_line(scenes, tmp_path, capfd, flag, content, expected, mode):
    broken = tmp_path / "broken.json"
    broken.write_text(content)
    good = scene_sources(scenes)
    coco = ["--coco_panoptic", broken, *good[2:4], "--coco_masks", scenes / "panoptic"]
    sources = [*coco, *good[8:]] if flag == "--coco_panoptic" else [*good[:4], flag, broken, *good[6:]]
    workers = ["--direct_num_workers", 1 if mode == "in_memory" else 2]
    line = fails(capfd, *sources, "--output", tmp_path / "out", "--direct_running_mode", mode, *workers)
    assert f"error: {flag}" in line and f" {broken}: {expected}" in line
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_had_is_a_wrong_flag_and_shows_no_bars(tmp_path, capfd):
    (tmp_path / "a.png").write_bytes(PICTURE)
    model = ["--segmenter", "transformers", "--segmenter_checkpoint", tmp_path / "nowhere"]
    arguments = ["--images", tmp_path / "*.png", *model, "--device", "cpu", "--output", tmp_path / "out"]
    assert main([*map(str, arguments)]) == 2
    shown = capfd.readouterr()
    assert f"{tmp_path / 'nowhere'}: there is no such folder" in shown.err
    assert "Segmenting" not in shown.out


def test_other_parquet_is_not_taken_for_crayon_rows(tmp_path, capfd):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    line = fails(capfd, "--from_crayon", tmp_path / "x.parquet", "--output", tmp_path / "out")
    assert f"--from_crayon: {tmp_path / 'x.parquet'}: " in line


def wait_until(reached, process) -> None:
    deadline = time.monotonic() + 240
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def busy(folder: Path, step: str) -> bool:
    """Whether a build in a folder has come some way with a step."""
    return any(file.stat().st_size > 20 for file in folder.glob(f"{WORK}/progress/{step}/*"))


@pytest.fixture(scope="module")
def long_build(tmp_path_factory) -> list[object]:
    """Flags for a job that is busy for a second or two: one drawn scene in many files, each with other last bytes."""
    folder = tmp_path_factory.mktemp("many") / "scenes"
    write_scenes(folder, 1, size_wh=(320, 240))
    content = json.loads((folder / "panoptic.json").read_text())
    (image,), (annotation,) = content["images"], content["annotations"]
    content["images"] = [{**image, "id": i, "file_name": f"{i}.jpg"} for i in range(200)]
    content["annotations"] = [{**annotation, "image_id": i} for i in range(200)]
    (folder / "panoptic.json").write_text(json.dumps(content))
    for i in range(200):
        (folder / "images" / f"{i}.jpg").write_bytes((folder / "images" / image["file_name"]).read_bytes() + b"%d" % i)
    return ["--coco_panoptic", folder / "panoptic.json", "--coco_images", folder / "images"]


def test_a_killed_replacement_leaves_the_old_data_and_nothing_else_that_looks_whole(old, long_build, spoilt, tmp_path):
    before = listing(old.folder)
    process = start(*long_build, "--output", old.folder, "--overwrite", "--num_shards", 2)
    wait_until(lambda: busy(tmp_path, "written"), process)
    mapped = {Path(mapping.path).name for mapping in psutil.Process(process.pid).memory_maps()}
    assert not any(name.startswith("libtorch") for name in mapped)  # annotations need none
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert listing(old.folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.unfinished", "out"]

    data = build(old.folder, *spoilt, "--overwrite")  # clears it away
    assert len(data.rows) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list(data.folder.glob(".*"))


@pytest.mark.parametrize(
    "mode, moment, sent",
    [
        ("in_memory", "busy", signal.SIGTERM),
        pytest.param("in_memory", "busy", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("multi_processing", "busy", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("multi_processing", "busy", signal.SIGTERM, marks=pytest.mark.slow),
        ("multi_processing", "workers are starting", signal.SIGINT),
    ],
)
def test_an_interrupted_run_says_so_in_one_line_and_cleans_up(long_build, tmp_path, mode, moment, sent):
    output = tmp_path / "out"
    process = start(*long_build, "--output", output, "--direct_running_mode", mode)
    if moment == "busy":
        wait_until(lambda: busy(tmp_path, "segmented"), process)
    else:
        wait_until(lambda: psutil.Process(process.pid).children(recursive=True), process)
    os.killpg(process.pid, sent)  # as a terminal or a batch system does
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 130
    assert stderr.splitlines() == ["build_crayon.py: interrupted"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_worker_that_died_is_said_in_one_line_with_what_to_do(long_build, tmp_path):
    output = tmp_path / "out"
    process = start(*long_build, "--output", output, "--direct_num_workers", 2)
    wait_until(lambda: busy(tmp_path, "segmented"), process)
    (nursery,) = psutil.Process(process.pid).children()
    nursery.children()[0].kill()
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 1
    (line,) = stderr.splitlines()
    assert "a worker process died" in line and "--direct_num_workers" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("imports", "works", "said"),
    [
        (
            "import nothing_here",
            "pass",
            "; the last line of its log: ModuleNotFoundError: No module named 'nothing_here",
        ),
        ("pass", "os.kill(os.getpid(), 9)", ", "),
    ],
    ids=["cannot start", "are killed"],
)
def test_workers_that_die_end_the_job_with_the_reason_or_with_what_to_do(
    long_build, tmp_path, capfd, monkeypatch, imports, works, said
):
    script = tmp_path / "workers.py"
    text = Path(local_workers.__file__).read_text().replace("    _import_all(with_torch)", f"    {imports}")
    script.write_text(text.replace("from apache_beam.runners.worker.sdk_worker_main import main", works))
    monkeypatch.setattr(local_workers, "__file__", str(script))
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.1)
    line = fails(capfd, *long_build, "--output", tmp_path / "out", "--direct_num_workers", 2)
    assert f"a worker process died{said}" in line and ("--direct_num_workers" in line) == (said == ", ")


def test_no_worker_outlives_a_launcher_that_was_killed(long_build, tmp_path):
    process = start(*long_build, "--output", tmp_path / "out", "--direct_num_workers", 2)
    wait_until(lambda: busy(tmp_path, "segmented"), process)
    others = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert len(others) == 3
    assert not psutil.wait_procs(others, timeout=5)[1]


@pytest.mark.slow
def test_a_full_disk_at_any_file_is_said_in_one_line_and_leaves_the_old_data_alone(tmp_path, capfd, monkeypatch):
    """The kernel's own full device stands in for each file in turn."""
    coco = CocoFolder(tmp_path / "coco")
    coco.add("a.jpg", PICTURE)
    coco.add("b.jpg", b"no picture")
    flags = [*coco.flags(), "--segmenter", "annotations", "--output", tmp_path / "out", "--overwrite"]
    assert main([*map(str, flags)]) == 0
    before = listing(tmp_path / "out")
    opened: list[str] = []
    fails_at = 0

    def open_(path: str, mode: str) -> object:
        if mode == "wb":
            opened.append(Path(path).name)
            path = "/dev/full" if len(opened) - 1 == fails_at else path
        return open(path, mode)

    monkeypatch.setattr(storage, "open", open_, raising=False)
    while main([*map(str, flags)]):
        line = capfd.readouterr().err.splitlines()[-1]
        assert line == f"build_crayon.py: error: --output {tmp_path / 'out'}: No space left on device", opened[fails_at]
        assert listing(tmp_path / "out") == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["coco", "out"]
        fails_at += 1
        opened.clear()
    assert {"README.md", "manifest.json", "rejects.jsonl", "report.html"} <= set(opened) and fails_at > 6


def test_a_full_disk_is_said_in_one_line_and_leaves_the_old_data_alone(old, scenes, tmp_path, capfd):
    """Stood in for by a limit on the size of files."""
    before = listing(old.folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        assert status_of(*scene_sources(scenes), "--output", old.folder, "--overwrite") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capfd.readouterr().err == f"build_crayon.py: error: --output {old.folder}: File too large\n"
    assert listing(old.folder) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_network_that_cannot_be_had_is_refused_before_anything_else_where_one_is_surely_asked(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(PICTURE)
    pictures = ["--images", tmp_path / "pictures", "--output", tmp_path / "out"]
    assert status_of(*pictures) == 2  # the tests are offline
    assert "error: --segmenter_checkpoint: facebook/mask2former" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    # All of these are annotated, so that no network is asked.
    coco = CocoFolder(tmp_path / "coco")
    coco.add("a.jpg", PICTURE)
    annotated = ["--images", tmp_path / "coco" / "images", *coco.flags(), "--output", tmp_path / "out"]
    assert status_of(*annotated) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_before_scenes_are_drawn(tmp_path, capfd):
    line = fails(capfd, "--device", "cuda", "--output", tmp_path / "out")
    assert line.startswith("build_crayon.py: error: --device: cuda: torch")
    assert not [*tmp_path.iterdir()]
