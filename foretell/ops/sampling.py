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
from torch.nn.functional import pad


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
BLOCK = 256  # tokens: a draw finds its block first
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
    probs_NR, token_NR = probs_NV.topk(min(RUNNERS, probs_NV.shape[1]))
    first_N, at_N = _arrivals(probs_NR, number_N[:, None], token_NR).min(-1)
    beyond_N = torch.full_like(at_N, probs_NV.shape[1])
    others_NV = probs_NV.scatter(1, token_NR, 0.0)
    other_N, rest_N = _take(others_NV, _uniform(number_N, beyond_N + 1))
    late_N = first_N <= _arrivals(rest_N, number_N, beyond_N)  # of no others: they never arrive
    token_N = torch.where(late_N, token_NR.gather(1, at_N[:, None])[:, 0], other_N)
    return token_N.masked_fill(first_N.isnan(), -1)


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
    token_N, sum_N = _take(probs_NV, uniform_N)
    return token_N.masked_fill(sum_N.isnan(), -1)


def _take(probs_NV: Tensor, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
    """The token and what the row sums to (fp64): first its block of tokens, then the one in it. Running sums of all V
    in fp64 take a CPU ten times as long; and nothing waits for the device.
    """
    blocks_NBW = pad(probs_NV, (0, -probs_NV.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    below_NB = blocks_NBW.sum(-1).double().cumsum(-1)
    place_N, block_N = _share(below_NB, uniform_N.double() * below_NB[:, -1])
    within_NW = blocks_NBW.gather(1, block_N[:, None, None].expand(-1, 1, BLOCK))[:, 0].double().cumsum(-1)
    token_N = BLOCK * block_N + _share(within_NW, place_N)[1]
    return token_N.clamp(max=probs_NV.shape[1] - 1), below_NB[:, -1]


def _share(below_NX: Tensor, place_N: Tensor) -> tuple[Tensor, Tensor]:
    """Which of X shares that end at below_NX the place falls into, and how far: never into an empty one, whatever was
    rounded.
    """
    last_N = below_NX[:, -1]
    place_N = torch.minimum(place_N, torch.nextafter(last_N, torch.zeros_like(last_N)))
    x_N1 = torch.searchsorted(below_NX, place_N[:, None], right=True).clamp(max=below_NX.shape[1] - 1)
    start_NX = pad(below_NX, (1, 0))
    return place_N - start_NX.gather(1, x_N1)[:, 0], x_N1[:, 0]


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
