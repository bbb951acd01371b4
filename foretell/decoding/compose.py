"""Two drafters in one token tree: their chains below the same last token, shared beginnings merged."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from foretell.models.slot_cache import SlotCache
from foretell.types import Draft, Drafter, SequenceState, Worth


class Composed:
    """Drafts of several drafters, merged. A token that two propose in one place is one row and names both."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        if not drafters:
            raise ValueError("got no drafters, wanted at least one.")
        self.drafters = list(drafters)
        self.name = "+".join(d.name for d in drafters)

    @property
    def calls(self) -> int:
        """Forwards of all of them."""
        return sum(getattr(d, "calls", 0) for d in self.drafters)

    @property
    def generator(self) -> torch.Generator | None:
        """Seeds those that sample."""
        found = [getattr(drafter, "generator", None) for drafter in self.drafters]
        return next((generator for generator in found if generator is not None), None)

    @generator.setter
    def generator(self, generator: torch.Generator | None) -> None:
        for drafter in self.drafters:
            if hasattr(drafter, "generator"):
                drafter.generator = generator

    @property
    def blocks(self) -> Any:
        """Of the one that reads masks in the target's forward; None where there is none."""
        return next((drafter.blocks for drafter in self.drafters if hasattr(drafter, "blocks")), None)

    @property
    def extra_rows(self) -> int:
        """Rows that masks may take."""
        return sum(getattr(drafter, "extra_rows", 0) for drafter in self.drafters)

    def lend(self, cache: SlotCache) -> None:
        """The target's cache, for those with passes of their own."""
        for drafter in self.drafters:
            if hasattr(drafter, "lend"):
                drafter.lend(cache)

    def open(self, slots: int, capacity: int) -> None:
        """See Drafter."""
        for drafter in self.drafters:
            drafter.open(slots, capacity)

    def start(self, slot: int) -> None:
        """See Drafter."""
        for drafter in self.drafters:
            drafter.start(slot)

    def observe(self, sequences: Sequence[SequenceState], rows: Any, kept: list[list[int]]) -> None:
        """See Drafter."""
        for drafter in self.drafters:
            drafter.observe(sequences, rows, kept)

    def draft(self, sequences: Sequence[SequenceState], lengths: list[int], worth: Worth | None = None) -> list[Draft]:
        """See Drafter."""
        merged = [Draft() for _ in sequences]
        self.timing: dict[str, tuple[float, int]] = {}
        for drafter in self.drafters:
            asked = worth and (lambda name, b, draft: worth(name, b, draft, merged[b]))
            drafts, self.timing[drafter.name] = timed_draft(drafter, sequences, lengths, asked)
            for into, draft in zip(merged, drafts, strict=True):
                merge(into, draft)
        return merged

    def move(self, source: int, target: int, length: int) -> None:
        """See Drafter."""
        for drafter in self.drafters:
            drafter.move(source, target, length)


def timed_draft(
    drafter: Drafter, sequences: Sequence[SequenceState], lengths: list[int], worth: Worth | None
) -> tuple[list[Draft], tuple[float, int]]:
    """A drafter's drafts, and (seconds, steps) they took: forwards where it counts them, else its longest draft."""
    before, start = getattr(drafter, "calls", 0), time.perf_counter()
    drafts = drafter.draft(sequences, lengths, worth)
    seconds = time.perf_counter() - start
    steps = getattr(drafter, "calls", 0) - before or max(map(len, drafts), default=0)
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
