#!/usr/bin/env bash
# TRL 1.16.0 (transformers 5.23.0): disable_dropout=True leaves attention dropout on, and GRPO samples with it.
# Expected: with GRPOConfig(disable_dropout=True) two passes over a text with the same weights agree, and completions
#   are drawn from the policy itself.
# Seen: modules of the type nn.Dropout are set to 0; a model's attention_dropout, a plain number handed to the attention
#   function, stays. Completions are sampled in train mode, so with that noise.
# Why it matters: importance ratios are not 1 where policy and sampler are the same weights, and log-probabilities read
#   by anything in eval mode (an engine, another decoder) never match those that the trainer computes.
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
import contextlib
import sys
import tempfile
from collections import Counter

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(63)} | {"<eos>": 63}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, attention_dropout=0.3, initializer_range=0.3, eos_token_id=63,
    pad_token_id=63, bos_token_id=None))
sampling = Counter()


def look(attention, args, kwargs):
    if not torch.is_grad_enabled():
        sampling[attention.training, attention.attention_dropout] += 1


arguments = GRPOConfig(tempfile.mkdtemp(), disable_dropout=True, max_steps=1, per_device_train_batch_size=2,
    num_generations=2, max_completion_length=4, report_to=[], use_cpu=True)
trainer = GRPOTrainer(model, lambda completions, **kwargs: [float(len(text)) for text in completions], arguments,
    train_dataset=Dataset.from_dict({"prompt": ["w1", "w2"]}), processing_class=tokenizer)
hook = model.model.layers[0].self_attn.register_forward_pre_hook(look, with_kwargs=True)
with contextlib.redirect_stdout(sys.stderr):  # its summary
    trainer.train()
hook.remove()
model.train()
with torch.no_grad():
    first, second = (model(torch.arange(1, 17)[None]).logits.log_softmax(-1) for _ in range(2))
apart = (first - second).abs().max().item()
print("disable_dropout=True; forwards while sampling, by (training, attention dropout):", dict(sampling))
print(f"two passes over one text with the same weights: log-probabilities differ by up to {apart:.2f}")
still = bool(sampling) and set(sampling) == {(True, 0.3)} and apart > 0.01
if not still:
    sys.exit("changed: this is no longer what the comment in grpo_keeps_attention_dropout.sh says")
EOF
