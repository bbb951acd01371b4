#!/usr/bin/env bash
# transformers 5.23.0 (5.24.0 too): DeepSeek-V3.2 silently attends densely in a registered function.
# Expected: a function registered with AttentionInterface that obeys attention_mask and takes **kwargs, as documented,
#   gives what "sdpa" gives.
# Seen: for "eager" and "sdpa" the model writes the indexer's choice into the mask; every other name gets a dense mask
#   and the choice as `indices=` in **kwargs. Logits differ from the position on where index_topk is exceeded. (Alike in
#   glm_moe_dsa and the others that have this indexer.)
# Why it matters: custom or instrumented attention (tree masks, paged caches, capturing) computes another model on long
#   texts, right on the short ones of a test.
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
from transformers import AttentionInterface, AttentionMaskInterface, DeepseekV32Config, DeepseekV32ForCausalLM
from transformers.masking_utils import sdpa_mask


def plain(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.transpose(1, 2), None


AttentionInterface.register("plain", plain)
AttentionMaskInterface.register("plain", sdpa_mask)


def logits(implementation, ids):
    torch.manual_seed(0)
    config = DeepseekV32Config(vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
        num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1, kv_lora_rank=16,
        q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, max_position_embeddings=128,
        index_topk=5, index_n_heads=16, index_head_dim=16, initializer_range=0.3, eos_token_id=None,
        bos_token_id=None, pad_token_id=0, attn_implementation=implementation)
    with torch.no_grad():
        return DeepseekV32ForCausalLM(config).eval()(ids).logits


ids = torch.randint(1, 64, (1, 16), generator=torch.Generator().manual_seed(1))
own = logits("sdpa", ids)
far = {name: (logits(name, ids) - own).abs().amax(-1)[0] for name in ("eager", "plain")}
for name, apart in far.items():
    print(f"{name} against sdpa, index_topk 5: first 5 tokens {apart[:5].max():.1e}, then {apart[5:].max():.1e}")
still = bool(far["eager"].max() < 1e-4 and far["plain"][:5].max() < 1e-4 and far["plain"][5:].min() > 1e-2)
if not still:
    sys.exit("changed: this is no longer what the comment in sparse_attention_left_to_the_function.sh says")
EOF
