"""Losses of a stream, differentiated piece by piece: the gradient is kept, the pieces are not."""

# K depths.

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foretell.methods.base import MTPModule
from foretell.types import LossSum


def streamed(module: MTPModule, run: Callable[[], Iterator[LossSum]], coefficients_K: Tensor | None) -> LossSum:
    """The sum of a stream's losses, each differentiated and let go before the next is read.

    coefficients_K: what the caller will multiply the depths' totals by, up to one factor for all; None: equal. The
    backward pass refuses other ratios, which the gradient kept here could not serve.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    counts: list[Tensor] = []
    total_K = _Streamed.apply(run, coefficients_K, counts, module.config.depth, *parameters)
    return LossSum(total_K, counts[0], counts[1])


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Any, coefficients_K: Any, counts: list, depth: int, *parameters: Tensor) -> Tensor:
        kept = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        found: LossSum | None = None
        with torch.enable_grad():
            for loss in run():
                each_K = loss.total if coefficients_K is None else loss.total * coefficients_K.to(loss.total)
                grads = torch.autograd.grad(each_K.sum(), parameters, allow_unused=True)
                for into, grad in zip(kept, grads, strict=True):
                    if grad is not None:
                        into += grad
                loss = LossSum(loss.total.detach(), loss.count, loss.correct)
                found = loss if found is None else summed([found, loss])
        assert found is not None, "a stream has at least one piece"
        counts += [found.count, found.correct]
        ctx.save_for_backward(*kept)
        ctx.coefficients_K = torch.ones(depth, device=found.total.device) if coefficients_K is None else coefficients_K
        return found.total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Any, ...]:
        wanted_K = ctx.coefficients_K.to(grad_K)
        factor = (grad_K @ wanted_K) / (wanted_K @ wanted_K).clamp(min=torch.finfo(grad_K.dtype).tiny)
        if not torch.allclose(grad_K, wanted_K * factor, rtol=1e-4, atol=0.0, equal_nan=True):
            raise ValueError(
                f"a streamed loss was differentiated for depths weighted as {wanted_K.tolist()}, but is multiplied by "
                f"{grad_K.tolist()}: pass mtp_coefficients to the forward call, or a chunk_size that holds the text."
            )
        return None, None, None, None, *(kept * factor for kept in ctx.saved_tensors)


def summed(losses: Iterable[LossSum]) -> LossSum:
    """One loss of many: totals, counts and correct guesses added up."""
    found = list(losses)
    return LossSum(*(sum(getattr(loss, name) for loss in found) for name in ("total", "count", "correct")))
