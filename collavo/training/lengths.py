"""How long the texts of a row become as sequences, and how much of the object list fits in beside them.

Few texts of a large data set are near the limit, and tokenizing them all takes long. So bytes bound the tokens of a
text first. Where such bounds do not fit, the prompts are rendered, and their tokens decide.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from collavo.errors import Rejected, UserError
from collavo.instructions.text import format_objects_with_boxes, largest
from collavo.model.processing import CollavoProcessor
from collavo.model.prompt import LISTED, Kind, Turns
from schemas.crayon_row import Segment

NO_LIST = -1

_ASKED = [("human", "x")]

TOO_LONG: dict[Kind, str] = {
    "crayon": "too_long_instruction",
    "dialogue": "too_long_dialogue",
    "caption": "too_long_caption",
}
"""By what name texts that do not fit into a sequence are counted."""


class Fitted(NamedTuple):
    """What a text takes of a sequence."""

    tokens: int
    """Upper bound of its tokens, with its list, beside those of an image and of what stands before it, which packed
    texts share; less than nothing, as a rule, without an image."""

    objects: int
    """How many objects its prompt lists, the largest ones; `NO_LIST` for a prompt without a list."""

    shortened: bool = False
    """Whether the list would be longer if it could."""


class LengthLimit:
    """Finds what fits into sequences of `max_length` tokens.

    Args:
        object_list: which prompts begin with the recognised objects: `dialogues`, `all` or `none`.
        instructions_per_sequence: how many instructions of an image share a sequence at most.

    Raises:
        UserError: if an image alone is as long.
    """

    def __init__(
        self, processor: CollavoProcessor, max_length: int, object_list: str, instructions_per_sequence: int
    ) -> None:
        self.max_length = max_length
        self._processor = processor
        self._listed = LISTED[object_list]
        self._packed = instructions_per_sequence
        pair = [("human", "x"), ("gpt", "x")]
        once = processor.render(pair).input_ids
        self._asked = len(processor.render(_ASKED).input_ids)
        shared = len(once) - once[::-1].index(processor.image_token_id)
        self._shared, self._image = shared, once.count(processor.image_token_id)
        self._first_pair = max(len(once), len(processor.render([("system", "x"), *pair]).input_ids)) - shared
        self._next_pair = len(processor.render(pair * 2).input_ids) - len(once)
        self.room = max_length - shared
        """Tokens left beside the image and what stands before it."""

        if self.room < self._first_pair:
            rows, columns = processor.grid_hw
            raise UserError(
                f"--max_length {max_length} leaves no room for text beside an image of {rows} x {columns} tokens"
            )

    def fit(self, kind: Kind, numbers: Sequence[int], record: Mapping[str, Any]) -> list[Fitted | Rejected]:
        """Measure texts of a row; one that cannot be trained on comes as an error.

        Args:
            numbers: places of all that may share sequences.
            record: the row, as plain values.
        """
        if not numbers:
            return []
        texts = [turns_of(record, kind, number) for number in numbers]
        has_image = record["width"] is not None
        objects = len(record["segments"]) if kind in self._listed and has_image else NO_LIST
        listing = 0
        if objects != NO_LIST:
            listing = len(self._processor.render(_ASKED, object_list(record, objects)).input_ids) - self._asked
        bounds = [listing + self._bound(turns) for turns in texts]
        fitted: list[Fitted | Rejected]
        if sum(sorted(bounds)[-self._packed if kind == "crayon" else -1 :]) <= self.room:
            fitted = [Fitted(bound - (0 if has_image else self._image), objects) for bound in bounds]
        else:
            fitted = [self._measured(kind, turns, record, objects) for turns in texts]
        # A batch of such texts alone would have no supervised token, and end the run each time that it comes to it.
        unanswered = Rejected("without_answer", "no turn is the model's")
        return [one if "gpt" in dict(turns) else unanswered for one, turns in zip(fitted, texts, strict=True)]

    def _bound(self, turns: Turns) -> int:
        said = sum(len(text.encode()) for _, text in turns)
        return said + self._first_pair + self._next_pair * ((len(turns) - 1) // 2)

    def _measured(self, kind: Kind, turns: Turns, record: Mapping[str, Any], objects: int) -> Fitted | Rejected:
        has_image = record["width"] is not None

        def tokens(listed: int) -> int:
            return len(self._processor.render(turns, object_list(record, listed), has_image).input_ids)

        try:
            shortened = (length := tokens(objects)) > self.max_length and objects != NO_LIST
            if shortened:
                objects = bisect_right(range(1, objects + 1), self.max_length, key=tokens) or NO_LIST
                length = tokens(objects)
        except Rejected as error:  # its turns do not alternate
            return error
        if length > self.max_length:
            return Rejected(TOO_LONG[kind], f"{length:,} tokens")
        return Fitted(length - self._shared, objects, shortened)


def turns_of(record: Mapping[str, Any], kind: Kind, number: int) -> Turns:
    """Return a text of a row, as plain values, turn by turn; a caption is a dialogue up to its first answer."""
    if kind == "crayon":
        asked = record["instructions"][number]
        return [("human", asked["question"]), ("gpt", asked["answer"])]
    turns = [(turn["from"], turn["value"]) for turn in record["conversations"][number]["turns"]]
    answers = [place for place, (speaker, _) in enumerate(turns, start=1) if speaker == "gpt"]
    return turns[: answers[0]] if kind == "caption" and answers else turns


def object_list(record: Mapping[str, Any], most: int) -> str | None:
    """Write the objects of a row, as plain values, that a prompt begins with; None for `NO_LIST`.

    Args:
        most: how many; of more, the largest are kept, in the order of the row.
    """
    if most == NO_LIST:
        return None
    segments = list(map(Segment.from_record, record["segments"]))
    return format_objects_with_boxes(largest(segments, most), (record["width"], record["height"]))
