"""Training by the clock: warm up, decay to a tenth by a cosine over the time given, stop, and keep the curves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers.trainer_callback import TrainerCallback

from foretell.runtime import Progress

WARMUP_STEPS = 20


class TimeBudget(TrainerCallback):
    """Sets the learning rate from the share of `seconds` that is spent, so that any machine finishes its schedule.

    measure_at: shares of the time at which tau is measured by decoding; that takes from the budget but is not counted
    as training. `trainer` must be set before training starts. clock: what tells seconds; of a process's own time where
    other work on the machine shall not count.
    """

    def __init__(
        self,
        seconds: float,
        learning_rate: float,
        measure_at: Sequence[float] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds, self.learning_rate, self.clock = seconds, learning_rate, clock
        self.measure_at = list(measure_at)
        self.trainer: Any = None
        self.tokens = 0
        self.spent = 0.0  # on steps alone
        self.curve: list[dict[str, Any]] = []
        self.tau_curve: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = self._step_started = self._told = self.clock()
        self._bar = Progress("train", total=round(self.seconds), unit="s")
        self._bar.__enter__()
        self._fields: dict[str, Any] = {}

    def _tell(self, step: int) -> None:
        now = self.clock()
        whole = round(now - self._started) - round(self._told - self._started)
        if whole > 0:
            rate = f"{self.tokens / max(self.spent, 1e-9):.0f}"
            self._bar.update(whole, step=step, **{"answer_tok/s": rate}, **self._fields)
            self._told = now

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.__exit__(None, None, None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        share = min((self.clock() - self._started) / self.seconds, 1.0)
        self.trainer.share_done = share
        rate = self.learning_rate * min((state.global_step + 1) / WARMUP_STEPS, 1.0)
        rate *= 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share))
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)
        self._step_started = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spent += self.clock() - self._step_started
        self.tokens += self.trainer.step_tokens
        self._tell(state.global_step)
        share = (self.clock() - self._started) / self.seconds
        if self.measure_at and share >= self.measure_at[0]:
            self.measure_at.pop(0)
            found = self.trainer.measure_tau()
            if found:
                self.tau_curve.append({"step": state.global_step, "seconds": self.spent, "tau": found["tau"]})
                self._fields["tau"] = found["tau"]
                self.trainer.log({f"eval_{name}": value for name, value in found.items()})
        control.should_training_stop = share >= 1.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._fields["loss"] = float(logs["loss"])
            accuracy = [v for k, v in sorted(logs.items()) if k.startswith("accuracy_")]
            self.curve.append(
                {"step": state.global_step, "seconds": self.spent, "loss": float(logs["loss"]), "accuracy": accuracy}
            )
