"""foretell inspect: what is in a module's folder, without loading a target; or how a model would be decoded; or with
`foretell inspect data` what rows teach (inspect_data.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from foretell.config import parse


@dataclass(kw_only=True)
class InspectSettings:
    """Flags of `foretell inspect`."""

    folder: str = field(
        metadata={
            "help": "Folder written by save_pretrained or foretell train; or a model's, which is then loaded and held "
            "against itself.",
            "positional": True,
        }
    )
    json: bool = field(default=False, metadata={"help": "Print JSON instead of lines."})


def describe(folder: str | Path) -> dict:
    """Method, settings, sizes, memory, the target it fits, and where it comes from."""
    from safetensors import safe_open

    from foretell.checkpoint import WEIGHTS_FILE, read_config

    about = read_config(folder)
    tensors = {}
    with safe_open(Path(folder) / WEIGHTS_FILE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            part = file.get_slice(name)
            tensors[name] = {"shape": list(part.get_shape()), "dtype": part.get_dtype()}
    return {
        "folder": str(folder),
        "method": about["config"]["method"],
        "config": about["config"],
        "parameters": about["parameters"],
        "numbers": sum(math.prod(part["shape"]) for part in tensors.values()),
        "bytes": (Path(folder) / WEIGHTS_FILE).stat().st_size,
        "target": about["target"],
        "target_beside": (Path(folder) / "config.json").is_file(),
        "notes": about.get("notes") or {},
        "provenance": about["provenance"],
        "tensors": tensors,
    }


def judge(folder: str | Path) -> dict:
    """How a model would be decoded: the outcome of comparing the decoding copy with the model's own logits."""
    from transformers import AutoModelForCausalLM

    from foretell.models.refusals import UnsupportedModelError
    from foretell.models.target import Target

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    about = {"folder": str(folder), "architecture": type(model).__name__, "model_type": model.config.model_type}
    try:
        return about | {"verdict": "supported"} | Target(model).verdict()
    except UnsupportedModelError as refusal:
        return about | {"verdict": "refused", "why": str(refusal)}


def _print_verdict(found: dict) -> None:
    how = {
        "fast": "fast: the decoding copy gives the model's own logits",
        "plain": f"plain: fast parts would differ in {found.get('layer') or 'attention'}; as exact, slower",
    }
    print(f"{found['folder']}: {found['architecture']} ({found['model_type']})")
    if found["verdict"] == "refused":
        print(f"  refused     {found['why']}")
        return
    print(f"  decoding    {how[found['path']]}")
    if found["within"] is not None:
        print(f"  up to       {found['within']} tokens: longer texts would be read in another way and are refused")
    for name, distance in found["distances"].items():
        print(f"  {name:<34}{distance:.1e} of the logits' spread")


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code."""
    from foretell.checkpoint import CONFIG_FILE

    if list(argv[:1]) == ["data"] and list(argv[1:]) not in ([], ["--json"]):  # those: a folder of that name
        from foretell.cli.inspect_data import main as inspect_data

        return inspect_data(argv[1:])
    settings = parse(InspectSettings, argv, prog="foretell inspect")
    if not (Path(settings.folder) / CONFIG_FILE).is_file() and (Path(settings.folder) / "config.json").is_file():
        verdict = judge(settings.folder)
        if settings.json:
            print(json.dumps(verdict, indent=2))
        else:
            _print_verdict(verdict)
        return 0
    found = describe(settings.folder)
    if settings.json:
        print(json.dumps(found, indent=2))
        return 0
    target, origin = found["target"], found["provenance"]
    print(f"{found['folder']}: {found['method']} module, depth {found['config']['depth']}")
    print(f"  parameters  {found['parameters']:,} ({found['bytes'] / 1e6:.1f} MB on disk)")
    for name, value in found["config"].items():
        if name not in ("method", "depth"):
            print(f"  {name:<18}{value}")
    print(
        f"  for         {target['architecture']}, width {target['hidden_size']}, {target['num_hidden_layers']} layers, "
        f"vocabulary {target['vocab_size']}, weights {target['weights']}"
    )
    if found["target_beside"]:
        print("  the trained target lies in the same folder (joint training)")
    for name, value in (found["notes"].get("training") or {}).items():
        print(f"  {name:<28}{value}")
    print(f"  made        {origin.get('time_utc')} with foretell {origin.get('versions', {}).get('foretell', '?')}")
    print(f"  command     {' '.join(origin.get('command') or [])}")
    print(f"  tensors     {len(found['tensors'])}")
    for name, part in found["tensors"].items():
        print(f"    {name:<58}{part['dtype']:<6}{'x'.join(map(str, part['shape']))}")
    return 0
