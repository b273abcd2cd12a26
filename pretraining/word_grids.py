"""Word grids: words and numbers laid over the cells of a picture, with questions that only the grid answers.

The questions, and the names below, call a grid a chart. Its words enter the language model as vectors, in the place of
the Crayon Prompt's signal. A chart teaches what a large language model can already do: find a word wherever it stands,
count, and know which part of a picture a box of numbers means.

Words lie as objects do in a crayon map: in any shape, one behind the other, most of them small, on a ground of other
words. But a chart has nothing to do with the picture below it: no segmentation, no crayon query and no object of the
picture takes part.
"""

from collections import Counter, defaultdict
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
from schemas.categories import COCO_PANOPTIC, Category, CategorySet

CHART = "chart"
"""The image id of every chart."""

QUESTIONS_PER_CHART = 15

MAX_WORDS, MAX_PLACES = 8, 20
"""Most different words on a chart, and most places where they stand; its ground comes on top."""

Lesson = Literal["whether", "tiles", "all", "where"]
"""What a chart teaches: `whether` a word is there; what stands in a box, on charts that four words share like `tiles`;
`all`, which needs the first two and is learned soonest after them, in this order; `where` a word stands, as boxes."""

WHERE_QUESTIONS, MOST_BOXES = 4, 4
"""Number of questions of a chart that ask where a word stands, and most places of such a word."""

_ASKED = {
    "whether": ("whether",),
    "tiles": ("what",),
    "all": ("whether", "count", "count", "what", "what", "what"),
}

_STUFF = [category for category in COCO_PANOPTIC if not category.is_thing]
_SEED = 7_000_051

_POINTS = 8
"""Points per cell and axis at which words are drawn, so that a word's box begins and ends within cells, as an object's
does."""

_SIDES = (0.6, 6.0)
"""Smallest and largest side of a word's place in cells; the logarithm of a side is uniform."""

_LEAST_POINTS = 8
"""Points of a place that must be visible; a place that others cover further is taken away."""

_NEAR = 1.0
"""Standard deviation in cells between a place and the one it is put near, as every second place is: things overlap, and
then the thing that a box belongs to is not the one that fills most of it."""


class Chart(NamedTuple):
    """A chart in the form of a Crayon Prompt's input, and conversations about it."""

    semantic_ids: torch.Tensor
    """int64 [rows, columns]"""

    numbering_ids: torch.Tensor
    """int64 [rows, columns]"""

    dialogues: list[Turns]


class WordPrompt(nn.Module):
    """Stands in for the Crayon Prompt and gives the words of a chart as the language model's own embeddings.

    Args:
        categories: whose labels the words of its charts have.
    """

    def __init__(
        self, model: CollavoForConditionalGeneration, tokenizer: Any, categories: CategorySet = COCO_PANOPTIC
    ) -> None:
        super().__init__()
        self._words = ClassWords(tokenizer, categories)
        self._model = [model]  # in a list, or torch would make the model a part of its own part

    def forward(self, semantic_ids: torch.Tensor, numbering_ids: torch.Tensor) -> torch.Tensor:
        """See `CrayonPrompt.forward`."""
        names, numbers, scale = self._words.vectors(self._model[0])
        return ((names[semantic_ids] + numbers[numbering_ids]) * scale).flatten(1, 2)


class _Place(NamedTuple):
    word: Category
    number: int
    box_xyxy: tuple[float, float, float, float]
    """In cells."""

    @property
    def name(self) -> str:
        """Return the word with its number, as `format_object` writes those of a segment."""
        return f"(#{self.number} {self.word.display_name})"


def draw_chart(
    index: int,
    grid_hw: tuple[int, int],
    lesson: Lesson = "all",
    things: Sequence[Category] = COCO_PANOPTIC.things,
) -> Chart:
    """Draw chart number `index` and write questions about it.

    Args:
        things: the words to choose from; those of a ground are COCO's stuff.
    """
    rng = np.random.Generator(np.random.Philox(key=[_SEED, index]))
    semantic, numbering = _ground(rng, grid_hw)
    lay = _lay_tiles if lesson == "tiles" else _lay_words
    places = lay(rng, semantic, numbering, things)
    if lesson == "where":
        while min(Counter(place.word for place in places).values()) > MOST_BOXES:
            semantic, numbering = _ground(rng, grid_hw)
            places = lay(rng, semantic, numbering, things)
        return Chart(torch.from_numpy(semantic), torch.from_numpy(numbering), _where(rng, places, grid_hw, things))
    kinds = _ASKED[lesson]
    dialogues = [
        _question(rng, kinds[number % len(kinds)], places, grid_hw, things) for number in range(QUESTIONS_PER_CHART)
    ]
    return Chart(torch.from_numpy(semantic), torch.from_numpy(numbering), dialogues)


def chart_example(chart: Chart, picture: np.ndarray, processor: CollavoProcessor) -> Example:
    """Make a training example of a chart over a picture, its conversations packed into one sequence.

    Args:
        picture: uint8 [height, width, 3].
    """
    packed = pack_prompts([processor.render(turns) for turns in chart.dialogues], processor.image_token_id)
    return Example("dialogue", CHART, *packed, processor.pixel_values(picture), chart.semantic_ids, chart.numbering_ids)


def _ground(rng: np.random.Generator, grid_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return maps that are empty, or hold stuff words: two, one above the other, and patches of up to three more."""
    semantic, numbering = np.zeros(grid_hw, np.int64), np.zeros(grid_hw, np.int64)
    if rng.random() < 0.8:
        numbering[:] = 1
        patches = [(0, 0), (int(rng.integers(grid_hw[0])), 0), *rng.integers(0, grid_hw, (int(rng.integers(4)), 2))]
        for number, (top, left) in enumerate(patches):
            height, width = grid_hw if number < 2 else rng.integers(1, 6, 2)
            word = _STUFF[int(rng.integers(len(_STUFF)))]
            semantic[top : top + height, left : left + width] = word.label + 1
    return semantic, numbering


def _lay_words(
    rng: np.random.Generator, semantic: np.ndarray, numbering: np.ndarray, things: Sequence[Category]
) -> list[_Place]:
    """Write words into both maps, in place, as `crayon_grid` writes objects of the same shapes."""
    rows, columns = semantic.shape
    words = [things[i] for i in rng.permutation(len(things))[: rng.integers(1, MAX_WORDS + 1)]]
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
    return _write(ids, laid, semantic, numbering) if ids.any() else _lay_words(rng, semantic, numbering, things)


def _lay_tiles(
    rng: np.random.Generator, semantic: np.ndarray, numbering: np.ndarray, things: Sequence[Category]
) -> list[_Place]:
    """Cover both maps with four different words, in place: two by two, or side by side as stripes.

    Half of the returned places are only a part of a word's tile.
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
    tiles = _write(ids, [things[i] for i in rng.permutation(len(things))[:4]], semantic, numbering)
    return [*tiles, *(tile._replace(box_xyxy=_part(rng, tile.box_xyxy)) for tile in tiles)]


def _part(rng: np.random.Generator, box_xyxy: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """Return a box within a box, at least one cell wide and high."""
    x_min, y_min, x_max, y_max = box_xyxy
    left, top = rng.uniform(x_min, x_max - 1), rng.uniform(y_min, y_max - 1)
    return left, top, rng.uniform(left + 1, x_max), rng.uniform(top + 1, y_max)


def _write(ids: np.ndarray, laid: list[Category], semantic: np.ndarray, numbering: np.ndarray) -> list[_Place]:
    """Write the crayon map of words over both maps, in place, and return the words' places.

    Args:
        ids: int [rows * points, columns * points], the position of a word in `laid` + 1, 0 for the ground.
    """
    words = sorted(set(laid), key=lambda word: word.label)
    positions = {word.label: position for position, word in enumerate(words)}
    infos = [SegmentInfo(int(id_), positions[laid[id_ - 1].label]) for id_ in np.unique(ids[ids > 0])]
    # Infos name positions in this set; the segments that come back have the words' own labels.
    drawn = build_panoptic_map(ids, infos, CategorySet("words", tuple(words)))
    labels, numbers = crayon_grid(drawn.index_map, drawn.segments, (semantic.shape[0], semantic.shape[1]))
    np.copyto(semantic, labels, where=labels > 0)
    np.copyto(numbering, numbers, where=labels > 0)
    points = len(ids) // len(semantic)
    places: list[_Place] = []
    for segment in drawn.segments:
        x_min, y_min, x_max, y_max = (side / points for side in segment.box_xyxy)
        word = words[positions[segment.label]]
        places.append(_Place(word, segment.numbering, (x_min, y_min, x_max, y_max)))
    return places


def _question(
    rng: np.random.Generator, kind: str, places: list[_Place], grid_hw: tuple[int, int], things: Sequence[Category]
) -> Turns:
    rows, columns = grid_hw
    place = places[int(rng.integers(len(places)))]
    name = place.name
    if kind == "what":
        # A little off, as the box of an object is not exactly that of its segment.
        x_min, y_min, x_max, y_max = place.box_xyxy
        shift = rng.uniform(-0.1, 0.1, 4) * np.minimum([x_max - x_min, y_max - y_min] * 2, 1)
        box = np.clip(place.box_xyxy + shift, 0, [columns, rows, columns, rows])
        written = format_box(tuple(box), (columns, rows))
        return _turns(
            rng, _WHAT, written, _said(rng, ("It is {}.", "Sure, it is {}.", "That is {}.", "I read {}."), name)
        )
    present = {place.word for place in places}
    absent = [word for word in things if word not in present]
    # Counts above 0 are harder to learn, so they come more often.
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


def _where(
    rng: np.random.Generator, places: list[_Place], grid_hw: tuple[int, int], things: Sequence[Category]
) -> list[Turns]:
    """Ask where words of up to `MOST_BOXES` places stand, now and then a word that is not there."""
    rows, columns = grid_hw
    by_word: dict[Category, list[_Place]] = defaultdict(list)
    for place in sorted(places, key=lambda place: place.number):
        by_word[place.word].append(place)
    few = [word for word in by_word if len(by_word[word]) <= MOST_BOXES]
    absent = [word for word in things if word not in by_word]
    rng.shuffle(few)  # type: ignore[arg-type]
    dialogues = []
    for number in range(WHERE_QUESTIONS):
        if rng.random() < 0.12:
            word = absent[int(rng.integers(len(absent)))]
            answer = _NOWHERE[int(rng.integers(len(_NOWHERE)))].format(word.singular)
        else:
            word = few[number % len(few)]
            answer = _THERE[int(rng.integers(len(_THERE)))].format(
                ", ".join(f"{place.name} {format_box(place.box_xyxy, (columns, rows))}" for place in by_word[word])
            )
        dialogues.append(_turns(rng, _WHERE, word.singular, answer))
    return dialogues


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
_WHERE = (
    "Where is each {}?", "Give the box of every {}.", "Find each {} on the chart.", "At which boxes do you read {}?",
    "Locate every {} by its box.", "Write the boxes of each {} with their numbers.", "In which boxes is each {}?",
)  # fmt: skip
_THERE = ("{}.", "Sure, it is {}.", "Sure, it is {}.", "It is {}.", "I read {}.")
_NOWHERE = (
    "There is no {} in the image.", "There is no {} in the image.", "There is no {} on the chart.", "I read no {}.",
)  # fmt: skip
_ANY = ("Is there any {} on the chart?", "Is any {} in this picture?")


def _said(rng: np.random.Generator, sentences: Sequence[str], answer: str) -> str:
    """Return the answer alone or in a sentence: the model must not rely on where in an answer the word stands."""
    return f"{answer}." if rng.random() < 0.3 else sentences[int(rng.integers(len(sentences)))].format(answer)


def _turns(rng: np.random.Generator, forms: Sequence[str], asked: str, answer: str) -> Turns:
    return [("human", forms[int(rng.integers(len(forms)))].format(asked)), ("gpt", answer)]
