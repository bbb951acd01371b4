"""Every causal LM that transformers has, built tiny: sizes are laid over whatever its config has of them."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# {class: one of its model types}: several may share a class, and of those the text model's is the smaller one
NAMES: dict[str, str] = {}
for _name, _class in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
    if _class not in NAMES or _name.endswith("_text"):
        NAMES[_class] = _name
_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "vocab_size_per_layer_input": 97,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "sliding_window": 7,  # texts here are longer
    "attention_chunk_size": 7,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "index_topk": 5,  # sparse attention that must choose
    "index_head_dim": 8,
    "index_n_heads": 16,  # of fewer heads all may say zero, and a choice among equals is anybody's
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 24,
    "encoder_hash_byte_group_vocab": 64,
    "pronunciation_vocab_size": 64,
    "shape_vocab_size": 64,
    "num_blocks": 1,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
# what the sizes above do not fit
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"], _LATENT),
    **dict.fromkeys(["glm_moe_dsa", "minicpm3", "youtu", "longcat_flash"], _LATENT),
    "bamba": _MAMBA,
    "granitemoehybrid": _MAMBA,
    "dots3_note_text": _LATENT,
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    # its last two layers share keys and values
    "gemma3n_text": {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        "activation_sparsity_pattern": [0.0] * 5,
        "laurel_rank": 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
    "whisper": {"decoder_attention_heads": 4},
    "plbart": {"decoder_attention_heads": 4},
    "xlnet": {"d_head": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba"]},
}
# which `build` cannot make, of the locked version, and how it fails
UNBUILT: dict[str, type[Exception]] = {
    "CohereCompassForCausalLM": KeyError,
    "DbrxForCausalLM": AttributeError,
    "Gemma3nForConditionalGeneration": ImportError,  # wants the timm library
    "Gemma4AssistantForCausalLM": StrictDataclassClassValidationError,
    "Gemma4UnifiedAssistantForCausalLM": ValueError,
    "MusicgenForCausalLM": AttributeError,
    "MusicgenMelodyForCausalLM": AttributeError,
    "ZambaForCausalLM": ValueError,
}


def _small(config: Any) -> dict[str, Any]:
    """The sizes that a config has, in its parts too."""
    have = {*config.to_dict(), *config.attribute_map}
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    inside = {name: _small(part) for name, part in parts.items() if part is not None}
    return {name: size for name, size in _SIZES.items() if name in have} | inside


def build(name: str) -> nn.Module:
    """A model of this type with random weights, spread wide, its norms and biases shaken."""
    sizes = _small(AutoConfig.for_model(name))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes | _OWN.get(name, {}))).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model
