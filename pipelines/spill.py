"""Drafts on disk between segmentation and the writing of shards.

A shard needs the rows of images that were segmented anywhere, in an order of its own. Rather than sending rows with
their image bytes through the runner's shuffle - which a local runner keeps in memory whole - each bundle appends its
drafts to a file of its own in the staging folder, and only their places are shuffled. A retried bundle writes another
file; what the failed one wrote is referred to by nobody.
"""

import pickle
import uuid
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from collavo.instructions.write import present_thing_labels
from pipelines.elements import Draft
from pipelines.storage import join, open_read, open_write

_MAX_OPEN_FILES = 64
"""A cluster's shard draws on a file of every bundle, thousands perhaps, and each holds a buffer while it is open."""


class SpilledDraft(NamedTuple):
    """Where a draft lies, and what the steps before its reading need to know of it."""

    image_id: str
    image_uri: str
    """Settles which of two images with the same id comes first."""

    present_labels: tuple[int, ...]
    uri: str
    offset: int
    length: int


class SpillWriter:
    """Appends drafts to one new file; their places may be told only after `close`."""

    def __init__(self, staging: str) -> None:
        self._uri = join(staging, f"drafts/{uuid.uuid4().hex}.pickle")
        self._file: BinaryIO = open_write(self._uri)
        self._offset = 0
        self._spilled: list[SpilledDraft] = []

    def append(self, draft: Draft) -> None:
        record = pickle.dumps(draft, protocol=pickle.HIGHEST_PROTOCOL)
        self._file.write(record)
        present = tuple(present_thing_labels(draft.row.segments))
        place = SpilledDraft(draft.row.image_id, draft.uri, present, self._uri, self._offset, len(record))
        self._spilled.append(place)
        self._offset += len(record)

    def close(self) -> list[SpilledDraft]:
        self._file.close()
        return self._spilled


def read_drafts(spilled: list[SpilledDraft]) -> Iterator[Draft]:
    """Read drafts back, in the order given."""
    files: dict[str, BinaryIO] = {}
    try:
        for place in spilled:
            if place.uri not in files:
                if len(files) == _MAX_OPEN_FILES:
                    files.pop(next(iter(files))).close()
                files[place.uri] = open_read(place.uri)
            file = files[place.uri]
            file.seek(place.offset)
            # Our own file of this very run, in a folder that only its workers write to.
            yield pickle.loads(file.read(place.length))
    finally:
        for file in files.values():
            file.close()
