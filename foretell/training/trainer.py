"""MTPTrainer: transformers' Trainer with the MTP objective. Everything else (DDP, FSDP2, DeepSpeed, resume, loggers)
is its; what it has in common with TRL's trainer is in mtp_training.py, one training step among it.
"""

# B sequences, T positions, K depths.

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from foretell.data.cache import HiddenStore
from foretell.data.collate import MTPCollator, pack, to_batch
from foretell.data.formats import Part, Rows, load_rows
from foretell.data.prompts import Encoded, encode_rows
from foretell.methods.base import REREADS
from foretell.models.target import Target
from foretell.mtp import MTPModel
from foretell.runtime import Progress
from foretell.training.arguments import MTPArguments
from foretell.training.budget import TimeBudget
from foretell.training.draft_vocabulary import choose_draft_vocabulary
from foretell.training.mtp_training import MTPTraining, problems_with
from foretell.types import LossSum

STREAM_ROWS = 64  # rows of a stream that are encoded, and packed, at a time


@dataclass
class MTPTrainingArguments(MTPArguments, TrainingArguments):
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
    num_proc: int | None = field(default=None, metadata={"help": "Processes that encode rows."})

    def problems(self) -> list[str]:
        """See MTPArguments."""
        found = super().problems()
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
        """See MTPArguments."""
        return super().trains_target if self.train_target is None else self.train_target


class MTPTrainer(MTPTraining):
    """Trains an MTPModel. Rows in TRL's forms need processing_class (the tokenizer); ready input_ids do not.

    train_dataset may be a stream (with max_steps), eval_dataset too, or a dict of several. With evaluation rows and
    eval_strategy left at "no" each save evaluates, and the best checkpoint by tau is loaded at the end.

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
        problems += problems_with(model, args, kwargs.get("compute_loss_func"))
        if _is_stream(train_dataset) and args.max_steps <= 0:
            problems.append("max_steps: got none, wanted a number of steps: a stream has no length.")
        if problems:
            raise ValueError("; ".join(problems))
        if args.resume_from_checkpoint is None and args.output_dir is None:
            raise ValueError("output_dir: got none, wanted a folder for checkpoints.")
        self.mtp, self.too_short = model, 0  # training rows that were skipped
        self._encode = partial(_encode, model.target.vocab_size, processing_class, args)
        train_rows = self._encoded(train_dataset, args, "train_dataset")
        several = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        rows = {name: self._encoded(some, args, f"eval_dataset {name}".strip()) for name, some in several.items()}
        eval_rows = rows if isinstance(eval_dataset, dict) else rows[""]
        if model.module.chooses_vocabulary:  # a stream is not read for it
            sets = [[] if some is None or _is_stream(some) else some for some in (train_rows, *rows.values())]
            said = choose_draft_vocabulary(model, processing_class, sets[0], itertools.chain.from_iterable(sets[1:]))
            if args.process_index == 0:
                print(said, flush=True)
        if eval_rows is not None and args.eval_strategy == "no" and args.save_strategy in ("steps", "epoch"):
            args.eval_strategy, args.eval_steps = type(args.eval_strategy)(args.save_strategy.value), args.save_steps
            args.load_best_model_at_end = not isinstance(eval_rows, dict) and args.eval_prompts > 0
        # kept states are those of a target that stays what it was
        collator = MTPCollator(_pad_token(processing_class, model), not args.trains_target, None, self._shortest)
        kwargs.setdefault("data_collator", collator)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            **kwargs,
        )
        self._learn_with(model)
        if teacher_model is None and args.trains_target and args.mtp_supervision in REREADS:
            teacher_model = copy.deepcopy(model.model)  # as it is now: a resumed run starts from the same one
        if teacher_model is not None:
            model.module.teacher = Target(teacher_model.to(model.device).eval().requires_grad_(False))
        self.loss_is_scaled_for_ga = True  # objective() divides by counts of the whole accumulated step
        self.model_accepts_loss_kwargs = True  # so these are counted
        self.label_names, self._loss_shifts_labels = ["labels"], True
        self._logits_asked = True
        self.remove_callback(PrinterCallback)
        if args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            if not any(isinstance(callback, TimeBudget) for callback in self.callback_handler.callbacks):
                self.add_callback(_Report())

    # -- data ----------------------------------------------------------------------------------------------------------

    @property
    def _shortest(self) -> int:
        assert self.mtp is not None
        return self.mtp.mtp_config.depth + 2

    def _encoded(self, dataset: Any, args: MTPTrainingArguments, what: str) -> Any:
        if dataset is None:
            return None
        mtp = self.mtp
        assert mtp is not None
        train = what == "train_dataset"
        length = args.max_length if args.packing and train else None
        region = mtp.module.shortest_text
        if _is_stream(dataset):
            return _Stream(dataset, self._encode, length, max(self._shortest, region))
        _check_store(dataset, args, mtp, what)
        dataset = dataset if isinstance(dataset, Encoded) else load_rows(dataset, skip_bad=args.skip_bad_rows)
        if self._encode.args[1] is None and any("input_ids" not in row for row in dataset[:1]):
            raise ValueError(f"{what}: text needs processing_class (the tokenizer); or give rows with input_ids.")
        out, self.encoding = self._encode(dataset)
        longest = int(out.lengths.max())
        if longest < self._shortest:
            raise ValueError(
                f"{what}: the longest of {len(out)} usable rows has {longest} tokens, but depth "
                f"{mtp.mtp_config.depth} needs at least {self._shortest}: give longer rows or a smaller depth."
            )
        long_enough = out.part(out.lengths >= region) if region and train else out
        if len(long_enough) < len(out):
            if not long_enough:
                raise ValueError(
                    f"{what}: the longest of {len(out)} usable rows has {longest} tokens, a region has {region}: "
                    "give longer rows, or more regions or smaller region_tokens."
                )
            if args.process_index == 0:
                print(f"{what}: {len(out) - len(long_enough)} of {len(out)} rows are shorter than a region of "
                      f"{region} tokens and are skipped.", flush=True)  # fmt: skip
            self.too_short, out = len(out) - len(long_enough), long_enough
        return out if length is None else pack(out, length)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As Trainer's; rows that are given to this call are encoded as the others were."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._encoded(eval_dataset, self.args, "eval_dataset")  # type: ignore[arg-type]
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As Trainer's; rows are encoded as the others were."""
        return super().get_test_dataloader(self._encoded(test_dataset, self.args, "test_dataset"))  # type: ignore[arg-type]

    # -- the step ------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        for inputs in batch_samples:
            inputs.setdefault("labels", to_batch(inputs).labels_BT)  # of a collator that makes none
        return super()._get_num_items_in_batch(batch_samples, device)

    def _losses(
        self, model: nn.Module, inputs: dict[str, Any], counts_K1: Tensor, num_items: Any, outputs: bool, ranks: int
    ) -> dict[str, Any]:
        """The target's own loss, or what compute_loss_func or label smoothing make of its outputs."""
        loss: Callable[..., Tensor] | None = self.compute_loss_func
        if loss is None and self.label_smoother is not None:
            loss = partial(self.label_smoother, shift_labels=True)
        asked = loss is not None or (outputs and self._logits_asked)
        losses = model(**self._forward_arguments(counts_K1), outputs=asked, **inputs)
        if loss is not None:
            count = counts_K1[0].clamp(min=1)
            share = loss(losses["outputs"], inputs["labels"], num_items_in_batch=num_items)
            if not isinstance(share, Tensor):
                raise ValueError(f"compute_loss_func: got {share!r}, wanted a loss (a tensor).")
            losses["ntp"] = LossSum(share * count, count, count)
        losses["outputs"] = losses["outputs"] if asked else {}
        return losses

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """As Trainer's; logits are made where somebody reads them."""
        self._logits_asked = not prediction_loss_only
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)


def _encode(vocab_size: int, tokenizer: Any, args: MTPTrainingArguments, rows: Any, stream: bool = False) -> Any:
    only, skip, processes = args.assistant_only_loss, args.skip_bad_rows, None if stream else args.num_proc
    return encode_rows(rows, tokenizer, args.max_length, only, vocab_size, skip, processes, may_be_empty=stream)


class _Stream(IterableDataset):
    """Rows of a stream, encoded as they come; with a length packed, so many at a time."""

    def __init__(self, rows: Any, encode: Callable[..., Any], length: int | None, shortest: int) -> None:
        self.rows, self.encode, self.length, self.shortest = rows, encode, length, shortest

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows, first = iter(self.rows), 1
        while some := list(itertools.islice(rows, STREAM_ROWS)):
            encoded, _ = self.encode(Part(some, "stream", "row", first), stream=True)
            encoded, first = encoded.part(encoded.lengths >= self.shortest), first + len(some)
            yield from encoded if self.length is None else pack(encoded, self.length)

    def set_epoch(self, epoch: int) -> None:
        """Another order, of a stream that shuffles."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


def _is_stream(rows: Any) -> bool:
    return hasattr(rows, "__iter__") and not hasattr(rows, "__len__")


def _check_store(rows: Any, args: MTPTrainingArguments, model: MTPModel, what: str) -> None:
    """Kept states are those of one target, taken in one place: ValueError for others. A target that learns is read
    anew.
    """
    rows = rows.rows if isinstance(rows, Encoded) else rows
    rows = rows.source if isinstance(rows, Rows) else rows
    if not isinstance(rows, HiddenStore) or rows.width is None or not model.module.reads_states:
        return
    if args.trains_target:
        if args.process_index == 0:
            print(f"{what}: the target learns, so its kept states would go stale: it is read anew.", flush=True)
        return
    made = rows.meta["fingerprint"]
    made = {"hidden_source": made.get("hidden_source"), **(made.get("target") or {})}
    here = {"hidden_source": model.mtp_config.hidden_source, **model.target.fingerprint()}
    differ = [f"{name}: kept {made.get(name)!r}, here {now!r}" for name, now in here.items() if made.get(name) != now]
    if differ:
        raise ValueError(f"{what}: states of another target ({'; '.join(differ)}). Make them anew, or leave them out.")


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
