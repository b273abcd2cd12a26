"""The build as clusters run it: on Prism and in Beam's local job service, by workers that share no disk with it or with
one another, from and to an S3 and a Google Cloud store. Its rows are those of a run in one process."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import boto3
import pytest
from builds import REPOSITORY, build
from clusters import HOME, free_port, hosts, named, program, running
from conftest import needs_scenes_model

from collavo.scenes import write_scenes
from collavo.storage import MANIFEST, list_files, open_read, open_write

pytestmark = [pytest.mark.cluster, needs_scenes_model]

BUCKET = "crayon"
KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "something", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Annotated scenes with dialogues, and pictures that a network has to segment."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder / "annotated", 24, (96, 72))
    write_scenes(folder / "others", 4, (96, 72), start=100)
    return folder


def sources(folder: str | Path, by_network: bool) -> list[str]:
    annotated = f"{folder}/annotated"
    named = ["--coco_panoptic", f"{annotated}/panoptic.json", "--coco_images", f"{annotated}/images"]
    named += ["--llava_json", f"{annotated}/dialogues.json", "--image_root", annotated, "--num_shards", "2"]
    others = ["--images", f"{folder}/others/images/", "--segmenter_checkpoint", "scenes", "--device", "cpu"]
    return [*named, *(others if by_network else ("--segmenter", "annotations"))]


@contextmanager
def s3(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A MinIO server: its bucket and what leads the SDKs there."""
    port = free_port()
    environment = {**os.environ, "MINIO_ROOT_USER": "someone", "MINIO_ROOT_PASSWORD": "something"}
    command = [program("minio"), "server", str(folder / "minio"), "--address", f":{port}"]
    with running(command, folder / "minio.log", ("localhost", port), env=environment):
        endpoint = f"http://{HOME}:{port}"
        boto3.client("s3", endpoint_url=f"http://localhost:{port}", **_boto_keys()).create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}", {"AWS_ENDPOINT_URL": endpoint, **KEYS}


def _boto_keys() -> dict[str, str]:
    return dict(zip(("aws_access_key_id", "aws_secret_access_key", "region_name"), KEYS.values(), strict=True))


@contextmanager
def gcs(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A server that speaks Google Cloud Storage's protocol: its bucket and what leads the SDK there."""
    port = free_port()
    endpoint = f"http://{HOME}:{port}"
    command = [program("fake-gcs-server"), "-scheme", "http", "-port", str(port), "-backend", "memory"]
    command += ["-public-host", f"{HOME}:{port}", "-external-url", endpoint]
    with running(command, folder / "gcs.log", ("localhost", port)):
        url, header = f"http://localhost:{port}/storage/v1/b?project=any", {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(url, f'{{"name": "{BUCKET}"}}'.encode(), header)).close()
        yield f"gs://{BUCKET}", {"CLOUD_STORAGE_EMULATOR_ENDPOINT": endpoint}


@contextmanager
def prism(folder: Path, environment: dict[str, str]) -> Iterator[tuple[list[str], list[str]]]:
    """Prism and two hosts: flags that send a job there, and the words before the command."""
    port = free_port()
    command = [program("prism"), "-job_port", str(port), "-serve_http=false"]
    with (
        running(command, folder / "prism.log", ("localhost", port)),
        hosts(2, folder, [port], environment) as pool,
    ):
        yield ["--job_endpoint", f"localhost:{port}", "--environment_config", pool], []


@contextmanager
def job_service(folder: Path, environment: dict[str, str]) -> Iterator[tuple[list[str], list[str]]]:
    """Beam's own job service in the launcher, which has a worker on each of two hosts."""
    with hosts(2, folder, [], environment) as pool:
        flags = ["--job_endpoint", "embed", "--direct_num_workers", "2", "--environment_config", pool]
        yield flags, named(folder)


@pytest.mark.parametrize(
    "runner, store, by_network",
    [(prism, s3, True), (prism, gcs, False), (job_service, gcs, True), (job_service, s3, False)],
    ids=["prism-s3-network", "prism-gs-annotations", "workers-gs-network", "workers-s3-annotations"],
)
def test_workers_without_a_common_disk_write_the_rows_of_one_process(
    runner, store, by_network, scenes, tmp_path, monkeypatch
):
    expected = build(tmp_path / "here", *sources(scenes, by_network)).hashes
    with ExitStack() as stack:
        bucket, environment = stack.enter_context(store(tmp_path))
        flags, before = stack.enter_context(runner(tmp_path, environment))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for file in filter(Path.is_file, scenes.rglob("*")):
            with open_write(f"{bucket}/in/{file.relative_to(scenes)}") as copy:
                copy.write(file.read_bytes())
        flags += ["--runner", "PortableRunner", "--environment_type", "EXTERNAL", "--output", f"{bucket}/out"]
        command = [*before, sys.executable, "pipelines/build_crayon.py", *sources(f"{bucket}/in", by_network), *flags]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        with open_read(f"{bucket}/out/{MANIFEST}") as manifest:
            files = json.load(manifest)["files"]
        assert [(file["name"], file["sha256"]) for file in files] == expected
        left = [uri for uri in list_files(f"{bucket}/out/") if "/." in uri]
        assert not left
