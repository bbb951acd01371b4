#!/usr/bin/env bash
# bitsandbytes 0.50.2 (transformers 5.23.0, PEFT 0.21.2), CPU: one evaluation ends most of a QLoRA's gradient for good.
# Expected: evaluate, then train: a forward in eval mode without gradient changes nothing of what learns.
# Seen: Linear4bit's first forward in eval mode repacks its weights for a CPU kernel, in place. That kernel has no
#   backward: in training forwards behind it, adapters below the last layers get None as gradient. The loss is right,
#   nothing is said. (bnb_4bit_compute_dtype=bfloat16.)
# Why it matters: a Trainer evaluates between steps (or a callback generates): from then on only a few adapters learn.
# FINDINGS_PYTHON=/path/to/python uses that interpreter's packages and installs nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/env"
  python=$folder/env/bin/python
  "$python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 bitsandbytes==0.50.2
fi
export TMPDIR=$folder HF_HOME=$folder/huggingface HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error CUDA_VISIBLE_DEVICES=
"$python" -W ignore - 2>"$folder/stderr" <<'EOF' || { cat "$folder/stderr" >&2; exit 1; }
import os
import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

folder = tempfile.mkdtemp(dir=os.environ["TMPDIR"])
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2)).save_pretrained(folder)
four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
ids = torch.arange(2, 14)[None]


def without_gradient(evaluated):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits, device_map="cpu")
    model = get_peft_model(base, settings)
    if evaluated:
        with torch.no_grad():
            model.eval()(ids)
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    return sum(p.grad is None for p in learning), len(learning), loss.item()


fresh, evaluated = without_gradient(False), without_gradient(True)
for name, (none, count, loss) in (("fresh", fresh), ("behind one evaluation", evaluated)):
    print(f"{name}: {none} of {count} adapter matrices have no gradient (loss {loss:.3f})")
still = fresh[0] == 0 and evaluated[0] > 0 and abs(fresh[2] - evaluated[2]) < 0.05
if not still:
    sys.exit("changed: this is no longer what the comment in four_bits_lose_gradients.sh says")
EOF
