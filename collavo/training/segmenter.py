"""Train the embedded segmenter: a small Mask2Former, from scratch, on drawn scenes.

    python -m collavo.training.segmenter --output runs/segmenter --steps 60000

Writes checkpoints and metrics into the output folder, and in the end the model itself: `config.json` and
`model.safetensors`, which `--segmenter mask2former --segmenter_checkpoint runs/segmenter/model` loads. A stopped run
goes on when the command is repeated. How good it is: `benchmarks/segmenter_quality.py`.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch.utils.data import Dataset
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from collavo.scenes import draw_scene, scene_seed
from collavo.segmenters.mask2former import normalise, resize
from collavo.training.scratch import TRAIN_SCENES_SEED, ScratchOptions, train_from_scratch
from schemas.categories import BY_CATEGORY_ID, CATEGORIES

INPUT_HW = (192, 256)
"""Rows and columns that the model sees; the sample scenes have the same shape."""


class Example(NamedTuple):
    """A scene as the model sees it: uint8 [height, width, 3], a mask per segment and the label of each."""

    pixels: np.ndarray
    masks: torch.Tensor
    labels: torch.Tensor


class SceneExamples(Dataset[Example]):
    """Scenes by number, drawn at sizes around the default of the build and squeezed to the model's input."""

    _SIZES_WH = ((160, 120), (192, 144), (256, 192), (320, 240))

    def __init__(self, input_hw: tuple[int, int]) -> None:
        self._input_hw = input_hw

    def __getitem__(self, index: int) -> Example:
        scene = draw_scene(scene_seed(TRAIN_SCENES_SEED, index), self._SIZES_WH[index % len(self._SIZES_WH)])
        height, width = self._input_hw
        ids = np.asarray(Image.fromarray(scene.ids).resize((width, height), Image.Resampling.NEAREST))
        segments = [segment for segment in scene.segments if not segment.is_crowd and (ids == segment.id).any()]
        masks = np.stack([ids == segment.id for segment in segments])
        labels = [BY_CATEGORY_ID[segment.category_id].label for segment in segments]
        pixels = resize(_through_jpeg(scene.image), self._input_hw)
        return Example(pixels, torch.from_numpy(masks).float(), torch.tensor(labels))


def segmenter_config() -> Mask2FormerConfig:
    """A Mask2Former of 3.5 million weights over COCO panoptic's 133 classes."""
    backbone = SwinConfig(
        patch_size=4,
        embed_dim=32,
        depths=[2, 2, 4, 2],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],  # type: ignore[call-arg]  # a backbone's own argument
    )
    names = {category.label: category.name for category in CATEGORIES}
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=96,
        mask_feature_size=96,
        hidden_dim=96,
        encoder_feedforward_dim=192,
        dim_feedforward=384,
        encoder_layers=2,
        decoder_layers=4,
        num_attention_heads=4,
        num_queries=80,
        train_num_points=1024,
        dropout=0.0,
        id2label=names,
        label2id={name: label for label, name in names.items()},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's text."""
    arguments = _parser().parse_args(argv)
    run = Path(arguments.output)
    torch.manual_seed(arguments.seed)
    if arguments.init_from:
        model = Mask2FormerForUniversalSegmentation.from_pretrained(arguments.init_from)
    else:
        model = Mask2FormerForUniversalSegmentation(segmenter_config())

    def loss_of(batch: Sequence[Example]) -> torch.Tensor:
        outputs: Any = model(
            pixel_values=normalise(torch.from_numpy(np.stack([example.pixels for example in batch]))),
            mask_labels=[example.masks for example in batch],
            class_labels=[example.labels for example in batch],
        )
        loss: torch.Tensor = outputs.loss
        return loss

    options = ScratchOptions(
        steps=arguments.steps, batch_size=arguments.batch_size, learning_rate=arguments.learning_rate
    )
    examples = SceneExamples((arguments.height, arguments.width))
    train_from_scratch(run, model, examples, list, loss_of, options, Console())
    model.save_pretrained(run / "model")
    return 0


def _through_jpeg(image: np.ndarray) -> np.ndarray:
    """The image as the build stores it."""
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "JPEG", quality=90)
    return np.asarray(Image.open(encoded))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m collavo.training.segmenter",
        description="Train the embedded segmenter on drawn scenes; a stopped run goes on when the command is repeated.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="checkpoints, metrics and the model")
    parser.add_argument("--init_from", metavar="DIR", help="a model to go on from, such as one trained at another size")
    parser.add_argument("--steps", type=int, default=30000, metavar="N", help="updates (default: 30000)")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="scenes per update (default: 8)")
    parser.add_argument("--learning_rate", type=float, default=4e-4, metavar="X", help="its peak (default: 4e-4)")
    parser.add_argument("--height", type=int, default=INPUT_HW[0], metavar="PIXELS", help="rows that the model sees")
    parser.add_argument("--width", type=int, default=INPUT_HW[1], metavar="PIXELS", help="columns that it sees")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the initial weights")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
