"""Scores to probabilities, and drawing from them.

The target draws by a race: token v of a row arrives at E_v / p_v, where the exponential E_v follows from the row's own
random number, and the first is the draw (Gumbel-max in other words). Whoever knows that number can run the same race
with a distribution of their own, and meets the target's draw in at least (1 - d) / (1 + d) of all cases, d the
distance of the two: far more often than with the likeliest token. Daliri, Musco and Suresh (arXiv 2408.07978).
"""

# N rows, V vocabulary, M tokens that a drafter speaks of, S guesses.

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


RUNNERS = 64  # likeliest tokens of a row: the others run as one
NOTHING = 1e-12  # what rounding may leave of a sum that is 0
_STEP, _MIX, _MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # of splitmix64, as signed numbers


def _right(x: Tensor, bits: int) -> Tensor:
    """x >> bits of 64-bit numbers without a sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _uniform(number: Tensor, token: Tensor) -> Tensor:
    """fp64 in (0, 1) of a row's number in [0, 1) and a token, as if drawn independently: a splitmix64 generator of each
    row, asked for its token-th number. The same on every device.
    """
    x = (number.double() * 2**53).long() + (token + 1) * _STEP
    x = (x ^ _right(x, 30)) * _MIX
    x = (x ^ _right(x, 27)) * _MIX2
    return (_right(x ^ _right(x, 31), 11).double() + 0.5) * 2.0**-53


def _arrivals(probs: Tensor, number: Tensor, token: Tensor) -> Tensor:
    return -_uniform(number, token).log() / probs.double()


def race(probs_NV: Tensor, number_N: Tensor) -> Tensor:
    """Long [N]: a token of each row, drawn by its number in [0, 1). -1 where probabilities are no numbers.

    Which of the others it is, should they be first together, another number of the row decides.
    """
    V = probs_NV.shape[1]
    probs_NR, token_NR = probs_NV.topk(min(RUNNERS, V))
    first_N, at_N = _arrivals(probs_NR, number_N[:, None], token_NR).min(-1)
    token_N = token_NR.gather(1, at_N[:, None])[:, 0]
    rest_N = probs_NV.sum(-1, dtype=torch.float64) - probs_NR.sum(-1, dtype=torch.float64)
    beyond_N = torch.full_like(token_N, V)
    late_N = _arrivals(torch.where(rest_N > NOTHING, rest_N, 0.0), number_N, beyond_N)
    (few_F,) = (~(first_N < late_N)).nonzero(as_tuple=True)
    if len(few_F):
        others_FV = probs_NV[few_F].scatter(1, token_NR[few_F], 0.0)
        token_N[few_F] = take(others_FV, _uniform(number_N, beyond_N + 1)[few_F])
        token_N[few_F] = token_N[few_F].masked_fill(first_N[few_F].isnan(), -1)
    return token_N


def first_of_race(probs_NM: Tensor, ids_M: Tensor | None, number_N: Tensor, guesses: int) -> tuple[Tensor, Tensor]:
    """[N, S] tokens that are first in the race of these rows (of tokens ids_M, all with None), and of each its share of
    all that run: how sure it is.
    """
    probs_NR, at_NR = probs_NM.topk(min(RUNNERS, probs_NM.shape[1]))
    token_NR = at_NR if ids_M is None else ids_M[at_NR]
    speed_NR = 1 / _arrivals(probs_NR, number_N[:, None], token_NR)
    speed_NS, best_NS = speed_NR.topk(min(guesses, speed_NR.shape[1]))
    return token_NR.gather(1, best_NS), (speed_NS / speed_NR.sum(-1, keepdim=True)).nan_to_num()


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
