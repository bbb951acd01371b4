"""Rows to tokens: what the target reads, which of it is trained, and what is asked when the target answers anew."""

# T tokens of a row. Labels are token-aligned: labels[t] is input_ids[t] or IGNORE_INDEX.

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foretell.data.cache import HiddenStore
from foretell.data.chat import ChatTemplate, Span, chat_ids, warn_merged, without_none
from foretell.data.formats import Problems, load_rows
from foretell.data.rows import MASKS, as_list, detect_form
from foretell.types import IGNORE_INDEX

BATCH = 256  # rows that are tokenized together
KEPT_COLUMNS = ("document_ids", "position_ids")  # of ready rows, beside hidden_states


@dataclass(kw_only=True)
class EncodeStats:
    """What became of the rows: counts of rows, then of tokens."""

    rows: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: int = 0  # nothing left to train on
    skipped: int = 0  # could not be encoded, and were to be skipped
    tokens: int = 0
    trained_tokens: int = 0


def encode_rows(
    rows: Any,
    tokenizer: Any,
    max_length: int | None = None,
    assistant_only_loss: bool = True,
    vocab_size: int | None = None,
    skip_bad: bool = False,
) -> tuple[Sequence[dict[str, Any]], EncodeStats]:
    """Encode rows of any form (see `foretell.data.rows`) for training.

    What is trained: for `messages` the assistant's tokens with each end-of-turn token; for `prompt` + `completion` the
    completion; for `text` everything; for ready `input_ids` what `labels` or a 0/1 mask say, else everything. EOS ends
    completions and text, as in TRL. None in messages, tools and the arguments of calls means absent, as Arrow fills it.
    Rows with nothing left to train on are dropped; that and truncation are counted.

    Args:
        rows: from `load_rows`, or anything that it takes.
        tokenizer: of transformers; None will do for ready rows.
        max_length: tokens; longer rows lose their end.
        assistant_only_loss: False trains all tokens of `messages`.
        vocab_size: of the target; ids beyond it are an error.
        skip_bad: leave out rows that cannot be encoded; they are counted, and the first ones named in a warning.

    Returns:
        The encoded rows (of a store a view, whose states stay on disk), and what became of all of them. A row has
        `input_ids` and `labels`, lists of T; of ready rows also `hidden_states` [T, D], `document_ids` and
        `position_ids` if they have them.

    Raises:
        ValueError: rows that cannot be encoded, up to ten at once, each with its place; or no row left.
    """
    rows = load_rows(rows, skip_bad=skip_bad)
    encoded_rows: list[Any] = []
    stats, problems = EncodeStats(rows=len(rows) + rows.skipped), Problems(skip_bad)
    template, stored = _template_of(tokenizer), isinstance(rows.source, HiddenStore)
    for first in range(0, len(rows), BATCH):
        some = rows[first : first + BATCH]
        for index, encoded in enumerate(_encode_some(some, tokenizer, assistant_only_loss, template), start=first):
            if isinstance(encoded, ValueError):
                problems.add(f"{rows.where(index)}: {encoded}")
                continue
            if vocab_size is not None and max(encoded["input_ids"]) >= vocab_size:
                problems.add(f"{rows.where(index)}: {_beyond(encoded['input_ids'], vocab_size)}")
                continue
            stats.truncated += max_length is not None and len(encoded["input_ids"]) > max_length
            encoded = _cut(encoded, max_length)
            # the first token of a row has nothing before it that could predict it
            trained = sum(label != IGNORE_INDEX for label in encoded["labels"][1:])
            if not trained:
                stats.dropped += 1
                continue
            stats.kept += 1
            stats.tokens += len(encoded["input_ids"])
            stats.trained_tokens += trained
            encoded_rows.append(index if stored else encoded)
    problems.close()
    stats.skipped = rows.skipped + problems.count
    lost = (
        f"{stats.truncated} of {stats.rows} rows were cut at max_length={max_length}; "
        f"{stats.dropped} of {stats.rows} rows were dropped: no token left to train on"
    )
    if not encoded_rows:
        raise ValueError(f"no row left to train on: {lost}. Wanted answers (assistant turns) within max_length.")
    if stats.truncated or stats.dropped:
        warnings.warn(lost, stacklevel=2)
    return (_Stored(rows.source, encoded_rows, max_length) if stored else encoded_rows), stats


class _Stored(Sequence):
    """Rows of a store, read when they are asked for: states stay on disk, and each worker opens the store itself."""

    def __init__(self, store: HiddenStore, indices: list[int], max_length: int | None):
        self._store, self._indices, self._max_length = store, indices, max_length

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return _cut(_encode_plain(self._store[self._indices[index]], "input_ids", None), self._max_length)


def _encode_some(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, assistant_only_loss: bool, template: ChatTemplate | None
) -> list[dict[str, Any] | ValueError]:
    """Each row encoded, or what is wrong with it. Conversations are tokenized together: one call for all of them."""
    out: list[Any] = []
    texts, spans, places = [], [], []
    for at, row in enumerate(rows):
        try:
            form = detect_form(row)
            if form != "input_ids" and template is None:
                raise ValueError(f"got a row of {form!r} and no tokenizer, wanted one; only ready input_ids go without")
            if form == "messages" or (form == "prompt_completion" and not isinstance(row["prompt"], str)):
                text, answers = _chat(row, form, template, assistant_only_loss)
                texts.append(text)
                spans.append(answers)
                places.append(at)
                out.append(None)
            else:
                out.append(_encode_plain(row, form, tokenizer))
        except ValueError as error:
            out.append(error)
    for at, (ids, mask) in zip(places, template.encode(texts, spans) if texts else (), strict=True):
        out[at] = _labelled(ids, mask)
    return [
        ValueError(f"got a row of {detect_form(rows[at])!r} that encodes to no token, wanted at least one")
        if isinstance(encoded, dict) and not encoded["input_ids"]
        else encoded
        for at, encoded in enumerate(out)
    ]


def _chat(row: Mapping[str, Any], form: str, template: ChatTemplate, assistant_only: bool) -> tuple[str, list[Span]]:
    """A conversation as text, and the spans of it that are trained."""
    arguments = _template_arguments(row)
    prompt = list(row["prompt"]) if form == "prompt_completion" else []
    messages = [*prompt, *row["completion"]] if prompt else row["messages"]
    if assistant_only:
        return template.answers(messages, len(prompt), **arguments)
    text = template.text(messages, **arguments)
    start = template.start(text, messages, len(prompt), **arguments) if prompt else 0
    return text, [(start, len(text))]


def _encode_plain(row: Mapping[str, Any], form: str, tokenizer: Any) -> dict[str, Any]:
    """A row of text or of ready ids."""
    if form == "input_ids":
        ids = list(as_list(row["input_ids"]))
        kept = {name: list(as_list(row[name])) for name in KEPT_COLUMNS if row.get(name) is not None}
        if row.get("hidden_states") is not None:
            kept["hidden_states"] = row["hidden_states"]
        return kept | _labelled(ids, _ready_mask(row, len(ids)))
    if form == "text":
        ids = _with_eos(_text_ids(row["text"], tokenizer), tokenizer)
        return _labelled(ids, [1] * len(ids))
    if form == "prompt":
        raise ValueError("got a prompt without an answer, wanted a 'completion' too; or let the target answer first")
    return _labelled(*_encode_completion(row["prompt"], row["completion"], tokenizer))


def _labelled(ids: list[int], mask: list[int]) -> dict[str, Any]:
    labels = [token if trained else IGNORE_INDEX for token, trained in zip(ids, mask, strict=True)]
    return {"input_ids": ids, "labels": labels}


def _cut(encoded: dict[str, Any], max_length: int | None) -> dict[str, Any]:
    if max_length is None or len(encoded["input_ids"]) <= max_length:
        return encoded
    return {name: values[:max_length] for name, values in encoded.items()}


def _template_of(tokenizer: Any) -> ChatTemplate | None:
    return None if tokenizer is None else ChatTemplate(tokenizer)


def _beyond(ids: list[int], vocab_size: int) -> str:
    return (
        f"got token id {max(ids)}, wanted ids below the target's vocabulary of {vocab_size}; the rows were encoded for "
        "another model, or the tokenizer is another model's"
    )


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


def encode_prompts(
    rows: Any, tokenizer: Any, vocab_size: int | None = None, skip_bad: bool = False
) -> tuple[list[list[int]], int]:
    """Token ids of the prompts of rows (see `encode_prompt`), and the number of rows that were skipped.

    Raises:
        ValueError: rows without a prompt, or that cannot be encoded, up to ten at once, each with its place.
    """
    rows = load_rows(rows, skip_bad=skip_bad)
    prompts, problems = [], Problems(skip_bad)
    for index in range(len(rows)):
        try:
            ids = encode_prompt(rows[index], tokenizer)
            if vocab_size is not None and max(ids, default=0) >= vocab_size:
                raise ValueError(_beyond(ids, vocab_size))
            if not ids:
                raise ValueError("got a prompt that encodes to no token, wanted at least one")
            prompts.append(ids)
        except ValueError as error:
            problems.add(f"{rows.where(index)}: {error}")
    problems.close()
    return prompts, rows.skipped + problems.count


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
    return without_none(arguments)


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
