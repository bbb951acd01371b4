"""foretell evaluate's numbers: acceptance and speed of a module on a workload, and what others would call them."""

# C chunks.

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from foretell.decoding.stats import GenerationStats
from foretell.evaluation.measure import Chunk, Measured, Way, left_padded, stats_of
from foretell.evaluation.workloads import Task, first_prompt, next_prompt
from foretell.mtp import MTPModel
from foretell.types import Verification

SCHEMA = "foretell.evaluate/1"
NEAR_TIE = 4.0  # steps of the number type within which two logits are a rounding apart
CONTEXTS = (128, 512, 2048, 8192)  # borders of the buckets of context lengths
SHOWN = 600  # characters of a sample's prompt
POSITIONS = 32  # tokens of an answer in one bucket of positions


def conversations(
    mtp: MTPModel, tasks: Sequence[Task], tokenizer: Any, max_new_tokens: int, batch_size: int, **template: Any
) -> list[tuple[str, str, list[int]]]:
    """(name, category, prompt) of every turn. Later turns read the model's own greedy answers, made here once with
    drafting off, so that all ways are measured on the same prompts.
    """
    found = [(task.name, task.category, first_prompt(task, tokenizer, **template)) for task in tasks]
    said: dict[str, list[str]] = {task.name: [] for task in tasks}
    asked = {name: ids for name, _, ids in found}
    for turn in range(1, max((len(task.turns) for task in tasks), default=0)):
        going = [task for task in tasks if len(task.turns) > turn]
        for first in range(0, len(going), batch_size):
            some = going[first : first + batch_size]
            inputs = left_padded([asked[task.name] for task in some], (mtp.target.end_ids or [0])[0])
            inputs = {name: value.to(mtp.device) for name, value in inputs.items()}
            out = mtp.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_draft_tokens=0)
            for task, row in zip(some, out[:, inputs["input_ids"].shape[1] :], strict=True):
                said[task.name].append(tokenizer.decode(row, skip_special_tokens=True))
                asked[task.name] = next_prompt(task, said[task.name], tokenizer, **template)
                found.append((f"{task.name} turn {turn + 1}", task.category, asked[task.name]))
    return found


def equality(mtp: MTPModel, found: Measured, reference: str) -> dict[str, Any]:
    """Every greedy answer of every way against the reference's, in all repeats; a difference is a near tie where the
    model's own logits of the two tokens are a rounding apart.
    """
    runs, differences, ties = 0, [], []
    for way in found.ways:
        if way.name == reference:
            continue
        for kept in found.kept[way.name][: found.repeats]:
            for number, (one, wanted) in enumerate(zip(kept, found.first(reference), strict=True)):
                for i, (got, want) in enumerate(zip(one["tokens"], wanted["tokens"], strict=True)):
                    runs += 1
                    if got != want:
                        found_at = difference(mtp, found.chunks[number].prompts[i], got, want)
                        named = {"way": way.name, "prompt": found.chunks[number].names[i], **found_at}
                        (ties if found_at["near_tie"] else differences).append(named)
    return {
        "unequal": sorted({one["way"] for one in differences}),
        "prompts": sum(len(chunk.prompts) for chunk in found.chunks),
        "runs": runs,
        "equal": runs - len(differences) - len(ties),
        "near_ties": len(ties),
        "first_difference": (differences or ties or [None])[0],
        "faults": len(differences),
    }


@torch.no_grad()
def difference(mtp: MTPModel, prompt: list[int], got: list[int], wanted: list[int]) -> dict[str, Any]:
    """Where two answers part, and by how many steps of the number type the model's own logits of the two tokens do.
    A near tie exists in half precision only: in fp32 another order of summing is no excuse.
    """
    at = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    one, other = got[at : at + 1], wanted[at : at + 1]
    found: dict[str, Any] = {"position": at, "got": one, "wanted": other, "gap": None, "near_tie": False}
    if not one or not other:
        return found
    logits_V = mtp.model(torch.tensor([[*prompt, *wanted[:at]]], device=mtp.device)).logits[0, -1]
    step = torch.finfo(mtp.target.dtype).eps * float(logits_V[other[0]].abs())
    found["gap"] = abs(float(logits_V[one[0]]) - float(logits_V[other[0]])) / step
    found["near_tie"] = mtp.target.dtype != torch.float32 and found["gap"] <= NEAR_TIE
    return found


def summary(mtp: MTPModel, found: Measured, base: str) -> dict[str, Any]:
    """Of each way its speed against the base with intervals, its times, and its acceptance."""
    bandwidth, bytes_ = read_bandwidth(mtp)
    off = stats_of(found.every(base))
    ways = []
    for way in found.ways:
        rates = found.rates(way.name)
        about: dict[str, Any] = {
            "name": way.name,
            "label": way.label,
            "tokens_per_second": float(sorted(rates)[len(rates) // 2]),
            "repeats": [float(rate) for rate in rates],
            "spread": [float(rates.min()), float(rates.max())],
            "tokens": int(found.tokens(way.name)[0].sum()),
            "times_off": found.ratio(way.name, base),
            "tau": 1.0,
        }
        if way.name != "transformers":
            every = stats_of(found.every(way.name))
            about |= _ours(every, found.seconds(way.name).sum(), bandwidth, bytes_)
            if way.name != base:
                about["predicted"] = predicted(every, off)
        ways.append(about)
    return {
        "ways": ways,
        "by_category": _by_category(found),
        "intervals_by_category": {
            kind: {way.name: found.ratio(way.name, base, _of_kind(found, kind)) for way in found.ways}
            for kind in sorted({chunk.category for chunk in found.chunks})
        },
        "bandwidth_bytes_per_second": bandwidth,
        "weights_bytes": bytes_,
        "precision": found.precision(base) if found.repeats > 1 else None,
    }


def _ours(every: GenerationStats, seconds: float, bandwidth: float, bytes_: int) -> dict[str, Any]:
    parts = {name: every.seconds.get(name, 0.0) for name in ("prefill", "draft", "verify")}
    parts["bookkeeping"] = max(seconds - sum(parts.values()), 0.0)
    decoding = seconds - parts["prefill"]
    tokens = sum(v.emitted for record in every.records for v in record)
    read = bytes_ * every.verifications / max(parts["verify"], 1e-9)
    return {
        "tau": every.tau,
        "tau_drafted": every.tau_drafted,
        "mean_accepted": every.mean_accepted,
        "accept_at": every.accept_at,
        "accept_given": every.accept_given,
        "tokens_per_forward": tokens / max(every.verifications, 1),
        "rows_per_verification": sum(1 + v.drafted for v in _all(every)) / max(len(_all(every)), 1),
        "draft_ms": 1000 * parts["draft"] / every.draft_forwards if every.draft_forwards else None,
        "decode_tokens_per_second": tokens / max(decoding, 1e-9),
        "seconds": parts,
        "bytes_per_second": read,
        "share_of_bandwidth": read / bandwidth,
    }


def predicted(drafted: GenerationStats, off: GenerationStats) -> dict[str, float]:
    """tau / (1 + cost): what acceptance alone would give, the cost of a round's drafts and wider rows counted in
    forwards with drafting off. What the measured ratio falls short of it is overhead.
    """
    forward = off.seconds["verify"] / max(off.verifications, 1)
    rounds = max(drafted.verifications, 1)
    draft = drafted.seconds.get("draft", 0.0) / rounds / forward
    wider = drafted.seconds["verify"] / rounds / forward - 1
    gained = drafted.tau / max(off.tau, 1e-9)
    return {"tau": drafted.tau, "draft_cost": draft, "wider_rows": wider, "speedup": gained / (1 + draft + wider)}


def read_bandwidth(mtp: MTPModel) -> tuple[float, int]:
    """(bytes a second of one read of the target's weights, the best of three; bytes of them)."""
    seen = {p.data_ptr(): p for p in mtp.model.parameters()}
    bytes_ = sum(p.numel() * p.element_size() for p in seen.values())
    taken = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            for p in seen.values():
                flat = p.detach().reshape(-1)
                even = flat[: flat.numel() // 4 * 4] if p.element_size() < 4 else flat
                (even.view(torch.float32) if p.element_size() < 4 and even.numel() else even).sum()
            if mtp.device.type == "cuda":
                torch.cuda.synchronize(mtp.device)
            taken.append(time.perf_counter() - start)
    return bytes_ / min(taken), bytes_


def acceptance(found: Measured, names: Sequence[str]) -> dict[str, Any]:
    """By way: acceptance by category, by position in the answer, by context length, and the histogram."""
    out: dict[str, Any] = {}
    for name in names:
        kinds: dict[str, dict[str, list[Verification]]] = {"category": {}, "position": {}, "context": {}}
        counts: dict[int, int] = {}
        for chunk, one in zip(found.chunks * found.repeats, found.every(name), strict=True):
            for prompt, record in zip(chunk.prompts, one["records"], strict=True):
                said = 0
                for v in (Verification(*kept) for kept in record):
                    where = {
                        "category": chunk.category,
                        "position": _bucket(said, range(POSITIONS, 1 << 20, POSITIONS)),
                        "context": _bucket(len(prompt) + said, CONTEXTS),
                    }
                    for kind, bucket in where.items():
                        kinds[kind].setdefault(bucket, []).append(v)
                    counts[v.accepted] = counts.get(v.accepted, 0) + 1
                    said += v.emitted
        out[name] = {
            f"by_{kind}": {bucket: _accepted(of) for bucket, of in buckets.items()} for kind, buckets in kinds.items()
        }
        out[name]["histogram"] = {str(k): counts[k] for k in sorted(counts)}
    return out


def _accepted(of: list[Verification]) -> dict[str, Any]:
    stats = GenerationStats("lossless", True, [of])
    about = {"tau": stats.tau, "mean_accepted": stats.mean_accepted, "verifications": len(of)}
    return about | {"accept_at": stats.accept_at, "accept_given": stats.accept_given}


def elsewhere(stats: GenerationStats) -> dict[str, float]:
    """What other tools would call this run (each counts drafts and the target's own token in its own way)."""
    every = _all(stats)
    drafts = [v for v in every if v.drafted]
    accepted, proposed = sum(v.accepted for v in every), sum(v.drafted for v in every)
    emitted = sum(v.emitted for v in every)
    return {
        "vLLM mean acceptance length (1 + accepted / drafts)": 1 + accepted / max(len(drafts), 1),
        "vLLM draft acceptance rate (accepted / drafted tokens)": accepted / max(proposed, 1),
        "SGLang accept_length (tokens / verifications)": emitted / max(len(every), 1),
        "Spec-Bench mean accepted tokens (tokens a step)": emitted / max(len(every), 1),
        "speculators mean accepted (drafts only)": accepted / max(len(drafts), 1),
        "llama.cpp acceptance (accepted / drafted tokens)": accepted / max(proposed, 1),
    }


def _all(stats: GenerationStats) -> list[Verification]:
    return [v for record in stats.records for v in record]


def _bucket(value: int, borders: Any) -> str:
    low = 0
    for border in borders:
        if value < border:
            return f"{low}-{border - 1}"
        low = border
    return f"{low} and more"


def _of_kind(found: Measured, kind: str) -> list[int]:
    return [i for i, chunk in enumerate(found.chunks) if chunk.category == kind]


def _by_category(found: Measured) -> dict[str, dict[str, float]]:
    """Tokens a second of each way."""
    out: dict[str, dict[str, float]] = {}
    for kind in sorted({chunk.category for chunk in found.chunks}):
        at = _of_kind(found, kind)
        out[kind] = {}
        for way in found.ways:
            rates = found.tokens(way.name)[:, at].sum(1) / found.seconds(way.name)[:, at].sum(1)
            out[kind][way.name] = float(sorted(rates)[len(rates) // 2])
    return out


def tau_by_category(found: Measured, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of the ways that draft."""
    return {
        kind: {name: stats_of(found.every(name, _of_kind(found, kind))).tau for name in names}
        for kind in sorted({chunk.category for chunk in found.chunks})
    }


def fixed_acceptance(way: Way, chunks: Sequence[Chunk], seed: int) -> dict[str, Any]:
    """Acceptance of a way whose every round drafts as many tokens: under "auto" a round without drafts counts too."""
    return _accepted(_all(stats_of([way.run(chunk.prompts, seed + i).counts() for i, chunk in enumerate(chunks)])))


def shaded_sample(tokenizer: Any, answer: list[int], record: Sequence[Verification]) -> list[dict[str, Any]]:
    """The tokens of each verification as text, with who proposed them: for the report."""
    out, at = [], 0
    for verification in record:
        pieces = [
            tokenizer.decode(answer[: i + 1])[len(tokenizer.decode(answer[:i])) :]
            for i in range(at, at + verification.emitted)
        ]
        out.append(
            {
                "text": "".join(pieces),
                "tokens": pieces,
                "accepted": verification.accepted,
                "sources": verification.sources,
            }
        )
        at += verification.emitted
    return out


@torch.no_grad()
def samples(mtp: MTPModel, found: Measured, name: str, tokenizer: Any) -> list[dict[str, Any]]:
    """The answers of the least, the median and the highest tau of a way; with the target's own chance of each token."""
    answers = [
        (prompt, tokens, [Verification(*v) for v in record])
        for chunk, kept in zip(found.chunks, found.first(name), strict=True)
        for prompt, tokens, record in zip(chunk.prompts, kept["tokens"], kept["records"], strict=True)
    ]
    answers.sort(key=lambda one: len(one[1]) / len(one[2]))
    shown = []
    for at in sorted({0, len(answers) // 2, len(answers) - 1}):
        prompt, tokens, record = answers[at]
        ids_T = torch.tensor([*prompt, *tokens], device=mtp.device)
        logits_TV = mtp.model(ids_T[None]).logits[0, len(prompt) - 1 : -1].float()
        chances = logits_TV.softmax(-1).gather(1, ids_T[len(prompt) :, None])[:, 0].tolist()
        text = tokenizer.decode(prompt, skip_special_tokens=True)
        text = text if len(text) <= SHOWN else f"... {text[-SHOWN:]}"
        verifications = shaded_sample(tokenizer, tokens, record)
        for one in verifications:
            one["chances"], chances = chances[: len(one["tokens"])], chances[len(one["tokens"]) :]
        shown.append({"prompt": text, "way": name, "verifications": verifications})
    return shown
