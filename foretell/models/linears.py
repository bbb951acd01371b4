"""Linears and norms of a decoding copy: what each computes has one meaning and several kernels, see `kernels`.

PyTorch's fp32 `F.linear` on a CPU doubles in cost from one row to two; weights packed for oneDNN stay nearly flat up to
about sixteen rows, and on some machines a transposed copy reads fastest for a single one.
"""

# N rows flattened, D width.

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foretell.models.kernels import ROWS, Measured
from foretell.runtime import cpu_flags

PACKED, TRANSPOSED, DOUBLED = "packed", "transposed", "doubled"
PACKABLE = (torch.float32, torch.bfloat16)
# of drafts, whose numbers no text depends on: weights in fewer bits than the module's own, rows of bf16
HALF, INT8, BYTES = "bfloat16", "int8", "int8 rows"  # the last one's rows are int8 too, made so at each product
_SEVERAL_BYTES = 64 << 20  # of a weight: larger ones are copied once
_AT_ONCE = 256  # rows of a weight that are rounded in a cache
_WHOLE = 64  # torch 2.13 multiplies int8 a vector at a time: other sizes are not its own


class PackedLinear(Measured):
    """One or several linears of the same input side by side: [..., in] -> [..., out of all].

    Beside the weights themselves at most one copy of them is kept.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        weights = [weight.detach() for weight in weights]  # [out, in] each
        outs, width, dtype = [len(weight) for weight in weights], weights[0].shape[1], weights[0].dtype
        has_bias = any(bias is not None for bias in biases)
        key = f"linear {width} -> {'+'.join(map(str, outs))}{' + bias' * has_bias} {dtype}"
        super().__init__(key, width, weights, (PACKED, TRANSPOSED) if dtype in PACKABLE else ())
        self.weight = self.weights[0]  # for modelling code that asks a linear for its dtype or device
        self.in_features, self.out_features = width, sum(outs)
        self.bias: Tensor | None = None
        if has_bias:
            self._each = [w.new_zeros(len(w)) if b is None else b.detach() for b, w in zip(biases, self.weights)]
            self.bias = torch.cat(self._each)
        self._biases = [None] * len(outs) if self.bias is None else self.bias.split(outs)

    @classmethod
    def of(cls, *linears: nn.Linear) -> PackedLinear:
        """The linears as they are."""
        return cls([linear.weight for linear in linears], [linear.bias for linear in linears])

    def for_drafts(self, dtype: str) -> None:
        """Weights of `dtype`, or of whichever is fastest ("auto"); the module's own where nothing can be packed."""
        own = str(self.like.dtype).removeprefix("torch.")
        if not self.kernels or dtype == own:
            return
        tried = (BYTES, INT8) if dtype == INT8 else () if dtype == "auto" else (dtype,)
        for kernel in tried:
            self.take([kernel] * len(ROWS))
            if self.kept:
                return
        self.settled = False  # too coarse for these weights: whatever is fastest of the others
        self.kernels = (PACKED, *(kind for kind in (HALF, INT8, BYTES) if kind not in (own, *tried)))
        self.key = f"draft {self.key} by {' '.join(self.kernels)}"
        self.most = 2 if sum(weight.nbytes for weight in self.weights) <= _SEVERAL_BYTES else 1

    def near(self, kernel: str) -> float:
        """See Measured."""
        return {HALF: 2e-2, INT8: 6e-2, BYTES: 6e-2}.get(kernel, super().near(kernel))

    def part(self, share: float) -> PackedLinear:
        """See Measured."""
        most = [min(len(w), max(1, int(len(w) * share) // _WHOLE) * _WHOLE) for w in self.weights]
        biases = [None if b is None else b[:n] for b, n in zip(self._biases, most, strict=True)]
        part = PackedLinear([weight[:n] for weight, n in zip(self.weights, most, strict=True)], biases)
        part.key, part.kernels = self.key, self.kernels
        return part

    def prepare(self, kernel: str) -> Tensor:
        """See Measured."""
        together = self.weights[0] if len(self.weights) == 1 else torch.cat(self.weights)
        if kernel == TRANSPOSED:
            return together.t().contiguous()
        if kernel in (INT8, BYTES):
            if kernel == INT8 and (self.in_features % _WHOLE or self.out_features % _WHOLE):
                raise RuntimeError(f"got a product {self.in_features} -> {self.out_features}, wanted whole vectors")
            parts = together.split(_AT_ONCE)
            scales_O = (torch.cat([p.abs().amax(1) for p in parts]).float().clamp(min=1e-30) / 127).bfloat16()
            whole_OD = torch.empty_like(together, dtype=torch.int8)
            for part, scale_O, whole in zip(parts, scales_O.float().split(_AT_ONCE), whole_OD.split(_AT_ONCE)):
                whole.copy_((part / scale_O[:, None]).round_().clamp_(-127, 127))
            if kernel == BYTES:
                self.seven_bits = "avx512_vnni" not in cpu_flags()  # of rows: sums of two products overflow elsewhere
                return _packed_bytes(whole_OD, scales_O)
            self.scales_O = scales_O
            return whole_OD
        if kernel == HALF:
            together = together.bfloat16()
        return torch.ops.mkldnn._reorder_linear_weight(together, 16)

    def renew(self, live: nn.Module) -> bool:
        """See Measured."""
        if self.bias is not None:
            torch.cat(self._each, out=self.bias)
        return super().renew(live)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.run(self.kernel(x.numel() // self.in_features), x)

    def run(self, kernel: str, x: Tensor) -> Tensor:
        """See Measured."""
        if kernel == PACKED:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.kept[PACKED], self.bias, "none", [], "")
        if kernel == TRANSPOSED:
            x_ND, weight_DO = x.reshape(-1, self.in_features), self.kept[TRANSPOSED]
            out = torch.mm(x_ND, weight_DO) if self.bias is None else torch.addmm(self.bias, x_ND, weight_DO)
            return out.view(*x.shape[:-1], self.out_features)
        if kernel == BYTES:
            try:
                out = torch.ops.quantized.linear_dynamic(x.float(), self.kept[BYTES], self.seven_bits).to(x.dtype)
            except RuntimeError:  # rows of no numbers have no scale
                if x.isfinite().any():
                    raise
                out = x.new_full((*x.shape[:-1], self.out_features), torch.nan)
            return out if self.bias is None else out + self.bias
        if kernel in (HALF, INT8):
            x_ND = x.reshape(-1, self.in_features).to(torch.bfloat16)
            if kernel == INT8:
                out = torch._weight_int8pack_mm(x_ND, self.kept[INT8], self.scales_O)
            else:
                out = torch.ops.mkldnn._linear_pointwise.default(x_ND, self.kept[HALF], None, "none", [], "")
            out = out.view(*x.shape[:-1], self.out_features).to(x.dtype)
            return out if self.bias is None else out + self.bias
        parts = [F.linear(x, weight, bias) for weight, bias in zip(self.weights, self._biases, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + forward(x): in fp32 one operation where there is one; narrower numbers are rounded twice, as a
        model rounds them.
        """
        if x.dtype == torch.float32:
            kernel = self.kernel(x.numel() // self.in_features)
            if kernel == PACKED:
                packed = self.kept[PACKED]
                return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed, self.bias, "add")
            if kernel == TRANSPOSED and self.bias is None:
                x_ND, residual_NO = x.reshape(-1, self.in_features), residual.reshape(-1, self.out_features)
                return torch.addmm(residual_NO, x_ND, self.kept[TRANSPOSED]).view(residual.shape)
        return residual + self(x)


def _packed_bytes(whole_OD: Tensor, scales_O: Tensor) -> Any:
    """Weights for products that make their rows int8 themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to give these tensors up; where it has, this kernel is not there
        zero_O = torch.zeros(len(whole_OD), dtype=torch.long)
        weight = torch._make_per_channel_quantized_tensor(whole_OD, scales_O.double(), zero_O, 0)
        return torch.ops.quantized.linear_prepack(weight, None)


class FusedRMSNorm(Measured):
    """y = x / rms(x) * weight.

    A CPU has one kernel for LayerNorm and seven for RMSNorm, and a few rows are all overhead: [x, -x] has mean zero and
    variance rms(x)^2, so the first half of its LayerNorm is the RMSNorm.
    rounded: x / rms(x) is rounded to x's dtype before the weight multiplies it.
    """

    def __init__(self, weight: Tensor, eps: float, rounded: bool = False) -> None:
        weight = weight.detach()
        super().__init__(f"norm {len(weight)}{' rounded' * rounded} {weight.dtype}", len(weight), [weight], (DOUBLED,))
        self.weight, self.eps, self.rounded = weight, eps, rounded

    def part(self, share: float) -> FusedRMSNorm:
        """See Measured."""
        return FusedRMSNorm(self.weight, self.eps, self.rounded)

    def prepare(self, kernel: str) -> Tensor:
        """See Measured."""
        return torch.cat([self.weight, self.weight])

    def renew(self, live: nn.Module) -> bool:
        """See Measured. Other gains may tell two formulas apart that looked the same."""
        new, at = fused_norm(live), live.weight.data_ptr()
        if new is None or new.rounded != self.rounded or (new.weight.data_ptr(), self.weight.data_ptr()).count(at) == 1:
            return False
        if self.weight.data_ptr() != at:
            self.weight.copy_(new.weight)
        return super().renew(live)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        return self.run(self.kernel(x.numel() // self.width), x)

    def run(self, kernel: str, x: Tensor) -> Tensor:
        """See Measured."""
        if kernel == DOUBLED:
            both, gain = torch.cat([x, -x], dim=-1), None if self.rounded else self.kept[DOUBLED]
            out = torch.layer_norm(both, (2 * self.width,), gain, None, self.eps)[..., : self.width]
        elif self.rounded or x.dtype == self.weight.dtype:
            out = F.rms_norm(x, (self.width,), None if self.rounded else self.weight, self.eps)
        else:
            out = F.rms_norm(x.to(self.weight.dtype), (self.width,), self.weight, self.eps).to(x.dtype)
        return out * self.weight if self.rounded else out


def fused_norm(norm: nn.Module) -> FusedRMSNorm | None:
    """A fused twin of an RMSNorm, or None if its numbers differ (unknown formula, other layout)."""
    weight = getattr(norm, "weight", None)
    eps = next(
        (getattr(norm, n) for n in ("variance_epsilon", "eps") if isinstance(getattr(norm, n, None), float)), None
    )
    if "RMSNorm" not in type(norm).__name__ or weight is None or eps is None or weight.dim() != 1:
        return None
    probe = torch.linspace(-2, 3, 4 * weight.numel(), device=weight.device).view(4, -1).to(weight.dtype)
    wide = weight.detach().float() if weight.dtype in (torch.bfloat16, torch.float16) else weight.detach()
    candidates = [FusedRMSNorm(gain, eps) for gain in (wide, 1.0 + wide)]  # Llama's, and Gemma's zero-centred form
    if wide.dtype != weight.dtype:
        candidates.insert(0, FusedRMSNorm(weight.detach(), eps, rounded=True))
    with torch.no_grad():
        expected = norm(probe)
        for fused in candidates:
            if _same(fused(probe), expected):
                return fused
    return None


def _same(got: Tensor, wanted: Tensor) -> bool:
    """Of narrow numbers one in a hundred may be the next one; another order of roundings changes one in five."""
    if got.dtype != wanted.dtype:
        return False
    if got.dtype in (torch.float32, torch.float64):
        return torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)
    return torch.allclose(got, wanted, rtol=2**-6, atol=0) and float((got != wanted).float().mean()) < 0.01


class NormedLinear(nn.Module):
    """linear(norm(x))."""

    def __init__(self, norm: FusedRMSNorm, linear: PackedLinear) -> None:
        super().__init__()
        self.norm, self.linear = norm, linear
        self._norm, self._linear = norm.forward, linear.forward

    def normed(self, x_ND: Tensor) -> Tensor:
        """norm(x): what the linear reads."""
        return self._norm(x_ND)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self._linear(self._norm(x))
