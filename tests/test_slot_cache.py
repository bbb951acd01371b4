"""The slot cache holds what transformers' DynamicCache holds, through rejections, trees, moves and padding."""

# B sequences, S slots, C capacity, H heads, R rows, L visible columns, E width of a head.

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from foretell.models.slot_cache import SlotCache

H, E, LAYERS = 2, 3, 2


def rows(B: int, R: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, [B, H, R, E]."""
    return [
        (torch.randn(B, H, R, E, generator=generator), torch.randn(B, H, R, E, generator=generator))
        for _ in range(LAYERS)
    ]


class Twin:
    """Sequences in a SlotCache, and beside it a DynamicCache of each, cut and gathered as anybody can check."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.cache = SlotCache(slots, capacity)
        self.plain: list[DynamicCache] = []
        self.generator = torch.Generator().manual_seed(0)

    @property
    def lengths(self) -> list[int]:
        return [plain.get_seq_length() for plain in self.plain]

    def join(self) -> None:
        self.plain.append(DynamicCache())

    def step(self, counts: list[int], first: int = 0, slack: int = 0) -> None:
        """Rows for the sequences from slot `first` on, counts[b] of them real; both caches must show the same."""
        R, B = max(counts), len(counts)
        lengths = self.lengths[first : first + B]
        valid_BR = None if min(counts) == R else torch.arange(R) < torch.tensor(counts)[:, None]
        visible = max(lengths) + R + slack
        self.cache.begin(first, torch.tensor(lengths), valid_BR, R, visible)
        for layer, (key, value) in enumerate(rows(B, R, self.generator)):
            shown = self.cache.update(key, value, layer)
            assert shown[0].shape == shown[1].shape == (B, H, visible, E)
            assert all(bool(torch.isfinite(x).all()) for x in shown), "a hidden column times zero must be zero"
            for b, count in enumerate(counts):
                wanted = self.plain[first + b].update(key[b : b + 1, :, :count], value[b : b + 1, :, :count], layer)
                for mine, theirs in zip(shown, wanted, strict=True):
                    assert torch.equal(mine[b, :, : lengths[b] + count], theirs[0])

    def keep(self, before: list[int], paths: list[list[int]]) -> None:
        """Only rows paths[b] of the last step stay."""
        self.cache.keep(list(range(len(paths))), before, paths)
        for plain, length, path in zip(self.plain, before, paths, strict=True):
            at = torch.tensor([*range(length), *(length + row for row in path)], dtype=torch.long)
            for layer in plain.layers:
                layer.keys, layer.values = layer.keys[:, :, at], layer.values[:, :, at]

    def leave(self, slot: int) -> None:
        """The last sequence takes the hole, as in the decode loop."""
        last = self.plain.pop()
        if slot < len(self.plain):
            self.cache.move(len(self.plain), slot, last.get_seq_length())
            self.plain[slot] = last

    def check(self) -> None:
        for slot, plain in enumerate(self.plain):
            for layer, theirs in enumerate(plain.layers):
                for flat, kept in zip(self.cache._storage[layer], (theirs.keys, theirs.values), strict=True):
                    grid = flat[:-1].view(self.cache.slots, self.cache.capacity, H, E)
                    assert torch.equal(grid[slot, : kept.shape[2]].transpose(0, 1), kept[0])


def test_many_random_rounds_show_what_a_dynamic_cache_shows():
    rng, twin = random.Random(0), Twin(4, 40)
    compacted = moved = padded = 0
    for _ in range(150):
        while len(twin.plain) < 4 and (not twin.plain or rng.random() < 0.6):
            first = len(twin.plain)
            joining = rng.randint(1, 4 - first)
            for _ in range(joining):
                twin.join()
            twin.step([rng.randint(1, 9) for _ in range(joining)], first)  # prompts, of the new slots only
        before, counts = twin.lengths, [rng.randint(1, 6) for _ in twin.plain]
        twin.step(counts, slack=rng.randint(0, 2))
        paths = [sorted({0, *rng.sample(range(count), rng.randint(0, count))}) for count in counts]
        twin.keep(before, paths)
        padded += len(set(counts)) > 1
        compacted += any(path != list(range(len(path))) for path in paths)
        for slot in reversed(range(len(twin.plain))):
            if twin.lengths[slot] > 28 or rng.random() < 0.05:
                moved += slot < len(twin.plain) - 1
                twin.leave(slot)
        twin.check()
    assert min(compacted, moved, padded) > 15, "all of it should have happened"


def test_a_path_is_compacted_by_hand():
    twin = Twin(2, 12)
    twin.join()
    twin.join()
    twin.step([3, 2])
    before = twin.cache._storage[0][0].clone()
    twin.step([5, 5])
    step = twin.cache._storage[0][0].clone()
    twin.keep([3, 2], [[0, 2, 4], [0, 1]])
    after = twin.cache._storage[0][0]
    assert torch.equal(after[:3], before[:3]), "what was there stays"
    assert torch.equal(after[3:6], step[[3, 5, 7]])
    assert torch.equal(after[12 : 12 + 4], step[12 : 12 + 4]), "a chain moves nothing"
    twin.check()


def test_padding_rows_write_to_the_spare_row_only():
    cache = SlotCache(2, 6)
    cache.begin(0, torch.tensor([0, 0]), None, 4, 4)
    cache.update(torch.ones(2, H, 4, E), torch.ones(2, H, 4, E), 0)
    before = cache._storage[0][0].clone()
    # the second sequence has one real row; its two padding rows would land on columns of its own
    cache.begin(0, torch.tensor([3, 1]), torch.tensor([[True] * 3, [True, False, False]]), 3, 6)
    cache.update(torch.full((2, H, 3, E), 7.0), torch.full((2, H, 3, E), 7.0), 0)
    after = cache._storage[0][0]
    changed = [i for i in range(13) if not torch.equal(before[i], after[i])]
    assert changed == [3, 4, 5, 6 + 1, 12]


def test_a_row_beyond_the_capacity_of_the_last_slot_does_not_leak():
    """Padding past the end of a slot would be the next slot's first columns."""
    cache = SlotCache(2, 4)
    cache.begin(0, torch.tensor([0, 0]), None, 4, 4)
    cache.update(torch.ones(2, H, 4, E), torch.ones(2, H, 4, E), 0)
    cache.begin(0, torch.tensor([3]), torch.tensor([[True, False, False]]), 3, 4)
    cache.update(torch.full((1, H, 3, E), 7.0), torch.full((1, H, 3, E), 7.0), 0)
    assert [float(x) for x in cache._storage[0][0][:8, 0, 0]] == [1, 1, 1, 7, 1, 1, 1, 1]


@pytest.mark.parametrize(("first", "count", "visible"), [(0, 3, 4), (2, 1, 4), (0, 2, 9), (0, 1, 3000)])
def test_what_does_not_fit_makes_it_grow(first, count, visible):
    """Columns and slots, in the middle of a run: what was there stays, all that is new is zero."""
    cache = SlotCache(2, 8)
    old = torch.randn(2, H, 4, E)
    cache.begin(0, torch.tensor([0, 0]), None, 4, 4)
    cache.update(old, old, 0)
    layout = cache.layout
    cache.begin(first, torch.full((count,), 4), None, 1, max(visible, 5))
    assert cache.layout != layout and cache.slots >= first + count and cache.capacity >= visible
    new = torch.full((count, H, 1, E), 7.0)
    cache.update(new, new, 0)
    wanted = torch.zeros(cache.slots, cache.capacity, H, E)
    wanted[:2, :4] = old.transpose(1, 2)
    wanted[first : first + count, 4] = 7.0
    for flat in cache.held(0):
        assert torch.equal(flat[: cache.slots * cache.capacity].view_as(wanted), wanted)


def test_rows_serve_other_slots():
    """A run of many short texts and one of a long one share the same memory."""
    cache = SlotCache(16, 20)
    cache.begin(0, torch.zeros(16, dtype=torch.long), None, 20, 20)
    cache.update(torch.ones(16, H, 20, E), torch.ones(16, H, 20, E), 0)
    before = cache.held(0)[0].data_ptr()
    cache.open()
    cache.reserve(1, 300)
    assert (cache.slots, cache.capacity) == (1, 320) and cache.held(0)[0].data_ptr() == before
    assert not cache.held(0)[0].any()


def test_keys_and_values_of_different_width():
    """Latent attention has values narrower than keys; layers may differ as well."""
    cache = SlotCache(1, 8)
    cache.begin(0, torch.tensor([0]), None, 2, 2)
    for layer, heads in enumerate((1, 4)):
        key, value = torch.randn(1, heads, 2, 6), torch.randn(1, heads, 2, 4)
        shown = cache.update(key, value, layer)
        assert torch.equal(shown[0], key) and torch.equal(shown[1], value)
