"""The plug-in in lmms-eval itself, with the local task; skipped where lmms-eval is not installed."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_model import scene_rows, write_crayon_file
from tiny_run import save_tiny_run

pytest.importorskip("lmms_eval", reason="needs pip install 'collavo[lmms-eval]'")

from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2

from collavo.evaluation import harness
from collavo.evaluation.judge import Judge
from collavo.evaluation.questions import questions_of
from collavo.images import decode_rgb
from collavo.inference import Picture, Request, load_answerer
from collavo.segmenters import NoSegmenter
from schemas.categories import COCO_PANOPTIC

JUDGE = Judge(COCO_PANOPTIC)
TASKS = Path(harness.__file__).with_name("harness_tasks")
ROWS = scene_rows(12)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_tiny_run(tmp_path_factory.mktemp("harness") / "run")


def test_the_entry_point_leads_to_a_model_that_lmms_eval_accepts():
    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("collavo") is harness.CollavoHarness


@pytest.mark.parametrize("processes", [1, 2])
def test_the_local_task_runs_in_lmms_eval_and_agrees_with_our_own_judge(run, tmp_path, processes):
    data = write_crayon_file(tmp_path / "crayon.parquet", ROWS)
    task = (TASKS / "crayon_c2b.yaml").read_text().replace("out/*.parquet", str(data))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "crayon_c2b.yaml").write_text(task)
    (tmp_path / "tasks" / "crayon_questions.py").write_text((TASKS / "crayon_questions.py").read_text())
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)),
        *("-m", "lmms_eval", "--model", "collavo", "--tasks", "crayon_c2b", "--device", "cpu"),
        *("--model_args", f"pretrained={run},segmenter=none", "--include_path", str(tmp_path / "tasks")),
        *("--batch_size", "4", "--output_path", str(tmp_path / "results"), "--log_samples"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "results").rglob("*results.json")
    answerer = load_answerer(str(run), torch.device("cpu"))
    texts, verdicts = [], []
    for row in ROWS:
        asked = questions_of(row, ["class_to_binary"], JUDGE) if row.split == "validation" else []
        if asked:
            image = decode_rgb(row.image_bytes)
            picture = Picture(image, NoSegmenter().segment([image])[0])
            answers = answerer.answer([picture], [Request(0, question.turns, "", 32) for question in asked])
            texts += answers
            verdicts += [JUDGE.judge(q.task, text, q.truth).correct for q, text in zip(asked, answers, strict=True)]
    figures = json.loads(results.read_text())["results"]["crayon_c2b"]
    assert figures["accuracy,none"] == pytest.approx(sum(verdicts) / len(verdicts))
    (samples,) = (tmp_path / "results").rglob("*samples_crayon_c2b.jsonl")
    found = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"] for sample in found] == texts


def instance(context: str, visuals: list, **options) -> Instance:
    """A request as lmms-eval makes it, whose document holds its images."""
    metadata = {"task": "tried", "doc_id": 0, "repeats": 1}
    return Instance("generate_until", (context, options, lambda document: visuals, 0, "tried", "test"), 0, metadata)


@pytest.fixture(scope="module")
def model(run):
    model = harness.CollavoHarness(str(run), segmenter="none", device="cpu", batch_size=4)
    model.task_dict = {"tried": {"test": [{}]}}
    return model


def test_answers_end_at_the_stop_texts_and_at_the_limit_of_their_task(model):
    image = Image.open(io.BytesIO(ROWS[0].image_bytes))
    (whole,) = model.generate_until([instance("What is there?", [image], max_new_tokens=12)])
    stop = whole[len(whole) // 2]
    shorter, ended = model.generate_until(
        [
            instance("What is there?", [image], max_new_tokens=2),
            instance("What is there?", [image], max_new_tokens=12, until=[stop]),
        ]
    )
    assert whole.startswith(shorter.rstrip("�"))
    assert len(shorter) < len(whole)
    assert ended == whole.partition(stop)[0].strip()


def test_a_prompt_that_is_longer_than_the_context_is_answered_with_nothing_and_a_warning(model):
    image = Image.open(io.BytesIO(ROWS[0].image_bytes))
    short = instance("What is there?", [image], max_new_tokens=8)
    with pytest.warns(UserWarning, match="answered with nothing: the question has"):
        answers = model.generate_until([instance("word " * 3000, [image], max_new_tokens=8), short])
    assert answers == ["", *model.generate_until([short])]


@pytest.mark.parametrize(
    "stops, answer",
    [(["\n\n"], "First.\n\nThen."), ("\n", "First."), (["Then", "\n\n"], "First."), (None, "First.\n\nThen.")],
)
def test_an_empty_line_which_lmms_eval_names_for_all_tasks_ends_no_answer(stops, answer):
    assert harness._until("First.\n\nThen.", stops) == answer


def test_of_several_images_the_first_is_shown_with_a_warning_and_none_is_refused(model):
    first, second = (Image.open(io.BytesIO(row.image_bytes)) for row in ROWS[:2])
    alone = model.generate_until([instance("What is there?", [first], max_new_tokens=8)])
    with pytest.warns(UserWarning, match="the first image only"):
        assert model.generate_until([instance("What is there?", [first, second], max_new_tokens=8)]) == alone
    with pytest.raises(ValueError, match="task tried, document 0: has no image"):
        model.generate_until([instance("What is there?", [], max_new_tokens=8)])
