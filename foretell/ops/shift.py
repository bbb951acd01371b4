"""The one place that says what "k tokens ahead" means. Nobody else slices labels.

"k ahead" is always counted from the unshifted rows: a document's end is found by comparing the document of position t
with that of position t + k. Rolling already rolled rows one step at a time compares neighbours instead and lets depth 2
look into the next document (tests/test_shift.py keeps that mistake as a test).
"""

# B sequences, T positions of a row, K depths. Depth 0 is the ordinary next token.

from __future__ import annotations

import torch
from torch import Tensor

from foretell.types import IGNORE_INDEX, PAD_DOCUMENT, Batch


def ahead(values_BT: Tensor, k: int, document_BT: Tensor, fill: float | int | bool) -> tuple[Tensor, Tensor]:
    """The values k positions ahead in the same document, and where there are any.

    Example: values [10, 11, 12, 20, 21], documents [0, 0, 0, 1, 1], k=2, fill=0 gives [12, 0, 0, 0, 0] and
    [True, False, False, False, False].

    Args:
        values_BT: [B, T] or [B, T, ...], any type.
        k: positions, 0 or more.
        document_BT: [B, T] document of each position, PAD_DOCUMENT on padding; a document's positions are contiguous.
        fill: stands where position t + k is past the end, padding, or in another document.

    Returns:
        (ahead_BT, valid_BT): shaped as values_BT, and bool [B, T].

    Raises:
        ValueError: k is negative, or the rows and documents differ in shape.
    """
    if k < 0:
        raise ValueError(f"k must be 0 or more positions ahead, got {k}.")
    _check_rows(values_BT, document_BT)
    B, T = document_BT.shape
    kept = max(T - k, 0)
    ahead_BT = torch.full_like(values_BT, fill)
    valid_BT = torch.zeros(B, T, dtype=torch.bool, device=document_BT.device)
    target_BT = document_BT[:, T - kept :]
    valid_BT[:, :kept] = (document_BT[:, :kept] == target_BT) & (target_BT != PAD_DOCUMENT)
    shape = (B, kept) + (1,) * (values_BT.dim() - 2)
    ahead_BT[:, :kept] = torch.where(valid_BT[:, :kept].view(shape), values_BT[:, T - kept :], ahead_BT[:, :kept])
    return ahead_BT, valid_BT


def next_labels(labels_BT: Tensor, document_BT: Tensor) -> Tensor:
    """Labels of depth 0: out[b, t] = labels_BT[b, t + 1], or IGNORE_INDEX. See labels_of."""
    return ahead(labels_BT, 1, document_BT, IGNORE_INDEX)[0]


def prefix_labels(batch: Batch) -> Tensor:
    """next_labels without the tokens that carry masks, by the labels that the batch brings for these."""
    labels_BT = next_labels(batch.labels_BT, batch.document_BT)
    if batch.mtp_labels_BTK is None:
        return labels_BT
    return labels_BT.masked_fill((batch.mtp_labels_BTK != IGNORE_INDEX).any(-1), IGNORE_INDEX)


def check_depth(depth: int, T: int) -> None:
    """ValueError unless some position of a row of T tokens has a label at the deepest depth."""
    if not 1 <= depth <= T - 2:
        raise ValueError(
            f"depth must be in [1, T-2] = [1, {T - 2}] for rows of T={T} tokens, got {depth}. "
            "Lower the depth or use longer rows."
        )


def labels_of(batch: Batch, depth: int) -> Tensor:
    """[B, T, K] labels of a micro-batch's depths 1..K: those that it brings, else out[b, t, k - 1] is
    labels_BT[b, t + 1 + k], or IGNORE_INDEX.

    A label counts where all tokens from t to t + 1 + k are of one document and the target token itself is not masked.
    Tokens between the two may be masked (a prompt's end may learn to predict its answer). A row too short for a depth
    has no label there: one short row among many is no error, a depth that fits no row is refused before training.

    Raises:
        ValueError: the batch brings labels for another number of depths.
    """
    given_BTK = batch.mtp_labels_BTK
    if given_BTK is not None:
        if given_BTK.shape != (*batch.labels_BT.shape, depth):
            raise ValueError(
                f"mtp_labels: got the shape {tuple(given_BTK.shape)}, wanted {(*batch.labels_BT.shape, depth)}: make "
                f"the collator with num_predictions={depth}."
            )
        return given_BTK
    depths = range(1, depth + 1)
    return torch.stack([ahead(batch.labels_BT, 1 + k, batch.document_BT, IGNORE_INDEX)[0] for k in depths], dim=-1)


def _check_rows(values_BT: Tensor, document_BT: Tensor) -> None:
    if document_BT.dim() != 2 or values_BT.shape[:2] != document_BT.shape:
        raise ValueError(
            f"got values of shape {tuple(values_BT.shape)} and documents of shape {tuple(document_BT.shape)}, "
            "wanted one document number [B, T] for each value [B, T, ...]. Pass zeros where nothing is packed."
        )
