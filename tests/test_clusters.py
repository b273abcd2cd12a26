"""The build as clusters run it: on Prism and in Beam's local job service, by workers that share no disk with it or with
one another, from and to stores of S3, Google Cloud and Azure. Its rows are those of one process, whoever is killed."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from apache_beam.portability.api import beam_runner_api_pb2
from builds import REPOSITORY, build
from clusters import S3, Azure, Gcs, JobService, Prism, Store, free_port, listens, program
from conftest import needs_scenes_model

from collavo import storage
from collavo.dataset import find_files
from collavo.errors import UserError
from collavo.scenes import write_scenes
from collavo.storage import MANIFEST, exists, list_files, open_read, open_write
from pipelines.command import main
from pipelines.job import SEGMENTED
from pipelines.model_segmentation import BatchSegmenter
from pipelines.spill import spilled_pictures

_OTHERS = 6
"""Pictures that a network has to segment."""

pytestmark = [pytest.mark.cluster, needs_scenes_model]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Annotated scenes with dialogues, and pictures that a network has to segment."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder / "annotated", 24, (96, 72))
    write_scenes(folder / "others", _OTHERS, (96, 72), start=100)
    return folder


def sources(folder: str | Path, by_network: bool) -> list[str]:
    annotated = f"{folder}/annotated"
    named = ["--coco_panoptic", f"{annotated}/panoptic.json", "--coco_images", f"{annotated}/images"]
    named += ["--llava_json", f"{annotated}/dialogues.json", "--image_root", annotated, "--num_shards", "2"]
    others = ["--images", f"{folder}/others/images/", "--segmenter_checkpoint", "scenes", "--device", "cpu"]
    return [*named, *(others if by_network else ("--segmenter", "annotations"))]


def put(scenes: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lead this process to a store, and put all scenes there."""
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    storage._file_system.cache_clear()
    for file in filter(Path.is_file, scenes.rglob("*")):
        with open_write(f"{store.bucket}/in/{file.relative_to(scenes)}") as copy:
            copy.write(file.read_bytes())


def launched(runner: Prism | JobService, *words: str) -> "subprocess.Popen[str]":
    """The command, whose job goes to a runner."""
    flags = ["--runner", "PortableRunner", "--environment_type", "EXTERNAL", *runner.flags]
    command = [*runner.before, sys.executable, "pipelines/build_crayon.py", *words, *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True)


def hashes(output: str) -> list[tuple[str, str]]:
    with open_read(f"{output}/{MANIFEST}") as manifest:
        return [(file["name"], file["sha256"]) for file in json.load(manifest)["files"]]


@pytest.mark.parametrize(
    "runner_type, store_type, by_network",
    [(Prism, S3, True), (Prism, Gcs, False), (JobService, Gcs, True), (JobService, S3, False), (Prism, Azure, True)],
    ids=[
        "prism-s3-network",
        "prism-gs-annotations",
        "workers-gs-network",
        "workers-s3-annotations",
        "prism-azure-network",
    ],
)
def test_workers_without_a_common_disk_write_the_rows_of_one_process(
    runner_type, store_type, by_network, scenes, tmp_path, monkeypatch
):
    expected = build(tmp_path / "here", *sources(scenes, by_network)).hashes
    with store_type(tmp_path) as store, runner_type(tmp_path, store.environment) as runner:
        put(scenes, store, monkeypatch)
        output = f"{store.bucket}/out"
        launcher = launched(runner, *sources(f"{store.bucket}/in", by_network), "--output", output)
        _, errors = launcher.communicate(timeout=600)
        assert launcher.returncode == 0, errors[-3000:]
        assert hashes(output) == expected
        assert not [uri for uri in list_files(f"{output}/") if "/." in uri]


class Kill(NamedTuple):
    """Whom to kill, once the store holds an object of a name."""

    victim: str
    moment: str


KILLS = [
    Kill(victim, moment)
    for victim in ("worker", "runner", "store", "launcher", "line")
    for moment in (r"made_by", r"\.segmented/.*\.arrow", r"/shards/.*\.parquet")
]


@pytest.mark.parametrize("victim, moment", KILLS, ids=[f"{kill.victim}-{kill.moment[-5:]}" for kill in KILLS])
def test_what_is_killed_costs_no_row_and_leaves_nothing_that_looks_whole(
    victim: str,
    moment: str,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    expected = build(tmp_path / "here", *sources(scenes, by_network=True)).hashes
    with Gcs(tmp_path) as store, Prism(tmp_path, store.environment) as runner:
        put(scenes, store, monkeypatch)
        output = f"{store.bucket}/out"
        job = [*sources(f"{store.bucket}/in", by_network=True), "--output", output]
        launcher = launched(runner, *job)
        while not any(re.search(moment, uri) for uri in list_files(f"{output}/")):
            assert launcher.poll() is None
            time.sleep(0.05)
        if moment == "made_by":
            runner.workers()  # the runner has got the job
        ends = {"worker": runner.kill_worker, "runner": runner.kill, "store": store.kill, "launcher": launcher.kill}
        {**ends, "line": runner.kill_line}[victim]()
        _, errors = launcher.communicate(timeout=600)
        if victim == "line":
            assert launcher.returncode == 1 and f"is done once {output}/{MANIFEST} is there; its log: " in errors
        if victim == "store":
            store.start()
        alone = victim in ("launcher", "line")  # without which the job goes on
        deadline = time.monotonic() + (300 if alone else 0)
        while not (done := exists(f"{output}/{MANIFEST}")) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert done or not alone
        if not done:
            assert "Traceback" not in errors and launcher.returncode == 1
            record_property("said", errors)
            (log,) = re.findall(r"error: --runner PortableRunner: .*; its log: (\S+)", errors)
            assert Path(log).read_text()
            with pytest.raises(UserError):
                find_files([output])
            spilled_pictures.cache_clear()
            kept = len(spilled_pictures(f"{output}/{SEGMENTED}", ""))
            assert ("of finished pictures are kept" in errors) == bool(kept) or victim == "store"
            seen = []
            segment_each = BatchSegmenter.segment_each
            monkeypatch.setattr(
                BatchSegmenter, "segment_each", lambda self, images: seen.extend(images) or segment_each(self, images)
            )
            assert main([*job, "--resume" if kept else "--discard"]) == 0
            assert len(seen) <= _OTHERS - kept
            record_property("kept, segmented again", (kept, len(seen)))
        assert hashes(output) == expected
        while left := [uri for uri in list_files(f"{output}/") if "/." in uri]:  # which goes last
            assert time.monotonic() < deadline, left
            time.sleep(0.5)


@pytest.mark.parametrize("script, server", [("prism.sh", "prism"), ("s3.sh", "minio"), ("gcs.sh", "fake-gcs-server")])
def test_an_example_shows_rows_and_stops_what_it_started(script: str, server: str, tmp_path: Path) -> None:
    ports = {name: str(free_port()) for name in ("PORT", "JOB_PORT", "POOL_PORT")}
    environment = {**os.environ, **ports, "OUT": str(tmp_path / "out"), "GOBIN": str(Path(program(server)).parent)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (tmp_path / "out.txt").open("w+") as said:
        command = ["bash", f"examples/{script}"]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=said, stderr=said, timeout=600)
    text = (tmp_path / "out.txt").read_text()
    assert done.returncode == 0, text[-3000:]
    assert text.count(" segments, ") == 5
    assert not any(listens(("localhost", int(port))) for port in ports.values())


def test_the_template_for_dataflow_is_what_its_interface_takes(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template is read back by Google's own client, strictly: all fields are known to it, and of the right type."""
    dataflow = pytest.importorskip("google.cloud.dataflow_v1beta3", reason="needs apache-beam[gcp]")
    image, accelerator = "registry/collavo:1", "type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver"
    with Gcs(tmp_path, "localhost") as store:
        put(scenes, store, monkeypatch)
        bucket, output = store.bucket, f"{store.bucket}/out"
        words = [
            *("--runner", "DataflowRunner", "--project", "some-project", "--region", "europe-west4"),
            *("--job_name", "crayon", "--temp_location", f"{bucket}/temp", "--staging_location", f"{bucket}/staging"),
            *("--template_location", f"{bucket}/template", "--max_num_workers", "20", "--disk_size_gb", "100"),
            *("--sdk_container_image", image, "--sdk_location", "container", "--no_use_public_ips"),
            *("--experiments", "no_use_multiple_sdk_containers", "--accelerator", accelerator, "--output", output),
        ]
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.url)  # of Beam's own client
        assert main([*sources(f"{bucket}/in", by_network=True)[:-1], "cuda", *words]) == 0
        with open_read(f"{bucket}/template") as file:
            job = dataflow.Job.from_json(file.read(), ignore_unknown_fields=False)
        (pool,) = job.environment.worker_pools
        assert (pool.autoscaling_settings.max_num_workers, pool.disk_size_gb) == (20, 100)
        assert {harness.container_image for harness in pool.sdk_harness_container_images} == {image}
        (graph,) = [uri for uri in list_files(f"{bucket}/staging/") if uri.endswith("pipeline.pb")]
        with open_read(graph) as file:
            environments = beam_runner_api_pb2.Pipeline.FromString(file.read()).components.environments
        hints = [dict(environment.resource_hints) for environment in environments.values()]
        assert sorted(hints, key=len) == [{}, {"beam:resources:accelerator:v1": accelerator.encode()}]
        assert not exists(f"{output}/{MANIFEST}")
