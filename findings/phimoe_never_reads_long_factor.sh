#!/usr/bin/env bash
# transformers 5.23.0 (5.20 to 5.24 alike): PhiMoE with longrope never uses long_factor.
# Expected: beyond original_max_position_embeddings the frequencies are those of long_factor, as in Phi-3.
# Seen: PhimoeRotaryEmbedding asks for its frequencies without saying how long the text is, which means short_factor;
#   beyond the border only the scale (long_mscale) changes. Any long_factor gives the same angles.
# Why it matters: Phi-3.5-MoE and its descendants read long texts with angles that they were not trained with, and
#   engines that do use long_factor (or a model fine-tuned here and served there) say something else.
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

import torch
from transformers import Phi3Config, PhimoeConfig
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding


def angles(module, config, long_factor, **scales):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, **scales}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [long_factor] * 8}
    settings = config(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, rope_parameters=rope,
        max_position_embeddings=64, original_max_position_embeddings=16)
    return torch.stack(module(config=settings)(torch.zeros(1, 40, 32), torch.arange(40)[None]))


moved = {}
for module, config, scales in (
    (Phi3RotaryEmbedding, Phi3Config, {}),
    (PhimoeRotaryEmbedding, PhimoeConfig, {"short_mscale": 1.0, "long_mscale": 1.2}),
):
    difference = angles(module, config, 1.0, **scales) - angles(module, config, 4.0, **scales)
    moved[config.__name__] = difference.abs().max().item()
    print(f"{config.__name__}, 40 tokens, border at 16: long_factor 1 against 4 moves cos and sin by up to "
          f"{moved[config.__name__]:.3f}")
still = moved["PhimoeConfig"] == 0 and moved["Phi3Config"] > 1
if not still:
    sys.exit("changed: this is no longer what the comment in phimoe_never_reads_long_factor.sh says")
EOF
