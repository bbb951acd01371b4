"""The bridge from transformers' `generate` to our decoder: same preparation, same arguments, our loop.

transformers prepares the GenerationConfig, the logits processors and the stopping criteria, then calls the function
given as `custom_generate`. What our loop cannot honour it refuses by name.
"""

# B sequences of the caller's batch, T prompt width.

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import stopping_criteria as sc
from transformers.utils import ModelOutput

from foretell.decoding.adaptive import AdaptiveLength
from foretell.decoding.loop import Decoder
from foretell.decoding.policies import check_policy
from foretell.decoding.scores import RowScores
from foretell.decoding.stats import GenerationStats
from foretell.models.slot_cache import CACHE_NAMES
from foretell.types import SequenceState

_HANDLED_KWARGS = {*CACHE_NAMES, "attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position"}
_NOT_HONOURED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "token_healing")


@dataclass
class MTPGenerateOutput(ModelOutput):
    """sequences [B, prompt + new] and what it took to make them."""

    sequences: Tensor | None = None
    stats: GenerationStats | None = None


class Finish:
    """Stopping criteria of transformers, asked after every token; end tokens and lengths without a tensor."""

    def __init__(self, criteria: list, batch: int) -> None:
        self.max_length: int | None = None
        self.eos: set[int] = set()
        self.others: list = []
        for criterion in criteria:
            if type(criterion) is sc.MaxLengthCriteria:
                lengths = [n for n in (self.max_length, criterion.max_length) if n is not None]
                self.max_length = min(lengths)
            elif type(criterion) is sc.EosTokenCriteria:
                self.eos.update(criterion.eos_token_id.reshape(-1).tolist())
            else:
                self.others.append(criterion)
        if self.max_length is None:
            raise ValueError("generation has no length limit: give max_new_tokens or max_length.")

    def __call__(self, sequence: SequenceState) -> bool:
        """Whether the sequence's newest token ends it."""
        if sequence.tokens[-1] in self.eos or len(sequence.tokens) + sequence.left_padding >= self.max_length:
            return True
        if self.others:
            text = torch.tensor([[sequence.pad_token_id] * sequence.left_padding + sequence.tokens])
            return any(bool(torch.as_tensor(criterion(text, None)).all()) for criterion in self.others)
        return False


def refuse_unsupported(generation_config: Any, model_kwargs: dict[str, Any], synced_gpus: bool) -> None:
    """One ValueError that names every argument which our decoder would otherwise ignore."""
    bad = []
    mode = str(getattr(generation_config.get_generation_mode(), "value", ""))
    if mode not in ("greedy_search", "sample"):
        bad.append(f"generation mode {mode!r} (beams, constraints, contrastive or assisted decoding)")
    bad += [f"{name}=True" for name in _NOT_HONOURED if getattr(generation_config, name, None)]
    if getattr(generation_config, "cache_implementation", None) not in (None, "dynamic"):
        bad.append(f"cache_implementation={generation_config.cache_implementation!r} (foretell brings its own cache)")
    if getattr(generation_config, "use_cache", True) is False:
        bad.append("use_cache=False")
    own = [name for name in CACHE_NAMES if getattr(model_kwargs.get(name), "_is_user_defined", False)]
    bad += [f"{name} (foretell brings its own cache)" for name in own]
    bad += sorted(set(model_kwargs) - _HANDLED_KWARGS)
    if synced_gpus:
        bad.append("synced_gpus=True")
    if bad:
        raise ValueError(
            "foretell's generate cannot honour: "
            + "; ".join(bad)
            + ". Leave these out, or call model.generate without it."
        )


@torch.no_grad()
def generate_rows(
    decoder: Decoder,
    input_ids_BT: Tensor,
    *,
    logits_processor: list,
    stopping_criteria: list,
    generation_config: Any,
    num_draft_tokens: int | str,
    policy: str = "lossless",
    confidence_threshold: float | None = None,
    reference: str = "the target",
    generator: torch.Generator | None = None,
    streamer: Any = None,
    synced_gpus: bool = False,
    slots: int = 64,
    adaptive: AdaptiveLength | None = None,
    **model_kwargs: Any,
) -> Tensor | MTPGenerateOutput:
    """The function behind `custom_generate`, once the decoder is bound. See MTPModel.generate."""
    refuse_unsupported(generation_config, model_kwargs, synced_gpus)
    check_policy(policy)
    B, T = input_ids_BT.shape
    if streamer is not None and B > 1:
        raise ValueError(f"a streamer takes one sequence; got a batch of {B}.")
    pad = _pad_token(generation_config)
    mask_BT = model_kwargs.get("attention_mask")
    mask_BT = torch.ones_like(input_ids_BT) if mask_BT is None else mask_BT
    sequences = []
    for index, (ids, mask) in enumerate(zip(input_ids_BT.tolist(), mask_BT.tolist(), strict=True)):
        left = mask.index(1) if 1 in mask else T
        if left == T or 0 in mask[left:]:
            raise ValueError(
                f"attention_mask of row {index} must be zeros (left padding) then ones, at least one: got {mask}. "
                "Set padding_side='left' in the tokenizer."
            )
        sequences.append(SequenceState(ids[left:], T - left, index, left_padding=left, pad_token_id=pad))
    _check_positions(model_kwargs.get("position_ids"), mask_BT)
    finish = Finish(stopping_criteria, B)
    length: int | AdaptiveLength
    if adaptive is not None:
        adaptive.begin()
        length = adaptive
    else:
        assert isinstance(num_draft_tokens, int), "'auto' needs the one who adapts"
        length = num_draft_tokens
    stats = decoder.run(
        sequences,
        RowScores(logits_processor, bool(generation_config.do_sample)),
        finish,
        max_tokens=max(finish.max_length or 0, T + 1),
        num_draft_tokens=length,
        policy=policy,
        confidence_threshold=confidence_threshold,
        reference=reference,
        slots=slots,
        generator=generator,
        emit=None if streamer is None else lambda _s, new: [streamer.put(torch.tensor([t])) for t in new],
    )
    if streamer is not None:
        streamer.end()
    width = max(len(s.new_tokens) for s in sequences)
    new_BT = torch.full((B, width), pad, dtype=input_ids_BT.dtype)
    for sequence in sequences:
        new_BT[sequence.index, : len(sequence.new_tokens)] = torch.tensor(sequence.new_tokens)
    out = torch.cat([input_ids_BT, new_BT.to(input_ids_BT.device)], dim=1)
    if generation_config.return_dict_in_generate:
        return MTPGenerateOutput(sequences=out, stats=stats)
    return out


def _check_positions(position_ids_BT: Tensor | None, mask_BT: Tensor) -> None:
    if position_ids_BT is None:
        return
    usual_BT = mask_BT.long().cumsum(-1) - 1
    if not torch.equal(position_ids_BT.expand_as(usual_BT)[mask_BT == 1], usual_BT[mask_BT == 1]):
        raise ValueError("foretell's generate cannot honour: position_ids that do not count from each prompt's start.")


def _pad_token(generation_config: Any) -> int:
    pad = generation_config.pad_token_id
    if pad is None:
        eos = generation_config.eos_token_id
        pad = eos[0] if isinstance(eos, list) else eos
    return 0 if pad is None else int(pad)


def callers_streamer() -> Any:
    """The streamer given to transformers' generate, which 5.23 does not hand on to a `custom_generate` function."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and "custom_generate" in frame.f_locals and "streamer" in frame.f_locals:
            return frame.f_locals["streamer"]
        frame = frame.f_back
    return None
