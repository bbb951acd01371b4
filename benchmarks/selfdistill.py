"""Learning from proposals of one's own (arXiv 2602.06019): what it is worth, by itself and under a verifier.

    FORETELL_DATA=DIR python benchmarks/selfdistill.py --part arms chains curve --small runs/small-target
    FORETELL_DATA=DIR python benchmarks/selfdistill.py --part confirm speed

arms: labels, teacher, student_forced hard and soft, like for like, gated LoRA under the verifier, several seeds: tau
and accept_given, with the sampler head and without, on the target's own answers and on the data's. chains: the same
question for sequential modules and heads. curve: accuracy and agreement against tokens a forward, for the paper's
method, the reproduction card's, gated adapters with ConfAdapt and with the verifier. confirm: arms on SmolLM2. speed:
wall-clock of its module by batch, against drafting off.
"""

# B sequences, T positions, K masks, V vocabulary.

from __future__ import annotations

import copy
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Literal

import torch
import torch.nn.functional as F
from machine import left_padded
from masked import MASKED, answers, save_figure, smollm_answers, trained
from torch import Tensor, nn

from foretell import MTPModel, get_mtp_model
from foretell.config import parse
from foretell.runtime import provenance, write_json_atomic

ARMS: dict[str, dict[str, Any]] = {
    "labels": {"mtp_supervision": "labels"},
    "teacher": {"mtp_supervision": "teacher"},
    "student_forced": {"mtp_supervision": "student_forced"},
    "student_forced_soft": {"mtp_supervision": "student_forced_soft"},
}
# what the arms are compared with: (settings of the module, whose answers)
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "sampler head, own answers": ({}, "own"),
    "no sampler, own answers": ({"sampler": False}, "own"),
    "no sampler, data's answers": ({"sampler": False}, "data"),
}
CHAINS: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential", "depth": 3},
    "heads": {"method": "heads", "depth": 3, "head_type": "ffn"},
}
K_MAX = 8  # of the curve: the small target's sentences are short
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": (
        {"depth": K_MAX - 1, "sampler": False, "lora_rank": 0, "mask_positions": "regions", "prefix_loss_weight": 0.0},
        {
            "mtp_training_mode": "joint",
            "mtp_supervision": "student_forced",
            "lr_scheduler_type": "constant_with_warmup",
        },
    ),
    "paper + prefix loss": (
        {"depth": K_MAX - 1, "sampler": False, "lora_rank": 0, "mask_positions": "regions"},
        {
            "mtp_training_mode": "joint",
            "mtp_supervision": "student_forced",
            "lr_scheduler_type": "constant_with_warmup",
        },
    ),
    "card": (
        {"fixed_k": K_MAX, "sampler": False, "lora_rank": 0, "mask_positions": "regions", "regions": 1},
        {"mtp_training_mode": "joint", "mtp_supervision": "student_forced_soft", "mtp_loss": "kl"},
    ),
    "gated": ({"depth": K_MAX - 1, "mask_positions": 24}, {"mtp_supervision": "student_forced"}),
}
THRESHOLDS = (0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
STATIC = (1, 2, 3, 4, 5)
NEW_TOKENS = 96


@dataclass(kw_only=True)
class SelfDistillSettings:
    """Flags of benchmarks/selfdistill.py."""

    part: list[Literal["arms", "chains", "curve", "confirm", "speed"]] = field(
        default_factory=lambda: ["arms", "chains", "curve"], metadata={"help": "What to measure."}
    )
    small: str = field(default="runs/small-target", metadata={"help": "The small target's folder."})
    settings: list[str] = field(default_factory=lambda: list(SETTINGS), metadata={"help": "Of part arms."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Of part curve."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": "Of parts arms, chains and confirm."})
    seeds: int = field(default=3, metadata={"help": "Runs of each arm."})
    steps: int = field(default=120, metadata={"help": "Optimizer steps of eight answers."})
    curve_steps: int = field(default=400, metadata={"help": "Of part curve."})
    confirm_steps: int = field(default=40, metadata={"help": "Optimizer steps of four answers on SmolLM2."})
    prompts: int = field(default=400, metadata={"help": "Prompts that the target answers for training."})
    batches: list[int] = field(default_factory=lambda: [1, 4, 8, 16], metadata={"help": "Of part speed."})
    repeats: int = field(default=3, metadata={"help": "Of part speed, interleaved."})
    output: str = field(default="results/selfdistill.json", metadata={"help": "Where the numbers go."})


def small(settings: SelfDistillSettings) -> tuple[nn.Module, Any, dict[str, Any], list[list[dict[str, str]]]]:
    """The small target, its tokenizer, the training answers (its own, the data's), and held-out chats."""
    from small_target import find_data, held_out_chats, training_chats
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(settings.small, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(settings.small)
    chats = training_chats(find_data())
    own = answers(model, tokenizer, chats, settings.prompts, Path("runs/masked/small-answers"))
    data = [{"messages": chat[:2]} for chat in chats[: settings.prompts]]
    return model, tokenizer, {"own": own, "data": data}, held_out_chats(find_data())


def decoded(mtp: MTPModel, prompts: list[list[int]], tokens: int = 64, **how: Any) -> dict[str, Any]:
    """tau and accept_given over all prompts in batches of 8, and whether every token is the target's."""
    emitted = verifications = 0
    drafted, accepted, equal = [0] * 17, [0] * 17, True
    for at in range(0, len(prompts), 8):
        inputs = left_padded(prompts[at : at + 8], mtp.device)
        common = {"max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True}
        plain = mtp.generate(**inputs, num_draft_tokens=0, **common).sequences
        out = mtp.generate(**inputs, **how, **common)
        for record in (r for records in out.stats.records for r in records):
            emitted, verifications = emitted + record.emitted, verifications + 1
            for k in range(1, record.depth + 1):
                drafted[k] += record.accepted >= k - 1
                accepted[k] += record.accepted >= k
        equal &= bool(torch.equal(out.sequences, plain))
    given = [a / d for a, d in zip(accepted[1:], drafted[1:], strict=True) if d]
    return {"tau": emitted / verifications, "accept_given": given, "equal": equal}


def spread(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of tau and of each accept_given over seeds."""
    taus = [run["tau"] for run in runs]
    given = [list(values) for values in zip(*(run["accept_given"] for run in runs), strict=False)]
    return {
        "tau": mean(taus),
        "tau_sd": stdev(taus) if len(taus) > 1 else 0.0,
        "accept_given": [mean(values) for values in given],
        "accept_given_sd": [stdev(values) if len(values) > 1 else 0.0 for values in given],
        "runs": runs,
    }


def arms(settings: SelfDistillSettings) -> dict[str, Any]:
    """Like for like: only what the masks learn from differs."""
    from foretell.data.prompts import encode_prompt

    model, tokenizer, texts, held_out = small(settings)
    prompts = [encode_prompt({"messages": chat}, tokenizer) for chat in held_out[:48]]
    found: dict[str, Any] = {"steps": settings.steps}
    for name in settings.settings:
        module, whose = SETTINGS[name]
        found[name] = {}
        for arm in settings.arms:
            runs = []
            for seed in range(settings.seeds):
                training = {**ARMS[arm], "seed": seed, "max_length": 160}
                mtp, about = trained(model, texts[whose], settings.steps, {**MASKED, **module}, training, tokenizer)
                how = {"num_draft_tokens": 4, "draft_layout": "quadratic"}
                runs.append({**about, **decoded(mtp, prompts, **how)})
            found[name][arm] = spread(runs)
            say(f"{name}, {arm}", found[name][arm])
    draw_arms(found, Path("docs/selfdistill_arms.svg"))
    return found


def draw_arms(found: dict[str, Any], path: Path) -> None:
    """accept_given by depth with error bars over seeds, a panel for each setting, a line for each arm."""
    from matplotlib import pyplot

    names = [name for name, by_arm in found.items() if isinstance(by_arm, dict) and "labels" in by_arm]
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(4.5 * len(names), 3.4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, name in zip(panels[0], names, strict=True):
        for i, (arm, one) in enumerate(found[name].items()):
            depths = [k + 0.06 * (i - 1.5) for k in range(1, len(one["accept_given"]) + 1)]
            label = f"{arm}, tau {one['tau']:.2f}"
            axes.errorbar(depths, one["accept_given"], one["accept_given_sd"], marker="o", capsize=3, label=label)
        axes.set(xlabel="k", title=name, xticks=range(1, len(one["accept_given"]) + 1))
        axes.legend(fontsize=7)
    panels[0][0].set_ylabel("accept_given[k]")
    save_figure(figure, path)


def say(name: str, one: dict[str, Any]) -> None:
    """A line of what was found over seeds."""
    given = "  ".join(f"{a:.3f}" for a in one["accept_given"])
    seconds = median(run["seconds"] for run in one["runs"])
    print(f"{name}: tau {one['tau']:.3f} (sd {one['tau_sd']:.3f})  given {given}  {seconds:.0f} s", flush=True)


def chains(settings: SelfDistillSettings) -> dict[str, Any]:
    """Whether own proposals raise accept_given of the deeper drafts of sequential modules and heads."""
    from foretell.data.prompts import encode_prompt

    model, tokenizer, texts, held_out = small(settings)
    prompts = [encode_prompt({"messages": chat}, tokenizer) for chat in held_out[:48]]
    found: dict[str, Any] = {"steps": settings.steps}
    for name, module in CHAINS.items():
        found[name] = {}
        for arm in settings.arms:
            runs = []
            for seed in range(settings.seeds):
                training = {**ARMS[arm], "learning_rate": 2e-3, "seed": seed, "max_length": 160}
                mtp, about = trained(model, texts["own"], settings.steps, module, training, tokenizer)
                runs.append({**about, **decoded(mtp, prompts, num_draft_tokens=3)})
            found[name][arm] = spread(runs)
            say(f"{name}, {arm}", found[name][arm])
    return found


# -- accuracy against tokens a forward ---------------------------------------------------------------------------------


def curve(settings: SelfDistillSettings) -> dict[str, Any]:
    """Each method trained on the same answers, decoded lossily at several settings and, where it means something,
    losslessly; compared with what the untrained target says."""
    from foretell.data.prompts import encode_prompt

    model, tokenizer, texts, held_out = small(settings)
    sets = {"gsm8k": held_out[:64], "general": held_out[-64:]}
    prompts = {
        name: [p for p in (encode_prompt({"messages": chat[:1]}, tokenizer) for chat in chats) if len(p) < 400]
        for name, chats in sets.items()
    }
    wanted = {
        "gsm8k": [final_number(chat[1]["content"]) for chat in sets["gsm8k"]],
        "general": [None] * len(prompts["general"]),
    }
    original = get_mtp_model(model, MASKED)
    target_says = {name: run(original, p, num_draft_tokens=0)[0] for name, p in prompts.items()}
    found: dict[str, Any] = {"steps": settings.curve_steps, "k_max": K_MAX, "target": {}}
    for name in prompts:
        right = [final_number(tokenizer.decode(t)) == w for t, w in zip(target_says[name], wanted[name], strict=False)]
        found["target"][name] = {"accuracy": mean(right) if name == "gsm8k" else None}
    for method in settings.methods:
        module, training = METHODS[method]
        joint = training.get("mtp_training_mode") == "joint"
        own = copy.deepcopy(model) if joint else model  # a joint run changes its target
        rate = {"learning_rate": 1e-4, "mtp_loss_scaling_factor": 1.0, "mtp_depth_weights": "rows"} if joint else {}
        rows = [{**row} for row in texts["data"]] if joint else texts["own"]
        training = {**rate, **training, "seed": 0, "max_length": 160}
        mtp, about = trained(own, rows, settings.curve_steps, {**MASKED, **module}, training, tokenizer)
        points: dict[str, Any] = {"training": about}
        ways: dict[str, dict[str, Any]] = {
            **{f"confadapt {t}": {"policy": "confadapt", "confidence_threshold": t} for t in THRESHOLDS},
            **{f"static {k}": {"policy": "static_k", "num_draft_tokens": k} for k in STATIC},
            "lossless": {"num_draft_tokens": K_MAX - 1, "draft_layout": "linear"},
            "lossless, quadratic": {"num_draft_tokens": K_MAX - 1, "draft_layout": "quadratic"},
        }
        for way, how in ways.items():
            points[way] = {
                name: judged(mtp, original, tokenizer, prompts[name], target_says[name], wanted[name], how)
                for name in prompts
            }
            line = "   ".join(
                f"{name}: tau {p['tau']:.2f} agreement {p['tokens_agree']:.3f} exact {p['exact']:.2f}"
                for name, p in points[way].items()
            )
            print(f"{method}, {way}: {line}", flush=True)
        points["drift"] = {name: drift(original, mtp, prompts[name], target_says[name]) for name in prompts}
        found[method] = points
    draw(found, Path("docs/selfdistill_curve.svg"))
    return found


def run(mtp: MTPModel, prompts: list[list[int]], **how: Any) -> tuple[list[list[int]], float]:
    """(new tokens of each prompt up to its end, tokens a forward)."""
    said, emitted, forwards = [], 0, 0
    eos = mtp.model.generation_config.eos_token_id
    for at in range(0, len(prompts), 16):
        inputs = left_padded(prompts[at : at + 16], mtp.device)
        out = mtp.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **how)
        for row in out.sequences[:, inputs["input_ids"].shape[1] :].tolist():
            said.append(row[: row.index(eos) + 1] if eos in row else row)
        records = [record for records in out.stats.records for record in records]
        emitted, forwards = emitted + sum(r.emitted for r in records), forwards + len(records)
    return said, emitted / forwards


def judged(
    mtp: MTPModel,
    original: MTPModel,
    tokenizer: Any,
    prompts: list[list[int]],
    target_says: list[list[int]],
    wanted: list[str | None],
    how: dict[str, Any],
) -> dict[str, Any]:
    """tau; the share of whole answers and of leading tokens that are the target's; its surprise; task accuracy."""
    said, tau = run(mtp, prompts, **how)
    leading = [agreed(a, b) / max(len(b), 1) for a, b in zip(said, target_says, strict=True)]
    right = [final_number(tokenizer.decode(a)) == w for a, w in zip(said, wanted, strict=False) if w is not None]
    return {
        "tau": tau,
        "exact": mean(a == b for a, b in zip(said, target_says, strict=True)),
        "tokens_agree": mean(leading),
        "surprise": surprise(original, prompts, said),
        "accuracy": mean(right) if right else None,
    }


def agreed(a: list[int], b: list[int]) -> int:
    """Leading tokens that are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def final_number(text: str) -> str | None:
    """The last number of an answer, as GSM8K's flexible match takes it."""
    found = re.findall(r"-?\d[\d,]*\.?\d*", text)
    return found[-1].replace(",", "").rstrip(".") if found else None


@torch.no_grad()
def next_logits(mtp: MTPModel, prompt: list[int], answer: list[int]) -> Tensor:
    """[answer, V] what the model itself says before each of these tokens."""
    ids_BT = torch.tensor([prompt + answer])
    rows = mtp.target.forward_text(ids_BT, torch.arange(ids_BT.shape[1])[None])
    return mtp.target.logits(rows.post_norm_BRD[0, len(prompt) - 1 : -1]).float()


def surprise(original: MTPModel, prompts: list[list[int]], said: list[list[int]]) -> float:
    """Mean nats a token that the untrained target gives to a text: lossy decoding leaves what it would say."""
    total = tokens = 0.0
    for prompt, answer in zip(prompts, said, strict=True):
        if answer:
            total += float(
                F.cross_entropy(next_logits(original, prompt, answer), torch.tensor(answer), reduction="sum")
            )
            tokens += len(answer)
    return total / max(tokens, 1)


def drift(original: MTPModel, mtp: MTPModel, prompts: list[list[int]], said: list[list[int]]) -> float:
    """Mean KL of the trained model at k = 1 from the untrained target, along the target's own answers; 0 if gated."""
    total = tokens = 0.0
    for prompt, answer in zip(prompts, said, strict=True):
        p, q = (next_logits(one, prompt, answer).log_softmax(-1) for one in (original, mtp))
        total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + len(answer)
    return total / max(tokens, 1)


def draw(found: dict[str, Any], path: Path) -> None:
    """Agreement with the target, and its surprise, against tokens a forward; a column for each set of prompts."""
    from matplotlib import pyplot

    names, looks = list(found["target"]), {
        "tokens_agree": "leading tokens that are the target's", "surprise": "the target's nats a token",
    }  # fmt: skip
    figure, panels = pyplot.subplots(
        len(looks), len(names), figsize=(9.5, 6.6), layout="constrained", sharey="row", sharex="col"
    )
    for row, (what, label) in enumerate(looks.items()):
        for axes, name in zip(panels[row], names, strict=True):
            for i, method in enumerate(m for m in METHODS if m in found):
                for kind, marker, line in (("confadapt", "o", "-"), ("static", "s", ":"), ("lossless", "*", "")):
                    chosen = [p[name] for way, p in found[method].items() if way.startswith(kind)]
                    axes.plot(
                        [p["tau"] for p in chosen], [p[what] for p in chosen], line, marker=marker,
                        markersize=11 if kind == "lossless" else 4, color=f"C{i}", label=f"{method}, {kind}",
                    )  # fmt: skip
            panels[0][names.index(name)].set_title(name)
            panels[-1][names.index(name)].set_xlabel("tokens a forward")
        panels[row][0].set(ylabel=label, ylim=(0, None))  # once all is drawn, for the whole row
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    save_figure(figure, path)


# -- SmolLM2 -----------------------------------------------------------------------------------------------------------


def confirm(settings: SelfDistillSettings) -> dict[str, Any]:
    """A pair of arms on SmolLM2, on its own answers; the modules are kept for part speed."""
    model, tokenizer, store, prompts = smollm_answers()
    found: dict[str, Any] = {"steps": settings.confirm_steps}
    for arm in settings.arms:
        training = {**ARMS[arm], "per_device_train_batch_size": 4, "learning_rate": 2e-3}
        module = {**MASKED, "mask_positions": 16}
        training |= {"seed": 0, "max_length": 160}
        mtp, about = trained(model, store, settings.confirm_steps, module, training, tokenizer)
        mtp.save_pretrained(f"runs/selfdistill/{arm}")
        found[arm] = {**about, **decoded(mtp, prompts, 48, num_draft_tokens=4, draft_layout="quadratic")}
        given = "  ".join(f"{a:.3f}" for a in found[arm]["accept_given"])
        print(f"SmolLM2, {arm}: tau {found[arm]['tau']:.3f}  given {given}  {about['seconds']:.0f} s", flush=True)
    return found


def speed(settings: SelfDistillSettings) -> dict[str, Any]:
    """Tokens a second by batch, interleaved: drafting off, ConfAdapt with fixed and adapted spans, the verifier."""
    model, _, _, every = smollm_answers()
    mtp = MTPModel.from_pretrained(model, "runs/selfdistill/student_forced")
    ways: dict[str, dict[str, Any]] = {
        "off": {"num_draft_tokens": 0},
        "confadapt, fixed": {"policy": "confadapt"},
        "confadapt, auto": {"policy": "confadapt", "num_draft_tokens": "auto"},
        "static 2": {"policy": "static_k", "num_draft_tokens": 2},
        "lossless, auto": {"num_draft_tokens": "auto"},
    }
    found: dict[str, Any] = {}
    for batch in settings.batches:
        prompts = (every * 2)[: max(batch, 4)]
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        new: dict[str, list[int]] = {way: [] for way in ways}
        for repeat in range(settings.repeats + 1):  # the first round warms up and teaches those that adapt
            for way, how in ways.items():
                start, tokens = time.perf_counter(), 0
                for at in range(0, len(prompts), batch):
                    inputs = left_padded(prompts[at : at + batch], mtp.device)
                    out = mtp.generate(
                        **inputs, max_new_tokens=32, do_sample=False, return_dict_in_generate=True, **how
                    )
                    tokens += sum(map(sum, out.stats.emitted))
                if repeat:
                    seconds[way].append(time.perf_counter() - start)
                    new[way].append(tokens)
        rates = {way: median(n / s for n, s in zip(new[way], seconds[way], strict=True)) for way in ways}
        found[f"batch {batch}"] = {
            way: {
                "tokens_per_second": rates[way],
                "times_off": rates[way] / rates["off"],
                "spread": [min(seconds[way]), max(seconds[way])],
            }
            for way in ways
        }
        print(f"batch {batch}: " + "  ".join(f"{way} {r:.1f} ({r / rates['off']:.2f}x)" for way, r in rates.items()),
              flush=True)  # fmt: skip
    return found


def main() -> None:
    """Each part, printed as it comes, then written."""
    settings = parse(SelfDistillSettings, prog="benchmarks/selfdistill.py")
    parts: dict[str, Callable[[SelfDistillSettings], dict[str, Any]]] = {
        "arms": arms, "chains": chains, "curve": curve, "confirm": confirm, "speed": speed,
    }  # fmt: skip
    path = Path(settings.output)
    for name in settings.part:
        values = {"provenance": provenance(sys.argv), **parts[name](settings)}
        found = json.loads(path.read_text()) if path.is_file() else {}
        found[name] = {**found.get(name, {}), **values}
        write_json_atomic(path, found)


if __name__ == "__main__":
    main()
