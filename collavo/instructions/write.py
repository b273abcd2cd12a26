"""Write the questions and answers of the six tasks from an image's segments.

Questions are about things; the listings name stuff too. A class with a crowd region or with more than 20 instances is
neither counted nor located, since the answer would be wrong. It is still named, and asked for by yes or no.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, zip_longest
from typing import NamedTuple

from collavo.instructions.choose import ClassStatistics, draw_absent_things, stable_hash, stable_uniforms
from collavo.instructions.phrasebook import Phrasebook
from collavo.instructions.text import format_box, format_object, format_objects, format_objects_with_boxes, has_extent
from schemas.categories import Category, CategorySet
from schemas.crayon_row import TASKS, Instruction, Segment


@dataclass(frozen=True, slots=True)
class InstructionOptions:
    """Settings of the user; every field is a flag of the builder."""

    tasks: tuple[str, ...] = TASKS
    """The tasks to write, a subset of `schemas.crayon_row.TASKS`."""

    seed: int = 0
    """Changes every choice of phrasings, of absent classes, and of questions that exceed `max_instructions`."""

    max_instructions: int = 24
    """The most instructions of an image; the tasks take turns until it is reached."""

    negative_ratio: float = 1.0
    """Questions for an absent class per question for a present one, in the tasks that ask for classes."""

    max_listed_objects: int = 30
    """An image with more segments gets no listing: a shortened one would be wrong, a whole one too long."""


class _Candidate(NamedTuple):
    """A question that could be asked."""

    subject: str
    """What it is about: a label, a box, or everything. Choices about the question are made by this."""

    words: Mapping[str, str]
    """The values of all placeholders that a phrasing may hold."""

    label: str | None
    polarity: str | None
    segment_ids: tuple[int, ...]


def present_things(segments: Sequence[Segment], categories: CategorySet) -> list[int]:
    """List the things that occur in an image, crowds included, as ascending positions among the things of their set."""
    return sorted({categories.thing_positions[segment.label] for segment in segments if segment.is_thing})


def write_instructions(
    image_id: str,
    size_wh: tuple[int, int],
    segments: Sequence[Segment],
    categories: CategorySet,
    phrasebook: Phrasebook,
    statistics: ClassStatistics,
    options: InstructionOptions,
) -> tuple[Instruction, ...]:
    """Write all instructions of an image, by task.

    Args:
        image_id: enters every choice, so that of the rest of the data set only `statistics` matters.
        size_wh: of the image, in pixels; boxes are written as fractions of it.
        segments: in the order of the row.
        categories: the set of their classes.
        statistics: class frequencies over the data set, for the choice of absent classes.
    """
    asked = [task for task in TASKS if task in options.tasks and task in phrasebook.phrasings]
    by_task = [
        sorted(
            _candidates(task, image_id, size_wh, segments, categories, statistics, options),
            key=lambda candidate: stable_hash(options.seed, image_id, task, candidate.subject, "order"),
        )
        for task in asked
    ]
    # The tasks take turns, so that the maximum cuts all of them alike.
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
    categories: CategorySet,
    statistics: ClassStatistics,
    options: InstructionOptions,
) -> Iterator[_Candidate]:
    if task in ("list_objects", "list_objects_with_boxes"):
        if task == "list_objects":
            told, words = True, {"objects": format_objects(segments)}
        else:
            told = all(has_extent(segment.box_xyxy, size_wh) for segment in segments)
            words = {"objects_with_boxes": format_objects_with_boxes(segments, size_wh)}
        if told and 0 < len(segments) <= options.max_listed_objects:
            yield _Candidate("all", words, None, None, tuple(segment.id for segment in segments))
        return
    things = [segment for segment in segments if segment.is_thing]
    if task == "box_to_class":
        yield from _boxes_to_name(things, size_wh, categories)
        return
    present = present_things(segments, categories)
    by_label = {label: list(group) for label, group in groupby(things, key=lambda segment: segment.label)}
    if task != "class_to_binary":
        by_label = {label: group for label, group in by_label.items() if all(s.numbering for s in group)}
    if task == "class_to_box":
        by_label = {
            label: group
            for label, group in by_label.items()
            if all(has_extent(segment.box_xyxy, size_wh) for segment in group)
        }
    for label, group in by_label.items():
        yield _class_question(task, categories[label], group, size_wh)
    # An image without objects still teaches what is not there: it counts as one with a single class. What is left over
    # of a ratio such as 0.3 is asked for by chance, for to round it would ask images of few classes for nothing.
    wanted = options.negative_ratio * max(len(by_label), 1)
    chance = stable_uniforms(1, "negatives", options.seed, image_id, task)[0]
    for thing in draw_absent_things(present, int(wanted + chance), statistics, options.seed, image_id, task):
        yield _class_question(task, categories.things[thing], [], size_wh)


def _boxes_to_name(
    things: Sequence[Segment], size_wh: tuple[int, int], categories: CategorySet
) -> Iterator[_Candidate]:
    """Ask one question per numbered thing whose box, as text, has an extent and belongs to no other thing."""
    boxes = [format_box(segment.box_xyxy, size_wh) for segment in things]
    for segment, box in zip(things, boxes, strict=True):
        if not segment.numbering or boxes.count(box) > 1 or not has_extent(segment.box_xyxy, size_wh):
            continue
        category = categories[segment.label]
        words = {**_names_of(category), "box": box, "object": format_object(segment)}
        yield _Candidate(box, words, category.display_name, "present", (segment.id,))


def _class_question(task: str, category: Category, group: Sequence[Segment], size_wh: tuple[int, int]) -> _Candidate:
    words = _names_of(category)
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
    return _Candidate(str(category.label), words, answers.get(task), polarity, tuple(segment.id for segment in group))


def _names_of(category: Category) -> dict[str, str]:
    """Return the words for a thing class, by placeholder."""
    return {
        "name": category.display_name,
        "singular": category.singular,
        "a_name": category.with_article,
        "plural": category.plural,
    }
