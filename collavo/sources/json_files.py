"""JSON as people store it, opened as plain UTF-8 that a streaming parser takes.

Byte-order marks are dropped, UTF-16 and UTF-32 are decoded, gzip is unpacked, and `NaN` and `Infinity`, which Python
writes and JSON does not know, become null. A file on a disk that needs none of this is read where it lies; any other is
copied to a temporary file first, because annotation files are larger than memory and are read more than once.
"""

import codecs
import gzip
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO

from collavo.errors import UserError
from collavo.storage import is_local

_CHUNK_BYTES = 1 << 20

# A string, passed over, whose closing quote may lie in the next piece of the file; or a number that JSON lacks. A
# string ends with its line too, so that one without a closing quote, in JSON lines, spoils no other line.
_NO_NUMBER = re.compile(rb'"(?:[^"\\\n]|\\[^\n])*(?P<closed>"|\\?\n|)|-?(?:NaN|Infinity)')


@contextmanager
def open_json(file: BinaryIO, name: str) -> Iterator[BinaryIO]:
    """Open the text of a JSON file as UTF-8 bytes, seekable, at its beginning.

    Args:
        file: open for reading; not closed here.
        name: its path or URI.

    Raises:
        UserError: for text in an encoding that JSON does not come in, and for a damaged gzip file.
    """
    with ExitStack() as stack:
        try:
            if not is_local(name):
                file = _copied(stack, file)
            if file.read(2) == b"\x1f\x8b":
                file.seek(0)
                file = _copied(stack, stack.enter_context(gzip.GzipFile(fileobj=file)))  # `file` is the caller's
            file.seek(0)
            head = file.read(4)
            file.seek(0)
            if (encoding := json.detect_encoding(head)) != "utf-8":
                file = _copied(stack, codecs.EncodedFile(file, "utf-8", encoding))
                file.seek(0)
            if _has_no_numbers(file):
                file = _copied(stack, _NullsForNoNumbers(file))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{name}: a damaged gzip file ({error})") from error
        except UnicodeError as error:
            raise UserError(f"{name}: not text that JSON can be in ({error})") from error
        file.seek(0)
        yield file


def _copied(stack: ExitStack, source: Any) -> BinaryIO:
    """Make a temporary copy of what a reader gives, at its beginning."""
    copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
    shutil.copyfileobj(source, copy, _CHUNK_BYTES)
    copy.seek(0)
    return copy


def _has_no_numbers(file: BinaryIO) -> bool:
    """Tell whether the words stand anywhere, strings included: a quick look before the careful one."""
    file.seek(0)
    tail = b""
    while chunk := file.read(_CHUNK_BYTES):
        if b"NaN" in (text := tail + chunk) or b"Infinity" in text:
            return True
        tail = chunk[-8:]
    return False


class _NullsForNoNumbers:
    """Reads a file with `null` in place of `NaN` and of both infinities outside strings."""

    def __init__(self, file: BinaryIO) -> None:
        file.seek(0)
        self._file = file
        self._waiting = b""

    def read(self, size: int) -> bytes:
        while chunk := self._file.read(size):
            text = self._waiting + chunk
            end = _end_of_whole_tokens(text)
            self._waiting = text[end:]
            if end:
                return _nulls(text[:end])
        rest, self._waiting = self._waiting, b""
        return _nulls(rest)


def _nulls(text: bytes) -> bytes:
    return _NO_NUMBER.sub(lambda match: match[0] if match[0].startswith(b'"') else b"null", text)


def _end_of_whole_tokens(text: bytes) -> int:
    """Return where a text that begins outside a string may be cut: before a string that has no end yet, or before the
    last few bytes, which may be the beginning of a word."""
    end = 0
    for match in _NO_NUMBER.finditer(text):
        if match["closed"] == b"":
            return match.start()
        end = match.end()
    return max(end, len(text) - 9)
