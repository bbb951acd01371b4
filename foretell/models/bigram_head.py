"""What neighbouring drafts say of each other: a low-rank bigram added to a depth's logits; and a guess whether a draft
will be accepted.

DSpark's Markov head and confidence head, there for drafts that one forward makes side by side: later ones are blind to
those before them, which the bigram mends for one small product. Logits are h W^T + U[token before] V^T.
"""

# N rows flattened, D hidden width, V vocabulary, M vocabulary of the drafts, r rank.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foretell.models.target import Target


class BigramHead(nn.Module):
    """U [V, r] and V [M, r], which starts at zero: at first the logits are what they were; and one logit of
    [state | U], without gradient to the state, if confidence is wanted. rank 0: that alone.
    """

    def __init__(self, target: Target, rank: int, confidence: bool, vocabulary: int) -> None:
        super().__init__()
        D, kind = target.hidden_size, {"device": target.device, "dtype": torch.float32}
        self.before = nn.Embedding(target.vocab_size, rank, **kind) if rank else None
        self.after = nn.Linear(rank, vocabulary, bias=False, **kind) if rank else None
        self.sure = nn.Linear(D + rank, 1, **kind) if confidence else None
        with torch.no_grad():
            if rank:  # a random projection of the target's embeddings: tokens that are alike begin alike
                ids_V = torch.arange(target.vocab_size, device=target.device)
                mix_DR = torch.randn(D, rank, **kind)
                for part in ids_V.split(8192):
                    self.before.weight[part] = F.normalize(target.embed(part).float() @ mix_DR, dim=-1) * rank**0.5
                self.after.weight.zero_()
            if confidence:
                self.sure.weight.zero_()
                self.sure.bias.zero_()

    def widened(self, states_ND: Tensor, weight_MD: Tensor, before_N: Tensor) -> tuple[Tensor, Tensor]:
        """([N, D + r], [M, D + r]) whose product is the logits with the bigram."""
        if self.before is None:
            return states_ND, weight_MD
        read_NR = self.before(before_N).to(states_ND.dtype)
        return torch.cat([states_ND, read_NR], -1), torch.cat([weight_MD, self.after.weight.to(weight_MD.dtype)], -1)

    def added(self, logits_NM: Tensor, before_N: Tensor) -> Tensor:
        """Logits before the target's scaling, and the bigram's."""
        return logits_NM if self.before is None else logits_NM + self.after(self.before(before_N)).to(logits_NM.dtype)

    def sureness(self, states_ND: Tensor, before_N: Tensor) -> Tensor:
        """[N] logits of the chance that the likeliest draft is accepted where those before it were."""
        states_ND = states_ND.detach().to(self.sure.weight.dtype)
        read = [] if self.before is None else [self.before(before_N).detach()]
        return self.sure(torch.cat([states_ND, *read], -1))[..., 0]
