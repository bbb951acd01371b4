"""The one division: sums of losses over the global counts of this optimizer step, for every trainer alike."""

# K depths.

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from foretell.data.collate import to_batch
from foretell.methods.base import DepthWeights, MTPModule
from foretell.ops.losses import depth_weights
from foretell.ops.shift import labels_of, next_labels, prefix_labels
from foretell.types import IGNORE_INDEX, Batch


def count_labels(
    batch: Batch, depth: int, draft_ids_M: Tensor | None, vocab_size: int, anchored: bool = False
) -> Tensor:
    """[1 + K] counted rows of a micro-batch: the ordinary next token, then each depth. Labels decide, not the loss.

    draft_ids_M: with a reduced draft vocabulary a label outside it is not counted. anchored: tokens that carry masks
    are no ordinary rows.
    """
    labels_BTK = labels_of(batch, depth)
    valid_BTK = labels_BTK != IGNORE_INDEX
    if draft_ids_M is not None:
        drafted_V = torch.zeros(vocab_size, dtype=torch.bool, device=labels_BTK.device)
        drafted_V[draft_ids_M.to(labels_BTK.device)] = True
        valid_BTK &= drafted_V[labels_BTK.clamp(min=0)]
    ordinary_BT = prefix_labels(batch) if anchored else next_labels(batch.labels_BT, batch.document_BT)
    ordinary = (ordinary_BT != IGNORE_INDEX).sum()
    return torch.cat([ordinary[None], valid_BTK.sum((0, 1))])


def choose_labels(module: MTPModule, batch_samples: list[dict[str, Any]], seed: int, step: int, rank: int) -> None:
    """Before anything is counted, a method that learns from a random part of a text chooses it: `mtp_labels` are added
    to a step's micro-batches. The choice depends on seed, step, micro-batch and rank only: whatever workers prefetch, a
    resumed run repeats it.
    """
    for micro, inputs in enumerate(batch_samples):
        generator = torch.Generator().manual_seed(random.Random(str((seed, step, micro, rank))).getrandbits(63))
        chosen_BTK = module.choose(to_batch(inputs), generator)
        if chosen_BTK is not None:
            inputs["mtp_labels"] = chosen_BTK


def coefficients(
    counts_K1: Tensor,
    *,
    scale: float,
    weights: DepthWeights,
    beta: float,
    anchored: bool = False,
    depths: int | None = None,
) -> Tensor:
    """[K] what each depth's sum is multiplied by: scale * the depth's weight / its global count; with weights="rows"
    every counted row weighs the same; with "dpace" the rows' own weights stand in their losses, beside equal ones.
    anchored: each first mask that counts has another row before it that does. depths: only so many learn now.

    counts_K1 [1 + K] are global: over all micro-batches and ranks of this step. So a micro-batch's share of the loss is
    the same however the step is cut up. Depths that count nothing contribute nothing.
    """
    if depths is not None and depths < len(counts_K1) - 1:
        now = coefficients(counts_K1[: depths + 1], scale=scale, weights=weights, beta=beta, anchored=anchored)
        return torch.cat([now, now.new_zeros(len(counts_K1) - 1 - depths)])
    if weights == "rows":
        rows = counts_K1[1:].sum() + (counts_K1[1] if anchored else 0)
        return (scale / rows.clamp(min=1).double()).expand(len(counts_K1) - 1).to(torch.get_default_dtype())
    counts_K = counts_K1[1:].clamp(min=1)
    weights = "uniform" if weights == "dpace" else weights
    return scale * torch.tensor(depth_weights(weights, len(counts_K), beta), device=counts_K.device) / counts_K


def objective(
    losses: dict[str, Any], counts_K1: Tensor, *, scale: float, **weighing: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss to differentiate, detached parts): next-token sum / its count + scale * weighted depths' sum / their
    counts, which are those of `coefficients`, as is weighing. Where `stay` is given, it is learned in the next-token
    loss's place.
    """
    mtp, anchor, stay = losses["mtp"], losses.get("anchor"), losses.get("stay")
    counts_K1 = counts_K1.to(mtp[0].total.device)
    parts: dict[str, Tensor] = {}
    total = mtp[0].total.new_zeros(())
    for name, loss in (("ntp", losses["ntp"]), ("stay", stay)):
        if loss is not None:
            parts[name] = loss.total / counts_K1[0].clamp(min=1)
    if parts:
        total = total + (parts["stay"] + 0.0 * parts.get("ntp", 0.0) if "stay" in parts else parts["ntp"])
    factor_K = coefficients(counts_K1, scale=1.0, anchored=anchor is not None, **weighing)
    parts["mtp"] = (torch.stack([loss.total for loss in mtp]) * factor_K.to(mtp[0].total)).sum()
    if anchor is not None:  # as many rows as the first depth, and of its weight
        parts["mtp"] = parts["mtp"] + anchor.total * factor_K[0]
    total = total + scale * parts["mtp"]
    return total, {name: part.detach() for name, part in parts.items()}
