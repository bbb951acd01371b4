"""How every verb loads a model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_target(path: str, dtype: str = "auto", from_scratch: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or a hub name; from_scratch takes the config only, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json there; wanted a transformers model folder.")
    kind: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    if from_scratch:
        config = AutoConfig.from_pretrained(path)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if dtype == "auto" else kind)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no tokenizer could be loaded ({error}); save one beside the model.") from None
    if torch.cuda.is_available():
        model.to("cuda")
    return model, tokenizer
