"""Which tokens a module drafts, chosen from what it is about to learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from foretell.data.vocabulary import by_tokenizer, coverage, frequent_tokens
from foretell.mtp import MTPModel
from foretell.training.regenerate import eos_ids
from foretell.types import IGNORE_INDEX


def choose_draft_vocabulary(
    mtp: MTPModel, tokenizer: Any, rows: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]]
) -> str:
    """Set a module's draft vocabulary to what rows hold most of, then to what the tokenizer's own training did. What
    comes back says how much of the held-out answers that covers.
    """
    ids_M = mtp.module.draft_vocab_ids
    if ids_M is None:
        return "draft vocabulary: all tokens"
    size, ends = mtp.target.vocab_size, sorted(eos_ids(mtp, tokenizer))
    mtp.module.set_draft_vocabulary(frequent_tokens(rows, len(ids_M), size, ends, by_tokenizer(tokenizer, size)))
    said = f"draft vocabulary: {len(ids_M)} tokens"
    answers = [row for row in held_out if any(label != IGNORE_INDEX for label in row.get("labels") or [0])]
    return f"{said} cover {100 * coverage(answers, ids_M):.1f} % of the held-out answers" if answers else said
