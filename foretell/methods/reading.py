"""Reading masks behind a text: in two passes, chunk by chunk, or in one token tree.

Ordinary rows never depend on a mask. Where they do not learn either, they run first, once, without gradient, and leave
their keys and values; then mask rows alone run, forward and backward, against those. Long texts go chunk by chunk:
exact, since nothing of a chunk's text is learned, and with memory that grows by keys and values only. `one_pass` is the
slow twin: tokens and masks in one token tree, everything with gradient; where the text's rows learn, there is no other.
"""

# B sequences, T positions, O tokens that carry masks, K masks of each, R rows of a pass, W columns of a text, D hidden
# width.

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foretell.data.collate import to_batch
from foretell.models.comb_attention import CombKeys
from foretell.models.gated_lora import GatedAdapters
from foretell.models.refusals import UnsupportedModelError
from foretell.models.self_check import PROBES, at_rest, distance, few_texts, narrowed, tolerance_of, windows_of
from foretell.models.target import Target, TargetRows
from foretell.ops.tree import MASK, hang, starts_of
from foretell.types import PAD_DOCUMENT, Batch, LossSum

# tokens [B, O, K] in the masks' places -> the teacher's states of them [B, O, K, D]
Reread = Callable[[Tensor], Tensor]


@dataclass
class Piece:
    """A stretch of tokens with their masks read, and the text's states that their losses need."""

    masks_BOKD: Tensor
    owner_BO: Tensor  # columns of the tokens that carry masks
    valid_BO: Tensor  # False where a row of owners is only filled up
    text_BWD: Tensor  # states of the text's columns first, first + 1, ...
    first: int
    teacher: Target
    reread: Reread

    @property
    def owners_BOD(self) -> Tensor:
        """States of the tokens that carry masks."""
        at_BO1 = (self.owner_BO - self.first)[..., None]
        return self.text_BWD.gather(1, at_BO1.expand(-1, -1, self.text_BWD.shape[2]))


@dataclass
class CombRows(TargetRows):
    """What `one_pass` gives: text rows, and the masks as one piece."""

    piece: Piece | None = None
    anchor: LossSum | None = None  # the loss of the carrying tokens' own rows, where those learn by proposals


def pieces(module: Any, target: Target, batch: Batch, carries_BT: Tensor, K: int) -> Iterator[Piece]:
    """Read a text and K masks of each token where carries_BT says so, chunk by chunk; at least one piece.

    A token's masks are read once the K tokens after it are, whose states teach them: nothing is lost at borders.
    """
    T = batch.input_ids_BT.shape[1]
    C = T if module.at_once else module.config.chunk_size
    column_BT, start_BT = columns_of(batch.document_BT)
    keys = CombKeys(T, "cpu" if module.config.offload_keys else None)
    everywhere = None if module.gated else module.rows.adapters
    text_BWD, first, done, found = None, 0, 0, False
    for at in range(0, T, C):
        end = min(at + C, T)
        part = slice(at, end)
        keys.begin(start_BT[:, part], column_BT[:, part], column_BT[:, part], end, at, 0)
        with torch.no_grad():  # the masks' losses teach the text's rows nothing
            embedding_BRD = target.embed(batch.input_ids_BT[:, part])
            new_BRD = target.read_comb(
                embedding_BRD, batch.position_ids_BT[:, part], keys, everywhere, text_length(batch)
            )
        text_BWD = new_BRD if text_BWD is None else torch.cat([text_BWD[:, done - first :], new_BRD], dim=1)
        first, ready = done, T if end == T else max(end - K, done)
        carries_BW = carries_BT[:, done:ready]
        owners = int(carries_BW.sum(1).amax()) if ready > done else 0
        last = end == T and not found  # a step needs a gradient, if only zeros
        if owners or last:
            found, owners = True, max(owners, 1)
            owner_BO, valid_BO = owners_of(carries_BW, owners)
            below = RowsBelow(target, batch, keys, owner_BO + done, valid_BO, start_BT, K)
            filler_BRD = text_BWD.new_zeros(len(owner_BO), owners * K, text_BWD.shape[2])
            masks_BOKD = below.read(module.rows.embed(filler_BRD, below.step_BR), module.rows.adapters)
            yield Piece(masks_BOKD, owner_BO + done, valid_BO, text_BWD, first, target, below.reread)
        done = ready


@torch.no_grad()
def refuse_unreadable(module: Any, target: Target) -> None:
    """Raise UnsupportedModelError for a model whose text, or masks below it, do not come out of `pieces` as they do of
    the model itself and of `one_pass`: it makes more of tokens than their embeddings, or attends in a way of its own.
    """
    why = ""
    with at_rest(target.model):
        for one in (target, *(Target(narrowed(target.model, window)) for window in windows_of(target))):
            try:  # several texts: experts may be chosen by rounding
                near = (_distance(module, one, few_texts(one, p)) <= tolerance_of(one) for p in range(PROBES))
                why = why or ("" if any(near) else "its states come out as others")
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
                why = f"{type(error).__name__} in its forward: {str(error)[:200]}"
    if why:
        raise UnsupportedModelError(
            f"{type(target.model).__name__} ({target.model.config.model_type}) cannot be read with masks ({why}); "
            "wanted layers that read embeddings and attend through a function of ours, its window among the arguments. "
            "The methods 'sequential' and 'heads' need none."
        )


def _distance(module: Any, target: Target, ids_BT: Tensor) -> float:
    batch = to_batch({"input_ids": ids_BT})
    piece = next(pieces(module, target, batch, torch.ones_like(ids_BT, dtype=torch.bool), module.config.depth))
    wanted = [target.forward_text(ids_BT, batch.position_ids_BT).post_norm_BRD[:, : piece.text_BWD.shape[1]]]
    if module.rows.embedding is not None:  # of noise each reading has its own
        wanted.append(one_pass(module, target, batch).piece.masks_BOKD[:, : piece.owner_BO.shape[1]])
    return max(distance(a.flatten(0, -2), b.flatten(0, -2)) for a, b in zip((piece.text_BWD, piece.masks_BOKD), wanted))


class RowsBelow:
    """K rows below each of these tokens, against the keys of their text."""

    def __init__(
        self,
        target: Target,
        batch: Batch,
        keys: CombKeys,
        owner_BO: Tensor,
        valid_BO: Tensor,
        start_BT: Tensor,
        K: int,
    ) -> None:
        self.target, self.keys, self.K, self.shape = target, keys, K, owner_BO.shape
        self.step_BR = torch.arange(1, K + 1, device=owner_BO.device).repeat(*owner_BO.shape)
        owner_BR = owner_BO.repeat_interleave(K, dim=1)
        self.start_BR = start_BT.gather(1, owner_BR)
        self.last_BR = torch.where(valid_BO.repeat_interleave(K, dim=1), owner_BR, self.start_BR - 1)
        self.at_BR = owner_BR + self.step_BR
        self.positions_BR = batch.position_ids_BT.gather(1, owner_BR) + self.step_BR
        self.read_as = text_length(batch)

    def read(self, embedding_BRD: Tensor, adapters: GatedAdapters | None) -> Tensor:
        """[B, O, K, D] after the final norm."""
        self.keys.begin(self.start_BR, self.last_BR, self.at_BR, self.keys.end, None, self.K)
        states_BRD = self.target.read_comb(embedding_BRD, self.positions_BR, self.keys, adapters, self.read_as)
        return states_BRD.view(*self.shape, self.K, -1)

    @torch.no_grad()
    def reread(self, ids_BOK: Tensor) -> Tensor:
        """The target's states of tokens that stand in the masks' places."""
        return self.read(self.target.embed(ids_BOK.flatten(1)), None)


def below_text(target: Target, batch: Batch, owner_BO: Tensor, valid_BO: Tensor, K: int) -> RowsBelow:
    """Places for K tokens below each of these, once the text has been read for them."""
    column_BT, start_BT = columns_of(batch.document_BT)
    keys = CombKeys(batch.input_ids_BT.shape[1])
    keys.begin(start_BT, column_BT, column_BT, keys.tokens, 0, 0)
    with torch.no_grad():
        target.read_comb(target.embed(batch.input_ids_BT), batch.position_ids_BT, keys)
    return RowsBelow(target, batch, keys, owner_BO, valid_BO, start_BT, K)


def one_pass(
    module: Any, target: Target, batch: Batch, carries_BT: Tensor | None = None, K: int | None = None
) -> CombRows:
    """Tokens and masks in one token tree, everything with gradient: what two passes must equal, and the way where the
    text's rows learn. carries_BT: bool [B, T], tokens that carry K masks; None: all of them, as many as the depth.
    """
    (B, T), K = batch.input_ids_BT.shape, K or module.config.depth
    carries_BT = torch.ones_like(batch.document_BT, dtype=torch.bool) if carries_BT is None else carries_BT
    owner_BO, valid_BO = owners_of(carries_BT, max(int(carries_BT.sum(1).amax()), 1))
    parents_BR, kinds_BR = hang(batch.document_BT, owner_BO, valid_BO, K)
    step_BM = torch.arange(1, K + 1, device=owner_BO.device).repeat(*owner_BO.shape)
    place_BM = batch.position_ids_BT.gather(1, owner_BO).repeat_interleave(K, dim=1) + step_BM
    positions_BR = torch.cat([batch.position_ids_BT, place_BM], dim=1)
    text_BTD = target.embed(batch.input_ids_BT)
    filler_BMD = text_BTD.new_zeros(*step_BM.shape, text_BTD.shape[2])
    step_BR = torch.cat([torch.zeros_like(batch.input_ids_BT), step_BM], dim=1)
    embedding_BRD = module.rows.embed(torch.cat([text_BTD, filler_BMD], dim=1), step_BR)
    through = (kinds_BR == MASK).reshape(-1).nonzero()[:, 0] if module.gated else slice(None)
    with module.rows.adapters.on(target.layers, through):
        states_BRD = target.read_tree(embedding_BRD, positions_BR, parents_BR, text_length(batch))
    teacher = module.teacher or target

    @torch.no_grad()
    def reread(ids_BOK: Tensor) -> Tensor:
        ids_BR = torch.cat([batch.input_ids_BT, ids_BOK.flatten(1)], dim=1)
        taught_BRD = teacher.read_tree(teacher.embed(ids_BR), positions_BR, parents_BR, text_length(batch))
        piece.taught_BTD = taught_BRD[:, :T]
        return taught_BRD[:, T:].view(B, -1, K, taught_BRD.shape[2])

    masks_BOKD = states_BRD[:, T:].reshape(B, -1, K, states_BRD.shape[2])
    piece = OnePiece(masks_BOKD, owner_BO, valid_BO, states_BRD[:, :T], 0, teacher, reread)
    return CombRows(states_BRD[:, :T], None, piece=piece)


@dataclass
class OnePiece(Piece):
    """A piece whose text learns too."""

    taught_BTD: Tensor | None = None  # the teacher's states of the text, once it has reread proposals


def text_length(batch: Batch) -> Tensor:
    """Of the longest text of a batch: what the model itself turns all of them by, where angles depend on it."""
    return batch.position_ids_BT.amax() + 1


def owners_of(carries_BT: Tensor, owners: int) -> tuple[Tensor, Tensor]:
    """(owner_BO, valid_BO): columns where carries_BT is true, in order, filled up to so many with others."""
    owner_BO = (~carries_BT).long().argsort(dim=1, stable=True)[:, :owners]
    return owner_BO, carries_BT.gather(1, owner_BO)


def columns_of(document_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(column_BT, start_BT): each token's own column, and the first of its document; padding stands alone."""
    column_BT = torch.arange(document_BT.shape[1], device=document_BT.device).expand_as(document_BT)
    new_BT = starts_of(document_BT) | (document_BT == PAD_DOCUMENT)
    return column_BT, torch.where(new_BT, column_BT, 0).cummax(1).values


def ends_of(document_BT: Tensor) -> Tensor:
    """[B, T]: the last column of each token's document."""
    T, last_BT = document_BT.shape[1], starts_of(document_BT.flip(1)).flip(1)
    column_BT = torch.arange(T, device=document_BT.device).expand_as(document_BT)
    return torch.where(last_BT, column_BT, T).flip(1).cummin(1).values.flip(1)
