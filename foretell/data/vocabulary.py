"""Which tokens a reduced draft vocabulary keeps, and how much of the answers it covers."""

# V vocabulary of the target, M vocabulary of the drafts.

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foretell.data.rows import as_list
from foretell.types import IGNORE_INDEX


def usual_size(vocab_size: int) -> int | None:
    """M where nobody says: a head of so many costs a draft little beside a block, and more would hardly be drafted.
    None, all of them, of a vocabulary that is small already.
    """
    size = 8192 + vocab_size // 16 // 64 * 64
    return size if size < vocab_size else None


def by_tokenizer(tokenizer: Any, vocab_size: int) -> list[int]:
    """The ids that a tokenizer's own training found most frequent first: pieces by their scores, or single bytes, then
    merges in the order in which they were learned. Those that it says nothing of are left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    vocabulary = model.get("vocab", {})
    if model.get("type") == "Unigram":
        order = sorted(range(len(vocabulary)), key=lambda i: -vocabulary[i][1])
    else:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", []))
        merged = [vocabulary.get("".join(pair), -1) for pair in pairs]
        bytes_ = [i for text, i in vocabulary.items() if (len(text) == 1 and ord(text) < 0x180) or text[:3] == "<0x"]
        order = [*sorted(bytes_), *merged]
    return [i for i in dict.fromkeys(order) if 0 <= i < vocab_size]


def frequent_tokens(
    rows: Iterable[Mapping[str, Any]],
    size: int,
    vocab_size: int,
    always: Iterable[int] = (),
    then: Sequence[int] = (),
) -> Tensor:
    """Choose the ids that a draft vocabulary keeps: those most frequent in the answers.

    Trained tokens are counted first; what is in the prompts only breaks ties and fills up, then `then` and the lowest
    ids do.

    Args:
        rows: encoded rows; without labels every token counts as answer.
        size: M, number of ids to keep.
        vocab_size: V of the target.
        always: ids kept whatever their count: EOS and other special tokens, without which drafts could never end.
        then: ids for what is left, best first: a tokenizer's own order.

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
    unseen = (token for token in dict.fromkeys((*then, *range(vocab_size))) if token not in kept)
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
