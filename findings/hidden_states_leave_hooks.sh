#!/usr/bin/env bash
# transformers 5.23.0, 5.24.0: the first call with output_hidden_states=True leaves hooks on the layers for good.
# Expected: asking a call for its states changes nothing in the model; there are no hooks behind it.
# Seen: forward hooks stay on every decoder layer and attention (utils/output_capturing.py installs them once).
#   They do nothing in other calls, but a copy, a pickle and every later call carry them.
# Why it matters: tools that look for hooks (exporters, quantizers, fused forwards, CUDA graphs, FSDP wrappers) take
#   such a model for one that its user has changed, and a forward costs two more Python calls a layer.
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
import copy
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2)).eval()
ids = torch.arange(2, 14)[None]


def hooks(model):
    return [name for name, part in model.named_modules() if part._forward_hooks]


with torch.no_grad():
    model(ids)
    before = hooks(model)
    model(ids, output_hidden_states=True)
    behind = hooks(model)
    model(ids)
    later = hooks(model)
print(f"modules with forward hooks: {len(before)} at first, {len(behind)} behind a call that asked for states, "
      f"{len(later)} behind the next that did not, {len(hooks(copy.deepcopy(model)))} in a copy")
print("on", ", ".join(later))
still = not before and "model.layers.0" in later and later == behind == hooks(copy.deepcopy(model))
if not still:
    sys.exit("changed: this is no longer what the comment in hidden_states_leave_hooks.sh says")
EOF
