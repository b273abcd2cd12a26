"""Writing scenes as a data set: COCO panoptic files, and a LLaVA file of dialogues."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from collavo.errors import UserError
from collavo.scenes.compose import draw_scene
from collavo.scenes.scene import Scene
from schemas.categories import CATEGORIES

_WRITTEN = ("panoptic.json", "dialogues.json", "images/scene-*.jpg", "panoptic/scene-*.png", ".*.json.part")
_LICENSE = {"id": 1, "name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}


def scene_seed(seed: int, index: int) -> int:
    """The seed of scene `index` of the data set `seed`; it depends on these two alone."""
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
) -> None:
    """Draw scenes `start` to `start + count - 1` into a folder.

    The two JSON files are written last and appear whole, so a folder that has them is complete. `progress` wraps the
    numbers of the scenes, to show how far it is.

    Raises:
        UserError: where the folder holds anything and `overwrite` is not set, or cannot be created.
    """
    output = Path(output)
    _prepare(output, overwrite)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    dialogues: list[dict[str, Any]] = []
    for index in progress(range(start, start + count)):
        scene, name = draw_scene(scene_seed(seed, index), size_wh), f"scene-{index:06d}"
        Image.fromarray(scene.image).save(output / "images" / f"{name}.jpg", quality=90)
        rgb = np.stack([scene.ids & 255, scene.ids >> 8 & 255, scene.ids >> 16], -1).astype(np.uint8)
        Image.fromarray(rgb).save(output / "panoptic" / f"{name}.png")
        width, height = size_wh
        images.append({"id": index, "file_name": f"{name}.jpg", "width": width, "height": height, "license": 1})
        annotations.append({"image_id": index, "file_name": f"{name}.png", "segments_info": _segments_info(scene)})
        dialogues += _llava_entries(scene, name)
    _write_json(output / "dialogues.json", dialogues)
    _write_json(
        output / "panoptic.json",
        {
            "info": {"description": f"Sample scenes of CoLLaVO, seed {seed}", "version": "1"},
            "licenses": [_LICENSE],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": c.category_id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color_rgb)}
                for c in CATEGORIES
            ],
        },
    )


def _prepare(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; name a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"--output {output}: the folder is not empty; name another, or add --overwrite")
    try:
        for path in chain.from_iterable(output.glob(pattern) for pattern in _WRITTEN):
            path.unlink()
        for folder in ("images", "panoptic"):
            (output / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}; name a folder that can be written to") from None


def _segments_info(scene: Scene) -> list[dict[str, Any]]:
    return [
        {"id": s.id, "category_id": s.category_id, "bbox": list(s.box_xywh), "area": s.area, "iscrowd": int(s.is_crowd)}
        for s in scene.segments
    ]


def _llava_entries(scene: Scene, name: str) -> Iterator[dict[str, Any]]:
    for number, turns in enumerate(scene.dialogues):
        conversations = [{"from": speaker, "value": text} for speaker, text in turns]
        yield {"id": f"{name}-{number}", "image": f"images/{name}.jpg", "conversations": conversations}


def _write_json(path: Path, content: Any) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(path)
