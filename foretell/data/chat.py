"""Conversations to tokens, and which of these tokens the assistant wrote.

A mask is right when it starts where generation starts and ends with the token that ends the turn: the module then
learns on exactly the positions where it will draft.
"""

# T tokens of a conversation. Masks are lists of T zeros and ones.

from __future__ import annotations

import re
import warnings
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
        ValueError: the conversation up to there, rendered alone, is not what the whole one begins with.
    """
    context = chat_ids(messages[:turn], tokenizer, add_generation_prompt=True, **template)
    start = _shared(context, ids)
    if start < len(context):
        if not _begins_with(messages, turn, tokenizer, template, add_generation_prompt=True):
            raise ValueError(_no_prefix(turn, context, ids, tokenizer))
        warn_merged()
    return start


def warn_merged() -> None:
    """Say, once, that a token spans the end of a prompt and the start of its answer."""
    # one constant text: Python shows equal warnings once, and the next thousand rows are likely the same
    warnings.warn(
        "The last tokens of a prompt merge with its answer: in training the prompt is encoded otherwise than when the "
        "target is asked. End prompts where a token ends, for example without a trailing space.",
        stacklevel=3,
    )


def _mask_by_prefixes(messages: Sequence, tokenizer: Any, first: int, template: dict) -> tuple[list[int], list[int]]:
    """Render the conversation up to each answer and through it: what is between them is the answer."""
    ids = chat_ids(messages, tokenizer, **template)
    mask, special, end = [0] * len(ids), special_ids(tokenizer), 0
    for turn in range(first, len(messages)):
        if messages[turn]["role"] != "assistant":
            continue
        if turn == 0:
            raise ValueError("messages[0]: got an assistant turn, wanted a question or a system message before it")
        previous_end, start = end, context_length(messages, turn, ids, tokenizer, template)
        through = chat_ids(messages[: turn + 1], tokenizer, **template)
        end = _shared(through, ids)
        if end == len(through) or _begins_with(messages, turn + 1, tokenizer, template):
            end = _end_of_turn(ids[:end], start, tokenizer, special)
            # where the template closes no turn (GLM), it is the next speaker's header that ends generation
            if end < len(ids) and ids[end - 1] not in special and ids[end] in special:
                end += 1
        else:
            end = _end_found(through, start, end, ids, tokenizer, special)
        if not previous_end <= start < end:
            raise ValueError(_no_prefix(turn, through, ids, tokenizer))
        mask[start:end] = [1] * (end - start)
    return ids, mask


def _end_found(through: list[int], start: int, shared: int, ids: list[int], tokenizer: Any, special: set[int]) -> int:
    """Where an answer ends in the conversation that renders it otherwise than when it is last; 0 if that is unclear.

    Its context is the same, so the first end-of-turn token after it is its own.
    """
    end = _end_of_turn(ids[:shared], start, tokenizer, special)
    if end > start and ids[end - 1] in special:
        return end  # Phi-3: the same turn, then an end-of-text token after the last one only
    if start < shared < len(ids) and shared < len(through) and ids[shared] in special and through[shared] in special:
        return shared + 1  # gpt-oss: the last turn ends in another token
    enders = [token for token in through[start:] if token in special]
    if through[:start] == ids[:start] and enders and enders[-1] in ids[start:]:
        return ids.index(enders[-1], start) + 1  # Qwen3: reasoning stands in the last turn only
    return 0


def _shared(ids: list[int], other: list[int]) -> int:
    """Number of leading tokens that both have in common."""
    return next(
        (at for at, pair in enumerate(zip(ids, other, strict=False)) if pair[0] != pair[1]), min(len(ids), len(other))
    )


def _begins_with(messages: Sequence, count: int, tokenizer: Any, template: dict, **kwargs: Any) -> bool:
    """Whether the rendered text begins with that of the first messages: then only tokens merge at the boundary."""
    text = _apply(messages, tokenizer, tokenize=False, **template)
    return text.startswith(_apply(messages[:count], tokenizer, tokenize=False, **kwargs, **template))


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of control tokens: those the tokenizer names, and those only marked special, as `<|im_end|>` often is."""
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
    """Make each run of ones end with its end-of-turn token, whether the generation block stops before or behind it."""
    special, enders, mask = special_ids(tokenizer), {tokenizer.eos_token_id}, list(mask)
    after_last = len(mask) - mask[::-1].index(1)
    # after the last answer of a conversation only an end-of-turn token can follow, never the next speaker's header
    if ends_with_answer and after_last < len(ids) and ids[after_last] in special:
        enders.add(ids[after_last])
    start = 0
    while 1 in mask[start:]:
        start = mask.index(1, start)
        end = mask.index(0, start) if 0 in mask[start:] else len(mask)
        kept = _end_of_turn(ids[:end], start, tokenizer, special)
        if end < len(ids) and ids[end] in enders and ids[kept - 1] not in special:
            mask[end], end, kept = 1, end + 1, end + 1
        mask[kept:end] = [0] * (end - kept)
        start = end
    return mask


def _no_prefix(turn: int, rendered: list[int], ids: list[int], tokenizer: Any) -> str:
    same = _shared(rendered, ids)
    return (
        f"messages[{turn}]: the chat template renders the conversation up to this answer differently when more follows "
        f"(got {tokenizer.decode(ids[same : same + 8])!r}, alone {tokenizer.decode(rendered[same : same + 8])!r}), so "
        "the answer's tokens cannot be told from its context. Use a chat template with {% generation %} marks, or rows "
        "whose 'prompt' and 'completion' are strings"
    )


def _apply(messages: Sequence, tokenizer: Any, tokenize: bool = True, **kwargs: Any) -> Any:
    from jinja2.exceptions import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "got a conversation, but the tokenizer has no chat template. Set tokenizer.chat_template, or use rows of "
            "'text' or of 'prompt' and 'completion' strings"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=tokenize, return_dict=tokenize, **kwargs)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
