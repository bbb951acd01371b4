"""One sequential MTP module (DeepSeek-V3 report, arXiv 2412.19437, section 2.2): fuse, one decoder layer, norm."""

# B sequences, T positions (or R rows), D hidden width.

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foretell.models.attention import RowMasks
from foretell.models.block_copy import block_copy, widen
from foretell.models.chain_rows import ChainRows
from foretell.models.slot_cache import SlotCache, cache_name
from foretell.models.target import Target

FusionOrder = Literal["embedding_hidden", "hidden_embedding"]
BlockKind = Literal["mtp", "eagle3"]


class MTPBlock(nn.Module):
    """h^k = norm(Block(W [enorm(E(t_{i+k})) | hnorm(h^{k-1}_i)])), the block being the target's own layer class.

    Of the kind "eagle3" nothing is fused: the block runs on h, and its queries, keys and values read [enorm(E) | the
    layer's own norm of h]. forward returns (what the head reads, what the next depth receives).
    """

    def __init__(
        self,
        target: Target,
        order: FusionOrder,
        chain_raw: bool,
        initialisation: str,
        post_norm: bool = True,
        kind: BlockKind = "mtp",
    ) -> None:
        super().__init__()
        D, like = target.hidden_size, target.head.weight
        self.order, self.chain_raw, self.kind = order, chain_raw or kind == "eagle3", kind
        self.enorm = fresh_norm(target.norm)
        if kind == "mtp":
            self.hnorm = fresh_norm(target.norm)
            self.eh_proj = nn.Linear(2 * D, D, bias=False, device=like.device, dtype=target.dtype)
        block, self.layer_type = block_copy(target)
        if kind == "eagle3":
            widen(target, block, self.layer_type)
        self.block = block
        self.norm = copy.deepcopy(target.norm)
        self.masks = RowMasks()
        self.masks.hang_on(block)
        self._initialise(target, initialisation, post_norm)
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    @torch.no_grad()
    def _initialise(self, target: Target, how: str, post_norm: bool) -> None:
        D = target.hidden_size
        hidden_half = slice(0, D) if self.order == "hidden_embedding" else slice(D, 2 * D)
        std = getattr(target.config, "initializer_range", 0.02) or 0.02
        if self.kind == "mtp":
            self.eh_proj.weight.normal_(std=std)
        elif how == "copy":
            for name in ("q_proj", "k_proj", "v_proj"):
                self.block.self_attn.inner.get_submodule(name).weight[:, :D].normal_(std=std)
        if how == "identity" and self.kind == "mtp":
            # the block is a copy of the target's last layer, so it must read what that layer reads: the direction of
            # the state before the final norm (its gain undone), at the residual stream's size. The size stands in the
            # norms' gains, the embedding's too: a step of the optimizer then moves both halves of the fusion alike
            # (+0.09 tau after 100 steps against a size that stands in the fusion, docs/log.md)
            self.eh_proj.weight.zero_()
            scale_D = torch.ones(D, dtype=torch.float32, device=self.eh_proj.weight.device)
            if post_norm:
                gain_D = _gain(target.norm, like=self.eh_proj.weight[0, :D]).float()
                scale_D = gain_D.abs().median() / torch.where(gain_D.abs() < 0.05, torch.inf, gain_D)
            self.eh_proj.weight[:, hidden_half] = torch.diag(scale_D).to(self.eh_proj.weight.dtype)
            size = residual_size(target)
            _set_gain(self.hnorm, size)
            _set_gain(self.enorm, size)
            if not _has_gain(self.hnorm):  # OLMo, nanochat
                self.eh_proj.weight.mul_(size)
        if how == "random":
            for module in self.block.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.dim() >= 2:
                        parameter.normal_(std=std)
                    elif name == "bias":
                        parameter.zero_()
            _set_gain(self.norm, 1.0)

    def forward(
        self,
        embedding_BTD: Tensor,
        hidden_BTD: Tensor,
        position_embeddings: Any,
        position_ids_BT: Tensor,
        cache: SlotCache | None = None,
        rows: ChainRows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All [B, T, D]; what a row sees stands in `rows`, or in the RowMasks that hang on the block."""
        first = self.eh_proj if self.kind == "mtp" else self.block.self_attn.inner.q_proj
        dtype = first.weight.dtype  # fp32 master weights may stand beside a bf16 target
        read, hidden, beside = self.enorm(embedding_BTD.to(dtype)), hidden_BTD.to(dtype), {}
        if self.kind == "eagle3":
            read, beside = hidden, {"embedding_BRD": read}
        else:
            halves = (read, self.hnorm(hidden))
            read = self.eh_proj(torch.cat(halves[::-1] if self.order == "hidden_embedding" else halves, dim=-1))
        if isinstance(position_embeddings, tuple):  # cos and sin, in the target's type
            position_embeddings = tuple(one.to(dtype) for one in position_embeddings)
        raw = self.block(
            read,
            attention_mask=rows,
            position_ids=position_ids_BT,
            position_embeddings=position_embeddings,
            use_cache=cache is not None,
            **{cache_name(self.block.forward): cache},
            **beside,
        )
        raw = raw[0] if isinstance(raw, tuple) else raw
        normed = self.norm(raw).to(hidden_BTD.dtype)
        return normed, (raw.to(hidden_BTD.dtype) if self.chain_raw else normed)

    @torch.no_grad()
    def takes_rows(self, target: Target) -> bool:
        """Whether its layer leaves the mask to our attention function: then ChainRows can stand in its place."""
        position_ids_BT = torch.arange(2, device=target.device)[None]
        states_BTD = target.embed(position_ids_BT)
        places = target.position_embeddings(states_BTD, position_ids_BT, self.layer_type)
        try:
            self(states_BTD, states_BTD, places, position_ids_BT, rows=ChainRows())
        except (AttributeError, TypeError):  # Doge makes a mask of its own from the one that it is given
            return False
        return True


@torch.no_grad()
def residual_size(target: Target) -> float:
    """Typical root mean square of what the last layer reads, over a few arbitrary tokens."""
    count = min(32, target.vocab_size)
    ids = torch.linspace(0, target.vocab_size - 1, count, device=target.device).long()[None]
    states = target.forward_text(ids, torch.arange(count, device=target.device)[None]).pre_norm_BRD
    return float(states.float().pow(2).mean(-1).sqrt().median())


@torch.no_grad()
def _gain(norm: nn.Module, like: Tensor) -> Tensor:
    """[D] what a norm multiplies by, found on numbers: RMSNorm, LayerNorm, and Gemma's zero-centred weights alike."""
    probe = torch.ones_like(like)[None]
    probe[0, ::2] = -1.0
    return (norm(probe) - norm(-probe))[0] / 2 * probe[0]


@torch.no_grad()
def _set_gain(norm: nn.Module, gain: float) -> None:
    """Weight to the value that multiplies by `gain`; nothing where a norm has none."""
    if not _has_gain(norm):
        return
    norm.weight.fill_(1.0)
    zero_centred = bool(_gain(norm, norm.weight).mean() > 1.5)
    norm.weight.fill_(gain - 1.0 if zero_centred else gain)
    if getattr(norm, "bias", None) is not None:
        norm.bias.data.zero_()


def _has_gain(norm: nn.Module) -> bool:
    return getattr(norm, "weight", None) is not None


def fresh_norm(norm: nn.Module) -> nn.Module:
    """A copy of a norm that multiplies by one."""
    fresh = copy.deepcopy(norm)
    _set_gain(fresh, 1.0)
    return fresh
