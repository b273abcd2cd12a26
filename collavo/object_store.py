"""S3 and Azure in as few requests as can be.

Arrow's own clients ask for the size of a file before they read it, write even an empty one in three requests, and make
and delete objects that stand for folders: four requests for a picture's two, and ten for a file that is written and put
in its place. For Azure Arrow's takes no key from the environment.
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, BinaryIO, cast

import obstore
import obstore.exceptions
from obstore.store import from_url
from pyarrow.fs import FileInfo, FileSelector, FileType, resolve_s3_region

from collavo.errors import StoreFault, StoreOutage, UserError, first_line
from collavo.remote_file import RemoteFile, RemoteWriter

_EXPIRED = re.compile(
    r"ExpiredToken|TokenRefreshRequired|RequestTimeTooSkewed|Signature not valid in the specified time frame"
)
"""Of credentials that were valid once: S3's codes, and what Azure says of a signature."""

_MOST_RETRIES = 10
"""They take a minute."""

_PART_BYTES = 72 << 20
"""A larger file is uploaded in parts of this size. A file of drafts is smaller."""


class Bucket:
    """A bucket of S3 or a container of Azure, with the methods of `pyarrow.fs.FileSystem` that `collavo.storage` calls.

    Credentials, region and endpoint come from the usual environment variables or the machine's role. A region of S3
    that is not named is looked up.

    Raises:
        UserError: if nothing names the bucket, or the account of a container.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        retries: Any = {"max_retries": _MOST_RETRIES, "backoff": {"init_backoff": timedelta(seconds=0.2), "base": 2}}
        client: Any = {"allow_http": True, "timeout": "5m", "connect_timeout": "5s"}
        try:
            self._store = from_url(root, config=_region(root), client_options=client, retry_config=retries)
        except obstore.exceptions.BaseError as error:
            if "Account must be specified" not in str(error):
                raise UserError(f"{root}: {first_line(error)}; a bucket has to be named, as in s3://BUCKET/") from error
            names = "AZURE_STORAGE_ACCOUNT_NAME names it, or abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/"
            raise UserError(f"{root}: of which account? {names}") from error

    def read(self, path: str, most_bytes: int) -> bytes | None:
        """Read a file in one request; None if it is larger."""
        with _faults(f"{self._root}/{path}"):
            found = obstore.get(self._store, path)
            return found.bytes().to_bytes() if found.meta["size"] <= most_bytes else None

    def get_file_info(self, path: str | FileSelector) -> Any:
        """Look up a file, or list those below a folder, without the empty objects by which consoles mark folders."""
        if isinstance(path, str):
            try:
                return FileInfo(path, FileType.File, size=self.size(path))
            except FileNotFoundError:
                return FileInfo(path, FileType.NotFound)
        prefix = f"{path.base_dir}/" if path.base_dir else ""
        with _faults(f"{self._root}/{prefix}"):
            if path.recursive:
                found = obstore.list(self._store, prefix or None).collect()
            else:
                found = obstore.list_with_delimiter(self._store, prefix or None)["objects"]
        # The client leaves out the slash at the end of a marker's name.
        folders = {path.base_dir}
        for each in found:
            folder = each["path"].rpartition("/")[0]
            while folder and folder not in folders:
                folders.add(folder)
                folder = folder.rpartition("/")[0]
        return [
            FileInfo(each["path"], FileType.File, size=each["size"])
            for each in found
            if each["size"] or each["path"] not in folders
        ]

    def size(self, path: str) -> int:
        """Ask for the bytes of a file."""
        with _faults(f"{self._root}/{path}"):
            return int(obstore.head(self._store, path)["size"])

    def read_at(self, path: str, offset: int, length: int) -> bytes:
        """Read some bytes of a file."""
        with _faults(f"{self._root}/{path}"):
            return obstore.get_range(self._store, path, start=offset, length=length).to_bytes()

    def read_first(self, path: str, length: int) -> tuple[bytes, int]:
        """Read the first bytes of a file, and the size of it all with them."""
        with _faults(f"{self._root}/{path}"):
            try:
                found = obstore.get(self._store, path, options={"range": (0, length)})
            except obstore.exceptions.GenericError as error:
                if "416" in str(error):  # an empty file has no bytes to name
                    return b"", 0
                raise
            return found.bytes().to_bytes(), int(found.meta["size"])

    def open_input_file(self, path: str) -> BinaryIO:
        return cast(BinaryIO, _Reader(self, path))

    def open_output_stream(self, path: str) -> BinaryIO:
        writer = obstore.open_writer(self._store, path, buffer_size=_PART_BYTES, max_concurrency=2)
        return cast(BinaryIO, RemoteWriter(writer, partial(_faults, f"{self._root}/{path}")))

    def copy_file(self, source: str, destination: str) -> None:
        with _faults(f"{self._root}/{destination}"):
            obstore.copy(self._store, source, destination)

    def delete(self, path: str) -> None:
        """Delete all that lies below a folder, and a file of that name if it does not end in a slash."""
        with _faults(f"{self._root}/{path}"):
            found = [each["path"] for each in obstore.list(self._store, f"{path.rstrip('/')}/").collect()]
        self.delete_files(found if path.endswith("/") else [path, *found])

    def delete_files(self, paths: Sequence[str]) -> None:
        """Delete files; one that is not there is left out."""
        if not paths:
            return
        with _faults(f"{self._root}/{paths[0]}"):
            try:
                obstore.delete(self._store, [*paths])
            except FileNotFoundError:  # on Azure, where the first that is not there stops the others
                for path in paths:
                    with suppress(FileNotFoundError):
                        obstore.delete(self._store, path)


def _region(root: str) -> Any:
    """Look up the region of a bucket of S3, which anyone may ask for; nothing where it, or a server, is named."""
    if not root.startswith("s3://"):
        return None
    if any(os.environ.get(f"AWS_{name}") for name in ("REGION", "DEFAULT_REGION", "ENDPOINT_URL", "ENDPOINT_URL_S3")):
        return None
    try:
        return {"region": resolve_s3_region(root.removeprefix("s3://").partition("/")[0])}
    except OSError:
        return None


class _Reader(RemoteFile):
    """A file of a bucket; its first read brings its size along."""

    def __init__(self, bucket: Bucket, path: str) -> None:
        super().__init__()
        self._bucket, self._path = bucket, path

    def ask_for_length(self) -> int:
        return self._bucket.size(self._path)

    def fetch(self, offset: int, size: int) -> bytes:
        return self._bucket.read_at(self._path, offset, size)

    def read(self, size: int | None = -1) -> bytes:
        if self._size is not None or self._position > 0 or size == 0:
            return super().read(size)
        if size is not None and size > 0:
            data, self._size = self._bucket.read_first(self._path, size)
        else:
            data = self._bucket.read(self._path, sys.maxsize) or b""
            self._size = len(data)
        self._position = len(data)
        return data


@contextmanager
def _faults(uri: str) -> Iterator[None]:
    """Raise what the client raises as one line, with what the store itself says of it."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{uri}: there is no such file") from error
    except Exception as error:
        text = str(error)
        wordings = (r"<Message>([^<]+)", r'(?:message|error): "([^"]+)', r"HTTP error: (.+)")
        said = next(filter(None, (re.search(wording, text) for wording in wordings)), None)
        line = f"{uri}: {said[1] if said else first_line(error)}"
        # What a store says of a request has a type of its own, but for some of the statuses that begin with 4. A writer
        # raises an OSError. Credentials that end during a job tell nothing of the file.
        of_store = isinstance(error, (obstore.exceptions.GenericError, OSError))
        refused = re.search(r"status code: 4(?!08|29)", text)
        ended = isinstance(error, obstore.exceptions.UnauthenticatedError) or _EXPIRED.search(text)
        if ended or (of_store and not refused):
            tried = re.search(r"after \d+ retries", text)
            raise StoreOutage(f"{line} ({tried[0]})" if tried else line) from error
        raise StoreFault(line) from error
