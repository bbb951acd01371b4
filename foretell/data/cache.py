"""Answers of the target kept on disk, with the hidden states it had while answering: training needs no second forward.

A store is a folder:

    meta.json    dtype and width of the states; fingerprint: whatever decides the answers (model, settings, prompts)
    hidden.bin   the states, raw, answer after answer; absent where none are kept
    rows.jsonl   one line an answer: key, input_ids, labels, offset and length of its states (in tokens)

An answer exists once its line ends in a newline, and its states are written before its line. So a run that is killed
at any moment loses at most the answer it was writing, and the next run goes on behind the last whole one.
"""

# T tokens of an answer with its prompt, D hidden width.

from __future__ import annotations

import itertools
import json
import mmap
import os
import sys
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretell.runtime import write_json_atomic
from foretell.types import SequenceState, Watcher

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMAT = 1


class HiddenStore(Sequence):
    """Append-only store of encoded answers; resumes where it was stopped. Items are rows for packing and collating.

    The constructor opens a folder for writing, creating or repairing it; `HiddenStore.load` opens one for reading.

    Args:
        folder: of the store.
        fingerprint: everything that decides the answers: a dict of plain values. Resuming under another one is an
            error that names what differs.
        width: D of the states to keep; None keeps plain answers only.
        dtype: of the states on disk: torch.float32, bfloat16 or float16.

    Raises:
        ValueError: the folder was written under another fingerprint, width or dtype, or is damaged before its tail.
        RuntimeError: another process is writing to it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        fingerprint: dict[str, Any],
        width: int | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        name = str(dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"dtype: got {dtype}, wanted one of {', '.join(DTYPES)}.")
        if width is not None and width < 1:
            raise ValueError(f"width: got {width}, wanted the hidden width of the target, or None.")
        meta = {"format": FORMAT, "dtype": None if width is None else name, "width": width, "fingerprint": fingerprint}
        meta = json.loads(json.dumps(meta))  # as it will be read back: tuples are lists, keys are strings
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "meta.json").exists():
            check_meta(folder, _read_meta(folder), meta)
        elif (folder / "rows.jsonl").exists():
            raise ValueError(f"{folder}: got rows.jsonl without meta.json, wanted a whole store or an empty folder.")
        else:
            write_json_atomic(folder / "meta.json", meta)
        self._open(folder, writable=True)

    @classmethod
    def load(cls, folder: str | Path, keys: Sequence[str] | None = None) -> HiddenStore:
        """Open a finished or growing store for reading: what is whole now; nothing on disk is touched.

        keys: the answers to see, in this order; those that the store does not have are left out. None sees all.

        Raises:
            FileNotFoundError: no store there.
            ValueError: the store is damaged before its tail.
        """
        folder = Path(folder)
        if not (folder / "meta.json").exists():
            raise FileNotFoundError(f"{folder}: no meta.json, wanted the folder of a store.")
        store = cls.__new__(cls)
        store._open(folder, writable=False)
        if keys is not None:
            lines = {key: store._lines[store._index[key]] for key in keys if key in store._index}
            store._index, store._lines = {key: at for at, key in enumerate(lines)}, list(lines.values())
        return store

    def _open(self, folder: Path, writable: bool) -> None:
        self.folder, self.meta = folder, _read_meta(folder)
        self.width: int | None = self.meta["width"]
        self.dtype = None if self.width is None else DTYPES[self.meta["dtype"]]
        self._token_bytes = 0 if self.width is None else self.width * self.dtype.itemsize
        self._writable = writable
        self._map_ND: Tensor | None = None
        flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        if not writable and not (folder / "rows.jsonl").exists():
            (self._rows_file, self._hidden_file) = (None, None)
        else:
            self._rows_file = os.open(folder / "rows.jsonl", flags, 0o644)
            hidden = self.width is not None and (writable or (folder / "hidden.bin").exists())
            self._hidden_file = os.open(folder / "hidden.bin", flags, 0o644) if hidden else None
        if writable:
            _lock(self._rows_file, folder)
        self._index: dict[str, int] = {}
        self._lines: list[tuple[int, int]] = []  # first byte and number of bytes of each line
        self._hidden_tokens = 0
        self._scan()
        if writable:
            self._cut()

    def _scan(self) -> None:
        """Find the whole rows. The first row that is not whole must be the tail, or the file is damaged."""
        if self._rows_file is None:
            return
        on_disk = 0 if self._hidden_file is None else os.fstat(self._hidden_file).st_size
        start, torn, lost = 0, None, False
        with (self.folder / "rows.jsonl").open("rb") as file:
            for number, line in enumerate(file, start=1):
                if torn is not None:
                    raise ValueError(
                        f"{self.folder / 'rows.jsonl'}, line {torn}: got a damaged row with others after it, wanted "
                        "damage at the end only. Remove this line's answer by hand, or start a new folder."
                    )
                if not line.endswith(b"\n"):
                    lost = True
                    break
                row = _parse(line)
                if row is None:
                    torn, lost = number, True
                    continue
                if self.width is not None:
                    end = row["offset"] + row["length"]
                    if end * self._token_bytes > on_disk:
                        lost = True  # its states never reached the disk, and so neither did those of later rows
                        break
                    self._hidden_tokens = end
                if row["key"] in self._index:
                    raise ValueError(
                        f"{self.folder / 'rows.jsonl'}, line {number}: got the key {row['key']!r} twice, wanted each "
                        "answer once. Two runs wrote to this folder; start a new one."
                    )
                self._index[row["key"]] = len(self._lines)
                self._lines.append((start, len(line)))
                start += len(line)
            if lost and not self._lines and file.readline():
                # a lost tail is one answer, or a few after a power cut; this is a lost file
                raise ValueError(
                    f"{self.folder}: no row of rows.jsonl has its states in hidden.bin ({on_disk} bytes), wanted both "
                    "files of one store. Bring hidden.bin back, or start a new folder."
                )
        if lost and self._writable:
            warnings.warn(
                f"{self.folder}: the last answer was not written whole; going on behind {len(self._lines)} whole ones.",
                stacklevel=4,
            )

    def _cut(self) -> None:
        """Cut both files behind the last whole row."""
        os.ftruncate(self._rows_file, sum(self._lines[-1]) if self._lines else 0)
        if self._hidden_file is not None:
            os.ftruncate(self._hidden_file, self._hidden_tokens * self._token_bytes)

    def append(
        self, key: str, input_ids: Sequence[int], labels: Sequence[int], hidden_TD: Tensor | None = None, **more: Any
    ) -> None:
        """Add one finished answer. When this returns, a kill of the process can no longer lose it.

        Args:
            key: names the answer; each key once.
            input_ids: T tokens, prompt and answer.
            labels: T token-aligned labels.
            hidden_TD: states of these T tokens; wanted exactly where the store has a width.
            more: further columns of the row, plain values.

        Raises:
            ValueError: the key is done, or sizes do not fit.
            OSError: the disk is full: the answer is not kept, the store stays whole.
        """
        if not self._writable:
            raise ValueError(f"{self.folder}: opened for reading, cannot append.")
        key, input_ids, labels = str(key), [int(token) for token in input_ids], [int(label) for label in labels]
        if key in self._index:
            raise ValueError(f"{self.folder}: the answer {key!r} is already there, wanted each key once.")
        if not input_ids or len(labels) != len(input_ids):
            raise ValueError(f"{key!r}: got {len(input_ids)} input_ids and {len(labels)} labels, wanted T > 0 of each.")
        payload = self._payload(key, len(input_ids), hidden_TD)
        row: dict[str, Any] = {"key": key, "input_ids": input_ids, "labels": labels, **more}
        if self.width is not None:
            row |= {"offset": self._hidden_tokens, "length": len(input_ids)}
        line = json.dumps(row).encode() + b"\n"
        start = sum(self._lines[-1]) if self._lines else 0
        try:
            self._cut()  # an interrupt may have come between writing a line and counting it
            if self._hidden_file is not None:
                _write_at(self._hidden_file, payload, self._hidden_tokens * self._token_bytes)
            _write_at(self._rows_file, line, start)
        except BaseException:
            self._cut()
            raise
        self._index[key] = len(self._lines)
        self._lines.append((start, len(line)))
        if self.width is not None:
            self._hidden_tokens += len(input_ids)

    def _payload(self, key: str, T: int, hidden_TD: Tensor | None) -> bytes:
        if (hidden_TD is None) != (self.width is None):
            got, wanted = ("none", f"[{T}, {self.width}]") if hidden_TD is None else ("some", "none (width is None)")
            raise ValueError(f"{key!r}: got hidden states: {got}, wanted {wanted}.")
        if hidden_TD is None:
            return b""
        if tuple(hidden_TD.shape) != (T, self.width):
            raise ValueError(f"{key!r}: got hidden states {tuple(hidden_TD.shape)}, wanted {(T, self.width)}.")
        kept_TD = hidden_TD.detach().to("cpu", self.dtype).contiguous()
        if not kept_TD.isfinite().all():
            raise ValueError(
                f"{key!r}: got hidden states that are not finite as {self.meta['dtype']}, wanted numbers. Where the "
                "target's states are only too large for float16, keep bfloat16 or float32."
            )
        return kept_TD.view(torch.uint8).numpy().tobytes()

    def __len__(self) -> int:
        return len(self._lines)

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def keys(self) -> list[str]:
        """Keys of the finished answers, in order."""
        return list(self._index)

    def __getitem__(self, index):
        """Row with key, input_ids, labels and, if kept, hidden_states [T, D]: a view of the file, read when touched."""
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a store with {len(self)} rows")
        row = self._row(index % len(self))
        if self.width is None:
            return row
        offset, length = row.pop("offset"), row.pop("length")
        if self._map_ND is None or self._map_ND.shape[0] < offset + length:
            self._map_ND = _map(self._hidden_file, self._hidden_tokens, self.width, self.dtype)
        return row | {"hidden_states": self._map_ND[offset : offset + length]}

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows without their hidden states."""
        for index in range(len(self)):
            yield {name: value for name, value in self._row(index).items() if name not in ("offset", "length")}

    def _row(self, index: int) -> dict[str, Any]:
        if self._rows_file is None:
            raise ValueError(f"{self.folder}: this store is closed; HiddenStore.load opens it for reading.")
        start, length = self._lines[index]
        return json.loads(os.pread(self._rows_file, length, start))

    def close(self) -> None:
        """Force everything to the disk (against power loss) and let another process write."""
        for file in (self._hidden_file, self._rows_file):
            if file is not None:
                if self._writable:
                    os.fsync(file)
                os.close(file)
        self._hidden_file, self._rows_file, self._writable = None, None, False

    def __enter__(self) -> HiddenStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self):
        # workers of a data loader get a reader of their own
        return HiddenStore.load, (self.folder, self.keys())


class JoinedStore(HiddenStore):
    """Several stores of one kind, read as one."""

    def __init__(self, parts: Sequence[HiddenStore]) -> None:
        self.parts = list(parts)
        for part in self.parts[1:]:
            check_meta(part.folder, part.meta, self.parts[0].meta)
        self.folder, self.meta = self.parts[0].folder, self.parts[0].meta
        self.width, self.dtype = self.parts[0].width, self.parts[0].dtype
        self._ends = list(itertools.accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __contains__(self, key: object) -> bool:
        return any(key in part for part in self.parts)

    def keys(self) -> list[str]:
        """See HiddenStore."""
        return [key for part in self.parts for key in part.keys()]  # noqa: SIM118 (not a dict)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of stores with {len(self)} rows")
        at = bisect_right(self._ends, index % len(self))
        return self.parts[at][index % len(self) - (self._ends[at - 1] if at else 0)]

    def rows(self) -> Iterator[dict[str, Any]]:
        """See HiddenStore."""
        return itertools.chain.from_iterable(part.rows() for part in self.parts)

    def close(self) -> None:
        """See HiddenStore."""
        for part in self.parts:
            part.close()

    def __reduce__(self):
        return JoinedStore, (self.parts,)


def _parse(line: bytes) -> dict[str, Any] | None:
    """A row, or None where the line is not a whole one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"key", "input_ids", "labels"} <= row.keys() else None


def _map(file: int, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """The states [N, D] of a file that may be larger than memory: pages are read when they are touched."""
    # private: whoever writes into a row by mistake changes memory, never the file. Not reserved: a private map that can
    # be written is else counted against memory, whole
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    size = tokens * width * dtype.itemsize
    return torch.frombuffer(mmap.mmap(file, size, flags=flags), dtype=dtype).view(tokens, width)


def _write_at(file: int, data: bytes, offset: int) -> None:
    """Write all of data; the operating system may take it in parts."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _lock(file: int, folder: Path) -> None:
    """Keep a second writer out. The lock goes with the process, so a killed run leaves none behind."""
    import fcntl  # here, so that importing this file works where there is none

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise RuntimeError(f"{folder}: another process is writing to this store; wait for it, or stop it.") from error


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        if meta["format"] != FORMAT:
            raise ValueError(f"{folder / 'meta.json'}: got format {meta['format']}, wanted {FORMAT}.")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'meta.json'}: got a damaged file ({error}), wanted a store's meta.") from error
    return meta


def check_meta(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    absent = "(absent)"
    pairs = [(name, found[name], wanted[name]) for name in ("dtype", "width")]
    old, new = found["fingerprint"], wanted["fingerprint"]
    pairs += [(name, old.get(name, absent), new.get(name, absent)) for name in sorted(old.keys() | new.keys())]
    differing = [f"{name}: the folder has {was!r}, this run {now!r}" for name, was, now in pairs if was != now]
    if differing:
        raise ValueError(
            f"{folder}: holds answers made otherwise, cannot resume.\n  "
            + "\n  ".join(differing)
            + "\nUse another folder, or run with the settings it was begun with."
        )


class HiddenRecorder(Watcher):
    """Keeps the states of every token that the target reads while it decodes: training needs no second forward."""

    def __init__(self, source: Callable[[Any], Tensor]) -> None:
        """source: the states [B, R, D] of a forward's rows that are kept."""
        self.source = source
        self._parts: list[list[Tensor]] = []

    def open(self, slots: int, capacity: int) -> None:
        """See Watcher."""
        self._parts = [[] for _ in range(slots)]

    def start(self, slot: int) -> None:
        """See Watcher."""
        self._parts[slot] = []

    def observe(self, sequences: Sequence[SequenceState], rows: Any, kept: list[list[int]]) -> None:
        """See Watcher."""
        states_BRD = self.source(rows)
        for b, (sequence, path) in enumerate(zip(sequences, kept, strict=True)):
            self._parts[sequence.slot].append(states_BRD[b, path].cpu())

    def move(self, source: int, target: int, length: int) -> None:
        """See Watcher."""
        self._parts[target] = self._parts[source]

    def states(self, sequence: SequenceState) -> Tensor:
        """[cached, D] of a sequence that is about to leave."""
        return torch.cat(self._parts[sequence.slot])
