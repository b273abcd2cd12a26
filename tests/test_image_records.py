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
from collavo.sources import records
from collavo.sources.records import ImageRecord, ignored_columns, parquet_parts, stream_records

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
        assert ignored_columns(stream, "data.parquet") == ["caption"]


def test_the_row_groups_of_a_file_are_read_apart_as_they_are_together(tmp_path: Path, monkeypatch) -> None:
    pq.write_table(pa.table({"image": [b"a", b"b", b"c", b"d", b"e"]}), tmp_path / "d.parquet", row_group_size=2)
    with (tmp_path / "d.parquet").open("rb") as stream:
        assert list(parquet_parts(stream, "d.parquet")) == [(0, 1, 2)]  # small ones together
        monkeypatch.setattr(records, "_BYTES_PER_PART", 1)
        parts = list(parquet_parts(stream, "d.parquet"))
        apart = [record for groups in parts for record in stream_records(stream, "d.parquet", None, groups)]
        assert len(parts) == 3 and apart == list(stream_records(stream, "d.parquet"))
    with pytest.raises(UserError, match=r"^x\.parquet: cannot be read"):
        list(parquet_parts(io.BytesIO(b"nothing of the kind"), "x.parquet"))


def test_rows_that_cannot_be_used_are_rejects(tmp_path: Path) -> None:
    rows = [{"image": [b"a", b"b"]}, {"image": []}, {"image": None}, {"image": [b""]}, {"image": [b"jpeg"]}]
    with parquet(tmp_path, rows).open("rb") as stream:
        found = list(stream_records(stream, "data.parquet"))
    assert [f.reason for f in found if isinstance(f, Rejected)] == ["several_images", *["missing_file"] * 3]


def test_a_dialogue_beside_an_empty_picture_is_not_one_about_none(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": b"", "path": ""}, "conversations": TURNS}]
    with parquet(tmp_path, rows).open("rb") as stream:
        (found,) = stream_records(stream, "data.parquet")
    assert isinstance(found, Rejected) and found.reason == "missing_file"


@pytest.mark.parametrize(
    "turns",
    [
        json.dumps(TURNS),
        {"from": ["human", "gpt"], "value": ["Who?", "A person."]},
        json.dumps({"role": ["user", "assistant"], "content": ["Who?", "A person."]}),
    ],
)
def test_turns_as_json_text_or_as_a_struct_of_lists(tmp_path: Path, turns: Any) -> None:
    with parquet(tmp_path, [{"image": b"jpeg", "messages": turns}]).open("rb") as stream:
        (found,) = stream_records(stream, "data.parquet")
    assert isinstance(found, ImageRecord) and found.dialogue
    assert found.dialogue.turns == (("human", "Who?"), ("gpt", "A person."))


@pytest.mark.parametrize("turns", ["half", {"from": [], "value": []}, {"from": ["human", "gpt"], "value": ["Who?"]}])
def test_turns_that_are_no_dialogue_are_rejected(tmp_path: Path, turns: Any) -> None:
    with parquet(tmp_path, [{"image": b"jpeg", "messages": turns}]).open("rb") as stream:
        (found,) = stream_records(stream, "data.parquet")
    assert isinstance(found, Rejected) and found.reason == "malformed_entry"


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array([b"a"]), pa.array([b"b"])], ["image"] * 2), tmp_path / "data.parquet")
    with (tmp_path / "data.parquet").open("rb") as stream, pytest.raises(UserError, match="several columns 'image'"):
        list(stream_records(stream, "data.parquet"))


@pytest.mark.parametrize("type_", [pa.dictionary(pa.int32(), pa.binary()), pa.binary_view(), pa.large_binary()])
def test_a_column_of_images_is_found_however_its_bytes_are_stored(tmp_path: Path, type_: pa.DataType) -> None:
    column = pa.array([b"jpeg"]).cast(type_) if type_ != pa.binary_view() else pa.array([b"jpeg"], type_)
    pq.write_table(pa.table({"picture": column}), tmp_path / "data.parquet")
    with (tmp_path / "data.parquet").open("rb") as stream:
        assert [f.data for f in stream_records(stream, "data.parquet") if isinstance(f, ImageRecord)] == [b"jpeg"]


@pytest.mark.parametrize("image", [None, {"bytes": None, "path": None}])
def test_a_row_of_text_alone_is_a_dialogue_about_no_image(tmp_path: Path, image: Any) -> None:
    there = {"bytes": b"jpeg", "path": None} if image else b"jpeg"
    rows = [{"image": there, "conversations": TURNS}, {"image": image, "conversations": TURNS}]
    with parquet(tmp_path, rows).open("rb") as stream:
        _, found = stream_records(stream, "data.parquet")
    assert isinstance(found, ImageRecord) and found.data is None and found.dialogue


def test_a_path_or_text_in_place_of_an_image_is_no_row_of_text(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": None, "path": "a.jpg"}, "conversations": TURNS}]
    with parquet(tmp_path, rows).open("rb") as stream:
        (found,) = stream_records(stream, "data.parquet")
    assert isinstance(found, Rejected) and found.reason == "missing_file"
    assert "'a.jpg'; store the bytes of the image file" in str(found)


def test_a_dialogue_that_asks_about_a_lacking_image_is_no_row_of_text(tmp_path: Path) -> None:
    asked = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A person."}]
    rows = [{"image": None, "conversations": asked}, {"image": b"jpeg", "conversations": asked}]
    with parquet(tmp_path, rows).open("rb") as stream:
        found, _ = stream_records(stream, "data.parquet")
    assert isinstance(found, Rejected) and found.reason == "missing_file" and "<image>" in str(found)


def test_a_system_column_is_the_first_turn(tmp_path: Path) -> None:
    with parquet(tmp_path, [{"image": b"jpeg", "system": "Be brief.", "conversations": TURNS}]).open("rb") as stream:
        (found,) = stream_records(stream, "data.parquet")
        assert ignored_columns(stream, "data.parquet") == []
    assert isinstance(found, ImageRecord) and found.dialogue
    assert found.dialogue.turns[0] == ("system", "Be brief.") and len(found.dialogue.turns) == len(TURNS) + 1


def test_a_column_of_another_name(tmp_path: Path) -> None:
    with parquet(tmp_path, [{"images": [b"jpeg"], "caption": "x"}]).open("rb") as stream:
        for asked in (None, "images"):  # the only one that can be meant
            assert list(stream_records(stream, "d.parquet", asked)) == [ImageRecord("d.parquet/000000", b"jpeg", None)]
        assert ignored_columns(stream, "d.parquet") == ["caption"]
        with pytest.raises(UserError, match="has no column 'image2'; its columns are images, caption"):
            list(stream_records(stream, "d.parquet", "image2"))
    several = parquet(tmp_path, [{"left": {"bytes": b"jpeg"}, "right": b"jpeg"}]).open("rb")
    with several, pytest.raises(UserError, match="has no column 'image', and images may be in left or right; its"):
        list(stream_records(several, "d.parquet"))


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


@pytest.mark.parametrize(
    "members, column, outcome",
    [
        (["0.depth.png", "0.jpg"], None, "0.jpg"),  # what has nothing but an extension is the picture
        (["0.jpg", "0.seg.png"], None, "0.jpg"),
        (["0.jpg", "0.seg.png"], "seg.png", "0.seg.png"),
        (["0.rgb.jpg", "0.depth.png", "0.json"], "RGB", "0.rgb.jpg"),
        (["0.left.jpg"], None, "0.left.jpg"),
        (["a.v1.jpg", "a.v2.jpg"], None, "several_images"),
        (["0.jpg", "0.png"], None, "several_images"),
        (["0.jpg", "0.png"], "png", "0.png"),
        (["0.rgb.jpg", "0.rgb.png"], "rgb", "several_images"),
        (["0.jpg"], "depth", "not_an_image"),
        (["._0.jpg", "0.jpg", "__MACOSX/._0.jpg", ".thumbs/0.jpg"], None, "0.jpg"),
        (["./a/0.jpg"], None, "./a/0.jpg"),
    ],
)
def test_of_several_images_of_a_key_one_is_the_picture(members: list[str], column: str | None, outcome: str) -> None:
    content = {name: b"{}" if name.endswith("json") else name.encode() for name in members}
    (found,) = stream_records(tar(content), "s.tar", column)
    assert (found.reason if isinstance(found, Rejected) else found.data.decode()) == outcome


def test_a_dialogue_apart_from_its_picture_says_how_to_write_the_tar() -> None:
    *_, talk = stream_records(tar({"0.jpg": b"x", "1.jpg": b"x", "0.json": b"{}"}), "s.tar")
    assert isinstance(talk, Rejected) and "tar --sort=name" in str(talk)


def test_members_that_nothing_is_taken_from_are_named_once() -> None:
    members = dict.fromkeys(("0.depth.png", "0.jpg", "0.txt", "1.jpg", "1.txt", "1.json"), b"x")
    assert ignored_columns(tar(members), "s.tar") == ["depth.png", "txt"]
    assert ignored_columns(tar(members), "s.tar", "depth") == ["jpg", "txt"]


@pytest.mark.parametrize("name", ["x.parquet", "x.tar", "x.tar.gz"])
def test_damage_is_one_line_that_names_the_file(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: cannot be read") as refused:
        list(stream_records(io.BytesIO(b"nothing of the kind" * 60), name))
    assert "\n" not in str(refused.value)


def test_a_gzip_whose_checksum_is_wrong_is_damaged() -> None:
    data = bytearray(tar({"0.jpg": b"x"}, "w:gz").getvalue())
    data[-8] ^= 1
    with pytest.raises(UserError, match=r"^x\.tar\.gz: cannot be read \(CRC check failed"):
        list(stream_records(io.BytesIO(data), "x.tar.gz"))


@pytest.mark.parametrize(
    "members, reason",
    [
        ({"0.jpg": b"x", "0.json": b"[" * 9999}, "malformed_entry"),
        ({"0.jpg": b"x", "0.json": json.dumps({"conversations": [{**TURNS[0], "value": "\ud800"}, TURNS[1]]}).encode()},
         "malformed_entry"),
        ({"\udcff.jpg": b"x"}, "bad_path"),
    ],
)  # fmt: skip
def test_text_that_is_none_and_json_that_is_too_deep_are_rejects(members: dict[str, bytes], reason: str) -> None:
    (found,) = stream_records(tar(members), "s.tar")
    assert isinstance(found, Rejected) and found.reason == reason


def keys_in(data: bytes) -> list[str]:
    found = list(stream_records(io.BytesIO(data), "a.tar"))
    assert all(isinstance(record, ImageRecord) for record in found)
    return [record.path for record in found if isinstance(record, ImageRecord)]


def test_a_tar_is_read_to_its_end_or_said_to_be_damaged() -> None:
    data = tar({f"{i}.jpg": b"jpeg" for i in range(4)}).getvalue()
    more = tar({f"{i}.jpg": b"jpeg" for i in range(4, 6)}).getvalue()
    assert keys_in(data + more) == [f"a.tar/{i}.jpg" for i in range(6)]  # as `cat` joins them
    flipped = data[:2050] + b"\xff" + data[2051:]  # of the third header; each picture has two blocks
    for damaged in (flipped, data[: 2 * 1024 + 200]):
        with pytest.raises(UserError, match="a damaged header"):
            keys_in(damaged)


def test_links_and_repeated_names_in_a_tar_lose_no_picture_silently() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, kind in (("0.jpg", tarfile.REGTYPE), ("1.jpg", tarfile.LNKTYPE), ("2.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.jpg" * (kind != tarfile.REGTYPE)
            info.size = 4 * (kind == tarfile.REGTYPE)
            archive.addfile(info, io.BytesIO(b"jpeg"))
    file.seek(0)
    found = list(stream_records(file, "a.tar"))
    assert sorted(type(record).__name__ for record in found) == ["ImageRecord", "Rejected", "Rejected"]
    links = [record for record in found if isinstance(record, Rejected)]
    assert [link.entry_id for link in links] == ["a.tar/1.jpg", "a.tar/2.jpg"] and "a link to 0.jpg" in str(links[0])
    twice = [record.data for record in stream_records(tar({"a.JPG": b"one", "a.jpg": b"two"}), "a.tar")]  # type: ignore[union-attr]
    assert twice == [b"one", b"two"]


@pytest.mark.parametrize("content", ['[{"bbox": [1, 2, 3, 4]}]', '"a cat"', "7", "[]"])
def test_a_pictures_json_of_another_kind_says_nothing(content: str) -> None:
    (record,) = stream_records(tar({"0.jpg": b"jpeg", "0.json": content.encode()}), "a.tar")
    assert isinstance(record, ImageRecord) and record.dialogue is None
    (record,) = stream_records(tar({"0.jpg": b"jpeg", "0.json": json.dumps(TURNS).encode()}), "a.tar")
    assert isinstance(record, ImageRecord) and record.dialogue is not None


def test_a_text_that_names_its_picture_is_no_row_of_text(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Picture 1: <img>a.jpg</img>\nWho?"}, TURNS[1]]
    with parquet(tmp_path, [{"image": None, "conversations": turns}]).open("rb") as stream:
        (found,) = stream_records(stream, "data.parquet")
    assert isinstance(found, Rejected) and found.reason == "missing_file"
