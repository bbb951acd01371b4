"""Positions: every kind of rotary angles on both sides of its border, the model's length, prompts of any length.

The reference is what a fresh copy of the model generates for each row alone: transformers keeps the frequencies of the
longest text so far in the module, so that a model's own second call may differ from its first.
"""

# B sequences, T positions.

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from drafters import Spy, knowing_mtp, leaning_model
from torch import Tensor, nn

from foretell.methods import chain
from foretell.methods.heads import HeadsConfig
from foretell.methods.masked import MaskedConfig
from foretell.methods.sequential import SequentialConfig
from foretell.models.attention import RowMasks
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


# -- prompts of one token, and long ones -------------------------------------------------------------------------------

HEADS = ["linear", "ffn", "mha_ffn", "cnn", "identical", "medusa", "layer"]
METHODS: dict[str, Any] = {
    "sequential": lambda: SequentialConfig(depth=2),
    "shared": lambda: SequentialConfig(depth=2, shared_module=True),
    "masked": lambda: MaskedConfig(depth=2, lora_rank=4),
    **{kind: functools.partial(HeadsConfig, depth=2, head_type=kind) for kind in HEADS},
}


def module_of(method: str, model: nn.Module | None = None) -> MTPModel:
    """A module of any method, its parameters off their neutral start."""
    torch.manual_seed(3)
    mtp = get_mtp_model(model or leaning_model(), METHODS[method]()).eval()
    with torch.no_grad():
        for parameter in mtp.module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return mtp


@pytest.mark.parametrize("method", METHODS)
def test_prompts_of_one_token_beside_longer_ones(method):
    mtp = module_of(method)
    for lengths in ((1, 1, 6), (6, 1, 1), (1,), (1, 9, 1, 1, 4)):
        rows = texts(*lengths)
        wanted = own(mtp.model, rows, 5)
        for settings in ({"num_draft_tokens": 1}, {"slots": 2}, {"num_draft_tokens": "auto"}):
            assert ours(mtp, rows, 5, **settings) == wanted, (lengths, settings)
        assert len(ours(mtp, rows, 5, policy="static_k")) == len(rows)


@pytest.mark.parametrize("method", ["sequential", "shared", "mha_ffn", "layer"])
def test_modules_read_prompts_in_pieces_and_draft_the_same(method, monkeypatch):
    mtp, rows = module_of(method), texts(23, 2, 40, 1, 9)
    decoder, drafted, widths = mtp.decoder(mtp.drafter()), {}, []
    plain = RowMasks.begin

    def begin(self, lengths_B, visible, rows, **masks):
        if self is not decoder.target._masks:
            widths.append(len(lengths_B) * rows)
        return plain(self, lengths_B, visible, rows, **masks)

    monkeypatch.setattr(RowMasks, "begin", begin)
    for size in (1000, 9, 1):
        monkeypatch.setattr(chain, "READ_ROWS", size)
        monkeypatch.setattr(chain, "FEW_ROWS", min(size, 2))
        spy = Spy(mtp.drafter())
        widths.clear()
        told = ours(mtp, rows, 8, drafter=spy)
        drafted[size] = told, [(at, draft.tokens) for _, at, draft in spy.drafted]
        assert not widths or max(widths) <= max(size, len(rows) * min(size, 2))
    assert drafted[1000][1] and drafted[9] == drafted[1000] == drafted[1]


def test_a_module_reads_a_long_prompt_with_small_masks(monkeypatch):
    # what was asked for before: a mask of the whole prompt by the whole prompt for every row of the batch
    mtp, largest, plain = module_of("sequential"), [0], RowMasks.get

    def get(self, *args):
        mask = plain(self, *args)
        largest[0] = max(largest[0], 0 if mask is None else mask.numel())
        return mask

    monkeypatch.setattr(RowMasks, "get", get)
    rows = texts(900, 1100)
    assert ours(mtp, rows, 2) == own(mtp.model, rows, 2)
    assert largest[0] <= 2 * 2 * 512 * 1152, "two prompts, two heads a group, a piece of 512 rows of the target"
