"""Evaluate a CoLLaVO model: `python -m collavo.evaluate --model runs/collavo --data out/*.parquet`.

Reads:    a run directory or a whole model, and Parquet files that pipelines/build_crayon.py wrote
Writes:   evaluation.json and evaluation.png
Not here: what is asked and how answers are judged, see collavo/evaluation; how they are made, see collavo/inference.py
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from collavo.cli import REQUIRED, flag, naming, parse, run
from collavo.errors import LeftOut, UserError
from collavo.evaluation.questions import EVALUATED_TASKS
from collavo.folders import make_folder
from schemas.crayon_row import SPLITS

_DESCRIPTION = """\
Ask a model the questions of a data set and judge its answers.

tasks:
  class_to_binary  is there any (class)?         accuracy, F1, precision,
                                                 recall, share of yes
  box_to_class     which object is in this box?  accuracy, and with the number
  counting         how many of a class?          accuracy, mean error
  class_to_box     where is each of a class?     mean IoU, boxes in pairs,
                                                 beside what cell lines and
                                                 two decimals can reach
  dialogue         short answers of dialogues    accuracy, each turn after the
                                                 true ones before it
All but the last also per thing class, with the mean over the classes, the 20
best and the 20 worst."""

_EPILOG = """\
The questions are those of the rows: a data set built with more
--max_instructions or another --negative_ratio makes another test. Answers that
cannot be read are wrong, and counted.

several GPUs:
  torchrun --nproc_per_node N -m collavo.evaluate --model RUN --data PARQUET

examples:
  python -m collavo.evaluate --model runs/collavo --data out/*.parquet
  python -m collavo.evaluate --model runs/collavo --data coco/*.parquet \\
      --object_list both --tasks class_to_binary
"""

_OBJECT_LISTS = {"trained": ("trained",), "none": ("none",), "with": ("with",), "both": ("none", "with")}
"""The object lists under which each value of --object_list asks everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The command line."""

    model: str = flag(REQUIRED, "a run directory, or a whole model: folder or hub id", metavar="RUN")
    data: tuple[str, ...] = flag(REQUIRED, "crayon files, or folders of them", many=True, metavar="PARQUET")
    image_root: Path | None = flag(None, "folder of the images, if the rows only refer to them", kind=Path,
        metavar="DIR")  # fmt: skip
    split: str = flag("validation", "rows to ask about", choices=SPLITS)
    tasks: tuple[str, ...] = flag(EVALUATED_TASKS, f"of {', '.join(EVALUATED_TASKS)} (default: all)", many=True,
        choices=EVALUATED_TASKS, metavar="TASK")  # fmt: skip
    object_list: str = flag("trained", "prompts that begin with the recognised objects: as in training (trained), none "
        "of them, all of them (with), or both, one after the other", choices=_OBJECT_LISTS)  # fmt: skip
    max_images: int | None = flag(None, "ask about the first N images of the split only", kind=int, least=1)
    output: Path | None = flag(None, "where the report goes (default: RUN/evaluation)", kind=Path, metavar="DIR")
    beams: int = flag(1, "beams of the search; 1 for greedy decoding, 3 are the paper's", least=1)
    batch_size: int = flag(16, "questions answered together", least=1)
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    quantize: bool | None = flag(None, "NF4 for the language model (default: as it was trained)", kind=bool)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    usage = "python -m collavo.evaluate --model RUN --data PARQUET [options]"
    options = {"prog": "python -m collavo.evaluate", "usage": usage, "description": _DESCRIPTION, "epilog": _EPILOG}
    return run("collavo.evaluate", lambda: _evaluate(parse(Flags, argv, **options)))


def _evaluate(flags: Flags) -> None:
    from importlib.metadata import version

    from rich.console import Console

    from collavo.dataset import category_set, count_rows, find_files, notes, read_rows
    from collavo.device import device_name, join_ranks, limit_threads, memory_named
    from collavo.evaluation.asking import ask_questions, kind_of, unknown_classes
    from collavo.evaluation.judge import Judge
    from collavo.evaluation.report import REPORT, save_report, terminal_report
    from collavo.evaluation.scores import summarise
    from collavo.inference import load_answerer
    from collavo.progress import Progress
    from collavo.runs import steps_taken

    with naming("device"):
        device, rank, ranks = join_ranks(flags.device)
    console = Console(highlight=False, markup=False, quiet=rank > 0)
    with naming("data"):
        files = find_files(flags.data)
        judge = Judge(category_set(files))
        images = count_rows(files, flags.split)
    for note in notes(files):
        console.print(note, soft_wrap=True)
    if not images:
        raise UserError(f"--split {flags.split}: none of the {count_rows(files)} rows of --data is in it")
    damaged_rows, left_out = LeftOut(), LeftOut()
    folder = _report_folder(flags)
    try:
        with naming("model"):
            answerer = load_answerer(flags.model, device, flags.quantize, flags.beams)
    except UserError:
        with suppress(OSError):  # only an empty folder can be removed
            folder.rmdir()
        raise
    if device.type == "cpu":
        limit_threads(answerer.model)
    object_lists = _OBJECT_LISTS[flags.object_list]
    if line := unknown_classes(answerer, judge.categories):
        console.print(f"--data: {line}", soft_wrap=True)
    for object_list in object_lists:
        if line := answerer.untrained({task: kind_of(task) for task in flags.tasks}, object_list):
            console.print(f"--object_list {flags.object_list}: {line}", soft_wrap=True)

    start = time.perf_counter()
    asked = min(images, flags.max_images or images)
    first, last = asked * rank // ranks, asked * (rank + 1) // ranks
    helpful = f"--batch_size below {flags.batch_size}, fewer --beams, or --quantize"
    with (
        Progress(Console(stderr=True, quiet=rank > 0), transient=True) as progress,
        memory_named(helpful),
        naming("data"),
    ):
        chosen = islice(read_rows(files, flags.split, damaged_rows), first, last)
        rows = progress.track(chosen, "Evaluating images", last - first)
        answers = ask_questions(
            answerer, rows, flags.tasks, object_lists, judge, flags.image_root, flags.batch_size, left_out
        )
    if ranks > 1:
        from accelerate.utils import gather_object

        # In the order of the rows, so that the report is that of one process.
        shares = gather_object([(answers, damaged_rows, left_out)])
        if rank:
            return
        answers = {name: [one for share, *_ in shares for one in share[name]] for name in object_lists}
        damaged_rows = shares[-1][1]  # the last rank has read all rows, the others only those before their last one
        left_out = LeftOut()
        for *_, of_share in shares:
            left_out.merge(of_share)
    left_out.merge(damaged_rows)
    for line in left_out.lines():
        console.print(f"left out: {line}", soft_wrap=True)
    seconds = time.perf_counter() - start
    questions = sum(map(len, answers.values()))
    if not questions:
        raise UserError(f"--tasks {' '.join(flags.tasks)}: the rows of --split {flags.split} ask nothing of it")
    results = {object_list: summarise(judged, answerer.processor.grid_hw) for object_list, judged in answers.items()}
    facts = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(flags).items()},
        "device": device_name(device),
        "steps": steps_taken(Path(flags.model)),
        "left_out": dict(left_out.counts),
        "seconds": round(seconds, 1),
        "questions_per_s": round(questions / seconds, 2),
        "versions": {name: version(name) for name in ("collavo", "torch", "transformers", "peft", "bitsandbytes")},
    }
    earlier = ", in place of an earlier report" if (folder / REPORT).exists() else ""
    save_report(folder, results, facts)
    console.print(terminal_report(results))
    said = f"{questions:,} questions, {questions / seconds:.1f} a second. Evaluated: {folder / REPORT}{earlier}"
    console.print(said, soft_wrap=True)


def _report_folder(flags: Flags) -> Path:
    """Make the report's folder before any question is asked, so that a bad place does not cost an evaluation."""
    if flags.output is None and not Path(flags.model).is_dir():
        raise UserError(
            f"--model {flags.model}: there is no such folder; for a model of the hub, --output must name the report's"
        )
    folder = flags.output or Path(flags.model) / "evaluation"
    with naming("output"):
        make_folder(folder)  # by every rank, for each may start first
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
