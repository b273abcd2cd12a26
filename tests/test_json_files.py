"""JSON in whatever shape people store it: the same text comes out."""

import gzip
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collavo.errors import UserError
from collavo.sources import json_files
from collavo.sources.json_files import open_json

CONTENT = {"name": 'ünï "quoted" \\ NaN, Infinity', "numbers": [1, 2.5]}
TEXT = json.dumps(CONTENT, ensure_ascii=False)


def opened(data: bytes) -> bytes:
    with open_json(io.BytesIO(data), "x.json") as file:
        return file.read()


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        TEXT.encode("utf-16-le"),  # without a mark
        TEXT.encode("utf-32-be"),
        gzip.compress(TEXT.encode("utf-8-sig")),
    ],
    ids=["plain", "mark", "utf-16", "utf-16 without mark", "utf-32", "gzip"],
)
def test_the_text_is_the_same_in_any_encoding(data: bytes) -> None:
    assert json.loads(opened(data)) == CONTENT


def test_what_json_lacks_becomes_null_but_not_in_strings() -> None:
    text = b'{"area": NaN, "low": -Infinity, "a NaN": "Infinity \\" NaN", "x": Infinity}'
    assert json.loads(opened(text)) == {"area": None, "low": None, "a NaN": 'Infinity " NaN', "x": None}


@pytest.mark.parametrize("end", [b"", b"\\"])
def test_a_line_cut_within_a_string_leaves_the_words_of_the_next_ones_alone(end: bytes) -> None:
    line = b'{"a": "no NaN"}\n'
    assert opened(b'{"a": "cut' + end + b"\n" + line * 2) == b'{"a": "cut' + end + b"\n" + line * 2


@given(st.text(alphabet='"\\NaInfity,x ', max_size=40), st.integers(1, 20))
def test_nulls_come_out_right_wherever_the_file_is_cut(text: str, size: int) -> None:
    data = json.dumps({"s": text, "n": float("nan"), "m": [text, float("-inf")]}).encode()
    reader = json_files._NullsForNoNumbers(io.BytesIO(data))
    found = b"".join(iter(lambda: reader.read(size), b""))
    assert json.loads(found) == {"s": text, "n": None, "m": [text, None]}


@pytest.mark.parametrize(
    "data", [gzip.compress(b"{}" * 4000)[:-20], b"\xff\xfe\x00\xdc{\x00"], ids=["cut gzip", "half a character"]
)
def test_damage_is_one_line_that_names_the_file(data: bytes) -> None:
    with pytest.raises(UserError, match=r"^x\.json: ") as refused:
        opened(data)
    assert "\n" not in str(refused.value)
