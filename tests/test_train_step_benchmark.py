"""The benchmarks of training run from end to end where there is no GPU, and count what they should."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_model import scene_rows, write_crayon_file


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_step, loader = script("train_step"), script("loader")


def test_what_ranks_read_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row group that two ranks share is read by both."""
    file = write_crayon_file(tmp_path / "rows.parquet", [replace(row, split="train") for row in scene_rows(16)])
    loader.main(["--data", str(file), "--ranks", "1", "2"])
    read = json.loads(capsys.readouterr().out.splitlines()[-1])["ranks"]
    assert 0.9 < read["1"] < 1.5 and read["2"] == pytest.approx(2 * read["1"], rel=0.01)


def test_all_parts_run_and_end_in_a_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    train_step.main(["--sizes", "toy", "--parts", "step", "packing", "sweep", "--repeats", "1", "--micro_batches", "1"])
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(seconds > 0 for seconds in results["step"]["seconds"].values())
    assert results["packing"]["instructions per s"].keys() == {"packed", "apart"}
    rows = [(row["who"], row["packed"], row["micro_batch"]) for row in results["sweep"]]
    ours = [(who, packed, 1) for who in ("collavo", "collavo, checkpointing") for packed in (1, 8)]
    assert rows == [*ours, ("Trainer + peft + bitsandbytes", 1, 1)]
    assert all(row["samples_per_s"] > 0 for row in results["sweep"])


def test_the_7b_shape_takes_the_operations_counted_by_hand() -> None:
    """CLIP-L/14 at 490 px and InternLM2-7B: 42.6 TFLOP a sample with 150 tokens of text, one adapter and no second."""
    linear, tokens = 32 * (4096 * 6144 + 4096**2 + 3 * 4096 * 14336), 1225 + 150
    found = train_step.sample_flops(train_step.SIZES["7b"], packed=1)
    assert 4 * linear * tokens < found < 1.15 * 4 * linear * tokens
