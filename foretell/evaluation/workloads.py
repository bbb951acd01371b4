"""What is measured on: Spec-Bench, GSM8K, HumanEval, MT-Bench, the demo's prompts, or any rows with prompts.

The sets themselves are not ours to ship: a name says how to read a file that the user has. Facts of their formats:
Spec-Bench (github.com/hemingkx/Spec-Bench, its question.jsonl), MT-Bench (lm-sys/FastChat, question.jsonl), GSM8K
(openai/grade-school-math, *.jsonl), HumanEval (openai/human-eval, HumanEval.jsonl).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from foretell.config import nearest
from foretell.data.chat import chat_ids
from foretell.data.formats import Problems, load_rows
from foretell.data.prompts import encode_prompt

# the eight kinds of MT-Bench's questions are one of the six of Spec-Bench
CONVERSATION = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


@dataclass(frozen=True)
class Task:
    """One conversation: what the user says in turn, or a prompt of another form (ready ids, plain text, messages)."""

    name: str  # unique in a run: the workload and the row's own number or name
    category: str
    turns: tuple[str, ...] = ()
    row: Any = None  # a row in one of TRL's forms instead


def _turns(row: dict[str, Any]) -> Sequence[str]:
    turns = row["turns"]
    if not (isinstance(turns, list) and turns and all(isinstance(turn, str) and turn for turn in turns)):
        raise ValueError(f"turns: got {str(turns)[:60]!r}, wanted a list of texts")
    return turns


def _spec_bench(row: dict[str, Any]) -> Task:
    kind = row["category"]
    return Task(str(row["question_id"]), "multi-turn" if kind in CONVERSATION else kind, tuple(_turns(row)))


def _mt_bench(row: dict[str, Any]) -> Task:
    return Task(str(row["question_id"]), row["category"], tuple(_turns(row)))


def _gsm8k(row: dict[str, Any]) -> Task:
    return Task("", "gsm8k", (row["question"],))


def _humaneval(row: dict[str, Any]) -> Task:
    return Task(row["task_id"], "humaneval", (f"Complete this Python function:\n\n{row['prompt']}",))


# name: (how a line is read, the keys that it must have)
FORMATS: dict[str, tuple[Callable[[dict[str, Any]], Task], tuple[str, ...]]] = {
    "spec-bench": (_spec_bench, ("question_id", "category", "turns")),
    "mt-bench": (_mt_bench, ("question_id", "category", "turns")),
    "gsm8k": (_gsm8k, ("question", "answer")),
    "humaneval": (_humaneval, ("task_id", "prompt", "entry_point")),
}


def load_tasks(sources: Sequence[str], limit: int | None = None) -> list[Task]:
    """The tasks of all sources: `NAME:FILE` of FORMATS, `demo` (our own eight kinds), a file, folder or dataset.

    limit: so many of each category of each source, spread evenly over it.

    Raises:
        ValueError, FileNotFoundError: an unknown name, no file, no row, rows of another format (each with its place).
    """
    tasks: list[Task] = []
    for source in sources:
        tasks += _spread(_of(source), limit)
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise ValueError(f"prompts: {task.name} stands twice in {', '.join(sources)}; name each source once.")
        seen.add(task.name)
    return tasks


def _of(source: str) -> list[Task]:
    name, colon, path = source.partition(":")
    if source == "demo":
        text = resources.files("foretell.data").joinpath("demo_prompts.jsonl").read_text(encoding="utf-8")
        rows = [row for row in map(json.loads, text.splitlines()) if row["split"] == "test"]
        return [Task(f"demo/{i}", row["category"], (row["prompt"],)) for i, row in enumerate(rows)]
    if colon and name in FORMATS:
        return list(_benchmark(name, Path(path).expanduser()))
    if not Path(source).expanduser().exists() and not colon and nearest(name, [*FORMATS, "demo"]):
        raise FileNotFoundError(f"prompts: no file {source!r}{nearest(name, [*FORMATS, 'demo'])} (as NAME:FILE)")
    kinds = load_rows(source)
    label = Path(source).stem
    return [
        Task(f"{label}/{i}", str(row.get("category") or row.get("domain") or label), row=dict(row))
        for i, row in enumerate(kinds)
    ]


def _benchmark(name: str, path: Path) -> Iterator[Task]:
    read, keys = FORMATS[name]
    if not path.is_file():
        raise FileNotFoundError(f"prompts: got {name}:{path}, which is no file; wanted {name}'s questions (JSONL).")
    problems, count = Problems(), 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or any(key not in row for key in keys):
                raise ValueError(f"got {str(row)[:60]}, wanted {name}'s keys {', '.join(keys)}")
            task = read(row)
        except ValueError as error:
            problems.add(f"{path.name}, line {number}: {error}")
            continue
        count += 1
        yield Task(f"{name}/{task.name or number}", task.category, task.turns)
    problems.close()
    if not count:
        raise ValueError(f"prompts: {path} holds no question, wanted at least one.")


def _spread(tasks: list[Task], limit: int | None) -> list[Task]:
    if limit is None:
        return tasks
    kinds: dict[str, list[int]] = {}
    for i, task in enumerate(tasks):
        kinds.setdefault(task.category, []).append(i)
    chosen = {kind[i * len(kind) // limit] for kind in kinds.values() for i in range(limit)}
    return [task for i, task in enumerate(tasks) if i in chosen]


def first_prompt(task: Task, tokenizer: Any, **template: Any) -> list[int]:
    """Token ids of what the model answers first."""
    if task.row is not None:
        return encode_prompt(task.row, tokenizer)
    return next_prompt(task, [], tokenizer, **template)


def next_prompt(task: Task, answers: Sequence[str], tokenizer: Any, **template: Any) -> list[int]:
    """Token ids of the conversation with these answers so far; without a chat template, its texts in turn.

    template: more for the tokenizer's chat template, such as enable_thinking.
    """
    if not getattr(tokenizer, "chat_template", None):
        said = [text for pair in zip(task.turns, [*answers, ""], strict=False) for text in pair]
        return tokenizer("\n".join(said[: 2 * len(answers) + 1])).input_ids
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(task.turns[: len(answers) + 1]):
        messages.append({"role": "user", "content": turn})
        if i < len(answers):
            messages.append({"role": "assistant", "content": answers[i]})
    return chat_ids(messages, tokenizer, add_generation_prompt=True, **template)
