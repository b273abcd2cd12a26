"""Teach a segmenter the classes of crayon rows: `collavo train-segmenter --data out/*.parquet`.

Reads:    Parquet files that pipelines/build_crayon.py wrote, and a network to start from
Writes:   a folder that `--segmenter_checkpoint` takes
Not here: examples, losses and steps, in collavo/segmenter_training; how maps compare, in collavo/panoptic/quality.py
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from collavo.cli import REQUIRED, flag, naming, on_disk, output_folder, parse, run
from collavo.embedded import SCENES
from collavo.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from collavo.segmenter_training.finetuning import SegmentedRows

_DESCRIPTION = """\
Fine-tune a segmentation network of transformers on the maps of crayon rows, and
judge it on their validation rows. The classes are those of the rows; a class
that the network knows by its name keeps what it knows.

The folder that it writes is a checkpoint like others: --segmenter_checkpoint
of the build and of chat takes it."""

_EPILOG = """\
A stopped training goes on where it was if the same command is repeated,
without --overwrite.

examples:
  collavo train-segmenter --data road/data/*.parquet --output_dir road/segmenter
  collavo train-segmenter --data road/data/*.parquet --evaluate_only \\
      --segmenter_checkpoint tue-mps/coco_panoptic_eomt_large_640
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The command line."""

    data: tuple[str, ...] = flag(REQUIRED, "crayon files, or folders of them", many=True, metavar="PARQUET")
    image_root: str | None = flag(None, "folder of the images, if the rows only refer to them", metavar="DIR")
    segmenter_checkpoint: str = flag(SCENES, "network to start from, or to judge: hub id, folder, or scenes for the "
        "embedded one", metavar="ID_OR_PATH")  # fmt: skip
    output_dir: str = flag("runs/segmenter", "where the trained network goes", kind=on_disk, metavar="DIR")
    overwrite: bool = flag(False, "replace what is there, and begin anew where a training was stopped")
    evaluate_only: bool = flag(False, "judge the network on the validation rows, and train nothing")
    max_images: int | None = flag(None, "judge on the first N validation rows only", kind=int, least=1)
    steps: int = flag(600, "updates of the weights", least=1, group="training")
    batch_size: int = flag(8, "pictures per update", least=1)
    learning_rate: float | None = flag(None, "at its peak (default: 5e-4 for scenes, else 1e-4)", kind=float)
    checkpoint_steps: int = flag(100, "updates between checkpoints", least=1)
    seed: int = flag(0, "of order and augmentation", least=0)
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    usage = "collavo train-segmenter --data PARQUET [options]"
    options = {"prog": "collavo train-segmenter", "usage": usage, "description": _DESCRIPTION, "epilog": _EPILOG}
    return run("collavo train-segmenter", lambda: _command(parse(Flags, argv, **options)))


def _command(flags: Flags) -> None:
    # These take seconds to import, so the flags are parsed first.
    from rich.console import Console

    from collavo.dataset import category_set, check_repeats, find_files, notes
    from collavo.device import memory_named
    from collavo.segmenter_training.finetuning import SegmentedRows
    from collavo.segmenter_training.judging import judge, open_for, table

    root = Path(flags.image_root) if flags.image_root else None
    with naming("data"):
        files = find_files(flags.data)
        check_repeats(files)
        categories = category_set(files)
        training, validation = (
            SegmentedRows.of_split(files, split, categories, root) for split in ("train", "validation")
        )
        if not validation.places:
            raise UserError(
                "no validation row has segments, so nothing can be judged; build with --validation_ratio or "
                "--coco_split"
            )
        if not training.places and not flags.evaluate_only:
            raise UserError("no train row has segments other than crowds, so there is nothing to learn from")
    console = Console(highlight=False, markup=False)
    for note in notes(files):
        console.print(note, soft_wrap=True)
    counts = f"{len(training.places):,} rows to learn from, {len(validation.places):,} to judge on"
    console.print(f"{len(categories)} classes of {categories.name}; {counts}", soft_wrap=True)
    if flags.evaluate_only:
        with naming("segmenter_checkpoint"):
            segmenter = open_for(flags.segmenter_checkpoint, categories, flags.device)
        with memory_named("--device cpu", "judging"), naming("data"):
            judged = judge(segmenter, validation, flags.max_images, training if training.places else None)
        console.print("\n".join(table(judged)), soft_wrap=True)
    else:
        _train(flags, files, training, validation, console)
    for line in (*training.left_out.lines(), *validation.left_out.lines()):
        console.print(f"left out: {line}", soft_wrap=True)


def _train(
    flags: Flags, files: Sequence[str], training: "SegmentedRows", validation: "SegmentedRows", console: "Console"
) -> None:
    """Train, judge, and put the folder in its place."""
    import shutil

    import torch

    from collavo.device import memory_named, move_to_device, resolve_device
    from collavo.folders import staging_of, writing
    from collavo.progress import Progress
    from collavo.segmenter_training.finetuning import Learner, Steps, network_for, take_steps
    from collavo.segmenter_training.judging import judge, open_for, table
    from collavo.segmenter_training.saving import choose_preset, save_network, write_card
    from collavo.segmenters.universal import open_network
    from collavo.training import checkpoint
    from collavo.training.record import footer_sha256

    with naming("device"):
        device = resolve_device(flags.device)
    output = Path(flags.output_dir)
    begun = checkpoint.list_checkpoints(staging_of(output))  # to replace what is there, as was said then
    if output.is_dir() and any(output.iterdir()) and not (flags.overwrite or begun):
        raise UserError(f"--output_dir {output} is there already; name another, or --overwrite it")
    with naming("segmenter_checkpoint"):
        base = open_network(flags.segmenter_checkpoint, known_set=training.categories)
    rate = flags.learning_rate or (5e-4 if flags.segmenter_checkpoint == SCENES else 1e-4)
    options = Steps(flags.steps, flags.batch_size, rate, flags.seed, flags.checkpoint_steps)
    learned_from = {
        "arguments": {
            **{name: getattr(flags, name) for name in ("segmenter_checkpoint", "steps", "batch_size", "seed")},
            "learning_rate": rate,
        },
        "data": [[file, footer_sha256(file)] for file in files],
    }
    torch.manual_seed(flags.seed)  # for the weights of classes that the base does not know
    model = network_for(base.model, base.categories, training.categories)
    move_to_device(model, device)
    learner = Learner(model, base.framing, base.task)
    with output_folder(output, "output_dir", kept="checkpoints") as staging:
        if flags.overwrite:
            shutil.rmtree(staging / "checkpoints", ignore_errors=True)
        with Progress(console) as progress, memory_named("a smaller --batch_size"):
            bar = progress.add("Training", flags.steps)
            done = take_steps(
                learner,
                training,
                base.framing,
                options,
                staging,
                learned_from,
                lambda step, loss: progress.update(bar, step, note=f"loss {loss:.2f}"),
                partial(naming, "data"),
            )
        again = f"the same command{' without --overwrite' * flags.overwrite}"
        if done < flags.steps:
            raise UserError(f"stopped after {done} of {flags.steps} steps; {again} goes on from there", 130)
        with writing(output), memory_named(f"{again}, on --device cpu, which judges only", "judging"):
            save_network(staging, model, base, training)
            choose_preset(staging, training, flags.device)
            segmenter = open_for(str(staging), validation.categories, flags.device)
            judged = judge(segmenter, validation, flags.max_images, training)
            write_card(staging, output.name, flags.segmenter_checkpoint, base, judged, options, files)
            shutil.rmtree(staging / "checkpoints")
    console.print("\n".join(table(judged)), soft_wrap=True)
    console.print(f"Trained: {output}; use it with --segmenter_checkpoint {output}", soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
