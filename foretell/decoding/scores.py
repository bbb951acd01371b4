"""transformers' logits processors, applied to the rows of a draft as if each were the end of its own text."""

# R rows of one sequence (its last token, then its drafts), V vocabulary.

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as lp

from foretell.types import Draft, SequenceState

# these look at the scores only, so that all rows can go through them together
_PREFIX_FREE = (
    lp.TemperatureLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper,
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
    lp.SuppressTokensLogitsProcessor,
    lp.LogitNormalization,
    lp.InfNanRemoveLogitsProcessor,
)
# these call the model, keep state from step to step, or ask which row of the batch they stand in
_REFUSED = (
    lp.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    lp.PrefixConstrainedLogitsProcessor,
    lp.SynthIDTextWatermarkLogitsProcessor,
    lp.EncoderRepetitionPenaltyLogitsProcessor,
    lp.EncoderNoRepeatNGramLogitsProcessor,
)


class RowScores:
    """Processed scores of draft rows. `plain` says that raw logits already decide (greedy, no processor)."""

    def __init__(self, processors: list | None, do_sample: bool) -> None:
        self.processors = list(processors or [])
        self.do_sample = do_sample
        refused = [type(p).__name__ for p in self.processors if isinstance(p, _REFUSED)]
        if refused:
            raise ValueError(
                f"foretell's generate cannot honour: {', '.join(refused)} (needs the model, the batch or its own "
                "state at each step, which rows of a draft do not have). Leave it out, or call model.generate "
                "without foretell."
            )
        self.plain = not self.processors and not do_sample
        self.prefix_free = all(isinstance(p, _PREFIX_FREE) for p in self.processors)

    def __call__(self, sequence: SequenceState, draft: Draft, logits_RV: Tensor) -> Tensor:
        """[R, V] raw logits -> processed scores in fp32, as transformers' sampling computes them."""
        scores_RV = logits_RV.float()
        if self.prefix_free:
            for processor in self.processors:
                scores_RV = processor(None, scores_RV)
            return scores_RV
        rows = []
        before = [sequence.pad_token_id] * sequence.left_padding + sequence.tokens
        for row in range(len(draft) + 1):
            path, node = [], row - 1
            while node >= 0:
                path.append(draft.tokens[node])
                node = draft.parents[node]
            prefix = torch.tensor([before + path[::-1]], device=logits_RV.device)
            score = scores_RV[row : row + 1]
            for processor in self.processors:
                score = _of_row(processor, sequence)(prefix, score)
            rows.append(score)
        return torch.cat(rows)


def _of_row(processor: Any, sequence: SequenceState) -> Any:
    """The processor for one row of the batch: transformers gives the repetition penalty a number of padding tokens a
    row."""
    ignore = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(processor, lp.RepetitionPenaltyLogitsProcessor) or not isinstance(ignore, Tensor):
        return processor
    own = copy.copy(processor)
    own.prompt_ignore_length = ignore[sequence.index : sequence.index + 1]
    return own
