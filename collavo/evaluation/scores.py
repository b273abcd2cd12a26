"""Compute figures of judged answers: per class as in the paper (mean, top 20, bottom 20), and those of each task."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import ceil, floor
from typing import Any

import numpy as np

from collavo.evaluation.judge import Judge, Judgement, box_iou
from collavo.evaluation.questions import Question
from collavo.instructions.text import Box

EXTREME_CLASSES = 20
"""The number of classes in the paper's top, and in its bottom."""

_WRONG_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with a model's answer, judged."""

    question: Question
    answer: str
    judgement: Judgement


def judged(question: Question, answer: str, judge: Judge) -> Answered:
    """Judge the answer to a question."""
    return Answered(question, answer, judge.judge(question.task, answer, question.truth))


def summarise(answers: Iterable[Answered], grid_hw: tuple[int, int] | None = None) -> dict[str, dict[str, Any]]:
    """Compute all figures by task, as plain values.

    Every task has `questions`, `correct` (a share), `unreadable` (a number) and `wrong_answers` (a sample). If classes
    are known, there are also `classes` with their numbers of questions and mean scores, best first, and `mean`,
    `top_20` and `bottom_20` over the classes. A score is an accuracy, or for class_to_box the mean IoU of questions
    about present classes. Fewer than 20 classes are all in both top and bottom.

    Args:
        grid_hw: rows and columns of the model's crayon map. With them, two bounds stand beside the mean IoU of
            class_to_box and of each of its classes: that of the best boxes on the lines between cells, and that of the
            true boxes written with two decimals.
    """
    by_task: dict[str, list[Answered]] = defaultdict(list)
    for answered in answers:
        by_task[answered.question.task].append(answered)
    return {task: _task_figures(task, answers, grid_hw) for task, answers in by_task.items()}


def _task_figures(task: str, answers: Sequence[Answered], grid_hw: tuple[int, int] | None) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "questions": len(answers),
        "correct": _mean(a.judgement.correct for a in answers),
        "unreadable": sum(a.judgement.read is None for a in answers),
    }
    for polarity in ("present", "absent"):
        if some := [a.judgement.correct for a in answers if a.question.polarity == polarity]:
            figures[f"correct_{polarity}"] = _mean(some)
    # An absent class has no box to overlap with.
    measured = [a for a in answers if task != "class_to_box" or a.question.polarity != "absent"]
    figures |= _class_figures(measured)
    match task:
        case "class_to_binary":
            figures |= binary_figures(answers)
        case "box_to_class":
            figures["correct_with_number"] = _mean(a.judgement.read == a.question.truth for a in answers)
        case "class_to_box":
            figures["mean_iou"] = _mean(a.judgement.score for a in measured) if measured else None
            if measured and grid_hw:
                figures |= _box_bounds(measured, grid_hw)
                for name, of_class in figures.get("classes", {}).items():
                    of_class |= _box_bounds([a for a in measured if a.question.category == name], grid_hw)
        case "counting":
            errors = [abs(int(a.judgement.read) - int(a.question.truth)) for a in answers if a.judgement.read]
            figures["mean_absolute_error"] = _mean(errors) if errors else None
    wrong = [a for a in answers if not a.judgement.correct]
    figures["wrong_answers"] = [
        {**asdict(a.question), "answer": a.answer, "read": a.judgement.read}
        for a in wrong[:: max(len(wrong) // _WRONG_SHOWN, 1)][:_WRONG_SHOWN]
    ]
    return figures


def binary_figures(answers: Sequence[Answered]) -> dict[str, float]:
    """Compute POPE's figures: precision, recall and F1 of `yes`, and the share of questions answered with it."""
    said = np.array([a.judgement.read == "yes" for a in answers])
    true = np.array([a.question.truth == "yes" for a in answers])
    hits = int((said & true).sum())
    precision, recall = hits / max(int(said.sum()), 1), hits / max(int(true.sum()), 1)
    f1 = 2 * hits / max(int(said.sum() + true.sum()), 1)
    return {"precision": precision, "recall": recall, "f1": f1, "yes_ratio": float(said.mean())}


def _box_bounds(answers: Sequence[Answered], grid_hw: tuple[int, int]) -> dict[str, float]:
    asked = [a.question.boxes for a in answers]
    return {
        "cell_lines": _mean(_mean(overlap_on_cell_lines(box, grid_hw) for box in boxes) for boxes in asked),
        "two_decimals": _mean(_mean(map(overlap_in_two_decimals, boxes)) for boxes in asked),
    }


def _class_figures(answers: Sequence[Answered]) -> dict[str, Any]:
    scores: dict[str, list[float]] = defaultdict(list)
    for answered in answers:
        if answered.question.category is not None:
            scores[answered.question.category].append(answered.judgement.score)
    if not scores:
        return {}
    ranked = sorted(
        ((_mean(of_class), name) for name, of_class in scores.items()), key=lambda entry: (-entry[0], entry[1])
    )
    means = [mean for mean, _ in ranked]
    return {
        "mean": _mean(means),
        "top_20": _mean(means[:EXTREME_CLASSES]),
        "bottom_20": _mean(means[-EXTREME_CLASSES:]),
        "classes": {name: {"questions": len(scores[name]), "score": mean} for mean, name in ranked},
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def overlap_on_cell_lines(box: Box, grid_hw: tuple[int, int]) -> float:
    """Compute the largest IoU with a box, in fractions of the picture, that a box made of whole cells can have.

    A model that knows an object by the cells of its grid, and no more, cannot on average overlap better with its box.
    """
    rows, columns = grid_hw
    cells = (columns, rows, columns, rows)
    # The overlap grows until a side meets that of the box, and falls behind it: the best line is one of its neighbours.
    lines = [
        {line / count for line in (floor(side * count), ceil(side * count))}
        for side, count in zip(box, cells, strict=True)
    ]
    return max((_overlap(one, box) for one in product(*lines) if one[0] < one[2] and one[1] < one[3]), default=0.0)


def overlap_in_two_decimals(box: Box) -> float:
    """Compute the IoU of a box, in fractions of the picture, with what text says of it."""
    return _overlap((round(side, 2) for side in box), box)


def _overlap(sides: Iterable[float], box: Box) -> float:
    x_min, y_min, x_max, y_max = sides
    return box_iou((x_min, y_min, x_max, y_max), box)
