"""Every causal LM of transformers that can be built tiny says its own text here, or is refused by name.

docs/architectures.md is what this found, written by `python tests/test_architectures.py > docs/architectures.md` and
held to it by these tests on the locked transformers; on another version only "equal, or refused by name" is asserted.
Masks are asked of every seventh class, and of those where they say something else; FORETELL_SWEEP=all asks them of all.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import NAMES, UNBUILT, build
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from foretell.methods.base import MTPConfig
from foretell.methods.heads import HeadsConfig
from foretell.methods.masked import MaskedConfig
from foretell.methods.sequential import SequentialConfig
from foretell.models.slot_cache import SlotCache
from foretell.mtp import MTPModel, get_mtp_model

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "architectures.md"
LOCKED = f"transformers=={transformers.__version__}" in (ROOT / "requirements.lock").read_text().split()
SWEEP = os.environ.get("FORETELL_SWEEP") == "all"
NEW, LENGTHS = 10, (11, 3, 14)  # beyond every window, read in prompts of several lengths
STEPS = (9, 1, 1, 4, 1)


def prompts() -> dict[str, Tensor]:
    """Left-padded, none of the special ids."""
    generator, width = torch.Generator().manual_seed(32), max(LENGTHS)
    ids_BT, mask_BT = torch.zeros(2, len(LENGTHS), width, dtype=torch.long)
    for b, length in enumerate(LENGTHS):
        ids_BT[b, width - length :] = torch.randint(3, 90, (length,), generator=generator)
        mask_BT[b, width - length :] = 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


@torch.no_grad()
def logits_agree(mtp: MTPModel) -> None:
    """A text read in steps on top of a cache gives the model's own logits: more than its likeliest tokens."""
    ids = torch.randint(3, 90, (2, sum(STEPS)), generator=torch.Generator().manual_seed(5))
    mtp.eval()
    wanted = mtp.model(input_ids=ids, use_cache=False).logits.float()
    cache, done, parts = SlotCache(2, 64), 0, []
    mtp.target.refresh()
    for step in STEPS:
        rows = mtp.target.forward_rows(
            ids[:, done : done + step], torch.full((2,), done), cache, visible=done + step, full=step == 1
        )
        parts.append(mtp.target.logits(rows.post_norm_BRD, view=True))
        done += step
    got, spread = torch.cat(parts, dim=1), float(wanted.std())
    assert float((got - wanted).abs().max()) < 2e-3 * spread
    assert float((got - wanted.roll(1, 1)).abs().max()) > 0.1 * spread, "the check should see another row's logits"


def judge(model: nn.Module, config: MTPConfig) -> str:
    """'equal', or why it was refused; anything else raises."""
    inputs, settings, wanted = prompts(), {"max_new_tokens": NEW, "do_sample": False}, None
    drafting: dict[str, Any] = {"num_draft_tokens": 1, "drafter": "mtp+lookup"}
    drafting |= {"draft_layout": "quadratic"} if config.method == "masked" else {}
    try:
        mtp = get_mtp_model(model, config)
        with torch.no_grad():
            for parameter in mtp.module.parameters():  # adapters that do nothing would hide where they act
                parameter.add_(0.05 * torch.randn_like(parameter))
        wanted = model.generate(**inputs, **settings)
        ours = [mtp.generate(**inputs, **settings, **how) for how in ({"num_draft_tokens": 0}, drafting)]
    except ValueError as refusal:
        said = str(refusal)
        assert type(model).__name__ in said or model.config.model_type in said, f"refused without a name: {said}"
        return re.split(r"[;:.] | \(|\.$", said.partition(f"{type(model).__name__} ")[2].partition(") ")[2])[0]
    for out in ours:
        assert out.tolist() == wanted.tolist()
    logits_agree(mtp)
    ids = inputs["input_ids"][2:]
    assert mtp(input_ids=ids, labels=ids)["mtp"][0].total.isfinite(), "what decodes trains as well"
    return "equal"


def verdict(cls: str, masks: bool = True) -> str:
    """A line of the table; up to its last column, if masks are not asked."""
    torch.manual_seed(0)
    model = build(NAMES[cls])
    sequential = judge(model, SequentialConfig(depth=1))
    heads = judge(model, HeadsConfig(depth=1)) if "runs by itself" in sequential else sequential
    line = f"| {cls} | {NAMES[cls]} | {sequential} | {heads if heads != sequential else ''} |"
    if not masks:
        return line
    masked = judge(build(NAMES[cls]), MaskedConfig(depth=2, lora_rank=2)) if heads == "equal" else heads
    return f"{line} {masked if masked != heads else ''} |"


def recorded() -> dict[str, str]:
    """{class: its line} of the table."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls", [cls for cls in NAMES if cls not in UNBUILT])
def test_equal_or_refused_by_name(cls):
    known = recorded().get(cls, "")
    masks = SWEEP or list(NAMES).index(cls) % 7 == 0 or not known.endswith(" |  |")
    line = verdict(cls, masks)
    if LOCKED:
        assert known.startswith(line), "docs/architectures.md is stale: see this file's first lines"


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
@pytest.mark.parametrize("adapted", [False, True])
def test_quantized_layers_are_copied_as_ordinary_ones(bits, adapted, tmp_path):
    whole = tiny_model(hidden_size=64, intermediate_size=128, head_dim=16)
    whole.save_pretrained(tmp_path)
    how = BitsAndBytesConfig(**{bits: True})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    mtp = get_mtp_model(model, SequentialConfig(depth=1))
    mine, theirs = dict(mtp.module.blocks[0].block.named_parameters()), dict(whole.model.layers[-1].named_parameters())
    assert mine.keys() == theirs.keys() and all(p.requires_grad and p.dtype == torch.float32 for p in mine.values())
    for name, parameter in mine.items():
        far = float((parameter - theirs[name]).norm() / theirs[name].norm())
        assert far < (0.02 if bits == "load_in_8bit" else 0.2) or (adapted and "q_proj" in name), (name, far)
    losses = mtp(input_ids=prompts()["input_ids"], labels=prompts()["input_ids"])["mtp"]
    losses[0].total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mine.values())
    ids = prompts()["input_ids"][2:]
    for drafts in (0, 1):
        out = mtp.generate(ids, max_new_tokens=NEW, do_sample=False, num_draft_tokens=drafts)
        assert out.tolist() == model.generate(ids, max_new_tokens=NEW, do_sample=False).tolist()


@pytest.mark.skipif(not LOCKED, reason="another transformers: other models")
def test_the_table_is_whole():
    assert {*recorded(), *UNBUILT} == set(NAMES)
    for cls, error in UNBUILT.items():
        with pytest.raises(error):
            build(NAMES[cls])
    assert sum(line.count("| equal |") for line in recorded().values()) > 85


HEAD = """# Architectures

Every causal LM class of transformers {version} that can be built tiny, decoded in a padded batch with and without
drafts, beyond its sliding windows, and held against its own `generate` and its own logits (tests/test_architectures.py
makes this table and holds it). What is not equal is refused by name before any work; nothing decides by a list of
names. The third column is of sequential modules, the fourth of parallel heads and the fifth of mask tokens where they
differ.

{equal} equal, {refused} refused; {unbuilt} could not be built this small ({names}).

| class | model type | outcome | with heads | with masks |
|---|---|---|---|---|
"""

if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = [verdict(cls) for cls in sorted(NAMES) if cls not in UNBUILT]
    equal = sum("| equal |" in row for row in rows)
    counts = {"equal": equal, "refused": len(rows) - equal, "unbuilt": len(UNBUILT), "names": ", ".join(UNBUILT)}
    sys.stdout.write(HEAD.format(version=transformers.__version__, **counts) + "\n".join(rows) + "\n")
