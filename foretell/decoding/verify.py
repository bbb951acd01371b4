"""Verification: which drafted tokens stay, and the target's own token after them.

Under policy "lossless" the emitted tokens are the target's own: equal to its greedy choice token by token, or, when it
samples, distributed as its samples. Every verification emits at least the token that the target itself chose, so that
decoding goes on whatever was drafted. Pure tensors and lists: a statistical test needs no model.
"""

# R = 1 + len(draft) rows of one sequence: row 0 is its last token, row i + 1 is draft token i. V vocabulary.

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foretell.decoding.policies import SPANS, check_policy, typical_thresholds
from foretell.ops.sampling import draw, to_probs
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
    draft: Draft,
    scores_RV: Tensor,
    do_sample: bool,
    generator: torch.Generator | None = None,
    policy: str = "lossless",
) -> Verdict:
    """Decide which drafts of one sequence stay.

    Args:
        draft: proposed tokens, a tree. Where draft.probs holds a row, that token must have been SAMPLED from it (given
            the siblings before it); where it holds None the token was chosen (argmax, lookup).
        scores_RV: [R, V] the target's scores after logits processors and warpers, as transformers' generate has them.
        do_sample: sample from the target; otherwise take its argmax.
        generator: on the scores' device.
        policy: see policies.py.

    Raises:
        ValueError: unknown policy, one that verifies nothing, or scores and draft of different lengths.
    """
    check_policy(policy)
    if policy in SPANS:
        raise ValueError(f"policy {policy!r} commits spans unverified: decode with spans.SpanDecoder.")
    if scores_RV.dim() != 2 or len(scores_RV) != 1 + len(draft):
        raise ValueError(
            f"got scores of shape {tuple(scores_RV.shape)} for {len(draft)} drafts, wanted [{1 + len(draft)}, V]: "
            "the last token's row first, then one a draft."
        )
    if policy == "typical":
        return _verify_typical(draft, scores_RV, do_sample, generator)
    if not do_sample:
        return verify_greedy(draft, scores_RV.argmax(dim=-1).tolist())
    return _verify_sampling(draft, scores_RV, generator)


def _verify_sampling(draft: Draft, scores_RV: Tensor, generator: torch.Generator | None) -> Verdict:
    """Rejection sampling down the tree. With one child a node, this is Leviathan et al. 2023 (arXiv 2211.17192),
    algorithm 1; with several, SpecInfer's multi-step speculative sampling (arXiv 2305.09781, section 4.3).
    """
    children = _children(draft)
    path: list[int] = []
    at = -1
    while True:
        p_V = to_probs(scores_RV[at + 1][None], do_sample=True)[0]
        for child in children[at]:
            kept, p_V = _accept(draft.tokens[child], _drafted_from(draft, child), p_V, generator)
            if kept:
                path.append(child)
                at = child
                break
        else:  # a leaf, or all children refused: p_V is what they have left over
            return Verdict(path, int(draw(p_V[None], generator)))


def _accept(token: int, q_V: Tensor | None, p_V: Tensor, generator: torch.Generator | None) -> tuple[bool, Tensor]:
    """(is the drafted token kept, the distribution that is left where it is not).

    Keep it with probability min(1, p / q); where it is refused, the target's token follows max(p - q, 0) / its sum. So
    the token that is emitted in the end follows p. A chosen token has a one-hot q: kept with p(token), left out after.
    """
    q = 1.0 if q_V is None else float(q_V[token])
    assert q > 0, f"draft token {token} was not sampled from its own distribution: its probability there is {q}"
    uniform = torch.rand((), generator=generator, device=p_V.device)
    if uniform * q < p_V[token]:
        return True, p_V
    if q_V is None:
        left_V = p_V.clone()
        left_V[token] = 0.0
    else:
        left_V = (p_V - q_V).clamp_(min=0)
    mass = left_V.sum()
    if mass <= 0:  # p and q are equal but for rounding: the token was certain to be kept
        return True, p_V
    return False, left_V / mass


def _verify_typical(draft: Draft, scores_RV: Tensor, do_sample: bool, generator: torch.Generator | None) -> Verdict:
    """Medusa (arXiv 2401.10774), section 2.3.1: the longest path of typical drafts, the likelier of equals. Lossy.

    Medusa's candidates start with the target's own token; here that token ended the verification before, so all drafts
    face the rule. The token after them is again the target's own choice, as under "lossless".
    """
    probs_RV = to_probs(scores_RV, do_sample=True)
    threshold = typical_thresholds(probs_RV).tolist()
    above = [parent + 1 for parent in draft.parents]  # row whose distribution speaks of a draft
    probability = probs_RV[above, draft.tokens].tolist()
    reached = {-1: (0, 0.0)}  # node: length and log-probability of its path
    for i, parent in enumerate(draft.parents):
        if parent in reached and probability[i] > threshold[above[i]]:
            length, logp = reached[parent]
            reached[i] = (length + 1, logp + math.log(probability[i]))
    at = max(reached, key=lambda node: reached[node])
    path = []
    node = at
    while node >= 0:
        path.append(node)
        node = draft.parents[node]
    last = to_probs(scores_RV[at + 1][None], do_sample)
    return Verdict(path[::-1], int(draw(last, generator) if do_sample else last.argmax()))


def _children(draft: Draft) -> dict[int, list[int]]:
    children: dict[int, list[int]] = {node: [] for node in range(-1, len(draft))}
    for i, parent in enumerate(draft.parents):
        children[parent].append(i)
    return children


def _drafted_from(draft: Draft, i: int) -> Tensor | None:
    return None if draft.probs is None else draft.probs[i]
