"""Dialogues in the shapes of LLaVA, ShareGPT4V, Cambrian, ms-swift and TRL."""

import io
import json
from typing import Any

import pytest

from collavo.errors import Rejected, UserError
from collavo.sources.dialogues import DialogueEntry, stream_dialogues
from schemas.crayon_row import Dialogue

TURNS = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A person."}]
MESSAGES = [{"role": "user", "content": "<image>\nWho?"}, {"role": "assistant", "content": "A person."}]
OTHER_NAMES = [{"from": "User", "value": "<image>\nWho?"}, {"from": "model", "value": "A person."}]
PAIRS = [{"user": "<image>\nWho?", "assistant": "A person.", "source": "vqa"}]
PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWho?"}]}, MESSAGES[1]]
# As Parquet has them: every key in every turn and part, null where there is none.
NULLS = [
    {"from": "human", "value": "<image>\nWho?", "role": None, "content": None},
    {"from": None, "value": None, "role": "assistant", "content": "A person."},
]
NULL_PARTS = [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "\nWho?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A person."}]},
]
URL_PARTS = [{"type": "image_url", "image_url": {"url": "a.jpg"}, "text": None}, {"type": "text", "text": "\nWho?"}]
DEEP = '{"id":' * 9999 + "1"
SAID = (("human", "<image>\nWho?"), ("gpt", "A person."))


def stream(content: Any) -> list[DialogueEntry | Rejected]:
    text = content if isinstance(content, str) else json.dumps(content)
    return list(stream_dialogues(io.BytesIO(text.encode()), "talk.json"))


@pytest.mark.parametrize(
    "content",
    [
        [{"id": "q", "image": "a.jpg", "conversations": TURNS}],
        {"type": "sft", "data": [{"id": "q", "image": "a.jpg", "conversations": TURNS}]},  # nested
        json.dumps({"id": "q", "image": "a.jpg", "conversations": TURNS}) + "\n\n",  # JSON lines
        [{"id": "q", "image": ["a.jpg"], "conversations": TURNS}],
        [{"id": "q", "images": [{"path": "a.jpg"}], "conversations": TURNS}],
        [{"id": "q", "images": ["a.jpg"], "messages": MESSAGES}],
        [{"id": "q", "image": "a.jpg", "conversations": OTHER_NAMES}],
        [{"id": "q", "image": "a.jpg", "texts": PAIRS}],
        [{"id": "q", "image": "a.jpg", "texts": {name: [pair[name] for pair in PAIRS] for name in PAIRS[0]}}],
        [{"id": "q", "image": "a.jpg", "messages": PARTS}],
        [{"id": "q", "image": "a.jpg", "messages": NULLS}],
        [{"id": "q", "image": "a.jpg", "messages": NULL_PARTS}],
        [{"id": "q", "image": "a.jpg", "messages": [{"role": "user", "content": URL_PARTS}, MESSAGES[1]]}],
        [{"id": "q", "image": "a.jpg", "messages": [{"role": "user", "content": ["<image>\n", "Who?"]}, MESSAGES[1]]}],
    ],
)
def test_every_shape_says_the_same(content: Any) -> None:
    assert stream(content) == [DialogueEntry("a.jpg", Dialogue("q", SAID))]


def test_lines_are_read_one_by_one() -> None:
    lines = "".join(json.dumps({"id": i, "image": "a.jpg", "conversations": TURNS}) + "\n" for i in range(3))
    assert [entry.dialogue.id for entry in stream(lines)] == ["0", "1", "2"]  # type: ignore[union-attr]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("damaged", ['{"id": 9, "conversations": [{"from": "hum', "nonsense", '"\ud800"}', DEEP])
def test_a_damaged_line_leaves_the_others(place: int, damaged: str) -> None:
    lines = [json.dumps({"id": i, "image": "a.jpg", "conversations": TURNS}) for i in range(2)]
    lines.insert(place, damaged)
    found = stream_dialogues(io.BytesIO("\n".join(lines).encode(errors="surrogatepass")), "talk.json")
    bad, *good = sorted(found, key=lambda entry: isinstance(entry, DialogueEntry))
    assert isinstance(bad, Rejected)
    assert (bad.reason, bad.entry_id) == ("malformed_entry", f"line {place + 1}") and f"line {place + 1} is" in str(bad)
    assert [entry.dialogue.id for entry in good] == ["0", "1"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "entry",
    [
        {"instruction": "Who?", "output": "He."},
        {"image": "a.jpg", "texts": ["A caption."]},
        {"query": "?", "data": "x"},
    ],
)
def test_entries_without_turns_are_rejects_that_name_what_they_have(entry: dict[str, Any]) -> None:
    for content in ([entry], f"{json.dumps(entry)}\n{json.dumps(entry)}\n"):
        for refused in stream(content):
            assert isinstance(refused, Rejected) and refused.reason == "malformed_entry"
            assert f"found only {', '.join(map(repr, entry))}" in str(refused)


def test_an_answer_of_nothing_is_not_taught() -> None:
    for said in ("", " \n"):
        (refused,) = stream(
            [{"id": "q", "image": "a.jpg", "conversations": [TURNS[0], {"from": "gpt", "value": said}]}]
        )
        assert isinstance(refused, Rejected) and "an answer without text" in str(refused)


def test_a_list_below_a_key_may_have_its_entries_in_lines() -> None:
    entry = json.dumps({"id": "q", "image": "a.jpg", "conversations": TURNS})
    assert stream(f'{{"data": [\n{entry}\n]}}') == [DialogueEntry("a.jpg", Dialogue("q", SAID))]


def test_text_alone_is_an_entry_without_an_image() -> None:
    said = (("human", "Who?"), ("gpt", "A person."))
    turns = [{"from": speaker, "value": value} for speaker, value in said]
    assert stream([{"id": "q", "conversations": turns}]) == [DialogueEntry(None, Dialogue("q", said))]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.jpg"},
        {"type": "image", "path": "a.jpg"},
        {"type": "image_url", "image_url": {"url": "a.jpg"}},
        {"type": "input_image", "image_url": "a.jpg"},
        {"type": "image", "image": {"path": "a.jpg"}},
    ],
)
def test_an_image_may_be_named_where_it_stands_in_the_text(part: dict[str, Any]) -> None:
    turn = {"role": "user", "content": [part, {"type": "text", "text": "\nWho?"}]}
    turns = [turn, MESSAGES[1]]
    for said in (turns, json.dumps(turns)):
        assert stream([{"id": "q", "messages": said}]) == [DialogueEntry("a.jpg", Dialogue("q", SAID))]


BLIND = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "A person."}]


@pytest.mark.parametrize(
    "entry",
    [
        {"images": [{"url": "a.jpg"}]},
        {"image": {"bytes": None, "path": "a.jpg"}},
        {"image": "a.jpg", "video": None, "videos": []},  # as a table has every key in every row
        {"id": 2**63 + 5, "image": "a.jpg"},
    ],
)
def test_an_entry_about_a_picture_is_one_however_its_keys_are_filled(entry: dict[str, Any]) -> None:
    (found,) = stream([{**entry, "conversations": BLIND}])
    assert isinstance(found, DialogueEntry) and found.image == "a.jpg"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"conversations": TURNS}, "no path in 'image' or 'images'"),
        ({"image": "", "conversations": TURNS}, "no path in 'image' or 'images'"),
        ({"image_path": "a.jpg", "conversations": TURNS}, "no path in 'image' or 'images'"),
        # No turn asks for it, as in data of VQA, but it is no dialogue about nothing.
        ({"img": ["d/a.PNG"], "texts": [{"user": "Who?", "assistant": "A person."}]}, "'img' names one"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png,"}}]},
                       MESSAGES[1]]}, "as base64"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": f"{i}.jpg"} for i in range(2)]},
                       MESSAGES[1]]}, "names 2 images"),
        ({"image": {"bytes": "abc", "path": None}, "conversations": BLIND}, "expected the path of an image"),
        ({"conversations": [{"from": "human", "value": "Picture 1: <img>a.jpg</img>\nWho?"}, TURNS[1]]}, "no path in"),
    ],
)  # fmt: skip
def test_a_dialogue_is_not_taken_for_one_about_no_image(entry: dict[str, Any], said: str) -> None:
    (refused,) = stream([{"id": "q", **entry}])
    assert isinstance(refused, Rejected) and said in str(refused)


def test_a_system_text_beside_the_turns_is_their_first() -> None:
    (entry,) = stream([{"id": "q", "image": "a.jpg", "system": "Be brief.", "conversations": TURNS}])
    assert isinstance(entry, DialogueEntry) and entry.dialogue.turns == (("system", "Be brief."), *SAID)


@pytest.mark.parametrize(
    "said, kept",
    [
        ([("system", "Be brief."), *SAID], [("system", "Be brief."), *SAID]),  # kept as it is
        ([("gpt", "Hello!"), *SAID], list(SAID)),  # what comes before the first question is dropped
        ([("system", "S"), ("gpt", "Hello!"), *SAID], [("system", "S"), *SAID]),
        ([("gpt", "A person."), ("human", "Who?")], None),
        ([("human", "Who?")], None),
        ([("gpt", "A person.")], None),
        ([*SAID, ("human", "And?")], None),
        ([("human", "Who?"), ("human", "Who?"), ("gpt", "A person.")], None),
        ([("system", "S")], None),
    ],
)
def test_turns_alternate_or_the_entry_is_one_reject(
    said: list[tuple[str, str]], kept: list[tuple[str, str]] | None
) -> None:
    (entry,) = stream([{"image": "a.jpg", "conversations": [{"from": s, "value": v} for s, v in said]}])
    if kept is None:
        assert isinstance(entry, Rejected) and (entry.reason, entry.entry_id) == ("turns_do_not_alternate", "#0")
        assert str(entry).partition("found ")[2]
    else:
        assert isinstance(entry, DialogueEntry) and entry.dialogue.turns == tuple(kept)


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"conversations": "Hi"}, "malformed_entry"),
        ({"image": 7, "conversations": TURNS}, "malformed_entry"),
        ({"image": "a.jpg", "conversations": [{"from": "narrator", "value": "Once"}]}, "malformed_entry"),
        ({"image": "a.jpg", "conversations": [{"from": "human", "value": None}]}, "malformed_entry"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "malformed_entry"),
        ({"image": "a.jpg", "messages": [{"role": "user", "content": [7, None]}]}, "malformed_entry"),
        ({"video": "a.mp4", "conversations": TURNS}, "malformed_entry"),
        ({"image": ["a.jpg", "b.jpg"], "conversations": TURNS}, "several_images"),
        ("text", "malformed_entry"),
    ],
)
def test_an_unusable_entry_does_not_stop_the_others(record: Any, reason: str) -> None:
    first, second = stream([record, {"id": "q", "image": "a.jpg", "conversations": TURNS}])
    assert isinstance(first, Rejected) and first.reason == reason
    assert isinstance(second, DialogueEntry)


def test_an_entry_that_is_nested_too_deeply_leaves_the_others() -> None:
    deep = f'{{"image": {"[" * 2000}{"]" * 2000}, "conversations": []}}'
    first, second = stream(f"[{deep}, {json.dumps({'image': 'a.jpg', 'conversations': TURNS})}]")
    assert isinstance(first, Rejected) and (first.reason, first.entry_id) == ("malformed_entry", "#0")
    assert isinstance(second, DialogueEntry)


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("[]", "no entries"),
        ('{"images": []}', "no entries"),
        ("", "no entries"),
        ('[{"id": 1, "conversations": []}, {"id', "not JSON to its end, after 1 entries"),
        ("nonsense\n" * 3, "not JSON to its end, after 0 entries; expected a JSON list, or an entry in each line"),
    ],
)
def test_what_is_no_file_of_dialogues_is_refused_in_one_line(content: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as refused:
        stream(content)
    assert str(refused.value).startswith("talk.json") and "\n" not in str(refused.value)
