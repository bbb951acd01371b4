"""What a data set teaches, to look at before training: counts, lengths, and some rows with each depth's target.

The page is one file that loads nothing, as report.py's.
"""

# T tokens of a row, K depths.

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from foretell.data.collate import MTPCollator, to_batch
from foretell.data.prompts import Encoded, EncodeStats
from foretell.evaluation.drawing import Html, bar, bar_row, element, note, section, table
from foretell.evaluation.report import write_page
from foretell.ops.shift import labels_of
from foretell.types import IGNORE_INDEX

LOOKED_AT = 20_000  # rows in which ends are looked for
SHOWN_TOKENS = 600  # of a row
BINS = 16
QUANTILES = {"shortest": 0.0, "median": 0.5, "95 %": 0.95, "longest": 1.0}


def describe(
    encoded: Encoded,
    stats: EncodeStats,
    tokenizer: Any,
    ends: Collection[int],
    depth: int,
    samples: int = 4,
    seed: int = 0,
    packed: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Counts, a histogram of lengths, and rows chosen by chance, of `packed` if given; as JSON takes it.

    ends: ids that end an answer. depth: K of the targets that are shown.
    """
    chance, lengths = random.Random(seed), sorted(encoded.lengths.tolist())
    width = -(-lengths[-1] // BINS)
    looked = range(len(encoded)) if len(encoded) <= LOOKED_AT else chance.sample(range(len(encoded)), LOOKED_AT)
    last = (next(label for label in reversed(encoded[at]["labels"]) if label != IGNORE_INDEX) for at in looked)
    rows = encoded if packed is None else packed
    chosen = sorted(chance.sample(range(len(rows)), min(samples, len(rows))))
    return {
        "rows": {name: getattr(stats, name) for name in ("rows", "kept", "truncated", "dropped", "skipped")},
        "packed_rows": None if packed is None else len(packed),
        "tokens": stats.tokens,
        "trained_tokens": stats.trained_tokens,
        "ends_trained": {"rows": sum(label in ends for label in last), "of": len(looked)},
        "lengths": {name: lengths[round(at * (len(lengths) - 1))] for name, at in QUANTILES.items()},
        "histogram": [
            {"from": low + 1, "to": low + width, "rows": sum(low < length <= low + width for length in lengths)}
            for low in range(0, lengths[-1], width)
        ],
        "depth": depth,
        "samples": [{"row": at, **_sample(rows[at], tokenizer, depth)} for at in chosen],
    }


def _sample(row: Mapping[str, Any], tokenizer: Any, depth: int) -> dict[str, Any]:
    """A row as the trainer sees it: texts of its tokens, what each is, where documents start, and what each depth is
    asked there.
    """
    batch = to_batch(MTPCollator(0, hidden=False)([row]))
    ids, labels, documents = (of[0].tolist() for of in (batch.input_ids_BT, batch.labels_BT, batch.document_BT))
    kinds, trained = [], False
    for at, label in enumerate(labels):
        starts = at == 0 or documents[at] != documents[at - 1]
        trained = (trained and not starts) or label != IGNORE_INDEX
        kinds.append("trained" if label != IGNORE_INDEX else "ignored" if trained else "prompt")
    texts = {token: tokenizer.decode([token]) for token in {*ids, *labels} - {IGNORE_INDEX}}
    return {
        "tokens": [texts[token] for token in ids],
        "kinds": kinds,
        "documents": documents,
        "targets": [[texts.get(label) for label in labels] for labels in labels_of(batch, depth)[0].tolist()],
    }


def as_text(found: dict[str, Any]) -> str:
    """The counts, the histogram and the rows, trained tokens in ⟦brackets⟧, for a terminal."""
    lines = [f"{name:<24}{value}" for name, value in facts(found)]
    most = max(bin_["rows"] for bin_ in found["histogram"])
    lines += ["", "tokens of a row"]
    for low, high, rows in map(dict.values, found["histogram"]):
        lines.append(f"{low:>7,} to {high:>7,}{rows:>10,} {'█' * round(40 * rows / most)}")
    for sample in found["samples"]:
        lines += ["", f"row {sample['row']}: trained tokens in ⟦brackets⟧, ┃ where a document starts"]
        text, before = "", (None, None)
        for token, kind, document in zip(sample["tokens"], sample["kinds"], sample["documents"]):
            text += "⟧" if before[0] == "trained" and (kind, document) != before else ""
            text += "┃" if before[1] not in (None, document) else ""
            text += "⟦" if kind == "trained" and (kind, document) != before else ""
            text, before = text + token, (kind, document)
        lines.append(text + ("⟧" if before[0] == "trained" else ""))
        asked = [at for at, targets in enumerate(sample["targets"]) if any(target is not None for target in targets)]
        for at in asked[:3]:
            said = "  ".join(f"depth {k}: {target!r}" for k, target in enumerate(sample["targets"][at], start=1))
            lines.append(f"  after {sample['tokens'][at]!r} (token {at})  {said}")
    return "\n".join(lines)


def facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values, for people."""
    rows, ends = found["rows"], found["ends_trained"]
    lost = f"cut {rows['truncated']:,}, without an answer {rows['dropped']:,}, bad {rows['skipped']:,}"
    share = found["trained_tokens"] / found["tokens"]
    out = [
        ("rows", f"{rows['kept']:,} of {rows['rows']:,} ({lost})"),
        ("tokens", f"{found['tokens']:,}; of a row " + ", ".join(f"{n} {v:,}" for n, v in found["lengths"].items())),
        ("trained tokens", f"{found['trained_tokens']:,} ({share:.1%})"),
        ("end token trained", f"last in {ends['rows']:,} of {ends['of']:,} rows"),
    ]
    if found["packed_rows"] is not None:
        out.insert(1, ("packed rows", f"{found['packed_rows']:,}"))
    return out + [(name, str(value)) for name, value in (found.get("plan") or {}).items()]


def write_data_page(found: dict[str, Any], title: str, path: str | Path) -> Path:
    """Write the page; folders that are missing are made."""
    most = max(bin_["rows"] for bin_ in found["histogram"])
    bins = [
        bar_row(f"{low:,} to {high:,}", bar("mtp", rows / most), f"{rows:,}")
        for low, high, rows in map(dict.values, found["histogram"])
    ]
    key = [element("span", kind, class_=f"token {kind}") for kind in ("prompt", "trained", "ignored")]
    depths = f"Under each token, what depths 1 to {found['depth']} are asked there; nothing where they are not."
    rows = section("Rows as the trainer sees them", note(key, " ", depths), list(map(_drawn, found["samples"])))
    main = [section("Counts", table(("", ""), facts(found))), section("Tokens of a row", bins), rows]
    return write_page(path, title, "foretell inspect data", [element("h1", title)], main)


def _drawn(sample: dict[str, Any]) -> Html:
    cells, count = [], len(sample["tokens"])
    for at in range(min(count, SHOWN_TOKENS)):
        starts = " starts" if at > 0 and sample["documents"][at] != sample["documents"][at - 1] else ""
        asked = any(target is not None for target in sample["targets"][at])
        targets = [element("small", _visible(target or "")) for target in sample["targets"][at] if asked]
        token = element("b", _visible(sample["tokens"][at]))
        cells.append(element("span", token, targets, class_=f"token {sample['kinds'][at]}{starts}"))
    more = note(f"and {count - SHOWN_TOKENS:,} tokens more") if count > SHOWN_TOKENS else None
    return element("div", element("h3", f"Row {sample['row']:,}: {count:,} tokens"), cells, more, class_="tokens")


def _visible(text: str) -> str:
    blank = "\N{NO-BREAK SPACE}" if text.strip() else "\N{OPEN BOX}"
    return text.translate({ord("\n"): "⏎", ord("\t"): "⇥", ord(" "): blank})
