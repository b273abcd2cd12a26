"""Time segmentation networks in the shapes of published checkpoints, with random weights.

    python benchmarks/segmenter_shapes.py [--shapes eomt_s detr_r50] [--device cpu] [--threads 1]

Each network segments a scene of 640 x 480 pixels as in a build: scaled, padded, through the network, post-processed;
on a GPU in batches of 8 where its input has one size. Prints the seconds of clock and of CPU for an image, the former
only of use on an idle machine, and as the last line JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import circumstances
from transformers import (
    AutoModelForUniversalSegmentation,
    DetrConfig,
    EomtConfig,
    Mask2FormerConfig,
    MaskFormerConfig,
    MaskFormerDetrConfig,
    ResNetConfig,
    SwinConfig,
)

from collavo.scenes import draw_scene
from collavo.segmenters.framing import framing_of
from collavo.segmenters.universal import UniversalSegmenter
from schemas.categories import COCO_PANOPTIC

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def swin(width: int, depths: list[int], heads: list[int], window: int) -> SwinConfig:
    return SwinConfig(
        embed_dim=width, depths=depths, num_heads=heads, window_size=window, image_size=384, out_features=STAGES
    )


def eomt(width: int, layers: int, heads: int, blocks: int) -> EomtConfig:
    return EomtConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_blocks=blocks, image_size=640
    )


SWIN_T = (96, [2, 2, 6, 2], [3, 6, 12, 24], 7)
SWIN_B = (128, [2, 2, 18, 2], [4, 8, 16, 32], 12)
SWIN_L = (192, [2, 2, 18, 2], [6, 12, 24, 48], 12)

SHAPES: dict[str, Callable[[], Any]] = {
    "eomt_s": lambda: eomt(384, 12, 6, 3),
    "eomt_b": lambda: eomt(768, 12, 12, 3),
    "eomt_l": lambda: eomt(1024, 24, 16, 4),
    "mask2former_swin_t": lambda: Mask2FormerConfig(backbone_config=swin(*SWIN_T), num_queries=100),
    "mask2former_swin_l": lambda: Mask2FormerConfig(backbone_config=swin(*SWIN_L), num_queries=200),
    "maskformer_swin_t": lambda: MaskFormerConfig(
        backbone_config=swin(*SWIN_T), decoder_config=MaskFormerDetrConfig(num_queries=100)
    ),
    "maskformer_swin_b": lambda: MaskFormerConfig(
        backbone_config=swin(*SWIN_B), decoder_config=MaskFormerDetrConfig(num_queries=100)
    ),
    "detr_r50": lambda: DetrConfig(backbone_config=ResNetConfig(out_features=STAGES)),
    "toy": lambda: EomtConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_blocks=2, image_size=64, patch_size=8
    ),
}
"""OneFormer is Mask2Former's size with the same backbone, and needs a tokenizer; it is left out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "toy"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, default=2, help="timed ones, after one that is not")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| shape | weights | input | clock, s/image | CPU, s/image |\n|---|---|---|---|---|")
    rows = {shape: timed(shape, args.device, args.batches) for shape in args.shapes}
    more = {"device": args.device, "threads": args.threads, "batches": args.batches}
    print(json.dumps({"benchmark": "segmenter_shapes", **more, "shapes": rows, **circumstances()}))


def timed(shape: str, device: str, batches: int) -> dict[str, Any]:
    """Save a network, load it as a build does, and time it."""
    torch.manual_seed(0)
    config = SHAPES[shape]()
    config.id2label = {category.label: category.name for category in COCO_PANOPTIC}
    config.label2id = {name: label for label, name in config.id2label.items()}
    with TemporaryDirectory() as folder:
        with torch.device("cuda" if device.startswith("cuda") else "cpu"):  # where weights are drawn in no time
            model = AutoModelForUniversalSegmentation.from_config(config)
        model.cpu().save_pretrained(Path(folder))
        weights = sum(parameter.numel() for parameter in model.parameters())
        del model
        segmenter = UniversalSegmenter(folder, device=device, batch_size=8)
    images = [draw_scene(0, (640, 480)).image] * segmenter.facts["batch_size"]
    height, width = framing_of(config, Path()).sizes((480, 640))[1]
    segmenter.segment(images)
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(batches):
        segmenter.segment(images)  # which waits for the device
    count = batches * len(images)
    row = {
        "weights": weights,
        "input_hw": [height, width],
        "seconds": round((time.perf_counter() - start) / count, 4),
        "cpu_seconds": round((time.process_time() - cpu_start) / count, 4),
    }
    print(
        f"| {shape} | {weights / 1e6:.0f} M | {height} x {width} | {row['seconds']} | {row['cpu_seconds']} |",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
