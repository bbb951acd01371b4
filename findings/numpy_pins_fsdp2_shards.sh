#!/usr/bin/env bash
# torch 2.13.0: a parameter of which anybody took .numpy() while FSDP2 had it gathered can never be sharded again.
# Expected: unshard(), read a whole parameter with .numpy() (a checksum, a plot, an export), reshard().
# Seen: .numpy() makes the storage of a CPU tensor fixed in size for good, also when the array is gone; reshard() frees
#   by resizing and raises "Trying to resize storage that is not resizable". .clone().numpy() is harmless.
# Why it matters: the read looks harmless, the error comes later, elsewhere, and names no parameter; on a GPU, where
#   .cpu() has to copy first, nothing happens, so only runs and tests on CPU ranks fail. One rank shows it.
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
"$python" - "$folder/meeting" 2>"$folder/stderr" <<'EOF' || { cat "$folder/stderr" >&2; exit 1; }
import sys

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
said = {}
for name, read in {"clone().numpy()": lambda t: t.clone().numpy(), "numpy()": lambda t: t.numpy()}.items():
    layer = fully_shard(torch.nn.Linear(8, 8), mesh=mesh)
    layer.unshard()
    float(read(layer.weight.detach()).sum())  # the array is gone after this line
    try:
        layer.reshard()
        said[name] = "sharded again"
    except RuntimeError as error:
        said[name] = str(error).splitlines()[0]
    print(f"gathered, read by {name} and given back: {said[name]}")
torch.distributed.destroy_process_group()
if said["clone().numpy()"] != "sharded again" or "not resizable" not in said["numpy()"]:
    sys.exit("changed: this is no longer what the comment in numpy_pins_fsdp2_shards.sh says")
EOF
