"""Bytes in and out of any file system: local paths by the operating system, all others (`gs://`, ...) by Beam's."""

import os
import posixpath
import shutil
import stat
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import BinaryIO, cast

from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems

from collavo.errors import Rejected

MANIFEST, REJECTS, REPORT = "manifest.json", "rejects.jsonl", "report.html"
"""Files of a finished data set, beside its shards."""

MAX_FILE_BYTES = 256 << 20
"""An image or mask file larger than this is refused unread."""


def is_local(uri: str) -> bool:
    return "://" not in uri


def has_file_system(uri: str) -> bool:
    """Whether files of this kind can be reached at all: some need an extra of Beam's, some schemes nobody knows."""
    try:
        return is_local(uri) or bool(FileSystems.get_filesystem(uri))
    except ValueError:
        return False


def join(root: str, relative: str) -> str:
    """A path below a root, on any file system."""
    return posixpath.join(root, relative) if is_local(root) else FileSystems.join(root, *relative.split("/"))


def canonical(uri: str) -> str:
    """One spelling per file: local folders are made absolute and freed of links, so that sources meet."""
    if not is_local(uri):
        return uri
    folder, name = os.path.split(uri)
    return os.path.join(_real_folder(folder), name)


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def read_bytes(uri: str) -> bytes:
    """All bytes of a file.

    Raises:
        Rejected: `missing_file`, `not_a_file`, `unreadable_file`, or `oversized_file` above `MAX_FILE_BYTES`.
    """
    if not has_file_system(uri):
        raise Rejected("unreadable_file", f"{uri}: Beam has no file system for it here")
    try:
        if is_local(uri) and not stat.S_ISREG(os.stat(uri).st_mode):
            raise Rejected("not_a_file", uri)  # opening a named pipe would wait for ever
        with open_read(uri) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise Rejected("missing_file", uri) from error
    except (OSError, BeamIOError) as error:
        if not is_local(uri) and not FileSystems.exists(uri):
            raise Rejected("missing_file", uri) from error
        raise Rejected("unreadable_file", f"{uri}: {error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise Rejected("oversized_file", f"{uri}: more than {MAX_FILE_BYTES >> 20} MiB")
    return data


def exists(uri: str) -> bool:
    return os.path.exists(uri) if is_local(uri) else FileSystems.exists(uri)


def open_read(uri: str) -> BinaryIO:
    # Beam would decompress by extension; a .gz that claims to be an image shall be refused, not unpacked.
    if is_local(uri):
        return open(uri, "rb")
    return cast(BinaryIO, FileSystems.open(uri, compression_type=CompressionTypes.UNCOMPRESSED))


def open_write(uri: str) -> BinaryIO:
    """A new file; on object stores it exists only once it is closed."""
    if is_local(uri):
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        return open(uri, "wb")
    return cast(BinaryIO, FileSystems.create(uri, compression_type=CompressionTypes.UNCOMPRESSED))


def is_folder(pattern: str) -> bool:
    """Whether a path means all files below it: a local folder, or on other file systems a path that ends in a slash."""
    return os.path.isdir(pattern) if is_local(pattern) else pattern.endswith("/")


def list_files(pattern: str) -> list[str]:
    """The files that a glob pattern, a folder (to its depths) or a single path names, sorted; none is no fault."""
    if not is_local(pattern):
        every = f"{pattern}**" if is_folder(pattern) else pattern
        return sorted(metadata.path for metadata in FileSystems.match([every])[0].metadata_list)
    if is_folder(pattern):
        return sorted(
            os.path.join(folder, name) for folder, _, names in os.walk(pattern, followlinks=True) for name in names
        )
    if os.path.exists(pattern):
        return [pattern]
    # Not by Beam, to which `*.jpg` names nothing and `a/**/*.jpg` nothing that lies directly in `a`.
    return sorted(path for path in glob(pattern, recursive=True) if not os.path.isdir(path))


def rename(source: str, destination: str) -> None:
    """Move a finished file to its final name; a repeated call, after a retry, finds it there."""
    if exists(source):
        FileSystems.rename([source], [destination])
    elif not exists(destination):
        raise FileNotFoundError(f"neither {source} nor {destination} exists")


def delete(uris: list[str]) -> None:
    """Remove files or folders; what is not there is no fault."""
    for uri in filter(is_local, uris):  # not by Beam, to which `out[1]/manifest.json` is a pattern
        if os.path.isdir(uri):
            shutil.rmtree(uri)
        else:
            Path(uri).unlink(missing_ok=True)
    if remote := [uri for uri in uris if not is_local(uri)]:
        FileSystems.delete(remote)
