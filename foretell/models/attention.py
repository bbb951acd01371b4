"""The attention function that our rows run through, registered in transformers' own table under the name "foretell".

It reads grouped key-value heads once (query heads of a group become rows of the same matrix product), takes a ready
mask, and knows soft-capping and sinks. The mask comes as `attention_mask`, or from the RowMasks hung on the
module, one for each sliding window that the model uses.
"""

# B sequences, Hq query heads, H key-value heads, G = Hq / H, R rows, L visible columns, E width of a head.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foretell.ops.tree import chain_mask, document_mask, row_mask

NAME = "foretell"


class RowMasks:
    """What the rows of the current step may see: made once a step and window, shared by all layers."""

    def __init__(self) -> None:
        self.document_BT: Tensor | None = None
        self.parents_BR: Tensor | None = None
        self.full = False
        self._made: dict[object, Tensor | None] = {}

    def begin(
        self,
        lengths_B: Tensor,
        visible: int,
        rows: int,
        *,
        parents_BR: Tensor | None = None,
        valid_rows_B: Tensor | None = None,
        full: bool = False,
    ) -> None:
        """parents_BR None is a chain of valid_rows_B rows; full says that every row sees every column (no mask)."""
        self.lengths_B, self.visible, self.rows = lengths_B, visible, rows
        self.parents_BR, self.valid_rows_B, self.full = parents_BR, valid_rows_B, full
        self.document_BT = None
        self._made = {}

    def begin_text(self, document_BT: Tensor) -> None:
        """Whole rows of packed text and no cache: training, and teacher-forced analysis."""
        self.document_BT, self.full = document_BT, False
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
        if additive is not None:
            if (window, groups, additive) not in self._made:
                seen = self.get(window, groups)
                hidden = torch.zeros(seen.shape, dtype=additive, device=seen.device).masked_fill_(~seen, -torch.inf)
                self._made[window, groups, additive] = hidden
            return self._made[window, groups, additive]
        key = (window, groups)
        if key not in self._made:
            if self.document_BT is not None:
                mask_BRL = document_mask(self.document_BT, window=window)
            elif self.parents_BR is None:
                mask_BRL = chain_mask(self.rows, self.lengths_B, self.visible, self.valid_rows_B, window=window)
            else:
                mask_BRL = row_mask(self.parents_BR, self.lengths_B, self.visible, window=window)
            self._made[key] = mask_BRL.repeat(1, groups, 1)[:, None]
        return self._made[key]


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
    **kwargs: object,
) -> tuple[Tensor, None]:
    """query [B, Hq, R, E], key and value [B, H, L, E] -> [B, R, Hq, E]."""
    B, Hq, R, E = query.shape
    H = key.shape[1]
    G = Hq // H
    if attention_mask is None:
        masks = getattr(module, "foretell_masks", None)
        if masks is None:
            raise RuntimeError("attention 'foretell' needs a mask: run rows through Target, not the model itself.")
        plain = softcap is None and s_aux is None
        mask = masks.get(sliding_window, G, query.dtype if plain else None)
    else:
        mask = attention_mask if G == 1 else attention_mask.repeat(1, 1, G, 1)
    packed = query.reshape(B, H, G * R, E)
    if softcap is None and s_aux is None:
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    else:
        scores = torch.matmul(packed, key.transpose(2, 3)) * (scaling if scaling is not None else E**-0.5)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if s_aux is not None:  # a learned sink per head: one more column, whose value is nothing
            sink = s_aux.reshape(1, H, G, 1, 1).expand(B, H, G, R, 1).reshape(B, H, G * R, 1).to(scores.dtype)
            scores = torch.cat([scores, sink], dim=-1)
        probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        out = torch.matmul(F.dropout(probs[..., : key.shape[2]], p=dropout, training=module.training), value)
    return out.reshape(B, Hq, R, out.shape[-1]).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, foretell_attention)
