"""The one division: sums of losses over the global counts of this optimizer step, for every trainer alike."""

# K depths.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foretell.methods.base import DepthWeights
from foretell.ops.losses import depth_weights
from foretell.ops.shift import labels_of, next_labels
from foretell.types import IGNORE_INDEX, Batch


def count_labels(batch: Batch, depth: int, draft_ids_M: Tensor | None, vocab_size: int) -> Tensor:
    """[1 + K] counted rows of a micro-batch: the ordinary next token, then each depth. Labels decide, not the loss.

    draft_ids_M: with a reduced draft vocabulary a label outside it is not counted.
    """
    labels_BTK = labels_of(batch, depth)
    valid_BTK = labels_BTK != IGNORE_INDEX
    if draft_ids_M is not None:
        drafted_V = torch.zeros(vocab_size, dtype=torch.bool, device=labels_BTK.device)
        drafted_V[draft_ids_M.to(labels_BTK.device)] = True
        valid_BTK &= drafted_V[labels_BTK.clamp(min=0)]
    ordinary = (next_labels(batch.labels_BT, batch.document_BT) != IGNORE_INDEX).sum()
    return torch.cat([ordinary[None], valid_BTK.sum((0, 1))])


def objective(
    losses: dict[str, Any], counts_K1: Tensor, *, scale: float, weights: DepthWeights, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss to differentiate, detached parts): next-token sum / its count + scale * weighted depths' sum / their
    counts.

    counts_K1 [1 + K] are global: over all micro-batches and ranks of this step. So a micro-batch's share of the loss is
    the same however the step is cut up. Depths that count nothing contribute nothing.
    """
    mtp = losses["mtp"]
    counts_K1 = counts_K1.to(mtp[0].total.device).clamp(min=1)
    parts = {}
    total = mtp[0].total.new_zeros(())
    if losses["ntp"] is not None:
        parts["ntp"] = losses["ntp"].total / counts_K1[0]
        total = total + parts["ntp"]
    depth_losses_K = torch.stack([loss.total for loss in mtp]) / counts_K1[1:]
    weights_K = depth_losses_K.new_tensor(depth_weights(weights, len(mtp), beta))
    parts["mtp"] = (depth_losses_K * weights_K).sum()
    if mtp[0].total.requires_grad:
        total = total + scale * parts["mtp"]
    return total, {name: part.detach() for name, part in parts.items()}
