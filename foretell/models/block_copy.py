"""A decoder layer of the target's, copied for a module: one that runs by itself, found by running it."""

# B sequences, T positions, D hidden width.

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from foretell.models.attention import NAME, RowMasks, WideAttention
from foretell.models.refusals import UnsupportedModelError
from foretell.models.target import Target, linear_of, matrix_of


def block_copy(target: Target) -> tuple[nn.Module, str | None]:
    """A copy of the last decoder layer that runs by itself, attending through our function, and its layer type.

    The copy owns its parameters and its config. Some layers read what others hand them (those that share keys and
    values): then it is an earlier layer.
    """
    kinds = getattr(target.config, "layer_types", None) or [None] * len(target.layers)
    problems: dict[tuple[Any, ...], str] = {}
    name = f"{type(target.model).__name__} ({target.config.model_type})"
    for layer, kind in zip(reversed(target.layers), reversed(kinds), strict=False):
        like = (type(layer), kind, *((name, p.shape) for name, p in layer.named_parameters()))
        if like in problems:
            continue
        try:
            block = _copied(layer, target)
            _run_alone(target, block, kind)
        except Exception as problem:  # whatever code of others raises where it misses something
            problems[like] = f"{type(problem).__name__}: {problem}"
        else:
            return block, kind
    raise UnsupportedModelError(
        f"{name} has no decoder layer that runs by itself "
        f"({next(iter(problems.values()))[:200]}); wanted one to copy. The methods 'masked' and 'heads' (of any "
        "type but 'layer') need none."
    )


def _copied(layer: nn.Module, target: Target) -> nn.Module:
    own = copy.copy(target.config)
    own._attn_implementation_internal = NAME
    block = copy.deepcopy(layer, {id(target.config): own})
    unpacked: tuple[str, ...] = ()
    # a quantized linear can learn nothing, and an adapter is the target's own: their copies are ordinary linears
    for path, part in list(block.named_modules()):
        packed = any(not p.dtype.is_floating_point for p in part.parameters()) or hasattr(part, "base_layer")
        if packed and hasattr(part, "in_features") and not path.startswith(unpacked):
            unpacked += (f"{path}.",)
            with torch.no_grad():
                weight, bias = matrix_of(part, part.in_features, next(target.norm.parameters(), target.head.weight))
            block.set_submodule(path, linear_of(weight, None if part.bias is None else bias))
        if getattr(part, "config", None) is not None and hasattr(part, "layer_idx"):
            part.config = own
    if whole := {str(p.dtype) for p in block.parameters() if not p.dtype.is_floating_point}:
        raise ValueError(f"weights of {', '.join(sorted(whole))} can learn nothing")
    return block


def widen(target: Target, block: nn.Module, layer_type: str | None) -> None:
    """Let a layer's queries, keys and values read an embedding too; at the start it says what it said without."""
    try:
        plain_BTD = _run_alone(target, block, layer_type)
        missing = [name for name in ("input_layernorm", "self_attn") if name not in block._modules]
        if missing or any(type(getattr(block.self_attn, f"{name}_proj", None)) is not nn.Linear for name in "qkv"):
            raise ValueError("no linears q_proj, k_proj and v_proj in a self_attn behind an input_layernorm")
        block.self_attn = WideAttention(block.self_attn)
        wide_BTD = _run_alone(target, block, layer_type, embedding_BRD=torch.ones_like(plain_BTD))
        if not torch.allclose(wide_BTD, plain_BTD, rtol=1e-2, atol=1e-2 * float(plain_BTD.abs().max())):
            raise ValueError("something else reads what they read")
    except Exception as problem:  # as above
        raise UnsupportedModelError(
            f"block: got 'eagle3' for {type(target.model).__name__} ({target.config.model_type}), whose layer is of "
            f"another form ({str(problem)[:200]}); wanted attention whose queries, keys and values are linears of one "
            "normed state. Use block='mtp'."
        ) from problem


@torch.no_grad()
def _run_alone(target: Target, block: nn.Module, layer_type: str | None, **beside: Tensor) -> Tensor:
    """Two tokens through a layer, as a module runs its block."""
    position_ids_BT = torch.arange(2, device=target.device)[None]
    masks = RowMasks()
    masks.begin_text(torch.zeros_like(position_ids_BT))
    masks.hang_on(block)
    hidden_BTD = target.embed(position_ids_BT)
    places = target.position_embeddings(hidden_BTD, position_ids_BT, layer_type)
    out = block(
        hidden_BTD,
        attention_mask=None,
        position_ids=position_ids_BT,
        position_embeddings=places,
        use_cache=False,
        **beside,
    )
    block.foretell_windows = masks.windows()  # what a cache of its own need not keep
    out = out[0] if isinstance(out, tuple) else out
    if out.shape != hidden_BTD.shape:
        raise ValueError(f"states {tuple(hidden_BTD.shape)} come out as {tuple(out.shape)}")
    return out
