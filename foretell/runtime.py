"""What a run says about itself and leaves behind: provenance, files written whole or not at all, progress."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from foretell import __version__

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "datasets",
    "numpy",
    "trl",
    "peft",
    "triton",
)


def provenance(command: list[str] | None = None) -> dict[str, Any]:
    """What a result was made with: time, versions, commit, command line, hardware. What is not known is absent.

    Imports no heavy package: versions come from the installed metadata, the GPU from torch only if the run uses it.
    """
    versions = {"python": platform.python_version(), "foretell": __version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    hardware: dict[str, Any] = {"cpu": cpu_model(), "cores": _cores()}
    with contextlib.suppress(ValueError, OSError, AttributeError):  # not every system has these names
        hardware["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(sys.argv if command is None else command),
        **_commit(),
        "versions": versions,
        "system": platform.platform(),
        "hardware": hardware,
    }


def _commit() -> dict[str, Any]:
    """The commit of the repository that this file is part of, and whether anything was changed since."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed from a package: a repository further up is somebody else's
        return {}
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit.stdout.strip(), "uncommitted_changes": bool(status.stdout.strip())}


def cpu_model() -> str:
    """As the system names it."""
    return _cpu_line("model name") or platform.processor() or platform.machine()


def cpu_flags() -> str:
    """The instructions for vectors and matrices that the system lists, "" where it lists none."""
    kinds = ("avx", "fma", "amx", "asimd", "sve", "bf16", "i8mm")
    return " ".join(sorted(flag for flag in _cpu_line("flags", "Features").split() if flag.startswith(kinds)))


def _cpu_line(*names: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(names):
                return line.partition(":")[2].strip()
    return ""


def cache_folder() -> Path:
    """Where foretell keeps what it measured: FORETELL_CACHE, or `foretell` in the user's cache folder."""
    return Path(
        os.environ.get("FORETELL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "foretell")
    ).expanduser()


def give_back() -> None:
    """Return memory that was freed to the system, where the C library does so when asked: copies of weights are too
    small for it to do so by itself.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _cores() -> int:
    # where the system can restrict a process to some cores, those count
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write JSON so that path holds either the old content or all of the new. Not-a-number becomes null."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(_jsonable(obj), file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling folder to write into; its files appear at path when the block ends without an error.

    On an error, a full disk above all, path stays as it was and the temporary folder is removed. A folder that exists
    already gets the new files in place of its own of the same names, by renames, which need no room on the disk; its
    other files stay, because they may be anybody's.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: got a file, wanted a folder to save into; choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        files = [file for file in sorted(temporary.rglob("*")) if file.is_file()]
        for written in [*files, temporary]:
            _sync(written)
        if path.exists():
            for file in files:
                place = path / file.relative_to(temporary)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
            _sync(path)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(path.parent)


def _sibling(path: Path) -> Path:
    # beside path, so that a rename stays inside one file system; own names, since tempfile's are private to the user
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def _sync(path: Path) -> None:
    """Have the system put a file, or a folder's list of names, on the disk."""
    if path.is_dir() and os.name == "nt":  # no such call for folders there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _jsonable(dataclasses.asdict(value))
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return _jsonable(value.tolist())
    return value


class Progress:
    """A bar with rate, ETA and any fields on a terminal; elsewhere plain lines, seldom enough for a log file.

    with Progress("train", total=100_000, unit="tok") as p:
        p.update(512, loss=2.31, tau=1.7)
    """

    WINDOW_S = 30.0  # the rate is that of the last half minute, so that a slow start does not spoil the ETA

    def __init__(
        self,
        name: str,
        total: int | None = None,
        unit: str = "it",
        *,
        stream: TextIO | None = None,
        every_s: float = 5.0,
    ):
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self.fields: dict[str, Any] = {}
        self.every_s = every_s
        self.stream = stream or sys.stderr
        # other ranks do the same work: one of them tells
        self.silent = os.environ.get("RANK", "0") != "0"
        self.bar: Any = None

    def __enter__(self) -> Progress:
        self.started = self.printed = time.monotonic()
        self.marks = deque([(self.started, 0)])  # (time, done), at most two a second
        if not self.silent and self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress

            self.bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}"),
                console=Console(file=self.stream),
                redirect_stdout=sys.stdout.isatty(),  # what goes to a file must not be drawn on the terminal
            )
            self.task = self.bar.add_task(self.name, total=self.total, status="")
            self.bar.start()
        return self

    def update(self, n: int = 1, **fields: Any) -> None:
        """n more units are done; fields (loss=..., tau=...) stay shown until they change."""
        now = time.monotonic()
        self.done += n
        self.fields |= fields
        if now - self.marks[-1][0] >= 0.5:
            self.marks.append((now, self.done))
            while len(self.marks) > 2 and now - self.marks[1][0] > self.WINDOW_S:
                self.marks.popleft()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, total=self.total, status=self.status())
        elif not self.silent and now - self.printed >= self.every_s:
            self.printed = now
            self._line(self.status())

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        seconds = self.seconds
        status = f"{'stopped' if error else 'done'} in {clock(seconds)}, {self._count()}"
        if self.done and seconds > 0:
            status += f", {_number(self.done / seconds)} {self.unit}/s"
        status += self._fields()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, total=self.total or self.done, status=status)
            self.bar.stop()
        elif not self.silent:
            self._line(status)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Units a second, over the last WINDOW_S."""
        since, before = self.marks[0]
        return (self.done - before) / max(time.monotonic() - since, 1e-9)

    def status(self) -> str:
        """Count, rate, ETA and fields in one line."""
        text = f"{self._count()}  {_number(self.rate)} {self.unit}/s"
        if self.total and self.rate > 0:
            text += f"  ETA {clock(max(self.total - self.done, 0) / self.rate)}"
        return text + self._fields()

    def _count(self) -> str:
        if not self.total:
            return f"{self.done:,} {self.unit}"
        return f"{self.done:,}/{self.total:,} {self.unit} ({min(self.done / self.total, 1):.0%})"

    def _fields(self) -> str:
        return "".join(f"  {k} {_number(v) if isinstance(v, float) else v}" for k, v in self.fields.items())

    def _line(self, status: str) -> None:
        print(f"{self.name:<10} {status}", file=self.stream, flush=True)


def clock(seconds: float) -> str:
    """75 -> 1:15, 4000 -> 1:06:40."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _number(value: float) -> str:
    """Three significant digits at least."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"
