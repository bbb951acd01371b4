"""Slow twins that a reader can check by eye: what the package's fast paths are held against."""

# R rows, N rows, D hidden width, M vocabulary of the head.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foretell.data.prompts import _ready, _template_of, encode_some, labelled
from foretell.ops.loss_checks import Kind, check
from foretell.ops.losses import _matmul_dtype, _softmax_dtype
from foretell.ops.tree import PADDING, ROOT
from foretell.types import IGNORE_INDEX, LossSum


def brute_force_visible(parents_R: Sequence[int]) -> Tensor:
    """bool [R, R], [r, s]: row r sees row s. The definition, slow and checkable by eye.

    Raises:
        ValueError: a parent is no row, is padding, or a row is its own ancestor.
    """
    R = len(parents_R)
    visible_RR = torch.zeros(R, R, dtype=torch.bool)
    for r in range(R):
        at, steps = r, 0
        while at >= 0:
            visible_RR[r, at] = True
            at, steps = parents_R[at], steps + 1
            if at >= R or steps > R or (at == PADDING and steps > 1):
                raise ValueError(
                    f"parents {list(parents_R)} are no forest: row {r} leads to "
                    f"{'a circle' if steps > R else at}; a parent is a row, {ROOT} (root) or {PADDING} (padding)."
                )
    return visible_RR


def naive_linear_loss(
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
    """linear_loss with all logits at once and plain autograd: the twin that a reader can check by eye."""
    check(
        kind, hidden_ND, weight_MD, bias_M, labels_N, softcap, chunk_rows,
        teacher_hidden_ND, teacher_weight_MD, teacher_bias_M, teacher_rows_N, groups_N, groups,
    )  # fmt: skip

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = _matmul_dtype(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            x = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        x = x.to(_softmax_dtype(dtype)) * logit_scale
        return x if softcap is None else softcap * torch.tanh(x / softcap)

    x_NM = logits(hidden_ND, weight_MD, bias_M)
    logp_NM = x_NM.log_softmax(-1)
    counted_N = torch.ones_like(x_NM[:, 0], dtype=torch.bool) if labels_N is None else labels_N != IGNORE_INDEX
    if teacher_hidden_ND is None:
        wanted_N = labels_N.clamp(min=0)
        loss_N = -logp_NM.gather(1, wanted_N[:, None])[:, 0]
    else:
        with torch.no_grad():
            teacher_NM = logits(teacher_hidden_ND, teacher_weight_MD, teacher_bias_M)
            teacher_NM = teacher_NM if teacher_rows_N is None else teacher_NM[teacher_rows_N]
            logq_NM = teacher_NM.log_softmax(-1)
            wanted_N = teacher_NM.argmax(-1)
        p_NM, q_NM = logp_NM.exp(), logq_NM.exp()
        loss_N = {
            "ce": lambda: -(q_NM * logp_NM).sum(-1),
            "kl": lambda: (q_NM * (logq_NM - logp_NM)).sum(-1),
            "reverse_kl": lambda: (p_NM * (logp_NM - logq_NM)).sum(-1),
            "tv": lambda: 0.5 * (p_NM - q_NM).abs().sum(-1),
            "lk": lambda: -torch.minimum(p_NM, q_NM).sum(-1).log(),
            "lk_hybrid": lambda: _lk_hybrid(p_NM, q_NM),
        }[kind]()
    right_N = (x_NM.argmax(-1) == wanted_N) & counted_N
    if groups is None:
        return LossSum(loss_N[counted_N].sum(), counted_N.sum(), right_N.sum(), right_N)
    each = [counted_N & (groups_N == g) for g in range(groups)]
    return LossSum(
        torch.stack([loss_N[rows_N].sum() for rows_N in each]),
        torch.stack([rows_N.sum() for rows_N in each]),
        torch.stack([(right_N & rows_N).sum() for rows_N in each]),
        right_N,
    )


def _lk_hybrid(p_NM: Tensor, q_NM: Tensor) -> Tensor:
    """LK's second loss: from KL to TV as acceptance grows (arXiv 2602.23881, eta = 3)."""
    e_N = torch.exp(-3.0 * torch.minimum(p_NM, q_NM).sum(-1)).detach()
    return e_N * (q_NM * (q_NM / p_NM).log()).sum(-1) + (1 - e_N) * 0.5 * (p_NM - q_NM).abs().sum(-1)


def encode_row(
    row: Mapping[str, Any], tokenizer: Any, max_length: int | None = None, assistant_only_loss: bool = True
) -> dict[str, Any]:
    """encode_rows of one row, by itself."""
    (encoded,) = encode_some([row], tokenizer, assistant_only_loss, _template_of(tokenizer))
    if isinstance(encoded, ValueError):
        raise encoded
    ready = _ready(row, None) if "input_ids" in row else labelled(encoded)
    return {name: values[:max_length] for name, values in ready.items()}


def preview(row: Mapping[str, Any], tokenizer: Any) -> str:
    """The row as text with the trained tokens in ⟦brackets⟧."""
    encoded = encode_row(row, tokenizer)
    pieces, start, ids = [], 0, encoded["input_ids"]
    trained = [label != IGNORE_INDEX for label in encoded["labels"]]
    for at in range(1, len(ids) + 1):
        if at == len(ids) or trained[at] != trained[start]:
            text = tokenizer.decode(ids[start:at])
            pieces.append(f"⟦{text}⟧" if trained[start] else text)
            start = at
    return "".join(pieces)
