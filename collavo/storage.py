"""Bytes in and out of any storage: local paths by the operating system, S3 (`s3://`) and Azure (`abfs://`) by
`collavo.object_store`, all else by Arrow.

Arrow itself reaches Google Cloud (`gs://`); any other scheme goes through fsspec. Credentials,
region and endpoint come from the environment variables of each store's SDK, such as `AWS_ACCESS_KEY_ID` and
`AWS_ENDPOINT_URL`. `file://` names a local path.

A store has objects and no folders: a "folder" there is what the names of its objects begin with.
"""

import errno
import io
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial, wraps
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar, cast
from urllib.parse import unquote

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, FSSpecHandler, PyFileSystem

from collavo.errors import Rejected, StoreFault, StoreOutage, UserError, first_line
from collavo.remote_file import RemoteFile, RemoteWriter
from collavo.web import WAITS, fetch, is_url

P = ParamSpec("P")
T = TypeVar("T")

MANIFEST, REJECTS, REPORT = "manifest.json", "rejects.jsonl", "report.html"
"""Files of a finished data set, beside its shards."""

MAX_FILE_BYTES = 256 << 20
"""An image or mask file larger than this is refused unread."""

FAULTS = (OSError, pa.ArrowException)
"""What reading and writing raise where a disk or a store refuses; one that does not answer raises `StoreOutage`."""

_BUCKET_SCHEMES = ("s3://", "abfs://", "abfss://", "az://")
"""Of the stores that `collavo.object_store` reaches."""

_GCS_OPTIONS = "?retry_limit_seconds=60"
_SCHEMES = "s3, gs, abfs and az are read as they are, hf and whatever else fsspec knows through its package"
_OUTAGE = re.compile(
    r"google::cloud::Status\((UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|RESOURCE_EXHAUSTED)|HTTP status 5\d\d"
)
"""What Arrow says where a store does not answer; the type of its error is the same as for any other."""

_READ_AHEAD_BYTES = 4 << 20
_WRITE_BYTES = 32 << 20


def is_local(uri: str) -> bool:
    """Tell whether a path or URI lies on a disk of this machine."""
    return "://" not in uri or uri.startswith("file://")


def _is_bucket(uri: str) -> bool:
    return uri.startswith(_BUCKET_SCHEMES)


def local_path(uri: str) -> str:
    """Return the path in a local path or `file://` URI."""
    return unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri


def canonical(uri: str) -> str:
    """Return one spelling per file: local folders are made absolute, links resolved, so that sources meet."""
    if not is_local(uri):
        return uri
    folder, name = os.path.split(local_path(uri))
    return os.path.join(_real_folder(os.path.join(os.getcwd(), folder)), name)


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


@contextmanager
def _faults(uri: str) -> Iterator[None]:
    """Raise what the clients of stores raise, each in its own way, as `StoreOutage` or `StoreFault`; what a disk
    refuses, and a missing file, come as they are."""
    try:
        yield
    except (FileNotFoundError, StoreFault, UserError):
        raise
    except Exception as error:
        if is_local(uri):
            raise
        line = first_line(error).partition(" error_info=")[0]  # where Google's client says it all again
        no_answer = _OUTAGE.search(line) or isinstance(error, (ConnectionError, TimeoutError))
        raise (StoreOutage if no_answer else StoreFault)(f"{uri}: {line}") from error


def _one_kind_of_fault(function: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """Have all faults of a function's first argument, a URI, raised as `_faults` does."""

    @wraps(function)
    def guarded(uri: str, *rest: P.args, **named: P.kwargs) -> T:
        with _faults(uri):
            return function(uri, *rest, **named)

    return guarded


def check_reachable(uri: str) -> None:
    """Make sure that this installation has a file system for a URI; nothing is asked of the store.

    Raises:
        UserError: in one line that says what to install.
    """
    if not is_local(uri):
        _remote(uri)


def read_bytes(uri: str) -> bytes:
    """Read all bytes of a file.

    Raises:
        Rejected: `missing_file`, `not_a_file`, `unreadable_file`, or `oversized_file` above `MAX_FILE_BYTES`; of an
            http(s) URL `unreachable_url`, also where its server does not answer: a list has URLs of many servers, and
            one of them is no reason to stop;
            StoreOutage: where a store does not answer, as after its client has tried for a while.
    """
    if is_url(uri):
        try:
            return fetch(uri, MAX_FILE_BYTES, WAITS)
        except Rejected as error:
            raise Rejected(error.reason, f"{uri}: {error}") from error
    try:
        if is_local(uri) and not stat.S_ISREG(os.stat(local_path(uri)).st_mode):
            raise Rejected("not_a_file", uri)  # opening a named pipe would wait for ever
        data = _read_bounded(uri)
    except FileNotFoundError as error:
        raise Rejected("missing_file", uri) from error
    except StoreOutage:
        raise
    except (*FAULTS, UserError) as error:
        raise Rejected("unreadable_file", fault_line(uri, error)) from error
    if data is None:
        raise Rejected("oversized_file", f"{uri}: more than {MAX_FILE_BYTES >> 20} MiB")
    return data


def fault_line(uri: str, error: Exception) -> str:
    """Say what reading or writing raised, in a line that begins with the file; some of what is raised names it."""
    return f"{uri}: {first_line(error).removeprefix(f'{uri}: ')}"


@_one_kind_of_fault
def _read_bounded(uri: str) -> bytes | None:
    """Read a file; None if it is too large."""
    if is_local(uri):
        with open_random(uri) as file:
            return None if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES else file.read()
    files, path = _remote(uri)
    if _is_bucket(uri):
        return cast(bytes | None, files.read(path, MAX_FILE_BYTES))
    parts: list[bytes] = []
    # As a stream it is one request on Google Cloud. Part by part, since Arrow allocates all that it is asked for.
    with files.open_input_stream(path, compression=None) as stream:
        while part := stream.read(_READ_AHEAD_BYTES):
            parts.append(part)
            if sum(map(len, parts)) > MAX_FILE_BYTES:
                return None
    return b"".join(parts)


@_one_kind_of_fault
def read_range(uri: str, offset: int, length: int) -> bytes:
    """Read some bytes of a file."""
    if is_local(uri):
        with open_random(uri) as file:
            file.seek(offset)
            return file.read(length)
    files, path = _remote(uri)
    if _is_bucket(uri):
        return cast(bytes, files.read_at(path, offset, length))
    with files.open_input_file(path) as file:
        return bytes(file.read_at(length, offset))


@_one_kind_of_fault
def size_of(uri: str) -> int:
    """Return the bytes of a file."""
    if is_local(uri):
        return os.stat(local_path(uri)).st_size
    files, path = _remote(uri)
    return files.get_file_info(path).size or 0


@_one_kind_of_fault
def exists(uri: str) -> bool:
    """Tell whether there is a file of that name, or on a disk a folder."""
    if is_local(uri):
        return os.path.exists(local_path(uri))
    files, path = _remote(uri)
    return files.get_file_info(path).type != FileType.NotFound


def open_read(uri: str) -> BinaryIO:
    """Open a file to read from its start to its end; on a store, 4 MiB are fetched at a time."""
    file = open_random(uri)
    return file if is_local(uri) else cast(BinaryIO, io.BufferedReader(file, _READ_AHEAD_BYTES))


def refuse_pipe(uri: str) -> None:
    """Refuse a local pipe, which is read once and in order, and waits for ever where nobody writes.

    Raises:
        UserError: naming it; OSError where nothing is there.
    """
    if stat.S_ISFIFO(os.stat(local_path(uri)).st_mode):
        raise UserError(f"{uri}: is a pipe; write its content to a file")


@_one_kind_of_fault
def open_random(uri: str) -> BinaryIO:
    """Open a file to read here and there; on a store, each read is one request for just these bytes.

    Raises:
        UserError: for a pipe.
    """
    if is_local(uri):
        refuse_pipe(uri)
        return open(local_path(uri), "rb")
    files, path = _remote(uri)
    return cast(BinaryIO, files.open_input_file(path) if _is_bucket(uri) else _ArrowFile(uri, files, path))


class _ArrowFile(RemoteFile):
    """A file in a store that Arrow reaches; on Google Cloud, the whole of it is one request.

    There Arrow's own asks for all bytes from there on when it is opened and at each seek, and fails at the end of the
    file.
    """

    _file: pa.NativeFile | None = None

    def __init__(self, uri: str, files: FileSystem, path: str) -> None:
        self._uri, self._files, self._path = uri, files, path
        if uri.startswith("g"):
            info = files.get_file_info(path)
            if info.type != FileType.File:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            super().__init__(info.size)
        else:
            self._file = files.open_input_file(path)
            super().__init__(self._file.size())

    def fetch(self, offset: int, size: int) -> bytes:
        with _faults(self._uri):
            if self._file is None and size == self.length():
                with self._files.open_input_stream(self._path, compression=None) as stream:
                    return bytes(stream.read())
            self._file = self._file or self._files.open_input_file(self._path)
            return bytes(self._file.read_at(size, offset))

    def close(self) -> None:
        if self._file:
            self._file.close()
        super().close()


@_one_kind_of_fault
def open_write(uri: str) -> BinaryIO:
    """Open a new file, with the folders above it; on a store it exists only once it is closed."""
    if is_local(uri):
        Path(local_path(uri)).parent.mkdir(parents=True, exist_ok=True)
        return open(local_path(uri), "wb")
    files, path = _remote(uri)
    if isinstance(files, PyFileSystem):  # fsspec also reaches servers that have folders, as by SFTP
        files.create_dir(path.rpartition("/")[0])
    if _is_bucket(uri):
        return cast(BinaryIO, files.open_output_stream(path))
    # By itself Arrow would pack a file whose name ends in .gz, and send each write to Google Cloud as a request.
    stream = files.open_output_stream(path, compression=None, buffer_size=_WRITE_BYTES)
    return cast(BinaryIO, RemoteWriter(stream, partial(_faults, uri)))


def is_folder(pattern: str) -> bool:
    """Tell whether a path means all files below it: a folder, or on a store a path that ends in a slash."""
    return os.path.isdir(local_path(pattern)) if is_local(pattern) else pattern.endswith("/")


def list_files(pattern: str) -> list[str]:
    """List the files that a glob pattern, a folder (to its depths) or a single path names, sorted; there may be none.

    `*` and `?` stop at slashes; `**` stands for any number of folders, none included. At the beginning of a name it
    stands for that and `*`, as to gsutil: `photos/**.jpg` is `photos/**/*.jpg`.
    """
    if not is_local(pattern):
        return _list_remote(pattern)
    pattern = local_path(pattern)
    if is_folder(pattern):
        return sorted(_files_below(pattern))
    if os.path.exists(pattern):
        return [pattern]
    pattern = _spelled_out(pattern)
    if "**" not in pattern.split("/"):
        return sorted(path for path in glob(pattern) if not os.path.isdir(path))
    start = "".join(fixed_part(pattern).rpartition("/")[:2])
    matches = _glob_matcher(pattern[len(start) :])  # Python's `**` would go round in circles where links do
    found = (path if start else path.removeprefix("./") for path in _files_below(start or "./"))
    return sorted(path for path in found if matches(path[len(start) :]))


def _spelled_out(pattern: str) -> str:
    """Give a `**` that begins a name a folder's place of its own."""
    return re.sub(r"(^|/)\*\*+(?=[^/*])", r"\1**/*", pattern)


def fixed_part(pattern: str) -> str:
    """Return a glob pattern up to its first wildcard."""
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0]


def is_nowhere(pattern: str) -> bool:
    """Tell whether a file, a folder, or the folder that a glob pattern looks in, is on a disk and not there."""
    if not is_local(pattern) or exists(pattern):
        return False
    start = fixed_part(pattern)
    return start == pattern or not exists(os.path.dirname(start) or ".")


def _files_below(top: str) -> Iterator[str]:
    """Yield the files of a folder to its depths. A link to a folder that it lies in is not followed: it has no end."""
    above: dict[str, tuple[str, ...]] = {top: (os.path.realpath(top),)}
    for folder, folders, names in os.walk(top, followlinks=True):
        yield from (os.path.join(folder, name) for name in names)
        passed = above.pop(folder)
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in passed]
        above.update((os.path.join(folder, name), (*passed, real[name])) for name in folders)


def _glob_matcher(pattern: str) -> Callable[[str], object]:
    """Return what tells whether a path matches; in the middle of a name `**` is a `*`."""
    from fsspec.utils import glob_translate

    parts = (part if part == "**" else re.sub(r"\*\*+", "*", part) for part in pattern.split("/"))
    return re.compile(glob_translate("/".join(parts))).match


@_one_kind_of_fault
def put_in_place(source: str, destination: str) -> None:
    """Give a finished file its final name; a repeated call, after a retry, finds it there.

    A store copies the object, and the first one goes with the folder that it is in.
    """
    try:
        if is_local(source):
            os.replace(local_path(source), local_path(destination))
        else:
            files, path = _remote(source)
            files.copy_file(path, _remote(destination)[1])
    except FileNotFoundError:
        if not exists(destination):
            raise FileNotFoundError(f"neither {source} nor {destination} exists") from None


def delete(uris: Sequence[str]) -> None:
    """Remove files, and folders with all that is in them; whatever is not there is left out."""
    for uri in uris:
        _delete(uri)


def delete_files(uris: Sequence[str]) -> None:
    """Remove files of one store, or of a disk, that were there when they were listed. Unlike `delete`, it looks up none
    of them first; in S3, a thousand go in one request."""
    if not uris or is_local(uris[0]):
        delete(uris)
        return
    files, _ = _remote(uris[0])
    paths = [_remote(uri)[1] for uri in uris]
    with _faults(uris[0]):
        if _is_bucket(uris[0]):
            files.delete_files(paths)
            return
        for path in paths:
            with suppress(FileNotFoundError):
                files.delete_file(path)


@_one_kind_of_fault
def _delete(uri: str) -> None:
    if is_local(uri):
        if os.path.isdir(local_path(uri)):
            shutil.rmtree(local_path(uri))
        else:
            Path(local_path(uri)).unlink(missing_ok=True)
        return
    files, path = _remote(uri)
    if _is_bucket(uri):
        files.delete(path)
        return
    kind = files.get_file_info(path).type
    if kind == FileType.Directory:
        with suppress(FileNotFoundError):  # of Google Cloud, where no object stands for the folder itself
            files.delete_dir(path)
    elif kind == FileType.File:
        files.delete_file(path)


@_one_kind_of_fault
def _list_remote(pattern: str) -> list[str]:
    """List files in a store, found with a single listing of what lies below the fixed part of the pattern."""
    root, rest = _split_root(pattern)
    files, base = _file_system(root)
    base = f"{base.rstrip('/')}/" if base else ""
    above, deep, matches = rest, True, _glob_matcher("**")
    if not is_folder(pattern):
        fixed = fixed_part(rest)
        if fixed == rest:
            is_file = files.get_file_info(base + rest).type == FileType.File
            return [pattern] if is_file else _list_remote(f"{pattern}/")  # a folder, as on a disk without a slash
        spelled_out = _spelled_out(rest)
        above, wild = fixed.rpartition("/")[0], spelled_out[len(fixed) :]
        deep = "/" in wild or "**" in wild
        matches = _glob_matcher(spelled_out)
    found = files.get_file_info(FileSelector((base + above).rstrip("/"), recursive=deep, allow_not_found=True))
    names = (info.path[len(base) :] for info in found if info.type == FileType.File)
    # A name may look like a pattern.
    return sorted(f"{root}/{name}" for name in names if matches(name) or name == rest)


@lru_cache(maxsize=64)
def _file_system(root: str) -> tuple[Any, str]:
    """Return the file system of all URIs that begin with `scheme://authority`, and what it calls that root itself: an
    Arrow file system, or one with some of its methods.

    One per process and root, since each holds open connections.
    """
    try:
        if _is_bucket(root):
            from collavo.object_store import Bucket  # loads its library, which most commands do without

            return Bucket(root), ""
        if root.startswith(("gs://", "gcs://")):
            # Left alone, Arrow tries for a quarter of an hour to reach Google Cloud where there are no credentials.
            root += _GCS_OPTIONS
            if "CLOUD_STORAGE_EMULATOR_ENDPOINT" in os.environ:  # a server that asks for none
                root = root.replace("://", "://anonymous@")
            return cast(tuple[FileSystem, str], FileSystem.from_uri(root))
        from fsspec.core import url_to_fs

        files, path = url_to_fs(root)
        return PyFileSystem(FSSpecHandler(files)), path
    except UserError:
        raise
    except (ValueError, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{root}: {first_line(error)}; {_SCHEMES}") from error
    except (ImportError, OSError) as error:  # the first says what to install
        raise UserError(f"{root}: {first_line(error)}") from error


def _remote(uri: str) -> tuple[Any, str]:
    """Return the file system of a URI, and its path there."""
    root, path = _split_root(uri)
    files, base = _file_system(root)
    return files, f"{base.rstrip('/')}/{path}" if base else path


def _split_root(uri: str) -> tuple[str, str]:
    """`scheme://authority` and the path below it, which may hold any character and is not parsed as part of a URI."""
    scheme, _, rest = uri.partition("://")
    authority, _, path = rest.partition("/")
    return f"{scheme}://{authority}", path
