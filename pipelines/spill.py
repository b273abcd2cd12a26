"""What waits on disk between two steps: mentions until those of an image meet, drafts until their shard is written.

A local runner keeps in memory whole, several times over, what is sent through its shuffle. So each bundle appends to a
file of its own in the work folder, and only places are shuffled: of blocks of mentions, by partitions of the images,
and of drafts, which their shard reads in an order of its own. A retried bundle writes another file; what the failed one
wrote is referred to by nobody.
"""

import io
import pickle
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from posixpath import join
from typing import Any, BinaryIO, NamedTuple

from collavo.instructions.write import present_thing_labels
from collavo.storage import is_local, open_random, open_write
from pipelines.merge import image_key
from pipelines.records import Draft, Mention, Packed, packed

_MAX_OPEN_FILES = 64
"""A cluster's shard draws on a file of every bundle, thousands perhaps, and each holds a buffer while it is open."""

_SMALL_FILE_BYTES = 32 << 20
_MENTIONS_PER_WRITE = 4096
_DRAFTS_PER_BATCH = 500


class Block(NamedTuple):
    """Where something lies on disk."""

    uri: str
    offset: int
    length: int


class _SpillFile:
    """One new file, to which whatever can be pickled is appended; what was, may be read only after `close`."""

    def __init__(self, work: str, kind: str) -> None:
        self._uri = join(work, f"{kind}/{uuid.uuid4().hex}.pickle")
        self._file: BinaryIO = open_write(self._uri)
        self._offset = 0

    def append(self, element: Any) -> Block:
        record = pickle.dumps(element, protocol=pickle.HIGHEST_PROTOCOL)
        self._file.write(record)
        block = Block(self._uri, self._offset, len(record))
        self._offset += len(record)
        return block

    def close(self) -> None:
        self._file.close()


def _open(uri: str) -> BinaryIO:
    """A spilled file to read here and there; from a store, a small one is fetched once and not in a hundred pieces."""
    data = None if is_local(uri) else _small_file(uri)
    return open_random(uri) if data is None else io.BytesIO(data)


@lru_cache(maxsize=4)
def _small_file(uri: str) -> bytes | None:
    with open_random(uri) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        return file.read() if size <= _SMALL_FILE_BYTES else None


class MentionSpillWriter:
    """Writes mentions to one new file, those of a partition together; their places may be told only after `close`."""

    def __init__(self, work: str) -> None:
        self._file = _SpillFile(work, "mentions")
        self._waiting: dict[int, list[Mention]] = defaultdict(list)
        self._waiting_count = 0
        self._blocks: list[tuple[int, Block]] = []

    def append(self, mention: Mention) -> None:
        partition = image_key(mention)[0]  # one of 256, of which one at a time is read back into memory
        self._waiting[partition].append(mention)
        self._waiting_count += 1
        if self._waiting_count == _MENTIONS_PER_WRITE:
            self._write()

    def close(self) -> list[tuple[int, Block]]:
        """The blocks by partition."""
        self._write()
        self._file.close()
        return self._blocks

    def _write(self) -> None:
        self._blocks += [(partition, self._file.append(mentions)) for partition, mentions in self._waiting.items()]
        self._waiting.clear()
        self._waiting_count = 0


def read_mentions(blocks: Iterable[Block]) -> list[list[Mention]]:
    """The mentions of a partition, those of each image together."""
    by_image: dict[bytes, list[Mention]] = defaultdict(list)
    for uri, of_file in groupby(sorted(blocks), key=lambda block: block.uri):
        with _open(uri) as file:
            for block in of_file:
                file.seek(block.offset)
                for mention in pickle.loads(file.read(block.length)):
                    by_image[image_key(mention)].append(mention)
    return list(by_image.values())


class SpilledDraft(NamedTuple):
    """Where a draft lies, and what the steps before its reading need to know of it."""

    image_id: str
    image_uri: str
    """Settles which of two images with the same id comes first."""

    present_labels: tuple[int, ...]
    block: Block


class SpillWriter:
    """Appends drafts to one new file; their places may be told only after `close`."""

    def __init__(self, work: str) -> None:
        self._file = _SpillFile(work, "drafts")
        self._spilled: list[SpilledDraft] = []
        self._batches: list[Packed] = []

    def append(self, draft: Draft) -> None:
        present = tuple(present_thing_labels(draft.row.segments))
        self._spilled.append(SpilledDraft(draft.row.image_id, draft.uri, present, self._file.append(draft)))
        if len(self._spilled) == _DRAFTS_PER_BATCH:
            self._pack()

    def close(self) -> list[Packed]:
        """The places, in batches."""
        self._pack()
        self._file.close()
        return self._batches

    def _pack(self) -> None:
        if self._spilled:
            self._batches.append(packed(self._spilled))
        self._spilled = []


def read_drafts(spilled: list[SpilledDraft]) -> Iterator[Draft]:
    """Read drafts back, in the order given."""
    files: dict[str, BinaryIO] = {}
    try:
        for uri, offset, length in (place.block for place in spilled):
            if uri not in files:
                if len(files) == _MAX_OPEN_FILES:
                    files.pop(next(iter(files))).close()
                files[uri] = _open(uri)
            file = files[uri]
            file.seek(offset)
            # Our own file of this very run, in a folder that only its workers write to.
            yield pickle.loads(file.read(length))
    finally:
        for file in files.values():
            file.close()
