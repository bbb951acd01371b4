"""Verification: which drafted tokens stay, and the target's own token after them.

Under policy "lossless" the emitted tokens are the target's own: equal to its greedy choice token by token, or, when it
samples, distributed as its samples. Every verification emits at least the token that the target itself chose, so that
decoding goes on whatever was drafted. Pure tensors and lists: a statistical test needs no model.
"""

# B sequences, R rows of each: row 0 is its last token, row i + 1 its draft token i. N places of drafts, V vocabulary.

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foretell.decoding.policies import SPANS, check_policy, typical_thresholds
from foretell.ops.sampling import race, take, to_probs
from foretell.types import Draft, Verdict


def verify_greedy(draft: Draft, argmax: Sequence[int]) -> Verdict:
    """Follow the drafts that are the target's argmax. Lists only: every greedy decode round goes through here.

    Args:
        draft: proposed tokens of one sequence.
        argmax: 1 + len(draft) tokens: the target's choice after the last token, then after each draft.

    Raises:
        ValueError: argmax has another length.
    """
    if len(argmax) != 1 + len(draft.tokens):
        raise ValueError(
            f"got {len(argmax)} argmax tokens for {len(draft.tokens)} drafts, wanted {1 + len(draft.tokens)}: "
            "the last token's row first, then one a draft; cut the padding rows off."
        )
    path, at, wanted = [], -1, argmax[0]
    for i, token in enumerate(draft.tokens):  # parents come first, so one walk meets the path in order
        if draft.parents[i] == at and token == wanted:
            path.append(i)
            at, wanted = i, argmax[i + 1]
    return Verdict(path, wanted)


def verify(
    drafts: Sequence[Draft], scores_BRV: Tensor, uniform_BR: Tensor | None = None, policy: str = "lossless"
) -> list[Verdict]:
    """Decide which drafts of each sequence stay. Under "lossless" the device is read once, for all sequences.

    Args:
        drafts: proposed tokens, a tree a sequence. Where draft.probs holds a row, that token must have been SAMPLED
            from it (given the siblings before it), and whether it is here must not depend on its value; where it holds
            None the token was chosen (argmax, lookup).
        scores_BRV: the target's scores after logits processors and warpers, as transformers' generate has them; R is 1
            + the longest draft, further rows are not looked at.
        uniform_BR: for sampling, a random number in [0, 1) for each row; rows of one depth may share theirs. None takes
            the target's argmax.
        policy: see policies.py.

    Raises:
        ValueError: unknown policy, one that verifies nothing, scores and drafts of different lengths, or scores of a
            token to draw that make no probabilities.
    """
    check_policy(policy)
    if policy in SPANS:
        raise ValueError(f"policy {policy!r} commits spans unverified: decode with spans.SpanDecoder.")
    rows = 1 + max(map(len, drafts))
    if scores_BRV.dim() != 3 or scores_BRV.shape[0] != len(drafts) or scores_BRV.shape[1] < rows:
        raise ValueError(
            f"got scores of shape {tuple(scores_BRV.shape)} for {len(drafts)} sequences of at most {rows - 1} drafts, "
            f"wanted [{len(drafts)}, {rows}, V]: the last token's row first, then one a draft."
        )
    verdicts = _verdicts(drafts, scores_BRV, uniform_BR, policy)
    if any(verdict.token < 0 for verdict in verdicts):
        raise ValueError(
            "got scores that make no probabilities, wanted a number for one token at least: a temperature or penalty "
            "that overflows, or logits processors that forbid every token. transformers' generate fails on them too."
        )
    return verdicts


def _verdicts(drafts: Sequence[Draft], scores_BRV: Tensor, uniform_BR: Tensor | None, policy: str) -> list[Verdict]:
    if policy == "typical":
        return _verify_typical(drafts, scores_BRV, uniform_BR)
    if uniform_BR is None:
        return _follow(drafts, scores_BRV.argmax(-1))
    probs_BRV, found = to_probs(scores_BRV), {}
    groups: dict[bool, list[int]] = {}  # whatever stands beside a text, it stays what it is
    for b, draft in enumerate(drafts):
        groups.setdefault(any(map(draft.drawn, range(len(draft)))), []).append(b)
    for drawn, few in groups.items():
        of, whole = [drafts[b] for b in few], len(few) == len(drafts)
        own_BRV, own_BR = (probs_BRV, uniform_BR) if whole else (probs_BRV[few], uniform_BR[few])
        if drawn:
            verdicts = _verify_drawn(of, own_BRV, own_BR)
        else:
            # the target's own draw at each row: a chosen token is kept as often as it would have been drawn, and the
            # text is what it would have been without drafts
            verdicts = _follow(of, race(own_BRV.flatten(0, 1), own_BR.flatten()).view(own_BR.shape))
        found.update(zip(few, verdicts, strict=True))
    return [found[b] for b in range(len(drafts))]


def _follow(drafts: Sequence[Draft], choices_BR: Tensor) -> list[Verdict]:
    return [verify_greedy(d, row[: 1 + len(d)]) for d, row in zip(drafts, choices_BR.tolist(), strict=True)]


def _verify_drawn(drafts: Sequence[Draft], probs_BRV: Tensor, uniform_BR: Tensor) -> list[Verdict]:
    """Rejection sampling down the trees. With one child a node, this is Leviathan et al. 2023 (arXiv 2211.17192),
    algorithm 1; with several, SpecInfer's multi-step speculative sampling (arXiv 2305.09781, section 4.3).

    Parents come first, so one walk over the drafts' places meets the accepted path in order, in all sequences at once.
    """
    B, device = len(drafts), probs_BRV.device
    most = max(map(len, drafts))
    parent_BN = torch.tensor([[p + 1 for p in d.parents] + [-1] * (most - len(d)) for d in drafts], device=device)
    token_BN = torch.tensor([[*d.tokens, *[0] * (most - len(d))] for d in drafts], device=device)
    at_B = torch.zeros(B, dtype=torch.long, device=device)
    p_BV, uniform_B = probs_BRV[:, 0], uniform_BR[:, 0].double()
    kept_NB, share_NB = [], []
    for i in range(most):
        q_BV = torch.zeros_like(p_BV).scatter_(1, token_BN[:, i, None], 1.0)
        drawn = [b for b, d in enumerate(drafts) if len(d) > i and d.probs is not None and d.probs[i] is not None]
        if drawn:
            q_BV[drawn] = torch.stack([drafts[b].probs[i] for b in drawn]).to(q_BV)  # type: ignore[index, misc]
        reached_B = parent_BN[:, i] == at_B
        share_NB.append(torch.minimum(p_BV, q_BV).sum(-1))
        accepted_B, left_BV, left_B = _accept(p_BV, q_BV, token_BN[:, i], uniform_B)
        kept_B, refused_B = reached_B & accepted_B, reached_B & ~accepted_B
        p_BV = torch.where(kept_B[:, None], probs_BRV[:, i + 1], torch.where(refused_B[:, None], left_BV, p_BV))
        uniform_B = torch.where(kept_B, uniform_BR[:, i + 1].double(), torch.where(refused_B, left_B, uniform_B))
        at_B = torch.where(kept_B, i + 1, at_B)
        # 2: reached and kept, 1: reached
        kept_NB.append(reached_B.long() + kept_B.long())
    # a leaf, or all children refused: p is what they have left over
    told = torch.stack([x_B.double() for x_B in (take(p_BV, uniform_B), *kept_NB, *share_NB)], dim=1).tolist()
    verdicts = []
    for draft, (token, *rest) in zip(drafts, told, strict=True):
        fates, shares_N = rest[:most], rest[most:]
        reached = [i for i, fate in enumerate(fates) if fate]
        drawn_shares = {i: shares_N[i] for i in reached if draft.drawn(i)}
        verdicts.append(Verdict([i for i in reached if fates[i] == 2], int(token), drawn_shares))
    return verdicts


def _accept(p_BV: Tensor, q_BV: Tensor, token_B: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(is the drafted token kept, the distribution that is left where it is not, the uniform number that is left).

    Keep it with probability min(1, p / q); where it is refused, the target's token follows max(p - q, 0) / its sum. So
    the token that is emitted in the end follows p. A chosen token has a one-hot q: kept with p(token), left out after.
    A number known to lie between a and 1 is as good as a fresh one, stretched to [0, 1).
    """
    p_B, q_B = (x_BV.gather(1, token_B[:, None])[:, 0].double() for x_BV in (p_BV, q_BV))
    chance_B = torch.where(q_B > 0, p_B / q_B, 0.0).clamp(max=1.0)
    left_BV = (p_BV - q_BV).clamp_(min=0)
    mass_B = left_BV.sum(-1)
    kept_B = (uniform_B < chance_B) | (mass_B <= 0)  # p and q are equal but for rounding: it was certain to be kept
    left_B = (uniform_B - chance_B) / (1 - chance_B).clamp(min=1e-300)
    return kept_B, left_BV / mass_B.clamp(min=1e-45)[:, None], left_B


def _verify_typical(drafts: Sequence[Draft], scores_BRV: Tensor, uniform_BR: Tensor | None) -> list[Verdict]:
    """Medusa (arXiv 2401.10774), section 2.3.1: the longest path of typical drafts, the likelier of equals. Lossy.

    Medusa's candidates start with the target's own token; here that token ended the verification before, so all drafts
    face the rule. The token after them is again the target's own choice, as under "lossless".
    """
    probs_BRV = to_probs(scores_BRV)
    thresholds = typical_thresholds(probs_BRV.flatten(0, 1)).view(probs_BRV.shape[:2]).tolist()
    flat = probs_BRV.flatten(0, 1)
    if uniform_BR is None:
        choices = scores_BRV.argmax(-1).tolist()
    else:
        choices = race(flat, uniform_BR.flatten()).view(uniform_BR.shape).tolist()
    R = probs_BRV.shape[1]
    asked = [(b * R + p + 1, t) for b, d in enumerate(drafts) for p, t in zip(d.parents, d.tokens, strict=True)]
    rows, tokens = [row for row, _ in asked], [token for _, token in asked]
    likely = iter(flat[rows, tokens].tolist())
    verdicts = []
    for draft, threshold, choice in zip(drafts, thresholds, choices, strict=True):
        reached = {-1: (0, 0.0)}  # node: length and log-probability of its path
        for i, parent in enumerate(draft.parents):
            probability = next(likely)
            if parent in reached and probability > threshold[parent + 1]:
                length, logp = reached[parent]
                reached[i] = (length + 1, logp + math.log(probability))
        at = node = max(reached, key=lambda one: reached[one])
        path = []
        while node >= 0:
            path.append(node)
            node = draft.parents[node]
        verdicts.append(Verdict(path[::-1], choice[at + 1]))
    return verdicts
