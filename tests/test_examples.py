"""The example scripts run from files to an answer, each on drawn data in the layout that it is for."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from builds import REPOSITORY
from conftest import needs_scenes_model, needs_tiny_base
from layouts import Layout, ade20k, cityscapes

from collavo.scenes import write_scenes

pytestmark = [pytest.mark.slow, needs_tiny_base, needs_scenes_model]


def of_layout(layout: Layout) -> dict[str, object]:
    return {
        **{"TRAIN": layout.json["train"], "TRAIN_IMAGES": layout.images["train"]},
        **{"VAL": layout.json["val"], "VAL_IMAGES": layout.images["val"]},
    }


def own_segmenter(folder: Path) -> dict[str, object]:
    layout = ade20k(folder, 12)
    return {**of_layout(layout), "IMAGES": layout.images["train"], "SEGMENTER_FLAGS": "--steps 2 --max_images 1"}


def coco(folder: Path) -> dict[str, object]:
    """Drawn scenes where COCO 2017 has its photographs."""
    for split, start in (("train", 0), ("val", 50)):
        write_scenes(folder / "scenes" / split, 6, (96, 72), start=start)
        scenes, name = folder / "scenes" / split, f"panoptic_{split}2017"
        (folder / "annotations").mkdir(exist_ok=True)
        shutil.move(scenes / "images", folder / f"{split}2017")
        shutil.move(scenes / "panoptic", folder / "annotations" / name)
        shutil.move(scenes / "panoptic.json", folder / "annotations" / f"{name}.json")
    return {"COCO": folder}


def llava(folder: Path) -> dict[str, object]:
    """Drawn scenes where LLaVA's mix has COCO's photographs, with a dialogue about none."""
    write_scenes(folder / "scenes", 90, (96, 72))
    (folder / "data" / "coco").mkdir(parents=True)
    shutil.move(folder / "scenes" / "images", folder / "data" / "coco" / "train2017")
    shutil.move(folder / "scenes" / "panoptic", folder / "panoptic_train2017")
    shutil.move(folder / "scenes" / "panoptic.json", folder / "panoptic_train2017.json")
    entries = json.loads((folder / "scenes" / "dialogues.json").read_text())
    for entry in entries:
        entry["image"] = entry["image"].replace("images/", "coco/train2017/")
    greeting = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (folder / "mix.json").write_text(json.dumps([*entries, {"id": "none", "conversations": greeting}]))
    folders = {"PLAYGROUND": folder / "data", "COCO_ANNOTATIONS": folder, "LLAVA_JSON": folder / "mix.json"}
    return {**folders, "PRESET": "tiny", "DEVICE": "cpu"}


def pictures(folder: Path) -> dict[str, object]:
    write_scenes(folder / "scenes", 16, (96, 72))
    return {"IMAGES": folder / "scenes" / "images", "CHECKPOINT": "scenes", "VALIDATION_RATIO": 0.3}


@pytest.mark.parametrize(
    "script, environment",
    [
        ("ade20k.sh", lambda folder: {"ADE": ade20k(folder, 6).json["train"].parent}),
        ("ade20k.sh", lambda folder: of_layout(cityscapes(folder, 6))),
        ("own_dataset.sh", lambda folder: of_layout(ade20k(folder, 6))),
        ("own_segmenter.sh", own_segmenter),
        ("folder.sh", pictures),
        ("coco.sh", coco),
        ("llava_7b.sh", llava),
    ],
    ids=["ade20k", "cityscapes", "own", "segmenter", "folder", "coco", "llava"],
)
def test_an_example_runs(script: str, environment: Callable[[Path], dict[str, object]], tmp_path: Path) -> None:
    variables = {name: str(value) for name, value in environment(tmp_path / "data").items()}
    flags = "--max_steps 1 --batch_size 2 --device cpu"
    preset = "" if "PRESET" in variables else "--preset tiny "
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", f"examples/{script}"],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": path, "OUT": str(tmp_path / "out"), "TRAIN_FLAGS": preset + flags, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Counting" in done.stdout and (tmp_path / "out" / "run" / "adapters" / "image_cit").is_dir()
