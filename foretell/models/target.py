"""The seam to transformers: what the target model gives to modules and losses, and its forwards with gradient.

Everything that transformers renames lands here, or in reader.py, the decoding side. Models are used through their
extension points (own Cache, registered attention function, ready positions); no modelling file is copied.
"""

# B sequences, T positions, R rows of a step, L visible columns, D hidden width, V vocabulary, N rows flattened.

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from foretell.models.attention import NAME, RowMasks
from foretell.models.comb_attention import COMB, CombKeys, comb_attention
from foretell.models.gated_lora import GatedAdapters
from foretell.models.lean_layer import lean_layers
from foretell.models.own_logits import own_logits
from foretell.models.reader import RowReader, TargetRows, note_layers, side_by_side
from foretell.models.refusals import UnsupportedModelError
from foretell.models.rotary import LengthRotary, stand_in, turns_by_length
from foretell.models.slot_cache import cache_name


def _sampled(tensor: Tensor, count: int) -> bytes:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // count)][:count].float().cpu().numpy().tobytes()


def matrix_of(linear: nn.Module, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(weight [out, width], bias) of whatever computes a linear's products, which is asked for those with the unit
    vectors.
    """
    unit_DD = torch.eye(width, device=like.device, dtype=like.dtype)
    bias_V = linear(torch.zeros_like(unit_DD[:1]))[0]
    return (linear(unit_DD) - bias_V).T.contiguous(), bias_V


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A plain linear with these numbers; draws no random ones."""
    shape = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], len(weight), **shape)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return linear


class Target(RowReader):
    """Wraps an AutoModelForCausalLM. Holds no parameters of its own.

    Raises UnsupportedModelError, by name, for what cannot work.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.config = self.model.config.get_text_config()
        self._rotary_by_type = "layer_type" in inspect.signature(self.decoder.rotary_emb.forward).parameters

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end the model's own texts."""
        eos = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return [] if eos is None else eos if isinstance(eos, list) else [eos]

    @property
    def dtype(self) -> torch.dtype:
        """In which the states come."""
        return next(self.norm.parameters(), self.embed_tokens.weight).dtype

    @property
    def rereads_at(self) -> int | None:
        """The length beyond which the model's own generate reads the whole text anew, where that changes its angles:
        Phi-3 does so where it turns by other frequencies.
        """
        own = inspect.unwrap(type(self.model).prepare_inputs_for_generation).__code__
        if not self.turns_by_length or "original_max_position_embeddings" not in own.co_names:
            return None
        return getattr(self.model.config, "original_max_position_embeddings", None)

    def compute_again_in_backward(self, settings: dict[str, Any] | None, **more: Any) -> None:
        """Activation checkpointing of the layers, by the name that this transformers has for it."""
        for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
            if enable := getattr(self.model, name, None):
                return enable(settings, **more)
        raise ValueError(f"{type(self.model).__name__}: it knows no activation checkpointing; turn it off.")

    def fingerprint(self, gathered: dict[int, Tensor] | None = None) -> dict[str, Any]:
        """What a module must find again: architecture and sizes (errors), weights (a warning).

        gathered: whole tensors by the id of the sharded parameter that each stands for (sharded training).
        """
        digest = hashlib.sha256()
        for parameter in (self.head.weight, next(self.layers[-1].parameters())):
            flat = (gathered or {}).get(id(parameter), parameter).detach().reshape(-1)
            digest.update(_sampled(flat, 4096))
        states = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            states.update(name.encode() + _sampled((gathered or {}).get(id(parameter), parameter), 64))
        for part in self.model.modules():  # which adapters are on, and how much
            states.update(
                repr([getattr(part, n, "") for n in ("active_adapters", "disable_adapters", "scaling")]).encode()
            )
        return {
            "architecture": type(self.model).__name__,
            "model_type": self.config.model_type,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "num_hidden_layers": len(self.layers),
            "weights": digest.hexdigest()[:16],
            "states": states.hexdigest()[:16],  # of all that makes them, adapters included: who keeps states asks
        }

    # -- parts that a module borrows -----------------------------------------------------------------------------------

    def embed(self, input_ids: Tensor) -> Tensor:
        """[...] -> [..., D], scaled as the model scales its embeddings."""
        return self.embed_tokens(input_ids)

    def logits(self, post_norm_ND: Tensor, view: bool = False) -> Tensor:
        """[..., D] after the final norm -> [..., V], as the model makes them."""
        head = self.view().get_output_embeddings() if view else self.head
        if self._formula is None:
            state_BTD = post_norm_ND.reshape(1, -1, post_norm_ND.shape[-1])
            return own_logits(self.model, state_BTD, head).view(*post_norm_ND.shape[:-1], -1)
        return self._formula(head(post_norm_ND))

    def scaled(self, logits: Tensor) -> Tensor:
        """What a head of a module's gives, as near to the model's scale as a formula says."""
        return logits if self._formula is None else self._formula(logits)

    @property
    def loss_scaling(self) -> dict[str, Any]:
        """What the model does to its head's products, as linear_loss takes it."""
        if self._formula is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} ({self.config.model_type}) makes its logits from its head's products "
                "in a way of its own: its text is decoded with them, but losses here know a factor and a soft cap. "
                "Train on a model without what changes its logits."
            )
        return {"softcap": self._formula.softcap, "logit_scale": self._formula.scale}

    def head_matrix(self, detach: bool = False) -> tuple[Tensor, Tensor | None]:
        """The output head as a matrix [V, D] and its bias [V] or None, with what adapters make of it and its gradient.

        Whatever wraps a head (LoRA, modules_to_save, four bits) is asked for its products with the unit vectors.
        """
        if type(self.head) is nn.Linear:
            weight, bias = self.head.weight, self.head.bias
            return (weight.detach(), None if bias is None else bias.detach()) if detach else (weight, bias)
        with torch.no_grad() if detach else nullcontext():
            weight_VD, bias_V = matrix_of(self.head, self.hidden_size, self.embed_tokens.weight)
            return weight_VD, None if self.head.bias is None else bias_V

    def position_embeddings(
        self,
        hidden_BTD: Tensor,
        position_ids_BT: Tensor,
        layer_type: str | None = None,
        read_as: Sequence[int] | Tensor | None = None,
    ) -> Any:
        """What the decoder's layers take as position_embeddings; per layer type where the model has several (Gemma 3).

        read_as: see TextLengths.of; None: as the model itself turns rows that it reads at once.
        """
        rotary = self.decoder.rotary_emb
        rotary = LengthRotary(rotary, self._lengths) if turns_by_length(rotary) else rotary
        with self._lengths.of(position_ids_BT, read_as):
            return rotary(hidden_BTD, position_ids_BT, **({"layer_type": layer_type} if self._rotary_by_type else {}))

    # -- forwards ------------------------------------------------------------------------------------------------------

    def forward_text(self, input_ids_BT: Tensor, position_ids_BT: Tensor) -> TargetRows:
        """Ordinary text with the model's own attention; positions that restart begin a new packed document.

        Right padding must look like documents of its own (positions 0), which no other token attends to.
        """
        ids, positions = self.flat(input_ids_BT), self.flat(position_ids_BT)
        with self.passing_by() as states, self._turning(positions, None):
            self.decoder(input_ids=ids, position_ids=positions, use_cache=False)
        return self.passed(states, input_ids_BT.shape)

    def passed(self, states: dict[str, Tensor], shape: Sequence[int]) -> TargetRows:
        """What passed by in a forward over rows of this shape [B, T]."""
        return TargetRows(*(states[n].view(*shape, -1) if n in states else None for n in ("post", "pre", "layers")))  # type: ignore[arg-type]

    def flat(self, rows_BT: Tensor) -> Tensor:
        """Rows in the shape in which the model's attention keeps documents apart by their positions alone: flash
        attention does so in one row only, where each row of the batch is one more document.
        """
        return rows_BT.reshape(1, -1) if "flash" in str(self.config._attn_implementation) else rows_BT

    @contextmanager
    def passing_by(self) -> Iterator[dict[str, Tensor]]:
        """Keeps the states before and after the final norm of a forward that somebody else runs."""
        states: dict[str, Tensor] = {}

        def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            layers = side_by_side(now.layers)
            states.update(pre=args[0], post=output, **({} if layers is None else {"layers": layers}))

        now = SimpleNamespace(layers=None)
        handles = [self.norm.register_forward_hook(keep), *note_layers(self.layers, self.hidden_layers, now)]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def attending(self, attention: str, hung_as: str, rule: Any) -> Iterator[None]:
        """While this is open, the model's own layers attend through a function of ours, which finds `rule` at their
        attention modules. The model itself, not a copy: parallel wrappers and adapters inside it stay in the path.
        """
        config = self.decoder.config
        before = config._attn_implementation_internal
        places = [part for part in self.layers.modules() if hasattr(part, "layer_idx")]
        config._attn_implementation_internal = attention
        for place in places:
            place.__dict__[hung_as] = rule
        try:
            yield
        finally:
            config._attn_implementation_internal = before
            for place in places:
                place.__dict__.pop(hung_as, None)

    @contextmanager
    def _turning(self, position_ids_BR: Tensor, read_as: Sequence[int] | Tensor | None) -> Iterator[None]:
        """While this is open, the model's own decoder turns rows as a new model would, and remembers nothing of it."""
        places = stand_in(self.decoder, self._lengths) if self.turns_by_length else []
        try:
            with self._lengths.of(position_ids_BR, read_as):
                yield
        finally:
            for owner, name, live in places:
                owner._modules[name] = live

    @contextmanager
    def constant(self) -> Iterator[None]:
        """While this is open, gradient passes through the target to its inputs and adapters, not into its weights."""
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)

    def read_comb(
        self,
        embedding_BRD: Tensor,
        position_ids_BR: Tensor,
        keys: CombKeys,
        adapters: GatedAdapters | None = None,
        read_as: Tensor | None = None,
    ) -> Tensor:
        """[B, R, D] after the final norm: text rows or mask rows of a comb, as `keys` was told.

        read_as: length of the whole text. adapters: which all rows pass through. Gradient reaches them and the
        embeddings, never the target's weights.
        """
        plain = not torch.is_autocast_enabled(embedding_BRD.device.type) and not (adapters and adapters.drops)
        lean = lean_layers(self.layers) if plain else None
        with self.attending(COMB, "foretell_comb", keys), self.constant():
            if lean is not None:
                places = self.position_embeddings(embedding_BRD, position_ids_BR, None, read_as)
                for layer in lean:
                    embedding_BRD = layer(embedding_BRD, places, comb_attention, adapters)
                return self.norm(embedding_BRD)
            through = nullcontext() if adapters is None else adapters.on(self.layers, slice(None))
            with through, self._turning(position_ids_BR, read_as):
                out = self.decoder(
                    inputs_embeds=embedding_BRD,
                    position_ids=position_ids_BR,
                    use_cache=True,
                    **{cache_name(self.decoder.forward): keys},
                )
        return out.last_hidden_state

    def read_tree(
        self, embedding_BRD: Tensor, position_ids_BR: Tensor, parents_BR: Tensor, read_as: Tensor | None = None
    ) -> Tensor:
        """[B, R, D] after the final norm: all rows of a token tree at once, with gradient. read_comb's slow twin."""
        masks = RowMasks()
        B, R = parents_BR.shape
        masks.begin(torch.zeros(B, dtype=torch.long, device=parents_BR.device), R, R, parents_BR=parents_BR)
        with self.attending(NAME, "foretell_masks", masks), self._turning(position_ids_BR, read_as):
            out = self.decoder(inputs_embeds=embedding_BRD, position_ids=position_ids_BR, use_cache=False)
        return out.last_hidden_state
