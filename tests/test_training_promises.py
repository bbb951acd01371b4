"""What both trainers promise a user's model: it is narrowed and never widened, its own loss is the loss, and what is
stored is what was trained. The oracle is transformers' Trainer, TRL's SFTTrainer, PEFT, or the model itself.
"""

# B sequences, T positions, V vocabulary.

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from drafters import leaning_model
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import VOCAB, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foretell.data.cache import HiddenStore
from foretell.data.collate import MTPCollator
from foretell.data.formats import load_rows
from foretell.data.prompts import encode_rows
from foretell.mtp import MTPModel, get_mtp_model
from foretell.training.tau import decoded_tau
from foretell.training.trainer import MTPTrainer, MTPTrainingArguments
from foretell.trl import SFTConfig, SFTTrainer
from tests.test_trainer import quick_collections  # noqa: F401 (a fixture)

QUIET: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "logging_steps": 1}
PLAN: dict[str, Any] = {"save_strategy": "no", "max_steps": 3, "per_device_train_batch_size": 4, **QUIET}
SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
BOTH = pytest.mark.parametrize("kind", ["own", "trl"])
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}


def rows(count: int = 16, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for length in torch.randint(6, 16, (count,), generator=generator).tolist():
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        out.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return Dataset.from_list(out)


def make(kind: str, model: Any, folder: Path, mode: str = "joint", data: Any = None, **settings: Any) -> Any:
    """A trainer of either kind, of two linear heads; its `mtp` is the MTPModel."""
    names = ("eval_dataset", "compute_loss_func", "compute_metrics", "callbacks", "method")
    own = {name: settings.pop(name) for name in names if name in settings}
    module = own.pop("method", {"method": "heads", "dropout": 0.0}) | {"depth": 2}
    settings = {"output_dir": str(folder), "mtp_training_mode": mode, **PLAN, **settings}
    data = rows() if data is None else data
    torch.manual_seed(0)
    if kind == "own":
        return MTPTrainer(get_mtp_model(model, module), MTPTrainingArguments(**settings), data, **own)
    how = {"mtp_enabled": True, "mtp_dropout_prob": 0.0, "gradient_checkpointing": False}
    how["mtp_method"] = module["method"]
    return SFTTrainer(model, SFTConfig(**how, **settings), None, data, processing_class=tiny_tokenizer(), **own)


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def column(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 19)[None]).logits


def adapted(**more: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(tiny_model(), LoraConfig(**{**LORA, **more}))


def partly_frozen() -> Any:
    model = tiny_model()
    model.model.layers[0].requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    return model


TARGETS: dict[str, Any] = {
    "full": tiny_model,
    "tied": lambda: tiny_model(tie_word_embeddings=True),
    "frozen parts": partly_frozen,
    "lora": adapted,
    "lora on the head": lambda: adapted(target_modules=["q_proj", "lm_head"]),
    "modules_to_save": lambda: adapted(modules_to_save=["lm_head"]),
}
# TRL itself refuses an adapter on the head: its fused head would pass it by
CASES = [*(("own", name) for name in TARGETS), ("trl", "frozen parts"), ("trl", "lora")]


# -- who learns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "target"), CASES)
def test_what_the_user_froze_stays_and_everything_is_as_it_was_afterwards(target, kind, tmp_path):
    trainer = make(kind, TARGETS[target](), tmp_path, **SGD)
    mtp = trainer.mtp
    mtp.module.heads[1].requires_grad_(False)
    mtp.model.eval()
    asked = {name: p.requires_grad for name, p in mtp.named_parameters()}
    modes = {name: part.training for name, part in mtp.named_modules()}
    before = copied(mtp)
    trainer.train()
    assert moved(mtp, before) >= {name for name, learns in asked.items() if learns}
    assert not {name for name in moved(mtp, before) if not asked.get(name, True)}
    assert {name: p.requires_grad for name, p in mtp.named_parameters()} == asked
    assert {name: part.training for name, part in mtp.named_modules()} == modes


@BOTH
def test_standalone_leaves_a_target_that_can_be_trained_jointly_afterwards(kind, tmp_path):
    model = tiny_model()
    before = copied(model)
    make(kind, model, tmp_path, "standalone").train()
    assert not moved(model, before) and all(p.requires_grad for p in model.parameters())
    make(kind, model, tmp_path).train()
    assert moved(model, before) == set(before)


@BOTH
def test_nothing_to_learn_and_nothing_to_store_it_in_are_said(kind, tmp_path):
    with pytest.raises(ValueError, match="no parameter of the model asks for a gradient"):
        make(kind, tiny_model().requires_grad_(False), tmp_path)
    model = adapted()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: trainable, but PEFT would not store it"):
        make(kind, model, tmp_path)


@BOTH
def test_a_frozen_target_is_read_without_dropout_and_one_that_learns_with_it(kind, tmp_path):
    def losses(mode: str, dropout: float) -> list[float]:
        trainer = make(kind, tiny_model(attention_dropout=dropout), tmp_path, mode, mtp_supervision="teacher")
        trainer.train()
        return column(trainer, "mtp_loss")

    assert losses("standalone", 0.5) == losses("standalone", 0.0)
    assert losses("joint", 0.5) != losses("joint", 0.0)


@BOTH
def test_the_modules_norms_and_biases_do_not_decay(kind, tmp_path):
    trainer = make(kind, tiny_model(), tmp_path, method={"method": "sequential"}, weight_decay=0.1)
    mtp = trainer.mtp
    decays = {name for name in trainer.get_decay_parameter_names(mtp) if name.startswith("module.")}
    assert decays == {f"module.{name}" for name, p in mtp.module.named_parameters() if p.dim() > 1}
    names = [name for name, _ in mtp.module.named_parameters()]
    assert any("enorm" in name for name in names) and any("hnorm" in name for name in names)
    masked = get_mtp_model(tiny_model(), {"method": "masked", "depth": 2})
    assert any(p is masked.module.rows.embedding for p in masked.module.undecayed())


@BOTH
def test_target_and_module_learn_at_rates_of_their_own(kind, tmp_path):
    trainer = make(kind, tiny_model(), tmp_path, mtp_learning_rate=0.3, mtp_heads_first_steps=2, **SGD)
    model, module, seen = copied(trainer.mtp.model), copied(trainer.mtp.module), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((bool(moved(trainer.mtp.model, model)), bool(moved(trainer.mtp.module, module))))

    trainer.add_callback(Watch())
    trainer.train()
    assert seen == [(False, True), (False, True), (True, True)]
    assert {group.get("is_mtp", False): group["lr"] for group in trainer.optimizer.param_groups} == {
        True: 0.3,
        False: 0.1,
    }


@BOTH
@pytest.mark.parametrize("mode", ["standalone", "joint"])
def test_noise_on_embeddings(mode, kind, tmp_path):
    """NEFTune: where the target learns on what it reads, else on what the module reads beside it."""
    found = []
    for alpha in (None, 20.0):
        trainer = make(kind, tiny_model(), tmp_path, mode, method={"method": "sequential"}, neftune_noise_alpha=alpha)
        trainer.train()
        found.append((column(trainer, "mtp_loss"), column(trainer, "loss")))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]
    assert not trainer.mtp.get_input_embeddings()._forward_hooks, "taken off again"


# -- what is learned ---------------------------------------------------------------------------------------------------


def batch() -> dict[str, Tensor]:
    return MTPCollator(0)([rows(5)[i] for i in range(5)])


def own_loss(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
    counted = logits[labels != -100].float()
    return 0.3 * ForCausalLMLoss(logits, labels, vocab_size, **kwargs) + counted.logsumexp(-1).pow(2).mean()


def with_a_loss_of_its_own() -> Any:
    model = tiny_model()
    model.loss_function = own_loss
    return model


MODELS: dict[str, Any] = {
    "llama": tiny_model,
    "experts": lambda: tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.5),
    "softcap": lambda: tiny_model("gemma2"),
    "scaled": lambda: tiny_model("granite", logits_scaling=7.0),
    "cohere": lambda: tiny_model("cohere", logit_scale=0.25),
    "own loss": with_a_loss_of_its_own,
    "lora on the head": lambda: adapted(target_modules=["q_proj", "lm_head"]),
    "modules_to_save": lambda: adapted(modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_targets_loss_is_its_own_and_so_are_its_gradients(name):
    model, inputs = MODELS[name]().eval(), batch()
    loss = model(**{n: inputs[n] for n in ("input_ids", "attention_mask", "labels")}).loss
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    wanted = dict(zip(parameters, torch.autograd.grad(loss, parameters.values(), allow_unused=True), strict=True))
    mtp = get_mtp_model(model, {"method": "heads", "depth": 2}).eval()
    ntp = mtp(**inputs, train_target=True)["ntp"]
    assert float((ntp.total / ntp.count).detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
    found = torch.autograd.grad(ntp.total / ntp.count, parameters.values(), allow_unused=True)
    for (n, gradient), mine in zip(wanted.items(), found, strict=True):
        assert (gradient is None) == (mine is None), n
        if gradient is not None:
            assert torch.allclose(mine, gradient, rtol=1e-3, atol=1e-5 * float(gradient.norm()) + 1e-8), n


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """A loss function as users write them: a sum over tokens by the number of items of the whole step."""
    squared = outputs.logits[:, :-1].float().pow(2).mean(-1)
    counts = labels[:, 1:] != -100
    return (squared * counts).sum() / num_items_in_batch


LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing_factor": 0.3},
    "function": {"compute_loss_func": summed},
}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_without_the_module_it_is_transformers_trainer(loss, accumulated, tmp_path):
    settings = {**PLAN, **SGD, "gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 2}
    how = dict(LOSSES[loss])
    function = {"compute_loss_func": how.pop("compute_loss_func")} if loss == "function" else {}
    wanted, found = tiny_model(), tiny_model()
    collator = MTPCollator(0)

    def plain(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {
            name: value for name, value in collator(some).items() if name in ("input_ids", "labels", "attention_mask")
        }

    arguments = TrainingArguments(output_dir=str(tmp_path), remove_unused_columns=False, **settings, **how)
    oracle = Trainer(wanted, arguments, train_dataset=rows(), data_collator=plain, **function)
    oracle.train()
    trainer = make("own", found, tmp_path, "disabled", **{**settings, **how, **function})
    trainer.train()
    assert column(trainer, "loss") == pytest.approx(column(oracle, "loss"), rel=1e-4)
    start = tiny_model().state_dict()
    for name, tensor in wanted.state_dict().items():
        assert torch.allclose(found.state_dict()[name], tensor, rtol=1e-3, atol=1e-5), name
        assert not torch.equal(start[name], tensor), name


@pytest.mark.parametrize("loss", LOSSES)
def test_without_the_module_it_is_trls_trainer(loss, tmp_path):
    how = {**SGD, **LOSSES[loss]}
    found = tiny_model()
    make("trl", found, tmp_path, "disabled", **how).train()
    function = {"compute_loss_func": how.pop("compute_loss_func")} if loss == "function" else {}
    wanted, args = tiny_model(), trl.SFTConfig(output_dir=str(tmp_path), gradient_checkpointing=False, **PLAN, **how)
    trl.SFTTrainer(wanted, args, None, rows(), processing_class=tiny_tokenizer(), **function).train()
    assert not moved(found, copied(wanted))


@BOTH
@pytest.mark.parametrize("loss", ["smoothed", "function"])
def test_other_losses_are_learned_beside_the_module_or_refused_by_name(loss, kind, tmp_path):
    trainer = make(kind, tiny_model(), tmp_path, **LOSSES[loss], **SGD)
    before = copied(trainer.mtp)
    trainer.train()
    assert moved(trainer.mtp, before) == set(before)
    plain = make(kind, tiny_model(), tmp_path, **SGD)
    plain.train()
    assert column(trainer, "ntp_loss")[0] != pytest.approx(column(plain, "ntp_loss")[0], rel=1e-3)
    assert column(trainer, "mtp_loss")[0] == pytest.approx(column(plain, "mtp_loss")[0], rel=1e-5)
    with pytest.raises(ValueError, match=next(iter(LOSSES[loss]))):
        make(kind, tiny_model(), tmp_path, "standalone", **LOSSES[loss])


@BOTH
def test_predictions_and_metrics_are_the_models(kind, tmp_path):
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"seen": float(prediction.label_ids.shape[0])}

    model = tiny_model()
    trainer = make(kind, model, tmp_path, eval_dataset=rows(4, seed=2), compute_metrics=metrics, eval_prompts=2)
    found = trainer.evaluate()
    assert found["eval_seen"] == 4.0 and "eval_tau" in found and "eval_mtp_loss" in found
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.predictions.shape == (*predicted.label_ids.shape, VOCAB) and predicted.metrics["test_seen"] == 4.0
    ids = torch.tensor([rows(4, seed=2)[0]["input_ids"]])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits[0].numpy()
    assert abs(predicted.predictions[0][: ids.shape[1]] - wanted).max() < 1e-4


# -- what is stored ----------------------------------------------------------------------------------------------------


def base_of(target: str) -> Any:
    return tiny_model(tie_word_embeddings=target == "tied")


def again(target: str, folder: Path) -> MTPModel:
    """What lies in the folder, as a user loads it."""
    if "lora" in target or target == "modules_to_save":
        model = PeftModel.from_pretrained(base_of(target), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    return MTPModel.from_pretrained(model, folder)


@pytest.mark.parametrize(("kind", "target"), CASES)
def test_every_door_gives_back_what_was_trained(target, kind, tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, **SGD}
    trainer = make(kind, TARGETS[target](), tmp_path / "run", **settings)
    trainer.train()
    said, module = logits(trainer.mtp.model), copied(trainer.mtp.module)
    assert not torch.equal(said, logits(TARGETS[target]()))
    trainer.save_model(str(tmp_path / "saved"))
    trainer.model.save_pretrained(str(tmp_path / "pretrained"))
    for folder in (tmp_path / "saved", tmp_path / "pretrained", tmp_path / "run" / "checkpoint-3"):
        loaded = again(target, folder)
        assert torch.equal(logits(loaded.model), said), folder.name
        assert not moved(loaded.module, module), folder.name
    resumed = make(kind, TARGETS[target](), tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert torch.equal(logits(resumed.mtp.model), said) and not moved(resumed.mtp.module, module)
    # the best of three
    taus = iter([1.1, 1.9, 1.2])
    monkeypatch.setattr(type(trainer), "measure_tau", lambda self, rows=None: {"tau": next(taus)})
    best = make(
        kind, TARGETS[target](), tmp_path / "best", eval_dataset=rows(2), eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_tau", **settings,
    )  # fmt: skip
    best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-2")
    loaded = again(target, tmp_path / "best" / "checkpoint-2")
    assert torch.equal(logits(best.mtp.model), logits(loaded.model)) and not moved(best.mtp, copied(loaded))
    assert not torch.equal(logits(best.mtp.model), said)


def test_an_adapter_on_four_bits_learns_and_is_stored(tmp_path):
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bits, device_map="cpu")

    trainer = make("own", get_peft_model(load(), LoraConfig(**LORA)), tmp_path, **SGD)
    before = {name: p.detach().clone() for name, p in trainer.mtp.model.named_parameters()}
    trainer.train()
    now = dict(trainer.mtp.model.named_parameters())
    assert {name for name, p in before.items() if not torch.equal(p, now[name])} == {n for n in now if "lora_" in n}
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path / "saved")), logits(trainer.mtp.model))


@pytest.mark.parametrize("door", ["own", "trl"])
@pytest.mark.parametrize("method", ["sequential", "masked", "heads"])
def test_an_evaluation_takes_no_gradient_from_an_adapter_on_four_bits(method, door, tmp_path):
    tiny_model(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "base")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=how, device_map="cpu")
    how = {**SGD, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "method": {"method": method}}
    trainer = make(door, get_peft_model(base, LoraConfig(**LORA)), tmp_path, eval_dataset=rows(2, seed=9), **how)
    moved_in: list[set[str]] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            named = trainer.mtp.model.named_parameters()
            moved_in.append({n for n, p in named if p.grad is not None and bool(p.grad.abs().sum() > 0)})

    trainer.add_callback(Watch())
    trainer.train()
    adapters = {name for name, p in trainer.mtp.model.named_parameters() if p.requires_grad}
    assert adapters and moved_in == [adapters] * 3


def test_a_resumed_run_keeps_every_digit_of_parameters_in_mixed_precision(tmp_path):
    def mixed() -> Any:
        model = tiny_model().to(torch.bfloat16)
        model.model.norm.float()
        return model

    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-4}
    whole = make("own", mixed(), tmp_path / "whole", mtp_loss_scaling_factor=0.0, **settings)
    whole.mtp.model.model.norm.register_forward_hook(lambda _module, _args, out: out.to(torch.bfloat16))
    whole.train()
    resumed = make("own", mixed(), tmp_path / "whole", mtp_loss_scaling_factor=0.0, **settings)
    resumed.mtp.model.model.norm.register_forward_hook(lambda _module, _args, out: out.to(torch.bfloat16))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert not moved(resumed.mtp, copied(whole.mtp))


# -- evaluation --------------------------------------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    """Rows without a length."""

    def __init__(self, some: Any) -> None:
        self.some = list(some)

    def __iter__(self) -> Any:
        return iter(self.some)


class Metrics(TrainerCallback):
    """What callbacks read at each evaluation."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.seen.append(dict(metrics))


@BOTH
def test_tau_stops_early(kind, tmp_path, monkeypatch):
    taus, metrics = iter([2.0, 1.5, 1.4, 1.3, 1.2, 1.1]), Metrics()
    trainer = make(
        kind, tiny_model(), tmp_path, eval_dataset=rows(2), eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, max_steps=6, load_best_model_at_end=True, metric_for_best_model="eval_tau",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2), metrics],
    )  # fmt: skip
    monkeypatch.setattr(type(trainer), "measure_tau", lambda self, rows=None: {"tau": next(taus)})
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert [found["eval_tau"] for found in metrics.seen] == [2.0, 1.5, 1.4]


@BOTH
@pytest.mark.parametrize("form", ["stream", "several"])
def test_tau_of_streams_and_of_several_sets(form, kind, tmp_path):
    """Of the first prompts of the rows that were evaluated, whatever they come as."""
    a, b = rows(4, seed=3), rows(4, seed=4)
    given: Any = {"a": a, "b": b} if form == "several" else Stream(a) if kind == "own" else a.to_iterable_dataset()
    trainer = make(kind, leaning_model(), tmp_path, eval_dataset=given, eval_prompts=2, eval_new_tokens=6)
    listed = make(kind, leaning_model(), tmp_path, eval_dataset=a, eval_prompts=2, eval_new_tokens=6)
    metrics = Metrics()
    trainer.add_callback(metrics)
    found, wanted = trainer.evaluate(), listed.evaluate()
    name = "eval_a" if form == "several" else "eval"
    for part in ("tau", "accept_at_1", "mtp_loss", "accuracy_1"):
        assert found[f"{name}_{part}"] == pytest.approx(wanted[f"eval_{part}"], rel=1e-5), part
    assert all(any(key.endswith("_tau") for key in seen) for seen in metrics.seen)
    if form == "several":
        assert found["eval_b_mtp_loss"] != found["eval_a_mtp_loss"] and len(metrics.seen) == 2


@BOTH
def test_where_tau_is_not_measured_there_is_no_best_and_no_crash(kind, tmp_path):
    trainer = make(
        kind, tiny_model(), tmp_path, eval_dataset=rows(2), eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, max_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_tau", eval_prompts=0,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="tau was not measured"):
        trainer.train()
    assert trainer.state.best_model_checkpoint is None and column(trainer, "eval_loss")


def test_untouched_defaults_keep_the_best_checkpoint_by_tau(tmp_path, monkeypatch):
    taus = iter([1.1, 1.9, 1.2])
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    trainer = make("own", tiny_model(), tmp_path, eval_dataset=rows(2), **settings)
    monkeypatch.setattr(type(trainer), "measure_tau", lambda self, rows=None: {"tau": next(taus)})
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4"), "of steps 2, 4 and the last"
    best = MTPModel.from_pretrained(trainer.mtp.model, tmp_path / "checkpoint-4")
    assert not moved(trainer.mtp.module, copied(best.module))
    assert not make("own", tiny_model(), tmp_path, **settings).args.load_best_model_at_end, "nothing to evaluate"


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@BOTH
def test_tau_is_that_of_the_module_as_it_is_now(kind, optim, tmp_path):
    """A fused step moves parameters without their version counters."""
    model = leaning_model()
    texts = model.generate(torch.arange(5, 13)[:, None], max_new_tokens=14, do_sample=False, pad_token_id=0).tolist()
    data = Dataset.from_list([{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in texts])
    trainer = make(
        kind, model, tmp_path, "standalone", data=data, optim=optim, learning_rate=0.05, max_steps=12, eval_steps=6,
        eval_strategy="steps", eval_dataset=data, eval_prompts=8, eval_new_tokens=10, eval_on_start=True,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = MTPModel.from_pretrained(leaning_model(), tmp_path / "saved")
    taus = column(trainer, "eval_tau")
    assert taus[-1] == decoded_tau(again, trainer.eval_dataset, 8, 10)["tau"] > taus[0]


# -- steps that are left out -------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_leaves_everything_as_it_was(what, kind, tmp_path):
    def spoilt(how: str) -> tuple[Any, list]:
        trainer = make(
            kind, tiny_model(), tmp_path, nonfinite_loss=how, weight_decay=0.1, max_steps=4, optim="adamw_torch",
            learning_rate=1e-2, gradient_accumulation_steps=2, per_device_train_batch_size=1,
        )  # fmt: skip
        states, head = [copied(trainer.mtp)], trainer.mtp.module.heads[0]

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                states.append(copied(trainer.mtp))

        trainer.add_callback(Watch())
        weight = next(head.parameters())
        if what == "gradient":
            weight.register_hook(lambda g: g * math.inf if trainer.state.global_step == 2 else g)
        else:
            head.register_forward_hook(lambda _m, _a, out: out * math.nan if trainer.state.global_step == 2 else out)
            head.body.register_forward_hook(
                lambda _m, _a, out: out * math.nan if trainer.state.global_step == 2 else out
            )
        return trainer, states

    trainer, states = spoilt("skip")
    trainer.train()
    same = [all(torch.equal(t, after[n]) for n, t in before.items()) for before, after in itertools.pairwise(states)]
    assert same == [False, False, True, False] and trainer.skipped == 1
    assert column(trainer, "skipped_batches")[-1] == 1
    assert all(t.isfinite().all() for t in states[-1].values())
    trainer, states = spoilt("stop")
    with pytest.raises(FloatingPointError, match="step 2: the (loss|gradient's norm) is"):
        trainer.train()


# -- data --------------------------------------------------------------------------------------------------------------


def test_a_stream_trains_as_the_list_does(tmp_path):
    data = rows(12)
    plan = {"max_steps": 4, "train_sampling_strategy": "sequential"}
    runs = []
    for form in (data, Stream(data), data.to_iterable_dataset()):
        trainer = make("own", tiny_model(), tmp_path, data=form, **plan)
        trainer.train()
        runs.append(column(trainer, "loss"))
    assert runs[0] == runs[1] == runs[2]
    with pytest.raises(ValueError, match="max_steps: got none, wanted a number of steps"):
        make("own", tiny_model(), tmp_path, data=Stream(data), max_steps=-1)
    packed = make("own", tiny_model(), tmp_path, data=Stream(data), packing=True, max_length=40, **plan)
    assert max(len(row["input_ids"]) for row in packed.train_dataset) > 20
    packed.train()


def test_a_stream_may_hold_rows_that_leave_nothing_and_bad_ones_are_named(tmp_path):
    """Sixty-four at a time: of a group that leaves nothing the next one is asked."""
    short = [{"input_ids": [5], "labels": [5]}] * 70
    plan = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    with pytest.warns(UserWarning, match="rows were dropped"):
        make("own", tiny_model(), tmp_path, data=Stream([*short, *rows(12)]), **plan).train()
    trainer = make("own", tiny_model(), tmp_path, data=Stream([*rows(100), {"input_ids": [-1]}]), **plan)
    with pytest.raises(ValueError, match="^stream, row 101: input_ids: got list"):
        list(trainer.train_dataset)
    trainer = make(
        "own", tiny_model(), tmp_path, data=Stream([{"text": 3}] * 70 + [*rows(12)]), skip_bad_rows=True, **plan
    )
    with pytest.warns(UserWarning, match="64 rows are skipped"):
        assert len(list(trainer.train_dataset)) == 12


def test_trls_trainer_takes_a_stream_and_asks_for_steps(tmp_path):
    data = rows(12).to_iterable_dataset()
    with pytest.raises(ValueError, match="max_steps"):
        make("trl", tiny_model(), tmp_path, data=data, max_steps=-1)
    losses = []
    for form in (data, rows(12)):
        trainer = make("trl", tiny_model(), tmp_path, data=form, max_steps=3, train_sampling_strategy="sequential")
        trainer.train()
        losses.append(column(trainer, "loss"))
    assert losses[0] == losses[1] and len(losses[0]) == 3


def store(mtp: MTPModel, folder: Path, **other: Any) -> HiddenStore:
    """Texts with the states that this target has of them."""
    fingerprint = {"target": mtp.target.fingerprint(), "hidden_source": mtp.mtp_config.hidden_source, **other}
    with HiddenStore(folder, fingerprint=fingerprint, width=mtp.target.hidden_size) as made:
        for at, row in enumerate(rows(8)):
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                states = mtp.target.forward_text(ids, torch.arange(ids.shape[1])[None]).post_norm_BRD[0]
            made.append(str(at), row["input_ids"], row["labels"], states)
    return HiddenStore.load(folder)


def test_kept_states_are_used_only_where_they_are_the_targets(tmp_path, capsys):
    mtp = get_mtp_model(tiny_model(), {"method": "heads", "depth": 2})
    kept = store(mtp, tmp_path / "kept")
    plain = make("own", tiny_model(), tmp_path, data=rows(8), **SGD)
    plain.train()
    joint = make("own", tiny_model(), tmp_path, data=kept, **SGD)
    assert "the target learns, so its kept states would go stale" in capsys.readouterr().out
    joint.train()
    assert column(joint, "loss") == column(plain, "loss") and not moved(joint.mtp, copied(plain.mtp))
    alone = make("own", tiny_model(), tmp_path, "standalone", data=kept, **SGD)
    alone.mtp.model.model.forward = None  # not asked
    alone.train()
    limits = {"max_length": 1024, "vocab_size": tiny_model().config.vocab_size}  # as the trainer's, and others
    for rows_of in (kept, load_rows(kept), encode_rows(kept, None)[0], encode_rows(kept, None, **limits)[0]):
        with pytest.raises(ValueError, match="states of another target .*weights: kept"):
            make("own", tiny_model(seed=3), tmp_path, "standalone", data=rows_of)
    with pytest.raises(ValueError, match="hidden_source: kept 'pre_norm', here 'post_norm'"):
        make("own", tiny_model(), tmp_path, "standalone", data=store(mtp, tmp_path / "pre", hidden_source="pre_norm"))
    with pytest.raises(ValueError, match="states of another target"):
        make("own", adapted(), tmp_path, "standalone", data=kept)


def flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """What flash attention sees: no mask, and documents by their positions in a batch of one row only."""
    assert mask is None
    positions_T = kwargs["position_ids"][0]
    R = query.shape[2]
    document_T = (
        (positions_T == 0).cumsum(0) if _is_packed_sequence(kwargs["position_ids"], len(query)) else positions_T * 0
    )
    seen_TT = torch.ones(R, R, dtype=torch.bool).tril() & (document_T[:, None] == document_T)
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value, seen_TT, scale=kwargs["scaling"])
    return out.transpose(1, 2), None


@pytest.mark.parametrize("mode", ["standalone", "joint"])
def test_packed_documents_stay_apart_under_flash_attention(mode, tmp_path, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_reference", flash)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "flash_reference", lambda *_, **__: None)
    runs = []
    for attention in ("sdpa", "flash_reference"):
        model = with_a_loss_of_its_own() if mode == "joint" else tiny_model()
        model.config._attn_implementation_internal = attention
        plan = {"packing": True, "max_length": 40, "max_steps": 2, "per_device_train_batch_size": 3}
        trainer = make("own", model, tmp_path, mode, **plan, **SGD)
        assert len(trainer.train_dataset) > 3
        trainer.train()
        runs.append(column(trainer, "loss"))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


# -- words -------------------------------------------------------------------------------------------------------------


def test_one_word_for_one_thing_and_the_pages_words_for_the_same(tmp_path):
    common = {"output_dir": str(tmp_path), "mtp_enabled": True, "use_cpu": True, "bf16": False}
    plain = SFTConfig(**common)
    assert (plain.mtp_loss_weight, plain.mtp_loss_scaling_factor, plain.mtp_scale) == (0.5, 0.5, 0.5)
    assert plain.mtp_weight_decay_strategy == plain.mtp_depth_weights == "uniform"
    given = {"mtp_loss_weight": 0.2, "mtp_weight_decay_strategy": "harmonic"}
    same = {"mtp_loss_scaling_factor": 0.2, "mtp_depth_weights": "harmonic"}
    for settings in (given, same, {**given, **same}):
        args = SFTConfig(**common, **settings)
        assert {name: getattr(args, name) for name in {**given, **same}} == {**given, **same}
    with pytest.raises(ValueError, match="mtp_loss_weight=0.2 and mtp_loss_scaling_factor=0.3 are one thing"):
        SFTConfig(**common, mtp_loss_weight=0.2, mtp_loss_scaling_factor=0.3)
    shared = {name for name in MTPTrainingArguments.__dataclass_fields__ if name.startswith(("mtp_", "eval_", "nonf"))}
    assert shared <= set(SFTConfig.__dataclass_fields__)


def test_trl_trains_masks_with_its_own_defaults(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), mtp_enabled=True, mtp_method="masked", **PLAN)
    trainer = SFTTrainer(tiny_model(), args, None, rows(), processing_class=tiny_tokenizer())
    before = copied(trainer.mtp.module)
    trainer.train()
    assert moved(trainer.mtp.module, before)
