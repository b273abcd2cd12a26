"""Train the embedded segmenter: a small Mask2Former, from scratch, on drawn scenes.

    python -m pretraining.segmenter --output runs/segmenter --steps 60000

Writes checkpoints and metrics into the output folder, and in the end the model itself: `config.json` and
`model.safetensors`, which `--segmenter mask2former --segmenter_checkpoint runs/segmenter/model` loads. A stopped run
goes on when the command is repeated. How good it is: `benchmarks/segmenter_quality.py`.
"""

import argparse
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

from collavo.cli import Parser, whole_number
from collavo.scenes import draw_scene, scene_seed
from collavo.segmenters.mask2former import normalise, resize, without_backbone_warnings
from pretraining.loop import TRAIN_SCENES_SEED, ScratchOptions, train_from_scratch
from schemas.categories import BY_CATEGORY_ID, CATEGORIES

INPUT_HW = (256, 320)
"""Rows and columns that the model sees; the sample scenes have 240 x 320 pixels, and its sides are multiples of 32."""

MIDDLES_HW = (12, 16)
IGNORED = -100


class Example(NamedTuple):
    """A scene as the model sees it."""

    pixels: np.ndarray
    """uint8 [height, width, 3]"""

    masks: torch.Tensor
    """float32 [segments, height, width], 0 or 1"""

    labels: torch.Tensor
    """int64 [segments]"""

    cell_labels: torch.Tensor
    """int64 [height / 4, width / 4]: the label of each cell, `IGNORED` in crowds."""

    cell_middles: torch.Tensor
    """int64, of the same shape: where the middle of the thing lies that the cell belongs to, as a place in a grid of
    `MIDDLES_HW`; `IGNORED` where there is stuff."""


class SceneExamples(Dataset[Example]):
    """`pool` scenes, drawn at the build's default size or at smaller ones, brought to the model's input size or, in the
    first `half_size_examples`, to half of it; every other round shows them mirrored."""

    _SIZES_WH = ((320, 240), (256, 192), (320, 240), (192, 144))

    def __init__(self, input_hw: tuple[int, int], pool: int, half_size_examples: int = 0) -> None:
        self._input_hw = input_hw
        self._pool = pool
        self._half_size_examples = half_size_examples
        self._drawn: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, list[int]]] = {}

    def __getitem__(self, index: int) -> Example:
        shrink = 2 if index < self._half_size_examples else 1
        key = (index % self._pool, shrink)
        if key not in self._drawn:
            self._drawn[key] = self._draw(*key)
        pixels, positions, labels = self._drawn[key]
        if index // self._pool % 2:
            pixels, positions = pixels[:, ::-1], positions[:, ::-1]
        masks = positions == np.arange(1, len(labels) + 1)[:, None, None]
        cell_labels, cell_middles = _cells(masks, labels)
        return Example(
            np.ascontiguousarray(pixels),
            torch.from_numpy(masks).float(),
            torch.tensor(labels),
            torch.from_numpy(cell_labels),
            torch.from_numpy(cell_middles),
        )

    def _draw(self, number: int, shrink: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Pixels, the position of a segment plus 1 at each of them, and the label of each segment."""
        scene = draw_scene(scene_seed(TRAIN_SCENES_SEED, number), self._SIZES_WH[number % len(self._SIZES_WH)])
        height, width = (side // shrink for side in self._input_hw)
        ids = np.asarray(Image.fromarray(scene.ids).resize((width, height), Image.Resampling.NEAREST))
        segments = [segment for segment in scene.segments if not segment.is_crowd and (ids == segment.id).any()]
        positions = np.zeros((height, width), np.uint8)
        for position, segment in enumerate(segments, start=1):
            positions[ids == segment.id] = position
        labels = [BY_CATEGORY_ID[segment.category_id].label for segment in segments]
        return resize(_through_jpeg(scene.image), (height, width)), positions, labels


def _cells(masks: np.ndarray, labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """`cell_labels` and `cell_middles` of an `Example`, taken at the middle of each cell."""
    height, width = masks.shape[1:]
    cell_labels = np.full((height // 4, width // 4), IGNORED)
    cell_middles = cell_labels.copy()
    for mask, label in zip(masks[:, 2::4, 2::4], labels, strict=True):
        cell_labels[mask] = label
        if mask.any() and CATEGORIES[label].is_thing:
            y, x = (
                int(axis.mean() * places / cells)
                for axis, places, cells in zip(np.nonzero(mask), MIDDLES_HW, mask.shape, strict=True)
            )
            cell_middles[mask] = y * MIDDLES_HW[1] + x
    return cell_labels, cell_middles


class SupervisedSegmenter(nn.Module):
    """A Mask2Former with its own losses and a dense one.

    From scratch, queries take long to find out what to look for. So every cell of the pixel decoder's features, which
    masks are products of, is also asked for its class and for the middle of its thing: features that tell these apart
    are what queries need. The head that answers is thrown away.
    """

    def __init__(self, model: Mask2FormerForUniversalSegmentation, dense_weight: float = 5.0) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        self.dense_head = nn.Conv2d(config.mask_feature_size, len(CATEGORIES) + math.prod(MIDDLES_HW), 1)
        self._dense_weight = dense_weight

    def forward(self, batch: Sequence[Example]) -> torch.Tensor:
        """The loss of a batch."""
        outputs: Any = self.model(
            pixel_values=normalise(torch.from_numpy(np.stack([example.pixels for example in batch]))),
            mask_labels=[example.masks for example in batch],
            class_labels=[example.labels for example in batch],
        )
        dense = self.dense_head(outputs.pixel_decoder_last_hidden_state)
        of_class, of_middle = dense.split((len(CATEGORIES), math.prod(MIDDLES_HW)), dim=1)
        class_loss = functional.cross_entropy(
            of_class,
            torch.stack([example.cell_labels for example in batch]),
            # Things have a tenth of the cells, and most of what there is to learn.
            weight=torch.tensor([4.0 if category.is_thing else 1.0 for category in CATEGORIES]),
            ignore_index=IGNORED,
        )
        middle_loss = functional.cross_entropy(
            of_middle, torch.stack([example.cell_middles for example in batch]), ignore_index=IGNORED
        )
        loss: torch.Tensor = outputs.loss + self._dense_weight * (class_loss + middle_loss)
        return loss


def segmenter_config() -> Mask2FormerConfig:
    """A Mask2Former of 3.1 million weights over COCO panoptic's 133 classes.

    Its backbone is a residual network: from scratch, on pictures this small, it learns faster than a Swin transformer.
    """
    backbone = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[48, 96, 144, 192],
        depths=[2, 2, 2, 2],
        layer_type="basic",
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
        num_queries=64,
        train_num_points=512,
        dropout=0.0,
        id2label=names,
        label2id={name: label for label, name in names.items()},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's text."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.start and not (Path(arguments.start) / "config.json").is_file():
        parser.error(f"--start {arguments.start}: no config.json there; it is a folder `model` that this command wrote")
    run = Path(arguments.output)
    torch.manual_seed(arguments.seed)
    with without_backbone_warnings():
        model = _model(arguments.start)
    model.config.input_size_hw = [arguments.height, arguments.width]  # what `Mask2FormerSegmenter` shows it by default

    options = ScratchOptions(
        steps=arguments.steps, batch_size=arguments.batch_size, learning_rate=arguments.learning_rate
    )
    supervised = SupervisedSegmenter(model)

    def loss_of(batch: Sequence[Example]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            loss: torch.Tensor = supervised(batch)
        return loss

    examples = SceneExamples(
        (arguments.height, arguments.width), arguments.pool, arguments.half_size_steps * arguments.batch_size
    )
    train_from_scratch(run, supervised, examples, list, loss_of, options, Console())
    model.half().save_pretrained(run / "model")
    return 0


def _model(start: str | None) -> Mask2FormerForUniversalSegmentation:
    if start is None:
        return Mask2FormerForUniversalSegmentation(segmenter_config())
    model: Mask2FormerForUniversalSegmentation
    model = Mask2FormerForUniversalSegmentation.from_pretrained(start, dtype=torch.float32)
    return model


def _through_jpeg(image: np.ndarray) -> np.ndarray:
    """The image as the build stores it."""
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "JPEG", quality=90)
    return np.asarray(Image.open(encoded))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m pretraining.segmenter",
        usage="python -m pretraining.segmenter --output DIR [options]",
        description="Train the embedded segmenter on drawn scenes.",
        epilog="A stopped run goes on when the command is repeated.",
    )
    add, count, (height, width) = parser.add_argument, whole_number(1), INPUT_HW
    add("--output", required=True, metavar="DIR", help="checkpoints, metrics and the model")
    add("--start", metavar="DIR", help="a model to go on from (default: weights at random)")
    add("--steps", type=count, default=30000, metavar="N", help="updates (default: 30000)")
    add("--batch_size", type=count, default=8, metavar="N", help="scenes per update (default: 8)")
    add("--learning_rate", type=float, default=4e-4, metavar="X", help="its peak (default: 4e-4)")
    add("--pool", type=count, default=16000, metavar="N", help="scenes to draw (default: 16000)")
    add("--height", type=count, default=height, metavar="PIXELS", help=f"rows that it sees (default: {height})")
    add("--width", type=count, default=width, metavar="PIXELS", help=f"columns that it sees (default: {width})")
    add(
        "--half_size_steps",
        type=whole_number(0),
        default=3000,
        metavar="N",
        help="updates in the beginning that see scenes at half the size, three times as fast (default: 3000)",
    )
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 products (default: on)")
    add("--seed", type=whole_number(0), default=0, metavar="N", help="of the initial weights (default: 0)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
