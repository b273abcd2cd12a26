"""Read the phrasings of the crayon instructions from a JSON file.

The file maps each task to a list of phrasings. Each has an `id`, a `question`, the answer if the class is `present`,
and for `counting`, `class_to_box` and `class_to_binary` the answer if it is `absent`. Texts hold placeholders in
braces, such as `{plural}`; `PLACEHOLDERS` lists those of each task. The default is `phrasebook.json` beside this
module."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from collavo.errors import UserError
from collavo.sources import parsed_json
from collavo.sources.image_paths import is_utf8
from schemas.crayon_row import TASKS

DEFAULT_PHRASEBOOK = Path(__file__).with_name("phrasebook.json")

PLACEHOLDERS: Mapping[str, frozenset[str]] = {
    "counting": frozenset({"name", "singular", "plural", "count", "counted", "are"}),
    "class_to_box": frozenset({"name", "singular", "a_name", "plural", "boxes", "objects_with_boxes"}),
    "box_to_class": frozenset({"box", "name", "singular", "a_name", "object"}),
    "list_objects": frozenset({"objects"}),
    "list_objects_with_boxes": frozenset({"objects_with_boxes"}),
    "class_to_binary": frozenset({"name", "singular", "a_name", "plural"}),
}

TASKS_WITH_ABSENT = ("counting", "class_to_box", "class_to_binary")


@dataclass(frozen=True, slots=True)
class Phrasing:
    """One way to ask and to answer; `absent` is None for tasks about present objects only."""

    id: str
    question: str
    present: str
    absent: str | None


@dataclass(frozen=True, slots=True)
class Phrasebook:
    """All phrasings by task; `sha256` is that of their file."""

    phrasings: Mapping[str, tuple[Phrasing, ...]]
    sha256: str


def load_phrasebook(path: Path = DEFAULT_PHRASEBOOK) -> Phrasebook:
    """Read and check a phrasebook.

    Raises:
        UserError: if the file is not JSON of the shape above, or a text holds an unknown placeholder.
    """
    try:
        data = path.read_bytes()
        tasks = parsed_json(data, _without_repeats)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(tasks, dict) or not tasks or set(tasks) - set(TASKS):
        found = ", ".join(map(repr, tasks)) or "no task" if isinstance(tasks, dict) else f"a {type(tasks).__name__}"
        raise UserError(f"{path}: holds {found}, but expected an object whose keys are among {', '.join(TASKS)}")
    phrasings = {task: _checked_phrasings(path, task, entries) for task, entries in tasks.items()}
    return Phrasebook(phrasings, hashlib.sha256(data).hexdigest())


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the object, in which a name that stands twice would hide what stood under it first."""
    if repeated := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise ValueError(f"{repeated[0]!r} stands there twice")
    return dict(pairs)


def _checked_phrasings(path: Path, task: str, entries: Any) -> tuple[Phrasing, ...]:
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: task {task!r} needs a list of at least one phrasing")
    fields = {"id", "question", "present"} | ({"absent"} if task in TASKS_WITH_ABSENT else set())
    for entry in entries:
        if not isinstance(entry, dict) or set(entry) != fields or not all(map(_is_text, entry.values())):
            expected = ", ".join(sorted(fields))
            raise UserError(f"{path}: a phrasing of {task!r} needs exactly the texts {expected}; found {entry!r}")
        for field in fields - {"id"}:
            _check_placeholders(path, task, f"{entry['id']}/{field}", entry[field])
    ids = [entry["id"] for entry in entries]
    if len(set(ids)) < len(ids):
        raise UserError(f"{path}: task {task!r} has two phrasings of the same id among {', '.join(ids)}")
    return tuple(Phrasing(e["id"], e["question"], e["present"], e.get("absent")) for e in entries)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and is_utf8(value)


def _check_placeholders(path: Path, task: str, place: str, text: str) -> None:
    try:
        fields = [(name, spec or conversion) for _, name, spec, conversion in Formatter().parse(text)]
    except ValueError as error:
        raise UserError(f"{path}: {place}: {error} in {text!r}") from error
    for name, formatting in fields:
        if name is not None and (name not in PLACEHOLDERS[task] or formatting):
            known = ", ".join(f"{{{name}}}" for name in sorted(PLACEHOLDERS[task]))
            found = f"{{{name}}} with a format" if formatting else f"unknown placeholder {{{name}}}"
            raise UserError(f"{path}: {place}: {found}; {task!r} knows {known}")
