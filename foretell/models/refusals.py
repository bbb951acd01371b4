"""What cannot be honoured in a target, by name: kinds of models, and what was hung on one that decoding would drop."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_RECURRENT = ("mamba", "linear_attention", "recurrent", "conv", "rwkv", "ssm", "hybrid", "xlstm")
# PEFT's arguments of one call, which it hands on through hooks: our rows are other rows than the caller's
_CALL_HOOKS = {"_adapter_names_pre_forward_hook": "adapter_names", "_alora_offsets_pre_forward_hook": "alora_offsets"}
# of a call of generate, which decoding does not make: whoever has others says another text
_STEPS = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_sample")
_OWN_FORWARD = ("XLORA", "POLY", "ADAPTION_PROMPT")  # adapters that ask for more than the rows at hand


class UnsupportedModelError(ValueError):
    """The target's architecture has no place for an MTP module, or it cannot be decoded exactly, and why."""


def norm_name(decoder: nn.Module) -> str | None:
    """What a decoder calls its final norm."""
    return next((n for n in ("norm", "final_layer_norm", "final_layernorm") if hasattr(decoder, n)), None)


def refuse_model(outer: nn.Module, model: nn.Module) -> None:
    """Raise UnsupportedModelError for a model that cannot have a module. outer: as the user gave it."""
    config, name = getattr(model, "config", None), type(model).__name__
    want = "a decoder-only causal LM with standard attention and rotary positions (Llama, Qwen, Mistral, Gemma, ...)"
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise UnsupportedModelError(f"got {name}, wanted {want} from transformers: load one with AutoModelForCausalLM.")
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} ({config.model_type}) is an encoder-decoder; wanted {want}.")
    kinds = {str(kind) for kind in (getattr(text, "layer_types", None) or [])}
    other = sorted(kind for kind in kinds if any(word in kind for word in _RECURRENT))
    if other or getattr(model, "_is_stateful", False) or any(word in config.model_type for word in ("mamba", "rwkv")):
        why = f"layers of kind {', '.join(other)}" if other else "a recurrent state"
        raise UnsupportedModelError(
            f"{name} ({config.model_type}) has {why}: linear-attention and state-space models cannot roll back "
            f"rejected drafts and are not supported. Wanted {want}."
        )
    decoder: Any = model.get_decoder()
    parts = {
        "output head": model.get_output_embeddings() is not None,
        "rotary positions": hasattr(decoder, "rotary_emb"),
        "list of layers": hasattr(decoder, "layers"),
        "final norm": norm_name(decoder) is not None,
    }
    if missing := [part for part, there in parts.items() if not there]:
        raise UnsupportedModelError(f"{name} ({config.model_type}) has no {' and no '.join(missing)}; wanted {want}.")
    refuse_adapter(outer)
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(places) > 1:
        raise UnsupportedModelError(_elsewhere(name, places))


def _elsewhere(name: str, places: set[str]) -> str:
    return (
        f"{name} lies in several places ({', '.join(sorted(places))}); wanted all of it on one device and nothing "
        "offloaded: load it with device_map={'': device}."
    )


def refuse_adapter(outer: nn.Module) -> None:
    """Raise UnsupportedModelError for an active adapter that acts outside the layers."""
    config = getattr(outer, "active_peft_config", None)
    kind = str(getattr(getattr(config, "peft_type", None), "value", ""))
    if config is not None and (config.is_prompt_learning or kind in _OWN_FORWARD):
        raise UnsupportedModelError(
            f"got an active adapter of kind {kind}, which acts outside the model's layers (virtual tokens, or weights "
            "chosen per text); wanted adapters inside the layers (LoRA and its kin), or the model without it."
        )


def refuse_now(outer: nn.Module, model: Any) -> None:
    """Raise UnsupportedModelError for what stands around the live model now and decoding would leave out."""
    name = type(model).__name__
    refuse_adapter(outer)
    prepare = model.__dict__.get("prepare_inputs_for_generation")
    owner = getattr(prepare, "__self__", None)
    adapted = prepare is not None and getattr(owner, "active_peft_config", None) is not None
    given_back = owner is model and prepare.__func__ is getattr(type(model), _STEPS[0], None)  # PEFT does, after a call
    here = model.__dict__.keys() & {*_STEPS[1:], *(() if adapted or given_back else _STEPS[:1])}
    own = {step: getattr(getattr(type(model), step, None), "__globals__", {}).get("__name__", "") for step in _STEPS}
    replaced = sorted(here | {step for step in _STEPS if own[step].partition(".")[0] not in ("transformers", "torch")})
    if replaced:
        raise UnsupportedModelError(
            f"{name}.{replaced[0]} is not transformers' own, and foretell prepares rows and goes from token to token "
            "itself; wanted transformers'."
        )
    if adapted:
        refuse_adapter(owner)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        if not isinstance(part.weight, Tensor):
            raise UnsupportedModelError(f"{name}: {type(part).__name__}.weight is no tensor that a module can borrow.")
    places = {str(parameter.device) for parameter in model.parameters()}
    if len(places) > 1 or "meta" in places:
        raise UnsupportedModelError(_elsewhere(name, places))


def refuse_hooks(model: Any) -> bool:
    """Whether something hangs on what holds the decoder, so that logits must pass through it.

    Raises UnsupportedModelError for hooks on the live model that decoding would leave out.
    """
    decoder, given = model.get_decoder(), set()
    for part in model.modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            name = getattr(getattr(hook, "func", None), "__name__", "")
            if name in _CALL_HOOKS:
                given.add(_CALL_HOOKS[name])
                del part._forward_pre_hooks[key]  # PEFT does so at the end of a call, but not after an error
    if given:
        raise UnsupportedModelError(
            f"foretell's generate cannot honour: {', '.join(sorted(given))} (rows of several texts share a forward). "
            "Use set_adapter."
        )
    above = [part for part in model.modules() if part is not decoder and any(one is decoder for one in part.modules())]
    for part in above:
        if part._forward_pre_hooks or part._forward_hooks_with_kwargs:
            raise UnsupportedModelError(
                f"{type(part).__name__} has hooks that see its inputs, and decoding calls the decoder inside it with "
                "rows of its own: register them on the decoder or a layer."
            )
    return any(part._forward_hooks for part in above)


def differences(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Tensors that are missing, unknown, or of another shape."""
    found = [f"missing {name}" for name in wanted if name not in got]
    found += [f"unknown {name}" for name in got if name not in wanted]
    shapes = [(n, tuple(got[n].shape), tuple(t.shape)) for n, t in wanted.items() if n in got]
    return found + [f"{n} has shape {one}, wanted {other}" for n, one, other in shapes if one != other]


def first_of(problems: list[str]) -> str:
    """The first eight, and how many more there are."""
    return "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
