"""Prompts to a folder of answers (data/answers.py): conversations, turn by turn, by whichever engine answers.

An answer is what the model said behind exactly these tokens: its ids are kept, an end token only where it wrote one.
Earlier answers of a conversation are trained too where the template shows them as they were said, token by token;
where it does not (thinking is left out of what went before), they are read only.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from foretell.data.answers import AnswerFolder
from foretell.data.chat import chat_ids
from foretell.data.formats import Rows
from foretell.data.prompts import encode_prompt, prompts_of, template_arguments
from foretell.runtime import Progress
from foretell.training.regenerate import Answering
from foretell.types import IGNORE_INDEX, SequenceState

WAVE = 1024  # conversations that our own decoder has before it at once


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How conversations are put to the model."""

    system_prompt: str | None = None  # before conversations that have none
    template: Mapping[str, Any] | None = None  # arguments of the chat template: enable_thinking and such
    turns: Literal["all", "last"] = "all"  # which answers are made: one to each question, or the last one only
    vocab_size: int = 2**31


class Conversation:
    """One row's questions, and the answers to them so far."""

    def __init__(self, row: Mapping[str, Any], tokenizer: Any, ends: set[int], asking: Asking) -> None:
        self._tokenizer, self._ends, self._asking, self._row = tokenizer, ends, asking, row
        prompt: Any = prompts_of(row)
        self.plain = isinstance(prompt, str) or isinstance(prompt[0], int)
        if self.plain:
            text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
            self._blocks: list[list[Mapping[str, Any]]] = [[{"role": "user", "content": text}]]
        else:
            self._blocks = _questions(prompt, asking)
        self.messages: list[Mapping[str, Any]] = list(self._blocks[0])
        self._said: list[tuple[list[int], int]] = []  # ids with an answer, and where it starts
        self.turn, self.over, self.reason, self.drifted = 0, False, "", False

    def ask(self) -> list[int]:
        """Token ids behind which the model answers next.

        Raises:
            ValueError: they cannot be made.
        """
        if self.plain:
            ids = encode_prompt(self._row, self._tokenizer)
        else:
            template = {**template_arguments(self._row), **(self._asking.template or {})}
            ids = chat_ids(self.messages, self._tokenizer, add_generation_prompt=True, **template)
        if not ids or max(ids) >= self._asking.vocab_size:
            got = f"token id {max(ids)}" if ids else "no token"
            raise ValueError(f"got {got}, wanted ids below the model's vocabulary of {self._asking.vocab_size}")
        return ids

    def take(self, prompt: list[int], answer: list[int], reason: str, drifted: bool, text: str | None = None) -> None:
        """An answer to what was asked last. A cut one is the last one."""
        if text is None:
            body = answer[:-1] if answer[-1] in self._ends else answer
            text = self._tokenizer.decode(body, skip_special_tokens=True)
        self._said.append((prompt + answer, len(prompt)))
        self.messages.append({"role": "assistant", "content": text})
        self.turn, self.reason, self.drifted = self.turn + 1, reason, self.drifted or drifted
        self.over = reason == "length" or self.turn == len(self._blocks)
        if not self.over:
            self.messages += self._blocks[self.turn]

    def again(self, row: Mapping[str, Any]) -> None:
        """Take an answer that an earlier run kept."""
        (start, reason, drifted, text), ids = (row[n] for n in ("start", "finish_reason", "drifted", "answer")), row
        self.take(ids["input_ids"][:start], ids["input_ids"][start:], reason, drifted, text)

    def row(self) -> dict[str, Any]:
        """What is kept of the conversation so far."""
        ids, start = self._said[-1]
        labels = [IGNORE_INDEX] * start + ids[start:]
        for before, first in self._said[:-1]:
            if ids[: len(before)] == before:
                labels[first : len(before)] = before[first:]
        end = max(at for at, message in enumerate(self.messages) if message["role"] == "assistant")
        kept = {"input_ids": ids, "labels": labels, "messages": self.messages[: end + 1], "start": start}
        return {**kept, "answer": self.messages[end]["content"], "finish_reason": self.reason, "drifted": self.drifted}


def _questions(messages: Sequence[Mapping[str, Any]], asking: Asking) -> list[list[Mapping[str, Any]]]:
    """What is said before each answer that is to be made. Answers of the row stand only where they are not made anew:
    with turns "last", before any question, and in conversations with tools, which nobody runs here.
    """
    blocks: list[list[Mapping[str, Any]]] = [[]]
    if asking.system_prompt is not None and messages[0]["role"] not in ("system", "developer"):
        blocks[0].append({"role": "system", "content": asking.system_prompt})
    tools = any(message["role"] in ("tool", "function") or message.get("tool_calls") for message in messages)
    for message in messages:
        asked = any(before["role"] not in ("system", "developer", "assistant") for before in blocks[-1])
        if message["role"] == "assistant" and asking.turns == "all" and not tools and (asked or len(blocks) > 1):
            blocks += [[]] if asked else []
        else:
            blocks[-1].append(message)
    return blocks


Keep = Callable[..., None]  # (index, conversation, prompt, answer, finish reason, drifted=, text=, states=)
Open = Callable[[int], Conversation | None]  # a conversation as far as it was answered; None: it cannot be asked


class Engine(Protocol):
    """Who answers."""

    def run(self, indices: Sequence[int], every: Sequence[int], conversation: Open, keep: Keep, fail: Callable) -> None:
        """Answer the conversations of these indices, in any order, until each is over or has failed.

        every: all of this process's, answered or not.
        """


class OwnEngine:
    """Our own decoder, in continuous batches."""

    def __init__(self, answering: Answering, ends: set[int]) -> None:
        self.answering, self.ends = answering, ends

    def run(self, indices: Sequence[int], every: Sequence[int], conversation: Open, keep: Keep, fail: Callable) -> None:
        """See Engine. What is drawn depends on who is drawn beside it, so drawn answers are made again in whole waves,
        and those that are there already are left as they are.
        """
        draws, missing = self.answering.samples, set(indices)
        among, size = (every, self.answering.slots) if draws else (indices, WAVE)
        for first in range(0, len(among), size):
            wave = [index for index in among[first : first + size]]
            if missing.isdisjoint(wave):
                continue
            open_ = {index: made for index in wave if (made := conversation(index)) is not None}
            for turn in itertools.count():
                asked = []
                for index, one in open_.items():
                    try:
                        asked.append((one.ask(), index))
                    except ValueError as error:
                        fail(index, str(error))
                for number, batch in self.answering.batches(asked, set()):
                    leave = partial(self._leave, open_, keep)
                    self.answering.some(batch, (first * 1009 + turn) * 1009 + number, leave)
                open_ = {index: open_[index] for _, index in asked if not open_[index].over}
                if not open_:
                    break

    def _leave(
        self, open_: dict[int, Conversation], keep: Keep, index: int, sequence: SequenceState, states_TD: Tensor | None
    ) -> None:
        prompt, answer = sequence.tokens[: sequence.prompt_length], sequence.new_tokens
        cut = answer[-1] not in self.ends and len(answer) >= self.answering.settings["max_new_tokens"]
        keep(index, open_[index], prompt, answer, "length" if cut else "stop", states=states_TD)


@dataclass
class Outcome:
    """What became of a run: counts of the whole folder, and of this process's answers and failures."""

    counts: dict[str, int]
    made: int
    failures: dict[str, str]  # reason by id


def answer_prompts(
    folder: AnswerFolder,
    rows: Rows,
    tokenizer: Any,
    ends: Iterable[int],
    asking: Asking,
    engine: Engine,
    *,
    samples: int = 1,
    part: int = 0,
) -> Outcome:
    """Answer whatever the folder misses. Failures are listed in failures-N.jsonl there, and a second run tries again.

    Raises:
        ValueError: the first conversation cannot be asked.
        OSError: the disk is full. What was answered is kept.
    """
    ends, failures, draws = set(ends), {}, isinstance(engine, OwnEngine) and engine.answering.samples
    missing = set(folder.missing)

    def fail(index: int, reason: str) -> None:
        failures[folder.names[index]] = reason

    def conversation(index: int) -> Conversation | None:
        try:
            made = Conversation(rows[index // samples], tokenizer, ends, asking)
            for row in [] if draws else folder.turns(index):
                made.again(row)
            return made
        except ValueError as error:
            fail(index, f"{rows.where(index // samples)}: {error}")
            return None

    def keep(
        index: int,
        one: Conversation,
        prompt: list[int],
        answer: list[int],
        reason: str,
        drifted: bool = False,
        text: str | None = None,
        states: Tensor | None = None,
    ) -> None:
        turn = one.turn
        one.take(prompt, answer, reason, drifted, text)
        if index in missing:
            folder.append(index, turn, one.over, one.row(), states)
            bar.update(int(one.over))

    if folder.missing:
        first = conversation(folder.missing[0])
        if first is None:
            raise ValueError(failures.popitem()[1])
        first.ask()
    with Progress("answers", total=len(folder.missing), unit="answers") as bar:
        try:
            engine.run(folder.missing, folder.mine, conversation, keep, fail)
        finally:
            counts = folder.close()
    path = Path(folder.folder) / f"failures-{part}.jsonl"
    path.unlink(missing_ok=True)
    if failures:
        lines = [json.dumps({"id": name, "reason": reason}, ensure_ascii=False) for name, reason in failures.items()]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Outcome(counts, bar.done, failures)


def names_of(rows: Rows, samples: int) -> list[str]:
    """The id of each conversation that is to be made; of several samples id#1, id#2, ...

    Raises:
        ValueError: rows of the same id.
    """
    places: dict[str, int] = {}
    twice = []
    for at in range(len(rows)):
        name = str(rows[at].get("id") if rows[at].get("id") is not None else f"{at:08}")
        if name in places:
            twice.append(f"{rows.where(at)}: the id {name!r} is that of {rows.where(places[name])} too")
        places.setdefault(name, at)
    names = list(places) if samples == 1 else [f"{name}#{s}" for name in places for s in range(1, samples + 1)]
    if twice:
        raise ValueError("; ".join(twice[:10]) + f" ({len(twice)} in all). Wanted each id once.")
    if len(set(names)) < len(names):
        raise ValueError("got ids that end in #1, #2, ..., which tell samples apart, and --samples; change these ids.")
    return names
