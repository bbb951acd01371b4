"""Keys and values of several sequences in slot-addressed storage that grows by what is used.

A rejected draft needs no crop: the next step writes over it. Padding rows write into one spare row at the end. So
nothing is ever re-padded. Both sides of a decode round use it: the target, and a module with its own cache.
Layers that look through a window keep a ring of it, however long the text.
"""

# S slots, C capacity of a slot in tokens, N rows of the storage (at least S * C), R rows of this step, L = visible
# columns, H key-value heads, E width of a head, P heads of keys and values together.

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

# what transformers calls a cache: from 5.24 on, before, and in layers of GPT-NeoX's time
_TOWER = 1 << 16  # layers are fewer
STEP_ROWS = 512  # rows a sequence in one forward, usually at most
CACHE_NAMES = ("cache", "past_key_values", "layer_past")


def cache_name(forward: Callable[..., Any]) -> str:
    """What this forward of a model or layer calls the cache that it takes."""
    return _named_by(forward.__func__) if inspect.ismethod(forward) else _named_by.__wrapped__(forward)


@lru_cache(maxsize=64)
def _named_by(forward: Callable[..., Any]) -> str:
    """Remembered, since to look takes as long as a product."""
    known = inspect.signature(forward).parameters, BaseModelOutputWithPast.__dataclass_fields__
    return next(name for names in known for name in CACHE_NAMES if name in names)


class SlotStorage:
    """Tensors [N + 1, ...]: column c of slot s is row s * C + c, the last row is the spare one.

    All that is not some sequence's own must stay finite, since a masked column is multiplied by 0 and 0 * NaN is NaN.
    """

    LEAST = 256  # rows of a new storage
    MORE = 1.6  # rows of a new storage for each that is needed now: few allocations, and little that is never used
    width = sys.maxsize  # columns that a slot needs at most

    def __init__(self, slots: int = 0, capacity: int = 0) -> None:
        self.slots, self.capacity = slots, capacity
        self.size = slots * capacity  # N
        self.layout = 0  # another number whenever rows have moved: who has recorded addresses records anew
        self._storage: dict[Hashable, list[Tensor]] = {}
        self._used = 0  # columns that may hold something
        self._taken = 0  # slots that do, whoever is reserved for
        self._unchecked: set[Hashable] = set()  # parts of an earlier run

    def open(self) -> None:
        """A new run: nothing that is held is needed any more; its memory is."""
        self._used, self._taken, self._unchecked = 0, 0, set(self._storage)

    def hold(self, slots: int) -> None:
        """So many first slots are not given up."""
        self._taken = slots

    def reserve(self, slots: int, columns: int) -> None:
        """Room for so many columns in these first slots; what they hold stays, other slots may be given up."""
        slots, columns = max(slots, self._taken), min(columns, self.width)
        before, self._used = self._used, max(self._used, columns)
        if slots <= self.slots and columns <= self.capacity:
            return
        kept, C = min(slots, self.slots), self.capacity
        need = slots * self._used
        larger = max(self.LEAST, min(int(self.MORE * need), slots * self.width)) if need > self.size else self.size
        self.slots, self.capacity, self.layout = slots, larger // slots, self.layout + 1
        for key, parts in self._storage.items():
            self._storage[key] = [self._moved(flat, kept, C, before, larger) for flat in parts]
        self.size = larger

    def _moved(self, flat: Tensor, slots: int, capacity: int, columns: int, size: int) -> Tensor:
        """The same rows in the new layout; all others zero, as they may be anything."""
        held = flat[: slots * capacity].view(slots, capacity, *flat.shape[1:])[:, :columns]
        if size == len(flat) - 1 and not flat.is_inference():
            held = held.clone()
            moved = flat.zero_()
        else:
            moved = flat.new_zeros(size + 1, *flat.shape[1:])
        self._grid(moved)[:slots, :columns] = held
        return moved

    def _grid(self, flat: Tensor) -> Tensor:
        return flat[: self.slots * self.capacity].view(self.slots, self.capacity, *flat.shape[1:])

    def _grids(self) -> list[Tensor]:
        """Of all keys."""
        return [self._grid(flat) for parts in self._storage.values() for flat in parts]

    def parts(self, key: Hashable, like: list[Tensor]) -> list[Tensor]:
        """The tensors of a key for rows such as `like` [B, R, *width]; made where there are none of this kind."""
        parts = self._storage.get(key)
        if parts is None or (key in self._unchecked and not self._fit(parts, like)):
            # zeros, not empty: see above
            parts = self._storage[key] = [one.new_zeros(self.size + 1, *one.shape[2:]) for one in like]
            self.layout += 1
        self._unchecked.discard(key)
        return parts

    def fill(self, key: Hashable, at: list[tuple[int, int, int]], rows: Tensor) -> None:
        """Write [N, ...], as many for each (slot, first column, count) of `at`."""
        (flat,), C = self.parts(key, [rows[None]]), self.capacity
        if len(at) == 1:
            first = at[0][0] * C + at[0][1]
            flat[first : first + at[0][2]] = rows
        else:
            places = [slot * C + column + i for slot, column, count in at for i in range(count)]
            flat.index_copy_(0, torch.tensor(places, dtype=torch.long, device=flat.device), rows)

    def held(self, key: Hashable) -> list[Tensor]:
        """The tensors of a key, which have been made."""
        return self._storage[key]

    def _fit(self, parts: list[Tensor], like: list[Tensor]) -> bool:
        """Whether parts of an earlier run serve this one: the model may have changed in between."""
        usable = not any(flat.is_inference() for flat in parts) or torch.is_inference_mode_enabled()
        mine = [(flat.shape[1:], flat.dtype, flat.device) for flat in parts]
        return usable and mine == [(one.shape[2:], one.dtype, one.device) for one in like]

    def room(self, bytes_: int, columns: int) -> int:
        """Slots of so many columns that fit into what there is, or into so many bytes."""
        row_bytes = sum(flat[0].nbytes for parts in self._storage.values() for flat in parts)
        return max(self.size, bytes_ // max(row_bytes, 1)) // max(columns, self._used, 1)

    def clear(self, slot: int, first: int = 0) -> None:
        """Zeros from this column on: whatever was there harms nobody."""
        if slot >= self.slots:
            return
        for grid in self._grids():
            grid[slot, first:] = 0

    def shift(self, slot: int, by: int, length: int) -> None:
        """Columns by, ..., length - 1 of a slot become its first."""
        for grid in self._grids():
            grid[slot, : length - by] = grid[slot, by:length].clone()

    def move(self, source: int, target: int, length: int) -> None:
        """The sequence in slot source now lives in slot target."""
        if source >= self.slots:  # nothing was written for it yet
            return self.clear(target)
        self.reserve(max(target + 1, self.slots), length)
        for grid in self._grids():
            grid[target, :length], grid[target, length:] = grid[source, :length], 0


class SlotRows(SlotStorage):
    """Storage that steps write rows into.

    Active sequences always stand in slots first, first + 1, ..., so that a step reads views, never copies.
    """

    def __init__(self, slots: int = 0, capacity: int = 0) -> None:
        """slots, capacity: what there is room for at first."""
        super().__init__(slots, capacity)
        self._view: tuple[int, int, int] = (0, 0, 0)
        self._write_N: Tensor | slice = slice(0)

    def _at(self, column: Any) -> Any:
        """Where a column stands in its slot."""
        return column

    def begin(
        self, first: int, lengths_B: Tensor, valid_BR: Tensor | None, rows: int, visible: int, start: int | None = None
    ) -> None:
        """Say where the next forward writes: sequence b's row r goes to column lengths_B[b] + r of slot first + b.

        valid_BR: False rows are padding. visible: L, the number of columns that every sequence's rows may look at.
        start: where all of them write, if that is one column and no row is padding: then nothing is looked up.
        """
        count = lengths_B.shape[0]
        self.reserve(max(self.slots, first + count), visible)
        self._view = (first, count, visible)
        if start is not None:
            self._write_N = slice(start, start + rows)
            return
        slot_B1 = torch.arange(first, first + count, device=lengths_B.device)[:, None]
        at_BR = self._at(lengths_B[:, None] + torch.arange(rows, device=lengths_B.device)) + slot_B1 * self.capacity
        if valid_BR is not None:
            at_BR = at_BR.masked_fill(~valid_BR, self.size)
        self._write_N = at_BR.reshape(-1)

    def rows(self, key: Hashable, ahead: int = 0) -> Tensor:
        """[B, R, ...]: what is kept of a key where the next forward writes, or so many columns ahead of it."""
        first, count, _ = self._view
        (flat,) = self.held(key)
        if isinstance(self._write_N, slice):
            return self._grid(flat)[first : first + count, self._write_N.start + ahead : self._write_N.stop + ahead]
        at_N = (self._write_N + ahead).clamp_(max=self.size) if ahead else self._write_N
        return flat[at_N].view(count, -1, *flat.shape[1:])

    def put(self, key: Hashable, rows: Tensor) -> None:
        """Keep [B, R, ...] of a key where the next forward writes."""
        self.write(self.parts(key, [rows])[0], rows)

    def write(self, flat: Tensor, rows_BRHE: Tensor) -> Tensor:
        """Keep rows [B, R, ...] in a part, where the step writes; [B, L, ...] of everything visible."""
        first, count, visible = self._view
        mine = self._grid(flat)[first : first + count]
        if isinstance(self._write_N, slice):
            mine[:, self._write_N] = rows_BRHE
        else:
            flat.index_copy_(0, self._write_N, rows_BRHE.reshape(-1, *flat.shape[1:]))
        return mine[:, :visible]

    def keep(self, slots: list[int], lengths: list[int], paths: list[list[int]]) -> None:
        """Compact accepted rows: row paths[b][i] of the last step moves to column lengths[b] + i. A chain moves
        nothing."""
        source, target = [], []
        for slot, length, path in zip(slots, lengths, paths, strict=True):
            for i, row in enumerate(path):
                if i != row:  # paths ascend, so a row is always read before it is overwritten
                    source.append(slot * self.capacity + self._at(length + row))
                    target.append(slot * self.capacity + self._at(length + i))
        if source:
            for parts in self._storage.values():
                for flat in parts:
                    at = torch.tensor([source, target], device=flat.device)
                    flat.index_copy_(0, at[1], flat.index_select(0, at[0]))


class Ring(SlotRows):
    """The newest columns of each slot, column c at c % width, for layers whose rows see `window` of them at most.

    A step of up to `spare` rows may be refused: what it writes over lies out of sight of all that can come instead.
    """

    def __init__(self, window: int, spare: int) -> None:
        super().__init__()
        self.window, self.spare, self.width = window, spare, window + spare - 1

    def _at(self, column: Any) -> Any:
        return column % self.width

    def make_room(self, first: int, lengths_B: Tensor, rows: int) -> None:
        """The next step, of these sequences and no others, may have so many rows."""
        if rows <= self.spare:
            return
        assert first == 0, f"{rows} rows of later slots only, where {self.spare} are spare"
        before, lengths, self.layout = self.width, lengths_B.tolist(), self.layout + 1
        self.spare, self.width = 2 * rows, self.window + 2 * rows - 1
        self.reserve(max(self.slots, len(lengths)), max(lengths) + rows)
        for slot, length in enumerate(lengths):
            column_N = torch.arange(max(length - self.window + 1, 0), length, device=lengths_B.device)
            for grid in self._grids():
                grid[slot, column_N % self.width] = grid[slot, column_N % before]

    def begin(
        self, first: int, lengths_B: Tensor, valid_BR: Tensor | None, rows: int, visible: int, start: int | None = None
    ) -> None:
        """See SlotRows."""
        assert rows <= self.spare, f"{rows} rows without make_room, where {self.spare} are spare"
        self._newest_B1, self.goes_round = lengths_B[:, None] + (rows - 1), visible > self.width
        if start is not None:
            start = start % self.width if start % self.width + rows <= self.width else None
        super().begin(first, lengths_B, valid_BR, rows, min(visible, self.width), start)

    def columns(self) -> Tensor:
        """[B, width] what the columns that this step's rows are shown hold, negative where nothing."""
        at_L = torch.arange(self.width, device=self._newest_B1.device)
        return self._newest_B1 - (self._newest_B1 - at_L) % self.width

    def clear(self, slot: int, first: int = 0) -> None:
        """See SlotStorage."""
        for grid in self._grids() if slot < self.slots else ():
            seen_N = self._at(torch.arange(max(first - self.window + 1, 0), first, device=grid.device))
            kept = grid[slot, seen_N]
            grid[slot] = 0
            grid[slot, seen_N] = kept


def _with_rings(method: Callable[..., None]) -> Callable[..., None]:
    """A method of the cache that each of its rings has too."""

    @wraps(method)
    def both(cache: SlotCache, *args: Any, **more: Any) -> None:
        method(cache, *args, **more)
        for ring in cache.rings.values():
            getattr(ring, method.__name__)(*args, **more)

    return both


class SlotCache(SlotRows, Cache):
    """transformers' Cache protocol over rows [H, E] a layer; layers with a window have theirs in a ring."""

    SPARE = STEP_ROWS

    def __init__(self, slots: int = 0, capacity: int = 0) -> None:
        """See SlotRows."""
        Cache.__init__(self, layers=[])
        SlotRows.__init__(self, slots, capacity)
        self.tower = 0  # of modules that keep layers of one number each
        self.windows: dict[int, int] = {}
        self.rings: dict[int, Ring] = {}  # by window

    hold, reserve = _with_rings(SlotRows.hold), _with_rings(SlotRows.reserve)
    begin, keep = _with_rings(SlotRows.begin), _with_rings(SlotRows.keep)
    clear, move = _with_rings(SlotRows.clear), _with_rings(SlotRows.move)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Others whenever rows have moved: who has recorded some records anew."""
        return self.layout, *(ring.layout for ring in self.rings.values())

    def open(self, windows: dict[int, int] | None = None) -> None:
        """See SlotStorage. windows: how far layers look back, of those that never look further."""
        super().open()
        if (windows or {}) != self.windows:
            self.windows, self.layout = dict(windows or {}), self.layout + 1
            self._storage.clear()
            self.rings = {window: Ring(window, self.SPARE) for window in self.windows.values()}
        for ring in self.rings.values():
            ring.open()

    def columns(self) -> dict[int, Tensor]:
        """By window, the columns that this step's rows are shown, where that is not all in order; see Ring."""
        return {window: ring.columns() for window, ring in self.rings.items() if ring.goes_round}

    def _of(self, layer: int) -> tuple[SlotRows, int]:
        """What holds a layer's keys and values, and under which key."""
        return self.rings[self.windows[layer]] if layer in self.windows else self, layer + _TOWER * self.tower

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write this step's rows [B, H, R, E]; return views [B, H, L, E] of everything visible."""
        new = [key_states.transpose(1, 2), value_states.transpose(1, 2)]
        kept, at = self._of(layer_idx)
        key, value = (kept.write(*one).transpose(1, 2) for one in zip(kept.parts(at, new), new, strict=True))
        return key, value

    def extend(self, pair_BRPE: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """`update` for keys and values that lie side by side, P = 2 H, and are stored so."""
        kept, at = self._of(layer_idx)
        key, value = kept.write(kept.parts(at, [pair_BRPE])[0], pair_BRPE).transpose(1, 2).chunk(2, dim=1)
        return key, value

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """`update` for the keys [B, R, E] by which sparse attention chooses what it reads; [B, L, E] of all visible."""
        new_BR1E = indexer_key_states[:, :, None]
        (flat,) = self.parts(-1 - layer_idx - _TOWER * self.tower, [new_BR1E])  # beside the layer's keys and values
        return self.write(flat, new_BR1E).squeeze(2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of no use to transformers here, since a step brings its positions and masks; others cannot be told one."""
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("transformers."):
            raise RuntimeError("a hook or module asks the cache for one length of all rows: read position_ids")
        return 0
