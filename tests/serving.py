"""A server of `collavo.serve` in a thread of the test, and what its clients send."""

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import uvicorn

from collavo.chat import Session
from collavo.cli import parse
from collavo.serve import Flags
from collavo.server import build_app


@contextmanager
def served(model: Path, *options: str) -> Iterator[tuple[openai.OpenAI, Session]]:
    """Serve a model by the name of its folder; a client, and what answers it."""
    flags = parse(Flags, ["--model", str(model), *options])
    session = Session(flags)
    app = build_app(session, model.name, flags.fetch_images)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0) as client:
            yield client, session
    finally:
        server.should_exit = True
        thread.join()


def data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def user(text: str, *image_urls: str) -> dict[str, Any]:
    """A message of the user's, its images first."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in image_urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}
