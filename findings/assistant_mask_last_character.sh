#!/usr/bin/env bash
# transformers 5.23.0: the assistant mask loses the last tokens of a character that has several (5.24.0 keeps them).
# Expected: apply_chat_template(return_assistant_tokens_mask=True) marks every token between {% generation %} and
#   {% endgeneration %}.
# Seen: a block that ends in a character of several tokens (byte-level BPE: an emoji, a rare letter, many CJK
#   characters) keeps the first of them only: the end is looked up by character, and that gives its first token.
# Why it matters: with assistant-only loss on a template whose block ends with the content, a model is never taught to
#   finish such a character, and what is marked does not decode to the answer.
# FINDINGS_PYTHON=/path/to/python uses that interpreter's packages and installs nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/env"
  python=$folder/env/bin/python
  "$python" -m pip install --quiet transformers==5.23.0 jinja2==3.1.6
fi
export TMPDIR=$folder HF_HOME=$folder/huggingface HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error CUDA_VISIBLE_DEVICES=
"$python" -W ignore - 2>"$folder/stderr" <<'EOF' || { cat "$folder/stderr" >&2; exit 1; }
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
bytes_only = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bytes_only.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only)
tokenizer.chat_template = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}{% endgeneration %}\n"
    "{% else %}Q: {{ m.content }}\n{% endif %}{% endfor %}"
)
lost = {}
for answer in ("plain", "Ünï", "日本", "ok 🙂"):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mark in zip(out["input_ids"], out["assistant_masks"]) if mark]
    lost[answer] = len(answer.encode()) - len(marked)
    print(f"{answer!r}: {len(answer.encode())} tokens, {len(marked)} marked, which say {tokenizer.decode(marked)!r}")
still = lost == {"plain": 0, "Ünï": 1, "日本": 2, "ok 🙂": 3}
if not still:
    sys.exit("changed: this is no longer what the comment in assistant_mask_last_character.sh says")
EOF
