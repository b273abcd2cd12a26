from collections import Counter

import numpy as np
import pytest
from conftest import CAR, PERSON, SKY
from hypothesis import given
from hypothesis import strategies as st

from collavo.panoptic.numbering import number_instances, numbered_order

# label, is_crowd, area, box_xyxy
Measured = tuple[int, bool, int, tuple[int, int, int, int]]


def numbered(segments: list[Measured]) -> list[tuple[int, int]]:
    """(position, numbering) of the segments in the order in which they are listed."""
    labels, crowds, areas, boxes = (np.array(column) for column in zip(*segments, strict=True))
    order = numbered_order(labels, crowds, areas, boxes)
    return list(zip(order.tolist(), number_instances(labels[order], crowds[order]).tolist(), strict=True))


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        # the largest is number 1, wherever it is
        ([(PERSON, False, 5, (0, 0, 5, 1)), (PERSON, False, 9, (9, 9, 12, 12))], [(1, 1), (0, 2)]),
        # equal areas: the higher one first
        ([(PERSON, False, 5, (0, 7, 5, 8)), (PERSON, False, 5, (9, 3, 14, 4))], [(1, 1), (0, 2)]),
        # equal areas at one height: the one further left first
        ([(PERSON, False, 5, (9, 3, 14, 4)), (PERSON, False, 5, (2, 3, 7, 4))], [(1, 1), (0, 2)]),
        # every class counts for itself, in the order of the labels
        ([(CAR, False, 9, (0, 0, 3, 3)), (PERSON, False, 1, (5, 5, 6, 6))], [(1, 1), (0, 1)]),
        # a crowd takes no number and comes after those that have one, however large
        ([(PERSON, True, 900, (0, 0, 30, 30)), (PERSON, False, 1, (5, 5, 6, 6))], [(1, 1), (0, 0)]),
        # stuff carries a 1 like any single segment
        ([(SKY, False, 9, (0, 0, 3, 3))], [(0, 1)]),
    ],
)
def test_segments_are_numbered_by_size_and_place(segments: list[Measured], expected: list[tuple[int, int]]):
    assert numbered(segments) == expected


def test_instances_after_the_twentieth_have_no_number():
    people = [(PERSON, False, 100 - i, (i, 0, i + 1, 1)) for i in range(23)]
    assert [number for _, number in numbered([*people, (CAR, False, 1, (0, 5, 1, 6))])] == [*range(1, 21), 0, 0, 0, 1]


@given(st.lists(st.tuples(st.sampled_from([PERSON, CAR]), st.booleans()), min_size=1, max_size=70))
def test_each_number_is_given_once_a_class(kinds: list[tuple[int, bool]]):
    segments = [(label, crowd, 1, (i, 0, i + 1, 1)) for i, (label, crowd) in enumerate(kinds)]
    numbers: dict[int, list[int]] = {PERSON: [], CAR: []}
    for position, number in numbered(segments):
        numbers[kinds[position][0]].append(number)
    countable = Counter(label for label, crowd in kinds if not crowd)
    for label, given_numbers in numbers.items():
        assert sorted(filter(None, given_numbers)) == list(range(1, min(countable[label], 20) + 1))
