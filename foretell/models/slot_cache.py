"""Keys and values of several sequences in preallocated, slot-addressed storage.

A rejected draft needs no crop: the next step writes over it. Padding rows write into one spare row at the end. So
shapes
stay fixed and nothing is ever re-padded. Both sides of a decode round use it: the target, and a module with its own
cache.
"""

# S slots, C capacity of a slot in tokens, R rows of this step, L = visible columns, H key-value heads, E width of a
# head, P heads of keys and values together.

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

# what transformers calls a cache: from 5.24 on, before, and in layers of GPT-NeoX's time
CACHE_NAMES = ("cache", "past_key_values", "layer_past")


def cache_name(forward: Callable[..., Any]) -> str:
    """What this forward of a model or layer calls the cache that it takes."""
    known = inspect.signature(forward).parameters, BaseModelOutputWithPast.__dataclass_fields__
    return next(name for names in known for name in CACHE_NAMES if name in names)


class SlotCache(Cache):
    """transformers' Cache protocol over storage [S * C + 1, H, E] a layer; the last row is the spare one.

    Active sequences always stand in slots first, first + 1, ..., so that a step reads views, never copies.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.slots, self.capacity = slots, capacity
        self._storage: dict[int, list[Tensor]] = {}
        self._view: tuple[int, int, int] = (0, 0, 0)
        self._write_N: Tensor | None = None

    def begin(self, first: int, lengths_B: Tensor, valid_BR: Tensor | None, rows: int, visible: int) -> None:
        """Say where the next forward writes: sequence b's row r goes to column lengths_B[b] + r of slot first + b.

        valid_BR: False rows are padding. visible: L, the number of columns that every sequence's rows may look at.
        """
        count = lengths_B.shape[0]
        if first + count > self.slots or visible > self.capacity:
            raise ValueError(
                f"cache of {self.slots} slots x {self.capacity} tokens cannot hold slots {first}..{first + count - 1} "
                f"with {visible} tokens: open it larger."
            )
        at_BR = (torch.arange(first, first + count, device=lengths_B.device) * self.capacity + lengths_B)[:, None]
        at_BR = at_BR + torch.arange(rows, device=lengths_B.device)
        if valid_BR is not None:
            at_BR = at_BR.masked_fill(~valid_BR, self.slots * self.capacity)
        self._write_N = at_BR.reshape(-1)
        self._view = (first, count, visible)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write this step's rows [B, H, R, E]; return views [B, H, L, E] of everything visible."""
        storage = self._storage.get(layer_idx)
        if storage is None:
            storage = [self._allocate(s.shape[1], s.shape[3], s) for s in (key_states, value_states)]
            self._storage[layer_idx] = storage
        key, value = (
            self._write(flat, new.transpose(1, 2)).transpose(1, 2)
            for flat, new in zip(storage, (key_states, value_states), strict=True)
        )
        return key, value

    def extend(self, pair_BRPE: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """`update` for keys and values that lie side by side, P = 2 H, and are stored so."""
        storage = self._storage.get(layer_idx)
        if storage is None:
            heads, width = pair_BRPE.shape[2:]
            storage = self._storage[layer_idx] = [self._allocate(heads, width, pair_BRPE)]
        key, value = self._write(storage[0], pair_BRPE).transpose(1, 2).chunk(2, dim=1)
        return key, value

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """`update` for the keys [B, R, E] by which sparse attention chooses what it reads; [B, L, E] of all visible."""
        key = -1 - layer_idx  # beside the layer's keys and values
        if key not in self._storage:
            self._storage[key] = [self._allocate(1, indexer_key_states.shape[-1], indexer_key_states)]
        return self._write(self._storage[key][0], indexer_key_states[:, :, None]).squeeze(2)

    def _write(self, flat: Tensor, rows_BRHE: Tensor) -> Tensor:
        heads, width = flat.shape[1:]
        first, count, visible = self._view
        flat.index_copy_(0, self._write_N, rows_BRHE.reshape(-1, heads, width))
        grid = flat[:-1].view(self.slots, self.capacity, heads, width)
        return grid[first : first + count, :visible]

    def _allocate(self, heads: int, width: int, like: Tensor) -> Tensor:
        # zeros, not empty: a masked column must hold a finite number, since 0 * NaN is NaN
        return like.new_zeros(self.slots * self.capacity + 1, heads, width)

    def keep(self, slots: list[int], lengths: list[int], paths: list[list[int]]) -> None:
        """Compact accepted rows: row paths[b][i] of the last step moves to column lengths[b] + i. A chain moves
        nothing."""
        source, target = [], []
        for slot, length, path in zip(slots, lengths, paths, strict=True):
            for i, row in enumerate(path):
                if i != row:  # paths ascend, so a row is always read before it is overwritten
                    source.append(slot * self.capacity + length + row)
                    target.append(slot * self.capacity + length + i)
        if source:
            for parts in self._storage.values():
                for flat in parts:
                    at = torch.tensor([source, target], device=flat.device)
                    flat.index_copy_(0, at[1], flat.index_select(0, at[0]))

    def move(self, source: int, target: int, length: int) -> None:
        """The sequence in slot source now lives in slot target."""
        for parts in self._storage.values():
            for flat in parts:
                grid = flat[:-1].view(self.slots, self.capacity, *flat.shape[1:])
                grid[target, :length] = grid[source, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not used for positions or masks: a step brings both."""
        return 0
