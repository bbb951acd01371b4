"""Mask tokens: what a training step costs, what a long text costs, and which settings are worth their rows.

    python benchmarks/masked.py --part step layer memory stream long     [--output results/masked.json]
    FORETELL_DATA=DIR python benchmarks/masked.py --part tau --small runs/small-target
    FORETELL_DATA=DIR python benchmarks/masked.py --part confirm

step: a step on SmolLM2 in two passes against the published design: everything in one pass with gradient, the output
matrix on every row, one pass of the sampler after the other with all logits kept. layer: the same for the vocabulary
part alone at 152k. memory: peak of a process. stream: peak against the length of the text, and long: 100k tokens.
tau: decoded, on the small target (benchmarks/small_target.py), by loss, sampler, masks, rank and layout: figure 7 and 8
of arXiv 2507.11851 in small. confirm: the best two on SmolLM2.
"""

# B rows, T tokens, K masks, D hidden width, V vocabulary.

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from machine import left_padded
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from foretell import MTPModel, get_mtp_model
from foretell.config import parse
from foretell.data.collate import to_batch
from foretell.methods.masked import one_pass
from foretell.ops.losses import linear_loss
from foretell.runtime import provenance, write_json_atomic

DESIGNS = ("two passes", "published")
STEPS = ((4, 256), (4, 512), (8, 256))  # (K, tokens of the step's one text)
PROMPT = 8  # tokens that carry no masks
MASKED = {"method": "masked", "depth": 4, "mask_positions": 24}  # what the arms of part tau share
LENGTHS = (4096, 16384, 65536, 131072)
PARTS = Literal["step", "layer", "memory", "stream", "long", "tau", "confirm"]
# what the published figures vary; each differs from `base` in one thing, but for the last two
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {"mtp_supervision": "teacher"}),
    "hard labels": ({}, {"mtp_supervision": "labels"}),
    "soft + latent": ({"latent_loss_weight": 0.003}, {"mtp_supervision": "teacher"}),
    "soft + masks' own": ({"mask_loss_weight": 1.0}, {"mtp_supervision": "teacher"}),
    "no sampler": ({"sampler": False}, {"mtp_supervision": "teacher"}),
    "distinct masks": ({"mask_tokens": "distinct"}, {"mtp_supervision": "teacher"}),
    "noise masks, no sampler": ({"mask_tokens": "noise", "sampler": False}, {"mtp_supervision": "teacher"}),
    "rank 4": ({"lora_rank": 4, "lora_alpha": 8.0}, {"mtp_supervision": "teacher"}),
    "rank 64": ({"lora_rank": 64, "lora_alpha": 128.0}, {"mtp_supervision": "teacher"}),
    "apple": (
        {"mask_tokens": "distinct", "mask_loss_weight": 1.0, "latent_loss_weight": 0.003},
        {"mtp_supervision": "labels"},
    ),
}


@dataclass(kw_only=True)
class MaskedSettings:
    """Flags of benchmarks/masked.py."""

    part: list[PARTS] = field(  # type: ignore[valid-type]
        default_factory=lambda: ["step", "layer", "memory", "stream", "long"], metadata={"help": "What to measure."}
    )
    small: str = field(default="runs/small-target", metadata={"help": "The small target's folder."})
    variants: list[str] = field(default_factory=lambda: list(VARIANTS), metadata={"help": "Of part tau."})
    steps: int = field(default=250, metadata={"help": "Optimizer steps of each variant."})
    confirm_steps: int = field(default=40, metadata={"help": "Optimizer steps on SmolLM2."})
    prompts: int = field(default=400, metadata={"help": "Prompts that the target answers for training."})
    repeats: int = field(default=3, metadata={"help": "Interleaved repeats."})
    output: str = field(default="results/masked.json", metadata={"help": "Where the numbers go."})


# -- a training step ---------------------------------------------------------------------------------------------------


def smollm() -> tuple[nn.Module, Any]:
    """SmolLM2-135M and its tokenizer."""
    from foretell.cli.demo import load_model

    return load_model(None, Path("runs/masked/model"))


def step_inputs(vocabulary: int, tokens: int) -> dict[str, Tensor]:
    """One text of random tokens, of which all but the first few are learned."""
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "labels": labels}


def frozen(model: nn.Module, **settings: Any) -> MTPModel:
    """An MTPModel whose module learns and whose target does not."""
    mtp = get_mtp_model(model, {"method": "masked", "lora_alpha": 32.0, **settings})
    mtp.model.requires_grad_(False)
    mtp.make_trainable()
    return mtp.train()


def two_passes(mtp: MTPModel, inputs: dict[str, Tensor]) -> None:
    """Ours: forward and backward of a step."""
    losses = mtp(**inputs, mtp_supervision="teacher")["mtp"]
    sum(loss.total / loss.count for loss in losses).backward()


def published(mtp: MTPModel, inputs: dict[str, Tensor]) -> None:
    """As MTP-GLoRA has it: one forward of all rows with gradient, the output matrix on every one of them, K passes of
    the sampler that keep their logits, soft cross-entropy on each.
    """
    module, batch = mtp.module, to_batch(inputs)
    rows = one_pass(module, mtp.target, batch)
    text_TD, masks_TKD = rows.post_norm_BRD[0], rows.piece.masks_BOKD[0]
    T, K, D = masks_TKD.shape
    every_NV = F.linear(torch.cat([text_TD, masks_TKD.reshape(-1, D)]), mtp.target.head.weight)
    teacher_TV = every_NV[:T].detach().float().softmax(-1)
    total, ids_T = torch.zeros(()), inputs["input_ids"][0]
    for k in range(1, K + 1):
        owner = slice(PROMPT - 1, T - 1 - k)
        before_N = ids_T[PROMPT - 1 + k : T - 1]
        state_ND = module.sampler(mtp.target.embed(before_N), masks_TKD[owner, k - 1])
        logits_NV = F.linear(state_ND, mtp.target.head.weight).float()
        loss_N = -(teacher_TV[PROMPT - 1 + k : T - 1] * logits_NV.log_softmax(-1)).sum(-1)
        total = total + loss_N.mean()
    (total + 0.0 * every_NV.sum()).backward()  # every row's logits stand in the graph, as there


RUN: dict[str, Callable[[MTPModel, dict[str, Tensor]], None]] = {"two passes": two_passes, "published": published}


def step_seconds(settings: MaskedSettings) -> dict[str, Any]:
    """Medians, interleaved; the designs' gradients are compared first."""
    model, _ = smollm()
    found = {}
    for depth, tokens in STEPS:
        mtp, inputs = frozen(model, depth=depth), step_inputs(model.config.vocab_size, tokens)
        taken: dict[str, list[float]] = {design: [] for design in DESIGNS}
        for _ in range(settings.repeats):
            for design in DESIGNS:
                mtp.zero_grad()
                start = time.perf_counter()
                RUN[design](mtp, inputs)
                taken[design].append(time.perf_counter() - start)
        seconds = {design: median(values) for design, values in taken.items()}
        name = f"K = {depth}, {tokens} tokens"
        found[name] = {
            "seconds": seconds,
            "spread": {design: [min(v), max(v)] for design, v in taken.items()},
            "answer_tokens_per_second": {design: (tokens - PROMPT) / s for design, s in seconds.items()},
            "times_faster": seconds["published"] / seconds["two passes"],
        }
        print(f"step, {name}: {seconds}  {found[name]['times_faster']:.2f} times faster", flush=True)
    return found


def layer_seconds(settings: MaskedSettings) -> dict[str, Any]:
    """The vocabulary part of a step alone at 152k tokens and width 1,024: forward and backward from states."""
    V, D, K, rows = 151_936, 1024, 4, 64
    torch.manual_seed(0)
    weight_VD = torch.randn(V, D) * 0.02
    text_TD, state_ND = torch.randn(rows, D), torch.randn(rows * K, D)
    at_N = torch.arange(rows).repeat_interleave(K)

    def ours() -> None:
        hidden = state_ND.clone().requires_grad_()
        linear_loss(
            hidden, weight_VD, teacher_hidden_ND=text_TD, teacher_weight_MD=weight_VD, teacher_rows_N=at_N, kind="ce"
        ).total.backward()

    def theirs() -> None:
        hidden, masks = state_ND.clone().requires_grad_(), state_ND.clone().requires_grad_()
        every = F.linear(torch.cat([text_TD, masks]), weight_VD)
        teacher = every[:rows].detach().float().softmax(-1)
        total = torch.zeros(())
        for k in range(K):
            logits = F.linear(hidden[k::K], weight_VD).float()
            total = total - (teacher * logits.log_softmax(-1)).sum()
        (total + 0.0 * every.sum()).backward()

    taken: dict[str, list[float]] = {design: [] for design in DESIGNS}
    for _ in range(settings.repeats):
        for design, run in zip(DESIGNS, (ours, theirs), strict=True):
            start = time.perf_counter()
            run()
            taken[design].append(time.perf_counter() - start)
    seconds = {design: median(values) for design, values in taken.items()}
    print(f"vocabulary 151,936: {seconds}", flush=True)
    return {"seconds": seconds, "times_faster": seconds["published"] / seconds["two passes"]}


# -- memory ------------------------------------------------------------------------------------------------------------


def resident(name: str) -> int:
    """A line of /proc/self/status in bytes (Linux): VmRSS is now, VmHWM the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def in_own_process(*words: object) -> dict[str, Any]:
    """What this file prints as JSON when it is called with --one and these words."""
    command = [sys.executable, __file__, "--one", *map(str, words)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(said.strip().splitlines()[-1])


def one(words: list[str]) -> None:
    """In a process of its own: the peak of a step, of a design on SmolLM2 or of a streamed text on a small model."""
    if words[0] == "step":
        model, _ = smollm()
        inputs = step_inputs(model.config.vocab_size, int(words[3]))
        mtp = frozen(model, depth=int(words[2]))
        run = lambda: RUN[words[1]](mtp, inputs)  # noqa: E731
    else:
        mtp, inputs = long_text(int(words[1]), share=float(words[2]))
        run = lambda: two_passes(mtp, inputs)  # noqa: E731
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start = resident("VmRSS"), time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    norm = float(sum(p.grad.norm() for p in mtp.module.parameters() if p.grad is not None))
    print(json.dumps({"before": before, "peak": resident("VmHWM"), "seconds": seconds, "gradient": norm}))


def step_memory(settings: MaskedSettings) -> dict[str, Any]:
    """Peak of a process that does one step on SmolLM2, and what the step adds to the loaded model."""
    found: dict[str, Any] = {}
    for depth, tokens in STEPS:
        peaks = {design: in_own_process("step", design, depth, tokens) for design in DESIGNS}
        added = {design: p["peak"] - p["before"] for design, p in peaks.items()}
        name = f"K = {depth}, {tokens} tokens"
        found[name] = {
            "peak": {design: p["peak"] for design, p in peaks.items()},
            "added": added,
            "share_of_published": added["two passes"] / added["published"],
        }
        print(f"memory, {name}: " + "  ".join(f"{d} +{a / 2**20:.0f} MiB" for d, a in added.items()), flush=True)
    return found


def long_text(tokens: int, share: float) -> tuple[MTPModel, dict[str, Tensor]]:
    """A two-layer model of width 64 and a text of that many tokens, of which a share carries masks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2**18, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    mtp = frozen(LlamaForCausalLM(config), depth=2, chunk_size=512, mask_positions=share, lora_rank=8)
    inputs = {"input_ids": torch.randint(2, 512, (1, tokens))}
    chosen = mtp.module.choose(to_batch(inputs), torch.Generator().manual_seed(0))
    return mtp, {**inputs, "mtp_labels": chosen}


def stream(settings: MaskedSettings) -> dict[str, Any]:
    """Peak memory of a step by the length of its text, above what it was before."""
    found = {}
    for tokens in LENGTHS:
        run = in_own_process("stream", tokens, 0.02)
        kept = 2 * 2 * tokens * 32 * 4  # keys and values, two layers, one head of width 32, fp32
        found[str(tokens)] = {**run, "added": run["peak"] - run["before"], "keys_and_values": kept}
        print(f"stream of {tokens}: +{found[str(tokens)]['added'] / 2**20:.0f} MiB, of which keys and values "
              f"{kept / 2**20:.0f} MiB, {run['seconds']:.0f} s", flush=True)  # fmt: skip
    return found


def long(settings: MaskedSettings) -> dict[str, Any]:
    """100,000 tokens, a tenth of which carries masks."""
    run = in_own_process("stream", 100_000, 0.1)
    print(f"100,000 tokens: {run['seconds']:.0f} s, peak {run['peak'] / 2**20:.0f} MiB", flush=True)
    return {**run, "tokens_per_second": 100_000 / run["seconds"]}


# -- tau ---------------------------------------------------------------------------------------------------------------


def answers(model: nn.Module, tokenizer: Any, chats: list, count: int, folder: Path) -> Any:
    """The target's own greedy answers to the chats' first turns."""
    from foretell.training.regenerate import regenerate

    mtp = get_mtp_model(model, {"method": "masked", "depth": 1})
    rows = [{"messages": chat} for chat in chats[:count]]
    return regenerate(mtp, rows, tokenizer, folder, max_new_tokens=96, keep_hidden=False)[0]


def trained(
    model: nn.Module, rows: Any, steps: int, module: dict[str, Any], training: dict[str, Any], tokenizer: Any = None
) -> tuple[MTPModel, dict[str, Any]]:
    """A module after that many steps of eight answers (or as said), and how training went."""
    from foretell.training.trainer import MTPTrainer, MTPTrainingArguments

    torch.manual_seed(training.get("seed", 0))
    mtp = get_mtp_model(model, module)
    given = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", **training}
    args = MTPTrainingArguments(
        output_dir="runs/masked/tau", max_steps=steps, warmup_steps=steps // 10, save_strategy="no",
        report_to="none", logging_steps=10, adam_beta2=0.95, weight_decay=0.0, **given,
    )  # fmt: skip
    trainer = MTPTrainer(model=mtp, args=args, train_dataset=rows, processing_class=tokenizer)
    start = time.perf_counter()
    trainer.train()
    last = next(entry for entry in reversed(trainer.state.log_history) if "mtp_loss" in entry)
    accuracy = [last[f"accuracy_{k}"] for k in range(1, mtp.mtp_config.depth + 1)]
    return mtp, {"seconds": time.perf_counter() - start, "loss": last["mtp_loss"], "accuracy": accuracy}


def smollm_answers() -> tuple[nn.Module, Any, Any, list[list[int]]]:
    """SmolLM2, its tokenizer, its own answers to 64 prompts of the demo, and those that the demo compares on."""
    from foretell.cli.demo import _chat, _prompts
    from foretell.data.prompts import encode_prompt

    model, tokenizer = smollm()
    chats = [_chat(row)["messages"] for row in _prompts(0)["train"]]
    store = answers(model, tokenizer, chats, 64, Path("runs/masked/smollm-answers"))
    return model, tokenizer, store, [encode_prompt(_chat(row), tokenizer) for row in _prompts(0)["compare"]]


def save_figure(figure: Any, path: Path) -> None:
    """Letters as letters and no date: a figure drawn again from the same numbers is the same file."""
    from matplotlib import pyplot, rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "foretell"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def decoded(mtp: MTPModel, prompts: list[list[int]], tokens: int = 64) -> dict[str, Any]:
    """tau and acceptance of linear and quadratic layouts, in batches of 8, and whether every token is the target's."""
    found: dict[str, Any] = {}
    for at in range(0, len(prompts), 8):
        inputs = left_padded(prompts[at : at + 8], mtp.device)
        common = {"max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True}
        plain = mtp.generate(**inputs, num_draft_tokens=0, **common).sequences
        for layout in ("linear", "quadratic"):
            out = mtp.generate(**inputs, num_draft_tokens=4, draft_layout=layout, **common)
            one = found.setdefault(layout, {"emitted": 0, "verifications": 0, "accepted": [0] * 5, "equal": True})
            records = [r for record in out.stats.records for r in record]
            one["emitted"] += sum(r.emitted for r in records)
            one["verifications"] += len(records)
            for r in records:
                for k in range(r.accepted + 1):
                    one["accepted"][k] += 1
            one["equal"] &= bool(torch.equal(out.sequences, plain))
    for one in found.values():
        one["tau"] = one["emitted"] / one["verifications"]
        one["accept_given"] = [b / max(a, 1) for a, b in zip(one["accepted"], one["accepted"][1:], strict=False)]
    return found


def tau(settings: MaskedSettings) -> dict[str, Any]:
    """Each variant after the same number of steps on the same answers, decoded on held-out prompts."""
    from small_target import find_data, held_out_chats, training_chats
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from foretell.data.prompts import encode_prompt

    model = AutoModelForCausalLM.from_pretrained(settings.small, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(settings.small)
    data = find_data()
    store = answers(model, tokenizer, training_chats(data), settings.prompts, Path("runs/masked/small-answers"))
    prompts = [encode_prompt({"messages": chat}, tokenizer) for chat in held_out_chats(data)[:48]]
    found: dict[str, Any] = {"steps": settings.steps, "answers": len(store)}
    for name in settings.variants:
        module, training = VARIANTS[name]
        mtp, about = trained(model, store, settings.steps, {**MASKED, **module}, training)
        found[name] = {**about, **decoded(mtp, prompts)}
        print(f"{name}: loss {about['loss']:.3f}  tau linear {found[name]['linear']['tau']:.3f}  quadratic "
              f"{found[name]['quadratic']['tau']:.3f}  {about['seconds']:.0f} s", flush=True)  # fmt: skip
    return found


def confirm(settings: MaskedSettings) -> dict[str, Any]:
    """The best two settings on SmolLM2, on its own answers."""
    model, _, store, prompts = smollm_answers()
    found: dict[str, Any] = {"steps": settings.confirm_steps}
    for name in settings.variants[:2]:
        module, training = VARIANTS[name]
        training = {**training, "per_device_train_batch_size": 4, "learning_rate": 2e-3}
        mtp, about = trained(model, store, settings.confirm_steps, {**MASKED, **module, "mask_positions": 16}, training)
        found[name] = {**about, **decoded(mtp, prompts, 48)}
        print(f"SmolLM2, {name}: loss {about['loss']:.3f}  tau linear {found[name]['linear']['tau']:.3f}  quadratic "
              f"{found[name]['quadratic']['tau']:.3f}  {about['seconds']:.0f} s", flush=True)  # fmt: skip
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """Memory against length, with the part that keys and values take."""
    from matplotlib import pyplot

    lengths = [key for key in found if key.isdigit()]
    x = [int(key) / 1024 for key in lengths]
    figure, axes = pyplot.subplots(figsize=(5.5, 3.2), layout="constrained")
    for name, label in (("added", "a training step"), ("keys_and_values", "of which keys and values")):
        axes.plot(x, [found[key][name] / 2**20 for key in lengths], marker="o", label=label)
    axes.set(xlabel="thousands of tokens of one text", ylabel="MiB above the model", ylim=(0, None))
    axes.legend()
    save_figure(figure, path)


def main() -> None:
    """Each part, printed as it comes, then written."""
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2:])
        return
    settings = parse(MaskedSettings, prog="benchmarks/masked.py")
    path = Path(settings.output)
    parts: dict[str, Callable[[MaskedSettings], dict[str, Any]]] = {
        "step": step_seconds, "layer": layer_seconds, "memory": step_memory, "stream": stream, "long": long,
        "tau": tau, "confirm": confirm,
    }  # fmt: skip
    for name in settings.part:
        values = {"provenance": provenance(sys.argv), **parts[name](settings)}
        found = json.loads(path.read_text()) if path.is_file() else {}
        found[name] = {**found.get(name, {}), **values}
        write_json_atomic(path, found)
        if name == "stream":
            draw(found[name], Path("docs/masked_memory.svg"))


if __name__ == "__main__":
    main()
