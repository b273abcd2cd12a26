"""Measure the panoptic quality of a segmenter on drawn scenes that no training has seen.

    python benchmarks/segmenter_quality.py [--checkpoint scenes] [--count 500] [--write_card]

The script draws scenes, segments them as the build does, and writes the predictions in COCO's panoptic format. hotcoco
then computes panoptic quality as panopticapi defines it: a segment matches at an overlap above one half, crowd regions
count neither as found nor as missed, and a prediction within a crowd of its class is no mistake. Means are over the
classes (all, things or stuff) that the scenes or the predictions hold. Prints a table, and as the last line JSON.

Choose thresholds on other scenes than those reported: `--seed 5000011 --thresholds ...`. --write_card puts the figures
of the embedded segmenter beside its weights, where the tests read them, and into its card.

Needs hotcoco: pip install 'collavo[dev]'.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hotcoco.panoptic import PanopticEval
from measure import cached_scenes, circumstances, size_text
from PIL import Image
from rich.progress import track

from collavo.cli import size_wh
from collavo.embedded import SCENES, find_embedded
from collavo.images import decode_rgb
from collavo.panoptic.maps import PanopticMap
from collavo.panoptic.thresholds import THRESHOLD_PRESETS
from collavo.segmenters import Segmenter, load_segmenter
from schemas.categories import COCO_PANOPTIC

HELD_OUT_SEED = 4_000_037
"""Seed of the scenes to report on; training uses `pretraining.loop.TRAIN_SCENES_SEED`, the build 0."""

FIRST = 40
"""The first scenes have a figure of their own, which a test repeats."""

FIGURES, CARD = "figures.json", "README.md"
_TABLE = re.compile(r"(<!-- figures -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", default=SCENES, help="of transformers: folder, hub id, or scenes, the embedded one"
    )
    parser.add_argument("--count", type=int, default=500, help="scenes")
    parser.add_argument(
        "--size", type=size_wh, default="320x240", help="of the scenes; the default is that of the build"
    )
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED, help="of the scenes")
    parser.add_argument(
        "--thresholds", choices=tuple(THRESHOLD_PRESETS), help="a preset (default: the checkpoint's own)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--write_card", action="store_true", help="keep the figures with the embedded model")
    parser.add_argument(
        "--cache", type=Path, default=Path("/tmp/collavo-benchmarks"), help="scenes are drawn here once"
    )
    args = parser.parse_args()
    if args.write_card and (args.checkpoint, args.seed) != (SCENES, HELD_OUT_SEED):
        parser.error("--write_card is for the embedded model on the default --seed")

    scenes = cached_scenes(args.cache, args.count, args.size, args.seed)
    thresholds = THRESHOLD_PRESETS[args.thresholds] if args.thresholds else None
    segmenter = load_segmenter("transformers", checkpoint=args.checkpoint, thresholds=thresholds, device=args.device)
    truth = json.loads((scenes / "panoptic.json").read_text())
    predictions = args.cache / "predictions" / scenes.name
    start = time.perf_counter()
    annotations = list(predict(segmenter, scenes, truth["images"], predictions))
    seconds = time.perf_counter() - start
    result = {
        "benchmark": "segmenter_quality",
        "scenes": {"count": args.count, "size": size_text(args.size), "seed": args.seed},
        **quality(scenes, truth, predictions, annotations, args.count),
        f"first_{FIRST}": quality(scenes, truth, predictions, annotations, FIRST)["panoptic_quality"],
        "ms_per_image": round(1000 * seconds / args.count, 1),
        "segmenter": segmenter.facts,
        **circumstances(),
    }
    print("\n".join(table(result)))
    if args.write_card:
        write_card(result)
    print(json.dumps(result))


def predict(
    segmenter: Segmenter, scenes: Path, images: Sequence[dict[str, Any]], folder: Path
) -> Iterator[dict[str, Any]]:
    """Segment the stored scenes one by one, yield annotations in COCO's format, and write the masks to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in track(images, "Segmenting"):
        (panoptic,) = segmenter.segment([decode_rgb((scenes / "images" / image["file_name"]).read_bytes())])
        name = f"{Path(image['file_name']).stem}.png"
        Image.fromarray(np.stack([panoptic.index_map, *[np.zeros_like(panoptic.index_map)] * 2], axis=-1)).save(
            folder / name
        )
        yield {"image_id": image["id"], "file_name": name, "segments_info": segments_info(panoptic)}


def segments_info(panoptic: PanopticMap) -> list[dict[str, Any]]:
    """Return the segments in COCO's format; their ids are their positions in the index map."""
    return [
        {"id": position, "category_id": segment.category_id, "area": segment.area, "iscrowd": 0}
        for position, segment in enumerate(panoptic.segments, start=1)
    ]


def quality(
    scenes: Path, truth: dict[str, Any], predictions: Path, annotations: Sequence[dict[str, Any]], count: int
) -> dict[str, Any]:
    """Compute panoptic quality over the first `count` scenes: of all classes, things and stuff, and class by class."""
    evaluation = PanopticEval(
        {**truth, "images": truth["images"][:count], "annotations": truth["annotations"][:count]},
        {**truth, "images": truth["images"][:count], "annotations": list(annotations[:count])},
        gt_folder=str(scenes / "panoptic"),
        pred_folder=str(predictions),
    )
    evaluation.evaluate()
    results = evaluation.results()
    groups = {
        group.lower(): {name: round(results[group][name], 4) for name in ("pq", "sq", "rq")}
        | {"classes": results[group]["n"]}
        for group in ("All", "Things", "Stuff")
    }
    classes = {
        COCO_PANOPTIC.by_category_id[int(category_id)].name: {
            "pq": round(figures["pq"], 4), "truth": figures["tp"] + figures["fn"], "found": figures["tp"],
            "wrong": figures["fp"],
        }
        for category_id, figures in results["per_class"].items()
        if figures["tp"] + figures["fp"] + figures["fn"]
    }  # fmt: skip
    return {"panoptic_quality": groups, "per_class": dict(sorted(classes.items(), key=lambda item: -item[1]["pq"]))}


def table(result: dict[str, Any]) -> list[str]:
    """Return Markdown for the terminal and the card."""
    lines = ["| | PQ | SQ | RQ | classes |", "|---|---|---|---|---|"]
    for group, figures in result["panoptic_quality"].items():
        pq, sq, rq = (f"{100 * figures[name]:.1f}" for name in ("pq", "sq", "rq"))
        lines.append(f"| {group} | {pq} | {sq} | {rq} | {figures['classes']} |")
    ranked = [f"{name} {100 * figures['pq']:.0f}" for name, figures in result["per_class"].items()]
    lines += ["", f"Best classes: {', '.join(ranked[:10])}.", f"Worst classes: {', '.join(ranked[:-11:-1])}."]
    return lines


def write_card(result: dict[str, Any]) -> None:
    """Write the figures beside the embedded weights, and the table into their card."""
    embedded = find_embedded(SCENES)
    assert embedded is not None
    (embedded.folder / FIGURES).write_text(json.dumps(result, indent=1) + "\n")
    card = embedded.folder / CARD
    scenes, date = result["scenes"], result["date"]
    told = f"On {scenes['count']} scenes of {scenes['size']} pixels, seed {scenes['seed']}, measured {date}:"
    text = "\n".join([told, "", *table(result)])
    card.write_text(_TABLE.sub(lambda match: f"{match[1]}{text}\n{match[2]}", card.read_text()))


if __name__ == "__main__":
    main()
