"""Progress of a local run, told across processes by the length of small files.

Every worker appends one byte per image to a file of its own; the launcher adds up the lengths. Nothing is shared and
nothing locked, and a remote run, whose staging folder the launcher cannot watch, simply shows none.
"""

import threading
import time
import uuid
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from collavo.storage import is_local

SEGMENTED, REJECTED, WRITTEN = "segmented", "rejected", "written"


class Ticker:
    """Counts images of one step; does nothing where the staging folder is not local."""

    def __init__(self, staging: str, step: str) -> None:
        self._file: Any = None
        if is_local(staging):
            folder = Path(staging) / "progress" / step
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / uuid.uuid4().hex).open("wb", buffering=0)

    def tick(self) -> None:
        if self._file:
            self._file.write(b".")

    def close(self) -> None:
        if self._file:
            self._file.close()


def announce_total(staging: str, images: int) -> None:
    """Tell the launcher how many images there are to do."""
    if is_local(staging):
        folder = Path(staging) / "progress"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "total").write_text(str(images))


class ProgressDisplay:
    """Two bars on the terminal, while a `with` block runs the pipeline."""

    def __init__(self, staging: str, console: Console) -> None:
        self._folder = Path(staging) / "progress"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._progress = Progress(
            TextColumn("{task.description:12}"),
            BarColumn(30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> None:
        self._progress.start()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._progress.live.transient = self._total() is None  # bars that never began would only hide why
        self._progress.stop()

    def _watch(self) -> None:
        segmenting = self._progress.add_task("Segmenting", total=None, note="")
        writing = self._progress.add_task("Writing rows", total=None, note="")
        began: dict[TaskID, float] = {}
        finishing = False
        while not finishing:
            finishing = self._stop.wait(0.2)
            images, rejected = self._total(), self._ticks(REJECTED)
            for bar, done, total in (
                (segmenting, self._ticks(SEGMENTED), images),
                (writing, self._ticks(WRITTEN), images and images - rejected),
            ):
                elapsed = time.monotonic() - began.setdefault(bar, time.monotonic()) if done else 0
                note = f"{done / elapsed:.0f} images/s" if elapsed > 1 else ""
                if bar == segmenting and rejected:
                    note += f", {rejected} rejected"
                self._progress.update(bar, completed=done, total=total, note=note)

    def _ticks(self, step: str) -> int:
        return sum(file.stat().st_size for file in (self._folder / step).glob("*"))

    def _total(self) -> int | None:
        file = self._folder / "total"
        return int(file.read_text() or 0) if file.exists() else None
