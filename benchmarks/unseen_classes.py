"""Measure what a model knows of classes that were in no crayon map and no question of its training.

    python benchmarks/unseen_classes.py --folder unseen [--count 1400] [--arms words table all] [--seeds 0 1 2]

Six thing classes of the drawn scenes are left out of the training data; the questions about 240 other scenes have all
classes. `words` computes the semantic queries from the names of the classes, `table` looks them up, and `all` is
`words` trained with the six, which tells how hard they are. Maps are the scenes' annotations. Training is that of the
preset `tiny`, with seven crayon batches in ten. Prints a table of percent correct; finished steps are not repeated.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies import built, evaluated, trained

from collavo.scenes import write_scenes
from schemas.categories import COCO_PANOPTIC

LEFT_OUT = ("sheep", "bottle", "chair", "kite", "carrot", "suitcase")
TASKS = {"class_to_binary": "C2B", "box_to_class": "B2C", "counting": "Counting"}
ARMS = ("words", "table", "all")
TRAIN_SEED, EVALUATION_SEED, EVALUATION_SCENES = 77, 5_000_011, 240


def main() -> int:
    """Run the study; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scenes, data and runs go here")
    parser.add_argument("--count", type=int, default=1400, help="scenes to train on")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the trainings")
    args = parser.parse_args()
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (
        ("scenes", args.count, TRAIN_SEED),
        ("other_scenes", EVALUATION_SCENES, EVALUATION_SEED),
    ):
        if not (folder / name).exists():
            write_scenes(folder / name, count, size_wh=(320, 240), seed=seed)
    _build(folder, "asked", "other_scenes", "--coco_split", "validation")
    rows = []
    for arm in args.arms:
        data = _build(folder, *_training_data(folder, arm))
        for seed in args.seeds:
            rows.append(_figures(f"{arm} | {seed}", _evaluated(folder, arm, data, seed)))
    titles = "| arm | seed | classes | " + " | ".join(TASKS.values()) + " |"
    print("\n".join([titles, "|---|---:|---|---:|---:|---:|", *rows]))
    return 0


def _training_data(folder: Path, arm: str) -> tuple[str, ...]:
    """Name the data of an arm, its scenes, and the build's flags; writes the files that these name."""
    dialogues = ("--llava_json", f"{folder}/scenes/dialogues.json", "--image_root", f"{folder}/scenes")
    flags = (*dialogues, "--segmenter", "annotations")
    if arm == "all":
        return "all_classes", "scenes", *flags
    seen, renamed = folder / "seen.json", folder / "left_out.json"
    records = [record for record in COCO_PANOPTIC.as_records() if record["name"] not in LEFT_OUT]
    seen.write_text(json.dumps(records))
    renamed.write_text(json.dumps(dict.fromkeys(LEFT_OUT, "")))
    return "seen_classes", "scenes", *flags, "--categories", str(seen), "--category_map", str(renamed)


def _build(folder: Path, name: str, scenes: str, *flags: str) -> Path:
    annotations = ("--coco_panoptic", f"{folder}/{scenes}/panoptic.json", "--coco_images", f"{folder}/{scenes}/images")
    return built(folder / name, *annotations, *flags)


def _evaluated(folder: Path, arm: str, data: Path, seed: int) -> Mapping[str, Any]:
    kind = "table" if arm == "table" else "words"
    flags = ["--semantic_queries", kind, "--crayon_share", "0.7", "--preset", "tiny", "--seed", str(seed)]
    return evaluated(trained(folder / f"run_{arm}_{seed}", data, *flags), folder / "asked", tuple(TASKS))


def _figures(arm: str, results: Mapping[str, Any]) -> str:
    lines = []
    for name, wanted in (("the six", True), ("others", False)):
        cells = []
        for task in TASKS:
            of_classes = [figures for c, figures in results[task]["classes"].items() if (c in LEFT_OUT) == wanted]
            questions = sum(figures["questions"] for figures in of_classes)
            correct = sum(figures["questions"] * figures["score"] for figures in of_classes)
            cells.append(f"{100 * correct / questions:.1f}")
        lines.append(f"| {arm} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
