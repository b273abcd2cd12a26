"""QLoRA on the language model: its linear layers stored in NF4, and peft's LoRA adapters beside them.

Only the linear layers inside the language model's decoder layers are quantised and adapted. Vision tower, projector,
Crayon Prompt, embeddings and head keep their precision and get no adapter.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from collavo.device import memory_named
from collavo.errors import UserError
from collavo.model import CollavoForConditionalGeneration

IMAGE_ADAPTER, DIALOGUE_ADAPTER = "image_cit", "vl_cit"
"""Names of the two adapters: crayon batches train the first, dialogue batches the second."""

LINEAR_LAYERS = re.compile(r"model\.language_model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)")
"""Full names of the layers that are quantised and adapted."""


WITH_MEMORY = "a GPU that nothing else uses, or the device cpu"
"""What helps where a model does not fit while it is loaded."""


@memory_named(WITH_MEMORY)
def quantize_language_model(
    model: CollavoForConditionalGeneration, compute_dtype: torch.dtype, device: torch.device
) -> None:
    """Replace the language model's linear layers by doubly quantised NF4 ones, in place.

    transformers quantises while it loads a checkpoint; this works on a model in memory, which may be assembled from
    several checkpoints. One layer at a time goes to the device, so a GPU needs room for the quantised layers only.

    Args:
        compute_dtype: of the matrix products.
        device: of the quantised layers; the rest of the model is not moved.

    Raises:
        UserError: if the layers do not fit the device.
    """
    import bitsandbytes as bnb  # takes seconds, and not every model is quantised

    nf4: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    for name in linear_layer_names(model):
        parent = model.get_submodule(name.rpartition(".")[0])
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        quantized = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype, device="meta", **nf4
        )
        quantized.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, module=quantized, **nf4)
        if layer.bias is not None:
            quantized.bias = nn.Parameter(layer.bias.data, requires_grad=False)
        setattr(parent, name.rpartition(".")[2], quantized.to(device))  # the move is what quantises
    setattr(model, "is_loaded_in_4bit", True)  # noqa: B010  # what peft asks before it adapts 4-bit layers


@memory_named(WITH_MEMORY)
@torch.no_grad()
def round_to_nf4(model: CollavoForConditionalGeneration, device: torch.device) -> None:
    """Give the language model's linear layers the values that NF4 would give them, as ordinary weights, in place.

    Raises:
        UserError: as `quantize_language_model`.
    """
    from bitsandbytes import functional as nf4

    for name in linear_layer_names(model):
        weight: Any = model.get_submodule(name).weight
        codes, state = nf4.quantize_4bit(weight.to(device), compress_statistics=True, quant_type="nf4")
        weight.copy_(nf4.dequantize_4bit(codes, state))


def linear_layer_names(model: nn.Module) -> list[str]:
    """Full names of the layers to quantise and adapt.

    Raises:
        UserError: if there are none, because the language model is not Llama-shaped.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linear if LINEAR_LAYERS.fullmatch(name)]
    if not names:
        raise UserError("the language model has no linear layers under the names of Llama's")
    return names


def add_adapters(model: CollavoForConditionalGeneration, names: Sequence[str], rank: int, alpha: int) -> PeftModel:
    """Put one LoRA adapter per name on the language model, none of them trainable yet."""
    layers = linear_layer_names(model)
    # No dropout, so that training mode and evaluation mode compute the same; see `Trainer.evaluate`.
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=layers)
    with without_peft_warnings():
        adapted: PeftModel = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config)
    return adapted


@contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Silence peft, which asks a model about checkpointing by a name that transformers deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`is_gradient_checkpointing`", FutureWarning)
        yield
