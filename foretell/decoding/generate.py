"""The bridge from transformers' `generate` to our decoder: same preparation, same arguments, our loop.

transformers prepares the GenerationConfig, the logits processors and the stopping criteria, then calls the function
given as `custom_generate`. What our loop cannot honour it refuses by name.
"""

# B sequences of the caller's batch, T prompt width.

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import stopping_criteria as sc
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from foretell.decoding.arguments import OWN, Plan, open_to_transformers
from foretell.decoding.policies import LOSSY, SPANS
from foretell.decoding.scores import RowScores, of_more_than_one_text
from foretell.decoding.stats import GenerationStats
from foretell.models.slot_cache import CACHE_NAMES
from foretell.ops.sampling import Dice
from foretell.types import SequenceState, Verification, Watcher

_HANDLED_KWARGS = {*CACHE_NAMES, "attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position"}
_NOT_HONOURED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "token_healing")


@dataclass
class MTPGenerateOutput(GenerateDecoderOnlyOutput):
    """As transformers' (sequences [B, prompt + new], and None for what cannot be asked for), and what it took."""

    stats: GenerationStats | None = None


class Finish:
    """Stopping criteria of transformers, asked after every token; end tokens and lengths without a tensor.

    pads: transformers fills up a text that has ended only if there is an end token. Without one, texts that a stop
    string ends go on until all have ended.
    """

    def __init__(self, criteria: list, batch: int, device: torch.device) -> None:
        self.batch, self.device = batch, device
        self.ended: dict[int, int] = {}  # width at which each row of the batch ended
        self.pads = batch == 1 or any(hasattr(criterion, "eos_token_id") for criterion in criteria)
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
        length = len(sequence.padding) + len(sequence.tokens)
        done = sequence.tokens[-1] in self.eos or length >= self.max_length
        if self.others:
            text = torch.tensor([sequence.padding + sequence.tokens], device=self.device)
            answers = [criterion(text, None) for criterion in self.others]  # each is asked, as transformers asks
            done = done or any(bool(torch.as_tensor(answer).all()) for answer in answers)
        if done:
            self.ended.setdefault(sequence.index, length)
        if self.pads or length >= self.max_length:
            return done
        return len(self.ended) == self.batch and length >= max(self.ended.values())

    def trim(self, sequences: list[SequenceState]) -> None:
        """Cut what goes on beyond the width of transformers' output."""
        if self.pads:
            return
        for sequence in sequences:
            extra = len(sequence.padding) + len(sequence.tokens) - max(self.ended.values())
            del sequence.tokens[len(sequence.tokens) - max(extra, 0) :]
            while extra > 0:
                last = sequence.record.pop()
                kept = max(last.emitted - extra, 0)
                extra -= last.emitted - kept
                if kept:
                    accepted, sources = min(last.accepted, kept), last.sources[:kept]
                    sequence.record.append(replace(last, accepted=accepted, emitted=kept, sources=sources))


def refuse_unsupported(generation_config: Any, model_kwargs: dict[str, Any]) -> None:
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
    # transformers adds some of its own to a multimodal model's, with nothing in them where the prompt is text alone
    given = {name for name, value in model_kwargs.items() if value is not None and value != {}}
    # 0 is text, in tokenizers' and processors' outputs alike
    given -= {n for n in given if n.endswith("token_type_ids") and not torch.as_tensor(model_kwargs[n]).any()}
    pictures = " (what transformers made of the images or videos that were given)"
    bad += [f"{n}{pictures if n == 'mm_encoder_outputs' else ''}" for n in sorted(given - _HANDLED_KWARGS)]
    if bad:
        raise ValueError(
            "foretell's generate cannot honour: "
            + "; ".join(bad)
            + ". Leave these out, or call model.generate without it."
        )


def prepared(model: Any, input_ids: list[int], **how: Any) -> tuple[list, list, Any]:
    """(logits processors, stopping criteria, GenerationConfig) as transformers' generate prepares them for one prompt.

    Raises ValueError for what cannot be honoured beside other texts.
    """

    def keep(_model: Any, input_ids: Tensor, logits_processor: list, stopping_criteria: list, **more: Any) -> tuple:
        return logits_processor, stopping_criteria, more

    ids_1T = torch.tensor([input_ids], device=model.device)
    processors, criteria, more = model.generate(
        ids_1T, attention_mask=torch.ones_like(ids_1T), custom_generate=keep, use_cache=True, **how
    )
    config = more.pop("generation_config")
    refuse_unsupported(config, more)
    if others := of_more_than_one_text([*processors, *criteria], 2):
        raise ValueError(f"foretell cannot honour beside other texts: {', '.join(others)}.")
    for processor in processors:
        if type(processor) is RepetitionPenaltyLogitsProcessor:  # a number of padding tokens a row, of which are none
            processor.prompt_ignore_length = None
    return processors, criteria, config


class MTPGenerate:
    """What transformers calls as `custom_generate`: a module's decoding, with foretell's own arguments. Those may stand
    in the call of transformers' generate too, and win there.
    """

    def __init__(self, mtp: Any, **own: Any) -> None:
        self.mtp, self.own = mtp, own
        self.watchers: list[Watcher] = []  # see every row that is kept
        self.leave: Callable[[SequenceState], None] | None = None  # told of each text as it ends
        self.stop_admitting: Callable[[], bool] | None = None  # true: texts that still wait stay as they are
        Plan.of(mtp, **own)  # what is wrong is said at once

    @property
    def __signature__(self) -> inspect.Signature:
        return open_to_transformers()

    def __call__(self, model: Any, *given: Any, **kwargs: Any) -> Tensor | MTPGenerateOutput:
        with self.mtp.target.reading():
            return self._generate(model, *given, **kwargs)

    def _generate(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: list,
        stopping_criteria: list,
        generation_config: Any,
        tokenizer: Any = None,
        callers_streamer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor | MTPGenerateOutput:
        mtp, streamer = self.mtp, callers_streamer
        if not any(part is model for part in mtp.model.modules()):
            raise ValueError(
                "custom_generate: got another model than the one that this MTPModel was made of; call generate of "
                "mtp.model, or of mtp."
            )
        plan = Plan.of(mtp, **self.own | {name: model_kwargs.pop(name) for name in OWN if name in model_kwargs})
        refuse_unsupported(generation_config, model_kwargs)
        input_ids_BT = input_ids.to(mtp.device)
        B, T = input_ids_BT.shape
        if streamer is not None and B > 1:
            raise ValueError(f"a streamer takes one sequence; got a batch of {B}.")
        others = of_more_than_one_text(logits_processor, B)
        others += of_more_than_one_text(stopping_criteria, B) if B > 1 else []
        if others and self.leave is not None:
            raise ValueError(
                f"foretell cannot answer prompts in continuous batches with {', '.join(others)}, which may look at the "
                "whole batch. Leave it out of model.generation_config."
            )
        if others and plan.length == 0 and plan.policy not in SPANS:
            given = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria, "streamer": streamer}
            given |= {"generation_config": generation_config, **model_kwargs}
            return self._in_order(model, input_ids, plan.generator, given)
        if others:
            raise ValueError(
                f"foretell's generate cannot honour: {', '.join(others)} beside drafts: it may look at the whole batch "
                "or keep state from call to call, and drafts may be refused. Use num_draft_tokens=0, or say "
                "of_one_text = True on it where it is a function of one row's ids and scores; of a single prompt, "
                "rolls_back = True where a deep copy of it goes on from where it stands."
            )
        sample = bool(generation_config.do_sample)
        sequences = _sequences(input_ids_BT, model_kwargs)
        scores, finish = RowScores(logits_processor, sample, plan.generator), Finish(stopping_criteria, B, mtp.device)
        warp = scores.warp if plan.drawn and sample else None
        with mtp.workspace() as space:
            length: Any = plan.length
            if length == "auto" or (plan.layout == "auto" and length):
                drawn = warp is not None or not isinstance(plan.drafter, str)
                counted = sample and (drawn or plan.policy in LOSSY)  # lengths have a say in the text
                length = mtp.adaptive(space, plan, sample, counted)
                length.begin()
            drafter = plan.drafters(mtp, space, warp)

            def leave(sequence: SequenceState) -> None:
                plan.remember(space, sequence)
                if self.leave is not None:
                    self.leave(sequence)

            stats = space.decoder(mtp.target, drafter, plan.policy, self.watchers).run(
                sequences,
                scores,
                finish,
                max_tokens=max(finish.max_length or 0, T + 1),
                num_draft_tokens=length,
                policy=plan.policy,
                confidence_threshold=plan.threshold,
                reference=mtp.reference,
                slots=plan.slots,
                generator=plan.generator if scores.dice is None else scores.dice.generator(mtp.device),
                emit=None if streamer is None else lambda _s, new: [streamer.put(torch.tensor([t])) for t in new],
                leave=leave,
                stop_admitting=self.stop_admitting,
                share=len({tuple(s.tokens) for s in sequences}) < B,  # answers to one prompt: it is read once
            )
        if streamer is not None:
            streamer.end()
        finish.trim(sequences)
        width = max(len(s.new_tokens) for s in sequences)
        new_BT = torch.full((B, width), _pad_token(generation_config), dtype=input_ids_BT.dtype)
        for sequence in sequences:
            new_BT[sequence.index, : len(sequence.new_tokens)] = torch.tensor(sequence.new_tokens)
        out = torch.cat([input_ids_BT, new_BT.to(input_ids_BT.device)], dim=1)
        return MTPGenerateOutput(sequences=out, stats=stats) if generation_config.return_dict_in_generate else out

    def _in_order(
        self, model: Any, input_ids_BT: Tensor, generator: torch.Generator | None, given: dict[str, Any]
    ) -> Tensor | MTPGenerateOutput:
        """transformers' own loop: it calls processors and criteria once a token, in order, with the whole batch."""
        with torch.random.fork_rng(enabled=generator is not None):
            if generator is not None:
                torch.manual_seed(Dice(generator).seed)
            out = type(model)._sample(model, input_ids_BT, **given)
        config = given["generation_config"]
        if not config.return_dict_in_generate:
            return out
        (B, T), steps = input_ids_BT.shape, out.sequences.shape[1] - input_ids_BT.shape[1]
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        records = []
        for row in out.sequences[:, T:].tolist():
            count = next((i + 1 for i, token in enumerate(row) if token in ends), steps)
            records.append([Verification(0, 0, 0, 1, ["target"]) for _ in range(count)])
        stats = GenerationStats("lossless", True, records, target_forwards=steps, verifications=steps)
        stats.target_rows, stats.reference = B * (T + steps - 1), self.mtp.reference
        return MTPGenerateOutput(sequences=out.sequences, stats=stats)


def _sequences(input_ids_BT: Tensor, model_kwargs: dict[str, Any]) -> list[SequenceState]:
    """The rows of the caller's batch, without their left padding."""
    T, mask_BT = input_ids_BT.shape[1], model_kwargs.get("attention_mask")
    mask_BT = torch.ones_like(input_ids_BT) if mask_BT is None else mask_BT
    if mask_BT.shape != input_ids_BT.shape:
        raise ValueError(
            f"attention_mask: got shape {tuple(mask_BT.shape)} for prompts of shape {tuple(input_ids_BT.shape)}, "
            "wanted the same."
        )
    sequences = []
    for index, (ids, mask) in enumerate(zip(input_ids_BT.tolist(), mask_BT.tolist(), strict=True)):
        left = mask.index(1) if 1 in mask else T
        if left == T or 0 in mask[left:]:
            raise ValueError(
                f"attention_mask of row {index} must be zeros (left padding) then ones, at least one: got {mask}. "
                + ("This prompt is empty." if left == T else "Set padding_side='left' in the tokenizer.")
            )
        sequences.append(SequenceState(ids[left:], T - left, index, padding=ids[:left]))
    _check_positions(model_kwargs.get("position_ids"), mask_BT)
    return sequences


def _check_positions(position_ids_BT: Tensor | None, mask_BT: Tensor) -> None:
    if position_ids_BT is None:
        return
    if position_ids_BT.shape not in (mask_BT.shape, mask_BT[:1].shape):  # transformers makes them of a mask
        got = f"{tuple(position_ids_BT.shape)} for prompts of shape {tuple(mask_BT.shape)}"
        raise ValueError(f"position_ids or attention_mask: got shape {got}, wanted the same.")
    usual_BT = mask_BT.long().cumsum(-1) - 1
    if not torch.equal(position_ids_BT.expand_as(usual_BT)[mask_BT == 1], usual_BT[mask_BT == 1]):
        raise ValueError("foretell's generate cannot honour: position_ids that do not count from each prompt's start.")


def _pad_token(generation_config: Any) -> int:
    pad = generation_config.pad_token_id
    if pad is None:
        eos = generation_config.eos_token_id
        pad = eos[0] if isinstance(eos, list) else eos
    return 0 if pad is None else int(pad)
