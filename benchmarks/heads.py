"""Parallel heads: the seven types under one budget, chain against tree, and what MTP costs a step of TRL's SFTTrainer.

    python benchmarks/heads.py --answers runs/demo/answers [--model DIR] [--part types|step|memory] [--output FILE]

types: each kind of head learns the same answers for the same number of steps, then decodes held-out prompts.
step: seconds of an SFT step with K = 4 shared-unembedding heads on a frozen model, against TRL without MTP and against
the same heads with all logits at once (naive); vocabularies of 32,000 and 152,064; interleaved. memory: the same, peak.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from machine import left_padded, race

from foretell import calibrated_tree, get_mtp_model, head_accuracy
from foretell.cli.demo import _chat, _prompts, load_model
from foretell.config import parse
from foretell.data.cache import HiddenStore
from foretell.data.prompts import encode_prompt
from foretell.data.vocabulary import frequent_tokens
from foretell.runtime import provenance, write_json_atomic
from foretell.training.regenerate import eos_ids
from foretell.training.trainer import MTPTrainer, MTPTrainingArguments

TYPES = ["linear", "ffn", "mha_ffn", "cnn", "identical", "medusa", "layer"]
VOCABULARIES = (32_000, 152_064)
WAYS = ("trl", "foretell", "naive")


@dataclass(kw_only=True)
class HeadsSettings:
    """Flags of benchmarks/heads.py."""

    answers: str = field(default="runs/demo/answers", metadata={"help": "Folder of kept answers (foretell demo)."})
    model: str | None = field(default=None, metadata={"help": "The model that gave them; without it SmolLM2."})
    output: str = field(default="results/heads.json", metadata={"help": "Where the numbers go."})
    part: list[Literal["types", "step", "memory"]] = field(
        default_factory=lambda: ["types", "step", "memory"], metadata={"help": "What to measure."}
    )
    steps: int = field(default=100, metadata={"help": "Optimizer steps of each head type."})
    repeats: int = field(default=3, metadata={"help": "Interleaved repeats."})


# -- the seven types ---------------------------------------------------------------------------------------------------


def train_heads(model: Any, tokenizer: Any, store: Any, kind: str, steps: int) -> tuple[Any, dict[str, Any]]:
    """K = 3 heads of one kind, and how training went."""
    torch.manual_seed(0)
    # identical and medusa have matrices of their own by their nature; the others use the model's
    own = {"share_unembedding": kind not in ("identical", "medusa")}
    start = {"init_strategy": "copy_lm_head"} if kind in ("identical", "medusa") else {}
    settings = {"method": "heads", "depth": 3, "head_type": kind, "hidden_source": "post_norm", "dropout": 0.0}
    mtp = get_mtp_model(model, {**settings, "draft_vocab_size": 8192, **own, **start})
    ends = sorted(eos_ids(mtp, tokenizer))
    mtp.module.set_draft_vocabulary(frequent_tokens(store.rows(), 8192, mtp.target.vocab_size, ends))
    args = MTPTrainingArguments(
        output_dir="runs/heads", max_steps=steps, learning_rate=1e-3, per_device_train_batch_size=4, warmup_steps=20,
        lr_scheduler_type="cosine", adam_beta2=0.95, save_strategy="no", report_to="none", logging_steps=10,
    )  # fmt: skip
    trainer = MTPTrainer(model=mtp, args=args, train_dataset=store)
    started = time.perf_counter()
    trainer.train()
    last = next(entry for entry in reversed(trainer.state.log_history) if "mtp_loss" in entry)
    own_parameters = sum(p.numel() for p in mtp.module.parameters())
    return mtp, {"seconds": time.perf_counter() - started, "loss": last["mtp_loss"], "parameters": own_parameters}


def types(settings: HeadsSettings) -> dict[str, Any]:
    """Loss, accuracy by depth and rank, tau of chain and tree, parameters, seconds; and tokens a second of one type."""
    model, tokenizer = load_model(settings.model, Path("runs/heads/model"))
    store = HiddenStore.load(settings.answers)
    rows = list(store.rows())
    prompts = [encode_prompt(_chat(row), tokenizer) for row in _prompts(0)["compare"]]
    inputs = left_padded(prompts, model.device)
    width = inputs["input_ids"].shape[1]
    common = {"max_new_tokens": 64, "do_sample": False}
    greedy = model.generate(**inputs, **common)
    held_out = [
        {"input_ids": p + out[width:].tolist(), "labels": [-100] * len(p) + out[width:].tolist()}
        for p, out in zip(prompts, greedy, strict=True)
    ]
    found: dict[str, Any] = {"steps": settings.steps}
    for kind in TYPES:
        mtp, about = train_heads(model, tokenizer, store, kind, settings.steps)
        about["accuracy"] = head_accuracy(mtp, held_out, guesses=4)
        tree = calibrated_tree(head_accuracy(mtp, rows[-24:], guesses=4), cost=mtp.cost_curve())
        runs = {"chain": {}, "tree": {"draft_tree": tree}} if tree else {"chain": {}}
        for name, more in runs.items():
            out = mtp.generate(**inputs, **common, num_draft_tokens=3, return_dict_in_generate=True, **more)
            new, wanted = out.sequences[:, width:], greedy[:, width:]
            about[f"tau_{name}"], about[f"equal_{name}"] = out.stats.tau, bool((new == wanted).all())
        found[kind] = {**about, "tree": [list(node) for node in tree]}
        print(
            f"{kind}: loss {about['loss']:.3f}  accuracy {'  '.join(f'{a[0]:.3f}' for a in about['accuracy'])}  "
            f"tau chain {about['tau_chain']:.3f}  tree of {len(tree)} {about.get('tau_tree', 1.0):.3f}  "
            f"{about['parameters'] / 1e6:.2f} M  {about['seconds']:.0f} s",
            flush=True,
        )
        if kind == "medusa":
            one = {**left_padded(prompts[:1], model.device), **common}
            speed = {
                "off": lambda c=one, m=mtp: m.generate(**c, num_draft_tokens=0),
                "chain": lambda c=one, m=mtp: m.generate(**c, num_draft_tokens=3),
                "tree": lambda c=one, m=mtp, t=tree: m.generate(**c, num_draft_tokens=3, draft_tree=t or None),
                "auto": lambda c=one, m=mtp: m.generate(**c, num_draft_tokens="auto"),
            }
            found["speed of medusa"] = race(speed, tokenizer.eos_token_id, len(prompts[0]), settings.repeats)
            print("  ".join(f"{n} {w['tokens_per_second']:.1f} tok/s" for n, w in found["speed of medusa"].items()))
    return found


# -- a step of SFT -----------------------------------------------------------------------------------------------------


def sft_trainer(way: str, vocabulary: int) -> Any:
    """A trainer over random weights and tokens: 12 layers as wide as SmolLM2's, four rows of 256 tokens a step."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from foretell.trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    words = {f"w{i}": i for i in range(4)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")), pad_token="w0", eos_token="w1"
    )
    rows = Dataset.from_list([{"input_ids": row} for row in torch.randint(4, vocabulary, (64, 256)).tolist()])
    mtp = {} if way == "trl" else {
        "mtp_enabled": True, "mtp_num_predictions": 4, "mtp_share_unembedding": True, "mtp_dropout_prob": 0.0,
        "mtp_training_mode": "standalone",
    }  # fmt: skip
    args = (trl.SFTConfig if way == "trl" else SFTConfig)(
        output_dir="runs/heads/step", max_steps=3, per_device_train_batch_size=4, save_strategy="no", report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, **mtp,
    )  # fmt: skip
    kind = trl.SFTTrainer if way == "trl" else SFTTrainer
    trainer = kind(model=LlamaForCausalLM(config), args=args, train_dataset=rows, processing_class=tokenizer)
    if way == "naive":
        naive_losses(trainer.mtp)
    return trainer


def naive_losses(mtp: Any) -> None:
    """The same heads with all logits of all depths alive at once, as the closed pull request had them."""
    from foretell.types import LossSum

    def losses(target: Any, batch: Any, rows: Any, **mode: Any) -> list[LossSum]:
        labels_BTK = mtp.module.labels(batch)
        states = list(mtp.module.depth_states(target, batch, rows.post_norm_BRD.detach(), True))
        logits_BTKV = torch.stack([F.linear(state, target.head.weight.detach()) for state in states], dim=2)
        out = []
        for k in range(labels_BTK.shape[2]):
            flat, wanted = logits_BTKV[:, :, k].flatten(0, 1), labels_BTK[..., k].flatten()
            correct = (flat.argmax(-1) == wanted).sum()
            out.append(LossSum(F.cross_entropy(flat, wanted, reduction="sum"), (wanted != -100).sum(), correct))
        return out

    mtp.module.losses = losses


def step_seconds(settings: HeadsSettings) -> dict[str, Any]:
    """Medians over interleaved runs of three steps each, the first of which is thrown away."""
    found: dict[str, Any] = {}
    for vocabulary in VOCABULARIES:
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(settings.repeats):
            for way in WAYS:
                trainer, marks = sft_trainer(way, vocabulary), []
                plain = trainer.training_step

                def timed(*args: Any, plain: Any = plain, marks: list[float] = marks, **kwargs: Any) -> Any:
                    marks.append(time.perf_counter())
                    return plain(*args, **kwargs)

                trainer.training_step = timed
                trainer.train()
                taken[way].append(marks[2] - marks[1])
        seconds = {way: median(values) for way, values in taken.items()}
        found[str(vocabulary)] = {
            "seconds": seconds, "spread": {w: [min(v), max(v)] for w, v in taken.items()},
            "times_trl": {way: seconds[way] / seconds["trl"] for way in WAYS},
        }  # fmt: skip
        shown = "  ".join(f"{w} {s:.2f} s ({s / seconds['trl']:.2f}x)" for w, s in seconds.items())
        print(f"step, vocabulary {vocabulary}: {shown}", flush=True)
    return found


def memory_bytes() -> dict[str, Any]:
    """Peak memory of two steps, each in a process of its own, less what it had before the first."""
    found: dict[str, Any] = {}
    for vocabulary in VOCABULARIES:
        peaks = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--one", way, str(vocabulary)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks[way] = json.loads(said.strip().splitlines()[-1])
        found[str(vocabulary)] = {way: {**p, "times_trl": p["peak"] / peaks["trl"]["peak"]} for way, p in peaks.items()}
        shown = "  ".join(f"{w} {p['peak'] / 2**20:.0f} MiB" for w, p in peaks.items())
        print(f"memory, vocabulary {vocabulary}: {shown}", flush=True)
    return found


def one_peak(way: str, vocabulary: int) -> None:
    """In a process of its own: peak of the whole process while two steps run (Linux)."""

    def resident(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return 1024 * int(line.split()[1])

    trainer = sft_trainer(way, vocabulary)
    trainer.args.max_steps = 2
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    trainer.train()
    print(json.dumps({"before": before, "peak": resident("VmHWM")}))


def main() -> None:
    """Each part, printed as it comes, then written."""
    if sys.argv[1:2] == ["--one"]:
        one_peak(sys.argv[2], int(sys.argv[3]))
        return
    settings = parse(HeadsSettings, prog="benchmarks/heads.py")
    path = Path(settings.output)
    found = json.loads(path.read_text()) if path.is_file() else {}
    parts = {"types": lambda: types(settings), "step": lambda: step_seconds(settings), "memory": memory_bytes}
    for name in settings.part:
        found[name] = {"provenance": provenance(sys.argv), **parts[name]()}
        write_json_atomic(path, found)


if __name__ == "__main__":
    main()
