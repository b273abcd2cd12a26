"""Command lines that cannot work are refused in one line, before anything is read or written."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builds import planned, status_of

from collavo.errors import UserError
from collavo.parquet_writer import CrayonFileWriter
from pipelines.options import build_parser
from pipelines.records import Mention
from pipelines.sources import read_images
from schemas.categories import COCO_PANOPTIC
from schemas.crayon_row import TASKS


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    """A current folder with one of everything a flag could name."""
    monkeypatch.chdir(tmp_path)
    for folder in ("pictures", "masks", "p"):
        (tmp_path / folder).mkdir()
    for name in ("l.json", "pictures/a.jpg", "a_file"):
        (tmp_path / name).touch()
    for name in ("p.json", "q.json"):
        (tmp_path / name).write_text('{"images": [], "annotations": []}')
    other = [{"id": 1, "name": "dragon", "isthing": 1}, {"id": 2, "name": "lava", "isthing": 0}]
    (tmp_path / "other.json").write_text(json.dumps({"images": [], "annotations": [], "categories": other}))
    CrayonFileWriter((tmp_path / "rows.parquet").open("wb"), {}, COCO_PANOPTIC).close({})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "manifest.json").touch()
    (tmp_path / "p" / "b.txt").touch()
    (tmp_path / "t.json").write_text('{"counting": []}')
    return tmp_path


COCO = "--coco_panoptic p.json --coco_images pictures"

KNOWN = "--segmenter_checkpoint scenes"
"""Without it, these would ask a network that is not here."""

WRONG = [
    # unknown, misspelt, cut short
    ("--zzz 1", "unknown flag --zzz; --help lists those there are"),
    ("--segmentr auto", "unknown flag --segmentr; did you mean --segmenter?"),
    ("--outp x", "unknown flag --outp; did you mean --output?"),
    ("--direct_num_worker 2", "unknown flag --direct_num_worker; did you mean --direct_num_workers?"),
    ("pictures", "'pictures' belongs to no flag"),
    # values
    ("--scenes 0", "--scenes is 0, but must be at least 1"),
    ("--scene_size 320", "--scene_size: '320' is not like 640x480"),
    ("--batch_size -1", "--batch_size is -1"),
    ("--max_pixels 0", "--max_pixels is 0"),
    ("--max_pixels 99999999999", "--max_pixels is 99999999999, but must lie within 1 and 178956970"),
    ("--negative_ratio nan", "--negative_ratio is nan"),
    ("--validation_ratio 1.1", "--validation_ratio is 1.1, but must lie within 0 and 1"),
    ("--segmenter yolo", "--segmenter: invalid choice: 'yolo'"),
    ("--images pictures --device tpu", "--device: 'tpu' is not auto, cpu, cuda or cuda:N"),
    ("--images pictures --segmenter_input_size -64", "--segmenter_input_size is -64"),
    # files
    (f"{COCO} --coco_masks nowhere", "--coco_masks nowhere: there is no such file or folder"),
    (
        "--coco_panoptic q.json --coco_images pictures",
        "--coco_panoptic q.json: its masks are looked for in q, which is not there",
    ),
    ("--coco_panoptic nowhere.json --coco_images pictures", "--coco_panoptic nowhere.json: there is no such"),
    ("--coco_panoptic p.json --coco_images nowhere", "--coco_images nowhere: there is no such"),
    ("--llava_json nowhere.json --image_root pictures", "--llava_json nowhere.json: there is no such"),
    ("--llava_json l.json --image_root nowhere", "--image_root nowhere: there is no such"),
    ("--from_crayon pictures", "--from_crayon pictures: names no .parquet file"),
    ("--templates nowhere.json", "--templates: nowhere.json: cannot be read as JSON"),
    ("--templates t.json", "--templates: t.json: task 'counting' needs a list of at least one phrasing"),
    ("--output full", "--output full holds a data set already (full/manifest.json); --overwrite would replace it"),
    ("--output a_file", "--output a_file: is a file"),
    ("--output p", "--output p holds b.txt, which is not part of a data set"),
    (f"--images full/* --output full --overwrite {KNOWN}", "--images full/*: lies in --output full, which is replaced"),
    (f"--images nope://x/*.jpg {KNOWN}", "--images: nope://x: Protocol not known: nope"),
    # contradictions
    ("--coco_panoptic p.json", "--coco_images names 0 folders for 1 COCO files"),
    ("--coco_panoptic p.json p.json --coco_images p", "--coco_images names 1 folders for 2 COCO files"),
    (f"{COCO} --coco_masks p masks", "--coco_masks names 2 folders for 1 --coco_panoptic files"),
    ("--llava_json l.json", "--llava_json needs --image_root"),
    ("--coco_images pictures", "--coco_images acts only with COCO files"),
    (f"--images pictures --coco_masks p {KNOWN}", "--coco_masks acts only with --coco_panoptic"),
    ("--image_root pictures", "--image_root acts only with --llava_json or --images"),
    (f"--images pictures --scenes 5 {KNOWN}", "--scenes acts only where no source is named"),
    (f"{COCO} --scene_size 64x64", "--scene_size acts only where no source is named"),
    (f"--images pictures --coco_split train {KNOWN}", "--coco_split acts only with COCO files"),
    (f"{COCO} --coco_split train train", "--coco_split names 2 splits for 1 sources"),
    (f"{COCO} --coco_split test", "--coco_split: invalid choice: 'test'"),
    (f"--images pictures --llava_split train {KNOWN}", "--llava_split acts only with --llava_json"),
    (f"--images pictures --image_column x {KNOWN}", "--image_column acts only with --dataset"),
    (
        f"--dataset pictures --image_storage reference {KNOWN}",
        "--image_storage reference: what --dataset names holds its",
    ),
    ("--dataset pictures", "--dataset pictures: names no .parquet or .tar file"),
    (
        "--llava_json l.json --image_root p --segmenter_checkpoint s3://b/net",
        "--segmenter_checkpoint: s3://b/net: a network is read from a disk or the hub; copy it to a folder",
    ),
    ("--coco_panoptic p.json other.json --coco_images p p --coco_masks p p", "dragon"),
    (f"{COCO} --categories nowhere.json", "--categories: nowhere.json: there is no such file"),
    (f"{COCO} --category_map pictures", "--category_map: pictures: this is not a file"),
    (f"{COCO} --categories l.json", "--categories: l.json"),
    (f"{COCO} --category_map l.json", "--category_map: l.json: not JSON"),
    (f"{COCO} --category_map p.json", "--category_map: p.json: expected an object of names"),
    ("--from_crayon rows.parquet --device cuda", "--device acts only on images; --from_crayon reads finished rows"),
    ("--from_crayon rows.parquet --validation_ratio 0.2", "--validation_ratio acts only on images"),
    ("--images pictures --segmenter annotations", "--segmenter annotations needs --coco_panoptic"),
    (
        f"--images pictures --segmenter_config x.yaml {KNOWN}",
        "--segmenter_config acts only with --segmenter detectron2",
    ),
    ("--images pictures --segmenter detectron2 --segmenter_preset paper", "_preset acts only with --segmenter tr"),
    (f"{COCO} --segmenter_checkpoint x", "--segmenter_checkpoint: no model runs"),
    (f"{COCO} --model_copies 2", "--model_copies: no model runs"),
    ("--segmenter annotations --segmenter_checkpoint scenes", "--segmenter_checkpoint: no model runs"),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_command_line_is_refused_in_one_line(workspace, capsys, line, message):
    before = sorted(workspace.rglob("*"))
    assert status_of(*line.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("build_crayon.py: error: ") and message in shown.err
    assert sorted(workspace.rglob("*")) == before


def test_tasks_without_phrasings_are_refused(workspace, capsys):
    phrasing = {"id": "a", "question": "{plural}?", "present": "{count}", "absent": "none"}
    (workspace / "t.json").write_text(json.dumps({"counting": [phrasing]}))
    assert status_of("--templates", "t.json", "--tasks", "box_to_class") == 2
    assert "--tasks box_to_class: t.json has phrasings for counting only" in capsys.readouterr().err


def test_help_tells_of_every_flag_and_exits_well(capsys):
    assert status_of("--help") == 0
    text = capsys.readouterr().out
    flags = [option for action in build_parser()._actions for option in action.option_strings]
    assert len(flags) > 30
    for flag in flags:
        assert re.search(rf"(^|[\s,]){flag}\b", text), flag
    assert all(task in text for task in TASKS)
    assert "--runner DirectRunner" in text and "(default: " in text
    assert max(map(len, text.splitlines())) <= 120


def test_without_flags_scenes_are_drawn_beside_the_output(workspace):
    command = planned()
    assert command.scenes == "out_scenes"
    job = command.job
    assert job.model is not None and not job.use_annotations and job.output.embed_images
    assert [source.name for source in (*job.sources.coco, *job.sources.llava)] == ["scenes", "scenes"]


def test_masks_are_looked_for_beside_their_json(workspace):
    (source,) = planned(*COCO.split()).job.sources.coco
    assert source[:4] == ("coco", "p.json", "pictures", "p") and source.split == ""


def test_ids_count_from_the_folder_that_all_images_lie_in_however_it_is_written(workspace):
    line = [*"--coco_panoptic p.json --coco_images".split(), "{}/pictures", "--images", "{}/pictures/*.jpg"]
    roots = {planned(*(word.format(folder) for word in line)).job.sources.root for folder in (".", workspace, "p/..")}
    assert roots == {str(workspace / "pictures")}
    assert planned(*COCO.split(), "--llava_json", "l.json", "--image_root", "masks").job.sources.root == str(workspace)


def test_hidden_files_are_left_out_and_counted(workspace):
    (workspace / "pictures" / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/a-checkpoint.jpg", ".DS_Store"):
        (workspace / "pictures" / name).touch()
    plan = planned("--images", "pictures")
    assert plan.notes == ("pictures: 2 hidden files are left out",)
    mentions = [*read_images(plan.job.sources.images[0], plan.job.sources.root)]
    assert [mention.image_path for mention in mentions if isinstance(mention, Mention)] == ["a.jpg"]


def test_what_is_in_a_folder_without_a_data_set_is_said(workspace):
    (workspace / "saved").mkdir()
    for name in ("data-00000-of-00001.arrow", "state.json", "dataset_info.json"):
        (workspace / "saved" / name).touch()
    with pytest.raises(UserError, match=r"names no .parquet or .tar file, but 2 .json, 1 .arrow; .* to_parquet writes"):
        planned("--dataset", "saved")


def test_columns_of_a_data_set_that_nothing_is_taken_from_are_named(workspace):
    pq.write_table(pa.table({"image": [b"jpeg"], "caption": ["x"], "url": ["y"]}), "d.parquet")
    assert planned("--dataset", "d.parquet").notes == ("d.parquet: nothing is taken from the columns caption, url",)


def test_a_data_set_keeps_its_own_split_and_a_line_says_where_none_is_named(workspace):
    (workspace / "hub" / "data").mkdir(parents=True)
    for name in ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"):
        pq.write_table(pa.table({"image": [b"jpeg"]}), workspace / "hub" / "data" / name)
    (note,) = planned("--dataset", "hub").notes
    assert "hub/data/train-00000-of-00001.parquet says 'train' in its name" in note and "--dataset_split keeps" in note
    both = planned("--dataset", "hub/data/train-*", "hub/data/val*", "--dataset_split", "train", "validation")
    assert both.notes == () and [source.split for source in both.job.sources.records] == ["train", "validation"]


def test_a_data_set_without_a_column_that_can_be_meant_names_the_flag(workspace):
    pq.write_table(pa.table({"left": [b"jpeg"], "right": [b"jpeg"]}), "d.parquet")
    with pytest.raises(UserError, match=r"--dataset d.parquet: has no column 'image', .*; --image_column names the"):
        planned("--dataset", "d.parquet")


def test_splits_are_those_of_the_sources_where_they_are_named_and_a_line_says_where_they_are_not(workspace):
    line = "--coco_panoptic p.json q.json --coco_images p p --coco_masks p p --coco_split train validation"
    assert [source.split for source in planned(*line.split()).job.sources.coco] == ["train", "validation"]
    (workspace / "val.json").write_text('{"images": [], "annotations": []}')
    unsaid = planned(*"--coco_panoptic val.json --coco_images p --coco_masks p".split())
    assert [source.split for source in unsaid.job.sources.coco] == [""]
    (note,) = [note for note in unsaid.notes if "--coco_split" in note]
    assert "val.json says 'val' in its name" in note


def test_classes_are_those_of_the_sources(workspace):
    line = "--coco_panoptic other.json --coco_images p --coco_masks p"
    assert [category.name for category in planned(*line.split()).job.categories] == ["dragon", "lava"]
    assert planned(*COCO.split()).job.categories == COCO_PANOPTIC


@pytest.mark.parametrize(
    ("line", "annotations", "model"),
    [
        ("", False, True),
        ("--segmenter transformers", False, True),
        ("--segmenter annotations", True, False),
        (COCO, True, False),
        ("--images pictures", True, True),
        (f"{COCO} --images pictures", True, True),
        (f"{COCO} --images pictures --segmenter annotations", True, False),
        (f"{COCO} --segmenter transformers", False, True),
        (f"{COCO} --llava_json l.json --image_root pictures", True, True),
        ("--from_crayon rows.parquet", True, False),
    ],
)
def test_a_model_is_used_where_annotations_are_not_all_there_is(workspace, line, annotations, model):
    job = planned(*line.split()).job
    assert (job.use_annotations, job.model is not None) == (annotations, model)


@pytest.mark.parametrize(
    ("line", "checkpoint"),
    [
        ("", "scenes"),
        ("--segmenter transformers", "scenes"),
        ("--segmenter_checkpoint mine", "mine"),
        ("--images pictures", None),
        ("--images pictures --segmenter_checkpoint scenes", "scenes"),
        (f"{COCO} --segmenter transformers", None),
    ],
)
def test_the_embedded_segmenter_is_for_scenes_drawn_here_and_where_it_is_named(workspace, line, checkpoint):
    """Without a checkpoint, the segmenter's own default is taken: the paper's."""
    model = planned(*line.split()).job.model
    assert model is not None
    assert model.load.keywords.get("checkpoint") == checkpoint
    assert "input_size" not in model.load.keywords


def test_flags_reach_the_segmenter_that_they_are_for(workspace):
    line = "--images pictures --segmenter_checkpoint x --segmenter_input_size 96 --segmenter_preset paper --device cpu"
    model = planned(*f"{line} --batch_size 3 --max_batch_pixels 9 --model_copies 2".split()).job.model
    assert model is not None
    assert model.load.args == ("transformers",)
    options = model.load.keywords
    assert options.pop("thresholds").like_transformers
    classes = {"categories": COCO_PANOPTIC, "category_map": None}
    assert options == {"checkpoint": "x", "input_size": 96, "device": "cpu", "batch_size": 3, **classes}
    assert (model.batch_size, model.max_batch_pixels, model.model_copies) == (3, 9, 2)
    line = "--images pictures --segmenter detectron2 --segmenter_config c.yaml --segmenter_checkpoint w.pkl"
    model = planned(*line.split()).job.model
    assert model is not None
    assert (model.load.args, model.load.keywords) == (
        ("detectron2",),
        {"checkpoint": "w.pkl", "config": "c.yaml", "device": "auto", **classes},
    )


def test_what_was_asked_for_is_recorded(workspace):
    job = planned("--seed", "3", "--tasks", "counting", "--scenes", "7").job
    configuration = job.publication.configuration
    assert (configuration["seed"], configuration["tasks"], configuration["scenes"]) == (3, ("counting",), 7)
    assert configuration["runner"] == "DirectRunner"
    assert job.facts["instructions"]["seed"] == 3
    assert "scenes" not in planned(*COCO.split()).job.publication.configuration
