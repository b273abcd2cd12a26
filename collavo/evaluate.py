"""Evaluate a CoLLaVO model: `python -m collavo.evaluate --model runs/collavo --data out/*.parquet`.

Reads:    a run directory or a whole model, and Parquet files that pipelines/build_crayon.py wrote
Writes:   evaluation.json and evaluation.png
Not here: what is asked, how it is answered and judged, see collavo/evaluation
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from collavo.cli import Parser
from collavo.dataset import find_files
from collavo.device import device_name, resolve_device
from collavo.errors import UserError
from collavo.evaluation.questions import DIALOGUE, EVALUATED_TASKS, Question, questions_of, rows_of_split
from collavo.evaluation.report import REPORT, Results, save_report, terminal_report
from collavo.evaluation.scores import Answered, judged, summarise
from collavo.inference import Answerer, Request, load_answerer
from collavo.pictures import Picture, picture_of_row
from collavo.training.row_index import Kind
from schemas.crayon_row import SPLITS

_DESCRIPTION = """\
Ask a model the questions of a data set and judge its answers.

tasks:
  class_to_binary  is there any (class)?         accuracy, F1, precision,
                                                 recall, share of yes
  box_to_class     which object is in this box?  accuracy, and with the number
  counting         how many of a class?          accuracy, mean error
  class_to_box     where is each of a class?     mean IoU, boxes in pairs
  dialogue         short answers of dialogues    accuracy, each turn after the
                                                 true ones before it
All but the last also per thing class, with the mean over the classes, the 20
best and the 20 worst."""

_EPILOG = """\
The questions are those that the rows hold, so a data set built with more
--max_instructions or another --negative_ratio makes another test. Answers that
cannot be read are wrong, and counted.

examples:
  python -m collavo.evaluate --model runs/collavo --data out/*.parquet
  python -m collavo.evaluate --model runs/collavo --data coco/*.parquet \\
      --object_list both --tasks class_to_binary
"""

_MAX_NEW_TOKENS = {"class_to_binary": 32, "box_to_class": 32, "counting": 32, "class_to_box": 700, DIALOGUE: 32}
"""Twenty boxes with their names fit into 700 tokens, digit by digit."""

_CONDITIONS = {"trained": ("trained",), "none": ("none",), "with": ("with",), "both": ("none", "with")}
"""Under which object lists each value of --object_list asks everything."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 for what it was given."""
    flags = _build_parser().parse_args(argv)
    console = Console()
    try:
        _check(flags)
        files = find_files(flags.data)
        device = resolve_device(flags.device)
        answerer = load_answerer(flags.model, device, flags.quantize, flags.beams)
        start = time.perf_counter()
        answers = _evaluate(answerer, flags, files)
        seconds = time.perf_counter() - start
    except UserError as error:
        print(f"collavo.evaluate: error: {error}", file=sys.stderr)
        return 2
    results: Results = {condition: summarise(of_condition) for condition, of_condition in answers.items()}
    questions = sum(map(len, answers.values()))
    facts = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(flags).items()},
        "device": device_name(device),
        "seconds": round(seconds, 1),
        "questions_per_s": round(questions / seconds, 2),
        "versions": {name: version(name) for name in ("collavo", "torch", "transformers", "peft", "bitsandbytes")},
    }
    folder = flags.output or Path(flags.model) / "evaluation"
    save_report(folder, results, facts)
    console.print(terminal_report(results), highlight=False)
    told = f"{questions:,} questions, {questions / seconds:.1f} a second. Evaluated: {folder / REPORT}"
    console.print(told, highlight=False, soft_wrap=True)
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m collavo.evaluate",
        usage="python -m collavo.evaluate --model RUN --data PARQUET [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--model", metavar="RUN", required=True, help="a run directory, or a whole model: folder or hub id")
    add("--data", metavar="PARQUET", nargs="+", required=True, help="crayon files, or folders of them")
    add("--image_root", metavar="DIR", type=Path, help="where rows that refer to their image find it")
    add("--split", choices=SPLITS, default="validation", help="rows to ask about (default: validation)")
    add("--tasks", metavar="TASK", nargs="+", choices=EVALUATED_TASKS, default=list(EVALUATED_TASKS),
        help=f"of {', '.join(EVALUATED_TASKS)} (default: all)")  # fmt: skip
    add("--object_list", choices=_CONDITIONS, default="trained",
        help="prompts that begin with the recognised objects: as the model was trained, none of them, all of them, or "
        "both (default: trained)")  # fmt: skip
    add("--max_images", metavar="N", type=int, help="ask about the first N images of the split only")
    add("--output", metavar="DIR", type=Path, help="where the report goes (default: RUN/evaluation)")
    add("--beams", type=int, choices=(1, 3), default=1, help="1 for greedy decoding, 3 as in the paper (default: 1)")
    add("--batch_size", metavar="N", type=int, default=16, help="questions answered together (default: 16)")
    add("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--quantize", action=argparse.BooleanOptionalAction, default=None,
        help="NF4 for the language model (default: as it was trained)")  # fmt: skip
    return parser


def _check(flags: argparse.Namespace) -> None:
    for name in ("max_images", "batch_size"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}, but must be at least 1")
    if flags.output is None and not Path(flags.model).is_dir():
        raise UserError(f"--model {flags.model} is no folder here; --output must name one for the report")


def _evaluate(answerer: Answerer, flags: argparse.Namespace, files: Sequence[Path]) -> dict[str, list[Answered]]:
    """All answers, judged, by condition.

    Raises:
        UserError: if there is nothing to ask.
    """
    answers: dict[str, list[Answered]] = {condition: [] for condition in _CONDITIONS[flags.object_list]}
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TextColumn("questions"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("Asked", total=None)
        for pictures, questions in _groups(flags, files):
            for condition, of_condition in answers.items():
                requests = [
                    Request(
                        number,
                        question.turns,
                        pictures[number].objects if answerer.lists_objects(_kind(question), condition) else None,
                        _MAX_NEW_TOKENS[question.task],
                    )
                    for number, question in questions
                ]
                texts = answerer.answer(pictures, requests, flags.batch_size)
                of_condition += [judged(question, text) for (_, question), text in zip(questions, texts, strict=True)]
                progress.advance(bar, len(texts))
    if not any(answers.values()):
        raise UserError(f"--tasks {' '.join(flags.tasks)}: the rows of --split {flags.split} ask nothing of it")
    return answers


def _groups(
    flags: argparse.Namespace, files: Sequence[Path]
) -> Iterator[tuple[list[Picture], list[tuple[int, Question]]]]:
    """Pictures with all of their questions, by the picture's number, as many as fill a batch."""
    pictures: list[Picture] = []
    questions: list[tuple[int, Question]] = []
    for row in islice(rows_of_split(files, flags.split), flags.max_images):
        if asked := questions_of(row, flags.tasks):
            questions += [(len(pictures), question) for question in asked]
            pictures.append(picture_of_row(row, flags.image_root))
        if len(questions) >= flags.batch_size:
            yield pictures, questions
            pictures, questions = [], []
    if questions:
        yield pictures, questions


def _kind(question: Question) -> Kind:
    return "dialogue" if question.task == DIALOGUE else "crayon"


if __name__ == "__main__":
    raise SystemExit(main())
