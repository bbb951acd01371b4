"""`foretell serve` as clients meet it: answers are those of generate, and what is asked is done or refused by name."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest
import torch
from datasets import load_dataset
from drafters import knowing_mtp, leaning_model
from serving import Served, byte_tokenizer, chat_tokenizer, tiny_served, wait_for
from tiny import tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from foretell.cli.regenerate import main as regenerate
from foretell.cli.serve import main as serve
from foretell.serving import app
from foretell.serving.answers import Reply
from foretell.serving.detokenizer import Detokenizer, token_bytes
from foretell.serving.schema import CompletionRequest

PROMPTS = ["w25 w29 w30", "w7", "w40 w41 w42 w43 w44 w45 w46", "w9 w9 w9 w9", "w60 w3"]


@pytest.fixture(scope="module")
def served():
    one = tiny_served()
    yield one
    one.stop()


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def own(served: Served, prompt: str | list[int], new: int = 12, **how: object) -> list[int]:
    """New tokens of the model's own generate."""
    ids = served.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    end = how.pop("eos_token_id", None)
    out = served.mtp.model.generate(torch.tensor([ids]), max_new_tokens=new, eos_token_id=end, **how)
    return out[0, len(ids) :].tolist()


def chat(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


# -- answers


def test_the_official_client_gets_the_text_of_generate(served, client):
    for prompt in PROMPTS:
        answer = client.chat.completions.create(model="tiny", messages=chat(prompt), max_completion_tokens=12)
        wanted = own(served, f"{prompt} w50")
        assert answer.choices[0].message.content == served.tokenizer.decode(wanted)
        assert answer.choices[0].message.role == "assistant" and answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 12 and answer.usage.prompt_tokens == len(prompt.split()) + 1
        assert answer.usage.total_tokens == answer.usage.completion_tokens + answer.usage.prompt_tokens
        own_part = answer.usage.foretell
        assert own_part["lossless"] and own_part["policy"] == "lossless" and own_part["tau"] >= 1
        assert answer.model == "tiny" and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")


def test_the_official_client_reads_streams_and_the_rest(served, client):
    wanted = served.tokenizer.decode(own(served, "w7 w50"))
    parts = list(
        client.chat.completions.create(
            model="tiny", messages=chat("w7"), max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == wanted
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 2) + ["length"]
    assert parts[-1].choices == [] and parts[-1].usage.completion_tokens == 12
    assert all(part.usage is None for part in parts[:-1])
    done = client.completions.create(model="tiny", prompt="w7 w50", max_tokens=12)
    assert done.choices[0].text == " " * bool(done.choices[0].text[0] == " ") + wanted
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "foretell"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.chat.completions.create(model="other", messages=chat("w7"))
    with pytest.raises(openai.BadRequestError, match="tools: not supported"):
        client.chat.completions.create(model="tiny", messages=chat("w7"), tools=[{"type": "function"}])


def test_a_stream_is_the_whole_answer_in_parts(served):
    for path in ("/v1/completions", "/v1/chat/completions"):
        about = {"max_tokens": 40, "n": 2, "temperature": 0.8, "seed": 3, "return_token_ids": True}
        prompt = chat("w25 w29") if "chat" in path else "w25 w29"
        events = served.events(prompt, path, **about)
        body = {"model": "tiny", **({"messages": prompt} if "chat" in path else {"prompt": prompt}), **about}
        whole = served.send(path, body)[1]
        for index, choice in enumerate(whole["choices"]):
            mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
            said = [one["delta"].get("content", "") if "chat" in path else one["text"] for one in mine]
            assert "".join(said) == (choice["message"]["content"] if "chat" in path else choice["text"])
            assert [token for one in mine for token in one.get("token_ids", [])] == choice["token_ids"]
            assert [one["finish_reason"] for one in mine][-1] == choice["finish_reason"]
        assert whole["choices"][0]["token_ids"] != whole["choices"][1]["token_ids"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_whole_answer_wakes_the_loop_once(served, monkeypatch, stream):
    async def wakes() -> int:
        loop, woken = asyncio.get_running_loop(), []
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *given: (woken.append(given), wake(*given)))
        body = CompletionRequest(
            prompt="w7", max_tokens=20, temperature=0, ignore_eos=True, num_draft_tokens=0, stream=stream
        )
        ids = served.tokenizer("w7")["input_ids"]
        reply = Reply(body, [ids], served.engine, served.tokenizer, "tiny", served.server.metrics)
        reply.start()
        if stream:
            assert [part async for part in reply.stream()][-1] == b"data: [DONE]\n\n"
        else:
            assert (await reply.whole())["usage"]["completion_tokens"] == 20
        return len(woken)

    assert asyncio.run(wakes()) == (20 if stream else 1)


def test_seeds_choices_and_lists_of_prompts(served):
    """Each choice is that of generate with its own seed; prompts may be texts or ids."""
    about = {"max_tokens": 10, "temperature": 0.9, "top_k": 0, "return_token_ids": True}
    answer = served.complete([PROMPTS[0], PROMPTS[1]], n=2, seed=11, **about)
    got = [choice["token_ids"] for choice in answer["choices"]]
    for index, (prompt, seed) in enumerate([(0, 11), (0, 12), (1, 11), (1, 12)]):
        ids = torch.tensor([served.tokenizer(PROMPTS[prompt])["input_ids"]])
        generator = torch.Generator().manual_seed(seed)
        out = served.mtp.generate(
            ids, max_new_tokens=10, do_sample=True, temperature=0.9, top_k=0, generator=generator, eos_token_id=1
        )
        assert got[index] == out[0, ids.shape[1] :].tolist()
    assert answer["usage"]["prompt_tokens"] == 4 and answer["usage"]["completion_tokens"] == sum(map(len, got))
    assert served.complete([[25, 29, 30], [7]], n=2, seed=11, **about)["choices"] == answer["choices"]
    last = served.complete(PROMPTS[0], n=2, seed=2**63 - 1, **about)["choices"]
    assert served.complete(PROMPTS[0], seed=-(2**63), **about)["choices"][0]["token_ids"] == last[1]["token_ids"]
    again = served.complete(PROMPTS[0], **about), served.complete(PROMPTS[0], **about)
    assert again[0]["choices"][0]["token_ids"] != again[1]["choices"][0]["token_ids"]  # without a seed


def test_penalties_and_biases_act(served):
    plain = served.complete("w7", max_tokens=20, return_token_ids=True)["choices"][0]["token_ids"]
    ids = served.complete("w7", max_tokens=20, repetition_penalty=1.5, return_token_ids=True)["choices"][0]["token_ids"]
    assert ids == own(served, "w7", 20, repetition_penalty=1.5) != plain
    ids = served.complete("w7", max_tokens=4, logit_bias={"33": 100}, return_token_ids=True)["choices"][0]["token_ids"]
    assert ids == [33] * 4
    ids = served.complete("w7", max_tokens=20, frequency_penalty=2.0, return_token_ids=True)["choices"][0]["token_ids"]
    assert max(map(ids.count, ids)) <= max(map(plain.count, plain))


def test_a_stop_string_inside_accepted_drafts_ends_text_and_count(served):
    asked = {"max_tokens": 40, "num_draft_tokens": 3, "return_trace": True, "return_token_ids": True}
    whole = served.complete("w25 w29 w30", **asked)["choices"][0]
    trace = whole["trace"]
    assert [one["id"] for one in trace] == whole["token_ids"] and len(trace) == 40
    inside = next(  # an accepted draft with another behind it, of a word that was not there before
        at
        for at in range(1, 39)
        if trace[at]["source"] == "mtp"
        and trace[at + 1]["verification"] == trace[at]["verification"]
        and trace[at]["id"] not in whole["token_ids"][:at]
    )
    word = f"w{trace[inside]['id']}"
    for stop in (word, [word, "nothing like it"], f"{trace[inside - 1]['text'][-1]} {word}"):
        answer = served.complete("w25 w29 w30", stop=stop, **asked)
        choice, text = answer["choices"][0], whole["text"]
        first = stop if isinstance(stop, str) else word
        assert choice["text"] == text[: text.index(first)] and choice["finish_reason"] == "stop"
        assert choice["stop_reason"] == first and choice["token_ids"] == whole["token_ids"][: inside + 1]
        assert answer["usage"]["completion_tokens"] == inside + 1
        assert "".join(one["text"] for one in choice["trace"]) == choice["text"]
        own_part = answer["usage"]["foretell"]
        assert own_part["tau"] == pytest.approx((inside + 1) / own_part["verifications"])
        events = served.events("w25 w29 w30", stop=stop, stream_options={"include_usage": True}, **asked)
        assert "".join(e["choices"][0]["text"] for e in events[:-1]) == choice["text"]
        assert events[-1]["usage"]["completion_tokens"] == inside + 1
    ends = served.complete("w25 w29 w30", stop_token_ids=[trace[inside]["id"]], **asked)["choices"][0]
    assert ends["token_ids"] == whole["token_ids"][: inside + 1] and ends["stop_reason"] == trace[inside]["id"]
    assert ends["text"].split() == whole["text"].split()[: inside + 1]  # it has a text, as with vLLM


def test_log_probabilities_are_the_models(served):
    asked = {"max_tokens": 9, "return_token_ids": True, "num_draft_tokens": 3}
    choice = served.complete("w25 w29", logprobs=3, **asked)["choices"][0]
    ids = torch.tensor([[25, 29, *choice["token_ids"]]])
    with torch.no_grad():
        wanted_TV = served.mtp.model(ids).logits[0, 1:-1].log_softmax(-1)
    table = choice["logprobs"]
    assert table["tokens"] == [f"w{i}" for i in choice["token_ids"]]
    assert [table["text_offset"][i] for i in (0, 1)] == [0, len(table["tokens"][0]) + choice["text"].startswith(" ")]
    for at, token in enumerate(choice["token_ids"]):
        assert table["token_logprobs"][at] == pytest.approx(float(wanted_TV[at, token]), abs=1e-3)
        top = wanted_TV[at].topk(3)
        likeliest = {f"w{i}": p for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)}
        assert table["top_logprobs"][at] == pytest.approx(likeliest, abs=1e-3)
    about = {"messages": chat("w25"), "logprobs": True, "top_logprobs": 2, **asked}
    content = served.send("/v1/chat/completions", about)[1]["choices"][0]["logprobs"]["content"]
    assert len(content) == 9 and all(len(one["top_logprobs"]) == 2 for one in content)
    assert all(bytes(one["bytes"]).decode() == one["token"] for one in content)
    assert all(one["logprob"] == one["top_logprobs"][0]["logprob"] for one in content)  # greedy
    parts = served.events(chat("w25"), "/v1/chat/completions", **{k: v for k, v in about.items() if k != "messages"})
    streamed = [one for part in parts for one in (part["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == content


def test_lossy_policies_say_so_and_drafts_can_be_off(served):
    answer = served.complete("w7", max_tokens=20, policy="static_k", num_draft_tokens=3)
    assert answer["lossy"] == "static_k" and not answer["usage"]["foretell"]["lossless"]
    events = served.events("w7", max_tokens=20, policy="typical", num_draft_tokens=2)
    assert all(event["lossy"] == "typical" for event in events)
    off = served.complete(PROMPTS[0], max_tokens=20, num_draft_tokens=0)
    assert "lossy" not in off and off["usage"]["foretell"]["drafted"] == 0 and off["usage"]["foretell"]["tau"] == 1
    on = served.complete(PROMPTS[0], max_tokens=20, num_draft_tokens=3)
    assert on["usage"]["foretell"]["tau"] > 1.2 and on["choices"][0]["text"] == off["choices"][0]["text"]


def test_characters_never_split():
    """Random bytes: what a stream says is what the tokenizer says of all its tokens, and no part ends in half."""
    mtp = knowing_mtp(leaning_model(vocab_size=260))
    served = Served(mtp, byte_tokenizer())
    try:
        for seed in range(3):
            asked = {"max_tokens": 60, "temperature": 1.5, "seed": seed, "return_token_ids": True, "ignore_eos": True}
            prompt = served.tokenizer("grüße")["input_ids"]
            whole = served.complete(prompt, **asked)["choices"][0]
            decoded = served.tokenizer.decode([*prompt, *whole["token_ids"]], skip_special_tokens=True)
            assert decoded == served.tokenizer.decode(prompt) + whole["text"]
            parts = [event["choices"][0]["text"] for event in served.events(prompt, **asked)]
            assert "".join(parts) == whole["text"]
    finally:
        served.stop()


# -- text


@pytest.mark.parametrize("seed", range(6))
def test_text_is_cut_as_if_it_had_been_whole(seed):
    """Against the plain way: decode everything, find the stop; what is shown meanwhile is a beginning of it."""
    rng = random.Random(seed)
    tokenizer = byte_tokenizer(("a", "b"), ("ab", "c"), ("Ã", "¼"))
    alphabet = ["a", "b", "c", "ab", "abc", "ü", "€", "🙂", " ", "end"]
    for _ in range(60):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 30)))
        ids = (
            tokenizer(text)["input_ids"] if rng.random() < 0.5 else [t for c in text for t in tokenizer(c)["input_ids"]]
        )
        stops = ["".join(rng.choices(alphabet, k=rng.randint(1, 3))) for _ in range(rng.randint(0, 3))]
        # as soon as a token completes a stop string, the text ends where the first one starts
        reads = (tokenizer.decode(ids[: n + 1]) for n in range(len(ids)))
        read = next((read for read in reads if any(stop in read for stop in stops)), text)
        wanted = read[: min((n for stop in stops if (n := read.find(stop)) >= 0), default=None)]
        detokenizer, shown = Detokenizer(tokenizer, stops=stops), []
        for token in ids:
            stopped = detokenizer.put(token)
            shown += detokenizer.take(last=stopped)
            said = "".join(part for _, part in shown)
            assert wanted.startswith(said)
            if stopped:
                break
        shown += detokenizer.take(last=True)
        assert "".join(part for _, part in shown) == wanted
        assert [index for index, _ in shown] == list(range(len(detokenizer.tokens)))
        assert tokenizer.decode(detokenizer.tokens) == read and (detokenizer.stop is None) == (wanted == text)


def test_half_a_character_is_said_at_the_end():
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    for token in tokenizer("a€")["input_ids"][:-1]:
        detokenizer.put(token)
    assert detokenizer.take() == [(0, "a")]
    assert detokenizer.take(last=True) == [(1, ""), (2, "\ufffd")]


def test_bytes_that_never_make_a_character_are_shown_and_cost_no_more():
    tokenizer, rng = byte_tokenizer(), random.Random(0)
    high = [tokenizer.get_vocab()[word] for word in (bytes_to_unicode()[byte] for byte in range(0x80, 0x100))]
    for ids in (rng.choices(high, k=400), [high[0x62]] * 400):  # 0x62: a first byte of three
        detokenizer, shown = Detokenizer(tokenizer, stops=["never"]), 0
        for count, token in enumerate(ids, start=1):
            detokenizer.put(token)
            shown += len(detokenizer.take())
            assert count - shown <= 4 and len(detokenizer._window) <= 24
        detokenizer.take(last=True)
        assert detokenizer.text == tokenizer.decode(ids)


def test_bytes_of_tokens_make_the_text():
    """Of pieces of characters too, in byte-level vocabularies and in those that fall back to bytes."""
    tokenizer = byte_tokenizer(("t", "h"))
    for text in ("thé 日本語 😀", "\ufffd", "plain"):
        ids = tokenizer(text)["input_ids"]
        assert b"".join(token_bytes(tokenizer, token) for token in ids).decode() == text
    words = {"<unk>": 0, "▁th": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    made = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    assert b"".join(token_bytes(tokenizer, token) for token in tokenizer("é😀")["input_ids"]).decode() == "é😀"
    assert token_bytes(tokenizer, 1) is None


def test_log_probabilities_tell_the_bytes_of_pieces_of_characters():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    served = Served(knowing_mtp(leaning_model(vocab_size=len(tokenizer))), tokenizer)
    try:
        (first, *_) = tokenizer("😀")["input_ids"]
        how = {"max_tokens": 2, "logprobs": True, "top_logprobs": 1, "logit_bias": {str(first): 100}}
        (choice,) = served.send("/v1/chat/completions", {"messages": chat("a"), **how})[1]["choices"]
        assert [one["bytes"] for one in choice["logprobs"]["content"]] == [[0xF0]] * 2
    finally:
        served.stop()


# -- what is refused

WRONG = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"functions": []}, "functions"),
    ({"user": "me"}, "user"),
    ({"temprature": 1}, "temprature"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
    ),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content[0].text"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 1e-40}, "temperature"),
    ({"repetition_penalty": 1e-320}, "repetition_penalty"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"max_tokens": 511}, "max_tokens"),
    ({"seed": 2**64}, "seed"),
    ({"seed": True}, "seed"),
    ({"stop": [f"s{i}" for i in range(17)]}, "stop"),
    ({"stop": "s" * 257}, "stop[0]"),
    ({"stop": ""}, "stop[0]"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [97]}, "stop_token_ids"),
    ({"logit_bias": {"97": 1}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"chunks": 3}}, "stream_options.chunks"),
    ({"num_draft_tokens": -1}, "num_draft_tokens"),
    ({"num_draft_tokens": "many"}, "num_draft_tokens"),
    ({"num_draft_tokens": 99}, "num_draft_tokens"),
    ({"policy": "fast"}, "policy"),
    ({"confidence_threshold": 0.5}, "confidence_threshold"),
]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=[json.dumps(body)[:50] for body, _ in WRONG])
def test_what_is_not_done_is_refused_by_name(served, body, param):
    status, answer, _ = served.send("/v1/chat/completions", {"model": "tiny", "messages": chat("w7"), **body})
    assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["param"] == param and param.split("[")[0] in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_nobody_is_told_to_write_what_was_written(served):
    answer = served.send("/v1/completions", {"prompt": "w7", "max_completion_tokens": 3})[1]
    assert (
        answer["error"]["param"] == "max_completion_tokens" and "mean max_completion" not in answer["error"]["message"]
    )
    answer = served.send("/v1/completions", {"prompt": "w7", "temprature": 3})[1]
    assert "did you mean temperature?" in answer["error"]["message"]


def test_values_that_ask_for_nothing_are_taken(served):
    nothing = {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "user": None, "stop": None}
    nothing |= {"logit_bias": None, "logprobs": False, "temperature": None, "n": 1, "stream": False}
    message = {"role": "assistant", "content": "w9", "refusal": None, "tool_calls": None, "annotations": []}
    messages = [*chat("w7"), message, {"role": "user", "content": [{"type": "text", "text": "w8"}]}]
    messages = [{"role": "developer", "content": "w6"}, *messages]
    body = {"model": "tiny", "messages": messages, "max_tokens": 5, "temperature": 0, **nothing}
    status, answer, _ = served.send("/v1/chat/completions", body)
    assert status == 200, answer
    assert answer["choices"][0]["message"]["content"] == served.tokenizer.decode(own(served, "w6 w7 w9 w8 w50", 5))


def test_bodies_that_are_none(served):
    path = "/v1/chat/completions"
    for data in (b"{", b"", b"[]", b"\xff\xfe", b"null", b'"text"', b"[" * 100_000):
        status, answer, _ = served.send(path, data)
        assert status == 400 and answer["error"]["message"], data[:20]
    good = {"model": "tiny", "messages": chat("w7"), "max_tokens": 2}
    status, answer, _ = served.send(path, good, Content_Type="text/plain")  # what other pages may send unasked
    assert status == 400 and "application/json" in answer["error"]["message"]
    long = json.dumps({**good, "messages": chat("w7 " * (3 * 2**20))}).encode()
    status, answer, _ = served.send(path, long)
    assert status == 413 and "8,388,608" in answer["error"]["message"] and answer["error"]["code"] == "body_too_large"
    for path, code in (("/v1/nothing", 404), ("/etc/passwd", 404), ("/../../etc/passwd", 404), ("/health", 405)):
        status, answer, _ = served.send(path, good if code == 405 else None)
        assert status == code and "error" in answer
    assert served.send("/v1/completions", {"prompt": "w7", "max_tokens": 3})[0] == 200


def test_prompts_that_do_not_fit(served):
    long = " ".join(["w7"] * 512)
    for path, about in (
        ("/v1/completions", {"prompt": long}),
        ("/v1/chat/completions", {"messages": chat(long)}),
    ):
        status, answer, _ = served.send(path, about)
        count = 512 + ("chat" in path)
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
        assert f"got {count} tokens" in answer["error"]["message"] and "context of 512" in answer["error"]["message"]
    for prompt in (
        "",
        [],
        [[]],
        [5, "w7"],
        [[5], [97]],
        {"a": 1},
        [[5]] * 33,
        [True],
        "\ud800",
        ["w7", "\udfff w7"],
        [-1],
        [[5], [10**30]],
    ):
        status, answer, _ = served.send("/v1/completions", {"prompt": prompt})
        assert status == 400 and answer["error"]["param"] == "prompt", prompt
    for room in (1, 15, 16, 17):  # 16 is what nobody asked for: as many as fit
        answer = served.send("/v1/completions", {"prompt": [5] * (512 - room), "ignore_eos": True})[1]
        assert answer["usage"]["completion_tokens"] == min(16, room)
    status, answer, _ = served.send("/v1/completions", {"prompt": [[5]] * 32, "n": 16, "max_tokens": 1})
    assert status == 400 and "got 512 answers to 32 prompts, wanted 72" in answer["error"]["message"]


def test_tokenize_version_health(served):
    assert served.send("/tokenize", {"prompt": "w7 w8"})[1] == {"count": 2, "max_model_len": 512, "tokens": [7, 8]}
    assert served.send("/tokenize", {"messages": chat("w7")})[1]["tokens"] == [7, 50]
    assert served.send("/tokenize", {"messages": chat("w7"), "prompt": "w7"})[0] == 400
    for flag, status in ((True, 400), (False, 200)):
        assert served.send("/tokenize", {"messages": chat("w7"), "add_special_tokens": flag})[0] == status
    assert served.send("/health")[0] == 200 and "version" in served.send("/version")[1]
    assert served.send("/health", method="HEAD")[:2] == (200, "") == served.send("/", method="HEAD")[:2]
    for path, methods in (("/health", {"GET", "HEAD"}), ("/v1/chat/completions", {"POST"})):
        status, answer, headers = served.send(path, method="DELETE")
        assert status == 405 and set(headers["allow"].split(", ")) == methods and "error" in answer
    assert served.send("/health", X_Request_Id="mine")[2]["x-request-id"] == "mine"
    assert served.send("/v1/models")[1]["data"][0]["max_model_len"] == 512


def test_a_key_is_asked_for():
    served = tiny_served(api_key="right")
    try:
        good = {"prompt": "w7", "max_tokens": 2}
        for key in (
            None,
            "Bearer wrong",
            "Bearer ",
            "Bearer rightly",
            "Bearer righ",
            "Basic right",
            "Bearer riéht",
            "right",
        ):
            heads = {} if key is None else {"Authorization": key}
            for path, body in (("/v1/completions", good), ("/v1/models", None), ("/tokenize", {"prompt": "w7"})):
                status, answer, headers = served.send(path, body, **heads)
                assert status == 401 and answer["error"]["code"] == "invalid_api_key", key
                assert headers["www-authenticate"] == "Bearer" and "right" not in answer["error"]["message"]
        for scheme in ("Bearer", "bearer"):
            assert served.send("/v1/completions", good, Authorization=f"{scheme} right")[0] == 200
        assert served.send("/health")[0] == served.send("/")[0] == served.send("/metrics")[0] == 200
        with openai.OpenAI(base_url=served.url + "/v1", api_key="right") as client:
            assert client.completions.create(model="tiny", **good).choices[0].text
    finally:
        served.stop()


# -- load, and clients that leave


def idle(served: Served) -> bool:
    now = served.engine.metrics()
    return now["running"] == now["waiting"] == 0


def test_a_full_queue_says_when_to_come_again():
    served = tiny_served(slots=1, max_queued=1)
    try:
        asked = {"prompt": "w7", "max_tokens": 2}
        with served.held():
            # one place is left: several choices get all that they need or none
            status, answer, headers = served.send("/v1/completions", {**asked, "n": 2})
            assert status == 503 and answer["error"]["code"] == "queue_full" and int(headers["retry-after"]) >= 1
            assert served.engine.metrics()["waiting"] == 1  # until the engine's thread goes on: it has left then
            assert served.send("/v1/completions", asked)[0] == 503
        wait_for(lambda: idle(served))
        assert served.complete("w7", max_tokens=2)["choices"]
        line = 'foretell:requests_rejected_total{model_name="tiny",reason="queue_full"} 2.0'
        assert line in served.send("/metrics")[1]
    finally:
        served.stop()


def raw(served: Served, body: dict, chunk: int = 0) -> socket.socket:
    """A connection that has asked, and read nothing."""
    made = socket.socket()
    if chunk:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, chunk)
    made.connect(("127.0.0.1", served.port))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    made.sendall(head.encode() + b"\r\n\r\n" + data)
    return made


def test_who_hangs_up_leaves_the_batch_and_nobody_else_notices(monkeypatch):
    served = tiny_served(context=200_000, slots=4, max_queued=4)
    try:
        endless = {"prompt": "w7", "max_tokens": 150_000, "ignore_eos": True}
        wanted = served.tokenizer.decode(own(served, PROMPTS[0], 30))

        def ended(count: int) -> None:
            answer = served.complete(PROMPTS[0], max_tokens=30, temperature=0)
            assert answer["choices"][0]["text"].strip() == wanted
            wait_for(lambda: served.engine.metrics()["requests"]["cancelled"] == count)
            wait_for(lambda: idle(served))

        streaming = raw(served, {**endless, "stream": True})
        assert b"200 OK" in streaming.recv(1000)
        streaming.close()
        ended(1)
        whole = raw(served, endless)
        wait_for(lambda: served.engine.metrics()["running"] == 1)
        whole.close()
        ended(2)
        with served.held():  # one that waits
            crowd = [raw(served, endless) for _ in range(4)]
            wait_for(lambda: served.engine.metrics()["waiting"] == 4)
            for one in crowd:
                one.close()
        ended(7)  # who held it is one
        monkeypatch.setattr(app, "STALLED_SECONDS", 0.5)
        served.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        never = raw(served, {**endless, "stream": True, "logprobs": 20}, chunk=4096)  # does not read
        ended(8)
        never.close()
    finally:
        served.stop()


def test_many_at_once_get_their_own_answers(served):
    asked = [(prompt, new) for prompt in PROMPTS for new in (5, 17, 40)]
    got: dict = {}

    def ask(prompt: str, new: int) -> None:
        got[prompt, new] = served.complete(prompt, max_tokens=new, temperature=0, return_token_ids=True)

    threads = [threading.Thread(target=ask, args=one) for one in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt, new in asked:
        assert got[prompt, new]["choices"][0]["token_ids"] == own(served, prompt, new, eos_token_id=None)


def test_metrics_count_what_the_answers_say():
    served = tiny_served()
    try:
        length = tokens = drafted = accepted = 0
        long = " ".join(f"w{i}" for i in range(40))
        for prompt in (*PROMPTS[:3], long, f"{long} w7 w8"):
            usage = served.complete(prompt, max_tokens=20, num_draft_tokens=2, ignore_eos=True)["usage"]
            length += usage["prompt_tokens"]
            tokens += usage["completion_tokens"]
            drafted += usage["foretell"]["drafted"]
            accepted += usage["foretell"]["accepted"]
        served.send("/v1/completions", {"prompt": "w7", "n": -1})
        lines = [line.rpartition(" ") for line in served.send("/metrics")[1].splitlines() if not line.startswith("#")]
        assert all('model_name="tiny"' in name for name, _, _ in lines)
        values = {re.sub(r',?model_name="tiny",?', "", name): float(value) for name, _, value in lines}
        assert values["vllm:generation_tokens_total{}"] == tokens == 100
        assert values["vllm:prompt_tokens_total{}"] == values["vllm:prefix_cache_queries_total{}"] == length
        cached = usage["prompt_tokens_details"]["cached_tokens"]  # of the last, which begins as the one before
        assert 30 < values["vllm:prefix_cache_hits_total{}"] == cached < usage["prompt_tokens"]
        assert values["vllm:spec_decode_num_draft_tokens_total{}"] == drafted > 0
        assert values["vllm:spec_decode_num_accepted_tokens_total{}"] == accepted > 0
        by_place = [v for name, v in values.items() if "accepted_tokens_per_pos_total" in name]
        assert len(by_place) == 2 and sum(by_place) == accepted and by_place[0] >= by_place[1]
        assert values['vllm:request_success_total{finished_reason="length"}'] == 5
        assert values["vllm:num_requests_running{}"] == values["vllm:num_requests_waiting{}"] == 0
        for name in ("time_to_first_token", "e2e_request_latency"):
            assert values[f"vllm:{name}_seconds_count{{}}"] == 5
        assert 0 < values["vllm:inter_token_latency_seconds_count{}"] < tokens
        assert values['foretell:requests_rejected_total{reason="invalid_request"}'] == 1
    finally:
        served.stop()


# -- the command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama", 1, max_position_embeddings=100_000).save_pretrained(tmp_path / "tiny-model")
    chat_tokenizer().save_pretrained(tmp_path / "tiny-model")
    return tmp_path / "tiny-model"


def test_sigterm_drains_and_a_second_server_is_told(folder):
    command = [sys.executable, "-m", "foretell", "serve", str(folder), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FORETELL_API_KEY": "secret"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            said = process.stdout.readline()
            assert said.startswith("tiny-model (lookup) at http://127.0.0.1:"), said + process.stderr.read()
            port = int(said.split("http://127.0.0.1:")[1].split(",")[0])
            second = subprocess.run([*command[:-1], str(port)], capture_output=True, text=True, env=environment)
            assert second.returncode == 2 and second.stderr.count("\n") == 1 and f"and {port}, where" in second.stderr
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret") as client:
                stream = client.completions.create(
                    model="tiny-model", prompt="w7", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
                )
                parts = [next(stream)]
                process.send_signal(signal.SIGTERM)
                parts += list(stream)
            assert parts[-1].choices[0].finish_reason == "length"
            said, errors = process.communicate(timeout=120)
            assert said == "stopped: what was taken is answered\n" and process.returncode == 0 and errors == ""
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_loading_leaves_no_threads_of_matrix_products(folder):
    """Those would keep the engine's own from waiting awake: each product takes longer."""
    command, servers = [sys.executable, "-m", "foretell", "serve", str(folder), "--port", "0"], []
    try:
        for cores in ("1", "5"):
            environment = {**os.environ, "OMP_NUM_THREADS": cores, "OPENBLAS_NUM_THREADS": "1"}
            servers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        for process in servers:
            assert process.stdout.readline().startswith("tiny-model (lookup) at ")
        wait_for(lambda: len({len(os.listdir(f"/proc/{process.pid}/task")) for process in servers}) == 1)
    finally:
        for process in servers:
            process.kill()
            process.communicate()


def test_flags_are_checked_before_the_model_is_loaded(folder, tmp_path):
    for flags, said in (
        (["--port", "70000"], "wanted 0 to 65535"),
        (["--slots", "0"], "slots: got 0"),
        (["--max-queued", "-1"], "max_queued: got -1"),
        (["--api-key", ""], "api_key: got nothing"),
        (["--host", "no.such.host.invalid"], "nothing can listen"),
        (["--drafter", "magic"], "magic"),
        (["--drafter", "mtp", "--port", "0"], "needs a trained module"),
        (["--module", str(tmp_path / "none"), "--port", "0"], "none"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            serve([str(folder), *flags])


def test_regenerate_can_ask_it(served, folder, tmp_path):
    """Our own endpoint is one of those that it knows; the answers are those of our own decoder."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    served.mtp.model.save_pretrained(tmp_path / "tiny")
    served.tokenizer.save_pretrained(tmp_path / "tiny")
    common = [str(tmp_path / "tiny"), "--prompts", str(prompts), "--max-new-tokens", "9", "--temperature", "0"]
    assert regenerate([*common, "--output", str(tmp_path / "own")]) == 0
    asks = ["--engine", "openai", "--base-url", served.url, "--concurrency", "3"]
    assert regenerate([*common, "--output", str(tmp_path / "asked"), *asks]) == 0
    own_rows, asked_rows = (
        [{name: row[name] for name in ("messages", "input_ids", "labels") if name in row} for row in rows]
        for rows in (load_dataset(str(tmp_path / name), split="train") for name in ("own", "asked"))
    )
    assert own_rows == asked_rows and len(own_rows) == len(PROMPTS) and "labels" in own_rows[0]
