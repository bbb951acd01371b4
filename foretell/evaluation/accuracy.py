"""Teacher-forced accuracy of each depth's first guesses: what calibrates a tree. It overstates tau: see the docs."""

# B sequences, T positions, K depths, S guesses.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from foretell.data.collate import to_batch
from foretell.mtp import MTPModel
from foretell.ops.shift import labels_of
from foretell.types import IGNORE_INDEX


@torch.no_grad()
def head_accuracy(mtp: MTPModel, rows: Sequence[dict[str, Any]], guesses: int = 4) -> list[list[float]]:
    """[K][S]: share of labelled places where depth k's guess of rank i is the token, over rows of input_ids (+ labels).

    Raises ValueError if no place is labelled for some depth.
    """
    K = mtp.mtp_config.depth
    hits_KS, counts_K = torch.zeros(K, guesses), torch.zeros(K)
    for row in rows:
        ids_BT = torch.tensor([list(row["input_ids"])])
        labels_BT = torch.tensor([list(row.get("labels") or row["input_ids"])])
        labels_BTK = labels_of(to_batch({"input_ids": ids_BT, "labels": labels_BT}), K)
        logits_BTKV = mtp.draft_logits(ids_BT).cpu()
        best_BTKS = logits_BTKV.topk(guesses, dim=-1).indices
        counted_BTK = labels_BTK != IGNORE_INDEX
        hits_KS += ((best_BTKS == labels_BTK[..., None]) & counted_BTK[..., None]).sum((0, 1))
        counts_K += counted_BTK.sum((0, 1))
    if counts_K.min() == 0:
        raise ValueError(f"head_accuracy: {len(rows)} rows have no label for depth {int(counts_K.argmin()) + 1}.")
    return (hits_KS / counts_K[:, None]).tolist()
