import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import OWN_CLASSES, own_rows, scene_rows

from collavo.evaluation.judge import Judge, box_iou, matched_ious
from collavo.evaluation.questions import EVALUATED_TASKS, questions_of
from schemas.categories import COCO_PANOPTIC

JUDGE = Judge(COCO_PANOPTIC)

HUNDREDTHS = st.integers(0, 100).map(lambda n: n / 100)
BOXES = st.tuples(HUNDREDTHS, HUNDREDTHS, HUNDREDTHS, HUNDREDTHS).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


def test_the_true_answers_of_a_data_set_are_judged_right():
    for row in scene_rows(6):
        by_question = {(i.task, i.question): i.answer for i in row.instructions}
        for question in questions_of(row, [task for task in EVALUATED_TASKS if task != "dialogue"], JUDGE):
            judgement = JUDGE.judge(question.task, by_question[question.task, question.turns[-1][1]], question.truth)
            assert (judgement.score, judgement.correct) == (1.0, True), question


@pytest.mark.parametrize(
    "task, answer, truth, correct, read",
    [
        ("class_to_binary", "Yes.", "yes", True, "yes"),
        ("class_to_binary", "No, there is no dog.", "no", True, "no"),
        ("class_to_binary", "yes", "no", False, "yes"),
        ("class_to_binary", "Yesterday", "yes", False, None),  # a word, not the beginning of one
        ("class_to_binary", "I think yes", "yes", False, None),
        ("class_to_binary", "", "no", False, None),
        ("counting", "There are 13 people.", "13", True, "13"),
        ("counting", "There are thirteen people.", "13", True, "13"),
        ("counting", "There are no people.", "0", True, "0"),
        ("counting", "None.", "0", True, "0"),
        ("counting", "3.", "3", True, "3"),
        ("counting", "(#1 dog), (#2 dog)", "1", False, None),  # ordinals are no counts
        ("counting", "at [0.25, 0.50, 0.75, 1.00]", "0", False, None),  # nor are coordinates
        ("counting", "Someone", "1", False, None),
        ("box_to_class", "Sure, it is (#2 person).", "(#1 person)", True, "(#2 person)"),
        ("box_to_class", "Sure, it is (person).", "(#1 person)", True, "(person)"),
        ("box_to_class", "A hot dog on a plate", "(#1 hot dog)", True, "(hot dog)"),  # the longest name counts
        ("box_to_class", "a dog", "(#1 hot dog)", False, "(dog)"),
        ("box_to_class", "Two PEOPLE", "(#1 person)", True, "(person)"),
        ("box_to_class", "a pair of scissors", "(#1 scissors)", True, "(scissors)"),
        ("box_to_class", "a carpet", "(#1 car)", False, None),  # no class by its letters
        ("box_to_class", "(a gadget) or a TV", "(#1 tv)", True, "(tv)"),
        ("class_to_box", "There is no dog in the image.", "", True, "0 boxes"),
        ("class_to_box", "blue", "", False, None),
        ("class_to_box", "[0.00, 0.00, 0.50, 0.50]", "", False, "1 boxes"),
        ("class_to_box", "[0.50, 0.00, 0.10, 0.50]", "[0.10, 0.00, 0.50, 0.50]", False, None),  # inside out
        ("dialogue", "the car", "The car.", True, "car"),
        ("dialogue", "A", "A", True, "a"),  # an option, not an article
        ("dialogue", "car park", "The car.", False, "car park"),
        ("dialogue", "...", "The car.", False, None),
        ("dialogue", "25", "2.5", False, "25"),
        ("dialogue", "about -5.", "-5", False, "about -5"),
        ("dialogue", "5", "-5", False, "5"),
        ("dialogue", "12", "1/2", False, "12"),
        ("dialogue", "450", "$4.50", False, "450"),
        ("dialogue", "$4.50!", "4.50", True, "4.50"),
        ("dialogue", "1,000", "1000", True, "1000"),
        ("dialogue", "“是。”", "是", True, "是"),
    ],
)
def test_answers_are_read_strictly_and_compared_by_what_they_say(task, answer, truth, correct, read):
    judgement = JUDGE.judge(task, answer, truth)
    assert (judgement.correct, judgement.read) == (correct, read)


@pytest.mark.parametrize(
    "answer, score, correct",
    [
        ("(#1 dog) [0.00, 0.00, 0.50, 1.00], (#2 dog) [0.50, 0.00, 1.00, 1.00]", 1.0, True),
        ("[0.50, 0.00, 1.00, 1.00] [0.00, 0.00, 0.50, 1.00]", 1.0, True),  # the order is not asked for
        ("[0.00, 0.00, 0.50, 1.00]", 0.5, False),  # one is missing
        ("[0.00, 0.00, 0.50, 1.00], [0.50, 0.00, 1.00, 1.00], [0.00, 0.00, 0.50, 1.00]", 2 / 3, False),  # one too many
        ("[0.00, 0.00, 0.40, 1.00], [0.50, 0.00, 1.00, 1.00]", 0.9, True),  # 0.8 and 1
        ("[0.00, 0.00, 0.20, 1.00], [0.50, 0.00, 1.00, 1.00]", 0.7, False),  # 0.4 is no hit
    ],
)
def test_boxes_are_scored_by_overlap_with_missing_and_superfluous_ones_as_zero(answer, score, correct):
    truth = "[0.00, 0.00, 0.50, 1.00], [0.50, 0.00, 1.00, 1.00]"
    judgement = JUDGE.judge("class_to_box", answer, truth)
    assert judgement.score == pytest.approx(score)
    assert judgement.correct == correct


@given(st.lists(BOXES, min_size=1, max_size=4), st.lists(BOXES, min_size=1, max_size=4))
def test_boxes_are_matched_as_the_best_of_all_pairings(found, true):
    fewer, more = sorted((found, true), key=len)
    best = max(
        sum(box_iou(one, other) for one, other in zip(fewer, chosen, strict=True))
        for chosen in itertools.permutations(more, len(fewer))
    )
    ious = matched_ious(found, true)
    assert len(ious) == len(fewer)
    assert ious.sum() == pytest.approx(best)


@given(BOXES, BOXES)
def test_the_overlap_of_boxes_is_that_of_their_cells(first, second):
    grids = []
    for box in (first, second):
        x_min, y_min, x_max, y_max = (round(100 * edge) for edge in box)
        grid = np.zeros((100, 100), dtype=bool)
        grid[y_min:y_max, x_min:x_max] = True
        grids.append(grid)
    union = (grids[0] | grids[1]).sum()
    expected = (grids[0] & grids[1]).sum() / union if union else float(first == second)
    assert box_iou(first, second) == pytest.approx(expected)


def test_answers_about_other_classes_are_judged_by_their_names():
    judge = Judge(OWN_CLASSES)
    for row in own_rows(6):
        by_question = {(i.task, i.question): i.answer for i in row.instructions}
        for question in questions_of(row, [task for task in EVALUATED_TASKS if task != "dialogue"], judge):
            answer = by_question[question.task, question.turns[-1][1]]
            assert judge.judge(question.task, answer, question.truth).correct, question
            assert question.category in {category.display_name for category in OWN_CLASSES.things}
    assert judge.judge("box_to_class", "two traffic cones", "(#1 traffic cone)").correct
    assert judge.judge("box_to_class", "a person", "(#1 car)").read is None  # which this set has not


def test_every_thing_is_known_by_its_name_its_singular_and_its_plural():
    for category in COCO_PANOPTIC.things:
        for form in (category.display_name, category.with_article, category.counted(3)):
            assert JUDGE.named_category(f"I can see {form} there.") == category, form
