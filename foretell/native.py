"""MTP weights that a checkpoint already carries and transformers drops on load, read straight from its files.

LAYOUTS is the table: what each family calls the parts of a module, and the recipe it was trained with; a new family is
a row. Only the headers of the files, and the MTP tensors themselves, are read: one at a time, each into its place.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foretell.methods.sequential import SequentialConfig, SequentialModule
from foretell.models.mtp_block import MTPBlock
from foretell.models.refusals import differences, first_of
from foretell.models.target import Target


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a family stores its modules. {n} is the module's number: 0, 1, ..., or L, L + 1, ... after the L layers."""

    families: str
    model_types: tuple[str, ...]  # targets that it was checked with
    parts: dict[str, str]  # beginning of an MTPBlock tensor's name -> beginning of its name in the checkpoint
    counted: str  # pattern of the names that tell how many modules there are; its group is {n}
    after_layers: bool = False
    shared: dict[str, str] = field(default_factory=dict)  # copies of the target's own: name -> attribute of Target
    recipe: dict[str, Any] = field(default_factory=dict)  # settings of SequentialConfig
    refused: str = ""  # why it cannot be used, if it cannot


LAYOUTS: dict[str, Layout] = {
    "deepseek": Layout(
        families="DeepSeek-V3, GLM-4-MoE",
        model_types=("deepseek_v3", "glm4_moe"),
        parts={
            "enorm.": "model.layers.{n}.enorm.",
            "hnorm.": "model.layers.{n}.hnorm.",
            "eh_proj.": "model.layers.{n}.eh_proj.",  # columns [embedding | hidden]
            "norm.": "model.layers.{n}.shared_head.norm.",
            "block.": "model.layers.{n}.",
        },
        counted=r"model\.layers\.(\d+)\.(?:enorm|hnorm|eh_proj|shared_head)\.",
        after_layers=True,
        shared={
            "model.layers.{n}.embed_tokens.weight": "embed_tokens",
            "model.layers.{n}.shared_head.head.weight": "head",
        },
        recipe={"fusion_order": "embedding_hidden", "hidden_source": "post_norm"},
    ),
    "mimo": Layout(
        families="MiMo",
        model_types=("qwen2", "mimo"),
        parts={
            "enorm.": "model.mtp_layers.{n}.token_layernorm.",
            "hnorm.": "model.mtp_layers.{n}.hidden_layernorm.",
            "eh_proj.": "model.mtp_layers.{n}.input_proj.",  # columns [hidden | embedding]
            "norm.": "model.mtp_layers.{n}.final_layernorm.",
            "block.": "model.mtp_layers.{n}.",
        },
        counted=r"model\.mtp_layers\.(\d+)\.",
        recipe={"fusion_order": "hidden_embedding", "hidden_source": "pre_norm"},
    ),
    "qwen3_next": Layout(
        families="Qwen3-Next, Qwen3.5",
        model_types=(),
        parts={  # one fusion and one norm for all depths
            "enorm.": "mtp.pre_fc_norm_embedding.",
            "hnorm.": "mtp.pre_fc_norm_hidden.",
            "eh_proj.": "mtp.fc.",  # columns [embedding | hidden]
            "norm.": "mtp.norm.",
            "block.": "mtp.layers.{n}.",
        },
        counted=r"mtp\.layers\.(\d+)\.",
        recipe={"fusion_order": "embedding_hidden", "hidden_source": "post_norm"},
        refused="their targets mix linear attention in, which cannot roll back rejected drafts",
    ),
}

COUNT_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")
_QUANTISED = re.compile(r"(_scale|_scale_inv|_packed|\.qweight|\.qzeros|\.scales|\.weight_shape)$")
_IGNORED = ".rotary_emb.inv_freq"  # old checkpoints store it; it follows from the config
_CHUNK_ROWS = 4096  # rows of a vocabulary matrix compared at once


def read_native(target: Target, folder: str | Path) -> tuple[SequentialConfig, Callable[[SequentialModule], None]]:
    """The settings of the MTP module that a checkpoint folder carries, and what copies its tensors into a built module.

    Raises ValueError or FileNotFoundError: no MTP weights there (and what was looked for), a layout or target that does
    not work, another number of layers; fill: missing, unknown and misshapen tensors, by their names in the checkpoint.
    Warns where the module came with an embedding or output head of its own, which is not used.
    """
    files = CheckpointFiles(Path(folder))
    layout, numbers = _find(files)
    depth = _checked_depth(layout, numbers, target, files)
    # engines run a single module again for further depths, on its own post-norm states; so can we
    config = SequentialConfig(depth=depth, shared_module=depth == 1, **layout.recipe)

    def fill(module: SequentialModule) -> None:
        with files, torch.no_grad():
            places: dict[str, Tensor] = {}
            for block, n in zip(module.blocks, numbers, strict=True):
                places |= _checked_places(block, layout, n, files)
            for name, own in places.items():
                own.copy_(files.slice(name)[...])
            for n in numbers:
                _compare_shared(target, layout, n, files)

    return config, fill


# -- finding -----------------------------------------------------------------------------------------------------------


class CheckpointFiles:
    """The safetensors files of a folder: which tensors there are, and slices that load only what is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder; wanted a checkpoint's, with config.json and safetensors."
            )
        self.config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()
        index = folder / "model.safetensors.index.json"
        single = [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else []
        self.home: dict[str, str] = {}  # tensor -> file
        if not single and index.is_file():
            self.home = dict(read_json(index).get("weight_map") or {})
        else:
            for path in single or sorted(folder.glob("*.safetensors")):
                with self:
                    self.home |= dict.fromkeys(self._file(path.name).keys(), path.name)
        if not self.home:
            raise FileNotFoundError(
                f"{folder}: no safetensors files; wanted a checkpoint's, as transformers writes it."
            )

    def __enter__(self) -> CheckpointFiles:
        return self

    def __exit__(self, *_error: object) -> None:
        self._open.clear()
        self._stack.close()

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path}: not there, but the index names it; the folder is incomplete, copy it again."
                )
            try:
                self._open[name] = self._stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{path}: truncated or damaged ({error}); copy the folder again.") from None
        return self._open[name]

    def slice(self, name: str) -> Any:
        """Of one tensor: get_shape() reads nothing more, [...] reads it."""
        try:
            return self._file(self.home[name]).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{self.folder / self.home[name]}: {error}; copy the folder again.") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: damaged ({error}); copy the folder again.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a {type(values).__name__}, wanted a mapping; copy the folder again.")
    return values


def _find(files: CheckpointFiles) -> tuple[Layout, list[int]]:
    """The layout that the folder's tensors follow, and the numbers of its modules."""
    for layout in LAYOUTS.values():
        pattern = re.compile(layout.counted)
        numbers = {int(found[1]) for found in map(pattern.match, files.home) if found}
        if not numbers:
            continue
        if layout.refused:
            raise ValueError(
                f"{files.folder} holds MTP weights of {layout.families}: {layout.refused}. Wanted one of: {_usable()}."
            )
        return layout, sorted(numbers)
    looked = ", ".join(f"{row.parts['eh_proj.']}weight ({row.families})" for row in LAYOUTS.values())
    raise ValueError(
        f"{files.folder} carries no MTP weights: none of its {len(files.home)} tensors is called like {looked}. "
        "Train a module instead (get_mtp_model), or load a saved one (MTPModel.from_pretrained)."
    )


def _usable() -> str:
    return ", ".join(row.families for row in LAYOUTS.values() if not row.refused)


def _checked_depth(layout: Layout, numbers: list[int], target: Target, files: CheckpointFiles) -> int:
    model_type, L = target.config.model_type, len(target.layers)
    if model_type not in layout.model_types:
        raise ValueError(
            f"{files.folder} holds MTP weights of {layout.families}, got a target of type {model_type}; wanted one of: "
            f"{', '.join(layout.model_types)}."
        )
    stated = files.config.get("text_config") or files.config
    layers = stated.get("num_hidden_layers", L)
    first = L if layout.after_layers else 0
    if layers != L or numbers != list(range(first, first + len(numbers))):
        raise ValueError(
            f"{files.folder} does not fit this target: got {layers} layers and MTP modules numbered {numbers}, wanted "
            f"{L} layers and numbers from {first} on without a gap. Load the target from this folder."
        )
    declared = next((stated[key] for key in COUNT_KEYS if stated.get(key) is not None), len(numbers))
    if declared != len(numbers):
        raise ValueError(
            f"{files.folder}: config.json declares {declared} MTP modules, but there are tensors of {len(numbers)}; "
            "copy the folder again, or correct its config.json."
        )
    return declared


# -- filling -----------------------------------------------------------------------------------------------------------


def places_of(block: MTPBlock, layout: Layout, n: int) -> Iterator[tuple[str, Tensor]]:
    """(name in the checkpoint, the module's own storage for it): for fused experts a part of a tensor."""
    for name, own in block.state_dict().items():
        part = next(part for part in layout.parts if name.startswith(part))
        theirs = layout.parts[part].format(n=n) + name.removeprefix(part)
        if theirs.endswith(".experts.gate_up_proj"):  # transformers fuses the experts: [experts, gate and up, in]
            for e, fused in enumerate(own):
                gate, up = fused.chunk(2)
                yield theirs.replace("gate_up_proj", f"{e}.gate_proj.weight"), gate
                yield theirs.replace("gate_up_proj", f"{e}.up_proj.weight"), up
        elif theirs.endswith(".experts.down_proj"):
            for e, fused in enumerate(own):
                yield theirs.replace("down_proj", f"{e}.down_proj.weight"), fused
        else:
            yield theirs, own


def _checked_places(block: MTPBlock, layout: Layout, n: int, files: CheckpointFiles) -> dict[str, Tensor]:
    """All of places_of, if they are what the checkpoint holds for module n."""
    places = dict(places_of(block, layout, n))
    shared = {name.format(n=n) for name in layout.shared}
    begins = tuple(prefix.format(n=n) for prefix in layout.parts.values())
    there = {name for name in files.home if name.startswith(begins) and not name.endswith(_IGNORED)} - shared
    stored = {name: torch.empty(files.slice(name).get_shape(), device="meta") for name in sorted(there)}
    if problems := differences(stored, places):
        missing, unknown = sorted(places.keys() - there), sorted(there - places.keys())
        advice = _advice(missing, unknown)
        raise ValueError(f"{files.folder}: MTP module {n} does not fit this target: {first_of(problems)}. {advice}")
    return places


def _advice(missing: list[str], unknown: list[str]) -> str:
    if any(_QUANTISED.search(name) for name in unknown):
        return "It is quantised: dequantise the checkpoint first."
    if any(".experts." in name for name in missing) != any(".experts." in name for name in unknown):
        return "The target's last layer and the MTP module are of different kinds (dense, mixture of experts)."
    return "Load the target from the same folder."


def _compare_shared(target: Target, layout: Layout, n: int, files: CheckpointFiles) -> None:
    """The module's own copies of the target's embedding and output head must be copies: only the target's are used."""
    for template, attribute in layout.shared.items():
        name = template.format(n=n)
        if name in files.home and not _equal(files.slice(name), getattr(target, attribute).weight.detach()):
            warnings.warn(
                f"{files.folder}: {name} differs from the target's own. foretell shares the target's: output stays "
                "lossless, but fewer drafts may be accepted.",
                stacklevel=4,
            )


def _equal(stored: Any, own_VD: Tensor) -> bool:
    """A few thousand rows at a time: vocabulary matrices are large."""
    if tuple(stored.get_shape()) != tuple(own_VD.shape):
        return False
    starts = range(0, own_VD.shape[0], _CHUNK_ROWS)
    chunks = ((stored[i : i + _CHUNK_ROWS], own_VD[i : i + _CHUNK_ROWS]) for i in starts)
    return all(torch.equal(theirs.to(own.device, own.dtype), own) for theirs, own in chunks)
