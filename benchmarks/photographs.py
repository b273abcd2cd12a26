"""Measure what the Crayon Prompt is worth on photographs with classes of their own.

    python benchmarks/photographs.py --folder photographs --camvid DIR [--seeds 0 1 2] [--arms crayons no_queries]

DIR holds CamVid as docs/own-data.md shows it: COCO panoptic files of a train and a val split with eleven classes. The
embedded base gets its default training (preset `tiny`) on the photographs of train and is asked about those of val.
Segments are annotated, in training and in evaluation; there are no dialogues.

crayons       the model as it is
no_queries    the same without the Crayon Prompt

Every photograph of val shows all classes that are counted. So Class2Binary asks about their presence and about things
of COCO that are in no street, as often, and its figure is the mean over both. Prints a table in percent, mean and
standard deviation over seeds, and what is right of each class; finished steps are not repeated.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from studies import built, cell, evaluated, mean_and_deviation, trained

from schemas.categories import COCO_PANOPTIC

ARMS = {"crayons": "both", "no_queries": "none"}
"""The queries of each arm, in the words of `collavo.train`'s flag."""

NOT_IN_A_STREET = (
    "cow", "sheep", "elephant", "bear", "zebra", "giraffe", "frisbee", "snowboard", "surfboard", "fork", "knife",
    "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "pizza", "donut", "cake", "couch",
    "bed", "toilet", "tv", "laptop", "microwave", "oven", "toaster", "sink", "refrigerator", "vase", "scissors",
    "toothbrush",
)  # fmt: skip
"""Things of COCO to ask for in vain. Cars, dogs or chairs of COCO's may well be in a photograph, unlabelled."""

ASKED = ("box_to_class", "counting", "class_to_box")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="data and runs go here")
    parser.add_argument("--camvid", type=Path, required=True, help="panoptic_train.json, panoptic_val.json and folders")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--base", default="tiny", help="a preset of collavo.train, or a base of yours")
    args = parser.parse_args(argv)
    results: dict[str, list[Mapping[str, Any]]] = {}
    for seed in args.seeds:
        for arm in args.arms:
            results.setdefault(arm, []).append(_results(args, arm, seed))
    titles = list(figures(results[args.arms[0]][0]))
    print("\n".join([f"| | seeds | {' | '.join(titles)} |", "|---|" + "---:|" * (1 + len(titles))]))
    for arm, of_seeds in results.items():
        means = mean_and_deviation(list(map(figures, of_seeds)))
        print(f"| {arm} | {len(of_seeds)} | {' | '.join(cell(means[title]) for title in titles)} |")
    for arm, of_seeds in results.items():
        for task in ("box_to_class", "counting"):
            print(f"{arm}, {task}: {', '.join(by_class(of_seeds, task))}")
    return 0


def _results(args: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Return the figures of one run by task, of data that are built and a model that is trained where need be."""
    folder: Path = args.folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    annotations = {name: json.loads((args.camvid / f"panoptic_{name}.json").read_text()) for name in ("train", "val")}
    annotations["more"] = with_more_classes(annotations["val"])
    for name, panoptic in annotations.items():
        (folder / f"{name}.json").write_text(json.dumps(panoptic))
    train, val = (
        ["--coco_masks", args.camvid / f"panoptic_{name}", "--coco_images", args.camvid / name, "--coco_split", split]
        for name, split in {"train": "train", "val": "validation"}.items()
    )
    data = built(folder / "train", "--coco_panoptic", folder / "train.json", *train)
    asked = built(folder / "asked", "--coco_panoptic", folder / "val.json", *val)
    there = built(folder / "there", "--coco_panoptic", folder / "more.json", *val, "--tasks", "class_to_binary")
    flags = ["--preset", args.base, "--queries", ARMS[arm], "--seed", str(seed), "--device", "cpu"]
    run = trained(args.folder / "runs" / f"{arm}-seed-{seed}", data, *flags)
    return {**evaluated(run, there, ["class_to_binary"], "evaluation_there"), **evaluated(run, asked, ASKED)}


def with_more_classes(panoptic: Mapping[str, Any]) -> dict[str, Any]:
    """Return an annotation file whose annotators looked for COCO's things of no street too, and found none."""
    first = 1 + max(category["id"] for category in panoptic["categories"])
    more = [record for record in COCO_PANOPTIC.as_records() if record["name"] in NOT_IN_A_STREET]
    return {**panoptic, "categories": panoptic["categories"] + [r | {"id": first + n} for n, r in enumerate(more)]}


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the percentages of one run by title."""
    present, absent = (results["class_to_binary"][f"correct_{polarity}"] for polarity in ("present", "absent"))
    named, counted = results["box_to_class"], results["counting"]
    shares = {
        "C2B": (present + absent) / 2,
        "of present": present,
        "of absent": absent,
        "B2C": named["correct"],
        "B2C, class mean": named["mean"],
        "Counting": counted["correct"],
        "Class-to-box IoU": results["class_to_box"]["mean_iou"],
    }
    return {title: 100 * share for title, share in shares.items()}


def by_class(of_seeds: Sequence[Mapping[str, Any]], task: str) -> list[str]:
    """Name the classes of a task with their mean percentages over seeds, worst first."""
    of_seed = [results[task]["classes"] for results in of_seeds]
    scores = {name: 100 * float(np.mean([classes[name]["score"] for classes in of_seed])) for name in of_seed[0]}
    return [f"{name} {scores[name]:.1f} ({of_seed[0][name]['questions']})" for name in sorted(scores, key=scores.get)]


if __name__ == "__main__":
    raise SystemExit(main())
