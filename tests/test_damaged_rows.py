"""Files that another tool or a disk has damaged: what is damaged is left out and named, whoever reads it."""

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.pvalue import TaggedOutput
from tiny_model import OWN_CLASSES, own_rows, scene_rows, tiny_processor, write_crayon_file

from collavo import export_data
from collavo.dataset import category_set, check_repeats, count_rows, find_files, read_rows
from collavo.errors import LeftOut, Rejected, UserError
from collavo.evaluation.judge import Judge
from collavo.evaluation.questions import EVALUATED_TASKS, questions_of
from collavo.inference import picture_of_row
from collavo.model.prompt import KINDS
from collavo.training.batch_plan import PlanOptions, Sample, plan_epoch
from collavo.training.batches import ExampleDataset, Skipped
from collavo.training.lengths import LengthLimit
from collavo.training.row_index import build_row_indexes
from pipelines.records import REJECT_REASONS, Draft
from pipelines.sources import read_crayon_rows
from schemas.categories import COCO_PANOPTIC
from schemas.crayon_row import CRAYON_SCHEMA

PROCESSOR = tiny_processor()
ROWS = scene_rows(4)


def save(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write records as another tool may have, with nulls anywhere."""
    metadata = pq.read_metadata(write_crayon_file(path, [])).metadata  # with the set of classes
    fields = [column.with_nullable(True) for column in CRAYON_SCHEMA]
    pq.write_table(pa.Table.from_pylist(records, schema=pa.schema(fields, metadata)), path)
    return path


def records() -> list[dict[str, Any]]:
    return [row.as_record() for row in ROWS]


def read_as_all_do(path: Path, folder: Path) -> LeftOut:
    """Read a file as training, evaluation, `--from_crayon` and the exports do; what the index leaves out."""
    files = find_files([str(path)])
    categories = category_set(files)
    check_repeats(files)
    limit = LengthLimit(PROCESSOR, 2000, "dialogues", instructions_per_sequence=8)
    index = build_row_indexes(files, limit, categories=categories)["train"]
    examples = ExampleDataset(index, PROCESSOR, None, categories)
    options = PlanOptions(batch_size=1, seed=0, instructions_per_sequence=8, max_tokens=limit.room)
    for batch in plan_epoch(index, KINDS, options, 0):
        examples.collate_or_error([examples[sample] for sample in batch.samples])
    judge, left_out = Judge(categories), LeftOut()
    rows = list(read_rows(files, left_out=left_out))
    assert len(rows) + left_out.counts.total() == count_rows(files)
    for row in rows:
        questions_of(row, EVALUATED_TASKS, judge)
        with suppress(Rejected, UserError):
            picture_of_row(row, None, categories)
    for draft in read_crayon_rows(str(path), categories, True):
        assert isinstance(draft, Draft) or draft.value.reason in REJECT_REASONS["list"]
    for to in ("jsonl", "llava"):
        flags = ["--data", str(path), "--to", to, "--output", str(folder / to), "--overwrite"]
        assert export_data.main(flags) in (0, 2)
    return index.left_out


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container and key below a value."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def lists(value: Any) -> Any:
    """Copy plain values, with lists for tuples, so that they can be changed."""
    if isinstance(value, dict):
        return {key: lists(v) for key, v in value.items()}
    return [lists(v) for v in value] if isinstance(value, list | tuple) else value


def spoil(chosen: random.Random, path: Path) -> Path:
    """Damage a field of a row, or bytes of the file."""
    if chosen.random() < 0.6:
        found = lists(records())
        container, key = chosen.choice(list(places(found[chosen.randrange(len(found))])))
        odd: dict[type, list[Any]] = {
            str: ["", "</s>", "<im<image>age>", "\0", "ab" * 9000, "../x"],
            int: [-1, 0, 2**31 - 1, -(2**31)],
            float: [float("nan"), float("inf"), -1.0],
            list: [[], [None]],
            bytes: [b"", b"\x89PNG\r\n\x1a\n", bytes(99)],
        }
        container[key] = chosen.choice([None, *odd.get(type(container[key]), [])])
        return save(path, found)
    data = bytearray(write_crayon_file(path, ROWS).read_bytes())
    for _ in range(chosen.choice([1, 8, 64])):
        data[chosen.randrange(len(data))] = chosen.randrange(256)
    path.write_bytes(data)
    return path


def damage_and_read(seeds: range, folder: Path) -> None:
    for seed in seeds:
        try:
            read_as_all_do(spoil(random.Random(seed), folder / f"{seed}.parquet"), folder)
        except UserError as error:
            assert "\n" not in str(error)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


def test_no_damage_to_a_file_is_a_traceback(tmp_path: Path) -> None:
    damage_and_read(range(12), tmp_path)


@pytest.mark.slow
def test_no_damage_to_500_files_is_a_traceback(tmp_path: Path) -> None:
    damage_and_read(range(500), tmp_path)


@pytest.mark.parametrize(
    ("column", "field", "value", "said"),
    [
        ("instructions", "question", None, "missing_value (row 1 of rows.parquet: instructions.question is null)"),
        (
            "instructions",
            "segment_ids",
            [99],
            "bad_value (row 1 of rows.parquet: an instruction rests on segments [99]",
        ),
        ("segments", "box_xyxy", None, "missing_value (row 1 of rows.parquet: segments.box_xyxy is null)"),
        ("segments", "box_xyxy", [], "bad_value (row 1 of rows.parquet: box_xyxy is [])"),
        ("segments", "label", 133, "bad_value (row 1 of rows.parquet: a segment has label 133"),
        ("conversations", "turns", [None], "missing_value (row 1 of rows.parquet: conversations.turns is null)"),
    ],
)
def test_a_damaged_row_is_left_out_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str, field: str, value: Any, said: str
) -> None:
    found = lists(records())
    found[0][column][0][field] = value
    path = save(tmp_path / "rows.parquet", found)
    left_out = read_as_all_do(path, tmp_path)
    assert left_out.counts.total() == 1 and left_out.lines()[0].startswith(f"1 {said}")
    assert ROWS[0].image_id in capsys.readouterr().out
    with pytest.raises(UserError, match="_value"):
        list(read_rows([path]))


def test_a_row_with_two_objects_of_one_number_is_left_out(tmp_path: Path) -> None:
    found = lists(records())
    for segment in found[2]["segments"]:
        if segment["category"] == "dog":  # which somebody corrects to a bird, beside four others
            segment |= {"category": "bird", "label": 14}
    left_out = read_as_all_do(save(tmp_path / "rows.parquet", found), tmp_path)
    assert left_out.lines() == ["1 bad_value (row 3 of rows.parquet: two segments are bird number 1)"]


@pytest.mark.parametrize("width", [0, None])
def test_a_picture_without_a_width_is_left_out(tmp_path: Path, width: int | None) -> None:
    found = lists(records())
    found[0]["width"] = width
    left_out = read_as_all_do(save(tmp_path / "rows.parquet", found), tmp_path)
    height = ROWS[0].height
    assert left_out.lines() == [f"1 bad_value (row 1 of rows.parquet: width and height are {width} and {height})"]


def test_text_that_is_none_and_a_damaged_page_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    marked = [replace(ROWS[0], sources=("in-clear-text",)), *ROWS[1:]]
    pq.write_table(pa.Table.from_pylist([row.as_record() for row in marked], CRAYON_SCHEMA), path, compression="none")
    path.write_bytes(path.read_bytes().replace(b"in-clear-text", b"in-clear-t\xffxt"))
    left_out = LeftOut()
    assert len(list(read_rows([path], left_out=left_out))) == 3
    assert left_out.lines() == ["1 bad_value (row 0 of rows.parquet: text that is not UTF-8 (invalid start byte))"]
    data = bytearray(path.read_bytes())
    data[4:64] = bytes(60)  # the header of the first page, of the column image_id
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"^\S*rows.parquet: cannot be read as Parquet \([^\n]*\)$"):
        list(read_rows([path], left_out=left_out))


def test_a_name_in_the_footer_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    path = write_crayon_file(tmp_path / "rows.parquet", ROWS)
    head, schema, group, *rest = path.read_bytes().split(b"image_sha256")
    path.write_bytes(b"image_sha256".join((head, schema)) + b"image\x97sha256" + b"image_sha256".join((group, *rest)))
    with pytest.raises(UserError, match=r"^\S*rows.parquet: cannot be read as Parquet \([^\n]*\)$"):
        read_as_all_do(path, tmp_path)


def test_a_damaged_map_is_a_skipped_sample(tmp_path: Path) -> None:
    found = lists(records())
    found[0]["panoptic_map"]["bytes"] = found[1]["panoptic_map"]["bytes"][20:50]
    files = [save(tmp_path / "rows.parquet", found)]
    index = build_row_indexes(files, LengthLimit(PROCESSOR, 9999, "none", 99))["train"]
    examples = ExampleDataset(index, PROCESSOR)
    results = [examples[Sample("crayon", row, (0,))] for row in (0, 1)]
    assert isinstance(results[0], Skipped) and results[0].reason == "broken_map"
    assert " object at 0x" not in results[0].detail
    assert not isinstance(results[1], Skipped)


def test_a_map_is_not_read_with_segments_that_another_tool_put_in_another_order(tmp_path: Path) -> None:
    found = lists(records())
    found[0]["segments"].reverse()
    file = str(save(tmp_path / "rows.parquet", found))
    index = build_row_indexes([file], LengthLimit(PROCESSOR, 9999, "none", 99))["train"]
    result = ExampleDataset(index, PROCESSOR)[Sample("crayon", 0, (0,))]
    assert isinstance(result, Skipped) and "outside its box; is the order of segments new?" in result.detail
    first, *others = read_crayon_rows(file, COCO_PANOPTIC, True)
    assert isinstance(first, TaggedOutput) and first.value.reason == "broken_map"
    assert [draft.row for draft in others if isinstance(draft, Draft)] == [
        replace(r, instructions=()) for r in ROWS[1:]
    ]


def test_a_damaged_row_group_costs_its_samples_alone(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.parquet", records())
    index = build_row_indexes([str(path)], LengthLimit(PROCESSOR, 9999, "none", 99))["train"]
    place = pq.read_metadata(path).row_group(0).column(2).data_page_offset  # of the first picture
    data = bytearray(path.read_bytes())
    data[place : place + 60] = bytes(60)
    path.write_bytes(data)
    result = ExampleDataset(index, PROCESSOR)[Sample("crayon", 0, (0,))]
    assert isinstance(result, Skipped) and result.reason == "unreadable_rows"


def test_rows_of_two_sets_of_classes_that_another_tool_joined_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    scenes = write_crayon_file(tmp_path / "scenes.parquet", scene_rows(2))
    own = write_crayon_file(tmp_path / "own.parquet", own_rows(2), OWN_CLASSES)
    tables = [pq.read_table(path) for path in (scenes, own)]
    bare = [table.replace_schema_metadata(None) for table in tables]
    joined = pa.concat_tables(bare)
    pq.write_table(joined.replace_schema_metadata(tables[0].schema.metadata), tmp_path / "first.parquet")
    left_out = read_as_all_do(tmp_path / "first.parquet", tmp_path)
    assert left_out.counts == {"bad_value": 2} and "a segment calls it" in " ".join(left_out.lines())
    records = joined.to_pylist()
    for segment in records[0]["segments"]:
        segment["label"] = records[-1]["segments"][0]["label"]
    pq.write_table(pa.Table.from_pylist(records, schema=joined.schema), tmp_path / "bare.parquet")
    with pytest.raises(UserError, match=r"another tool has joined data sets"):
        category_set(find_files([str(tmp_path / "bare.parquet")]))
