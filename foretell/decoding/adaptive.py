"""How many tokens to draft: a measured cost curve against the chance that a draft is accepted.

A step with m drafted rows emits 1 + sum of their acceptance chances and takes c(1 + m) plus the drafting time. Take the
m with the most tokens a second; ask a drafter for one more step only if that step pays; stop asking, but for a probe
now and then, where drafts keep failing. Chances are the drafters' own confidences, corrected by what was accepted.

What is verified never depends on what was drawn. Of drawn drafts the number is decided before the draw, by the overlap
of the two distributions at each depth (sum of min(p, q)) alone, and all of them are verified. Where the lengths can
change the text (drawn drafts, lossy policies), who samples gets them by counts instead of clocks, and from nothing but
this call: then a seed fixes the text.
"""

# B sequences, R rows a sequence.

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from foretell.models.kernels import QUIET, Measured, lost, remembered
from foretell.models.slot_cache import SlotCache
from foretell.models.target import Target
from foretell.types import Draft

CURVE_ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64)


class CostCurve:
    """Seconds of one target forward against its rows, interpolated. It falls where a kernel for more rows is faster.

    measured: a forecast made on one sequence and an idle cache, which the clock may correct; else it is taken as given.
    """

    NOISE = 0.1  # by less than that more rows are not faster than fewer
    SECONDS = 3.0  # after which no further repeat begins

    def __init__(self, seconds: dict[int, float], measured: bool = False) -> None:
        self.measured = measured
        self.rows = sorted(seconds)
        self.seconds = [seconds[rows] for rows in self.rows]

    def __call__(self, rows: float) -> float:
        if rows <= self.rows[0]:
            return self.seconds[0]
        for (r0, s0), (r1, s1) in zip(
            zip(self.rows, self.seconds, strict=True), zip(self.rows[1:], self.seconds[1:], strict=True), strict=False
        ):
            if rows <= r1:
                return s0 + (s1 - s0) * (rows - r0) / (r1 - r0)
        return self.seconds[-1] * rows / self.rows[-1]

    @classmethod
    def measure(cls, target: Target, context: int = 128, repeats: int = 5) -> CostCurve:
        """Of forwards of 1 to 64 rows over a cache of `context` tokens; on a CPU once a machine and kind of model."""

        def right(_key: str, taken: Any) -> bool:
            numbers = isinstance(taken, list) and len(taken) == len(CURVE_ROWS)
            return numbers and all(isinstance(seconds, float) and 0 < seconds < math.inf for seconds in taken)

        def make(keys: list[str]) -> tuple[dict[str, list[float]], float]:
            taken, share = cls._taken(target, context, repeats)
            return dict.fromkeys(keys, taken), share

        key, view = f"{type(target.model).__name__} {target.dtype} {context}", target.view()
        parts = Counter((type(part).__name__, *part.names) if isinstance(part, Measured) else (type(part).__name__,)
                        for part in view.modules())  # fmt: skip
        sizes = sorted(map(str, parts.items())), sum(weight.numel() for weight in view.parameters())
        key += " " + hashlib.sha256(str(sizes).encode()).hexdigest()[:12]
        kept = remembered("curves", [key], right, make) if target.device.type == "cpu" else make([key])[0]
        return cls(dict(zip(CURVE_ROWS, kept[key], strict=True)), measured=True)

    @classmethod
    def _taken(cls, target: Target, context: int, repeats: int) -> tuple[list[float], float]:
        """(lower quartiles of repeats, sizes interleaved; the share of the time that other work took)."""
        cache = SlotCache(1, context + CURVE_ROWS[-1])
        lengths_B = torch.tensor([context], device=target.device)
        taken: dict[int, list[float]] = defaultdict(list)
        end = time.perf_counter() + cls.SECONDS
        for repeat in range(repeats + 1):
            if repeat > 2 and time.perf_counter() > end:
                break
            for rows in CURVE_ROWS:
                ids = torch.zeros(1, rows, dtype=torch.long, device=target.device)
                start = time.perf_counter()
                out = target.forward_rows(ids, lengths_B, cache, visible=context + rows, full=rows == 1)
                target.logits(out.post_norm_BRD, view=True).argmax(-1).tolist()
                if repeat:  # the first round warms up
                    taken[rows].append(time.perf_counter() - start)
        share = lost(list(zip(*taken.values(), strict=True)))
        return cls.smooth([sorted(taken[rows])[len(taken[rows]) // 4] for rows in CURVE_ROWS], share <= QUIET), share

    @classmethod
    def smooth(cls, seconds: list[float], quiet: bool = True) -> list[float]:
        """Never falling within noise: what more rows took, fewer rows could have taken but for other work. A disturbed
        clock says no more than that.
        """
        for i in reversed(range(len(seconds) - 1)):
            if seconds[i + 1] < seconds[i] <= ((1 + cls.NOISE) * seconds[i + 1] if quiet else math.inf):
                seconds[i] = seconds[i + 1]
        return seconds


# what rows, and a step of drafting, usually take in forwards of one row, where no clock may be asked
COUNTED, COUNTED_STEP = CostCurve({1: 1.0, 64: 1.0 + 0.05 * 63}), 0.12


class AdaptiveLength:
    """Decides, round by round, what is drafted and what is verified. What it learns outlives a decoding call: the
    next text starts with the acceptance rates of the last ones, `begin` forgets only what is this text's alone.

    steps: seconds of a drafter's step, by its name (nothing, for others), where no clock may be asked.
    """

    PRIOR = 4.0  # verifications that a drafter's own confidence counts for
    FORGET = 0.97  # acceptance changes with the text
    LONGEST_WAIT = 64  # rounds between probes where drafts keep failing
    PLAIN_ROUNDS = 2  # without drafts, for each size of batch, so that the clock has something to compare; later fewer

    def __init__(self, curve: CostCurve, longest: int, steps: dict[str, float] | None = None) -> None:
        self.curve, self.longest, self.steps = curve, longest, steps
        self._table: dict[tuple[str, int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._depth: dict[tuple[str, int], list[float]] = {}
        self._clocked: dict[str, float] = {}  # seconds of a step
        self._probing: set[str] = set()
        self._starts: dict[str, bool] = {}
        self._deep: dict[tuple[str, float], int] = {}
        # seconds by the clock over seconds by the curve, and how often seen: (power of two of the batch, plain or not)
        self._clock: dict[tuple[int, bool], tuple[float, int]] = defaultdict(lambda: (1.0, 0))
        self._wait: dict[str, int] = defaultdict(lambda: 1)
        self.begin()

    def begin(self) -> None:
        """A new decoding call: nobody sits out, and the rate of tokens is not known yet. Half of what was waited
        between probes stays: where drafts never pay, each probe of each short text is a loss.
        """
        self._wait = defaultdict(lambda: 1, {name: max(rounds // 2, 1) for name, rounds in self._wait.items()})
        self._sit_out: dict[str, int] = defaultdict(int)
        self._rate, self._batch, self._since_probe = 0.0, 1, 0
        self.plain = False  # this round is for the clock: one row a sequence, neither drafts nor masks

    def begin_round(self, batch: int) -> list[int]:
        """Longest drafts to ask for, and a new decision on who sits out."""
        if batch != self._batch:
            self._batch, self._rate = batch, 0.0
        self._rate = max(self._rate, batch / self.cost(batch))
        self._probing.clear()
        self._starts.clear()
        self._deep.clear()
        for name, rounds in self._sit_out.items():
            self._sit_out[name] = max(rounds - 1, 0)
        drafted, plain = (self._clock[batch.bit_length(), kind][1] for kind in (False, True))
        wanted = self.PLAIN_ROUNDS + drafted.bit_length() // 2 + drafted // 64
        self.plain = self.curve.measured and plain < wanted
        return [0 if self.plain else self.longest] * batch

    def cost(self, rows: float) -> float:
        """Seconds of a forward over so many rows of all sequences together: the curve, corrected by what the clock says
        of rounds with drafts and of plain ones.
        """
        size = self._batch.bit_length()
        (drafted, times), (plain, _) = self._clock[size, False], self._clock[size, True]
        known = rows > self._batch and times >= self.PLAIN_ROUNDS
        return self.curve(rows) * (max(drafted, plain) if known else plain)

    def _cheapest_row(self, rows: int) -> float:
        """Seconds of one more row a sequence, averaged over what may follow: past a jump rows are cheap."""
        here = self.cost(rows)
        return min((self.cost(rows + n * self._batch) - here) / n for n in (1, 2, 4))

    def _step(self, name: str) -> float:
        """Seconds of one step of drafting."""
        return self._clocked.get(name, 0.0) if self.steps is None else self.steps.get(name, 0.0)

    def _took(self, name: str, seconds: float, steps: int) -> float:
        """Seconds that a round's drafting took."""
        if self.steps is not None:
            return steps * self._step(name)
        if steps:
            old = self._clocked.get(name, seconds / steps)
            self._clocked[name] = 0.9 * old + 0.1 * seconds / steps
        return seconds

    def worth(self, name: str, b: int, draft: Draft, beside: Draft | None = None) -> bool:
        """See Worth. beside: what cheaper drafters have proposed for the same sequence already."""
        drawn = draft.probs is not None
        if self.steps is None and name not in self._clocked and not drawn:
            return True  # nobody knows yet what it costs: `prune` decides what is verified
        needed = self._needed(beside)
        if not len(draft):  # one answer for the whole batch, but for sequences that are served already
            if name not in self._starts:
                self._starts[name] = self._starts_now(name, drawn)
            pays = self._depth_of(name, needed) > 0 if drawn else self._pays(name, 1, needed)
            return self._starts[name] and (needed == 1.0 or name in self._probing or pays)
        if name in self._probing:
            return False
        if drawn:
            return len(draft) < self._depth_of(name, needed)
        return self._pays(name, len(draft) + 1, self.chances(draft)[-1] * needed)

    def _depth_of(self, name: str, needed: float) -> int:
        """How many drawn drafts make the most tokens a second. needed: chance that none of the others' is accepted."""
        if (name, needed) not in self._deep:
            self._deep[name, needed] = max(
                range(self.longest + 1),
                key=lambda K: (
                    (1 + needed * self._reached(name, K)) / (self.cost(self._batch * (1 + K)) + K * self._step(name))
                ),
            )
        return self._deep[name, needed]

    def _needed(self, beside: Draft | None) -> float:
        """Chance that none of the others' first tokens is accepted: only then does another opinion help."""
        if beside is None or not len(beside):
            return 1.0
        first = [c for c, parent in zip(self.chances(beside), beside.parents, strict=True) if parent < 0]
        return max(1.0 - sum(first), 0.05)

    def _starts_now(self, name: str, drawn: bool) -> bool:
        if self._sit_out[name] > 0:
            return False
        if self._depth_of(name, 1.0) > 0 if drawn else self._pays(name, 1, 1.0):
            self._wait[name] = 1
            return True
        # looks hopeless: look again only now and then
        self._wait[name] = min(2 * self._wait[name], self.LONGEST_WAIT)
        self._sit_out[name] = self._wait[name] + 1
        self._probing.add(name)
        return True

    def _pays(self, name: str, depth: int, reached: float) -> bool:
        """Whether one more step, reached with that chance, makes tokens faster than they come now."""
        seconds = self._cheapest_row(self._batch * depth) + self._step(name)
        return self._batch * reached * self._holds(name, min(depth, 6)) > self._rate * seconds * 0.9

    def _holds(self, name: str, depth: int) -> float:
        """Share of drafts that were accepted where their parents were; a depth not seen yet is as the one before it."""
        if (name, depth) not in self._depth:
            return self._holds(name, depth - 1) if depth > 1 else 0.5
        accepted, tried = self._depth[(name, depth)]
        return accepted / tried

    def chances(self, draft: Draft) -> list[float]:
        """Probability of each drafted token to be accepted, its ancestors included; of tokens that were drawn, and of
        those below them, without a look at which they are.
        """
        out: list[float] = []
        depth: list[int] = []
        blind: list[bool] = []
        for i, parent in enumerate(draft.parents):
            depth.append(1 if parent < 0 else depth[parent] + 1)
            blind.append(draft.drawn(i) or (parent >= 0 and blind[parent]))
            if blind[i]:
                given = self._holds(draft.sources[i], min(depth[i], 6))
            else:
                accepted, tried = self._table[self._key(draft, i, depth[i])]
                given = (accepted + self.PRIOR * draft.confidence[i]) / (tried + self.PRIOR)
            out.append(min(given, 0.999) * (1.0 if parent < 0 else out[parent]))
        return out

    def _key(self, draft: Draft, i: int, depth: int) -> tuple[str, int, int]:
        return (draft.sources[i], min(depth, 4), min(int(draft.confidence[i] * 8), 7))

    def prune(self, drafts: list[Draft], drafting_seconds: float) -> list[Draft]:
        """Keep the likeliest rows, as many as make the most tokens a second; parents always come with children. What
        was drawn is kept: `worth` has decided how much is.
        """
        if any(draft.probs is not None for draft in drafts):
            return drafts
        if self.steps is not None:
            drafting_seconds = max(self.steps.values(), default=0.0) * max(map(len, drafts), default=0)
        batch = len(drafts)
        ranked: list[list[tuple[int, float]]] = []
        for draft in drafts:
            ranked.append(sorted(enumerate(self.chances(draft)), key=lambda node: (-node[1], node[0])))
        best, best_rate = 0, batch / (self.cost(batch) + drafting_seconds)
        gained = 0.0
        for m in range(1, max((len(r) for r in ranked), default=0) + 1):
            gained += sum(r[m - 1][1] for r in ranked if len(r) >= m)
            rate = (batch + gained) / (self.cost(batch * (1 + m)) + drafting_seconds)
            if rate > best_rate:
                best, best_rate = m, rate
        return [subset(draft, sorted(i for i, _ in r[:best])) for draft, r in zip(drafts, ranked, strict=True)]

    def paying_blocks(self, name: str, drafts: list[Draft], longest: int) -> tuple[int, list[list[int]]]:
        """(K, of each sequence the rows that carry a block of K masks), so many as pay; (0, none) where none does.

        A block is worth what it lets the next step draft, if the accepted path ends at its row: that chance times
        the drafts' expected tokens, less the time that they and the block's own rows take, at the rate of tokens now.
        """
        batch, base = len(drafts), len(drafts) * (1 + max(map(len, drafts)))
        ends = [sorted(self._ends(draft), key=lambda row: -row[1]) for draft in drafts]
        best, best_gain = (0, 0), 0.0
        gain = 0.0  # of drafts of that many tokens, should they be there
        for masks in range(1, longest + 1):
            seconds = (self.cost(batch * (1 + masks)) - self.cost(batch)) / batch + self._step(name) * masks
            gain = max(gain, self._reached(name, masks) - self._rate * seconds)
            total = 0.0
            for groups in range(1, max(map(len, ends)) + 1):
                total += gain * sum(rows[groups - 1][1] for rows in ends if len(rows) >= groups)
                spent = self.cost(base + batch * groups * masks) - self.cost(base)
                if total - self._rate * spent > best_gain:
                    best, best_gain = (masks, groups), total - self._rate * spent
        if best[0]:
            self._wait["masks"], self._since_probe = 1, 0
        masks, groups = best if best[0] else self._block_probe(name, longest)
        return masks, [[row for row, _ in rows[:groups]] for rows in ends]

    def _block_probe(self, name: str, longest: int) -> tuple[int, int]:
        """Where blocks do not seem to pay: one now and then, to learn whether that has changed. Its drafts are made."""
        self._since_probe += 1
        if self._since_probe < self._wait["masks"]:
            return 0, 0
        self._since_probe, self._wait["masks"] = 0, min(2 * self._wait["masks"], self.LONGEST_WAIT)
        self._sit_out[name] = 0
        return min(longest, 2), 1

    def _ends(self, draft: Draft) -> list[tuple[int, float]]:
        """(row, chance that the accepted path ends there), row 0 the last token's own."""
        ends = [1.0, *self.chances(draft)]
        for i, chance in enumerate(ends[1:]):
            ends[draft.parents[i] + 1] -= chance
        return [(row, max(chance, 0.0)) for row, chance in enumerate(ends)]

    def _reached(self, name: str, depth: int) -> float:
        """Expected accepted tokens of a chain of that depth."""
        total, chance = 0.0, 1.0
        for k in range(1, depth + 1):
            chance *= self._holds(name, min(k, 6))
            total += chance
        return total

    def learn(
        self,
        drafts: list[Draft],
        emitted: list[list[int]],
        names: dict[str, tuple[float, int]],
        rows: int,
        seconds: float | None = None,
    ) -> None:
        """After a verification. drafts: as proposed, before the pruning (what was thrown away may have been right).
        emitted: the tokens that came of it. names: each drafter's (seconds, steps) of this round. seconds: of the
        whole round, by the clock.
        """
        drafting = sum(self._took(name, *spent) for name, spent in names.items())
        if seconds is not None:
            self._correct(rows, len(emitted), drafting, seconds)
        for draft, tokens in zip(drafts, emitted, strict=True):
            accepted: set[int] = set()
            depth: list[int] = []
            for i, parent in enumerate(draft.parents):
                depth.append(1 if parent < 0 else depth[parent] + 1)
                if (parent >= 0 and parent not in accepted) or depth[i] > len(tokens):
                    continue  # never reached, so nothing was learned
                held: float = draft.tokens[i] == tokens[depth[i] - 1]
                if held:
                    accepted.add(i)
                cells = [self._table[self._key(draft, i, depth[i])]]
                if draft.drawn(i):
                    if i not in draft.shares:
                        continue  # a sibling before it was kept
                    held, cells = draft.shares[i], []
                if held > 0.5:
                    for name in self._probing.intersection(draft.sources[i].split("+")):
                        self._wait[name], self._sit_out[name] = 1, 0  # a probe that held: look again soon
                for name in draft.sources[i].split("+"):
                    key = (name, min(depth[i], 6))
                    cells.append(self._depth.setdefault(key, [2 * self._holds(*key), 2.0]))
                for cell in cells:
                    cell[0] = cell[0] * self.FORGET + held
                    cell[1] = cell[1] * self.FORGET + 1.0
        self._rate = 0.9 * self._rate + 0.1 * sum(map(len, emitted)) / (self.cost(rows) + drafting)

    def _correct(self, rows: int, batch: int, drafting: float, seconds: float) -> None:
        """What the clock says of a round, beside what the curve does."""
        if self.curve.measured:
            expected, kind = self.curve(rows) + drafting, (batch.bit_length(), rows == batch)
            ratio, times = self._clock[kind]
            weight = max(0.2, 1 / (times + 1))
            self._clock[kind] = ((1 - weight) * ratio + weight * seconds / expected, times + 1)


def subset(draft: Draft, keep: Sequence[int]) -> Draft:
    """The draft with those of its tokens only; parents stay with their children."""
    if len(keep) == len(draft):
        return draft
    at = {-1: -1} | {i: j for j, i in enumerate(keep)}
    return Draft(
        tokens=[draft.tokens[i] for i in keep],
        parents=[at[draft.parents[i]] for i in keep],
        probs=None if draft.probs is None else [draft.probs[i] for i in keep],
        confidence=[draft.confidence[i] for i in keep],
        sources=[draft.sources[i] for i in keep],
    )


class FixedLength(AdaptiveLength):
    """Always drafts as many tokens as asked for and verifies all of them; only the masks' layout adapts."""

    def begin_round(self, batch: int) -> list[int]:
        """See AdaptiveLength."""
        super().begin_round(batch)
        self.plain = False
        return [self.longest] * batch

    def worth(self, name: str, b: int, draft: Draft, beside: Draft | None = None) -> bool:
        """Whatever it costs."""
        return True

    def prune(self, drafts: list[Draft], drafting_seconds: float) -> list[Draft]:
        """Nothing is left out."""
        return drafts
