"""tau during training, by real decoding: the one number that says whether a module is worth its drafts."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback

from foretell.mtp import MTPModel
from foretell.types import IGNORE_INDEX

PARTED = 1.2  # times the decoded tau: an estimate beyond it is said to mislead


def decoded_tau(mtp: MTPModel, rows: Any, prompts: int, new_tokens: int) -> dict[str, float]:
    """tau, mean_accepted, accept_at_k and accept_given_k over the prompts of the first rows, decoded greedily.

    rows: encoded (input_ids, labels), a stream of them too; what stands before the first label is the prompt, of rows
    without one the first half. Empty if there are none.
    """
    found = [p for p in map(prompt_of, itertools.islice([] if rows is None else rows, prompts)) if p]
    if not found:
        return {}
    width = max(len(p) for p in found)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in found])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in found])
    how: Any = {"do_sample": False, "return_dict_in_generate": True, "synced_gpus": False}  # ranks decode on their own
    out = mtp.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **how)
    stats = out.stats
    metrics = {"tau": stats.tau, "mean_accepted": stats.mean_accepted}
    metrics |= {f"accept_at_{k}": a for k, a in enumerate(stats.accept_at, start=1)}
    metrics |= {f"accept_given_{k}": a for k, a in enumerate(stats.accept_given, start=1)}
    mtp.release()
    return metrics


def prompt_of(row: dict[str, Any]) -> list[int]:
    """The tokens before the first trained one."""
    ids = list(row["input_ids"])
    labels: Sequence[int] = list(row.get("labels") or ids)
    first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), 0)
    return ids[: max(first, 0)] or ids[: max(len(labels) // 2, 1)]


@contextmanager
def whole(model: nn.Module, accelerator: Any) -> Iterator[None]:
    """While this is open, what FSDP2 shards of model is whole, so that no forward asks other ranks for anything. All
    ranks enter.
    """
    parts: list[Any] = []
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import FSDPModule

        parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts[:1]:  # before a layer is called by itself and takes itself for the whole
        part._get_fsdp_state()._lazy_init()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False)


def stop_early(trainer: Any) -> None:
    """Have a run end by eval_patience, if it has one. Raises ValueError where nothing is evaluated."""
    args = trainer.args
    if args.eval_patience is None:
        return
    if args.eval_strategy == "no":
        raise ValueError("eval_patience: got a number of evaluations, but none are made; wanted eval_strategy too.")
    if args.metric_for_best_model is None:
        args.metric_for_best_model, args.greater_is_better = "eval_tau", True
    trainer.remove_callback(EarlyStoppingCallback)
    trainer.add_callback(EarlyStoppingCallback(args.eval_patience))


def with_estimate(metrics: dict[str, float], own: int = 1) -> dict[str, float]:
    """And estimated_tau, what teacher-forced accuracies alone promise: a draft counts while all before it hold. Warns
    where decoding falls short of it.

    own: tokens of a verification that need no draft.
    """
    if "tau" not in metrics or "accuracy_1" not in metrics:
        return metrics
    held, estimate = 1.0, float(own)
    for k in itertools.count(1):
        if f"accuracy_{k}" not in metrics:
            break
        held *= metrics[f"accuracy_{k}"]
        estimate += held
    if estimate > PARTED * metrics["tau"]:
        warnings.warn(
            "tau by decoding falls short of what teacher-forced accuracy promises (estimated_tau): the rows are not "
            "what the target itself says (foretell regenerate makes such rows), or drafts are not read as trained.",
            stacklevel=2,
        )
    return metrics | {"estimated_tau": estimate}
