"""The Triton kernels equal their twin and fp64 autograd of the textbook formula, in Triton's interpreter on a CPU and
compiled under -m gpu: values, both gradients, limits, rows that do not count; and the comparison can fail."""

# N rows, V vocabulary; C rows and U teacher rows of a chunk.

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from foretell.types import IGNORE_INDEX, LossSum

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
LOWEST = torch.finfo(torch.float32).min

# a part of the norm. fp32: some ten roundings of 6e-8, and a GPU's exp is off by 1e-7 times its argument. Halves: only
# the gradient is rounded, to 7 and 10 bits, as is that of the twin; for bf16 the interpreter cuts off instead
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# NumPy's, of the elements that a kernel computes and then does not take
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero|All-NaN slice) encountered:RuntimeWarning"
)


def load(name: str) -> ModuleType:
    """A private copy of the module, decorated as the environment says now."""
    spec = importlib.util.find_spec("foretell.ops.losses_triton")
    spec = importlib.util.spec_from_file_location(name, spec.origin)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tritons() -> dict[str, ModuleType]:
    """Loaded modules of Triton, less its compiled part, which a process loads once."""
    return {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "triton" and not n.startswith("triton._C")}


@contextmanager
def decorated(interpret: bool) -> Iterator[ModuleType]:
    """The kernels, in Triton's interpreter or to be compiled. Triton reads the variable when it is imported and when a
    kernel is decorated, so this has a Triton of its own: what other tests import, before or after, stays as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpret)))
        before = tritons()
        for name in before:
            del sys.modules[name]
        try:
            yield load("losses_triton_of_tests")
        finally:
            for name, module in tritons().items():
                # kept under another name: Triton's compiled part reports modules that are gone before the end as leaks
                sys.modules[f"of tests: {name} {id(module)}"] = sys.modules.pop(name)
            sys.modules.update(before)


@pytest.fixture(
    scope="module", params=[pytest.param("cpu", marks=needs_triton), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not (HAS_TRITON and torch.cuda.is_available()):
        pytest.skip("needs a GPU")
    return request.param


@pytest.fixture(scope="module")
def ops(device: str) -> Iterator[ModuleType]:
    with decorated(interpret=device == "cpu") as module:
        yield module


def make(N: int, V: int, dtype: torch.dtype, device: str, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits of a student and of a teacher that agree on many rows but not on all."""
    g = torch.Generator().manual_seed(N + V)
    teacher_NV = scale * torch.randn(N, V, generator=g)
    student_NV = 0.8 * teacher_NV + 0.3 * scale * torch.randn(N, V, generator=g)
    return student_NV.to(device, dtype), teacher_NV.to(device, dtype)


def run(
    function: Callable[..., LossSum], student_NV: Tensor, teacher_NV: Tensor, upstream: float = 0.37, **kwargs: Any
) -> tuple[LossSum, Tensor, Tensor]:
    """The loss, and the gradients of a multiple of it with respect to both."""
    student_NV, teacher_NV = (v.detach().clone().requires_grad_() for v in (student_NV, teacher_NV))
    loss = function(student_NV, teacher_NV, **kwargs)
    (upstream * loss.total).backward()
    return loss, student_NV.grad, teacher_NV.grad


def textbook(student_NV: Tensor, teacher_NV: Tensor, counted_N: Tensor | None = None) -> LossSum:
    """In fp64, as it is written in books."""
    x, t = student_NV.double(), teacher_NV.double()
    loss_N = x.logsumexp(-1) - (t.softmax(-1) * x).sum(-1)
    right_N = x.argmax(-1) == t.argmax(-1)
    if counted_N is not None:
        loss_N, right_N = loss_N[counted_N], right_N[counted_N]
    return LossSum(loss_N.sum(), torch.tensor(len(loss_N)), right_N.sum())


def check_close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """The distance is a part of the wanted tensor's norm, and so is that of the row that is furthest off."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    assert got.shape == wanted.shape and got.isfinite().all()
    norm = wanted.norm()
    assert (got - wanted).norm() <= tolerance * norm + 1e-30, f"off by {float((got - wanted).norm() / norm):.1e}"
    rows, wanted_rows = (v.reshape(len(v) if v.dim() == 2 else 1, -1) for v in (got, wanted))
    off = (rows - wanted_rows).norm(dim=1) - 2 * tolerance * wanted_rows.norm(dim=1)
    assert (off <= tolerance * norm / max(len(rows), 1) ** 0.5 + 1e-30).all()


def check(
    ops: ModuleType, student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor | None = None, upstream: float = 0.37
) -> None:
    """The kernels against the twin and the textbook."""
    counted_N = None if labels_N is None else labels_N if labels_N.dtype == torch.bool else labels_N != IGNORE_INDEX
    loss, *grads = run(ops.soft_cross_entropy, student_NV, teacher_NV, upstream, labels_N=labels_N)
    twin, *twin_grads = run(ops.naive_soft_cross_entropy, student_NV, teacher_NV, upstream, labels_N=labels_N)
    high = (student_NV.double(), teacher_NV.double())
    book, *book_grads = run(textbook, *high, upstream, counted_N=counted_N)
    assert loss.total.dtype == torch.float32
    # the twin's own fp32 sums over the largest vocabulary are off by several 1e-6
    for wanted, wanted_grads, slack in ((twin, twin_grads, 1e-5), (book, book_grads, 0.0)):
        check_close(loss.total, wanted.total, TOLERANCE[torch.float32] + slack)
        assert (int(loss.count), int(loss.correct)) == (int(wanted.count), int(wanted.correct))
        for got, wanted_grad, leaf in zip(grads, wanted_grads, (student_NV, teacher_NV), strict=True):
            assert got.dtype == leaf.dtype
            check_close(got, wanted_grad, TOLERANCE[leaf.dtype] + slack)


# -- values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("V", [1, 2, 37, 1000, 1025])
def test_values_and_both_gradients(ops, device, V, dtype):
    check(ops, *make(5, V, dtype, device))


@pytest.mark.parametrize(("V", "dtype"), [(32_000, torch.float32), (32_000, torch.float16), (151_936, torch.bfloat16)])
def test_wide_vocabularies(ops, device, V, dtype):
    check(ops, *make(2, V, dtype, device))


def test_types_may_differ(ops, device):
    student_NV, teacher_NV = make(3, 70, torch.float32, device)
    check(ops, student_NV.bfloat16(), teacher_NV)
    check(ops, student_NV, teacher_NV.half())


@pytest.mark.parametrize("tile", [4, 16])
def test_tiles_change_nothing(ops, device, tile, monkeypatch):
    monkeypatch.setattr(ops, "INTERPRETED_TILE", tile)
    logits = make(4, 37, torch.float32, device)
    check(ops, *logits)
    for leaf in logits:
        for descending in (False, True):  # each tile brings a larger maximum of this one, or only the first does
            order_NV = leaf.argsort(-1, descending=descending)
            check(ops, *(v.gather(1, order_NV) for v in logits))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_may_lie_beyond_2_to_31_elements():
    student_NV, teacher_NV = make(3, 37, torch.bfloat16, "cuda")
    wide = torch.empty(2_400_000_100, dtype=torch.bfloat16, device="cuda")
    far_NV = wide.as_strided((3, 37), (1_200_000_000, 1))
    far_NV.copy_(student_NV)
    with decorated(interpret=False) as ops:
        wanted, *wanted_grads = run(ops.soft_cross_entropy, student_NV, teacher_NV, upstream=1.0)
        teacher_NV.requires_grad_()
        loss = ops.soft_cross_entropy(far_NV.requires_grad_(), teacher_NV)
        grads = torch.autograd.grad(loss.total, (far_NV, teacher_NV))
    check_close(loss.total, wanted.total, TOLERANCE[torch.float32])
    for got, wanted_grad in zip(grads, wanted_grads, strict=True):
        check_close(got, wanted_grad, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("upstream", [1.0, -2.5, 1e4])
def test_the_incoming_gradient_is_a_factor(ops, device, upstream):
    check(ops, *make(3, 37, torch.float32, device), upstream=upstream)


def test_equal_logits_have_the_lowest_index(ops, device, monkeypatch):
    monkeypatch.setattr(ops, "INTERPRETED_TILE", 2)
    student_NV = torch.tensor([[0.0, 0, 1, 1, 1]] * 4, device=device)
    teacher_NV = torch.tensor([[0.0, 0, 2, 2, 0], [0, 0, 2, 0, 2], [0, 0, 0, 2, 2], [0, 0, 0, 0, 2]], device=device)
    assert int(ops.soft_cross_entropy(student_NV, teacher_NV).correct) == 2


# -- the limits of numbers ---------------------------------------------------------------------------------------------

INF, NAN = math.inf, math.nan
LIMITS = {
    "large, apart": ([1e4, 0], [0, 1e4], 1e4),
    "large, together": ([1e4, 1e4], [1e4, 0], math.log(2)),
    "huge, apart": ([1e30, -1e30], [-1e30, 1e30], 2e30),
    "huge, together": ([1e30, 1e30, -1e30], [1e30, -1e30, -1e30], math.log(2)),
    "both -inf": ([0, -INF, 0], [0, -INF, 0], math.log(2)),
    "both -inf, first": ([-INF, -INF, 0, 0], [-INF, -INF, 0, 0], math.log(2)),
    "teacher -inf": ([0, 0, 0], [0, -INF, 0], math.log(3)),
    "student -inf, teacher 0": ([-INF, 0, 0], [-1e4, 0, 0], math.log(2)),
    "student -inf, teacher 0 last": ([0, 0, -INF], [0, 0, -1e4], math.log(2)),
    "student -inf, teacher masked": ([-INF, 0, 0], [LOWEST, 0, 0], math.log(2)),
    "student masked, teacher masked": ([LOWEST, LOWEST, 0, 0], [LOWEST, LOWEST, 0, 0], math.log(2)),
    "student masked, teacher -inf": ([0, LOWEST, LOWEST, 0], [0, -INF, -INF, 0], math.log(2)),
    "student -inf, teacher fades": ([-INF, 0, 0], [-160, -80, 0], math.log(2)),
    "further apart than fp32 goes": ([LOWEST, 3e38], [-INF, 0], 0.0),
    "only masks": ([LOWEST, LOWEST], [LOWEST, LOWEST], math.log(2)),
    "student -inf, teacher not": ([-INF, 0, 0], [0, 0, 0], INF),
    "student -inf, teacher not, last": ([0, 0, -INF], [0, 0, -20], INF),
    "student nothing": ([-INF, -INF], [0, 0], NAN),
    "teacher nothing": ([0, 0], [-INF, -INF], NAN),
    "student +inf": ([0, INF, 0], [0, 0, 0], NAN),
    "teacher +inf": ([0, 0, 0], [0, INF, 0], NAN),
    "student NaN": ([0, NAN, 0], [0, 0, 0], NAN),
    "teacher NaN": ([0, 0, 0], [0, NAN, -INF], NAN),
}


@pytest.mark.parametrize("tile", [1, 64])
@pytest.mark.parametrize("name", LIMITS)
def test_limits(ops, device, name, tile, monkeypatch):
    monkeypatch.setattr(ops, "INTERPRETED_TILE", tile)
    *logits, wanted = LIMITS[name]
    student_NV, teacher_NV = (torch.tensor([row], device=device, dtype=torch.float32) for row in logits)
    for function in (ops.soft_cross_entropy, ops.naive_soft_cross_entropy):
        loss, grad_student_NV, grad_teacher_NV = run(function, student_NV, teacher_NV, upstream=1.0)
        assert loss.total.item() == pytest.approx(wanted, rel=1e-6, nan_ok=True)
        if not math.isnan(wanted):
            p_NV, q_NV = student_NV.softmax(-1), teacher_NV.softmax(-1)
            assert torch.allclose(grad_student_NV, p_NV - q_NV, atol=1e-6)
        if math.isfinite(wanted):
            cost_NV = torch.where(q_NV > 0, -student_NV.log_softmax(-1), 0.0)
            assert torch.allclose(grad_teacher_NV, q_NV * (cost_NV - wanted), rtol=1e-6, atol=1e-6)


# -- rows and layouts --------------------------------------------------------------------------------------------------


def test_rows_that_do_not_count_are_not_read(ops, device):
    student_NV, teacher_NV = make(7, 37, torch.float32, device)
    labels_N = torch.tensor([3, IGNORE_INDEX, 5, 0, IGNORE_INDEX, 36, 1], device=device)
    check(ops, student_NV, teacher_NV, labels_N)
    check(ops, student_NV, teacher_NV, labels_N != IGNORE_INDEX)
    wanted, *wanted_grads = run(ops.soft_cross_entropy, student_NV, teacher_NV, labels_N=labels_N)
    ignored_N = labels_N == IGNORE_INDEX
    poisoned = (v.masked_fill(ignored_N[:, None], NAN) for v in (student_NV, teacher_NV))
    loss, *grads = run(ops.soft_cross_entropy, *poisoned, labels_N=labels_N)
    assert torch.equal(loss.total, wanted.total) and int(loss.count) == 5
    for got, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert torch.equal(got, wanted_grad) and not got[ignored_N].any()


@pytest.mark.parametrize("N", [0, 3])
def test_no_counted_row_is_zero(ops, device, N):
    labels_N = torch.full((N,), IGNORE_INDEX, device=device)
    loss, *grads = run(ops.soft_cross_entropy, *make(N, 5, torch.float32, device), labels_N=labels_N)
    assert (loss.total.item(), int(loss.count), int(loss.correct)) == (0.0, 0, 0)
    assert all(grad.shape == (N, 5) and not grad.any() for grad in grads)


def test_layouts(ops, device):
    student_NV, teacher_NV = make(6, 40, torch.float32, device)
    wanted = run(ops.soft_cross_entropy, student_NV, teacher_NV)[1:]

    def apart(v: Tensor) -> Tensor:
        return torch.stack([v, v + 1], dim=1).flatten(0, 1)[::2]  # rows two rows apart

    def transposed(v: Tensor) -> Tensor:
        return v.t().contiguous().t()

    def sparse(v: Tensor) -> Tensor:
        return torch.stack([v, v + 1], dim=2).flatten(1)[:, ::2]

    for change in (apart, transposed, sparse):
        for inplace in (False, True):
            leaves = [v.clone().requires_grad_() for v in (student_NV, teacher_NV)]
            student, teacher = map(change, leaves)
            assert not student.is_contiguous()
            (0.37 * ops.soft_cross_entropy(student, teacher, inplace=inplace).total).backward()
            for leaf, grad in zip(leaves, wanted, strict=True):
                check_close(leaf.grad, grad, 1e-6)
    # one row of logits for all: the kernels may read it many times but not write it
    leaves = [v[:1].clone().requires_grad_() for v in (student_NV, teacher_NV)]
    ops.soft_cross_entropy(*(v.expand(6, 40) for v in leaves), inplace=True).total.backward()
    one = run(ops.soft_cross_entropy, student_NV[:1], teacher_NV[:1], upstream=6.0)[1:]
    for leaf, grad in zip(leaves, one, strict=True):
        check_close(leaf.grad, grad, 1e-6)


def test_gradients_only_where_they_are_wanted(ops, device):
    student_NV, teacher_NV = make(3, 37, torch.float32, device)
    _, *wanted = run(ops.soft_cross_entropy, student_NV, teacher_NV, upstream=1.0)
    for which in (0, 1):
        leaves = [student_NV.clone(), teacher_NV.clone()]
        leaves[which].requires_grad_()
        ops.soft_cross_entropy(*leaves).total.backward()
        check_close(leaves[which].grad, wanted[which], TOLERANCE[torch.float32])
        assert leaves[1 - which].grad is None
    assert not ops.soft_cross_entropy(student_NV, teacher_NV).total.requires_grad
    with torch.no_grad():
        assert not ops.soft_cross_entropy(student_NV.requires_grad_(), teacher_NV).total.requires_grad


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_writes_over_the_logits(ops, device, dtype):
    student_NV, teacher_NV = make(4, 37, dtype, device)
    _, wanted, _ = run(ops.soft_cross_entropy, student_NV, teacher_NV, upstream=1.0)
    leaf = student_NV.clone().requires_grad_()
    logits_NV = leaf * 1  # what a head gives: no leaf
    arrived = []
    logits_NV.register_hook(lambda grad: arrived.append(grad.data_ptr()))
    loss = ops.soft_cross_entropy(logits_NV, teacher_NV, inplace=True)
    loss.total.backward(retain_graph=True)
    check_close(leaf.grad, wanted, TOLERANCE[dtype])
    assert torch.equal(logits_NV, leaf.grad)
    assert arrived == [logits_NV.data_ptr()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.total.backward()


def test_inplace_is_told_to_who_needs_the_logits(ops, device):
    student_NV, teacher_NV = make(4, 37, torch.float32, device)
    capped_NV = student_NV.requires_grad_().tanh()  # its own backward pass reads its result
    loss = ops.soft_cross_entropy(capped_NV, teacher_NV, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.total.backward()


def test_only_the_logits_and_five_numbers_a_row_are_kept(ops, device):
    student_NV, teacher_NV = (v.requires_grad_() for v in make(4, 64, torch.bfloat16, device))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        ops.soft_cross_entropy(student_NV, teacher_NV)
    pointers = {student_NV.data_ptr(), teacher_NV.data_ptr()}
    assert {v.data_ptr() for v in kept} >= pointers
    assert sum(v.numel() for v in kept if v.data_ptr() not in pointers) == 5 * 4


# -- a chunk of linear_loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ce", "kl"])
@pytest.mark.parametrize("shared", [False, True])
def test_teacher_chunk(ops, device, kind, shared, monkeypatch):
    monkeypatch.setattr(ops, "INTERPRETED_TILE", 32)
    C, M = 9, 83
    x_CM, t_UM = make(C, M, torch.float32, device)
    owner_C = None
    if shared:
        owner_C = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 4], device=device)
        t_UM = t_UM[:5]
    high_CM = x_CM.double().requires_grad_()
    t_CM = (t_UM if owner_C is None else t_UM[owner_C]).double()
    wanted_C = high_CM.logsumexp(-1) - (t_CM.softmax(-1) * high_CM).sum(-1)
    if kind == "kl":
        wanted_C = wanted_C + (t_CM.softmax(-1) * t_CM.log_softmax(-1)).sum(-1)
    wanted_C.sum().backward()
    wanted_right_C = x_CM.argmax(-1) == t_CM.argmax(-1)
    teacher_before_UM = t_UM.clone()
    loss_C, grad_CM, right_C = ops.teacher_chunk(x_CM, t_UM, owner_C, kind)
    # kl is a difference: it is as exact as the cross-entropy that it is made from
    check_close(loss_C, wanted_C, TOLERANCE[torch.float32] * (10 if kind == "kl" else 1))
    check_close(grad_CM, high_CM.grad, TOLERANCE[torch.float32])
    assert torch.equal(right_C, wanted_right_C) and right_C.dtype == torch.bool
    assert grad_CM is x_CM and torch.equal(t_UM, teacher_before_UM)


def test_a_chunk_that_equals_its_teacher_has_no_divergence(ops, device):
    x_CM, _ = make(4, 83, torch.float32, device)
    loss_C, grad_CM, right_C = ops.teacher_chunk(x_CM, x_CM.clone(), None, "kl")
    assert loss_C.abs().max() < 1e-6 and grad_CM.abs().max() < 1e-6 and right_C.all()


# -- the gate can fail -------------------------------------------------------------------------------------------------

WRONG = {
    "zeros": lambda v: torch.zeros_like(v),
    "flipped sign": lambda v: -v,
    "factor of two": lambda v: 2 * v,
    "shifted label": lambda v: v.roll(1, -1),
    "shifted row": lambda v: v.roll(1, 0),
    "one row missing": lambda v: torch.cat([v[:-1], torch.zeros_like(v[-1:])]),
    "NaN": lambda v: torch.where(v == v.max(), NAN, v),
    "one percent": lambda v: 1.01 * v,
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("leaf", [0, 1])
@pytest.mark.parametrize("name", WRONG)
def test_the_comparison_rejects(name, leaf, dtype):
    twin = load("losses_triton_twin").naive_soft_cross_entropy

    def wrong(student_NV: Tensor, teacher_NV: Tensor, **kwargs: Any) -> LossSum:
        (student_NV, teacher_NV)[leaf].register_hook(WRONG[name])
        return twin(student_NV, teacher_NV, **kwargs)

    logits = make(5, 37, dtype, "cpu")
    fake = ModuleType("fake")
    fake.naive_soft_cross_entropy = fake.soft_cross_entropy = twin
    check(fake, *logits)
    fake.soft_cross_entropy = wrong
    with pytest.raises(AssertionError):
        check(fake, *logits)


@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0, 1.0 + 1e-5])
def test_the_comparison_rejects_a_wrong_value(factor):
    twin = load("losses_triton_twin").naive_soft_cross_entropy

    def wrong(*args: Any, **kwargs: Any) -> LossSum:
        loss = twin(*args, **kwargs)
        # the gradient stays right
        return LossSum(loss.total + (factor - 1) * loss.total.detach(), loss.count, loss.correct)

    fake = ModuleType("fake")
    fake.naive_soft_cross_entropy, fake.soft_cross_entropy = twin, wrong
    with pytest.raises(AssertionError, match="off by"):
        check(fake, *make(5, 37, torch.float32, "cpu"))


# -- where it runs -----------------------------------------------------------------------------------------------------


def test_without_triton_the_twin_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    module = load("losses_triton_without")
    assert not module.available("cpu") and not module.available("cuda")
    logits = make(3, 5, torch.float32, "cpu")
    assert module.naive_soft_cross_entropy(*logits).total > 0
    with pytest.raises(ValueError, match=r"got logits on cpu, wanted a GPU .*: naive_soft_cross_entropy runs anywhere"):
        module.soft_cross_entropy(*logits)


@needs_triton
def test_without_the_interpreter_only_a_gpu_will_do():
    with decorated(interpret=False) as module:
        assert not module.available("cpu") and module.available("cuda") and module.available(torch.device("cuda:1"))
        with pytest.raises(ValueError, match="wanted a GPU"):
            module.soft_cross_entropy(*make(3, 5, torch.float32, "cpu"))


@needs_triton
@pytest.mark.parametrize("logits", ["*fp32", "*bf16", "*fp16"])
def test_the_kernels_compile_for_a_gpu(logits, tmp_path, monkeypatch):
    """Without one: the interpreter lets through what the compiler does not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(
        "TRITON_DEFAULT_FP_FUSION", "1"
    )  # its default until now; unset, Triton warns that it will change
    types = {"source_ptr": "*i64", "stats_ptr": "*fp32", "loss_ptr": "*fp32", "right_ptr": "*i32", "scale_ptr": "*fp32"}
    types |= dict.fromkeys(("x_ptr", "t_ptr", "grad_x_ptr", "grad_t_ptr"), logits)
    types |= dict.fromkeys(("V", "x_stride", "t_stride", "grad_x_stride", "grad_t_stride"), "i32")
    with decorated(interpret=False) as module:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        for kernel, constants in (
            (module._loss_kernel, {"KL": False, "TILE": 2048}),
            (module._loss_kernel, {"KL": True, "TILE": 2048, "source_ptr": None}),
            (module._gradient_kernel, {"TILE": 2048}),
            (module._gradient_kernel, {"TILE": 2048} | dict.fromkeys(("source_ptr", "scale_ptr", "grad_t_ptr"))),
        ):
            signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
            source = ASTSource(kernel, signature, constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
            assert len(compiled.asm["cubin"]) > 1000
        kernel = module._tuned_loss_kernel
        assert {config.kwargs["TILE"] for config in kernel.configs} and set(kernel.keys) <= set(kernel.arg_names)


@needs_triton
def test_the_interpreter_leaves_no_trace():
    before, variable = tritons(), os.environ.get("TRITON_INTERPRET")
    with decorated(interpret=True) as module:
        assert module.available("cpu") and os.environ["TRITON_INTERPRET"] == "1"
        assert not set(map(id, tritons().values())) & set(map(id, before.values()))
    assert tritons() == before and os.environ.get("TRITON_INTERPRET") == variable


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_NV": torch.zeros(2, 3, 5)}, r"student_NV: got shape \(2, 3, 5\), wanted \[N, V\]: flatten"),
        ({"teacher_NV": torch.zeros(3, 6)}, r"teacher_NV: got shape \(3, 6\), wanted the student's \(3, 5\)"),
        ({"labels_N": torch.zeros(4, dtype=torch.long)}, r"labels_N: got shape \(4,\), wanted \(3,\): one a row"),
        ({"student_NV": torch.zeros(3, 5).long()}, "student_NV: got torch.int64, wanted one of torch.float32"),
        ({"student_NV": torch.zeros(3, 5, requires_grad=True), "inplace": True}, "student_NV, a leaf: pass inplace=F"),
        ({"labels_N": torch.zeros(4), "teacher_NV": torch.zeros(2, 5)}, r"teacher_NV: .*; labels_N: "),
    ],
)
def test_bad_input_is_refused(change, message):
    module = load("losses_triton_checks")
    kwargs = {"student_NV": torch.zeros(3, 5), "teacher_NV": torch.zeros(3, 5)} | change
    for function in (module.soft_cross_entropy, module.naive_soft_cross_entropy):
        with pytest.raises(ValueError, match=message):
            function(**kwargs)


def test_fp64_is_for_the_twin():
    module = load("losses_triton_checks")
    logits = (torch.randn(3, 5).double(), torch.randn(3, 5).double())
    assert module.naive_soft_cross_entropy(*logits).total.dtype == torch.float64
    with pytest.raises(ValueError, match="got torch.float64, wanted one of torch.float32, torch.bfloat16"):
        module.soft_cross_entropy(*logits)
