"""Answers once written stay written: through kills, torn tails, full disks; and never under other settings."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from foretell.data import cache
from foretell.data.cache import HiddenStore
from foretell.data.collate import MTPCollator, pack
from foretell.data.prompts import encode_rows

WIDTH = 4
SETTINGS = {"model": "abc", "temperature": 0.0, "eos": (2, 3)}


def answer(number: int) -> tuple[str, list[int], list[int], torch.Tensor]:
    """The answer of that number; its states can be told from any other's."""
    T = 3 + number % 4
    ids = [number * 10 + at for at in range(T)]
    return f"row-{number}", ids, [-100, *ids[1:]], torch.full((T, WIDTH), float(number)) + torch.arange(T)[:, None]


def open_store(folder, **changes):
    return HiddenStore(folder, **{"fingerprint": SETTINGS, "width": WIDTH, **changes})


def fill(folder, numbers, **changes):
    with open_store(folder, **changes) as store:
        for number in numbers:
            store.append(*answer(number))


def check(store, numbers):
    """The store holds exactly these answers, states included."""
    assert len(store) == len(numbers) and store.keys() == [f"row-{number}" for number in numbers]
    for index, number in enumerate(numbers):
        key, ids, labels, hidden_TD = answer(number)
        row = store[index]
        assert (row["key"], row["input_ids"], row["labels"]) == (key, ids, labels)
        assert torch.equal(row["hidden_states"], hidden_TD.to(row["hidden_states"].dtype))
    assert list(store.rows()) == [
        dict(zip(("key", "input_ids", "labels"), answer(number)[:3], strict=True)) for number in numbers
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_appended_comes_back(tmp_path, dtype):
    with open_store(tmp_path, dtype=dtype) as store:
        for number in range(5):
            store.append(*answer(number))
            check(store, range(number + 1))  # also while the file grows under the map
        assert store[0]["hidden_states"].dtype == dtype
        assert "row-3" in store and "row-9" not in store and store[-1]["key"] == "row-4" and len(store[1:3]) == 2
        with pytest.raises(IndexError):
            store[5]
    check(HiddenStore.load(tmp_path), range(5))


def test_a_store_resumes_where_it_ended(tmp_path):
    fill(tmp_path, range(3))
    with open_store(tmp_path) as store:
        check(store, range(3))
        with pytest.raises(ValueError, match="'row-1' is already there"):
            store.append(*answer(1))
        store.append(*answer(3))
    check(HiddenStore.load(tmp_path), range(4))


def test_plain_answers_need_no_states(tmp_path):
    with open_store(tmp_path, width=None) as store:
        store.append(*answer(0)[:3])
        assert store[0] == {"key": "row-0", "input_ids": [0, 1, 2], "labels": [-100, 1, 2]}
        with pytest.raises(ValueError, match="got hidden states: some, wanted none"):
            store.append(*answer(1))
    assert not (tmp_path / "hidden.bin").exists()
    assert len(HiddenStore.load(tmp_path)) == 1


def test_a_kill_at_any_byte_loses_one_answer_at_most(tmp_path, recwarn):
    fill(tmp_path / "two", range(2))
    fill(tmp_path / "three", range(3))
    sizes = {
        name: ((tmp_path / "two" / name).stat().st_size, (tmp_path / "three" / name).stat().st_size)
        for name in ("rows.jsonl", "hidden.bin")
    }
    # states go first, then the line: these are the states of the disk that a kill can leave behind
    (hidden_two, hidden_three), (rows_two, rows_three) = sizes["hidden.bin"], sizes["rows.jsonl"]
    moments = [(hidden, rows_two) for hidden in range(hidden_two, hidden_three)]
    moments += [(hidden_three, rows) for rows in range(rows_two, rows_three)]
    # and after a power cut the states may be behind the line
    moments += [(hidden, rows_three) for hidden in range(hidden_two, hidden_three)]
    for at, (hidden, rows) in enumerate(moments):
        folder = tmp_path / f"killed-{at}"
        shutil.copytree(tmp_path / "three", folder)
        os.truncate(folder / "hidden.bin", hidden)
        os.truncate(folder / "rows.jsonl", rows)
        check(HiddenStore.load(folder), range(2))
        assert ((folder / "hidden.bin").stat().st_size, (folder / "rows.jsonl").stat().st_size) == (hidden, rows)
        fill(folder, [2])
        for name in sizes:
            assert (folder / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_a_torn_tail_is_cut_and_said(tmp_path):
    fill(tmp_path, range(3))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"key": "row-3", "inp')
    with (tmp_path / "hidden.bin").open("ab") as file:
        file.write(b"\x01" * 37)
    with pytest.warns(UserWarning, match="the last answer was not written whole; going on behind 3 whole ones"):
        store = open_store(tmp_path)
    assert (tmp_path / "hidden.bin").stat().st_size == sum(len(answer(number)[1]) for number in range(3)) * WIDTH * 4
    store.append(*answer(7))
    store.close()
    check(HiddenStore.load(tmp_path), [0, 1, 2, 7])


def test_damage_before_the_tail_is_an_error_with_its_line(tmp_path):
    fill(tmp_path, range(3))
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text(lines[0] + lines[1][:9] + "\n" + lines[2])
    with pytest.raises(ValueError, match="rows.jsonl, line 2: got a damaged row with others after it"):
        open_store(tmp_path)
    (tmp_path / "rows.jsonl").write_text(lines[0] + lines[0])
    with pytest.raises(ValueError, match="line 2: got the key 'row-0' twice"):
        HiddenStore.load(tmp_path)


def test_lost_states_never_cost_the_answers(tmp_path):
    fill(tmp_path, range(3))
    before = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "hidden.bin").unlink()
    with pytest.raises(ValueError, match="no row of rows.jsonl has its states in hidden.bin"):
        open_store(tmp_path)
    assert (tmp_path / "rows.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": {**SETTINGS, "temperature": 0.7}}, "temperature: the folder has 0.0, this run 0.7"),
        ({"fingerprint": {"model": "abc", "temperature": 0.0}}, r"eos: the folder has \[2, 3\], this run '\(absent\)'"),
        ({"width": 8}, "width: the folder has 4, this run 8"),
        ({"width": None}, "width: the folder has 4, this run None"),
        ({"dtype": torch.bfloat16}, "dtype: the folder has 'float32', this run 'bfloat16'"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, changes, message):
    fill(tmp_path, range(2))
    with pytest.raises(ValueError, match="cannot resume") as error:
        open_store(tmp_path, **changes)
    assert error.match(message)
    check(HiddenStore.load(tmp_path), range(2))  # and nothing was touched


def test_every_difference_is_named_at_once(tmp_path):
    fill(tmp_path, range(1))
    with pytest.raises(ValueError, match="cannot resume") as error:
        open_store(tmp_path, fingerprint={"model": "xyz", "temperature": 1.0, "eos": [2, 3]}, width=8)
    assert len([line for line in str(error.value).splitlines() if "the folder has" in line]) == 3


def test_folders_that_are_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="no meta.json"):
        HiddenStore.load(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="rows.jsonl without meta.json"):
        open_store(tmp_path)
    (tmp_path / "meta.json").write_text('{"form')
    with pytest.raises(ValueError, match="meta.json: got a damaged file"):
        open_store(tmp_path)
    (tmp_path / "meta.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="got format 99, wanted 1"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    ("ids", "labels", "hidden_TD", "message"),
    [
        ([1, 2], [1], torch.zeros(2, WIDTH), "got 2 input_ids and 1 labels"),
        ([], [], torch.zeros(0, WIDTH), "got 0 input_ids"),
        ([1, 2], [1, 2], None, r"got hidden states: none, wanted \[2, 4\]"),
        ([1, 2], [1, 2], torch.zeros(3, WIDTH), r"got hidden states \(3, 4\), wanted \(2, 4\)"),
        ([1, 2], [1, 2], torch.full((2, WIDTH), float("nan")), "not finite as float32"),
    ],
)
def test_bad_answers_are_refused_and_leave_the_store_whole(tmp_path, ids, labels, hidden_TD, message):
    with open_store(tmp_path) as store:
        store.append(*answer(0))
        with pytest.raises(ValueError, match=message):
            store.append("bad", ids, labels, hidden_TD)
        store.append(*answer(1))
    check(HiddenStore.load(tmp_path), range(2))


def test_states_too_large_for_float16_are_refused(tmp_path):
    with open_store(tmp_path, dtype=torch.float16) as store:
        with pytest.raises(ValueError, match="not finite as float16"):
            store.append("large", [1], [1], torch.full((1, WIDTH), 1e6))


@pytest.mark.parametrize("failing_write", [1, 2, 3])
def test_a_full_disk_leaves_the_store_whole(tmp_path, monkeypatch, failing_write):
    real_write, count = os.pwrite, 0

    def pwrite(file, data, offset):
        nonlocal count
        count += 1
        if count >= failing_write:
            raise OSError(28, "No space left on device")
        return real_write(file, bytes(data)[: 1 + len(data) // 2], offset)  # the disk takes a part, then no more

    store = open_store(tmp_path)
    store.append(*answer(0))
    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "pwrite", pwrite)
        with pytest.raises(OSError, match="No space left"):
            store.append(*answer(1))
    check(store, range(1))
    store.append(*answer(2))  # room was made
    store.close()
    check(HiddenStore.load(tmp_path), [0, 2])


def test_a_second_writer_waits_for_the_first(tmp_path):
    with open_store(tmp_path) as store:
        store.append(*answer(0))
        with pytest.raises(RuntimeError, match="another process is writing"):
            open_store(tmp_path)
        check(HiddenStore.load(tmp_path), range(1))  # readers need not
        store.append(*answer(1))
    check(open_store(tmp_path), range(2))


def test_readers_do_not_write_and_closed_stores_say_so(tmp_path):
    fill(tmp_path, range(1))
    with pytest.raises(ValueError, match="opened for reading"):
        HiddenStore.load(tmp_path).append(*answer(1))
    store = open_store(tmp_path)
    store.close()
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store[0]


def test_writing_into_a_row_never_reaches_the_file(tmp_path):
    fill(tmp_path, range(2))
    before = (tmp_path / "hidden.bin").read_bytes()
    HiddenStore.load(tmp_path)[0]["hidden_states"].fill_(99)
    assert (tmp_path / "hidden.bin").read_bytes() == before


def test_a_store_is_a_dataset_also_for_workers(tmp_path):
    fill(tmp_path, range(6))
    store = pickle.loads(pickle.dumps(HiddenStore.load(tmp_path)))
    check(store, range(6))
    packed = pack(store, 12)
    batch = MTPCollator(0)(packed[:])
    assert batch["hidden_states"].shape == (*batch["input_ids"].shape, WIDTH)
    loader = torch.utils.data.DataLoader(store, batch_size=3, collate_fn=MTPCollator(0), num_workers=1)
    assert sum(int(inputs["attention_mask"].sum()) for inputs in loader) == sum(len(answer(at)[1]) for at in range(6))


def test_meta_says_what_the_folder_holds(tmp_path):
    fill(tmp_path, range(1))
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["width"] == WIDTH and meta["dtype"] == "float32" and meta["fingerprint"]["temperature"] == 0.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hidden.bin", "meta.json", "rows.jsonl"]


KILLED = """
import sys
import torch
from foretell.data.cache import HiddenStore

store = HiddenStore(sys.argv[1], fingerprint={}, width=64)
for number in range(len(store), 10**9):
    store.append(str(number), [number] * 20, [number] * 20, torch.full((20, 64), float(number)))
"""


def test_a_killed_process_resumes(tmp_path):
    whole = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[1])
        rows, deadline = tmp_path / "rows.jsonl", time.monotonic() + 60
        size = rows.stat().st_size if rows.exists() else 0
        while not rows.exists() or rows.stat().st_size < size + 5000:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        store = HiddenStore.load(tmp_path)
        assert len(store) > whole
        whole = len(store)
    assert store.keys() == [str(number) for number in range(whole)]
    for number in range(whole):
        assert store[number]["input_ids"] == [number] * 20 and (store[number]["hidden_states"] == number).all()


def test_a_store_may_be_larger_than_memory(tmp_path):
    """A map that the system counts against memory as a whole cannot be made of a file of 2 TB."""
    wide = 1 << 20
    with HiddenStore(tmp_path, fingerprint={}, width=wide) as store:
        store.append("first", [1], [1], torch.ones(1, wide))
    tokens = (1 << 41) // (4 * wide) - 1
    os.truncate(tmp_path / "hidden.bin", (1 + tokens) * 4 * wide)  # a hole: it takes no room on the disk
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"key": "last", "input_ids": [2], "labels": [2], "offset": tokens, "length": 1}) + "\n")
    store = HiddenStore.load(tmp_path)
    assert store[0]["hidden_states"].eq(1).all() and store[1]["hidden_states"].eq(0).all()


@pytest.mark.filterwarnings("ignore:2 of 6 rows were cut")
def test_rows_of_a_store_reach_workers_by_its_path(tmp_path):
    fill(tmp_path, range(6))
    encoded, stats = encode_rows(HiddenStore.load(tmp_path), None, max_length=4)
    assert stats.kept == len(encoded) and all(len(row["hidden_states"]) <= 4 for row in encoded)
    table = len(pickle.dumps(encoded.table))  # counts alone
    assert len(pickle.dumps(encoded)) - table < 2000  # the path, not the states
    loader = torch.utils.data.DataLoader(
        encoded, batch_size=2, num_workers=1, collate_fn=MTPCollator(0), multiprocessing_context="spawn"
    )
    alone = [MTPCollator(0)(encoded[at : at + 2]) for at in range(0, len(encoded), 2)]
    for batch, wanted in zip(loader, alone, strict=True):
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_a_view_holds_the_chosen_answers_in_the_order_asked_for(tmp_path):
    fill(tmp_path, range(4))
    whole = HiddenStore.load(tmp_path)
    names = whole.keys()
    view = pickle.loads(pickle.dumps(HiddenStore.load(tmp_path, keys=[names[2], "none", names[0]])))
    assert view.keys() == [names[2], names[0]] and len(view) == 2
    assert torch.equal(view[0]["hidden_states"], whole[2]["hidden_states"]) and view[1]["key"] == names[0]
