"""TRL's SFTTrainer with MTP: what the closed pull request got wrong stands here as tests."""

# B sequences, T positions, K depths.

from __future__ import annotations

import copy
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from drafters import leaning_model
from peft import LoraConfig, PeftModel
from tiny import VOCAB, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from foretell.cli import main
from foretell.mtp import MTPModel
from foretell.trl import DataCollatorForMTPLanguageModeling, SFTConfig, SFTTrainer

FOLDER = Path(__file__).parents[1] / "examples"
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
QUIET: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}


def rows(count: int = 32, seed: int = 0, shortest: int = 6) -> Dataset:
    """Token rows of several lengths, the first third of each not trained."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for length in torch.randint(shortest, 20, (count,), generator=generator).tolist():
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        out.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return Dataset.from_list(out)


def trainer(folder: Path, model: nn.Module | None = None, data: Dataset | None = None, **settings: Any) -> SFTTrainer:
    peft = {"peft_config": settings.pop("peft_config")} if "peft_config" in settings else {}
    evaluation = {"eval_dataset": settings.pop("eval_dataset")} if "eval_dataset" in settings else {}
    common = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "mtp_enabled": True}
    args = SFTConfig(output_dir=str(folder), **{**common, **QUIET, **settings})
    return SFTTrainer(
        model=model or tiny_model(),
        args=args,
        train_dataset=data or rows(),
        processing_class=tiny_tokenizer(),
        **evaluation,
        **peft,
    )


def copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def column(made: Any, name: str) -> list[float]:
    return [entry[name] for entry in made.state.log_history if name in entry]


# -- the page's promises -----------------------------------------------------------------------------------------------


def test_fields_and_defaults_of_the_page(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    wanted = {
        "mtp_enabled": False,
        "mtp_num_predictions": 2,
        "mtp_loss_weight": 0.5,
        "mtp_head_type": "linear",
        "mtp_num_layers": 1,
        "mtp_init_strategy": "default",
        "mtp_dropout_prob": 0.1,
        "mtp_weight_decay_strategy": "uniform",
    }
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert isinstance(args, trl.SFTConfig) and issubclass(SFTTrainer, trl.SFTTrainer)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_disabled_is_trl_to_the_bit(optim, tmp_path):
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "optim": optim, **QUIET}
    runs = []
    for config, kind in ((trl.SFTConfig, trl.SFTTrainer), (SFTConfig, SFTTrainer)):
        model = tiny_model()
        made = kind(
            model=model,
            args=config(output_dir=str(tmp_path), gradient_accumulation_steps=2, **settings),
            train_dataset=rows(),
            processing_class=tiny_tokenizer(),
        )
        made.train()
        timed = ("runtime", "per_second")
        history = made.state.log_history
        runs.append((copied(model), [{k: v for k, v in log.items() if not k.endswith(timed)} for log in history]))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(runs[0][0][name], runs[1][0][name]) for name in runs[0][0])
    assert runs[0][0].keys() == runs[1][0].keys()


def test_heads_are_in_the_optimizer_and_move(tmp_path):
    made = trainer(tmp_path, mtp_head_type="mha_ffn", max_steps=1, mtp_num_layers=2)
    before = copied(made.mtp.module)
    made.train()
    held = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held for p in made.mtp.module.parameters())
    moved = changed(made.mtp.module, before)
    assert moved == set(before), set(before) - moved


def plain_losses(model: nn.Module, module: nn.Module, batches: list[dict], shift: int = 0) -> tuple[float, list[float]]:
    """(next-token loss, each depth's loss) of an optimizer step: sums over all its rows over their global counts."""
    sums, counts = torch.zeros(3), torch.zeros(3)
    for batch in batches:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            ids, labels = ids[mask == 1], labels[mask == 1]
            out = model(ids[None], output_hidden_states=True)
            heads = [out.logits[0], *(head.output(head.body(out.hidden_states[-1], None))[0] for head in module.heads)]
            for k, logits in enumerate(heads):
                for t in range(len(ids) - 1 - k):
                    if labels[t + 1 + k] != -100:
                        sums[k] += F.cross_entropy(logits[t], ids[t + 1 + k - (shift if k else 0)])
                        counts[k] += 1
    return float(sums[0] / counts[0]), (sums[1:] / counts[1:]).tolist()


@pytest.mark.parametrize("weights", ["uniform", "harmonic"])
def test_the_loss_is_the_pages_with_the_labels_right(weights, tmp_path):
    """Against loops over positions, with two micro-batches of very different numbers of labels."""
    made = trainer(
        tmp_path,
        mtp_dropout_prob=0.0,
        gradient_accumulation_steps=2,
        max_steps=1,
        mtp_weight_decay_strategy=weights,
        mtp_loss_weight=0.3,
        **{**SGD, "learning_rate": 0.0},
    )
    seen = []
    collate = made.data_collator
    made.data_collator = lambda examples: (seen.append(collate(examples)), seen[-1])[1]
    made.train()
    with torch.no_grad():
        ntp, depths = plain_losses(made.mtp.model, made.mtp.module, seen[:2])
        _, shifted = plain_losses(made.mtp.model, made.mtp.module, seen[:2], shift=1)
    share = [0.5, 0.5] if weights == "uniform" else [2 / 3, 1 / 3]
    mtp = sum(s * d for s, d in zip(share, depths, strict=True))
    assert column(made, "ntp_loss")[0] == pytest.approx(ntp, rel=1e-5)
    assert column(made, "mtp_loss")[0] == pytest.approx(mtp, rel=1e-5)
    assert column(made, "train_loss")[0] == pytest.approx(ntp + 0.3 * mtp, rel=1e-5)
    assert column(made, "loss")[0] == pytest.approx(ntp + 0.3 * mtp, rel=1e-4)
    assert abs(sum(s * d for s, d in zip(share, shifted, strict=True)) - mtp) > 1e-3, "the gate sees a shifted label"


@pytest.mark.parametrize("mode", ["joint", "standalone"])
def test_accumulation_cannot_be_seen(mode, tmp_path):
    runs = []
    for batch, steps in ((8, 1), (1, 8)):
        made = trainer(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, mtp_dropout_prob=0.0,
            mtp_training_mode=mode, **SGD,
        )  # fmt: skip
        made.train()
        runs.append((copied(made.mtp), {n: column(made, n) for n in ("ntp_loss", "mtp_loss", "train_loss", "loss")}))
    (one, logs_one), (eight, logs_eight) = runs
    assert all(torch.allclose(one[name], eight[name], atol=2e-6) for name in one)
    for name, values in logs_one.items():
        assert values == pytest.approx(logs_eight[name], rel=1e-4), name


@pytest.mark.parametrize("mode", ["disabled", "standalone", "joint"])
def test_modes_change_what_they_say(mode, tmp_path):
    made = trainer(tmp_path, mtp_training_mode=mode, weight_decay=0.1)
    before, target = copied(made.mtp.module), copied(made.mtp.model)
    made.train()
    assert bool(changed(made.mtp.module, before)) == (mode != "disabled")
    assert bool(changed(made.mtp.model, target)) == (mode != "standalone")
    if mode == "disabled":  # then the model learns exactly what TRL would have taught it
        model = tiny_model()
        settings = {"max_steps": 3, "per_device_train_batch_size": 4, "weight_decay": 0.1, "logging_steps": 1, **QUIET}
        args = trl.SFTConfig(output_dir=str(tmp_path), **settings)
        plain = trl.SFTTrainer(model=model, args=args, train_dataset=rows(), processing_class=tiny_tokenizer())
        plain.train()
        assert not changed(made.mtp.model, copied(model))


def test_packed_rows_do_not_see_each_other(tmp_path):
    """A packed batch has the losses of its documents in rows of their own."""
    made = trainer(tmp_path, mtp_head_type="mha_ffn", mtp_dropout_prob=0.0)
    documents = [rows(3, seed=5)[i] for i in range(3)]
    collator = type(made.data_collator)
    found = []
    for free in (False, True):
        inputs = collator(pad_token_id=0, padding_free=free)(documents)
        made.mtp.train()
        loss = made.compute_loss(made.mtp, inputs)
        losses = made.mtp.losses["mtp"]
        found.append((float(loss), [(float(x.total), int(x.count)) for x in losses]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for (total, count), (other, others) in zip(found[0][1], found[1][1], strict=True):
        assert total == pytest.approx(other, rel=1e-4) and count == others > 3


def test_packing_trains(tmp_path):
    made = trainer(tmp_path, packing=True, max_length=32, mtp_head_type="cnn")
    made.train()
    assert all(math.isfinite(v) for v in column(made, "mtp_loss")) and len(column(made, "mtp_loss")) == 3


# -- what is stored ----------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_decodes_the_same(tmp_path):
    made = trainer(
        tmp_path, model=leaning_model(), max_steps=30, learning_rate=1e-2, save_strategy="steps", save_steps=30,
        mtp_head_type="medusa", mtp_init_strategy="copy_lm_head",
    )  # fmt: skip
    made.train()
    folder = tmp_path / "checkpoint-30"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not any("mtp" in name or "head." in name for name in model.state_dict() if "lm_head" not in name)
    mtp = MTPModel.from_pretrained(model, folder)
    ids = torch.tensor([[5, 9, 5, 9, 5]])
    outs = [m.generate(ids, max_new_tokens=16, do_sample=False, return_dict_in_generate=True) for m in (made.mtp, mtp)]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert outs[0].stats.drafted == outs[1].stats.drafted and outs[0].stats.accepted == outs[1].stats.accepted
    assert torch.equal(outs[1].sequences, model.generate(ids, max_new_tokens=16, do_sample=False))
    about = json.loads((folder / "mtp_config.json").read_text())
    assert about["notes"]["training"]["mtp_head_type"] == "medusa"


def test_standalone_stores_the_module_alone(tmp_path):
    made = trainer(tmp_path, mtp_training_mode="standalone", save_strategy="steps", save_steps=3)
    made.train()
    names = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert {"mtp_config.json", "mtp_model.safetensors", "tokenizer.json"} <= names and "model.safetensors" not in names


@pytest.mark.parametrize("mode", ["standalone", "joint"])
def test_a_resumed_run_repeats_the_uninterrupted_one(mode, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "mtp_training_mode": mode}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert not changed(resumed.mtp, copied(whole.mtp))
    assert column(resumed, "loss")[-3:] == column(whole, "loss")[-3:]


def test_the_best_checkpoint_by_tau(tmp_path):
    made = trainer(
        tmp_path, model=leaning_model(), max_steps=4, save_strategy="steps", eval_strategy="steps", eval_steps=2,
        save_steps=2, metric_for_best_model="eval_tau", greater_is_better=True, load_best_model_at_end=True,
        eval_dataset=rows(4, seed=1), eval_prompts=2, eval_new_tokens=6,
    )  # fmt: skip
    made.train()
    assert len(column(made, "eval_tau")) == 2 and made.state.best_metric == max(column(made, "eval_tau"))
    for name in ("eval_ntp_loss", "eval_mtp_loss", "eval_accuracy_1", "eval_accuracy_2", "eval_accept_at_1"):
        assert len(column(made, name)) == 2, name


# -- adapters ----------------------------------------------------------------------------------------------------------

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def test_adapters_are_stored_beside_heads(tmp_path):
    base = leaning_model()
    made = trainer(
        tmp_path, model=copy.deepcopy(base), peft_config=LoraConfig(**LORA), max_steps=6, learning_rate=1e-2,
        save_strategy="steps", save_steps=6,
    )  # fmt: skip
    heads = copied(made.mtp.module)
    made.train()
    assert changed(made.mtp.module, heads) == set(heads)
    folder = tmp_path / "checkpoint-6"
    for name in ("adapter_config.json", "adapter_model.safetensors", "mtp_model.safetensors"):
        assert (folder / name).is_file(), name
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    mtp = MTPModel.from_pretrained(adapted, folder)
    ids = torch.tensor([[5, 9, 5, 9, 5]])
    outs = [m.generate(ids, max_new_tokens=12, do_sample=False, return_dict_in_generate=True) for m in (made.mtp, mtp)]
    assert torch.equal(outs[0].sequences, outs[1].sequences) and outs[0].stats.accepted == outs[1].stats.accepted
    assert torch.equal(outs[1].sequences, adapted.generate(input_ids=ids, max_new_tokens=12, do_sample=False))
    kept = made.mtp.model.unload().state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in base.state_dict().items())


def test_medusa_2_with_an_adapter(tmp_path):
    """First the heads alone, at their own rate; then both, and the model is held to what it was."""
    made = trainer(
        tmp_path, peft_config=LoraConfig(**LORA), max_steps=6, mtp_heads_first_steps=3, mtp_learning_rate=4e-2,
        learning_rate=1e-2, lr_scheduler_type="constant", mtp_loss_weight=5.0, mtp_target_loss="untouched",
    )  # fmt: skip
    adapters, history = {n: p.detach().clone() for n, p in made.mtp.model.named_parameters() if "lora" in n}, []

    class Watch(trl.trainer.sft_trainer.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            now = {n: p.detach() for n, p in made.mtp.model.named_parameters() if "lora" in n}
            history.append(any(not torch.equal(now[n], adapters[n]) for n in adapters))

    made.add_callback(Watch())
    heads = copied(made.mtp.module)
    made.train()
    assert history == [False] * 3 + [True] * 3
    assert changed(made.mtp.module, heads) == set(heads)
    rates = {group.get("is_mtp", False): group["lr"] for group in made.optimizer.param_groups}
    assert rates == {True: 4e-2, False: 1e-2}
    stay = column(made, "stay_loss")
    assert stay[:4] == pytest.approx([0.0] * 4, abs=1e-6) and stay[-1] > 1e-6, "untouched until its adapter moves"


def test_qlora(tmp_path):
    """Heads beside an adapter on a model of four bits; both are stored and load again."""
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bits, device_map="cpu")

    made = trainer(
        tmp_path, model=load(), peft_config=LoraConfig(**LORA), save_strategy="steps", save_steps=3, learning_rate=1e-2
    )
    assert type(made.mtp.target.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    before = copied(made.mtp.module)
    made.train()
    assert changed(made.mtp.module, before) == set(before)
    folder = tmp_path / "checkpoint-3"
    adapted = PeftModel.from_pretrained(load(), folder).eval()
    mtp = MTPModel.from_pretrained(adapted, folder)
    ids = torch.arange(3, 9)[None]
    wanted = adapted.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    for n in (0, 2):
        assert torch.equal(mtp.generate(ids, max_new_tokens=12, do_sample=False, num_draft_tokens=n), wanted)
    made.mtp.eval()
    assert torch.equal(made.mtp.generate(ids, max_new_tokens=12, do_sample=False), wanted)


def test_untouched_needs_an_adapter(tmp_path):
    """Said before anything is loaded: there is no such folder."""
    args = SFTConfig(output_dir=str(tmp_path), mtp_enabled=True, mtp_target_loss="untouched", **QUIET)
    with pytest.raises(ValueError, match="peft_config"):
        SFTTrainer(str(tmp_path / "nowhere"), args, train_dataset=rows(), processing_class=tiny_tokenizer())


# -- the collator ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free", [False, True])
def test_the_collator_of_the_page(free):
    collator = DataCollatorForMTPLanguageModeling(pad_token_id=0, num_predictions=3, padding_free=free)
    examples = [rows(3, seed=2)[i] for i in range(3)] + [{"input_ids": [5, 6], "labels": [5, 6]}]
    out = collator(examples)
    start = 0
    for b, example in enumerate(examples):
        labels, T = list(example["labels"]), len(example["labels"])
        if free:
            labels[0] = -100
        found = out["mtp_labels"][0, start : start + T] if free else out["mtp_labels"][b]
        start += T
        for t in range(len(found)):
            for k in range(1, 4):
                ahead = t + 1 + k
                assert found[t, k - 1] == (labels[ahead] if ahead < T else -100)


def test_its_labels_are_used(tmp_path):
    made = trainer(tmp_path, mtp_dropout_prob=0.0)
    examples = [rows(3, seed=2)[i] for i in range(3)]
    inputs = DataCollatorForMTPLanguageModeling(pad_token_id=0)(examples)
    plain = {name: value for name, value in inputs.items() if name != "mtp_labels"}
    made.mtp.train()
    same = [float(made.compute_loss(made.mtp, dict(batch))) for batch in (inputs, plain)]
    assert same[0] == pytest.approx(same[1], rel=1e-6)
    other = {**inputs, "mtp_labels": inputs["mtp_labels"].roll(1, dims=1)}
    assert abs(float(made.compute_loss(made.mtp, other)) - same[0]) > 1e-4
    wrong = DataCollatorForMTPLanguageModeling(pad_token_id=0, num_predictions=3)(examples)
    with pytest.raises(ValueError, match="num_predictions=2"):
        made.compute_loss(made.mtp, wrong)


def test_short_rows_among_long_ones_are_no_error(tmp_path):
    made = trainer(tmp_path, data=Dataset.from_list([{"input_ids": [3, 4]}] * 4 + [{"input_ids": [5, 6, 7, 8, 9]}] * 4),
                   max_steps=4, per_device_train_batch_size=1, mtp_num_predictions=3)  # fmt: skip
    made.train()
    assert all(math.isfinite(v) for v in column(made, "loss"))


# -- other methods, presets, bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("supervision", ["labels", "teacher", "teacher_hard"])
def test_sequential_modules_too(supervision, tmp_path):
    kind = "kl" if supervision == "teacher" else "ce"
    made = trainer(tmp_path, mtp_method="sequential", mtp_supervision=supervision, mtp_loss=kind)
    before = copied(made.mtp.module)
    made.train()
    assert made.mtp.mtp_config.method == "sequential" and changed(made.mtp.module, before) == set(before)


@pytest.mark.parametrize("loss", ["lk", "e2e_tv"])
def test_losses_for_drawn_drafts_and_muon(loss, tmp_path):
    settings = {"mtp_supervision": "teacher", "mtp_loss": loss, "mtp_training_mode": "standalone"}
    settings |= {
        "mtp_method": "sequential",
        "max_steps": 8,
        "learning_rate": 1e-2,
        "mtp_muon_learning_rate": 1e-2,
        "mtp_depth_one_first": 0.5,
    }
    made = trainer(tmp_path, **settings)
    made.train()
    assert ["accuracy_2" in entry for entry in made.state.log_history[:8]] == [False] * 4 + [True] * 4
    losses = column(made, "mtp_loss")
    assert losses[3] < losses[0] and losses[7] < losses[4]


@pytest.mark.parametrize("preset", ["trl-heads", "medusa", "meta-heads", "fastmtp", "deepseek"])
def test_presets(preset, tmp_path):
    made = trainer(tmp_path, mtp_preset=preset)
    args = made.args
    wanted = {"medusa": "standalone", "fastmtp": "standalone"}.get(preset, "joint")
    assert args.mtp_training_mode == wanted
    assert args.mtp_supervision == "labels"
    made.train()
    assert all(math.isfinite(v) for v in column(made, "mtp_loss"))


def test_bad_settings_come_in_one_error(tmp_path):
    with pytest.raises(ValueError, match="mtp_loss_weight") as caught:
        SFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, mtp_enabled=True, mtp_num_predictions=0, mtp_loss="kl",
            mtp_loss_weight=-1.0, mtp_dropout_prob=2.0,
        )  # fmt: skip
    assert all(word in str(caught.value) for word in ("depth", "mtp_loss_weight", "mtp_loss:", "dropout"))
    with pytest.raises(ValueError, match="give the one or the others"):
        SFTConfig(output_dir=str(tmp_path), mtp_enabled=True, mtp_preset="medusa", mtp_head_type="ffn", **QUIET)
    made = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    args = SFTConfig(output_dir=str(tmp_path), mtp_enabled=True, **QUIET)
    with pytest.raises(ValueError, match="optimizers"):
        SFTTrainer(tiny_model(), args, train_dataset=rows(), processing_class=tiny_tokenizer(), optimizers=(made, None))


def test_a_bf16_model_trains_fp32_heads(tmp_path):
    made = trainer(tmp_path, model=tiny_model().to(torch.bfloat16), mtp_head_type="ffn")
    made.train()
    assert {p.dtype for p in made.mtp.module.parameters()} == {torch.float32}
    assert all(math.isfinite(v) for v in column(made, "mtp_loss"))


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> tuple[str, str]:
    """(folder of a tiny model and tokenizer, JSONL of texts)."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    lines = [{"text": " ".join(f"w{i}" for i in row["input_ids"])} for row in rows(16)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "model"), str(tmp_path / "data.jsonl")


PAGE = {
    "basic": "mtp_num_predictions=2 mtp_loss_weight=0.5",
    "identical": "mtp_head_type=identical mtp_init_strategy=copy_lm_head mtp_num_layers=1 mtp_num_predictions=3",
    "deep": "mtp_head_type=mha_ffn mtp_num_layers=4 mtp_init_strategy=xavier_normal mtp_num_predictions=4 "
    "mtp_loss_weight=0.2",
}


@pytest.mark.parametrize("flags", PAGE.values(), ids=PAGE.keys())
def test_the_pages_command_lines(flags, stored, tmp_path):
    model, data = stored
    out = tmp_path / "out"
    words = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(out), "--mtp_enabled"]
    words += [word for flag in flags.split() for word in f"--{flag}".split("=")]
    words += ["--max_steps", "2", "--use_cpu", "--bf16", "False", "--report_to", "none"]
    assert main(["sft", *words]) == 0
    mtp = MTPModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), out)
    assert f"mtp_num_predictions={mtp.mtp_config.depth}" in flags


def test_the_command_line_reads_yaml(stored, tmp_path):
    model, data = stored
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model_name_or_path: {model}\ndataset_name: {data}\noutput_dir: {tmp_path / 'out'}\nmtp_enabled: true\n"
        "mtp_head_type: cnn\nmax_steps: 1\nuse_cpu: true\nbf16: false\nreport_to: none\n"
    )
    assert main(["sft", "--config", str(path)]) == 0
    assert json.loads((tmp_path / "out" / "mtp_config.json").read_text())["config"]["head_type"] == "cnn"


EXAMPLES = {
    "sft_qwen2_linear": ("qwen2", 2, "linear"),
    "sft_qwen2_identical": ("qwen2", 2, "identical"),
    "sft_llama_ffn": ("llama", 3, "ffn"),
    "sft_deepseek_attention": ("llama", 4, "mha_ffn"),  # DeepSeek-LLM is of Llama's shape
    "sft_mistral_frozen": ("mistral", 2, "linear"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, stored, tmp_path, monkeypatch):
    """Each script as a user runs it, on a tiny model of the same shape; what it saves decodes."""
    architecture, depth, kind = EXAMPLES[name]
    base, out = tmp_path / architecture, tmp_path / "out"
    model = tiny_model(architecture)
    model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    flags = ["--model", str(base), "--dataset", stored[1], "--output_dir", str(out), "--max_steps", "2", "--cpu"]
    monkeypatch.setattr(sys, "argv", [name, *flags])
    monkeypatch.syspath_prepend(str(FOLDER))
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    frozen = not (out / "model.safetensors").exists()
    assert frozen == (name == "sft_mistral_frozen")
    target = model if frozen else AutoModelForCausalLM.from_pretrained(out)
    mtp = MTPModel.from_pretrained(target, out)
    assert (mtp.mtp_config.depth, mtp.mtp_config.head_type) == (depth, kind)
    ids = torch.tensor([[5, 9, 5, 9]])
    wanted = target.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(mtp.generate(ids, max_new_tokens=8, do_sample=False, num_draft_tokens=depth), wanted)


def test_every_example_is_tested():
    assert {path.stem for path in FOLDER.glob("sft_*.py")} == set(EXAMPLES)


def test_metrics_over_logits_still_work(tmp_path):
    """compute_metrics makes TRL ask for the logits in a second forward: the losses stay those of the first."""
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"mean": float(prediction.predictions.mean())}

    losses = {}
    for name, more in {"without": {}, "with": {"compute_metrics": metrics}}.items():
        args = SFTConfig(output_dir=str(tmp_path), mtp_enabled=True, mtp_dropout_prob=0.0, eval_prompts=0, **QUIET)
        made = SFTTrainer(
            model=tiny_model(), args=args, train_dataset=rows(4), eval_dataset=rows(4, seed=1),
            processing_class=tiny_tokenizer(), **more,
        )  # fmt: skip
        losses[name] = made.evaluate()["eval_mtp_loss"]
    assert seen and seen[0][-1] == VOCAB and losses["with"] == losses["without"]


def test_several_evaluation_sets(tmp_path):
    made = trainer(
        tmp_path, eval_dataset={"a": rows(4, seed=1), "b": rows(4, seed=2)}, eval_new_tokens=4, eval_prompts=2
    )
    metrics = made.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_a_tau", "eval_b_tau"} <= set(metrics)
