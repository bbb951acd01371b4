#!/usr/bin/env bash
# PEFT 0.21.2 (transformers 5.23.0): merging a LoRA with ensure_weight_tying=True adds it twice to a tied weight.
# Expected: with LoRA on the tied embedding and output matrix, kept tied by ensure_weight_tying=True, merge_and_unload
#   gives a model with the adapted model's logits.
# Seen: each of the two layers adds the delta to what is one tensor, so the merged weight has it twice. (A warning says
#   that merging tied weights "can lead to complications"; this is the option that was made for them.)
# Why it matters: small models tie these matrices, and adapters on them are merged for export: what is served is not
#   what was trained and evaluated.
# FINDINGS_PYTHON=/path/to/python uses that interpreter's packages and installs nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/env"
  python=$folder/env/bin/python
  "$python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
fi
export TMPDIR=$folder HF_HOME=$folder/huggingface HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error CUDA_VISIBLE_DEVICES=
"$python" -W ignore - 2>"$folder/stderr" <<'EOF' || { cat "$folder/stderr" >&2; exit 1; }
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)).eval()
before = base.lm_head.weight.detach().clone()
settings = LoraConfig(r=4, lora_alpha=4, target_modules=["lm_head"], ensure_weight_tying=True, init_lora_weights=False)
model = get_peft_model(base, settings).eval()
ids = torch.arange(1, 9)[None]
with torch.no_grad():
    delta = base.lm_head.get_delta_weight("default").clone()
    adapted = model(ids).logits
    merged = model.merge_and_unload()
    after = merged(ids).logits
change = merged.lm_head.weight - before
times = ((change * delta).sum() / delta.pow(2).sum()).item()
tied = merged.lm_head.weight is merged.model.embed_tokens.weight
print(f"tied after the merge: {tied}; the weight changed by {times:.3f} times the adapter's delta")
print(f"logits: largest {adapted.abs().max():.2f}; the merge moved them by up to {(after - adapted).abs().max():.2f}")
still = tied and abs(times - 2) < 1e-3 and torch.allclose(change, 2 * delta, atol=1e-4)
if not still:
    sys.exit("changed: this is no longer what the comment in tied_lora_merged_twice.sh says")
EOF
