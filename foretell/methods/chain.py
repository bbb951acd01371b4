"""Drafting one token after the other: the loop that drafters share whose depth k reads what depth k - 1 drafted."""

# B sequences, K depths, M draft vocabulary.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from foretell.methods.base import MTPModule
from foretell.models.target import Target
from foretell.types import Draft, SequenceState, Worth


class ChainDrafter(ABC):
    """A method gives _step (the logits of one depth) and _limit (how deep a sequence can be drafted now)."""

    name = "mtp"
    longest = 0

    def __init__(self, module: MTPModule, target: Target, sample: bool) -> None:
        self.module, self.target, self.sample = module, target, sample
        self.generator: torch.Generator | None = None
        self.calls = 0  # forwards of one depth, for tests and reports
        self._head = module.draft_head(target)

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
        for k in range(1, max(wanted, default=0) + 1):
            for b, draft in enumerate(drafts):
                if wanted[b] >= k and worth is not None and not worth(self.name, b, draft):
                    wanted[b] = k - 1
            if max(wanted) < k:
                break
            probs_BM = torch.softmax(self._step(sequences, drafts, k, wanted).float(), dim=-1)
            if self.sample:
                chosen_B = torch.multinomial(probs_BM, 1, generator=self.generator)[:, 0]
                confidence_B = probs_BM.gather(1, chosen_B[:, None])[:, 0]
            else:
                confidence_B, chosen_B = probs_BM.max(dim=-1)
            ids = self.module.draft_vocab_ids
            tokens = (chosen_B if ids is None else ids[chosen_B]).tolist()
            for b, (token, confidence) in enumerate(zip(tokens, confidence_B.tolist(), strict=True)):
                if wanted[b] >= k:
                    probs_V = self.module.spread(probs_BM[b], self.target) if self.sample else None
                    drafts[b].add(token, len(drafts[b]) - 1, confidence, self.name, probs_V)
        return drafts
