"""The HTTP side of `foretell serve`: OpenAI's endpoints over one Engine, and a page to try it."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foretell import __version__
from foretell.data.chat import chat_ids
from foretell.serving.answers import Refused, Reply
from foretell.serving.engine import Engine
from foretell.serving.metrics import Metrics
from foretell.serving.requests import Closed, Full
from foretell.serving.schema import ChatRequest, CompletionRequest, TokenizeRequest, told

LARGEST_BODY = 8 * 2**20  # bytes; what is longer is read to its end, up to so many times as much, and thrown away
PATIENCE = 8
STALLED_SECONDS = 60.0  # that a client may take for its next bytes, in or out
DRAIN_SECONDS = 300  # for answers that run when the server is told to stop
GUARDED = ("/v1", "/tokenize")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class Stalled(Exception):
    """A client neither sends nor reads."""


class Guard:
    """Around the whole application: keys, sizes and patience, before anything is read of a request."""

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self.key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        name = headers.get(b"x-request-id", uuid.uuid4().hex.encode())[:128]
        size, whole = 0, False

        async def patient_receive() -> Message:
            nonlocal size, whole
            message = await in_time(receive(), None if whole else STALLED_SECONDS)
            while True:
                size += len(message.get("body", b""))
                whole = whole or not message.get("more_body", False)
                if size <= LARGEST_BODY:
                    return message
                if whole or size > PATIENCE * LARGEST_BODY:  # before its end a client does not hear an answer
                    raise Refused(413, f"body: wanted {LARGEST_BODY:,} bytes at most, got more.", "body_too_large")
                message = await in_time(receive(), STALLED_SECONDS)

        async def patient_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", name)]
            await in_time(send(message), STALLED_SECONDS)

        (scheme, _, given), app = headers.get(b"authorization", b"").partition(b" "), self.app
        known = scheme.lower() == b"bearer" and (self.key is None or hmac.compare_digest(given, self.key))
        if self.key is not None and scope["path"].startswith(GUARDED) and not known:
            self.metrics.refused("invalid_api_key")
            app = Refused(
                401, "Authorization: wanted Bearer and this server's key.", "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            ).response()  # fmt: skip
        with contextlib.suppress(Stalled):  # the connection is closed, since its answer is not whole
            await app(scope, patient_receive, patient_send)


async def in_time(work: Any, seconds: float | None) -> Any:
    """Its result, or Stalled."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise Stalled from None


class Events(StreamingResponse):
    """A stream whose answers leave the batch however it ends."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reply.cancel()


class Server:
    """What answers requests.

    Args:
        engine, tokenizer: of the model; nothing else decodes.
        name: under which it is served.
        root: the model's folder or hub name, without its place on this machine.
        api_key: that clients must know; None: anybody may ask.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, name: str, root: str | None = None, api_key: str | None = None
    ) -> None:
        self.engine, self.tokenizer, self.name = engine, tokenizer, name
        self.metrics = Metrics(engine, name)
        self.about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "foretell"}
        self.about |= {"root": root or name, "max_model_len": engine.max_context}
        self.app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan)
        self.app.add_middleware(Guard, api_key=api_key, metrics=self.metrics)
        routes: dict[str, Callable] = {
            "/": self.playground,
            "/health": lambda: JSONResponse({}),
            "/version": lambda: JSONResponse({"version": __version__}),
            "/metrics": lambda: PlainTextResponse(self.metrics.text(), media_type=CONTENT_TYPE_LATEST),
            "/v1/models": lambda: JSONResponse({"object": "list", "data": [self.about]}),
            "/v1/models/{name:path}": self.model,
        }
        for path, function in routes.items():
            self.app.add_api_route(path, function, methods=["GET", "HEAD"], response_model=None)
        routes = {"/tokenize": self.tokenize, "/v1/completions": self.completion, "/v1/chat/completions": self.chat}
        for path, function in routes.items():
            self.app.add_api_route(path, function, methods=["POST"], response_model=None)
        for error in (RequestValidationError, HTTPException, Exception):
            self.app.add_exception_handler(error, self._wrong)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.engine.close)  # what runs by now has no reader

    async def _wrong(self, request: Request, error: Exception) -> Response:
        """Any error, in OpenAI's shape."""
        if isinstance(error, RequestValidationError):
            message, param = told(error.errors())
            error = Refused(400, message, "invalid_request", param)
        elif not isinstance(error, Refused):
            status, said, headers = 500, f"failed: {type(error).__name__}", None
            if isinstance(error, HTTPException):
                status, said, headers = error.status_code, error.detail, error.headers
            error = Refused(status, f"{request.method} {request.url.path}: {said}.", "no_answer", headers=headers)
        self.metrics.refused(error.code)
        return error.response()

    async def playground(self) -> Response:
        """A page that talks to this server."""
        page = resources.files("foretell.serving").joinpath("playground.html").read_text(encoding="utf-8")
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    async def model(self, name: str) -> Response:
        """The one that is served, by name."""
        self._check_model(name)
        return JSONResponse(self.about)

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise Refused(404, f"model: got {name!r}, this server has {self.name!r}.", "model_not_found", "model")

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """Ids of a text or a conversation."""
        self._check_model(body.model)
        param, prompt = ("prompt", body.prompt) if body.messages is None else ("messages", body.messages)
        (ids,) = await self._encoded(param, [prompt], body.add_special_tokens)
        return JSONResponse({"count": len(ids), "max_model_len": self.engine.max_context, "tokens": ids})

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """OpenAI's chat completions."""
        return await self._answer(request, body, "messages", [body.messages])

    async def completion(self, request: Request, body: CompletionRequest) -> Response:
        """OpenAI's completions."""
        return await self._answer(request, body, "prompt", body.prompt)

    async def _encoded(self, param: str, prompts: list[Any], special: bool = True) -> list[list[int]]:
        """Ids of texts and conversations; ids stay as they are."""

        def encode(prompt: Any) -> list[int]:
            if param == "messages":
                return chat_ids([one.plain() for one in prompt], self.tokenizer, add_generation_prompt=True)
            if not isinstance(prompt, str):
                return prompt
            return list(self.tokenizer(prompt, add_special_tokens=special)["input_ids"])

        try:  # not in the loop, which others' streams wait for
            return await asyncio.to_thread(lambda: [encode(prompt) for prompt in prompts])
        except ValueError as error:
            raise Refused(400, f"{param}: {error}", "invalid_request", param) from error

    async def _answer(
        self, request: Request, body: ChatRequest | CompletionRequest, param: str, given: list[Any]
    ) -> Response:
        self._check_model(body.model)
        prompts, room = await self._encoded(param, given), self.engine.max_context
        if (longest := max(map(len, prompts))) >= room:
            message = f"{param}: got {longest:,} tokens, wanted fewer than the model's context of {room:,}."
            raise Refused(400, message, "context_length_exceeded", param)
        vocabulary = self.engine.vocab_size
        if wrong := [token for ids in prompts for token in ids if not 0 <= token < vocabulary][:3]:
            message = f"{param}: got {wrong}, wanted token ids from 0 to {vocabulary - 1}."
            raise Refused(400, message, "invalid_request", param)
        count, most = len(prompts) * body.n, self.engine.slots + self.engine.max_queued
        if count > most:
            message = f"n: got {count} answers to {len(prompts)} prompts, wanted {most} at most."
            raise Refused(400, message, "invalid_request", "n")
        reply = Reply(body, prompts, self.engine, self.tokenizer, self.name, self.metrics)
        try:
            reply.start()
        except Full as error:
            after = {"Retry-After": str(round(error.retry_after))}
            raise Refused(503, "too many requests wait; ask again later.", "queue_full", headers=after) from error
        except Closed as error:
            raise Refused(503, "the server is shutting down.", "closing") from error
        except ValueError as error:
            said = str(error).replace("max_new_tokens", "max_tokens").replace("input_ids", param)
            name = said.partition(":")[0]
            known = name if name in type(body).model_fields else None
            raise Refused(400, said, "invalid_request", known) from error
        if body.stream:
            return Events(reply)
        work, gone = asyncio.ensure_future(reply.whole()), asyncio.ensure_future(hung_up(request))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(work.result()) if work.done() else Response(status_code=499)  # which nobody reads
        finally:
            work.cancel()
            gone.cancel()
            reply.cancel()


async def hung_up(request: Request) -> None:
    """Returns when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def run(server: Server, at: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; then what was taken is answered, and the engine closed."""
    how: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
    uvicorn.Server(uvicorn.Config(server.app, timeout_graceful_shutdown=DRAIN_SECONDS, **how)).run(sockets=[at])
