"""The chat templates that people have: what is trained is what the model would have to write, whatever they do to it.

TRL's copies of the published templates are used where it has them; the others are small ones of the same shape.
"""

# ruff: noqa: RUF001 DeepSeek's control tokens are written with full-width bars

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foretell.data.chat import ChatTemplate
from foretell.data.formats import load_rows
from foretell.data.prompts import encode_prompt, encode_rows
from tests.twins import encode_row, preview

TRL = Path(trl.__file__).parent / "chat_templates"

# control tokens; then added ones that are not special; then the one that ends a text
CHATML = ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>", "<tool_call>", "</tool_call>"], "<|im_end|>"
DEEPSEEK = (
    ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
    + [f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")]
    + [f"<｜tool▁{name}｜>" for name in ("outputs▁begin", "output▁begin", "output▁end", "outputs▁end")],
    ["<think>", "</think>"],
    "<｜end▁of▁sentence｜>",
)
GLM = (
    ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"],
    ["<think>", "</think>", "<tool_call>", "</tool_call>"],
    "<|endoftext|>",
)
GPT_OSS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"], [], "<|return|>"
PHI = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<|im_sep|>"], [], "<|endoftext|>"
GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], [], "<eos>"
LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], [], "<|eot_id|>"
LLAMA_4 = ["<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>"], [], "<|eot|>"
MISTRAL = ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], [], "</s>"
UNKNOWN = ["<eos>"], ["<turn>", "</turn>"], "<eos>"

# Mistral: no generation prompt, the instruction's closing token asks; the end is the text's own; calls are a list
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}"
    "[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.role == 'assistant' and m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}{% endfor %}]{{ eos_token }}"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Phi-4: another token than its neighbours' newline behind the role
PHI_4_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|><|im_sep|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><|im_sep|>{% endif %}"
)
# SmolLM3: a system message of its own that says how to think, and reasoning that earlier turns do not show
SMOLLM3_TEMPLATE = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}<|im_start|>system\nReasoning: {{ '/think' if enable_thinking | default(true) else '/no' }}"
    "\n{{ messages[0].content if messages[0].role == 'system' else 'You are helpful.' }}<|im_end|>\n"
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{% if m.tool_calls %}<tool_call>{{ m.tool_calls[0].function.arguments | tojson }}</tool_call>"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking | default(true) %}<think>\n\n</think>\n{% endif %}{% endif %}"
)
# Llama-4: calls end a message, answers end a turn
LLAMA_4_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>\n\n"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}<|eom|>"
    "{% else %}{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)
# one that nobody knows: an end that is not marked special, only between turns, and no half conversations
UNKNOWN_TEMPLATE = (
    "{% if messages[-1].role == 'tool' %}{{ raise_exception('a tool result needs its answer') }}{% endif %}"
    "{% for m in messages %}<turn>{{ m.role }}: {% if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}"
    "{% else %}{{ m.content }}{% endif %}{% if not loop.last %}</turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}</turn>\n<turn>assistant: {% endif %}"
)


def tokenizer_of(template: str, tokens: tuple[list[str], list[str], str]) -> PreTrainedTokenizerFast:
    """Bytes, two newlines as one token (so that tokens can merge over a border), and the control tokens."""
    special, added, eos = tokens
    vocabulary = {byte: at for at, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["ĊĊ"] = len(vocabulary)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=special[0], eos_token=eos)
    path = TRL / f"{template}.jinja"
    fast.chat_template = path.read_text(encoding="utf-8") if "{" not in template else template
    return fast


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str, reasoning: str | None = None, **more: object) -> dict:
    thought = {} if reasoning is None else {"reasoning_content": reasoning, "thinking": reasoning}
    return {"role": "assistant", "content": content, **thought, **more}


CALL = [{"type": "function", "id": "abcdefghi", "function": {"name": "look", "arguments": {"city": "Oslo"}}}]
RESULT = {"role": "tool", "name": "look", "tool_call_id": "abcdefghi", "content": "cold"}
TURNS = [user("Hi?"), assistant("One."), user("And?"), assistant("Two.")]
THOUGHT = [user("Hi?"), assistant("One.", "r1"), user("And?"), assistant("Two.", "r2")]
CALLS = [user("Hi?"), assistant("", tool_calls=CALL), RESULT, assistant("Cold.", "r2")]

ARGUMENTS = '{"city": "Oslo"}'
QWEN_CALL = f'<tool_call>\n{{"name": "look", "arguments": {ARGUMENTS}}}\n</tool_call><|im_end|>'
XML_CALL = "<tool_call>\n<function=look>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
GLM_CALL = "<tool_call>look\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call><|observation|>"
DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n" + ARGUMENTS + "\n```"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
)
EMPTY = "<think>\n\n</think>\n\n"
# the generation prompt opens the reasoning; two newlines are one token, so the prompt's last one is the answer's first
CLOSING = "\n\n</think>\n\n"

# template, its tokens; what is trained of TURNS, of THOUGHT, of CALLS (None: the template knows no calls)
CASES = {
    "qwen3": (
        CHATML,
        ["One.<|im_end|>", EMPTY + "Two.<|im_end|>"],
        ["One.<|im_end|>", "<think>\nr2\n</think>\n\nTwo.<|im_end|>"],
        [QWEN_CALL, "<think>\nr2\n</think>\n\nCold.<|im_end|>"],
    ),
    "qwen3_training": (
        CHATML,
        [EMPTY + "One.<|im_end|>", EMPTY + "Two.<|im_end|>"],
        ["<think>\nr1\n</think>\n\nOne.<|im_end|>", "<think>\nr2\n</think>\n\nTwo.<|im_end|>"],
        [EMPTY + QWEN_CALL, "<think>\nr2\n</think>\n\nCold.<|im_end|>"],
    ),
    "qwen3_5_think": (
        CHATML,
        ["One.<|im_end|>", CLOSING + "Two.<|im_end|>"],
        ["One.<|im_end|>", "r2\n</think>\n\nTwo.<|im_end|>"],
        [CLOSING + XML_CALL + "<|im_end|>", "r2\n</think>\n\nCold.<|im_end|>"],
    ),
    "qwen3_6_training": (
        CHATML,
        [CLOSING + "One.<|im_end|>", CLOSING + "Two.<|im_end|>"],
        ["r1\n</think>\n\nOne.<|im_end|>", "r2\n</think>\n\nTwo.<|im_end|>"],
        [CLOSING + XML_CALL + "<|im_end|>", "r2\n</think>\n\nCold.<|im_end|>"],
    ),
    "qwen3_6": (
        CHATML,
        ["One.<|im_end|>", CLOSING + "Two.<|im_end|>"],
        ["One.<|im_end|>", "r2\n</think>\n\nTwo.<|im_end|>"],
        [CLOSING + XML_CALL + "<|im_end|>", "r2\n</think>\n\nCold.<|im_end|>"],
    ),
    "nemotron_3_nano": (
        CHATML,
        ["</think>One.<|im_end|>", "</think>Two.<|im_end|>"],
        ["</think>\nOne.<|im_end|>", "r2\n</think>\nTwo.<|im_end|>"],
        ["</think>\n" + XML_CALL + "\n<|im_end|>", "r2\n</think>\nCold.<|im_end|>"],
    ),
    "deepseekv3": (
        DEEPSEEK,
        ["One.<｜end▁of▁sentence｜>", "Two.<｜end▁of▁sentence｜>"],
        ["One.<｜end▁of▁sentence｜>", "Two.<｜end▁of▁sentence｜>"],
        [DEEPSEEK_CALL, "Cold.<｜end▁of▁sentence｜>"],
    ),
    "deepseekv3_training": (
        DEEPSEEK,
        ["One.<｜end▁of▁sentence｜>", "Two.<｜end▁of▁sentence｜>"],
        ["One.<｜end▁of▁sentence｜>", "Two.<｜end▁of▁sentence｜>"],
        [DEEPSEEK_CALL, "Cold.<｜end▁of▁sentence｜>"],
    ),
    "deepseek_r1_distill": (
        DEEPSEEK,
        ["One.<｜end▁of▁sentence｜>", "Two.<｜end▁of▁sentence｜>"],
        ["One.<｜end▁of▁sentence｜>", "Two.<｜end▁of▁sentence｜>"],
        None,
    ),
    "glm4moe": (
        GLM,
        ["\n<think></think>\nOne.<|user|>", "\n<think></think>\nTwo.<|user|>"],
        ["\n<think></think>\nOne.<|user|>", "\n<think>r2</think>\nTwo.<|user|>"],
        ["\n<think></think>\n" + GLM_CALL, "\n<think>r2</think>\nCold.<|user|>"],
    ),
    "glm4moe_training": (
        GLM,
        ["\n<think></think>\nOne.<|user|>", "\n<think></think>\nTwo.<|user|>"],
        ["\n<think></think>\nOne.<|user|>", "\n<think>r2</think>\nTwo.<|user|>"],
        ["\n<think></think>\n" + GLM_CALL, "\n<think>r2</think>\nCold.<|user|>"],
    ),
    "gptoss": (
        GPT_OSS,
        ["<|channel|>final<|message|>One.<|end|>", "<|channel|>final<|message|>Two.<|return|>"],
        [
            "<|channel|>final<|message|>One.<|end|>",
            "<|channel|>analysis<|message|>r2<|end|><|start|>assistant<|channel|>final<|message|>Two.<|return|>",
        ],
        [
            " to=functions.look<|channel|>commentary json<|message|>" + ARGUMENTS + "<|call|>",
            "<|channel|>analysis<|message|>r2<|end|><|start|>assistant<|channel|>final<|message|>Cold.<|return|>",
        ],
    ),
    "phi3": (PHI, ["One.<|end|>", "Two.<|end|>"], ["One.<|end|>", "Two.<|end|>"], None),
    "phi3_training": (PHI, ["One.<|end|>", "Two.<|end|>"], ["One.<|end|>", "Two.<|end|>"], None),
    PHI_4_TEMPLATE: (PHI, ["One.<|end|>", "Two.<|end|>"], ["One.<|end|>", "Two.<|end|>"], None),
    "gemma3": (
        GEMMA,
        ["One.<end_of_turn>", "Two.<end_of_turn>"],
        ["One.<end_of_turn>", "Two.<end_of_turn>"],
        None,
    ),
    "llama3_1": (
        LLAMA,
        ["One.<|eot_id|>", "Two.<|eot_id|>"],
        ["One.<|eot_id|>", "Two.<|eot_id|>"],
        [f'{{"name": "look", "parameters": {ARGUMENTS}}}<|eot_id|>', "Cold.<|eot_id|>"],
    ),
    LLAMA_4_TEMPLATE: (
        LLAMA_4,
        ["One.<|eot|>", "Two.<|eot|>"],
        ["One.<|eot|>", "Two.<|eot|>"],
        [ARGUMENTS + "<|eom|>", "Cold.<|eot|>"],
    ),
    MISTRAL_TEMPLATE: (
        MISTRAL,
        ["One.</s>", "Two.</s>"],
        ["One.</s>", "Two.</s>"],
        [f'[TOOL_CALLS][{{"name": "look", "arguments": {ARGUMENTS}}}]</s>', "Cold.</s>"],
    ),
    SMOLLM3_TEMPLATE: (
        CHATML,
        ["One.<|im_end|>", "Two.<|im_end|>"],
        ["One.<|im_end|>", "<think>r2</think>Two.<|im_end|>"],
        [f"<tool_call>{ARGUMENTS}</tool_call><|im_end|>", "<think>r2</think>Cold.<|im_end|>"],
    ),
    UNKNOWN_TEMPLATE: (
        UNKNOWN,
        ["One.</turn>", "Two.</turn>"],
        ["One.</turn>", "Two.</turn>"],
        [ARGUMENTS + "</turn>", "Cold.</turn>"],
    ),
}
OWN = [MISTRAL_TEMPLATE, PHI_4_TEMPLATE, SMOLLM3_TEMPLATE, LLAMA_4_TEMPLATE, UNKNOWN_TEMPLATE]
NAMES = dict(zip(OWN, ["mistral", "phi4", "smollm3", "llama4", "unknown"]))


def named(case: str) -> str:
    return NAMES.get(case, case)


def trained(row: dict, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return re.findall("⟦(.*?)⟧", preview(row, tokenizer), re.S)


@pytest.mark.filterwarnings("ignore:The last tokens of a prompt merge")
@pytest.mark.parametrize("name", CASES, ids=named)
def test_what_the_model_would_write_is_trained(name):
    tokens, turns, thought, calls = CASES[name]
    tokenizer = tokenizer_of(name, tokens)
    assert trained({"messages": TURNS}, tokenizer) == turns
    assert trained({"messages": TURNS[:2]}, tokenizer) == [turns[1].replace("Two.", "One.")]
    assert trained({"messages": THOUGHT}, tokenizer) == thought
    if calls is None:
        with pytest.raises(ValueError, match=r"the chat template (does not show|refuses) this"):
            encode_row({"messages": CALLS}, tokenizer)
    else:
        assert trained({"messages": CALLS}, tokenizer) == calls
        # Qwen3 shows an empty reasoning block in the last answer only
        assert trained({"messages": CALLS[:2]}, tokenizer) == [EMPTY * (name == "qwen3") + calls[0]]
        assert trained({"prompt": CALLS[:3], "completion": CALLS[3:]}, tokenizer) == calls[1:]


@pytest.mark.filterwarnings("ignore:The last tokens of a prompt merge")
@pytest.mark.parametrize("name", CASES, ids=named)
def test_the_last_answer_starts_where_generation_starts(name):
    # the oracle: the generation prompt's own tokens, then what is trained, up to the token that ends the turn
    tokenizer = tokenizer_of(name, CASES[name][0])
    for messages in (TURNS, THOUGHT, CALLS):
        if messages is CALLS and (CASES[name][3] is None or name == UNKNOWN_TEMPLATE):
            continue  # it refuses a conversation that ends with a tool's result
        asked = encode_prompt({"messages": messages}, tokenizer)
        encoded = encode_row({"messages": messages}, tokenizer)
        ids, labels = encoded["input_ids"], encoded["labels"]
        last = len(labels) - 1 - next(at for at, label in enumerate(reversed(labels)) if label != -100)
        start = next(at for at in range(last, -1, -1) if labels[at] == -100) + 1
        same = next((at for at, pair in enumerate(zip(asked, ids)) if pair[0] != pair[1]), len(asked))
        if messages is CALLS and "gptoss" in name:  # the call's place changes once its answer is there
            assert tokenizer.decode(ids[:start]).endswith("<|start|>assistant")
        else:  # what was asked, or as much of it as the whole conversation shows
            assert start == same
        assert all(label != -100 for label in labels[start : last + 1])
        # behind it: nothing, a newline, or what closes the whole text once more (Phi-3)
        assert tokenizer.decode(ids[last + 1 :]) in ("", "\n", "<|endoftext|>", "\n<|endoftext|>")


def conversations() -> list[list[dict]]:
    """Every shape with every pair of awkward words, and with answers that think."""
    awkward = ["One.", " One. \n", "\n\nOne", "<think>\nr1\n</think>\n\nOne.", "</think>\n\nOne.", "<think>", "a\n\n"]
    awkward += ["<tool_response>x</tool_response>", "", "\n", "<|channel|>analysis", "think", "None"]
    made = []
    for at, words in enumerate(awkward):
        question, answer, other = awkward[(at + 3) % len(awkward)], words, awkward[(at + 5) % len(awkward)]
        turns = [user("Hi?"), assistant(answer), user("And?"), assistant(other)]
        made += [turns, turns[:2], [{"role": "system", "content": other or "Be."}, *turns]]
        made += [[user(question), assistant("Two.")], [user("Hi?"), assistant(answer, other), user(question)]]
        made += [[user("Hi?"), assistant(answer, words), user("And?"), assistant(other, question)]]
    return made


def spans_or_error(how, messages: list[dict], **template: object) -> object:
    try:
        return how(messages, **template)[:2]
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", CASES, ids=named)
def test_a_shape_that_was_met_before_says_what_changed_words_say(name):
    template, shaped, wrong = ChatTemplate(tokenizer_of(name, CASES[name][0])), 0, 0
    for messages in [*conversations(), TURNS, THOUGHT, CALLS]:
        for more in ({}, {"first": 2}, {"enable_thinking": False}):
            fast = spans_or_error(template.answers, messages, **more)
            assert fast == spans_or_error(template.by_changes, messages, **more), (messages, more)
    # most conversations are rendered once
    calls, render = [], template._render
    template._render = lambda *given: calls.append(given) or render(*given)
    for number in range(20):
        template.answers([user(f"{number}?"), assistant(f"Is {number}.")])
    assert len(calls) == 20
    # a shape that is wrong by one character somewhere is not believed, or says other spans
    for key, shape in list(template._shapes.items()):
        if shape is not None and shape.spans:
            template._shapes[key] = replace(shape, spans=[(start + 1, end) for start, end in shape.spans])
            shaped += 1
    wrong += template.answers(TURNS)[1] != template.by_changes(TURNS)[1]
    assert shaped > 5 and wrong == 1


def test_answers_that_open_with_a_control_token():
    tokenizer = tokenizer_of("phi3", PHI)
    messages = [user("Hi?"), assistant("<|im_sep|>One."), user("And?"), assistant("<|im_sep|>Two.")]
    assert trained({"messages": messages}, tokenizer) == ["<|im_sep|>One.<|end|>", "<|im_sep|>Two.<|end|>"]


def test_instructions_that_move_to_the_last_question():
    # Mistral: a generation prompt that adds nothing, and a system message in front of whichever question is the last
    template = (
        "{{ bos_token }}{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}[INST] "
        "{% if loop.index0 == ns.last %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% elif m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls[0].function.arguments | tojson }}{{ eos_token }}"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_of(template, MISTRAL)
    row = {"messages": [{"role": "system", "content": "Be brief."}, *CALLS, *TURNS]}
    assert trained(row, tokenizer) == [f"[TOOL_CALLS]{ARGUMENTS}</s>", " Cold.</s>", " One.</s>", " Two.</s>"]


def test_marks_choose_and_what_is_prompted_is_never_trained():
    # a mark around the header too, as DeepSeek's training template has it, and none around the first answer
    marked = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if loop.last %}{%- generation -%}\n"
        "<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endgeneration %}\n{% else %}"
        "<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endif %}"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_of(marked, CHATML)
    row = {"messages": TURNS}
    assert trained(row, tokenizer) == ["Two.<|im_end|>"]
    assert encode_row(row, tokenizer)["input_ids"] == tokenizer.apply_chat_template(TURNS)["input_ids"]


def test_a_mark_that_ends_in_a_character_of_several_tokens_holds_them_all():
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.reasoning_content }}{% endgeneration %} {% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {"messages": [user("One?"), assistant("One.", "日本🙂")]}
    assert trained(row, tokenizer_of(marked, CHATML)) == ["日本🙂"]


def test_words_that_are_shown_behind_what_a_tool_said_are_refused():
    tokens = (
        ["<bos>", "<eos>", "<|turn>", "<turn|>", "<|tool_response>", "<tool_response|>", "<tool_call|>"],
        [],
        "<eos>",
    )
    tokenizer = tokenizer_of("gemma4", tokens)
    calls = [user("Hi?"), assistant("Well.", tool_calls=CALL), RESULT, assistant("Cold.")]
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template shows this answer out of order"):
        encode_row({"messages": calls}, tokenizer)
    calls[1] = assistant("", tool_calls=CALL)
    assert trained({"messages": calls}, tokenizer)[1] == "Cold.<turn|>"


def test_templates_that_want_arguments_as_text_or_no_missing_content():
    for arguments in ({"city": "Oslo"}, ARGUMENTS):
        call = [{"type": "function", "function": {"name": "look", "arguments": arguments}}]
        messages = [user("Hi?"), {"role": "assistant", "content": None, "tool_calls": call}]
        assert trained({"messages": messages}, tokenizer_of("deepseekv3", DEEPSEEK)) == [DEEPSEEK_CALL]
        assert trained({"messages": messages}, tokenizer_of("glm4moe", GLM)) == ["\n<think></think>\n" + GLM_CALL]


def rows_with_calls() -> list[dict]:
    other = [{"type": "function", "function": {"name": "count", "arguments": {"from": 1, "to": {"at": 3}}}}]
    return [
        {"messages": CALLS, "tools": [{"type": "function", "function": {"name": "look", "description": "Looks."}}]},
        {"messages": [user("Hi?"), {"role": "assistant", "content": None, "tool_calls": other}, RESULT, *TURNS[1:]]},
        {"messages": TURNS},
    ]


@pytest.mark.parametrize("name", ["qwen3_training", "glm4moe", "gptoss"])
def test_lists_arrow_parquet_and_json_are_alike(name, tmp_path):
    tokenizer = tokenizer_of(name, CASES[name][0])
    rows = rows_with_calls()
    wanted, stats = encode_rows(rows, tokenizer)
    assert stats.kept == 3
    table = datasets.Dataset.from_list(rows)
    assert table[2]["messages"][1]["tool_calls"] is None  # Arrow fills what is missing
    table.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=tmp_path)
    for source in (table, tmp_path / "rows.parquet", tmp_path / "rows.jsonl", loaded, list(table)):
        assert list(encode_rows(source, tokenizer)[0]) == list(wanted)


def test_bad_rows_are_skipped_if_asked_and_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    good, bad = {"messages": TURNS}, {"messages": [user("Hi?"), user("Hi?"), assistant("One.")]}
    lines = [json.dumps(row) for row in [good, bad, good, {"messages": 3}, {"text": "one"}]] + ["{"]
    path.write_text("\n".join(lines))
    tokenizer = tokenizer_of("gemma3", GEMMA)
    with pytest.raises(ValueError, match=r"rows.jsonl, line 4: messages: got int 3"):
        load_rows(path)
    with pytest.warns(UserWarning, match=r"(?s)2 rows are skipped:\nrows.jsonl, line 4.*\nrows.jsonl, line 6"):
        rows = load_rows(path, skip_bad=True)
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: the chat template refuses this conversation"):
        encode_rows(rows, tokenizer)
    with pytest.warns(UserWarning, match=r"1 rows are skipped:\nrows.jsonl, line 2: the chat template refuses"):
        encoded, stats = encode_rows(rows, tokenizer, skip_bad=True)
    assert (stats.rows, stats.kept, stats.skipped, len(encoded)) == (6, 3, 3, 3)
    with pytest.warns(UserWarning, match="and 40 more"):
        encoded, stats = encode_rows([good, *[bad] * 50], tokenizer, skip_bad=True)
    assert (stats.kept, stats.skipped) == (1, 50)
    with pytest.warns(UserWarning, match="1 rows are"), pytest.raises(ValueError, match="no row left to train on"):
        encode_rows([bad], tokenizer, skip_bad=True)
