"""A second module tree over the same weights, for decoding without gradient: prepacked linears and fused norms.

PyTorch's fp32 `F.linear` on a CPU doubles in cost from three rows to four; weights packed for oneDNN stay nearly flat
up
to about sixteen. Norms written as six small operations become one. Nothing of a modelling file is copied: modules are
swapped by type, and a norm only after its formula was checked on numbers.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_FROM_ROWS = 4  # below this F.linear's vector kernels win
_PACKED_LIMIT = 0.4  # of free memory: packing doubles the weights, so a large model on a small machine goes without


class PackedLinear(nn.Module):
    """A Linear that shares its weight and keeps a oneDNN-packed copy for four rows and more."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features = linear.in_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 16)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if x.numel() < PACKED_FROM_ROWS * self.in_features:
            if self.bias is None:  # straight to the matrix product: F.linear's detours cost as much as a small layer
                return torch.mm(x.reshape(-1, self.in_features), self.weight.t()).view(*x.shape[:-1], -1)
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


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


def _fused_norm(norm: nn.Module) -> nn.Module | None:
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


def _can_pack(module: nn.Module) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    size = sum(m.weight.numel() * 4 for m in module.modules() if type(m) is nn.Linear)
    try:
        import psutil

        return size < _PACKED_LIMIT * psutil.virtual_memory().available
    except ImportError:
        return size < 2**31


def fast_view(module: nn.Module) -> nn.Module:
    """A module tree of its own over the SAME parameters, with fast parts where they compute the same.

    Packed copies go stale when weights change: `weights_version` tells.
    """
    shared = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    view = copy.deepcopy(module, shared).eval()
    pack = _can_pack(module)
    for parent in list(view.modules()):
        for name, child in list(parent.named_children()):
            weight = getattr(child, "weight", None)
            if pack and type(child) is nn.Linear and weight.dtype == torch.float32 and weight.device.type == "cpu":
                setattr(parent, name, PackedLinear(child))
            elif (fused := _fused_norm(child)) is not None:
                setattr(parent, name, fused)
    return view


def weights_version(module: nn.Module) -> tuple[int, ...]:
    """Changes whenever a parameter or buffer was written to or replaced."""
    return tuple(n for t in (*module.parameters(), *module.buffers()) for n in (t.data_ptr(), t._version))
