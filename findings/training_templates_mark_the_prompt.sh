#!/usr/bin/env bash
# TRL 1.16.0 (transformers 5.23.0): some *_training.jinja templates mark what the generation prompt already says.
# Expected: the {% generation %} marks of TRL's training templates hold what a model generates, so that
#   assistant_only_loss=True trains these tokens and no others (those for Llama 3 and Gemma do).
# Seen: the templates for DeepSeek-V3, R1 distillates, gpt-oss and Qwen 3.6 also mark the answer's header or "<think>",
#   which add_generation_prompt=True writes before the model is asked.
# Why it matters: loss, accuracy and whatever else is read over the marks count tokens that nobody ever generates; they
#   are always the same, so they look like perfect predictions.
# FINDINGS_PYTHON=/path/to/python uses that interpreter's packages and installs nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/env"
  python=$folder/env/bin/python
  "$python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0 jinja2==3.1.6
fi
export TMPDIR=$folder HF_HOME=$folder/huggingface HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error CUDA_VISIBLE_DEVICES=
"$python" -W ignore - 2>"$folder/stderr" <<'EOF' || { cat "$folder/stderr" >&2; exit 1; }
import importlib.resources
import os
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
bytes_only = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bytes_only.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, bos_token="<bos>", eos_token="<eos>")
question = [{"role": "user", "content": "hi"}]
answered = [*question, {"role": "assistant", "content": "Yes."}]
twice = {}
for name in ("llama3", "gemma", "deepseekv3", "deepseek_r1_distill", "gptoss", "qwen3_6"):
    file = importlib.resources.files("trl").joinpath(f"chat_templates/{name}_training.jinja")
    tokenizer.chat_template = file.read_text(encoding="utf-8")
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    out = tokenizer.apply_chat_template(answered, return_dict=True, return_assistant_tokens_mask=True)
    ids, marks = out["input_ids"], out["assistant_masks"]
    given = os.path.commonprefix([asked, tokenizer.decode(ids)])  # what generation starts behind
    twice[name] = given[len(tokenizer.decode(ids[: marks.index(1)])) :]
    print(f"{name}: marked although it is part of the generation prompt: {twice[name]!r}")
still = twice == {
    "llama3": "",
    "gemma": "",
    "deepseekv3": "<｜Assistant｜>",
    "deepseek_r1_distill": "<｜Assistant｜>",
    "gptoss": "<|start|>assistant",
    "qwen3_6": "<think>\n",
}
if not still:
    sys.exit("changed: this is no longer what the comment in training_templates_mark_the_prompt.sh says")
EOF
