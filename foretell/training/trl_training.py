"""What foretell's subclasses of TRL's trainers share: the model as TRL calls it, and how a module is put beside it.

TRL makes the forward of a step; the module's losses are made of the states that passed by in it, so that there is no
second one.
"""

from __future__ import annotations

import dataclasses
import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from foretell.methods.learning import in_eval_mode
from foretell.models.target import TargetRows
from foretell.mtp import MTPModel
from foretell.training.mtp_training import MTPTraining, problems_with
from foretell.types import Batch


class TRLModel(MTPModel):
    """The model as TRL calls it, with the module's losses over the states that pass by."""

    asked: dict[str, Any] | None = None  # of the next forward: arguments of `losses_of`, taken by it
    losses: dict[str, Any] | None = None  # of the last forward that was asked for some

    def forward(self, mtp_labels: Tensor | None = None, **inputs: Any) -> ModelOutput:  # type: ignore[override]
        """TRL's outputs of the target; the module's losses are left in `losses`, and in the outputs as tensors, where
        DDP and FSDP look for what will be differentiated.
        """
        asked, self.asked = self.asked, None
        if asked is None:
            return self.model(**inputs)
        learns = asked["train_target"]
        with nullcontext() if learns else torch.no_grad(), nullcontext() if learns else in_eval_mode(self.model):
            with self.target.passing_by() as states:
                out = self.model(**inputs)
        batch = asked.pop("batch")
        rows = TargetRows(states["post"], states["pre"], states.get("layers"))
        if self.module.lays_masks:
            # masks that teach the target stand in its own forward
            joint = asked["mtp_training_mode"] == "joint"
            rows = self.module.read(self.target, batch, learns=True, joint=True) if joint else rows
        self.losses = self.losses_of(batch, rows, **asked)
        learned = [*self.losses["mtp"], *([self.losses["stay"]] if self.losses["stay"] is not None else [])]
        totals = torch.stack([loss.total for loss in learned])
        for loss, total in zip(learned, totals.unbind(), strict=True):
            loss.total = total
        kind: Any = type(out)
        return _with_totals(kind)(**out, mtp_totals=totals)


@functools.cache
def _with_totals(kind: Any) -> Any:
    """A class of outputs with one more field: DDP takes outputs apart and makes them anew."""
    return dataclasses.make_dataclass(f"MTP{kind.__name__}", [("mtp_totals", Any, None)], bases=(kind,))


class TRLTraining(MTPTraining):
    """Between MTPTraining and a trainer of TRL's."""

    mtp: TRLModel | None = None

    @staticmethod
    def _refuse(given: dict[str, Any]) -> list[str]:
        """What can be said of the arguments of a trainer with a module before anything is loaded."""
        found = []
        if isinstance(given["model"], MTPModel):
            found.append("model: got an MTPModel, wanted its .model: the trainer makes or loads the module by itself")
        if (given.get("optimizers") or (None, None))[0] is not None:
            found.append("optimizers: got one, which cannot hold the module's parameters: they do not exist yet")
        return found

    def _put_beside(self, mtp: TRLModel) -> None:
        """From here on the trainer's model is the policy or text model with its module."""
        args: Any = self.args
        if mtp.module.text_learns(joint=False):
            raise ValueError(
                "lora_gate: plain adapters change the model itself. Give TRL's peft_config, or train with MTPTrainer."
            )
        if mtp.module.anchored(args.mtp_supervision, args.mtp_training_mode == "joint"):
            raise ValueError(
                f"mtp_supervision: {args.mtp_supervision} with joint masks is MTPTrainer's (foretell train)."
            )
        if mtp.module.lays_masks:  # TRL's default is on; with mask tokens chunk_size bounds memory
            self.args.gradient_checkpointing = self.args.activation_checkpointing = False
        if problems := problems_with(mtp, args, self.compute_loss_func):
            raise ValueError("; ".join(problems))
        self._learn_with(mtp)
        own, all_ = (sum(p.numel() for p in part.parameters()) for part in (mtp.module, mtp.model))
        self.accelerator.print(f"MTP module: {own:,} parameters beside the model's {all_:,} ({own / all_:.1%}).")
        self.model = self.model_wrapped = mtp

    def _asked(self, batch: Batch, counts_K1: Tensor, call: Any) -> tuple[Any, dict[str, Any]]:
        """(what `call` gives, the module's losses over the states that passed by in its first forward)."""
        mtp = self.mtp
        assert mtp is not None
        mtp.asked = {"batch": batch, **self._forward_arguments(counts_K1)}
        mtp.losses = None
        out = call()
        assert mtp.losses is not None, "the trainer made no forward"
        return out, mtp.losses
