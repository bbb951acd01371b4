"""What is trained is exactly what the target would generate: answers with the token that ends them, nothing else."""

from __future__ import annotations

import gc
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foretell.data.formats import load_rows
from foretell.data.prompts import EncodeStats, encode_prompt, encode_prompts, encode_rows, prompts_of
from tests.twins import encode_row, preview

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{%GENERATION%}{{ message.content }}<|im_end|>{%END%}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = CHATML.replace("{%GENERATION%}", "").replace("{%END%}", "")
MARKED = CHATML.replace("{%GENERATION%}", "{% generation %}").replace("{%END%}", "{% endgeneration %}")
# the block stops before the end-of-turn token, or runs on behind it
MARKED_SHORT = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
MARKED_LONG = MARKED.replace("{% endgeneration %}", "\n{% endgeneration %}").replace(
    "{% endif %}{{ '\n' }}", "{{ '\n' }}{% endif %}"
)
# an empty reasoning block in the last answer only, as Qwen3 writes it
REASONING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}think\n{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# an end-of-text token behind the last turn only, as Phi-3 writes it
CLOSED = PLAIN + "{% if not add_generation_prompt %}<|end|>{% endif %}"
# no end-of-turn token: the next speaker's header ends a turn, as GLM writes it
HEADERS = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# the generation prompt opens a reasoning block that the finished conversation does not show, as DeepSeek-R1 writes it
OPENED = PLAIN.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\nthink\n{% endif %}")
# the generation prompt is nothing that stands in a conversation
NO_PREFIX = PLAIN.replace("<|im_start|>assistant\n{% endif %}", "<|assistant|>{% endif %}")

SPECIAL = ["<unk>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|bos|>"]
WORDS = "system user assistant tool think one two three four five yes no A hello"


def make_tokenizer(template: str | None = PLAIN, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """Words, each with or without a space before it, so that a space can merge with the word that follows."""
    words = WORDS.split()
    vocabulary = [*SPECIAL, " ", "\n", "\n\n", ":", "?", *words, *(" " + word for word in words)]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\n+|[^\w\n]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token="<|end|>", unk_token="<unk>", padding_side="right"
    )
    fast.chat_template = template
    return fast


def chat(*contents: str, system: str | None = None) -> list[dict]:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    return ([{"role": "system", "content": system}] if system else []) + messages


TWO_TURNS = {"messages": chat("one?", "two three", "four?", "five", system="hello")}
SHOWN = (
    "<|im_start|>system\nhello<|im_end|>\n<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n"
    "⟦two three<|im_end|>⟧\n<|im_start|>user\nfour?<|im_end|>\n<|im_start|>assistant\n⟦five<|im_end|>⟧\n"
)


def test_the_test_tokenizer_gives_text_back():
    tokenizer = make_tokenizer()
    text = "<|im_start|>one two: A?\n three<|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("template", [PLAIN, MARKED, MARKED_SHORT, MARKED_LONG])
def test_all_ways_to_the_mask_agree(template):
    tokenizer = make_tokenizer(template)
    encoded = encode_row(TWO_TURNS, tokenizer)
    assert preview(TWO_TURNS, tokenizer) == SHOWN
    assert encoded["input_ids"] == tokenizer(SHOWN.replace("⟦", "").replace("⟧", ""))["input_ids"]
    assert all(label in (-100, token) for label, token in zip(encoded["labels"], encoded["input_ids"], strict=True))


def test_the_end_of_turn_token_need_not_be_eos():
    for template in (PLAIN, MARKED, MARKED_SHORT):
        assert preview(TWO_TURNS, make_tokenizer(template, eos="<|end|>")) == SHOWN


def test_every_answer_starts_where_generation_starts():
    # the contract that matters: in front of each trained run stands what encode_prompt gives for that turn
    tokenizer = make_tokenizer()
    encoded = encode_row(TWO_TURNS, tokenizer)
    trained = [label != -100 for label in encoded["labels"]]
    starts = [at for at in range(len(trained)) if trained[at] and not trained[at - 1]]
    messages = TWO_TURNS["messages"]
    assert len(starts) == 2
    for start, turns in zip(starts, (3, 5)):
        assert encoded["input_ids"][:start] == encode_prompt({"messages": messages[:turns]}, tokenizer)


def test_templates_that_render_the_last_turn_otherwise():
    conversation = {"messages": chat("one?", "two", "three?", "four")}
    start, between = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert preview(conversation, make_tokenizer(REASONING)) == (
        f"{start}one?{between}⟦two<|im_end|>⟧\n{start}three?{between}⟦think\nfour<|im_end|>⟧\n"
    )
    assert preview(conversation, make_tokenizer(CLOSED, eos="<|end|>")) == (
        f"{start}one?{between}⟦two<|im_end|>⟧\n{start}three?{between}⟦four<|im_end|>⟧\n<|end|>"
    )


def test_a_header_that_ends_a_turn_is_trained():
    assert preview({"messages": chat("one?", "two", "three?", "four")}, make_tokenizer(HEADERS, eos="<|end|>")) == (
        "<|user|>\none?<|assistant|>\n⟦two<|user|>⟧\nthree?<|assistant|>\n⟦four<|user|>⟧"
    )


def test_a_generation_prompt_that_the_conversation_does_not_show_whole():
    assert preview(TWO_TURNS, make_tokenizer(OPENED)) == SHOWN


def test_a_prefix_that_is_none_is_refused_and_named():
    rows = [{"text": "one"}, TWO_TURNS]
    with pytest.raises(ValueError, match=r"^rows\[1\]: messages\[2\]: the chat template asks for this answer with"):
        encode_rows(rows, make_tokenizer(NO_PREFIX))
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template asks"):
        encode_row({"prompt": chat("one?"), "completion": chat("x", "two")[1:]}, make_tokenizer(NO_PREFIX))


def test_tokens_that_merge_over_the_boundary_belong_to_the_answer():
    # a template that ends its generation prompt in a space, which merges with the answer's first word
    template = PLAIN.replace("assistant\n{% endif %}", "assistant {% endif %}").replace(
        "{{ message.role }}\n{% if", "{{ message.role }}{{ ' ' if message.role == 'assistant' else '\n' }}{% if"
    )
    with pytest.warns(UserWarning, match="merge with its answer"):
        shown = preview({"messages": chat("one?", "two", "three?", "four")}, make_tokenizer(template))
    assert re.findall("⟦(.*?)⟧", shown) == [" two<|im_end|>", " four<|im_end|>"]


def test_consecutive_answers_and_tool_turns():
    messages = [*chat("one?", "two"), {"role": "tool", "content": "three"}, {"role": "assistant", "content": "four"}]
    messages.append({"role": "assistant", "content": "five"})
    for template in (PLAIN, MARKED):
        assert re.findall("⟦(.*?)⟧", preview({"messages": messages}, make_tokenizer(template))) == [
            "two<|im_end|>",
            "four<|im_end|>",
            "five<|im_end|>",
        ]


def test_loss_on_everything_if_asked():
    encoded = encode_row(TWO_TURNS, make_tokenizer(), assistant_only_loss=False)
    assert encoded["labels"] == encoded["input_ids"]


def test_text_is_trained_whole_and_ends_with_eos_once():
    tokenizer = make_tokenizer(template=None)
    ids = tokenizer("one two<|im_end|>")["input_ids"]
    assert encode_row({"text": "one two"}, tokenizer) == {"input_ids": ids, "labels": ids}
    assert encode_row({"text": "one two<|im_end|>"}, tokenizer)["input_ids"] == ids


def test_only_the_completion_is_trained():
    tokenizer = make_tokenizer(template=None)
    assert preview({"prompt": "one two?", "completion": " three"}, tokenizer) == "one two?⟦ three<|im_end|>⟧"
    with pytest.warns(UserWarning, match="merge with its answer"):
        assert preview({"prompt": "A: ", "completion": "yes"}, tokenizer) == "A:⟦ yes<|im_end|>⟧"


def test_special_tokens_that_the_tokenizer_adds_by_itself():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|im_end|>", special_tokens=[("<|bos|>", 6), ("<|im_end|>", 3)]
    )
    assert preview({"prompt": "one", "completion": " two"}, tokenizer) == "<|bos|>one⟦ two<|im_end|>⟧"
    assert tokenizer.decode(encode_prompt({"prompt": "one"}, tokenizer)) == "<|bos|>one"  # the prompt goes on


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_conversational_completions_leave_earlier_answers_out(template):
    messages = TWO_TURNS["messages"]
    row = {"prompt": messages[:4], "completion": messages[4:]}
    tokenizer = make_tokenizer(template)
    assert preview(row, tokenizer) == SHOWN.replace("⟦two three<|im_end|>⟧", "two three<|im_end|>")
    everything = encode_row(row, tokenizer, assistant_only_loss=False)
    start = len(encode_prompt(row, tokenizer))
    assert everything["labels"] == [-100] * start + everything["input_ids"][start:]


def test_ready_rows_take_labels_or_masks():
    ids = [5, 6, 7, 8]
    assert encode_row({"input_ids": ids}, None)["labels"] == ids
    assert encode_row({"input_ids": ids, "labels": [-100, 6, -100, 8]}, None)["labels"] == [-100, 6, -100, 8]
    for name in ("completion_mask", "assistant_masks", "loss_mask"):
        assert encode_row({"input_ids": ids, name: [0, 1, 1, 0]}, None)["labels"] == [-100, 6, 7, -100]
    both = {"input_ids": ids, "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}
    assert encode_row(both, None)["labels"] == [-100, 6, -100, 8]
    hidden_TD = torch.randn(4, 3)
    cut = encode_row({"input_ids": torch.tensor(ids), "hidden_states": hidden_TD}, None, max_length=2)
    assert cut["input_ids"] == [5, 6] and torch.equal(cut["hidden_states"], hidden_TD[:2])


def test_rows_that_cannot_be_encoded():
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        encode_row(TWO_TURNS, make_tokenizer(template=None))
    with pytest.raises(ValueError, match="no tokenizer"):
        encode_row({"text": "one"}, None)
    with pytest.raises(ValueError, match="got a prompt without an answer"):
        encode_row({"prompt": "one"}, make_tokenizer())
    with pytest.raises(ValueError, match=r"messages\[0\]: got an assistant turn"):
        encode_row({"messages": [{"role": "assistant", "content": "one"}]}, make_tokenizer())
    refusing = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="the chat template refuses this conversation: roles must alternate"):
        encode_row(TWO_TURNS, refusing)


def test_long_rows_are_cut_and_rows_without_a_label_are_dropped_and_both_are_counted():
    rows = [
        {"prompt": "one", "completion": " two"},
        {"prompt": "one", "completion": " two three four"},
        {"prompt": "one two three four five", "completion": " no"},
        {"input_ids": [9, 9], "labels": [9, -100]},  # the only label is the first token, which nothing predicts
    ]
    with pytest.warns(UserWarning, match="2 of 4 rows were cut at max_length=4; 2 of 4 rows were dropped"):
        encoded, stats = encode_rows(rows, make_tokenizer(), max_length=4)
    assert [len(row["input_ids"]) for row in encoded] == [3, 4]
    assert (stats.rows, stats.kept, stats.truncated, stats.dropped) == (4, 2, 2, 2)
    assert (stats.tokens, stats.trained_tokens) == (7, 5)


def test_nothing_left_to_train_on_is_an_error(recwarn):
    with pytest.raises(ValueError, match="no row left to train on: 1 of 1 rows were cut at max_length=2"):
        encode_rows([{"prompt": "one two three", "completion": " four"}], make_tokenizer(), max_length=2)
    with pytest.raises(ValueError, match="no row left to train on"):
        encode_rows([{"messages": chat("one?")[:1]}], make_tokenizer())


def test_errors_of_encoding_name_the_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "one"}\n{"prompt": "one"}\n{"input_ids": [3, 4000]}\n')
    with pytest.raises(ValueError, match="line 2") as error:
        encode_rows(load_rows(path), make_tokenizer(), vocab_size=97)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("prompts.jsonl, line 2: got a prompt without an answer")
    assert lines[1].startswith("prompts.jsonl, line 3: got token id 4000, wanted ids below the target's vocabulary")


def test_prompts_leave_the_final_answer_out():
    messages = TWO_TURNS["messages"]
    assert prompts_of(TWO_TURNS) == messages[:4]
    assert prompts_of({"messages": messages[:4]}) == messages[:4]
    assert prompts_of({"prompt": "one", "completion": "two"}) == "one"
    assert prompts_of({"prompt": messages[:2], "completion": messages[2:3]}) == messages[:2]
    assert prompts_of({"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9]}) == [5, 6, 7]
    with pytest.raises(ValueError, match="has no prompt"):
        prompts_of({"text": "one"})
    with pytest.raises(ValueError, match="all trained"):
        prompts_of({"input_ids": [5, 6]})
    with pytest.raises(ValueError, match="assistant only"):
        prompts_of({"messages": messages[2:3]})


def test_encoded_prompts_end_where_the_answer_begins():
    tokenizer = make_tokenizer()
    assert tokenizer.decode(encode_prompt(TWO_TURNS, tokenizer)).endswith("four?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(encode_prompt({"prompt": "one two"}, tokenizer)) == "one two"
    assert encode_prompt({"input_ids": [5, 6], "loss_mask": [0, 1]}, None) == [5]


def test_what_a_row_carries_for_the_template_reaches_it():
    template = "{{ mode }}{{ ' one' if tools }}" + PLAIN
    row = {**TWO_TURNS, "chat_template_kwargs": {"mode": "think"}, "tools": '[{"name": "A"}]'}
    tokenizer = make_tokenizer(template)
    assert preview(row, tokenizer).startswith("think one<|im_start|>")
    assert tokenizer.decode(encode_prompt(row, tokenizer)).startswith("think one<|im_start|>")


def test_only_ids_that_occur_must_fit_the_vocabulary():
    # Gemma-3-1B's tokenizer has an image token that lies beyond its embeddings, and nobody uses it
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert len(encode_rows([TWO_TURNS], tokenizer, vocab_size=size)[0]) == 1
    with pytest.raises(ValueError, match=f"got token id {size}, wanted ids below the target's vocabulary of {size}"):
        encode_rows([{"text": "one <image>"}], tokenizer, vocab_size=size)
    with pytest.raises(ValueError, match=f"rows.0.: got token id {size}, wanted"):
        encode_prompts([{"prompt": "one <image>"}], tokenizer, vocab_size=size)


@pytest.mark.filterwarnings("ignore:.* rows are skipped", "ignore:.* rows were cut")
def test_many_rows_lie_in_a_file_and_several_processes_encode_alike(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    rows = [
        [TWO_TURNS, {"text": "one two"}, {"prompt": "one", "completion": " two"}, {"input_ids": [1, 2, 3]}][i % 4]
        for i in range(80)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:40], {"text": "one"}, *rows[40:]]) + "{\n")
    tokenizer = make_tokenizer()
    wanted, stats = encode_rows(path, tokenizer, max_length=6, skip_bad=True)
    assert not wanted.table.cache_files
    one_by_one = [encode_row(row, tokenizer, max_length=6) for row in load_rows(path, skip_bad=True)]
    assert list(wanted) == [row for row in one_by_one if any(label != -100 for label in row["labels"][1:])]
    assert wanted.lengths.tolist() == [len(row["input_ids"]) for row in wanted]
    assert (stats.rows, stats.skipped, stats.kept) == (82, 1, len(wanted)) and stats.dropped and stats.truncated
    assert stats.tokens == sum(wanted.lengths) and wanted[-1] == wanted[len(wanted) - 1]
    assert stats.trained_tokens == sum(label != -100 for row in wanted for label in row["labels"][1:])
    part = wanted.part(wanted.lengths > 3)
    assert list(part) == [row for row in wanted if len(row["input_ids"]) > 3] != list(wanted)
    monkeypatch.setattr("foretell.data.prompts.ROWS_IN_MEMORY", 10)
    for processes in (None, 2):
        encoded, again = encode_rows(path, tokenizer, max_length=6, skip_bad=True, num_proc=processes)
        files = [Path(file["filename"]) for file in encoded.table.cache_files]
        assert files and all(file.is_file() for file in files)
        assert list(encoded) == list(wanted) and again == stats
        assert list(pickle.loads(pickle.dumps(encoded))) == list(wanted)
        del encoded
        gc.collect()
        assert not any(file.exists() for file in files)  # nothing is left behind
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(ValueError, match="no row left|wanted a 'completion'|line 2"):
        encode_rows([{"text": "one two"}, {"prompt": "one"}] * 8, tokenizer)
    assert not list((tmp_path / "temporary").iterdir())


def test_what_is_encoded_is_not_encoded_again_within_the_same_limits():
    tokenizer = make_tokenizer()
    encoded, stats = encode_rows(
        [{"text": "one two three four five one two"}, {"text": "one two three"}],
        tokenizer,
        max_length=50,
        vocab_size=90,
    )
    again = encode_rows(encoded, None, max_length=50, vocab_size=90)
    assert again[0] is encoded and again[1] == stats
    part = encoded.part(encoded.lengths < 6)
    assert encode_rows(part, None, 50, vocab_size=90)[1] == EncodeStats(rows=1, kept=1, tokens=4, trained_tokens=3)
    with pytest.warns(UserWarning, match="1 of 2 rows were cut at max_length=6"):
        shorter, _ = encode_rows(encoded, None, max_length=6, vocab_size=90)
    assert list(shorter) == [{name: values[:6] for name, values in row.items()} for row in encoded]
    with pytest.raises(ValueError, match="wanted ids below the target's vocabulary of 9"):
        encode_rows(encoded, None, max_length=50, vocab_size=9)


@pytest.mark.parametrize("processes", [None, 2])
def test_what_cannot_be_encoded_is_named_whoever_encodes(tmp_path, processes):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"text": "one"}, {"prompt": "one"}] * 30))
    with pytest.raises(ValueError, match=r"(?s)^rows.jsonl, line \d+: got a prompt without.*stopped after 10 problems"):
        encode_rows(path, make_tokenizer(), num_proc=processes)
    with pytest.raises(ValueError, match=r"(?s)^30 bad rows, wanted 29 at most:\nrows.jsonl, line 2: got a prompt"):
        encode_rows(path, make_tokenizer(), num_proc=processes, skip_bad=29)


@pytest.mark.filterwarnings("ignore:.* rows were cut")
def test_labels_that_a_target_gave_to_a_text_stay():
    # what it would say, not what the text says; the marked ones are those that count
    row = {"key": "given-a", "input_ids": [4, 5, 6, 7], "labels": [-100, 8, -100, 9]}
    assert encode_rows([row], None)[0][0] == {"input_ids": [4, 5, 6, 7], "labels": [-100, 8, -100, 9]}
    assert encode_rows([row], None, max_length=2)[0][0] == {"input_ids": [4, 5], "labels": [-100, 8]}
