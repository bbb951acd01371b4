"""A second module tree over the same weights, for decoding without gradient on a CPU: packed linears, fused norms, and
whole decoder layers of the plain kind in a third of their operations.

Nothing of a modelling file is copied: modules are swapped by type, norms and layers only after their formula was
checked on numbers.
"""

# B sequences, R rows of a step, Hq query heads, H key-value heads, E width of a head, D hidden width.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foretell.models.attention import NAME, RowMasks, foretell_attention
from foretell.models.gated_lora import GatedAdapters, GatedLinear, RowAdapter
from foretell.models.kernels import Measured, settle
from foretell.models.linears import PACKABLE, NormedLinear, PackedLinear, fused_norm
from foretell.models.live import OfThread, Swap, digest, shallow, signature, surroundings, untouched
from foretell.models.slot_cache import CACHE_NAMES

_LINEAR = nn.Linear.forward
_PACKED_LIMIT = 0.4  # of free memory: a large model on a small machine goes without
# pre-norm layers of attention and gated MLP with nothing between: what FusedLayer computes; where each keeps its window
PLAIN_LAYERS: dict[str, Callable[[Any], int | None]] = {
    "LlamaDecoderLayer": lambda attention: None,
    "MistralDecoderLayer": lambda attention: getattr(attention.config, "sliding_window", None),
    "Qwen2DecoderLayer": lambda attention: attention.sliding_window,
    "Qwen3DecoderLayer": lambda attention: attention.sliding_window,
}


def _can_pack(module: nn.Module) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    size = sum(m.weight.nbytes for m in module.modules() if type(m) is nn.Linear)
    try:
        import psutil

        return size < _PACKED_LIMIT * psutil.virtual_memory().available
    except ImportError:
        return size < 2**31


class Rotation(OfThread):
    """cos, and sin with the sign that turns, of the step's positions, made once a step from what transformers hands to
    every layer.
    """

    def __init__(self) -> None:
        self._cos: Tensor | None = None

    def of(self, cos_BRE: Tensor, sin_BRE: Tensor) -> tuple[Tensor, Tensor]:
        """[B, R, 1, E] each: x cos + (x with its halves exchanged) sin."""
        if self._cos is not cos_BRE:
            first, second = sin_BRE.chunk(2, dim=-1)
            self._cos = cos_BRE
            self._turn = cos_BRE[:, :, None], torch.cat([-first, second], dim=-1)[:, :, None]
        return self._turn


class FusedLayer(nn.Module):
    """A plain decoder layer in about twenty operations: queries, keys and values from one product, as gate and up.

    Numbers narrower than fp32 are rounded where the layer rounds them. Its slow twin is the layer it stands for:
    `_fused_layer` compares them before it is used, the tests again.
    """

    def __init__(self, layer: nn.Module, rotation: Rotation) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.rotation = rotation
        norms = fused_norm(layer.input_layernorm), fused_norm(layer.post_attention_layernorm)
        self.E = E = attention.head_dim
        self.has_qk_norm = hasattr(attention, "q_norm")
        if self.has_qk_norm:
            self.q_norm, self.k_norm = fused_norm(attention.q_norm), fused_norm(attention.k_norm)
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        self.Hq, self.H = q.out_features // E, k.out_features // E
        self.qkv = NormedLinear(norms[0], PackedLinear.of(q, k, v))
        self.o = PackedLinear.of(attention.o_proj)
        self.gate_up = NormedLinear(norms[1], PackedLinear.of(mlp.gate_proj, mlp.up_proj))
        self.down, self.act = PackedLinear.of(mlp.down_proj), mlp.act_fn
        self.place = nn.Module()  # what the attention function asks its module for; the masks are hung on it
        self.place.layer_idx = self.layer = attention.layer_idx
        self.scaling, self.window = attention.scaling, PLAIN_LAYERS[type(layer).__name__](attention)
        self.gate: GatedAdapters | None = None  # adapters of mask rows, where a masked module has given some
        self.added: dict[str, RowAdapter] = {}
        self.general: bool | None = None  # whether it is the layer's twin with other weights too; None: nobody asked
        # straight to the functions: at one row, calling through nn.Module costs as much as a small operation
        self._qkv, self._o = self.qkv.forward, self.o.plus
        self._gate_up, self._down, self._act = self.gate_up.forward, self.down.plus, mlp.act_fn.forward

    def renew(self, layer: nn.Module) -> bool:
        """See Measured."""
        if self.general is None:
            self.general = _fused_layer(_with_other_weights(layer), Rotation()) is not None
        norms = [(self.qkv.norm, layer.input_layernorm), (self.gate_up.norm, layer.post_attention_layernorm)]
        if self.has_qk_norm:
            norms += [(self.q_norm, layer.self_attn.q_norm), (self.k_norm, layer.self_attn.k_norm)]
        linears = self.qkv.linear, self.o, self.gate_up.linear, self.down
        return self.general and all(part.renew(live) for part, live in (*norms, *((one, layer) for one in linears)))

    def gated(self, adapters: GatedAdapters, path: str) -> None:
        """Adapters of the linears below this path, laid side by side as the products are."""
        E = self.E
        self.gate, self.added = None, {}
        widths = {"q": self.Hq * E, "k": self.H * E, "v": self.H * E}
        parts = {
            "qkv": ("self_attn", widths),
            "o": ("self_attn", {"o": self.o.out_features}),
            "gate_up": ("mlp", dict.fromkeys(("gate", "up"), self.gate_up.linear.out_features // 2)),
            "down": ("mlp", {"down": self.down.out_features}),
        }
        for product, (place, outs) in parts.items():
            paths = [f"{path}.{place}.{name}_proj" for name in outs]
            if any(one in adapters.of for one in paths):
                self.gate = adapters
                self.added[product] = RowAdapter(adapters, paths, list(outs.values())).to(self.o.weight.dtype)

    def _add(self, product: str, out: Tensor, x_nD: Tensor) -> None:
        if product in self.added:
            self.added[product].add(out.view(-1, out.shape[-1]), x_nD)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, R, D] -> [B, R, D], as transformers' layers are called."""
        B, R, D = hidden_states.shape
        H, Hq, E = self.H, self.Hq, self.E
        rows = None if self.gate is None else self.gate.rows  # mask rows: the adapters' and nobody else's
        qkv = self._qkv(hidden_states)
        if rows is not None:
            self._add("qkv", qkv, self.qkv.normed(hidden_states.view(-1, D)[rows]))
        qkv = qkv.view(B, R, Hq + 2 * H, E)
        if self.has_qk_norm:
            qkv[:, :, :Hq] = self.q_norm(qkv[:, :, :Hq])
            qkv[:, :, Hq : Hq + H] = self.k_norm(qkv[:, :, Hq : Hq + H])
        cos_BR1E, sin_BR1E = self.rotation.of(*position_embeddings)
        turned = qkv[:, :, : Hq + H]
        exchanged = turned.roll(E // 2, -1).mul_(sin_BR1E)
        turned.mul_(cos_BR1E).add_(exchanged)
        query = qkv[:, :, :Hq].transpose(1, 2)
        cache = next((kwargs[name] for name in CACHE_NAMES if name in kwargs), None)
        if cache is not None:
            key, value = cache.extend(qkv[:, :, Hq:], self.layer)
        else:
            key, value = (part.transpose(1, 2) for part in qkv[:, :, Hq:].chunk(2, dim=2))
        out, _ = foretell_attention(
            self.place, query, key, value, attention_mask, scaling=self.scaling, sliding_window=self.window
        )
        mixed = out.reshape(B, R, Hq * E)
        hidden = self._o(mixed, hidden_states)
        if rows is not None:
            self._add("o", hidden, mixed.view(-1, Hq * E)[rows])
        gate_up = self._gate_up(hidden)
        if rows is not None:
            self._add("gate_up", gate_up, self.gate_up.normed(hidden.view(-1, D)[rows]))
        gate, up = gate_up.chunk(2, dim=-1)
        inner = self._act(gate).mul_(up)
        out = self._down(inner, hidden)
        if rows is not None:
            self._add("down", out, inner.view(-1, inner.shape[-1])[rows])
        return out


def _fused_layer(layer: nn.Module, rotation: Rotation) -> FusedLayer | None:
    """The fused twin of a plain layer, or None: another kind, adapters, hooks, or other numbers."""
    if type(layer).__name__ not in PLAIN_LAYERS or not untouched(layer):
        return None
    attention, mlp = layer._modules.get("self_attn"), layer._modules.get("mlp")
    if not type(attention).__module__ == type(mlp).__module__ == type(layer).__module__ or "act_fn" not in mlp._modules:
        return None  # somebody's own in their places
    linears = [getattr(attention, f"{name}_proj") for name in "qkvo"]
    linears += [getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")]
    if not all(_plain_linear(m) for m in linears) or len({m.weight.dtype for m in linears}) > 1:
        return None
    norms = [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    if any(fused_norm(norm) is None for norm in (layer.input_layernorm, layer.post_attention_layernorm, *norms)):
        return None
    fused, plain, dtype = FusedLayer(layer, rotation), attending_copy(layer), linears[0].weight.dtype
    masks = RowMasks()
    masks.begin_text(torch.zeros(1, 5, dtype=torch.long))
    masks.hang_on(plain)
    fused.place.__dict__["foretell_masks"] = masks
    probe_BRD = torch.linspace(-2, 3, 5 * linears[0].in_features, dtype=torch.float32).sin().view(1, 5, -1).to(dtype)
    angle_E = torch.linspace(0.1, 1, fused.E // 2, dtype=torch.float32).repeat(2)
    angle_BRE = torch.arange(5)[None, :, None] * angle_E
    places = angle_BRE.cos().to(dtype), angle_BRE.sin().to(dtype)
    call = {"position_embeddings": places, "position_ids": torch.arange(5)[None]}
    with torch.no_grad():
        wanted, got = plain(probe_BRD, attention_mask=None, **call), fused(probe_BRD, **call)
    near = 1e-4 if dtype == torch.float32 else 2e-2
    near_zero = near * float(wanted.nan_to_num().abs().max())  # weights may be no numbers: so is what a layer says
    return fused if torch.allclose(got, wanted, rtol=near, atol=near_zero, equal_nan=True) else None


def _with_other_weights(layer: nn.Module) -> nn.Module:
    """A copy with drawn weights: what agrees with those does not do so because these are zeros or ones."""
    twin, drawn = attending_copy(layer), torch.Generator().manual_seed(0)
    for part in twin.modules():
        part.__dict__["_parameters"] = {
            name: p
            if p is None
            else nn.Parameter(torch.empty_like(p).uniform_(-1, 1, generator=drawn).div_(p.shape[-1] ** 0.5))
            for name, p in part._parameters.items()
        }
    return twin


def _plain_linear(part: nn.Module) -> bool:
    """Whether it is PyTorch's linear and nothing else, in the type that is packed."""
    own = type(part) is nn.Linear and part._parameters.keys() == {"weight", "bias"} and nn.Linear.forward is _LINEAR
    return own and type(part.weight) is nn.Parameter and part.weight.dtype in PACKABLE and untouched(part)


def attending_copy(module: nn.Module, swap: Swap = lambda _path, _part: None) -> nn.Module:
    """A copy that attends through our function, where its modules ask their config how to."""
    return shallow(module, swap, lambda name, value: NAME if name == "_attn_implementation_internal" else value)


class Copy:
    """A module tree of its own over the SAME parameters, with fast parts where they compute the same; made anew where
    what it stands for has changed.

    gated: adapters of mask rows, which every linear that has one then knows, and the path that theirs are below.
    draft_dtype: of what only drafts; None is the module's own.
    """

    def __init__(
        self, module: nn.Module, gated: tuple[GatedAdapters, str] | None = None, draft_dtype: str | None = None
    ) -> None:
        self.module, self.gated, self.draft_dtype = module, gated, draft_dtype
        self.rotation = Rotation()
        self.plain: dict[Any, Any] = {}  # structures whose fast parts were found to differ, and how
        self.packs: bool | None = None  # decided once: what others do with the memory later changes nothing
        self.release()

    def release(self) -> None:
        """Forget the tree, its packed weights and what was recorded of it."""
        self.tree: nn.Module | None = None
        self.key: Any = None
        self._made: dict[str, tuple[nn.Module, Any, Any]] = {}  # by path: live, its key, what stands for it

    @property
    def is_fast(self) -> bool:
        """Whether anything stands in for a part of the module."""
        return bool(self._made)

    def digest_of(self, part: nn.Module) -> int:
        """A number for the values of a part, as of the last look where they are copied."""
        copied = [live for live, _, _ in self._made.values()]
        known = self.key[2][copied.index(part)] if part in copied and self.key else None
        return digest(part.parameters()) if known is None else known

    @property
    def rests(self) -> bool:
        """Whether the tree reads nothing before it is refreshed."""
        return self.key is None or None in self.key[2]

    def rest(self) -> None:
        """Keep no copies of weights until the next refresh. The tree stays, and what was found out about it."""
        if self.key is None:
            return
        for path, (live, (*place, _), made) in self._made.items():
            self._made[path] = live, (*place, None), made
            for part in made.modules():
                if isinstance(part, Measured):
                    part.kept = {kernel: part.like.new_empty(0) for kernel in part.kept}
        self.key = (*self.key[:2], (None,) * len(self._made), self.key[3])

    def look(self) -> Any:
        """Everything that decides what the module says now: (structure, where weights lie, values of those copied)."""
        structure, places = signature(self.module)
        device = next((t.device for t in self.module.parameters()), torch.device("cpu"))
        pure, around = surroundings(device)
        values = tuple(digest(live.parameters()) for live, _, _ in self._made.values())
        adapters = () if self.gated is None else (*signature(self.gated[0]), digest(self.gated[0].parameters()))
        return (structure, around, pure), places, values, adapters

    def refresh(self, begin: Callable[[], None] = lambda: None, alone: bool = False) -> bool:
        """Whether the tree was made anew; begin is called before. alone: nobody reads the tree that is there."""
        key = self.look()
        if self.tree is not None and (key == self.key or (alone and self._renewed(key))):
            return False
        begin()
        old, self._made, self.tree = self._made, {}, None
        fast = key[0][2] and key[0] not in self.plain
        if self.packs is None:
            on_cpu = all(p.device.type == "cpu" for p in self.module.parameters())
            self.packs = on_cpu and _can_pack(self.module)
        self.tree = attending_copy(self.module, lambda path, part: self._stand_in(path, part, old, fast))
        for part in self.tree.modules() if self.draft_dtype is not None else ():
            if isinstance(part, PackedLinear):
                part.for_drafts(self.draft_dtype)
        settle(self.tree)
        self.key = self.look()
        return True

    def _renewed(self, key: Any) -> bool:
        """Whether nothing but values changed, and what stands for parts of the module took them over."""
        before, self.key = self.key, None  # until all have
        if before is None or any(before[i] != key[i] for i in (0, 1, 3)):
            return False
        for path, old, new in zip(list(self._made), before[2], key[2], strict=True):
            live, (*place, _), made = self._made[path]
            if old != new:
                self._made[path] = live, None, made  # good for nothing, should this fail
                if not made.renew(live):
                    return False
                self._made[path] = live, (*place, new), made
        self.key = key
        return True

    def _stand_in(self, path: str, part: nn.Module, old: dict[str, Any], fast: bool) -> nn.Module | None:
        found = self._fast_part(path, part, old) if fast else None
        if self.gated is None or not path.startswith(f"{self.gated[1]}."):
            return found
        adapters, below = self.gated[0], path.removeprefix(f"{self.gated[1]}.")
        if isinstance(found, FusedLayer):
            found.gated(adapters, below)
        elif below in adapters.of:
            adapter = RowAdapter(adapters, [below], [part.out_features])
            return GatedLinear(part if found is None else found, adapter.to(_dtype_of(part)))
        return found

    def _fast_part(self, path: str, part: nn.Module, old: dict[str, Any]) -> nn.Module | None:
        known = old.pop(path, None)
        if known is not None and known[:2] == (part, self._key_of(part)):
            self._made[path] = known
            return known[2]
        known = None  # let go before the new one is made
        made: nn.Module | None = None
        if self.packs:
            made = _fused_layer(part, self.rotation)
            if made is None and _plain_linear(part):
                made = PackedLinear.of(part)
        if made is None and untouched(part):
            made = fused_norm(part)
        if made is not None:
            self._made[path] = (part, self._key_of(part), made)
        return made

    @staticmethod
    def _key_of(part: nn.Module) -> Any:
        return (*signature(part), digest(part.parameters()))


def fast_view(module: nn.Module, draft_dtype: str | None = None) -> nn.Module:
    """A fast copy of a module as it is now."""
    copy = Copy(module, draft_dtype=draft_dtype)
    copy.refresh()
    assert copy.tree is not None
    return copy.tree


def copy_key(module: nn.Module) -> Any:
    """Everything that decides what a module says now: fast copies of it are good while this stays equal."""
    device = next((t.device for t in module.parameters()), torch.device("cpu"))
    return (*signature(module), surroundings(device), digest((*module.parameters(), *module.buffers())))


def _dtype_of(linear: Any) -> torch.dtype:
    """What a linear's products come in; quantized weights are whole numbers, their products are not."""
    dtype = linear.weight.dtype
    return dtype if dtype.is_floating_point else torch.get_default_dtype()
