"""Losses from hidden states and the head's weight: value and gradient in one pass, never logits of all rows.

linear_loss walks over chunks of rows. For each it makes the logits, the loss, the logits' gradient in place, and adds
what follows for the hidden states and the weight; the backward pass only multiplies by the incoming scalar. It is the
definition for every faster version, and the path on a CPU. Its slow twin (tests/twins.py) makes all logits at once, in
plain autograd.

Logits are scale * (h W^T + b), then softcap * tanh(logits / softcap). With x the student's logits, p their softmax and
q the softmax of the teacher's logits, a row's loss and its gradient with respect to x are

    ce, label y    logsumexp(x) - x_y                 p - onehot(y)
    ce, teacher    logsumexp(x) - q.x                 p - q
    kl             sum q (log q - log p)              p - q
    reverse_kl     sum p (log p - log q)              p (log p - log q - loss)
    tv             sum |p - q| / 2                    p (s - p.s),  s = sign(p - q) / 2
    lk             - log a,  a = sum min(p, q)        p (p.m - m) / a,  m = (p < q)
    lk_hybrid      e kl + (1 - e) tv,                 e (p - q) + (1 - e) p (p.m - m)
                   e = exp(-LK_ETA a), a constant

a is the chance that a draft drawn from p is accepted where the target says q. lk and lk_hybrid are the LK losses (arXiv
2602.23881, eta = 3). Where q is one label's, -log a IS ce: both need a distribution.

What depends on all depths of a row is made of single rows' losses (groups of one row): `expected_length`, `dpace`.
"""

# N rows, C rows of a chunk, U <= C rows of the teacher that a chunk needs, D hidden width, M vocabulary of the head.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foretell.ops.loss_checks import Kind, check, check_range
from foretell.types import IGNORE_INDEX, LossSum

Weighting = Literal["uniform", "harmonic", "exponential"]
# bytes of one [C, M] buffer of logits: small enough for a CPU's caches, large enough to fill a GPU
CHUNK_BYTES_CPU, CHUNK_BYTES_DEVICE = 16 * 2**20, 256 * 2**20
LK_ETA = 3.0
# below this many rows, reading the head's weight costs more than the products with it
MIN_CHUNK_ROWS = 64


def linear_loss(
    hidden_ND: Tensor,
    weight_MD: Tensor,
    *,
    labels_N: Tensor | None = None,
    teacher_hidden_ND: Tensor | None = None,
    teacher_weight_MD: Tensor | None = None,
    teacher_rows_N: Tensor | None = None,
    kind: Kind = "ce",
    bias_M: Tensor | None = None,
    teacher_bias_M: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    groups_N: Tensor | None = None,
    groups: int | None = None,
    learned_from: int = 0,
    chunk_rows: int | None = None,
) -> LossSum:
    """Sum over rows of a loss of softmax(head(hidden)) against labels or a teacher, without [N, M] logits.

    Softmax and losses are computed in fp32 (fp64 for fp64 inputs), matrix products in the type that hidden and weight
    promote to, or in autocast's under torch.autocast. Gradients go to hidden_ND, weight_MD and bias_M where they
    require one (the weight's is accumulated in fp32), never to the teacher, and once only.

    Args:
        hidden_ND: [N, D] what the head reads.
        weight_MD: [M, D] the head's weight.
        labels_N: [N] long. Rows with IGNORE_INDEX are dropped before any matrix product. Beside a teacher, labels only
            say which rows count.
        teacher_hidden_ND: [S, D'] the teacher's states; its width may differ.
        teacher_weight_MD: [M, D'] the teacher's head, over the same vocabulary.
        teacher_rows_N: [N] long in [0, S): each row's teacher row. Several rows may share one, whose logits are then
            made once a chunk, in whatever order the rows come. None: row i learns from teacher row i, and S = N.
        kind: "ce", "kl" = KL(teacher || student), "reverse_kl" = KL(student || teacher), "tv" (total variation), "lk",
            "lk_hybrid". All but "ce" need a teacher; "ce" with a teacher is the soft cross-entropy.
        bias_M, teacher_bias_M: [M] biases of the heads.
        softcap, logit_scale: of the student's and the teacher's logits alike, since both are the target's head.
        groups_N, groups: [N] long in [0, G) and G: one sum a group (depths that share teacher rows share their
            logits so). A head that learns is then read again in the backward pass.
        learned_from: the first column of weight_MD that learns; the gradient of those before it is zero.
        chunk_rows: C. None: as many as 16 MiB of fp32 logits hold on a CPU, 256 MiB elsewhere, and at least 64.

    Returns:
        LossSum: total (fp32, differentiable), count and correct (long), each [G] with groups; right_N. No counted row:
        zeros, and zero gradients.

    Raises:
        ValueError: unknown kind, missing labels or teacher, shapes that do not fit, labels or rows out of range.
    """
    check(
        kind, hidden_ND, weight_MD, bias_M, labels_N, softcap, chunk_rows,
        teacher_hidden_ND, teacher_weight_MD, teacher_bias_M, teacher_rows_N, groups_N, groups,
    )  # fmt: skip
    rows_N = None if labels_N is None else _counted(labels_N)
    head = _Head(hidden_ND, weight_MD, bias_M, logit_scale, softcap)
    teacher = None
    if teacher_hidden_ND is not None:
        labels_N = None
        teacher = _Head(teacher_hidden_ND, teacher_weight_MD, teacher_bias_M, logit_scale, softcap, head.softmax_dtype)
        if teacher_rows_N is not None:  # rows that share a teacher row come together, so that they share a chunk
            teacher_rows_N = _pick(teacher_rows_N, rows_N)
            order_N = teacher_rows_N.argsort(stable=True)
            rows_N, teacher_rows_N = _pick(rows_N, order_N) if rows_N is not None else order_N, teacher_rows_N[order_N]
        else:
            teacher_rows_N = rows_N
    else:
        labels_N = _pick(labels_N, rows_N)
        check_range("labels_N", labels_N, weight_MD.shape[0], "tokens of the head: map them to its vocabulary")
    job = _Job(
        head=head,
        rows=rows_N,
        count=len(hidden_ND) if rows_N is None else len(rows_N),
        chunk_rows=chunk_rows or default_chunk_rows(weight_MD),
        kind=kind,
        labels=labels_N,
        teacher=teacher,
        teacher_rows=teacher_rows_N,
        group_rows=None if groups_N is None else _pick(groups_N, rows_N),
        groups=groups,
        learned_from=learned_from,
        grad_enabled=torch.is_grad_enabled(),
    )
    with torch.autocast(hidden_ND.device.type, enabled=False):  # _Head has chosen the types, in the open
        total, correct, right_N = _LinearLoss.apply(hidden_ND, weight_MD, bias_M, job)
    if groups is None:
        return LossSum(total, torch.tensor(job.count, device=total.device), correct, right_N)
    return LossSum(total, torch.bincount(job.group_rows, minlength=groups), correct, right_N)


def expected_length(each: list[LossSum]) -> list[LossSum]:
    """e2e_tv (Bebop, arXiv 2606.12370): depth j's total is the sum over rows of 1 - prod_{i <= j} a_i, so that their
    mean over depths is 1 - the expected accepted share of K drawn drafts.

    each: of every depth, tv of each row (groups of one row). A depth that does not count in a row is a factor of one.
    """
    counted_KN = torch.stack([depth.count > 0 for depth in each])
    reached_KN = torch.where(counted_KN, 1.0 - torch.stack([depth.total for depth in each]), 1.0).cumprod(0)
    return _over_rows(each, torch.where(counted_KN, 1.0 - reached_KN, 0.0))


def dpace(each: list[LossSum], kind: str, alpha: float = 0.5) -> list[LossSum]:
    """D-PACE (arXiv 2605.18810, equations 7 to 9): depth j's rows weigh sum_{m >= j} prod_{i <= m} of the drafter's own
    chance to be accepted, smoothed by (1 - alpha) a + alpha; no gradient goes through the weights.

    each: of every depth, the loss of each row (groups of one row). Its chance is exp(-loss), of tv 1 - loss.
    """
    loss_KN, counted_KN = torch.stack([depth.total for depth in each]), torch.stack([depth.count > 0 for depth in each])
    chance_KN = 1.0 - loss_KN.detach() if kind == "tv" else torch.exp(-loss_KN.detach())
    smooth_KN = torch.where(counted_KN, (1 - alpha) * chance_KN + alpha, 1.0)
    worth_KN = (smooth_KN.cumprod(0) * counted_KN).flip(0).cumsum(0).flip(0)
    return _over_rows(each, worth_KN * loss_KN)


def _over_rows(each: list[LossSum], loss_KN: Tensor) -> list[LossSum]:
    return [
        LossSum(loss_N.sum(), depth.count.sum(), depth.correct.sum(), depth.right_N)
        for loss_N, depth in zip(loss_KN, each, strict=True)
    ]


def depth_weights(kind: Weighting, depth: int, beta: float = 0.6) -> list[float]:
    """Weights of depths k = 1..K, of sum 1: uniform (1/K each), harmonic (like 1/k), exponential (like beta^k).

    exponential with beta = 0.6 is FastMTP's (arXiv 2509.18362, section 3): a nearer token is needed more often.

    Raises:
        ValueError: unknown kind, depth below 1, beta not above 0.
    """
    if kind not in get_args(Weighting):
        raise ValueError(f"unknown depth weights {kind!r}, choose one of {', '.join(get_args(Weighting))}.")
    if depth < 1 or beta <= 0:
        raise ValueError(f"depth weights need depth >= 1 and beta > 0, got depth={depth} and beta={beta}.")
    weigh = {"uniform": lambda k: 1.0, "harmonic": lambda k: 1.0 / k, "exponential": lambda k: beta ** (k - 1)}[kind]
    weights = [weigh(k) for k in range(1, depth + 1)]
    return [w / sum(weights) for w in weights]


def default_chunk_rows(weight_MD: Tensor) -> int:
    """Rows of a chunk of linear_loss: see its chunk_rows."""
    chunk_bytes = CHUNK_BYTES_CPU if weight_MD.device.type == "cpu" else CHUNK_BYTES_DEVICE
    return max(MIN_CHUNK_ROWS, chunk_bytes // (4 * weight_MD.shape[0]))


# -- one chunk ---------------------------------------------------------------------------------------------------------


class _Buffers:
    """[C, M] scratch that lives for one loss: without it each chunk would pay for fresh pages."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._shape, self._device = (rows, columns), device
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        if (name, dtype) not in self._kept:
            self._kept[name, dtype] = torch.empty(self._shape, dtype=dtype, device=self._device)
        return self._kept[name, dtype][:rows]


class _Head:
    """States and an output head: logits of some of its rows, in the type that softmax wants."""

    def __init__(
        self,
        hidden: Tensor,
        weight_MD: Tensor,
        bias_M: Tensor | None,
        scale: float,
        softcap: float | None,
        softmax_dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = _matmul_dtype(hidden, weight_MD)
        self.softmax_dtype = _softmax_dtype(self.dtype) if softmax_dtype is None else softmax_dtype
        self.hidden = hidden.detach()
        self.weight_MD = weight_MD.detach().to(self.dtype)
        self.bias_M = None if bias_M is None else bias_M.detach().to(self.dtype)
        self.scale, self.softcap = scale, softcap

    def logits(self, hidden_CD: Tensor, name: str, buffers: _Buffers) -> Tensor:
        """[C, M] in the buffer of that name."""
        x_CM = buffers(name, len(hidden_CD), self.softmax_dtype)
        low_CM = x_CM if self.dtype == x_CM.dtype else buffers("low", len(hidden_CD), self.dtype)
        if self.bias_M is None:
            torch.mm(hidden_CD, self.weight_MD.t(), out=low_CM)
        else:
            torch.addmm(self.bias_M, hidden_CD, self.weight_MD.t(), out=low_CM)
        if low_CM is not x_CM:
            x_CM.copy_(low_CM)
        if self.scale != 1.0:
            x_CM.mul_(self.scale)
        if self.softcap is not None:
            x_CM.div_(self.softcap).tanh_().mul_(self.softcap)
        return x_CM


@dataclass
class _Job:
    """What _LinearLoss needs beside the tensors that get a gradient. The counted rows, in the order of the work."""

    head: _Head
    rows: Tensor | None  # None: all, as they stand
    count: int
    chunk_rows: int
    kind: Kind
    labels: Tensor | None
    teacher: _Head | None
    teacher_rows: Tensor | None  # None: as rows, all as they stand
    group_rows: Tensor | None
    groups: int | None
    learned_from: int
    grad_enabled: bool


def _softmax(x_CM: Tensor, name: str, buffers: _Buffers) -> tuple[Tensor, Tensor, Tensor]:
    """(probabilities in the buffer of that name, logsumexp_C, argmax_C), with three reads of x."""
    top_C, best_C = x_CM.max(-1)
    p_CM = buffers(name, len(x_CM), x_CM.dtype)
    torch.softmax(x_CM, -1, out=p_CM)
    # the largest probability is at least 1/M, so its logarithm is exact enough to give logsumexp without a fourth read
    return p_CM, top_C - p_CM.gather(1, best_C[:, None])[:, 0].log(), best_C


def _label_loss(x_CM: Tensor, labels_C: Tensor, buffers: _Buffers) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_C, gradient [C, M] of the logits, right_C)."""
    p_CM, lse_C, best_C = _softmax(x_CM, "probs", buffers)
    loss_C = lse_C - x_CM.gather(1, labels_C[:, None])[:, 0]
    p_CM.scatter_add_(1, labels_C[:, None], p_CM.new_full((len(p_CM), 1), -1.0))
    return loss_C, p_CM, best_C == labels_C


def _teacher_loss(x_CM: Tensor, job: _Job, chunk: slice, buffers: _Buffers) -> tuple[Tensor, Tensor, Tensor]:
    """As _label_loss. Writes over x_CM."""
    teacher, kind = job.teacher, job.kind
    if job.teacher_rows is None:
        teacher_UD, owner_C = teacher.hidden[chunk], None
    else:
        rows_U, owner_C = job.teacher_rows[chunk].unique_consecutive(return_inverse=True)
        owner_C = None if len(rows_U) == len(owner_C) else owner_C
        teacher_UD = teacher.hidden[rows_U]
    t_UM = teacher.logits(teacher_UD.to(teacher.dtype), "teacher", buffers)
    if kind in ("ce", "kl") and _has_kernel(x_CM):
        from foretell.ops.losses_triton import teacher_chunk

        return teacher_chunk(x_CM, t_UM, owner_C, kind)
    q_UM, teacher_lse_U, teacher_best_U = _softmax(t_UM, "teacher_probs", buffers)

    def spread(name: str, other: str) -> tuple[Tensor, Tensor]:
        """(that buffer of the teacher with a row for each row of the chunk, scratch); the other one is given up."""
        kept_UM = buffers(name, len(t_UM), x_CM.dtype)
        other_CM, name_CM = buffers(other, len(x_CM), x_CM.dtype), buffers(name, len(x_CM), x_CM.dtype)
        if owner_C is None:
            return kept_UM, other_CM
        return torch.index_select(kept_UM, 0, owner_C, out=other_CM), name_CM

    p_CM, lse_C, best_C = _softmax(x_CM, "probs", buffers)
    right_C = best_C == _pick(teacher_best_U, owner_C)
    if kind in ("ce", "kl"):
        loss_C = lse_C
        if kind == "kl":
            loss_C = loss_C + _pick(t_UM.mul_(q_UM).sum(-1) - teacher_lse_U, owner_C)
        q_CM, _ = spread("teacher_probs", "teacher")
        loss_C = loss_C - x_CM.mul_(q_CM).sum(-1)
        return loss_C, p_CM.sub_(q_CM), right_C
    if kind == "reverse_kl":
        t_CM, spare_CM = spread("teacher", "teacher_probs")
        x_CM.sub_(t_CM).sub_((lse_C - _pick(teacher_lse_U, owner_C))[:, None])  # log p - log q
        loss_C = torch.mul(p_CM, x_CM, out=spare_CM).sum(-1)
        return loss_C, p_CM.mul_(x_CM.sub_(loss_C[:, None])), right_C
    if kind in ("lk", "lk_hybrid"):
        negative_U = t_UM.mul_(q_UM).sum(-1) - teacher_lse_U  # the teacher's entropy
        q_CM, spare_CM = spread("teacher_probs", "teacher")
        a_C = torch.minimum(p_CM, q_CM, out=spare_CM).sum(-1).clamp_(min=torch.finfo(p_CM.dtype).tiny)
        if kind == "lk_hybrid":
            kl_C = lse_C + _pick(negative_U, owner_C) - torch.mul(x_CM, q_CM, out=spare_CM).sum(-1)
        torch.lt(p_CM, q_CM, out=x_CM)
        below_C1 = torch.mul(p_CM, x_CM, out=spare_CM).sum(-1, keepdim=True)
        x_CM.neg_().add_(below_C1)
        if kind == "lk":
            return -a_C.log(), p_CM.mul_(x_CM.div_(a_C[:, None])), right_C
        e_C = torch.exp(-LK_ETA * a_C)
        p_CM.mul_(x_CM.mul_((1 - e_C)[:, None]).add_(e_C[:, None])).sub_(q_CM.mul_(e_C[:, None]))
        return e_C * kl_C + (1 - e_C) * (1 - a_C), p_CM, right_C
    q_CM, spare_CM = spread("teacher_probs", "teacher")  # tv
    torch.sub(p_CM, q_CM, out=x_CM)
    loss_C = torch.abs(x_CM, out=spare_CM).sum(-1).mul_(0.5)
    x_CM.sign_().mul_(0.5)
    mean_C = torch.mul(p_CM, x_CM, out=spare_CM).sum(-1)
    return loss_C, p_CM.mul_(x_CM.sub_(mean_C[:, None])), right_C


class _LinearLoss(torch.autograd.Function):
    """(total, correct, right_N). The gradients are made in the forward pass, chunk by chunk, and kept for the backward;
    those of a head whose rows weigh what their groups will are made in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_MD: Tensor, bias_M: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants = tuple(job.grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        ctx.wants, ctx.job, ctx.leaves = wants, None, None
        if job.groups is not None and any(wants[1:]):
            ctx.job, ctx.leaves = job, (hidden_ND.detach(), weight_MD.detach(), bias_M)
            wants = (False, False, False)
        total, correct, right_N, grads = _walk(hidden_ND, weight_MD, bias_M, job, wants)
        # each row's group, and with it the scalar that comes back for it; rows that do not count have no gradient
        group_N = None
        if job.group_rows is not None and wants[0]:
            group_N = torch.zeros(len(hidden_ND), dtype=torch.long, device=hidden_ND.device)
            group_N[slice(None) if job.rows is None else job.rows] = job.group_rows
        ctx.save_for_backward(*grads)
        ctx.group_N = group_N
        ctx.dtypes = (hidden_ND.dtype, weight_MD.dtype, None if bias_M is None else bias_M.dtype)
        ctx.mark_non_differentiable(correct, right_N)
        return total, correct, right_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.job is not None:
            with torch.autocast(grad_total.device.type, enabled=False):
                grads = _walk(*ctx.leaves, ctx.job, ctx.wants, grad_total[ctx.job.group_rows])[3]  # type: ignore[call-arg]
            return *(None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)), None
        # in the scalar's own type: 1 / count rounded to bf16 would scale the whole gradient
        if ctx.group_N is not None:
            grad_total = grad_total[ctx.group_N][:, None]
        grads = [
            None
            if kept is None
            else (kept.to(torch.promote_types(kept.dtype, grad_total.dtype)) * grad_total).to(dtype)
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return *grads, None


def _walk(
    hidden_ND: Tensor,
    weight_MD: Tensor,
    bias_M: Tensor | None,
    job: _Job,
    wants: tuple[bool, ...],
    factor_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """Chunk by chunk: (total, correct, right_N, gradients that are wanted). factor_N: of counted rows' gradients."""
    head, device, sum_dtype = job.head, hidden_ND.device, job.head.softmax_dtype
    buffers = _Buffers(min(job.chunk_rows, max(job.count, 1)), len(weight_MD), device)
    wants_hidden, wants_weight, wants_bias = wants
    grad_hidden_ND = torch.zeros_like(hidden_ND) if wants_hidden else None
    grad_weight_MD = torch.zeros_like(weight_MD, dtype=sum_dtype) if wants_weight else None
    learned_ME = None if grad_weight_MD is None else grad_weight_MD[:, job.learned_from :]
    grad_bias_M = torch.zeros_like(bias_M, dtype=sum_dtype) if wants_bias else None
    sums = () if job.groups is None else (job.groups,)
    total = torch.zeros(sums, dtype=sum_dtype, device=device)
    correct = torch.zeros(sums, dtype=torch.long, device=device)
    right_N = torch.zeros(len(hidden_ND), dtype=torch.bool, device=device)
    for start in range(0, job.count, job.chunk_rows):
        chunk = slice(start, start + job.chunk_rows)
        rows_C = None if job.rows is None else job.rows[chunk]
        hidden_CD = (head.hidden[chunk] if rows_C is None else head.hidden[rows_C]).to(head.dtype)
        x_CM = head.logits(hidden_CD, "logits", buffers)
        slope_CM = None
        if head.softcap is not None and job.grad_enabled:  # d cap / d logits, from the capped logits
            slope_CM = torch.div(x_CM, head.softcap, out=buffers("slope", len(x_CM), x_CM.dtype))
            slope_CM.square_().neg_().add_(1.0)
        if job.teacher is None:
            loss_C, grad_CM, right_C = _label_loss(x_CM, job.labels[chunk], buffers)
        else:
            loss_C, grad_CM, right_C = _teacher_loss(x_CM, job, chunk, buffers)
        right_N[chunk if rows_C is None else rows_C] = right_C
        if job.group_rows is not None:
            correct.index_add_(0, job.group_rows[chunk], right_C.long())
            total.index_add_(0, job.group_rows[chunk], loss_C)
        else:
            correct += right_C.sum()
            total += loss_C.sum()
        if not any(wants):
            continue
        if slope_CM is not None:
            grad_CM.mul_(slope_CM)
        # scale and factor are of whole rows: cheaper on [C, D] than on [C, M]
        factor_C1 = None if head.scale == 1.0 else torch.full_like(loss_C, head.scale)[:, None]
        if factor_N is not None:
            factor_C1 = factor_N[chunk, None].to(loss_C.dtype) * head.scale
        if wants_bias:
            grad_bias_M += grad_CM.sum(0) if factor_C1 is None else grad_CM.t().mv(factor_C1[:, 0])
        if head.dtype != grad_CM.dtype:
            grad_CM = buffers("low", len(grad_CM), head.dtype).copy_(grad_CM)
        if wants_hidden:
            into_CD = grad_CM.mm(head.weight_MD)
            into_CD = into_CD if factor_C1 is None else into_CD * factor_C1
            if rows_C is None:
                grad_hidden_ND[chunk] = into_CD
            else:
                grad_hidden_ND.index_copy_(0, rows_C, into_CD.to(grad_hidden_ND.dtype))
        if wants_weight:
            hidden_CE = hidden_CD[:, job.learned_from :]
            hidden_CE = hidden_CE if factor_C1 is None else (hidden_CE * factor_C1).to(head.dtype)
            if learned_ME.dtype == head.dtype:
                learned_ME.addmm_(grad_CM.t(), hidden_CE)
            else:
                learned_ME += grad_CM.t().mm(hidden_CE)
    return total, correct, right_N, [grad_hidden_ND, grad_weight_MD, grad_bias_M]


# -- small helpers ----------------------------------------------------------------------------------------------------


def _has_kernel(x_CM: Tensor) -> bool:
    """Whether Triton does this chunk. The device is asked first: on a CPU Triton is not even imported."""
    if x_CM.device.type != "cuda" or x_CM.dtype != torch.float32:  # fp64 stays with the definition
        return False
    from foretell.ops.losses_triton import available

    return available(x_CM.device)


def _matmul_dtype(hidden: Tensor, weight_MD: Tensor) -> torch.dtype:
    dtype = torch.promote_types(hidden.dtype, weight_MD.dtype)
    device = hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):  # autocast leaves fp64 alone
        return torch.get_autocast_dtype(device)
    return dtype


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _counted(labels_N: Tensor) -> Tensor | None:
    """Indices of the rows that count, or None for all: then rows are sliced, not copied."""
    rows = (labels_N != IGNORE_INDEX).nonzero()[:, 0]
    return None if len(rows) == len(labels_N) else rows


def _pick(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values[rows]
