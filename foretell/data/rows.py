"""What one row of data may look like: TRL's forms, how they are told apart, and what is wrong with a bad one."""

# T tokens of a row, D hidden width.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foretell.types import IGNORE_INDEX

# A form is known by its columns. `prompt` alone is a form only where no other is complete: many chat datasets repeat
# the first question in a column of that name.
FORMS = {
    "messages": {"messages"},
    "prompt_completion": {"prompt", "completion"},
    "text": {"text"},
    "input_ids": {"input_ids"},
}
GIVEN = "given-"  # begins the keys of texts that the target has read: their labels are what it says, not the text
MASKS = ("completion_mask", "assistant_masks", "loss_mask")
WANTED = "'messages', 'prompt' + 'completion', 'text' or 'input_ids' ('prompt' alone to be answered by the target)"


def detect_form(row: Mapping[str, Any]) -> str:
    """Name the form of a row: "messages", "prompt_completion", "text", "input_ids" or "prompt".

    A column that is None counts as absent (mixed datasets fill gaps so). Other columns are ignored.

    Raises:
        ValueError: no form is complete, or several are.
    """
    present = {name for name, value in row.items() if value is not None}
    forms = [form for form, columns in FORMS.items() if columns <= present]
    if len(forms) == 1:
        return forms[0]
    if "input_ids" in forms and {"messages", "labels"} <= present:
        return "input_ids"  # encoded, and what is trained is said; the messages are for people
    if len(forms) > 1:
        columns = sorted(set().union(*(FORMS[form] for form in forms)))
        raise ValueError(f"ambiguous row: got the columns {columns}, wanted one form only; drop all but one")
    if "prompt" in present:
        return "prompt"
    hint = "; rename 'conversations' to 'messages' with 'role' and 'content'" if "conversations" in present else ""
    raise ValueError(f"unknown form: got the columns {sorted(present)}, wanted {WANTED}{hint}")


def check_row(row: Any) -> str:
    """Return the form of a row after checking its values.

    Raises:
        ValueError: the first problem: what came, what was wanted.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"got {_shown(row)}, wanted an object with {WANTED}")
    form = detect_form(row)
    if form == "messages":
        check_messages("messages", row["messages"])
    elif form == "text":
        _check_string("text", row["text"])
    elif form == "input_ids":
        _check_ready(row)
    elif isinstance(row["prompt"], str):
        _check_string("prompt", row["prompt"])
        if form == "prompt_completion":
            _check_string("completion", row["completion"])
    else:
        check_messages("prompt", row["prompt"])
        if form == "prompt_completion":
            check_messages("completion", row["completion"])
    return form


def as_list(values: Any) -> Any:
    """A tensor or array as a plain list; anything else unchanged."""
    return values.tolist() if hasattr(values, "tolist") else values


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _check_string(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}: got {_shown(value)}, wanted a string")
    if not value.strip():
        raise ValueError(f"{name}: got an empty string, wanted text")


def check_messages(name: str, messages: Any) -> None:
    """Raise ValueError where these are no messages."""
    if not isinstance(messages, list | tuple):
        raise ValueError(f"{name}: got {_shown(messages)}, wanted a list of {{'role', 'content'}}")
    if not messages:
        raise ValueError(f"{name}: got an empty list, wanted at least one message")
    blank = True
    for index, message in enumerate(messages):
        place = f"{name}[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{place}: got {_shown(message)}, wanted {{'role', 'content'}}")
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        if not isinstance(role, str) or not role:
            raise ValueError(f"{place}: got the role {_shown(role)}, wanted 'system', 'user' or 'assistant'")
        # a turn that only calls a tool has no content
        if not isinstance(content, str) and not (content is None and calls):
            raise ValueError(f"{place}: got the content {_shown(content)}, wanted a string")
        blank = blank and not calls and not content.strip()
    if blank:
        raise ValueError(f"{name}: every message is empty, wanted text")


def _check_ready(row: Mapping[str, Any]) -> None:
    ids = as_list(row["input_ids"])
    if not isinstance(ids, list | tuple) or not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f"input_ids: got {_shown(ids)}, wanted a flat list of token ids")
    if not ids:
        raise ValueError("input_ids: got an empty list, wanted at least one token")
    for name in ("labels", *MASKS, "attention_mask", "document_ids", "position_ids"):
        values = as_list(row.get(name))
        if values is None:
            continue
        if not isinstance(values, list | tuple) or len(values) != len(ids):
            count = len(values) if isinstance(values, list | tuple) else _shown(values)
            raise ValueError(f"{name}: got {count} values, wanted one for each of the {len(ids)} input_ids")
        if name in MASKS and not set(values) <= {0, 1}:
            raise ValueError(f"{name}: got {sorted(set(values) - {0, 1})[:3]}, wanted 0 or 1")
        if name == "attention_mask" and not all(values):
            raise ValueError("attention_mask: got zeros, wanted unpadded rows; padding is added batch by batch")
        if name == "labels" and not str(row.get("key")).startswith(GIVEN):
            # a shifted label column is the commonest silent mistake, and this is the only place that can see it
            for at, (label, token) in enumerate(zip(values, ids, strict=True)):
                if label not in (IGNORE_INDEX, token):
                    raise ValueError(
                        f"labels[{at}]: got {label}, wanted input_ids[{at}] = {token} or {IGNORE_INDEX}; labels are "
                        "token-aligned as in transformers, not shifted"
                    )
    hidden_TD = row.get("hidden_states")
    if hidden_TD is not None and len(hidden_TD) != len(ids):
        raise ValueError(f"hidden_states: got {len(hidden_TD)} states, wanted one for each of the {len(ids)} input_ids")
