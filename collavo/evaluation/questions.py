"""Make the questions of an evaluation, with their true answers, from the rows of a data set."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from collavo.evaluation.judge import Judge
from collavo.instructions.text import Box, format_box, format_object, fractions_of
from schemas.crayon_row import CrayonRow, Dialogue, Instruction

DIALOGUE = "dialogue"
"""The task made of the short answers in visual-instruction dialogues."""

EVALUATED_TASKS = ("class_to_binary", "box_to_class", "counting", "class_to_box", DIALOGUE)

_SHORT_ANSWER_WORDS = 4

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
"""Chinese and Japanese put no spaces between words; there, a character counts as one."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image.

    Args:
        turns: the conversation; it ends with the question, and its earlier answers are the true ones.
        truth: the true answer, as `collavo.evaluation.judge.Judge.judge` takes it.
        category: the thing class that is asked for or has to be named; None for dialogues, and where a user's own
            phrasing does not name it.
        polarity: whether that class is `present` or `absent`.
        boxes: for class_to_box, the true boxes before they were written with two decimals, as fractions.
    """

    image_id: str
    task: str
    turns: tuple[tuple[str, str], ...]
    truth: str
    category: str | None = None
    polarity: str | None = None
    boxes: tuple[Box, ...] = ()


def questions_of(row: CrayonRow, tasks: Sequence[str], judge: Judge) -> list[Question]:
    """List the questions of a row that belong to some of `EVALUATED_TASKS`; a row without an image has none."""
    if not row.has_image:
        return []
    asked = [
        _instruction_question(row, i, judge) for i in row.instructions if i.task in tasks and i.task in EVALUATED_TASKS
    ]
    if DIALOGUE in tasks:
        asked += [question for dialogue in row.conversations for question in _dialogue_questions(row, dialogue)]
    return asked


def _instruction_question(row: CrayonRow, instruction: Instruction, judge: Judge) -> Question:
    by_id = {segment.id: segment for segment in row.segments}
    meant = [by_id[id_] for id_ in instruction.segment_ids]
    boxes: tuple[Box, ...] = ()
    match instruction.task:
        case "class_to_box":
            truth = ", ".join(format_box(segment.box_xyxy, row.size_wh) for segment in meant)
            boxes = tuple(fractions_of(segment.box_xyxy, row.size_wh) for segment in meant)
        case "box_to_class":
            truth = format_object(meant[0])
        case _:
            truth = instruction.label or ""
    # Segments tell the class of what is present; an absent class is named in the question only.
    named = judge.categories[meant[0].label] if meant else judge.named_category(instruction.question)
    return Question(
        image_id=row.image_id,
        task=instruction.task,
        turns=(("human", instruction.question),),
        truth=truth,
        category=named.display_name if named and named.is_thing else None,
        polarity=instruction.polarity,
        boxes=boxes,
    )


def _dialogue_questions(row: CrayonRow, dialogue: Dialogue) -> Iterator[Question]:
    first = sum(speaker == "system" for speaker, _ in dialogue.turns[:1])
    if any(speaker != ("human", "gpt")[i % 2] for i, (speaker, _) in enumerate(dialogue.turns[first:])):
        return  # it is unclear which turn answers which
    for position, (speaker, value) in enumerate(dialogue.turns):
        if speaker == "gpt" and 0 < len(_WORD.findall(value)) <= _SHORT_ANSWER_WORDS:
            yield Question(row.image_id, DIALOGUE, dialogue.turns[:position], value)
