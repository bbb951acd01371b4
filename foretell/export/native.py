"""A checkpoint that carries the module itself, as its family publishes it: the reverse of MTPModel.from_native.

Engines (vLLM's and SGLang's own MTP classes) and transformers (use_mtp) read it from there. The target's tensors are
copied as they are; MTP tensors that lay there before go.
"""

# T positions, K depths, D hidden width, V vocabulary.

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.modeling_layers import MtpModel

from foretell.export import base
from foretell.export.base import Format, Job
from foretell.export.parity import distances, own_logits, texts, verdict
from foretell.methods.sequential import SequentialModule
from foretell.mtp import MTPModel
from foretell.native import COUNT_KEYS, LAYOUTS, CheckpointFiles, Layout, places_of

INDEX, ADDED = "model.safetensors.index.json", "mtp.safetensors"
ONE, FIRST = "model.safetensors", "model-00001-of-00001.safetensors"  # a lone file hides every other from its readers
# quant_method: where its settings list what is not quantised
IGNORED = {"compressed-tensors": "ignore", "bitsandbytes": "llm_int8_skip_modules"}
IGNORED |= dict.fromkeys(("fp8", "awq"), "modules_to_not_convert")


class Native(Format):
    """See the module's text."""

    readers = "the engines' own MTP of DeepSeek-V3, GLM-4-MoE and MiMo, transformers (use_mtp)"

    def problems(self, job: Job) -> list[str]:
        """See Format."""
        kind, layout = job.target.config.model_type, self._layout(job)
        if layout is None or not isinstance(job.module, SequentialModule):
            kinds = ", ".join(kind for row in LAYOUTS.values() for kind in row.model_types)
            no = [] if layout else [f"target: got {kind!r}, wanted one of {kinds}: no other family publishes MTP."]
            return base.unlike(job, "sequential") + no
        wanted = {"block": "mtp", "hidden_source": layout.recipe["hidden_source"], "chain_raw": False}
        found = base.unlike(job, "sequential", hidden_layers=None, **wanted)
        try:
            method = (CheckpointFiles(Path(job.model)).config.get("quantization_config") or {}).get("quant_method")
        except (FileNotFoundError, ValueError) as error:
            return [*found, f"model: {error}"]
        if method is not None and method not in IGNORED:
            found.append(f"quantization_config: got {method!r}, wanted one of {', '.join(IGNORED)}.")
        return found

    def _layout(self, job: Job) -> Layout | None:
        return next((row for row in LAYOUTS.values() if job.target.config.model_type in row.model_types), None)

    def tensors(self, job: Job) -> dict[str, Tensor]:
        """By their names in the checkpoint."""
        layout, out = self._layout(job), {}
        first = len(job.target.layers) if layout.after_layers else 0
        for n, block in enumerate(job.module.blocks, start=first):
            out |= dict(places_of(block, layout, n))
            fusion = layout.parts["eh_proj."].format(n=n) + "weight"
            out[fusion] = base.fused(job.config.fusion_order, out[fusion], layout.recipe["fusion_order"])
            # engines read the module's own copies
            out |= {name.format(n=n): getattr(job.target, at).weight for name, at in layout.shared.items()}
        return job.stored(out)

    def write(self, job: Job, folder: Path) -> list[str]:
        """See Format."""
        source, layout, L, home, total = Path(job.model), self._layout(job), len(job.target.layers), {}, 0
        files, added = CheckpointFiles(source), self.tensors(job)
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name != INDEX and path.suffix not in (".safetensors", ".bin", ".pt", ".gguf"):
                shutil.copyfile(path, folder / path.name)
        for file in sorted(set(files.home.values())):
            new = FIRST if file == ONE else file
            with safe_open(source / file, framework="pt") as opened:
                names = [name for name in opened.keys() if name in files.home]  # noqa: SIM118 (not a dict)
                kept = [name for name in names if not _of_mtp(layout, name, L)]
                if len(kept) == len(names):
                    shutil.copyfile(source / file, folder / new)
                elif kept:
                    save_file({n: opened.get_tensor(n) for n in kept}, folder / new, metadata={"format": "pt"})
                total += sum(opened.get_tensor(name).nbytes for name in kept)
            home |= dict.fromkeys(kept, new)
        save_file(added, folder / ADDED, metadata={"format": "pt"})
        home |= dict.fromkeys(added, ADDED)
        total += sum(tensor.nbytes for tensor in added.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(home.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        config = json.dumps(self._config(job, files.config, added), indent=2) + "\n"
        (folder / base.CONFIG).write_text(config, encoding="utf-8")
        spec = json.dumps({"method": "mtp", "num_speculative_tokens": job.config.depth})
        return [shlex.join(["vllm", "serve", str(job.out), "--speculative-config", spec]), *base.whole_vocabulary(job)]

    def _config(self, job: Job, config: dict[str, Any], added: dict[str, Tensor]) -> dict[str, Any]:
        stated, quantised = config.get("text_config", config), config.get("quantization_config")
        known = [key for key in COUNT_KEYS if key in stated] or COUNT_KEYS[:1]
        stated |= dict.fromkeys(known, len(job.module.blocks))
        if quantised:
            key = IGNORED[quantised["quant_method"]]
            linears = sorted(name for name, t in added.items() if name.endswith(".weight") and t.dim() == 2)
            quantised[key] = [*(quantised.get(key) or []), *(name.removesuffix(".weight") for name in linears)]
        return config

    def check(self, job: Job, folder: Path) -> list[str]:
        """See Format: tensors to the bit by our own reader, logits by transformers'."""
        wanted = self.tensors(job)
        read = self.tensors(replace(job, mtp=MTPModel.from_native(job.mtp.model, folder), dtype=None))
        differ = [n for n, t in wanted.items() if not torch.equal(read[n].to(t.dtype), t)]
        if differ or wanted.keys() != read.keys():
            raise ValueError(f"check: read back, tensors differ: {', '.join(differ[:8])}.")
        said, who = [f"{len(wanted)} tensors read back, equal to the bit"], f"transformers {transformers.__version__}"
        if not getattr(type(job.mtp.model), "_keys_to_ignore_on_load_unexpected", None):
            return [*said, f"logits: not run, {who} has no MTP for this family"]
        return said + verdict(self._by_transformers(job, folder), who)

    @torch.no_grad()
    def _by_transformers(self, job: Job, folder: Path) -> Tensor:
        model = type(job.mtp.model).from_pretrained(folder, dtype=torch.float32).eval().to(job.target.device)
        theirs, far_K = MtpModel.from_pretrained(model).eval(), torch.zeros(len(job.module.blocks))
        for ids_1T in texts(job):
            ours_TKV = own_logits(job.rounded, job.target, ids_1T)
            hidden, T = model.get_decoder()(ids_1T).last_hidden_state, ids_1T.shape[1]
            for k in range(1, len(far_K) + 1):
                places = torch.arange(1, T - k + 1, device=ids_1T.device)[None]
                hidden = theirs.forward_layer(k - 1, hidden[:, : T - k], places, None, input_ids=ids_1T[:, k:])
                far = distances(ours_TKV[: T - k, k - 1 : k], theirs._project_to_logits(hidden)[0][:, None])
                far_K[k - 1] = max(far_K[k - 1], far[0].cpu())
        return far_K


def _of_mtp(layout: Layout, name: str, L: int) -> bool:
    """Whether a tensor of the checkpoint belongs to MTP modules."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return bool(found and int(found[1]) >= L) if layout.after_layers else name.startswith("model.mtp_layers.")
