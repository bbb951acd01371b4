"""Encoded rows are kept under what they say, read by whoever says the same, and never half."""

from __future__ import annotations

import json
import shutil
import threading
import time

import datasets
import pytest
from tiny import tiny_tokenizer

from foretell.cli import main
from foretell.data import encoded_cache, prompts
from foretell.data.encoded_cache import entries
from foretell.data.prompts import encode_rows

ROWS = [{"prompt": f"w{20 + n} w30", "completion": " w40 w41 " + "w50 " * n} for n in range(20)]


@pytest.fixture
def made(monkeypatch):
    """How many times rows were encoded."""
    calls, table = [], prompts._table
    monkeypatch.setattr(prompts, "_table", lambda *given: (calls.append(1), table(*given))[1])
    return calls


def encoded(root, rows=ROWS, tokenizer=None, **settings):
    return encode_rows(rows, tokenizer or tiny_tokenizer(), cache=root, **settings)


def test_what_was_encoded_is_read_and_is_the_same(tmp_path, made):
    plain, plain_stats = encode_rows(ROWS, tiny_tokenizer(), max_length=9)
    for _ in range(2):
        rows, stats = encoded(tmp_path, max_length=9)
        assert list(rows) == list(plain) and stats == plain_stats and stats.truncated > 3
    assert len(made) == 2  # one of them without a cache


def test_the_key_is_content(tmp_path, made):
    def keys(**changes):
        encoded(tmp_path, **changes)
        return {entry["key"] for entry in entries(tmp_path)}

    one = keys()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "b").mkdir()
    datasets.Dataset.from_list([{**row, "other": None} for row in ROWS]).to_parquet(tmp_path / "b" / "c.parquet")
    used = tiny_tokenizer()
    used(["w5", "w6 w7"], padding=True, truncation=True, max_length=2)  # which leaves traces in a fast tokenizer
    for same in ({"rows": str(tmp_path / "a.jsonl")}, {"rows": str(tmp_path / "b" / "c.parquet")}, {"tokenizer": used}):
        assert keys(**same) == one and len(made) == 1
    other, ends = tiny_tokenizer(), tiny_tokenizer()
    other.chat_template, ends.eos_token = "{{ messages }}", "w9"
    changes = [{"rows": ROWS[:-1]}, {"rows": ROWS[::-1]}, {"tokenizer": other}, {"tokenizer": ends}]
    changes += [{"max_length": 7}, {"vocab_size": 97}, {"assistant_only_loss": False}]
    for number, change in enumerate(changes, start=2):
        assert len(keys(**change)) == number == len(made)


def test_of_many_at_once_one_encodes(tmp_path, made, monkeypatch):
    table = prompts._table
    monkeypatch.setattr(prompts, "_table", lambda *given: (time.sleep(0.3), table(*given))[1])
    found: list = []
    threads = [threading.Thread(target=lambda: found.append(list(encoded(tmp_path)[0]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(made) == 1 and all(rows == found[0] for rows in found)


def test_what_was_not_written_whole_is_made_again(tmp_path, made, monkeypatch, capsys):
    success = encoded_cache.DONE

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(encoded_cache, "write_json_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        encoded(tmp_path)
    monkeypatch.undo()
    assert not list(entries(tmp_path))
    wanted = list(encoded(tmp_path)[0])
    (entry,) = entries(tmp_path)
    (entry["folder"] / success).unlink()  # killed before the last step
    assert main(["cache", "ls", str(tmp_path)]) == 0 and "not whole" in capsys.readouterr().out
    assert main(["cache", "verify", str(tmp_path)]) == 1 and "the next run makes it again" in capsys.readouterr().out
    assert list(encoded(tmp_path)[0]) == wanted
    assert main(["cache", "verify", str(tmp_path)]) == 0


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="encoded rows are not kept for the next run: .*file"):
        assert list(encoded(tmp_path / "file")[0]) == list(encode_rows(ROWS, tiny_tokenizer())[0])


def test_bad_rows_are_said_each_time(tmp_path):
    bad = [*ROWS, {"messages": [{"role": "user", "content": "w5"}]}]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"rows\[20\]: got a conversation, but the tokenizer has no chat template"):
            encoded(tmp_path, bad)
        assert not list(entries(tmp_path))
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"1 rows are skipped:\nrows\[20\]"):
            assert encoded(tmp_path, bad, skip_bad=True)[1].skipped == 1


def test_the_cache_is_listed_checked_and_removed(tmp_path, capsys):
    long = [{"prompt": "w20", "completion": " w40" * 300} for _ in range(60)]
    encoded(tmp_path, long)
    (entry,) = entries(tmp_path)
    assert entry["rows"] == 60 and entry["tokens"] == 60 * 302
    # a thousand rows would hide what an entry costs by itself; the limit is on tokens
    data = sum(file.stat().st_size for file in entry["folder"].glob("*.arrow"))
    assert data / entry["tokens"] < 5
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("not the cache's")
    assert main(["cache", "ls", str(tmp_path)]) == 0
    assert f"{entry['key']}         60 rows        18,120 tokens" in capsys.readouterr().out
    assert main(["cache", "verify", str(tmp_path)]) == 0 and " ok" in capsys.readouterr().out
    (file,) = entry["folder"].glob("*.arrow")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["cache", "verify", str(tmp_path)]) == 1
    assert f"{file.name}: its content is not what was written" in capsys.readouterr().out
    file.unlink()
    assert main(["cache", "verify", str(entry["folder"])]) == 1 and "it is gone" in capsys.readouterr().out
    assert main(["cache", "rm", str(tmp_path)]) == 0 and not list(entries(tmp_path))
    assert (tmp_path / "mine" / "notes.txt").exists()
    assert main(["cache", "ls", str(tmp_path)]) == 0 and "nothing is kept" in capsys.readouterr().out
    assert main(["cache", "clear", str(tmp_path)]) == 2 and "wanted one of ls, verify, rm" in capsys.readouterr().err
    shutil.rmtree(tmp_path)
    assert main(["cache", "ls", str(tmp_path)]) == 0


def test_what_is_not_of_the_cache_is_not_removed(tmp_path, capsys):
    for name in ("about", ".mine.tmp", "data", "0123456789abcdef"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "about.json").write_text("{}")
    left = tmp_path / f".{'0' * 24}.5f3a.tmp"  # of a run that was killed
    left.mkdir()
    assert main(["cache", "rm", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "0123456789abcdef", "about", "data"]
    assert main(["cache", "rm", str(tmp_path / "about")]) == 0 and (tmp_path / "about").is_dir()
