#!/usr/bin/env bash
# accelerate 1.15.0 (torch 2.13.0): FSDP2 asked for on CPU ranks silently becomes DDP.
# Expected: Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)) shards the parameters, as
#   torch's fully_shard does on the same two CPU ranks, or says that it will not.
# Seen: the plugin is looked at for accelerators only. prepare() gives DistributedDataParallel with whole parameters.
# Why it matters: a CI job on CPU ranks that is meant to cover FSDP2 (uneven shards, DTensor parameters, gathering for
#   generation) runs DDP and passes. A test has to look at the parameters' type.
# FINDINGS_PYTHON=/path/to/python uses that interpreter's packages and installs nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
  python3 -m venv "$folder/env"
  python=$folder/env/bin/python
  "$python" -m pip install --quiet torch==2.13.0 accelerate==1.15.0
fi
export TMPDIR=$folder HF_HOME=$folder/huggingface HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error CUDA_VISIBLE_DEVICES=
cat >"$folder/ranks.py" <<'EOF'
import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
model = torch.nn.Linear(8, 8)
model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
own = fully_shard(torch.nn.Linear(8, 8), mesh=init_device_mesh("cpu", (accelerator.num_processes,)))
got = type(model).__name__, type(next(model.parameters())).__name__
if accelerator.is_main_process:
    print(f"{accelerator.num_processes} ranks, accelerate: {got[0]} with parameters of type {got[1]}")
    print("the same ranks, torch's fully_shard: parameters of type", type(next(own.parameters())).__name__)
still = got == ("DistributedDataParallel", "Parameter") and type(next(own.parameters())).__name__ == "DTensor"
torch.distributed.destroy_process_group()
if not still:
    sys.exit("changed: this is no longer what the comment in fsdp2_on_cpu_is_ddp.sh says")
EOF
OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 "$folder/ranks.py" \
  2>"$folder/stderr" || { cat "$folder/stderr" >&2; exit 1; }
