"""From a result of the demo to a table in a terminal (print_table) and to a page in a browser (write_report).

The page is one file that loads nothing: its style is report.css, its charts come from drawing.py. A number that was not
measured leaves no trace: no cell, no column, no section.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from foretell.evaluation.drawing import Html, bar, bar_row, colour, element, line_chart, note, section, table
from foretell.evaluation.summary import (
    Result,
    all_equal,
    domain_outcome,
    duration,
    equality_statement,
    find_way,
    fixed,
    headline,
    integer,
    is_number,
    join_words,
    label_of,
    module_ratio,
    outcome,
    percent,
    plain_table,
    way_table,
)

THEME_SCRIPT = """
const root = document.documentElement, button = document.getElementById("theme");
const dark = () => root.dataset.theme
  ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
const label = () => { button.textContent = dark() ? "Light" : "Dark"; };
button.onclick = () => { root.dataset.theme = dark() ? "light" : "dark"; label(); };
button.hidden = false; label();
"""


# --- the terminal


def print_table(result: Result, console: Any = None) -> None:
    """A rich table on a terminal, aligned text elsewhere."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    if not console.is_terminal:
        console.print(plain_table(result), soft_wrap=True, markup=False, highlight=False)
        return
    domain = result.get("domain") or {}
    for part, title in ((result, None), (domain, domain.get("name") or "your kind of prompts")):
        heads, rows = way_table(part)
        if not rows:
            continue
        grid = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), title=title, title_justify="left")
        for i, head in enumerate(heads):
            grid.add_column(head, justify="right" if i else "left", no_wrap=bool(i))
        for way, row in zip(part["ways"], rows, strict=True):
            is_best = way.get("name") == part.get("best")
            style = "bold red" if way.get("equal") is False else "bold green" if is_best else ""
            grid.add_row(*[Text(cell or "") for cell in row], style=style)
        console.print(grid)
        console.print()
    style = "bold red" if all_equal(result) is False else ""
    console.print(Text(" ".join(outcome(result)), style=style))


# --- the sections of the page: each gives HTML, or None where nothing was measured


def speed(result: Result) -> Html | None:
    ways = [way for way in result.get("ways") or () if is_number(way.get("tokens_per_second"))]
    if not ways:
        return None
    repeats = [[r for r in way.get("repeats") or () if is_number(r)] for way in ways]
    high = 1.02 * max([way["tokens_per_second"] for way in ways] + [r for line in repeats for r in line]) or 1
    rows = []
    for way, line in zip(ways, repeats, strict=True):
        drawn = bar(way.get("name"), way["tokens_per_second"] / high, dots=[r / high for r in line])
        mark = "failed" if way.get("equal") is False else "best" if way.get("name") == result.get("best") else ""
        rows.append(bar_row(label_of(result, way.get("name")), drawn, fixed(way["tokens_per_second"]), mark=mark))
    count = max(map(len, repeats))
    method = "Every prompt was answered in each of these ways in turn before the next prompt began, so that whatever "
    method += "slows the machine down slows them all; everything was warmed up before. "
    if count > 1:
        method += f"A bar is the median of {count} repeats, a dot is one repeat, the line through them is the spread. "
    if find_way(result, "off"):
        method += "Ratios are against the same decoder with drafting off, so they contain the gain of drafting alone."
    heads, cells = way_table(result)
    failed = [way.get("equal") is False for way in result["ways"]]
    return section("Tokens per second", rows, note(method), table(heads, cells, failed))


def equality(result: Result) -> Html | None:
    statement = equality_statement(result)
    if statement is None:
        return None
    if all_equal(result):
        rule = "A draft is kept only where it is what the target model would have written itself."
        return section("The same tokens", element("p", element("b", statement), " ", rule, class_="verdict"))
    difference = (result.get("equality") or {}).get("first_difference")
    if isinstance(difference, dict):
        shown = definitions({key: json.dumps(value, ensure_ascii=False) for key, value in difference.items()})
    else:
        shown = element("pre", str(difference)) if difference is not None else None
    intro = element("p", "The first difference:") if shown else None
    names = [way.get("label") or way.get("name") or "" for way in result.get("ways") or () if way.get("equal") is False]
    where = f" It happened in: {join_words(names)}." if names else None
    failure = element("div", element("p", element("b", statement), where), intro, shown, class_="failure", role="alert")
    return section("Not the same tokens", failure)


def tau(result: Result) -> Html | None:
    ways = [way for way in result.get("ways") or () if is_number(way.get("tau"))]
    if not ways:
        return None
    high = max(way["tau"] for way in ways) or 1
    rows = [
        bar_row(
            label_of(result, way.get("name")),
            bar(way.get("name"), way["tau"] / high, base=min(1, way["tau"]) / high),
            fixed(way["tau"], 2),
            mark="best" if way.get("name") == result.get("best") else "",
        )
        for way in ways
    ]
    text = "This is tau, counted while decoding. The grey part of a bar is the one token that the target model adds by "
    text += "itself in every verification; the coloured part was drafted and kept."
    return section("Tokens per verification", rows, note(text))


def acceptance(result: Result) -> Html | None:
    panels = []
    for name, given in (result.get("acceptance") or {}).items():
        joint, conditional = given.get("accept_at") or [], given.get("accept_given") or []
        rows = []
        for i in range(max(len(joint), len(conditional))):
            at, after = [line[i] if i < len(line) and is_number(line[i]) else None for line in (joint, conditional)]
            if at is not None or after is not None:
                drawn = bar(name, min(at or 0, 1), ring=after)
                rows.append(bar_row(f"depth {i + 1}", drawn, percent(at), percent(after)))
        if rows:
            panels.append(panel(label_of(result, name), ("kept", "given") if joint and conditional else (), rows))
    if not panels:
        return None
    text = "Bar, kept: how often the draft at this depth was kept. Circle, given: the same, counted only where the "
    text += "draft before it was kept."
    return section("Acceptance by depth", element("div", panels, class_="panels"), note(text))


def categories(result: Result) -> Html | None:
    speeds, taus = result.get("by_category") or {}, result.get("tau_by_category") or {}
    bars, beside = (speeds, taus) if speeds else (taus, {})
    high = max((v for of_way in bars.values() for v in of_way.values() if is_number(v)), default=0) or 1
    order = [way.get("name") for way in result.get("ways") or ()]
    order += sorted({name for of_way in bars.values() for name in of_way} - set(order))
    panels, shown = [], {}
    for category, of_way in bars.items():
        rows = []
        for name in order:
            if is_number(of_way.get(name)):
                values = [fixed(of_way[name], 1 if speeds else 2)]
                values += [fixed(beside.get(category, {}).get(name), 2)] if beside else []
                rows.append(bar_row(name, bar(name, of_way[name] / high), *values))
                shown[name] = label_of(result, name)
        if rows:
            panels.append(panel(category, ("tokens/s", "tau") if beside else (), rows))
    if not panels:
        return None
    keys = [element("span", element("i", style=f"background:{colour(k)}"), f"{k}: {v}") for k, v in shown.items()]
    text = f"{'Tokens per second' if speeds else 'Tau'}, on one scale in all panels."
    legend = element("p", keys, class_="legend")
    return section("By kind of prompt", note(text), legend, element("div", panels, class_="panels wide"))


def panel(title: str, heads: Sequence[str], rows: Sequence[Html]) -> Html:
    columns = [element("span", head, class_="value") for head in heads]
    return element("div", element("div", element("h3", title), columns, class_="panel-head"), rows, class_="panel")


def sample(result: Result) -> Html | None:
    """One answer, or several: each verification shaded, who proposed what, how likely the target found it."""
    parts: list[Any] = []
    for given in result.get("samples") or [result.get("sample") or {}]:
        verifications = given.get("verifications") or []
        spans, rows, drafted = [], [], 0
        for number, verification in enumerate(verifications, start=1):
            tokens = verification.get("tokens") or [verification.get("text") or ""]
            sources = verification.get("sources") or ["draft"] * (verification.get("accepted") or 0)
            written, chances = [], verification.get("chances")
            for i, token in enumerate(tokens):
                source = sources[i] if i < len(sources) else "target"
                own = source == "target"
                title = "the target model's own token" if own else f"drafted by {label_of(result, source)}, kept"
                chance = percent(chances[i]) if chances else None
                title += f"; the target gives it {chance}" if chance else ""
                line = None if own else f"border-color:{colour(source)}"
                written.append(element("span", token, title=title, style=line, class_="own" if own else "kept"))
                rows.append([f"{number}", token, "target" if own else source, chance or ""])
                drafted += not own
            spans.append(element("span", written, class_="verification"))
        if not spans:
            continue
        text = f"Each tint is one verification: {len(rows):,} tokens in {len(spans):,} verifications. Underlined "
        text += f"tokens were drafted and kept ({drafted:,}), the others are the target model's own."
        way = note("Decoded with ", label_of(result, given["way"]), ".") if given.get("way") else None
        prompt = element("blockquote", given["prompt"]) if given.get("prompt") else None
        heads = ["verification", "token", "proposed by", "the target gives it"]
        told = element("details", element("summary", "Token by token"), table(heads, rows))
        parts += [note(text), prompt, element("p", spans, class_="text"), way, told]
    several = "Answers" if len(result.get("samples") or ()) > 1 else "One answer"
    return section(f"{several}, verification by verification", parts) if parts else None


def your_kind(result: Result) -> Html | None:
    """The module that was trained here beside the shipped one, on prompts of the kind that it learned."""
    domain = result.get("domain") or {}
    if not domain.get("ways"):
        return None
    heads, cells = way_table(domain)
    failed = [way.get("equal") is False for way in domain["ways"]]
    said = note(" ".join(domain_outcome(domain)))
    return section(f"Trained here: {domain.get('name') or 'your kind of prompts'}", said, table(heads, cells, failed))


def training(result: Result) -> Html | None:
    given, answers = result.get("training") or {}, result.get("answers") or {}
    curve = [point for point in given.get("curve") or () if is_number(point.get("seconds"))]
    depths = max((len(point.get("accuracy") or ()) for point in curve), default=0)
    accuracy = []
    for k in range(depths):
        points = [(p["seconds"], p["accuracy"][k]) for p in curve if len(p.get("accuracy") or ()) > k]
        accuracy.append((f"depth {k + 1}", f"depth-{min(k, 4) + 1}", points))
    taus = [(p.get("step"), p.get("tau")) for p in given.get("tau_curve") or ()]
    charts = [
        line_chart("Loss", "seconds", [("", "mtp", [(p["seconds"], p.get("loss")) for p in curve])]),
        line_chart("Accuracy", "seconds", accuracy),
        line_chart("Tau while decoding", "steps", [("", "mtp", taus)]),
    ]
    facts = {
        "Prompts answered by the target model": integer(answers.get("prompts")),
        "Tokens in the answers": integer(answers.get("tokens")),
        "Tokens per second while answering": fixed(answers.get("tokens_per_second")),
        "Training steps": integer(given.get("steps")),
        "Answer tokens trained on": integer(given.get("tokens")),
        "Answer tokens per second of training": fixed(given.get("answer_tokens_per_second")),
        "Parameters of the MTP module": integer(given.get("parameters")),
        "Depths": integer(given.get("depth")),
        "Vocabulary of the drafts": integer(given.get("draft_vocab_size")),
    }
    parts = [part for part in (*charts, definitions(facts)) if part]
    return section("Training", element("div", parts, class_="charts")) if parts else None


def definitions(facts: Result) -> Html | None:
    kept = [
        element("div", element("dt", term), element("dd", str(fact)))
        for term, fact in facts.items()
        if fact is not None and fact != ""
    ]
    return element("dl", kept) if kept else None


def cost(result: Result) -> Html | None:
    curve = [p for p in result.get("cost_curve") or () if is_number(p.get("rows")) and is_number(p.get("ms"))]
    if not curve:
        return None
    chart = line_chart("Milliseconds", "rows", [("", "off", [(p["rows"], p["ms"]) for p in curve])], 1)
    first, rows = curve[0], []
    for point in curve:
        times = fixed(point["ms"] / first["ms"], 2) if first["ms"] > 0 else None
        rows.append([integer(point["rows"]), fixed(point["ms"]), times])
    text = "One forward of the target model against the tokens that it checks at once, its rows. A draft pays as long "
    text += "as its rows cost less than the verifications that they save."
    heads = ["rows", "ms", f"\N{MULTIPLICATION SIGN} {first['rows']:,} row{'s' if first['rows'] != 1 else ''}"]
    return section("What a longer draft costs", note(text), element("div", chart, table(heads, rows), class_="charts"))


def time_spent(result: Result) -> Html | None:
    seconds = {k: v for k, v in (result.get("seconds") or {}).items() if is_number(v)}
    total = seconds.pop("total", None)
    if total is not None and seconds and total - sum(seconds.values()) > 0.01 * total:
        seconds["the rest"] = total - sum(seconds.values())
    if not seconds:
        return section("Time", element("p", f"{duration(total)} in all.")) if total is not None else None
    whole_bar, spent, parts, keys = sum(seconds.values()) or 1, 0.0, [], []
    for i, (phase, value) in enumerate(seconds.items()):
        fill = "var(--rest)" if phase == "the rest" else f"var(--phase-{i % 5 + 1})"
        place = {"x": f"{100 * spent / whole_bar:.2f}%", "width": f"{100 * value / whole_bar:.2f}%"}
        tip = element("title", f"{phase} {duration(value)}")
        parts.append(element("rect", tip, **place, height="100%", fill=fill))
        keys.append(element("span", element("i", style=f"background:{fill}"), f"{phase} {duration(value)}"))
        spent += value
    intro = element("p", f"{duration(total)} in all.") if total is not None else None
    stacked = element("svg", parts, class_="bar stacked", aria_hidden="true")
    return section("Where the time went", intro, stacked, element("p", keys, class_="legend"))


def provenance(result: Result) -> Html:
    facts = dict(result.get("provenance") or {})
    versions = facts.pop("versions", None) or {}
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    data = element("details", element("summary", "All numbers of this run"), element("pre", to_json(result)))
    return section("Provenance", definitions(facts), data)


def to_json(result: Result) -> str:
    return json.dumps(result, indent=1, ensure_ascii=False, default=str)


# --- the page


def key_figures(result: Result) -> Html | None:
    figures = {
        "times as fast as drafting off, with the module": fixed(module_ratio(result), 2)
        if result.get("best") not in ("mtp", "both")
        else None,
        "times as fast as drafting off": fixed(result.get("speedup_vs_off"), 2),
        "times as fast as transformers' generate": fixed(result.get("speedup_vs_transformers"), 2),
        "times as fast as prompt lookup alone": fixed(result.get("speedup_vs_lookup"), 2),
        "tokens per verification (tau)": fixed(result.get("tau"), 2),
    }
    if result.get("best") == "lookup":
        del figures["times as fast as prompt lookup alone"]
    shown = [element("div", element("dd", v), element("dt", k)) for k, v in figures.items() if v]
    return element("dl", shown, class_="figures") if shown else None


def write_report(result: Result, path: str | Path, *others: Result, draw: bool = False) -> Path:
    """Write the page, of several runs one below the other; folders that are missing are made. draw: by matplotlib, each
    picture also as a PNG beside the page.
    """
    drawn = [_pictures(run, Path(path), i) if draw else None for i, run in enumerate((result, *others))]
    eyebrow, header, main = _run(result, drawn[0])
    for other, pictures in zip(others, drawn[1:], strict=True):
        said, parts, sections = _run(other, pictures)
        main += [element("header", element("p", said), *parts), *sections]
    title = f"foretell, {1 + len(others)} runs" if others else headline(result)
    return write_page(path, title, eyebrow, header, main)


def _pictures(result: Result, path: Path, run: int) -> Html | None:
    from foretell.evaluation.pictures import pictures

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = [
        picture.html(path.with_name(f"{path.stem}-{run + 1}-{picture.name}.png"), 100 * run + i)
        for i, picture in enumerate(pictures(result))
    ]
    return section("What was measured", drawn) if drawn else None


def _run(result: Result, drawn: Html | None = None) -> tuple[str, list[Any], list[Any]]:
    """A run's time and machine, what stands above it, and its sections."""
    origin = result.get("provenance") or {}
    cores = f"{origin['cores']:,} cores" if is_number(origin.get("cores")) else None
    eyebrow = " \N{MIDDLE DOT} ".join(str(word) for word in ("foretell", origin.get("time"), cores) if word)
    sections = (speed, equality, tau, acceptance, categories, sample, your_kind, training, cost, time_spent, provenance)
    shown = [
        part(result) for part in sections if drawn is None or part not in (tau, acceptance, cost)
    ]  # they are drawn
    failed = all_equal(result) is False
    parts = headline(result).replace(", ", ",\n").split("\n")  # lines break at commas first
    header = [
        element("h1", [[element("span", part), " "] for part in parts], class_="failed" if failed else None),
        element("p", " ".join(outcome(result)), class_="lead"),
        None if failed else key_figures(result),
    ]
    return eyebrow, header, [drawn, *shown]


def write_page(path: str | Path, title: str, eyebrow: str, header: Sequence[Any], main: Sequence[Any]) -> Path:
    """A page that loads nothing, in light and dark; folders that are missing are made."""
    page = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("link", rel="icon", href="data:,"),
            element("title", title),
            element("style", Html(resources.files(__package__).joinpath("report.css").read_text("utf-8"))),
        ),
        element(
            "body",
            element(
                "header",
                element(
                    "div", element("p", eyebrow), element("button", id="theme", type="button", hidden=""), class_="top"
                ),
                *header,
            ),
            element("main", main),
            element("script", Html(THEME_SCRIPT)),
        ),
        lang="en",
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<!doctype html>\n{page}\n", encoding="utf-8")
    return path
