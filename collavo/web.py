"""Fetch an image that a user names by an http(s) URL: bounded in bytes and in time."""

import socket
import ssl
import time
from collections.abc import Sequence
from functools import cache
from http.client import HTTPException, IncompleteRead
from urllib import request
from urllib.parse import quote

from collavo import __version__
from collavo.errors import Rejected

MAX_BYTES = 32 * 2**20
"""Bound on a fetched image. Its pixels have a bound of their own, see `collavo.images`."""

FETCH_SECONDS = 30
"""How long an image may take to come, and its server to say anything."""

WAITS = (1, 2, 4)
"""Seconds to wait before each further try, for who can wait."""

_BROKEN_OFF = (ConnectionResetError, IncompleteRead)


def is_url(source: str) -> bool:
    """Tell an http(s) URL from the path of a file."""
    return source.lower().startswith(("http://", "https://"))


def fetch(url: str, most_bytes: int | None = None, waits: Sequence[float] = ()) -> bytes:
    """Fetch the bytes behind an http(s) URL; a redirect leads to another one only.

    Args:
        most_bytes: bound on them, `MAX_BYTES` if not given.
        waits: seconds before each further try where the server is busy, as it says itself by a status of 429 or 5xx,
            where it breaks off, and where names cannot be resolved at the moment.

    Raises:
        Rejected: `missing_file`, `unreachable_url` or `oversized_file`.
    """
    most_bytes = most_bytes or MAX_BYTES
    for wait in (*waits, None):
        try:
            data = _fetch(url, most_bytes)
            break
        except (OSError, ValueError, HTTPException) as error:
            code, fault = getattr(error, "code", 0), getattr(error, "reason", error)
            resolver_busy = isinstance(fault, socket.gaierror) and fault.errno == socket.EAI_AGAIN
            passing = code == 429 or code >= 500 or resolver_busy or isinstance(fault, _BROKEN_OFF)
            if passing and wait is not None:
                time.sleep(wait)
                continue
            tries = f", {len(waits) + 1} times" if passing and waits else ""
            detail = f"cannot be fetched: {f'{code} ' * bool(code)}{fault}{tries}"
            raise Rejected("missing_file" if code in (404, 410) else "unreachable_url", detail) from error
    if len(data) > most_bytes:
        raise Rejected("oversized_file", f"more than {most_bytes} bytes")
    return data


@cache
def _tls() -> ssl.SSLContext:
    """Read the certificates of all authorities, which takes ten times as long as to read and decode an image."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])  # as `http.client` does
    return context


def _fetch(url: str, most_bytes: int) -> bytes:
    """Fetch in one try; where there are more bytes, the first ones and some more."""
    data, end = bytearray(), time.monotonic() + FETCH_SECONDS
    opener = request.OpenerDirector()  # `urlopen` follows URLs of files and FTP servers as well
    opener.addheaders = [("User-Agent", f"collavo/{__version__}")]
    for handler in (request.ProxyHandler, request.HTTPHandler, request.HTTPRedirectHandler,
                    request.HTTPDefaultErrorHandler, request.HTTPErrorProcessor, request.UnknownHandler):  # fmt: skip
        opener.add_handler(handler())
    opener.add_handler(request.HTTPSHandler(context=_tls()))
    # As browsers do: lists hold URLs with spaces and letters that HTTP does not take.
    with opener.open(quote(url, safe="%/:?#[]@!$&'()*+,;=~"), timeout=FETCH_SECONDS) as response:
        while (chunk := response.read1(2**16)) and len(data) <= most_bytes:
            data += chunk
            if time.monotonic() > end:
                raise TimeoutError(f"it takes more than {FETCH_SECONDS} seconds")
        if not chunk and response.length:  # what was announced and did not come
            raise IncompleteRead(bytes(data), response.length)
    return bytes(data)
