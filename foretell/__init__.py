"""foretell: a causal language model learns to predict several tokens at once, then decodes faster, token for token
the same.

The names below are loaded when they are first used, so that `import foretell` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foretell.checkpoint import shipped
    from foretell.decoding.lookup import PromptLookup
    from foretell.decoding.trees import calibrated_tree, cartesian_tree
    from foretell.evaluation.accuracy import head_accuracy
    from foretell.export import export_module
    from foretell.methods.base import MTPConfig, load_preset
    from foretell.methods.heads import HeadsConfig
    from foretell.methods.masked import MaskedConfig
    from foretell.methods.sequential import SequentialConfig
    from foretell.mtp import MTPModel, custom_generate, get_mtp_model
    from foretell.training.trainer import MTPTrainer, MTPTrainingArguments

__version__ = "0.1.0"

__all__ = [
    "HeadsConfig",
    "MTPConfig",
    "MTPModel",
    "MTPTrainer",
    "MTPTrainingArguments",
    "MaskedConfig",
    "PromptLookup",
    "SequentialConfig",
    "__version__",
    "calibrated_tree",
    "cartesian_tree",
    "custom_generate",
    "export_module",
    "get_mtp_model",
    "head_accuracy",
    "load_preset",
    "shipped",
]

_HOME = {
    "HeadsConfig": "foretell.methods.heads",
    "MTPConfig": "foretell.methods.base",
    "MTPModel": "foretell.mtp",
    "MTPTrainer": "foretell.training.trainer",
    "MTPTrainingArguments": "foretell.training.trainer",
    "MaskedConfig": "foretell.methods.masked",
    "PromptLookup": "foretell.decoding.lookup",
    "SequentialConfig": "foretell.methods.sequential",
    "calibrated_tree": "foretell.decoding.trees",
    "cartesian_tree": "foretell.decoding.trees",
    "custom_generate": "foretell.mtp",
    "export_module": "foretell.export",
    "get_mtp_model": "foretell.mtp",
    "head_accuracy": "foretell.evaluation.accuracy",
    "load_preset": "foretell.methods.base",
    "shipped": "foretell.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'foretell' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
