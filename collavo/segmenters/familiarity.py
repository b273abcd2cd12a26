"""Whether a picture is one of those that a segmenter knows.

A network answers about anything: shown a photograph of a rugby match, one that has seen drawn scenes only finds
airplanes and bananas in it, with high scores. What gives it away are its features: their means and deviations over a
picture, at each stage of the backbone, lie where those of no known picture lie. A checkpoint may bring along where they
lie, as `familiarity.safetensors` beside its weights. A picture whose features lie further away than those of all but a
few of its own is unfamiliar.

The distance is Mahalanobis's in the directions in which known pictures differ most; all other directions share one
variance. A feature counts for no more than three deviations: known pictures are odd in a few features, other pictures
in many. The threshold is set on pictures that the fit has not seen (`pretraining/familiarity.py`).
"""

from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file

FILE = "familiarity.safetensors"

MOST_DEVIATIONS = 3.0


class Familiarity:
    """Where the features of known pictures lie.

    Args:
        tensors: `mean` and `scale` [features], `directions` [16, features], `variances` [16], `rest` and `threshold`
            [1].
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """That of a checkpoint's folder; None where it brings none."""
        file = folder / FILE
        return cls(load_file(file)) if file.is_file() else None

    def distances(self, features: torch.Tensor) -> torch.Tensor:
        """Measure how far pictures lie from the known ones, 1 being as far as the farthest that still count as known.

        Args:
            features: float [pictures, features], see `features_of`.

        Returns:
            float32 [pictures].
        """
        t = {name: tensor.to(features.device) for name, tensor in self.tensors.items()}
        spread = ((features.float() - t["mean"]) / t["scale"]).clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)
        along = spread @ t["directions"].T
        beside = spread.square().sum(1) - along.square().sum(1)
        distance = ((along.square() / t["variances"]).sum(1) + beside / t["rest"]) / features.shape[1]
        return distance / t["threshold"]


def features_of(outputs: Any) -> torch.Tensor:
    """Compute means, and logarithms of deviations, of the backbone's feature maps over each picture.

    Args:
        outputs: of a Mask2Former's forward pass with `output_hidden_states=True`.

    Returns:
        float32 [pictures, features].
    """
    flat = [maps.float().flatten(2) for maps in outputs.encoder_hidden_states]
    return torch.cat([statistic for maps in flat for statistic in (maps.mean(2), (maps.std(2) + 1e-3).log())], dim=1)
