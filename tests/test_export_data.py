"""Each export is loaded back by the rules of its reader; nothing is lost unsaid, nor anything else touched."""

import io
import json
from dataclasses import replace
from pathlib import Path

import datasets
import jsonlines
import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageDraw

from collavo.export_data import main
from collavo.export_formats import DATA_FILES, FORMATS, IMAGE_TOKEN, fault_of, with_image_token
from collavo.instructions.choose import ClassStatistics
from collavo.instructions.phrasebook import load_phrasebook
from collavo.instructions.write import InstructionOptions, write_instructions
from collavo.panoptic.index_png import encode_index_map
from collavo.panoptic.maps import SegmentInfo, build_panoptic_map
from collavo.parquet_writer import CrayonFileWriter
from schemas.categories import COCO_PANOPTIC
from schemas.crayon_row import SPLITS, TASKS, CrayonRow, Dialogue

PERSON, CAR, SKY = 0, 2, 119

FRONT = Dialogue(
    "d1", (("human", "<image>\nWho is here?"), ("gpt", " Two people. "), ("human", "Sure?"), ("gpt", "Ja."))
)
AT_END = Dialogue("d1", (("human", "How bright is it?\n<image>"), ("gpt", "Very: 明るい <b>.")))
WITHOUT = Dialogue("d2", (("human", "What is it?"), ("gpt", "A car.")))
LATER = Dialogue("d3", (("human", "Hello."), ("gpt", "Hello!"), ("human", "And <image> this?"), ("gpt", "Sky.")))
TWICE = Dialogue("d4", (("human", "<image><image> Which?"), ("gpt", "Both.")))
IN_ANSWER = Dialogue("d5", (("human", "Draw it."), ("gpt", "<image>")))
ONE_SIDED = Dialogue("d6", (("human", "<image>"), ("human", "Hello?")))
UNANSWERED = Dialogue("d7", (("human", "<image> Well?"),))
VIDEO = Dialogue("d8", (("human", "<image> Is this a <video>?"), ("gpt", "No.")))
AUDIO = Dialogue("d9", (("human", "<image> What is heard?"), ("gpt", "See <audio>.")))
USABLE, UNUSABLE = (FRONT, AT_END, WITHOUT, LATER), (TWICE, IN_ANSWER, ONE_SIDED, UNANSWERED)


def drawn(format: str = "JPEG", seed: int = 0, orientation: int = 1) -> bytes:
    image = Image.new("RGB", (48, 32), (90, 40 + seed, 200))
    ImageDraw.Draw(image).ellipse((4 + seed, 4, 24 + seed, 24), fill=(250, 220, 30))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    image.save(file, format, exif=exif) if orientation != 1 else image.save(file, format)
    return file.getvalue()


def a_row(image_id: str, image: bytes | None = None, path: str = "", split: str = "train", **columns) -> CrayonRow:
    ids = np.zeros((32, 48), dtype=np.int32)
    ids[:8], ids[10:30, 5:20], ids[10:20, 25:40], ids[22:30, 22:46] = 1, 2, 3, 4
    infos = [SegmentInfo(1, SKY), SegmentInfo(2, PERSON), SegmentInfo(3, PERSON), SegmentInfo(4, CAR)]
    panoptic = build_panoptic_map(ids, infos)
    statistics = ClassStatistics.of(len(COCO_PANOPTIC.things))
    statistics.add_image(range(12))
    row = CrayonRow(
        image_id=image_id,
        image_sha256="0" * 64,
        image_bytes=image,
        image_path=path or f"{image_id}.jpg",
        width=48,
        height=32,
        sources=("coco", "llava"),
        license_id=None,
        split=split,
        panoptic_png=encode_index_map(panoptic),
        segments=panoptic.segments,
        instructions=write_instructions(
            image_id, (48, 32), panoptic.segments, COCO_PANOPTIC, load_phrasebook(), statistics, InstructionOptions()
        ),
    )
    return replace(row, **columns)


def some_rows() -> list[CrayonRow]:
    return [
        a_row("coco/train/1", drawn("JPEG", 1), conversations=USABLE),
        a_row("coco/train/2", drawn("PNG", 2), path="coco/train/2.jpg", conversations=UNUSABLE),  # a PNG named .jpg
        a_row("v1.5/a b", drawn("GIF", 3), split="validation", conversations=(WITHOUT, WITHOUT)),
        a_row("empty", drawn("WEBP", 4), split="validation", instructions=()),
    ]


def stored(tmp_path: Path, rows: list[CrayonRow]) -> str:
    folder = tmp_path / "data"
    folder.mkdir()
    writer = CrayonFileWriter((folder / "crayon-00000-of-00001.parquet").open("wb"), {}, COCO_PANOPTIC)
    for row in rows:
        writer.write(row)
    writer.close({})
    return str(folder)


def export(tmp_path: Path, to: str, rows: list[CrayonRow], *flags: str) -> Path:
    output = tmp_path / to
    assert main(["--data", stored(tmp_path, rows), "--to", to, "--output", str(output), *flags]) == 0
    assert not list(output.glob(".*"))
    return output


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The line in which the command refuses."""
    try:
        status = main(argv)
    except SystemExit as error:  # argparse's
        status = error.code
    assert status == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line.removeprefix("collavo.export_data: error: ")


def accounts(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The summary: `rows` -> `4   train 2, validation 1, ...`."""
    lines = capsys.readouterr().out.splitlines()[:-1]
    return {line[:22].strip(): line[22:].strip() for line in lines}


def records_in(output: Path, to: str, split: str) -> list[dict]:
    """What an export in JSON or JSON lines holds of a split."""
    path = output / DATA_FILES[to].format(split=split)
    return json.loads(path.read_bytes()) if to == "llava" else [*jsonlines.open(path)]


def pairs(turns: list[str]) -> list[tuple[str, str]]:
    return list(zip(turns[::2], turns[1::2], strict=True))


# Formats, by the rules of their readers


def test_llava_loads_every_entry_with_its_image_and_one_token(tmp_path):
    output = export(tmp_path, "llava", some_rows())
    entries = [entry for split in SPLITS for entry in records_in(output, "llava", split)]
    assert len({entry["id"] for entry in entries}) == len(entries)
    for entry in entries:
        Image.open(output / entry["image"]).convert("RGB")  # as LLaVA opens it: os.path.join(image_folder, image)
        speakers, texts = zip(*((turn["from"], turn["value"]) for turn in entry["conversations"]), strict=True)
        assert speakers == ("human", "gpt") * (len(speakers) // 2)
        assert "".join(texts).count("<image>") == 1
        if entry["dialogue_id"] is None:
            assert texts[0].startswith("<image>\n")


def test_dialogues_stay_verbatim_but_for_a_token_they_lack(tmp_path, capsys):
    output = export(tmp_path, "llava", some_rows(), "--what", "conversations")
    entries = [entry for split in SPLITS for entry in records_in(output, "llava", split)]
    found = [(e["dialogue_id"], tuple((t["from"], t["value"]) for t in e["conversations"])) for e in entries]
    lacking = (("human", "<image>\nWhat is it?"), WITHOUT.turns[1])
    expected = [(d.id, d.turns) for d in (FRONT, AT_END, replace(WITHOUT, turns=lacking), LATER)]
    assert found == expected + [(WITHOUT.id, lacking)] * 2
    account = accounts(capsys)
    assert account["rows"].split(maxsplit=1) == ["4", "train 1, validation 1, without_entries 2"]
    assert account["entries"].split(maxsplit=1) == ["6", "conversations 6"]
    assert account["changed conversations"].split(maxsplit=1) == ["3", "image_token_added 3"]
    reasons = "image_token_outside_question 1, several_image_tokens 1, turns_do_not_alternate 2"
    assert account["skipped entries"].split(maxsplit=1) == ["4", reasons]


@pytest.mark.parametrize("to", ["llava", "llamafactory", "trl", "swift"])
def test_a_system_turn_goes_to_all_but_llava_which_stops_at_one(to, tmp_path):
    told = Dialogue("d", (("system", "Be brief."), ("human", "What is it?"), ("gpt", "A car.")))
    rows = [a_row("1", drawn(), conversations=(told,)), a_row("2", None, conversations=(told,))]
    none = dict.fromkeys(("image_path", "image_sha256", "panoptic_png", "width", "height"))
    rows[1] = replace(rows[1], **none, segments=(), instructions=())
    output = export(tmp_path, to, rows, "--what", "conversations")
    (file,) = output.glob(DATA_FILES[to].format(split="train"))
    entries = (
        pq.read_table(file).to_pylist()
        if to == "trl"
        else json.loads(file.read_bytes())
        if to == "llava"
        else [*jsonlines.open(file)]
    )
    said = [[(*turn.values(),) for turn in e.get("messages") or e["conversations"]] for e in entries]
    names = ("system", "user", "assistant") if to in ("trl", "swift") else ("system", "human", "gpt")
    expected = [*zip(names, ("Be brief.", "What is it?", "A car."), strict=True)][to == "llava" :]
    with_token = [(speaker, text.replace("What", "<image>\nWhat")) for speaker, text in expected]
    assert said == [expected if to == "trl" else with_token, expected]


@pytest.mark.parametrize("to", ["llava", "llamafactory"])
def test_instructions_make_one_entry_per_task_and_none_is_lost(to, tmp_path):
    rows = some_rows()
    output = export(tmp_path, to, rows, "--what", "instructions")
    entries = {entry["id"]: entry for split in SPLITS for entry in records_in(output, to, split)}
    assert len(entries) == 3 * len(TASKS)
    for row in rows:
        for task in {instruction.task for instruction in row.instructions}:
            turns = [turn["value"] for turn in entries[f"{row.image_id}#{task}"]["conversations"]]
            asked = [(i.question, i.answer) for i in row.instructions if i.task == task]
            assert pairs([turns[0].removeprefix("<image>\n"), *turns[1:]]) == asked


def test_datasets_takes_no_export_for_an_earlier_one_in_a_folder_of_the_same_name(tmp_path):
    for rows in (some_rows(), some_rows()[:1]):
        folder = tmp_path / str(len(rows))
        folder.mkdir()
        output = export(folder, "trl", rows)
        loaded = datasets.load_dataset(str(output), cache_dir=str(tmp_path / "cache"))
        assert sum(map(len, loaded.values())) == sum(pq.read_metadata(f).num_rows for f in output.glob("*.parquet"))


def test_trl_finds_images_and_messages(tmp_path):
    rows = some_rows()
    output = export(tmp_path, "trl", rows)
    loaded = datasets.load_dataset(str(output), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "validation"}
    sizes = set()
    for example in (*loaded["train"], *loaded["validation"]):
        # What TRL's collator does: images from a list, the first user turn gets the placeholders, roles are checked.
        (image,) = example["images"]
        assert isinstance(image, Image.Image)
        sizes.add(image.size)
        roles = [message["role"] for message in example["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(isinstance(message["content"], str) for message in example["messages"])
        assert not any("<image>" in message["content"] for message in example["messages"])
    assert sizes == {(48, 32)}
    conversations = [e for e in loaded["train"] if e["dialogue_id"]]
    contents = [[message["content"] for message in e["messages"]] for e in conversations]
    assert contents[0] == ["Who is here?", " Two people. ", "Sure?", "Ja."]
    assert contents[1][0] == "How bright is it?"
    train = pq.read_table(output / "train-00000.parquet").to_pylist()
    assert {record["images"][0]["bytes"] for record in train} == {row.image_bytes for row in rows[:2]}


def test_trl_stores_an_image_once_for_all_its_entries(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (600, 700, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    output = export(tmp_path, "trl", [a_row("noise", file.getvalue())])
    (path,) = output.glob("*.parquet")
    assert pq.read_metadata(path).num_rows == len(TASKS)
    assert path.stat().st_size < 1.2 * len(file.getvalue())


def test_llamafactory_finds_as_many_images_as_tokens(tmp_path, capsys):
    rows = [replace(row, conversations=(*row.conversations, VIDEO, AUDIO)) for row in some_rows()]
    output = export(tmp_path, "llamafactory", rows)
    declared = json.loads((output / "dataset_info.json").read_text())
    dataset = declared["crayon"]
    assert dataset["formatting"] == "sharegpt"
    columns, tags = dataset["columns"], dataset["tags"]
    files = [str(output / entry["file_name"]) for entry in declared.values()]
    loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 3 * len(TASKS) + len(USABLE) + 2
    for example in loaded:
        messages, images = example[columns["messages"]], example[columns["images"]]
        # Its converter: users on even places, assistants on odd ones, an even number of turns.
        assert len(messages) % 2 == 0
        for position, message in enumerate(messages):
            assert message[tags["role_tag"]] == tags[("user_tag", "assistant_tag")[position % 2]]
        # Its plugin: a placeholder per image, and none for the video and audio that are not there.
        text = "".join(message[tags["content_tag"]] for message in messages)
        assert text.count("<image>") == len(images) == 1
        assert "<video>" not in text
        assert all((output / image).is_file() for image in images)  # media_dir is dataset_dir by default
    assert "video_or_audio_token 8" in accounts(capsys)["skipped entries"]


def test_swift_finds_messages_and_as_many_images_as_tokens(tmp_path):
    output = export(tmp_path, "swift", some_rows())
    entries = {}
    for split in SPLITS:
        with jsonlines.open(output / f"{split}.jsonl") as lines:
            entries[split] = list(lines)
    assert len(entries["train"]) == 2 * len(TASKS) + len(USABLE)
    assert len(entries["validation"]) == len(TASKS) + 2
    for entry in (*entries["train"], *entries["validation"]):
        roles = [message["role"] for message in entry["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert sum(message["content"].count("<image>") for message in entry["messages"]) == len(entry["images"]) == 1
        assert (output / entry["images"][0]).is_file()  # below ROOT_IMAGE_DIR


@pytest.mark.parametrize("to", FORMATS)
def test_dialogues_about_no_image_are_exported_without_one(to, tmp_path, capsys):
    about_nothing = {"image_sha256": None, "image_path": None, "panoptic_png": None, "segments": (), "instructions": ()}
    said = (WITHOUT, replace(FRONT, id="with token"))
    text_only = a_row("mix.json#7", **about_nothing, width=None, height=None, conversations=said)
    output = export(tmp_path, to, [a_row("a", drawn(), instructions=(), conversations=(AT_END,)), text_only])
    account = accounts(capsys)
    assert account["images"].split(maxsplit=1) == ["2", "none 1, written 1"]
    if to == "jsonl":
        _, line = records_in(output, to, "train")
        assert (line["image"], line["panoptic_map"], len(line["conversations"])) == (None, None, 2)
        return
    # A token without an image would stop the reader.
    assert account["skipped entries"].split(maxsplit=1) == ["1", "image_token_without_image 1"]
    files = [str(output / DATA_FILES[to].format(split="train"))]
    kind = "parquet" if to == "trl" else "json"
    loaded = datasets.load_dataset(kind, data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    entry = loaded[1]
    assert not entry.get("images") and not entry.get("image")
    texts = [turn.get("content", turn.get("value")) for turn in entry.get("messages", entry.get("conversations"))]
    assert texts == ["What is it?", "A car."]


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_has_a_card_by_which_datasets_loads_it(to, tmp_path):
    output = export(tmp_path, to, some_rows())
    card = DatasetCard.load(output / "README.md").data
    assert card.license == "other" and card.task_categories and card.size_categories == ["n<1K"]
    loaded = datasets.load_dataset(str(output), cache_dir=str(tmp_path / "cache"))
    rows = sum(split.num_rows for split in loaded.values())
    assert rows == (4 if to == "jsonl" else 3 * len(TASKS) + len(USABLE) + 2)
    for split, seen in loaded.items():
        ids = {row.image_id for row in some_rows() if row.split == split}
        assert {entry["id" if to != "jsonl" else "image_id"].split("#")[0] for entry in seen} <= ids
    assert set(loaded) == set(SPLITS)


def test_llamafactory_is_told_of_the_rows_that_validate_as_of_a_data_set_of_its_own(tmp_path):
    rows = some_rows()
    declared = json.loads((export(tmp_path, "llamafactory", rows) / "dataset_info.json").read_bytes())
    files = {name: entry["file_name"] for name, entry in declared.items()}
    assert files == {"crayon": "train.jsonl", "crayon_validation": "validation.jsonl"}
    (tmp_path / "some").mkdir()
    declared = json.loads((export(tmp_path / "some", "llamafactory", rows[:2]) / "dataset_info.json").read_bytes())
    assert [*declared] == ["crayon"]


def test_a_row_whose_files_could_have_no_name_is_left_out_and_counted(tmp_path, capsys):
    long = "\u753b" * 83 + ".jpg"  # 253 bytes, with .png behind them more than a disk takes
    none = dict.fromkeys(("image_path", "image_sha256", "panoptic_png", "width", "height"))
    talk = replace(a_row("a:b.json#1", None, conversations=(WITHOUT,)), **none, segments=(), instructions=())
    output = export(tmp_path, "jsonl", [a_row(long, drawn()), a_row("a", drawn()), talk])
    assert [record["image_id"] for record in records_in(output, "jsonl", "train")] == ["a", "a:b.json#1"]
    assert accounts(capsys)["rows"].split(maxsplit=1) == ["3", "bad_path 1, train 2"]


def test_jsonl_gives_the_rows_back(tmp_path, capsys):
    rows = some_rows()
    output = export(tmp_path, "jsonl", rows)
    records = [record for split in SPLITS for record in records_in(output, "jsonl", split)]
    for record, row in zip(records, rows, strict=True):
        assert (output / record["image"]).read_bytes() == row.image_bytes
        image = {"bytes": None, "path": record.pop("image_path")}
        panoptic_map = {"bytes": (output / record["panoptic_map"]).read_bytes()}
        record |= {"image": image, "panoptic_map": panoptic_map}
        assert CrayonRow.from_record(record) == replace(row, image_bytes=None)
    assert accounts(capsys)["rows"].split(maxsplit=1) == ["4", "train 2, validation 2"]


speakers = st.sampled_from(["human", "gpt"])
texts = st.text("a<image>\n ", max_size=4) | st.lists(st.sampled_from(["<image>", "\n", "b"]), max_size=3).map("".join)


@given(st.lists(st.tuples(speakers, texts), max_size=4).map(tuple), st.sampled_from(sorted(FORMATS)))
def test_turns_without_fault_hold_one_token_and_are_otherwise_unchanged(turns, to):
    if fault_of(turns, to):
        return
    changed = with_image_token(turns)
    assert sum(text.count(IMAGE_TOKEN) for _, text in changed) == 1
    assert [speaker for speaker, _ in changed] == ["human", "gpt"] * (len(turns) // 2)
    assert changed[1:] == turns[1:]
    assert changed[0][1].removeprefix("<image>\n") in (turns[0][1], turns[0][1].removeprefix("<image>\n"))


# Images


@pytest.mark.parametrize("to", ["llava", "llamafactory", "jsonl"])
def test_image_files_keep_bytes_and_folders_and_carry_their_true_extension(to, tmp_path):
    rows = some_rows()
    output = export(tmp_path, to, [replace(row, conversations=(FRONT,)) for row in rows])
    files = {
        str(path.relative_to(output)): path.read_bytes() for path in (output / "images").rglob("*") if path.is_file()
    }
    names = ("coco/train/1.jpg", "coco/train/2.png", "v1.5/a b.gif", "empty.webp")
    assert files == {f"images/{name}": row.image_bytes for name, row in zip(names, rows, strict=True)}


@pytest.mark.parametrize("to", FORMATS)
def test_images_that_rows_refer_to_come_from_the_root_and_nowhere_else(to, tmp_path, capsys):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a/1.jpg").write_bytes(drawn("PNG"))
    (root / "a/text.jpg").write_text("no image")
    (tmp_path / "secret.jpg").write_bytes(drawn())
    paths = ["a/1.jpg", "a/gone.jpg", "a/text.jpg", "../secret.jpg"]
    output = export(tmp_path, to, [a_row(f"r{i}", path=p) for i, p in enumerate(paths)], "--image_root", str(root))
    account = accounts(capsys)
    assert account["rows"].split(maxsplit=1)[1] == "missing_file 1, not_an_image 1, path_escapes_root 1, train 1"
    assert account["images"].split() == ["1", "written", "1"]
    if to != "trl":
        assert [path.name for path in (output / "images").iterdir()] == ["r0.png"]


@pytest.mark.parametrize("to", FORMATS)
def test_an_image_id_cannot_lead_out_of_the_output(to, tmp_path, capsys):
    rows = [a_row("../../escaped", drawn()), a_row("/escaped", drawn()), a_row("kept", drawn())]
    export(tmp_path, to, rows)
    assert accounts(capsys)["rows"].split(maxsplit=1)[1] == "path_escapes_root 2, train 1"
    assert not list(tmp_path.parent.glob("escaped*"))


def test_images_that_a_reader_would_see_turned_are_told(tmp_path, capsys):
    export(tmp_path, "llava", [a_row("turned", drawn(orientation=6)), a_row("upright", drawn())])
    assert accounts(capsys)["misread images"].split(maxsplit=1) == ["1", "exif_orientation_ignored 1"]


# The command


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_is_exported_alone(split, tmp_path, capsys):
    output = export(tmp_path, "trl", some_rows(), "--split", split)
    assert {path.name for path in output.iterdir()} == {f"{split}-00000.parquet", "README.md"}
    assert "of_another_split 2" in accounts(capsys)["rows"]


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_is_replaced_only_when_asked(to, tmp_path, capsys):
    output = export(tmp_path, "jsonl", some_rows())
    argv = ["--data", str(tmp_path / "data"), "--to", to, "--output", str(output)]
    before = sorted(output.rglob("*"))
    assert "--overwrite" in refusal(capsys, *argv)
    assert sorted(output.rglob("*")) == before
    assert main([*argv, "--overwrite"]) == 0
    assert (output / "panoptic").exists() == (to == "jsonl")


@pytest.mark.parametrize("foreign", ["notes.txt", "crayon-00000-of-00001.parquet", "images/mine.jpg", "README.md"])
def test_what_is_of_no_export_is_never_replaced(foreign, tmp_path, capsys):
    data = stored(tmp_path, some_rows())
    path = tmp_path / "full" / foreign
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    argv = ["--data", data, "--to", "llava", "--output", str(tmp_path / "full"), "--overwrite"]
    assert foreign.split("/")[0] in refusal(capsys, *argv)
    assert path.read_text() == "mine"
    assert [p.name for p in (tmp_path / "full").rglob("*.*")] == [path.name]


@pytest.mark.parametrize("to", FORMATS)
def test_a_failed_export_leaves_nothing_behind(to, tmp_path, capsys):
    data = stored(tmp_path, [a_row("same", drawn()), a_row("same", drawn())])
    line = refusal(capsys, "--data", data, "--to", to, "--output", str(tmp_path / "out"))
    assert "two rows have the image id 'same'" in line
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--to", "llava", "--output", "{tmp}/out"), "image_root must name"),  # rows refer to their images
        (("--to", "llava", "--output", "{tmp}/out", "--image_root", "{tmp}/none"), "there is no such folder"),
        (("--to", "llava", "--output", "{tmp}/out", "--image_root", "{tmp}"), "(missing_file 1)"),
        (("--to", "llava", "--output", "{tmp}/out", "--what", "conversations"), "(without_entries 1)"),
        (("--to", "llava", "--output", "{tmp}/out", "--split", "validation"), "(of_another_split 1)"),
        (("--to", "jsonl", "--output", "{tmp}/out", "--what", "conversations"), "--what conversations: jsonl"),
        (("--to", "trl", "--output", "/proc/out"), "/proc/out: "),
        (("--to", "csv", "--output", "{tmp}/out"), "'csv'"),
        (("--to", "trl", "--output", "{tmp}/data"), "--output: {tmp}/data: holds {tmp}/data/crayon-00000"),
        (("--to", "trl", "--output", "{tmp}/file"), "--output: {tmp}/file: this is a file"),
        (("--to", "trl", "--output", "{tmp}/out", "--data", "{tmp}/nothing"), "{tmp}/nothing: there is no such"),
        (("--to", "trl", "--output", "{tmp}/out", "--splits", "train"), "--splits"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(flags, said, tmp_path, capsys):
    data = stored(tmp_path, [a_row("referring")])
    (tmp_path / "file").touch()
    line = refusal(capsys, "--data", data, *(flag.format(tmp=tmp_path) for flag in flags))
    assert said.format(tmp=tmp_path) in line
