"""Sets of classes: what a number means is what its own file says, and names decide which sets are the same."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from builds import CocoFolder, planned
from layouts import ADE20K, ADE20K_LABELS, CITYSCAPES, CITYSCAPES_LABELS

from collavo.categories import (
    categories_of_annotations,
    categories_of_checkpoint,
    categories_of_file,
    categories_of_labels,
    common_set,
    joined,
    labels_by_id,
    read_categories,
)
from collavo.errors import UserError
from collavo.instructions.text import format_object, parse_objects
from schemas.categories import COCO_PANOPTIC, LEFT_OUT, CategorySet, name_key
from schemas.crayon_row import Segment

ROAD = [
    {"id": 0, "name": "sky", "isthing": 0},
    {"id": 7, "name": "traffic sign", "isthing": 1},
    {"id": 3, "name": "pedestrian", "isthing": 1},
    {"id": 4, "name": "bus", "isthing": 1},
]


def annotations(categories: object, where: str = "last") -> io.BytesIO:
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}
    if categories is not None:
        content = {**content, "categories": categories} if where == "last" else {"categories": categories, **content}
    return io.BytesIO(json.dumps(content).encode())


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_file_with_classes_of_its_own_keeps_its_numbers(where: str) -> None:
    found, groups = categories_of_annotations(annotations(ROAD, where), "road.json") or ((), None)
    assert isinstance(found, CategorySet) and not groups
    assert [(c.category_id, c.label, c.name) for c in found] == [
        (0, 0, "sky"), (7, 1, "traffic sign"), (3, 2, "pedestrian"), (4, 3, "bus"),
    ]  # fmt: skip
    assert [c.name for c in found.things] == ["traffic sign", "pedestrian", "bus"]
    assert found.semantic_indices == 5


def test_a_subset_of_coco_joins_it_whatever_its_numbers() -> None:
    some = [{"id": 1, "name": "Wall", "isthing": 0}, {"id": 2, "name": "person", "isthing": 1}]
    few, _ = categories_of_annotations(annotations(some), "few.json") or (None, None)
    assert few and joined(few) is COCO_PANOPTIC
    labels = labels_by_id(few, COCO_PANOPTIC)
    assert [COCO_PANOPTIC[labels[i]].name for i in (1, 2)] == ["wall-other-merged", "person"]


def test_a_class_of_another_kind_does_not_join() -> None:
    door = [{"id": 1, "name": "door", "isthing": 1}]  # COCO's door is stuff
    assert joined(read_categories(door, "doors.json")) is not COCO_PANOPTIC


@pytest.mark.parametrize("thing, stuff", [(1, 0), ("1", "0"), (True, False), ("true", "False"), (1.0, 0.0)])
def test_kinds_and_ids_are_read_as_people_write_them(thing: object, stuff: object) -> None:
    listed = [{"id": "3", "name": "sky", "isthing": stuff}, {"id": 4.0, "name": "car", "isthing": thing}]
    assert [(c.category_id, c.is_thing) for c in read_categories(listed, "x")] == [(3, False), (4, True)]


@pytest.mark.parametrize("categories", [None, []])
def test_a_file_may_state_no_classes(categories: object) -> None:
    assert categories_of_annotations(annotations(categories), "bare.json") is None


@pytest.mark.parametrize(
    "name, singular, plural, article",
    [
        ("person", "person", "people", "a"),  # COCO's own forms
        ("bus", "bus", "buses", "a"),  # also under a set of one's own; inflect takes it for a plural
        ("pedestrian", "pedestrian", "pedestrians", "a"),
        ("sneakers", "sneaker", "sneakers", "a"),  # named in the plural
        ("goggles", "pair of goggles", "pairs of goggles", "a"),
        ("food, solid food", "piece of food", "pieces of food", "a"),  # ADE20K counts it
        ("clothes", "piece of clothing", "pieces of clothing", "a"),
        ("trash can", "trash can", "trash cans", "a"),
        ("escalator", "escalator", "escalators", "an"),
        ("traffic_sign", "traffic sign", "traffic signs", "a"),  # underscores
        ("chest of drawers, chest", "chest of drawers", "chests of drawers", "a"),  # ADE20K's synonyms
        ("Delivery Van", "delivery van", "delivery vans", "a"),  # Objects365's capitals
        ("ox", "ox", "oxen", "an"),
        ("LORRY", "LORRY", "LORRIES", "a"),  # capitals, which inflect takes for an abbreviation
        ("WOMAN", "WOMAN", "WOMEN", "a"),
        ("CHILD", "CHILD", "CHILDREN", "a"),
        ("STRAWBERRY", "STRAWBERRY", "STRAWBERRIES", "a"),
        ("TRAFFIC_SIGN", "TRAFFIC SIGN", "TRAFFIC SIGNs", "a"),
        ("GLASSES", "pair of GLASSES", "pairs of GLASSES", "a"),
        ("LEAVES", "LEAF", "LEAVES", "a"),
        ("GAS", "GAS", "GASes", "a"),
        ("mouse (animal)", "mouse animal", "mouse animals", "a"),  # a parenthesis would end `(#1 name)`
    ],
)
def test_english_forms_come_by_rule(name: str, singular: str, plural: str, article: str) -> None:
    (found,) = read_categories([{"id": 1, "name": name, "isthing": 1}], "x")
    assert (found.singular, found.plural, found.article) == (singular, plural, article)


def test_forms_and_colours_of_the_file_come_first() -> None:
    given = {"id": 1, "name": "die", "isthing": 1, "singular": "die", "plural": "dice", "color": [1, 2, 3]}
    (found,) = read_categories([given], "x")
    assert found.counted(2) == "2 dice" and found.with_article == "a die" and found.color_rgb == (1, 2, 3)


def test_colours_are_distinct_and_stable() -> None:
    many = [{"id": i, "name": f"class {i}", "isthing": 1} for i in range(1203)]  # as many as LVIS has
    colors = [c.color_rgb for c in read_categories(many, "x")]
    assert len(set(colors)) == 1203
    assert [c.color_rgb for c in read_categories(many[:40], "x")] == colors[:40]


def test_a_set_travels_as_plain_values() -> None:
    for found in (read_categories(ROAD, "road"), COCO_PANOPTIC):
        records = json.loads(json.dumps(found.as_records()))
        assert CategorySet.from_records(found.name, records) == found
        assert [(c.name, c.is_thing) for c in read_categories(records, "again")] == [
            (c.name, c.is_thing) for c in found
        ]


@pytest.mark.parametrize(
    "categories, complaint",
    [
        ([{"id": 1, "name": "car"}], "does not say 'isthing'"),
        ([{"id": "one", "name": "car", "isthing": 1}], "whole number 'id'"),
        ([{"id": 1, "name": "car", "isthing": "stuff"}], "'isthing' of category 'car' should be 1 or 0, it is 'stuff'"),
        ([{"id": 1, "name": "car", "isthing": 2}], "should be 1 or 0"),
        ([*ROAD, {"id": "7", "name": "van", "isthing": 1}], "have the same id, 7"),
        ([*ROAD, {"id": 9, "name": "Bus", "isthing": 1}], "have the same name"),
        (
            [*ROAD, {"id": 9, "name": "bus-other", "isthing": 1}],
            "the same name but for .*, bus; rename one of",
        ),
        (
            [*ROAD, {"id": 9, "name": "bus, red", "isthing": 1}],
            "the same name but for .*, bus; rename one of",
        ),
        ([*ROAD, {"id": 0, "name": "van", "isthing": 1}], "have the same id, 0$"),
        ([{"id": 1, "name": "_", "isthing": 1}], "has a name without a letter to write; a 'display_name' gives it one"),
        ([{"id": 1, "name": "-other", "isthing": 1}], "has a name without a letter"),
        ([{"id": 1, "name": ",", "isthing": 0}], "has a name without a letter"),
        ([{"id": 1, "name": "car", "isthing": 1, "singular": 7}], "'singular' is 7, but should be a text"),
        ([{"id": 1, "name": "car", "isthing": 0, "display_name": ["a"]}], "'display_name' is .*, but should be a text"),
    ],
)
def test_what_is_no_set_is_refused_in_one_line(categories: object, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as refused:
        categories_of_annotations(annotations(categories), "bad.json")
    assert "\n" not in str(refused.value) and str(refused.value).startswith("bad.json")


@pytest.mark.parametrize("published, labels", [(ADE20K, ADE20K_LABELS), (CITYSCAPES, CITYSCAPES_LABELS)])
def test_published_checkpoints_say_which_classes_are_things(published: list[dict[str, Any]], labels: dict) -> None:
    """They name the classes of these data sets, some in other words, and not their kinds."""
    found = categories_of_labels(labels, "some/checkpoint")
    assert [c.is_thing for c in found] == [bool(c["isthing"]) for c in published]
    assert [c.category_id for c in found] == list(range(len(published)))


def test_a_checkpoint_of_unknown_kinds_is_refused() -> None:
    coco = {c.label: c.name for c in COCO_PANOPTIC}
    assert joined(categories_of_labels(coco, "some/checkpoint")) is COCO_PANOPTIC
    for labels in ({0: "cat", 1: "unicorn"}, {i: f"LABEL_{i}" for i in range(150)}):
        with pytest.raises(UserError, match="which of them are things; --categories"):
            categories_of_labels(labels, "some/checkpoint")


def test_a_checkpoint_states_its_set_in_any_form_that_is_documented(tmp_path: Path) -> None:
    labels = {0: "bus", 1: "Sky", 2: "pedestrian", 3: "traffic sign"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mask2former", "id2label": labels}))
    for content, name in (
        (ROAD, "here/categories.json"),
        ({"categories": ROAD}, "here/categories.json"),
        ({"categories": ROAD, "name": "road"}, "road"),
    ):
        (tmp_path / "categories.json").write_text(json.dumps(content))
        found = categories_of_checkpoint(tmp_path, "is/here")
        assert found.name == name and [c.is_thing for c in found] == [False, True, True, True]
        assert {labels[c.category_id].lower() == c.name for c in found} == {True}  # the network's numbers, not ROAD's
    other = [{**each, "name": "coach"} if each["name"] == "bus" else each for each in ROAD]
    (tmp_path / "categories.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"has no 'coach', so the ids .* 'sky' has number 1 there, and here 0; correct"):
        categories_of_checkpoint(tmp_path, "is/here")
    renamed = [{"id": n, "name": name if n else "coach", "isthing": 1} for n, name in labels.items()]
    (tmp_path / "categories.json").write_text(json.dumps(renamed))
    assert categories_of_checkpoint(tmp_path, "is/here").by_category_id[0].name == "coach"
    for broken in ("[", '{"classes": []}', '[{"name": "sky"}]'):
        (tmp_path / "categories.json").write_text(broken)
        with pytest.raises(UserError, match=r"^is/here/categories\.json: [^\n]+$"):
            categories_of_checkpoint(tmp_path, "is/here")


def test_a_set_says_the_kinds_of_a_checkpoint_that_is_used_with_it() -> None:
    labels = {0: "pedestrian", 1: "sky", 2: "unicorn"}
    found = categories_of_labels(labels, "some/checkpoint", read_categories(ROAD, "road"))
    assert [c.is_thing for c in found] == [True, False, True]


@pytest.mark.parametrize(
    ("name", "family", "labels", "are_stuff"),
    [
        ("facebook/mask2former-swin-large-cityscapes-semantic", "mask2former", CITYSCAPES_LABELS, True),
        ("facebook/mask2former-swin-large-cityscapes-panoptic", "mask2former", CITYSCAPES_LABELS, False),
        ("tue-mps/ade20k_semantic_eomt_large_512", "eomt", ADE20K_LABELS, True),
        ("semantic/ade20k_panoptic_eomt_large_640", "eomt", ADE20K_LABELS, False),
        ("facebook/maskformer-swin-large-ade", "maskformer", ADE20K_LABELS, True),
        ("facebook/maskformer-swin-large-coco", "maskformer", {c.label: c.name for c in COCO_PANOPTIC}, False),
    ],
)
def test_a_semantic_network_has_nothing_to_count(
    name: str, family: str, labels: dict[int, str], are_stuff: bool, tmp_path: Path
) -> None:
    """It gives one mask a class: every street would have one car."""
    cached = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "0a1b2c"
    cached.mkdir(parents=True)
    for folder in (tmp_path, cached):
        (folder / "config.json").write_text(json.dumps({"model_type": family, "id2label": labels}))
    found = categories_of_checkpoint(tmp_path, name)
    assert bool(found.things) is not are_stuff and len(found) == len(labels)
    assert [*categories_of_checkpoint(cached, f"{cached}/")] == [*found]  # as people name what they have downloaded
    counted = read_categories([{"id": 1, "name": "person", "isthing": 1}], "mine")
    stated = categories_of_checkpoint(tmp_path, name, counted)
    if are_stuff:
        with pytest.raises(UserError, match=r"'person': stuff there and a thing in mine"):
            labels_by_id(stated, counted, {c.name: "" for c in stated if c.name != "person"})


def test_sources_share_a_set_or_are_refused() -> None:
    road, some = read_categories(ROAD, "train.json"), read_categories(ROAD[:2], "val.json")
    assert common_set([some, road]) is road
    assert labels_by_id(some, road) == {0: 0, 7: 1}
    with pytest.raises(
        UserError, match=r"only the first has 'traffic sign' \(thing\), 'pedestrian' \(thing\); .*--category_map"
    ):
        common_set([COCO_PANOPTIC, road])


def test_a_map_brings_a_source_into_another_set() -> None:
    road = read_categories(ROAD, "road.json")
    renamed = {"traffic sign": "stop sign", "pedestrian": "person"}
    labels = labels_by_id(road, COCO_PANOPTIC, renamed)
    assert [COCO_PANOPTIC[labels[i]].display_name for i in (0, 7, 3, 4)] == ["sky", "stop sign", "person", "bus"]
    assert labels_by_id(road, COCO_PANOPTIC, {**renamed, "traffic sign": ""})[7] == LEFT_OUT
    with pytest.raises(UserError, match="COCO panoptic has no 'traffic sign', 'pedestrian'; --category_map"):
        labels_by_id(road, COCO_PANOPTIC)


def test_stuff_of_a_source_is_counted_in_no_other_set() -> None:
    stuff, thing = (read_categories([{"id": 1, "name": "door", "isthing": kind}], f"{kind}.json") for kind in (0, 1))
    with pytest.raises(UserError, match=r"0\.json: 'door': stuff there and a thing in 1\.json, where all of it"):
        labels_by_id(stuff, thing)
    assert labels_by_id(stuff, thing, {"door": ""}) == {1: LEFT_OUT}
    assert labels_by_id(thing, stuff) == {1: 0}


@pytest.mark.parametrize(
    "record", [{"name": "player #7"}, {"name": "C#"}, {"name": "d", "display_name": "door (shut)"}]
)
def test_names_are_read_in_object_lists_as_they_are_written(record: dict[str, Any]) -> None:
    categories = read_categories([{"id": 1, "isthing": 1, **record}], "own.json")
    name = categories[0].display_name
    written = Segment.of(categories[0], 1, (0.0, 0.0, 1.0, 1.0), 1, 2)
    assert parse_objects(format_object(written), categories.by_display_name) == [(name, 2, None)]


def test_a_file_of_the_users_is_a_list_or_an_annotation_file() -> None:
    for content in (ROAD, {"categories": ROAD}):
        found = categories_of_file("mine.json", b"\xef\xbb\xbf" + json.dumps(content).encode())
        assert [c.name for c in found] == [r["name"] for r in ROAD]
    with pytest.raises(UserError, match=r"mine.json: not JSON"):
        categories_of_file("mine.json", b"classes")


def test_names_are_compared_without_case_hyphens_and_suffixes() -> None:
    assert name_key("Wall-other-merged") == name_key("wall") == name_key(" WALL ")
    assert name_key("floor-wood") == name_key("floor wood") != name_key("floor-other-merged")
    assert name_key("road, route") == name_key("road")


def test_real_road_photographs_have_eleven_classes(real: Path) -> None:
    file = real.parent / "camvid" / "panoptic_train.json"
    if not file.exists():
        pytest.skip(f"needs {file}")
    with file.open("rb") as stream:
        found, _ = categories_of_annotations(stream, "camvid") or (None, None)
    assert found and [c.plural for c in found.things] == ["poles", "traffic signs", "cars", "pedestrians", "cyclists"]


@pytest.mark.parametrize(
    ("name", "singular", "plural"),
    [
        ("SUV", "SUV", "SUVs"),
        ("UFO", "UFO", "UFOs"),
        ("truck 2", "truck 2", "truck 2s"),
        ("\u9ce5", "\u9ce5", "\u9ce5"),
        ("\u0436\u0438", "\u0436\u0438", "\u0436\u0438"),
    ],
)
def test_abbreviations_and_other_scripts_get_no_wrong_plural(name: str, singular: str, plural: str):
    for given in ({"name": name}, {"name": "x", "singular": name}):
        (found,) = read_categories([{"id": 1, "isthing": 1, **given}], "x")
        assert (found.singular, found.plural) == (singular, plural)


def test_only_the_end_of_a_name_is_a_suffix():
    (found,) = read_categories([{"id": 1, "name": "non-stuffed toy", "isthing": 1}], "x")
    assert (found.display_name, found.plural) == ("non-stuffed toy", "non-stuffed toys")


def test_an_id_that_no_row_can_hold_is_refused():
    with pytest.raises(UserError, match="2147483647 at most"):
        read_categories([{"id": 1 << 40, "name": "tree", "isthing": 0}], "x")


def test_a_list_of_the_users_says_which_classes_are_things_where_files_do_not(tmp_path: Path) -> None:
    coco = CocoFolder(tmp_path)
    kinds = [{"id": 5, "name": "Robot", "isthing": 1}, {"id": 6, "name": "lawn", "isthing": 0}]
    coco.json["categories"] = [{"id": 1, "name": "robot"}, {"id": 187, "name": "Lawn"}]
    (tmp_path / "mine.json").write_text(json.dumps(kinds))
    output = ["--output", tmp_path / "out"]
    with pytest.raises(UserError, match="'robot' does not say 'isthing'"):
        planned(*coco.flags(), *output)
    plan = planned(*coco.flags(), *output, "--categories", tmp_path / "mine.json")
    assert [(c.name, c.is_thing) for c in plan.job.categories] == [("Robot", True), ("lawn", False)]
    assert plan.job.sources.coco[0].labels == {1: 0, 187: 1} and plan.notes == ()
    coco.json["categories"] = [{**each, "isthing": 0} for each in coco.json["categories"]]  # as Datumaro writes it
    (note,) = planned(*coco.flags(), *output).notes
    assert "all of its 2 classes are stuff (isthing: 0), so nothing is counted" in note


@pytest.mark.parametrize("project", ["fish", "Fish"])
def test_a_class_may_have_the_name_of_its_project_as_in_exports_of_roboflow(project: str) -> None:
    tree = [(project, "none"), ("fish", project), ("lobster trap", project)]
    listed = [{"id": number, "name": name, "supercategory": above} for number, (name, above) in enumerate(tree)]
    found = read_categories(listed, "x", are_things=True)
    assert [(c.category_id, c.label, c.name) for c in found] == [(1, 0, "fish"), (2, 1, "lobster trap")]
    with pytest.raises(UserError, match="'fish' and 'fish' have the same name"):
        read_categories([listed[1], {**listed[1], "id": 7}], "x", are_things=True)


def test_instance_files_that_list_the_classes_of_their_own_pictures_are_joined_by_a_list_of_all(tmp_path: Path) -> None:
    names = {"train": ["gear", "bolt"], "val": ["gear", "nut"], "all": ["nut", "bolt", "gear"]}
    for split, listed in names.items():
        categories = [{"id": number, "name": name} for number, name in enumerate(listed)]
        (tmp_path / f"{split}.json").write_text(json.dumps({"categories": categories}))
    flags = ["--coco_instances", tmp_path / "train.json", tmp_path / "val.json", "--coco_split", "train", "validation"]
    flags += ["--coco_images", tmp_path, tmp_path, "--output", tmp_path / "out"]
    with pytest.raises(UserError, match=r"only the first has 'nut' .* name a list of all with --categories"):
        planned(*flags)
    job = planned(*flags, "--categories", tmp_path / "all.json").job
    assert [source.labels for source in job.sources.coco] == [{0: 2, 1: 1}, {0: 2, 1: 0}]
    assert [c.is_thing for c in job.categories] == [True] * 3 and job.askable == {2}
