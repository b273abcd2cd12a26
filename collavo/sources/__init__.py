"""Read the sources of images: COCO panoptic files, LLaVA files, and the paths that they name."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from collavo.errors import UserError


def fault_in_json(error: Exception) -> str:
    """Say in one line what ijson or a reader of records could not read; ijson draws the place below its message."""
    message = error.args[0] if error.args else ""
    text = message.decode(errors="replace") if isinstance(message, bytes) else str(message)
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"


def parsed_json(text: str | bytes, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON.

    Args:
        make_object: makes an object of its pairs; a dict if not given.

    Raises:
        ValueError: if it is no JSON, or is nested more deeply than Python's stack is.
    """
    try:
        return json.loads(text, object_pairs_hook=make_object)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def object_in(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file; empty where there is no such file.

    Raises:
        UserError: if it holds anything else, as one that was edited by hand may.
    """
    try:
        found = parsed_json(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: a JSON object was expected, it holds {found!r:.80}")
    return found


MAX_ID = 2**31 - 1
"""The largest id that a row can hold."""


def whole_id(value: Any) -> int | None:
    """Return an id as people write it: a whole number, also as `7.0` or `"7"`; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) else None


def crowd_of(fields: Mapping[str, Any]) -> bool | None:
    """Return whether an annotation is a crowd's, by its `iscrowd` as people write it; None for anything else.

    What `ignore` marks, as converters for mmdetection do what is too small or doubtful, is there but must not be
    counted, as a crowd is.
    """
    value = fields.get("iscrowd") or 0
    number = int(value) if isinstance(value, bool) else whole_id(value)
    return None if number is None else bool(number) or fields.get("ignore") in (1, True, "1")


def image_key(value: Any) -> str | None:
    """Return the key to match an image's id by: a whole number however it is written, or a text, as ADE20K's are."""
    number = whole_id(value)
    if number is not None:
        return str(number)
    return value if isinstance(value, str) and value else None
