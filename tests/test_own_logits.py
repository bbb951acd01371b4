"""What a model does to its logits is asked of the model: scales, caps, unused keys, and what fits no formula."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drafters import knowing_mtp, leaning_model
from tiny import VOCAB, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from foretell import get_mtp_model
from foretell.models.own_logits import LogitFormula, logit_formula, own_logits
from foretell.models.target import Target, UnsupportedModelError

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
_TEXT = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
_SEES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
FORMULAS: dict[str, tuple[str, dict[str, Any], LogitFormula]] = {
    "nothing": ("llama", {}, LogitFormula()),
    "keys that nobody uses": ("llama", {"logit_scale": 7.0, "final_logit_softcapping": 2.0}, LogitFormula()),
    "Cohere multiplies": ("cohere", {"logit_scale": 0.37}, LogitFormula(0.37)),
    "Granite divides": ("granite", {"logits_scaling": 3.0}, LogitFormula(1 / 3)),
    "HyperCLOVAX multiplies by Granite's key": ("hyperclovax", {"logits_scaling": 3.0}, LogitFormula(3.0)),
    "MiniCPM divides the state": ("minicpm3", {**MLA, "dim_model_base": 24}, LogitFormula(0.75)),
    "Gemma 2 caps": ("gemma2", {"final_logit_softcapping": 4.0}, LogitFormula(1.0, 4.0)),
    "Gemma 3 caps if asked": ("gemma3_text", {"final_logit_softcapping": 0.25}, LogitFormula(1.0, 0.25)),
    "nanochat caps always": ("nanochat", {}, LogitFormula(1.0, 15.0)),
    "a head with a bias": ("phi", {}, LogitFormula()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", FORMULAS)
def test_the_formula_is_found_exactly(case, dtype):
    name, changes, wanted = FORMULAS[case]
    assert logit_formula(tiny_model(name, **changes).to(dtype)) == wanted


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("case", ["nothing", "Gemma 2 caps", "Granite divides"])
def test_the_formula_of_a_tiny_vocabulary(case, size):
    name, changes, wanted = FORMULAS[case]
    model = tiny_model(name, vocab_size=size, **changes)
    assert logit_formula(model) == wanted
    ids = torch.tensor([[0, 1, 1, 0, 1]])  # all tokens are known by name, and it is read and drafted for nevertheless
    mtp, mask = get_mtp_model(model, {"method": "sequential", "depth": 2}), torch.ones_like(ids)
    texts = [one.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False) for one in (mtp, model)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("case", FORMULAS)
def test_logits_are_the_models_own(case):
    name, changes, _ = FORMULAS[case]
    model = tiny_model(name, **changes)
    target = Target(model)
    with torch.no_grad():
        wanted = model(IDS).logits
        state_BTD = model.get_decoder()(IDS).last_hidden_state
        torch.testing.assert_close(target.logits(state_BTD), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own_logits(model, state_BTD), wanted, rtol=0, atol=0)


def test_a_multimodal_wrapper_whose_forward_has_no_cap():
    """Its text config has the key, its own forward does not use it."""
    config = AutoConfig.for_model("gemma3", text_config={**_TEXT, "final_logit_softcapping": 2.0}, vision_config=_SEES)
    torch.manual_seed(0)
    assert logit_formula(AutoModelForCausalLM.from_config(config)) == LogitFormula()


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "some tokens are forbidden": lambda x: x.index_fill(-1, torch.tensor([4, 36, 94]), torch.finfo(x.dtype).min),
    "another scale for some": lambda x: torch.cat([x[..., :50], 1.5 * x[..., 50:]], dim=-1),
    "a shift": lambda x: x + torch.linspace(0, 3, x.shape[-1]),
    "a hard cap": lambda x: x.clamp(-1, 1) + torch.linspace(0, 0.5, x.shape[-1]),
    "turned round": lambda x: -x,
}


@pytest.mark.parametrize("way", WAYS)
def test_what_fits_no_formula_decodes_as_the_model_does_and_is_refused_by_losses(way):
    """Here by a hook, as a user sets one; a model class may do the same in its forward."""
    model = leaning_model()
    mtp = knowing_mtp(model)

    def changed(_module: nn.Module, _args: Any, output: Any) -> Any:
        output.logits = WAYS[way](output.logits)
        return output

    before = mtp.generate(IDS, max_new_tokens=12, do_sample=False)
    handle = model.register_forward_hook(changed)
    wanted = model.generate(IDS, max_new_tokens=12, do_sample=False)
    out = mtp.generate(IDS, max_new_tokens=12, do_sample=False)
    assert out.tolist() == wanted.tolist() != before.tolist()
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM .llama. makes its logits .*in a way of its own"):
        mtp(input_ids=IDS, labels=IDS)
    handle.remove()
    assert mtp.generate(IDS, max_new_tokens=12, do_sample=False).tolist() == before.tolist()
    assert mtp(input_ids=IDS, labels=IDS)["mtp"][0].total.isfinite()


def test_a_forward_that_others_set_on_the_object_hides_nothing():
    """TRL gives a model a forward with a fused loss, which hands on to the one that it found."""
    model = tiny_model("cohere", logit_scale=0.37)
    found = model.forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: found(*args, **kwargs), model)
    assert logit_formula(model) == LogitFormula(0.37)


def test_what_a_forward_does_is_asked_again_at_every_call():
    model = leaning_model("gemma2")
    mtp = knowing_mtp(model)
    for cap in (30.0, 0.5, None):
        model.config.final_logit_softcapping = cap
        mtp.generate(IDS, max_new_tokens=2, do_sample=False)
        assert mtp.target.loss_scaling["softcap"] == cap
        with torch.no_grad():
            state_BTD = model.get_decoder()(IDS).last_hidden_state
            torch.testing.assert_close(mtp.target.logits(state_BTD), model(IDS).logits, rtol=1e-5, atol=1e-5)
