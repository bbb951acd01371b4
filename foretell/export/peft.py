"""A plain PEFT adapter: masks of the preset `uno`, which SGLang serves as their own drafter."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch

from foretell.checkpoint import save_adapter
from foretell.export import base
from foretell.export.base import Format, Job
from foretell.export.parity import CLOSE, texts


class Peft(Format):
    """See the module's text."""

    readers = "PEFT, SGLang (UNO)"

    def problems(self, job: Job) -> list[str]:
        """See Format."""
        found = base.unlike(job, "masked", mask_tokens="noise", sampler=False)
        uno = "no engine has a place for a sampler or learned masks: train the preset uno for engines."
        return [*found, uno] if found else []

    def write(self, job: Job, folder: Path) -> list[str]:
        """See Format."""
        settings, tensors = job.module.as_peft(job.target, job.module.state_dict())
        save_adapter(folder, settings, job.stored(tensors))
        words = ["python", "-m", "sglang.launch_server", "--model-path", job.model, "--speculative-algorithm", "UNO"]
        loaded = f"PeftModel.from_pretrained(model, {str(job.out)!r})"
        return [loaded, shlex.join([*words, "--uno-lora-path", str(job.out)])]

    @torch.no_grad()
    def check(self, job: Job, folder: Path) -> list[str]:
        """See Format: every row adapted, by PEFT and by the module."""
        from peft import PeftModel

        model, prompts = job.mtp.model, texts(job)
        with job.rounded.rows.adapters.on(job.target.layers, slice(None)):
            ours = [model(ids_1T).logits for ids_1T in prompts]
        adapted = PeftModel.from_pretrained(model, folder)
        try:
            theirs = [adapted(ids_1T).logits for ids_1T in prompts]
        finally:
            adapted.unload()
        far = max(float((one - other).abs().max() / one.std()) for one, other in zip(ours, theirs, strict=True))
        if not far < CLOSE:
            raise ValueError(f"check: PEFT's logits differ by {far:.1e} of their spread, wanted less than {CLOSE:.0e}.")
        return [f"logits with the adapter on, by PEFT: within {far:.0e} of their spread, {len(prompts)} prompts"]
