"""Self-distillation from proposals of the module's own (arXiv 2602.06019; the authors' code at 167413ea).

The student proposes a span from masks in one forward; the teacher reads the proposal in the masks' places, and what it
says after each token of it is what the student learns at that place. Only the conditioning is the student's own: one
forward, no reward, and no gradient through the choice of the proposal.

    student_forced        cross-entropy with the teacher's choice (the paper's main runs)
    student_forced_soft   the teacher's distribution
    student_forced_gt     the data's tokens, on the same places

Sequential modules and heads learn from their own proposals in MTPModule.losses_of_proposals.

With gated adapters the teacher is the target itself, and nothing of its text changes, so that a verifier makes the
module lossless. With plain adapters the teacher has them switched off; where the whole target learns, it is a copy.
"""

# B sequences, T positions, O tokens that carry masks, K masks of each, N rows flattened, D hidden width, V vocabulary.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foretell.methods.base import REREADS, LossKind, Supervision, chosen_tokens
from foretell.methods.reading import OnePiece, Piece, ends_of
from foretell.models.target import Target
from foretell.ops.losses import linear_loss
from foretell.ops.shift import next_labels
from foretell.types import IGNORE_INDEX, Batch, LossSum

REGIONS = "regions"


def is_forced(supervision: Supervision) -> bool:
    """Whether spans learn by the rules of this paper."""
    return supervision.startswith("student_forced")


# -- where masks stand -------------------------------------------------------------------------------------------------


def region_problems(tokens: int, regions: int, k_min: int, k_max: int) -> list[str]:
    """What is wrong with a layout of regions, in plain sentences."""
    if tokens < 1 or regions < 1:
        return [f"region_tokens, regions: got {tokens} and {regions}, wanted at least 1 of both."]
    found = []
    width = tokens // regions
    if width < k_max:
        found.append(
            f"k_max: got {k_max} for regions of {tokens} // {regions} = {width} rows; k - 1 of them are masks and at "
            f"least one is text: wanted k_max of at most {width}, or fewer regions."
        )
    if not 2 <= k_min <= k_max:
        found.append(f"k_min: got {k_min}, wanted 2 to k_max = {k_max}.")
    return found


def choose_regions(labels_BTK: Tensor, batch: Batch, width: int, k_min: int, generator: torch.Generator) -> Tensor:
    """The labels that a step learns, laid out in regions.

    A region has `width` rows: P = width - (k - 1) tokens of text, then k - 1 masks, which stand for the tokens that the
    next region begins with. In a text that means: every P-th token carries k - 1 masks. k is drawn from k_min..K + 1
    and the offset, by which the first region's text is shorter, from 0..P - 1, by generators of their own. (In the
    authors' code both share a seed, and most pairs never occur.) A text that is longer than the regions of the paper
    goes on in the same rhythm. The last region of a text is filled up with its last token, so that spans are whole.

    Args:
        labels_BTK: labels of all tokens, [B, T, K].
        width: W = region_tokens // regions.
        k_min: smallest k.
        generator: seeds both draws.

    Returns:
        [B, T, K], IGNORE_INDEX where a step learns nothing.
    """
    K = labels_BTK.shape[2]
    for_k, for_offset = (
        torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator))) for _ in range(2)
    )
    k = int(torch.randint(k_min, K + 2, (), generator=for_k))
    text = width - (k - 1)
    offset = int(torch.randint(text, (), generator=for_offset))
    position_BT, document_BT = batch.position_ids_BT.cpu(), batch.document_BT.cpu()
    carries_BT = (position_BT + 1 + offset) % text == 0
    end_BT = ends_of(document_BT)
    last_BT = batch.labels_BT.cpu().gather(1, end_BT)
    column_BT = torch.arange(labels_BTK.shape[1]).expand_as(end_BT)
    ended_BT = (position_BT >= text) & (column_BT - text + k >= end_BT)  # the region before has predicted the end
    carries_BT &= (column_BT < end_BT) & ~ended_BT  # and something follows in the text
    step_K = torch.arange(1, K + 1)
    behind_BTK = column_BT[..., None] + 1 + step_K > end_BT[..., None]
    filled_BTK = torch.where(behind_BTK, last_BT[..., None], labels_BTK)
    return filled_BTK.masked_fill(~carries_BT[..., None] | (step_K > k - 1), IGNORE_INDEX)


# -- what they learn ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def propose_masks(module: Any, target: Target, piece: Piece) -> Tensor:
    """[B, O, K] tokens in the masks' places: the text's own next token, then what each mask but the last says."""
    sample = module.config.proposal == "sample"
    at_N = torch.arange(piece.owner_BO.numel(), device=piece.owner_BO.device)
    own_N = chosen_tokens(target.logits, piece.owners_BOD.flatten(0, 1), at_N, sample)
    ids = [own_N.view(piece.owner_BO.shape)]
    for k, mask_BOD in enumerate(piece.masks_BOKD.unbind(2)[:-1], start=1):
        state_BOD = mask_BOD if module.sampler is None else module.sampler(target.embed(ids[-1]), mask_BOD)
        ids.append(module.guess(target, state_BOD, k, ids[-1], sample))
    return torch.stack(ids, dim=-1)


@torch.no_grad()
def by_proposals(
    module: Any, target: Target, piece: Piece, at: Any, label_N: Tensor, supervision: Supervision
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(the token before each prediction, the teacher's states, which of them speaks of it, labels).

    at: (sequence, owner, mask) of each counted row. label_N counts where it is not IGNORE_INDEX.
    """
    b_N, o_N, k_N = at
    ids_BOK = propose_masks(module, target, piece)
    read_ND = piece.reread(ids_BOK).flatten(0, 2)
    read_N = (b_N * ids_BOK.shape[1] + o_N) * ids_BOK.shape[2] + k_N
    if supervision == "student_forced" or module.config.free_running:
        choice_N = chosen_tokens(piece.teacher.logits, read_ND, read_N)
        label_N = torch.where(label_N == IGNORE_INDEX, label_N, choice_N)
    return ids_BOK[at], read_ND, read_N, label_N


def anchor(
    target: Target,
    batch: Batch,
    piece: Piece,
    labels_BTK: Tensor,
    detach: bool,
    supervision: Supervision,
    kind: LossKind,
) -> LossSum:
    """The loss of the carrying tokens' own rows, the first of each span, where the text learns: they learn as their
    masks do. A row counts where its first mask does.
    """
    counts_BO = (labels_BTK[..., 0].gather(1, piece.owner_BO) != IGNORE_INDEX) & piece.valid_BO
    label_N = next_labels(batch.labels_BT, batch.document_BT).gather(1, piece.owner_BO).flatten()
    what: dict[str, Any] = {"kind": "ce"}
    if supervision in REREADS:
        assert isinstance(piece, OnePiece) and piece.taught_BTD is not None, "the teacher has read the proposals"
        at_BO1 = piece.owner_BO[..., None]
        taught_ND = piece.taught_BTD.gather(1, at_BO1.expand(-1, -1, piece.taught_BTD.shape[2])).flatten(0, 1)
        rows_N = torch.arange(len(taught_ND), device=taught_ND.device)
        label_N = chosen_tokens(piece.teacher.logits, taught_ND, rows_N)
        if supervision == "student_forced_soft":
            weight_VD, bias_V = piece.teacher.head_matrix(detach=True)
            what = {
                "kind": "tv" if kind == "e2e_tv" else kind,
                "teacher_hidden_ND": taught_ND,
                "teacher_weight_MD": weight_VD,
            }
            what |= {"teacher_bias_M": bias_V, "teacher_rows_N": rows_N}
    weight_VD, bias_V = target.head_matrix(detach)
    return linear_loss(
        piece.owners_BOD.flatten(0, 1),
        weight_VD,
        labels_N=label_N.masked_fill(~counts_BO.flatten(), IGNORE_INDEX),
        bias_M=bias_V,
        **target.loss_scaling,
        **what,
    )
