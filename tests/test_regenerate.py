"""Answers that the target makes for training are those of its own generate, kept once, whatever happens meanwhile."""

from __future__ import annotations

import json

import pytest
import torch
from drafters import leaning_model
from tiny import VOCAB, tiny_tokenizer

from foretell.cli.loading import chat_template
from foretell.cli.train import main
from foretell.data.cache import HiddenStore
from foretell.data.collate import MTPCollator
from foretell.data.prompts import encode_rows
from foretell.methods.sequential import SequentialConfig
from foretell.mtp import get_mtp_model
from foretell.training.regenerate import read_given, regenerate, split_given

PROMPTS = [[25, 29, 30], [7], [40, 41, 42, 43, 44, 45, 46], [9, 9, 9, 9], [60, 3], [25, 29, 31]]


def asking(prompts: list[list[int]]) -> list[dict]:
    return [{"prompt": " ".join(f"w{token}" for token in prompt)} for prompt in prompts]


def made(model, folder, prompts=PROMPTS, **settings):
    mtp = get_mtp_model(model, SequentialConfig(depth=1))
    store, stats = regenerate(mtp, asking(prompts), tiny_tokenizer(), folder, max_new_tokens=12, **settings)
    return [row["input_ids"] for row in store.rows()], stats, store


def own(model, prompt: list[int]) -> list[int]:
    """What the model's own generate says to this prompt alone; 1 ends the tokenizer's texts."""
    eos = model.generation_config.eos_token_id or 1
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, eos_token_id=eos)[0].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [31, 32, 33]},
        {"min_new_tokens": 3, "eos_token_id": list(range(1, 60))},
        {"eos_token_id": [1, *range(40, 60)]},
    ],
    ids=lambda settings: ",".join(settings) or "greedy",
)
def test_answers_are_those_of_the_models_own_generate(settings, tmp_path):
    model = leaning_model()
    model.generation_config.update(**settings)
    answers, _, store = made(model, tmp_path)
    assert answers == [own(model, prompt) for prompt in PROMPTS]
    for row, prompt in zip(store, PROMPTS, strict=True):
        ids, labels = row["input_ids"], row["labels"]
        assert labels == [-100] * len(prompt) + ids[len(prompt) :]  # a cut answer ends in nothing that was not said
        with torch.no_grad():
            states_TD = model.model(torch.tensor([ids])).last_hidden_state[0]
        assert torch.allclose(row["hidden_states"][:-1], states_TD[:-1], atol=1e-4)


def test_settings_that_cannot_be_honoured_are_named_before_any_answer(tmp_path):
    model = leaning_model()
    model.generation_config.update(num_beams=3)
    with pytest.raises(ValueError, match="beam"):
        made(model, tmp_path)
    model.generation_config.update(num_beams=1, encoder_repetition_penalty=1.5)
    with pytest.raises(ValueError, match="continuous batches with EncoderRepetitionPenalty"):
        made(model, tmp_path / "penalty")
    with pytest.raises(ValueError, match=r"rows\[1\]: got token id 96, wanted ids below"):
        made(leaning_model(vocab_size=VOCAB - 1), tmp_path / "other", [[5], [96]])


@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True, "temperature": 0.9, "top_k": 0}], ids=["greedy", "sample"]
)
def test_a_stopped_run_goes_on_to_the_same_answers(settings, tmp_path):
    model = leaning_model()
    model.generation_config.update(**settings)
    whole, _, _ = made(model, tmp_path / "whole", slots=2)
    asked = iter(range(100))
    some, _, _ = made(model, tmp_path / "parts", slots=2, deadline=lambda: next(asked) > 8)
    assert 0 < len(some) < len(whole)
    rest, stats, _ = made(model, tmp_path / "parts", slots=2)
    assert rest == whole and stats is not None
    again, stats, _ = made(model, tmp_path / "parts", slots=2)
    assert again == whole and stats is None
    if settings:
        with pytest.raises(ValueError, match="seed: the folder has 0, this run 1"):
            made(model, tmp_path / "parts", seed=1)


def test_another_generation_config_is_another_store(tmp_path):
    model = leaning_model()
    made(model, tmp_path)
    model.generation_config.update(repetition_penalty=1.2)
    with pytest.raises(ValueError, match="generation: the folder has .* cannot resume|cannot resume"):
        made(model, tmp_path)


def test_only_the_answers_that_were_asked_for_are_seen(tmp_path):
    model = leaning_model()
    both, _, _ = made(model, tmp_path, PROMPTS)
    assert made(model, tmp_path, PROMPTS[3:0:-1])[0] == both[3:0:-1]


def test_shares_of_a_killed_run_are_brought_in_first(tmp_path):
    model = leaning_model()
    wanted, _, _ = made(model, tmp_path / "whole")
    made(model, tmp_path / "store", PROMPTS[:2])
    made(model, tmp_path / "store" / "share-1", PROMPTS[1:4])
    answers, stats, _ = made(model, tmp_path / "store", PROMPTS)
    assert answers == wanted and len(stats.records) == 2 and not (tmp_path / "store" / "share-1").exists()


def test_dropout_of_a_training_target_is_off_while_it_answers(tmp_path):
    model = leaning_model(attention_dropout=0.5).train()
    wanted, _, _ = made(model.eval(), tmp_path / "one")
    answers, _, _ = made(model.train(), tmp_path / "other")
    assert answers == wanted and model.training


def saved(tmp_path):
    model = leaning_model()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


ARGUMENTS = ["--depth", "1", "--max-steps", "1", "--use-cpu", "--report-to", "none", "--save-strategy", "no"]


def test_prompts_alone_are_enough_to_train(tmp_path, capsys):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in asking([*PROMPTS, *([n, n + 1] for n in range(50, 67))])))
    out = tmp_path / "out"
    given = ["--regenerate", "--regenerate-max-new-tokens", "6", "--eval-new-tokens", "4", *ARGUMENTS]
    assert main([str(saved(tmp_path)), "--data", str(rows), "--output-dir", str(out), *given]) == 0
    assert len(HiddenStore.load(out / "answers")) == 23 and "tau" in capsys.readouterr().out


def test_bad_evaluation_rows_are_said_before_the_target_answers(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in asking(PROMPTS)))
    (tmp_path / "eval.jsonl").write_text('{"text": "w5 w6 w7"}\n{"messages": [{"role": "user", "content": "w5"}]}')
    given = ["--data", str(tmp_path / "rows.jsonl"), "--eval-data", str(tmp_path / "eval.jsonl"), "--regenerate"]
    with pytest.raises(ValueError, match=r"eval.jsonl, line 2: got a conversation, but the tokenizer has no chat"):
        main([str(saved(tmp_path)), *given, "--output-dir", str(tmp_path / "out"), *ARGUMENTS])
    assert not (tmp_path / "out" / "answers").exists()


def test_a_run_is_told_its_chat_template_and_to_skip_bad_rows(tmp_path, capsys):
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ 'w3 ' if m.role == 'user' else 'w4 ' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }} w1{% endgeneration %}{% else %}{{ m.content }}{% endif %} {% endfor %}"
        "{% if add_generation_prompt %}w4 {% endif %}"
    )
    turns = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8 w9 w20"}]
    rows = [{"messages": turns}] * 8 + [{"messages": turns[1:]}] + [{"messages": turns}] * 8 + [{"text": 3}]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    out = str(tmp_path / "out")
    given = [
        str(saved(tmp_path)),
        "--data",
        str(data),
        "--output-dir",
        out,
        *ARGUMENTS,
        "--chat-template",
        str(template),
    ]
    with pytest.raises(ValueError, match=r"rows.jsonl, line 18: text: got int 3"):
        main(given)
    with pytest.warns(UserWarning, match=r"rows.jsonl, line 9: messages\[0\]: got an assistant turn"):
        assert main([*given, "--skip-bad-rows", "true"]) == 0
    assert "module saved" in capsys.readouterr().out


def test_chat_templates_by_name(tmp_path):
    tokenizer = tiny_tokenizer()
    qwen = chat_template("qwen3_training", tokenizer)
    assert "generation" in qwen
    tokenizer.chat_template = chat_template("qwen3", tokenizer)
    assert chat_template("auto", tokenizer) == qwen
    tokenizer.chat_template = "{{ messages }}"
    assert chat_template("auto", tokenizer) == "{{ messages }}"
    with pytest.raises(
        ValueError, match="chat_template: got 'qwen99', wanted a file, 'auto', or one of TRL's: .*qwen3"
    ):
        chat_template("qwen99", tokenizer)


# -- given texts -------------------------------------------------------------------------------------------------------

TEXTS = [
    {"prompt": "w25 w29", "completion": " w30 w31 w32 w33"},
    {"text": "w40 w41 w42 w43 w44 w45 w46"},
    {"prompt": "w7", "completion": " w9 w9 w60"},
]


@pytest.mark.parametrize("method", ["sequential", "masked"])
def test_given_texts_teach_what_the_target_would_say(method, tmp_path):
    """Labels of what was read are a hard teacher's on the same text, and its states are those of a forward."""
    model, tokenizer = leaning_model(), tiny_tokenizer()
    mtp = get_mtp_model(model, {"method": method, "depth": 2})
    store = read_given(mtp, TEXTS, tokenizer, tmp_path)
    plain, _ = encode_rows(TEXTS, tokenizer)
    assert len(store) == 3 and all(key.startswith("given-") for key in store.keys())  # noqa: SIM118 (not a dict)
    differ = 0
    for row, text in zip(store, plain, strict=True):
        assert row["input_ids"] == text["input_ids"]
        with torch.no_grad():
            out = model(torch.tensor([text["input_ids"]]), output_hidden_states=True)
        said = [-100, *out.logits[0, :-1].argmax(-1).tolist()]
        trained = [i > 0 and label != -100 for i, label in enumerate(text["labels"])]
        assert row["labels"] == [label if counts else -100 for label, counts in zip(said, trained, strict=True)]
        assert torch.allclose(row["hidden_states"], out.hidden_states[-1][0], atol=1e-5)
        differ += sum(label not in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    assert differ > 3, "else the text itself would have taught the same"
    collator = MTPCollator(0)
    read = mtp(**collator([dict(row) for row in store]), mtp_supervision="labels")["mtp"]
    taught = mtp(**collator(plain), mtp_supervision="teacher_hard")["mtp"]
    text = mtp(**collator(plain), mtp_supervision="labels")["mtp"]
    for one, other, wrong in zip(read, taught, text, strict=True):
        assert (
            float(one.total.detach()) == pytest.approx(float(other.total.detach()), rel=1e-4)
            and one.count == other.count
        )
        assert float(one.total.detach()) != pytest.approx(float(wrong.total.detach()), rel=1e-2)


def test_what_was_read_is_not_read_again(tmp_path, monkeypatch):
    mtp, tokenizer = get_mtp_model(leaning_model(), SequentialConfig(depth=1)), tiny_tokenizer()
    begun = []
    read_given(mtp, TEXTS, tokenizer, tmp_path, deadline=lambda: bool(begun) or begun.append(1))
    assert len(HiddenStore.load(tmp_path)) == 1
    whole, reads = mtp.target.forward_text, []
    monkeypatch.setattr(mtp.target, "forward_text", lambda *given: (reads.append(1), whole(*given))[1])
    assert len(read_given(mtp, TEXTS, tokenizer, tmp_path)) == 3 and len(reads) == 2
    with pytest.raises(ValueError, match="holds answers made otherwise"):
        made(leaning_model(), tmp_path)


def test_a_share_of_the_rows_is_read(tmp_path, capsys):
    rows = [*asking([[n, n + 1] for n in range(50, 60)]), *TEXTS, *TEXTS[:1] * 7]
    rows = [
        {**row, "prompt": f"w{n} {row['prompt']}"} if "completion" in row else row for n, row in enumerate(rows, 30)
    ]
    asked, given = split_given(rows, 0.25, seed=0)
    assert (len(asked), len(given)) == (15, 5) and {"text": TEXTS[1]["text"]} in given
    assert not [row for row in given if set(row) == {"prompt"}] and split_given(rows, 0.0, 0)[1] == [TEXTS[1]]
    data, held, out = tmp_path / "rows.jsonl", tmp_path / "held.jsonl", tmp_path / "out"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    held.write_text(json.dumps(TEXTS[0]))
    settings = [str(saved(tmp_path)), "--data", str(data), "--eval-data", str(held), "--output-dir", str(out)]
    settings += ["--regenerate-max-new-tokens", "6", "--given-share", "0.25", "--eval-new-tokens", "4", *ARGUMENTS]
    with pytest.raises(ValueError, match="given_share: got 0.25, wanted 0 to 1, and only with --regenerate"):
        main(settings)
    assert main([*settings, "--regenerate"]) == 0
    assert "15 answers, 5 given texts of " in capsys.readouterr().out
    notes = json.loads((out / "mtp_config.json").read_text())["notes"]["training"]
    assert (notes["answers"], notes["given_texts"]) == (15, 5) and notes["given_tokens"] > 15
