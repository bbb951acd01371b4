"""What it costs a call to notice that nothing has changed in the live model: signature and digest of every weight that
a copy was made of, against a call of 64 tokens. Interleaved, medians.

    python benchmarks/noticing.py [--model DIR] [--output results/noticing.json]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from foretell import get_mtp_model
from foretell.cli.demo import _chat, _prompts, load_model
from foretell.config import parse
from foretell.data.prompts import encode_prompt
from foretell.models.fast import copy_key
from foretell.runtime import provenance, write_json_atomic


@dataclass(kw_only=True)
class NoticingSettings:
    """Flags of benchmarks/noticing.py."""

    model: str | None = field(default=None, metadata={"help": "A chat model's folder; SmolLM2's package without it."})
    output: str = field(default="results/noticing.json", metadata={"help": "Where the numbers go."})
    repeats: int = field(default=7, metadata={"help": "Interleaved repeats."})
    new_tokens: int = field(default=64, metadata={"help": "Of a call."})
    threads: int = field(default=2, metadata={"help": "Of the calls."})


def main() -> None:
    """Measure and write."""
    settings = parse(NoticingSettings, prog="benchmarks/noticing.py")
    torch.set_num_threads(settings.threads)
    model, tokenizer = load_model(settings.model, Path("runs/demo/model"))
    mtp = get_mtp_model(model, {"method": "sequential", "depth": 2, "shared_module": True, "draft_vocab_size": 8192})
    ids = torch.tensor([encode_prompt(_chat(_prompts(0)["compare"][0]), tokenizer)])
    first = time.perf_counter()
    verdict = mtp.target.verdict()
    first = time.perf_counter() - first

    def call() -> None:
        more = {"attention_mask": torch.ones_like(ids), "do_sample": False, "num_draft_tokens": 0}
        mtp.generate(ids, min_new_tokens=settings.new_tokens, max_new_tokens=settings.new_tokens, **more)

    what: dict[str, Callable[[], object]] = {
        "call": call,
        "target": mtp.target.refresh,
        "module": lambda: copy_key(mtp.module),
    }
    for run in what.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in what}
    for _ in range(settings.repeats):
        for name, run in what.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: median(times) for name, times in seconds.items()}
    share = (medians["target"] + medians["module"]) / medians["call"]
    weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    result = {
        "provenance": provenance(),
        "new_tokens": settings.new_tokens,
        "weights_bytes": weights_bytes,
        "first_look_seconds": first,
        "median_seconds": medians,
        "share_of_a_call": share,
        "verdict": verdict,
    }
    write_json_atomic(settings.output, result)
    print(f"noticing: {1e3 * medians['target']:.1f} ms (target), {1e3 * medians['module']:.1f} ms (module)")
    print(f"a call of {settings.new_tokens} tokens without drafts: {medians['call']:.3f} s; share {share:.2%}")


if __name__ == "__main__":
    main()
