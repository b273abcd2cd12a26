"""Fit what tells the embedded segmenter's own scenes from other pictures, and put it beside its weights.

    python -m pretraining.familiarity --scenes 1200

Draws scenes at the sizes that the build draws, runs the segmenter on them as JPEG, and writes
`collavo/assets/segmenter/familiarity.safetensors`. Half of the scenes are for the fit; a quarter sets the threshold,
which half a percent of them exceed; the last quarter tells how many scenes are called unfamiliar. `--photographs DIR`
then tells how many of some photographs are.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from collavo.cli import flag, parse
from collavo.embedded import SCENES, find_embedded
from collavo.images import decode_rgb
from collavo.progress import Progress
from collavo.scenes import draw_scene, scene_seed
from collavo.segmenters.familiarity import FILE, MOST_DEVIATIONS, Familiarity, features_of
from collavo.segmenters.universal import UniversalSegmenter

SIZES_WH = ((320, 240), (640, 480), (320, 240), (480, 360), (320, 240), (256, 192))
"""In turn; the build draws the first unless it is told otherwise."""

SEED = 4_000_037
"""Of these scenes; neither training nor any evaluation draws with it."""

WARNED_SHARE = 0.005

_DIRECTIONS = 16
"""Of these, the fit on hundreds of pictures is sure; 32 to 128 gained nothing on photographs (benchmarks/LOG.md)."""


@dataclass(frozen=True, slots=True)
class Flags:
    scenes: int = flag(1200, "scenes to draw", least=100)
    photographs: str | None = flag(None, "a folder of photographs to be warned of", kind=str, metavar="DIR")


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(Flags, argv, prog="python -m pretraining.familiarity", description=__doc__)
    segmenter = UniversalSegmenter(SCENES, device="cpu")
    console = Console()
    with Progress(console) as progress:
        known = [_features(segmenter, i) for i in progress.track(_scenes(flags.scenes), "Scenes", flags.scenes)]
    half, quarter = len(known) // 2, len(known) // 4
    fitted = fit(torch.cat(known[:half]), torch.cat(known[half:-quarter]), WARNED_SHARE)
    embedded = find_embedded(SCENES)
    assert embedded is not None
    save_file(fitted.tensors, embedded.folder / FILE)
    warned = (fitted.distances(torch.cat(known[-quarter:])) > 1).float().mean()
    console.print(f"warned of {100 * warned:.1f} % of {quarter} scenes held out")
    if flags.photographs:
        files = sorted(path for path in Path(flags.photographs).rglob("*") if path.is_file())
        distances = fitted.distances(torch.cat([_features(segmenter, decode_rgb(f.read_bytes())) for f in files]))
        nearest = float(distances.min())
        share = 100 * float((distances > 1).float().mean())
        console.print(f"warned of {share:.1f} % of {len(files)} photographs; the nearest lies at {nearest:.2f}")


def fit(known: torch.Tensor, held_out: torch.Tensor, share: float) -> Familiarity:
    """Learn from features of known pictures.

    Args:
        known: float [pictures, features].
        held_out: features of other known pictures, for the threshold.
        share: of the pictures held out that may be called unfamiliar.
    """
    known = known.double()
    mean, scale = known.mean(0), known.std(0).clamp_min(1e-6)
    spread = ((known - mean) / scale).clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)
    _, singular, directions = torch.linalg.svd(spread, full_matrices=False)
    variances = singular.square() / len(known)
    rest = variances[_DIRECTIONS:].sum() / (known.shape[1] - _DIRECTIONS)
    fitted = {
        "mean": mean,
        "scale": scale,
        "directions": directions[:_DIRECTIONS].contiguous(),
        "variances": variances[:_DIRECTIONS].contiguous(),
        "rest": rest.reshape(1),
        "threshold": torch.ones(1),
    }
    distances = Familiarity(fitted).distances(held_out)
    return Familiarity({**fitted, "threshold": torch.quantile(distances, 1 - share).reshape(1)})


def _scenes(count: int) -> Iterator[np.ndarray]:
    for number in range(count):
        scene = draw_scene(scene_seed(SEED, number), SIZES_WH[number % len(SIZES_WH)])
        file = io.BytesIO()
        Image.fromarray(scene.image).save(file, "JPEG", quality=90)  # as the build stores scenes
        yield decode_rgb(file.getvalue())


@torch.inference_mode()
def _features(segmenter: UniversalSegmenter, image: np.ndarray) -> torch.Tensor:
    return features_of(segmenter.outputs([image], with_features=True))


if __name__ == "__main__":
    main()
