"""foretell inspect data: look before you train. Counts, lengths and rows as the trainer sees them; with --plan what
training would take, measured by some steps on this machine.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foretell.cli.loading import chat_template, load_target
from foretell.cli.train import module_settings, preset_values
from foretell.config import parse_settings
from foretell.runtime import clock

PLAN_STEPS = 3  # that are run, the first not counted


@dataclass(kw_only=True)
class InspectDataSettings:
    """Flags of `foretell inspect data`; beside them all of `foretell train` that say how rows are read and learned."""

    data: str = field(metadata={"help": "Rows: a file, a folder, or a datasets name.", "positional": True})
    model: str = field(metadata={"help": "Target: a transformers folder or hub name."})
    method: str = field(default="sequential", metadata={"help": "Architecture of the module (--plan)."})
    preset: str | None = field(default=None, metadata={"help": "A preset of recipes/ or a YAML file like them."})
    output: str | None = field(default=None, metadata={"help": "File for a page of HTML."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of lines."})
    plan: bool = field(
        default=False, metadata={"help": f"Also measure {PLAN_STEPS} steps: time, memory and disk of the training."}
    )
    samples: int = field(default=4, metadata={"help": "Rows that are shown, chosen by chance."})
    chat_template: str | None = field(default=None, metadata={"help": "As of `foretell train`."})
    dtype: str = field(default="auto", metadata={"help": "Of the target (--plan)."})


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from foretell.data.collate import pack
    from foretell.data.prompts import encode_rows
    from foretell.evaluation.data_page import as_text, describe, write_data_page
    from foretell.mtp import get_mtp_model
    from foretell.training.trainer import MTPTrainingArguments

    classes: list[type] = [InspectDataSettings, module_settings(argv), MTPTrainingArguments]
    settings, module, args = parse_settings(classes, argv, prog="foretell inspect data", preset=preset_values)
    tokenizer, config = AutoTokenizer.from_pretrained(settings.model), AutoConfig.from_pretrained(settings.model)
    if settings.chat_template is not None:
        tokenizer.chat_template = chat_template(settings.chat_template, tokenizer)
    how = (args.max_length, args.assistant_only_loss, config.get_text_config().vocab_size)
    encoded, stats = encode_rows(settings.data, tokenizer, *how, args.skip_bad_rows, args.num_proc)
    ends: Any = None
    with contextlib.suppress(OSError):
        ends = GenerationConfig.from_pretrained(settings.model).eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    packed = pack(encoded, args.max_length) if args.packing else None
    found = describe(encoded, stats, tokenizer, ends, module.depth, settings.samples, args.seed, packed)
    if settings.plan:
        with tempfile.TemporaryDirectory(prefix="foretell-plan-") as folder:
            short = ["--max-steps", str(PLAN_STEPS), "--output-dir", folder, "--save-strategy", "no"]
            *_, few = parse_settings(classes, [*argv, *short], prog="foretell inspect data", preset=preset_values)
            mtp = get_mtp_model(load_target(settings.model, settings.dtype)[0], module)
            found["plan"] = _plan(mtp, args, few, encoded, len(packed or encoded), tokenizer)
    print(json.dumps(found, indent=2, ensure_ascii=False) if settings.json else as_text(found))
    if settings.output is not None:
        write_data_page(found, f"{Path(settings.data).name} for {Path(settings.model).name}", settings.output)
        print(f"page: {settings.output}")
    return 0


def _plan(mtp: Any, args: Any, few: Any, encoded: Any, rows: int, tokenizer: Any) -> dict[str, str]:
    """What training by args would take, from `few` steps of it."""
    import torch
    from transformers import TrainerCallback

    from foretell.training.trainer import MTPTrainer

    batches = math.ceil(rows / (args.per_device_train_batch_size * args.world_size))
    steps = math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))
    steps, ticks = args.max_steps if args.max_steps > 0 else steps, []

    class Ticks(TrainerCallback):
        def on_step_end(self, *given: Any, **more: Any) -> None:
            ticks.append(time.monotonic())

    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    chosen = random.Random(args.seed).sample(range(len(encoded)), min(len(encoded), 8 * PLAN_STEPS * a_step))
    MTPTrainer(mtp, few, encoded.part(chosen), processing_class=tokenizer, callbacks=[Ticks()]).train()
    seconds = statistics.median(after - before for before, after in itertools.pairwise(ticks))
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    learns = mtp if args.trains_target else mtp.module
    learned = sum(p.numel() * p.element_size() for p in learns.parameters())
    states = int(encoded.lengths.sum()) * mtp.target.hidden_size * mtp.target.dtype.itemsize
    return {
        "steps": f"{steps:,} of {a_step} rows in each process",
        "time": f"{clock(steps * seconds)} ({seconds:.2f} s a step, the middle one of {len(ticks) - 1} run here)",
        "memory": f"{peak / 1e9:.2f} GB at most in these steps ({'GPU' if cuda else 'process'})",
        "disk of a checkpoint": f"{3 * learned / 1e6:,.1f} MB (what learns, and AdamW's two numbers for each of it)",
        "disk of kept states": f"{states / 1e9:,.3f} GB, if answers of these tokens keep them",
    }
