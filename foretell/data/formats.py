"""Where rows come from: files, folders, datasets, lists. Every row is checked once, and every error names its place.

`datasets` reads parquet, CSV and what has a name. Lines of JSON are read here: it neither says which line is bad nor
takes rows that differ in form; of a file only the places of its lines are held, so that it may be larger than memory.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from foretell.data.answers import kept_states
from foretell.data.rows import check_row

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
MAX_PROBLEMS = 10  # enough to see a pattern, few enough to read
LARGE_BYTES = 2**26  # reading a larger file shows a bar
SPLIT_WORDS = {"train", "training", "test", "testing", "valid", "validation", "val", "dev", "eval"}


class Part(Sequence):
    """Rows of one file or other source, unchecked, and what people call the place of each."""

    def __init__(self, rows: Sequence[Any], name: str, unit: str = "", first: int = 1):
        self.rows, self.name, self.unit, self.first = rows, name, unit, first

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """The row. Raises ValueError where there is none to be read."""
        return self.rows[index]

    def where(self, index: int) -> str:
        """The place of a row for people: "prompts.parquet, row 17", or "rows[16]" where it came from Python."""
        return f"{self.name}, {self.unit} {self.first + index}" if self.unit else f"{self.name}[{index}]"


class Lines(Part):
    """One JSON object a line, read when it is asked for: the file is not held open, there may be thousands."""

    def __init__(self, path: Path, name: str):
        super().__init__((), name, "line")
        self.path = path
        starts, numbers, at = array("q"), array("q"), 0
        with path.open("rb") as file:
            self._state = self._seen(file)
            for number, line in enumerate(file, start=1):
                if line.strip():
                    starts.append(at)
                    numbers.append(number)
                at += len(line)
        self._starts, self._numbers = starts, numbers

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        """See Part."""
        start = self._starts[index]
        end = self._starts[index + 1] if index + 1 < len(self) else self._state[0]
        with self.path.open("rb", buffering=0) as file:
            if self._seen(file) != self._state:
                raise ValueError("the file changed while it was read, wanted one that nobody writes to")
            file.seek(start)
            line = file.read(end - start)
        try:
            return json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        except ValueError as error:  # also bytes that are no UTF-8
            raise ValueError(f"got {_start(line)}, wanted one JSON object ({error})") from None

    def where(self, index: int) -> str:
        """See Part."""
        return f"{self.name}, line {self._numbers[index]}"

    @staticmethod
    def _seen(file: Any) -> tuple[int, int]:
        state = os.fstat(file.fileno())
        return state.st_size, state.st_mtime_ns


class Rows(Sequence):
    """Checked rows, and where each was found. Behaves as a list of dicts."""

    def __init__(self, parts: Sequence[Part], chosen: Sequence[int] | None = None, skipped: int = 0):
        """chosen: those of all rows of the parts that are meant; None: all."""
        self.parts, self._ends = parts, [0, *accumulate(map(len, parts))]
        self._chosen = range(self._ends[-1]) if chosen is None else chosen
        self.skipped = skipped  # bad ones, which are not among the rows

    @property
    def source(self) -> Any:
        """What the rows were given as, where they came from Python."""
        return self.parts[0].rows if len(self.parts) == 1 and not self.parts[0].unit else None

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        part, at = self._find(index)
        return part[at]

    def part(self, chosen: slice) -> Rows:
        """These of the rows, with their places."""
        return Rows(self.parts, self._chosen[chosen])

    def where(self, index: int) -> str:
        """The place of a row: see Part."""
        part, at = self._find(index)
        return part.where(at)

    def _find(self, index: int) -> tuple[Part, int]:
        at = self._chosen[index]
        number = bisect_right(self._ends, at) - 1
        return self.parts[number], at - self._ends[number]


def load_rows(source: Any, split: str = "train", skip_bad: bool | int = False, may_be_empty: bool = False) -> Rows:
    """Load and check rows in TRL's forms (see `foretell.data.rows`).

    Args:
        source: see `open_source`.
        split: taken where the source has splits: a dataset's name, a mapping, or a folder whose file names carry
            split words (`train.jsonl`, `my-test-0001.parquet`). One file or one list is a split by itself.
        skip_bad: leave malformed rows out; they are counted (`skipped`), and the first ones named in a warning. A
            number: so many of them at most.
        may_be_empty: no good row is no error.

    Returns:
        A list-like of dicts whose `where(index)` names the place of a row.

    Raises:
        FileNotFoundError: nothing there under that name.
        ValueError: malformed or empty data: up to ten problems in one error, each with its file and line.
    """
    if isinstance(source, Rows):
        return source
    problems, (parts, name) = Problems(skip_bad), open_source(source, split)
    good, at = array("q"), 0
    for part in parts:
        for index in range(len(part)):
            try:
                check_row(part[index])
                good.append(at + index)
            except ValueError as error:
                problems.add(f"{part.where(index)}: {error}")
        at += len(part)
    problems.close()
    if not good and not may_be_empty:
        raise ValueError(f"{name}: no rows, wanted at least one.")
    return Rows(parts, None if len(good) == at else good, problems.count)


def open_source(source: Any, split: str) -> tuple[list[Part], str]:
    """The parts of a source, their rows unchecked, and its name for people. Raises ValueError for files that cannot be
    read.

    Args:
        source: a .jsonl, .json, .parquet or .csv file, or one of these as .gz; a folder of them, or one written by
            `Dataset.save_to_disk`; a `datasets.Dataset`; a list of dicts; a mapping of splits to any of these; or the
            name of a dataset for `datasets.load_dataset`, as "name" or "name:configuration". JSON is a list, an object
            a line, or one object whose "results" are a list.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir() and (store := kept_states(path)) is not None:
            return [Part(store, str(path))], str(path)
        if path.is_dir() and not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            parts, problems = [], Problems()
            for file in _files_of(path, split):
                try:
                    parts.append(_open_file(file))
                except ValueError as error:
                    problems.add(str(error))
            problems.close()
            return parts, str(path)
        if path.is_file():
            return [_open_file(path)], str(path)
        if path.is_dir():
            found = datasets.load_from_disk(str(path))
            return open_source(found, split) if isinstance(found, Mapping) else ([Part(found, path.name)], path.name)
        return [Part(_load_named(str(source), split), str(source))], str(source)
    if isinstance(source, Mapping):
        if split not in source:
            raise ValueError(f"no split {split!r}: got {sorted(map(str, source))}; choose one of them.")
        return open_source(source[split], split)
    if isinstance(source, Part):
        return [source], source.name
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise ValueError(
            f"rows: got {type(source).__name__}, wanted something with a length, such as a list of dicts or a "
            "datasets.Dataset. Of a stream, take as many rows as you want: list(stream.take(1000))."
        )
    return [Part(source, "rows")], "rows"


class Problems:
    """Collects problems of rows, so that a person fixes a file in one go, not in ten; or counts them and goes on."""

    def __init__(self, skip: bool | int = False) -> None:
        """skip: go on, whatever their number; a number of them at most."""
        self.count, self.lines, self._skip = 0, [], skip

    def add(self, line: str) -> None:
        self.count += 1
        if self.count <= MAX_PROBLEMS:
            self.lines.append(line)
        if self.count == MAX_PROBLEMS and not self._skip:
            self.lines.append(f"stopped after {MAX_PROBLEMS} problems; there may be more")
            self.close()

    def close(self) -> None:
        """Raise what was found, or warn of it where such rows are to be skipped."""
        if not self.lines:
            return
        more = [f"and {self.count - MAX_PROBLEMS} more"] if self.count > MAX_PROBLEMS else []
        if not self._skip:
            raise ValueError("\n".join(self.lines))
        if self._skip is not True and self.count > self._skip:
            raise ValueError("\n".join([f"{self.count} bad rows, wanted {self._skip} at most:", *self.lines, *more]))
        warnings.warn("\n".join([f"{self.count} rows are skipped:", *self.lines, *more]), stacklevel=3)


def _open_file(path: Path) -> Part:
    """The rows of one file. Raises ValueError where it cannot be read or holds none."""
    name, kind = path.name, _plain(path).suffix
    if kind not in SUFFIXES:
        wanted = f"{', '.join(SUFFIXES)}, or one of these as .gz"
        raise ValueError(f"{name}: got a file of type {kind or 'unknown'!r}, wanted {wanted}")
    part: Part | None = None
    try:
        path = _unzipped(path) if path.suffix == ".gz" else path
        items = _items(path) if kind == ".json" else None
        if items is not None:
            part = Part(items, name, "item")
        elif kind in (".json", ".jsonl"):
            part = Lines(path, name)
        elif kind != ".parquet" or pyarrow.parquet.read_metadata(path).num_rows:  # datasets cannot read one of no rows
            with bars(path.stat().st_size > LARGE_BYTES):
                found = datasets.load_dataset(kind[1:], data_files=str(path), split="train")
            part = Part(found, name, "row")
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno}: wanted a JSON list of objects ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: wanted UTF-8 ({error})") from None
    except Exception as error:  # pyarrow's, pandas' and gzip's, as datasets passes them on
        if "corresponds to no data" not in str(error):
            whole = "gz" if path.suffix == ".gz" else kind[1:]
            said = error.__cause__ or error
            raise ValueError(f"{name}: got a file that is no whole {whole} file ({said})") from error
    if not part:
        raise ValueError(f"{name}: the file is empty, wanted at least one row")
    return part


def _plain(path: Path) -> Path:
    return path.with_suffix("") if path.suffix == ".gz" else path


def _unzipped(path: Path) -> Path:
    """The content, beside what datasets keeps. (Its own extraction knows a file by its name, whole or not.)"""
    state = path.stat()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "foretell-gz"
    name = hashlib.sha256(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:24]
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as part:
            with gzip.open(path) as packed, open(f"{part}/whole", "wb") as out:
                shutil.copyfileobj(packed, out)
            os.replace(f"{part}/whole", folder / name)
    return folder / name


def _items(path: Path) -> list[Any] | None:
    """Of a .json file that is one list, or one object with a list of "results"; None: an object a line."""
    first = b""
    with path.open("rb") as file:
        for line in file:
            first = line.removeprefix(b"\xef\xbb\xbf").strip()
            if first:
                break
    if first[:1] == b"[":
        return json.loads(path.read_bytes())
    try:
        if "results" not in json.loads(first):
            return None
    except ValueError:  # an object over several lines, or a bad first line
        pass
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return None
    return found["results"] if isinstance(found, dict) and isinstance(found.get("results"), list) else None


def _start(line: bytes) -> str:
    text = line.decode("utf-8", errors="replace").strip()
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _files_of(folder: Path, split: str) -> list[Path]:
    files = [file for file in sorted(folder.iterdir()) if _plain(file).suffix in SUFFIXES and file.name[0] != "."]
    if not files:
        raise ValueError(f"{folder}: no {', '.join(SUFFIXES)} file in this folder, wanted at least one.")
    words = {path: set(re.split(r"[^a-z]+", _plain(path).stem.lower())) for path in files}
    chosen = [path for path in files if split.lower() in words[path]]
    # without split words in any name the whole folder is the training split
    if not chosen and split == "train" and not any(words[path] & SPLIT_WORDS for path in files):
        chosen = files
    if not chosen:
        raise ValueError(f"{folder}: no file of the split {split!r}, got {[path.name for path in files]}.")
    return chosen


def _load_named(name: str, split: str) -> Any:
    """A dataset by name. What looks like a path never reaches the network."""
    looks_like_path = name.endswith((*SUFFIXES, ".gz")) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path or not name:
        raise FileNotFoundError(f"{name}: no such file or folder.")
    name, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name}: no such file or folder, and no dataset of this name could be loaded ({error})."
        ) from error


@contextmanager
def bars(shown: bool) -> Iterator[None]:
    """The bars of datasets, only where there is time to look at them."""
    hide = not shown and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()
