from collections import Counter

import numpy as np
import pytest
from conftest import CAR, PERSON
from hypothesis import given
from hypothesis import strategies as st

from collavo.instructions.choose import (
    NEGATIVE_KINDS,
    ClassStatistics,
    draw_absent_things,
    stable_hash,
    stable_uniforms,
)
from schemas.categories import COCO_PANOPTIC

THING_LABELS = range(80)
IMAGES = st.lists(st.sets(st.sampled_from(THING_LABELS), max_size=6), max_size=12)


def statistics_of(images: list[set[int]]) -> ClassStatistics:
    statistics = ClassStatistics.of(len(COCO_PANOPTIC.things))
    for labels in images:
        statistics.add_image(sorted(labels))
    return statistics


def test_a_hash_is_the_same_on_every_machine_and_in_every_release():
    assert stable_hash("split", "000000142238") == 15309571440812524653
    assert stable_uniforms(2, 0, "a").tolist() == [0.9142498965983272, 0.2650564639330086]


def test_the_parts_of_a_hash_do_not_run_together():
    assert len({stable_hash("ab", "c"), stable_hash("a", "bc"), stable_hash("abc")}) == 3


@given(IMAGES)
def test_statistics_count_the_images_of_each_class_and_pair(images: list[set[int]]):
    together = statistics_of(images).together
    for label, other in [(0, 0), (0, 1), (1, 0), (79, 3), (3, 79)]:
        assert together[label, other] == sum({label, other} <= labels for labels in images)


@given(IMAGES, IMAGES, IMAGES)
def test_statistics_add_up_in_any_grouping(first: list[set[int]], second: list[set[int]], third: list[set[int]]):
    left, right = statistics_of(first), statistics_of(second)
    left.add(statistics_of(second))
    left.add(statistics_of(third))
    right.add(statistics_of(third))
    right.add(statistics_of(first))
    assert np.array_equal(left.together, statistics_of(first + second + third).together)
    assert np.array_equal(left.together, right.together)


@given(IMAGES, st.sets(st.sampled_from(THING_LABELS)), st.integers(0, 90), st.text(max_size=3))
def test_absent_classes_are_absent_and_drawn_once(images: list[set[int]], present: set[int], count: int, key: str):
    drawn = draw_absent_things(sorted(present), count, statistics_of(images), 0, key)
    assert len(drawn) == min(count, 80 - len(present))
    assert len(set(drawn)) == len(drawn) and not set(drawn) & present
    assert drawn == draw_absent_things(sorted(present), count, statistics_of(images), 0, key)


@given(st.integers(0, 80), st.text(max_size=3))
def test_a_longer_draw_begins_with_the_shorter_one(count: int, key: str):
    statistics = statistics_of([{0, 1}, {1, 2}, {5}])
    longer = draw_absent_things([PERSON], count + 1, statistics, key)
    assert longer[: min(count, 79)] == draw_absent_things([PERSON], count, statistics, key)


def test_draws_follow_the_weights_of_the_three_kinds():
    # Beside people: many cars, few dogs; chairs only without people.
    dog, chair = 16, 56
    images = [{PERSON, CAR}] * 60 + [{PERSON, dog}] * 20 + [{CAR}] * 20 + [{chair}] * 100
    statistics = statistics_of(images)
    drawn = Counter(draw_absent_things([PERSON], 1, statistics, image)[0] for image in range(6000))
    expected = {CAR: 1 / 3 + 80 / 200 + 60 / 80, dog: 1 / 3 + 20 / 200 + 20 / 80, chair: 1 / 3 + 100 / 200 + 0}
    assert len(NEGATIVE_KINDS) == 3 and set(drawn) == set(expected)
    for label, summed in expected.items():
        assert drawn[label] / 6000 == pytest.approx(summed / 3, abs=0.02)


def test_the_kinds_take_turns_within_an_image():
    images = [{PERSON, 2}] * 50 + [{1}] * 5000 + [{label} for label in range(3, 80)]
    statistics = statistics_of(images)
    draws = [draw_absent_things([PERSON], 3, statistics, image) for image in range(300)]
    assert all(2 in labels for labels in draws)  # the co-occurring kind: nothing else goes with people
    assert sum(1 in labels for labels in draws) > 270  # the popular kind


def test_a_data_set_that_knows_no_other_class_asks_for_any():
    drawn = {draw_absent_things([PERSON], 1, statistics_of([{PERSON}]), image)[0] for image in range(1500)}
    assert drawn == set(range(1, 80))
