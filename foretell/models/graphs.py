"""Decode steps of static shape, replayed as CUDA graphs: at a few rows a GPU waits for launches, not for numbers.

A step's Python runs once a shape, over buffers that stay where they are; afterwards new numbers are copied into the
buffers and the recorded kernels run again. Shapes are rounded up (sequences to a power of two, visible cache columns to
a multiple of COLUMNS), so that few are recorded. `replayed=False` runs the Python each time instead: the slow twin,
which also runs on a CPU, where tests hold it against the ordinary forward.
"""

# B sequences, R rows of a step, D hidden width.

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from foretell.models.slot_cache import SlotCache

COLUMNS = 128  # visible columns are rounded up to a multiple of this
MOST_ROWS = 256  # of all sequences together: larger steps keep a GPU busy as they are
_RECORDING = threading.Lock()  # one graph is recorded at a time
_Key = tuple[int, int, int, bool]  # sequences, rows, columns, whether there is a tree


@dataclass
class _Step:
    """One shape: the buffers that its kernels read, the states that they write, and how to run them."""

    ids_BR: Tensor
    lengths_B: Tensor
    positions_BR: Tensor
    valid_rows_B: Tensor
    parents_BR: Tensor | None
    run: Callable[[], Any]
    out: Any = None


class StaticSteps:
    """Calls `forward(ids, lengths, positions, parents, valid_rows, visible, cache)` over static buffers."""

    def __init__(self, forward: Callable[..., Any], replayed: bool) -> None:
        self.forward, self.replayed = forward, replayed
        # recorded kernels write into one cache's storage, as it was laid out: (addresses, steps) of each cache in use
        self._of: WeakKeyDictionary[SlotCache, tuple[tuple[int, ...], dict[_Key, _Step]]] = WeakKeyDictionary()

    def takes(self, sequences: int, rows: int) -> bool:
        """Whether a step of this size is worth recording."""
        return sequences * rows <= MOST_ROWS

    def __call__(
        self,
        ids_BR: Tensor,
        lengths_B: Tensor,
        cache: SlotCache,
        *,
        positions_BR: Tensor,
        parents_BR: Tensor | None,
        valid_rows_B: Tensor | None,
        visible: int,
    ) -> Any:
        """The forward's states; they are overwritten by the next step of the same shape."""
        B, R = ids_BR.shape
        cache.reserve(cache.slots, visible)
        addresses, steps = self._of.get(cache, ((), {}))
        steps = steps if addresses == cache.addresses else {}
        sequences = min(1 << (B - 1).bit_length(), cache.slots)
        columns = min(-(-visible // COLUMNS) * COLUMNS, cache.capacity)
        key = (sequences, R, columns, parents_BR is not None)
        step = steps.get(key)
        if step is None:
            step = steps[key] = self._make(ids_BR, cache, key)
        # padding sequences have no valid row: what they compute goes to the cache's spare row
        step.valid_rows_B.zero_()
        step.valid_rows_B[:B] = R if valid_rows_B is None else valid_rows_B
        step.lengths_B.zero_()
        step.lengths_B[:B] = lengths_B
        step.ids_BR[:B], step.positions_BR[:B] = ids_BR, positions_BR
        if step.parents_BR is not None:
            step.parents_BR[:B] = parents_BR
        step.run()
        self._of[cache] = (cache.addresses, steps)  # a first step has made the storage
        return step.out

    def _make(self, like_BR: Tensor, cache: SlotCache, key: _Key) -> _Step:
        (B, R, columns, tree), at = key, ref(cache)

        def buffer(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=like_BR.device)

        step = _Step(buffer(B, R), buffer(B), buffer(B, R), buffer(B), buffer(B, R) - 1 if tree else None, lambda: None)

        def python() -> None:
            step.out = self.forward(
                step.ids_BR, step.lengths_B, step.positions_BR, step.parents_BR, step.valid_rows_B, columns, at()
            )

        step.run = python
        if self.replayed:
            step.run = self._record(python)
        return step

    def _record(self, python: Callable[[], None]) -> Callable[[], None]:
        """The kernels of `python` as one CUDA graph. All rows are padding meanwhile: only the spare row is written."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate their workspaces on first use, which no graph may record
            for _ in range(2):
                python()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with _RECORDING, torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may go on meanwhile
            python()
        return graph.replay
