"""A target's decoding side: the copy that follows its live model, and forwards of that copy over rows of a token tree.

What the model is now is what it is for a decoding call: once a call the copy is held against the live model's
structure and weights (models/live.py), made anew where it is stale, and compared on numbers where it is new
(models/self_check.py).
"""

# B sequences, R rows of a step, L visible columns, D hidden width.

from __future__ import annotations

import dataclasses
import gc
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foretell.models.attention import RowMasks
from foretell.models.fast import Copy
from foretell.models.gated_lora import MaskRows
from foretell.models.graphs import StaticSteps
from foretell.models.live import OfThread, digest, untouched
from foretell.models.own_logits import logit_formula
from foretell.models.refusals import UnsupportedModelError, norm_name, refuse_hooks, refuse_model, refuse_now
from foretell.models.rotary import TextLengths, stand_in, turns_by_length
from foretell.models.self_check import Verdict, compare
from foretell.models.slot_cache import SlotCache, cache_name
from foretell.runtime import give_back

_REPLACED = (  # it may do what decoding, which calls the decoder, cannot see
    " Its forward was replaced on the object; where accelerate did so, for mixed precision, "
    "accelerator.unwrap_model(model, keep_fp32_wrapper=False) takes that off."
)


@dataclass
class TargetRows:
    """What one forward gives: states after the final norm, and before it where they were asked for."""

    post_norm_BRD: Tensor
    pre_norm_BRD: Tensor | None
    layers_BRX: Tensor | None = None  # side by side, the states that `hidden_layers` asks for
    blocks: list[dict[int, int]] | None = None  # of each sequence: {row that carries masks: row of its first mask}


def note_layers(layers: nn.ModuleList, ids: Sequence[int], now: Any) -> list[Any]:
    """Let these layers note what they are given in now.layers; the hooks' handles."""

    def noting(i: int) -> Any:
        def note(_layer: nn.Module, args: tuple[Tensor, ...], given: dict[str, Any]) -> None:
            now.layers = {**(now.layers or {}), i: args[0] if args else given["hidden_states"]}

        return note

    return [layers[i].register_forward_pre_hook(noting(i), with_kwargs=True) for i in ids]


def side_by_side(layers: dict[int, Tensor] | None) -> Tensor | None:
    """[B, R, n D] of the states that were noted, in order."""
    return torch.cat([layers[i] for i in sorted(layers)], dim=-1) if layers else None


def unwrap(model: nn.Module) -> nn.Module:
    """The causal LM below adapters (PEFT) and parallel wrappers; adapters inside it stay active."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


class _Now(OfThread):
    """Of the forward that runs in this thread, and of the call that it belongs to."""

    view: nn.Module | None = None
    pre_norm: Tensor | None = None
    layers: dict[int, Tensor] | None = None
    bare = False  # no adapters of mask rows


class _Noting(nn.Module):
    """The final norm, which notes what it was given."""

    def __init__(self, norm: nn.Module, now: _Now) -> None:
        super().__init__()
        self.norm, self.now = norm, now

    def forward(self, hidden_BRD: Tensor) -> Tensor:
        """As the norm."""
        self.now.pre_norm = hidden_BRD
        return self.norm(hidden_BRD)


class RowReader:
    """A causal LM's decoding side: a copy that follows the live model, and its forward over rows. `Target` is the
    whole; it holds no parameters of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        base = unwrap(model)
        refuse_model(model, base)
        self.outer, self.model = model, base
        self._formula = logit_formula(base)  # None: the model's own forward makes logits
        self._lengths = TextLengths()
        # rotary frequencies that depend on the length of the whole text (longrope, dynamic NTK)
        self.turns_by_length = any(map(turns_by_length, self.decoder.modules()))
        self._copy: Copy | None = None
        self._readers = 0  # calls that read a copy now: it is theirs as it is
        self._verdicts: dict[Any, Verdict] = {}  # by structure: what the copy's comparison with the model gave
        self._masks, self._now, self._lock = RowMasks(), _Now(), threading.RLock()
        self.static: StaticSteps | None = None  # decode steps as CUDA graphs, on a GPU
        self.hidden_layers: tuple[int, ...] = ()  # layers run before a state is taken that a module reads
        self.mask_rows: MaskRows | None = None  # mask embeddings and gated adapters, of the masked method

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a pickle: without what is made anew when it is needed."""
        own = {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_copy", "static")}
        return own | {"_verdicts": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock(), _copy=None, _readers=0, static=None)

    # -- parts of the model, which may be others tomorrow --------------------------------------------------------------

    @property
    def decoder(self) -> Any:
        return self.model.get_decoder()

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    @property
    def norm(self) -> nn.Module:
        """The final one."""
        decoder = self.decoder
        return getattr(decoder, norm_name(decoder))

    @property
    def embed_tokens(self) -> nn.Module:
        return self.model.get_input_embeddings()

    @property
    def head(self) -> Any:
        return self.model.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    # -- the copy, and its forward -----------------------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Iterator[None]:
        """One decoding call: what the model is now is what it is for this call, whatever calls inside it do."""
        with self._lock:
            view, before = self._noticed(), self._now.view
            self._readers += 1
        self._now.view = view
        try:
            with torch.inference_mode(False), torch.no_grad():  # what a call keeps for the next serves any
                yield
        finally:
            self._now.view = before
            with self._lock:
                self._readers -= 1

    def refresh(self, longest: int = 0) -> None:
        """Notice what has changed in the model, and make what is stale of the copy anew. Once a decoding call:
        `reading` has done it for what runs inside. longest: tokens of the longest text that will be read.

        Raises UnsupportedModelError for a model, or a length, that cannot be read as the model itself reads it.
        """
        if self._now.view is None:
            self._noticed()
        with self._lock:
            within = self._verdicts[self._copy.key[0]].within if self._copy and self._copy.key else None
        if within is not None and longest > within:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} ({self.model.config.model_type}): got texts of up to {longest} tokens, "
                f"but its window of {within} does not reach our attention function; wanted at most {within} in all."
            )

    def view(self) -> nn.Module:
        """The fast module tree: the same weights, through our attention function and fast parts."""
        if self._now.view is not None:
            return self._now.view
        with self._lock:
            return self._noticed() if self._copy is None or self._copy.rests else self._copy.tree

    def verdict(self) -> dict[str, Any]:
        """What comparing the copy with the model itself gave, as plain data."""
        self._noticed()
        return dataclasses.asdict(self._verdicts[self._copy.key[0]])

    def head_key(self) -> int:
        """A number for the output head's values, as of the last time somebody looked."""
        with self._lock:
            return self._copy.digest_of(self.head) if self._copy else digest(self.head.parameters())

    def _noticed(self) -> nn.Module:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._copy is None:
                gated = None if self.mask_rows is None else self.mask_rows.by_path(self.model, self.layers)
                self._copy = Copy(self.model, gated)
            refuse_now(self.outer, self.model)
            while self._copy.refresh(self._before_a_copy, alone=not self._readers):
                structure = self._copy.key[0]
                self._dress(self._copy.tree)
                if structure not in self._verdicts:
                    self._judge(structure)
                if structure in self._verdicts and self._copy.tree is not None:
                    self._copy.tree.__dict__["foretell_windows"] = self._verdicts[structure].windows
                give_back()
            assert self._copy.tree is not None
            return self._copy.tree

    def _before_a_copy(self) -> None:
        self.static = None
        self._formula = None if refuse_hooks(self.model) else logit_formula(self.model)

    def _judge(self, structure: Any) -> None:
        """Hold the copy against the model itself; where the fast one differs, a plain one serves."""
        copy, name = self._copy, f"{type(self.model).__name__} ({self.model.config.model_type})"
        if len(self._verdicts) >= 16:
            self._verdicts.clear()
        fast = copy.is_fast
        try:
            verdict = compare(self, copy.tree, "fast" if fast else "plain")
        except BaseException:
            self.release()
            raise
        before = copy.plain.get(structure)
        if (verdict.differs or verdict.within) and fast:
            copy.plain[structure] = verdict
            copy.key = None  # once more, without fast parts
        elif verdict.differs:
            self.release()
            raise UnsupportedModelError(
                f"{name} cannot be decoded exactly: {verdict.differs}; the first to differ: {verdict.layer}. Wanted "
                "the model's own logits from its layers through an attention function and a cache of our own."
                + (_REPLACED if "forward" in self.model.__dict__ else "")
            )
        else:
            if before is not None:
                verdict.layer = before.layer
                warnings.warn(
                    f"{name}: fast parts of the decoding copy compute something else ({before.differs or 'a window'}; "
                    f"first: {before.layer or 'attention'}), so its own layers decode, somewhat slower.",
                    stacklevel=2,
                )
            self._verdicts[structure] = verdict

    @property
    def windows(self) -> dict[int, int]:
        """Of each layer that never looks further back, how far it looks: what a cache need not keep."""
        return self.view().__dict__["foretell_windows"]

    def windows_noted(self) -> dict[int, int]:
        """See RowMasks.windows."""
        return self._masks.windows()

    @contextmanager
    def bare(self, tree: nn.Module) -> Iterator[None]:
        """While this is open, this copy is the view of this thread, without adapters of mask rows."""
        before, self._now.view, self._now.bare = self._now.view, tree, True
        try:
            yield
        finally:
            self._now.view, self._now.bare = before, False

    def release(self) -> None:
        """Forget the fast module tree, its packed weights and what was recorded of it."""
        with self._lock:  # never under somebody who looks
            self._copy = self.static = None
        gc.collect()  # modules know each other in circles
        give_back()

    def rest(self) -> None:
        """Give back the memory of packed weights until the next call."""
        with self._lock:
            if self._copy is not None and not self._readers:
                self._copy.rest()
        give_back()

    def _dress(self, tree: Any) -> None:
        self._masks.hang_on(tree)
        decoder = tree.get_decoder()
        name = norm_name(decoder)
        decoder.__dict__["_modules"][name] = _Noting(getattr(decoder, name), self._now)
        stand_in(tree, self._lengths)
        new = [i for i in self.hidden_layers if "foretell_noted" not in decoder.layers[i].__dict__]  # some are reused
        note_layers(decoder.layers, new, self._now)
        for i in new:
            decoder.layers[i].__dict__["foretell_noted"] = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def forward_rows(
        self,
        input_ids_BR: Tensor,
        lengths_B: Tensor,
        cache: SlotCache,
        *,
        first: int = 0,
        position_ids_BR: Tensor | None = None,
        parents_BR: Tensor | None = None,
        valid_rows_B: Tensor | None = None,
        visible: int,
        full: bool = False,
        start: int | None = None,
        steps_BR: Tensor | None = None,
        read_as: Sequence[int] | None = None,
    ) -> TargetRows:
        """One forward over rows of a token tree, on top of lengths_B cached tokens of slots first, first + 1, ...

        parents_BR None: each sequence's rows are a chain of valid_rows_B rows (all of them if None). visible is the
        number of cache columns in use after this step. full: nothing is hidden from any row, so no mask is needed.
        start: the length of all sequences, where that is one and no row is padding.
        steps_BR: 0 for tokens, j for mask j of a block: those read mask_rows' embedding j, through its adapters.
        read_as: how long each sequence's text was when the first of it was read; see TextLengths.of.
        """
        B, R = input_ids_BR.shape
        for ring in cache.rings.values():
            ring.make_room(first, lengths_B, R)
        if position_ids_BR is None:
            position_ids_BR = lengths_B[:, None] + torch.arange(R, device=lengths_B.device)
        static = self.static
        if static is None and self.device.type == "cuda" and self._can_be_recorded():
            static = self.static = StaticSteps(self.forward_static, replayed=True)
        if static is not None and first == 0 and steps_BR is None and static.takes(B, R):
            self.view()
            rows = static(
                input_ids_BR,
                lengths_B,
                cache,
                positions_BR=position_ids_BR,
                parents_BR=parents_BR,
                valid_rows_B=valid_rows_B,
                visible=visible,
            )
            layers_BRX = None if rows.layers_BRX is None else rows.layers_BRX[:B]
            return TargetRows(rows.post_norm_BRD[:B], rows.pre_norm_BRD[:B], layers_BRX)
        masks = {"parents_BR": parents_BR, "valid_rows_B": valid_rows_B, "full": full, "start": start}
        read = input_ids_BR
        if steps_BR is not None:
            assert self.mask_rows is not None, "only a masked module's target reads mask rows"
            read = self.mask_rows.embed(self.embed_tokens(input_ids_BR), steps_BR)
        with self._lengths.of(position_ids_BR, read_as if self.turns_by_length else None):
            return self._forward_rows(read, lengths_B, cache, first, position_ids_BR, visible, masks, steps_BR)

    def _forward_rows(
        self,
        read: Tensor,
        lengths_B: Tensor,
        cache: SlotCache,
        first: int,
        position_ids_BR: Tensor,
        visible: int,
        masks: dict[str, Any],
        steps_BR: Tensor | None = None,
    ) -> TargetRows:
        """read: token ids [B, R] or what stands for them, [B, R, D]."""
        view, R = self.view(), read.shape[1]
        valid_BR = None
        if masks["valid_rows_B"] is not None:
            valid_BR = torch.arange(R, device=lengths_B.device) < masks["valid_rows_B"][:, None]
        cache.begin(first, lengths_B, valid_BR, R, visible, masks.get("start"))
        self._masks.begin(lengths_B, visible, R, columns=cache.columns(), **masks)
        decoder = view.get_decoder()
        bare = self.mask_rows is None or self._now.bare
        with self._masks.asked(), nullcontext() if bare else self.mask_rows.through(steps_BR):
            out = decoder(
                **{"input_ids" if read.dim() == 2 else "inputs_embeds": read, cache_name(decoder.forward): cache},
                position_ids=position_ids_BR,
                use_cache=True,
                return_dict=True,
            )
        return TargetRows(out.last_hidden_state, self._now.pre_norm, side_by_side(self._now.layers))

    def _can_be_recorded(self) -> bool:
        """Whether a step never waits for the device: no experts chosen in Python, no rotary table that grows, and
        no hooks or forwards of the user's, whose Python would not run again."""
        experts = any(name.endswith("experts") for name, _ in self.decoder.named_modules())
        return not experts and not self.turns_by_length and untouched(self.model)

    def forward_static(
        self,
        ids_BR: Tensor,
        lengths_B: Tensor,
        positions_BR: Tensor,
        parents_BR: Tensor | None,
        valid_rows_B: Tensor,
        visible: int,
        cache: SlotCache,
    ) -> TargetRows:
        """What StaticSteps runs or records: everything that a step computes from its buffers."""
        masks = {"parents_BR": parents_BR, "valid_rows_B": valid_rows_B}
        return self._forward_rows(ids_BR, lengths_B, cache, 0, positions_BR, visible, masks)
