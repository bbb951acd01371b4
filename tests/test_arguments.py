"""What a caller may say to generate, through either door: it is done as transformers does it, or refused by name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from drafters import knowing_mtp, leaning_model
from test_decode import Recorder, tokenizer

import foretell
from foretell.mtp import MTPModel

IDS = torch.arange(10, 28).view(2, 9)


@functools.cache
def mtp() -> MTPModel:
    return knowing_mtp(leaning_model())


def through(door: str, ids: torch.Tensor = IDS, **settings: Any) -> Any:
    """generate by MTPModel's own door or by transformers'."""
    settings = {"max_new_tokens": 12, "do_sample": False, **settings}
    if door == "mtp":
        return mtp().generate(ids, **settings)
    return mtp().model.generate(ids, custom_generate=foretell.custom_generate(mtp()), **settings)


@pytest.fixture(params=["mtp", "model"])
def door(request: Any) -> str:
    return request.param


# -- what transformers keeps to itself ---------------------------------------------------------------------------------


def test_stop_strings_and_their_tokenizer_come_through(door):
    whole = mtp().model.generate(IDS, max_new_tokens=12, do_sample=False)
    stops = [tokenizer().decode(whole[b, 9 + 4 + b : 9 + 6 + b]) for b in (0, 1)]
    settings = {"stop_strings": stops, "tokenizer": tokenizer(), "eos_token_id": 2, "pad_token_id": 0}
    wanted = mtp().model.generate(IDS, max_new_tokens=12, do_sample=False, **settings)
    assert wanted.shape[1] < 9 + 12
    assert through(door, **settings).tolist() == wanted.tolist()


def test_stop_strings_without_a_tokenizer_are_refused(door):
    with pytest.raises(ValueError, match="tokenizer"):
        through(door, stop_strings=["a"])


def test_no_stop_strings_win_over_the_models_own(door, monkeypatch):
    monkeypatch.setattr(mtp().model.generation_config, "stop_strings", ["zzz"])
    try:
        wanted: Any = mtp().model.generate(IDS, max_new_tokens=12, do_sample=False, stop_strings=None).tolist()
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)[:40]):
            through(door, stop_strings=None)
    else:
        assert through(door, stop_strings=None).tolist() == wanted


@pytest.mark.parametrize("argument", [{"synced_gpus": True}, {"assistant_model": torch.nn.Linear(1, 1)}])
def test_what_ranks_or_assistants_need_is_refused_by_name(door, argument):
    with pytest.raises(ValueError, match=f"cannot honour: {next(iter(argument))}"):
        through(door, **argument)


def test_a_streamer_hears_the_prompt_once(door):
    theirs, ours = Recorder(), Recorder()
    mtp().model.generate(IDS[:1], max_new_tokens=12, do_sample=False, streamer=theirs)
    through(door, IDS[:1], streamer=ours)
    assert ours.told == theirs.told and ours.ends == 1


# -- our own arguments -------------------------------------------------------------------------------------------------


def test_own_arguments_in_the_call_are_honoured(door):
    out = through(door, num_draft_tokens=1, return_dict_in_generate=True)
    assert {v.depth for record in out.stats.records for v in record} == {1}
    with pytest.raises(ValueError, match="num_draft_tokens: got -1"):
        through(door, num_draft_tokens=-1)
    with pytest.raises(ValueError, match="num_draft_token"):
        through(door, num_draft_token=1)


def test_another_models_generate_is_refused():
    other = leaning_model()
    with pytest.raises(ValueError, match="custom_generate: got another model"):
        other.generate(IDS, max_new_tokens=4, custom_generate=foretell.custom_generate(mtp()))


def test_a_mask_of_another_width_is_refused(door):
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(2, 7\)|attention_mask"):
        through(door, attention_mask=torch.ones(2, 7, dtype=torch.long).index_fill(1, torch.tensor([0]), 0))
