"""What MTPTrainer and TRL's SFTTrainer do alike with a module beside the model: who learns, counts, losses, what is
noted, tau inside the evaluation loop, saving and loading.

One training step: collator -> compute_loss (below) -> a trainer's `_losses` -> methods/learning.py (MTPModel's forward)
-> methods/<method>.py -> ops/losses.py; the one division is in objective.py.
"""

# K depths.

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import Trainer

from foretell.checkpoint import assign, check_settings, load_tensors
from foretell.data.collate import to_batch
from foretell.mtp import MTPModel
from foretell.training.muon import MuonAdamW
from foretell.training.objective import choose_labels, coefficients, count_labels, objective
from foretell.training.tau import decoded_tau, stop_early, whole, with_estimate


class MTPTraining(Trainer, ABC):
    """Between a trainer of transformers and a subclass that says how its losses are come by (`_losses`)."""

    mtp: MTPModel | None = None  # None: nothing here does anything
    skipped = 0  # steps that were left out, their loss or gradient not finite
    share_done: float | None = None  # of the training, where a clock decides how long that is
    step_tokens = 0  # answer tokens of the current step on this rank

    def _learn_with(self, mtp: MTPModel) -> None:
        """Once, when there is a module."""
        args: Any = self.args
        self.mtp = mtp
        mtp.notes = {"training": {name: v for name, v in args.to_dict().items() if name.startswith("mtp_")}}
        mtp.stores_target |= args.trains_target
        mtp.make_trainable()
        if mtp.module.lays_masks and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            mtp.module.at_once = True
        self._counts_K1: Tensor | None = None
        self._noted: dict[str, list[Tensor]] = {}
        self._noted_steps: set[int] = set()
        self._bad_loss = False  # of this step, on this rank

    # -- who learns ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; resume_from_checkpoint=True takes the last COMPLETE checkpoint: a torn one (killed while being
        written) is passed over with a warning.
        """
        if self.mtp is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
        stop_early(self)
        with self._narrowed(self.mtp):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    @contextmanager
    def _narrowed(self, mtp: MTPModel) -> Iterator[None]:
        """While this is open only what learns asks for a gradient, of all that the user left trainable: the rest is in
        no optimizer, so nothing decays it. Afterwards all is as it was, the modes of all modules too.
        """
        learns = {"model": self.args.trains_target, "module": self.args.mtp_training_mode != "disabled"}  # type: ignore[attr-defined]
        stopped = {name for name, p in mtp.named_parameters() if p.requires_grad and not learns[name.split(".")[0]]}
        modes = {part: part.training for part in mtp.modules()}
        for name, parameter in mtp.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in stopped)
        try:
            yield
        finally:
            for name, parameter in mtp.named_parameters():  # sharding puts other parameters in their places
                if name.replace("_checkpoint_wrapped_module.", "") in stopped:
                    parameter.requires_grad_(True)
            for part, training in modes.items():
                part.training = training

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; but sharding must not make embeddings and head units of their own, whose weights are there only
        while they are called: a module reads them without.
        """
        mtp = self.mtp
        if mtp is None or not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        mtp.get_input_embeddings = mtp.get_output_embeddings = lambda: None
        try:
            return super()._prepare_for_training(*args, **kwargs)
        finally:
            del mtp.get_input_embeddings, mtp.get_output_embeddings

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As Trainer's, without the gains, biases and masks of the module, whatever they are called."""
        names = super().get_decay_parameter_names(model)
        spared = set() if self.mtp is None else {id(parameter) for parameter in self.mtp.module.undecayed()}
        never = {name for name, parameter in model.named_parameters() if id(parameter) in spared}
        return [name for name in names if name not in never]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; with mtp_learning_rate the module's parameters are groups of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.mtp is not None and self.args.mtp_muon_learning_rate is not None:  # type: ignore[attr-defined]
            optimizer = self.optimizer = self._with_muon(optimizer, self.mtp.module.matrices())
        if self.mtp is None or (self.args.mtp_learning_rate is None and not self.args.mtp_heads_first_steps):  # type: ignore[attr-defined]
            return optimizer
        mine = {id(p) for p in self.mtp.module.parameters()}
        for group in list(optimizer.param_groups):
            apart = [p for p in group["params"] if id(p) in mine and not group.get("muon")]
            if apart:
                group["params"] = [p for p in group["params"] if id(p) not in mine]
                options = {k: v for k, v in group.items() if k != "params"}
                if self.args.mtp_learning_rate is not None:  # type: ignore[attr-defined]
                    options["lr"] = self.args.mtp_learning_rate  # type: ignore[attr-defined]
                optimizer.add_param_group({**options, "params": apart, "is_mtp": True})
        optimizer.param_groups = [g for g in optimizer.param_groups if g["params"]]
        return optimizer

    def _with_muon(self, optimizer: Any, matrices: list[nn.Parameter]) -> Any:
        """The same groups, of which those matrices are apart."""
        if not matrices:
            raise ValueError("mtp_muon_learning_rate: this module has no matrix between states; leave it out.")
        if type(optimizer) is not torch.optim.AdamW or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            how = "sharded parameters" if type(optimizer) is torch.optim.AdamW else type(optimizer).__name__
            raise ValueError(
                f"mtp_muon_learning_rate: got {how}, wanted AdamW over whole parameters beside Muon "
                "(optim=adamw_torch, DDP or one process); or leave it out."
            )
        rate: float = self.args.mtp_muon_learning_rate  # type: ignore[attr-defined]
        mine, groups = {id(p) for p in matrices}, []
        for group in optimizer.param_groups:
            apart = [p for p in group["params"] if id(p) in mine]
            groups.append({**group, "params": [p for p in group["params"] if id(p) not in mine], "muon": False})
            if apart:
                factor = rate / (self.args.learning_rate or rate)
                groups.append({**group, "params": apart, "muon": True, "lr": rate, "lr_factor": factor, "is_mtp": True})
        return MuonAdamW([group for group in groups if group["params"]], **optimizer.defaults)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As Trainer's; the model's own learning rate is zero during mtp_heads_first_steps."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        first = 0 if self.mtp is None else self.args.mtp_heads_first_steps  # type: ignore[attr-defined]
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

    # -- the step ------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """The trainer's own count; beside it, those of the depths over the whole step: every micro-batch, every
        rank."""
        if self.mtp is not None:
            self._bad_loss, self._counts_K1 = False, None
            labelled = [inputs for inputs in batch_samples if "labels" in inputs]
            choose_labels(self.mtp.module, labelled, self.args.seed, self.state.global_step, self.args.process_index)
            counts = [self._count(inputs) for inputs in labelled]
            if counts:
                counts_K1 = torch.stack(counts).sum(0)
                self.step_tokens = int(counts_K1[0])
                self._counts_K1 = counts_K1.to(device)
                if self.args.average_tokens_across_devices and self.args.world_size > 1:
                    self._counts_K1 = self.accelerator.gather(self._counts_K1[None]).sum(0)
        return super()._get_num_items_in_batch(batch_samples, device)

    def _count(self, inputs: dict[str, Any]) -> Tensor:
        """[1 + K] of one micro-batch. A teacher is asked in every labelled place, drafted label or not; where its
        choice is no draft token the row adds nothing, but it counts, since counts are known before any forward.
        """
        mtp = self.mtp
        assert mtp is not None
        given = self.args.mtp_supervision in ("labels", "student_forced_gt")  # type: ignore[attr-defined]
        ids = mtp.module.draft_vocab_ids if given else None
        return count_labels(to_batch(inputs), mtp.mtp_config.depth, ids, mtp.target.vocab_size, self._anchored())

    def _divisors(self, inputs: dict[str, Any], num_items_in_batch: Any) -> tuple[Tensor, bool]:
        """(the counts [1 + K] that a micro-batch's sums are divided by, whether they are of all ranks)."""
        if num_items_in_batch is None:
            return self._count(inputs), False
        assert self._counts_K1 is not None
        return self._counts_K1, self.args.average_tokens_across_devices

    def _anchored(self) -> bool:
        assert self.mtp is not None
        args: Any = self.args
        return self.mtp.module.anchored(args.mtp_supervision, args.mtp_training_mode == "joint")

    @abstractmethod
    def _losses(
        self, model: nn.Module, inputs: dict[str, Any], counts_K1: Tensor, num_items: Any, outputs: bool, ranks: int
    ) -> dict[str, Any]:
        """What MTPModel.forward returns, by whatever way the trainer comes to its next-token loss; `outputs` of the
        user's model where they are asked for. ranks: what a loss is multiplied by that is divided by counts of all.
        "own" among them is a loss that is whole already: it is added as it is, so that its gradients are its own.
        """

    def _forward_arguments(self, counts_K1: Tensor) -> dict[str, Any]:
        """Of MTPModel.forward, in this step."""
        args: Any = self.args
        first = args.mtp_training_mode == "joint" and self.state.global_step < args.mtp_heads_first_steps
        return {
            "mtp_training_mode": "standalone" if first else args.mtp_training_mode,
            "mtp_supervision": args.mtp_supervision,
            "mtp_loss": args.mtp_loss,
            "train_target": args.trains_target,
            "stay": args.mtp_target_loss == "untouched",
            "mtp_coefficients": coefficients(
                counts_K1, scale=args.mtp_scale, anchored=self._anchored(), **self._weighing()
            ),
            "mtp_dynamic": args.mtp_depth_weights == "dpace",
            "mtp_depths": self._depths(),
        }

    def _weighing(self) -> dict[str, Any]:
        return {**self.args.weighing(), "depths": self._depths()}  # type: ignore[attr-defined]

    def _depths(self) -> int | None:
        """How many depths learn now; None: all."""
        assert self.mtp is not None
        done = self.state.global_step / max(self.state.max_steps, 1) if self.share_done is None else self.share_done
        return 1 if self.mtp.training and done < self.args.mtp_depth_one_first else None  # type: ignore[attr-defined]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the step's loss (see objective), or without num_items_in_batch its own mean."""
        args: Any = self.args
        if self.mtp is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        training = self.mtp.training
        if training and args.trains_target:
            _unpack(self.mtp.model)
        counts_K1, shared = self._divisors(inputs, num_items_in_batch)
        ranks = self.accelerator.num_processes // self.get_tp_size() if shared else 1  # ranks are averaged
        losses = self._losses(model, inputs, counts_K1, num_items_in_batch, return_outputs, ranks)
        scale = 0.0 if args.mtp_training_mode == "disabled" else args.mtp_scale
        loss, parts = objective(losses, counts_K1, scale=scale, **self._weighing())
        loss = loss * ranks
        if losses.get("own") is not None:
            loss = loss + losses["own"]
        if training and not bool(loss.isfinite()):
            loss = self._not_finite(loss)
        parts["train"] = loss.detach() / ranks
        self._note(parts, losses["mtp"], training, weight=1.0 if shared else 1.0 / self.args.world_size)
        return (loss, losses["outputs"]) if return_outputs else loss

    def _not_finite(self, loss: Tensor) -> Tensor:
        """Stop, or let every gradient of this step be NaN, on every rank: no step is made of that."""
        if self.args.nonfinite_loss == "stop":  # type: ignore[attr-defined]
            raise FloatingPointError(
                f"step {self.state.global_step}: the loss is {float(loss.detach())}. Look at the batch or lower the "
                "learning rate; nonfinite_loss=skip leaves such steps out and counts them. Checkpoints are untouched."
            )
        warnings.warn(f"step {self.state.global_step}: loss {float(loss.detach())}, batch skipped.", stacklevel=2)
        self._bad_loss = True
        return loss * torch.nan

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Target and module are clipped apart, so that the target's step is the same with and without MTP."""
        if self.mtp is None:
            return super()._clip_grad_norm(model)
        norms = []
        for part in (self.mtp.model, self.mtp.module):
            parameters = [p for p in part.parameters() if p.requires_grad]
            if parameters:  # the first call takes back fp16's loss scale, from all gradients, which happens only once
                clip = torch.nn.utils.clip_grad_norm_ if norms else self.accelerator.clip_grad_norm_
                norms.append(clip(parameters, self.args.max_grad_norm))
        return norms[-1] if len(norms) == 1 else torch.stack([torch.as_tensor(n) for n in norms]).norm()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As Trainer's; a step whose gradient is not finite ends the run or leaves everything as it was."""
        norm = super()._get_grad_norm(model, grad_norm)
        # a loss scale that was too high is fp16's own business
        if self.mtp is None or norm is None or (self.accelerator.scaler is not None and not self._bad_loss):
            return norm
        if not bool(torch.isfinite(_whole(norm))):
            if self.args.nonfinite_loss == "stop":  # type: ignore[attr-defined]
                raise FloatingPointError(
                    f"step {self.state.global_step}: the gradient's norm is {float(_whole(norm))}. Lower the learning "
                    "rate; nonfinite_loss=skip leaves such steps out and counts them. Checkpoints are untouched."
                )
            self.skipped += 1
            model.zero_grad()  # parameters without a gradient are not stepped, nor decayed
            return 0.0
        return norm

    # -- what is noted -------------------------------------------------------------------------------------------------

    def _note(self, parts: dict[str, Tensor], depths: list, training: bool, weight: float) -> None:
        """weight: what makes the sum over ranks of these values the value of all. Ranks note the same names."""
        kind = "train" if training else "eval"
        if training:
            self._noted_steps.add(self.state.global_step)
        values = {f"{name}_loss": part.nan_to_num(0.0, 0.0, 0.0) * weight for name, part in parts.items()}
        values |= {f"accuracy_{k}": torch.stack([x.correct, x.count]) for k, x in enumerate(depths, start=1)}
        for name, value in values.items():
            self._noted.setdefault(f"{kind} {name}", []).append(value.detach().float().reshape(-1))

    def _take_notes(self, kind: str) -> dict[str, float]:
        """Means of what was noted: each micro-batch of each rank holds its share of a step's mean."""
        taken = {name.split()[1]: self._noted.pop(name) for name in list(self._noted) if name.startswith(kind)}
        if not taken:
            return {}
        sums = self.accelerator.reduce(torch.cat([torch.stack(v).sum(0) for v in taken.values()]), "sum")
        out = {}
        for (name, values), found in zip(taken.items(), sums.split([len(v[0]) for v in taken.values()]), strict=True):
            steps = len(self._noted_steps) if kind == "train" else len(values)
            if len(found) == 2 and not bool(found[1]):
                continue  # a depth that nothing was asked of
            out[name] = float(found[0] / found[1].clamp(min=1)) if len(found) == 2 else float(found[0]) / steps
        if kind == "train":
            self._noted_steps = set()
        else:
            out.pop("train_loss")
        return out

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss and each depth's accuracy (teacher-forced: tau is measured by decoding)."""
        if self.mtp is not None and "loss" in logs:
            logs.update(self._take_notes("train"))
            if self.skipped:
                logs["skipped_batches"] = self.skipped
        super().log(logs, start_time)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """The trainer's, and among its metrics, before anybody reads them, the parts of the loss and what decoding the
        prompts of these rows gives: tau, accept_at and accept_given.
        """
        if self.mtp is not None:
            self._take_notes("eval")  # of a loop that was not brought to its end
        out = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.mtp is not None:
            found = self._take_notes("eval")
            if description == "Evaluation":
                own = 1 + (self.mtp.module.usual_layout == "two_pass")
                found = with_estimate(found | self.measure_tau(dataloader.dataset), own)
            out.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return out

    def measure_tau(self, rows: Any = None) -> dict[str, float]:
        """Decode the first eval_prompts prompts of these rows (the evaluation set's, or the first of several)
        greedily with the module; empty if there are none. Under FSDP2 one rank does, of gathered weights.
        """
        args: Any = self.args
        if (self.is_fsdp_enabled and not self.accelerator.is_fsdp2) or self.is_deepspeed_enabled:
            warnings.warn("tau is not measured under FSDP1 and DeepSpeed: decode the saved module.", stacklevel=2)
            return {}
        assert self.mtp is not None
        rows = self.eval_dataset if rows is None else rows
        rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
        while isinstance(rows, IterableDatasetShard):  # every rank decodes the same prompts
            rows = rows.dataset
        mine = self.accelerator.is_main_process or not self.accelerator.is_fsdp2
        with whole(self.model, self.accelerator):
            found = [decoded_tau(self.mtp, rows, args.eval_prompts, args.eval_new_tokens) if mine else {}]
        return broadcast_object_list(found)[0] if self.accelerator.num_processes > 1 else found[0]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        of_tau = self.args.metric_for_best_model in ("tau", "eval_tau")
        if self.mtp is not None and of_tau and "eval_tau" not in metrics:
            if self.args.load_best_model_at_end:
                several = ", ".join(name for name in metrics if name.endswith("_tau"))
                how = f"measured as {several}: name one in metric_for_best_model" if several else "not measured"
                warnings.warn(f"tau was {how}; so there is no best checkpoint by tau.", stacklevel=2)
            return False
        return super()._determine_best_metric(metrics, trial)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The module's two files, the tokenizer and, if the target learns, the target as its own class stores it."""
        if self.mtp is None:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            self.mtp.save_pretrained(folder, state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        mtp = self.mtp
        if mtp is None or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        check_settings(mtp.mtp_config, resume_from_checkpoint)
        load_tensors(mtp.module, resume_from_checkpoint)
        if not self.args.trains_target:  # type: ignore[attr-defined]
            return
        if hasattr(mtp.model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, mtp.model)
        else:  # in fp32, which holds what any parameter was stored as
            saved = type(mtp.model).from_pretrained(resume_from_checkpoint, dtype=torch.float32)  # type: ignore[attr-defined]
            assign(mtp.model, saved.state_dict(), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.mtp is None:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def problems_with(mtp: MTPModel, args: Any, loss_function: Any) -> list[str]:
    """What of these arguments this model cannot learn by, in plain sentences."""
    found = []
    asked = ["compute_loss_func"] if loss_function is not None else []
    asked += ["label_smoothing_factor"] if args.label_smoothing_factor else []
    joint = args.mtp_training_mode == "joint"
    for name in asked:
        if not args.trains_target:
            found.append(f"{name}: it is about the next-token loss, which nobody learns here; leave it out")
        elif args.mtp_target_loss == "untouched":
            found.append(f"{name}: with mtp_target_loss='untouched' nobody learns the labels; give one of them")
        elif mtp.module.anchored(args.mtp_supervision, joint) or mtp.module.text_learns(joint=False):
            found.append(f"{name}: tokens that carry masks have a loss of their own here; leave it out")
    # a model that another trainer has had may still have it on; who is read in eval mode never uses it
    already = args.trains_target and any(getattr(m, "gradient_checkpointing", False) for m in mtp.model.modules())
    if mtp.module.lays_masks and (args.gradient_checkpointing or already):
        found.append(
            "gradient_checkpointing: with mask tokens a smaller chunk_size bounds memory, exactly; turn it off"
        )
    if args.trains_target:
        found += _target_problems(mtp)
    if args.mtp_target_loss == "untouched" and not hasattr(mtp.model, "disable_adapter"):
        found.append("mtp_target_loss: 'untouched' is the model with its adapter off, so give it one (peft)")
    return found


def _target_problems(mtp: MTPModel) -> list[str]:
    learning = {name: p for name, p in mtp.model.named_parameters() if p.requires_grad}
    if not learning:
        return ["no parameter of the model asks for a gradient: unfreeze some (SFT: or mtp_training_mode='standalone')"]
    if not hasattr(mtp.model, "peft_config"):
        return []
    if not hasattr(mtp.model, "get_base_model"):
        return ["adapters of add_adapter cannot be resumed: make them with peft.get_peft_model"]
    from peft import get_peft_model_state_dict

    model: Any = mtp.model
    states = [get_peft_model_state_dict(model, adapter_name=name) for name in model.peft_config]
    kept = {tensor.data_ptr() for state in states for tensor in state.values()}
    lost = [name for name, p in learning.items() if p.data_ptr() not in kept]
    if lost:
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        return [f"{shown}: trainable, but PEFT would not store it; freeze it or name it in modules_to_save"]
    return []


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


def _unpack(model: nn.Module) -> None:
    """Take back what bitsandbytes does to four-bit weights in a forward in eval mode, of an evaluation or before the
    run: on some CPUs it repacks them for a kernel without a backward, for good, but for what it stores.
    """
    for part in model.modules():
        state = getattr(getattr(part, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            part._save_to_state_dict({}, "", True)


def _waiting(later: Any, first: int) -> Any:
    return lambda step: 0.0 if step < first else later(step)


def _whole(norm: Any) -> Tensor:
    return norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
