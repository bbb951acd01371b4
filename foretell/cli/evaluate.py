"""foretell evaluate, sweep, compare, report: acceptance and speed, measured, searched, compared and shown."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretell.cli.loading import KEPT, WorkloadSettings, about_run, load_target
from foretell.config import parse
from foretell.runtime import write_json_atomic

if TYPE_CHECKING:
    from foretell.evaluation.measure import Kept, Measured, Way


@dataclass(kw_only=True)
class MeasureSettings(WorkloadSettings):
    """What evaluate and sweep are told alike."""

    output: str = field(metadata={"help": "Where the numbers go, as JSON."})
    drafter: str | None = field(default=None, metadata={"help": "mtp, lookup, or mtp+lookup (default with a module)."})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy."})
    thinking: bool | None = field(
        default=None, metadata={"help": "enable_thinking of the chat template, if it has it."}
    )
    repeats: int = field(default=5, metadata={"help": "Times that each way decodes each prompt, at most."})
    precision: float = field(
        default=0.03, metadata={"help": "Stop from 3 repeats on, where all ratios are known to that (95 %)."}
    )
    minutes: float | None = field(default=None, metadata={"help": "Begin no repeat that would end behind that."})

    def problems(self) -> list[str]:
        """See config.check."""
        found = super().problems()
        if not 0 <= self.temperature < math.inf:
            found.append(f"temperature: got {self.temperature}, wanted 0 (greedy) or more.")
        if not 0 < self.precision < 1:
            found.append(f"precision: got {self.precision}, wanted a share between 0 and 1, such as 0.03.")
        if self.minutes is not None and not self.minutes >= 0:
            found.append(f"minutes: got {self.minutes}, wanted at least 0, or null for no limit.")
        if self.drafter not in (None, "mtp", "lookup", "mtp+lookup"):
            found.append(f"drafter: got {self.drafter!r}, wanted mtp, lookup or mtp+lookup.")
        if os.path.isdir(self.output):
            found.append(f"output: got {self.output}, which is a folder; wanted a file's name, such as run.json.")
        return found


NOT_OF_TASKS = ("temperature", "max_new_tokens", "repeats", "precision", "minutes", "thinking")


@dataclass(kw_only=True)
class EvaluateSettings(MeasureSettings):
    """Flags of `foretell evaluate`."""

    prompts: list[str] | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "As foretell verify's; speed and acceptance."}
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "lm-evaluation-harness's tasks, by name or YAML file, instead: scores."}
    )
    policies: list[str] = field(
        default_factory=lambda: ["lossless"],
        metadata={"help": "Of the tasks: lossless, typical, static_k:K, confadapt:THRESHOLD, each scored."},
    )
    num_draft_tokens: str = field(default="auto", metadata={"help": "Drafts a verification, or auto."})
    batch_size: int = field(default=1, metadata={"help": "Prompts that are decoded at once."})
    transformers: bool = field(default=True, metadata={"help": "Measure transformers' own generate too."})

    def problems(self) -> list[str]:
        """See config.check."""
        wrong = self.num_draft_tokens != "auto" and not (self.num_draft_tokens.isdigit() and int(self.num_draft_tokens))
        mine = (
            [f"num_draft_tokens: got {self.num_draft_tokens!r}, wanted a number from 1 on, or auto."] if wrong else []
        )
        if bool(self.prompts) == bool(self.tasks):
            mine.append(f"prompts, tasks: got {'both' if self.tasks else 'neither'}, wanted one of them.")
        if not self.tasks and self.policies != ["lossless"]:
            mine.append(f"policies: got {self.policies} without tasks, which alone are scored by them.")
        for one in fields(self) if self.tasks else ():
            asked = getattr(self, one.name)
            if one.name in NOT_OF_TASKS and asked != one.default:
                mine.append(f"{one.name}: got {asked} beside tasks, which say themselves how they are answered.")
        if self.tasks and (not self.policies or len(set(self.policies)) < len(self.policies)):
            mine.append(f"policies: got {self.policies}, wanted at least one, each once.")
        return super().problems() + mine


@dataclass(kw_only=True)
class SweepSettings(MeasureSettings):
    """Flags of `foretell sweep`."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 4], metadata={"help": "Prompts at once, each measured."})
    lengths: list[int] | None = field(
        default=None, metadata={"help": "Drafts a verification, each measured beside auto; 1 to 4 and 8 if not given."}
    )


class Session:
    """A model with its module and the prompts, as evaluate and sweep measure them."""

    def __init__(self, settings: MeasureSettings, batch_size: int) -> None:
        from foretell.evaluation.evaluate import conversations
        from foretell.evaluation.workloads import load_tasks
        from foretell.mtp import load_with_module

        self.settings = settings
        tasks = load_tasks(settings.prompts, settings.limit)
        model, self.tokenizer = load_target(settings.model, settings.dtype)
        self.mtp, self.trained = load_with_module(model, settings.module)
        self.drafter = settings.drafter or ("mtp+lookup" if self.trained else "lookup")
        if not self.trained and "mtp" in self.drafter:
            raise ValueError(f"drafter: got {self.drafter!r}, which needs a trained module: --module FOLDER.")
        template = {} if settings.thinking is None else {"enable_thinking": settings.thinking}
        self.named = conversations(self.mtp, tasks, self.tokenizer, settings.max_new_tokens, batch_size, **template)
        self.common: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "do_sample": settings.temperature > 0}
        if settings.temperature > 0:
            self.common["temperature"] = settings.temperature

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What two runs must share to be compared, or differ in by name."""
        from foretell.evaluation.measure import digest, tensors_digest

        return {
            "prompts": digest([(name, ids) for name, _, ids in self.named]),
            "model": tensors_digest(dict(self.mtp.model.state_dict())),
            "module": tensors_digest(dict(self.mtp.module.state_dict())) if self.trained else None,
            "max_new_tokens": self.settings.max_new_tokens,
            "temperature": self.settings.temperature,
        }

    def off(self) -> Way:
        from foretell.evaluation.measure import foretell_way

        return foretell_way(self.mtp, "off", "foretell, drafting off", num_draft_tokens=0, **self.common)

    def drafted(self, name: str, length: int | str) -> Way:
        from foretell.evaluation.measure import foretell_way

        labels = {"mtp": "MTP module", "lookup": "prompt lookup", "mtp+lookup": "MTP module + prompt lookup"}
        label = labels[self.drafter] + ("" if length == "auto" else f", {length} drafts")
        return foretell_way(self.mtp, name, label, num_draft_tokens=length, drafter=self.drafter, **self.common)

    def measure(self, ways: list[Way], batch_size: int, part: str, minutes: float | None) -> tuple[Measured, Kept]:
        """All rounds, and where they are kept until the result is written."""
        from foretell.evaluation.measure import Kept, chunks_of, measure

        settings = self.settings
        key = self.identity | {"ways": [way.label for way in ways], "batch_size": batch_size, "seed": settings.seed}
        kept, chunks = Kept(Path(f"{settings.output}{part}{KEPT}"), key), chunks_of(self.named, batch_size)
        found = measure(
            ways, chunks, "off", kept, repeats=settings.repeats, precision=settings.precision, seed=settings.seed,
            seconds=math.inf if minutes is None else 60 * minutes,
        )  # fmt: skip
        reached = found.precision("off") if found.repeats > 1 else math.inf
        if reached > settings.precision:
            known = "unknown" if math.isinf(reached) else f"{reached:.3f}"
            ended = "--repeats" if found.repeats >= settings.repeats else "--minutes"
            said = f"precision: got {known} after {found.repeats} repeats (batch {batch_size}), wanted "
            said += f"{settings.precision}; give more {ended}. Intervals say what is known."
            print(said, file=sys.stderr)
        return found, kept

    def start(self, verb: str, argv: Sequence[str]) -> dict[str, Any]:
        return about_run(self.settings, self.mtp, verb, argv) | {"drafter": self.drafter, "identity": self.identity}


def main(argv: Sequence[str]) -> int:
    """foretell evaluate; 0, or 1 where a greedy token differed."""
    settings = parse(EvaluateSettings, argv, prog="foretell evaluate")
    if settings.tasks:
        from foretell.cli import tasks

        return tasks.main(settings, argv)
    from foretell.evaluation import evaluate as numbers
    from foretell.evaluation.measure import stats_of, transformers_way

    session = Session(settings, settings.batch_size)
    mtp, result = session.mtp, session.start("evaluate", argv) | {"schema": numbers.SCHEMA}
    length = settings.num_draft_tokens if settings.num_draft_tokens == "auto" else int(settings.num_draft_tokens)
    name = {"mtp": "mtp", "lookup": "lookup", "mtp+lookup": "both"}[session.drafter]
    ways = [transformers_way(mtp, **session.common)] if settings.transformers else []
    ways += [session.off(), session.drafted(name, length)]
    found, kept = session.measure(ways, settings.batch_size, "", settings.minutes)
    result |= {"batch_size": settings.batch_size, "num_draft_tokens": length, "repeats": found.repeats}
    result |= numbers.summary(mtp, found, "off")
    result["tau_by_category"] = numbers.tau_by_category(found, [name])
    result["acceptance"] = {
        way["name"]: {k: way[k] for k in ("accept_at", "accept_given")} for way in result["ways"] if way["name"] == name
    }
    result["acceptance_by"] = numbers.acceptance(found, [name])
    result["elsewhere"] = numbers.elsewhere(stats_of(found.every(name)))
    if length == "auto":
        fixed = min(3, mtp.module.longest_draft) if "mtp" in session.drafter else 3
        every = numbers.fixed_acceptance(session.drafted(name, fixed), found.chunks, settings.seed)
        result["fixed"] = {"drafts": fixed} | every
        result["ways"][-1] |= {"tau_fixed": result["fixed"]["tau"], "fixed": fixed}
    if settings.temperature == 0:
        result["equality"] = numbers.equality(mtp, found, ways[0].name)
        result["tokens_equal"] = result["equality"]["faults"] == 0
        result["ways"] = [{**w, "equal": w["name"] not in result["equality"]["unequal"]} for w in result["ways"]]
    curve = mtp.cost_curve()
    result["cost_curve"] = [{"rows": r, "ms": 1000 * s} for r, s in zip(curve.rows, curve.seconds, strict=True)]
    if result.get("tokens_equal", True):
        result |= {"best": name, "tau": result["ways"][-1]["tau"]}
        result["speedup_vs_off"] = result["ways"][-1]["times_off"]["ratio"]
        if settings.transformers:
            result["speedup_vs_transformers"] = found.ratio(name, "transformers")["ratio"]
    else:  # another text is not faster, it is another text
        result = _without_speed(result)
    result["chunks"] = [
        {
            "names": chunk.names,
            "category": chunk.category,
            "seconds": {way.name: found.seconds(way.name)[:, i].tolist() for way in ways},
            "tokens": {way.name: int(found.tokens(way.name)[0, i]) for way in ways},
            "rounds": [sum(map(len, one["records"])) for one in found.every(name, [i])],
            "answers": found.first(name)[i]["tokens"],
            "records": found.first(name)[i]["records"],
        }
        for i, chunk in enumerate(found.chunks)
    ]
    result["samples"] = numbers.samples(mtp, found, name, session.tokenizer)
    write_json_atomic(settings.output, result)
    kept.remove()
    print(page(result))
    return 0 if result.get("tokens_equal", True) else 1


def _without_speed(result: dict[str, Any]) -> dict[str, Any]:
    speed = ("tokens_per_second", "decode_tokens_per_second", "repeats", "spread", "times_off")
    ways = [{k: v for k, v in way.items() if k not in (*speed, "predicted", "seconds")} for way in result["ways"]]
    return {k: v for k, v in result.items() if k not in ("by_category", "intervals_by_category")} | {"ways": ways}


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    what = f"{result['model']}, {result['dtype']}, batch {result['batch_size']}, {result['repeats']} repeats"
    lines = [what, ""]
    equal = result.get("equality")
    if equal:
        lines.append(f"{equal['equal']} of {equal['runs']} answers equal, {equal['near_ties']} near ties")
    if not result.get("tokens_equal", True):
        at = equal["first_difference"]
        lines.append(f"NOT LOSSLESS, so no speed is said: {at['way']}, {at['prompt']}, token {at['position'] + 1}")
        return "\n".join(lines)
    lines.append(f"{'':<30}{'tokens/s':>10}{'times off':>11}{'95 %':>15}{'tau':>7}{'bandwidth':>11}")
    for way in result["ways"]:
        ratio = way["times_off"]
        interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}" if way["name"] != "off" else ""
        share = f"{100 * way['share_of_bandwidth']:.0f} %" if "share_of_bandwidth" in way else ""
        lines.append(
            f"{way['label']:<30}{way['tokens_per_second']:>10.1f}{ratio['ratio']:>11.2f}{interval:>15}"
            f"{way['tau']:>7.2f}{share:>11}"
        )
    last = result["ways"][-1]
    lines += ["", "accept_at " + " ".join(f"{a:.3f}" for a in last["accept_at"])]
    lines.append("accept_given " + " ".join(f"{a:.3f}" for a in last["accept_given"]))
    if "fixed" in result:
        lines.append(f"tau at {result['fixed']['drafts']} drafts every round: {result['fixed']['tau']:.2f}")
    guess = last["predicted"]
    lines.append(
        f"predicted {guess['speedup']:.2f} times off (tau {guess['tau']:.2f}, drafts {guess['draft_cost']:.3f} "
        f"and wider rows {guess['wider_rows']:.3f} forwards), measured {last['times_off']['ratio']:.2f}"
    )
    spent = sum(last["seconds"].values())
    lines.append("time: " + ", ".join(f"{part} {100 * s / spent:.0f} %" for part, s in last["seconds"].items()))
    lines += ["", f"{'category':<20}" + "".join(f"{way['name']:>14}" for way in result["ways"]) + f"{'tau':>8}"]
    for kind, rates in result["by_category"].items():
        tau = result["tau_by_category"][kind][last["name"]]
        lines.append(f"{kind:<20}" + "".join(f"{rates[way['name']]:>14.1f}" for way in result["ways"]) + f"{tau:>8.2f}")
    lines += ["", "what others would call this run:"]
    lines += [f"  {name}: {value:.3f}" for name, value in result["elsewhere"].items()]
    return "\n".join(lines)


# -- sweep -------------------------------------------------------------------------------------------------------------


def sweep(argv: Sequence[str]) -> int:
    """foretell sweep: every length and batch, the choice of auto beside them."""
    settings = parse(SweepSettings, argv, prog="foretell sweep")
    from foretell.evaluation.evaluate import SCHEMA
    from foretell.evaluation.measure import stats_of

    if not settings.batch_sizes or min(settings.batch_sizes) < 1:
        raise ValueError(f"batch_sizes: got {settings.batch_sizes}, wanted numbers from 1 on.")
    session = Session(settings, max(settings.batch_sizes))
    longest = session.mtp.module.longest_draft if session.drafter == "mtp" else 16
    lengths = settings.lengths or [k for k in (1, 2, 3, 4, 8) if k <= longest]
    if min(lengths) < 1 or max(lengths) > longest:
        raise ValueError(f"lengths: got {lengths}, wanted 1 to {longest} (the longest that {session.drafter} drafts).")
    result, unfinished = session.start("sweep", argv) | {"schema": SCHEMA + "/sweep", "batches": []}, []
    for size in settings.batch_sizes:
        ways = [session.off(), *(session.drafted(str(k), k) for k in lengths), session.drafted("auto", "auto")]
        minutes = None if settings.minutes is None else settings.minutes / len(settings.batch_sizes)
        found, kept = session.measure(ways, size, f".{size}", minutes)
        unfinished.append(kept)
        rows = {}
        for way in ways[1:]:
            stats = stats_of(found.every(way.name))
            rounds = [v.drafted for record in stats.records for v in record]
            rows[way.name] = found.ratio(way.name, "off") | {
                "tau": stats.tau, "drafts_a_round": sum(rounds) / len(rounds)
            }  # fmt: skip
        fixed = {k: rows[str(k)]["ratio"] for k in lengths}
        best = max(fixed, key=lambda k: fixed[k])
        result["batches"].append(
            {
                "batch_size": size,
                "off_tokens_per_second": float(sorted(found.rates("off"))[found.repeats // 2]),
                "ways": rows,
                "best_fixed": best if fixed[best] > 1 else 0,
                "stops_paying_at": next((k for k in lengths if fixed[k] < 1), None),
                "auto_against_best": rows["auto"]["ratio"] / max(fixed[best], 1.0),
            }
        )
        write_json_atomic(settings.output, result)
    for kept in unfinished:
        kept.remove()
    print(
        f"{'times drafting off':<20}" + "".join(f"{k:>8}" for k in lengths) + f"{'auto':>8}   auto drafts, best fixed"
    )
    for one in result["batches"]:
        rates = "".join(f"{one['ways'][str(k)]['ratio']:>8.2f}" for k in [*lengths, "auto"])
        chose = f"{one['ways']['auto']['drafts_a_round']:.1f} a round, {one['best_fixed'] or 'off'}"
        print(f"{'batch ' + str(one['batch_size']):<20}{rates}   {chose}")
    return 0


# -- compare and report ------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class CompareSettings:
    """Flags of `foretell compare`."""

    first: str = field(metadata={"help": "A result of foretell evaluate.", "positional": True})
    second: str = field(metadata={"help": "Another one, on the same prompts.", "positional": True})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of lines."})


def compare(argv: Sequence[str]) -> int:
    """foretell compare: what differs between two runs, and whether it is more than noise."""
    settings = parse(CompareSettings, argv, prog="foretell compare")
    from foretell.evaluation.differences import compared, in_words

    runs = [_read(settings.first), _read(settings.second)]
    found = compared(runs[0], runs[1])
    print(json.dumps(found, indent=2) if settings.json else in_words(found, settings.first, settings.second))
    return 0


@dataclass(kw_only=True)
class ReportSettings:
    """Flags of `foretell report`."""

    runs: list[str] = field(
        metadata={"help": "Results of evaluate or sweep, and folders of trainings (their logs).", "positional": True}
    )
    output: str = field(metadata={"help": "The page, self-contained HTML; each picture is a PNG beside it too."})


def report(argv: Sequence[str]) -> int:
    """foretell report: one page of one run or of several."""
    settings = parse(ReportSettings, argv, prog="foretell report")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("report: wanted matplotlib, which draws and is not installed: pip install 'foretell[eval]'.")
    from foretell.evaluation.report import write_report

    first, *others = [_log(path) if Path(path).is_dir() else _read(path, "/sweep", "/tasks") for path in settings.runs]
    print(write_report(first, settings.output, *others, draw=True))
    return 0


def _log(folder: str) -> dict[str, Any]:
    """A training's log, of its newest state."""
    states = sorted(Path(folder).glob("**/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        raise ValueError(f"{folder}: no trainer_state.json in there; wanted a folder of a training that saved.")
    log = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    if not any("eval_tau" in entry for entry in log):
        raise ValueError(f"{folder}: its log tells no tau; wanted a training with evaluation rows (eval_prompts > 0).")
    return {"model": Path(folder).resolve().name, "log": log}


def _read(path: str, *kinds: str) -> dict[str, Any]:
    from foretell.evaluation.evaluate import SCHEMA

    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); wanted a result of foretell evaluate.") from None
    if not isinstance(found, dict) or found.get("schema") not in (SCHEMA, *(SCHEMA + kind for kind in kinds)):
        raise ValueError(f"{path}: wanted a result of foretell evaluate ({SCHEMA}).")
    return found
