"""The studies' own parts: dialogues that contradict crayon answers, absent classes of another set, their figures."""

import json
import sys
from pathlib import Path

import pytest

from collavo.scenes import write_scenes
from schemas.categories import COCO_PANOPTIC

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import adapters
import photographs
from tiny_model import save_tiny_base


@pytest.mark.slow
def test_a_setting_is_a_study_of_one_adapter_and_of_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_flags = "--lora_rank=4 --max_length=700 --workers=0 --micro_batch_size=4"
    flags = f"--base {save_tiny_base(tmp_path / 'base')} --cpt_steps 2".split()
    argv = [
        "--settings",
        "nine_to_one",
        "--train_scenes",
        "16",
        "--eval_scenes",
        "2",
        "--cit_steps",
        "3",
        "--seeds",
        "0",
    ]
    assert adapters.main(["--folder", str(tmp_path), *argv, "--", *flags, "--train_flags", train_flags]) == 0
    arguments = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("nine_to_one/runs/*/train_args.json"))]
    assert [(a["adapter_names"], a["crayon_share"]) for a in arguments] == [
        (["image_cit", "vl_cit"], 0.9),
        (["cit"], 0.9),
    ]
    assert "| nine_to_one | two | 1 |" in capsys.readouterr().out


def test_contradicting_dialogues_are_true_in_another_form(tmp_path: Path) -> None:
    write_scenes(tmp_path, 12, (160, 120), 5)
    panoptic, dialogues = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("panoptic", "dialogues"))
    segments = {f"images/scene-{n:06}.jpg": one["segments_info"] for n, one in enumerate(panoptic["annotations"])}
    kinds = set()
    for before, after in zip(dialogues, adapters.contradicting(panoptic, dialogues), strict=True):
        question, answer, *rest = (turn["value"] for turn in after["conversations"])
        assert question.startswith("<image>\n") and not any("<image>" in text for text in rest)
        assert [text.replace("<image>", "").strip() for text in rest] == [
            turn["value"].replace("<image>", "").strip() for turn in before["conversations"]
        ]
        there = [s["category_id"] for s in segments[after["image"]]]
        counts = {c.singular: there.count(c.category_id) for c in COCO_PANOPTIC.things}
        plurals = {c.plural: there.count(c.category_id) for c in COCO_PANOPTIC.things}
        if " shown " in question:
            assert (answer == "Affirmative.") == (counts[question.split(" any ")[1].split(" shown ")[0]] > 0)
        elif "How many" in question:
            assert (answer == "Not any.") == (plurals[question.split(" many ")[1].split(" does ")[0]] == 0)
        else:
            assert answer in ("A small object.", "A large object.")
        kinds.add(answer)
    assert len(kinds) >= 5


def test_absent_classes_come_from_another_set() -> None:
    own = [{"id": 7, "name": "car", "isthing": 1}]
    categories = photographs.with_more_classes({"images": [], "categories": own})["categories"]
    assert categories[0] == own[0] and len({c["id"] for c in categories}) == len(categories)
    assert [c["name"] for c in categories[1:]] == [
        c.name for c in COCO_PANOPTIC.things if c.name in photographs.NOT_IN_A_STREET
    ]
    assert len(categories) == 1 + len(photographs.NOT_IN_A_STREET)


def test_presence_counts_as_much_as_absence() -> None:
    other = {"correct": 0.5, "mean": 0.25, "mean_iou": 0.0}
    found = photographs.figures(
        {
            "class_to_binary": {"correct": 0.9, "correct_present": 1.0, "correct_absent": 0.5},
            **dict.fromkeys(photographs.ASKED, other),
        }
    )
    assert found["C2B"] == pytest.approx(75) and found["B2C, class mean"] == 25
