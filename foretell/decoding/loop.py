"""The decode round: draft, one target forward over the token tree, verify, keep the accepted path.

Sequences are ragged: each accepts its own length, finished ones leave the batch and waiting ones take their place
(continuous batching). Active sequences stand in slots 0, 1, ... of every cache, so that steps read views.
"""

# B active sequences, R rows a sequence (its last token, then its drafts), D hidden width, V vocabulary.

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foretell.decoding.adaptive import AdaptiveLength
from foretell.decoding.compose import timed_draft
from foretell.decoding.policies import LOSSY
from foretell.decoding.prefixes import SHARE_OF_WEIGHTS, Prefixes, together
from foretell.decoding.scores import RowScores
from foretell.decoding.stats import GenerationStats
from foretell.decoding.verify import verify, verify_greedy
from foretell.models.slot_cache import STEP_ROWS, SlotCache
from foretell.models.target import Target, TargetRows
from foretell.ops.tree import lay_masks
from foretell.types import Draft, Drafter, SequenceState, Verdict, Verification, Watcher

PREFILL_ROWS = STEP_ROWS  # rows a sequence in one prefill forward: longer prompts are read in exact chunks
PREFILL_TOKENS = 4096  # rows of all sequences in one prefill forward
PIECE_ROWS = 256  # rows that are read between two rounds, for each sequence that is read to one that waits for its next
PADDING = 32  # rows that cost a CPU about as much as one more forward


@dataclass
class Rules:
    """What a run was asked for; nothing of it changes while it goes on.

    finished: asked after every single token. max_tokens: longest that a sequence gets, prompt included.
    num_draft_tokens: of a verification, or who decides. reference: whose output is the target's here.
    slots: how many are decoded at once. emit: told of each round's new tokens. leave: told of each sequence as it ends
    (its slot is still whole then). stop_admitting: once true, sequences still waiting are left as they are.
    beside: others may join at any time, and prompts are read between rounds: a piece, while this says that somebody
    waits for the next one. look: given the logits of each round's rows, and which of them the new tokens are from.
    share: what texts begin with alike is read once, where the model lets that be.
    """

    scores: RowScores
    finished: Callable[[SequenceState], bool]
    max_tokens: int
    num_draft_tokens: int | AdaptiveLength = 0
    policy: str = "lossless"
    confidence_threshold: float | None = None
    reference: str = "the target"
    slots: int = 64
    generator: torch.Generator | None = None
    emit: Callable[[SequenceState, list[int]], None] | None = None
    leave: Callable[[SequenceState], None] | None = None
    stop_admitting: Callable[[], bool] | None = None
    beside: Callable[[], bool] | None = None
    look: Callable[[SequenceState, Tensor, list[int]], None] | None = None
    share: bool = False


class Decoder:
    """Decodes sequences with a target and, if given, a drafter, in a cache that runs use one after the other."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        cache: SlotCache | None = None,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        self.target, self.drafter = target, drafter
        self.cache = SlotCache() if cache is None else cache
        self.watchers: list[Watcher] = [*([] if drafter is None else [drafter]), *watchers]

    def run(
        self,
        sequences: Sequence[SequenceState],
        scores: RowScores,
        finished: Callable[[SequenceState], bool],
        **rules: Any,
    ) -> GenerationStats:
        """Extend each sequence until finished(sequence) is true; rules: the rest of Rules."""
        return self.start(sequences, Rules(scores, finished, **rules)).go()

    def start(self, sequences: Sequence[SequenceState], rules: Rules) -> Run:
        """A run that goes on step by step."""
        return Run(self, sequences, rules)


class Run:
    """One run of a Decoder: all that changes while it goes on. Nothing of it is left behind when it ends.

    Slots 0, 1, ... are those of the active, then of those whose prompts are being read.
    """

    def __init__(self, decoder: Decoder, sequences: Sequence[SequenceState], rules: Rules) -> None:
        self.rules = rules
        self.target, self.drafter, self.cache = decoder.target, decoder.drafter, decoder.cache
        self.watchers = list(decoder.watchers)
        length = rules.num_draft_tokens
        self.adaptive = length if isinstance(length, AdaptiveLength) else None
        self.length = length if isinstance(length, int) else 0
        self.slots = rules.slots if rules.beside else min(rules.slots, max(len(sequences), 1))
        # longest prompts first: they share prefill forwards with others of their length
        self.waiting = sorted(sequences, key=lambda s: len(s.tokens))
        self.reading: list[SequenceState] = []
        self.active: list[SequenceState] = []
        self.stats = GenerationStats.of(rules.policy, rules.policy not in LOSSY, sequences)
        self.stats.confidence_threshold, self.stats.reference = rules.confidence_threshold, rules.reference
        self.stats.seconds = {"prefill": 0.0, "draft": 0.0, "verify": 0.0}

    @torch.no_grad()
    def go(self) -> GenerationStats:
        """The whole run: rounds, until every sequence has ended."""
        self.begin()
        while self.step():
            pass
        if self.drafter is not None:
            self.stats.draft_forwards = self.drafter.calls - self._calls
        return self.stats

    def begin(self) -> None:
        """Before the first step."""
        rules = self.rules
        self.target.refresh(rules.max_tokens)
        self.cache.open(self.target.windows)
        longest = self.adaptive.longest if self.adaptive is not None else self.length
        # a column that depends on more than the tokens up to it is nobody else's
        shares = rules.share and not self.target.windows and not self.target.turns_by_length
        spare = int(SHARE_OF_WEIGHTS * sum(p.nbytes for p in self.target.model.parameters()))
        self.prefixes = Prefixes(self.cache, self.watchers, shares * (self.slots + 1), spare)
        for watcher in self.watchers:
            # drafts may be accepted beyond a text's end
            watcher.open(max(self.slots, self.prefixes.slots), rules.max_tokens + longest)
        if self.drafter is not None:
            self.drafter.borrow(self.cache)
            self.drafter.generator, self._calls = rules.generator, self.drafter.calls
            self.drafter.scores = rules.scores if rules.policy not in LOSSY else None

    def admit(self, sequence: SequenceState) -> None:
        """It joins as soon as a slot is free; whoever came first comes first."""
        self.waiting.insert(0, sequence)

    def cancel(self, sequence: SequenceState) -> None:
        """It leaves before the next round."""
        sequence.done = True

    @property
    def is_idle(self) -> bool:
        """Whether nobody is left."""
        return not (self.active or self.reading or self.waiting)

    @torch.no_grad()
    def step(self) -> bool:
        """One round, before it what those that join need; whether anybody is left."""
        self._leave()
        self._join()
        if self.active:
            self._reread()
            for sequence, tokens in self._round():
                if self.rules.emit is not None and tokens:
                    self.rules.emit(sequence, tokens)
            self._leave()
        return not self.is_idle

    def _round(self) -> list[tuple[SequenceState, list[int]]]:
        """Draft, lay out the token tree, forward, verify, keep, emit."""
        active = self.active
        start = time.perf_counter()
        proposed, drafts, drafting = self._drafts()
        drafted = time.perf_counter()
        # 1. one target forward
        last = [s.tokens[-1] for s in active]
        rows, R = self._read(last, drafts, *self._carriers(drafts))
        # 2. verify
        logits_BRV = self.target.logits(rows.post_norm_BRD[:, : 1 + max(len(d) for d in drafts)], view=True)
        if self._overflowed(rows):
            drafts = [Draft() for _ in active]
            rows, R = self._read_alone(last, drafts)
            logits_BRV = self.target.logits(rows.post_norm_BRD, view=True)
        verdicts = self._verdicts(active, drafts, logits_BRV)
        self.stats.verifications += 1
        # 3. keep the last token's row and the accepted path; what was refused will be written over
        kept = [[0, *[i + 1 for i in verdict.path]] for verdict in verdicts]
        self.cache.keep([s.slot for s in active], [s.cached for s in active], kept)
        emitted = []
        for sequence, draft, verdict, path in zip(active, drafts, verdicts, kept, strict=True):
            sequence.cached += len(path)
            emitted.append((sequence, self._emit(sequence, draft, verdict)))
            if self.rules.look is not None:
                self.rules.look(sequence, logits_BRV[len(emitted) - 1], path)
        for watcher in self.watchers:
            watcher.observe(active, rows, kept)
        self.stats.seconds["draft"] += drafted - start
        self.stats.seconds["verify"] += time.perf_counter() - drafted
        if self.adaptive is not None:
            told = [[*(d.tokens[i] for i in v.path), v.token] for d, v in zip(drafts, verdicts, strict=True)]
            spent = time.perf_counter() - start
            for draft, verdict in zip(drafts, verdicts, strict=True):
                draft.shares = verdict.shares
            # of chosen drafts also what was left out may have been right
            seen = [p if d.probs is None else d for p, d in zip(proposed, drafts, strict=True)]
            self.adaptive.learn(seen, told, drafting, len(active) * R, spent)
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
        lengths = {s.cached for s in active}
        visible, start = max(lengths) + R, lengths.pop() if len(lengths) == 1 and valid_rows_B is None else None
        self._reserve(len(active), visible)
        rows = self._forward(
            active,
            ids,
            lengths_B,
            position_ids_BR=position_ids_BR,
            parents_BR=parents_BR,
            valid_rows_B=valid_rows_B,
            visible=visible,
            full=R == 1 and start is not None,
            start=start,
            steps_BR=steps_BR,
        )
        rows.blocks = blocks
        return rows, R

    def _forward(self, group: list[SequenceState], ids: list[list[int]], lengths_B: Tensor, **how: Any) -> TargetRows:
        self.stats.target_forwards += 1
        self.stats.target_rows += sum(map(len, ids))
        read_as = [s.read_as for s in group]
        return self.target.forward_rows(self._tensor(ids), lengths_B, self.cache, read_as=read_as, **how)

    def _overflowed(self, rows: TargetRows) -> list[SequenceState]:
        """Sequences with states that are no numbers, but for those that are known to be broken."""
        # one number that is none makes the sum none, and a sum costs a tenth of asking each
        fine = rows.post_norm_BRD.sum((1, 2), dtype=torch.float32).isfinite().tolist()
        return [s for s, is_fine in zip(self.active, fine, strict=True) if not is_fine and not s.broken]

    def _read_alone(self, first: list[int], below: list[Draft]) -> tuple[TargetRows, int]:
        """_read of tokens that will stay, after a forward that gave no numbers: what was drafted, or a mask, may have
        spoilt its whole text, since no mask hides a NaN. What still overflows does so in the target's own text.
        """
        for sequence in self.active:
            self.cache.clear(sequence.slot, sequence.cached)
        rows, R = self._read(first, below, 0, [])
        for sequence in self._overflowed(rows):
            sequence.broken = True
        return rows, R

    def _carriers(self, drafts: list[Draft]) -> tuple[int, list[list[int]]]:
        """(K, of each sequence the rows that carry K masks): some drafters read masks in the verifying forward."""
        if self.drafter is None:
            return 0, []
        masks, carriers = self.drafter.carriers(self.active, drafts, self.adaptive)
        return masks, [[] if s.broken else rows for s, rows in zip(self.active, carriers, strict=False)]

    def _drafts(self) -> tuple[list[Draft], list[Draft], dict[str, tuple[float, int]]]:
        """(drafts as proposed, those of them to verify, each drafter's seconds and steps)."""
        none = [Draft() for _ in self.active]
        if self.drafter is None or (self.adaptive is None and self.length == 0):
            return none, none, {}
        asked = [self.length] * len(none) if self.adaptive is None else self.adaptive.begin_round(*self._progress())
        lengths = [min(length, self._room(s)) for s, length in zip(self.active, asked, strict=True)]
        if self.adaptive is None:
            drafts = self.drafter.draft(self.active, lengths)
            return drafts, drafts, {}
        if not any(lengths):
            return none, none, {}
        proposed, spent = timed_draft(self.drafter, self.active, lengths, self.adaptive.worth)
        return proposed, self.adaptive.prune(proposed), self.drafter.timing(spent)

    def _progress(self) -> tuple[list[int], list[float] | None]:
        """Of each sequence, the tokens that may still come, and those that came a round; None where others wait."""
        left = [min(self.rules.max_tokens, s.most_tokens) - len(s.padding) - len(s.tokens) for s in self.active]
        if self.waiting or self.rules.beside:
            return left, None
        return left, [(len(s.new_tokens) + 4) / (len(s.record) + 2) for s in self.active]

    def _room(self, sequence: SequenceState) -> int:
        """How deep drafts may go: not beyond where the text will be read anew, and nowhere below a broken one."""
        if sequence.broken:
            return 0
        border, most = self.target.rereads_at, sequence.most_drafts
        return most if border is None or sequence.read_as > border else min(border - len(sequence.tokens), most)

    def _reread(self) -> None:
        """Texts that have grown beyond where the model's own generate reads them anew are read anew."""
        border = self.target.rereads_at
        for sequence in self.active if border is not None else ():
            if sequence.read_as <= border < len(sequence.tokens):
                sequence.reread_at, sequence.cached = len(sequence.tokens), 0
                for watcher in self.watchers:
                    watcher.start(sequence.slot)
                while _unread(sequence):
                    self._prefill([sequence], [min(PREFILL_ROWS, _unread(sequence))])

    def _verdicts(self, active: list[SequenceState], drafts: list[Draft], logits_BRV: Tensor) -> list[Verdict]:
        policy, found = self.rules.policy, {}
        for scores, rows in self.rules.scores.parts(active):
            few, of = [active[b] for b in rows], [drafts[b] for b in rows]
            own_BRV = logits_BRV if len(rows) == len(active) else logits_BRV[rows]
            if scores.plain and policy == "lossless":
                argmax = own_BRV.argmax(-1).tolist()
                verdicts = [verify_greedy(d, row[: 1 + len(d)]) for d, row in zip(of, argmax, strict=True)]
            else:
                uniform_BR = scores.uniform(few, of, own_BRV)
                verdicts = verify(of, scores.rows(few, of, own_BRV), uniform_BR, policy)
            found.update(zip(rows, verdicts, strict=True))
        return [found[b] for b in range(len(active))]

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
            if self.rules.finished(sequence):
                sequence.done = True
                return count
        return len(tokens)

    def _join(self) -> None:
        """Waiting sequences take the free slots, and what is to be read of their prompts is read: all but the last
        token, or so much of it as others may be held up for.
        """
        rules, start = self.rules, time.perf_counter()
        if rules.stop_admitting is not None and rules.stop_admitting():
            self.waiting = []
        free = self.slots - len(self.active) - len(self.reading)
        if self.waiting and free >= min(len(self.waiting), max(1, self.slots // 8)):
            self._admit([self.waiting.pop() for _ in range(min(free, len(self.waiting)))])
        budget = left = self._budget()
        while self.reading:
            saved = [self.prefixes.follow(sequence) for sequence in self.reading]
            unread = (i for i, s in enumerate(self.reading) if _unread(s))
            ready = next(unread, len(self.reading))
            self.active, self.reading = self.active + self.reading[:ready], self.reading[ready:]
            if not self.reading or left <= min(PADDING, budget - 1):
                break
            left -= self._read_on(saved[ready:], int(min(left, PREFILL_TOKENS)))
        self.stats.seconds["prefill"] += time.perf_counter() - start

    def _budget(self) -> float:
        """Rows of prompts before the next round. Who is read waits as much as who runs, so a piece is larger the more
        are read to each that runs; a round of few costs about as much as one of many.
        """
        if self.rules.beside is None:
            return math.inf
        if not self.rules.beside():
            return PREFILL_TOKENS
        return min(PIECE_ROWS * max(len(self.reading) / max(len(self.active), 1), 1.0), PREFILL_TOKENS)

    def _admit(self, new: list[SequenceState]) -> None:
        """Give sequences the next slots; where others join, the shortest prompts are read first."""
        new = sorted(new, key=lambda s: len(s.tokens)) if self.rules.beside else new
        for sequence in new:
            sequence.slot, sequence.cached = len(self.active) + len(self.reading), 0
            self.prefixes.begin(sequence, self.active + self.reading)
            self.reading.append(sequence)
            self._hold()
        everyone = self.active + self.reading
        self._reserve(len(everyone), max(len(s.tokens) for s in everyone))

    def _hold(self) -> None:
        """Steps of the active alone must leave the slots of the others as they are."""
        count = max(len(self.active) + len(self.reading), self.prefixes.top)
        self.cache.hold(count)
        for watcher in self.watchers:
            watcher.hold(count)

    def _reserve(self, slots: int, columns: int) -> None:
        self.prefixes.trim(columns)
        self._hold()
        self.cache.reserve(slots, columns)

    def _read_on(self, saved: list[int], most: int) -> int:
        """One forward over prompts, of so many rows at most: of the first ones, as many as are about as long. Returns
        its rows. saved: rows that each saves if it waits.
        """
        counts = [min(PREFILL_ROWS, most, _unread(sequence)) for sequence in self.reading]
        spare = PADDING if self.target.device.type == "cpu" else PREFILL_TOKENS
        counts = counts[: together(counts, saved, most, spare, PADDING)]
        self._prefill(self.reading[: len(counts)], counts)
        return len(counts) * max(counts)

    def _prefill(self, group: list[SequenceState], counts: list[int]) -> None:
        R = max(counts)
        ids = [[*s.tokens[s.cached : s.cached + c], *[0] * (R - c)] for s, c in zip(group, counts, strict=True)]
        rows = self._forward(
            group,
            ids,
            self._tensor([s.cached for s in group]),
            first=group[0].slot,
            valid_rows_B=None if min(counts) == R else self._tensor(counts),
            visible=max(s.cached for s in group) + R,
        )
        for sequence, count in zip(group, counts, strict=True):
            sequence.cached += count
        for watcher in self.watchers:
            watcher.observe(group, rows, [list(range(c)) for c in counts])

    def _leave(self) -> None:
        """Finished sequences leave; the last one moves into the hole, so that slots stay contiguous."""
        before = len(self.active), len(self.reading)
        self._without_done(self.active)
        self._without_done(self.reading)
        for sequence in [s for s in self.waiting if s.done]:
            self.waiting.remove(sequence)
            self._tell(sequence)
        if (len(self.active), len(self.reading)) == before:
            return
        gap = self.reading[0].slot - len(self.active) if self.reading else 0
        stay = max(len(self.reading) - gap, 0)
        for slot, sequence in enumerate(self.reading[stay:], start=len(self.active)):
            self._move(sequence, slot)
        self.reading = self.reading[stay:] + self.reading[:stay]
        self._hold()

    def _without_done(self, group: list[SequenceState]) -> None:
        for at in range(len(group) - 1, -1, -1):
            if not group[at].done:
                continue
            gone, last = group[at], group[-1]
            self._tell(gone)
            slot, behind = gone.slot, 1 + max(s.slot for s in self.active + self.reading)
            wanted = group is self.active and (self.waiting or self.rules.beside)
            kept = wanted and self.prefixes.keep(gone, None if behind == slot + 1 else behind)
            group[at] = last
            group.pop()
            if last is not gone:
                self._move(last, slot)
            elif not kept:
                self._wipe(gone, slot)

    def _tell(self, sequence: SequenceState) -> None:
        self.prefixes.forget(sequence)
        if self.rules.leave is not None:
            self.rules.leave(sequence)

    def _move(self, sequence: SequenceState, slot: int) -> None:
        before, sequence.slot = sequence.slot, slot
        for watcher in self.watchers:
            watcher.move(before, slot, sequence.cached)
        self.cache.move(before, slot, sequence.cached)
        self._wipe(sequence, before)

    def _wipe(self, sequence: SequenceState, slot: int) -> None:
        """Whoever comes to this slot must not find numbers that are none; at a prompt nobody has looked yet."""
        if sequence.broken or _unread(sequence):
            self.cache.clear(slot)

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.target.device)


def _unread(sequence: SequenceState) -> int:
    """Tokens of a prompt that are still to be read: all but the last one."""
    return len(sequence.tokens) - 1 - sequence.cached


def _depths(parents: list[int]) -> list[int]:
    """Depth of each row below the cache: 0 for the last token's own row; padding rows stand at 0."""
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return depths
