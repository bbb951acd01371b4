"""What verification may keep: the names of the policies, which of them are lossy, and the lossy rules themselves."""

# R rows of one sequence, V vocabulary.

from __future__ import annotations

import torch
from torch import Tensor

POLICIES = {
    "lossless": "greedy match, or rejection sampling: the output is the target's own, or follows its distribution",
    "typical": "Medusa's typical acceptance: keeps drafts that the target finds likely enough",
    "static_k": "spans of k tokens a forward, nothing verified",
    "confadapt": "of each span the leading tokens that the module is sure enough of, nothing verified",
}
LOSSY = frozenset({"typical", "static_k", "confadapt"})  # every output made with these says so
SPANS = frozenset({"static_k", "confadapt"})  # these commit without verifying (decoding/spans.py)

# Medusa's defaults (github.com/FasterDecoding/Medusa, medusa_model.py: posterior_threshold, posterior_alpha)
TYPICAL_EPSILON, TYPICAL_DELTA = 0.09, 0.3


def check_policy(policy: str) -> None:
    """Raise ValueError, naming the valid ones, if there is no such policy."""
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}, choose one of {', '.join(POLICIES)}.")


def typical_thresholds(probs_RV: Tensor) -> Tensor:
    """[R]: a draft below a row is kept if the target gives it more than min(epsilon, delta * exp(-H)).

    H is the entropy of the row in nats. Medusa (arXiv 2401.10774), section 2.3.1: the less sure the target is, the less
    likely a token need be.
    """
    entropy_R = torch.special.entr(probs_RV).sum(-1)
    return (TYPICAL_DELTA * torch.exp(-entropy_R)).clamp(max=TYPICAL_EPSILON)
