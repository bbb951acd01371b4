"""Prompt lookup against its definition, and the merging of two drafts into one tree."""

from __future__ import annotations

import random

import pytest
import torch

from foretell.decoding.compose import Composed, merge
from foretell.decoding.lookup import PromptLookup
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


def test_lookup_asks_whether_one_more_is_worth_it():
    lookup = PromptLookup()
    lookup.open(1, 50)
    lookup.start(0)
    sequence = SequenceState([1, 2, 3, 4, 5, 1, 2], 7, 0, slot=0)
    asked = []

    def worth(name: str, b: int, draft: Draft) -> bool:
        asked.append((name, b, len(draft)))
        return len(draft) < 2

    assert lookup.draft([sequence], [4], worth)[0].tokens == [3, 4]
    assert asked == [("lookup", 0, 0), ("lookup", 0, 1), ("lookup", 0, 2)]


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
