"""Drafting one token after the other: the loop that drafters share whose depth k reads what depth k - 1 drafted.

And how a module reads what it has not read yet, prompts among it: a bounded number of rows at a time.
"""

# B sequences, R rows of a forward, K depths, M draft vocabulary, V vocabulary.

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Any

import torch
from torch import Tensor

from foretell.methods.base import MTPModule
from foretell.models.attention import RowMasks
from foretell.models.slot_cache import SlotCache
from foretell.models.target import Target
from foretell.ops.sampling import draw, first_of_race, over_vocabulary
from foretell.types import Draft, ModuleDrafter, SequenceState, Warp, Worth

READ_ROWS = 256  # of all sequences in one forward of a module: what its mask takes grows by the text's length only
Picked = tuple[int, Tensor, Tensor, Tensor | None]  # a depth and its _guesses
LEAST = 0.02  # further guesses less likely than this are not offered
MOST = 128  # of all sequences together; what rows cost decides how many of them are verified
FEW_ROWS = 8  # padding up to so many rows a sequence is cheaper than one more forward


def reading_plan(counts: list[int], starts: list[int], capacity: int) -> list[tuple[slice, list[int], list[int]]]:
    """(neighbours that share a forward, their first rows, how many) for sequences that have counts[b] rows to read from
    starts[b] on. The last forward that a sequence is in reads its newest row; those with nothing to read are in none,
    or before others: behind them there may be no room yet for who has just come.

    One that has just joined brings its whole prompt: all but its last rows are read by itself, piece by piece, and its
    rows must neither pad the few of the others nor reach beyond the cache.
    """
    end = max((b + 1 for b, count in enumerate(counts) if count), default=0)
    plan, starts, counts = [], list(starts[:end]), list(counts[:end])
    for b, count in enumerate(counts):
        for _ in range(max(count - 1, 0) // READ_ROWS):
            plan.append((slice(b, b + 1), [starts[b]], [READ_ROWS]))
            starts[b], counts[b] = starts[b] + READ_ROWS, counts[b] - READ_ROWS
    first, R, rows, start = 0, 0, 0, 0
    for b, count in enumerate(counts):
        R, rows, start = max(R, count), rows + count, max(start, starts[b])
        wasteful = R > FEW_ROWS and R * (b + 1 - first) > min(2 * rows, READ_ROWS)
        if b > first and (wasteful or start + R > capacity):
            plan.append((slice(first, b), starts[first:b], counts[first:b]))
            first, R, rows, start = b, count, count, starts[b]
    plan.append((slice(first, end), starts[first:], counts[first:]))
    return [part for part in plan if any(part[2])]


def begin_rows(
    cache: SlotCache, masks: RowMasks, slot: int, starts: list[int], counts: list[int], device: torch.device
) -> Tensor:
    """[B, R] positions of the next forward's rows, counts[b] from starts[b] on in slots slot, slot + 1, ...; its cache
    and its masks are told.
    """
    R = max(counts)
    lengths_B, valid_rows_B, start = begin_cache(cache, slot, starts, counts, device)
    full = R == 1 and start is not None
    columns = cache.columns()
    masks.begin(lengths_B, max(starts) + R, R, valid_rows_B=valid_rows_B, full=full, start=start, columns=columns)
    return lengths_B[:, None] + torch.arange(R, device=device)


def begin_cache(
    cache: SlotCache, slot: int, starts: list[int], counts: list[int], device: torch.device
) -> tuple[Tensor, Tensor | None, int | None]:
    """(lengths_B, valid_rows_B, start) of these rows, as a RowMasks takes them; the cache is told."""
    R = max(counts)
    lengths_B = torch.tensor(starts, device=device)
    valid_rows_B = None if min(counts) == R else torch.tensor(counts, device=device)
    valid_BR = None if valid_rows_B is None else torch.arange(R, device=device) < valid_rows_B[:, None]
    start = starts[0] if valid_rows_B is None and min(starts) == max(starts) else None
    cache.begin(slot, lengths_B, valid_BR, R, max(starts) + R, start)
    return lengths_B, valid_rows_B, start


def probabilities(logits: Tensor) -> Tensor:
    """Of what a module says; where that is no number, of nothing in particular: its drafts harm no text."""
    return torch.softmax(logits.float().nan_to_num(), dim=-1)


def branch(drafts: list[Draft]) -> None:
    """Let what was guessed for a depth follow every guess of the depth before, the likeliest paths first: right where
    no depth reads what was drafted before it. Drafts that were a chain and leaves beside it keep those.
    """
    for draft in drafts:
        path: list[tuple[float, int]] = []  # chance and depth of each token
        below: dict[int, list[tuple[int, float, str]]] = defaultdict(list)  # by depth, what may follow
        for parent, one in zip(
            draft.parents, zip(draft.tokens, draft.confidence, draft.sources, strict=True), strict=True
        ):
            chance, depth = path[parent] if parent >= 0 else (1.0, 0)
            path.append((chance * one[1], depth + 1))
            below[depth].append(one)
        leaves = set(range(len(path))).difference(draft.parents)
        border = [(-path[i][0] * one[1], i, one) for i in leaves for one in below[path[i][1]]]
        heapify(border)
        while border and -border[0][0] >= LEAST and len(draft) * len(drafts) < MOST:
            chance, parent, (token, sure, source) = heappop(border)
            i, depth = draft.add(token, parent, sure, source), path[parent][1] + 1
            path.append((-chance, depth))
            for one in below[depth]:
                heappush(border, (chance * one[1], i, one))


class OwnDrafter(ModuleDrafter):
    """A module's drafter: packed weights, which all of its copies share, and storage of its own."""

    name = "mtp"

    def __init__(self, module: MTPModule, target: Target) -> None:
        self.module, self.target = module, target
        self._sure: Tensor | None = None  # of the logits that were said last
        self.warp: Warp | None = None  # what drawn drafts' scores go through
        self._renew()

    @property
    def draft_vocab_ids(self) -> Tensor | None:  # type: ignore[override]
        """See ModuleDrafter."""
        return self.module.draft_vocab_ids

    def _renew(self) -> None:
        """Storage as new."""

    def proposals(self, logits_NM: Tensor) -> Tensor:
        """[..., V] probabilities to draw drafts from: all tokens', through the caller's temperature, top-k, ..., as the
        target's own are.
        """
        logits_NV = over_vocabulary(logits_NM.float(), self.draft_vocab_ids, self.target.vocab_size)
        if self.warp is not None:
            logits_NV = self.warp(logits_NV.flatten(0, -2)).view_as(logits_NV)
        return probabilities(logits_NV)

    def said(self, products: Tensor, states: Tensor, before: Tensor | None) -> Tensor:
        """Logits of the head's products with states: the bigram's are added. What the confidence head says is kept for
        `rated`.
        """
        bigram, self._sure = self.module.bigram, None
        if bigram is not None and before is not None:
            products = bigram.added(products, before)
            self._sure = None if bigram.sure is None else bigram.sureness(states, before).sigmoid()
        return self.target.scaled(products)

    def rated(self, probs_BS: Tensor) -> Tensor:
        """Probabilities of the likeliest tokens, best first, as the confidence head has it: its word for the first, and
        what that leaves among the others.
        """
        if self._sure is None:
            return probs_BS
        sure_B1 = self._sure[:, None].to(probs_BS.dtype)
        left_B1 = (1 - sure_B1) / (1 - probs_BS[:, :1]).clamp(min=1e-6)
        return torch.cat([sure_B1, probs_BS[:, 1:] * left_B1], dim=1)

    def _guesses(
        self, logits_BM: Tensor, width: int, sequences: Sequence[SequenceState], depths: list[int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """[B, S] tokens, best first, their probabilities and, where they are drawn, what they are drawn from [B, V].
        depths: of the rows below the last tokens that they follow.
        """
        if self.sample:
            probs_BV = self.proposals(logits_BM)
            tokens_B1 = draw(probs_BV, self.generator)[:, None]
            return tokens_B1, probs_BV.gather(1, tokens_B1), probs_BV
        sure_BS, tokens_BS = probabilities(logits_BM).topk(min(width, logits_BM.shape[1]))
        ids = self.module.draft_vocab_ids
        tokens_BS, sure_BS = tokens_BS if ids is None else ids[tokens_BS], self.rated(sure_BS)
        for scores, rows in [] if self.scores is None else self.scores.parts(sequences):
            if scores.dice is not None:
                few, at = [sequences[b] for b in rows], [[depths[b]] for b in rows]
                number_N = scores.numbers(few, at, logits_BM.device)[:, 0]
                first = first_of_race(scores.as_drawn(logits_BM[list(rows)]), ids, number_N, tokens_BS.shape[1])
                tokens_BS[list(rows)], sure_BS[list(rows)] = first[0], first[1].to(sure_BS)
        return tokens_BS, sure_BS, None

    def last_tokens(self, sequences: Sequence[SequenceState], drafts: list[Draft]) -> Tensor:
        """[B] what the next token follows."""
        last = [(draft.tokens or s.tokens)[-1] for s, draft in zip(sequences, drafts, strict=True)]
        return torch.tensor(last, device=self.target.device)

    def another(self, sample: bool) -> OwnDrafter:
        """See ModuleDrafter."""
        other = copy.copy(self)
        other.sample, other.calls, other.generator = sample, 0, None
        other._renew()
        return other


class ChainDrafter(OwnDrafter, ABC):
    """A method gives _step (the logits of one depth) and _limit (how deep a sequence can be drafted now).

    on_device: the next depth finds what was drafted by itself, so that the host need not read it in between.
    reads_drafts: a depth's guesses depend on those before.
    """

    on_device, reads_drafts = False, True

    def __init__(self, module: MTPModule, target: Target, dtype: str) -> None:
        super().__init__(module, target)
        self._head = module.draft_head(target, dtype)

    def span_logits(
        self, sequences: Sequence[SequenceState], drafts: list[Draft], k: int, asked: list[int], rows: Any
    ) -> Tensor:
        """See ModuleDrafter."""
        return self._step(sequences, drafts, k, asked)

    @abstractmethod
    def _limit(self, sequence: SequenceState) -> int:
        """How many tokens can be drafted for a sequence now."""

    def _begin(self, sequences: Sequence[SequenceState], lengths: list[int], worth: Worth | None) -> list[Draft]:
        """The drafts that the chains go on from: empty ones, unless a method knows better."""
        return [Draft(probs=[] if self.sample else None) for _ in sequences]

    @abstractmethod
    def _step(self, sequences: Sequence[SequenceState], drafts: list[Draft], k: int, wanted: list[int]) -> Tensor:
        """[B, M] logits of depth k; anything for a sequence that does not want it."""

    @torch.no_grad()
    def draft(self, sequences: Sequence[SequenceState], lengths: list[int], worth: Worth | None = None) -> list[Draft]:
        """See Drafter."""
        drafts = self._begin(sequences, lengths, worth)
        wanted = [
            min(length - len(draft), self._limit(s)) if length else 0
            for s, length, draft in zip(sequences, lengths, drafts, strict=True)
        ]
        picked: list[Picked] = []
        begun = [len(draft) - 1 for draft in drafts]
        for k in range(1, max(wanted, default=0) + 1):
            if worth is not None:
                go_on = worth(self.name, drafts)
                wanted = [n if goes or n < k else k - 1 for n, goes in zip(wanted, go_on, strict=True)]
            if max(wanted) < k:
                break
            logits_BM, depths = self._step(sequences, drafts, k, wanted), [before + k for before in begun]
            tokens_BS, sure_BS, probs_BV = self._guesses(logits_BM, self.guesses, sequences, depths)
            picked.append((k, tokens_BS, sure_BS, probs_BV))
            if self.on_device:
                self._hold(sequences, k, tokens_BS[:, 0])
            if worth is not None or not self.on_device:
                self._read(picked, drafts, wanted)
        self._read(picked, drafts, wanted)
        if self.guesses > 1 and not self.reads_drafts:
            branch(drafts)
        return drafts

    def _read(self, picked: list[Picked], drafts: list[Draft], wanted: list[int]) -> None:
        """Move what was picked into the drafts: one read of the device, however many depths there are."""
        if not picked:
            return
        S = picked[0][1].shape[1]
        columns = [x_BS.double() for _, tokens_BS, sure_BS, _ in picked for x_BS in (tokens_BS, sure_BS)]
        for b, row in enumerate(torch.cat(columns, dim=1).tolist()):
            for i, (k, _, _, probs_BV) in enumerate(picked):
                if wanted[b] < k:
                    continue
                probs_V, parent = None if probs_BV is None else probs_BV[b], len(drafts[b]) - 1
                tokens, sure = row[2 * i * S : (2 * i + 1) * S], row[(2 * i + 1) * S : (2 * i + 2) * S]
                for s in reversed(range(S)):  # the chain goes on from the newest
                    if s == 0 or sure[s] >= LEAST:
                        drafts[b].add(int(tokens[s]), parent, sure[s], self.name, probs_V)
        picked.clear()

    def _hold(self, sequences: Sequence[SequenceState], k: int, tokens_B: Tensor) -> None:
        """Keep the tokens of depth k where the next depth finds them."""
