"""Many requests, one decoder: they join and leave its running batch between rounds, each as if it were alone.

One thread decodes. What requests ask for differs row by row in one run of the decoder; only what changes how a round is
drafted (adaptive or fixed drafts, a lossy policy, a masked module's number of masks) needs a run of its own. Runs take
turns, round by round, and share the slots.
"""

# R rows of a round, V vocabulary.

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foretell.decoding.arguments import Plan
from foretell.decoding.generate import Finish, prepared
from foretell.decoding.loop import Rules, Run
from foretell.decoding.policies import LOSSY, SPANS, check_policy
from foretell.decoding.scores import AnswerPenalties, OwnScores, RowScores
from foretell.models.fast import copy_key
from foretell.mtp import MTPModel
from foretell.serving.requests import Closed, Full, Piece, Request, Running
from foretell.types import SequenceState

KEPT_RUNS = 2  # whose requests have all ended, for what others begin alike
LONG_PROMPT = 2047  # tokens; of longer ones, each power of two is a kind
_LOG = logging.getLogger(__name__)


@dataclass
class _Turn:
    """A run that is open, and the workspace that it holds."""

    run: Run
    scores: OwnScores
    held: ExitStack


class Engine:
    """Serves requests with one model, from any thread. Close it, or use it as a context manager.

    drafter, num_draft_tokens, policy, draft_dtype: as in MTPModel.generate, where a request does not say; slots:
    requests decoded at once; max_queued: how many more may wait; prefix_caching: what prompts begin with alike is read
    once, also after a text that has ended, while nobody needs its slot.
    """

    def __init__(
        self,
        model: MTPModel,
        *,
        drafter: str = "mtp",
        num_draft_tokens: int | str | None = "auto",
        policy: str = "lossless",
        slots: int = 8,
        max_queued: int = 64,
        draft_dtype: str = "auto",
        prefix_caching: bool = True,
    ) -> None:
        if not isinstance(model, MTPModel):
            raise ValueError(f"model: got {type(model).__name__}, wanted an MTPModel; get_mtp_model makes one.")
        if not isinstance(drafter, str):
            raise ValueError(f"drafter: got {drafter!r}, wanted 'mtp', 'lookup' or 'mtp+lookup'.")
        if isinstance(max_queued, bool) or not isinstance(max_queued, int) or max_queued < 0:
            raise ValueError(f"max_queued: got {max_queued!r}, wanted a whole number of at least 0.")
        check_policy(policy)
        self.mtp, self.slots, self.max_queued = model, slots, max_queued
        self._own: dict[str, Any] = {"drafter": drafter, "draft_dtype": draft_dtype, "slots": slots}
        self._policy, self._shares = policy, prefix_caching
        self._length = None if policy in LOSSY and num_draft_tokens == "auto" else num_draft_tokens
        usual = self._plan(Request(input_ids=[0]))
        within = model.target.verdict()["within"]
        context = getattr(model.target.config, "max_position_embeddings", None) or sys.maxsize
        self.max_context = context if within is None else min(context, within)
        self.vocab_size = model.target.vocab_size
        if usual.length == "auto":
            model.cost_curve()
        self._changed = threading.Condition()
        self._queue: deque[Running] = deque()
        self._taken: dict[int, Running] = {}  # in slots, by index
        self._runs: dict[tuple, _Turn] = {}  # by kind of request; those of use to come are kept, the newest last
        self._model: Any = None  # what the kept ones are of
        self._closing, self._count, self._usual_seconds = False, 0, 1.0
        self._counts: Counter[str] = Counter()
        self._ends: Counter[str] = Counter(stop=0, length=0, cancelled=0, error=0)
        self._accepted_at: Counter[int] = Counter()
        self._thread = threading.Thread(target=self._serve, name="foretell-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- from any thread -----------------------------------------------------------------------------------------------

    def submit(self, request: Request, on_piece: Callable[[Piece], None] | None = None) -> Running:
        """Take a request. on_piece: called with each piece in the decoding thread, so it must return at once; None: the
        pieces are kept for who iterates.

        Raises:
            ValueError: what is wrong with the request, before any work.
            Full: too many wait.
            Closed: the engine is closing.
        """
        found = request.problems(self.vocab_size, self.max_context)
        if found:
            raise ValueError(" ".join(found))
        plan = self._plan(request)
        if request.logprobs is not None and plan.policy in SPANS:
            raise ValueError(
                f"logprobs: got {request.logprobs} with policy {plan.policy!r}, whose tokens the model never rates; "
                "leave it out, or use policy='lossless'."
            )
        with self._changed:
            self._check_room()
            self._count += 1
            running = Running(request, plan, self._count, on_piece)
        self._prepare(running)
        with self._changed:
            self._check_room()
            self._queue.append(running)
            self._counts["prompt_tokens"] += running.prompt_tokens
            self._changed.notify_all()
        return running

    def _check_room(self) -> None:
        if self._closing:
            raise Closed("the engine is closing and takes no requests any more.")
        if len(self._queue) + len(self._taken) >= self.slots + self.max_queued:
            self._counts["rejected"] += 1
            raise Full(max(1.0, self._usual_seconds * (len(self._queue) + 1) / self.slots))

    def metrics(self) -> dict[str, Any]:
        """What happens now, and counts since the start."""
        with self._changed:
            now = {"running": len(self._taken), "waiting": len(self._queue)}
            names = ["rejected", "prompt_tokens", "generation_tokens", "rounds", "drafts", "draft_tokens"]
            names += ["accepted_tokens", "prefix_queries", "prefix_hits"]
            counts = {name: self._counts[name] for name in names}
            sizes = {"slots": self.slots, "max_queued": self.max_queued, "requests": dict(self._ends)}
            accepted = [count for _, count in sorted(self._accepted_at.items())]
            return now | sizes | counts | {"accepted_per_position": accepted}

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests; wait until all that were taken have ended, cancelled unless drain."""
        with self._changed:
            self._closing = True
            for running in (*self._queue, *self._taken.values()) if not drain else ():
                running.cancel()
            self._changed.notify_all()
        self._thread.join(timeout)

    # -- what a request asks for ---------------------------------------------------------------------------------------

    def _plan(self, request: Request) -> Plan:
        policy = self._policy if request.policy is None else request.policy
        check_policy(policy)
        length = request.num_draft_tokens
        if length is None:
            length = self._length if policy == self._policy else None if policy in LOSSY else "auto"
        elif length == "auto" and policy in LOSSY:
            raise ValueError(
                f"num_draft_tokens: got 'auto' with policy {policy!r}, wanted a number: how much is drafted has a say "
                "in its texts, which must not depend on who else is served."
            )
        own = self._own
        if policy in SPANS and "mtp" in own["drafter"].split("+"):
            own = own | {"drafter": "mtp"}
        threshold = request.confidence_threshold
        return Plan.of(self.mtp, num_draft_tokens=length, policy=policy, confidence_threshold=threshold, **own)

    def _prepare(self, running: Running) -> None:
        """The logits processors and ends that transformers' generate would have for this request."""
        request, model = running.request, self.mtp.model
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        how: dict[str, Any] = {n: getattr(request, n) for n in names if getattr(request, n) is not None}
        if "top_k" in how:
            how["top_k"] = max(how["top_k"], 0)
        for name in how.keys() - {"top_k"}:
            how[name] = float(how[name])
        if request.temperature is not None:
            how["do_sample"] = request.temperature > 0
        if request.temperature == 0:
            how = {n: value for n, value in how.items() if n in ("do_sample", "repetition_penalty")}
        penalties = request.presence_penalty, request.frequency_penalty, request.logit_bias
        if any(penalties):
            how["logits_processor"] = [AnswerPenalties(running.prompt_tokens, *penalties)]
        ends = sorted({*self.mtp.target.end_ids, *request.stop_token_ids})
        pad = model.generation_config.pad_token_id
        new = request.max_new_tokens or self.max_context - running.prompt_tokens
        how |= {"max_new_tokens": new, "max_length": None}
        how |= {"eos_token_id": ends or None, "pad_token_id": 0 if pad is None else pad}
        processors, criteria, config = prepared(model, list(request.input_ids), **how)
        sample = bool(config.do_sample)
        generator = torch.Generator(self.mtp.device)
        generator.seed() if request.seed is None else generator.manual_seed(request.seed)
        running.scores = RowScores(processors, sample, generator)
        running.finish = Finish(criteria, 1, self.mtp.device)
        if request.ignore_eos:
            running.finish.eos = set(request.stop_token_ids)
        sequence = SequenceState(list(request.input_ids), running.prompt_tokens, running.index)
        sequence.most_tokens = running.finish.max_length or sys.maxsize
        if isinstance(running.plan.length, int) and running.plan.policy not in SPANS:
            sequence.most_drafts = running.plan.length
        running.sequence = sequence

    def _kind(self, running: Running) -> tuple:
        """Those of one kind share a run; the index stands in it where nobody else may have a say in the text. All of a
        run take as much room as the longest, and as long to attend, so long prompts are among themselves.
        """
        plan = running.plan
        drawn = plan.policy in SPANS and running.scores.do_sample
        alone = running.alone or drawn or (plan.policy in LOSSY and self.mtp.module.lays_masks)
        length = plan.length if plan.layout is not None or plan.length == "auto" or plan.policy in SPANS else "fixed"
        size = max(running.prompt_tokens, LONG_PROMPT).bit_length()
        return plan.policy, length, plan.threshold, size, running.index if alone else None

    # -- the decoding thread -------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    break
            try:
                with self.mtp.target.reading():
                    self._look_at_model()
                    while self._let_in():
                        for kind in [kind for kind, turn in self._runs.items() if not turn.run.is_idle]:
                            self._one_round(kind)
                        if not self._taken:  # whoever comes next is read by what the model is then
                            break
            except BaseException as error:  # of the model itself: nobody can be served as things are
                _LOG.exception("decoding failed")
                for turn in self._runs.values():
                    turn.held.__exit__(type(error), error, None)
                self._runs.clear()
                with self._changed:
                    everyone = [*self._taken.values(), *self._queue]
                    self._queue.clear()
                for running in everyone:
                    self._end(running, "error", error)
        for kind in list(self._runs):
            self._runs.pop(kind).held.close()

    def _look_at_model(self) -> None:
        """Texts that have ended are of use while the model is the same."""
        mtp, before = self.mtp, self._model
        weights = sum(part._version for part in mtp.model.parameters() if not part.is_inference())
        states = mtp.target.fingerprint()["states"]
        self._model = mtp.target.view(), copy_key(mtp.module), mtp.target.head_key(), weights, states
        if before is None or before[0] is not self._model[0] or before[1:] != self._model[1:]:
            for kind in list(self._runs):
                self._runs.pop(kind).held.close()

    def _let_in(self) -> bool:
        """Those who wait take the free slots, whoever was cancelled leaves; whether anybody is here."""
        with self._changed:
            gone = [running for running in self._queue if running.cancelled]
            for running in gone:
                self._queue.remove(running)
            new = [self._queue.popleft() for _ in range(min(len(self._queue), self.slots - len(self._taken)))]
            self._taken.update((running.index, running) for running in new)
        for running in gone:
            self._end(running, "cancelled")
        for running in new:
            self._join(running)
        for running in [one for one in self._taken.values() if one.cancelled]:
            self._runs[self._kind(running)].run.cancel(running.sequence)
        return bool(self._taken)

    def _join(self, running: Running) -> None:
        try:
            kind = self._kind(running)
            if kind not in self._runs:
                self._runs[kind] = self._open(running, kind)
            turn = self._runs[kind]
            turn.scores.give(running.sequence, running.scores)
            running.clock("admitted")
            turn.run.admit(running.sequence)
        except Exception as error:
            _LOG.exception("a request could not begin")
            self._end(running, "error", error)

    def _open(self, running: Running, kind: tuple) -> _Turn:
        """A run for requests such as this one."""
        plan, mtp, alone = running.plan, self.mtp, kind[-1] is not None
        if kind[1] == "fixed" and not plan.length and not mtp.module.lays_masks:
            plan = Plan.of(mtp, policy=plan.policy, confidence_threshold=plan.threshold, **self._own)
        scores, dice, held = OwnScores(), running.scores.dice if alone else None, ExitStack()
        space = held.enter_context(mtp.workspace())
        try:
            length: Any = plan.length
            if length == "auto" or (plan.layout == "auto" and length):
                counted = plan.policy in LOSSY  # whatever it verifies has a say in the text
                length = mtp.adaptive(space, plan, running.scores.do_sample and counted, counted)
                length.begin()
            elif kind[1] == "fixed" and length:
                length = self.max_context  # each sequence has its own
            drafter = plan.drafters(mtp, space, None)
            rules = Rules(
                scores,
                lambda sequence: self._finished(self._taken[sequence.index]),
                max_tokens=self.max_context,
                num_draft_tokens=length,
                policy=plan.policy,
                confidence_threshold=plan.threshold,
                slots=1 if alone else self.slots,
                generator=None if dice is None else dice.generator(mtp.device),
                emit=lambda sequence, tokens: self._hand_out(self._taken[sequence.index], tokens),
                leave=lambda sequence: self._leave(sequence, scores),
                beside=lambda: any(turn.run.active for turn in self._runs.values()),
                look=lambda sequence, logits_RV, path: self._look(self._taken[sequence.index], logits_RV, path),
                share=self._shares and not alone,
            )
            run = space.decoder(mtp.target, drafter, plan.policy).start([], rules)
            run.begin()
        except BaseException as error:
            held.__exit__(type(error), error, None)
            raise
        return _Turn(run, scores, held)

    def _one_round(self, kind: tuple) -> None:
        turn = self._runs[kind]
        try:
            more = turn.run.step()
            self._counts["rounds"] += 1
            if not more:
                self._runs[kind] = self._runs.pop(kind)
                idle = [one for one, turn in self._runs.items() if turn.run.is_idle]
                of_use = [one for one in idle if self._runs[one].run.prefixes.kept][-KEPT_RUNS:]
                for one in [one for one in idle if one not in of_use]:
                    self._runs.pop(one).held.close()
        except Exception as error:
            self._broke(kind, error)

    def _broke(self, kind: tuple, error: Exception) -> None:
        """Whoever was in a run that broke goes on in a run alone. Who breaks that one too is told."""
        _LOG.exception("a round failed: its requests go on one by one")
        run = self._runs[kind].run
        self._runs.pop(kind).held.__exit__(type(error), error, None)
        for sequence in (*run.active, *run.reading, *run.waiting):
            running = self._taken.get(sequence.index)
            if running is None:
                continue
            if running.alone:
                self._end(running, "error", error)
                continue
            running.alone = True
            running.begin()
            self._join(running)

    # -- what a run tells ----------------------------------------------------------------------------------------------

    def _finished(self, running: Running) -> bool:
        tokens, most, stop = running.sequence.tokens, running.sequence.most_tokens, running.request.stop
        stopped = stop is not None and stop(tokens[-1])
        done = running.finish(running.sequence) or stopped
        if done:
            ended = stopped or tokens[-1] in running.finish.eos or len(tokens) < most
            running.reason = "stop" if ended else "length"
        return done

    def _look(self, running: Running, logits_RV: Tensor, path: list[int]) -> None:
        """Keep the log probabilities of the rows that a round's tokens are from."""
        if running.request.logprobs is not None:
            running.rows = logits_RV[path].float().log_softmax(-1)

    def _hand_out(self, running: Running, tokens: list[int]) -> None:
        sequence, logprobs, top = running.sequence, None, None
        newest = sequence.record[-1]
        if running.rows is not None:
            rows_RV = running.rows[: len(tokens)]
            logprobs = rows_RV[range(len(tokens)), tokens].tolist()
            best = rows_RV.topk(min(running.request.logprobs or 0, rows_RV.shape[-1]))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            top, running.rows = [list(zip(*pair, strict=True)) for pair in pairs], None
        with self._changed:
            if not running.told:
                self._counts["prefix_queries"] += running.prompt_tokens
                self._counts["prefix_hits"] += sequence.shared
            running.told = len(sequence.record)
            self._counts["generation_tokens"] += len(tokens)
            if newest.drafted:
                self._counts["drafts"] += 1
                self._counts["draft_tokens"] += newest.drafted
                self._counts["accepted_tokens"] += newest.accepted
                self._accepted_at.update(range(newest.accepted))
        piece = Piece(tokens, newest.sources, logprobs, top)
        if sequence.done:
            self._end(running, running.reason, piece=piece)
        else:
            running.hand(piece)

    def _leave(self, sequence: SequenceState, scores: OwnScores) -> None:
        scores.take(sequence)
        running = self._taken.get(sequence.index)
        if running is not None:  # it has not ended by itself
            self._end(running, "cancelled")

    def _end(
        self, running: Running, reason: str, error: BaseException | None = None, piece: Piece | None = None
    ) -> None:
        """The last piece. The slot is free before it is handed out."""
        tokens = running.sequence.tokens
        stop = tokens[-1] if reason == "stop" and tokens[-1] in running.finish.eos else None
        running.clock("ended")
        with self._changed:
            self._ends[reason] += 1
            if self._taken.pop(running.index, None) is not None:
                spent = running.seconds["ended"] - running.seconds.get("admitted", 0.0)
                self._usual_seconds += 0.1 * (spent - self._usual_seconds)
        told = None if error is None else f"{type(error).__name__}: {error}"
        piece = Piece([], []) if piece is None else piece
        running.hand(replace(piece, finish_reason=reason, stop_token=stop, stats=running.stats(), error=told))
