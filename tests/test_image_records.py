"""Data sets that hold their images: Parquet and tar."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collavo.errors import Rejected, UserError
from collavo.sources.records import ImageRecord, ignored_columns, stream_records

TURNS = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "A person."}]


def parquet(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    return tmp_path / "data.parquet"


def tar(members: dict[str, bytes], mode: str = "w") -> io.BytesIO:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    file.seek(0)
    return file


@pytest.mark.parametrize("image", [b"jpeg", {"bytes": b"jpeg", "path": "a.jpg"}, [{"bytes": b"jpeg", "path": None}]])
def test_a_parquet_column_of_images_in_any_shape(tmp_path: Path, image: Any) -> None:
    file = parquet(tmp_path, [{"image": image, "conversations": TURNS, "caption": "x"}, {"image": image}])
    with file.open("rb") as stream:
        first, second = stream_records(stream, "hub/data.parquet")
        assert isinstance(first, ImageRecord) and first.dialogue
        assert (first.path, first.data) == ("data.parquet/000000", b"jpeg")
        assert first.dialogue.turns == (("human", "Who?"), ("gpt", "A person."))
        assert second == ImageRecord("data.parquet/000001", b"jpeg", None)
        assert ignored_columns(pq.read_schema(stream).names) == ["caption"]


def test_rows_that_cannot_be_used_are_rejects(tmp_path: Path) -> None:
    rows = [{"image": [b"a", b"b"]}, {"image": []}, {"image": None}, {"image": [b"jpeg"]}]
    with parquet(tmp_path, rows).open("rb") as stream:
        found = list(stream_records(stream, "data.parquet"))
    assert [f.reason for f in found if isinstance(f, Rejected)] == ["several_images", "several_images", "missing_file"]


def test_a_column_of_another_name(tmp_path: Path) -> None:
    with parquet(tmp_path, [{"photo": b"jpeg"}]).open("rb") as stream:
        assert [r.data for r in stream_records(stream, "d.parquet", "photo") if isinstance(r, ImageRecord)] == [b"jpeg"]
        with pytest.raises(UserError, match="has no column 'image'; its columns are photo"):
            list(stream_records(stream, "d.parquet"))


@pytest.mark.parametrize("mode, name", [("w", "shard-0.tar"), ("w:gz", "shard-0.tar.gz")])
def test_a_tar_shard_is_read_as_webdataset_reads_it(mode: str, name: str) -> None:
    members = {
        "train/0001.jpg": b"one",
        "train/0001.json": json.dumps({"conversations": TURNS, "width": 3}).encode(),
        "train/0002.cls": b"7",
        "train/0002.PNG": b"two",
        "train/0003.txt": b"a caption",
    }
    first, second, third = stream_records(tar(members, mode), f"s3://bucket/{name}")
    assert isinstance(first, ImageRecord) and first.dialogue and first.data == b"one"
    assert first.path == f"{name}/train/0001.jpg"
    assert isinstance(second, ImageRecord) and (second.data, second.dialogue) == (b"two", None)
    assert isinstance(third, Rejected) and third.reason == "not_an_image"


@pytest.mark.parametrize("name", ["x.parquet", "x.tar", "x.tar.gz"])
def test_damage_is_one_line_that_names_the_file(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: cannot be read") as refused:
        list(stream_records(io.BytesIO(b"nothing of the kind" * 60), name))
    assert "\n" not in str(refused.value)
