"""Modules out of foretell: FORMATS is the table of what engines and people read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from foretell.checkpoint import load_tensors, read_config
from foretell.config import nearest
from foretell.export.base import Format, Job
from foretell.export.eagle3 import Eagle3
from foretell.export.hub import Hub
from foretell.export.medusa import Medusa
from foretell.export.mimo import Mimo
from foretell.export.native import Native
from foretell.export.peft import Peft
from foretell.methods.learning import in_eval_mode
from foretell.mtp import MTPModel
from foretell.runtime import atomic_folder

FORMATS: dict[str, Format] = {
    "mimo": Mimo(),
    "eagle3": Eagle3(),
    "medusa": Medusa(),
    "native": Native(),
    "peft": Peft(),
    "hub": Hub(),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export_module(
    mtp: MTPModel,
    to: str,
    out: str | Path,
    *,
    dtype: str | None = None,
    check: bool = False,
    model: str | Path | None = None,
    tokenizer: Any = None,
    about: dict[str, Any] | None = None,
    licence: str | None = None,
) -> list[str]:
    """Write a module in a format of FORMATS into a new or empty folder, whole or not at all; what to say about it.

    dtype: "bf16" or "fp32", by default the module's own. check: read the files back as their reader does and compare,
    on real prompts where there is a tokenizer. model: the target's folder or hub name, by default where it came from.
    about: what mtp_config.json says of the module's making. licence: for hub.

    Raises ValueError, with nothing written: all that has no place in the format; and where check finds a difference.
    """
    check_request(to, out, dtype)
    name = str(model or getattr(mtp.model.config, "_name_or_path", "") or "MODEL")
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    job = Job(mtp=mtp, out=Path(out).resolve(), model=name, tokenizer=tokenizer, about=about, licence=licence)
    job.dtype, form = DTYPES.get(dtype or ""), FORMATS[to]
    if getattr(mtp.model, "peft_config", None):
        raise ValueError(
            "model: has adapters, which the served one has not; merge them (merge_and_unload) and save it."
        )
    if check and job.target.dtype != torch.float32:
        raise ValueError(f"check: got a target in {job.target.dtype}, wanted fp32: load it with dtype=torch.float32.")
    with in_eval_mode(mtp):
        if problems := form.problems(job):
            fitting = [name for name, one in FORMATS.items() if name != "hub" and not one.problems(job)]
            has = f"What has: {', '.join([*fitting, 'hub'])}; foretell's own generate runs every module."
            raise ValueError("\n".join([f"{to} ({form.readers}) has no place for this module:", *problems, has]))
        with atomic_folder(out) as folder:
            said = form.write(job, folder)
            said += [f"checked: {line}" for line in form.check(job, folder)] if check else []
    return [f"{job.out}: {to}, for {form.readers}", *said]


def check_request(to: str, out: str | Path, dtype: str | None) -> None:
    """Raise ValueError for what can be said before anything is loaded."""
    problems, out = [], Path(out)
    if to not in FORMATS:
        problems.append(f"to: got {to!r}, wanted one of {', '.join(FORMATS)}{nearest(to, FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        problems.append(f"dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(f"out: {out} is there and not empty, wanted a new folder: nothing is written over.")
    if problems:
        raise ValueError("\n".join(problems))


def load_for_export(model: Any, folder: str | Path) -> MTPModel:
    """A module on its target, in the type in which its file holds it."""
    mtp = MTPModel.from_pretrained(model, folder)
    mtp.module.to(getattr(torch, read_config(folder)["dtype"]))  # from_pretrained took the target's
    load_tensors(mtp.module, folder)
    return mtp
