"""The decode round: draft, one target forward over the token tree, verify, keep the accepted path.

Sequences are ragged: each accepts its own length, finished ones leave the batch and waiting ones take their place
(continuous batching). Active sequences stand in slots 0, 1, ... of every cache, so that steps read views.
"""

# B active sequences, R rows a sequence (its last token, then its drafts), D hidden width, V vocabulary.

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from foretell.decoding.adaptive import AdaptiveLength, subset
from foretell.decoding.compose import timed_draft
from foretell.decoding.policies import LOSSY
from foretell.decoding.scores import RowScores
from foretell.decoding.stats import GenerationStats
from foretell.decoding.trees import lay_masks
from foretell.decoding.verify import verify, verify_greedy
from foretell.models.slot_cache import SlotCache
from foretell.models.target import Target, TargetRows
from foretell.types import Draft, Drafter, SequenceState, Verdict, Verification

PREFILL_ROWS = 512  # rows a sequence in one prefill forward: longer prompts are read in exact chunks
PREFILL_TOKENS = 4096  # rows of all sequences in one prefill forward


class Decoder:
    """Decodes sequences with a target and, if given, a drafter. Caches are kept between calls and grow when needed."""

    def __init__(self, target: Target, drafter: Drafter | None = None) -> None:
        self.target, self.drafter = target, drafter
        self.watchers: list[Drafter] = [drafter] if drafter is not None else []
        self._cache: SlotCache | None = None
        self._kind: tuple[torch.device, torch.dtype] | None = None  # of the target that the cache was made for

    @torch.no_grad()
    def run(
        self,
        sequences: Sequence[SequenceState],
        scores: RowScores,
        finished: Callable[[SequenceState], bool],
        *,
        max_tokens: int,
        num_draft_tokens: int | AdaptiveLength = 0,
        policy: str = "lossless",
        confidence_threshold: float | None = None,
        reference: str = "the target",
        slots: int = 64,
        generator: torch.Generator | None = None,
        emit: Callable[[SequenceState, list[int]], None] | None = None,
        leave: Callable[[SequenceState], None] | None = None,
        stop_admitting: Callable[[], bool] | None = None,
    ) -> GenerationStats:
        """Extend each sequence until finished(sequence) is true; it is asked after every single token.

        max_tokens: longest that a sequence gets, prompt included. confidence_threshold: of policy "confadapt".
        reference: whose output is the target's here. slots: how many are decoded at once. emit: told of each round's
        new tokens. leave: told of each sequence as it ends (its slot is still whole then).
        stop_admitting: once true, sequences still waiting are left as they are.
        """
        self.scores, self.finished, self.policy, self.generator = scores, finished, policy, generator
        self.adaptive = num_draft_tokens if isinstance(num_draft_tokens, AdaptiveLength) else None
        self.length = num_draft_tokens if isinstance(num_draft_tokens, int) else 0
        self.threshold = confidence_threshold
        self.stats = GenerationStats.of(policy, policy not in LOSSY, sequences)
        self.stats.confidence_threshold, self.stats.reference = confidence_threshold, reference
        self.stats.seconds = {"prefill": 0.0, "draft": 0.0, "verify": 0.0}
        self.target.refresh()
        longest = self.adaptive.longest if self.adaptive else self.length
        slots = min(slots, max(len(sequences), 1))
        self._open(slots, max_tokens + 2 * longest + 2 + getattr(self.drafter, "extra_rows", 0))
        if hasattr(self.drafter, "generator"):
            self.drafter.generator = generator
        # longest prompts first: they share prefill forwards with others of their length
        waiting = sorted(sequences, key=lambda s: len(s.tokens))
        self.active: list[SequenceState] = []
        while waiting or self.active:
            if stop_admitting is not None and stop_admitting():
                waiting = []
            free = slots - len(self.active)
            if waiting and free >= min(len(waiting), max(1, slots // 8)):
                self._admit([waiting.pop() for _ in range(min(free, len(waiting)))])
            if not self.active:
                break
            self._reread()
            for sequence, tokens in self._round():
                if emit is not None and tokens:
                    emit(sequence, tokens)
            self._leave(leave)
        self.stats.draft_forwards = getattr(self.drafter, "calls", 0) - self._calls_before
        return self.stats

    def _round(self) -> list[tuple[SequenceState, list[int]]]:
        """Draft, lay out the token tree, forward, verify, keep, emit."""
        active = self.active
        start = time.perf_counter()
        # a tree too broad for what is left of the cache loses its last rows
        room = self.cache.capacity - max(s.cached for s in active) - 1 - getattr(self.drafter, "extra_rows", 0)
        drafts = [subset(d, range(min(len(d), room))) for d in self._drafts()]
        drafted = time.perf_counter()
        # 1. one target forward
        masks, carriers = self._masks_below(drafts)
        rows, R = self._read([s.tokens[-1] for s in active], drafts, masks, carriers)
        # 2. verify
        logits_BRV = self.target.logits(rows.post_norm_BRD[:, : 1 + max(len(d) for d in drafts)], view=True)
        verdicts = self._verdicts(active, drafts, logits_BRV)
        self.stats.verifications += 1
        # 3. keep the last token's row and the accepted path; what was refused will be written over
        kept = [[0, *[i + 1 for i in verdict.path]] for verdict in verdicts]
        self.cache.keep([s.slot for s in active], [s.cached for s in active], kept)
        emitted = []
        for sequence, draft, verdict, path in zip(active, drafts, verdicts, kept, strict=True):
            sequence.cached += len(path)
            emitted.append((sequence, self._emit(sequence, draft, verdict)))
        for watcher in self.watchers:
            watcher.observe(active, rows, kept)
        self.stats.seconds["draft"] += drafted - start
        self.stats.seconds["verify"] += time.perf_counter() - drafted
        if self.adaptive is not None:
            told = [[*(d.tokens[i] for i in v.path), v.token] for d, v in zip(drafts, verdicts, strict=True)]
            spent = time.perf_counter() - start
            self.adaptive.learn(self._proposed, told, self._drafting, len(active) * R, spent)
        return emitted

    def _read(
        self, first: list[int], below: list[Draft], masks: int, carriers: list[list[int]]
    ) -> tuple[TargetRows, int]:
        """(the states, R) of one target forward on top of the cache: a row for each sequence's token `first`, one for
        each token of the tree `below` it, then masks below the rows that carry them.
        """
        active = self.active
        R = 1 + max(len(d) for d in below)
        ids = [[token, *d.tokens, *[0] * (R - 1 - len(d))] for token, d in zip(first, below, strict=True)]
        chains = all(p == i - 1 for d in below for i, p in enumerate(d.parents))
        parents_BR, valid_rows_B, position_ids_BR, steps_BR, blocks = None, None, None, None, None
        lengths_B = self._tensor([s.cached for s in active])
        if min(len(d) for d in below) < R - 1 or not chains:
            valid_rows_B = self._tensor([1 + len(d) for d in below])
        if not chains or masks:  # chains need no parents
            parents = [[-1, *[p + 1 for p in d.parents], *[-2] * (R - 1 - len(d))] for d in below]
            if masks:
                blocks, steps = lay_masks(parents, ids, masks, carriers)
                steps_BR, R, valid_rows_B = self._tensor(steps), len(parents[0]), None
            parents_BR = self._tensor(parents)
            position_ids_BR = lengths_B[:, None] + self._tensor([_depths(p) for p in parents])
        rows = self.target.forward_rows(
            self._tensor(ids),
            lengths_B,
            self.cache,
            position_ids_BR=position_ids_BR,
            parents_BR=parents_BR,
            valid_rows_B=valid_rows_B,
            visible=max(s.cached for s in active) + R,
            full=R == 1 and len({s.cached for s in active}) == 1,
            steps_BR=steps_BR,
            read_as=[s.read_as for s in active],
        )
        rows.blocks = blocks
        self.stats.target_forwards += 1
        self.stats.target_rows += len(active) * R
        return rows, R

    def _masks_below(self, drafts: list[Draft]) -> tuple[int, list[list[int]]]:
        """(K, of each sequence the rows that carry K masks): some drafters read masks in the verifying forward."""
        lays = getattr(self.drafter, "blocks", None)
        return (0, []) if lays is None else lays(self.active, drafts, self.adaptive)

    def _drafts(self) -> list[Draft]:
        self._drafting: dict[str, tuple[float, int]] = {}
        if self.drafter is None or (self.adaptive is None and self.length == 0):
            return [Draft() for _ in self.active]
        if self.adaptive is None:
            return self.drafter.draft(self.active, [min(self.length, self._room(s)) for s in self.active])
        asked = self.adaptive.begin_round(len(self.active))
        lengths = [min(length, self._room(s)) for s, length in zip(self.active, asked, strict=True)]
        if not any(lengths):
            self._proposed = [Draft() for _ in self.active]
            return self._proposed
        self._proposed, spent = timed_draft(self.drafter, self.active, lengths, self.adaptive.worth)
        self._drafting = dict(getattr(self.drafter, "timing", {self.drafter.name: spent}))
        return self.adaptive.prune(self._proposed, spent[0])

    def _room(self, sequence: SequenceState) -> int:
        """How deep drafts may go: not beyond where the text will be read anew."""
        border = self.target.rereads_at
        return sys.maxsize if border is None or sequence.read_as > border else border - len(sequence.tokens)

    def _reread(self) -> None:
        """Texts that have grown beyond where the model's own generate reads them anew are read anew."""
        border = self.target.rereads_at
        for sequence in self.active if border is not None else ():
            if sequence.read_as <= border < len(sequence.tokens):
                sequence.reread_at, sequence.cached = len(sequence.tokens), 0
                for watcher in self.watchers:
                    watcher.start(sequence.slot)
                while sequence.cached < len(sequence.tokens) - 1:
                    self._prefill([sequence])

    def _verdicts(self, active: list[SequenceState], drafts: list[Draft], logits_BRV: Tensor) -> list[Verdict]:
        if self.scores.plain and self.policy == "lossless":
            argmax = logits_BRV.argmax(-1).tolist()
            return [verify_greedy(d, argmax[b][: 1 + len(d)]) for b, d in enumerate(drafts)]
        verdicts = []
        for b, (sequence, draft) in enumerate(zip(active, drafts, strict=True)):
            scores_RV = self.scores(sequence, draft, logits_BRV[b, : 1 + len(draft)])
            verdicts.append(verify(draft, scores_RV, self.scores.do_sample, self.generator, self.policy))
        return verdicts

    def _emit(self, sequence: SequenceState, draft: Draft, verdict: Verdict) -> list[int]:
        """Append the accepted tokens and the target's own, one by one, up to the first that ends the sequence."""
        new = [(draft.tokens[i], draft.sources[i] if draft.sources else "draft") for i in verdict.path]
        new.append((verdict.token, "target"))
        count = self._append(sequence, [token for token, _ in new])
        depths = _depths([-1, *[p + 1 for p in draft.parents]])
        sequence.record.append(
            Verification(len(draft), max(depths), min(count, len(verdict.path)), count, [s for _, s in new[:count]])
        )
        return [t for t, _ in new[:count]]

    def _append(self, sequence: SequenceState, tokens: list[int]) -> int:
        """Append tokens one by one, up to the first that ends the sequence; how many there were."""
        for count, token in enumerate(tokens, start=1):
            sequence.tokens.append(token)
            if self.finished(sequence):
                sequence.done = True
                return count
        return len(tokens)

    def _admit(self, new: list[SequenceState]) -> None:
        """Give waiting sequences the free slots and read all of their prompts but the last token."""
        first = len(self.active)
        for slot, sequence in enumerate(new, start=first):
            sequence.slot, sequence.cached = slot, 0
            for watcher in self.watchers:
                watcher.start(slot)
        self.active.extend(new)
        start = time.perf_counter()
        while new:
            share = max(1, PREFILL_TOKENS // min(PREFILL_ROWS, max(len(s.tokens) for s in new)))
            group, new = new[:share], new[share:]
            while any(s.cached < len(s.tokens) - 1 for s in group):
                self._prefill(group)
        self.stats.seconds["prefill"] += time.perf_counter() - start

    def _prefill(self, group: list[SequenceState]) -> None:
        counts = [min(PREFILL_ROWS, len(s.tokens) - 1 - s.cached) for s in group]
        R = max(counts)
        ids = [[*s.tokens[s.cached : s.cached + c], *[0] * (R - c)] for s, c in zip(group, counts, strict=True)]
        rows = self.target.forward_rows(
            self._tensor(ids),
            self._tensor([s.cached for s in group]),
            self.cache,
            first=group[0].slot,
            valid_rows_B=None if min(counts) == R else self._tensor(counts),
            visible=max(s.cached for s in group) + R,
            read_as=[s.read_as for s in group],
        )
        self.stats.target_forwards += 1
        self.stats.target_rows += len(group) * R
        for sequence, count in zip(group, counts, strict=True):
            sequence.cached += count
        for watcher in self.watchers:
            watcher.observe(group, rows, [list(range(c)) for c in counts])

    def _leave(self, leave: Callable[[SequenceState], None] | None) -> None:
        """Finished sequences leave; the last active one moves into the hole, so that slots stay contiguous."""
        for slot in range(len(self.active) - 1, -1, -1):
            if self.active[slot].done:
                if leave is not None:
                    leave(self.active[slot])
                last = self.active.pop()
                if last.slot != slot:
                    for watcher in self.watchers:
                        watcher.move(last.slot, slot, last.cached)
                    self.cache.move(last.slot, slot, last.cached)
                    last.slot = slot
                    self.active[slot] = last

    def _open(self, slots: int, capacity: int) -> None:
        capacity = -(-capacity // 64) * 64
        kind = (self.target.device, self.target.dtype)
        if self._cache is None or self._cache.slots < slots or self._cache.capacity < capacity or kind != self._kind:
            self._cache = None  # let go before the larger one is made
            self._cache, self._kind = SlotCache(slots, capacity), kind
        self.cache = self._cache
        self._calls_before = getattr(self.drafter, "calls", 0)
        for watcher in self.watchers:
            watcher.open(self.cache.slots, self.cache.capacity)
            if hasattr(watcher, "lend"):
                watcher.lend(self.cache)

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.target.device)


def _depths(parents: list[int]) -> list[int]:
    """Depth of each row below the cache: 0 for the last token's own row; padding rows stand at 0."""
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return depths


class HiddenRecorder:
    """A watcher that keeps the states of every cached position, so that training needs no second forward."""

    name, calls = "recorder", 0

    def __init__(self, source: Callable[[TargetRows], Tensor]) -> None:
        self.source = source
        self._parts: list[list[Tensor]] = []

    def open(self, slots: int, capacity: int) -> None:
        """See Drafter."""
        self._parts = [[] for _ in range(slots)]

    def start(self, slot: int) -> None:
        """See Drafter."""
        self._parts[slot] = []

    def observe(self, sequences: Sequence[SequenceState], rows: TargetRows, kept: list[list[int]]) -> None:
        """See Drafter."""
        states_BRD = self.source(rows)
        for b, (sequence, path) in enumerate(zip(sequences, kept, strict=True)):
            self._parts[sequence.slot].append(states_BRD[b, path].cpu())

    def move(self, source: int, target: int, length: int) -> None:
        """See Drafter."""
        self._parts[target] = self._parts[source]

    def draft(self, sequences: Sequence[SequenceState], lengths: list[int], worth: object = None) -> list[Draft]:
        """Proposes nothing."""
        return [Draft() for _ in sequences]

    def states(self, sequence: SequenceState) -> Tensor:
        """[cached, D] of a sequence that is about to leave."""
        return torch.cat(self._parts[sequence.slot])
