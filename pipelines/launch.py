"""Hands a job to a runner, watches over the workers of a local run, and makes one line of what goes wrong there.

What any other runner says, and its workers through it, goes to a log file, which is named where the job fails.
"""

import io
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, suppress
from functools import partial
from multiprocessing.connection import Connection
from posixpath import join
from types import ModuleType
from typing import Any

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import DirectOptions, GoogleCloudOptions, StandardOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.portability.fn_api_runner.worker_handlers import GrpcWorkerHandler, WorkerHandler
from apache_beam.runners.runner import PipelineState
from apache_beam.transforms.environments import Environment
from google.protobuf import json_format
from rich.console import Console

from collavo.errors import UserError
from collavo.folders import DISK_FAULTS
from collavo.storage import MANIFEST, is_local
from pipelines.graph import build_graph
from pipelines.job import Publication
from pipelines.local_workers import LocalWorkers
from pipelines.plan import Plan
from pipelines.progress import FileCounts, ProgressDisplay, counters_of

_FORKED = "collavo:env:forked:v1"
"""By what name the runner finds how its workers are started."""

_MAX_LINE = 400

_SECONDS_BETWEEN_QUESTIONS = 5.0
"""To a runner about the progress of its job."""

_GRACE_SECONDS = 5.0
"""How long a job may go on after a worker has failed: where the worker had begun, Beam notices by itself."""


class JobLost(UserError):
    """The launcher cannot watch a job any more, which may go on without it."""


def run_job(plan: Plan, workers: LocalWorkers | None, console: Console) -> bool:
    """Run a job to its end, with progress on the console.

    Args:
        workers: of a local run; None where it happens in this process.

    Returns:
        whether it ran: with `--template_location`, Dataflow is only to be told of it later.

    Raises:
        UserError, KeyboardInterrupt: for what is not the program's fault, whichever process it happened in; whatever
            else the runner raises comes as it is. `JobLost` where the job may go on.
    """
    runner: Any = plan.beam_options.view_as(StandardOptions).runner
    name, publication = runner, plan.job.publication
    with ExitStack() as stack:
        watch = log = result = None
        if runner != "DirectRunner":
            log = stack.enter_context(_runner_log())
            console.print(f"{runner} runs the job; what it says goes to {log}", highlight=False, soft_wrap=True)
        else:
            runner, watch = _local_runner(plan.beam_options.view_as(DirectOptions), workers, stack)
            stack.enter_context(ProgressDisplay(stack.enter_context(FileCounts(publication.work)), console))
        try:
            pipeline = beam.Pipeline(runner=runner, options=plan.beam_options)
            with _without_torch() if workers or log else nullcontext():
                build_graph(pipeline, plan.job)
            result = pipeline.run()
            cloud = plan.beam_options.view_as(GoogleCloudOptions)
            if cloud.template_location:
                console.print(f"Template: {cloud.template_location}", highlight=False, soft_wrap=True)
                return False
            if job_id := getattr(result, "job_id", None):  # of Dataflow
                job = (
                    f"https://console.cloud.google.com/dataflow/jobs/{cloud.region}/{job_id()}?project={cloud.project}"
                )
                console.print(f"Job: {job}", highlight=False, soft_wrap=True)
            if log:
                counts = partial(counters_of, result)
                stack.enter_context(ProgressDisplay(counts, console, seconds=_SECONDS_BETWEEN_QUESTIONS))
            result.wait_until_finish()
        except (Exception, KeyboardInterrupt) as error:
            explained = (watch and watch.explained(error)) or _explained(error, publication, local=not log)
            if log:
                logging.getLogger(__name__).error("the job failed", exc_info=error)
                # What the launcher has to swap in is lost without it, and what the user stops is to stop.
                needed = is_local(publication.output) or isinstance(explained, KeyboardInterrupt)
                if result and not needed and _goes_on(result):
                    end = (
                        f"a job that goes on is done once {join(publication.output, MANIFEST)} is there; its log: {log}"
                    )
                    raise JobLost(f"--runner {name}: {_end_of_job(error, lost=True)}; {end}", 1) from error
                if result:
                    with suppress(Exception):  # the job may be over, or its runner gone; else it would go on
                        result.cancel()
                explained = explained or UserError(f"--runner {name}: {_end_of_job(error)}; its log: {log}", 1)
            if explained is None:
                raise
            raise explained from error
    return True


@contextmanager
def _without_torch() -> Iterator[None]:
    """Import Beam's inference without its manager of many models, which would import torch and scipy for seconds.

    Only where the graph is made in this process and runs in others. Who wants the manager later gets it: where it is
    not there, Beam imports it when it is asked for.
    """
    name = "apache_beam.ml.inference.model_manager"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = stand_in = ModuleType(name)
    stand_in.ModelManager = None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _runner_log() -> Iterator[str]:
    """Keep what Beam and its runner say in a file, which vanishes where the block ends well."""
    handle, path = tempfile.mkstemp(prefix="build-crayon-", suffix=".log")
    os.close(handle)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    before, root.handlers, level = root.handlers, [handler], root.level
    root.setLevel(logging.INFO)
    shown, threading.excepthook = threading.excepthook, lambda fault: root.error("%s", fault.exc_value)
    try:
        yield path
        os.unlink(path)
    finally:
        threading.excepthook = shown
        root.handlers = before
        root.setLevel(level)


def _goes_on(result: Any) -> bool:
    """Tell whether a job goes on, or may do so since its runner does not answer: a launcher that loses its network, or
    whose credentials end, is no reason to end the job of hours."""
    with suppress(Exception):
        return not PipelineState.is_terminal(result.state)
    return True


def _end_of_job(error: BaseException, lost: bool = False) -> str:
    """Say in what state a job ended, with the last line of what its runner said of it.

    Args:
        lost: whether it may go on.
    """
    if isinstance(error, grpc.RpcError) and isinstance(error, grpc.Call):
        return f"the runner cannot be reached any more ({error.code().name}): {(error.details() or '')[:_MAX_LINE]}"
    if isinstance(error, grpc.FutureTimeoutError):
        return "the runner cannot be reached"
    text = str(error).strip()
    state = re.search(r"\bstate:? ([A-Z_]+)", text, re.IGNORECASE)
    around = r"^Pipeline \S+ failed in state \w+: |[\w.]*\bStore(Fault|Outage): | \[while running .*"
    last = re.sub(around, "", text.rpartition("\n")[2])
    how = "the launcher lost sight of the job" if lost else f"the job ended in state {state[1] if state else 'unknown'}"
    return f"{how}: {last[:_MAX_LINE] or type(error).__name__}"


def _local_runner(
    options: DirectOptions, workers: LocalWorkers | None, stack: ExitStack
) -> tuple[FnApiRunner, "_WorkerWatch | None"]:
    """Make the runner that Beam's DirectRunner falls back to after it tried to download another one.

    Beam would log a failure several times; here its log is silent, and what fails is raised once, with its traceback.
    """
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    if options.direct_running_mode == "multi_threading":  # there Beam prints each traceback before it raises it
        stack.enter_context(redirect_stderr(io.StringIO()))
    if workers is None:
        return FnApiRunner(), None
    options.direct_running_mode = "in_memory"  # in other modes the runner chooses the environment by itself
    options.direct_num_workers = workers.count
    return FnApiRunner(default_environment=_Forked(workers.pipe.fileno())), stack.enter_context(_WorkerWatch(workers))


@Environment.register_urn(_FORKED, bytes)
class _Forked(Environment):
    """Tells Beam's runner that `LocalWorkers` starts its workers.

    Args:
        pipe: the descriptor of the pipe to it.
    """

    def __init__(self, pipe: int, *beam: Any) -> None:
        super().__init__(*beam)
        self._pipe = pipe

    def to_runner_api_parameter(self, context: Any) -> tuple[str, bytes]:
        return _FORKED, str(self._pipe).encode()

    @staticmethod
    def from_runner_api_parameter(
        payload: bytes, capabilities: Any, artifacts: Any, resource_hints: Any, context: Any
    ) -> "_Forked":
        return _Forked(int(payload), capabilities, artifacts, resource_hints)


@WorkerHandler.register_environment(_FORKED, bytes)
class _ForkedWorkerHandler(GrpcWorkerHandler):
    """Has workers started. Their end is left to `LocalWorkers`: they have nothing to put away."""

    def __init__(self, payload: bytes, *beam: Any) -> None:
        super().__init__(*beam)
        self._pipe = int(payload)

    def start_worker(self) -> None:
        options = json_format.MessageToJson(self.provision_info.provision_info.pipeline_options)
        control = f"url: {json.dumps(self.control_address)}"
        environment = {
            "WORKER_ID": self.worker_id,
            "CONTROL_API_SERVICE_DESCRIPTOR": control,
            "PIPELINE_OPTIONS": options,
        }
        with Connection(os.dup(self._pipe)) as pipe:
            pipe.send(environment)

    def stop_worker(self) -> None:
        pass


class _WorkerWatch:
    """Ends the job where a worker died and Beam waits for it, as it does for one that never called back.

    Until then, tracebacks of Beam's threads are not shown: what they report is raised in the main thread too.
    """

    def __init__(self, workers: LocalWorkers) -> None:
        self._pipe = workers.pipe
        self._died: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_WorkerWatch":
        try:  # not SIGINT: a shell starts a job in the background with that ignored
            self._before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
        except ValueError as error:
            raise UserError(
                "a thread can run no workers; start the build from the main one, or with --direct_num_workers 1"
            ) from error
        self._shown, threading.excepthook = threading.excepthook, lambda _: None
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        signal.signal(signal.SIGUSR1, self._before)
        threading.excepthook = self._shown

    def explained(self, error: BaseException) -> UserError | None:
        """Make one line of an error that is due to the death of a worker; None for any other."""
        if str(error) == "Channel closed prematurely.":  # Beam may notice first
            self._thread.join(1.0)
        elif self._died is None:
            return None
        if not self._died:
            why = "as when memory runs out; fewer --direct_num_workers would need less of it"
            return UserError(f"a worker process died, {why}", exit_status=1)
        return UserError(f"a worker process died; the last line of its log: {self._died}", exit_status=1)

    def _watch(self) -> None:
        while not self._ended.is_set():
            if self._pipe.poll(0.2):
                self._died = self._pipe.recv()
                if not self._ended.wait(_GRACE_SECONDS):
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                return


def _explained(error: BaseException | None, publication: Publication, local: bool) -> BaseException | None:
    """Return the error to raise in place of an exception that Beam has wrapped; None if it is a fault of the program.

    Found by text, since an exception of another process arrives as the text of its traceback.
    """
    while error is not None:
        text = f"{type(error).__name__}: {error}"
        if "KeyboardInterrupt" in text:
            return KeyboardInterrupt()
        # The last one was raised from those before.
        if told := re.findall(r"\b(UserError|StoreFault|StoreOutage): ([^\n]+)", text):
            kind, line = told[-1]
            if kind != "UserError" and not local:
                return None  # the state of the job is told with it
            line = re.sub(r" \[while running .*", "", line)
            return UserError(line, exit_status=2 if line.startswith("--") else 1)
        if match := re.search(r"\[Errno (\d+)\](?:[^\n]*?: '([^'\n]+)')?", text):
            number, path = int(match[1]), match[2] or ""
            if number in DISK_FAULTS:
                ours = not path or path.startswith((publication.output, publication.folder))
                where = f"--output {publication.output}" if ours else path
                return UserError(f"{where}: {os.strerror(number)}", exit_status=1)
        error = error.__cause__ or error.__context__
    return None
