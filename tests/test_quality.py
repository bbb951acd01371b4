"""benchmarks/quality.py tells tau without decoding: round by round what decoding gives."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from drafters import leaning_model

from foretell.mtp import get_mtp_model

SPEC = importlib.util.spec_from_file_location("quality", Path(__file__).parents[1] / "benchmarks" / "quality.py")
quality = importlib.util.module_from_spec(SPEC)
sys.modules["quality"] = quality
SPEC.loader.exec_module(quality)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "sequential", "shared_module": True},
        {"method": "heads", "head_type": "medusa", "init_strategy": "copy_lm_head", "markov_rank": 4},
    ],
    ids=["sequential", "heads with a bigram"],
)
def test_simulated_rounds_are_those_of_decoding(settings):
    torch.manual_seed(0)
    mtp = get_mtp_model(leaning_model(), {**settings, "depth": 3})
    with torch.no_grad():
        for parameter in mtp.module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    mtp.eval()
    asked = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    gained = missed = 0
    for drafts in (1, 3):
        out = mtp.generate(torch.randint(2, 90, (4, 5)), num_draft_tokens=drafts, return_dict_in_generate=True, **asked)
        for ids, record in zip(out.sequences.tolist(), out.stats.records, strict=True):
            row = {"input_ids": ids, "labels": [-100] * 5 + ids[5:]}
            with torch.no_grad():
                states = mtp.target.forward_text(torch.tensor([ids]), torch.arange(len(ids))[None])
            chance_KT, first = quality.holds(mtp, {**row, "hidden_states": states.post_norm_BRD[0]}, None)
            assert quality.expected_rounds(chance_KT, first, drafts) == (24, len(record))
            gained += 24 - len(record)
            wrong, _ = quality.holds(mtp, {**row, "hidden_states": states.post_norm_BRD[0].roll(1, 0)}, None)
            missed += quality.expected_rounds(wrong, first, drafts)[1] != len(record)
    assert gained and missed, (gained, missed)
