"""What texts begin with alike is read once: a prompt takes over what another text's slot holds of it.

Slots 0, 1, ... are those of who is decoded and who is read. Texts that have ended stay in the slots behind until those
are needed. Exact, since what is kept of a token depends on the tokens up to it alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from foretell.models.slot_cache import SlotCache
from foretell.types import SequenceState, Watcher

LEAST = 16  # tokens that are worth a copy
SHARE_OF_WEIGHTS = 0.25  # memory that texts which have ended may take beyond what others have needed


def alike(one: list[int], other: list[int]) -> int:
    """How many tokens two texts begin with alike."""
    most = min(len(one), len(other))
    return bisect_left(range(1, most + 1), True, key=lambda n: one[:n] != other[:n])


def together(counts: list[int], saved: list[int], most: int, spare: int, enough: int) -> int:
    """How many first texts are read in one forward of `most` rows, with at most `spare` of padding, if those wait that
    save `enough` rows in all.
    """
    waits = sum(saved[1:]) > enough
    for n in range(1, len(counts)):
        rows = (n + 1) * max(counts[: n + 1])
        if rows > most or rows - sum(counts[: n + 1]) > spare or (waits and saved[n]):
            return n
    return len(counts)


class Prefixes:
    """Who holds the beginnings of texts in a cache, and in what the watchers keep beside it.

    slots: how many there are in all, 0 where nothing is shared. spare_bytes: of the cache, for texts that have ended.
    """

    def __init__(self, cache: SlotCache, watchers: Sequence[Watcher], slots: int, spare_bytes: int) -> None:
        self.cache, self.watchers, self.slots, self.spare_bytes = cache, watchers, slots, spare_bytes
        self.kept: list[SequenceState] = []  # texts that have ended, the longest unused first
        self._leads: dict[int, tuple[SequenceState, int]] = {}  # by index: who is reading what this text begins with

    @property
    def top(self) -> int:
        """Slots up to the last one that holds a text which has ended."""
        return 1 + max((text.slot for text in self.kept), default=-1)

    def _limit(self, columns: int = 0) -> int:
        return min(self.slots, self.cache.room(self.spare_bytes, columns))

    def trim(self, columns: int) -> None:
        """Texts give way whose slots would make the cache grow beyond its bounds."""
        if columns > self.cache.capacity:
            most = self._limit(columns)
            self.kept = [text for text in self.kept if text.slot < most]

    # -- texts that end ------------------------------------------------------------------------------------------------

    def keep(self, text: SequenceState, first: int | None) -> bool:
        """Hold on to a text that has ended: where it is, or in a slot from `first` on; whether it is kept."""
        if text.cached < LEAST or text.broken or not text.record:
            return False
        place = text.slot if first is None else self._place(first)
        if place is None or place >= self._limit():
            return False
        self._move(text, place)
        self.kept.append(text)
        return True

    def _place(self, first: int, but: SequenceState | None = None) -> int | None:
        """A slot from `first` on that is empty, or the one of who is longest unused, who gives way."""
        taken = {text.slot for text in self.kept}
        empty = next((slot for slot in range(first, self._limit()) if slot not in taken), None)
        if empty is None:
            oldest = next((text for text in self.kept if text.slot >= first and text is not but), None)
            if oldest is not None:
                self.kept.remove(oldest)
                return oldest.slot
        return empty

    def _move(self, text: SequenceState, slot: int) -> None:
        if slot != text.slot:
            self.cache.move(text.slot, slot, text.cached)
            for watcher in self.watchers:
                watcher.move(text.slot, slot, text.cached)
            text.slot = slot

    # -- texts that begin ----------------------------------------------------------------------------------------------

    def begin(self, text: SequenceState, beside: Iterable[SequenceState]) -> None:
        """A text takes its slot, with what another's slot holds of it: of those beside it, or of one that has ended."""
        others = (*self.kept, *beside) if self.slots else ()
        alike_with = [(min(alike(text.tokens, one.tokens), len(text.tokens) - 1), one) for one in others]
        held = [(min(count, one.cached), one) for count, one in alike_with if not one.broken]
        length, source = max(held, key=lambda found: found[0], default=(0, None))
        unread = [(count, one) for count, one in alike_with if count > one.cached and not one.done]
        longest, lead = max(unread, key=lambda found: found[0], default=(0, None))
        if lead is not None and self._shared(lead, longest) >= length + LEAST:
            self._leads[text.index] = lead, longest
        length = 0 if source is None else self._shared(source, length)
        self._vacate(text.slot, source if length else None)
        if length:
            self._take(text, source, length)
        else:
            for watcher in self.watchers:
                watcher.start(text.slot)

    def _vacate(self, slot: int, source: SequenceState | None) -> None:
        """Whoever stays in this slot moves on, unless it is the one that the slot's next text begins with."""
        text = next((one for one in self.kept if one.slot == slot), None)
        if text is None or text is source:
            return
        at = self.kept.index(text)
        older = any(one.slot > slot for one in self.kept[:at] if one is not source)
        self.kept.remove(text)
        place = self._place(slot + 1, source) if older or len(self.kept) < self._limit() - slot - 1 else None
        if place is not None:
            self._move(text, place)
            self.kept.insert(min(at, len(self.kept)), text)

    def _shared(self, source: SequenceState, length: int) -> int:
        """How much of these first tokens every watcher can take over, too."""
        shared = min((watcher.shares(source.slot, length) for watcher in self.watchers), default=length)
        return shared if shared >= LEAST else 0

    def _take(self, text: SequenceState, source: SequenceState, length: int) -> None:
        if source.slot != text.slot:
            self.cache.move(source.slot, text.slot, length)
        for watcher in self.watchers:
            watcher.share(source.slot, text.slot, length)
        text.cached = text.shared = length
        if source in self.kept:
            self.kept.remove(source)
            if length < source.cached - LEAST and source.slot != text.slot:  # else the new text has all of it
                self.kept.append(source)

    def follow(self, text: SequenceState) -> int:
        """Take over what the one who read it has by now; rows that are saved if this text waits for more."""
        lead, length = self._leads.get(text.index, (text, 0))
        if lead.done or lead.broken or text.cached >= length:
            self._leads.pop(text.index, None)
        elif lead.cached < length:
            return length - text.cached
        else:
            del self._leads[text.index]
            if (shared := self._shared(lead, length)) > text.cached:
                self._take(text, lead, shared)
        return 0

    def forget(self, text: SequenceState) -> None:
        """It follows nobody any more."""
        self._leads.pop(text.index, None)
