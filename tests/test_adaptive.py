"""Adaptive draft length: stops where drafts fail, goes long where they hold, comes back when the text changes."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drafters import Branching, Oracle, Wrong, knowing_mtp, leaning_model

from foretell.decoding.adaptive import AdaptiveLength, CostCurve
from foretell.decoding.stats import GenerationStats
from foretell.models import kernels
from foretell.mtp import MTPModel
from foretell.types import Draft, SequenceState

NEW = 200
# seconds against rows. Real drafting takes microseconds here, so that these curves alone decide
FLAT = CostCurve({1: 1.0, 64: 1.2}, measured=True)
MILD = CostCurve({1: 1.0, 64: 1.0 + 0.1 * 63}, measured=True)
STEEP = CostCurve({1: 1.0, 64: 1.0 + 0.3 * 63}, measured=True)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Rounds take what the curve says, times what a test puts here for rounds with drafts."""
    learn, surprise = AdaptiveLength.learn, [1.0]

    def by_the_curve(self, drafts, emitted, names, rows, seconds=None):
        taken = self.curve(rows) * (surprise[0] if rows > len(emitted) else 1.0)
        learn(self, drafts, emitted, names, rows, taken)

    monkeypatch.setattr(AdaptiveLength, "learn", by_the_curve)
    return surprise


@functools.cache
def mtp() -> MTPModel:
    return knowing_mtp(leaning_model())


@functools.cache
def truth(batch: int = 1) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    ids = torch.arange(5, 5 + 4 * batch).view(batch, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted = mtp().model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return inputs, wanted.tolist()


def decode(
    make: Callable[[list[list[int]]], Any], curve: CostCurve, batch: int = 1, slots: int = 64
) -> tuple[GenerationStats, Any]:
    """Decode with num_draft_tokens="auto"; lossless every time."""
    inputs, wanted = truth(batch)
    mtp()._curve = curve
    drafter = make(wanted)
    out = mtp().generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        num_draft_tokens="auto",
        drafter=drafter,
        slots=slots,
        return_dict_in_generate=True,
    )
    assert out.sequences.tolist() == wanted
    return out.stats, drafter


def seconds(stats: GenerationStats, curve: CostCurve) -> float:
    """What a batch of one took, by the curve."""
    return sum(curve(1 + drafted) for drafted in stats.drafted[0])


def says(confidence: float, make: Callable[..., Any], *args: Any) -> Callable[[list[list[int]]], Any]:
    """The drafter, with another opinion of itself."""

    def made(wanted: list[list[int]]) -> Any:
        drafter = make(wanted, *args)
        drafter.confidence = confidence
        return drafter

    return made


# -- the cost curve ----------------------------------------------------------------------------------------------------


def test_cost_curve_interpolates_what_was_measured():
    curve = CostCurve({4: 3.0, 1: 1.0, 2: 2.0, 8: 2.5, 16: 5.0})
    assert [curve(n) for n in (1, 2, 3, 4, 6, 8, 12, 16)] == [1.0, 2.0, 2.5, 3.0, 2.75, 2.5, 3.75, 5.0]
    assert curve(0) == 1.0
    assert curve(32) == 10.0, "beyond what was measured, in proportion"


def test_a_curve_falls_by_more_than_noise_only():
    assert CostCurve.smooth([1.05, 1.0, 1.2, 3.0]) == [1.0, 1.0, 1.2, 3.0]
    assert CostCurve.smooth([30.0, 60.0, 75.0, 20.0, 21.0]) == [30.0, 60.0, 75.0, 20.0, 21.0], "one row takes 30"
    assert CostCurve.smooth([1.0, 1.05, 1.02, 1.0]) == [1.0] * 4
    busy = [28.0, 44.0, 53.0, 42.0, 57.0]
    assert CostCurve.smooth(busy, quiet=False) == [28.0, 42.0, 42.0, 42.0, 57.0], "a disturbed clock does not say so"


def test_measured_curve_is_a_curve_of_the_target(monkeypatch, tmp_path):
    monkeypatch.setenv("FORETELL_CACHE", str(tmp_path))
    model = mtp().target
    curve = CostCurve.measure(model, context=16, repeats=1)
    assert all(0 < curve(n) < 5 for n in range(1, 70)) and curve.measured
    monkeypatch.setattr(type(model), "forward_rows", None)  # a second process does not measure
    monkeypatch.setattr(kernels, "_known", {})
    assert CostCurve.measure(mtp().target, context=16, repeats=1).seconds == curve.seconds
    with pytest.raises(TypeError):
        CostCurve.measure(mtp().target, context=17, repeats=1)
    (file,) = tmp_path.iterdir()
    for wrong in ("[]", json.dumps([1.0] * 11 + [-1.0]), json.dumps([1] * 12), "3"):
        found = json.loads(file.read_text())
        one = {"value": json.loads(wrong), "lost": 0.0, "times": 1, "when": 0.0}
        file.write_text(json.dumps(found | {"curves": dict.fromkeys(found["curves"], one)}))
        monkeypatch.setattr(kernels, "_known", {})
        with pytest.raises(TypeError), pytest.warns(UserWarning, match="measured again"):
            CostCurve.measure(mtp().target, context=16, repeats=1)


# -- behaviour over many rounds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("curve", [FLAT, STEEP], ids=["flat", "steep"])
def test_stops_where_all_drafts_fail(curve, confidence):
    stats, drafter = decode(says(confidence, Wrong), curve)
    drafted = stats.drafted[0]
    assert len(drafted) == NEW and sum(stats.accepted[0]) == 0
    assert seconds(stats, curve) < 1.05 * NEW * curve(1)
    # what is drafted and thrown away costs too; where a row costs next to nothing, trying is right for a while
    assert sum(drafted) <= drafter.proposed < (30 if curve is STEEP else 2 * NEW)
    # it goes on looking, now and then
    assert drafter.proposed > drafter.proposed_at[len(drafter.proposed_at) // 2]


@pytest.mark.parametrize("confidence", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("curve", [FLAT, STEEP], ids=["flat", "steep"])
def test_drafts_long_where_all_is_accepted(curve, confidence):
    """Also where the drafter doubts itself: what was accepted counts for more than what it says."""
    stats, _ = decode(says(confidence, Oracle), curve)
    last = sorted(v.accepted for v in stats.records[0][-10:-1])
    assert last[1] >= (8 if curve is FLAT else 3), stats.accepted[0]  # now and then a round without drafts: the clock
    assert seconds(stats, curve) < (0.2 if curve is FLAT else 0.6) * NEW * curve(1)


@pytest.mark.parametrize("times_slower", [1.0, 12.0])
def test_the_clock_decides_where_the_curve_was_wrong(times_slower, clock):
    """Drafts hold, but a round with drafts takes far longer than its rows should: the caches were cold, say."""
    clock[0] = times_slower
    stats, _ = decode(lambda wanted: Oracle(wanted, (2, 0)), FLAT)
    rounds = stats.drafted[0]
    if times_slower == 1.0:
        assert sum(d > 0 for d in rounds) > 0.9 * len(rounds)
    else:
        assert sum(d > 0 for d in rounds) < 0.1 * len(rounds), "12 times slower is more than 9 tokens can bring back"


@pytest.mark.parametrize("curve", [FLAT, STEEP], ids=["flat", "steep"])
def test_comes_back_when_the_text_changes(curve):
    stats, _ = decode(lambda wanted: Changing(wanted, {0: 4 + 80}), curve)
    assert sum(stats.accepted[0][:80]) == 0
    assert sum(stats.accepted[0][80:]) > (80 if curve is FLAT else 20), stats.accepted[0]


class Changing(Oracle):
    """Wrong up to a place in each sequence's text, right after it. Sequences without a place get no drafts at all."""

    def __init__(self, wanted: list[list[int]], places: dict[int, int]) -> None:
        super().__init__(wanted)
        self.places = places

    def chain(self, sequence: SequenceState, length: int) -> list[int]:
        if sequence.index not in self.places:
            return []
        self.script = [10**6 if len(sequence.tokens) > self.places[sequence.index] else 0]
        return super().chain(sequence, length)


@pytest.mark.parametrize("drafts_for", [0, 1])
def test_a_drafter_that_serves_one_sequence_of_the_batch_comes_back_too(drafts_for):
    """The first sequence of a batch may never have any. Others wait: each token is worth the same."""
    served = range(drafts_for, 6, 2)
    stats, _ = decode(lambda wanted: Changing(wanted, dict.fromkeys(served, 4 + 80)), MILD, batch=6, slots=2)
    assert sum(sum(stats.drafted[b]) for b in range(6) if b not in served) == 0
    assert sum(sum(stats.accepted[b]) for b in served) > 60, stats.accepted


def test_the_slowest_of_a_batch_decides():
    """Nobody waits for a slot: who ends early saves a row, and drafts cost rows of all."""
    alone, _ = decode(lambda wanted: Changing(wanted, {0: 4}), MILD, batch=2)
    assert sum(alone.drafted[0]) < 20
    both, _ = decode(lambda wanted: Changing(wanted, {0: 4, 1: 4}), MILD, batch=2)
    assert sum(both.accepted[0]) > 100 and sum(both.accepted[1]) > 100


def test_the_half_that_gains_least_counts():
    """Of those that may end last, by how likely they are: the mean gain of the worst half of that chance."""
    one = AdaptiveLength(MILD, 8)
    one._last, one._shares = [0.5, 0.25, 0.125, 0.125], (0.0, 1.0)
    assert one._value([3.0, 1.0, 2.0, 5.0]) == pytest.approx((0.25 * 1 + 0.125 * 2 + 0.125 * 3) / 0.5)
    assert one._value([3.0, 1.0, 2.0, 5.0], 1.0) == pytest.approx(0.5 * 3 + 0.25 * 1 + 0.125 * 2 + 0.125 * 5)
    one._shares = (1.0, 0.0)
    assert one._value([3.0, 1.0, 2.0, 5.0]) == 11.0


def test_trees_are_lossless_and_pruned():
    stats, drafter = decode(lambda wanted: Branching(wanted, (3, 0, 1)), STEEP)
    assert sum(stats.accepted[0]) > 0 and sum(stats.drafted[0]) < drafter.proposed


def test_the_module_and_lookup_are_lossless():
    for curve in (FLAT, STEEP):
        stats, _ = decode(lambda wanted: "mtp+lookup", curve, batch=2)
        assert stats.tau > 1.2


# -- pruning -----------------------------------------------------------------------------------------------------------


def random_draft(rng: random.Random, size: int) -> Draft:
    draft = Draft()
    for i in range(size):
        draft.tokens.append(100 * i + rng.randrange(50))
        draft.parents.append(rng.choice([-1, *range(i)]))
        draft.confidence.append(rng.random())
        draft.sources.append(rng.choice(["a", "b", "a+b"]))
    return draft


def test_pruning_keeps_parents_and_what_belongs_to_a_token():
    rng = random.Random(0)
    sizes = set()
    for _ in range(200):
        adaptive = AdaptiveLength(rng.choice([FLAT, STEEP]), 8)
        draft = random_draft(rng, rng.randint(0, 9))
        whole = list(zip(draft.tokens, draft.parents, draft.confidence, draft.sources))
        kept = adaptive.prune([draft])[0]
        sizes.add(len(kept))
        at = [token // 100 for token in kept.tokens]  # where each token stood
        assert at == sorted(set(at))
        for i, (old, parent) in enumerate(zip(at, kept.parents, strict=True)):
            assert (-1 if parent < 0 else at[parent]) == draft.parents[old] and parent < i
            assert (kept.tokens[i], kept.confidence[i], kept.sources[i]) == (
                whole[old][0],
                whole[old][2],
                whole[old][3],
            )
    assert min(sizes) == 0 and len(sizes) > 4


def test_pruning_takes_the_most_gain():
    """Against the definition: of all numbers of rows the one with most expected tokens, less what their time brings."""
    rng, sizes = random.Random(1), set()
    for _ in range(100):
        adaptive, draft = AdaptiveLength(STEEP, 8), random_draft(rng, 7)
        adaptive.begin_round([100])
        adaptive._speed[1] = speed = rng.uniform(1.0, 2.0)
        chances = sorted(adaptive.chances(draft), reverse=True)
        gains = [sum(chances[:m]) - speed * (STEEP(1 + m) - STEEP(1)) for m in range(8)]
        sizes.add(len(adaptive.prune([draft])[0]))
        assert len(adaptive.prune([draft])[0]) == gains.index(max(gains))
    assert len(sizes) > 3


def test_no_draft_reaches_beyond_the_last_token():
    adaptive = AdaptiveLength(FLAT, 8)
    assert adaptive.begin_round([100, 5, 1, 0]) == [8, 4, 0, 0]
    stats, _ = decode(lambda wanted: Oracle(wanted), FLAT)
    left = NEW
    for verification in stats.records[0]:
        assert verification.depth < left
        left -= verification.emitted


def test_chances_multiply_along_a_branch():
    draft = Draft([1, 2, 3], [-1, 0, -1], None, [0.5, 0.4, 0.3], ["a", "a", "b"])
    assert AdaptiveLength(FLAT, 8).chances(draft) == pytest.approx([0.5, 0.2, 0.3])


# -- drawn drafts ------------------------------------------------------------------------------------------------------


def drawn(tokens: list[int], parents: list[int], confidence: float) -> Draft:
    return Draft(tokens, parents, [torch.ones(50) / 50] * len(tokens), [confidence] * len(tokens), ["a"] * len(tokens))


def test_what_was_drawn_has_no_say():
    """Neither in the chances, nor in going on, nor in what is verified: also of argmax drafts below and beside it."""
    for curve in (FLAT, MILD, STEEP, CostCurve({1: 1.0, 2: 3.0, 3: 3.1, 4: 3.2, 64: 60.0})):
        said = set()
        for confidence in (0.001, 0.5, 0.999):
            adaptive = AdaptiveLength(curve, 8, steps={})
            adaptive.begin_round([100])
            asked = []
            for size in range(5):
                draft = drawn(list(range(size)), list(range(-1, size - 1)), confidence)
                draft.add(7, size - 1, confidence, "b")  # an argmax draft below, which knows what was drawn
                asked.append(adaptive.worth("a", [drawn(draft.tokens[:size], draft.parents[:size], confidence)]))
            beside = adaptive.worth("b", [Draft()], [draft])
            assert adaptive.prune([draft]) == [draft]
            said.add((str(asked), str(beside), tuple(adaptive.chances(draft)), tuple(adaptive._ends(draft))))
        assert len(said) == 1, said


def test_drawn_drafts_are_learned_as_the_overlap():
    """Of a module that is the target itself each draft would be kept, however seldom two draws agree."""
    adaptive = AdaptiveLength(CostCurve({1: 1.0, 4: 2.0, 64: 60.0}), 3, steps={})
    for _ in range(60):
        adaptive.begin_round([100])
        draft = drawn([1, 2, 3], [-1, 0, 1], 0.1)
        draft.shares = {0: 1.0, 1: 1.0}
        adaptive.learn([draft], [[1, 9]], {}, 4)
    assert adaptive._holds("a", 1) > 0.9 and adaptive._holds("a", 2) > 0.9
    adaptive.begin_round([100])
    asked = [adaptive.worth("a", [drawn([1] * n, list(range(-1, n - 1)), 0.1)]) for n in range(4)]
    assert asked == [[True], [True], [True], [False]]


def test_by_counts_no_clock_is_asked():
    """The same rounds at another speed: the same decisions."""
    said = []
    for speed in (1e-6, 1.0):
        adaptive = AdaptiveLength(MILD, 8, steps={"a": 0.2})
        for turn in range(40):
            adaptive.begin_round([100, 100], [1.5, 1.2])
            asked = [adaptive.worth("a", [drawn([1] * n, list(range(-1, n - 1)), 0.3)] * 2) for n in (0, 1, 2)]
            said.append((turn, asked))
            drafts = [drawn([1, 2], [-1, 0], 0.3) for _ in range(2)]
            drafts[0].shares, drafts[1].shares = {0: 0.7, 1: 0.4}, {0: 0.5}
            adaptive.learn(drafts, [[1, 2, 4], [5]], {"a": (speed, 2)}, 6, speed * turn)
    assert said[:40] == said[40:]
