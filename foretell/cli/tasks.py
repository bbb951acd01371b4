"""foretell evaluate --tasks: tasks of lm-evaluation-harness by several policies, beside transformers' own texts."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foretell.cli.loading import KEPT, about_run, load_target
from foretell.runtime import write_json_atomic


def how_of(name: str, num_draft_tokens: str) -> dict[str, Any]:
    """Arguments of MTPModel.generate of POLICY, static_k:K, confadapt:THRESHOLD.

    Raises ValueError for another policy or number.
    """
    from foretell.decoding.policies import SPANS, check_policy

    policy, colon, number = name.partition(":")
    check_policy(policy)
    length: int | str | None = "auto" if num_draft_tokens == "auto" else int(num_draft_tokens)
    how: dict[str, Any] = {"policy": policy, "num_draft_tokens": length}
    if policy in SPANS and length == "auto":
        how["num_draft_tokens"] = None  # under "auto" a clock would have a say in unverified text
    wanted = {"static_k": "static_k:K, a whole number", "confadapt": "confadapt:THRESHOLD, a number in (0, 1]"}
    try:
        if colon and policy == "static_k":
            how["num_draft_tokens"] = int(number)
        elif colon and policy == "confadapt":
            how["confidence_threshold"] = float(number)
        elif colon:
            raise ValueError
    except ValueError:
        raise ValueError(f"policies: got {name!r}, wanted {wanted.get(policy, policy)}.") from None
    return how


def main(settings: Any, argv: Sequence[str]) -> int:
    """Every way scores every task; 1 where a lossless one in fp32 gave another answer than transformers."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("tasks: wanted lm-evaluation-harness, which is not installed: pip install 'foretell[eval]'.")
    hows = {name: how_of(name, settings.num_draft_tokens) for name in settings.policies}
    from foretell.decoding.stats import GenerationStats
    from foretell.evaluation import harness
    from foretell.evaluation.evaluate import SCHEMA
    from foretell.evaluation.measure import Kept, digest, tensors_digest
    from foretell.types import Verification

    tasks = harness.load_harness_tasks(settings.tasks or [])
    model, tokenizer = load_target(settings.model, settings.dtype)
    common = {"tokenizer": tokenizer, "batch_size": settings.batch_size}
    ours = harness.ForetellLM(model, module=settings.module, drafter=settings.drafter, **common)
    for how in hows.values():  # what does not fit is said before any work
        ours.choose(**how, drafter=settings.drafter)
    identity = {
        "model": tensors_digest(dict(model.state_dict())),
        "module": tensors_digest(dict(ours.mtp.module.state_dict())) if ours.trained else None,
        "tasks": digest([task if isinstance(task, str) else repr(sorted(task.items())) for task in tasks[1]]),
        "limit": settings.limit,
    }
    result = about_run(settings, ours.mtp, "evaluate", argv) | {"schema": SCHEMA + "/tasks", "identity": identity}
    key = identity | {"how": settings.num_draft_tokens, "drafter": settings.drafter, "batch_size": settings.batch_size}
    done: dict[str, dict[str, Any]] = {}
    kept = Kept(Path(settings.output + KEPT), key | {"seed": settings.seed})
    with kept:
        done |= {line["way"]: line for line in kept.lines}
        for name in [*(["transformers"] if settings.transformers else []), *hows]:
            if name in done:
                continue
            lm: Any = ours
            if name == "transformers":
                lm = harness.HFLM(model, **common)
            else:
                ours.choose(**hows[name], drafter=settings.drafter)
            start = time.perf_counter()
            line = harness.run_tasks(lm, tasks, settings.limit, settings.seed)
            line |= {"way": name, "seconds": time.perf_counter() - start, "records": []}
            if lm is ours:
                line["records"] = [
                    [[v.drafted, v.depth, v.accepted, v.emitted, []] for v in record] for record in ours.records
                ]
            kept.add(line)
            done[name] = line
    names = [name for name in ("transformers", *hows) if name in done]
    base, ways = done[names[0]], []
    for name in names:
        line, lossless = done[name], name == "transformers" or hows[name]["policy"] == "lossless"
        records = [[Verification(*v) for v in record] for record in line["records"]]
        stats = GenerationStats(name, lossless, records)
        ways.append(
            {
                "name": name,
                "lossless": lossless,
                "seconds": line["seconds"],
                "scores": {
                    task: {
                        metric: harness.with_interval(score, None if line is base else base["scores"][task][metric])
                        for metric, score in metrics.items()
                    }
                    for task, metrics in line["scores"].items()
                },
                "tokens_per_forward": harness.tokens_per_forward(records),
                "accept_given": stats.accept_given,
                "answers": harness.same_answers(line["texts"], base["texts"]),
            }
        )
    result |= {"batch_size": settings.batch_size, "limit": settings.limit, "base": names[0], "ways": ways}
    exact = result["dtype"] == "float32"
    wrong = [w["name"] for w in ways if w["lossless"] and w["answers"]["equal"] < w["answers"]["documents"]]
    result["tokens_equal"] = not (exact and wrong)
    write_json_atomic(settings.output, result)
    kept.remove()
    print(page(result))
    return 0 if result["tokens_equal"] else 1


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['model']}, {result['dtype']}, batch {result['batch_size']}; 95 % intervals over documents"]
    for task in result["ways"][0]["scores"]:
        for metric in result["ways"][0]["scores"][task]:
            heads = (f"{task} {metric}", "score", "95 %", f"less {result['base']}", "tokens/forward", "alike")
            lines += ["", "{:<34}{:>8}{:>18}{:>24}{:>24}{:>12}".format(*heads)]
            for way in result["ways"]:
                score, pace, alike = way["scores"][task][metric], way["tokens_per_forward"], way["answers"]
                cells = [way["name"] + ("" if way["lossless"] else " (lossy)"), f"{score['value']:.4f}"]
                cells.append(_interval(score))
                moved = score.get("difference")
                cells.append(f"{moved['value']:+.4f} {_interval(moved, '+')}" if moved else "")
                cells.append(f"{pace['value']:.2f} {_interval(pace)}" if pace else "")
                cells.append(f"{alike['equal']}/{alike['documents']}")
                lines.append("{:<34}{:>8}{:>18}{:>24}{:>24}{:>12}".format(*cells))
    if not result["tokens_equal"]:
        lossless = [way for way in result["ways"] if way["lossless"]]
        way = next(way for way in lossless if way["answers"]["first_difference"])
        at = way["answers"]["first_difference"]
        lines.append(f"\nNOT LOSSLESS: {way['name']}, {at['task']}, document {at['document']}")
    return "\n".join(lines)


def _interval(of: dict[str, Any], sign: str = "") -> str:
    return "" if of["low"] is None else f"{of['low']:{sign}.3f} to {of['high']:{sign}.3f}"
