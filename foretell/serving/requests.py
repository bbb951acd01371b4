"""What is asked of the engine, and what it gives: a request, its pieces, and the request while it is served."""

# R rows of a round, V vocabulary.

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from foretell.decoding.arguments import Plan
from foretell.decoding.generate import Finish
from foretell.decoding.policies import LOSSY
from foretell.decoding.scores import RowScores
from foretell.decoding.stats import GenerationStats
from foretell.types import SequenceState

MOST_LOGPROBS = 20
_LOG = logging.getLogger(__name__)


class Full(RuntimeError):
    """As many requests wait as may; retry_after: seconds after which there may be room."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"too many requests wait; try again in {retry_after:.0f} s.")
        self.retry_after = retry_after


class Closed(RuntimeError):
    """The engine takes no requests any more."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and what is asked for. None: what the model's generation_config says, as transformers' generate does.

    temperature: 0 is greedy. seed: the text is that of generate with a generator of this seed. presence_penalty,
    frequency_penalty: OpenAI's, of the answer's tokens; repetition_penalty: transformers', of the prompt's too.
    logprobs: how many of the likeliest tokens are told with each token's own log probability, which is the model's
    at temperature 1. num_draft_tokens, policy: None is the engine's.
    """

    input_ids: Sequence[int]
    max_new_tokens: int | None = None  # None: up to the context's end
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    num_draft_tokens: int | str | None = None
    policy: str | None = None
    confidence_threshold: float | None = None
    stop: Callable[[int], bool] | None = None  # told every token in turn; true ends the text with it

    def problems(self, vocabulary: int, context: int) -> list[str]:
        """Everything that is wrong with it, in plain sentences."""
        found = []

        def wants(name: str, right: Callable[[Any], bool], wanted: str, value: Any = None) -> None:
            value = getattr(self, name) if value is None else value
            if value is not None and not right(value):
                found.append(f"{name}: got {value!r}, wanted {wanted}.")

        def number(low: float, high: float, kind: Any = int | float) -> Callable[[Any], bool]:
            return lambda x: isinstance(x, kind) and not isinstance(x, bool) and low <= x <= high

        token, wanted_token = number(0, vocabulary - 1, int), f"token ids from 0 to {vocabulary - 1}"
        length = len(self.input_ids)
        if not length or (wrong := [i for i in self.input_ids if not token(i)][:3]):
            found.append(f"input_ids: got {wrong if length else 'none'}, wanted at least one of {wanted_token}.")
        if length >= context:
            found.append(f"input_ids: got {length} tokens, wanted fewer than the {context} of the model's context.")
        wants("max_new_tokens", number(1, math.inf, int), "a whole number of at least 1")
        if not found and self.max_new_tokens is not None and length + self.max_new_tokens > context:
            found.append(
                f"max_new_tokens: got {self.max_new_tokens} after a prompt of {length} tokens, wanted at most "
                f"{context - length}: the model's context is {context} tokens."
            )
        tiny, least = 5e-324, 1e-30  # the smallest number above 0; that float32 scores can be divided by
        for name, low, high in (
            ("temperature", 0, 1e6), ("top_p", tiny, 1), ("min_p", 0, 1), ("repetition_penalty", least, 1e6),
            ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2),
        ):  # fmt: skip
            wants(name, number(low, high), "a number " + (f"from {low}" if low != tiny else "above 0") + f" to {high}")
        if isinstance(self.temperature, float) and 0 < self.temperature < least:
            found.append(f"temperature: got {self.temperature}, wanted 0, or at least {least}: scores would overflow.")
        wants("top_k", number(-1, math.inf, int), "a whole number; 0 or -1 for none")
        for i, bias in self.logit_bias.items():
            wants("logit_bias", token, wanted_token, i)
            wants("logit_bias", number(-100, 100), "numbers from -100 to 100", bias)
        wants("seed", number(-(2**63), 2**63 - 1, int), "a whole number of 64 bits")
        for i in self.stop_token_ids:
            wants("stop_token_ids", token, wanted_token, i)
        wants("logprobs", number(0, MOST_LOGPROBS, int), f"a whole number from 0 to {MOST_LOGPROBS}")
        return found


@dataclass(frozen=True)
class Piece:
    """What one round brought: tokens, the end token among them, and who proposed each ("target": nobody).

    top_logprobs: of each token's place, (token, log probability) of the likeliest. finish_reason: None where more
    follows, else "stop" (stop_token says which token ended it), "length", "cancelled" or "error" (error says what went
    wrong), and then stats are there. The last piece may be without tokens.
    """

    tokens: list[int]
    sources: list[str]
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    finish_reason: str | None = None
    stop_token: int | None = None
    stats: GenerationStats | None = None
    error: str | None = None


class Running:
    """A request that was taken. Iterating gives its pieces as they come, to one reader; any thread may cancel it.

    seconds since it was submitted: "admitted", "first" piece, "ended"; each as soon as it is so.
    """

    def __init__(self, request: Request, plan: Plan, index: int, on_piece: Callable[[Piece], None] | None) -> None:
        self.request, self.prompt_tokens, self.lossless = request, len(request.input_ids), plan.policy not in LOSSY
        self.seconds: dict[str, float] = {}
        self.plan, self.index, self.alone = plan, index, False
        self.cancelled, self.reason, self._read = False, "", False
        self.scores: RowScores
        self.finish: Finish
        self.sequence: SequenceState
        self.told = 0  # verifications whose tokens were handed out
        self.rows: Tensor | None = None  # log probabilities of this round's tokens
        self._start, self._on_piece = time.perf_counter(), on_piece
        self._pieces: SimpleQueue[Piece] = SimpleQueue()

    def __iter__(self) -> Iterator[Piece]:
        while not self._read:
            piece = self._pieces.get()
            self._read = piece.finish_reason is not None
            yield piece

    def cancel(self) -> None:
        """It leaves within one round; its last piece says so, unless it has ended before."""
        self.cancelled = True

    def clock(self, name: str) -> None:
        """Note when something happened, the first time."""
        self.seconds.setdefault(name, time.perf_counter() - self._start)

    def hand(self, piece: Piece) -> None:
        """To the reader. What the reader's own function does wrong ends this request and no other."""
        self.clock("first")
        if self._on_piece is None:
            self._pieces.put(piece)
            return
        try:
            self._on_piece(piece)
        except Exception:
            _LOG.exception("on_piece failed: its request is cancelled")
            self.cancel()

    def begin(self) -> SequenceState:
        """The sequence as far as it was handed out: of a run that broke, the rest is decoded anew."""
        before = self.sequence
        record = before.record[: self.told]
        length = before.prompt_length + sum(v.emitted for v in record)
        self.sequence = SequenceState(before.tokens[:length], before.prompt_length, self.index, record=record)
        self.sequence.most_tokens, self.sequence.most_drafts = before.most_tokens, before.most_drafts
        return self.sequence

    def stats(self) -> GenerationStats:
        """Of this request alone."""
        made = GenerationStats.of(self.plan.policy, self.lossless, [self.sequence])
        made.verifications, made.confidence_threshold = len(self.sequence.record), self.plan.threshold
        return made
