"""Places in a picture, for a language model to read: a code that every image token carries of where it is.

A vision tower that learns from scratch, to tell colours mostly, may pass on next to nothing of where a patch is: the
features of the embedded base had five directions that mattered, and no linear reading of them told a column. What a
language model does not see it cannot learn to find. Large pre-trained towers bring places along.
"""

from typing import Any

import torch

from collavo.model import CollavoForConditionalGeneration

WAVES_PER_AXIS = 6
"""Sines and cosines, each along both axes, of a quarter of a wave to four over the picture."""

STRENGTH = 4.0
"""Norm of the code behind the tower's first layer norm, where features have one of the square root of their width."""


@torch.no_grad()
def show_positions(model: CollavoForConditionalGeneration, pixel_values: torch.Tensor) -> None:
    """Add a code of places to a model's image tokens, in place, and change next to nothing else of them.

    The code joins the tower's position embedding in those directions that its features make least use of. The projector
    passes it on, by the hidden units that do least now, as far as its features vary on the whole: GELU(x) - GELU(-x)
    is x.

    Args:
        pixel_values: float [images, 3, height, width], pictures to judge use by; a few dozen.
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
    """Sines and cosines of a cell's column and row: float [side * side, 4 * WAVES_PER_AXIS], of mean square norm 1."""
    waves = torch.logspace(-2, 2, WAVES_PER_AXIS, base=2) * 2 * torch.pi / side
    along = torch.arange(side) - (side - 1) / 2
    y, x = torch.meshgrid(along, along, indexing="ij")
    code = torch.cat([f(axis[..., None] * waves) for axis in (x, y) for f in (torch.sin, torch.cos)], -1).flatten(0, 1)
    code = code - code.mean(0)
    return code / code.square().sum(1).mean().sqrt()


def _features(tower: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """float [images, patches, width]"""
    features: torch.Tensor = tower(pixel_values).last_hidden_state[:, 1:]
    return features


def _least_used(projector: Any, features: torch.Tensor) -> torch.Tensor:
    """The projector's hidden units, those first that contribute least to how its output varies."""
    hidden = projector.act(projector.linear_1(features)).flatten(0, 1)
    use: torch.Tensor = hidden.std(0) * projector.linear_2.weight.norm(dim=0)
    return use.argsort()
