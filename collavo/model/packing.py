"""Packed sequences: one image, several instructions, each blind to its siblings.

A packed sequence begins with what all share - system text and image - and goes on with one instruction after the other.
Every token is labelled with the sequence it belongs to, and attends to the shared part and its own.
"""

import torch

PADDING, SHARED = -1, 0
"""Sequence ids of padding and of the shared beginning; instructions count from 1."""


def packing_mask(sequence_ids: torch.Tensor, attention: str, dtype: torch.dtype) -> torch.Tensor:
    """The attention mask of packed sequences.

    Args:
        sequence_ids: int [batch, tokens].
        attention: the model's attention implementation.
        dtype: of its hidden states.

    Returns:
        [batch, 1, tokens, tokens]: bool, True where attended, for `sdpa`; additive in `dtype` for `eager`.

    Raises:
        ValueError: for an implementation that cannot express the mask.
    """
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"packed sequences need attention 'sdpa' or 'eager', not {attention!r}")
    tokens = sequence_ids.shape[1]
    query, key = sequence_ids[:, :, None], sequence_ids[:, None, :]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=sequence_ids.device).tril()
    attended = causal & ((key == SHARED) | (key == query)) & (key != PADDING)
    # A padding token attends to itself, for a row without any key would come out as NaN.
    attended |= torch.eye(tokens, dtype=torch.bool, device=sequence_ids.device)
    mask = attended[:, None]
    if attention == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def packed_positions(sequence_ids: torch.Tensor) -> torch.Tensor:
    """Position ids of packed sequences: every instruction goes on where the shared part ends.

    Args:
        sequence_ids: int [tokens] of one sequence, or [batch, tokens].

    Returns:
        int64 of the same shape; 0 for padding.
    """
    shared = (sequence_ids == SHARED).sum(-1, keepdim=True)
    index = torch.arange(sequence_ids.shape[-1], device=sequence_ids.device).expand_as(sequence_ids)
    starts = torch.ones_like(sequence_ids, dtype=torch.bool)
    starts[..., 1:] = sequence_ids[..., 1:] != sequence_ids[..., :-1]
    run_start = torch.where(starts, index, 0).cummax(-1).values
    positions = index - run_start + torch.where(sequence_ids > SHARED, shared, 0)
    return positions.masked_fill(sequence_ids == PADDING, 0)
