"""Crayon rows as other trainers read them: which conversations a row makes, and a writer for each format.

    llava          train.json (LLaVA's list of conversations), images/
    jsonl          train.jsonl (a row per line, all columns), images/, panoptic/
    trl            train-00000.parquet, ... with `images` and `messages`
    llamafactory   train.jsonl (ShareGPT turns), dataset_info.json that declares it as `crayon`, images/
    swift          train.jsonl with `images` and `messages`, images/

Rows that are there to validate go to files of their own, `validation` in place of `train`, so that nobody trains on
them by oversight; LLaMA-Factory has them declared as `crayon_validation`.

All but jsonl hold conversations, each about one image with exactly one `<image>`, or about none. A dialogue of a row
stays verbatim, save that `<image>` is put before its first question if it is about an image and has none, and that
LLaVA's reader, which stops at a system turn and brings a text of its own, gets none. The
instructions of a row make one conversation per task: all in one would give answers away, since a listing names what
other questions ask; one each would cost, since trainers encode the image, and TRL's Parquet holds it, once per
conversation. Questions of one task are about different objects and do not answer each other.

Rules of the readers: LLaVA's `train.py`, TRL 1.16's `DataCollatorForVisionLanguageModeling` and
`prepare_multimodal_messages`, LLaMA-Factory 0.9.5's `SharegptDatasetConverter` and `_validate_messages`, ms-swift
4.6's `MessagesPreprocessor` and `load_image`.
"""

import errno
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import jsonlines
import pyarrow as pa

from collavo.errors import Rejected
from collavo.parquet_writer import BYTES_PER_GROUP, RowGroupWriter
from collavo.sources.image_paths import checked_relative
from schemas.crayon_row import IMAGE_TOKEN, SPLITS, CrayonRow

Turns = tuple[tuple[str, str], ...]
"""(`human` | `gpt`, text) in order, after a `system` turn where a dialogue has one."""

# A list is described as `[...]`, which every version of `datasets` reads; versions below 4 do not know `List`.
_TRL_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("dialogue_id", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": {"images": [{"_type": "Image"}]}}})},
)
_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_BYTES_PER_FILE = 400 << 20


class ExportedImage(NamedTuple):
    """An encoded image, its bytes unchanged."""

    name: str
    """Its path, with the extension of its true format."""

    data: bytes


class Entry(NamedTuple):
    """One conversation."""

    id: str
    """The row's `image_id` with `#counting`, ... for instructions and `#0`, `#1`, ... for dialogues."""

    dialogue_id: str | None
    """A dialogue's own id, which need not be unique; None for instructions."""

    turns: Turns


Append = Callable[[dict[str, Any]], object]
"""Adds a record to a file."""

WriteRow = Callable[[CrayonRow, ExportedImage | None, Sequence[Entry]], None]
"""Writes a row with its image, or without one if its dialogues are about none."""


def entries_of(row: CrayonRow, what: str = "all") -> Iterator[Entry]:
    """Make conversations of a row.

    Args:
        what: `instructions`, `conversations` (its dialogues as they are) or `all`.
    """
    if what != "conversations":
        for task in dict.fromkeys(instruction.task for instruction in row.instructions):
            asked = [instruction for instruction in row.instructions if instruction.task == task]
            turns = tuple(turn for i in asked for turn in (("human", i.question), ("gpt", i.answer)))
            yield Entry(f"{row.image_id}#{task}", None, turns)
    if what != "instructions":
        for position, dialogue in enumerate(row.conversations):
            yield Entry(f"{row.image_id}#{position}", dialogue.id, dialogue.turns)


def fault_of(turns: Turns, to: str, has_image: bool = True) -> str | None:
    """Say in one word why a reader of the format `to` would refuse or misread these turns; None if it would not."""
    said = without_system(turns)
    if not said or [speaker for speaker, _ in said] != ["human", "gpt"] * (len(said) // 2):
        return "turns_do_not_alternate"
    questions = "\n".join(text for speaker, text in turns if speaker == "human")
    others = "\n".join(text for speaker, text in turns if speaker != "human")
    if IMAGE_TOKEN in others:
        return "image_token_outside_question"
    if questions.count(IMAGE_TOKEN) > has_image:
        return "several_image_tokens" if has_image else "image_token_without_image"
    if to in ("llamafactory", "swift") and any(token in questions + others for token in ("<video>", "<audio>")):
        return "video_or_audio_token"
    return None


def with_image_token(turns: Turns) -> Turns:
    """Put `<image>` before the first question if no turn has it."""
    if any(IMAGE_TOKEN in text for _, text in turns):
        return turns
    (speaker, question), *rest = without_system(turns)
    return (*turns[: -len(rest) - 1], (speaker, f"{IMAGE_TOKEN}\n{question}"), *rest)


def without_system(turns: Turns) -> Turns:
    """Take the system turn away, which comes first where there is one."""
    return turns[1:] if turns and turns[0][0] == "system" else turns


@contextmanager
def _json_list(path: Path) -> Iterator[Append]:
    with open(path, "w", encoding="utf-8") as file:
        separators = chain(["[\n"], repeat(",\n"))
        yield lambda record: file.write(next(separators) + json.dumps(record))
        file.write("\n]\n")


@contextmanager
def _json_lines(path: Path) -> Iterator[Append]:
    with jsonlines.open(path, "w") as lines:
        yield lines.write


@contextmanager
def _by_split(
    folder: Path, extension: str, open_file: Callable[[Path], AbstractContextManager[Append]] = _json_lines
) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Open a file for each split when its first record comes; yield what takes a split and a record of it."""
    with ExitStack() as stack:
        opened: dict[str, Append] = {}

        def append(split: str, record: dict[str, Any]) -> None:
            if split not in opened:
                opened[split] = stack.enter_context(open_file(folder / f"{split}.{extension}"))
            opened[split](record)

        yield append


@contextmanager
def _llava(folder: Path) -> Iterator[WriteRow]:
    with _by_split(folder, "json", _json_list) as append:

        def write(row: CrayonRow, image: ExportedImage | None, entries: Sequence[Entry]) -> None:
            # LLaVA tells entries about no image by the key that they lack.
            about = {"image": _save(folder, "images", image.name, image.data)} if image else {}
            for entry in entries:
                append(row.split, {**_record(entry), **about})

        yield write


@contextmanager
def _jsonl(folder: Path) -> Iterator[WriteRow]:
    """Write the columns as they are, but `image` and `panoptic_map` name files; `image_path` is the row's path."""
    with _by_split(folder, "jsonl") as append:

        def write(row: CrayonRow, image: ExportedImage | None, entries: Sequence[Entry]) -> None:
            files: dict[str, str | None] = {"image": None, "panoptic_map": None}
            if row.panoptic_png:
                map_name = f"{checked_relative(row.image_id)}.png"
                files["panoptic_map"] = _save(folder, "panoptic", map_name, row.panoptic_png)
            if image:
                files["image"] = _save(folder, "images", image.name, image.data)
            append(row.split, {**row.as_record(), **files, "image_path": row.image_path})

        yield write


@contextmanager
def _llamafactory(folder: Path) -> Iterator[WriteRow]:
    declaration = {  # of lines, since of a JSON list the reader would load the whole into memory
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "images": "images"},
        "tags": {
            **{"role_tag": "from", "content_tag": "value"},
            **{"system_tag": "system", "user_tag": "human", "assistant_tag": "gpt"},
        },
    }
    with _by_split(folder, "jsonl") as append:

        def write(row: CrayonRow, image: ExportedImage | None, entries: Sequence[Entry]) -> None:
            images = [_save(folder, "images", image.name, image.data)] if image else []
            for entry in entries:
                append(row.split, {**_record(entry), "images": images})

        yield write
    declared = {
        f"crayon{suffix}": {"file_name": f"{split}.jsonl", **declaration}
        for split, suffix in (("train", ""), ("validation", "_validation"))
        if (folder / f"{split}.jsonl").exists()
    }
    (folder / "dataset_info.json").write_text(json.dumps(declared, indent=2) + "\n")


@contextmanager
def _trl(folder: Path) -> Iterator[WriteRow]:
    with ExitStack() as stack:
        files = {split: stack.enter_context(closing(_TrlFiles(folder, split))) for split in SPLITS}

        def write(row: CrayonRow, image: ExportedImage | None, entries: Sequence[Entry]) -> None:
            images = [{"bytes": image.data, "path": image.name}] if image else []
            for entry in entries:
                messages = [{"role": _ROLES[s], "content": _without_image_token(text)} for s, text in entry.turns]
                record = {"id": entry.id, "dialogue_id": entry.dialogue_id, "images": images, "messages": messages}
                files[row.split].write(record, len(image.data) if image else 0)

        yield write


@contextmanager
def _swift(folder: Path) -> Iterator[WriteRow]:
    with _by_split(folder, "jsonl") as append:

        def write(row: CrayonRow, image: ExportedImage | None, entries: Sequence[Entry]) -> None:
            images = [_save(folder, "images", image.name, image.data)] if image else []
            for entry in entries:
                messages = [{"role": _ROLES[speaker], "content": text} for speaker, text in entry.turns]
                append(row.split, {"id": entry.id, "messages": messages, "images": images})

        yield write


class _TrlFiles:
    """The Parquet files of one split; `datasets` tells splits apart by the files' names."""

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._writer: RowGroupWriter | None = None
        self._path = folder
        self._files = 0

    def write(self, record: dict[str, Any], image_bytes: int) -> None:
        if self._writer is None:
            self._path = self._folder / f"{self._split}-{self._files:05d}.parquet"
            # The conversations about an image share its bytes in a dictionary, if that holds all images of a group.
            self._writer = RowGroupWriter(
                self._path,
                _TRL_SCHEMA,
                raw=["images.list.element.bytes"],
                dictionary_pagesize_limit=2 * BYTES_PER_GROUP,
            )
            self._files += 1
        self._writer.write(record, image_bytes)
        if self._path.stat().st_size >= _BYTES_PER_FILE:
            self.close()

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None


FORMATS: dict[str, Callable[[Path], AbstractContextManager[WriteRow]]] = {
    "llava": _llava,
    "jsonl": _jsonl,
    "trl": _trl,
    "llamafactory": _llamafactory,
    "swift": _swift,
}
"""A writer per format: given a folder, it takes rows with their image and entries until it is closed."""


DATA_FILES = {
    "llava": "{split}.json",
    "jsonl": "{split}.jsonl",
    "llamafactory": "{split}.jsonl",
    "trl": "{split}-*.parquet",
    "swift": "{split}.jsonl",
}
"""What `load_dataset` reads of each format, by split."""


def _record(entry: Entry) -> dict[str, Any]:
    turns = [{"from": speaker, "value": text} for speaker, text in entry.turns]
    return {"id": entry.id, "dialogue_id": entry.dialogue_id, "conversations": turns}


def _without_image_token(text: str) -> str:
    """Take `<image>` out of a text; TRL itself puts the image before the first question."""
    return text.replace(IMAGE_TOKEN, "").strip() if IMAGE_TOKEN in text else text


def _save(folder: Path, kind: str, name: str, data: bytes) -> str:
    """Write a file below `folder`, and return its path relative to it.

    Raises:
        Rejected: `bad_path` for a name that is too long for the disk, as one with `.png` behind it may be.
    """
    path = folder / kind / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise Rejected("bad_path", f"{kind}/{name}: too long a name for a file") from error
        raise
    return f"{kind}/{name}"
