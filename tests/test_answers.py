"""`foretell regenerate`: every prompt gets one answer, the model's own, whatever happens to the run or the server."""

from __future__ import annotations

import email.utils
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import answer_server
import datasets
import pyarrow.parquet
import pytest
import torch
from answer_server import LONG, Server
from drafters import leaning_model
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from foretell.cli import main
from foretell.data.cache import HiddenStore
from foretell.data.formats import load_rows
from foretell.methods.sequential import SequentialConfig
from foretell.mtp import get_mtp_model
from foretell.training import endpoint

TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'w3 ', 'assistant': 'w4 ', 'system': 'w6 '}[m.role] }}{{ m.content }} "
    "{% if m.role == 'assistant' %}w1 {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w4 {{ 'w7 ' if thinking else '' }}{% endif %}"
)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("answers") / "tiny-model"
    model, tokenizer = leaning_model(), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompts = torch.tensor([[3, 20 + n, 60 + n % 7, 4] for n in range(12)])
    often = model.generate(prompts, max_new_tokens=4, do_sample=False)[:, 6].mode().values
    with torch.no_grad():  # what it often says third ends its answers
        head = model.get_output_embeddings().weight
        head[[1, int(often)]] = head[[int(often), 1]]
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def prompts_file(path: Path, count: int = 40, turns: int = 1, **more) -> Path:
    """Prompts as `foretell prompts` writes them."""
    rows = []
    for n in range(count):
        messages = [{"role": "user", "content": f"w{20 + n} w{60 + n % 7}"}]
        for turn in range(1, turns):
            messages += [{"role": "assistant", "content": "w9"}, {"role": "user", "content": f"w{70 + turn} w{20 + n}"}]
        rows.append({"messages": messages, "id": f"p-{n}", "domain": "chat", "source": "test", **more})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(model: Path, prompts: Path, out: Path, *flags: object) -> int:
    words = [str(flag) for flag in flags]
    return main(["regenerate", str(model), "--prompts", str(prompts), "--output", str(out), *words])


def ask(server: Server, *flags: object) -> list:
    few = ["--max-new-tokens", LONG, "--concurrency", 4]
    return ["--engine", "openai", "--base-url", server.url, *few, *flags]


def read(folder: Path) -> list[dict]:
    """As any tool reads it, in the order of the files."""
    return datasets.load_dataset(str(folder), split="train").to_list()


def check(rows: list[dict], count: int = 40) -> None:
    """Each prompt once, with the server's answer; only what it said is trained."""
    assert [row["id"] for row in rows] == [f"p-{n}" for n in range(count)]
    for n, row in enumerate(rows):
        prompt = [3, 20 + n, 60 + n % 7, 4]
        ids, reason = answer_server.said_to(prompt)
        assert row["input_ids"] == prompt + ids and row["finish_reason"] == reason
        assert row["labels"] == [-100] * 4 + ids
        assert row["messages"][-1] == {"role": "assistant", "content": " ".join(f"w{t}" for t in ids if t != 1)}
        assert row["messages"][:-1] == [{"role": "user", "content": f"w{20 + n} w{60 + n % 7}"}]


def test_an_endpoint_that_drops_refuses_and_dawdles_gives_every_answer_once(model_folder, tmp_path, capsys):
    prompts = prompts_file(tmp_path / "prompts.jsonl")
    faults = {0: 429, 2: "drop", 4: 500, 5: 503, 9: "slow", 11: "half", 13: "nothing", 20: "drop", 25: 429}
    with Server(faults) as server:
        assert run(model_folder, prompts, tmp_path / "out", *ask(server)) == 0
        assert len(server.asked) == 40 and 2 <= server.most <= 4
        assert {"temperature": 0.0, "max_tokens": LONG}.items() <= server.asked[0].items()
    check(read(tmp_path / "out"))
    assert "8 requests were tried again; 0 answers drifted" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    cut = sum(answer_server.said_to([3, 20 + n, 60 + n % 7, 4])[1] == "length" for n in range(40))
    assert manifest["counts"]["answers"] == 40 and manifest["counts"]["truncated"] == cut > 3
    assert manifest["fingerprint"]["max_new_tokens"] == LONG and not list((tmp_path / "out").glob(".open/*"))


def test_a_killed_run_neither_repeats_nor_loses_an_answer(model_folder, tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl")
    with Server(delay=0.04) as server:
        words = ["--prompts", prompts, "--output", tmp_path / "out", *ask(server, "--concurrency", 2)]
        command = [sys.executable, "-m", "foretell", "regenerate", str(model_folder), *map(str, words)]
        path = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=os.environ | path, stdout=subprocess.DEVNULL)
        while len(server.asked) < 20:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = 40 - len(list(_missing(tmp_path / "out")))
        asked = len(server.asked)
        assert 15 <= kept <= asked <= kept + 4  # at most those in flight
        with pytest.raises(ValueError, match="max_new_tokens: the folder has 6, this run 5"):
            _main_raises(model_folder, prompts, tmp_path / "out", *ask(server), "--max-new-tokens", 5)
    with Server() as other:  # of its own: the first may still be reading what the killed run sent
        assert run(model_folder, prompts, tmp_path / "out", *ask(other)) == 0
        assert len(other.asked) == 40 - kept
    check(read(tmp_path / "out"))


def _missing(out: Path):
    """Ids that neither a shard nor a journal has."""
    there = {row["id"] for path in out.glob("train-*.parquet") for row in pyarrow.parquet.read_table(path).to_pylist()}
    for meta in out.glob(".open/*/meta.json"):
        there |= {row["id"] for row in HiddenStore.load(meta.parent).rows()}
    return {f"p-{n}" for n in range(40)} - there


def _main_raises(model, prompts, out, *flags):
    from foretell.cli.regenerate import main as verb

    verb([str(model), "--prompts", str(prompts), "--output", str(out), *map(str, flags)])


def test_failures_are_listed_and_tried_again(model_folder, tmp_path, capsys):
    prompts = prompts_file(tmp_path / "prompts.jsonl")
    flags = ["--concurrency", 1, "--retries", 1]
    with Server({3: 400, 6: 500, 7: 500}) as server:
        assert run(model_folder, prompts, tmp_path / "out", *ask(server, *flags)) == 1
        lines = [json.loads(line) for line in (tmp_path / "out" / "failures-0.jsonl").read_text().splitlines()]
        assert [line["id"] for line in lines] == ["p-3", "p-6"] and "fault 400" in lines[0]["reason"]
        assert "no answer after 2 tries" in lines[1]["reason"] and "2 prompts got no answer" in capsys.readouterr().out
        assert len(read(tmp_path / "out")) == 38
        assert run(model_folder, prompts, tmp_path / "out", *ask(server, *flags)) == 0
        assert len(server.asked) == 40 and not list((tmp_path / "out").glob("failures*"))
    check(read(tmp_path / "out"))
    with Server(dict.fromkeys(range(1000), 500)) as server:
        with pytest.raises(ValueError, match="4 prompts in a row got no answer after 1 tries each; .*HTTP 500"):
            _main_raises(model_folder, prompts, tmp_path / "gone", *ask(server, "--retries", 0))
    with Server({0: 401}) as server:
        with pytest.raises(ValueError, match="HTTP 401.*the same command goes on"):
            _main_raises(model_folder, prompts, tmp_path / "key", *ask(server, *flags))


def test_what_is_wrong_is_said_before_anything_is_asked(model_folder, tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 4)

    def refused(message, *flags, prompts=prompts, server=None):
        with pytest.raises((ValueError, OSError), match=message):
            _main_raises(model_folder, prompts, tmp_path / "out", *flags)
        assert not (tmp_path / "out").exists() and not (server and server.asked)

    with Server(served="other-model") as server:
        flags = ask(server)
        refused(
            "serves other-model, wanted .*tiny-model. If that is the same model.*--model-name", *flags, server=server
        )
        refused("serves other-model, wanted the model mine", *flags, "--model-name", "mine", server=server)
        refused("temperature", *flags, "--samples", 2)
        refused(r"top_p: got 0.9 for greedy answers", *flags, "--top-p", 0.9)
        twice = prompts_file(tmp_path / "twice.jsonl", 4)
        twice.write_text(twice.read_text() + twice.read_text().splitlines()[1])
        refused(r"twice.jsonl, line 5: the id 'p-1' is that of twice.jsonl, line 2", *flags, prompts=twice)
        (tmp_path / "empty.jsonl").write_text("")
        refused("empty.jsonl: the file is empty", *flags, prompts=tmp_path / "empty.jsonl")
        (tmp_path / "bad.jsonl").write_text('{"messages": 3}')
        refused("bad.jsonl, line 1: messages: got int 3", *flags, prompts=tmp_path / "bad.jsonl")
    refused("for /models, wanted an OpenAI-compatible endpoint", *flags)  # the server is gone
    refused("shard: got '3/2', wanted i/n", "--shard", "3/2")
    refused("base_url: got none", "--engine", "openai")
    refused("keep_states: got always with engine openai", *flags, "--keep-states", "always")
    refused(
        "wanted the Python of an environment with vLLM: no such",
        "--engine",
        "vllm",
        "--python",
        tmp_path / "bin" / "python",
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.jsonl").write_text("{}")
    with Server() as server, pytest.raises(ValueError, match="got a folder with mine.jsonl and no manifest.json"):
        _main_raises(model_folder, prompts, tmp_path / "out", *ask(server))


def test_prompts_that_changed_are_another_run(model_folder, tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 4)
    with Server() as server:
        assert run(model_folder, prompts, tmp_path / "out", *ask(server)) == 0
        prompts.rename(tmp_path / "renamed.jsonl")  # content counts, not names
        assert run(model_folder, tmp_path / "renamed.jsonl", tmp_path / "out", *ask(server)) == 0
        prompts.write_text((tmp_path / "renamed.jsonl").read_text().replace("w20", "w21"))
        with pytest.raises(ValueError, match="holds answers made otherwise, cannot resume.\n  prompts: the folder has"):
            _main_raises(model_folder, prompts, tmp_path / "out", *ask(server))
        assert len(server.asked) == 4


def test_shards_of_machines_and_ranks_become_one_folder_by_moving_files(model_folder, tmp_path, monkeypatch):
    prompts = prompts_file(tmp_path / "prompts.jsonl")
    with Server() as server:
        assert run(model_folder, prompts, tmp_path / "one", *ask(server, "--shard", "1/2")) == 0
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            assert run(model_folder, prompts, tmp_path / "two", *ask(server, "--shard", "2/2")) == 0
        monkeypatch.delenv("WORLD_SIZE")
        assert len(server.asked) == 40  # each by one of them
        assert 0 < len(read(tmp_path / "one")) < 40
        for path in (tmp_path / "two").glob("train-*"):
            path.rename(tmp_path / "one" / path.name)
        assert run(model_folder, prompts, tmp_path / "one", *ask(server)) == 0 and len(server.asked) == 40
    check(read(tmp_path / "one"))


def test_several_urls_share_the_work_and_one_may_die(model_folder, tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl")
    with Server(delay=0.01) as one, Server(dict.fromkeys(range(6, 1000), "drop"), delay=0.01) as other:
        flags = ask(one)
        flags.insert(flags.index(one.url) + 1, other.url)
        assert run(model_folder, prompts, tmp_path / "out", *flags) == 0
        assert len(other.asked) == 6 and len(one.asked) == 34, "what one server dropped the other answers"
    check(read(tmp_path / "out"))


def test_text_without_ids_is_tokenized_again_and_drift_is_counted(model_folder, tmp_path, capsys, monkeypatch):
    prompts = prompts_file(tmp_path / "prompts.jsonl")
    with Server(ids=False) as server:
        assert run(model_folder, prompts, tmp_path / "out", *ask(server)) == 0
        check(read(tmp_path / "out"))
        assert "0 answers drifted" in capsys.readouterr().out
        monkeypatch.setattr(answer_server, "said_to", lambda prompt, *_: ([5, 6, 99, 1], "stop"))
        assert run(model_folder, prompts, tmp_path / "same", *ask(server)) == 0
        monkeypatch.setattr(answer_server, "said_to", lambda prompt, *_: ([5, 1, 6, 1], "stop"))
        assert run(model_folder, prompts, tmp_path / "drift", *ask(server)) == 0
        assert "40 answers drifted" in capsys.readouterr().out and read(tmp_path / "drift")[0]["drifted"]


def test_cut_answers_can_be_left_out_and_are_not_made_again(model_folder, tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl")
    with Server() as server:
        for _ in range(2):
            assert run(model_folder, prompts, tmp_path / "out", *ask(server, "--drop-truncated")) == 0
        assert len(server.asked) == 40
    rows = read(tmp_path / "out")
    whole = [f"p-{n}" for n in range(40) if answer_server.said_to([3, 20 + n, 60 + n % 7, 4])[1] == "stop"]
    assert [row["id"] for row in rows] == whole and all(row["labels"][-1] == 1 for row in rows)


def test_turn_by_turn_with_a_system_prompt_and_template_settings(model_folder, tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 6, turns=2)
    more = ["--system-prompt", "w60", "--chat-template-kwargs", "{thinking: true}", "--max-new-tokens", 20]
    with Server() as server:
        for turns in ("all", "last"):
            run(model_folder, prompts, tmp_path / turns, *ask(server, *more, "--turns", turns))
    for n, row in enumerate(read(tmp_path / "all")):
        asked = [6, 60, 3, 20 + n, 60 + n % 7, 4, 7]
        first, reason = answer_server.said_to(asked)
        if reason == "length":  # nothing can follow a cut answer
            assert row["input_ids"] == asked + first and len(row["messages"]) == 3
            continue
        # the template leaves out w7, which opened the first answer: it is read, not trained
        again = [*asked[:-1], *first, 3, 71, 20 + n, 4, 7]
        second, _ = answer_server.said_to(again)
        assert row["input_ids"] == again + second and row["labels"] == [-100] * len(again) + second
        assert [m["role"] for m in row["messages"]] == ["system", *["user", "assistant"] * 2]
    for n, row in enumerate(read(tmp_path / "last")):
        assert row["input_ids"][:13] == [6, 60, 3, 20 + n, 60 + n % 7, 4, 9, 1, 3, 71, 20 + n, 4, 7]
    with Server() as server:
        run(model_folder, prompts, tmp_path / "plain", *ask(server))
    for n, row in enumerate(read(tmp_path / "plain")):
        asked = [3, 20 + n, 60 + n % 7, 4]
        first, reason = answer_server.said_to(asked)
        if reason == "stop":  # the template shows it as it was said: both answers are trained
            middle = [3, 71, 20 + n, 4]
            second, _ = answer_server.said_to([*asked, *first, *middle])
            assert row["labels"] == [-100] * 4 + first + [-100] * 4 + second


def test_samples_are_drawn_with_a_seed_each_and_the_same_again(model_folder, tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 10)
    drawn = ["--samples", 3, "--temperature", 0.7, "--top-k", 5]
    with Server() as server:
        for name in ("one", "two"):
            assert run(model_folder, prompts, tmp_path / name, *ask(server, *drawn)) == 0
        assert run(model_folder, prompts, tmp_path / "seed", *ask(server, *drawn, "--seed", 1)) == 0
        assert {"temperature": 0.7, "top_k": 5}.items() <= server.asked[0].items()
    rows = [read(tmp_path / name) for name in ("one", "two", "seed")]
    assert [row["id"] for row in rows[0][:4]] == ["p-0#1", "p-0#2", "p-0#3", "p-1#1"]
    assert rows[0] == rows[1] != rows[2] and len({str(row["input_ids"]) for row in rows[0]}) > 15


def test_a_full_disk_leaves_no_torn_shard(model_folder, tmp_path, monkeypatch):
    prompts = prompts_file(tmp_path / "prompts.jsonl")
    wrote = pyarrow.parquet.write_table

    def full(table, path, **more):
        wrote(table, path, **more)
        with open(path, "r+b") as file:
            file.truncate(100)
        raise OSError(28, "No space left on device", str(path))

    with Server() as server:
        monkeypatch.setattr(pyarrow.parquet, "write_table", full)
        with pytest.raises(OSError, match="No space left"):
            _main_raises(model_folder, prompts, tmp_path / "out", *ask(server))
        assert not list((tmp_path / "out").glob("*train*"))
        monkeypatch.undo()
        asked = len(server.asked)
        assert run(model_folder, prompts, tmp_path / "out", *ask(server)) == 0
        assert len(server.asked) == 40 and asked > 0
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    check(read(tmp_path / "out"))


def test_vllm_is_started_from_its_own_environment_and_ended(model_folder, tmp_path):
    """The program in vllm's place is the tests' server."""
    prompts, python = prompts_file(tmp_path / "prompts.jsonl", 8), tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{answer_server.__file__}" "$@"\n')
    python.chmod(0o755)
    flags = ["--engine", "vllm", "--python", python, "--max-new-tokens", LONG]
    assert run(model_folder, prompts, tmp_path / "out", *flags, "--vllm-args=--own yes") == 0
    check(read(tmp_path / "out"), 8)
    with pytest.raises(ValueError, match="vLLM did not start .*ends in:(.|\n)*AssertionError"):
        _main_raises(model_folder, prompts, tmp_path / "not", *flags)


# -- our own decoder ---------------------------------------------------------------------------------------------------


def own(model_folder: Path, prompt: list[int], longest: int = LONG) -> list[int]:
    """What the model's own generate says behind this prompt alone."""
    model, ids = AutoModelForCausalLM.from_pretrained(model_folder), torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, do_sample=False)
    return out[0, len(prompt) :].tolist()


def test_our_own_decoder_gives_the_answers_of_the_models_generate(model_folder, tmp_path, capsys):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 12, turns=2), tmp_path / "out"
    assert run(model_folder, prompts, out, "--max-new-tokens", LONG, "--keep-states", "always") == 0
    assert "states of these answers: 0.00 GB at most" in capsys.readouterr().out
    rows, stored = read(out), load_rows(out)
    assert [row["id"] for row in rows] == [f"p-{n}" for n in range(12)] and len(stored) == 12
    model, reasons = AutoModelForCausalLM.from_pretrained(model_folder), set()
    for n, (row, kept) in enumerate(zip(rows, stored, strict=True)):
        prompt = [3, 20 + n, 60 + n % 7, 4]
        first = own(model_folder, prompt)
        wanted, labels = prompt + first, [-100] * 4 + first
        if first[-1] == 1:
            asked = [*wanted, 3, 71, 20 + n, 4]
            second = own(model_folder, asked)
            wanted, labels = asked + second, [*labels, *[-100] * 4, *second]
        assert row["input_ids"] == wanted == kept["input_ids"] and row["labels"] == labels == kept["labels"]
        assert row["finish_reason"] == ("stop" if wanted[-1] == 1 else "length")
        reasons.add(row["finish_reason"])
        with torch.no_grad():
            states_TD = model.model(torch.tensor([wanted])).last_hidden_state[0]
        assert torch.allclose(kept["hidden_states"][:-1], states_TD[:-1], atol=1e-4)
    assert reasons == {"stop", "length"} and max(len(row["messages"]) for row in rows) == 4
    assert run(model_folder, prompts, out, "--max-new-tokens", LONG) == 0  # auto: as it was begun
    assert read(out) == rows
    shutil.rmtree(out / "states")
    assert "hidden_states" not in load_rows(out)[0] and load_rows(out)[0]["labels"] == rows[0]["labels"]


def test_drawn_answers_of_a_stopped_run_are_those_of_an_undisturbed_one(model_folder, tmp_path, monkeypatch):
    prompts = prompts_file(tmp_path / "prompts.jsonl", 12)
    drawn = [
        "--temperature",
        0.9,
        "--samples",
        2,
        "--concurrency",
        6,
        "--max-new-tokens",
        LONG,
        "--keep-states",
        "never",
    ]
    assert run(model_folder, prompts, tmp_path / "whole", *drawn) == 0
    append, count = HiddenStore.append, iter(range(100))

    def stops(self, *given, **more):
        if next(count) == 15:
            raise KeyboardInterrupt
        append(self, *given, **more)

    monkeypatch.setattr(HiddenStore, "append", stops)
    assert run(model_folder, prompts, tmp_path / "parts", *drawn) == 130
    monkeypatch.setattr(HiddenStore, "append", append)
    assert len(read(tmp_path / "parts")) == 15
    assert run(model_folder, prompts, tmp_path / "parts", *drawn) == 0
    rows = read(tmp_path / "parts")
    assert rows == read(tmp_path / "whole") and len({str(row["input_ids"]) for row in rows}) > 12


def test_a_module_or_earlier_answers_may_draft_and_change_nothing(model_folder, tmp_path):
    prompts, few = prompts_file(tmp_path / "prompts.jsonl", 6), ["--max-new-tokens", 12, "--keep-states", "never"]
    assert run(model_folder, prompts, tmp_path / "plain", *few) == 0
    get_mtp_model(leaning_model(), SequentialConfig(depth=2)).save_pretrained(tmp_path / "module")
    assert run(model_folder, prompts, tmp_path / "drafts", *few, "--module", tmp_path / "module") == 0
    assert run(model_folder, prompts, tmp_path / "looks", *few, "--drafter", "lookup") == 0
    assert read(tmp_path / "drafts") == read(tmp_path / "looks") == read(tmp_path / "plain")


@pytest.mark.parametrize("states", ["always", "never"])
def test_the_folder_trains_in_both_trainers(states, model_folder, tmp_path, capsys):
    prompts, out = prompts_file(tmp_path / "prompts.jsonl", 12), tmp_path / "out"
    assert run(model_folder, prompts, out, "--max-new-tokens", LONG, "--keep-states", states) == 0
    few = ["--max-steps", "1", "--use-cpu", "true", "--report-to", "none", "--save-strategy", "no"]
    words = ["--data", str(out), "--depth", "1", "--eval-new-tokens", "4", "--output-dir", str(tmp_path / "module")]
    assert main(["train", str(model_folder), *words, *few]) == 0
    assert "module saved" in capsys.readouterr().out
    if states == "never":
        words = ["--model_name_or_path", str(model_folder), "--dataset_name", str(out), "--mtp_enabled", "true"]
        words += ["--output_dir", str(tmp_path / "sft"), *(w.replace("-", "_").replace("__", "--", 1) for w in few)]
        assert main(["sft", *words]) == 0


def test_a_server_is_given_the_time_it_asks_for(model_folder, tmp_path, monkeypatch):
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert endpoint._retry_after("2.5") == 2.5 and endpoint._retry_after(None) is None
    assert 25 < endpoint._retry_after(soon) <= 30 and endpoint._retry_after("soon") is None
    assert endpoint._retry_after("-3") == 0.0
    waited = []
    monkeypatch.setattr(endpoint.Endpoint, "_sleep", lambda self, seconds: waited.append(seconds))
    monkeypatch.setattr(endpoint, "_retry_after", lambda value: 7.0 if value is not None else None)
    prompts = prompts_file(tmp_path / "prompts.jsonl", 4)
    with Server(faults={0: 429}) as server:
        flags = ["--engine", "openai", "--base-url", server.url, "--concurrency", 1]
        assert run(model_folder, prompts, tmp_path / "out", *flags) == 0
    assert any(6 < seconds <= 7 for seconds in waited)
