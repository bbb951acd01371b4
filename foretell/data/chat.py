"""Conversations to tokens, and which of these tokens the assistant wrote.

A mask is right when it starts where generation starts and ends with the token that ends the turn: the module then
learns on exactly the positions where it will draft.
"""

# T tokens of a conversation. Masks are lists of T zeros and ones.

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_ids(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, *, add_generation_prompt: bool = False, **template: Any
) -> list[int]:
    """Render a conversation with the tokenizer's chat template and return its token ids.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses this conversation.
    """
    return list(_apply(messages, tokenizer, add_generation_prompt=add_generation_prompt, **template)["input_ids"])


def chat_ids_and_mask(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, *, first: int = 0, **template: Any
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and 1 on every token that the assistant wrote, its end-of-turn token included.

    Args:
        messages: the whole conversation.
        tokenizer: with a chat template.
        first: assistant messages before this index are context (their mask is 0).
        **template: passed to the chat template: tools, enable_thinking, ...

    Raises:
        ValueError: the template renders the context of an answer differently once the answer follows it.
    """
    if GENERATION_TAG.search(str(tokenizer.chat_template)) and tokenizer.is_fast:
        encoded = _apply(messages, tokenizer, return_assistant_tokens_mask=True, **template)
        ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
        if any(mask):
            mask = _with_end_of_turn(ids, mask, tokenizer, messages[-1]["role"] == "assistant")
            start = context_length(messages, first, ids, tokenizer, template) if first else 0
            return ids, [0] * start + mask[start:]
    return _mask_by_prefixes(messages, tokenizer, first, template)


def context_length(messages: Sequence, turn: int, ids: list[int], tokenizer: Any, template: dict) -> int:
    """Number of tokens in ids, the whole conversation, before the answer messages[turn] starts.

    Raises:
        ValueError: the conversation up to there is not what ids begin with.
    """
    context = chat_ids(messages[:turn], tokenizer, add_generation_prompt=True, **template)
    if ids[: len(context)] != context:
        raise ValueError(_no_prefix(turn, context, ids, tokenizer))
    return len(context)


def _mask_by_prefixes(messages: Sequence, tokenizer: Any, first: int, template: dict) -> tuple[list[int], list[int]]:
    """Render the conversation up to each answer and through it: what is between them is the answer."""
    ids = chat_ids(messages, tokenizer, **template)
    mask, special = [0] * len(ids), special_ids(tokenizer)
    turns = [at for at in range(first, len(messages)) if messages[at]["role"] == "assistant"]
    end = 0
    for at in turns:
        if at == 0:
            raise ValueError("messages[0]: got an assistant turn, wanted a question or a system message before it")
        start = context_length(messages, at, ids, tokenizer, template)
        if start < end:
            raise ValueError(_no_prefix(at, ids[:start], ids, tokenizer))
        through = chat_ids(messages[: at + 1], tokenizer, **template)
        end = _end_of_turn(through, start, tokenizer, special)
        if ids[:end] != through[:end]:
            # templates that drop reasoning from earlier turns (Qwen3) render an answer differently once another
            # question follows; its context is the same, so it ends at the first end-of-turn token
            ender = through[end - 1]
            if through[:start] != ids[:start] or ender not in special or ender not in ids[start:]:
                raise ValueError(_no_prefix(at, through, ids, tokenizer))
            end = ids.index(ender, start) + 1
        mask[start:end] = [1] * (end - start)
    return ids, mask


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of control tokens: those the tokenizer names, and added ones marked special (`<|im_end|>` often is only
    that)."""
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return added | set(tokenizer.all_special_ids)


def _end_of_turn(ids: list[int], start: int, tokenizer: Any, special: set[int]) -> int:
    """Where the answer that starts at `start` and runs to the end of ids really ends.

    ChatML writes a newline after the end-of-turn token. Nobody generates it, so it is not trained.
    """
    last = max((at for at in range(start, len(ids)) if ids[at] in special), default=None)
    if last is None or tokenizer.decode(ids[last + 1 :]).strip():
        return len(ids)
    return last + 1


def _with_end_of_turn(ids: list[int], mask: list[int], tokenizer: Any, ends_with_answer: bool) -> list[int]:
    """Add the end-of-turn token to each run of ones where the template's generation block stops short of it."""
    enders = {tokenizer.eos_token_id}
    after_last = len(mask) - mask[::-1].index(1)
    # after the last answer of a conversation only an end-of-turn token can follow, never the next speaker's header
    if ends_with_answer and after_last < len(ids) and ids[after_last] in special_ids(tokenizer):
        enders.add(ids[after_last])
    return [
        int(marked or (at > 0 and mask[at - 1] == 1 and ids[at - 1] not in enders and ids[at] in enders))
        for at, marked in enumerate(mask)
    ]


def _no_prefix(turn: int, rendered: list[int], ids: list[int], tokenizer: Any) -> str:
    same = next((at for at, pair in enumerate(zip(rendered, ids, strict=False)) if pair[0] != pair[1]), len(ids))
    return (
        f"messages[{turn}]: the chat template renders the conversation up to this answer differently when more follows "
        f"(got {tokenizer.decode(ids[same : same + 8])!r}, alone {tokenizer.decode(rendered[same : same + 8])!r}), so "
        "the answer's tokens cannot be told from its context. Use a chat template with {% generation %} marks, or one "
        "row for each answer (prompt and completion)"
    )


def _apply(messages: Sequence, tokenizer: Any, **kwargs: Any) -> Mapping[str, Any]:
    from jinja2.exceptions import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "got a conversation, but the tokenizer has no chat template. Set tokenizer.chat_template, or use rows of "
            "'text' or of 'prompt' and 'completion' strings"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **kwargs)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
