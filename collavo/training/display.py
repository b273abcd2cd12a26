"""What a run shows: its plan before it starts, bars and metrics while it runs, and where the results are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from collavo.training.loop import Phase, StepResult
from collavo.training.row_index import Kind


class RunDisplay:
    """Terminal, metrics file and trackers of a run; only the main process speaks.

    Args:
        metrics: the file that gets a line per logged step.
        log_steps: steps between lines.
    """

    def __init__(self, console: Console, metrics: Path, accelerator: Accelerator, log_steps: int) -> None:
        self._console = console
        self._metrics = metrics
        self._accelerator = accelerator
        self._log_steps = log_steps
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description:3}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
        )

    def begin(self, phases: Sequence[Phase], facts: Mapping[str, str], example: Text, steps_done: int) -> None:
        """Show what will be done, on what, and one prompt with its supervised part in green; forget later metrics."""
        if not self._accelerator.is_main_process:
            return
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in facts.items():
            table.add_row(name, value)
        self._console.print(table, highlight=False)
        self._console.print(Text("A prompt, the supervised part in green: ") + example, soft_wrap=True)
        if self._metrics.exists():
            lines = [line for line in self._metrics.read_text().splitlines() if json.loads(line)["step"] <= steps_done]
            self._metrics.write_text("".join(f"{line}\n" for line in lines))
        for phase in phases:
            done = min(max(steps_done - phase.steps_before, 0), len(phase.batches))
            self._bars[phase.name] = self._progress.add_task(
                phase.name, total=len(phase.batches), completed=done, note="", start=False
            )
        self._progress.start()

    def step(self, result: StepResult) -> None:
        if not self._accelerator.is_main_process:
            return
        bar = self._bars[result.phase]
        self._progress.start_task(bar)
        note = f"{result.stage} loss {result.loss:.3f}, {result.samples_per_s:.1f} sequences/s"
        self._progress.update(bar, advance=1, note=note)
        if result.step % self._log_steps == 0:
            known = {name: value for name, value in asdict(result).items() if value is not None}
            self._write({name: round(v, 8) if isinstance(v, float) else v for name, v in known.items()})

    def evaluation(self, step: int, phase: str, losses: Mapping[Kind, float]) -> None:
        """Validation losses by kind of batch."""
        if not self._accelerator.is_main_process or not losses:
            return
        values = {f"validation_{kind}_loss": round(loss, 6) for kind, loss in losses.items()}
        self._write({"step": step, "phase": phase, **values})
        told = ", ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items())
        self._progress.console.print(f"{phase}, step {step}: validation loss {told}", highlight=False)

    def end(self) -> None:
        self._progress.stop()

    def _write(self, values: dict[str, object]) -> None:
        with self._metrics.open("a") as file:
            file.write(json.dumps(values) + "\n")
        self._accelerator.log({k: v for k, v in values.items() if isinstance(v, float)}, step=values["step"])
