"""Train the embedded segmenter, a small Mask2Former, from scratch on drawn scenes.

    python -m pretraining.segmenter --output runs/segmenter --steps 60000

The command writes checkpoints and metrics into the output folder, and at the end the folder `model`, which the build
loads with `--segmenter transformers --segmenter_checkpoint runs/segmenter/model`. Repeat the command to continue a
stopped run. `benchmarks/segmenter_quality.py` measures how good the model is.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
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

from collavo import cli
from collavo.cli import REQUIRED, flag
from collavo.errors import UserError
from collavo.scenes import draw_scene, scene_seed
from collavo.segmenters.framing import Framing, resize
from collavo.segmenters.universal import without_backbone_warnings
from pretraining.loop import TRAIN_SCENES_SEED, LoopOptions, train_from_scratch
from schemas.categories import COCO_PANOPTIC

INPUT_HW = (256, 320)
"""Rows and columns that the model sees. Sample scenes have 240 x 320 pixels; both sides have to be multiples of 32."""

MIDDLES_HW = (12, 16)
"""Rows and columns of the grid in which the dense loss places the middles of things."""

_SQUEEZED = Framing(INPUT_HW, None)

UNLABELLED = -100
"""Label of a cell that no loss looks at."""


class SegmentedScene(NamedTuple):
    """A scene as the model sees it, with the targets of all losses."""

    pixels: np.ndarray
    """uint8 [height, width, 3]"""

    masks: torch.Tensor
    """float32 [segments, height, width], 0 or 1"""

    labels: torch.Tensor
    """int64 [segments]"""

    cell_labels: torch.Tensor
    """int64 [height / 4, width / 4]: the class label of each cell, `UNLABELLED` in crowds."""

    cell_middles: torch.Tensor
    """int64, same shape: the cell of the `MIDDLES_HW` grid that holds the middle of this cell's thing; `UNLABELLED` in
    stuff."""


class SegmentedScenes(Dataset[SegmentedScene]):
    """Scenes of the build's default size or smaller, resized to the model's input, mirrored in every second round.

    Args:
        input_hw: rows and columns that the model sees.
        pool: number of different scenes.
        half_size_examples: number of examples at the start that are shown at half the input size.
    """

    _SIZES_WH = ((320, 240), (256, 192), (320, 240), (192, 144))

    def __init__(self, input_hw: tuple[int, int], pool: int, half_size_examples: int = 0) -> None:
        self._input_hw = input_hw
        self._pool = pool
        self._half_size_examples = half_size_examples
        self._drawn: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, list[int]]] = {}

    def __getitem__(self, index: int) -> SegmentedScene:
        shrink = 2 if index < self._half_size_examples else 1
        key = (index % self._pool, shrink)
        if key not in self._drawn:
            self._drawn[key] = self._draw(*key)
        pixels, positions, labels = self._drawn[key]
        if index // self._pool % 2:
            pixels, positions = pixels[:, ::-1], positions[:, ::-1]
        masks = positions == np.arange(1, len(labels) + 1)[:, None, None]
        cell_labels, cell_middles = _cells(masks, labels)
        return SegmentedScene(
            np.ascontiguousarray(pixels),
            torch.from_numpy(masks).float(),
            torch.tensor(labels),
            torch.from_numpy(cell_labels),
            torch.from_numpy(cell_middles),
        )

    def _draw(self, number: int, shrink: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Return pixels, each pixel's position among the segments plus 1 (0: none), and the segments' labels."""
        scene = draw_scene(scene_seed(TRAIN_SCENES_SEED, number), self._SIZES_WH[number % len(self._SIZES_WH)])
        height, width = (side // shrink for side in self._input_hw)
        ids = np.asarray(Image.fromarray(scene.ids).resize((width, height), Image.Resampling.NEAREST))
        segments = [segment for segment in scene.segments if not segment.is_crowd and (ids == segment.id).any()]
        positions = np.zeros((height, width), np.uint8)
        for position, segment in enumerate(segments, start=1):
            positions[ids == segment.id] = position
        labels = [COCO_PANOPTIC.by_category_id[segment.category_id].label for segment in segments]
        return resize(_through_jpeg(scene.image), (height, width)), positions, labels


def _cells(masks: np.ndarray, labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return `cell_labels` and `cell_middles` of a `SegmentedScene`, sampled at the middle of each cell."""
    height, width = masks.shape[1:]
    cell_labels = np.full((height // 4, width // 4), UNLABELLED)
    cell_middles = cell_labels.copy()
    for mask, label in zip(masks[:, 2::4, 2::4], labels, strict=True):
        cell_labels[mask] = label
        if mask.any() and COCO_PANOPTIC[label].is_thing:
            y, x = (
                int(axis.mean() * places / cells)
                for axis, places, cells in zip(np.nonzero(mask), MIDDLES_HW, mask.shape, strict=True)
            )
            cell_middles[mask] = y * MIDDLES_HW[1] + x
    return cell_labels, cell_middles


class SupervisedSegmenter(nn.Module):
    """A Mask2Former with its own losses and a dense one.

    From scratch, queries take long to find out what to look for. So a linear head also predicts, from every cell of the
    pixel decoder's features, its class and the middle of its thing: features that tell these apart are what queries
    need. The head is thrown away after training.
    """

    def __init__(self, model: Mask2FormerForUniversalSegmentation, dense_weight: float = 5.0) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        self.dense_head = nn.Conv2d(config.mask_feature_size, len(COCO_PANOPTIC) + math.prod(MIDDLES_HW), 1)
        self._dense_weight = dense_weight

    def forward(self, batch: Sequence[SegmentedScene]) -> torch.Tensor:
        """Return the loss of a batch."""
        outputs: Any = self.model(
            pixel_values=_SQUEEZED.normalise(torch.from_numpy(np.stack([example.pixels for example in batch]))),
            mask_labels=[example.masks for example in batch],
            class_labels=[example.labels for example in batch],
        )
        dense = self.dense_head(outputs.pixel_decoder_last_hidden_state)
        of_class, of_middle = dense.split((len(COCO_PANOPTIC), math.prod(MIDDLES_HW)), dim=1)
        class_loss = functional.cross_entropy(
            of_class,
            torch.stack([example.cell_labels for example in batch]),
            # Things cover a tenth of the cells, but most of what there is to learn is about them.
            weight=torch.tensor([4.0 if category.is_thing else 1.0 for category in COCO_PANOPTIC]),
            ignore_index=UNLABELLED,
        )
        middle_loss = functional.cross_entropy(
            of_middle, torch.stack([example.cell_middles for example in batch]), ignore_index=UNLABELLED
        )
        loss: torch.Tensor = outputs.loss + self._dense_weight * (class_loss + middle_loss)
        return loss


def segmenter_config() -> Mask2FormerConfig:
    """Describe a Mask2Former of 3.1 million weights over COCO panoptic's 133 classes.

    Its backbone is a residual network, which learns faster from scratch on small pictures than a Swin transformer.
    """
    backbone = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[48, 96, 144, 192],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],  # type: ignore[call-arg]  # a backbone's own argument
    )
    names = {category.label: category.name for category in COCO_PANOPTIC}
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


@dataclass(frozen=True, slots=True)
class Flags:
    output: str = flag(REQUIRED, "folder for checkpoints, metrics and the model", metavar="DIR")
    start: str | None = flag(None, "model to continue from (default: random weights)", metavar="DIR")
    steps: int = flag(30000, "updates", least=1)
    batch_size: int = flag(8, "scenes per update", least=1)
    learning_rate: float = flag(4e-4, "peak of the learning rate")
    pool: int = flag(16000, "number of different scenes", least=1)
    height: int = flag(INPUT_HW[0], "rows that the model sees", metavar="PIXELS", least=32)
    width: int = flag(INPUT_HW[1], "columns that the model sees", metavar="PIXELS", least=32)
    half_size_steps: int = flag(3000, "first updates, on scenes of half the size, three times as fast", least=0)
    bf16: bool = flag(True, "multiply in bfloat16")
    seed: int = flag(0, "of the initial weights", least=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the module's docstring describes it."""
    return cli.run("pretraining.segmenter", lambda: _train(argv))


def _train(argv: Sequence[str] | None) -> None:
    flags = cli.parse(
        Flags,
        argv,
        prog="python -m pretraining.segmenter",
        usage="python -m pretraining.segmenter --output DIR [options]",
        description="Train the embedded segmenter on drawn scenes.",
        epilog="Repeat the command to continue a stopped run.",
    )
    if flags.start and not (Path(flags.start) / "config.json").is_file():
        raise UserError(f"--start: {flags.start} holds no config.json; name a folder `model` that this command wrote")
    torch.manual_seed(flags.seed)
    with without_backbone_warnings():
        model = _model(flags.start)
    model.config.input_size_hw = [flags.height, flags.width]  # the size at which `UniversalSegmenter` shows pictures
    supervised = SupervisedSegmenter(model)

    def loss_of(batch: Sequence[SegmentedScene]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=flags.bf16):
            loss: torch.Tensor = supervised(batch)
        return loss

    run = Path(flags.output)
    scenes = SegmentedScenes((flags.height, flags.width), flags.pool, flags.half_size_steps * flags.batch_size)
    options = LoopOptions(flags.steps, flags.batch_size, flags.learning_rate)
    train_from_scratch(run, supervised, scenes, list, loss_of, options, Console())
    model.half().save_pretrained(run / "model")


def _model(start: str | None) -> Mask2FormerForUniversalSegmentation:
    if start is None:
        return Mask2FormerForUniversalSegmentation(segmenter_config())
    model: Mask2FormerForUniversalSegmentation
    model = Mask2FormerForUniversalSegmentation.from_pretrained(start, dtype=torch.float32)
    return model


def _through_jpeg(image: np.ndarray) -> np.ndarray:
    """Return the image after JPEG compression, as the build stores it."""
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "JPEG", quality=90)
    return np.asarray(Image.open(encoded))


if __name__ == "__main__":
    raise SystemExit(main())
