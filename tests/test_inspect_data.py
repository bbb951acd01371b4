"""foretell inspect data shows what the trainer will see: its counts, its targets, its borders."""

from __future__ import annotations

import json
import re

import pytest
from tiny import tiny_model, tiny_tokenizer

from foretell.cli import main
from foretell.data.collate import pack
from foretell.data.prompts import encode_rows
from foretell.evaluation.data_page import as_text, describe

TEMPLATE = (
    "{% for m in messages %}{{ 'w9 ' if m.role == 'user' else 'w8 ' }}{{ m.content }}{{ ' w1 ' }}{% endfor %}"
    "{{ 'w8 ' if add_generation_prompt else '' }}"
)


def tokenizer():
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


def chat(*contents: str) -> dict:
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(contents)]}


ROWS = [chat("w20", "w30 w31 w32"), chat("w21 w22", "w33", "w23", "w34 w35"), chat("w24", "w36 w37 w38 w39")]


def test_rows_are_shown_with_what_each_depth_is_asked():
    encoded, stats = encode_rows(ROWS, tokenizer())
    found = describe(encoded, stats, tokenizer(), {1}, depth=2, samples=3)
    assert found["rows"] == {"rows": 3, "kept": 3, "truncated": 0, "dropped": 0, "skipped": 0}
    assert (found["tokens"], found["trained_tokens"]) == (sum(encoded.lengths), 4 + 2 + 3 + 5)
    assert found["ends_trained"] == {"rows": 3, "of": 3}
    assert found["lengths"] == {"shortest": 8, "median": 9, "95 %": 14, "longest": 14}
    assert sum(bin_["rows"] for bin_ in found["histogram"]) == 3
    first, second, _ = found["samples"]
    assert first["tokens"] == ["w9", "w20", "w1", "w8", "w30", "w31", "w32", "w1"]
    assert first["kinds"] == ["prompt"] * 4 + ["trained"] * 4
    # depth k at token t is asked token t + 1 + k, where that is trained
    wanted = [
        [None, None],
        [None, "w30"],
        ["w30", "w31"],
        ["w31", "w32"],
        ["w32", "w1"],
        ["w1", None],
        [None] * 2,
        [None] * 2,
    ]
    assert first["targets"] == wanted
    assert second["kinds"] == ["prompt"] * 5 + ["trained"] * 2 + ["ignored"] * 4 + ["trained"] * 3
    text = as_text(found)
    assert "w9w20w1w8⟦w30w31w32w1⟧" in text.replace(" ", "")
    assert "after 'w20' (token 1)  depth 1: None  depth 2: 'w30'" in text


@pytest.mark.filterwarnings("ignore:.* rows were cut")
def test_ends_that_are_not_trained_are_counted():
    rows = [*ROWS, {"input_ids": [5, 6, 7]}]
    encoded, stats = encode_rows(rows, tokenizer(), max_length=8)
    ends = describe(encoded, stats, tokenizer(), {1}, depth=1)["ends_trained"]
    assert ends == {"rows": 2, "of": 4}  # one is cut, one has none


def test_packed_rows_show_their_borders_and_ask_nothing_across():
    encoded, stats = encode_rows(ROWS, tokenizer())
    found = describe(encoded, stats, tokenizer(), {1}, depth=3, samples=9, packed=pack(encoded, 20))
    assert found["packed_rows"] == 2 == len(found["samples"])
    whole = next(sample for sample in found["samples"] if len(set(sample["documents"])) == 2)
    border = whole["documents"].index(1)
    assert all(target is None for targets in whole["targets"][border - 2 : border] for target in targets)
    assert whole["kinds"][border] == "prompt" and "┃" in as_text(found)
    for at, targets in enumerate(whole["targets"]):
        for k, target in enumerate(targets, start=1):
            ahead = at + 1 + k
            there = ahead < len(whole["tokens"]) and whole["documents"][ahead] == whole["documents"][at]
            asked = there and whole["kinds"][ahead] == "trained"
            assert target == (whole["tokens"][ahead] if asked else None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("MODEL")
    tokenizer().save_pretrained("MODEL")
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*ROWS, chat("<b>w1&", "w3 </script>")] * 4)
    )
    return tmp_path


def test_the_command_prints_json_and_writes_a_page_that_loads_nothing(folder, capsys):
    argv = ["inspect", "data", "chats.jsonl", "--model", "MODEL", "--depth", "3", "--use-cpu"]
    assert main([*argv, "--output", "new/page.html"]) == 0
    out = capsys.readouterr().out
    assert "16 of 16 (cut 0, without an answer 0, bad 0)" in out and "last in 16 of 16 rows" in out
    page = (folder / "new" / "page.html").read_text()
    assert not re.search(r"https?:|src=|url\(|@import", page)
    assert 'data-theme="dark"' in page and "prefers-color-scheme: dark" in page
    assert page.count('class="tokens"') == 4 and page.count('class="token trained"') > 4
    assert "<b>w1&" not in page and page.count("</script>") == 1
    assert main([*argv, "--json", "--max-length", "9", "--packing", "--samples", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"]["truncated"] == 4 and len(found["samples"]) == 2 and found["packed_rows"] == 16


def test_a_plan_is_measured_and_leaves_nothing(folder, capsys):
    before = sorted(folder.rglob("*"))
    argv = ["inspect", "data", "chats.jsonl", "--model", "MODEL", "--depth", "2", "--use-cpu", "--plan", "--json"]
    more = ["--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "2", "--num-train-epochs", "3"]
    assert main([*argv, *more]) == 0
    out = capsys.readouterr().out
    plan = json.loads(out[out.index("{\n") :])["plan"]
    assert plan["steps"].startswith("12 of 4 rows")  # 16 rows, three times
    assert re.match(r"\d+:\d\d \(\d+\.\d\d s a step", plan["time"]) and plan["memory"].endswith("(process)")
    tokens = 4 * (8 + 14 + 9) + sum(encode_rows([chat("<b>w1&", "w3 </script>")], tokenizer())[0].lengths) * 4
    assert plan["disk of kept states"].startswith(f"{tokens * 32 * 4 / 1e9:.3f} GB")
    assert sorted(folder.rglob("*")) == before


def test_what_cannot_be_shown_is_said(folder, capsys):
    (folder / "prompts.jsonl").write_text(json.dumps({"messages": ROWS[0]["messages"][:1]}) + "\n")
    assert main(["inspect", "data", "prompts.jsonl", "--model", "MODEL", "--use-cpu"]) == 2
    assert "no row left to train on" in capsys.readouterr().err
    assert main(["inspect", "data", "chats.jsonl"]) == 2
    assert "model: got nothing" in capsys.readouterr().err
    for argv in (["inspect", "data"], ["inspect", "data", "--json"]):  # a module's folder of that name, as before
        assert main(argv) == 2 and "data/mtp_config.json: not there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["inspect", "data", "--help"])
    assert "usage: foretell inspect data" in capsys.readouterr().out
