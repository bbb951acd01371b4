"""The token tree: who sees whom, and where each row stands. Nobody builds a mask anywhere else.

A row sees exactly its ancestors and itself, and everything that the cache already holds. `parents` writes the tree
down: the index of a row's parent, ROOT for a row that hangs below everything in the cache, PADDING for a row that sees
only itself. The position of a row is the cached length plus its depth (its number of ancestors).

Every function here is held by tests against the definition, walking parents in Python (tests/twins.py).
"""

# B sequences, T tokens of a text, K masks below a token, R rows of one forward, L columns (cached tokens, then rows).

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foretell.types import PAD_DOCUMENT

ROOT = -1  # parent of a row that hangs below the cache
PADDING = -2  # parent of a row that is there only to fill a rectangle
REGULAR, MASK = 0, 1  # kinds of rows

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


# -- any tree ----------------------------------------------------------------------------------------------------------


def ancestors(parents_BR: Tensor) -> Tensor:
    """bool [B, R, R], [b, r, s]: s is r or an ancestor of r. Parents may stand before or after their children."""
    B, R = parents_BR.shape
    # what is known after i rounds: the 2^i nearest ancestors, and the one after them, whose own are then added.
    # One more row R, which sees nothing, stands for "no further ancestor".
    visible = torch.zeros(B, R + 1, R + 1, dtype=torch.bool, device=parents_BR.device)
    visible[:, :R, :R] = torch.eye(R, dtype=torch.bool, device=parents_BR.device)
    jump = _jumps(parents_BR)
    for _ in range(_rounds(R)):
        visible |= visible.gather(1, jump[..., None].expand(B, R + 1, R + 1))
        jump = jump.gather(1, jump)
    return visible[:, :R, :R]


def depths(parents_BR: Tensor) -> Tensor:
    """Long [B, R]: number of ancestors of each row; its position is the cached length plus this. 0 for padding."""
    jump = _jumps(parents_BR)
    depth = (jump < parents_BR.shape[1]).long()
    for _ in range(_rounds(parents_BR.shape[1])):
        depth = depth + depth.gather(1, jump)
        jump = jump.gather(1, jump)
    return depth[:, :-1]


def row_mask(parents_BR: Tensor, lengths_B: Tensor, columns: int | Tensor, window: int | None = None) -> Tensor:
    """What each row of a forward may see, over the columns of the cache.

    Columns [0, lengths_B[b]) hold sequence b's cached tokens (position = column), column lengths_B[b] + r holds row r,
    the rest nothing. lengths_B[b] + R may not exceed their number (not checked: that would wait for the device).

    Args:
        parents_BR: [B, R] long, parents of the rows.
        lengths_B: [B] long, tokens in the cache.
        columns: L, all of them in order; or those that are kept, [B, L] long in any order, negative where none is.
        window: positions: a row at position p sees positions > p - window (transformers' sliding window).

    Returns:
        bool [B, R, L], True where visible. Padding rows see themselves only.

    Raises:
        ValueError: there are more rows than columns, or the window is empty.
    """
    R = parents_BR.shape[1]
    column_BL = _columns(R, columns, window, lengths_B)
    row_BL = column_BL - lengths_B[:, None]  # the row stored in a column; negative: a cached token
    stored_BL = (row_BL >= 0) & (row_BL < R)
    row_BL = row_BL.clamp(0, R - 1)
    tree_BRL = ancestors(parents_BR).gather(2, row_BL[:, None].expand(-1, R, -1)) & stored_BL[:, None]
    cached_BL = (column_BL >= 0) & (column_BL < lengths_B[:, None])
    visible_BRL = tree_BRL | (cached_BL[:, None] & (parents_BR != PADDING)[..., None])
    if window is not None:
        at_BR, position_BL = positions(depths(parents_BR), lengths_B, column_BL)
        visible_BRL &= position_BL[:, None] > at_BR[..., None] - window
    return visible_BRL


def positions(depth_BR: Tensor, lengths_B: Tensor, columns: int | Tensor) -> tuple[Tensor, Tensor]:
    """([B, R] of the rows, [B, L] of what each column holds), with columns as in row_mask. depth_BR may be [1, R]."""
    at_BR, R = lengths_B[:, None] + depth_BR, depth_BR.shape[1]
    column_BL = _columns(R, columns, None, lengths_B)
    row_BL = column_BL - lengths_B[:, None]
    stored_BL = (row_BL >= 0) & (row_BL < R)
    return at_BR, torch.where(stored_BL, at_BR.gather(1, row_BL.clamp(0, R - 1)), column_BL)


# -- masks below rows --------------------------------------------------------------------------------------------------


def lay_masks(
    parents: list[list[int]], ids: list[list[int]], masks: int, carriers: list[list[int]]
) -> tuple[list[dict[int, int]], list[list[int]]]:
    """Append blocks of masks to the rows of a step: mask j below mask j - 1, the first below the row that carries it.

    Args:
        parents, ids: of each sequence's rows, a rectangle; extended in place (ids by zeros).
        masks: K of a block.
        carriers: of each sequence, the rows that carry a block. Sequences with fewer are filled up with padding.

    Returns:
        (of each sequence {row that carries: row of its first mask}, of each row its step: 0, or j for mask j).
    """
    most = max(map(len, carriers))
    blocks, steps = [], []
    for row_parents, row_ids, rows in zip(parents, ids, carriers, strict=True):
        first = len(row_parents)
        blocks.append({row: first + i * masks for i, row in enumerate(rows)})
        step = [0] * first
        for row, at in blocks[-1].items():
            row_parents += [row, *range(at, at + masks - 1)]
            step += range(1, masks + 1)
        missing = (most - len(rows)) * masks
        row_parents += [-2] * missing
        row_ids += [0] * (most * masks)
        steps.append(step + [0] * missing)
    return blocks, steps


# -- chains: closed form -----------------------------------------------------------------------------------------------


def chain(rows: int) -> Tensor:
    """Long [R], parents of a chain: each row's parent is the one before it, the first hangs below the cache."""
    return torch.arange(-1, rows - 1)


def chain_mask(
    rows: int, lengths_B: Tensor, columns: int | Tensor, valid_rows_B: Tensor | None = None, window: int | None = None
) -> Tensor:
    """row_mask of chains, in closed form: no work that grows with R^2.

    Args:
        rows: R.
        lengths_B, columns, window: as in row_mask.
        valid_rows_B: [B] long, sequence b's first valid_rows_B[b] rows are a chain, the rest padding. None: all rows.

    Returns:
        bool [B, R, L], True where visible. Padding rows see themselves only.

    Raises:
        ValueError: as row_mask.
    """
    column_B1L = _columns(rows, columns, window, lengths_B)[:, None]
    row_R = torch.arange(rows, device=lengths_B.device)
    own_BR1 = (lengths_B[:, None] + row_R)[..., None]  # the column, and in a chain also the position, of a row
    visible_BRL = column_B1L <= own_BR1
    if isinstance(columns, Tensor):
        visible_BRL &= column_B1L >= 0
    if window is not None:
        visible_BRL &= column_B1L > own_BR1 - window
    if valid_rows_B is not None:
        valid_BR1 = (row_R < valid_rows_B[:, None])[..., None]
        visible_BRL = torch.where(valid_BR1, visible_BRL, column_B1L == own_BR1)
    return visible_BRL


# -- packed text and combs: forests and their closed forms -------------------------------------------------------------


def starts_of(document_BT: Tensor) -> Tensor:
    """True on the first token of each document [B, T]; a run of padding counts as one document."""
    starts_BT = torch.ones_like(document_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    return starts_BT


def forest(document_BT: Tensor) -> Tensor:
    """Long [B, T], parents of packed causal text: a chain for each document. Documents are contiguous."""
    B, T = document_BT.shape
    parents_BT = torch.arange(-1, T - 1, device=document_BT.device).expand(B, T)
    parents_BT = parents_BT.masked_fill(starts_of(document_BT), ROOT)
    return parents_BT.masked_fill_(document_BT == PAD_DOCUMENT, PADDING)


def document_mask(document_BT: Tensor, window: int | None = None) -> Tensor:
    """bool [B, T, T], [b, t, s]: packed causal text in closed form, equal to the tree rule of `forest`.

    Position t sees s <= t of its own document, with a window only s > t - window; padding sees itself only.
    """
    T = document_BT.shape[1]
    at_T = _columns(T, T, window, document_BT)[0]
    behind_TT = at_T[:, None] - at_T
    causal_TT = (behind_TT >= 0) if window is None else (behind_TT >= 0) & (behind_TT < window)
    same_BTT = document_BT[:, :, None] == document_BT[:, None]
    text_BT1 = (document_BT != PAD_DOCUMENT)[..., None]
    return (same_BTT & causal_TT & text_BT1) | (behind_TT == 0)


def hang(document_BT: Tensor, owner_BO: Tensor, valid_BO: Tensor, masks: int) -> tuple[Tensor, Tensor]:
    """The tree of a text whose chosen tokens carry K masks each, as side chains: a comb where all of them do.

    Rows 0..T-1 are the tokens; row T + o * K + (j - 1) is mask j of owner o.

    Args:
        document_BT: [B, T] as for `forest`.
        owner_BO: [B, O] long, columns of the tokens that carry masks.
        valid_BO: [B, O] bool: False makes a block padding, as a token of padding does.
        masks: K.

    Returns:
        (parents_BR, kinds_BR): long [B, T + O * K].
    """
    (B, T), O = document_BT.shape, owner_BO.shape[1]  # noqa: E741 (a shape letter)
    row_M = torch.arange(T, T + O * masks, device=document_BT.device)
    first_M = (row_M - T) % masks == 0
    parents_BM = torch.where(first_M, owner_BO.repeat_interleave(masks, dim=1), row_M - 1)
    hangs_BO = valid_BO & (document_BT.gather(1, owner_BO) != PAD_DOCUMENT)
    parents_BM = parents_BM.masked_fill(~hangs_BO.repeat_interleave(masks, dim=1), PADDING)
    kinds_BR = torch.where(torch.arange(T + O * masks, device=row_M.device) < T, REGULAR, MASK).repeat(B, 1)
    return torch.cat([forest(document_BT), parents_BM], dim=1), kinds_BR


def beside_mask(text_BC: Tensor, first_BO: Tensor, last_BO: Tensor, chain: int, window: int | None = None) -> Tensor:
    """What row `chain` of each of O chains beside a text sees, in closed form: some of the text, and its own chain.

    Args:
        text_BC: [B, C] long, the text's column that each stored one holds.
        first_BO, last_BO: [B, O] long, the run of text columns that each chain sees. It goes on behind the last.
        chain: rows of its own that are stored, this one included; 0 for a row of the text, which stands at the last.
        window: positions, within a chain too.

    Returns:
        bool [B, O, C + chain * O], True where visible: text columns, then the chains' first rows, their second, ...
    """
    B, O = last_BO.shape  # noqa: E741 (a shape letter)
    first_BO1, last_BO1 = first_BO[..., None], last_BO[..., None]
    text_BOC = (text_BC[:, None] >= first_BO1) & (text_BC[:, None] <= last_BO1)
    step_C = torch.arange(1, chain + 1, device=text_BC.device)
    own_OOC = torch.eye(O, dtype=torch.bool, device=text_BC.device)[:, None].expand(-1, chain, -1)
    if window is not None:
        text_BOC &= text_BC[:, None] > last_BO1 + chain - window
        own_OOC = own_OOC & (step_C > chain - window)[:, None]
    return torch.cat([text_BOC, own_OOC.reshape(O, -1).expand(B, -1, -1)], dim=-1)


def interval_mask_mod(
    first_BR: Tensor, last_BR: Tensor, columns: int, masks: int, window: int | None = None
) -> MaskMod:
    """FlexAttention's mask_mod for rows of a comb whose text is in a cache, in closed form.

    Columns 0..columns - 1 are the text, of which a row sees first..last; column columns + r is row r itself, where rows
    are blocks of `masks` masks. With masks 0 the rows are text and have no columns of their own.

    Args:
        first_BR, last_BR: [B, R] long, the run of text columns of each row.
        columns: text columns.
        masks: K.
        window: positions, within a block too.
    """

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        text = (kv >= first_BR[b, q]) & (kv <= last_BR[b, q]) & (kv < columns)
        if not masks:
            return text
        row = kv - columns
        own = (row >= 0) & (row // masks == q // masks) & (row <= q)
        return text | (own if window is None else own & (q - row < window))

    return mask_mod


def _jumps(parents_BR: Tensor) -> Tensor:
    """Parents [B, R + 1] with row R as everybody's last ancestor, so that no index is negative."""
    R = parents_BR.shape[1]
    end_B1 = parents_BR.new_full((parents_BR.shape[0], 1), R)
    return torch.cat([torch.where(parents_BR < 0, R, parents_BR), end_B1], dim=1)


def _rounds(rows: int) -> int:
    """Doublings that reach every ancestor of a tree of that many rows. From the shape alone: no wait for the device."""
    return max(rows - 1, 0).bit_length()


def _columns(rows: int, columns: int | Tensor, window: int | None, like: Tensor) -> Tensor:
    """[1, L] or [B, L] columns, as row_mask takes them."""
    count = columns.shape[1] if isinstance(columns, Tensor) else columns
    if rows > count:
        raise ValueError(f"got {rows} rows for {count} columns, wanted a column for each row's key: give more columns.")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 position (a row sees itself), got {window}; None is no window.")
    return columns if isinstance(columns, Tensor) else torch.arange(columns, device=like.device)[None]
