#!/usr/bin/env bash
# transformers 5.23.0 (5.20 to 5.24 alike): with rope_type "dynamic" a text depends on the texts before and beside it.
# Expected: greedy generate is a function of the weights and the prompt.
# Seen: the rotary module keeps the base of the longest text so far, and gives it up only for texts shorter than the
#   original length: a prompt of 34 tokens (max_position_embeddings 32) is continued differently after a call with
#   60 tokens, and differently again beside one in a batch.
# Why it matters: evaluations depend on their order and batch size, servers answer the same request differently, and
#   texts cannot be compared between two ways of decoding unless the module's memory is reset.
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


def fresh():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4, max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        eos_token_id=None, bos_token_id=None, pad_token_id=0)
    return LlamaForCausalLM(config).eval()


def answer(model, ids, mask=None):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()


short = torch.randint(1, 96, (1, 34), generator=torch.Generator().manual_seed(1))
long = torch.randint(1, 96, (1, 60), generator=torch.Generator().manual_seed(2))
alone = answer(fresh(), short)
used = fresh()
answer(used, long)
behind = answer(used, short)
rows = torch.cat([torch.nn.functional.pad(short, (26, 0)), long])
beside = answer(fresh(), rows, (rows != 0).long())
print("a text of 34 tokens in a fresh model: ", alone)
print("the same after one of 60 tokens:       ", behind)
print("the same beside one of 60 in a batch:  ", beside)
still = alone != behind and alone != beside
if not still:
    sys.exit("changed: this is no longer what the comment in dynamic_ntk_remembers_longer_texts.sh says")
EOF
