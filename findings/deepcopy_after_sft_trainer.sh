#!/usr/bin/env bash
# TRL 1.16.0 (transformers 5.23.0): a deep copy of a model that SFTTrainer has seen still computes with the original.
# Expected: copy.deepcopy(trainer.model) is a model of its own.
# Seen: SFTTrainer sets a forward on the model whose closure holds the original's forward, and deepcopy does not copy
#   closures. The copy's parameters can all be zeroed: its logits are the original's.
# Why it matters: averages of weights (torch's AveragedModel, EMA callbacks), snapshots and reference models copied from
#   a trainer's model answer with the live weights: an "EMA evaluation" silently evaluates the model itself.
# FINDINGS_PYTHON=/path/to/python uses that interpreter's packages and installs nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/env"
  python=$folder/env/bin/python
  "$python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0
fi
export TMPDIR=$folder HF_HOME=$folder/huggingface HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error CUDA_VISIBLE_DEVICES=
"$python" -W ignore - 2>"$folder/stderr" <<'EOF' || { cat "$folder/stderr" >&2; exit 1; }
import copy
import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(63)} | {"<eos>": 63}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2))


@torch.no_grad()
def largest_logit_of_zeroed(twin):
    for parameter in twin.parameters():
        parameter.zero_()
    return twin(torch.arange(1, 9)[None]).logits.abs().max().item()


before = largest_logit_of_zeroed(copy.deepcopy(model))
arguments = SFTConfig(tempfile.mkdtemp(), report_to=[], use_cpu=True)
rows = Dataset.from_dict({"input_ids": [[1, 2, 3]]})
trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
after = largest_logit_of_zeroed(copy.deepcopy(trainer.model))
average = largest_logit_of_zeroed(AveragedModel(trainer.model))
print(f"largest logit of a copy whose every weight was set to zero: {before:.4f} if copied before SFTTrainer, "
      f"{after:.4f} behind it; torch's AveragedModel, zeroed: {average:.4f}")
still = before == 0 and after > 0.1 and average > 0.1
if not still:
    sys.exit("changed: this is no longer what the comment in deepcopy_after_sft_trainer.sh says")
EOF
