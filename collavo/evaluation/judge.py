"""Judge an answer: read what its text says, and compare it with the truth.

The same functions read truth and answer. An unreadable answer, which does not say what was asked for at all, is wrong;
it is counted apart from a readable wrong answer.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from collavo.instructions.text import Box, ObjectMention, find_boxes, parse_objects
from schemas.categories import Category, CategorySet

IOU_OF_A_HIT = 0.5
"""The least overlap with which a box counts as found, where boxes are judged right or wrong."""

_NUMBER_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_NUMBERS = {"no": 0, "none": 0, **{word: number for number, word in enumerate(_NUMBER_WORDS)}}
# Not a count: the ordinal `#2`, the coordinate 0.25.
_COUNT = re.compile(rf"(?<![#\d.])(\d+)(?![\d.]*\d)|\b({'|'.join(_NUMBERS)})\b", re.IGNORECASE | re.ASCII)
_PARENTHESIS = re.compile(r"\([^()]*\)")
_DENIAL = re.compile(r"\b(?:no|not|none|nothing)\b", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_OF_A_NUMBER = re.compile(r"(?<=\d)[^\w\s](?=\d)|(?<!\w)-(?=\d)")
_ARTICLES = {"a", "an", "the"}


class Judgement(NamedTuple):
    """The verdict on an answer: `score` is 0 or 1, for boxes the mean overlap; `read` is None if it cannot be read."""

    score: float
    correct: bool
    read: str | None


class Judge:
    """Judges answers about the classes of one set."""

    def __init__(self, categories: CategorySet) -> None:
        self.categories = categories
        self._by_form: dict[str, Category] = {
            form.casefold(): category
            for category in reversed(categories)
            for form in (category.plural, category.singular, category.display_name)
            if form
        }
        # Longest first, so that "hot dog" is not read as "dog".
        forms = sorted(self._by_form, key=len, reverse=True)
        self._any_form = re.compile(rf"\b(?:{'|'.join(map(re.escape, forms))})\b", re.IGNORECASE)

    def judge(self, task: str, answer: str, truth: str) -> Judgement:
        """Judge the answer to a question of `schemas.crayon_row.TASKS`, or of a `dialogue`.

        Args:
            truth: by task `yes` or `no`, an object like `(#1 person)`, a number in digits, boxes like
                `[0.00, 0.16, 0.29, 0.88]`, or a short answer.
        """
        if task == "box_to_class":
            return self._judge_class(answer, truth)
        return _JUDGES[task](answer, truth)

    @staticmethod
    def is_truth(task: str, truth: str) -> bool:
        """Tell whether an answer to a task can be judged by a text; it cannot where another tool lost the label."""
        read = {"class_to_binary": r"yes|no", "counting": r"\d+"}.get(task)
        return read is None or re.fullmatch(read, truth, re.ASCII) is not None

    def named_category(self, text: str) -> Category | None:
        """Find the class that a free text names first, by its name, singular or plural; None if it names none."""
        match = self._any_form.search(text)
        return self._by_form[match[0].casefold()] if match else None

    def _judge_class(self, answer: str, truth: str) -> Judgement:
        """Judge by the class alone; `read` holds the number too."""
        said, true = self._mentioned(answer), parse_objects(truth, self.categories.by_display_name)[0]
        if said is None:
            return _exact(None, truth)
        read = f"(#{said.numbering} {said.name})" if said.numbering else f"({said.name})"
        return Judgement(float(said.name == true.name), said.name == true.name, read)

    def _mentioned(self, answer: str) -> ObjectMention | None:
        """Find the first object in the form `(#2 person)`, or else the first class that is named."""
        for match in _PARENTHESIS.finditer(answer):
            try:
                return parse_objects(match[0], self.categories.by_display_name)[0]
            except ValueError:
                continue
        category = self.named_category(answer)
        return ObjectMention(category.display_name, 0, None) if category else None


def box_iou(first: Box, second: Box) -> float:
    """Compute intersection over union; 1 for equal boxes even if they have no area."""
    if first == second:
        return 1.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


def matched_ious(found: Sequence[Box], true: Sequence[Box]) -> np.ndarray:
    """Match boxes one to one for the largest sum of IoUs; the IoU of each pair, float64 [min(found, true)]."""
    from scipy.optimize import linear_sum_assignment  # scipy is slow to load, and --help needs this module's names

    ious = np.array([[box_iou(one, other) for other in true] for one in found]).reshape(len(found), len(true))
    return ious[linear_sum_assignment(ious, maximize=True)]


def normalised(text: str) -> str:
    """Strip a short answer of case, punctuation and articles, in which two right answers may differ.

    What stands between digits and a minus before one stay, as in VQA's rule: 2.5 is not 25, nor -5 the same as 5.
    """
    text = _THOUSANDS.sub("", text.casefold())
    kept = {match.start() for match in _OF_A_NUMBER.finditer(text)}
    words = "".join([c for i, c in enumerate(text) if i in kept or unicodedata.category(c)[0] not in "PS"]).split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)  # "A" alone is an option, no article


def _judge_binary(answer: str, truth: str) -> Judgement:
    first = normalised(answer).partition(" ")[0]
    return _exact(first if first in ("yes", "no") else None, truth)


def _judge_count(answer: str, truth: str) -> Judgement:
    match = _COUNT.search(answer)
    if match is None:
        return _exact(None, truth)
    return _exact(str(int(match[1]) if match[1] else _NUMBERS[match[2].casefold()]), truth)


def _judge_boxes(answer: str, truth: str) -> Judgement:
    """Score the mean IoU of matched boxes; a surplus or missing box counts as 0."""
    found, true = find_boxes(answer), find_boxes(truth)
    if not found and not _DENIAL.search(answer):
        return Judgement(0.0, False, None)
    most = max(len(found), len(true))
    ious = matched_ious(found, true)
    hits = int((ious >= IOU_OF_A_HIT).sum())
    score = float(ious.sum()) / most if most else 1.0
    return Judgement(score, hits == most, f"{len(found)} boxes")


def _judge_short_answer(answer: str, truth: str) -> Judgement:
    return _exact(normalised(answer) or None, normalised(truth))


def _exact(read: str | None, truth: str) -> Judgement:
    return Judgement(float(read == truth), read == truth, read)


_JUDGES: Mapping[str, Callable[[str, str], Judgement]] = {
    "class_to_binary": _judge_binary,
    "counting": _judge_count,
    "class_to_box": _judge_boxes,
    "dialogue": _judge_short_answer,
}
