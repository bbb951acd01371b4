"""tau by start, depth, draft vocabulary, supervision: the same answers and steps for all, decoded on held-out prompts.

    python benchmarks/ablation.py --answers runs/demo/answers [--model DIR] [--steps 150] [--output FILE]

The answers are those that `foretell demo` keeps. Steps are counted, not seconds, so other work on the machine changes
nothing. One seed unless --seeds says more.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from machine import left_padded

from foretell import get_mtp_model
from foretell.cli.demo import _chat, _prompts, load_model
from foretell.config import parse
from foretell.data.cache import HiddenStore
from foretell.data.prompts import encode_prompt
from foretell.data.vocabulary import frequent_tokens
from foretell.methods.base import load_preset
from foretell.runtime import provenance, write_json_atomic
from foretell.training.regenerate import eos_ids
from foretell.training.trainer import MTPTrainer, MTPTrainingArguments

# one thing changed at a time: (what, settings of the module, arguments of the training). The answers are the target's
# own greedy ones, so labels and its argmax are the same
ARMS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("as the demo's", {}, {}),
    ("start: random fusion, copied layer", {"initialisation": "copy"}, {}),
    ("start: all random", {"initialisation": "random"}, {}),
    ("depth 1", {"depth": 1}, {}),
    ("depth 3", {"depth": 3}, {}),
    ("depth 3, separate modules", {"depth": 3, "shared_module": False}, {}),
    ("2,048 draft tokens", {"draft_vocab_size": 2048}, {}),
    ("whole vocabulary", {"draft_vocab_size": None}, {}),
    ("teacher, soft, KL", {}, {"mtp_supervision": "teacher", "mtp_loss": "kl"}),
]


@dataclass(kw_only=True)
class AblationSettings:
    """Flags of benchmarks/ablation.py."""

    answers: str = field(metadata={"help": "Folder of kept answers (foretell demo writes runs/demo/answers)."})
    model: str | None = field(
        default=None, metadata={"help": "The model that gave them; SmolLM2's package without it."}
    )
    output: str = field(default="results/ablation.json", metadata={"help": "Where the numbers go."})
    steps: int = field(default=150, metadata={"help": "Optimizer steps of each arm."})
    seeds: int = field(default=1, metadata={"help": "Runs of each arm."})
    only: list[str] = field(default_factory=list, metadata={"help": "Names of arms; all without it."})


def run(model: Any, tokenizer: Any, store: Any, arm: tuple, steps: int, seed: int) -> dict[str, Any]:
    """Train one arm and decode the held-out prompts with one to three drafts."""
    _, module, training = arm
    preset = load_preset("demo")
    torch.manual_seed(seed)
    mtp = get_mtp_model(model, {**preset["module"], **module})
    if mtp.mtp_config.draft_vocab_size is not None:
        ends = sorted(eos_ids(mtp, tokenizer))
        ids = frequent_tokens(store.rows(), mtp.mtp_config.draft_vocab_size, mtp.target.vocab_size, ends)
        mtp.module.set_draft_vocabulary(ids)
    args = MTPTrainingArguments(
        **{**preset["training"], **training}, output_dir="runs/ablation", max_steps=steps, lr_scheduler_type="cosine",
        warmup_steps=20, save_strategy="no", report_to="none", seed=seed, logging_steps=10,
    )  # fmt: skip
    trainer = MTPTrainer(model=mtp, args=args, train_dataset=store)
    trainer.train()
    last = next(entry for entry in reversed(trainer.state.log_history) if "mtp_loss" in entry)
    found: dict[str, Any] = {"loss": last["mtp_loss"], "parameters": sum(p.numel() for p in mtp.module.parameters())}
    inputs = left_padded([encode_prompt(_chat(row), tokenizer) for row in _prompts(0)["compare"]], mtp.device)
    for drafts in range(1, min(3, mtp.module.longest_draft) + 1):
        out = mtp.generate(
            **inputs, max_new_tokens=64, do_sample=False, num_draft_tokens=drafts, return_dict_in_generate=True
        )
        found[f"tau_{drafts}"], found[f"accept_given_{drafts}"] = out.stats.tau, out.stats.accept_given
    return found


def main() -> None:
    """Every arm, printed and written as it comes."""
    settings = parse(AblationSettings, prog="benchmarks/ablation.py")
    model, tokenizer = load_model(settings.model, Path("runs/ablation/model"))
    store = HiddenStore.load(settings.answers)
    result: dict[str, Any] = {"provenance": provenance(sys.argv), "steps": settings.steps, "arms": {}}
    path = Path(settings.output)
    if path.is_file():  # an interrupted comparison goes on
        before = json.loads(path.read_text(encoding="utf-8"))
        result["arms"] = before["arms"] if before["steps"] == settings.steps else {}
    for arm in ARMS:
        if arm[0] in result["arms"] or (settings.only and arm[0] not in settings.only):
            continue
        runs = [run(model, tokenizer, store, arm, settings.steps, seed) for seed in range(settings.seeds)]
        result["arms"][arm[0]] = runs
        taus = "  ".join(f"tau_{k} {r[f'tau_{k}']:.3f}" for r in runs for k in (1, 2, 3) if f"tau_{k}" in r)
        print(f"{arm[0]}: loss {runs[0]['loss']:.3f}  {taus}", flush=True)
        write_json_atomic(path, result)


if __name__ == "__main__":
    main()
