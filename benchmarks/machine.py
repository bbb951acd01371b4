"""What this machine does: decoding by batch size and precision, training, memory, the cost curve. Interleaved, medians.

    python benchmarks/machine.py [--model DIR] [--module DIR] [--output results/machine.json]

Without --module a module is trained for half a minute first, so that drafting on against off means something; a better
one comes from `foretell demo` (runs/demo/module). Also measured: text on which drafts fail (random tokens), where
num_draft_tokens="auto" must not lose more than 5 %.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from foretell import MTPModel, get_mtp_model
from foretell.cli.demo import _chat, _prompts, load_model
from foretell.config import parse
from foretell.data.prompts import encode_prompt
from foretell.methods.base import load_preset
from foretell.runtime import provenance, write_json_atomic


@dataclass(kw_only=True)
class MachineSettings:
    """Flags of benchmarks/machine.py."""

    model: str | None = field(default=None, metadata={"help": "A chat model's folder; SmolLM2's package without it."})
    module: str | None = field(default=None, metadata={"help": "A trained module's folder."})
    output: str = field(default="results/machine.json", metadata={"help": "Where the numbers go."})
    repeats: int = field(default=3, metadata={"help": "Interleaved repeats."})
    new_tokens: int = field(default=48, metadata={"help": "Of each answer."})
    batches: list[int] = field(
        default_factory=lambda: [1, 4, 16], metadata={"help": "Batch sizes of drafting on and off."}
    )
    continuous: int = field(
        default=64, metadata={"help": "Sequences of the continuous-batching comparison; 0 skips it."}
    )


def left_padded(prompts: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [B, T]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def new_tokens(out: torch.Tensor, prompt_width: int, eos: int) -> int:
    """Tokens of a batch's answers, padding after the end token not counted."""
    count = 0
    for row in out[:, prompt_width:].tolist():
        count += row.index(eos) + 1 if eos in row else len(row)
    return count


def race(ways: dict[str, Any], eos: int, width: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Tokens a second of each way, interleaved; whether every token equals the first way's."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    outputs: dict[str, torch.Tensor] = {}
    for repeat in range(repeats + 1):
        for name, run in ways.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            out = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                rates[name].append(new_tokens(out, width, eos) / (time.perf_counter() - start))
            outputs[name] = out
    first = next(iter(outputs.values()))
    return {
        name: {
            "tokens_per_second": median(values),
            "spread": [min(values), max(values)],
            "equal": outputs[name].shape == first.shape and bool((outputs[name] == first).all()),
        }
        for name, values in rates.items()
    }


def decoding(mtp: MTPModel, prompts: list[list[int]], settings: MachineSettings, eos: int) -> dict[str, Any]:
    """transformers, drafting off, and auto drafting, for each batch size."""
    found = {}
    for batch in settings.batches:
        inputs = left_padded(prompts[:batch], mtp.device)
        common = {**inputs, "max_new_tokens": settings.new_tokens, "do_sample": False}
        found[str(batch)] = race(
            {
                "transformers": lambda c=common: mtp.model.generate(**c),
                "off": lambda c=common: mtp.generate(**c, num_draft_tokens=0),
                "mtp": lambda c=common: mtp.generate(**c, num_draft_tokens="auto"),
                "mtp+lookup": lambda c=common: mtp.generate(**c, num_draft_tokens="auto", drafter="mtp+lookup"),
            },
            eos,
            inputs["input_ids"].shape[1],
            settings.repeats,
        )
        print(
            f"batch {batch}: "
            + "  ".join(f"{n} {w['tokens_per_second']:.1f} tok/s" for n, w in found[str(batch)].items())
        )
    return found


def continuous(mtp: MTPModel, prompts: list[list[int]], settings: MachineSettings, eos: int) -> dict[str, Any]:
    """Many sequences of different lengths: transformers' padded batch against our continuous one, drafting off."""
    inputs = left_padded((prompts * settings.continuous)[: settings.continuous], mtp.device)
    common = {**inputs, "max_new_tokens": settings.new_tokens, "do_sample": False}
    slots = max(settings.continuous // 2, 1)
    return race(
        {
            "transformers": lambda: mtp.model.generate(**common),
            "off": lambda: mtp.generate(**common, num_draft_tokens=0, slots=settings.continuous),
            "off, half the slots": lambda: mtp.generate(**common, num_draft_tokens=0, slots=slots),
        },
        eos,
        inputs["input_ids"].shape[1],
        settings.repeats,
    )


def failing_text(mtp: MTPModel, settings: MachineSettings) -> dict[str, Any]:
    """Random prompts, sampling at a high temperature: nothing can be drafted. auto against off, the same prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, mtp.target.vocab_size - 10, (1, 64), generator=generator).to(mtp.device)
    common = {"max_new_tokens": 2 * settings.new_tokens, "do_sample": True, "temperature": 3.0, "eos_token_id": None}

    def run(**kwargs: Any) -> torch.Tensor:
        seeded = torch.Generator(mtp.device).manual_seed(1)
        return mtp.generate(ids, **common, generator=seeded, **kwargs)

    return race(
        {
            "off": lambda: run(num_draft_tokens=0),
            "auto": lambda: run(num_draft_tokens="auto", drafter="mtp+lookup"),
        },
        -1,
        64,
        settings.repeats,
    )


LOSS_MEMORY = """
import sys, torch
from foretell.ops.losses import linear_loss
rows, width, vocabulary, fused = 4096, 576, 49152, sys.argv[1] == "fused"
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
hidden_ND = torch.randn(rows, width, requires_grad=True)
head_VD, labels_N = torch.randn(vocabulary, width) * 0.02, torch.randint(0, vocabulary, (rows,))
open("/proc/self/clear_refs", "w").write("5")  # Linux: the peak starts again from here
before = peak()
if fused:
    linear_loss(hidden_ND, head_VD, labels_N=labels_N, kind="ce").total.backward()
else:
    torch.nn.functional.cross_entropy(hidden_ND @ head_VD.T, labels_N, reduction="sum").backward()
print(1024 * (peak() - before))
"""


def loss_memory() -> dict[str, Any]:
    """Peak bytes of one loss with its gradient (4,096 rows, 49,152 tokens), each in a process of its own."""
    found: dict[str, Any] = {}
    for way in ("naive", "fused"):
        command = [sys.executable, "-c", LOSS_MEMORY, way]
        found[f"{way}_bytes"] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found | {"ratio": found["naive_bytes"] / found["fused_bytes"]}


def training(
    model: Any, tokenizer: Any, prompts: list[list[int]], seconds: float, folder: Path
) -> tuple[MTPModel, dict]:
    """A module trained for `seconds` on the target's answers to the prompts, and how fast that went."""
    from foretell.training.budget import TimeBudget
    from foretell.training.regenerate import regenerate
    from foretell.training.trainer import MTPTrainer, MTPTrainingArguments

    preset = load_preset("demo")
    mtp = get_mtp_model(model, preset["module"])
    rows = [{"input_ids": p, "labels": [-100] * len(p)} for p in prompts]
    rows = [{"messages": row["messages"]} for row in map(_chat, _prompts(0)["train"][:48])] if tokenizer else rows
    store, _ = regenerate(mtp, rows, tokenizer, folder / "answers", max_new_tokens=48)
    args = MTPTrainingArguments(
        **preset["training"], output_dir=str(folder), max_steps=10**6, lr_scheduler_type="constant", save_strategy="no",
        report_to="none",
    )  # fmt: skip
    clock = TimeBudget(seconds, args.learning_rate)
    trainer = MTPTrainer(model=mtp, args=args, train_dataset=store, callbacks=[clock])
    clock.trainer = trainer
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    found = {"answer_tokens_per_second": clock.tokens / clock.spent, "steps": trainer.state.global_step}
    if torch.cuda.is_available():
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return mtp, found


def main() -> None:
    """Everything, printed as it comes, then written."""
    settings = parse(MachineSettings, prog="benchmarks/machine.py")
    gpu = torch.cuda.is_available()
    folder = Path("runs/machine")
    model, tokenizer = load_model(settings.model, folder / "model")
    if gpu:
        model.to("cuda")
    rows = _prompts(0)["compare"]
    prompts = [encode_prompt(_chat(row), tokenizer) for row in rows]
    eos = tokenizer.eos_token_id
    found: dict[str, Any] = {"provenance": provenance(sys.argv), "new_tokens": settings.new_tokens}
    mtp, found["training"] = training(model, tokenizer, prompts, 30.0, folder)
    print(f"training: {found['training']['answer_tokens_per_second']:.0f} answer tokens/s")
    if settings.module is not None:
        mtp = MTPModel.from_pretrained(model, settings.module)
    curve = mtp.cost_curve()
    found["cost_curve"] = [{"rows": r, "ms": 1000 * s} for r, s in zip(curve.rows, curve.seconds, strict=True)]
    print("cost: " + "  ".join(f"{p['rows']} rows {p['ms']:.1f} ms" for p in found["cost_curve"]))
    found["decoding"] = {"float32": decoding(mtp, prompts, settings, eos)}
    found["failing_text"] = failing_text(mtp, settings)
    print(
        "drafts fail: " + "  ".join(f"{n} {w['tokens_per_second']:.1f} tok/s" for n, w in found["failing_text"].items())
    )
    if settings.continuous:
        found["continuous"] = continuous(mtp, prompts, settings, eos)
        print(
            "continuous: "
            + "  ".join(f"{n} {w['tokens_per_second']:.1f} tok/s" for n, w in found["continuous"].items())
        )
    found["loss_memory"] = loss_memory()
    print(
        "loss, peak memory: "
        + "  ".join(f"{n} {found['loss_memory'][f'{n}_bytes'] / 2**20:.0f} MiB" for n in ("naive", "fused"))
    )
    if gpu:
        module_folder = folder / "module"
        mtp.save_pretrained(module_folder)
        model.to(torch.bfloat16)
        half = MTPModel.from_pretrained(model, module_folder)
        found["decoding"]["bfloat16"] = decoding(half, prompts, settings, eos)
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    write_json_atomic(Path(settings.output), found)
    print(f"numbers: {settings.output}")


if __name__ == "__main__":
    main()
