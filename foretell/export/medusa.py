"""Medusa's layout: parallel heads for vLLM up to 0.32 (0.33 removed them) and TensorRT-LLM.

Names as Medusa's own files have them: {head}.{layer}.linear, {head}.{layers} for a head's output matrix. vLLM 0.32.0
(models/medusa.py, configs/medusa.py) and TensorRT-LLM 1.0 (models/medusa/weight.py) read these. vLLM loads a file that
lacks any of them without a word, and drafts token 0.
"""

# T positions, A anchors, K heads, D hidden width, V vocabulary.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foretell.export import base
from foretell.export.base import Job
from foretell.export.parity import Draft, Reader
from foretell.methods.heads import HeadsModule
from foretell.models.target import Target
from foretell.ops.sampling import over_vocabulary


class MedusaHeads(Reader):
    """The file's tensors in Medusa's formula: x + SiLU(linear(x)), layer by layer, then an output matrix."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        D, V, self.layers = config["hidden_size"], config["vocab_size"], config["medusa_num_layers"]
        M, self.shared = config.get("truncated_vocab_size", V), config["original_lm_head"]
        for h in range(config["medusa_num_heads"]):
            layers: list[Any] = [nn.ModuleDict({"linear": nn.Linear(D, D)}) for _ in range(self.layers)]
            layers += [nn.Linear(D, M, bias=False)] if h == 0 or not self.shared else []
            self.add_module(str(h), nn.ModuleList(layers))
        self.register_buffer("token_map", torch.zeros(M, dtype=torch.long) if M != V else None)

    @torch.no_grad()
    def said(self, target: Target, ids_1T: Tensor, anchors: Sequence[int], K: int) -> Tensor:
        """See Reader."""
        rows = target.forward_text(ids_1T, torch.arange(ids_1T.shape[1], device=ids_1T.device)[None])
        out = []
        for h in range(K):
            x_AD = rows.post_norm_BRD[0, list(anchors)].float()
            for i in range(self.layers):
                x_AD = x_AD + F.silu(self.get_submodule(f"{h}.{i}.linear")(x_AD))
            matrix = self.get_submodule(f"{0 if self.shared else h}.{self.layers}")
            out.append(over_vocabulary(matrix(x_AD), self.token_map, target.vocab_size))
        return torch.stack(out, dim=1)


class Medusa(Draft):
    """See the module's text."""

    readers = "vLLM up to 0.32, TensorRT-LLM"
    reader, weights = MedusaHeads, "medusa_lm_head.safetensors"

    def misfits(self, job: Job) -> list[str]:
        """See Draft."""
        found = base.unlike(job, "heads", head_type="medusa", hidden_source="post_norm")
        if isinstance(job.module, HeadsModule) and job.kept_ids is not None and not job.module.shared:
            found.append("draft_vocab_size: output matrices of the heads' own have one row for each of all tokens.")
        return found

    def tensors(self, job: Job) -> dict[str, Tensor]:
        """See Draft."""
        out, L, module = {}, job.config.num_layers, job.module
        for h, head in enumerate(module.heads):
            for i, residual in enumerate(head.body.parts):
                out |= {f"{h}.{i}.linear.{name}": tensor for name, tensor in residual.part[0].named_parameters()}
            out |= {} if module.shared else {f"{h}.{L}.weight": head.output.weight}
        dtype, ids = job.dtype or out["0.0.linear.weight"].dtype, job.kept_ids
        out |= {name: tensor.to(dtype) for name, tensor in self.borrowed(job).items()}
        return job.stored(out | ({} if ids is None else {"token_map": ids}))

    def borrowed(self, job: Job) -> dict[str, Tensor]:
        """See Draft."""
        name, shared = f"0.{job.config.num_layers}.weight", job.module.shared
        return {name: job.module.target_head(job.target, detach=True)[0]} if shared else {}

    def settings(self, job: Job) -> dict[str, Any]:
        """See Draft."""
        said: dict[str, Any] = {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "base_model_name_or_path": job.model,
        }
        said |= {"hidden_size": job.target.hidden_size, "vocab_size": job.target.vocab_size, "medusa_fc_bias": True}
        said |= {"medusa_num_heads": job.config.depth, "medusa_num_layers": job.config.num_layers}
        said |= {"original_lm_head": job.module.shared}
        return said if job.kept_ids is None else said | {"truncated_vocab_size": len(job.kept_ids)}

    def lines(self, job: Job) -> list[str]:
        """See Draft."""
        said = [*base.served(job, "medusa"), "vLLM 0.33 and later have no Medusa any more."]
        alone = "not for TensorRT-LLM: it wants an output matrix for each head, these share the target's."
        return [*said, alone] if job.module.shared else said
