"""What the tests of the build share: the command, what it left, tiny data to run it on, and a model of no training."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from conftest import coco_png, encoded
from PIL import Image
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from collavo.dataset import read_rows
from pipelines.command import main
from pipelines.options import parse_flags
from pipelines.plan import Plan, make_plan
from schemas.categories import COCO_PANOPTIC
from schemas.crayon_row import CrayonRow

REPOSITORY = Path(__file__).parents[1]
_SCRIPT = "pipelines/build_crayon.py"
_COMMAND = "import sys, pipelines.command as command; sys.exit(command.main())"


def _remembered(inspect: Callable[[Any], tuple[list[str], list[Any]]]) -> Callable[[Any], tuple[list[str], list[Any]]]:
    """Remember what a function says of the arguments of others."""
    known: dict[tuple[Any, bool], tuple[list[str], list[Any]]] = {}

    def remembered(function: Any) -> tuple[list[str], list[Any]]:
        key = getattr(function, "__func__", function), hasattr(function, "__self__")
        if key not in known:
            known[key] = inspect(function)
        names, defaults = known[key]
        return [*names], [*defaults]

    return remembered


# Beam inspects all methods of a step eight times a build, which would be a third of what a tiny one takes.
beam.transforms.core.get_function_args_defaults = _remembered(beam.transforms.core.get_function_args_defaults)


@lru_cache(maxsize=16)
def _rows(stamped: tuple[tuple[Path, int, int, int], ...]) -> dict[str, CrayonRow]:
    """Read the rows of files by their ids; files that are as they were are read once, however often a test asks."""
    rows = list(read_rows([file for file, *_ in stamped]))
    assert len({row.image_id for row in rows}) == len(rows)
    return {row.image_id: row for row in rows}


class DataSet(NamedTuple):
    """An output folder, read."""

    folder: Path

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))

    @property
    def rows(self) -> dict[str, CrayonRow]:
        stats = [(file, file.stat()) for file in self.files]
        return {**_rows(tuple((file, stat.st_ino, stat.st_mtime_ns, stat.st_size) for file, stat in stats))}

    @property
    def table(self) -> pa.Table:
        return pa.concat_tables(pq.read_table(file) for file in self.files).sort_by("image_id")

    @property
    def rejects(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.folder / "rejects.jsonl").read_text().splitlines()]

    @property
    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        return manifest

    @property
    def hashes(self) -> list[tuple[str, str]]:
        return [(file["name"], file["sha256"]) for file in self.manifest["files"]]


def planned(*words: object) -> Plan:
    """What a command line asks for."""
    return make_plan(*parse_flags([*map(str, words)]), share_gpu=False)


def status_of(*words: object) -> int:
    """The exit status of the command, run in this process."""
    try:
        return main([*map(str, words)])
    except SystemExit as end:  # argparse's way to refuse
        assert isinstance(end.code, int)
        return end.code


def build(output: Path, *arguments: object) -> DataSet:
    """Run the command in this process; it must succeed."""
    assert main([*map(str, arguments), "--output", str(output)]) == 0
    return DataSet(output)


def start(*arguments: object, changed: str = "") -> "subprocess.Popen[str]":
    """Start the command as a user does, in a process group of its own.

    Args:
        changed: statements that change the program before it starts.
    """

    def prepare() -> None:
        # A shell started tests in the background with SIGINT ignored, and so would be what they start.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, *(("-c", f"{changed}\n{_COMMAND}") if changed else (_SCRIPT,)), *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=prepare,
    )


def scene_sources(scenes: Path) -> list[object]:
    """Flags that name drawn scenes as what they look like: COCO panoptic and LLaVA files."""
    return [
        *("--coco_panoptic", scenes / "panoptic.json", "--coco_images", scenes / "images"),
        *("--llava_json", scenes / "dialogues.json", "--image_root", scenes, "--segmenter", "annotations"),
    ]


def tiny_mask2former(folder: Path, names: Mapping[int, str] | None = None) -> Path:
    """A Mask2Former checkpoint of 120,000 random weights that finds something in most pictures.

    Args:
        names: of its classes, by label; COCO panoptic's by default.
    """
    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim"), 32)
    names = names or {category.label: category.name for category in COCO_PANOPTIC}
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=backbone,
            dim_feedforward=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            num_queries=12,
            id2label=dict(names),
            label2id={name: label for label, name in names.items()},
            **sizes,
        )
    )
    with torch.no_grad():  # as drawn, every query says nearly nothing of nearly everything
        model.class_predictor.weight.mul_(150)
        for parameter in model.model.transformer_module.decoder.mask_predictor.parameters():
            parameter.mul_(8)
    model.save_pretrained(folder)
    return folder


class CocoFolder:
    """A COCO panoptic data set in the making: grey pictures of 8 x 6 pixels, person on the left, sky on the right."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.json: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
        (folder / "images").mkdir(parents=True)
        (folder / "panoptic").mkdir()

    def add(self, name: str, data: bytes | None = None, **changes: Any) -> None:
        """Add an image with its annotation. `changes` replace keys of it; `mask` is the PNG, None leaves it out."""
        entry_id = len(self.json["images"]) + 1
        self.json["images"].append({"id": entry_id, "file_name": name, "license": 4})
        annotation = {
            "image_id": entry_id,
            "file_name": f"{entry_id}.png",
            "segments_info": [{"id": 7, "category_id": 1, "iscrowd": 0}, {"id": 300, "category_id": 187}],
            **changes,
        }
        mask = annotation.pop("mask", coco_png(IDS))
        if mask is not None:
            (self.folder / "panoptic" / f"{entry_id}.png").write_bytes(mask)
        self.json["annotations"].append(annotation)
        if data is not None:
            file = self.folder / "images" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)

    def flags(self) -> list[object]:
        (self.folder / "panoptic.json").write_text(json.dumps(self.json))
        return ["--coco_panoptic", self.folder / "panoptic.json", "--coco_images", self.folder / "images"]


IDS = np.array([[7] * 4 + [300] * 4] * 6, dtype=np.uint32)
PICTURE = encoded(Image.effect_noise((8, 6), 60).convert("RGB"), "JPEG")
