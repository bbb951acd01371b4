"""What matplotlib draws of a run for the page of report.py: inline SVG in the page's colours, a PNG beside the page,
and the numbers as a table for who cannot see it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretell.evaluation.drawing import Html, element, table
from foretell.evaluation.summary import Result, fixed, is_number

# drawn in these, which become variables of report.css; the PNG keeps them
COLOURS = {"#1f2124": "ink", "#5d6066": "soft", "#e6e3db": "grid", "#3c74c4": "mtp", "#cf9222": "lookup",
           "#17795e": "both", "#8a6fae": "other", "#74767b": "off"}  # fmt: skip
INK, SOFT, GRID, *SHADES = COLOURS
LOOK: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "grid.color": GRID, "axes.grid": True,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "svg.hashsalt": "foretell", "axes.prop_cycle": None,
}  # fmt: skip


@dataclass
class Picture:
    """draw: on matplotlib's axes. rows: the numbers, a head each."""

    name: str
    title: str
    draw: Callable[[Any], None]
    heads: list[str]
    rows: list[list[Any]]

    def save(self, *files: Any) -> None:
        """Draw into files or streams: PNG on white where the name says so, else SVG."""
        from cycler import cycler
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        with rc_context(LOOK | {"axes.prop_cycle": cycler(color=SHADES)}):
            figure = Figure(figsize=(7.2, max(2.6, 0.42 * len(self.rows)) if self.name == "speed" else 3.4))
            self.draw(figure.subplots())
            for file in files:
                png = isinstance(file, Path) and file.suffix == ".png"
                how: dict[str, Any] = (
                    {"dpi": 150, "facecolor": "white"} if png else {"format": "svg", "transparent": True}
                )
                figure.savefig(file, bbox_inches="tight", metadata=None if png else {"Date": None}, **how)

    def html(self, path: Path, number: int) -> Html:
        """The figure with its table; writes its PNG as `path`."""
        text = io.StringIO()
        self.save(path, text)
        svg = re.sub(r"(?s)^.*?(?=<svg)|<metadata>.*?</metadata>| xmlns(:\w+)?=\"[^\"]*\"", "", text.getvalue())
        for drawn, variable in COLOURS.items():
            svg = svg.replace(drawn, f"var(--{variable})")
        svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>p{number}-", svg)  # several pictures share a page
        says = f"{self.title}. The numbers are in the table below."
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{says}" ', 1)
        told = element("details", element("summary", f"{self.title}: the numbers"), table(self.heads, self.rows))
        return element("figure", element("figcaption", element("b", self.title)), Html(svg), told, class_="picture")


def pictures(result: Result) -> Iterator[Picture]:
    """Of a run of evaluate (with tasks too), of sweep, or of a training's log; nothing of what was not measured."""
    ways = [way for way in result.get("ways") or () if isinstance(way.get("times_off"), dict)]
    if ways:
        yield speeds(ways, "times drafting off, with 95 % intervals")
    for way, given in (result.get("acceptance") or {}).items():
        yield _lines(
            "depth", "Acceptance by depth of the draft", "depth",
            {"kept": given.get("accept_at") or [], "kept, if the one before was": given.get("accept_given") or []},
        )  # fmt: skip
        for kind, words in (("category", "kind of prompt"), ("position", "position in the answer")):
            buckets = ((result.get("acceptance_by") or {}).get(way) or {}).get(f"by_{kind}") or {}
            if buckets:
                yield _taus(kind, f"Tokens per verification by {words}", buckets)
    if result.get("cost_curve"):
        yield _cost(result)
    if result.get("batches"):
        yield _sweep(result["batches"])
    yield from _trade_offs(result)
    log = [entry for entry in result.get("log") or () if is_number(entry.get("eval_tau"))]
    if log:
        at = [entry["step"] for entry in log]
        found = {"tau, decoded": [entry["eval_tau"] for entry in log]}
        if all(is_number(entry.get("eval_estimated_tau")) for entry in log):
            found["estimate from teacher-forced accuracy"] = [entry["eval_estimated_tau"] for entry in log]
        yield _lines("training", "Tokens per verification over training", "step", found, at)


def speeds(ways: list[Result], axis: str) -> Picture:
    """A bar for each way's `times_off`."""
    ratios = [way["times_off"] for way in ways]
    labels = [way["label"] for way in ways]

    def draw(axes: Any) -> None:
        middle = [r["ratio"] for r in ratios]
        error = [[m - r["low"] for m, r in zip(middle, ratios)], [r["high"] - m for m, r in zip(middle, ratios)]]
        shades = [SHADES[-1] if way["name"] in ("off", "transformers") else SHADES[0] for way in ways]
        axes.barh(labels, middle, color=shades, xerr=error, ecolor=INK, capsize=3, height=0.6)
        axes.axvline(1, color=SOFT, linewidth=1)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(axis)

    rows = [[n, fixed(r["ratio"], 2), fixed(r["low"], 2), fixed(r["high"], 2)] for n, r in zip(labels, ratios)]
    return Picture("speed", "Speed, in " + axis, draw, ["way", "times", "low", "high"], rows)


def _lines(name: str, title: str, of: str, lines: dict[str, list[float]], at: list[float] | None = None) -> Picture:
    places = at or list(range(1, 1 + max(map(len, lines.values()))))

    def draw(axes: Any) -> None:
        for (label, values), style in zip(lines.items(), ("o-", "s--")):
            axes.plot(places[: len(values)], values, style, label=label)
        axes.set_xlabel(of)
        axes.set_ylim(bottom=0 if at is None else None)
        if at is None:
            axes.set_xticks(places)
        axes.legend()

    cells = [[str(p), *(fixed(v[i], 3) if i < len(v) else "" for v in lines.values())] for i, p in enumerate(places)]
    return Picture(name, title, draw, [of, *lines], cells)


def _taus(name: str, title: str, buckets: dict[str, Result]) -> Picture:
    def draw(axes: Any) -> None:
        axes.bar(list(buckets), [of["tau"] for of in buckets.values()], width=0.6)
        axes.axhline(1, color=SOFT, linewidth=1)
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="x", rotation=30 if len(buckets) > 4 else 0)
        axes.set_ylabel("tau")

    rows = [[bucket, fixed(of["tau"], 2), f"{of['verifications']:,}"] for bucket, of in buckets.items()]
    return Picture(name, title, draw, [name, "tau", "verifications"], rows)


def _cost(result: Result) -> Picture:
    curve, found = result["cost_curve"], [way for way in result.get("ways") or () if way.get("rows_per_verification")]
    chosen = found[-1]["rows_per_verification"] * result.get("batch_size", 1) if found else None

    def draw(axes: Any) -> None:
        axes.plot([p["rows"] for p in curve], [p["ms"] for p in curve], "o-")
        if chosen is not None:
            axes.axvline(chosen, color=SHADES[1], linestyle="--", label=f"rows of a verification here: {chosen:.1f}")
            axes.legend()
        axes.set_xlabel("rows that one forward of the target reads")
        axes.set_ylabel("milliseconds")
        axes.set_ylim(bottom=0)

    rows = [[f"{p['rows']:,}", fixed(p["ms"], 1)] for p in curve]
    return Picture("cost", "What wider verifications cost, and the width that was chosen", draw, ["rows", "ms"], rows)


def _sweep(batches: list[Result]) -> Picture:
    lengths = [name for name in batches[0]["ways"] if name != "auto"]

    def draw(axes: Any) -> None:
        for one, shade in zip(batches, SHADES * len(batches)):
            axes.plot(
                lengths,
                [one["ways"][k]["ratio"] for k in lengths],
                "o-",
                color=shade,
                label=f"batch {one['batch_size']}",
            )
            axes.axhline(one["ways"]["auto"]["ratio"], color=shade, linestyle=":")
        axes.axhline(1, color=SOFT, linewidth=1)
        axes.set_xlabel("drafts a verification; dotted: auto")
        axes.set_ylabel("times drafting off")
        axes.legend()

    rows = [
        [f"{one['batch_size']}", *(fixed(one["ways"][k]["ratio"], 2) for k in [*lengths, "auto"])] for one in batches
    ]
    title = "Speed against drafting off, by drafts a verification and batch"
    return Picture("sweep", title, draw, ["batch", *lengths, "auto"], rows)


def _trade_offs(result: Result) -> Iterator[Picture]:
    """Of each task's scores: against the tokens a forward that each policy commits."""
    ways = [
        way for way in result.get("ways") or () if isinstance(way.get("tokens_per_forward"), dict) and "scores" in way
    ]
    for task in ways[0]["scores"] if ways else ():
        for metric in ways[0]["scores"][task]:
            points = [(way, way["tokens_per_forward"], way["scores"][task][metric]) for way in ways]

            def draw(axes: Any, points: list = points, metric: str = metric) -> None:
                for (way, pace, score), shade in zip(points, SHADES * len(points)):
                    errors = [
                        [[at["value"] - at["low"]], [at["high"] - at["value"]]] if at["low"] is not None else None
                        for at in (pace, score)
                    ]
                    axes.errorbar(
                        pace["value"], score["value"], xerr=errors[0], yerr=errors[1], fmt="o", color=shade, capsize=3,
                        label=way["name"] + ("" if way["lossless"] else " (lossy)"),
                    )  # fmt: skip
                axes.set_xlabel("tokens a forward, with 95 % intervals")
                axes.set_ylabel(metric)
                axes.legend()

            rows = [
                [way["name"], *(fixed(at[k], 3) or "" for at in (score, pace) for k in ("value", "low", "high"))]
                for way, pace, score in points
            ]
            heads = ["policy", "score", "low", "high", "tokens a forward", "low", "high"]
            name = re.sub(r"\W+", "-", f"{task}-{metric}")
            yield Picture(name, f"{task}, {metric}: score against tokens a forward", draw, heads, rows)
