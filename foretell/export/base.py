"""What every format shares: the job, a format's three duties, and what plain targets and modules look like."""

# D hidden width.

from __future__ import annotations

import copy
import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foretell.methods.sequential import SequentialModule
from foretell.models.target import Target
from foretell.mtp import MTPModel

CONFIG = "config.json"


@dataclass(kw_only=True)
class Job:
    """A module on its target, and how it is to be written. dtype: of the files, None is the module's own. model: the
    target's folder or hub name. about: content of the module's mtp_config.json.
    """

    mtp: MTPModel
    out: Path
    model: str
    tokenizer: Any = None
    dtype: torch.dtype | None = None
    about: dict[str, Any] | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        self.target: Target = self.mtp.target
        self.module: Any = self.mtp.module
        self.config: Any = self.mtp.mtp_config

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """As files hold them."""
        cast = {n: t.to(self.dtype) if self.dtype and t.is_floating_point() else t for n, t in tensors.items()}
        return {name: t.detach().cpu().contiguous().clone() for name, t in cast.items()}

    @property
    def kept_ids(self) -> Tensor | None:
        """The tokens that the module drafts, where it leaves any out."""
        ids = self.module.draft_vocab_ids
        return None if ids is None or len(ids) == self.target.vocab_size else ids

    @cached_property
    def rounded(self) -> Any:
        """A copy of the module that computes in fp32 with the numbers of the files."""
        return copy.deepcopy(self.module).eval().to(self.dtype).float()


class Format(ABC):
    """One way to write a module, for readers (whom `readers` names) that are not foretell."""

    readers = ""

    @abstractmethod
    def problems(self, job: Job) -> list[str]:
        """All that has no place in the format: nothing is written where there is any."""

    @abstractmethod
    def write(self, job: Job, folder: Path) -> list[str]:
        """Write the files; what to tell people: how it is served, and what is lost."""

    @abstractmethod
    def check(self, job: Job, folder: Path) -> list[str]:
        """Read the files back as their reader does and compare; what was compared. Raises ValueError if they differ."""


def unlike(job: Job, method: str, **wanted: Any) -> list[str]:
    """Settings that are not as a format needs them, and what no engine's format has a place for."""
    values = job.config.to_dict()
    if values["method"] != method:
        return [f"method: got {values['method']!r}, wanted {method!r}."]
    found = [f"{name}: got {values[name]!r}, wanted {w!r}." for name, w in wanted.items() if values[name] != w]
    bigram = ["markov_rank, confidence_head: the bigram's tensors have no place."]
    return found if job.module.bigram is None else found + bigram


def layer_problems(job: Job) -> list[str]:
    """What a sequential module has that is not one layer for all depths, without a window."""
    if not isinstance(job.module, SequentialModule):
        return []
    found, window = [], getattr(job.target.config, "sliding_window", None)
    if len(job.module.blocks) != 1:
        found.append(f"shared_module: got {len(job.module.blocks)} blocks, wanted one: engines run one for all depths.")
    elif not job.module.one_cache:
        found.append("the target's layer makes its own mask: depths cannot share keys and values, as in engines.")
    if window is not None and job.module.blocks[0].layer_type != "full_attention":
        found.append(f"sliding_window: the module's layer sees {window} rows, the format's sees all.")
    return found


def layer_settings(job: Job) -> dict[str, Any]:
    """config.json's keys of one decoder layer of the target's, in the words of Llama and Qwen2."""
    config, rope = job.target.config, dict(job.target.config.rope_parameters)
    keys = "hidden_size intermediate_size num_attention_heads num_key_value_heads rms_norm_eps hidden_act"
    keys += " max_position_embeddings bos_token_id eos_token_id"
    said = {key: getattr(config, key) for key in keys.split()}
    said |= {"vocab_size": job.target.vocab_size, "rope_theta": rope["rope_theta"], "rope_parameters": rope}
    if rope.get("rope_type", "default") != "default":  # what transformers 4 calls it
        said["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return said


def served(job: Job, method: str, more: Sequence[str] = (), sglang: bool = False) -> list[str]:
    """The exact commands of vLLM and SGLang."""
    K, out = str(job.config.depth), str(job.out)
    spec = json.dumps({"method": method, "model": out, "num_speculative_tokens": int(K)})
    said = [shlex.join(["vllm", "serve", job.model, *more, "--speculative-config", spec])]
    kind = "EAGLE3" if method == "eagle3" else "EAGLE"
    words = ["python", "-m", "sglang.launch_server", "--model-path", job.model, "--speculative-algorithm", kind]
    words += ["--speculative-draft-model-path", out, "--speculative-num-steps", K, "--speculative-eagle-topk", "1"]
    return [*said, shlex.join([*words, "--speculative-num-draft-tokens", str(int(K) + 1)])] if sglang else said


def whole_vocabulary(job: Job) -> list[str]:
    """What is lost where engines draft with the target's whole head."""
    if job.kept_ids is None:
        return []
    return [f"lost: the draft vocabulary of {len(job.kept_ids):,} tokens; the engine uses the whole head."]


def renamed(block: nn.Module, parts: dict[str, str]) -> dict[str, Tensor]:
    """A block's tensors, the beginnings of their names replaced: the first that fits."""
    firsts = ((name, next(p for p in parts if name.startswith(p)), t) for name, t in block.state_dict().items())
    return {parts[part] + name.removeprefix(part): tensor for name, part, tensor in firsts}


def fused(order: str, matrix: Tensor, wanted: str) -> Tensor:
    """A fusion's [D, 2 D] with its halves in the wanted order."""
    return matrix if order == wanted else torch.cat(matrix.chunk(2, dim=1)[::-1], dim=1)
