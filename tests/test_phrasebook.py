import hashlib
import json
from pathlib import Path

import pytest

from collavo.errors import UserError
from collavo.instructions.phrasebook import PLACEHOLDERS, TASKS_WITH_ABSENT, load_phrasebook
from schemas.crayon_row import TASKS

BINARY = {"id": "b", "question": "Is there {a_name}?", "present": "Yes.", "absent": "No."}
LISTING = {"id": "l", "question": "What is there?", "present": "{objects}"}


def written(folder: Path, content: object) -> Path:
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_default_offers_several_phrasings_of_every_task():
    book = load_phrasebook()
    assert set(book.phrasings) == set(TASKS) == set(PLACEHOLDERS)
    for task, phrasings in book.phrasings.items():
        assert len({phrasing.question for phrasing in phrasings}) == len(phrasings) >= 3
        assert all((phrasing.absent is not None) == (task in TASKS_WITH_ABSENT) for phrasing in phrasings)


def test_the_identifiers_of_the_default_name_their_task_and_are_unique():
    ids = [(task, p.id) for task, phrasings in load_phrasebook().phrasings.items() for p in phrasings]
    assert len({id_ for _, id_ in ids}) == len(ids) and all(id_.startswith(task) for task, id_ in ids)


def test_a_file_with_one_task_of_ones_own_will_do(tmp_path):
    book = load_phrasebook(written(tmp_path, {"class_to_binary": [BINARY]}))
    assert list(book.phrasings) == ["class_to_binary"]
    assert book.phrasings["class_to_binary"][0].absent == "No."


def test_the_hash_is_that_of_the_file_and_changes_with_it(tmp_path):
    first = load_phrasebook(written(tmp_path, {"class_to_binary": [BINARY]})).sha256
    second = load_phrasebook(written(tmp_path, {"class_to_binary": [BINARY | {"present": "Yes!"}]})).sha256
    assert first != second == hashlib.sha256((tmp_path / "mine.json").read_bytes()).hexdigest()


def without(entry: dict, field: str) -> dict:
    return {key: value for key, value in entry.items() if key != field}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", ["JSON"]),
        ([], ["a list"]),
        ({}, ["no task"]),
        ({"jokes": []}, ["'jokes'", "counting"]),
        ({"class_to_binary": []}, ["'class_to_binary'", "at least one"]),
        ({"class_to_binary": {}}, ["'class_to_binary'", "at least one"]),
        ({"class_to_binary": ["Is there {a_name}?"]}, ["'class_to_binary'", "absent, id, present, question"]),
        ({"class_to_binary": [without(BINARY, "absent")]}, ["'class_to_binary'", "absent"]),  # a task that needs one
        ({"list_objects": [LISTING | {"absent": "Nothing."}]}, ["'list_objects'", "id, present, question"]),
        ({"class_to_binary": [BINARY | {"present": 1}]}, ["'class_to_binary'", "present"]),
        ({"class_to_binary": [BINARY | {"question": " "}]}, ["'class_to_binary'", "question"]),  # nothing asked
        ({"class_to_binary": [BINARY, BINARY]}, ["'class_to_binary'", "same id", "b"]),
        ({"class_to_binary": [BINARY | {"absent": "No {count}."}]}, ["b/absent", "{count}", "{a_name}"]),
        ({"class_to_binary": [BINARY | {"absent": "No {}."}]}, ["b/absent", "{}"]),
        ({"class_to_binary": [BINARY | {"question": "Is {name"}]}, ["b/question", "Is {name"]),
        ({"class_to_binary": [BINARY | {"question": "{name.upper}?"}]}, ["b/question", "{name.upper}"]),
        ({"class_to_binary": [BINARY | {"question": "{name:d}?"}]}, ["b/question", "{name} with a format"]),
        ({"class_to_binary": [BINARY | {"question": "{name!r}?"}]}, ["b/question", "{name} with a format"]),
    ],
)
def test_a_refusal_names_the_file_the_place_and_what_would_work(tmp_path, content: object, found: list[str]):
    path = written(tmp_path, content)
    with pytest.raises(UserError) as refusal:
        load_phrasebook(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert all(word in message for word in found), message


def test_a_task_that_stands_twice_is_refused_for_its_first_phrasings_would_be_lost(tmp_path):
    one = json.dumps([BINARY])
    (tmp_path / "twice.json").write_text(f'{{"class_to_binary": {one}, "class_to_binary": {one}}}')
    with pytest.raises(UserError, match=r"twice\.json: .*'class_to_binary' stands there twice"):
        load_phrasebook(tmp_path / "twice.json")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json"):
        load_phrasebook(tmp_path / "nowhere.json")
