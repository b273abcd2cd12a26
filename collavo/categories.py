"""Where a set of classes comes from: an annotation file, a segmenter's checkpoint, or a file of the user's.

Names decide. A number in a file means what that file's own `categories` list says, and nothing else. A set all of whose
classes another set has, by name and kind, joins that set: a COCO file with twelve of the 133 classes becomes part of
COCO's set, one with a class of its own stays a set of its own.
"""

import colorsys
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from collavo.errors import UserError
from collavo.instructions.english import display_name_of, english_forms, unmarked
from collavo.sources import MAX_ID, object_in, parsed_json, whole_id
from collavo.sources.image_paths import is_utf8
from schemas.categories import COCO_PANOPTIC, LEFT_OUT, CategorySet, name_key

CATEGORIES_FILE = "categories.json"
"""In a segmenter's folder: the set it was trained on, as a list like COCO's `categories`, or an object of it, a `name`,
and in `unseen` the names of classes that no picture of its training shows."""

_TAIL_BYTES = 4 << 20
"""Where the `categories` of COCO's files stand; reading 300 MB for them would take half a minute."""

# Classes that are stuff in the published panoptic sets, by the number of all their classes. Checkpoints name their
# classes and do not say which of them are things; what two sources call otherwise stands here twice. Sources: the
# category lists that Mask2Former's data sets are registered with, and the label files of transformers.
_STUFF = {
    150: (  # ADE20K
        "wall|building|sky|floor|tree|ceiling|road|grass|sidewalk|earth|mountain|plant|water|house|sea|rug|field|rock|"
        "base|sand|skyscraper|grandstand|path|runway|stairway|river|bridge|blind|hill|bar|hovel|tower|dirt track|land|"
        "escalator|buffet|poster|stage|conveyer belt|canopy|pool|swimming pool|falls|waterfall|tent|cradle|tank|lake|"
        "blanket|pier|crt screen|shower",
        50,
    ),
    65: (  # Mapillary Vistas
        "curb|fence|guard rail|barrier|wall|bike lane|curb cut|parking|pedestrian area|rail track|road|service lane|"
        "sidewalk|bridge|building|tunnel|lane marking general|mountain|sand|sky|snow|terrain|vegetation|water|pothole|"
        "on rails|car mount|ego vehicle",
        28,
    ),
    19: (  # Cityscapes
        "road|sidewalk|building|wall|fence|pole|traffic light|traffic sign|vegetation|terrain|sky",
        11,
    ),
}

NO_OBJECTS = frozenset(
    "background|bg|void|unlabeled|unlabelled|ignore|ignored|ignore region|ignore regions|ignored region|"
    "ignored regions|dont care|dontcare|don't care".split("|")
)
"""Names, by `name_key`, that tools give to what is no object: labelme's `_background_` and `__ignore__`, VisDrone's
`ignored regions`, KITTI's `DontCare`."""

_KINDS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
"""Whether a class is a thing, by the text of its `isthing`; `bool` would take the text "0" for true."""

_SHADES = ((0.5, 0.75), (0.36, 0.65), (0.66, 0.6))
"""Lightness and saturation, in turn."""

_MOST_NAMED = 20
"""Classes that a message lists."""


def read_categories(records: Any, name: str, are_things: bool = False) -> CategorySet:
    """Make a set from a list like COCO's `categories`.

    Args:
        records: a list of objects with `id`, `name`, `isthing` (or `is_thing`), and optionally `color`, `singular`,
            `plural` and `display_name`; without ids, positions are taken.
        name: what the set is called in messages; of a path, the last two parts become its name.
        are_things: whether a class is a thing where the list does not say, as in instance files.

    Returns:
        the classes in the list's order, with English forms and colours where the list has none.

    Raises:
        UserError: for a list that is empty, repeats an id or a name, or does not say which classes are things.
    """
    if not isinstance(records, list) or not records:
        raise UserError(f"{name}: expected a list of categories, each with 'id', 'name' and 'isthing'")
    parsed = [_record(record, position, name, are_things) for position, record in enumerate(_without_roots(records))]
    for what in ("id", "key", "display_name"):
        same = "the same id" if what == "id" else "the same name but for case, suffixes and a comma's tail"
        remedy = "" if what == "id" else "; rename one of them there"
        seen: dict[Any, str] = {}
        for record in parsed:
            if record[what] in seen:
                two = f"categories {seen[record[what]]!r} and {record['name']!r}"
                raise UserError(f"{name}: {two} have {same}, {record[what]}{remedy}")
            seen[record[what]] = record["name"]
    colors = _colors([record["color"] or _known_color(record["key"]) for record in parsed])
    for record, color in zip(parsed, colors, strict=True):
        record["color"] = color
        if record["isthing"]:
            record |= english_forms(record)
    # The set travels with rows and models: a file is named without the folders of the machine that it lay on.
    return CategorySet.from_records("/".join(name.split("/")[-2:]), parsed)


def categories_of_annotations(
    file: BinaryIO, name: str, are_things: bool = False, kinds: CategorySet | None = None
) -> tuple[CategorySet, frozenset[str]] | None:
    """Read the set that a COCO annotation file states in its `categories`, as the file has it; None where it states
    none.

    Args:
        file: open and seekable, see `collavo.sources.json_files`.
        name: the file's path, for messages.
        are_things: see `read_categories`.
        kinds: the user's set, which says of a class whether it is a thing where the file does not.

    Returns:
        the set, and the names of those of its classes that are the `supercategory` of others, as "vehicle" beside "car"
        is: where none is marked, a picture may well show one.

    Raises:
        UserError: if the categories cannot be used.
    """
    file.seek(0, 2)
    file.seek(max(0, file.tell() - _TAIL_BYTES))
    records = _last_categories(file.read())
    if records is None:
        file.seek(0)
        try:
            records = next(ijson.items(file, "categories", use_float=True), None)
        except ijson.JSONError as error:
            raise UserError(f"{name}: not JSON to its end ({str(error).splitlines()[0]})") from error
    if not records:
        return None
    if kinds and isinstance(records, list):
        records = [_with_kind(record, kinds) for record in records]
    found = read_categories(records, name, are_things)
    above = {str(record.get("supercategory")) for record in records if record.get("supercategory") != record["name"]}
    return found, frozenset(each.name for each in found if each.name in above)


def categories_of_checkpoint(folder: Path, name: str, known_set: CategorySet | None = None) -> CategorySet:
    """Read the set of a segmenter's checkpoint, where a category id is the number of a class in the network.

    Args:
        folder: with `config.json`, and `categories.json` where the checkpoint says itself which classes are things.
        known_set: as of `categories_of_labels`.

    Raises:
        UserError: for a set of which nobody here knows which classes are things.
    """
    config = object_in(folder / "config.json")
    named = config.get("id2label") or {}
    try:
        id2label = {int(number): str(each) for number, each in dict(named).items()}
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'config.json'}: 'id2label' should name classes by their numbers, it is {named!r:.80}"
        ) from error
    if (file := folder / CATEGORIES_FILE).is_file():
        return _stated_categories(f"{name}/{CATEGORIES_FILE}", file.read_bytes(), id2label)
    if not id2label:
        raise UserError(f"{name}: a {config.get('model_type')} model whose config.json names no classes ('id2label')")
    place = folder.resolve()  # in the hub's cache, a commit's below the model's
    called = place.parts[-3] if place.parent.name == "snapshots" else name.rstrip("/")
    # The published MaskFormers of these two data sets are semantic, and their names do not say it.
    is_semantic = "semantic" in re.split("/|--", called)[-1].lower() or (
        config.get("model_type") == "maskformer" and len(id2label) in (19, 150)
    )
    return categories_of_labels(id2label, name, known_set, is_semantic)


def unseen_by_checkpoint(folder: Path) -> frozenset[str]:
    """Read which of its classes a checkpoint was shown in no picture: that one has none of them it cannot tell."""
    file = folder / CATEGORIES_FILE
    content = parsed_json(file.read_text(encoding="utf-8-sig")) if file.is_file() else {}
    return frozenset(map(str, content.get("unseen") or ())) if isinstance(content, dict) else frozenset()


def _stated_categories(path: str, data: bytes, id2label: Mapping[int, str]) -> CategorySet:
    """Read a checkpoint's own file; ids in it may be a data set's, so where all names are the network's, these count.

    Raises:
        UserError: where it is no set.
    """
    stated = categories_of_file(path, data)
    number_of = {name_key(label): number for number, label in id2label.items()}
    categories = stated.categories
    elsewhere = [key for key, each in stated.by_key.items() if number_of.get(key, each.category_id) != each.category_id]
    if stated.by_key.keys() <= number_of.keys():
        categories = tuple(replace(each, category_id=number_of[key]) for key, each in stated.by_key.items())
    elif elsewhere:
        unknown = next(each.name for key, each in stated.by_key.items() if key not in number_of)
        named = stated.by_key[elsewhere[0]]
        raise UserError(
            f"{path}: 'id2label' of config.json has no {unknown!r}, so the ids are taken for its numbers; but "
            f"{named.name!r} has number {number_of[elsewhere[0]]} there, and here {named.category_id}; correct either"
        )
    content = json.loads(data.decode("utf-8-sig"))
    set_name = content.get("name") if isinstance(content, dict) else None
    return CategorySet(set_name if isinstance(set_name, str) else stated.name, categories)


def categories_of_labels(
    id2label: Mapping[int, str], name: str, known_set: CategorySet | None = None, is_semantic: bool = False
) -> CategorySet:
    """Make the set that a checkpoint names in its `id2label`, in the checkpoint's order.

    DETR's 250 numbers are COCO's own, with gaps: what is called N/A, or by its number alone, is no class.

    Args:
        known_set: the set that the network is used with. It says which of the classes are things where it has all of
            them, or where no published set has; a class that it lacks then counts as one.
        is_semantic: whether the network gives one mask a class, so that none of them is a thing that can be counted.

    Raises:
        UserError: for a set of which nobody here knows which classes are things.
    """
    numbers = [n for n in sorted(id2label) if id2label[n] not in ("N/A", f"LABEL_{n}")] or sorted(id2label)
    names = [id2label[number] for number in numbers]
    keys = {name_key(each) for each in names}
    known = [categories for categories in (known_set, COCO_PANOPTIC) if categories and keys <= categories.by_key.keys()]
    listed, count_of_stuff = _STUFF.get(len(names), ("", -1))
    stuff = keys & set(listed.split("|"))
    if is_semantic:
        things = set()
    elif known:
        things = {key for key in keys if known[0].by_key[key].is_thing}
    elif len(stuff) == count_of_stuff:
        things = keys - stuff
    elif known_set:
        things = {key for key in keys if key not in known_set.by_key or known_set.by_key[key].is_thing}
    else:
        raise UserError(
            f"{name}: the checkpoint names {len(names)} classes ({', '.join(names[:3])}, ...) and does not say "
            f"which of them are things; --categories FILE of a build or {CATEGORIES_FILE} beside its weights says so"
        )
    records = [{"id": n, "name": id2label[n], "isthing": name_key(id2label[n]) in things} for n in numbers]
    return read_categories(records, name)


def _with_kind(record: Any, kinds: CategorySet) -> Any:
    if not isinstance(record, dict) or "is_thing" in record or not isinstance(record.get("name"), str):
        return record
    known = kinds.by_key.get(name_key(record["name"]))
    return {"isthing": int(known.is_thing), **record} if known else record


def categories_of_file(path: str, data: bytes, are_things: bool = False) -> CategorySet:
    """Read the set in a file of the user's: COCO's `categories` list, alone or inside an annotation file.

    Args:
        are_things: see `read_categories`.

    Raises:
        UserError: where it is not such a file.
    """
    try:
        content = parsed_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    return read_categories(content.get("categories") if isinstance(content, dict) else content, path, are_things)


def joined(categories: CategorySet) -> CategorySet:
    """Return the built-in set, where it has all of these classes; else these."""
    return COCO_PANOPTIC if categories.is_subset_of(COCO_PANOPTIC) else categories


def common_set(sets: Sequence[CategorySet]) -> CategorySet:
    """Return the one set that several sources share: the largest, where it has all classes of the others.

    Raises:
        UserError: naming two sets that differ, and the classes that tell them apart.
    """
    largest = max(sets, key=len)
    for other in sets:
        if not other.is_subset_of(largest):
            foreign = [
                f"{category.name!r} ({'thing' if category.is_thing else 'stuff'})"
                for key, category in other.by_key.items()
                if key not in largest.by_key or largest.by_key[key].is_thing != category.is_thing
            ]
            raise UserError(
                f"{other.name} and {largest.name} have different classes: only the first has {_listed(foreign)}; build "
                "them apart, say with --category_map which class is which, or name a list of all with --categories"
            )
    return largest


def labels_by_id(source: CategorySet, target: CategorySet, renamed: Mapping[str, str] | None = None) -> dict[int, int]:
    """Find the target's label of each category id of a source; `LEFT_OUT` for a class that the map leaves out.

    Args:
        renamed: the target's names by the source's, of a user's category map; an empty text leaves a class out.

    Raises:
        UserError: for classes that the target lacks and the map does not name.
    """
    by_key = {name_key(name): other for name, other in (renamed or {}).items()}
    labels, foreign, counted = {}, [], []
    for key, category in source.by_key.items():
        wanted = by_key.get(key, category.name)
        if not wanted:
            labels[category.category_id] = LEFT_OUT
        elif found := target.by_key.get(name_key(wanted)):
            labels[category.category_id] = found.label
            if found.is_thing and not category.is_thing:
                counted.append(repr(category.name))
        else:
            foreign.append(repr(category.name))
    if foreign:
        raise UserError(
            f"{source.name}: {target.name} has no {_listed(foreign)}; --category_map FILE says which class is which"
        )
    if counted:
        raise UserError(
            f"{source.name}: {_listed(counted)}: stuff there and a thing in {target.name}, where all of it in a "
            "picture would count as one; correct 'isthing', or leave it out with --category_map FILE"
        )
    return labels


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _without_roots(records: Sequence[Any]) -> list[Any]:
    """Leave out a class that one of the same name calls its `supercategory`: Roboflow lists the project first, of which
    nothing is marked, and a project is often named after a class."""
    pairs = [
        (str(each.get("name")), str(each.get("supercategory"))) if isinstance(each, Mapping) else ("", "")
        for each in records
    ]
    doubled = {above for name, above in pairs if name_key(above) == name_key(name)}
    return [
        record
        for record, (name, above) in zip(records, pairs, strict=True)
        if not (name and name in doubled and name_key(above) != name_key(name))
    ]


def _record(record: Any, position: int, name: str, are_things: bool) -> dict[str, Any]:
    fields = record if isinstance(record, Mapping) else {}
    text, number = fields.get("name"), whole_id(fields.get("id", position))
    if odd := [value for value in fields.values() if isinstance(value, str) and not is_utf8(value)]:
        raise UserError(f"{name}: category {position} holds half of a surrogate pair, which is no text: {odd[0]!r:.80}")
    said = fields.get("isthing", fields.get("is_thing"))
    if not isinstance(text, str) or not text.strip() or number is None or abs(number) > MAX_ID:
        raise UserError(
            f"{name}: category {position} should have a whole number 'id', {MAX_ID} at most, and a text 'name'; it is "
            f"{record!r:.80}"
        )
    if said is None and not are_things:
        raise UserError(
            f"{name}: category {text!r} does not say 'isthing': 1 for what can be counted, 0 for stuff; only files of "
            "--coco_instances need not"
        )
    thing = True if said is None else _KINDS.get(str(said).strip().lower())
    if thing is None:
        raise UserError(f"{name}: 'isthing' of category {text!r} should be 1 or 0, it is {said!r:.80}")
    stated = {word: fields.get(word) or "" for word in ("display_name", "singular", "plural")}
    if odd := [f"{word!r} is {value!r:.80}" for word, value in stated.items() if not isinstance(value, str)]:
        raise UserError(f"{name}: category {text!r}: {odd[0]}, but should be a text")
    display_name = unmarked(stated["display_name"]) or display_name_of(text)
    if not display_name:
        raise UserError(
            f"{name}: category {text!r} has a name without a letter to write; a 'display_name' gives it one"
        )
    return {
        "id": number,
        "name": text.strip(),
        "key": name_key(text),
        "isthing": int(thing),
        "display_name": display_name,
        "color": _checked_color(fields.get("color")),
        "singular": stated["singular"] if thing else "",
        "plural": stated["plural"] if thing else "",
        "article": "",
    }


def _checked_color(color: Any) -> list[int] | None:
    if isinstance(color, Sequence) and len(color) == 3 and all(isinstance(c, int) and 0 <= c < 256 for c in color):
        return list(color)
    return None


def _known_color(key: str) -> list[int] | None:
    known = COCO_PANOPTIC.by_key.get(key)
    return list(known.color_rgb) if known else None


@cache
def _candidate_rgb(turn: int) -> tuple[int, ...]:
    lightness, saturation = _SHADES[turn // 7 % len(_SHADES)]
    return tuple(round(255 * c) for c in colorsys.hls_to_rgb(turn * 0.618034 % 1.0, lightness, saturation))


def _colors(given: Sequence[list[int] | None]) -> Iterator[list[int]]:
    """Choose a colour for each class that brings none, by its position: hues a golden section apart, none of them
    taken."""
    taken = {_shade(color) for color in given if color}
    exact = {tuple(color) for color in given if color}
    for position, color in enumerate(given):
        for turn in count(position):
            if color is not None:
                break
            rgb = _candidate_rgb(turn)
            # Of hundreds of classes, some have to make do with a colour that is merely another one.
            if rgb not in exact and (turn > position + 20 or _shade(rgb) not in taken):
                taken.add(_shade(rgb))
                exact.add(rgb)
                color = list(rgb)
        yield color or [0, 0, 0]


def _shade(color: Sequence[int]) -> tuple[int, ...]:
    """Reduce a colour to what it shares with those that look like it."""
    return tuple(channel // 20 for channel in color)


def _last_categories(tail: bytes) -> Any:
    """Find the value of the last key `categories` in the end of a JSON file; None where none is whole in there."""
    place = tail.rfind(b'"categories"')
    if place < 0:
        return None
    text = tail[place + len(b'"categories"') :].decode("utf-8", errors="replace").lstrip().removeprefix(":").lstrip()
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and all(isinstance(v, dict) and "name" in v for v in value) else None
