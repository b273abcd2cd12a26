"""Names of classes as vectors of the language model.

A language model knows words already. The vector of a name is the sum of the embeddings of its tokens, scaled to a root
mean square of 1. Semantic queries can start as such vectors (`--query_start names`), or be computed from them
(`--semantic_queries words`); then a class needs no training of its own, only a name.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

from schemas.categories import CategorySet


def class_tokens(tokenizer: Any, categories: CategorySet) -> list[list[int]]:
    """Return the tokens of the name of each class, as in the middle of a text."""
    return word_tokens(tokenizer, (f" {category.display_name}" for category in categories))


def word_tokens(tokenizer: Any, words: Iterable[str]) -> list[list[int]]:
    """Return the tokens of each word."""
    return [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]


def name_vectors(tokens: Sequence[Sequence[int]], embeddings: nn.Embedding) -> torch.Tensor:
    """Compute the vectors of some names.

    Args:
        tokens: those of each name.
        embeddings: those of the language model.

    Returns:
        float [names + 1, hidden]; the first is zero, which stands for unknown.
    """
    # Called as a module, since accelerate may keep its weights on a disk, and brings them for the call.
    device = torch.device("cpu") if embeddings.weight.is_meta else embeddings.weight.device
    flat = torch.tensor([token for name in tokens for token in name], dtype=torch.int64, device=device)
    found: torch.Tensor = embeddings(flat).float()
    owners = torch.tensor([i for i, name in enumerate(tokens, start=1) for _ in name], dtype=torch.int64)
    sums = found.new_zeros(len(tokens) + 1, found.shape[1]).index_add(0, owners.to(found.device), found)
    return normalize(sums, dim=-1) * found.shape[1] ** 0.5
