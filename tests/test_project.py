"""The files around the package agree: the lock is exact and fits the floors, the verbs exist, data is shipped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import foretell

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
PINS = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in LOCK}


def test_every_line_of_the_lock_is_an_exact_public_version():
    for line in LOCK:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line), f"{line}: wanted name==version, no more"
    assert len(PINS) == len(LOCK)


def test_the_lock_fits_the_floors():
    extras = PROJECT["optional-dependencies"]
    for text in PROJECT["dependencies"] + extras["trl"] + extras["dev"]:
        requirement = Requirement(text)
        if requirement.name != "foretell":
            assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), text


def test_the_versions_that_are_tested_are_the_ends_of_the_range():
    (asked,) = (Requirement(text) for text in PROJECT["dependencies"] if text.startswith("transformers"))
    tested = re.search(r"^TRANSFORMERS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
    assert len(tested) == 2 and all(asked.specifier.contains(version) for version in tested)
    ends = {spec.operator: spec.version for spec in asked.specifier}
    assert tested[0] == ends[">="] + ".0"
    above = [int(part) for part in tested[1].split(".")]
    assert ends["<"] == f"{above[0]}.{above[1] + 1}"


def test_torch_gets_the_triton_that_its_cuda_build_asks_for():
    # a CPU build asks for none, so that pip's refusal cannot be seen from here
    asked = {"2.13.0": "3.7.1"}  # Requires-Dist of torch's wheel on PyPI; look it up where torch is renewed
    assert PINS["triton"] == asked[PINS["torch"]]


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the environment that make install creates")
def test_the_environment_is_the_locks():
    from importlib.metadata import distributions

    own = [sysconfig.get_path("purelib")]  # whoever imports setuptools puts its own old copies of packages on the path
    here = {canonicalize_name(d.metadata["Name"]): d.version.partition("+")[0] for d in distributions(path=own)}
    wrong = [f"{name}: got {here.get(name)}, wanted {pin}" for name, pin in PINS.items() if here.get(name) != pin]
    assert wrong == [], "run make install"


def test_the_version_is_said_once():
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", foretell.__version__)


def test_make_knows_its_verbs():
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for verb in ("install", "demo", "test", "check", "bench"):
        assert re.search(rf"^make {verb} +\S", text, re.M)


def test_ci_can_be_run():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    for command in ("make test", "make check", 'make demo ARGS="--short"'):
        assert command in script.read_text()
