"""What the rows of a module's chains see in training: the text before them, and the earlier depths of their own chain.

A drafter of one module has one cache: depth 1 writes the text's rows, depth k stands k - 1 positions further on and
joins them (EAGLE's way, and how engines run a module; trained so in EAGLE-3's training-time test, arXiv 2503.01840).
So only rows that some loss asks for run through the whole block; of the others it takes keys and values.
"""

# B sequences, O rows (one of each chain), C stored columns of text, H key-value heads, E width of a head.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foretell.ops.tree import beside_mask

Pair = tuple[Tensor, Tensor]  # keys and values [B, H, rows, E]


class ChainRows:
    """One depth's rows. It is handed to the block in its mask's place, one object a depth, so that a layer which is
    computed again for its gradient finds what it found. (No dataclass: FSDP hands a layer copies of those.)

    text_BC: the text's columns, in the order in which they were stored. first, last: the run of them that each row
    sees. before: keys and values of these and of the chains' earlier depths. chain: how many of the chain's own rows
    stand beside the text, this one included; 0: this row is text. Without text_BC only the keys and values of the rows
    are wanted, not what the block makes of them.
    """

    def __init__(
        self,
        text_BC: Tensor | None = None,
        first_BO: Tensor | None = None,
        last_BO: Tensor | None = None,
        before: Sequence[Pair] = (),
        chain: int = 0,
    ) -> None:
        self.text_BC, self.first_BO, self.last_BO = text_BC, first_BO, last_BO
        self.before, self.chain = before, chain
        self.seen: list[Pair] = []  # before, and these rows'

    def columns(self, key: Tensor, value: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of all columns, with these rows' own at the end, and the mask [B, 1, O, columns]."""
        self.seen = [*self.before, (key, value)]
        if self.text_BC is None or self.first_BO is None or self.last_BO is None:
            any_B1O1 = torch.ones(1, 1, key.shape[2], 1, dtype=torch.bool, device=key.device)
            return key[:, :, :1], value[:, :, :1], any_B1O1
        mask_BOL = beside_mask(self.text_BC, self.first_BO, self.last_BO, self.chain, window)
        keys, values = (torch.cat([pair[i].to(value.dtype) for pair in self.seen], dim=2) for i in (0, 1))
        return keys, values, mask_BOL[:, None]
