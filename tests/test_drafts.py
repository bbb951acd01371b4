"""Drafts may be computed in fewer bits, and must not make a device wait: the text and what is accepted stay."""

# B sequences, T prompt width.

from __future__ import annotations

import functools
import itertools
import random
from typing import Any

import pytest
import torch
from drafters import knowing_mtp, leaning_model
from tiny import VOCAB
from torch import Tensor

from foretell.decoding.compose import Composed
from foretell.methods.chain import LEAST, branch
from foretell.methods.heads import HeadsConfig
from foretell.methods.masked import MaskedConfig
from foretell.models.linears import BYTES, HALF, INT8, PackedLinear
from foretell.mtp import MTPModel, get_mtp_model
from foretell.types import Draft

packable = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="nothing is packed without oneDNN")


@functools.cache
def knowing() -> MTPModel:
    # whole vectors of int8: anything else is not torch's own product
    sizes = {"vocab_size": 136, "hidden_size": 64, "intermediate_size": 64}
    return knowing_mtp(leaning_model(**sizes), noise=0.03, shared_module=True, draft_vocab_size=128)


def prompts(B: int, T: int = 9) -> Tensor:
    return torch.randint(3, VOCAB, (B, T), generator=torch.Generator().manual_seed(3))


def run(mtp: MTPModel, ids_BT: Tensor, **settings: Any) -> Any:
    settings = {"max_new_tokens": 24, "num_draft_tokens": 3, "pad_token_id": 0, **settings}
    return mtp.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), return_dict_in_generate=True, **settings)


def products(mtp: MTPModel, dtype: str) -> list[PackedLinear]:
    drafter = mtp.drafter(dtype=dtype)
    parts = [*drafter._view.modules(), *drafter._head.modules()]
    return [part for part in parts if isinstance(part, PackedLinear)]


@packable
@pytest.mark.parametrize("dtype", [HALF, INT8])
@pytest.mark.parametrize(("texts", "slots", "share"), [(6, 1, 0.9), (200, 64, 0.995)])
def test_drafts_of_narrow_weights_are_as_good(dtype, texts, slots, share):
    mtp, ids_BT = knowing(), prompts(texts)
    how = {"slots": slots, "max_new_tokens": 48}
    plain, narrow = (run(mtp, ids_BT, draft_dtype=one, **how) for one in ("float32", dtype))
    off = run(mtp, ids_BT, num_draft_tokens=0, **how)
    assert plain.sequences.tolist() == narrow.sequences.tolist() == off.sequences.tolist()
    # of few tokens one draft more or less is a tenth; random weights have many near ties, more than trained ones
    assert plain.stats.tau > 1.3 and narrow.stats.tau >= share * plain.stats.tau
    assert {name for product in products(mtp, dtype) for name in product.names} == {BYTES if dtype == INT8 else dtype}
    assert {len(product.kept) for product in products(mtp, dtype)} == {1}


@packable
def test_lossy_spans_are_said_by_the_modules_own_weights():
    mtp = knowing_mtp(leaning_model(), noise=0.15)
    honest, asked = mtp.drafter, []
    mtp.drafter = lambda space=None, sample=False, dtype="auto": asked.append(dtype) or honest(space, sample, dtype)
    run(mtp, prompts(2), policy="static_k")
    run(mtp, prompts(2), policy="static_k", draft_dtype=INT8)
    run(mtp, prompts(2))
    assert asked == ["float32", INT8, "auto"]


@pytest.mark.parametrize("dtype", ["float16", "int4", "", None, torch.int8])
def test_weights_that_nothing_drafts_with_are_refused(dtype):
    with pytest.raises(ValueError, match="draft_dtype: got .* wanted one of auto, float32, bfloat16, int8"):
        run(knowing(), prompts(1), draft_dtype=dtype)


def test_no_weights_are_made_wider():
    mtp = get_mtp_model(leaning_model().to(torch.bfloat16), HeadsConfig(depth=2))
    with pytest.raises(ValueError, match="'float32' for a module of bfloat16 on cpu, wanted one of auto, bf"):
        run(mtp, prompts(1), draft_dtype="float32", num_draft_tokens=2)
    wanted = run(mtp, prompts(2), num_draft_tokens=0).sequences.tolist()
    for dtype in ("auto", HALF, INT8):
        assert run(mtp, prompts(2), draft_dtype=dtype, num_draft_tokens=2).sequences.tolist() == wanted


# -- how often a round waits for the device ----------------------------------------------------------------------------


class Reads:
    """Counts what would make the host wait for a device."""

    NAMES = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in self.NAMES:
            monkeypatch.setattr(torch.Tensor, name, self._counting(getattr(torch.Tensor, name)))

    def _counting(self, honest: Any) -> Any:
        def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return honest(tensor, *args, **kwargs)

        return counting


KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5, "temperature": 0.7},
    "drawn drafts": {"do_sample": True, "draft_sample_method": "probabilistic"},
    "drawn drafts beside lookup": {"do_sample": True, "draft_sample_method": "probabilistic", "drafter": "mtp+lookup"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_of_64_reads_the_device_three_times(monkeypatch, kind):
    mtp, ids_BT, rounds = knowing(), prompts(64), []
    monkeypatch.setattr("foretell.ops.sampling.RUNNERS", 2)  # so that others are drawn as well
    run(mtp, ids_BT, **KINDS[kind])
    for new in (8, 28):  # what a call reads beside its rounds drops out
        seed = torch.Generator().manual_seed(1)
        with monkeypatch.context() as patch:
            reads = Reads(patch)
            stats = run(mtp, ids_BT, max_new_tokens=new, generator=seed, **KINDS[kind]).stats
        rounds.append((stats.verifications, reads.count))
    (few, before), (many, after) = rounds
    assert many >= few + 3
    assert after - before <= 3 * (many - few)


# -- several guesses a step --------------------------------------------------------------------------------------------


class Twice(Composed):
    """One drafter of first guesses, one of three a step; the latter's are verified."""

    def __init__(self, *inner: Any) -> None:
        super().__init__(inner)
        self.seen: list[tuple[list[int], Draft, Draft]] = []
        inner[1].guesses = 3

    def draft(self, sequences: Any, lengths: list[int], worth: Any = None) -> list[Draft]:
        chains, trees = (inner.draft(sequences, lengths) for inner in self.drafters)
        self.seen += [(list(s.tokens), *both) for s, *both in zip(sequences, chains, trees, strict=True)]
        return trees

    def carriers(self, *given: Any) -> Any:
        return [inner.carriers(*given) for inner in self.drafters][-1]


GUESSING = {
    "sequential": lambda model: knowing_mtp(model, noise=0.2),
    "a draft vocabulary": lambda model: knowing_mtp(model, noise=0.2, draft_vocab_size=64),
    "heads": lambda model: get_mtp_model(model, HeadsConfig(depth=3)),
    "masked": lambda model: get_mtp_model(model, MaskedConfig(depth=3, lora_rank=4, sampler=False)),
}


@pytest.mark.parametrize("kind", GUESSING)
def test_next_best_guesses_stand_beside_the_chain(kind):
    """Three guesses a step, likeliest first of the chain; of the first step against draft_logits; the text stays."""
    mtp, ids_BT = GUESSING[kind](leaning_model()), prompts(3)
    drafter, leaves = Twice(mtp.drafter(dtype="float32"), mtp.drafter(dtype="float32")), 0
    out = run(mtp, ids_BT, drafter=drafter)
    assert out.sequences.tolist() == run(mtp, ids_BT, num_draft_tokens=0).sequences.tolist()
    for text, chain, tree in drafter.seen:
        at, below = -1, sorted(range(len(tree)), key=lambda i: -tree.confidence[i])
        for token, confidence in zip(chain.tokens, chain.confidence, strict=True):
            guesses = [i for i in below if tree.parents[i] == at]
            at = guesses[0]
            assert tree.tokens[at] == token and tree.confidence[at] == pytest.approx(confidence, abs=1e-6)
            assert len({tree.tokens[i] for i in guesses}) == len(guesses) <= 3
            assert all(tree.confidence[i] >= LEAST for i in guesses[1:])
            leaves += len(guesses) - 1
        if not len(chain) or kind == "masked":  # whose masks stood elsewhere when they were read
            continue
        logits_V = mtp.draft_logits(torch.tensor([text]))[0, -2, 0].float()
        first = [i for i in below if tree.parents[i] < 0]
        best = torch.softmax(logits_V, -1).topk(3)
        ids = mtp.module.draft_vocab_ids
        wanted = best.indices.tolist() if ids is None or len(logits_V) > 64 else ids[best.indices].tolist()
        assert [tree.tokens[i] for i in first] == wanted[: len(first)]
        assert [tree.confidence[i] for i in first] == pytest.approx(best.values.tolist()[: len(first)], abs=1e-4)
        assert len(first) == max(1, int((best.values >= LEAST).sum()))
    assert leaves > 10


# -- trees of guesses that read no guess -------------------------------------------------------------------------------


def chain_and_leaves(rng: random.Random, depths: int, S: int) -> tuple[Draft, list[list[tuple[int, float]]]]:
    """A draft as "auto" begins with, and of each depth its guesses, best first."""
    draft, levels, at = Draft(), [], -1
    for depth in range(depths):
        shares = sorted((rng.random() ** 3 for _ in range(S + 1)), reverse=True)
        level = [(100 * depth + s, shares[s] / sum(shares)) for s in range(S)]
        levels.append([one for s, one in enumerate(level) if s == 0 or one[1] >= LEAST])
        made = [draft.add(token, at, sure, "mtp") for token, sure in reversed(levels[-1])]
        at = made[-1]
    return draft, levels


def paths(draft: Draft) -> dict[tuple[int, ...], float]:
    """The tokens that lead to each one, itself last, and the chance of all of them."""
    found: list[tuple[tuple[int, ...], float]] = []
    for token, parent, sure in zip(draft.tokens, draft.parents, draft.confidence, strict=True):
        before, chance = found[parent] if parent >= 0 else ((), 1.0)
        found.append(((*before, token), chance * sure))
    assert len(dict(found)) == len(found), "no path stands there twice"
    return dict(found)


def test_a_tree_holds_every_likely_path_and_is_never_worse_than_leaves():
    rng, better = random.Random(4), 0
    for _ in range(60):
        draft, levels = chain_and_leaves(rng, rng.randint(1, 4), rng.randint(1, 4))
        leaves = paths(draft)
        branch([draft])
        tree = paths(draft)
        every: dict[tuple[int, ...], float] = {}
        for depth in range(1, len(levels) + 1):
            for ones in itertools.product(*levels[:depth]):
                every[tuple(token for token, _ in ones)] = torch.tensor([p for _, p in ones]).double().prod().item()
        wanted = {path for path, chance in every.items() if chance >= LEAST} | set(leaves)
        assert set(tree) == wanted, "all products of the depths' guesses, by walking them"
        assert all(chance == pytest.approx(every[path]) for path, chance in tree.items())
        for rows in range(1, len(leaves) + 1):  # the tokens that so many rows bring
            one, other = (sum(sorted(of.values())[-rows:]) for of in (tree, leaves))
            assert one >= other - 1e-12
            better += one > 1.01 * other
    assert better > 20


def test_trees_of_a_large_batch_share_what_there_is(monkeypatch):
    monkeypatch.setattr("foretell.methods.chain.MOST", 40)
    (alone,), drafts = ([chain_and_leaves(random.Random(9), 4, 4)[0] for _ in range(count)] for count in (1, 4))
    before = len(alone)
    branch([alone])
    branch(drafts)
    assert len(alone) > before and all(len(one) == max(before, 10) for one in drafts)


@pytest.mark.parametrize("kind", ["heads", "masked"])
def test_what_follows_a_second_guess_is_verified(kind, monkeypatch):
    """The first guess of depth 1 is always wrong, its second right, as are the first ones of the depths behind it."""
    mtp, ids_BT, now = GUESSING[kind](leaning_model()), prompts(3), []
    wanted = run(mtp, ids_BT, num_draft_tokens=0).sequences.tolist()
    honest = type(mtp.drafter()).draft

    def draft(self: Any, sequences: Any, *given: Any) -> list[Draft]:
        now[:] = [sequences, 0]
        return honest(self, sequences, *given)

    def guesses(self: Any, logits_BM: Tensor, width: int, *given: Any) -> tuple[Tensor, Tensor, None]:
        sequences, now[1] = now[0], now[1] + 1
        text = [(wanted[s.index] + [5] * 9)[len(s.tokens) - 1 + now[1]] for s in sequences]
        ones = [[token, (token + 1) % VOCAB] for token in text]
        tokens_BS = torch.tensor([one[::-1] if now[1] == 1 else one for one in ones])
        return tokens_BS, torch.tensor([[0.5, 0.3]]).expand(len(text), 2), None

    monkeypatch.setattr(type(mtp.drafter()), "draft", draft)
    monkeypatch.setattr(type(mtp.drafter()), "_guesses", guesses)
    taus = []
    for grown in (True, False):
        with monkeypatch.context() as patch:
            if not grown:
                for place in ("chain", "heads"):
                    patch.setattr(f"foretell.methods.{place}.branch", lambda drafts: None)
            drafter = mtp.drafter()
            drafter.guesses = 2
            out = run(mtp, ids_BT, drafter=drafter)
            assert out.sequences.tolist() == wanted
            taus.append(out.stats.tau)
    assert taus[0] > 3 and taus[1] <= 2, "leaves end at the second guess"
    assert run(mtp, ids_BT, num_draft_tokens="auto").sequences.tolist() == wanted
