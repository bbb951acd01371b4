"""lm-evaluation-harness: its own hf model and ours give the same scores, to the digit; on tasks from local files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from drafters import knowing_mtp, leaning_model
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from foretell.cli import main
from foretell.cli.tasks import how_of
from foretell.evaluation.harness import (
    ForetellLM,
    StopTexts,
    load_harness_tasks,
    run_tasks,
    same_answers,
    tokens_per_forward,
    with_interval,
)
from foretell.types import Verification
from tests.test_prompts import make_tokenizer

# what a tiny model says to such prompts is known: see `place`
WRITTEN = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: {until}, max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list: [{{name: first, filter: [{{function: regex, regex_pattern: "(\\\\w+)"}}, {{function: take_first}}]}}]
"""
CHOSEN = """task: chosen
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["one two", "three", "five hello"]
doc_to_target: 1
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
QUESTIONS = [f"{a} {b} {c}" for a in ("one", "two", "three") for b in ("four", "five") for c in ("hello", "one")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny model, a module, and tasks about it in files; answers are what the model itself says to half of them."""
    folder, model = tmp_path_factory.mktemp("harness"), leaning_model()
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    model.save_pretrained(folder / "model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    knowing_mtp(model, noise=0.3).save_pretrained(folder / "module")
    rows = []
    for i, question in enumerate(QUESTIONS):
        ids = torch.tensor([tokenizer(question).input_ids])
        out = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
        said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split()
        rows.append({"question": question, "answer": said[0] if said and i % 2 else "never"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    until = json.dumps([" three", "?"])
    (folder / "written.yaml").write_text(WRITTEN.format(name="written", rows=folder / "rows.jsonl", until=until))
    (folder / "chosen.yaml").write_text(CHOSEN.format(rows=folder / "rows.jsonl"))
    return folder


def models(place: Path, batch_size: int = 4, **how: object) -> tuple[HFLM, ForetellLM]:
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    given = {"tokenizer": AutoTokenizer.from_pretrained(place / "model"), "batch_size": batch_size}
    return HFLM(model, **given), ForetellLM(model, module=str(place / "module"), **given, **how)


@pytest.fixture(scope="module")
def tasks(place):
    return load_harness_tasks([str(place / "written.yaml"), str(place / "chosen.yaml")])


@pytest.fixture(scope="module")
def wanted(place, tasks):
    """What the harness's own hf model scores."""
    return run_tasks(models(place)[0], tasks, None, 0)


@pytest.mark.parametrize(
    "how",
    [{}, {"num_draft_tokens": 3, "drafter": "mtp"}, {"num_draft_tokens": 0}],
    ids=["auto", "three", "off"],
)
def test_lossless_policies_score_as_hf_does_to_the_digit(how, place, tasks, wanted):
    ours = models(place, **how)[1]
    got = run_tasks(ours, tasks, None, 0)
    assert got == wanted
    score = wanted["scores"]["written"]["exact_match,first"]
    assert 0 < score["value"] < 1 and score["each"] == pytest.approx(score["each"]) and len(score["each"]) == 12
    assert {name for name in wanted["scores"]["chosen"]} == {"acc,none", "acc_norm,none"}
    about = ours.get_model_info()["foretell"]
    assert about["texts"] == 12 and about["lossless"]
    drafts = how.get("num_draft_tokens") == 3
    assert about["tokens_per_forward"] > 1 if drafts else about["tokens_per_forward"] >= 1
    assert same_answers(got["texts"], wanted["texts"])["equal"] == 24


def test_another_answer_is_seen(place, tasks, wanted):
    _, ours = models(place)
    ours.choose(policy="static_k", num_draft_tokens=4)
    got = run_tasks(ours, tasks, None, 0)
    alike = same_answers(got["texts"], wanted["texts"])
    assert alike["equal"] < alike["documents"] == 24 and alike["first_difference"]["task"] == "written"
    assert not ours.get_model_info()["foretell"]["lossless"]
    assert got["scores"]["chosen"] == wanted["scores"]["chosen"]  # likelihoods are the target's in any case


def test_until_ends_where_it_stands(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    ids = tokenizer("three? one two three", return_tensors="pt").input_ids
    at = tokenizer("three? one").input_ids
    for stop, wanted in (("three", True), ("three?", False), ("four", False), ("two three", True), ("one two", True)):
        assert StopTexts(tokenizer, [stop], len(at))(ids, None).tolist() == [wanted if stop != "one two" else False]
    both = torch.cat([ids, ids.flip(1)])
    assert StopTexts(tokenizer, [" three"], len(at))(both, None).tolist() == [True, False]


def test_a_cache_of_answers_belongs_to_its_weights_and_policy(place, tasks, tmp_path):
    def score(lm):
        made = simple_evaluate(
            model=lm, tasks=tasks[1][:1], task_manager=tasks[0], use_cache=str(tmp_path / "kept"), limit=4
        )
        return made["results"]["written"]["exact_match,first"]

    _, ours = models(place)
    first = score(ours)
    count = len(ours.records)
    assert count == 4 and score(ours) == first and len(ours.records) == count  # nothing was decoded again
    ours.choose(policy="static_k", num_draft_tokens=4)
    with pytest.raises(ValueError, match="use_cache: .* holds answers of another model, module, policy"):
        score(ours)
    ours.choose(policy="lossless", num_draft_tokens="auto")
    assert score(ours) == first
    kept, before = ours.key(), ours.model.generation_config.repetition_penalty
    ours.model.generation_config.repetition_penalty = 1.5
    with pytest.raises(ValueError, match="use_cache"):
        score(ours)
    ours.model.generation_config.repetition_penalty = before
    for name, value in (("softmax_dtype", torch.float64), ("custom_prefix_token_id", 5)):
        other = models(place)[1]
        assert other.key() == kept
        setattr(other, name, value)
        assert other.key() != kept, name
    with torch.no_grad():
        ours.model.lm_head.weight[3] += 1e-3
    with pytest.raises(ValueError, match="use_cache"):
        score(ours)


def test_what_cannot_be_answered_is_refused(place, tasks):
    _, ours = models(place)
    with pytest.raises(ValueError, match="beam"):
        simple_evaluate(model=ours, tasks=tasks[1][:1], task_manager=tasks[0], gen_kwargs={"num_beams": 2}, limit=2)
    with pytest.raises(ValueError, match="unknown policy 'fast'"):
        ours.choose(policy="fast", num_draft_tokens=3)
    with pytest.raises(ValueError, match="mixed_precision_dtype"):
        models(place, mixed_precision_dtype="bfloat16")
    with pytest.raises(ValueError, match="wanted a trained module"):
        ForetellLM(ours.model, tokenizer=ours.tokenizer, policy="confadapt")


def test_intervals():
    each = [1.0] * 30 + [0.0] * 70
    found = with_interval(
        {"value": 0.3, "stderr": 0.1, "each": each}, {"value": 0.0, "stderr": 0.0, "each": [0.0] * 100}
    )
    half = 1.96 * (0.3 * 0.7 / 100) ** 0.5
    assert found["low"] == pytest.approx(0.3 - half, abs=0.02) and found["high"] == pytest.approx(0.3 + half, abs=0.02)
    assert found["difference"]["value"] == pytest.approx(0.3)
    same = with_interval({"value": 0.3, "stderr": None, "each": each}, {"value": 0.3, "stderr": None, "each": each})
    assert same["difference"] == {"value": 0, "low": 0, "high": 0}
    assert with_interval({"value": 2.0, "stderr": 0.5, "each": None})["high"] == pytest.approx(2.98)
    assert with_interval({"value": 2.0, "stderr": None, "each": None})["low"] is None
    records = [[Verification(3, 3, 2, 3, [])] * 4, [Verification(3, 3, 0, 1, [])] * 4]
    pace = tokens_per_forward(records)
    assert pace["value"] == 2.0 and pace["low"] == 1.0 and pace["high"] == 3.0 and tokens_per_forward([]) is None


def test_names_of_policies():
    assert how_of("static_k:3", "auto") == {"policy": "static_k", "num_draft_tokens": 3}
    assert how_of("confadapt:0.8", "4") == {"policy": "confadapt", "num_draft_tokens": 4, "confidence_threshold": 0.8}
    assert how_of("lossless", "auto") == {"policy": "lossless", "num_draft_tokens": "auto"}
    for wrong in ("static_k:x", "lossless:3", "confadapt:", "fast"):
        with pytest.raises(ValueError, match=r"policies: got|unknown policy"):
            how_of(wrong, "auto")


# -- the verbs ---------------------------------------------------------------------------------------------------------


def words(place: Path, *more: str, output: str = "tasks.json", task: str = "written.yaml") -> list[str]:
    given = ["evaluate", str(place / "model"), "--module", str(place / "module"), "--output", str(place / output)]
    return [*given, "--tasks", str(place / task), "--batch-size", "4", *more]


def test_evaluate_scores_tasks_by_every_policy(place, capsys, monkeypatch):
    more = ("--policies", "lossless", "static_k:1", "static_k:4", "confadapt:0.5")

    def stopped(lm, tasks, limit, seed):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(lm)
        return run_tasks(lm, tasks, limit, seed)

    seen: list = []
    monkeypatch.setattr("foretell.evaluation.harness.run_tasks", stopped)
    assert main(words(place, *more)) == 130  # after two of five ways
    seen.append(None)
    assert main(words(place, *more)) == 0 and len(seen) == 3 + 3  # what was done is not done again
    found = json.loads((place / "tasks.json").read_text())
    ways = {way["name"]: way for way in found["ways"]}
    assert list(ways) == ["transformers", "lossless", "static_k:1", "static_k:4", "confadapt:0.5"]
    assert ways["transformers"]["tokens_per_forward"] is None and ways["static_k:1"]["tokens_per_forward"]["value"] == 1
    assert ways["lossless"]["answers"]["equal"] == ways["lossless"]["answers"]["documents"] == 12
    assert ways["static_k:1"]["answers"]["equal"] == 12  # a span of one is the target's own token
    assert ways["static_k:4"]["tokens_per_forward"]["value"] > ways["confadapt:0.5"]["tokens_per_forward"]["low"]
    assert ways["static_k:4"]["answers"]["equal"] < 12 and not ways["static_k:4"]["lossless"]
    score = ways["static_k:4"]["scores"]["written"]["exact_match,first"]
    assert score["low"] <= score["value"] <= score["high"] and "difference" in score
    out = capsys.readouterr().out
    assert "static_k:4 (lossy)" in out and "12/12" in out and not list(place.glob("*.rounds.jsonl"))


def test_a_lossless_way_that_answers_otherwise_fails(place, capsys, monkeypatch):
    def other(lm, tasks, limit, seed):
        made = run_tasks(lm, tasks, limit, seed)
        if isinstance(lm, ForetellLM):
            made["texts"][5][2] = [["another"]]
        return made

    monkeypatch.setattr("foretell.evaluation.harness.run_tasks", other)
    assert main(words(place, output="wrong.json")) == 1
    assert "NOT LOSSLESS: lossless, written, document 5" in capsys.readouterr().out


def test_samples_are_not_held_against_anybody(place, capsys):
    """Two runs that draw say other things; only what the weights fix can show that a way is not lossless."""
    text = WRITTEN.format(name="sampled", rows=place / "rows.jsonl", until='["?"]')
    (place / "sampled.yaml").write_text(text.replace("do_sample: false", "do_sample: true, temperature: 1.0"))
    more = ("--tasks", str(place / "sampled.yaml"), str(place / "chosen.yaml"))
    assert main(words(place, *more, output="sampled.json")) == 0
    ways = json.loads((place / "sampled.json").read_text())["ways"]
    assert [way["answers"]["documents"] for way in ways] == [12, 12] and "NOT LOSSLESS" not in capsys.readouterr().out
    (place / "broken.yaml").write_text("task: [unclosed")
    assert main(words(place, "--tasks", str(place / "broken.yaml"))) == 2
    assert "broken.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (("--tasks", "none/*.yaml"), "tasks: got none/*.yaml (no such file)"),
        (("--policies", "static_k:9"), "static_k"),
        (("--policies", "lossless", "lossless"), "each once"),
        (("--prompts", "demo"), "prompts, tasks: got both"),
        (("--repeats", "2"), "repeats: got 2 beside tasks"),
    ],
)
def test_bad_tasks_are_refused(more, wanted, place, capsys):
    assert main(words(place, *more)) == 2
    assert wanted in capsys.readouterr().err


def test_a_name_that_the_harness_does_not_know_is_refused(place, monkeypatch):
    known = lm_eval.tasks.TaskManager(include_path=str(place), include_defaults=False)  # all of its own take seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: known)
    assert load_harness_tasks(["chosen"])[1] == ["chosen"]
    with pytest.raises(ValueError, match=r"tasks: got 'writen', did you mean written[?]; wanted names"):
        load_harness_tasks(["writen", "chosen"])


def test_lm_eval_finds_the_model(place, tmp_path, wanted):
    """As people call it; offline, in a process that nobody prepared."""
    made = f"pretrained={place / 'model'},module={place / 'module'},num_draft_tokens=auto,dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "--model", "foretell", "--model_args", made]
    command += ["--tasks", str(place / "written.yaml"), "--output_path", str(tmp_path), "--device", "cpu"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(tmp_path.rglob("results_*.json")).read_text())
    assert found["results"]["written"]["exact_match,first"] == wanted["scores"]["written"]["exact_match,first"]["value"]
    assert found["config"]["foretell"]["texts"] == 12 and found["config"]["foretell"]["tokens_per_forward"] > 1


@pytest.mark.skipif("FORETELL_DATA" not in os.environ, reason="FORETELL_DATA: a folder with gsm8k_test.jsonl")
def test_gsm8k(place, tmp_path):
    rows = (Path(os.environ["FORETELL_DATA"]) / "gsm8k_test.jsonl").read_text().splitlines()[:6]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(rows))
    text = WRITTEN.format(name="gsm8k_local", rows=tmp_path / "gsm8k.jsonl", until=json.dumps(["Question:"]))
    (tmp_path / "gsm8k.yaml").write_text(text)
    tasks, (theirs, ours) = load_harness_tasks([str(tmp_path / "gsm8k.yaml")]), models(place)
    assert run_tasks(ours, tasks, None, 0) == run_tasks(theirs, tasks, None, 0)
    assert len(ours.records) == 6
