"""EAGLE-3 for llama.cpp: the module in one file, model.gguf, beside the one that vLLM reads.

Keys, names and rules as llama.cpp b11549 reads them (src/models/eagle3.cpp): three states as layers are given them,
without a norm, never the last; queries and keys in its order of rotation; d2t holds the target's own ids. It adds the
target's embedding and tokenizer itself, so the file has none.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretell.export.base import Job

FILE = "model.gguf"
TARGETS = ("llama", "mistral")  # those that it reads as arch llama
NAMES = {"fc": "fc", "norm": "output_norm", "lm_head": "output", "midlayer.input_layernorm": "blk.0.attn_norm"}
NAMES |= {"midlayer.hidden_norm": "blk.0.attn_norm_2", "midlayer.post_attention_layernorm": "blk.0.ffn_norm"}
NAMES |= {f"midlayer.self_attn.{x}_proj": f"blk.0.attn_{x}" for x in "qkv"}
NAMES |= {"midlayer.self_attn.o_proj": "blk.0.attn_output"}
NAMES |= {f"midlayer.mlp.{x}_proj": f"blk.0.ffn_{x}" for x in ("gate", "up", "down")}
KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "head_dim": "attention.key_length",
}
KEYS |= {"num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv"}
KEYS |= {"max_position_embeddings": "context_length"} | {name: name for name in ("vocab_size", "target_hidden_size")}
FLOATS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
IDS, LAYERS = "eagle_aux_hidden_state_layer_ids", "target_layers"


def gguf_misfits(job: Job, said: dict[str, Any]) -> list[str]:
    """What the file has no words for, beside what makes a head another than EAGLE-3's. said: its config.json."""
    kind, rope = job.target.config.model_type, said["rope_parameters"].get("rope_type", "default")
    other = {f"a target of type {kind}": kind not in TARGETS, f"angles of type {rope}": rope != "default"}
    other |= {f"a layer with {said['hidden_act']}": said["hidden_act"] != "silu"}
    other |= {"the package gguf is missing (pip install gguf)": importlib.util.find_spec("gguf") is None}
    return [what for what, so in other.items() if so]


def write_gguf(path: Path, tensors: dict[str, Tensor], said: dict[str, Any]) -> None:
    """tensors: as eagle3's file holds them. said: its config.json."""
    import gguf

    writer, kinds = gguf.GGUFWriter(path, "eagle3"), gguf.GGMLQuantizationType
    for name, key in {**KEYS, **FLOATS}.items():
        (writer.add_uint32 if name in KEYS else writer.add_float32)(f"eagle3.{key}", said[name])
    for key in ("attention.value_length", "rope.dimension_count"):
        writer.add_uint32(f"eagle3.{key}", said["head_dim"])
    writer.add_block_count(1)
    writer.add_array(f"eagle3.{LAYERS}", said[IDS])
    writer.add_tokenizer_model("none")
    for name, tensor in tensors.items():
        if name == "d2t":
            writer.add_tensor(name, (tensor + torch.arange(len(tensor))).numpy())
            continue
        kind = kinds[DTYPES[torch.float32 if tensor.dim() == 1 else tensor.dtype]]  # vectors are read in fp32 only
        data = gguf.quants.quantize(turned(name, tensor.float(), said, True).numpy(), kind)
        writer.add_tensor(NAMES[name.removesuffix(".weight")] + ".weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, said: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by eagle3's names, and its config.json as far as the file's keys say it; the rest stays `said`."""
    import gguf

    reader, own = gguf.GGUFReader(path), {theirs: ours for ours, theirs in NAMES.items()}
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    told = {name: reader.fields[f"eagle3.{key}"].contents() for name, key in {**KEYS, **FLOATS, IDS: LAYERS}.items()}
    layer = {**said["transformer_layer_config"], **told, "rope_parameters": {"rope_theta": told["rope_theta"]}}
    tensors = {}
    for one in reader.tensors:
        if one.name == "d2t":
            ids = torch.tensor(one.data)
            tensors["d2t"] = ids - torch.arange(len(ids))
            continue
        name = own.get(stem := one.name.removesuffix(".weight"), stem) + ".weight"
        matrix = torch.tensor(gguf.quants.dequantize(one.data, one.tensor_type)).to(dtypes[one.tensor_type.name])
        tensors[name] = turned(name, matrix, told, False)
    return tensors, {**said, **told, "transformer_layer_config": layer}


def turned(name: str, matrix: Tensor, said: dict[str, Any], out: bool) -> Tensor:
    """Rows of queries and keys: each pair of a head that one angle turns side by side (out), or half a head apart."""
    heads = {"q_proj": said["num_attention_heads"], "k_proj": said["num_key_value_heads"]}.get(name.split(".")[-2])
    if heads is None:
        return matrix.contiguous()
    half = len(matrix) // heads // 2
    shape = (heads, 2, half, -1) if out else (heads, half, 2, -1)
    return matrix.reshape(shape).transpose(1, 2).reshape(matrix.shape).contiguous()
