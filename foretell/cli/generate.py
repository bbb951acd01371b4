"""foretell generate: decode prompts with a module, streaming to the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from foretell.cli.loading import ModelSettings, load_target
from foretell.config import parse


@dataclass(kw_only=True)
class GenerateSettings(ModelSettings):
    """Flags of `foretell generate`; names as in transformers' generate."""

    prompt: str = field(metadata={"help": "What to answer; - reads it from standard input."})
    chat: bool = field(
        default=True, metadata={"help": "Put the prompt into the tokenizer's chat template, if it has one."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer, in tokens."})
    num_draft_tokens: str = field(
        default="auto",
        metadata={"help": "Drafts a verification, 0 for none, or auto; of static_k and confadapt the span k."},
    )
    drafter: str | None = field(
        default=None,
        metadata={"help": "mtp, lookup, or mtp+lookup (the default with a module; mtp with static_k and confadapt)."},
    )
    draft_layout: str | None = field(
        default=None, metadata={"help": "Of mask tokens: linear, quadratic, auto or two_pass."}
    )
    policy: str = field(
        default="lossless", metadata={"help": "lossless, or a lossy one by name: typical, static_k, confadapt."}
    )
    confidence_threshold: float | None = field(
        default=None, metadata={"help": "Of confadapt: tokens less sure than this are not committed; 0.9 if not given."}
    )
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of greedy decoding."})
    temperature: float = field(default=1.0, metadata={"help": "For sampling."})
    top_k: int | None = field(default=None, metadata={"help": "For sampling."})
    top_p: float = field(default=1.0, metadata={"help": "For sampling."})
    min_p: float | None = field(default=None, metadata={"help": "For sampling."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "1 is none."})
    stop_strings: list[str] | None = field(default=None, metadata={"help": "Texts that end the answer."})
    seed: int | None = field(
        default=None, metadata={"help": "Of sampling: fixes the text, under auto too, however fast this machine is."}
    )
    stats: bool = field(
        default=False, metadata={"help": "Print tau and acceptance by depth as JSON to standard error."}
    )

    def problems(self) -> list[str]:
        """See config.check."""
        found = super().problems()
        if self.num_draft_tokens != "auto" and not self.num_draft_tokens.isdigit():
            found.append(f"num_draft_tokens: got {self.num_draft_tokens!r}, wanted a number or auto.")
        if self.max_new_tokens < 1:
            found.append(f"max_new_tokens: got {self.max_new_tokens}, wanted at least 1.")
        if not self.do_sample:
            asked = {"temperature": self.temperature != 1.0, "top_p": self.top_p != 1.0}
            asked |= {"top_k": self.top_k is not None, "min_p": self.min_p is not None}
            found += [
                f"{name}: got a value without --do-sample, which it is for." for name, given in asked.items() if given
            ]
        return found


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code."""
    settings = parse(GenerateSettings, argv, prog="foretell generate")
    import torch
    from transformers import TextStreamer

    from foretell.decoding.policies import LOSSY, SPANS, check_policy
    from foretell.mtp import load_with_module

    check_policy(settings.policy)
    model, tokenizer = load_target(settings.model, settings.dtype)
    mtp, trained = load_with_module(model, settings.module)
    usual = ("mtp" if settings.policy in SPANS else "mtp+lookup") if trained else "lookup"
    drafter = settings.drafter or usual
    if not trained and settings.policy in SPANS:
        raise ValueError(f"policy: got {settings.policy!r}, which needs a trained module: --module FOLDER.")
    if not trained and "mtp" in drafter:
        raise ValueError(f"drafter: got {drafter!r}, which needs a trained module: --module FOLDER.")
    text = sys.stdin.read() if settings.prompt == "-" else settings.prompt
    if settings.chat and getattr(tokenizer, "chat_template", None):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(text, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("prompt: got nothing, wanted at least one token.")
    sampling: dict[str, Any] = {}
    if settings.do_sample:
        sampling = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        sampling["min_p"] = settings.min_p
    generator = None if settings.seed is None else torch.Generator(model.device).manual_seed(settings.seed)
    out = mtp.generate(
        inputs["input_ids"].to(model.device),
        attention_mask=inputs["attention_mask"].to(model.device),
        max_new_tokens=settings.max_new_tokens,
        num_draft_tokens="auto" if settings.num_draft_tokens == "auto" else int(settings.num_draft_tokens),
        drafter=drafter,
        draft_layout=settings.draft_layout,
        policy=settings.policy,
        confidence_threshold=settings.confidence_threshold,
        do_sample=settings.do_sample,
        repetition_penalty=settings.repetition_penalty,
        stop_strings=settings.stop_strings,
        tokenizer=tokenizer,
        generator=generator,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        return_dict_in_generate=True,
        **sampling,
    )
    if settings.policy in LOSSY:
        print(f"[lossy: policy {settings.policy}; this is not the target's own distribution]", file=sys.stderr)
    if out.stats.reference != "the target":
        print(f"[the target here: {out.stats.reference}]", file=sys.stderr)
    if settings.stats:
        print(json.dumps(out.stats.summary(), indent=2), file=sys.stderr)
    return 0
