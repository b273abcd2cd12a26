"""The notebooks use names that exist, and run from top to bottom in a folder of their own."""

import json
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def run(name: str, folder: Path, **parameters: Any) -> list[NotebookNode]:
    """The outputs of a notebook with other values in its first code cell; a cell that fails raises, as does a shell
    cell whose last command fails."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert all(f"{parameter} = " in first.source for parameter in parameters)
    first.source += "".join(f"\n{parameter} = {value!r}" for parameter, value in parameters.items())
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def shown(outputs: list[NotebookNode], mime_type: str) -> list[str]:
    return [output.data[mime_type] for output in outputs if mime_type in output.get("data", {})]


def printed(outputs: list[NotebookNode]) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.parametrize("name", ["explore_dataset.ipynb", "train_tiny.ipynb"])
def test_a_notebook_imports_and_runs_what_exists(name: str) -> None:
    source = "\n".join(c.source for c in nbformat.read(NOTEBOOKS / name, as_version=4).cells if c.cell_type == "code")
    for module, names in re.findall(r"^from ((?:collavo|schemas|pipelines)[\w.]*) import ([\w, ]+)$", source, re.M):
        assert all(hasattr(import_module(module), each) for each in names.split(", ")), module
    assert all(find_spec(module) for module in re.findall(r"python -m ([\w.]+)", source))


@pytest.mark.slow
def test_explore_dataset_builds_data_and_shows_them_from_all_sides(tmp_path: Path) -> None:
    outputs = run("explore_dataset.ipynb", tmp_path, SCENES=12)
    assert (
        json.loads((tmp_path / "out" / "manifest.json").read_text())["rows"] == 12
    )  # a picture breaks off, a dialogue has none
    assert len(shown(outputs, "image/jpeg")) == 3
    tables = "".join(shown(outputs, "text/html"))
    for text in ("broken_image", "missing_file", "how many? A number only."):
        assert text in tables
    assert sum(pq.read_metadata(file).num_rows for file in (tmp_path / "terse").glob("*.parquet")) == 12
    assert (tmp_path / "exports" / "llava" / "train.json").exists()
    assert list((tmp_path / "exports" / "trl").glob("train-*.parquet"))


@pytest.mark.slow
def test_train_tiny_trains_both_phases_evaluates_and_answers(tmp_path: Path) -> None:
    outputs = run("train_tiny.ipynb", tmp_path, SCENES=16, STEPS=3, BATCH=2, IMAGES=1)
    metrics = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, metrics) if "loss" in line]
    assert len(losses) == 6
    assert (tmp_path / "runs" / "tiny" / "evaluation" / "evaluation.json").exists()
    moved = shown(outputs, "text/html")[-1]
    assert "image_cit" in moved and "vl_cit" in moved and "·" in moved
    assert "Class2Binary" in printed(outputs) and "With an empty map" in printed(outputs)
