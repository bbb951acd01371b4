"""TRL's SFTTrainer with multi-token prediction: one changed import, nothing patched globally.

The interface is that of the documentation page of TRL's proposed MTP (huggingface/trl#4290, closed). What was wrong
there is right here: the module exists before the optimizer, depth k predicts token t + 1 + k, no head sees the future
or another document, one division by global counts, and checkpoints hold the module. docs/sft.md is the page.

One training step: MTPTraining.compute_loss -> TRL's compute_loss -> TRLModel.forward (TRL's own forward, the module's
losses over the states that passed by).
"""

# B sequences, T positions, K depths.

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import trl
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from foretell.data.collate import to_batch
from foretell.methods.base import METHODS, REREADS, GradientMode, MTPConfig, load_preset
from foretell.models.mtp_heads import HeadType, InitStrategy
from foretell.ops.shift import labels_of
from foretell.training.arguments import MTPArguments
from foretell.training.mtp_training import MTPTraining
from foretell.training.trl_training import TRLModel, TRLTraining
from foretell.types import LossSum

ALIASES = {"mtp_loss_weight": "mtp_loss_scaling_factor", "mtp_weight_decay_strategy": "mtp_depth_weights"}


@dataclass
class SFTConfig(MTPArguments, trl.SFTConfig):
    """TRL's SFTConfig plus the fields of multi-token prediction. mtp_enabled=False is TRL to the bit.

    mtp_loss_weight and mtp_weight_decay_strategy are the page's names of mtp_loss_scaling_factor and mtp_depth_weights.
    """

    mtp_enabled: bool = field(default=False, metadata={"help": "Train an MTP module beside the model."})
    mtp_num_predictions: int = field(
        default=2, metadata={"help": "K: tokens predicted BEYOND the ordinary next one (depths 1..K)."}
    )
    mtp_loss_scaling_factor: float | None = field(
        default=0.5, metadata={"help": "Weight of the MTP loss beside the next-token loss."}
    )
    mtp_loss_weight: float | None = field(default=None, metadata={"help": "The same."})
    mtp_head_type: HeadType = field(
        default="linear", metadata={"help": "linear, ffn, mha_ffn, cnn, identical, medusa or layer (method heads)."}
    )
    mtp_num_layers: int = field(default=1, metadata={"help": "Layers of each head."})
    mtp_init_strategy: InitStrategy = field(default="default", metadata={"help": "How the heads' weights start."})
    mtp_dropout_prob: float = field(default=0.1, metadata={"help": "Dropout before and inside heads."})
    mtp_weight_decay_strategy: str | None = field(
        default=None, metadata={"help": "Weights of the depths: the same as mtp_depth_weights."}
    )
    mtp_method: str = field(default="heads", metadata={"help": f"Architecture of the module: {', '.join(METHODS)}."})
    mtp_training_mode: GradientMode = field(
        default="joint", metadata={"help": "disabled, standalone (the model is untouched to the bit) or joint."}
    )
    mtp_preset: str | None = field(
        default=None, metadata={"help": "A preset of recipes/ or a YAML file like them; it sets the fields above."}
    )
    mtp_share_unembedding: bool | None = field(
        default=None, metadata={"help": "Heads use the model's output matrix; by default for large vocabularies."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        found = self._take_aliases()
        if not self.mtp_enabled:
            return
        self.take_preset(self.mtp_preset)
        for alias, name in ALIASES.items():
            setattr(self, alias, getattr(self, name))
        found += self.problems()
        try:
            self.mtp_config()
        except ValueError as error:
            found.append(str(error))
        if found:
            raise ValueError("; ".join(found))

    def _take_aliases(self) -> list[str]:
        """Both names of a thing say the same from here on."""
        found, fields = [], type(self).__dataclass_fields__
        for alias, name in ALIASES.items():
            given, value = getattr(self, alias), getattr(self, name)
            if given is not None and given != value and value != fields[name].default:
                found.append(f"{alias}={given!r} and {name}={value!r} are one thing: give one")
            setattr(self, name, value if given is None else given)
            setattr(self, alias, getattr(self, name))
        return found

    def problems(self) -> list[str]:
        """See MTPArguments."""
        found = [problem.removesuffix(".") for problem in super().problems()]
        found = [problem.replace("mtp_loss_scaling_factor:", "mtp_loss_weight:") for problem in found]
        if self.mtp_supervision in REREADS and self.mtp_training_mode == "joint":
            found.append(
                "mtp_supervision: student_forced in joint mode needs a frozen copy of the model as its teacher, which "
                "MTPTrainer keeps (foretell train); here train the module alone: mtp_training_mode=standalone"
            )
        if self.mtp_preset is not None:
            fields = type(self).__dataclass_fields__
            shape = ("mtp_head_type", "mtp_num_layers", "mtp_init_strategy", "mtp_method", "mtp_share_unembedding")
            changed = [name for name in shape if getattr(self, name) != fields[name].default]
            if changed:
                names = ", ".join(changed)
                found.append(f"mtp_preset: {self.mtp_preset!r} sets {names} too; give the one or the others")
        return found

    def mtp_config(self) -> MTPConfig:
        """The module's settings. Raises ConfigError with everything that is wrong with them."""
        if self.mtp_preset is not None:
            return MTPConfig.from_any(load_preset(self.mtp_preset)["module"])
        values: dict[str, Any] = {"method": self.mtp_method, "depth": self.mtp_num_predictions}
        if self.mtp_method == "heads":
            values |= {
                "head_type": self.mtp_head_type,
                "num_layers": self.mtp_num_layers,
                "init_strategy": self.mtp_init_strategy,
                "dropout": self.mtp_dropout_prob,
                "share_unembedding": self.mtp_share_unembedding,
            }
        return MTPConfig.from_any(values)


@dataclass
class DataCollatorForMTPLanguageModeling(DataCollatorForLanguageModeling):
    """TRL's collator, and mtp_labels [B, T, K]: mtp_labels[b, t, k - 1] = labels[b, t + 1 + k], or -100 where that is
    masked, padding, past the end or in another document. Not needed by SFTTrainer, which derives them itself; labels
    that are given it uses.

    Args:
        num_predictions: K, tokens beyond the ordinary next one.
    """

    num_predictions: int = 2

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """See DataCollatorForLanguageModeling."""
        out = super().torch_call(examples)
        return {**out, "mtp_labels": labels_of(to_batch(out), self.num_predictions)}


class SFTTrainer(TRLTraining, trl.SFTTrainer):
    """TRL's SFTTrainer; with SFTConfig(mtp_enabled=True) it trains an MTP module beside the model.

    Checkpoints hold mtp_config.json and mtp_model.safetensors beside what TRL writes (nothing but them and the
    tokenizer in standalone, where the model does not change): `MTPModel.from_pretrained(model, folder)` loads them.
    `trainer.mtp` is the MTPModel.
    """

    def __init__(self, model: Any, args: Any = None, *more: Any, **kwargs: Any) -> None:
        enabled = isinstance(args, SFTConfig) and args.mtp_enabled
        if enabled:
            given = inspect.signature(trl.SFTTrainer.__init__).bind(self, model, args, *more, **kwargs).arguments
            found = self._refuse(given)
            adapted = given.get("peft_config") is not None or hasattr(given["model"], "disable_adapter")
            if args.mtp_target_loss == "untouched" and not adapted:
                found.append("mtp_target_loss: 'untouched' is the model with its adapter off, so give a peft_config")
            if found:
                raise ValueError("; ".join(found))
        super().__init__(model, args, *more, **kwargs)
        if enabled:
            made: Any = getattr(self, "model")  # noqa: B009 (TRL gives it no type)
            if self._is_vlm:
                raise ValueError(f"{type(made).__name__}: wanted a text model; MTP modules read text only.")
            self._put_beside(TRLModel(made, args.mtp_config()))

    def _losses(
        self, model: nn.Module, inputs: dict[str, Any], counts_K1: Tensor, num_items: Any, outputs: bool, ranks: int
    ) -> dict[str, Any]:
        """TRL's next-token loss, as value only where the model does not learn it, and the module's losses."""
        plain = super(MTPTraining, self).compute_loss
        out, losses = self._asked(to_batch(inputs), counts_K1, lambda: plain(model, inputs, outputs, num_items))
        ntp, made = out if outputs else (out, None)
        count = counts_K1[0].clamp(min=1)
        ntp = ntp if self.args.trains_target else ntp.detach()
        return {**losses, "ntp": LossSum(ntp * count / ranks, count, count), "outputs": made}
