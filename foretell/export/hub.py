"""A folder that is ready to upload: foretell's own two files and a model card with what was measured."""

from __future__ import annotations

import itertools
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml

from foretell.checkpoint import CONFIG_FILE, save_module
from foretell.decoding.stats import GenerationStats
from foretell.export.base import Format, Job
from foretell.export.parity import texts
from foretell.models.refusals import differences
from foretell.mtp import MTPModel

NEW_TOKENS = 64


class Hub(Format):
    """See the module's text."""

    readers = "people, MTPModel.from_pretrained"

    def problems(self, job: Job) -> list[str]:
        """See Format."""
        none = "license: the model's own card names none; wanted one, e.g. --license apache-2.0."
        return [] if self._licence(job) else [none]

    def _licence(self, job: Job) -> str | None:
        """As asked for, else the model's own."""
        card = Path(job.model) / "README.md"
        if job.licence is not None or not card.is_file():
            return job.licence
        parts = card.read_text(encoding="utf-8").split("---")
        front = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else None
        return front.get("license") if isinstance(front, dict) else None

    def write(self, job: Job, folder: Path) -> list[str]:
        """See Format."""
        save_module(job.stored(job.module.state_dict()), job.config, job.target.fingerprint(), folder, job.mtp.notes)
        path = folder / CONFIG_FILE
        about = json.loads(path.read_text(encoding="utf-8"))
        about["provenance"] = (job.about or about).get("provenance") or about[
            "provenance"
        ]  # of the training, where it is known
        path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(self._card(job, about["provenance"]), encoding="utf-8")
        return [f"hf upload OWNER/NAME {job.out}", "look through README.md before: it is what others will read."]

    def _card(self, job: Job, origin: dict[str, Any]) -> str:
        name = Path(job.model).name if Path(job.model).is_dir() else job.model
        command, versions = origin.get("command") or [], origin.get("versions") or {}
        data = [word for flag, word in itertools.pairwise(command) if flag == "--data"]
        front: dict[str, Any] = {
            "library_name": "foretell",
            "license": self._licence(job),
            "pipeline_tag": "text-generation",
        }
        front |= {"tags": ["foretell", "multi-token-prediction", "speculative-decoding"]}
        front |= {"base_model": name} if "/" in name else {}
        front |= {"datasets": sets} if (sets := [word for word in data if not Path(word).suffix]) else {}
        prompts, rows = texts(job), []
        for drafts in sorted({1, job.config.depth}):
            stats = self._decoded(job, prompts, drafts)
            rows.append(f"| {drafts} | {stats.tau:.2f} | {', '.join(f'{share:.2f}' for share in stats.accept_at)} |")
        made = {"base model": name, "licence": front["license"], "data": ", ".join(data), "command": " ".join(command)}
        made |= {"versions": ", ".join(f"{package} {version}" for package, version in versions.items())}
        made |= {"time": origin.get("time_utc")} | (job.mtp.notes.get("training") or {})
        card = resources.files("foretell.export").joinpath("card.md").read_text(encoding="utf-8")
        return card.format(
            front=yaml.safe_dump(front, sort_keys=False),
            name=name,
            depth=job.config.depth,
            rows="\n".join(rows),
            tokens=NEW_TOKENS,
            prompts=len(prompts),
            kind="that come with foretell" if job.tokenizer is not None else "of random tokens",
            made="\n".join(f"- {what}: {value}" for what, value in made.items() if value not in (None, "")),
            config=yaml.safe_dump(job.config.to_dict(), sort_keys=False),
        )

    def _decoded(self, job: Job, prompts: list[torch.Tensor], drafts: int) -> GenerationStats:
        asked: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
        asked |= {"num_draft_tokens": drafts}
        outs: Any = [job.mtp.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), **asked) for ids_1T in prompts]
        return GenerationStats("lossless", True, [record for out in outs for record in out.stats.records])

    def check(self, job: Job, folder: Path) -> list[str]:
        """See Format: read back, to the bit."""
        read, written = MTPModel.from_pretrained(job.mtp.model, folder).module, job.stored(job.module.state_dict())
        got = read.to(next(t.dtype for t in written.values() if t.is_floating_point())).state_dict()
        found = differences(got, written)
        found += [name for name, tensor in written.items() if not found and not torch.equal(got[name].cpu(), tensor)]
        if found:
            raise ValueError(f"check: read back, the module is another: {', '.join(found)}.")
        return [f"{len(written)} tensors read back, equal to the bit"]
