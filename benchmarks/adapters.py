"""Measure two adapters against one where the second could matter: three settings on drawn scenes.

    python benchmarks/adapters.py --folder adapters [--settings contradicting four_times nine_to_one] [--seeds 0 1 2]

contradicting   each dialogue begins with one of the crayon questions in other words, and answers it in another form:
                "Affirmative.", "A few.", "A small object."; in training and in evaluation
four_times      four times as many steps of instruction tuning
nine_to_one     nine crayon sequences to one dialogue, where half are dialogues otherwise
as_drawn        none of this

Each setting is a study of `benchmarks/ablation.py` in a folder of its own, with its arms `single` and `full`, annotated
segments and fewer scenes and steps. Prints a table in percent, mean and standard deviation over seeds. Finished steps
are not repeated.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ablation
from studies import cell, mean_and_deviation

from collavo.instructions.choose import stable_hash
from collavo.instructions.text import format_box
from collavo.scenes import write_scenes
from schemas.categories import COCO_PANOPTIC

ARMS = {"single": "one", ablation.FULL: "two"}
SETTINGS = ("contradicting", "four_times", "nine_to_one", "as_drawn")
TITLES = [ablation.MEASURES[task][0] for task in ablation.MEASURES if task != "class_to_box"]

THINGS = {category.category_id: category for category in COCO_PANOPTIC.things}

LARGE = 0.01
"""Share of the picture from which a contradicting dialogue calls an object large."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="scenes, data and runs go here")
    add("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--train_scenes", type=int, default=800)
    add("--eval_scenes", type=int, default=100)
    add("--cit_steps", type=int, default=100, help="of instruction tuning, but for four_times")
    add("ablation_flags", nargs="*", help="further flags of ablation.py, after --")
    args = parser.parse_args(argv)
    rows = []
    for setting in args.settings:
        folder: Path = args.folder / setting
        _draw(folder, args, setting)
        asked = {
            "folder": folder,
            "train_scenes": args.train_scenes,
            "eval_scenes": args.eval_scenes,
            "cit_steps": args.cit_steps * (4 if setting == "four_times" else 1),
            "batch_size": 4,
            "crayon_share": 0.9 if setting == "nine_to_one" else 0.5,
            "segmenter": "annotations",
        }
        flags = [text for name, value in asked.items() for text in (f"--{name}", str(value))]
        flags += ["--arms", *ARMS, "--questions", *(task for task in ablation.MEASURES if task != "class_to_box")]
        flags += ["--seeds", *map(str, args.seeds), *args.ablation_flags]
        assert ablation.main(flags) == 0
        rows += _rows(setting, json.loads((folder / "ablation.json").read_text())["by_seed"])
    print("\n".join([f"| setting | adapters | seeds | {' | '.join(TITLES)} |", "|---|---|" + "---:|" * 5, *rows]))
    return 0


def _draw(folder: Path, args: argparse.Namespace, setting: str) -> None:
    """Draw the scenes that the ablation would draw, with the dialogues of the setting."""
    for name, count, seed in (
        ("train", args.train_scenes, ablation.TRAIN_SEED),
        ("evaluation", args.eval_scenes, ablation.EVALUATION_SEED),
    ):
        scenes = folder / "scenes" / name
        if scenes.exists():
            continue
        drawn = scenes.with_name(f".{name}")
        write_scenes(drawn, count, (320, 240), seed, overwrite=True)
        if setting == "contradicting":
            panoptic, dialogues = (
                json.loads((drawn / f"{part}.json").read_text()) for part in ("panoptic", "dialogues")
            )
            (drawn / "dialogues.json").write_text(json.dumps(contradicting(panoptic, dialogues)))
        drawn.rename(scenes)


def contradicting(panoptic: Mapping[str, Any], dialogues: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return dialogues that begin with a question about the image's objects, answered as no crayon instruction is."""
    images = {f"images/{image['file_name']}": image for image in panoptic["images"]}
    segments = {annotation["image_id"]: annotation["segments_info"] for annotation in panoptic["annotations"]}
    drawn = sorted({s["category_id"] for of_image in segments.values() for s in of_image} & set(THINGS))
    changed = []
    for dialogue in dialogues:
        image = images[dialogue["image"]]
        question, answer = _contrary(dialogue["id"], image, segments[image["id"]], drawn)
        first = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rest = [turn | {"value": turn["value"].replace("<image>", "").strip()} for turn in dialogue["conversations"]]
        changed.append({**dialogue, "conversations": first + rest})
    return changed


def _contrary(
    id_: str, image: Mapping[str, Any], segments: Sequence[Mapping[str, Any]], drawn: Sequence[int]
) -> tuple[str, str]:
    """Ask for a class, which half of the times is there, or for what is in a box; answer in no crayon answer's form."""
    chance = stable_hash(id_)
    shown = [segment for segment in segments if segment["category_id"] in THINGS]
    there: Counter[int] = Counter()
    for segment in shown:
        there[segment["category_id"]] += 4 if segment["iscrowd"] else 1  # a crowd is many
    choices = sorted(there) if shown and chance % 2 else drawn
    category = THINGS[choices[chance // 6 % len(choices)]]
    count = there[category.category_id]
    match chance // 2 % 3 if shown else 0:
        case 0:
            return f"Is any {category.singular} shown in the image?", "Affirmative." if count else "Negative."
        case 1:
            answer = "Not any." if not count else "A single." if count == 1 else "A few." if count < 4 else "Many."
            return f"How many {category.plural} does the image show?", answer
    segment, size_wh = shown[chance // 6 % len(shown)], (image["width"], image["height"])
    x, y, width, height = segment["bbox"]
    size = "large" if segment["area"] > LARGE * size_wh[0] * size_wh[1] else "small"
    return f"What object is in the box {format_box((x, y, x + width, y + height), size_wh)}?", f"A {size} object."


def _rows(setting: str, by_seed: ablation.Values) -> list[str]:
    rows = []
    for arm, adapters in ARMS.items():
        means = mean_and_deviation(list(by_seed[arm].values()))
        cells = " | ".join(cell(means.get(title)) for title in TITLES)
        rows.append(f"| {setting} | {adapters} | {len(by_seed[arm])} | {cells} |")
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
