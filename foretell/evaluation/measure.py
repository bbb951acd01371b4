"""Ways of decoding measured on the same prompts: interleaved, repeated until they can be told apart, resumable.

A round of measurement is one repeat of one chunk (prompts that are decoded together) by every way in turn; it is kept
in one line beside the result, so that an interrupted run goes on behind the last whole one and counts nothing twice.
"""

# B prompts of a chunk, C chunks, N draws of a bootstrap.

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foretell.decoding.stats import GenerationStats
from foretell.mtp import MTPModel
from foretell.runtime import Progress
from foretell.types import Verification

DRAWS = 1000  # of a bootstrap
LEAST_REPEATS = 3
# 97.5 % quantiles of Student's distribution, by repeats
STUDENT, STUDENT_MANY = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}, 2.2


@dataclass
class Chunk:
    """Prompts of one category that are decoded together."""

    category: str
    names: list[str]
    prompts: list[list[int]]


@dataclass
class Answered:
    """What one way made of one chunk."""

    seconds: float
    tokens: list[list[int]]  # new ones of each prompt, up to its end token
    stats: GenerationStats | None  # None of transformers' generate

    def counts(self) -> dict[str, Any]:
        """As it is kept in a line. Of each verification [drafted, depth, accepted, emitted, who proposed each]."""
        kept: dict[str, Any] = {"seconds": self.seconds, "tokens": self.tokens}
        if self.stats is not None:
            kept |= {
                "parts": self.stats.seconds,
                "forwards": self.stats.verifications,
                "rows": self.stats.target_rows,
                "draft_forwards": self.stats.draft_forwards,
                "records": [
                    [[v.drafted, v.depth, v.accepted, v.emitted, v.sources] for v in record]
                    for record in self.stats.records
                ],
            }
        return kept


@dataclass
class Way:
    """One way of decoding, by name. run: (prompts, seed) -> Answered."""

    name: str
    label: str
    run: Callable[[list[list[int]], int], Answered]


@dataclass
class Measured:
    """All rounds so far: [way][repeat][chunk] what was kept."""

    ways: list[Way]
    chunks: list[Chunk]
    kept: dict[str, list[list[dict[str, Any]]]] = field(default_factory=dict)

    @property
    def repeats(self) -> int:
        """Whole ones."""
        return sum(len(chunks) == len(self.chunks) for chunks in self.kept[self.ways[0].name])

    def seconds(self, way: str) -> np.ndarray:
        """[repeats, C]."""
        return np.array([[one["seconds"] for one in kept] for kept in self.kept[way][: self.repeats]])

    def tokens(self, way: str) -> np.ndarray:
        """[repeats, C] new tokens."""
        rows = [[sum(map(len, one["tokens"])) for one in kept] for kept in self.kept[way][: self.repeats]]
        return np.array(rows, dtype=float)

    def rates(self, way: str) -> np.ndarray:
        """[repeats] tokens a second over all chunks."""
        return self.tokens(way).sum(1) / self.seconds(way).sum(1)

    def every(self, way: str, chosen: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """What all repeats kept, of these chunks."""
        at = range(len(self.chunks)) if chosen is None else chosen
        return [kept[i] for kept in self.kept[way][: self.repeats] for i in at]

    def first(self, way: str) -> list[dict[str, Any]]:
        """What the first repeat kept of each chunk."""
        return self.kept[way][0]

    def ratio(self, way: str, base: str, chosen: Sequence[int] | None = None) -> dict[str, float]:
        """How many times faster, with a 95 % interval by bootstrap over prompts and repeats: what other prompts of the
        same kinds may give. chosen: of these chunks alone.
        """
        at = np.arange(len(self.chunks)) if chosen is None else np.array(chosen)
        pace = {name: (self.seconds(name)[:, at], self.tokens(name)[0, at]) for name in (way, base)}

        def of(repeats_NR: np.ndarray, chunks_NC: np.ndarray) -> np.ndarray:
            rate = []
            for seconds_RC, tokens_C in (pace[way], pace[base]):
                middle_NC = np.median(seconds_RC[repeats_NR[:, :, None], chunks_NC[:, None, :]], axis=1)
                rate.append(tokens_C[chunks_NC].sum(1) / middle_NC.sum(1))
            return rate[0] / rate[1]

        R, C, generator = self.repeats, len(at), np.random.default_rng(0)
        drawn_N = of(generator.integers(R, size=(DRAWS, R)), generator.integers(C, size=(DRAWS, C)))
        low, high = np.quantile(drawn_N, [0.025, 0.975])
        value = of(np.arange(R)[None], np.arange(C)[None])[0]
        return {"ratio": float(value), "low": float(low), "high": float(high)}

    def precision(self, base: str) -> float:
        """Half of the widest 95 % interval of a ratio on these prompts, as a share of it, from the repeats."""
        found = []
        for way in self.ways:
            ratio_R = self.seconds(way.name).sum(1) / self.seconds(base).sum(1)
            error = ratio_R.std(ddof=1) / np.sqrt(len(ratio_R)) / np.median(ratio_R)
            found.append(STUDENT.get(len(ratio_R), STUDENT_MANY) * error)
        return float(max(found))


def chunks_of(named: Sequence[tuple[str, str, list[int]]], batch_size: int) -> list[Chunk]:
    """(name, category, prompt) each -> chunks of at most batch_size prompts of one category; ValueError if none has so
    many.
    """
    kinds: dict[str, list[tuple[str, list[int]]]] = {}
    for name, category, ids in named:
        kinds.setdefault(category, []).append((name, ids))
    most = max(map(len, kinds.values()), default=0)
    if most < batch_size:
        raise ValueError(
            f"batch_size: got {batch_size}, but a batch holds prompts of one category and none has more than {most}: "
            "take more prompts (limit), or a smaller batch."
        )
    return [
        Chunk(kind, [name for name, _ in some], [ids for _, ids in some])
        for kind, members in kinds.items()
        for some in (members[i : i + batch_size] for i in range(0, len(members), batch_size))
    ]


def left_padded(prompts: Sequence[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """[B, T] input_ids and attention_mask."""
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
    }


def transformers_way(mtp: MTPModel, **settings: Any) -> Way:
    """transformers' own generate, the reference for speed and for every token."""

    def run(prompts: list[list[int]], seed: int) -> Answered:
        torch.manual_seed(seed)
        inputs = {name: value.to(mtp.device) for name, value in left_padded(prompts, _pad(mtp)).items()}
        start = time.perf_counter()
        out = mtp.model.generate(**inputs, pad_token_id=_pad(mtp), **settings)
        seconds = time.perf_counter() - start
        return Answered(seconds, _new(mtp, out, inputs["input_ids"].shape[1]), None)

    return Way("transformers", "transformers' generate", run)


def foretell_way(mtp: MTPModel, name: str, label: str, **settings: Any) -> Way:
    """Our generate."""

    def run(prompts: list[list[int]], seed: int) -> Answered:
        inputs = {name: value.to(mtp.device) for name, value in left_padded(prompts, _pad(mtp)).items()}
        generator = torch.Generator(mtp.device).manual_seed(seed) if settings.get("do_sample") else None
        start = time.perf_counter()
        out = mtp.generate(
            **inputs, pad_token_id=_pad(mtp), return_dict_in_generate=True, generator=generator, **settings
        )
        seconds = time.perf_counter() - start
        return Answered(seconds, _new(mtp, out.sequences, inputs["input_ids"].shape[1]), out.stats)

    return Way(name, label, run)


def _pad(mtp: MTPModel) -> int:
    found = mtp.model.generation_config.pad_token_id
    return (mtp.target.end_ids or [0])[0] if found is None else found


def _new(mtp: MTPModel, out_BT: torch.Tensor, width: int) -> list[list[int]]:
    """The new tokens of each row, up to its end token."""
    ends, rows = set(mtp.target.end_ids), []
    for row in out_BT[:, width:].tolist():
        at = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        rows.append(row[: at + 1])
    return rows


def measure(
    ways: list[Way],
    chunks: list[Chunk],
    base: str,
    kept: Kept | None = None,
    *,
    repeats: int,
    precision: float,
    seed: int = 0,
    seconds: float = math.inf,
) -> Measured:
    """All rounds, those that are kept already first.

    base: the way that ratios are against. kept: where rounds are written, and were. precision: from three repeats on,
    stop where all ratios are known to that on these prompts. seconds: begin no repeat that would end behind that.
    """
    found, C = Measured(ways, chunks, {way.name: [] for way in ways}), len(chunks)
    started, lasted = time.monotonic(), 0.0
    with kept or nullcontext(), Progress("compare", total=repeats * C, unit="chunk") as bar:
        for line in kept.lines if kept else ():
            _add(found, line)
            bar.update(1)
        for way in ways:
            way.run(chunks[0].prompts, seed)  # what is made once is not measured
        first, there = divmod(len(kept.lines) if kept else 0, C)
        for repeat in range(first, repeats):
            began = time.monotonic()
            known = found.repeats >= LEAST_REPEATS and found.precision(base) <= precision
            if known or (repeat and began - started + lasted > seconds):
                break
            for number in range(there if repeat == first else 0, C):
                turn = (repeat + number) % len(ways)
                turns = [*ways[turn:], *ways[:turn]]
                done = {way.name: way.run(chunks[number].prompts, seed + number).counts() for way in turns}
                line = {"repeat": repeat, "chunk": number, "ways": done}
                if kept:
                    kept.add(line)
                _add(found, line)
                bar.update(1)
            lasted = time.monotonic() - began
    return found


def _add(found: Measured, line: dict[str, Any]) -> None:
    for name, kept in line["ways"].items():
        if line["chunk"] == 0:
            found.kept[name].append([])
        found.kept[name][-1].append(kept)


class Kept:
    """Rounds in a file of lines, the first of which says what they are of."""

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path, self.key = path, json.loads(json.dumps(key))
        self.lines: list[dict[str, Any]] = []

    def __enter__(self) -> Kept:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        there = list(self._whole_lines()) or [self.key]
        if there[0] != self.key:
            others = [name for name in self.key if there[0].get(name) != self.key[name]]
            raise ValueError(
                f"{self.path}: rounds of an interrupted run with another {', '.join(others) or 'key'}; give the same "
                "settings to go on with it, another --output, or delete that file."
            )
        # written anew: an interrupted line ends without a newline, and what follows would join it
        self.path.write_text("".join(json.dumps(line) + "\n" for line in there), encoding="utf-8")
        self.lines, self._file = there[1:], self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _whole_lines(self) -> Iterator[Any]:
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):
                    yield json.loads(line)

    def add(self, line: dict[str, Any]) -> None:
        """Write a round, before the next one begins."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """The result is written."""
        self.path.unlink()


def stats_of(kept: Sequence[dict[str, Any]]) -> GenerationStats:
    """Of what ours kept of some chunks."""
    records = [[Verification(*v) for v in record] for one in kept for record in one["records"]]
    made = GenerationStats("lossless", True, records)
    for one in kept:
        made.verifications += one["forwards"]
        made.target_rows += one["rows"]
        made.draft_forwards += one["draft_forwards"]
        for part, spent in one["parts"].items():
            made.seconds[part] = made.seconds.get(part, 0.0) + spent
    return made


def digest(value: Any) -> str:
    """Of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of all bytes, names and shapes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous()
        found.update(f"{name} {tuple(flat.shape)} {flat.dtype}".encode())
        found.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return found.hexdigest()[:16]
