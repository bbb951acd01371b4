"""What the arguments of a linear loss must be, said in one message before any product is made."""

# N rows, D hidden width, M vocabulary of the head, S rows of the teacher.

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Kind = Literal["ce", "kl", "reverse_kl", "tv", "lk", "lk_hybrid"]


def check_range(name: str, values: Tensor, end: int, of_what: str) -> None:
    """Raise ValueError unless all values lie in [0, end)."""
    if values.numel():
        low, high = (int(v) for v in values.aminmax())
        if low < 0 or high >= end:
            raise ValueError(f"{name}: got values from {low} to {high}, wanted 0 to {end - 1}, {of_what}.")


def check(
    kind: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    softcap: float | None,
    chunk_rows: int | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_rows: Tensor | None,
    group_rows: Tensor | None,
    groups: int | None,
) -> None:
    """Raise ValueError on anything that does not fit, all of it in one message."""
    if kind not in get_args(Kind):
        raise ValueError(f"unknown loss kind {kind!r}, choose one of {', '.join(get_args(Kind))}.")
    if hidden.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"got hidden states {tuple(hidden.shape)} and weight {tuple(weight.shape)}, wanted [N, D] and [M, D]. "
            "Flatten batch and positions first: hidden.reshape(-1, D)."
        )
    N, M = len(hidden), len(weight)
    problems = []

    def fits(name: str, value: Tensor | None, wanted: tuple[int, ...], do: str) -> None:
        if value is not None and tuple(value.shape) != wanted:
            problems.append(f"{name}: got shape {tuple(value.shape)}, wanted {wanted}: {do}")

    fits("weight_MD", weight, (M, hidden.shape[1]), "the head's width is that of hidden_ND")
    fits("bias_M", bias, (M,), "one a token of the head")
    fits("labels_N", labels, (N,), "one a row of hidden_ND; flatten it the same way")
    if labels is None and teacher_hidden is None:
        problems.append("got neither labels_N nor teacher_hidden_ND: pass one of them")
    if (teacher_hidden is None) != (teacher_weight is None):
        problems.append("a teacher is both teacher_hidden_ND and teacher_weight_MD: pass both or none")
    elif teacher_hidden is None:
        if kind != "ce":
            problems.append(f"kind {kind!r} compares with a teacher: pass teacher_hidden_ND and teacher_weight_MD")
        if teacher_rows is not None or teacher_bias is not None:
            problems.append("teacher_rows_N and teacher_bias_M say nothing without teacher_hidden_ND: leave them out")
    else:
        S, width = len(teacher_hidden), teacher_hidden.shape[-1]
        fits("teacher_hidden_ND", teacher_hidden, (N if teacher_rows is None else S, width), "or pass teacher_rows_N")
        fits("teacher_weight_MD", teacher_weight, (M, width), "the student's vocabulary, the teacher's width")
        fits("teacher_bias_M", teacher_bias, (M,), "one a token of the head")
        fits("teacher_rows_N", teacher_rows, (N,), "one a row of hidden_ND; flatten it the same way")
    fits("groups_N", group_rows, (N,), "one a row of hidden_ND; flatten it the same way")
    if (group_rows is None) != (groups is None):
        problems.append("groups_N and groups belong together: pass both or none")
    if softcap is not None and softcap <= 0:
        problems.append(f"softcap: got {softcap}, wanted more than 0, or None for no cap")
    if chunk_rows is not None and chunk_rows < 1:
        problems.append(f"chunk_rows: got {chunk_rows}, wanted at least 1, or None for the default")
    if problems:
        raise ValueError("; ".join(problems) + ".")
    if group_rows is not None:
        check_range("groups_N", group_rows, groups, "one of the groups")
    if teacher_rows is not None:
        check_range("teacher_rows_N", teacher_rows, len(teacher_hidden), "rows of teacher_hidden_ND")
