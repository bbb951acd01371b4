#!/usr/bin/env bash
# transformers 5.23.0 (5.24.0 too): generate(use_mtp=True) finds MTP layers by the released model's number.
# Expected: a DeepSeek-V3 checkpoint with num_hidden_layers = N and its MTP layer stored as layer N drafts with it.
# Seen: the layer is looked for by a fixed pattern with the number 61 in it. With 61 layers it works; with 2 the same
#   tensors are reported unexpected at loading and then "missing", with 62 the model "does not seem to register any".
#   (Alike for GLM-4.5 and its air variant: 92 and 46.)
# Why it matters: pruned, grown or freshly trained models of these architectures, and every tiny model of a test,
#   cannot use their own MTP layers, and a training run that loads them through transformers drops them.
# FINDINGS_PYTHON=/path/to/python uses that interpreter's packages and installs nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/env"
  python=$folder/env/bin/python
  "$python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
fi
export TMPDIR=$folder HF_HOME=$folder/huggingface HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error CUDA_VISIBLE_DEVICES=
"$python" -W ignore - 2>"$folder/stderr" <<'EOF' || { cat "$folder/stderr" >&2; exit 1; }
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM


def with_mtp(layers):
    """A tiny DeepSeek-V3 whose MTP layer is stored behind the last one, where released checkpoints have it."""
    torch.manual_seed(0)
    config = DeepseekV3Config(vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=16,
        num_hidden_layers=layers, first_k_dense_replace=layers, num_attention_heads=2, num_key_value_heads=2,
        n_routed_experts=2, n_shared_experts=1, num_experts_per_tok=1, n_group=1, topk_group=1, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_mtp_layers=1,
        max_position_embeddings=64, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    folder = tempfile.mkdtemp()
    DeepseekV3ForCausalLM(config).save_pretrained(folder)
    tensors = load_file(f"{folder}/model.safetensors")
    last, mtp = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    shared = [name for name in tensors if name.startswith(last) and ".mlp." not in name]
    tensors |= {name.replace(last, mtp): tensors[name].clone() for name in shared}
    tensors |= {f"{mtp}{name}.weight": torch.ones(16) for name in ("enorm", "hnorm", "shared_head.norm")}
    tensors |= {f"{mtp}eh_proj.weight": torch.randn(16, 32), f"{mtp}mlp.gate.weight": torch.randn(2, 16)}
    tensors[f"{mtp}mlp.gate.e_score_correction_bias"] = torch.zeros(2)
    for expert in ("experts.0", "experts.1", "shared_experts"):
        tensors |= {f"{mtp}mlp.{expert}.{part}_proj.weight": torch.randn(16, 16) for part in ("gate", "up", "down")}
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    return DeepseekV3ForCausalLM.from_pretrained(folder).eval()


said = {}
for layers in (61, 2, 62):
    try:
        out = with_mtp(layers).generate(torch.arange(1, 7)[None], max_new_tokens=8, do_sample=False, use_mtp=True)
        said[layers] = f"text {out[0, 6:].tolist()}"
    except (RuntimeError, ValueError) as error:
        said[layers] = f"{type(error).__name__}: {str(error).split(' from ')[0]}"
    print(f"{layers} layers, MTP as layer {layers}: {said[layers]}")
still = said[61].startswith("text") and "weights are missing" in said[2] and "any known MTP layer" in said[62]
if not still:
    sys.exit("changed: this is no longer what the comment in mtp_layers_by_released_number.sh says")
EOF
