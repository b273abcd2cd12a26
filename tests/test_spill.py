import os
import random
from dataclasses import replace

import pytest
from conftest import CAR, PERSON, SKY, crayon_row, segment

from pipelines.merge import image_key
from pipelines.records import Draft, Input, Mention, unpacked
from pipelines.spill import (
    Block,
    MentionSpillWriter,
    SpilledDraft,
    SpillWriter,
    read_drafts,
    read_mentions,
    spilled_pictures,
)
from schemas.categories import COCO_PANOPTIC


def draft(name: str, *labels: int) -> Draft:
    segments = tuple(segment(id=i, label=label, is_crowd=i == 2) for i, label in enumerate(labels))
    row = crayon_row(image_id=name, image_bytes=name.encode() * 50, segments=segments)
    return Draft(row, (Input("folder", name),), ("{}",), {"read": 0.5})


def spill(folder: str, drafts: list[Draft]) -> list[SpilledDraft]:
    writer = SpillWriter(folder, COCO_PANOPTIC)
    for one in drafts:
        writer.append(one)
    return [place for batch in writer.close() for place in unpacked(batch)]


def test_drafts_are_read_back_in_any_order_and_from_many_files(tmp_path):
    drafts = [draft(str(i) * (i + 1)) for i in range(9)]
    places = [place for i in range(3) for place in spill(str(tmp_path), drafts[3 * i : 3 * i + 3])]
    order = random.Random(0).sample(range(9), 9)
    assert list(read_drafts([places[i].block for i in order])) == [drafts[i] for i in order]
    assert len({place.block.uri for place in places}) == 3


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux shows them")
def test_a_shard_out_of_very_many_files_keeps_few_of_them_open(tmp_path):
    drafts = [draft(f"{i}") for i in range(300)]
    places = [place for one in drafts for place in spill(str(tmp_path), [one])]
    before = len(os.listdir("/proc/self/fd"))
    most = 0
    for i, read in enumerate(read_drafts(place.block for place in places + places)):
        assert read == drafts[i % 300]
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
    assert 1 < most < 100 and len(os.listdir("/proc/self/fd")) == before


def test_a_place_tells_what_the_steps_before_the_reading_need(tmp_path):
    (place,) = spill(str(tmp_path), [draft("a/b", SKY, CAR, PERSON, CAR)])
    assert (place.key, place.split, place.split_stated) == ("0" * 64, "train", False)
    assert place.present == (PERSON, CAR)  # things, each once, crowds among them
    without_image = replace(draft("x.json#1"), row=crayon_row(image_id="x.json#1", image_sha256=None))
    (place,) = spill(str(tmp_path), [without_image])
    assert len(place.key) == 64 and int(place.key, 16) > 0


def test_only_the_drafts_asked_for_are_read(tmp_path):
    places = spill(str(tmp_path), [draft("a"), draft("b"), draft("c")])
    assert [one.row.image_id for one in read_drafts([places[2].block, places[0].block])] == ["c", "a"]
    assert list(read_drafts([])) == []


def test_pictures_are_found_again_in_what_a_killed_writer_left(tmp_path):
    digests = [f"{i:064x}" for i in range(4)]
    drafts = [Draft(crayon_row(image_sha256=d), (Input("folder", d),), (), {}) for d in digests]
    spill(str(tmp_path), drafts[:2])
    spill(str(tmp_path), drafts[2:])
    last = max(tmp_path.iterdir(), key=lambda file: digests[3].encode() in file.read_bytes())
    last.write_bytes(last.read_bytes()[:-1])
    found = spilled_pictures(str(tmp_path))
    assert set(found) == {bytes.fromhex(digest) for digest in digests[:3]}
    assert list(read_drafts([found[bytes.fromhex(digests[1])]])) == [drafts[1]]


def test_mentions_of_an_image_meet_whatever_files_they_lie_in(tmp_path):
    mentions = [Mention(Input("folder", f"{i}"), f"{i % 700}.jpg", f"/d/{i % 700}.jpg") for i in range(10_000)]
    blocks: dict[int, list[Block]] = {}
    for part in (mentions[:9_000], mentions[9_000:]):  # the first is written in several goes
        writer = MentionSpillWriter(str(tmp_path))
        for mention in part:
            writer.append(mention)
        for partition, block in writer.close():
            blocks.setdefault(partition, []).append(block)
    images = [image for of_partition in blocks.values() for image in read_mentions(of_partition)]
    assert len(images) == 700 and sum(map(len, images)) == 10_000
    assert all(len({image_key(mention) for mention in image}) == 1 for image in images)
    assert {mention for image in images for mention in image} == set(mentions)
    assert len(blocks) > 200  # so that no partition is large
