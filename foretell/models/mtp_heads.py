"""What stands in a parallel head between the target's state and an output matrix: seven kinds, none sees the future.

linear, ffn, mha_ffn, cnn, identical: the head types of TRL's proposed MTP (its documentation page; the closed pull
request huggingface/trl#4290, whose mha_ffn and cnn saw later tokens). medusa: Medusa (arXiv 2401.10774), residual SiLU
blocks. layer: Meta (arXiv 2404.19737), one transformer layer of the target's own class a head.
"""

# B sequences, T positions (or R rows), D hidden width, E width of an attention head.

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foretell.models.attention import RowMasks, foretell_attention
from foretell.models.block_copy import block_copy
from foretell.models.slot_cache import SlotCache, cache_name
from foretell.models.target import Target

HeadType = Literal["linear", "ffn", "mha_ffn", "cnn", "identical", "medusa", "layer"]
InitStrategy = Literal[
    "default", "kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal", "copy_lm_head"
]
KERNEL = 3  # of cnn: a token and the two before it


class Body(nn.Module):
    """[B, T, D] states of the target -> [B, T, D] for the output matrix.

    reach: earlier positions that a result depends on; None is all of them (then there is a cache). layers: how many
    key-value layers the cache has. turns: whether it reads the target's rotary embeddings, those of layer_type.
    """

    reach: int | None = 0
    layers = 0
    turns = False
    layer_type: str | None = None
    windows: dict[int, int] | None = None  # of its layers that never look further back

    def forward(
        self, hidden_BTD: Tensor, position_ids_BT: Tensor, places: Any = None, cache: SlotCache | None = None
    ) -> Tensor:
        """places: the target's rotary embeddings, for those that turn."""
        raise TypeError(f"{type(self).__name__} computes nothing.")


class Chain(Body):
    """A row of modules that look at one position only: linear, ffn, identical, medusa."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(
        self, hidden_BTD: Tensor, position_ids_BT: Tensor, places: Any = None, cache: SlotCache | None = None
    ) -> Tensor:
        """See Body."""
        return self.parts(hidden_BTD)


class Residual(nn.Module):
    """x + part(x)."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.part = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        return x + self.part(x)


def linear_body(width: int, layers: int, dropout: float, shared: bool) -> Chain:
    """layers - 1 times (Linear, ReLU, Dropout), then the output matrix; a shared matrix gets one more Linear before."""
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout)]
    return Chain(*parts, *([nn.Linear(width, width)] if shared else []))


def ffn_body(width: int, layers: int, dropout: float) -> Chain:
    """layers times x + Linear(GELU(Linear(x))), four times as wide inside."""
    return Chain(
        *(
            Residual(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout))
            for _ in range(layers)
        )
    )


def medusa_body(width: int, layers: int) -> Chain:
    """layers times x + SiLU(Linear(x)); the Linear starts at zero, so that the head starts as the target's own."""
    body = Chain(*(Residual(nn.Linear(width, width), nn.SiLU()) for _ in range(layers)))
    for parameter in body.parameters():
        nn.init.zeros_(parameter)
    return body


class CausalConv(nn.Module):
    """x + Dropout(LayerNorm(GELU(conv(x)))) over a token and the KERNEL - 1 before it in the same document."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.taps = nn.ModuleList(nn.Linear(width, width, bias=back == 0) for back in range(KERNEL))
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, position_ids_BT: Tensor) -> Tensor:
        """[B, T, D] in and out. Positions restart in every packed document, so a tap at position < back is outside."""
        out = self.taps[0](x_BTD)
        for back in range(1, min(KERNEL, x_BTD.shape[1])):
            inside = (position_ids_BT[:, back:] >= back)[..., None]
            out[:, back:] += self.taps[back](x_BTD[:, :-back] * inside)
        return x_BTD + self.dropout(self.norm(F.gelu(out)))


class ConvBody(Body):
    """cnn: layers of CausalConv."""

    def __init__(self, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.convs = nn.ModuleList(CausalConv(width, dropout) for _ in range(layers))
        self.reach = (KERNEL - 1) * layers

    def forward(
        self, hidden_BTD: Tensor, position_ids_BT: Tensor, places: Any = None, cache: SlotCache | None = None
    ) -> Tensor:
        """See Body."""
        for conv in self.convs:
            hidden_BTD = conv(hidden_BTD, position_ids_BT)
        return hidden_BTD


def attention_heads(width: int) -> int:
    """Heads 128 wide from a width of 1,024, 64 wide from 512, else the largest divisor up to 8."""
    if width >= 1024 and width % 128 == 0:
        return width // 128
    if width >= 512 and width % 64 == 0:
        return width // 64
    return next(n for n in range(8, 0, -1) if width % n == 0)


class AttentionLayer(nn.Module):
    """A post-norm transformer layer without positions of its own: the target's states carry them."""

    def __init__(self, width: int, dropout: float, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx  # of the cache; RowMasks hang themselves on modules that have one
        self.heads = attention_heads(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm_1, self.norm_2, self.dropout = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, cache: SlotCache | None) -> Tensor:
        """[B, T, D] in and out; what a row sees stands in the masks."""
        B, T, D = x_BTD.shape
        query, key, value = self.qkv(x_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        seen, _ = foretell_attention(self, query, key, value, None)
        x_BTD = self.norm_1(x_BTD + self.dropout(self.out(seen.reshape(B, T, D))))
        return self.norm_2(x_BTD + self.dropout(self.down(F.gelu(self.up(x_BTD)))))


class AttentionBody(Body):
    """mha_ffn: layers of AttentionLayer. Causal and within a document, unlike the pull request's."""

    reach = None

    def __init__(self, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.stack = nn.ModuleList(AttentionLayer(width, dropout, i) for i in range(layers))
        self.layers = layers

    def forward(
        self, hidden_BTD: Tensor, position_ids_BT: Tensor, places: Any = None, cache: SlotCache | None = None
    ) -> Tensor:
        """See Body."""
        for layer in self.stack:
            hidden_BTD = layer(hidden_BTD, cache)
        return hidden_BTD


class LayerBody(Body):
    """layer: copies of the target's last decoder layer and final norm. Reads states before that norm."""

    reach = None
    turns = True

    def __init__(self, target: Target, layers: int) -> None:
        super().__init__()
        copies = [block_copy(target) for _ in range(layers)]
        self.stack = nn.ModuleList(block for block, _ in copies)
        self.layer_type = copies[0][1]
        self.windows = {i: size for i, (one, _) in enumerate(copies) for size in one.foretell_windows.values()}
        for index, block in enumerate(self.stack):
            for part in block.modules():
                if hasattr(part, "layer_idx"):
                    part.layer_idx = index
        self.norm = copy.deepcopy(target.norm)
        self.layers = layers
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def forward(
        self, hidden_BTD: Tensor, position_ids_BT: Tensor, places: Any = None, cache: SlotCache | None = None
    ) -> Tensor:
        """See Body."""
        for block in self.stack:
            out = block(
                hidden_BTD,
                attention_mask=None,
                position_ids=position_ids_BT,
                position_embeddings=places,
                use_cache=cache is not None,
                **{cache_name(block.forward): cache},
            )
            hidden_BTD = out[0] if isinstance(out, tuple) else out
        return self.norm(hidden_BTD)


class MTPHead(nn.Module):
    """A body and, unless the target's output matrix is shared, an output matrix of its own [V or M, D]."""

    def __init__(
        self,
        target: Target,
        kind: HeadType,
        *,
        layers: int,
        dropout: float,
        shared: bool,
        vocabulary: int,
        init: InitStrategy,
    ) -> None:
        super().__init__()
        D, like = target.hidden_size, target.head.weight
        if kind == "layer":
            self.body: Body = LayerBody(target, layers)
        else:
            self.body = {
                "linear": lambda: linear_body(D, layers, dropout, shared),
                "ffn": lambda: ffn_body(D, layers, dropout),
                "mha_ffn": lambda: AttentionBody(D, layers, dropout),
                "cnn": lambda: ConvBody(D, layers, dropout),
                "identical": lambda: Chain(),
                "medusa": lambda: medusa_body(D, layers),
            }[kind]()
        self.output = None if shared else nn.Linear(D, vocabulary, bias=getattr(target.head, "bias", None) is not None)
        self.to(device=like.device, dtype=like.dtype)
        if kind not in ("medusa", "layer"):  # these say themselves how they start
            initialise(self.body, init)
        if self.output is not None:
            initialise(self.output, init)
        self.masks = RowMasks()
        self.masks.hang_on(self.body)


@torch.no_grad()
def initialise(module: nn.Module, strategy: InitStrategy) -> None:
    """Every weight of two dimensions by the strategy, biases zero. default and copy_lm_head leave PyTorch's (output
    matrices are copied afterwards, when the draft vocabulary is known)."""
    draw = {
        "kaiming_uniform": lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"),
        "kaiming_normal": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
        "xavier_uniform": nn.init.xavier_uniform_,
        "xavier_normal": nn.init.xavier_normal_,
    }.get(strategy)
    if draw is None:
        return
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            draw(parameter)
        elif name.endswith("bias"):
            parameter.zero_()
