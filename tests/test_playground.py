"""The server's page: it loads nothing, can be read in both looks, and shows in a real browser what the server said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from serving import Served, tiny_served, wait_for

import foretell

PAGE = (Path(foretell.__file__).parent / "serving" / "playground.html").read_text(encoding="utf-8")


def test_the_page_is_small_and_loads_nothing():
    assert len(PAGE.splitlines()) <= 300
    assert not re.search(r"https?:|//[a-z]|\bsrc=|@import|url\(|innerHTML|eval\(", PAGE)
    assert re.findall(r'href="([^"]*)"', PAGE) == ["data:,"]


def test_every_control_has_a_name():
    for kind, about in re.findall(r"<(input|select|textarea)([^>]*)>", PAGE):
        before = PAGE[: PAGE.index(f"<{kind}{about}>")]
        assert before.rindex("<label") > before.rfind("</label>"), about  # it stands in its label
    assert 'lang="en"' in PAGE and 'role="status"' in PAGE


def looks() -> dict[str, dict[str, str]]:
    return {
        name: dict(re.findall(r"--(\w+): (#\w{6})", PAGE.split(start)[1].split("}")[0]))
        for name, start in (("light", ":root {"), ("dark", ':root[data-theme="dark"] {'))
    }


def contrast(one: str, other: str) -> float:
    """As the accessibility guidelines (WCAG 2) define it."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_both_looks_can_be_read():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert set(looks()["light"]) == set(looks()["dark"])
    for look in looks().values():
        for ink in ("ink", "soft", "red"):
            for paper in ("paper", "panel"):
                assert contrast(look[ink], look[paper]) >= 4.5, (ink, paper)
        for paper in ("even", "odd"):
            assert contrast(look["ink"], look[paper]) >= 4.5
            assert all(contrast(look[line], look[paper]) >= 3 for line in ("mtp", "lookup", "both"))  # lines, not text


@pytest.fixture(scope="module")
def served():
    one = tiny_served(drafter="mtp+lookup")
    yield one
    one.stop()


def text(browser: Browser, place: str) -> str:
    return browser.run(f"document.querySelector({place!r}).textContent")


def ready(browser: Browser) -> bool:
    return not browser.run("document.getElementById('go').disabled")


def ask(browser: Browser, served: Served, most: int) -> None:
    """The page, filled in."""
    browser.open(served.url)
    wait_for(lambda: text(browser, "#model") == "tiny")
    browser.run(
        f"document.getElementById('prompt').value = 'w25 w29 w30'; document.getElementById('most').value = {most}"
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_in_a_browser(served):
    said = {"messages": [{"role": "user", "content": "w25 w29 w30"}], "max_tokens": 60, "temperature": 0}
    wanted = served.send("/v1/chat/completions", {**said, "num_draft_tokens": 3})[1]
    with Browser() as browser:
        for dark in (False, True):
            browser.emulate(dark)
            ask(browser, served, 60)
            assert browser.run("document.documentElement.dataset.theme") == ("dark" if dark else "light")
            browser.run("document.getElementById('drafts').value = '3'; document.getElementById('prompt').focus()")
            browser.press("Enter", modifiers=2)  # by keyboard alone
            wait_for(lambda: "the two texts are" in text(browser, "#said"))
            assert text(browser, "#said").endswith("the two texts are the same.")
            for side in ("on", "off"):
                assert text(browser, f"#{side} .text") == wanted["choices"][0]["message"]["content"]
                assert float(text(browser, f"#{side} .speed").split()[0]) > 0
            own = wanted["usage"]["foretell"]
            rounds = browser.run("document.querySelectorAll('#on .text .round').length")
            assert rounds == own["verifications"] < 60
            assert browser.run("document.querySelectorAll('#off .text .round').length") == 60
            assert f"τ {own['tau']:.2f}" in text(browser, "#on .more") and "τ 1.00" in text(browser, "#off .more")
            assert browser.run("document.querySelectorAll('#on .text b.mtp').length") > 0
            assert "of mtp" in text(browser, "#legend") and "the model itself" in text(browser, "#legend")
            shares = browser.run("[...document.querySelectorAll('#depths td:not(.bar)')].map(x => x.textContent)")
            assert shares == [f"{int(100 * share + 0.5)} %" for share in own["accept_at"]]
            assert len(browser.picture()) > 10_000
        assert browser.errors == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_escape_stops_and_errors_are_told(served):
    with Browser() as browser:
        ask(browser, served, 60)
        with served.held():  # it cannot end by itself
            browser.run("document.getElementById('form').requestSubmit()")
            wait_for(lambda: not ready(browser))
            browser.press("Escape")
            wait_for(lambda: ready(browser))
        assert text(browser, "#said") == "Stopped." and browser.errors == []
        browser.run("document.getElementById('most').value = 10000; document.getElementById('form').requestSubmit()")
        wait_for(lambda: "max_tokens: got 10000" in text(browser, "#said"))
        assert browser.run("document.getElementById('said').className") == "wrong"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_asks_for_the_key():
    served = tiny_served(api_key="right")
    try:
        with Browser() as browser:
            browser.open(served.url)
            wait_for(lambda: not browser.run("document.getElementById('ask').hidden"))
            browser.run("const key = document.getElementById('key'); key.value = 'right'; key.onchange()")
            wait_for(lambda: text(browser, "#model") == "tiny")
    finally:
        served.stop()
