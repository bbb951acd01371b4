"""The demo's table and page: everything measured is there, nothing else is, and the page loads nothing."""

import copy
import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from foretell.evaluation.report import print_table, write_report

VOID = {"meta", "link", "br"}
WAYS = [
    ("transformers", "transformers' generate", 24.1, 1.0),
    ("off", "foretell, drafting off", 30.6, 1.0),
    ("lookup", "prompt lookup", 39.9, 1.52),
    ("mtp", "MTP module", 43.4, 1.74),
    ("both", "MTP module + prompt lookup", 48.2, 1.93),
]
RESULT = {
    "schema": 1,
    "short": False,
    "model": "SmolLM2-135M-Instruct",
    "tokens_equal": True,
    "tau": 1.93,
    "speedup_vs_off": 1.58,
    "speedup_vs_transformers": 2.01,
    "speedup_vs_lookup": 1.21,
    "best": "both",
    "seconds": {"model": 30.1, "answers": 240.0, "train": 200.0, "compare": 300.0, "total": 771.0},
    "provenance": {
        "time": "2026-01-02 03:04 UTC",
        "command": "foretell demo",
        "versions": {"torch": "2.9.9"},
        "cpu": "a processor",
        "cores": 2,
        "commit": "abc1234",
    },
    "ways": [
        {
            "name": name,
            "label": label,
            "tokens_per_second": speed,
            "seconds": 63.5,
            "tokens": 1520,
            "tau": tau,
            "equal": True,
            "spread": [speed - 0.5, speed + 0.7],
            "repeats": [speed, speed - 0.5, speed + 0.7],
        }
        for name, label, speed, tau in WAYS
    ],
    "by_category": {"arithmetic": {"transformers": 23.3, "off": 30.1, "lookup": 41.2, "mtp": 42.3, "both": 49.4}},
    "tau_by_category": {"arithmetic": {"lookup": 1.61, "mtp": 1.72, "both": 2.04}},
    "acceptance": {"mtp": {"accept_at": [0.55, 0.31, 0.18], "accept_given": [0.55, 0.56, 0.58]}},
    "training": {
        "steps": 812,
        "tokens": 46001,
        "answer_tokens_per_second": 903.4,
        "curve": [
            {"step": 10, "seconds": 2.0, "loss": 7.13, "accuracy": [0.1, 0.05, 0.02]},
            {"step": 20, "seconds": 4.0, "loss": 5.27, "accuracy": [0.21, 0.14, 0.08]},
        ],
        "tau_curve": [{"step": 200, "tau": 1.41}, {"step": 400, "tau": 1.66}],
        "parameters": 4240000,
        "depth": 3,
        "draft_vocab_size": 8192,
    },
    "answers": {"prompts": 401, "tokens": 46002, "tokens_per_second": 351.6},
    "cost_curve": [{"rows": 1, "ms": 20.1}, {"rows": 2, "ms": 21.3}, {"rows": 16, "ms": 44.7}],
    "equality": {"prompts": 16, "runs": 240, "equal": 240, "first_difference": None},
    "sample": {
        "prompt": "How many?",
        "way": "both",
        "verifications": [
            {"text": " The answer", "tokens": [" The", " answer"], "accepted": 1, "sources": ["mtp", "target"]},
            {"text": " is <7>", "tokens": [" is", " <7>"], "accepted": 1, "sources": ["lookup", "target"]},
        ],
    },
}


class Page(HTMLParser):
    """Reads a page, refuses tags that do not match, keeps the text outside style, script and the raw numbers."""

    def __init__(self, source):
        super().__init__()
        self.open, self.text, self.titles, self.headings, self.attributes, self.tags = [], "", [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] == "title":
            self.titles.append(data)
        elif not {"style", "script", "details"} & set(self.open):
            self.text += data.replace("\N{NO-BREAK SPACE}", " ") + "\n"


@pytest.fixture
def result():
    return copy.deepcopy(RESULT)


@pytest.fixture
def render(tmp_path):
    def render(result):
        return Page(write_report(result, tmp_path / "runs" / "report.html").read_text("utf-8"))

    return render


def printed(result, **console):
    file = io.StringIO()
    print_table(result, Console(file=file, width=110, **console))
    return file.getvalue()


def test_the_page_shows_every_number(result, render):
    page = render(result)
    shown = page.text + "\n".join(page.titles)
    expected = [
        "1.58",
        "2.01",
        "1.21",
        "1.93",
        "12 min 51 s",
        "4 min 00 s",
        "30.1 s",
        "240 runs",
        "16 prompts",
        "1,520",
    ]
    expected += [f"{speed:.1f}" for _, _, speed, _ in WAYS] + [f"{tau:.2f}" for *_, tau in WAYS]
    expected += [f"{speed - 0.5:.1f} to {speed + 0.7:.1f}" for _, _, speed, _ in WAYS]
    expected += ["23.3", "30.1", "41.2", "42.3", "49.4", "1.61", "1.72", "2.04"]
    expected += ["55 %", "31 %", "18 %", "56 %", "58 %", "812", "46,001", "903.4", "4,240,000", "8,192"]
    expected += [
        "401",
        "46,002",
        "351.6",
        "20.1",
        "21.3",
        "44.7",
        "7.13",
        "5.27",
        "0.21",
        "0.14",
        "0.08",
        "1.41",
        "1.66",
    ]
    expected += ["abc1234", "a processor", "torch 2.9.9", "foretell demo", " answer", "How many?"]
    assert not [text for text in expected if text not in shown]


def test_the_raw_numbers_are_in_the_page(result, tmp_path):
    source = write_report(result, tmp_path / "report.html").read_text("utf-8")
    raw = re.search(r"<details>.*<pre>(.*)</pre>", source, re.DOTALL).group(1)
    assert (
        json.loads(raw.replace("&quot;", '"').replace("&#x27;", "'").replace("&lt;", "<").replace("&gt;", ">"))
        == result
    )


def test_the_page_loads_nothing(result, tmp_path):
    source = write_report(result, tmp_path / "report.html").read_text("utf-8")
    assert "http" not in source
    assert "url(" not in source
    assert "@import" not in source
    links = [(key, value) for key, value in Page(source).attributes if key in ("src", "href", "srcset", "action")]
    assert links == [("href", "data:,")]  # an empty icon, so that no browser asks for one


def test_both_looks_define_the_same_colours(tmp_path):
    source = write_report({}, tmp_path / "report.html").read_text("utf-8")
    light, by_system, by_button = re.findall(r"(:root[^{]*) \{([^}]*)\}", source)
    assert by_system[1].split() == by_button[1].split()
    names = [set(re.findall(r"--[\w-]+(?=:)", block[1])) for block in (light, by_button)]
    assert names[0] - names[1] == {"--serif", "--sans", "--mono"}
    assert names[1] <= names[0]
    assert set(re.findall(r"var\((--[\w-]+)\)", source)) <= names[0]


SECTIONS = {
    "ways": {"Tokens per second", "Tokens per verification"},
    "by_category": set(),  # tau by category remains
    "acceptance": {"Acceptance by depth"},
    "sample": {"One answer, verification by verification"},
    "training": set(),  # the answers remain
    "cost_curve": {"What a longer draft costs"},
    "seconds": {"Where the time went"},
}


@pytest.mark.parametrize("part", SECTIONS)
def test_a_part_that_was_not_measured_leaves_no_trace(result, render, part):
    full = set(render(result).headings)
    del result[part]
    assert full - set(render(result).headings) == SECTIONS[part]


def test_pairs_of_parts_leave_no_trace(result, render):
    for part in ("by_category", "tau_by_category", "training", "answers", "tokens_equal", "equality"):
        del result[part]
    for way in result["ways"]:
        del way["equal"]
    page = render(result)
    assert not {"By kind of prompt", "Training", "The same tokens", "Not the same tokens"} & set(page.headings)
    assert "equal" not in page.text
    assert "same" not in page.titles[0]


def test_numbers_that_are_absent_or_not_finite_are_not_shown(result, render):
    for way in result["ways"]:
        del way["tau"], way["spread"]
        way["seconds"] = None
    result["tau"] = float("nan")
    result["cost_curve"][1]["ms"] = float("inf")
    page = render(result)
    assert "spread" not in re.findall(r"^[a-z/ ]+$", page.text, re.MULTILINE)
    assert "Tokens per verification" not in page.headings
    assert not re.search(r"\b(nan|inf|None|null)\b", page.text + printed(result))


@pytest.mark.parametrize("empty", [{}, {key: None for key in RESULT}])
def test_an_empty_result_is_a_page_and_a_table(empty, render):
    assert render(empty).headings in ([], ["Provenance"])
    printed(empty)
    printed(empty, force_terminal=True)


def fail_flag(result):
    result["tokens_equal"] = False


def fail_count(result):
    result["equality"]["equal"] = 238


def fail_way(result):
    result["ways"][3]["equal"] = False


@pytest.mark.parametrize("fail", [fail_flag, fail_count, fail_way])
def test_one_sign_of_unequal_tokens_is_enough(result, render, fail):
    fail(result)
    page = render(result)
    assert "do not count" in page.titles[0]
    assert "Not the same tokens" in page.headings
    assert ("role", "alert") in page.attributes
    assert ("class", "failed") in page.attributes
    assert ("class", "figures") not in page.attributes  # no triumphant numbers above a failure
    assert "exactly the tokens" not in page.text + printed(result)
    assert "do not count" in printed(result)
    assert "\x1b[1;31m" in printed(result, force_terminal=True, color_system="standard")  # bold red


def test_the_first_difference_is_shown(result, render):
    fail_count(result)
    fail_way(result)
    result["equality"]["first_difference"] = {"way": "mtp", "position": 17, "expected": " the", "got": " a"}
    page = render(result)
    for text in ("2 of 240 runs", "It happened in: MTP module.", '" the"', '" a"', "17"):
        assert text in page.text
    result["equality"]["first_difference"] = "prompt 3, token 17"
    assert "prompt 3, token 17" in render(result).text


def test_text_cannot_become_markup(result, render):
    evil = '<script>alert(1)</script><b title="\'">&amp;'
    clean = render(result).tags
    result["model"] = result["provenance"]["cpu"] = result["sample"]["prompt"] = evil
    result["sample"]["verifications"][0].update(tokens=[evil, evil], sources=[evil, "target"])
    result["ways"][3]["label"] = result["ways"][4]["name"] = evil
    result["by_category"] = {evil: {evil: 3.0, "off": 2.0}}
    result["acceptance"] = {evil: {"accept_at": [0.5]}}
    result["seconds"][evil] = 1.0
    page = render(result)
    assert page.text.count(evil) >= 8
    assert page.tags.count("script") == clean.count("script") == 1
    assert page.tags.count("b") <= clean.count("b")
    values = [value or "" for key, value in page.attributes if key in ("style", "class", "fill", "stroke")]
    assert not [value for value in values if "<" in value]


def test_drafted_tokens_differ_from_the_target_models_own(result, tmp_path):
    source = write_report(result, tmp_path / "report.html").read_text("utf-8")
    pattern = r'<span title="([^"]*)"(?: style="([^"]*)")? class="(kept|own)">([^<]*)</span>'
    assert re.findall(pattern, source) == [
        ("drafted by MTP module, kept", "border-color:var(--mtp)", "kept", " The"),
        ("the target model&#x27;s own token", "", "own", " answer"),
        ("drafted by prompt lookup, kept", "border-color:var(--lookup)", "kept", " is"),
        ("the target model&#x27;s own token", "", "own", " &lt;7&gt;"),
    ]
    assert source.count('class="verification"') == 2


def test_a_bar_is_as_long_as_its_number(result, tmp_path):
    source = write_report(result, tmp_path / "report.html").read_text("utf-8")
    part = source[source.index("<h2>Tokens per second") : source.index("<h2>The same tokens")]
    widths = [float(width) for width in re.findall(r'<rect width="([\d.]+)%" height="100%" rx="2" fill="var', part)]
    assert len(widths) == len(WAYS)
    for width, (_, _, speed, _) in zip(widths, WAYS, strict=True):
        assert width / widths[0] == pytest.approx(speed / WAYS[0][2], abs=1e-3)  # widths are written with two digits
    assert part.count("<circle") == 3 * len(WAYS)  # one dot a repeat


def test_the_plain_table_is_aligned_and_says_the_outcome(result):
    lines = printed(result).splitlines()
    table = lines[: len(WAYS) + 2]
    assert len({len(line) for line in table}) == 1
    assert table[0].split() == ["way", "tokens/s", "spread", "times", "off", "tau", "tokens", "equal"]
    assert table[-1].split()[-8:] == ["48.2", "47.7", "to", "48.9", "1.58", "1.93", "1,520", "yes"]
    assert "All 240 runs on 16 prompts gave exactly the tokens of plain greedy decoding." in lines
    assert printed(result).isascii()
    assert "\x1b" not in printed(result)


def test_the_terminal_has_the_same_numbers(result):
    shown = re.sub(r"\x1b\[[\d;]*m", "", printed(result, force_terminal=True))
    for text in ("48.2", "47.7 to 48.9", "1.58", "MTP module + prompt lookup", "yes"):
        assert text in shown


def test_a_slow_result_is_called_slow_and_a_short_run_short(result, render):
    result["speedup_vs_off"], result["short"] = 0.93, True
    result["ways"][3]["tokens_per_second"] = 28.0
    page = render(result)
    assert "did not pay" in page.titles[0]
    assert "0.93 times that of the same decoder" in page.text
    assert "short run" in page.text


def test_the_headline_speaks_of_the_module_and_says_where_lookup_is_faster(result, render):
    assert "1.58 times as fast with its MTP module" in render(result).titles[0]
    result["best"], result["speedup_vs_off"] = "lookup", 1.96
    result["ways"][2]["tokens_per_second"] = 60.0
    title = render(result).titles[0]
    assert "slower than lookup alone" in title and "1.58 times as fast" in title  # the module's number, not lookup's


def test_the_kind_that_was_trained_here_has_its_own_table(result, render):
    ways = [{**copy.deepcopy(way), "tokens_per_second": 2 * way["tokens_per_second"]} for way in result["ways"]]
    ways.append({**ways[-1], "name": "shipped", "label": "shipped module", "tokens_per_second": 71.5})
    result["domain"] = {"name": "my chats", "ways": ways, "best": "both", "equality": result["equality"]}
    for shown in (render(result).text, printed(result)):
        assert "my chats" in shown and "71.5" in shown and "96.4" in shown and "1.17" in shown
    assert "Trained here: my chats" in render(result).headings
    result["domain"]["ways"][-1]["equal"] = False
    assert "NO" in printed(result)


def test_prompt_lookup_is_not_compared_with_itself(result, render):
    result["best"] = "lookup"
    assert "prompt lookup alone" not in render(result).text
