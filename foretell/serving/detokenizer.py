"""Text of an answer while its tokens come: characters are never split, and text never runs past a stop string.

What is shown is shown in whole tokens, each with the text that it brought: a token whose text may belong to a stop
string waits for what follows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = {word: byte for byte, word in bytes_to_unicode().items()}
WINDOW = 24  # tokens of text so far that a new one is decoded behind, before the oldest are let go
CONTEXT = 8  # of which so many stay: enough for a character, and for what a tokenizer writes between two words
CHARACTER = 4  # bytes at most, so tokens: what is older and no character will not become one


def token_bytes(tokenizer: Any, token: int) -> bytes | None:
    """What a token of a byte-level vocabulary, or one that stands for a byte, is; None for others."""
    word = tokenizer.convert_ids_to_tokens(token)
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", word):
        return bytes.fromhex(byte[1])
    return bytes(BYTES[letter] for letter in word) if all(letter in BYTES for letter in word) else None


class Detokenizer:
    """One answer's.

    Args:
        tokenizer: special tokens have no text.
        before: tokens that the answer goes on from, where its text is read together with theirs.
        stops: texts that end the answer, none of them empty; they are no part of it.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, list(stops)
        self.tokens: list[int] = []
        self.text = ""  # of all tokens but the last ones, of a character that is not whole
        self.starts: list[int] = []  # where each token's text starts in it
        self.stop: str | None = None  # the stop string that has come
        self._whole = self._shown = 0  # tokens whose text is there; that were taken
        self._window = list(before[-CONTEXT:])
        self._before = self._read(0)  # text of the window that `text` has already, or that stands before it

    def put(self, token: int) -> bool:
        """The next token; whether it completes a stop string."""
        self.tokens.append(token)
        self.starts.append(len(self.text))
        self._window.append(token)
        read = self._read(0)
        if not read.endswith("\ufffd"):  # what a character reads as while bytes of it are missing
            self._add(read, 0)
        elif len(self.tokens) - self._whole > CHARACTER:
            self._add(self._read(CHARACTER), CHARACTER)
        if len(self._window) > WINDOW:
            self._window = self._window[-CONTEXT:]
            self._before = self._read(len(self.tokens) - self._whole)
        return self.stop is not None

    def take(self, last: bool = False) -> list[tuple[int, str]]:
        """(index, text) of the tokens that can be shown now and were not yet; last: of all that are left."""
        if last and self._whole < len(self.tokens):
            self._add(self._read(0), 0)
        sure = len(self.text) - (0 if last else self._may_stop())
        shown, ends = [], [*self.starts[self._shown + 1 :], len(self.text)]
        while self._shown < self._whole and ends[len(shown)] <= sure:
            shown.append((self._shown, self.text[self.starts[self._shown] : ends[len(shown)]]))
            self._shown += 1
        return shown

    def _read(self, without: int) -> str:
        """The window's text, but for its last tokens."""
        ids = self._window[: len(self._window) - without]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _add(self, read: str, without: int) -> None:
        longest = max(map(len, self.stops), default=0)
        searched = max(len(self.text) + 1 - longest, 0)
        self.text += read[len(self._before) :]
        self._before, self._whole = read, len(self.tokens) - without
        found = [(at, stop) for stop in self.stops if (at := self.text.find(stop, searched)) >= 0]
        if found:
            at, self.stop = min(found)
            self.text = self.text[:at]
            self.starts = [min(start, at) for start in self.starts]

    def _may_stop(self) -> int:
        """Characters at the text's end that a stop string may begin with."""
        most = min(max(map(len, self.stops), default=1) - 1, len(self.text))
        ends = (self.text[-n:] for n in range(most, 0, -1))
        return next((len(end) for end in ends if any(s.startswith(end) and s != end for s in self.stops)), 0)
