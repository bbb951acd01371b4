"""Imports point down, siblings never import each other, no folder holds a cycle. Lazy imports count, and so do
modules that are named in text ("foretell.methods.sequential:SequentialConfig"), which are imports all the same.

The layers are those of the design, with one addition, written down here: foretell/mtp.py (MTPModel, the face of the
package) stands above what it stores modules with and below what people run. foretell/__init__.py is a lazy facade: it
names modules of every layer and imports none; of it, the layers may use __version__ only.
"""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "foretell"
LAYERS = [
    {"types", "config", "runtime"},  # words and settings: they import nothing of ours
    {"ops"},  # functions of tensors
    {"models", "data"},  # nn.Modules and the seam to transformers | text to batches
    {"methods", "decoding"},  # how to train and draft | how to verify
    {"checkpoint", "native"},  # how a module is stored | how modules that others trained are read
    {"mtp"},  # MTPModel: the target and its module in one object
    {"training", "evaluation", "export", "serving"},  # what people run
    {"trl"},  # the drop-in for TRL users: names of training/sft.py
    {"cli"},  # how people run it
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# heavy packages, and the only places that may import them
RIM = {
    "trl": {"training", "cli"},
    "peft": {"training", "export"},
    "vllm": {"export", "serving"},
    "sglang": {"export", "serving"},
    "gguf": {"export"},
    "fastapi": {"serving"},
    "uvicorn": {"serving"},
    "prometheus_client": {"serving"},
    "lm_eval": {"evaluation"},
    "matplotlib": {"evaluation"},
    "scipy": {"evaluation"},
    "triton": {"ops"},
    "datasketch": {"data"},
    "liger_kernel": {"ops"},
}
NAMED = re.compile(r"foretell((?:\.\w+)+)(?::\w+)?")


def imports(path: Path) -> list[tuple[str, int]]:
    """(what is imported, with its full name; the line), imports inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import, wanted an absolute one"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
    return found


def named_in_text(path: Path) -> list[tuple[str, int]]:
    """Modules written as whole text constants, as registries do."""
    constants = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    texts = [(node.value, node.lineno) for node in constants if isinstance(node.value, str)]
    return [(text.partition(":")[0], line) for text, line in texts if NAMED.fullmatch(text)]


def part(path: Path, package: Path) -> str:
    return path.relative_to(package).with_suffix("").parts[0]


def wrong_directions(package: Path) -> list[str]:
    """Every import that points up or sideways, as `file:line (layer) imports name (layer)`."""
    wrong = []
    for path in sorted(package.rglob("*.py")):
        source = part(path, package)
        if source == "__init__":
            continue
        assert source in RANK, f"{path.relative_to(package)}: not in LAYERS, give it a place"
        for name, line in imports(path) + named_in_text(path):
            if name.split(".")[0] != "foretell" or name == "foretell.__version__":
                continue
            to = [*name.split("."), ""][1]
            if to != source and not RANK.get(to, len(LAYERS)) < RANK[source]:
                at = f"{path.relative_to(package)}:{line}"
                wrong.append(f"{at} (layer {RANK[source]}) imports {name} (layer {RANK.get(to, 'of the facade')})")
    return wrong


def cycle(package: Path) -> list[str]:
    """The modules of one import cycle, or nothing. A package's __init__ counts where names are taken from it."""
    modules = {}
    for path in package.rglob("*.py"):
        parts = ("foretell", *path.relative_to(package).with_suffix("").parts)
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    modules.pop("foretell", None)  # the facade: it imports for type checkers only
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        graph[module] = set()
        for name, _ in imports(path):
            # the longest beginning of a.b.c that is a module: c may be a function of a.b
            to = next((n for n in (name, name.rpartition(".")[0]) if n in modules), None)
            if to is not None and to != module:
                graph[module].add(to)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def strays(package: Path) -> list[str]:
    """Imports of heavy packages outside the places that are about them."""
    found = []
    for path in sorted(package.rglob("*.py")):
        for name, line in imports(path):
            heavy = name.split(".")[0]
            if heavy in RIM and part(path, package) not in RIM[heavy]:
                found.append(f"{path.relative_to(package)}:{line} imports {name}, wanted in {sorted(RIM[heavy])} only")
    return found


def test_imports_point_down():
    assert wrong_directions(PACKAGE) == []


def test_no_cycles():
    assert cycle(PACKAGE) == []


def test_heavy_packages_stay_at_the_rim():
    assert strays(PACKAGE) == []


def test_the_facade_imports_nothing():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        for inner in ast.walk(node):
            names = [alias.name for alias in inner.names] if isinstance(inner, ast.Import) else []
            names += [inner.module] if isinstance(inner, ast.ImportFrom) else []
            for name in names:
                assert name in ("__future__", "importlib", "typing"), f"__init__.py imports {name}"


# the checks themselves: each must reject a package that breaks it


def package_of(tmp_path: Path, files: dict[str, str]) -> Path:
    good = {
        "types.py": "",
        "ops/loss.py": "from foretell.types import X\n",
        "methods/base.py": "import foretell.ops.loss",
    }
    for name, text in (good | files).items():
        path = tmp_path / "foretell" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "foretell"


def test_a_good_package_passes(tmp_path):
    good = package_of(tmp_path, {"cli/x.py": "from foretell import __version__\nfrom foretell.ops import loss\n"})
    assert wrong_directions(good) == []
    assert cycle(good) == []
    assert strays(good) == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("ops/bad.py", "from foretell.models.target import Target", "ops/bad.py:1 (layer 1) imports foretell.models"),
        ("methods/bad.py", "def f():\n    import foretell.training.sft", "methods/bad.py:2"),
        ("decoding/bad.py", "from foretell.methods.base import x", "decoding/bad.py:1"),
        ("data/bad.py", "from foretell.models import target", "data/bad.py:1"),
        ("config.py", "from foretell.types import Batch", "config.py:1"),
        ("models/bad.py", "HOME = {'a': 'foretell.mtp:MTPModel'}", "models/bad.py:1"),
        ("ops/lazy.py", "from foretell import MTPModel", "of the facade"),
        ("ops/lazy.py", "import foretell", "of the facade"),
    ],
    ids=["up", "lazily up", "sideways", "sibling", "layer 0", "in text", "facade", "whole facade"],
)
def test_an_import_that_does_not_point_down_is_named(tmp_path, name, text, said):
    wrong = wrong_directions(package_of(tmp_path, {name: text}))
    assert len(wrong) == 1
    assert said in wrong[0]


def test_a_relative_import_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="relative import"):
        wrong_directions(package_of(tmp_path, {"ops/bad.py": "from .loss import x"}))


def test_a_module_without_a_layer_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="give it a place"):
        wrong_directions(package_of(tmp_path, {"utils.py": ""}))


def test_a_cycle_inside_a_folder_is_found(tmp_path):
    files = {"ops/a.py": "from foretell.ops.b import x", "ops/b.py": "def f():\n    from foretell.ops import a"}
    assert {"foretell.ops.a", "foretell.ops.b"} == set(cycle(package_of(tmp_path, files)))


def test_a_heavy_import_elsewhere_is_found(tmp_path):
    assert len(strays(package_of(tmp_path, {"models/x.py": "def f():\n    from trl import SFTTrainer"}))) == 1
