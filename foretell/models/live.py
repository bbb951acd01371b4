"""What a live module is right now, and a copy of its tree that shares everything with it but what must differ.

`signature` and `digest` say whether a module still is what it was; `shallow` makes the copy, over the SAME parameters,
hooks and containers, so that most of what changes in the module later is seen by the copy at once.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import itertools
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor, nn, overrides
from torch.nn.modules import module as torch_module
from torch.utils import _python_dispatch
from torch.utils._device import DeviceContext
from transformers import PreTrainedConfig
from transformers.utils.generic import GeneralInterface

from foretell.models.rotary import turns_by_length

_STANDARD = frozenset(nn.Module().__dict__)
# of a model, but nothing that its forward reads; the masks are ours
_OTHER = {"prepare_inputs_for_generation", "generation_config", "foretell_masks", "foretell_comb"}
_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_DEEP = 4  # levels of lists, dicts and closures that are looked into


class OfThread(threading.local):
    """What belongs to the forward that runs in this thread. A copy or a pickle of it starts empty."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class _Same:
    """Equal to nothing but the same object."""

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def signature(module: nn.Module) -> tuple[tuple, tuple]:
    """(everything that decides what a forward computes but the weights' values, where the weights lie)."""
    structure: list[Any] = []
    places: list[int] = []
    configs: set[int] = set()
    running: dict[Any, None] = {}
    for part in _parts(module):
        if turns_by_length(part):  # it remembers the longest text; what stands in for it asks it anew each time
            continue
        own = [part, type(part), tuple(part._modules)]
        running |= {type(part).__call__: None, type(part).forward: None, part.__dict__.get("forward"): None}
        hooks = [tuple(getattr(part, kind)) for kind in _HOOKS if getattr(part, kind)]
        plain = [
            (name, _frozen(value, configs))
            for name, value in part.__dict__.items()
            if name not in _STANDARD and name not in _OTHER
        ]
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    own.append(name)
                else:
                    own += (name, tensor.dtype, tensor.device, tensor.shape)
                    places.append(_place(tensor))
        structure.append((*own, *hooks, *plain))
    called: dict[Any, None] = {}
    for function in running:
        _follow_calls(function, called)
    return (*structure, *called), tuple(places)


def _follow_calls(function: Any, called: dict[Any, None]) -> None:
    """Every function that this one may call by a name of its file, or of a module there: anybody may set another."""
    function = inspect.unwrap(function.__func__ if isinstance(function, types.MethodType) else function)
    if function in called or not isinstance(function, types.FunctionType):
        return
    called[function] = None
    names, spaces = function.__code__.co_names, [function.__globals__]
    for space in spaces:
        for value in [space[name] for name in names if name in space]:
            if isinstance(value, types.ModuleType) and len(spaces) < _DEEP:
                spaces.append(vars(value))
            elif isinstance(value, types.FunctionType) and space is function.__globals__:
                _follow_calls(value, called)
            elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
                called[value] = None
            elif isinstance(value, GeneralInterface):  # attention functions by name
                called.update(dict.fromkeys(value.values()))


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    seen, waiting = set(), [module]
    while waiting:
        part = waiting.pop()
        if part is not None and id(part) not in seen:
            seen.add(id(part))
            yield part
            waiting.extend(part._modules.values())


def _place(tensor: Tensor) -> int:
    # tensors of a class of their own may lie nowhere
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else id(tensor)


def _frozen(value: Any, configs: set[int], deep: int = 0) -> Any:
    """The value as something that can be compared later, though the value may change."""
    if isinstance(value, (*_VALUES, type, types.FunctionType, types.MethodType)):
        return value
    if isinstance(value, Tensor):
        return (_place(value), value.dtype, value.device, tuple(value.shape))
    if isinstance(value, PreTrainedConfig) and id(value) not in configs:
        configs.add(id(value))  # its values stand once, where it is met first
        return (_Same(value), _frozen(vars(value), configs, 1))
    if deep < _DEEP and isinstance(value, (list, tuple)):
        return (type(value), *[_frozen(one, configs, deep + 1) for one in value])
    if deep < _DEEP and isinstance(value, dict):
        return tuple([(_frozen(k, configs, _DEEP), _frozen(one, configs, deep + 1)) for k, one in value.items()])
    if deep < _DEEP and isinstance(value, (set, frozenset)):
        return frozenset(_frozen(one, configs, _DEEP) for one in value)
    return _Same(value)


def surroundings(device: torch.device) -> tuple[bool, tuple]:
    """(whether a fused part says here what the modules it stands for say, what around a model decides its numbers)."""
    cast = torch.is_autocast_enabled(device.type)
    watching = tuple(torch_module._global_forward_hooks), tuple(torch_module._global_forward_pre_hooks)
    # what may change any operation, by whatever it holds; a device context only says where new tensors go
    around = [*overrides._get_current_function_mode_stack(), *_python_dispatch._get_current_dispatch_mode_stack()]
    modes = tuple(_Same(mode) for mode in around if type(mode) is not DeviceContext)
    kind = torch.get_autocast_dtype(device.type) if cast else None
    return not (cast or modes or any(watching)), (kind, *modes, *watching, torch.get_default_dtype())


def digest(tensors: Iterable[Tensor]) -> int:
    """A number for the values: any write by any path changes it."""
    total = 0
    for tensor in tensors:
        total = (total * 1_000_003 + _digest(tensor.detach())) % 2**64
    return total


def _digest(tensor: Tensor) -> int:
    if type(tensor) not in (Tensor, nn.Parameter):
        return tensor._version
    flat = tensor.contiguous().view(-1)
    if flat.numel() == 0 or flat.device.type == "meta":
        return 0
    if flat.device.type == "cpu":
        # not through numpy, after which torch resizes that memory no more (FSDP frees gathered weights so)
        return xxhash.xxh3_64_intdigest((ctypes.c_uint8 * flat.nbytes).from_address(flat.data_ptr()))
    # elsewhere: sums of rows, each with a factor of its own, so that moved rows count too
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    rows_R = flat.view(whole).view(tensor.shape[0] if tensor.dim() > 1 else -1, *tensor.shape[1:]).flatten(1)
    sum_R = rows_R.sum(1, dtype=torch.int64) if tensor.dim() > 1 else flat.view(whole).long()
    factor_R = torch.arange(1, len(sum_R) + 1, device=flat.device) * 2_654_435_761 + 1
    return int((sum_R * factor_R).sum()) * 31 + tensor._version


def untouched(part: nn.Module) -> bool:
    """Whether nothing was hung on a module or any below it: no hooks, no forward of its own."""
    return not any("forward" in one.__dict__ or _hooked(one) for one in _parts(part))


def _hooked(part: nn.Module) -> bool:
    hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    # transformers hangs its own on layers at the first call that asks for states, and they do nothing in any other
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)


class _Hooks(OrderedDict):
    """The hooks of a live module as its copy runs them: they get the live module. What is hung on the copy stays."""

    def __init__(self, live: nn.Module, kind: str) -> None:
        super().__init__()
        self.live, self.kind = live, kind

    def __len__(self) -> int:
        return len(getattr(self.live, self.kind)) + super().__len__()

    def items(self) -> Any:
        """See dict."""
        of_live = getattr(self.live, self.kind).items()
        return [*((key, self._with_live(hook)) for key, hook in of_live), *super().items()]

    def values(self) -> Any:
        """See dict."""
        return [hook for _, hook in self.items()]

    def _with_live(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda _copy, *rest: hook(self.live, *rest)


Swap = Callable[[str, nn.Module], "nn.Module | None"]


def shallow(
    module: nn.Module, swap: Swap, changed: Callable[[str, Any], Any] = lambda _name, value: value
) -> nn.Module:
    """A tree of its own over the same parameters, in eval mode, with what `swap(path, part)` gives in a part's place.

    Attributes that lead to other modules of the tree (methods, partial calls, closures, lists) lead to their copies;
    configs are copies too. changed(name, value): another value for a plain attribute or a config's.
    """
    made: dict[int, Any] = {}
    twins: list[tuple[nn.Module, nn.Module]] = []

    def enter(part: nn.Module, path: str) -> nn.Module:
        if id(part) in made:
            return made[id(part)]
        new = swap(path, part) if path else None
        if new is None and path and _hooked(part) and not part._modules and not part.training:
            new = part  # a hook may hang what it computes on the module, and the module read it
        if new is not None:
            made[id(part)] = new
            return new
        twin = made[id(part)] = object.__new__(type(part))
        twins.append((part, twin))
        below = f"{path}." if path else ""
        children = {
            name: None if child is None else enter(child, below + name) for name, child in part._modules.items()
        }
        twin.__dict__["_modules"] = children
        return twin

    root = enter(module, "")
    for part, twin in twins:
        own = {n: v if n in _STANDARD else changed(n, _followed(v, made, changed)) for n, v in part.__dict__.items()}
        own |= {"_modules": twin.__dict__["_modules"], "_buffers": dict(part._buffers), "training": False}
        own |= {kind: _Hooks(part, kind) for kind in _HOOKS}
        own["_compiled_call_impl"] = None  # a compiled call would run the live module
        twin.__dict__.update(own)
    return root


def _followed(value: Any, made: dict[int, Any], changed: Callable[[str, Any], Any], deep: int = 0) -> Any:
    """The value, with copies in place of the modules and configs that it leads to; itself if it leads to none."""
    follow = functools.partial(_followed, made=made, changed=changed, deep=deep + 1)
    if isinstance(value, (*_VALUES, Tensor)) or deep > _DEEP:
        return value
    if isinstance(value, nn.Module):
        return made.get(id(value), value)
    if isinstance(value, PreTrainedConfig):
        if id(value) not in made:
            twin = made[id(value)] = object.__new__(type(value))
            twin.__dict__.update({n: changed(n, follow(v)) for n, v in vars(value).items()})
        return made[id(value)]
    if isinstance(value, types.MethodType):
        owner = made.get(id(value.__self__))
        own = owner is value.__self__ or type(owner) is not type(value.__self__)
        return value if own else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        n, given = 1 + len(value.args), (value.func, *value.args, *value.keywords.values())
        again = lambda new: functools.partial(new[0], *new[1:n], **dict(zip(value.keywords, new[n:])))  # noqa: E731
        return _unless_same(value, given, follow, again)
    if isinstance(value, types.FunctionType):
        return _function(value, follow)
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return _unless_same(value, value, follow, type(value))
    if type(value) in (dict, OrderedDict):
        return _unless_same(value, list(value.values()), follow, lambda new: type(value)(zip(value, new)))
    return value


def _unless_same(value: Any, parts: Iterable[Any], follow: Callable[[Any], Any], make: Callable[[list], Any]) -> Any:
    old = list(parts)
    new = [follow(one) for one in old]
    return value if all(a is b for a, b in zip(old, new)) else make(new)


def _function(function: types.FunctionType, follow: Callable[[Any], Any]) -> types.FunctionType:
    """A function whose closure or defaults lead to live modules, over their copies."""
    cells = function.__closure__ or ()
    full = [cell for cell in cells if _is_filled(cell)]
    keywords = function.__kwdefaults__ or {}
    given = [*(cell.cell_contents for cell in full), *(function.__defaults__ or ()), *keywords.values()]

    def make(new: list) -> types.FunctionType:
        fresh = iter(new)
        closed = []
        for cell in cells:
            if not _is_filled(cell):
                closed.append(cell)
                continue
            inside = next(fresh)
            closed.append(cell if inside is cell.cell_contents else types.CellType(inside))
        defaults = tuple(itertools.islice(fresh, len(function.__defaults__ or ()))) or None
        made = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, tuple(closed))
        made.__kwdefaults__ = dict(zip(keywords, fresh)) or None
        made.__dict__.update(function.__dict__)
        return made

    return _unless_same(function, given, follow, make)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
