"""A real server for tests: a tiny model with a module that knows most of its text, one engine, one port of the OS's."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from drafters import knowing_mtp, leaning_model
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foretell.cli.serve import listen
from foretell.serving.app import Server
from foretell.serving.engine import Engine

TEMPLATE = "{% for m in messages %}{{ m.content }}{{ ' ' }}{% endfor %}{{ 'w50' if add_generation_prompt else '' }}"


def wait_for(state: Callable[[], Any], seconds: float = 120.0) -> Any:
    """The state, once it holds; it is waited for, however slow the machine is."""
    until = time.monotonic() + seconds
    while not (found := state()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
    return found


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Words, with a template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def byte_tokenizer(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """A token for each byte, then two special ones, then what is merged."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: i for i, word in enumerate([*words, "<pad>", "<end>", *map("".join, merges)])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


class Served:
    """A server that runs in a thread, its parts, and a way to ask it."""

    def __init__(self, mtp: Any, tokenizer: Any, drafter: str = "mtp", api_key: str | None = None, **engine: Any):
        self.mtp, self.tokenizer = mtp, tokenizer
        self.engine = Engine(mtp, drafter=drafter, **engine)
        self.server = Server(self.engine, tokenizer, "tiny", api_key=api_key)
        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.uvicorn = uvicorn.Server(uvicorn.Config(self.server.app, log_level="error", timeout_graceful_shutdown=60))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]})
        self.thread.start()

    def stop(self) -> None:
        """What was taken is answered."""
        self.uvicorn.should_exit = True
        self.thread.join()

    def send(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> tuple[int, Any, dict]:
        """(status, body as JSON where it is some, headers)."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as connection:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            heads = {"Content-Type": "application/json"} | {name.replace("_", "-"): v for name, v in headers.items()}
            connection.request(method or ("GET" if body is None else "POST"), path, data, heads)
            answer = connection.getresponse()
            raw = answer.read()
            kind = answer.headers.get("content-type", "")
            said = json.loads(raw) if raw and "json" in kind else raw.decode()
            return answer.status, said, dict(answer.headers.items())

    def complete(self, prompt: Any, path: str = "/v1/completions", **body: Any) -> dict:
        """The answer to a completion."""
        status, answer, _ = self.send(path, {"model": "tiny", "prompt": prompt, **body})
        assert status == 200, answer
        return answer

    def events(self, prompt: Any, path: str = "/v1/completions", **body: Any) -> list[Any]:
        """The same as a stream; [DONE] must end it and is left out."""
        about = {"messages": prompt} if "chat" in path else {"prompt": prompt}
        status, raw, _ = self.send(path, {"model": "tiny", **about, "stream": True, **body})
        assert status == 200, raw
        lines = raw.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The engine's thread stands still, between two rounds."""
        from foretell.serving.requests import Request

        go, there = threading.Event(), threading.Event()

        def wait(_: Any) -> None:
            there.set()
            go.wait()

        running = self.engine.submit(Request(input_ids=[5], max_new_tokens=400, ignore_eos=True), wait)
        there.wait()
        try:
            yield
        finally:
            running.cancel()
            go.set()


def tiny_served(**how: Any) -> Served:
    """Words, and drafts that are mostly right."""
    return Served(knowing_mtp(leaning_model(max_position_embeddings=how.pop("context", 512))), chat_tokenizer(), **how)
