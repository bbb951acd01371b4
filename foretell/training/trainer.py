"""MTPTrainer: transformers' Trainer with the MTP objective. Everything else (DDP, FSDP2, DeepSpeed, resume, loggers)
is its.

One training step: collator -> compute_loss (below) -> MTPModel.forward -> methods/<method>.py -> ops/losses.py.
"""

# B sequences, T positions, K depths.

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from foretell.checkpoint import assign, check_settings, load_tensors
from foretell.data.collate import MTPCollator, pack, to_batch
from foretell.data.formats import load_rows
from foretell.data.prompts import encode_rows
from foretell.methods.base import REREADS, SOFT, DepthWeights, GradientMode, LossKind, Supervision
from foretell.models.target import Target
from foretell.mtp import MTPModel
from foretell.runtime import Progress
from foretell.training.budget import TimeBudget
from foretell.training.objective import choose_labels, coefficients, count_labels, objective
from foretell.training.tau import decoded_tau


@dataclass
class MTPTrainingArguments(TrainingArguments):
    """TrainingArguments plus what the MTP objective needs. Nothing of the parent changes but the defaults named
    here."""

    output_dir: str | None = field(default=None, metadata={"help": "Where checkpoints and the final module go."})
    learning_rate: float = field(
        default=1e-3, metadata={"help": "A new one-layer module learns best near 1e-3 to 4e-3."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Our collator reads the columns it needs."})
    metric_for_best_model: str | None = field(
        default="tau", metadata={"help": "The best checkpoint is the best by tau."}
    )
    disable_tqdm: bool | None = field(default=True, metadata={"help": "foretell reports progress itself."})
    mtp_training_mode: GradientMode = field(
        default="standalone", metadata={"help": "disabled, standalone (the target is untouched to the bit) or joint."}
    )
    mtp_supervision: Supervision = field(
        default="labels",
        metadata={
            "help": "labels, teacher (the target's distribution), teacher_hard (its argmax), or, of the module's own "
            "proposals, student_forced (the target's argmax), student_forced_soft or student_forced_gt (the data)."
        },
    )
    mtp_loss: LossKind = field(default="ce", metadata={"help": "ce, kl, reverse_kl or tv; labels take ce only."})
    mtp_loss_scaling_factor: float | None = field(
        default=None, metadata={"help": "Weight of the MTP loss beside the next-token loss; 0.1 in joint, else 1."}
    )
    mtp_depth_weights: DepthWeights = field(
        default="uniform",
        metadata={"help": "uniform, harmonic, exponential, or rows (every counted prediction alike)."},
    )
    mtp_depth_beta: float = field(default=0.6, metadata={"help": "Base of exponential depth weights (FastMTP: 0.6)."})
    train_target: bool | None = field(
        default=None,
        metadata={"help": "Also train the target on its next-token loss; by default in joint and disabled, not else."},
    )
    max_length: int | None = field(default=1024, metadata={"help": "Longest row in tokens; longer ones are cut."})
    packing: bool = field(default=False, metadata={"help": "Pack several documents into rows of max_length."})
    assistant_only_loss: bool = field(
        default=True, metadata={"help": "Train on the assistant's tokens of a chat only."}
    )
    skip_bad_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows that cannot be encoded; they are counted, the first named."},
    )
    nonfinite_loss: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "A batch whose loss is not finite: stop, or skip it and count it."}
    )
    eval_prompts: int = field(default=16, metadata={"help": "Prompts decoded at each evaluation to measure tau."})
    eval_new_tokens: int = field(default=64, metadata={"help": "New tokens of each of them."})

    def problems(self) -> list[str]:
        """What is wrong with these settings, in plain sentences."""
        found = []
        if self.mtp_supervision not in SOFT and self.mtp_loss != "ce":
            found.append(
                f"mtp_loss: {self.mtp_loss} needs a distribution; with mtp_supervision={self.mtp_supervision} use ce."
            )
        if self.mtp_loss_scaling_factor is not None and self.mtp_loss_scaling_factor < 0:
            found.append(f"mtp_loss_scaling_factor: got {self.mtp_loss_scaling_factor}, wanted at least 0.")
        if self.mtp_training_mode == "joint" and self.train_target is False:
            found.append("train_target: false contradicts mtp_training_mode=joint; use standalone.")
        if self.mtp_training_mode == "disabled" and self.train_target is False:
            found.append("train_target: false with mtp_training_mode=disabled leaves nothing to train.")
        if self.max_length is not None and self.max_length < 3:
            found.append(f"max_length: got {self.max_length}, wanted at least 3 tokens.")
        if self.packing and self.max_length is None:
            found.append("packing needs max_length: the length of a packed row.")
        return found

    @property
    def trains_target(self) -> bool:
        """Whether the target's own parameters learn."""
        if self.train_target is not None:
            return self.train_target
        return self.mtp_training_mode != "standalone"

    @property
    def mtp_scale(self) -> float:
        """Weight of the MTP loss."""
        if self.mtp_loss_scaling_factor is not None:
            return self.mtp_loss_scaling_factor
        return 0.1 if self.mtp_training_mode == "joint" else 1.0


class MTPTrainer(Trainer):
    """Trains an MTPModel. Rows in TRL's forms need processing_class (the tokenizer); ready input_ids do not.

    teacher_model: who reads the proposals of student_forced; by default the target, and where the whole target learns a
    frozen copy of it as it is when the trainer is made. To go on with a model that is trained already, give the
    original.
    """

    def __init__(
        self,
        model: MTPModel,
        args: MTPTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        teacher_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, MTPModel):
            raise ValueError(f"model: got {type(model).__name__}, wanted an MTPModel (foretell.get_mtp_model).")
        problems = args.problems() + teacher_problems(model, args, teacher_model)
        if args.gradient_checkpointing and model.module.lays_masks:
            problems.append("gradient_checkpointing: with mask tokens a smaller chunk_size bounds memory, exactly.")
        if problems:
            raise ValueError("; ".join(problems))
        if args.resume_from_checkpoint is None and args.output_dir is None:
            raise ValueError("output_dir: got none, wanted a folder for checkpoints.")
        self.too_short = 0  # training rows that were skipped
        train_rows = self._encode(train_dataset, processing_class, args, model, "train_dataset")
        eval_rows = self._encode(eval_dataset, processing_class, args, model, "eval_dataset")
        self._freeze(model, args)
        model.notes = {"training": {k: v for k, v in args.to_dict().items() if k.startswith("mtp_")}}
        shortest = model.mtp_config.depth + 2
        kwargs.setdefault("data_collator", MTPCollator(_pad_token(processing_class, model), min_length=shortest))
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            **kwargs,
        )
        if model.module.lays_masks and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            model.module.whole = True
        if teacher_model is None and args.trains_target and args.mtp_supervision in REREADS:
            teacher_model = copy.deepcopy(model.model)  # as it is now: a resumed run starts from the same one
        if teacher_model is not None:
            model.module.teacher = Target(teacher_model.to(model.device).eval().requires_grad_(False))
        self.loss_is_scaled_for_ga = True  # objective() divides by counts of the whole accumulated step
        self.can_return_loss = True
        self._logged: dict[str, list[Tensor]] = {}
        self._logged_steps: set[int] = set()
        self.skipped = 0  # micro-batches of this rank whose loss was not finite
        self.step_tokens = 0  # answer tokens of the current step on this rank
        self.remove_callback(PrinterCallback)
        if args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            if not any(isinstance(callback, TimeBudget) for callback in self.callback_handler.callbacks):
                self.add_callback(_Report())

    # -- data and parameters -------------------------------------------------------------------------------------------

    def _encode(self, dataset: Any, tokenizer: Any, args: MTPTrainingArguments, model: MTPModel, what: str) -> Any:
        if dataset is None:
            return None
        if tokenizer is None and any("input_ids" not in row for row in load_rows(dataset)[:1]):
            raise ValueError(f"{what}: text needs processing_class (the tokenizer); or give rows with input_ids.")
        limit = args.max_length or 2**31
        out, self.encoding = encode_rows(
            dataset, tokenizer, limit, args.assistant_only_loss, model.target.vocab_size, args.skip_bad_rows
        )
        longest = max((len(row["input_ids"]) for row in out), default=0)
        if longest < model.mtp_config.depth + 2:
            raise ValueError(
                f"{what}: the longest of {len(out)} usable rows has {longest} tokens, but depth "
                f"{model.mtp_config.depth} needs at least {model.mtp_config.depth + 2}: give longer rows "
                "or a smaller depth."
            )
        shortest = model.module.shortest_text
        long_enough = [row for row in out if len(row["input_ids"]) >= shortest]
        if len(long_enough) < len(out) and what == "train_dataset":
            if not long_enough:
                raise ValueError(
                    f"{what}: the longest of {len(out)} usable rows has {longest} tokens, a region has {shortest}: "
                    "give longer rows, or more regions or smaller region_tokens."
                )
            if args.process_index == 0:
                print(f"{what}: {len(out) - len(long_enough)} of {len(out)} rows are shorter than a region of "
                      f"{shortest} tokens and are skipped.", flush=True)  # fmt: skip
            self.too_short, out = len(out) - len(long_enough), long_enough
        return pack(out, args.max_length) if args.packing and what == "train_dataset" else out

    @staticmethod
    def _freeze(model: MTPModel, args: MTPTrainingArguments) -> None:
        """Only what learns asks for a gradient; parameters that do not are in no optimizer, so nothing decays them."""
        for parameter in model.model.parameters():
            parameter.requires_grad_(args.trains_target)
        model.make_trainable(args.mtp_training_mode != "disabled")

    # -- the step ------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """[1 + K] counts of the whole optimizer step: every micro-batch, every rank."""
        mtp = self._mtp()
        choose_labels(mtp.module, batch_samples, self.args.seed, self.state.global_step, self.args.process_index)
        counts_K1 = sum(
            count_labels(
                to_batch(inputs), mtp.mtp_config.depth, self._draft_ids(), mtp.target.vocab_size, self._anchored()
            )
            for inputs in batch_samples
        )
        if not torch.is_tensor(counts_K1):  # an empty iterator
            return torch.zeros(1 + mtp.mtp_config.depth, device=device)
        self.step_tokens = int(counts_K1[0])
        counts_K1 = counts_K1.to(device)
        if self.args.world_size > 1:
            counts_K1 = self.accelerator.gather(counts_K1[None]).sum(0)
        return counts_K1

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """See objective: this micro-batch's share of the step's loss."""
        args: MTPTrainingArguments = self.args  # type: ignore[assignment]
        training, mtp = model.training, self._mtp()
        if num_items_in_batch is None:  # evaluation: this batch alone
            num_items_in_batch = count_labels(
                to_batch(inputs), mtp.mtp_config.depth, self._draft_ids(), mtp.target.vocab_size, self._anchored()
            )
        weighing: dict[str, Any] = {"weights": args.mtp_depth_weights, "beta": args.mtp_depth_beta}
        losses = model(
            mtp_training_mode=args.mtp_training_mode,
            mtp_supervision=args.mtp_supervision,
            mtp_loss=args.mtp_loss,
            train_target=args.trains_target,
            mtp_coefficients=coefficients(
                num_items_in_batch, scale=args.mtp_scale, anchored=self._anchored(), **weighing
            ),
            **inputs,
        )
        loss, parts = objective(losses, num_items_in_batch, scale=args.mtp_scale, **weighing)
        if not training:
            loss = args.mtp_scale * parts["mtp"] + parts.get("ntp", 0.0)
        elif not bool(loss.isfinite()):
            return self._not_finite(loss)
        self._note(losses, parts, training)
        if self.accelerator.num_processes > 1:
            loss = loss * self.accelerator.num_processes  # ranks are averaged; the counts are global already
        return (loss, losses) if return_outputs else loss

    def _not_finite(self, loss: Tensor) -> Tensor:
        """Stop, or a loss without any gradient in this one's place: every rank still takes part in the step."""
        self.skipped += 1
        if self.args.nonfinite_loss == "stop":  # type: ignore[attr-defined]
            raise FloatingPointError(
                f"step {self.state.global_step}: the loss is {float(loss)}. Look at the batch or lower the learning "
                "rate; --nonfinite-loss skip leaves such batches out and counts them. Checkpoints are untouched."
            )
        warnings.warn(f"step {self.state.global_step}: loss {float(loss)}, batch skipped.", stacklevel=2)
        return sum((p.sum() * 0.0 for p in self._mtp().parameters() if p.requires_grad), loss.new_zeros(()))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Target and module are clipped apart, so that the target's step is the same with and without MTP."""
        mtp = self._mtp()
        norms = []
        for part in (mtp.model, mtp.module):
            parameters = [p for p in part.parameters() if p.requires_grad]
            if parameters:  # the first call takes back fp16's loss scale, from all gradients, which happens only once
                clip = torch.nn.utils.clip_grad_norm_ if norms else self.accelerator.clip_grad_norm_
                norms.append(clip(parameters, self.args.max_grad_norm))
        return norms[-1] if len(norms) == 1 else torch.stack([torch.as_tensor(n) for n in norms]).norm()

    # -- what is logged ------------------------------------------------------------------------------------------------

    def _note(self, losses: dict[str, Any], parts: dict[str, Tensor], training: bool) -> None:
        kind = "" if training else "eval_"
        if training:
            self._logged_steps.add(self.state.global_step)
        for name, part in parts.items():
            self._logged.setdefault(f"{kind}{name}_loss", []).append(part)
        for k, loss in enumerate(losses["mtp"], start=1):
            self._logged.setdefault(f"{kind}hit_{k}", []).append(torch.stack([loss.correct, loss.count]).detach())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss and each depth's accuracy (teacher-forced: tau is measured by decoding)."""
        kind = "eval_" if any(key.startswith("eval_") for key in logs) else ""
        for name in [n for n in self._logged if n.startswith("eval_") == bool(kind)]:
            values = torch.stack(self._logged.pop(name)).float()
            sums = values.sum(0)
            if self.accelerator.num_processes > 1:
                sums = self.accelerator.reduce(sums, "sum")
            if "hit_" in name:
                logs[name.replace("hit_", "accuracy_")] = float(sums[0] / sums[1].clamp(min=1))
            else:  # each micro-batch of each rank holds its share of a step's mean
                logs[name] = float(sums / (len(values) if kind else len(self._logged_steps)))
        if not kind:
            self._logged_steps = set()
            if self.skipped:
                logs["skipped_batches"] = self.skipped
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Losses on the evaluation rows, and tau, accept_at and accept_given by decoding their prompts."""
        metrics = super().evaluate(*args, **kwargs)
        found = self.measure_tau()
        if found:
            metrics.update({f"eval_{name}": value for name, value in found.items()})
            self.log({f"eval_{name}": value for name, value in found.items()})
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if self.args.metric_for_best_model in ("tau", "eval_tau") and "eval_tau" not in metrics:
            if self.args.load_best_model_at_end:
                warnings.warn("tau was not measured, so there is no best checkpoint by tau.", stacklevel=2)
            return False
        return super()._determine_best_metric(metrics, trial)

    def measure_tau(self) -> dict[str, float]:
        """Decode the first eval_prompts prompts greedily with the module; empty if there are none, or under
        sharding."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            warnings.warn(
                "tau is not measured while parameters are sharded: decode the saved module instead.", stacklevel=2
            )
            return {}
        args: MTPTrainingArguments = self.args  # type: ignore[assignment]
        return decoded_tau(self._mtp(), self.eval_dataset, args.eval_prompts, args.eval_new_tokens)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _mtp(self) -> MTPModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _anchored(self) -> bool:
        args: MTPTrainingArguments = self.args  # type: ignore[assignment]
        return self._mtp().module.anchored(args.mtp_supervision, args.mtp_training_mode == "joint")

    def _draft_ids(self) -> Tensor | None:
        # a teacher is asked in every labelled place, drafted label or not; where its choice is no draft token the row
        # adds nothing, but it counts, since counts are known before any forward
        if self.args.mtp_supervision not in ("labels", "student_forced_gt"):  # type: ignore[attr-defined]
            return None
        return getattr(self._mtp().module, "draft_vocab_ids", None)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The module's two files, the tokenizer and, if the target learns, the target as a transformers folder."""
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        mtp = self._mtp()
        mtp.save_pretrained(folder, state_dict=state_dict)
        if self.args.trains_target:  # type: ignore[attr-defined]
            target_state = None
            if state_dict is not None:
                target_state = {n.removeprefix("model."): t for n, t in state_dict.items() if n.startswith("model.")}
            mtp.model.save_pretrained(folder, state_dict=target_state)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        mtp, folder = self._mtp(), Path(resume_from_checkpoint)
        check_settings(mtp.mtp_config, folder)
        load_tensors(mtp.module, folder)
        if self.args.trains_target:  # type: ignore[attr-defined]
            saved = type(mtp.model).from_pretrained(folder, dtype=mtp.target.dtype)
            assign(mtp.model, saved.state_dict(), str(folder))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer's; resume_from_checkpoint=True takes the last COMPLETE checkpoint: a torn one (killed while being
        written) is passed over with a warning.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint-N that was written to its end (trainer_state.json comes last), or None."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.split("-")[1].isdigit()]
    for folder in sorted(found, key=lambda p: -int(p.name.split("-")[1])):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            return str(folder)
        except (OSError, json.JSONDecodeError):
            warnings.warn(f"{folder} was not written to its end and is passed over.", stacklevel=2)
    return None


def teacher_problems(model: MTPModel, args: MTPTrainingArguments, teacher_model: nn.Module | None) -> list[str]:
    """What is wrong with a teacher that was given, in plain sentences."""
    if teacher_model is None:
        return []
    found, wanted = Target(teacher_model).vocab_size, model.target.vocab_size
    if args.mtp_supervision not in REREADS:
        return [f"teacher_model: mtp_supervision={args.mtp_supervision} asks none; use student_forced or leave it out."]
    if model.module.lays_masks and not model.module.text_learns(args.mtp_training_mode == "joint"):
        return ["teacher_model: behind gated adapters the text is the target's, who is its teacher; leave it out."]
    if found != wanted:
        return [
            f"teacher_model: got a vocabulary of {found} tokens, the student has {wanted}: proposals mean nothing to "
            "it. Give the model that the student was made from."
        ]
    return []


def _pad_token(tokenizer: Any, model: MTPModel) -> int:
    for source in (tokenizer, model.config):
        pad = getattr(source, "pad_token_id", None)
        if pad is not None:
            return int(pad)
    return 0


class _Report(TrainerCallback):
    """A bar with loss, accuracy and tau on a terminal; plain lines elsewhere."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._fields: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._bar = Progress("train", total=state.max_steps, unit="step")
            self._bar.__enter__()
            self._at = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        names = {"loss": "loss", "accuracy_1": "acc1", "eval_tau": "tau", "learning_rate": "lr"}
        self._fields.update({names[k]: v for k, v in (logs or {}).items() if k in names})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._at, **self._fields)
            self._at = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
