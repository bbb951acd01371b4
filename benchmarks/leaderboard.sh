#!/usr/bin/env bash
# Every method and baseline on one model, one set of answers, one budget: benchmarks/leaderboard.py, with economize 0.3.2 in
# an environment of its own (runs/leaderboard/economize), which sees the torch and the transformers of .venv and nothing
# newer. One command; the same again goes on where it was cut off.
#     bash benchmarks/leaderboard.sh --minutes 240
set -euo pipefail
cd "$(dirname "$0")/.."
python=${FORETELL_PYTHON:-.venv/bin/python}
place=runs/leaderboard/economize
if [ ! -e "$place/.installed" ]; then
    mkdir -p runs/leaderboard
    "$python" -m venv --clear --without-pip "$place"
    "$python" -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
        >"$(echo "$place"/lib/python3*/site-packages)/packages.pth"
    "$python" -m pip --python "$place/bin/python" install --no-deps economize==0.3.2
    touch "$place/.installed"
fi
exec "$python" benchmarks/leaderboard.py --peer "$place/bin/python" "$@"
