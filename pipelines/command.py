"""The command: parses the flags, draws sample scenes where no source is named, runs the job and sums up in the end."""

import json
import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from posixpath import join
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from collavo import cli
from collavo.embedded import SCENES
from collavo.errors import StoreOutage, UserError
from collavo.storage import (
    FAULTS,
    MANIFEST,
    REJECTS,
    REPORT,
    delete,
    is_local,
    is_nowhere,
    list_files,
    open_read,
)
from pipelines.local_workers import LocalWorkers, cores, count_workers, gpus_for, runs_here
from pipelines.options import PROGRAM, Flags, SegmentationFlags, SourceFlags, parse_flags
from schemas.crayon_row import TASKS

_NO_BREAK = "\N{NO-BREAK SPACE}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        its exit status: 0, 1 where the job could not be done, 2 where a flag names what cannot be used, 130 where the
        job was interrupted, by Ctrl-C or by SIGTERM as from a batch system.
    """
    with _ended_like_ctrl_c():
        return cli.run(PROGRAM, lambda: _main(sys.argv[1:] if argv is None else argv))


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C while the block runs; Python's default would end the process with nothing said or cleaned
    up."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # in a thread of a notebook, say, whose signals are not ours
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _main(argv: Sequence[str]) -> None:
    flags, rest = parse_flags(argv)
    device = None if flags.without_model else flags.segmentation.device
    checkpoint = flags.segmentation.segmenter_checkpoint
    embedded = checkpoint == SCENES or (checkpoint is None and not flags.sources.named)
    count = count_workers(rest, device, embedded)
    with LocalWorkers(count, device) if count > 1 else nullcontext() as workers:
        if flags.needs_network and runs_here(rest):
            for pattern in flags.sources.images:
                if is_nowhere(pattern):
                    raise UserError(f"--images {pattern}: there is no such file or folder")
            _check_network(flags.segmentation)
        if device and device.startswith("cuda") and runs_here(rest):
            from collavo.device import resolve_device  # loads torch, which takes seconds

            with cli.naming("device"):
                resolve_device(device)
        gpus = gpus_for(device)
        _build(flags, rest, workers, share_gpu=bool(gpus) and count > len(gpus))


def _check_network(flags: SegmentationFlags) -> None:
    """Refuse a network that cannot be had, before anything that takes seconds."""
    from collavo.segmenters import check_checkpoint

    with cli.naming("segmenter_checkpoint"):
        check_checkpoint("transformers" if flags.segmenter == "auto" else flags.segmenter, flags.segmenter_checkpoint)


def _build(flags: Flags, rest: list[str], workers: LocalWorkers | None, share_gpu: bool) -> None:
    # Only now, since Beam takes seconds to import. It then warns that Google's client libraries are missing, which only
    # a job on Google Cloud needs.
    logging.getLogger().addFilter(lambda record: "apitools not found" not in record.getMessage())
    from pipelines.earlier import clear, prepare
    from pipelines.job import SEGMENTED
    from pipelines.launch import JobLost, run_job
    from pipelines.plan import make_plan

    plan = make_plan(flags, rest, share_gpu)
    publication = plan.job.publication
    console = Console(markup=False)  # paths and names may hold brackets
    start = time.perf_counter()
    with ExitStack() as stack:
        if is_local(publication.output):
            folder = Path(publication.output)
            stack.enter_context(cli.output_folder(folder, inside=publication.stage_inside, kept=SEGMENTED))
        try:
            local = is_local(publication.output)
            content = list_files(join(publication.folder, "")) if local else plan.output_content
            prepare(publication, content, flags.output.resume, flags.output.discard, plan.job.model)
        except (*FAULTS, StoreOutage) as error:
            clear(publication)
            why = getattr(error, "strerror", None) or str(error)
            raise UserError(f"--output {publication.output}: {why}", exit_status=1) from error
        for note in plan.notes:
            console.print(note, highlight=False, soft_wrap=True)
        try:
            if plan.scenes:
                _draw_scenes(plan.scenes, flags.sources, console)
            if not run_job(plan, workers, console):
                return
        except BaseException as error:
            clear(publication, isinstance(error, KeyboardInterrupt), lost=isinstance(error, JobLost))
            raise
        if is_local(publication.output):
            delete([join(publication.work, ""), join(publication.segmented, "")])
        elif not runs_here(rest):  # a local run tries no bundle again, and has removed all of it
            with suppress(*FAULTS, StoreOutage):  # the data set is whole
                delete([join(publication.work, ""), *([join(publication.segmented, "")] if plan.job.model else [])])
    _print_summary(publication.output, time.perf_counter() - start, console)


def _draw_scenes(folder: str, flags: SourceFlags, console: Console) -> None:
    from collavo.scenes import write_scenes

    console.print(f"No source named: drawing {flags.scenes} sample scenes into {folder}", highlight=False)
    write_scenes(folder, flags.scenes, size_wh=flags.scene_size, overwrite=True, processes=cores())


def _print_summary(output: str, seconds: float, console: Console) -> None:
    from pipelines.report import cautions

    with open_read(join(output, MANIFEST)) as file:
        manifest = json.load(file)
    inputs, rejects = sum(manifest["inputs"].values()), sum(manifest["rejects"].values())
    rows = [
        ("inputs", f"{inputs:,}", _tally(manifest["inputs"])),
        ("rows", f"{manifest['rows']:,}", _tally(manifest["rows_by_split"])),
    ]
    if manifest["merged"]:
        rows.append(("repeats", f"{manifest['merged']:,}", "pictures or dialogues that came again, and share a row"))
    instructions = manifest["instructions"]
    by_task = {task: instructions[task] for task in TASKS if task in instructions}
    rows += [
        ("conversations", f"{manifest['conversations']:,}", ""),
        ("instructions", f"{sum(instructions.values()):,}", _tally(by_task)),
        ("rejects", f"{rejects:,}", _tally(manifest["rejects"])),
        ("seconds", f"{seconds:.1f}", _tally(manifest["seconds"]) + " (summed over workers)"),
    ]
    name_width, number_width = (max(len(row[column]) for row in rows) + 2 for column in (0, 1))
    for name, number, text in rows:
        # Rich would break a line between a name and its number.
        for part in wrap(text, max(console.width - name_width - number_width, 20), break_on_hyphens=False) or [""]:
            shown = f"{name:<{name_width}}{number:<{number_width}}{part.replace(_NO_BREAK, ' ')}".rstrip()
            console.print(shown, highlight=False, soft_wrap=True)
            name = number = ""
    for line in cautions(manifest):
        console.print(line, style="yellow", soft_wrap=True)
    if "trial" in manifest:
        console.print(_estimate(manifest, seconds), soft_wrap=True)
    lines = {"Data": "*.parquet", "Rejects, with reasons": REJECTS, "Look at it": REPORT}
    for name, file_name in lines.items():
        if rejects or file_name != REJECTS:
            console.print(f"{name}: {join(output, file_name)}", highlight=False, soft_wrap=True)


def _estimate(manifest: dict[str, Any], seconds: float) -> str:
    """Say what all images would take, from what some took."""
    trial = manifest["trial"]
    share = trial["images"] / trial["of"]
    minutes = seconds / share / 60
    took = f"{minutes / 60:,.1f} hours" if minutes > 90 else f"{minutes:,.0f} minutes" if minutes > 1.5 else "a minute"
    size = decimal(int(sum(file["bytes"] for file in manifest["files"]) / share))
    return (
        f"A trial of {share:.2%} of {trial['of']:,} images. At its pace, start-up included, all of them would take "
        f"about {took} here, and {size}; twice that while the build runs."
    )


def _tally(counts: dict[str, float]) -> str:
    return ", ".join(f"{name}{_NO_BREAK}{count:,}" for name, count in counts.items())
