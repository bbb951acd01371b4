"""GRPO with SmolLM2-135M on two tasks that it can learn: who drafts in its rollouts, and what that is worth.

    python benchmarks/rl.py [--steps 40] [--minutes 40] [--arms off trl ...] [--output results/rl.json]
    python benchmarks/rl.py --memory       # peak memory of two steps of each arm, a process each
    python benchmarks/rl.py --redraw       # the plot of the numbers that are there

Sums (right or wrong) and two sentences with a given word (the word, two sentences): a few prompts that are visited
again and again. All arms have the same seeds and prompts and take turns, a step each, so that other work on the machine
meets them alike; rollouts are timed in CPU seconds of one thread, wall clock beside it. Drafts change nothing drawn,
so arms whose policies learn the same roll out the same texts: `same_as_off` counts the steps with the same reward.
`drift` arms learn at ten times the rate, `cool` ones roll out at temperature 0.7; each is held against its kind's `off`
and `trl`. What further calls measure is put beside what is there. Arms go on from their last checkpoint where there is
one (--save_steps). MALLOC_ARENA_MAX=1 keeps what idle arms hold low.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from datasets import Dataset
from masked import save_figure
from transformers import TrainerCallback

from foretell.cli.demo import load_model
from foretell.config import parse
from foretell.runtime import give_back, provenance, write_json_atomic
from foretell.trl import GRPOConfig, GRPOTrainer

MODULE = "foretell/modules/smollm2-135m-instruct"
LEARNS = {"mtp_module": MODULE, "mtp_drafter": "mtp+history"}
ARMS: dict[str, dict[str, Any]] = {
    "trl": {"mtp_drafter": "none"},
    "off": {"mtp_drafter": "lookup", "num_speculative_tokens": "0"},
    "lookup": {"mtp_drafter": "lookup"},
    "history": {"mtp_drafter": "history"},
    "disabled": {"mtp_module": MODULE},
    "standalone": {"mtp_module": MODULE, "mtp_training_mode": "standalone"},
    "joint": {"mtp_module": MODULE, "mtp_training_mode": "joint"},
    "standalone+history": {**LEARNS, "mtp_training_mode": "standalone"},
}
KINDS = {"drift": ("off", "disabled", "standalone"), "cool": ("trl", "off", "history", "disabled", "standalone")}
ARMS |= {f"{kind} {arm}": ARMS[arm] for kind, arms in KINDS.items() for arm in arms}
for arm in ("drift disabled", "drift standalone"):  # so many whether they pay or not: tau then tells the drafters apart
    ARMS[arm] = {**ARMS[arm], "num_speculative_tokens": "2"}
THINGS = ("the sea", "a cat", "winter", "bread", "a train", "the moon", "a garden", "music", "rain", "a bridge")
WORDS = ("always", "quiet", "small", "because", "under", "old", "bright", "slowly", "never", "green")


@dataclass(kw_only=True)
class RLSettings:
    """Flags of benchmarks/rl.py."""

    model: str | None = field(default=None, metadata={"help": "A chat model's folder; SmolLM2's package without it."})
    steps: int = field(default=40, metadata={"help": "Of each arm."})
    minutes: float = field(default=600.0, metadata={"help": "After which no arm begins another step."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": ", ".join(ARMS)})
    learning_rate: float = field(default=1e-5, metadata={"help": "Of the policies."})
    optim: str = field(default="adafactor", metadata={"help": "Many policies stand side by side in memory."})
    temperature: float = field(default=1.0, metadata={"help": "Of the rollouts; TRL's default."})
    group: int = field(default=4, metadata={"help": "Rollouts of a prompt."})
    prompts: int = field(default=1, metadata={"help": "Prompts of a step, decoded together."})
    rows: int = field(default=10, metadata={"help": "Prompts that there are."})
    new_tokens: int = field(default=64, metadata={"help": "Of each rollout, at most."})
    save_steps: int = field(default=0, metadata={"help": "Checkpoints, to go on from; 0: none."})
    memory: bool = field(default=False, metadata={"help": "Measure peak memory, and nothing else."})
    redraw: bool = field(default=False, metadata={"help": "Draw the plot again, and nothing else."})
    work: str = field(default="runs/rl", metadata={"help": "The model, and checkpoints."})
    output: str = field(default="results/rl.json", metadata={"help": "Where the numbers go."})


def rows(count: int) -> Dataset:
    """Sums and sentences, in turn."""
    drawn, out = random.Random(0), []
    for at in range(count):
        a, b, thing, word = drawn.randint(2, 40), drawn.randint(2, 40), drawn.choice(THINGS), drawn.choice(WORDS)
        asked = f"What is {a} + {b}? Explain it in two sentences."
        if at % 2:
            asked = f'Write two short sentences about {thing} with the word "{word}" in them.'
        about = {"answer": "" if at % 2 else str(a + b), "word": word if at % 2 else ""}
        out.append({"prompt": [{"role": "user", "content": asked}], **about})
    return Dataset.from_list(out)


def right(completions: list, answer: list[str], **_: Any) -> list[float | None]:
    """1 where the sum is said; None for sentences."""
    texts = [one[0]["content"] for one in completions]
    return [float(bool(re.search(rf"\b{a}\b", text))) if a else None for text, a in zip(texts, answer, strict=True)]


def follows(completions: list, word: list[str], **_: Any) -> list[float | None]:
    """Half for the word, half for two whole sentences; None for sums."""
    texts = [one[0]["content"].strip() for one in completions]
    return [
        (0.5 * (w in text.lower()) + 0.5 * (text.endswith(".") and text.count(".") == 2)) if w else None
        for text, w in zip(texts, word, strict=True)
    ]


class Turns:
    """Arms in their threads, one at a time; each has its own state of torch's random numbers."""

    def __init__(self, arms: list[str], minutes: float) -> None:
        self.ring, self.lock = list(arms), threading.Condition()
        self.end = time.monotonic() + 60 * minutes
        self.turn, self.over = self.ring[0], False

    def take(self, arm: str, state: Any = None) -> None:
        """Wait for one's turn."""
        with self.lock:
            self.lock.wait_for(lambda: self.turn == arm)
        if state is not None:
            torch.set_rng_state(state)

    def give(self, arm: str, leave: bool = False) -> None:
        """It is the next one's turn."""
        with self.lock:
            at = self.ring.index(arm)
            if leave:
                self.ring.remove(arm)
            if self.ring:
                self.turn = self.ring[(at if leave else at + 1) % len(self.ring)]
            self.lock.notify_all()


class InTurn(TrainerCallback):
    """A step, and then the others'."""

    def __init__(self, arm: str, turns: Turns, steps: list[dict[str, float]]) -> None:
        self.arm, self.turns, self.steps = arm, turns, steps
        self.taken: list[tuple[float, float, int]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.thread_time(), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **__: Any) -> None:
        cpu, wall = time.thread_time() - self.start[0], time.perf_counter() - self.start[1]
        self.steps.append({"step": state.global_step, "cpu_seconds": cpu, "seconds": wall})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
        if "loss" not in (logs or {}):
            return
        wanted = ("reward", "rewards/", "rollout/", "mtp_loss", "accept_at", "completions/mean_length", "entropy")
        self.steps[-1].update({k: v for k, v in logs.items() if k.startswith(wanted) and v is not None})
        names = ("rollout_cpu_seconds", "rollout_seconds", "rollout_tokens")
        self.steps[-1] |= dict(zip(names, self.taken[-1], strict=True))
        if time.monotonic() > self.turns.end and self.turns.turn == self.turns.ring[-1]:
            self.turns.over = True
        give_back()  # many stand side by side
        kept = torch.get_rng_state()
        self.turns.give(self.arm)
        self.turns.take(self.arm, kept)
        control.should_training_stop |= self.turns.over


def trainer(arm: str, settings: RLSettings, callbacks: list[Any]) -> Any:
    """An arm's, with a policy of its own."""
    model, tokenizer = load_model(settings.model, Path(settings.work) / "model")
    rate = settings.learning_rate * (10 if arm.startswith("drift") else 1)
    args = GRPOConfig(
        output_dir=str(Path(settings.work) / arm.replace(" ", "-")),
        max_steps=settings.steps,
        learning_rate=rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=settings.group,
        num_generations=settings.group,
        gradient_accumulation_steps=settings.prompts,
        optim=settings.optim,
        max_completion_length=settings.new_tokens,
        temperature=0.7 if arm.startswith("cool") else settings.temperature,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        **ARMS[arm],
    )
    return GRPOTrainer(
        model, [right, follows], args, rows(settings.rows), processing_class=tokenizer, callbacks=callbacks
    )


def timed(made: Any) -> list[tuple[float, float, int]]:
    """(CPU seconds, seconds, tokens) of each rollout that it makes from now on."""
    taken: list[tuple[float, float, int]] = []
    roll = made._generate_single_turn

    def rolled(*given: Any) -> Any:
        cpu, wall = time.thread_time(), time.perf_counter()
        out = roll(*given)
        taken.append((time.thread_time() - cpu, time.perf_counter() - wall, sum(map(len, out[0]))))
        return out

    made._generate_single_turn = rolled
    return taken


def run_arm(arm: str, settings: RLSettings, turns: Turns, found: dict[str, Any]) -> None:
    """In its thread: its steps into found[arm], as they come."""
    turns.take(arm)
    try:
        watch = InTurn(arm, turns, [])
        made = trainer(arm, settings, [watch])
        watch.taken = timed(made)
        kept = sorted(int(p.name.split("-")[1]) for p in Path(made.args.output_dir).glob("checkpoint-*"))
        before = found.get(arm, {}).get("steps", []) if kept else []
        watch.steps += [step for step in before if step["step"] <= kept[-1]]
        found[arm] = {"steps": watch.steps}
        made.train(resume_from_checkpoint=True if kept else None)
    except BaseException as error:
        found[arm] = {"error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        turns.give(arm, leave=True)


def like(arm: str, other: str) -> str:
    """The arm `other` of the same kind."""
    return " ".join([*arm.split()[:-1], other])


def summed(found: dict[str, Any]) -> None:
    """What is compared: medians over steps, the first left out."""
    for arm, about in found.items():
        off = {step["step"]: step for step in found.get(like(arm, "off"), {}).get("steps", [])}
        steps = [s for s in about.get("steps", []) if "rollout_tokens" in s][1:]
        if not steps:
            continue
        third = max(len(steps) // 3, 1)
        tokens = sum(s["rollout_tokens"] for s in steps)
        about["tokens_per_cpu_second"] = tokens / sum(s["rollout_cpu_seconds"] for s in steps)
        about["tokens_per_second"] = tokens / sum(s["rollout_seconds"] for s in steps)
        about["step_cpu_seconds"] = median(s["cpu_seconds"] for s in steps)
        about["share_in_rollouts"] = sum(s["rollout_cpu_seconds"] for s in steps) / sum(s["cpu_seconds"] for s in steps)
        about["reward"] = mean(s["reward"] for s in steps)
        if "rollout/tau" in steps[0]:
            about["tau"], about["tau_first"], about["tau_last"] = (
                mean(s["rollout/tau"] for s in part) for part in (steps, steps[:third], steps[-third:])
            )
        if off:
            shared = [(s["reward"], off[s["step"]]["reward"]) for s in steps if s["step"] in off]
            about["same_as_off"] = [sum(abs(a - b) < 1e-6 for a, b in shared), len(shared)]
    for arm, about in found.items():
        for other in ("off", "trl"):
            against = found.get(like(arm, other), {})
            for unit, name in (("cpu_second", f"times_{other}"), ("second", f"wall_times_{other}")):
                if f"tokens_per_{unit}" in about and f"tokens_per_{unit}" in against:
                    about[name] = about[f"tokens_per_{unit}"] / against[f"tokens_per_{unit}"]


def memory(settings: RLSettings) -> dict[str, int]:
    """Peak resident bytes of two steps of each arm, in a process of its own."""
    code = (
        "import resource, rl; s = rl.RLSettings(**{0!r}); rl.trainer({1!r}, s, []).train(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    given = {**vars(settings), "steps": 2}
    out = {}
    for arm in settings.arms:
        done = subprocess.run(
            [sys.executable, "-c", code.format(given, arm)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": f".:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"},
        )
        out[arm] = int(done.stdout.split()[-1])
        print(f"{arm}: {out[arm] / 2**30:.2f} GiB", flush=True)
    return out


def draw(found: dict[str, Any], path: Path) -> None:
    """tau and rewards over steps, running means of five."""
    from matplotlib import pyplot

    def smooth(values: list[float]) -> list[float]:
        return [mean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for arm, about in found.items():
        steps, kind = about.get("steps", []), arm.split()[0]
        x = [s["step"] for s in steps]
        if steps and "rollout/tau" in steps[0] and about.get("tau", 1.0) > 1.0 and kind != "cool":
            axes[1 if kind == "drift" else 0].plot(x, smooth([s["rollout/tau"] for s in steps]), label=arm)
        if steps and kind not in KINDS:
            axes[2].plot(x, smooth([s["reward"] for s in steps]), label=arm, linewidth=1)
    for axis, name in zip(axes, ("tau", "tau, ten times the rate", "reward"), strict=True):
        axis.set_xlabel("step")
        axis.set_title(name)
        if axis.lines:
            axis.legend(fontsize=6)
    save_figure(figure, path)


def main() -> int:
    """Run the arms; the exit code."""
    settings = parse(RLSettings, prog="benchmarks/rl.py")
    torch.set_num_threads(1)
    path = Path(settings.output)
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    found = result.setdefault("arms", {})
    if settings.memory:
        result["memory_bytes"] = {**result.get("memory_bytes", {}), **memory(settings)}
    elif not settings.redraw:
        turns = Turns(settings.arms, settings.minutes)
        load_model(settings.model, Path(settings.work) / "model")
        threads = [threading.Thread(target=run_arm, args=(arm, settings, turns, found)) for arm in settings.arms]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):  # what is there is kept, should this be killed
            threads[-1].join(60)
            write_json_atomic(path, result)
        if "off" in settings.arms or "settings" not in result:  # of the main run
            asked = {n: v for n, v in vars(settings).items() if n not in ("model", "work", "output")}
            result |= {"provenance": provenance(), "settings": asked}
        summed(found)
        for arm, about in found.items():
            shown = {n: round(v, 3) for n, v in about.items() if isinstance(v, (int, float))}
            print(arm, about.get("error") or shown, flush=True)
    if not settings.redraw:
        write_json_atomic(path, result)
    draw(found, Path("docs/rl.svg"))
    return int(any("error" in about for about in found.values()))


if __name__ == "__main__":
    sys.exit(main())
