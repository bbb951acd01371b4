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
from foretell.methods.sequential import SequentialConfig
from foretell.mtp import MTPModel, get_mtp_model

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


# -- the test can fail -------------------------------------------------------------------------------------------------


def keeps_all(token: int, q_V: Tensor | None, p_V: Tensor, generator: Any) -> tuple[bool, Tensor]:
    """A wrong rule: every draft stays."""
    return True, p_V


def accepts_with_p(token: int, q_V: Tensor | None, p_V: Tensor, generator: Any) -> tuple[bool, Tensor]:
    """A wrong rule: min(1, p) in place of min(1, p / q), with the residual of the right one."""
    if torch.rand((), generator=generator) < p_V[token]:
        return True, p_V
    left_V = (p_V - q_V).clamp(min=0)
    return False, left_V / left_V.sum()


def forgets_the_residual(token: int, q_V: Tensor | None, p_V: Tensor, generator: Any) -> tuple[bool, Tensor]:
    """A wrong rule: after a refusal the target draws as if nothing had been proposed."""
    q = 1.0 if q_V is None else q_V[token]
    return bool(torch.rand((), generator=generator) * q < p_V[token]), p_V


@pytest.mark.parametrize(
    ("rule", "drafter"),
    [
        (keeps_all, "greedy"),
        (keeps_all, "lookup"),
        (keeps_all, "probabilistic"),
        (accepts_with_p, "far"),
        (forgets_the_residual, "greedy"),
        (forgets_the_residual, "far"),
        (forgets_the_residual, "probabilistic+lookup"),
    ],
)
def test_a_wrong_rule_is_caught(rule, drafter, monkeypatch):
    monkeypatch.setattr(verify_module, "_accept", rule)
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


@pytest.mark.parametrize("drafter", ["off", "greedy", "probabilistic", "probabilistic+lookup", "far"])
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
