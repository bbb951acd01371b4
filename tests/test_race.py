"""Draws by a race: they follow the probabilities, and a drafter that knows the number meets them."""

# N rows, V vocabulary, K drafts.

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers.generation import logits_process as lp

from foretell.decoding.loop import Run
from foretell.decoding.scores import RowScores
from foretell.mtp import MTPModel
from foretell.ops import sampling
from foretell.ops.sampling import first_of_race, race, take
from foretell.types import Draft, SequenceState
from tests import test_sampling
from tests.test_sampling import LEAST_P, PROMPT, deeper, heads

V, ROWS = 12, 40_000
MASK = 2**64 - 1


def numbers(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_probs(rows: int, seed: int = 1, size: int = V, heat: float = 1.5) -> Tensor:
    return (heat * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def splitmix64(state: int, count: int) -> int:
    """The generator of Vigna's splitmix64.c, asked for its count-th number."""
    z = (state + count * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def by_definition(probs_V: list[float], number: float) -> int:
    """One token after the other, in Python's own numbers."""
    arrives = [
        -math.log(((splitmix64(int(number * 2**53), token + 1) >> 11) + 0.5) / 2**53) / p if p else math.inf
        for token, p in enumerate(probs_V)
    ]
    return min(range(len(arrives)), key=arrives.__getitem__)


def test_it_is_the_race_by_definition():
    probs_NV, number_N = some_probs(400), numbers(400)
    probs_NV[:, 3] = 0.0
    wanted = [by_definition(row, n) for row, n in zip(probs_NV.tolist(), number_N.tolist(), strict=True)]
    assert race(probs_NV, number_N).tolist() == wanted
    assert len(set(wanted)) == V - 1


def p_value(probs_V: Tensor, drawn_N: Tensor) -> float:
    probs_V = probs_V.double() / probs_V.double().sum()
    seen_V = torch.bincount(drawn_N, minlength=len(probs_V))
    assert not int(seen_V[probs_V == 0].sum()), "a token that cannot be"
    real = probs_V > 0
    return float(stats.chisquare(seen_V[real].numpy(), (probs_V[real] * len(drawn_N)).numpy()).pvalue)


@pytest.mark.parametrize("runners", [1, 3, V - 2, 64])
@pytest.mark.parametrize("heat", [0.0, 1.0, 2.5])
def test_draws_follow_the_probabilities(runners, heat, monkeypatch):
    """However many tokens run as one, in blocks of whatever size: all but the first, a few, none."""
    monkeypatch.setattr(sampling, "RUNNERS", runners)
    monkeypatch.setattr(sampling, "BLOCK", 1 + runners)
    probs_V = some_probs(1, heat=heat)[0]
    probs_V[5] = 0.0
    probs_V /= probs_V.sum()
    assert p_value(probs_V, race(probs_V.expand(ROWS, -1), numbers(ROWS))) > LEAST_P


def deaf(number: Tensor, token: Tensor, right: Any = sampling._uniform) -> Tensor:
    return right(number, torch.zeros_like(token))


def halved(number: Tensor, token: Tensor, right: Any = sampling._uniform) -> Tensor:
    """The rest arrives twice as late."""
    return right(number, token) ** torch.where(token == V, 2.0, 1.0)


def forgetful(number: Tensor, token: Tensor, right: Any = sampling._uniform) -> Tensor:
    """Who of the rest it is follows from how early the rest has come."""
    return right(number, token.clamp(max=V))


@pytest.mark.parametrize("wrong", [deaf, halved, forgetful])
def test_a_wrong_race_is_caught(wrong, monkeypatch):
    monkeypatch.setattr(sampling, "RUNNERS", 3)
    monkeypatch.setattr(sampling, "_uniform", wrong)
    probs_V = some_probs(1, heat=1.0)[0]
    assert p_value(probs_V, race(probs_V.expand(ROWS, -1), numbers(ROWS))) < LEAST_P / 1e6


@pytest.mark.parametrize("size", [1, 7, 255, 256, 257, 5000])
def test_shares_by_blocks_are_shares_of_the_whole(size):
    """The token whose share of [0, 1) the number falls into, by one running sum of all; never an empty share."""
    probs_NV, uniform_N = some_probs(300, size=size, heat=3.0), numbers(300)
    probs_NV[numbers(300 * size, seed=2).view(300, size) < 0.5] = 0.0
    probs_NV[:, size // 2] += 1e-9
    uniform_N[:3] = torch.tensor([0.0, 1 - 2**-53, 1.0])
    below_NV = probs_NV.double().cumsum(-1)
    token_N = take(probs_NV, uniform_N)
    wanted_N = torch.searchsorted(below_NV, (uniform_N * below_NV[:, -1])[:, None], right=True)[:, 0]
    assert torch.equal(token_N[3:], wanted_N[3:])
    assert bool((probs_NV.gather(1, token_N[:, None]) > 0).all())
    assert 0 <= int(take(torch.zeros(1, size), uniform_N[:1])) < size
    assert take(torch.full((1, size), torch.nan), uniform_N[:1]).tolist() == [-1]


def test_neighbouring_numbers_and_tokens_are_drawn_independently():
    """Numbers that differ in their last bits, and pairs of tokens: no pattern is left."""
    number_N = 0.25 + torch.arange(ROWS, dtype=torch.float64) * 2.0**-53
    uniform_N2 = sampling._uniform(number_N[:, None], torch.tensor([[7, 8]]))
    assert float(uniform_N2.min()) > 0 and float(uniform_N2.max()) < 1
    cells_N = (uniform_N2 * 8).long() @ torch.tensor([8, 1])
    assert p_value(torch.ones(64), cells_N) > LEAST_P
    assert p_value(torch.ones(64), (uniform_N2[1:, 0] * 8).long() * 8 + (uniform_N2[:-1, 0] * 8).long()) > LEAST_P


def test_rows_that_are_no_numbers_are_told():
    probs_NV = some_probs(3)
    probs_NV[1, 4] = torch.nan
    assert race(probs_NV.softmax(-1), numbers(3)).tolist()[1] == -1


# -- who runs the same race --------------------------------------------------------------------------------------------


def test_who_has_the_same_distribution_meets_every_draw():
    probs_NV, number_N = some_probs(2000), numbers(2000)
    token_NS, share_NS = first_of_race(probs_NV, None, number_N, 1)
    assert torch.equal(token_NS[:, 0], race(probs_NV, number_N))
    assert float(share_NS.min()) > 0 and float(share_NS.max()) < 1


def test_who_has_another_distribution_meets_as_many_as_the_theorem_says():
    """Daliri, Musco and Suresh (arXiv 2408.07978): at least (1 - d) / (1 + d) of them; more than by a guess."""
    p_V, q_V = some_probs(1, seed=1)[0], some_probs(1, seed=3)[0].lerp(some_probs(1, seed=1)[0], 0.5)
    number_N = numbers(ROWS)
    drawn_N = race(p_V.expand(ROWS, -1), number_N)
    token_NS, share_NS = first_of_race(q_V.expand(ROWS, -1), None, number_N, 2)
    met_N, distance = token_NS[:, 0] == drawn_N, float((p_V - q_V).abs().sum() / 2)
    assert float(met_N.double().mean()) > (1 - distance) / (1 + distance) - 0.01
    assert float(met_N.double().mean()) > float(p_V[q_V.argmax()]) + 0.05
    assert float((token_NS == drawn_N[:, None]).any(1).double().mean()) > float(met_N.double().mean()) + 0.05
    sure_N = share_NS[:, 0] > share_NS[:, 0].median()
    assert float(met_N[sure_N].double().mean()) > float(met_N[~sure_N].double().mean()) + 0.2, "it knows how sure it is"
    other_NS, _ = first_of_race(q_V.expand(ROWS, -1), None, number_N.roll(1), 1)
    apart = float((p_V * q_V).sum())
    assert float((other_NS[:, 0] == drawn_N).double().mean()) == pytest.approx(apart, abs=0.01), "a shifted number"


def test_a_drafters_own_vocabulary_runs_under_the_tokens_names():
    probs_NV, number_N = some_probs(500, heat=0.5), numbers(500)
    ids_M = torch.tensor([1, 4, 5, 9])
    token_NS, _ = first_of_race(probs_NV[:, ids_M], ids_M, number_N, 1)
    within_NV = torch.zeros_like(probs_NV).index_copy_(1, ids_M, probs_NV[:, ids_M])
    assert torch.equal(token_NS[:, 0], race(within_NV / within_NV.sum(1, keepdim=True), number_N))


# -- in decoding -------------------------------------------------------------------------------------------------------


def accepted(mtp: MTPModel, **how: Any) -> tuple[list[list[int]], float]:
    """(texts, share of first drafts that were accepted)."""
    ids = torch.tensor([PROMPT]).repeat(200, 1)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "top_k": 0, "num_draft_tokens": 2, **how}
    out = mtp.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generator=torch.Generator().manual_seed(5),
        return_dict_in_generate=True,
        **settings,
    )
    tried = [v.accepted > 0 for record in out.stats.records for v in record[:-1] if v.drafted]
    return out.sequences.tolist(), sum(tried) / max(len(tried), 1)


def judged(self: Run, begin: Any = Run.begin) -> None:
    """As if the drafters did not know the numbers."""
    begin(self)
    if self.drafter is not None:
        self.drafter.scores = None


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_p": 0.9}, {"drafter": "mtp+lookup"}, {"slots": 3}])
@pytest.mark.parametrize("make", [deeper, heads, test_sampling.masked], ids=["sequential", "heads", "masked"])
def test_drafts_meet_the_draws_and_change_none(make, how, monkeypatch):
    texts, share = accepted(make(), **how)
    assert texts == accepted(make(), **how | {"num_draft_tokens": 0})[0]
    monkeypatch.setattr(Run, "begin", judged)
    guessed, by_guess = accepted(make(), **how)
    assert guessed == texts
    assert share > by_guess + 0.02, (share, by_guess)


def test_each_place_has_its_own_number():
    """The number that a draft of depth k is made by is the one that decides what follows the row above it."""
    scores = RowScores([], True, torch.Generator().manual_seed(0))
    sequences = [SequenceState([1, 2, 3, 4], 3, 0), SequenceState([1, 2, 3], 2, 1)]
    drafts = [Draft([5, 6, 7], [-1, 0, 0]), Draft([5], [-1])]
    uniform_BR = scores.uniform(sequences, drafts, torch.zeros(2, 4, V))
    by_depth = scores.numbers(sequences, [[0, 1, 2], [0, 1, 2]], torch.device("cpu"))
    assert uniform_BR[0].tolist() == by_depth[0, [0, 1, 2, 2]].tolist()
    assert uniform_BR[1, :2].tolist() == by_depth[1, :2].tolist()
    assert len(set(by_depth.flatten().tolist())) == 6


def test_a_drafter_runs_at_the_callers_temperature():
    """All that looks at scores alone is asked of what a drafter says too; not what looks at tokens' names."""
    settings: list[Any] = [lp.TemperatureLogitsWarper(0.3), lp.TopKLogitsWarper(5)]
    logits_NV = torch.randn(3, V, generator=torch.Generator().manual_seed(4))
    scores = RowScores([*settings, lp.SuppressTokensLogitsProcessor([1, 2], device="cpu")], True)
    wanted_NV = logits_NV
    for one in settings:
        wanted_NV = one(None, wanted_NV)
    torch.testing.assert_close(scores.as_drawn(logits_NV), wanted_NV.softmax(-1))
    assert (wanted_NV.softmax(-1) - logits_NV.softmax(-1)).abs().max() > 0.1


def test_lossy_policies_judge_guesses():
    """typical asks how likely a draft is, not whether it is drawn."""
    seen: list[Any] = []
    keep, before = Run.begin, deeper()

    def begin(self: Run) -> None:
        keep(self)
        seen.append(self.drafter.scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "begin", begin)
        accepted(before, policy="typical")
        accepted(before)
    assert seen[0] is None and isinstance(seen[1], RowScores)
