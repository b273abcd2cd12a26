"""Hands a job to a runner, watches over the workers of a local run, and makes one line of what goes wrong there."""

import io
import logging
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import DirectOptions, StandardOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import SubprocessSDKEnvironment
from rich.console import Console

from collavo.errors import UserError
from collavo.folders import DISK_FAULTS
from collavo.storage import is_local
from pipelines import local_worker
from pipelines.graph import build_graph
from pipelines.job import Publication
from pipelines.plan import Plan
from pipelines.progress import ProgressDisplay

_GRACE_SECONDS = 5.0
"""How long a job may go on after a worker has failed: where the worker had begun, Beam notices by itself."""


def run_job(plan: Plan, console: Console) -> None:
    """Run a job to its end, with progress on the console where it is a local one.

    Raises:
        UserError, KeyboardInterrupt: for what is not the program's fault, whichever process it happened in; whatever
            else the runner raises comes as it is.
    """
    runner: Any = plan.beam_options.view_as(StandardOptions).runner
    direct = plan.beam_options.view_as(DirectOptions)
    publication = plan.job.publication
    with TemporaryDirectory(prefix="build-crayon-") as logs, ExitStack() as stack:
        if direct.direct_running_mode == "multi_threading":  # there Beam prints each traceback before it raises it
            stack.enter_context(redirect_stderr(io.StringIO()))
        if runner == "DirectRunner":
            runner = _local_runner(direct, Path(logs))
            if is_local(publication.work):
                stack.enter_context(ProgressDisplay(publication.work, console))
            stack.enter_context(_worker_watch(Path(logs)))
        try:
            pipeline = beam.Pipeline(runner=runner, options=plan.beam_options)
            build_graph(pipeline, plan.job)
            pipeline.run().wait_until_finish()
        except (Exception, KeyboardInterrupt) as error:
            explained = _dead_worker(Path(logs), error) or _explained(error, publication)
            if explained is None:
                raise
            raise explained from error


def _local_runner(options: DirectOptions, logs: Path) -> FnApiRunner:
    """Make the runner that Beam's DirectRunner falls back to after it tried to download another one.

    Beam would log a failure several times; here its log is silent, and what fails is raised once, with its traceback.
    """
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    if options.direct_running_mode != "multi_processing":
        return FnApiRunner()
    options.direct_running_mode = "in_memory"  # in other modes the runner chooses the environment by itself
    cores = os.cpu_count() or 1
    threads = max(1, cores // (options.direct_num_workers or cores))  # in each worker torch would start one per core
    # -P, and the worker by its path: a folder `pipelines` in the current directory is another's. The shell stays, so
    # that a worker leaves word however it ends.
    worker = shlex.join([sys.executable, "-P", local_worker.__file__, str(logs)])
    packages, folder = (shlex.quote(str(path)) for path in (Path(local_worker.__file__).parents[1], logs))
    paths = f"PYTHONPATH={packages}${{PYTHONPATH:+:$PYTHONPATH}}"
    # Ctrl-C reaches all processes of a terminal, and is the launcher's to handle.
    command = (
        f"trap '' INT; export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}} {paths}; "
        f"{worker} 2>{folder}/$$ || mv {folder}/$$ {folder}/failed"
    )
    return _Launcher(logs, SubprocessSDKEnvironment.from_command_string(command))


class _Launcher(FnApiRunner):
    """Beam's runner with worker processes, which it tells to end when the job fails or is interrupted.

    Beam closes its connections and then waits for the workers. One that still imports at that time would connect after
    all and wait for work, and each would wait for the other.
    """

    def __init__(self, logs: Path, environment: SubprocessSDKEnvironment) -> None:
        super().__init__(default_environment=environment)
        self._stop = logs / local_worker.STOP

    @contextmanager
    def maybe_profile(self) -> Iterator[None]:
        """Surround the whole run, as Beam does with its profiler, before it closes the workers."""
        with super().maybe_profile():
            try:
                yield
            except BaseException:
                self._stop.touch()
                raise


@contextmanager
def _worker_watch(logs: Path) -> Iterator[None]:
    """End the job where a worker failed and Beam waits for it, as it does for one that never called back.

    Until then, tracebacks of Beam's threads are not shown: what they report is raised in the main thread too.
    """
    ended = threading.Event()
    shown, threading.excepthook = threading.excepthook, lambda _: None
    # Not SIGINT: a shell starts a job in the background with that ignored.
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)

    def watch() -> None:
        while not ended.wait(0.5):
            if (logs / "failed").exists() and not ended.wait(_GRACE_SECONDS):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
        threading.excepthook = shown


def _dead_worker(logs: Path, error: BaseException) -> UserError | None:
    """Find the last words of a worker that ended by itself; None where none did."""
    log = logs / "failed"
    if str(error) != "Channel closed prematurely." and not log.exists():
        return None
    said = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
    if not said or said[0].endswith("Killed"):  # as the shell says of one that was killed
        why = "as when memory runs out; fewer --direct_num_workers would need less of it"
        return UserError(f"a worker process died, {why}", exit_status=1)
    return UserError(f"a worker process died; the last line of its log: {said[0]}", exit_status=1)


def _explained(error: BaseException | None, publication: Publication) -> BaseException | None:
    """Return the error to raise in place of an exception that Beam has wrapped; None if it is a fault of the program.

    Found by text, since an exception of another process arrives as the text of its traceback.
    """
    while error is not None:
        text = f"{type(error).__name__}: {error}"
        if "KeyboardInterrupt" in text:
            return KeyboardInterrupt()
        if lines := re.findall(r"\bUserError: ([^\n]+)", text):  # the last one was raised from those before
            line = re.sub(r" \[while running .*", "", lines[-1])
            return UserError(line, exit_status=2 if line.startswith("--") else 1)
        if match := re.search(r"\[Errno (\d+)\](?:[^\n]*?: '([^'\n]+)')?", text):
            number, path = int(match[1]), match[2] or ""
            if number in DISK_FAULTS:
                ours = not path or path.startswith((publication.output, publication.folder))
                where = f"--output {publication.output}" if ours else path
                return UserError(f"{where}: {os.strerror(number)}", exit_status=1)
        error = error.__cause__ or error.__context__
    return None
