"""The token tree: who sees whom, and where each row stands. Nobody builds a mask anywhere else.

A row sees exactly its ancestors and itself, and everything that the cache already holds. `parents` writes the tree
down: the index of a row's parent, ROOT for a row that hangs below everything in the cache, PADDING for a row that sees
only itself. The position of a row is the cached length plus its depth (its number of ancestors).

`brute_force_visible` is the definition, by walking parents in Python; every other function here is held against it.
"""

# B sequences, T tokens of a text, K masks below a token, R rows of one forward, L columns (cached tokens, then rows).

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from foretell.types import PAD_DOCUMENT

ROOT = -1  # parent of a row that hangs below the cache
PADDING = -2  # parent of a row that is there only to fill a rectangle
REGULAR, MASK = 0, 1  # kinds of rows

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


# -- the definition ----------------------------------------------------------------------------------------------------


def brute_force_visible(parents_R: Sequence[int]) -> Tensor:
    """bool [R, R], [r, s]: row r sees row s. The definition, slow and checkable by eye.

    Raises:
        ValueError: a parent is no row, is padding, or a row is its own ancestor.
    """
    R = len(parents_R)
    visible_RR = torch.zeros(R, R, dtype=torch.bool)
    for r in range(R):
        at, steps = r, 0
        while at >= 0:
            visible_RR[r, at] = True
            at, steps = parents_R[at], steps + 1
            if at >= R or steps > R or (at == PADDING and steps > 1):
                raise ValueError(
                    f"parents {list(parents_R)} are no forest: row {r} leads to "
                    f"{'a circle' if steps > R else at}; a parent is a row, {ROOT} (root) or {PADDING} (padding)."
                )
    return visible_RR


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


def row_mask(parents_BR: Tensor, lengths_B: Tensor, total_length: int, window: int | None = None) -> Tensor:
    """What each row of a forward may see, over the columns of the cache.

    Columns [0, lengths_B[b]) hold sequence b's cached tokens (position = column), column lengths_B[b] + r holds row r,
    the rest nothing. lengths_B[b] + R may not exceed total_length (not checked: that would wait for the device).

    Args:
        parents_BR: [B, R] long, parents of the rows.
        lengths_B: [B] long, tokens in the cache.
        total_length: L, columns.
        window: positions: a row at position p sees positions > p - window (transformers' sliding window).

    Returns:
        bool [B, R, L], True where visible. Padding rows see themselves only.

    Raises:
        ValueError: there are more rows than columns, or the window is empty.
    """
    R = parents_BR.shape[1]
    _check_columns(R, total_length, window)
    column_L = torch.arange(total_length, device=parents_BR.device)
    row_BL = column_L - lengths_B[:, None]  # the row stored in a column; negative: a cached token
    stored_BL = (row_BL >= 0) & (row_BL < R)
    row_BL = row_BL.clamp(0, R - 1)
    tree_BRL = ancestors(parents_BR).gather(2, row_BL[:, None].expand(-1, R, -1)) & stored_BL[:, None]
    cached_BRL = (column_L < lengths_B[:, None])[:, None] & (parents_BR != PADDING)[..., None]
    visible_BRL = tree_BRL | cached_BRL
    if window is not None:
        depth_BR = depths(parents_BR)
        position_BL = torch.where(stored_BL, lengths_B[:, None] + depth_BR.gather(1, row_BL), column_L)
        visible_BRL &= position_BL[:, None] > (lengths_B[:, None] + depth_BR)[..., None] - window
    return visible_BRL


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
    rows: int, lengths_B: Tensor, total_length: int, valid_rows_B: Tensor | None = None, window: int | None = None
) -> Tensor:
    """row_mask of chains, in closed form: no work that grows with R^2.

    Args:
        rows: R.
        lengths_B, total_length, window: as in row_mask.
        valid_rows_B: [B] long, sequence b's first valid_rows_B[b] rows are a chain, the rest padding. None: all rows.

    Returns:
        bool [B, R, L], True where visible. Padding rows see themselves only.

    Raises:
        ValueError: as row_mask.
    """
    _check_columns(rows, total_length, window)
    column_L = torch.arange(total_length, device=lengths_B.device)
    row_R = torch.arange(rows, device=lengths_B.device)
    own_BR1 = (lengths_B[:, None] + row_R)[..., None]  # the column, and in a chain also the position, of a row
    visible_BRL = column_L <= own_BR1
    if window is not None:
        visible_BRL &= column_L > own_BR1 - window
    if valid_rows_B is not None:
        valid_BR1 = (row_R < valid_rows_B[:, None])[..., None]
        visible_BRL = torch.where(valid_BR1, visible_BRL, column_L == own_BR1)
    return visible_BRL


# -- packed text and combs: forests and their closed forms -------------------------------------------------------------


def forest(document_BT: Tensor) -> Tensor:
    """Long [B, T], parents of packed causal text: a chain for each document. Documents are contiguous."""
    B, T = document_BT.shape
    parents_BT = torch.arange(-1, T - 1, device=document_BT.device).expand(B, T).clone()
    first_BT = torch.ones(B, T, dtype=torch.bool, device=document_BT.device)
    first_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    parents_BT.masked_fill_(first_BT, ROOT)
    return parents_BT.masked_fill_(document_BT == PAD_DOCUMENT, PADDING)


def document_mask(document_BT: Tensor, window: int | None = None) -> Tensor:
    """bool [B, T, T], [b, t, s]: packed causal text in closed form, equal to the tree rule of `forest`.

    Position t sees s <= t of its own document, with a window only s > t - window; padding sees itself only.
    """
    T = document_BT.shape[1]
    _check_columns(T, T, window)
    at_T = torch.arange(T, device=document_BT.device)
    behind_TT = at_T[:, None] - at_T
    causal_TT = (behind_TT >= 0) if window is None else (behind_TT >= 0) & (behind_TT < window)
    same_BTT = document_BT[:, :, None] == document_BT[:, None]
    text_BT1 = (document_BT != PAD_DOCUMENT)[..., None]
    return (same_BTT & causal_TT & text_BT1) | (behind_TT == 0)


def comb(tokens: int, masks: int, document_BT: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The tree that trains a mask method: K masks hang off each token of a text, as a side chain.

    Rows 0..T-1 are the tokens; row T + t * K + (j - 1) is mask j = 1..K of token t. So the tokens can run first,
    without gradient, and the masks below them in a second forward.

    Args:
        tokens: T.
        masks: K, masks of each token.
        document_BT: [B, T] packed documents, PAD_DOCUMENT on padding (whose masks are padding too). None: one document.

    Returns:
        (parents_BR, kinds_BR, positions_BR): long [B, R], R = T * (1 + K). Positions restart in each document.

    Raises:
        ValueError: no tokens, no masks, or documents of another length.
    """
    document_BT = _check_comb(tokens, masks, document_BT)
    B, device = document_BT.shape[0], document_BT.device
    owner_A, step_A = _comb_rows(torch.arange(tokens * (1 + masks), device=device), tokens, masks)
    row_A = torch.arange(len(owner_A), device=device)
    parents_BT = forest(document_BT)
    parents_BR = torch.where(step_A <= 1, owner_A, row_A - 1).repeat(B, 1)
    parents_BR[:, :tokens] = parents_BT
    parents_BR.masked_fill_((document_BT == PAD_DOCUMENT)[:, owner_A], PADDING)
    kinds_BR = torch.where(step_A > 0, MASK, REGULAR).repeat(B, 1)
    positions_BR = depths(parents_BT)[:, owner_A] + step_A
    return parents_BR, kinds_BR, positions_BR.masked_fill_(parents_BR == PADDING, 0)


def hang(document_BT: Tensor, owner_BO: Tensor, valid_BO: Tensor, masks: int) -> tuple[Tensor, Tensor]:
    """The tree of a text whose chosen tokens carry K masks each: `comb` where all of them do.

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


def comb_mask_mod(
    tokens: int, masks: int, document_BT: Tensor | None = None, window: int | None = None, first_row: int = 0
) -> MaskMod:
    """FlexAttention's mask_mod for the rows of `comb`, in closed form.

    A row sees the tokens of its document up to its owner, and of its owner's masks those up to itself.

    Args:
        tokens, masks, document_BT: as for `comb`; with document_BT None every sequence is one document.
        window: positions, as in row_mask.
        first_row: the row that query 0 is: `tokens` where only the masks run and the tokens' keys are already kept.

    Returns:
        mask_mod(b, h, q, kv) -> bool, for torch.nn.attention.flex_attention.create_block_mask.
    """
    one_document = document_BT is None
    document_BT = _check_comb(tokens, masks, document_BT)
    _check_columns(1, 1, window)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        q = q + first_row
        owner_q, step_q = _comb_rows(q, tokens, masks)
        owner_kv, step_kv = _comb_rows(kv, tokens, masks)
        token = (step_kv == 0) & (owner_kv <= owner_q)
        own_mask = (owner_kv == owner_q) & (step_kv <= step_q)
        sees = token | own_mask
        if window is not None:  # within one document, differences of positions are differences of owner + step
            sees = sees & (owner_kv + step_kv > owner_q + step_q - window)
        if one_document:
            return sees
        document = document_BT[b, owner_q]
        return (sees & (document == document_BT[b, owner_kv]) & (document != PAD_DOCUMENT)) | (q == kv)

    return mask_mod


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


def _comb_rows(row: Tensor, tokens: int, masks: int) -> tuple[Tensor, Tensor]:
    """Owner (token) and step (0: the token itself, j: its mask j) of a comb's rows."""
    mask = row - tokens
    is_mask = mask >= 0
    mask = mask.clamp(min=0)
    return torch.where(is_mask, mask // masks, row), torch.where(is_mask, mask % masks + 1, 0)


def _jumps(parents_BR: Tensor) -> Tensor:
    """Parents [B, R + 1] with row R as everybody's last ancestor, so that no index is negative."""
    R = parents_BR.shape[1]
    end_B1 = parents_BR.new_full((parents_BR.shape[0], 1), R)
    return torch.cat([torch.where(parents_BR < 0, R, parents_BR), end_B1], dim=1)


def _rounds(rows: int) -> int:
    """Doublings that reach every ancestor of a tree of that many rows. From the shape alone: no wait for the device."""
    return max(rows - 1, 0).bit_length()


def _check_columns(rows: int, columns: int, window: int | None) -> None:
    if rows > columns:
        raise ValueError(
            f"got {rows} rows for {columns} columns, wanted a column for each row's key: raise total_length."
        )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 position (a row sees itself), got {window}; None is no window.")


def _check_comb(tokens: int, masks: int, document_BT: Tensor | None) -> Tensor:
    if tokens < 1 or masks < 1:
        raise ValueError(
            f"a comb needs at least 1 token and 1 mask, got {tokens} and {masks}; without masks use forest."
        )
    if document_BT is None:
        return torch.zeros(1, tokens, dtype=torch.long)
    if document_BT.dim() != 2 or document_BT.shape[1] != tokens:
        raise ValueError(
            f"got documents of shape {tuple(document_BT.shape)} for {tokens} tokens, wanted [B, {tokens}]."
        )
    return document_BT
