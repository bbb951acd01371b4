"""The lean layers give the numbers and gradients of the layers they stand for, and give way where they cannot."""

# B sequences, T positions, K masks, D hidden width.

from __future__ import annotations

import pytest
import torch
from tiny import VOCAB, tiny_model
from torch import Tensor, nn

from foretell.data.collate import to_batch
from foretell.models import target as target_file
from foretell.models.lean_layer import Frozen, _FrozenLinear, lean_layers
from foretell.mtp import MTPModel, get_mtp_model

PLAIN = {"llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {}, "llama with biases": {"attention_bias": True}}


def masked(architecture: str, **settings: object) -> MTPModel:
    model = tiny_model(architecture.split()[0], **PLAIN.get(architecture, {}))
    mtp = get_mtp_model(model, {"method": "masked", "depth": 2, "lora_rank": 3, **settings}).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in (*mtp.module.named_parameters(), *mtp.model.named_parameters()):
            if "lora_B" in name or parameter.dim() == 1:  # norms and biases too: nothing at a neutral value
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return mtp.double()


def gradients(mtp: MTPModel) -> dict[str, Tensor]:
    ids = torch.randint(2, VOCAB, (2, 14), generator=torch.Generator().manual_seed(0))
    mtp.zero_grad()
    losses = mtp(input_ids=ids, attention_mask=(torch.arange(14) < torch.tensor([[14], [9]])).long())["mtp"]
    sum((k + 1) * loss.total for k, loss in enumerate(losses)).backward()
    assert not any(parameter.grad is not None for parameter in mtp.model.parameters())
    return {name: parameter.grad.clone() for name, parameter in mtp.module.named_parameters()}


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "up_proj"], ["down_proj"]], ids=str)
@pytest.mark.parametrize("fuse", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("architecture", PLAIN)
def test_lean_equals_the_layers_own_code(architecture, fuse, modules, monkeypatch):
    mtp = masked(architecture, fuse_weights=fuse, lora_modules=modules)
    assert lean_layers(mtp.target.layers) is not None
    lean = gradients(mtp)
    monkeypatch.setattr(target_file, "lean_layers", lambda layers: None)
    plain = gradients(mtp)
    assert lean.keys() == plain.keys()
    for name, gradient in plain.items():
        # transformers' norms and rotations round to fp32 whatever comes in
        assert float((lean[name] - gradient).norm()) < 3e-5 * float(gradient.norm()) > 0, name


def test_states_of_text_are_the_models_own():
    mtp = masked("qwen3")
    batch = to_batch({"input_ids": torch.randint(2, VOCAB, (1, 11))})
    carries_BT = torch.ones_like(batch.input_ids_BT, dtype=torch.bool)
    piece = next(mtp.module.pieces(mtp.target, batch, carries_BT))
    wanted = mtp.target.forward_text(batch.input_ids_BT, batch.position_ids_BT).post_norm_BRD
    assert float((piece.text_BWD - wanted).norm()) < 1e-6 * float(wanted.norm())


@pytest.mark.parametrize("kind", ["norm", "gated", "bare"])
def test_a_frozen_linear_by_gradcheck(kind):
    torch.manual_seed(0)
    linears = [nn.Linear(6, 4).double(), nn.Linear(6, 3, bias=False).double()]
    frozen = {
        "norm": Frozen(linears, [], norm=(torch.rand(6).double() + 0.5, 1e-5)),
        "gated": Frozen(linears, [], gated=True),
        "bare": Frozen(linears, []),
    }[kind]
    x_ND = torch.randn(5, 12 if kind == "gated" else 6, dtype=torch.double, requires_grad=True)
    others = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in ((2, 6), (7, 2), (5, 7))]

    def run(*tensors: Tensor) -> Tensor:
        return _FrozenLinear.apply(*tensors, frozen, 0.7)

    assert torch.autograd.gradcheck(run, (x_ND, *others))
    # the check can fail: a factor of two in what comes back
    honest = _FrozenLinear.backward
    try:
        _FrozenLinear.backward = staticmethod(lambda ctx, grad: honest(ctx, 2 * grad))
        assert not torch.autograd.gradcheck(run, (x_ND, *others), raise_exception=False)
    finally:
        _FrozenLinear.backward = honest


def test_other_layers_keep_their_own_code():
    assert lean_layers(tiny_model("gemma2").get_decoder().layers) is None
    model = tiny_model("llama")
    assert lean_layers(model.get_decoder().layers) is not None
    handle = model.get_decoder().layers[0].mlp.register_forward_hook(lambda *_: None)
    assert lean_layers(model.get_decoder().layers) is None
    handle.remove()
    model.get_decoder().layers[1].self_attn.q_proj = nn.Sequential(nn.Linear(32, 32))
    assert lean_layers(model.get_decoder().layers) is None
    with_gelu = tiny_model("llama", hidden_act="gelu")
    assert lean_layers(with_gelu.get_decoder().layers) is None
