"""The build with nothing on a local disk: sources and output in an object store, reached through Beam."""

import io
from pathlib import Path
from typing import ClassVar

import pytest
from apache_beam.io.filesystem import BeamIOError, FileMetadata, FileSystem
from builds import build, scene_sources

from collavo.scenes import write_scenes
from pipelines.command import main


class Bucket(FileSystem):
    """Objects by name, in this process. As in the stores of clouds, folders do not exist, and an object appears when
    its writer closes it."""

    objects: ClassVar[dict[str, bytes]] = {}

    @classmethod
    def scheme(cls) -> str:
        return "bucket"

    def join(self, basepath, *paths):
        return "/".join([basepath.rstrip("/"), *(path.strip("/") for path in paths)])

    def split(self, path):
        head, _, tail = path.rpartition("/")
        return head, tail

    def has_dirs(self):
        return False

    def mkdirs(self, path):
        pass

    def _list(self, prefix):
        for path, data in list(self.objects.items()):
            if path.startswith(prefix):
                yield FileMetadata(path, len(data), 0.0)

    def create(self, path, mime_type=None, compression_type=None):
        return Upload(self.objects, path)

    def open(self, path, mime_type=None, compression_type=None):
        if path not in self.objects:
            raise BeamIOError("no such object", {path: None})
        return io.BytesIO(self.objects[path])

    def copy(self, sources, destinations):
        for source, destination in zip(sources, destinations, strict=True):
            self.objects[destination] = self.objects[source]

    def rename(self, sources, destinations):
        self.copy(sources, destinations)
        self.delete(sources)

    def exists(self, path):
        return path in self.objects

    def size(self, path):
        return len(self.objects[path])

    def last_updated(self, path):
        return 0.0

    def checksum(self, path):
        return str(hash(self.objects[path]))

    def metadata(self, path):
        return FileMetadata(path, self.size(path), 0.0)

    def delete(self, paths):
        for path in paths:
            for found in self.match([path])[0].metadata_list:
                del self.objects[found.path]


class Upload(io.BytesIO):
    def __init__(self, objects: dict[str, bytes], path: str) -> None:
        super().__init__()
        self._objects, self._path = objects, path

    def close(self) -> None:
        if not self.closed:
            self._objects[self._path] = self.getvalue()
        super().close()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    write_scenes(folder, 8, size_wh=(96, 72))
    (folder / "images" / "scene-000005.jpg").unlink()
    return folder


@pytest.fixture
def bucket(scenes):
    Bucket.objects.clear()
    Bucket.objects.update(
        (f"bucket://in/{file.relative_to(scenes)}", file.read_bytes()) for file in scenes.rglob("*") if file.is_file()
    )
    yield Bucket.objects
    Bucket.objects.clear()


def remote_sources() -> list[str]:
    return [str(value).replace("/scenes", "bucket://in") for value in scene_sources(Path("/scenes"))]


def outputs(bucket: dict[str, bytes]) -> dict[str, bytes]:
    return {path.removeprefix("bucket://out/"): data for path, data in bucket.items() if "://out/" in path}


def test_an_object_store_gets_the_files_that_a_disk_gets(scenes, bucket, tmp_path):
    local = build(tmp_path / "out", *scene_sources(scenes), "--num_shards", 2)
    assert main([*remote_sources(), "--output", "bucket://out", "--num_shards", "2"]) == 0
    made = outputs(bucket)
    assert sorted(made) == sorted(path.name for path in local.folder.iterdir())
    for file in local.files:
        assert made[file.name] == file.read_bytes()
    assert len(made["rejects.jsonl"].splitlines()) == len(local.rejects) > 0
    assert (
        made["rejects.jsonl"].replace(b"bucket://in", str(scenes).encode())
        == (local.folder / "rejects.jsonl").read_bytes()
    )


def test_a_data_set_in_an_object_store_is_replaced_only_when_asked(bucket, capsys):
    flags = [*remote_sources(), "--output", "bucket://out"]
    assert main([*flags, "--num_shards", "4"]) == 0
    before = outputs(bucket)
    with pytest.raises(SystemExit) as refusal:
        main(flags)
    assert refusal.value.code == 2 and "--output bucket://out holds a data set already" in capsys.readouterr().err
    assert outputs(bucket) == before
    assert main([*flags, "--num_shards", "1", "--overwrite"]) == 0
    assert sorted(outputs(bucket)) == [
        *("crayon-00000-of-00001.parquet", "manifest.json", "rejects.jsonl", "report.html"),
    ]


def test_finished_rows_are_read_from_an_object_store(bucket, tmp_path):
    assert main([*remote_sources(), "--output", "bucket://out", "--num_shards", "1"]) == 0
    data = build(tmp_path / "out", "--from_crayon", "bucket://out/*.parquet")
    assert [file.read_bytes() for file in data.files] == [outputs(bucket)["crayon-00000-of-00001.parquet"]]


def test_images_are_listed_in_an_object_store(bucket, tmp_path, capsys):
    flags = ["--coco_panoptic", "bucket://in/panoptic.json", "--coco_images", "bucket://in/images"]
    data = build(tmp_path / "out", *flags, "--images", "bucket://in/images/", "--segmenter", "annotations")
    assert {row.sources for row in data.rows.values()} == {("coco", "folder")}
    assert data.manifest["inputs"] == {"coco": 8, "folder": 7}
    assert [reject["reason"] for reject in data.rejects] == ["missing_file"]
