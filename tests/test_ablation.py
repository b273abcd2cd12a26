"""The ablation study, small: its arms, its shared tuning, who judges whom, that it goes on, and what it reports."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from tiny_model import save_tiny_base, scene_rows

from collavo.evaluation.judge import Judge
from schemas.categories import COCO_PANOPTIC

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import ablation

from collavo import train
from collavo.evaluation.questions import questions_of
from collavo.evaluation.scores import summarise

JUDGE = Judge(COCO_PANOPTIC)

TRAIN_FLAGS = "--lora_rank 4 --max_length 700 --workers 0 --micro_batch_size 4"


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A study of a few steps, whose segments are annotated."""
    folder = tmp_path_factory.mktemp("ablation")
    sizes = "--train_scenes 16 --eval_scenes 2 --cpt_steps 2 --cit_steps 2 --batch_size 4 --segmenter annotations"
    base = save_tiny_base(folder / "base")
    return ["--folder", str(folder / "study"), *sizes.split(), "--base", str(base), "--train_flags", TRAIN_FLAGS]


@pytest.fixture(scope="module")
def study(command: list[str]) -> Path:
    """That study, done in two halves."""
    assert ablation.main([*command, "--seeds", "0", "--arms", "full", "no_queries", "vl_only"]) == 0
    assert ablation.main([*command, "--seeds", "0"]) == 0
    return Path(command[1])


@pytest.mark.slow
def test_every_arm_is_trained_as_its_name_says(study: Path) -> None:
    arguments = {run.name: json.loads((run / "train_args.json").read_text()) for run in study.glob("runs/*-seed-0/")}
    assert {name: (a["queries"], a["adapter_names"]) for name, a in arguments.items()} == {
        "full-seed-0": ("both", ["image_cit", "vl_cit"]),
        "semantic-seed-0": ("semantic", ["image_cit", "vl_cit"]),
        "no_queries-seed-0": ("none", ["image_cit", "vl_cit"]),
        "single-seed-0": ("both", ["cit"]),
        "vl_only-seed-0": ("both", ["vl_cit"]),
    }
    assert all(a["object_list"] == "none" for a in arguments.values())
    stages = {
        run.name: [json.loads(line).get("stage") for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in study.glob("runs/*-seed-0/")
    }
    assert stages["full-seed-0"].count("cpt") == 2 and stages["no_queries-seed-0"].count("cpt") == 0
    assert "image_cit" not in stages["vl_only-seed-0"]
    assert not list(study.glob("cpt/none*"))


@pytest.mark.slow
def test_a_shared_tuning_changes_nothing(study: Path, tmp_path: Path) -> None:
    args = json.loads((study / "runs/full-seed-0/train_args.json").read_text())
    argv = ["--data", *args["data"], "--preset", args["base"], "--output_dir", str(tmp_path), "--object_list", "none",
            "--batch_size", "4", "--max_steps", "2", "--crayon_share", "0.5", "--device", "cpu"]  # fmt: skip
    assert train.main([*argv, *TRAIN_FLAGS.split()]) == 0
    for file in ("crayon.safetensors", "adapters/image_cit/adapter_model.safetensors"):
        alone, shared = load_file(tmp_path / file), load_file(study / "runs/full-seed-0" / file)
        assert all(alone[name].equal(shared[name]) for name in alone)


@pytest.mark.slow
def test_what_is_done_is_not_done_again(study: Path, command: list[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in study.glob("runs/*/*")}
    assert ablation.main([*command, "--seeds", "0"]) == 0
    assert {file: file.stat().st_mtime_ns for file in study.glob("runs/*/*")} == before


@pytest.mark.slow
def test_another_size_wants_another_folder(study: Path, command: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"--cit_steps is 3, but the study in .* has 2"):
        ablation.main([*command, "--cit_steps", "3"])


@pytest.mark.slow
def test_the_report_holds_every_arm(study: Path) -> None:
    report = json.loads((study / "ablation.json").read_text())
    assert set(report["figures"]) == {"map", *ablation.ARMS}
    assert report["questions"]["counting"] > 0
    assert all(0 <= figure["mean"] <= 100 for figure in report["figures"]["full"].values())
    assert (study / "ablation.md").read_text().count("semantic + numbering") == 1
    assert Image.open(study / "ablation.png").width > 1000


def test_a_map_without_mistakes_answers_without_mistakes() -> None:
    rows = scene_rows(8)
    answers = [
        a for row in rows for a in ablation.answers_of_map(row, questions_of(row, tuple(ablation.MEASURES), JUDGE))
    ]
    figures = ablation.percentages(summarise(answers))
    assert figures["C2B"] == figures["B2C"] == figures["Counting"] == figures["Class-to-box IoU"] == 100


def test_means_come_with_their_spread() -> None:
    values = {"full": {0: {"C2B": 90.0}, 1: {"C2B": 94.0}}, "map": {0: {"C2B": 99.0}}}
    assert ablation.mean_and_deviation(list(values["full"].values()))["C2B"]["mean"] == 92
    assert "| 92.0 ± 2.8 |" in ablation.markdown(values)
    assert "| 99.0 |" in ablation.markdown(values)
