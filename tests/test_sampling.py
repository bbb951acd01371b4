"""Sampling: whatever drafts and however it was drawn, the text follows the target's own distribution."""

# V tokens, B texts, N new tokens.

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drafters import Oracle, Sampling, leaning_model
from scipy import stats
from torch import Tensor
from transformers.generation import logits_process as lp

from foretell.decoding import verify as verify_module
from foretell.decoding.adaptive import AdaptiveLength, CostCurve
from foretell.methods.heads import HeadsConfig
from foretell.methods.masked import MaskedConfig
from foretell.methods.sequential import SequentialConfig
from foretell.mtp import MTPModel, get_mtp_model
from foretell.ops.sampling import Dice
from foretell.types import Draft
from tests.test_verify import Accept, accepts_with_p, forgets_the_residual

V = 8
TEXTS = 700
# a correct rule falls below this once in ten thousand seeds; the wrong rules here are below it by many decades
LEAST_P = 1e-4
# ends as it begins, so that lookup has something to say from the first token on
PROMPT = [3, 5, 1, 3, 5]

WARPERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.3},
    "all": {"temperature": 0.8, "top_k": 6, "top_p": 0.9},
}


@functools.cache
def mtp() -> MTPModel:
    """A module with a distribution of its own, neither the target's nor flat."""
    model = leaning_model(vocab_size=V, initializer_range=0.05)
    return get_mtp_model(model, SequentialConfig(depth=2, initialisation="random"))


def processors(settings: dict[str, Any]) -> list[Any]:
    """transformers' warpers, in transformers' order."""
    made = {
        "temperature": lp.TemperatureLogitsWarper,
        "top_k": lp.TopKLogitsWarper,
        "top_p": lp.TopPLogitsWarper,
        "min_p": lp.MinPLogitsWarper,
    }
    return [made[name](settings[name]) for name in made if name in settings]


@functools.cache
def exact(warper: str, new: int) -> Tensor:
    """[V ** new] probability of each continuation of the prompt, from the model itself."""
    probs = torch.ones(1, dtype=torch.float64)
    texts = torch.tensor([PROMPT])
    for _ in range(new):
        with torch.no_grad():
            scores = mtp().model(texts).logits[:, -1].float()
        for processor in processors(WARPERS[warper]):
            scores = processor(texts, scores)
        probs = (probs[:, None] * scores.double().softmax(-1)).reshape(-1)
        texts = torch.cat([texts.repeat_interleave(V, 0), torch.arange(V).repeat(len(texts))[:, None]], dim=1)
    return probs


def generate(warper: str, new: int, seed: int = 0, texts: int = TEXTS, **settings: Any) -> Any:
    """That many texts of the one prompt."""
    ids = torch.tensor([PROMPT]).repeat(texts, 1)
    return mtp().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        max_new_tokens=new,
        return_dict_in_generate=True,
        generator=torch.Generator().manual_seed(seed),
        **{"slots": 256, "top_k": 0, **settings, **WARPERS[warper]},
    )


def count(new_BN: Tensor) -> Tensor:
    """How often each continuation was drawn [V ** N]."""
    place_N = torch.tensor([V**i for i in reversed(range(new_BN.shape[1]))])
    return torch.bincount((new_BN * place_N).sum(1), minlength=V ** new_BN.shape[1])


def sample(warper: str, new: int, texts: int = TEXTS, **settings: Any) -> tuple[Tensor, Any]:
    """How often each continuation was drawn, and the stats."""
    out = generate(warper, new, texts=texts, **settings)
    return count(out.sequences[:, len(PROMPT) :]), out.stats


def p_value(seen: Tensor, probs: Tensor) -> float:
    """Chi-square; continuations expected fewer than five times share a cell. What cannot be must not have been."""
    assert int(seen[probs == 0].sum()) == 0, "a token outside the warpers' choice was emitted"
    wanted = probs * int(seen.sum())
    rare = wanted < 5
    cells = [torch.cat([x[~rare].double(), x[rare].double().sum()[None]]) for x in (seen, wanted)]
    if cells[1][-1] < 5:  # the rest is too small for a cell of its own
        cells = [torch.cat([c[:-2], (c[-2] + c[-1])[None]]) for c in cells]
    return float(stats.chisquare(cells[0].numpy(), (cells[1] / cells[1].sum() * cells[0].sum()).numpy()).pvalue)


def far_VV(power: float = 1.0) -> Tensor:
    """Rows of a drafter's distribution that is not the target's."""
    return (torch.randn(V, V, generator=torch.Generator().manual_seed(5)) * power).softmax(-1)


DRAFTERS: dict[str, Callable[[], dict[str, Any]]] = {
    "off": lambda: {"num_draft_tokens": 0},
    "greedy": lambda: {"drafter": "mtp"},
    "probabilistic": lambda: {"drafter": "mtp", "draft_sample_method": "probabilistic"},
    "lookup": lambda: {"drafter": "lookup"},
    "greedy+lookup": lambda: {"drafter": "mtp+lookup"},
    "probabilistic+lookup": lambda: {"drafter": "mtp+lookup", "draft_sample_method": "probabilistic"},
    "lookup+probabilistic": lambda: {"drafter": "lookup+mtp", "draft_sample_method": "probabilistic"},
    "far": lambda: {"drafter": Sampling(far_VV()), "num_draft_tokens": 2},
    "far siblings": lambda: {"drafter": Sampling(far_VV(), width=3), "num_draft_tokens": 2},
}


def test_the_distribution_is_worth_testing():
    """Neither flat nor one token; the module's is another one; and the exact numbers are the model's."""
    probs = exact("plain", 1)
    entropy = float(-(probs * probs.log()).sum())
    assert 0.4 * math.log(V) < entropy < 0.95 * math.log(V), entropy
    ids = torch.tensor([PROMPT])
    module = mtp().draft_logits(ids)[0, -2, 0].softmax(-1)
    assert float((module - probs).abs().sum()) > 0.3
    with torch.no_grad():
        together = mtp().model(torch.tensor([[*PROMPT, 2, 6]])).logits[0].softmax(-1).double()
    chained = together[4, 2] * together[5, 6] * together[6, 1]
    assert float(exact("plain", 3)[2 * V * V + 6 * V + 1]) == pytest.approx(float(chained), rel=1e-4)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_follows_the_target(drafter):
    seen, told = sample("plain", 3, **DRAFTERS[drafter]())
    assert told.lossless
    drafted, accepted = sum(map(sum, told.drafted)), sum(map(sum, told.accepted))
    assert (drafter == "off" and drafted == 0) or 0.02 * drafted < accepted < 0.9 * drafted
    assert p_value(seen, exact("plain", 3)) > LEAST_P
    # fewer cells see a smaller error: the first two tokens, and the last two
    assert p_value(seen.view(-1, V).sum(1), exact("plain", 2)) > LEAST_P
    assert p_value(seen.view(V, -1).sum(0), exact("plain", 3).view(V, -1).sum(0)) > LEAST_P


@pytest.mark.parametrize(
    ("warper", "drafter"),
    [
        ("temperature", "probabilistic"),
        ("top_k", "greedy+lookup"),
        ("top_p", "probabilistic"),
        ("min_p", "greedy+lookup"),
        ("all", "probabilistic+lookup"),
        ("all", "far siblings"),
    ],
)
def test_follows_the_target_through_warpers(warper, drafter):
    seen, _ = sample(warper, 2, texts=600, **DRAFTERS[drafter]())
    assert p_value(seen, exact(warper, 2)) > LEAST_P
    assert p_value_or_zero(seen, exact("plain", 2)) < LEAST_P, "the warper should matter, and the test see it"


def p_value_or_zero(seen: Tensor, probs: Tensor) -> float:
    try:
        return p_value(seen, probs)
    except AssertionError:
        return 0.0


def test_many_small_calls_follow_it_too():
    """Calls of their own, each with caches that the one before it left, with left padding and few slots."""
    ids_BT = torch.tensor([[6] * 3 + PROMPT]).repeat(12, 1)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[:, :3] = 0
    generator, new = torch.Generator().manual_seed(3), []
    for _ in range(50):
        out = mtp().generate(
            ids_BT,
            attention_mask=mask_BT,
            do_sample=True,
            top_k=0,
            max_new_tokens=2,
            slots=5,
            generator=generator,
            draft_sample_method="probabilistic",
            drafter="mtp+lookup",
        )
        new.append(out[:, -2:])
    assert p_value(count(torch.cat(new)), exact("plain", 2)) > LEAST_P


# -- lengths that adapt ------------------------------------------------------------------------------------------------

# of three tokens the first two are looked at, 64 cells. A rule that moves a share d of the mass from one half of the
# cells to the other adds 4 * 1600 * d ** 2 to a chi-square of 63 +- 11, and LEAST_P asks for 113: a d of 0.11 is caught
# nine times of ten (the first token alone, 8 cells and 32 to ask for: a d of 0.08)
AUTO_TEXTS, AUTO_SLOTS = 1600, 100


def jump(rows: int, first: float) -> CostCurve:
    """One draft a sequence never pays, several do."""
    seconds = {1: 1.0, 2: first, 3: first + 0.01, 4: first + 0.02, 8: first + 1.0, 64: 60.0}
    return CostCurve({rows * n: s for n, s in seconds.items()})


@functools.cache
def masked() -> MTPModel:
    """Masks with a sampler: a distribution of its own at each depth."""
    settings = MaskedConfig(depth=3, lora_rank=4)
    made = get_mtp_model(leaning_model(vocab_size=V, initializer_range=0.05), settings)
    with torch.no_grad():
        for name, parameter in made.module.named_parameters():
            if "lora" in name or "rows" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    return made


@functools.cache
def heads() -> MTPModel:
    return get_mtp_model(leaning_model(vocab_size=V, initializer_range=0.05), HeadsConfig(depth=3))


@functools.cache
def deeper() -> MTPModel:
    model = leaning_model(vocab_size=V, initializer_range=0.05)
    return get_mtp_model(model, SequentialConfig(depth=3, initialisation="random"))


AUTO: dict[str, tuple[Callable[[], MTPModel], Callable[[], dict[str, Any]]]] = {
    "sequential": (deeper, lambda: {"draft_sample_method": "probabilistic"}),
    "sequential+lookup": (deeper, lambda: {"draft_sample_method": "probabilistic", "drafter": "mtp+lookup"}),
    "greedy+lookup": (deeper, lambda: {"drafter": "mtp+lookup"}),
    "heads": (heads, lambda: {"draft_sample_method": "probabilistic"}),
    "tree": (deeper, lambda: {"drafter": Sampling(far_VV(0.5), width=2)}),
    "masks": (masked, lambda: {"draft_sample_method": "probabilistic"}),
    "masks in two passes": (masked, lambda: {"draft_sample_method": "probabilistic", "draft_layout": "two_pass"}),
    "masks, linear+lookup": (
        masked,
        lambda: {"draft_sample_method": "probabilistic", "draft_layout": "linear", "drafter": "mtp+lookup"},
    ),
}


def adapted(case: str, first: float, new: int = 4, texts: int = AUTO_TEXTS, slots: int = AUTO_SLOTS) -> Any:
    """Sampled under "auto", on a machine where one draft never pays."""
    make, settings = AUTO[case]
    chosen = make()
    chosen._curve = jump(slots, first)
    ids = torch.tensor([PROMPT]).repeat(texts, 1)
    return chosen.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        max_new_tokens=new,
        num_draft_tokens="auto",
        return_dict_in_generate=True,
        generator=torch.Generator().manual_seed(4),
        slots=slots,
        **settings(),
    )


@pytest.mark.parametrize("case", AUTO)
def test_adaptive_lengths_follow_the_target(case):
    out = adapted(case, 1.45)
    depths = [v.depth for record in out.stats.records for v in record]
    assert max(depths) >= 2, "drafts should be long"
    seen = count(out.sequences[:, len(PROMPT) :][:, :3])
    assert p_value(seen.view(-1, V).sum(1), exact("plain", 2)) > LEAST_P
    assert p_value(seen.view(-1, V * V).sum(1), exact("plain", 1)) > LEAST_P


def peeks(self: AdaptiveLength, drafts: list[Draft]) -> list[Draft]:
    """A rule that peeks: drafts that begin with certain tokens are not verified."""
    return [d if not len(d) or d.tokens[0] % 2 else Draft(probs=[]) for d in drafts]


@pytest.mark.parametrize("case", ["sequential", "masks"])
def test_a_rule_that_peeks_is_caught(case, monkeypatch):
    monkeypatch.setattr(AdaptiveLength, "prune", peeks)
    seen = count(adapted(case, 1.45).sequences[:, len(PROMPT) :][:, :3])
    assert p_value(seen.view(-1, V).sum(1), exact("plain", 2)) < LEAST_P / 1e4


# -- the test can fail -------------------------------------------------------------------------------------------------


def keeps_all(p_BV: Tensor, q_BV: Tensor, token_B: Tensor, uniform_B: Tensor) -> Accept:
    """A wrong rule: every draft stays."""
    return torch.ones_like(token_B, dtype=torch.bool), p_BV, uniform_B


@pytest.mark.parametrize(
    ("rule", "drafter"),
    [
        (keeps_all, "probabilistic+lookup"),
        (accepts_with_p, "far"),
        (forgets_the_residual, "far"),
        (forgets_the_residual, "probabilistic+lookup"),
    ],
)
def test_a_wrong_rule_is_caught(rule, drafter, monkeypatch):
    monkeypatch.setattr(verify_module, "_accept", rule)
    seen, _ = sample("plain", 2, **DRAFTERS[drafter]())
    assert p_value(seen, exact("plain", 2)) < LEAST_P / 1e4


@pytest.mark.parametrize("drafter", ["off", "greedy+lookup"])
def test_a_number_used_twice_is_caught(drafter, monkeypatch):
    """Chosen drafts: the target's own draw at each place needs a number of its own."""
    monkeypatch.setattr(Dice, "__call__", lambda self, text, place, right=Dice.__call__: right(self, text, 0))
    seen, _ = sample("plain", 2, **DRAFTERS[drafter]())
    assert p_value(seen, exact("plain", 2)) < LEAST_P / 1e4


def test_a_drafter_that_lies_about_its_distribution_is_caught():
    class Lying(Sampling):
        """Draws from one distribution and reports another."""

        def _draft(self, *args: Any) -> Any:
            draft = super()._draft(*args)
            draft.probs = [far_VV(0.3)[0]] * len(draft)
            return draft

    seen, _ = sample("plain", 2, drafter=Lying(far_VV()), num_draft_tokens=2)
    assert p_value(seen, exact("plain", 2)) < LEAST_P / 1e4


# -- seeds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["off", "greedy", "probabilistic+lookup", "far"])
def test_a_seed_fixes_the_text(drafter):
    def text(seed: int) -> list[list[int]]:
        return generate("plain", 12, seed, texts=3, slots=2, **DRAFTERS[drafter]()).sequences.tolist()

    torch.manual_seed(1)
    first = text(4)
    torch.manual_seed(2)  # the global generator has no say
    assert text(4) == first != text(5)


def test_without_a_generator_the_global_seed_fixes_the_text():
    def text(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        ids = torch.tensor([PROMPT] * 3)
        settings = {"drafter": "mtp+lookup", "draft_sample_method": "probabilistic", "max_new_tokens": 12}
        return mtp().generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, **settings).tolist()

    sample("plain", 2, texts=2, **DRAFTERS["probabilistic"]())  # a generator of an earlier call is forgotten
    first = text(4)
    assert text(4) == first != text(5)


def test_several_texts_of_one_prompt_differ():
    ids = torch.tensor([PROMPT])
    out = mtp().generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, num_return_sequences=6, max_new_tokens=10
    )
    assert out.shape == (6, 15) and len({tuple(row) for row in out.tolist()}) > 4


def test_a_temperature_near_zero_is_greedy():
    ids = torch.tensor([PROMPT, [2, 2, 4, 6, 7]])
    greedy = mtp().model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=14)
    for settings in (DRAFTERS["probabilistic+lookup"](), {"drafter": Oracle(greedy.tolist(), (2, 0, 1), V)}):
        out = mtp().generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1e-4, max_new_tokens=14, **settings
        )
        assert out.tolist() == greedy.tolist()


# -- seeds and clocks --------------------------------------------------------------------------------------------------


def text_of(case: str, seed: int, curve: CostCurve | None, **more: Any) -> list[list[int]]:
    """Under "auto", as a process of its own would decode: nothing learned before, the machine's own speed."""
    make, settings = AUTO[case]
    chosen = make()
    chosen._curve = curve
    chosen.release()
    ids = torch.tensor([PROMPT, [2, 2, 4, 6, 7]])
    settings = {"max_new_tokens": 24, "num_draft_tokens": "auto", **settings(), **more}
    generator = torch.Generator().manual_seed(seed)
    out = chosen.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, generator=generator, **settings
    )
    return out.tolist()


class Forbids:
    """Every token, from the third new one on."""

    of_one_text = True

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        return scores_BV.masked_fill(torch.tensor(ids_BT.shape[1] >= len(PROMPT) + 2), -math.inf)


@pytest.mark.parametrize("what", [{"temperature": 1e-40}, {"logits_processor": [Forbids()]}], ids=["cold", "forbidden"])
@pytest.mark.parametrize(
    "how",
    [
        {"num_draft_tokens": 0},
        {"num_draft_tokens": 2},
        {"num_draft_tokens": 2, "drafter": "lookup"},
        {"num_draft_tokens": 2, "draft_sample_method": "probabilistic"},
        {"num_draft_tokens": 2, "policy": "typical"},
    ],
    ids=["off", "chosen", "lookup", "drawn", "typical"],
)
def test_what_makes_no_probabilities_is_said_as_transformers_does(what, how):
    asked = {"attention_mask": torch.ones(1, len(PROMPT)), "max_new_tokens": 6, "do_sample": True, **what}
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        mtp().model.generate(torch.tensor([PROMPT]), **asked)
    with pytest.raises((ValueError, RuntimeError), match="make no probabilities|probability tensor contains"):
        mtp().generate(torch.tensor([PROMPT]), **asked, **how)


@pytest.mark.parametrize("case", AUTO)
def test_a_seed_fixes_the_text_under_auto(case):
    """Whatever the clock says of this machine, and whatever was decoded before."""
    fast, slow = CostCurve({1: 1e-3, 64: 1.2e-3}, measured=True), CostCurve({1: 1e-3, 64: 1.0}, measured=True)
    first = text_of(case, 4, fast)
    assert first != text_of(case, 5, fast)
    assert text_of(case, 4, slow) == first
    make, _ = AUTO[case]
    adapted(case, 1.45, texts=3)
    make()._curve = fast
    assert text_of(case, 4, fast) == first


@pytest.mark.parametrize("policy", ["typical", "confadapt"])
def test_a_seed_fixes_lossy_texts_too(policy):
    fast, slow = CostCurve({1: 1e-3, 64: 1.2e-3}, measured=True), CostCurve({1: 1e-3, 64: 1.0}, measured=True)
    more = {"policy": policy, "draft_sample_method": "greedy"}
    assert text_of("masks", 4, fast, **more) == text_of("masks", 4, slow, **more)


def test_chosen_drafts_never_change_a_sampled_text():
    """Not even which text it is: who drafts, how much, and who decodes beside decide nothing."""
    texts = [
        text_of(case, 4, None, **more)
        for case, more in (
            ("greedy+lookup", {}),
            ("greedy+lookup", {"num_draft_tokens": 2, "slots": 1}),
            ("greedy+lookup", {"num_draft_tokens": 0}),
            ("greedy+lookup", {"drafter": "lookup", "num_draft_tokens": 5}),
        )
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3]


# -- what the caller asks of the target is asked of drawn drafts too ---------------------------------------------------

EQUAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 5},
    "all": {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
    "suppressed": {"suppress_tokens": [1, 6], "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("method", ["probabilistic", "greedy"])
@pytest.mark.parametrize("warper", EQUAL)
def test_a_module_equal_to_the_target_is_kept(warper, method):
    """Two passes: the first draft is the target's own token, drawn as the target draws it."""
    ids = torch.tensor([PROMPT]).repeat(60, 1)
    out = masked().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        max_new_tokens=5,
        return_dict_in_generate=True,
        generator=torch.Generator().manual_seed(1),
        num_draft_tokens=2,
        draft_layout="two_pass",
        draft_sample_method=method,
        **{"top_k": 0, **EQUAL[warper]},
    )
    kept = [v.accepted >= 1 for record in out.stats.records for v in record[:-1]]
    assert sum(kept) / len(kept) > (0.8 if warper == "suppressed" else 0.999), "penalties are left to the target"


def test_drawn_drafts_that_are_always_kept_are_drafted_long():
    """They seldom agree with an independent draw, which is not what counts."""
    out = adapted("equal", 2.1, new=12, texts=20, slots=1)
    assert out.stats.tau > 2.5


def equal_VV() -> Tensor:
    """Nearly the target's own next-token distribution: it leans on the last token."""
    with torch.no_grad():
        texts = torch.tensor([[*PROMPT[:-1], token] for token in range(V)])
        return mtp().model(texts).logits[:, -1].softmax(-1)


AUTO["equal"] = (deeper, lambda: {"drafter": Sampling(equal_VV(), width=1)})
