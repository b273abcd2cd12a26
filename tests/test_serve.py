"""OpenAI's own client gets from the server what it gets from OpenAI: answers, pieces, refusals."""

import dataclasses
import http.server
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from signal import SIGINT

import openai
import pytest
import torch
from conftest import encoded
from PIL import Image
from serving import data_url, served, user
from test_chat import BLANK, PICTURE, answer
from tiny_model import OWN_CLASSES, own_rows
from tiny_run import save_tiny_run

from collavo import server, web
from collavo.chat import Session
from collavo.inference import Request, load_answerer, picture_of_row
from collavo.runs import load_base
from collavo.segmenters import UNFAMILIAR
from collavo.serve import main

QUESTION, URL = "What is in the image?", data_url(encoded(Image.fromarray(PICTURE.image)))
ASKED = user(QUESTION, URL)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run, and a server of it that recognises nothing."""
    run = save_tiny_run(tmp_path_factory.mktemp("serve") / "run")
    with served(run, "--segmenter", "none") as (client, session):
        yield run, client, session


@pytest.fixture
def ask(world):
    def ask(*messages, **options):
        options = {"model": "run", "messages": list(messages or [ASKED]), "max_tokens": 12, **options}
        return world[1].chat.completions.create(**options)

    return ask


@pytest.fixture
def passes(world):
    """Grows by one with every pass through the model, of which a token takes one."""
    seen = []
    hook = world[2].answerer.model.get_base_model().register_forward_hook(lambda *_: seen.append(1))
    yield seen
    hook.remove()


def text_of(completion) -> str:
    return completion.choices[0].message.content


def test_a_conversation_gets_the_answer_that_it_gets_everywhere(world, ask):
    turns, messages = [("system", "Be brief.")], [{"role": "developer", "content": "Be brief."}]
    for question in ("Who?", "Where </s> <image>?"):
        turns, messages = [*turns, ("human", question)], [*messages, user(question, URL)]
        said = answer(world[0], turns, BLANK, "")
        assert text_of(ask(*messages)) == said
        turns, messages = [*turns, ("gpt", said)], [*messages, {"role": "assistant", "content": said}]
    assert text_of(ask({"role": "user", "content": QUESTION})) != text_of(ask())


def test_no_request_gets_a_longer_answer_than_the_server_gives(world, ask):
    most = world[2].flags.max_new_tokens
    world[2].flags = dataclasses.replace(world[2].flags, max_new_tokens=5)
    try:
        for wanted in (None, 3, 40):
            found = ask(max_tokens=wanted)
            assert found.usage.completion_tokens == min(wanted or 5, 5) and found.choices[0].finish_reason == "length"
    finally:
        world[2].flags = dataclasses.replace(world[2].flags, max_new_tokens=most)


def test_the_server_names_its_model_and_counts_tokens(world, ask):
    client = world[1]
    assert [*client.models.list()] == [client.models.retrieve("run")]
    with pytest.raises(openai.NotFoundError, match="there is no 'org/gpt'; this server has 'run'"):
        client.models.retrieve("org/gpt")
    assert urllib.request.urlopen(str(client.base_url.join("/health"))).status == 200
    found = ask(max_tokens=7)
    assert found.model == "run" and found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == 7
    assert found.usage.total_tokens == found.usage.prompt_tokens + 7
    prompt = world[2].answerer.processor.render([("human", QUESTION)], "")
    assert found.usage.prompt_tokens == len(prompt.input_ids)


def test_a_streamed_answer_comes_in_pieces_that_make_the_whole(ask):
    whole = text_of(ask())
    *pieces, last, counted = ask(stream=True, stream_options={"include_usage": True})
    texts = [piece.choices[0].delta.content for piece in pieces]
    assert "".join(texts) == whole and len([text for text in texts if text]) > 3
    assert last.choices[0].finish_reason == "length" and counted.usage.completion_tokens == 12


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_text_even_one_of_several_tokens(ask, stream):
    whole = text_of(ask(user("Say it.", URL)))
    stop = whole[3:7]
    found = ask(user("Say it.", URL), stop=["never", stop], stream=stream)
    said = "".join(each.choices[0].delta.content or "" for each in found) if stream else text_of(found)
    assert said == whole[: whole.index(stop)].rstrip()
    assert stream or (found.choices[0].finish_reason == "stop" and found.usage.completion_tokens < 12)


def test_words_are_drawn_where_a_temperature_is_given(ask):
    drawn = [text_of(ask(temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    after = [text_of(ask(temperature=1.5)) for _ in range(2) if ask(temperature=1.5, seed=1)]
    assert after[0] != after[1]  # as they have no seed, whatever the last request had
    assert text_of(ask(temperature=1, top_p=0.001)) == text_of(ask(temperature=0)) == text_of(ask())


@pytest.mark.parametrize(
    "messages, options, complaint",
    [
        ([ASKED], {"model": "gpt"}, "model: there is no 'gpt'; this server has 'run'"),
        ([], {"messages": []}, "messages: List should have at least 1 item"),
        ([ASKED], {"n": 2}, "n: Input should be 1"),
        ([ASKED], {"temperature": -1}, "temperature: "),
        ([ASKED], {"max_tokens": 0}, "max_tokens: "),
        ([ASKED], {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: "),
        ([ASKED], {"functions": [{"name": "f"}]}, "functions: "),
        ([ASKED, ASKED], {}, "turns must alternate"),
        ([ASKED, {"role": "assistant", "content": "Yes"}], {}, "messages: the last is of assistant"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], {}, "messages.0.content.0: "),
        ([user("?", URL, data_url(b"other"))], {}, "messages: 2 different images"),
        ([user("word " * 2000)], {}, "tokens are more than the model takes"),
        ([user("?", __file__)], {}, "unknown url type"),
        ([user("?", f"file://{__file__}")], {}, "unknown url type: file"),
        ([user("?", "data:image/png;base64,AAA")], {}, "Incorrect padding"),
        (
            [user("?", "http://127.0.0.1:9/a.png")],
            {},
            "http://127.0.0.1:9/a.png: cannot be fetched: [Errno 111]",
        ),
        ([user("?", data_url(b"%PDF-1.7"))], {}, "not an image: it is a PDF; convert its pages to images"),
        ([user("?", data_url(encoded(Image.fromarray(PICTURE.image))[:900]))], {}, "image file is truncated"),
        ([user("?", data_url(encoded(Image.new("1", (9000, 9000)))))], {}, "9000 x 9000 is more than 50000000 pixels"),
        ([user("?", data_url(bytes(server.MAX_BYTES)))], {}, f"bytes is more than {server.MAX_BYTES}"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_refused_in_openais_way_and_one_line(ask, messages, options, complaint, stream):
    with pytest.raises(openai.APIStatusError) as refusal:
        ask(*messages, **options, stream=stream)
    assert refusal.value.status_code == (404 if "model" in options else 400)
    said = refusal.value.body
    assert said["type"] == "invalid_request_error" and complaint in said["message"] and "\n" not in said["message"]


def test_images_are_fetched_from_the_web_within_bounds_and_from_nowhere_else(world, ask, tmp_path, monkeypatch):
    (tmp_path / "scene.png").write_bytes(encoded(Image.fromarray(PICTURE.image)))

    class Web(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", f"file://{tmp_path}/scene.png")
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Web, directory=tmp_path)) as site:
        threading.Thread(target=site.serve_forever).start()
        try:
            scene, away = (f"http://127.0.0.1:{site.server_port}/{name}" for name in ("scene.png", "away"))
            assert text_of(ask(user(QUESTION, scene))) == text_of(ask())
            upside_down = encoded(Image.fromarray(PICTURE.image[::-1]))
            (tmp_path / "scene.png").write_bytes(upside_down)  # a picture at the same place is looked at again
            assert text_of(ask(user(QUESTION, scene))) == text_of(ask(user(QUESTION, data_url(upside_down))))
            for url, complaint in ((f"{scene}x", "File not found"), (away, "is not allowed")):
                with pytest.raises(openai.BadRequestError, match=complaint):
                    ask(user(QUESTION, url))
            with served(world[0], "--segmenter", "none", "--no-fetch_images") as (client, _):
                with pytest.raises(openai.BadRequestError, match="unknown url type: http"):
                    client.chat.completions.create(model="run", messages=[user(QUESTION, scene)])
                client.chat.completions.create(model="run", messages=[ASKED], max_tokens=1)
            monkeypatch.setattr(web, "MAX_BYTES", 1000)
            with pytest.raises(openai.BadRequestError, match=r"scene.png: more than 1000 bytes"):
                ask(user(QUESTION, scene))
        finally:
            site.shutdown()


def test_the_log_has_why_a_picture_is_recognised_badly(world, ask, monkeypatch, capsys):
    found = dataclasses.replace(BLANK, panoptic=dataclasses.replace(BLANK.panoptic, unfamiliar=True))
    monkeypatch.setattr(world[2], "segmented", lambda _: found)
    ask(max_tokens=1)
    assert capsys.readouterr().out == f"{UNFAMILIAR}\n"


def test_requests_at_once_get_the_answers_that_they_get_alone_while_the_server_stays_awake(world, ask):
    questions = [user(f"What is {name}?", URL) for name in ("this", "that", "here", "there")]
    alone = [text_of(ask(question)) for question in questions]
    with ThreadPoolExecutor(5) as pool:
        long = pool.submit(ask, max_tokens=300)
        together = [pool.submit(ask, question) for question in questions]
        assert world[1].models.list() and not long.done()
        assert [text_of(each.result()) for each in together] == alone
    assert len(set(alone)) > 1


def test_an_answer_stops_growing_when_its_client_leaves(ask, passes):
    stream = ask(max_tokens=300, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        ask(max_tokens=300, timeout=0.3)
    ask(max_tokens=1)  # its turn comes when the others have ended
    assert 2 < len(passes) < 300


def test_a_request_whose_client_left_before_its_turn_is_not_begun(ask, passes):
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, max_tokens=300)
        while not passes and not first.done():
            time.sleep(0.01)
        with pytest.raises(openai.APITimeoutError):
            ask(user("Left", URL), timeout=0.1)
        assert not first.done()
    ask(max_tokens=1)
    assert len(passes) == 300 + 1


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(world):
    command = [sys.executable, "-m", "collavo.serve", "--model", world[0], "--segmenter", "none"]
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        said = run.stdout.readline()
        assert said.startswith("Serving run at http://127.0.0.1:")
        url = said.split()[-1]
        with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
            pieces = iter(client.chat.completions.create(model="run", messages=[ASKED], max_tokens=3, stream=True))
            next(pieces)
            run.send_signal(SIGINT)
            assert [*pieces][-1].choices[0].finish_reason == "length"  # what has begun may end
        out, err = run.communicate(timeout=240)
    assert (run.returncode, out, err) == (0, "Stopped.\n", "")


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--host", "203.0.113.1", "--port", "0"], "--host: 203.0.113.1: Cannot assign requested address"),
        (["--port", "70000"], "--port is 70000, but must lie within 0 and 65535"),
        (["--port", "0", "--segmenter_checkpoint", "./none"], "--segmenter: ./none: there is no such folder"),
        (["--port", "0", "--model", "nowhere"], "--model: nowhere: neither a folder nor a whole model"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(world, capsys, flags, complaint):
    assert main(["--model", str(world[0]), *flags]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("collavo.serve: error: ")]
    assert len(errors) == 1 and complaint in errors[0]


def test_a_port_in_use_is_named_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        assert main(["--model", "nowhere", "--port", port]) == 2
    assert (
        capsys.readouterr().err
        == f"collavo.serve: error: --port: {port}: Address already in use; --port 0 takes a free one\n"
    )


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["--model", "nowhere"]) == 2
    assert "uvicorn missing; pip install 'collavo[serve]'" in capsys.readouterr().err


def test_classes_that_no_training_has_seen_are_answered_about_as_elsewhere(tmp_path, monkeypatch):
    save_tiny_run(tmp_path / "some", adapters=())
    model, processor = load_base(str(tmp_path / "some-base"), torch.float32, words=True)
    torch.manual_seed(0)
    for weight in model.model.crayon_prompt.parameters():
        torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "words")
    processor.save_pretrained(tmp_path / "words")
    picture = picture_of_row(own_rows(1)[0], None, OWN_CLASSES)
    monkeypatch.setattr(Session, "segmented", lambda *_: picture)
    expected = load_answerer(str(tmp_path / "words"), torch.device("cpu")).answer(
        [picture], [Request(0, [("human", QUESTION)], picture.objects, 12)]
    )
    with served(tmp_path / "words", "--segmenter", "none") as (client, _):
        found = client.chat.completions.create(model="words", messages=[ASKED], max_tokens=12)
    assert [text_of(found)] == expected
