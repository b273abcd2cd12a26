"""The benchmark of all GPU figures: its parts fail alone, and its commands run at toy size where there is no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", BENCHMARKS / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_part_that_fails_or_hangs_is_named_and_the_others_go_on(gpu, monkeypatch, tmp_path, capfd):
    scripts = {
        "whole": "print('a table'); print('{\"rate\": 3}')",
        "failing": "raise SystemExit('no such thing')",
        "hanging": "import time; print('a first row', flush=True); time.sleep(100)",
    }
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
    parts = {name: gpu.Part(f"{name}.py", "", 2) for name in ("failing", "hanging", "whole")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu, "_TOY_PATIENCE", 1)
    assert gpu.main(["--device", "cpu"]) == 1
    out = capfd.readouterr().out
    assert "a table" in out and "a first row" in out
    result = json.loads(out.splitlines()[-1])
    assert result["results"] == {"whole": {"rate": 3}}
    assert result["failed"] == {"failing": "no such thing", "hanging": "out of its 2 seconds"}


def test_scripts_reach_pretraining_from_a_checkout_that_was_installed(tmp_path: Path) -> None:
    program = "import measure, pretraining.segmenter"  # the first finds what the second needs
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)


def test_all_parts_together_end_within_nine_minutes(gpu):
    assert sum(part.seconds for part in gpu.PARTS.values()) <= 9 * 60 - 10


@pytest.mark.slow  # it starts the build four times for each segmenter
def test_every_command_runs_at_toy_size(gpu, capfd):
    assert gpu.main(["--device", "cpu"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["results"].keys() == gpu.PARTS.keys() and not result["failed"]
    assert [row["who"] for row in result["results"]["sweep"]["sweep"]][-1] == "Trainer + peft + bitsandbytes"
    assert result["results"]["segmenter_swin_l"]["shape"] == "swin_toy"
    assert result["results"]["segmenter_swin_l"]["images_with_equal_segments"] == 1
    assert result["results"]["segmenter_shapes"]["shapes"]["toy"]["input_hw"] == [64, 64]
