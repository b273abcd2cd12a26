"""Estimate what a run holds on its GPU, so that one that cannot fit is refused before hours of loading and training.

What the backward pass needs of a decoder layer dominates. It is counted here tensor by tensor, as the layer saves it
under bfloat16 autocast with adapters, and a test holds the count against the bytes that a layer of real width saves.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from collavo.errors import UserError
from collavo.storage import size_text
from collavo.training.arguments import TrainArguments

_BF16, _FP32 = 2, 4

_CONTEXT = 1_500_000_000
"""CUDA's context, the libraries' workspaces, and the dequantised weights of the layer that is being computed."""

_FRAGMENTED = 1.04
"""Memory that PyTorch's allocator holds between tensors, as a factor of what they take."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model that its memory depends on."""

    hidden: int
    feed_forward: int
    layers: int
    key_value: int
    """Width of the keys, and of the values."""

    vocabulary: int
    vision: int
    """Weights of the vision tower and the projector."""

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Read them from a LLaVA-like configuration."""
        text, vision = config.text_config, config.vision_config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width, depth = vision.hidden_size, vision.num_hidden_layers
        of_vision = depth * (4 * width**2 + 2 * width * vision.intermediate_size)
        projector = text.hidden_size * (width + text.hidden_size)
        return cls(
            hidden=text.hidden_size,
            feed_forward=text.intermediate_size,
            layers=text.num_hidden_layers,
            key_value=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head,
            vocabulary=text.vocab_size,
            vision=of_vision + projector,
        )

    @property
    def linear(self) -> int:
        """Weights of the language model's linear layers, which may be quantised."""
        d, k, f = self.hidden, self.key_value, self.feed_forward
        return self.layers * (2 * d * d + 2 * d * k + 3 * d * f)

    def adapter(self, rank: int) -> int:
        """Weights of an adapter."""
        d, k, f = self.hidden, self.key_value, self.feed_forward
        return self.layers * rank * (2 * (d + d) + 2 * (d + k) + 3 * (d + f))

    def saved_per_token(self, rank: int) -> int:
        """Bytes that a layer saves of a token for its backward pass."""
        d, f = self.hidden, self.feed_forward
        norms = 2 * _FP32 * d  # they compute in float32
        # peft gives each learning layer a copy of its input: q, k, v, o, gate and up; down's is as wide as the MLP.
        inputs = _BF16 * (6 * d + f) + 7 * _BF16 * rank
        attention = 4 * _BF16 * d  # query, key and value, those repeated for their groups, and the result
        mlp = 3 * _BF16 * f  # gate, its activation, up
        return norms + inputs + attention + mlp


def estimate(shape: Shape, arguments: TrainArguments, adapters: int, tokens: int, supervised: int) -> dict[str, int]:
    """Estimate the bytes that a step takes at its peak, by what takes them.

    Args:
        adapters: on the model; one of them learns in a step.
        tokens: of the longest micro-batch, padding included.
        supervised: positions among them whose logits are computed.
    """
    rank, d, f = arguments.lora_rank, shape.hidden, shape.feed_forward
    # NF4 has half a byte a weight, a byte for the scale of 64 of them, and 4 bytes for the scale of 256 scales.
    of_linear = 0.5 + 1 / 64 + 4 / 64 / 256 if arguments.quantize else _BF16
    prompt = 155 * d + 2 * d * d  # queries and connector, at most as wide as the language model
    learning = shape.adapter(rank) + prompt
    all_learning = adapters * shape.adapter(rank) + prompt
    saved = shape.saved_per_token(rank)
    # With checkpointing, the input of each layer, and all of the layer that is recomputed.
    per_token = shape.layers * _BF16 * d + saved if arguments.gradient_checkpointing else shape.layers * saved
    # The signal and its gradient; the last norm; a layer's passing copies, the widest of them in float32.
    per_token += 3 * _FP32 * d + 2 * _FP32 * f
    parts = {
        "weights": shape.linear * of_linear + _BF16 * (2 * shape.vocabulary * d + shape.vision),
        "adapters and queries": (_FP32 + _BF16) * all_learning,  # autocast keeps them in bfloat16 as well
        "gradients and optimizer": _FP32 * (2 * all_learning + 2 * learning),  # two moments; AdamW works on a copy
        "activations": tokens * per_token,
        # In bfloat16, in float32, their logarithms, and the gradient of each.
        "logits": supervised * shape.vocabulary * (2 * _BF16 + 3 * _FP32),
    }
    parts["reserve"] = _CONTEXT + (_FRAGMENTED - 1) * sum(parts.values())
    return {name: int(size) for name, size in parts.items()}


def check_memory(
    shape: Shape, arguments: TrainArguments, adapters: int, tokens: int, supervised: int, available: int
) -> dict[str, int]:
    """Estimate a step, see `estimate`, of micro-batches of the arguments' size.

    Args:
        tokens, supervised: of the longest sequence.
        available: bytes of the GPU that a run may take.

    Raises:
        UserError: if it does not fit, naming the flags with which it does.
    """

    def needed(arguments: TrainArguments) -> dict[str, int]:
        micro = arguments.micro_batch_size
        return estimate(shape, arguments, adapters, micro * tokens, micro * supervised)

    parts = needed(arguments)
    if sum(parts.values()) <= available:
        return parts
    helpful = "nothing but a smaller --max_length, fewer --instructions_per_sequence or a smaller base helps"
    for fitting in _smaller(arguments):
        if sum(needed(fitting).values()) <= available:
            flags = [f"--micro_batch_size {fitting.micro_batch_size}"]
            flags += ["--gradient_checkpointing"] * fitting.gradient_checkpointing
            flags += ["--quantize"] * (fitting.quantize and not arguments.quantize)
            helpful = f"it fits with {' '.join(flags)}; shorter sequences help too (--max_length)"
            break
    said = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
    total, micro = size_text(sum(parts.values())), arguments.micro_batch_size
    raise UserError(
        f"--micro_batch_size {micro}: the longest batch, {micro} x {tokens:,} tokens, needs about {total} ({said}), "
        f"and the GPU has {size_text(available)}; {helpful}"
    )


def memory_of(device: torch.device) -> int | None:
    """Bytes that this process may hold on a GPU, with what it holds already; None for a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _smaller(arguments: TrainArguments) -> list[TrainArguments]:
    """List arguments that need less memory, those first that cost the least time."""
    sizes = [size for size in (32, 16, 8, 4, 2, 1) if size <= arguments.micro_batch_size]
    tried = [replace(arguments, micro_batch_size=size) for size in sizes]
    tried += [replace(one, gradient_checkpointing=True) for one in tried]
    return tried + [replace(one, quantize=True) for one in tried]
