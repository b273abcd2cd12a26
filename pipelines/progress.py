"""Progress of a build, told across processes.

Where all of them run on this machine, every worker appends one byte per image to a file of its own, and the launcher
adds up the lengths. Nothing is shared and nothing locked. Other runners gather Beam's counters, which the launcher asks
for now and then.
"""

import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from posixpath import basename
from tempfile import gettempdir
from typing import Any

from apache_beam.metrics import Metrics, MetricsFilter
from rich.console import Console

from collavo.progress import Progress
from collavo.storage import is_local

_NAMESPACE = "crayon"

FOUND, SEGMENTED, REJECTED, WRITTEN = "found", "segmented", "rejected", "written"


def tick(work: str, step: str, images: int = 1) -> None:
    """Count images of a step.

    Args:
        work: the job's work folder, whose name tells jobs apart.
    """
    if file := _own_file(work, step):
        file.write(b"." * images)
    else:
        Metrics.counter(_NAMESPACE, step).inc(images)


def _folder_of(work: str) -> Path:
    """Where the files of a local job are: on this machine, also where its work folder is on a store."""
    return Path(work) / "progress" if is_local(work) else Path(gettempdir()) / f"build-crayon{basename(work)}"


@lru_cache(maxsize=16)
def _own_file(work: str, step: str) -> Any:
    """Open this process's file for a step; None where the launcher has made no folder for it here."""
    if not _folder_of(work).is_dir():
        return None
    folder = _folder_of(work) / step
    folder.mkdir(exist_ok=True)
    return (folder / uuid.uuid4().hex).open("wb", buffering=0)


class FileCounts:
    """Counts of a local job; its files are there while a `with` block runs it."""

    def __init__(self, work: str) -> None:
        self._folder = _folder_of(work)

    def __enter__(self) -> "FileCounts":
        self._folder.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def __call__(self) -> Mapping[str, int]:
        steps = (FOUND, SEGMENTED, REJECTED, WRITTEN)
        return {step: sum(file.stat().st_size for file in (self._folder / step).glob("*")) for step in steps}


def counters_of(result: Any) -> Mapping[str, int]:
    """Ask a runner for the counts of its job; none where it does not answer, as some do while a job runs."""
    with suppress(Exception):
        result._metrics = None  # Beam's portable result asks once, and would repeat that answer
        found = result.metrics().query(MetricsFilter().with_namespace(_NAMESPACE))["counters"]
        return {each.key.metric.name: each.attempted or each.committed or 0 for each in found}
    return {}


class ProgressDisplay:
    """Two bars on the terminal, or lines elsewhere, while a `with` block runs the pipeline.

    Args:
        counts: returns how many images are through each step.
        seconds: between two looks at them.
    """

    def __init__(self, counts: Callable[[], Mapping[str, int]], console: Console, seconds: float = 0.2) -> None:
        self._counts = counts
        self._seconds = seconds
        self._found = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._progress = Progress(console)

    def __enter__(self) -> None:
        self._progress.__enter__()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self._found:  # bars that never began would only hide why
            self._progress.hide()
        self._progress.__exit__()

    def _watch(self) -> None:
        segmenting, writing = self._progress.add("Segmenting"), self._progress.add("Writing rows")
        seen = {segmenting: 0, writing: 0}
        finishing = False
        while not finishing:
            finishing = self._stop.wait(self._seconds)
            counts = Counter(self._counts())
            self._found, rejected = counts[FOUND], counts[REJECTED]
            images = self._found or None
            note = f"{rejected:,} rejected" if rejected else ""
            for bar, done, total, said in (
                (segmenting, counts[SEGMENTED], images, note),
                (writing, counts[WRITTEN], images and images - rejected, ""),
            ):
                if done != seen[bar]:
                    seen[bar] = done
                    self._progress.update(bar, done, total, said)
