"""Lossy decoding by spans: one forward gives the target's next token and the module's tokens after it, and what is
committed of them is never verified (arXiv 2602.06019, "static k" and "ConfAdapt").

A committed token is no cached token: keys that a mask left are not those of the token it stood for. So the next forward
reads the span's tokens again, as text, and the masks of the next span below the last of them; masks are never kept.
Sequences are ragged, each with its own number of tokens to read again; no grouping by length.
"""

# B active sequences, R rows a sequence, K = k - 1 tokens beyond the target's own, N rows, D hidden width, V vocabulary,
# M draft vocabulary.

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foretell.decoding.adaptive import AdaptiveLength, CostCurve
from foretell.decoding.loop import Decoder, Rules, Run
from foretell.decoding.policies import SPANS
from foretell.models.target import TargetRows
from foretell.ops.sampling import draw, over_vocabulary, to_probs
from foretell.types import Draft, ModuleDrafter, SequenceState, Verification

CONFIDENCE = 0.9  # of ConfAdapt where none is given: what the paper's speeds are measured with


class SpanDecoder(Decoder):
    """A Decoder whose rounds commit spans."""

    def start(self, sequences: Sequence[SequenceState], rules: Rules) -> Run:
        """See Decoder."""
        return SpanRun(self, sequences, rules)


class SpanRun(Run):
    """Between rounds a sequence has as many uncached tokens as its last span."""

    drafter: ModuleDrafter | None

    def _round(self) -> list[tuple[SequenceState, list[int]]]:
        """Forward over the last spans and the masks below them, the target's next token, then the module's; emit."""
        active, drafter = self.active, self.drafter
        start = time.perf_counter()
        K = self._offer()
        # 1. one target forward: the tokens that are not cached, in each sequence a chain, and masks below its last one
        fresh = [s.tokens[s.cached :] for s in active]
        first, chains = [t[0] for t in fresh], [Draft(t[1:], list(range(-1, len(t) - 2))) for t in fresh]
        masks: tuple[int, list[list[int]]] = (0, [])
        if K and drafter is not None:
            drafter.span(K)
            masks = self._carriers(chains)
        rows, R = self._read(first, chains, *masks)
        if self._overflowed(rows):
            K, (rows, R) = 0, self._read_alone(first, chains)
        self.stats.verifications += 1
        # 2. rows of a chain lie where they belong; what masks have written is written over by the next round
        last = [len(tokens) - 1 for tokens in fresh]
        for sequence, tokens in zip(active, fresh, strict=True):
            sequence.cached += len(tokens)
        for watcher in self.watchers:
            watcher.observe(active, rows, [list(range(1 + n)) for n in last])
        # 3. the target's own token, whatever its confidence: from here on all but the last token is cached, as drafters
        # expect it
        own_BV = self.target.logits(rows.post_norm_BRD[torch.arange(len(active)), last], view=True)
        sure = self._sure(own_BV)
        for sequence, token in zip(active, self._choose(own_BV, active), strict=True):
            self._append(sequence, [token])
        read = time.perf_counter()
        # 4. the module's tokens, as far as it is sure
        asked = [K if sure[b] and not (s.done or s.broken) else 0 for b, s in enumerate(active)]
        open_B = [b for b, s in enumerate(active) if not s.done]
        drafts, steps = self._span(asked, rows)
        drafted = time.perf_counter()
        emitted = []
        for sequence, draft in zip(active, drafts, strict=True):
            count = 1 + self._append(sequence, draft.tokens)
            sources = ["target"] + ["mtp"] * (count - 1)
            sequence.record.append(Verification(K, K, count - 1, count, sources))
            emitted.append((sequence, sequence.tokens[-count:]))
        self.stats.seconds["verify"] += read - start
        self.stats.seconds["draft"] += drafted - read
        if isinstance(self.adaptive, SpanLength):
            committed = [len(drafts[b]) for b in open_B]
            spent = drafted - start
            self.adaptive.learn_span(K, committed, len(active), len(active) * R, steps, drafted - read, spent)
        return emitted

    def _offer(self) -> int:
        """K of this round."""
        if self.drafter is None:
            return 0
        return self.adaptive.span(len(self.active)) if isinstance(self.adaptive, SpanLength) else self.length

    def _span(self, asked: list[int], rows: TargetRows) -> tuple[list[Draft], int]:
        """(at most asked[b] tokens of each sequence, up to the first row that is not sure; steps that it took)."""
        asked, drafts, k = list(asked), [Draft() for _ in asked], 0
        for k in range(1, max(asked) + 1):
            assert self.drafter is not None, "who offers nothing asks for nothing"
            logits_BM = self.drafter.span_logits(self.active, drafts, k, asked, rows)
            sure = self._sure(logits_BM)
            for b, wanted in enumerate(asked):
                if wanted >= k and not sure[b]:
                    asked[b] = k - 1
            go_on = [b for b, wanted in enumerate(asked) if wanted >= k]
            if not go_on:
                break
            texts = (replace(self.active[b], tokens=self.active[b].tokens + drafts[b].tokens) for b in go_on)
            for b, token in zip(
                go_on, self._choose(logits_BM[go_on], texts, self.drafter.draft_vocab_ids), strict=True
            ):
                drafts[b].tokens.append(token)
        return drafts, k

    def _sure(self, logits_NM: Tensor) -> list[bool]:
        """Whether each row's best token has at least the threshold, at temperature 1 and before logits processors."""
        if self.rules.confidence_threshold is None:
            return [True] * len(logits_NM)
        return (torch.softmax(logits_NM.float(), dim=-1).amax(-1) >= self.rules.confidence_threshold).tolist()

    def _choose(self, logits_NM: Tensor, texts: Iterable[SequenceState], ids_M: Tensor | None = None) -> list[int]:
        """The token after each text, from its processed scores: the best, or a drawn one."""
        texts = list(texts)
        parts = self.rules.scores.parts(texts)
        if len(parts) > 1:
            found: dict[int, int] = {}
            for _, few in parts:
                found.update(zip(few, self._choose(logits_NM[few], [texts[b] for b in few], ids_M), strict=True))
            return [found[b] for b in range(len(texts))]
        processed = parts[0][0]
        if processed.plain:
            best_N = logits_NM.argmax(-1)
            return (best_N if ids_M is None else ids_M[best_N]).tolist()
        logits_NV = over_vocabulary(logits_NM, ids_M, self.target.vocab_size)  # processors speak of all tokens
        none = [Draft() for _ in logits_NV]
        scores_NV = processed.rows(texts, none, logits_NV[:, None])[:, 0]
        if not processed.do_sample:
            return scores_NV.argmax(-1).tolist()
        return draw(to_probs(scores_NV), self.rules.generator).tolist()


class SpanLength(AdaptiveLength):
    """How many tokens to offer beyond the target's own: as many as commit most tokens a second, none if none pays.

    What is offered is read as masks, and what is committed is read again. certain: all that is offered is committed
    (static k), so that costs alone decide. masks: whether offers are rows of the target's forward.
    """

    def __init__(
        self, curve: CostCurve, longest: int, certain: bool, masks: bool, steps: dict[str, float] | None = None
    ) -> None:
        super().__init__(curve, longest, steps)
        self.certain, self.masks = certain, masks

    def span(self, batch: int) -> int:
        """K for this round; now and then a little more than pays, to learn whether that has changed."""
        self.begin_round([self.longest + 1] * batch)
        best = max(range(self.longest + 1), key=self.rate)
        return best if best == self.longest else min(best + 2 * self._due("spans", 0), self.longest)

    def rate(self, K: int) -> float:
        """Tokens a second of rounds that always offer K. The longest span of the batch pads the others."""
        tokens, rows, steps, reached = 1.0, 1.0, 0.0, 1.0
        for k in range(1, K + 1):
            steps += self._anyone(reached)
            reached *= self._held(k)
            tokens += reached
            rows += self._anyone(reached)
        seconds = self.cost(self._batch * (rows + K * self.masks)) + steps * self._step("spans")
        return self._batch * tokens / seconds

    def _held(self, k: int) -> float:
        """Chance that token k is committed where those before it are."""
        return 1.0 if self.certain else self._holds("spans", k)

    def _anyone(self, chance: float) -> float:
        return 1.0 - (1.0 - chance) ** self._batch

    def learn_span(
        self, offered: int, committed: list[int], batch: int, rows: int, steps: int, drafting: float, seconds: float
    ) -> None:
        """After a round: tokens committed of those offered, of each sequence that did not end before; the round's rows,
        steps of drafting, their seconds and the whole round's, by the clock.
        """
        for count in committed:
            for k in range(1, min(count + 1, offered) + 1):
                cell = self._depth.setdefault(("spans", k), [2 * self._held(k), 2.0])
                cell[0] = cell[0] * self.FORGET + (count >= k)
                cell[1] = cell[1] * self.FORGET + 1.0
        self._took("spans", drafting, steps, self._correct(rows, seconds - drafting))


def threshold_of(policy: str, threshold: float | None) -> float | None:
    """The confidence threshold of a policy, or ValueError."""
    if policy != "confadapt":
        if threshold is not None:
            raise ValueError(
                f"confidence_threshold: got {threshold!r} with policy {policy!r}, which has none; leave it out, or use "
                "policy='confadapt'."
            )
        return None
    if threshold is None:
        return CONFIDENCE
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not 0 < threshold <= 1:  # NaN is in no interval
        raise ValueError(f"confidence_threshold: got {threshold!r}, wanted a number above 0 and at most 1.")
    return float(threshold)


def span_drafts(policy: str, length: int | str | None, longest: int, drafter: Any, **given: Any) -> int | str:
    """Tokens beyond the target's own (k - 1), or "auto". longest: that the module can look ahead.

    Raises:
        ValueError: another k than 1..longest + 1, a drafter that is not the module alone, or anything `given` that says
            how drafts are verified.
    """
    assert policy in SPANS
    if not (isinstance(drafter, str) and drafter == "mtp"):
        raise ValueError(
            f"drafter: got {drafter!r} with policy {policy!r}, wanted 'mtp': nobody else's tokens can be committed "
            "unverified. Leave it out, or use policy='lossless'."
        )
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name}: got {value!r}, but policy {policy!r} verifies no drafts; leave it out, or use "
                "policy='lossless'."
            )
    if length is None:
        return longest
    if isinstance(length, str) and length == "auto":
        return length
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= longest + 1:
        raise ValueError(
            f"num_draft_tokens: got {length!r} with policy {policy!r}, wanted a span of 1 to {longest + 1} tokens (the "
            f"target's own and {longest} of the module), or 'auto'."
        )
    return length - 1
