"""The copy that decodes is held against the live model's own logits, and the check itself can fail."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny import tiny_model
from torch import Tensor, nn

from foretell import SequentialConfig, get_mtp_model
from foretell.models import attention, fast
from foretell.models.attention import RowMasks
from foretell.models.fast import FusedLayer
from foretell.models.self_check import at_rest
from foretell.models.slot_cache import SlotCache
from foretell.models.target import Target, UnsupportedModelError

fused = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="nothing is packed without oneDNN")


def wrong(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """FusedLayer.forward of the second layer with another result: change(what it read, what it gave)."""
    right = FusedLayer.forward

    def forward(self: FusedLayer, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = right(self, hidden_states, *args, **kwargs)
        return change(hidden_states, out) if self.layer == 1 else out

    return forward


LAYERS = {
    "left out": lambda x, out: x,
    "turned round": lambda x, out: x - (out - x),
    "doubled": lambda x, out: x + 2 * (out - x),
    "a tenth more": lambda x, out: x + 1.1 * (out - x),
    "zeros": lambda x, out: out * 0,
    "not a number": lambda x, out: out * float("nan"),
    "of a narrower type": lambda x, out: out.bfloat16().float(),
}


@fused
@pytest.mark.parametrize("name", LAYERS)
def test_a_wrong_layer_is_found_and_named_and_the_plain_path_serves(name, monkeypatch):
    model = tiny_model()
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        wanted = model(ids).logits
    monkeypatch.setattr(fast, "_fused_layer", lambda layer, rotation: FusedLayer(layer, rotation) if "LlamaDecoder" in
                        type(layer).__name__ else None)  # fmt: skip
    monkeypatch.setattr(FusedLayer, "forward", wrong(LAYERS[name]))
    target = Target(model)
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM \(llama\).*first: layer 1 \(LlamaDecoderLayer\)"):
        target.refresh()
    assert not any(isinstance(part, FusedLayer) for part in target.view().modules())
    rows = target.forward_rows(ids, torch.tensor([0]), SlotCache(1, 64), visible=10)
    torch.testing.assert_close(target.logits(rows.post_norm_BRD, view=True), wanted, atol=1e-4, rtol=1e-4)
    verdict = target.verdict()
    assert verdict["path"] == "plain" and verdict["layer"].startswith("layer 1") and not verdict["differs"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        target.refresh()
        model.model.layers[0].mlp.up_proj.weight.data.mul_(2.0)
        target.refresh()


chain = attention.chain_mask


def as_a_chain(parents: Tensor, lengths: Tensor, visible: int, window: int | None = None) -> Tensor:
    return chain(parents.shape[1], lengths, visible, None, window=window)


def no_cache(rows: int, lengths: Tensor, visible: int, *rest: Any, **more: Any) -> Tensor:
    return chain(rows, lengths, visible, *rest, **more) & (torch.arange(visible) >= lengths[:, None, None])


shifted = "positions that are not the rows' own"
BROKEN = {"a tree read as a chain": ("row_mask", as_a_chain), "the cache is not seen": ("chain_mask", no_cache)}


@pytest.mark.parametrize("name", [*BROKEN, shifted])
def test_what_no_path_computes_is_refused_by_name(name, monkeypatch):
    if name == shifted:
        right = Target._forward_rows
        monkeypatch.setattr(
            Target, "_forward_rows", lambda self, *args: right(self, *args[:4], args[4] * 2 + 1, *args[5:])
        )
    else:
        monkeypatch.setattr(attention, *BROKEN[name])
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM \(llama\) cannot be decoded exactly: .* differ"):
        Target(tiny_model()).refresh()


def test_a_model_that_crashes_in_the_copy_is_refused_by_name():
    model = tiny_model("mixtral")
    kind = type(model.model.layers[0].self_attn)
    layer = model.model.layers[1]

    class Odd(kind):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if self.config._attn_implementation == attention.NAME:
                raise KeyError("no such attention")
            return super().forward(*args, **kwargs)

    layer.self_attn.__class__ = Odd
    with pytest.raises(UnsupportedModelError, match=r"KeyError in the copy's forward.*layer 1 \(MixtralDecoderLayer\)"):
        Target(model).refresh()


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_window_that_our_attention_is_not_told_bounds_the_texts(name, monkeypatch):
    model = tiny_model(name, sliding_window=20)
    right = RowMasks.get
    monkeypatch.setattr(RowMasks, "get", lambda self, window, *rest: right(self, None, *rest))
    monkeypatch.setattr(RowMasks, "within", lambda *_: None)
    mtp = get_mtp_model(model, SequentialConfig(depth=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert mtp.target.verdict()["within"] == 20
    ids = torch.arange(10, 19)[None]
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    assert (
        mtp.generate(ids, max_new_tokens=11, **how).tolist() == model.generate(ids, max_new_tokens=11, **how).tolist()
    )
    with pytest.raises(UnsupportedModelError, match="texts of up to 21 tokens, but its window of 20"):
        mtp.generate(ids, max_new_tokens=12, **how)


@fused
def test_a_fused_layer_without_its_window_is_found(monkeypatch):
    monkeypatch.setattr(RowMasks, "within", lambda *_: None)  # the layers are told their window, and no mask
    monkeypatch.setitem(fast.PLAIN_LAYERS, "MistralDecoderLayer", lambda attention: None)
    target = Target(tiny_model("mistral", sliding_window=20))
    with pytest.warns(UserWarning, match="a window"):
        verdict = target.verdict()
    assert verdict["path"] == "plain" and verdict["within"] is None


def test_windows_are_held_against_the_model_and_only_where_they_act():
    for name, changes, acts in (("mistral", {}, True), ("gemma3_text", {}, True), ("qwen2", {}, False)):
        verdict = Target(tiny_model(name, **changes)).verdict()
        assert any("window" in reading for reading in verdict["distances"]) == acts, name
        assert verdict["within"] is None and max(verdict["distances"].values()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_pass_by_their_own_roundings(dtype):
    for name in ("llama", "gemma2", "olmo2", "gpt_neox"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not Target(tiny_model(name, spread=1.5).to(dtype)).verdict()["differs"]
    model = tiny_model(spread=1.5).to(dtype)
    before = Target.logits

    def half(self: Target, states: Tensor, view: bool = False) -> Tensor:
        logits = before(self, states, view)
        return logits + 0.3 * logits.roll(1, -1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "logits", half)
        with pytest.raises(UnsupportedModelError, match="logits differ"):
            Target(model).refresh()


def test_the_reference_leaves_a_model_as_it_was():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    modes, state = [part.training for part in model.modules()], torch.get_rng_state()
    with at_rest(model):
        assert not any(part.training for part in model.modules())
        torch.rand(3)
        model.model.rotary_emb.found, model.model.rotary_emb.inv_freq = 3, torch.ones(4)
        model.model.norm.register_buffer("more", torch.ones(1))
    assert modes == [part.training for part in model.modules()] and torch.equal(state, torch.get_rng_state())
    assert not hasattr(model.model.rotary_emb, "found") and not hasattr(model.model.norm, "more")
    assert float(model.model.rotary_emb.inv_freq[1]) != 1.0


def test_structures_are_judged_once():
    calls = []
    model = tiny_model()
    model.register_forward_hook(lambda *_: None)  # so that logits pass through the model's own forward
    target = Target(model)
    with pytest.MonkeyPatch.context() as patch:
        right = Target._judge
        patch.setattr(Target, "_judge", lambda self, structure: (calls.append(1), right(self, structure))[1])
        for scaling in (1.0, 2.0, 1.0, 2.0, 1.0):
            model.model.layers[0].self_attn.scaling = scaling
            model.model.layers[0].mlp.up_proj.weight.data.mul_(1.1)
            target.refresh()
    assert len(calls) == 2
    assert isinstance(target.verdict()["distances"], dict) and isinstance(model, nn.Module)


def test_a_model_that_a_trainer_left_in_mixed_precision_is_refused_by_its_cause_and_decodes_when_taken_out():
    """Trainers of transformers and TRL leave accelerate's forward on a model, in which its own generate runs too."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests in this process
    model = tiny_model()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(model.train()).eval()
    mtp, ids = get_mtp_model(prepared, SequentialConfig(depth=1)), torch.arange(10, 20)[None]
    settings = {"max_new_tokens": 8, "do_sample": False}
    try:
        with pytest.raises(UnsupportedModelError, match="keep_fp32_wrapper=False"):
            mtp.generate(ids, **settings)
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert mtp.generate(ids, **settings).tolist() == model.generate(ids, **settings).tolist()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
