"""Questions of an evaluation, out of the rows of a data set: what is asked, and what is true."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from collavo.errors import UserError
from collavo.evaluation.judge import named_category
from collavo.instructions.text import format_box, format_object
from schemas.categories import Category
from schemas.crayon_row import CrayonRow, Dialogue, Instruction

DIALOGUE = "dialogue"
"""The task made of the short answers in visual-instruction dialogues."""

EVALUATED_TASKS = ("class_to_binary", "box_to_class", "counting", "class_to_box", DIALOGUE)

_SHORT_ANSWER_WORDS = 4
_ROWS_IN_MEMORY = 50


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image.

    `turns` end with the question; what comes before are true answers. `truth` is as `collavo.evaluation.judge.judge`
    takes it. `category` is the thing class that is asked for or has to be named, None for dialogues and where a user's
    own phrasing does not show it; `polarity` says whether that class is in the image.
    """

    image_id: str
    task: str
    turns: tuple[tuple[str, str], ...]
    truth: str
    category: str | None = None
    polarity: str | None = None


def rows_of_split(files: Sequence[Path], split: str) -> Iterator[CrayonRow]:
    """The rows of one split, in order, a bounded number in memory.

    Raises:
        UserError: if the split has none.
    """
    found = 0
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=_ROWS_IN_MEMORY):
            wanted = batch.filter(pc.equal(batch["split"], split))
            found += wanted.num_rows
            yield from map(CrayonRow.from_record, wanted.to_pylist())
    if not found:
        rows = sum(pq.read_metadata(file).num_rows for file in files)
        raise UserError(f"--split {split}: none of the {rows} rows of --data is in it")


def questions_of(row: CrayonRow, tasks: Sequence[str]) -> list[Question]:
    """The questions about a row's image, of some of `EVALUATED_TASKS`."""
    asked = [_instruction_question(row, i) for i in row.instructions if i.task in tasks and i.task in EVALUATED_TASKS]
    if DIALOGUE in tasks:
        asked += [question for dialogue in row.conversations for question in _dialogue_questions(row, dialogue)]
    return asked


def _instruction_question(row: CrayonRow, instruction: Instruction) -> Question:
    by_id = {segment.id: segment for segment in row.segments}
    meant = [by_id[id_] for id_ in instruction.segment_ids]
    match instruction.task:
        case "class_to_box":
            truth = ", ".join(format_box(segment.box_xyxy, (row.width, row.height)) for segment in meant)
        case "box_to_class":
            truth = format_object(meant[0])
        case _:
            truth = instruction.label or ""
    # Rows tell the class of what is there; for what is not, the question has to.
    category: Category | None = meant[0].category if meant else named_category(instruction.question)
    return Question(
        image_id=row.image_id,
        task=instruction.task,
        turns=(("human", instruction.question),),
        truth=truth,
        category=category.display_name if category and category.is_thing else None,
        polarity=instruction.polarity,
    )


def _dialogue_questions(row: CrayonRow, dialogue: Dialogue) -> Iterator[Question]:
    if any(speaker != ("human", "gpt")[i % 2] for i, (speaker, _) in enumerate(dialogue.turns)):
        return  # nobody knows what answers what
    for position, (speaker, value) in enumerate(dialogue.turns):
        if speaker == "gpt" and 0 < len(value.split()) <= _SHORT_ANSWER_WORDS:
            yield Question(row.image_id, DIALOGUE, dialogue.turns[:position], value)
