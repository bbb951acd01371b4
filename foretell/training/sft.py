"""TRL's SFTTrainer with multi-token prediction: one changed import, nothing patched globally.

The interface is that of the documentation page of TRL's proposed MTP (huggingface/trl#4290, closed). What was wrong
there is right here: the module exists before the optimizer, depth k predicts token t + 1 + k, no head sees the future
or another document, one division by global counts, and checkpoints hold the module. docs/sft.md is the page.

One training step: TRL's compute_loss -> SFTModel.forward (TRL's own forward, the module's losses over the states that
passed by) -> objective, here in compute_loss.
"""

# B sequences, T positions, K depths.

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import trl
from torch import Tensor, nn
from transformers.utils import ModelOutput
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from foretell.checkpoint import load_tensors
from foretell.data.collate import to_batch
from foretell.methods.base import (
    METHODS,
    REREADS,
    SOFT,
    DepthWeights,
    GradientMode,
    LossKind,
    MTPConfig,
    Supervision,
    load_preset,
)
from foretell.models.mtp_heads import HeadType, InitStrategy
from foretell.models.target import TargetRows
from foretell.mtp import MTPModel
from foretell.ops.losses import linear_loss
from foretell.ops.shift import labels_of, next_labels
from foretell.training.objective import choose_labels, coefficients, count_labels, objective
from foretell.training.tau import decoded_tau
from foretell.types import LossSum


@dataclass
class SFTConfig(trl.SFTConfig):
    """TRL's SFTConfig plus the fields of multi-token prediction. mtp_enabled=False is TRL to the bit."""

    mtp_enabled: bool = field(default=False, metadata={"help": "Train an MTP module beside the model."})
    mtp_num_predictions: int = field(
        default=2, metadata={"help": "K: tokens predicted BEYOND the ordinary next one (depths 1..K)."}
    )
    mtp_loss_weight: float = field(default=0.5, metadata={"help": "Weight of the MTP loss beside the next-token loss."})
    mtp_head_type: HeadType = field(
        default="linear", metadata={"help": "linear, ffn, mha_ffn, cnn, identical, medusa or layer (method heads)."}
    )
    mtp_num_layers: int = field(default=1, metadata={"help": "Layers of each head."})
    mtp_init_strategy: InitStrategy = field(default="default", metadata={"help": "How the heads' weights start."})
    mtp_dropout_prob: float = field(default=0.1, metadata={"help": "Dropout before and inside heads."})
    mtp_weight_decay_strategy: DepthWeights = field(
        default="uniform",
        metadata={"help": "Weights of the depths: uniform, harmonic (1, 1/2, 1/3), exponential or rows."},
    )
    mtp_depth_beta: float = field(default=0.6, metadata={"help": "Base of exponential depth weights (Medusa: 0.8)."})
    mtp_method: str = field(default="heads", metadata={"help": f"Architecture of the module: {', '.join(METHODS)}."})
    mtp_training_mode: GradientMode = field(
        default="joint", metadata={"help": "disabled, standalone (the model is untouched to the bit) or joint."}
    )
    mtp_supervision: Supervision = field(
        default="labels", metadata={"help": f"What the depths learn from: {', '.join(get_args(Supervision))}."}
    )
    mtp_loss: LossKind = field(default="ce", metadata={"help": "ce, kl, reverse_kl or tv; labels take ce only."})
    mtp_preset: str | None = field(
        default=None, metadata={"help": "A preset of recipes/ or a YAML file like them; it sets the fields above."}
    )
    mtp_share_unembedding: bool | None = field(
        default=None, metadata={"help": "Heads use the model's output matrix; by default for large vocabularies."}
    )
    mtp_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the module; learning_rate without it (Medusa-2: four times that)."}
    )
    mtp_heads_first_steps: int = field(
        default=0, metadata={"help": "Joint runs: steps in which only the module learns (Medusa-2's first stage)."}
    )
    mtp_target_loss: Literal["labels", "untouched"] = field(
        default="labels",
        metadata={"help": "The model learns the labels, or to stay what it is without its adapter (KL; PEFT only)."},
    )
    eval_prompts: int = field(
        default=16, metadata={"help": "Prompts decoded at each evaluation to measure tau; 0: none."}
    )
    eval_new_tokens: int = field(default=64, metadata={"help": "New tokens of each of them."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mtp_enabled:
            return
        self._take_preset()
        found = self._problems()
        try:
            self.mtp_config()
        except ValueError as error:
            found.append(str(error))
        if found:
            raise ValueError("; ".join(found))

    def _take_preset(self) -> None:
        """The preset's training values stand for fields that were left at their defaults."""
        if self.mtp_preset is None:
            return
        fields = type(self).__dataclass_fields__
        values = {k: v for k, v in load_preset(self.mtp_preset)["training"].items() if k.startswith("mtp_")}
        names = {"mtp_loss_scaling_factor": "mtp_loss_weight", "mtp_depth_weights": "mtp_weight_decay_strategy"}
        for name, value in values.items():
            name = names.get(name, name)
            if name in fields and getattr(self, name) == fields[name].default:
                setattr(self, name, value)

    def _problems(self) -> list[str]:
        found = []
        if self.mtp_loss_weight < 0:
            found.append(f"mtp_loss_weight: got {self.mtp_loss_weight}, wanted at least 0")
        if self.mtp_supervision in REREADS and self.mtp_training_mode == "joint":
            found.append(
                "mtp_supervision: student_forced in joint mode needs a frozen copy of the model as its teacher, which "
                "MTPTrainer keeps (foretell train); here train the module alone: mtp_training_mode=standalone"
            )
        if self.mtp_supervision not in SOFT and self.mtp_loss != "ce":
            found.append(f"mtp_loss: {self.mtp_loss} needs a distribution; with {self.mtp_supervision} use ce")
        if self.mtp_heads_first_steps and self.mtp_training_mode != "joint":
            mode = self.mtp_training_mode
            found.append(f"mtp_heads_first_steps: got mode {mode!r}, wanted joint, whose first stage it is")
        if self.mtp_preset is not None:
            fields = type(self).__dataclass_fields__
            shape = ("mtp_head_type", "mtp_num_layers", "mtp_init_strategy", "mtp_method", "mtp_share_unembedding")
            changed = [name for name in shape if getattr(self, name) != fields[name].default]
            if changed:
                names = ", ".join(changed)
                found.append(f"mtp_preset: {self.mtp_preset!r} sets {names} too; give the one or the others")
        return found

    def mtp_config(self) -> MTPConfig:
        """The module's settings. Raises ConfigError with everything that is wrong with them."""
        if self.mtp_preset is not None:
            return MTPConfig.from_any(load_preset(self.mtp_preset)["module"])
        values: dict[str, Any] = {"method": self.mtp_method, "depth": self.mtp_num_predictions}
        if self.mtp_method == "heads":
            values |= {
                "head_type": self.mtp_head_type,
                "num_layers": self.mtp_num_layers,
                "init_strategy": self.mtp_init_strategy,
                "dropout": self.mtp_dropout_prob,
                "share_unembedding": self.mtp_share_unembedding,
            }
        return MTPConfig.from_any(values)

    @property
    def trains_target(self) -> bool:
        """Whether the model's own parameters learn."""
        return self.mtp_training_mode != "standalone"


@dataclass
class DataCollatorForMTPLanguageModeling(DataCollatorForLanguageModeling):
    """TRL's collator, and mtp_labels [B, T, K]: mtp_labels[b, t, k - 1] = labels[b, t + 1 + k], or -100 where that is
    masked, padding, past the end or in another document. Not needed by SFTTrainer, which derives them itself; labels
    that are given it uses.

    Args:
        num_predictions: K, tokens beyond the ordinary next one.
    """

    num_predictions: int = 2

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """See DataCollatorForLanguageModeling."""
        out = super().torch_call(examples)
        return {**out, "mtp_labels": labels_of(to_batch(out), self.num_predictions)}


class SFTModel(MTPModel):
    """The model as TRL calls it, with the module's losses over the states that pass by."""

    args: SFTConfig
    detached = True  # no gradient of the MTP loss to the target in this step
    coefficients_K: Tensor | None = None  # what the depths' totals will be multiplied by in this step
    losses: dict[str, Any] | None = None  # of the last forward

    def forward(self, mtp_labels: Tensor | None = None, **inputs: Any) -> ModelOutput:  # type: ignore[override]
        """TRL's outputs of the target; the module's losses are left in `losses`, and in the outputs as tensors, where
        DDP and FSDP look for what will be differentiated. Without fused_lm_head TRL wants logits and no loss.
        """
        args, training = self.args, self.training
        if not inputs.get("fused_lm_head"):
            return self.model(**inputs)
        with nullcontext() if args.trains_target else torch.no_grad(), self._passing_by() as states:
            out = self.model(**inputs)
        rows = TargetRows(states["post"], states["pre"])
        columns = {name: inputs.get(name) for name in ("input_ids", "labels", "position_ids", "attention_mask")}
        batch = to_batch({**columns, "mtp_labels": mtp_labels})  # type: ignore[dict-item]
        learns = training and args.mtp_training_mode != "disabled"
        with nullcontext() if learns else torch.no_grad():
            read = rows
            if self.module.lays_masks and not self.detached:  # masks that teach the target stand in its own forward
                read = self.module.read(self.target, batch, learns=True, joint=True)
            mtp = self.module.losses(
                self.target,
                batch,
                read,
                detach=self.detached,
                supervision=args.mtp_supervision,
                kind=args.mtp_loss,
                coefficients_K=self.coefficients_K,
            )
        stay = self._stay(batch, rows, inputs) if args.mtp_target_loss == "untouched" else None
        self.losses = {"mtp": mtp, "stay": stay}
        parts = [loss.total for loss in mtp] + ([] if stay is None else [stay.total])
        out["mtp_totals"] = torch.stack(parts)
        for loss, total in zip([*mtp, *([] if stay is None else [stay])], out["mtp_totals"].unbind(), strict=True):
            loss.total = total
        return out

    @contextmanager
    def _passing_by(self) -> Iterator[dict[str, Tensor]]:
        """Keeps the states before and after the final norm of a forward that somebody else wrote."""
        states: dict[str, Tensor] = {}

        def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            states.update(pre=args[0], post=output)

        handle = self.target.norm.register_forward_hook(keep)
        try:
            yield states
        finally:
            handle.remove()

    def _stay(self, batch: Any, rows: TargetRows, inputs: dict[str, Any]) -> LossSum:
        """KL of the model from itself with its adapter switched off, where labels are (Medusa, section 2.3.2)."""
        with torch.no_grad(), self.model.disable_adapter(), self._passing_by() as states:  # type: ignore[operator]
            self.target.decoder(
                input_ids=batch.input_ids_BT,
                attention_mask=inputs.get("attention_mask"),
                position_ids=inputs.get("position_ids"),
                use_cache=False,
            )
        D, head = self.target.hidden_size, self.target.head
        return linear_loss(
            rows.post_norm_BRD.reshape(-1, D),
            head.weight,
            labels_N=next_labels(batch.labels_BT, batch.document_BT).reshape(-1),
            kind="kl",
            bias_M=getattr(head, "bias", None),
            softcap=self.target.softcap,
            logit_scale=self.target.logit_scale,
            teacher_hidden_ND=states["post"].reshape(-1, D),
            teacher_weight_MD=head.weight.detach(),
            teacher_bias_M=getattr(head, "bias", None),
        )


class SFTTrainer(trl.SFTTrainer):
    """TRL's SFTTrainer; with SFTConfig(mtp_enabled=True) it trains an MTP module beside the model.

    Checkpoints hold mtp_config.json and mtp_model.safetensors beside what TRL writes (nothing but them and the
    tokenizer in standalone, where the model does not change): `MTPModel.from_pretrained(model, folder)` loads them.
    `trainer.mtp` is the MTPModel.
    """

    def __init__(self, model: Any, args: Any = None, *more: Any, **kwargs: Any) -> None:
        enabled = isinstance(args, SFTConfig) and args.mtp_enabled
        if enabled:
            given = inspect.signature(trl.SFTTrainer.__init__).bind(self, model, args, *more, **kwargs)
            self._refuse(args, given.arguments)
        super().__init__(model, args, *more, **kwargs)
        self.mtp: SFTModel | None = None
        if enabled:
            self._add_module()

    @staticmethod
    def _refuse(args: SFTConfig, given: dict[str, Any]) -> None:
        found = []
        if (given.get("optimizers") or (None, None))[0] is not None:
            found.append("optimizers: got one, which cannot hold the module's parameters: they do not exist yet")
        if given.get("compute_loss_func") is not None:
            found.append("compute_loss_func: with mtp_enabled the loss is TRL's own plus the module's")
        adapted = given.get("peft_config") is not None or hasattr(given["model"], "disable_adapter")
        if args.mtp_target_loss == "untouched" and not adapted:
            found.append("mtp_target_loss: 'untouched' is the model with its adapter off, so give a peft_config")
        if args.label_smoothing_factor > 0:
            found.append("label_smoothing_factor: TRL then runs the model twice a step; wanted 0 with mtp_enabled")
        if found:
            raise ValueError("; ".join(found))

    def _add_module(self) -> None:
        args: SFTConfig = self.args
        model: Any = getattr(self, "model")  # noqa: B009 (TRL gives it no type)
        if self._is_vlm:
            raise ValueError(f"{type(model).__name__}: wanted a text model; MTP modules read text only.")
        mtp = SFTModel(model, args.mtp_config())
        if mtp.module.text_learns(joint=False):
            raise ValueError(
                "lora_gate: plain adapters change the model itself. Give TRL's peft_config, or train with MTPTrainer."
            )
        mtp.args, mtp.notes = args, {"training": {k: v for k, v in args.to_dict().items() if k.startswith("mtp_")}}
        if not args.trains_target:
            mtp.model.requires_grad_(False)
        mtp.make_trainable(args.mtp_training_mode != "disabled")
        if mtp.module.lays_masks and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            mtp.module.whole = True
        own, all_ = (sum(p.numel() for p in part.parameters()) for part in (mtp.module, mtp.model))
        self.accelerator.print(f"MTP module: {own:,} parameters beside the model's {all_:,} ({own / all_:.1%}).")
        self.mtp = self.model = self.model_wrapped = mtp
        self._counts_K1: Tensor | None = None

    # -- the step ------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """TRL's count; beside it, those of the depths over the whole optimizer step."""
        if self.mtp is not None:
            self._counts_K1 = None
            labelled = [inputs for inputs in batch_samples if "labels" in inputs]
            choose_labels(self.mtp.module, labelled, self.args.seed, self.state.global_step, self.args.process_index)
            counts = [self._count(inputs) for inputs in labelled]
            if counts:
                self._counts_K1 = torch.stack(counts).sum(0).to(device)
                if self.args.average_tokens_across_devices and self.args.world_size > 1:
                    self._counts_K1 = self.accelerator.gather(self._counts_K1[None]).sum(0)
        return super()._get_num_items_in_batch(batch_samples, device)

    def _count(self, inputs: dict[str, Any]) -> Tensor:
        mtp = self.mtp
        assert mtp is not None
        given = mtp.args.mtp_supervision in ("labels", "student_forced_gt")
        ids = mtp.module.draft_vocab_ids if given else None
        return count_labels(to_batch(inputs), mtp.mtp_config.depth, ids, mtp.target.vocab_size)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's next-token loss (as value only where the model does not learn it) plus the depths' weighted loss."""
        mtp = self.mtp
        if mtp is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        args, training = mtp.args, mtp.training
        counts_K1 = self._counts_K1 if training and num_items_in_batch is not None else self._count(inputs)
        mtp.detached = args.mtp_training_mode != "joint" or self.state.global_step < args.mtp_heads_first_steps
        assert counts_K1 is not None
        weighing: dict[str, Any] = {"weights": args.mtp_weight_decay_strategy, "beta": args.mtp_depth_beta}
        mtp.coefficients_K = coefficients(counts_K1, scale=args.mtp_loss_weight, **weighing)
        out = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ntp, outputs = out if return_outputs else (out, None)
        losses = mtp.losses
        assert losses is not None
        # TRL's loss is scaled for the mean over ranks already; so is ours then
        ranks = self.accelerator.num_processes // self.get_tp_size()
        scale = ranks if args.average_tokens_across_devices and num_items_in_batch is not None else 1
        extra, parts = objective(
            {"ntp": None, "mtp": losses["mtp"]}, counts_K1, scale=args.mtp_loss_weight * scale, **weighing
        )
        learned = ntp if args.trains_target else ntp.detach()
        if losses["stay"] is not None:
            parts["stay"] = losses["stay"].total.detach() / counts_K1[0].clamp(min=1)
            learned = scale * losses["stay"].total / counts_K1[0].clamp(min=1) + 0.0 * ntp
        loss = learned + (extra if extra.requires_grad else args.mtp_loss_weight * scale * parts["mtp"])
        self._note(ntp.detach() / scale, parts, losses["mtp"], num_items_in_batch is not None and training)
        return (loss, outputs) if return_outputs else loss

    def _note(self, ntp: Tensor, parts: dict[str, Tensor], depths: list[LossSum], of_a_step: bool) -> None:
        """Into TRL's metrics, means over micro-batches; of_a_step: these values are shares of a step's mean."""
        steps = self.current_gradient_accumulation_steps if of_a_step else 1
        ranks = self.accelerator.num_processes if of_a_step else 1
        metrics = self._metrics["train" if self.mtp.training else "eval"]  # type: ignore[union-attr]
        named = {"ntp": ntp, **parts}
        gathered = self.accelerator.gather(torch.stack([*named.values()])[None]).mean(0).tolist()
        for name, value in zip(named, gathered, strict=True):
            metrics[f"{name}_loss"].append(value * steps * ranks)
        if self.mtp.training:  # type: ignore[union-attr]
            values = dict(zip(named, gathered, strict=True))
            both = values.get("stay", values["ntp"]) + self.mtp.args.mtp_loss_weight * values["mtp"]  # type: ignore[union-attr]
            metrics["train_loss"].append(both * steps * ranks)
        hits_K2 = torch.stack([torch.stack([loss.correct, loss.count]) for loss in depths]).detach().float()
        hits_K2 = self.accelerator.reduce(hits_K2, "sum")
        for k, (correct, count) in enumerate(hits_K2.tolist(), start=1):
            if count:
                metrics[f"accuracy_{k}"].append(correct / count)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's; the run's mean train_loss, logged last, is not overwritten by that of the last steps."""
        if "train_runtime" in logs:
            self._metrics["train"].pop("train_loss", None)
        super().log(logs, start_time)

    # -- optimizer -----------------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; with mtp_learning_rate the module's parameters are groups of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.mtp is None or (self.mtp.args.mtp_learning_rate is None and not self.mtp.args.mtp_heads_first_steps):
            return optimizer
        mine = {id(p) for p in self.mtp.module.parameters()}
        for group in list(optimizer.param_groups):
            apart = [p for p in group["params"] if id(p) in mine]
            if apart:
                group["params"] = [p for p in group["params"] if id(p) not in mine]
                options = {k: v for k, v in group.items() if k != "params"}
                options["lr"] = self.mtp.args.mtp_learning_rate or options["lr"]
                optimizer.add_param_group({**options, "params": apart, "is_mtp": True})
        optimizer.param_groups = [g for g in optimizer.param_groups if g["params"]]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As Trainer's; the model's own learning rate is zero during mtp_heads_first_steps."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        first = 0 if self.mtp is None else self.mtp.args.mtp_heads_first_steps
        if first:
            if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                raise ValueError(
                    f"mtp_heads_first_steps: lr_scheduler_type={self.args.lr_scheduler_type!r} cannot wait; use "
                    "linear, cosine or constant."
                )
            groups = scheduler.optimizer.param_groups
            for i, (group, later) in enumerate(zip(groups, scheduler.lr_lambdas, strict=True)):
                if not group.get("is_mtp"):
                    scheduler.lr_lambdas[i] = _waiting(later, first)
                    group["lr"] = scheduler.base_lrs[i] * scheduler.lr_lambdas[i](scheduler.last_epoch)
        return scheduler

    # -- evaluation and checkpoints ------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """TRL's metrics, and tau, accept_at and accept_given by decoding prompts of the evaluation rows."""
        metrics = super().evaluate(*args, **kwargs)
        if self.mtp is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            rows = self.eval_dataset  # a name among several says which; what is given to this call alone is not decoded
            name = args[0] if args else kwargs.get("eval_dataset")
            rows = rows[name if isinstance(name, str) else next(iter(rows))] if isinstance(rows, dict) else rows
            prompts, tokens = self.mtp.args.eval_prompts, self.mtp.args.eval_new_tokens
            prefix = kwargs.get("metric_key_prefix", "eval")
            found = {f"{prefix}_{n}": v for n, v in decoded_tau(self.mtp, rows, prompts, tokens).items()}
            if found:
                metrics.update(found)
                self.log(dict(found))
        return metrics

    @contextmanager
    def _as_trls(self) -> Iterator[None]:
        """TRL's and transformers' own code for storing sees the model that they made."""
        mtp = self.mtp
        assert mtp is not None
        self.model = mtp.model
        try:
            yield
        finally:
            self.model = mtp

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.mtp is None:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.mtp.save_pretrained(folder, state_dict=state_dict)
        if self.mtp.args.trains_target:
            inner = None
            if state_dict is not None:
                inner = {n.removeprefix("model."): t for n, t in state_dict.items() if n.startswith("model.")}
            with self._as_trls():
                super()._save(str(folder), inner)
        else:
            self.processing_class.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.mtp is None or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_tensors(self.mtp.module, Path(resume_from_checkpoint))
        if self.mtp.args.trains_target:
            with self._as_trls():
                super()._load_from_checkpoint(resume_from_checkpoint, self.mtp.model)

    def _load_best_model(self) -> None:
        if self.mtp is None:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _waiting(later: Any, first: int) -> Any:
    return lambda step: 0.0 if step < first else later(step)
