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


# what rows, and a step of drafting, usually take in forwards of one row
COUNTED, COUNTED_STEP = CostCurve({1: 1.0, 64: 1.0 + 0.05 * 63}), 0.12
FIRST = 0.4  # share of a drafter's first tokens that are accepted, where nothing is known of it


class AdaptiveLength:
    """Decides, round by round, what is drafted and what is verified: all that brings more tokens than would come in the
    same time without it. What it learns outlives a decoding call.

    steps: seconds of a drafter's step, by its name (nothing, for others), where no clock may be asked.
    """

    PRIOR = 4.0  # verifications that a drafter's own confidence counts for
    FORGET = 0.97  # acceptance changes with the text
    DOUBTED = 8.0  # verifications that all those by other weights count for
    LONGEST_WAIT = 64  # rounds between probes where drafts keep failing
    DEEP = 6  # deeper drafts are accepted as often as those of this depth

    def __init__(self, curve: CostCurve, longest: int, steps: dict[str, float] | None = None) -> None:
        self.curve, self.longest, self.steps = curve, longest, steps
        self._table: dict[tuple[str, int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._trust: dict[tuple[str, int], list[float]] = defaultdict(lambda: [1.0, 1.0])  # accepted, and as promised
        self._depth: dict[tuple[str, int], list[float]] = {}
        # by power of two of the batch: a step's seconds, tokens a second as times those of plain rounds, and how much
        # longer than the curve says rounds take (its logarithm), with drafts and without
        self._clocked: dict[tuple[str, int], float] = {}
        self._speed: dict[int, float] = defaultdict(lambda: 1.0)
        self._late: dict[tuple[int, bool], float] = {}
        self._wait: dict[str, int] = {}
        self.begin()

    def begin(self) -> None:
        """A new decoding call. Half of what was waited between probes stays: where drafts never pay, each probe of each
        short text is a loss.
        """
        self._wait = defaultdict(lambda: 4, {name: max(rounds // 2, 1) for name, rounds in self._wait.items()})
        self._idle: dict[str, int] = defaultdict(int)
        self._probing: set[str] = set()
        self._deep: dict[str, int] = {}
        self._batch, self._last, self._shares = 1, [1.0], (0.0, 1.0)

    def doubt(self) -> None:
        """Who drafts has other weights: what was accepted of the old ones' drafts is where learning goes on from."""
        for cell in (*self._table.values(), *self._trust.values(), *self._depth.values()):
            cell[:] = [count * min(1.0, self.DOUBTED / max(cell[1], 1.0)) for count in cell]

    def begin_round(self, left: list[int], pace: list[float] | None = None) -> list[int]:
        """Longest drafts to ask for. left: tokens that may still come, of each sequence. pace: those of a round so far,
        where nobody waits for a slot: then the batch takes as long as the slowest of them.
        """
        self._batch, self._last, self._shares = len(left), [1 / len(left)] * len(left), (1.0, 0.0)
        if pace is not None:
            self._part([n / speed for n, speed in zip(left, pace, strict=True)])
        self._probing.clear()
        self._deep.clear()
        return [min(self.longest, max(n - 1, 0)) for n in left]

    def _part(self, rounds: list[float]) -> None:
        """How likely each sequence ends last, by the rounds that it still needs, and what a token is worth: that one's
        saves a forward, the others' only their rows.
        """
        latest, B = max(rounds), self._batch
        likely = [math.exp((n - latest) / (1 + 0.5 * math.sqrt(max(latest, 0.0)))) for n in rounds]
        alone, together = self.curve(1), self.curve(B)
        row = (together - alone) / max(B - 1, 1)
        self._last, self._shares = [x / sum(likely) for x in likely], (B * row / together, B * (alone - row) / together)

    def _value(self, gains: list[float], most: float = 0.5) -> float:
        """What tokens of the sequences are worth, as many as there are if all have as many. The last one is who gains
        little: of those that may be it, the share `most` that gains least counts.
        """
        each, last = self._shares
        value, mass = each * sum(gains), most
        for gain, chance in sorted(zip(gains, self._last, strict=True)):
            value += last * gain * min(chance, mass) / most
            mass -= min(chance, mass)
        return value

    @property
    def _rate(self) -> float:
        """Tokens that a second brings now."""
        return self._speed[self._batch.bit_length()] * self._batch / self.cost(self._batch)

    def cost(self, rows: float) -> float:
        """Seconds of a forward over so many rows of all sequences together: the curve, and where the clock has seen
        that rounds with drafts take longer against plain ones than it says, so much more.
        """
        size, more = self._batch.bit_length(), 0.0
        if rows > self._batch and (size, True) in self._late:
            late = self._late[size, True]
            more = max(late - self._late.get((size, False), min(late, 0.0)), 0.0)
        return self.curve(rows) * math.exp(more)

    def _step(self, name: str) -> float:
        """Seconds of one step of drafting."""
        if self.steps is not None:
            return self.steps.get(name, 0.0)
        return self._clocked.get((name, self._batch.bit_length()), COUNTED_STEP * self.curve(self._batch))

    def _took(self, name: str, seconds: float, steps: int, late: float) -> float:
        """Seconds that a round's drafting took, by the curve's clock. A step that has read a prompt is no usual one."""
        if self.steps is None and steps:
            old = self._step(name)
            self._clocked[name, self._batch.bit_length()] = 0.7 * old + 0.3 * min(seconds / steps / late, 2 * old)
        return steps * self._step(name)

    def worth(self, name: str, drafts: list[Draft], beside: list[Draft] | None = None) -> list[bool]:
        """See Worth. beside: what cheaper drafters have proposed for the same sequences already."""
        needed = [1.0] * len(drafts) if beside is None else [self._needed(draft) for draft in beside]
        first = not any(map(len, drafts))
        if drafts[0].probs is not None:
            if first:
                self._deep[name] = self._due(name, self._further(name, self._value(needed)))
            return [len(draft) < self._deep[name] for draft in drafts]
        if name in self._probing:
            return [False] * len(drafts)
        ends = [self._nodes(draft)[-1] if len(draft) else (1.0, 0, False) for draft in drafts]
        depth = max(depth for _, depth, _ in ends)
        reached = [n * chance if at == depth else 0.0 for n, (chance, at, _) in zip(needed, ends, strict=True)]
        more = self._further(name, self._value(reached), depth)
        more = self._due(name, more) if first else more
        return [more > 0 and value > 0 for value in reached]

    def _further(self, name: str, value: float, depth: int = 0) -> int:
        """How many more steps bring most, less what their time brings anyway. value: of a token each, times the chance
        that the drafts so far are accepted.
        """
        here, best, best_gain, gain = self.cost(self._batch * (1 + depth)), 0, 0.0, 0.0
        for K in range(1, self.longest + 1 - depth):
            value *= self._holds(name, depth + K)
            gain += value
            seconds = self.cost(self._batch * (1 + depth + K)) - here + K * self._step(name)
            if gain - self._rate * seconds > best_gain:
                best, best_gain = K, gain - self._rate * seconds
        return best

    def _needed(self, beside: Draft) -> float:
        """Chance that none of the others' first tokens is accepted: only then does another opinion help."""
        first = [c for c, parent in zip(self.chances(beside), beside.parents, strict=True) if parent < 0]
        return max(1.0 - sum(first), 0.05)

    def _due(self, name: str, steps: int) -> int:
        """So many steps as pay; now and then one where none does, to learn whether that has changed."""
        self._idle[name] += 1
        if steps or self._idle[name] > self._wait[name]:
            self._wait[name] = 1 if steps else min(2 * self._wait[name], self.LONGEST_WAIT)
            self._idle[name] = 0
            self._probing.update(() if steps else (name,))
            return steps or 1
        return 0

    def _holds(self, name: str, depth: int) -> float:
        """Share of a drafter's first guesses of this depth that were accepted where those before were; a depth not seen
        yet is as the one before it.
        """
        depth = min(depth, self.DEEP)
        if (name, depth) not in self._depth:
            return self._holds(name, depth - 1) if depth > 1 else FIRST
        accepted, tried = self._depth[name, depth]
        return accepted / tried

    def _nodes(self, draft: Draft) -> list[tuple[float, int, bool]]:
        """(probability to be accepted, ancestors included; depth; drawn or below a drawn one) of each token; where it
        was drawn, or is below, without a look at which it is.
        """
        nodes: list[tuple[float, int, bool]] = []
        for i, parent in enumerate(draft.parents):
            reached, depth, blind = (1.0, 0, False) if parent < 0 else nodes[parent]
            depth, blind = depth + 1, blind or draft.drawn(i)
            given = self._holds(draft.sources[i], depth) if blind else self._given(draft, i, depth)
            nodes.append((given * reached, depth, blind))
        return nodes

    def chances(self, draft: Draft) -> list[float]:
        """Probability of each drafted token to be accepted, its ancestors included."""
        return [chance for chance, _, _ in self._nodes(draft)]

    def _given(self, draft: Draft, i: int, depth: int) -> float:
        """Probability of a chosen token to be accepted after its parent."""
        (accepted, tried), (held, promised) = self._cells(draft, i, depth)
        return min((accepted + self.PRIOR * draft.confidence[i] * held / promised) / (tried + self.PRIOR), 0.999)

    def _cells(self, draft: Draft, i: int, depth: int) -> tuple[list[float], list[float]]:
        """What was learned of a chosen token's confidence, and of its source."""
        at = draft.sources[i], min(depth, 4)
        return self._table[*at, min(int(draft.confidence[i] * 8), 7)], self._trust[at]

    def prune(self, drafts: list[Draft]) -> list[Draft]:
        """Keep the likeliest rows, as many as bring more than their time brings anyway; parents always come with
        children. What was drawn is kept: `worth` has decided how much is.
        """
        kept, ranked = [], []
        for draft in drafts:
            nodes = self._nodes(draft)
            fixed = [i for i, (_, _, blind) in enumerate(nodes) if blind]
            if any(draft.parents[i] >= 0 and not nodes[draft.parents[i]][2] for i in fixed):
                fixed = list(range(len(draft)))  # a chosen token that drawn ones stand below
            order = sorted(set(range(len(draft))).difference(fixed), key=lambda i: (-nodes[i][0], i))
            kept.append(fixed)
            ranked.append([(i, nodes[i][0]) for i in order])
        base = 1 + max(map(len, kept))
        best, best_gain, gained = 0, 0.0, [0.0] * len(drafts)
        rate, here = self._rate, self.cost(self._batch * base)
        for m in range(1, max(map(len, ranked)) + 1):
            for b, rows in enumerate(ranked):
                gained[b] += rows[m - 1][1] if len(rows) >= m else 0.0
            gain = self._value(gained) - rate * (self.cost(self._batch * (base + m)) - here)
            if gain > best_gain:
                best, best_gain = m, gain
        return [
            subset(draft, sorted(rows + [i for i, _ in free[:best]]))
            for draft, rows, free in zip(drafts, kept, ranked, strict=True)
        ]

    def paying_blocks(self, name: str, drafts: list[Draft], longest: int) -> tuple[int, list[list[int]]]:
        """(K, of each sequence the rows that carry a block of K masks), so many as pay; (0, none) where none does.

        A block is worth what it lets the next step draft, if the accepted path ends at its row: that chance times
        the drafts' expected tokens, less the time that they and the block's own rows take, at the rate of tokens now.
        """
        batch, base = len(drafts), len(drafts) * (1 + max(map(len, drafts)))
        ends = [sorted(self._ends(draft), key=lambda row: -row[1]) for draft in drafts]
        best, best_gain = (0, 0), 0.0
        gain, reached, chance = 0.0, 0.0, 1.0  # of drafts of that many tokens, should they be there
        for masks in range(1, longest + 1):
            chance *= self._holds(name, masks)
            reached += chance
            seconds = (self.cost(batch * (1 + masks)) - self.cost(batch)) / batch + self._step(name) * masks
            gain = max(gain, reached - self._rate * seconds)
            total = 0.0
            for groups in range(1, max(map(len, ends)) + 1):
                total += gain * sum(rows[groups - 1][1] for rows in ends if len(rows) >= groups)
                spent = self.cost(base + batch * groups * masks) - self.cost(base)
                if total - self._rate * spent > best_gain:
                    best, best_gain = (masks, groups), total - self._rate * spent
        masks, groups = best
        if self._due("masks", masks) > masks:  # one block, to learn whether it would pay
            masks, groups = min(longest, 2), 1
            self._idle[name] = self.LONGEST_WAIT  # its drafts are made
        return masks, [[row for row, _ in rows[:groups]] for rows in ends]

    def _ends(self, draft: Draft) -> list[tuple[int, float]]:
        """(row, chance that the accepted path ends there), row 0 the last token's own."""
        ends = [1.0, *self.chances(draft)]
        for i, chance in enumerate(ends[1:]):
            ends[draft.parents[i] + 1] -= chance
        return [(row, max(chance, 0.0)) for row, chance in enumerate(ends)]

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
        late = 1.0 if seconds is None else self._correct(rows, seconds - sum(spent for spent, _ in names.values()))
        spent = self.cost(rows) + sum(self._took(name, *one, late) for name, one in names.items())
        known = {name: self._holds(name, 1) for name in self._probing}
        for draft, tokens in zip(drafts, emitted, strict=True):
            self._learn(draft, tokens)
        for name, before in known.items():
            if self._holds(name, 1) > before + 0.02:  # a probe that held: look again soon
                self._wait[name] = 1
        value = self._value([float(len(one)) for one in emitted], 1.0)
        size, times = self._batch.bit_length(), value / spent * self.cost(self._batch) / self._batch
        self._speed[size] = max(0.9 * self._speed[size] + 0.1 * times, 1.0)

    def _learn(self, draft: Draft, tokens: list[int]) -> None:
        accepted: dict[int, int] = {-1: 0}
        first: dict[tuple[str, int], tuple[float, float]] = {}  # confidence and fate of the likeliest of siblings
        for i, parent in enumerate(draft.parents):
            depth = accepted.get(parent, len(tokens)) + 1
            if depth > len(tokens):
                continue  # never reached, so nothing was learned
            held: float = draft.tokens[i] == tokens[depth - 1]
            if held:
                accepted[i] = depth
            if draft.drawn(i):
                if i not in draft.shares:
                    continue  # a sibling before it was kept
                held = draft.shares[i]
            else:
                for cell, promised in zip(self._cells(draft, i, depth), (1.0, draft.confidence[i]), strict=True):
                    self._count(cell, held, promised)
            for name in draft.sources[i].split("+"):
                first[name, depth] = max(first.get((name, depth), (0.0, 0.0)), (draft.confidence[i], held))
        for (name, depth), (_, held) in first.items():
            key = name, min(depth, self.DEEP)
            self._count(self._depth.setdefault(key, [self._holds(*key), 1.0]), held)

    def _count(self, cell: list[float], held: float, of: float = 1.0) -> None:
        cell[0] = cell[0] * self.FORGET + held
        cell[1] = cell[1] * self.FORGET + of

    def _correct(self, rows: int, seconds: float) -> float:
        """How many times longer than the curve says a round without its drafting took, remembered for its kind.

        A busy machine makes all rounds slow, so what is new of one kind is believed of the other too, but for a part.
        """
        if not self.curve.measured:
            return 1.0
        size, drafted = self._batch.bit_length(), rows > self._batch
        late = math.log(max(seconds, 1e-9) / self.curve(rows))
        if (size, drafted) not in self._late:
            self._late[size, drafted] = late
        change = 0.2 * min(max(late - self._late[size, drafted], -1.0), 1.0)
        self._late[size, drafted] += change
        if (size, not drafted) in self._late:
            gap = self._late[size, drafted] - self._late[size, not drafted]
            self._late[size, not drafted] += 0.8 * change + 0.005 * gap  # who is not seen is given another chance
        return math.exp(self._late[size, drafted])


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

    def begin_round(self, left: list[int], pace: list[float] | None = None) -> list[int]:
        """See AdaptiveLength."""
        super().begin_round(left, pace)
        return [self.longest] * len(left)

    def worth(self, name: str, drafts: list[Draft], beside: list[Draft] | None = None) -> list[bool]:
        """Whatever it costs."""
        return [True] * len(drafts)

    def prune(self, drafts: list[Draft]) -> list[Draft]:
        """Nothing is left out."""
        return drafts
