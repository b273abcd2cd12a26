"""CoLLaVO as a transformers model: LLaVA, with the crayon signal added to the image tokens at every attention input.

How the signal gets there, without a line of the language model rewritten:

1. `CollavoModel.get_image_features` computes it from the crayon maps, beside the features of the vision tower. Whatever
   transformers does with these (it repeats them for beams, splits them for a prefill in chunks), it does with both.
2. `CollavoModel.forward` spreads it over the sequence, zero at all tokens but the image's, and passes it to LLaVA's
   forward as one more keyword argument, `crayon_signal`.
3. transformers' decoders hand keyword arguments they do not know on to their layers, and these to `self_attn`.
4. There a pre-forward hook removes the keyword and adds the signal to `hidden_states`.

Because the signal is an argument of the ordinary call, and no state of a module, the rest of transformers works as it
is. Gradient checkpointing repeats the call with the same arguments. The KV cache holds keys and values that contain the
signal, so it is passed once, with the image, and later tokens need none. Beams and batches are rows of tensors.

Any language model will do whose layers hand their keyword arguments on to a module called `self_attn`: transformers'
Llama, Qwen, Mistral and InternLM3, among others. With `crayon_signal="low_rank_branches"`, the same keyword carries
what the branches of the authors' release need (`collavo.model.branches`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    GenerationMixin,
    LlavaForConditionalGeneration,
    LlavaModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils import TransformersKwargs
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from collavo.model.branches import CRAYON_SIGNAL, CellSignal, add_low_rank_branches
from collavo.model.class_words import name_vectors
from collavo.model.configuration import CollavoConfig
from collavo.model.crayon_prompt import ClosedLinear, CrayonPrompt, UnitEmbedding, UnitLinear
from collavo.model.packing import packing_mask

_accept_old_cache_name = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
"""As LLaVA's own forward does; without it, `cache=None` would win over keys and values given by the old name."""


@dataclass
class CollavoImageOutput(BaseModelOutputWithPooling):
    """What is known of images before the language model: LLaVA's features, and the crayon signal of their cells."""

    deepstack_features: Any = None
    """A tuple with one entry, the signal: float [tokens, hidden_size] for every image. The name is transformers' for
    features that enter at the decoder's layers; what has this name is repeated and split together with the others."""


class CollavoModel(LlavaModel):
    """Vision tower, projector, language model and Crayon Prompt, without a language head."""

    config_class = CollavoConfig

    def __init__(self, config: CollavoConfig) -> None:
        super().__init__(config)
        if config.has_crayon_prompt:
            self.crayon_prompt = CrayonPrompt(
                config.crayon_width,
                config.text_config.hidden_size,
                len(config.category_set) if config.class_tokens is None else None,
                config.semantic_queries,
                config.numbering_queries,
            )
            if config.crayon_signal == "low_rank_branches":
                self.low_rank_branches = add_low_rank_branches(self.language_model.layers, config.branch_rank)
            else:
                for layer in self.language_model.layers:
                    layer.self_attn.register_forward_pre_hook(_add_crayon_signal, with_kwargs=True)
        elif config.crayon_signal == "low_rank_branches":
            raise ValueError("crayon_signal 'low_rank_branches' needs semantic_queries, numbering_queries or both")
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        semantic_ids: torch.Tensor | None = None,
        numbering_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute LLaVA's image features and the crayon signal of the same images.

        Args:
            semantic_ids, numbering_ids: int [images, rows, columns]; see `CrayonPrompt`. None for all unknown.
        """
        features = super().get_image_features(
            pixel_values=pixel_values,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
            return_dict=True,
            **kwargs,
        )
        if not self.config.has_crayon_prompt:
            return features
        unknown = torch.zeros(len(pixel_values), *self.config.grid_hw, dtype=torch.int64, device=pixel_values.device)
        inputs = [unknown if ids is None else ids for ids in (semantic_ids, numbering_ids)]
        if self.config.class_tokens is not None:
            inputs.append(name_vectors(self.config.class_tokens, self.language_model.embed_tokens))
        cells = self.crayon_prompt(*inputs)
        if features.pooler_output[0].shape[0] == cells.shape[1] + 1:
            # With vision_feature_select_strategy="full", CLIP's class token comes first. It belongs to no cell.
            cells = nn.functional.pad(cells, (0, 0, 1, 0))
        return CollavoImageOutput(**features, deepstack_features=(cells,))

    @_accept_old_cache_name
    def forward(  # type: ignore[misc]  # the keywords that transformers lists repeat `position_ids`, as with LLaVA
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        semantic_ids: torch.Tensor | None = None,
        numbering_ids: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaModelOutputWithPast:
        """Run LLaVA's forward, with the crayon maps of the images that enter in this call.

        Args:
            semantic_ids, numbering_ids: int [images, rows, columns]; see `get_image_features`.
            sequence_ids: int [batch, tokens] for packed sequences; see `collavo.model.packing`.

        Raises:
            ValueError: if images, crayon maps and image tokens do not match.
        """
        if sequence_ids is not None:
            # A mask with four dimensions is used as it is, in place of the causal mask that transformers would make.
            attention = self.language_model.config._attn_implementation
            attention_mask = packing_mask(sequence_ids, attention, self.dtype)
        if pixel_values is not None and not mm_encoder_outputs:
            features = self.get_image_features(
                pixel_values,
                vision_feature_layer,
                vision_feature_select_strategy,
                image_sizes,
                semantic_ids,
                numbering_ids,
                **{**kwargs, "return_dict": True},
            )
            pixel_values, mm_encoder_outputs = None, {"image": features}
        cells = getattr((mm_encoder_outputs or {}).get("image"), "deepstack_features", None)
        if cells is not None:
            kwargs[CRAYON_SIGNAL] = self._signal(torch.cat([*cells[0]]), input_ids, inputs_embeds)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ClosedLinear | UnitEmbedding | UnitLinear):
            module.reset_parameters()

    def _signal(
        self, cells: torch.Tensor, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor | CellSignal:
        """Spread the crayon signal over the image tokens, zero at all others: float [batch, tokens, hidden_size].

        For low-rank branches, it is the signal of the cells alone, with their positions.

        Args:
            cells: float [image tokens, hidden_size].
        """
        # Image tokens stand in the order of the patches, row by row, and images in the order of the batch, as LLaVA
        # scatters its patch embeddings. So the n-th image token gets the n-th cell.
        embeds: Any = cells[None] if inputs_embeds is None else inputs_embeds
        ids: Any = input_ids
        image_tokens = self.get_placeholder_mask(ids, embeds, cells[None]).to(cells.device)
        if self.config.crayon_signal == "low_rank_branches":
            # Sorted, because their number is known beforehand; `nonzero` would make a GPU wait, and cannot be exported.
            order = image_tokens.flatten().int().argsort(descending=True, stable=True)
            return CellSignal(order[: len(cells)], cells)
        return cells.new_zeros(*image_tokens.shape[:2], cells.shape[-1]).masked_scatter(image_tokens, cells)


class CollavoForConditionalGeneration(LlavaForConditionalGeneration, GenerationMixin):
    """CoLLaVO with its language head: what is trained, saved, loaded, and asked."""

    config_class = CollavoConfig

    def __init__(self, config: CollavoConfig) -> None:
        # LLaVA's own constructor would build a LlavaModel, so it is skipped and its three other lines repeated.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = CollavoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        self.never_generate_images()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, or a run directory, which holds what was trained on another model.

        Of the keywords, a run directory takes `dtype`, `device_map` and `quantize`; see
        `collavo.runs.load_run_in_place`.
        """
        source = pretrained_model_name_or_path
        if source is not None and (Path(source) / "train_args.json").exists():
            from collavo.runs import load_run_in_place  # it stands above this module, and imports it

            return load_run_in_place(Path(source), **kwargs)
        return super().from_pretrained(source, *args, **kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Recompute activations in the backward pass, as in every transformers model.

        Raises:
            ValueError: for reentrant checkpointing. It runs a backward pass for each layer, and all of them would go
                through the one signal that the layers share.
        """
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}  # peft hands on {}
        if options["use_reentrant"]:
            raise ValueError("the crayon signal needs checkpointing that is not reentrant: use_reentrant=False")
        super().activation_checkpointing_enable(options, *args, **kwargs)

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Read the generation settings of a saved model; `from_pretrained` calls it."""
        super().adjust_generation_fn(*args, **kwargs)  # type: ignore[misc]  # its self is a protocol
        self.never_generate_images()

    def never_generate_images(self) -> None:
        """Keep image tokens out of what is generated, by the generation settings."""
        # Prompt look-up proposes what followed the last words before: after "Assistant:", what came after "User:".
        self.generation_config.suppress_tokens = [self.config.image_token_id]

    @_accept_old_cache_name
    def forward(  # type: ignore[misc]  # the keywords that transformers lists repeat `position_ids`, as with LLaVA
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        semantic_ids: torch.Tensor | None = None,
        numbering_ids: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        supervised_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaCausalLMOutputWithPast:
        """Run LLaVA's forward with crayon maps and packed sequences; see `CollavoModel.forward`.

        The parameters are LLaVA's in LLaVA's order, then ours. They are all named here, because `generate` and the
        trainers read from the signature what a model understands.

        With `supervised_only=True` and labels, the language head runs only on positions whose next token is supervised.
        Most tokens are the image's, and a vocabulary is wide, so this saves much memory. The loss is the same;
        `logits` then has one row per such position.
        """
        if labels is not None and supervised_only:
            logits_to_keep, kwargs["shift_labels"] = _supervised_positions(labels)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            mm_encoder_outputs=mm_encoder_outputs,
            semantic_ids=semantic_ids,
            numbering_ids=numbering_ids,
            sequence_ids=sequence_ids,
            **kwargs,
        )


def _supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the positions whose next token is supervised, bool as `labels`, and those tokens."""
    next_labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    keep = next_labels != -100
    return keep, next_labels[keep]


def _add_crayon_signal(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # Popped, because attention implementations refuse keywords that they do not know.
    signal = kwargs.pop(CRAYON_SIGNAL, None)
    if signal is not None:
        # Of the states' type, and on their device: the layers of a model may be spread over several GPUs.
        kwargs["hidden_states"] = kwargs["hidden_states"] + signal.to(kwargs["hidden_states"])
    return args, kwargs


AutoConfig.register("collavo", CollavoConfig)
AutoModel.register(CollavoConfig, CollavoModel)
AutoModelForImageTextToText.register(CollavoConfig, CollavoForConditionalGeneration)
