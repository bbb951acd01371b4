"""EAGLE-3: the layout that most engines share, for modules of block "eagle3".

Names, shapes and rules as vLLM 0.32.0 reads them (models/llama_eagle3.py, models/qwen3_eagle3.py,
transformers_utils/configs/speculators). d2t holds offsets; it is not written where no token is left out, which vLLM
refuses. A file without norm, q_proj, o_proj or fc loads in vLLM without a word.

SGLang 0.5 (models/llama_eagle3.py, not run) takes the same file and llama.cpp (gguf.py) one of its own, where the
head is as EAGLE-3 was published: three states, without a norm of each before fc, none of them the last. SGLang counts a
layer's number from its output, one less than vLLM, and reads eagle_config; vLLM reads what stands beside it first.
"""

# B sequences, T positions, D hidden width, V vocabulary, M draft vocabulary.

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from foretell.export import base
from foretell.export.base import CONFIG, Job
from foretell.export.gguf import FILE, gguf_misfits, read_gguf, write_gguf
from foretell.export.parity import Draft, Reader, same_logits, texts
from foretell.models.target import Target, TargetRows
from foretell.ops.sampling import over_vocabulary

# model types of Llama's or Qwen3's layer whose states vLLM 0.32.0 hands over
TARGETS = ("llama", "qwen2", "mistral", "ministral3", "qwen3")
PARTS = {"enorm.": "midlayer.input_layernorm.", "block.input_layernorm.": "midlayer.hidden_norm."}
PARTS |= {"block.self_attn.inner.": "midlayer.self_attn.", "block.": "midlayer.", "norm.": "norm."}


class Eagle3Layer(Reader):
    """The file's tensors in transformers' Llama (or Qwen3) layer with wider queries, keys and values."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        named, qwen3 = config["transformer_layer_config"], config["model_type"] == "qwen3"
        own = (Qwen3Config if qwen3 else LlamaConfig).from_dict({**named, "attn_implementation": "sdpa"})
        D, eps, self.ids = own.hidden_size, own.rms_norm_eps, config["eagle_aux_hidden_state_layer_ids"]
        self.midlayer = layer = (Qwen3DecoderLayer if qwen3 else LlamaDecoderLayer)(own, 0)
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, nn.Linear(2 * D, narrow.out_features, narrow.bias is not None))
        layer.hidden_norm, self.norm = LlamaRMSNorm(D, eps), LlamaRMSNorm(D, eps)
        self.lm_head = nn.Linear(D, config["draft_vocab_size"], bias=False)
        self.fc = nn.Linear(len(self.ids) * D, D, bias=False)
        self.fc_norm = nn.ModuleList(LlamaRMSNorm(D, eps) for _ in self.ids) if config["fc_norm"] else None
        reduced = config["draft_vocab_size"] < own.vocab_size
        self.register_buffer("d2t", torch.zeros(config["draft_vocab_size"], dtype=torch.long) if reduced else None)
        self.rotary = LlamaRotaryEmbedding(own)

    def entry(self, rows: TargetRows) -> Tensor:
        """See Reader."""
        states = (rows.pre_norm_BRD if rows.layers_BRX is None else rows.layers_BRX).float()
        if self.fc_norm is not None:
            parts = zip(self.fc_norm, states.chunk(len(self.ids), dim=-1), strict=True)
            states = torch.cat([norm(part) for norm, part in parts], dim=-1)
        return self.fc(states)

    def said(self, target: Target, ids_1T: Tensor, anchors: Sequence[int], K: int) -> Tensor:
        """See Reader; of the states that the file names."""
        own = target.hidden_layers
        target.hidden_layers = () if self.ids == [len(target.layers)] else tuple(self.ids)
        try:
            return super().said(target, ids_1T, anchors, K)
        finally:
            target.hidden_layers = own

    def step(
        self, embedding_BTD: Tensor, hidden_BTD: Tensor, positions_BT: Tensor, cache: Any
    ) -> tuple[Tensor, Tensor]:
        """See Reader."""
        layer = self.midlayer
        both = torch.cat([layer.input_layernorm(embedding_BTD), layer.hidden_norm(hidden_BTD)], dim=-1)
        places = self.rotary(hidden_BTD, positions_BT)
        read, _ = layer.self_attn(both, position_embeddings=places, attention_mask=None, past_key_values=cache)
        hidden_BTD = hidden_BTD + read
        hidden_BTD = hidden_BTD + layer.mlp(layer.post_attention_layernorm(hidden_BTD))
        return self.norm(hidden_BTD), hidden_BTD

    def logits(self, state: Tensor, target: Target) -> Tensor:
        """See Reader."""
        ids = None if self.d2t is None else torch.arange(len(self.d2t), device=state.device) + self.d2t
        return over_vocabulary(self.lm_head(state), ids, target.vocab_size)


class Eagle3(Draft):
    """See the module's text."""

    readers = "vLLM (method eagle3), speculators, and as EAGLE-3 was published SGLang, llama.cpp"
    reader = Eagle3Layer

    def misfits(self, job: Job) -> list[str]:
        """See Draft."""
        found = base.unlike(job, "sequential", block="eagle3")
        if job.target.config.model_type not in TARGETS:
            found.append(f"target: got {job.target.config.model_type!r}, wanted one of {', '.join(TARGETS)}.")
        return found + base.layer_problems(job)

    def tensors(self, job: Job) -> dict[str, Tensor]:
        """See Draft."""
        module, target = job.module, job.target
        out = base.renamed(module.blocks[0], PARTS)
        if "midlayer.self_attn.q_proj.bias" in out:  # vLLM's layer then has one there too
            out.setdefault("midlayer.self_attn.o_proj.bias", torch.zeros_like(out["norm.weight"]))
        if job.config.hidden_layers:
            out["fc.weight"] = module.entry.fc.weight
            out |= {f"fc_norm.{i}.weight": norm.weight for i, norm in enumerate(module.entry.norms)}
        else:
            out["fc.weight"] = torch.eye(target.hidden_size)
        out |= self.borrowed(job)
        dtype, ids = job.dtype or out["norm.weight"].dtype, job.kept_ids
        out = {name: tensor.to(dtype) for name, tensor in out.items()}
        out |= {} if ids is None else {"d2t": ids - torch.arange(len(ids), device=ids.device)}
        return job.stored(out)

    def borrowed(self, job: Job) -> dict[str, Tensor]:
        """See Draft. Where the last state is read after its norm, that norm is written as the one before fc."""
        normed = not job.config.hidden_layers and job.config.hidden_source == "post_norm"
        norm = {"fc_norm.0.weight": job.target.norm.weight} if normed else {}
        return norm | {"lm_head.weight": job.module.target_head(job.target, detach=True)[0]}

    def settings(self, job: Job) -> dict[str, Any]:
        """See Draft: Llama's keys, EAGLE-3's, and speculators', so that `vllm serve OUT` works alone."""
        target, module, config = job.target, job.module, job.config
        attention, ids = module.blocks[0].block.self_attn.inner, config.hidden_layers or [len(target.layers)]
        kind = "qwen3" if "q_norm" in attention._modules else "llama"
        layer = {"model_type": kind, "num_hidden_layers": 1, "mlp_bias": False, "tie_word_embeddings": False}
        layer |= base.layer_settings(job) | {"attention_bias": attention.q_proj.bias is not None}
        layer["head_dim"] = attention.q_proj.out_features // target.config.num_attention_heads
        layer["num_aux_hidden_states"] = len(ids)
        size = target.vocab_size if job.kept_ids is None else len(job.kept_ids)
        said: dict[str, Any] = dict.fromkeys(("norm_before_residual", "norm_before_fc", "norm_output"), False)
        said |= {"draft_vocab_size": size, "target_hidden_size": target.hidden_size}
        said["eagle_aux_hidden_state_layer_ids"] = ids
        said["fc_norm"] = config.fc_norm if config.hidden_layers else config.hidden_source == "post_norm"
        said["architectures"] = ["Eagle3Qwen3ForCausalLM" if kind == "qwen3" else "LlamaForCausalLMEagle3"]
        others = ids if unpublished({**layer, **said}) else [i - 1 for i in ids]  # SGLang's numbers
        layer["eagle_config"] = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": others}
        verifier = {"name_or_path": job.model, "architectures": [type(target.model).__name__]}
        proposals = [{"proposal_type": "greedy", "speculative_tokens": config.depth}]
        speculators = {"algorithm": "eagle3", "default_proposal_method": "greedy", "proposal_methods": proposals}
        said |= {"speculators_model_type": "eagle3", "speculators_config": {**speculators, "verifier": verifier}}
        return {**layer, **said, "transformer_layer_config": layer}

    def write(self, job: Job, folder: Path) -> list[str]:
        """See Format."""
        lines, said = super().write(job, folder), self.settings(job)
        if not unpublished(said) and not gguf_misfits(job, said):
            write_gguf(folder / FILE, load_file(folder / self.weights), said)
        return lines

    def check(self, job: Job, folder: Path) -> list[str]:
        """See Format."""
        found = super().check(job, folder)
        if (folder / FILE).exists():
            tensors, said = read_gguf(folder / FILE, json.loads((folder / CONFIG).read_text(encoding="utf-8")))
            same = same_logits(job, self._filled(job, self.reader(said), tensors), texts(job))
            found += [f"{FILE}: {line}" for line in same]
        return found

    def lines(self, job: Job) -> list[str]:
        """See Draft."""
        alone = f"{shlex.join(['vllm', 'serve', str(job.out)])}  # the same: its config names {job.model}"
        said = self.settings(job)
        if other := unpublished(said):
            only = f"not for SGLang and llama.cpp, which read EAGLE-3 as published: {', '.join(other)}."
            return [*base.served(job, "eagle3"), alone, only]
        words = ["llama-server", "-m", "TARGET.gguf", "--spec-type", "draft-eagle3", "--spec-draft-model"]
        words += [str(job.out / FILE), "--spec-draft-n-max", str(job.config.depth)]
        llama = f"{shlex.join(words)}  # TARGET.gguf: {job.model}, as llama.cpp converts it"
        if found := gguf_misfits(job, said):
            llama = f"not for llama.cpp, no {FILE} was written: {', '.join(found)}."
        return [*base.served(job, "eagle3", sglang=True), alone, llama]


def unpublished(said: dict[str, Any]) -> list[str]:
    """What makes a head another than EAGLE-3's, from its config.json."""
    other = {"a norm of each state (fc_norm)": said["fc_norm"], "biases": said["attention_bias"]}
    other |= {f"{said['num_aux_hidden_states']} hidden_layers, not three": said["num_aux_hidden_states"] != 3}
    return [what for what, so in other.items() if so] + (["norms of queries"] if said["model_type"] == "qwen3" else [])
