#!/usr/bin/env bash
# One command for one machine: tests under -m gpu, then in fp32 (and bf16 on a GPU) the undrafted decoder and drafting
# against transformers at batch 1, 4, 16, training tokens a second, peak memory. Writes results/machine.json.
# Under nine minutes on one GPU; on a CPU it runs to the end too, in small.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${FORETELL_PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    "$python" -m pytest -q -m gpu
else
    echo "no GPU: its tests are left out, the rest runs in small"
fi
"$python" benchmarks/machine.py "$@"
