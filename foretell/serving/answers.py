"""One response: the choices that it asks the engine for, and what clients read of them, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from foretell.serving.detokenizer import Detokenizer, token_bytes
from foretell.serving.engine import Engine
from foretell.serving.metrics import Metrics, Times
from foretell.serving.requests import Piece, Request, Running
from foretell.serving.schema import ChatRequest, CompletionRequest

LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM's number

ASKED = (  # of the engine, as clients say it
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "stop_token_ids", "ignore_eos", "num_draft_tokens", "policy", "confidence_threshold",
)  # fmt: skip


class Refused(HTTPException):
    """A request, or the rest of one, that is answered by an error in OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None, headers: Any = None) -> None:
        super().__init__(status, message, headers)
        self.code = code
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The error as an answer of its own."""
        return JSONResponse(self.body, self.status_code, self.headers)


@dataclass
class Token:
    """One token of an answer."""

    id: int
    source: str  # who proposed it
    verification: int  # the target's forward that brought it, from 0
    logprob: float = 0.0
    top: Sequence[tuple[int, float]] = ()
    text: str = ""
    start: int = 0  # of its text in the answer's
    hidden: bool = False  # the end token, or a stop string's: counted, but no part of the text


class Choice:
    """One answer while it is made. The engine's thread asks `stop` and tells `read`."""

    def __init__(self, index: int, request: Request, detokenizer: Detokenizer) -> None:
        self.index, self.detokenizer = index, detokenizer
        self.request = replace(request, stop=detokenizer.put)
        self.tokens: list[Token] = []
        self.pieces = 0
        self.end: Piece | None = None  # the last one
        self.running: Running | None = None

    def read(self, piece: Piece) -> list[Token]:
        """Take a piece; the tokens that can be shown."""
        for at, (token, source) in enumerate(zip(piece.tokens, piece.sources, strict=True)):
            made = Token(token, source, self.pieces)
            if piece.logprobs is not None and piece.top_logprobs is not None:
                made.logprob, made.top = piece.logprobs[at], piece.top_logprobs[at]
            self.tokens.append(made)
        self.pieces += bool(piece.tokens)
        told = self.detokenizer.tokens
        assert len(told) == len(self.tokens) and told[len(told) - len(piece.tokens) :] == piece.tokens, "other tokens"
        shown = []
        for at, text in self.detokenizer.take(last=piece.finish_reason is not None):
            one = self.tokens[at]
            one.text, one.start = text, self.detokenizer.starts[at]
            ended = piece.stop_token is not None and at == len(self.tokens) - 1 and not text
            one.hidden = ended or (self.detokenizer.stop is not None and one.start >= len(self.detokenizer.text))
            shown.append(one)
        return shown


class Reply:
    """A response to one request.

    Args:
        body: the request.
        prompts: its prompts' ids.
        engine, tokenizer, model: who answers, and the name under which that is served.
    """

    def __init__(
        self,
        body: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        engine: Engine,
        tokenizer: Any,
        model: str,
        metrics: Metrics,
    ) -> None:
        self.body, self.engine, self.tokenizer, self.metrics = body, engine, tokenizer, metrics
        self.chat = isinstance(body, ChatRequest)
        self.prompt_tokens = sum(map(len, prompts))
        self.head: dict[str, Any] = {"id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"}
        self.head |= {"created": int(time.time()), "model": model}
        asked = {name: getattr(body, name) for name in ASKED}
        asked["logprobs"] = body.scored
        drawn = any(asked[name] is not None for name in ("top_p", "top_k", "min_p"))
        if drawn and asked["temperature"] is None and not engine.mtp.model.generation_config.do_sample:
            asked["temperature"] = 1.0  # OpenAI's default: who narrows a draw wants one
        self.choices = []
        for ids in prompts:
            asked["max_new_tokens"] = body.most_tokens(engine.max_context - len(ids))
            for number in range(body.n):  # each draws on its own
                seed = None if body.seed is None else (body.seed + number + 2**63) % 2**64 - 2**63
                detokenizer = Detokenizer(tokenizer, () if self.chat else ids, body.stop)
                request = Request(input_ids=ids, seed=seed, **asked)
                self.choices.append(Choice(len(self.choices), request, detokenizer))
        self._loop, self._told = asyncio.get_running_loop(), asyncio.Queue()

    def start(self) -> None:
        """Ask the engine for all choices, or, where it has no place for one, for none."""
        try:
            for choice in self.choices:
                choice.running = self.engine.submit(choice.request, self._teller(choice))
        except BaseException:
            self.cancel()
            raise
        if not self.choices[0].running.lossless:
            self.head["lossy"] = self.choices[0].request.policy

    def cancel(self) -> None:
        """Take what still runs out of the batch."""
        for choice in self.choices:
            if choice.running is not None:
                choice.running.cancel()

    def _teller(self, choice: Choice) -> Any:
        times = Times(self.metrics)

        def tell(piece: Piece) -> None:
            try:
                shown = choice.read(piece)
            except Exception as error:  # of a tokenizer, say: the reader must not wait for what will not come
                piece, shown = replace(piece, finish_reason="error", error=f"{type(error).__name__}: {error}"), []
                if choice.running is not None:
                    choice.running.cancel()
            times.saw(piece)
            if not self.body.stream and piece.finish_reason is None:
                return  # nobody reads it yet, and to wake the loop takes the interpreter from the decoding thread
            self._loop.call_soon_threadsafe(self._told.put_nowait, (choice, shown, piece))

        return tell

    async def _pieces(self) -> AsyncIterator[tuple[Choice, list[Token]]]:
        """Of all choices, as they come; raises Refused where one is not answered."""
        open_ = len(self.choices)
        while open_:
            choice, shown, piece = await self._told.get()
            if piece.finish_reason in ("error", "cancelled"):
                raise Refused(500, piece.error or "the server no longer answers.", "engine_error")
            if piece.finish_reason is not None:
                choice.end = piece
                open_ -= 1
            yield choice, shown

    # -- what clients read ---------------------------------------------------------------------------------------------

    async def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        async for _ in self._pieces():
            pass
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(choice, choice.tokens) for choice in self.choices]
        return {**self.head, "object": kind, "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events."""
        usage = {"usage": None} if self.body.include_usage else {}
        head = {**self.head, "object": "chat.completion.chunk" if self.chat else "text_completion"}
        if self.chat:
            for choice in self.choices:
                first = {"index": choice.index, "delta": {"role": "assistant", "content": ""}}
                first |= {"logprobs": None, "finish_reason": None}
                yield _event({**head, "choices": [first], **usage})
        try:
            async for choice, shown in self._pieces():
                if choice.end is not None or shown:
                    yield _event({**head, "choices": [self._choice(choice, shown, stream=True)], **usage})
            if self.body.include_usage:
                yield _event({**head, "choices": [], "usage": self._usage()})
            yield b"data: [DONE]\n\n"
        except Refused as error:
            yield _event(error.body)

    def _choice(self, choice: Choice, tokens: list[Token], stream: bool = False) -> dict[str, Any]:
        made: dict[str, Any] = {"index": choice.index}
        text, end = "".join(token.text for token in tokens), choice.end
        if not self.chat:
            made["text"] = text
        elif stream:
            made["delta"] = {"content": text} if text or end is None else {}
        else:
            made["message"] = {"role": "assistant", "content": text, "refusal": None}
        scored = [token for token in tokens if not token.hidden]
        made["logprobs"] = None
        if self.body.scored is not None:
            made["logprobs"] = {"content": [self._scored(t) for t in scored]} if self.chat else self._table(scored)
        made["finish_reason"] = None if end is None else end.finish_reason
        if end is not None:  # as vLLM says it: nothing where the model's own end token came
            asked = end.stop_token if end.stop_token in choice.request.stop_token_ids else None
            made["stop_reason"] = choice.detokenizer.stop or asked
        if self.body.return_token_ids:
            made["token_ids"] = [token.id for token in tokens]
            if not stream:
                made["prompt_token_ids"] = list(choice.request.input_ids)
        if self.body.return_trace:
            made["trace"] = [
                {"id": t.id, "text": t.text, "source": t.source, "verification": t.verification} for t in tokens
            ]
        return made

    def _word(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def _scored(self, token: Token) -> dict[str, Any]:
        def entry(id_: int, logprob: float) -> dict[str, Any]:
            word = self._word(id_)
            read = token_bytes(self.tokenizer, id_) if "\ufffd" in word else None  # of a piece of a character, its own
            bytes_ = list(read or word.encode())
            return {"token": word, "logprob": max(logprob, LEAST_LOGPROB), "bytes": bytes_}

        return {**entry(token.id, token.logprob), "top_logprobs": [entry(*one) for one in token.top]}

    def _table(self, tokens: list[Token]) -> dict[str, Any]:
        likeliest = [{self._word(i): max(p, LEAST_LOGPROB) for i, p in (*t.top, (t.id, t.logprob))} for t in tokens]
        return {
            "tokens": [self._word(token.id) for token in tokens],
            "token_logprobs": [max(token.logprob, LEAST_LOGPROB) for token in tokens],
            "top_logprobs": likeliest if self.body.scored else None,
            "text_offset": [token.start for token in tokens],
        }

    def _usage(self) -> dict[str, Any]:
        made = sum(len(choice.tokens) for choice in self.choices)
        ends = [choice.end.stats for choice in self.choices]
        stats = replace(ends[0], records=[record for one in ends for record in one.records])
        names = ("policy", "lossless", "reference", "tau", "mean_accepted", "accept_at", "accept_given")
        own = {name: stats.summary()[name] for name in (*names, "verifications")}
        own |= {"drafted": sum(map(sum, stats.drafted)), "accepted": sum(map(sum, stats.accepted))}
        total = {"prompt_tokens": self.prompt_tokens, "completion_tokens": made}
        cached = sum(choice.running.sequence.shared for choice in self.choices[:: self.body.n])
        details = {"prompt_tokens_details": {"cached_tokens": cached}}
        return {**total, "total_tokens": self.prompt_tokens + made, **details, "foretell": own}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
