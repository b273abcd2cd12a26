"""Serve a CoLLaVO model to OpenAI's clients: `python -m collavo.serve --model runs/collavo`.

Reads:    a run directory or a whole model
Writes:   nothing
Not here: the answers to requests, see collavo/server.py
"""

import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from collavo.chat import ModelFlags, Session
from collavo.cli import flag, naming, parse, run
from collavo.errors import UserError

SHUTDOWN_SECONDS = 5
"""How long answers may still grow after an interrupt."""

_DESCRIPTION = """\
Serve a model over HTTP, as OpenAI's clients ask for it: /v1/chat/completions,
streamed or not, and /v1/models. The image of a request is segmented first, as
collavo.chat does it."""

_EPILOG = """\
The model is called as its folder is; --model runs/collavo is "collavo". A
request without a temperature gets the answer that collavo.chat gives. There is
no authentication, so name another --host only behind something that has one.

examples:
  python -m collavo.serve --model runs/collavo
  python -m collavo.serve --model runs/collavo --host 0.0.0.0 --port 80 \\
      --no-fetch_images
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags(ModelFlags):
    """The command line."""

    host: str = flag("127.0.0.1", "address to listen at; 0.0.0.0 for all of this machine", group="server")
    port: int = flag(8000, "port to listen at; 0 for a free one", least=0, most=65535)
    fetch_images: bool = flag(True, "fetch images that requests name by an http(s) URL, from this machine's network; "
        "images inside requests are always taken")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    usage = "python -m collavo.serve --model RUN [options]"
    options = {"prog": "python -m collavo.serve", "usage": usage, "description": _DESCRIPTION, "epilog": _EPILOG}
    return run("collavo.serve", lambda: _serve(parse(Flags, argv, **options)))


def _serve(flags: Flags) -> None:
    missing = [name for name in ("pydantic", "starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing; pip install 'collavo[serve]' brings what a server needs")
    with _listen(flags.host, flags.port) as listener:  # before the model is loaded, which takes its time
        session = Session(flags)
        _ = session.segmenter  # loaded now, so that what is wrong with it does not wait for the first request

        import uvicorn

        from collavo.server import build_app

        name = Path(flags.model).resolve().name
        app = build_app(session, name, flags.fetch_images)
        server = uvicorn.Server(
            uvicorn.Config(app, lifespan="off", log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS)
        )
        host, port = listener.getsockname()[:2]
        print(f"Serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # raised again when the server has ended in good order
            print("Stopped.")


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        of_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
        with naming("port" if of_port else "host"):
            reason = (error.strerror or "").partition(" (while")[0]  # Python adds the address, which is said already
            remedy = "; --port 0 takes a free one" if error.errno == errno.EADDRINUSE else ""
            raise UserError(f"{port if of_port else host}: {reason}{remedy}") from error


if __name__ == "__main__":
    raise SystemExit(main())
