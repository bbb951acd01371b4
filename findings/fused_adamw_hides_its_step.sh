#!/usr/bin/env bash
# torch 2.13.0 (on a CPU): a step of fused AdamW changes parameters and leaves Tensor._version where it was.
# Expected: an in-place change raises the tensor's version, as plain and foreach steps do; autograd refuses to run
#   backward over a saved weight that has changed since.
# Seen: with fused=True the version stays, and backward over a graph from before the step gives a wrong gradient
#   without an error.
# Why it matters: "adamw_torch_fused" is the default optimizer of transformers' Trainer. What relies on versions to
#   notice new weights (packed copies, caches of states, weight synchronisation) goes on with the old ones, and the
#   usual safety net against mixing a stale graph with new weights is gone.
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
export TMPDIR=$folder HF_HOME=$folder/huggingface HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error CUDA_VISIBLE_DEVICES=
"$python" -W ignore - 2>"$folder/stderr" <<'EOF' || { cat "$folder/stderr" >&2; exit 1; }
import sys

import torch

seen = {}
for kind in ("fused", "foreach"):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, **{kind: True})
    x = torch.ones(1, 3, requires_grad=True)
    net(x).pow(2).sum().backward()
    later = net(x).sum()  # its backward needs the weights of this moment
    weight, version = net[1].weight.detach().clone(), net[1].weight._version
    (right,) = torch.autograd.grad(later, x, retain_graph=True)
    optimizer.step()
    moved = (net[1].weight - weight).abs().max().item()
    try:
        (now,) = torch.autograd.grad(later, x)
        outcome = f"a gradient that is off by {(now - right).abs().max():.3f}, no error"
    except RuntimeError as error:
        outcome = "RuntimeError: " + str(error).split(":")[0]
    seen[kind] = net[1].weight._version - version, outcome
    print(f"{kind}: weights moved by {moved:.3f}, _version by {seen[kind][0]}; backward over them: {outcome}")
still = seen["fused"][0] == 0 and "no error" in seen["fused"][1] and seen["foreach"][0] > 0
still = still and "off by 0.000" not in seen["fused"][1] and "RuntimeError" in seen["foreach"][1]
if not still:
    sys.exit("changed: this is no longer what the comment in fused_adamw_hides_its_step.sh says")
EOF
