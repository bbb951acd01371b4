"""Provenance without heavy imports; files whole or not at all; progress on a terminal and in a log."""

from __future__ import annotations

import importlib.metadata
import io
import json
import math
import os
import pty
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from foretell import runtime
from foretell.runtime import Progress, atomic_folder, clock, provenance, write_json_atomic


def test_provenance_says_what_ran_where():
    said = provenance(["foretell", "demo"])
    assert json.loads(json.dumps(said)) == said
    assert said["command"] == ["foretell", "demo"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", said["time_utc"])
    assert said["versions"]["torch"] == importlib.metadata.version("torch")
    assert said["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert said["hardware"]["cores"] >= 1
    assert said["hardware"]["cpu"]
    assert said["hardware"]["memory_bytes"] > 1e8


def test_provenance_imports_nothing_heavy():
    code = "import sys; from foretell.runtime import provenance; provenance(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_the_commit_is_this_repositorys_own(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    file = tmp_path / "foretell" / "runtime.py"
    file.parent.mkdir()
    file.write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(runtime, "__file__", str(file))
    assert runtime._commit() == {"commit": git("rev-parse", "HEAD").strip(), "uncommitted_changes": False}
    file.write_text("changed")
    assert runtime._commit()["uncommitted_changes"] is True
    # a package installed inside somebody else's repository: that commit is not ours
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "site-packages" / "foretell" / "runtime.py"))
    assert runtime._commit() == {}


def test_json_is_written_whole(tmp_path):
    @dataclass
    class Result:
        tau: float
        where: Path

    torch = pytest.importorskip("torch")
    path = tmp_path / "new" / "result.json"
    result = {"a": Result(2.0, Path("x")), "b": torch.tensor([1, 2]), "c": (math.nan, math.inf), 3: torch.tensor(1.5)}
    write_json_atomic(path, result)
    assert json.loads(path.read_text()) == {"a": {"tau": 2.0, "where": "x"}, "b": [1, 2], "c": [None, None], "3": 1.5}
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    assert json.loads(path.read_text())["b"] == [1, 2]
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_a_new_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "deep" / "new") as folder:
        (folder / "a.txt").write_text("a")
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text("b")
        assert not (tmp_path / "deep" / "new").exists()
    assert (tmp_path / "deep" / "new" / "sub" / "b.txt").read_text() == "b"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["new"]


def save(folder: Path, text: str, error: Exception | None = None) -> None:
    with atomic_folder(folder) as temporary:
        (temporary / "config.json").write_text(text)
        if error is not None:
            raise error
        (temporary / "weights").mkdir()
        (temporary / "weights" / "w.bin").write_text(text)


def test_an_error_leaves_the_old_folder_whole(tmp_path):
    folder = tmp_path / "module"
    save(folder, "old")
    with pytest.raises(OSError, match="No space left"):
        save(folder, "new", OSError(28, "No space left on device"))
    with pytest.raises(KeyboardInterrupt):
        save(folder, "new", KeyboardInterrupt())
    assert {p.read_text() for p in folder.rglob("*.*")} == {"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["module"]


def test_a_second_save_replaces_its_own_files_and_no_others(tmp_path):
    folder = tmp_path / "module"
    save(folder, "old")
    (folder / "weights" / "mine.txt").write_text("mine")
    save(folder, "new")
    texts = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.*")}
    assert texts == {"config.json": "new", "weights/w.bin": "new", "weights/mine.txt": "mine"}
    assert [p.name for p in tmp_path.iterdir()] == ["module"]


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "module").write_text("text")
    with pytest.raises(NotADirectoryError, match="wanted a folder"):
        save(tmp_path / "module", "new")
    assert (tmp_path / "module").read_text() == "text"


def test_a_write_that_the_system_refuses_leaves_the_old_folder_whole(tmp_path):
    """The system's own refusal in the middle of a file, by a limit on file size: a full disk without filling one."""
    pytest.importorskip("resource")
    save(tmp_path / "module", "old")
    code = """
import resource, sys
from foretell.runtime import atomic_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with atomic_folder(sys.argv[1]) as folder:
    (folder / "config.json").write_text("new")
    (folder / "weights.bin").write_bytes(bytes(5000))
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "module")], capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "OSError" in run.stderr
    assert {p.read_text() for p in (tmp_path / "module").rglob("*.*")} == {"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["module"]


@pytest.fixture
def now(monkeypatch):
    class Clock:
        time = 100.0

    monkeypatch.setattr(runtime.time, "monotonic", lambda: Clock.time)
    return Clock


def test_progress_in_a_log_is_a_few_plain_lines(now):
    stream = io.StringIO()
    with Progress("train", total=1000, unit="tok", stream=stream, every_s=5) as bar:
        for step in range(100):
            now.time += 0.125
            bar.update(10, loss=2.5 - step / 100, tau=1.25)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # in 12.5 seconds: two on the way, one at the end
    assert lines[0] == "train      400/1,000 tok (40%)  80.0 tok/s  ETA 0:08  loss 2.11  tau 1.25"
    assert lines[-1].startswith("train      done in 0:12, 1,000/1,000 tok (100%), 80.0 tok/s")
    assert "loss 1.51" in lines[-1]
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_the_rate_forgets_a_slow_start(now):
    with Progress("train", total=10_000, stream=io.StringIO()) as bar:
        now.time += 100  # compiling
        bar.update(1)
        for _ in range(60):
            now.time += 1
            bar.update(100)
        assert bar.rate == pytest.approx(100)
        assert bar.seconds == pytest.approx(160)


def test_progress_without_a_total_and_with_an_error(now):
    stream = io.StringIO()

    def read():
        with Progress("read", unit="row", stream=stream) as bar:
            now.time += 6
            bar.update(12)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        read()
    assert stream.getvalue().splitlines() == [
        "read       12 row  2.00 row/s",
        "read       stopped in 0:06, 12 row, 2.00 row/s",
    ]


def test_other_ranks_are_silent(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    stream = io.StringIO()
    with Progress("train", total=1, stream=stream, every_s=0) as bar:
        bar.update()
    assert stream.getvalue() == ""


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream:
        with Progress("train", total=10, unit="tok", stream=stream) as bar:
            bar.update(10, loss=0.5)
        stream.flush()
        text = ""
        while "loss 0.5" not in text.rpartition("done")[2]:  # a read returns what is there so far
            text += os.read(leader, 65536).decode()
    os.close(leader)
    assert "\x1b[" in text  # drawn in place
    assert "━" in text
    assert "done in 0:00, 10/10 tok (100%)" in text
    assert "loss 0.5" in text


def test_clock():
    assert [clock(s) for s in (0, 9.6, 75, 4000)] == ["0:00", "0:10", "1:15", "1:06:40"]
