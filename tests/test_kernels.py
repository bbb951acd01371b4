"""Which kernel runs is what was measured: a wrong file, a wrong kernel and a slow copy have no say."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model
from torch import Tensor, nn

from foretell.models import fast, kernels
from foretell.models.attention import RowMasks
from foretell.models.fast import fast_view
from foretell.models.kernels import PLAIN, ROWS, Measured, choose, settle
from foretell.models.linears import (
    BYTES,
    DOUBLED,
    HALF,
    INT8,
    PACKED,
    TRANSPOSED,
    FusedRMSNorm,
    PackedLinear,
    fused_norm,
)

CLOCK = kernels.seconds_of
packable = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="nothing is packed without oneDNN")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Nothing is known yet."""
    monkeypatch.setenv("FORETELL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FORETELL_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "_known", {})
    monkeypatch.setattr(kernels, "seconds_of", CLOCK)
    return tmp_path / "cache"


def linear(outs: tuple[int, ...] = (24, 16), bias: bool = False, dtype: torch.dtype = torch.float32) -> PackedLinear:
    torch.manual_seed(0)
    return PackedLinear.of(*(nn.Linear(32, out, bias=bias, dtype=dtype) for out in outs))


def taking(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, list[float]]) -> list[str]:
    """A clock that says of each kernel at each of ROWS what stands there; the kernels it was asked about."""
    asked: list[str] = []

    def fake(part: Measured, kernel: str, x: Tensor) -> float:
        asked.append(kernel)
        return seconds[kernel][ROWS.index(len(x))]

    monkeypatch.setattr(kernels, "seconds_of", fake)
    return asked


FLAT, FEW = [1.0] * 8, [1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 4.0, 4.0]
MACHINES = {
    "packed wins": ({PLAIN: [2.0] * 8, PACKED: FLAT, TRANSPOSED: [1.5] * 8}, [PACKED] * 8),
    "packed from four rows": ({PLAIN: FEW, PACKED: [1.5] * 8, TRANSPOSED: FEW}, [PLAIN] * 3 + [PACKED] * 5),
    "transposed for few": (
        {PLAIN: [2.0] * 3 + [1.0] * 5, PACKED: [3.0] * 8, TRANSPOSED: [1.0] * 3 + [2.0] * 5},
        [TRANSPOSED] * 3 + [PLAIN] * 5,
    ),
    # each copy wins somewhere; one alone is kept
    "two copies would pay": (
        {PLAIN: [3.0] * 8, PACKED: [1.1] + [1.0] * 7, TRANSPOSED: [1.0] + [3.0] * 7},
        [PACKED] * 8,
    ),
    "no copy pays": ({PLAIN: FLAT, PACKED: [1.1] * 8, TRANSPOSED: [1.2] * 8}, [PLAIN] * 8),
    "a copy that hardly pays": ({PLAIN: FLAT, PACKED: [0.98] * 8, TRANSPOSED: FLAT}, [PLAIN] * 8),
}


@packable
@pytest.mark.parametrize("name", MACHINES)
def test_the_kernel_is_the_one_that_was_fastest(monkeypatch, name):
    seconds, wanted = MACHINES[name]
    assert choose(seconds) == wanted
    taking(monkeypatch, seconds)
    product = linear()
    settle(nn.ModuleList([product]))
    assert [product.kernel(rows) for rows in ROWS] == wanted
    assert set(product.kept) == set(wanted) - {PLAIN}, "no copy that no number of rows uses"
    assert [product.kernel(rows) for rows in (5, 9, 1000)] == [wanted[4], wanted[5], wanted[7]]
    x = torch.randn(3, 32)
    ran = []
    monkeypatch.setattr(PackedLinear, "run", lambda self, kernel, x: ran.append(kernel))
    product(x)
    assert ran == [wanted[2]], "what was chosen is what runs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_all_kernels_compute_the_same(dtype, bias):
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for outs in ((24,), (24, 16)):
        product = linear(outs, bias, dtype)
        weight = torch.cat(product.weights)
        for kernel in product.kernels:
            assert product.keep(kernel) or not torch.backends.mkldnn.is_available()
        for kernel in (PLAIN, *product.kept):
            product._by_rows = [kernel] * 65
            for rows in (*range(1, 18), 31, 32, 33, 63, 64, 65):
                for shape in ((rows, 32), (1, rows, 32)):
                    x, residual = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], sum(outs)).to(dtype)
                    wanted = F.linear(x, weight, product.bias)
                    torch.testing.assert_close(product(x), wanted, **near)
                    torch.testing.assert_close(product.plus(x, residual), residual + wanted, **near)
                    assert float((product(x) - wanted.roll(1, -1)).abs().max()) > 0.1


WRONG = {
    "transposed": lambda weight: weight.t().contiguous(),
    "zero": torch.zeros_like,
    "doubled": lambda weight: 2 * weight,
}


@packable
@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch, name):
    made = PackedLinear.prepare

    def prepare(self: PackedLinear, kernel: str) -> Tensor:
        true, self.weights = self.weights, [WRONG[name](torch.cat(self.weights))]
        try:
            return made(self, kernel)
        finally:
            self.weights = true

    taking(monkeypatch, {PLAIN: [9.0] * 8, PACKED: FLAT, TRANSPOSED: FLAT})
    good, bad = linear((32,)), linear((32,))
    settle(nn.ModuleList([good]))
    assert PACKED in good.kept
    monkeypatch.setattr(PackedLinear, "prepare", prepare)
    with pytest.warns(UserWarning, match="computes something else"):
        settle(nn.ModuleList([bad]))  # chosen before, on disk: not even then
    other = linear((32,), bias=True)
    settle(nn.ModuleList([other]))  # or while it is measured
    for product in (bad, other):
        assert not product.kept and product.kernel(8) == PLAIN
        x = torch.randn(8, 32)
        assert torch.equal(product(x), F.linear(x, product.weight, product.bias))


def test_a_kernel_that_the_machine_has_not_is_not_used(monkeypatch):
    def none(self: PackedLinear, kernel: str) -> Tensor:
        raise RuntimeError("not built with it")

    monkeypatch.setattr(PackedLinear, "prepare", none)
    product = linear()
    settle(nn.ModuleList([product]))
    assert not product.kept and [product.kernel(rows) for rows in ROWS] == [PLAIN] * 8


# -- the file ----------------------------------------------------------------------------------------------------------


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process begins."""
    monkeypatch.setattr(kernels, "_known", {})


def settled(**settings: Any) -> list[str]:
    product = linear(**settings)
    settle(nn.ModuleList([product]))
    return [product.kernel(rows) for rows in ROWS]


@packable
def test_measured_once_a_machine(monkeypatch, folder):
    asked = taking(monkeypatch, MACHINES["packed from four rows"][0])
    first = settled()
    assert set(asked) == {PLAIN, PACKED, TRANSPOSED}
    asked.clear()
    taking(monkeypatch, MACHINES["transposed for few"][0])
    assert settled() == first and not asked, "the same in one process, whatever a clock would say now"
    forget(monkeypatch)
    assert settled() == first and not asked, "and in the next one"
    (file,) = folder.iterdir()
    kept = json.loads(file.read_text())
    assert kept["machine"]["threads"] == 1 and kept["machine"]["torch"] == torch.__version__
    assert list(kept["kernels"]) == ["linear 32 -> 24+16 torch.float32"]
    asked = taking(monkeypatch, MACHINES["transposed for few"][0])
    assert settled(bias=True) != first and asked, "another shape is measured, what is known is not"
    assert len(json.loads(file.read_text())["kernels"]) == 2


@packable
def test_other_threads_and_versions_are_another_machine(monkeypatch, folder):
    taking(monkeypatch, MACHINES["packed from four rows"][0])
    first = settled()
    asked = taking(monkeypatch, MACHINES["transposed for few"][0])
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert settled() != first and asked
    monkeypatch.undo()
    monkeypatch.setenv("FORETELL_CACHE", str(folder))
    assert len(list(folder.iterdir())) == 2


def other_machine(text: str) -> str:
    found = json.loads(text)
    found["machine"]["cpu"] = "another"
    return json.dumps(found)


def with_entry(value: Any) -> Any:
    def change(text: str) -> str:
        found = json.loads(text)
        for one in found["kernels"].values():
            one["value"] = value
        return json.dumps(found)

    return change


DAMAGED = {
    "torn": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "binary": lambda text: "\x00\x00",
    "of another machine": other_machine,
    "a list": lambda text: "[]",
    "no machine": lambda text: "{}",
    "sections that are none": lambda text: json.dumps(json.loads(text) | {"kernels": 3}),
    "an unknown kernel": with_entry(["fastest"] * 8),
    "too few rows": with_entry([PACKED] * 3),
    "a number": with_entry(3),
    "lists of lists": with_entry([[PLAIN]] * 8),
    "not said how busy": lambda text: text.replace('"lost"', '"cost"'),
    "two copies": with_entry([TRANSPOSED] + [PACKED] * 7),
}


@packable
@pytest.mark.parametrize("name", DAMAGED)
def test_a_wrong_file_is_measured_again_and_said_once(monkeypatch, folder, name):
    taking(monkeypatch, MACHINES["packed wins"][0])
    assert settled() == [PACKED] * 8
    (file,) = folder.iterdir()
    file.write_text(DAMAGED[name](file.read_text()))
    forget(monkeypatch)
    taking(monkeypatch, MACHINES["packed from four rows"][0])
    with pytest.warns(UserWarning, match="measured again") as said:
        assert settled() == MACHINES["packed from four rows"][1]
    assert len(said) == 1
    forget(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settled() == MACHINES["packed from four rows"][1], "and the file is whole again"


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FORETELL_CACHE", str(tmp_path / "file" / "below"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settled() == settled()


def test_where_the_file_lies(monkeypatch):
    monkeypatch.delenv("FORETELL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert kernels.cache_folder() == Path("/elsewhere/foretell")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert kernels.cache_folder() == Path.home() / ".cache" / "foretell"


def test_plain_on_request(monkeypatch, folder):
    monkeypatch.setenv("FORETELL_KERNELS", "plain")
    view = fast_view(tiny_model())
    products = [module for module in view.modules() if isinstance(module, PackedLinear)]
    assert not any(product.kept for product in products) and not folder.exists()
    x = torch.randn(5, 32)
    for product in products:
        if product.in_features == 32:
            each = [F.linear(x, weight) for weight in product.weights]
            assert torch.equal(product(x), torch.cat(each, dim=-1))
    monkeypatch.setenv("FORETELL_KERNELS", "fast")
    with pytest.raises(ValueError, match="FORETELL_KERNELS: got 'fast', wanted 'plain'"):
        fast_view(tiny_model())


# -- a busy machine ----------------------------------------------------------------------------------------------------


def busy_clock(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, list[float]], seed: int = 0) -> list[str]:
    """As `taking`, but every other product waits for somebody else, ten times as long: a table of nonsense."""
    asked, dice = taking(monkeypatch, seconds), random.Random(seed)
    honest = kernels.seconds_of
    monkeypatch.setattr(kernels, "seconds_of", lambda *args: honest(*args) * dice.choice([1.0, 20 * dice.random()]))
    return asked


def entry(folder: Path) -> dict[str, Any]:
    (file,) = folder.iterdir()
    (found,) = json.loads(file.read_text())["kernels"].values()
    return found


def test_what_was_lost():
    quiet = [[1.0, 5.0], [1.05, 5.1], [1.0, 5.2]]
    assert 0 < kernels.lost(quiet) < 0.03 and kernels.lost([[1.0, 5.0]] * 3) == pytest.approx(0)
    assert kernels.lost([*quiet, [1.0, 26.0]]) > kernels.QUIET, "one wait as long as all the rest"
    halves = [[2.0, 2.0], [4.0, 2.0], [2.0, 4.0], [4.0, 4.0]]  # a core that is shared
    assert kernels.lost(halves) == pytest.approx(1 / 3) and kernels.QUIET < 1 / 3


@packable
def test_what_a_busy_machine_said_is_measured_again_and_replaced(monkeypatch, folder):
    now = [1000.0]
    monkeypatch.setattr(kernels.time, "time", lambda: now[0])
    right = MACHINES["packed from four rows"]
    busy_clock(monkeypatch, right[0])
    nonsense = settled()
    assert len(set(nonsense)) == 1, "a disturbed clock does not tell one number of rows from the next"
    assert entry(folder)["lost"] > kernels.QUIET
    asked = taking(monkeypatch, right[0])
    assert settled() == nonsense and not asked, "one process goes by one table"
    forget(monkeypatch)
    assert settled() == right[1] and asked, "the next one measures again"
    assert entry(folder)["lost"] == pytest.approx(0) and entry(folder)["times"] == 2
    forget(monkeypatch)
    now[0] += 1e9
    asked = taking(monkeypatch, MACHINES["transposed for few"][0])
    assert settled() == right[1] and not asked, "and what is quiet stays"


@packable
def test_a_machine_that_is_always_busy_measures_ever_more_rarely(monkeypatch, folder):
    now, starts = [1000.0], []
    monkeypatch.setattr(kernels.time, "time", lambda: now[0])
    least = None
    for start in range(400):
        forget(monkeypatch)
        now[0] += 60.0
        asked = busy_clock(monkeypatch, MACHINES["packed wins"][0], seed=start)
        table = settled()
        starts += [start] * bool(asked)
        least = entry(folder)["lost"] if least is None else least
        assert entry(folder)["lost"] <= least, "a louder measurement never takes a quieter one's place"
        least = entry(folder)["lost"]
        assert table == entry(folder)["value"]
    assert 3 <= len(starts) <= 6 and starts[:2] == [0, 1] and all(b - a > a for a, b in pairwise(starts[2:]))


@packable
def test_a_louder_table_does_not_replace_what_another_process_found(monkeypatch, folder):
    """Two processes measure at once; the quieter one was faster."""
    right = MACHINES["packed from four rows"]
    asked = busy_clock(monkeypatch, right[0])
    busy = kernels.seconds_of

    def other(*args: Any) -> float:
        if not asked:
            with monkeypatch.context() as patch:
                forget(patch)
                patch.setattr(kernels, "seconds_of", CLOCK)
                taking(patch, right[0])
                assert settled() == right[1]
        return busy(*args)

    monkeypatch.setattr(kernels, "seconds_of", other)
    settled()
    assert entry(folder)["value"] == right[1] and entry(folder)["lost"] == pytest.approx(0)


LOOP = "while True: pass"


def share_lost() -> float:
    torch.manual_seed(0)
    products = [PackedLinear.of(nn.Linear(512, 1024)) for _ in range(8)]
    return kernels.measure({products[0].key: products})[1]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="as many busy processes as there are cores")
def test_busy_processes_are_noticed_and_their_absence_too():
    cores = len(os.sched_getaffinity(0))
    others = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(cores)]
    try:
        time.sleep(0.2)
        assert share_lost() > kernels.QUIET
    finally:
        for process in others:
            process.kill()
            process.wait()
    before = os.sched_getscheduler(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # nobody else's work takes this thread's time
    except PermissionError:
        if os.getloadavg()[0] > cores / 2:
            pytest.skip("the machine is busy")
    try:
        assert min(share_lost() for _ in range(3)) <= kernels.QUIET
    finally:
        os.sched_setscheduler(0, before, os.sched_param(0))


# -- a model's view ----------------------------------------------------------------------------------------------------


@packable
@pytest.mark.parametrize("winner", [PACKED, TRANSPOSED, PLAIN])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt_neox"])
def test_one_copy_of_a_weight_at_most(monkeypatch, name, winner):
    seconds = {kernel: [9.0] * 8 for kernel in (PLAIN, PACKED, TRANSPOSED, DOUBLED)} | {winner: FLAT}
    taking(monkeypatch, seconds)
    model = tiny_model(name)
    state = torch.get_rng_state()
    view = fast_view(model)
    assert torch.equal(torch.get_rng_state(), state), "measuring draws nothing"
    copies = [kept.numel() for m in view.modules() if isinstance(m, PackedLinear) for kernel, kept in m.kept.items()]
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert sum(copies) == (0 if winner == PLAIN else linears)
    kinds = {kernel for m in view.modules() if isinstance(m, PackedLinear) for kernel in m.kept}
    assert kinds == {winner} - {PLAIN}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_norms_round_as_the_model_rounds(name, dtype):
    norm = tiny_model(name).to(dtype).model.norm
    with torch.no_grad():
        norm.weight.add_(torch.linspace(-0.3, 0.4, 32).to(dtype))
    fused = fused_norm(norm)
    assert fused.rounded == (dtype == torch.bfloat16 and name != "gemma2")
    fused.keep(DOUBLED)
    for rows in (1, 3, 64, 200):
        x = (3 * torch.randn(rows, 32)).to(dtype)
        wanted = norm(x)
        for kernel in (PLAIN, DOUBLED):
            got = fused.run(kernel, x)
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 2**-7)
            if dtype == torch.bfloat16:
                assert float((got != wanted).float().mean()) < 0.01
    if dtype == torch.bfloat16:  # the other order of roundings is seen
        other = FusedRMSNorm(norm.weight if name == "gemma2" else norm.weight.float(), fused.eps, not fused.rounded)
        assert float((other(x) != wanted).float().mean()) > 0.05


@packable
@pytest.mark.parametrize("winner", [PLAIN, PACKED])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_bf16_layer_rounds_as_the_model_rounds(monkeypatch, name, winner):
    taking(monkeypatch, dict.fromkeys((PLAIN, PACKED, TRANSPOSED, DOUBLED), [9.0] * 8) | {winner: FLAT})
    model = tiny_model(name, spread=1.5).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # norms of ones and biases of zeros would hide a wrong order
            if parameter.dim() == 1:
                parameter.add_(torch.linspace(-0.3, 0.4, len(parameter)).to(torch.bfloat16))
    layer, rotation, masks = model.model.layers[0], fast.Rotation(), RowMasks()
    fused, plain = fast._fused_layer(layer, rotation), fast.attending_copy(layer)
    settle(fused)
    assert isinstance(fused, fast.FusedLayer) and set(fused.o.kept) == {winner} - {PLAIN}
    masks.begin_text(torch.zeros(2, 7, dtype=torch.long))
    masks.hang_on(plain)
    masks.hang_on(fused)
    x_BRD, positions = torch.randn(2, 7, 32).bfloat16(), torch.arange(7).expand(2, 7)
    places = model.model.rotary_emb(x_BRD, positions)
    with torch.no_grad():
        wanted = plain(x_BRD, attention_mask=None, position_embeddings=places, position_ids=positions)
        got = fused(x_BRD, position_embeddings=places)
    assert float((got != wanted).float().mean()) < 0.01, "sums of products in another order change a few last bits"
    for norm in (fused.qkv.norm, fused.gate_up.norm):
        norm.rounded = False  # the other order of roundings is seen
    assert float((fused(x_BRD, position_embeddings=places) != wanted).float().mean()) > 0.03


def test_the_clock_itself():
    """Without a fake: every kernel is timed, and what comes out is a table of them."""
    product = linear((64, 64))
    names = settled()
    assert set(names) <= {PLAIN, *product.kernels}
    seconds = kernels.seconds_of(product, PLAIN, torch.ones(4, 32))
    assert 0 < seconds < 1


# -- weights that draft ------------------------------------------------------------------------------------------------


DRAFTING = {
    "each where it wins": (
        {PLAIN: [9.0] * 8, PACKED: [3.0] * 8, HALF: [2.0] * 8, INT8: [1.0] * 4 + [5.0] * 4, BYTES: [9.0] * 8},
        [INT8] * 4 + [HALF] * 4,
    ),
    "bytes win": ({PLAIN: [4.0] * 8, PACKED: [3.0] * 8, HALF: [2.0] * 8, INT8: [2.0] * 8, BYTES: FLAT}, [BYTES] * 8),
    "narrow weights lose": (
        {PLAIN: [4.0] * 8, PACKED: FLAT, HALF: [2.0] * 8, INT8: [3.0] * 8, BYTES: [2.0] * 8},
        [PACKED] * 8,
    ),
    "nothing wins": (
        {PLAIN: FLAT, PACKED: [1.1] * 8, HALF: [1.2] * 8, INT8: [1.1] * 8, BYTES: [1.2] * 8},
        [PLAIN] * 8,
    ),
}


@packable
@pytest.mark.parametrize("name", DRAFTING)
def test_what_drafts_has_the_weights_that_were_fastest(monkeypatch, name):
    seconds, wanted = DRAFTING[name]
    taking(monkeypatch, seconds)
    product = fast_view(nn.Sequential(nn.Linear(64, 128)), "auto")[0]
    assert product.names == wanted
    assert set(product.kept) == set(wanted) - {PLAIN}


@packable
@pytest.mark.parametrize("dtype", [HALF, INT8])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_narrow_weights_give_the_products_to_their_own_precision(dtype, weights):
    torch.manual_seed(0)
    plain = nn.Linear(128, 64, dtype=weights)
    product = fast_view(nn.Sequential(plain), dtype)[0]
    x_BRD, residual_BRO = torch.randn(2, 3, 128, dtype=weights), torch.randn(2, 3, 64, dtype=weights)
    wanted_BRO, got_BRO = plain(x_BRD), product(x_BRD)
    assert got_BRO.dtype == weights and got_BRO.shape == wanted_BRO.shape
    off, size = (got_BRO - wanted_BRO).float().abs(), wanted_BRO.float().abs().max()
    # a number is off by up to half a step of 1 / 127 of the largest (rows: of 1 / 63), or by 2^-9 of itself; sums of
    # 128 average it
    assert off.max() < (0.04 if dtype == INT8 else 0.01) * size
    if dtype != str(weights).removeprefix("torch."):
        kernel = BYTES if dtype == INT8 else dtype
        assert product.names == [kernel] * len(ROWS) and set(product.kept) == {kernel}
        assert off.max() > 0, "other weights round otherwise"
    torch.testing.assert_close(product.plus(x_BRD, residual_BRO), residual_BRO + got_BRO)


@packable
def test_rows_of_no_numbers_are_no_error():
    product = fast_view(nn.Sequential(nn.Linear(64, 64)), INT8)[0]
    for value in (torch.nan, torch.inf):
        assert not product(torch.full((1, 2, 64), value)).isfinite().any()
    some = torch.zeros(2, 64)
    some[0, 3] = torch.nan
    assert product(some).shape == (2, 64) and product(torch.zeros(0, 64)).shape == (0, 64)


@packable
def test_a_narrow_kernel_that_is_wrong_here_is_not_used(monkeypatch):
    honest = PackedLinear.run
    taking(monkeypatch, dict.fromkeys((PLAIN, PACKED, HALF), FLAT))
    for wrong, used in (((BYTES,), INT8), ((BYTES, INT8), PLAIN)):
        monkeypatch.setattr(
            PackedLinear, "run", lambda self, kernel, x, w=wrong: honest(self, kernel, x) * (1 + (kernel in w))
        )
        with pytest.warns(UserWarning, match="int8 rows.*not used"):
            product = fast_view(nn.Sequential(nn.Linear(64, 64)), INT8)[0]
        assert product.names == [used] * len(ROWS)


@packable
def test_int8_rows_where_this_torch_has_none(monkeypatch):
    """torch means to give its quantized tensors up."""
    monkeypatch.delattr(torch, "_make_per_channel_quantized_tensor")
    with pytest.warns(UserWarning, match="int8 rows.*not used"):
        assert fast_view(nn.Sequential(nn.Linear(64, 64)), INT8)[0].names == [INT8] * len(ROWS)
    taking(monkeypatch, {PLAIN: [4.0] * 8, PACKED: [3.0] * 8, HALF: FLAT, INT8: [2.0] * 8, BYTES: [0.1] * 8})
    assert fast_view(nn.Sequential(nn.Linear(64, 128)), "auto")[0].names == [HALF] * len(ROWS)


@packable
@pytest.mark.parametrize(("width", "out"), [(96, 64), (64, 40), (8, 8)])
def test_int8_is_for_whole_vectors_only(monkeypatch, width, out):
    """torch's kernel does not ask for the sizes that it can do; it is never called with others."""
    called = []
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *args: called.append(1))
    taking(monkeypatch, {PLAIN: [4.0] * 8, PACKED: [3.0] * 8, HALF: FLAT, INT8: [0.1] * 8, BYTES: [2.0] * 8})
    found = fast_view(nn.Sequential(nn.Linear(width, out)), "auto")[0]
    assert not called and found.names == [HALF] * len(ROWS)
    asked = fast_view(nn.Sequential(nn.Linear(width, out)), INT8)[0]
    assert not called and asked.names == [BYTES] * len(ROWS)


@packable
def test_weights_that_are_too_coarse_in_int8_are_drafted_with_in_others(monkeypatch):
    taking(monkeypatch, {PLAIN: [4.0] * 8, PACKED: [3.0] * 8, HALF: FLAT, INT8: FLAT})
    fusion = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        fusion.weight.mul_(0.05)
        fusion.weight[:, 25] = 3.0  # steps of int8 are larger than all others; the probe hardly sees it
    with pytest.warns(UserWarning, match="int8.*not used"):
        product = fast_view(nn.Sequential(fusion), INT8)[0]
    assert product.names == [HALF] * len(ROWS)
