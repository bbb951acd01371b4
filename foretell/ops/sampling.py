"""Scores to probabilities, and drawing from them. Temperature 0 is a one-hot row, so that one rule verifies both."""

# N rows, V vocabulary.

from __future__ import annotations

import torch
from torch import Tensor


def to_probs(scores_NV: Tensor, do_sample: bool) -> Tensor:
    """fp32 [N, V]: softmax of processed scores; without sampling the one-hot row of their argmax.

    Of equal scores the lowest index wins, as in torch.argmax and so in transformers' greedy search. A score of -inf has
    probability 0 and is never drawn.
    """
    if do_sample:
        return torch.softmax(scores_NV, dim=-1, dtype=torch.float32)
    best_N1 = scores_NV.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(scores_NV, dtype=torch.float32).scatter_(-1, best_N1, 1.0)


def draw(probs_NV: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Long [N]: one token from each row. Rows need not sum to 1; generator is on their device."""
    return torch.multinomial(probs_NV, 1, generator=generator)[:, 0]
