"""foretell prompts: any source of prompts to one clean file of them, with a report of what became of every row."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from foretell.config import parse, to_dict
from foretell.data.prompt_file import PromptRules, PromptSet
from foretell.runtime import clock, provenance, write_json_atomic


@dataclass(kw_only=True)
class PromptSettings(PromptRules):
    """Flags of `foretell prompts`."""

    sources: list[str] = field(
        metadata={"help": "Files (JSONL, JSON, parquet, CSV, also .gz), folders, datasets names.", "positional": True}
    )
    output: str | None = field(default=None, metadata={"help": "File for the prompts; a report lies beside it."})
    plan: bool = field(default=False, metadata={"help": "Count, write nothing."})

    def problems(self) -> list[str]:
        """See config.check."""
        found = super().problems()
        if self.output is None and not self.plan:
            found.append("output: got none, wanted a file: --output prompts.jsonl, or --plan.")
        elif self.output is not None and Path(self.output).resolve() in [Path(path).resolve() for path in self.sources]:
            found.append(f"output: got {self.output}, which is a source; wanted another file.")
        return found


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code."""
    settings, started = parse(PromptSettings, argv, prog="foretell prompts"), time.monotonic()
    tokenizer = None
    if settings.model is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(settings.model)
    prompts = PromptSet(settings.sources, settings, tokenizer)
    report, seconds = prompts.report(), time.monotonic() - started
    for step, rows in report["steps"].items():
        print(f"{step:<22}{rows:>12,}")
    print(f"\n{'domain':<22}{'found':>12}{'kept':>12}")
    for name, counts in report["domains"].items():
        print(f"{name:<22}{counts['found']:>12,}{counts['kept']:>12,}")
    for name, left in report["missing_of_quotas"].items():
        print(f"quota of {name}: {left:,} prompts are missing")
    for name, overlap in report["overlaps"].items():
        print(f"{name}: {overlap['prompts']:,} prompts overlap", *overlap["first"], sep="; ")
    if report["tokens"] is not None:
        print("tokens: " + ", ".join(f"{name} {count:,}" for name, count in report["tokens"].items()))
    folder = next(path for path in (Path(settings.output or ".").resolve()).parents if path.is_dir())
    free = shutil.disk_usage(folder).free
    print(f"disk: {prompts.bytes / 1e6:,.1f} MB, free {free / 1e6:,.0f} MB; reading took {clock(seconds)}")
    if settings.plan:
        print(f"plan: nothing is written; writing reads the kept rows again, about {clock(seconds)} at most")
        return 0
    if prompts.bytes > free:
        raise ValueError(
            f"output: {prompts.bytes:,} bytes do not fit on the disk of {settings.output} ({free:,} free)."
        )
    output = Path(str(settings.output))
    report["sha256"] = prompts.write(output)
    about = {"settings": to_dict(settings), "seconds": time.monotonic() - started, "provenance": provenance()}
    write_json_atomic(output.with_name(output.name + ".report.json"), report | about)
    print(f"prompts: {output}\nreport:  {output}.report.json")
    return 0
