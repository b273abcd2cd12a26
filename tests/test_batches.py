"""From Parquet rows to tensors."""

import errno
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import GRID, scene_rows, tiny_model, tiny_processor, write_crayon_file

from collavo.dataset import find_files
from collavo.errors import UserError
from collavo.images import decode_rgb
from collavo.instructions.text import format_objects_with_boxes, parse_objects
from collavo.model.prompt import KINDS, LISTED
from collavo.panoptic.grid import crayon_grid
from collavo.panoptic.index_png import decode_index_map
from collavo.training.batch_plan import PlanOptions, Sample, plan_epoch
from collavo.training.batches import (
    ExampleDataset,
    MicroBatch,
    RowReader,
    Skipped,
    build_loader,
    pack_prompts,
    prompts_of,
)
from collavo.training.lengths import NO_LIST, TOO_LONG, LengthLimit, object_list
from collavo.training.row_index import RowGroup, build_row_indexes
from schemas.categories import COCO_PANOPTIC
from schemas.crayon_row import CrayonRow, Dialogue

PROCESSOR = tiny_processor()
PACKED = 8


def dataset(
    folder: Path,
    rows: list[CrayonRow],
    object_list: str = "dialogues",
    image_root: Path | None = None,
    max_length: int = 9999,
) -> ExampleDataset:
    files = find_files([str(write_crayon_file(folder / "rows.parquet", rows))])
    index = build_row_indexes(files, LengthLimit(PROCESSOR, max_length, object_list, PACKED))["train"]
    return ExampleDataset(index, PROCESSOR, image_root)


def text_of(ids: torch.Tensor) -> str:
    return PROCESSOR.tokenizer.decode(ids.tolist())


def test_an_example_is_the_row_it_came_from(tmp_path: Path) -> None:
    rows = scene_rows(2)
    example = dataset(tmp_path, rows)[Sample("crayon", 1, (0, 3))]
    asked = [rows[1].instructions[0], rows[1].instructions[3]]
    semantic, numbering = crayon_grid(decode_index_map(rows[1].panoptic_png), rows[1].segments, (GRID, GRID))
    assert example.image_id == rows[1].image_id
    assert torch.equal(example.semantic_ids, torch.from_numpy(semantic))
    assert torch.equal(example.numbering_ids, torch.from_numpy(numbering))
    assert torch.equal(example.pixel_values, PROCESSOR.pixel_values(decode_rgb(rows[1].image_bytes or b"")))
    for number, instruction in enumerate(asked, start=1):
        own = example.sequence_ids == number
        assert instruction.question in text_of(example.input_ids[own])
        supervised = example.labels[own]
        assert text_of(supervised[supervised != -100]) == f" {instruction.answer}</s>"


def test_a_dialogue_is_rendered_turn_by_turn(tmp_path: Path) -> None:
    rows = scene_rows(1)
    labels = dataset(tmp_path, rows).example(Sample("dialogue", 0, (0,))).labels
    turns = rows[0].conversations[0].turns
    assert text_of(labels[labels != -100]) == "".join(f" {v}</s>" for s, v in turns if s == "gpt")


@pytest.mark.parametrize(
    ("object_list", "listed"), [("dialogues", ["dialogue"]), ("all", ["crayon", "dialogue"]), ("none", [])]
)
def test_the_object_list_goes_where_it_is_wanted(tmp_path: Path, object_list: str, listed: list[str]) -> None:
    examples = dataset(tmp_path, scene_rows(1), object_list)
    for kind in KINDS:
        text = text_of(examples[Sample(kind, 0, (0,))].input_ids)
        assert ("The image includes (" in text) == (kind in listed)


def test_text_alone_and_system_turns_are_trained_beside_pictures(tmp_path: Path) -> None:
    said = (("system", "Be brief."), ("human", "Who are you?"), ("gpt", "A model."))
    alone = CrayonRow("talk", None, None, None, None, None, ("llava",), None, "train", None)
    rows = [scene_rows(1)[0], replace(alone, conversations=(Dialogue("talk", said),))]
    examples = dataset(tmp_path, rows)
    assert not examples.index.has_null_images
    batch = examples.collate_or_error([examples[Sample("dialogue", row, (0,))] for row in (0, 1)])
    assert isinstance(batch, MicroBatch)
    assert batch.inputs["input_ids"].shape[0] == 2 and batch.inputs["pixel_values"].shape[0] == 1
    text, labels = (batch.inputs[name][1] for name in ("input_ids", "labels"))
    assert PROCESSOR.image_token_id not in text
    assert "Be brief." in text_of(text) and text_of(labels[labels != -100]) == " A model.</s>"
    model = tiny_model()
    loss = model(**batch.inputs, supervised_only=True, num_items_in_batch=1).loss
    apart = [examples.collate_or_error([examples[Sample("dialogue", row, (0,))]]) for row in (0, 1)]
    losses = [model(**one.inputs, supervised_only=True, num_items_in_batch=1).loss for one in apart]  # type: ignore
    torch.testing.assert_close(loss, sum(losses), rtol=1e-4, atol=1e-4)


CROWDED = scene_rows(8)


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(150, 900),
    st.sampled_from(sorted(LISTED)),
    st.integers(1, 12),
    st.lists(st.text(max_size=150)),
    st.data(),
)
def test_no_sequence_is_longer_than_allowed_and_each_text_is_in_one_or_counted(
    tmp_path: Path, max_length: int, object_list: str, copies: int, odd: list[str], data: st.DataObject
) -> None:
    row = data.draw(st.sampled_from([row for row in CROWDED if row.split == "train"]))
    said = [turn for text in odd for turn in (("human", text), ("gpt", text[::-1] + " </s><image>"))]
    asked = [replace(row.instructions[0], question=text, answer=text + "</s>", segment_ids=()) for text in odd]
    dialogues = (*row.conversations, *([Dialogue("odd", tuple(said))] if said else []))
    more = tuple(replace(segment, numbering=0) for segment in row.segments) * (copies - 1)
    row = replace(row, segments=row.segments + more, instructions=(*row.instructions, *asked), conversations=dialogues)
    examples = dataset(tmp_path, [row], object_list, max_length=max_length)
    limit = LengthLimit(PROCESSOR, max_length, object_list, PACKED)
    plan = plan_epoch(examples.index, KINDS, PlanOptions(1, 0, PACKED, limit.room), 0)
    record, trained = row.as_record(), Counter[str]()
    for sample in (sample for batch in plan for sample in batch.samples):
        prompts = examples._prompts(sample, record)
        length = len(pack_prompts(prompts, PROCESSOR.image_token_id)[0])
        assert length <= max_length
        trained[sample.kind] += len(sample.numbers)
        for prompt in prompts:
            if sample.kind in LISTED[object_list] and "The image includes" in (
                text := PROCESSOR.tokenizer.decode(prompt.input_ids)
            ):
                objects = text.split("The image includes ")[1].split("]. ")[0] + "]"
                assert parse_objects(objects, COCO_PANOPTIC.by_display_name)
    counted = examples.index.left_out.counts
    assert trained["crayon"] + counted[TOO_LONG["crayon"]] == len(row.instructions)
    assert trained["dialogue"] + counted[TOO_LONG["dialogue"]] == len(row.conversations)


@pytest.mark.parametrize(("spare", "reason"), [(4000, ""), (900, "rest_of_object_list"), (5, "object_list")])
def test_of_an_object_list_that_does_not_fit_the_largest_objects_stay(tmp_path: Path, spare: int, reason: str) -> None:
    row = scene_rows(1)[0]
    segments = tuple(replace(row.segments[0], id=n, area=100 + n % 7, numbering=0) for n in range(1, 61))
    row = replace(row, segments=segments, instructions=(), conversations=row.conversations[:1])
    record = row.as_record()

    def length(most: int) -> int:
        return len(prompts_of(PROCESSOR, record, "dialogue", (0,), [most], has_image=True)[0].input_ids)

    max_length = length(NO_LIST) + spare
    examples = dataset(tmp_path, [row], max_length=max_length)
    (kept,) = examples.index.texts["dialogue"].objects.tolist()
    assert examples.index.left_out.counts == ({reason: 1} if reason else {})
    if reason == "object_list":
        assert kept == NO_LIST
        return
    assert length(kept) <= max_length and (kept == 60 or length(kept + 1) > max_length)
    largest = sorted(segments, key=lambda segment: -segment.area)[:kept]
    expected = [segment for segment in segments if segment in largest]
    assert object_list(record, kept) == format_objects_with_boxes(expected, (96, 72))


def test_thirty_turns_of_few_tokens_and_many_bytes_are_kept(tmp_path: Path) -> None:
    turns = [(("human", "gpt")[number % 2], "What is in the image? " * 15) for number in range(30)]
    rows = [replace(scene_rows(1)[0], conversations=(Dialogue("long", tuple(turns)),))]
    length = len(PROCESSOR.render(turns).input_ids)
    assert sum(len(text) for _, text in turns) > 2 * length
    for max_length, kept in ((length, 1), (length - 1, 0)):
        examples = dataset(tmp_path, rows, "none", max_length=max_length)
        assert len(examples.index.texts["dialogue"]) == kept
    assert "scene-000[0]" in examples.index.left_out.lines()[0]


def test_dialogues_without_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    asked, answered = ("human", "Who are you?"), ("gpt", "A model.")
    dialogues = (Dialogue("asked", (asked,)), Dialogue("whole", (asked, answered)), Dialogue("empty", ()))
    index = dataset(tmp_path, [replace(scene_rows(1)[0], conversations=dialogues)]).index
    assert index.texts["dialogue"].numbers.tolist() == [1]
    assert index.left_out.counts == {"without_answer": 2}


def test_only_the_rows_of_the_split_are_learned_from(tmp_path: Path) -> None:
    files = [write_crayon_file(tmp_path / "rows.parquet", scene_rows(8))]
    options = PlanOptions(batch_size=1, seed=0, instructions_per_sequence=8, max_tokens=600)
    for split, rows in (("train", {0, 1, 2, 4, 5, 6}), ("validation", {3, 7})):
        plan = plan_epoch(build_row_indexes(files, LengthLimit(PROCESSOR, 9999, "none", 8))[split], KINDS, options, 0)
        assert {sample.row for batch in plan for sample in batch.samples} == rows


def test_every_row_group_is_read_once_by_one_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [replace(row, instructions=row.instructions[:1]) for row in scene_rows(5)]
    examples = dataset(tmp_path, [replace(row, image_id=f"{n}-{row.image_id}") for n in range(60) for row in scenes])
    reads = []
    read_row_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda file, group, **more: (reads.append(group), read_row_group(file, group, **more))[1],
    )
    options = PlanOptions(batch_size=4, seed=0, instructions_per_sequence=8, max_tokens=600)
    plan = plan_epoch(examples.index, KINDS, options, 0)
    for batch in plan:
        for sample in batch.samples:
            examples._reader.read(sample.row)
    assert len(examples.index.row_groups) == 3
    assert sorted(reads) == [0, 1, 2]


def groups_of(path: Path) -> list[RowGroup]:
    """The row groups of a file, as the index has them; all have equally many rows."""
    footer = pq.read_metadata(path)
    found = [footer.row_group(number) for number in range(footer.num_row_groups)]
    return [RowGroup(str(path), n, n * g.num_rows, g.num_rows, g.total_byte_size) for n, g in enumerate(found)]


def test_rows_of_a_file_that_was_replaced_are_not_taken_for_those_that_were_indexed(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = pa.table({"row": [str(number) for number in range(80)]})
    pq.write_table(rows, path, row_group_size=4)
    groups = groups_of(path)
    assert RowReader(groups, 8, ["row"]).read(7)["row"] == "7"
    for others in (rows.slice(0, 79), rows.slice(0, 4), pa.table({"row": [f"other {number}" for number in range(80)]})):
        pq.write_table(others, path, row_group_size=4)
        with pytest.raises(UserError, match=r"rows\.parquet: was replaced while it was read"):
            RowReader(groups, 8, ["row"]).read(79)


def test_a_file_s_footer_is_read_once_for_all_its_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"row": range(80)}), tmp_path / "rows.parquet", row_group_size=4)
    groups = groups_of(tmp_path / "rows.parquet")
    footers = []
    opened = pq.ParquetFile
    monkeypatch.setattr(
        pq, "ParquetFile", lambda source, metadata: (footers.append(metadata), opened(source, metadata=metadata))[1]
    )
    reader = RowReader(groups, 8, ["row"])
    assert [reader.read(row)["row"] for row in range(0, 80, 3)] == [*range(0, 80, 3)]
    assert footers[0] is None and len(footers) == 20 and None not in footers[1:]


def test_rows_that_refer_to_their_image_need_its_root(tmp_path: Path) -> None:
    embedded, referring = scene_rows(1), scene_rows(1, embed=False)
    sample = Sample("crayon", 0, (0,))
    with pytest.raises(UserError, match="refer to their images"):
        dataset(tmp_path, referring).example(sample)
    (tmp_path / referring[0].image_path).write_bytes(embedded[0].image_bytes or b"")
    found = dataset(tmp_path, referring, image_root=tmp_path).example(sample)
    assert torch.equal(found.pixel_values, dataset(tmp_path, embedded).example(sample).pixel_values)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_is_gone_ends_the_run_and_costs_no_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def refused() -> UserError:
        loader = build_loader(examples, [[Sample("crayon", 0, (0,))]], workers, pin_memory=False)
        with pytest.raises(UserError) as refusal:
            next(loader)
        assert refusal.value.exit_status == 1
        return refusal.value

    (root := tmp_path / "pictures").mkdir()
    examples = dataset(tmp_path, scene_rows(1, embed=False), image_root=root)
    assert str(refused()) == f"{root}: there is no file; is the disk of the images mounted?"
    root.rmdir()
    assert str(refused()) == f"{root}: there is no file; is the disk of the images mounted?"
    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(stale))
        assert str(refused()) == f"{root / 'scene-000.jpg'}: {os.strerror(errno.ESTALE)}"
    (tmp_path / "rows.parquet").unlink()
    examples = ExampleDataset(examples.index, PROCESSOR, root)
    assert str(refused()).startswith(f"{tmp_path / 'rows.parquet'}: cannot be read as Parquet (")


def test_a_name_too_long_for_a_file_costs_its_sample(tmp_path: Path) -> None:
    row = replace(scene_rows(1, embed=False)[0], image_path="x" * 300)
    skipped = dataset(tmp_path, [row], image_root=tmp_path)[Sample("crayon", 0, (0,))]
    assert isinstance(skipped, Skipped) and skipped.reason == "unreadable_file"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_whose_image_is_not_there_is_skipped_and_named(tmp_path: Path, workers: int) -> None:
    examples = dataset(tmp_path, scene_rows(1, embed=False), image_root=tmp_path)
    loader = build_loader(examples, [[Sample("crayon", 0, (0,))]], workers, pin_memory=False)
    (skipped,) = next(loader).skipped
    assert skipped[:3] == ("crayon", "scene-000", "missing_file")
    assert skipped.detail == f"{tmp_path / 'scene-000.jpg'}: there is no such file"


def test_a_worker_that_dies_is_told_of_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExampleDataset, "example", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    loader = build_loader(dataset(tmp_path, scene_rows(1)), [[Sample("crayon", 0, (0,))]], 1, pin_memory=False)
    with pytest.raises(UserError, match=r"^one of 1 processes that read the data died .*use fewer workers[^\n]*$"):
        next(loader)


def test_the_sample_that_takes_most_memory_is_found_by_its_tokens(tmp_path: Path) -> None:
    turns = lambda question, answer: (("human", question), ("gpt", answer))  # noqa: E731
    dialogues = Dialogue("asks", turns("one two " * 30, "no")), Dialogue("tells", turns("Why?", "one two " * 20))
    examples = dataset(tmp_path, [replace(scene_rows(1)[0], conversations=dialogues)])
    asks, tells = (Sample("dialogue", 0, (number,), 100) for number in (0, 1))
    longest, most_supervised = examples.longest([asks, tells]), examples.longest([asks, tells], supervised_weight=9)
    assert longest is not None and most_supervised is not None
    assert longest[0] == asks and most_supervised[0] == tells
    assert longest[1] > most_supervised[1] and longest[2] < most_supervised[2]


def test_workers_give_the_batches_of_the_plan_in_order(tmp_path: Path) -> None:
    examples = dataset(tmp_path, scene_rows(4))
    samples = [[Sample("crayon", row, (0, 1))] for row in (2, 0, 1)]
    apart = [examples.collate_or_error([examples[s] for s in piece]) for piece in samples]
    loaded = list(build_loader(examples, samples, workers=2, pin_memory=False))
    assert [piece.image_ids for piece in loaded] == [["scene-002"], ["scene-000"], ["scene-001"]]
    for one, other in zip(loaded, apart, strict=True):
        assert one.inputs.keys() == other.inputs.keys()
        assert all(torch.equal(one.inputs[name], other.inputs[name]) for name in one.inputs)
