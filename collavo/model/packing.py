"""Packed sequences: one image, several instructions, each blind to the others.

An image takes hundreds of tokens, an instruction about thirty. Trained one by one, a dozen instructions about an image
would pass the image through the model a dozen times. A packed sequence holds it once:

    token            sys  img  img  q1   a1   q2   a2   pad
    sequence id       0    0    0    1    1    2    2   -1
    position          0    1    2    3    4    3    4    0

Two things make the losses equal to those of separate sequences. A token attends to the shared part and to its own
instruction only (`packing_mask`), and each instruction's positions continue from the shared part, as if there were no
other (`packed_positions`).
"""

import torch

PADDING, SHARED = -1, 0
"""Sequence ids of padding and of the shared beginning; instructions count from 1."""


def packing_mask(sequence_ids: torch.Tensor, attention: str, dtype: torch.dtype) -> torch.Tensor:
    """Make the attention mask of packed sequences.

    Args:
        sequence_ids: int [batch, tokens].
        attention: the model's attention implementation.
        dtype: of its hidden states.

    Returns:
        [batch, 1, tokens, tokens] of `dtype`, which transformers uses as it is: what is added to the scores.

    Raises:
        ValueError: for an implementation that cannot express the mask.
    """
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"packed sequences need attention 'sdpa' or 'eager', not {attention!r}")
    tokens = sequence_ids.shape[1]
    query, key = sequence_ids[:, :, None], sequence_ids[:, None, :]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=sequence_ids.device).tril()
    # The shared part comes first, so to a query in it all instructions lie in the future: no instruction leaks into
    # the image's states, through which another could read it.
    attended = causal & ((key == SHARED) | (key == query)) & (key != PADDING)
    # Each token attends to itself, padding too: the softmax of a row without any key would be NaN, which spreads.
    attended |= torch.eye(tokens, dtype=torch.bool, device=sequence_ids.device)
    # SDPA makes numbers of a bool mask anew in each layer, and on a GPU copies rows that begin at no multiple of 8.
    # Each layer keeps its own for the backward pass: 2 GB in 32 layers, for two sequences of 4,096 tokens.
    width = -(-tokens // 8) * 8
    mask = torch.zeros(len(attended), 1, tokens, width, dtype=dtype, device=attended.device)[..., :tokens]
    return mask.masked_fill_(~attended[:, None], torch.finfo(dtype).min)


def packed_positions(sequence_ids: torch.Tensor) -> torch.Tensor:
    """Position ids of packed sequences: every instruction continues where the shared part ends.

    Args:
        sequence_ids: int [tokens] of one sequence, or [batch, tokens].

    Returns:
        int64 of the same shape; 0 for padding.
    """
    shared = (sequence_ids == SHARED).sum(-1, keepdim=True)
    index = torch.arange(sequence_ids.shape[-1], device=sequence_ids.device).expand_as(sequence_ids)
    starts = torch.ones_like(sequence_ids, dtype=torch.bool)
    starts[..., 1:] = sequence_ids[..., 1:] != sequence_ids[..., :-1]
    # Where the run of equal ids that a token is in began: starts only grow, so a running maximum carries them on.
    run_start = torch.where(starts, index, 0).cummax(-1).values
    positions = index - run_start + torch.where(sequence_ids > SHARED, shared, 0)
    return positions.masked_fill(sequence_ids == PADDING, 0)
