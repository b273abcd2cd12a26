import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from collavo.errors import UserError
from collavo.scenes import Scene, SceneSegment, draw_scene, scene_seed, write_scenes
from collavo.scenes.__main__ import main
from collavo.scenes.drawing import Dice, Drawing, rasterize
from collavo.scenes.thing import DRAWABLE
from schemas.categories import COCO_PANOPTIC

SMALL = (96, 72)
STUFF = "sky tree grass sand sea snow road pavement building mountain fence table floor-wood rug window curtain"
WALLS = "wall wall-brick wall-tile"


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(scene_seed(3, index), SMALL) for index in range(80)]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "of" / "a run"
    write_scenes(folder, 12, size_wh=(160, 120), seed=5)
    return folder


def read_ids(path: Path) -> np.ndarray:
    red, green, blue = np.moveaxis(np.asarray(Image.open(path).convert("RGB")).astype(int), -1, 0)
    return red + 256 * green + 65536 * blue


# The scenes themselves


def test_a_seed_and_a_size_give_the_same_scene_again() -> None:
    one, other = draw_scene(11, (200, 150)), draw_scene(11, (200, 150))
    assert np.array_equal(one.image, other.image)
    assert np.array_equal(one.ids, other.ids)
    assert (one.segments, one.dialogues) == (other.segments, other.dialogues)
    assert not np.array_equal(one.image, draw_scene(12, (200, 150)).image)


def test_a_scene_does_not_depend_on_what_was_drawn_before_it() -> None:
    alone = "import sys; from collavo.scenes import draw_scene; sys.stdout.buffer.write(draw_scene(8, (80, 60)).image)"
    fresh = subprocess.run([sys.executable, "-c", alone], capture_output=True, check=True).stdout
    for seed in range(4):
        draw_scene(seed, (64, 64))
    assert draw_scene(8, (80, 60)).image.tobytes() == fresh


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**63), width=st.integers(32, 230), height=st.integers(32, 230))
def test_any_size_gives_a_whole_scene(seed: int, width: int, height: int) -> None:
    scene = draw_scene(seed, (width, height))
    assert scene.image.shape == (height, width, 3)
    assert scene.image.dtype == np.uint8
    assert scene.ids.shape == (height, width)
    assert sorted(np.unique(scene.ids[scene.ids > 0])) == sorted(s.id for s in scene.segments)
    assert np.mean(scene.ids == 0) < 0.01
    for segment in scene.segments:
        x, y, w, h = segment.box_xywh
        mask = scene.ids == segment.id
        assert mask.sum() == segment.area == mask[y : y + h, x : x + w].sum()
        assert mask[y].any() and mask[y + h - 1].any() and mask[:, x].any() and mask[:, x + w - 1].any()


def test_every_thing_and_stuff_that_can_be_drawn_turns_up(scenes: list[Scene]) -> None:
    seen = {s.category.display_name for scene in scenes for s in scene.segments}
    assert {kind.category.display_name for kind in DRAWABLE.values()} | set(f"{STUFF} {WALLS}".split()) <= seen
    assert len({kind.category.label for kind in DRAWABLE.values()}) >= 36


def test_scenes_vary_in_place_light_and_number_of_things(scenes: list[Scene]) -> None:
    assert len({scene.place for scene in scenes}) == 9
    assert {scene.time for scene in scenes} == {"morning", "day", "evening", "night"}
    assert {scene.weather for scene in scenes} == {"clear", "cloudy", "rainy", "snowy"}
    counts = [sum(s.category.is_thing for s in scene.segments) for scene in scenes]
    assert 4 <= np.percentile(counts, 10) <= np.percentile(counts, 90) <= 16
    of_one_class = [max(Counter(s.category_id for s in scene.segments).values()) for scene in scenes]
    assert max(of_one_class) > 20
    assert any(s.is_crowd for scene in scenes for s in scene.segments)


def test_stuff_is_one_segment_per_class_and_things_can_be_seen(scenes: list[Scene]) -> None:
    least = 0.0012 * SMALL[0] * SMALL[1]
    for scene in scenes:
        stuff = [s.category_id for s in scene.segments if not s.category.is_thing]
        assert len(stuff) == len(set(stuff))
        things = [s for s in scene.segments if s.category.is_thing]
        assert all(s.area >= least for s in things) and not any(s.is_crowd for s in scene.segments if s not in things)


# Exactness of the masks


@pytest.mark.parametrize("name", sorted(DRAWABLE.keys() - {"bottle", "wine glass"}))
def test_a_mask_holds_the_pixels_that_are_painted_by_half_or_more(name: str) -> None:
    drawing = Drawing()
    DRAWABLE[name].draw(drawing, (200, 60, 50), Dice(4))
    sprite = rasterize(drawing, 40, turn_deg=20)
    assert np.array_equal(sprite.mask, np.asarray(sprite.picture.getchannel(3)) >= 128)


@given(rx=st.integers(8, 60), ry=st.integers(8, 60), turn_deg=st.integers(0, 90))
@settings(max_examples=40, deadline=None)
def test_a_mask_has_the_area_and_extent_of_the_shape(rx: int, ry: int, turn_deg: int) -> None:
    drawing = Drawing()
    drawing.oval(0, 0, rx, ry, (200, 60, 50), edge=False)
    mask = rasterize(drawing, 2 * max(rx, ry), turn_deg).mask
    c, s = np.cos(np.radians(turn_deg)), np.sin(np.radians(turn_deg))
    extent = 2 * np.hypot(rx * c, ry * s), 2 * np.hypot(rx * s, ry * c)
    assert mask.sum() == pytest.approx(np.pi * rx * ry, rel=0.05)
    assert [np.ptp(np.flatnonzero(mask.any(axis))) + 1 for axis in (0, 1)] == pytest.approx(extent, abs=1.5)


def test_a_hole_belongs_to_what_lies_behind() -> None:
    drawing = Drawing()
    DRAWABLE["donut"].draw(drawing, (200, 60, 50), Dice(4))
    holes, count = ndimage.label(~np.pad(rasterize(drawing, 90).mask, 1))
    assert count == 2
    assert (holes == 2).sum() == pytest.approx(np.pi * (90 * 0.15) ** 2, rel=0.15)


# What is said about them


def phrases(scene: Scene) -> dict[str, SceneSegment]:
    """The things a phrase can mean, worked out from the segments alone."""
    meant: dict[str, SceneSegment] = {}
    crowds = {s.category_id for s in scene.segments if s.is_crowd}
    by_class: dict[int, list[SceneSegment]] = {}
    for segment in scene.segments:
        if segment.category.is_thing and segment.category_id not in crowds:
            by_class.setdefault(segment.category_id, []).append(segment)
    for category_id, same in by_class.items():
        noun = COCO_PANOPTIC.by_category_id[category_id].singular
        if len(same) == 1:
            meant[f"the {noun}"] = same[0]
        else:
            meant[f"the largest {noun}"] = max(same, key=lambda s: s.area)
            meant[f"the {noun} furthest to the left"] = min(same, key=middle)
            meant[f"the {noun} furthest to the right"] = max(same, key=middle)
    return meant


def middle(segment: SceneSegment) -> float:
    return segment.box_xywh[0] + segment.box_xywh[2] / 2


def questions(scenes: list[Scene]) -> list[tuple[Scene, str, str]]:
    cleaned = []
    for scene in scenes:
        for dialogue in scene.dialogues:
            for (_, question), (_, answer) in zip(dialogue[::2], dialogue[1::2], strict=True):
                cleaned.append((scene, question.replace("<image>", "").strip().split("?")[0], answer.rstrip(".")))
    return cleaned


def test_colors_told_are_those_painted(scenes: list[Scene]) -> None:
    asked = 0
    for scene, question, answer in questions(scenes):
        if not question.startswith("What colour"):
            continue
        asked += 1
        about = {f"the {s.part} of {phrase}" if s.part else phrase: s for phrase, s in phrases(scene).items()}
        assert answer.lower().endswith(" and ".join(about[question.split(" ", 3)[3]].colors))
    assert asked > 33


def test_painted_colors_can_be_seen(scenes: list[Scene]) -> None:
    """By daylight the strongest channel of a plain red, green or blue thing is the one that is named."""
    channels, plain, seen = {"red": 0, "green": 1, "blue": 2}, ("car", "suitcase", "umbrella", "cup", "couch"), []
    for scene in (scene for scene in scenes if scene.time != "night"):
        for s in scene.segments:
            if s.category.name in plain and len(s.colors) == 1 and s.colors[0] in channels:
                seen.append(scene.image[scene.ids == s.id].mean(0).argmax() == channels[s.colors[0]])
    assert len(seen) > 8
    assert np.mean(seen) > 0.95


def test_sides_distances_and_sizes_told_are_true(scenes: list[Scene]) -> None:
    asked: Counter[str] = Counter()
    for scene, question, answer in questions(scenes):
        meant = phrases(scene)
        if match := re.fullmatch(r"Is (the .+) to the left or to the right of (the .+)", question):
            asked["side"] += 1
            side = "left" if middle(meant[match[1]]) < middle(meant[match[2]]) else "right"
            assert answer.lower() in (f"to the {side}", f"{match[1]} is to the {side} of {match[2]}".lower())
        elif match := re.fullmatch(r"Which (is nearer to the viewer|looks larger), (the .+) or (the .+)", question):
            asked[match[1]] += 1
            one, other = meant[match[2]], meant[match[3]]
            first = one.area > other.area
            if "nearer" in match[1]:
                assert one.base_y is not None and other.base_y is not None
                first = one.base_y > other.base_y
            assert answer.lower().startswith(match[2 if first else 3].lower())
    assert min(asked.values()) > 6 and len(asked) == 3


def test_what_things_stand_on_lies_below_them(scenes: list[Scene]) -> None:
    asked = 0
    for scene, question, answer in questions(scenes):
        match = re.fullmatch(r"What is (the .+) on", question)
        if not match:
            continue
        asked += 1
        thing = phrases(scene)[match[1]]
        bearer = next(s for s in scene.segments if s.id == thing.on)
        x, y, w, h = thing.box_xywh
        below = scene.ids[y + h : y + h + 3, x : x + w]
        assert np.mean(below == bearer.id) > 0.5
        assert answer.endswith({"sea": "water", "floor-wood": "wooden floor"}.get(n := bearer.category.display_name, n))
    assert asked > 6


def test_dialogues_leave_counts_boxes_and_presence_to_the_crayon(scenes: list[Scene]) -> None:
    for _, question, answer in questions(scenes):
        assert not re.search(r"(?i)how many|is there an? |are there|bounding|coordinates|list ", question)
        assert not re.search(r"[\[\]{}_]", question + answer)
        assert answer[0].isupper()


# The files


def test_files_are_coco_panoptic(data_set: Path) -> None:
    panoptic = json.loads((data_set / "panoptic.json").read_text())
    assert {"info", "licenses", "images", "annotations", "categories"} <= panoptic.keys()
    assert [(c["id"], c["name"], bool(c["isthing"])) for c in panoptic["categories"]] == [
        (c.category_id, c.name, c.is_thing) for c in COCO_PANOPTIC
    ]
    ids_seen = []
    images = {image["id"]: image for image in panoptic["images"]}
    assert len(images) == len(panoptic["annotations"]) == 12
    for annotation in panoptic["annotations"]:
        image = images[annotation["image_id"]]
        picture = Image.open(data_set / "images" / image["file_name"])
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (image["width"], image["height"]))
        ids = read_ids(data_set / "panoptic" / annotation["file_name"])
        assert ids.shape == (120, 160)
        listed = {info["id"]: info for info in annotation["segments_info"]}
        assert set(np.unique(ids)) - {0} == set(listed)
        for number, info in listed.items():
            rows, columns = np.nonzero(ids == number)
            left, top = columns.min(), rows.min()
            assert info["bbox"] == [left, top, columns.max() - left + 1, rows.max() - top + 1]
            assert info["area"] == len(rows)
            assert info["category_id"] in COCO_PANOPTIC.by_category_id
            assert info["iscrowd"] in (0, 1)
        ids_seen += listed
    assert all(any(number >> shift & 255 for number in ids_seen) for shift in (0, 8, 16))


def test_a_data_set_that_starts_later_holds_the_scenes_of_a_whole_one(data_set: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "late", 2, size_wh=(160, 120), seed=5, start=10)
    for name in ("images/scene-000010.jpg", "panoptic/scene-000011.png"):
        assert (tmp_path / "late" / name).read_bytes() == (data_set / name).read_bytes()
    whole, own = (json.loads((folder / "panoptic.json").read_text()) for folder in (data_set, tmp_path / "late"))
    assert (own["images"], own["annotations"]) == (whole["images"][10:], whole["annotations"][10:])
    drawn = draw_scene(scene_seed(5, 10), (160, 120))
    assert np.array_equal(read_ids(data_set / "panoptic" / "scene-000010.png"), drawn.ids)


def test_processes_draw_what_one_draws(tmp_path: Path) -> None:
    for processes in (1, 2):
        write_scenes(tmp_path / str(processes), 9, (64, 48), seed=3, processes=processes)
    one, two = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "1", tmp_path / "2")
    )
    assert one == two and len(one) == 20


def test_dialogues_are_llava_entries(data_set: Path) -> None:
    entries = json.loads((data_set / "dialogues.json").read_text())
    assert len({entry["id"] for entry in entries}) == len(entries) >= 12
    for entry in entries:
        assert entry.keys() == {"id", "image", "conversations"}
        assert (data_set / entry["image"]).is_file()
        turns = entry["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert re.fullmatch(r"<image>\n.+|.+\n<image>", turns[0]["value"])
        assert sum(turn["value"].count("<image>") for turn in turns) == 1
    assert len({entry["image"] for entry in entries}) == 12


# The command


def test_the_command_writes_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path / "new"), "--count", "2", "--size", "64x64", "--start", "4"]) == 0
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == [
        "new/dialogues.json",
        "new/images/scene-000004.jpg",
        "new/images/scene-000005.jpg",
        "new/panoptic.json",
        "new/panoptic/scene-000004.png",
        "new/panoptic/scene-000005.png",
    ]


def test_overwriting_replaces_scenes_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    write_scenes(folder, 3, size_wh=(64, 48))
    write_scenes(folder, 1, size_wh=(80, 48), seed=1, overwrite=True)
    assert [path.name for path in (folder / "images").iterdir()] == ["scene-000000.jpg"]
    assert Image.open(folder / "images" / "scene-000000.jpg").size == (80, 48)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt, which is no scene"):
        write_scenes(folder, 1, size_wh=(64, 48), overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_run_that_stops_halfway_leaves_nothing(tmp_path: Path) -> None:
    def stopping(indices: range) -> Iterator[int]:
        yield indices[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "scenes", 2, size_wh=(64, 48), progress=stopping)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--count", "2"], "--output is missing"),
        (["--output", "{}/new", "--count", "0"], "--count is 0, but must be at least 1"),
        (["--output", "{}/new", "--count", "2", "--size", "640x20"], "--size: '640x20' is not like 640x480"),
        (["--output", "{}/full", "--count", "2"], "--output: {}/full: the folder holds scenes; name another"),
        (["--output", "{}/full/dialogues.json", "--count", "2"], "is a file"),
        (["--output", "{}/full/dialogues.json/deeper", "--count", "2"], "dialogues.json is a file; name a folder"),
    ],
)
def test_a_wrong_command_line_gets_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "dialogues.json").write_text("[]")
    try:
        status: object = main([argument.format(tmp_path) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and message.format(tmp_path) in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_importing_scenes_loads_neither_torch_nor_beam() -> None:
    check = "import sys, collavo.scenes; sys.exit(bool({'torch', 'apache_beam'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
