#!/usr/bin/env bash
# TRL 1.16.0 (transformers 5.23.0): a reward function that breaks into NaN is taken for one that does not apply.
# Expected: GRPOTrainer stops, or says so, when a reward is float("nan"), as of a division by zero in a tensor.
# Seen: None means "does not apply here" and becomes NaN before anything is looked at, so a NaN cannot be told from it.
#   Where another function still gives numbers, the broken one is left out of the sum without a word, completion by
#   completion; the run goes on and learns from what is left.
# Why it matters: the reward that was meant to hold the policy back (length, format, a judge) drops out exactly on the
#   completions that break it, which is what a policy then learns to write.
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
"$python" - 2>"$folder/stderr" <<'EOF' || { cat "$folder/stderr" >&2; exit 1; }
import contextlib
import sys
import tempfile
import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(63)} | {"<eos>": 63}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, eos_token_id=63, pad_token_id=63, bos_token_id=None))


def counts(completions, **kwargs):
    return [float(at) for at, _ in enumerate(completions)]


def breaks(completions, **kwargs):
    return [float("nan") if at % 2 else 1.0 for at, _ in enumerate(completions)]


arguments = GRPOConfig(tempfile.mkdtemp(), max_steps=1, per_device_train_batch_size=4, num_generations=4,
    max_completion_length=4, logging_steps=1, report_to=[], use_cpu=True)
trainer = GRPOTrainer(model, [counts, breaks], arguments, train_dataset=Dataset.from_dict({"prompt": ["w1", "w2"]}),
    processing_class=tokenizer)
with warnings.catch_warnings(record=True) as said, contextlib.redirect_stdout(sys.stderr):
    warnings.simplefilter("always")
    trainer.train()
said = [str(one.message) for one in said if "reward" in str(one.message).lower() or "nan" in str(one.message).lower()]
log = next(entry for entry in trainer.state.log_history if "reward" in entry)
print("rewards of four completions: 0, 1, 2, 3 of one function; 1, nan, 1, nan of the other")
print(f"steps done: {trainer.state.global_step}; logged reward {log['reward']:.2f} (the first's mean is 1.50), "
      f"of the broken one {log['rewards/breaks/mean']:.2f}; warnings: {said}")
still = trainer.state.global_step == 1 and abs(log["reward"] - 2.0) < 1e-6 and not said
if not still:
    sys.exit("changed: this is no longer what the comment in grpo_takes_nan_for_no_reward.sh says")
EOF
