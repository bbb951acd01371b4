"""A real HTTP server in the place of an OpenAI-compatible one, with the faults that such servers have.

As a program it takes the place of the Python that runs vLLM.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LONG = 6  # --max-new-tokens of most runs


def said_to(prompt: list[int], seed: int = 0, longest: int = LONG) -> tuple[list[int], str]:
    """What the test's server answers: tokens of these prompt and seed alone; every fifth answer is cut."""
    length = 2 + sum(prompt) // 2 % 5
    tokens = [20 + (7 * sum(prompt) + 13 * at + seed) % 70 for at in range(length)]
    return (tokens[:longest], "length") if length >= longest else ([*tokens, 1], "stop")


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server whose `faults` say what befalls the n-th request: None, "drop", "slow", a number, or
    what its /models lists."""

    daemon_threads = True

    def __init__(self, faults=None, ids=True, served="tiny-model", delay=0.0, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.faults, self.ids, self.served, self.delay = faults or {}, ids, served, delay
        self.asked: list[dict] = []
        self.count, self.most, self.at_once = itertools.count(), 0, 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)

    def handle_error(self, *_):
        pass  # of connections that it dropped itself


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def reply(self, code: int, body: dict, **headers) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply(200, {"data": [{"id": self.server.served, "root": f"/models/{self.server.served}"}]})

    def do_POST(self):
        server = self.server
        with server.lock:
            fault = server.faults.get(next(server.count))
            server.at_once += 1
            server.most = max(server.most, server.at_once)
        try:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(0.3 if fault == "slow" else server.delay)
            if fault == "drop":
                self.connection.close()
            elif fault == "half":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.connection.close()
            elif fault == "nothing":
                self.reply(200, {"object": "text_completion"})
            elif isinstance(fault, int):
                self.reply(fault, {"error": f"fault {fault}"}, **({"Retry-After": "0.2"} if fault == 429 else {}))
            else:
                server.asked.append(body)
                ids, reason = said_to(body["prompt"], 0 if body["temperature"] == 0 else body["seed"] % 5)
                words = [f"w{token}" for token in ids if token != 1]
                choice = {"index": 0, "text": " ".join(words), "finish_reason": reason}
                choice |= {"token_ids": ids} if server.ids else {}
                self.reply(200, {"choices": [choice], "usage": {"completion_tokens": len(ids)}})
        finally:
            with server.lock:
                server.at_once -= 1


if __name__ == "__main__":
    given = sys.argv[1:]
    assert given[:3] == ["-m", "vllm.entrypoints.openai.api_server", "--model"] and given[-2:] == ["--own", "yes"], (
        given
    )
    print("loading", flush=True)
    Server(served=given[3], port=int(given[given.index("--port") + 1]))
    threading.Event().wait()
