#!/usr/bin/env bash
# transformers 5.23.0 (5.24.0 too): prompt lookup changes the text of greedy decoding under classifier-free guidance.
# Expected: assisted generation is lossless: greedy text with prompt_lookup_num_tokens is the text without, under
#   whatever processors generate was given, or the combination is refused.
# Seen: with guidance_scale the texts differ. The processor keeps a cache of its own that grows by one token a call, and
#   assisted generation also calls it for positions that are then thrown away.
# Why it matters: speed is measured on another text, and a reference made with assisted generation is no reference.
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
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
    pad_token_id=0)).eval()
equal = {}
for name, settings in (
    ("nothing else", {}),
    ("repetition_penalty 1.3", {"repetition_penalty": 1.3}),
    ("guidance_scale 2", {"guidance_scale": 2.0}),
):
    equal[name] = 0
    for seed in range(8):
        ids = torch.randint(1, 16, (1, 24), generator=torch.Generator().manual_seed(seed))
        call = {"max_new_tokens": 24, "do_sample": False, **settings}
        equal[name] += torch.equal(model.generate(ids, **call), model.generate(ids, **call, prompt_lookup_num_tokens=4))
    print(f"greedy, {name}: prompt lookup gives the same text in {equal[name]} of 8 prompts")
still = equal["nothing else"] == equal["repetition_penalty 1.3"] == 8 and equal["guidance_scale 2"] < 8
if not still:
    sys.exit("changed: this is no longer what the comment in prompt_lookup_under_guidance.sh says")
EOF
