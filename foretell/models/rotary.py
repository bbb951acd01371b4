"""Rotary angles that depend on a text's length (dynamic NTK, LongRoPE), for rows that each have a length of their own.

transformers turns all rows of a forward by its largest position, and keeps those frequencies in the module: a prompt is
turned by its whole length, a later token by its own position, the next text by what this one has left there. Our
forwards hold chunks of prompts, drafts and rows of several texts, so here each row says how long its text was when a
new model, alone with it, would have read it. The live module is asked, in copies that start where a new one starts.
"""

# B sequences, R rows of a step.

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class TextLengths(threading.local):
    """How long the text of each row is that this thread turns now; None: as long as the forward's largest position."""

    rows_BR: Tensor | None = None

    def __reduce__(self) -> tuple[type[TextLengths], tuple[()]]:
        return TextLengths, ()  # copies and pickles start empty

    @contextmanager
    def of(self, position_ids_BR: Tensor, read_as: Sequence[int] | Tensor | None) -> Iterator[None]:
        """While this is open, rows up to read_as tokens are part of a text of that length; those beyond it were read
        one after the other. A number for each sequence, or one for all.
        """
        before, self.rows_BR = self.rows_BR, None
        if read_as is not None:
            least_B1 = torch.as_tensor(read_as, device=position_ids_BR.device).view(-1, 1)
            self.rows_BR = torch.maximum(position_ids_BR + 1, least_B1)
        try:
            yield
        finally:
            self.rows_BR = before


def turns_by_length(part: nn.Module) -> bool:
    """Whether a rotary module's frequencies change with the length of what it is given."""
    return bool(_borders(part))


def _borders(part: nn.Module) -> dict[int, bool]:
    """{length up to which frequencies stay as they are: whether every length beyond has its own}."""
    kinds, found = part.__dict__.get("rope_type"), {}
    for layer_type, kind in kinds.items() if isinstance(kinds, dict) else ((None, str(kinds)),):
        if "dynamic" in kind:
            found[part.original_max_seq_len] = True
        elif kind == "longrope":
            rope = part.config.rope_parameters
            found[(rope if layer_type is None else rope[layer_type])["original_max_position_embeddings"]] = False
    return found


class LengthRotary(nn.Module):
    """What stands in for a rotary module that turns by length."""

    def __init__(self, live: nn.Module, lengths: TextLengths) -> None:
        super().__init__()
        self.live, self.lengths = live, lengths
        borders = _borders(live)
        self.lowest, self.highest = min(borders), None if any(borders.values()) else max(borders) + 1

    def __getattr__(self, name: str) -> Any:
        """What a model's own code asks of its rotary module (Granite with windows: the config)."""
        return super().__getattr__(name) if name == "live" else getattr(self.live, name)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """As the live module, which is asked once for each length that differs."""
        given = {} if layer_type is None else {"layer_type": layer_type}
        new = self._new(x, given)
        if self.lengths.rows_BR is None:
            return new(x, position_ids, **given)
        length_BR, out = self.lengths.rows_BR.clamp(self.lowest, self.highest), None
        for length in length_BR.unique().tolist():  # ascending: a text that grows is what it follows
            # one position more, the last of a text of that length; those of longer texts must not be seen
            last_B1 = torch.full_like(position_ids[..., :1], length - 1)
            at = position_ids if length == self.highest else position_ids.clamp(max=length - 1)
            at = torch.cat([at, last_B1], dim=-1)
            found = new(x, at, **given)
            parts = [part[:, :-1] for part in (found if isinstance(found, tuple) else (found,))]
            here_BR1 = (length_BR == length)[..., None]
            out = parts if out is None else [torch.where(here_BR1, *pair) for pair in zip(parts, out, strict=True)]
        assert out is not None, "a forward has rows"
        return tuple(out) if isinstance(found, tuple) else out[0]

    def _new(self, x: Tensor, given: dict[str, str]) -> nn.Module:
        """The live module before any text: where it goes back to itself when a short text follows a long one."""
        new = copy.copy(self.live)
        new.__dict__["_buffers"] = {n: None if b is None else b.clone() for n, b in self.live._buffers.items()}
        new(x, torch.zeros(1, 1, dtype=torch.long, device=x.device), **given)
        return new


def stand_in(root: nn.Module, lengths: TextLengths) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put a LengthRotary in the place of each module below root that turns by length: (owner, name, what was there)."""
    places = [(owner, name, part) for owner in root.modules() for name, part in owner.named_children()]
    found = [place for place in places if turns_by_length(place[2])]
    for owner, name, part in found:
        owner._modules[name] = LengthRotary(part, lengths)
    return found
