"""Answer chat completions, as OpenAI's clients ask for them; the HTTP side is Starlette's.

The event loop moves bytes only. One thread decodes images, segments them and generates, one request after the other,
since model and segmenter use the whole machine. An answer nobody waits for any more ends with its next token.
"""

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from traceback import print_exc
from typing import Annotated, Any, Literal
from urllib.request import DataHandler
from urllib.request import Request as UrlRequest

import torch
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import StoppingCriteria, StoppingCriteriaList

from collavo.chat import Session
from collavo.errors import Rejected, UserError
from collavo.images import decode_rgb
from collavo.inference import Sampling
from collavo.web import MAX_BYTES, fetch, is_url

_SPEAKERS = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}


class _Url(BaseModel):
    url: str


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _Image(BaseModel):
    type: Literal["image_url"]
    image_url: _Url


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Annotated[_Text | _Image, Field(discriminator="type")]], BeforeValidator(_parts)] = []


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Question(BaseModel):
    """What a client may ask. What would change the answer and is not done here is taken with its default only."""

    model: str
    messages: list[_Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    functions: list[Any] | None = Field(None, max_length=0)


def build_app(session: Session, name: str, fetch_images: bool) -> Starlette:
    """Make the application that serves a model under a name.

    Args:
        fetch_images: whether images may be named by http(s) URLs; never by a file of this machine.
    """
    served = _Served(session, name, fetch_images)
    return Starlette(
        routes=[
            Route("/health", lambda _: Response()),
            Route("/v1/models", served.models),
            Route("/v1/models/{name:path}", served.model),
            Route("/v1/chat/completions", served.complete, methods=["POST"]),
        ],
        exception_handlers={
            HTTPException: lambda _, error: _refusal(error.detail, error.status_code),
            Rejected: lambda _, error: _refusal(str(error), 400),
            ValidationError: lambda _, error: _refusal(_first_fault(error), 400),
            ClientDisconnect: lambda *_: Response(status_code=499),
            Exception: lambda *_: _refusal("the server failed; its log says more", 500),
        },
    )


class _Served:
    """A model, the thread that it works in, and the requests for it."""

    def __init__(self, session: Session, name: str, fetch_images: bool) -> None:
        self._session = session
        self._name = name
        self._started = int(time.time())
        self._worker = ThreadPoolExecutor(1)
        self._fetches = fetch_images

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(self._name)]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._described(request.path_params["name"]))

    def _described(self, name: str) -> dict[str, Any]:
        """Describe the model, as a client lists it; refuse another name."""
        if name != self._name:
            raise HTTPException(404, f"model: there is no {name!r}; this server has {self._name!r}")
        return {"id": name, "object": "model", "created": self._started, "owned_by": "collavo"}

    async def complete(self, request: Request) -> Response:
        body, size = bytearray(), 0
        async for chunk in request.stream():  # to its end, for a client reads no refusal before it has sent all
            size += len(chunk)
            body += chunk if size <= MAX_BYTES else b""
        if size > MAX_BYTES:
            raise HTTPException(400, f"a request of {size} bytes is more than {MAX_BYTES}")
        respond = asyncio.ensure_future(self._respond(bytes(body)))
        leave = asyncio.ensure_future(request.receive())  # after its body, a client can only leave
        try:
            await asyncio.wait({respond, leave}, return_when=asyncio.FIRST_COMPLETED)
            if leave.done():
                raise ClientDisconnect
            return await respond
        finally:
            respond.cancel()
            leave.cancel()

    async def _respond(self, body: bytes) -> Response:
        question, image = await asyncio.to_thread(self._read, body)
        answer = self._answer(question, image)
        await anext(answer)  # fails where the request cannot be answered, before a status is sent
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self._name}
        if question.stream:
            with_usage = bool(question.stream_options and question.stream_options.include_usage)
            return StreamingResponse(_events(answer, head, with_usage), media_type="text/event-stream")
        *pieces, (reason, usage) = [piece async for piece in answer]
        choice = {"index": 0, "message": {"role": "assistant", "content": "".join(pieces)}, "finish_reason": reason}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

    def _read(self, body: bytes) -> tuple[_Question, bytes | None]:
        """Read a request, and get its image."""
        question = _Question.model_validate_json(body)
        self._described(question.model)
        if question.messages[-1].role != "user":
            raise HTTPException(400, f"messages: the last is of {question.messages[-1].role}, but must be of user")
        # A client may repeat the image with every turn.
        parts = [part for message in question.messages for part in message.content]
        images = list(dict.fromkeys(part.image_url.url for part in parts if isinstance(part, _Image)))
        if len(images) > 1:
            raise HTTPException(400, f"messages: {len(images)} different images, but a conversation is about one")
        return question, self._fetch(images[0]) if images else None

    def _fetch(self, url: str) -> bytes:
        try:
            if url.startswith("data:"):
                return bytes(DataHandler().data_open(UrlRequest(url)).read())
            if not (self._fetches and is_url(url)):
                scheme = url.partition(":")[0][:20]
                raise Rejected("unreachable_url", f"unknown url type: {scheme}")
            return fetch(url)
        except (ValueError, Rejected) as error:
            raise HTTPException(400, f"image_url: {url[:80]}: {error}") from error

    async def _answer(self, question: _Question, image: bytes | None) -> AsyncGenerator[Any, None]:
        """Yield an empty text when the request is understood, the answer in pieces, then why it ended and its usage."""
        loop, left = asyncio.get_running_loop(), threading.Event()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        show: Callable[[str | None], object] = lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece)  # noqa: E731
        job = loop.run_in_executor(self._worker, self._generate, question, image, show, left)
        job.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield await job
        finally:
            left.set()
            job.cancel()  # where it waits for its turn

    @torch.inference_mode()
    def _generate(
        self, question: _Question, image: bytes | None, show: Callable[[str], object], left: threading.Event
    ) -> tuple[str, dict[str, int]]:
        """Answer, in the worker's thread; returns why the answer ended, and its usage.

        Raises:
            Rejected: if the image cannot be decoded, or the turns do not alternate.
        """
        model, processor = self._session.answerer.model, self._session.answerer.processor
        picture = self._session.segmented(decode_rgb(image)) if image is not None else None
        for caution in self._session.cautions(picture.panoptic) if picture else ():
            print(caution, flush=True)  # as `collavo chat` says it; an answer has no place for it
        turns = [
            (_SPEAKERS[message.role], "".join(part.text for part in message.content if isinstance(part, _Text)))
            for message in question.messages
        ]
        most = self._session.flags.max_new_tokens
        limit = min(question.max_completion_tokens or question.max_tokens or most, most)
        objects = None
        if picture:
            try:
                request = self._session.answerer.request(0, picture, turns, self._session.lists_objects, limit)
            except UserError as error:
                raise HTTPException(400, f"messages: {error}") from error
            objects = request.objects
        ids = processor.render(turns, objects, picture is not None).input_ids
        limit = min(limit, self._session.answerer.context - len(ids))
        if limit < 1:
            raise HTTPException(400, f"messages: {len(ids)} tokens are more than the model takes")
        show("")
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if picture:
            self._session.answerer.adopt(picture.panoptic.categories)
            inputs |= processor.picture_inputs([picture.image], [picture.panoptic])
        sampling = Sampling(question.temperature, question.top_p or 1.0) if question.temperature else None
        # Without a seed of its own, a request would draw on from that of another, or from torch's, always the same.
        torch.seed() if question.seed is None else torch.manual_seed(question.seed)
        stops = [question.stop] if isinstance(question.stop, str) else question.stop or []
        growing = _Growing(processor.tokenizer, len(ids), [stop for stop in stops if stop], show, left)
        output = model.generate(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()},
            **(sampling.options if sampling else {"do_sample": False}),
            max_new_tokens=limit,
            pad_token_id=processor.tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([growing]),
        )
        growing.show_rest()
        tokens = output.shape[1] - len(ids)
        ended = growing.stopped or int(output[0, -1]) in processor.tokenizer.all_special_ids
        usage = {"prompt_tokens": len(ids), "completion_tokens": tokens, "total_tokens": output.shape[1]}
        return "length" if tokens == limit and not ended else "stop", usage


class _Growing(StoppingCriteria):
    """Show an answer while it grows, and end it before a stop text, or when its client has left."""

    def __init__(
        self, tokenizer: Any, begin: int, stops: list[str], show: Callable[[str], object], left: threading.Event
    ) -> None:
        self.stopped = False
        self._tokenizer, self._begin, self._stops, self._show, self._left = tokenizer, begin, stops, show, left
        self._text, self._shown = "", 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        text = self._tokenizer.decode(input_ids[0, self._begin :], skip_special_tokens=True).lstrip()
        found = [text.index(stop) for stop in self._stops if stop in text]
        self.stopped = bool(found)
        self._text = text[: min(found, default=None)]
        # What may begin a stop text, a character that has not all of its bytes, and spaces at the end have to wait.
        open_ends = [n for stop in self._stops for n in range(1, len(stop)) if self._text.endswith(stop[:n])]
        self._show_to(self._text[: len(self._text) - max(open_ends, default=0)].rstrip("\ufffd").rstrip())
        return torch.full((1,), self.stopped or self._left.is_set(), device=input_ids.device)

    def show_rest(self) -> None:
        self._show_to(self._text.rstrip())

    def _show_to(self, text: str) -> None:
        if piece := text[self._shown :]:
            self._shown = len(text)
            self._show(piece)


async def _events(
    answer: AsyncGenerator[Any, None], head: dict[str, Any], with_usage: bool
) -> AsyncGenerator[str, None]:
    """Write an answer as server-sent events."""

    def event(delta: dict[str, str], reason: str | None = None) -> str:
        return write({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    def write(data: dict[str, Any]) -> str:
        return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', **data})}\n\n"

    async with aclosing(answer):
        yield event({"role": "assistant", "content": ""})
        try:
            async for piece in answer:
                if isinstance(piece, str):
                    yield event({"content": piece})
                    continue
                reason, usage = piece
                yield event({}, reason)
                if with_usage:
                    yield write({"choices": [], "usage": usage})
        except Exception:  # too late for a status
            print_exc()
            yield write(_fault("the server failed; its log says more", 500))
    yield "data: [DONE]\n\n"


def _refusal(message: str, status: int) -> Response:
    return JSONResponse(_fault(message, status), status_code=status)


def _fault(message: str, status: int) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _first_fault(error: ValidationError) -> str:
    """Say where a request is wrong, and how."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
