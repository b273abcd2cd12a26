"""The Crayon Prompt: queries for the class and number of a cell, and the connector to the language model's width.

The starting values matter. The last layer starts at zero, so that an untrained Crayon Prompt adds nothing. Queries and
first layer must not start near zero as well: the gradient of each is a product with the other two, and learning would
hardly begin.

Source: arXiv 2402.11248, section 3 and figure 6a.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from schemas.categories import MAX_NUMBERING


class ClosedLinear(nn.Linear):
    """A linear layer that starts at zero, so that the language model is at first exactly what it was."""

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)


class UnitEmbedding(nn.Embedding):
    """Vectors whose entries start at unit scale."""

    def reset_parameters(self) -> None:
        init.normal_(self.weight)


class UnitLinear(nn.Linear):
    """A linear layer whose outputs start as large as its inputs."""

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.in_features**-0.5)
        init.zeros_(self.bias)


def suited(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Give what enters a layer the type of the layer's weight, and its device.

    A weight that accelerate keeps on a disk or a CPU has no device until the layer is called; then its hook moves both.
    """
    return states.to(weight.dtype) if weight.is_meta else states.to(weight)


class CrayonPrompt(nn.Module):
    """Learnable queries, summed for each cell, then passed through an MLP of two layers.

    Args:
        width: of the queries.
        hidden_size: of the language model.
        classes: their number; None for semantic queries that a linear layer computes from vectors of the names.
        semantic, numbering: whether there are queries for classes, and for numbers; one of them at least.
    """

    def __init__(
        self, width: int, hidden_size: int, classes: int | None, semantic: bool = True, numbering: bool = True
    ) -> None:
        super().__init__()
        self.semantic_queries = UnitEmbedding(classes + 1, width) if semantic and classes is not None else None
        self.semantic_map = UnitLinear(hidden_size, width) if semantic and classes is None else None
        self.numbering_queries = UnitEmbedding(MAX_NUMBERING + 1, width) if numbering else None
        self.linear_1 = UnitLinear(width, hidden_size)
        self.act = nn.GELU()
        self.linear_2 = ClosedLinear(hidden_size, hidden_size)

    def forward(
        self, semantic_ids: torch.Tensor, numbering_ids: torch.Tensor, names: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the signal of every cell.

        Args:
            semantic_ids: int [images, rows, columns], 0 for unknown, else label + 1.
            numbering_ids: int [images, rows, columns], 0..20.
            names: float [classes + 1, hidden_size], vectors of the names by semantic index, where queries are computed
                from them.

        Returns:
            float [images, rows * columns, hidden_size].
        """
        given = ((self.semantic_queries, semantic_ids), (self.numbering_queries, numbering_ids))
        queries = [embedding(ids) for embedding, ids in given if embedding is not None]
        if self.semantic_map is not None and names is not None:
            computed = self.semantic_map(suited(names, self.semantic_map.weight))
            queries.append(nn.functional.embedding(semantic_ids.to(computed.device), computed))
        summed: Any = sum(queries)
        return self.linear_2(self.act(self.linear_1(summed.flatten(1, 2))))

    @torch.no_grad()
    def begin_with(self, semantic: torch.Tensor, numbering: torch.Tensor, scale: torch.Tensor) -> None:
        """Set queries and connector so that the signal of a cell is the sum of two given vectors, times a scale.

        The connector has to pass on its input unchanged. That works because GELU(x) - GELU(-x) = x: the first layer
        gives each value to one hidden unit and its negative to another, the second subtracts them. Queries narrower
        than the vectors keep the principal directions of the vectors.

        Args:
            semantic: float [classes + 1, hidden_size], for the class of a cell.
            numbering: float [21, hidden_size], for its number.
            scale: float [hidden_size].
        """
        of_classes = self.semantic_queries if self.semantic_map is None else self.semantic_map
        given = ((of_classes, semantic), (self.numbering_queries, numbering))
        pairs = [(queries, vectors * scale) for queries, vectors in given if queries is not None]
        width, hidden_size = self.linear_1.in_features, self.linear_1.out_features
        directions = torch.linalg.svd(torch.cat([vectors for _, vectors in pairs]), full_matrices=False).Vh
        directions = directions[: min(width, hidden_size // 2)]
        kept = len(directions)
        for queries, vectors in pairs:
            queries.weight.zero_()
            if queries is self.semantic_map:  # a layer takes the product that a table holds for each class
                queries.weight[:kept] = directions * scale
            else:
                queries.weight[:, :kept] = vectors @ directions.T
        straight = torch.eye(kept, width)
        self.linear_1.weight[: 2 * kept] = torch.cat([straight, -straight])
        self.linear_1.bias.zero_()
        self.linear_2.weight.zero_()[:, : 2 * kept] = torch.cat([directions.T, -directions.T], dim=1)
        self.linear_2.bias.zero_()
