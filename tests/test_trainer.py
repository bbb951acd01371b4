"""Training gives the same numbers however it is cut up, goes on where it stopped to the last bit, keeps what it says.

Runs that must agree are compared by their worst step and by their mean drift: a wrong count shows in the first, a small
bias in the second. The optimizer is plain SGD without clipping where scales matter, since Adam and clipping hide them.
"""

# T positions, K depths, D hidden width.

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from foretell.data.collate import MTPCollator
from foretell.mtp import MTPModel, get_mtp_model
from foretell.training.mtp_training import last_complete_checkpoint
from foretell.training.tau import prompt_of, with_estimate
from foretell.training.trainer import MTPTrainer, MTPTrainingArguments
from foretell.types import IGNORE_INDEX
from tests.test_prompts import chat, make_tokenizer
from tests.tiny import VOCAB, tiny_config, tiny_model

# transformers' name of it, from 5.23 on and before
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in MTPTrainingArguments.__dataclass_fields__
)
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Each train() collects garbage: 0.2 s over all that torch and transformers hold, unless that is set aside."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def make(method: dict[str, Any] | None = None, seed: int = 0, **model: Any) -> MTPModel:
    """A tiny Llama with a sequential module of depth 2; seed: of the module's start, the target is always the same."""
    target = tiny_model(**model)
    torch.manual_seed(seed)
    return get_mtp_model(target, {"method": "sequential", "depth": 2, "initialisation": "copy", **(method or {})})


def rows(count: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of 5 to 20 tokens with very different numbers of trained ones."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        length = int(torch.randint(5, 21, (), generator=generator))
        prompt = int(torch.randint(1, length - 3, (), generator=generator))
        ids = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
        out.append({"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:]})
    return out


def trainer_of(mtp: MTPModel, folder: Path, data: Any = None, **arguments: Any) -> MTPTrainer:
    args = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
    }
    own = {name: arguments.pop(name) for name in ("processing_class", "eval_dataset") if name in arguments}
    settings = MTPTrainingArguments(output_dir=str(folder), **{**args, **arguments})
    return MTPTrainer(mtp, settings, rows() if data is None else data, **own)


def run(mtp: MTPModel, folder: Path, data: Any = None, **arguments: Any) -> list[dict[str, float]]:
    """Train, and return what was logged at each step."""
    trainer = trainer_of(mtp, folder, data, **arguments)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def column(logs: list[dict[str, float]], name: str) -> Tensor:
    return torch.tensor([entry[name] for entry in logs], dtype=torch.float64)


def assert_same_run(
    logs: list[dict], wanted: list[dict], names: tuple[str, ...] = ("loss",), tolerance: float = 1e-5
) -> None:
    """Worst step within the tolerance, and no drift: the mean of signed differences far below it."""
    assert len(logs) == len(wanted) > 2
    for name in names:
        off = (column(logs, name) - column(wanted, name)) / column(wanted, name).abs().clamp(min=1e-6)
        assert float(off.abs().max()) < tolerance, name
        assert abs(float(off.mean())) < tolerance / 2, name


def assert_same_weights(mtp: MTPModel, other: MTPModel, tolerance: float = 1e-5) -> None:
    wanted = other.state_dict()
    for name, tensor in mtp.state_dict().items():
        assert float((tensor - wanted[name]).norm()) <= tolerance * float(wanted[name].norm()), name


def bits_differ(mtp: MTPModel, state: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in mtp.state_dict().items() if not torch.equal(tensor, state[name])}


def copied(mtp: MTPModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in mtp.state_dict().items()}


def test_the_comparison_itself_can_fail():
    logs = [{"loss": 1.0 + i} for i in range(5)]
    assert_same_run(logs, logs)
    worst = [dict(entry) for entry in logs]
    worst[3]["loss"] *= 1.0001
    drift = [{"loss": entry["loss"] * (1 + 0.7e-5)} for entry in logs]
    for wrong in (worst, drift, [{"loss": 0.0}] * 5, [{"loss": -entry["loss"]} for entry in logs]):
        with pytest.raises(AssertionError):
            assert_same_run(wrong, logs)


# -- invariance --------------------------------------------------------------------------------------------------------

NAMES = ("loss", "mtp_loss", "grad_norm", "accuracy_1", "accuracy_2")


@pytest.mark.parametrize("mode", ["standalone", "joint"])
def test_accumulation_cannot_be_seen(mode, tmp_path):
    names = (*NAMES, "ntp_loss") if mode == "joint" else NAMES
    runs = []
    for size, steps in ((8, 1), (1, 8), (2, 4)):
        mtp = make()
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        runs.append((mtp, run(mtp, tmp_path, mtp_training_mode=mode, **sizes, **SGD)))
    (mtp, logs), *others = runs
    assert float(column(logs, "loss").std()) > 1e-3
    for other, other_logs in others:
        assert_same_run(other_logs, logs, names)
        assert_same_weights(other, mtp)


def test_a_last_step_of_fewer_batches_is_logged_and_weighted_as_any_other(tmp_path):
    # 5 batches in steps of 2: the epoch's last step holds one batch
    runs = []
    for size, steps in ((1, 2), (2, 1)):
        mtp = make()
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        runs.append((mtp, run(mtp, tmp_path, rows(5), max_steps=6, **sizes, **SGD)))
    assert_same_run(runs[0][1], runs[1][1], NAMES)
    assert_same_weights(runs[0][0], runs[1][0])


@pytest.mark.parametrize("logging_steps", [2, 3])
def test_logging_seldom_gives_the_mean_of_logging_always(logging_steps, tmp_path):
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    always = run(make(), tmp_path, **sizes, **SGD)
    seldom = run(make(), tmp_path, logging_steps=logging_steps, **sizes, **SGD)
    for name in ("loss", "mtp_loss"):
        wanted = column(always, name).view(-1, logging_steps).mean(1)
        assert torch.allclose(column(seldom, name), wanted, rtol=1e-5)


@pytest.mark.parametrize("mode", ["standalone", "joint"])
def test_packing_cannot_be_seen(mode, tmp_path):
    data = [{"input_ids": r["input_ids"], "labels": r["labels"]} for r in rows(9)]
    runs = []
    for packing in (False, True):
        mtp = make({"depth": 3})
        # every step reads all rows, in whatever order
        sizes = {"per_device_train_batch_size": 16, "packing": packing, "max_length": 40}
        trainer = trainer_of(mtp, tmp_path, data, mtp_training_mode=mode, max_steps=4, **sizes, **SGD)
        assert (len(trainer.train_dataset) < len(data)) == packing
        trainer.train()
        runs.append((mtp, [entry for entry in trainer.state.log_history if "loss" in entry]))
    assert_same_run(runs[1][1], runs[0][1], ("loss", "mtp_loss", "grad_norm", "accuracy_1", "accuracy_3"))
    assert_same_weights(runs[1][0], runs[0][0])


def test_a_micro_batch_without_mtp_labels_contributes_nothing(tmp_path):
    full = rows(1)[0]
    ids = list(range(10, 20))
    masked = {"input_ids": ids, "labels": [IGNORE_INDEX, ids[1]] + [IGNORE_INDEX] * 8}  # only depth 0 has a label
    runs = []
    for data in ([full], [full, masked], [masked]):
        mtp = make()
        before = copied(mtp)
        sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(data)}
        logs = run(mtp, tmp_path, data, max_steps=3, **sizes, **SGD)
        runs.append((mtp, logs, bits_differ(mtp, before)))
    assert_same_run(runs[1][1], runs[0][1], NAMES)
    assert_same_weights(runs[1][0], runs[0][0], tolerance=1e-7)
    assert runs[0][2] and not runs[2][2]
    assert column(runs[2][1], "loss").tolist() == [0.0] * 3 == column(runs[2][1], "grad_norm").tolist()


def test_rows_shorter_than_the_depth_train_the_target_alone(tmp_path):
    # a batch of only short rows must not end a run that passed the check of its longest row
    data = [*rows(2), {"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    runs = []
    for size, steps in ((1, 4), (4, 1)):
        mtp = make({"depth": 3})
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        runs.append((mtp, run(mtp, tmp_path, data, mtp_training_mode="joint", max_steps=3, **sizes, **SGD)))
    assert_same_run(runs[0][1], runs[1][1], (*NAMES, "ntp_loss"))
    assert_same_weights(runs[0][0], runs[1][0])


def test_the_target_is_clipped_as_if_there_were_no_module(tmp_path):
    states, norms = {}, {}
    clipping = {"max_grad_norm": 0.05, "learning_rate": 1e-2}
    for mode in ("disabled", "standalone", "joint"):
        mtp = make()
        norms[mode] = column(run(mtp, tmp_path, mtp_training_mode=mode, train_target=True, **clipping), "grad_norm")
        states[mode] = {n: t for n, t in copied(mtp).items() if n.startswith("model.")}
    assert float(norms["disabled"].min()) > 0.05  # clipped at every step
    assert all(torch.equal(states["standalone"][name], tensor) for name, tensor in states["disabled"].items())
    assert not all(torch.equal(states["joint"][name], tensor) for name, tensor in states["disabled"].items())
    assert (norms["standalone"] > norms["disabled"]).all()  # what is logged is both together


def test_the_loss_scale_of_fp16_is_taken_back_once_a_step(tmp_path, monkeypatch):
    # torch's GradScaler refuses a second time; accelerate scales on GPUs only, so here calls are counted
    trainer = trainer_of(make(), tmp_path, mtp_training_mode="joint", max_steps=3)
    calls = []
    monkeypatch.setattr(type(trainer.accelerator), "unscale_gradients", lambda self, optimizer=None: calls.append(1))
    trainer.train()
    assert len(calls) == 3


@pytest.mark.parametrize("source", ["post_norm", "pre_norm"])
def test_kept_hidden_states_give_the_live_run(source, tmp_path):
    live = make({"hidden_source": source})
    data = []
    for row in rows():
        with torch.no_grad():
            states = live.target.forward_text(
                torch.tensor([row["input_ids"]]), torch.arange(len(row["input_ids"]))[None]
            )
        kept = states.post_norm_BRD if source == "post_norm" else states.pre_norm_BRD
        data.append({**row, "hidden_states": kept[0]})
    logs = run(live, tmp_path, **SGD)
    stored = make({"hidden_source": source})

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the target must not run where its states were kept")

    stored.model.model.forward = forbidden
    for packing in (False, True):
        stored_logs = run(stored, tmp_path, data, packing=packing, max_length=32, **SGD)
        if not packing:
            assert_same_run(stored_logs, logs, NAMES)
            assert_same_weights(stored, live)


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["standalone", "joint"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_by_bit(mode, tmp_path):
    plan = {
        "mtp_training_mode": mode,
        "max_steps": 27,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "save_strategy": "steps",
        "save_steps": 7,  # in the middle of an epoch of four steps
        "mtp_supervision": "teacher",
        "mtp_loss": "kl",
    }
    reduced = {"draft_vocab_size": 60}
    whole = make(reduced)
    wanted = run(whole, tmp_path / "whole", **plan)
    shutil.copytree(tmp_path / "whole" / "checkpoint-7", tmp_path / "again" / "checkpoint-7")
    resumed = make(reduced, seed=5)
    before = copied(resumed)
    trainer = trainer_of(resumed, tmp_path / "again", **plan)
    trainer.train(resume_from_checkpoint=True)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == len(wanted) == 27
    for name in NAMES:
        assert torch.equal(column(logs, name)[7:], column(wanted, name)[7:]), name
    assert not bits_differ(resumed, copied(whole))
    # else nothing was shown: losses move, and the resumed module had started elsewhere
    assert len(set(column(wanted, "loss").tolist())) > 20 and bits_differ(resumed, before)


def test_a_torn_checkpoint_is_passed_over_with_a_warning(tmp_path):
    plan = {"save_strategy": "steps", "save_steps": 2}
    mtp = make()
    run(mtp, tmp_path, **plan)
    assert Path(last_complete_checkpoint(tmp_path)).name == "checkpoint-6"
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    with pytest.warns(UserWarning, match=r"checkpoint-\d was not written to its end and is passed over"):
        assert Path(last_complete_checkpoint(tmp_path)).name == "checkpoint-2"
    resumed = make(seed=5)
    trainer = trainer_of(resumed, tmp_path, **plan)
    with pytest.warns(UserWarning, match="passed over"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6 and not bits_differ(resumed, copied(mtp))
    # nothing to go on from: the run starts at its beginning
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    fresh = make()
    trainer_of(fresh, tmp_path / "fresh", **plan).train(resume_from_checkpoint=True)
    assert not bits_differ(fresh, copied(mtp))


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    run(make(), tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="depth: the checkpoint has 2, this run 3"):
        trainer_of(make({"depth": 3}), tmp_path).train(resume_from_checkpoint=True)


def test_rotation_keeps_the_newest_and_the_best(tmp_path, monkeypatch):
    taus = iter([1.2, 1.9, 1.5, 1.1, 1.3, 1.4])
    monkeypatch.setattr(MTPTrainer, "measure_tau", lambda self, rows=None: {"tau": next(taus)})
    mtp = make()
    trainer = trainer_of(
        mtp,
        tmp_path,
        eval_dataset=rows(2, seed=1),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    # losses still fall, so the last step would be the best by loss
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    assert trainer.state.best_metric == 1.9 and trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert not bits_differ(mtp, copied(MTPModel.from_pretrained(mtp.model, tmp_path / "checkpoint-2")))
    assert bits_differ(mtp, copied(MTPModel.from_pretrained(mtp.model, tmp_path / "checkpoint-6")))


def test_a_run_ends_where_tau_gets_no_better(tmp_path, monkeypatch):
    taus = iter([1.2, 1.9, 1.5, 1.1, 2.3, 1.4])
    monkeypatch.setattr(MTPTrainer, "measure_tau", lambda self, rows=None: {"tau": next(taus)})
    plan = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 6, "save_strategy": "no"}
    trainer = trainer_of(make(), tmp_path, eval_dataset=rows(2, seed=1), eval_patience=2, **plan)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.state.best_metric == 1.9  # losses still fall
    with pytest.raises(ValueError, match="eval_patience: got 0"):
        trainer_of(make(), tmp_path, eval_patience=0)
    with pytest.raises(ValueError, match="none are made"):
        trainer_of(make(), tmp_path, eval_patience=2, max_steps=1).train()


def test_an_estimate_that_promises_too_much_is_said():
    accuracies = {"accuracy_1": 0.8, "accuracy_2": 0.5}
    assert with_estimate({"tau": 2.0, **accuracies})["estimated_tau"] == pytest.approx(1 + 0.8 + 0.4)
    with pytest.warns(UserWarning, match="falls short of what teacher-forced accuracy promises"):
        with_estimate({"tau": 1.7, **accuracies})
    assert "estimated_tau" not in with_estimate(accuracies)
    assert with_estimate({"tau": 3.0, **accuracies}, own=2)["estimated_tau"] == pytest.approx(3.2)


def test_evaluation_without_prompts_does_not_end_the_run(tmp_path):
    plan = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(
        make(), tmp_path, eval_dataset=rows(3, seed=1), eval_prompts=0, load_best_model_at_end=True, **plan
    )
    with pytest.warns(UserWarning, match="tau was not measured"):
        trainer.train()
    logged = trainer.state.log_history
    assert any("eval_loss" in entry for entry in logged) and not any("eval_tau" in entry for entry in logged)


# -- what is kept and logged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_joint_run_saves_the_target_beside_the_module(tied, tmp_path):
    mtp = make(tie_word_embeddings=tied)
    trainer = trainer_of(mtp, tmp_path, mtp_training_mode="joint", learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    target = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(t, mtp.model.state_dict()[n]) for n, t in target.state_dict().items())
    loaded = MTPModel.from_pretrained(target, tmp_path)  # a warning here would be an error: the weights are those
    assert not bits_differ(loaded, copied(mtp))
    assert loaded.notes["training"]["mtp_training_mode"] == "joint"
    prompt = torch.tensor([rows(1)[0]["input_ids"]])
    mtp.eval()
    wanted = mtp.generate(prompt, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    found = loaded.generate(prompt, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(found.sequences, wanted.sequences)
    assert found.stats.tau == wanted.stats.tau
    assert torch.equal(loaded.draft_logits(prompt), mtp.draft_logits(prompt))


def test_standalone_does_not_copy_the_target(tmp_path):
    trainer = trainer_of(make(), tmp_path, processing_class=make_tokenizer())
    trainer.train()
    trainer.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"mtp_config.json", "mtp_model.safetensors", "tokenizer.json"} <= names
    assert not names & {"model.safetensors", "config.json"}


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bf16_target_trains_fp32_master_weights(autocast, tmp_path):
    # steps of 1e-5 are lost in bf16, whose neighbours of 1 are 0.008 away
    mtp = make()
    mtp.to(torch.bfloat16)
    before = copied(mtp)
    logs = run(
        mtp,
        tmp_path,
        bf16=autocast,
        learning_rate=1e-5,
        eval_dataset=rows(2, seed=1),
        save_strategy="steps",
        save_steps=6,
    )
    assert torch.isfinite(column(logs, "loss")).all() and (column(logs, "grad_norm") > 0).all()
    assert {p.dtype for p in mtp.module.parameters()} == {torch.float32}
    assert {p.dtype for p in mtp.model.parameters()} == {torch.bfloat16}
    changed = [p.float() - before[f"module.{n}"].float() for n, p in mtp.module.named_parameters() if p.dim() > 1]
    assert all(0 < float(delta.detach().abs().mean()) < 1e-4 for delta in changed)
    assert not any(name.startswith("model.") for name in bits_differ(mtp, before))
    loaded = MTPModel.from_pretrained(mtp.model, tmp_path / "checkpoint-6")
    prompt = torch.tensor([rows(1)[0]["input_ids"]])
    wanted = mtp.model.generate(prompt, max_new_tokens=6, do_sample=False)
    for one in (mtp, loaded):
        assert torch.isfinite(one.draft_logits(prompt)).all()
        assert one.generate(prompt, max_new_tokens=6, do_sample=False).shape == wanted.shape
    # and the same in fp32 finds about the same losses
    full = run(make(), tmp_path, learning_rate=1e-5)
    assert torch.allclose(column(logs, "loss"), column(full, "loss"), rtol=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_from_scratch_learns_jointly(checkpointing, tmp_path):
    torch.manual_seed(0)
    mtp = get_mtp_model(
        AutoModelForCausalLM.from_config(tiny_config()),
        {"method": "sequential", "depth": 2, "initialisation": "random"},
    )
    start = torch.arange(12)[:, None] * 7
    data = [{"input_ids": row.tolist()} for row in (start + 3 * torch.arange(12)) % 90 + 2]
    logs = run(
        mtp,
        tmp_path,
        data,
        mtp_training_mode="joint",
        learning_rate=1e-2,
        max_steps=30,
        per_device_train_batch_size=12,
        **{CHECKPOINTING: checkpointing},
        mtp_loss_scaling_factor=0.3,
    )
    for name in ("ntp_loss", "mtp_loss", "loss"):
        assert column(logs, name)[-1] < 0.6 * column(logs, name)[0], name
    assert torch.allclose(column(logs, "loss"), column(logs, "ntp_loss") + 0.3 * column(logs, "mtp_loss"), rtol=1e-5)
    assert logs[-1]["accuracy_1"] > 0.3 > logs[0]["accuracy_1"]


def test_activation_checkpointing_changes_no_loss(tmp_path):
    plain = run(make(), tmp_path, mtp_training_mode="joint", **SGD)
    mtp = make()
    again = run(mtp, tmp_path, mtp_training_mode="joint", **{CHECKPOINTING: True}, **SGD)
    assert_same_run(again, plain, (*NAMES, "ntp_loss"), tolerance=1e-6)
    assert any(getattr(part, "gradient_checkpointing", False) for part in mtp.module.modules())
    assert any(getattr(part, "gradient_checkpointing", False) for part in mtp.model.modules())


def test_what_is_logged_and_where(tmp_path):
    target = tiny_model(tie_word_embeddings=True)
    with torch.no_grad():  # layers that add nothing: the same token again and again, which the module foresees
        for layer in target.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    mtp = get_mtp_model(target, {"method": "sequential", "depth": 2})
    trainer = trainer_of(
        mtp,
        tmp_path,
        mtp_training_mode="joint",
        learning_rate=1e-6,
        eval_dataset=rows(3, seed=1),
        eval_strategy="steps",
        eval_steps=2,
        max_steps=2,
        eval_new_tokens=8,
        report_to=["tensorboard"],
        per_device_eval_batch_size=3,
    )
    trainer.train()
    step, evaluation = {}, {}
    for entry in trainer.state.log_history:
        (evaluation if any(key.startswith("eval_") for key in entry) else step).update(entry)
    assert {"loss", "mtp_loss", "ntp_loss", "accuracy_1", "accuracy_2", "grad_norm", "learning_rate"} <= step.keys()
    depths = [f"eval_{name}_{k}" for name in ("accuracy", "accept_at", "accept_given") for k in (1, 2)]
    assert {
        "eval_loss",
        "eval_mtp_loss",
        "eval_ntp_loss",
        "eval_tau",
        "eval_estimated_tau",
        "eval_mean_accepted",
        *depths,
    } <= evaluation.keys()
    # tau and acceptance are those of decoding each prompt alone, counted by hand: new tokens from the text itself
    records, new_tokens = [], 0
    for row in trainer.eval_dataset:
        prompt = prompt_of(row)
        out = mtp.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        records += out.stats.records[0]
        new_tokens += out.sequences.shape[1] - len(prompt)
        # each verification emits 3 tokens at most, so the fewest that 8 tokens can take are 3
        assert 3 <= len(out.stats.records[0]) < 8 and out.sequences.shape[1] - len(prompt) == 8
    assert evaluation["eval_tau"] == pytest.approx(new_tokens / len(records))
    assert evaluation["eval_tau"] > 1.5
    assert evaluation["eval_mean_accepted"] == pytest.approx(sum(v.accepted for v in records) / len(records))
    for k in (1, 2):
        drafted = [v for v in records if v.depth >= k]
        held = sum(v.accepted >= k for v in drafted)
        assert evaluation[f"eval_accept_at_{k}"] == pytest.approx(held / len(drafted)), k
        reached = sum(v.accepted >= k - 1 for v in drafted)
        assert evaluation[f"eval_accept_given_{k}"] == pytest.approx(held / reached), k
    assert evaluation["eval_accept_at_2"] == pytest.approx(
        evaluation["eval_accept_given_1"] * evaluation["eval_accept_given_2"], abs=0.2
    )
    # the evaluation's losses are those of the forward
    inputs = MTPCollator(0)(trainer.eval_dataset)
    with torch.no_grad():
        out = mtp(**inputs, train_target=True)
    ntp = float(out["ntp"].total / out["ntp"].count)
    mtp_loss = float(sum(loss.total / loss.count for loss in out["mtp"]) / 2)
    assert evaluation["eval_ntp_loss"] == pytest.approx(ntp, rel=1e-5)
    assert evaluation["eval_mtp_loss"] == pytest.approx(mtp_loss, rel=1e-5)
    assert evaluation["eval_loss"] == pytest.approx(ntp + 0.1 * mtp_loss, rel=1e-5)
    for k, loss in enumerate(out["mtp"], start=1):
        assert evaluation[f"eval_accuracy_{k}"] == pytest.approx(float(loss.correct / loss.count)), k
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    [file] = tmp_path.rglob("events.out.tfevents.*")
    board = events.EventAccumulator(str(file)).Reload()
    assert {"train/loss", "train/mtp_loss", "train/accuracy_2", "eval/tau", "eval/accept_at_1"} <= set(
        board.Tags()["scalars"]
    )


@pytest.mark.parametrize("weights", ["uniform", "harmonic", "exponential"])
def test_depth_weights_and_the_scaling_factor(weights, tmp_path):
    beta = {"mtp_depth_weights": weights, "mtp_depth_beta": 0.5}
    wanted = {"uniform": [1 / 3] * 3, "harmonic": [6 / 11, 3 / 11, 2 / 11], "exponential": [4 / 7, 2 / 7, 1 / 7]}[
        weights
    ]
    mtp = make({"depth": 3})
    with torch.no_grad():
        losses = mtp(**MTPCollator(0)(rows(4)))["mtp"]
    mean = sum(w * float(loss.total / loss.count) for w, loss in zip(wanted, losses, strict=True))
    sizes = {"per_device_train_batch_size": 4, "max_steps": 1}
    for scale in (None, 0.25):
        [log] = run(make({"depth": 3}), tmp_path, rows(4), mtp_loss_scaling_factor=scale, **beta, **sizes)
        assert log["mtp_loss"] == pytest.approx(mean, rel=1e-5)
        assert log["loss"] == pytest.approx(mean * (scale or 1.0), rel=1e-5)


# -- data and arguments ------------------------------------------------------------------------------------------------


def test_text_rows_in_every_form_of_trl(tmp_path):
    tokenizer = make_tokenizer()
    words = "one two three four five yes"
    data = [
        {"messages": chat("one?", words, "two?", words)},
        {"prompt": "one two", "completion": " three four five"},
        {"prompt": chat("one?"), "completion": [{"role": "assistant", "content": words}]},
        {"text": words},
    ]
    for name, some in (("list", data), ("jsonl", data), ("parquet", data[3:] * 4), ("dataset", data[1:2] * 4)):
        source: Any = some
        if name in ("jsonl", "parquet"):
            source = str(tmp_path / f"rows.{name}")
            if name == "jsonl":
                Path(source).write_text("\n".join(json.dumps(row) for row in some))
            else:
                import datasets

                datasets.Dataset.from_list(some).to_parquet(source)
        elif name == "dataset":
            import datasets

            source = datasets.Dataset.from_list(some)
        trainer = trainer_of(make(), tmp_path, source, processing_class=tokenizer, max_steps=2)
        trainer.train()
        assert len(trainer.train_dataset) == 4
        assert all(
            torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry
        )
        # of each answer only the answer is trained, and the token that ends it
        for row, encoded in zip(some, trainer.train_dataset, strict=True):
            trained = [label for label in encoded["labels"] if label != IGNORE_INDEX]
            assert trained[-1] == tokenizer.eos_token_id
            assert (len(trained) < len(encoded["labels"]) - 1) == ("text" not in row)
    both = [{"messages": chat("one?", words)}] * 2
    masked, whole = (
        trainer_of(make(), tmp_path, both, processing_class=tokenizer, assistant_only_loss=only).train_dataset[0][
            "labels"
        ]
        for only in (True, False)
    )
    assert masked.count(IGNORE_INDEX) > whole.count(IGNORE_INDEX)


def test_settings_that_contradict_each_other_come_in_one_error(tmp_path):
    with pytest.raises(ValueError, match="mtp_loss: kl needs a distribution") as error:
        trainer_of(
            make(),
            tmp_path,
            mtp_loss="kl",
            mtp_loss_scaling_factor=-1.0,
            mtp_training_mode="joint",
            train_target=False,
            max_length=2,
        )
    for words in (
        "mtp_loss_scaling_factor: got -1.0, wanted a number of at least 0",
        "contradicts",
        "wanted at least 3 tokens",
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="got LlamaForCausalLM, wanted an MTPModel"):
        trainer_of(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match="leaves nothing to train"):
        trainer_of(make(), tmp_path, mtp_training_mode="disabled", train_target=False)
    with pytest.raises(ValueError, match="packing needs max_length"):
        trainer_of(make(), tmp_path, packing=True, max_length=None)


# -- Muon, and depth 1 first -------------------------------------------------------------------------------------------


def test_muon_moves_matrices_as_torchs_own_and_the_rest_as_adamw(tmp_path):
    plan = {"max_steps": 1, "learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "constant"}
    found = {}
    for name, rate in (("adamw", None), ("muon", 3e-2), ("double", 6e-2)):
        mtp = make()
        before = {key: p.detach().clone() for key, p in mtp.module.named_parameters()}
        trainer = trainer_of(mtp, tmp_path / name, mtp_muon_learning_rate=rate, **plan)
        grads = {}
        whole = trainer._get_grad_norm

        def keep(model, grad_norm=None, mtp=mtp, grads=grads, whole=whole):  # after the clipping, before the step
            grads |= {key: p.grad.clone() for key, p in mtp.module.named_parameters()}
            return whole(model, grad_norm=grad_norm)

        trainer._get_grad_norm = keep
        trainer.train()
        found[name] = before, grads, dict(mtp.module.named_parameters())
    before, grads, after = found["muon"]
    names = [key for key, p in after.items() if p.dim() == 2]
    assert len(mtp.module.matrices()) == len(names) > 10
    own = {key: torch.nn.Parameter(before[key].clone()) for key in names}
    muon = torch.optim.Muon(own.values(), lr=3e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for key, parameter in own.items():
        parameter.grad = grads[key]
    muon.step()
    for key, parameter in after.items():
        if key in own:
            assert torch.equal(parameter, own[key]), key
            assert not torch.equal(parameter, found["adamw"][2][key]) and not torch.equal(
                parameter, found["double"][2][key]
            )
        else:
            assert torch.equal(parameter, found["adamw"][2][key]), key
    own_step = {key: after[key].detach() - before[key] for key in names}
    sizes = [float(step.pow(2).mean().sqrt()) / 3e-2 for step in own_step.values()]
    assert all(0.05 < size < 0.5 for size in sizes), "of AdamW's size: about a fifth of the rate"


def test_muon_and_depth_one_first_resume_to_the_last_bit(tmp_path):
    plan = {"max_steps": 12, "save_steps": 6, "save_strategy": "steps", "mtp_muon_learning_rate": 1e-2}
    plan |= {"mtp_depth_one_first": 0.7, "mtp_learning_rate": 3e-3, "save_total_limit": None}
    whole = make(seed=1)
    wanted = run(whole, tmp_path / "whole", **plan)
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "again" / "checkpoint-6")
    resumed = make(seed=5)
    trainer = trainer_of(resumed, tmp_path / "again", **plan)
    trainer.train(resume_from_checkpoint=True)
    own = dict(whole.module.named_parameters())
    assert all(torch.equal(p, own[key]) for key, p in resumed.module.named_parameters())
    assert ["accuracy_2" in step for step in wanted[:12]] == [False] * 9 + [True] * 3, "8.4 steps of depth 1"


@pytest.mark.parametrize("method", [{}, {"method": "heads", "initialisation": None}, {"method": "masked"}], ids=str)
def test_depth_one_alone_is_a_run_of_depth_one(method, tmp_path):
    """While depth 1 learns alone it does so as in a module that has no other."""
    method = {k: v for k, v in method.items() if v is not None}
    kind = method.get("method", "sequential")
    shared = {"shared_module": True} if kind == "sequential" else {}
    extra = {"dropout": 0.0} if kind == "heads" else {}
    losses = []
    for depth, first in ((1, 0.0), (2, 0.75)):
        target = tiny_model()
        torch.manual_seed(0)
        mtp = get_mtp_model(target, {"method": kind, "depth": depth, **shared, **extra})
        plan = {"max_steps": 4, "learning_rate": 1e-2, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        logged = run(mtp, tmp_path / f"{kind}-{depth}", **plan, mtp_depth_one_first=first, weight_decay=0.0)
        losses.append([step["mtp_loss"] for step in logged if "mtp_loss" in step])
    if kind == "masked":  # a second mask's embedding starts as another number; the first is the same
        assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    else:
        assert losses[0][:3] == pytest.approx(losses[1][:3], rel=1e-5)
    assert losses[0][3] != pytest.approx(losses[1][3], rel=1e-3), "then both learn"


def test_bad_optimizers_and_shares_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mtp_muon_learning_rate: got SGD, wanted AdamW"):
        trainer_of(make(), tmp_path, mtp_muon_learning_rate=1e-3, optim="sgd").train()
    with pytest.raises(ValueError, match="mtp_depth_one_first: got 1.0, wanted a number of at least 0 and below 1"):
        trainer_of(make(), tmp_path, mtp_depth_one_first=1.0)
    with pytest.raises(ValueError, match="use ce, which is -log of a label's acceptance too"):
        trainer_of(make(), tmp_path, mtp_loss="lk")
    with pytest.raises(ValueError, match="dpace reads acceptance off ce, tv or lk, got mtp_loss=e2e_tv"):
        trainer_of(make(), tmp_path, mtp_supervision="teacher", mtp_loss="e2e_tv", mtp_depth_weights="dpace")
