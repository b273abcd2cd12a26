"""Write segments as text and read them back: `(#1 person) [0.00, 0.16, 0.29, 0.88], (#2 person) [0.50, 0.10, 0.83,
0.81]`.

Boxes are `[x_min, y_min, x_max, y_max]`, fractions of the image's width and height with two decimals, as in CoLLaVO. A
segment without a number (a crowd, or an instance after the 20th) is written `(person)`.
"""

import re
from collections.abc import Container, Sequence
from functools import lru_cache
from typing import NamedTuple

from schemas.crayon_row import Segment

Box = tuple[float, float, float, float]

_NUMBER = r"(?:0\.\d\d|1\.00)"
_BOX = re.compile(rf"\[({_NUMBER}), ({_NUMBER}), ({_NUMBER}), ({_NUMBER})\]", re.ASCII)
_OBJECT = re.compile(rf"\((?:#([1-9]\d*) )?([^()#]+)\)(?: ({_BOX.pattern}))?", re.ASCII)


class ObjectMention(NamedTuple):
    """An object as a text names it; `numbering` is 0 and `box` None if the text has none."""

    name: str
    numbering: int
    box: Box | None


def fractions_of(box_xyxy: Sequence[float], size_wh: tuple[int, int]) -> Box:
    """Turn a pixel box into fractions of the image's width and height."""
    (x_min, y_min, x_max, y_max), (width, height) = box_xyxy, size_wh
    return x_min / width, y_min / height, x_max / width, y_max / height


@lru_cache(maxsize=256)  # the tasks of an image write each of its boxes three times
def format_box(box_xyxy: tuple[float, float, float, float], size_wh: tuple[int, int]) -> str:
    """Write a pixel box, e.g. `[0.00, 0.16, 0.29, 0.88]`."""
    x_min, y_min, x_max, y_max = fractions_of(box_xyxy, size_wh)
    return f"[{x_min:.2f}, {y_min:.2f}, {x_max:.2f}, {y_max:.2f}]"


def has_extent(box_xyxy: tuple[float, float, float, float], size_wh: tuple[int, int]) -> bool:
    """Tell whether a pixel box still has a width and a height as text: one of a few pixels reads `[0.50, 0.50, 0.50,
    0.50]`, which tells nobody where anything is."""
    x_min, y_min, x_max, y_max = format_box(box_xyxy, size_wh).strip("[]").split(", ")
    return x_min != x_max and y_min != y_max


def format_object(segment: Segment) -> str:
    """Write a segment's number and name, e.g. `(#2 person)`."""
    return f"(#{segment.numbering} {segment.category})" if segment.numbering else f"({segment.category})"


def format_objects(segments: Sequence[Segment]) -> str:
    """Write all names with their numbers, e.g. `(#1 person), (#2 person)`."""
    return ", ".join(map(format_object, segments))


def format_objects_with_boxes(segments: Sequence[Segment], size_wh: tuple[int, int]) -> str:
    """Write all names with their numbers and boxes, e.g. `(#1 person) [0.00, 0.16, 0.29, 0.88]`."""
    return ", ".join(f"{format_object(segment)} {format_box(segment.box_xyxy, size_wh)}" for segment in segments)


def largest(segments: Sequence[Segment], most: int) -> list[Segment]:
    """Keep so many segments at most, the largest ones, in their order."""
    kept = sorted(sorted(range(len(segments)), key=lambda number: -segments[number].area)[:most])
    return [segments[number] for number in kept]


def parse_objects(text: str, names: Container[str]) -> list[ObjectMention]:
    """Read objects as `format_objects` or `format_objects_with_boxes` writes them; an empty text is an empty list.

    Args:
        names: the display names that there are.

    Raises:
        ValueError: at the first place that is not an object of one of these names.
    """
    mentions: list[ObjectMention] = []
    position = 0
    while position < len(text):
        match = _OBJECT.match(text, position)
        if match is None or match[2] not in names:
            raise ValueError(
                f"not an object like (#1 person) at character {position}: {text[position : position + 40]!r}"
            )
        box = _ordered_box(match.groups()[3:]) if match[3] else None
        if match[3] and box is None:
            raise ValueError(f"a box whose maximum is below its minimum: {match[3]}")
        mentions.append(ObjectMention(match[2], int(match[1] or 0), box))
        position = match.end()
        if position < len(text):
            if not text.startswith(", (", position):
                raise ValueError(f"expected ', ' and another object at character {position}: {text[position:][:40]!r}")
            position += 2
    return mentions


def find_boxes(text: str) -> list[Box]:
    """Find all well-formed boxes in a text, such as a model's free answer."""
    return [box for match in _BOX.finditer(text) if (box := _ordered_box(match.groups())) is not None]


def _ordered_box(numbers: Sequence[str]) -> Box | None:
    x_min, y_min, x_max, y_max = map(float, numbers)
    return (x_min, y_min, x_max, y_max) if x_min <= x_max and y_min <= y_max else None
