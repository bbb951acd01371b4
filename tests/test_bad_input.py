"""What cannot work is one clear error before any work, or a fallback that is said. Files of measured kernels: see
test_kernels; draft vocabularies without an end: test_vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_model

import foretell
from foretell import HeadsConfig, MTPModel, cartesian_tree, get_mtp_model
from foretell.trl import SFTConfig, SFTTrainer

SHIPPED = sorted(path.parent for path in (Path(foretell.__file__).parent / "modules").glob("*/mtp_config.json"))


def prompts() -> torch.Tensor:
    return torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["sequential", "heads", "masked"])
def test_a_module_of_numbers_that_nothing_computes_with(method):
    mtp = get_mtp_model(tiny_model(), {"method": method, "depth": 2})
    ids_BT = prompts()
    wanted = mtp.model.generate(ids_BT, max_new_tokens=8, do_sample=False)
    mtp.module.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"got weights of float8_e4m3fn, wanted 16 bits or more.*torch.bfloat16"):
        mtp.generate(ids_BT, max_new_tokens=8, do_sample=False)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        mtp.module.to(dtype)
        assert torch.equal(mtp.generate(ids_BT, max_new_tokens=8, do_sample=False, num_draft_tokens=2), wanted)
    with pytest.raises(ValueError, match="draft_dtype: got 'int8' for a module of float64 on cpu, wanted one of auto"):
        mtp.generate(ids_BT, max_new_tokens=8, do_sample=False, draft_dtype="int8")


def test_a_tree_wider_than_any_cache_so_far():
    """Hundreds of rows for a text of a few tokens: storage grows to what a round needs."""
    mtp = get_mtp_model(tiny_model(), HeadsConfig(depth=3))
    ids_BT, tree = prompts(), cartesian_tree((97, 5, 1))
    assert len(tree) > 1000
    wanted = mtp.model.generate(ids_BT, max_new_tokens=8, do_sample=False)
    out = mtp.generate(ids_BT, max_new_tokens=8, do_sample=False, draft_tree=tree, num_draft_tokens=3)
    assert torch.equal(out, wanted)


def test_a_tree_of_more_guesses_than_there_are_tokens():
    mtp = get_mtp_model(tiny_model(), HeadsConfig(depth=2, draft_vocab_size=10))
    ids_BT = prompts()
    wanted = mtp.model.generate(ids_BT, max_new_tokens=8, do_sample=False)
    tree = [(rank,) for rank in range(200)]
    out = mtp.generate(ids_BT, max_new_tokens=8, do_sample=False, draft_tree=tree, num_draft_tokens=2)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_a_shipped_module_on_another_target(folder, name):
    model = tiny_model(name)
    assert foretell.shipped(model) is None
    with pytest.raises(ValueError, match=r"does not fit this model: .*hidden_size: module was trained for 576, .* 32"):
        MTPModel.from_pretrained(model, folder)


def test_a_module_on_a_model_that_has_one(tmp_path):
    target = tiny_model()
    mtp = get_mtp_model(target, HeadsConfig(depth=2))
    mtp.save_pretrained(tmp_path)
    for make in (
        lambda: get_mtp_model(mtp, HeadsConfig(depth=2)),
        lambda: MTPModel.from_pretrained(mtp, tmp_path),
        lambda: SFTTrainer(mtp, SFTConfig(mtp_enabled=True, output_dir=str(tmp_path), use_cpu=True, bf16=False)),
    ):
        with pytest.raises(ValueError, match=r"model: got an MTPModel.*\.model"):
            make()
    assert isinstance(get_mtp_model(mtp.model, HeadsConfig(depth=2)), MTPModel)
