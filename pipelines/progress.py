"""Progress of a local run, told across processes by the length of small files.

Every worker appends one byte per image to a file of its own; the launcher adds up the lengths. Nothing is shared and
nothing locked. The launcher cannot watch the work folder of a remote run, and shows no progress for one.
"""

import threading
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console

from collavo.progress import Progress
from collavo.storage import is_local

FOUND, SEGMENTED, REJECTED, WRITTEN = "found", "segmented", "rejected", "written"


def tick(work: str, step: str, images: int = 1) -> None:
    """Count images of a step; nothing happens where the work folder is not local."""
    if is_local(work):
        _own_file(work, step).write(b"." * images)


@lru_cache(maxsize=16)
def _own_file(work: str, step: str) -> Any:
    folder = Path(work) / "progress" / step
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / uuid.uuid4().hex).open("wb", buffering=0)


class ProgressDisplay:
    """Two bars on the terminal, or lines elsewhere, while a `with` block runs the pipeline."""

    def __init__(self, work: str, console: Console) -> None:
        self._folder = Path(work) / "progress"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._progress = Progress(console)

    def __enter__(self) -> None:
        self._progress.__enter__()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self._ticks(FOUND):  # bars that never began would only hide why
            self._progress.hide()
        self._progress.__exit__()

    def _watch(self) -> None:
        segmenting, writing = self._progress.add("Segmenting"), self._progress.add("Writing rows")
        seen = {segmenting: 0, writing: 0}
        finishing = False
        while not finishing:
            finishing = self._stop.wait(0.2)
            images, rejected = self._ticks(FOUND) or None, self._ticks(REJECTED)
            note = f"{rejected:,} rejected" if rejected else ""
            for bar, done, total, said in (
                (segmenting, self._ticks(SEGMENTED), images, note),
                (writing, self._ticks(WRITTEN), images and images - rejected, ""),
            ):
                if done != seen[bar]:
                    seen[bar] = done
                    self._progress.update(bar, done, total, said)

    def _ticks(self, step: str) -> int:
        return sum(file.stat().st_size for file in (self._folder / step).glob("*"))
