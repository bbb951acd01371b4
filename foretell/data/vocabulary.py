"""Which tokens a reduced draft vocabulary keeps, and how much of the answers it covers."""

# V vocabulary of the target, M vocabulary of the drafts.

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from foretell.data.rows import as_list
from foretell.types import IGNORE_INDEX


def frequent_tokens(
    rows: Iterable[Mapping[str, Any]], size: int, vocab_size: int, always: Iterable[int] = ()
) -> Tensor:
    """Choose the ids that a draft vocabulary keeps: those most frequent in the answers.

    Trained tokens are counted first; what is in the prompts only breaks ties and fills up, then the lowest ids do.

    Args:
        rows: encoded rows; without labels every token counts as answer.
        size: M, number of ids to keep.
        vocab_size: V of the target.
        always: ids kept whatever their count: EOS and other special tokens, without which drafts could never end.

    Returns:
        ids_M, a sorted LongTensor [M].

    Raises:
        ValueError: size not in [number of `always`, vocab_size], or an id beyond the vocabulary.
    """
    always = set(always)
    if not max(1, len(always)) <= size <= vocab_size:
        raise ValueError(
            f"draft vocabulary: got a size of {size}, wanted between {max(1, len(always))} (ids that are always kept) "
            f"and {vocab_size} (the target's vocabulary)."
        )
    answers, prompts = _count(rows)
    beyond = [token for token in (*answers, *prompts, *always) if not 0 <= token < vocab_size]
    if beyond:
        raise ValueError(
            f"draft vocabulary: got token id {max(beyond)}, wanted ids below the target's vocabulary of {vocab_size}; "
            "the rows were encoded for another model."
        )
    seen = sorted(
        (answers.keys() | prompts.keys()) - always, key=lambda token: (-answers[token], -prompts[token], token)
    )
    kept = always | set(seen[: size - len(always)])
    unseen = (token for token in range(vocab_size) if token not in kept)
    while len(kept) < size:
        kept.add(next(unseen))
    return torch.tensor(sorted(kept), dtype=torch.long)


def coverage(rows: Iterable[Mapping[str, Any]], ids: Tensor | Iterable[int]) -> float:
    """Share (0 to 1) of the trained tokens that a draft vocabulary can name: what it leaves is always rejected.

    Raises:
        ValueError: the rows have no trained token.
    """
    answers, _ = _count(rows)
    total = answers.total()
    if not total:
        raise ValueError("coverage: got rows without a trained token, wanted at least one label.")
    return sum(answers[token] for token in set(as_list(ids))) / total


def _count(rows: Iterable[Mapping[str, Any]]) -> tuple[Counter, Counter]:
    """How often each id stands in answers and in prompts."""
    answers, prompts = Counter(), Counter()
    for row in rows:
        ids = as_list(row["input_ids"])
        labels = as_list(row["labels"]) if row.get("labels") is not None else ids
        answers.update(label for label in labels if label != IGNORE_INDEX)
        prompts.update(token for token, label in zip(ids, labels, strict=True) if label == IGNORE_INDEX)
    return answers, prompts
