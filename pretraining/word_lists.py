"""Lists of words and numbers with questions that only the list answers, and questions about a picture's colours.

They teach what a large language model can already do: find a word among others, say that it is not there, read numbers,
and know which part of a picture a box of numbers means. They name no object of a picture.
"""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from collavo.instructions.text import format_box
from collavo.model.prompt import Turns
from collavo.scenes.drawing import COLORS
from schemas.categories import COCO_PANOPTIC, Category

QUESTIONS_PER_LIST = 6
"""Questions about single words, beside those that ask for many words in turn."""

SHORT_LISTS = 5
"""Short lists in one sequence."""

COLOR_QUESTIONS = 4
"""Questions about a picture's colours."""

_NUMBERS_SEED, _WORDS_SEED, _COLORS_SEED, _SHORT_SEED = 7_000_001, 7_000_003, 7_000_009, 7_000_033


def word_dialogue(index: int) -> Turns:
    """Ask to copy, compare or continue numbers, or for the plural of a word."""
    rng = _generator(_NUMBERS_SEED, index)
    kind = int(rng.integers(4))
    if kind == 0:
        numbers = ", ".join(f"{value:.2f}" for value in rng.random(int(rng.integers(1, 9))))
        return [("human", f"Write it again: [{numbers}]"), ("gpt", f"[{numbers}]")]
    if kind == 1:
        first, second = (round(float(value), 2) for value in rng.random(2))
        return [("human", f"Which is more, {first:.2f} or {second:.2f}?"), ("gpt", f"{max(first, second):.2f}.")]
    if kind == 2:
        start = int(rng.integers(20))
        return [
            ("human", f"Go on: {', '.join(str(start + i) for i in range(4))}"),
            ("gpt", ", ".join(str(start + i) for i in range(4, 10))),
        ]
    thing = COCO_PANOPTIC.things[int(rng.integers(len(COCO_PANOPTIC.things)))]
    return [("human", f"What is the plural of {thing.singular}?"), ("gpt", f"{thing.plural}.")]


def list_dialogues(index: int) -> list[Turns]:
    """Ask several questions about one list of words; each is a conversation that begins with the list."""
    rng = _generator(_WORDS_SEED, index)
    some = [COCO_PANOPTIC[i] for i in rng.permutation(len(COCO_PANOPTIC))[: rng.integers(4, 12)]]
    absent, present = some[: len(some) // 2], some[len(some) // 2 :]
    words = [present[i] for i in rng.integers(len(present), size=rng.integers(2, 11))]
    if rng.random() < 0.5:
        words = sorted(words, key=present.index)
    form = int(rng.integers(3))
    listing = _repeated(words, rng) if form == 2 else (_plain, _numbered)[form](words)
    answers = [[_copied(words)], *_for_each([*dict.fromkeys(present), *absent], words, rng)]
    for number in range(QUESTIONS_PER_LIST):
        asked = words[int(rng.integers(len(words)))] if number % 2 else absent[int(rng.integers(len(absent)))]
        answers.append([_about(words, asked, number)])
    return [_turns(listing, some) for some in answers]


def short_list_dialogues(index: int) -> list[Turns]:
    """Ask about several short lists, each time only whether this word or that is in it."""
    rng = _generator(_SHORT_SEED, index)
    dialogues: list[Turns] = []
    for _ in range(SHORT_LISTS):
        some = [COCO_PANOPTIC[i] for i in rng.permutation(len(COCO_PANOPTIC))[:8]]
        words = some[: rng.integers(1, 6)]
        # A coin toss for each word: if always half of them were listed, the first answers would give away the last.
        absent = some[len(words) :]
        asked = [absent.pop() if absent and rng.random() < 0.5 else words[rng.integers(len(words))] for _ in range(6)]
        dialogues.append(_turns(_plain(words), [_is_in(word, words) for word in asked]))
    return dialogues


def color_dialogues(image: np.ndarray, index: int) -> list[Turns]:
    """Ask whether a picture has a colour, and which colour fills most of a box.

    Args:
        image: uint8 [height, width, 3].
    """
    rng = _generator(_COLORS_SEED, index)
    names, values = list(COLORS), np.array(list(COLORS.values()), np.int32)
    rows, columns = (np.linspace(0, size - 1, 48).astype(int) for size in image.shape[:2])
    small = image[rows][:, columns].astype(np.int32)
    nearest = np.abs(small[:, :, None] - values).sum(-1).argmin(-1)
    shares = np.bincount(nearest.ravel(), minlength=len(names)) / nearest.size
    dialogues: list[Turns] = []
    for number in range(COLOR_QUESTIONS):
        if number == 0:
            candidates = np.flatnonzero(shares > 0.01) if rng.random() < 0.5 else np.flatnonzero(shares == 0)
            if len(candidates):
                color = int(rng.choice(candidates))
                question = f"Is there anything {names[color]} in the image?"
                dialogues.append([("human", question), ("gpt", "Yes." if shares[color] else "No.")])
            continue
        (x_min, x_max), (y_min, y_max) = _interval(rng), _interval(rng)
        inside = np.bincount(nearest[y_min:y_max, x_min:x_max].ravel(), minlength=len(names))
        box = format_box((x_min, y_min, x_max, y_max), (48, 48))
        dialogues.append([("human", f"What colour is most of {box}?"), ("gpt", f"{names[int(inside.argmax())]}.")])
    return dialogues


def _turns(listing: str, questions: list[tuple[str, str]]) -> Turns:
    (first, answer), *others = questions
    return [
        ("human", f"The list: {listing}. {first}"),
        ("gpt", answer),
        *(turn for q, a in others for turn in (("human", q), ("gpt", a))),
    ]


def _interval(rng: np.random.Generator) -> tuple[int, int]:
    """Return begin and end of an interval of 4 to 20 within 0 to 48."""
    length = int(rng.integers(4, 21))
    begin = int(rng.integers(48 - length + 1))
    return begin, begin + length


def _copied(words: list[Category]) -> tuple[str, str]:
    return "Write it with numbers.", f"{_numbered(words)}."


def _is_in(word: Category, words: list[Category]) -> tuple[str, str]:
    return f"{word.display_name}?", "Yes." if word in words else "No."


def _for_each(
    asked: list[Category], words: list[Category], rng: np.random.Generator
) -> Iterator[list[tuple[str, str]]]:
    """Ask for one word after the other; a model learns to find words soonest when the answer follows at once."""
    some = [asked[i] for i in rng.permutation(len(asked))]
    yield [_is_in(word, words) for word in some]
    yield [(f"How many {word.plural or word.display_name}?", f"{words.count(word)}.") for word in some]


def _about(words: list[Category], asked: Category, number: int) -> tuple[str, str]:
    match number // 2 % 3:
        case 0:
            name = asked.with_article if asked.is_thing else asked.display_name
            return f"Is there {name} in the list?", "Yes." if asked in words else "No."
        case 1:
            return f"How many {asked.plural or asked.display_name} are in the list?", f"{words.count(asked)}."
        case _ if number % 2:
            return f"Which word comes after {asked.display_name}?", _after(words, asked)
        case _:
            return "Which words are there?", ", ".join(dict.fromkeys(word.display_name for word in words)) + "."


def _after(words: list[Category], asked: Category) -> str:
    """Return the word that follows the first run of a word."""
    runs = [word for word, _ in groupby(words)]
    following = runs[runs.index(asked) + 1 :]
    return f"{following[0].display_name}." if following else "None."


def _plain(words: list[Category]) -> str:
    return ", ".join(word.display_name for word in words)


def _numbered(words: list[Category]) -> str:
    return ", ".join(f"(#{words[:i].count(w) + 1} {w.display_name})" for i, w in enumerate(words))


def _repeated(words: list[Category], rng: np.random.Generator) -> str:
    """List every word and its number several times, as the cells of a picture repeat them."""
    texts = [f"{word.display_name} {words[:i].count(word) + 1}" for i, word in enumerate(words)]
    return " / ".join(" ".join([text] * int(rng.integers(1, 5))) for text in texts)


def _generator(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, index]))
