"""foretell serve: an OpenAI-compatible server for a model and its module."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from foretell.cli.loading import ModelSettings, load_target
from foretell.config import parse

KEY = "FORETELL_API_KEY"
UNREAD_SECONDS = 60
Made = TypeVar("Made")


@dataclass(kw_only=True)
class ServeSettings(ModelSettings):
    """Flags of `foretell serve`. It stops on SIGTERM or Ctrl+C, when what it has taken is answered."""

    drafter: Literal["mtp", "lookup", "mtp+lookup"] | None = field(
        default=None, metadata={"help": "Who drafts: mtp, lookup, or mtp+lookup (the default with a module)."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; 0.0.0.0 is all of this machine's."})
    port: int = field(default=8000, metadata={"help": "Port to listen at; 0 is any free one, which is printed."})
    api_key: str | None = field(
        default=None, metadata={"help": f"What clients must send as their key; without it {KEY} of the environment."}
    )
    max_queued: int = field(default=64, metadata={"help": "Requests that may wait; one more is told to come later."})
    slots: int = field(default=64, metadata={"help": "Requests that are decoded at once."})
    enable_prefix_caching: bool = field(
        default=True, metadata={"help": "Read once what prompts begin with alike; --no-enable-prefix-caching is off."}
    )
    served_model_name: str | None = field(
        default=None, metadata={"help": "The model's name to clients; without it its folder's."}
    )

    def problems(self) -> list[str]:
        """See config.check."""
        found = super().problems()
        if not 0 <= self.port < 2**16:
            found.append(f"port: got {self.port}, wanted 0 to 65535.")
        if self.max_queued < 0:
            found.append(f"max_queued: got {self.max_queued}, wanted at least 0.")
        if self.slots < 1:
            found.append(f"slots: got {self.slots}, wanted at least 1.")
        for name in ("api_key", "served_model_name"):
            if getattr(self, name) == "":
                found.append(f"{name}: got nothing, wanted a text, or leave it out.")
        return found


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code."""
    settings = parse(ServeSettings, argv, prog="foretell serve")
    key = settings.api_key or os.environ.get(KEY) or None
    with listen(settings.host, settings.port) as at:
        try:
            from foretell.serving.app import Server, run
        except ModuleNotFoundError as error:
            raise ValueError(f"foretell serve needs {error.name}: pip install 'foretell[serve]'.") from error
        from foretell.mtp import load_with_module
        from foretell.serving.engine import Engine

        def made() -> tuple[Engine, Any, str]:
            model, tokenizer = load_target(settings.model, settings.dtype)
            mtp, trained = load_with_module(model, settings.module)
            drafter = settings.drafter or ("mtp+lookup" if trained else "lookup")
            if not trained and "mtp" in drafter:
                raise ValueError(f"drafter: got {drafter!r}, which needs a trained module: --module FOLDER.")
            engine = Engine(
                mtp,
                drafter=drafter,
                slots=settings.slots,
                max_queued=settings.max_queued,
                prefix_caching=settings.enable_prefix_caching,
            )
            return engine, tokenizer, drafter

        engine, tokenizer, drafter = in_thread_that_ends(made)
        place = Path(settings.model)
        root = place.resolve().stem if place.is_file() else place.resolve().name if place.exists() else settings.model
        name = settings.served_model_name or root
        host, port = at.getsockname()[:2]
        if key is None and host not in ("127.0.0.1", "::1"):
            print(f"note: anybody who reaches {host} may ask; --api-key KEY or {KEY} asks for a key", file=sys.stderr)
        where = f"[{host}]" if ":" in host else host
        print(f"{name} ({drafter}) at http://{where}:{port}, a page to try it at /", flush=True)
        # uvicorn raises the signal again when it has stopped, which would end this process before it can say so
        signal.signal(signal.SIGTERM, lambda *_: None)
        run(Server(engine, tokenizer, name, root, key), at)
    print("stopped: what was taken is answered", flush=True)
    return 0


def in_thread_that_ends(make: Callable[[], Made]) -> Made:
    """What it makes. Threads that matrix products start stay with the thread that asked for one as long as it lives; of
    more than there are cores, OpenMP lets none wait awake, and each product of the engine's own would take longer.
    """
    told: Future[Made] = Future()

    def work() -> None:
        try:
            told.set_result(make())
        except BaseException as error:
            told.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return told.result()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Taken before a model is loaded, so that a second server learns at once.

    Raises:
        ValueError: the port is taken, or the host is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"host, port: got {host} and {port}, where nothing can listen ({error}); wanted an address of this machine "
            "and a free port, --port 0 for any."
        ) from None
    if sys.platform == "linux":  # whoever reads nothing for so long is cut off, also while the server closes
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNREAD_SECONDS)
    return made
