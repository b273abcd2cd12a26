"""How far a command has come: bars on a terminal, a plain line every half minute in a pipe or a log."""

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as _Bars

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Bars for one or more steps of a command, in a `with` block.

    Args:
        console: where they are shown; where it is no terminal, lines are printed instead.
        transient: whether the bars vanish in the end.
    """

    def __init__(self, console: Console, transient: bool = False) -> None:
        self.console = console
        self._bars = _Bars(
            TextColumn("{task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=transient,
            disable=not console.is_terminal,
        )
        self._lock = threading.Lock()
        self._began: dict[Any, tuple[float, float]] = {}
        self._last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def hide(self) -> None:
        """Leave no bars behind when the block ends."""
        self._bars.live.transient = True

    def add(self, name: str, total: float | None = None, done: int = 0) -> Any:
        """Add a bar, and return its handle."""
        return self._bars.add_task(name, total=total, completed=done, note="")

    def update(self, bar: Any, done: float, total: float | None = None, note: str = "") -> None:
        """Say how much of a bar is done; `note` stands beside it."""
        options: dict[str, Any] = {} if total is None else {"total": total}
        self._bars.update(bar, completed=done, note=note, **options)
        now = time.monotonic()
        with self._lock:
            since, at_first = self._began.setdefault(bar, (now, done))
            if self.console.is_terminal or now - self._last_line < SECONDS_BETWEEN_LINES:
                return
            self._last_line = now
        task = self._bars.tasks[bar]
        line = _line(task.description, done, task.total, (done - at_first) / max(now - since, 1e-9), note)
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def track(self, items: Iterable[Item], name: str, total: int | None = None) -> Iterator[Item]:
        """Go through items and show how many are done."""
        bar = self.add(name, total)
        for done, item in enumerate(items, start=1):
            yield item
            self.update(bar, done)


def _line(name: str, done: float, total: float | None, rate: float, note: str) -> str:
    """`Segmenting: 1,200 of 6,000 (20 %), 85.3/s, 0:56 left, 3 rejected`"""
    parts = [f"{done:,.0f}"]
    if total:
        parts = [f"{done:,.0f} of {total:,.0f} ({100 * done / total:.0f} %)"]
    if rate > 0:
        parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
        if total:
            minutes, seconds = divmod(round((total - done) / rate), 60)
            hours, minutes = divmod(minutes, 60)
            parts.append(f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left")
    return f"{name}: " + ", ".join([*parts, note] if note else parts)
