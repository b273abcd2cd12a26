import hashlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import crayon_row, segment

from collavo import parquet_writer
from collavo.parquet_writer import CrayonFileWriter
from collavo.row_checks import check_schema
from schemas.categories import COCO_PANOPTIC
from schemas.crayon_row import CRAYON_SCHEMA, CrayonRow, Dialogue, Instruction, file_facts

FULL = {
    "sources": ("coco", "llava"),
    "license_id": 3,
    "segments": (segment(), segment(id=2, numbering=2, score=0.5)),
    "instructions": (Instruction("counting", "How many?", "2 people.", "2", "present", (1, 2), "counting-2"),),
    "conversations": (Dialogue("d", (("human", "Hi"), ("gpt", "Hello"))),),
}


def rows(count: int, image_bytes: int = 4) -> list[CrayonRow]:
    return [crayon_row(image_id=f"a/{i}", image_bytes=bytes([i % 256]) * image_bytes, **FULL) for i in range(count)]


def write(path: Path, some_rows: list[CrayonRow], facts: dict, late_facts: dict) -> tuple[int, str]:
    writer = CrayonFileWriter(path.open("wb"), facts, COCO_PANOPTIC)
    for row in some_rows:
        writer.write(row)
    return writer.close(late_facts)


def group_sizes(path: Path) -> list[int]:
    metadata = pq.read_metadata(path)
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def test_rows_come_back_in_order_from_groups_of_a_hundred(tmp_path):
    written = rows(250)
    write(tmp_path / "shard.parquet", written, {}, {})
    assert group_sizes(tmp_path / "shard.parquet") == [100, 100, 50]
    table = pq.read_table(tmp_path / "shard.parquet")
    check_schema(table.schema, "shard.parquet")
    assert [CrayonRow.from_record(record) for record in table.to_pylist()] == written


@pytest.mark.parametrize(("expected_rows", "rows_per_group"), [(40, 8), (600, 9), (3200, 50), (10**6, 100)])
def test_a_small_data_set_has_smaller_groups(tmp_path, expected_rows, rows_per_group):
    writer = CrayonFileWriter((tmp_path / "shard.parquet").open("wb"), {}, COCO_PANOPTIC, expected_rows)
    for row in rows(120):
        writer.write(row)
    writer.close({})
    assert group_sizes(tmp_path / "shard.parquet")[0] == rows_per_group


def test_a_group_of_large_images_ends_by_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_writer, "BYTES_PER_GROUP", 10_000)
    write(tmp_path / "shard.parquet", [*rows(7, image_bytes=4000), *rows(2, image_bytes=50_000)], {}, {})
    assert group_sizes(tmp_path / "shard.parquet") == [3, 3, 2, 1]


def test_image_bytes_are_stored_as_they_are_and_all_else_is_compressed_and_indexed(tmp_path):
    write(tmp_path / "shard.parquet", rows(120, image_bytes=300), {}, {})
    metadata = pq.read_metadata(tmp_path / "shard.parquet")
    for group in range(metadata.num_row_groups):
        for i in range(metadata.num_columns):
            column = metadata.row_group(group).column(i)
            expected = "UNCOMPRESSED" if column.path_in_schema == "image.bytes" else "ZSTD"
            assert column.compression == expected, column.path_in_schema
            assert column.has_offset_index, column.path_in_schema


def test_lists_are_named_as_the_parquet_format_asks(tmp_path):
    write(tmp_path / "shard.parquet", rows(1), {}, {})
    metadata = pq.read_metadata(tmp_path / "shard.parquet")
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    assert "segments.list.element.box_xyxy.list.element" in paths
    assert "conversations.list.element.turns.list.element.from" in paths
    assert not any(".item" in path for path in paths)


@pytest.mark.parametrize("count", [0, 1, 130])
def test_size_and_hash_are_those_of_the_file(tmp_path, count: int):
    path = tmp_path / "shard.parquet"
    size, sha256 = write(path, rows(count), {}, {})
    assert size == path.stat().st_size
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_facts_known_before_and_after_the_rows_stand_in_the_file(tmp_path):
    write(tmp_path / "shard.parquet", rows(1), {"seed": 3}, {"segmenters": ['{"name": "annotations"}']})
    metadata = pq.read_metadata(tmp_path / "shard.parquet").metadata
    facts = file_facts(metadata)
    assert facts.pop("categories")["name"] == COCO_PANOPTIC.name
    assert facts == {"schema_version": 2, "seed": 3, "segmenters": ['{"name": "annotations"}']}
    assert metadata[b"huggingface"] == CRAYON_SCHEMA.metadata[b"huggingface"]


def test_a_shard_without_rows_is_a_whole_file(tmp_path):
    write(tmp_path / "shard.parquet", [], {}, {})
    table = pq.read_table(tmp_path / "shard.parquet")
    assert table.num_rows == 0
    check_schema(table.schema, "shard.parquet")


def test_the_same_rows_make_the_same_file(tmp_path):
    first, second = (write(tmp_path / name, rows(130), {"seed": 1}, {"late": 2}) for name in ("a", "b"))
    assert first == second
