"""A while of tests/fuzz.py in every run of the suite, the same seeds each time; it can find something."""

from __future__ import annotations

import collections
import random
import warnings

import fuzz
import pytest


@pytest.mark.parametrize("part", range(4))
def test_calls_between_which_the_live_model_changes(part):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = fuzz.fuzz(first=10_000 * part, seconds=7.0)
    assert counts["equal"] > 0.8 * counts["cases"] > 0, counts  # refusals are few: most cases really decode


def test_a_copy_that_keeps_what_it_saw_first_is_found(monkeypatch):
    """The fuzz is red where the copy is never made anew."""
    from foretell.models.target import Target

    noticed = Target._noticed

    def once(self):
        return noticed(self) if self._copy is None or self._copy.tree is None else self._copy.tree

    def forty():
        for seed in range(40):
            fuzz.run_chain(seed, collections.Counter())

    monkeypatch.setattr(Target, "_noticed", once)
    monkeypatch.setattr(fuzz, "CHANGES", [fuzz.write_data, fuzz.optimizer_step, fuzz.switch_adapter])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AssertionError, match=r"seed \d+"):
            forty()


def test_a_seed_draws_the_same_case_again():
    drawn = [fuzz.draw_settings(random.Random(5)) for _ in range(2)]
    assert drawn[0] == drawn[1]
