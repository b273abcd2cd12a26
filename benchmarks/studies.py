"""Helpers of the studies: steps that are not repeated once they are finished, and figures over seeds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from collavo import evaluate, train
from collavo.evaluation.report import REPORT
from collavo.runs import CARD
from pipelines import command as build_command


def built(output: Path, *flags: str | Path) -> Path:
    """Return the data set in a folder, and build it first if there is none."""
    if not output.exists():
        assert build_command.main([*map(str, flags), "--output", str(output)]) == 0
    return output


def trained(run: Path, data: Path, *flags: str) -> Path:
    """Return the run directory of a finished training, and train first if it has no card."""
    if not (run / CARD).exists():
        assert train.main(["--data", str(data), "--output_dir", str(run), "--overwrite", *flags]) == 0
    return run


def evaluated(run: Path, data: Path, tasks: Sequence[str], name: str = "evaluation") -> Mapping[str, Any]:
    """Return the figures of a model by task, and ask it first if its folder has no report of that name."""
    report = run / name / REPORT
    if not report.exists():
        asked = ["--model", str(run), "--data", str(data), "--tasks", *tasks, "--output", str(report.parent)]
        assert evaluate.main(asked) == 0
    return json.loads(report.read_text())["results"]["trained"]


def mean_and_deviation(of_seeds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation over seeds by title; a single seed has no deviation."""
    found = {}
    for title in of_seeds[0]:
        values = [of_seed[title] for of_seed in of_seeds]
        found[title] = {"mean": float(np.mean(values))}
        if len(values) > 1:
            found[title]["deviation"] = float(np.std(values, ddof=1))
    return found


def cell(figure: Mapping[str, float] | None) -> str:
    """Return a figure as tables have it: mean ± standard deviation."""
    if figure is None:
        return ""
    return f"{figure['mean']:.1f}" + (f" ± {figure['deviation']:.1f}" if "deviation" in figure else "")
