"""The benchmark of a training step runs from end to end where there is no GPU, and counts what it should."""

import importlib.util
import json
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("train_step", Path(__file__).parents[1] / "benchmarks" / "train_step.py")
assert _SPEC is not None and _SPEC.loader is not None
train_step = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(train_step)


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
