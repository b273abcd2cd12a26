"""LLaVA's conversation format, read as a stream: a JSON list of `{id, image?, conversations: [{from, value}]}`.

The 665k mix is larger than a gigabyte. ShareGPT4V's files have the same shape.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import ijson

from collavo.sources import EntryError, fault_in_json
from schemas.crayon_row import Dialogue

SPEAKERS = ("human", "gpt")


class LlavaEntry(NamedTuple):
    """A dialogue about one image; `image` is the path below the image root as the file states it."""

    image: str
    dialogue: Dialogue


class LlavaFormatError(ValueError):
    """A file is not a JSON list; the message says what was found."""


def stream_entries(file: BinaryIO) -> Iterator[LlavaEntry | EntryError]:
    """All entries of a LLaVA file, in order; an unusable one comes as the error that says why.

    Raises:
        LlavaFormatError: if the file is not one JSON list to its end.
    """
    position = -1
    try:
        for position, record in enumerate(ijson.items(file, "item", use_float=True)):
            try:
                yield _entry(record, position)
            except EntryError as error:
                yield error
    except ijson.JSONError as error:
        place = f"after {position + 1} entries"
        raise LlavaFormatError(f"not a JSON list to its end, {place} ({fault_in_json(error)})") from error
    if position < 0:
        raise LlavaFormatError("no entries: expected a JSON list of objects with 'id', 'image' and 'conversations'")


def _entry(record: Any, position: int) -> LlavaEntry:
    fields = record if isinstance(record, dict) else {}
    entry_id = f"#{position}" if fields.get("id") is None else str(fields["id"])
    turns = fields.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise EntryError(entry_id, "malformed_entry", "expected an object with turns in a list 'conversations'")
    image = fields.get("image")
    if not image:
        raise EntryError(entry_id, "text_only", "the entry names no image")
    images = image if isinstance(image, list) else [image]
    if len(images) > 1:
        raise EntryError(entry_id, "several_images", f"the entry names {len(images)} images, a row holds one")
    if not isinstance(images[0], str):
        raise EntryError(entry_id, "malformed_entry", f"expected a path as 'image', found {str(images[0])[:80]}")
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in SPEAKERS or not isinstance(turn.get("value"), str):
            detail = f"expected turns with 'from' human or gpt and a text 'value', found {str(turn)[:80]}"
            raise EntryError(entry_id, "malformed_entry", detail)
    return LlavaEntry(images[0], Dialogue(entry_id, tuple((turn["from"], turn["value"]) for turn in turns)))
