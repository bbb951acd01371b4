"""One leaderboard of every method and preset beside lookup, a draft model and economize 0.3.2: one model, one set of
answers of its own, one budget of training seconds each, in which the search for a learning rate counts; then tau, speed
against transformers' generate at batch 1 and 4 (interleaved, tokens checked), by category, parameters and memory.

    bash benchmarks/leaderboard.sh [--minutes 240] [--seeds 1] [--only NAME ...]        # makes economize's environment
    python benchmarks/leaderboard.py --document                                         # docs/leaderboard.md anew

Trainings run in processes of their own; what is done is kept below --work, and the same command goes on from there. On
a CPU a training has one thread and its seconds are that process's own; on a GPU they are wall-clock seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from masked import resident
from quality import HEADS, HELD, kept_answers, train_for

from foretell import MTPModel
from foretell.cli.demo import load_model
from foretell.config import from_dict, parse
from foretell.data.vocabulary import frequent_tokens
from foretell.evaluation import evaluate as numbers
from foretell.evaluation.measure import (
    Answered,
    Kept,
    Way,
    chunks_of,
    digest,
    foretell_way,
    measure,
    transformers_way,
)  # fmt: skip
from foretell.evaluation.workloads import load_tasks
from foretell.methods.base import load_preset
from foretell.mtp import get_mtp_model
from foretell.runtime import provenance, write_json_atomic
from foretell.training.regenerate import eos_ids
from foretell.training.tau import decoded_tau

FROZEN = {"mtp_training_mode": "standalone"}  # a method that would change the target is taken without that
# masks at every token of a large batch make steps of minutes: of a few they are seconds, at the rate of short runs
FEW, SMALL = {"mask_positions": 24}, {"per_device_train_batch_size": 1, "learning_rate": 3e-3}
# name: (preset, settings of the module, arguments of the training); None takes a preset's setting away
ENTRIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "demo": ("demo", {}, {}),
    "demo, depth 3, D-PACE": ("demo", {"depth": 3}, {"mtp_depth_weights": "dpace"}),
    "demo, teacher, e2e_tv": ("demo", {}, {"mtp_supervision": "teacher", "mtp_loss": "e2e_tv"}),
    "eagle3": ("demo", {"hidden_layers": "three", "block": "eagle3"}, {}),
    "fastmtp": ("fastmtp", {}, {}),
    "deepseek, frozen": ("deepseek", {}, FROZEN),
    "medusa": ("medusa", {}, {}),
    "heads, small vocabulary": ("demo", HEADS, {}),
    "heads, bigram": ("demo", HEADS | {"markov_rank": 64}, {}),
    "meta-heads, frozen": ("meta-heads", {}, FROZEN),
    "trl-heads, frozen": ("trl-heads", {}, FROZEN),
    "apple": ("apple", FEW, SMALL),
    "mtp-glora": ("mtp-glora", FEW, SMALL),
    "uno": ("uno", FEW, SMALL),
    "glora-student-forced": ("glora-student-forced", FEW, SMALL),
}
PEERS = {"eagle3": 1e-3, "mtp": 1e-3, "medusa": 1e-3}  # economize's, and the middle of their search
RATES = (0.3, 1.0, 3.0)  # times a preset's learning rate: the search
LEAST_RATE = 3e-4  # the middle of a search is no lower: published rates of long runs teach nothing in minutes
SEARCH = 0.25  # of an entry's seconds, all rates together
TRAINING = 0.7  # of the minutes, all trainings together
SCHEDULE = ("lr_scheduler_type", "warmup_steps", "max_steps", "gradient_accumulation_steps")  # a clock decides these
DRAFTS, TAU_PROMPTS, TAU_TOKENS = 3, 16, 64  # where tau is told; ours drafts as deep as the module is
CYCLES = [2, 3, 4]  # tokens a cycle of economize: the fastest on a few prompts is what it is timed with


@dataclass(kw_only=True)
class LeaderboardSettings:
    """Flags of benchmarks/leaderboard.py."""

    minutes: float = field(default=240.0, metadata={"help": "All of it: trainings seven tenths, then decoding."})
    model: str | None = field(default=None, metadata={"help": "Target; SmolLM2 without it."})
    answers: list[str] = field(default_factory=list, metadata={"help": "Folders of its answers; else a small one."})
    prompts: list[str] = field(default_factory=lambda: ["demo"], metadata={"help": "As foretell evaluate's."})
    limit: int = field(default=4, metadata={"help": "Prompts of each category; a batch holds those of one."})
    max_new_tokens: int = field(default=96, metadata={"help": "Longest answer, in tokens."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4], metadata={"help": "Prompts at once."})
    repeats: int = field(default=5, metadata={"help": "Of each prompt, at most."})
    seeds: int = field(default=1, metadata={"help": "Trainings of each entry; speed is the first one's."})
    only: list[str] = field(default_factory=list, metadata={"help": "Names of entries; all without it."})
    peer: str | None = field(default=None, metadata={"help": "Python with economize (leaderboard.sh makes it)."})
    draft_model: str | None = field(default=None, metadata={"help": "An independent model that drafts, if there is."})
    threads: int = field(default_factory=torch.get_num_threads, metadata={"help": "Of decoding."})
    output: str = field(default="results/leaderboard.json", metadata={"help": "Where the numbers go."})
    docs: str = field(default="docs/leaderboard.md", metadata={"help": "The table; its plot lies beside it."})
    work: str = field(default="runs/leaderboard", metadata={"help": "What is done so far."})
    document: bool = field(default=False, metadata={"help": "Only write the table of --output anew."})
    job: str | None = field(default=None, metadata={"help": "One training, as JSON: the script starts itself so."})


# -- training ----------------------------------------------------------------------------------------------------------


def settings_of(entry: str, layers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(of the module, of the training) on a target of so many layers."""
    preset, module, training = ENTRIES[entry]
    recipe = load_preset(preset)
    if module.get("method", recipe["module"]["method"]) == recipe["module"]["method"]:
        module = {**recipe["module"], **module}
    else:  # another method: of the preset's module only the vocabulary speaks of it too
        module = {"draft_vocab_size": recipe["module"].get("draft_vocab_size"), **module}
    if module.get("hidden_layers") == "three":
        module["hidden_layers"] = sorted({min(2, layers - 1), layers // 2, max(layers - 3, 1)})
    training = {k: v for k, v in {**recipe["training"], **training}.items() if k not in SCHEDULE}
    return module, training


class Board:
    """The model, its answers, and what is done so far."""

    def __init__(self, settings: LeaderboardSettings) -> None:
        self.settings, self.work = settings, Path(settings.work)
        self.model, self.tokenizer = load_model(settings.model, self.work / "model")
        if torch.cuda.is_available():
            self.model.to("cuda")
        rows = kept_answers(settings, self.model, self.tokenizer)
        held = min(HELD, len(rows) // 5)
        self.held, self.rows = rows[:held], rows[held:]

    def job(self, spec: dict[str, Any]) -> dict[str, Any]:
        """One training, in this process: its module if it shall be kept, and what it was."""
        torch.set_num_threads(1)
        module, training = settings_of(spec["entry"], self.model.config.num_hidden_layers)
        training |= {"learning_rate": spec["lr"], "seed": spec["seed"]}
        mtp = get_mtp_model(self.model, {"method": "sequential", "depth": 1})
        size = module.get("draft_vocab_size") or 1
        ids_M = frequent_tokens(self.rows, size, mtp.target.vocab_size, sorted(eos_ids(mtp, self.tokenizer)))
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident("VmRSS")
        mtp, about = train_for(self.model, module, training, self.rows, spec["seconds"], ids_M)
        on_gpu = torch.cuda.is_available()
        about["memory_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM") - before
        mtp.eval()
        tau = decoded_tau(mtp, self.held, min(TAU_PROMPTS, len(self.held)), TAU_TOKENS)
        if spec["folder"]:
            mtp.save_pretrained(spec["folder"])
        return about | {"tau": tau["tau"]}


class Jobs:
    """Trainings that are done, by what they were asked to be."""

    def __init__(self, settings: LeaderboardSettings) -> None:
        self.settings, self.path = settings, Path(settings.work) / "jobs.json"
        self.done = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def of(self, spec: dict[str, Any], run: Any) -> dict[str, Any]:
        """Its result, made if it is not there; a training that cannot be is a result too: {"error"}."""
        about = [spec, self.settings.model, self.settings.answers]
        key = digest(about)
        if key not in self.done:
            self.done[key] = run(spec)
            write_json_atomic(self.path, self.done)
            print(json.dumps(spec | self.done[key]), flush=True)
        return self.done[key]

    def ours(self, spec: dict[str, Any]) -> dict[str, Any]:
        """In a process of its own, whose memory and seconds are the training's."""
        settings = asdict(self.settings) | {"job": json.dumps(spec)}
        words = [sys.executable, __file__, "--job", json.dumps(settings)]
        made = subprocess.run(words, capture_output=True, text=True, check=False)
        if made.returncode:
            return {"error": made.stderr.strip().splitlines()[-1][:300]}
        return json.loads(made.stdout.strip().splitlines()[-1])


def searched(jobs: Jobs, run: Any, entry: str, rate: float, seconds: float, seeds: int, folder: Path) -> dict[str, Any]:
    """The rate that a quarter of the seconds finds best, then trainings of the rest: tau of each seed, and what the
    first one was. folder: where its module goes.
    """
    spec = {"entry": entry, "seed": 0, "seconds": SEARCH * seconds / len(RATES), "folder": None}
    tried = {rate * times: jobs.of(spec | {"lr": rate * times}, run) for times in RATES}
    whole = {lr: found for lr, found in tried.items() if "tau" in found}
    if not whole:
        return {"error": next(iter(tried.values()))["error"]}
    best = max(whole, key=lambda lr: (whole[lr]["tau"], lr == rate))
    found = []
    for seed in range(seeds):
        last = {
            "lr": best,
            "seed": seed,
            "seconds": (1 - SEARCH) * seconds,
            "folder": str(folder) if not seed else None,
        }
        found.append(jobs.of(spec | last, run))
    if "error" in found[0]:
        return found[0]
    return found[0] | {
        "learning_rate": best,
        "search": {str(lr): one.get("tau") for lr, one in tried.items()},
        "tau_of_seeds": [one["tau"] for one in found if "tau" in one],
        "tokens_a_second": found[0]["answer_tokens"] / found[0]["seconds"],
    }


# -- economize ---------------------------------------------------------------------------------------------------------


@dataclass
class PeerAnswered(Answered):
    """Of economize, whose cycles are no records of ours."""

    cycles: int = 0

    def counts(self) -> dict[str, Any]:
        return super().counts() | {"cycles": self.cycles}


class Peer:
    """economize in its own environment, asked line by line."""

    def __init__(self, board: Board) -> None:
        work, settings = board.work, board.settings
        rows = work / "answers.json"
        rows.write_text(json.dumps([{k: list(row[k]) for k in ("input_ids", "labels")} for row in board.rows]))
        script = Path(__file__).with_name("leaderboard_peer.py")
        self.process = subprocess.Popen(
            [str(settings.peer), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.board, self.held = board, [list(row["input_ids"]) for row in board.held]
        self.prompts = [
            ids[: next(i for i, x in enumerate(r["labels"]) if x >= 0)] for ids, r in zip(self.held, board.held)
        ]
        self.about = self.ask("start", folder=str(settings.model or work / "model"), rows=str(rows))

    def ask(self, what: str, **order: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps({"do": what, **order}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "economize's process has ended: its messages are above"
        answer = json.loads(line)
        if what != "train" and "error" in answer:
            raise RuntimeError(f"economize: {answer['error']}")
        return answer

    def run(self, spec: dict[str, Any]) -> dict[str, Any]:
        """A training, and its tau on the prompts that ours is told on."""
        folder = spec["folder"] or str(self.board.work / "economize-tried")
        technique = spec["entry"].removeprefix("economize ")
        given = {"lr": spec["lr"], "budget": spec["seconds"], "seed": spec["seed"], "folder": folder}
        about = self.ask("train", technique=technique, **given)
        if "error" in about:
            return about
        return about | {"tau": self.load(technique, folder, TAU_PROMPTS, [1 + DRAFTS])["tau"]}

    def load(self, name: str, folder: str, prompts: int, cycles: list[int]) -> dict[str, Any]:
        """cycles: tokens a cycle, of which the fastest on these prompts stays."""
        threads = self.board.settings.threads
        given = {"prompts": self.prompts[:prompts], "tokens": TAU_TOKENS, "threads": threads, "cycles": cycles}
        return self.ask("load", name=name, folder=folder, **given)

    def cycle(self, name: str, folder: str) -> Callable[[Any], dict[str, Any]]:
        """Finds its fastest, as a job: a clock decides, and who goes on must not decide again."""
        return lambda _: {"cycle": self.load(name, folder, 4, CYCLES)["cycle"]}

    def way(self, name: str, tokens: int) -> Way:
        def run(prompts: list[list[int]], seed: int) -> Answered:
            made = self.ask("decode", name=name, prompts=prompts, tokens=tokens)
            return PeerAnswered(made["seconds"], made["tokens"], None, made["cycles"])

        return Way(f"economize {name}", f"economize {name}", run)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# -- the board ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Train every entry, decode with each in turn, write what was found."""
    if sys.argv[1:2] == ["--job"]:
        settings = from_dict(LeaderboardSettings, json.loads(sys.argv[2]))
        print(json.dumps(Board(settings).job(json.loads(settings.job))))
        return
    settings = parse(LeaderboardSettings, prog="benchmarks/leaderboard.py")
    unknown = [n for n in settings.only if n not in ENTRIES and n.removeprefix("economize ") not in PEERS]
    if unknown:
        raise SystemExit(f"only: got {unknown}, wanted names of {[*ENTRIES, *(f'economize {n}' for n in PEERS)]}")
    if settings.limit < max(settings.batch_sizes):
        raise SystemExit(
            f"limit: got {settings.limit}, wanted {max(settings.batch_sizes)} at least: a batch is of one category."
        )
    if not settings.document:
        write_json_atomic(settings.output, measured(settings))
    document(json.loads(Path(settings.output).read_text()), Path(settings.docs))


def measured(settings: LeaderboardSettings) -> dict[str, Any]:
    """The whole run."""
    board, jobs = Board(settings), Jobs(settings)
    peer = Peer(board) if settings.peer else None
    wanted = [name for name in ENTRIES if not settings.only or name in settings.only]
    theirs = [n for n in PEERS if peer and (not settings.only or f"economize {n}" in settings.only)]
    runs = (len(wanted) + len(theirs)) * (SEARCH + (1 - SEARCH) * settings.seeds)
    seconds = round(60 * settings.minutes * TRAINING / max(runs, 1), 3)  # finds what was done, whatever was rounded
    entries: dict[str, dict[str, Any]] = {}
    for name in wanted:
        rate = max(float(settings_of(name, 30)[1].get("learning_rate", 1e-3)), LEAST_RATE)
        folder = board.work / "modules" / name.replace(", ", "-").replace(" ", "-")
        entries[name] = searched(jobs, jobs.ours, name, rate, seconds, settings.seeds, folder) | {"folder": str(folder)}
    for name in theirs:
        folder = board.work / "modules" / f"economize-{name}"
        full = f"economize {name}"
        entries[full] = searched(jobs, peer.run, full, PEERS[name], seconds, settings.seeds, folder)
        if "error" not in entries[full]:
            spec = {"cycle of": full, "trained": digest(entries[full]), "of": CYCLES}
            entries[full]["cycle"] = jobs.of(spec, peer.cycle(name, str(folder)))["cycle"]
            peer.load(name, str(folder), 1, [entries[full]["cycle"]])
    torch.set_num_threads(settings.threads)
    result = {
        "settings": {
            k: v
            for k, v in asdict(settings).items()
            if k not in ("model", "answers", "peer", "job", "work", "document")
        },
        "model": Path(settings.model or "SmolLM2-135M-Instruct").name,
        "answers": {"rows": len(board.rows), "tokens": sum(sum(x >= 0 for x in r["labels"]) for r in board.rows)},
        "seconds_each": seconds,
        "economize": peer.about if peer else None,
        "provenance": provenance(),
        "entries": entries,
        "batches": [],
    }
    left = 60 * settings.minutes * (1 - TRAINING) / len(settings.batch_sizes)
    for size in settings.batch_sizes:
        result["batches"].append(decoded(board, entries, peer, size, left))
    if peer:
        peer.close()
    return result | {"against_economize": against(result)}


def decoded(board: Board, entries: dict[str, Any], peer: Peer | None, size: int, seconds: float) -> dict[str, Any]:
    """Every way on every prompt at one batch size."""
    settings, common = board.settings, {"max_new_tokens": board.settings.max_new_tokens, "do_sample": False}
    plain = get_mtp_model(board.model, {"method": "sequential", "depth": 1})
    named = numbers.conversations(
        plain, load_tasks(settings.prompts, settings.limit), board.tokenizer, settings.max_new_tokens, 1
    )
    ways = [transformers_way(plain, **common)]
    ways.append(foretell_way(plain, "off", "drafting off", num_draft_tokens=0, **common))
    ways.append(foretell_way(plain, "lookup", "prompt lookup", num_draft_tokens="auto", drafter="lookup", **common))
    if settings.draft_model and size == 1:
        assistant = load_model(settings.draft_model, board.work / "draft")[0].to(plain.device)
        way = transformers_way(plain, assistant_model=assistant, **common)
        ways.append(Way("draft model", "an independent draft model", way.run))
    for name, found in entries.items():
        if "error" in found:
            continue
        if name.startswith("economize "):
            ways.append(peer.way(name.removeprefix("economize "), settings.max_new_tokens))
            continue
        mtp = MTPModel.from_pretrained(board.model, found["folder"]).eval()
        how = {"num_draft_tokens": "auto", **common}
        ways.append(foretell_way(mtp, name, name, drafter="mtp", **how))
        ways.append(foretell_way(mtp, f"{name} + lookup", f"{name} + lookup", drafter="mtp+lookup", **how))
    chunks = chunks_of(named, size)
    key = {"ways": [way.name for way in ways], "prompts": digest(named), "trained": digest(entries)}
    kept = Kept(board.work / f"rounds.{size}.jsonl", key)
    found = measure(
        ways, chunks, "transformers", kept, repeats=settings.repeats, precision=0.02, seconds=seconds
    )  # fmt: skip
    equal = numbers.equality(plain, found, "transformers")
    kinds = sorted({chunk.category for chunk in chunks})
    of_kind = {kind: [i for i, chunk in enumerate(chunks) if chunk.category == kind] for kind in kinds}
    rows = []
    for way in ways:
        row = {"name": way.name, "equal": way.name not in equal["unequal"]}
        if row["equal"]:  # another text is not faster
            row["times_transformers"] = found.ratio(way.name, "transformers")
            row["by_category"] = {
                kind: found.ratio(way.name, "transformers", at)["ratio"] for kind, at in of_kind.items()
            }
            kept_ = found.every(way.name)
            rounds = sum(one["cycles"] if "cycles" in one else sum(map(len, one.get("records", []))) for one in kept_)
            row["tau"] = found.tokens(way.name).sum() / rounds if rounds else 1.0
        rows.append(row)
    rows.sort(key=lambda row: -row["times_transformers"]["ratio"] if row["equal"] else 0.0)
    equal = {k: v for k, v in equal.items() if k != "first_difference"}
    return {"batch_size": size, "repeats": found.repeats, "prompts": len(named), "equality": equal, "ways": rows}


def against(result: dict[str, Any]) -> dict[str, Any] | None:
    """Ours over economize's best: speed-ups over transformers' generate at batch 1, and training tokens a second."""
    first = result["batches"][0]["ways"]
    split: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for row in first:
        if row["equal"] and row["name"] not in ("transformers", "off", "lookup", "draft model"):
            split[row["name"].startswith("economize ")].append(row)
    pace = {True: [], False: []}  # type: dict[bool, list[float]]
    for name, found in result["entries"].items():
        if "error" not in found:
            pace[name.startswith("economize ")].append(found["tokens_a_second"])
    if not (split[True] and split[False]):
        return None
    best = {theirs: max(rows, key=lambda row: row["times_transformers"]["ratio"]) for theirs, rows in split.items()}
    ratio = [best[theirs]["times_transformers"]["ratio"] for theirs in (False, True)]
    return {
        "ours": best[False]["name"], "theirs": best[True]["name"],
        "speedups": ratio, "times_faster": ratio[0] / ratio[1],
        "training_tokens_a_second": [max(pace[False]), max(pace[True])],
        "times_faster_training": max(pace[False]) / max(pace[True]),
    }  # fmt: skip


# -- the document ------------------------------------------------------------------------------------------------------

LIMITS = """## What this does not say

- A target of this size reads its weights in milliseconds: a draft costs a larger share of a forward than beside a large
  model, so small modules, small vocabularies and lookup look better here than they would there.
- Minutes of training on few answers favour what starts near something useful and learns fast. Published results come
  from thousands of times the data; their order there need not be this one.
- Rates were searched among three values around each preset's own. A method that needs another setting may do better.
- tau is told on held-out answers of the kinds of prompts that were learned; categories are those of the prompt set.
- uno reads its masks in a forward of its own (layout `two_pass`), whose own next token is its first draft: each of its
  verifications costs two forwards, and its tau begins at 2.
- Intervals are over prompts and repeats of one trained module. Where only one seed was trained, another module of the
  same recipe may lie outside.
"""


def document(result: dict[str, Any], path: Path) -> None:
    """The table, in words of its own, and its plot beside it."""
    first = result["batches"][0]
    lines = [
        "# Leaderboard", "",
        f"Written by `benchmarks/leaderboard.py` from its numbers; target {result['model']}, "
        f"{result['answers']['rows']:,} answers of its own ({result['answers']['tokens']:,} tokens), "
        f"{result['seconds_each']:.0f} seconds of training for each entry, the search for its learning rate included. "
        f"Speed is against transformers' `generate` on {first['prompts']} prompts, decoded in turn with every other "
        f"way in {result['settings']['threads']} thread(s), with 95 % intervals; each answer was compared with "
        "transformers' own.", "",
        f"![speed against transformers]({path.stem}.svg)", "",
    ]  # fmt: skip
    for batch in result["batches"]:
        lines += [f"## Batch {batch['batch_size']}", "", f"Repeats: {batch['repeats']}.", ""]
        lines += ["| way | times transformers | 95 % | tau | rank |", "|---|---|---|---|---|"]
        lines += [_row(row, ranks(batch["ways"])) for row in batch["ways"]]
        lines += [
            "",
            "Ranks are those that the intervals allow: ways that share one cannot be told apart from it here.",
            "",
        ]
    lines += [
        "## Training",
        "",
        "| entry | learning rate | tau | parameters | memory, MB | tokens a second |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in result["entries"].items():
        if "error" in found:
            lines.append(f"| {name} | not trained: {found['error']} | | | | |")
            continue
        taus = found["tau_of_seeds"]
        spread = f" ({min(taus):.2f} to {max(taus):.2f}, {len(taus)} seeds)" if len(taus) > 1 else ""
        lines.append(
            f"| {name} | {found['learning_rate']:.1e} | {sum(taus) / len(taus):.3f}{spread} | "
            f"{found['parameters']:,} | {found['memory_bytes'] / 1e6:,.0f} | {found['tokens_a_second']:,.0f} |"
        )
    kinds = list(next(row for row in first["ways"] if row["equal"])["by_category"])
    lines += ["", "## By category, batch 1", "", "| way | " + " | ".join(kinds) + " |", "|---" * (1 + len(kinds)) + "|"]
    for row in first["ways"]:
        if row["equal"]:
            lines.append(f"| {row['name']} | " + " | ".join(f"{row['by_category'][kind]:.2f}" for kind in kinds) + " |")
    other = result.get("against_economize")
    if other:
        ours, theirs = other["speedups"]
        read, they_read = other["training_tokens_a_second"]
        lines += ["", "## Beside economize 0.3.2", "", (
            f"Its best here is {other['theirs']} with {theirs:.2f} times transformers; ours {other['ours']} with "
            f"{ours:.2f}: {other['times_faster']:.2f} times as much. Training read {read:,.0f} answer tokens a second "
            f"at most, its {they_read:,.0f}: {other['times_faster_training']:.1f} times as many. Same answers, seconds "
            "and prompts, one run."
        )]  # fmt: skip
    missing = [name for name in ENTRIES if name not in result["entries"]]
    lines += ["", *([f"Not in this run: {', '.join(missing)}.", ""] if missing else []), LIMITS]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    plot(first["ways"], path.with_suffix(".svg"))


def ranks(ways: list[dict[str, Any]]) -> dict[str, str]:
    """From how many are surely faster, to how many may be."""
    found, known = {}, [row for row in ways if row["equal"]]
    for row in known:
        mine = row["times_transformers"]
        above = sum(o["times_transformers"]["low"] > mine["high"] for o in known)
        below = sum(o["times_transformers"]["high"] < mine["low"] for o in known)
        last = len(known) - below
        found[row["name"]] = f"{above + 1}" if above + 1 == last else f"{above + 1} to {last}"
    return found


def _row(row: dict[str, Any], rank: dict[str, str]) -> str:
    if not row["equal"]:
        return f"| {row['name']} | other tokens, so no speed | | | |"
    ratio = row["times_transformers"]
    cells = [row["name"], f"{ratio['ratio']:.2f}", f"{ratio['low']:.2f} to {ratio['high']:.2f}", f"{row['tau']:.2f}"]
    return f"| {' | '.join([*cells, rank[row['name']]])} |"


def plot(ways: list[dict[str, Any]], path: Path) -> None:
    """Bars with intervals, best first."""
    from foretell.evaluation.pictures import speeds

    known = [w for w in ways if w["equal"]]
    rows = [{"name": w["name"], "label": w["name"], "times_off": w["times_transformers"]} for w in known]
    speeds(rows, "times transformers' generate, with 95 % intervals").save(path)


if __name__ == "__main__":
    main()
