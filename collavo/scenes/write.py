"""Writing scenes as a data set: COCO panoptic files, and a LLaVA file of dialogues."""

import json
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from collavo.errors import UserError
from collavo.folders import recover, whole_folder
from collavo.scenes.compose import draw_scene
from collavo.scenes.scene import Scene
from schemas.categories import COCO_PANOPTIC

_WRITTEN = re.compile(r"(panoptic|dialogues)\.json|images/scene-\d+\.jpg|panoptic/scene-\d+\.png")
_LICENSE = {"id": 1, "name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}


def scene_seed(seed: int, index: int) -> int:
    """Return the seed of scene `index` of the data set `seed`; it depends on these two alone."""
    low, high = np.random.SeedSequence([seed, index]).generate_state(2).tolist()
    return int(low + (high << 32))


def write_scenes(
    output: str | Path,
    count: int,
    size_wh: tuple[int, int] = (640, 480),
    seed: int = 0,
    start: int = 0,
    overwrite: bool = False,
    progress: Callable[[range], Iterable[int]] = iter,
    processes: int = 1,
) -> None:
    """Draw scenes `start` to `start + count - 1` into a folder, which appears whole or not at all.

    Args:
        overwrite: replace the scenes that an earlier call left in the folder.
        progress: wraps the numbers of the scenes, to show how many are drawn.
        processes: that draw; more than one import the program's main module, as `multiprocessing` does.

    Raises:
        UserError: if the output is a file or cannot be written to, if the folder is not empty and `overwrite` is not
            set, or if it holds anything but scenes.
    """
    output = Path(output).resolve()
    recover(output)  # of an earlier run that was killed, whose scenes count as being there
    _check_replaceable(output, overwrite)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    dialogues: list[dict[str, Any]] = []
    with whole_folder(output) as folder:
        for kind in ("images", "panoptic"):
            (folder / kind).mkdir()
        numbers = range(start, start + count)
        draw = partial(_draw, folder, size_wh, seed)
        with ExitStack() as stack:
            drawn: Iterator[Any] = map(draw, numbers)
            if processes > 1:
                ignore_interrupt = (
                    signal.SIGINT,
                    signal.SIG_IGN,
                )  # Ctrl-C reaches all, and is this process's to handle
                context = get_context("spawn")
                pool = ProcessPoolExecutor(processes, context, initializer=signal.signal, initargs=ignore_interrupt)
                stack.callback(pool.shutdown, cancel_futures=True)
                drawn = pool.map(draw, numbers, chunksize=4)
            for _, (image, annotation, entries) in zip(progress(numbers), drawn, strict=True):
                images.append(image)
                annotations.append(annotation)
                dialogues += entries
        panoptic = {
            "info": {"description": f"Sample scenes of CoLLaVO, seed {seed}", "version": "1"},
            "licenses": [_LICENSE],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": c.category_id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color_rgb)}
                for c in COCO_PANOPTIC
            ],
        }
        (folder / "dialogues.json").write_text(json.dumps(dialogues), encoding="utf-8")
        (folder / "panoptic.json").write_text(json.dumps(panoptic), encoding="utf-8")


def _draw(
    folder: Path, size_wh: tuple[int, int], seed: int, index: int
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Draw a scene and write its picture and its mask; returns its image, its annotation and its dialogues."""
    scene, name = draw_scene(scene_seed(seed, index), size_wh), f"scene-{index:06d}"
    Image.fromarray(scene.image).save(folder / "images" / f"{name}.jpg", quality=90)
    rgb = np.stack([scene.ids & 255, scene.ids >> 8 & 255, scene.ids >> 16], -1).astype(np.uint8)
    Image.fromarray(rgb).save(folder / "panoptic" / f"{name}.png")
    width, height = size_wh
    image = {"id": index, "file_name": f"{name}.jpg", "width": width, "height": height, "license": 1}
    annotation = {"image_id": index, "file_name": f"{name}.png", "segments_info": _segments_info(scene)}
    return image, annotation, list(_llava_entries(scene, name))


def _check_replaceable(output: Path, overwrite: bool) -> None:
    files = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir())
    foreign = [file for file in files if not _WRITTEN.fullmatch(file)]
    if foreign:
        raise UserError(f"{output}: holds {foreign[0]}, which is no scene; name another folder")
    if files and not overwrite:
        raise UserError(f"{output}: the folder holds scenes; name another, or overwrite them")


def _segments_info(scene: Scene) -> list[dict[str, Any]]:
    return [
        {"id": s.id, "category_id": s.category_id, "bbox": list(s.box_xywh), "area": s.area, "iscrowd": int(s.is_crowd)}
        for s in scene.segments
    ]


def _llava_entries(scene: Scene, name: str) -> Iterator[dict[str, Any]]:
    for number, turns in enumerate(scene.dialogues):
        conversations = [{"from": speaker, "value": text} for speaker, text in turns]
        yield {"id": f"{name}-{number}", "image": f"images/{name}.jpg", "conversations": conversations}
