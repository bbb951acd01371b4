"""What a target and its module learn from a batch: the target's next-token loss, the depths' losses, sums and counts.

The target's own loss is the reference: where it is more than the cross-entropy of its head's products (a router's loss,
a loss function of its own), it is the target itself that is asked.
"""

# B sequences, T positions, R rows, K depths, D hidden width, V vocabulary.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from foretell.data.collate import positions_of, to_batch
from foretell.methods.base import GradientMode, LossKind, Supervision
from foretell.methods.reading import CombRows
from foretell.models.target import Target, TargetRows
from foretell.ops.losses import linear_loss
from foretell.ops.shift import check_depth, next_labels, prefix_labels
from foretell.types import IGNORE_INDEX, PAD_DOCUMENT, Batch, LossSum


class Learning(nn.Module):
    """A target and its module as trainers see them; MTPModel is one."""

    mtp_config: Any
    model: Any
    target: Target
    module: Any
    _plain: bool | None = None  # see _loss_is_plain

    def forward(
        self,
        *,
        mtp_training_mode: GradientMode = "standalone",
        mtp_supervision: Supervision = "labels",
        mtp_loss: LossKind = "ce",
        train_target: bool = False,
        mtp_coefficients: Tensor | None = None,
        mtp_dynamic: bool = False,
        mtp_depths: int | None = None,
        outputs: bool = False,
        stay: bool = False,
        **inputs: Tensor,
    ) -> dict[str, Any]:
        """Sums and counts of the losses; nothing is divided here (training/objective.py does that, once).

        inputs as made by MTPCollator. mtp_coefficients [K]: what the caller will multiply the depths' totals by, up to
        one factor for all; a text longer than a masked module's chunk_size needs it where they differ. mtp_dynamic,
        mtp_depths: see MTPModule.losses.
        Returns {"ntp": LossSum or None, "mtp": list of LossSum by depth, "anchor": LossSum or None, "stay": LossSum or
        None, "outputs": the target's own or None}. anchor is of tokens that carry masks where these learn by proposals
        (methods/student_forced.py); stay and outputs are what was asked for.
        """
        batch = to_batch(inputs)
        check_depth(self.mtp_config.depth, batch.input_ids_BT.shape[1])
        detach = mtp_training_mode != "joint"
        anchored = self.module.anchored(mtp_supervision, not detach)
        labels_BT = prefix_labels(batch) if anchored else next_labels(batch.labels_BT, batch.document_BT)
        learns_text = train_target or self.module.text_learns(joint=False)
        plain = not learns_text or self._loss_is_plain()
        if not plain and self.module.text_learns(joint=False):
            raise ValueError("lora_gate=False: this model's loss is more than the cross-entropy of its logits.")
        own, rows, ntp = None, None, None
        with nullcontext() if train_target else in_eval_mode(self.model):
            if outputs or not plain:
                with nullcontext() if train_target else torch.no_grad():
                    own, rows = self._ask(batch, labels_BT)
            if self.module.reads_states and detach and not train_target and batch.hidden_BTD is not None:
                rows = self._kept_rows(batch.hidden_BTD)
            elif rows is None or self.module.lays_masks:
                rows = self.module.read(self.target, batch, train_target, not detach)
        if learns_text:
            ntp = self._by_states(rows, labels_BT, train_target) if plain else _own_loss(own, labels_BT)
        losses = self.losses_of(
            batch,
            rows,
            mtp_training_mode=mtp_training_mode,
            mtp_supervision=mtp_supervision,
            mtp_loss=mtp_loss,
            train_target=train_target,
            mtp_coefficients=mtp_coefficients,
            mtp_dynamic=mtp_dynamic,
            mtp_depths=mtp_depths,
            stay=stay,
        )
        if anchored and ntp is not None:
            ntp.total = ntp.total * self.mtp_config.prefix_loss_weight
        return {"ntp": ntp, **losses, "outputs": own}

    def losses_of(
        self,
        batch: Batch,
        rows: TargetRows | None,
        *,
        mtp_training_mode: GradientMode,
        mtp_supervision: Supervision,
        mtp_loss: LossKind,
        train_target: bool,
        mtp_coefficients: Tensor | None,
        stay: bool,
        mtp_dynamic: bool = False,
        mtp_depths: int | None = None,
    ) -> dict[str, Any]:
        """What forward returns but ntp and outputs, of states that were read."""
        # noise on embeddings (NEFTune) is the module's too, where it reads them itself
        resting = in_eval_mode(self.model, *([] if self.module.lays_masks else [self.target.embed_tokens]))
        learns = torch.is_grad_enabled() and mtp_training_mode != "disabled"
        with torch.set_grad_enabled(learns), nullcontext() if train_target else resting:
            mtp = self.module.losses(
                self.target,
                batch,
                rows,
                detach=mtp_training_mode != "joint",
                supervision=mtp_supervision,
                kind=mtp_loss,
                coefficients_K=mtp_coefficients,
                dynamic=mtp_dynamic,
                depths=mtp_depths,
            )
        held = self.staying(batch, rows) if stay and rows is not None else None
        return {"mtp": mtp, "anchor": rows.anchor if isinstance(rows, CombRows) else None, "stay": held}

    def _by_states(self, rows: TargetRows | None, labels_BT: Tensor, learns: bool) -> LossSum:
        assert rows is not None, "what learns the text has read it"
        weight_VD, bias_V = self.target.head_matrix(detach=not learns)
        return linear_loss(
            rows.post_norm_BRD.reshape(-1, self.target.hidden_size),
            weight_VD,
            labels_N=labels_BT.reshape(-1),
            bias_M=bias_V,
            **self.target.loss_scaling,
        )

    def _ask(self, batch: Batch, labels_BT: Tensor) -> tuple[Any, TargetRows]:
        """The target's own outputs, as any trainer would ask for them, and the states that passed by."""
        document_BT, shape = batch.document_BT, batch.input_ids_BT.shape
        usual_BT = positions_of(document_BT)
        given = {"input_ids": batch.input_ids_BT}
        given["labels"] = F.pad(labels_BT, (1, 0), value=IGNORE_INDEX)[:, :-1]  # of each token itself
        packed = bool((usual_BT == 0).logical_and(document_BT != PAD_DOCUMENT).sum(1).gt(1).any())
        if packed or not torch.equal(usual_BT, batch.position_ids_BT):
            given["position_ids"] = batch.position_ids_BT
        if packed:  # documents are told apart by their positions
            given = {name: self.target.flat(rows_BT) for name, rows_BT in given.items()}
        else:
            given["attention_mask"] = (document_BT != PAD_DOCUMENT).long()
        with self.target.passing_by() as states:
            own = self.model(**given, use_cache=False)
        own.logits = own.logits.view(*shape, -1)
        return own, self.target.passed(states, shape)

    def _loss_is_plain(self) -> bool:
        """Whether the target's own loss is the cross-entropy of its head's products and nothing else: such a loss is
        computed without ever holding the logits of a batch. Asked by a text of a few tokens.
        """
        loss_function = getattr(self.target.model, "loss_function", None)
        if getattr(self.target.config, "output_router_logits", False) or loss_function is not ForCausalLMLoss:
            return False
        if getattr(self.target.model, "is_quantized", False):
            return False  # in eval mode bitsandbytes repacks four-bit weights on a CPU for good, then gives no gradient
        if self._plain is None:
            ids_BT = torch.arange(min(16, self.target.vocab_size), device=self.device)[None]
            batch = to_batch({"input_ids": ids_BT})
            labels_BT = next_labels(batch.labels_BT, batch.document_BT)
            with torch.no_grad(), in_eval_mode(self.model):
                own, rows = self._ask(batch, labels_BT)
                mine = self._by_states(rows, labels_BT, learns=False)
            tolerance = 1e-4 if self.target.dtype == torch.float32 else 2e-2
            self._plain = torch.allclose(mine.total / mine.count, own.loss.to(mine.total), rtol=tolerance)
        return self._plain

    def staying(self, batch: Batch, rows: TargetRows) -> LossSum:
        """KL of the target from itself with its adapter switched off, where labels are (Medusa, section 2.3.2)."""
        with torch.no_grad(), in_eval_mode(self.model), self.model.disable_adapter():
            was = self.target.forward_text(batch.input_ids_BT, batch.position_ids_BT).post_norm_BRD
            teacher_VD, teacher_bias_V = self.target.head_matrix(detach=True)
        (weight_VD, bias_V), D = self.target.head_matrix(), self.target.hidden_size
        return linear_loss(
            rows.post_norm_BRD.reshape(-1, D),
            weight_VD,
            labels_N=next_labels(batch.labels_BT, batch.document_BT).reshape(-1),
            kind="kl",
            bias_M=bias_V,
            **self.target.loss_scaling,
            teacher_hidden_ND=was.reshape(-1, D),
            teacher_weight_MD=teacher_VD,
            teacher_bias_M=teacher_bias_V,
        )

    def make_trainable(self) -> None:
        """Parameters of the module that never learn stop asking for a gradient. Those that do become fp32 master
        weights: autocast computes in the lower precision.
        """
        for parameter in self.module.frozen():
            parameter.requires_grad_(False)
        for parameter in self.module.parameters():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As PreTrainedModel's: the target's layers and the module's blocks are computed again in the backward pass."""
        if self.module.lays_masks:
            raise ValueError("activation checkpointing: with mask tokens a smaller chunk_size bounds memory, exactly.")
        self.target.compute_again_in_backward(activation_checkpointing_kwargs, **kwargs)
        like = self.target.layers[0]
        for part in self.module.modules():
            if hasattr(part, "gradient_checkpointing"):
                part._gradient_checkpointing_func = like._gradient_checkpointing_func
                part.gradient_checkpointing = True

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The same under its older name, which TRL and transformers before 5.23 call."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def _kept_rows(self, hidden_BTD: Tensor) -> TargetRows:
        """States that were kept while the target decoded: those that the module reads."""
        hidden_BTD = hidden_BTD.to(self.target.dtype)
        if self.mtp_config.hidden_source == "post_norm":
            return TargetRows(hidden_BTD, None)
        with torch.no_grad():
            return TargetRows(self.target.norm(hidden_BTD), hidden_BTD)


@contextmanager
def in_eval_mode(model: nn.Module, *but: nn.Module) -> Iterator[None]:
    """While this is open: no noise of dropout. Afterwards every part has the mode that it had."""
    noisy = [part for part in model.modules() if part.training and part not in but]
    for part in noisy:
        part.training = False
    try:
        yield
    finally:
        for part in noisy:
            part.training = True


def _own_loss(own: Any, labels_BT: Tensor) -> LossSum:
    """A mean over labelled tokens, whatever the target adds to it, as a sum like the others."""
    count = (labels_BT != IGNORE_INDEX).sum()
    total = own.loss.float() * count if bool(count) else 0.0 * own.logits.float().sum()
    return LossSum(total, count, torch.zeros_like(count))
