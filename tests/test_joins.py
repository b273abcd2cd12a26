import hashlib
from collections import Counter, defaultdict
from typing import Any

import pytest

from collavo.storage import read_range
from pipelines import joins, spill
from pipelines.records import Packed, unpacked
from pipelines.spill import Block, SpilledDraft, order_of, shard_of

ROWS_OF_FILE = ROWS_OF_SHARD = 200
ROW_BYTES = 64


class Counted:
    """What was asked of a store for drafts, and the bytes read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests = self.read = 0
        open_write = spill.open_write

        def reading(uri: str, offset: int, length: int) -> bytes:
            self.requests, self.read = self.requests + 1, self.read + length
            return read_range(uri, offset, length)

        def writing(uri: str) -> Any:
            self.requests += 1
            return open_write(uri)

        monkeypatch.setattr(spill, "read_range", reading)
        monkeypatch.setattr(spill, "open_write", writing)


def written(rows: int, folder: str) -> list[Packed]:
    """Files of drafts as workers leave them; each draft is no more than its key."""
    places = []
    for number in range(rows):
        key = hashlib.sha256(b"%d" % number).hexdigest()
        split = "train" if number % 10 else "validation"
        places.append(SpilledDraft(key, "", False, split, False, (), Block("", 0, ROW_BYTES)))
    files = [places[first : first + ROWS_OF_FILE] for first in range(0, rows, ROWS_OF_FILE)]
    ordered = [sorted(file, key=lambda place: (place.split, order_of(place.key))) for file in files]
    return [spill._write_file(folder, file, [place.key.encode() for place in file]) for file in ordered]


def joined(packs: list[Packed], plan: tuple[joins.Join, ...], shards: dict[str, int], folder: str) -> list[Packed]:
    for step in range(len(plan)):
        parts = defaultdict(list)
        for pack in packs:
            for part, some in joins.divided(pack, plan, step, shards):
                parts[part].append(some)
        packs = [joins._join(part, folder) for part in parts.items()]
    return packs


def read_by_shards(packs: list[Packed], shards: dict[str, int]) -> list[str]:
    """The keys that all shards read, each at its place."""
    of_shard = defaultdict(list)
    for place in (place for pack in packs for place in unpacked(pack)):
        of_shard[place.split, shard_of(place.key, shards[place.split])].append(place)
    keys = []
    for places in of_shard.values():
        blocks = [place.block for place in places]
        pieces = spill._pieces(blocks, spill.HELD_BYTES // len({block.uri for block in blocks}))
        read = {piece: piece.read() for piece in dict.fromkeys(pieces.values())}
        for place in places:
            piece = pieces[place.block]
            start = place.block.offset - piece._start
            assert read[piece][start : start + ROW_BYTES].decode() == place.key
            keys.append(place.key)
    return keys


@pytest.mark.parametrize(("rows", "steps"), [(600, 0), (4_000, 1), (16_000, 2)])
def test_requests_for_an_image_grow_neither_with_the_files_nor_with_the_shards(rows, steps, monkeypatch):
    file_bytes = ROWS_OF_FILE * ROW_BYTES
    for name, files in (("HELD_BYTES", 4), ("JOINED_BYTES", 10), ("LEAST_JOINED_BYTES", 4)):
        monkeypatch.setattr(joins, name, files * file_bytes)
    monkeypatch.setattr(spill, "HELD_BYTES", joins.HELD_BYTES)
    store, folder = Counted(monkeypatch), f"memory://{rows}"
    packs = written(rows, folder)
    splits = Counter(place.split for pack in packs for place in unpacked(pack))
    shards = {split: max(1, count // ROWS_OF_SHARD) for split, count in splits.items()}
    plan = joins.plan_joins((len(packs), rows, rows * ROW_BYTES), shards)
    assert len(plan) == steps
    packs_joined = joined(packs, plan, shards, folder)
    assert max(sum(p.block.length for p in unpacked(pack)) for pack in packs_joined) <= 2 * joins.JOINED_BYTES
    keys = read_by_shards(packs_joined, shards)
    assert len(keys) == len({*keys}) == rows
    assert store.requests * 20 <= rows
    assert store.read <= 1.3 * (1 + steps + 1) * rows * ROW_BYTES  # drafts, what is joined, rows
    if steps:  # as it would be without
        before = store.requests
        read_by_shards(packs, shards)
        assert (store.requests - before) * 20 > rows


def test_a_joined_file_has_the_drafts_in_the_order_of_the_rows():
    packs = written(400, "memory://order")
    places = [place for pack in packs for place in unpacked(pack)]
    after = unpacked(spill.join_files(places[::-1], "memory://order"))
    assert after == sorted(after, key=lambda place: (place.split, order_of(place.key)))
    assert {place._replace(block=Block("", 0, 0)) for place in after} == {
        place._replace(block=Block("", 0, 0)) for place in places
    }


def test_whatever_the_number_of_pictures_each_shard_reads_few_files_of_a_size_that_a_disk_takes():
    for rows in (10**5, 10**6, 10**7, 10**8, 10**9):
        shards = rows // 2000
        plan = joins.plan_joins((rows // 390, rows, rows * 170_000), {"train": shards})
        assert plan[-1].files <= 10
        for step in plan:
            assert rows * 170_000 * step.shards <= shards * step.files * joins.JOINED_BYTES
