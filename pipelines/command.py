"""Runs the build: draws sample scenes where no source is named, shows progress, and sums up in the end."""

import fcntl
import io
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from posixpath import join
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import DirectOptions, StandardOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import SubprocessSDKEnvironment
from rich.console import Console
from rich.table import Table

from collavo.errors import UserError
from collavo.storage import MANIFEST, REJECTS, REPORT, is_local, open_read
from pipelines.graph import build_graph
from pipelines.options import Command, parse_command
from pipelines.progress import ProgressDisplay
from pipelines.publish import remove_staging
from schemas.crayon_row import TASKS

# Exceptions whose message is one line for the user. By name: those of another process arrive as text.
_USER_ERROR = re.compile(r"\bUserError: ([^\n]+)")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 1 where the job could not be done, 2 where a flag turned out to name
    what cannot be used, 130 where the job was interrupted; usage errors exit with 2 before anything is done."""
    command = parse_command(sys.argv[1:] if argv is None else argv)
    output = command.job.publication.output
    console = Console()
    start = time.perf_counter()
    try:
        with _sole_writer(output):
            if command.scenes:
                _draw_scenes(command, console)
            _run(command, console)
    except (Exception, KeyboardInterrupt) as error:
        if "KeyboardInterrupt" in f"{type(error).__name__}: {error}":  # Beam makes a RuntimeError of it
            print("build_crayon.py: interrupted", file=sys.stderr)
            return 130
        line = _user_line(error)
        if line is None:
            raise
        print(f"build_crayon.py: error: {line}", file=sys.stderr)
        return 2 if line.startswith("--") else 1
    _print_summary(output, time.perf_counter() - start, console)
    return 0


@contextmanager
def _sole_writer(output: str) -> Iterator[None]:
    """Hold a local output folder for this run, and clear away what a killed one left in it."""
    if not is_local(output):
        yield
        return
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}; name a folder that can be written to") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--output {output}: another build is writing there; let it end, or name another"
            ) from error
        _clear_staging(folder)
        try:
            yield
        finally:
            _clear_staging(folder)
    finally:
        os.close(handle)


def _clear_staging(folder: Path) -> None:
    for staging in folder.glob(".staging-*"):
        remove_staging(str(staging))


def _draw_scenes(command: Command, console: Console) -> None:
    from collavo.scenes import write_scenes

    request = command.scenes
    assert request is not None
    console.print(f"No source named: drawing {request.count} sample scenes into {request.folder}", highlight=False)
    write_scenes(request.folder, request.count, size_wh=request.size_wh, overwrite=True)


def _run(command: Command, console: Console) -> None:
    runner: Any = command.beam_options.view_as(StandardOptions).runner
    direct = command.beam_options.view_as(DirectOptions)
    # In threads, Beam prints each traceback before it raises it.
    quiet = redirect_stderr(io.StringIO()) if direct.direct_running_mode == "multi_threading" else nullcontext()
    if runner == "DirectRunner":
        runner = _local_runner(direct)
    staging = command.job.staging
    local = isinstance(runner, FnApiRunner) and is_local(staging)
    with ProgressDisplay(staging, console) if local else nullcontext(), quiet:
        pipeline = beam.Pipeline(runner=runner, options=command.beam_options)
        build_graph(pipeline, command.job)
        pipeline.run().wait_until_finish()


def _local_runner(options: DirectOptions) -> FnApiRunner:
    """What Beam's DirectRunner falls back to after it tried to download another one, without its log.

    Whatever fails is raised here in the end, with its traceback; Beam would log that several times before.
    """
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    if options.direct_running_mode != "multi_processing":
        return FnApiRunner()
    options.direct_running_mode = "in_memory"  # in other modes the runner chooses the environment by itself
    cores = os.cpu_count() or 1
    threads = max(1, cores // (options.direct_num_workers or cores))  # torch would start as many as cores in each
    command = f"OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}} {shlex.quote(sys.executable)} -m pipelines.local_worker"
    return FnApiRunner(default_environment=SubprocessSDKEnvironment.from_command_string(command))


def _user_line(error: BaseException | None) -> str | None:
    """The line for the user out of an exception that Beam has wrapped, or None if it is a fault of ours."""
    while error is not None:
        if str(error) == "Channel closed prematurely.":
            return "a worker process died, as when memory runs out; fewer --direct_num_workers would need less of it"
        if match := _USER_ERROR.search(f"{type(error).__name__}: {error}"):
            return re.sub(r" \[while running .*", "", match[1])
        error = error.__cause__ or error.__context__
    return None


def _print_summary(output: str, seconds: float, console: Console) -> None:
    with open_read(join(output, MANIFEST)) as file:
        manifest = json.load(file)
    table = Table(show_header=False, box=None, pad_edge=False)
    inputs, rejects = sum(manifest["inputs"].values()), sum(manifest["rejects"].values())
    table.add_row("inputs", f"{inputs:,}", _tally(manifest["inputs"]))
    table.add_row("rows", f"{manifest['rows']:,}", _tally(manifest["rows_by_split"]))
    table.add_row("conversations", f"{manifest['conversations']:,}", "")
    instructions = manifest["instructions"]
    by_task = {task: instructions[task] for task in TASKS if task in instructions}
    table.add_row("instructions", f"{sum(instructions.values()):,}", _tally(by_task))
    table.add_row("rejects", f"{rejects:,}", _tally(manifest["rejects"]))
    table.add_row("seconds", f"{seconds:.1f}", _tally(manifest["seconds"]) + " (summed over workers)")
    console.print(table, highlight=False)
    console.print(f"Data: {join(output, 'crayon-*.parquet')}", highlight=False, soft_wrap=True)
    if rejects:
        console.print(f"Rejects, with reasons: {join(output, REJECTS)}", highlight=False, soft_wrap=True)
    console.print(f"Look at it: {join(output, REPORT)}", highlight=False, soft_wrap=True)


def _tally(counts: dict[str, float]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
