#!/usr/bin/env bash
# PEFT 0.21.2 (transformers 5.23.0): after an exception inside generate(adapter_names=...) the model keeps its hooks.
# Expected: adapter_names are an argument of one call; a plain call behind it says what it said before.
# Seen: the hooks that carry them are taken off behind a call that ends well only (no try/finally). After a stopping
#   criterion that raises, every LoRA layer still has one: the plain call of the same prompts says another text, the
#   adapters of the failed call's rows, and one of a single prompt raises.
# Why it matters: a server that catches the errors of a request answers the next ones with the wrong adapters.
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
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, eos_token_id=None, initializer_range=0.5))
settings = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
model = get_peft_model(base, settings).eval()
model.add_adapter("other", settings)
ids, mask = torch.arange(2, 14).view(2, 6), torch.ones(2, 6, dtype=torch.long)


def say(rows=ids, **how):
    with torch.no_grad():
        return model.generate(input_ids=rows, attention_mask=mask[: len(rows)], max_new_tokens=12, do_sample=False,
            pad_token_id=0, **how).tolist()


def interrupted(ids, scores, **kwargs):
    raise TimeoutError("the request was given up")


def hooks():
    return sum(len(part._forward_pre_hooks) for part in model.modules())


before, none = say(), hooks()
well = say(adapter_names=["default", "other"]) and hooks()
try:
    say(adapter_names=["default", "other"], stopping_criteria=[interrupted])
except TimeoutError:
    pass
left, after = hooks(), say()
try:
    alone = str(say(ids[:1]) == before[:1])
except Exception as error:
    alone = f"{type(error).__name__}: {error}"
print(f"hooks: {none} at first, {well} behind a call that ended well, {left} behind one that did not")
print(f"the plain call says what it said: {after == before}; a single prompt: {alone}")
still = none == well == 0 and left > 0 and after != before and "Error" in alone
if not still:
    sys.exit("changed: this is no longer what the comment in adapter_names_after_an_error.sh says")
EOF
