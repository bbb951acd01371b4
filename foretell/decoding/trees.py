"""Which guesses of parallel heads are verified together: trees of ranks, Cartesian or calibrated.

A tree is a list of nodes, each the ranks of the guesses that lead to it: (0,) is head 1's likeliest token, (0, 1) head
2's second likeliest after it. Parents come before children. A tree of width 1 is the chain.
Medusa (arXiv 2401.10774), section 2.1.2 (Cartesian) and 2.3.3 (calibrated by measured accuracy).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import product

Tree = list[tuple[int, ...]]


def cartesian_tree(widths: Sequence[int]) -> Tree:
    """All combinations of the widths[k - 1] likeliest guesses of head k: sum over k of widths[0] * ... nodes.

    Raises ValueError for no widths, or one below 1.
    """
    if not widths or any(not isinstance(w, int) or w < 1 for w in widths):
        raise ValueError(f"widths: got {list(widths)}, wanted a number of guesses of at least 1 for each head.")
    return [node for k in range(1, len(widths) + 1) for node in product(*(range(w) for w in widths[:k]))]


def calibrated_tree(
    accuracy_KS: Sequence[Sequence[float]], size: int | None = None, cost: Callable[[int], float] | None = None
) -> Tree:
    """The likeliest nodes first: a node's chance is the product of its guesses' accuracies, as of independent heads.

    Args:
        accuracy_KS: share of places where head k's guess of rank i was the token (foretell.head_accuracy measures it).
        size: number of nodes; None lets the cost curve decide.
        cost: seconds of a verification of so many rows (CostCurve): the tree grows as long as that makes more tokens a
            second. Needed if size is None.

    Raises:
        ValueError: neither size nor cost, or accuracies that are no shares.
    """
    if size is None and cost is None:
        raise ValueError("calibrated_tree: got neither size nor cost, wanted one of them.")
    if not accuracy_KS or any(not 0 <= a <= 1 for row in accuracy_KS for a in row):
        raise ValueError("accuracy_KS: wanted a row of shares between 0 and 1 for each head.")
    # children of a node are never likelier than it, so the best node not yet taken is always on the border
    border: list[tuple[float, tuple[int, ...]]] = [(-a, (i,)) for i, a in enumerate(accuracy_KS[0])]
    heapq.heapify(border)
    tree: Tree = []
    expected, best, best_rate = 1.0, 0, 0.0 if cost is None else 1.0 / cost(1)
    most = size if size is not None else 256
    while border and len(tree) < most:
        chance, node = heapq.heappop(border)
        if chance == 0:
            break
        tree.append(node)
        expected -= chance
        if len(node) < len(accuracy_KS):
            for i, a in enumerate(accuracy_KS[len(node)]):
                heapq.heappush(border, (chance * a, (*node, i)))
        if cost is not None and expected / cost(1 + len(tree)) > best_rate:
            best, best_rate = len(tree), expected / cost(1 + len(tree))
    return tree if size is not None else tree[:best]


def check_tree(tree: Sequence[Sequence[int]], depth: int) -> Tree:
    """The tree as tuples, or ValueError: a node without its parent before it, deeper than the heads, or twice."""
    nodes = [tuple(node) for node in tree]
    seen: set[tuple[int, ...]] = {()}
    for node in nodes:
        bad = [rank for rank in node if not isinstance(rank, int) or rank < 0]
        if not node or bad or node[:-1] not in seen or len(node) > depth or node in seen:
            raise ValueError(
                f"draft_tree: node {node} is empty, repeated, deeper than the {depth} heads, has a rank below 0, or "
                "stands before its parent. Wanted e.g. [(0,), (1,), (0, 0)] (foretell.cartesian_tree makes one)."
            )
        seen.add(node)
    return nodes
