import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import crayon_row, segment
from tiny_model import OWN_CLASSES, own_rows, scene_rows, tiny_processor, write_crayon_file

from collavo.dataset import category_set, check_repeats, count_rows, find_files, notes, read_rows
from collavo.errors import UserError
from collavo.training.lengths import LengthLimit
from collavo.training.row_index import build_row_indexes
from schemas.categories import COCO_PANOPTIC, CategorySet
from schemas.crayon_row import CRAYON_SCHEMA, CrayonRow


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
    assert (
        find_files([str(folder)]) == find_files([str(file) for file in reversed(two_shards)]) == [*map(str, two_shards)]
    )
    assert find_files([str(folder), str(two_shards[1])]) == [*map(str, two_shards)]  # named twice, read once
    assert find_files([str(folder / "*.parquet")]) == [*map(str, two_shards)]  # in quotes, which no shell expands


def test_files_below_a_folder_without_any_are_its_data(two_shards: list[Path]):
    (hub := two_shards[0].parent / "hub").mkdir()
    (hub / "README.md").touch()
    (hub / ".cache").mkdir()
    shutil.copy(two_shards[0], hub / ".cache" / "rows.parquet")
    assert "no .parquet file" in refusal(hub)
    (hub / "data").mkdir()
    moved = [str(shutil.copy(file, hub / "data" / file.name)) for file in two_shards]
    assert find_files([str(hub)]) == moved
    shutil.copy(two_shards[0], hub / "rows.parquet")
    assert find_files([str(hub)]) == [str(hub / "rows.parquet")]


def test_rows_are_read_in_order_and_counted_by_split(two_shards: list[Path]):
    assert [row.image_id for row in read_rows(two_shards)] == ["0a", "0b", "1a", "1b"]
    assert next(iter(read_rows(two_shards))) == crayon_row(image_id="0a")
    for split, rows in ((None, 4), ("train", 4), ("validation", 0)):
        assert count_rows(two_shards, split) == len(list(read_rows(two_shards, split))) == rows


def test_pictures_of_row_groups_without_a_wanted_row_are_not_read(tmp_path):
    rows = [crayon_row(image_id=f"{n}", split="validation" if n in (5, 9) else "train") for n in range(12)]
    table = pa.Table.from_pylist([row.as_record() for row in rows], schema=CRAYON_SCHEMA)
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    data = bytearray((tmp_path / "rows.parquet").read_bytes())
    groups = pq.read_metadata(tmp_path / "rows.parquet")
    for group in (0, 1, 3, 5):  # a page that is read cannot be damaged
        chunk = next(
            c
            for i in range(groups.num_columns)
            if (c := groups.row_group(group).column(i)).path_in_schema == "image.bytes"
        )
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        data[start : start + 8] = b"\xff" * 8
    (tmp_path / "rows.parquet").write_bytes(data)
    files = [str(tmp_path / "rows.parquet")]
    assert [row.image_id for row in read_rows(files, "validation")] == ["5", "9"]
    assert [row.split for row in read_rows(files, image_id="4")] == ["train"]
    with pytest.raises(UserError, match=r"rows\.parquet: cannot be read"):
        list(read_rows(files, "train"))


def test_an_incomplete_set_of_shards_is_refused(two_shards: list[Path]):
    assert "1 of 2 files" in refusal(two_shards[1])
    two_shards[0].unlink()
    assert "1 of 2 files" in refusal(two_shards[0].parent)


def test_complete_sets_in_two_folders_go_together(two_shards: list[Path], tmp_path):
    (tmp_path / "other").mkdir()
    other = shard(tmp_path / "other" / "crayon-00000-of-00001.parquet", "z")
    assert find_files([str(tmp_path), str(tmp_path / "other")]) == sorted(map(str, [*two_shards, other]))


def test_files_of_another_name_need_no_company(tmp_path):
    assert find_files([str(shard(tmp_path / "mine.parquet", "a"))]) == [str(tmp_path / "mine.parquet")]


@pytest.mark.parametrize("content", [b"", b"hello" * 50, b"PAR1" + bytes(100) + b"PAR1"])
def test_a_file_that_is_no_parquet_is_refused_by_name(tmp_path, content: bytes):
    (tmp_path / "damaged.parquet").write_bytes(content)
    assert "damaged.parquet" in refusal(tmp_path / "damaged.parquet")


def test_paths_without_data_are_refused(tmp_path):
    assert "nowhere" in refusal(tmp_path / "nowhere")
    assert "no .parquet file" in refusal(tmp_path)


def test_files_of_version_1_are_read_and_told_of(tmp_path):
    new = {"image_sha256", "other_paths"}
    schema = pa.schema([column for column in CRAYON_SCHEMA if column.name not in new], {"collavo.schema_version": "1"})
    record = {k: v for k, v in crayon_row(segments=(segment(),)).as_record().items() if k not in new}
    pq.write_table(pa.Table.from_pylist([record], schema=schema), tmp_path / "old.parquet")
    files = find_files([str(tmp_path)])
    (row,) = read_rows(files)
    assert row == crayon_row(segments=(segment(),), image_sha256=None)
    assert category_set(files) is COCO_PANOPTIC
    assert notes(files) == [f"{files[0]} is of schema version 1: no row has an image_sha256"]


def test_files_whose_names_say_another_split_than_their_rows_are_told_of(tmp_path):
    rows = [crayon_row(image_id=f"{n}", split="validation" if n == 0 else "train") for n in range(6)]
    named = {"train": rows[:3], "test": rows[3:5], "latest": rows, "my_val": rows[:1], "validation-1": rows[5:]}
    files = [str(write_crayon_file(tmp_path / f"{name}.parquet", of_file)) for name, of_file in named.items()]
    assert notes(files) == [
        f"{tmp_path}/{name}.parquet holds {held}: the column `split` counts, not a file's name"
        for name, held in (
            ("train", "1 row of the split 'validation'"),
            ("test", "2 rows of the split 'train'"),
            ("validation-1", "1 row of the split 'train'"),
        )
    ]


def by_pandas(source: Path, target: Path) -> None:
    pd = pytest.importorskip("pandas")
    pd.read_parquet(source).to_parquet(target)


def by_datasets(source: Path, target: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_parquet(str(source), cache_dir=str(target.parent / "cache")).to_parquet(str(target))


def by_polars(source: Path, target: Path) -> None:
    pl = pytest.importorskip("polars")
    pl.read_parquet(source).write_parquet(target)


def by_duckdb(source: Path, target: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    duckdb.sql(f"COPY (SELECT * FROM '{source}') TO '{target}' (FORMAT parquet)")


def widened(type_: pa.DataType) -> pa.DataType:
    """What Polars makes of a type."""
    if pa.types.is_struct(type_):
        return pa.struct([(field.name, widened(field.type)) for field in type_])
    if pa.types.is_list(type_):
        return pa.large_list(widened(type_.value_type))
    wide = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary(), pa.int32(): pa.int64()}
    return {**wide, pa.float32(): pa.float64()}.get(type_, type_)


def by_wider_types(source: Path, target: Path) -> None:
    """As Polars writes it, which need not be installed; without statistics, too."""
    table = pq.read_table(source)
    schema = pa.schema([(column.name, widened(column.type)) for column in table.schema])
    rewritten = pa.Table.from_pylist(table.to_pylist(), schema=schema)
    pq.write_table(rewritten, target, write_statistics=False, store_schema=False)


@pytest.mark.parametrize("rewrite", [by_pandas, by_datasets, by_polars, by_duckdb, by_wider_types])
@pytest.mark.parametrize("kind", ["coco", "own"])
def test_files_that_other_tools_wrote_again_hold_the_same_rows(
    tmp_path, monkeypatch, rewrite: Callable[[Path, Path], None], kind: str
):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows, categories = (scene_rows(4), COCO_PANOPTIC) if kind == "coco" else (own_rows(4), OWN_CLASSES)
    (tmp_path / "again").mkdir()
    rewrite(write_crayon_file(tmp_path / "rows.parquet", rows, categories), target := tmp_path / "again/rows.parquet")
    files = find_files([str(target)])
    assert list(read_rows(files)) == rows
    assert count_rows(files, "train") == 3
    # Names and kinds of classes that have a segment; another tool may have dropped the metadata.
    found = category_set(files)
    for s in (s for row in rows for s in row.segments):
        assert (found[s.label].display_name, found[s.label].is_thing) == (s.category, s.is_thing)
    limit = LengthLimit(tiny_processor(), 600, "none", 8)
    assert len(build_row_indexes(files, limit, categories=found)["train"].texts["crayon"])


def test_a_file_states_its_set_and_sets_are_not_mixed(tmp_path):
    own = write_crayon_file(tmp_path / "own.parquet", own_rows(1), OWN_CLASSES)
    coco = write_crayon_file(tmp_path / "coco.parquet", scene_rows(1))
    assert category_set([own]) == OWN_CLASSES and category_set([coco]) == COCO_PANOPTIC
    with pytest.raises(UserError, match=r"own.parquet has the classes of five of our own.* those of COCO panoptic"):
        category_set([coco, own])
    records = [{**record, "isthing": 1 - record["isthing"]} for record in OWN_CLASSES.as_records()]
    flipped = write_crayon_file(tmp_path / "flipped.parquet", [], CategorySet.from_records("flipped", records))
    with pytest.raises(
        UserError, match=r"is a thing in one of .*flipped.parquet and .*own.parquet, and stuff in the other"
    ):
        category_set([own, flipped])


def test_a_picture_that_datasets_encoded_again_has_lost_its_path_alone(tmp_path):
    record = crayon_row().as_record()
    record["image"], record["panoptic_map"] = (
        {"bytes": record[name]["bytes"], "path": None} for name in ("image", "panoptic_map")
    )
    pq.write_table(pa.Table.from_pylist([record], schema=CRAYON_SCHEMA), tmp_path / "rows.parquet")
    assert list(read_rows([tmp_path / "rows.parquet"])) == [crayon_row(image_path=crayon_row().image_id)]


@pytest.mark.parametrize("stated", [True, False])
def test_files_that_another_tool_wrote_apart_have_one_set_whichever_classes_each_shows(tmp_path, stated: bool):
    rows = own_rows(3)
    fewer = [replace(row, instructions=(), segments=tuple(s for s in row.segments if s.label < 2)) for row in rows]
    bare = [replace(row, instructions=(), segments=()) for row in rows]
    files = [write_crayon_file(tmp_path / "all.parquet", rows, OWN_CLASSES)] if stated else []
    for name, of_file in (("fewer", fewer), ("none", bare), *([] if stated else [("all", rows)])):
        files.append(tmp_path / f"{name}.parquet")
        pq.write_table(pa.Table.from_pylist([r.as_record() for r in of_file], CRAYON_SCHEMA), files[-1])
    named = [category.display_name for category in category_set(files)]
    assert named == [category.display_name for category in OWN_CLASSES]
    assert list(read_rows(files[stated:])) == [*fewer, *bare, *([] if stated else rows)]


def test_a_picture_that_two_data_sets_hold_is_refused(tmp_path):
    def saved(folder: str, *rows: CrayonRow) -> Path:
        (tmp_path / folder).mkdir()
        return write_crayon_file(tmp_path / folder / "rows.parquet", list(rows))

    one, other = crayon_row(), crayon_row(image_id="b", image_sha256="1" * 64, split="validation")
    again = crayon_row(image_id="elsewhere/a", split="validation")
    text_only = crayon_row(image_sha256=None, panoptic_png=None, image_bytes=None, image_path=None)
    first = saved("first", one, other, text_only)
    check_repeats([first])
    check_repeats([first, saved("others", crayon_row(image_sha256="2" * 64), text_only)])
    for folder, rows, counted in (
        ("same", [one, other], r"2 pictures of \S+first are in \S+same too and would count twice"),
        ("split", [again], r"1 pictures of \S+first are in \S+split too, 1 of them in another split, and would"),
    ):
        with pytest.raises(UserError, match=rf"^{counted}[^\n]* --from_crayon \S+first \S+{folder}$"):
            check_repeats([first, saved(folder, *rows)])
    with pytest.raises(UserError, match=r"^1 pictures of \S+both are in both splits[^\n]* --from_crayon \S+both$"):
        check_repeats([saved("both", one, other, again)])
    with pytest.raises(UserError, match=r"^2 pictures of \S+first are in \S+same too and would"):  # of these two alone
        check_repeats([first, tmp_path / "same" / "rows.parquet", saved("third", one)])


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows.parquet: is a pipe"):
        category_set([tmp_path / "rows.parquet"])
