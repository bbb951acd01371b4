"""TRL's GRPOTrainer and RLOOTrainer with drafts in rollouts and an MTP module beside the policy: one changed import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trl

from foretell.training.rollout_arguments import RolloutArguments
from foretell.training.rollouts import RolloutTraining


@dataclass
class GRPOConfig(RolloutArguments, trl.GRPOConfig):
    """TRL's GRPOConfig plus the fields of RolloutArguments; with none of them set TRL's trainer to the bit."""


class GRPOTrainer(RolloutTraining, trl.GRPOTrainer):
    """TRL's GRPOTrainer; see RolloutTraining. `trainer.mtp` is the policy with its module, if there is one."""

    of_trl = trl.GRPOTrainer


@dataclass
class RLOOConfig(RolloutArguments, trl.RLOOConfig):
    """TRL's RLOOConfig plus the fields of RolloutArguments; with none of them set TRL's trainer to the bit."""


class RLOOTrainer(RolloutTraining, trl.RLOOTrainer):
    """TRL's RLOOTrainer in the same way."""

    of_trl = trl.RLOOTrainer
    tells_logprobs = False
    loss_is_scaled_for_ga = property(lambda self: self._learns())

    def _losses(self, *args: Any) -> dict[str, Any]:
        """TRL leaves it to Trainer to divide by accumulation steps, but the module's counts are of them all."""
        found = super()._losses(*args)
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        return {**found, "own": found["own"] / steps}
