#!/usr/bin/env bash
# transformers 5.23.0 (5.24.0 too): generate keeps tokenizer, streamer and synced_gpus from a custom_generate callable.
# Expected: an argument of generate that stands in the callable's signature arrives, as one's own arguments do, and
#   stop_strings with tokenizer= work as without custom_generate.
# Seen: the three are taken out of the call and dropped, named in the signature or not; synced_gpus=True is lost without
#   a word, and stop_strings raise "could not locate a tokenizer" although the tokenizer was given.
# Why it matters: a decoding method given through transformers' own extension point cannot stream, cannot stop at
#   strings, and does not know that ranks must stay in step (ZeRO-3, FSDP).
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TextStreamer

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
bytes_only = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bytes_only.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, eos_token_id=None, bos_token_id=None, pad_token_id=0)).eval()
got = {}


def mine(model, input_ids, tokenizer=None, streamer=None, synced_gpus=None, of_my_own=None, **kwargs):
    got.update(tokenizer=tokenizer, streamer=streamer, synced_gpus=synced_gpus, of_my_own=of_my_own)
    return input_ids


call = {**tokenizer("hello", return_tensors="pt"), "max_new_tokens": 4, "do_sample": False, "tokenizer": tokenizer}
model.generate(**call, custom_generate=mine, streamer=TextStreamer(tokenizer), synced_gpus=False, of_my_own=3)
print("what the callable got:", got)
print("stop_strings without it:", model.generate(**call, stop_strings=["q"]).shape)
try:
    model.generate(**call, custom_generate=mine, stop_strings=["q"])
    refused = False
except ValueError as error:
    refused = "could not locate a tokenizer" in str(error)
    print("stop_strings with it: ValueError:", error)
still = refused and got == {"tokenizer": None, "streamer": None, "synced_gpus": None, "of_my_own": 3}
if not still:
    sys.exit("changed: this is no longer what the comment in custom_generate_arguments.sh says")
EOF
