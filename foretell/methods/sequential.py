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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from foretell.methods.base import MTPConfig, MTPModule
from foretell.methods.chain import FEW_ROWS, ChainDrafter, begin_rows, reading_plan
from foretell.models.attention import RowMasks
from foretell.models.fast import fast_view
from foretell.models.mtp_block import FusionOrder, MTPBlock
from foretell.models.slot_cache import SlotCache
from foretell.models.target import Target, TargetRows
from foretell.ops.tree import forest
from foretell.types import Batch, Draft, SequenceState, Worth

LONGEST_SHARED = 16
STATE, TOKENS = "state", "tokens"  # beside keys and values: h^k of each depth, and the texts themselves


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
            chain.append(self.guess(target, states[-1], k, chain[-1]))
        return torch.stack(chain[:-1], dim=-1), states

    def drafter(self, target: Target, dtype: str = "auto") -> SequentialDrafter:
        """A drafter over the module's current weights; dtype: see generate's draft_dtype."""
        return SequentialDrafter(self, target, dtype)


class SequentialDrafter(ChainDrafter):
    """Drafts a chain: depth k reads position j's state of depth k-1 and token j+k, drafted where it is not known yet.

    Rows whose tokens were drafts that the target then refused are computed again with the true tokens: done counts,
    for each depth and slot, the leading rows that saw only true tokens.
    """

    module: SequentialModule
    on_device = True

    def __init__(self, module: SequentialModule, target: Target, dtype: str) -> None:
        super().__init__(module, target, dtype)
        self._view = fast_view(module, dtype)
        self._masks = RowMasks()
        self._masks.hang_on(self._view)

    def _renew(self) -> None:
        self._cache = SlotCache()  # of each depth, and beside it the states h^k that it gives, and the tokens

    def open(self, slots: int, capacity: int) -> None:
        """See Watcher."""
        self._cache.open()
        self._told = [0] * slots  # leading tokens that are kept on the device
        self._done = [[0] * slots for _ in range(self.module.longest_draft)]
        self._angles: dict[str | None, tuple[Tensor, ...]] = {}

    def start(self, slot: int) -> None:
        """See Watcher."""
        self._cache.clear(slot)
        for done in (self._told, *self._done):
            done[slot] = 0

    def move(self, source: int, target: int, length: int) -> None:
        """See Watcher."""
        self._cache.move(source, target, length)
        for done in (self._told, *self._done):
            done[target] = done[source]

    def observe(self, sequences: Sequence[SequenceState], rows: TargetRows, kept: list[list[int]]) -> None:
        """See Watcher."""
        hidden_BRD = self.module.source(rows)
        self._reserve(sequences)
        at, picked = [], []
        for b, (sequence, path) in enumerate(zip(sequences, kept, strict=True)):
            at.append((sequence.slot, sequence.cached - len(path), len(path)))
            picked.extend(b * hidden_BRD.shape[1] + row for row in path)
        flat_ND = hidden_BRD.reshape(-1, hidden_BRD.shape[2])
        in_a_row = picked[-1] - picked[0] == len(picked) - 1
        self._cache.fill((STATE, 0), at, flat_ND[picked[0] : picked[-1] + 1] if in_a_row else flat_ND[picked])

    def _reserve(self, sequences: Sequence[SequenceState]) -> None:
        """Room for these, and for what is drafted behind them."""
        longest = max(len(s.tokens) for s in sequences) + self.module.longest_draft
        self._cache.reserve(max(s.slot for s in sequences) + 1, longest)

    def _limit(self, sequence: SequenceState) -> int:
        # with a prompt of one token there is no state to read yet
        return self.module.longest_draft if sequence.cached else 0

    def _begin(self, sequences: Sequence[SequenceState], lengths: list[int], worth: Worth | None) -> list[Draft]:
        drafts = super()._begin(sequences, lengths, worth)
        if any(lengths):
            self._tell(sequences, drafts)
        return drafts

    def span_logits(
        self, sequences: Sequence[SequenceState], drafts: list[Draft], k: int, asked: list[int], rows: Any
    ) -> Tensor:
        """See ModuleDrafter."""
        self._tell(sequences, drafts)
        return super().span_logits(sequences, drafts, k, asked, rows)

    def _tell(self, sequences: Sequence[SequenceState], drafts: list[Draft]) -> None:
        """Keep tokens on the device: what is new of these texts and of drafts behind them."""
        self._reserve(sequences)
        at, new = [], []
        for s, draft in zip(sequences, drafts, strict=True):
            fresh = s.tokens[self._told[s.slot] :] + draft.tokens
            at.append((s.slot, self._told[s.slot], len(fresh)))
            new.extend(fresh)
            self._told[s.slot] = len(s.tokens)
        self._cache.fill(TOKENS, at, torch.tensor(new, dtype=torch.long, device=self.target.device))

    def _hold(self, sequences: Sequence[SequenceState], k: int, tokens_B: Tensor) -> None:
        """See ChainDrafter."""
        self._cache.fill(TOKENS, [(s.slot, s.cached + k, 1) for s in sequences], tokens_B)

    def _step(self, sequences: Sequence[SequenceState], drafts: list[Draft], k: int, wanted: list[int]) -> Tensor:
        """Run depth k over every row that is not done, and return the logits of each sequence's newest row [B, M]."""
        done, longest = [self._done[k - 1][s.slot] for s in sequences], max(s.cached for s in sequences)
        counts = [s.cached - done[b] if wanted[b] >= k else 0 for b, s in enumerate(sequences)]
        newest_BD = self._cache.held((STATE, 0))[0].new_zeros(len(sequences), self.target.hidden_size)
        for part, starts, rows in reading_plan(counts, done, longest + FEW_ROWS):
            newest_BD[part] = self._forward(sequences[part], k, starts, rows)
        before_B = None
        if self.module.bigram is not None:
            places = [s.slot * self._cache.capacity + s.cached - 1 + k for s in sequences]
            before_B = self._cache.held(TOKENS)[0][places]
        return self.said(self._head(newest_BD), newest_BD, before_B)

    def _forward(self, sequences: Sequence[SequenceState], k: int, starts: list[int], counts: list[int]) -> Tensor:
        """[B, D] of the last of these rows at depth k: counts[b] of sequence b from starts[b] on."""
        done, cache, device = self._done[k - 1], self._cache, self.target.device
        for s, start, count in zip(sequences, starts, counts, strict=True):
            done[s.slot] = max(done[s.slot], min(start + count, s.cached - k + 1))  # later ones read drafts
        positions_BR = begin_rows(cache, self._masks, sequences[0].slot, starts, counts, device)
        hidden_BRD = cache.rows((STATE, k - 1))
        block = self._view.block(k)
        cache.tower = k
        places = self._places(hidden_BRD, positions_BR, block.layer_type, starts, [s.read_as for s in sequences])
        embedding_BRD = self.target.embed(cache.rows(TOKENS, ahead=k))
        state_BRD, chained_BRD = block(embedding_BRD, hidden_BRD, places, positions_BR, cache)
        if k < self.module.longest_draft:
            cache.put((STATE, k), chained_BRD)
        self.calls += 1
        if min(counts) == max(counts):
            return state_BRD[:, -1]
        last_B = torch.tensor(counts, device=device).clamp_(min=1) - 1
        return state_BRD[torch.arange(len(counts), device=device), last_B]

    def _places(self, like_BRD: Tensor, positions_BR: Tensor, kind: str | None, starts: list[int], read_as: Any) -> Any:
        """Rotary angles of these rows, read from a table that a run makes once where they depend on positions alone."""
        last = max(starts) + positions_BR.shape[1]
        table = () if self.target.turns_by_length else self._angles.get(kind)
        if table is None or (table and table[0].shape[1] < last):
            places_1L = torch.arange(2 * last, device=like_BRD.device)[None]
            made = self.target.position_embeddings(like_BRD[:1, :1], places_1L, kind)
            plain = isinstance(made, tuple) and all(x.dim() == 3 and x.shape[:2] == places_1L.shape for x in made)
            table = self._angles[kind] = made if plain else ()
        if not table:
            return self.target.position_embeddings(like_BRD, positions_BR, kind, read_as)
        if len(starts) == 1:
            return tuple(angle_1LE[:, starts[0] : last] for angle_1LE in table)
        return tuple(angle_1LE[0][positions_BR] for angle_1LE in table)
