"""Charts: words and numbers laid over the cells of a picture, with questions that only the chart answers.

A chart reaches the language model where a Crayon Prompt's signal will, as the vectors of its words. It teaches what a
large language model brings along: to find a word wherever it stands, to count, and to know which part of a picture a
box of numbers means. Words lie as objects do in a crayon map: of any shape, one behind the other, most of them small,
on a ground of others. But no segmentation, no crayon query and no object of the picture takes part: a chart has nothing
to do with the picture that it lies on.
"""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from collavo.instructions.text import format_box
from collavo.model import CollavoForConditionalGeneration
from collavo.model.processing import CollavoProcessor
from collavo.model.prompt import Turns
from collavo.model.query_init import ClassWords
from collavo.panoptic.grid import crayon_grid
from collavo.panoptic.maps import SegmentInfo, build_panoptic_map
from collavo.training.batches import Example, pack_prompts
from schemas.categories import CATEGORIES, THINGS, Category

CHART = "chart"
"""In place of an image id."""

QUESTIONS = 15
"""About a chart."""

MAX_WORDS, MAX_PLACES = 8, 20
"""Laid over a chart, one on top of the other, and in how many places, beside those of its ground."""

Lesson = Literal["whether", "tiles", "all"]
"""What charts are drawn and asked for: whether a word is there; what stands in a box, on charts that four words share
like tiles; everything. What the third rests on is learned soonest by itself, in this order."""

_ASKED = {
    "whether": ("whether",),
    "tiles": ("what",),
    "all": ("whether", "count", "count", "what", "what", "what"),
}

_STUFF = [category for category in CATEGORIES if not category.is_thing]
_SEED = 7_000_051

_POINTS = 8
"""Along a cell, that words are drawn with: a box of theirs begins and ends within cells, as that of an object does."""

_SIDES = (0.6, 6.0)
"""In cells, of the places of words; small ones are as frequent as large ones, factor by factor."""

_LEAST_POINTS = 8
"""Of a place that others cover; what shows less of itself is taken away."""

_NEAR = 1.0
"""In cells, the deviation of the middle of one place in two from that of another: things stand in each other's way, and
what a box is about is then not what fills most of it."""


class Chart(NamedTuple):
    """A chart as a Crayon Prompt would be given it, and the conversations about it."""

    semantic_ids: torch.Tensor
    """int64 [rows, columns]"""

    numbering_ids: torch.Tensor
    """int64 [rows, columns]"""

    dialogues: list[Turns]


class WordPrompt(nn.Module):
    """In the Crayon Prompt's place, says the words of a chart in the language model's own embeddings."""

    def __init__(self, model: CollavoForConditionalGeneration, tokenizer: Any) -> None:
        super().__init__()
        self._words = ClassWords(tokenizer)
        self._model = [model]  # in a list, lest the model become a part of its own part

    def forward(self, semantic_ids: torch.Tensor, numbering_ids: torch.Tensor) -> torch.Tensor:
        """See `CrayonPrompt.forward`."""
        names, numbers = self._words.vectors(self._model[0])
        return (names[semantic_ids] + numbers[numbering_ids]).flatten(1, 2)


class _Place(NamedTuple):
    word: Category
    number: int
    box_xyxy: tuple[float, float, float, float]
    """In cells."""


def draw_chart(index: int, grid_hw: tuple[int, int], lesson: Lesson = "all") -> Chart:
    """A chart and questions about it."""
    rng = np.random.Generator(np.random.Philox(key=[_SEED, index]))
    semantic, numbering = _ground(rng, grid_hw)
    lay = _lay_tiles if lesson == "tiles" else _lay_words
    places = lay(rng, semantic, numbering)
    kinds = _ASKED[lesson]
    dialogues = [_question(rng, kinds[number % len(kinds)], places, grid_hw) for number in range(QUESTIONS)]
    return Chart(torch.from_numpy(semantic), torch.from_numpy(numbering), dialogues)


def chart_example(chart: Chart, picture: np.ndarray, processor: CollavoProcessor) -> Example:
    """A chart over a picture, its conversations packed, as a model learns from it.

    Args:
        picture: uint8 [height, width, 3].
    """
    packed = pack_prompts([processor.render(turns) for turns in chart.dialogues], processor.image_token_id)
    return Example("dialogue", CHART, *packed, processor.pixel_values(picture), chart.semantic_ids, chart.numbering_ids)


def _ground(rng: np.random.Generator, grid_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Nothing, or stuff words: one above the other, and patches of up to three more."""
    semantic, numbering = np.zeros(grid_hw, np.int64), np.zeros(grid_hw, np.int64)
    if rng.random() < 0.8:
        numbering[:] = 1
        patches = [(0, 0), (int(rng.integers(grid_hw[0])), 0), *rng.integers(0, grid_hw, (int(rng.integers(4)), 2))]
        for number, (top, left) in enumerate(patches):
            height, width = grid_hw if number < 2 else rng.integers(1, 6, 2)
            word = _STUFF[int(rng.integers(len(_STUFF)))]
            semantic[top : top + height, left : left + width] = word.label + 1
    return semantic, numbering


def _lay_words(rng: np.random.Generator, semantic: np.ndarray, numbering: np.ndarray) -> list[_Place]:
    """Write words into both maps, in place, as `crayon_grid` would write objects of the same shapes."""
    rows, columns = semantic.shape
    words = [THINGS[i] for i in rng.permutation(len(THINGS))[: rng.integers(1, MAX_WORDS + 1)]]
    y, x = (np.arange(side * _POINTS) / _POINTS for side in (rows, columns))
    smallest, largest = _SIDES
    ids = np.zeros((len(y), len(x)), int)
    laid = [words[int(rng.integers(len(words)))] for _ in range(int(rng.integers(1, MAX_PLACES + 1)))]
    middles: list[np.ndarray] = []
    for number in range(1, len(laid) + 1):
        height, width = smallest * (largest / smallest) ** rng.uniform(size=2)
        middle_y, middle_x = rng.uniform(size=2) * (rows, columns)
        if middles and rng.random() < 0.5:
            middle_y, middle_x = middles[int(rng.integers(len(middles)))] + rng.normal(scale=_NEAR, size=2)
        middles.append(np.array((middle_y, middle_x)))
        across, along = 2 * abs(y - middle_y)[:, None] / height, 2 * abs(x - middle_x) / width
        ids[(np.hypot(across, along) if rng.random() < 0.5 else np.maximum(across, along)) <= 1] = number
    ids[np.bincount(ids.ravel())[ids] < _LEAST_POINTS] = 0
    return _write(ids, laid, semantic, numbering) if ids.any() else _lay_words(rng, semantic, numbering)


def _lay_tiles(rng: np.random.Generator, semantic: np.ndarray, numbering: np.ndarray) -> list[_Place]:
    """Write four different words that cover all of both maps, in place: two by two, or side by side as stripes.

    What is asked for is as often a part of a word's place as all of it.
    """
    rows, columns = semantic.shape
    splits: list[tuple[int, ...]]
    if rng.random() < 0.5:
        splits = [(0, int(rng.integers(2, side - 1)), side) for side in (rows, columns)]
    else:
        splits = [(0, rows), (0, *sorted(map(int, rng.choice(np.arange(1, columns), 3, replace=False))), columns)]
    ids = np.zeros(semantic.shape, int)
    for number, ((top, bottom), (left, right)) in enumerate(product(*map(pairwise, splits)), start=1):
        ids[top:bottom, left:right] = number
    tiles = _write(ids, [THINGS[i] for i in rng.permutation(len(THINGS))[:4]], semantic, numbering)
    return [*tiles, *(tile._replace(box_xyxy=_part(rng, tile.box_xyxy)) for tile in tiles)]


def _part(rng: np.random.Generator, box_xyxy: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """A box within a box, at least a cell wide and high."""
    x_min, y_min, x_max, y_max = box_xyxy
    left, top = rng.uniform(x_min, x_max - 1), rng.uniform(y_min, y_max - 1)
    return left, top, rng.uniform(left + 1, x_max), rng.uniform(top + 1, y_max)


def _write(ids: np.ndarray, laid: list[Category], semantic: np.ndarray, numbering: np.ndarray) -> list[_Place]:
    """Write the crayon map of words over both maps, in place.

    Args:
        ids: int [rows * points, columns * points], the position of a word in `laid` + 1, 0 for the ground.
    """
    drawn = build_panoptic_map(ids, [SegmentInfo(int(id_), laid[id_ - 1].label) for id_ in np.unique(ids[ids > 0])])
    words, numbers = crayon_grid(drawn.index_map, drawn.segments, (semantic.shape[0], semantic.shape[1]))
    np.copyto(semantic, words, where=words > 0)
    np.copyto(numbering, numbers, where=words > 0)
    points = len(ids) // len(semantic)
    places: list[_Place] = []
    for segment in drawn.segments:
        x_min, y_min, x_max, y_max = (side / points for side in segment.box_xyxy)
        places.append(_Place(segment.category, segment.numbering, (x_min, y_min, x_max, y_max)))
    return places


def _question(rng: np.random.Generator, kind: str, places: list[_Place], grid_hw: tuple[int, int]) -> Turns:
    rows, columns = grid_hw
    place = places[int(rng.integers(len(places)))]
    name = f"(#{place.number} {place.word.display_name})"
    if kind == "what":
        # Not quite that of the place, as that of an object is not quite that of its segment.
        x_min, y_min, x_max, y_max = place.box_xyxy
        shift = rng.uniform(-0.1, 0.1, 4) * np.minimum([x_max - x_min, y_max - y_min] * 2, 1)
        box = np.clip(place.box_xyxy + shift, 0, [columns, rows, columns, rows])
        written = format_box(tuple(box), (columns, rows))
        return _turns(
            rng, _WHAT, written, _said(rng, ("It is {}.", "Sure, it is {}.", "That is {}.", "I read {}."), name)
        )
    present = {place.word for place in places}
    absent = [word for word in THINGS if word not in present]
    # How many there are of a word is harder to learn if there are some.
    word = place.word if rng.random() < (0.7 if kind == "count" else 0.5) else absent[int(rng.integers(len(absent)))]
    if kind == "count":
        count = sum(place.word == word for place in places)
        are, name = ("is", word.singular) if count == 1 else ("are", word.plural)
        counted = f"{count} {name}"
        forms = ("{}.", "The chart has {}.", "I can read {}.", f"There {are} {{}}.")
        return _turns(rng, _COUNT, word.plural, f"{count}." if rng.random() < 0.3 else _said(rng, forms, counted))
    if rng.random() < 0.3:
        return _turns(rng, _ANY, word.singular, "Yes." if word in present else "No.")
    return _turns(rng, _WHETHER, word.with_article, "Yes." if word in present else "No.")


_WHAT = (
    "What is in {}?", "Which word stands at {}?", "What do you read within the box {}?",
    "Name the word and number at {}.", "Tell me what you read within {}.", "What is inside the box {}?",
)  # fmt: skip
_COUNT = (
    "How many {} are on the chart?", "Count the {}.", "How many {} do you read in this picture?",
    "What is the number of {}?", "How many {} can you read?",
)  # fmt: skip
_WHETHER = (
    "Is there {} on the chart?", "Does the chart have {}?", "Can you read {} in the image? Yes or no?",
    "Does the chart contain {}?",
)  # fmt: skip
_ANY = ("Is there any {} on the chart?", "Is any {} in this picture?")


def _said(rng: np.random.Generator, sentences: Sequence[str], answer: str) -> str:
    """Bare, or in a sentence: where in an answer the word or number comes must not matter."""
    return f"{answer}." if rng.random() < 0.3 else sentences[int(rng.integers(len(sentences)))].format(answer)


def _turns(rng: np.random.Generator, forms: Sequence[str], asked: str, answer: str) -> Turns:
    return [("human", forms[int(rng.integers(len(forms)))].format(asked)), ("gpt", answer)]
