import io
import json
import tracemalloc

import pytest

from collavo.errors import Rejected, UserError
from collavo.sources.llava import LlavaEntry, stream_entries
from schemas.crayon_row import Dialogue

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A \u201cdog\u201d.\n"}]
GOOD = {"id": "a-1", "image": "coco/a.jpg", "conversations": TURNS}
READ = LlavaEntry("coco/a.jpg", Dialogue("a-1", (("human", TURNS[0]["value"]), ("gpt", TURNS[1]["value"]))))


def streamed(*entries: object) -> list[LlavaEntry | Rejected]:
    return list(stream_entries(io.BytesIO(json.dumps(entries).encode())))


def without(field: str) -> dict:
    return {key: value for key, value in GOOD.items() if key != field}


def test_dialogues_are_read_verbatim_and_in_order():
    assert streamed(GOOD, GOOD | {"id": 17}) == [READ, READ._replace(dialogue=Dialogue("17", READ.dialogue.turns))]


@pytest.mark.parametrize(
    ("entry", "entry_id", "reason"),
    [
        (without("image"), "a-1", "text_only"),
        (GOOD | {"image": None}, "a-1", "text_only"),
        (GOOD | {"image": []}, "a-1", "text_only"),
        (GOOD | {"image": ["a.jpg", "b.jpg"]}, "a-1", "several_images"),
        (GOOD | {"image": 5}, "a-1", "malformed_entry"),
        (GOOD | {"image": {"bytes": ""}}, "a-1", "malformed_entry"),
        (without("conversations"), "a-1", "malformed_entry"),
        (GOOD | {"conversations": []}, "a-1", "malformed_entry"),
        (GOOD | {"conversations": "hello"}, "a-1", "malformed_entry"),
        (GOOD | {"conversations": ["hello"]}, "a-1", "malformed_entry"),
        (GOOD | {"conversations": [{"from": "human"}]}, "a-1", "malformed_entry"),
        (GOOD | {"conversations": [{"from": "system", "value": "Be kind."}]}, "a-1", "malformed_entry"),
        (GOOD | {"conversations": [{"from": "human", "value": 5}]}, "a-1", "malformed_entry"),
        ("hello", "#1", "malformed_entry"),
        (None, "#1", "malformed_entry"),
        ([GOOD], "#1", "malformed_entry"),
    ],
)
def test_an_unusable_entry_comes_as_an_error_between_the_others(entry: object, entry_id: str, reason: str):
    before, error, after = streamed(GOOD, entry, GOOD)
    assert before == after == READ
    assert isinstance(error, Rejected) and (error.entry_id, error.reason) == (entry_id, reason)


@pytest.mark.parametrize("entry", [without("id"), GOOD | {"id": None}])
def test_an_entry_without_an_id_goes_by_its_position(entry: dict):
    assert [read.dialogue.id for read in streamed(GOOD, entry)] == ["a-1", "#1"]


def test_an_image_in_a_list_of_one_is_that_image():
    assert streamed(GOOD | {"image": ["coco/a.jpg"]}) == [READ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "after 0 entries"),
        ("[]", "no entries"),
        (json.dumps(GOOD), "no entries"),  # an object, not a list of them
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD), "JSON list"),  # JSON Lines
        (json.dumps([GOOD, GOOD])[:-1], "after 2 entries"),
        (json.dumps([GOOD, GOOD])[:-30], "after 1 entries"),
        ("<html>", "after 0 entries"),
    ],
)
def test_what_is_no_whole_json_list_is_refused_in_one_line(text: str, found: str):
    with pytest.raises(UserError) as refusal:
        list(stream_entries(io.BytesIO(text.encode())))
    assert found in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_large_file_is_read_as_a_stream(tmp_path):
    path = tmp_path / "mix.json"
    path.write_text(json.dumps([GOOD | {"id": i} for i in range(20_000)]))
    with path.open("rb") as file:
        tracemalloc.start()
        count = sum(1 for _ in stream_entries(file))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert count == 20_000
    assert peak < path.stat().st_size / 2  # loaded whole it would take more than its size


def test_the_real_sample_is_read(real):
    with (real / "llava_sample.json").open("rb") as file:
        entries = list(stream_entries(file))
    assert [getattr(entry, "reason", "read") for entry in entries] == ["read", "read", "text_only", "read"]
