"""Where rows come from: files, folders, datasets, lists. Every row is checked once, and every error names its place."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foretell.data.rows import check_row

SUFFIXES = (".jsonl", ".json", ".parquet")
MAX_PROBLEMS = 10  # enough to see a pattern, few enough to read
SPLIT_WORDS = {"train", "training", "test", "testing", "valid", "validation", "val", "dev", "eval"}


class Rows(Sequence):
    """Checked rows, and where each was found. Behaves as a list of dicts."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        name: str,
        places: list[tuple[str, str, int]] | None = None,
        skipped: int = 0,
    ):
        self.source, self._name, self._places = rows, name, places
        self.skipped = skipped  # bad ones, which are not among the rows

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return self.source[index]

    def part(self, chosen: slice) -> Rows:
        """These of the rows, with their places."""
        indices = range(*chosen.indices(len(self)))
        places = [self._places[at] if self._places else (self._name, "index", at) for at in indices]
        return Rows(self[chosen], self._name, places)

    def where(self, index: int) -> str:
        """The place of a row for people: "prompts.jsonl, line 17", or "rows[16]" where it came from Python."""
        if self._places is None:
            return f"{self._name}[{index}]"
        name, unit, number = self._places[index]
        return f"{name}, {unit} {number}"


def load_rows(source: Any, split: str = "train", skip_bad: bool = False) -> Rows:
    """Load and check rows in TRL's forms (see `foretell.data.rows`).

    Args:
        source: a .jsonl, .json or .parquet file; a folder of these, or one written by `Dataset.save_to_disk`; a
            `datasets.Dataset`; a list of dicts; a mapping of splits to any of these; or the name of a dataset for
            `datasets.load_dataset`, as "name" or "name:configuration".
        split: taken where the source has splits: a dataset's name, a mapping, or a folder whose file names carry
            split words (`train.jsonl`, `my-test-0001.parquet`). One file or one list is a split by itself.
        skip_bad: leave malformed rows out; they are counted (`skipped`), and the first ones named in a warning.

    Returns:
        A list-like of dicts whose `where(index)` names the place of a row.

    Raises:
        FileNotFoundError: nothing there under that name.
        ValueError: malformed or empty data: up to ten problems in one error, each with its file and line.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir():
            if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
                return load_rows(_import_datasets().load_from_disk(str(path)), split, skip_bad)
            return _load_files(_files_of(path, split), str(path), skip_bad)
        if path.is_file():
            return _load_files([path], str(path), skip_bad)
        return _checked(_load_named(str(source), split), str(source), skip_bad)
    if isinstance(source, Mapping):
        if split not in source:
            raise ValueError(f"no split {split!r}: got {sorted(map(str, source))}; choose one of them.")
        return load_rows(source[split], split, skip_bad)
    if isinstance(source, Rows):
        return source
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise ValueError(
            f"rows: got {type(source).__name__}, wanted something with a length, such as a list of dicts or a "
            "datasets.Dataset. Of a stream, take as many rows as you want: list(stream.take(1000))."
        )
    return _checked(source, "rows", skip_bad)


def _checked(rows: Sequence[Any], name: str, skip_bad: bool) -> Rows:
    """Check rows that have no file and line."""
    problems = Problems(skip_bad)
    good = [index for index in range(len(rows)) if problems.check(f"{name}[{index}]", rows[index])]
    problems.close()
    if not good:
        raise ValueError(f"{name}: no rows, wanted at least one.")
    if problems.count:
        return Rows([rows[at] for at in good], name, [(name, "index", at) for at in good], problems.count)
    return Rows(rows, name)


def _load_files(paths: list[Path], name: str, skip_bad: bool) -> Rows:
    rows, places, problems = [], [], Problems(skip_bad)
    for path in paths:
        before = problems.count, len(rows)
        for unit, number, row in _read(path, problems):
            if problems.check(f"{path.name}, {unit} {number}", row):
                rows.append(row)
                places.append((path.name, unit, number))
        if (problems.count, len(rows)) == before:
            problems.add(f"{path.name}: the file is empty, wanted at least one row")
    problems.close()
    if not rows:
        raise ValueError(f"{name}: no rows, wanted at least one.")
    return Rows(rows, name, places, problems.count)


class Problems:
    """Collects problems of rows, so that a person fixes a file in one go, not in ten; or counts them and goes on."""

    def __init__(self, skip: bool = False) -> None:
        self.count, self.lines, self._skip = 0, [], skip

    def add(self, line: str) -> None:
        self.count += 1
        if self.count <= MAX_PROBLEMS:
            self.lines.append(line)
        if self.count == MAX_PROBLEMS and not self._skip:
            self.lines.append(f"stopped after {MAX_PROBLEMS} problems; there may be more")
            self.close()

    def check(self, place: str, row: Any) -> bool:
        try:
            check_row(row)
        except ValueError as error:
            self.add(f"{place}: {error}")
            return False
        return True

    def close(self) -> None:
        """Raise what was found, or warn of it where such rows are to be skipped."""
        if not self.lines:
            return
        if not self._skip:
            raise ValueError("\n".join(self.lines))
        more = [f"and {self.count - MAX_PROBLEMS} more"] if self.count > MAX_PROBLEMS else []
        warnings.warn("\n".join([f"{self.count} rows are skipped:", *self.lines, *more]), stacklevel=3)


def _read(path: Path, problems: Problems) -> Iterator[tuple[str, int, Any]]:
    """Yield (unit, number, row) of one file; units count from 1."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowInvalid as error:
            problems.add(f"{path.name}: got a file that is no whole parquet file ({error})")
            return
        for number, row in enumerate(table.to_pylist(), start=1):
            yield "row", number, row
    elif path.suffix == ".jsonl" or (path.suffix == ".json" and _first_byte(path) != b"["):
        # many .json files hold one object a line
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:  # also bytes that are no UTF-8
                    problems.add(f"{path.name}, line {number}: got {_start(line)}, wanted one JSON object ({error})")
                else:
                    yield "line", number, row
    elif path.suffix == ".json":
        try:
            items = json.loads(path.read_bytes())
        except json.JSONDecodeError as error:
            problems.add(f"{path.name}, line {error.lineno}: wanted a JSON list of objects ({error.msg})")
            return
        except UnicodeDecodeError as error:
            problems.add(f"{path.name}: wanted UTF-8 ({error})")
            return
        for number, row in enumerate(items, start=1):
            yield "item", number, row
    else:
        problems.add(f"{path.name}: got a file of type {path.suffix or 'unknown'!r}, wanted {', '.join(SUFFIXES)}")


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                return line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return b""


def _start(line: bytes) -> str:
    text = line.decode("utf-8", errors="replace").strip()
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _files_of(folder: Path, split: str) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and not path.name.startswith("."))
    if not files:
        raise ValueError(f"{folder}: no {', '.join(SUFFIXES)} file in this folder, wanted at least one.")
    words = {path: set(re.split(r"[^a-z]+", path.stem.lower())) for path in files}
    chosen = [path for path in files if split.lower() in words[path]]
    # without split words in any name the whole folder is the training split
    if not chosen and split == "train" and not any(words[path] & SPLIT_WORDS for path in files):
        chosen = files
    if not chosen:
        raise ValueError(f"{folder}: no file of the split {split!r}, got {[path.name for path in files]}.")
    return chosen


def _load_named(name: str, split: str) -> Any:
    """A dataset by name. What looks like a path never reaches the network."""
    looks_like_path = name.endswith(SUFFIXES) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path or not name:
        raise FileNotFoundError(f"{name}: no such file or folder.")
    name, _, configuration = name.partition(":")
    datasets = _import_datasets()
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name}: no such file or folder, and no dataset of this name could be loaded ({error})."
        ) from error


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Datasets by name need the datasets library: pip install datasets") from error
    return datasets
