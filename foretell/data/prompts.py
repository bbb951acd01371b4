"""Rows to tokens: what the target reads, which of it is trained, and what is asked when the target answers anew."""

# T tokens of a row. Labels are token-aligned: labels[t] is input_ids[t] or IGNORE_INDEX.

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foretell.data.chat import chat_ids, chat_ids_and_mask, context_length, warn_merged
from foretell.data.formats import MAX_PROBLEMS, load_rows
from foretell.data.rows import MASKS, as_list, detect_form
from foretell.types import IGNORE_INDEX

KEPT_COLUMNS = ("document_ids", "position_ids")  # of ready rows, beside hidden_states


@dataclass(kw_only=True)
class EncodeStats:
    """What became of the rows: counts of rows, then of tokens."""

    rows: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: int = 0  # nothing left to train on
    tokens: int = 0
    trained_tokens: int = 0


def encode_row(
    row: Mapping[str, Any], tokenizer: Any, max_length: int | None = None, assistant_only_loss: bool = True
) -> dict[str, Any]:
    """Encode one row of any form (see `foretell.data.rows`).

    What is trained: for `messages` the assistant's tokens with each end-of-turn token; for `prompt` + `completion` the
    completion; for `text` everything; for ready `input_ids` what `labels` or a 0/1 mask say, else everything. EOS ends
    completions and text, as in TRL.

    Args:
        row: one row.
        tokenizer: of transformers; None will do for ready rows.
        max_length: tokens; longer rows lose their end.
        assistant_only_loss: False trains all tokens of `messages`.

    Returns:
        `input_ids` and `labels`, lists of T; of ready rows also `hidden_states` [T, D], `document_ids` and
        `position_ids` if they have them.

    Raises:
        ValueError: the row cannot be encoded, or encodes to nothing.
    """
    form = detect_form(row)
    if form != "input_ids" and tokenizer is None:
        raise ValueError(f"got a row of {form!r} and no tokenizer, wanted one; only ready input_ids go without")
    encoded: dict[str, Any] = {}
    if form == "input_ids":
        ids = list(as_list(row["input_ids"]))
        mask = _ready_mask(row, len(ids))
        encoded = {name: list(as_list(row[name])) for name in KEPT_COLUMNS if row.get(name) is not None}
        if row.get("hidden_states") is not None:
            encoded["hidden_states"] = row["hidden_states"]
    elif form == "text":
        ids = _with_eos(_text_ids(row["text"], tokenizer), tokenizer)
        mask = [1] * len(ids)
    elif form == "messages":
        ids, mask = chat_ids_and_mask(row["messages"], tokenizer, **_template_arguments(row))
        if not assistant_only_loss:
            mask = [1] * len(ids)
    elif form == "prompt":
        raise ValueError("got a prompt without an answer, wanted a 'completion' too; or let the target answer first")
    elif isinstance(row["prompt"], str):
        ids, mask = _encode_completion(row["prompt"], row["completion"], tokenizer)
    else:
        ids, mask = _encode_chat_completion(row, tokenizer, assistant_only_loss)
    if not ids:
        raise ValueError(f"got a row of {form!r} that encodes to no token, wanted at least one")
    encoded |= {
        "input_ids": ids,
        "labels": [token if trained else IGNORE_INDEX for token, trained in zip(ids, mask, strict=True)],
    }
    if max_length is not None and len(ids) > max_length:
        encoded = {name: values[:max_length] for name, values in encoded.items()}
    return encoded


def encode_rows(
    rows: Any,
    tokenizer: Any,
    max_length: int | None = None,
    assistant_only_loss: bool = True,
    vocab_size: int | None = None,
) -> tuple[list[dict[str, Any]], EncodeStats]:
    """Encode rows for training. Rows with nothing left to train on are dropped; that and truncation are counted.

    Args:
        rows: from `load_rows`, or anything that it takes.
        tokenizer, max_length, assistant_only_loss: as in `encode_row`.
        vocab_size: of the target; ids beyond it are an error.

    Returns:
        The encoded rows, and what became of all of them.

    Raises:
        ValueError: rows that cannot be encoded, up to ten at once, each with its place; or no row left.
    """
    rows = load_rows(rows)
    encoded_rows, stats, problems = [], EncodeStats(rows=len(rows)), []
    for index in range(len(rows)):
        try:
            encoded = encode_row(rows[index], tokenizer, assistant_only_loss=assistant_only_loss)
            if vocab_size is not None and max(encoded["input_ids"]) >= vocab_size:
                raise ValueError(
                    f"got token id {max(encoded['input_ids'])}, wanted ids below the target's vocabulary of "
                    f"{vocab_size}; the rows were encoded for another model"
                )
        except ValueError as error:
            problems.append(f"{rows.where(index)}: {error}")
            if len(problems) == MAX_PROBLEMS:
                problems.append(f"stopped after {MAX_PROBLEMS} problems; there may be more")
                break
            continue
        if max_length is not None and len(encoded["input_ids"]) > max_length:
            stats.truncated += 1
            encoded = {name: values[:max_length] for name, values in encoded.items()}
        # the first token of a row has nothing before it that could predict it
        trained = sum(label != IGNORE_INDEX for label in encoded["labels"][1:])
        if not trained:
            stats.dropped += 1
            continue
        stats.kept += 1
        stats.tokens += len(encoded["input_ids"])
        stats.trained_tokens += trained
        encoded_rows.append(encoded)
    if problems:
        raise ValueError("\n".join(problems))
    lost = (
        f"{stats.truncated} of {stats.rows} rows were cut at max_length={max_length}; "
        f"{stats.dropped} of {stats.rows} rows were dropped: no token left to train on"
    )
    if not encoded_rows:
        raise ValueError(f"no row left to train on: {lost}. Wanted answers (assistant turns) within max_length.")
    if stats.truncated or stats.dropped:
        warnings.warn(lost, stacklevel=2)
    return encoded_rows, stats


def prompts_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | list[int] | str:
    """The row without its final answer, for regeneration and evaluation.

    Returns:
        Messages, a string, or (for ready rows) the token ids before the last run of labels.

    Raises:
        ValueError: the row has no prompt (plain text, or ready rows in which everything is trained).
    """
    form = detect_form(row)
    if form in ("prompt", "prompt_completion"):
        return row["prompt"]
    if form == "messages":
        messages = list(row["messages"])
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError("got messages of the assistant only, wanted a question before the answer")
        return messages
    if form == "text":
        raise ValueError("got a row of 'text', which has no prompt; wanted 'messages' or 'prompt'")
    ids = list(as_list(row["input_ids"]))
    mask = _ready_mask(row, len(ids))
    end = len(mask) - mask[::-1].index(1) if any(mask) else len(mask)
    while end > 0 and mask[end - 1]:
        end -= 1
    if end == 0:
        raise ValueError("got input_ids that are all trained, wanted labels or a mask that leave a prompt")
    return ids[:end]


def encode_prompt(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """Token ids of the row's prompt, ready for generation: conversations end with the generation prompt."""
    prompt = prompts_of(row)
    if isinstance(prompt, str):
        return _text_ids(prompt, tokenizer)
    if isinstance(prompt[0], int):
        return prompt
    return chat_ids(prompt, tokenizer, add_generation_prompt=True, **_template_arguments(row))


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Check that every id the tokenizer can give fits the target's vocabulary.

    Raises:
        ValueError: an id is too large.
    """
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise ValueError(
            f"got a tokenizer with the token {token!r} at id {largest}, wanted ids below the target's vocabulary of "
            f"{vocab_size}. Load the tokenizer of this model, or resize the model's embeddings."
        )


def preview(row: Mapping[str, Any], tokenizer: Any, colour: bool = False) -> str:
    """The row as text with the trained tokens in ⟦brackets⟧, or green in a terminal. For people who check masks."""
    encoded = encode_row(row, tokenizer)
    before, after = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    pieces, start, ids = [], 0, encoded["input_ids"]
    trained = [label != IGNORE_INDEX for label in encoded["labels"]]
    for at in range(1, len(ids) + 1):
        if at == len(ids) or trained[at] != trained[start]:
            text = tokenizer.decode(ids[start:at])
            pieces.append(before + text + after if trained[start] else text)
            start = at
    return "".join(pieces)


def _ready_mask(row: Mapping[str, Any], length: int) -> list[int]:
    """1 where a ready row is trained. Labels win over masks; several masks must all agree, as in TRL."""
    if row.get("labels") is not None:
        return [int(label != IGNORE_INDEX) for label in as_list(row["labels"])]
    mask = [1] * length
    for name in MASKS:
        if row.get(name) is not None:
            mask = [int(kept and value) for kept, value in zip(mask, as_list(row[name]), strict=True)]
    return mask


def _template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """What TRL's rows may carry for the chat template beside the messages."""
    tools = row.get("tools")
    arguments = dict(row.get("chat_template_kwargs") or {})
    if tools:
        arguments["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    return arguments


def _text_ids(text: str, tokenizer: Any) -> list[int]:
    """Token ids of plain text, beginning-of-text token included, end-of-text token not: the text may go on."""
    ids = list(tokenizer(text)["input_ids"])
    adds_eos = ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if adds_eos else ids


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    if tokenizer.eos_token_id is None or (ids and ids[-1] == tokenizer.eos_token_id):
        return ids
    return [*ids, tokenizer.eos_token_id]


def _encode_completion(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    prompt_ids = _text_ids(prompt, tokenizer)
    ids = _with_eos(_text_ids(prompt + completion, tokenizer), tokenizer)
    start = 0
    while start < len(prompt_ids) and ids[start] == prompt_ids[start]:
        start += 1
    if start < len(prompt_ids):
        warn_merged()  # as TRL: the pair is encoded in one piece, and a token that spans both belongs to the completion
    return ids, [0] * start + [1] * (len(ids) - start)


def _encode_chat_completion(row: Mapping[str, Any], tokenizer: Any, assistant_only: bool) -> tuple[list, list]:
    prompt, arguments = list(row["prompt"]), _template_arguments(row)
    messages = prompt + list(row["completion"])
    if assistant_only:
        return chat_ids_and_mask(messages, tokenizer, first=len(prompt), **arguments)
    ids = chat_ids(messages, tokenizer, **arguments)
    start = context_length(messages, len(prompt), ids, tokenizer, arguments)
    return ids, [0] * start + [1] * (len(ids) - start)
