"""Attention of a comb in two passes: text rows first, without gradient, then mask rows against the keys kept of them.

What a row of a comb sees of the text is one run of columns, from its document's start (or its window's) to its owner;
beside it a mask sees the earlier masks of its own block. So nothing of size [rows, columns] is ever made: scores are
computed a tile at a time, forward and again backward, and tiles beyond a run are skipped. The keys and values of
text are constants here: no adapter touches them, so no gradient reaches them.

`dense_attention` is the slow twin: the same rule as one boolean mask, through `foretell_attention`; it also serves
models with soft-capped scores or sinks. On a CUDA device the same rule runs as a FlexAttention block mask.
"""

# B sequences, Hq query heads, H key-value heads, G = Hq / H, R rows (of masks: blocks of K), L text columns, E width of
# a head.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foretell.models.attention import foretell_attention
from foretell.ops.tree import MaskMod, interval_mask_mod

COMB = "foretell_comb"
# of one tile: its scores fit a CPU's caches, and few rows, so that little lies beyond their runs
TILE_NUMBERS, TILE_COLUMNS, TILE_ROWS = 2**20, 4096, 256


class CombKeys(Cache):
    """Keys and values of a text, written chunk by chunk, and what the rows of the current pass see of them.

    device: where they are kept (None: where they are made); long texts may live on the CPU beside a small GPU.
    """

    def __init__(self, tokens: int, device: torch.device | str | None = None) -> None:
        super().__init__(layers=[])
        self.tokens, self.device = tokens, device
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._flex: dict[int | None, Any] = {}

    def begin(self, start_BR: Tensor, last_BR: Tensor, at_BR: Tensor, end: int, write: int | None, masks: int) -> None:
        """Row r sees text columns start..last and stands at column `at` (for windows); last < start: none of them.

        end: text columns in use. write: the column of the first row, if rows are text (then masks is 0), else None and
        rows are blocks of `masks` masks.
        """
        self.start_BR, self.last_BR, self.at_BR = start_BR, last_BR, at_BR
        self.end, self.write, self.masks = end, write, masks
        self._flex = {}

    def first(self, window: int | None) -> Tensor:
        """[B, R] first visible column."""
        return self.start_BR if window is None else torch.maximum(self.start_BR, self.at_BR - window + 1)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Nothing is kept here: what some layers hand over is compressed (MLA), and only attention sees the rest."""
        return key_states, value_states

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        """The pass's keys and values [B, H, R, E], if its rows are text: masks' are never kept."""
        if self.write is None:
            return
        if layer not in self._kept:
            self._kept[layer] = self._room(key), self._room(value)
        for kept, new in zip(self._kept[layer], (key, value), strict=True):
            kept[:, :, self.write : self.write + new.shape[2]] = new.detach()

    def _room(self, like: Tensor) -> Tensor:
        B, H, _, E = like.shape
        return like.new_zeros(B, H, self.tokens, E, device=self.device or like.device)

    def text(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, end, E] of a layer."""
        key, value = self._kept[layer]
        return key[:, :, : self.end].to(device), value[:, :, : self.end].to(device)

    def _rule(self, window: int | None) -> tuple[MaskMod, int, int, int]:
        """(what a row sees, sequences, rows, columns: the text's and, of masks, the rows' own)."""
        (B, R), masks = self.last_BR.shape, self.masks
        mod = interval_mask_mod(self.first(window), self.last_BR, self.end, masks, window)
        return mod, B, R, self.end + (R if masks else 0)

    def visible(self, window: int | None) -> Tensor:
        """bool [B, R, end (+ R masks)]: the rule as one dense mask."""
        mod, *sizes = self._rule(window)
        b, q, kv = (torch.arange(n, device=self.last_BR.device) for n in sizes)
        return mod(b[:, None, None], b[:1], q[:, None], kv)

    def block_mask(self, window: int | None) -> Any:
        """The rule for FlexAttention, made once a pass and window for all layers."""
        if window not in self._flex:
            from torch.nn.attention.flex_attention import create_block_mask

            mod, B, R, columns = self._rule(window)
            cuda = self.last_BR.device.type == "cuda"  # compiled, the rule is never written out densely
            self._flex[window] = create_block_mask(
                mod, B, None, R, columns, device=str(self.last_BR.device), _compile=cuda
            )
        return self._flex[window]


def comb_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """query [B, Hq, R, E], key and value [B, H, R, E] of this pass's rows -> [B, R, Hq, E]."""
    comb: CombKeys = module.foretell_comb
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary positions give fp32
    comb.keep(module.layer_idx, key, value)
    text_key, text_value = comb.text(module.layer_idx, query.device)
    if softcap is not None or s_aux is not None or dropout:
        masked = (key, value) if comb.masks else (key[:, :, :0], value[:, :, :0])
        return dense_attention(
            module, query, text_key, text_value, *masked, comb.visible(sliding_window),
            scaling=scaling, dropout=dropout, softcap=softcap, s_aux=s_aux,
        )  # fmt: skip
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if query.device.type == "cuda":
        if comb.masks:
            text_key, text_value = torch.cat([text_key, key], dim=2), torch.cat([text_value, value], dim=2)
        out = _flex(query, text_key, text_value, comb.block_mask(sliding_window), scale)
        return out.transpose(1, 2), None
    out = tiled_attention(
        query, text_key, text_value, key, value, comb.first(sliding_window), comb.last_BR, comb.masks,
        scale=scale, window=sliding_window,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def dense_attention(
    module: nn.Module,
    query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    mask_key: Tensor,
    mask_value: Tensor,
    visible_BRL: Tensor,
    **options: Any,
) -> tuple[Tensor, None]:
    """Text and mask columns side by side under one boolean mask [B, R, L + R]. The definition."""
    key = torch.cat([text_key, mask_key], dim=2)
    value = torch.cat([text_value, mask_value], dim=2)
    return foretell_attention(module, query, key, value, visible_BRL[:, None], **options)


_compiled: Any = None


def _flex(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, scale: float) -> Tensor:
    """[B, Hq, R, E], compiled once a process."""
    global _compiled
    if _compiled is None:
        from torch.nn.attention.flex_attention import flex_attention

        _compiled = torch.compile(flex_attention, dynamic=True)
    return _compiled(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=True)


def tiled_attention(
    query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    mask_key: Tensor,
    mask_value: Tensor,
    first_BR: Tensor,
    last_BR: Tensor,
    masks: int,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """[B, Hq, R, E]: softmax over the text columns first..last of each row and the earlier masks of its own block.

    Args:
        query: [B, Hq, R, E], for masks R = blocks * K.
        text_key, text_value: [B, H, L, E], constants. Values, and with them the result, may be of another width.
        mask_key, mask_value: [B, H, R, E], of the same rows as the queries; not read where masks is 0.
        first_BR, last_BR: [B, R] long.
        masks: K, 0 for text rows, each of which must see a column.
        window: positions, within a block too.
    """
    B, Hq, R, E = query.shape
    H = text_key.shape[1]
    grouped = query.reshape(B, H, Hq // H, R, E)
    out = _Tiled.apply(grouped, text_key, text_value, mask_key, mask_value, first_BR, last_BR, masks, scale, window)
    return out.reshape(B, Hq, R, text_value.shape[-1])


class _Tiled(torch.autograd.Function):
    """Online softmax over tiles; what the backward pass needs of the scores is one number a row."""

    @staticmethod
    def forward(ctx: Any, query, text_key, text_value, mask_key, mask_value, first, last, masks, scale, window):
        out = query.new_empty(*query.shape[:-1], text_value.shape[-1])  # values may be narrower than keys
        wide = torch.promote_types(query.dtype, torch.float32)  # of the softmax and of sums
        lse = query.new_empty(query.shape[:-1], dtype=wide)
        for rows, tiles in _tiles(query, first, last, masks):
            q = query[:, :, :, rows]  # [B, H, G, r, E]
            top = q.new_full(q.shape[:-1], -torch.inf, dtype=wide)
            mass, acc = torch.zeros_like(top), torch.zeros_like(out[:, :, :, rows], dtype=wide)
            if masks:
                scores = _own_scores(q, mask_key[:, :, rows], masks, scale, window)
                top = scores.amax(-1).flatten(3)
                probs = torch.exp(scores - scores.amax(-1, keepdim=True))
                mass = probs.sum(-1).flatten(3)
                acc = (probs.to(q.dtype) @ _blocks(mask_value[:, :, rows], masks)).flatten(3, 4).to(wide)
            for tile in tiles:
                scores = _text_scores(q, text_key, first, last, rows, tile, scale)
                new = torch.maximum(top, scores.amax(-1))
                probs = scores.sub_(new.clamp(min=-1e30)[..., None]).exp_()
                old = torch.exp(top - new.clamp(min=-1e30))
                mass = mass * old + probs.sum(-1)
                acc = acc * old[..., None] + _by_head(probs.to(q.dtype), text_value[:, :, tile])
                top = new
            out[:, :, :, rows] = (acc / mass[..., None]).to(out.dtype)
            lse[:, :, :, rows] = top + mass.log()
        ctx.save_for_backward(query, text_key, text_value, mask_key, mask_value, first, last, out, lse)
        ctx.rest = (masks, scale, window)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, text_key, text_value, mask_key, mask_value, first, last, out, lse = ctx.saved_tensors
        (masks, scale, window), wide = ctx.rest, lse.dtype
        grad_query, grad_key, grad_value = (torch.zeros_like(t) for t in (query, mask_key, mask_value))
        for rows, tiles in _tiles(query, first, last, masks):
            q, grad, row_lse = query[:, :, :, rows], grad_out[:, :, :, rows], lse[:, :, :, rows]
            inner = (grad.to(wide) * out[:, :, :, rows].to(wide)).sum(-1)
            into_q = torch.zeros_like(q, dtype=wide)
            if masks:
                key, value = (_blocks(t[:, :, rows], masks) for t in (mask_key, mask_value))
                scores = _own_scores(q, mask_key[:, :, rows], masks, scale, window)
                probs = torch.exp(scores - row_lse.unflatten(3, (-1, masks))[..., None])
                by_block = grad.unflatten(3, (-1, masks))
                into_probs = (by_block @ value.transpose(-1, -2)).to(wide)
                ds = probs * (into_probs - inner.unflatten(3, (-1, masks))[..., None])
                ds = (ds * scale).to(q.dtype)
                into_q += (ds @ key).flatten(3, 4)
                q_blocks = q.unflatten(3, (-1, masks))
                # a key-value head serves G query heads: their gradients add up
                grad_key[:, :, rows] = (ds.transpose(-1, -2) @ q_blocks).sum(2).flatten(2, 3)
                grad_value[:, :, rows] = (probs.to(q.dtype).transpose(-1, -2) @ by_block).sum(2).flatten(2, 3)
            for tile in tiles:
                probs = _text_scores(q, text_key, first, last, rows, tile, scale).sub_(row_lse[..., None]).exp_()
                into_probs = _by_head(grad, text_value[:, :, tile].transpose(-1, -2)).to(wide)
                ds = into_probs.sub_(inner[..., None]).mul_(probs)
                into_q += _by_head(ds.mul_(scale).to(q.dtype), text_key[:, :, tile])
            grad_query[:, :, :, rows] = into_q.to(grad_query.dtype)
        return grad_query, None, None, grad_key, grad_value, None, None, None, None, None


def _tiles(query: Tensor, first_BR: Tensor, last_BR: Tensor, masks: int) -> list[tuple[slice, list[slice]]]:
    """Slices of rows (whole blocks), each with the slices of columns that any of them sees."""
    B, H, G, R, _ = query.shape
    span = int((last_BR - first_BR).amax()) + 1 if R else 0
    columns = max(min(span, TILE_COLUMNS), 1)
    step = min(max(TILE_NUMBERS // (B * H * G * columns), 1), TILE_ROWS)
    step = max(step // masks, 1) * masks if masks else step
    found = []
    for at in range(0, R, step):
        rows = slice(at, min(at + step, R))
        seen = last_BR[:, rows] >= first_BR[:, rows]
        tiles: list[slice] = []
        if bool(seen.any()):
            low = int(first_BR[:, rows][seen].amin())
            high = int(last_BR[:, rows][seen].amax()) + 1
            tiles = [slice(c, min(c + TILE_COLUMNS, high)) for c in range(low, high, TILE_COLUMNS)]
        found.append((rows, tiles))
    return found


def _by_head(rows: Tensor, other: Tensor) -> Tensor:
    """[B, H, G, r, x] @ [B, H, x, y]: heads of a group are rows of one product."""
    B, H, G, r, _ = rows.shape
    return (rows.reshape(B, H, G * r, -1) @ other).view(B, H, G, r, -1)


def _text_scores(
    q: Tensor, key: Tensor, first_BR: Tensor, last_BR: Tensor, rows: slice, tile: slice, scale: float
) -> Tensor:
    """[B, H, G, r, columns of the tile] in fp32 or wider, -inf outside of each row's run."""
    scores = _wide(_by_head(q * scale, key[:, :, tile].transpose(-1, -2)))
    first_Br, last_Br = first_BR[:, rows], last_BR[:, rows]
    if int(first_Br.amax()) > tile.start or int(last_Br.amin()) < tile.stop - 1:
        column_C = torch.arange(tile.start, tile.stop, device=key.device)
        hidden_BrC = (column_C < first_Br[..., None]) | (column_C > last_Br[..., None])
        scores.masked_fill_(hidden_BrC[:, None, None], -torch.inf)
    return scores


def _own_scores(q: Tensor, key: Tensor, masks: int, scale: float, window: int | None) -> Tensor:
    """[B, H, G, blocks, K, K] in fp32 or wider, -inf at later masks (and beyond the window)."""
    scores = _wide((q * scale).unflatten(3, (-1, masks)) @ _blocks(key, masks).transpose(-1, -2))
    at_K = torch.arange(masks, device=q.device)
    back_KK = at_K[:, None] - at_K
    hidden_KK = back_KK < 0 if window is None else (back_KK < 0) | (back_KK >= window)
    return scores.masked_fill_(hidden_KK, -torch.inf)


def _wide(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _blocks(rows: Tensor, masks: int) -> Tensor:
    """[B, H, R, E] -> [B, H, 1, blocks, K, E]."""
    return rows.unflatten(2, (-1, masks))[:, :, None]


ALL_ATTENTION_FUNCTIONS.register(COMB, comb_attention)
