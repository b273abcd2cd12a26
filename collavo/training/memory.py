"""Estimate what a run holds on its GPU, so that one that cannot fit is refused before hours of loading and training.

What the backward pass needs of a decoder layer dominates. It is counted here tensor by tensor, as the layer saves it
under bfloat16 autocast with adapters, and a test holds the count against the bytes that a layer of real width saves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from rich.filesize import decimal

from collavo.errors import UserError
from collavo.model.configuration import CollavoConfig
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
    """Weights of the vision tower."""

    projector: int
    crayon_width: int

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Read them from a LLaVA-like configuration."""
        text, vision = config.text_config, config.vision_config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width, depth = vision.hidden_size, vision.num_hidden_layers
        return cls(
            hidden=text.hidden_size,
            feed_forward=text.intermediate_size,
            layers=text.num_hidden_layers,
            key_value=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head,
            vocabulary=text.vocab_size,
            vision=depth * (4 * width**2 + 2 * width * vision.intermediate_size),
            projector=text.hidden_size * (width + text.hidden_size),
            crayon_width=getattr(config, "crayon_width", CollavoConfig().crayon_width),
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

    @property
    def prompt(self) -> int:
        """Weights of queries and connector, at most."""
        d, width = self.hidden, self.crayon_width
        return 155 * width + 2 * width * d + d * d

    def saved_per_token(self, rank: int) -> int:
        """Bytes that a layer saves of a token for its backward pass.

        Args:
            rank: of the active adapters; 0 without any.
        """
        d, f = self.hidden, self.feed_forward
        norms = 2 * _FP32 * d  # they compute in float32
        attention = 4 * _BF16 * d  # query, key and value, those repeated for their groups, and the result
        mlp = 3 * _BF16 * f  # gate, its activation, up
        # A frozen layer needs nothing of its input. peft gives each layer with an adapter that learns a copy of it: q,
        # k, v, o, gate and up; down's is as wide as the MLP.
        inputs = _BF16 * (6 * d + f) + 7 * _BF16 * rank if rank else 0
        return norms + inputs + attention + mlp


class LongestBatch(NamedTuple):
    """What a rank of a phase takes forward and back at once, at most."""

    sequences: int
    tokens: int
    """Of each sequence."""

    supervised: int
    """Positions of each sequence whose logits are computed."""


def estimate(shape: Shape, arguments: TrainArguments, adapters: int, phase: str, batch: LongestBatch) -> dict[str, int]:
    """Estimate the bytes that a step of a phase takes at its peak, by what takes them.

    Args:
        adapters: on the model. In `cit` all are active, and one learns in a step; elsewhere none is active.
    """
    rank, d, f = arguments.lora_rank, shape.hidden, shape.feed_forward
    # NF4 has half a byte a weight, a byte for the scale of 64 of them, and 4 bytes for the scale of 256 scales.
    of_linear = 0.5 + 1 / 64 + 4 / 64 / 256 if arguments.quantize else _BF16
    of_adapters = adapters * shape.adapter(rank)
    # Weights that learn in the phase, those that learn in one step, and those that autocast keeps in bfloat16 as well.
    in_phase, in_step, used = {
        "align": (shape.projector, shape.projector, 0),
        "cpt": (shape.prompt, shape.prompt, shape.prompt),
        "cit": (of_adapters + shape.prompt, shape.adapter(rank) + shape.prompt, of_adapters + shape.prompt),
    }[phase]
    saved = shape.saved_per_token(rank if phase == "cit" else 0)
    # With checkpointing, the input of each layer, and all of the layer that is recomputed.
    per_token = shape.layers * _BF16 * d + saved if arguments.gradient_checkpointing else shape.layers * saved
    # The signal and its gradient; the last norm; a layer's passing copies, the widest of them in float32.
    per_token += 3 * _FP32 * d + 2 * _FP32 * f
    untouched = 2 * shape.vocabulary * d + shape.vision
    parts = {
        "weights": shape.linear * of_linear + _BF16 * untouched + (_FP32 + _BF16) * shape.projector,
        "adapters and queries": _FP32 * (of_adapters + shape.prompt) + _BF16 * used,
        "gradients and optimizer": _FP32 * (2 * in_phase + 2 * in_step),  # two moments; AdamW works on a copy
        "activations": batch.sequences * batch.tokens * per_token,
        # In bfloat16, in float32, their logarithms, and the gradient of each.
        "logits": batch.sequences * batch.supervised * shape.vocabulary * (2 * _BF16 + 3 * _FP32),
    }
    parts["reserve"] = _CONTEXT + (_FRAGMENTED - 1) * sum(parts.values())
    return {name: int(size) for name, size in parts.items()}


def check_memory(
    shape: Shape, arguments: TrainArguments, adapters: int, longest: Mapping[str, LongestBatch], available: int
) -> dict[str, dict[str, int]]:
    """Estimate the steps of phases, see `estimate`.

    Args:
        longest: the longest batch of each phase.
        available: bytes of the GPU that a run may take.

    Raises:
        UserError: if a phase does not fit, naming the flags with which all do.
    """

    def needed(arguments: TrainArguments) -> dict[str, dict[str, int]]:
        most = arguments.micro_batch_size
        cut = {phase: one._replace(sequences=min(one.sequences, most)) for phase, one in longest.items()}
        return {phase: estimate(shape, arguments, adapters, phase, batch) for phase, batch in cut.items()}

    def highest(needs: dict[str, dict[str, int]]) -> str:
        return max(needs, key=lambda phase: sum(needs[phase].values()))

    needs = needed(arguments)
    phase = highest(needs)
    total = sum(needs[phase].values())
    if total <= available:
        return needs
    helpful = "nothing but a smaller --max_length, fewer --instructions_per_sequence or a smaller base helps"
    for fitting in _smaller(arguments):
        fewer = needed(fitting)
        if sum(fewer[highest(fewer)].values()) <= available:
            flags = [f"--micro_batch_size {fitting.micro_batch_size}"]
            flags += ["--gradient_checkpointing"] * fitting.gradient_checkpointing
            flags += ["--quantize"] * (fitting.quantize and not arguments.quantize)
            helpful = f"it fits with {' '.join(flags)}; shorter sequences help too (--max_length)"
            break
    said = ", ".join(f"{name} {decimal(size)}" for name, size in needs[phase].items())
    sequences, tokens, _ = longest[phase]
    raise UserError(
        f"--micro_batch_size {arguments.micro_batch_size}: the longest batch of {phase}, {sequences} x {tokens:,} "
        f"tokens, needs about {decimal(total)} ({said}), and the GPU has {decimal(available)}; {helpful}"
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
