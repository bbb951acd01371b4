"""Verification: T=0 is greedy, T>0 follows the target (chi-square), wrong rules fail the same tests, lossy is lossy."""

# V tokens, R rows of a draft.

import functools
import random
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from foretell.decoding import verify as verify_module
from foretell.decoding.policies import LOSSY, POLICIES, check_policy, typical_thresholds
from foretell.decoding.verify import verify_greedy
from foretell.ops.sampling import draw, take, to_probs
from foretell.types import Draft, Verdict

V = 4
DRAWS = 40_000
# a correct rule falls below this once in ten thousand seeds; the wrong rules here are below it by many decades
LEAST_P = 1e-4


def verify(
    draft: Draft,
    scores_RV: Tensor,
    do_sample: bool,
    generator: torch.Generator | None = None,
    policy: str = "lossless",
) -> Verdict:
    """The verdict on one sequence."""
    uniform_R = torch.rand(len(scores_RV), generator=generator, dtype=torch.float64) if do_sample else None
    uniform_BR = None if uniform_R is None else uniform_R[None]
    return verify_module.verify([draft], scores_RV[None], uniform_BR, policy)[0]


# -- greedy ------------------------------------------------------------------------------------------------------------


def random_tree(rng: random.Random, size: int, vocabulary: int, distinct: bool = True) -> Draft:
    """A random tree of at most that size; distinct: siblings have different tokens."""
    draft = Draft()
    for _ in range(size):
        parent = rng.choice([-1, *range(len(draft))])
        taken = {t for t, p in zip(draft.tokens, draft.parents) if p == parent} if distinct else set()
        if len(taken) < vocabulary:
            draft.tokens.append(rng.choice([t for t in range(vocabulary) if t not in taken]))
            draft.parents.append(parent)
    return draft


def greedy_by_definition(draft: Draft, choice: list[int]) -> Verdict:
    """Ask for one token at a time, as plain greedy decoding does, while somebody proposed it."""
    path, at = [], -1
    while True:
        token = choice[at + 1]
        children = [i for i in range(len(draft)) if draft.parents[i] == at and draft.tokens[i] == token]
        if not children:
            return Verdict(path, token)
        at = children[0]
        path.append(at)


@pytest.mark.parametrize("distinct", [True, False])
def test_greedy_on_random_trees(distinct):
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    accepted = 0
    for _ in range(500):
        draft = random_tree(rng, rng.randint(0, 12), 3, distinct)
        scores = torch.randn(1 + len(draft), 3, generator=generator)
        choice = scores.argmax(-1).tolist()
        wanted = greedy_by_definition(draft, choice)
        assert verify_greedy(draft, choice) == wanted
        assert verify(draft, scores, do_sample=False) == wanted
        accepted += len(wanted.path)
    assert accepted > 300, "the trees were never followed"


def test_greedy_takes_the_lowest_of_equal_scores():
    scores = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 0.0]])
    assert verify(Draft([2], [-1]), scores, do_sample=False) == Verdict([], 1)
    assert verify(Draft([1], [-1]), scores, do_sample=False) == Verdict([0], 0)


def test_one_hot_scores_make_sampling_greedy():
    """Temperature 0 needs no rule of its own."""
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    for _ in range(100):
        draft = random_tree(rng, 8, 3)
        draft.probs = [
            None if rng.random() < 0.5 else torch.softmax(torch.randn(3, generator=generator), 0) for _ in draft.tokens
        ]
        scores = torch.randn(1 + len(draft), 3, generator=generator)
        certain = torch.nn.functional.one_hot(scores.argmax(-1), 3).float().log()
        got = verify(draft, certain, do_sample=True, generator=generator)
        wanted = greedy_by_definition(draft, scores.argmax(-1).tolist())
        assert [draft.tokens[i] for i in got.path] + [got.token] == [draft.tokens[i] for i in wanted.path] + [
            wanted.token
        ]


# -- sampling ----------------------------------------------------------------------------------------------------------

_g = torch.Generator().manual_seed(11)
# the target: a first token, and a second given the first
FIRST_V = torch.softmax(1.2 * torch.randn(V, generator=_g), 0)
SECOND_VV = torch.softmax(1.2 * torch.randn(V, V, generator=_g), 1)
THIRD_V = torch.full((V,), 1 / V)
# a drafter that is often wrong
DRAFT_FIRST_V = torch.softmax(1.2 * torch.randn(V, generator=_g), 0)
DRAFT_SECOND_VV = torch.softmax(1.2 * torch.randn(V, V, generator=_g), 1)


def pick(probs_V: Tensor, rng: random.Random) -> int:
    return rng.choices(range(V), probs_V.tolist())[0]


def one_hot_chain(rng: random.Random) -> Draft:
    return Draft([0, 1], [-1, 0])


def sampled_chain(rng: random.Random) -> Draft:
    first = pick(DRAFT_FIRST_V, rng)
    second = pick(DRAFT_SECOND_VV[first], rng)
    return Draft([first, second], [-1, 0], [DRAFT_FIRST_V, DRAFT_SECOND_VV[first]])


def one_hot_tree(rng: random.Random) -> Draft:
    """Two children at the root, two below the first of them, one below the second."""
    return Draft([0, 2, 1, 3, 0], [-1, -1, 0, 0, 1])


def sampled_tree(rng: random.Random) -> Draft:
    """Two children at the root, each drawn from the drafter (perhaps the same token), one below each."""
    first = [pick(DRAFT_FIRST_V, rng) for _ in range(2)]
    second = [pick(DRAFT_SECOND_VV[t], rng) for t in first]
    probs = [DRAFT_FIRST_V, DRAFT_FIRST_V, *(DRAFT_SECOND_VV[t] for t in first)]
    return Draft(first + second, [-1, -1, 0, 1], probs)


def mixed_tree(rng: random.Random) -> Draft:
    """A module's sampled chain and a looked-up chain in one tree."""
    chain = sampled_chain(rng)
    return Draft([*chain.tokens, 2, 3], [-1, 0, -1, 2], [*chain.probs, None, None])


def mixed_tree_looked_up_first(rng: random.Random) -> Draft:
    chain = sampled_chain(rng)
    return Draft([2, 3, *chain.tokens], [-1, 0, -1, 2], [None, None, *chain.probs])


DRAFTERS = [one_hot_chain, sampled_chain, one_hot_tree, sampled_tree, mixed_tree, mixed_tree_looked_up_first]


def target_scores(draft: Draft) -> Tensor:
    """Log-probabilities of the target at the last token and at each draft, of depth 1 (second) or 2 (third token)."""
    return _target_scores(tuple(draft.tokens), tuple(draft.parents))


@functools.cache
def _target_scores(tokens: tuple[int, ...], parents: tuple[int, ...]) -> Tensor:
    rows = [SECOND_VV[token] if parent == -1 else THIRD_V for token, parent in zip(tokens, parents)]
    return torch.stack([FIRST_V, *rows]).log()


Rule = Callable[[list[Draft], Tensor, Tensor | None], list[Verdict]]


def two_tokens(rule: Rule, drafter: Callable[[random.Random], Draft], draws: int, seed: int) -> Tensor:
    """How often each pair of tokens is emitted first: [V * V]. All draws are one batch."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    drafts = [drafter(rng) for _ in range(draws)]
    scores_BRV = torch.stack([target_scores(draft) for draft in drafts])
    verdicts = rule(drafts, scores_BRV, torch.rand(scores_BRV.shape[:2], generator=generator))
    emitted = [[d.tokens[i] for i in v.path] + [v.token] for d, v in zip(drafts, verdicts, strict=True)]
    # where one token came, the next verification, with nothing drafted
    alone = [b for b, tokens in enumerate(emitted) if len(tokens) == 1]
    again_BRV = SECOND_VV.log()[[emitted[b][0] for b in alone]][:, None]
    again = rule([Draft()] * len(alone), again_BRV, torch.rand(len(alone), 1, generator=generator)) if alone else []
    for b, verdict in zip(alone, again, strict=True):
        emitted[b].append(verdict.token)
    return torch.bincount(torch.tensor([one * V + two for one, two, *_ in emitted]), minlength=V * V)


def p_value(seen: Tensor) -> float:
    """Chi-square of the emitted pairs against the target's."""
    wanted = (FIRST_V[:, None] * SECOND_VV).double().flatten()
    return float(stats.chisquare(seen.numpy(), (wanted / wanted.sum() * seen.sum()).numpy()).pvalue)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_samples_follow_the_target(drafter):
    assert p_value(two_tokens(verify_module.verify, drafter, DRAWS // 2, seed=1)) > LEAST_P


def keeps_every_draft(drafts: list[Draft], scores_BRV: Tensor, uniform_BR: Tensor | None) -> list[Verdict]:
    """A wrong rule: all drafts of the first branch stay."""
    verdicts = []
    for draft, scores_RV, uniform_R in zip(drafts, scores_BRV, uniform_BR, strict=True):
        path, at = [], -1
        while at in draft.parents:
            at = draft.parents.index(at)
            path.append(at)
        verdicts.append(Verdict(path, int(take(to_probs(scores_RV[at + 1][None]), uniform_R[:1]))))
    return verdicts


@pytest.mark.parametrize("drafter", [one_hot_chain, sampled_chain, one_hot_tree])
def test_keeping_every_draft_is_caught(drafter):
    assert p_value(two_tokens(keeps_every_draft, drafter, DRAWS // 10, seed=2)) < LEAST_P / 1e6


Accept = tuple[Tensor, Tensor, Tensor]
right_accept = verify_module._accept


def accepts_with_p(p_BV: Tensor, q_BV: Tensor, token_B: Tensor, uniform_B: Tensor) -> Accept:
    """A wrong rule: min(1, p) in place of min(1, p / q), and the residual of the right one."""
    _, left_BV, _ = right_accept(p_BV, q_BV, token_B, uniform_B)
    p_B = p_BV.gather(1, token_B[:, None])[:, 0].double()
    return uniform_B < p_B, left_BV, (uniform_B - p_B) / (1 - p_B)


def forgets_the_residual(p_BV: Tensor, q_BV: Tensor, token_B: Tensor, uniform_B: Tensor) -> Accept:
    """A wrong rule: after a refusal the target is asked again as if nothing had been proposed."""
    kept_B, _, left_B = right_accept(p_BV, q_BV, token_B, uniform_B)
    return kept_B, p_BV, left_B


def uses_a_number_twice(p_BV: Tensor, q_BV: Tensor, token_B: Tensor, uniform_B: Tensor) -> Accept:
    """A wrong rule: the number that refused a draft draws what is left, too."""
    kept_B, left_BV, _ = right_accept(p_BV, q_BV, token_B, uniform_B)
    return kept_B, left_BV, uniform_B


def keeps_the_number(p_BV: Tensor, q_BV: Tensor, token_B: Tensor, uniform_B: Tensor) -> Accept:
    """A wrong rule: everything is kept."""
    _, left_BV, left_B = right_accept(p_BV, q_BV, token_B, uniform_B)
    return torch.ones_like(token_B, dtype=torch.bool), left_BV, left_B


@pytest.mark.parametrize("wrong", [accepts_with_p, forgets_the_residual, uses_a_number_twice, keeps_the_number])
@pytest.mark.parametrize("drafter", [sampled_chain, sampled_tree, mixed_tree])
def test_wrong_accept_rules_are_caught(wrong, drafter, monkeypatch):
    monkeypatch.setattr(verify_module, "_accept", wrong)
    assert p_value(two_tokens(verify_module.verify, drafter, DRAWS // 4, seed=3)) < LEAST_P / 100


def test_a_number_that_serves_two_rows_is_caught():
    """Chosen drafts: each depth needs a number of its own."""

    def one_for_all(drafts: list[Draft], scores_BRV: Tensor, uniform_BR: Tensor | None) -> list[Verdict]:
        return verify_module.verify(drafts, scores_BRV, uniform_BR[:, :1].expand_as(uniform_BR))

    assert p_value(two_tokens(one_for_all, one_hot_tree, DRAWS // 4, seed=3)) < LEAST_P / 100


def test_drawn_drafts_beside_a_text_do_not_change_it():
    """Chosen drafts, and none, are judged as they are alone."""
    generator = torch.Generator().manual_seed(7)
    drafts = [Draft([2, 1], [-1, 0]), Draft(), Draft([0, 1], [-1, 0], [DRAFT_FIRST_V, DRAFT_SECOND_VV[0]])]
    for _ in range(60):
        scores_BRV = torch.randn(3, 3, V, generator=generator)
        uniform_BR = torch.rand(3, 3, generator=generator, dtype=torch.float64)
        beside = verify_module.verify(drafts, scores_BRV, uniform_BR)
        for b in range(3):
            assert verify_module.verify([drafts[b]], scores_BRV[b : b + 1], uniform_BR[b : b + 1]) == [beside[b]]


def test_chosen_drafts_said_to_be_sampled_are_caught():
    """Drafts by argmax must carry one-hot probabilities: with the drafter's softmax the output is not the target's."""

    def argmax_with_softmax(rng: random.Random) -> Draft:
        first = int(DRAFT_FIRST_V.argmax())
        second = int(DRAFT_SECOND_VV[first].argmax())
        return Draft([first, second], [-1, 0], [DRAFT_FIRST_V, DRAFT_SECOND_VV[first]])

    assert p_value(two_tokens(verify_module.verify, argmax_with_softmax, DRAWS // 4, seed=4)) < LEAST_P / 100


def test_acceptance_is_the_overlap_of_the_two_distributions():
    """Rejection sampling is exact AND accepts as often as it can: sum of min(p, q); a one-hot draft p(token)."""
    generator = torch.Generator().manual_seed(5)
    kept = [0, 0]
    for _ in range(4000):
        token = int(draw(DRAFT_FIRST_V[None], generator))
        scores = torch.stack([FIRST_V, THIRD_V]).log()
        kept[0] += len(verify(Draft([token], [-1], [DRAFT_FIRST_V]), scores, True, generator).path)
        kept[1] += len(verify(Draft([2], [-1]), scores, True, generator).path)
    for count, wanted in zip(kept, (torch.minimum(FIRST_V, DRAFT_FIRST_V).sum(), FIRST_V[2]), strict=True):
        assert stats.binomtest(count, 4000, float(wanted)).pvalue > LEAST_P


def test_a_drafter_equal_to_the_target_is_always_kept():
    generator = torch.Generator().manual_seed(6)
    scores = torch.randn(2, 1000, generator=generator)
    q_V = to_probs(scores[:1])[0]
    for _ in range(300):
        token = int(draw(q_V[None], generator))
        assert verify(Draft([token], [-1], [q_V]), scores, True, generator).path == [0]


def test_filtered_tokens_are_never_emitted():
    """After top-k or top-p most scores are -inf; a draft outside is refused, a draft that is alone inside is kept."""
    only = torch.tensor([[float("-inf"), 0.0, float("-inf")]] * 2)
    for q in (None, torch.tensor([0.2, 0.3, 0.5])):
        probs = None if q is None else [q]
        share = {} if q is None else {0: pytest.approx(0.3)}  # the overlap, whatever was drawn
        assert verify(Draft([2], [-1], probs), only, True) == Verdict([], 1, share)
        assert verify(Draft([1], [-1], probs), only, True) == Verdict([0], 1, share)


def test_shares_are_of_drawn_drafts_that_were_reached():
    """A second sibling meets what the first has left over; below a refused draft nothing is told."""
    draft = Draft([0, 1, 2, 3], [-1, -1, 0, 1], [DRAFT_FIRST_V, None, THIRD_V, THIRD_V])
    scores = torch.stack([FIRST_V, *[THIRD_V] * 4]).log()
    told = [verify(draft, scores, True, torch.Generator().manual_seed(seed)) for seed in range(60)]
    assert {tuple(v.path) for v in told} >= {(0, 2), (1, 3)}
    for verdict in told:
        assert set(verdict.shares) == {0} | set(verdict.path[-1:] if len(verdict.path) == 2 else [])
        assert verdict.shares[0] == pytest.approx(float(torch.minimum(FIRST_V, DRAFT_FIRST_V).sum()))


def test_a_seed_fixes_the_outcome():
    draft = sampled_tree(random.Random(3))
    outcomes = [verify(draft, target_scores(draft), True, torch.Generator().manual_seed(9)) for _ in range(2)]
    assert outcomes[0] == outcomes[1]


# -- lossy policies ----------------------------------------------------------------------------------------------------


def typical(drafts: list[Draft], scores_BRV: Tensor, uniform_BR: Tensor | None) -> list[Verdict]:
    return verify_module.verify(drafts, scores_BRV, uniform_BR, policy="typical")


def test_typical_is_lossy_and_says_so():
    assert "typical" in LOSSY and "lossless" not in LOSSY and set(POLICIES) >= LOSSY
    assert p_value(two_tokens(typical, one_hot_chain, DRAWS // 10, seed=7)) < LEAST_P / 1e6
    # greedy too: a likely second choice stays
    scores = torch.log(torch.tensor([[0.6, 0.4], [0.5, 0.5]]))
    assert verify(Draft([1], [-1]), scores, False).path == []
    assert verify(Draft([1], [-1]), scores, False, policy="typical").path == [0]


def test_typical_threshold_by_hand():
    """Sure target: epsilon = 0.09 decides. Flat over 16: 0.3 * exp(-log 16) = 0.01875."""
    sure = torch.tensor([[1.0] + [0.0] * 15, [1 / 16] * 16])
    assert typical_thresholds(sure).tolist() == pytest.approx([0.09, 0.3 / 16])
    p = torch.tensor([0.9, 0.08, 0.02])
    scores = p.log().repeat(2, 1)
    # entropy 0.375: 0.3 * exp(-0.375) = 0.206, so epsilon decides
    assert verify(Draft([1], [-1]), scores, False, policy="typical") == Verdict([], 0)
    assert verify(Draft([0], [-1]), scores, False, policy="typical") == Verdict([0], 0)


def test_typical_keeps_the_longest_path_then_the_likelier():
    p = torch.tensor([0.5, 0.3, 0.2])
    draft = Draft([0, 1, 2, 1, 0], [-1, -1, 1, 1, 3])
    assert verify(draft, p.log().repeat(6, 1), False, policy="typical") == Verdict([1, 3, 4], 0)
    shorter = Draft([0, 1, 2, 1], [-1, -1, 1, 1])
    assert verify(shorter, p.log().repeat(5, 1), False, policy="typical") == Verdict([1, 3], 0)


def test_typical_always_ends_with_the_targets_own_token():
    assert verify(Draft(), FIRST_V.log()[None], False, policy="typical") == Verdict([], int(FIRST_V.argmax()))
    generator = torch.Generator().manual_seed(8)
    many = typical([Draft()] * 2000, FIRST_V.log().expand(2000, 1, V), torch.rand(2000, 1, generator=generator))
    seen = torch.bincount(torch.tensor([verdict.token for verdict in many]), minlength=V)
    assert stats.chisquare(seen.numpy(), (FIRST_V.double() / FIRST_V.double().sum() * 2000).numpy()).pvalue > LEAST_P


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="unknown policy 'greedy', choose one of lossless, typical"):
        verify(Draft(), torch.zeros(1, 2), False, policy="greedy")
    with pytest.raises(ValueError, match="unknown policy ''"):
        check_policy("")
    with pytest.raises(ValueError, match="2 argmax tokens for 2 drafts, wanted 3"):
        verify_greedy(Draft([1, 2], [-1, 0]), [1, 2])
    with pytest.raises(ValueError, match=r"shape \(1, 1, 2\) for 1 sequences of at most 1 drafts, wanted \[1, 2, V\]"):
        verify(Draft([1], [-1]), torch.zeros(1, 2), True)
