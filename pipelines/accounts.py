"""The accounts of a data set: its inputs, its rows, its rejects, and the content of the rows.

Counts can be added up in any order and grouping. The manifest, the report and the summary on the terminal are made from
them.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.records import Draft, Reject
from schemas.crayon_row import CrayonRow

SECONDS_STEPS = ("read", "decode", "segment", "encode", "phrase", "write")
"""The steps whose seconds are counted, in the order in which an image passes them."""

_LONGEST_ANSWER = 1000
_NUMBERS = ("rows", "conversations", "unfamiliar", "merged", "things", "crowds")


@dataclass(slots=True)
class Counts:
    """Sums over rows and rejects; every field is a plain counter."""

    rows: int = 0
    inputs_in_rows: Counter[str] = field(default_factory=Counter)
    """By source; a row accounts for every input that named its image."""

    rows_by_source: Counter[str] = field(default_factory=Counter)
    rows_by_split: Counter[str] = field(default_factory=Counter)
    conversations: int = 0
    unfamiliar: int = 0
    """Pictures unlike all that their segmenter knows."""

    merged: int = 0
    """Times that a picture came again, from another path or data set; it has one row."""

    things: int = 0
    crowds: int = 0
    """Segments of things, and those of them that are regions of many."""

    instructions: Counter[str] = field(default_factory=Counter)
    """By task."""

    polarities: Counter[str] = field(default_factory=Counter)
    """By `task/polarity`, for tasks that ask for a class."""

    segments: Counter[str] = field(default_factory=Counter)
    """By class name."""

    objects_per_image: Counter[int] = field(default_factory=Counter)
    answer_lengths: Counter[int] = field(default_factory=Counter)
    """In words."""

    rejects: Counter[str] = field(default_factory=Counter)
    """By reason."""

    rejects_by_source: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    """By step, summed over images and workers."""

    def add_row(self, row: CrayonRow, draft: Draft, merged: int) -> None:
        """Count a finished row, the inputs and seconds of its draft, and how many other drafts it was merged with."""
        self.rows += 1
        self.inputs_in_rows.update(entry.source for entry in draft.inputs)
        self.rows_by_source.update(row.sources)
        self.rows_by_split[row.split] += 1
        self.conversations += len(row.conversations)
        self.unfamiliar += draft.unfamiliar
        self.merged += merged
        self.things += sum(segment.is_thing for segment in row.segments)
        self.crowds += sum(segment.is_thing and segment.is_crowd for segment in row.segments)
        self.segments.update(segment.category for segment in row.segments)
        if row.has_image:
            self.objects_per_image[len(row.segments)] += 1
        for instruction in row.instructions:
            self.instructions[instruction.task] += 1
            self.answer_lengths[min(len(instruction.answer.split()), _LONGEST_ANSWER)] += 1
            if instruction.polarity:
                self.polarities[f"{instruction.task}/{instruction.polarity}"] += 1
        self.add_seconds(draft.seconds)

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Count seconds by step."""
        for step, value in seconds.items():
            self.seconds[step] = self.seconds.get(step, 0.0) + value

    def add_reject(self, reject: Reject) -> None:
        """Count a reject."""
        self.rejects[reject.reason] += 1
        self.rejects_by_source[reject.source] += 1

    def add(self, other: "Counts") -> None:
        """Add what another counted."""
        self.add_seconds(other.seconds)
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in self._counters():
            getattr(self, name).update(getattr(other, name))

    def as_json(self) -> dict[str, Any]:
        """Return plain values, with counters sorted by key and seconds rounded."""
        return {
            **{name: getattr(self, name) for name in _NUMBERS},
            **{name: dict(sorted(getattr(self, name).items())) for name in self._counters()},
            "seconds": {step: round(self.seconds.get(step, 0.0), 3) for step in SECONDS_STEPS},
        }

    def _counters(self) -> list[str]:
        return [name for name in self.__slots__ if name not in (*_NUMBERS, "seconds")]
