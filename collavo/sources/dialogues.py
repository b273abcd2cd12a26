"""Dialogues about images, as the field stores them, read as a stream.

    LLaVA, ShareGPT4V       a JSON list of `{id, image?, conversations: [{from: human|gpt, value}]}`
    Cambrian                the same, one entry a line (JSONL)
    ms-swift, TRL           `messages: [{role: user|assistant|system, content}]`, `images: [path]`
    Cauldron, FineVision    `texts: [{user, assistant}]`
    Parquet                 any of them as JSON text, or as `{from: [...], value: [...]}`

Turns are kept verbatim under LLaVA's names, `system`, `human` and `gpt`. A system turn stays where it stands, first;
a `gpt` turn before the first question is dropped, as LLaVA's own trainer does. A dialogue whose turns do not alternate
after that is one reject: nobody knows what answers what. The 665k mix is larger than a gigabyte, so nothing is loaded
whole.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice, zip_longest
from typing import Any, BinaryIO, NamedTuple

import ijson

from collavo.errors import Rejected, UserError
from collavo.sources import fault_in_json, parsed_json
from collavo.sources.image_paths import is_image_name, is_utf8
from schemas.crayon_row import IMAGE_TOKEN, Dialogue

SPEAKERS = {
    "human": "human", "user": "human", "usr": "human",
    "gpt": "gpt", "assistant": "gpt", "model": "gpt", "bot": "gpt", "chatgpt": "gpt",
    "system": "system",
}  # fmt: skip
"""LLaVA's name of each speaker."""

_IMAGE_PARTS = ("image", "image_url", "input_image")
"""What the `type` of a part that is an image may be."""

_PLACE = re.compile(f"{IMAGE_TOKEN}|<img>[^<]+</img>")
"""Where an image stands in a text; the second as Qwen-VL's data have it, with its path."""

_LIST_KEYS = ("data", "annotations")
"""Where the list of entries stands in a JSON file that is an object."""


class DialogueEntry(NamedTuple):
    """A dialogue; `image` is the path of its image below the image root as the file states it, None for text alone."""

    image: str | None
    dialogue: Dialogue


def stream_dialogues(file: BinaryIO, name: str) -> Iterator[DialogueEntry | Rejected]:
    """Yield all entries of a file, in order; an unusable one comes as the error that says why.

    Args:
        file: open, seekable, plain UTF-8; see `collavo.sources.json_files.open_json`.
        name: its path, for messages.

    Raises:
        UserError: if the file is neither a JSON list to its end nor JSON lines, or holds no entries.
    """
    position = -1
    for position, record in enumerate(_records(file, name)):
        try:
            yield record if isinstance(record, Rejected) else _entry(record, position)
        except Rejected as error:
            yield error
        except RecursionError:  # where a message would show what was found
            yield Rejected("malformed_entry", "nested too deeply", f"#{position}")
    if position < 0:
        raise UserError(f"{name}: no entries; expected a JSON list, or JSON lines, of objects with 'conversations'")


def dialogue_of(fields: Mapping[str, Any], entry_id: str) -> Dialogue:
    """Return the dialogue in `conversations` or `messages` of an entry.

    Raises:
        Rejected: `malformed_entry` or `turns_do_not_alternate`.
    """
    said = listed_turns(fields)
    if not said:
        found = f"found only {', '.join(map(repr, fields))}" if fields else "found none"
        detail = f"expected an object with turns in 'conversations', 'messages' or 'texts', {found:.200}"
        raise Rejected("malformed_entry", detail, entry_id)
    turns = _turns(said, entry_id)
    system = fields.get("system")  # beside the turns, where LLaMA-Factory has it
    if isinstance(system, str) and system.strip() and turns[0][0] != "system":
        turns = (("system", system), *turns)
    if not all(map(is_utf8, (entry_id, *(value for _, value in turns)))):
        raise Rejected("malformed_entry", "half of a surrogate pair, which JSON can hold, is no text", entry_id)
    return Dialogue(entry_id, turns)


def listed_turns(fields: Mapping[str, Any]) -> list[Any]:
    """Return the turns of an entry as it has them; none where they are no list, or texts that nobody says."""
    said = _listed(fields.get("conversations") or fields.get("messages"))
    pairs = [pair for pair in _listed(fields.get("texts")) if isinstance(pair, dict) and "assistant" in pair]
    return said or [
        {"from": speaker, "value": pair.get(speaker)} for pair in pairs for speaker in ("user", "assistant")
    ]


def _listed(said: Any) -> list[Any]:
    if isinstance(said, str):
        with suppress(ValueError):
            said = parsed_json(said)
    if isinstance(said, dict) and all(isinstance(column, list) for column in said.values()):
        # What `datasets` made of a list of turns before its version 4: a struct of lists.
        said = [dict(zip(said, turn, strict=True)) for turn in zip_longest(*said.values())]
    return said if isinstance(said, list) else []


def _records(file: BinaryIO, name: str) -> Iterator[Any]:
    file.seek(0)
    first = file.read(1)
    while first.isspace():
        first = file.read(1)
    if not first:
        return
    if first != b"[" and _is_json_lines(file):
        yield from _lines(file)
        return
    done = 0
    try:
        for prefix in ("item",) if first == b"[" else [f"{key}.item" for key in _LIST_KEYS]:
            file.seek(0)
            for record in ijson.items(file, prefix):
                done += 1
                yield record
            if done:
                return
    except ijson.JSONError as error:
        place = f"after {done} entries" if done else "after 0 entries; expected a JSON list, or an entry in each line"
        raise UserError(f"{name}: not JSON to its end, {place} ({fault_in_json(error)})") from error


def _is_json_lines(file: BinaryIO) -> bool:
    """Tell whether one of the first two lines is an entry, as which the other one may be damaged, or both are objects.

    A file with one key `data` begins alike, and may have an entry in its second line; its first line ends open.
    """
    file.seek(0)
    objects = 0
    for line in islice((line for line in map(bytes.strip, file) if line), 2):
        with suppress(ValueError):
            record = parsed_json(line)
            if isinstance(record, dict):
                if listed_turns(record):
                    return True
                objects += not any(isinstance(record.get(key), list) for key in _LIST_KEYS)
        if line.endswith((b"{", b"[", b":", b",")):
            return False
    return objects == 2


def _lines(file: BinaryIO) -> Iterator[Any]:
    """Yield what the lines hold; for one that is not JSON, the reject."""
    file.seek(0)
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield parsed_json(line)
        except ValueError as error:
            yield Rejected("malformed_entry", f"line {number} is not JSON ({error})", f"line {number}")


def _entry(record: Any, position: int) -> DialogueEntry:
    fields = record if isinstance(record, dict) else {}
    entry_id = f"#{position}" if fields.get("id") is None else str(fields["id"])
    if fields.get("video") or fields.get("videos"):
        raise Rejected("malformed_entry", "the entry is about a video", entry_id)
    image, dialogue = _image(fields, entry_id), dialogue_of(fields, entry_id)
    if not image:
        named = (f"{key!r} names one" for key, value in fields.items() if key != "id" and _names_image(value))
        place = f"{IMAGE_TOKEN} or <img> in the text" if asks_about_image(dialogue) else None
        if about_one := next(named, place):
            raise Rejected("malformed_entry", f"{about_one}, but no path in 'image' or 'images'", entry_id)
    return DialogueEntry(image, dialogue)


def _names_image(value: Any) -> bool:
    return any(isinstance(one, str) and is_image_name(one) for one in (value if isinstance(value, list) else [value]))


def asks_about_image(dialogue: Dialogue) -> bool:
    """Tell whether an image has a place in the text of a dialogue."""
    return any(speaker == "human" and _PLACE.search(value) for speaker, value in dialogue.turns)


def _image(fields: dict[str, Any], entry_id: str) -> str | None:
    named = fields.get("image") or fields.get("images") or _images_in_parts(fields) or None
    images = named if isinstance(named, list) else [named]
    if len(images) > 1:
        raise Rejected("several_images", f"the entry names {len(images)} images, a row holds one", entry_id)
    image = _path_in(images[0])
    if image is None and isinstance(images[0], dict) and any(images[0].values()):
        raise Rejected("malformed_entry", f"expected the path of an image, found {str(images[0])[:80]}", entry_id)
    if image is not None and not isinstance(image, str):
        raise Rejected("malformed_entry", f"expected a path as 'image', found {str(image)[:80]}", entry_id)
    if image and image.startswith("data:"):
        raise Rejected("malformed_entry", "the image is in the text, as base64; save it as a file", entry_id)
    return image


def _path_in(image: Any) -> Any:
    """Return what names an image: itself, or the path or URL of an object."""
    return image.get("path") or image.get("url") if isinstance(image, dict) else image


def _images_in_parts(fields: dict[str, Any]) -> list[Any]:
    """Return the paths that parts of turns hold: `{"type": "image", "image": PATH}`, or OpenAI's `image_url`."""
    named: list[Any] = []
    for turn in listed_turns(fields):
        content = (turn.get("content") or turn.get("value")) if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") in _IMAGE_PARTS:
                one = next(filter(None, map(part.get, ("image", "image_url", "path", "url"))), None)
                named.append(_path_in(one))
    return list(filter(None, named))


def _turns(said: list[Any], entry_id: str) -> tuple[tuple[str, str], ...]:
    turns = [_turn(turn, entry_id) for turn in said]
    first = 1 if turns[0][0] == "system" else 0
    if len(turns) > first and turns[first][0] == "gpt":
        del turns[first]
    speakers = [speaker for speaker, _ in turns[first:]]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        found = ", ".join(speaker for speaker, _ in turns[:6]) or "an answer alone"
        raise Rejected("turns_do_not_alternate", f"expected human and gpt in turn, found {found}", entry_id)
    return tuple(turns)


def _turn(turn: Any, entry_id: str) -> tuple[str, str]:
    fields = turn if isinstance(turn, dict) else {}
    # Parquet has every key in every turn, and null where the turn has none.
    speaker = SPEAKERS.get(str(fields.get("from") or fields.get("role")).lower())
    value = fields["value"] if fields.get("value") is not None else fields.get("content")
    if isinstance(value, list):
        parts = [_part(part) for part in value]
        value = None if None in parts else "".join(map(str, parts))
    if speaker is None or not isinstance(value, str):
        detail = f"expected turns with 'from' and 'value', or 'role' and 'content', found {str(turn)[:80]}"
        raise Rejected("malformed_entry", detail, entry_id)
    if speaker == "gpt" and not value.strip():
        raise Rejected("malformed_entry", "an answer without text, which a model would learn to give", entry_id)
    return speaker, value


def _part(part: Any) -> str | None:
    """Return the text of one of OpenAI's parts, `<image>` for an image that the entry names beside; else None."""
    fields = part if isinstance(part, dict) else {"text": part}
    if fields.get("type") in _IMAGE_PARTS:
        return IMAGE_TOKEN
    text = fields.get("text")
    return text if isinstance(text, str) else None
