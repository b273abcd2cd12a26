"""A file in a store, as an open file."""

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self


class RemoteFile(io.RawIOBase):
    """A file of which each read asks the store for just its bytes. Those that derive from it say how.

    Args:
        size: bytes of the file; None where they are asked for when they are needed.
    """

    def __init__(self, size: int | None = None) -> None:
        self._size = size
        self._position = 0

    def length(self) -> int:
        """Return the bytes of the file."""
        if self._size is None:
            self._size = self.ask_for_length()
        return self._size

    def ask_for_length(self) -> int:
        """Ask the store for the bytes of the file."""
        raise NotImplementedError

    def fetch(self, offset: int, size: int) -> bytes:
        """Ask the store for some of the bytes, at least one; there are as many."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.length() if whence == io.SEEK_END else 0)[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self.length() - self._position)
        size = rest if size is None or size < 0 else min(size, rest)
        data = self.fetch(self._position, size) if size else b""
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class RemoteWriter:
    """A new file, which is there once it is closed.

    Args:
        writer: of the store's client.
        faults: makes a context that raises what the client raises as one of the errors of a store.
    """

    def __init__(self, writer: Any, faults: Callable[[], AbstractContextManager[None]]) -> None:
        self._writer = writer
        self._faults = faults

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()

    def write(self, data: bytes) -> int:
        with self._faults():
            return int(self._writer.write(memoryview(data).cast("B")))

    def flush(self) -> None:
        pass  # as it would end a part of the upload

    def close(self) -> None:
        with self._faults():
            self._writer.close()
