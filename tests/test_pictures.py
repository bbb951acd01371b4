"""The report's pictures: every number is drawn and stands in a table; in a browser: light, dark, print, keyboard."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from matplotlib.figure import Figure
from test_report import RESULT

from foretell.cli import main
from foretell.evaluation.pictures import pictures
from foretell.evaluation.report import write_report

BUCKETS = {"a<b": {"tau": 1.5, "verifications": 9}}
SHOWN = [one | {"chances": [0.25, 0.75]} for one in RESULT["sample"]["verifications"]]
RUN = copy.deepcopy(RESULT) | {
    "schema": "foretell.evaluate/1",
    "batch_size": 2,
    "acceptance_by": {"mtp": {"by_category": BUCKETS, "by_position": BUCKETS}},
    "samples": [RESULT["sample"] | {"verifications": SHOWN}],
}
for _way in RUN["ways"]:
    _ratio = _way["tokens_per_second"] / 30.6
    _way |= {"times_off": {"ratio": _ratio, "low": _ratio - 0.1, "high": _ratio + 0.2}, "rows_per_verification": 2.5}
SWEEP = {
    "schema": "foretell.evaluate/1/sweep",
    "batches": [
        {"batch_size": size, "ways": {k: {"ratio": 1 + size / 10} for k in ("1", "3", "auto")}} for size in (1, 4)
    ],
}
TASKS = {
    "schema": "foretell.evaluate/1/tasks",
    "ways": [
        {
            "name": name,
            "lossless": name == "lossless",
            "tokens_per_forward": {"value": pace, "low": pace - 0.1, "high": pace + 0.1},
            "scores": {"gsm8k": {"exact_match,last": {"value": score, "low": score - 0.05, "high": score + 0.05}}},
        }
        for name, pace, score in (("lossless", 1.6, 0.31), ("static_k:3", 2.9, 0.12))
    ],
}
LOG = [{"step": s, "eval_tau": 1 + s / 100, "eval_estimated_tau": 1 + s / 80} for s in (10, 20, 40)]


@pytest.fixture
def runs(tmp_path) -> list[str]:
    """Of evaluate, sweep and tasks, and a folder of a training."""
    for name, run in (("run", RUN), ("sweep", SWEEP), ("tasks", TASKS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    (tmp_path / "train" / "checkpoint-40").mkdir(parents=True)
    (tmp_path / "train" / "checkpoint-40" / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    return [str(tmp_path / name) for name in ("run.json", "sweep.json", "tasks.json", "train")]


def page_of(runs: list[str], tmp_path: Path) -> Path:
    assert main(["report", *runs, "--output", str(tmp_path / "out" / "page.html")]) == 0
    return tmp_path / "out" / "page.html"


def drawn(result: dict, name: str) -> list[tuple[float, float]]:
    """All points of a picture's bars, lines and dots."""
    axes = Figure().subplots()
    next(p for p in pictures(result) if p.name == name).draw(axes)
    points = [(bar.get_width(), bar.get_height()) for bar in axes.patches]
    return points + [tuple(xy) for line in axes.get_lines() for xy in line.get_xydata().tolist()]


def test_what_is_drawn_is_what_was_measured():
    assert [p.name for p in pictures(RUN)] == ["speed", "depth", "category", "position", "cost"]
    ratios = [way["times_off"]["ratio"] for way in RUN["ways"]]
    assert [width for width, _ in drawn(RUN, "speed")[: len(ratios)]] == pytest.approx(ratios)
    assert (2, 0.31) in drawn(RUN, "depth") and (3, 0.58) in drawn(RUN, "depth")
    assert (16, 44.7) in drawn(RUN, "cost") and (5.0, 0) in drawn(RUN, "cost")  # 2.5 rows of 2 sequences
    assert (0, 1.1) in drawn(SWEEP, "sweep") and (1, 1.4) in drawn(SWEEP, "sweep")
    assert (2.9, 0.12) in drawn(TASKS, "gsm8k-exact_match-last")
    assert (40, 1.4) in drawn({"log": LOG}, "training") and (40, 1.5) in drawn({"log": LOG}, "training")
    assert list(pictures({})) == []


def test_the_page_holds_pictures_tables_and_pngs(runs, tmp_path):
    path = page_of(runs, tmp_path)
    text = path.read_text("utf-8")
    assert "http://" not in text and "https://" not in text
    names = ["1-speed", "1-depth", "1-category", "1-position", "1-cost", "2-sweep", "3-gsm8k-exact_match-last"]
    assert {p.name for p in path.parent.glob("*.png")} == {f"page-{name}.png" for name in [*names, "4-training"]}
    assert text.count('role="img" aria-label="') == 8 == text.count(": the numbers</summary>")
    assert "a&lt;b" in text and "a<b" not in text.partition("<details")[0]
    assert "the target gives it 25" in text and "drafted by MTP module, kept" in text
    for heading in ("Acceptance by depth</h2>", "What a longer draft costs"):  # they are drawn
        assert heading not in text
    assert "tau over its training" in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for colour in ("#3c74c4", "#1f2124"):  # of the style sheet alone: pictures have the page's
        assert colour not in text.partition("</style>")[2]
    plain = write_report(RUN, tmp_path / "plain.html").read_text("utf-8")
    assert 'role="img"' not in plain and "Acceptance by depth</h2>" in plain


@pytest.mark.parametrize(
    ("what", "wanted"),
    [("empty", "no trainer_state.json"), ("train", "its log tells no tau")],
)
def test_a_folder_without_tau_is_refused(what, wanted, runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "train" / "checkpoint-40" / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1}]}))
    assert main(["report", str(tmp_path / what), "--output", str(tmp_path / "x.html")]) == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser(runs, tmp_path):
    path = page_of(runs, tmp_path)
    shade = "getComputedStyle(document.querySelector('.picture svg text')).fill"
    with Browser() as page:
        page.emulate(dark=False)
        page.open(path.as_uri())
        light = page.run(shade)
        page.emulate(dark=True)
        assert (
            page.run(shade) != light
            and page.run("getComputedStyle(document.body).backgroundColor") != "rgb(251, 250, 247)"
        )
        assert page.run(
            "[...document.querySelectorAll('.picture svg')].every(s => s.getBoundingClientRect().width > 300)"
        )
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        # by keyboard: the first stop is the theme, then tables open
        page.press("Tab")
        assert page.run("document.activeElement.id") == "theme"
        page.press("Tab")
        assert page.run("document.activeElement.tagName") == "SUMMARY"
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        page.ask("Input.dispatchKeyEvent", type="keyDown", text="\r", **enter)
        page.ask("Input.dispatchKeyEvent", type="keyUp", **enter)
        assert page.run("document.activeElement.parentElement.open")
        tree = page.ask("Accessibility.getFullAXTree")["nodes"]
        named = [
            n["name"]["value"] for n in tree if n.get("role", {}).get("value") == "image" and n["name"].get("value")
        ]
        assert sum("The numbers are in the table below" in name for name in named) == 8
        page.ask("Emulation.setEmulatedMedia", media="print")
        assert page.run("getComputedStyle(document.getElementById('theme')).display") == "none"
        assert len(page.ask("Page.printToPDF")["data"]) > 10_000
        assert page.errors == []
