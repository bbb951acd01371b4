"""foretell cache: what encoded rows are kept, whether they are whole, and away with them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from foretell.config import parse


@dataclass(kw_only=True)
class CacheSettings:
    """Flags of `foretell cache`."""

    action: Literal["ls", "verify", "rm"] = field(
        metadata={"help": "List, read and check, or remove.", "positional": True}
    )
    folder: str | None = field(
        default=None,
        metadata={"help": "Of a cache, or of one entry; without it that of foretell train.", "positional": True},
    )


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code: 1 where verify finds something wrong."""
    from foretell.data.encoded_cache import default_root, entries, problems_of
    from foretell.runtime import clock

    settings = parse(CacheSettings, argv, prog="foretell cache")
    root = settings.folder or str(default_root())
    found, wrong, freed = list(entries(root)), 0, 0
    for entry in found:
        tokens, size = entry["tokens"], entry["bytes"]
        line = f"{entry['key']}  {entry['rows']:>9,} rows {tokens:>13,} tokens {size / 1e6:>9.1f} MB"
        line += f"  {size / tokens:.2f} bytes a token" if tokens else ""
        line += f"  {clock(entry['age'])} old" if "age" in entry else ""
        if settings.action == "rm":
            shutil.rmtree(entry["folder"])
            entry["folder"].with_name(f".{entry['key']}.lock").unlink(missing_ok=True)
            freed += size
            continue
        problems = problems_of(entry) if settings.action == "verify" else []
        wrong += bool(problems)
        whole = "" if entry["whole"] else "  not whole"
        print(f"{line}{'  ok' if settings.action == 'verify' and not problems else whole}")
        for problem in problems:
            print(f"  {problem}")
    what = f"{len(found)} entries" if found else "nothing is kept"
    print(f"{root}: {what}" + (f", removed, {freed / 1e6:.1f} MB" if settings.action == "rm" and found else ""))
    return int(wrong > 0)
