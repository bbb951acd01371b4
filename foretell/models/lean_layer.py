"""Plain decoder layers for training adapters of a frozen target: the same numbers in fewer passes and less memory.

A layer of transformers writes some twenty tensors a row that autograd keeps; here a frozen linear with its adapter is
one operation, which norms (or gates) its input itself and computes that again in the backward pass. What is kept of a
layer is its input, the queries, keys and values, what attention gives, the middle, and the gate and up products.

The slow twin is the layer itself, which also runs wherever a layer is of another kind; tests hold the two together.
"""

# N rows flattened, B sequences, R rows of each, D width in, O widths out together, r rank together, Hq query heads, H
# key-value heads, E width of a head.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from foretell.models.fast import PLAIN_LAYERS
from foretell.models.gated_lora import GatedAdapters

LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
SILU = ("SiLU", "SiLUActivation")


@dataclass
class Frozen:
    """Linears of one input side by side, and what stands before them: an RMSNorm (gain, eps), a SiLU gate, or nothing.

    paths: of the linears below the layer, by which adapters know them.
    """

    linears: list[nn.Linear]
    paths: list[str]
    norm: tuple[Tensor, float] | None = None
    gated: bool = False

    def before(self, x_ND: Tensor) -> Tensor:
        """What the linears read."""
        if self.norm is not None:
            return F.rms_norm(x_ND, (x_ND.shape[1],), *self.norm)
        if self.gated:
            gate, up = x_ND.chunk(2, dim=1)
            return F.silu(gate).mul_(up)
        return x_ND

    def into(self, grad_ND: Tensor, x_ND: Tensor) -> Tensor:
        """The gradient of x from that of what the linears read. Writes over grad_ND."""
        if self.norm is not None:
            gain_D, eps = self.norm
            rate_N1 = (x_ND.square().mean(-1, keepdim=True) + eps).rsqrt()
            grad_ND.mul_(gain_D)
            along_N1 = (grad_ND * x_ND).mean(-1, keepdim=True).mul_(rate_N1.square())
            return grad_ND.addcmul_(x_ND, along_N1, value=-1.0).mul_(rate_N1)
        if self.gated:
            gate, up = x_ND.chunk(2, dim=1)
            out = torch.empty_like(x_ND)
            share = torch.sigmoid(gate)
            torch.mul(grad_ND, gate, out=out[:, gate.shape[1] :]).mul_(share)
            slope = torch.addcmul(share, share * gate, 1.0 - share)  # d silu / d gate
            torch.mul(grad_ND.mul_(up), slope, out=out[:, : gate.shape[1]])
            return out
        return grad_ND


class _FrozenLinear(torch.autograd.Function):
    """residual + W before(x) + b + s B A before(x): gradients go to x, A, B and the residual."""

    @staticmethod
    def forward(ctx: Any, x_ND, lora_A, lora_B, residual_NO, frozen, scale):
        read_ND = frozen.before(x_ND)
        out_NO = x_ND.new_empty(len(x_ND), sum(linear.out_features for linear in frozen.linears))
        at = 0
        for linear in frozen.linears:
            part_NO = out_NO[:, at : at + linear.out_features]
            if linear.bias is None:
                torch.mm(read_ND, linear.weight.t(), out=part_NO)
            else:
                torch.addmm(linear.bias, read_ND, linear.weight.t(), out=part_NO)
            at += linear.out_features
        if lora_A is not None:
            out_NO.addmm_(read_ND @ lora_A.to(read_ND.dtype).t(), lora_B.to(read_ND.dtype).t(), alpha=scale)
        if residual_NO is not None:
            out_NO += residual_NO
        ctx.save_for_backward(x_ND, lora_A, lora_B)
        ctx.frozen, ctx.scale, ctx.residual = frozen, scale, residual_NO is not None
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Any, ...]:
        (x_ND, lora_A, lora_B), frozen = ctx.saved_tensors, ctx.frozen
        into_A = into_B = None
        if lora_A is not None:
            read_ND, dtype = frozen.before(x_ND), x_ND.dtype
            low_Nr = (grad_NO @ lora_B.to(dtype)).mul_(ctx.scale)
            into_A = (low_Nr.t() @ read_ND).to(lora_A.dtype)
            into_B = (grad_NO.t() @ (read_ND @ lora_A.to(dtype).t())).mul_(ctx.scale).to(lora_B.dtype)
        into_x, at = None, 0
        if ctx.needs_input_grad[0]:
            for linear in frozen.linears:
                part_NO = grad_NO[:, at : at + linear.out_features]
                into_x = part_NO @ linear.weight if into_x is None else into_x.addmm_(part_NO, linear.weight)
                at += linear.out_features
            if lora_A is not None:
                into_x.addmm_(low_Nr, lora_A.to(dtype))
            into_x = frozen.into(into_x, x_ND)
        return into_x, into_A, into_B, grad_NO if ctx.residual else None, None, None


class _Turn(torch.autograd.Function):
    """Rotary positions, in place: what comes back is turned the other way, and nothing is kept but the angles."""

    @staticmethod
    def forward(ctx: Any, x_BRHE: Tensor, cos_BRE: Tensor, sin_BRE: Tensor) -> Tensor:
        ctx.angles = cos_BRE, sin_BRE
        ctx.mark_dirty(x_BRHE)
        return _turn(x_BRHE, cos_BRE, sin_BRE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos_BRE, sin_BRE = ctx.angles
        return _turn(grad.clone(), cos_BRE, -sin_BRE), None, None


def _turn(x_BRHE: Tensor, cos_BRE: Tensor, sin_BRE: Tensor) -> Tensor:
    half = x_BRHE.shape[-1] // 2
    first, second = x_BRHE[..., :half], x_BRHE[..., half:]
    cos, sin = cos_BRE[:, :, None, :half], sin_BRE[:, :, None, :half]
    turned = first * cos - second * sin
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)
    return x_BRHE


class LeanLayer:
    """A plain pre-norm layer over rows that all pass through their adapters, or none of them."""

    def __init__(self, layer: nn.Module, path: str) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.place = attention
        self.E = attention.head_dim
        self.norms = [(n.weight, n.variance_epsilon) for n in (layer.input_layernorm, layer.post_attention_layernorm)]
        below = f"{path}.self_attn."
        names = ["q_proj", "k_proj", "v_proj"]
        self.qkv = Frozen([getattr(attention, n) for n in names], [below + n for n in names], self.norms[0])
        self.o = Frozen([attention.o_proj], [below + "o_proj"])
        self.gate_up = Frozen(
            [mlp.gate_proj, mlp.up_proj], [f"{path}.mlp.gate_proj", f"{path}.mlp.up_proj"], self.norms[1]
        )
        self.down = Frozen([mlp.down_proj], [f"{path}.mlp.down_proj"], gated=True)
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.Hq, self.H = (linear.out_features // self.E for linear in self.qkv.linears[:2])
        self.window = PLAIN_LAYERS[type(layer).__name__](attention)

    def __call__(self, x_BRD: Tensor, places: tuple[Tensor, Tensor], attend: Any, gate: GatedAdapters | None) -> Tensor:
        """[B, R, D] -> [B, R, D]. attend: comb_attention. gate: whose adapters all rows pass through, if any."""
        (B, R, D), Hq, H, E = x_BRD.shape, self.Hq, self.H, self.E
        x_ND = x_BRD.reshape(-1, D)
        qkv = _apply(self.qkv, x_ND, None, gate).view(B, R, Hq + 2 * H, E)
        query, key, value = qkv.split([Hq, H, H], dim=2)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
            query, key = _Turn.apply(query, *places), _Turn.apply(key, *places)
        else:
            both = _Turn.apply(qkv[:, :, : Hq + H].clone(), *places)
            query, key = both.split([Hq, H], dim=2)
        mixed, _ = attend(
            self.place, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None,
            scaling=self.place.scaling, sliding_window=self.window,
        )  # fmt: skip
        middle_ND = _apply(self.o, mixed.reshape(-1, Hq * E), x_ND, gate)
        out_ND = _apply(self.down, _apply(self.gate_up, middle_ND, None, gate), middle_ND, gate)
        return out_ND.view(B, R, D)


def _apply(frozen: Frozen, x_ND: Tensor, residual_NO: Tensor | None, gate: GatedAdapters | None) -> Tensor:
    adapters = [] if gate is None else gate.side_by_side(frozen.paths, [one.out_features for one in frozen.linears])
    lora_A, lora_B, scale = adapters or (None, None, 1.0)
    return _FrozenLinear.apply(x_ND, lora_A, lora_B, residual_NO, frozen, scale)


def lean_layers(layers: nn.ModuleList) -> list[LeanLayer] | None:
    """Lean twins of all layers, or None where one is of another kind, wrapped or hooked: its own code must run."""
    for layer in layers:
        if type(layer).__name__ not in PLAIN_LAYERS or type(layer.mlp.act_fn).__name__ not in SILU:
            return None
        if not all(type(layer.get_submodule(path)) is nn.Linear for path in LINEARS):
            return None
        if any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules()):
            return None
    return [LeanLayer(layer, str(i)) for i, layer in enumerate(layers)]
