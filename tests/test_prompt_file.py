"""From any source to prompts: every form, every filter, both presets; what is dropped is counted, never silent."""

from __future__ import annotations

import json
import os
import random
import resource
from collections import Counter

import pytest
from datasets import Dataset
from tiny import tiny_tokenizer

from foretell.cli import main
from foretell.config import ConfigError, from_dict
from foretell.data.formats import load_rows
from foretell.data.prompt_file import ALIKE, PRESETS, PromptRules, PromptSet, messages_of, without_answer

USER = {"role": "user", "content": "2 + 2?"}
CHAT = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "4"}]
WORDS = [f"word{number}" for number in range(400)]


def lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def made(sources, **rules):
    return PromptSet([str(source) for source in sources], PromptRules(**rules))


def written(prompts: PromptSet, path) -> list[dict]:
    prompts.write(path)
    return [json.loads(line) for line in path.read_text().splitlines()]


def questions(count: int, seed: int = 0, length: int = 30) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.sample(WORDS, length)) for _ in range(count)]


ANSWERED = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "?"},
]
FORMS = [
    ({"messages": CHAT}, CHAT[:2]),
    ({"messages": ANSWERED}, ANSWERED),
    ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, [USER]),
    ({"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2 + 2?"}]}, CHAT[:2]),
    ({"conversations": CHAT}, CHAT[:2]),
    ({"system": "Be brief.", "conversations": [{"from": "human", "value": "2 + 2?"}]}, CHAT[:2]),
    ({"system": "Be kind.", "messages": CHAT}, CHAT[:2]),
    ({"instruction": "Add.", "input": "2 + 2", "output": "4"}, [{"role": "user", "content": "Add.\n\n2 + 2"}]),
    ({"instruction": "2 + 2?", "input": "", "output": "4"}, [USER]),
    ({"question": "2 + 2?", "answer": "4"}, [USER]),
    ({"input": "2 + 2?", "output": "4"}, [USER]),
    ({"prompt": "2 + 2?", "completion": "4"}, [USER]),
    ({"prompt": CHAT[:2], "completion": CHAT[2:]}, CHAT[:2]),
    ({"messages": None, "prompt": "2 + 2?"}, [USER]),
    ({"messages": [{**USER, "name": None}]}, [USER]),
]


@pytest.mark.parametrize(("row", "wanted"), FORMS)
def test_each_form_gives_its_prompt(row, wanted):
    assert without_answer(messages_of(row)) == wanted


def test_a_column_may_be_named():
    assert messages_of({"prompt": "no", "task": "2 + 2?"}, "task") == [USER]


@pytest.mark.parametrize("kind", ["jsonl", "json", "results", "gz", "parquet", "csv", "folder"])
def test_every_kind_of_file_is_read(kind, tmp_path):
    rows = [{"input": f"What is {number}?", "output": "n"} for number in range(5)]
    path = tmp_path / f"rows.{'json' if kind == 'results' else kind}"
    if kind in ("parquet", "csv"):
        getattr(Dataset.from_list(rows), f"to_{kind}")(path)
    elif kind == "gz":
        import gzip

        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif kind == "folder":
        path.mkdir()
        lines(path / "a.jsonl", rows[:2])
        lines(path / "b.jsonl", rows[2:])
    else:
        whole = {"jsonl": None, "json": rows, "results": {"config": 1, "results": rows}}[kind]
        lines(path, rows if whole is None else [whole])
    found = written(made([path]), tmp_path / "out.jsonl")
    assert [row["messages"][0]["content"] for row in found] == [row["input"] for row in rows]
    assert len({row["id"] for row in found}) == 5 and all(row["domain"] == "all" for row in found)
    assert found[1]["source"].startswith(("rows.", "a.")) and "2" in found[1]["source"]
    assert len(load_rows(tmp_path / "out.jsonl")) == 5  # what train and regenerate read


def test_the_same_prompts_have_the_same_ids_in_any_file_and_order(tmp_path):
    texts = questions(20)
    one = made([lines(tmp_path / "a.jsonl", [{"prompt": text} for text in texts])])
    other = made([lines(tmp_path / "b.jsonl", [{"question": text} for text in reversed(texts)])])
    ids = [{row["id"]: row["messages"] for row in written(p, tmp_path / "out.jsonl")} for p in (one, other)]
    assert ids[0] == ids[1] and len(ids[0]) == 20


BAD = [
    ({"text": "no question"}, "got the columns .'text'., wanted one of messages, conversations"),
    ({"messages": []}, "got the columns"),
    ({"messages": CHAT[2:]}, "got messages without a question"),
    ({"messages": CHAT[:1]}, "got messages without a question"),
    ({"conversations": ["hi"]}, r"conversations\[0\]: got str 'hi'"),
    ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: got the content NoneType None"),
    ({"prompt": 3}, "prompt: got int 3"),
    ("[1]", "got list, wanted an object"),
    ("{", "got '{', wanted one JSON object"),
]


@pytest.mark.parametrize(("row", "said"), BAD)
def test_a_bad_row_is_named_or_counted(row, said, tmp_path):
    path = lines(tmp_path / "rows.jsonl", [{"prompt": "fine"}, row])
    with pytest.raises(ValueError, match="^rows.jsonl, line 2: " + said):
        made([path])
    with pytest.warns(UserWarning, match="1 rows are skipped"):
        prompts = made([path], skip_bad_rows=1)
    assert prompts.steps()["bad row"] == 1 and prompts.steps()["kept"] == 1
    assert prompts.report()["bad_rows"][0].startswith("rows.jsonl, line 2: ")
    with pytest.raises(ValueError, match="2 bad rows, wanted 1 at most"):
        made([lines(path, [{"prompt": "fine"}, row, row])], skip_bad_rows=1)


def test_tools_belong_to_the_question(tmp_path):
    tools = [{"type": "function", "function": {"name": "add", "description": None}}]
    rows = [{"messages": CHAT}, {"messages": CHAT, "tools": tools}, {"messages": CHAT, "tools": json.dumps(tools)}]
    rows += [{"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}}, {"messages": CHAT, "tools": []}]
    found = written(made([lines(tmp_path / "rows.jsonl", rows)]), tmp_path / "out.jsonl")
    assert [set(row) - {"messages", "id", "domain", "source"} for row in found] == [
        set(), {"tools"}, {"tools"}, {"chat_template_kwargs"},
    ]  # fmt: skip
    assert found[1]["tools"] == [{"type": "function", "function": {"name": "add"}}]
    assert len({row["id"] for row in found}) == 4
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for t in tools or [] %}w7 {% endfor %}{% for m in messages %}w3 {% endfor %}"
    prompts = PromptSet([tmp_path / "rows.jsonl"], PromptRules(model="tiny"), tokenizer)
    assert prompts.report()["tokens"] == {"all": 2 + 3 + 3 + 2, "shortest": 2, "longest": 3}


def test_a_file_that_cannot_be_read_is_no_bad_row(tmp_path):
    lines(tmp_path / "a.jsonl", [{"prompt": "fine"}])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(
        ValueError, match=r"(?s)b.parquet: got a file that is no whole parquet.*c.jsonl: the file is empty"
    ):
        made([tmp_path], skip_bad_rows=100)


def test_files_may_be_more_than_a_process_may_open(tmp_path):
    for number in range(90):
        lines(tmp_path / f"{number}.jsonl", [{"prompt": f"prompt {number}"}])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 30, hard))
    try:
        prompts = made([tmp_path])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert prompts.steps()["kept"] == 90


def test_duplicates_are_one_as_far_as_asked(tmp_path):
    text = questions(1, length=60)[0]
    near = text.replace(text.split()[30], "other")
    far = " ".join([*text.split()[:30], *questions(1, seed=2)[0].split()])
    rows = [{"prompt": t} for t in (text, text, text.title() + "!", "  " + text.replace(" ", "\n"), near, far)]
    path = lines(tmp_path / "rows.jsonl", rows)
    kept = {how: written(made([path], dedupe=how), tmp_path / "out.jsonl") for how in ("exact", "normalised", "near")}
    places = {how: [row["source"].rpartition(" ")[2] for row in found] for how, found in kept.items()}
    assert places == {"exact": list("13456"), "normalised": list("156"), "near": list("16")}
    steps = made([path], dedupe="near").steps()
    assert (steps["duplicate"], steps["near-duplicate"]) == (3, 1)


def test_near_duplicates_are_those_of_the_definition(tmp_path):
    """Against Jaccard similarities counted out, away from the threshold, where MinHash is sure."""
    chance, texts = random.Random(1), questions(60, length=100)
    for text in texts[:60]:
        words = text.split()
        for at in chance.sample(range(100), chance.choice([2, 2, 7])):
            words[at] = f"changed{at}"
        texts.append(" ".join(words))

    def shingles(text: str) -> set[str]:
        words = text.split()
        return {" ".join(words[at : at + 3]) for at in range(len(words) - 2)}

    def likeness(one: str, other: str) -> float:
        a, b = shingles(one), shingles(other)
        return len(a & b) / len(a | b)

    kept: list[str] = []
    for text in texts:
        alike = max((likeness(text, other) for other in kept), default=0)
        assert abs(alike - ALIKE) > 0.07
        kept += [text] if alike < ALIKE else []
    assert 70 < len(kept) < 90
    path = lines(tmp_path / "rows.jsonl", [{"prompt": text} for text in texts])
    assert [r["messages"][0]["content"] for r in written(made([path], dedupe="near"), tmp_path / "o.jsonl")] == kept


def test_what_shares_thirteen_words_with_an_evaluation_set_is_left_out(tmp_path):
    (held,) = questions(1, length=40)
    words = held.split()
    evaluation = lines(
        tmp_path / "eval.jsonl", [{"turns": [held], "reference": "a short answer"}, {"q": "What is 2 + 2?"}]
    )
    rows = [
        " ".join(["so", *words[5:18], "then"]),  # thirteen
        " ".join(["so", *words[5:17], "then"]),  # twelve
        ", ".join(words[20:35]).upper(),
        "what is 2+2",  # short, but all of it
        "what is 2+2 and more",
    ]
    path = lines(tmp_path / "rows.jsonl", [{"prompt": text} for text in rows])
    prompts = made([path], exclude=[str(evaluation)])
    assert [row["source"][-1] for row in written(prompts, tmp_path / "out.jsonl")] == ["2", "5"]
    found = prompts.report()["overlaps"][str(evaluation)]
    assert found == {"prompts": 3, "first": [f"rows.jsonl, line {number}" for number in (1, 3, 4)]}
    other = str(lines(tmp_path / "other.jsonl", [{"q": "far away"}]))
    assert made([path], exclude=[other]).report()["overlaps"] == {other: {"prompts": 0, "first": []}}
    later = [{"messages": [USER, CHAT[2], {"role": "user", "content": rows[0]}]}, {"prompt": "fine"}]
    assert made([lines(path, later)], exclude=[str(evaluation)]).steps()["in an evaluation set"] == 1
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        made([path], exclude=["nowhere.jsonl"])


def test_a_choice_by_chance_is_the_seeds_and_fair(tmp_path):
    rows = [{"prompt": text, "domain": "code" if at % 4 else "math"} for at, text in enumerate(questions(400))]
    path = lines(tmp_path / "rows.jsonl", rows)

    def chosen(**rules) -> list[str]:
        return [row["id"] for row in written(made([path], **rules), tmp_path / "out.jsonl")]

    everything = chosen()
    one = chosen(limit=100)
    assert one == chosen(limit=100, seed=0) and len(one) == 100
    assert one == [name for name in everything if name in one]  # in the order of the source
    assert len({*one} & {*chosen(limit=100, seed=1)}) < 50  # 25 by chance
    assert {*one} < {*chosen(limit=200)}  # more are those and others
    places = [everything.index(name) for name in one]
    assert 140 < sum(places) / 100 < 260  # not the first ones
    shuffled = lines(tmp_path / "b.jsonl", random.Random(5).sample(rows, 400))
    assert {*one} == {row["id"] for row in written(made([shuffled], limit=100), tmp_path / "out.jsonl")}

    def domains(**rules) -> Counter:
        return Counter(row["domain"] for row in written(made([path], **rules), tmp_path / "out.jsonl"))

    assert domains(quota=["math=30"]) == {"math": 30, "code": 300}
    assert domains(quota=["math=0.5", "code=0.5"], limit=121) in ({"math": 61, "code": 60}, {"math": 60, "code": 61})
    assert domains(quota=["math=0"]) == {"code": 300}
    missing = made([path], quota=["math=150", "code=10"])
    assert missing.report()["missing_of_quotas"] == {"math": 50} and missing.steps()["quota or limit"] == 290


def test_lengths_are_those_of_what_the_target_is_asked(tmp_path):
    tokenizer = tiny_tokenizer()
    path = lines(
        tmp_path / "rows.jsonl", [{"prompt": " ".join(f"w{i}" for i in range(count))} for count in range(1, 10)]
    )
    prompts = PromptSet([path], PromptRules(model="tiny", min_tokens=3, max_tokens=6), tokenizer)
    assert (prompts.steps()["length"], prompts.steps()["kept"]) == (5, 4)
    assert prompts.report()["tokens"] == {"all": 18, "shortest": 3, "longest": 6}
    tokenizer.chat_template = (
        "{% for m in messages %}w3 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w4{% endif %}"
    )
    prompts = PromptSet([path], PromptRules(model="tiny", min_tokens=3, max_tokens=6), tokenizer)
    assert prompts.report()["tokens"] == {"all": 18, "shortest": 3, "longest": 6} and prompts.steps()["length"] == 5
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="rows.jsonl, line 1: the chat template refuses"):
        PromptSet([path], PromptRules(model="tiny", max_tokens=6), tokenizer)


# -- the two preparations of seed 000 ----------------------------------------------------------------------------------

TASK = "Generate an executable Python function generated from the given prompt. "
STDIN = (
    TASK
    + "The function should take stdin as input and print the output. Simply call the function after the definition."
)
SOLVE = TASK + "Return the function body without invoking it at the final solution."
BOXED = "Return your final response within \\boxed{}. "


def openthoughts_rows() -> list[dict]:
    texts = [("code", (STDIN if at % 2 else SOLVE) + text) for at, text in enumerate(questions(200))]
    texts += [("math", BOXED + text) for text in questions(30, seed=1)] + [
        ("other", text) for text in questions(9, seed=2)
    ]
    system = "Your role as an assistant involves thoroughly exploring questions."
    return [
        {"system": system, "conversations": [{"from": "user", "value": t}, {"from": "assistant", "value": name}]}
        for name, t in texts
    ]


def test_openthoughts_tags_by_the_instruction_and_takes_it_off(tmp_path):
    rows = openthoughts_rows()
    again = {**rows[-1], "conversations": [{"from": "user", "value": "  " + rows[-1]["conversations"][0]["value"]}]}
    Dataset.from_list([*rows, again]).to_parquet(tmp_path / "train.parquet")
    prompts = made([tmp_path / "train.parquet"], preset="openthoughts")
    found = written(prompts, tmp_path / "out.jsonl")
    assert Counter(row["domain"] for row in found) == {"code": 200, "math": 30, "other": 9}
    assert prompts.steps()["duplicate"] == 1
    mixed = Counter()
    for row, given in zip(found, rows, strict=True):
        (message,) = row["messages"]  # the first question alone
        text = given["conversations"][0]["value"]
        plain = text.removeprefix(STDIN).removeprefix(SOLVE).removeprefix(BOXED)
        assert message["role"] == "user" and message["content"].endswith(plain)
        start = message["content"].removesuffix(plain)
        mixed[start] += 1
        assert bool(start) == (row["domain"] == "code") and "boxed" not in start
    assert 100 < next(count for start, count in mixed.items() if "stdin" in start) < 140  # of 200: six of ten
    assert len(mixed) == 3
    assert len(written(made([tmp_path / "train.parquet"], preset="openthoughts", limit=50), tmp_path / "o.jsonl")) == 50


def test_am_qwen3_takes_domains_from_files_by_their_weights_and_one_turn_only(tmp_path):
    folder = tmp_path / "am"
    folder.mkdir()
    for at, name in enumerate(("other", "math", "code", "science", "if")):
        rows = [
            {"conversations": [{"from": "human", "value": t}, {"from": "assistant", "value": "a"}]}
            for t in questions(90, at)
        ]
        rows.append({"conversations": [*rows[0]["conversations"], *rows[1]["conversations"]]})  # two turns
        rows.append({"conversations": [{"from": "human", "value": questions(90, at)[3].replace(" ", "  ")}]})
        lines(folder / f"{name}.jsonl", rows)
    prompts = made([folder], preset="am_qwen3", limit=101)
    found = written(prompts, tmp_path / "out.jsonl")
    assert Counter(row["domain"] for row in found) == {"math": 54, "code": 31, "science": 16}
    assert prompts.steps()["other turns"] == 5 and prompts.steps()["duplicate"] == 5
    assert all(len(row["messages"]) == 1 for row in found)
    numbers = [int(row["source"].rpartition(" ")[2]) for row in found if row["domain"] == "math"]
    assert max(numbers) > 60  # by chance, not the first ones
    assert sum(PRESETS["am_qwen3"][1].values()) == pytest.approx(1)
    everything = made([folder], preset="am_qwen3", quota=["chat=2", "if=3", "math=0", "code=0", "science=0"])
    assert Counter(row["domain"] for row in written(everything, tmp_path / "o.jsonl")) == {"chat": 2, "if": 3}
    with pytest.raises(ValueError, match="got the file x.jsonl, wanted other.jsonl, math.jsonl"):
        made([lines(tmp_path / "x.jsonl", [{"prompt": "a"}])], preset="am_qwen3")


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_and_reports_every_count(tmp_path, capsys):
    one = lines(tmp_path / "a.jsonl", [{"prompt": text} for text in [*questions(6), *questions(2)]])
    other = lines(tmp_path / "b.jsonl", [{"question": text, "domain": "b"} for text in questions(3, seed=4)])
    output = tmp_path / "new" / "prompts.jsonl"
    argv = ["prompts", str(one), str(other), "--limit", "5", "--seed", "2"]
    assert main([*argv, "--plan"]) == 0
    assert "kept" in capsys.readouterr().out and not output.parent.exists()
    assert main([*argv, "--output", str(output), "--plan"]) == 0
    assert "plan: nothing is written" in capsys.readouterr().out and not output.exists()
    assert main([*argv, "--output", str(output)]) == 0
    out, report = capsys.readouterr().out, json.loads((tmp_path / "new" / "prompts.jsonl.report.json").read_text())
    assert report["steps"] == {
        "read": 11, "bad row": 0, "other turns": 0, "length": 0, "duplicate": 2, "near-duplicate": 0,
        "in an evaluation set": 0, "quota or limit": 4, "kept": 5,
    }  # fmt: skip
    assert all(f"{step:<22}{count:>12}" in out for step, count in report["steps"].items())
    assert report["settings"]["seed"] == 2 and report["bytes"] == output.stat().st_size
    assert {name: counts["found"] for name, counts in report["domains"].items()} == {"all": 6, "b": 3}
    assert sorted(path.name for path in output.parent.iterdir()) == ["prompts.jsonl", "prompts.jsonl.report.json"]
    assert main(["prompts", str(output), "--output", str(output)]) == 2
    assert "which is a source" in capsys.readouterr().err
    assert main(["prompts", str(one)]) == 2 and "--output prompts.jsonl" in capsys.readouterr().err
    assert main(["prompts", str(one), "--plan", "--min-tokens", "3"]) == 2
    assert "--model" in capsys.readouterr().err


def test_rules_that_make_no_sense_are_all_named():
    with pytest.raises(ConfigError) as error:
        from_dict(PromptRules, {"preset": "x", "dedupe": "y", "limit": 0, "quota": ["math"], "max_tokens": 3})
    assert [line.partition(":")[0] for line in error.value.problems] == [
        "preset", "dedupe", "min_tokens, max_tokens", "limit", "quota",
    ]  # fmt: skip
    assert "no limit" in PromptRules(quota=["math=0.5"]).problems()[0]


def test_nothing_left_is_an_error_with_the_counts(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"prompt": "w1 w2", "domain": "math"}] * 3)
    with pytest.raises(
        ValueError, match=r"no prompt is left: .*'read': 3.*'duplicate': 2.*'quota or limit': 1, 'kept': 0"
    ):
        made([path], quota=["math=0"])


def test_a_file_is_whole_or_not_there(tmp_path):
    path, output = lines(tmp_path / "a.jsonl", [{"prompt": t} for t in questions(500)]), tmp_path / "out.jsonl"
    prompts = made([path])
    output.write_text("before\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # as a disk that fills
    try:
        with pytest.raises(OSError, match="large"):
            prompts.write(output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert output.read_text() == "before\n" and sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out.jsonl"]
    lines(path, [{"prompt": t} for t in questions(500, seed=1)])
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match="a.jsonl, line 1: (the file )?changed while it was read"):
        prompts.write(output)
    assert output.read_text() == "before\n"
