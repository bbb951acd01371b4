"""Drafts of mask tokens: the masks below the last accepted token were read in the forward that accepted it.

So a step is one forward: it verifies the last drafts and reads the masks that the next drafts come of. A block of masks
that hangs below a refused draft is lost; which rows carry blocks is the layout:

    linear      the last draft only: drafts again only if all were accepted
    quadratic   every row: there are always drafts again (arXiv 2507.11851, figure 4, with the group it leaves out:
                one below the last verified token as well, so that a refused first draft is no exception)
    auto        the rows whose blocks pay, by the machine's cost curve and what has been accepted
    two_pass    none: a forward of its own reads the masks below the last token, a second verifies (SGLang's UNO)
"""

# B sequences, R rows of a forward, K masks of a block, D hidden width, M draft vocabulary.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foretell.methods.base import MTPModule
from foretell.methods.chain import ChainDrafter, probabilities
from foretell.models.fast import fast_view
from foretell.models.slot_cache import SlotCache
from foretell.models.target import Target, TargetRows
from foretell.ops.sampling import draw, race
from foretell.types import Draft, SequenceState, Worth

Layout = Literal["linear", "quadratic", "auto", "two_pass"]


class MaskedDrafter(ChainDrafter):
    """A chain a sequence: the sampler reads mask after mask, each with the token drafted before it."""

    def __init__(self, module: MTPModule, sampler: nn.Module | None, target: Target, dtype: str) -> None:
        super().__init__(module, target, dtype)
        self.layout: Layout = "quadratic"
        self.masks = module.config.depth  # K of each block
        self._sampler = None if sampler is None else fast_view(sampler, dtype)
        self.reads_drafts = sampler is not None or module.bigram is not None

    def _renew(self) -> None:
        self._states: list[Tensor | None] = []  # of each slot: the masks below its last token

    def open(self, slots: int, capacity: int) -> None:
        """See Watcher."""
        self._states = [None] * slots
        # of noise masks, where the caller seeds nothing: greedy decoding leaves torch's own numbers alone
        self._noise = torch.Generator(self.target.device).manual_seed(0)

    def borrow(self, cache: SlotCache) -> None:
        """See Drafter."""
        self._cache = cache

    def shares(self, slot: int, length: int) -> int:
        """See Watcher."""
        return length

    def start(self, slot: int) -> None:
        """See Watcher."""
        self._states[slot] = None

    def observe(self, sequences: Sequence[SequenceState], rows: TargetRows, kept: list[list[int]]) -> None:
        """See Watcher."""
        for b, (sequence, path) in enumerate(zip(sequences, kept, strict=True)):
            first = None if rows.blocks is None or not path else rows.blocks[b].get(path[-1])
            state_KD = None if first is None else rows.post_norm_BRD[b, first : first + self._laid]
            self._states[sequence.slot] = state_KD

    def move(self, source: int, target: int, length: int) -> None:
        """See Watcher."""
        self._states[target] = self._states[source]

    def carriers(
        self, sequences: Sequence[SequenceState], drafts: list[Draft], adaptive: Any
    ) -> tuple[int, list[list[int]]]:
        """See Drafter."""
        self._seed_noise()
        if self.layout == "two_pass":
            return 0, [[] for _ in drafts]
        self._laid = self.masks
        if self.layout == "auto":
            self._laid, rows = adaptive.paying_blocks(self.name, drafts, self.masks)
        elif self.layout == "quadratic":
            rows = [list(range(len(draft) + 1)) for draft in drafts]
        else:
            rows = [[_last_own(draft, self.name) + 1] for draft in drafts]
        return self._laid, rows

    def span(self, masks: int) -> None:
        """See ModuleDrafter."""
        self.layout, self.masks = "linear", masks

    def span_logits(
        self, sequences: Sequence[SequenceState], drafts: list[Draft], k: int, asked: list[int], rows: Any
    ) -> Tensor:
        """See ModuleDrafter. Without a sampler and a bigram no depth reads what was drafted before it: all are read at
        once.
        """
        if self.reads_drafts:
            return self._step(sequences, drafts, k, asked)
        if k == 1:
            self.calls += 1
            first = [next(iter(block.values()), 0) for block in rows.blocks]
            at_BK = torch.tensor(first)[:, None] + torch.arange(self.masks)
            states_BKD = rows.post_norm_BRD[torch.arange(len(first))[:, None], at_BK]
            self._all_BKM = self.target.scaled(self._head(states_BKD))
        return self._all_BKM[:, k - 1]

    def _begin(self, sequences: Sequence[SequenceState], lengths: list[int], worth: Worth | None) -> list[Draft]:
        drafts = super()._begin(sequences, lengths, worth)
        if self.layout != "two_pass" or not any(lengths):
            return drafts
        if worth is None or any(worth(self.name, drafts)):
            for draft, length, (token, probability, row_V) in zip(drafts, lengths, self._look(sequences), strict=True):
                if length:
                    draft.add(token, -1, probability, self.name, row_V)
        else:
            self._states = [None] * len(self._states)
        return drafts

    def _look(self, sequences: Sequence[SequenceState]) -> list[tuple[int, float, Tensor | None]]:
        """A pass of its own: each sequence's last token, which gives the next one exactly, and the masks below it.

        The target's own next token of each sequence, its probability and, where drafts are drawn, what it is drawn of.
        """
        self._seed_noise()
        K, device = self.masks, self.target.device
        ids_BR = torch.tensor([[s.tokens[-1]] + [0] * K for s in sequences], device=device)
        step_BR = torch.arange(K + 1, device=device).expand(len(sequences), -1)
        lengths_B = torch.tensor([s.cached for s in sequences], device=device)
        visible = max(s.cached for s in sequences) + K + 1
        read_as = [s.read_as for s in sequences]
        rows = self.target.forward_rows(
            ids_BR, lengths_B, self._cache, visible=visible, steps_BR=step_BR, read_as=read_as
        )
        logits_BV = self.target.logits(rows.post_norm_BRD[:, 0], view=True).float()
        probs_BV = probabilities(self.warp(logits_BV) if self.sample and self.warp is not None else logits_BV)
        token_B = draw(probs_BV, self.generator) if self.sample else probs_BV.argmax(-1)
        sure_B = probs_BV.gather(1, token_B[:, None])[:, 0]
        for scores, at in [] if self.scores is None or self.sample else self.scores.parts(sequences):
            if scores.dice is not None:  # its own draw, unless what it has said has a say in it
                number_N1 = scores.numbers([sequences[b] for b in at], [[0] for _ in at], device)
                token_B[list(at)], sure_B[list(at)] = (
                    race(probabilities(scores.warp(logits_BV[list(at)])), number_N1[:, 0]),
                    1.0,
                )
        for b, sequence in enumerate(sequences):
            self._states[sequence.slot] = rows.post_norm_BRD[b, 1:]
        self.calls += 1
        rows_V = probs_BV.unbind() if self.sample else [None] * len(sequences)
        return list(zip(token_B.tolist(), sure_B.tolist(), rows_V, strict=True))

    def _seed_noise(self) -> None:
        assert self.target.mask_rows is not None, "a masked module has given the target its mask rows"
        self.target.mask_rows.adapters.now.generator = self._noise if self.generator is None else self.generator

    def _limit(self, sequence: SequenceState) -> int:
        states_KD = self._states[sequence.slot]
        return 0 if states_KD is None else len(states_KD)

    def _step(self, sequences: Sequence[SequenceState], drafts: list[Draft], k: int, wanted: list[int]) -> Tensor:
        want = [b for b, length in enumerate(wanted) if length >= k]
        state_BD = torch.stack([self._states[sequences[b].slot][k - 1] for b in want])  # type: ignore[index]
        before_B = self.last_tokens([sequences[b] for b in want], [drafts[b] for b in want])
        if self._sampler is not None:
            state_BD = self._sampler(self.target.embed(before_B), state_BD)
        logits_BM = self.said(self._head(state_BD), state_BD, before_B)
        self.calls += 1
        if len(want) == len(sequences):
            return logits_BM
        if self._sure is not None:
            self._sure = self._sure.new_zeros(len(sequences)).index_copy_(0, torch.tensor(want), self._sure)
        out_BM = logits_BM.new_zeros(len(sequences), logits_BM.shape[1])
        out_BM[want] = logits_BM
        return out_BM


def _last_own(draft: Draft, name: str) -> int:
    """The deepest token that the module drafted, alone or with others; -1 where there is none."""
    depth: list[int] = []
    for parent in draft.parents:
        depth.append(1 if parent < 0 else depth[parent] + 1)
    own = [i for i, source in enumerate(draft.sources) if name in source.split("+")]
    return max(own, key=lambda i: (depth[i], draft.confidence[i]), default=len(draft) - 1)
