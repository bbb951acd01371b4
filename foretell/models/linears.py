"""Linears and norms of a decoding copy on a CPU: packed weights, fused norms, both held against what they stand for.

PyTorch's fp32 `F.linear` on a CPU doubles in cost from three rows to four; weights packed for oneDNN stay nearly flat
up to about sixteen, and a transposed copy reads fastest for a single row.
"""

# N rows flattened, D width.

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_FROM_ROWS = 4  # below this the matrix product's vector kernels win
COPIES = 2  # that a packed linear keeps of its weight


class PackedLinear(nn.Module):
    """One or several linears of the same input side by side: [..., in] -> [..., out of all].

    Keeps two copies of the weights: transposed for one row, packed for oneDNN for four rows and more.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.weights = [weight.detach() for weight in weights]  # [out, in] each
        self.weight = self.weights[0]  # for modelling code that asks a linear for its dtype or device
        self.in_features = self.weight.shape[1]
        self.out_features = sum(len(weight) for weight in weights)
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            each = [w.new_zeros(len(w)) if b is None else b for b, w in zip(biases, self.weights, strict=True)]
            self.bias = torch.cat(each).detach()
        together = torch.cat(self.weights)
        self.transposed = together.t().contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(together, 16)

    @classmethod
    def of(cls, *linears: nn.Linear) -> PackedLinear:
        """The linears as they are."""
        return cls([linear.weight for linear in linears], [linear.bias for linear in linears])

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        rows = x.numel() // self.in_features
        if rows >= PACKED_FROM_ROWS:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        x_ND = x.reshape(rows, self.in_features)
        if rows == 1:
            out = torch.mm(x_ND, self.transposed)
        else:
            out, at = x.new_empty(rows, self.out_features), 0
            for weight in self.weights:
                torch.mm(x_ND, weight.t(), out=out[:, at : at + len(weight)])
                at += len(weight)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + forward(x), in one operation where that helps."""
        rows = x.numel() // self.in_features
        if rows >= PACKED_FROM_ROWS:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")
        if rows == 1 and self.bias is None:
            return torch.addmm(residual.view(1, -1), x.view(1, -1), self.transposed).view(residual.shape)
        return residual + self(x)


class FusedRMSNorm(nn.Module):
    """y = x / rms(x) * weight.

    A CPU has one kernel for LayerNorm and seven for RMSNorm, and a few rows are all overhead: [x, -x] has mean zero and
    variance rms(x)^2, so the first half of its LayerNorm is the RMSNorm.
    """

    FEW = 16 * 1024  # numbers, below which the detour wins

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps
        self.width = weight.shape[0]
        self.doubled = torch.cat([weight, weight]).detach()

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        if x.numel() < self.FEW and x.device.type == "cpu" and x.dtype == torch.float32:
            both = torch.cat([x, -x], dim=-1)
            return F.layer_norm(both, (2 * self.width,), self.doubled, None, self.eps)[..., : self.width]
        return F.rms_norm(x, (self.width,), self.weight, self.eps)


def fused_norm(norm: nn.Module) -> nn.Module | None:
    """A fused twin of an RMSNorm, or None if its numbers differ (unknown formula, other layout)."""
    weight = getattr(norm, "weight", None)
    eps = next(
        (getattr(norm, n) for n in ("variance_epsilon", "eps") if isinstance(getattr(norm, n, None), float)), None
    )
    if "RMSNorm" not in type(norm).__name__ or weight is None or eps is None or weight.dim() != 1:
        return None
    probe = torch.linspace(-2, 3, 4 * weight.numel(), device=weight.device).view(4, -1).to(weight.dtype)
    with torch.no_grad():
        expected = norm(probe)
        for candidate in (weight, 1.0 + weight):  # Llama's, and Gemma's zero-centred form
            fused = FusedRMSNorm(candidate.detach(), eps)
            if torch.allclose(fused(probe), expected, rtol=1e-5, atol=1e-6):
                return fused
    return None


class NormedLinear(nn.Module):
    """linear(norm(x)). For one row the norm is one number: its gain is multiplied into the linear's transposed copy,
    which from then on only this class may use.
    """

    def __init__(self, norm: FusedRMSNorm, linear: PackedLinear) -> None:
        super().__init__()
        self.norm, self.linear = norm, linear
        self.in_features, self.eps = linear.in_features, norm.eps
        self.gained = linear.transposed.mul_(norm.weight.detach()[:, None])
        self.bias = self.gained.new_zeros(1) if linear.bias is None else linear.bias
        self._norm, self._linear = norm.forward, linear.forward

    def normed(self, x_ND: Tensor) -> Tensor:
        """norm(x): what the linear reads."""
        return self._norm(x_ND)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if x.numel() != self.in_features:
            return self._linear(self._norm(x))
        x_D = x.reshape(-1)
        scale = (float(torch.dot(x_D, x_D)) / self.in_features + self.eps) ** -0.5
        return torch.addmm(self.bias, x_D[None], self.gained, alpha=scale).view(*x.shape[:-1], -1)
