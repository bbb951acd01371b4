"""Mask tokens with gated LoRA and a sampler head: the target itself, reading K masks behind its text, looks ahead.

arXiv 2507.11851 ("Your LLM Knows the Future") and MTP-GLoRA. Mask j below the token at position t stands at t + j and
predicts token t + 1 + j. Adapters act on mask rows only, so ordinary tokens are the target's to the bit.

Training runs in two passes. Ordinary rows never depend on a mask, so they run first, once, without gradient, and leave
their keys and values; then mask rows alone run, forward and backward, against those. Long texts go chunk by chunk:
exact, since nothing of a chunk's text is learned, and with memory that grows by keys and values only. `one_pass` is the
slow twin: tokens and masks in one token tree, everything with gradient; joint training needs it.
"""

# B sequences, T positions, O tokens that carry masks, K masks of each, R rows of a pass, N rows flattened, D hidden
# width, M draft vocabulary.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foretell.methods.base import LossKind, MTPConfig, MTPModule, Supervision
from foretell.methods.masked_drafter import MaskedDrafter
from foretell.methods.streaming import streamed, summed
from foretell.models.comb_attention import CombKeys
from foretell.models.gated_lora import ALL_LINEAR, GatedAdapters, MaskRows
from foretell.models.sampler_head import SamplerHead
from foretell.models.target import Target, TargetRows
from foretell.ops.losses import linear_loss
from foretell.ops.shift import ahead
from foretell.ops.tree import MASK, comb
from foretell.types import IGNORE_INDEX, PAD_DOCUMENT, Batch, LossSum

MaskTokens = Literal["shared", "distinct", "noise"]


@dataclass(kw_only=True)
class MaskedConfig(MTPConfig):
    """Settings of mask tokens with gated LoRA. depth=K masks predict K tokens BEYOND the ordinary next one."""

    method: ClassVar[str] = "masked"
    free: ClassVar[frozenset[str]] = frozenset({"chunk_size", "offload_keys"})
    depth: int = field(default=4, metadata={"help": "K: how many tokens beyond the ordinary next one are predicted."})
    draft_length: int | None = field(default=None, metadata={"help": "MTP-GLoRA's name of depth."})
    sampler: bool = field(default=True, metadata={"help": "A head that reads the previous token beside the mask."})
    mask_tokens: MaskTokens = field(
        default="shared",
        metadata={"help": "One embedding for all masks, distinct ones, or noise: embeddings of random tokens."},
    )
    train_masks: bool = field(default=True, metadata={"help": "Mask embeddings learn; else they stay the mean."})
    lora_rank: int = field(default=16, metadata={"help": "r of the adapters."})
    lora_alpha: float = field(default=32.0, metadata={"help": "Adapters are scaled by alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Of what the adapters read."})
    lora_use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r) instead."})
    lora_modules: list[str] | str = field(
        default=ALL_LINEAR, metadata={"help": "Linears with adapters, named as in PEFT's target_modules."}
    )
    fuse_weights: bool = field(default=False, metadata={"help": "Linears that read one input share an adapter."})
    use_dora: bool = field(default=False, metadata={"help": "Not supported: refused."})
    lora_bias: bool = field(default=False, metadata={"help": "Not supported: refused."})
    sampler_loss_weight: float = field(default=1.0, metadata={"help": "Of the sampler's loss."})
    mask_loss_weight: float | None = field(
        default=None, metadata={"help": "Of the loss of the masks' own logits; by default 0, without a sampler 1."}
    )
    label_loss_weight: float = field(
        default=0.0,
        metadata={"help": "Of cross-entropy with the data's tokens, beside a teacher's loss."},
    )
    tv_loss_weight: float = field(default=0.0, metadata={"help": "Of total variation to the teacher, beside its loss."})
    latent_loss_weight: float = field(
        default=0.0, metadata={"help": "Of the squared distance of mask states to those of the tokens they stand for."}
    )
    free_running: bool = field(
        default=False, metadata={"help": "A prediction counts only while those before it are the data's tokens."}
    )
    mask_positions: float | str = field(
        default="all", metadata={"help": "Tokens that carry masks in training: all, a share below 1, or a number."}
    )
    chunk_size: int = field(default=512, metadata={"help": "Tokens of a text that are trained at once; exact."})
    offload_keys: bool = field(default=False, metadata={"help": "Keep the text's keys and values on the CPU."})

    def __post_init__(self) -> None:
        if self.draft_length is not None:
            standard = type(self).__dataclass_fields__["depth"].default
            if self.depth not in (standard, self.draft_length):
                raise ValueError(f"draft_length={self.draft_length} and depth={self.depth} are one thing: give one.")
            self.depth, self.draft_length = self.draft_length, None
        if isinstance(self.mask_positions, str) and self.mask_positions.replace(".", "", 1).isdigit():
            self.mask_positions = float(self.mask_positions)
        super().__post_init__()

    def problems(self) -> list[str]:
        """See MTPConfig."""
        found = super().problems()
        for name in ("use_dora", "lora_bias"):
            if getattr(self, name):
                found.append(f"{name}: gated adapters are plain LoRA; leave it out.")
        if self.lora_rank < 1 or self.lora_alpha <= 0:
            found.append(f"lora_rank, lora_alpha: got {self.lora_rank} and {self.lora_alpha}, wanted more than 0.")
        if not 0 <= self.lora_dropout < 1:
            found.append(f"lora_dropout: got {self.lora_dropout}, wanted at least 0 and below 1.")
        if self.hidden_source != "post_norm":
            found.append("hidden_source: masks are read after the final norm, as ordinary tokens are; leave it out.")
        if self.chunk_size < self.depth + 1:
            found.append(f"chunk_size: got {self.chunk_size}, wanted at least depth + 1 = {self.depth + 1} tokens.")
        where = self.mask_positions
        if where != "all" and not (
            isinstance(where, float | int) and (0 < where < 1 or (where >= 1 and where % 1 == 0))
        ):
            found.append(f"mask_positions: got {where!r}, wanted 'all', a share between 0 and 1, or a whole number.")
        if self.sampler and not self.sampler_loss_weight:
            found.append("sampler_loss_weight: got 0 for a sampler that then never learns; use sampler=False.")
        weights = [self.sampler_loss_weight if self.sampler else 0.0, self.own_loss_weight]
        every = [*weights, self.label_loss_weight, self.tv_loss_weight, self.latent_loss_weight]
        if min(every) < 0 or sum(weights) == 0:
            found.append(
                "sampler_loss_weight, mask_loss_weight, ...: wanted none below 0 and one of these two above 0."
            )
        if self.mask_tokens == "noise" and self.fuse_weights:
            found.append("fuse_weights: a fused adapter has no PEFT form; noise masks are made to be exported.")
        return found

    @property
    def own_loss_weight(self) -> float:
        """Weight of the loss of the masks' own logits."""
        if self.mask_loss_weight is not None:
            return self.mask_loss_weight
        return 0.0 if self.sampler else 1.0

    def build(self, target: Target) -> MaskedModule:
        """The masks, adapters and sampler for a target, initialised."""
        return MaskedModule(self, target)


@dataclass
class CombRows(TargetRows):
    """What `one_pass` gives: text rows, and the state of every mask [B, T, K, D]."""

    masks_BTKD: Tensor | None = None


@dataclass
class Piece:
    """A stretch of tokens with their masks read, and the text's states that their losses need."""

    masks_BOKD: Tensor
    owner_BO: Tensor  # columns of the tokens that carry masks
    valid_BO: Tensor  # False where a row of owners is only filled up
    text_BWD: Tensor  # states of the text's columns first, first + 1, ...
    first: int


class MaskedModule(MTPModule):
    """Mask embeddings, gated adapters, and a sampler head or none."""

    lays_masks = True
    reads_states = False
    config: MaskedConfig

    def __init__(self, config: MaskedConfig, target: Target) -> None:
        super().__init__(config, target)
        adapters = GatedAdapters(
            target.layers,
            config.lora_modules,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            use_rslora=config.lora_use_rslora,
            fuse=config.fuse_weights,
        )
        experts = any("experts" in path for path, _ in target.layers.named_modules())
        taken = {path.rpartition(".")[2] for path in adapters.paths} & {"gate_proj", "up_proj", "down_proj"}
        if config.mask_tokens == "noise" and not config.sampler and experts and taken:
            raise ValueError(
                f"lora_modules: got {', '.join(sorted(taken))} in a model with experts; PEFT would take them for the "
                "experts' matrices when it loads the adapter. Name the attention's linears."
            )
        self.rows = MaskRows(target.embed_tokens, config.depth, config.mask_tokens, adapters)
        self.sampler = SamplerHead(target) if config.sampler else None
        # texts in one chunk, however long: what turns by a text's length, and (set by trainers) sharded parameters,
        # which ranks must read in step
        self.whole = target.turns_by_length
        target.mask_rows = self.rows
        target.release()  # a view made before knows nothing of the adapters

    def frozen(self) -> list[torch.nn.Parameter]:
        """See MTPModule."""
        return [] if self.config.train_masks or self.rows.embedding is None else [self.rows.embedding]

    def as_peft(self, target: Target, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """See MTPModule: noise masks without a sampler are nothing but adapters, which engines load (SGLang's UNO)."""
        config, adapters = self.config, self.rows.adapters
        if config.mask_tokens != "noise" or config.sampler:
            return None
        below = next(path for path, part in target.model.named_modules() if part is target.layers)
        tensors = {}
        for path in adapters.paths:
            for half in ("lora_A", "lora_B"):
                tensor = state[f"rows.adapters.adapters.{path.replace('.', '/')}.{half}.weight"]
                tensors[f"base_model.model.{below}.{path}.{half}.weight"] = tensor
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": getattr(target.model.config, "_name_or_path", "") or None,
            "r": config.lora_rank,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "use_rslora": config.lora_use_rslora,
            "target_modules": sorted({path.rpartition(".")[2] for path in adapters.paths}),
            "bias": "none",
            "inference_mode": True,
        }
        return settings, tensors

    # -- reading: two passes, and one --------------------------------------------------------------------------------

    def read(self, target: Target, batch: Batch, learns: bool, joint: bool) -> TargetRows | None:
        """See MTPModule: jointly in one pass; else masks are read by the losses, chunk by chunk."""
        if joint:
            return one_pass(self, target, batch)
        return super().read(target, batch, learns, joint) if learns else None

    def pieces(self, target: Target, batch: Batch, carries_BT: Tensor) -> Iterator[Piece]:
        """Read a text and the masks of the tokens where carries_BT says so, chunk by chunk; at least one piece.

        A token's masks are read once the K tokens after it are, whose states teach them: nothing is lost at borders.
        """
        T, K = batch.input_ids_BT.shape[1], self.config.depth
        C = T if self.whole else self.config.chunk_size
        column_BT, start_BT = columns_of(batch.document_BT)
        keys = CombKeys(T, "cpu" if self.config.offload_keys else None)
        text_BWD, first, done, found = None, 0, 0, False
        for at in range(0, T, C):
            end = min(at + C, T)
            part = slice(at, end)
            keys.begin(start_BT[:, part], column_BT[:, part], column_BT[:, part], end, at, 0)
            with torch.no_grad():  # the masks' losses teach the text's rows nothing
                embedding_BRD = target.embed(batch.input_ids_BT[:, part])
                new_BRD = target.read_comb(embedding_BRD, batch.position_ids_BT[:, part], keys)
            text_BWD = new_BRD if text_BWD is None else torch.cat([text_BWD[:, done - first :], new_BRD], dim=1)
            first, ready = done, T if end == T else max(end - K, done)
            carries_BW = carries_BT[:, done:ready]
            owners = int(carries_BW.sum(1).amax()) if ready > done else 0
            last = end == T and not found  # a step needs a gradient, if only zeros
            if owners or last:
                found, owners = True, max(owners, 1)
                owner_BO = (~carries_BW).long().argsort(dim=1, stable=True)[:, :owners] + done
                valid_BO = carries_BW.gather(1, owner_BO - done)
                masks_BOKD = self.read_masks(target, batch, keys, owner_BO, valid_BO, start_BT)
                yield Piece(masks_BOKD, owner_BO, valid_BO, text_BWD, first)
            done = ready

    def read_masks(
        self, target: Target, batch: Batch, keys: CombKeys, owner_BO: Tensor, valid_BO: Tensor, start_BT: Tensor
    ) -> Tensor:
        """[B, O, K, D] after the final norm: the masks of these tokens, against the keys of their text."""
        B, owners, K = owner_BO.shape[0], owner_BO.shape[1], self.config.depth
        step_BR = torch.arange(1, K + 1, device=owner_BO.device).repeat(B, owners)
        owner_BR = owner_BO.repeat_interleave(K, dim=1)
        start_BR = start_BT.gather(1, owner_BR)
        last_BR = torch.where(valid_BO.repeat_interleave(K, dim=1), owner_BR, start_BR - 1)
        keys.begin(start_BR, last_BR, owner_BR + step_BR, keys.end, None, K)
        nothing_BRD = torch.zeros(B, owners * K, target.hidden_size, device=owner_BO.device, dtype=target.dtype)
        embedding_BRD = self.rows.embed(nothing_BRD, step_BR)
        positions_BR = batch.position_ids_BT.gather(1, owner_BR) + step_BR
        masks_BRD = target.read_comb(embedding_BRD, positions_BR, keys, self.rows.adapters)
        return masks_BRD.view(B, owners, K, -1)

    # -- losses --------------------------------------------------------------------------------------------------------

    def choose(self, batch: Batch, generator: torch.Generator) -> Tensor | None:
        """See MTPModule: labels of the tokens that carry masks in this step, by `mask_positions`."""
        where = self.config.mask_positions
        if isinstance(where, str):
            return None
        labels_BTK = self.labels(batch).cpu()
        carries_BT = (labels_BTK != IGNORE_INDEX).any(-1)
        count_B1 = carries_BT.sum(1, keepdim=True)
        wanted_B1 = (count_B1.double() * where).ceil().long() if where < 1 else count_B1.clamp(max=int(where))
        draw_BT = torch.rand(carries_BT.shape, generator=generator).masked_fill_(~carries_BT, 2.0)
        chosen_BT = draw_BT.argsort(1).argsort(1) < wanted_B1
        return labels_BTK.masked_fill(~chosen_BT[..., None], IGNORE_INDEX).to(batch.labels_BT.device)

    def losses(
        self,
        target: Target,
        batch: Batch,
        rows: TargetRows | None,
        *,
        detach: bool,
        supervision: Supervision,
        kind: LossKind,
        coefficients_K: Tensor | None = None,
    ) -> list[LossSum]:
        """See MTPModule."""
        labels_BTK = self.labels(batch)
        carries_BT = (labels_BTK != IGNORE_INDEX).any(-1)

        def loss(piece: Piece) -> LossSum:
            return self._piece_loss(target, batch, piece, labels_BTK, detach, supervision, kind)

        if isinstance(rows, CombRows):
            column_BT = torch.arange(labels_BTK.shape[1], device=labels_BTK.device).expand(labels_BTK.shape[:2])
            found = loss(Piece(rows.masks_BTKD, column_BT, carries_BT, rows.post_norm_BRD, 0))
        elif self.whole or labels_BTK.shape[1] <= self.config.chunk_size or not torch.is_grad_enabled():
            found = summed(loss(piece) for piece in self.pieces(target, batch, carries_BT))
        else:
            found = streamed(self, lambda: map(loss, self.pieces(target, batch, carries_BT)), coefficients_K)
        return [LossSum(found.total[k], found.count[k], found.correct[k]) for k in range(self.config.depth)]

    def _piece_loss(
        self,
        target: Target,
        batch: Batch,
        piece: Piece,
        labels_BTK: Tensor,
        detach: bool,
        supervision: Supervision,
        kind: LossKind,
    ) -> LossSum:
        """Totals, counts and correct guesses [K] of a piece: every part of the loss by its weight."""
        config, K = self.config, self.config.depth
        owner_BOK = piece.owner_BO[..., None].expand(-1, -1, K)
        labels_BOK = labels_BTK.gather(1, owner_BOK).masked_fill(~piece.valid_BO[..., None], IGNORE_INDEX)
        b_N, o_N, k_N = (labels_BOK != IGNORE_INDEX).nonzero(as_tuple=True)
        label_N, before_N = labels_BOK[b_N, o_N, k_N], piece.owner_BO[b_N, o_N] + k_N + 1  # column of the token before
        mask_ND = piece.masks_BOKD[b_N, o_N, k_N]
        if not len(mask_ND):  # connected to every parameter all the same: other ranks wait for the gradients
            mask_ND = piece.masks_BOKD[:1, 0, 0]
            b_N, o_N, k_N = (torch.zeros(1, dtype=torch.long, device=mask_ND.device) for _ in range(3))
            label_N, before_N = torch.full_like(b_N, IGNORE_INDEX), b_N + piece.first
        text_ND = piece.text_BWD.reshape(-1, piece.text_BWD.shape[2]).detach()
        text_N = b_N * piece.text_BWD.shape[1] + before_N - piece.first  # whose prediction is the teacher's
        data_N = label_N
        if supervision == "teacher_hard":
            label_N = torch.where(label_N == IGNORE_INDEX, label_N, _choices(target, text_ND, text_N))
        outputs = []
        if self.sampler is not None:
            embedding_ND = target.embed(batch.input_ids_BT[b_N, before_N])
            state_ND = self.sampler(embedding_ND.detach() if detach else embedding_ND, mask_ND)
            outputs.append((state_ND, config.sampler_loss_weight))
        outputs.append((mask_ND, config.own_loss_weight))
        outputs = [output for output in outputs if output[1]] or outputs[:1]
        weight_MD, bias_M = self.target_head(target, detach)
        if config.free_running:
            right_N = self._while_right(target, outputs[0][0], data_N, (b_N, o_N, k_N), labels_BOK.shape)
            label_N = label_N.masked_fill(~right_N, IGNORE_INDEX)
        hard_N = label_N if self.draft_vocab_ids is None else self._to_draft_ids(label_N, target.vocab_size)
        teacher_MD, teacher_bias_M = self.target_head(target, detach=True)
        n, G = len(outputs), len(outputs) * K
        shared: dict[str, Any] = {"softcap": target.softcap, "logit_scale": target.logit_scale, "bias_M": bias_M}
        teacher = {
            "teacher_hidden_ND": text_ND,
            "teacher_weight_MD": teacher_MD,
            "teacher_bias_M": teacher_bias_M,
            "teacher_rows_N": text_N.repeat(n),
            "labels_N": label_N.repeat(n),
        }
        labels = {"labels_N": hard_N.repeat(n)}
        parts: list[tuple[float, dict[str, Any]]] = [
            (1.0, {**teacher, "kind": kind} if supervision == "teacher" else labels),
            (config.label_loss_weight if supervision == "teacher" else 0.0, labels),
            (config.tv_loss_weight, {**teacher, "kind": "tv"}),
        ]
        group_N = torch.cat([k_N + i * K for i in range(n)])
        hidden_ND = torch.cat([output for output, _ in outputs])
        factor_G = torch.tensor([w for _, w in outputs], device=hidden_ND.device).repeat_interleave(K)
        total_K, first_sum = 0.0, None
        for weight, what in parts:
            if weight:
                found = _by_group(hidden_ND, weight_MD, group_N, G, **what, **shared)
                first_sum = first_sum or found
                total_K = total_K + weight * (found.total * factor_G.to(found.total.dtype)).view(n, K).sum(0)
        if config.latent_loss_weight:
            far_N = (mask_ND - text_ND[text_N]).float().pow(2).sum(-1).masked_fill(label_N == IGNORE_INDEX, 0.0)
            total_K = total_K + config.latent_loss_weight * far_N.new_zeros(K).index_add(0, k_N, far_N)
        return LossSum(total_K, first_sum.count[:K], first_sum.correct[:K])

    @torch.no_grad()
    def _while_right(
        self, target: Target, state_ND: Tensor, data_N: Tensor, at: tuple[Tensor, ...], shape: torch.Size
    ) -> Tensor:
        """bool [N]: the predictions whose predecessors in the same block are all the data's tokens."""
        weight_MD, bias_M = self.target_head(target, detach=True)
        guess_N = torch.cat(
            [F.linear(part, weight_MD.to(part.dtype), bias_M).argmax(-1) for part in state_ND.split(256)]
        )
        if self.draft_vocab_ids is not None:
            guess_N = self.draft_vocab_ids[guess_N]
        wrong_BOK = torch.zeros(shape, dtype=torch.long, device=data_N.device)
        wrong_BOK[at] = (guess_N != data_N).long()
        return (wrong_BOK.cumsum(-1) == wrong_BOK)[at]

    # -- analysis and drafting -----------------------------------------------------------------------------------------

    def depth_states(
        self, target: Target, batch: Batch, source_BTD: Tensor, detach: bool, depths: int | None = None
    ) -> Iterator[Tensor]:
        """See MTPModule: the masks of every token, and of its following tokens the embeddings that are there."""
        carries_BT = batch.document_BT != PAD_DOCUMENT
        states_BTKD = source_BTD.new_zeros(*carries_BT.shape, self.config.depth, source_BTD.shape[2])
        for piece in self.pieces(target, batch, carries_BT):
            b_N, o_N = piece.valid_BO.nonzero(as_tuple=True)
            states_BTKD[b_N, piece.owner_BO[b_N, o_N]] = piece.masks_BOKD[b_N, o_N].to(states_BTKD.dtype)
        for k in range(1, (depths or self.config.depth) + 1):
            if self.sampler is None:
                yield states_BTKD[:, :, k - 1]
                continue
            ids_BT, inside_BT = ahead(batch.input_ids_BT, k, batch.document_BT, fill=0)
            embedding_BTD = target.embed(ids_BT) * inside_BT[..., None].to(source_BTD.dtype)
            yield self.sampler(embedding_BTD.detach() if detach else embedding_BTD, states_BTKD[:, :, k - 1])

    def drafter(self, target: Target, sample: bool = False) -> MaskedDrafter:
        """A drafter over the module's current weights; sample: draw drafts from its distribution instead of argmax."""
        return MaskedDrafter(self, self.sampler, target, sample)


def one_pass(module: MaskedModule, target: Target, batch: Batch) -> CombRows:
    """Tokens and masks in one token tree, everything with gradient: what two passes must equal, and joint training."""
    (B, T), K = batch.input_ids_BT.shape, module.config.depth
    parents_BR, kinds_BR, _ = comb(T, K, batch.document_BT)
    step_T = torch.arange(1, K + 1, device=parents_BR.device).repeat(T)
    step_BR = torch.cat([torch.zeros(T, dtype=torch.long, device=step_T.device), step_T]).expand(B, -1)
    owner_BT = batch.position_ids_BT
    positions_BR = torch.cat([owner_BT, owner_BT.repeat_interleave(K, dim=1) + step_T], dim=1)
    text_BTD = target.embed(batch.input_ids_BT)
    filler_BRD = text_BTD.new_zeros(B, T * K, text_BTD.shape[2])
    embedding_BRD = module.rows.embed(torch.cat([text_BTD, filler_BRD], dim=1), step_BR)
    with module.rows.adapters.on(target.layers, (kinds_BR == MASK).reshape(-1).nonzero()[:, 0]):
        states_BRD = target.read_tree(embedding_BRD, positions_BR, parents_BR)
    return CombRows(states_BRD[:, :T], None, masks_BTKD=states_BRD[:, T:].reshape(B, T, K, -1))


def columns_of(document_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(column_BT, start_BT): each token's own column, and the first of its document; padding stands alone."""
    column_BT = torch.arange(document_BT.shape[1], device=document_BT.device).expand_as(document_BT)
    new_BT = torch.ones_like(document_BT, dtype=torch.bool)
    new_BT[:, 1:] = (document_BT[:, 1:] != document_BT[:, :-1]) | (document_BT[:, 1:] == PAD_DOCUMENT)
    return column_BT, torch.where(new_BT, column_BT, 0).cummax(1).values


def _by_group(hidden_ND: Tensor, weight_MD: Tensor, group_N: Tensor, groups: int, **what: Any) -> LossSum:
    """linear_loss with one sum a group, also where the head learns."""
    if not weight_MD.requires_grad:
        return linear_loss(hidden_ND, weight_MD, groups_N=group_N, groups=groups, **what)
    each = []
    for group in range(groups):
        rows = group_N == group
        mine = {name: value[rows] if name in ("labels_N", "teacher_rows_N") else value for name, value in what.items()}
        each.append(linear_loss(hidden_ND[rows], weight_MD, **mine))
    return LossSum(*(torch.stack([getattr(loss, name) for loss in each]) for name in ("total", "count", "correct")))


@torch.no_grad()
def _choices(target: Target, text_ND: Tensor, rows_N: Tensor) -> Tensor:
    """The target's own next tokens at these rows, each asked once."""
    rows_U, at_N = rows_N.unique(return_inverse=True)
    return torch.cat([target.logits(text_ND[part]).argmax(-1) for part in rows_U.split(256)])[at_N]
