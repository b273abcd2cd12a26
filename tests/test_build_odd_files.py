"""A folder of odd and broken files: each ends in a row or in a reject with a reason."""

import http.server
import io
import json
import os
import random
import socket
import ssl
import struct
import tarfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builds import PICTURE, DataSet, build, tiny_mask2former
from PIL import Image

from collavo.errors import Rejected
from collavo.images import decode_rgb
from collavo.panoptic.index_png import decode_index_map
from collavo.scenes import write_scenes
from collavo.web import fetch

FORMATS = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "GIF": ("L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "P", "RGB", "CMYK", "I;16", "F"),
    "PPM": ("L", "RGB"),
}
EXTENSIONS = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "GIF": ".gif",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "PPM": ".ppm",
}
ODD_NAMES = [
    "with space",
    " ",
    "ünïcödé 😀",
    "new\nline",
    "tab\t",
    "'quote'",
    '"double"',
    "a;b|c&d",
    "-flag",
    "%41",
    "[x]",
    "*",
    "a" * 200,
]


def pictures(chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Format and bytes of small pictures in every mode that the format has."""
    noise = np.random.default_rng(0)
    while True:
        for format, modes in FORMATS.items():
            for mode in modes:
                width, height = chance.randint(1, 40), chance.randint(1, 40)
                if mode == "I;16":
                    image = Image.fromarray(noise.integers(0, 65536, (height, width), dtype=np.uint16))
                else:
                    rgb = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
                    image = Image.fromarray(rgb).convert(mode if mode != "LA" else "L")
                    image = image.convert("LA") if mode == "LA" else image
                file = io.BytesIO()
                image.save(file, format)
                yield format, file.getvalue()


def write_odd_files(folder: Path, pictured: int) -> int:
    """Fill a folder with so many odd pictures and some other odd things; return how many there are in it."""
    chance = random.Random(0)
    picture = pictures(chance)
    contents: list[tuple[str, bytes]] = []
    for i in range(pictured):
        format, data = next(picture)
        extension = EXTENSIONS[format]
        kind = i % 10
        if kind == 0:
            data = data[: chance.randrange(len(data))]  # truncated anywhere, to nothing at times
        elif kind == 1:
            extension = chance.choice(list(EXTENSIONS.values()))  # disguised
        elif kind == 2:
            extension = chance.choice(["", ".", ".JPG", ".jpeg.txt", ".json", ".tar.gz"])
        elif kind == 3:
            data = chance.randbytes(chance.randrange(300))
        elif kind == 4:
            place = chance.randrange(len(data))
            data = data[:place] + chance.randbytes(chance.randint(1, 9)) + data[place:]  # damaged in the middle
        elif kind == 5:
            data = data[:8] + chance.randbytes(100)  # an image by its first bytes only
        name = f"{i:03}{extension}"
        contents.append((f"{'/'.join('abc'[: i % 4])}/{name}" if i % 4 else name, data))
    contents += [(f"{name}.png", next(picture)[1]) for name in ODD_NAMES]
    contents += [(f"names/{name}/x.jpg", next(picture)[1]) for name in ODD_NAMES[:-1]]
    contents += [(f"same{extension}", next(picture)[1]) for extension in EXTENSIONS.values()]
    contents += [
        ("empty.jpg", b""),
        ("page.jpg", b"<!DOCTYPE html><title>404</title>"),
        ("list.json", json.dumps([{"id": 1}]).encode()),
        ("notes.txt", "Notizen über Bilder\n".encode("utf-16")),
        ("vector.svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"),
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"),
        ("bomb.png", _png_claiming(60_000, 60_000)),
        ("wide.png", _png_claiming(2**31 - 1, 1)),
        ("flat.png", _png_claiming(0, 5)),
        ("archive.jpg.gz", b"\x1f\x8b\x08" + bytes(20)),
    ]
    for name, data in contents:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    for name in (b"latin-\xe9.jpg", b"\xff\xfe.png", b"deep\xe9/x.jpg"):
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(next(picture)[1])
    target = folder / "008.webp"
    links = {"link.webp": target, "broken_link.jpg": folder / "nowhere.jpg", "loop.jpg": folder / "loop.jpg"}
    for name, path in links.items():
        os.symlink(path, folder / name)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()  # no file of its own
    return len(contents) + 3 + len(links) + 1


def _png_claiming(width: int, height: int) -> bytes:
    """A PNG of one pixel whose header claims another size."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


# Of 120, each format in each mode is spoilt in every way that its place among ten allows.
@pytest.fixture(scope="module", params=[120, pytest.param(960, marks=pytest.mark.slow)])
def odd(request, tmp_path_factory) -> tuple[int, DataSet]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("odd") / "files"
    folder.mkdir()
    count = write_odd_files(folder, request.param)
    checkpoint = tiny_mask2former(tmp_path_factory.mktemp("model"))
    output = tmp_path_factory.mktemp("built") / "out"
    model = ["--segmenter_checkpoint", checkpoint, "--segmenter_input_size", 64, "--device", "cpu"]
    return count, build(output, "--images", folder, *model)


def test_rows_and_rejects_are_all_the_files(odd):
    count, data = odd
    assert len(data.rows) + len(data.rejects) + data.manifest["merged"] == count
    assert data.manifest["inputs"] == {"folder": count}
    assert data.manifest["rows"] == len(data.rows) and sum(data.manifest["rejects"].values()) == len(data.rejects)


def test_every_reject_says_why(odd):
    _, data = odd
    for reject in data.rejects:
        assert all(reject[key].strip() for key in ("id", "source", "stage", "reason", "detail")), reject
    reasons = {reject["reason"] for reject in data.rejects}
    assert reasons == {
        *("not_an_image", "broken_image", "oversized_image"),
        *("missing_file", "unreadable_file", "not_a_file", "bad_path"),
    }
    assert len({reject["id"] for reject in data.rejects}) == len(data.rejects)


def test_every_row_can_be_decoded_and_has_a_map_of_its_size(odd):
    _, data = odd
    assert len(data.rows) > len(data.rejects) / 4
    for row in data.rows.values():
        assert decode_rgb(row.image_bytes).shape == (row.height, row.width, 3)
        assert decode_index_map(row.panoptic_png).shape == (row.height, row.width)
    assert any(row.segments for row in data.rows.values())


def test_odd_names_make_ids_that_find_the_file(odd):
    _, data = odd
    rows = data.rows
    for name in ODD_NAMES:
        assert rows[f"{name}.png"].image_path == f"{name}.png"
    by_reason = {name: reject["reason"] for reject in data.rejects for name in [reject["id"].rpartition("/")[2]]}
    assert by_reason["pipe.jpg"] == "not_a_file"
    assert by_reason["broken_link.jpg"] == "missing_file"
    assert by_reason["loop.jpg"] == "unreadable_file"
    assert by_reason["latin-\\xe9.jpg"] == by_reason["x.jpg"] == "bad_path"
    assert by_reason["bomb.png"] == by_reason["wide.png"] == "oversized_image"
    assert {f"same{extension}" for extension in EXTENSIONS.values()} <= rows.keys()


def test_a_list_of_files_as_shells_write_it(tmp_path):
    (tmp_path / ".hidden").mkdir()
    for name in ("ä.png", ".hidden/b.png"):
        (tmp_path / name).write_bytes(next(pictures(random.Random(0)))[1] + name.encode())
    (tmp_path / "list.TXT").write_bytes("ä.png\r\n\r\n".encode("utf-16"))  # PowerShell
    sources = ["--images", tmp_path / "list.TXT", tmp_path / ".hidden" / "*.png", "--image_root", tmp_path]
    data = build(tmp_path / "out", *sources, "--segmenter", "none")
    assert set(data.rows) == {"ä.png", ".hidden/b.png"} and not data.rejects


def test_a_member_of_a_tar_whose_name_is_not_utf8_is_a_reject(tmp_path):
    picture = next(pictures(random.Random(0)))[1]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.png", "b\udce9.png"):
            member = tarfile.TarInfo(name)
            member.size = len(picture)
            tar.addfile(member, io.BytesIO(picture))
    (tmp_path / "._a.tar").write_bytes(b"what macOS puts beside it")
    data = build(tmp_path / "out", "--dataset", tmp_path, "--segmenter", "none")
    assert set(data.rows) == {"a.tar/a.png"}
    assert [(reject["id"], reject["reason"]) for reject in data.rejects] == [("a.tar/b\\xe9.png", "bad_path")]


def test_a_folder_of_tars_is_read_as_img2dataset_leaves_it(tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(3):
        with tarfile.open(shards / f"0000{number}.tar", "w") as tar:
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(PICTURE) + 1
            tar.addfile(member, io.BytesIO(PICTURE + bytes([number])))
        listed = pa.table({"url": ["http://x/a.jpg"], "caption": ["a"], "status": ["success"]})
        pq.write_table(listed, shards / f"0000{number}.parquet")
        (shards / f"0000{number}_stats.json").write_text("{}")
    names = [f"0000{number}.tar/{number}.jpg" for number in range(3)]
    assert sorted(build(tmp_path / "out", "--dataset", shards, "--segmenter", "none").rows) == names
    assert f"{shards}: 3 .parquet files are left out" in capsys.readouterr().out
    some = build(tmp_path / "some", "--dataset", shards / "0000[01].tar", "--segmenter", "none")
    assert sorted(some.rows) == names[:2]


def test_a_coco_file_may_name_files_by_their_whole_paths_and_a_reject_names_the_file_at_fault(tmp_path):
    write_scenes(tmp_path / "scenes", 3, size_wh=(64, 48))
    json_file = tmp_path / "scenes" / "panoptic.json"
    coco = json.loads(json_file.read_text())
    for kind, entries in (("images", coco["images"]), ("panoptic", coco["annotations"])):
        for entry in entries:
            entry["file_name"] = str(tmp_path / "scenes" / kind / entry["file_name"])
    json_file.write_text(json.dumps(coco))
    image, mask = Path(coco["images"][0]["file_name"]), Path(coco["annotations"][1]["file_name"])
    image.write_bytes(image.read_bytes()[:900])
    mask.write_bytes(b"")
    flags = ["--coco_panoptic", json_file, "--coco_images", tmp_path / "scenes" / "images", "--max_reject_ratio", 1]
    built = build(tmp_path / "out", *flags)
    assert list(built.rows) == ["scene-000002.jpg"]
    by_stage = {reject["stage"]: reject["detail"] for reject in built.rejects}
    assert by_stage["decode"].startswith(f"{image}: ") and by_stage["segment"].startswith(f"{mask}: ")


def test_a_link_out_of_a_folder_puts_no_path_of_the_machine_into_rows(tmp_path):
    root, elsewhere = tmp_path / "data", tmp_path / "nfs" / "coco"
    for folder, name in ((elsewhere / "train2017", "a.jpg"), (root / "vg", "b.jpg")):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(PICTURE + name.encode())
    (root / "coco").symlink_to(elsewhere)
    (root / "vg_linked").symlink_to(root / "vg")  # within the folder, a picture has one path
    names = ["coco/train2017/a.jpg", "vg_linked/b.jpg"]
    turns = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A person."}]
    (tmp_path / "llava.json").write_text(json.dumps([{"id": n, "image": n, "conversations": turns} for n in names]))
    (tmp_path / "list.txt").write_text("\n".join(names))
    for number, flags in enumerate((
        ("--llava_json", tmp_path / "llava.json", "--image_root", root),
        ("--images", tmp_path / "list.txt", "--image_root", root),
        ("--images", root),
        ("--images", root / "**/*.jpg", "--llava_json", tmp_path / "llava.json", "--image_root", root),
    )):  # fmt: skip
        data = build(tmp_path / str(number), *flags, "--segmenter", "none", "--image_storage", "reference")
        assert sorted(row.image_path for row in data.rows.values()) == ["coco/train2017/a.jpg", "vg/b.jpg"], flags
        assert sorted(data.rows) == ["coco/train2017/a.jpg", "vg/b.jpg"]


def test_files_that_take_long_to_come_are_fetched_several_at_once(tmp_path):
    """A million of them, a tenth of a second each, would take 28 hours one after the other."""
    together = threading.Barrier(4)

    class Web(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            together.wait(60)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PICTURE + self.path.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        threading.Thread(target=server.serve_forever).start()
        names = [f"{number}.jpg" for number in range(32)]
        site = f"http://127.0.0.1:{server.server_port}"
        (tmp_path / "list.txt").write_text("\n".join(f"{site}/{name}" for name in names))
        try:
            words = ["--images", tmp_path / "list.txt", "--segmenter", "none", "--direct_num_workers", "1"]
            data = build(tmp_path / "out", *words)
        finally:
            server.shutdown()
    assert sorted(data.rows) == sorted(names)


def test_the_certificates_of_all_authorities_are_not_read_for_each_url():
    start = time.process_time()
    ssl.create_default_context()
    once = time.process_time() - start
    start = time.process_time()
    for number in range(40):
        with pytest.raises(Rejected):
            fetch(f"https://127.0.0.1:1/{number}.jpg")
    assert time.process_time() - start < 20 * once


def test_urls_that_are_refused_are_told_from_missing_ones_and_faults_that_pass_are_waited_for(tmp_path, monkeypatch):
    asked: Counter[str] = Counter()
    of_path = {"/gone.jpg": 404, "/private.jpg": 403, "/slow.jpg": 429, "/down.png": 503}

    class Web(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            busy_at_first = self.path == "/busy%20at%20first.jpg" and asked[self.path] < 3
            if self.path == "/reset.png" and asked[self.path] < 3:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                return
            self.send_response(503 if busy_at_first else of_path.get(self.path, 200))
            cut = self.path == "/cut.png" and asked[self.path] < 3
            data = PICTURE + self.path.encode()
            self.send_header("Content-Length", f"{len(data)}")
            self.end_headers()
            self.wfile.write(data[:30] if cut else data)

        def log_message(self, *_):
            pass

    monkeypatch.setattr("collavo.storage.WAITS", (0, 0, 0))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        threading.Thread(target=server.serve_forever).start()
        site = f"http://127.0.0.1:{server.server_port}"
        at_first = ["/busy at first.jpg", "/reset.png", "/cut.png"]
        names = [*of_path, "/there.jpg", "/down.jpg", *at_first, "/a?id=1", "/a?id=2"]
        (tmp_path / "list.txt").write_text(
            "\n".join([*(f"{site}{name}" for name in names), "http://127.0.0.1:1/x.jpg"])
        )
        try:
            data = build(tmp_path / "out", "--images", tmp_path / "list.txt", "--segmenter", "none")
        finally:
            server.shutdown()
    host = site.removeprefix("http://")
    assert sorted(data.rows) == sorted(f"{host}{n}" for n in names if n not in of_path)
    reasons = {reject["id"].removeprefix(site): (reject["reason"], reject["detail"]) for reject in data.rejects}
    assert {name: reason for name, (reason, _) in reasons.items()} == {
        "/gone.jpg": "missing_file",
        **dict.fromkeys(("/private.jpg", "/slow.jpg", "/down.png", "http://127.0.0.1:1/x.jpg"), "unreachable_url"),
    }
    assert "429 Too Many Requests, 4 times" in reasons["/slow.jpg"][1]
    once = ("/gone.jpg", "/private.jpg", "/there.jpg", "/down.jpg", "/a?id=1", "/a?id=2")
    at_last = ("/busy%20at%20first.jpg", "/reset.png", "/cut.png")
    assert asked == {**dict.fromkeys(once, 1), **dict.fromkeys(at_last, 3), "/slow.jpg": 4, "/down.png": 4}
