"""foretell verify: it says yes to what is lossless, and no to each planted fault, with the place."""

from __future__ import annotations

import json

import pytest
import torch
from test_evaluate import place  # noqa: F401 (a fixture)

from foretell.cli import main
from foretell.decoding import loop
from foretell.decoding import verify as verify_module
from foretell.evaluation.losslessness import _below, _cells, _power, _quantile, chi_square, leaning, least_deviation
from foretell.types import Verdict


def words(place, *more: str) -> list[str]:  # noqa: F811
    given = ["verify", str(place / "model"), "--module", str(place / "module"), "--limit", "2"]
    given += ["--prompts", str(place / "rows.jsonl"), "--max-new-tokens", "16", "--contexts", "2"]
    return [*given, "--output", str(place / "verify.json"), *more]


def test_yes(place, capsys):  # noqa: F811
    assert main(words(place, "--samples", "256")) == 0
    found = json.loads((place / "verify.json").read_text())
    said = capsys.readouterr().out
    assert found["lossless"] and found["weights_equal"] and found["logits_equal"] and "NOT" not in said
    assert {one["way"] for one in found["greedy"]} >= {"drafting off", "lookup, auto", "mtp, 3", "mtp+lookup, auto"}
    assert all(one["equal"] == one["answers"] == 6 for one in found["greedy"])  # 3 prompts, alone and in a batch
    tests = found["sampled"]["tests"]
    assert {"mtp, auto, probabilistic", "mtp, 2, greedy"} <= {test["way"] for test in tests}
    assert 0 < found["sampled"]["smallest_deviation"] < 0.5 and found["sampled"]["planted_caught"] > 0.85


def test_a_greedy_fault_is_named(place, monkeypatch, capsys):  # noqa: F811
    def keeps_all(draft, argmax):
        path = list(range(len(draft))) if draft.parents == list(range(-1, len(draft) - 1)) else []
        return Verdict(path, argmax[len(path)])

    monkeypatch.setattr(loop, "verify_greedy", keeps_all, raising=False)
    monkeypatch.setattr(verify_module, "verify_greedy", keeps_all)
    assert main(words(place, "--samples", "0")) == 1
    found = json.loads((place / "verify.json").read_text())
    wrong = {one["way"] for one in found["greedy"] if one["faults"]}
    assert "drafting off" not in wrong and wrong >= {"lookup, 3 drafts", "mtp, 3"}
    said = capsys.readouterr().out
    assert "NOT LOSSLESS" in said and "the model alone says" in said and "rows/" in said


def test_a_wrong_rule_of_sampling_is_caught(place, monkeypatch, capsys):  # noqa: F811
    def keeps_all(p_BV, q_BV, token_B, uniform_B):
        return torch.ones_like(token_B, dtype=torch.bool), p_BV, uniform_B

    monkeypatch.setattr(verify_module, "_accept", keeps_all)
    assert main(words(place, "--samples", "256", "--contexts", "1")) == 1
    tests = json.loads((place / "verify.json").read_text())["sampled"]["tests"]
    passed = {test["way"]: test["passed"] for test in tests}
    assert passed["drafting off"] and not passed["mtp, 3, probabilistic"]
    assert "sampled, mtp, 3, probabilistic: p =" in capsys.readouterr().out


def test_changed_weights_are_seen(place, monkeypatch, capsys):  # noqa: F811
    from foretell.mtp import MTPModel

    real = MTPModel.generate

    def spoils(self, *args, **kwargs):
        with torch.no_grad():
            next(self.model.parameters())[0, 0] += 1e-3
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MTPModel, "generate", spoils)
    assert main(words(place, "--samples", "0")) == 1
    assert "the model's weights have changed" in capsys.readouterr().out


# -- the statistics ----------------------------------------------------------------------------------------------------

FLAT = {(i,): 1 / 8 for i in range(8)}


def test_chi_square_agrees_with_known_quantiles():
    # of tables that every textbook prints
    for freedom, p, x in ((1, 0.95, 3.841), (5, 0.99, 15.086), (10, 0.95, 18.307), (100, 0.99, 135.807)):
        assert _quantile(p, freedom) == pytest.approx(x, abs=2e-3) and _below(x, freedom) == pytest.approx(p, abs=1e-4)
    assert _power(0.0, 5, _quantile(0.99, 5)) == pytest.approx(0.01, abs=1e-6)


def test_power_is_what_a_simulation_finds():
    generator, limit = torch.Generator().manual_seed(1), _quantile(0.99, 5)
    z = torch.randn(20000, 5, generator=generator, dtype=torch.float64)
    z[:, 0] += 12.0**0.5
    assert _power(12.0, 5, limit) == pytest.approx(float((z.square().sum(1) > limit).double().mean()), abs=0.015)


def test_the_statistic_is_pearsons_and_knows_the_impossible():
    from collections import Counter

    counts = Counter({(0,): 180, **{(i,): 100 for i in range(1, 7)}, (7,): 20})
    found = chi_square([counts], [FLAT])
    assert found["chi_square"] == pytest.approx((80**2 + 80**2) / 100) and found["freedom"] == 7
    assert chi_square([Counter({(9,): 3, (0,): 5})], [FLAT])["impossible"] == 3


def test_rare_outcomes_share_a_cell():
    chances = {(0,): 0.001, (1,): 0.9, (2,): 0.002, (3,): 0.096, (4,): 0.001}
    cells = _cells(chances, 1000)
    assert [sorted(cell) for cell in cells] == [[(0,), (2,), (3,), (4,)], [(1,)]]  # each of at least 5 expected samples
    assert _cells(chances, 10) == [sorted(chances, key=chances.get)]


def test_the_least_deviation_is_the_least():
    some = {(0,): 0.6, (1,): 0.3, (2,): 0.1}
    found = least_deviation([some] * 2, 500, 0.01)
    assert 0.88 < found["planted_caught"] <= 1.0
    fewer = least_deviation([some] * 2, 2000, 0.01)["smallest_deviation"]
    assert fewer == pytest.approx(found["smallest_deviation"] / 2, rel=0.15)  # with the root of the samples
    assert sum(leaning(some, 0.25).values()) == pytest.approx(1) and leaning(some, 0.25)[(0,)] == pytest.approx(0.7)
