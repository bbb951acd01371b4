"""Prompt lookup against its definition, and the merging of two drafts into one tree."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from drafters import knowing_mtp, leaning_model

from foretell.decoding.arguments import Plan
from foretell.decoding.compose import Composed, merge
from foretell.decoding.lookup import History, PromptLookup
from foretell.types import Draft, SequenceState


def by_definition(tokens: list[int], length: int, longest: int, shortest: int) -> list[int]:
    """What followed the last occurrence of the longest end of the text that stood before."""
    for n in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                return tokens[end : end + length]
    return []


@pytest.mark.parametrize(("longest", "shortest"), [(3, 2), (1, 1), (4, 1), (2, 2)])
def test_lookup_is_its_definition(longest, shortest):
    """Texts grow by several tokens a round, come and go, and move to other slots."""
    rng, found = random.Random(longest), 0
    lookup = PromptLookup(longest, shortest)
    lookup.open(3, 100)
    active: list[SequenceState] = []
    for _ in range(150):
        while len(active) < 3:
            text = [rng.randrange(4) for _ in range(rng.randint(1, 9))]
            active.append(SequenceState(text, len(text), 0, slot=len(active)))
            lookup.start(len(active) - 1)
        lengths = [rng.randint(0, 4) for _ in active]
        for draft, sequence, length in zip(lookup.draft(active, lengths), active, lengths, strict=True):
            assert draft.tokens == by_definition(sequence.tokens, length, longest, shortest)
            assert draft.parents == list(range(-1, len(draft) - 1)) and draft.probs is None
            assert len(draft.confidence) == len(draft.sources) == len(draft)
            found += len(draft) > 0
            sequence.tokens += [rng.randrange(4) for _ in range(rng.randint(1, 4))]
        slot = rng.randrange(3)
        if len(active[slot].tokens) > 40:
            last = active.pop()
            if last.slot != slot:
                lookup.move(last.slot, slot, len(last.tokens) - 1)
                last.slot, active[slot] = slot, last
    assert found > 60


@pytest.mark.parametrize(("longest", "shortest"), [(0, 0), (2, 3), (3, 0)])
def test_bad_ngrams(longest, shortest):
    with pytest.raises(ValueError, match="wanted 1 <= min_ngram <= max_ngram"):
        PromptLookup(longest, shortest)


# -- merging -----------------------------------------------------------------------------------------------------------


def draft(source: str, tokens: list[int], parents: list[int] | None = None, probs: list | None = None) -> Draft:
    parents = list(range(-1, len(tokens) - 1)) if parents is None else parents
    return Draft(tokens, parents, probs, [0.1 * len(source)] * len(tokens), [source] * len(tokens))


def branches(of: Draft) -> set[tuple[int, ...]]:
    """The tokens of every path from the root, of every length."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(of.tokens, of.parents, strict=True):
        paths.append((*(() if parent < 0 else paths[parent]), token))
    return set(paths)


def test_shared_beginnings_are_one_row():
    into = Draft()
    merge(into, draft("a", [1, 2, 3]))
    merge(into, draft("bb", [1, 2, 4, 5]))
    assert into.tokens == [1, 2, 3, 4, 5] and into.parents == [-1, 0, 1, 1, 3]
    assert into.sources == ["a+bb", "a+bb", "a", "bb", "bb"]
    assert into.confidence == pytest.approx([0.2, 0.2, 0.1, 0.2, 0.2])


def test_a_merged_tree_has_the_branches_of_both():
    rng = random.Random(0)
    for _ in range(300):
        parts = []
        for source in ("a", "b", "c"):
            size = rng.randint(0, 6)
            parents = [rng.choice([-1, *range(i)]) for i in range(size)]
            parts.append(draft(source, [rng.randrange(3) for _ in range(size)], parents))
        into = Draft()
        for part in parts:
            merge(into, part)
        assert branches(into) == set().union(*map(branches, parts))
        assert len(into) == len(branches(into)), "no branch stands twice"
        assert all(parent < i for i, parent in enumerate(into.parents))


def test_sampled_and_chosen_tokens_stay_apart():
    """They are accepted by different rules, so the same token may stand twice, each with its own probabilities."""
    q = torch.tensor([0.0, 0.5, 0.5])
    for parts in (
        [draft("m", [1, 2], probs=[q, q]), draft("l", [1, 2])],
        [draft("l", [1, 2]), draft("m", [1, 2], probs=[q, q])],
    ):
        into = Draft()
        for part in parts:
            merge(into, part)
        assert into.tokens == [1, 2, 1, 2] and into.parents == [-1, 0, -1, 2]
        assert [p is None for p in into.probs] == [p is None for part in parts for p in (part.probs or [None] * 2)]


def test_a_composition_passes_everything_on():
    class Told:
        name, calls, generator = "told", 2, None

        def __init__(self) -> None:
            self.heard: list[tuple] = []

        def __getattr__(self, name: str):
            return lambda *args: self.heard.append((name, *args))

        def draft(self, sequences, lengths, worth=None):
            return [draft("told", [7]) for _ in sequences]

    told, lookup = Told(), PromptLookup()
    both = Composed([told, lookup])
    assert both.name == "told+lookup" and both.calls == 2
    both.open(2, 9)
    both.start(1)
    both.move(1, 0, 4)
    both.observe([], None, [])
    assert told.heard == [("open", 2, 9), ("start", 1), ("move", 1, 0, 4), ("observe", [], None, [])]
    both.generator = generator = torch.Generator()
    assert told.generator is both.generator is generator
    sequence = SequenceState([1, 2, 3, 1, 2], 5, 0, slot=0)
    both.start(0)
    assert branches(both.draft([sequence], [1])[0]) == {(7,), (3,)}
    with pytest.raises(ValueError, match="got no drafters"):
        Composed([])


# -- history -----------------------------------------------------------------------------------------------------------


def test_history_is_bounded_and_forgets_the_oldest():
    rng, history = random.Random(3), History()
    texts = [[rng.randrange(1000) for _ in range(rng.randint(1, 60))] for _ in range(40)]
    for text in texts:
        history.add(text, 100)
    known: list[list[int]] = []
    for text in reversed(texts):
        known.append(text)
        if sum(map(len, known)) > 100:
            known.pop()
            break
    lookup = PromptLookup(history=history)
    lookup.open(1, 9)
    for text in texts:
        for end in range(3, len(text)):
            lookup.start(0)
            (found,) = lookup.draft([SequenceState(text[end - 3 : end], 3, 0, slot=0)], [4])
            assert found.tokens == (text[end : end + 4] if text in known else []), (end, text in known)
    assert 0 < len(history.index) <= 200 and sum(map(len, history._texts)) <= 100
    history.add(list(range(500)), 100)
    assert history._texts.pop() == list(range(400, 500)) and not history._texts, "of a longer text its end"


def test_own_text_comes_before_the_history():
    history = History()
    history.add([1, 2, 3, 7, 7], 50)
    lookup = PromptLookup(history=history)
    for text, wanted in (([1, 2, 3, 4, 1, 2, 3], 4), ([9, 1, 2, 3], 7), ([5, 2, 3, 6, 0, 2, 3], 6), ([8, 2, 3], 7)):
        lookup.open(1, 20)
        lookup.start(0)
        assert lookup.draft([SequenceState(text, len(text), 0, slot=0)], [1])[0].tokens == [wanted]


def test_texts_beside_it_come_before_the_history_and_only_with_one():
    """Of those that still run also what they have just said; of those that have ended what they said to the end."""
    history = History()
    history.add([1, 2, 3, 7, 7], 50)
    for given, wanted in ((history, [5, 6]), (None, [])):
        lookup = PromptLookup(history=given)
        lookup.open(2, 20)
        first, second = (SequenceState(text, 3, b, slot=b) for b, text in enumerate(([9, 1, 2, 3], [8, 8, 8])))
        for slot in (0, 1):
            lookup.start(slot)
        lookup.draft([first, second], [1, 1])
        first.tokens += [5, 6]
        second.tokens += [1, 2, 3]
        assert lookup.draft([first, second], [2, 2])[1].tokens == wanted
        lookup.move(1, 0, 5)
        second.slot = 0
        second.tokens += [0, 2, 3]
        assert lookup.draft([second], [1])[0].tokens == [0], "its own text first"
        lookup.open(1, 20)
        lookup.start(0)
        again = SequenceState([4, 1, 2, 3], 4, 0, slot=0)
        assert lookup.draft([again], [2])[0].tokens == ([] if given is None else [7, 7]), "the next run begins anew"


def answers(mtp: Any, **settings: Any) -> Any:
    ids = torch.arange(5, 13).view(2, 4)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False} | settings
    return mtp.generate(ids, drafter="lookup", return_dict_in_generate=True, **given)


@pytest.mark.parametrize("length", [3, "auto"])
def test_a_repeated_question_is_answered_from_the_history(length):
    """The same text, more of it accepted; nothing is remembered unasked, nor by another model, nor after release."""
    mtp, other = knowing_mtp(leaning_model()), knowing_mtp(leaning_model())
    wanted, plain = answers(mtp, num_draft_tokens=0).sequences.tolist(), answers(mtp, num_draft_tokens=length)
    told = [answers(mtp, num_draft_tokens=length, history=history) for history in (500, True)]
    assert all(out.sequences.tolist() == wanted for out in (plain, *told))
    assert told[1].stats.tau > 1.3 * plain.stats.tau and told[1].stats.lossless
    afterwards = [answers(mtp, num_draft_tokens=length), answers(other, num_draft_tokens=length, history=True)]
    mtp.release()
    afterwards.append(answers(mtp, num_draft_tokens=length, history=True))
    if length == 3:
        first = told[0].stats.accepted
        assert [out.stats.accepted for out in afterwards] == [plain.stats.accepted, first, first]


def test_threads_share_a_history():
    history, failed = History(), []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        lookup = PromptLookup(history=history)
        lookup.open(1, 99)
        try:
            for _ in range(200):
                lookup.start(0)
                lookup.draft([SequenceState([rng.randrange(5) for _ in range(9)], 9, 0, slot=0)], [3])
                history.add([rng.randrange(5) for _ in range(40)], 300)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and sum(map(len, history._texts)) <= 300


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"history": -1}, "history: got -1, wanted True, False or a number"),
        ({"history": "all"}, "history: got 'all'"),
        ({"history": 1.5}, "history: got 1.5"),
        ({"history": True, "drafter": "mtp"}, "drafter 'mtp'"),
        ({"history": 9, "policy": "typical"}, "policy 'typical'"),
        ({"history": 9, "draft_sample_method": "probabilistic"}, "'probabilistic' drafts"),
    ],
)
def test_a_history_that_cannot_be_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Plan.of(knowing_mtp(leaning_model()), **{"drafter": "mtp+lookup", **settings})
