"""Parallel heads: depth k is a head of its own on the target's state at t, and predicts token t + 1 + k.

The head types of TRL's proposed MTP, Medusa's (arXiv 2401.10774) and Meta's (arXiv 2404.19737). Heads do not see each
other's guesses: cheap to draft, so that trees of several guesses a head pay (decoding/trees.py).
"""

# B sequences, T positions, R rows of a step, K depths, D hidden width, V vocabulary, M draft vocabulary, S guesses.

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foretell.methods.base import MTPConfig, MTPModule
from foretell.methods.chain import FEW_ROWS, LEAST, OwnDrafter, begin_rows, branch, reading_plan
from foretell.models.attention import RowMasks
from foretell.models.fast import fast_view
from foretell.models.mtp_heads import HeadType, InitStrategy, MTPHead
from foretell.models.slot_cache import SlotCache, SlotStorage
from foretell.models.target import Target, TargetRows
from foretell.types import Batch, Draft, SequenceState, Worth

SHARED_FROM = 65536  # tokens: larger vocabularies share the target's output matrix unless told otherwise


@dataclass(kw_only=True)
class HeadsConfig(MTPConfig):
    """Settings of parallel heads. depth=K heads predict K tokens BEYOND the ordinary next one."""

    method: ClassVar[str] = "heads"
    depth: int = field(default=2, metadata={"help": "K: how many tokens beyond the ordinary next one are predicted."})
    hidden_source: Literal["post_norm", "pre_norm"] | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "The target's states after or before its final norm; by default after, for layer before."},
    )
    head_type: HeadType = field(default="linear", metadata={"help": "What stands between state and output matrix."})
    num_layers: int = field(default=1, metadata={"help": "Layers of each head."})
    init_strategy: InitStrategy = field(
        default="default", metadata={"help": "How weights start; copy_lm_head copies the target's output matrix."}
    )
    dropout: float = field(default=0.1, metadata={"help": "Of the states that heads read, and inside heads."})
    share_unembedding: bool | None = field(
        default=None,
        metadata={"help": f"All heads use the target's output matrix; by default from {SHARED_FROM:,} tokens on."},
    )

    def __post_init__(self) -> None:
        if self.hidden_source is None:
            self.hidden_source = "pre_norm" if self.head_type == "layer" else "post_norm"
        super().__post_init__()

    def problems(self) -> list[str]:
        """See MTPConfig."""
        found = super().problems()
        if not isinstance(self.num_layers, int) or self.num_layers < 1:
            found.append(f"num_layers: got {self.num_layers!r}, wanted an integer of at least 1.")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout: got {self.dropout}, wanted at least 0 and below 1.")
        if self.head_type == "identical" and self.num_layers != 1:
            found.append(f"num_layers: got {self.num_layers}, but an identical head is one matrix, as the lm_head is.")
        if self.head_type == "identical" and self.share_unembedding:
            found.append("share_unembedding: an identical head IS an output matrix of its own; use head_type='linear'.")
        if self.head_type == "layer" and self.share_unembedding is False:
            found.append("share_unembedding: got False, but head_type='layer' always shares the output matrix (Meta).")
        return found

    def shares(self, vocabulary: int) -> bool:
        """Whether the target's output matrix serves all heads."""
        if self.head_type in ("identical", "layer"):
            return self.head_type == "layer"
        return vocabulary >= SHARED_FROM if self.share_unembedding is None else self.share_unembedding

    def build(self, target: Target) -> HeadsModule:
        """The heads for a target, initialised."""
        return HeadsModule(self, target)


class _Borrowed:
    """Another module's part. Copied or pickled together with its owner, it is the copy's part; else the same one."""

    def __init__(self, part: nn.Module) -> None:
        self.part = weakref.ref(part)

    def __call__(self) -> nn.Module | None:
        return self.part()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Borrowed:
        part = self.part()
        return _Borrowed(memo.get(id(part), part))

    def __reduce__(self) -> Any:
        return _Borrowed, (self.part(),)


class HeadsModule(MTPModule):
    """One MTPHead a depth."""

    guesses_trees = True
    config: HeadsConfig

    def __init__(self, config: HeadsConfig, target: Target) -> None:
        super().__init__(config, target)
        self.shared = config.shares(target.vocab_size)
        size = target.vocab_size if self.draft_vocab_ids is None else len(self.draft_vocab_ids)
        self.heads = nn.ModuleList(
            MTPHead(
                target,
                config.head_type,
                layers=config.num_layers,
                dropout=config.dropout,
                shared=self.shared,
                vocabulary=size,
                init=config.init_strategy,
            )
            for _ in range(config.depth)
        )
        self.dropout = nn.Dropout(config.dropout)
        # medusa's output matrices are always copies; the target's own is read here once, and again when the draft
        # vocabulary is chosen, before anything was trained
        self.copies = not self.shared and (config.init_strategy == "copy_lm_head" or config.head_type == "medusa")
        self._target_head = _Borrowed(target.head)  # not a part of this module
        self._copy_head()

    @torch.no_grad()
    def _copy_head(self) -> None:
        if not self.copies:
            return
        target_head = self._target_head()
        assert target_head is not None, "the target outlives its module"
        weight, bias = target_head.weight, getattr(target_head, "bias", None)
        ids = slice(None) if self.draft_vocab_ids is None else self.draft_vocab_ids
        for head in self.heads:
            head.output.weight.copy_(weight[ids])
            if bias is not None:
                head.output.bias.copy_(bias[ids])

    def set_draft_vocabulary(self, ids_M: Tensor) -> None:
        """See MTPModule; copies of the output matrix follow."""
        super().set_draft_vocabulary(ids_M)
        self._copy_head()

    def depth_states(self, target: Target, batch: Batch, source_BTD: Tensor, detach: bool) -> Iterator[Tensor]:
        """See MTPModule. Heads that attend are computed again in the backward pass: memory does not grow with K."""
        hidden_BTD = self.dropout(source_BTD)
        for head in self.heads:
            head.masks.begin_text(batch.document_BT)
            dtype = next(head.parameters()).dtype  # fp32 master weights may stand beside a bf16 target
            places = None
            if head.body.turns:
                places = target.position_embeddings(hidden_BTD, batch.position_ids_BT, head.body.layer_type)
            arguments = (hidden_BTD.to(dtype), batch.position_ids_BT, places)
            if self.training and torch.is_grad_enabled() and head.body.reach is None:
                state_BTD = checkpoint(head.body, *arguments, use_reentrant=False)
            else:
                state_BTD = head.body(*arguments)
            yield state_BTD.to(source_BTD.dtype)

    def unembedding(self, target: Target, depth: int, detach: bool) -> tuple[Tensor, Tensor | None]:
        """See MTPModule: the head's own output matrix where it has one."""
        if self.shared:
            return self.target_head(target, detach)
        output = self.heads[depth - 1].output
        return output.weight, output.bias

    def matrices(self) -> list[nn.Parameter]:
        """See MTPModule."""
        outputs = {id(head.output.weight) for head in self.heads if head.output is not None}
        return [weight for weight in super().matrices() if id(weight) not in outputs]

    def drafter(self, target: Target, dtype: str = "auto") -> HeadsDrafter:
        """A drafter over the heads' current weights; dtype: see generate's draft_dtype."""
        return HeadsDrafter(self, target, dtype)


class HeadsDrafter(OwnDrafter):
    """All heads read the newest state at once: their likeliest tokens are a chain, or a tree of several guesses.

    Heads that look back keep keys and values of their own (mha_ffn, layer) or read the few states before (cnn).
    """

    def __init__(self, module: HeadsModule, target: Target, dtype: str) -> None:
        super().__init__(module, target)
        self.tree: list[tuple[int, ...]] | None = None  # guesses by rank (decoding/trees.py); None is a chain
        # heads that look back a little need the newest states only: a ring a slot
        reach = module.heads[0].body.reach
        self._ring = None if reach is None else reach + 1
        self._view = fast_view(module, dtype)
        self._masks = RowMasks()
        self._masks.hang_on(self._view)
        self._head = module.draft_head(target, dtype) if module.shared else None

    def _renew(self) -> None:
        self._states = SlotStorage()
        self._caches = [SlotCache() for _ in self.module.heads]

    def open(self, slots: int, capacity: int) -> None:
        """See Watcher."""
        self._states.open()
        for cache, head in zip(self._caches, self.module.heads, strict=True):
            cache.open(head.body.windows)
        self._done = [0] * slots

    def start(self, slot: int) -> None:
        """See Watcher."""
        self._done[slot] = 0
        for cache in self._caches:
            cache.clear(slot)

    def shares(self, slot: int, length: int) -> int:
        """See Watcher. Of what is held in a ring, the newest is read again."""
        return 0 if any(cache.windows for cache in self._caches) else length - (self._ring or 0)

    def share(self, source: int, target: int, length: int) -> None:
        """See Watcher."""
        if source != target:
            self.move(source, target, length)
        self._done[target] = min(self._done[source], max(length - 1, 0))  # the newest row is what drafts are read of

    def hold(self, slots: int) -> None:
        """See Watcher."""
        for storage in (self._states, *self._caches):
            storage.hold(slots)

    def observe(self, sequences: Sequence[SequenceState], rows: TargetRows, kept: list[list[int]]) -> None:
        """See Watcher."""
        hidden_BRD = self.module.source(rows)
        self._states.reserve(max(s.slot for s in sequences) + 1, self._ring or max(s.cached for s in sequences))
        (states_ND,) = self._states.parts(0, [hidden_BRD])
        for b, (sequence, path) in enumerate(zip(sequences, kept, strict=True)):
            path = path[-self._ring :] if self._ring else path
            places = torch.arange(sequence.cached - len(path), sequence.cached, device=states_ND.device)
            states_ND[self._at(sequence, places)] = hidden_BRD[b, path]

    def _at(self, sequence: SequenceState, places: Tensor) -> Tensor:
        """Rows of the storage where a sequence's positions stand; padding may stand beyond its end."""
        C = self._states.capacity
        return sequence.slot * C + (places % self._ring if self._ring else places.clamp(max=C - 1))

    def move(self, source: int, target: int, length: int) -> None:
        """See Watcher."""
        self._states.move(source, target, min(length, self._ring or length))
        for cache in self._caches:
            cache.move(source, target, length)
        self._done[target] = self._done[source]

    def span_logits(
        self, sequences: Sequence[SequenceState], drafts: list[Draft], k: int, asked: list[int], rows: Any
    ) -> Tensor:
        """See ModuleDrafter. No head reads what was drafted before it: all are read at once."""
        if k == 1:
            self.calls += 1
            self._all = self._products(sequences, max(asked))
        products_BKM, states_BKD = self._all
        return self.said(products_BKM[:, k - 1], states_BKD[:, k - 1], self.last_tokens(sequences, drafts))

    @torch.no_grad()
    def draft(self, sequences: Sequence[SequenceState], lengths: list[int], worth: Worth | None = None) -> list[Draft]:
        """See Drafter. One reading of the heads serves all depths, so worth is asked once."""
        drafts = [Draft(probs=[] if self.sample else None) for _ in sequences]
        go_on = [True] * len(drafts) if worth is None or not any(lengths) else worth(self.name, drafts)
        asked = [
            min(n, self.module.longest_draft) if s.cached and goes else 0
            for s, n, goes in zip(sequences, lengths, go_on, strict=True)
        ]
        depth = max(asked, default=0)
        if depth == 0:
            return drafts
        self.calls += 1
        products_BKM, states_BKD = self._products(sequences, depth)
        self._walk(sequences, drafts, products_BKM, states_BKD, asked)
        if self.guesses > 1 and self.module.bigram is None:
            branch(drafts)
        return drafts

    def _walk(
        self,
        sequences: Sequence[SequenceState],
        drafts: list[Draft],
        products_BKM: Tensor,
        states_BKD: Tensor,
        asked: list[int],
    ) -> None:
        """The tree of ranks given by the caller, or a chain of first guesses and beside each its likely others, for
        `branch`. Level by level, since a bigram makes what a head says depend on the guess before.
        """
        depth, tree = products_BKM.shape[1], None if self.sample or self.guesses > 1 else self.tree
        if not tree:
            tree = [(0,) * k + (rank,) for k in range(depth) for rank in range(1 if self.sample else self.guesses)]
        begin_B = self.last_tokens(sequences, drafts)
        made: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor | None]] = {(): (begin_B, begin_B, None)}
        said: dict[Any, tuple[Tensor, Tensor, Tensor | None]] = {}
        for parent in sorted({ranks[:-1] for ranks in tree if len(ranks) <= depth}, key=len):
            k, children = len(parent), [ranks for ranks in tree if ranks[:-1] == parent]
            if parent not in made:
                continue
            before = k if self.module.bigram is None else parent
            if before not in said:
                width = 1 + max(ranks[-1] for ranks in tree if len(ranks) == k + 1)
                logits_BM = self.said(products_BKM[:, k], states_BKD[:, k], made[parent][0])
                said[before] = self._guesses(logits_BM, width, sequences, [k] * len(drafts))
            tokens_BS, sure_BS, probs_BV = said[before]
            for ranks in children:
                if ranks[-1] < tokens_BS.shape[1]:
                    made[ranks] = tokens_BS[:, ranks[-1]], sure_BS[:, ranks[-1]], probs_BV
        laid = [ranks for ranks in tree if ranks in made]
        columns = torch.stack([x_B.double() for ranks in laid for x_B in made[ranks][:2]], dim=1).tolist()
        for b, draft in enumerate(drafts):
            at: dict[tuple[int, ...], int] = {(): -1}
            for i, ranks in enumerate(laid):
                token, chance, probs_BV = int(columns[b][2 * i]), columns[b][2 * i + 1], made[ranks][2]
                offered = self.guesses == 1 or ranks[-1] == 0 or chance >= LEAST
                if len(ranks) <= asked[b] and ranks[:-1] in at and offered:
                    row_V = None if probs_BV is None else probs_BV[b]
                    at[ranks] = draft.add(token, at[ranks[:-1]], chance, self.name, row_V)

    def _products(self, sequences: Sequence[SequenceState], depth: int) -> tuple[Tensor, Tensor]:
        """[B, depth, M]: what each head says at each sequence's newest state, before scaling; and [B, depth, D]."""
        attends, longest = self._ring is None, max(s.cached for s in sequences)
        starts = [self._done[s.slot] if self._ring is None else max(s.cached - self._ring, 0) for s in sequences]
        if attends:  # all of them, since no cache may fall behind
            for cache in self._caches:
                cache.reserve(len(sequences), longest)
        counts = [s.cached - start for s, start in zip(sequences, starts, strict=True)]
        newest_KBD = self._states.held(0)[0].new_zeros(len(self._view.heads), len(counts), self.target.hidden_size)
        for part, first, rows in reading_plan(counts, starts, longest + FEW_ROWS):
            for k, head in enumerate(self._view.heads if attends else self._view.heads[:depth]):
                newest_KBD[k, part] = self._newest(head, self._caches[k], sequences[part], first, rows)
        if attends:
            for s in sequences:
                self._done[s.slot] = s.cached
        newest_KBD = newest_KBD[:depth]
        states_BKD = newest_KBD.transpose(0, 1)
        if self._head is not None:
            return self._head(states_BKD), states_BKD
        states = newest_KBD.to(self._dtype(newest_KBD))
        outputs = [head.output(state_BD) for head, state_BD in zip(self._view.heads, states, strict=False)]
        return torch.stack(outputs, dim=1), states_BKD

    def _dtype(self, states: Tensor) -> torch.dtype:
        """In which the heads compute: what learns is fp32, whatever the target is."""
        return next(self.module.parameters(), states).dtype

    def _newest(
        self,
        head: MTPHead,
        cache: SlotCache,
        sequences: Sequence[SequenceState],
        starts: list[int],
        counts: list[int],
    ) -> Tensor:
        """[B, D]: the head's body over counts[b] states of each sequence from starts[b] on, its last row."""
        device, own_cache = self.target.device, cache if head.body.reach is None else None
        if own_cache is None:
            positions_BR = torch.tensor(starts, device=device)[:, None] + torch.arange(max(counts), device=device)
        else:
            positions_BR = begin_rows(cache, self._masks, sequences[0].slot, starts, counts, device)
        at_BR = torch.stack([self._at(s, places_R) for s, places_R in zip(sequences, positions_BR, strict=True)])
        hidden_BRD = self._states.held(0)[0][at_BR]
        places = None
        if head.body.turns:
            read_as = [s.read_as for s in sequences]
            places = self.target.position_embeddings(hidden_BRD, positions_BR, head.body.layer_type, read_as)
        state_BRD = head.body(hidden_BRD.to(self._dtype(hidden_BRD)), positions_BR, places, own_cache)
        return state_BRD[torch.arange(len(counts)), [max(count, 1) - 1 for count in counts]]
