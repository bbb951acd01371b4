"""foretell VERB: finds a verb's file, imports it only then, and turns what a user can mend into one clear error."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from foretell import __version__
from foretell.config import nearest

# verb: (module:function, what --help says). The function takes the words after the verb.
VERBS = {
    "train": ("foretell.cli.train:main", "train an MTP module for a target model"),
    "prompts": ("foretell.cli.prompts:main", "any source of prompts to one clean file"),
    "sft": ("foretell.cli.sft:main", "TRL's `trl sft`, with multi-token prediction (--mtp_enabled)"),
    "grpo": ("foretell.cli.grpo:main", "TRL's `trl grpo`, with drafts in its rollouts and a module that learns"),
    "regenerate": ("foretell.cli.regenerate:main", "let a model answer prompts: data to train on"),
    "cache": ("foretell.cli.cache:main", "encoded rows that are kept: list, verify, remove"),
    "generate": ("foretell.cli.generate:main", "decode with an MTP module, losslessly"),
    "serve": ("foretell.cli.serve:main", "answer over HTTP as OpenAI does, with a page to try it"),
    "export": ("foretell.cli.export:main", "write a module as engines and people read it, and prove it"),
    "inspect": ("foretell.cli.inspect:main", "say what is in a module's or model's folder; inspect data: look at rows"),
    "evaluate": ("foretell.cli.evaluate:main", "measure acceptance and speed of a module on a workload"),
    "verify": ("foretell.cli.verify:main", "check that decoding with a module is lossless; exit status 1 if not"),
    "sweep": ("foretell.cli.evaluate:sweep", "measure every draft length and batch size beside auto"),
    "compare": ("foretell.cli.evaluate:compare", "say what differs between two evaluations, and what is noise"),
    "report": ("foretell.cli.evaluate:report", "draw an evaluation as one HTML page"),
    "demo": ("foretell.cli.demo:main", "train and compare on a real model, on this machine, in minutes"),
}


def help_text() -> str:
    lines = ["usage: foretell VERB [flags]", ""]
    lines += [f"  {verb:<10} {about}" for verb, (_, about) in VERBS.items()]
    return "\n".join([*lines, "", "foretell VERB --help lists a verb's flags; foretell --version."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code. 2 is a user's error, told without a traceback unless FORETELL_DEBUG=1."""
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if verb == "--version":
        print(f"foretell {__version__}")
        return 0
    if verb not in VERBS:
        return _error(f"unknown verb {verb!r}{nearest(verb, VERBS)} (verbs: {', '.join(VERBS)})")
    module, _, function = VERBS[verb][0].partition(":")
    try:
        return getattr(importlib.import_module(module), function)(rest) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as a shell reports it
    except BrokenPipeError:
        # the reader left (foretell inspect | head): no error, and Python must not find the pipe again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("FORETELL_DEBUG") == "1":
            raise
        return _error(str(error) or type(error).__name__)


def _error(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
