"""How every verb loads a model and its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foretell.runtime import provenance

KEPT = ".rounds.jsonl"  # of evaluate and sweep, beside the output, until it is written
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(kw_only=True)
class ModelSettings:
    """What every verb that decodes is told."""

    model: str = field(
        metadata={"help": "Target: a transformers folder, a GGUF file, or a hub name.", "positional": True}
    )
    module: str | None = field(
        default=None,
        metadata={"help": "Folder of the MTP module; without it the one that ships for this model, else lookup alone."},
    )
    dtype: str = field(default="auto", metadata={"help": f"Of the target: {', '.join(DTYPES)}."})

    def problems(self) -> list[str]:
        """See config.check."""
        return [] if self.dtype in DTYPES else [f"dtype: got {self.dtype!r}, wanted one of {', '.join(DTYPES)}."]


@dataclass(kw_only=True)
class WorkloadSettings(ModelSettings):
    """And those that decode many prompts."""

    prompts: list[str] = field(
        metadata={"help": "spec-bench:FILE, mt-bench:FILE, gsm8k:FILE, humaneval:FILE, demo, or any rows with prompts."}
    )
    limit: int | None = field(default=None, metadata={"help": "Prompts of each category; null for all."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer, in tokens."})
    seed: int = field(default=0, metadata={"help": "Of samples."})

    def problems(self) -> list[str]:
        """See config.check. Numbers that count something are 1 at least, in whatever verb has them."""
        found = super().problems()
        for name in ("limit", "max_new_tokens", "batch_size", "repeats", "contexts"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                found.append(f"{name}: got {value}, wanted at least 1.")
        return found


def load_target(path: str, dtype: str = "auto", from_scratch: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder, a GGUF file, which is read in fp32, or a hub name; from_scratch takes the config
    only, with random weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    file, how = Path(path), {}
    if file.suffix == ".gguf" and file.is_file() and not from_scratch:
        path, how, dtype = str(file.parent), {"gguf_file": file.name}, "float32" if dtype == "auto" else dtype
    elif file.exists() and not (file / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json there; wanted a transformers model folder.")
    kind: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    if from_scratch:
        config = AutoConfig.from_pretrained(path)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if dtype == "auto" else kind)
    else:
        plain: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)} if how else {}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=kind, **how, **plain)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **how)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no tokenizer could be loaded ({error}); save one beside the model.") from None
    if torch.cuda.is_available():
        model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")  # each process of torchrun its own
    return model, tokenizer


def about_run(settings: ModelSettings, mtp: Any, verb: str, argv: Sequence[str]) -> dict[str, Any]:
    """What was run, where."""
    found = provenance(["foretell", verb, *argv])
    return {
        "model": Path(settings.model).name,  # whose weights identity tells, wherever they lie
        "module": settings.module and Path(settings.module).name,
        "dtype": str(mtp.target.dtype).removeprefix("torch."),
        "provenance": {
            "time": found.get("time_utc"),
            "command": " ".join(found["command"]),
            "versions": found["versions"],
            "cpu": found["hardware"]["cpu"],
            "cores": found["hardware"]["cores"],
            "commit": found.get("commit"),
            "uncommitted_changes": found.get("uncommitted_changes"),
        },
    }


def chat_template(name: str, tokenizer: Any) -> str:
    """The chat template of a file, one of TRL's by its name, or for "auto" TRL's training variant of the tokenizer's
    own (where it has none, the tokenizer's own).

    Raises:
        ValueError: no such file or template.
    """
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    try:
        import trl
        from trl.chat_template_utils import get_training_chat_template
    except ImportError:
        raise ValueError(
            f"chat_template: got {name!r}, wanted a file; templates by name are TRL's: pip install trl."
        ) from None
    if name == "auto":
        try:
            return get_training_chat_template(tokenizer) or tokenizer.chat_template
        except ValueError:
            return tokenizer.chat_template
    found = {path.stem: path for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")}
    if name not in found:
        raise ValueError(
            f"chat_template: got {name!r}, wanted a file, 'auto', or one of TRL's: {', '.join(sorted(found))}."
        )
    return found[name].read_text(encoding="utf-8")
