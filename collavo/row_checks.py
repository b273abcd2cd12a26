"""What makes a Parquet file crayon data, and a record in it a row that all who read it can rely on.

Other tools write rows again, and damage some: wider types are taken, a bad row is left out alone.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from collavo.errors import Rejected, UserError
from schemas.categories import MAX_NUMBERING, CategorySet
from schemas.crayon_row import CRAYON_SCHEMA, METADATA_PREFIX, SCHEMA_VERSION, SPLITS


def schema_version(schema: pa.Schema) -> int:
    """Return the version of the crayon row that a file has; where its metadata are gone, its columns tell."""
    stated = (schema.metadata or {}).get(f"{METADATA_PREFIX}schema_version".encode())
    if stated is not None and stated.isdigit():
        return int(stated)
    return 1 if "image_sha256" not in schema.names else SCHEMA_VERSION


def check_schema(schema: pa.Schema, path: str) -> None:
    """Refuse a file that does not hold crayon rows of this version or of version 1.

    Raises:
        UserError: in one line, naming `path`, what was found and what was expected.
    """
    version = schema_version(schema)
    if version > SCHEMA_VERSION:
        raise UserError(f"{path}: crayon schema version {version}, but this code reads version {SCHEMA_VERSION}")
    expected = [column for column in CRAYON_SCHEMA if version > 1 or column.name not in _NEW_IN_VERSION_2]
    missing = [column.name for column in expected if column.name not in schema.names]
    if missing:
        found = ", ".join(schema.names[:6])
        raise UserError(
            f"{path}: not crayon data, for it has no column {', '.join(map(repr, missing[:4]))}; "
            f"its columns are {found}; build data with pipelines/build_crayon.py"
        )
    for column in expected:
        if schema.names.count(column.name) > 1:
            raise UserError(f"{path}: has several columns {column.name!r}; crayon data has one")
        found = schema.field(column.name).type
        is_float = column.name in _NULLABLE_NUMBERS and pa.types.is_floating(found)
        if not (is_float or _holds(found, column.type)):
            raise UserError(f"{path}: column {column.name!r} is {found}, but crayon data has {column.type}")


_NEW_IN_VERSION_2 = ("image_sha256", "other_paths")

_NULLABLE_NUMBERS = ("license_id", "width", "height")
"""pandas makes floats of whole numbers some of which are null; `CrayonRow.from_record` turns them back."""


def _holds(found: pa.DataType, expected: pa.DataType) -> bool:
    """Tell whether values of one type are values of another to Python: wider integers, large strings, fields in another
    order, and columns without any value."""
    types = pa.types
    if types.is_null(found):
        return True
    if types.is_dictionary(found):
        return _holds(found.value_type, expected)
    if types.is_struct(expected):
        names = [field.name for field in found] if types.is_struct(found) else []
        return all(f.name in names and _holds(found.field(f.name).type, f.type) for f in expected)
    if types.is_list(expected):
        is_list = types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
        return is_list and _holds(found.value_type, expected.value_type)
    kinds = (
        (types.is_integer,),
        (types.is_floating, types.is_integer),
        (types.is_boolean,),
        (types.is_string, types.is_large_string, types.is_string_view),
        (types.is_binary, types.is_large_binary, types.is_binary_view),
    )
    return any(kind[0](expected) and any(is_kind(found) for is_kind in kind) for kind in kinds)


_NULLABLE = frozenset({
    "image_sha256", "image", "image.bytes", "image.path", "width", "height", "other_paths", "license_id",
    "panoptic_map", "panoptic_map.bytes", "panoptic_map.path", "segments.score", "instructions.label",
    "instructions.polarity",
})  # fmt: skip
"""Columns and fields that a row may leave empty."""


def check_record(record: Mapping[str, Any], categories: CategorySet) -> None:
    """Make sure that a row, as plain values, has what all who read it rely on; columns that it lacks are not missed.

    Pictures and maps are checked where they are decoded.

    Args:
        categories: the set of the data set.

    Raises:
        Rejected: `missing_value` or `bad_value`, with the row's id.
    """
    name = record.get("image_id") or "without an id"
    for column in CRAYON_SCHEMA:
        if column.name in record and (empty := _empty_value(record[column.name], column.name, column.type)):
            raise Rejected("missing_value", f"{empty} is null", name)
    for fault in _faults(record, categories):
        raise Rejected("bad_value", fault, name)


def _empty_value(value: Any, path: str, type_: pa.DataType) -> str | None:
    """Find the first null where none may be, by its path."""
    if value is None:
        return None if path in _NULLABLE else path
    if pa.types.is_list(type_):
        return next(filter(None, (_empty_value(element, path, type_.value_type) for element in value)), None)
    if pa.types.is_struct(type_):
        return next(filter(None, (_empty_value(value[f.name], f"{path}.{f.name}", f.type) for f in type_)), None)
    return None


def _faults(record: Mapping[str, Any], categories: CategorySet) -> Iterator[str]:
    """Find values that no row can have."""
    if record.get("image_id") == "":
        yield "image_id is empty"
    if (split := record.get("split", "train")) not in SPLITS:
        yield f"split is {split!r}"
    if not math.isfinite(record.get("license_id") or 0):
        yield "license_id is no number"
    if (digest := record.get("image_sha256")) is not None and digest_of(record) is None:
        yield f"image_sha256 is {digest!r}"
    if "panoptic_map" in record and "image" in record:
        image = record["image"] or {}
        has_image = image.get("bytes") is not None or image.get("path") is not None
        if has_image != ((record["panoptic_map"] or {}).get("bytes") is not None):
            yield "of image and panoptic_map, one is missing"
    sides = [record.get(side) for side in ("width", "height")]
    has_no_frame = (
        sides == [None, None] and not record.get("segments") and not (record.get("panoptic_map") or {}).get("bytes")
    )
    if {"width", "height"} <= record.keys() and not (has_no_frame or all(map(_is_side, sides))):
        yield f"width and height are {sides[0]} and {sides[1]}"
    ids, numbered = set(), set()
    for segment in record.get("segments", ()):
        ids.add(segment["id"])
        box = segment["box_xyxy"]
        if len(box) != 4 or not all(map(math.isfinite, box)):
            yield f"box_xyxy is {list(box)}"
        label = segment["label"]
        if not (0 <= label < len(categories) and 0 <= segment["numbering"] <= MAX_NUMBERING):
            yield f"a segment has label {label} and numbering {segment['numbering']}"
        elif segment["category"] != (name := categories[label].display_name):  # of a data set joined by another tool
            yield f"label {label} is {name!r} here, and a segment calls it {segment['category']!r}"
        if (number := segment["numbering"]) and (label, number) in numbered:  # as where a segment got another class
            yield f"two segments are {segment['category']} number {number}"
        numbered.add((label, number))
    if "segments" in record:
        for instruction in record.get("instructions", ()):
            meant = instruction["segment_ids"]
            if not ids.issuperset(meant) or (instruction["task"] == "box_to_class" and not meant):
                yield f"an instruction rests on segments {list(meant)}, which are not in the row"


def _is_side(value: Any) -> bool:
    return value is not None and math.isfinite(value) and value >= 1


def digest_of(record: Mapping[str, Any] | Rejected) -> bytes | None:
    """Return the SHA-256 of a row's picture; None where it has none, or none that can be read."""
    text = None if isinstance(record, Rejected) else record["image_sha256"]
    return bytes.fromhex(text) if text is not None and re.fullmatch(r"[0-9a-f]{64}", text) else None
