"""A loss that teaches a base which part of a picture a box means, beside the loss on its answers.

To answer "What is in [0.25, 0.10, 0.75, 0.60]?" a language model has to gather eight digits, turn them into a place
and attend to that place. Each of the three steps is useless without the others, so the loss on answers alone teaches
none: a base found no column in 30,000 questions (benchmarks/LOG.md, 2026-11-26). So a linear head predicts the cells
that the box covers from the hidden states where the answer begins. The head is thrown away after training.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from collavo.instructions.text import Box, find_boxes
from collavo.training.batches import IGNORED, MicroBatch

ASKED_LAYER = 2
"""The layer whose hidden states have to know the box: early, so that later layers can use it."""

FIRST_TOKENS = 8
"""Number of tokens at the start of an answer that the loss looks at: in `Sure, it is (#1 dog)` the class is the
eighth."""

_ROUNDED = 0.005
"""How much rounding to two decimals may have taken from each side of a box; a thin box may have lost all of it."""


class PlaceHead(nn.Module):
    """A linear layer that reads a box's cells from hidden states."""

    def __init__(self, hidden_size: int, grid_hw: tuple[int, int]) -> None:
        super().__init__()
        self.grid_hw = grid_hw
        self.cells = nn.Linear(hidden_size, grid_hw[0] * grid_hw[1])

    def forward(self, hidden_states: Sequence[torch.Tensor], batch: MicroBatch, tokenizer: Any) -> torch.Tensor:
        """Return the loss over all conversations of a batch with a box in the question; 0 if there are none.

        Args:
            hidden_states: float [batch, tokens, hidden] of every layer.
        """
        begun, questions = _conversations(batch.inputs, tokenizer)
        boxes = [find_boxes(question) for question in questions]
        some = [number for number, found in enumerate(boxes) if found]
        if not some:
            return hidden_states[0].new_zeros(())
        rows, tokens = (torch.cat([begun[number][axis] for number in some]) for axis in (0, 1))
        covers = torch.cat([self._asked(boxes[number][0]).expand(len(begun[number][0]), -1) for number in some])
        hidden = hidden_states[ASKED_LAYER][rows, tokens].float()
        told = self.cells(functional.rms_norm(hidden, hidden.shape[-1:]))
        return functional.binary_cross_entropy_with_logits(told, covers)

    def _asked(self, box: Box) -> torch.Tensor:
        """Return each cell's cover, relative to the one that the box covers most, so that small boxes have one."""
        x_min, y_min, x_max, y_max = box
        covered = cover((x_min - _ROUNDED, y_min - _ROUNDED, x_max + _ROUNDED, y_max + _ROUNDED), self.grid_hw)
        return covered / covered.max()


def cover(box: Box, grid_hw: tuple[int, int]) -> torch.Tensor:
    """Return the share of every cell that a box covers: float32 [rows * columns]."""
    rows, columns = grid_hw
    x_min, y_min, x_max, y_max = box
    along_y, along_x = (
        np.clip(np.minimum(np.arange(cells) + 1, high * cells) - np.maximum(np.arange(cells), low * cells), 0, 1)
        for cells, low, high in ((rows, y_min, y_max), (columns, x_min, x_max))
    )
    return torch.from_numpy(np.outer(along_y, along_x).astype(np.float32).ravel())


def _conversations(
    inputs: dict[str, torch.Tensor], tokenizer: Any
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[str]]:
    """Return where each conversation predicts the first tokens of its answer (rows, tokens), and its question."""
    input_ids, labels, sequence_ids = (inputs[name] for name in ("input_ids", "labels", "sequence_ids"))
    begun, asked = [], []
    for row in range(len(input_ids)):
        for number in range(1, int(sequence_ids[row].max()) + 1):
            own = (sequence_ids[row] == number).nonzero().squeeze(1)
            supervised = labels[row, own] != IGNORED
            predicting = own[supervised.nonzero().squeeze(1)[:FIRST_TOKENS] - 1]
            begun.append((torch.full_like(predicting, row), predicting))
            asked.append(input_ids[row, own[~supervised]].tolist())
    return begun, tokenizer.batch_decode(asked)
