"""TRL's RLOOTrainer as its GRPOTrainer; and what a trainer that rolls out refuses by its data and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from drafters import leaning_model
from test_grpo import BASE, LORA, column, copied, liked, module, prompts, same, timeless
from tiny import tiny_tokenizer

from foretell.cli import main
from foretell.trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig

assert module  # a fixture


def made_of(kind: Any, config: Any, folder: Path, rows: Any = None, **settings: Any) -> Any:
    given = {name: settings.pop(name) for name in ("peft_config", "reward_funcs") if name in settings}
    return kind(
        model=leaning_model(), **{"reward_funcs": liked, **given}, processing_class=tiny_tokenizer(),
        args=config(output_dir=str(folder), **{**BASE, **settings}), train_dataset=prompts() if rows is None else rows,
    )  # fmt: skip


def rloo(folder: Path, **settings: Any) -> Any:
    return made_of(RLOOTrainer, RLOOConfig, folder, beta=0.0, **settings)


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_off_and_disabled_and_standalone_are_trls_rloo_to_the_bit(peft, module, tmp_path):
    settings = {"max_grad_norm": 0.05, "gradient_accumulation_steps": 3, "peft_config": peft}
    plain = made_of(trl.RLOOTrainer, trl.RLOOConfig, tmp_path, beta=0.0, **settings)
    plain.train()
    wanted = copied(plain.model)
    off = rloo(tmp_path, **settings)
    off.train()
    assert same(off.model, wanted) and timeless(off) == timeless(plain)
    for mode in ("disabled", "standalone", "joint"):
        made = rloo(tmp_path, mtp_module=module, mtp_drafter="none", mtp_training_mode=mode, **settings)
        before = copied(made.mtp.module)
        made.train()
        assert same(made.mtp.model, wanted) == (mode != "joint"), mode
        assert same(made.mtp.module, before) == (mode == "disabled")


def test_rloo_accumulation_cannot_be_seen(module, tmp_path):
    runs = []
    for batch, steps in ((8, 1), (2, 4)):
        made = rloo(tmp_path, mtp_module=module, mtp_training_mode="standalone", per_device_train_batch_size=batch,
                    gradient_accumulation_steps=steps, optim="sgd", max_grad_norm=0.0, max_steps=1,
                    num_speculative_tokens=2)  # fmt: skip
        made.train()
        runs.append((copied(made.mtp), column(made, "mtp_loss")[0], column(made, "rollout/tau")[0]))
    assert runs[0][1:] == pytest.approx(runs[1][1:], rel=1e-5) and runs[0][2] > 1
    assert all(torch.allclose(runs[0][0][n], runs[1][0][n], atol=2e-6) for n in runs[0][0])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": "w3 w4", "answer": "w5"}] * 8, "train_dataset: got columns question, answer; wanted prompt"),
        ([{"prompt": "w3"}] * 7 + [{"prompt": None}], "train_dataset: got the prompt None in row 7"),
        ([{"prompt": 3}] * 8, "train_dataset: got the prompt 3 in row 0"),
        ([], "train_dataset: got no rows"),
    ],
)
def test_rows_without_prompts_are_refused(rows, said, module, tmp_path):
    with pytest.raises(ValueError, match=said):
        made_of(GRPOTrainer, GRPOConfig, tmp_path, Dataset.from_list(rows), mtp_module=module)


def test_a_prompt_without_a_token_is_refused(module, tmp_path):
    made = made_of(GRPOTrainer, GRPOConfig, tmp_path, Dataset.from_list([{"prompt": ""}] * 8), mtp_module=module)
    with pytest.raises(ValueError, match="prompt: got an empty one"):
        made.train()


@pytest.mark.parametrize(
    "value", ["a", [1.0], 1j, 10**400, torch.tensor(torch.nan)], ids=["text", "list", "complex", "huge", "nan"]
)
def test_rewards_that_are_no_numbers_are_refused(value, module, tmp_path):
    def given(completions: list[str], **_: Any) -> list[Any]:
        return [value] * len(completions)

    with pytest.raises(ValueError, match="reward_funcs: given gave .* to completion 0, wanted a finite number"):
        made_of(GRPOTrainer, GRPOConfig, tmp_path, mtp_module=module, reward_funcs=given).train()
    with pytest.raises(ValueError, match="reward_funcs: got 3"):
        made_of(GRPOTrainer, GRPOConfig, tmp_path, mtp_module=module, reward_funcs=3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mtp_training_mode": "frozen"}, "mtp_training_mode: got 'frozen', wanted one of disabled, standalone, joint"),
        ({"mtp_supervision": "label"}, "mtp_supervision: got 'label', wanted one of labels, teacher"),
        ({"mtp_loss_scaling_factor": float("nan")}, "mtp_loss_scaling_factor: got nan"),
        ({"mtp_loss_scaling_factor": "a lot"}, "mtp_loss_scaling_factor: got 'a lot', wanted a number of at least 0"),
        ({"mtp_learning_rate": -0.1}, "mtp_learning_rate: got -0.1, wanted a number"),
        ({"mtp_learning_rate": float("nan")}, "mtp_learning_rate: got nan, wanted a number"),
        ({"mtp_muon_learning_rate": True}, "mtp_muon_learning_rate: got True, wanted a number"),
        ({"mtp_depth_beta": "1e-1"}, "mtp_depth_beta: got '1e-1', wanted a number"),
        ({"mtp_depth_one_first": None}, "mtp_depth_one_first: got None, wanted a number of at least 0 and below 1"),
        ({"mtp_heads_first_steps": 2.5}, "mtp_heads_first_steps: got 2.5, wanted a whole number"),
        ({"eval_prompts": -1}, "eval_prompts: got -1, wanted a whole number of at least 0"),
        ({"generation_kwargs": {"min_new_token": 2}}, "got 'min_new_token', did you mean min_new_tokens"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "num_generations says how many"),
    ],
)
def test_settings_that_nobody_knows_are_refused(settings, said, module, tmp_path):
    with pytest.raises(ValueError, match=said):
        GRPOConfig(output_dir=str(tmp_path), mtp_module=module, **BASE | settings)
    if "generation_kwargs" not in settings:
        with pytest.raises(ValueError, match=said.split(": ")[1].split(",")[0]):
            SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, mtp_enabled=True, **settings)


@pytest.mark.parametrize("steps", [2.5, True, "2", None, -1])
def test_warmup_steps_are_counted(steps, module, tmp_path):
    with pytest.raises(ValueError, match=f"mtp_warmup_steps: got {steps!r}, wanted a whole number of at least 0"):
        GRPOConfig(output_dir=str(tmp_path), mtp_module=module, **BASE, mtp_warmup_steps=steps)


def test_a_rate_of_zero_is_zero(module, tmp_path):
    """No other stands for it: the module stays what it is."""
    how: dict[str, Any] = {
        "mtp_module": module,
        "mtp_training_mode": "standalone",
        "max_steps": 1,
        "learning_rate": 0.1,
    }
    for rate, stays in ((0.0, True), (1e-3, False), (None, False)):
        made = made_of(GRPOTrainer, GRPOConfig, tmp_path, mtp_learning_rate=rate, **how)
        before = copied(made.mtp.module)
        made.train()
        assert same(made.mtp.module, before) is stays


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ("", (), "rows.jsonl, which is empty"),
        ('{"prompt": "w3"}\n', ("--eval_strategy", "steps"), "dataset_test_split: got 'test', wanted one of train"),
        ('{"question": "w3"}\n', (), "train_dataset: got columns question; wanted prompt among them"),
    ],
)
def test_the_command_line_says_what_is_wrong_with_its_data(rows, more, said, tmp_path, capsys):
    leaning_model().save_pretrained(tmp_path / "policy")
    tiny_tokenizer().save_pretrained(tmp_path / "policy")
    (tmp_path / "rows.jsonl").write_text(rows)
    given = {"model_name_or_path": tmp_path / "policy", "dataset_name": tmp_path / "rows.jsonl", "output_dir": tmp_path,
             "reward_funcs": "get_soft_overlong_punishment", "mtp_drafter": "history", "use_cpu": "true",
             "bf16": "false", "report_to": "none"}  # fmt: skip
    assert main(["grpo", *(word for name, value in given.items() for word in (f"--{name}", str(value))), *more]) == 2
    assert said in capsys.readouterr().err


def test_the_command_line_resumes(module, tmp_path, capsys):
    """--resume_from_checkpoint true is Trainer's True, no folder of that name."""
    leaning_model().save_pretrained(tmp_path / "policy")
    tiny_tokenizer().save_pretrained(tmp_path / "policy")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w3 w4"}\n' * 8)
    given = {"model_name_or_path": tmp_path / "policy", "dataset_name": tmp_path / "rows.jsonl", "output_dir": tmp_path,
             "reward_funcs": "get_soft_overlong_punishment", "mtp_module": module, "use_cpu": "true", "bf16": "false",
             "report_to": "none", "max_completion_length": 4, "num_generations": 4, "per_device_train_batch_size": 4,
             "save_steps": 1, "logging_steps": 1}  # fmt: skip
    words = ["grpo", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]
    assert main([*words, "--max_steps", "1"]) == 0
    assert main([*words, "--max_steps", "2", "--resume_from_checkpoint", "true"]) == 0
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2]
