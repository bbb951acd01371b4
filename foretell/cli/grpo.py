"""foretell grpo: TRL's own flags and YAML files (`trl grpo`), plus the fields of foretell.trl.GRPOConfig."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from foretell.cli.sft import ask_for_trl, parsed, run


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code."""
    ask_for_trl("foretell grpo")
    from trl.scripts.grpo import GRPOScriptArguments

    from foretell.training.grpo import GRPOConfig, GRPOTrainer

    script, args, about = parsed("foretell grpo", argv, GRPOScriptArguments, GRPOConfig)
    rewards = [] if script.reward_model_name_or_path is None else [script.reward_model_name_or_path]
    rewards += [_reward(name) for name in script.reward_funcs or []]
    if not rewards:
        raise ValueError("reward_funcs: got none, wanted names of trl.rewards, or module.function of your own.")
    return run(GRPOTrainer(reward_funcs=rewards, args=args, **about), script)


def _reward(name: str) -> Any:
    """A reward of TRL's by its name, with the settings of `trl grpo`, or a function by its dotted path."""
    import trl.rewards

    module, _, function = name.rpartition(".")
    if not module:
        found = getattr(trl.rewards, name, None)
        if name == "get_soft_overlong_punishment":
            found = found(max_completion_len=1280, soft_punish_cache=256)
        if found is None:
            raise ValueError(
                f"reward_funcs: got {name!r}, wanted a name of trl.rewards, or module.function of your own."
            )
        return found
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward_funcs: got {name!r}, wanted module.function from here: {error}.") from error
