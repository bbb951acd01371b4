"""HTML and charts by small functions, for report.py: nothing is loaded, colours are the variables of report.css.

A string becomes HTML only through element(), which escapes it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise, zip_longest
from typing import Any

from foretell.evaluation.summary import is_number

WAY_COLOURS = ("transformers", "off", "lookup", "mtp", "both")  # --transformers, --off, ... in report.css
VOID_ELEMENTS = ("meta", "link", "br")
LINE_OF_TEXT = 9  # % of a chart's height

Line = tuple[str, str, Sequence[tuple[float, float]]]  # label, CSS colour variable, points


class Html(str):
    """Text that is HTML already; element() escapes every other string."""


def element(name: str, /, *children: Any, **attributes: Any) -> Html:
    """One element. None vanishes, lists are flattened; class_ is written class, stroke_width is stroke-width."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID_ELEMENTS:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{to_html(children)}</{name}>")


def to_html(child: Any) -> str:
    if child is None or isinstance(child, Html):
        return child or ""
    if isinstance(child, str):
        return html.escape(child)
    return "".join(map(to_html, child))


def section(title: str, *children: Any) -> Html:
    return element("section", element("h2", title), *children)


def note(*children: Any) -> Html:
    return element("p", *children, class_="note")


def colour(name: Any) -> str:
    """The CSS colour of a way or a drafter; unknown ones share a neutral one."""
    return f"var(--{name if name in WAY_COLOURS else 'other'})"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], failed: Sequence[bool] = ()) -> Html:
    """A table whose first column names the rows; failed says which rows are shown as such."""
    head = element("thead", element("tr", [element("th", head, scope="col") for head in heads]))
    body = [
        element("tr", element("th", row[0], scope="row"), [element("td", cell) for cell in row[1:]], class_=mark)
        for row, mark in zip_longest(rows, ("failed" if flag else None for flag in failed))
    ]
    return element("div", element("table", head, element("tbody", body)), class_="scroll", tabindex=0)


def bar(name: Any, length: float, base: float = 0, dots: Sequence[float] = (), ring: float | None = None) -> Html:
    """A horizontal bar. All numbers are fractions of the width; base is a muted part of the bar that comes first."""
    parts = [element("rect", width="100%", height="100%", rx=2, class_="track")]
    if base < length:
        parts.append(element("rect", width=f"{100 * length:.2f}%", height="100%", rx=2, fill=colour(name)))
    if base:
        parts.append(element("rect", width=f"{100 * min(base, length):.2f}%", height="100%", rx=2, class_="base"))
    if len(dots) > 1:
        low, high = f"{100 * min(dots):.2f}%", f"{100 * max(dots):.2f}%"
        parts.append(element("line", x1=low, x2=high, y1="50%", y2="50%", class_="spread"))
    for i, dot in enumerate(dots):
        height = f"{100 * (i + 1) / (len(dots) + 1):.1f}%"
        parts.append(element("circle", cx=f"{100 * dot:.2f}%", cy=height, r=3, class_="dot"))
    if ring is not None:
        parts.append(element("circle", cx=f"{100 * ring:.2f}%", cy="50%", r=4.5, class_="dot"))
    return element("svg", parts, class_="bar", aria_hidden="true")


def bar_row(label: str, drawn: Html, *values: Any, mark: str = "") -> Html:
    cells = [element("span", value, class_="value") for value in values]
    return element("div", element("span", label, class_="label"), drawn, cells, class_=f"row {mark}".strip())


def round_ticks(high: float, count: int = 4) -> list[float]:
    """Round numbers from 0 to the first one that is not below high."""
    rough = max(high, 1e-9) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def line_chart(title: str, x_label: str, lines: Sequence[Line], digits: int = 2) -> Html | None:
    """Lines over axes that start at 0. The drawing stretches with the page, its text keeps its size."""
    lines = [(label, shade, [xy for xy in points if all(map(is_number, xy))]) for label, shade, points in lines]
    lines = [line for line in lines if line[2]]
    if not lines:
        return None
    everywhere = [xy for _, _, points in lines for xy in points]
    x_high = max(x for x, _ in everywhere) or 1
    ticks_x = [tick for tick in round_ticks(x_high) if tick <= x_high]
    ticks_y = round_ticks(max(y for _, y in everywhere))
    left, top = (lambda x: 100 * x / x_high), (lambda y: 100 - 100 * y / ticks_y[-1])
    drawn = [element("path", d=f"M0 {top(y):.2f}H100", class_="grid") for y in ticks_y]
    ends = []
    for label, shade, points in lines:
        places = [f"{left(x):.2f} {top(y):.2f}" for x, y in points]
        drawn.append(element("path", d="M" + "L".join(places), class_="line", stroke=f"var(--{shade})"))
        for place, (x, y) in zip(places, points, strict=True):
            tip = element("title", f"{label} {y:,.{digits}f} at {x:,.0f} {x_label}".strip())
            point = "point" if len(points) <= 24 else "point faint"
            drawn.append(element("path", tip, d=f"M{place}h0", class_=point, stroke=f"var(--{shade})"))
        ends.append([top(points[-1][1]), f"{label} {points[-1][1]:,.{digits}f}".strip(), shade])
    ends.sort()
    for above, below in pairwise(ends):
        below[0] = max(below[0], above[0] + LINE_OF_TEXT)
    plot = element(
        "div",
        element("svg", drawn, viewBox="0 0 100 100", preserveAspectRatio="none", aria_hidden="true"),
        [element("span", f"{y:,g}", class_="tick-y", style=f"top:{top(y):.2f}%") for y in ticks_y],
        [element("span", f"{x:,g}", class_="tick-x", style=f"left:{left(x):.2f}%") for x in ticks_x],
        [
            element("span", words, class_="end", style=f"top:{y:.2f}%;border-color:var(--{shade})")
            for y, words, shade in ends
        ],
        class_="plot",
    )
    return element("figure", element("figcaption", element("b", title), f" against {x_label}"), plot, class_="chart")
