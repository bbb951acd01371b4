"""Two drafters in one token tree: their chains below the same last token, shared beginnings merged."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from foretell.types import Draft, Drafter, SequenceState, Worth


class Composed(Drafter):
    """Drafts of several drafters, merged. A token that two propose in one place is one row and names both."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        if not drafters:
            raise ValueError("got no drafters, wanted at least one.")
        self.drafters = list(drafters)
        self.name = "+".join(d.name for d in drafters)
        self._timing: dict[str, tuple[float, int]] = {}

    @property
    def calls(self) -> int:  # type: ignore[override]
        """Forwards of all of them."""
        return sum(drafter.calls for drafter in self.drafters)

    @property
    def generator(self) -> torch.Generator | None:  # type: ignore[override]
        """Seeds those that sample."""
        return self.drafters[0].generator

    @generator.setter
    def generator(self, generator: torch.Generator | None) -> None:
        for drafter in self.drafters:
            drafter.generator = generator

    @property
    def scores(self) -> Any:  # type: ignore[override]
        """See Drafter."""
        return self.drafters[0].scores

    @scores.setter
    def scores(self, scores: Any) -> None:
        for drafter in self.drafters:
            drafter.scores = scores

    def borrow(self, cache: Any) -> None:
        """See Drafter."""
        for drafter in self.drafters:
            drafter.borrow(cache)

    def carriers(
        self, sequences: Sequence[SequenceState], drafts: list[Draft], adaptive: Any
    ) -> tuple[int, list[list[int]]]:
        """See Drafter: of the one that reads masks in the target's forward, if there is one."""
        found = (drafter.carriers(sequences, drafts, adaptive) for drafter in self.drafters)
        return next((one for one in found if one[1]), (0, []))

    def timing(self, spent: tuple[float, int]) -> dict[str, tuple[float, int]]:
        """See Drafter."""
        return dict(self._timing)

    def open(self, slots: int, capacity: int) -> None:
        """See Watcher."""
        for drafter in self.drafters:
            drafter.open(slots, capacity)

    def start(self, slot: int) -> None:
        """See Watcher."""
        for drafter in self.drafters:
            drafter.start(slot)

    def shares(self, slot: int, length: int) -> int:
        """See Watcher."""
        return min(drafter.shares(slot, length) for drafter in self.drafters)

    def share(self, source: int, target: int, length: int) -> None:
        """See Watcher."""
        for drafter in self.drafters:
            drafter.share(source, target, length)

    def hold(self, slots: int) -> None:
        """See Watcher."""
        for drafter in self.drafters:
            drafter.hold(slots)

    def observe(self, sequences: Sequence[SequenceState], rows: Any, kept: list[list[int]]) -> None:
        """See Watcher."""
        for drafter in self.drafters:
            drafter.observe(sequences, rows, kept)

    def draft(self, sequences: Sequence[SequenceState], lengths: list[int], worth: Worth | None = None) -> list[Draft]:
        """See Drafter."""
        merged = [Draft() for _ in sequences]
        for drafter in self.drafters:
            asked = worth and (lambda name, own: worth(name, own, merged))
            drafts, self._timing[drafter.name] = timed_draft(drafter, sequences, lengths, asked)
            for into, draft in zip(merged, drafts, strict=True):
                merge(into, draft)
        return merged

    def move(self, source: int, target: int, length: int) -> None:
        """See Watcher."""
        for drafter in self.drafters:
            drafter.move(source, target, length)


def as_drafter(given: Any) -> Drafter:
    """A Drafter as it is; another object that drafts is given the defaults for what it leaves out.

    Raises:
        ValueError: it does not draft.
    """
    if isinstance(given, Drafter):
        return given
    if not callable(getattr(given, "draft", None)):
        raise ValueError(
            f"drafter: got {given!r}, wanted 'mtp', 'lookup', 'mtp+lookup', or objects of a subclass of "
            "foretell.types.Drafter."
        )
    made: Any = object.__new__(type(type(given).__name__, (type(given), Drafter), {}))
    made.__dict__ = given.__dict__  # the same object to its owner
    return made


def timed_draft(
    drafter: Drafter, sequences: Sequence[SequenceState], lengths: list[int], worth: Worth | None
) -> tuple[list[Draft], tuple[float, int]]:
    """A drafter's drafts, and (seconds, steps) they took: forwards where it counts them, else its longest draft."""
    before, start = drafter.calls, time.perf_counter()
    drafts = drafter.draft(sequences, lengths, worth)
    seconds = time.perf_counter() - start
    steps = drafter.calls - before or max(map(len, drafts), default=0)
    return drafts, (seconds, steps)


def merge(into: Draft, draft: Draft) -> None:
    """Add a draft's branches. One-hot and sampled children may stand side by side: each keeps its own probabilities."""
    if draft.probs is not None and into.probs is None:
        into.probs = [None] * len(into)
    at = {-1: -1}
    for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        probs = None if draft.probs is None else draft.probs[i]
        same = [j for j in range(len(into)) if into.parents[j] == at[parent] and into.tokens[j] == token]
        # a token sampled from q cannot be one row with a fixed proposal: the acceptance rule needs to know which it was
        if same and probs is None and (into.probs is None or into.probs[same[0]] is None):
            j = at[i] = same[0]
            into.sources[j] = f"{into.sources[j]}+{draft.sources[i]}"
            into.confidence[j] = max(into.confidence[j], draft.confidence[i])
            continue
        at[i] = into.add(token, at[parent], draft.confidence[i], draft.sources[i], probs)
