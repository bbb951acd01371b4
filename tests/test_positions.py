"""Positions: every kind of rotary angles on both sides of its border, the model's length, prompts of any length.

The reference is what a fresh copy of the model generates for each row alone: transformers keeps the frequencies of the
longest text so far in the module, so that a model's own second call may differ from its first.
"""

# B sequences, T positions.

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from drafters import knowing_mtp, leaning_model
from torch import Tensor, nn

from foretell.methods.sequential import SequentialConfig
from foretell.mtp import MTPModel, get_mtp_model

BORDER = 32
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


def texts(*lengths: int) -> list[Tensor]:
    """Prompts of these lengths, each [T]."""
    return [(torch.arange(n) * 7 + 11 * i) % 90 + 3 for i, n in enumerate(lengths)]


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """One batch, left-padded."""
    T = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(T - len(row)), row]) for row in rows])
    mask = torch.stack([(torch.arange(T) >= T - len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def own(model: nn.Module, rows: list[Tensor], new: int = 12) -> list[list[int]]:
    """What fresh copies of the model generate, each row alone."""
    out = []
    for row in rows:
        ids = row[None]
        fresh = copy.deepcopy(model)
        told = fresh.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        out.append(told[0, len(row) :].tolist())
    return out


def ours(mtp: MTPModel, rows: list[Tensor], new: int = 12, **settings: Any) -> list[list[int]]:
    """The same from foretell, all rows in one batch."""
    batch = padded(rows)
    out = mtp.generate(**batch, max_new_tokens=new, do_sample=False, **settings)
    return out[:, batch["input_ids"].shape[1] :].tolist()


# -- the model's length ------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": BORDER}


@pytest.mark.parametrize("rope", [None, YARN], ids=["plain", "yarn"])
def test_prompts_of_the_models_length_and_longer_are_read_as_transformers_reads_them(rope):
    model = leaning_model("qwen2", max_position_embeddings=BORDER, **({"rope_parameters": rope} if rope else {}))
    rows = texts(BORDER - 1, BORDER, BORDER + 1, 2 * BORDER)
    assert ours(knowing_mtp(model), rows) == own(model, rows)


def test_training_rows_are_cut_to_max_length_only(tmp_path):
    from foretell.training.trainer import MTPTrainer, MTPTrainingArguments

    model = leaning_model("qwen2", max_position_embeddings=BORDER, rope_parameters=YARN)
    rows = [{"input_ids": list(range(3, 53))}] * 4
    for length, wanted in ((128, 50), (40, 40), (None, 50)):
        args = MTPTrainingArguments(str(tmp_path), max_length=length, max_steps=1, use_cpu=True, report_to=[])
        trainer = MTPTrainer(get_mtp_model(model, SequentialConfig(depth=2)), args, train_dataset=rows)
        assert {len(row["input_ids"]) for row in trainer.train_dataset} == {wanted}


def test_regenerated_answers_go_beyond_the_models_length(tmp_path):
    from tiny import tiny_tokenizer

    from foretell.training.regenerate import regenerate

    model = leaning_model("qwen2", max_position_embeddings=BORDER, rope_parameters=YARN)
    rows = texts(BORDER - 4, BORDER + 2)
    questions = [{"input_ids": [*row.tolist(), 5], "labels": [-100] * len(row) + [5]} for row in rows]
    store, _ = regenerate(knowing_mtp(model), questions, tiny_tokenizer(), tmp_path, max_new_tokens=12)
    # 1 is the end token of the tokenizer
    cut = [new[: new.index(1) + 1] if 1 in new else new for new in own(model, rows)]
    wanted = [row.tolist() + new for row, new in zip(rows, cut, strict=True)]
    assert sorted(list(row["input_ids"]) for row in store.rows()) == sorted(wanted)
