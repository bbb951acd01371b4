"""Soft cross-entropy of two sets of logits in Triton: both are read once for the loss and once for the gradient.

For a row of student's logits x and teacher's logits t, with q = softmax(t), p = softmax(x) and m_x the largest of x:

    loss                  logsumexp(x) - q.x  =  log sum exp(x - m_x)  +  gap,     gap = sum q (m_x - x)
    gradient of x         p - q
    gradient of t         q (m_x - x - gap)
    kl                    loss - entropy of q,     entropy of q = log sum exp(t - m_t)  +  sum q (m_t - t)

All terms of these sums are >= 0, so that the cross-entropy stays exact however large the logits are. The sums over q
are kept as running means, which no tile can overflow. What is saved for the backward pass, beside the logits, is five
fp32 numbers a row; no probabilities, and no fp32 copy of the gradient.

A token to which the teacher gives probability 0 in fp32 adds nothing, whatever the student says of it (-inf too). A
token with probability above 0 that the student holds impossible (-inf) makes the loss +inf and leaves the teacher
without a finite gradient. A row with a NaN, a +inf or nothing but -inf has no softmax: its loss is NaN.

naive_soft_cross_entropy is the twin for reading, losses.linear_loss the definition and the path without Triton. This is
the one file that imports Triton, and it can be imported without it: ask available().
"""

# N rows of the student, S rows of the teacher, V vocabulary; in a chunk of linear_loss C, U and M.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from foretell.types import IGNORE_INDEX, LossSum

try:
    import triton
    import triton.language as tl
except ImportError:  # not made for every platform
    triton = None

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run in NumPy
INTERPRETED_TILE = 1024
# elements that one program of the gradient's kernel handles. It only streams, so there is nothing to tune; and tuning
# would run it several times over a buffer that it may write in place
GRADIENT_TILE = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(device: torch.device | str) -> bool:
    """Whether the kernels run on tensors of that device: a GPU, or any under TRITON_INTERPRET=1, and with Triton."""
    return triton is not None and (INTERPRETED or torch.device(device).type == "cuda")


def soft_cross_entropy(
    student_NV: Tensor, teacher_NV: Tensor, *, labels_N: Tensor | None = None, inplace: bool = False
) -> LossSum:
    """Sum over rows of logsumexp(student) - softmax(teacher).student, in fp32, differentiable in both where asked.

    Args:
        student_NV: [N, V] logits, fp32, bf16 or fp16. Rows may lie apart; elements that do are copied together.
        teacher_NV: [N, V] logits, of any of these types.
        labels_N: [N] which rows count: long, where IGNORE_INDEX does not, or bool, where False does not. The others are
            never read and have a gradient of zero. None: all count.
        inplace: the backward pass writes the student's gradient over its logits. Autograd raises where another
            backward, or a second one, needs them.

    Returns:
        LossSum: total (fp32, differentiable), count and correct (long; the lowest index where logits are equal).

    Raises:
        ValueError: shapes, types or a device that do not fit; inplace for a leaf.
    """
    _check(student_NV, teacher_NV, labels_N, inplace)
    if not available(student_NV.device):
        raise ValueError(
            f"got logits on {student_NV.device}, wanted a GPU and Triton installed, or TRITON_INTERPRET=1 in the "
            "environment before the first import: naive_soft_cross_entropy runs anywhere."
        )
    counted_N, count, source_N = None, torch.tensor(len(student_NV), device=student_NV.device), None
    if labels_N is not None:
        counted_N = _counted(labels_N)
        count = counted_N.sum()
        source_N = torch.where(counted_N, torch.arange(len(counted_N), device=counted_N.device), -1)
    student_NV, teacher_NV = _rows(student_NV, apart=inplace), _rows(teacher_NV)
    total, correct = _SoftCrossEntropy.apply(student_NV, teacher_NV, source_N, inplace)
    return LossSum(total, count, correct)


def naive_soft_cross_entropy(
    student_NV: Tensor, teacher_NV: Tensor, *, labels_N: Tensor | None = None, inplace: bool = False
) -> LossSum:
    """soft_cross_entropy in plain autograd, for a reader to check by eye: fp64 too, and inplace is without effect."""
    _check(student_NV, teacher_NV, labels_N, inplace, naive=True)
    rows_N = slice(None) if labels_N is None else _counted(labels_N)
    x_NV, t_NV = (v[rows_N].to(torch.promote_types(v.dtype, torch.float32)) for v in (student_NV, teacher_NV))
    q_NV = t_NV.softmax(-1)
    cost_NV = -x_NV.log_softmax(-1)
    loss_N = (q_NV * cost_NV.masked_fill(q_NV == 0, 0.0)).sum(-1)  # filled before the product: 0 * inf is NaN
    right_N = x_NV.argmax(-1) == t_NV.argmax(-1)
    return LossSum(loss_N.sum(), torch.tensor(len(x_NV), device=x_NV.device), right_N.sum())


def teacher_chunk(
    x_CM: Tensor, t_UM: Tensor, owner_C: Tensor | None, kind: Literal["ce", "kl"]
) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk of linear_loss: (loss_C in fp32, the gradient of its sum, written over x_CM, right_C).

    Args:
        x_CM: [C, M] the student's logits. Their elements lie side by side.
        t_UM: [U, M] the teacher's.
        owner_C: [C] long in [0, U): row i learns from teacher row owner_C[i]. None: from row i.
        kind: "ce", or "kl", the same less the teacher's entropy.
    """
    assert kind in ("ce", "kl"), f"got kind {kind!r}, wanted ce or kl"
    assert x_CM.stride(1) == t_UM.stride(1) == 1, f"got strides {x_CM.stride()} and {t_UM.stride()}, wanted rows"
    stats_C5, loss_C, right_C = _losses(x_CM, t_UM, owner_C, kl=kind == "kl")
    _gradients(x_CM, t_UM, owner_C, stats_C5, None, x_CM, None)
    return loss_C, x_CM, right_C


# -- kernels -----------------------------------------------------------------------------------------------------------


def _kernel(function: Callable[..., None]) -> Any:
    return function if triton is None else triton.jit(function)


@_kernel
def _loss_kernel(
    x_ptr,
    t_ptr,
    source_ptr,  # [N] the teacher's row, or -1 where a row does not count; None: row i learns from row i
    stats_ptr,  # [N, 5] m_x, sum exp(x - m_x), m_t, sum exp(t - m_t), gap
    loss_ptr,
    right_ptr,
    V,
    x_stride,
    t_stride,
    KL: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a row. Online: whenever a tile brings a larger maximum, what was summed so far is brought to it."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31 where N * V does
    source = row
    if source_ptr is not None:
        source = tl.load(source_ptr + row).to(tl.int64)
    if source < 0:
        tl.store(loss_ptr + row, 0.0)
        tl.store(right_ptr + row, 0)
        return
    x_ptr += row * x_stride
    t_ptr += source * t_stride
    # the lowest finite number as first maximum: -inf would give -inf - -inf = NaN in a tile of nothing else
    top_x = tl.full((), -3.4028234663852886e38, tl.float32)
    top_t = top_x
    sum_x = tl.full((), 0.0, tl.float32)
    sum_t = sum_x
    gap = sum_x
    spread = sum_x
    best_x = tl.full((), 0, tl.int32)
    best_t = best_x
    missed = tl.full((), float("-inf"), tl.float32)  # the teacher's largest logit where the student's is -inf
    for start in range(0, V, TILE):
        at = start + tl.arange(0, TILE)
        x = tl.load(x_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
        t = tl.load(t_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)

        tile_top = tl.max(x, 0)
        if tile_top > top_x:  # seldom after the first tiles
            best_x = tl.min(tl.where(x == tile_top, at, V), 0)
        old_x = top_x
        top_x = tl.maximum(old_x, tile_top)
        sum_x = sum_x * tl.exp(old_x - top_x) + tl.sum(tl.exp(x - top_x), 0)

        tile_top = tl.max(t, 0)
        if tile_top > top_t:
            best_t = tl.min(tl.where(t == tile_top, at, V), 0)
        old_t = top_t
        top_t = tl.maximum(old_t, tile_top)
        w = tl.exp(t - top_t)
        kept = sum_t * tl.exp(old_t - top_t)
        sum_t = kept + tl.sum(w, 0)

        # the mean of m_x - x under the weights so far: the old mean, moved to the new m_x, and this tile's part
        share = tl.where(sum_t > 0, 1.0 / sum_t, 0.0)
        far = tl.where((w > 0) & (x != float("-inf")), w * share * (top_x - x), 0.0)
        gap = tl.where(kept > 0, kept * share * (gap + (top_x - old_x)), 0.0) + tl.sum(far, 0)
        missed = tl.maximum(missed, tl.max(tl.where(x == float("-inf"), t, float("-inf")), 0))
        if KL:
            far = tl.where(w > 0, w * share * (top_t - t), 0.0)
            spread = tl.where(kept > 0, kept * share * (spread + (top_t - old_t)), 0.0) + tl.sum(far, 0)

    gap = tl.where(tl.exp(missed - top_t) > 0, float("inf"), gap)
    loss = tl.log(sum_x) + gap
    if KL:
        loss -= tl.log(sum_t) + spread
    loss = tl.where((sum_x > 0) & (sum_t > 0), loss, float("nan"))  # a NaN is not above 0 either
    tl.store(loss_ptr + row, loss)
    tl.store(right_ptr + row, (best_x == best_t).to(tl.int32))
    stats_ptr += row * 5
    tl.store(stats_ptr, top_x)
    tl.store(stats_ptr + 1, sum_x)
    tl.store(stats_ptr + 2, top_t)
    tl.store(stats_ptr + 3, sum_t)
    tl.store(stats_ptr + 4, gap)


@_kernel
def _gradient_kernel(
    x_ptr,
    t_ptr,
    source_ptr,
    stats_ptr,
    scale_ptr,  # the incoming scalar, or None for 1
    grad_x_ptr,  # None where none is wanted; may be x_ptr
    grad_t_ptr,  # likewise; row i is of teacher row i, so no two rows may share one
    V,
    x_stride,
    t_stride,
    grad_x_stride,
    grad_t_stride,
    TILE: tl.constexpr,
):
    """One program a row and tile."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    source = row
    if source_ptr is not None:
        source = tl.load(source_ptr + row).to(tl.int64)
    if source < 0:
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + row * grad_x_stride + at, tl.zeros((TILE,), tl.float32), mask=at < V)
        if grad_t_ptr is not None:
            tl.store(grad_t_ptr + row * grad_t_stride + at, tl.zeros((TILE,), tl.float32), mask=at < V)
        return
    x = tl.load(x_ptr + row * x_stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
    t = tl.load(t_ptr + source * t_stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
    stats_ptr += row * 5
    top_x = tl.load(stats_ptr)
    p = tl.exp(x - top_x) / tl.load(stats_ptr + 1)
    q = tl.exp(t - tl.load(stats_ptr + 2)) / tl.load(stats_ptr + 3)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    if grad_x_ptr is not None:
        tl.store(grad_x_ptr + row * grad_x_stride + at, scale * (p - q), mask=at < V)
    if grad_t_ptr is not None:
        slope = tl.where(q == 0, 0.0, q * (top_x - x - tl.load(stats_ptr + 4)))  # 0 * inf where x is -inf
        tl.store(grad_t_ptr + row * grad_t_stride + at, scale * slope, mask=at < V)


if triton is not None and not INTERPRETED:
    # it writes nothing that it reads, so it may be run again and again. Wider tiles spill registers on an H100
    _tuned_loss_kernel = triton.autotune(
        [
            triton.Config({"TILE": tile}, num_warps=warps)
            for tile, warps in ((1024, 4), (2048, 4), (4096, 8), (8192, 16))
        ],
        key=["V"],
    )(_loss_kernel)


# -- launches ----------------------------------------------------------------------------------------------------------


class _SoftCrossEntropy(torch.autograd.Function):
    """(total, correct)."""

    @staticmethod
    def forward(
        ctx: Any, student_NV: Tensor, teacher_NV: Tensor, source_N: Tensor | None, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        stats_N5, loss_N, right_N = _losses(student_NV, teacher_NV, source_N, kl=False)
        ctx.save_for_backward(student_NV, teacher_NV, source_N, stats_N5)
        ctx.inplace = inplace
        correct = right_N.sum()
        ctx.mark_non_differentiable(correct)
        return loss_N.sum(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        student_NV, teacher_NV, source_N, stats_N5 = ctx.saved_tensors
        wants_student, wants_teacher = ctx.needs_input_grad[:2]
        grad_student_NV = grad_teacher_NV = None
        if wants_student:
            grad_student_NV = student_NV.detach() if ctx.inplace else _like(student_NV)
        if wants_teacher:
            grad_teacher_NV = _like(teacher_NV)
        _gradients(student_NV, teacher_NV, source_N, stats_N5, grad_total, grad_student_NV, grad_teacher_NV)
        if wants_student and ctx.inplace:
            increment_version(student_NV)  # whoever saved these logits now hears of it from autograd
        return grad_student_NV, grad_teacher_NV, None, None


def _losses(x_NV: Tensor, t_SV: Tensor, source_N: Tensor | None, kl: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(stats_N5 as in _loss_kernel, loss_N, right_N)."""
    (N, V), device = x_NV.shape, x_NV.device
    stats_N5 = torch.empty(N, 5, device=device)
    loss_N = torch.empty(N, device=device)
    right_N = torch.empty(N, dtype=torch.int32, device=device)
    if N:
        args = (x_NV, t_SV, source_N, stats_N5, loss_N, right_N, V, x_NV.stride(0), t_SV.stride(0))
        with torch.cuda.device_of(x_NV):
            if INTERPRETED:
                _loss_kernel[(N,)](*args, KL=kl, TILE=INTERPRETED_TILE)
            else:
                _tuned_loss_kernel[(N,)](*args, KL=kl)
    return stats_N5, loss_N, right_N.bool()


def _gradients(
    x_NV: Tensor,
    t_SV: Tensor,
    source_N: Tensor | None,
    stats_N5: Tensor,
    scale: Tensor | None,
    grad_x_NV: Tensor | None,
    grad_t_NV: Tensor | None,
) -> None:
    """Writes into grad_x_NV and grad_t_NV."""
    N, V = x_NV.shape
    tile = INTERPRETED_TILE if INTERPRETED else min(GRADIENT_TILE, triton.next_power_of_2(V))
    strides = [0 if v is None else v.stride(0) for v in (x_NV, t_SV, grad_x_NV, grad_t_NV)]
    if N:
        with torch.cuda.device_of(x_NV):
            _gradient_kernel[(N, triton.cdiv(V, tile))](
                x_NV, t_SV, source_N, stats_N5, scale, grad_x_NV, grad_t_NV, V, *strides, TILE=tile, num_warps=8
            )


# -- inputs ------------------------------------------------------------------------------------------------------------


def _rows(logits_NV: Tensor, apart: bool = False) -> Tensor:
    """Logits whose rows can be read element by element; apart: and can be written, so no two share memory."""
    fits = logits_NV.stride(1) == 1 and (not apart or logits_NV.stride(0) >= logits_NV.shape[1])
    return logits_NV if fits else logits_NV.contiguous()


def _like(logits_NV: Tensor) -> Tensor:
    return torch.empty_like(logits_NV, memory_format=torch.contiguous_format)


def _counted(labels_N: Tensor) -> Tensor:
    return labels_N if labels_N.dtype == torch.bool else labels_N != IGNORE_INDEX


def _check(student: Tensor, teacher: Tensor, labels: Tensor | None, inplace: bool, naive: bool = False) -> None:
    """Raise ValueError on anything that does not fit, all of it in one message."""
    problems = []
    if student.dim() != 2 or not student.shape[1]:
        problems.append(
            f"student_NV: got shape {tuple(student.shape)}, wanted [N, V]: flatten batch and positions first"
        )
    if teacher.shape != student.shape:
        problems.append(
            f"teacher_NV: got shape {tuple(teacher.shape)}, wanted the student's {tuple(student.shape)}: a row each, "
            "over the same vocabulary"
        )
    if labels is not None and tuple(labels.shape) != tuple(student.shape[:1]):
        problems.append(f"labels_N: got shape {tuple(labels.shape)}, wanted {tuple(student.shape[:1])}: one a row")
    dtypes = (*DTYPES, torch.float64) if naive else DTYPES
    for name, value in (("student_NV", student), ("teacher_NV", teacher)):
        if value.dtype not in dtypes:
            problems.append(f"{name}: got {value.dtype}, wanted one of {', '.join(map(str, dtypes))}: convert it first")
    if inplace and student.requires_grad and student.is_leaf:
        problems.append("inplace would write a gradient over student_NV, a leaf: pass inplace=False")
    if problems:
        raise ValueError("; ".join(problems) + ".")
