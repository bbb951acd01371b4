"""A live model may change between two calls in any way that its own generate would notice: the same text, or a refusal
by name."""

from __future__ import annotations

import copy
import functools
import io
import threading
import types
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from tiny import VOCAB, tiny_model
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from foretell import HeadsConfig, MaskedConfig, SequentialConfig, get_mtp_model
from foretell.models import fast, linears
from foretell.models.slot_cache import CACHE_NAMES, SlotCache
from foretell.models.target import Target, UnsupportedModelError

PROMPT = torch.arange(10, 19)[None]
METHODS = {
    "sequential": SequentialConfig(depth=2),
    "heads": HeadsConfig(depth=2, head_type="medusa"),
    "masked": MaskedConfig(depth=2),
}
ADAPTED = ["q_proj", "down_proj"]


def say(model: Any, tokens: int = 10, **how: Any) -> list[int]:
    mask = torch.ones_like(PROMPT)
    ids = model.generate(
        input_ids=PROMPT, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **how
    )
    return ids[0].tolist()


def mtp_say(mtp: Any, **how: Any) -> list[int]:
    mask = torch.ones_like(PROMPT)
    return mtp.generate(
        PROMPT, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0, num_draft_tokens=2, **how
    )[0].tolist()


def noise(model: nn.Module, size: float = 0.7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [p.detach() + torch.randn(p.shape, generator=generator) * p.std() * size for p in model.parameters()]


def plus(amount: float) -> Callable[..., Any]:
    """A hook that moves a module's output, by another amount in each column."""

    def hook(_module: nn.Module, _args: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        moved = first + amount * torch.linspace(-1, 1, first.shape[-1], dtype=first.dtype)
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    return hook


# -- what may change: each takes the model and changes it ----------------------------------------------------------


def data_copied(model: nn.Module) -> None:
    for parameter, new in zip(model.parameters(), noise(model)):
        parameter.data.copy_(new)


def data_replaced(model: nn.Module) -> None:
    for parameter, new in zip(model.parameters(), noise(model)):
        parameter.data = new


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter, new in zip(model.parameters(), noise(model)):
            parameter.copy_(new)


def through_numpy(model: nn.Module) -> None:
    model.model.layers[0].mlp.up_proj.weight.detach().numpy()[:] *= -1


def fused_step(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, fused=True)
    model(PROMPT, labels=PROMPT).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def assigned(model: nn.Module) -> None:
    state = {name: t.clone() for name, t in zip(dict(model.named_parameters()), noise(model))}
    model.load_state_dict({**model.state_dict(), **state}, assign=True)


def one_norm(model: nn.Module) -> None:
    norm = model.model.layers[0].input_layernorm
    norm.weight.data.mul_(torch.linspace(-3, 3, 32))


def final_norm(model: nn.Module) -> None:
    model.model.norm.weight.data.mul_(torch.linspace(-3, 3, 32))


def not_a_number(model: nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan


def new_parameter(model: nn.Module) -> None:
    linear = model.model.layers[1].self_attn.v_proj
    linear.weight = nn.Parameter(-3 * linear.weight.detach())


def rotary_buffer(model: nn.Module) -> None:
    model.model.rotary_emb.inv_freq.mul_(3.0)


def rotary_buffer_replaced(model: nn.Module) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 3.0


def plain_attribute(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 40


def hook_on(path: str, amount: float = 9.0) -> Callable[[nn.Module], None]:
    return lambda model: model.get_submodule(path).register_forward_hook(plus(amount)) and None


def pre_hook(model: nn.Module) -> None:
    model.lm_head.register_forward_pre_hook(lambda _m, args: (args[0].roll(1, -1),))


def hook_with_kwargs(model: nn.Module) -> None:
    def hook(_module: nn.Module, _args: Any, _kwargs: dict, out: torch.Tensor) -> torch.Tensor:
        return plus(9.0)(_module, _args, out)

    model.model.layers[1].register_forward_hook(hook, with_kwargs=True, always_call=True)


def hook_by_identity(model: nn.Module) -> None:
    chosen = {model.model.layers[1]}
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, a, out: plus(9.0)(m, a, out) if m in chosen else None)


def hooks_replaced(model: nn.Module) -> None:
    model.model.layers[0]._forward_hooks = type(model.model.layers[0]._forward_hooks)({7: plus(9.0)})


def global_hook(model: nn.Module) -> Callable[[], None]:
    return nn.modules.module.register_module_forward_hook(
        lambda m, a, out: plus(9.0)(m, a, out) if isinstance(m, nn.Linear) and m.out_features == VOCAB else None
    ).remove


def method_patched(model: nn.Module) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = types.MethodType(lambda self, x: -3 * self.down_proj(self.act_fn(self.gate_proj(x))), mlp)


def closure_patched(path: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        part = model.get_submodule(path)
        before = part.forward
        part.forward = lambda *args, **kwargs: plus(9.0)(part, args, before(*args, **kwargs))

    return change


def partial_patched(model: nn.Module) -> None:
    layer = model.model.layers[1]

    def instead(old: Callable, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return plus(9.0)(layer, (), old(hidden_states, **kwargs))

    layer.forward = functools.partial(instead, layer.forward)


def class_patched(model: nn.Module) -> Callable[[], None]:
    kind = type(model.model.layers[0].mlp)
    before = kind.forward
    kind.forward = lambda self, x: -3 * before(self, x)
    return lambda: setattr(kind, "forward", before)


def linear_class_patched(model: nn.Module) -> Callable[[], None]:
    before = nn.Linear.forward
    nn.Linear.forward = lambda self, x: before(self, x) * torch.linspace(-1, 2, self.out_features)
    return lambda: setattr(nn.Linear, "forward", before)


def put(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[], None]:
    """Another function in a function's place, as libraries of kernels put theirs."""
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    return lambda: setattr(owner, name, before)


def rotary_function_patched(_model: nn.Module) -> Callable[[], None]:
    return put(
        modeling_llama, "apply_rotary_pos_emb", lambda old: lambda q, k, c, s, *a: old(q, k, c * 0.5, s * 1.5, *a)
    )


def function_below_patched(_model: nn.Module) -> Callable[[], None]:
    return put(modeling_llama, "rotate_half", lambda old: lambda x: 0.5 * old(x))


def linear_function_patched(_model: nn.Module) -> Callable[[], None]:
    return put(nn.functional, "linear", lambda old: lambda x, w, b=None: old(x, w * 1.3, b))


def call_patched(_model: nn.Module) -> Callable[[], None]:
    kind, before = modeling_llama.LlamaRMSNorm, nn.Module.__call__
    kind.__call__ = lambda self, x: before(self, x).tanh()
    return lambda: delattr(kind, "__call__")


def mlp_wrapped(model: nn.Module) -> None:
    model.model.layers[0].mlp = Twice(model.model.layers[0].mlp)


def head_normed(model: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    model.lm_head.parametrizations.weight.original0.data.mul_(torch.linspace(-2, 2, VOCAB)[:, None])


def compiled(model: nn.Module) -> None:
    model.model.norm.weight.data.mul_(torch.linspace(-3, 3, 32))
    model.compile(backend="eager")


class Twice(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return -2 * self.inside(*args, **kwargs)


def wrapped(model: nn.Module) -> None:
    mlp = model.model.layers[0].mlp
    mlp.up_proj = Twice(mlp.up_proj)


def layers_swapped(model: nn.Module) -> None:
    first, second = model.model.layers
    model.model.layers[0], model.model.layers[1] = second, first
    first.self_attn.layer_idx, second.self_attn.layer_idx = 1, 0


def other_norm(model: nn.Module) -> None:
    model.model.norm = nn.LayerNorm(32)


def other_head(model: nn.Module) -> None:
    model.lm_head = nn.Linear(32, VOCAB, bias=True)


def activation(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Tanh()


def weight_norm(model: nn.Module) -> None:
    part = torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    part.parametrizations.weight.original0.data.mul_(-5)


def old_weight_norm(model: nn.Module) -> None:
    torch.nn.utils.weight_norm(model.model.layers[0].mlp.up_proj).weight_g.data.mul_(-5)


def tanh_config(model: nn.Module) -> None:
    model.config.rms_norm_eps = 1.0
    for part in model.modules():
        if hasattr(part, "variance_epsilon"):
            part.variance_epsilon = 30.0


def resized(model: nn.Module) -> None:
    torch.manual_seed(1)
    model.resize_token_embeddings(VOCAB + 20, mean_resizing=False)


def double(model: nn.Module) -> None:
    model.to(torch.float64)


def bfloat16(model: nn.Module) -> None:
    model.to(torch.bfloat16)


def wide_head(model: nn.Module) -> None:
    model.to(torch.bfloat16)
    model.lm_head.float().register_forward_pre_hook(lambda _m, args: (args[0].float(),))


def added_adapter(model: nn.Module) -> None:
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"this transformers adds adapters of PEFT {MIN_PEFT_VERSION} only, here is {peft.__version__}")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=ADAPTED, init_lora_weights=False))
    model.eval()


def adapter_switched_off(model: nn.Module) -> None:
    added_adapter(model)
    model.disable_adapters()


CHANGES: dict[str, Callable[[Any], Any]] = {
    f.__name__: f
    for f in (
        data_copied, data_replaced, in_place, through_numpy, fused_step, assigned, one_norm, final_norm, not_a_number,
        new_parameter, rotary_buffer, rotary_buffer_replaced, plain_attribute, pre_hook, hook_with_kwargs,
        hook_by_identity, hooks_replaced, global_hook, method_patched, partial_patched, class_patched,
        linear_class_patched, wrapped, layers_swapped, other_norm, other_head, activation, weight_norm,
        old_weight_norm, tanh_config, double, bfloat16, wide_head, added_adapter, adapter_switched_off,
        rotary_function_patched, function_below_patched, linear_function_patched, call_patched, mlp_wrapped,
        head_normed, compiled,
    )
}  # fmt: skip
PLACES = ("model.layers.0", "model.layers.1.mlp", "model.layers.0.self_attn", "model.layers.1.self_attn.q_proj")
CHANGES |= {f"hook on {path}": hook_on(path) for path in (*PLACES, "model.norm", "model.embed_tokens", "lm_head")}
CHANGES |= {f"closure on {path}": closure_patched(path) for path in ("model.layers.1.mlp", "lm_head")}


UNSEEN = {"adapter_switched_off", "double", "bfloat16", "wide_head"}  # the same text, by other ways
SHORT = {"bfloat16", "wide_head"}  # in 8 bits two orders of one sum soon part; what was not noticed parts at once


@pytest.fixture(scope="module")
def start() -> nn.Module:
    return tiny_model(tie_word_embeddings=False)


FIRST = (
    "mlp_wrapped",
    "head_normed",
    "method_patched",
    "partial_patched",
    "old_weight_norm",
    "wide_head",
    "added_adapter",
    "hook on model.norm",
)


@pytest.mark.parametrize(("change", "before"), [*((c, False) for c in CHANGES), *((c, True) for c in FIRST)])
def test_what_changes_in_a_model_is_noticed(change, before, start):
    model = copy.deepcopy(start)
    old = say(model)
    mtp = None if before else get_mtp_model(model, METHODS["sequential"])
    if mtp is not None:
        assert mtp_say(mtp) == old
    undo = CHANGES[change](model)
    try:
        model.eval()
        wanted = say(model)
        assert (wanted != old) == (change not in UNSEEN) or change in SHORT, "the change must be seen"
        mtp = mtp or get_mtp_model(model, METHODS["sequential"])
        n = 12 if change in SHORT else len(wanted)
        assert mtp_say(mtp)[:n] == wanted[:n]
    finally:
        if undo is not None:
            undo()
    if undo is not None:
        assert mtp_say(mtp) == old


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("sequential", name) for name in ("qwen2", "gemma3_text", "mixtral", "gpt_neox")),
        *(("heads", name) for name in ("gemma3_text", "gpt_neox")),
        *(("masked", name) for name in ("gemma3_text", "mixtral")),
    ],
)
def test_other_architectures_and_methods(method, name):
    model = tiny_model(name)
    mtp = get_mtp_model(model, METHODS[method])
    said = [say(model)]
    assert mtp_say(mtp) == said[0]
    norm = next(m for n, m in model.named_modules() if n.endswith("layers.0.input_layernorm"))
    for change in (
        lambda: norm.weight.data.mul_(torch.linspace(-4, 4, 32)),
        lambda: model.get_decoder().layers[1].register_forward_hook(plus(30.0)),
        lambda: data_copied(model),
    ):
        change()
        said.append(say(model))
        assert mtp_say(mtp) == said[-1]
    assert len({tuple(text) for text in said}) > 2


def adapters(base: nn.Module) -> dict[str, Any]:
    lora = {"r": 4, "target_modules": ADAPTED, "init_lora_weights": False}
    return {
        "lora": peft.LoraConfig(**lora),
        "dora": peft.LoraConfig(**lora, use_dora=True),
        "rslora, head": peft.LoraConfig(**{**lora, "target_modules": ["o_proj", "lm_head"]}, use_rslora=True),
        "modules_to_save": peft.LoraConfig(**lora, modules_to_save=["lm_head"]),
        "trainable tokens": peft.LoraConfig(**lora, trainable_token_indices=[11, 12]),
        "loha": peft.LoHaConfig(r=4, target_modules=ADAPTED, init_weights=False),
        "lokr": peft.LoKrConfig(r=4, target_modules=ADAPTED, init_weights=False),
        "ia3": peft.IA3Config(target_modules=ADAPTED, feedforward_modules=["down_proj"], init_ia3_weights=False),
        "vera": peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], init_weights=False),
        "oft": peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], init_weights=False),
        "boft": peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj"], init_weights=False),
        "fourier": peft.FourierFTConfig(n_frequency=40, target_modules=ADAPTED, scaling=900.0, init_weights=False),
    }


ADAPTERS = tuple(adapters(nn.Module()))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_every_kind(kind, start):
    torch.manual_seed(0)
    base = copy.deepcopy(start)
    plain = say(base)
    mtp = get_mtp_model(base, METHODS["sequential"])
    assert mtp_say(mtp) == plain
    model = peft.get_peft_model(base, adapters(base)[kind]).eval()
    for parameter in (p for n, p in model.named_parameters() if p.requires_grad):
        parameter.data.add_(torch.randn_like(parameter) * 0.5)
    on = say(model)
    assert on != plain
    assert mtp_say(mtp) == on, "an adapter that came after the first call"
    mtp = get_mtp_model(model, METHODS["sequential"])
    assert mtp_say(mtp) == on
    with model.disable_adapter():
        assert mtp_say(mtp) == say(model)
    assert mtp_say(mtp) == on
    if kind in ("trainable tokens",):
        return
    model.merge_adapter()
    assert mtp_say(mtp) == say(model)
    model.unmerge_adapter()
    assert mtp_say(mtp) == say(model)
    bare = model.unload()
    assert mtp_say(mtp) == say(bare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_switched_and_rescaled_and_merged(dtype, start):
    torch.manual_seed(0)
    base = copy.deepcopy(start).to(dtype)
    config = adapters(base)["lora"]
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    mtp = get_mtp_model(model, METHODS["sequential"])

    def scaled(factor: float) -> None:
        for part in model.modules():
            if isinstance(part, peft.tuners.lora.LoraLayer):
                part.scaling = {name: factor * scale for name, scale in part.scaling.items()}

    n = 19 if dtype == torch.float32 else 13
    said = [say(model)]
    assert mtp_say(mtp)[:n] == said[0][:n]
    for step in (
        lambda: (model.add_adapter("other", config), model.eval(), model.set_adapter("other")),
        lambda: scaled(-4.0),
        lambda: model.merge_adapter(),
        lambda: model.unmerge_adapter(),
        lambda: model.set_adapter("default"),
        lambda: model.delete_adapter("other"),
    ):
        step()
        said.append(say(model))
        assert mtp_say(mtp)[:n] == said[-1][:n]
    assert len({tuple(text) for text in said}) > 2


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused_by_name(kind, start):
    base = copy.deepcopy(start)
    mtp = get_mtp_model(base, METHODS["sequential"])
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    if kind == "PromptEncoderConfig":
        config.encoder_hidden_size = 16
    model = peft.get_peft_model(base, config).eval()
    with pytest.raises(UnsupportedModelError, match=f"kind {config.peft_type.value}, which acts outside"):
        get_mtp_model(model, METHODS["sequential"])
    from foretell import custom_generate

    with pytest.raises(UnsupportedModelError, match=f"kind {config.peft_type.value}, which acts outside"):
        say(model, custom_generate=custom_generate(mtp))


def test_adapters_chosen_by_the_call_are_refused_by_name(start):
    from foretell import custom_generate

    model = peft.get_peft_model(copy.deepcopy(start), adapters(start)["lora"]).eval()
    mtp = get_mtp_model(model, METHODS["sequential"])
    with pytest.raises(ValueError, match="cannot honour: adapter_names"):
        say(model, adapter_names=["__base__"], custom_generate=custom_generate(mtp))
    assert mtp_say(mtp) == say(model), "nothing of it stays"


@pytest.mark.parametrize("step", ["prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_sample"])
@pytest.mark.parametrize("where", ["subclass", "wrapped on the class", "object"])
def test_steps_of_generate_that_are_not_transformers_own_are_refused_by_name(step, where, start):
    model = copy.deepcopy(start)
    mtp, plain = get_mtp_model(model, METHODS["sequential"]), getattr(type(model), step)
    assert mtp_say(mtp) == say(model)

    @functools.wraps(plain)
    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        if step.startswith("prepare"):
            out["input_ids"] = out["input_ids"] * 0 + 20
        return out

    usual = type(model)
    if where == "object":
        setattr(model, step, types.MethodType(other, model))
    else:
        model.__class__ = type(usual.__name__, (usual,), {step: other})
    for how in ({}, {"drafter": "lookup"}):
        with pytest.raises(UnsupportedModelError, match=f"LlamaForCausalLM.{step} is not transformers' own"):
            mtp_say(mtp, **how)
    model.__class__ = usual
    model.__dict__.pop(step, None)
    assert mtp_say(mtp) == say(model)


def test_hooks_on_what_decoding_does_not_call_are_refused_by_name(start):
    model = copy.deepcopy(start)
    mtp = get_mtp_model(model, METHODS["sequential"])
    handle = model.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has hooks that see its inputs"):
        mtp_say(mtp)
    handle.remove()
    assert mtp_say(mtp) == say(model)


def test_a_hook_that_asks_the_cache_for_a_length_is_refused_by_name(start):
    model = copy.deepcopy(start)
    mtp = get_mtp_model(model, METHODS["sequential"])

    def hook(_module: nn.Module, _args: Any, kwargs: dict, out: torch.Tensor) -> torch.Tensor:
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        return out if cache is None or cache.get_seq_length() < 12 else -out  # further on than any check looks

    handle = model.model.layers[1].register_forward_hook(hook, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="asks the cache for one length of all rows"):
        mtp_say(mtp)
    handle.remove()
    assert mtp_say(mtp) == say(model)


def test_another_attention_of_the_same_name_is_refused_by_name(start):
    model = copy.deepcopy(start)
    mtp, wanted = get_mtp_model(model, METHODS["sequential"]), say(model)
    assert mtp_say(mtp) == wanted
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda module, q, k, *rest, **more: before(module, q, k * 1.7, *rest, **more)
    try:
        with pytest.raises(UnsupportedModelError, match="cannot be decoded exactly"):
            mtp_say(mtp)
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before
    assert mtp_say(mtp) == wanted


def test_a_head_without_a_matrix_is_refused_by_name(start):
    model = copy.deepcopy(start)
    mtp = get_mtp_model(model, METHODS["sequential"])
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    with pytest.raises(UnsupportedModelError, match="is no tensor"):
        mtp_say(mtp)


def test_memory_given_back_by_others_waits_for_who_looks(start):
    model = copy.deepcopy(start)
    mtp, threads = get_mtp_model(model, METHODS["sequential"]), []

    def hook(*_: Any) -> None:  # runs while the copy is held against the model
        threads.append(threading.Thread(target=mtp.release))
        threads[-1].start()
        threads[-1].join(0.05 if len(threads) == 1 else 0)

    handle = model.lm_head.register_forward_hook(hook)
    got = mtp_say(mtp)
    handle.remove()
    for thread in threads:
        thread.join()
    assert got == say(model)


def test_parts_elsewhere_are_refused_by_name(start):
    model = copy.deepcopy(start)
    mtp = get_mtp_model(model, METHODS["sequential"])
    model.model.layers[0].to("meta")
    with pytest.raises(UnsupportedModelError, match="lies in several places"):
        mtp_say(mtp)


@pytest.mark.parametrize("method", METHODS)
def test_inference_mode_around_a_call_or_a_load(method, start):
    model = copy.deepcopy(start)
    wanted, mtp = say(model), get_mtp_model(model, METHODS[method])
    for mode in (True, False, True, False):
        with torch.inference_mode(mode):
            assert mtp_say(mtp) == wanted
    with torch.inference_mode():
        model = tiny_model(tie_word_embeddings=False)
        mtp = get_mtp_model(model, METHODS[method])
    assert mtp_say(mtp) == wanted


@pytest.mark.parametrize(("method", "packs"), [*((method, True) for method in METHODS), ("sequential", False)])
def test_autocast_and_the_default_dtype(method, packs, start, monkeypatch):
    if not packs:
        monkeypatch.setattr(fast, "_can_pack", lambda module: False)
    model = copy.deepcopy(start)
    mtp = get_mtp_model(model, METHODS[method])
    for cast in (False, True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            assert mtp_say(mtp) == say(model)
    torch.set_default_dtype(torch.float64)
    try:
        assert mtp_say(mtp) == say(model)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_other_types_of_number(method, start):
    for change in (wide_head, double, resized):
        model = copy.deepcopy(start)
        mtp = get_mtp_model(model, METHODS[method])
        assert mtp_say(mtp) == say(model)
        change(model)
        if change is resized:
            mtp = get_mtp_model(model, METHODS[method])
        assert mtp_say(mtp) == say(model)


@pytest.mark.parametrize("packs", [True, False])
def test_a_module_of_a_narrower_type_than_its_target(packs, start, monkeypatch):
    monkeypatch.setattr(fast, "_can_pack", lambda _module: packs)
    for name in ("llama", "qwen3"):
        model = tiny_model(name)
        mtp = get_mtp_model(model, METHODS["sequential"])
        mtp.module.to(torch.bfloat16)
        assert mtp_say(mtp) == say(model)


class LouderFunctions(TorchFunctionMode):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        return out * self.factor if function is nn.functional.linear else out


class LouderOperations(TorchDispatchMode):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        return out * self.factor if function is torch.ops.aten.mm.default else out


@pytest.mark.parametrize("mode", [LouderFunctions, LouderOperations])
@pytest.mark.parametrize("method", METHODS)
def test_a_mode_that_changes_operations_is_noticed(mode, method, start):
    model = copy.deepcopy(start)
    mtp, before = get_mtp_model(model, METHODS[method]), say(model)
    assert mtp_say(mtp) == before
    for factor in (1.2, 0.6):  # the same kind of mode, another state
        with mode(factor):
            wanted = say(model)
            assert mtp_say(mtp) == wanted != before
    assert mtp_say(mtp) == before


def test_a_mode_that_makes_rows_differ_by_their_number_is_refused_by_name(start):
    class Counting(TorchDispatchMode):
        """Says something else of a single row, so that no two ways of reading a text agree."""

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            return out * len(out) if function is torch.ops.aten.mm.default else out

    mtp = get_mtp_model(copy.deepcopy(start), METHODS["sequential"])
    with Counting(), pytest.raises(ValueError, match="cannot be decoded exactly"):
        mtp_say(mtp)
    assert mtp_say(mtp) == say(mtp.model)


def test_memory_that_crosses_the_packing_limit(start, monkeypatch):
    model = copy.deepcopy(start)
    mtp = get_mtp_model(model, METHODS["sequential"])
    wanted = say(model)
    for can in (True, False, True):
        monkeypatch.setattr(fast, "_can_pack", lambda module, can=can: can)
        assert mtp_say(mtp) == wanted
        mtp.target.release()


def test_a_target_can_be_copied_and_pickled_after_a_call(start):
    target = Target(copy.deepcopy(start))
    target.refresh()
    twin = copy.deepcopy(target)
    assert twin.model is not target.model and twin.verdict() == target.verdict()
    file = io.BytesIO()
    torch.save(target, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again.verdict()["path"] == target.verdict()["path"]


def test_the_user_own_objects_stay_his(start):
    """Modes, random numbers, configs, hooks and attributes of the live model are what they were."""
    model = copy.deepcopy(start).train()
    model.model.layers[0].eval()

    class Recorder:
        def __init__(self) -> None:
            self.seen = []

        def note(self, module: nn.Module, args: Any, out: Any) -> None:
            self.seen.append(module)

    recorder = Recorder()
    model.model.layers[1].register_forward_hook(recorder.note)
    config, modes = model.config.to_dict(), [part.training for part in model.modules()]
    attributes = [sorted(part.__dict__) for part in model.modules()]
    state = torch.get_rng_state()
    target = Target(model)
    target.refresh()
    count = len(recorder.seen)
    rows = target.forward_rows(PROMPT, torch.tensor([0]), SlotCache(1, 64), visible=9)
    assert len(recorder.seen) == count + 1 and recorder.seen[-1] is model.model.layers[1]
    assert torch.equal(state, torch.get_rng_state()) and config == model.config.to_dict()
    assert modes == [part.training for part in model.modules()]
    assert attributes == [sorted(part.__dict__) for part in model.modules()]
    with torch.no_grad():
        wanted = model.eval()(PROMPT).logits
    torch.testing.assert_close(target.logits(rows.post_norm_BRD, view=True), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="nothing is packed without oneDNN")
def test_parts_that_did_not_change_are_used_again(start):
    """What changed is written where it stands, but for a call that reads it: that keeps its own."""
    model = copy.deepcopy(start)
    target, changed = Target(model), model.model.layers[1].mlp.up_proj.weight
    target.refresh()
    parts = [dict(target.view().named_modules())]
    assert isinstance(parts[0]["model.layers.1"], fast.FusedLayer)
    probe, packed = torch.linspace(-1, 1, 32)[None], parts[0]["model.layers.1"].gate_up.linear

    def doubled() -> float:
        before = packed(probe)
        changed.data.mul_(2.0)
        target.refresh()
        parts.append(dict(target.view().named_modules()))
        return float(packed(probe).norm() / before.norm())

    assert doubled() > 1.5 and parts[1] == parts[0]
    with target.reading():
        view = target.view()
        found: list[float] = []
        other = threading.Thread(target=lambda: found.append(doubled()))
        other.start()
        other.join()
        assert target.view() is view and (found == [1.0] or not packed.kept)
    for same in ("model.layers.0", "lm_head"):
        assert parts[2][same] is parts[0][same]
    assert parts[2]["model.layers.1"] is not parts[0]["model.layers.1"]


class Gated(modeling_llama.LlamaDecoderLayer):
    """As Llama's until its gate opens."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(hidden_states, *args, **kwargs) + self.gate * hidden_states.flip(-1)


class Doubled(modeling_llama.LlamaDecoderLayer):
    """As Llama's while it adds nothing to the stream."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 2 * super().forward(hidden_states, *args, **kwargs) - hidden_states


class SquaredRMSNorm(modeling_llama.LlamaRMSNorm):
    """As Llama's while its gains are ones."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * super().forward(hidden_states)


ODD = {"gate": Gated, "stream": Doubled, "gain": SquaredRMSNorm}
for odd in ODD.values():  # of the library's own, as far as names tell
    odd.__name__, odd.__module__ = odd.__base__.__name__, odd.__base__.__module__


@pytest.mark.parametrize("kind", ODD)
def test_a_formula_that_looks_like_anothers_at_its_first_weights(kind, start):
    model = copy.deepcopy(start)
    layer = model.model.layers[1]
    layer.gate, drawn = nn.Parameter(torch.zeros(32)), torch.Generator().manual_seed(0)
    for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
        weight.data.zero_()
    layer.input_layernorm.weight.data.fill_(1.0)
    (layer.input_layernorm if kind == "gain" else layer).__class__ = ODD[kind]
    mtp = get_mtp_model(model, METHODS["sequential"])
    said = say(model)
    assert mtp_say(mtp) == said
    assert isinstance(mtp.target.view().model.layers[1], fast.FusedLayer) or not fast._can_pack(model)
    for _ in range(2):
        for parameter in model.parameters():  # zeros have no spread to draw from
            parameter.data.add_(torch.randn(parameter.shape, generator=drawn), alpha=0.3)
        assert said != (said := say(model))
        assert mtp_say(mtp) == said


def test_packing_that_fails_half_way(start, monkeypatch):
    """Memory runs out between two layers, and the weights are the old ones again: so are the packed ones."""
    model = copy.deepcopy(start)
    mtp = get_mtp_model(model, METHODS["sequential"])
    old, kept = mtp_say(mtp), {n: p.clone() for n, p in model.state_dict().items()}
    made = []

    def prepare(self: Any, kernel: str, own: Any = linears.PackedLinear.prepare) -> torch.Tensor:
        made.append(kernel)
        if len(made) == 4:
            raise MemoryError
        return own(self, kernel)

    in_place(model)
    with monkeypatch.context() as short:
        short.setattr(linears.PackedLinear, "prepare", prepare)
        if fast._can_pack(model):
            with pytest.raises(MemoryError):
                mtp.target.refresh()
    model.load_state_dict(kept)
    assert mtp_say(mtp) == old == say(model)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="nothing is packed without oneDNN")
def test_what_transformers_hangs_on_layers_slows_nothing(start):
    model = copy.deepcopy(start)
    model(PROMPT, output_hidden_states=True, output_attentions=True)
    assert any(layer._forward_hooks for layer in model.model.layers)
    assert any(isinstance(part, fast.FusedLayer) for part in Target(model).view().modules())


def test_threads_have_numbers_of_their_own():
    """Eight threads on one target, each with a text and a cache of its own."""
    target = Target(tiny_model("mistral"))
    texts = torch.randint(3, VOCAB, (8, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = target.model(texts).logits
    target.refresh()
    found: dict[int, float] = {}
    barrier = threading.Barrier(8)

    def read(n: int) -> None:
        worst = 0.0
        barrier.wait()
        for _ in range(4):
            cache, done = SlotCache(1, 64), 0
            for rows in (5, 1, 4, 2, 1, 1, 7, 3):
                part = texts[n : n + 1, done : done + rows]
                out = target.forward_rows(part, torch.tensor([done]), cache, visible=done + rows)
                got = target.logits(out.post_norm_BRD, view=True)
                normed = target.norm(out.pre_norm_BRD)
                worst = max(worst, float((got - wanted[n : n + 1, done : done + rows]).abs().max()))
                worst = max(worst, float((normed - out.post_norm_BRD).abs().max()))
                done += rows
        found[n] = worst

    threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and max(found.values()) < 1e-3


def test_a_call_inside_a_call_may_see_another_model(start):
    """A stopping criterion that decodes without the adapter leaves the outer call its own."""
    model = peft.get_peft_model(copy.deepcopy(start), adapters(start)["lora"]).eval()
    mtp = get_mtp_model(model, METHODS["sequential"])
    wanted = say(model)
    with model.disable_adapter():
        plain = say(model)
    seen = []

    def criterion(ids: torch.Tensor, scores: Any) -> bool:
        if len(seen) < 2:
            with model.disable_adapter():
                with mtp.target.reading():
                    rows = mtp.target.forward_rows(PROMPT, torch.tensor([0]), SlotCache(1, 64), visible=9)
                    seen.append(int(mtp.target.logits(rows.post_norm_BRD, view=True)[0, -1].argmax()))
        return False

    assert mtp_say(mtp, stopping_criteria=[criterion]) == wanted
    assert seen == [plain[9]] * 2
