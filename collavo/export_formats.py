"""Crayon rows as other trainers read them: which conversations a row makes, and a writer for each format.

    llava          llava.json (LLaVA's list of conversations), images/
    jsonl          rows.jsonl (a row per line, all columns), images/, panoptic/
    trl            train-00000.parquet, validation-00000.parquet, ... with `images` and `messages`
    llamafactory   crayon.jsonl (ShareGPT turns), dataset_info.json that declares it as `crayon`, images/

All but jsonl hold entries: an entry is one conversation about one image, with exactly one `<image>` in it. A dialogue
of a row is one, verbatim, but that `<image>` is put before its first question if it stands nowhere. The instructions of
a row make one entry per task. They do not make one together, because a listing would give the other answers away; nor
one each, because readers encode the image, and TRL's Parquet holds it, once per entry. Questions of one task are about
different objects and do not answer each other.

Rules of the readers: LLaVA's `train.py`, TRL 1.16's `DataCollatorForVisionLanguageModeling` and
`prepare_multimodal_messages`, LLaMA-Factory 0.9.5's `SharegptDatasetConverter` and `_validate_messages`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import jsonlines
import pyarrow as pa
import pyarrow.parquet as pq

from collavo.sources.image_paths import checked_relative
from schemas.crayon_row import SPLITS, CrayonRow

IMAGE_TOKEN = "<image>"

Turns = tuple[tuple[str, str], ...]
"""(`human` | `gpt`, text) in order."""

# `[...]` for a list is what every version of `datasets` reads; `List` is unknown to versions below 4.
_TRL_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("dialogue_id", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": {"images": [{"_type": "Image"}]}}})},
)
_TRL_ROLES = {"human": "user", "gpt": "assistant"}
_ENTRIES_PER_GROUP = 100
_BYTES_PER_GROUP = 32 << 20
_BYTES_PER_FILE = 400 << 20


class Picture(NamedTuple):
    """An image as it is exported: `name` is its path with the extension of its true format, `data` its bytes as is."""

    name: str
    data: bytes


class Entry(NamedTuple):
    """One conversation.

    `id` is the row's `image_id` with `#counting`, ... for instructions and `#0`, `#1`, ... for dialogues. A dialogue's
    own id need not be unique and stands in `dialogue_id`, which is None for instructions.
    """

    id: str
    dialogue_id: str | None
    turns: Turns


WriteRow = Callable[[CrayonRow, Picture, Sequence[Entry]], None]


def entries_of(row: CrayonRow, what: str = "all") -> Iterator[Entry]:
    """A row's instructions (an entry per task), its dialogues as they are, or `all`."""
    if what != "conversations":
        for task in dict.fromkeys(instruction.task for instruction in row.instructions):
            asked = [instruction for instruction in row.instructions if instruction.task == task]
            turns = tuple(turn for i in asked for turn in (("human", i.question), ("gpt", i.answer)))
            yield Entry(f"{row.image_id}#{task}", None, turns)
    if what != "instructions":
        for position, dialogue in enumerate(row.conversations):
            yield Entry(f"{row.image_id}#{position}", dialogue.id, dialogue.turns)


def fault_of(turns: Turns, to: str) -> str | None:
    """Why a reader of the format `to` would refuse or misread these turns, as one word; None if it would not."""
    if not turns or [speaker for speaker, _ in turns] != ["human", "gpt"] * (len(turns) // 2):
        return "turns_do_not_alternate"
    questions, answers = ("\n".join(text for _, text in turns[start::2]) for start in (0, 1))
    if IMAGE_TOKEN in answers:
        return "image_token_in_answer"
    if questions.count(IMAGE_TOKEN) > 1:
        return "several_image_tokens"
    if to == "llamafactory" and any(token in questions + answers for token in ("<video>", "<audio>")):
        return "video_or_audio_token"
    return None


def with_image_token(turns: Turns) -> Turns:
    """The turns, with `<image>` before the first question if it stands nowhere."""
    if any(IMAGE_TOKEN in text for _, text in turns):
        return turns
    (speaker, question), *rest = turns
    return ((speaker, f"{IMAGE_TOKEN}\n{question}"), *rest)


@contextmanager
def _llava(folder: Path) -> Iterator[WriteRow]:
    with open(folder / "llava.json", "w", encoding="utf-8") as file:
        separators = chain(["[\n"], repeat(",\n"))

        def write(row: CrayonRow, picture: Picture, entries: Sequence[Entry]) -> None:
            image = _save(folder, "images", picture.name, picture.data)
            for entry in entries:
                file.write(next(separators) + json.dumps({**_record(entry), "image": image}))

        yield write
        file.write("\n]\n")


@contextmanager
def _jsonl(folder: Path) -> Iterator[WriteRow]:
    """The columns as they are, but that `image` and `panoptic_map` name files; `image_path` is the path in the row."""
    with jsonlines.open(folder / "rows.jsonl", "w") as lines:

        def write(row: CrayonRow, picture: Picture, entries: Sequence[Entry]) -> None:
            files = {
                "image": _save(folder, "images", picture.name, picture.data),
                "panoptic_map": _save(folder, "panoptic", f"{checked_relative(row.image_id)}.png", row.panoptic_png),
            }
            lines.write({**row.as_record(), **files, "image_path": row.image_path})

        yield write


@contextmanager
def _llamafactory(folder: Path) -> Iterator[WriteRow]:
    declaration = {
        "file_name": "crayon.jsonl",  # of a JSON list, the reader would hold the whole file in memory
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "images": "images"},
        "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
    }
    with jsonlines.open(folder / "crayon.jsonl", "w") as lines:

        def write(row: CrayonRow, picture: Picture, entries: Sequence[Entry]) -> None:
            images = [_save(folder, "images", picture.name, picture.data)]
            for entry in entries:
                lines.write({**_record(entry), "images": images})

        yield write
    (folder / "dataset_info.json").write_text(json.dumps({"crayon": declaration}, indent=2) + "\n")


@contextmanager
def _trl(folder: Path) -> Iterator[WriteRow]:
    with ExitStack() as stack:
        files = {split: stack.enter_context(closing(_TrlFiles(folder, split))) for split in SPLITS}

        def write(row: CrayonRow, picture: Picture, entries: Sequence[Entry]) -> None:
            images = [{"bytes": picture.data, "path": picture.name}]
            for entry in entries:
                messages = [{"role": _TRL_ROLES[s], "content": _without_image_token(text)} for s, text in entry.turns]
                record = {"id": entry.id, "dialogue_id": entry.dialogue_id, "images": images, "messages": messages}
                files[row.split].write(record, len(picture.data))

        yield write


class _TrlFiles:
    """Parquet files of one split, by whose names `datasets` tells the splits apart."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._finished = 0
        self._writer: pq.ParquetWriter | None = None
        self._records: list[dict[str, Any]] = []
        self._bytes = 0

    def write(self, record: dict[str, Any], image_bytes: int) -> None:
        self._records.append(record)
        self._bytes += image_bytes
        if len(self._records) >= _ENTRIES_PER_GROUP or self._bytes >= _BYTES_PER_GROUP:
            self._flush()

    def close(self) -> None:
        if self._records:
            self._flush()
        if self._writer:
            self._writer.close()

    def _flush(self) -> None:
        path = self._folder / f"{self._split}-{self._finished:05d}.parquet"
        self._writer = self._writer or pq.ParquetWriter(
            path,
            _TRL_SCHEMA,
            compression={"messages.list.element.content": "zstd"},
            dictionary_pagesize_limit=2 * _BYTES_PER_GROUP,  # the entries of an image share its bytes in a dictionary
            write_page_index=True,
        )
        self._writer.write_batch(pa.RecordBatch.from_pylist(self._records, schema=_TRL_SCHEMA))
        self._records, self._bytes = [], 0
        if path.stat().st_size >= _BYTES_PER_FILE:
            self._writer.close()
            self._writer = None
            self._finished += 1


FORMATS: dict[str, Callable[[Path], AbstractContextManager[WriteRow]]] = {
    "llava": _llava,
    "jsonl": _jsonl,
    "trl": _trl,
    "llamafactory": _llamafactory,
}
"""A writer per format: given a folder, it takes rows with their picture and entries until it is closed."""


def _record(entry: Entry) -> dict[str, Any]:
    turns = [{"from": speaker, "value": text} for speaker, text in entry.turns]
    return {"id": entry.id, "dialogue_id": entry.dialogue_id, "conversations": turns}


def _without_image_token(text: str) -> str:
    """A text for TRL, which itself puts the image before the first question."""
    return text.replace(IMAGE_TOKEN, "").strip() if IMAGE_TOKEN in text else text


def _save(folder: Path, kind: str, name: str, data: bytes) -> str:
    """Write a file below `folder`; its path relative to it."""
    path = folder / kind / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return f"{kind}/{name}"
