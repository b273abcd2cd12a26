import io
import socket
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
from builds import tiny_mask2former
from conftest import needs_scenes_model
from PIL import Image
from tiny_model import scene_rows, write_crayon_file
from tiny_run import save_tiny_run

from collavo.chat import main
from collavo.errors import UserError
from collavo.inference import Picture, Request, load_answerer, picture_of_row
from collavo.panoptic.colors import crayon_color, crayon_overlay
from collavo.panoptic.thresholds import THRESHOLD_PRESETS
from collavo.runs import base_of
from collavo.segmenters import NoSegmenter, load_segmenter, open_segmenter
from schemas.categories import COCO_PANOPTIC

ROW = scene_rows(1)[0]
PICTURE = picture_of_row(ROW, None)
BLANK = Picture(PICTURE.image, NoSegmenter().segment([PICTURE.image])[0])
QUESTION = "What is in the image?"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run, a data file, and an image file."""
    folder = tmp_path_factory.mktemp("chat")
    image = folder / "scene.jpg"
    image.write_bytes(ROW.image_bytes)
    return save_tiny_run(folder / "run"), write_crayon_file(folder / "crayon.parquet", [ROW]), image


def answer(run, turns, picture=PICTURE, objects=PICTURE.objects, **options) -> str:
    answerer = load_answerer(str(run), torch.device("cpu"), **options)
    return answerer.answer([picture], [Request(0, turns, objects, 12)])[0]


def of_row(world, *flags: str) -> list[str]:
    run, data, _ = world
    return ["--model", str(run), "--data", str(data), "--image_id", ROW.image_id, "--max_new_tokens", "12", *flags]


def of_file(world, *flags: str) -> list[str]:
    run, _, image = world
    return ["--model", str(run), "--image", str(image), "--max_new_tokens", "12", *flags]


def said(capsys) -> str:
    return capsys.readouterr().out


def test_a_question_about_a_row_is_answered_with_the_rows_own_map(world, tmp_path, capsys):
    assert main(of_row(world, "--prompt", QUESTION, "--save_map", str(tmp_path / "map.png"))) == 0
    out = said(capsys)
    assert answer(world[0], [("human", QUESTION)]) in out
    for segment in ROW.segments:
        assert f"(#{segment.numbering} {segment.category})" in out
    with Image.open(tmp_path / "map.png") as saved:
        assert np.array_equal(np.asarray(saved), crayon_overlay(PICTURE.image, PICTURE.panoptic))


@pytest.mark.parametrize(
    "flags, objects, options",
    [
        ([], "", {}),  # as trained: with the phrase that nothing was recognised
        (["--object_list", "none"], None, {}),
        (["--beams", "3"], "", {"beams": 3}),
    ],
)
def test_an_image_file_is_segmented_here(world, capsys, flags, objects, options):
    assert main(of_file(world, "--segmenter", "none", "--prompt", QUESTION, *flags)) == 0
    out = said(capsys)
    assert "Nothing was recognised." in out
    assert answer(world[0], [("human", QUESTION)], BLANK, objects, **options) in out


def test_the_segmenter_is_the_one_asked_for(world, tmp_path, capsys):
    checkpoint = tiny_mask2former(tmp_path / "segmenter")
    flags = ["--segmenter_checkpoint", str(checkpoint), "--segmenter_preset", "paper", "--prompt", QUESTION]
    assert main(of_file(world, *flags)) == 0
    segmenter = load_segmenter(
        "mask2former", checkpoint=str(checkpoint), thresholds=THRESHOLD_PRESETS["paper"], device="cpu"
    )
    found = Picture(PICTURE.image, segmenter.segment([PICTURE.image])[0])
    assert found.panoptic.segments
    assert answer(world[0], [("human", QUESTION)], found, found.objects) in said(capsys)


@needs_scenes_model
def test_a_model_made_from_the_embedded_base_has_the_embedded_segmenter_and_others_the_papers(world, tmp_path):
    assert base_of(str(world[0])) == str(world[0].with_name("run-base"))
    (tmp_path / "export.json").write_text('{"base": "tiny"}')
    assert base_of(str(tmp_path)) == base_of("tiny") == "tiny"
    assert open_segmenter("auto", "cpu", base="tiny").facts["checkpoint"] == "scenes"
    for name, base in (("auto", "org/base"), ("mask2former", "tiny")):
        with pytest.raises(UserError, match="facebook/mask2former-swin-large-coco-panoptic"):
            open_segmenter(name, "cpu", base=base)


def test_a_conversation_remembers_until_told_to_forget(world, tmp_path, monkeypatch, capsys):
    run, _, image = world
    saved = tmp_path / "map.png"
    lines = ["", "Who?", "Where?", "/new", "Where?", "/nonsense", f"/map {saved}", "/image nowhere.jpg", "/objects",
             f"/image {image}", "/quit", "never asked"]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(of_row(world, "--segmenter", "none")) == 0
    out = said(capsys)
    first = answer(run, [("human", "Who?")])
    second = answer(run, [("human", "Who?"), ("gpt", first), ("human", "Where?")])
    afresh = answer(run, [("human", "Where?")])
    assert second != afresh
    position = 0
    for text in (first, second, afresh, "/objects", "nowhere.jpg: No such file", "(#1", "Nothing was recognised."):
        position = out.index(text, position)
    assert saved.exists()


def test_a_conversation_ends_with_its_input(world, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(of_row(world)) == 0


def test_the_map_lies_over_the_image_in_crayon_colours():
    shown = crayon_overlay(PICTURE.image, PICTURE.panoptic, opacity=1)
    index_map = PICTURE.panoptic.index_map
    assert np.array_equal(shown[index_map == 0], PICTURE.image[index_map == 0])
    for position, segment in enumerate(ROW.segments, start=1):
        color = crayon_color(COCO_PANOPTIC[segment.label], segment.numbering)
        assert (shown[index_map == position] == color).all()


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ([], "one of --image, --data with --image_id, or --gradio is needed; given: none of them"),
        (["--image", "scene.jpg", "--gradio"], "given: --image and --gradio"),
        (["--data", "crayon.parquet"], "--data and --image_id go together"),
        (["--data", "crayon.parquet", "--image_id", "nobody"], "--data: there is no row of --image_id nobody"),
        (["--image", "nowhere.jpg"], "--image: nowhere.jpg: No such file"),
        (["--image", "crayon.parquet"], "--image: crayon.parquet: not an image: it is a Parquet file"),
        (
            ["--image", "scene.jpg", "--segmenter_checkpoint", "./none"],
            "collavo.chat: error: --segmenter: ./none: there is no such folder",
        ),
        (["--image", "scene.jpg", "--max_new_tokens", "0"], "--max_new_tokens is 0, but must be at least 1"),
        (
            ["--image", "scene.jpg", "--segmenter", "none", "--save_map", "none/map.png"],
            "--save_map: none/map.png: the map",
        ),
        (["--image", "scene.jpg", "--model", "nowhere"], "nowhere: neither a folder nor a whole model in the cache"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(world, monkeypatch, capsys, flags, complaint):
    run, data, _ = world
    monkeypatch.chdir(data.parent)
    model = [] if "--model" in flags else ["--model", str(run)]
    assert main([*model, "--prompt", QUESTION, *flags]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("collavo.chat: error: ")]
    assert len(errors) == 1
    assert complaint in errors[0]


def test_the_page_answers_over_http(world):
    pytest.importorskip("gradio", reason="needs pip install 'collavo[demo]'")
    from gradio_client import Client, handle_file

    run, _, image = world
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--model", str(run), "--gradio", "--segmenter", "none", "--max_new_tokens", "12", "--port", str(port)]
    threading.Thread(target=main, args=[flags], daemon=True).start()
    for _ in range(100):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}").close()
            break
        except OSError:
            time.sleep(0.2)
    client = Client(f"http://127.0.0.1:{port}", verbose=False)
    client.predict(handle_file(str(image)), api_name="/choose")
    _, shown = client.predict(QUESTION, [], api_name="/ask")
    assert shown[-1]["content"][0]["text"] == answer(run, [("human", QUESTION)], BLANK, "")
