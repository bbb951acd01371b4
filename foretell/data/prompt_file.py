"""Any source of prompts to one clean file of them: {"messages", "id", "domain", "source"} a line.

Sources are read twice: first every row is judged, and of those that stay a place, a domain and a number by chance are
held; then the chosen ones are read again and written. Whatever is dropped is counted under the step that dropped it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from foretell.data.chat import ChatTemplate, without_none
from foretell.data.formats import Problems, open_source
from foretell.data.prompts import template_arguments
from foretell.data.rows import check_messages

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "observation": "tool"}
QUESTIONS = ("prompt", "question", "query", "problem", "input")  # columns of a text, the first that there is
DEDUPE = ("exact", "normalised", "near")  # each does what those before it do
NGRAM = 13  # words that a prompt must not share with an evaluation set
SHINGLE, PERMUTATIONS, ALIKE = 3, 128, 0.8  # words; MinHash; Jaccard similarity from which two prompts are one
NEARBY = 0.6  # similarity from which prompts are compared: nearly all of those at ALIKE are then found
BATCH = 256  # rows that are tokenized together
COLUMNS = ("part i", "row q", "chance Q", "size q", "tokens q")  # that are held of each prompt, and their types
STEPS = ("bad row", "other turns", "length", "duplicate", "near-duplicate", "in an evaluation set", "quota or limit")

BESIDE = ("tools", "chat_template_kwargs")  # columns that belong to the question
Messages = list[dict[str, Any]]
Prompt = dict[str, Any]  # messages, and what is BESIDE them

# What seed preparations of two published data sets do: which turns, which domain, how many of each.
CODE = re.compile(
    r"(?is)^(generate an executable python function)(.*?(after the definition\.|final solution\.|\n))?\s*"
)
BOXED = re.compile(r"(?i)^return your final response within \\boxed\{\}\.?\s*")
CODE_MIX = {
    "Write a Python program that reads its input from stdin and prints the answer.\n\n": 0.6,
    "Write a Python function that solves this problem.\n\n": 0.4,
}
AM_DOMAINS = {"other": "chat", "math": "math", "code": "code", "science": "science", "if": "if"}


def openthoughts(messages: Messages, file: str) -> tuple[Messages, str]:
    """The first question; code and mathematics are known by the instruction before them, which is taken off."""
    text = next(message["content"] for message in messages if message["role"] == "user").strip()
    if CODE.match(text):
        text, at, mixed = CODE.sub("", text, count=1), _chance(text) / 2**64, 0.0
        for instruction, share in CODE_MIX.items():
            mixed += share
            if at < mixed:
                return [{"role": "user", "content": instruction + text}], "code"
    domain = "math" if BOXED.match(text) else "other"
    return [{"role": "user", "content": BOXED.sub("", text)}], domain


def am_qwen3(messages: Messages, file: str) -> tuple[Messages, str] | None:
    """The question of conversations with one; the domain is the file's name."""
    domain = AM_DOMAINS.get(file.partition(".")[0])
    if domain is None:
        raise ValueError(f"got the file {file}, wanted {', '.join(f'{name}.jsonl' for name in AM_DOMAINS)}")
    asked = [{"role": "user", "content": message["content"]} for message in messages if message["role"] == "user"]
    return (asked, domain) if len(asked) == 1 else None


AM_QUOTAS = {"chat": 0.0, "math": 0.536, "code": 0.311, "science": 0.153, "if": 0.0}
# what chooses turns and domain; quotas; limit
PRESETS: dict[str, tuple[Callable[[Messages, str], tuple[Messages, str] | None], dict[str, float], int | None]] = {
    "openthoughts": (openthoughts, {}, None),
    "am_qwen3": (am_qwen3, AM_QUOTAS, 122_880),
}


def messages_of(row: Any, column: str | None = None) -> Messages:
    """The conversation of a row of any form, with answers where it has them as messages.

    Forms: `messages`; ShareGPT (`conversations` of `from` and `value`); Alpaca (`instruction`, `input`); one of
    QUESTIONS, text or messages; or the column that is named. A text in `system` becomes the first message.

    Raises:
        ValueError: nothing of that, or messages that are none.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"got {type(row).__name__}, wanted an object")
    turns = ("messages", "conversations", "conversation")
    names = (column,) if column else (*turns, "instruction", *QUESTIONS)
    name = next((name for name in names if row.get(name)), None)
    if name is None:
        raise ValueError(f"got the columns {sorted(map(str, row))}, wanted one of {', '.join(names)} with a prompt")
    found = row[name]
    if isinstance(found, str):
        more = row.get("input") if name == "instruction" else None
        found = [{"role": "user", "content": f"{found}\n\n{more}" if more else found}]
    if isinstance(found, Sequence):
        found = [_message(turn) if isinstance(turn, Mapping) else turn for turn in found]
    check_messages(name, found)
    if isinstance(row.get("system"), str) and row["system"].strip() and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": row["system"]})
    return found


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    turn = {{"from": "role", "value": "content"}.get(name, name): value for name, value in without_none(turn).items()}
    return {**turn, "role": ROLES.get(str(turn.get("role")), turn.get("role"))}


def without_answer(messages: Messages) -> Messages:
    """What the target is asked: all up to the last question. Raises ValueError where there is none."""
    end = next((at for at in range(len(messages), 0, -1) if messages[at - 1]["role"] != "assistant"), 0)
    if not end or not any(message["role"] == "user" for message in messages[:end]):
        raise ValueError("got messages without a question, wanted a user's")
    return messages[:end]


@dataclass(kw_only=True)
class PromptRules:
    """Which prompts stay."""

    preset: str | None = field(default=None, metadata={"help": f"Turns, domains and quotas of {', '.join(PRESETS)}."})
    column: str | None = field(default=None, metadata={"help": "Column of the prompt; by default the usual names."})
    limit: int | None = field(default=None, metadata={"help": "Prompts at most, chosen by chance."})
    quota: list[str] = field(
        default_factory=list, metadata={"help": "domain=number, or domain=share of the limit; 0 leaves a domain out."}
    )
    seed: int = field(default=0, metadata={"help": "Of the choice."})
    dedupe: str = field(default="normalised", metadata={"help": f"{', '.join(DEDUPE)} (MinHash)."})
    exclude: list[str] = field(
        default_factory=list,
        metadata={"help": f"Evaluation sets: prompts that share {NGRAM} words in a row with one are left out."},
    )
    model: str | None = field(default=None, metadata={"help": "Whose tokenizer counts tokens."})
    min_tokens: int = field(default=0, metadata={"help": "Shortest prompt, rendered."})
    max_tokens: int | None = field(default=None, metadata={"help": "Longest prompt, rendered."})
    skip_bad_rows: int = field(default=0, metadata={"help": "Bad rows that are left out, at most."})

    def problems(self) -> list[str]:
        """See config.check."""
        found = []
        if self.preset is not None and self.preset not in PRESETS:
            found.append(f"preset: got {self.preset!r}, wanted one of {', '.join(PRESETS)}.")
        if self.dedupe not in DEDUPE:
            found.append(f"dedupe: got {self.dedupe!r}, wanted one of {', '.join(DEDUPE)}.")
        if (self.min_tokens or self.max_tokens is not None) and self.model is None:
            found.append("min_tokens, max_tokens: got no model, wanted --model: its tokenizer counts.")
        if self.limit is not None and self.limit < 1:
            found.append(f"limit: got {self.limit}, wanted at least 1.")
        try:
            quotas = self.quotas()
            if any(0 < quota < 1 for quota in quotas.values()) and self.wanted() is None:
                found.append("quota: got a share and no limit, wanted --limit.")
        except ValueError:
            found.append(f"quota: got {' '.join(self.quota)}, wanted domain=number or domain=share, as code=0.3.")
        return found

    def wanted(self) -> int | None:
        """The limit, given or the preset's."""
        return self.limit if self.limit is not None or self.preset is None else PRESETS[self.preset][2]

    def quotas(self) -> dict[str, float]:
        """Of domains: numbers of prompts, or shares below 1 of the limit."""
        given = {name: float(number) for name, _, number in (text.rpartition("=") for text in self.quota)}
        if any(not name or number < 0 for name, number in given.items()):
            raise ValueError
        return given or (dict(PRESETS[self.preset][1]) if self.preset in PRESETS else {})


class PromptSet:
    """The prompts of some sources that rules let stay, and what became of all the others."""

    def __init__(self, sources: Sequence[Any], rules: PromptRules, tokenizer: Any = None):
        """Reads everything once. Raises ValueError for bad rows, and where nothing is left."""
        self.rules, self._tokenizer = rules, tokenizer
        self._template = ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None
        self._problems = Problems(rules.skip_bad_rows)
        self._parts = [part for source in sources for part in open_source(source, "train")[0]]
        self.read, self.dropped, self.found = 0, Counter(), Counter()
        self.overlaps: dict[str, list[str]] = {name: [] for name in rules.exclude}  # where prompts were that do
        self._evaluations = {name: _grams_of_set(name) for name in rules.exclude}
        self._seen: set[bytes] = set()
        self._near: Any = None
        self._hashes: list[Any] = []  # of prompts that are near no earlier one
        self._kept = {name: array(kind) for name, kind in map(str.split, COLUMNS)}
        self._domains: list[str] = []
        for at, index, prompt, domain, tokens in self._judged():
            size, chance = len(self._line(at, index, prompt, domain)), _chance(rules.seed, _id(prompt))
            for column, value in zip(self._kept.values(), (at, index, chance, size, tokens), strict=True):
                column.append(value)
            self.found[domain] += 1
            self._domains.append(sys.intern(domain))
        self._problems.close()
        self.chosen = self._choose()
        self.dropped["quota or limit"] = len(self._domains) - len(self.chosen)
        if not self.chosen:
            raise ValueError(f"no prompt is left: {self.steps()}. Wanted at least one; loosen what dropped them.")
        self.bytes = sum(self._kept["size"][at] for at in self.chosen)

    def _judged(self) -> Iterator[tuple[int, int, Prompt, str, int]]:
        rows = ((at, index) for at, part in enumerate(self._parts) for index in range(len(part)))
        while some := list(islice(rows, BATCH)):
            self.read += len(some)
            judged = [(at, index, *found) for at, index in some if (found := self._prompt(at, index)) is not None]
            counts = [0] * len(judged)  # where nobody counts
            if self._tokenizer is not None and judged:
                special = self._template is None
                encoded = self._tokenizer([text for *_, text in judged], add_special_tokens=special)
                counts = [len(ids) for ids in encoded["input_ids"]]
            for (at, index, prompt, domain, _), tokens in zip(judged, counts, strict=True):
                step = self._against(prompt, tokens, self._parts[at].where(index))
                if step is None:
                    yield at, index, prompt, domain, tokens
                else:
                    self.dropped[step] += 1

    def _prompt(self, at: int, index: int) -> tuple[Prompt, str, str] | None:
        """A row's prompt, its domain, and how the target is asked; None, counted, where there is none."""
        part = self._parts[at]
        try:
            row = part[index]
            messages = without_answer(messages_of(row, self.rules.column))
            domain = row.get("domain") or row.get("category") or "all"
            prompt = {"messages": messages, **{name: without_none(row[name]) for name in BESIDE if row.get(name)}}
            if self.rules.preset is not None:
                found = PRESETS[self.rules.preset][0](messages, part.name)
                if found is None:
                    self.dropped["other turns"] += 1
                    return None
                prompt, domain = {"messages": found[0]}, found[1]
            if self._template is None:
                return prompt, str(domain), "\n".join(str(m.get("content") or "") for m in prompt["messages"])
            more = template_arguments(prompt)
            return prompt, str(domain), self._template.text(prompt["messages"], add_generation_prompt=True, **more)
        except ValueError as error:
            self._problems.add(f"{part.where(index)}: {error}")
            self.dropped["bad row"] += 1
            return None

    def _against(self, prompt: Prompt, tokens: int, place: str) -> str | None:
        """The step that drops this prompt."""
        rules, words = self.rules, [_words(str(message.get("content") or "")) for message in prompt["messages"]]
        if self._tokenizer is not None and not rules.min_tokens <= tokens <= (rules.max_tokens or tokens):
            return "length"
        loosely = rules.dedupe != "exact" and any(words)
        key = repr((words, [prompt.get(name) for name in BESIDE])) if loosely else _id(prompt)
        digest = hashlib.sha256(key.encode()).digest()[:16]
        if digest in self._seen:
            return "duplicate"
        self._seen.add(digest)
        for name, grams in self._evaluations.items():
            if any(not grams.isdisjoint(_grams(some)) for some in words):
                self.overlaps[name].append(place)
                return "in an evaluation set"
        return "near-duplicate" if rules.dedupe == "near" and self._is_near(list(chain.from_iterable(words))) else None

    def _is_near(self, words: list[str]) -> bool:
        try:
            from datasketch import LeanMinHash, MinHash, MinHashLSH
        except ImportError as error:
            raise ValueError("dedupe: near needs datasketch: pip install 'foretell[data]'.") from error
        self._near = self._near or MinHashLSH(threshold=NEARBY, num_perm=PERMUTATIONS)
        made = MinHash(num_perm=PERMUTATIONS)
        made.update_batch([" ".join(words[i : i + SHINGLE]).encode() for i in range(max(1, len(words) - SHINGLE + 1))])
        alike = any(self._hashes[at].jaccard(made) >= ALIKE for at in self._near.query(made))
        if not alike:
            self._near.insert(len(self._hashes), made)
            self._hashes.append(LeanMinHash(made))
        return alike

    def _choose(self) -> list[int]:
        """Of each domain as many as its quota says, of all as many as the limit, by chance, in the order of reading."""
        quotas, limit = self.rules.quotas(), self.rules.wanted()
        shares = {name: quota * limit for name, quota in quotas.items() if 0 < quota < 1 and limit is not None}
        self.room = {name: int(shares.get(name, quota)) for name, quota in quotas.items()}
        # what rounding took goes to those that lost most
        missing = round(sum(shares.values())) - sum(self.room[name] for name in shares)
        for name in sorted(shares, key=lambda name: self.room[name] - shares[name])[:missing]:
            self.room[name] += 1
        chosen: list[int] = []
        for at in sorted(range(len(self._domains)), key=self._kept["chance"].__getitem__):
            name = self._domains[at]
            if len(chosen) == limit or self.room.get(name) == 0:
                continue
            if name in self.room:
                self.room[name] -= 1
            chosen.append(at)
        return sorted(chosen)

    def steps(self) -> dict[str, int]:
        """Counts of rows: read, dropped at each step, kept."""
        return {"read": self.read, **{step: self.dropped[step] for step in STEPS}, "kept": len(self.chosen)}

    def report(self) -> dict[str, Any]:
        """All counts, as JSON takes them."""
        kept = Counter(self._domains[at] for at in self.chosen)
        tokens = [self._kept["tokens"][at] for at in self.chosen]
        counted = {"all": sum(tokens), "shortest": min(tokens), "longest": max(tokens)}
        return {
            "steps": self.steps(),
            "domains": {name: {"found": self.found[name], "kept": kept[name]} for name in sorted(self.found)},
            "missing_of_quotas": {name: left for name, left in self.room.items() if left},
            "overlaps": {name: {"prompts": len(at), "first": at[:5]} for name, at in self.overlaps.items()},
            "bad_rows": self._problems.lines,
            "tokens": counted if self._tokenizer is not None else None,
            "bytes": self.bytes,
        }

    def write(self, path: str | Path) -> str:
        """Write the file, whole or not at all, and return its SHA-256."""
        path, digest = Path(path), hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}-{os.getpid()}")
        try:
            with part.open("wb") as file:
                for at in self.chosen:
                    where = self._kept["part"][at], self._kept["row"][at]
                    found = self._prompt(*where)
                    line = b"" if found is None else self._line(*where, *found[:2])
                    if len(line) != self._kept["size"][at]:
                        raise ValueError(f"{self._parts[where[0]].where(where[1])}: changed while it was read.")
                    file.write(line)
                    digest.update(line)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        return digest.hexdigest()

    def _line(self, at: int, index: int, prompt: Prompt, domain: str) -> bytes:
        row = {**prompt, "id": _id(prompt), "domain": domain, "source": self._parts[at].where(index)}
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _id(prompt: Prompt) -> str:
    told = json.dumps(prompt if len(prompt) > 1 else prompt["messages"], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _chance(*of: Any) -> int:
    """A number below 2**64 that only depends on this."""
    return int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:8])


def _words(text: str) -> list[str]:
    """What is left when case, spaces and punctuation do not count."""
    return re.findall(r"\w+", text.casefold())


def _grams(words: list[str]) -> set[int]:
    return {hash(" ".join(words[at : at + NGRAM])) for at in range(max(1, len(words) - NGRAM + 1))} if words else set()


def _grams_of_set(source: str) -> set[int]:
    """Of every text in every row of an evaluation set, whatever its columns are."""
    parts, _ = open_source(source, "test")
    return set().union(*(_grams(_words(text)) for part in parts for row in part for text in _texts(row)))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)
