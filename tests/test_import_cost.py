"""`import foretell` and `foretell --help` cost nothing: no heavy package, no waiting. The facade keeps its promises."""

from __future__ import annotations

import importlib
import statistics
import subprocess
import sys

import pytest

import foretell

HEAVY = ("torch", "transformers", "trl", "peft", "vllm", "fastapi", "lm_eval", "triton", "matplotlib", "datasets")
LIMIT_S = 0.3

MEASURE = """
import sys, time
before = time.perf_counter()
{statement}
print(time.perf_counter() - before, *sys.modules)
"""


def measure(statement: str) -> tuple[float, set[str]]:
    """Seconds of a statement in a fresh interpreter (its start not counted), and the modules loaded after it."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE.format(statement=statement)], capture_output=True, text=True, check=True
    )
    seconds, *modules = run.stdout.splitlines()[-1].split()
    return float(seconds), set(modules)


@pytest.mark.parametrize(
    "statement",
    [
        "import foretell",
        "import foretell.runtime, foretell.config",
        "import foretell.cli; foretell.cli.main(['--help'])",
    ],
)
def test_importing_costs_nothing(statement):
    seconds, loaded = zip(*(measure(statement) for _ in range(3)), strict=True)
    assert not loaded[0].intersection(HEAVY)
    assert statistics.median(seconds) < LIMIT_S


def test_the_measurement_sees_a_heavy_import():
    _, loaded = measure("import foretell, matplotlib")
    assert "matplotlib" in loaded


def test_the_facade_is_complete():
    assert set(foretell.__all__) == {*foretell._HOME, "__version__"}
    assert set(foretell.__all__) <= set(dir(foretell))


@pytest.mark.parametrize("name", sorted(foretell._HOME))
def test_every_name_of_the_facade_is_there(name):
    assert getattr(foretell, name) is getattr(importlib.import_module(foretell._HOME[name]), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="MTPModle"):
        _ = foretell.MTPModle
