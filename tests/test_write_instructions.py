import json
from collections import Counter
from dataclasses import replace

import pytest
from conftest import CAR, GRASS, PERSON, SCISSORS, SKY, panoptic_maps, segment
from hypothesis import given, settings
from hypothesis import strategies as st

from collavo.instructions.choose import ClassStatistics
from collavo.instructions.phrasebook import load_phrasebook
from collavo.instructions.text import ObjectMention, find_boxes, format_box, has_extent, parse_objects
from collavo.instructions.write import InstructionOptions, present_things, write_instructions
from collavo.panoptic.maps import PanopticMap
from schemas.categories import COCO_PANOPTIC
from schemas.crayon_row import TASKS, Instruction, Segment

BOOK = load_phrasebook()
EVERYTHING = InstructionOptions(max_instructions=1000)
MAPS = panoptic_maps(max_side=6, labels=(PERSON, PERSON, CAR, SCISSORS, SKY, GRASS))
SIZE_WH = (100, 100)


@pytest.fixture(scope="module")
def terse(tmp_path_factory):
    """A phrasebook whose questions are nothing but the name, or the box, that they are about."""
    path = tmp_path_factory.mktemp("phrasebook") / "terse.json"
    texts = {
        "counting": {"question": "{name}", "present": "{count}", "absent": "{count}"},
        "class_to_box": {"question": "{name}", "present": "{boxes}", "absent": "none"},
        "class_to_binary": {"question": "{name}", "present": "yes", "absent": "no"},
        "box_to_class": {"question": "{box}", "present": "{name}"},
        "list_objects": {"question": "?", "present": "{objects}"},
        "list_objects_with_boxes": {"question": "?", "present": "{objects_with_boxes}"},
    }
    path.write_text(json.dumps({task: [{"id": task, **entry}] for task, entry in texts.items()}))
    return load_phrasebook(path)


def size_of(panoptic: PanopticMap) -> tuple[int, int]:
    return panoptic.index_map.shape[1], panoptic.index_map.shape[0]


def people_and(*others: Segment, count: int = 2) -> list[Segment]:
    """Numbered people side by side, followed by others."""
    people = [segment(id=i, numbering=i, box_xyxy=(i, i, i + 20, i + 30), area=600 - i) for i in range(1, count + 1)]
    return [*people, *others]


def write(
    segments, options: InstructionOptions = EVERYTHING, image_id: str = "a", book=BOOK, statistics=None, size_wh=SIZE_WH
):
    statistics = statistics or ClassStatistics.of(len(COCO_PANOPTIC.things))
    return write_instructions(image_id, size_wh, segments, COCO_PANOPTIC, book, statistics, options)


def of_task(instructions: tuple[Instruction, ...], task: str) -> list[Instruction]:
    return [instruction for instruction in instructions if instruction.task == task]


@given(panoptic=MAPS, seed=st.integers(0, 9))
def test_every_answer_about_a_class_is_true(terse, panoptic: PanopticMap, seed: int):
    options = replace(EVERYTHING, seed=seed)
    instructions = write(panoptic.segments, options, book=terse, size_wh=size_of(panoptic))
    by_id = {s.id: s for s in panoptic.segments}
    for instruction in instructions:
        if instruction.task not in ("counting", "class_to_box", "class_to_binary"):
            continue
        category = COCO_PANOPTIC.by_display_name[instruction.question]
        members = [s for s in panoptic.segments if s.label == category.label]
        assert category.is_thing
        assert instruction.polarity == ("present" if members else "absent")
        assert instruction.segment_ids == tuple(s.id for s in members)
        if instruction.task == "class_to_binary":
            assert instruction.label == instruction.answer == ("yes" if members else "no")
            continue
        assert all(s.numbering and not s.is_crowd for s in members)
        if instruction.task == "counting":
            assert instruction.label == instruction.answer == str(len(members))
        else:
            boxes = ", ".join(format_box(by_id[id_].box_xyxy, size_of(panoptic)) for id_ in instruction.segment_ids)
            assert instruction.answer == (boxes or "none") and instruction.label is None


@given(panoptic=MAPS)
def test_all_that_can_be_asked_of_the_present_is_asked(terse, panoptic: PanopticMap):
    instructions = write(panoptic.segments, book=terse, size_wh=size_of(panoptic))
    asked = {task: [i.question for i in of_task(instructions, task) if i.polarity == "present"] for task in TASKS}
    present = {COCO_PANOPTIC[label].display_name for label in present_things(panoptic.segments, COCO_PANOPTIC)}
    crowded = {s.category for s in panoptic.segments if not s.numbering}
    assert all(has_extent(s.box_xyxy, size_of(panoptic)) for s in panoptic.segments)  # at most six pixels a side
    assert sorted(asked["class_to_binary"]) == sorted(present)
    assert sorted(asked["counting"]) == sorted(asked["class_to_box"]) == sorted(present - crowded)


@given(MAPS)
def test_a_box_that_is_asked_about_holds_one_thing(panoptic: PanopticMap):
    size_wh = size_of(panoptic)
    written = write(panoptic.segments, size_wh=size_wh)
    at_box: dict[tuple, list[Segment]] = {}
    for s in panoptic.segments:
        if s.is_thing:
            at_box.setdefault(find_boxes(format_box(s.box_xyxy, size_wh))[0], []).append(s)
    asked = []
    for instruction in of_task(written, "box_to_class"):
        (box,) = find_boxes(instruction.question)
        (thing,) = at_box[box]
        asked.append(thing.id)
        assert (instruction.label, instruction.polarity) == (thing.category, "present")
        assert instruction.segment_ids == (thing.id,)
        answer = instruction.answer.removeprefix("Sure, it is ").removesuffix(".")
        assert parse_objects(answer, COCO_PANOPTIC.by_display_name) == [
            ObjectMention(thing.category, thing.numbering, None)
        ]
    assert sorted(asked) == sorted(
        things[0].id for things in at_box.values() if len(things) == 1 and things[0].numbering
    )


@pytest.mark.parametrize("narrow", [(40, 40, 40.4, 60), (40, 40.1, 60, 40.4)])
def test_what_has_no_extent_as_text_is_counted_and_has_no_box(narrow: tuple[float, ...]):
    written = write([segment(id=1, box_xyxy=(0, 0, 10, 20)), segment(id=2, box_xyxy=narrow, numbering=2)])
    (counted,) = (i for i in of_task(written, "counting") if i.polarity == "present")
    assert counted.segment_ids == (1, 2)
    assert [i.segment_ids for i in of_task(written, "box_to_class")] == [(1,)]
    assert not [i for i in of_task(written, "class_to_box") if i.polarity == "present"]
    assert of_task(written, "list_objects") and not of_task(written, "list_objects_with_boxes")


def test_a_box_that_two_things_share_is_not_asked_about():
    there = {"box_xyxy": (40, 40, 60, 60)}
    segments = people_and(
        segment(id=3, numbering=3, **there),
        segment(id=4, numbering=4, box_xyxy=(40.3, 40, 60, 60)),  # the same in two decimals
        segment(id=5, label=CAR, box_xyxy=(1, 70, 9, 80)),
        segment(id=6, label=SCISSORS, box_xyxy=(1, 70, 9, 80)),
        segment(id=7, label=SKY, box_xyxy=(1, 1, 21, 31)),  # stuff is never asked about, so it leaves a person alone
    )
    assert {i.segment_ids for i in of_task(write(segments), "box_to_class")} == {(1,), (2,)}


def test_a_box_too_thin_to_be_seen_in_two_decimals_is_not_asked_about():
    segments = [segment(id=1, box_xyxy=(0, 0, 300, 400)), segment(id=2, numbering=2, box_xyxy=(0, 0, 3, 400))]
    written = write(segments, size_wh=(1000, 1000))
    assert [i.segment_ids for i in of_task(written, "box_to_class")] == [(1,)]


@given(MAPS)
def test_lists_in_answers_are_read_back_as_exactly_the_segments_they_rest_on(panoptic: PanopticMap):
    size_wh = size_of(panoptic)
    written = write(panoptic.segments, size_wh=size_wh)
    for instruction in written:
        if not instruction.answer.startswith("Sure, it is "):
            continue
        by_id = {s.id: s for s in panoptic.segments}
        with_boxes = instruction.task in ("class_to_box", "list_objects_with_boxes")
        assert parse_objects(
            instruction.answer.removeprefix("Sure, it is ").removesuffix("."), COCO_PANOPTIC.by_display_name
        ) == [
            ObjectMention(
                by_id[id_].category,
                by_id[id_].numbering,
                find_boxes(format_box(by_id[id_].box_xyxy, size_wh))[0] if with_boxes else None,
            )
            for id_ in instruction.segment_ids
        ]
        if instruction.task.startswith("list_objects"):
            assert instruction.segment_ids == tuple(s.id for s in panoptic.segments)
            assert instruction.label is None and instruction.polarity is None


@pytest.mark.parametrize(("segments", "listings"), [(0, 0), (1, 2), (30, 2), (31, 0)])
def test_a_list_that_would_be_empty_or_too_long_is_not_asked_for(segments: int, listings: int):
    written = write([segment(id=i, numbering=0) for i in range(segments)])
    assert sum(i.task.startswith("list_objects") for i in written) == listings


def test_a_class_with_a_crowd_or_more_than_twenty_instances_is_neither_counted_nor_located():
    crowd = segment(id=90, numbering=0, is_crowd=True)
    herd = [segment(id=100 + i, label=CAR, numbering=(i + 1) * (i < 20), box_xyxy=(i, 0, i + 9, 9)) for i in range(21)]
    written = write(people_and(crowd, *herd))
    assert {i.polarity for task in ("counting", "class_to_box") for i in of_task(written, task)} == {"absent"}
    yes = [i for i in of_task(written, "class_to_binary") if i.label == "yes"]
    assert len(yes) == 2
    assert {i.segment_ids[0] for i in of_task(written, "box_to_class")} == {1, 2, *range(100, 120)}


@pytest.mark.parametrize(
    ("label", "count", "phrase", "verb"),
    [
        (PERSON, 1, "1 person", "is"),
        (PERSON, 13, "13 people", "are"),
        (SCISSORS, 1, "1 pair of scissors", "is"),
        (SCISSORS, 3, "3 pairs of scissors", "are"),
    ],
)
def test_counts_are_answered_in_english(label: int, count: int, phrase: str, verb: str):
    segments = [replace(s, label=label) for s in people_and(count=count)]
    answers = set()
    for image in range(40):
        (counting,) = [i for i in of_task(write(segments, image_id=str(image)), "counting") if i.polarity == "present"]
        answers.add(counting.answer)
    assert answers == {f"There {verb} {phrase}.", f"{phrase}.", f"The image has {phrase}.", f"I can see {phrase}."}


def test_questions_about_absent_classes_are_english():
    umbrella = ClassStatistics.of(len(COCO_PANOPTIC.things))
    umbrella.add_image([25])
    options = InstructionOptions(tasks=("counting", "class_to_binary", "class_to_box"))
    written = [i for image in range(40) for i in write([], options, str(image), statistics=umbrella)]
    assert {i.answer for i in of_task(written, "counting")} >= {"There are 0 umbrellas.", "0 umbrellas."}
    assert {i.answer for i in of_task(written, "class_to_box")} == {"There is no umbrella in the image."}
    assert {i.question for i in of_task(written, "class_to_binary")} >= {"Is there an umbrella in the image?"}
    assert {i.answer for i in of_task(written, "class_to_binary")} == {"No."}


@pytest.mark.parametrize("ratio", [0, 0.3, 1.7])
def test_absent_classes_are_asked_for_at_the_ratio_that_is_set(ratio: float):
    options = replace(EVERYTHING, negative_ratio=ratio)
    segments = people_and(segment(id=50, label=CAR), segment(id=60, label=SCISSORS))
    polarities = {task: Counter() for task in ("counting", "class_to_box", "class_to_binary")}
    for image in range(400):
        for instruction in write(segments, options, str(image)):
            if instruction.task in polarities:
                polarities[instruction.task][instruction.polarity] += 1
    for counted in polarities.values():
        assert counted["present"] == 400 * 3
        assert counted["absent"] / counted["present"] == pytest.approx(ratio, abs=0.03)


def test_an_image_without_things_is_asked_for_an_absent_class_all_the_same():
    written = write([segment(label=SKY)])
    assert [i.polarity for i in of_task(written, "class_to_binary")] == ["absent"]
    assert not of_task(written, "box_to_class")


@pytest.mark.parametrize("cap", [1, 6, 13, 24])
def test_the_cap_is_honoured_and_costs_the_tasks_alike(cap: int):
    segments = people_and(
        *(segment(id=50 + i, label=i, box_xyxy=(i, 50, i + 9, 70)) for i in range(1, 9)), segment(id=99, label=SKY)
    )
    written = write(segments, replace(EVERYTHING, max_instructions=cap))
    assert len(written) == cap
    counts = Counter(i.task for i in written)
    available = Counter(i.task for i in write(segments))
    most = max(counts.values())
    assert all(counts[task] >= min(most - 1, available[task]) for task in TASKS)
    assert [i.task for i in written] == sorted((i.task for i in written), key=TASKS.index)


def test_only_the_tasks_asked_for_are_written_in_whatever_order_they_are_named():
    segments = people_and(segment(id=50, label=CAR))
    one = write(segments, InstructionOptions(tasks=("class_to_box", "counting"), max_instructions=3))
    other = write(segments, InstructionOptions(tasks=("counting", "class_to_box", "counting"), max_instructions=3))
    assert one == other and {i.task for i in one} == {"counting", "class_to_box"}


def test_a_seed_changes_phrasings_and_absent_classes():
    segments = people_and()
    written = {seed: write(segments, replace(EVERYTHING, seed=seed)) for seed in range(8)}
    assert len({tuple(i.template_id for i in w) for w in written.values()}) > 1
    assert len({tuple(i.question for i in w if i.polarity == "absent") for w in written.values()}) == 8


@settings(max_examples=50)
@given(MAPS, MAPS)
def test_other_images_matter_for_the_choice_of_absent_classes_alone(panoptic: PanopticMap, other: PanopticMap):
    alone, beside = ClassStatistics.of(len(COCO_PANOPTIC.things)), ClassStatistics.of(len(COCO_PANOPTIC.things))
    for statistics in (alone, beside):
        statistics.add_image(present_things(panoptic.segments, COCO_PANOPTIC))
    beside.add_image(present_things(other.segments, COCO_PANOPTIC))

    def present(statistics: ClassStatistics) -> list[Instruction]:
        written = write(panoptic.segments, statistics=statistics, size_wh=size_of(panoptic))
        return [instruction for instruction in written if instruction.polarity != "absent"]

    assert present(alone) == present(beside)
