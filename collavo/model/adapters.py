"""What is put on the language model for training: NF4 beneath, LoRA adapters beside its linear layers, by peft.

Only the linear layers inside the language model's decoder layers are touched. Vision tower, projector, Crayon Prompt,
embeddings and head keep their precision and get no adapter.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from collavo.errors import UserError
from collavo.model import CollavoForConditionalGeneration

IMAGE_ADAPTER, DIALOGUE_ADAPTER = "image_cit", "vl_cit"
"""Names of the two adapters: crayon batches move the first, dialogue batches the second."""

LINEAR_LAYERS = re.compile(r"model\.language_model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)")
"""Full names of the layers that are quantised and adapted."""


def quantize_language_model(
    model: CollavoForConditionalGeneration, compute_dtype: torch.dtype, device: torch.device
) -> None:
    """Replace the language model's linear layers by NF4 ones, doubly quantised, in place, one at a time.

    Args:
        compute_dtype: of the matrix products.
        device: where the quantised layers end up; the rest of the model is not moved.
    """
    import bitsandbytes as bnb

    for name in linear_layer_names(model):
        parent = model.get_submodule(name.rpartition(".")[0])
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        quantized = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        quantized.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=quantized
        )
        if layer.bias is not None:
            quantized.bias = nn.Parameter(layer.bias.data, requires_grad=False)
        setattr(parent, name.rpartition(".")[2], quantized.to(device))
    setattr(model, "is_loaded_in_4bit", True)  # noqa: B010  # what peft asks before it adapts 4-bit layers


def linear_layer_names(model: nn.Module) -> list[str]:
    """Full names of the layers to quantise and adapt.

    Raises:
        UserError: if there are none, because the language model is not Llama-shaped.
    """
    names = [
        name
        for name, module in model.named_modules()
        if LINEAR_LAYERS.fullmatch(name) and isinstance(module, nn.Linear)
    ]
    if not names:
        raise UserError("the language model has no linear layers under the names of Llama's")
    return names


def add_adapters(model: CollavoForConditionalGeneration, names: Sequence[str], rank: int, alpha: int) -> PeftModel:
    """Put one LoRA adapter per name on the language model, none of them trainable yet."""
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=linear_layer_names(model)
    )
    with without_peft_warnings():
        adapted: PeftModel = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config)
    return adapted


def enable_checkpointing(model: CollavoForConditionalGeneration) -> None:
    """Recompute activations in the backward pass, without reentrance, which frozen inputs would leave without
    gradients."""
    # Before version 5.24 of transformers, `activation` is `gradient`.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """While peft is put on a model: it asks for checkpointing by a name that transformers deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`is_gradient_checkpointing`", FutureWarning)
        yield


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by full name."""
    return {name: parameter for name, parameter in model.named_parameters() if f".{adapter}." in name}
