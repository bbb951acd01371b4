"""What a trainer that rolls out is told: drafts in its rollouts, and an MTP module that learns from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig

from foretell.config import nearest
from foretell.methods.base import REREADS, GradientMode, MTPConfig, load_preset
from foretell.training.arguments import MTPArguments

DRAFTERS = ("mtp", "lookup", "history", "mtp+lookup", "mtp+history", "none")


@dataclass
class RolloutArguments(MTPArguments):
    """Fields beside TRL's own. With none of mtp_module, mtp_preset and mtp_drafter set it is TRL's trainer to the bit.

    num_speculative_tokens and mtp_num_layers are ROLL's names.
    """

    mtp_module: str | None = field(default=None, metadata={"help": "Folder of a module of this policy's."})
    mtp_preset: str | None = field(
        default=None, metadata={"help": "A new module instead: a preset of recipes/ or a YAML file like them."}
    )
    mtp_num_layers: int | None = field(default=None, metadata={"help": "Depths of a new module; the preset's if None."})
    mtp_training_mode: GradientMode | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "disabled (the module drafts as it is), standalone (it learns from the rollouts; nothing of it "
            "reaches the policy) or joint (its loss reaches the policy too, scaled). disabled with mtp_module, "
            "standalone with mtp_preset."
        },
    )
    mtp_learning_rate: float | None = field(
        default=1e-4, metadata={"help": "Of the module. Policies learn so slowly that it needs its own."}
    )
    mtp_drafter: str | None = field(
        default=None,
        metadata={
            "help": f"Who drafts in rollouts: {', '.join(DRAFTERS)}. lookup copies from the text itself, history also "
            "from the prompt's other rollouts and earlier ones; none leaves rollouts to TRL. mtp where there is a "
            "module."
        },
    )
    num_speculative_tokens: str | None = field(
        default=None, metadata={"help": "Drafts a verification, or auto (the default); 0: none."}
    )
    mtp_warmup_steps: int = field(default=0, metadata={"help": "Steps in which the module learns but does not draft."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        found = self._unasked() if not self.mtp_asked else []
        if self.mtp_asked:
            self.take_preset(self.mtp_preset)
            if self.mtp_training_mode is None:
                self.mtp_training_mode = "standalone" if self.mtp_preset is not None else "disabled"
            if self.mtp_drafter is None:
                self.mtp_drafter = "mtp"
            found += self.problems()
        if found:
            raise ValueError("; ".join(problem.removesuffix(".") for problem in found) + ".")

    @property
    def mtp_has_module(self) -> bool:
        """Whether there is a module, to learn or to draft."""
        return self.mtp_module is not None or self.mtp_preset is not None

    @property
    def mtp_asked(self) -> bool:
        """Whether anything here differs from TRL."""
        return self.mtp_has_module or self.mtp_drafter is not None

    @property
    def trains_target(self) -> bool:
        """Always: it is the policy."""
        return True

    @property
    def draft_tokens(self) -> int | str:
        """num_speculative_tokens as decoding takes it."""
        given = "auto" if self.num_speculative_tokens is None else self.num_speculative_tokens
        return int(given) if str(given).isdecimal() else given

    def _unasked(self) -> list[str]:
        fields = type(self).__dataclass_fields__
        names = ("mtp_training_mode", "mtp_num_layers", "num_speculative_tokens", "mtp_warmup_steps")
        set_ = [name for name in names if getattr(self, name) != fields[name].default]
        return [f"{', '.join(set_)}: wanted mtp_module, mtp_preset or mtp_drafter beside it"] if set_ else []

    def problems(self) -> list[str]:
        """See MTPArguments."""
        found = super().problems()
        learns = self.mtp_training_mode != "disabled"
        if self.mtp_module is not None and self.mtp_preset is not None:
            found.append("mtp_module and mtp_preset: got both, wanted a module that is there or a new one")
        if self.mtp_drafter not in DRAFTERS:
            found.append(f"mtp_drafter: got {self.mtp_drafter!r}, wanted one of {', '.join(DRAFTERS)}")
        elif not self.mtp_has_module and (learns or "mtp" in self.mtp_drafter.split("+")):
            found.append(
                f"mtp_drafter={self.mtp_drafter!r}, mtp_training_mode={self.mtp_training_mode!r}: wanted mtp_module or "
                "mtp_preset beside it"
            )
        if self.mtp_preset is not None and not learns:
            found.append(
                "mtp_training_mode: got 'disabled' with mtp_preset; a new module that never learns drafts noise"
            )
        if not (self.draft_tokens == "auto" or isinstance(self.draft_tokens, int)):
            found.append(
                f"num_speculative_tokens: got {self.num_speculative_tokens!r}, wanted a number of at least 0, or auto"
            )
        if self.mtp_warmup_steps and not learns:
            found.append(
                f"mtp_warmup_steps: got {self.mtp_warmup_steps} in mode {self.mtp_training_mode!r}, wanted a module "
                "that learns"
            )
        if self.mtp_target_loss != "labels":
            found.append(
                f"mtp_target_loss: got {self.mtp_target_loss!r}, but a policy learns by its rewards; leave it out"
            )
        if self.mtp_supervision in REREADS and self.mtp_training_mode == "joint":
            found.append(
                f"mtp_supervision: {self.mtp_supervision} in joint mode needs a frozen copy of the policy as its "
                "teacher; use mtp_training_mode=standalone, or labels or teacher"
            )
        if self.mtp_drafter != "none":
            found += self._engines()
        if self.mtp_preset is not None:
            try:
                self.mtp_config()
            except ValueError as error:
                found.append(str(error))
        return found

    def _engines(self) -> list[str]:
        """Switches of TRL's that let something else than foretell roll out, and names that nobody knows."""
        why = {
            "use_vllm": "vLLM rolls out and drafts by its own settings (docs/rl.md has the line)",
            "use_transformers_continuous_batching": "foretell batches continuously by itself; leave it out",
        }
        given = getattr(self, "generation_kwargs", None) or {}
        known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
        found = [f"generation_kwargs: got {name!r}{nearest(name, known)}" for name in given if name not in known]
        if given.get("num_return_sequences") not in (None, 1):
            found.append("generation_kwargs: got num_return_sequences, but num_generations says how many")
        return found + [
            f"{name}: {said}, or say mtp_drafter='none', and a module learns from what it rolls out"
            for name, said in why.items()
            if getattr(self, name, False)
        ]

    def mtp_config(self) -> MTPConfig:
        """A new module's settings. Raises ConfigError with everything that is wrong with them."""
        assert self.mtp_preset is not None
        values: dict[str, Any] = dict(load_preset(self.mtp_preset)["module"])
        return MTPConfig.from_any(values | ({} if self.mtp_num_layers is None else {"depth": self.mtp_num_layers}))
