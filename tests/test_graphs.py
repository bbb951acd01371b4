"""Steps of static shape give the tokens of ordinary ones, read their buffers only, and never wait for a number."""

# B sequences, R rows of a step.

from __future__ import annotations

import gc

import pytest
import torch
from drafters import Branching, knowing_mtp, leaning_model
from test_decode import BATCHES, prompts, reference, run, texts
from tiny import ARCHITECTURES, tiny_model
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from foretell.models.graphs import COLUMNS, MOST_ROWS, StaticSteps
from foretell.models.slot_cache import SlotCache
from foretell.models.target import Target

RECORDABLE = [name for name in ARCHITECTURES if name not in ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe")]


def static_mtp(name: str = "llama"):
    mtp = knowing_mtp(leaning_model(name))
    mtp.target.view()
    mtp.target.static = StaticSteps(mtp.target.forward_static, replayed=False)
    return mtp


def steps_of(target: Target) -> dict:
    """Those that were recorded for the one cache there is."""
    ((_, steps),) = target.static._of.values()
    return steps


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("drafter", ["off", "mtp+lookup", "tree"])
def test_greedy_is_transformers_own(batch, drafter):
    (inputs, slots, _), mtp = BATCHES[batch], static_mtp()
    wanted = reference(leaning_model("llama"), inputs, max_new_tokens=20)
    proposer = {"off": "mtp", "tree": Branching(texts(inputs, wanted))}.get(drafter, drafter)
    out = run(
        mtp, inputs, max_new_tokens=20, num_draft_tokens=0 if drafter == "off" else 3, drafter=proposer, slots=slots
    )
    assert out.sequences.tolist() == wanted.tolist()
    assert mtp.target.static is not None and len(steps_of(mtp.target)) >= 1


@pytest.mark.parametrize("name", RECORDABLE)
def test_architectures(name):
    inputs, mtp = prompts(11, 6, 14), static_mtp(name)
    assert mtp.target._can_be_recorded()
    out = run(mtp, inputs, max_new_tokens=12)
    assert out.sequences.tolist() == reference(leaning_model(name), inputs, max_new_tokens=12).tolist()


def test_shapes_are_few():
    mtp = static_mtp()
    for lengths in ((12, 12, 12, 12), (9,), (5, 7, 12), (8, 9)):  # the largest first: its cache serves all
        run(mtp, prompts(*lengths), max_new_tokens=20, num_draft_tokens=0, slots=4)
    steps = steps_of(mtp.target)
    with mtp.workspace() as space:
        capacity = space.cache.capacity
    # one row a sequence after the prompts; sequences rounded up to 1, 2, 4
    assert {key[0] for key in steps if key[1] == 1} == {1, 2, 4}
    assert all(key[2] % COLUMNS == 0 or key[2] == capacity for key in steps)


def test_large_steps_are_not_recorded():
    steps = StaticSteps(lambda *_: None, replayed=False)
    assert steps.takes(1, 1) and steps.takes(MOST_ROWS // 4, 4) and not steps.takes(MOST_ROWS, 2)


def test_another_cache_starts_anew():
    target = Target(tiny_model())
    target.view()
    target.static = StaticSteps(target.forward_static, replayed=False)
    ids, lengths = torch.tensor([[5, 6]]), torch.tensor([0])
    first, second = SlotCache(2, 64), SlotCache(2, 64)
    one = target.forward_rows(ids, lengths, first, visible=2).post_norm_BRD.clone()
    two = target.forward_rows(ids, lengths, second, visible=2).post_norm_BRD.clone()
    torch.testing.assert_close(one, two)
    assert [len(steps) for _, steps in target.static._of.values()] == [1, 1]
    del second
    gc.collect()
    assert len(target.static._of) == 1, "what was recorded goes with its cache"
    # the first cache was not written by the second step
    after = target.forward_rows(torch.tensor([[7]]), torch.tensor([2]), first, visible=3).post_norm_BRD
    target.static = None
    wanted = target.forward_rows(torch.tensor([[5, 6, 7]]), lengths, SlotCache(2, 64), visible=3).post_norm_BRD[:, 2:]
    torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-5)


def waits(name: str) -> bool:
    """Whether a step asks a tensor for its numbers: no CUDA graph can record that."""
    target = Target(tiny_model(name))
    target.view()
    cache = SlotCache(2, 64)
    long = {"dtype": torch.long}
    buffers = [torch.zeros(2, 3, **long), torch.zeros(2, **long), torch.zeros(2, 3, **long)]
    for parents in (None, torch.tensor([[-1, 0, 0], [-1, 0, 1]])):
        arguments = (*buffers, parents, torch.tensor([3, 2]), 64, cache)
        target.forward_static(*arguments)  # allocates the cache
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                target.forward_static(*arguments)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return True
    return False


@pytest.mark.parametrize("name", RECORDABLE)
def test_a_step_waits_for_nothing(name, monkeypatch):
    # on a GPU nothing is packed: our one-row shortcut on a CPU does ask for a number
    monkeypatch.setattr("foretell.models.fast._can_pack", lambda module: False)
    assert not waits(name)


def test_what_waits_is_not_recorded(monkeypatch):
    monkeypatch.setattr("foretell.models.fast._can_pack", lambda module: False)
    for name in ("mixtral", "qwen3_moe"):
        assert not Target(tiny_model(name))._can_be_recorded()
    growing = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert not Target(tiny_model("llama", rope_parameters=growing))._can_be_recorded()
    assert Target(tiny_model("llama"))._can_be_recorded()


@pytest.mark.gpu
@pytest.mark.parametrize("drafter", ["off", "mtp+lookup"])
def test_recorded_on_a_gpu(drafter):
    model = leaning_model("llama").to("cuda")
    mtp = knowing_mtp(model)
    inputs = {name: t.to("cuda") for name, t in prompts(7, 2, 12).items()}
    wanted = model.generate(**inputs, do_sample=False, pad_token_id=0, max_new_tokens=20)
    for _ in range(2):
        out = run(mtp, inputs, max_new_tokens=20, num_draft_tokens=0 if drafter == "off" else 3, drafter="mtp+lookup")
        assert out.sequences.tolist() == wanted.tolist()
    assert mtp.target.static is not None and mtp.target.static.replayed
    assert len(steps_of(mtp.target)) >= 1
