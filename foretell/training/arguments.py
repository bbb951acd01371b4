"""What the MTP objective is told: one set of fields, for MTPTrainingArguments and for TRL's SFTConfig alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from foretell.methods.base import SOFT, DepthWeights, GradientMode, LossKind, Supervision, load_preset

NUMBERS: dict[str, tuple[Any, str]] = {"int": (Integral, "a whole number"), "float": (Real, "a number")}
BELOW = {"mtp_depth_one_first": 1}


@dataclass
class MTPArguments:
    """Fields of the MTP objective. A trainer's own arguments inherit them, and may set other defaults."""

    mtp_training_mode: GradientMode = field(
        default="standalone", metadata={"help": "disabled, standalone (the target is untouched to the bit) or joint."}
    )
    mtp_supervision: Supervision = field(
        default="labels",
        metadata={
            "help": f"What the depths learn from: {', '.join(get_args(Supervision))}. A teacher is the target itself; "
            "student_forced learns of the module's own proposals what the target says of them."
        },
    )
    mtp_loss: LossKind = field(
        default="ce",
        metadata={
            "help": f"{', '.join(get_args(LossKind))}; labels take ce only. For drawn drafts: lk is -log of the chance "
            "to be accepted, lk_hybrid goes from kl to tv as that grows, e2e_tv is the accepted length."
        },
    )
    mtp_loss_scaling_factor: float | None = field(
        default=None, metadata={"help": "Weight of the MTP loss beside the next-token loss; 0.1 in joint, else 1."}
    )
    mtp_depth_weights: DepthWeights = field(
        default="uniform",
        metadata={
            "help": "uniform, harmonic, exponential, rows (every counted prediction alike), or dpace (each row by the "
            "drafter's own chance to get that far; with ce, tv or lk)."
        },
    )
    mtp_depth_beta: float = field(
        default=0.6, metadata={"help": "Base of exponential depth weights (FastMTP: 0.6, Medusa: 0.8)."}
    )
    mtp_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the module; learning_rate without it (Medusa-2: four times that)."}
    )
    mtp_muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Matrices of the module learn by Muon at this rate, all else by AdamW; without it all does."},
    )
    mtp_depth_one_first: float = field(
        default=0.0, metadata={"help": "Share of the steps (of a TimeBudget's time) in which only depth 1 learns."}
    )
    mtp_heads_first_steps: int = field(
        default=0, metadata={"help": "Joint runs: steps in which only the module learns (Medusa-2's first stage)."}
    )
    mtp_target_loss: Literal["labels", "untouched"] = field(
        default="labels",
        metadata={"help": "The target learns the labels, or to stay what it is without its adapter (KL; PEFT only)."},
    )
    nonfinite_loss: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "A step whose loss or gradient is not finite: stop, or skip and count it."}
    )
    eval_prompts: int = field(
        default=16, metadata={"help": "Prompts decoded at each evaluation to measure tau; 0: none."}
    )
    eval_new_tokens: int = field(default=64, metadata={"help": "New tokens of each of them."})
    eval_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better metric_for_best_model (tau)."}
    )

    def take_preset(self, preset: str | None) -> None:
        """A preset's training values stand for fields that were left at their defaults."""
        fields = type(self).__dataclass_fields__
        given = {} if preset is None else load_preset(preset)["training"]
        for name, value in given.items():
            if name.startswith("mtp_") and name in fields and getattr(self, name) == fields[name].default:
                setattr(self, name, value)

    def problems(self) -> list[str]:
        """What is wrong with these settings, in plain sentences."""
        found = []
        for name, kind in get_type_hints(MTPArguments).items():  # a command line checks these by itself
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                found.append(f"{name}: got {getattr(self, name)!r}, wanted one of {', '.join(get_args(kind))}.")
        found += self._no_numbers()
        if self.mtp_supervision not in SOFT and self.mtp_loss != "ce":
            same = ", which is -log of a label's acceptance too" if self.mtp_loss == "lk" else ""
            found.append(
                f"mtp_loss: {self.mtp_loss} needs a distribution; with mtp_supervision={self.mtp_supervision} use "
                f"ce{same}."
            )
        if self.mtp_depth_weights == "dpace" and self.mtp_loss not in ("ce", "tv", "lk"):
            found.append(f"mtp_depth_weights: dpace reads acceptance off ce, tv or lk, got mtp_loss={self.mtp_loss}.")
        if self.eval_patience == 0:
            found.append("eval_patience: got 0, wanted at least 1.")
        mode = self.mtp_training_mode
        if self.mtp_heads_first_steps and mode != "joint":
            found.append(f"mtp_heads_first_steps: got mode {mode!r}, wanted joint, whose first stage it is.")
        if self.mtp_target_loss == "untouched" and mode != "joint":
            found.append(f"mtp_target_loss: got 'untouched' in mode {mode!r}, wanted joint.")
        return found

    def _no_numbers(self) -> list[str]:
        """Counts, shares and rates of ours that are none."""
        found, owners = {}, [one for one in type(self).__mro__ if issubclass(one, MTPArguments)]
        for name, kind in (item for one in owners for item in vars(one).get("__annotations__", {}).items()):
            kinds, value, below = kind.split(" | "), getattr(self, name), BELOW.get(name, math.inf)
            if kinds[0] not in NUMBERS or (value is None and "None" in kinds):
                continue
            number, what = NUMBERS[kinds[0]]
            if not isinstance(value, number) or isinstance(value, bool) or not 0 <= value < below:
                most = f" and below {below}" if below < math.inf else ""
                found[name] = f"{name}: got {value!r}, wanted {what} of at least 0{most}."
        return list(found.values())

    @property
    def trains_target(self) -> bool:
        """Whether the target's own parameters learn."""
        return self.mtp_training_mode != "standalone"

    @property
    def mtp_scale(self) -> float:
        """Weight of the MTP loss."""
        if self.mtp_loss_scaling_factor is not None:
            return self.mtp_loss_scaling_factor
        return 0.1 if self.mtp_training_mode == "joint" else 1.0

    def weighing(self) -> dict[str, Any]:
        """How depths weigh, as `coefficients` takes it."""
        return {"weights": self.mtp_depth_weights, "beta": self.mtp_depth_beta}
