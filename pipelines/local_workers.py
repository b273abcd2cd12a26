"""Worker processes of a local run, forked from one that has imported all that they need.

Beam's own worker processes are new interpreters, and each imports for two to three seconds of CPU time, more than a
small build takes. Here one process does that, the nursery: it starts when the command starts, imports while the
launcher makes its plan, and forks the workers when Beam asks for them. It never opens a connection itself, so that its
forks can.

    launcher ──(pipe: environment variables of a worker)──> nursery ──fork──> worker ──grpc──> launcher
             <──(pipe: why a worker died)──────────────────

The nursery ends all workers when its pipe closes, which happens however the launcher ends.
"""

import argparse
import gc
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from itertools import cycle
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from collavo.errors import UserError

_CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Linux' bounds for a container: microseconds of processor time in each so many microseconds, and bytes."""

_BYTES_PER_WORKER, _BYTES_PER_EMBEDDED = 4 << 30, 1 << 30
"""What a worker with a network on a CPU may take: Mask2Former with Swin-L took 3.0 GiB for 800 x 1333 pixels, the
embedded network 0.8."""

_DEVICES, _GPU_FILES = Path("/dev"), ("nvidia[0-9]*", "dxg", "kfd", "nvhost-gpu")
"""One for each of Nvidia's cards; one for all of Windows' below Linux, of AMD's, of a Jetson's."""


def count_workers(beam_words: Sequence[str], device: str | None, embedded: bool = False) -> int:
    """Choose the number of worker processes of a local run; 1 for a run in the launcher itself, or elsewhere.

    Where the user says nothing, a build without a model takes all cores, and one with a model a worker for each GPU. A
    model on a CPU takes all cores too, as far as each worker has memory for one: torch uses two cores for two images
    better than for one.

    Args:
        beam_words: the words of the command line that are Beam's; what else is wrong in them is found later.
        device: `--device`, None where no model runs.
        embedded: whether the model is the small one of this package.

    Raises:
        UserError: for several workers in one process.
    """
    beam = _beam_flags(beam_words)
    mode, number = beam.direct_running_mode, beam.direct_num_workers
    if mode == "in_memory" and number not in (None, "1"):
        raise UserError(f"--direct_num_workers {number} has no effect in one process; leave --direct_running_mode out")
    if not runs_here(beam_words) or mode not in (None, "multi_processing"):
        return 1
    if number is not None:
        return (int(number) or cores()) if number.isdecimal() else 1
    if device is None:
        return cores()
    each = _BYTES_PER_EMBEDDED if embedded else _BYTES_PER_WORKER
    return len(gpus_for(device)) or max(1, min(cores(), _free_memory() // each))


def runs_here(beam_words: Sequence[str]) -> bool:
    """Tell whether the job is to run on this machine, without a server."""
    return _beam_flags(beam_words).runner in (None, "DirectRunner")


def _beam_flags(beam_words: Sequence[str]) -> argparse.Namespace:
    """Read the flags of Beam that say where and how a job runs, before Beam is there to do it."""
    parser = argparse.ArgumentParser(add_help=False)
    for flag in ("--runner", "--direct_running_mode", "--direct_num_workers"):
        parser.add_argument(flag, nargs="?")
    return parser.parse_known_args(list(beam_words))[0]


def cores() -> int:
    """Count the processor cores that this process may use, those that a container has a share of."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no file outside a control group, and `max` where there is no bound
        quota, period = map(int, (_CONTROL_GROUP / "cpu.max").read_text().split())
        count = min(count, max(1, -(-quota // period)))
    return count


def _free_memory() -> int:
    """Count the bytes that this process may still take, those that a container has a share of."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError, KeyError):  # as above
        most, taken, kinds = ((_CONTROL_GROUP / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        cached = dict(line.split() for line in kinds.splitlines())["inactive_file"]  # of files; it gives way
        free = min(free, int(most) - int(taken) + int(cached))
    return free


def gpus_for(device: str | None) -> list[str]:
    """List the GPUs that `--device` lets a build use, as CUDA_VISIBLE_DEVICES names them; none is the CPU.

    `cuda` and `auto` mean all that are visible. Loads no torch, which finds out later whether it can use them.
    """
    if device not in ("auto", "cuda"):
        return [device] if device and device.startswith("cuda") else []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        found = [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    else:
        files = [sorted(path.name for path in _DEVICES.glob(pattern)) for pattern in _GPU_FILES]
        # CUDA counts the cards that are there, of which a container may have a few.
        found = [*map(str, range(len(files[0])))] or next(filter(None, files), [])
    return found or [device] * (device == "cuda")


class LocalWorkers:
    """The launcher's end of the nursery, as a context.

    Args:
        count: how many workers Beam is to have.
        device: `--device`, None where no model runs. Of several GPUs, each worker sees one, in turns.
    """

    def __init__(self, count: int, device: str | None) -> None:
        self.count = count
        self.pipe, theirs = Pipe()
        self._logs = TemporaryDirectory(prefix="build-crayon-")
        gpus = gpus_for(device)
        # -P, and the script by its path: a folder `pipelines` in the current directory is another's.
        command = [sys.executable, "-P", __file__, str(theirs.fileno()), self._logs.name]
        # Not for GPUs: a process whose imports so much as count them forks workers that cannot use them. Nor on a Mac,
        # whose libraries may not be forked once they are loaded.
        with_torch = device is not None and not gpus and sys.platform == "linux"
        command += [str(int(with_torch)), *(gpus if len(gpus) > 1 else ())]
        packages = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = max(1, cores() // count)  # torch would start one per core in each worker
        if (stated := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():
            threads = min(threads, int(stated))
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(packages)}
        self._nursery = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stderr=subprocess.DEVNULL
        )
        theirs.close()

    def __enter__(self) -> "LocalWorkers":
        return self

    def __exit__(self, *error: object) -> None:
        self.pipe.close()
        self._nursery.terminate()  # for one that still imports; later it goes by the pipe
        self._nursery.wait()
        self._logs.cleanup()


def _tend(launcher: Connection, logs: Path, with_torch: bool, gpus: Sequence[str]) -> None:
    """Be the nursery: fork workers as they are asked for, and tell of those that die."""
    # Ctrl-C reaches all processes of a terminal, and is the launcher's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    workers: set[int] = set()
    of_workers = cycle([{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [{}])
    try:
        _import_all(with_torch)
        # All modules stay; and of what a worker makes of an image, nothing waits for the collector of cycles.
        gc.freeze()
        gc.set_threshold(100_000)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from here on it has workers to end
        while True:
            if launcher.poll(0.1):
                environment = launcher.recv() | next(of_workers)
                pid = os.fork()
                if pid == 0:
                    launcher.close()
                    _work(environment, logs / str(os.getpid()))
                workers.add(pid)
            while workers and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                workers.discard(pid)
                if status:
                    launcher.send("" if os.WIFSIGNALED(status) else _last_line(logs / str(pid)))
    except (EOFError, OSError):  # the launcher is done, or is no more
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    except Exception as error:
        launcher.send(f"{type(error).__name__}: {error}")


def _import_all(with_torch: bool) -> None:
    modules = ["apache_beam.runners.worker.sdk_worker_main", "pipelines.graph"]
    if with_torch:  # no tensor is made, and so no thread started, before the forks
        modules += ["pipelines.model_segmentation", "collavo.segmenters.universal"]
        modules += ["transformers.models.mask2former.modeling_mask2former"]  # most networks; half of what others need
    for module in modules:
        import_module(module)


def _last_line(log: Path) -> str:
    return log.read_text(errors="replace").strip().rpartition("\n")[2]


def _work(environment: dict[str, str], log: Path) -> None:
    """Be a worker, to the end of the process: what fails in it is raised in the launcher, with its traceback."""
    status = 1
    try:
        with open(os.devnull, "wb") as nothing, log.open("wb") as file:
            os.dup2(nothing.fileno(), 1)
            os.dup2(file.fileno(), 2)
        logging.getLogger().addHandler(logging.NullHandler())  # without a handler, the first warning would set one up
        os.environ.update(environment)
        from apache_beam.runners.worker.sdk_worker_main import main

        main([])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _tend(Connection(int(sys.argv[1])), Path(sys.argv[2]), sys.argv[3] == "1", sys.argv[4:])
    os._exit(0)  # the launcher waits for it, and torch takes seconds to put itself away
