"""Encoded rows kept on disk: tokens and which of them are trained, whatever method learns from them.

    ROOT/<key>/data-*.arrow    tokens and spans, as `datasets` saves them; memory-mapped when read
    ROOT/<key>/about.json      what the key is made of, counts, and a hash of each file
    ROOT/<key>/_SUCCESS        written last: a folder without it is not read, and is made again

The key is a hash of the rows, the tokenizer with its template, and the settings, all by content: names, paths and times
are none. Where several processes ask at once one encodes, and the others wait and read.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from foretell.runtime import atomic_folder, cache_folder, write_json_atomic

FORMAT = 1
DONE, ABOUT = "_SUCCESS", "about.json"


def default_root() -> Path:
    """Where `foretell train` keeps encoded rows."""
    return cache_folder() / "rows"


def rows_hash(rows: Sequence[Any]) -> str:
    """Of what the rows say, wherever they lie and in whatever form of file."""
    found = xxhash.xxh3_128()
    for at in range(len(rows)):
        found.update(json.dumps(_plain(rows[at]), sort_keys=True, default=str).encode())
        found.update(b"\n")
    return found.hexdigest()


def _plain(value: Any) -> Any:
    """Without what is None, which parquet fills in and JSON leaves out."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items() if inner is not None}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def tokenizer_hash(tokenizer: Any) -> str:
    """Of the tokenizer's content: vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # none of slow tokenizers
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:  # what a call to the tokenizer leaves behind is not content
        rules |= {"padding": None, "truncation": None}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    told = [type(tokenizer).__name__, rules, special, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:24]


def kept_table(root: str | Path, settings: dict[str, Any], make: Callable[[], Any]) -> Any:
    """The table that was made with these settings, or is made now and kept.

    Args:
        root: of the cache.
        settings: all that decides the table, plain values.
        make: the `datasets.Dataset`.
    """
    import datasets
    from filelock import FileLock

    told = {"format": FORMAT, **settings}
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]
    folder = Path(root).expanduser() / key
    table = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{key}.lock")):
            if not (folder / DONE).exists():
                shutil.rmtree(folder, ignore_errors=True)
                table = make()
                _keep(folder, told, table)
    except OSError as error:  # a full disk, or a home that nobody may write to
        warnings.warn(f"encoded rows are not kept for the next run: {error}", stacklevel=4)
        return make() if table is None else table
    return datasets.load_from_disk(str(folder), keep_in_memory=False)


def _keep(folder: Path, told: dict[str, Any], table: Any) -> None:
    with atomic_folder(folder) as made:
        table.save_to_disk(str(made))
        counts = {"rows": len(table), "tokens": int(table.data.column("tokens").to_numpy().sum())}
        files = {file.name: _of_file(file) for file in sorted(made.iterdir())}
        write_json_atomic(made / ABOUT, {"settings": told, **counts, "files": files, "made": time.time()})
    (folder / DONE).touch()


def _of_file(path: Path) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**22):
            found.update(block)
    return found.hexdigest()


def entries(root: str | Path) -> Iterator[dict[str, Any]]:
    """What the cache holds: key, folder, rows, tokens, bytes, age in seconds, settings; whole or not."""
    root = Path(root).expanduser()
    folders = [root] if (root / ABOUT).exists() else sorted(root.iterdir()) if root.is_dir() else []
    for folder in folders:
        # rm takes what stands here away: only what has a key's name, or begins with it behind a dot while it is written
        key, temporary = re.fullmatch(r"(\.?)[0-9a-f]{24}(\..*tmp)?", folder.name), folder.name.startswith(".")
        if key is None or not folder.is_dir() or not ((folder / ABOUT).exists() or temporary):
            continue
        found: dict[str, Any] = {"key": folder.name, "folder": folder, "whole": False, "rows": 0, "tokens": 0}
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            found |= {name: about[name] for name in ("rows", "tokens", "settings", "files")}
            found |= {"whole": (folder / DONE).exists(), "age": time.time() - about["made"]}
        except (OSError, ValueError, KeyError):
            pass
        yield found | {"bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file())}


def problems_of(entry: dict[str, Any]) -> list[str]:
    """What is wrong with an entry of the cache: its files are read and held against what was written."""
    if not entry["whole"]:
        return [f"no {DONE}: it was not written whole; the next run makes it again"]
    wrong = []
    for name, wanted in entry["files"].items():
        path = entry["folder"] / name
        if not path.is_file():
            wrong.append(f"{name}: it is gone")
        elif _of_file(path) != wanted:
            wrong.append(f"{name}: its content is not what was written")
    return wrong
