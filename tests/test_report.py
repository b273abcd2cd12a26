"""The report: everything is there, nothing leads outside, what data say is text, and the size is bounded."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from collavo.images import decode_rgb
from collavo.panoptic.index_png import encode_index_map
from collavo.panoptic.maps import PanopticMap, SegmentInfo, build_panoptic_map
from collavo.parquet_writer import CrayonFileWriter
from pipelines.accounts import Counts
from pipelines.records import Draft, Reject
from pipelines.report import histogram, quantile, samples_of_shard, write_report
from pipelines.report_sample import make_sample
from schemas.categories import COCO_PANOPTIC
from schemas.crayon_row import CrayonRow, Dialogue, Instruction

HOSTILE = "</script><script>alert('é & \"')</script>"
PERSON, SKY = 0, 119


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self._texts: list[str] = []
        self.feed(html)
        self.text = "".join(self._texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self._texts.append(data)

    def count(self, tag: str) -> int:
        return sum(element == tag for element, _ in self.elements)


def make_row(image_id: str, size_wh: tuple[int, int] = (64, 48), people: int = 2) -> CrayonRow:
    width, height = size_wh
    ids = np.full((height, width), people + 1)
    for person in range(people):
        ids[height // 2 :, person * width // people : (person + 1) * width // people - 1] = person + 1
    infos = [SegmentInfo(person + 1, PERSON, score=0.875) for person in range(people)]
    panoptic = build_panoptic_map(ids, [*infos, SegmentInfo(people + 1, SKY, score=0.5)])
    rgb = np.random.default_rng(0).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return CrayonRow(
        image_id=image_id,
        image_sha256="0" * 64,
        image_bytes=jpeg(Image.fromarray(rgb).resize(size_wh)),
        image_path=f"{image_id}.jpg",
        width=width,
        height=height,
        sources=("coco", "llava"),
        license_id=4,
        split="train",
        panoptic_png=encode_index_map(panoptic),
        segments=panoptic.segments,
        instructions=(
            Instruction("counting", "How many people?", "2 people", "2", "present", (1, 2), "c1"),
            Instruction("counting", "How many toasters?", "There is none.", "0", "absent", (), "c1"),
        ),
        conversations=(Dialogue("d1", (("human", "<image>\nWho is it?"), ("gpt", "Two people."))),),
    )


def jpeg(image: Image.Image, orientation: int = 1) -> bytes:
    encoded, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(encoded, "JPEG", exif=exif)
    return encoded.getvalue()


def publish(
    folder: Path,
    shards: list[list[CrayonRow]],
    rejects: list[Reject] = [],  # noqa: B006
    unfamiliar: bool = False,
) -> str:
    """A data set of handmade rows with its report, whose HTML is returned."""
    counts = Counts()
    files = []
    samples = []
    for position, rows in enumerate(shards):
        name = f"train-{position:05d}-of-{len(shards):05d}.parquet"
        writer = CrayonFileWriter((folder / name).open("wb"), {}, COCO_PANOPTIC)
        for place, row in enumerate(rows):
            writer.write(row)
            samples.append(make_sample(f"{name}, row {place}", row, COCO_PANOPTIC))
            counts.add_row(row, Draft(row, (), (), {"read": 0.25}, unfamiliar), merged=0)
        size, sha256 = writer.close({"segmenters": ['{"name": "annotations"}']})
        files.append({"name": name, "rows": len(rows), "bytes": size, "sha256": sha256})
    for reject in rejects:
        counts.add_reject(reject)
    lines = [json.dumps(reject._asdict()) + "\n" for reject in rejects]
    manifest = {
        "schema_version": 2,
        "started": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T03:05:07+00:00",
        "inputs": {"coco": counts.rows + len(rejects)},
        **counts.as_json(),
        "files": files,
        "categories": {"name": COCO_PANOPTIC.name, "categories": COCO_PANOPTIC.as_records()},
        "segmenters": [{"name": "annotations"}],
        "configuration": {"output": str(folder), "seed": 17},
        "versions": {"collavo": "0.1.0", "python": "3.11"},
    }
    write_report(str(folder), manifest, samples, "".join(lines).encode())
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    rejects = [
        Reject("lost", "llava", "read", "missing_file", "lost.jpg"),
        Reject("b", "coco", "decode", "broken", "?"),
    ]
    return publish(tmp_path_factory.mktemp("data"), [[make_row("first")], [make_row("second")]], rejects)


def test_every_section_is_there(html: str) -> None:
    page = Page(html)
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {"samples", "contents", "rejects", "making"} <= ids
    assert page.count("article") == 2
    assert page.count("img") == 4  # image and map of each
    for text in (
        "2026-01-02 03:05:07 UTC in 0:01:02",
        "48 px, train, from coco and llava, licence 4; train-00000-of-00002.parquet, row 0",
        "How many toasters?",
        "Two people.",
        "0.88",  # a score
        "Objects per image mean 3.0, median 3",
        "counting, absent",
        "50% absent",
        "missing_file",
        "lost.jpg",
        "annotations",
        "train-00001-of-00002.parquet",
    ):
        assert text in page.text, text


def test_pictures_that_the_segmenter_knows_nothing_like_are_counted_at_the_top(html: str, tmp_path: Path) -> None:
    assert "unlike all that the segmenter knows" not in Page(html).text
    text = Page(publish(tmp_path, [[make_row("one"), make_row("two")]], unfamiliar=True)).text
    assert "2 pictures are unlike all that the segmenter knows" in text[: text.index("2 sample rows")]


def test_each_object_has_its_box_its_label_and_its_line(html: str) -> None:
    article = html.split("<article>")[1]
    for position in (0, 1):
        boxes = re.findall(rf'<(\w+) class="[^"]*object[^"]*" data-objects="{position}"', article)
        assert sorted(boxes) == ["div", "span", "tr"]
    boxes = re.findall(r'class="box.*?left: (\S+); width: (\S+);\s*top: (\S+); height: (\S+)"', article, re.DOTALL)
    assert boxes == [("0.00%", "48.44%", "50.00%", "50.00%"), ("50.00%", "48.44%", "50.00%", "50.00%")]
    assert 'class="instruction" data-objects="0 1"' in article  # what the count of two people rests on


def test_the_page_needs_no_other_file_and_no_network(html: str) -> None:
    page = Page(html)
    addresses = [v for _, a in page.elements for k, v in a.items() if k in ("src", "href", "srcset", "data", "poster")]
    assert addresses
    assert all(address.startswith(("#", "data:image/")) for address in addresses)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    assert not re.search(r"//[a-z]|url\(|@import", re.sub(r"data:image/\S+", "", html))


def test_what_data_say_stays_text(tmp_path: Path) -> None:
    row = replace(
        make_row("x"),
        image_id=f"id{HOSTILE}",
        image_path=f"path{HOSTILE}",
        instructions=(Instruction("counting", f"question{HOSTILE}", f"answer{HOSTILE}", None, None, (), "t"),),
        conversations=(Dialogue(f"dialogue{HOSTILE}", (("human", f"turn{HOSTILE}"),)),),
    )
    rejects = [Reject(f"reject{HOSTILE}", "coco", "read", "missing_file", f"detail{HOSTILE}")]
    page = Page(publish(tmp_path, [[row, replace(row, image_id="y", image_bytes=None)]], rejects))
    assert page.count("script") == 1  # ours
    for prefix in ("id", "path", "question", "answer", "dialogue", "turn", "reject", "detail"):
        assert prefix + HOSTILE in page.text, prefix


def test_a_lone_surrogate_in_a_reject_is_shown_escaped(tmp_path: Path) -> None:
    html = publish(tmp_path, [[make_row("x")]], [Reject("bad\ud83d", "llava", "list", "bad_path", "not UTF-8")])
    assert "bad\\ud83d" in html


def test_size_is_bounded_whatever_the_data_set_holds(tmp_path: Path) -> None:
    row = make_row("big", (450, 350), people=90)
    row = replace(
        row,
        instructions=(replace(row.instructions[0], answer="long answer " * 1000),) * 200,
        conversations=(Dialogue("d", (("human", "word " * 1000),) * 100),) * 10,
    )
    shards = [[replace(row, image_id=f"{shard}-{i}") for i in range(3)] for shard in range(7)]
    rejects = [Reject(f"{i}", "llava", "read", "missing_file", "detail " * 1000) for i in range(500)]
    html = publish(tmp_path, shards, rejects)
    assert len(html) < 4_000_000
    page = Page(html)
    assert page.count("article") == 16
    for left_out in ("31 objects", "176 instructions", "90 turns", "7 conversations"):
        assert f"and {left_out} more" in page.text, left_out
    shown_shards = set(re.findall(r"(train-\d+-of-\d+.parquet), row", page.text))
    assert len(shown_shards) == 7


@pytest.mark.parametrize("shards", [1, 3, 5, 16, 60, 500, 50_000])
def test_some_shards_offer_samples_enough_and_not_many_more(shards: int) -> None:
    offered = [samples_of_shard(position, shards) for position in range(shards)]
    assert 16 <= sum(offered) <= 64 and max(offered) <= 16


def test_referenced_images_are_shown_by_their_map_alone(tmp_path: Path) -> None:
    page = Page(publish(tmp_path, [[replace(make_row("x"), image_bytes=None)]]))
    assert page.count("img") == 1
    assert "Not in the data set, which refers to it as x.jpg" in page.text


def test_broken_pictures_are_told_and_the_rest_of_the_row_is_shown(tmp_path: Path) -> None:
    row = make_row("x")
    broken = replace(row, image_bytes=row.image_bytes[:-40], panoptic_png=row.panoptic_png[:60])
    page = Page(publish(tmp_path, [[broken]]))
    assert page.count("img") == 0
    assert "The image cannot be decoded: JPEG of 64 x 48" in page.text
    assert "The map cannot be decoded" in page.text
    assert "How many people?" in page.text


def test_images_are_upright_and_maps_keep_their_colours() -> None:
    top_red = Image.new("RGB", (64, 48), "blue")
    top_red.paste("red", (0, 0, 64, 24))
    turned = jpeg(top_red.rotate(90, expand=True), orientation=6)  # 6: to be turned clockwise
    sample = make_sample("", replace(make_row("x"), image_bytes=turned), COCO_PANOPTIC)
    assert decode(sample.image)[2, 32, 0] > 200
    crayon_map = decode(sample.crayon_map)
    for shown in sample.segments:
        x, y = shown.anchor_xy
        assert "#{:02x}{:02x}{:02x}".format(*crayon_map[int(y * 48), int(x * 64)]) == shown.color


def test_a_map_of_more_than_255_segments_is_shown() -> None:
    row = make_row("x", (1200, 32), people=300)
    assert decode(make_sample("", row, COCO_PANOPTIC).crayon_map).shape == (14, 512, 3)


def decode(data_uri: str | None) -> np.ndarray:
    assert data_uri is not None
    return decode_rgb(base64.b64decode(data_uri.partition("base64,")[2]))


def test_rows_without_objects_or_instructions_make_a_report(tmp_path: Path) -> None:
    empty = np.zeros((48, 64), np.uint8)
    row = replace(make_row("x"), panoptic_png=encode_index_map(PanopticMap(empty, ())), segments=(), instructions=())
    page = Page(publish(tmp_path, [[row]]))
    assert page.count("img") == 2
    assert "None: every input is in a row." in page.text


def test_a_dialogue_about_no_image_is_shown_without_pictures(tmp_path: Path) -> None:
    row = replace(
        make_row("x"),
        **dict.fromkeys(("image_sha256", "image_bytes", "image_path", "width", "height", "panoptic_png")),
        segments=(),
        instructions=(),
    )
    page = Page(publish(tmp_path, [[row]]))
    assert page.count("img") == 0 and page.count("article") == 1
    beside = Page(publish(tmp_path, [[row, make_row("y")]])).text
    assert "3.0 an image" in beside and "1.0 a row" in beside  # objects, of which there are 1.5 a row; instructions
    assert "Two people." in page.text and "None" not in page.text.split("Two people.")[0].rpartition("samples")[2]


@given(st.dictionaries(st.integers(0, 400), st.integers(1, 1000), min_size=1), st.sampled_from([None, (0, 1, 3, 9)]))
def test_a_histogram_counts_every_number_once_in_its_bin(
    counts: dict[int, int], starts: tuple[int, ...] | None
) -> None:
    bins = histogram(counts, starts)
    assert len(bins) <= 24
    for label, count in bins:
        first, last = (
            (int(label.rstrip("+")), 10**9) if label.endswith("+") else map(int, (label + "-" + label).split("-")[:2])
        )
        assert count == sum(n for number, n in counts.items() if first <= number <= last)
    assert sum(count for _, count in bins) == sum(counts.values())


@given(st.lists(st.integers(0, 50), min_size=1), st.floats(0.01, 1))
def test_quantiles_agree_with_numpy(numbers: list[int], share: float) -> None:
    counts = {number: numbers.count(number) for number in numbers}
    assert quantile(counts, share) == np.quantile(numbers, share, method="inverted_cdf")
