import io
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import crayon_row, segment
from hypothesis import given, settings
from hypothesis import strategies as st

from collavo.errors import UserError
from collavo.row_checks import check_schema
from schemas.crayon_row import (
    CRAYON_SCHEMA,
    SPLITS,
    TASKS,
    CrayonRow,
    Dialogue,
    Instruction,
    Segment,
    file_facts,
    metadata_of,
)

INT32, FLOAT32 = st.integers(-(2**31), 2**31 - 1), st.floats(width=32, allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)

SEGMENTS = st.builds(
    Segment,
    id=INT32,
    category_id=INT32,
    label=INT32,
    category=TEXT,
    is_thing=st.booleans(),
    box_xyxy=st.tuples(FLOAT32, FLOAT32, FLOAT32, FLOAT32),
    area=INT32,
    numbering=st.integers(0, 20),
    is_crowd=st.booleans(),
    score=st.none() | FLOAT32,
)
INSTRUCTIONS = st.builds(
    Instruction,
    task=st.sampled_from(TASKS),
    question=TEXT,
    answer=TEXT,
    label=st.none() | TEXT,
    polarity=st.sampled_from([None, "present", "absent"]),
    segment_ids=st.lists(INT32, max_size=3).map(tuple),
    template_id=TEXT,
)
DIALOGUES = st.builds(Dialogue, id=TEXT, turns=st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple))
ROWS = st.builds(
    CrayonRow,
    image_id=TEXT,
    image_sha256=TEXT,
    other_paths=st.lists(TEXT, max_size=2).map(tuple),
    image_bytes=st.none() | st.binary(max_size=8),
    image_path=TEXT,
    width=INT32,
    height=INT32,
    sources=st.lists(TEXT, max_size=2).map(tuple),
    license_id=st.none() | INT32,
    split=st.sampled_from(SPLITS),
    panoptic_png=st.binary(max_size=8),
    segments=st.lists(SEGMENTS, max_size=3).map(tuple),
    instructions=st.lists(INSTRUCTIONS, max_size=3).map(tuple),
    conversations=st.lists(DIALOGUES, max_size=2).map(tuple),
)


TEXT_ONLY = CrayonRow(
    image_id="talk/7",
    image_sha256=None,
    image_bytes=None,
    image_path=None,
    width=None,
    height=None,
    sources=("llava",),
    license_id=None,
    split="train",
    panoptic_png=None,
    conversations=(Dialogue("7", (("human", "Hi"), ("gpt", "Hello."))),),
)
"""A dialogue about no image."""


def parquet_of(rows: list[CrayonRow]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row.as_record() for row in rows], schema=CRAYON_SCHEMA), file)
    return file.getvalue()


@settings(max_examples=50)
@given(st.lists(ROWS, max_size=3))
def test_rows_come_back_from_parquet_as_they_went_in(rows: list[CrayonRow]):
    rows = [*rows, TEXT_ONLY]
    table = pq.read_table(io.BytesIO(parquet_of(rows)))
    assert [CrayonRow.from_record(record) for record in table.to_pylist()] == rows
    check_schema(table.schema, "rows.parquet")


def test_the_columns_are_those_of_the_contract():
    image = "struct<bytes: binary, path: string>"
    segment = (
        "struct<id: int32, category_id: int32, label: int32, category: string, is_thing: bool, is_crowd: bool, "
        "numbering: int32, box_xyxy: list<float>, area: int32, score: float>"
    )
    instruction = (
        "struct<task: string, question: string, answer: string, label: string, polarity: string, "
        "segment_ids: list<int32>, template_id: string>"
    )
    assert [(column.name, str(column.type).replace("<item: ", "<")) for column in CRAYON_SCHEMA] == [
        ("image_id", "string"),
        ("image_sha256", "string"),
        ("image", image),
        ("width", "int32"),
        ("height", "int32"),
        ("other_paths", "list<string>"),
        ("sources", "list<string>"),
        ("license_id", "int32"),
        ("split", "string"),
        ("panoptic_map", image),
        ("segments", f"list<{segment}>"),
        ("instructions", f"list<{instruction}>"),
        ("conversations", "list<struct<id: string, turns: list<struct<from: string, value: string>>>>"),
    ]


def test_a_segment_names_its_class():
    record = segment(label=132).as_record()
    assert (record["category_id"], record["category"], record["is_thing"]) == (200, "rug", False)


def without(*columns: str) -> pa.Schema:
    return pa.schema([column for column in CRAYON_SCHEMA if column.name not in columns])


def changed(name: str, type_: pa.DataType) -> pa.Schema:
    return CRAYON_SCHEMA.set(CRAYON_SCHEMA.get_field_index(name), pa.field(name, type_))


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        (pa.schema([("a", pa.int32())]), "not crayon data"),  # any other Parquet file
        (CRAYON_SCHEMA.with_metadata({b"collavo.schema_version": b"3"}), "version 3, but this code reads version 2"),
        (without("split", "height"), "no column 'height', 'split'"),
        (without("other_paths"), "no column 'other_paths'"),  # which only version 1 may lack
        (CRAYON_SCHEMA.append(CRAYON_SCHEMA.field("width")), "several columns 'width'"),
        (changed("width", pa.string()), "column 'width' is string, but crayon data has int32"),
        (changed("image", pa.struct([("bytes", pa.binary())])), "column 'image'"),
        (changed("sources", pa.string()), "column 'sources'"),
    ],
)
def test_other_files_are_refused_in_one_line_that_names_them(schema: pa.Schema, found: str):
    with pytest.raises(UserError) as refusal:
        check_schema(schema, "some/file.parquet")
    message = str(refusal.value)
    assert message.startswith("some/file.parquet: ") and found in message and "\n" not in message


def test_a_column_of_somebody_elses_does_no_harm():
    check_schema(CRAYON_SCHEMA.append(pa.field("embedding", pa.list_(pa.float32()))), "rows.parquet")


def test_facts_of_a_run_come_back_from_the_metadata():
    facts = {"seed": 3, "segmenters": [{"name": "mask2former", "revision": None}], "code_version": "0.1 \u00e9"}
    schema = CRAYON_SCHEMA.with_metadata({**CRAYON_SCHEMA.metadata, **metadata_of(facts)})
    assert file_facts(schema.metadata) == {**facts, "schema_version": 2}


def test_a_row_that_refers_to_its_image_holds_no_bytes_of_it():
    record = replace(crayon_row(), image_bytes=None).as_record()
    assert record["image"] == {"bytes": None, "path": "a.jpg"}
