"""What drafts cost: a step of a sequential module, the bookkeeping of a round, K drafts at batch 16, each against the
target's own forward; and what weights of fewer bits do to tau. Today's build and an older one, in turn in one run.

    python benchmarks/draft_cost.py --module DIR --old ../foretell-old [--threads 1] [--output results/draft_cost.json]

--module: a trained sequential module (foretell demo leaves one in runs/demo/module). --old: a checkout of the build to
compare with; it runs in a process of its own and waits for its turn. A draft step is what a round spends in the drafter
by its number of drafts; bookkeeping is what remains of a round beside the target's forward and logits and the drafts.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from forwards import Worker, serve

STEPS = 2  # drafts a round where a step is measured
WIDE = 16  # sequences beside each other where K = 3 is held against drafting off


@dataclass(kw_only=True)
class DraftCostSettings:
    """Flags of benchmarks/draft_cost.py."""

    module: str = field(metadata={"help": "A trained sequential module's folder."})
    model: str | None = field(default=None, metadata={"help": "A chat model's folder; SmolLM2's package without it."})
    old: str | None = field(default=None, metadata={"help": "A checkout of an older build."})
    threads: int = field(default=1, metadata={"help": "Of both builds."})
    prompts: int = field(default=16, metadata={"help": "Of the demo's comparison, one of each category first."})
    new_tokens: int = field(default=48, metadata={"help": "Of each answer."})
    repeats: int = field(default=3, metadata={"help": "Interleaved, of each answer."})
    output: str = field(default="results/draft_cost.json", metadata={"help": "Where the numbers go."})


def readable(module_path: str, known: set[str], folder: Path) -> Path:
    """The module for a build that knows fewer settings: without those that it does not know, all at their defaults."""
    about = json.loads((Path(module_path) / "mtp_config.json").read_text())
    about["config"] = {name: value for name, value in about["config"].items() if name in known | {"method"}}
    (folder / "mtp_config.json").write_text(json.dumps(about))
    shutil.copy(Path(module_path) / "mtp_model.safetensors", folder)
    return folder


def worker(model_path: str, module_path: str, threads: int) -> dict[str, Callable[..., Any]]:
    """The foretell that this process imports, with a clock at its seams."""
    import torch
    from transformers import AutoModelForCausalLM

    from foretell import MTPModel, SequentialConfig
    from foretell.decoding import loop
    from foretell.models.target import Target

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with tempfile.TemporaryDirectory() as folder:
        known = {one.name for one in dataclasses.fields(SequentialConfig)}
        mtp = MTPModel.from_pretrained(model, readable(module_path, known, Path(folder)))
    spent: dict[str, list[float]] = {}
    # what one thread has computed for, so that other work on the machine does not count
    clock = time.thread_time if threads == 1 else time.perf_counter

    def clocked(owner: type, name: str) -> None:
        honest = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            out = honest(*args, **kwargs)
            spent.setdefault(name, []).append(clock() - start)
            return out

        setattr(owner, name, run)

    rounds_of = getattr(loop, "Run", loop.Decoder)  # older builds have no Run
    for owner, name in ((rounds_of, "_round"), (rounds_of, "_drafts"), (Target, "forward_rows"), (Target, "logits")):
        clocked(owner, name)

    def generate(prompts: list[list[int]], new: int, drafts: int, dtype: str | None) -> dict[str, Any]:
        width = max(map(len, prompts))
        ids_BT = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        given = {} if dtype is None else {"draft_dtype": dtype}
        spent.clear()
        out = mtp.generate(
            ids_BT, attention_mask=mask_BT, max_new_tokens=new, do_sample=False, num_draft_tokens=drafts,
            return_dict_in_generate=True, **given,
        )  # fmt: skip
        rounds = len(spent["_round"])
        # those before have read the prompts, or compared a copy with its model
        names = {"round": "_round", "drafts": "_drafts", "target": "forward_rows", "logits": "logits"}
        took = {key: spent[name][-rounds:] for key, name in names.items()}
        took["rest"] = [r - d - f - h for r, d, f, h in zip(*took.values(), strict=True)]
        # the first rounds read the prompt into the module's caches, the last ones draft for fewer texts
        middle = slice(min(2, rounds - 1), max(rounds // 2, min(2, rounds - 1) + 1))
        found = {name: median(values[middle]) for name, values in took.items()}
        return found | {"tokens": out.sequences[:, width:].tolist(), "tau": out.stats.tau, "rounds": rounds}

    return {"generate": generate}


def race(
    ask: Callable[..., dict[str, Any]], ways: Iterable[str], texts: list[list[list[int]]], repeats: int
) -> dict[str, Any]:
    """Each way's draft step and bookkeeping, one text at a time, interleaved, and as shares of its own forward."""
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    said: dict[str, list[Any]] = {name: [] for name in ways}
    for text in texts:
        for repeat in range(repeats + 1):
            for name in ways:
                off, on = ask(name, text, 0), ask(name, text, STEPS)
                if not repeat:  # the first round warms up
                    said[name].append((off["tokens"], on["tokens"], on["tau"] * on["rounds"], on["rounds"]))
                    continue
                target = off["target"] + off["logits"]
                values = {"target_ms": 1000 * target, "step_ms": 1000 * on["drafts"] / STEPS}
                values |= {"step_share": on["drafts"] / STEPS / target, "rest_share": on["rest"] / target}
                for key, value in values.items():
                    taken[name].setdefault(key, []).append(value)
    found = {name: {key: median(values) for key, values in of.items()} for name, of in taken.items()}
    for name, of in found.items():
        of["tau"] = sum(one[2] for one in said[name]) / sum(one[3] for one in said[name])
        of["equal"] = sum(one[0] == one[1] for one in said[name])
    return found


def widely(ask: Callable[..., dict[str, Any]], builds: list[str], batch: list[list[int]], repeats: int) -> Any:
    """Seconds of a round of a whole batch with three drafts, as times one with none."""
    rounds: dict[str, list[list[float]]] = {name: [[], []] for name in builds}
    for repeat in range(repeats + 1):
        for name in builds:
            for into, drafts in zip(rounds[name], (0, 3), strict=True):
                into += [ask(name, batch, drafts)["round"]] if repeat else []
    ms = {name: [1000 * median(values) for values in both] for name, both in rounds.items()}
    return {name: {"off_ms": off, "drafts_ms": on, "ratio": on / off} for name, (off, on) in ms.items()}


def main() -> None:
    """Measure and write."""
    if sys.argv[1:2] == ["--worker"]:
        serve(lambda: worker(sys.argv[2], sys.argv[3], int(sys.argv[4])))
        return
    from foretell.cli.demo import _chat, _prompts, load_model
    from foretell.config import parse
    from foretell.data.prompts import encode_prompt
    from foretell.runtime import cpu_flags, provenance, write_json_atomic

    settings = parse(DraftCostSettings, prog="benchmarks/draft_cost.py")
    folder = Path("runs/kernels/model")
    _, tokenizer = load_model(settings.model, folder)
    every = [encode_prompt(_chat(row), tokenizer) for row in _prompts(0)["compare"]]
    prompts = every[: settings.prompts]
    words = settings.model or str(folder), settings.module, str(settings.threads)
    builds = {"new": Path(__file__).parents[1]} | ({"old": Path(settings.old)} if settings.old else {})
    workers = {n: Worker(sys.executable, *words, build=at, script=__file__) for n, at in builds.items()}
    ways = {name: (name, None if name == "old" else "auto") for name in builds}
    ways |= {dtype: ("new", dtype) for dtype in ("float32", "bfloat16", "int8")}

    def ask(way: str, texts: list[list[int]], drafts: int) -> dict[str, Any]:
        build, dtype = ways[way]
        return workers[build]("generate", prompts=texts, new=settings.new_tokens, drafts=drafts, dtype=dtype)

    texts = [[ids] for ids in prompts]
    found = race(ask, ways, texts, settings.repeats)
    wide = widely(ask, list(builds), every[:WIDE], settings.repeats)
    for name, of in found.items():
        print(
            f"{name:9} step {of['step_ms']:.2f} ms, {of['step_share']:.1%} of {of['target_ms']:.1f} ms;"
            f" bookkeeping {of['rest_share']:.1%}; tau {of['tau']:.3f}; equal {of['equal']} of {len(prompts)}",
            flush=True,
        )
    for name, of in wide.items():
        print(f"{name:9} K = 3 at batch {WIDE}: {of['ratio']:.2f} times a round with drafting off", flush=True)
    for process in workers.values():
        process.close()
    made = provenance(["benchmarks/draft_cost.py"])
    machine = {"instructions": cpu_flags(), "threads": settings.threads}
    result = {
        "provenance": made | {"hardware": made["hardware"] | machine},
        "settings": {"prompts": len(prompts), "new_tokens": settings.new_tokens, "repeats": settings.repeats},
        "one_text": found,
        "batch": wide,
    }
    write_json_atomic(Path(settings.output), result)


if __name__ == "__main__":
    main()
