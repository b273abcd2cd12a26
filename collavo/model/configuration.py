"""Configuration of a CoLLaVO model: LLaVA's, with the settings of the Crayon Prompt."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlavaConfig
from transformers.configuration_utils import SubConfigSpec

from schemas.categories import COCO_PANOPTIC, CategorySet


@strict
class CollavoConfig(LlavaConfig):
    """LLaVA's configuration with the Crayon Prompt.

    The grid of the crayon map is the vision encoder's patch grid, so it needs no entry of its own.
    """

    model_type = "collavo"
    sub_configs_defaults = {  # noqa: RUF012
        **LlavaConfig.sub_configs_defaults,
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_vision_model",
            init_kwargs={**LlavaConfig.sub_configs_defaults["vision_config"].init_kwargs, "image_size": 490},
        ),
    }

    vision_config: Any = None
    text_config: Any = None
    image_seq_length: int | None = None  # type: ignore[assignment]  # LLaVA has a number
    """Image tokens of one image; the cells of the grid, where it is not given."""

    vision_feature_layer: int | list[int] = -1

    crayon_width: int = 1024
    """Width of the queries; 1024 in the authors' release, the language model's width in the paper."""

    semantic_queries: bool = True
    """Whether the signal tells the class of a cell; off for an ablation."""

    numbering_queries: bool = True
    """Whether the signal tells the number of a cell's object within its class; off for an ablation."""

    crayon_signal: Literal["attention_input", "low_rank_branches"] = "attention_input"
    """How the signal enters: added to the image tokens at the input of every attention module (the paper), or through
    low-rank branches beside the linear layers (the authors' release)."""

    branch_rank: int = 256
    """Rank and alpha of those branches; used with `low_rank_branches` only."""

    categories: list[dict[str, Any]] | None = None
    """The set of classes that the semantic queries stand for, as `CategorySet.as_records` has it; None for COCO
    panoptic's 133."""

    class_tokens: list[list[int]] | None = None
    """Tokens of the name of each class, where its semantic query is computed from the language model's embeddings of
    them (see `collavo.model.class_words`); None for a table with a query for each class, which is the paper's."""

    projector_untrained: bool = False
    """Whether the projector is new, so that alignment has to train it before anything else is trained."""

    chat_format: str | dict[str, str] = "paper"
    """The language model's chat format: one of `collavo.model.prompt.CHAT_FORMATS`, or the fields of a `ChatFormat`."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.image_seq_length is None:
            self.image_seq_length = self.grid_hw[0] * self.grid_hw[1]

    @property
    def category_set(self) -> CategorySet:
        """The set of classes that the semantic queries stand for."""
        return CategorySet.from_records("the model", self.categories) if self.categories else COCO_PANOPTIC

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of the crayon map."""
        side: int = self.vision_config.image_size // self.vision_config.patch_size
        return side, side

    @property
    def context(self) -> int:
        """Tokens that a sequence may have: as many as the language model was made for.

        A sliding window counts the padding inside a batch, and what is packed before, so none is longer than one.
        """
        text = self.get_text_config()
        return int(min(text.max_position_embeddings, getattr(text, "sliding_window", None) or math.inf))

    @property
    def has_crayon_prompt(self) -> bool:
        return self.semantic_queries or self.numbering_queries
