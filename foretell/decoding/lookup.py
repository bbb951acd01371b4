"""Prompt lookup: drafts copied from where the last few tokens stood before. No training, no cost but the rows.

Saxena 2023, "Prompt Lookup Decoding"; transformers has it as prompt_lookup_num_tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from foretell.types import Draft, Drafter, SequenceState, Worth


class PromptLookup(Drafter):
    """Longest n-gram first, most recent place first. An index per slot grows with the text: no rescan."""

    name = "lookup"

    def __init__(self, max_ngram: int = 3, min_ngram: int = 2) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"got min_ngram={min_ngram}, max_ngram={max_ngram}; wanted 1 <= min_ngram <= max_ngram.")
        self.max_ngram, self.min_ngram = max_ngram, min_ngram

    def open(self, slots: int, capacity: int) -> None:
        """See Watcher."""
        self._index: list[dict[tuple[int, ...], int]] = [{} for _ in range(slots)]
        self._read = [0] * slots

    def start(self, slot: int) -> None:
        """See Watcher."""
        self._index[slot], self._read[slot] = {}, 0

    def draft(self, sequences: Sequence[SequenceState], lengths: list[int], worth: Worth | None = None) -> list[Draft]:
        """See Drafter."""
        return [self._find(s, length, b, worth) for b, (s, length) in enumerate(zip(sequences, lengths, strict=True))]

    def _find(self, sequence: SequenceState, length: int, b: int, worth: Worth | None) -> Draft:
        draft = Draft()
        if length == 0:
            return draft
        tokens, index = sequence.tokens, self._index[sequence.slot]
        for end in range(max(self._read[sequence.slot], 1), len(tokens)):  # n-grams that some token follows
            for n in range(self.min_ngram, self.max_ngram + 1):
                if end >= n:
                    index[tuple(tokens[end - n : end])] = end
        self._read[sequence.slot] = len(tokens)
        for n in range(self.max_ngram, self.min_ngram - 1, -1):
            place = index.get(tuple(tokens[-n:])) if len(tokens) >= n else None
            if place is not None:
                for token in tokens[place : place + length]:
                    if worth is not None and not worth(self.name, b, draft):
                        break
                    # the confidence is a start: the adaptive policy learns the real rate
                    draft.add(token, len(draft) - 1, 0.5 + 0.1 * n, self.name)
                break
        return draft

    def move(self, source: int, target: int, length: int) -> None:
        """See Watcher."""
        self._index[target], self._read[target] = self._index[source], self._read[source]
