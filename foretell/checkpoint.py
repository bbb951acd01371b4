"""How an MTP module is stored: mtp_config.json and mtp_model.safetensors in a folder, the target not copied."""

from __future__ import annotations

import json
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from foretell import __version__
from foretell.methods.base import MTPConfig
from foretell.models.refusals import differences, first_of
from foretell.models.target import Target
from foretell.runtime import atomic_folder, provenance

CONFIG_FILE, WEIGHTS_FILE = "mtp_config.json", "mtp_model.safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = 1


def save_module(
    state_dict: dict[str, torch.Tensor],
    config: MTPConfig,
    target: dict[str, Any],
    folder: str | Path,
    notes: dict[str, Any],
    peft: tuple[dict[str, Any], dict[str, torch.Tensor]] | None = None,
) -> None:
    """Write both files into folder, each whole or not at all: a full disk leaves the old ones as they were.

    state_dict: the module's tensors, whole. target: its fingerprint. peft: settings and tensors of a plain adapter,
    which is written beside them in PEFT's own two files.
    """
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state_dict.items()}
    weights = [t for t in tensors.values() if t.is_floating_point()]
    about = {
        "format": FORMAT,
        "foretell_version": __version__,
        "config": config.to_dict(),
        "target": target,
        "parameters": sum(t.numel() for t in weights),
        "dtype": str(weights[0].dtype).removeprefix("torch."),
        "provenance": provenance(),
        "notes": notes,
    }
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        if peft is not None:
            save_adapter(temporary, *peft)


def save_adapter(folder: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """PEFT's own two files."""
    (folder / PEFT_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    adapter = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    save_file(adapter, folder / PEFT_WEIGHTS, metadata={"format": "pt"})


def read_config(folder: str | Path) -> dict[str, Any]:
    """The content of mtp_config.json.

    Raises FileNotFoundError or ValueError naming the file and what is wrong with it.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        there = sorted(p.name for p in Path(folder).iterdir())[:8] if Path(folder).is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{path}: not there (found: {there}). Wanted a folder written by MTPModel.save_pretrained."
        )
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(
                f"{path}: format {about['format']}, this foretell reads {FORMAT}; use the version that wrote it."
            )
        about["config"]["method"], about["target"]["architecture"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {error}); copy the folder again.") from None
    return about


def shipped(model: nn.Module) -> Path | None:
    """The folder of the module that ships with foretell for these very weights, or None."""
    here, modules = Target(model).fingerprint(), resources.files("foretell").joinpath("modules")
    folders = [Path(str(folder)) for folder in modules.iterdir()] if modules.is_dir() else []
    return next((f for f in folders if (f / CONFIG_FILE).is_file() and read_config(f)["target"] == here), None)


def check_target(about: dict[str, Any], target: Target, folder: str | Path) -> None:
    """Raise ValueError if the module was trained for another architecture or size; warn if for other weights."""
    wanted, got = about["target"], target.fingerprint()
    differ = [
        f"{key}: module was trained for {wanted[key]!r}, this model has {got[key]!r}"
        for key in ("architecture", "model_type", "hidden_size", "vocab_size", "num_hidden_layers")
        if wanted.get(key) != got[key]
    ]
    if differ:
        raise ValueError(
            f"{folder} does not fit this model: " + "; ".join(differ) + ". Load the target it was trained for."
        )
    if wanted.get("weights") != got["weights"]:
        warnings.warn(
            f"{folder} was trained for other weights of this architecture (fingerprint {wanted.get('weights')}, here "
            f"{got['weights']}): output stays lossless, but fewer drafts may be accepted.",
            stacklevel=4,  # whoever calls MTPModel.from_pretrained
        )


def check_settings(config: MTPConfig, folder: str | Path) -> None:
    """Raise ValueError if a checkpoint was written by a module of other settings: a resumed run repeats the first."""
    written, given = (
        json.loads(json.dumps(one.to_dict())) for one in (MTPConfig.from_any(read_config(folder)["config"]), config)
    )
    differ = [
        f"{name}: the checkpoint has {written.get(name)!r}, this run {value!r}"
        for name, value in given.items()
        if written.get(name) != value and name not in config.free
    ]
    if differ:
        raise ValueError(
            f"{folder} cannot be resumed with other settings: {'; '.join(differ)}. Give the checkpoint's, or start a "
            "new run in another output_dir."
        )


def load_tensors(module: nn.Module, folder: str | Path) -> None:
    """Fill a module from the folder; every tensor must be there, none may be unknown, all shapes must fit."""
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; the folder is incomplete, copy it again.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); copy the folder again.") from None
    assign(module, tensors, str(path))


@torch.no_grad()
def assign(module: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copy tensors into the module's own, by name.

    Raises ValueError listing missing, unknown and wrongly shaped tensors.
    """
    own = module.state_dict()
    if problems := differences(tensors, own):
        raise ValueError(f"{where} does not fit the module its config describes: {first_of(problems)}.")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
