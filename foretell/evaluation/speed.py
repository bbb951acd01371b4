"""Ways of decoding compared honestly: interleaved prompt by prompt, repeated, medians, and every token checked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, stdev
from typing import Any

import torch

from foretell.decoding.stats import GenerationStats
from foretell.mtp import MTPModel
from foretell.runtime import Progress
from foretell.types import Verification


@dataclass
class Way:
    """One way of decoding: prompt [1, T] -> (tokens [1, T + new], stats or None)."""

    name: str
    label: str
    run: Callable[[torch.Tensor], tuple[torch.Tensor, GenerationStats | None]]
    seconds: list[list[float]] = field(default_factory=list)  # per repeat, per prompt
    tokens: list[list[int]] = field(default_factory=list)  # per repeat, per prompt: new tokens
    records: list[list[Verification]] = field(default_factory=list)  # per prompt, of the first repeat
    draft_seconds: float = 0.0  # of all repeats
    draft_forwards: int = 0


def transformers_way(mtp: MTPModel, max_new_tokens: int, **kwargs: Any) -> Way:
    """transformers' own generate: the reference for speed and for every token."""

    def run(ids: torch.Tensor) -> tuple[torch.Tensor, None]:
        return mtp.model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, **kwargs), None

    return Way("transformers", "transformers' generate", run)


def foretell_way(mtp: MTPModel, name: str, label: str, max_new_tokens: int, **kwargs: Any) -> Way:
    """Our generate with the given drafter and number of draft tokens."""

    def run(ids: torch.Tensor) -> tuple[torch.Tensor, GenerationStats]:
        out = mtp.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, **kwargs)
        return out.sequences, out.stats

    return Way(name, label, run)


def compare(
    ways: Sequence[Way],
    prompts: Sequence[list[int]],
    groups: Sequence[str],
    repeats: int,
    *,
    deadline: float = math.inf,
    precision: float = 0.0,
) -> dict[str, Any]:
    """Run every way on every prompt, `repeats` times; the order of the ways rotates from prompt to prompt.

    prompts: token ids, groups: the category of each. The first way is the reference whose tokens all must equal, the
    second the one that ratios are against. deadline: time.monotonic() after which no further repeat is begun.
    precision: from three repeats on, stop where all ratios are known to that (half a 95 % interval).
    Returns plain numbers: ways, by_category, tau_by_category, acceptance, equality, precision.
    """
    for way in ways:  # warm-up
        way.run(torch.tensor([prompts[0]]))
    reference: list[list[int]] = []
    differences: list[dict[str, Any]] = []
    runs = repeat = 0
    with Progress("compare", total=repeats * len(prompts) * len(ways), unit="run") as bar:
        while repeat < repeats and not (repeat >= 3 and _uncertainty(ways) < precision):
            started = time.monotonic()
            for way in ways:
                way.seconds.append([])
                way.tokens.append([])
            for number, ids in enumerate(prompts):
                outputs: dict[str, list[int]] = {}
                for way in [*ways[number % len(ways) :], *ways[: number % len(ways)]]:
                    outputs[way.name] = _run(way, ids, first=repeat == 0)
                    bar.update(1)
                if repeat == 0:
                    reference.append(outputs[ways[0].name])
                for way in ways[1:]:
                    runs += 1
                    if outputs[way.name] != reference[number]:
                        differences.append(_difference(way, number, outputs[way.name], reference[number]))
            repeat += 1
            if time.monotonic() + (time.monotonic() - started) > deadline:
                break
    return {
        "ways": [_summary(way, differences) for way in ways],
        "by_category": _by_category(ways, groups),
        "tau_by_category": _tau_by_category(ways, groups),
        "acceptance": {
            way.name: {"accept_at": stats.accept_at, "accept_given": stats.accept_given}
            for way in ways
            if way.records and (stats := GenerationStats("lossless", True, way.records)).accept_at
        },
        "equality": {
            "prompts": len(prompts),
            "runs": runs,
            "equal": runs - len(differences),
            "first_difference": differences[0] if differences else None,
        },
        "precision": _uncertainty(ways) if repeat >= 3 else None,
    }


def _run(way: Way, ids: list[int], first: bool) -> list[int]:
    start = time.perf_counter()
    out, stats = way.run(torch.tensor([ids]))
    way.seconds[-1].append(time.perf_counter() - start)
    way.tokens[-1].append(out.shape[1] - len(ids))
    if stats is not None:
        way.draft_seconds += stats.seconds["draft"]
        way.draft_forwards += stats.draft_forwards
        if first:
            way.records.append(stats.records[0])
    return out[0].tolist()


def _uncertainty(ways: Sequence[Way]) -> float:
    """Half a 95 % interval of the least certain ratio of two ways' times, from the repeats."""
    repeats = len(ways[1].seconds)
    student = {3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}.get(repeats, 2.45)  # 97.5 % quantile, repeats - 1 degrees of freedom
    found = [
        student * stdev(sum(s) / sum(base) for s, base in zip(way.seconds, ways[1].seconds)) / math.sqrt(repeats)
        / median(sum(s) / sum(base) for s, base in zip(way.seconds, ways[1].seconds))
        for way in ways
    ]  # fmt: skip
    return max(found)


def fixed_tau(mtp: MTPModel, prompts: Sequence[list[int]], max_new_tokens: int, drafts: int, drafter: str) -> float:
    """tau where every round drafts as many tokens: under "auto" a round without drafts counts as one."""
    way = foretell_way(mtp, "fixed", "", max_new_tokens, num_draft_tokens=drafts, drafter=drafter)
    records = []
    for ids in prompts:
        stats = way.run(torch.tensor([ids]))[1]
        assert stats is not None
        records += stats.records
    return GenerationStats("lossless", True, records).tau


def _difference(way: Way, number: int, got: list[int], wanted: list[int]) -> dict[str, Any]:
    at = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    return {"way": way.name, "prompt": number, "position": at, "got": got[at : at + 1], "wanted": wanted[at : at + 1]}


def _summary(way: Way, differences: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [sum(t) / sum(s) for t, s in zip(way.tokens, way.seconds, strict=True)]
    stats = GenerationStats("lossless", True, way.records)
    return {
        "name": way.name,
        "label": way.label,
        "tokens_per_second": median(rates),
        "seconds": median(sum(s) for s in way.seconds),
        "tokens": sum(way.tokens[0]),
        "tau": stats.tau if way.records else 1.0,
        "equal": not any(d["way"] == way.name for d in differences),
        "spread": [min(rates), max(rates)],
        "repeats": rates,
        "rows_per_verification": _mean([1 + v.drafted for r in way.records for v in r]) if way.records else None,
        "draft_ms": 1000 * way.draft_seconds / way.draft_forwards if way.draft_forwards else None,
    }


def _by_category(ways: Sequence[Way], groups: Sequence[str]) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    for group in sorted(set(groups)):
        members = [i for i, g in enumerate(groups) if g == group]
        out[group] = {
            way.name: median(
                sum(t[i] for i in members) / sum(s[i] for i in members)
                for t, s in zip(way.tokens, way.seconds, strict=True)
            )
            for way in ways
        }
    return out


def _tau_by_category(ways: Sequence[Way], groups: Sequence[str]) -> dict[str, dict[str, float]]:
    return {
        group: {
            way.name: GenerationStats(
                "lossless", True, [r for r, g in zip(way.records, groups, strict=True) if g == group]
            ).tau
            for way in ways
            if way.records and any(v.drafted for r in way.records for v in r)
        }
        for group in sorted(set(groups))
    }


def _mean(values: list[int]) -> float:
    return sum(values) / max(len(values), 1)


def shaded_sample(
    tokenizer: Any, ids: list[int], prompt_length: int, record: list[Verification]
) -> list[dict[str, Any]]:
    """The tokens of each verification as text, with who proposed them: for the report."""
    out, at = [], prompt_length
    for verification in record:
        tokens = ids[at : at + verification.emitted]
        pieces = [
            tokenizer.decode(ids[prompt_length : at + i + 1])[len(tokenizer.decode(ids[prompt_length : at + i])) :]
            for i in range(len(tokens))
        ]
        out.append(
            {
                "text": "".join(pieces),
                "tokens": pieces,
                "accepted": verification.accepted,
                "sources": verification.sources,
            }
        )
        at += verification.emitted
    return out
