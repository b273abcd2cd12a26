"""What a language model reads for the name of a class and for a number, as vectors that a cell's signal can be.

A Crayon Prompt whose queries begin there (`--query_start names`) says to the language model what it has words for
already; the paper's queries begin at random and have to find such words first.
"""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch.nn.functional import embedding_bag, normalize

from collavo.model.modeling import CollavoForConditionalGeneration
from schemas.categories import CATEGORIES, MAX_NUMBERING


class ClassWords:
    """The tokens of all class names and numbers.

    Args:
        tokenizer: the language model's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._names = _bags(tokenizer, ["", *(f" {category.display_name}" for category in CATEGORIES)])
        self._numbers = _bags(tokenizer, ["", *map(str, range(1, MAX_NUMBERING + 1))])

    def vectors(self, model: CollavoForConditionalGeneration) -> tuple[torch.Tensor, torch.Tensor]:
        """What the first layer's attention is given for such a word where it stands in a text: the embeddings of its
        tokens, summed, scaled to a root mean square of 1 and weighted as the layer's norm does.

        Returns:
            float [134, hidden] by semantic index and [21, hidden] by number; zero for index 0, which means unknown.
        """
        language_model: Any = model.model.language_model
        embeddings = language_model.embed_tokens.weight
        weight = language_model.layers[0].input_layernorm.weight
        scale, device = weight * embeddings.shape[1] ** 0.5, weight.device
        names, numbers = (
            normalize(embedding_bag(tokens.to(device), embeddings, starts.to(device), mode="sum"), dim=-1) * scale
            for tokens, starts in (self._names, self._numbers)
        )
        return names, numbers


@torch.no_grad()
def begin_with_names(model: CollavoForConditionalGeneration, tokenizer: Any) -> None:
    """Let the queries of a model begin as the names of their classes and as numbers, in place.

    Raises:
        ValueError: for a model whose signal is not added to the attention inputs.
    """
    if model.config.crayon_signal != "attention_input":
        raise ValueError(f"queries cannot begin as names where the crayon signal is {model.config.crayon_signal!r}")
    if model.config.has_crayon_prompt:
        model.model.crayon_prompt.begin_with(*(v.float() for v in ClassWords(tokenizer).vectors(model)))


def _bags(tokenizer: Any, words: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of all words in a row, and where those of each begin."""
    tokens = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    starts = accumulate((len(ids) for ids in tokens[:-1]), initial=0)
    return torch.tensor([*chain.from_iterable(tokens)]), torch.tensor([*starts])
