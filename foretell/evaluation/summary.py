"""What a result of the demo says, in words and in a plain table: shared by the terminal and the page of report.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

Result = dict[str, Any]


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def fixed(value: Any, digits: int = 1, unit: str = "") -> str | None:
    return f"{value:,.{digits}f}{unit}" if is_number(value) else None


def integer(value: Any) -> str | None:
    return fixed(value, 0)


def percent(value: Any) -> str | None:
    return f"{100 * value:.0f}\N{NO-BREAK SPACE}%" if is_number(value) else None


def duration(seconds: Any) -> str | None:
    if not is_number(seconds):
        return None
    if seconds < 60:
        return f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}\N{NO-BREAK SPACE}min\N{NO-BREAK SPACE}{rest:02d}\N{NO-BREAK SPACE}s"


def spread_text(way: Result) -> str | None:
    spread = list(way.get("spread") or [])
    return f"{spread[0]:.1f} to {spread[1]:.1f}" if len(spread) == 2 and all(map(is_number, spread)) else None


def ratio_to_off(result: Result, way: Result) -> float | None:
    if way.get("name") == result.get("best") and is_number(result.get("speedup_vs_off")):
        return result["speedup_vs_off"]  # the headline's number: one definition
    off = find_way(result, "off").get("tokens_per_second")
    speed = way.get("tokens_per_second")
    return speed / off if is_number(speed) and is_number(off) and off > 0 else None


def find_way(result: Result, name: str | None) -> Result:
    return next((way for way in result.get("ways") or () if way.get("name") == name), {})


def label_of(result: Result, name: str) -> str:
    return find_way(result, name).get("label") or name


def all_equal(result: Result) -> bool | None:
    """False as soon as one part of the result says so; None if nobody compared the tokens."""
    claims = [result.get("tokens_equal"), *(way.get("equal") for way in result.get("ways") or ())]
    counts = result.get("equality") or {}
    if is_number(counts.get("runs")) and is_number(counts.get("equal")):
        claims.append(counts["equal"] == counts["runs"])
    claims = [claim for claim in claims if claim is not None]
    return all(claims) if claims else None


def equality_statement(result: Result) -> str | None:
    equal, counts = all_equal(result), result.get("equality") or {}
    if equal is None:
        return None
    prompts = f" on {counts['prompts']:,} prompts" if is_number(counts.get("prompts")) else ""
    if is_number(counts.get("runs")) and is_number(counts.get("equal")):
        if equal:
            return f"All {counts['runs']:,} runs{prompts} gave exactly the tokens of plain greedy decoding."
        different = counts["runs"] - counts["equal"]
        if different:
            return f"{different:,} of {counts['runs']:,} runs{prompts} gave other tokens than plain greedy decoding."
    if equal:
        return f"Every run{prompts} gave exactly the tokens of plain greedy decoding."
    return f"Some runs{prompts} gave other tokens than plain greedy decoding."


def outcome(result: Result) -> list[str]:
    """The result in plain sentences."""
    best = find_way(result, result.get("best"))
    speed = fixed(best.get("tokens_per_second"))
    against = {
        "speedup_vs_off": "the same decoder with drafting off",
        "speedup_vs_transformers": "transformers' generate",
        "speedup_vs_lookup": "prompt lookup alone",
    }
    if result.get("best") == "lookup":
        del against["speedup_vs_lookup"]
    ratios = [f"{result[key]:.2f} times that of {what}" for key, what in against.items() if is_number(result.get(key))]
    subject = " with ".join(filter(None, (result.get("model") or "The target model", best.get("label"))))
    sentences = []
    if speed:
        sentences.append(f"{subject} writes {speed} tokens per second.")
    if ratios:
        sentences.append(f"{'Its speed' if speed else f'The speed of {subject}'} is {join_words(ratios)}.")
    if is_number(result.get("tau")):
        sentences.append(f"Each verification by the target model emits {result['tau']:.2f} tokens on average.")
    check = list(filter(None, [equality_statement(result)]))
    if all_equal(result) is False:
        sentences = [*check, "Drafting must not change the output, so these speeds do not count.", *sentences]
    else:
        sentences += check
    if all_equal(result) is not False:
        sentences += domain_outcome(result.get("domain") or {})
    if result.get("short"):
        sentences.append("This was a short run that only checks that every part works: its numbers say little.")
    return sentences


def module_ratio(result: Result) -> float | None:
    """Speed of the faster of the ways with the module, times drafting off."""
    found = [ratio_to_off(result, find_way(result, name)) for name in ("mtp", "both")]
    return max(filter(is_number, found), default=None)


def headline(result: Result) -> str:
    """What the module brings, in one line; where it loses, the line says so."""
    model, speedup, equal = result.get("model") or "The target model", module_ratio(result), all_equal(result)
    if result.get("log"):
        return f"{model}: tau over its training"
    if equal is False:
        return "The outputs differ: these speeds do not count"
    if not is_number(speedup):
        return f"{model}: ways of decoding compared"
    same = ", token for token the same" if equal else ""
    if speedup <= 1:
        return f"{model}: the MTP module did not pay here{same}"
    beaten = ", yet slower than lookup alone" if result.get("best") == "lookup" else ""
    return f"{model}, {speedup:.2f} times as fast with its MTP module{beaten}{same}"


def domain_outcome(domain: Result) -> list[str]:
    """What training on one kind of prompts brought, in plain sentences."""
    ways = {name: find_way(domain, name) for name in ("both", "shipped", "off")}
    rates = {name: way.get("tokens_per_second") for name, way in ways.items()}
    if not all(is_number(rates[name]) for name in ("both", "off")):
        return []
    text = f"On {domain.get('name') or 'your kind of prompts'} the module trained here, beside prompt lookup, writes "
    text += f"{rates['both']:.1f} tokens per second, {rates['both'] / rates['off']:.2f} times drafting off"
    if is_number(rates["shipped"]):
        text += f"; the shipped module {rates['shipped']:.1f}, {rates['shipped'] / rates['off']:.2f} times"
    check = equality_statement(domain)
    return [f"{text}.", *([check] if check else [])]


def join_words(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def way_table(result: Result) -> tuple[list[str], list[list[str | None]]]:
    """Heads and rows of the comparison, without the columns that nobody measured."""
    equal_words = {True: "yes", False: "NO"}
    columns = {
        "tokens/s": lambda way: fixed(way.get("tokens_per_second")),
        "spread": spread_text,
        "times off": lambda way: fixed(ratio_to_off(result, way), 2),
        "tau": lambda way: fixed(way.get("tau"), 2),
        "tau, fixed": lambda way: fixed(way.get("tau_fixed"), 2),
        "rows": lambda way: fixed(way.get("rows_per_verification"), 1),
        "draft ms": lambda way: fixed(way.get("draft_ms"), 2),
        "tokens": lambda way: integer(way.get("tokens")),
        "equal": lambda way: equal_words.get(way.get("equal")),
    }
    ways = result.get("ways") or []
    measured = {head: cells for head, of in columns.items() if any(cells := [of(way) for way in ways])}
    names = [way.get("label") or way.get("name") or "" for way in ways]
    return ["way", *measured], [list(row) for row in zip(names, *measured.values(), strict=True)]


def plain_table(result: Result) -> str:
    """The comparison as aligned text, for files, pipes and logs."""
    domain = result.get("domain") or {}
    parts = [*_aligned(result)]
    if domain.get("ways"):
        parts += [f"{domain.get('name') or 'your kind of prompts'}:", "", *_aligned(domain)]
    return "\n".join(line.rstrip() for line in [*parts, *outcome(result)])


def _aligned(result: Result) -> list[str]:
    heads, rows = way_table(result)
    lines = [heads, *[[cell or "" for cell in row] for row in rows]] if rows else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    if aligned:
        aligned.insert(1, "-" * len(aligned[0]))
        aligned.append("")
    return aligned
