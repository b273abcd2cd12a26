import contextlib
import http.server
import io
import json
import re
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
from collavo.inference import Picture, Request, _Pieces, load_answerer, picture_of_row
from collavo.panoptic.colors import crayon_color, crayon_overlay
from collavo.panoptic.thresholds import THRESHOLD_PRESETS
from collavo.runs import base_of
from collavo.segmenters import UNFAMILIAR, NoSegmenter, load_segmenter, open_segmenter
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
        "transformers", checkpoint=str(checkpoint), thresholds=THRESHOLD_PRESETS["paper"], device="cpu"
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
    for name, base in (("auto", "org/base"), ("transformers", "tiny")):
        with pytest.raises(UserError, match="facebook/mask2former-swin-large-coco-panoptic"):
            open_segmenter(name, "cpu", base=base)


def test_a_conversation_remembers_until_told_to_forget(world, tmp_path, monkeypatch, capsys):
    run, _, image = world
    saved = tmp_path / "map.png"
    lines = ["", "Who?", "Where?", "/new", "Where?", "/nonsense", "/map", "/map ~/map.png", "/image nowhere.jpg",
             "/image", "/objects", f"/image {image}", "/quit", "never asked"]  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(of_row(world, "--segmenter", "none")) == 0
    out = said(capsys)
    first = answer(run, [("human", "Who?")])
    second = answer(run, [("human", "Who?"), ("gpt", first), ("human", "Where?")])
    afresh = answer(run, [("human", "Where?")])
    assert second != afresh
    position = 0
    told = "/nonsense is none of the commands", "/map needs the name of a file", f"Saved: {saved}"
    refused = "nowhere.jpg: No such file", "/image needs the name of a file"
    for text in (first, second, afresh, *told, *refused, "(#1", "Nothing was recognised."):
        position = out.index(text, position)
    assert saved.exists()


def test_a_conversation_forgets_its_first_turns_where_they_do_not_fit_the_model(world, monkeypatch, capsys):
    run, _, _ = world
    room = load_answerer(str(run), torch.device("cpu")).room_for_answer([("human", "")], PICTURE.objects, 10**9)
    long = "ab " * (room // 8)  # a token a letter: three of them leave no room for the fourth
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{long}\n" * 5 + "x" * 3000 + f"\n{QUESTION}"))
    assert main(of_row(world)) == 0
    out = said(capsys)
    assert "(The first 1 questions and answers no longer fit the model, and are forgotten.)" in out
    assert re.search(r"the question has \d+ tokens with its image, and the model takes 1024", out)
    answered = out.index("the question has")
    assert len(out[answered:].splitlines()) > 1  # and the conversation goes on


def test_bytes_that_are_no_text_are_refused_and_the_conversation_goes_on(world, monkeypatch, capsys):
    piped = io.TextIOWrapper(io.BytesIO(b"caf\xe9?\nWhere?\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", piped)
    assert main(of_row(world)) == 0
    out = said(capsys)
    assert answer(world[0], [("human", "Where?")]) in out[out.index("the question holds bytes that are not UTF-8") :]
    assert main(of_row(world, "--prompt", "caf\udce9?")) == 2
    assert "the question holds bytes that are not UTF-8" in capsys.readouterr().err


def test_an_interrupt_ends_an_answer_and_not_the_conversation(world, monkeypatch, capsys):
    shown = []

    def interrupted(pieces, text, stream_end=False):
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt
        finalized(pieces, text, stream_end)

    finalized = _Pieces.on_finalized_text
    monkeypatch.setattr(_Pieces, "on_finalized_text", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\nWhere?\n"))
    assert main(of_row(world)) == 0
    out = said(capsys)
    assert answer(world[0], [("human", "Where?")]) in out[out.index("(The answer was stopped") :]


def test_sampling_differs_by_seed_and_is_repeated_by_it(world, capsys):
    answers = []
    for seed in ("1", "1", "2"):
        assert main(of_row(world, "--prompt", QUESTION, "--temperature", "1.5", "--top_p", "0.95", "--seed", seed)) == 0
        answers.append(said(capsys).splitlines()[-1])
    assert answers[0] == answers[1] != answers[2]
    assert answer(world[0], [("human", QUESTION)]) not in answers


def test_an_object_list_that_training_did_not_have_is_said(world, capsys):
    line = "--object_list none: the model was trained with the object list for dialogues; answers without it may be "
    for flags, expected in ((["--object_list", "none"], True), ([], False)):
        assert main(of_row(world, "--prompt", QUESTION, *flags)) == 0
        assert (line in said(capsys)) == expected


@pytest.fixture
def web(world, monkeypatch):
    """A server of the world's folder, and of what else a URL may bring."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(world[2].parent))

        def do_GET(self):
            if self.path == "/endless":
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write(bytes(2**16))
            elif self.path == "/home":
                self.send_response(302)
                self.send_header("Location", f"file://{world[2]}")
                self.end_headers()
            elif self.path == "/silent":
                time.sleep(1)
            else:
                super().do_GET()

        def log_message(self, *_):
            pass

    monkeypatch.setattr("collavo.web.FETCH_SECONDS", 0.3)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_an_image_comes_from_a_url_within_bounds(world, web, capsys):
    flags = ["--model", str(world[0]), "--segmenter", "none", "--max_new_tokens", "12", "--prompt", QUESTION, "--image"]
    assert main([*flags, f"{web}/scene.jpg"]) == 0
    assert answer(world[0], [("human", QUESTION)], BLANK, "") in said(capsys)
    for path, complaint in (
        ("/nothing", "cannot be fetched: 404 File not found"),
        ("/endless", "more than 33554432 bytes"),
        ("/home", "cannot be fetched: "),
        ("/silent", "cannot be fetched: timed out"),
        ("/crayon.parquet", "not an image: it is a Parquet file"),
    ):
        assert main([*flags, f"{web}{path}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--image: {web}{path}: {complaint}" in line


def test_a_file_of_questions_is_answered_in_order_and_an_interrupted_run_goes_on(world, tmp_path, capsys):
    run, _, image = world
    asked = [
        {"id": "a", "image": str(image), "question": QUESTION},
        {"image": str(image), "text": "Who?", "label": "no one", "score": float("nan"), "answer": "Nobody."},
        "no JSON",
        {"id": "s", "image": "a\0b", "question": "\ud800"},
        {"id": "d", "image": "nowhere.jpg", "question": QUESTION},
        {"id": "e", "image": str(image), "question": "x" * 3000},
        {"id": "f", "image": str(image), "question": "Where?"},
    ]
    questions, answers = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    questions.write_text("\n".join(q if isinstance(q, str) else json.dumps(q) for q in asked) + "\n\n")
    flags = ["--model", str(run), "--segmenter", "none", "--max_new_tokens", "12", "--batch_size", "4"]
    flags += ["--questions", str(questions), "--answers", str(answers)]
    assert main(flags) == 0
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", 2, 3, "s", "d", "e", "f"]
    for line, question in ((lines[0], QUESTION), (lines[1], "Who?"), (lines[6], "Where?")):
        assert line["answer"] == answer(run, [("human", question)], BLANK, "")
        assert line.get("question", line.get("text")) == question
    assert list(lines[1]) == ["id", "image", "text", "label", "score", "answer"]  # all that the line held
    for line, error in zip(
        lines[2:6],
        ("not JSON", "image is missing, empty or no text", "nowhere.jpg: No such file", "tokens with its image"),
        strict=True,
    ):
        assert error in line["error"] and "answer" not in line
    out = said(capsys)
    assert "4 without an answer (line 3: not JSON" in out and "3 of 7 questions answered: " in out

    whole = answers.read_bytes()
    answers.write_bytes(whole[: whole.index(b'"id": "d"') + 5])  # killed in the middle of its fifth line
    assert main(flags) == 0
    assert answers.read_bytes() == whole
    assert "3 of 7 questions answered; an earlier run, of whichever model, took the first 4: " in said(capsys)
    asked[1]["text"] = "Whom?"
    questions.write_text("\n".join(q if isinstance(q, str) else json.dumps(q) for q in asked))
    assert main(flags) == 2
    assert f"--answers: {answers}: its line 2 answers no question of {questions}" in capsys.readouterr().err
    assert answers.read_bytes() == whole
    for other in (b'{"image": "other.jpg", "ques', whole[:9] + b"[]", b"[1, 2]"):  # of another file, all in one line
        answers.write_bytes(other)
        assert main(flags) == 2
        assert f"--answers: {answers}: its last line answers no question" in capsys.readouterr().err
        assert answers.read_bytes() == other
    assert main([*flags[:-1], str(questions)]) == 2
    assert f"--answers {questions}: is the file of the questions" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('[\n{"image": "a.jpg", "question": "?"},\n{"image": "b.jpg", "question": "?"}\n]', "a JSON list"),
        ('[{"image": "a.jpg", "question": "?"}]', "jq -c '.[]' makes lines of a list"),
        ("index\tquestion\timage\n1\t?\tAAAA\n", "holds no question; line 1: not JSON"),  # MMBench's layout
        ('{"id": 1, "image": "a.jpg", "conversations": []}', "line 1: question is missing"),
        ("\n", "it is empty"),
    ],
)
def test_a_file_without_a_question_is_refused_before_the_model_is_loaded(tmp_path, capsys, text, complaint):
    (tmp_path / "in").write_text(text)
    answers = tmp_path / "out.jsonl"
    assert main(["--model", "nowhere", "--questions", str(tmp_path / "in"), "--answers", str(answers)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("collavo.chat: error: --questions: ") and complaint in line and not answers.exists()


@needs_scenes_model
def test_a_file_of_questions_about_pictures_that_the_segmenter_does_not_know_says_so(world, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (72, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    questions = [{"image": str(tmp_path / "noise.png"), "question": question} for question in ("Who?", "Where?")]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, questions)))
    flags = ["--questions", str(tmp_path / "in"), "--answers", str(tmp_path / "out"), "--max_new_tokens", "2"]
    assert main(["--model", str(world[0]), "--segmenter_checkpoint", "scenes", *flags]) == 0
    assert f"of 1 pictures: {UNFAMILIAR}" in said(capsys)


def test_a_run_that_answers_nothing_fails(world, tmp_path, capsys):
    (tmp_path / "in").write_text('{"image": "nowhere.jpg", "question": "?"}\n' * 2)
    flags = ["--model", str(world[0]), "--questions", str(tmp_path / "in"), "--answers", str(tmp_path / "out")]
    assert main(flags) == 1
    assert f"none of 2 questions answered: {tmp_path}/out" in capsys.readouterr().err


def test_the_images_of_questions_stand_inside_their_root(world, tmp_path, capsys):
    run, _, image = world
    questions, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    images = ("scene.jpg", "../scene.jpg", "/etc/hostname", "nowhere.jpg")
    questions.write_text("".join(json.dumps({"image": name, "question": QUESTION}) + "\n" for name in images))
    flags = ["--model", str(run), "--segmenter", "none", "--max_new_tokens", "4", "--questions", str(questions)]
    flags += ["--answers", str(answers), "--image_root"]
    assert main([*flags, str(tmp_path / "unmounted")]) == 1
    assert "--image_root: " in (complaint := capsys.readouterr().err) and "is the disk of the images" in complaint
    assert not answers.read_bytes()  # so that the next run asks them all
    assert main([*flags, str(image.parent)]) == 0
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [("answer" in line, "error" in line) for line in lines] == [(True, False), *[(False, True)] * 3]
    assert lines[3]["error"].endswith("nowhere.jpg: there is no such file")


def test_a_gpu_without_memory_is_one_line_with_what_helps(world, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")

    monkeypatch.setattr("collavo.inference.Answerer.answer", full)
    assert main(of_row(world, "--prompt", QUESTION)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Tried to allocate 2.00 GiB" in line and "--max_new_tokens" in line and "--quantize" in line


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
        ([], "one of --image, --data with --image_id, --questions, or --gradio is needed; given: none of them"),
        (["--image", "scene.jpg", "--gradio"], "given: --image and --gradio"),
        (["--image", "scene.jpg", "--top_p", "0.9"], "give it a temperature above 0"),
        (["--image", "scene.jpg", "--temperature", "1", "--beams", "3"], "--beams searches the likeliest; choose one"),
        (["--questions", "in.jsonl", "--answers", "o", "--prompt", "Who?"], "--prompt is about a single picture"),
        (["--questions", "in.jsonl"], "--questions and --answers go together"),
        (["--questions", "nowhere.jsonl", "--answers", "o"], "--questions: nowhere.jsonl: No such file"),
        (["--data", "crayon.parquet"], "--data and --image_id go together"),
        (["--image_id", "somebody"], "--data and --image_id go together"),
        (
            ["--data", "crayon.parquet", "--image_id", "nobody"],
            "--data: there is no row of --image_id nobody; there is one of ",
        ),
        (["--image", "nowhere.jpg"], "--image: nowhere.jpg: No such file"),
        (["--image", "crayon.parquet"], "--image: crayon.parquet: not an image: it is a Parquet file"),
        (
            ["--image", "scene.jpg", "--segmenter_checkpoint", "./none"],
            "collavo.chat: error: --segmenter: ./none: there is no such folder",
        ),
        (
            ["--image", "scene.jpg", "--segmenter", "detectron2", "--segmenter_preset", "paper"],
            "--segmenter: detectron2 has no use for preset paper",
        ),
        (
            ["--image", "scene.jpg", "--segmenter", "none", "--segmenter_input_size", "64"],
            "--segmenter: none has no use for input_size 64",
        ),
        (
            ["--image", "scene.jpg", "--segmenter_config", "a.yaml"],
            "--segmenter: transformers has no use for config a.yaml",
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
    asked = [] if "--answers" in flags else ["--prompt", QUESTION]
    assert main([*model, *asked, *flags]) == 2
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
