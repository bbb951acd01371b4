"""Drop-in for TRL users: `from foretell.trl import SFTConfig, SFTTrainer` instead of `from trl import ...`."""

from foretell.training.grpo import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from foretell.training.sft import DataCollatorForMTPLanguageModeling, SFTConfig, SFTTrainer

__all__ = ["DataCollatorForMTPLanguageModeling", "GRPOConfig", "GRPOTrainer", "SFTConfig", "SFTTrainer"]
__all__ += ["RLOOConfig", "RLOOTrainer"]
