"""CoLLaVO as a transformers model: LLaVA, with the crayon signal added to the image tokens at every attention input.

How the signal gets there, without a line of the language model rewritten:

1. `CollavoModel.forward` computes it from the crayon maps, zero at all tokens but the image's, and passes it to
   LLaVA's forward as one more keyword argument, `crayon_signal`.
2. transformers' decoders hand keyword arguments they do not know on to their layers, and these to `self_attn`.
3. There a pre-forward hook removes the keyword and adds the signal to `hidden_states`.

Because the signal is an argument of the ordinary call, and no state of a module, the rest of transformers works as it
is. Gradient checkpointing repeats the call with the same arguments. The KV cache holds keys and values that contain the
signal, so it is passed once, with the image, and later tokens need none. Beams and batches are rows of tensors.

Any language model will do whose layers hand their keyword arguments on to a module called `self_attn`: transformers'
Llama, Qwen, Mistral and InternLM3, among others. With `crayon_signal="low_rank_branches"`, the same keyword carries
what the branches of the authors' release need (`collavo.model.branches`).
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast

from collavo.model.branches import CRAYON_SIGNAL, CellSignal, add_low_rank_branches
from collavo.model.configuration import CollavoConfig
from collavo.model.crayon_prompt import ClosedLinear, CrayonPrompt, UnitEmbedding, UnitLinear
from collavo.model.packing import packing_mask


class CollavoModel(LlavaModel):
    """Vision tower, projector, language model and Crayon Prompt, without a language head."""

    config_class = CollavoConfig

    def __init__(self, config: CollavoConfig) -> None:
        super().__init__(config)
        if config.has_crayon_prompt:
            self.crayon_prompt = CrayonPrompt(
                config.crayon_width,
                config.text_config.hidden_size,
                len(config.category_set),
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

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        semantic_ids: torch.Tensor | None = None,
        numbering_ids: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """Run LLaVA's forward, with the crayon maps of the images that enter in this call.

        Args:
            semantic_ids, numbering_ids: int [images, rows, columns]; see `CrayonPrompt`.
            sequence_ids: int [batch, tokens] for packed sequences; see `collavo.model.packing`.
            kwargs: of LLaVA's forward, such as keys and values computed before.

        Raises:
            ValueError: if images come without crayon maps, or do not match their image tokens.
        """
        if sequence_ids is not None:
            # A mask with four dimensions is used as it is, in place of the causal mask that transformers would make.
            attention = self.language_model.config._attn_implementation
            attention_mask = packing_mask(sequence_ids, attention, self.dtype)
        # `generate` may run the vision tower first and pass its outputs, in which case there are no pixels.
        has_images = pixel_values is not None or (mm_encoder_outputs or {}).get("image") is not None
        if has_images and self.config.has_crayon_prompt:
            kwargs[CRAYON_SIGNAL] = self.signal(input_ids, semantic_ids, numbering_ids)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ClosedLinear | UnitEmbedding | UnitLinear):
            module.reset_parameters()

    def signal(
        self, input_ids: torch.Tensor | None, semantic_ids: torch.Tensor | None, numbering_ids: torch.Tensor | None
    ) -> torch.Tensor | CellSignal:
        """The crayon signal at the image tokens, zero at all others: float [batch, tokens, hidden].

        For low-rank branches, it is the signal of the cells alone, with their positions.

        Raises:
            ValueError: if an input is missing, or the image tokens are not as many as the cells.
        """
        if input_ids is None or semantic_ids is None or numbering_ids is None:
            raise ValueError("with images, input_ids, semantic_ids and numbering_ids are needed beside pixel_values")
        cells = self.crayon_prompt(semantic_ids, numbering_ids)
        image_tokens = input_ids == self.config.image_token_id
        if image_tokens.sum() * cells.shape[-1] != cells.numel():
            raise ValueError(
                f"{int(image_tokens.sum())} image tokens in input_ids for {cells.shape[0]} crayon maps of "
                f"{cells.shape[1]} cells; the processor makes one token per cell"
            )
        if self.config.crayon_signal == "low_rank_branches":
            return CellSignal(image_tokens.flatten().nonzero().squeeze(1), cells.flatten(0, 1))
        # Image tokens stand in the order of the patches, row by row, and images in the order of the batch, as LLaVA
        # scatters its patch embeddings. So the n-th image token gets the n-th cell.
        return cells.new_zeros(*input_ids.shape, cells.shape[-1]).masked_scatter(image_tokens.unsqueeze(-1), cells)


class CollavoForConditionalGeneration(LlavaForConditionalGeneration):
    """CoLLaVO with its language head: what is trained, saved, loaded, and asked."""

    config_class = CollavoConfig

    def __init__(self, config: CollavoConfig) -> None:
        # LLaVA's own constructor would build a LlavaModel, so it is skipped and its three other lines repeated.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = CollavoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        semantic_ids: torch.Tensor | None = None,
        numbering_ids: torch.Tensor | None = None,
        sequence_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """Run LLaVA's forward with crayon maps and packed sequences; see `CollavoModel.forward`.

        With `supervised_only=True` and labels, the language head runs only on positions whose next token is supervised.
        Most tokens are the image's, and a vocabulary is wide, so this saves much memory. The loss is the same;
        `logits` then has one row per such position.
        """
        if labels is not None and kwargs.pop("supervised_only", False):
            kwargs.update(_supervised_positions(labels))
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            semantic_ids=semantic_ids,
            numbering_ids=numbering_ids,
            sequence_ids=sequence_ids,
            labels=labels,
            **kwargs,
        )


def _supervised_positions(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The positions whose next token is supervised, and those tokens, in the form that transformers' forward takes."""
    next_labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    keep = next_labels != -100
    return {"logits_to_keep": keep, "shift_labels": next_labels[keep]}


def _add_crayon_signal(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # Popped, because attention implementations refuse keywords that they do not know.
    signal = kwargs.pop(CRAYON_SIGNAL, None)
    if signal is not None:
        kwargs["hidden_states"] = kwargs["hidden_states"] + signal.to(kwargs["hidden_states"].dtype)
    return args, kwargs


AutoConfig.register("collavo", CollavoConfig)
AutoModel.register(CollavoConfig, CollavoModel)
AutoModelForImageTextToText.register(CollavoConfig, CollavoForConditionalGeneration)
