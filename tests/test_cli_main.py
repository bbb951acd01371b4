"""foretell VERB: each verb is found, and what a user can mend is one clear line."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

import foretell
from foretell import cli


@pytest.fixture
def verb(monkeypatch):
    """A verb `try` that runs what a test sets as do."""
    module = types.ModuleType("a_verb")
    module.main = lambda argv: module.do(argv)
    monkeypatch.setitem(sys.modules, "a_verb", module)
    monkeypatch.setitem(cli.VERBS, "try", ("a_verb:main", "for the test"))
    monkeypatch.delenv("FORETELL_DEBUG", raising=False)
    return module


def fail(error: BaseException):
    def do(argv):
        raise error

    return do


def test_help_lists_each_verb_on_one_line(capsys):
    assert cli.main([]) == cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for verb, (_, about) in cli.VERBS.items():
        assert f"  {verb:<10} {about}" in lines


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"foretell {foretell.__version__}\n"


def test_an_unknown_verb_gets_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown verb 'trian', did you mean train?")


def test_a_verb_gets_the_words_after_it(verb):
    seen = []
    verb.do = seen.append
    assert cli.main(["try", "--a", "b"]) == 0
    assert seen == [["--a", "b"]]
    verb.do = lambda argv: 3
    assert cli.main(["try"]) == 3


@pytest.mark.parametrize("error", [ValueError("got 1, wanted 2"), FileNotFoundError("got 1, wanted 2")])
def test_a_users_error_is_one_line_and_exit_code_2(verb, error, capsys, monkeypatch):
    verb.do = fail(error)
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == "error: got 1, wanted 2\n"
    monkeypatch.setenv("FORETELL_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["try"])


def test_our_own_error_keeps_its_traceback(verb):
    verb.do = fail(RuntimeError("a bug"))
    with pytest.raises(RuntimeError):
        cli.main(["try"])


def test_an_interrupt_is_no_traceback(verb, capsys):
    verb.do = fail(KeyboardInterrupt())
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("module", ["foretell", "foretell.cli"])
def test_it_runs_as_a_module(module):
    run = subprocess.run([sys.executable, "-m", module, "trian"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("error: unknown verb")
    assert "Traceback" not in run.stderr


def test_a_reader_that_leaves_is_no_error():
    code = """
import sys, types
from foretell import cli
module = types.ModuleType("a_verb")
def say(argv):
    for _ in range(100_000):
        print("a line")
module.main = say
sys.modules["a_verb"] = module
cli.VERBS["try"] = ("a_verb:main", "")
sys.exit(cli.main(["try"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        run.stdout.readline()
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode == 0
