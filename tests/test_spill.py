import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import CAR, PERSON, SKY, crayon_row, segment

from collavo.storage import list_files
from pipelines import spill
from pipelines.records import Draft, Input, unpacked
from pipelines.spill import SpilledDraft, SpillWriter, order_of, read_drafts, shard_of, spilled_pictures
from schemas.categories import COCO_PANOPTIC
from schemas.crayon_row import Dialogue


def draft(name: str, *labels: int, **changes: object) -> Draft:
    segments = tuple(segment(id=i, label=label, is_crowd=i == 2) for i, label in enumerate(labels))
    plain = {
        "segments": segments,
        "image_sha256": name.encode().hex().zfill(64),
        "image_bytes": name.encode() * 50,
        **changes,
    }
    return Draft(crayon_row(image_id=name, **plain), (Input("folder", name),), ("{}",), {"read": 0.5})


def spilled(folder: str, drafts: Sequence[Draft]) -> list[SpilledDraft]:
    """The places of drafts that one worker has written."""
    writer = SpillWriter(folder, COCO_PANOPTIC)
    for one in drafts:
        writer.append(one)
    return [place for batch in writer.close() for place in unpacked(batch)]


def test_drafts_of_many_files_are_read_back_in_any_order(tmp_path):
    drafts = [draft(f"{i}") for i in range(90)]
    places = [place for i in range(3) for place in spilled(str(tmp_path), drafts[30 * i : 30 * i + 30])]
    random.Random(0).shuffle(places)
    names = [place.image_id for place in places]
    assert list(read_drafts([place.block for place in places])) == [drafts[int(name)] for name in names]
    assert len({place.block.uri for place in places}) == 3
    assert list(read_drafts([])) == []


def test_a_draft_is_read_back_as_it_was(tmp_path):
    dialogue = Dialogue("1", (("human", "?"), ("gpt", "!")))
    drafts = [
        replace(draft("a", PERSON, split="validation", license_id=3), unfamiliar=True, split_stated=True),
        draft("without a map", panoptic_png=None, other_paths=("b.jpg",), conversations=(dialogue,)),
        draft("elsewhere", image_bytes=None),
        draft("scored", segments=(segment(score=0.5, box_xyxy=(0.0, 1.0, 2.5, 3.0)),)),
        replace(
            draft("", image_sha256=None, image_path=None, width=None, panoptic_png=None), segmenters=(), seconds={}
        ),
    ]
    for one in drafts:
        (place,) = spilled(str(tmp_path), [one])
        assert [*read_drafts([place.block])] == [one]


def test_a_place_tells_what_the_steps_before_the_reading_need(tmp_path):
    (place,) = spilled(str(tmp_path), [draft("a/b", SKY, CAR, PERSON, CAR)])
    assert (place.key, place.split, place.split_stated) == (b"a/b".hex().zfill(64), "train", False)
    assert place.present == (PERSON, CAR)  # things, each once, crowds among them
    (place,) = spilled(str(tmp_path), [draft("x.json#1", image_sha256=None)])
    assert len(place.key) == 64 and int(place.key, 16) > 0


def test_a_shard_is_one_piece_of_each_file_and_one_request_to_a_store(monkeypatch):
    drafts = [draft(f"{i}", split="validation" if i % 5 == 0 else "train") for i in range(300)]
    places = [place for i in range(3) for place in spilled(f"memory://{id(drafts)}", drafts[100 * i : 100 * i + 100])]
    requests: list[tuple[str, int, int]] = []
    read_range = spill.read_range
    monkeypatch.setattr(spill, "read_range", lambda *range_: requests.append(range_) or read_range(*range_))
    read = []
    for split, count in (("train", 4), ("validation", 1)):
        for shard in range(count):
            ours = [p for p in places if p.split == split and shard_of(p.key, count) == shard]
            ours.sort(key=lambda place: order_of(place.key))
            read += [one.row.image_id for one in read_drafts([place.block for place in ours])]
    assert sorted(read) == sorted(f"{i}" for i in range(300))
    assert len(requests) == 3 * 5
    assert sum(length for _, _, length in requests) == sum(place.block.length for place in places)


def test_shards_are_ranges_of_one_order_whatever_their_number():
    keys = sorted((f"{i:064x}" for i in range(1000)), key=order_of)
    for count in (1, 3, 64):
        shards = [shard_of(key, count) for key in keys]
        assert shards == sorted(shards) and set(shards) == set(range(count))


@pytest.mark.parametrize(("bound", "value"), [("_FILE_ROWS", 2), ("_FILE_BYTES", 100), ("_FILE_SECONDS", 0.0)])
def test_a_file_ends_when_its_drafts_are_many_large_or_old(tmp_path, monkeypatch, bound, value):
    monkeypatch.setattr(spill, bound, value)
    writer = SpillWriter(str(tmp_path), COCO_PANOPTIC)
    for i in range(10):
        writer.append(draft(f"{i:02}"))
    assert len(list_files(str(tmp_path))) >= 5  # before its end


def test_pictures_are_found_again_in_what_a_killed_writer_left(tmp_path):
    drafts = {name.encode().hex().zfill(64): draft(name) for name in "abcdef"}
    places = spilled(str(tmp_path), list(drafts.values()))
    last = max(places, key=lambda place: place.block.offset)
    whole = Path(last.block.uri).read_bytes()
    Path(last.block.uri).write_bytes(whole[:-1])
    found = spilled_pictures(str(tmp_path), "first")
    assert set(found) == {bytes.fromhex(digest) for digest in drafts if digest != last.key}
    assert list(read_drafts([*found.values()])) == [drafts[digest.hex()] for digest in found]
    for end in (0, 3, 9, places[0].block.offset - 1):  # nothing, or no more than some of the table of contents
        Path(last.block.uri).write_bytes(whole[:end])
        assert spilled_pictures(str(tmp_path), f"work {end}") == {}


def test_a_file_of_drafts_is_one_that_arrow_reads(tmp_path):
    spilled(str(tmp_path), [draft("a"), draft("b")])
    (file,) = tmp_path.iterdir()
    with pa.ipc.open_stream(file) as stream:
        assert sorted(stream.read_all()["image_id"].to_pylist()) == ["a", "b"]
