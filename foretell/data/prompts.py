"""Rows to tokens: what the target reads, which of it is trained, and what is asked when the target answers anew."""

# T tokens of a row. Labels are token-aligned: labels[t] is input_ids[t] or IGNORE_INDEX.

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets

from foretell.data.chat import ChatTemplate, Span, chat_ids, warn_merged, without_none
from foretell.data.encoded_cache import kept_table, rows_hash, tokenizer_hash
from foretell.data.formats import Problems, Rows, bars, load_rows
from foretell.data.rows import MASKS, as_list, detect_form
from foretell.types import IGNORE_INDEX

BATCH = 256  # rows that are tokenized together
ROWS_IN_MEMORY = 20_000  # more are encoded to a file
KEPT_COLUMNS = ("document_ids", "position_ids")  # of ready rows, beside hidden_states
# of the table of encoded rows; input_ids and spans are none of ready rows, and of bad ones, which have a problem
LISTS, COUNTS = ("input_ids", "spans"), ("tokens", "trained")
COLUMNS = {**dict.fromkeys((*LISTS, *COUNTS), "int32"), "cut": "bool", "problem": "string"}
Tokens = tuple[list[int], list[int]]  # ids; where trained spans begin and what is behind each, in turn


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


class Encoded(Sequence):
    """Encoded rows: tokens and trained spans in an Arrow table of `datasets`, 4 bytes a token, which lies on disk where
    rows are many; labels are made when a row is asked for. Ready rows stay where they are: kept states on disk too.
    """

    def __init__(self, rows: Rows, table: Any, kept: Any, limits: tuple[int | None, int | None]):
        """table: a row for each of rows; kept: an array of indices of both; limits: of length and of ids."""
        self.rows, self.table, self.kept, self.limits = rows, table, kept, limits

    @property
    def lengths(self) -> Any:
        """Tokens of each row, an array."""
        return _column(self.table, "tokens")[self.kept]

    @property
    def stats(self) -> EncodeStats:
        """Of these rows alone."""
        trained = int(_column(self.table, "trained")[self.kept].sum())
        return EncodeStats(rows=len(self), kept=len(self), tokens=int(self.lengths.sum()), trained_tokens=trained)

    def part(self, chosen: Any) -> Encoded:
        """These rows: an array of indices or of booleans."""
        return Encoded(self.rows, self.table, self.kept[chosen], self.limits)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = int(self.kept[index])
        row = self.table[at]
        if row["input_ids"] is None:
            return _ready(self.rows[at], self.limits[0])
        return labelled((row["input_ids"], row["spans"]))


def encode_rows(
    rows: Any,
    tokenizer: Any,
    max_length: int | None = None,
    assistant_only_loss: bool = True,
    vocab_size: int | None = None,
    skip_bad: bool | int = False,
    num_proc: int | None = None,
    may_be_empty: bool = False,
    cache: str | Path | None = None,
) -> tuple[Encoded, EncodeStats]:
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
        skip_bad: leave out rows that cannot be encoded; they are counted, and the first ones named in a warning. A
            number: so many at most.
        num_proc: processes that encode, of `datasets.map`.
        may_be_empty: no row left is no error.
        cache: folder of an encoded_cache: what it has is not encoded again. Not for ready rows.

    Returns:
        The encoded rows, list-like, and what became of all of them. A row has `input_ids` and `labels`, lists of T; of
        ready rows also `hidden_states` [T, D], `document_ids` and `position_ids` if they have them.

    Raises:
        ValueError: rows that cannot be encoded, up to ten at once, each with its place; or no row left.
    """
    if isinstance(rows, Encoded) and rows.limits == (max_length, vocab_size):
        return rows, rows.stats
    rows = load_rows(rows, skip_bad=skip_bad, may_be_empty=may_be_empty)
    encode = _Encoder(rows, tokenizer, max_length, assistant_only_loss, vocab_size)
    encode.problems = Problems(skip_bad and True)
    if cache is None or not len(rows) or rows[0].get("input_ids") is not None:
        table = _table(rows, encode, num_proc)
    else:
        settings = {
            "rows": rows_hash(rows),
            "tokenizer": tokenizer_hash(tokenizer),
            "max_length": max_length,
            "assistant_only_loss": assistant_only_loss,
            "vocab_size": vocab_size,
            "skip_bad": bool(skip_bad),
        }

        def make() -> Any:
            table = _table(rows, encode, num_proc)
            _problems_of(rows, table, skip_bad).close()  # bad rows are said, not kept
            return table

        table = kept_table(cache, settings, make)
    problems = _problems_of(rows, table, skip_bad)
    problems.close()
    trained, tokens = _column(table, "trained"), _column(table, "tokens")
    kept = (trained > 0).nonzero()[0]
    stats = EncodeStats(
        rows=len(rows) + rows.skipped,
        kept=len(kept),
        truncated=int(_column(table, "cut").sum()),
        dropped=int((trained == 0).sum()) - problems.count,
        skipped=rows.skipped + problems.count,
        tokens=int(tokens[kept].sum()),
        trained_tokens=int(trained.sum()),
    )
    lost = (
        f"{stats.truncated} of {stats.rows} rows were cut at max_length={max_length}; "
        f"{stats.dropped} of {stats.rows} rows were dropped: no token left to train on"
    )
    if not len(kept) and not may_be_empty:
        raise ValueError(f"no row left to train on: {lost}. Wanted answers (assistant turns) within max_length.")
    if stats.truncated or stats.dropped:
        warnings.warn(lost, stacklevel=2)
    return Encoded(rows, table, kept, (max_length, vocab_size)), stats


def _table(rows: Rows, encode: _Encoder, num_proc: int | None) -> Any:
    """A row of COLUMNS for each of rows."""
    values = {name: datasets.Value(dtype) for name, dtype in COLUMNS.items()}
    features = {name: datasets.List(value) if name in LISTS else value for name, value in values.items()}
    table, many = datasets.Dataset.from_dict({"at": range(len(rows))}), len(rows) > ROWS_IN_MEMORY
    folder = Path(tempfile.mkdtemp(prefix="foretell-")) if many else None
    if not len(rows):  # of which map makes no columns
        return datasets.Dataset.from_dict({name: [] for name in features}, datasets.Features(features))
    with bars(many), ExitStack() as stack:
        if folder is not None:
            stack.callback(_remove, folder, os.getpid())
        table = table.map(
            encode,
            batched=True,
            batch_size=BATCH,
            num_proc=num_proc,
            remove_columns=["at"],
            features=datasets.Features(features),
            cache_file_name=None if folder is None else str(folder / "rows.arrow"),
            load_from_cache_file=False,
            new_fingerprint=uuid.uuid4().hex,  # or datasets would hash all that the encoder holds
            desc="encoding rows",
        )
        weakref.finalize(table, stack.pop_all().close)
    return table


def _problems_of(rows: Rows, table: Any, skip_bad: bool | int) -> Problems:
    problems, bad = Problems(skip_bad), table.data.column("problem").is_valid().to_numpy()
    for index in bad.nonzero()[0].tolist():
        problems.add(f"{rows.where(index)}: {table[index]['problem']}")
    return problems


@dataclass
class _Encoder:
    """What `datasets.map` calls, in as many processes as it is asked to."""

    rows: Rows
    tokenizer: Any
    max_length: int | None
    assistant_only_loss: bool
    vocab_size: int | None
    template: ChatTemplate | None = None
    problems: Problems = field(default_factory=Problems)  # so far in this process

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        if self.template is None:
            self.template = _template_of(self.tokenizer)
        out: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        some = [self.rows[at] for at in batch["at"]]
        for at, row, encoded in zip(
            batch["at"], some, encode_some(some, self.tokenizer, self.assistant_only_loss, self.template), strict=True
        ):
            made: dict[str, Any] = {"trained": 0, "tokens": 0, "cut": False}
            if not isinstance(encoded, ValueError) and self.vocab_size is not None:
                beyond = max(encoded[0]) >= self.vocab_size
                encoded = ValueError(_beyond(encoded[0], self.vocab_size)) if beyond else encoded
            if isinstance(encoded, ValueError):
                made["problem"] = str(encoded)
                self.problems.add(f"{self.rows.where(at)}: {encoded}")
            else:
                ids, spans = encoded
                end = len(ids) if self.max_length is None else min(len(ids), self.max_length)
                # the first token of a row has nothing before it that could predict it
                counts = (min(behind, end) - max(begin, 1) for begin, behind in zip(spans[::2], spans[1::2]))
                made |= {"trained": sum(max(count, 0) for count in counts), "tokens": end, "cut": end < len(ids)}
                if row.get("input_ids") is None:
                    made |= {"input_ids": ids[:end], "spans": [min(place, end) for place in spans]}
            for name in COLUMNS:
                out[name].append(made.get(name))
        return out


def encode_some(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, assistant_only_loss: bool, template: ChatTemplate | None
) -> list[Tokens | ValueError]:
    """Each row's tokens and trained spans, or what is wrong with it. Conversations are tokenized in one call."""
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
    for at, encoded in zip(places, template.encode(texts, spans) if texts else (), strict=True):
        out[at] = encoded
    return [
        ValueError(f"got a row of {detect_form(rows[at])!r} that encodes to no token, wanted at least one")
        if not isinstance(encoded, ValueError) and not encoded[0]
        else encoded
        for at, encoded in enumerate(out)
    ]


def _chat(row: Mapping[str, Any], form: str, template: ChatTemplate, assistant_only: bool) -> tuple[str, list[Span]]:
    """A conversation as text, and the spans of it that are trained."""
    arguments = template_arguments(row)
    prompt = list(row["prompt"]) if form == "prompt_completion" else []
    messages = [*prompt, *row["completion"]] if prompt else row["messages"]
    if assistant_only:
        return template.answers(messages, len(prompt), **arguments)
    text = template.text(messages, **arguments)
    start = template.start(text, messages, len(prompt), **arguments) if prompt else 0
    return text, [(start, len(text))]


def _encode_plain(row: Mapping[str, Any], form: str, tokenizer: Any) -> Tokens:
    """A row of text or of ready ids."""
    if form == "input_ids":
        ids = list(as_list(row["input_ids"]))
        spans, at = [], 0
        for trained, run in groupby(_ready_mask(row, len(ids))):
            behind = at + len(list(run))
            spans += [at, behind] if trained else []
            at = behind
        return ids, spans
    if form == "text":
        ids = _with_eos(_text_ids(row["text"], tokenizer), tokenizer)
        return ids, [0, len(ids)]
    if form == "prompt":
        raise ValueError("got a prompt without an answer, wanted a 'completion' too; or let the target answer first")
    return _encode_completion(row["prompt"], row["completion"], tokenizer)


def labelled(encoded: Tokens) -> dict[str, Any]:
    """A row as trainers take it."""
    ids, spans = encoded
    labels = [IGNORE_INDEX] * len(ids)
    for begin, behind in zip(spans[::2], spans[1::2], strict=True):
        labels[begin:behind] = ids[begin:behind]
    return {"input_ids": ids, "labels": labels}


def _ready(row: Mapping[str, Any], max_length: int | None) -> dict[str, Any]:
    """A row of ready ids as trainers take it, with what it keeps. Labels that are given stay what they are."""
    ids = list(as_list(row["input_ids"]))
    labels = ids if row.get("labels") is None else as_list(row["labels"])
    mask = _ready_mask(row, len(ids))
    ready: dict[str, Any] = {"input_ids": ids}
    ready["labels"] = [label if kept else IGNORE_INDEX for label, kept in zip(labels, mask, strict=True)]
    ready |= {name: list(as_list(row[name])) for name in KEPT_COLUMNS if row.get(name) is not None}
    if row.get("hidden_states") is not None:
        ready["hidden_states"] = row["hidden_states"]
    return {name: values[:max_length] for name, values in ready.items()}


def _column(table: Any, name: str) -> Any:
    return table.data.column(name).to_numpy()


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not the loader's workers, which share the folder
        shutil.rmtree(folder, ignore_errors=True)


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
    return chat_ids(prompt, tokenizer, add_generation_prompt=True, **template_arguments(row))


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


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
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


def _encode_completion(prompt: str, completion: str, tokenizer: Any) -> Tokens:
    prompt_ids = _text_ids(prompt, tokenizer)
    ids = _with_eos(_text_ids(prompt + completion, tokenizer), tokenizer)
    start = 0
    while start < len(prompt_ids) and ids[start] == prompt_ids[start]:
        start += 1
    if start < len(prompt_ids):
        warn_merged()  # as TRL: the pair is encoded in one piece, and a token that spans both belongs to the completion
    return ids, [start, len(ids)]
