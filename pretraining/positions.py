"""A code in every image token that tells the language model where in the picture the token is.

A vision tower that learns from scratch, mostly to tell colours, may lose where a patch is: the embedded base's features
had five directions that mattered, and no linear reading of them gave a patch's column. The language model then cannot
learn to find places. Large pre-trained towers already carry them.
"""

from typing import Any

import torch

from collavo.model import CollavoForConditionalGeneration

WAVES_PER_AXIS = 6
"""Number of frequencies, from a quarter of a wave to four waves over the picture; each gives a sine and a cosine."""

STRENGTH = 4.0
"""Norm of the code after the tower's first layer norm, where features have a norm of the square root of their width."""


@torch.no_grad()
def show_positions(model: CollavoForConditionalGeneration, pixel_values: torch.Tensor) -> None:
    """Add a code of places to a model's image tokens, in place, and change little else about them.

    The code is added to the tower's position embedding, in the directions that the features use least. Pairs of the
    projector's least used hidden units pass it on, because GELU(x) - GELU(-x) is x; they write it with the same spread
    as the projector's other output has.

    Args:
        pixel_values: float [images, 3, height, width], a few dozen pictures by which to measure what is used.
    """
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    features = _features(tower, pixel_values)
    side = int(features.shape[1] ** 0.5)
    code = place_code(side)
    width = code.shape[1]
    rare = torch.linalg.svd((features - features.mean((0, 1))).flatten(0, 1), full_matrices=False).Vh[-width - 8 : -8]
    rare = torch.linalg.qr((rare - rare.mean(1, keepdim=True)).T)[0].T  # a layer norm leaves them as they are
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
    weights = embeddings.position_embedding.weight[1:]
    scale = (patches + weights).std(-1).mean() / tower.pre_layrnorm.weight.mean()
    weights += code @ rare * STRENGTH * scale

    before = projector(features).flatten(0, 1)
    features = _features(tower, pixel_values)
    seen = (features @ rare.T).mean(0)
    read = torch.linalg.lstsq(seen - seen.mean(0), code).solution.T
    units = _least_used(projector, features)[: 2 * width].chunk(2)
    spread = (before - before.mean(0)).norm(dim=-1).mean()
    told = torch.linalg.svd(before - before.mean(0), full_matrices=False).Vh[-width:]
    for unit, sign in zip(units, (1, -1), strict=True):
        projector.linear_1.weight[unit] = sign * read @ rare
        projector.linear_1.bias[unit] = -sign * (read @ seen.mean(0))
        projector.linear_2.weight[:, unit] = sign * told.T * spread
    projector.linear_2.bias += before.mean(0) - projector(features).flatten(0, 1).mean(0)


def place_code(side: int) -> torch.Tensor:
    """Return waves along columns and rows: float [side * side, 4 * WAVES_PER_AXIS], mean square norm 1."""
    waves = torch.logspace(-2, 2, WAVES_PER_AXIS, base=2) * 2 * torch.pi / side
    along = torch.arange(side) - (side - 1) / 2
    y, x = torch.meshgrid(along, along, indexing="ij")
    code = torch.cat([f(axis[..., None] * waves) for axis in (x, y) for f in (torch.sin, torch.cos)], -1).flatten(0, 1)
    code = code - code.mean(0)
    return code / code.square().sum(1).mean().sqrt()


def _features(tower: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the tower's features without the class token: float [images, patches, width]."""
    features: torch.Tensor = tower(pixel_values).last_hidden_state[:, 1:]
    return features


def _least_used(projector: Any, features: torch.Tensor) -> torch.Tensor:
    """Return the projector's hidden units in the order of how much they make its output vary, the least first."""
    hidden = projector.act(projector.linear_1(features)).flatten(0, 1)
    use: torch.Tensor = hidden.std(0) * projector.linear_2.weight.norm(dim=0)
    return use.argsort()
