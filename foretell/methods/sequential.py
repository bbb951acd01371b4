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
from foretell.methods.chain import FEW_ROWS, ChainDrafter, begin_rows, reading_plan
from foretell.models.attention import RowMasks
from foretell.models.fast import fast_view
from foretell.models.mtp_block import FusionOrder, MTPBlock
from foretell.models.slot_cache import SlotCache, SlotStorage
from foretell.models.target import Target, TargetRows
from foretell.ops.tree import forest
from foretell.types import Batch, Draft, SequenceState

LONGEST_SHARED = 16


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

    @property
    def longest_draft(self) -> int:
        """See MTPModule: one block for all depths can be reused further."""
        return LONGEST_SHARED if self.config.shared_module else self.config.depth

    def block(self, depth: int) -> MTPBlock:
        """The block of a depth (1-based)."""
        return self.blocks[0 if self.config.shared_module else depth - 1]

    def depth_states(self, target: Target, batch: Batch, source_BTD: Tensor, detach: bool) -> Iterator[Tensor]:
        """h^k for k = 1..K: [B, T, D] each, what the output head reads. detach keeps gradient from the
        embeddings."""
        for block in self.blocks:
            block.masks.begin_text(batch.document_BT)
        hidden_BTD = source_BTD
        for k in range(1, self.config.depth + 1):
            embedding_BTD = self.embedded_ahead(target, batch, k, detach)
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
            own_BOD = target.embed(chain[-1])
            text_BTD = self.embedded_ahead(target, batch, k, detach)
            embedding_BRD = torch.cat([text_BTD, own_BOD.detach() if detach else own_BOD], dim=1)
            block = self.block(k)
            places = target.position_embeddings(hidden_BRD, positions_BR, block.layer_type)
            state_BRD, hidden_BRD = block(embedding_BRD, hidden_BRD, places, positions_BR)
            states.append(state_BRD[:, T:])
            chain.append(self.guess(target, states[-1], k))
        return torch.stack(chain[:-1], dim=-1), states

    def drafter(self, target: Target) -> SequentialDrafter:
        """A drafter over the module's current weights."""
        return SequentialDrafter(self, target)


class SequentialDrafter(ChainDrafter):
    """Drafts a chain: depth k reads position j's state of depth k-1 and token j+k, drafted where it is not known yet.

    Rows whose tokens were drafts that the target then refused are computed again with the true tokens: done counts,
    for each depth and slot, the leading rows that saw only true tokens.
    """

    module: SequentialModule

    def __init__(self, module: SequentialModule, target: Target) -> None:
        super().__init__(module, target)
        self._view = fast_view(module)
        self._masks = RowMasks()
        self._masks.hang_on(self._view)

    def _renew(self) -> None:
        self._states = SlotStorage()  # h^0, h^1, ... of every position of every slot
        self._caches: list[SlotCache] = []  # of each depth

    def open(self, slots: int, capacity: int) -> None:
        """See Watcher."""
        for storage in (self._states, *self._caches):
            storage.open()
        self._done = [[0] * slots for _ in self._caches]
        self._slots = slots

    def start(self, slot: int) -> None:
        """See Watcher."""
        for cache, done in zip(self._caches, self._done, strict=True):
            cache.clear(slot)
            done[slot] = 0

    def observe(self, sequences: Sequence[SequenceState], rows: TargetRows, kept: list[list[int]]) -> None:
        """See Watcher."""
        hidden_BRD = self.module.source(rows)
        self._states.reserve(max(s.slot for s in sequences) + 1, max(s.cached for s in sequences))
        at, picked = [], []
        for b, (sequence, path) in enumerate(zip(sequences, kept, strict=True)):
            start = sequence.slot * self._states.capacity + sequence.cached - len(path)
            at.extend(range(start, start + len(path)))
            picked.extend(b * hidden_BRD.shape[1] + row for row in path)
        flat_ND = hidden_BRD.reshape(-1, hidden_BRD.shape[2])
        if picked != list(range(flat_ND.shape[0])):
            flat_ND = flat_ND[torch.tensor(picked, device=flat_ND.device)]
        self._states.parts(0, [hidden_BRD])[0].index_copy_(0, torch.tensor(at, device=flat_ND.device), flat_ND)

    def _limit(self, sequence: SequenceState) -> int:
        # with a prompt of one token there is no state to read yet
        return self.module.longest_draft if sequence.cached else 0

    def _step(self, sequences: Sequence[SequenceState], drafts: list[Draft], k: int, wanted: list[int]) -> Tensor:
        """Run depth k over every row that is not done, and return the logits of each sequence's newest row [B, M]."""
        longest = max(s.cached for s in sequences)
        if len(self._caches) < k:
            self._caches.append(SlotCache())
            self._done.append([0] * self._slots)
        self._caches[k - 1].reserve(len(sequences), longest)
        done = [self._done[k - 1][s.slot] for s in sequences]
        counts = [s.cached - done[b] if wanted[b] >= k else 0 for b, s in enumerate(sequences)]
        newest_BD = self._states.held(0)[0].new_zeros(len(counts), self.target.hidden_size)
        for part, starts, rows in reading_plan(counts, done, longest + FEW_ROWS):
            newest_BD[part] = self._forward(sequences[part], drafts[part], k, starts, rows)
        return self.target.scaled(self._head(newest_BD))

    def _forward(
        self, sequences: Sequence[SequenceState], drafts: list[Draft], k: int, starts: list[int], counts: list[int]
    ) -> Tensor:
        """[B, D] of the last of these rows at depth k: counts[b] of sequence b from starts[b] on."""
        done, C, device = self._done[k - 1], self._states.capacity, self.target.device
        R, spare = max(counts), self._states.size
        ids, at = [], []
        for sequence, draft, start, count in zip(sequences, drafts, starts, counts, strict=True):
            row_ids = (sequence.tokens + draft.tokens)[start + k : start + k + count]  # the newest rows read drafts
            ids.append(row_ids + [0] * (R - count))
            first = sequence.slot * C + start
            at.append([*range(first, first + count), *[spare] * (R - count)])
            done[sequence.slot] = max(done[sequence.slot], min(start + count, sequence.cached - k + 1))
        at_N = torch.tensor(at, device=device).reshape(-1)
        hidden_BRD = self._states.held(k - 1)[0][at_N].view(len(sequences), R, -1)
        cache = self._caches[k - 1]
        positions_BR = begin_rows(cache, self._masks, sequences[0].slot, starts, counts, device)
        block = self._view.block(k)
        read_as = [s.read_as for s in sequences]
        places = self.target.position_embeddings(hidden_BRD, positions_BR, block.layer_type, read_as)
        embedding_BRD = self.target.embed(torch.tensor(ids, device=device))
        state_BRD, chained_BRD = block(embedding_BRD, hidden_BRD, places, positions_BR, cache)
        (chained_ND,) = self._states.parts(k, [chained_BRD])
        chained_ND.index_copy_(0, at_N, chained_BRD.reshape(-1, chained_BRD.shape[2]))
        self.calls += 1
        return state_BRD[torch.arange(len(counts)), [max(count, 1) - 1 for count in counts]]

    def move(self, source: int, target: int, length: int) -> None:
        """See Watcher."""
        self._states.move(source, target, length)
        for cache, done in zip(self._caches, self._done, strict=True):
            cache.move(source, target, length)
            done[target] = done[source]
