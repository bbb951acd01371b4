"""Acceptance accounting: every number that decoding reports is counted here, once, with its definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from foretell.types import SequenceState, Verification


@dataclass
class GenerationStats:
    """What a generate call did. Lists run over sequences, then over verifications.

    tau counts the target's own token and is cut at EOS; mean_accepted does not count it. accept_at[k-1] is the share
    of verifications with a draft of depth >= k that accepted k drafts; accept_given[k-1] the share of those that had
    accepted k - 1. Where spans are committed unverified, accepted means committed beyond the first token.
    """

    policy: str
    lossless: bool
    records: list[list[Verification]]
    target_forwards: int = 0  # prefill and verification
    target_rows: int = 0  # rows of all of them, padding included
    verifications: int = 0  # target forwards that verified or committed, each for a whole batch
    draft_forwards: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # prefill, draft, verify
    confidence_threshold: float | None = None  # of policy "confadapt"
    reference: str = "the target"  # whose output `lossless` speaks of

    @classmethod
    def of(cls, policy: str, lossless: bool, sequences: Sequence[SequenceState]) -> GenerationStats:
        """Stats of sequences in the caller's order."""
        return cls(policy, lossless, [s.record for s in sorted(sequences, key=lambda s: s.index)])

    @property
    def drafted(self) -> list[list[int]]:
        """Proposed tokens per sequence and verification."""
        return [[v.drafted for v in record] for record in self.records]

    @property
    def accepted(self) -> list[list[int]]:
        """Accepted drafts per sequence and verification."""
        return [[v.accepted for v in record] for record in self.records]

    @property
    def emitted(self) -> list[list[int]]:
        """Emitted tokens per sequence and verification; they sum to the sequence's new tokens."""
        return [[v.emitted for v in record] for record in self.records]

    def _all(self) -> list[Verification]:
        return [v for record in self.records for v in record]

    @property
    def tau(self) -> float:
        """Tokens emitted per verification of a sequence."""
        every = self._all()
        return sum(v.emitted for v in every) / max(len(every), 1)

    @property
    def tau_drafted(self) -> float:
        """The same over verifications with drafts: what "auto" left alone says nothing of the drafter. 0 without."""
        drafted = [v for v in self._all() if v.drafted]
        return sum(v.emitted for v in drafted) / max(len(drafted), 1)

    @property
    def mean_accepted(self) -> float:
        """Accepted drafts per verification: tau - 1, but for a cut at EOS."""
        every = self._all()
        return sum(v.accepted for v in every) / max(len(every), 1)

    @property
    def accept_at(self) -> list[float]:
        """Joint acceptance by depth."""
        every = self._all()
        out = []
        for k in range(1, max((v.depth for v in every), default=0) + 1):
            drafted = [v for v in every if v.depth >= k]
            out.append(sum(v.accepted >= k for v in drafted) / len(drafted))
        return out

    @property
    def accept_given(self) -> list[float]:
        """Conditional acceptance by depth; stops where no draft got that far."""
        every = self._all()
        out = []
        for k in range(1, max((v.depth for v in every), default=0) + 1):
            reached = [v for v in every if v.depth >= k and v.accepted >= k - 1]
            if not reached:
                break
            out.append(sum(v.accepted >= k for v in reached) / len(reached))
        return out

    def summary(self) -> dict[str, object]:
        """Plain numbers for a log or a JSON file."""
        return {
            "policy": self.policy,
            "lossless": self.lossless,
            "reference": self.reference,
            "confidence_threshold": self.confidence_threshold,
            "tau": self.tau,
            "tau_drafted": self.tau_drafted,
            "mean_accepted": self.mean_accepted,
            "accept_at": self.accept_at,
            "accept_given": self.accept_given,
            "tokens": sum(v.emitted for v in self._all()),
            "verifications": len(self._all()),
            "target_forwards": self.target_forwards,
            "target_rows": self.target_rows,
            "draft_forwards": self.draft_forwards,
            "seconds": self.seconds,
        }
