"""Files in which mentions and drafts wait between two steps, while only their places in these files are shuffled.

A local runner keeps everything that passes its shuffle in memory, several times over. So each bundle appends to files
of its own. Mentions are shuffled by partitions of the images, so that those of an image meet; drafts by shards, which
read them in the order of a hash. A retried bundle writes another file, and nothing refers to the file of the failed
one.

What a network has segmented is kept in a folder of its own, where a build that goes on after it was stopped finds it by
the pictures' content.
"""

import hashlib
import io
import json
import pickle
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from posixpath import join
from struct import Struct
from typing import Any, BinaryIO, NamedTuple

from collavo.instructions.write import present_things
from collavo.storage import is_local, list_files, open_random, open_write
from pipelines.merge import image_key
from pipelines.records import Draft, Mention, Packed, packed
from schemas.categories import CategorySet
from schemas.crayon_row import CrayonRow

_MAX_OPEN_FILES = 64
"""On a cluster, a shard may read from thousands of files, one of every bundle, and each holds a buffer while open."""

_SMALL_FILE_BYTES = 32 << 20
_MENTIONS_PER_WRITE = 4096
_DRAFTS_PER_FILE = 500
_MAX_FILE_BYTES = 64 << 20
"""When the next file is begun; on a store, a file is there only once it is closed."""

_SUFFIX = ".pickle"
_HEADER = Struct("<32sQ")
"""SHA-256 of the picture, or zeros; length of the record."""


class Block(NamedTuple):
    """Where something lies in a file."""

    uri: str
    offset: int
    length: int


class _SpillFile:
    """A new file, to which anything that pickles can be appended. It can be read only after `close`.

    Each record follows a header, by which the file can be read without the list of its blocks.
    """

    def __init__(self, folder: str) -> None:
        self._uri = join(folder, f"{uuid.uuid4().hex}{_SUFFIX}")
        self._file: BinaryIO = open_write(self._uri)
        self.bytes = 0

    def append(self, element: Any, digest: bytes = b"") -> Block:
        record = pickle.dumps(element, protocol=pickle.HIGHEST_PROTOCOL)
        self._file.write(_HEADER.pack(digest, len(record)))
        self._file.write(record)
        self._file.flush()  # so that a build that is killed loses nothing that it had segmented
        block = Block(self._uri, self.bytes + _HEADER.size, len(record))
        self.bytes += _HEADER.size + len(record)
        return block

    def close(self) -> None:
        self._file.close()


def _open(uri: str) -> BinaryIO:
    """Open a file to read here and there. From a store, a small one is fetched once, not in hundreds of pieces."""
    data = None if is_local(uri) else _small_file(uri)
    return open_random(uri) if data is None else io.BytesIO(data)


@lru_cache(maxsize=4)
def _small_file(uri: str) -> bytes | None:
    with open_random(uri) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        return file.read() if size <= _SMALL_FILE_BYTES else None


class MentionSpillWriter:
    """Writes mentions to a new file, those of a partition together."""

    def __init__(self, work: str) -> None:
        self._file = _SpillFile(join(work, "mentions"))
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
        """Close the file, and return its blocks with their partitions."""
        self._write()
        self._file.close()
        return self._blocks

    def _write(self) -> None:
        self._blocks += [(partition, self._file.append(mentions)) for partition, mentions in self._waiting.items()]
        self._waiting.clear()
        self._waiting_count = 0


def read_mentions(blocks: Iterable[Block]) -> list[list[Mention]]:
    """Read the mentions of a partition; return a list for each image."""
    by_image: dict[bytes, list[Mention]] = defaultdict(list)
    for uri, of_file in groupby(sorted(blocks), key=lambda block: block.uri):
        with _open(uri) as file:
            for block in of_file:
                file.seek(block.offset)
                for mention in pickle.loads(file.read(block.length)):
                    by_image[image_key(mention)].append(mention)
    return list(by_image.values())


class SpilledDraft(NamedTuple):
    """Where a draft lies, and what has to be known of it before it is read."""

    key: str
    """What its row is found by: the SHA-256 of the picture, or of the id of a row without one."""

    image_id: str
    finished: bool
    """Whether it is a row of a data set that is there already."""

    split: str
    split_stated: bool
    present: tuple[int, ...]
    """Things in it, by their positions among those of the set."""

    block: Block


class SpillWriter:
    """Appends drafts to new files, one after the other."""

    def __init__(self, folder: str, categories: CategorySet) -> None:
        self._folder = folder
        self._categories = categories
        self._file: _SpillFile | None = None
        self._spilled: list[SpilledDraft] = []
        self._packs: list[Packed] = []

    def append(self, draft: Draft) -> None:
        row = draft.row
        key = row.image_sha256 or _digest_of_dialogues(row)
        self._file = self._file or _SpillFile(self._folder)
        block = self._file.append(draft, bytes.fromhex(row.image_sha256 or ""))
        present = tuple(present_things(row.segments, self._categories))
        finished = draft.inputs[0].source == "crayon"
        self._spilled.append(SpilledDraft(key, row.image_id, finished, row.split, draft.split_stated, present, block))
        if len(self._spilled) == _DRAFTS_PER_FILE or self._file.bytes > _MAX_FILE_BYTES:
            self._end_file()

    def close(self) -> list[Packed]:
        """Close the last file, and return the places of all drafts, in packs."""
        self._end_file()
        return self._packs

    def _end_file(self) -> None:
        if self._file:
            self._file.close()
            self._packs.append(packed(self._spilled))
        self._file, self._spilled = None, []


def _digest_of_dialogues(row: CrayonRow) -> str:
    """Return a SHA-256 of a row's dialogues, by which rows without a picture are compared."""
    return hashlib.sha256(json.dumps([dialogue.as_record() for dialogue in row.conversations]).encode()).hexdigest()


@lru_cache(maxsize=1)
def spilled_pictures(folder: str) -> dict[bytes, Block]:
    """Find the drafts in a folder by the SHA-256 of their pictures. A file whose end is missing is read up to there."""
    found: dict[bytes, Block] = {}
    for uri in list_files(join(folder, "")):
        if uri.endswith(_SUFFIX):
            with _open(uri) as file:
                size, offset = file.seek(0, io.SEEK_END), 0
                while offset + _HEADER.size <= size:
                    file.seek(offset)
                    digest, length = _HEADER.unpack(file.read(_HEADER.size))
                    offset += _HEADER.size + length
                    if offset <= size:
                        found[digest] = Block(uri, offset - length, length)
    return found


def read_drafts(blocks: Iterable[Block]) -> Iterator[Draft]:
    """Read drafts in the order given."""
    files: dict[str, BinaryIO] = {}
    try:
        for uri, offset, length in blocks:
            if uri not in files:
                if len(files) == _MAX_OPEN_FILES:
                    files.pop(next(iter(files))).close()
                files[uri] = _open(uri)
            file = files[uri]
            file.seek(offset)
            # Unpickling is safe: the file was written by this run, or by the one that it resumes, in a folder that only
            # their workers write to.
            yield pickle.loads(file.read(length))
    finally:
        for file in files.values():
            file.close()
