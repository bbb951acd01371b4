"""Which kernel computes a product fastest here, by its number of rows: measured at first use, then read from disk.

A constant cannot be right on two machines: weights packed for oneDNN win at every number of rows on one CPU and lose a
single row on another. Kernels round differently, so what was chosen once holds for the whole process. What was measured
while other work took time is marked so on the disk: a later process measures again, and what is quieter stays.
FORETELL_KERNELS=plain: nothing but PyTorch's own. FORETELL_CACHE: the folder that keeps what was measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foretell.runtime import cache_folder, cpu_flags, cpu_model, give_back, write_json_atomic

ROWS = (1, 2, 3, 4, 8, 16, 32, 64)  # what is between two is as the greater one, what is beyond as the last
_BUCKET = [next(i for i, most in enumerate(ROWS) if rows <= most) for rows in range(ROWS[-1] + 1)]
PLAIN = "plain"
_SECONDS, _PASSES = 1.0, 8  # that a measurement takes, twice as long where it is disturbed; the first pass warms up
_SAMPLE_BYTES, _PART_BYTES = 128 << 20, 32 << 20  # of weights in turn, more than caches hold; of one weight
_NOISE = 0.03  # by less than that nothing wins
QUIET = 0.2  # share of a measurement's time that other work may take: a core that is shared with one more takes a half
_SOON = 60.0  # seconds in which a busy measurement is made again for the second time; each further time waits longer

_lock = threading.RLock()
_known: dict[Path, dict[str, dict[str, Any]]] = {}  # what this process goes by


class Measured(nn.Module, ABC):
    """A product that several kernels can compute. Plain until `settle`.

    kernels: beside PyTorch's own way, `PLAIN`. Each may need something of its own, made by `prepare`. most: of them
    that may be kept at once, since each keeps a copy of the weight.
    """

    most = 1

    def __init__(self, key: str, width: int, weights: Sequence[Tensor], kernels: Sequence[str]) -> None:
        super().__init__()
        self.key, self.width, self.weights, self.like = key, width, list(weights), weights[0]
        self.kernels = tuple(kernels) if self.like.device.type == "cpu" else ()
        self.settled, self.kept = False, {}
        self._by_rows = [PLAIN] * (ROWS[-1] + 1)

    def kernel(self, rows: int) -> str:
        """That runs for so many rows."""
        return self._by_rows[min(rows, ROWS[-1])]

    @property
    def names(self) -> list[str]:
        """The kernel for each of ROWS."""
        return [self.kernel(rows) for rows in ROWS]

    @abstractmethod
    def part(self, share: float) -> Measured:
        """Another of the same kind to measure, plain yet, of that share of the weights."""

    @abstractmethod
    def prepare(self, kernel: str) -> Tensor:
        """What a kernel needs of its own."""

    @abstractmethod
    def run(self, kernel: str, x: Tensor) -> Tensor:
        """[..., width] -> [..., out]."""

    def near(self, kernel: str) -> float:
        """How far a kernel's numbers may be from the plain ones, as a share."""
        return 1e-4 if self.like.dtype == torch.float32 else 2e-2

    def renew(self, live: nn.Module) -> bool:
        """Whether this stands for `live` still, now that its weights hold other values: what kernels keep is made anew,
        each in the memory that the one before leaves.
        """
        for kernel in list(self.kept):
            del self.kept[kernel]
            self.kept[kernel] = self.prepare(kernel)
        return True

    def keep(self, kernel: str) -> bool:
        """Make a kernel ready, unless this machine has none, or one that computes something else."""
        probe_ND = torch.linspace(-2, 3, self.width, device=self.like.device).sin()[None].to(self.like.dtype)
        try:
            self.kept[kernel] = self.prepare(kernel)
            got, wanted = (self.run(name, probe_ND).double() for name in (kernel, PLAIN))
        except (RuntimeError, AttributeError):  # an operation that this build of torch has not
            self.kept.pop(kernel, None)
            return False
        near = self.near(kernel)
        near_zero = near * float(wanted.nan_to_num().abs().max())  # weights may be no numbers: so are the products
        if torch.allclose(got, wanted, rtol=near, atol=near_zero, equal_nan=True):
            return True
        del self.kept[kernel]
        return False

    def take(self, table: Sequence[str]) -> None:
        """Run these kernels, one for each of ROWS."""
        self.settled = True
        for kernel in sorted(set(table) - {PLAIN}):
            if not self.keep(kernel):
                warnings.warn(f"{self.key}: kernel {kernel!r} computes something else here; not used.", stacklevel=2)
                table = [PLAIN if name == kernel else name for name in table]
        self._by_rows = [table[i] for i in _BUCKET]


@torch.no_grad()
def settle(root: nn.Module) -> None:
    """Choose the kernels of every product below `root` that has none yet, and make what they need."""
    wish = os.environ.get("FORETELL_KERNELS", "")
    if wish not in ("", PLAIN):
        raise ValueError(f"FORETELL_KERNELS: got {wish!r}, wanted {PLAIN!r} or nothing.")
    groups: dict[str, list[Measured]] = {}
    for module in root.modules():
        if isinstance(module, Measured) and not module.settled and module.kernels and wish != PLAIN:
            groups.setdefault(module.key, []).append(module)

    def right(key: str, table: Any) -> bool:
        names = [PLAIN, *groups[key][0].kernels]
        is_table = isinstance(table, list) and len(table) == len(ROWS)
        return is_table and all(name in names for name in table) and len({*table} - {PLAIN}) <= groups[key][0].most

    tables = remembered("kernels", groups, right, lambda keys: measure({key: groups[key] for key in keys}))
    for key, members in groups.items():
        for member in members:
            member.take(tables[key])


def measure(groups: dict[str, list[Measured]]) -> tuple[dict[str, list[str]], float]:
    """(the kernels of each group of equal shapes for each of ROWS, the share `lost`). The model's weights in turn, so
    that none is found in a cache, kernels interleaved; the least time counts, because other work only adds.
    """
    start = time.perf_counter()
    parts: list[Measured] = []
    for members in groups.values():
        size = sum(weight.nbytes for weight in members[0].weights)
        count = max(1, _SAMPLE_BYTES // len(groups) // min(size, _PART_BYTES))
        parts += [member.part(min(1.0, _PART_BYTES / size)) for member in members[:count]]
    for part in parts:
        part.kernels = tuple(kernel for kernel in part.kernels if part.keep(kernel))
    names = dict.fromkeys((PLAIN, *(name for part in parts for name in part.kernels)))
    cells = [(part, name) for name, part in product(names, parts) if name in (PLAIN, *part.kernels)]
    passes: list[list[list[float]]] = []
    for again, rows in product(range(1 + _PASSES), ROWS):
        spent = time.perf_counter() - start
        if passes and spent > (_SECONDS if again > 2 else 2 * _SECONDS):
            break
        if rows == ROWS[0]:
            passes.append([])
        passes[-1].append([seconds_of(part, name, part.like.new_ones(rows, part.width)) for part, name in cells])
    # the first pass warms up; from less than two more nobody can tell whether they were disturbed
    whole = [one for one in passes[1:] if len(one) == len(ROWS)]
    share = lost(whole) if len(whole) > 1 else 1.0
    least: dict[str, dict[str, list[float]]] = {key: {} for key in groups}
    for (part, name), times in zip(cells, torch.tensor(whole or passes[:1]).amin(0).T.tolist(), strict=True):
        least[part.key][name] = [min(pair) for pair in zip(times, least[part.key].get(name, times), strict=True)]
    return {key: choose(least[key], members[0].most, share <= QUIET) for key, members in groups.items()}, share


def lost(passes: Sequence[Any]) -> float:
    """Share of the time that other work took: what passes over the same things took beyond the least of each."""
    taken = torch.tensor(passes, dtype=torch.float64)
    return 1 - float(taken.amin(0).sum() * len(taken) / taken.sum())


def seconds_of(part: Measured, kernel: str, x: Tensor) -> float:
    """Of one product."""
    start = time.perf_counter()
    part.run(kernel, x)
    return time.perf_counter() - start


def choose(seconds: dict[str, list[float]], most: int = 1, quiet: bool = True) -> list[str]:
    """The kernel for each of ROWS. seconds: {kernel: its time at each of ROWS}.

    Beside the plain one those, at most so many, with the least time summed over ROWS, in units of the least of all
    kernels. None, and no further one, where it hardly wins; within noise one that is kept. A clock that was disturbed
    does not tell one number of rows from the next: one kernel for all.
    """
    unit = [min(times) for times in zip(*seconds.values(), strict=True)]
    if not quiet:
        whole = {name: sum(t / least for t, least in zip(times, unit, strict=True)) for name, times in seconds.items()}
        return [min(whole, key=lambda name: whole[name])] * len(ROWS)

    def total(kept: tuple[str, ...]) -> float:
        return sum(min(seconds[name][i] for name in (PLAIN, *kept)) / least for i, least in enumerate(unit))

    best: tuple[str, ...] = ()
    for count in range(1, most + 1):
        found = min(combinations((name for name in seconds if name != PLAIN), count), key=total, default=())
        if total(found) > (1 - _NOISE) * total(best):
            break
        best = found
    table = []
    for i, plain in enumerate(seconds[PLAIN]):
        fastest = min(best, key=lambda name: seconds[name][i], default=PLAIN)
        table.append(fastest if seconds[fastest][i] <= (1 + _NOISE) * plain else PLAIN)
    return table


# -- what was measured on this machine ---------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a measurement holds for."""
    return {
        "cpu": cpu_model(),
        "instructions": cpu_flags(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "marked": True,  # files that do not say how disturbed a measurement was are not believed
    }


def remembered(
    section: str,
    keys: Iterable[str],
    right: Callable[[str, Any], bool],
    make: Callable[[list[str]], tuple[dict[str, Any], float]],
) -> dict[str, Any]:
    """{key: value} as measured on this machine; what is not known, not `right`, or was measured while the machine was
    busy is made and kept on disk. make gives values and `lost`; of two measurements the quieter one stays.
    """
    here, keys = machine(), list(keys)
    name = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:12]
    path = cache_folder() / f"measured-{name}.json"

    def usable(found: dict[str, Any], key: str) -> bool:
        entry = found.get(key)
        return isinstance(entry, dict) and all(
            isinstance(entry.get(number), (int, float)) for number in ("lost", "times", "when")
        ) and right(key, entry.get("value"))  # fmt: skip

    with _lock:
        used = _known.setdefault(path, {}).setdefault(section, {})
        unknown = [key for key in keys if not usable(used, key)]
        if not unknown:
            return {key: used[key]["value"] for key in keys}
        try:
            found = _read(path, here).get(section, {})
        except ValueError as error:
            warnings.warn(f"{path}: cannot be used ({error}); measured again.", stacklevel=2)
            found = {}
        used.update({key: found[key] for key in unknown if usable(found, key)})
        if any(key in found and key not in used for key in unknown):
            warnings.warn(f"{path}: wrong entries among its {section}; measured again.", stacklevel=2)
        poor = [key for key in unknown if key not in used or _due(used[key])]
        if poor:
            values, share = make(poor)
            give_back()
            for key in poor:
                old = used.get(key, {"lost": math.inf, "times": 0})
                better = {"value": values[key], "lost": share} if share < old["lost"] else {}
                used[key] = old | better | {"times": old["times"] + 1, "when": time.time()}
            every: dict[str, dict[str, Any]] = {}
            with suppress(ValueError):
                every = _read(path, here)
            theirs = every.setdefault(section, {})  # what other processes have found meanwhile
            for key in poor:
                if not usable(theirs, key) or theirs[key]["lost"] >= used[key]["lost"]:
                    theirs[key] = used[key]
            with suppress(OSError):  # a folder that cannot be written: the next process measures again
                write_json_atomic(path, {"machine": here, **every})
        return {key: used[key]["value"] for key in keys}


def _due(entry: dict[str, Any]) -> bool:
    """Whether a measurement was disturbed and should be made again: at the next start, later ever more rarely."""
    wait = _SOON * (4.0 ** min(entry["times"] - 1, 9) - 1)
    return entry["lost"] > QUIET and not 0 <= time.time() - entry["when"] < wait


def _read(path: Path, here: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The file's sections; ValueError for one that is torn, or of another machine."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(found, dict) or found.pop("machine", None) != here:
        raise ValueError("of another machine")
    if not all(isinstance(section, dict) for section in found.values()):
        raise ValueError("not what this writes")
    return found
