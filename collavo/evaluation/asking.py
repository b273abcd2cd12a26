"""Ask a model the questions of rows, under one or several object lists, and judge its answers."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from collavo.errors import LeftOut, Rejected, UserError
from collavo.evaluation.judge import Judge
from collavo.evaluation.questions import DIALOGUE, Question, questions_of
from collavo.evaluation.scores import Answered, judged
from collavo.inference import Answerer, Picture, picture_of_row
from collavo.instructions.text import format_box
from collavo.model.processing import CollavoProcessor
from collavo.model.prompt import Kind
from schemas.categories import MAX_NUMBERING, CategorySet
from schemas.crayon_row import CrayonRow

_MAX_NEW_TOKENS = {"class_to_binary": 32, "box_to_class": 32, "counting": 32, DIALOGUE: 32}

_TOKENS_AROUND = 64
"""Of a sentence that boxes stand in."""


def ask_questions(
    answerer: Answerer,
    rows: Iterable[CrayonRow],
    tasks: Sequence[str],
    object_lists: Sequence[str],
    judge: Judge,
    image_root: Path | None,
    batch_size: int,
    left_out: LeftOut,
) -> dict[str, list[Answered]]:
    """Ask everything under each object list.

    Args:
        tasks: of `collavo.evaluation.questions.EVALUATED_TASKS`.
        object_lists: `trained`, `with` or `none`, see `Answerer.lists_objects`.
        judge: of the set of classes that the rows have.
        image_root: the folder of the images, for rows that refer to their image.
        batch_size: questions that are answered together.
        left_out: where rows are counted whose picture or map is missing or damaged, and questions that are too long
            for the model or whose true answer is missing.

    Returns:
        the judged answers by object list, in the order of the rows.
    """
    answers: dict[str, list[Answered]] = {object_list: [] for object_list in object_lists}
    limits = _MAX_NEW_TOKENS | {"class_to_box": tokens_of_boxes(answerer.processor, judge.categories)}
    for pictures, questions in _groups(rows, tasks, judge, image_root, batch_size, left_out):
        for object_list, answered in answers.items():
            requests, asked = [], []
            for number, question in questions:
                listed = answerer.lists_objects(kind_of(question.task), object_list)
                try:
                    requests.append(
                        answerer.request(number, pictures[number], question.turns, listed, limits[question.task])
                    )
                except UserError as error:
                    _leave_out(left_out, "too_long_question", question, str(error))
                    continue
                asked.append(question)
            texts = answerer.answer(pictures, requests, batch_size) if requests else []
            answered += [judged(question, text, judge) for question, text in zip(asked, texts, strict=True)]
    return answers


def _leave_out(left_out: LeftOut, reason: str, question: Question, detail: str) -> None:
    left_out.add(reason, f"{question.task} of {question.image_id}", detail)


def tokens_of_boxes(processor: CollavoProcessor, categories: CategorySet) -> int:
    """Count the tokens of the longest true answer to class_to_box: as many objects of the longest name as are
    numbered."""
    box = (0.0, 0.0, 1.0, 1.0)
    texts = [
        ", ".join(f"(#{n} {category.display_name}) {format_box(box, (1, 1))}" for n in range(1, MAX_NUMBERING + 1))
        for category in categories.things
    ]
    return max((len(tokens) for tokens in processor.tokenizer(texts).input_ids), default=0) + _TOKENS_AROUND


def unknown_classes(answerer: Answerer, categories: CategorySet) -> str | None:
    """Say which classes of a data set the model has no query for; None where it has all of them, or none at all."""
    unknown = answerer.without_query(categories)
    if not unknown:
        return None
    names = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
    return f"the model has no query for {len(unknown)} of {len(categories)} classes ({names}); to it they are unknown"


def _groups(
    rows: Iterable[CrayonRow],
    tasks: Sequence[str],
    judge: Judge,
    image_root: Path | None,
    batch_size: int,
    left_out: LeftOut,
) -> Iterator[tuple[list[Picture], list[tuple[int, Question]]]]:
    """Yield as many pictures as it takes to fill a batch, with all of their questions by the picture's number."""
    pictures: list[Picture] = []
    questions: list[tuple[int, Question]] = []
    for row in rows:
        if asked := questions_of(row, tasks, judge):
            try:
                picture = picture_of_row(row, image_root, judge.categories)
            except Rejected as error:
                left_out.add(error.reason, f"image of {row.image_id}", str(error))
                continue
            for question in asked:
                if judge.is_truth(question.task, question.truth):
                    questions.append((len(pictures), question))
                else:
                    _leave_out(left_out, "missing_label", question, f"its true answer is {question.truth!r}")
            pictures.append(picture)
        if len(questions) >= batch_size:
            yield pictures, questions
            pictures, questions = [], []
    if questions:
        yield pictures, questions


def kind_of(task: str) -> Kind:
    """Return the kind of sequence that a task is trained with."""
    return "dialogue" if task == DIALOGUE else "crayon"
