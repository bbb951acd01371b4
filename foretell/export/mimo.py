"""MiMo's layout as a folder of its own: what vLLM (method mtp) and SGLang load beside an untouched target.

Names, shapes and rules as vLLM 0.32.0 reads them (models/mimo_mtp.py, models/qwen2.py) and SGLang 0.5.23
(models/mimo_mtp.py): one layer for every depth, [hidden | embedding], no embedding at position 0, the target's states
after its final norm, embedding and head of the target. Linears that are not in the file stay uninitialised in vLLM
without a word, so biases are written as zeros.
"""

# B sequences, T positions, D hidden width.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

from foretell.export import base
from foretell.export.base import Job
from foretell.export.parity import Draft, Reader
from foretell.models.slot_cache import cache_name

PREFIX = "model.mtp_layers.0."
PARTS = {"enorm.": "token_layernorm.", "hnorm.": "hidden_layernorm.", "eh_proj.": "input_proj."}
PARTS = {part: PREFIX + name for part, name in (PARTS | {"norm.": "final_layernorm.", "block.": ""}).items()}


class MimoLayer(Reader):
    """The file's tensors in transformers' Qwen2 layer, as the engines hold them in theirs."""

    zero_first = True

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        own = Qwen2Config.from_dict({**config, "attn_implementation": "sdpa"})
        D, eps = own.hidden_size, own.rms_norm_eps
        self.model = nn.Module()
        layer = Qwen2DecoderLayer(own, 0)
        layer.token_layernorm, layer.hidden_layernorm = Qwen2RMSNorm(D, eps), Qwen2RMSNorm(D, eps)
        layer.input_proj, layer.final_layernorm = nn.Linear(2 * D, D, bias=False), Qwen2RMSNorm(D, eps)
        self.model.mtp_layers = nn.ModuleList([layer])
        self.rotary = Qwen2RotaryEmbedding(own)

    def step(
        self, embedding_BTD: Tensor, hidden_BTD: Tensor, positions_BT: Tensor, cache: Any
    ) -> tuple[Tensor, Tensor]:
        """See Reader."""
        layer, named = self.model.mtp_layers[0], {cache_name(Qwen2DecoderLayer.forward): cache}
        both = torch.cat([layer.hidden_layernorm(hidden_BTD), layer.token_layernorm(embedding_BTD)], dim=-1)
        places = self.rotary(hidden_BTD, positions_BT)
        out = layer(layer.input_proj(both), attention_mask=None, position_embeddings=places, use_cache=True, **named)
        normed = layer.final_layernorm(out)
        return normed, normed


class Mimo(Draft):
    """See the module's text."""

    readers = "vLLM (method mtp), SGLang"
    reader = MimoLayer

    def misfits(self, job: Job) -> list[str]:
        """See Draft."""
        wanted = {"block": "mtp", "hidden_source": "post_norm", "chain_raw": False, "hidden_layers": None}
        return [*base.unlike(job, "sequential", **wanted), *base.layer_problems(job)]

    def tensors(self, job: Job) -> dict[str, Tensor]:
        """See Draft."""
        out, fusion = base.renamed(job.module.blocks[0], PARTS), f"{PREFIX}input_proj.weight"
        out[fusion] = base.fused(job.config.fusion_order, out[fusion], "hidden_embedding")
        for weight in (f"{PREFIX}self_attn.{letter}_proj.weight" for letter in "qkv"):
            if weight in out:
                out.setdefault(weight.replace(".weight", ".bias"), torch.zeros_like(out[weight][:, 0]))
        return job.stored(out)

    def settings(self, job: Job) -> dict[str, Any]:
        """See Draft."""
        said = {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "num_nextn_predict_layers": 1}
        tied = bool(job.target.config.tie_word_embeddings)
        said |= {"num_hidden_layers": len(job.target.layers), "tie_word_embeddings": tied}
        return said | base.layer_settings(job)

    def lines(self, job: Job) -> list[str]:
        """See Draft."""
        served = base.served(job, "mtp", ["--hf-overrides", '{"num_nextn_predict_layers": 1}'], sglang=True)
        return [*served, *base.whole_vocabulary(job)]
