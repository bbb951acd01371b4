#!/usr/bin/env bash
# torch 2.13.0 (CPU wheel, Linux, libgomp): matrix products of one Python thread are slower by the clock, at the same CPU
#   time, while another thread that does nothing has once made such a product.
# Expected: threads that have nothing to do cost nothing.
# Seen: a tenth to a quarter more time (two cores, AMD EPYC). OpenMP threads stay with the thread that first asked for
#   them; where all of them together are more than there are cores, libgomp lets none wait awake at the end of a
#   product. After `omp_pause_resource_all` in the idle thread, or once that thread has ended, the time is as before.
# Why it matters: servers and trainers commonly load and warm up a model in the main thread and decode in another.
# Needs idle cores: beside other work the two ways cannot be told apart, and waiting awake may even lose.
# FINDINGS_PYTHON=/path/to/python uses that interpreter's packages and installs nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/env"
  python=$folder/env/bin/python
  "$python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
fi
export TMPDIR=$folder CUDA_VISIBLE_DEVICES=
unset OMP_NUM_THREADS OMP_WAIT_POLICY GOMP_SPINCOUNT OMP_THREAD_LIMIT
"$python" -W ignore - 2>"$folder/stderr" <<'EOF' || { cat "$folder/stderr" >&2; exit 1; }
import ctypes
import os
import sys
import threading
import time
from statistics import median

import torch

cores = len(os.sched_getaffinity(0))
torch.set_num_threads(cores)
weights, x = [torch.randn(576, 1536) for _ in range(60)], torch.randn(16, 576)


def products(passes=60):
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(passes):
        for weight in weights:
            torch.mm(x, weight)
    return time.perf_counter() - start, time.process_time() - cpu


def in_another_thread():
    told = []
    thread = threading.Thread(target=lambda: told.append(products()))
    thread.start()
    thread.join()
    return told[0]


products(1)
openmp = next(line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line)
let_go = ctypes.CDLL(openmp).omp_pause_resource_all
alone, beside = [], []
for _ in range(5):
    let_go(1)
    alone.append(in_another_thread())
    products(1)  # the main thread has its own again, and waits
    beside.append(in_another_thread())
    print(f"another thread alone {alone[-1][0]:.3f} s ({alone[-1][1]:.3f} CPU), "
          f"beside an idle one with threads {beside[-1][0]:.3f} s ({beside[-1][1]:.3f} CPU)")
ratio = median(one[0] for one in beside) / median(one[0] for one in alone)
print(f"{cores} cores: {ratio:.2f} times as long")
if ratio < 1.05:
    sys.exit("changed, or the machine is busy: not what the comment in openmp_teams_outnumber_cores.sh says")
EOF
