#!/usr/bin/env bash
# torch 2.13.0: a parameter of which anybody took .numpy() while FSDP2 had it gathered can never be sharded again.
# Expected: unshard(), read a whole parameter with .numpy() (a checksum, a plot, an export), reshard().
# Seen: .numpy() makes the storage of a CPU tensor fixed in size for good, also when the array is gone; reshard() frees
#   by resizing and raises "Trying to resize storage that is not resizable". .clone().numpy() is harmless.
# Why it matters: the read looks harmless, the error comes later, elsewhere, and names no parameter; on a GPU, where
#   .cpu() has to copy first, nothing happens, so only runs and tests on CPU ranks fail.
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
cat >"$folder/ranks.py" <<'EOF'
import sys

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

torch.distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
said = {}
for name, read in {"clone().numpy()": lambda t: t.clone().numpy(), "numpy()": lambda t: t.numpy()}.items():
    layer = fully_shard(torch.nn.Linear(8, 8), mesh=mesh)
    layer.unshard()
    total = float(read(layer.weight.detach()).sum())  # the array is gone after this line
    try:
        layer.reshard()
        said[name] = "sharded again"
    except RuntimeError as error:
        said[name] = str(error).splitlines()[0]
    if torch.distributed.get_rank() == 0:
        print(f"gathered, read by {name} and given back: {said[name]}")
torch.distributed.destroy_process_group()
if said["clone().numpy()"] != "sharded again" or "not resizable" not in said["numpy()"]:
    sys.exit("changed: this is no longer what the comment in numpy_pins_fsdp2_shards.sh says")
EOF
OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --standalone --nproc-per-node 2 "$folder/ranks.py" \
  2>"$folder/stderr" || { cat "$folder/stderr" >&2; exit 1; }
