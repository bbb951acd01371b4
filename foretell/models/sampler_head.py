"""The sampler head: what the token before says about a mask's prediction, so that drafts agree with each other.

arXiv 2507.11851, section 3.2: two blocks of Linear, SiLU and a norm over [embedding of the previous token | state of
the mask]; the output matrix is the target's. RMSNorm and the residual around the second block as in MTP-GLoRA.
"""

# N rows flattened, D hidden width.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foretell.models.target import Target


class SamplerHead(nn.Module):
    """y1 = block([e | z]), y2 = block(y1), out = y1 + y2. 3 D^2 + 2 D parameters."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        D, config = target.hidden_size, target.config
        eps = next((e for n in ("rms_norm_eps", "layer_norm_eps") if (e := getattr(config, n, None))), 1e-6)
        kind = {"device": target.device, "dtype": torch.float32}
        self.linears = nn.ModuleList([nn.Linear(2 * D, D, bias=False, **kind), nn.Linear(D, D, bias=False, **kind)])
        self.norms = nn.ModuleList([nn.RMSNorm(D, eps=eps, **kind) for _ in range(2)])

    def forward(self, embedding_ND: Tensor, mask_ND: Tensor) -> Tensor:
        """[N, D]: what the output matrix reads."""
        dtype = self.linears[0].weight.dtype
        y_ND = torch.cat([embedding_ND, mask_ND], dim=-1).to(dtype)
        first_ND = self.norms[0](F.silu(self.linears[0](y_ND)))
        return (first_ND + self.norms[1](F.silu(self.linears[1](first_ND)))).to(mask_ND.dtype)
