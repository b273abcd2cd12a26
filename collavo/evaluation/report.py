"""Report an evaluation: a table in the terminal, a plot of all classes, a JSON file with every figure."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table

from collavo.evaluation.scores import EXTREME_CLASSES

REPORT, PLOT = "evaluation.json", "evaluation.png"

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Figures by object list (`trained`, `none`, `with`) and by task, as `collavo.evaluation.scores.summarise` makes
them."""

_TITLES = {
    "class_to_binary": "Class2Binary",
    "box_to_class": "Box2Class",
    "counting": "Counting",
    "class_to_box": "Class2Box",
    "dialogue": "Short answers",
}
_SHARES = {"correct": "correct", "mean": "class mean", "top_20": "top 20", "bottom_20": "bottom 20"}
_OF_TASK = {
    "class_to_binary": {"f1": "F1", "precision": "precision", "recall": "recall", "yes_ratio": "yes-ratio"},
    "box_to_class": {"correct_with_number": "class and number correct"},
    "counting": {"mean_absolute_error": "mean absolute error"},
    "class_to_box": {"mean_iou": "mean IoU", "cell_lines": "at best on cell lines", "two_decimals": "in two decimals"},
}
_COLOR = "#7f93ab"


def terminal_report(results: Results) -> Group:
    """Make a table per object list, shares in percent, and below it the figures of single tasks."""
    parts: list[Table | str] = []
    for condition, tasks in results.items():
        table = Table(title=f"Object list: {condition}", title_justify="left", box=None, pad_edge=False)
        table.add_column("task")
        for name in ("questions", "unreadable", *_SHARES.values()):
            table.add_column(name, justify="right")
        details = []
        for task, figures in _in_order(tasks):
            counts = (f"{figures[name]:,}" for name in ("questions", "unreadable"))
            table.add_row(_TITLES[task], *counts, *(_percent(figures.get(name)) for name in _SHARES))
            titles = {name: title for name, title in _OF_TASK.get(task, {}).items() if name in figures}
            if shown := [f"{title} {_shown(name, figures[name])}" for name, title in titles.items()]:
                details.append(f"{_TITLES[task]}: {', '.join(shown)}")
        parts += [table, *details, ""]
    return Group(*parts)


def plot_of(results: Results) -> Figure | None:
    """Plot the score of every class, best first, in a panel per task and object list; None if no class is known."""
    panels = [
        (f"{_TITLES[task]}, object list: {condition}", figures)
        for condition, tasks in results.items()
        for task, figures in _in_order(tasks)
        if "classes" in figures
    ]
    if not panels:
        return None
    figure = Figure(figsize=(14, 3.4 * len(panels)), layout="constrained")
    for axes, (title, figures) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        names = list(figures["classes"])
        scores = [100 * of_class["score"] for of_class in figures["classes"].values()]
        axes.bar(names, scores, color=_COLOR)
        if "cell_lines" in figures:
            bounds = [100 * of_class["cell_lines"] for of_class in figures["classes"].values()]
            axes.plot(names, bounds, "_", color="black", label="at best on cell lines")
            axes.legend(frameon=False, fontsize=8)
        axes.axhline(100 * figures["mean"], color="black", linewidth=0.8, linestyle="--")
        axes.set_title(
            f"{title}: mean {_percent(figures['mean'])}, top {EXTREME_CLASSES} {_percent(figures['top_20'])}, "
            f"bottom {EXTREME_CLASSES} {_percent(figures['bottom_20'])}",
            loc="left",
            fontsize=10,
        )
        axes.set_ylabel("mean IoU, %" if "mean_iou" in figures else "accuracy, %")
        axes.set_ylim(0, 100)
        axes.margins(x=0.01)
        axes.tick_params(axis="x", rotation=90, labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def save_report(folder: Path, results: Results, facts: Mapping[str, Any]) -> None:
    """Write `REPORT` into a folder, and `PLOT` if there is something to plot."""
    (folder / REPORT).write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")
    if figure := plot_of(results):
        figure.savefig(folder / PLOT, dpi=110)


def _in_order(tasks: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(task, tasks[task]) for task in _TITLES if task in tasks]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.2f}" if key == "mean_absolute_error" else _percent(value)
