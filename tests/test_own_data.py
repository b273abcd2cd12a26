"""Other people's data sets, with classes and layouts of their own, from build to answer, without a flag about classes.

`foreign` judges the rows; it shares no code with the package.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builds import PICTURE, CocoFolder, DataSet, build, planned, status_of, tiny_mask2former
from conftest import needs_tiny_base
from foreign import check_rows, rows_of
from layouts import ADE20K, ADE20K_LABELS, CITYSCAPES, CITYSCAPES_LABELS, Layout, ade20k, cityscapes
from PIL import Image

import collavo.chat
import collavo.evaluate
import collavo.train
from collavo.errors import UserError
from pipelines.records import Mention
from pipelines.sources import CocoSource, LlavaSource, read_coco, read_llava

CAMVID = Path(__file__).parents[2] / "shared" / "camvid"
TURNS = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "A person."}]
PUBLISHED = {
    "ade20k": (ade20k, ADE20K, ADE20K_LABELS),
    "cityscapes": (cityscapes, CITYSCAPES, CITYSCAPES_LABELS),
}


def shown_names(categories: list[dict[str, Any]]) -> dict[int, str]:
    return {category["id"]: category["name"].partition(",")[0].strip() for category in categories}


def sources(layout: Layout) -> list[object]:
    return [
        *("--coco_panoptic", *layout.json.values(), "--coco_images", *layout.images.values()),
        *("--coco_split", "train", "validation"),
    ]


@pytest.fixture(scope="module", params=PUBLISHED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def layout(name: str, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return PUBLISHED[name][0](tmp_path_factory.mktemp(name), 5)


@pytest.fixture(scope="module")
def built(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return build(tmp_path_factory.mktemp("built") / "out", *sources(layout))


def test_rows_of_a_published_layout_are_right(name: str, layout: Layout, built: DataSet) -> None:
    rows, names = rows_of(built.files), shown_names(PUBLISHED[name][1])
    for split, called in (("train", "train"), ("val", "validation")):
        assert check_rows(rows, layout.json[split], layout.masks[split], called, names) == 5
    assert not built.rejects


def test_a_missing_picture_is_not_taken_for_one_of_its_name_in_another_folder(tmp_path: Path) -> None:
    coco = CocoFolder(tmp_path / "coco")
    coco.add("a/0.jpg")
    coco.add("b/0.jpg", PICTURE)
    coco.flags()
    folder = str(coco.folder)
    source = CocoSource("coco", f"{folder}/panoptic.json", f"{folder}/images", f"{folder}/panoptic", {1: 0, 187: 119})
    mentions = [mention for mention in read_coco(source, folder) if isinstance(mention, Mention)]
    assert [mention.image_path for mention in mentions] == ["images/a/0.jpg", "images/b/0.jpg"]


def test_a_reject_names_the_file_that_its_line_is_in(tmp_path: Path) -> None:
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text(json.dumps({"conversations": TURNS}) + "\n{broken\n")
        source = LlavaSource("llava", str(tmp_path / name), str(tmp_path), name)
        _, reject = read_llava(source, str(tmp_path))
        assert not isinstance(reject, Mention)
        assert (reject.value.id, reject.value.detail.partition(": ")[0]) == ("line 2", str(tmp_path / name))


@pytest.mark.parametrize("written", ["d/a b.jpg", "{root}/d/a b.jpg", "file://{root}/d/a%20b.jpg"])
@pytest.mark.parametrize("root_written", ["{root}", "file://{root}/"])
def test_a_dialogue_names_its_picture_as_a_path_or_a_file_uri(tmp_path: Path, written: str, root_written: str) -> None:
    entry = {"image": written.format(root=tmp_path), "conversations": TURNS}
    (tmp_path / "l.json").write_text(json.dumps([entry]))
    source = LlavaSource("llava", str(tmp_path / "l.json"), root_written.format(root=tmp_path), "l.json")
    (mention,) = read_llava(source, str(tmp_path))
    assert isinstance(mention, Mention)
    assert (mention.image_path, mention.uri) == ("d/a b.jpg", f"{tmp_path}/d/a b.jpg")


def test_dialogues_about_annotated_pictures_need_no_network_of_the_same_classes(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text("[]")
    dialogues = ["--llava_json", tmp_path / "l.json", "--image_root", tmp_path, "--output", tmp_path / "out"]
    plan = planned(*sources(layout), *dialogues)
    assert plan.job.model is None and any("no network with these classes is named" in note for note in plan.notes)
    with pytest.raises(UserError, match="have different classes"):
        planned(*sources(layout), *dialogues, "--images", layout.images["train"])


@pytest.mark.slow
@needs_tiny_base
def test_a_model_of_a_published_layout_is_trained_judged_and_asked(
    built: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = ["--data", *map(str, built.files)], str(tmp_path / "run")
    collavo.train.main([*data, "--output_dir", run, "--max_steps", "2", "--batch_size", "4"])
    assert "so only image_cit learns" in capsys.readouterr().out
    collavo.evaluate.main(["--model", run, *data, "--max_images", "2"])
    assert "Counting" in capsys.readouterr().out
    image_id = next(iter(built.rows))
    collavo.chat.main(["--model", run, *data, "--image_id", image_id, "--prompt", "What is in this picture?"])
    things = [f"(#1 {s.category})" for s in built.rows[image_id].segments if s.numbering == 1]
    assert things and all(thing in capsys.readouterr().out for thing in things[:1])


def test_a_published_checkpoint_segments_in_its_own_classes(name: str, layout: Layout, tmp_path: Path) -> None:
    labels = PUBLISHED[name][2]
    checkpoint = tiny_mask2former(tmp_path / "checkpoint", labels)
    flags = ["--segmenter", "transformers", "--segmenter_checkpoint", checkpoint, "--segmenter_input_size", 64]
    data = build(tmp_path / "out", "--images", layout.images["train"], *flags, "--device", "cpu")
    things = {category["name"] for category in data.manifest["categories"]["categories"] if category["isthing"]}
    assert len(things) == sum(category["isthing"] for category in PUBLISHED[name][1])
    found = [segment for row in data.rows.values() for segment in row.segments]
    assert found
    for segment in found:
        assert segment.category == labels[segment.label].strip() and segment.category_id == segment.label
        assert segment.is_thing == (labels[segment.label].strip() in things)

    # The same classes in a file and in a checkpoint are one set, in other words two, until a map says which is which.
    both = ["--coco_panoptic", layout.json["val"], "--coco_images", layout.images["val"]]
    both += ["--images", layout.images["train"], "--segmenter_checkpoint", checkpoint]
    both += ["--segmenter_input_size", 64, "--device", "cpu"]
    if name == "ade20k":
        assert status_of(*both, "--output", tmp_path / "both") == 2
        theirs = {category["id"]: category["name"] for category in ADE20K}
        own = {label: theirs[i] for i, label in labels.items() if label.strip() != theirs[i].partition(",")[0]}
        (tmp_path / "map.json").write_text(json.dumps(own))
        both += ["--category_map", tmp_path / "map.json"]
    data = build(tmp_path / "both", *both)
    names = shown_names(PUBLISHED[name][1])
    assert all(names[s.category_id] == s.category for row in data.rows.values() for s in row.segments)
    annotated = [dict(row, split="val") for row in rows_of(data.files) if row["sources"] == ["coco"]]
    assert check_rows(annotated, layout.json["val"], layout.masks["val"], "val", names) == 5


@pytest.mark.slow
def test_rows_of_real_road_photographs_are_right(tmp_path: Path) -> None:
    if not CAMVID.is_dir():
        pytest.skip(f"needs {CAMVID}")
    splits = ("train", "val")
    layout = Layout(
        *({s: CAMVID / pattern.format(s) for s in splits} for pattern in ("panoptic_{}.json", "panoptic_{}", "{}"))
    )
    data = build(tmp_path / "out", *sources(layout))
    names = shown_names(json.loads(layout.json["train"].read_text())["categories"])
    rows = rows_of(data.files)
    assert check_rows(rows, layout.json["train"], layout.masks["train"], "train", names) == 567
    assert check_rows(rows, layout.json["val"], layout.masks["val"], "validation", names) == 101


def test_rows_of_a_semantic_network_count_nothing(tmp_path: Path) -> None:
    network = tiny_mask2former(tmp_path / "mask2former-cityscapes-semantic", CITYSCAPES_LABELS)
    config = json.loads((network / "config.json").read_text())
    (network / "config.json").write_text(json.dumps({**config, "input_size_hw": [64, 64]}))
    rng = np.random.default_rng(2)
    Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(tmp_path / "street.png")
    words = ["--images", tmp_path / "street.png", "--segmenter", "transformers", "--segmenter_checkpoint", network]
    notes = planned(*words, "--output", tmp_path / "out").notes
    assert any("all of its 19 classes are stuff" in note for note in notes)
    data = build(tmp_path / "out", *words)
    assert not any(category["isthing"] for category in data.manifest["categories"]["categories"])
    (row,) = data.rows.values()
    assert {instruction.task for instruction in row.instructions}.isdisjoint({"counting", "class_to_binary"})
