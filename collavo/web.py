"""Fetch an image that a user names by an http(s) URL: bounded in bytes and in time."""

import time
from http.client import HTTPException
from urllib import request

from collavo import __version__
from collavo.errors import Rejected

MAX_BYTES = 32 * 2**20
"""Bound on a fetched image. Its pixels have a bound of their own, see `collavo.images`."""

FETCH_SECONDS = 30
"""How long an image may take to come, and its server to say anything."""


def is_url(source: str) -> bool:
    """Tell an http(s) URL from the path of a file."""
    return source.lower().startswith(("http://", "https://"))


def fetch(url: str) -> bytes:
    """Fetch the bytes behind an http(s) URL; a redirect leads to another one only.

    Raises:
        Rejected: `unreachable_url` or `oversized_image`.
    """
    data, end = bytearray(), time.monotonic() + FETCH_SECONDS
    opener = request.OpenerDirector()  # `urlopen` follows URLs of files and FTP servers as well
    opener.addheaders = [("User-Agent", f"collavo/{__version__}")]
    for handler in (request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler, request.HTTPRedirectHandler,
                    request.HTTPDefaultErrorHandler, request.HTTPErrorProcessor, request.UnknownHandler):  # fmt: skip
        opener.add_handler(handler())
    try:
        with opener.open(url, timeout=FETCH_SECONDS) as response:
            while (chunk := response.read1(2**16)) and len(data) <= MAX_BYTES:
                data += chunk
                if time.monotonic() > end:
                    raise TimeoutError(f"it takes more than {FETCH_SECONDS} seconds")
    except (OSError, ValueError, HTTPException) as error:
        raise Rejected("unreachable_url", f"cannot be fetched: {getattr(error, 'reason', error)}") from error
    if len(data) > MAX_BYTES:
        raise Rejected("oversized_image", f"more than {MAX_BYTES} bytes")
    return bytes(data)
