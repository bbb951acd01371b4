#!/usr/bin/env bash
# lm-eval 0.4.13 (transformers 5.23.0): its response cache gives a second model the first one's answers.
# Expected: use_cache=PATH (CachingLM) keeps answers by model, or refuses a file that another model filled.
# Seen: the key is a hash of the request's kind and arguments; nothing of the model, its revision, adapter or settings
#   is in it. Two models with one file get equal scores.
# Why it matters: a baseline and a fine-tuned model, two checkpoints of a run, or one model decoded in two ways compare
#   as exactly equal, the very result that a test for lossless decoding hopes for.
# FINDINGS_PYTHON=/path/to/python uses that interpreter's packages and installs nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/env"
  python=$folder/env/bin/python
  "$python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 lm-eval==0.4.13 sqlitedict==2.1.0
fi
export TMPDIR=$folder HF_HOME=$folder/huggingface HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error CUDA_VISIBLE_DEVICES=
"$python" -W ignore - 2>"$folder/stderr" <<'EOF' || { cat "$folder/stderr" >&2; exit 1; }
import sys
import tempfile

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(63)} | {"<eos>": 63}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.5)
    return HFLM(LlamaForCausalLM(config), tokenizer=tokenizer, device="cpu")


def score(lm):
    return lm.loglikelihood([Instance("loglikelihood", {}, ("w1 w2", " w3"), 0)])[0][0]


file = tempfile.mkdtemp() + "/answers.db"
plain = score(model(0)), score(model(1))
cached = score(CachingLM(model(0), file)), score(CachingLM(model(1), file))
print(f"log-likelihood of one continuation by two models: {plain[0]:.3f}, {plain[1]:.3f}")
print(f"the same with one cache file:                     {cached[0]:.3f}, {cached[1]:.3f}")
still = abs(plain[0] - plain[1]) > 0.1 and cached[0] == cached[1] == plain[0]
if not still:
    sys.exit("changed: this is no longer what the comment in lm_eval_cache_mixes_models.sh says")
EOF
