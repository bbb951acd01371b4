"""Scores to probabilities, and drawing from them."""

# N rows, V vocabulary.

from __future__ import annotations

import random

import torch
from torch import Tensor


def to_probs(scores_NV: Tensor) -> Tensor:
    """fp32 [N, V]: softmax of processed scores. A score of -inf has probability 0 and is never drawn."""
    return torch.softmax(scores_NV, dim=-1, dtype=torch.float32)


def over_vocabulary(logits_NM: Tensor, ids_M: Tensor | None, vocab_size: int) -> Tensor:
    """[..., V] of logits [..., M] that speak of these tokens only: -inf for the others. None: they speak of all."""
    if ids_M is None:
        return logits_NM
    outside_NV = logits_NM.new_full((*logits_NM.shape[:-1], vocab_size), float("-inf"))
    return outside_NV.index_copy_(-1, ids_M, logits_NM)


def draw(probs_NV: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Long [N]: one token from each row. Rows need not sum to 1; generator is on their device."""
    return torch.multinomial(probs_NV, 1, generator=generator)[:, 0]


def take(probs_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Long [N]: the token of each row in whose share of [0, 1) the row's number falls. Rows need not sum to 1; a token
    of probability 0 has no share. -1 where the row's numbers are none.
    """
    below_NV = probs_NV.double().cumsum(-1)
    all_N = below_NV[:, -1]
    places_N1 = torch.searchsorted(below_NV, (uniform_N.double() * all_N)[:, None], right=True)
    return places_N1[:, 0].clamp(max=probs_NV.shape[-1] - 1).masked_fill(all_N.isnan(), -1)


class Dice:
    """A number in [0, 1) for each place of each text: it depends on the seed, the text and the place alone, not on what
    is decoded beside it or how many drafts were verified.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        device = "cpu" if generator is None else generator.device
        self.seed = int(torch.randint(2**62, (), generator=generator, device=device))
        self._texts: dict[int, tuple[random.Random, list[float]]] = {}

    def __call__(self, text: int, place: int) -> float:
        source, numbers = self._texts.setdefault(text, (random.Random(f"{self.seed} {text}"), []))
        while len(numbers) <= place:
            numbers.append(source.random())
        return numbers[place]

    def generator(self, device: torch.device) -> torch.Generator:
        """For draws that no text depends on alone: drafts, and the noise of masks."""
        return torch.Generator(device).manual_seed(self.seed)
