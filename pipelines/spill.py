"""Files in which drafts wait for their shard, while only their places in these files are shuffled.

What is asked of an image rests on all images, so each draft waits for the last one; and a local runner keeps all that
passes its shuffle in memory, several times over. A worker gathers drafts for a while and writes them to a file of their
own, sorted by split and by the hash that orders the rows. A shard is a range of this hash, so that what it needs of a
file is one piece of it, which is one request to a store. A retried bundle writes other files, and nothing refers to
those of the failed one.

Where files are many, as for many pictures they are, their pieces get small. `pipelines.joins` then has files of a store
joined before the shards are read.

A file is a stream of Arrow record batches of one row each. What a network has segmented is kept in a folder of its own,
where a build that goes on after it was stopped finds it by the pictures' content.
"""

import hashlib
import json
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from posixpath import join
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import pyarrow as pa

from collavo.instructions.choose import stable_hash
from collavo.instructions.write import present_things
from collavo.storage import is_local, list_files, open_random, open_write, read_range, size_of
from pipelines.records import Draft, Input, Packed, packed
from schemas.categories import CategorySet
from schemas.crayon_row import CRAYON_SCHEMA, CrayonRow

DRAFTS = "drafts"
"""The folder of the work folder that they wait in."""

_FILE_BYTES = 64 << 20
_FILE_ROWS = 2000
_FILE_SECONDS, _FILE_SECONDS_IN_STORE = 30.0, 120.0
"""A file is written when its drafts reach one of these: what a killed worker loses was segmented in that time. A store
would be asked too often by files of a slow network's few."""

HELD_BYTES = 256 << 20
"""How much of the files of a store a shard holds at once, unless a draft is larger than an equal part of it."""

_PIECES_AT_ONCE = 3
"""How many equal parts of that are read at once where files are joined: each takes in a file as a worker writes it."""

_ROWS_AT_ONCE = 32
_REQUESTS_AT_ONCE = 8
_SUFFIX = ".arrow"
_INDEX = b"drafts"

_JOINING = threading.Lock()
"""Of the threads of a worker, one at a time joins files, since it takes so much of the disk."""

_SCHEMA = pa.schema(
    [
        *(column for column in CRAYON_SCHEMA if column.name != "instructions"),
        ("inputs", pa.list_(pa.struct([(name, pa.string()) for name in Input._fields]))),
        ("segmenters", pa.list_(pa.string())),
        ("seconds", pa.map_(pa.string(), pa.float64())),
        ("unfamiliar", pa.bool_()),
        ("split_stated", pa.bool_()),
    ]
)


class Block(NamedTuple):
    """Where a draft lies in a file."""

    uri: str
    offset: int
    length: int


class SpilledDraft(NamedTuple):
    """Where a draft lies, and what has to be known of it before it is read."""

    key: str
    """What its row is found by: the SHA-256 of the picture, or of the dialogues of a row without one."""

    image_id: str
    finished: bool
    """Whether it is a row of a data set that is there already."""

    split: str
    split_stated: bool
    present: tuple[int, ...]
    """Things in it, by their positions among those of the set."""

    block: Block


def order_of(key: str) -> tuple[int, str]:
    """Return what the rows of a split are sorted by: 64 bits of a hash, of which shards are ranges, and the key."""
    return stable_hash("order", key), key


def shard_of(key: str, count: int) -> int:
    """Return the number of the shard, of `count`, that a key belongs to."""
    return order_of(key)[0] * count >> 64


class SpillWriter:
    """Gathers drafts, and writes them to new files, one after the other."""

    def __init__(self, folder: str, categories: CategorySet) -> None:
        self._folder = folder
        self._categories = categories
        self._most_seconds = _FILE_SECONDS if is_local(folder) else _FILE_SECONDS_IN_STORE
        self._waiting: list[tuple[str, Draft]] = []
        self._bytes = 0
        self._began = 0.0
        self._packs: list[Packed] = []

    def append(self, draft: Draft) -> None:
        """Take a draft, and write those that wait if they are many, large or old."""
        row = draft.row
        self._began = self._began if self._waiting else time.monotonic()
        self._waiting.append((row.image_sha256 or _digest_of_dialogues(row), draft))
        self._bytes += len(row.image_bytes or b"") + len(row.panoptic_png or b"")
        old = time.monotonic() - self._began >= self._most_seconds
        if old or self._bytes >= _FILE_BYTES or len(self._waiting) == _FILE_ROWS:
            self._write()

    def close(self) -> list[Packed]:
        """Write what still waits, and return the places of all drafts, a pack for each file."""
        if self._waiting:
            self._write()
        return self._packs

    def _write(self) -> None:
        waiting = sorted(self._waiting, key=lambda keyed: (keyed[1].row.split, order_of(keyed[0])))
        self._waiting, self._bytes = [], 0
        places: list[SpilledDraft] = []
        rows: list[pa.Buffer] = []
        while waiting:  # is emptied, so that few drafts are in memory twice
            some, waiting[:_ROWS_AT_ONCE] = waiting[:_ROWS_AT_ONCE], []
            rows += _encoded([draft for _, draft in some])
            places += [
                self._place(key, draft, row.size) for (key, draft), row in zip(some, rows[-len(some) :], strict=True)
            ]
        self._packs.append(_write_file(self._folder, places, rows))

    def _place(self, key: str, draft: Draft, length: int) -> SpilledDraft:
        row = draft.row
        present = tuple(present_things(row.segments, self._categories))
        finished = draft.inputs[0].source == "crayon"
        return SpilledDraft(key, row.image_id, finished, row.split, draft.split_stated, present, Block("", 0, length))


def _write_file(folder: str, places: Sequence[SpilledDraft], rows: Iterable[Any]) -> Packed:
    """Write encoded drafts to a new file.

    Args:
        places: of the drafts, of whose blocks only the lengths count.

    Returns:
        the places that they have now.
    """
    uri = join(folder, f"{uuid.uuid4().hex}{_SUFFIX}")
    index = [[place.key, place.block.length] for place in places]
    head = _SCHEMA.with_metadata({_INDEX: json.dumps(index)}).serialize()
    with open_write(uri) as file:
        file.write(head)
        for row in rows:
            file.write(row)
    blocks = _blocks(uri, head.size, [place.block.length for place in places])
    return packed([place._replace(block=block) for place, block in zip(places, blocks, strict=True)])


def join_files(places: Sequence[SpilledDraft], folder: str) -> Packed:
    """Write drafts that lie in many files of a store to a new one, in the order of the rows.

    They pass through a file on the worker's disk, so that they are read in few requests and take little memory.

    Returns:
        the places that they have now.
    """
    blocks = sorted(place.block for place in places)
    starts = dict(zip(blocks, accumulate((block.length for block in blocks), initial=0), strict=False))
    pieces = [*dict.fromkeys(_pieces(blocks, HELD_BYTES // _PIECES_AT_ONCE).values())]
    with _JOINING, TemporaryFile() as scratch, ThreadPoolExecutor(_PIECES_AT_ONCE) as pool:
        for first in range(0, len(pieces), _PIECES_AT_ONCE):
            for data in pool.map(_Piece.read, pieces[first : first + _PIECES_AT_ONCE]):
                scratch.write(data)

        def row_of(place: SpilledDraft) -> bytes:
            scratch.seek(starts[place.block])
            return scratch.read(place.block.length)

        ordered = sorted(places, key=lambda place: (place.split, order_of(place.key)))
        return _write_file(folder, ordered, map(row_of, ordered))


def _digest_of_dialogues(row: CrayonRow) -> str:
    """Return a SHA-256 of a row's dialogues, by which rows without a picture are compared."""
    return hashlib.sha256(json.dumps([dialogue.as_record() for dialogue in row.conversations]).encode()).hexdigest()


def _encoded(drafts: Sequence[Draft]) -> list[pa.Buffer]:
    """Encode each draft as a record batch of one row; to convert many at once takes a fifth of the time."""
    batch = pa.RecordBatch.from_pylist([*map(_as_record, drafts)], schema=_SCHEMA)
    return [batch.slice(row, 1).serialize() for row in range(batch.num_rows)]


def _as_record(draft: Draft) -> dict[str, Any]:
    return {
        **draft.row.as_record(),
        # A row without a map has no image; a draft may get its map when it is merged with another.
        "image": {"bytes": draft.row.image_bytes, "path": draft.row.image_path},
        "inputs": [entry._asdict() for entry in draft.inputs],
        "segmenters": draft.segmenters,
        "seconds": [*draft.seconds.items()],
        "unfamiliar": draft.unfamiliar,
        "split_stated": draft.split_stated,
    }


def _from_record(record: dict[str, Any]) -> Draft:
    return Draft(
        CrayonRow.from_record({**record, "instructions": ()}),
        tuple(Input(**entry) for entry in record["inputs"]),
        tuple(record["segmenters"]),
        dict(record["seconds"]),
        record["unfamiliar"],
        record["split_stated"],
    )


def _blocks(uri: str, start: int, lengths: Sequence[int]) -> Iterator[Block]:
    """Yield where drafts of some lengths lie, one after the other."""
    for offset, length in zip(accumulate(lengths, initial=start), lengths, strict=False):
        yield Block(uri, offset, length)


@lru_cache(maxsize=1)
def spilled_pictures(folder: str, work: str) -> dict[bytes, Block]:
    """Find the drafts in a folder by the SHA-256 of their pictures. What a killed writer cut off is left out.

    Args:
        work: the work folder of the build, by which what is remembered for it is told from that of others.
    """
    found: dict[bytes, Block] = {}
    for uri in list_files(join(folder, "")):
        if uri.endswith(_SUFFIX):
            size = size_of(uri)
            try:
                with open_random(uri) as file, pa.ipc.open_stream(file) as stream:
                    index, start = json.loads(stream.schema.metadata[_INDEX]), file.tell()
            except (pa.ArrowInvalid, EOFError):
                continue
            digests, lengths = zip(*index, strict=True)
            for digest, block in zip(digests, _blocks(uri, start, lengths), strict=True):
                if block.offset + block.length <= size:
                    found[bytes.fromhex(digest)] = block
    return found


class _Piece:
    """Drafts that lie side by side in a file, kept from when the first of them is needed until the last was."""

    def __init__(self, block: Block, most_bytes: int) -> None:
        self._uri, self._start, self._end = block.uri, block.offset, block.offset + block.length
        self._most_bytes = most_bytes
        self._left = 1
        self._data: pa.Buffer | None = None

    def add(self, block: Block) -> bool:
        """Take in the draft that follows; return whether it does, and there is room."""
        end = block.offset + block.length
        if (block.uri, block.offset) != (self._uri, self._end) or end - self._start > self._most_bytes:
            return False
        self._end, self._left = end, self._left + 1
        return True

    def read(self) -> bytes:
        """Read the piece."""
        return read_range(self._uri, self._start, self._end - self._start)

    def fetch(self) -> None:
        """Read the piece to take drafts from it, if that was not done yet."""
        if self._data is None:
            self._data = pa.py_buffer(self.read())

    def take(self, block: Block) -> pa.RecordBatch:
        """Return a draft, once."""
        assert self._data is not None
        message = self._data.slice(block.offset - self._start, block.length)
        self._left -= 1
        if not self._left:
            self._data = None
        return pa.ipc.read_record_batch(message, _SCHEMA)


def _pieces(blocks: Sequence[Block], most_bytes: int) -> dict[Block, _Piece]:
    """Return the piece that each draft is read in, of a bounded size; on a disk, each is read for itself."""
    pieces: dict[Block, _Piece] = {}
    piece = None
    for block in sorted(blocks):
        if is_local(block.uri) or piece is None or not piece.add(block):
            piece = _Piece(block, most_bytes)
        pieces[block] = piece
    return pieces


def read_drafts(blocks: Sequence[Block]) -> Iterator[Draft]:
    """Read drafts in the order given, which may be that of many files; from a store, in few requests."""
    pieces = _pieces(blocks, HELD_BYTES // max(1, len({block.uri for block in blocks})))
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        for first in range(0, len(blocks), _ROWS_AT_ONCE):
            some = blocks[first : first + _ROWS_AT_ONCE]
            needed = dict.fromkeys(pieces[block] for block in some)
            fetched = map(_Piece.fetch, needed) if is_local(some[0].uri) else pool.map(_Piece.fetch, needed)
            for _ in fetched:
                pass
            batches = [pieces.pop(block).take(block) for block in some]
            yield from map(_from_record, pa.Table.from_batches(batches).to_pylist())
