"""Teach a base the words that other people's classes are called by.

    python -m pretraining.class_words --start runs/boxes/model --output runs/words

The tokenizer of `pretraining.base` knows the words of COCO's classes and of the scenes. To it, any other word is
several tokens, and the base, which reads and writes words one by one, makes nothing of `p`, `o` and `le`. Here each
word of `class_words.txt`, and the form in which it is counted, becomes one token. These are the words that lists of
classes are made of: those of streets, homes, food, animals, tools and sports, and of pictures from above.

Nothing learns but the embeddings of the new tokens: on the word grids of `word_grids`, where they stand beside words
that the base knows, and on scenes, where they must stay out of the answers. All other weights stay as they are.

The output's folder `model` is a base for `collavo.train --preset`. Repeat the command to continue a stopped run.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from collavo import cli
from collavo.categories import read_categories
from collavo.cli import REQUIRED, flag, naming
from collavo.model import CollavoForConditionalGeneration
from collavo.model.class_words import word_tokens
from collavo.model.processing import CollavoProcessor
from collavo.runs import load_base
from collavo.training.batches import Example, MicroBatch
from pretraining.base import CHART_PICTURES, PretrainingExamples, chart_picture, save_base, train_base
from pretraining.loop import LoopOptions
from pretraining.word_grids import Lesson, chart_example, draw_chart
from schemas.categories import COCO_PANOPTIC, Category, CategorySet

WORDS = Path(__file__).with_name("class_words.txt")

Rotation = tuple[Lesson | Literal["scene"], ...]

ROTATION: Rotation = ("all", "where", "all", "tiles", "all", "scene")
"""What the batches hold, in turn."""

_WORDS_OF_CHART = 24
"""Words that a chart chooses from, and asks for in vain."""

_FIRST_CHART = 3_000_000
_WORDS_SEED, _ROWS_SEED = 7_000_079, 7_000_103

_QUIETED = 0.8
"""By what the new embeddings are scaled in the end. They grow while they learn, and then come up in place of words that
the base knew: this gives back 2 points of those in boxes, and takes 2 points of the new ones (benchmarks/LOG.md,
2026-11-30)."""

_RIDGE = 0.05
"""Of the regression of plurals to singulars, over the squared norms of 61 words."""


def known_and_new_words() -> CategorySet:
    """Return COCO's classes, with their labels, and behind them each word of the list as a thing."""
    known = {category.display_name for category in COCO_PANOPTIC}
    listed = [{"name": word} for word in WORDS.read_text().split() if word not in known]
    new = read_categories(listed, WORDS.name, are_things=True)
    return CategorySet.from_records("known and new words", [*COCO_PANOPTIC.as_records(), *new.as_records()])


def with_whole_words(tokenizer: Any, categories: CategorySet) -> PreTrainedTokenizerFast:
    """Return a tokenizer to which every word of the classes' names and counted forms is one token.

    All that has no such word in it has the tokens that it had. The new ones come last, in the order of the classes.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for category in categories:
        for form in (category.display_name, category.singular, category.plural):
            for word in filter(str.isalpha, form.split()):  # `floor-wood` is cut at its hyphen anyway
                vocabulary.setdefault(f"Ġ{word}", len(vocabulary))
    state["model"]["ignore_merges"] = True  # a word that the vocabulary has is found before any pieces are merged
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        model_max_length=tokenizer.model_max_length,
    )


@torch.no_grad()
def add_words(model: CollavoForConditionalGeneration, processor: CollavoProcessor, categories: CategorySet) -> int:
    """Give a base and its processor a token for each word of some classes, in place.

    New singulars begin as random vectors, spread as those of known words are; plurals as a linear regression over known
    words has them follow from their singular.

    Returns:
        the number of tokens there were before.
    """
    before = len(processor.tokenizer)  # there may be more embeddings, which no token has
    processor.tokenizer = with_whole_words(processor.tokenizer, categories)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    embeddings = model.get_input_embeddings().weight
    forms = [(category.singular, category.plural) for category in categories.things]
    tokens = [word_tokens(processor.tokenizer, (f" {word}" for word in pair)) for pair in forms]
    pairs = {(one[0], many[0]) for one, many in tokens if len(one) == len(many) == 1 and one != many}
    known = [pair for pair in sorted(pairs) if max(pair) < before]
    ones, manys = (embeddings[list(each)] for each in zip(*known, strict=True))
    from_one, from_many = ones - ones.mean(0), manys - manys.mean(0)
    gram = from_one @ from_one.T + _RIDGE * torch.eye(len(known))
    to_plural = from_one.T @ torch.linalg.solve(gram, from_many)
    spread = torch.linalg.cholesky(torch.cov(ones.T) + 1e-6 * torch.eye(ones.shape[1]))
    drawn = torch.randn(len(embeddings) - before, ones.shape[1], generator=torch.Generator().manual_seed(_ROWS_SEED))
    embeddings[before:] = ones.mean(0) + drawn @ spread.T
    for one, many in sorted(pairs):
        if many >= before:
            embeddings[many] = manys.mean(0) + (embeddings[one] - ones.mean(0)) @ to_plural
    return before


def some_words(words: Sequence[Category], index: int) -> list[Category]:
    """Draw the words that chart number `index` chooses from."""
    rng = np.random.Generator(np.random.Philox(key=[_WORDS_SEED, index]))
    return [words[i] for i in rng.choice(len(words), _WORDS_OF_CHART, replace=False)]


class WordExamples(Dataset[Example]):
    """Charts and scenes, in turn; the examples of a step are of one kind.

    Args:
        rotation: what the steps hold, in turn.
        first: number of the first chart or scene.
        words_of: returns the words that an example's chart chooses from, by its place.
    """

    def __init__(
        self,
        processor: CollavoProcessor,
        batch_size: int,
        rotation: Rotation,
        first: int,
        words_of: Callable[[int], Sequence[Category]],
    ) -> None:
        self._processor = processor
        self._batch_size = batch_size
        self._rotation = rotation
        self._first = first
        self._words_of = words_of
        self._scenes = PretrainingExamples(processor, batch_size)

    def __getitem__(self, index: int) -> Example:
        lesson = self._rotation[index // self._batch_size % len(self._rotation)]
        if lesson == "scene":
            return self._scenes.scene(self._first + index)
        chart = draw_chart(self._first + index, self._processor.grid_hw, lesson, self._words_of(index))
        return chart_example(chart, chart_picture(index % CHART_PICTURES), self._processor)


class NewWords(nn.Module):
    """A base of which nothing learns but the embeddings from some token on."""

    def __init__(self, model: CollavoForConditionalGeneration, first: int) -> None:
        super().__init__()
        model.requires_grad_(False)
        self.embeddings = model.get_input_embeddings().weight
        self.embeddings.requires_grad_(True)
        self.embeddings.register_hook(partial(_without_first, first))
        self._model = [model]  # in a list, so that the embeddings alone are this module's

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Return the loss on the answers of a batch."""
        with torch.autocast("cpu", torch.bfloat16):
            loss: torch.Tensor = self._model[0](**batch.inputs, supervised_only=True, use_cache=False).loss
        return loss


def _without_first(first: int, gradient: torch.Tensor) -> torch.Tensor:
    kept = gradient.clone()
    kept[:first] = 0
    return kept


@dataclass(frozen=True, slots=True)
class Flags:
    start: str = flag(REQUIRED, "base that learns the words", metavar="DIR")
    output: str = flag(REQUIRED, "folder for checkpoints, metrics and the model", metavar="DIR")
    steps: int = flag(1000, "updates", least=1)
    batch_size: int = flag(8, "charts or scenes per update", least=1)
    learning_rate: float = flag(1e-2, "peak of the learning rate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the module's docstring describes it."""
    return cli.run("pretraining.class_words", lambda: _train(argv))


def _train(argv: Sequence[str] | None) -> None:
    flags = cli.parse(
        Flags,
        argv,
        prog="python -m pretraining.class_words",
        usage="python -m pretraining.class_words --start DIR --output DIR [options]",
        description="Teach a base the words that other people's classes are called by.",
        epilog="Repeat the command to continue a stopped run.",
    )
    with naming("start"):
        model, processor = load_base(flags.start, torch.float32)
    categories = known_and_new_words()
    first = add_words(model, processor, categories)
    Console().print(f"{len(model.get_input_embeddings().weight) - first:,} new tokens")
    run, words = Path(flags.output), NewWords(model, first)
    words_of = partial(some_words, categories.things)
    examples = WordExamples(processor, flags.batch_size, ROTATION, _FIRST_CHART, words_of)
    options = LoopOptions(
        flags.steps, flags.batch_size, flags.learning_rate, warmup_steps=10, weight_decay=0.0, checkpoint_steps=100
    )
    train_base(run, model, processor, words, examples, options, categories)
    with torch.no_grad():
        words.embeddings[first:] *= _QUIETED
    save_base(run, model, processor)


if __name__ == "__main__":
    raise SystemExit(main())
