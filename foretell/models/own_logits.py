"""What a model does to its states and logits around its output head: asked of its own forward, never guessed from a
key of its config (some have the key and do not use it, others have a name of their own for it).

The model's own forward runs with its decoder exchanged for one that returns given states, on a clone of the modules
between the two, so that nobody else's call sees it.
"""

# B sequences, T positions, D hidden width, V vocabulary, N numbers.

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

# powers of ten that the head is said to have given: from where a cap is linear to where it has long been reached
SIZES = (-6, 6)


@dataclass(frozen=True)
class LogitFormula:
    """logits = softcap * tanh(scale * head(state) / softcap); softcap None is no cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """From what the head gives to what the model gives."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


class _Output(BaseModelOutputWithPast):
    """States, and None for everything else that a model might ask its decoder's output for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _clone(part: nn.Module) -> nn.Module:
    clone = object.__new__(type(part))  # copy.copy asks how it is pickled, and a parametrized one refuses
    clone.__dict__.update(part.__dict__, _compiled_call_impl=None)  # a compiled call would run the live module
    return clone


def _stand_in(part: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """The part with another forward and no hooks; what others look up in it is still there."""
    clone = _clone(part)
    hooks = {name: OrderedDict() for name in part.__dict__ if name.endswith("_hooks")}
    clone.__dict__.update(hooks, forward=forward)
    return clone


def _with(model: nn.Module, parts: dict[nn.Module, nn.Module]) -> nn.Module:
    """A clone of the modules from the model down to each of these parts, which are exchanged; the rest is shared."""
    if model in parts:
        return parts[model]
    inside = {name: child for name, child in model._modules.items() if child is not None}
    changed = {name: _with(child, parts) for name, child in inside.items()}
    changed = {name: child for name, child in changed.items() if child is not inside[name]}
    if not changed:
        return model
    clone = _clone(model)
    clone.__dict__["_modules"] = {**model._modules, **changed}
    # one that was set on the object (TRL's fused losses, accelerate's autocast) is bound to the original
    clone.__dict__.pop("forward", None)
    return clone


@torch.no_grad()
def own_logits(model: Any, state_BTD: Tensor, head: nn.Module | None = None) -> Tensor:
    """[B, T, D] states as its decoder returns them -> [B, T, V], by the model's own forward.

    head: stands in for its output head.
    """
    decoder, output = model.get_decoder(), _Output(last_hidden_state=state_BTD)
    parts = {decoder: _stand_in(decoder, lambda *args, **kwargs: output)}
    if head is not None:
        parts[model.get_output_embeddings()] = head
    ids_BT = torch.zeros(state_BTD.shape[:2], dtype=torch.long, device=state_BTD.device)
    clone = _with(model, parts)
    clone.__dict__.pop("forward", None)  # one that was set on the model (TRL's) is bound to it: the class's is asked
    return clone(input_ids=ids_BT, use_cache=False, return_dict=True).logits


def logit_formula(model: Any) -> LogitFormula | None:
    """The formula that its forward follows, found on numbers; None if it follows none of this form."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    weight, numbers = head.weight, _numbers(model.config.to_dict())
    V, D = weight.shape[0], config.hidden_size
    T = -(-8 // V)  # a small vocabulary takes several positions
    sizes_N = torch.logspace(*SIZES, max(4, min(V // 2, 64)), device=weight.device, dtype=torch.float32)
    given_N = torch.cat([sizes_N, -sizes_N]).repeat(-(-T * V // (2 * len(sizes_N))))[: T * V].clone()
    taken: list[Tensor] = []

    def say(state_BTD: Tensor) -> Tensor:
        taken.append(state_BTD)
        return given_N.view(1, T, V)

    state_D = torch.ones(D, dtype=weight.dtype, device=weight.device)
    state_D[::2] = -0.5
    made = own_logits(model, state_D.expand(1, T, D), _stand_in(head, say))
    if len(taken) != 1 or taken[0].shape != (1, T, D) or made.shape != (1, T, V):
        return None
    taken_D, made_N = taken[0][0, 0], made.flatten().float()
    before = _snapped(float(taken_D[1] / state_D[1]), numbers, taken_D.dtype)
    loose = 4 * torch.finfo(taken_D.dtype).eps
    if not torch.allclose(taken_D, before * state_D, rtol=loose, atol=loose):
        return None
    if before != 1.0 and getattr(head, "bias", None) is not None:
        return None  # only the product is scaled, and the losses scale the bias with it
    after = _snapped(float(made_N[0] / given_N[0]), numbers, made.dtype)
    largest = len(sizes_N) - 1
    capped = float(made_N[largest]) == float(made_N[largest - 1])
    softcap = _snapped(float(made_N[largest]), numbers, made.dtype) if capped else None
    loose = max(1e-5, 4 * torch.finfo(made.dtype).eps)
    if after <= 0 or not torch.allclose(LogitFormula(after, softcap)(given_N), made_N, rtol=loose, atol=0.0):
        return None
    return LogitFormula(after * before, softcap)


def _numbers(config: dict[str, Any]) -> list[float]:
    """Those that a config holds, wherever they stand: the factor that was found is likely one of them."""
    inside = [_numbers(value) for value in config.values() if isinstance(value, dict)]
    return [float(v) for v in config.values() if type(v) in (int, float) and v > 0] + [n for one in inside for n in one]


def _snapped(found: float, numbers: list[float], dtype: torch.dtype) -> float:
    """What was found up to rounding, as exactly as the config says it."""
    loose = 4 * torch.finfo(dtype).eps * abs(found)
    likely = chain((1.0,), numbers, (1.0 / n for n in numbers), (a / b for a in numbers for b in numbers))
    return next((value for value in likely if abs(value - found) <= loose), found)
