import json

import pytest

from collavo.instructions.english import _inflect
from schemas.categories import COCO_PANOPTIC

# COCO's detection classes are 1..90 without these, which were announced but never annotated.
NEVER_ANNOTATED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def test_eighty_things_come_before_fifty_three_stuff_classes():
    assert [category.is_thing for category in COCO_PANOPTIC] == [True] * 80 + [False] * 53
    assert COCO_PANOPTIC.semantic_indices == 134


def test_category_ids_are_those_of_coco_with_its_gaps():
    ids = [category.category_id for category in COCO_PANOPTIC]
    assert ids[:80] == [id_ for id_ in range(1, 91) if id_ not in NEVER_ANNOTATED]
    assert ids == sorted(set(ids))
    assert ids[80] == 92 and ids[-1] == 200


def test_labels_count_the_categories_without_gaps():
    assert [category.label for category in COCO_PANOPTIC] == list(range(133))
    assert all(COCO_PANOPTIC.by_category_id[category.category_id] is category for category in COCO_PANOPTIC)


def test_every_fact_agrees_with_a_published_annotation_file(real):
    published = json.loads((real / "coco" / "panoptic.json").read_text())["categories"]
    assert [(c.category_id, c.name, c.is_thing, list(c.color_rgb)) for c in COCO_PANOPTIC] == [
        (c["id"], c["name"], bool(c["isthing"]), c["color"]) for c in published
    ]


def test_display_names_and_colours_tell_the_classes_apart():
    assert len(COCO_PANOPTIC.by_display_name) == len({category.color_rgb for category in COCO_PANOPTIC}) == 133


@pytest.mark.parametrize(
    ("name", "display_name"),
    [
        ("person", "person"),
        ("tree-merged", "tree"),
        ("wall-other-merged", "wall"),  # two suffixes
        ("wall-brick", "wall-brick"),  # not a suffix but the material
        ("door-stuff", "door"),
        ("water-other", "water"),
    ],
)
def test_display_names_drop_what_only_coco_needs(name: str, display_name: str):
    assert COCO_PANOPTIC.by_display_name[display_name].name == name


def test_counted_forms_are_english():
    english = _inflect()
    exceptions = {"TV": "TVs"}  # inflect says TVS
    for thing in COCO_PANOPTIC.things:
        assert thing.plural == exceptions.get(thing.singular, english.plural_noun(thing.singular))
        assert thing.with_article == english.a(thing.singular)


@pytest.mark.parametrize(
    ("category_id", "count", "phrase"),
    [
        (1, 0, "0 people"),
        (1, 1, "1 person"),
        (1, 13, "13 people"),
        (87, 1, "1 pair of scissors"),  # a class whose name is a plural already
        (35, 2, "2 pairs of skis"),
        (56, 3, "3 pieces of broccoli"),  # a mass noun
        (20, 4, "4 sheep"),
    ],
)
def test_counts_read_as_people_say_them(category_id: int, count: int, phrase: str):
    assert COCO_PANOPTIC.by_category_id[category_id].counted(count) == phrase
