"""The six tasks: from an image's segments to its questions and answers.

Questions are about things; the listings name stuff too. A class with a crowd region or with more than 20 instances is
neither counted nor located, because the answer would be wrong; it is still named, and asked for by yes or no.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, zip_longest
from typing import NamedTuple

from collavo.instructions.choose import ClassStatistics, draw_absent_labels, stable_hash, stable_uniforms
from collavo.instructions.phrasebook import Phrasebook
from collavo.instructions.text import (
    format_box,
    format_object,
    format_objects,
    format_objects_with_boxes,
)
from schemas.categories import CATEGORIES
from schemas.crayon_row import TASKS, Instruction, Segment


@dataclass(frozen=True, slots=True)
class InstructionOptions:
    """What a user sets about instructions; every field is a flag of the builder."""

    tasks: tuple[str, ...] = TASKS
    """The tasks to write, a subset of `schemas.crayon_row.TASKS`."""

    seed: int = 0
    """Changes every choice of phrasing, of absent class, and of what the cap drops."""

    max_instructions: int = 24
    """Instructions per image at most; the tasks take turns until it is reached."""

    negative_ratio: float = 1.0
    """Questions for an absent class per question for a present one, in the tasks that ask for a class."""

    max_listed_objects: int = 30
    """An image with more segments gets no listing: shortened it would be a wrong answer, whole it would be too long."""


class _Candidate(NamedTuple):
    """A question that could be asked: the object it is about and all that a phrasing may say."""

    subject: str
    words: Mapping[str, str]
    label: str | None
    polarity: str | None
    segment_ids: tuple[int, ...]


def present_thing_labels(segments: Sequence[Segment]) -> list[int]:
    """The thing labels (0..79) that occur in an image, ascending, crowds included."""
    return sorted({segment.label for segment in segments if segment.category.is_thing})


def write_instructions(
    image_id: str,
    size_wh: tuple[int, int],
    segments: Sequence[Segment],
    phrasebook: Phrasebook,
    statistics: ClassStatistics,
    options: InstructionOptions,
) -> tuple[Instruction, ...]:
    """All instructions of an image, by task.

    Args:
        image_id: enters every choice, so that it depends on nothing else of the data set than `statistics`.
        size_wh: of the image, in pixels; boxes are written as fractions of it.
        segments: in the order of the row.
        statistics: class frequencies over the data set, for the choice of absent classes.
    """
    asked = [task for task in TASKS if task in options.tasks and task in phrasebook.phrasings]
    by_task = [
        sorted(
            _candidates(task, image_id, size_wh, segments, statistics, options),
            key=lambda candidate: stable_hash(options.seed, image_id, task, candidate.subject, "order"),
        )
        for task in asked
    ]
    # The tasks take turns, so that a cap costs each of them alike.
    turns = chain.from_iterable(
        zip_longest(*([(task, c) for c in cs] for task, cs in zip(asked, by_task, strict=True)))
    )
    chosen = [turn for turn in turns if turn is not None][: options.max_instructions]
    return tuple(
        _phrase(task, candidate, image_id, phrasebook, options.seed)
        for task, candidate in sorted(chosen, key=lambda turn: TASKS.index(turn[0]))
    )


def _phrase(task: str, candidate: _Candidate, image_id: str, phrasebook: Phrasebook, seed: int) -> Instruction:
    phrasings = phrasebook.phrasings[task]
    phrasing = phrasings[stable_hash(seed, image_id, task, candidate.subject) % len(phrasings)]
    answer = phrasing.absent if candidate.polarity == "absent" else phrasing.present
    assert answer is not None  # the phrasebook holds one for every task that asks for absent classes
    return Instruction(
        task=task,
        question=phrasing.question.format_map(candidate.words),
        answer=answer.format_map(candidate.words),
        label=candidate.label,
        polarity=candidate.polarity,
        segment_ids=candidate.segment_ids,
        template_id=phrasing.id,
    )


def _candidates(
    task: str,
    image_id: str,
    size_wh: tuple[int, int],
    segments: Sequence[Segment],
    statistics: ClassStatistics,
    options: InstructionOptions,
) -> Iterator[_Candidate]:
    if task in ("list_objects", "list_objects_with_boxes"):
        if 0 < len(segments) <= options.max_listed_objects:
            yield _listing(task, segments, size_wh)
        return
    things = [segment for segment in segments if segment.category.is_thing]
    if task == "box_to_class":
        yield from _boxes_to_name(things, size_wh)
        return
    present = present_thing_labels(segments)
    by_label = {label: list(group) for label, group in groupby(things, key=lambda segment: segment.label)}
    if task != "class_to_binary":
        by_label = {label: group for label, group in by_label.items() if all(s.numbering for s in group)}
    for label, group in by_label.items():
        yield _class_question(task, label, group, size_wh)
    # An image without objects still teaches what is not there: it counts as one with a single class. What is left over
    # of a ratio such as 0.3 is asked for by chance, for to round it would ask images of few classes for nothing.
    wanted = options.negative_ratio * max(len(by_label), 1)
    chance = stable_uniforms(1, "negatives", options.seed, image_id, task)[0]
    for label in draw_absent_labels(present, int(wanted + chance), statistics, options.seed, image_id, task):
        yield _class_question(task, label, [], size_wh)


def _listing(task: str, segments: Sequence[Segment], size_wh: tuple[int, int]) -> _Candidate:
    if task == "list_objects":
        words = {"objects": format_objects(segments)}
    else:
        words = {"objects_with_boxes": format_objects_with_boxes(segments, size_wh)}
    return _Candidate("all", words, None, None, tuple(segment.id for segment in segments))


def _boxes_to_name(things: Sequence[Segment], size_wh: tuple[int, int]) -> Iterator[_Candidate]:
    """One question per numbered thing whose box, as text, has an extent and belongs to no other thing."""
    boxes = [format_box(segment.box_xyxy, size_wh) for segment in things]
    for segment, box in zip(things, boxes, strict=True):
        x_min, y_min, x_max, y_max = box.strip("[]").split(", ")
        if not segment.numbering or boxes.count(box) > 1 or x_min == x_max or y_min == y_max:
            continue
        category = segment.category
        words = {
            "box": box,
            "name": category.display_name,
            "singular": category.singular,
            "a_name": category.with_article,
            "object": format_object(segment),
        }
        yield _Candidate(box, words, category.display_name, "present", (segment.id,))


def _class_question(task: str, label: int, group: Sequence[Segment], size_wh: tuple[int, int]) -> _Candidate:
    category = CATEGORIES[label]
    words = {
        "name": category.display_name,
        "singular": category.singular,
        "a_name": category.with_article,
        "plural": category.plural,
    }
    if task == "counting":
        words |= {
            "count": str(len(group)),
            "counted": category.counted(len(group)),
            "are": "is" if len(group) == 1 else "are",
        }
    elif task == "class_to_box":
        words |= {
            "boxes": ", ".join(format_box(segment.box_xyxy, size_wh) for segment in group),
            "objects_with_boxes": format_objects_with_boxes(group, size_wh),
        }
    answers = {"counting": str(len(group)), "class_to_binary": "yes" if group else "no"}
    polarity = "present" if group else "absent"
    return _Candidate(str(label), words, answers.get(task), polarity, tuple(segment.id for segment in group))
