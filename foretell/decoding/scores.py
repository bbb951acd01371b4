"""transformers' logits processors, applied to the rows of a draft as if each were the end of its own text.

A draft's rows may be refused, and rows of a batch are at different places of their texts. So beside drafts only those
processors can stand that are functions of one row's ids and scores: those of transformers that are known to be, and
those that say so of themselves with an attribute `of_one_text = True`. One that keeps a state of the text that it is
asked about may say `rolls_back = True`: a deep copy of it goes on from where it stands. Then copies are asked.
"""

# B sequences, R rows of each (its last token, then its drafts), N rows, V vocabulary.

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as lp
from transformers.generation import stopping_criteria as sc

from foretell.ops.sampling import Dice
from foretell.types import Draft, SequenceState

# these look at the scores only, so that all rows can go through them together. Exact types: a subclass may do more
_OF_VALUES = {  # and at none of the tokens' ids
    lp.TemperatureLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.TopHLogitsWarper,
    lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper,
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
    lp.LogitNormalization,
    lp.InfNanRemoveLogitsProcessor,
}
_OF_SCORES = _OF_VALUES | {lp.SuppressTokensLogitsProcessor}
_OF_ONE_TEXT = _OF_SCORES | {
    lp.MinLengthLogitsProcessor,
    lp.MinNewTokensLengthLogitsProcessor,
    lp.RepetitionPenaltyLogitsProcessor,
    lp.NoRepeatNGramLogitsProcessor,
    lp.SequenceBiasLogitsProcessor,
    lp.NoBadWordsLogitsProcessor,
    lp.ForcedBOSTokenLogitsProcessor,
    lp.ForcedEOSTokenLogitsProcessor,
    lp.ExponentialDecayLengthPenalty,
    lp.SuppressTokensAtBeginLogitsProcessor,
    lp.WatermarkLogitsProcessor,
    sc.MaxLengthCriteria,
    sc.EosTokenCriteria,
    sc.MaxTimeCriteria,
    sc.StopStringCriteria,
}


def of_more_than_one_text(given: Iterable[Any] | None, texts: int) -> list[str]:
    """Names of the logits processors or stopping criteria that may look at the batch, or keep state between calls, and
    cannot be asked about a draft.
    """
    others = [x for x in given or [] if type(x) not in _OF_ONE_TEXT and getattr(x, "of_one_text", False) is not True]
    return [getattr(x, "__name__", type(x).__name__) for x in others if not (texts == 1 and _rolls_back(x))]


def _rolls_back(processor: Any) -> bool:
    return getattr(processor, "rolls_back", False) is True


class RowScores:
    """Processed scores of draft rows, and the numbers to draw with. `plain` says that raw logits already decide
    (greedy, no processor).
    """

    def __init__(self, processors: list | None, do_sample: bool, generator: torch.Generator | None = None) -> None:
        self.processors = list(processors or [])
        self.do_sample = do_sample
        self.dice = Dice(generator) if do_sample else None
        self.plain = not self.processors and not do_sample
        self.prefix_free = all(type(p) in _OF_SCORES for p in self.processors)
        self.rolls_back = any(map(_rolls_back, self.processors))
        self._asked: dict[tuple[int, ...], list] = {}  # the processors as they stood once asked behind this text

    def parts(self, sequences: Sequence[SequenceState]) -> list[tuple[RowScores, Sequence[int]]]:
        """Whose scores these sequences have: here all of them the same."""
        return [(self, range(len(sequences)))]

    @property
    def kind(self) -> Any:
        """Equal where the same scores come of the same logits, whatever the text."""
        plain = [(type(p), *vars(p).items()) for p in self.processors] if self.prefix_free else []
        if not self.prefix_free or not all(isinstance(value, int | float) for _, *own in plain for _, value in own):
            return id(self)
        return self.do_sample, tuple(plain)

    def warp(self, scores_NV: Tensor) -> Tensor:
        """Through those processors that look at scores alone."""
        for processor in self.processors:
            if type(processor) in _OF_SCORES:
                scores_NV = processor(None, scores_NV)
        return scores_NV

    def uniform(self, sequences: Sequence[SequenceState], drafts: Sequence[Draft], logits_BRV: Tensor) -> Tensor | None:
        """[B, R] a number for each row's draw; None where nothing is drawn. Rows of one depth share theirs."""
        if self.dice is None:
            return None
        depths_BR = []
        for draft in drafts:
            depths = [0]
            for parent in draft.parents:
                depths.append(depths[parent + 1] + 1)
            depths_BR.append(depths + [0] * (logits_BRV.shape[1] - len(depths)))
        return self.numbers(sequences, depths_BR, logits_BRV.device)

    def numbers(self, sequences: Sequence[SequenceState], depths_BR: list[list[int]], device: torch.device) -> Tensor:
        """[B, R] the numbers that decide what follows rows of these depths below the last tokens."""
        assert self.dice is not None, "nothing is drawn"
        rows = [
            [self.dice(s.index, len(s.tokens) - s.prompt_length + depth) for depth in depths]
            for s, depths in zip(sequences, depths_BR, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float64, device=device)

    def as_drawn(self, logits_NM: Tensor) -> Tensor:
        """Probabilities of some tokens, by what a drafter says of them, as the target's are made."""
        scores_NM = logits_NM.float().nan_to_num()
        for processor in self.processors:
            if type(processor) in _OF_VALUES:
                scores_NM = processor(None, scores_NM)
        return torch.softmax(scores_NM, dim=-1)

    def rows(self, sequences: Sequence[SequenceState], drafts: Sequence[Draft], logits_BRV: Tensor) -> Tensor:
        """[B, R, V] of all sequences; rows beyond a draft's end mean nothing."""
        scores_BRV = logits_BRV.float()
        if self.prefix_free:
            return self.warp(scores_BRV.flatten(0, 1)).view_as(scores_BRV)
        out = [
            torch.cat([self._of_text(sequence, draft, scores_RV[: 1 + len(draft)]), scores_RV[1 + len(draft) :]])
            for sequence, draft, scores_RV in zip(sequences, drafts, scores_BRV, strict=True)
        ]
        return torch.stack(out)

    def _of_text(self, sequence: SequenceState, draft: Draft, scores_RV: Tensor) -> Tensor:
        """[R, V] raw scores in fp32 -> processed ones, as transformers' sampling computes them."""
        rows: list[Tensor] = []
        before = sequence.padding + sequence.tokens
        self._asked = {text: asked for text, asked in self._asked.items() if len(text) >= len(before) - 1}
        for row in range(len(draft) + 1):
            path, node = [], row - 1
            while node >= 0:
                path.append(draft.tokens[node])
                node = draft.parents[node]
            score, text = scores_RV[row : row + 1], before + path[::-1]
            if not (self.rolls_back and path and self._cannot_follow(rows[draft.parents[row - 1] + 1], text)):
                prefix = torch.tensor([text], device=scores_RV.device)
                for processor in self._standing(text):
                    score = _of_row(processor, sequence)(prefix, score)
            rows.append(score)
        return torch.cat(rows)

    def _cannot_follow(self, before_1V: Tensor, text: list[int]) -> bool:
        """Whether nobody will ask about this text, and its processors need not understand it."""
        never = bool(before_1V[0, text[-1]] == -torch.inf < before_1V.max())
        return never or tuple(text[:-1]) not in self._asked

    def _standing(self, text: list[int]) -> list:
        """The processors behind all but the last token of a text, to be asked about the whole."""
        if not self.rolls_back:
            return self.processors
        before = self._asked[tuple(text[:-1])] if self._asked else self.processors
        now = self._asked[tuple(text)] = [copy.deepcopy(one) if _rolls_back(one) else one for one in before]
        return now


class OwnScores(RowScores):
    """Each sequence's own, by its index: those of one kind are made together, and each draws its own numbers."""

    def __init__(self) -> None:
        super().__init__(None, False)
        self._of: dict[int, tuple[Any, RowScores]] = {}

    def give(self, sequence: SequenceState, scores: RowScores) -> None:
        """What this sequence would have alone."""
        self._of[sequence.index] = scores.kind, scores

    def take(self, sequence: SequenceState) -> None:
        """It has left."""
        self._of.pop(sequence.index, None)

    def parts(self, sequences: Sequence[SequenceState]) -> list[tuple[RowScores, Sequence[int]]]:
        """See RowScores."""
        rows: dict[Any, list[int]] = {}
        for b, sequence in enumerate(sequences):
            rows.setdefault(self._of[sequence.index][0], []).append(b)
        found: list[tuple[RowScores, Sequence[int]]] = []
        for few in rows.values():
            scores = copy.copy(self._of[sequences[few[0]].index][1])
            scores.dice = None if scores.dice is None else _EachDice(self._of)
            found.append((scores, few))
        return found


class _EachDice(Dice):
    """The dice of the text's own scores, for which it is the only text."""

    def __init__(self, of: dict[int, tuple[Any, RowScores]]) -> None:
        self._of = of

    def __call__(self, text: int, place: int) -> float:
        return self._of[text][1].dice(0, place)  # type: ignore[misc]


class AnswerPenalties:
    """OpenAI's: a bias of chosen tokens, penalties for what the answer has said and for how often it has."""

    of_one_text = True

    def __init__(self, prompt_length: int, presence: float, frequency: float, bias: Mapping[int, float]) -> None:
        self.prompt_length, self.presence, self.frequency = prompt_length, presence, frequency
        self.biased, self.bias = list(bias), list(bias.values())

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        """As transformers calls it."""
        scores_BV = scores_BV.clone()
        if self.biased:
            scores_BV[:, self.biased] += scores_BV.new_tensor(self.bias)
        if self.presence or self.frequency:
            answer_BT = ids_BT[:, self.prompt_length :]
            count_BV = torch.zeros_like(scores_BV).scatter_add_(1, answer_BT, torch.ones_like(answer_BT).to(scores_BV))
            scores_BV -= self.frequency * count_BV + self.presence * (count_BV > 0)
        return scores_BV


def _of_row(processor: Any, sequence: SequenceState) -> Any:
    """The processor for one row of the batch: transformers gives the repetition penalty a number of padding tokens a
    row."""
    if type(processor) is not lp.RepetitionPenaltyLogitsProcessor or not isinstance(
        processor.prompt_ignore_length, Tensor
    ):
        return processor
    own = copy.copy(processor)
    own.prompt_ignore_length = processor.prompt_ignore_length[sequence.index : sequence.index + 1]
    return own
