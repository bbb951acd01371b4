"""Tokens a second of each stage from raw chats to a cache, an older build beside this one, one process beside two.

    python benchmarks/data.py --data DIR [--old DIR] [--output results/data.json]

The folder has `gsm8k_train.jsonl`: its questions and answers are the chats, one a conversation and six a conversation.
Every figure is a process of its own, interleaved; the clock starts when the libraries and the model are there. A stage
that the older build has not is measured on this one alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS, SIX, ANSWERS, NEW = 7473, 6, 96, 64
# of each stage: how many processes work side by side
STAGES = {
    "prompts": (1,), "encode": (1, 2), "encode-six": (1, 2), "encode-ten": (1, 2), "answer": (1, 2), "kept": (1,),
    "batches": (1,),
}  # fmt: skip
NEW_ONLY = {"prompts", "encode-ten", "kept"}


@contextmanager
def timed(found: dict[str, Any]) -> Iterator[None]:
    """Seconds by the clock and of the processor, of this process and its children, into found."""

    def spent() -> float:
        return sum(os.times()[:4])

    wall, busy = time.perf_counter(), spent()
    yield
    found |= {"seconds": time.perf_counter() - wall, "cpu_seconds": spent() - busy}


def stage(name: str, work: Path, processes: int) -> dict[str, Any]:
    """One measurement, in a process whose build PYTHONPATH says."""
    import torch

    from foretell.cli.demo import load_model
    from foretell.data.formats import load_rows
    from foretell.data.prompts import encode_rows

    torch.set_num_threads(2 // processes if name == "answer" else 1)
    model, tokenizer = load_model(None, work / "model")
    found: dict[str, Any] = {}
    file = str(work / f"{name.partition('-')[2] or 'one'}.jsonl")
    if name == "prompts":
        from foretell.data.prompt_file import PromptRules, PromptSet

        with timed(found):
            chosen = PromptSet([file], PromptRules(), tokenizer)
            chosen.write(work / "prompts.jsonl")
        found["tokens"] = encode_rows(file, tokenizer)[1].tokens
    elif name.startswith("encode") or name == "kept":
        more: dict[str, Any] = {"num_proc": processes} if processes > 1 else {}
        if name == "kept":
            more = {"cache": work / "cache"}
            encode_rows(file, tokenizer, **more)
        with timed(found):
            _, stats = encode_rows(load_rows(file), tokenizer, **more)
        found["tokens"] = stats.tokens
    elif name == "answer":
        found |= answered(model, tokenizer, work, processes)
    else:
        found |= batched(model, tokenizer, file)
    return found


def answered(model: Any, tokenizer: Any, work: Path, processes: int) -> dict[str, Any]:
    """Tokens of the target's own answers; of several processes each answers a share, on one thread."""
    from foretell import get_mtp_model
    from foretell.data.formats import load_rows
    from foretell.training.regenerate import regenerate

    rank = int(os.environ.get("FORETELL_SHARE", "0"))
    rows = list(load_rows(str(work / "questions.jsonl")))[rank::processes]
    mtp = get_mtp_model(model, {"method": "sequential", "depth": 1})
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, timed(found):
        store, _ = regenerate(mtp, rows, tokenizer, folder, max_new_tokens=NEW, keep_hidden=False)
    found["tokens"] = sum(sum(label >= 0 for label in row["labels"]) for row in store.rows())
    return found


def batched(model: Any, tokenizer: Any, file: str) -> dict[str, Any]:
    """Rows as the trainer hands them to a step: chosen, padded, labels made."""
    from foretell import MTPTrainer, MTPTrainingArguments, get_mtp_model
    from foretell.data.prompts import encode_rows

    mtp = get_mtp_model(model, {"method": "sequential", "depth": 1})
    with tempfile.TemporaryDirectory() as folder:
        args = MTPTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            report_to="none",
            train_sampling_strategy="group_by_length",
        )
        rows = encode_rows(file, tokenizer)[0]
        trainer = MTPTrainer(model=mtp, args=args, train_dataset=rows, processing_class=tokenizer)
        found: dict[str, Any] = {"tokens": 0, "places": 0}
        with timed(found):
            for batch in trainer.get_train_dataloader():
                found["places"] += batch["input_ids"].numel()
                found["tokens"] += int((batch["attention_mask"]).sum())
    return found | {"padding": 1 - found["tokens"] / found["places"]}


def ask(build: Path, name: str, work: Path, processes: int) -> dict[str, Any]:
    """What a stage measures in a build; of answers by two processes, the two together."""
    shares = range(processes if name == "answer" else 1)
    words = [sys.executable, __file__, "--stage", name, str(work), str(processes)]
    with ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen(
                    words,
                    env=os.environ | {"PYTHONPATH": str(build), "FORETELL_SHARE": str(share)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for share in shares
        ]
        said = [process.communicate() for process in running]
    for process, (_, error) in zip(running, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"stage {name}: it ended with {process.returncode}:\n{error[-2000:]}")
    parts = [json.loads(out.splitlines()[-1]) for out, _ in said]
    together = {"tokens": sum(part["tokens"] for part in parts), "seconds": max(part["seconds"] for part in parts)}
    return parts[0] | together | {"cpu_seconds": sum(part["cpu_seconds"] for part in parts)}


def write_inputs(data: Path, work: Path) -> None:
    """The chats of GSM8K's training set, one and six a conversation, and questions to answer."""
    rows = [json.loads(line) for line in (data / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()][:ROWS]
    turns = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows
    ]
    six = [list(chain.from_iterable(turns[at : at + SIX])) for at in range(0, len(turns), SIX)]
    for name, chats in {
        "one": turns,
        "six": six,
        "ten": 10 * turns,
        "questions": [turn[:1] for turn in turns[:ANSWERS]],
    }.items():
        lines = [json.dumps({"messages": messages}) + "\n" for messages in chats]
        (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Measure and write."""
    if sys.argv[1:2] == ["--stage"]:
        name, work, processes = sys.argv[2:]
        print(json.dumps(stage(name, Path(work), int(processes))))
        return
    from dataclasses import dataclass, field

    from foretell.cli.demo import load_model
    from foretell.config import parse
    from foretell.runtime import provenance, write_json_atomic

    @dataclass(kw_only=True)
    class DataSettings:
        """Flags of benchmarks/data.py."""

        data: str = field(metadata={"help": "Folder with gsm8k_train.jsonl."})
        old: str | None = field(default=None, metadata={"help": "Checkout of an older build, beside this one."})
        output: str = field(default="results/data.json", metadata={"help": "Where the numbers go."})
        repeats: int = field(default=3, metadata={"help": "Interleaved; medians are reported."})

    settings = parse(DataSettings, prog="benchmarks/data.py")
    builds = {"new": ROOT} | ({"old": Path(settings.old).resolve()} if settings.old else {})
    result: dict[str, Any] = {"provenance": provenance(), "rows": ROWS, "repeats": settings.repeats}
    result |= {"answers": {"prompts": ANSWERS, "new_tokens": NEW}, "old_commit": None, "stages": {}}
    if settings.old:
        asked = ["git", "-C", settings.old, "rev-parse", "HEAD"]
        result["old_commit"] = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        load_model(None, work / "model")
        write_inputs(Path(settings.data), work)
        for name, counts in STAGES.items():
            ways: dict[str, Callable[[], dict[str, Any]]] = {}
            for build, root in builds.items():
                for processes in counts:
                    if build == "new" or (name not in NEW_ONLY and (processes == 1 or name == "answer")):
                        ways[f"{build} {processes}"] = lambda r=root, n=name, p=processes: ask(r, n, work, p)
            taken: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
            for _ in range(settings.repeats):
                for way, run in ways.items():
                    taken[way].append(run())
            for way, runs in taken.items():
                found = {key: median(run[key] for run in runs) for key in runs[0]}
                found |= {"tokens_per_second": found["tokens"] / found["seconds"]}
                result["stages"].setdefault(name, {})[way] = found
                print(f"{name:12} {way:6} {found['tokens_per_second']:12,.0f} tokens/s  {found['seconds']:8.2f} s")
            write_json_atomic(settings.output, result)


if __name__ == "__main__":
    main()
