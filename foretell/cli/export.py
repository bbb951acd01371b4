"""foretell export: write a trained module as engines and people read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from foretell.cli.loading import load_target
from foretell.config import parse

TO = """mimo (vLLM, SGLang), eagle3 (vLLM; some SGLang, llama.cpp), medusa (vLLM up to 0.32, TensorRT-LLM),
native (a checkpoint of DeepSeek-V3, GLM-4-MoE, MiMo), peft (SGLang), hub (a folder to upload, with a card)"""


@dataclass(kw_only=True)
class ExportSettings:
    """Flags of `foretell export`."""

    module: str = field(metadata={"help": "Folder of the module.", "positional": True})
    model: str = field(metadata={"help": "Its target: a transformers folder or hub name."})
    to: str = field(metadata={"help": TO})
    out: str = field(metadata={"help": "A new folder."})
    dtype: str | None = field(default=None, metadata={"help": "bf16 or fp32; by default the module's own."})
    license: str | None = field(default=None, metadata={"help": "For hub, where the model's own card names none."})
    check: bool = field(default=False, metadata={"help": "Read the files back by their reader's code; compare logits."})


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code."""
    settings = parse(ExportSettings, argv, prog="foretell export")
    from foretell.export import check_request, export_module, load_for_export

    check_request(settings.to, settings.out, settings.dtype)
    model, tokenizer = load_target(settings.model, "float32" if settings.check else "auto")
    from foretell.checkpoint import read_config

    told: dict[str, Any] = {"about": read_config(settings.module), "licence": settings.license}
    given = {"dtype": settings.dtype, "check": settings.check, "model": settings.model, "tokenizer": tokenizer}
    mtp = load_for_export(model.eval(), settings.module)
    print(*export_module(mtp, settings.to, settings.out, **given, **told), sep="\n")
    return 0
