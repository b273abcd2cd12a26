"""Fill in the tables of these pages from the code, each time MkDocs builds them.

A page asks for a table with a line of its own, `<!-- table: NAME -->`; `TABLES` lists the names. MkDocs calls
`on_page_markdown` for every page (`hooks` in mkdocs.yml). So a new column, reject reason or flag is in the pages
as soon as it is in the code, and a column without a meaning stops the build.
"""

import importlib
import json
import re
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from typing import Any
from unittest.mock import patch

import pyarrow as pa

from collavo.cli import Parser
from collavo.instructions.phrasebook import DEFAULT_PHRASEBOOK, PLACEHOLDERS, TASKS_WITH_ABSENT
from collavo.panoptic.thresholds import THRESHOLD_PRESETS, MaskThresholds
from pipelines.console import COMMANDS as CONSOLE
from pipelines.records import REJECT_REASONS
from schemas.categories import COCO_PANOPTIC
from schemas.crayon_row import CRAYON_SCHEMA

COMMANDS = {name: command.module for name, command in CONSOLE.items()}
"""The module behind each command of `collavo`; its `main` takes the command line."""

COLUMN_MEANINGS = {
    "image_id": "path below the folder that all sources share; unique in the data set",
    "image_sha256": "SHA-256 of the encoded image: the same picture has the same one in every data set",
    "image": "the encoded image as it came, never encoded again; no bytes with `--image_storage reference`; "
    "null in a row of a dialogue about no image",
    "width": "pixels, EXIF orientation applied; all boxes are in this frame; null without an image",
    "height": "as `width`",
    "other_paths": "other files that hold the same picture",
    "sources": "which inputs named the image",
    "license_id": "COCO's licence of the image; null where the source states none",
    "split": "train or validation, as the source says, else chosen by `image_sha256`",
    "panoptic_map": "indexed PNG of the image's size: a pixel is the position of its segment in `segments`, counted "
    "from 1; 0 is unknown. The palette holds the crayon colours. 16-bit grey above 255 segments",
    "segments": "what is in the picture, see below",
    "instructions": "questions and answers made from the segments, see below",
    "conversations": "other people's dialogues about the image, verbatim; empty where there are none",
}

SEGMENT_MEANINGS = {
    "id": "unique in the image",
    "category_id": "the number in the data set's own list of classes; COCO's go from 1 to 200 with gaps",
    "label": "position among the classes of the data set, from 0, without gaps; things come first",
    "category": "display name: `tree`, not `tree-merged`",
    "is_thing": "true for a thing, which can be counted; false for stuff, which never is",
    "is_crowd": "a region of many; its class is neither counted nor located",
    "numbering": "1 to 20 within its class, largest first; 0 for crowds and for everything after the 20th",
    "box_xyxy": "pixels, exclusive at the maximum, measured on the full-resolution mask",
    "area": "pixels",
    "score": "the network's; null for annotations",
}

INSTRUCTION_MEANINGS = {
    "task": "`counting`, `class_to_box`, `box_to_class`, `list_objects`, `list_objects_with_boxes` or "
    "`class_to_binary`",
    "question": "boxes are fractions of width and height with two decimals",
    "answer": "what a model is to say",
    "label": "the answer as an evaluation compares it: `3`, `yes`, `dog`; null for boxes and lists",
    "polarity": "`present` or `absent`, for the class asked about; null where no class is asked about",
    "segment_ids": "the segments that the answer rests on",
    "template_id": "the phrasing, see [Templates](templates.md)",
}

PLACEHOLDER_MEANINGS = {
    "name": "display name of the class: `dog`, `skis`",
    "singular": "one of them: `dog`, `pair of skis`",
    "a_name": "with its article: `a dog`, `an umbrella`",
    "plural": "several of them: `dogs`, `people`, `pairs of skis`",
    "count": "the number: `3`",
    "counted": "the number with the right form: `1 dog`, `3 dogs`",
    "are": "`is` for one, `are` for any other number",
    "box": "the box asked about: `[0.75, 0.77, 0.97, 0.97]`",
    "boxes": "all boxes of the class, without names",
    "object": "the object in the box, with its number: `(#1 dog)`",
    "objects": "all objects: `(#1 dog), (#2 dog), (#1 sky)`",
    "objects_with_boxes": "the same, each followed by its box",
}


def columns() -> str:
    """The columns of a row."""
    return _fields_table(CRAYON_SCHEMA, COLUMN_MEANINGS, "column")


def segments() -> str:
    """The fields of a segment."""
    return _fields_table(CRAYON_SCHEMA.field("segments").type.value_type, SEGMENT_MEANINGS, "field")


def instructions() -> str:
    """The fields of an instruction."""
    return _fields_table(CRAYON_SCHEMA.field("instructions").type.value_type, INSTRUCTION_MEANINGS, "field")


def rejects() -> str:
    """All reasons why an input makes no row, by the step that finds it."""
    return _table(
        ("step", "reason", "what was found"),
        [
            (f"`{step}`", f"`{reason}`", _text(meaning))
            for step, of_step in REJECT_REASONS.items()
            for reason, meaning in of_step.items()
        ],
    )


def categories() -> str:
    """COCO panoptic's 133 classes."""
    return _table(
        ("id", "label", "COCO's name", "display name", "kind", "one, several"),
        [
            (str(c.category_id), str(c.label), c.name, c.display_name, "thing" if c.is_thing else "stuff",
             f"{c.singular}, {c.plural}" if c.is_thing else "")
            for c in COCO_PANOPTIC
        ],
    )  # fmt: skip


def placeholders() -> str:
    """What a phrasing may say, by task."""
    _check_names(PLACEHOLDER_MEANINGS, set().union(*PLACEHOLDERS.values()), "PLACEHOLDER_MEANINGS")
    rows = []
    for name, meaning in PLACEHOLDER_MEANINGS.items():
        tasks = ", ".join(f"`{task}`" for task, names in PLACEHOLDERS.items() if name in names)
        rows.append((f"`{{{name}}}`", meaning, tasks))
    return _table(("placeholder", "becomes", "known to"), rows)


def phrasings() -> str:
    """How many phrasings each task has, with the first."""
    rows = []
    for task, entries in json.loads(DEFAULT_PHRASEBOOK.read_text(encoding="utf-8")).items():
        first = entries[0]
        absent = f"`{first['absent']}`" if task in TASKS_WITH_ABSENT else ""
        rows.append((f"`{task}`", str(len(entries)), f"`{first['question']}`", f"`{first['present']}`", absent))
    return _table(("task", "phrasings", "question of the first", "answer", "answer if absent"), rows)


def thresholds() -> str:
    """The presets of the segmenter's post-processing."""
    names = [field.name for field in fields(MaskThresholds)]
    rows = [(f"`{name}`", *(str(getattr(preset, n)) for n in names)) for name, preset in THRESHOLD_PRESETS.items()]
    return _table(("preset", *(f"`{name}`" for name in names)), rows)


def flags(command: str) -> str:
    """All flags of a command, a table for each group of its help."""
    parts = []
    for group in parser_of(command)._action_groups:
        rows = []
        for action in group._group_actions:
            if action.help == SUPPRESS or "-h" in action.option_strings:
                continue
            text, default = _without_default(action.help or "")
            value = f" {action.metavar}" if action.metavar else ""
            several = " ..." if action.nargs in ("+", "*") else ""
            if choices := [str(choice) for choice in action.choices or ()]:
                plain, as_code = ", ".join(choices), ", ".join(f"`{choice}`" for choice in choices)
                text = text.replace(plain, as_code)
                if any(choice not in text for choice in choices):
                    text += f": {as_code}"
            names = [name for name in action.option_strings if name.startswith("--")]
            named = "<br>".join(f"`{name}{value}{several}`" for name in names)
            rows.append((named, _text(text), _text(default)))
        if rows:
            title = group.title if group.title not in ("options", "optional arguments") else ""
            parts.append(
                (f"**{str(title).capitalize()}**\n\n" if title else "") + _table(("flag", "", "default"), rows)
            )
    return "\n\n".join(parts)


TABLES: Mapping[str, Callable[[], str]] = {
    "columns": columns,
    "segments": segments,
    "instructions": instructions,
    "rejects": rejects,
    "categories": categories,
    "placeholders": placeholders,
    "phrasings": phrasings,
    "thresholds": thresholds,
    **{f"flags of {command}": partial(flags, command) for command in COMMANDS},
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables that a page asks for in their places.

    Raises:
        KeyError: for a table that there is not.
    """
    return re.sub(r"^<!-- table: (.+?) -->$", lambda found: TABLES[found[1]](), markdown, flags=re.MULTILINE)


def parser_of(command: str) -> ArgumentParser:
    """The parser that a command asks for its help; nothing of the command is run."""
    asked: list[ArgumentParser] = []
    main = importlib.import_module(COMMANDS[command]).main
    with patch.object(Parser, "print_help", lambda parser, file=None: asked.append(parser)), suppress(SystemExit):
        main(["--help"])
    return asked[0]


def _fields_table(owner: Iterable[pa.Field], meanings: Mapping[str, str], title: str) -> str:
    by_name = {field.name: field for field in owner}
    _check_names(meanings, set(by_name), "docs/generate.py")
    rows = [(f"`{name}`", f"`{_type_name(field.type)}`", meanings[name]) for name, field in by_name.items()]
    return _table((title, "type", "meaning"), rows)


def _check_names(meanings: Mapping[str, str], names: set[str], where: str) -> None:
    assert set(meanings) == names, f"{where}: says what {set(meanings) - names} means, but not {names - set(meanings)}"


def _type_name(type_: pa.DataType) -> str:
    if pa.types.is_list(type_):
        inner = type_.value_type
        long = pa.types.is_struct(inner) and len(inner) > 2
        return "list<struct>" if long else f"list<{_type_name(inner)}>"
    if pa.types.is_struct(type_):
        return "struct<" + ", ".join(f"{field.name}: {_type_name(field.type)}" for field in type_) + ">"
    return str(type_)


def _without_default(text: str) -> tuple[str, str]:
    """A flag's help and the default that stands at its end."""
    found = re.fullmatch(r"(.*?) ?\(default: (.*)\)", text, re.DOTALL)
    return (found[1], found[2]) if found else (text, "")


def _text(text: str) -> str:
    """Plain text as Markdown: flags and names with an underscore in it as code, nothing else as markup."""
    parts = re.split(r"(`[^`]*`|(?<![\w-])--[a-z_\d-]+|\b[a-z\d]+(?:_[a-z\d]+)+\b(?![/.]))", text)
    return "".join(
        (part if part.startswith("`") else f"`{part}`") if i % 2 else re.sub(r"([*_<\[|])", r"\\\1", part)
        for i, part in enumerate(parts)
    )


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("\n", " ") for cell in line) + " |" for line in lines)
