"""TRL's GRPOTrainer with drafts in its rollouts and an MTP module beside the policy: one changed import."""

from __future__ import annotations

from dataclasses import dataclass

import trl

from foretell.training.rollout_arguments import RolloutArguments
from foretell.training.rollouts import RolloutTraining


@dataclass
class GRPOConfig(RolloutArguments, trl.GRPOConfig):
    """TRL's GRPOConfig plus the fields of RolloutArguments; with none of them set TRL's trainer to the bit."""


class GRPOTrainer(RolloutTraining, trl.GRPOTrainer):
    """TRL's GRPOTrainer; see RolloutTraining. `trainer.mtp` is the policy with its module, if there is one."""

    of_trl = trl.GRPOTrainer
