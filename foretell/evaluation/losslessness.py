"""Whether drafting changes anything, for somebody who does not believe it: greedy tokens, distributions, weights.

Greedy: every way of drafting against transformers' own generate, one prompt at a time and in batches. Sampled: three
tokens drawn behind a context, whose exact distribution the model's own logits give (top-k keeps the outcomes few), by a
chi-square test pooled over contexts, with the smallest deviation that it would have caught. A deviation of that size
is planted as well: a test that cannot fail says nothing.
"""

# N samples, O outcomes, V vocabulary.

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foretell.evaluation.evaluate import difference
from foretell.evaluation.measure import foretell_way, transformers_way
from foretell.mtp import MTPModel
from foretell.runtime import Progress

DRAWN = 3  # tokens behind a context: the prompt's own, one that was drafted, and what follows an accepted draft
TOP_K = 3  # of each: at most 27 outcomes
LEAST_EXPECTED = 5.0  # samples in a cell of a chi-square test
LEVEL = 0.01  # chance of a false alarm, over all tests of a run
POWER = 0.95


@dataclass(frozen=True)
class Drafting:
    """One way of drafting, as arguments of generate."""

    name: str
    settings: dict[str, Any] = field(hash=False)


def draftings(mtp: MTPModel, module: bool, sampled: bool) -> list[Drafting]:
    """Every drafter, length and method of drafting that the module can do."""
    lookup = {"drafter": "lookup"}
    found = [Drafting("lookup, 3 drafts", lookup | {"num_draft_tokens": 3}), Drafting("lookup, auto", _auto(lookup))]
    if not module:
        return found
    methods = ("greedy", "probabilistic") if sampled else ("greedy",)
    for method in methods:
        how = {"draft_sample_method": method} if sampled else {}
        said = f", {method}" if sampled else ""
        lengths: list[Any] = [*range(1, min(mtp.module.longest_draft, 4) + 1), "auto"]
        for length in lengths:
            found.append(Drafting(f"mtp, {length}{said}", {"drafter": "mtp", "num_draft_tokens": length} | how))
        found.append(Drafting(f"mtp+lookup, auto{said}", _auto({"drafter": "mtp+lookup"}) | how))
    return found


def _auto(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"num_draft_tokens": "auto"}


# -- greedy ------------------------------------------------------------------------------------------------------------


def greedy(
    mtp: MTPModel, named: Sequence[tuple[str, list[int]]], ways: Sequence[Drafting], new: int, batch_size: int
) -> list[dict[str, Any]]:
    """Of each way: answers compared, equal ones, near ties (half precision only) and faults, with the first of each."""
    settings = {"max_new_tokens": new, "do_sample": False}
    reference = transformers_way(mtp, **settings)
    ways = [Drafting("drafting off", {"num_draft_tokens": 0}), *ways]
    sizes = sorted({1, batch_size})
    found = []
    with Progress("greedy", total=len(named) * (1 + len(ways) * len(sizes)), unit="answer") as bar:
        wanted = []
        for _, ids in named:
            wanted += reference.run([ids], 0).tokens
            bar.update(1)
        for way in ways:
            about: dict[str, Any] = {"way": way.name, "answers": 0, "equal": 0, "near_ties": 0, "faults": 0}
            about |= {"first_fault": None, "largest_gap": 0.0}
            run = foretell_way(mtp, way.name, way.name, **settings, **way.settings)
            for size in sizes:
                for first in range(0, len(named), size):
                    some = named[first : first + size]
                    for (name, ids), got, want in zip(
                        some, run.run([ids for _, ids in some], 0).tokens, wanted[first:], strict=False
                    ):
                        _count(about, mtp, name, size, ids, got, want)
                    bar.update(len(some))
            found.append(about)
    return found


def _count(
    about: dict[str, Any], mtp: MTPModel, name: str, size: int, ids: list[int], got: list[int], want: list[int]
) -> None:
    about["answers"] += 1
    if got == want:
        about["equal"] += 1
        return
    where = {"prompt": name, "batch_size": size, **difference(mtp, ids, got, want)}
    if where["near_tie"]:
        about["near_ties"] += 1
        about["largest_gap"] = max(about["largest_gap"], where["gap"])
        return
    about["faults"] += 1
    about["first_fault"] = about["first_fault"] or where


# -- distributions -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def exact(mtp: MTPModel, context: list[int], temperature: float) -> dict[tuple[int, ...], float]:
    """Chance of each outcome of DRAWN tokens, by the model's own forwards: its slow twin."""
    ends = set(mtp.target.end_ids)
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(DRAWN):
        longer: dict[tuple[int, ...], float] = {}
        for said, chance in found.items():
            if said and said[-1] in ends:
                longer[said] = chance
                continue
            logits_V = mtp.model(torch.tensor([[*context, *said]], device=mtp.device)).logits[0, -1].float()
            best = (logits_V / temperature).topk(TOP_K)
            for token, p in zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True):
                longer[(*said, token)] = chance * p
        found = longer
    return found


def sampled(
    mtp: MTPModel, contexts: Sequence[list[int]], ways: Sequence[Drafting], samples: int, temperature: float, seed: int
) -> dict[str, Any]:
    """The chi-square test of each way, pooled over contexts, with its power."""
    wanted = [exact(mtp, context, temperature) for context in contexts]
    ways = [Drafting("drafting off", {"num_draft_tokens": 0}), *ways]
    level, tests = LEVEL / len(ways), []
    with Progress("samples", total=len(ways) * len(contexts) * samples, unit="sample") as bar:
        for way in ways:
            counted = []
            for number, context in enumerate(contexts):
                counts: Counter[tuple[int, ...]] = Counter()
                run = foretell_way(
                    mtp, way.name, way.name, max_new_tokens=DRAWN, do_sample=True, temperature=temperature,
                    top_k=TOP_K, **way.settings,
                )  # fmt: skip
                for first in range(0, samples, 64):
                    size = min(64, samples - first)
                    drawn = run.run([context] * size, seed + 1000 * number + first).tokens
                    counts.update(map(tuple, drawn))
                    bar.update(size)
                counted.append(counts)
            tests.append({"way": way.name, **chi_square(counted, wanted)})
    for test in tests:
        test["passed"] = test["p_value"] >= level and not test["impossible"]
    planted = least_deviation(wanted, samples, level)
    return {"samples": samples, "contexts": len(contexts), "level": level, "tests": tests} | planted


def chi_square(counted: Sequence[Counter], wanted: Sequence[dict[tuple[int, ...], float]]) -> dict[str, Any]:
    """Pooled over contexts; outcomes that are too rare share a cell. impossible: samples of no chance at all."""
    statistic, freedom, impossible = 0.0, 0, 0
    for counts, chances in zip(counted, wanted, strict=True):
        total = sum(counts.values())
        impossible += sum(n for outcome, n in counts.items() if chances.get(outcome, 0.0) == 0.0)
        cells = _cells(chances, total)
        for members in cells:
            expected = total * sum(chances[outcome] for outcome in members)
            statistic += (sum(counts[outcome] for outcome in members) - expected) ** 2 / expected
        freedom += len(cells) - 1
    return {
        "chi_square": statistic,
        "freedom": freedom,
        "p_value": 1 - _below(statistic, freedom) if freedom else 1.0,
        "impossible": impossible,
    }


def _cells(chances: dict[tuple[int, ...], float], total: int) -> list[list[tuple[int, ...]]]:
    cells: list[list[tuple[int, ...]]] = []
    weight = 0.0
    for outcome in sorted(chances, key=lambda o: chances[o]):  # the rare ones first, together
        if not cells or weight * total >= LEAST_EXPECTED:
            cells.append([])
            weight = 0.0
        cells[-1].append(outcome)
        weight += chances[outcome]
    return cells


def _below(x: float, freedom: float) -> float:
    """Chance that a chi-square variable is below x."""
    return float(torch.special.gammainc(torch.tensor(freedom / 2).double(), torch.tensor(x / 2).double()))


def _quantile(p: float, freedom: int) -> float:
    low, high = 0.0, 10.0 * freedom + 100.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _below(middle, freedom) < p else (low, middle)
    return high


def _power(noncentral: float, freedom: int, limit: float) -> float:
    """Chance that a noncentral chi-square variable is above the limit: a Poisson mixture of central ones."""
    j = torch.arange(int(noncentral + 20 * math.sqrt(noncentral + 1)) + 20).double()
    log = j * math.log(max(noncentral / 2, 1e-300)) - noncentral / 2 - torch.lgamma(j + 1)
    below = torch.special.gammainc(freedom / 2 + j, torch.full_like(j, limit / 2))
    return 1 - float((log.exp() * below).sum())


def leaning(chances: dict[tuple[int, ...], float], share: float) -> dict[tuple[int, ...], float]:
    """What a rule would draw that takes the likeliest drafts unasked in that share of all samples."""
    best = max(chances, key=lambda o: chances[o])
    return {o: p * (1 - share) + share * (o == best) for o, p in chances.items()}


def least_deviation(wanted: Sequence[dict[tuple[int, ...], float]], samples: int, level: float) -> dict[str, Any]:
    """The smallest share of drafts taken unasked that one test catches with a chance of POWER, and how many of 200 runs
    with so many planted it caught.
    """
    able = [chances for chances in wanted if len(_cells(chances, samples)) > 1]
    freedom = sum(len(_cells(chances, samples)) - 1 for chances in able)
    if not freedom:
        return {"smallest_deviation": None, "planted_caught": None}
    limit = _quantile(1 - level, freedom)

    def noncentral(share: float) -> float:
        total = 0.0
        for chances in able:
            other = leaning(chances, share)
            for members in _cells(chances, samples):
                expected = sum(chances[o] for o in members)
                total += samples * (sum(other[o] for o in members) - expected) ** 2 / expected
        return total

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _power(noncentral(middle), freedom, limit) >= POWER else (middle, high)
    caught, generator = 0, torch.Generator().manual_seed(0)
    for _ in range(200):
        counted = [_drawn(leaning(chances, high), samples, generator) for chances in able]
        caught += chi_square(counted, able)["p_value"] < level
    return {"smallest_deviation": high, "planted_caught": caught / 200}


def _drawn(chances: dict[tuple[int, ...], float], samples: int, generator: torch.Generator) -> Counter:
    outcomes = list(chances)
    p_O: Tensor = torch.tensor([chances[o] for o in outcomes]).double().clamp(min=0)
    picked = torch.multinomial(p_O, samples, replacement=True, generator=generator)
    return Counter({outcomes[i]: n for i, n in enumerate(picked.bincount(minlength=len(outcomes)).tolist()) if n})
