"""Mask tokens with gated LoRA and a sampler head: the target itself, reading K masks behind its text, looks ahead.

arXiv 2507.11851 ("Your LLM Knows the Future") and MTP-GLoRA. Mask j below the token at position t stands at t + j and
predicts token t + 1 + j. Adapters act on mask rows only, so ordinary tokens are the target's to the bit.

How masks are read in training, in two passes or in one, is methods/reading.py; learning from proposals of the module's
own (arXiv 2602.06019) is methods/student_forced.py.
"""

# B sequences, T positions, O tokens that carry masks, K masks of each, R rows of a pass, N rows flattened, D hidden
# width, M draft vocabulary.

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from foretell.methods.base import REREADS, SOFT, LossKind, MTPConfig, MTPModule, Supervision, chosen_tokens
from foretell.methods.masked_drafter import MaskedDrafter
from foretell.methods.reading import CombRows, Piece, ends_of, one_pass, pieces, refuse_unreadable
from foretell.methods.streaming import streamed, summed
from foretell.methods.student_forced import (
    REGIONS,
    anchor,
    by_proposals,
    choose_regions,
    is_forced,
    region_problems,
)
from foretell.models.gated_lora import ALL_LINEAR, GatedAdapters, MaskRows
from foretell.models.sampler_head import SamplerHead
from foretell.models.target import Target, TargetRows
from foretell.ops.losses import dpace, expected_length, linear_loss
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
    lora_rank: int = field(default=16, metadata={"help": "r of the adapters; 0: none."})
    lora_gate: bool = field(
        default=True,
        metadata={"help": "Adapters act on masks only; False: plain LoRA, which changes the text as well."},
    )
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
        default="all",
        metadata={"help": "Tokens that carry masks in training: all, a share below 1, a number, or regions."},
    )
    region_tokens: int = field(
        default=160, metadata={"help": "S of arXiv 2602.06019: tokens and masks of a text that `regions` share."}
    )
    regions: int = field(default=5, metadata={"help": "M: a region has S // M rows, its last k - 1 are masks."})
    k_min: int = field(default=2, metadata={"help": "With regions each step draws k (next token and k - 1 masks)."})
    k_max: int | None = field(default=None, metadata={"help": "Another name of depth + 1."})
    fixed_k: int | None = field(default=None, metadata={"help": "The same k in each step; sets depth and k_min."})
    proposal: Literal["argmax", "sample"] = field(
        default="argmax", metadata={"help": "Student-forced: how the module's own proposals are made."}
    )
    prefix_loss_weight: float = field(
        default=1.0, metadata={"help": "Student-forced, where the text learns too: of its ordinary next-token loss."}
    )
    entropy_loss_weight: float = field(default=0.0, metadata={"help": "Of the entropy of the predictions."})
    chunk_size: int = field(default=512, metadata={"help": "Tokens of a text that are trained at once; exact."})
    offload_keys: bool = field(default=False, metadata={"help": "Keep the text's keys and values on the CPU."})

    def __post_init__(self) -> None:
        if self.draft_length is not None:
            standard = type(self).__dataclass_fields__["depth"].default
            if self.depth not in (standard, self.draft_length):
                raise ValueError(f"draft_length={self.draft_length} and depth={self.depth} are one thing: give one.")
            self.depth, self.draft_length = self.draft_length, None
        self._take_k()
        if isinstance(self.mask_positions, str) and self.mask_positions.replace(".", "", 1).isdigit():
            self.mask_positions = float(self.mask_positions)
        super().__post_init__()

    def _take_k(self) -> None:
        standard = type(self).__dataclass_fields__["depth"].default
        if None not in (self.fixed_k, self.k_max) and self.fixed_k != self.k_max:
            raise ValueError(f"fixed_k={self.fixed_k} and k_max={self.k_max} disagree: give one.")
        for name in ("fixed_k", "k_max"):
            k = getattr(self, name)
            if k is not None:
                if self.depth not in (standard, k - 1):
                    raise ValueError(f"{name}={k} and depth={self.depth} disagree: depth is k - 1; give one.")
                self.depth = k - 1
        if self.fixed_k is not None:
            self.k_min, self.fixed_k = self.fixed_k, None
        self.k_max = None

    def problems(self) -> list[str]:
        """See MTPConfig."""
        found = super().problems()
        for name in ("use_dora", "lora_bias"):
            if getattr(self, name):
                found.append(f"{name}: gated adapters are plain LoRA; leave it out.")
        if self.lora_rank < 0 or self.lora_alpha <= 0:
            found.append(
                f"lora_rank, lora_alpha: got {self.lora_rank} and {self.lora_alpha}, wanted at least 0 (no adapters) "
                "and more than 0."
            )
        if not 0 <= self.lora_dropout < 1:
            found.append(f"lora_dropout: got {self.lora_dropout}, wanted at least 0 and below 1.")
        if self.hidden_source != "post_norm":
            found.append("hidden_source: masks are read after the final norm, as ordinary tokens are; leave it out.")
        if self.chunk_size < self.depth + 1:
            found.append(f"chunk_size: got {self.chunk_size}, wanted at least depth + 1 = {self.depth + 1} tokens.")
        where = self.mask_positions
        if where not in ("all", REGIONS) and not (
            isinstance(where, float | int) and (0 < where < 1 or (where >= 1 and where % 1 == 0))
        ):
            found.append(
                f"mask_positions: got {where!r}, wanted 'all', 'regions', a share between 0 and 1, or a whole number."
            )
        if where == REGIONS:
            found += region_problems(self.region_tokens, self.regions, self.k_min, self.depth + 1)
        if self.sampler and not self.sampler_loss_weight:
            found.append("sampler_loss_weight: got 0 for a sampler that then never learns; use sampler=False.")
        weights = [self.sampler_loss_weight if self.sampler else 0.0, self.own_loss_weight]
        every = [*weights, self.label_loss_weight, self.tv_loss_weight, self.latent_loss_weight]
        every += [self.prefix_loss_weight, self.entropy_loss_weight]
        if min(every) < 0 or sum(weights) == 0:
            found.append(
                "sampler_loss_weight, mask_loss_weight, ...: wanted none below 0 and one of these two above 0."
            )
        if self.mask_tokens == "noise" and self.fuse_weights:
            found.append("fuse_weights: a fused adapter has no PEFT form; noise masks are made to be exported.")
        if self.mask_tokens == "noise" and not self.sampler and (self.markov_rank or self.confidence_head):
            found.append(
                "markov_rank, confidence_head: noise masks without a sampler are made to be exported as a plain PEFT "
                "adapter, which carries neither; leave them out, or use other masks."
            )
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


class MaskedModule(MTPModule):
    """Mask embeddings, gated adapters, and a sampler head or none."""

    lays_masks = True
    reads_states = False
    config: MaskedConfig

    def __init__(self, config: MaskedConfig, target: Target) -> None:
        super().__init__(config, target)
        adapters = GatedAdapters(
            target.layers,
            config.lora_modules if config.lora_rank else [],
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
        self.gated = config.lora_gate or not adapters.paths
        self.usual_layout = "two_pass" if config.mask_tokens == "noise" else "auto"
        self.rows = MaskRows(target.embed_tokens, config.depth, config.mask_tokens, adapters, self.gated)
        self.sampler = SamplerHead(target) if config.sampler else None
        self.at_once = False  # texts in one chunk, however long: set by trainers whose ranks must read in step
        target.mask_rows = self.rows
        target.release()  # a view made before knows nothing of the adapters
        refuse_unreadable(self, target)

    def frozen(self) -> list[torch.nn.Parameter]:
        """See MTPModule."""
        return [] if self.config.train_masks or self.rows.embedding is None else [self.rows.embedding]

    def undecayed(self) -> list[torch.nn.Parameter]:
        """See MTPModule; and the masks, which are embeddings."""
        return [*super().undecayed(), *([] if self.rows.embedding is None else [self.rows.embedding])]

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

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def shortest_text(self) -> int:  # type: ignore[override]
        """See MTPModule: a region."""
        return self.config.region_tokens // self.config.regions if self.config.mask_positions == REGIONS else 0

    @property
    def reference(self) -> str:  # type: ignore[override]
        """See MTPModule."""
        return "the target" if self.gated else "the target with the module's adapters on, not the target alone"

    def text_learns(self, joint: bool) -> bool:
        """See MTPModule: plain adapters act on the text's rows as well."""
        return joint or not self.gated

    def anchored(self, supervision: Supervision, joint: bool) -> bool:
        """See MTPModule."""
        return is_forced(supervision) and self.text_learns(joint)

    def read(self, target: Target, batch: Batch, learns: bool, joint: bool) -> TargetRows | None:
        """See MTPModule: where the text learns in one pass; else masks are read by the losses, chunk by chunk."""
        if not self.text_learns(joint):
            return super().read(target, batch, learns, joint) if learns else None
        labels_BTK = self.labels(batch)
        with nullcontext() if joint else target.constant():
            return one_pass(self, target, batch, (labels_BTK != IGNORE_INDEX).any(-1), _deepest(labels_BTK))

    def pieces(self, target: Target, batch: Batch, carries_BT: Tensor, depths: int | None = None) -> Iterator[Piece]:
        """See reading.pieces."""
        return pieces(self, target, batch, carries_BT, depths or self.config.depth)

    # -- losses --------------------------------------------------------------------------------------------------------

    def choose(self, batch: Batch, generator: torch.Generator) -> Tensor | None:
        """See MTPModule: labels of the tokens that carry masks in this step, by `mask_positions`."""
        where = self.config.mask_positions
        if isinstance(where, str) and where != REGIONS:
            return None
        labels_BTK = self.labels(batch).cpu()
        if isinstance(where, str):
            width = self.config.region_tokens // self.config.regions
            chosen = choose_regions(labels_BTK, batch, width, self.config.k_min, generator)
            return chosen.to(batch.labels_BT.device)
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
        dynamic: bool = False,
        depths: int | None = None,
    ) -> list[LossSum]:
        """See MTPModule."""
        labels_BTK = self.labels(batch)
        if depths is not None:
            labels_BTK = labels_BTK.masked_fill(
                torch.arange(labels_BTK.shape[2], device=labels_BTK.device) >= depths, IGNORE_INDEX
            )
        carries_BT = (labels_BTK != IGNORE_INDEX).any(-1)

        def loss(piece: Piece) -> LossSum:
            return self._piece_loss(target, batch, piece, labels_BTK, detach, supervision, kind, dynamic)

        def read() -> Iterator[Piece]:
            return self.pieces(target, batch, carries_BT, _deepest(labels_BTK))

        if isinstance(rows, CombRows):
            assert rows.piece is not None
            found = loss(rows.piece)
            if is_forced(supervision):
                rows.anchor = anchor(target, batch, rows.piece, labels_BTK, detach, supervision, kind)
        elif self.at_once or labels_BTK.shape[1] <= self.config.chunk_size or not torch.is_grad_enabled():
            found = summed(map(loss, read()))
        else:
            found = streamed(self, lambda: map(loss, read()), coefficients_K)
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
        dynamic: bool,
    ) -> LossSum:
        """Totals, counts and correct guesses [K] of a piece: every part of the loss by its weight."""
        config, K, read = self.config, self.config.depth, piece.masks_BOKD.shape[2]
        owner_BOK = piece.owner_BO[..., None].expand(-1, -1, read)
        labels_BOK = labels_BTK[..., :read].gather(1, owner_BOK)
        labels_BOK = labels_BOK.masked_fill(~piece.valid_BO[..., None], IGNORE_INDEX)
        b_N, _, k_N = at = (labels_BOK != IGNORE_INDEX).nonzero(as_tuple=True)
        label_N, mask_ND = labels_BOK[at], piece.masks_BOKD[at]
        if not len(mask_ND):  # connected to every parameter all the same: other ranks wait for the gradients
            b_N, _, k_N = at = tuple(torch.zeros(1, dtype=torch.long, device=mask_ND.device) for _ in range(3))
            label_N, mask_ND = torch.full_like(b_N, IGNORE_INDEX), piece.masks_BOKD[:1, 0, 0]
        if supervision in REREADS:
            before_N, text_ND, text_N, label_N = by_proposals(self, target, piece, at, label_N, supervision)
            right_N = label_N  # what a chain goes on from: the teacher's own words
        else:
            right_N = label_N  # the data's
            before_N, text_ND, text_N, label_N = self._by_text(target, batch, piece, at, label_N, supervision)
        outputs = []
        if self.sampler is not None:
            embedding_ND = target.embed(before_N)
            state_ND = self.sampler(embedding_ND.detach() if detach else embedding_ND, mask_ND)
            outputs.append((state_ND, config.sampler_loss_weight))
        outputs.append((mask_ND, config.own_loss_weight))
        outputs = [output for output in outputs if output[1]] or outputs[:1]
        if config.free_running:
            still_N = self._while_right(target, outputs[0][0], before_N, right_N, at, labels_BOK.shape)
            label_N = label_N.masked_fill(~still_N, IGNORE_INDEX)
        hard_N = label_N if self.draft_vocab_ids is None else self.to_draft_ids(label_N, target.vocab_size)
        teacher_MD, teacher_bias_M = self.target_head(piece.teacher, detach=True)
        n, G = len(outputs), len(outputs) * K
        group_N = torch.cat([k_N + i * K for i in range(n)])
        hidden_ND = torch.cat([output for output, _ in outputs])
        # every depth has the target's head
        shared: dict[str, Any] = {**self.spoken(target, hidden_ND, 1, before_N.repeat(n), detach), "groups_N": group_N}
        shared["groups"] = G
        teacher = {
            "teacher_hidden_ND": text_ND,
            "teacher_weight_MD": teacher_MD,
            "teacher_bias_M": teacher_bias_M,
            "teacher_rows_N": text_N.repeat(n),
            "labels_N": label_N.repeat(n),
        }
        labels = {"labels_N": hard_N.repeat(n)}
        soft = supervision in SOFT
        together = {}
        if kind == "e2e_tv" or dynamic:  # a group is one prediction of one block
            X, place_N = owner_BOK[..., 0].numel(), b_N * owner_BOK.shape[1] + at[1]
            together = {"groups_N": group_N * X + place_N.repeat(n), "groups": G * X}
        parts: list[tuple[float, dict[str, Any]]] = [
            (1.0, ({**teacher, "kind": "tv" if kind == "e2e_tv" else kind} if soft else labels) | together),
            (config.label_loss_weight if soft else 0.0, labels),
            (config.tv_loss_weight, {**teacher, "kind": "tv"}),
        ]
        factor_G = torch.tensor([w for _, w in outputs], device=hidden_ND.device).repeat_interleave(K)
        total_K, first_sum = 0.0, None
        for weight, what in parts:
            if weight:
                found = linear_loss(**shared | what)
                if "groups" in what:
                    found = self._by_depth(found, n, kind, dynamic)
                first_sum = first_sum or found
                total_K = total_K + weight * (found.total * factor_G.to(found.total.dtype)).view(n, K).sum(0)
        if config.entropy_loss_weight:  # H = log M - KL from the uniform distribution, which a state of zeros speaks
            zeros = {**teacher, "teacher_hidden_ND": torch.zeros_like(text_ND[:1]), "teacher_bias_M": None}
            zeros["teacher_rows_N"] = torch.zeros_like(teacher["teacher_rows_N"])
            found = linear_loss(**shared, **{**zeros, "kind": "reverse_kl"})
            entropy_G = found.count * math.log(len(shared["weight_MD"])) - found.total
            total_K = total_K + config.entropy_loss_weight * (entropy_G * factor_G).view(n, K).sum(0)
        if config.latent_loss_weight:
            far_N = (mask_ND - text_ND[text_N]).float().pow(2).sum(-1).masked_fill(label_N == IGNORE_INDEX, 0.0)
            total_K = total_K + config.latent_loss_weight * far_N.new_zeros(K).index_add(0, k_N, far_N)
        right_N = first_sum.right_N[: len(label_N)]
        sure_N = self._confidence_loss(outputs[0][0], before_N, right_N, label_N if soft else hard_N)
        if sure_N is not None:
            total_K = total_K + sure_N.new_zeros(K).index_add(0, k_N, sure_N)
        return LossSum(total_K, first_sum.count[:K], first_sum.correct[:K])

    def _by_depth(self, found: LossSum, n: int, kind: LossKind, dynamic: bool) -> LossSum:
        """Of single predictions, output by output and depth by depth, to depths of each output."""
        parts = [t.view(n, self.config.depth, -1).unbind() for t in (found.total, found.count, found.correct)]
        together = []
        for total_KX, count_KX, correct_KX in zip(*parts, strict=True):
            each = [LossSum(*one) for one in zip(total_KX, count_KX, correct_KX, strict=True)]
            together += expected_length(each) if kind == "e2e_tv" else dpace(each, kind)
        total, count, correct = ([getattr(d, name) for d in together] for name in ("total", "count", "correct"))
        return LossSum(torch.stack(total), torch.stack(count), torch.stack(correct), found.right_N)

    def _by_text(
        self, target: Target, batch: Batch, piece: Piece, at: Any, label_N: Tensor, supervision: Supervision
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(the token before each prediction, states of a teacher, which of them speaks of it, labels): the data's."""
        b_N, o_N, k_N = at
        owner_N = piece.owner_BO[b_N, o_N]
        end_N = ends_of(batch.document_BT)[b_N, owner_N]
        before_N = owner_N + k_N + 1
        if supervision not in ("labels", "student_forced_gt"):  # what lies behind the text's end has no teacher
            label_N = label_N.masked_fill(before_N > end_N, IGNORE_INDEX)
        before_N = torch.minimum(before_N, end_N)
        text_ND = piece.text_BWD.reshape(-1, piece.text_BWD.shape[2]).detach()
        text_N = b_N * piece.text_BWD.shape[1] + before_N - piece.first
        if supervision == "teacher_hard":
            label_N = torch.where(label_N == IGNORE_INDEX, label_N, chosen_tokens(target.logits, text_ND, text_N))
        return batch.input_ids_BT[b_N, before_N], text_ND, text_N, label_N

    @torch.no_grad()
    def _while_right(
        self,
        target: Target,
        state_ND: Tensor,
        before_N: Tensor,
        data_N: Tensor,
        at: tuple[Tensor, ...],
        shape: torch.Size,
    ) -> Tensor:
        """bool [N]: the predictions whose predecessors in the same block are all the data's tokens."""
        guess_N = self.guess(target, state_ND, 1, before_N)  # every depth has the target's head
        wrong_BOK = torch.zeros(shape, dtype=torch.long, device=data_N.device)
        wrong_BOK[at] = (guess_N != data_N).long()
        return (wrong_BOK.cumsum(-1) == wrong_BOK)[at]

    # -- analysis and drafting -----------------------------------------------------------------------------------------

    def depth_states(self, target: Target, batch: Batch, source_BTD: Tensor, detach: bool) -> Iterator[Tensor]:
        """See MTPModule: the masks of every token, and of its following tokens the embeddings that are there."""
        carries_BT = batch.document_BT != PAD_DOCUMENT
        states_BTKD = source_BTD.new_zeros(*carries_BT.shape, self.config.depth, source_BTD.shape[2])
        for piece in self.pieces(target, batch, carries_BT):
            b_N, o_N = piece.valid_BO.nonzero(as_tuple=True)
            states_BTKD[b_N, piece.owner_BO[b_N, o_N]] = piece.masks_BOKD[b_N, o_N].to(states_BTKD.dtype)
        for k in range(1, self.config.depth + 1):
            if self.sampler is None:
                yield states_BTKD[:, :, k - 1]
                continue
            yield self.sampler(self.embedded_ahead(target, batch, k, detach), states_BTKD[:, :, k - 1])

    def drafter(self, target: Target, dtype: str = "auto") -> MaskedDrafter:
        """A drafter over the module's current weights; dtype: see generate's draft_dtype."""
        return MaskedDrafter(self, self.sampler, target, dtype)


def _deepest(labels_BTK: Tensor) -> int:
    """How many masks of a block are asked for: the deepest depth with a label, at least one."""
    used_K = (labels_BTK != IGNORE_INDEX).flatten(0, 1).any(0)
    return int(used_K.nonzero().amax()) + 1 if bool(used_K.any()) else 1
