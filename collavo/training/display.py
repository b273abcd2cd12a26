"""What a run prints and logs: its plan before it starts, progress and metrics while it runs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from collavo.folders import write_whole, writing
from collavo.model.prompt import Kind
from collavo.progress import Progress
from collavo.runs import read_metrics
from collavo.training.loop import StepResult
from collavo.training.memory import LongestBatch
from collavo.training.phases import Phase


class RunDisplay:
    """Terminal, metrics file and trackers of a run. Only the main process writes metrics.

    Args:
        console: has to be quiet on all processes but the main one.
        metrics: the file that gets a line per logged step.
        log_steps: steps between lines.
    """

    def __init__(self, console: Console, metrics: Path, accelerator: Accelerator, log_steps: int) -> None:
        self._metrics = metrics
        self._accelerator = accelerator
        self._log_steps = log_steps
        self._bars: dict[str, Any] = {}
        self._progress = Progress(console)
        self.in_color = console.color_system is not None

    @contextmanager
    def shown(
        self,
        phases: Sequence[Phase],
        facts: Mapping[str, str],
        memory: Table | None,
        left_out: Sequence[str],
        example: Text,
        steps_done: int,
    ) -> Iterator[None]:
        """Print facts about the run, its memory, what it leaves out and one prompt, then show progress while the block
        runs.

        Args:
            memory: see `memory_table`.
            steps_done: metrics of later steps are deleted, for a resumed run takes those steps again.
        """
        table = Table(show_header=False, box=None, pad_edge=False)
        for fact in facts.items():
            table.add_row(*fact)
        self._progress.console.print(table, highlight=False)
        if memory:
            self._progress.console.print("", memory, "", highlight=False)
        self.left_out(left_out)
        where = "in green" if self.in_color else "between >> and <<"
        self._progress.console.print(Text(f"A prompt, the supervised part {where}: ") + example, soft_wrap=True)
        if self._accelerator.is_main_process:
            lines = [json.dumps(line) for line in read_metrics(self._metrics.parent) if line["step"] <= steps_done]
            write_whole(self._metrics, "".join(f"{line}\n" for line in lines))
        for phase in phases:
            done = min(max(steps_done - phase.steps_before, 0), len(phase.batches))
            self._bars[phase.name] = self._progress.add(phase.name, len(phase.batches), done)
        with self._progress:
            yield

    def left_out(self, lines: Sequence[str]) -> None:
        """Say what could not be used, a line for each reason."""
        for line in lines:
            self._progress.console.print(f"left out: {line}", highlight=False, soft_wrap=True)

    def step(self, result: StepResult, phase: Phase) -> None:
        """Show a step, and log it if its turn has come or the phase ends with it, from where the next one counts on."""
        loss = "skipped" if result.loss is None else f"loss {result.loss:.3f}"
        note = f"{result.stage} {loss}, {result.samples_per_s:.1f} sequences/s"
        self._progress.update(self._bars[phase.name], result.step - phase.steps_before, note=note)
        if result.step % self._log_steps == 0 or result.step == phase.last_step:
            known = {name: value for name, value in asdict(result).items() if value is not None}
            self._log({name: round(v, 8) if isinstance(v, float) else v for name, v in known.items()})

    def evaluation(self, step: int, phase: Phase, losses: Mapping[Kind, float]) -> None:
        """Show and log validation losses, by kind of batch."""
        if losses:
            values = {f"validation_{kind}_loss": round(loss, 6) for kind, loss in losses.items()}
            self._log({"step": step, "phase": phase.name, **values})
            shown = ", ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items())
            self._progress.console.print(f"{phase.name}, step {step}: validation loss {shown}", highlight=False)

    def _log(self, values: dict[str, Any]) -> None:
        if self._accelerator.is_main_process:
            with writing(self._metrics), self._metrics.open("a") as file:
                file.write(json.dumps(values) + "\n")
            self._accelerator.log({k: v for k, v in values.items() if isinstance(v, float)}, step=values["step"])


def memory_table(needs: Mapping[str, Mapping[str, int]], longest: Mapping[str, LongestBatch], available: int) -> Table:
    """Make a table of what each phase takes of a GPU's memory, see `collavo.training.memory.check_memory`."""
    table = Table(box=None, pad_edge=False)
    table.add_column("GPU memory, reckoned")
    for phase in needs:
        table.add_column(phase, justify="right")
    sizes = [f"{longest[phase].sequences} x {longest[phase].tokens:,}" for phase in needs]
    table.add_row("tokens of the longest batch", *sizes)
    for part in next(iter(needs.values())):
        table.add_row(part, *(decimal(parts[part]) for parts in needs.values()))
    totals = [sum(parts.values()) for parts in needs.values()]
    table.add_row("together", *map(decimal, totals), style="bold")
    table.add_row(f"of {decimal(available)} free on the GPU", *(f"{100 * total / available:.0f} %" for total in totals))
    return table
