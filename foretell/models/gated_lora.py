"""Gated LoRA: low-rank adapters of the target's linears that act on mask rows and on no other.

y = W x + s B(A(dropout(x))) on mask rows, y = W x elsewhere: what ordinary tokens compute is the target, to the bit.
The gate is the kind of a row and nothing else; rows of other kinds are never multiplied by an adapter at all.
arXiv 2507.11851, section 3.1 and figure 5; alpha / r as in LoRA (arXiv 2106.09685), alpha / sqrt(r) as in rsLoRA.
"""

# N rows of a forward flattened, D width in, O width out, r rank, K masks of a block.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foretell.models.live import OfThread

ALL_LINEAR = "all-linear"  # PEFT's word for every linear of the decoder's layers
# not adapted: what chooses experts (as in PEFT's all-linear recipes), and MLA's expansion of compressed keys, which
# reads the whole cache again in every step, rows of text included
EXCLUDED = ("gate", "router", "kv_b_proj")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # linears that read the same input


class LoRA(nn.Module):
    """The adapters of linears that read one input: a linear by itself, or several that share A (`fuse_weights`).

    Fused, the rank is r for each linear and B is dense over all of them: more than the separate adapters can say, at
    one product instead of several. The scale is that of the rank of ONE linear, so fusing does not change it.
    """

    def __init__(self, linears: dict[str, Any], rank: int, alpha: float, dropout: float, use_rslora: bool) -> None:
        super().__init__()
        first = next(iter(linears.values()))
        device = first.weight.device
        total_rank, self.widths = rank * len(linears), [linear.out_features for linear in linears.values()]
        self.names = list(linears)
        self.lora_A = nn.Linear(first.in_features, total_rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(total_rank, sum(self.widths), bias=False, device=device, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / (rank**0.5 if use_rslora else rank)
        self._low: tuple[Tensor, Tensor] | None = None  # (input, A of it), while its linears take their shares

    def share(self, name: str) -> slice:
        """The rows of B that belong to a linear."""
        at = self.names.index(name)
        return slice(sum(self.widths[:at]), sum(self.widths[: at + 1]))

    def delta(self, name: str, x_ND: Tensor, whole: Tensor) -> Tensor:
        """[N, O] what the adapter adds to a linear. whole: the linear's input, by which fused ones know each other."""
        if self._low is None or self._low[0] is not whole:
            low_Nr = F.linear(self.dropout(x_ND), self.lora_A.weight.to(x_ND.dtype))
            self._low = (whole, low_Nr)
        low_Nr = self._low[1]
        if name == self.names[-1]:
            self._low = None  # nothing of this forward is kept alive
        return F.linear(low_Nr, self.lora_B.weight[self.share(name)].to(low_Nr.dtype)) * self.scale


class _Rows(OfThread):
    """What a forward tells the adapters and the masks that it meets."""

    rows: Tensor | slice | None = None
    generator: torch.Generator | None = None  # of noise


class GatedAdapters(nn.Module):
    """All adapters of a target, and the gate. They live beside the target and reach its linears while `on` is open."""

    def __init__(
        self,
        layers: nn.ModuleList,
        modules: Sequence[str] | str,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
        fuse: bool,
    ) -> None:
        super().__init__()
        self.now = _Rows()
        linears = _matching(layers, modules)
        self.paths = list(linears)
        self.adapters = nn.ModuleDict()
        self.of: dict[str, tuple[str, str]] = {}  # path of a linear: (its adapter, its name there)
        for group in _groups(self.paths, FUSED if fuse else ()):
            key = group[0].replace(".", "/")  # a ModuleDict's key holds no dots
            named = {path.rpartition(".")[2]: linears[path] for path in group}
            self.adapters[key] = LoRA(named, rank, alpha, dropout, use_rslora)
            self.of.update({path: (key, path.rpartition(".")[2]) for path in group})

    @property
    def rows(self) -> Tensor | slice | None:
        """Mask rows of this thread's forward, flattened; None: there are none."""
        return self.now.rows

    @rows.setter
    def rows(self, rows: Tensor | slice | None) -> None:
        self.now.rows = rows

    @property
    def drops(self) -> bool:
        """Whether dropout is at work."""
        return self.training and any(lora.dropout.p > 0 for lora in self.adapters.values())  # type: ignore[union-attr]

    def adapter(self, path: str) -> tuple[LoRA, str]:
        """The adapter of a linear, and the linear's name in it."""
        key, name = self.of[path]
        return self.adapters[key], name  # type: ignore[return-value]

    def side_by_side(self, paths: Sequence[str | None], widths: Sequence[int]) -> tuple[Tensor, Tensor, float] | None:
        """(A [r, D], B [O, r], scale) of linears that read one input, in this order, so that B A x is what all of them
        add: ranks side by side, zeros where a linear has no adapter. None if none of them has one.
        """
        found: dict[str, LoRA] = {self.of[path][0]: self.adapter(path)[0] for path in paths if path in self.of}
        if not found:
            return None
        starts, rank = {}, 0
        for key, lora in found.items():
            starts[key], rank = rank, rank + len(lora.lora_A.weight)
        lora_A = torch.cat([lora.lora_A.weight for lora in found.values()])
        rows = []
        for path, width in zip(paths, widths, strict=True):
            if path not in self.of:
                rows.append(lora_A.new_zeros(width, rank))
                continue
            lora, name = self.adapter(path)
            start, own = starts[self.of[path][0]], lora.lora_B.weight[lora.share(name)]
            rows.append(F.pad(own, (start, rank - start - own.shape[1])))
        return lora_A, torch.cat(rows), next(iter(found.values())).scale

    @contextmanager
    def on(self, layers: nn.ModuleList, rows: Tensor | slice) -> Iterator[None]:
        """While this is open, these rows (of every flattened [B * R] input) go through the adapters."""
        handles = [layers.get_submodule(path).register_forward_hook(self._hook(path)) for path in self.paths]
        self.rows = rows
        try:
            yield
        finally:
            self.rows = None
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Any:
        lora, name = self.adapter(path)

        def add(_linear: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            x = args[0]
            rows, x_ND = self.rows, x.reshape(-1, x.shape[-1])
            if isinstance(rows, slice) and rows == slice(None):
                return out + lora.delta(name, x_ND, x).view_as(out).to(out.dtype)
            flat_NO = out.reshape(-1, out.shape[-1])
            delta = lora.delta(name, x_ND[rows], x).to(out.dtype)
            if isinstance(rows, slice):
                rows = torch.arange(flat_NO.shape[0], device=out.device)[rows]
            return flat_NO.index_add(0, rows, delta).view_as(out)

        return add


class MaskRows(nn.Module):
    """What mask rows are made of: an embedding for each mask of a block, and the gated adapters they pass through.

    kind "shared" is one embedding for all K masks, "distinct" one each; "noise" has none: a mask reads the embedding
    of a token drawn uniformly (SGLang's UNO serves such adapters).
    """

    def __init__(
        self, embed_tokens: nn.Module, depth: int, kind: str, adapters: GatedAdapters, gated: bool = True
    ) -> None:
        """gated: False lets every row through the adapters, text as well."""
        super().__init__()
        self.kind, self.depth, self.adapters, self.gated = kind, depth, adapters, gated
        self._tokens = [embed_tokens]  # in a list: the target's, not a part of this module
        self.embedding: nn.Parameter | None = None
        if kind != "noise":
            weight = embed_tokens.weight.detach()
            mean_D = weight.float().mean(0) * getattr(embed_tokens, "scalar_embed_scale", 1.0)
            rows = 1 if kind == "shared" else depth
            self.embedding = nn.Parameter(mean_D.repeat(rows, 1))

    def embed(self, embedding_BRD: Tensor, steps_BR: Tensor) -> Tensor:
        """The rows' embeddings, with the masks' own where steps_BR is not 0 (mask j of a block)."""
        if self.embedding is None:
            tokens = self._tokens[0].weight.shape[0]
            ids_BR = torch.randint(
                tokens, steps_BR.shape, generator=self.adapters.now.generator, device=steps_BR.device
            )
            own_BRD = self._tokens[0](ids_BR)
        else:
            at_BR = (steps_BR - 1).clamp(min=0) if len(self.embedding) > 1 else torch.zeros_like(steps_BR)
            own_BRD = F.embedding(at_BR, self.embedding)
        return torch.where((steps_BR > 0)[..., None], own_BRD.to(embedding_BRD.dtype), embedding_BRD)

    @contextmanager
    def through(self, steps_BR: Tensor | None) -> Iterator[None]:
        """For the decoding view, whose linears know their adapters: these rows pass through them (None: no masks)."""
        if not self.gated:
            self.adapters.rows = slice(None)
        elif steps_BR is not None:
            rows = (steps_BR.reshape(-1) > 0).nonzero()[:, 0]
            first, n = (int(rows[0]), len(rows)) if len(rows) else (0, 0)
            in_a_row = n > 0 and int(rows[-1]) == first + n - 1
            self.adapters.rows = slice(first, first + n) if in_a_row else rows
        try:
            yield
        finally:
            self.adapters.rows = None

    def by_path(self, model: nn.Module, layers: nn.ModuleList) -> tuple[GatedAdapters, str]:
        """For fast_view: the adapters, and the path of the decoder's layers in the model."""
        return self.adapters, next(path for path, module in model.named_modules() if module is layers)


class RowAdapter:
    """LoRA for decoding: added to ready products in place, A and B laid side by side for linears of one input."""

    def __init__(self, adapters: GatedAdapters, paths: Sequence[str | None], widths: Sequence[int]) -> None:
        """paths: the linears of one product, at least one of which has an adapter; widths: of each."""
        self.gate = adapters
        with torch.no_grad():
            together = adapters.side_by_side(paths, widths)
            assert together is not None, "a product without adapters needs no RowAdapter"
            self.A, self.B = together[0].clone(), together[1] * together[2]

    def to(self, dtype: torch.dtype) -> RowAdapter:
        """In the type that the products come in."""
        self.A, self.B = self.A.to(dtype), self.B.to(dtype)
        return self

    def add(self, out_NO: Tensor, x_nD: Tensor) -> None:
        """out_NO[mask rows] += s B A x; x_nD: the mask rows of the input."""
        out_NO[self.gate.rows] += (x_nD @ self.A.t()) @ self.B.t()


class GatedLinear(nn.Module):
    """A linear of the decoding view with its adapter."""

    def __init__(self, linear: nn.Module, adapter: RowAdapter) -> None:
        super().__init__()
        self.linear, self.adapter = linear, adapter
        self.weight, self.bias = linear.weight, linear.bias  # for modelling code that asks

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., O]."""
        out = self.linear(x)
        rows = self.adapter.gate.rows
        if rows is not None:
            self.adapter.add(out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])[rows])
        return out


def _matching(layers: nn.ModuleList, modules: Sequence[str] | str) -> dict[str, Any]:
    """{path below the layers: linear}. Raises ValueError for a name that matches nothing, with those that would."""
    linears: dict[str, Any] = {}
    for path, module in layers.named_modules():
        # PEFT's own layers look like linears from outside; what they wrap is theirs
        inside = any(path.startswith(f"{taken}.") for taken in linears)
        if not inside and hasattr(module, "in_features") and hasattr(module, "out_features"):
            linears[path] = module
    names = {path.rpartition(".")[2] for path in linears} - set(EXCLUDED)
    if modules == ALL_LINEAR:
        return {path: linear for path, linear in linears.items() if path.rpartition(".")[2] in names}
    wanted = [modules] if isinstance(modules, str) else list(modules)
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ValueError(
            f"lora_modules: {', '.join(unknown)} matches no linear of this model; it has {', '.join(sorted(names))} "
            f"(or {ALL_LINEAR!r} for all)."
        )
    return {path: linear for path, linear in linears.items() if path.rpartition(".")[2] in wanted}


def _groups(paths: list[str], fused: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Paths that share an adapter: those of one parent that stand together in `fused`, the rest alone."""
    taken: set[str] = set()
    for path in paths:
        if path in taken:
            continue
        parent, _, name = path.rpartition(".")
        together = next((group for group in fused if name in group), (name,))
        group = [member for other in together if (member := f"{parent}.{other}") in paths]
        taken.update(group)
        yield group
