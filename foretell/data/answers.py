"""A folder of answers: parquet that every tool reads, and what a run needs to go on where it was killed.

    manifest.json                   what decides the answers (another run must say the same), and counts
    train-00003-of-00032.parquet    id, messages (the answer last), input_ids, labels, finish_reason; whole or absent
    states/00003/                   a store (cache.py) with the states of these answers, where they are kept
    .open/00003/                    a store with the answers of a shard that is not written yet
    .truncated/00003.parquet        cut answers that were to be left out, so that none is made again

A shard is a fixed slice of the conversations, whoever answers it, and in whatever order: several machines, or several
processes, each take some of the shards, nobody coordinates them, and their folders become one by moving files.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretell.data.cache import DTYPES, HiddenStore, JoinedStore, check_meta
from foretell.runtime import write_json_atomic
from foretell.types import IGNORE_INDEX

FORMAT = 1
MANIFEST = "manifest.json"
SHARDS, SHARD_ROWS = 32, 1024  # as many shards of a small set, as many conversations in a shard of a large one
COUNTS = ("answers", "truncated", "tokens", "trained_tokens", "drifted")


class AnswerFolder:
    """Writes one part of a folder of answers; goes on with what is there.

    Args:
        folder: made if there is none.
        fingerprint: whatever decides the answers. A folder that was begun with another one is refused.
        names: of all conversations of all parts, in order, each once.
        fields: of a message, in any of the conversations.
        part: (number from 0, how many): the shards that are this process's.
        width: D of the states to keep; None keeps none.
        dtype: of these.
        drop_truncated: put answers that were cut aside.

    Raises:
        ValueError: the folder holds answers made otherwise, or something else.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: Mapping[str, Any],
        names: Sequence[str],
        fields: Iterable[str],
        *,
        part: tuple[int, int] = (0, 1),
        width: int | None = None,
        dtype: torch.dtype = torch.float32,
        drop_truncated: bool = False,
    ) -> None:
        self.folder, self.names, self.drop_truncated = Path(folder), list(names), drop_truncated
        self.rows = min(SHARD_ROWS, -(-len(self.names) // SHARDS))
        self.shards = -(-len(self.names) // self.rows)
        self._mine = [shard for shard in range(self.shards) if shard % part[1] == part[0]]
        self.mine = [index for shard in self._mine for index in self._slice(shard)]
        self._at = {name: index for index, name in enumerate(self.names)}
        self._fields = sorted({"role", "content", *fields}, key=lambda name: (name != "role", name != "content", name))
        self.width, self.dtype = width, dtype
        kept = None if width is None else next(name for name, kind in DTYPES.items() if kind is dtype)
        told = {**fingerprint, "conversations": len(self.names), "drop_truncated": drop_truncated}
        self.meta = {"format": FORMAT, "dtype": kept, "width": width, "fingerprint": told}
        self.meta = json.loads(json.dumps(self.meta))
        self._begin()
        self._stores: dict[int, HiddenStore] = {}
        self._left: dict[int, int] = {}  # of each shard, conversations that want an answer
        self._done: dict[str, dict[int, dict[str, Any]]] = {}  # answers to turns of conversations that are not over
        self.missing: list[int] = []
        for shard in self._mine:
            over = {row["id"] for row in self._written(shard, ["id"])}
            if (self._journal(shard) / "meta.json").exists():
                with HiddenStore.load(self._journal(shard)) as store:
                    for row in store.rows():
                        if row["last"]:
                            over.add(row["id"])
                        else:
                            self._done.setdefault(row["id"], {})[row["turn"]] = row
            missing = [index for index in self._slice(shard) if self.names[index] not in over]
            self.missing += missing
            self._left[shard] = len(missing)

    def _begin(self) -> None:
        """Write the manifest, or hold the one that is there against this run's."""
        path = self.folder / MANIFEST
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            others = [p.name for p in self.folder.iterdir() if p.suffix in (".parquet", ".jsonl", ".json")]
            if others and not path.exists():
                raise ValueError(
                    f"{self.folder}: got a folder with {others[0]} and no {MANIFEST}, wanted an empty folder or one of "
                    "answers; name another."
                )
            own = path.with_name(f".{uuid.uuid4().hex[:8]}.tmp")
            write_json_atomic(own, self.meta)
            try:
                os.link(own, path)  # fails if another process was first
            except FileExistsError:
                pass
            finally:
                own.unlink()
        found = read_manifest(self.folder)
        check_meta(self.folder, found, self.meta)

    def _slice(self, shard: int) -> range:
        return range(shard * self.rows, min((shard + 1) * self.rows, len(self.names)))

    def _journal(self, shard: int) -> Path:
        return self.folder / (".open" if self.width is None else "states") / f"{shard:05}"

    def _files(self, shard: int) -> tuple[Path, Path]:
        """Of answers, and of those that are put aside."""
        written = self.folder / f"train-{shard:05}-of-{self.shards:05}.parquet"
        return written, self.folder / ".truncated" / f"{shard:05}.parquet"

    def _written(self, shard: int, columns: list[str] | None = None) -> list[dict[str, Any]]:
        import pyarrow.parquet

        files = [path for path in self._files(shard) if path.exists()]
        return [row for path in files for row in pyarrow.parquet.read_table(path, columns=columns).to_pylist()]

    def turns(self, index: int) -> list[dict[str, Any]]:
        """Answers to the first turns of a conversation that are there already, in order."""
        found = self._done.get(self.names[index], {})
        return [found[turn] for turn in sorted(found)]

    def append(self, index: int, turn: int, last: bool, row: Mapping[str, Any], hidden_TD: Tensor | None) -> None:
        """Keep the answer to a turn; behind the last one of a shard the shard is written."""
        shard, name = index // self.rows, self.names[index]
        if shard not in self._stores:
            about = {"width": self.width, "dtype": self.dtype, "fingerprint": self.meta["fingerprint"]}
            try:
                self._stores[shard] = HiddenStore(self._journal(shard), **about)
            except RuntimeError as error:
                raise ValueError(f"{error} Two runs have the same --shard.") from error
        store, key = self._stores[shard], name if last else f"{name}\n{turn}"
        if key in store:
            return
        more = {name: value for name, value in row.items() if name not in ("input_ids", "labels")}
        store.append(key, row["input_ids"], row["labels"], hidden_TD, id=name, turn=turn, last=last, **more)
        if last:
            self._left[shard] -= 1
            if not self._left[shard]:
                self._seal(shard)

    def close(self) -> dict[str, int]:
        """Write what there is of shards that are not whole; the counts of all that the folder holds."""
        import pyarrow.parquet

        try:
            for shard in self._mine:
                if (self._journal(shard) / "meta.json").exists():
                    self._seal(shard)
        finally:
            for store in self._stores.values():
                store.close()
        counts = dict.fromkeys(COUNTS, 0)
        aside = sorted((self.folder / ".truncated").glob("*.parquet"))
        for path in [*sorted(self.folder.glob("train-*.parquet")), *aside]:
            of_file = json.loads(pyarrow.parquet.read_metadata(path).metadata[b"foretell"])
            counts = {name: counts[name] + of_file[name] for name in COUNTS}
            if path in aside:
                counts["left_out"] = counts.get("left_out", 0) + of_file["answers"]
        write_json_atomic(self.folder / MANIFEST, {**self.meta, "counts": counts})
        return counts

    def _seal(self, shard: int) -> None:
        """The shard's answers as parquet, those that were written before among them; its journal goes, states stay."""
        if shard in self._stores:
            self._stores.pop(shard).close()
        with HiddenStore.load(self._journal(shard)) as store:
            made = {row["id"]: row for row in store.rows() if row["last"]}
        for row in self._written(shard):
            made.setdefault(row["id"], row)
        rows = [made[name] for name in sorted(made, key=self._at.__getitem__)]
        cut = [self.drop_truncated and row["finish_reason"] == "length" for row in rows]
        for path, aside in zip(self._files(shard), (False, True), strict=True):
            self._write(path, [row for row, is_cut in zip(rows, cut, strict=True) if is_cut == aside])
        if self.width is None:
            gone = self._journal(shard).with_name(f".{shard:05}.gone")  # killed while it goes: no journal either way
            shutil.rmtree(gone, ignore_errors=True)
            self._journal(shard).rename(gone)
            shutil.rmtree(gone)

    def _write(self, path: Path, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        if not rows:
            return
        counts = {
            "answers": len(rows),
            "truncated": sum(row["finish_reason"] == "length" for row in rows),
            "tokens": sum(len(row["input_ids"]) for row in rows),
            "trained_tokens": sum(label != IGNORE_INDEX for row in rows for label in row["labels"]),
            "drifted": sum(bool(row["drifted"]) for row in rows),
        }
        tokens = pa.list_(pa.int32())
        columns = [
            ("id", pa.string()),
            ("messages", pa.list_(pa.struct([(name, pa.string()) for name in self._fields]))),
        ]
        columns += [("input_ids", tokens), ("labels", tokens), ("finish_reason", pa.string()), ("drifted", pa.bool_())]
        table = [{**row, "messages": [self._message(message) for message in row["messages"]]} for row in rows]
        schema = pa.schema(columns, metadata={"foretell": json.dumps(counts)})
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            pa.parquet.write_table(pa.Table.from_pylist(table, schema=schema), temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _message(self, message: Mapping[str, Any]) -> dict[str, str | None]:
        """Every field a text: Arrow wants one type a column, and arguments of calls have none."""
        values = {name: message.get(name) for name in self._fields}
        return {
            n: v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for n, v in values.items()
        }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of answers.

    Raises:
        ValueError: it is damaged, or of another format.
    """
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
        if found["format"] != FORMAT or not isinstance(found["fingerprint"], dict):
            raise KeyError(f"format {found['format']}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / MANIFEST}: got a file that is no manifest of format {FORMAT} ({error}); wanted a folder of "
            "`foretell regenerate`, or an empty one."
        ) from error
    return found


def kept_states(folder: Path) -> JoinedStore | None:
    """The answers of a folder with their states; None where it keeps none, or is no folder of answers."""
    import pyarrow.parquet

    if not (folder / MANIFEST).exists() or not (folder / "states").exists():
        return None
    stores = []
    for path in sorted(folder.glob("train-*.parquet")):
        names = pyarrow.parquet.read_table(path, columns=["id"])["id"].to_pylist()
        stores.append(HiddenStore.load(folder / "states" / path.name.split("-")[1], keys=names))
    if not stores:
        return None
    return JoinedStore(stores)
