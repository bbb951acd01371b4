"""What every method shares: the settings' base class, the registry, and how settings are found by name."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from foretell.config import ConfigError, from_dict
from foretell.models.target import Target

METHODS = {
    "sequential": "foretell.methods.sequential:SequentialConfig",
}

GradientMode = Literal["disabled", "standalone", "joint"]
Supervision = Literal["labels", "teacher", "teacher_hard"]
LossKind = Literal["ce", "kl", "reverse_kl", "tv"]
DepthWeights = Literal["uniform", "harmonic", "exponential"]


@dataclass(kw_only=True)
class MTPConfig:
    """Settings of an MTP module; each method adds its own. `method` says which class a saved file means."""

    method: ClassVar[str] = ""
    depth: int = field(default=1, metadata={"help": "K: how many tokens beyond the ordinary next one are predicted."})
    hidden_source: Literal["post_norm", "pre_norm"] = field(
        default="post_norm", metadata={"help": "The target's states after or before its final norm."}
    )

    def build(self, target: Target) -> Any:
        """The method's nn.Module for a target, initialised."""
        raise TypeError(f"{type(self).__name__} describes no method; use one of {', '.join(METHODS)}.")

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, in plain sentences."""
        if isinstance(self.depth, int) and self.depth >= 1:
            return []
        return [f"depth: got {self.depth!r}, wanted an integer of at least 1."]

    def __post_init__(self) -> None:
        found = self.problems()
        if found:
            raise ConfigError(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the method's name first."""
        return {"method": self.method, **asdict(self)}

    @staticmethod
    def from_any(source: MTPConfig | dict[str, Any] | str | Path) -> MTPConfig:
        """Settings themselves, a dict with `method`, a YAML file's path, or the name of a preset in recipes/."""
        if isinstance(source, MTPConfig):
            return source
        if isinstance(source, dict):
            values = dict(source)
            name = values.pop("method", None)
            if name not in METHODS:
                raise ConfigError([f"method: got {name!r}, wanted one of {', '.join(METHODS)}."])
            return from_dict(config_class(name), values)
        return MTPConfig.from_any(load_preset(source)["module"])


def config_class(method: str) -> type[MTPConfig]:
    """The settings class of a method's name."""
    module, name = METHODS[method].split(":")
    return getattr(importlib.import_module(module), name)


def recipes_folder() -> Path:
    """Where the presets lie: beside the package in a checkout, inside it when installed."""
    beside = Path(__file__).parents[2] / "recipes"
    return beside if beside.is_dir() else Path(__file__).parents[1] / "recipes"


def load_preset(name: str | Path) -> dict[str, Any]:
    """{"module": settings of the module, "training": arguments} of a preset's name or a YAML file's path.

    Raises ConfigError for a name that is neither, listing the presets.
    """
    path = Path(name)
    if not path.is_file():
        path = recipes_folder() / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in recipes_folder().glob("*.yaml")))
        raise ConfigError([f"preset: got {str(name)!r}, wanted a YAML file or one of: {names}."])
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or not isinstance(values.get("module"), dict):
        raise ConfigError(
            [f"{path}: wanted a mapping with a `module` section (and `training`), got {type(values).__name__}."]
        )
    unknown = sorted(set(values) - {"module", "training", "about", "measured"})
    if unknown:
        raise ConfigError([f"{path}: unknown sections {', '.join(unknown)}; wanted about, module, training, measured."])
    return {"module": values["module"], "training": dict(values.get("training") or {})}
