"""What all tests share: one thread and a clock that always finds the same kernels fastest, so that timings and sums do
not depend on the machine's other work, and a folder of their own for what is measured.
"""

import os
import tempfile

import pytest
import torch

torch.set_num_threads(1)
_measured = tempfile.TemporaryDirectory()
os.environ["FORETELL_CACHE"] = _measured.name


@pytest.fixture(autouse=True)
def same_kernels(request, monkeypatch):
    """Packed weights, but for two and three rows; the real suite measures."""
    from foretell.models import kernels

    def seconds(part, kernel, x):
        return 1.0 + (kernel == "transposed") + (kernel == "plain") * (3.0 - 2.5 * (len(x) in (2, 3)))

    if request.node.get_closest_marker("real") is None:
        monkeypatch.setattr(kernels, "seconds_of", seconds)
