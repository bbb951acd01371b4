"""What decoding calls need for themselves and keep for the next: a call leases a workspace and gives it back.

Calls in other threads, and calls that a stopping criterion makes inside a call, get workspaces of their own. After an
exception a workspace is dropped: nobody knows how far its call had come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from foretell.decoding.adaptive import AdaptiveLength
from foretell.decoding.lookup import History
from foretell.decoding.loop import Decoder
from foretell.decoding.policies import SPANS
from foretell.decoding.spans import SpanDecoder
from foretell.models.slot_cache import SlotCache
from foretell.models.target import Target
from foretell.types import Drafter, ModuleDrafter, Watcher


class Workspace:
    """Of one call: the target's cache, a module's drafter with its storage, and what was learned of acceptance."""

    history: History  # of all calls

    def __init__(self) -> None:
        self.cache = SlotCache()
        self.adaptive: dict[Any, AdaptiveLength] = {}
        self._drafters: dict[str, tuple[ModuleDrafter, ModuleDrafter]] = {}

    def drafter(self, packed: ModuleDrafter, sample: bool, dtype: str) -> ModuleDrafter:
        """A drafter with storage of this workspace over the weights of `packed`."""
        of, drafter = self._drafters.get(dtype, (None, None))
        if drafter is None or of is not packed:
            for adaptive in self.adaptive.values() if of is not None else ():
                adaptive.doubt()
            drafter = packed.another(sample)
            self._drafters[dtype] = packed, drafter
        drafter.sample = sample
        return drafter

    def rest(self) -> None:
        """Keep no drafter's weights. What was learned of them is a start for the next ones."""
        self._drafters.clear()
        for adaptive in self.adaptive.values():
            adaptive.doubt()

    def decoder(
        self, target: Target, drafter: Drafter | None, policy: str = "lossless", watchers: Sequence[Watcher] = ()
    ) -> Decoder:
        """The decoder of a policy, in this workspace's cache."""
        kind = SpanDecoder if policy in SPANS else Decoder
        return kind(target, drafter, self.cache, watchers)


class Workspaces:
    """Those that no call uses now, and a module's packed weights, which all of them share."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._free: list[Workspace] = []
        self._leased: set[int] = set()
        self._packed: dict[str, tuple[Any, ModuleDrafter]] = {}
        self.history = History()

    def __reduce__(self) -> Any:
        return Workspaces, ()  # copies share no state

    @contextmanager
    def lease(self) -> Iterator[Workspace]:
        """One that nobody else uses until this is closed: the one that was given back last."""
        with self.lock:
            space = self._free.pop() if self._free else Workspace()
            self._leased.add(id(space))
            space.history = self.history
        try:
            yield space
        except BaseException:
            with self.lock:
                self._leased.discard(id(space))
            raise
        with self.lock:
            if id(space) in self._leased:
                self._leased.remove(id(space))
                self._free.append(space)

    def packed(self, dtype: str, version: Any, make: Callable[[], ModuleDrafter]) -> ModuleDrafter:
        """A drafter whose weights others share, made anew where the version is another."""
        with self.lock:
            if dtype not in self._packed or self._packed[dtype][0] != version:
                self._packed.pop(dtype, None)
                self._packed[dtype] = (version, make())
            return self._packed[dtype][1]

    def rest(self) -> None:
        """Keep no packed weights but those in use."""
        with self.lock:
            self._packed = {}
            for space in self._free:
                space.rest()

    def release(self) -> None:
        """Keep nothing; what is leased now is not kept when it comes back."""
        with self.lock:
            self._free, self._leased, self._packed, self.history = [], set(), {}, History()
