"""Count what the drafts of a large build ask of an S3 store, without the pictures.

    python benchmarks/store_requests.py [--images 118000 1000000] [--draft_bytes 170000] [--bundle 512]

The build's own code writes, joins and reads files of drafts, with all sizes a thousandth of the real ones: drafts of
bytes without a meaning, in a store that is a dictionary and counts. A bundle of so many images ends a file. Besides
drafts, the writing of the shards is reckoned; each picture and mask is one request more, and the rest some twenty.
Prints a line for each number of images, without joined files and with them, and as the last line JSON.
"""

import argparse
import hashlib
import json
from collections import Counter, defaultdict
from typing import Any

from collavo import object_store
from pipelines import joins, spill
from pipelines.graph import count_shards
from pipelines.records import Packed, unpacked

_SCALE = 1000
_VALIDATION = 0.05


class Store:
    """Files in memory, and the requests and bytes that they take on S3."""

    def __init__(self) -> None:
        self.files: dict[str, bytearray] = {}
        self.requests: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def open_write(self, uri: str) -> "_Writer":
        return _Writer(self, uri)

    def read_range(self, uri: str, offset: int, length: int) -> bytes:
        self.requests["GET"] += 1
        self.bytes["read"] += length
        return bytes(self.files[uri][offset : offset + length])

    def note_written(self, size: int) -> None:
        parts = -(-size * _SCALE // object_store._PART_BYTES)
        self.requests["PUT"] += 1 if parts <= 1 else parts + 2
        self.bytes["written"] += size


class _Writer:
    def __init__(self, store: Store, uri: str) -> None:
        self._store = store
        self._file = store.files[uri] = bytearray()
        self._head = 0

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._store.note_written(len(self._file) - self._head)

    def write(self, data: bytes) -> None:
        self._head = self._head or len(data)  # which comes first, and is no thousandth
        self._file += data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[118_000, 1_000_000])
    parser.add_argument("--draft_bytes", type=int, default=170_000, help="the picture, its map and its dialogues")
    parser.add_argument("--bundle", type=int, default=512, help="images of a bundle, whose end ends a file of drafts")
    args = parser.parse_args()
    spill._FILE_BYTES //= _SCALE
    joins.HELD_BYTES = spill.HELD_BYTES = spill.HELD_BYTES // _SCALE
    joins.JOINED_BYTES //= _SCALE
    joins.LEAST_JOINED_BYTES //= _SCALE
    results = []
    for images in args.images:
        for joined in (False, True):
            result = count(images, args.draft_bytes // _SCALE, args.bundle, joined)
            print(", ".join(f"{name} {value}" for name, value in result.items()), flush=True)
            results.append(result)
    print(json.dumps({"benchmark": "store_requests", "draft_bytes": args.draft_bytes, "results": results}))


def count(images: int, draft_bytes: int, bundle: int, joined: bool) -> dict[str, Any]:
    """Count the requests and bytes of a build, but for those of its sources."""
    store = Store()
    spill.open_write, spill.read_range = store.open_write, store.read_range  # type: ignore[assignment]
    packs = _written(images, draft_bytes, bundle)
    splits: Counter[str] = Counter()
    for pack in packs:
        splits.update(place.split for place in unpacked(pack))
    shard_counts = {split: count_shards(rows, None) for split, rows in splits.items()}
    sizes = len(packs), images, images * draft_bytes
    plan = joins.plan_joins(sizes, shard_counts) if joined else ()
    for step in range(len(plan)):
        packs = _joined(packs, plan, step, shard_counts)
    shards: dict[Any, list[spill.Block]] = defaultdict(list)
    for pack in packs:
        for place in unpacked(pack):
            shards[place.split, spill.shard_of(place.key, shard_counts[place.split])].append(place.block)
    for blocks in shards.values():
        pieces = spill._pieces(blocks, spill.HELD_BYTES // len({block.uri for block in blocks}))
        for piece in {*pieces.values()}:
            piece.read()
        store.note_written(len(blocks) * draft_bytes)
        store.requests["COPY"] += 1
    return {
        "images": images,
        "files": sizes[0],
        "shards": len(shards),
        "plan": [list(step) for step in plan],
        **store.requests,
        "images per request": round(images / store.requests.total(), 1),
        "bytes read over written": round(store.bytes["read"] / store.bytes["written"], 2),
    }


def _written(images: int, draft_bytes: int, bundle: int) -> list[Packed]:
    """Write drafts as workers do."""
    packs = []
    most = min(spill._FILE_ROWS, -(-spill._FILE_BYTES // draft_bytes))
    for start in range(0, images, bundle):
        numbers = range(start, min(start + bundle, images))
        for first in range(0, len(numbers), most):
            places = [_place(number, draft_bytes) for number in numbers[first : first + most]]
            places.sort(key=lambda place: (place.split, spill.order_of(place.key)))
            packs.append(spill._write_file("memory://drafts", places, [bytes(draft_bytes)] * len(places)))
    return packs


def _place(number: int, draft_bytes: int) -> spill.SpilledDraft:
    key = hashlib.sha256(number.to_bytes(8)).hexdigest()
    split = "validation" if int(key[:16], 16) < _VALIDATION * 2**64 else "train"
    return spill.SpilledDraft(key, "", False, split, False, (), spill.Block("", 0, draft_bytes))


def _joined(packs: list[Packed], plan: tuple[joins.Join, ...], step: int, shard_counts: dict[str, int]) -> list[Packed]:
    parts: dict[Any, list[Packed]] = defaultdict(list)
    for pack in packs:
        for part, some in joins.divided(pack, plan, step, shard_counts):
            parts[part].append(some)
    return [joins._join((part, some), "memory://joined") for part, some in parts.items()]


if __name__ == "__main__":
    main()
