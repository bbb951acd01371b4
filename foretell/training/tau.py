"""tau during training, by real decoding: the one number that says whether a module is worth its drafts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from foretell.mtp import MTPModel
from foretell.types import IGNORE_INDEX


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
    out = mtp.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True
    )
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
