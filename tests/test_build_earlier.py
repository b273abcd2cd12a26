"""Builds that go on from earlier ones: data sets that are extended or merged, stopped builds, trials."""

import json
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builds import PICTURE, CocoFolder, DataSet, build, start, status_of, tiny_mask2former
from conftest import encoded, needs_scenes_model
from PIL import Image

from collavo.scenes import draw_scene, scene_seed
from collavo.sources.records import count_records
from pipelines.model_segmentation import BatchSegmenter
from schemas.crayon_row import CRAYON_SCHEMA


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> list[object]:
    """Flags for a network that is quick."""
    checkpoint = tiny_mask2former(tmp_path_factory.mktemp("checkpoint"))
    return ["--segmenter_checkpoint", checkpoint, "--segmenter_input_size", 64, "--device", "cpu"]


def pictures(folder: Path, names: range) -> Path:
    """Pictures of stripes, each another."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in names:
        picture = Image.linear_gradient("L").rotate(9 * i).resize((40, 30)).convert("RGB")
        (folder / f"{i}.png").write_bytes(encoded(picture))
    return folder


def refusal(capfd, *arguments: object) -> str:
    capfd.readouterr()
    assert status_of(*arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


def test_an_extended_data_set_is_what_one_build_of_all_would_be(network, tmp_path):
    first, both = pictures(tmp_path / "p", range(2)), pictures(tmp_path / "all", range(3))
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    (tmp_path / "l.json").write_text(json.dumps([{"id": "d", "image": "1.png", "conversations": turns}]))
    dialogues = ["--llava_json", tmp_path / "l.json", "--image_root", both]
    whole = build(tmp_path / "whole", "--images", both, *dialogues, *network)

    build(tmp_path / "out", "--images", first, *network)
    extended = build(tmp_path / "out", "--images", both, *dialogues, *network, "--extend")
    assert extended.manifest["inputs"] == {"crayon": 2, "folder": 3, "llava": 1}
    assert extended.manifest["merged"] == 2
    for name, row in whole.rows.items():
        of_extended = extended.rows[name]
        assert of_extended == row, name
    assert len(extended.rows) == 3

    again = build(tmp_path / "out", "--images", both, *network, "--extend")
    assert again.manifest["seconds"]["segment"] == 0  # the network saw nothing
    assert again.rows == extended.rows


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed", 1], "--seed 0 (now 1)"),
        (["--negative_ratio", 0.5], "--negative_ratio 1.0 (now 0.5)"),
        (["--segmenter_preset", "paper"], "--segmenter_preset unset (now paper)"),
        (["--overwrite"], "--extend and --overwrite contradict"),
    ],
)
def test_rows_made_otherwise_are_not_added(network, tmp_path_factory, capfd, flags, said):
    folder = tmp_path_factory.getbasetemp() / "to_extend"
    if not folder.exists():
        build(folder / "out", "--images", pictures(folder / "p", range(1)), *network)
    line = refusal(capfd, "--images", folder / "p", *network, "--output", folder / "out", "--extend", *flags)
    assert said in line


def test_only_a_data_set_can_be_extended(network, tmp_path, capfd):
    line = refusal(capfd, "--images", pictures(tmp_path, range(1)), "--output", tmp_path / "out", "--extend")
    assert "--extend" in line and "holds no data set" in line


def test_a_data_set_that_has_lost_a_file_is_not_taken_for_whole(network, tmp_path, capfd):
    flags = ["--images", pictures(tmp_path / "p", range(6)), *network, "--num_shards", 2]
    out = build(tmp_path / "out", *flags, "--validation_ratio", 0).folder
    (out / "train-00001-of-00002.parquet").rename(tmp_path / "lost.parquet")
    said = f"{out}: 1 of 2 files train-*.parquet; name them all, or build the data again"
    assert said in refusal(capfd, *flags, "--validation_ratio", 0, "--output", out, "--extend")
    assert said in refusal(capfd, "--from_crayon", out, "--output", tmp_path / "again")


def drafts_in(file: Path) -> int:
    """Count the whole drafts of a file that a stopped build has left."""
    with file.open("rb") as stream, suppress(pa.ArrowInvalid, OSError):
        return len([*pa.ipc.open_stream(stream)])
    return 0


def test_rows_without_pictures_are_extended_by_those_of_the_same_folder_only(network, tmp_path, capfd):
    folder = pictures(tmp_path / "p", range(2))
    flags = ["--images", folder, *network, "--image_storage", "reference"]
    build(tmp_path / "out", *flags)
    more = ["--images", folder, pictures(tmp_path / "q", range(3, 4)), *flags[2:], "--output", tmp_path / "out"]
    line = refusal(capfd, *more, "--extend")
    assert "was built with pictures below another folder, from which the paths of --image_storage" in line
    pictures(folder, range(3))
    extended = build(tmp_path / "out", *flags, "--extend").rows
    assert sorted(str(row.image_path) for row in extended.values()) == ["0.png", "1.png", "2.png"]


def test_a_killed_build_goes_on_where_it_was(network, tmp_path, capfd, monkeypatch):
    flags = ["--images", pictures(tmp_path / "p", range(9)), *network]
    seen = []
    segment_each = BatchSegmenter.segment_each
    monkeypatch.setattr(
        BatchSegmenter, "segment_each", lambda self, images: seen.extend(images) or segment_each(self, images)
    )
    whole = build(tmp_path / "whole", *flags)
    seen_by_the_whole = len(seen)
    kept = tmp_path / ".out.unfinished" / ".segmented"
    often = "import pipelines.spill; pipelines.spill._FILE_SECONDS = 0"
    process = start(*flags, "--output", tmp_path / "out", "--direct_num_workers", 1, changed=often)
    while len(list(kept.glob("*.arrow"))) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    files = [file for file in kept.glob("*.arrow") if drafts_in(file)]  # the last may have been cut by the kill
    assert len(files) >= 3
    files[0].write_bytes(files[0].read_bytes()[:-9])  # as a kill may leave it

    output = ["--output", tmp_path / "out"]
    assert "--resume uses the pictures, --discard removes all" in refusal(capfd, *flags, *output)
    line = refusal(capfd, *flags, *output, "--resume", "--segmenter_preset", "paper")
    assert "the stopped build had --segmenter_preset unset (now paper)" in line
    config = Path(network[1]) / "config.json"
    config.write_text(config.read_text() + " ")  # as of a checkpoint that was trained further in its folder
    assert "other classes, another --category_map or other files at" in refusal(capfd, *flags, *output, "--resume")
    config.write_text(config.read_text()[:-1])
    seen.clear()
    resumed = build(tmp_path / "out", *flags, "--resume")
    assert len(seen) <= seen_by_the_whole - (len(files) - 1)
    assert resumed.rows == whole.rows
    assert resumed.hashes == whole.hashes
    assert not kept.parent.exists()
    assert "no stopped build has left anything" in refusal(capfd, *flags, *output, "--overwrite", "--resume")


def test_a_build_that_fails_keeps_what_its_network_did(network, tmp_path, capfd):
    folder = pictures(tmp_path / "p", range(3))
    (folder / "broken.png").write_bytes(b"no picture")
    flags = ["--images", folder, *network, "--output", tmp_path / "out"]
    assert status_of(*flags, "--max_reject_ratio", 0) == 1
    kept, line = capfd.readouterr().err.splitlines()
    assert "of finished pictures are kept in" in kept and "--max_reject_ratio 0" in line
    resumed = build(tmp_path / "out", *flags[:-2], "--resume")
    assert len(resumed.rows) == 3 and resumed.manifest["seconds"]["segment"] == 0


@needs_scenes_model
def test_what_a_network_did_not_know_is_told_of_extended_and_merged_data_sets_too(real, tmp_path):
    network = ["--segmenter_checkpoint", "scenes", "--device", "cpu"]
    photograph = next((real / "coco").rglob("*.jpg"))
    known, unknown = tmp_path / "scene.png", tmp_path / "photograph.jpg"
    known.write_bytes(encoded(Image.fromarray(draw_scene(scene_seed(4_000_037, 0), (320, 240)).image)))
    unknown.write_bytes(photograph.read_bytes())
    build(tmp_path / "out", "--images", unknown, *network)
    extended = build(tmp_path / "out", "--images", known, *network, "--extend")
    merged = build(tmp_path / "merged", "--from_crayon", tmp_path / "out")
    assert [len(extended.rows), extended.manifest["unfamiliar"], merged.manifest["unfamiliar"]] == [2, 1, 1]


def test_data_sets_that_use_the_same_names_are_merged_without_a_loss(tmp_path):
    for name, first in (("a", 0), ("b", 1)):
        coco = CocoFolder(tmp_path / name)
        for i in range(2):
            coco.add(f"{i}.jpg", PICTURE + bytes([first + i]))  # 1.jpg of a is 0.jpg of b
        build(tmp_path / f"out_{name}", *coco.flags())
    merged = build(tmp_path / "out", "--from_crayon", tmp_path / "out_a", tmp_path / "out_b")
    assert merged.manifest["inputs"] == {"crayon": 4} and merged.manifest["merged"] == 1
    assert len(merged.rows) == 3
    assert all(re.fullmatch(r"[01](-[0-9a-f]{8})?\.jpg", name) for name in merged.rows)  # and no two are the same
    assert len({row.image_sha256 for row in merged.rows.values()}) == 3


def test_dialogues_about_nothing_do_not_meet_by_the_names_of_their_files(tmp_path):
    files = [tmp_path / folder / "l.json" for folder in ("x", "y")]
    for file in files:
        file.parent.mkdir()
        turns = [{"from": "human", "value": f"In {file.parent.name}?"}, {"from": "gpt", "value": "Yes"}]
        file.write_text(json.dumps([{"id": "0", "conversations": turns}]))
    flags = ["--image_root", tmp_path, "--segmenter", "none"]
    both = build(tmp_path / "both", "--llava_json", *files, *flags)
    assert set(both.rows) == {"x/l.json#0", "y/l.json#0"}
    build(tmp_path / "out", "--llava_json", files[0], *flags)
    extended = build(tmp_path / "out", "--llava_json", files[1], *flags, "--extend")
    assert len(extended.rows) == 2
    assert {row.conversations for row in extended.rows.values()} == {row.conversations for row in both.rows.values()}


def test_a_trial_takes_some_images_and_tells_of_all(tmp_path, capfd):
    coco = CocoFolder(tmp_path / "coco")
    for i in range(8):
        coco.add(f"{i}.jpg", PICTURE + bytes([i]))
    trial = build(tmp_path / "out", *coco.flags(), "--max_images", 2)
    assert len(trial.rows) == 2 and trial.manifest["trial"] == {"images": 2, "of": 8}
    assert trial.manifest["inputs"] == {"coco": 2}
    assert "A trial of 25.00% of 8 images" in " ".join(capfd.readouterr().out.split())
    assert build(tmp_path / "again", *coco.flags(), "--max_images", 2).rows == trial.rows


def test_a_trial_reads_the_head_of_a_data_set(tmp_path, network):
    data = DataSet(tmp_path / "first")
    build(data.folder, "--images", pictures(tmp_path / "p", range(4)), *network, "--validation_ratio", 0)
    trial = build(tmp_path / "out", "--dataset", data.folder, *network, "--max_images", 2)
    assert len(trial.rows) == 2 and trial.manifest["trial"] == {"images": 2, "of": 4}
    with data.files[0].open("rb") as file:
        assert count_records(file, data.files[0].name) == 4


@pytest.mark.parametrize("most, read", [(2, 2), (4, 4), (99, 6)])
def test_a_trial_of_many_files_reads_no_more_than_asked_and_says_how_many(tmp_path, capfd, most, read):
    (tmp_path / "shards").mkdir()
    for number in range(3):
        rows = [{"image": PICTURE + bytes([number, row])} for row in range(2)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shards" / f"{number}.parquet")
    flags = ["--dataset", tmp_path / "shards", "--segmenter", "none", "--max_images", most]
    trial = build(tmp_path / "out", *flags)
    assert len(trial.rows) == read and trial.manifest["trial"] == {"images": read, "of": 6}
    assert f"A trial of {read / 6:.2%} of 6 images" in " ".join(capfd.readouterr().out.split())


def test_a_picture_whose_finished_row_is_damaged_is_rejected_and_not_made_a_row_without_it(network, tmp_path):
    folder = pictures(tmp_path / "p", range(3))
    data = build(tmp_path / "out", "--images", folder, *network, "--validation_ratio", 0)
    records = pq.read_table(data.files[0]).to_pylist()
    records[1]["panoptic_map"] = None
    pq.write_table(pa.Table.from_pylist(records, CRAYON_SCHEMA), tmp_path / "damaged.parquet")
    again = build(tmp_path / "again", "--from_crayon", tmp_path / "damaged.parquet", "--images", folder, *network)
    assert len(again.rows) == 2 and all(row.has_image for row in again.rows.values())
    assert sorted(reject["reason"] for reject in again.rejects) == ["bad_value", "damaged_row"]
