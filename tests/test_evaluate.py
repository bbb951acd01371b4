"""foretell evaluate, sweep, compare, report: what is read, what is counted, and what is not said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from drafters import knowing_mtp, leaning_model

from foretell.cli import main
from foretell.evaluation import evaluate as evaluating
from foretell.evaluation import measure as measuring
from foretell.evaluation.evaluate import SCHEMA, difference, elsewhere, predicted
from foretell.evaluation.measure import Answered, Chunk, Kept, Measured, Way, chunks_of, measure, tensors_digest
from foretell.evaluation.workloads import load_tasks, next_prompt
from foretell.types import Verification
from tests.test_prompts import make_tokenizer

ROWS = [
    {"prompt": "one two three four"},
    {"prompt": "five two three one"},
    {"messages": [{"role": "user", "content": "hello one?"}], "category": "chat"},
]
TURNS = [
    {"question_id": 7, "category": "writing", "turns": ["one two", "three four?"]},
    {"question_id": 9, "category": "translation", "turns": ["one two three"]},
]


def lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model, its tokenizer, a module that drafts well, and prompts."""
    folder, model = tmp_path_factory.mktemp("evaluate"), leaning_model()
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    knowing_mtp(model, noise=0.3).save_pretrained(folder / "module")
    lines(folder / "rows.jsonl", ROWS)
    lines(folder / "turns.jsonl", TURNS)
    return folder


def words(place: Path, *more: str, verb: str = "evaluate", output: str = "run.json") -> list[str]:
    given = [verb, str(place / "model"), "--module", str(place / "module"), "--output", str(place / output)]
    return [*given, "--prompts", str(place / "rows.jsonl"), f"spec-bench:{place / 'turns.jsonl'}", *more]


# -- workloads ---------------------------------------------------------------------------------------------------------


def test_each_format_is_read(tmp_path):
    one = lines(tmp_path / "a.jsonl", [{"question": "one?", "answer": "#### 1"}])
    two = lines(tmp_path / "b.jsonl", [{"task_id": "T/0", "prompt": "def f():", "entry_point": "f", "test": ""}])
    three = lines(tmp_path / "c.jsonl", TURNS)
    tasks = load_tasks([f"gsm8k:{one}", f"humaneval:{two}", f"mt-bench:{three}", f"spec-bench:{three}", "demo"])
    assert [task.category for task in tasks[:6]] == [
        "gsm8k", "humaneval", "writing", "translation", "multi-turn", "translation"
    ]  # fmt: skip
    assert tasks[2].turns == ("one two", "three four?") and "def f():" in tasks[1].turns[0]
    assert len(tasks) == 6 + 80 and len(load_tasks(["demo"], 2)) == 16


@pytest.mark.parametrize(
    ("source", "rows", "wanted"),
    [
        (
            "gsm8k:{}",
            [{"question": "a", "answer": "b"}, {"problem": "c"}],
            "line 2: got .*wanted gsm8k's keys question",
        ),
        ("spec-bench:{}", [{"question_id": 1, "category": "qa", "turns": []}], "line 1: turns: got '\\[\\]'"),
        ("mt-bench:{}", [], "holds no question"),
        ("mt-bench:{}.not", TURNS, "which is no file"),
        ("spec-bensh", TURNS, "did you mean spec-bench"),
    ],
)
def test_what_is_no_workload_is_refused(source, rows, wanted, tmp_path):
    path = lines(tmp_path / "a.jsonl", rows)
    with pytest.raises((ValueError, FileNotFoundError), match=wanted):
        load_tasks([source.format(path)])
    with pytest.raises(ValueError, match="stands twice"):
        load_tasks(["demo", "demo"])


def test_the_second_turn_reads_the_models_own_answer(tmp_path):
    task, tokenizer = load_tasks([f"mt-bench:{lines(tmp_path / 'a.jsonl', TURNS)}"])[0], make_tokenizer()
    text = tokenizer.decode(next_prompt(task, ["five five"], tokenizer))
    assert text.index("one two") < text.index("five five") < text.index("three four")
    assert "three" not in tokenizer.decode(next_prompt(task, [], tokenizer))


# -- measuring ---------------------------------------------------------------------------------------------------------


def scripted(name: str, seconds: list[float], ran: list | None = None) -> Way:
    """A way of known times."""
    given = iter(seconds)

    def run(prompts: list[list[int]], seed: int) -> Answered:
        if ran is not None:
            ran.append((name, tuple(map(tuple, prompts))))
        return Answered(next(given), [[1] * 10 for _ in prompts], None)

    return Way(name, name, run)


CHUNKS = [Chunk("a", ["x"], [[1]]), Chunk("a", ["y"], [[2]]), Chunk("b", ["z"], [[3]])]


def test_a_ratio_is_that_of_the_medians():
    ways = [scripted("off", [9] + [2.0] * 9), scripted("mtp", [9, 1.0, 1.0, 1.0, 1.0, 50.0, 1.0, 1.0, 1.0, 1.0])]
    found = measure(ways, CHUNKS, "off", repeats=3, precision=1e-9)
    assert found.repeats == 3 and found.ratio("mtp", "off")["ratio"] == 2.0
    assert found.ratio("off", "mtp")["ratio"] == 0.5
    assert found.ratio("mtp", "off")["low"] <= 2.0 <= found.ratio("mtp", "off")["high"]


def test_it_stops_where_the_ratios_are_known():
    steady = [scripted("off", [2.0] * 99), scripted("mtp", [1.0] * 99)]
    assert measure(steady, CHUNKS, "off", repeats=9, precision=0.01).repeats == 3
    rng = np.random.default_rng(0)
    noisy = [scripted("off", [2.0] * 99), scripted("mtp", rng.uniform(0.5, 1.5, 99).tolist())]
    assert measure(noisy, CHUNKS, "off", repeats=9, precision=0.01).repeats == 9


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    for _ in range(60):
        ways = [scripted("off", []), scripted("mtp", [])]
        many = [Chunk("a", ["x"], [[1]])] * 12
        kept = {
            name: [[{"seconds": s * rng.lognormal(0, 0.2), "tokens": [[1] * 10]} for _ in many] for _ in range(3)]
            for name, s in (("off", 2.0), ("mtp", 1.0))
        }
        ratio = Measured(ways, many, kept).ratio("mtp", "off")
        held += ratio["low"] <= 2.0 <= ratio["high"]
    assert held >= 48  # of 60, where 57 are meant; a bootstrap of 3 repeats is a little narrow


def test_an_interrupted_run_goes_on_and_counts_nothing_twice(tmp_path):
    class Stop(Exception):
        pass

    def stops(prompts: list[list[int]], seed: int) -> Answered:
        if len(ran) == 1 + 4:  # the warm-up, then the second chunk of the second repeat
            raise Stop
        ran.append(prompts)
        return Answered(1.0, [[1] * 10], None)

    ran: list = []
    ways = [scripted("off", [2.0] * 99), Way("mtp", "mtp", stops)]
    with pytest.raises(Stop):
        measure(ways, CHUNKS, "off", Kept(tmp_path / "k", {"seed": 0}), repeats=2, precision=1e-9)
    with (tmp_path / "k").open("a") as file:
        file.write('{"repeat": 1, "chu')  # what a killed process leaves
    again: list = []
    ways = [scripted("off", [2.0] * 99), scripted("mtp", [1.0] * 99, again)]
    with pytest.raises(ValueError, match="interrupted run with another seed"):
        measure(ways, CHUNKS, "off", Kept(tmp_path / "k", {"seed": 1}), repeats=2, precision=1e-9)
    found = measure(ways, CHUNKS, "off", Kept(tmp_path / "k", {"seed": 0}), repeats=2, precision=1e-9)
    assert [ids for _, (ids,) in again] == [(1,), (2,), (3,)]  # the warm-up, then what was missing
    assert found.repeats == 2 and found.tokens("mtp").tolist() == [[10.0] * 3] * 2
    whole = [json.loads(line) for line in (tmp_path / "k").read_text().splitlines()]
    assert [(line["repeat"], line["chunk"]) for line in whole[1:]] == [(r, c) for r in range(2) for c in range(3)]


def test_chunks_hold_one_category():
    named = [("a", "x", [1]), ("b", "y", [2]), ("c", "x", [3]), ("d", "x", [4])]
    assert [(c.category, c.names) for c in chunks_of(named, 2)] == [("x", ["a", "c"]), ("x", ["d"]), ("y", ["b"])]
    with pytest.raises(ValueError, match="batch_size: got 4, but .* none has more than 3"):
        chunks_of(named, 4)  # it would be called a batch of four, and be none


def test_a_digest_sees_every_byte():
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    first = tensors_digest(tensors)
    assert first == tensors_digest({name: value.clone() for name, value in tensors.items()})
    for change in ({"a": tensors["a"].view(3, 2)}, {"a": tensors["a"] * -1}, {"b": tensors["b"].half()}):
        assert tensors_digest(tensors | change) != first


def test_the_words_of_others():
    from foretell.decoding.stats import GenerationStats

    record = [Verification(3, 3, 2, 3, []), Verification(3, 3, 0, 1, []), Verification(0, 0, 0, 1, [])]
    found = list(elsewhere(GenerationStats("lossless", True, [record])).values())
    assert found == pytest.approx([1 + 2 / 2, 2 / 6, 5 / 3, 5 / 3, 2 / 2, 2 / 6])


def test_what_acceptance_alone_would_give():
    from foretell.decoding.stats import GenerationStats

    off = GenerationStats("lossless", True, [[Verification(0, 0, 0, 1, [])] * 4], verifications=4)
    off.seconds = {"verify": 4.0}
    drafted = GenerationStats("lossless", True, [[Verification(1, 1, 1, 2, [])] * 3], verifications=3)
    drafted.seconds = {"verify": 3.6, "draft": 0.3}
    found = predicted(drafted, off)
    assert (found["draft_cost"], found["wider_rows"]) == (pytest.approx(0.1), pytest.approx(0.2))
    assert found["speedup"] == pytest.approx(2 / 1.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_half_precision_has_near_ties(dtype, monkeypatch):
    mtp, prompt = knowing_mtp(leaning_model().to(dtype)), [5, 9, 20]
    best = mtp.model(torch.tensor([prompt])).logits[0, -1].topk(2)
    (got, wanted), gap = best.indices.tolist(), float(best.values[0] - best.values[1])
    found = difference(mtp, prompt, [got, 4], [wanted, 4])
    assert found["position"] == 0 and (found["got"], found["wanted"]) == ([got], [wanted])
    assert found["gap"] == pytest.approx(gap / torch.finfo(dtype).eps / float(best.values[1].abs()), rel=1e-3)
    for limit in (found["gap"] * 0.99, found["gap"] * 1.01):
        monkeypatch.setattr(evaluating, "NEAR_TIE", limit)
        assert difference(mtp, prompt, [got], [wanted])["near_tie"] == (dtype != torch.float32 and limit > found["gap"])
    assert difference(mtp, prompt, [got], [got, 4])["near_tie"] is False  # another length is no rounding


# -- the verbs ---------------------------------------------------------------------------------------------------------


def test_evaluate_counts_what_was_decoded(place, capsys):
    assert main(words(place, "--max-new-tokens", "24", "--repeats", "3", "--precision", "0.9")) == 0
    result, said = json.loads((place / "run.json").read_text()), capsys.readouterr().out
    assert result["schema"] == SCHEMA and "answers equal" in said and "vLLM mean acceptance length" in said
    assert not (place / "run.json.rounds.jsonl").exists()
    assert result["equality"]["equal"] == result["equality"]["runs"] == 6 * 3 * 2  # 2 ways, 3 repeats
    assert [len(chunk["names"]) for chunk in result["chunks"]] == [1] * 6
    assert {n for c in result["chunks"] for n in c["names"]} >= {"spec-bench/7", "spec-bench/7 turn 2", "rows/0"}
    both = result["ways"][-1]
    rounds = [v for chunk in result["chunks"] for record in chunk["records"] for v in record]
    answered = sum(len(a) for chunk in result["chunks"] for a in chunk["answers"])
    assert sum(v[3] for v in rounds) == answered  # of the first repeat
    assert [sum(chunk["rounds"][0] for chunk in result["chunks"]), result["repeats"]] == [len(rounds), 3]
    every = sum(sum(chunk["rounds"]) for chunk in result["chunks"])
    assert both["tau"] == pytest.approx(3 * answered / every)
    assert sum(result["acceptance_by"]["both"]["histogram"].values()) == every
    for kind in ("by_category", "by_position", "by_context"):
        assert sum(b["verifications"] for b in result["acceptance_by"]["both"][kind].values()) == every
    read = result["weights_bytes"] * every / both["seconds"]["verify"]
    assert both["share_of_bandwidth"] == pytest.approx(read / result["bandwidth_bytes_per_second"])
    assert result["weights_bytes"] == sum(p.numel() * 4 for p in leaning_model().parameters())
    assert both["times_off"]["low"] <= both["times_off"]["ratio"] <= both["times_off"]["high"]
    assert result["fixed"]["drafts"] == 3 and result["fixed"]["tau"] > 1.3
    assert sum(both["seconds"].values()) == pytest.approx(
        sum(s for chunk in result["chunks"] for s in chunk["seconds"]["both"]), rel=1e-6
    )


def test_sampled_and_batched(place):
    more = ("--temperature", "1", "--batch-size", "2", "--repeats", "1", "--max-new-tokens", "8", "--no-transformers")
    assert main(words(place, *more, "--num-draft-tokens", "2", output="t.json")) == 0
    result = json.loads((place / "t.json").read_text())
    assert "equality" not in result and result["ways"][-1]["label"].endswith(", 2 drafts")
    assert max(v[1] for chunk in result["chunks"] for record in chunk["records"] for v in record) == 2


def test_another_text_has_no_speed(place, monkeypatch, capsys):
    real = measuring._new

    def wrong(mtp, out_BT, width):
        rows = real(mtp, out_BT, width)
        return [[*row[:-1], row[-1] ^ 1] for row in rows] if out_BT.shape[0] == 1 and next(turn) % 3 == 2 else rows

    turn = iter(range(10**6))
    monkeypatch.setattr(measuring, "_new", wrong)
    assert main(words(place, "--max-new-tokens", "6", "--repeats", "1", output="wrong.json")) == 1
    result = json.loads((place / "wrong.json").read_text())
    assert not result["tokens_equal"] and "NOT LOSSLESS" in capsys.readouterr().out
    assert not any("tokens_per_second" in way for way in result["ways"]) and "by_category" not in result


def test_compare_says_what_differs_and_what_is_noise(place, capsys):
    for output, more in (("a.json", ()), ("b.json", ("--num-draft-tokens", "1"))):
        given = words(place, "--max-new-tokens", "16", "--repeats", "2", *more, output=output)
        assert main(given) == 0
    run = json.loads((place / "a.json").read_text())
    for chunk in run["chunks"]:
        chunk["seconds"]["both"] = [s * 3 for s in chunk["seconds"]["both"]]
    (place / "slow.json").write_text(json.dumps(run))
    capsys.readouterr()
    assert main(["compare", str(place / "slow.json"), str(place / "a.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ways"]["both"]["speed"]["value"] == pytest.approx(3.0) and not found["ways"]["both"]["speed"]["noise"]
    assert found["ways"]["off"]["speed"]["value"] == 1.0 and found["ways"]["off"]["speed"]["noise"]
    assert found["ways"]["both"]["tau"]["value"] == 0 and found["differs"] == {}
    assert main(["compare", str(place / "a.json"), str(place / "b.json")]) == 0
    assert "num_draft_tokens: auto -> 1" in capsys.readouterr().out
    assert main(words(place, "--max-new-tokens", "8", "--repeats", "1", output="c.json")) == 0
    assert main(["compare", str(place / "a.json"), str(place / "c.json")]) == 2
    assert "cannot be compared: another max_new_tokens" in capsys.readouterr().err


def test_runs_of_other_questions_are_not_compared(place, capsys):
    more = ("--max-new-tokens", "8", "--repeats", "1", "--no-transformers")
    assert main(words(place, *more, output="d.json")) == 0
    rows = ["--prompts", str(place / "rows.jsonl")]
    assert main([*words(place, *more, output="e.json")[:6], *rows, *more]) == 0
    assert main(words(place, *more, "--batch-size", "2", output="f.json")) == 0
    (place / "lossy.json").write_text(json.dumps(json.loads((place / "d.json").read_text()) | {"tokens_equal": False}))
    capsys.readouterr()
    for other, wanted in (
        ("e", "another prompts"),
        ("f", "another batch_size"),
        ("lossy", "one of them is not lossless"),
    ):
        assert main(["compare", str(place / "d.json"), str(place / f"{other}.json")]) == 2
        assert wanted in capsys.readouterr().err


def test_an_interrupted_run_of_the_verb_goes_on(place, capsys, monkeypatch):
    more = ("--max-new-tokens", "8", "--repeats", "3", "--precision", "0.0001", "--no-transformers")
    added, add = [], Kept.add

    def stops(self, line):
        if len(added) == 8:  # in the second repeat of six chunks
            raise KeyboardInterrupt
        added.append((line["repeat"], line["chunk"]))
        add(self, line)

    monkeypatch.setattr(Kept, "add", stops)
    assert main(words(place, *more, output="part.json")) == 130 and not (place / "part.json").exists()
    monkeypatch.setattr(
        Kept, "add", lambda self, line: (added.append((line["repeat"], line["chunk"])), add(self, line))
    )
    assert main(words(place, *more, output="part.json")) == 0
    run = json.loads((place / "part.json").read_text())
    chunks = len(run["chunks"])
    assert added == [(r, c) for r in range(3) for c in range(chunks)] and run["repeats"] == 3
    assert all(len(seconds) == 3 for chunk in run["chunks"] for seconds in chunk["seconds"].values())
    assert not list(place.glob("part.json.rounds*"))


def test_a_precision_that_the_time_does_not_give_is_said(place, capsys):
    more = ("--max-new-tokens", "8", "--precision", "0.0001", "--no-transformers")
    assert main(words(place, *more, "--minutes", "0", output="p.json")) == 0
    assert (
        "precision: got unknown after 1 repeats (batch 1), wanted 0.0001; give more --minutes"
        in capsys.readouterr().err
    )
    assert main(words(place, *more, "--repeats", "2", output="p.json")) == 0
    assert re.search(r"precision: got \d\.\d+ after 2 repeats .* give more --repeats", capsys.readouterr().err)
    assert json.loads((place / "p.json").read_text())["precision"] > 0.0001
    assert main(words(place, *more, "--repeats", "3", "--precision", "0.99", output="p.json")) == 0
    assert "precision" not in capsys.readouterr().err


def test_report_draws_a_run(place, capsys):
    assert main(words(place, "--max-new-tokens", "16", "--repeats", "1", output="r.json")) == 0
    samples = json.loads((place / "r.json").read_text())["samples"]
    pace = [sum(len(v["tokens"]) for v in one["verifications"]) / len(one["verifications"]) for one in samples]
    assert len(samples) == 3 and pace == sorted(pace)
    for one in samples:
        assert all(len(v["tokens"]) == len(v["sources"]) == len(v["chances"]) for v in one["verifications"])
        # greedy: the likeliest of 64 tokens, each time
        assert all(1 / 64 < chance <= 1 for v in one["verifications"] for chance in v["chances"])
    assert main(["report", str(place / "r.json"), "--output", str(place / "page.html")]) == 0
    page = (place / "page.html").read_text()
    assert "http://" not in page and "https://" not in page and "tokens per verification" in page
    assert main(["report", *[str(place / "r.json")] * 2, "--output", str(place / "two.html")]) == 0
    two = (place / "two.html").read_text()
    assert two.count("<h1") == 2 and two.count('id="theme"') == 1 and "foretell, 2 runs" in two
    (place / "no.json").write_text("{}")
    assert main(["report", str(place / "no.json"), "--output", str(place / "x.html")]) == 2
    assert "wanted a result of foretell evaluate" in capsys.readouterr().err


def test_sweep_marks_what_pays(place, capsys):
    more = ("--lengths", "1", "3", "--batch-sizes", "1", "2", "--max-new-tokens", "16", "--repeats", "1")
    assert main(words(place, *more, verb="sweep", output="s.json")) == 0
    found = json.loads((place / "s.json").read_text())["batches"]
    assert [one["batch_size"] for one in found] == [1, 2] and set(found[0]["ways"]) == {"1", "3", "auto"}
    assert found[0]["ways"]["3"]["tau"] > found[0]["ways"]["1"]["tau"] > 1
    for one in found:
        fixed = {k: one["ways"][str(k)]["ratio"] for k in (1, 3)}
        assert one["best_fixed"] == (max(fixed, key=fixed.get) if max(fixed.values()) > 1 else 0)
    assert main(words(place, "--lengths", "99", verb="sweep", output="s.json")) == 2
    assert "wanted 1 to 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (("--precision", "0"), "precision: got 0.0, wanted a share"),
        (("--temperature", "-1"), "temperature: got -1.0"),
        (("--temperature", "inf"), "temperature: got inf"),
        (("--minutes", "-1"), "minutes: got -1.0, wanted at least 0"),
        (("--minutes", "nan"), "minutes: got nan"),
        (("--num-draft-tokens", "0"), "num_draft_tokens: got '0', wanted a number from 1 on"),
        (("--drafter", "medusa"), "drafter: got 'medusa'"),
        (("--repeats", "0"), "repeats: got 0"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(more, wanted, place, capsys):
    assert main(words(place, *more)) == 2
    assert wanted in capsys.readouterr().err


def test_a_module_of_another_model_is_refused(place, tmp_path, capsys):
    other = leaning_model(hidden_size=48)
    knowing_mtp(other).save_pretrained(tmp_path / "other")
    given = ["evaluate", str(place / "model"), "--module", str(tmp_path / "other"), "--output", str(tmp_path / "x")]
    assert main([*given, "--prompts", str(place / "rows.jsonl")]) == 2
    assert "hidden_size" in capsys.readouterr().err
