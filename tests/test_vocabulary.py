"""A draft vocabulary holds what answers are made of, and always what ends them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from tokenizers import Tokenizer, models, trainers

from foretell import MTPTrainer, MTPTrainingArguments, get_mtp_model
from foretell.data.vocabulary import by_tokenizer, coverage, frequent_tokens, usual_size

# answers: 7 three times, 5 twice, 9 once; prompts: 3 twice, 9 twice, 2 once
ROWS = [
    {"input_ids": [3, 9, 7, 7, 5], "labels": [-100, -100, 7, 7, 5]},
    {"input_ids": [3, 9, 2, 7, 5, 9], "labels": [-100, -100, -100, 7, 5, 9]},
]


@pytest.mark.parametrize(
    ("size", "always", "wanted"),
    [
        (1, (), [7]),
        (2, (), [5, 7]),
        (3, (), [5, 7, 9]),
        (4, (), [3, 5, 7, 9]),  # then the prompts
        (5, (), [2, 3, 5, 7, 9]),
        (7, (), [0, 1, 2, 3, 5, 7, 9]),  # then the lowest ids
        (12, (), list(range(12))),
        (3, (11,), [5, 7, 11]),
        (3, (11, 7), [5, 7, 11]),
        (2, (10, 11), [10, 11]),
    ],
)
def test_the_order_of_choice(size, always, wanted):
    ids_M = frequent_tokens(ROWS, size, vocab_size=12, always=always)
    assert ids_M.dtype == torch.long and ids_M.tolist() == wanted


def test_prompts_break_ties():
    rows = [{"input_ids": [4, 6, 1, 6], "labels": [4, 6, 1, -100]}]  # 6 also stands in a prompt; 1 is the lower id
    assert frequent_tokens(rows, 1, vocab_size=8).tolist() == [6]
    assert frequent_tokens(rows, 2, vocab_size=8).tolist() == [1, 6]


def test_rows_without_labels_are_all_answer():
    assert frequent_tokens([{"input_ids": torch.tensor([4, 4, 2])}], 1, vocab_size=8).tolist() == [4]


def test_coverage_counts_trained_tokens_only():
    assert coverage(ROWS, torch.tensor([7])) == pytest.approx(3 / 6)
    assert coverage(ROWS, [5, 7, 3]) == pytest.approx(5 / 6)
    assert coverage(ROWS, range(12)) == 1.0
    with pytest.raises(ValueError, match="without a trained token"):
        coverage([{"input_ids": [1], "labels": [-100]}], [1])


def test_sizes_and_ids_that_cannot_be():
    with pytest.raises(ValueError, match="got a size of 13, wanted between 1 .* and 12"):
        frequent_tokens(ROWS, 13, vocab_size=12)
    with pytest.raises(ValueError, match="got a size of 0"):
        frequent_tokens(ROWS, 0, vocab_size=12)
    with pytest.raises(ValueError, match="got a size of 1, wanted between 2"):
        frequent_tokens(ROWS, 1, vocab_size=12, always=(1, 2))
    with pytest.raises(ValueError, match="got token id 9, wanted ids below the target's vocabulary of 9"):
        frequent_tokens(ROWS, 2, vocab_size=9)


# -- "auto" ------------------------------------------------------------------------------------------------------------


def test_what_the_tokenizer_says_comes_before_the_lowest_ids():
    assert frequent_tokens(ROWS, 7, vocab_size=12, then=[9, 11, 8]).tolist() == [2, 3, 5, 7, 8, 9, 11]
    assert frequent_tokens([], 4, vocab_size=12, always=[6], then=[11]).tolist() == [0, 1, 6, 11]


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_a_tokenizers_own_order(kind):
    model = models.BPE() if kind == "BPE" else models.Unigram()
    trainer = (trainers.BpeTrainer if kind == "BPE" else trainers.UnigramTrainer)(
        vocab_size=60, special_tokens=["<unused0>", "<unused1>", "<pad>"], show_progress=False
    )
    tokenizer = Tokenizer(model)
    tokenizer.train_from_iterator(["the cat and the dog", "the hat", "a thing of the past", "and then"] * 3, trainer)
    size = tokenizer.get_vocab_size()
    order = by_tokenizer(SimpleNamespace(backend_tokenizer=tokenizer), size)
    said = [tokenizer.id_to_token(i) for i in order]
    assert len(set(order)) == len(order) and max(order) < size
    if kind == "BPE":
        single = [token for token in said if len(token) == 1]
        assert said[: len(single)] == single and said[len(single)] == "th", "then what was merged first"
        assert not any(token.startswith("<") for token in said), "nobody has counted those"
    else:
        scores = dict(json.loads(tokenizer.to_str())["model"]["vocab"])
        assert [scores[token] for token in said] == sorted(scores.values(), reverse=True)
    assert by_tokenizer(SimpleNamespace(backend_tokenizer=tokenizer), 5) == [i for i in order if i < 5]
    assert by_tokenizer(None, 5) == by_tokenizer(SimpleNamespace(), 5) == []


@pytest.mark.parametrize(("vocab", "size"), [(262_144, 24_576), (151_936, 17_664), (49_152, 11_264), (97, None)])
def test_how_many_usually_pay(vocab, size):
    assert usual_size(vocab) == size
    assert size is None or size % 64 == 0


GEMMA = 262_144


def test_a_vocabulary_of_gemmas_size_is_chosen_by_training(tmp_path, capsys):
    model = tiny_model("gemma2", vocab_size=GEMMA, hidden_size=8, head_dim=4, intermediate_size=8)
    model.generation_config.eos_token_id = [1, GEMMA - 38]
    mtp = get_mtp_model(model, {"method": "sequential", "draft_vocab_size": "auto"})
    assert mtp.mtp_config.draft_vocab_size == 24_576 and mtp.mtp_config is mtp.module.config
    assert {1, GEMMA - 38} <= set(mtp.module.draft_vocab_ids.tolist()), "an end can be drafted from the start"
    answer = torch.arange(200_000, 240_000, 4000).tolist()
    row = {"input_ids": [150_000, 150_001, *answer], "labels": [-100, -100, *answer]}
    unseen = {"input_ids": [5, *answer[:3], 261_000], "labels": [-100, *answer[:3], 261_000]}
    args = MTPTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to="none", save_strategy="no", eval_prompts=0
    )
    trainer = MTPTrainer(model=mtp, args=args, train_dataset=[row], eval_dataset=[unseen])
    assert "24576 tokens cover 75.0 % of the held-out answers" in capsys.readouterr().out
    trainer.train()
    kept = set(mtp.module.draft_vocab_ids.tolist())
    assert {1, GEMMA - 38, 150_000, 150_001, *answer} <= kept and 261_000 not in kept and len(kept) == 24_576
    mtp.save_pretrained(tmp_path / "module")
    again = type(mtp).from_pretrained(model, tmp_path / "module")
    assert torch.equal(again.module.draft_vocab_ids, mtp.module.draft_vocab_ids)
    before = again.module.draft_vocab_ids.clone()
    MTPTrainer(model=again, args=args, train_dataset=[unseen])
    assert torch.equal(again.module.draft_vocab_ids, before), "what was chosen stays: its weights are of these tokens"


def test_a_small_vocabulary_is_drafted_whole():
    mtp = get_mtp_model(tiny_model(), {"method": "heads", "draft_vocab_size": "auto"})
    assert mtp.mtp_config.draft_vocab_size is None and mtp.module.draft_vocab_ids is None


def test_without_an_end_token_no_vocabulary_is_taken():
    model = tiny_model()
    model.generation_config.eos_token_id = 90
    mtp = get_mtp_model(model, {"method": "sequential", "draft_vocab_size": 12})
    assert mtp.module.draft_vocab_ids.tolist() == [*range(11), 90]
    before = mtp.module.draft_vocab_ids.clone()
    with pytest.raises(ValueError, match=r"got 12 without the end tokens \[90\], wanted them among these.*Put them in"):
        mtp.module.set_draft_vocabulary(torch.arange(12))
    assert torch.equal(mtp.module.draft_vocab_ids, before)
    mtp.module.set_draft_vocabulary(torch.arange(79, 91))
    model.generation_config.eos_token_id = [90, 91, 92]
    with pytest.raises(ValueError, match="got a size of 2, wanted between 3"):
        get_mtp_model(model, {"method": "sequential", "draft_vocab_size": 2})
