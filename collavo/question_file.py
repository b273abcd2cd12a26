"""Answer a file of questions: a JSON object a line in, a JSON object a line out, in the same order.

    {"id": "a", "image": "street.jpg", "question": "What is on the left?"}
    {"id": "a", "image": "street.jpg", "question": "What is on the left?", "answer": "A bus."}

The line keeps all of its fields, but for an `answer` or `error` of its own. `prompt` and `text` are taken for
`question`, and a line without `id` or `question_id` gets its number as `id`.

The answers are written batch by batch. A run that finds some of them goes on after the last one. A question that cannot
be asked gets a line with `error` in place of `answer`, and the others go on.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from collavo.errors import LeftOut, Rejected, UserError
from collavo.inference import Answerer, Picture, Request
from collavo.panoptic.maps import PanopticMap
from collavo.sources import parsed_json


class Asked(NamedTuple):
    """A line of the questions: what the answer repeats of it, and why it cannot be asked, if so."""

    number: int
    record: dict[str, Any]
    image: str = ""
    question: str = ""
    fault: str = ""


def read_questions(file: Path) -> Iterator[Asked]:
    """Read questions, line by line; empty lines are none.

    Raises:
        UserError: if the file cannot be opened, or is a JSON list.
    """
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1 and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
                    raise UserError(f"{file}: a JSON list, but a question is a line; jq -c '.[]' makes lines of a list")
                if line.strip():
                    yield _asked(number, line)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error


def count_questions(file: Path) -> int:
    """Count the lines that are not empty.

    Raises:
        UserError: as `read_questions`, and if none of them is a question.
    """
    faults = [asked.fault and f"line {asked.number}: {asked.fault}" for asked in read_questions(file)]
    if all(faults):
        raise UserError(f"{file}: holds no question; {faults[0] if faults else 'it is empty'}")
    return len(faults)


def count_answers(questions: Path, answers: Path) -> tuple[int, int]:
    """Count the lines that a file of answers holds, and those that say why there is no answer; a line that an
    interrupted run left unfinished is cut off.

    Raises:
        UserError: if they answer other questions.
    """
    data, errors = answers.read_bytes() if answers.exists() else b"", 0
    lines = data.splitlines(keepends=True)
    unfinished = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
    asked_for = read_questions(questions)
    for number, (line, asked) in enumerate(zip_longest(lines, islice(asked_for, len(lines))), start=1):
        answered: Any = None
        with suppress(ValueError):
            answered = parsed_json(line)
        # As text, for a NaN of a user's field is not equal to itself.
        same = asked and isinstance(answered, dict) and json.dumps({**answered, **asked.record}) == json.dumps(answered)
        if not same:
            raise UserError(f"{answers}: its line {number} answers no question of {questions}; name another file")
        errors += "error" in answered
    if unfinished:
        # Of another file it may be all that there is, so it has to begin as the next answer would.
        asked = next(asked_for, None)
        begin = _line_of(asked.record, {})[:-1] if asked else b""
        if not asked or not (unfinished.startswith(begin) or begin.startswith(unfinished)):
            raise UserError(f"{answers}: its last line answers no question of {questions}; name another file")
        with answers.open("r+b") as file:
            file.truncate(len(data) - len(unfinished))
    return len(lines), errors


def _line_of(record: Mapping[str, Any], reply: Mapping[str, str]) -> bytes:
    return json.dumps({**record, **reply}, ensure_ascii=False).encode(errors="backslashreplace")


@dataclass(frozen=True, slots=True)
class QuestionAnswerer:
    """Answers the questions of a file.

    Args:
        segment: makes the maps of images, uint8 RGB [height, width, 3].
        read_image: reads the image that a question names; raises Rejected or UserError, with exit status 1 where no
            other image can be read either.
        object_list: as in `Answerer.lists_objects`.
        max_new_tokens: the length of an answer at most.
        batch_size: questions answered together.
    """

    answerer: Answerer
    segment: Callable[[Sequence[np.ndarray]], Sequence[PanopticMap]]
    read_image: Callable[[str], np.ndarray]
    object_list: str
    max_new_tokens: int
    batch_size: int

    def answer(self, questions: Iterator[Asked], answers: Path) -> Iterator[LeftOut]:
        """Add the answers to a file; yields what could not be asked of each batch, when its answers are written."""
        answers.parent.mkdir(parents=True, exist_ok=True)
        with answers.open("ab") as file:
            while batch := list(islice(questions, self.batch_size)):
                replies, left_out = self._replies(batch), LeftOut()
                for asked, reply in zip(batch, replies, strict=True):
                    if "error" in reply:
                        left_out.add("without an answer", f"line {asked.number}", reply["error"])
                lines = [_line_of(asked.record, reply) for asked, reply in zip(batch, replies, strict=True)]
                file.write(b"".join(line + b"\n" for line in lines))
                file.flush()
                yield left_out

    def _replies(self, batch: Sequence[Asked]) -> list[dict[str, str]]:
        pictures = self._pictures([asked.image for asked in batch if not asked.fault])
        replies = [{"error": asked.fault} for asked in batch]
        lists_objects = self.answerer.lists_objects("dialogue", self.object_list)
        used: dict[str, int] = {}
        requests: dict[int, Request] = {}
        for number, asked in enumerate(batch):
            if asked.fault:
                continue
            name, turns = asked.image, [("human", asked.question)]
            picture = pictures[name]
            if isinstance(picture, str):
                replies[number] = {"error": picture}
                continue
            place = used.setdefault(name, len(used))
            try:
                requests[number] = self.answerer.request(place, picture, turns, lists_objects, self.max_new_tokens)
            except UserError as error:
                replies[number] = {"error": str(error)}
        if requests:
            shown = [pictures[name] for name in used]
            texts = self.answerer.answer(shown, list(requests.values()), self.batch_size)  # type: ignore[arg-type]
            for number, text in zip(requests, texts, strict=True):
                replies[number] = {"answer": text}
        return replies

    def _pictures(self, names: Sequence[str]) -> Mapping[str, Picture | str]:
        """Read and segment the distinct images; a sentence for each that cannot be read."""
        images: dict[str, np.ndarray] = {}
        pictures: dict[str, Picture | str] = {}
        for name in dict.fromkeys(names):
            try:
                images[name] = self.read_image(name)
            except (Rejected, UserError) as error:
                if isinstance(error, UserError) and error.exit_status == 1:
                    raise  # a disk that does not answer; a later run does better than a file of errors
                pictures[name] = str(error)
        maps = self.segment(list(images.values())) if images else []
        found = zip(images.items(), maps, strict=True)
        return pictures | {name: Picture(image, panoptic) for (name, image), panoptic in found}


def _asked(number: int, line: bytes) -> Asked:
    try:
        record = parsed_json(line)
    except ValueError as error:
        return Asked(number, {"id": number}, fault=f"not JSON: {error}")
    if not isinstance(record, dict):
        return Asked(number, {"id": number}, fault="not a JSON object")
    image: Any = record.get("image")
    question: Any = next((record[name] for name in ("question", "prompt", "text") if name in record), None)
    kept = {} if {"id", "question_id"} & record.keys() else {"id": number}
    kept |= {name: value for name, value in record.items() if name not in ("answer", "error")}
    for name, value in (("image", image), ("question", question)):
        # Half of a surrogate pair, which JSON can hold, is no text to a tokenizer, and a NUL no file's name.
        if not isinstance(value, str) or not value.strip() or re.search("[\0\ud800-\udfff]", value):
            return Asked(number, kept, fault=f"{name} is missing, empty or no text")
    return Asked(number, kept, image, question)
