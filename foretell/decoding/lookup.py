"""Prompt lookup: drafts copied from where the last few tokens stood before. No training, no cost but the rows.

Saxena 2023, "Prompt Lookup Decoding"; transformers has it as prompt_lookup_num_tokens. With a History it also looks at
what the texts beside it say and what earlier answers said.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

from foretell.types import Draft, Drafter, SequenceState, Worth

REMEMBERED = 32768  # tokens that history=True keeps
MAX_NGRAM, MIN_NGRAM = 3, 2

Index = dict[tuple[int, ...], tuple[list[int], int]]  # n-gram -> the text that it was last seen in, and where it ended


def _ngrams(tokens: list[int], first: int, shortest: int, longest: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """(n-gram, where it ends) of those that end at first or later and that some token follows."""
    for end in range(max(first, 1), len(tokens)):
        for n in range(shortest, min(longest, end) + 1):
            yield tuple(tokens[end - n : end]), end


class History:
    """The newest answers of a process. Threads may share it."""

    def __init__(self) -> None:
        self.index, self._texts, self._kept = Index(), deque[list[int]](), 0
        self._lock = threading.Lock()

    def add(self, tokens: list[int], limit: int) -> None:
        """Remember a text, and of the oldest ones no more than fit into `limit` tokens in all."""
        text = tokens[-limit:]
        with self._lock:
            self._texts.append(text)
            self._kept += len(text)
            self.index.update((gram, (text, end)) for gram, end in _ngrams(text, 0, MIN_NGRAM, MAX_NGRAM))
            while self._kept > limit:
                oldest = self._texts.popleft()
                self._kept -= len(oldest)
                for gram, _ in _ngrams(oldest, 0, MIN_NGRAM, MAX_NGRAM):
                    if gram in self.index and self.index[gram][0] is oldest:
                        del self.index[gram]

    def texts(self) -> list[list[int]]:
        """What is remembered, oldest first: `add` in this order remembers the same."""
        with self._lock:
            return [list(text) for text in self._texts]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self.index.clear()
            self._texts.clear()
            self._kept = 0


class PromptLookup(Drafter):
    """Longest n-gram first, most recent place first: in the text itself, and with a history in the texts that this run
    has had beside it, then in those of earlier ones. Indexes grow with the texts: no rescan.
    """

    name = "lookup"

    def __init__(self, max_ngram: int = MAX_NGRAM, min_ngram: int = MIN_NGRAM, history: History | None = None) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"got min_ngram={min_ngram}, max_ngram={max_ngram}; wanted 1 <= min_ngram <= max_ngram.")
        self.max_ngram, self.min_ngram = max_ngram, min_ngram
        self._history = history

    def open(self, slots: int, capacity: int) -> None:
        """See Watcher."""
        self._index: list[dict[tuple[int, ...], int]] = [{} for _ in range(slots)]
        self._read = [0] * slots
        self._beside = Index()

    def shares(self, slot: int, length: int) -> int:
        """See Watcher."""
        return length

    def start(self, slot: int) -> None:
        """See Watcher."""
        self._index[slot], self._read[slot] = {}, 0

    def draft(self, sequences: Sequence[SequenceState], lengths: list[int], worth: Worth | None = None) -> list[Draft]:
        """See Drafter."""
        if self._history is not None and any(lengths):
            for sequence in sequences:
                self._follow(sequence)
        return [self._find(s, length) for s, length in zip(sequences, lengths, strict=True)]

    def _follow(self, sequence: SequenceState) -> None:
        tokens, slot = sequence.tokens, sequence.slot
        for gram, end in _ngrams(tokens, self._read[slot], self.min_ngram, self.max_ngram):
            self._index[slot][gram] = end
            if self._history is not None:
                self._beside[gram] = tokens, end
        self._read[slot] = len(tokens)

    def _find(self, sequence: SequenceState, length: int) -> Draft:
        draft = Draft()
        if length == 0:
            return draft
        self._follow(sequence)
        tokens, index = sequence.tokens, self._index[sequence.slot]
        for n in range(min(self.max_ngram, len(tokens)), self.min_ngram - 1, -1):
            gram = tuple(tokens[-n:])
            text, place = (tokens, index[gram]) if gram in index else self._elsewhere(gram)
            for token in text[place : place + length] if place else ():
                # the confidence is a start: the adaptive policy learns the real rate
                draft.add(token, len(draft) - 1, 0.5 + 0.1 * n, self.name)
            if place:
                break
        return draft

    def _elsewhere(self, gram: tuple[int, ...]) -> tuple[list[int], int]:
        if self._history is None:
            return [], 0
        return self._beside.get(gram) or self._history.index.get(gram, ([], 0))

    def move(self, source: int, target: int, length: int) -> None:
        """See Watcher."""
        self._index[target], self._read[target] = self._index[source], self._read[source]
