"""linear_loss equals plain autograd over all logits: values, gradients, counts, every kind; and the gate can fail."""

# N rows, S teacher rows, D width, M vocabulary.

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foretell.ops.losses import default_chunk_rows, depth_weights, dpace, expected_length, linear_loss
from foretell.types import IGNORE_INDEX, LossSum
from tests.twins import naive_linear_loss

N, S, D, M = 37, 23, 16, 53
CHUNK = 8  # does not divide N: the last chunk is short
KINDS = [
    ("ce", False),
    ("ce", True),
    ("kl", True),
    ("reverse_kl", True),
    ("tv", True),
    ("lk", True),
    ("lk_hybrid", True),
]


def make(
    kind: str, teacher: bool, dtype: torch.dtype = torch.float32, seed: int = 0, **options: bool
) -> dict[str, Any]:
    """Keyword arguments of linear_loss; gradients are wanted for hidden, weight and bias."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    hidden_ND, weight_MD = randn(N, D), randn(M, D)
    labels_N = torch.where(torch.rand(N, generator=g) < 0.5, (hidden_ND @ weight_MD.T).argmax(-1), torch.arange(N))
    if options.get("ignore"):
        labels_N[torch.rand(N, generator=g) < 0.4] = IGNORE_INDEX
    kwargs: dict[str, Any] = {"kind": kind, "chunk_rows": CHUNK}
    if not teacher or options.get("ignore"):
        kwargs["labels_N"] = labels_N
    if teacher:  # like the student, so that the two agree on some rows
        rows_N = torch.randint(0, S, (N,), generator=g) if options.get("shared") else torch.arange(N)
        teacher_ND = randn(S if options.get("shared") else N, D + 3)
        hidden_ND = 0.3 * hidden_ND + teacher_ND[rows_N, :D]
        kwargs |= {"teacher_hidden_ND": teacher_ND, "teacher_weight_MD": torch.cat([weight_MD, randn(M, 3)], dim=1)}
        if options.get("shared"):
            kwargs["teacher_rows_N"] = rows_N
    kwargs |= {"hidden_ND": hidden_ND.requires_grad_(), "weight_MD": weight_MD.requires_grad_()}
    if options.get("bias"):
        kwargs["bias_M"] = randn(M).requires_grad_()
        if teacher:
            kwargs["teacher_bias_M"] = randn(M)
    if options.get("capped"):
        kwargs |= {"softcap": 3.0, "logit_scale": 0.7}
    return kwargs


def run(function: Any, kwargs: dict[str, Any], scale: float = 0.37) -> tuple[LossSum, list[Tensor | None]]:
    """The loss, and gradients of a multiple of it with respect to hidden, weight and bias."""
    leaves = [kwargs["hidden_ND"], kwargs["weight_MD"], kwargs.get("bias_M")]
    for leaf in leaves:
        if leaf is not None:
            leaf.grad = None
    loss = function(**kwargs)
    (scale * loss.total).backward()
    return loss, [None if leaf is None or leaf.grad is None else leaf.grad.clone() for leaf in leaves]


def off(got: Tensor, wanted: Tensor) -> float:
    """Distance as a part of the wanted tensor's norm: 1 for zeros, 2 for a flipped sign."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


def check(kwargs: dict[str, Any], tolerance: float) -> None:
    loss, grads = run(linear_loss, kwargs)
    wanted, wanted_grads = run(naive_linear_loss, kwargs)
    assert off(loss.total, wanted.total) < tolerance
    assert (int(loss.count), int(loss.correct)) == (int(wanted.count), int(wanted.correct))
    assert 0 < int(loss.correct) < int(loss.count) <= N
    for grad, wanted_grad, leaf in zip(grads, wanted_grads, ("hidden_ND", "weight_MD", "bias_M"), strict=True):
        assert (grad is None) == (wanted_grad is None)
        if grad is not None:
            assert grad.dtype == kwargs[leaf].dtype
            assert off(grad, wanted_grad) < tolerance, leaf


FP32 = 2e-6  # some ten roundings of 6e-8, over sums of 53 terms


@pytest.mark.parametrize(("kind", "teacher"), KINDS)
@pytest.mark.parametrize("options", ["", "ignore", "shared", "bias", "capped", "all"])
def test_values_and_gradients_equal_autograd(kind, teacher, options):
    names = ("ignore", "shared", "bias", "capped") if options == "all" else (options,)
    check(make(kind, teacher, **dict.fromkeys(names, True)), FP32)


@pytest.mark.parametrize(("kind", "teacher"), KINDS)
def test_gradients_only_where_they_are_wanted(kind, teacher):
    for frozen in (["weight_MD"], ["hidden_ND"], ["weight_MD", "bias_M"]):
        kwargs = make(kind, teacher, bias=True, ignore=True)
        for name in frozen:
            kwargs[name].requires_grad_(False)
        check(kwargs, FP32)
    kwargs = make(kind, teacher)
    if teacher:
        kwargs["teacher_hidden_ND"].requires_grad_()
        kwargs["teacher_weight_MD"].requires_grad_()
        run(linear_loss, kwargs)
        assert kwargs["teacher_hidden_ND"].grad is None and kwargs["teacher_weight_MD"].grad is None
    with torch.no_grad():
        assert not linear_loss(**kwargs).total.requires_grad


@pytest.mark.parametrize(("kind", "teacher"), [kind for kind in KINDS if kind[0] != "lk_hybrid"])  # a weight is fixed
def test_gradcheck_in_fp64(kind, teacher):
    kwargs = make(kind, teacher, torch.float64, ignore=True, shared=True, bias=True, capped=True)
    small = {"hidden_ND": 11, "labels_N": 11, "teacher_rows_N": 11}
    kwargs = {k: v[: small[k]].detach() if k in small else v for k, v in kwargs.items()}
    leaves = tuple(kwargs.pop(name).requires_grad_() for name in ("hidden_ND", "weight_MD", "bias_M"))
    assert torch.autograd.gradcheck(lambda h, w, b: linear_loss(h, w, bias_M=b, **kwargs).total, leaves)


@pytest.mark.parametrize(("kind", "teacher"), KINDS)
def test_bf16_is_as_good_as_naive_bf16(kind, teacher):
    """Both are held against fp32 on the same rounded numbers; ours may not be further off than the twin by a half."""
    low = make(kind, teacher, torch.bfloat16, ignore=True, shared=True, bias=True)
    high = {k: v.detach().float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in low.items()}
    for name in ("hidden_ND", "weight_MD", "bias_M"):
        high[name].requires_grad_()
    exact, exact_grads = run(naive_linear_loss, high)
    ours, our_grads = run(linear_loss, low)
    naive, naive_grads = run(naive_linear_loss, low)
    assert ours.total.dtype == torch.float32
    assert off(ours.total, exact.total) < 1.5 * off(naive.total, exact.total) + 1e-4
    for ours_, naive_, exact_ in zip(our_grads, naive_grads, exact_grads, strict=True):
        assert ours_.dtype == torch.bfloat16
        assert off(ours_, exact_) < 1.5 * off(naive_, exact_) + 1e-3
        assert off(ours_, exact_) < 0.05


@pytest.mark.parametrize(("kind", "teacher"), KINDS)
def test_autocast_means_bf16_products_and_fp32_gradients(kind, teacher):
    kwargs = make(kind, teacher, bias=True, capped=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, our_grads = run(linear_loss, kwargs)
        naive, naive_grads = run(naive_linear_loss, kwargs)
    assert ours.total.dtype == torch.float32 and off(ours.total, naive.total) < 1e-3
    for ours_, naive_ in zip(our_grads, naive_grads, strict=True):
        assert ours_.dtype == torch.float32 and off(ours_, naive_) < 0.02
    exact, _ = run(linear_loss, kwargs)
    assert off(ours.total, exact.total) > 1e-6, "autocast was not honoured"


def test_mixed_types_are_promoted():
    kwargs = make("kl", True)
    kwargs["weight_MD"] = kwargs["weight_MD"].detach().bfloat16()
    kwargs["teacher_weight_MD"] = kwargs["teacher_weight_MD"].bfloat16()
    check(kwargs, FP32)


def test_the_loss_is_torchs_own_cross_entropy():
    """The twin could share a mistake: this compares with what everybody uses."""
    kwargs = make("ce", False, ignore=True, bias=True)
    loss, grads = run(linear_loss, kwargs, scale=1.0)
    hidden, weight, bias = (kwargs[name].detach().requires_grad_() for name in ("hidden_ND", "weight_MD", "bias_M"))
    wanted = F.cross_entropy(F.linear(hidden, weight, bias), kwargs["labels_N"], reduction="sum")
    wanted.backward()
    assert off(loss.total, wanted) < FP32
    for grad, leaf in zip(grads, (hidden, weight, bias), strict=True):
        assert off(grad, leaf.grad) < FP32


def test_kinds_by_hand():
    """Two tokens, student p = (0.8, 0.2), teacher q = (0.5, 0.5)."""
    one = torch.ones(1, 1)
    student, teacher = torch.log(torch.tensor([[0.8], [0.2]])), torch.log(torch.tensor([[0.5], [0.5]]))
    wanted = {"ce": 0.916291, "kl": 0.223144, "reverse_kl": 0.192745, "tv": 0.3}
    for kind, value in wanted.items():
        loss = linear_loss(one, student, teacher_hidden_ND=one, teacher_weight_MD=teacher, kind=kind)
        assert loss.total.item() == pytest.approx(value, abs=1e-5), kind


@pytest.mark.parametrize(("kind", "teacher"), KINDS)
def test_the_gate_rejects_wrong_gradients(kind, teacher):
    kwargs = make(kind, teacher)
    wanted, right = run(naive_linear_loss, kwargs)
    for grad in right[:2]:
        for wrong in (torch.zeros_like(grad), -grad, 2 * grad, grad * 1.001, grad.roll(1, 0)):
            assert off(wrong, grad) > 100 * FP32
    if not teacher:  # a label one place off is another loss
        loss, grads = run(linear_loss, kwargs | {"labels_N": kwargs["labels_N"].roll(1)})
        assert min(off(grads[0], right[0]), off(loss.total, wanted.total)) > 100 * FP32


@pytest.mark.parametrize(("kind", "teacher"), KINDS)
@pytest.mark.parametrize("rows", [0, N])
def test_nothing_counted_is_a_finite_zero(kind, teacher, rows):
    kwargs = make(kind, teacher, ignore=True, bias=True)
    kwargs["labels_N"] = torch.full((rows,), IGNORE_INDEX)
    kwargs["hidden_ND"] = kwargs["hidden_ND"].detach()[:rows].requires_grad_()
    if teacher:
        kwargs["teacher_hidden_ND"] = kwargs["teacher_hidden_ND"][:rows]
    loss, grads = run(linear_loss, kwargs)
    assert (loss.total.item(), int(loss.count), int(loss.correct)) == (0.0, 0, 0)
    assert all(grad is not None and not grad.any() for grad in grads)


@pytest.mark.parametrize(("kind", "teacher"), KINDS)
def test_chunk_size_and_row_order_change_nothing(kind, teacher):
    kwargs = make(kind, teacher, ignore=True, shared=True)
    wanted, wanted_grads = run(linear_loss, kwargs)
    for chunk_rows in (1, 5, N, 10 * N, None):
        loss, grads = run(linear_loss, kwargs | {"chunk_rows": chunk_rows})
        assert off(loss.total, wanted.total) < FP32 and int(loss.correct) == int(wanted.correct)
        assert all(off(g, w) < FP32 for g, w in zip(grads[:2], wanted_grads[:2], strict=True))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    moved = {k: v[order] if k in ("labels_N", "teacher_rows_N") else v for k, v in kwargs.items()}
    moved["hidden_ND"] = kwargs["hidden_ND"].detach()[order].requires_grad_()
    loss, grads = run(linear_loss, moved)
    assert off(loss.total, wanted.total) < FP32 and off(grads[0], wanted_grads[0][order]) < FP32


def test_a_saturated_row_is_finite_and_exact():
    hidden = torch.tensor([[1e4], [-1e4], [50.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    loss = linear_loss(hidden, weight, labels_N=torch.tensor([0, 0, 2]))
    loss.total.backward()
    assert loss.total.item() == pytest.approx(2e4 + 100) and int(loss.correct) == 1
    assert hidden.grad[:, 0].tolist() == pytest.approx([0.0, -2.0, 2.0])


def test_correct_breaks_ties_as_argmax_does():
    """bf16 logits are often equal: only the lowest index is the argmax."""
    hidden, weight = torch.ones(3, 1), torch.tensor([[0.0], [1.0], [1.0]])
    loss = linear_loss(hidden, weight, labels_N=torch.tensor([1, 2, 0]))
    assert int(loss.correct) == 1


def test_backward_twice_gives_the_same_gradient():
    kwargs = make("kl", True)
    total = linear_loss(**kwargs).total
    first = torch.autograd.grad(total, kwargs["weight_MD"], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(total, kwargs["weight_MD"])[0], first)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives, and rows that go into products with a wide head."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.product_rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
                if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and tensor.shape[-1] == 1000:
                    self.product_rows += len(tensor)
        return out


@pytest.mark.parametrize(("kind", "teacher"), KINDS)
def test_no_tensor_of_all_logits_is_ever_made(kind, teacher):
    n, m, chunk = 300, 1000, 32
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, 4, generator=g).requires_grad_(), torch.randn(m, 4, generator=g).requires_grad_()
    kwargs: dict[str, Any] = {"labels_N": torch.arange(n), "kind": kind, "softcap": 5.0}
    if teacher:
        kwargs |= {"teacher_hidden_ND": torch.randn(n // 3, 4, generator=g), "teacher_weight_MD": weight.detach()}
        kwargs["teacher_rows_N"] = torch.arange(n) % (n // 3)
    with Largest() as ours:
        linear_loss(hidden, weight, chunk_rows=chunk, **kwargs).total.backward()
    with Largest() as naive:
        naive_linear_loss(hidden, weight, **kwargs).total.backward()
    assert naive.elements == n * m, "the meter sees what it should"
    assert ours.elements == chunk * m


@pytest.mark.parametrize(("kind", "teacher"), [("ce", False), ("lk", True)])
@pytest.mark.parametrize("capped", [False, True])
def test_groups_of_a_head_that_learns(kind, teacher, capped):
    """Each group's sum comes back times its own number, to the head too."""
    kwargs = make(kind, teacher, ignore=True, bias=True, capped=capped)
    kwargs |= {"groups_N": torch.arange(N) % 5, "groups": 5}
    found = []
    for function in (linear_loss, naive_linear_loss):
        leaves = [kwargs[name] for name in ("hidden_ND", "weight_MD", "bias_M")]
        loss = function(**kwargs)
        found.append((loss, torch.autograd.grad((loss.total * torch.arange(1.0, 6.0)).sum(), leaves)))
    (loss, grads), (wanted, wanted_grads) = found
    assert off(loss.total, wanted.total) < FP32
    assert torch.equal(loss.count, wanted.count) and torch.equal(loss.correct, wanted.correct)
    assert torch.equal(loss.right_N, wanted.right_N)
    assert all(off(grad, wanted_grad) < FP32 for grad, wanted_grad in zip(grads, wanted_grads, strict=True))


def test_a_part_of_a_head_learns():
    kwargs = make("kl", True, ignore=True)
    wanted = run(linear_loss, kwargs)[1]
    got = run(linear_loss, {**kwargs, "learned_from": 3})[1]
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1][:, 3:], wanted[1][:, 3:])
    assert not got[1][:, :3].any()


def test_lk_of_one_label_is_cross_entropy():
    kwargs = make("lk", True)
    logits_NM = kwargs["hidden_ND"].detach() @ kwargs["weight_MD"].detach().T
    labels_N = logits_NM.topk(3)[1][:, 2]
    peaked = {"teacher_hidden_ND": F.one_hot(labels_N, M).float() * 200.0, "teacher_weight_MD": torch.eye(M)}
    found, grads = run(linear_loss, kwargs | peaked)
    hard = {"hidden_ND": kwargs["hidden_ND"], "weight_MD": kwargs["weight_MD"], "labels_N": labels_N}
    wanted, wanted_grads = run(linear_loss, hard)
    assert off(found.total, wanted.total) < FP32
    assert off(grads[0], wanted_grads[0]) < FP32 and off(grads[1], wanted_grads[1]) < FP32


# K depths that read one row's states, of which some do not count
DEPTHS = 3


def together(reduce: Any, kind: str, learns: bool, shift: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Totals of the depths, and gradients of a weighted sum; shift: teacher rows that are so many places off."""
    g = torch.Generator().manual_seed(1)
    base = make("tv", True)
    weight_MD = base["weight_MD"].detach().requires_grad_(learns)
    hidden = [
        (base["hidden_ND"] + 0.3 * torch.randn(N, D, generator=g)).detach().requires_grad_() for _ in range(DEPTHS)
    ]
    each = []
    for k, hidden_ND in enumerate(hidden):
        labels_N = torch.where(torch.rand(N, generator=g) < 0.25, IGNORE_INDEX, 1)
        rows_N = (torch.arange(N) + k + shift) % N
        each.append(reduce.linear(
            hidden_ND, weight_MD, labels_N=labels_N, kind=kind, chunk_rows=CHUNK, teacher_rows_N=rows_N,
            teacher_hidden_ND=base["teacher_hidden_ND"], teacher_weight_MD=base["teacher_weight_MD"],
            groups_N=torch.arange(N), groups=N,
        ))  # fmt: skip
    totals = reduce.over(each)
    leaves = [*hidden, weight_MD] if learns else hidden
    grads = torch.autograd.grad(sum((k + 1) * total for k, total in enumerate(totals)), leaves)
    return totals, list(grads)


class Ours:
    linear = staticmethod(linear_loss)

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind

    def over(self, each: list[LossSum]) -> list[Tensor]:
        found = expected_length(each) if self.name == "e2e_tv" else dpace(each, self.kind)
        assert [int(loss.count) for loss in found] == [int(loss.count.sum()) for loss in each]
        return [loss.total for loss in found]


class Dense(Ours):
    """Row by row and depth by depth, as the papers write it."""

    linear = staticmethod(naive_linear_loss)

    def over(self, each: list[LossSum]) -> list[Tensor]:
        totals = [torch.zeros(()) for _ in each]
        for n in range(N):
            counted = [k for k in range(DEPTHS) if int(each[k].count[n])]
            for j in counted:
                chances = [1 - each[i].total[n] if self.kind == "tv" else (-each[i].total[n]).exp() for i in counted]
                if self.name == "e2e_tv":
                    reached = torch.ones(())
                    for i, chance in zip(counted, chances, strict=True):
                        reached = reached * chance if i <= j else reached
                    totals[j] = totals[j] + 1 - reached
                    continue
                weight = 0.0
                for m in counted:
                    if m >= j:
                        terms = [0.5 * float(c.detach()) + 0.5 for i, c in zip(counted, chances, strict=True) if i <= m]
                        weight += float(torch.tensor(terms).prod())
                totals[j] = totals[j] + weight * each[j].total[n]
        return totals


JOINT = [("e2e_tv", "tv"), ("dpace", "ce"), ("dpace", "tv"), ("dpace", "lk")]


@pytest.mark.parametrize(("name", "kind"), JOINT)
@pytest.mark.parametrize("learns", [False, True], ids=["head fixed", "head learns"])
def test_depths_together_equal_the_papers_sums(name, kind, learns):
    totals, grads = together(Ours(name, kind), kind, learns)
    wanted, wanted_grads = together(Dense(name, kind), kind, learns)
    shifted, shifted_grads = together(Dense(name, kind), kind, learns, shift=1)
    # products of three chances, and sums over rows
    assert all(off(total, one) < 10 * FP32 for total, one in zip(totals, wanted, strict=True))
    for grad, one, other in zip(grads, wanted_grads, shifted_grads, strict=True):
        assert off(grad, one) < 10 * FP32
        assert min(off(wrong, one) for wrong in (0 * grad, -grad, 2 * grad, other)) > 0.1, "the gate can fail"
    assert all(off(other, one) > 1e-3 for other, one in zip(shifted, wanted, strict=True))


def test_expected_length_by_hand():
    """Of two depths one row reaches .8 and .8 * .5; another counts at the second only; a third not at all."""
    tv = [torch.tensor([0.2, 0.0, 0.0]), torch.tensor([0.5, 0.25, 0.0])]
    count = [torch.tensor([1, 0, 0]), torch.tensor([1, 1, 0])]
    first, second = expected_length([LossSum(t, c, 0 * c) for t, c in zip(tv, count, strict=True)])
    assert float(first.total) == pytest.approx(0.2) and float(second.total) == pytest.approx(0.6 + 0.25)
    assert (int(first.count), int(second.count)) == (1, 2)


def test_ignored_rows_and_shared_teachers_cost_no_product():
    n, m, depths = 120, 1000, 4
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, 4, generator=g), torch.randn(m, 4, generator=g)
    labels = torch.arange(n)
    labels[: n // 2] = IGNORE_INDEX
    with Largest() as meter:
        linear_loss(hidden, weight, labels_N=labels, chunk_rows=10)
    assert meter.product_rows == n // 2
    # rows ordered by depth, as a caller has them: each depth goes through all teacher rows again
    teacher_rows = torch.arange(n) % (n // depths)
    teacher = {"teacher_hidden_ND": hidden[: n // depths], "teacher_weight_MD": weight, "teacher_rows_N": teacher_rows}
    with Largest() as meter:
        linear_loss(hidden, weight, kind="kl", chunk_rows=10, **teacher)
    chunks = n // 10
    assert n + n // depths <= meter.product_rows <= n + n // depths + chunks, "at most one row twice at a chunk's edge"


def test_labels_beside_a_teacher_only_say_which_rows_count():
    """With a reduced vocabulary they may be tokens that the head does not have."""
    kwargs = make("kl", True, ignore=True)
    wanted, _ = run(linear_loss, kwargs)
    counted_N = kwargs["labels_N"] != IGNORE_INDEX
    loss, _ = run(linear_loss, kwargs | {"labels_N": torch.where(counted_N, 10 * M, IGNORE_INDEX)})
    assert torch.equal(loss.total, wanted.total) and int(loss.count) == int(counted_N.sum())


def test_default_chunk_is_16_mib_on_a_cpu():
    assert default_chunk_rows(torch.empty(8192, 1)) * 8192 * 4 == 16 * 2**20
    assert default_chunk_rows(torch.empty(250_000, 1)) == 64


def test_depth_weights():
    assert depth_weights("uniform", 4) == [0.25] * 4
    assert depth_weights("harmonic", 3) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert depth_weights("exponential", 3) == pytest.approx([1 / 1.96, 0.6 / 1.96, 0.36 / 1.96])
    assert depth_weights("exponential", 2, beta=1.0) == [0.5, 0.5]
    for kind in ("uniform", "harmonic", "exponential"):
        assert sum(depth_weights(kind, 7)) == pytest.approx(1.0)
    with pytest.raises(
        ValueError, match="unknown depth weights 'linear', choose one of uniform, harmonic, exponential"
    ):
        depth_weights("linear", 2)
    with pytest.raises(ValueError, match="depth=0"):
        depth_weights("uniform", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "mse"}, "unknown loss kind 'mse', choose one of ce, kl, reverse_kl, tv, lk, lk_hybrid"),
        ({"hidden_ND": torch.zeros(2, 3, D)}, r"\(2, 3, 16\) .* wanted \[N, D\] and \[M, D\]. Flatten"),
        ({"weight_MD": torch.zeros(M, D + 1)}, r"weight_MD: got shape \(53, 17\), wanted \(53, 16\)"),
        ({"labels_N": torch.zeros(N + 1, dtype=torch.long)}, r"labels_N: got shape \(38,\), wanted \(37,\)"),
        ({"labels_N": torch.full((N,), M)}, "got values from 53 to 53, wanted 0 to 52"),
        ({"labels_N": None}, "neither labels_N nor teacher_hidden_ND"),
        ({"kind": "kl"}, "'kl' compares with a teacher"),
        ({"teacher_hidden_ND": torch.zeros(N, D)}, "pass both or none"),
        ({"teacher_rows_N": torch.zeros(N, dtype=torch.long)}, "without teacher_hidden_ND"),
        ({"bias_M": torch.zeros(3)}, r"bias_M: got shape \(3,\), wanted \(53,\)"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"chunk_rows": 0}, "chunk_rows: got 0"),
        (
            {"teacher_hidden_ND": torch.zeros(S, D), "teacher_weight_MD": torch.zeros(M + 1, D), "softcap": -1.0},
            r"\(23, 16\), wanted \(37, 16\): or pass teacher_rows_N; .*\(54, 16\), wanted \(53, 16\).*; softcap",
        ),
        (
            {
                "teacher_hidden_ND": torch.zeros(S, D),
                "teacher_weight_MD": torch.zeros(M, D),
                "teacher_rows_N": torch.full((N,), S),
            },
            "teacher_rows_N: got values from 23 to 23, wanted 0 to 22",
        ),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        linear_loss(**(make("ce", False) | change))
