"""Sequential MTP modules: depth k reads depth k-1's states and the token k ahead.

DeepSeek-V3 report (arXiv 2412.19437, section 2.2); one module reused at every depth is FastMTP (arXiv 2509.18362).
Training, draft_logits and the drafter below run the same MTPBlock at the same positions, with one key-value cache a
depth, so that what was trained is what drafts.
"""

# B sequences, T positions, R rows of a step, K depths, N rows flattened, D hidden width, V vocabulary, M draft
# vocabulary.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from foretell.methods.base import MTPConfig, MTPModule
from foretell.methods.chain import ChainDrafter
from foretell.models.attention import RowMasks
from foretell.models.fast import fast_view
from foretell.models.mtp_block import FusionOrder, MTPBlock
from foretell.models.slot_cache import SlotCache
from foretell.models.target import Target, TargetRows
from foretell.ops.shift import ahead
from foretell.ops.tree import forest
from foretell.types import Batch, Draft, SequenceState

LONGEST_SHARED = 16
FEW_ROWS = 8  # padding up to so many rows a sequence is cheaper than one more forward


@dataclass(kw_only=True)
class SequentialConfig(MTPConfig):
    """Settings of sequential modules."""

    method: ClassVar[str] = "sequential"
    depth: int = field(default=3, metadata={"help": "K: how many tokens beyond the ordinary next one are predicted."})
    shared_module: bool = field(default=False, metadata={"help": "One module reused at every depth (FastMTP)."})
    fusion_order: FusionOrder = field(
        default="embedding_hidden", metadata={"help": "Halves of the fusion's input; MiMo has them reversed."}
    )
    chain_raw: bool = field(
        default=False, metadata={"help": "The next depth receives the block's output before the norm (EAGLE-1)."}
    )
    initialisation: Literal["identity", "copy", "random"] = field(
        default="identity",
        metadata={"help": "Last layer copied and fusion passing the hidden state; random fusion; all random."},
    )

    def build(self, target: Target) -> SequentialModule:
        """The module for a target, initialised."""
        return SequentialModule(self, target)


class SequentialModule(MTPModule):
    """The blocks; depths share the target's output head."""

    config: SequentialConfig

    def __init__(self, config: SequentialConfig, target: Target) -> None:
        super().__init__(config, target)
        blocks = 1 if config.shared_module else config.depth
        self.blocks = nn.ModuleList(
            MTPBlock(
                target,
                config.fusion_order,
                config.chain_raw,
                config.initialisation,
                config.hidden_source == "post_norm",
            )
            for _ in range(blocks)
        )

    def block(self, depth: int) -> MTPBlock:
        """The block of a depth (1-based)."""
        return self.blocks[0 if self.config.shared_module else depth - 1]

    def depth_states(
        self, target: Target, batch: Batch, source_BTD: Tensor, detach: bool, depths: int | None = None
    ) -> Iterator[Tensor]:
        """h^k for k = 1..depths: [B, T, D] each, what the output head reads. detach keeps gradient from the
        embeddings."""
        for block in self.blocks:
            block.masks.begin_text(batch.document_BT)
        hidden_BTD = source_BTD
        for k in range(1, (depths or self.config.depth) + 1):
            ids_BT, inside_BT = ahead(batch.input_ids_BT, k, batch.document_BT, fill=0)
            embedding_BTD = target.embed(ids_BT)
            if detach:
                embedding_BTD = embedding_BTD.detach()
            embedding_BTD = embedding_BTD * inside_BT[..., None].to(embedding_BTD.dtype)
            block = self.block(k)
            places = target.position_embeddings(hidden_BTD, batch.position_ids_BT, block.layer_type)
            state_BTD, hidden_BTD = block(embedding_BTD, hidden_BTD, places, batch.position_ids_BT)
            yield state_BTD

    def propose(
        self, target: Target, batch: Batch, source_BTD: Tensor, owner_BO: Tensor, first_BO: Tensor, detach: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """See MTPModule. A chain's row stands beside its token's own: it sees the same rows before it, and itself."""
        B, T = batch.input_ids_BT.shape
        parents_BT = forest(batch.document_BT)
        parents_BR = torch.cat([parents_BT, parents_BT.gather(1, owner_BO)], dim=1)
        positions_BR = torch.cat([batch.position_ids_BT, batch.position_ids_BT.gather(1, owner_BO)], dim=1)
        nothing_B, R = torch.zeros(B, dtype=torch.long, device=owner_BO.device), parents_BR.shape[1]
        for block in self.blocks:
            block.masks.begin(nothing_B, R, R, parents_BR=parents_BR)
        own_BOD = source_BTD.gather(1, owner_BO[..., None].expand(-1, -1, source_BTD.shape[2]))
        hidden_BRD, chain, states = torch.cat([source_BTD, own_BOD], dim=1), [first_BO], []
        for k in range(1, self.config.depth + 1):
            ids_BT, inside_BT = ahead(batch.input_ids_BT, k, batch.document_BT, fill=0)
            embedding_BRD = target.embed(torch.cat([ids_BT, chain[-1]], dim=1))
            embedding_BRD = embedding_BRD.detach() if detach else embedding_BRD
            there_BR = torch.cat([inside_BT, torch.ones_like(owner_BO, dtype=torch.bool)], dim=1)
            block = self.block(k)
            places = target.position_embeddings(hidden_BRD, positions_BR, block.layer_type)
            state_BRD, hidden_BRD = block(
                embedding_BRD * there_BR[..., None].to(embedding_BRD.dtype), hidden_BRD, places, positions_BR
            )
            states.append(state_BRD[:, T:])
            chain.append(self.guess(target, states[-1], k))
        return torch.stack(chain[:-1], dim=-1), states

    def drafter(self, target: Target, sample: bool = False) -> SequentialDrafter:
        """A drafter over the module's current weights; sample: draw drafts from its distribution instead of argmax."""
        return SequentialDrafter(self, target, sample)


class SequentialDrafter(ChainDrafter):
    """Drafts a chain: depth k reads position j's state of depth k-1 and token j+k, drafted where it is not known yet.

    Rows whose tokens were drafts that the target then refused are computed again with the true tokens: done counts,
    for each depth and slot, the leading rows that saw only true tokens.
    """

    module: SequentialModule

    def __init__(self, module: SequentialModule, target: Target, sample: bool = False) -> None:
        super().__init__(module, target, sample)
        # a module reused at every depth can go deeper than it was trained; separate modules end
        self.longest = LONGEST_SHARED if module.config.shared_module else module.config.depth
        self._view = fast_view(module)
        self._masks = RowMasks()
        self._masks.hang_on(self._view)
        self.slots = self.capacity = 0

    def open(self, slots: int, capacity: int) -> None:
        """See Drafter."""
        if (slots, capacity) == (self.slots, self.capacity):
            return  # storage is reused; start() forgets what a slot held
        self.slots, self.capacity = slots, capacity
        self._states = [self._new_states()]  # h^0, h^1, ... of every position of every slot; the last row is spare
        self._caches: list[SlotCache] = []
        self._done: list[list[int]] = []

    def _new_states(self) -> Tensor:
        D = self.target.hidden_size
        return torch.zeros(self.slots * self.capacity + 1, D, device=self.target.device, dtype=self.target.dtype)

    def start(self, slot: int) -> None:
        """A new sequence takes this slot."""
        for done in self._done:
            done[slot] = 0

    def observe(self, sequences: Sequence[SequenceState], rows: TargetRows, kept: list[list[int]]) -> None:
        """See Drafter."""
        hidden_BRD = self.module.source(rows)
        at, picked = [], []
        for b, (sequence, path) in enumerate(zip(sequences, kept, strict=True)):
            start = sequence.slot * self.capacity + sequence.cached - len(path)
            at.extend(range(start, start + len(path)))
            picked.extend(b * hidden_BRD.shape[1] + row for row in path)
        flat_ND = hidden_BRD.reshape(-1, hidden_BRD.shape[2])
        if picked != list(range(flat_ND.shape[0])):
            flat_ND = flat_ND[torch.tensor(picked, device=flat_ND.device)]
        self._states[0].index_copy_(0, torch.tensor(at, device=flat_ND.device), flat_ND)

    def _limit(self, sequence: SequenceState) -> int:
        return self.longest if sequence.cached else 0  # with a prompt of one token there is no state to read yet

    def _step(self, sequences: Sequence[SequenceState], drafts: list[Draft], k: int, wanted: list[int]) -> Tensor:
        """Run depth k over every row that is not done, and return the logits of each sequence's newest row [B, M]."""
        self._reach(k)
        done = self._done[k - 1]
        counts = [s.cached - done[s.slot] if wanted[b] >= k else 0 for b, s in enumerate(sequences)]
        logits = []
        for part in self._alike(sequences, counts):
            if max(counts[part]):
                logits.append(self._forward(sequences[part], drafts[part], k, counts[part]))
            else:  # asks for nothing: any numbers will do
                ids = self.module.draft_vocab_ids
                M = self.target.vocab_size if ids is None else len(ids)
                logits.append(self._states[0].new_zeros(len(counts[part]), M))
        return torch.cat(logits)

    def _alike(self, sequences: Sequence[SequenceState], counts: list[int]) -> list[slice]:
        """Neighbours that share a forward. One that has just joined brings its whole prompt: its many rows must neither
        pad the few of the others nor reach beyond the cache.
        """
        starts = [s.cached - count for s, count in zip(sequences, counts, strict=True)]
        parts, first, R, rows, start = [], 0, counts[0], counts[0], starts[0]
        for b in range(1, len(counts)):
            R, rows, start = max(R, counts[b]), rows + counts[b], max(start, starts[b])
            wasteful = R > FEW_ROWS and R * (b + 1 - first) > 2 * rows
            if wasteful or start + R > self.capacity:
                parts.append(slice(first, b))
                first, R, rows, start = b, counts[b], counts[b], starts[b]
        return [*parts, slice(first, len(counts))]

    def _forward(self, sequences: Sequence[SequenceState], drafts: list[Draft], k: int, counts: list[int]) -> Tensor:
        """Depth k over the newest counts[b] rows of sequence b."""
        done, C, device = self._done[k - 1], self.capacity, self.target.device
        R = max(counts)
        ids, at = [], []
        for b, sequence in enumerate(sequences):
            start, known, n = done[sequence.slot], sequence.tokens, sequence.cached
            row_ids = (known + drafts[b].tokens)[start + k : start + k + counts[b]]  # the newest rows read drafts
            ids.append(row_ids + [0] * (R - counts[b]))
            first = sequence.slot * C + start
            at.append(list(range(first, first + counts[b])) + [self.slots * C] * (R - counts[b]))
            if counts[b]:
                done[sequence.slot] = max(start, n - k + 1)
        lengths_B = torch.tensor([s.cached - c for s, c in zip(sequences, counts, strict=True)], device=device)
        valid_rows_B = None if min(counts) == R else torch.tensor(counts, device=device)
        at_N = torch.tensor(at, device=device).reshape(-1)
        hidden_BRD = self._states[k - 1][at_N].view(len(sequences), R, -1)
        positions_BR = lengths_B[:, None] + torch.arange(R, device=device)
        visible = max(s.cached for s in sequences)
        visible = max(visible, max(s.cached - c for s, c in zip(sequences, counts, strict=True)) + R)
        valid_BR = None if valid_rows_B is None else torch.arange(R, device=device) < valid_rows_B[:, None]
        cache = self._caches[k - 1]
        cache.begin(sequences[0].slot, lengths_B, valid_BR, R, visible)
        self._masks.begin(lengths_B, visible, R, valid_rows_B=valid_rows_B, full=R == 1 and len(sequences) == 1)
        block = self._view.block(k)
        places = self.target.position_embeddings(hidden_BRD, positions_BR, block.layer_type)
        embedding_BRD = self.target.embed(torch.tensor(ids, device=device))
        state_BRD, chained_BRD = block(embedding_BRD, hidden_BRD, places, positions_BR, cache)
        self._states[k].index_copy_(0, at_N, chained_BRD.reshape(-1, chained_BRD.shape[2]))
        self.calls += 1
        newest = torch.tensor([max(c, 1) - 1 for c in counts], device=device)
        logits_BM = self._head(state_BRD[torch.arange(len(sequences), device=device), newest])
        return self.target.scaled(logits_BM)

    def _reach(self, depth: int) -> None:
        while len(self._caches) < depth:
            self._caches.append(SlotCache(self.slots, self.capacity))
            self._done.append([0] * self.slots)
            self._states.append(self._new_states())

    def move(self, source: int, target: int, length: int) -> None:
        """See Drafter."""
        C = self.capacity
        for states in self._states:
            states[target * C : target * C + length] = states[source * C : source * C + length]
        for cache, done in zip(self._caches, self._done, strict=True):
            cache.move(source, target, length)
            done[target] = done[source]
