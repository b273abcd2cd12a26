from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import crayon_row

from collavo.dataset import count_rows, find_files, read_rows
from collavo.errors import UserError
from schemas.crayon_row import CRAYON_SCHEMA


def shard(path: Path, *ids: str, schema: pa.Schema = CRAYON_SCHEMA) -> Path:
    records = [crayon_row(image_id=id_).as_record() for id_ in ids]
    pq.write_table(pa.Table.from_pylist(records, schema=schema), path)
    return path


@pytest.fixture
def two_shards(tmp_path) -> list[Path]:
    return [shard(tmp_path / f"crayon-0000{i}-of-00002.parquet", f"{i}a", f"{i}b") for i in range(2)]


def refusal(*paths: Path) -> str:
    with pytest.raises(UserError) as error:
        find_files([str(path) for path in paths])
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_folder_and_its_files_are_the_same_data(two_shards: list[Path]):
    folder = two_shards[0].parent
    (folder / "manifest.json").write_text("{}")
    assert find_files([str(folder)]) == find_files([str(file) for file in reversed(two_shards)]) == two_shards
    assert find_files([str(folder), str(two_shards[1])]) == two_shards  # named twice, read once


def test_rows_are_read_in_order_and_counted_by_split(two_shards: list[Path]):
    assert [row.image_id for row in read_rows(two_shards)] == ["0a", "0b", "1a", "1b"]
    assert next(iter(read_rows(two_shards))) == crayon_row(image_id="0a")
    for split, rows in ((None, 4), ("train", 4), ("validation", 0)):
        assert count_rows(two_shards, split) == len(list(read_rows(two_shards, split))) == rows


def test_an_incomplete_set_of_shards_is_refused(two_shards: list[Path]):
    assert "1 of 2 shards" in refusal(two_shards[1])
    two_shards[0].unlink()
    assert "1 of 2 shards" in refusal(two_shards[0].parent)


def test_complete_sets_in_two_folders_go_together(two_shards: list[Path], tmp_path):
    (tmp_path / "other").mkdir()
    other = shard(tmp_path / "other" / "crayon-00000-of-00001.parquet", "z")
    assert find_files([str(tmp_path), str(tmp_path / "other")]) == sorted([*two_shards, other])


def test_files_of_another_name_need_no_company(tmp_path):
    assert find_files([str(shard(tmp_path / "mine.parquet", "a"))]) == [tmp_path / "mine.parquet"]


@pytest.mark.parametrize("content", [b"", b"hello" * 50, b"PAR1" + bytes(100) + b"PAR1"])
def test_a_file_that_is_no_parquet_is_refused_by_name(tmp_path, content: bytes):
    (tmp_path / "damaged.parquet").write_bytes(content)
    assert "damaged.parquet" in refusal(tmp_path / "damaged.parquet")


def test_paths_without_data_are_refused(tmp_path):
    assert "nowhere" in refusal(tmp_path / "nowhere")
    assert "no .parquet file" in refusal(tmp_path)
