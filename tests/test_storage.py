import gzip
import http.server
import os
import threading
import uuid
from pathlib import Path

import fsspec
import pytest
from pyarrow.fs import LocalFileSystem

from collavo import object_store, storage
from collavo.errors import Rejected, StoreOutage, UserError
from collavo.storage import (
    canonical,
    check_reachable,
    delete,
    exists,
    is_local,
    is_nowhere,
    list_files,
    open_read,
    open_write,
    put_in_place,
    read_bytes,
)


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """A folder of a few files, the current folder above it."""
    for name in (
        "photos/b.jpg",
        "photos/a.png",
        "photos/[1].jpg",
        "photos/sub/c.jpg",
        "photos/sub/deep/d.jpg",
        "e.jpg",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("photos", ["photos/[1].jpg", "photos/a.png", "photos/b.jpg", "photos/sub/c.jpg", "photos/sub/deep/d.jpg"]),
        ("photos/sub/", ["photos/sub/c.jpg", "photos/sub/deep/d.jpg"]),
        ("photos/*.jpg", ["photos/[1].jpg", "photos/b.jpg"]),
        ("./**/d**/*.jpg", ["./photos/sub/deep/d.jpg"]),
        # ** is any number of folders, none included
        ("photos/**/*.jpg", ["photos/[1].jpg", "photos/b.jpg", "photos/sub/c.jpg", "photos/sub/deep/d.jpg"]),
        ("photos/**.jpg", ["photos/[1].jpg", "photos/b.jpg", "photos/sub/c.jpg", "photos/sub/deep/d.jpg"]),
        ("**c.jpg", ["photos/sub/c.jpg"]),
        ("*.jpg", ["e.jpg"]),  # in the current folder
        ("photos/?.png", ["photos/a.png"]),
        ("photos/*", ["photos/[1].jpg", "photos/a.png", "photos/b.jpg"]),  # files, not folders
        ("photos/b.jpg", ["photos/b.jpg"]),
        ("photos/[1].jpg", ["photos/[1].jpg"]),  # a name that looks like a pattern
        ("photos/nothing.jpg", []),
        ("photos/b*.jpg", ["photos/b.jpg"]),
        ("photos/nothing*.jpg", []),
        ("nowhere/*.jpg", []),
    ],
)
def test_files_are_listed_by_folder_glob_or_name(photos: Path, pattern: str, files: list[str]):
    assert list_files(pattern) == files
    absolute = os.path.join(photos.parent, pattern)
    assert list_files(absolute) == [os.path.join(photos.parent, file) for file in files]


@pytest.mark.parametrize(
    ("pattern", "missing"),
    [
        ("photos", False),
        ("photos/[1].jpg", False),
        ("photos/b*.jpg", False),
        ("phot*/b.jpg", False),
        ("photos/nothing*.jpg", False),  # its folder is there
        ("photos/nothing.jpg", True),
        ("nowhere/*.jpg", True),
        ("nowhere", True),
        ("s3://bucket/nowhere", False),  # nobody is asked
    ],
)
def test_a_pattern_is_nowhere_only_if_the_folder_that_it_looks_in_is(photos: Path, pattern: str, missing: bool):
    assert is_nowhere(pattern) == missing


def test_linked_folders_and_broken_links_leave_a_trace(photos: Path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "x.jpg").write_bytes(b"x")
    (photos / "sub" / "linked").symlink_to(elsewhere)
    (photos / "sub" / "gone.jpg").symlink_to("nowhere.jpg")
    for pattern in ("photos/sub", "photos/sub/**"):
        assert {"photos/sub/linked/x.jpg", "photos/sub/gone.jpg"} <= set(list_files(pattern))


@pytest.mark.parametrize("pattern", [".", "**", "**/*.jpg"])
def test_links_that_lead_back_are_not_followed(photos: Path, monkeypatch, pattern: str):
    monkeypatch.chdir(photos)
    before = list_files(pattern)
    for name, target in (("up", ".."), ("up2", "../.."), ("deep/self", "."), ("deep/up", "..")):
        (photos / "sub" / name).symlink_to(target)
    assert len(before) > 2
    assert {file for file in list_files(pattern) if "up2" not in file} == set(before)


def test_a_name_that_is_not_utf8_is_listed_and_read(tmp_path):
    raw = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    with open(raw, "wb") as file:
        file.write(b"x")
    assert list_files(str(tmp_path)) == list_files(f"{tmp_path}/*.jpg") == [os.fsdecode(raw)]
    assert read_bytes(os.fsdecode(raw)) == b"x"


def test_bytes_are_read_whole_up_to_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MAX_FILE_BYTES", 10)
    (tmp_path / "ten").write_bytes(b"0123456789")
    (tmp_path / "eleven").write_bytes(b"0123456789a")
    assert read_bytes(str(tmp_path / "ten")) == b"0123456789"
    with pytest.raises(Rejected, match="eleven") as refusal:
        read_bytes(str(tmp_path / "eleven"))
    assert refusal.value.reason == "oversized_file"


def test_a_compressed_file_is_read_as_it_is(tmp_path):
    (tmp_path / "a.jpg.gz").write_bytes(b"\x1f\x8bnot gzip")
    assert read_bytes(str(tmp_path / "a.jpg.gz")) == b"\x1f\x8bnot gzip"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.jpg", "missing_file"),
        ("broken.jpg", "missing_file"),  # a link to nowhere
        ("file/below.jpg", "unreadable_file"),  # a file where a folder should be
        ("x" * 300, "unreadable_file"),  # longer than a name may be
        ("folder", "not_a_file"),
        ("pipe", "not_a_file"),  # to open it would wait for ever
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name: str, reason: str):
    (tmp_path / "broken.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Rejected) as refusal:
        read_bytes(str(tmp_path / name))
    assert refusal.value.reason == reason and name in str(refusal.value)


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(UserError, match=r"list.txt: is a pipe; write its content to a file"):
        open_read(str(tmp_path / "list.txt"))


def test_a_file_has_one_spelling_however_its_folder_is_reached(photos: Path):
    (photos.parent / "linked").symlink_to(photos / "sub")
    spellings = ["photos/sub/c.jpg", "photos/../photos/./sub/c.jpg", str(photos / "sub" / "c.jpg"), "linked/c.jpg"]
    assert {canonical(spelling) for spelling in spellings} == {os.path.realpath(photos / "sub" / "c.jpg")}


def test_a_linked_file_keeps_its_own_name(photos: Path):
    (photos / "other.jpg").symlink_to("b.jpg")  # two names of one file are two images
    assert canonical("photos/other.jpg") == os.path.join(os.path.realpath(photos), "other.jpg")


def test_a_file_uri_is_a_local_path(photos: Path):
    uri = f"file://{photos}/%5B1%5D.jpg"
    assert is_local(uri) and exists(uri) and read_bytes(uri) == b"photos/[1].jpg"
    assert canonical(uri) == str(photos / "[1].jpg") == list_files(uri)[0]
    assert is_local("/bucket/a.jpg") and is_local("a:b.jpg") and not is_local("gs://bucket/a.jpg")


def test_a_finished_file_is_moved_once_and_a_repeated_move_is_no_fault(tmp_path):
    staged, final = str(tmp_path / "staging" / "a"), str(tmp_path / "a")
    with open_write(staged) as file:
        file.write(b"whole")
    put_in_place(staged, final)
    put_in_place(staged, final)
    assert read_bytes(final) == b"whole" and not exists(staged)
    with pytest.raises(FileNotFoundError, match="nothing"):
        put_in_place(str(tmp_path / "nothing"), str(tmp_path / "nowhere"))


def test_what_is_not_there_is_deleted_without_complaint(photos: Path):
    delete([str(photos / name) for name in ("sub", "b.jpg", "nothing", "[1].jpg")])
    assert list_files("photos") == ["photos/a.png"]


# --- stores, by way of one in memory


@pytest.fixture
def store() -> str:
    """A store of a few objects, one of them empty, one with a name that no URI could hold."""
    root = f"memory://{uuid.uuid4().hex}"
    for name in ("b.jpg", "a.png", "[1].jpg", "sub/c.jpg", "sub/deep/d.jpg", "sub/e#%41 ?.jpg", "other"):
        with open_write(f"{root}/photos/{name}") as file:
            file.write(name.encode() * (name != "other"))
    return root


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("photos/sub/", ["sub/c.jpg", "sub/deep/d.jpg", "sub/e#%41 ?.jpg"]),
        ("photos/*.jpg", ["[1].jpg", "b.jpg"]),
        ("photos/**/*.jpg", ["[1].jpg", "b.jpg", "sub/c.jpg", "sub/deep/d.jpg", "sub/e#%41 ?.jpg"]),
        ("photos/**.jpg", ["[1].jpg", "b.jpg", "sub/c.jpg", "sub/deep/d.jpg", "sub/e#%41 ?.jpg"]),
        ("photos/sub/**", ["sub/c.jpg", "sub/deep/d.jpg", "sub/e#%41 ?.jpg"]),
        ("*/sub/*.jpg", ["sub/c.jpg", "sub/e#%41 ?.jpg"]),
        ("photos/?.png", ["a.png"]),
        ("photos/[1].jpg", ["[1].jpg"]),
        ("photos/other", ["other"]),
        ("photos/nothing", []),
        ("photos/sub", ["sub/c.jpg", "sub/deep/d.jpg", "sub/e#%41 ?.jpg"]),  # a folder without its slash
        ("nowhere/*", []),
        ("nowhere/", []),
    ],
)
def test_objects_are_listed_as_files_are(store: str, pattern: str, files: list[str]):
    assert list_files(f"{store}/{pattern}") == [f"{store}/photos/{file}" for file in files]


def test_a_container_of_no_named_account_is_refused_in_a_line(monkeypatch):
    with pytest.raises(UserError, match=r"abfs://box: of which account.* AZURE_STORAGE_ACCOUNT_NAME"):
        check_reachable("abfs://box/a.jpg")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with pytest.raises(UserError, match=r"s3://: .*a bucket has to be named"):
        check_reachable("s3://")


def test_a_packed_file_in_a_store_stays_packed_and_a_large_one_is_refused(tmp_path, monkeypatch):
    data = gzip.compress(b"some lists")
    uri = f"memory://{uuid.uuid4().hex}/lists.json.gz"
    with open_write(uri) as file:
        file.write(data)
    assert read_bytes(uri) == data
    (tmp_path / "lists.json.gz").write_bytes(data)
    on_google = storage._ArrowFile("gs://bucket/lists.json.gz", LocalFileSystem(), str(tmp_path / "lists.json.gz"))
    assert on_google.read() == data
    monkeypatch.setattr(storage, "MAX_FILE_BYTES", len(data) - 1)
    with pytest.raises(Rejected) as refusal:
        read_bytes(uri)
    assert refusal.value.reason == "oversized_file"


def test_objects_are_read_moved_and_deleted(store: str):
    for uri in list_files(f"{store}/photos/"):
        name = uri.removeprefix(f"{store}/photos/")
        assert read_bytes(uri) == name.encode() * (name != "other")
    for _ in range(2):
        put_in_place(f"{store}/photos/sub/c.jpg", f"{store}/c.jpg")
    assert read_bytes(f"{store}/c.jpg") == b"sub/c.jpg"
    delete([f"{store}/photos/sub", f"{store}/photos/other", f"{store}/nothing"])
    assert list_files(f"{store}/") == [f"{store}/{name}" for name in ("c.jpg", *(f"photos/{n}" for n in _LEFT))]
    with pytest.raises(Rejected) as refusal:
        read_bytes(f"{store}/photos/other")
    assert refusal.value.reason == "missing_file"
    with open_read(f"{store}/photos/b.jpg") as file:
        assert (file.read(1), file.seek(0), file.read()) == (b"b", 0, b"b.jpg")


_LEFT = ("[1].jpg", "a.png", "b.jpg")


@pytest.mark.parametrize(("uri", "fault"), [("nope://x/a", "Protocol not known: nope"), ("adl://x/a", "adlfs")])
def test_a_store_that_needs_something_installed_says_what(uri: str, fault: str):
    with pytest.raises(UserError, match=fault) as refusal:
        check_reachable(uri)
    assert "\n" not in str(refusal.value)
    with pytest.raises(Rejected, match=fault):
        read_bytes(uri)


class Unplugged(fsspec.AbstractFileSystem):
    """A file system whose client raises errors of its own, as the hub's does."""

    def _refuse(self, *_: object, **__: object) -> None:
        raise RuntimeError("Name or service not known\nand much more")

    info = ls = find = open = _refuse


@pytest.mark.parametrize("call", [list_files, exists])
def test_whatever_a_client_raises_is_a_fault_of_the_storage_in_one_line(call):
    fsspec.register_implementation("unplugged", Unplugged, clobber=True)
    with pytest.raises(OSError, match=r"Name or service not known$"):
        call("unplugged://bucket/photos/")


def test_a_store_that_does_not_answer_tells_nothing_of_the_file(monkeypatch):
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:1", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(object_store, "_MOST_RETRIES", 1)
    storage._file_system.cache_clear()
    with pytest.raises(StoreOutage, match="Connection refused"):
        storage.read_bytes("s3://nobody/a.jpg")
    storage._file_system.cache_clear()


@pytest.mark.parametrize(
    "code, status, outage",
    [("ExpiredToken", 400, True), ("RequestTimeTooSkewed", 403, True), ("", 401, True), ("AccessDenied", 403, False)],
)
def test_credentials_that_end_tell_nothing_of_the_file_and_a_file_that_is_denied_is_left_out(
    monkeypatch, code, status, outage
):
    class Store(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = f"<Error><Code>{code}</Code><Message>The store said so.</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever).start()
        values = {"ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "ACCESS_KEY_ID": "a"}
        for name, value in {**values, "SECRET_ACCESS_KEY": "b", "REGION": "here"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        storage._file_system.cache_clear()
        try:
            with pytest.raises(StoreOutage if outage else Rejected, match="The store said so"):
                storage.read_bytes("s3://somebody/a.jpg")
        finally:
            server.shutdown()
            storage._file_system.cache_clear()


@pytest.mark.parametrize("name", ["folder//a.jpg", "a/./b.jpg"])
def test_a_name_that_no_object_is_asked_for_by_is_a_fault_of_the_file(name, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(Rejected) as refusal:
        read_bytes(f"s3://nobody/{name}")
    assert refusal.value.reason == "unreadable_file"
