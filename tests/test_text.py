import numpy as np
import pytest
from conftest import panoptic_maps, segment
from hypothesis import given
from hypothesis import strategies as st

from collavo.instructions.text import (
    ObjectMention,
    find_boxes,
    format_box,
    format_object,
    format_objects,
    format_objects_with_boxes,
    parse_objects,
)
from collavo.panoptic.maps import PanopticMap
from schemas.categories import COCO_PANOPTIC

# The listing that the paper prints.
PAPERS_LISTING = "(#1 person) [0.00, 0.16, 0.29, 0.88], (#2 person) [0.50, 0.10, 0.83, 0.81]"


def test_objects_are_written_as_in_the_paper():
    people = [
        segment(box_xyxy=(0, 16, 29, 88)),
        segment(id=2, numbering=2, box_xyxy=(50, 10, 83, 81)),
    ]
    assert format_objects_with_boxes(people, (100, 100)) == PAPERS_LISTING
    assert format_objects(people) == "(#1 person), (#2 person)"


def test_what_has_no_number_is_written_without_one():
    assert format_object(segment(numbering=0, is_crowd=True)) == "(person)"


@given(panoptic_maps(max_side=9), st.integers(1, 50), st.integers(1, 50))
def test_object_lists_are_read_back_as_they_were_written(panoptic: PanopticMap, times_x: int, times_y: int):
    height, width = panoptic.index_map.shape[0] * times_y, panoptic.index_map.shape[1] * times_x
    expected = []
    for segment_ in panoptic.segments:
        fractions = np.array(segment_.box_xyxy) / (width, height, width, height)
        box = tuple(float(f"{fraction:.2f}") for fraction in fractions)
        expected.append(ObjectMention(segment_.category, segment_.numbering, box))
        assert find_boxes(format_box(segment_.box_xyxy, (width, height))) == [box]
    names = COCO_PANOPTIC.by_display_name
    assert parse_objects(format_objects_with_boxes(panoptic.segments, (width, height)), names) == expected
    assert parse_objects(format_objects(panoptic.segments), names) == [m._replace(box=None) for m in expected]


@pytest.mark.parametrize(
    "text",
    [
        "(#1 person) ",  # trailing text
        "(#1 person).",
        "(#1 person),",
        "(#1 person), ",
        "(#1 person),(#2 person)",
        " (#1 person)",
        "(#1 person) [0.00, 0.10, 0.20, 0.30] and more",
        "(#1 person) [0.0, 0.1, 0.2, 0.3]",  # one decimal
        "(#1 person) [0.000, 0.100, 0.200, 0.300]",  # three
        "(#1 person) [0.00, 0.10, 0.20, 1.01]",  # out of the image
        "(#1 person) [-0.10, 0.10, 0.20, 0.30]",
        "(#1 person) [0.00,0.10,0.20,0.30]",
        "(#1 person) [0.00, 0.10, 0.20]",
        "(#1 person) [0.20, 0.10, 0.00, 0.30]",  # inside out
        "(#1 person) [0.00, 0.30, 0.20, 0.10]",
        "(#1 person) [0.00, 0.\u0661\u0660, 0.20, 0.30]",  # digits, but not of our alphabet
        "(#1 unicorn)",  # not a class
        "(#1 people)",
        "(#1 Person)",
        "(#1 wall-other-merged)",  # COCO's name, not the one that is displayed
        "(#0 person)",  # numbers start at 1
        "(#01 person)",
        "(#-1 person)",
        "(# person)",
        "#1 person",
        "((#1 person))",
    ],
)
def test_anything_else_is_refused(text: str):
    with pytest.raises(ValueError):
        parse_objects(text, COCO_PANOPTIC.by_display_name)


def test_a_refusal_quotes_the_place():
    with pytest.raises(ValueError, match=r"at character 13: '\(#2 unicorn\)'"):
        parse_objects("(#1 person), (#2 unicorn)", COCO_PANOPTIC.by_display_name)


def test_a_text_without_objects_is_an_empty_list():
    assert parse_objects("", COCO_PANOPTIC.by_display_name) == []


@pytest.mark.parametrize(
    ("answer", "boxes"),
    [
        (f"Sure, it is {PAPERS_LISTING}.", [(0.0, 0.16, 0.29, 0.88), (0.5, 0.1, 0.83, 0.81)]),
        ("[0.00, 0.00, 1.00, 1.00]", [(0.0, 0.0, 1.0, 1.0)]),
        ("a box [0.40, 0.10, 0.20, 0.30] turned inside out", []),
        ("[0.1, 0.2, 0.3, 0.4] has too few decimals", []),
        ("There is no person in the image.", []),
    ],
)
def test_boxes_are_found_anywhere_in_an_answer(answer: str, boxes: list):
    assert find_boxes(answer) == boxes
