"""Read LLaVA's conversation format as a stream: a JSON list of `{id, image?, conversations: [{from, value}]}`.

The 665k mix exceeds a gigabyte. ShareGPT4V's files have the same format.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import ijson

from collavo.errors import Rejected, UserError
from collavo.sources import fault_in_json
from schemas.crayon_row import Dialogue

SPEAKERS = ("human", "gpt")


class LlavaEntry(NamedTuple):
    """A dialogue about one image; `image` is its path below the image root, as in the file."""

    image: str
    dialogue: Dialogue


def stream_entries(file: BinaryIO) -> Iterator[LlavaEntry | Rejected]:
    """Yield all entries of a LLaVA file, in order; an unusable entry becomes a `Rejected`.

    Raises:
        UserError: if the file is not one JSON list to its end.
    """
    position = -1
    try:
        for position, record in enumerate(ijson.items(file, "item", use_float=True)):
            try:
                yield _entry(record, position)
            except Rejected as error:
                yield error
    except ijson.JSONError as error:
        place = f"after {position + 1} entries"
        raise UserError(f"not a JSON list to its end, {place} ({fault_in_json(error)})") from error
    if position < 0:
        raise UserError("no entries: expected a JSON list of objects with 'id', 'image' and 'conversations'")


def _entry(record: Any, position: int) -> LlavaEntry:
    fields = record if isinstance(record, dict) else {}
    entry_id = f"#{position}" if fields.get("id") is None else str(fields["id"])
    turns = fields.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise Rejected("malformed_entry", "expected an object with turns in a list 'conversations'", entry_id)
    image = fields.get("image")
    if not image:
        raise Rejected("text_only", "the entry names no image", entry_id)
    images = image if isinstance(image, list) else [image]
    if len(images) > 1:
        raise Rejected("several_images", f"the entry names {len(images)} images, a row holds one", entry_id)
    if not isinstance(images[0], str):
        raise Rejected("malformed_entry", f"expected a path as 'image', found {str(images[0])[:80]}", entry_id)
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in SPEAKERS or not isinstance(turn.get("value"), str):
            detail = f"expected turns with 'from' human or gpt and a text 'value', found {str(turn)[:80]}"
            raise Rejected("malformed_entry", detail, entry_id)
    return LlavaEntry(images[0], Dialogue(entry_id, tuple((turn["from"], turn["value"]) for turn in turns)))
