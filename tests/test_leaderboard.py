"""benchmarks/leaderboard.py: its budget, its search, what it goes on from, its ranks and its document."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
leaderboard = importlib.import_module("leaderboard")


def jobs_of(tmp_path):
    return leaderboard.Jobs(leaderboard.LeaderboardSettings(work=str(tmp_path)))


def fake(best, ran):
    """A training whose tau is best at one rate."""

    def run(spec):
        ran.append(spec)
        if spec["entry"] == "broken":
            return {"error": "ValueError: no"}
        tau = 2.0 - abs(spec["lr"] - best) * 100 + spec["seed"] / 10
        return {"tau": tau, "answer_tokens": 500, "seconds": spec["seconds"], "parameters": 7, "memory_bytes": 10**8}

    return run


def test_the_search_counts_and_nothing_is_done_twice(tmp_path):
    ran: list = []
    given = ("demo", 1e-3, 100.0, 2, tmp_path / "module")
    found = leaderboard.searched(jobs_of(tmp_path), fake(3e-3, ran), *given)
    assert found["learning_rate"] == pytest.approx(3e-3) and len(found["search"]) == 3
    assert found["tau_of_seeds"] == pytest.approx([2.0, 2.1])
    seed_0 = [spec for spec in ran if spec["seed"] == 0]
    assert sum(spec["seconds"] for spec in seed_0) == pytest.approx(100)  # search and training of one seed
    assert [spec["folder"] is not None for spec in ran] == [False] * 3 + [True, False]
    again: list = []
    assert leaderboard.searched(jobs_of(tmp_path), fake(3e-3, again), *given) == found and again == []
    flat = leaderboard.searched(jobs_of(tmp_path), lambda spec: fake(spec["lr"], [])(spec), "flat", *given[1:])
    assert flat["learning_rate"] == pytest.approx(1e-3), "rates that are as good: the preset's own"
    broken = leaderboard.searched(jobs_of(tmp_path), fake(3e-3, again), "broken", 1e-3, 100.0, 1, tmp_path / "x")
    assert broken == {"error": "ValueError: no"}


def test_how_economize_decodes_is_decided_once(tmp_path):
    """A clock decides, and rounds of an interrupted run are of what it said then."""
    peer, told = object.__new__(leaderboard.Peer), [2, 3]
    peer.load = lambda *_: {"cycle": told.pop(0)}
    spec = {"cycle of": "economize mtp"}
    found = [jobs_of(tmp_path).of(spec, peer.cycle("mtp", "folder"))["cycle"] for _ in range(2)]
    assert found == [2, 2] and told == [3]


def way(name, ratio, width=0.1, equal=True):
    ratios = {"ratio": ratio, "low": ratio - width, "high": ratio + width}
    known = {"times_transformers": ratios, "by_category": {"a": ratio}, "tau": 1.5} if equal else {}
    return {"name": name, "equal": equal, **known}


def test_ranks_are_those_that_the_intervals_allow():
    ways = [way("a", 2.0), way("b", 1.9), way("c", 1.0), way("d", 9.0, equal=False)]
    assert leaderboard.ranks(ways) == {"a": "1 to 2", "b": "1 to 2", "c": "3"}


def result():
    entries = {
        "demo": leaderboard_entry(800.0),
        "economize mtp": leaderboard_entry(50.0),
        "uno": {"error": "ValueError: no"},
    }
    ways = [way("demo", 1.8), way("lookup", 1.7), way("transformers", 1.0, 0), way("economize mtp", 0.9)]
    batch = {"batch_size": 1, "repeats": 3, "prompts": 8, "ways": [*ways, way("medusa", 0, equal=False)]}
    made = {
        "model": "M",
        "answers": {"rows": 5, "tokens": 50},
        "settings": {"threads": 1},
        "seconds_each": 60.0,
        "entries": entries,
    }
    return made | {"batches": [batch, batch | {"batch_size": 4}]}


def leaderboard_entry(pace):
    about = {"learning_rate": 1e-3, "tau_of_seeds": [1.5, 1.7], "parameters": 4_000_000, "memory_bytes": 3e8}
    return about | {"tokens_a_second": pace}


def test_the_document_says_what_was_found(tmp_path):
    found = result()
    found["against_economize"] = leaderboard.against(found)
    assert found["against_economize"]["times_faster"] == pytest.approx(2.0)
    assert found["against_economize"]["times_faster_training"] == pytest.approx(16.0)
    leaderboard.document(found, tmp_path / "docs" / "leaderboard.md")
    text = (tmp_path / "docs" / "leaderboard.md").read_text()
    for said in (
        "| demo | 1.80 | 1.70 to 1.90 | 1.50 | 1 to 2 |",
        "| medusa | other tokens, so no speed |",
        "| uno | not trained: ValueError: no |",
        "1.600 (1.50 to 1.70, 2 seeds) | 4,000,000 | 300 | 800 |",
        "2.00 times as much",
        "16.0 times as many",
        "## What this does not say",
    ):
        assert said in text
    assert "<svg" in (tmp_path / "docs" / "leaderboard.svg").read_text()


def test_every_entry_is_a_module_that_a_frozen_target_can_have():
    from tiny import tiny_model

    from foretell.methods.base import load_preset
    from foretell.mtp import get_mtp_model

    torch.manual_seed(0)
    for name, (preset, module, training) in leaderboard.ENTRIES.items():
        settings, learned = leaderboard.settings_of(name, 8)
        settings["draft_vocab_size"] = settings.get("draft_vocab_size") and 16
        mtp = get_mtp_model(tiny_model(num_hidden_layers=8), {k: v for k, v in settings.items() if v is not None})
        assert learned["mtp_training_mode"] == "standalone", name
        assert mtp.mtp_config.method == (module.get("method") or load_preset(preset)["module"]["method"])
        assert not set(learned) & set(leaderboard.SCHEDULE) and training.items() <= learned.items()
