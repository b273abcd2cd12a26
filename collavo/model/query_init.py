"""Start the queries as the names of their classes (`--query_start names`).

The language model has embeddings of words and numbers already. If the signal of a cell with the second dog starts as
the embeddings of "dog" and "2", the model can read it from the first step on. The paper's queries start at random, and
first have to find vectors that mean something to the language model.
"""

from typing import Any

import torch
from peft import PeftModel

from collavo.errors import UserError
from collavo.model.class_words import class_tokens, name_vectors, word_tokens
from collavo.model.crayon_prompt import UnitEmbedding
from collavo.model.modeling import CollavoForConditionalGeneration
from collavo.model.processing import CollavoProcessor
from schemas.categories import COCO_PANOPTIC, MAX_NUMBERING, CategorySet


class ClassWords:
    """All class names and numbers, as vectors for the Crayon Prompt.

    Args:
        tokenizer: the language model's.
    """

    def __init__(self, tokenizer: Any, categories: CategorySet) -> None:
        self._names = class_tokens(tokenizer, categories)
        self._numbers = word_tokens(tokenizer, map(str, range(1, MAX_NUMBERING + 1)))

    def vectors(self, model: CollavoForConditionalGeneration) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute what the attention of the first layer would receive for each word in a text.

        That is the vector of the word (see `collavo.model.class_words`), times the weights of the layer's norm: the
        signal is added behind that norm.

        Returns:
            vectors, float [classes + 1, hidden] by semantic index and [21, hidden] by number, zero for index 0,
            unknown; and the weights of the norm, float [hidden].
        """
        language_model: Any = model.model.language_model
        embeddings = language_model.embed_tokens
        weight = language_model.layers[0].input_layernorm.weight
        names, numbers = (name_vectors(tokens, embeddings).to(weight.device) for tokens in (self._names, self._numbers))
        return names, numbers, weight


@torch.no_grad()
def begin_with_names(model: CollavoForConditionalGeneration, tokenizer: Any) -> None:
    """Set the queries of a model to the names of their classes and to numbers, in place.

    Raises:
        UserError: for a model whose signal is not added to the attention inputs.
    """
    if model.config.crayon_signal != "attention_input":
        signal = model.config.crayon_signal
        raise UserError(f"queries cannot start as names where the crayon signal is {signal!r}, only at random")
    if model.config.has_crayon_prompt:
        vectors = ClassWords(tokenizer, model.config.category_set).vectors(model)
        model.model.crayon_prompt.begin_with(*(v.float() for v in vectors))


@torch.no_grad()
def adopt_categories(
    model: CollavoForConditionalGeneration | PeftModel, processor: CollavoProcessor, categories: CategorySet
) -> list[str]:
    """Give a model, and its processor, a query for each class of another set, in place.

    A class that the model knows by name keeps its query; a new one begins at random. Queries that are computed from
    names need nothing but the names.

    Args:
        model: with or without adapters.

    Returns:
        the names of the classes that keep their query.
    """
    # peft's wrapper has a `model` too, which is not the one that holds the queries.
    collavo: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own = collavo.config.category_set
    collavo.config.categories = processor.category_records = (
        None if categories is COCO_PANOPTIC else categories.as_records()
    )
    processor.__dict__.pop("categories", None)  # it is cached
    kept = {key: category for key, category in categories.by_key.items() if key in own.by_key}
    queries = getattr(getattr(collavo.model, "crayon_prompt", None), "semantic_queries", None)
    if collavo.config.class_tokens is not None:
        collavo.config.class_tokens = class_tokens(processor.tokenizer, categories)
    elif queries is not None:
        old = queries.weight
        fresh = UnitEmbedding(categories.semantic_indices, old.shape[1], device=old.device, dtype=old.dtype)
        fresh.weight[0] = old[0]
        for key, category in kept.items():
            fresh.weight[category.label + 1] = old[own.by_key[key].label + 1]
        collavo.model.crayon_prompt.semantic_queries = fresh
    return [category.display_name for category in kept.values()]
