"""Drawn pictures in the layouts that ADE20K and Cityscapes have once their own tools have made them panoptic.

Sources: Mask2Former's `prepare_ade20k_pan_seg.py` and cityscapesScripts' `createPanopticImgs.py`, for the folders, the
names of files, the ids and what the JSON holds; the label files of transformers, for the names in checkpoints.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from conftest import coco_png, encoded
from PIL import Image

# Position, thing or stuff, and name as Mask2Former's script writes it, synonyms and stray spaces included.
ADE20K = [
    {"name": name.strip("*"), "id": i, "isthing": int(not name.startswith("*")), "color": [i, 255 - i, (37 * i) % 256]}
    for i, name in enumerate(
        "*wall|*building|*sky|*floor|*tree|*ceiling|*road, route|bed|window |*grass|cabinet|*sidewalk, pavement|"
        "person|*earth, ground|door|table|*mountain, mount|*plant|curtain|chair|car|*water|painting, picture|sofa|"
        "shelf|*house|*sea|mirror|*rug|*field|armchair|seat|fence|desk|*rock, stone|wardrobe, closet, press|lamp|tub|"
        "rail|cushion|*base, pedestal, stand|box|column, pillar|signboard, sign|"
        "chest of drawers, chest, bureau, dresser|counter|"
        "*sand|sink|*skyscraper|fireplace|refrigerator, icebox|*grandstand, covered stand|*path|stairs|*runway|"
        "case, display case, showcase, vitrine|pool table, billiard table, snooker table|pillow|screen door, screen|"
        "*stairway, staircase|*river|*bridge, span|bookcase|*blind, screen|coffee table|"
        "toilet, can, commode, crapper, pot, potty, stool, throne|flower|book|*hill|bench|countertop|stove|"
        "palm, palm tree|kitchen island|computer|swivel chair|boat|*bar|arcade machine|*hovel, hut, hutch, shack, "
        "shanty|bus|towel|light|truck|*tower|chandelier|awning, sunshade, sunblind|street lamp|booth|tv|plane|"
        "*dirt track|clothes|pole|*land, ground, soil|bannister, banister, balustrade, balusters, handrail|"
        "*escalator, moving staircase, moving stairway|ottoman, pouf, pouffe, puff, hassock|bottle|"
        "*buffet, counter, sideboard|*poster, posting, placard, notice, bill, card|*stage|van|ship|fountain|"
        "*conveyer belt, conveyor belt, conveyer, conveyor, transporter|*canopy|"
        "washer, automatic washer, washing machine|plaything, toy|*pool|stool|barrel, cask|basket, handbasket|*falls|"
        "*tent|bag|minibike, motorbike|*cradle|oven|ball|food, solid food|step, stair|*tank, storage tank|trade name|"
        "microwave|pot|animal|bicycle|*lake|dishwasher|screen|*blanket, cover|sculpture|hood, exhaust hood|sconce|vase|"
        "traffic light|tray|trash can|fan|*pier|*crt screen|plate|monitor|bulletin board|*shower|radiator|"
        "glass, drinking glass|clock|flag".split("|")
    )
]

# What published checkpoints call the classes of ADE20K otherwise, by position.
_LABELS_OF_CHECKPOINTS = {
    7: "bed ", 8: "windowpane", 37: "bathtub", 38: "railing", 87: "streetlight", 89: "television receiver",
    90: "airplane", 92: "apparel", 109: "swimming pool", 113: "waterfall", 138: "ashcan",
}  # fmt: skip
ADE20K_LABELS = {
    category["id"]: _LABELS_OF_CHECKPOINTS.get(category["id"], category["name"].partition(",")[0])
    for category in ADE20K
}

CITYSCAPES = [
    {"id": id_, "name": name.strip("*"), "color": [id_, 2 * id_, 3 * id_], "supercategory": "any",
     "isthing": int(not name.startswith("*"))}
    for id_, name in {
        7: "*road", 8: "*sidewalk", 11: "*building", 12: "*wall", 13: "*fence", 17: "*pole", 19: "*traffic light",
        20: "*traffic sign", 21: "*vegetation", 22: "*terrain", 23: "*sky", 24: "person", 25: "rider", 26: "car",
        27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
    }.items()
]  # fmt: skip
CITYSCAPES_LABELS = {label: category["name"] for label, category in enumerate(CITYSCAPES)}


class Layout(NamedTuple):
    """Where a drawn data set lies: for train and val, the JSON, its masks and the folder that users name."""

    json: dict[str, Path]
    masks: dict[str, Path]
    images: dict[str, Path]


def ade20k(folder: Path, count: int) -> Layout:
    """ADEChallengeData2016 after Mask2Former's script: text ids, a flat folder of JPEGs for each split."""
    root = folder / "ADEChallengeData2016"
    layout = Layout(
        {split: root / f"ade20k_panoptic_{split}.json" for split in ("train", "val")},
        {split: root / f"ade20k_panoptic_{split}" for split in ("train", "val")},
        {"train": root / "images" / "training", "val": root / "images" / "validation"},
    )
    for split in ("train", "val"):
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": ADE20K}
        layout.masks[split].mkdir(parents=True)
        layout.images[split].mkdir(parents=True)
        for number in range(1, count + 1):
            name = f"ADE_{split}_{number:08d}"
            ids, classes = _draw(ADE20K, seed=number + 1000 * (split == "val"))
            # panopticapi's IdGenerator counts up from the class's colour.
            numbers = {old: 65536 * (old % 200) + 256 * classes[old] + 7 + old for old in classes}
            _write(layout.images[split] / f"{name}.jpg", "JPEG", ids, classes, ADE20K)
            (layout.masks[split] / f"{name}.png").write_bytes(coco_png(_renumbered(ids, numbers)))
            height, width = ids.shape
            content["images"].append({"id": name, "file_name": f"{name}.jpg", "width": width, "height": height})
            segments = _segments(ids, classes, numbers)
            content["annotations"].append({"image_id": name, "file_name": f"{name}.png", "segments_info": segments})
        layout.json[split].write_text(json.dumps(content))
    return layout


def cityscapes(folder: Path, count: int) -> Layout:
    """Cityscapes after `createPanopticImgs.py`: images in a folder per city, which the JSON names otherwise."""
    truth, pictures = folder / "cityscapes" / "gtFine", folder / "cityscapes" / "leftImg8bit"
    layout = Layout(
        {split: truth / f"cityscapes_panoptic_{split}.json" for split in ("train", "val")},
        {split: truth / f"cityscapes_panoptic_{split}" for split in ("train", "val")},
        {split: pictures / split for split in ("train", "val")},
    )
    for split, cities in (("train", ("aachen", "bochum")), ("val", ("lindau",))):
        content: dict[str, Any] = {"annotations": [], "categories": CITYSCAPES, "images": []}
        layout.masks[split].mkdir(parents=True)
        for number in range(count):
            city = cities[number % len(cities)]
            name = f"{city}_{number:06d}_000019"
            ids, classes = _draw(CITYSCAPES, seed=number + 5000 + 1000 * (split == "val"))
            # Stuff has its class for an id, an instance 1000 times its class and a count.
            things = {category["id"] for category in CITYSCAPES if category["isthing"]}
            numbers = {old: 1000 * c + old if c in things else c for old, c in classes.items()}
            if crowd := next((old for old, c in classes.items() if number % 3 == 0 and c in things), None):
                numbers[crowd] = classes[crowd]  # a group: the class alone
            (layout.images[split] / city).mkdir(parents=True, exist_ok=True)
            _write(layout.images[split] / city / f"{name}_leftImg8bit.png", "PNG", ids, classes, CITYSCAPES)
            (layout.masks[split] / f"{name}_gtFine_panoptic.png").write_bytes(coco_png(_renumbered(ids, numbers)))
            height, width = ids.shape
            content["images"].append(
                {"file_name": f"{name}_gtFine_leftImg8bit.png", "height": height, "id": name, "width": width}
            )
            segments = _segments(ids, classes, numbers)
            for segment in segments:
                segment["iscrowd"] = int(segment["id"] < 1000 and segment["category_id"] in things)
            content["annotations"].append(
                {"file_name": f"{name}_gtFine_panoptic.png", "image_id": name, "segments_info": segments}
            )
        layout.json[split].write_text(json.dumps(content, sort_keys=True, indent=4))
    return layout


def _draw(categories: list[dict[str, Any]], seed: int) -> tuple[np.ndarray, dict[int, int]]:
    """Two or three bands of stuff, instances of two or three things on them, and a strip that nobody labelled."""
    rng = np.random.default_rng(seed)
    height, width = int(rng.integers(60, 90)), int(rng.integers(80, 120))
    ids = np.zeros((height, width), dtype=np.uint32)
    classes: dict[int, int] = {}
    stuff = rng.permutation([c["id"] for c in categories if not c["isthing"]])[: 2 + seed % 2]
    edges = np.linspace(0, height - 5, len(stuff) + 1).astype(int)
    for top, bottom, category_id in zip(edges, edges[1:], stuff, strict=False):
        ids[top:bottom] = len(classes) + 1
        classes[len(classes) + 1] = int(category_id)
    things = rng.permutation([c["id"] for c in categories if c["isthing"]])[: 2 + seed % 2]
    cells = rng.permutation(12)
    for place, cell in enumerate(cells[: int(rng.integers(3, 9))]):
        y, x = (cell // 4) * (height // 3), (cell % 4) * (width // 4)
        h, w = int(rng.integers(6, height // 3)), int(rng.integers(6, width // 4))
        ids[y : y + h, x : x + w] = len(classes) + 1
        classes[len(classes) + 1] = int(things[place % len(things)])
    present = set(np.unique(ids).tolist())
    return ids, {old: category_id for old, category_id in classes.items() if old in present}


def _renumbered(ids: np.ndarray, numbers: dict[int, int]) -> np.ndarray:
    out = np.zeros_like(ids)
    for old, new in numbers.items():
        out[ids == old] = new
    return out


def _segments(ids: np.ndarray, classes: dict[int, int], numbers: dict[int, int]) -> list[dict[str, Any]]:
    found = []
    for old, category_id in classes.items():
        y, x = np.nonzero(ids == old)
        box = [int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1]
        found.append({"id": numbers[old], "category_id": category_id, "area": len(y), "bbox": box, "iscrowd": 0})
    return found


def _write(path: Path, format: str, ids: np.ndarray, classes: dict[int, int], categories: list[dict[str, Any]]) -> None:
    """A picture of the map: a colour per class, with noise."""
    colors = {category["id"]: category["color"] for category in categories}
    image = np.zeros((*ids.shape, 3), dtype=np.int64)
    for old, category_id in classes.items():
        image[ids == old] = colors[category_id]
    image += np.random.default_rng(len(classes)).integers(0, 20, image.shape)
    path.write_bytes(encoded(Image.fromarray(image.clip(0, 255).astype(np.uint8)), format))
