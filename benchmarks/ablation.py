"""The proof: measure what the Crayon Prompt and the two adapters are worth, on drawn scenes that no model has seen.

    python benchmarks/ablation.py --folder ablation [--seeds 0 1 2] [--arms full no_queries ...]

The arms are those of the paper's tables 2 and 3: no queries, semantic queries, semantic and numbering queries; VL-CIT
alone, both kinds of batches with one adapter, with two. The last arm of each table is the same model. `collavo.train`
trains every arm once per seed, from the embedded base and without an object list in any prompt.

A segmenter predicts the segments, in training and in evaluation. The evaluation's questions and true answers come from
the scenes' annotations, so a mistake of the segmenter counts against the model. `map` is a reader who knows only the
predicted map and reads it without a mistake: the best that an arm can get from the Crayon Prompt.

Arms of one seed with the same queries share one Crayon Prompt Tuning, because no adapter takes part in it. An arm
without queries has no such tuning. An arm without crayon batches takes as many dialogue steps as the others.

The folder holds scenes, data, and a run directory per arm and seed. Repeat the command to continue a stopped study; it
does nothing twice. Several commands with different --seeds can share the work. ablation.json, ablation.md and
ablation.png hold the results of all finished runs. To extend a study, add --seeds; another --train_scenes, --cpt_steps
or --cit_steps needs a new folder.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measure import circumstances, source_flags
from studies import cell, mean_and_deviation

from collavo import train
from collavo.dataset import find_files, read_rows
from collavo.evaluation.judge import Judge, box_iou
from collavo.evaluation.questions import DIALOGUE, EVALUATED_TASKS, Question, questions_of
from collavo.evaluation.scores import Answered, judged, summarise
from collavo.inference import Request, load_answerer, picture_of_row
from collavo.instructions.text import find_boxes, format_box, format_object
from collavo.runs import CARD
from collavo.scenes import write_scenes
from collavo.training.checkpoint import list_checkpoints
from pipelines import command as build_command
from schemas.categories import COCO_PANOPTIC
from schemas.crayon_row import CrayonRow, Segment

TRAIN_SEED, EVALUATION_SEED = 20_001, 30_001
"""Seeds of the scenes; neither the embedded models nor the build use them."""

PICTURES_AT_ONCE, QUESTIONS_AT_ONCE = 16, 32
MAX_NEW_TOKENS = dict.fromkeys(EVALUATED_TASKS, 24) | {"class_to_box": 256, DIALOGUE: 16}
"""Eight boxes with their names fit into 256 tokens of the embedded base, which writes digit by digit."""

TRAIN_FLAGS = "--tasks counting box_to_class class_to_binary class_to_box"
"""Lists are neither taught nor asked for."""

STUDY, FIGURES = "study.json", "figures.json"
STUDY_FLAGS = ("train_scenes", "eval_scenes", "cpt_steps", "cit_steps", "batch_size", "crayon_share", "base",
               "train_flags", "questions", "segmenter", "segmenter_checkpoint")  # fmt: skip
"""Flags that must not change within one folder."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to train, in the words of `collavo.train`'s flags."""

    queries: str
    adapters: str


FULL, MAP = "full", "map"
ARMS = {
    "no_queries": Arm("none", "dual"),
    "semantic": Arm("semantic", "dual"),
    "vl_only": Arm("both", "vl_only"),
    "single": Arm("both", "single"),
    FULL: Arm("both", "dual"),
}
TABLES = {
    "Crayon Prompt (paper's table 2)": {
        "no_queries": "no queries",
        "semantic": "semantic",
        FULL: "semantic + numbering",
    },
    "Instruction tuning (paper's table 3)": {
        "vl_only": "VL-CIT only",
        "single": "both, one adapter",
        FULL: "both, dual adapters",
    },
}
"""Arms by table, with the names that they have there; the full model is the last of both."""

JUDGE = Judge(COCO_PANOPTIC)
MEASURES = {
    "class_to_binary": ("C2B", "correct"),
    "box_to_class": ("B2C", "correct"),
    "counting": ("Counting", "correct"),
    "class_to_box": ("Class-to-box IoU", "mean_iou"),
    DIALOGUE: ("Dialogue", "correct"),
}
"""Title of each task, and the figure of `collavo.evaluation.scores` to report."""

SPREAD = ("class_to_binary", "box_to_class")
"""Tasks for which the paper reports the best and the worst classes."""

Figures = Mapping[str, Mapping[str, Any]]
"""Figures of one run by task, as `collavo.evaluation.scores.summarise` returns them."""

Values = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Percentages by arm, seed and title; the map has only seed 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the module's docstring describes it."""
    flags = _parser().parse_args(argv)
    study = Study(flags)
    if not flags.report_only:
        study.run(flags.arms, flags.seeds)
    write_report(flags.output or flags.folder, study.results(), study.facts())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--folder", type=Path, default=Path("ablation"), help="of scenes, data and runs")
    add("--output", type=Path, help="folder of the results (default: --folder)")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help=f"of {', '.join(ARMS)} (default: all)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--train_scenes", type=int, default=3000)
    add("--eval_scenes", type=int, default=240)
    add("--cpt_steps", type=int, default=20, help="of Crayon Prompt Tuning")
    add("--cit_steps", type=int, default=500, help="of instruction tuning with both kinds of batches")
    add("--batch_size", type=int, default=8, help="sequences per step")
    add("--crayon_share", type=float, default=0.5, help="of crayon batches in instruction tuning with both kinds")
    add("--base", default="tiny", help="a preset of collavo.train, or a base of yours")
    add("--train_flags", default=TRAIN_FLAGS, help="further flags of collavo.train, in quotes")
    add("--questions", nargs="+", choices=MEASURES, default=list(MEASURES), help="tasks to ask about (default: all)")
    add("--segmenter", choices=("transformers", "annotations"), default="transformers")
    add("--segmenter_checkpoint", default="scenes", help="default: the embedded network")
    add("--report_only", action="store_true", help="train nothing; report on what is finished")
    return parser


class Study:
    """All runs of a folder."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self._flags = flags
        self._folder: Path = flags.folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._claim()

    def run(self, arms: Sequence[str], seeds: Sequence[int]) -> None:
        """Do what is left to do, one seed after the other, so that first results come early."""
        self._build_data()
        for seed in seeds:
            for arm in arms:
                run = self._run_folder(arm, seed)
                if not (run / CARD).exists():
                    self._train(arm, seed)
                if not (run / FIGURES).exists():
                    self._evaluate(run)

    def results(self) -> dict[str, dict[int, Figures]]:
        """Return the figures of all finished runs and of the map."""
        found: dict[str, dict[int, Figures]] = {}
        for file in sorted(self._folder.glob(f"runs/*-seed-*/{FIGURES}")):
            arm, _, seed = file.parent.name.rpartition("-seed-")
            found.setdefault(arm, {})[int(seed)] = json.loads(file.read_text())
        answers = [answered for maps, questions in self._pairs() for answered in answers_of_map(maps, questions)]
        return {MAP: {0: summarise(answers)}, **found}

    def facts(self) -> dict[str, Any]:
        """Return what the figures depend on."""
        asked = [question.task for _, questions in self._pairs() for question in questions]
        return {
            "study": json.loads((self._folder / STUDY).read_text()),
            "questions": {task: asked.count(task) for task in self._flags.questions},
            **circumstances(),
            "versions": {name: version(name) for name in ("collavo", "torch", "transformers", "peft", "bitsandbytes")},
        }

    def _claim(self) -> None:
        """Record the study's flags, or check that they are those of the study in the folder."""
        asked = {name: getattr(self._flags, name) for name in STUDY_FLAGS}
        file = self._folder / STUDY
        if not file.exists():
            file.write_text(json.dumps(asked, indent=2) + "\n")
        for name, value in json.loads(file.read_text()).items():
            if value != asked[name]:
                raise SystemExit(
                    f"ablation.py: error: --{name} is {asked[name]}, but the study in {self._folder} has {value}; "
                    "go on with that, or name another --folder"
                )

    def _build_data(self) -> None:
        """Draw scenes and build three data sets: for training, for the questions, and for the maps shown with them."""
        flags = self._flags
        segmenter = ["--segmenter", flags.segmenter]
        if flags.segmenter != "annotations":
            segmenter += ["--segmenter_checkpoint", flags.segmenter_checkpoint]
        training = self._scenes("train", flags.train_scenes, TRAIN_SEED)
        evaluation = self._scenes("evaluation", flags.eval_scenes, EVALUATION_SEED)
        asked = ["--tasks", *(task for task in flags.questions if task != DIALOGUE)]
        self._build("train", training, *segmenter)
        self._build("maps", evaluation, *segmenter)
        self._build("truth", evaluation, "--segmenter", "annotations", *asked)

    def _scenes(self, name: str, count: int, seed: int) -> Path:
        folder = self._folder / "scenes" / name
        if not (folder / "panoptic.json").exists():
            self._log(f"drawing {count} scenes into {folder}")
            write_scenes(folder, count, (320, 240), seed, overwrite=True)
        return folder

    def _build(self, name: str, scenes: Path, *flags: str) -> None:
        output = self._folder / "data" / name
        if list(output.glob("*.parquet")):
            return
        self._log(f"building {output}")
        if status := build_command.main([*source_flags(scenes), *flags, "--output", str(output)]):
            raise SystemExit(status)

    def _pairs(self) -> Iterator[tuple[CrayonRow, list[Question]]]:
        """Yield rows with predicted maps, each with the questions that come from its image's annotation."""
        truth = {row.image_id: row for row in self._rows("truth")}
        for row in self._rows("maps"):
            if questions := questions_of(truth[row.image_id], self._flags.questions, JUDGE):
                yield row, questions

    def _rows(self, name: str) -> Iterator[CrayonRow]:
        return read_rows(find_files([str(self._folder / "data" / name)]))

    def _run_folder(self, arm: str, seed: int) -> Path:
        return self._folder / "runs" / f"{arm}-seed-{seed}"

    def _train(self, name: str, seed: int) -> None:
        arm, run = ARMS[name], self._run_folder(name, seed)
        if not list_checkpoints(run):
            shutil.rmtree(run, ignore_errors=True)
            if arm.queries != "none":
                tuned, copied = self._tuned_prompt(arm, seed), run.with_name(f".{run.name}")
                shutil.rmtree(copied, ignore_errors=True)
                shutil.copytree(tuned, copied, ignore=shutil.ignore_patterns(CARD, "checkpoints"))
                copied.rename(run)
        steps, share = self._flags.cit_steps, self._flags.crayon_share
        if arm.adapters == "vl_only":
            self._collavo_train(run, arm, seed, "cit", round(steps * (1 - share)))
        else:
            self._collavo_train(run, arm, seed, "cit", steps, "--crayon_share", str(share))

    def _tuned_prompt(self, arm: Arm, seed: int) -> Path:
        """Return the run directory of the Crayon Prompt Tuning that arms with these queries share."""
        run = self._folder / "cpt" / f"{arm.queries}-seed-{seed}"
        if not (run / CARD).exists():
            self._collavo_train(run, arm, seed, "cpt", self._flags.cpt_steps)
        return run

    def _collavo_train(self, run: Path, arm: Arm, seed: int, phase: str, steps: int, *more: str) -> None:
        """Train, or continue, with the public command; its output goes to a log beside the run directory."""
        flags = self._flags
        sequences_per_epoch = flags.train_scenes  # at least, for every scene has instructions and a dialogue
        argv = [
            *("--data", str(self._folder / "data" / "train"), "--preset", flags.base, "--output_dir", str(run)),
            *("--phase", phase, "--queries", arm.queries, "--adapters", arm.adapters, "--seed", str(seed)),
            *("--batch_size", str(flags.batch_size), "--max_steps", str(steps), "--object_list", "none"),
            *("--epochs", str(1 + steps * flags.batch_size // sequences_per_epoch), "--device", "cpu"),
            *("--checkpoint_steps", "100", "--keep_checkpoints", "1"),
            *more,
            *flags.train_flags.split(),
        ]
        if list_checkpoints(run):
            argv.append("--resume")
        elif phase == "cpt":
            argv.append("--overwrite")
        self._log(f"training {run}: python -m collavo.train {' '.join(argv)}")
        run.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with run.with_name(f"{run.name}.log").open("a") as log, redirect_stdout(log):
            status = train.main(argv)
        if status:
            raise SystemExit(status)
        self._log(f"trained {run} in {time.perf_counter() - start:.0f} s")

    def _evaluate(self, run: Path) -> None:
        start = time.perf_counter()
        figures = summarise(answers_of_model(run, list(self._pairs())))
        (run / "answers.part").write_text(json.dumps(figures, indent=2) + "\n")
        (run / "answers.part").rename(run / FIGURES)
        told = ", ".join(f"{title} {value:.1f}" for title, value in percentages(figures).items())
        self._log(f"evaluated {run} in {time.perf_counter() - start:.0f} s: {told}")

    def _log(self, line: str) -> None:
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}"
        print(line, flush=True)
        with (self._folder / "ablation.log").open("a") as file:
            file.write(f"{line}\n")


def answers_of_model(run: Path, pairs: Sequence[tuple[CrayonRow, Sequence[Question]]]) -> list[Answered]:
    """Ask a trained model about images with their maps, and judge its answers."""
    answerer = load_answerer(str(run), torch.device("cpu"))
    answers: list[Answered] = []
    for start in range(0, len(pairs), PICTURES_AT_ONCE):
        some = pairs[start : start + PICTURES_AT_ONCE]
        pictures = [picture_of_row(row, None) for row, _ in some]
        asked = [(number, question) for number, (_, questions) in enumerate(some) for question in questions]
        requests = [Request(number, q.turns, None, MAX_NEW_TOKENS[q.task]) for number, q in asked]
        texts = answerer.answer(pictures, requests, QUESTIONS_AT_ONCE)
        answers += [judged(question, text, JUDGE) for (_, question), text in zip(asked, texts, strict=True)]
    return answers


def answers_of_map(row: CrayonRow, questions: Sequence[Question]) -> Iterator[Answered]:
    """Answer questions from a row's own segments, and judge the answers; a map answers no dialogue."""
    size_wh = (row.width, row.height)
    for question in questions:
        if question.task == DIALOGUE or (question.category is None and question.task != "box_to_class"):
            continue
        label = COCO_PANOPTIC.by_display_name[question.category].label if question.category else None
        same = [segment for segment in row.segments if segment.label == label]
        match question.task:
            case "class_to_binary":
                text = "Yes." if same else "No."
            case "counting":
                text = f"{len(same)}."
            case "class_to_box":
                text = ", ".join(format_box(segment.box_xyxy, size_wh) for segment in same) or "None."
            case _:
                (box,) = find_boxes(question.turns[0][1])
                text = _object_at(box, row.segments, size_wh)
        yield judged(question, text, JUDGE)


def _object_at(box: tuple[float, float, float, float], segments: Sequence[Segment], size_wh: tuple[int, int]) -> str:
    """Return the thing whose box overlaps a box most."""
    scale = np.array([*size_wh, *size_wh])
    things = [segment for segment in segments if segment.is_thing]
    overlaps = [box_iou(box, tuple(np.array(segment.box_xyxy) / scale)) for segment in things]
    return format_object(things[int(np.argmax(overlaps))]) if overlaps else ""


def write_report(folder: Path, results: Mapping[str, Mapping[int, Figures]], facts: Mapping[str, Any]) -> None:
    """Write ablation.json, ablation.md and ablation.png."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {arm: {seed: percentages(f) for seed, f in of_arm.items()} for arm, of_arm in results.items()}
    figures = {arm: mean_and_deviation(list(of_arm.values())) for arm, of_arm in values.items()}
    content = {**facts, "figures": figures, "by_seed": values}
    (folder / "ablation.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "ablation.md").write_text(markdown(values))
    plot(values).savefig(folder / "ablation.png", dpi=150)
    print(markdown(values))


def percentages(figures: Figures) -> dict[str, float]:
    """Return the tables' figures of a run by title, without those that were not asked."""
    found = {title: figures[task].get(key) for task, (title, key) in MEASURES.items() if task in figures}
    for task in SPREAD:
        of_task = figures.get(task, {})
        if "top_20" in of_task:
            found[f"{MEASURES[task][0]} top - bottom 20"] = of_task["top_20"] - of_task["bottom_20"]
    return {title: 100 * value for title, value in found.items() if value is not None}


def markdown(values: Values) -> str:
    """Return the two tables: mean and standard deviation over seeds in percent."""
    titles = [title for title, _ in MEASURES.values()]
    titles += [f"{MEASURES[task][0]} top - bottom 20" for task in SPREAD]
    lines = []
    for table, arms in TABLES.items():
        lines += [f"| {table} | seeds | {' | '.join(titles)} |", "|---|" + "---:|" * (1 + len(titles))]
        for arm, name in {**arms, MAP: "*the predicted map, read without a mistake*"}.items():
            if arm in values:
                figures = mean_and_deviation(list(values[arm].values()))
                cells = [cell(figures.get(title)) for title in titles]
                lines.append(f"| {name} | {'' if arm == MAP else len(values[arm])} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(values: Values) -> Figure:
    """Draw a panel per table and measure: a point per seed, a bar at the mean, a dashed line for the map."""
    titles = [title for title, _ in MEASURES.values()]
    figure = Figure(figsize=(2.5 * len(titles), 6.4), layout="constrained")
    panels = figure.subplots(len(TABLES), len(titles), sharey="col", squeeze=False)
    for row, (table, arms) in zip(panels, TABLES.items(), strict=True):
        for axes, title in zip(row, titles, strict=True):
            _panel(axes, title, arms, values)
        row[0].set_ylabel(f"{table}\n\n%", fontsize=9)
    for axes, title in zip(panels[0], titles, strict=True):
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 0))
        axes.set_title(title, fontsize=11, fontweight="bold", loc="left")
    figure.supxlabel(
        "A point is a seed, a bar the mean of an arm; dashed: the predicted map itself, read without a mistake.",
        fontsize=9,
        color=_GREY,
    )
    return figure


_GREY, _BLUE, _ORANGE = "#7a828c", "#8fa8c4", "#d1603d"


def _panel(axes: Axes, title: str, arms: Mapping[str, str], values: Values) -> None:
    for x, arm in enumerate(arms):
        points = [of_seed[title] for of_seed in values.get(arm, {}).values() if title in of_seed]
        color = _ORANGE if arm == FULL else _BLUE
        if points:
            mean = float(np.mean(points))
            axes.hlines(mean, x - 0.3, x + 0.3, color=color, linewidth=3)
            spots = x + 0.09 * (np.arange(len(points)) - (len(points) - 1) / 2)
            axes.scatter(spots, points, s=26, color=color, edgecolor="white", linewidth=0.8, zorder=3)
            axes.annotate(
                f"{mean:.1f}",
                (x, max(points)),
                (0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},  # over the line of the map
            )
    if title in (limit := values.get(MAP, {}).get(0, {})):
        axes.axhline(limit[title], color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    labels = [name.replace(" + ", " +\n").replace(", ", ",\n") for name in arms.values()]
    axes.set_xticks(range(len(arms)), labels, fontsize=7.5, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(arms) - 0.4)
    axes.margins(y=0.18)
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


if __name__ == "__main__":
    raise SystemExit(main())
