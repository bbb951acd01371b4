"""The attention function that our rows run through, registered in transformers' own table under the name "foretell",
and the masks that a model's own code gets for it: what a row sees of the tree, within what the model asks for.

It reads grouped key-value heads once (query heads of a group become rows of the same matrix product), takes a ready
mask, and knows soft-capping and sinks. The mask comes as `attention_mask`, or from the RowMasks hung on the
module, one for each sliding window that the model uses.
"""

# B sequences, Hq query heads, H key-value heads, G = Hq / H, R rows, L visible columns, E width of a head.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foretell.models.chain_rows import ChainRows
from foretell.models.live import OfThread
from foretell.ops.tree import chain_mask, depths, document_mask, positions, row_mask

NAME = "foretell"
_BAND_ROWS = 16  # up to so many, masks of chains are kept


class RowMasks(OfThread):
    """What the rows of the current step may see: made once a step and window, shared by all layers."""

    def __init__(self) -> None:
        self.document_BT: Tensor | None = None
        self.parents_BR: Tensor | None = None
        self.full = False
        self.noted: dict[int, int] = {}  # by layer, the window through which it attends; see `note`
        self._made: dict[object, Tensor | None] = {}
        self._bands: dict[object, Tensor] = {}

    def begin(
        self,
        lengths_B: Tensor,
        visible: int,
        rows: int,
        *,
        parents_BR: Tensor | None = None,
        valid_rows_B: Tensor | None = None,
        full: bool = False,
        start: int | None = None,
        columns: dict[int, Tensor] | None = None,
    ) -> None:
        """parents_BR None is a chain of valid_rows_B rows; full says that every row sees every column (no mask). start:
        the length of all sequences, if that is one and no row is padding. columns: see SlotCache.
        """
        self.lengths_B, self.visible, self.rows = lengths_B, visible, rows
        self.parents_BR, self.valid_rows_B, self.full = parents_BR, valid_rows_B, full
        self.document_BT, self._columns = None, columns or {}
        self._made = {}
        alike = start is not None and parents_BR is None and valid_rows_B is None and start + rows == visible
        self._is_band = alike and rows <= _BAND_ROWS

    def begin_text(self, document_BT: Tensor) -> None:
        """Whole rows of packed text and no cache: training, and teacher-forced analysis."""
        self.document_BT, self.full, self._is_band = document_BT, False, False
        self._made = {}

    def hang_on(self, module: nn.Module) -> None:
        """Let the attention modules below find these masks."""
        for part in module.modules():
            if hasattr(part, "layer_idx"):
                part.__dict__["foretell_masks"] = self

    def get(self, window: int | None, groups: int, additive: torch.dtype | None = None) -> Tensor | None:
        """Mask [B, 1, G * R, L], or None where nothing is hidden: True where a row sees, or, in the dtype `additive`,
        0 there and -inf elsewhere (what SDPA would make of it in every layer).
        """
        if self.full and (window is None or self.visible <= window):
            return None
        if self._is_band and window is None:
            return self._band(groups, additive)[..., -self.visible :].expand(len(self.lengths_B), -1, -1, -1)
        key = (window, groups, additive)
        if key not in self._made:
            if self.document_BT is not None:
                mask_BRL = document_mask(self.document_BT, window=window)
            else:
                mask_BRL = self._seen(self._columns.get(window, self.visible), window)
            self._made[key] = _widened(mask_BRL[:, None], groups, additive)
        return self._made[key]

    def _seen(self, columns: int | Tensor, window: int | None = None) -> Tensor:
        if self.parents_BR is None:
            return chain_mask(self.rows, self.lengths_B, columns, self.valid_rows_B, window=window)
        return row_mask(self.parents_BR, self.lengths_B, columns, window=window)

    def _band(self, groups: int, additive: torch.dtype | None) -> Tensor:
        """[1, 1, G * R, W] the end of what a chain of R rows sees of any longer past: made once for many steps."""
        key = (self.rows, groups, additive, self.lengths_B.device)
        if key not in self._bands or self._bands[key].shape[-1] < self.visible:
            with torch.inference_mode(False):
                width = 2 * self.visible
                past_B = torch.full_like(self.lengths_B[:1], width - self.rows)
                self._bands[key] = _widened(chain_mask(self.rows, past_B, width)[:, None], groups, additive)
        return self._bands[key]

    @contextmanager
    def asked(self) -> Iterator[None]:
        """While this is open, a decoder in this thread that asks transformers for its masks gets these rows'."""
        before, _ASKED.masks = _ASKED.masks, self
        try:
            yield
        finally:
            _ASKED.masks = before

    def within(self, rule: Callable[..., Tensor], size: int | None, may_skip: bool) -> Tensor | None:
        """Mask [B, 1, R, L] of what a row sees and the model's own rule on positions allows: a window, a chunk.

        None where nothing is hidden, if it may be left out. size: of the window or chunk.
        """
        plain = rule is causal_mask_function
        if self.full and may_skip and (plain or (size is not None and self.visible <= size)):
            return None
        columns = self._columns.get(size, self.visible)
        seen_B1RL = self._seen(columns)[:, None] if self.full or isinstance(columns, Tensor) else self.get(None, 1)
        if plain:
            self._made["size", id(seen_B1RL)] = seen_B1RL, None
            return seen_B1RL
        depth_BR = torch.arange(self.rows, device=self.lengths_B.device)[None]
        depth_BR = depth_BR if self.parents_BR is None else depths(self.parents_BR)
        at_BR, position_BL = positions(depth_BR, self.lengths_B, columns)
        batch_B = torch.arange(len(at_BR), device=at_BR.device)[:, None, None, None]
        allowed = rule(batch_B, torch.zeros_like(batch_B), at_BR[:, None, :, None], position_BL[:, None, None])
        mask_B1RL = seen_B1RL & allowed
        self._made["size", id(mask_B1RL)] = mask_B1RL, size
        return mask_B1RL

    def widened(self, mask: Tensor, groups: int, additive: torch.dtype | None) -> Tensor:
        """A mask [B, 1, R, L] that the model hands over, as `get` would give it: made once for all its layers."""
        key = (id(mask), groups, additive)
        if key not in self._made:
            self._made[key] = mask, _widened(mask, groups, additive)  # kept, so that no other gets its id
        return self._made[key][1]

    def note(self, layer: int, mask: Tensor | None, window: int | None) -> None:
        """Remember the window through which a layer attends now, 0 for none: that of the mask that a model hands over.
        -1: a mask that is not ours any more.
        """
        _, size = (mask, window) if mask is None else self._made.get(("size", id(mask)), (mask, -1))
        self.noted[layer] = (size or 0) if self.noted.get(layer, size) == size else -1

    def windows(self) -> dict[int, int]:
        """By layer, the window that its attention was told since somebody asked; none if a mask was not ours."""
        noted, self.noted = self.noted, {}
        return {} if -1 in noted.values() else {layer: size for layer, size in noted.items() if size}


class _Asked(OfThread):
    """The masks that a model's own code asks for while its decoder runs in this thread."""

    masks: RowMasks | None = None


_ASKED = _Asked()


def _widened(mask: Tensor, groups: int, additive: torch.dtype | None) -> Tensor:
    B, heads, R, L = mask.shape
    wide = mask.repeat(1, 1, groups, 1) if heads == 1 else mask.reshape(B, -1, groups * R, L)
    if additive is None or wide.dtype != torch.bool:
        return wide if additive is None else wide.to(additive)
    return torch.zeros(wide.shape, dtype=additive, device=wide.device).masked_fill_(~wide, -torch.inf)


def model_mask(
    mask_function: Callable[..., Tensor],
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    **kwargs: object,
) -> Tensor | None:
    """What transformers' code that makes a model's masks calls for our attention."""
    masks = _ASKED.masks
    return None if masks is None else masks.within(mask_function, local_size, allow_is_causal_skip)


def foretell_attention(
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
    indices: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """query [B, Hq, R, E], key and value [B, H, L, E] -> [B, R, Hq, E]. indices [B, R, k]: sparse attention reads these
    columns only, within a ready mask."""
    B, Hq, R, E = query.shape
    H = key.shape[1]
    G = Hq // H
    masks: RowMasks | None = getattr(module, "foretell_masks", None)
    plain = softcap is None and s_aux is None
    additive = query.dtype if plain else None
    chains = isinstance(attention_mask, ChainRows)
    if chains:
        key, value, attention_mask = attention_mask.columns(key, value, sliding_window)
    if indices is not None and not chains:  # those speak of this pass's rows alone
        chosen_B1RL = torch.zeros(B, 1, R, key.shape[2], dtype=torch.bool, device=key.device)
        attention_mask = attention_mask & chosen_B1RL.scatter_(-1, indices[:, None].long(), True)
    if masks is not None:
        masks.note(module.layer_idx, attention_mask, sliding_window)
    if attention_mask is not None:
        mask = (_widened if masks is None or chains else masks.widened)(attention_mask, G, additive)
    elif masks is not None:
        mask = masks.get(sliding_window, G, additive)
    else:
        raise RuntimeError("attention 'foretell' needs a mask: run rows through Target, not the model itself.")
    packed = query.reshape(B, H, G * R, E)
    if plain:
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    else:
        scores = torch.matmul(packed, key.transpose(2, 3)) * (scaling if scaling is not None else E**-0.5)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        if s_aux is not None:  # a learned sink per head: one more column, whose value is nothing
            sink = s_aux.reshape(1, H, G, 1, 1).expand(B, H, G, R, 1).reshape(B, H, G * R, 1).to(scores.dtype)
            scores = torch.cat([scores, sink], dim=-1)
        probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        out = torch.matmul(F.dropout(probs[..., : key.shape[2]], p=dropout, training=module.training), value)
    # some models look at it through `view`; those that reshape it would copy it themselves
    return out.reshape(B, Hq, R, out.shape[-1]).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, foretell_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, model_mask)


class WideAttention(nn.Module):
    """A layer's attention whose queries, keys and values read [embedding | what the layer hands it] (EAGLE-3)."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = attention
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(attention, name)
            wide = nn.Linear(2 * narrow.in_features, narrow.out_features, narrow.bias is not None, device="meta")
            with torch.no_grad():
                wide.weight = nn.Parameter(torch.cat([torch.zeros_like(narrow.weight), narrow.weight], dim=1))
            wide.bias = narrow.bias
            setattr(attention, name, wide)

    def forward(self, hidden_states: Tensor, *args: Any, embedding_BRD: Tensor, **kwargs: Any) -> Any:
        """As the layer calls its attention."""
        return self.inner(torch.cat([embedding_BRD, hidden_states], dim=-1), *args, **kwargs)
