import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import crayon_row, segment
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_model import OWN_CLASSES, own_rows, scene_rows, write_crayon_file
from tiny_run import save_tiny_run

from collavo.categories import read_categories
from collavo.evaluate import main
from collavo.evaluation.asking import tokens_of_boxes
from collavo.evaluation.judge import Judge, box_iou
from collavo.evaluation.questions import EVALUATED_TASKS, Question, questions_of
from collavo.evaluation.scores import Answered, judged, overlap_on_cell_lines, summarise
from collavo.inference import load_answerer
from collavo.instructions.choose import ClassStatistics
from collavo.instructions.phrasebook import load_phrasebook
from collavo.instructions.text import format_box
from collavo.instructions.write import InstructionOptions, write_instructions
from collavo.model import CollavoForConditionalGeneration
from schemas.categories import COCO_PANOPTIC, MAX_NUMBERING
from schemas.crayon_row import Dialogue, Instruction, Segment

JUDGE = Judge(COCO_PANOPTIC)

ROWS = scene_rows(8)
VALIDATION = [row for row in ROWS if row.split == "validation"]
DOG = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run, and data in one file."""
    folder = tmp_path_factory.mktemp("evaluate")
    return save_tiny_run(folder / "run"), write_crayon_file(folder / "crayon.parquet", ROWS)


def evaluated(world, *flags: str) -> dict:
    run, data = world
    assert main(["--model", str(run), "--data", str(data), *flags]) == 0
    return json.loads((run / "evaluation" / "evaluation.json").read_text())


def binary(category: str, truth: str, answer: str):
    polarity = "present" if truth == "yes" else "absent"
    return judged(Question("a", "class_to_binary", (("human", "?"),), truth, category, polarity), answer, JUDGE)


def test_every_question_of_the_split_is_asked_with_and_without_the_object_list_and_accounted_for(world, capsys):
    tasks = ("class_to_binary", "counting", "dialogue")
    report = evaluated(world, "--object_list", "both", "--max_images", "1", "--tasks", *tasks)
    assert set(report["results"]) == {"none", "with"}
    for of_condition in report["results"].values():
        for task, figures in of_condition.items():
            asked = [question for row in VALIDATION[:1] for question in questions_of(row, [task], JUDGE)]
            assert figures["questions"] == len(asked) > 0
            counted = sum(of_class["questions"] for of_class in figures.get("classes", {}).values())
            assert counted == (0 if task == "dialogue" else len(asked))
            assert len(figures["wrong_answers"]) == min(10, round((1 - figures["correct"]) * len(asked)))
    run, _ = world
    with Image.open(run / "evaluation" / "evaluation.png") as plot:
        assert plot.width > 500
    out = capsys.readouterr().out
    assert "Object list: none" in out and "Class2Binary" in out and "yes-ratio" in out
    assert "--object_list both: the model was trained with the object list for dialogue; answers without it" in out
    assert "--object_list both: the model was trained without the object list for " in out

    def answers(condition: str, of: dict, task: str) -> list[str]:
        return [wrong["answer"] for wrong in of["results"][condition][task]["wrong_answers"]]

    trained = evaluated(world, "--max_images", "1", "--tasks", "counting", "dialogue")  # as it was trained
    assert "was trained with" not in capsys.readouterr().out
    assert any(answers("none", report, task) != answers("with", report, task) for task in ("counting", "dialogue"))
    assert answers("trained", trained, "counting") == answers("none", report, "counting")
    assert answers("trained", trained, "dialogue") == answers("with", report, "dialogue")


@pytest.mark.slow  # two processes that import everything: 30 seconds on two cores
@pytest.mark.parametrize("more", [(), ("--max_images", "3")])
def test_several_processes_share_the_questions_and_report_as_one(world, tmp_path, more):
    run, _ = world
    rows = [replace(row, image_id=f"{copy}-{row.image_id}") for copy in range(2) for row in VALIDATION]
    # A damaged row, which every rank reads that has to pass it, and a damaged picture, which one rank opens.
    rows[0] = replace(rows[0], panoptic_png=b"damaged")
    data = write_crayon_file(tmp_path / "crayon.parquet", rows)
    flags = ["--model", str(run), "--data", str(data), "--object_list", "both", *more]
    reports = []
    for name, launcher in (("1", []), ("2", ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"])):
        command = [sys.executable, "-m", *launcher, "collavo.evaluate", *flags, "--output", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Object list: none") == 1
        reports.append(json.loads((tmp_path / name / "evaluation.json").read_text()))
    first, second = reports
    assert first["results"] == second["results"]
    assert first["left_out"] == second["left_out"] and sum(first["left_out"].values()) == 1


def test_fewer_images_and_images_by_reference_are_asked_about(world, tmp_path):
    run, _ = world
    rows = [replace(row, image_bytes=None) for row in VALIDATION]
    data = write_crayon_file(tmp_path / "crayon.parquet", rows)
    for row in VALIDATION[:1]:
        (tmp_path / row.image_path).write_bytes(row.image_bytes)
    flags = ["--data", str(data), "--image_root", str(tmp_path), "--max_images", "1", "--output", str(tmp_path / "o")]
    assert main(["--model", str(run), *flags, "--tasks", "counting"]) == 0
    report = json.loads((tmp_path / "o" / "evaluation.json").read_text())
    asked = len(questions_of(VALIDATION[0], ["counting"], JUDGE))
    assert report["results"]["trained"]["counting"]["questions"] == asked


def test_classes_that_the_model_has_no_query_for_are_named_and_asked_about_all_the_same(world, tmp_path, capsys):
    data = write_crayon_file(tmp_path / "own.parquet", own_rows(4), OWN_CLASSES)
    report = evaluated((world[0], data), "--tasks", "class_to_binary")
    line = "--data: the model has no query for 3 of 5 classes (lane marking, traffic cone, E_Scooter); "
    assert line in capsys.readouterr().out
    assert report["results"]["trained"]["class_to_binary"]["questions"] > 0


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--model", "nowhere"], "--model nowhere: there is no such folder"),
        (["--model", "nowhere", "--output", "o"], "nowhere: neither a folder nor a whole model in the cache"),
        (["--data", "nowhere.parquet"], "--data: nowhere.parquet: there is no such file"),
        (["--batch_size", "0"], "--batch_size is 0, but must be at least 1"),
        (["--device", "cuda:99"], "--device: cuda:99"),
        (["--output", "TRAIN"], "--output: TRAIN: this is a file; name a folder"),
        (["--data", "TRAIN"], "--split validation: none of the 1 rows of --data is in it"),
        (["--data", "UNASKED"], "--tasks class_to_binary box_to_class counting class_to_box dialogue: the rows"),
        (["--data", "REFERENCE"], "image_root must name their folder"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(world, tmp_path, monkeypatch, capsys, flags, complaint):
    run, data = world
    monkeypatch.chdir(tmp_path)
    write_crayon_file(tmp_path / "TRAIN", ROWS[:1])
    write_crayon_file(tmp_path / "UNASKED", [replace(VALIDATION[0], instructions=(), conversations=())])
    write_crayon_file(tmp_path / "REFERENCE", [replace(VALIDATION[0], image_bytes=None)])
    given = {"--model": str(run), "--data": str(data), **dict(zip(flags[::2], flags[1::2], strict=True))}
    assert main([part for flag in given.items() for part in flag]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("collavo.evaluate: error: ")]
    assert len(errors) == 1
    assert complaint in errors[0]


def test_a_data_set_named_as_the_model_gets_no_folder_of_reports(world, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    write_crayon_file(tmp_path / "out" / "validation.parquet", VALIDATION)
    assert main(["--model", str(tmp_path / "out"), "--data", str(tmp_path / "out")]) == 2
    assert "error: --model: " in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["validation.parquet"]


def test_questions_carry_their_truth_their_class_and_their_history():
    asked = (
        Instruction("class_to_binary", "Is there any hot dog?", "No.", "no", "absent", (), "c2b-1"),
        Instruction("box_to_class", "What is in [0.00, 0.00, 1.00, 1.00]?", "A dog.", "dog", "present", (7,), "b2c-1"),
        Instruction("class_to_box", "Where is each dog?", "There.", None, "present", (7,), "c2x-1"),
        Instruction("counting", "Wie viele?", "0", "0", "absent", (), "mine-1"),  # a phrasing that we cannot read
        Instruction("list_objects", "What is there?", "(#2 dog)", None, None, (7,), "list-1"),
    )
    turns = (("human", "Who?"), ("gpt", "A dog."), ("human", "What does it do?"), ("gpt", "It lies in the sun."))
    row = crayon_row(
        segments=(segment(id=7, label=DOG, numbering=2, box_xyxy=(0, 0, 5, 20)),),
        instructions=asked,
        conversations=(Dialogue("d", turns), Dialogue("broken", turns[:1] + turns[2:])),
    )
    questions = {question.task: question for question in questions_of(row, EVALUATED_TASKS, JUDGE)}
    assert {task: (q.truth, q.category) for task, q in questions.items()} == {
        "class_to_binary": ("no", "hot dog"),
        "box_to_class": ("(#2 dog)", "dog"),
        "class_to_box": ("[0.00, 0.00, 0.50, 1.00]", "dog"),
        "counting": ("0", None),
        "dialogue": ("A dog.", None),  # the longer answer is not asked for
    }
    assert questions["class_to_box"].boxes == ((0.0, 0.0, 0.5, 1.0),)
    assert questions["dialogue"].turns == turns[:1]
    later = replace(row, conversations=(Dialogue("d", (*turns, ("human", "Sure?"), ("gpt", "Yes."))),))
    assert questions_of(later, ["dialogue"], JUDGE)[-1].turns == (*turns, ("human", "Sure?"))


@pytest.mark.parametrize(
    "answer, short", [("一只猫", True), ("一只猫坐在红色的沙发上", False), ("two red cars here", True)]
)
def test_an_answer_is_short_by_its_characters_where_words_have_no_spaces(answer, short):
    dialogue = Dialogue("a", (("human", "?"), ("gpt", answer)))
    asked = questions_of(replace(VALIDATION[0], conversations=(dialogue,)), ["dialogue"], JUDGE)
    assert [question.truth for question in asked] == [answer] * short


def test_questions_that_cannot_be_asked_or_judged_are_left_out_and_counted(world, tmp_path, capsys):
    """One that is longer than the model's context, and one whose label another tool has lost."""
    run, _ = world
    row = VALIDATION[0]
    counting = next(i for i in row.instructions if i.task == "counting")
    long = Dialogue("a", (("human", "word " * 2000), ("gpt", "yes")))
    short = Dialogue("b", (("human", "Is it so?"), ("gpt", "yes")))
    row = replace(row, instructions=(replace(counting, label=None), counting), conversations=(long, short))
    data = write_crayon_file(tmp_path / "rows.parquet", [row])
    report = evaluated((run, data), "--tasks", "counting", "dialogue", "--object_list", "both")
    assert report["left_out"] == {"missing_label": 1, "too_long_question": 2}  # once with the object list, once without
    for figures in report["results"].values():
        assert {task: each["questions"] for task, each in figures.items()} == {"counting": 1, "dialogue": 1}
    said = " ".join(capsys.readouterr().out.split())
    assert f"1 missing_label (counting of {row.image_id}: its true answer is '')" in said


def test_all_boxes_of_a_class_with_a_long_name_fit_into_an_answer(world):
    name = "articulated construction vehicle with trailer"
    categories = read_categories([{"id": 1, "name": name, "isthing": 1}], "long")
    boxes = [(n, 0.0, n + 9.0, 9.0) for n in range(MAX_NUMBERING)]
    segments = [Segment.of(categories[0], id=n, box_xyxy=box, area=81, numbering=n) for n, box in enumerate(boxes, 1)]
    book, options = load_phrasebook(), InstructionOptions(("class_to_box",))
    processor = load_answerer(str(world[0]), torch.device("cpu")).processor
    limit = tokens_of_boxes(processor, categories)
    for number in range(20):  # of every phrasing
        (asked,) = write_instructions(f"{number}", (96, 96), segments, categories, book, ClassStatistics.of(1), options)
        assert 0.8 * limit < len(processor.tokenizer(asked.answer).input_ids) < limit


def test_every_default_phrasing_shows_the_class_it_asks_for():
    for row in ROWS:
        by_id = {segment.id: segment for segment in row.segments}
        for question, instruction in zip(
            questions_of(row, EVALUATED_TASKS[:4], JUDGE),
            [i for i in row.instructions if not i.task.startswith("list")],
            strict=True,
        ):
            unsaid = replace(row, instructions=(replace(instruction, segment_ids=(), task="counting"),))
            if instruction.task != "box_to_class":
                (from_text,) = questions_of(unsaid, ["counting"], JUDGE)
                assert from_text.category == question.category
            if instruction.segment_ids:
                assert question.category == by_id[instruction.segment_ids[0]].category


def test_a_right_class_with_a_wrong_number_and_the_size_of_an_error_are_told_apart():
    def answered(task: str, truth: str, answer: str) -> Answered:
        return judged(Question("a", task, (("human", "?"),), truth, "dog", "present"), answer, JUDGE)

    boxes = [answered("box_to_class", "(#1 dog)", said) for said in ("(#1 dog)", "(#2 dog)", "(#1 cat)", "(#2 dog)")]
    counts = [answered("counting", "3", said) for said in ("3", "5", "2", "many")]
    figures = summarise([*boxes, *counts])
    assert (figures["box_to_class"]["correct"], figures["box_to_class"]["correct_with_number"]) == (0.75, 0.25)
    assert figures["counting"]["mean_absolute_error"] == 1.0


def test_binary_figures_follow_their_definitions():
    answers = [
        *[binary("dog", "yes", "Yes.")] * 6,  # hits
        *[binary("dog", "yes", "No.")] * 2,  # misses
        *[binary("cat", "no", "Yes.")] * 3,  # false alarms
        *[binary("cat", "no", "No.")] * 8,
        binary("cat", "no", "Perhaps."),  # unreadable, and wrong
    ]
    figures = summarise(answers)["class_to_binary"]
    expected = {
        "questions": 20,
        "unreadable": 1,
        "correct": 14 / 20,
        "correct_present": 6 / 8,
        "correct_absent": 8 / 12,
        "precision": 6 / 9,
        "recall": 6 / 8,
        "f1": 2 * (6 / 9) * (6 / 8) / (6 / 9 + 6 / 8),
        "yes_ratio": 9 / 20,
        "mean": (6 / 8 + 8 / 12) / 2,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert figures["classes"] == {
        "dog": {"questions": 8, "score": 6 / 8},
        "cat": {"questions": 12, "score": pytest.approx(8 / 12)},
    }


def test_classes_count_alike_and_the_twenty_best_and_worst_make_top_and_bottom():
    random = np.random.default_rng(0)
    answers, accuracies = [], []
    for category in COCO_PANOPTIC.things:
        right, wrong = random.integers(0, 9, 2) + 1
        accuracies.append(right / (right + wrong))
        answers += [binary(category.display_name, "yes", "yes")] * right
        answers += [binary(category.display_name, "yes", "no")] * wrong
    figures = summarise(answers)["class_to_binary"]
    ordered = np.sort(accuracies)
    assert figures["mean"] == pytest.approx(ordered.mean())
    assert figures["top_20"] == pytest.approx(ordered[-20:].mean())
    assert figures["bottom_20"] == pytest.approx(ordered[:20].mean())
    shown = [of_class["score"] for of_class in figures["classes"].values()]
    assert shown == pytest.approx(list(ordered[::-1]))


def test_overlap_is_measured_where_there_is_something_and_absence_judged_where_there_is_nothing():
    def located(category: str, truth: str, answer: str):
        polarity = "present" if truth else "absent"
        return judged(Question("a", "class_to_box", (("human", "?"),), truth, category, polarity), answer, JUDGE)

    left, right = "[0.00, 0.00, 0.50, 1.00]", "[0.50, 0.00, 1.00, 1.00]"
    figures = summarise(
        [
            located("dog", left, left),
            located("dog", left, right),
            located("cat", "", "There is no cat."),
            located("cat", "", left),
        ]
    )["class_to_box"]
    assert figures["mean_iou"] == figures["mean"] == 0.5
    assert list(figures["classes"]) == ["dog"]
    assert figures["correct_absent"] == 0.5
    assert figures["correct"] == 0.5


@pytest.mark.parametrize(("right", "correct"), [(0.51, True), (0.49, False)])
def test_a_box_is_found_where_half_of_both_boxes_together_is_shared(right, correct):
    truth = ((0.0, 0.0, 1.0, 1.0),)
    question = Question("a", "class_to_box", (("human", "?"),), format_box(truth[0], (1, 1)), "dog", "present", truth)
    figures = summarise([judged(question, f"[0.00, 0.00, {right}, 1.00]", JUDGE)])["class_to_box"]
    assert figures["mean_iou"] == pytest.approx(right)
    assert figures["correct"] == correct


@pytest.mark.parametrize(("flags", "beams", "quantized"), [((), 1, False), (("--beams", "2", "--quantize"), 2, True)])
def test_beams_and_nf4_are_used_as_asked(world, monkeypatch, flags, beams, quantized):
    seen = set()

    def noted(model, *args, **options):
        in_nf4 = any(isinstance(module, Linear4bit) for module in model.modules())
        seen.add((options["num_beams"], in_nf4))
        return generate(model, *args, **options)

    generate = CollavoForConditionalGeneration.generate
    monkeypatch.setattr(CollavoForConditionalGeneration, "generate", noted)
    evaluated(world, *flags, "--max_images", "1", "--tasks", "class_to_binary")
    assert seen == {(beams, quantized)}


SIDES = st.tuples(st.integers(0, 320), st.integers(0, 320)).filter(lambda pair: pair[0] != pair[1]).map(sorted)


@given(SIDES, SIDES, st.sampled_from([(12, 12), (3, 7), (1, 2)]))
def test_the_bound_of_cell_lines_is_the_best_of_all_boxes_of_whole_cells(x, y, grid_hw):
    box = (x[0] / 320, y[0] / 320, x[1] / 320, y[1] / 320)
    rows, columns = grid_hw
    best = max(
        box_iou((left / columns, top / rows, right / columns, bottom / rows), box)
        for left, right in itertools.combinations(range(columns + 1), 2)
        for top, bottom in itertools.combinations(range(rows + 1), 2)
    )
    assert overlap_on_cell_lines(box, grid_hw) == pytest.approx(best)


def test_boxes_are_reported_beside_what_cell_lines_and_two_decimals_can_reach():
    def located(category: str, boxes) -> Answered:
        truth = ", ".join(format_box(box, (1, 1)) for box in boxes)
        question = Question("a", "class_to_box", (("human", "?"),), truth, category, "present", tuple(boxes))
        return judged(question, truth, JUDGE)

    answers = [
        located("dog", [(0.0, 0.0, 0.5, 1.0)]),  # on lines of a grid of 2 x 2
        located("cat", [(0.0, 0.0, 0.255, 0.5), (0.5, 0.5, 0.75, 1.0)]),  # half of a cell each
    ]
    figures = summarise(answers, (2, 2))["class_to_box"]
    assert figures["classes"]["dog"] == {"questions": 1, "score": 1.0, "cell_lines": 1.0, "two_decimals": 1.0}
    cat = figures["classes"]["cat"]
    assert cat["cell_lines"] == pytest.approx((0.51 + 0.5) / 2)
    assert cat["two_decimals"] == pytest.approx((0.255 / 0.26 + 1) / 2)
    assert figures["cell_lines"] == pytest.approx((1 + cat["cell_lines"]) / 2)
    assert "cell_lines" not in summarise(answers)["class_to_box"]
