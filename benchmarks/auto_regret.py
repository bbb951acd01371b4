"""What num_draft_tokens="auto" loses against the best fixed setting, which nobody knows before.

    python benchmarks/auto_regret.py [--model DIR] [--module DIR] [--output results/auto_regret.json]

For each cell (the demo's held-out prompts or random text; batch 1, 4, 16) the same texts with drafting off, with
lookup, the module and both at fixed numbers of drafts, and under "auto" with both, in turn. "auto" starts each cell
with nothing learned. Regret is auto's time by that of the fixed way that was best in this cell, less one. Random text
is drawn at temperature 3: where rounding puts another token first, texts differ from there on, and are counted.

Time is CPU seconds of this process with one thread, so that other work on the machine counts little; wall clock stands
beside it. The best of several ways is also the luckiest, so noise makes regret look larger than it is, not smaller.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import torch

import foretell
from foretell.cli.demo import CATEGORIES, _chat, load_model
from foretell.config import parse
from foretell.data.prompts import encode_prompt
from foretell.runtime import cpu_flags, provenance, write_json_atomic

WAYS: dict[str, dict[str, Any]] = {
    "off": {"num_draft_tokens": 0},
    "lookup 3": {"num_draft_tokens": 3, "drafter": "lookup"},
    "lookup 10": {"num_draft_tokens": 10, "drafter": "lookup"},
    "module 1": {"num_draft_tokens": 1},
    "module 2": {"num_draft_tokens": 2},
    "module 3": {"num_draft_tokens": 3},
    "both 3": {"num_draft_tokens": 3, "drafter": "mtp+lookup"},
    "auto": {"num_draft_tokens": "auto", "drafter": "mtp+lookup"},
}


@dataclass(kw_only=True)
class AutoRegretSettings:
    """Flags of benchmarks/auto_regret.py."""

    model: str | None = field(default=None, metadata={"help": "A chat model's folder; SmolLM2's package without it."})
    module: str | None = field(default=None, metadata={"help": "A trained module's folder; the shipped one without."})
    prompts: int = field(default=16, metadata={"help": "Held-out prompts of the demo, one of each category first."})
    new_tokens: int = field(default=48, metadata={"help": "Of each answer."})
    repeats: int = field(default=3, metadata={"help": "Interleaved, of each text."})
    batches: list[int] = field(default_factory=lambda: [1, 4, 16], metadata={"help": "Batch sizes."})
    texts: list[str] = field(default_factory=lambda: ["demo", "random"], metadata={"help": "demo, random."})
    output: str = field(default="results/auto_regret.json", metadata={"help": "Where the numbers go."})


def batches_of(kind: str, prompts: list[list[int]], batch: int, vocabulary: int) -> list[list[list[int]]]:
    """The batches of a cell: all prompts, and at most two of random tokens."""
    if kind == "random":
        ids = torch.randint(0, vocabulary, (2 * batch, 64), generator=torch.Generator().manual_seed(0)).tolist()
        return [ids[:batch], ids[batch:]]
    return [prompts[i : i + batch] for i in range(0, len(prompts) - batch + 1, batch)]


def answer(mtp: foretell.MTPModel, prompts: list[list[int]], kind: str, new: int, way: dict[str, Any]) -> Any:
    """(CPU seconds, wall seconds, the output) of one batch."""
    width = max(map(len, prompts))
    given: dict[str, Any] = {
        "inputs": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        "max_new_tokens": new,
        "do_sample": False,
    }
    if kind == "random":  # the same text whoever drafts
        given |= {"do_sample": True, "temperature": 3.0, "top_k": 0, "eos_token_id": None}
        given["generator"] = torch.Generator().manual_seed(1)
    cpu, wall = time.process_time(), time.perf_counter()
    out = mtp.generate(**given, **way, return_dict_in_generate=True)
    return time.process_time() - cpu, time.perf_counter() - wall, out


def cell(mtp: foretell.MTPModel, kind: str, batches: list[list[list[int]]], settings: AutoRegretSettings) -> Any:
    """Each way's seconds for all texts of the cell (medians over repeats, summed), tau, and how many texts agree."""
    taken: dict[str, list[list[tuple[float, float]]]] = {name: [[] for _ in batches] for name in WAYS}
    rounds: dict[str, list[int]] = {name: [0, 0] for name in WAYS}
    equal = [0, 0]
    for way in WAYS.values():  # caches grow, kernels are chosen
        answer(mtp, batches[0], kind, 8, way)
    for _ in range(settings.repeats):
        with mtp.workspace() as space:
            space.adaptive.clear()
        for at, prompts in enumerate(batches):
            first = None
            for name, way in WAYS.items():
                cpu, wall, out = answer(mtp, prompts, kind, settings.new_tokens, way)
                taken[name][at].append((cpu, wall))
                emitted = out.stats.emitted
                rounds[name][0] += sum(map(sum, emitted))
                rounds[name][1] += sum(map(len, emitted))
                first = out.sequences if first is None else first
                equal[0] += sum(map(torch.equal, first, out.sequences)) if first.shape == out.sequences.shape else 0
                equal[1] += len(prompts)
    found: dict[str, Any] = {"ways": {}, "equal": equal[0], "texts": equal[1]}
    for name, texts in taken.items():
        cpu, wall = (sum(median(one[i] for one in repeats) for repeats in texts) for i in (0, 1))
        found["ways"][name] = {"cpu_seconds": cpu, "wall_seconds": wall, "tau": rounds[name][0] / rounds[name][1]}
    fixed = {name: way["cpu_seconds"] for name, way in found["ways"].items() if name != "auto"}
    found["best"] = min(fixed, key=lambda name: fixed[name])
    found["regret"] = found["ways"]["auto"]["cpu_seconds"] / fixed[found["best"]] - 1
    walls = {name: way["wall_seconds"] for name, way in found["ways"].items()}
    found["regret_wall"] = walls.pop("auto") / min(walls.values()) - 1
    return found


def told(found: dict[str, Any]) -> str:
    """A cell in a line: times drafting off (tau) of each way, and the regret."""
    off = found["ways"]["off"]["cpu_seconds"]
    ways = "  ".join(
        f"{name} {off / way['cpu_seconds']:.2f}x ({way['tau']:.2f})" for name, way in found["ways"].items()
    )
    return (
        f"{ways}; regret {found['regret']:+.1%} of {found['best']}, by the clock {found['regret_wall']:+.1%}; "
        f"{found['equal']} of {found['texts']} texts equal"
    )


def main() -> None:
    """Every cell, printed as it comes, then written."""
    settings = parse(AutoRegretSettings, prog="benchmarks/auto_regret.py")
    torch.set_num_threads(1)
    model, tokenizer = load_model(settings.model, Path("runs/auto_regret/model"))
    folder = settings.module or foretell.shipped(model)
    if folder is None:
        raise SystemExit("--module: no module ships for this model; give one's folder.")
    mtp = foretell.MTPModel.from_pretrained(model, folder)
    lines = resources.files("foretell.data").joinpath("demo_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, filter(None, lines)) if row["split"] == "test"]
    kinds = [[row for row in rows if row["category"] == category] for category in CATEGORIES]
    ordered = [row for several in zip(*kinds, strict=False) for row in several][: settings.prompts]
    prompts = [encode_prompt(_chat(row), tokenizer) for row in ordered]
    cells = {}
    for kind in settings.texts:
        for batch in settings.batches:
            found = cell(mtp, kind, batches_of(kind, prompts, batch, mtp.target.vocab_size), settings)
            cells[f"{kind}, batch {batch}"] = found
            print(f"{kind}, batch {batch}: " + told(found), flush=True)
    made = provenance(["benchmarks/auto_regret.py"])
    machine = {"instructions": cpu_flags(), "threads": 1}
    result = {
        "provenance": made | {"hardware": made["hardware"] | machine},
        "settings": {"prompts": len(prompts), "new_tokens": settings.new_tokens, "repeats": settings.repeats},
        "cells": cells,
    }
    write_json_atomic(Path(settings.output), result)


if __name__ == "__main__":
    main()
