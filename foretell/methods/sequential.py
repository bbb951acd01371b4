"""Sequential MTP modules: depth k reads depth k-1's states and the token k ahead.

DeepSeek-V3 report (arXiv 2412.19437, section 2.2); one module reused at every depth is FastMTP (arXiv 2509.18362).
Training, draft_logits and the drafter below run the same MTPBlock at the same positions over the same keys, so that
what was trained is what drafts. One module for all depths has one key-value cache, as engines run it: depth k stands
k - 1 positions further on than the state it came from, behind the rows of depth 1 (`chain_rows.py`). Modules with a
block for each depth have a cache for each, and their positions stay (DeepSeek).
"""

# B sequences, T positions, O chains, R rows of a step, K depths, N rows flattened, D hidden width, V vocabulary, M
# draft vocabulary.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from foretell.methods.base import MTPConfig, MTPModule
from foretell.methods.chain import FEW_ROWS, ChainDrafter, begin_cache, begin_rows, reading_plan
from foretell.methods.reading import columns_of, owners_of, text_length
from foretell.models.attention import RowMasks
from foretell.models.chain_rows import ChainRows
from foretell.models.fast import fast_view
from foretell.models.mtp_block import BlockKind, FusionOrder, MTPBlock, fresh_norm, residual_size
from foretell.models.slot_cache import SlotCache
from foretell.models.target import Target, TargetRows
from foretell.ops.tree import forest
from foretell.types import IGNORE_INDEX, Batch, Draft, SequenceState, Worth

LONGEST_SHARED = 16
TOKENS = "tokens"  # kept beside keys and values: the texts themselves
WAITING = 64  # tokens of a text that may wait to be read until somebody drafts


@dataclass(kw_only=True)
class SequentialConfig(MTPConfig):
    """Settings of sequential modules."""

    method: ClassVar[str] = "sequential"
    depth: int = field(default=3, metadata={"help": "K: how many tokens beyond the ordinary next one are predicted."})
    shared_module: bool = field(default=False, metadata={"help": "One module reused at every depth (FastMTP)."})
    block: BlockKind = field(
        default="mtp",
        metadata={
            "help": "mtp: one projection fuses state and embedding; eagle3: queries, keys and values read both, the "
            "layer runs on the state, and the next depth receives its output before the norm."
        },
    )
    fusion_order: FusionOrder = field(
        default="embedding_hidden", metadata={"help": "Halves of the fusion's input; MiMo has them reversed."}
    )
    chain_raw: bool = field(
        default=False, metadata={"help": "The next depth receives the block's output before the norm (EAGLE-1)."}
    )
    hidden_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "States to start from instead of the last: each after so many layers (0: the embedding), ascending."
        },
    )
    fc_norm: bool = field(
        default=True,
        metadata={"help": "A norm of each of hidden_layers (EAGLE-3.1); without, block eagle3 reads them as EAGLE-3."},
    )
    initialisation: Literal["identity", "copy", "random"] = field(
        default="identity",
        metadata={"help": "Last layer copied and fusion passing the hidden state; random fusion; all random."},
    )

    def problems(self) -> list[str]:
        """See MTPConfig."""
        found = super().problems()
        if self.block == "eagle3" and self.fusion_order != "embedding_hidden":
            found.append(f"fusion_order: got {self.fusion_order!r}, wanted 'embedding_hidden' with block='eagle3'.")
        if not self.fc_norm and (self.block != "eagle3" or not self.hidden_layers):
            found.append("fc_norm: got False, wanted True where block is not 'eagle3' or no hidden_layers are named.")
        return found

    def build(self, target: Target) -> SequentialModule:
        """The module for a target, initialised."""
        return SequentialModule(self, target)


class SequentialModule(MTPModule):
    """The blocks; depths share the target's output head."""

    config: SequentialConfig

    def __init__(self, config: SequentialConfig, target: Target) -> None:
        super().__init__(config, target)
        ids, n = tuple(config.hidden_layers or ()), len(target.layers)
        if list(ids) != [i for i in range(n) if i in ids]:
            raise ValueError(
                f"hidden_layers: got {config.hidden_layers}, wanted ascending numbers of layers run, from 0 (the "
                f"embedding) to {n - 1} of this model: a head that reads beyond is served nowhere else. Leave it out "
                "for the last state."
            )
        # nothing behind it scales what an eagle3 block runs on; states without a norm have the residual's size
        size = residual_size(target) if config.block == "eagle3" and ids and config.fc_norm else 1.0
        self.entry = Entry(target, len(ids), size, config.fc_norm) if ids else nn.Identity()
        self.reads_states, target.hidden_layers = not ids, ids
        blocks = 1 if config.shared_module else config.depth
        self.blocks = nn.ModuleList(
            MTPBlock(
                target,
                config.fusion_order,
                config.chain_raw,
                config.initialisation,
                config.hidden_source == "post_norm" and not ids,
                config.block,
            )
            for _ in range(blocks)
        )
        # whether all depths share their keys and values
        self.one_cache = (config.shared_module or config.depth == 1) and self.blocks[0].takes_rows(target)

    @property
    def longest_draft(self) -> int:
        """See MTPModule: one block for all depths can be reused further."""
        return LONGEST_SHARED if self.config.shared_module and self.one_cache else self.config.depth

    def block(self, depth: int) -> MTPBlock:
        """The block of a depth (1-based)."""
        return self.blocks[0 if self.config.shared_module else depth - 1]

    def source(self, rows: TargetRows) -> Tensor:
        """See MTPModule; of hidden_layers their states side by side [B, R, n D], which `entry` makes one of."""
        if self.config.hidden_layers is None:
            return super().source(rows)
        assert rows.layers_BRX is not None, "the target's forward notes what its layers are given"
        return rows.layers_BRX

    def depth_states(self, target: Target, batch: Batch, source_BTD: Tensor, detach: bool) -> Iterator[Tensor]:
        """h^k for k = 1..K: [B, T, D] each, what the output head reads. detach keeps gradient from the
        embeddings."""
        if self.one_cache:
            column_BT, _ = columns_of(batch.document_BT)
            read = partial(self.embedded_ahead, target, batch, detach=detach)
            yield from self._chains(target, batch, source_BTD, column_BT, read, detach)
            return
        for block in self.blocks:
            block.masks.begin_text(batch.document_BT)
        hidden_BTD = self.entry(source_BTD)
        for k in range(1, self.config.depth + 1):
            embedding_BTD = self.embedded_ahead(target, batch, k, detach)
            block = self.block(k)
            places = target.position_embeddings(hidden_BTD, batch.position_ids_BT, block.layer_type)
            state_BTD, hidden_BTD = block(embedding_BTD, hidden_BTD, places, batch.position_ids_BT)
            yield state_BTD

    def taught_states(self, target: Target, batch: Batch, source_BTD: Tensor, detach: bool) -> Iterator[Tensor]:
        """See MTPModule: chains from labelled tokens only."""
        carries_BT = (self.labels(batch) != IGNORE_INDEX).any(-1)
        if not self.one_cache or bool(carries_BT.all()):
            yield from self.depth_states(target, batch, source_BTD, detach)
            return
        owner_BO, _ = owners_of(carries_BT, max(int(carries_BT.sum(1).amax()), 1))
        read = partial(self.embedded_ahead, target, batch, detach=detach, at_BO=owner_BO)
        for state_BOD in self._chains(target, batch, source_BTD, owner_BO, read, detach):
            at_BOD = owner_BO[..., None].expand_as(state_BOD)
            yield state_BOD.new_zeros(*source_BTD.shape[:2], state_BOD.shape[2]).scatter(1, at_BOD, state_BOD)

    def _chains(
        self,
        target: Target,
        batch: Batch,
        source_BTD: Tensor,
        owner_BO: Tensor,
        read: Callable[[int], Tensor],
        detach: bool,
        drafted: bool = False,
    ) -> Iterator[Tensor]:
        """[B, O, D] states of each depth of chains that start at chosen tokens, over one cache. read: the embeddings
        [B, O, D] of the tokens k ahead, asked for once depth k - 1 is known. drafted: they are the chain's own already
        at depth 1; else its rows of depth 1 are the text's.
        """
        block, source_BTD, T = self.block(1), self.entry(source_BTD), source_BTD.shape[1]
        _, start_BT = columns_of(batch.document_BT)
        chosen_BT = torch.zeros_like(start_BT, dtype=torch.bool).scatter_(1, owner_BO, not drafted)
        others_BP, _ = owners_of(~chosen_BT, T if drafted else T - owner_BO.shape[1])

        def states(k: int, at_BO: Tensor, read_BOD: Tensor, hidden_BOD: Tensor, rows: ChainRows) -> tuple:
            positions_BO = batch.position_ids_BT.gather(1, at_BO) + (k - 1)
            places = target.position_embeddings(hidden_BOD, positions_BO, block.layer_type, text_length(batch))
            return block(read_BOD, hidden_BOD, places, positions_BO, rows=rows)

        def source(at_BO: Tensor) -> Tensor:
            return source_BTD.gather(1, at_BO[..., None].expand(-1, -1, source_BTD.shape[2]))

        text, hidden_BOD = ChainRows(), source(owner_BO)
        if others_BP.shape[1]:
            others_BPD = self.embedded_ahead(target, batch, 1, detach, others_BP)
            unused_BPD, _ = states(1, others_BP, others_BPD, source(others_BP), text)
            if hasattr(block.block, "unshard"):  # FSDP gathers weights for gradients where an output asks for them
                hidden_BOD = hidden_BOD + 0.0 * unused_BPD.sum()
        text_BC = others_BP if drafted else torch.cat([others_BP, owner_BO], dim=1)
        first_BO, last_BO = start_BT.gather(1, owner_BO), owner_BO - int(drafted)
        seen = text.seen
        for k in range(1, self.config.depth + 1):
            rows = ChainRows(text_BC, first_BO, last_BO, seen, k - 1 + drafted)
            state_BOD, hidden_BOD = states(k, owner_BO, read(k), hidden_BOD, rows)
            seen = rows.seen
            yield state_BOD

    def propose(
        self, target: Target, batch: Batch, source_BTD: Tensor, owner_BO: Tensor, first_BO: Tensor, detach: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """See MTPModule. A chain's row stands beside its token's own: it sees the same rows before it, and itself."""
        chain, states = [first_BO], []

        def drafted(k: int) -> Tensor:
            own_BOD = target.embed(chain[k - 1])
            return own_BOD.detach() if detach else own_BOD

        if self.one_cache:
            for k, state_BOD in enumerate(
                self._chains(target, batch, source_BTD, owner_BO, drafted, detach, True), start=1
            ):
                states.append(state_BOD)
                chain.append(self.guess(target, state_BOD, k, chain[-1]))
            return torch.stack(chain[:-1], dim=-1), states
        (B, T), source_BTD = batch.input_ids_BT.shape, self.entry(source_BTD)
        parents_BT = forest(batch.document_BT)
        parents_BR = torch.cat([parents_BT, parents_BT.gather(1, owner_BO)], dim=1)
        positions_BR = torch.cat([batch.position_ids_BT, batch.position_ids_BT.gather(1, owner_BO)], dim=1)
        nothing_B, R = torch.zeros(B, dtype=torch.long, device=owner_BO.device), parents_BR.shape[1]
        for block in self.blocks:
            block.masks.begin(nothing_B, R, R, parents_BR=parents_BR)
        own_BOD = source_BTD.gather(1, owner_BO[..., None].expand(-1, -1, source_BTD.shape[2]))
        hidden_BRD = torch.cat([source_BTD, own_BOD], dim=1)
        for k in range(1, self.config.depth + 1):
            text_BTD = self.embedded_ahead(target, batch, k, detach)
            embedding_BRD = torch.cat([text_BTD, drafted(k)], dim=1)
            block = self.block(k)
            places = target.position_embeddings(hidden_BRD, positions_BR, block.layer_type)
            state_BRD, hidden_BRD = block(embedding_BRD, hidden_BRD, places, positions_BR)
            states.append(state_BRD[:, T:])
            chain.append(self.guess(target, states[-1], k, chain[-1]))
        return torch.stack(chain[:-1], dim=-1), states

    def drafter(self, target: Target, dtype: str = "auto") -> SequentialDrafter:
        """A drafter over the module's current weights; dtype: see generate's draft_dtype."""
        return SequentialDrafter(self, target, dtype)


class Entry(nn.Module):
    """h^0 from several of the target's states, at the start the last; with a norm of each (EAGLE-3.1) or without."""

    def __init__(self, target: Target, states: int, size: float = 1.0, normed: bool = True) -> None:
        super().__init__()
        D, like = target.hidden_size, target.head.weight
        self.norms = nn.ModuleList(fresh_norm(target.norm) for _ in range(states if normed else 0))
        self.fc = nn.Linear(states * D, D, bias=False, device=like.device, dtype=target.dtype)
        with torch.no_grad():
            self.fc.weight.copy_(size * torch.eye(D).repeat(1, states) * (torch.arange(states * D) >= (states - 1) * D))
        self.requires_grad_(True)

    def forward(self, states: Tensor) -> Tensor:
        """[..., n D] -> [..., D]."""
        norms = self.norms or (nn.Identity(),)
        parts = states.to(self.fc.weight.dtype).chunk(len(norms), dim=-1)
        normed = [norm(part) for norm, part in zip(norms, parts, strict=True)]
        return self.fc(torch.cat(normed, dim=-1)).to(states.dtype)


class SequentialDrafter(ChainDrafter):
    """Drafts a chain: depth k reads the state of depth k - 1 and the token behind the last that it has read, drafted
    where it is not known yet.

    Rows whose tokens were drafts, or whose states a draft's, are computed again once the target has read them: done
    counts, for each cache and slot, the leading rows that saw only what is true. A text is read as the target reads
    it; the states of its last rows wait for the step that drafts.
    """

    module: SequentialModule
    on_device = True

    def __init__(self, module: SequentialModule, target: Target, dtype: str) -> None:
        super().__init__(module, target, dtype)
        self._view = fast_view(module, dtype)
        self._masks = RowMasks()
        self._masks.hang_on(self._view)

    def _renew(self) -> None:
        self._cache = SlotCache()  # of each depth, or one for all, and beside it the tokens
        self._states = SlotCache()  # by depth, what its next reads: of positions from base on

    def open(self, slots: int, capacity: int) -> None:
        """See Watcher."""
        self._cache.open(self.module.block(1).block.foretell_windows)
        self._states.open()
        self._device, self._embed = self.target.device, self.target.embed_tokens  # to ask the model takes its time
        self._told = [0] * slots  # leading tokens that are kept on the device
        self._base = [0] * slots
        self._done = [[0] * slots for _ in range(1 if self.module.one_cache else self.module.config.depth)]
        self._angles: dict[str | None, tuple[Tensor, ...]] = {}

    def start(self, slot: int) -> None:
        """See Watcher."""
        self._cache.clear(slot)
        self._states.clear(slot)
        for numbers in (self._told, self._base, *self._done):
            numbers[slot] = 0

    def shares(self, slot: int, length: int) -> int:
        """See Watcher. A row of depth k has read k tokens ahead: those that another text has not, it reads anew, and
        for that needs the target's states of them.
        """
        if self._cache.windows:
            return 0
        known = length - self.module.config.depth
        return length if self._base[slot] <= max(known, 0) else known

    def share(self, source: int, target: int, length: int) -> None:
        """See Watcher."""
        base, known = self._base[source], max(length - self.module.config.depth, 0)
        assert base <= known or base > length, f"states from {base} on, {length} tokens"
        if source != target:
            self._cache.move(source, target, length)
            self._states.move(source, target, max(length - base, 0))
        for done in self._done:
            done[target] = min(done[source], known if base <= known else length)
        self._told[target], self._base[target] = min(self._told[source], length), min(base, length)

    def hold(self, slots: int) -> None:
        """See Watcher."""
        self._cache.hold(slots)
        self._states.hold(slots)

    def move(self, source: int, target: int, length: int) -> None:
        """See Watcher."""
        self._cache.move(source, target, length)
        self._states.move(source, target, length - self._base[source])
        for numbers in (self._told, self._base, *self._done):
            numbers[target] = min(numbers[source], length)

    def observe(self, sequences: Sequence[SequenceState], rows: TargetRows, kept: list[list[int]]) -> None:
        """See Watcher."""
        hidden_BRD = self._view.entry(self.module.source(rows))
        at, picked = [], []
        for b, (s, path) in enumerate(zip(sequences, kept, strict=True)):
            before, base = s.cached - len(path), self._base[s.slot]
            if before - base > WAITING:
                self._base[s.slot] = min(done[s.slot] for done in self._done)
                self._states.shift(s.slot, self._base[s.slot] - base, before - base)
            at.append((s.slot, before - self._base[s.slot], len(path)))
            picked.extend(b * hidden_BRD.shape[1] + row for row in path)
        self._states.reserve(max(s.slot for s in sequences) + 1, max(first + count for _, first, count in at))
        flat_ND = hidden_BRD.reshape(-1, hidden_BRD.shape[2])
        in_a_row = picked[-1] - picked[0] == len(picked) - 1
        self._states.fill(0, at, flat_ND[picked[0] : picked[-1] + 1] if in_a_row else flat_ND[picked])
        if any(s.cached - done[s.slot] > WAITING for s in sequences for done in self._done):
            self._catch_up(sequences)

    def _catch_up(self, sequences: Sequence[SequenceState]) -> None:
        """Read what is known of these texts, but for the newest row: that is for the step that drafts."""
        self._tell(sequences, [Draft() for _ in sequences])
        for k, done in enumerate(self._done, start=1):
            starts = [done[s.slot] for s in sequences]
            ends = [min(s.cached, len(s.tokens) - 1) - k for s in sequences]
            counts = [max(end - start, 0) for start, end in zip(starts, ends, strict=True)]
            for part, first, rows in reading_plan(counts, starts, self._cache.capacity):
                self._forward(sequences[part], k, first, rows)

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
        self._cache.fill(TOKENS, at, torch.tensor(new, dtype=torch.long, device=self._device))

    def _hold(self, sequences: Sequence[SequenceState], k: int, tokens_B: Tensor) -> None:
        """See ChainDrafter."""
        self._cache.fill(TOKENS, [(s.slot, s.cached + k, 1) for s in sequences], tokens_B)

    def _step(self, sequences: Sequence[SequenceState], drafts: list[Draft], k: int, wanted: list[int]) -> Tensor:
        """Run depth k over its rows that are not done, and return the logits of each sequence's newest row [B, M]."""
        joins = k > 1 and self.module.one_cache
        ends = [s.cached + (k - 1 if joins else 0) for s in sequences]
        done = self._done[0 if joins else k - 1]
        newest = [max(end - 1, 0) for end in ends]
        starts = newest if joins else [min(done[s.slot], n) for s, n in zip(sequences, newest, strict=True)]
        counts = [ends[b] - starts[b] if wanted[b] >= k else 0 for b in range(len(ends))]
        if not joins:
            like = self._states.held(0)[0]
            self._newest_BD = like.new_zeros(len(sequences), like.shape[1])
        newest_BD = torch.zeros_like(self._newest_BD)
        for part, first, rows in reading_plan(counts, starts, max(ends) + FEW_ROWS):
            newest_BD[part], self._newest_BD[part] = self._forward(sequences[part], k, first, rows, part)
        before_B = None
        if self.module.bigram is not None:
            places = [s.slot * self._cache.capacity + s.cached - 1 + k for s in sequences]
            before_B = self._cache.held(TOKENS)[0][places]
        return self.said(self._head(newest_BD), newest_BD, before_B)

    def _forward(
        self,
        sequences: Sequence[SequenceState],
        k: int,
        starts: list[int],
        counts: list[int],
        part: slice | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[B, D] of the last of these rows at depth k, for the head and for the next depth: counts[b] of sequence b
        from starts[b] on. part: which of a drafting step's sequences these are.
        """
        cache, states, device, one = self._cache, self._states, self._device, self.module.one_cache
        joins = k > 1 and one
        positions_BR = begin_rows(cache, self._masks, sequences[0].slot, starts, counts, device)
        if joins:
            hidden_BRD = self._newest_BD[part, None]
        else:
            done = self._done[k - 1]
            for s, start, count in zip(sequences, starts, counts, strict=True):
                done[s.slot] = max(done[s.slot], min(start + count, s.cached - k + 1))  # later ones read drafts
            columns = [start - self._base[s.slot] for s, start in zip(sequences, starts, strict=True)]
            begin_cache(states, sequences[0].slot, columns, counts, device)
            hidden_BRD = states.rows(k - 1)
        block = self._view.block(k)
        cache.tower = 0 if one else k
        places = self._places(hidden_BRD, positions_BR, block.layer_type, starts, [s.read_as for s in sequences])
        embedding_BRD = self._embed(cache.rows(TOKENS, ahead=1 if one else k))
        state_BRD, chained_BRD = block(embedding_BRD, hidden_BRD, places, positions_BR, cache)
        if k < len(self._done):
            states.put(k, chained_BRD)
        self.calls += 1
        if min(counts) == max(counts):
            return state_BRD[:, -1], chained_BRD[:, -1]
        at_B = torch.arange(len(counts), device=device), torch.tensor(counts, device=device).clamp_(min=1) - 1
        return state_BRD[at_B], chained_BRD[at_B]

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
