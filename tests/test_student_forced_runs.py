"""Self-distillation as a whole (arXiv 2602.06019): who moves and who does not, runs that must agree, decoding under
plain adapters, the presets, and what is refused. Layout, losses and gradients: test_student_forced.py.
"""

# B rows, T positions, K masks.

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from datasets import Dataset
from safetensors.torch import load_file
from test_masked_decode import BATCHES, NEW, check_drafts, drafted, knowing, reference, run, target, total  # noqa: F401
from torch import nn
from trl import SFTConfig, SFTTrainer

from foretell.config import ConfigError
from foretell.data.collate import to_batch
from foretell.methods.base import load_preset
from foretell.methods.masked import MaskedConfig
from foretell.methods.student_forced import propose_masks
from foretell.models.target import Target
from foretell.mtp import MTPModel, get_mtp_model
from foretell.training.objective import choose_labels, count_labels, objective
from foretell.training.trainer import MTPTrainer, MTPTrainingArguments
from foretell.types import IGNORE_INDEX
from tests.test_masked import make, sft_trainer
from tests.test_methods import ROWS, off, packed
from tests.test_methods import make as make_any
from tests.test_trainer import (  # noqa: F401 (quick_collections is a fixture)
    SGD,
    assert_same_run,
    assert_same_weights,
    bits_differ,
    column,
    copied,
    quick_collections,
    rows,
    trainer_of,
)
from tests.test_trainer import run as trained
from tests.tiny import VOCAB, tiny_model, tiny_tokenizer

HARD, SOFT, DATA = "student_forced", "student_forced_soft", "student_forced_gt"
REGIONS = {"mask_positions": "regions", "region_tokens": 18, "regions": 3}
# settings, mode
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "gated": ({}, "standalone"),
    "plain": ({"lora_gate": False, "sampler": False}, "standalone"),
    "whole": ({"lora_rank": 0, "sampler": False}, "joint"),
}
LONG_ROWS = [{"input_ids": [(7 * i * i + 3 * a) % 90 + 2 for i in range(24 + a)]} for a in range(8)]


# -- the start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "whole"])
def test_at_the_start_the_anchor_has_nothing_to_learn(kind):
    settings, mode = KINDS[kind]
    mtp = get_mtp_model(tiny_model(), MaskedConfig(depth=3, mask_positions=0.5, **settings)).train()
    if kind == "whole":
        mtp.module.teacher = Target(copy.deepcopy(mtp.model))
    chosen_BTK = mtp.module.choose(to_batch(packed(ROWS)), torch.Generator().manual_seed(0))

    def anchor() -> tuple[float, float]:
        how = {"mtp_supervision": SOFT, "mtp_loss": "kl", "mtp_training_mode": mode, "train_target": kind == "whole"}
        out = mtp(**packed(ROWS), mtp_labels=chosen_BTK, **how)
        assert int(out["anchor"].count) == int(out["mtp"][0].count) > 5
        assert all(float(loss.total.detach() / loss.count) > 0.01 for loss in out["mtp"]), "the masks have"
        return float(out["anchor"].total.detach() / out["anchor"].count)

    assert abs(anchor()) < 1e-6
    with torch.no_grad():
        for name, parameter in (mtp.module if kind == "plain" else mtp.model).named_parameters():
            if "embedding" not in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert anchor() > 1e-5


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("supervision", [HARD, DATA])
@pytest.mark.parametrize("kind", KINDS)
def test_who_moves_and_who_does_not(kind, supervision, tmp_path):
    settings, mode = KINDS[kind]
    mtp = make(**settings, **REGIONS)
    before = copied(mtp)
    how = {"mtp_training_mode": mode, "mtp_supervision": supervision, "weight_decay": 0.1}
    trainer = trainer_of(mtp, tmp_path, LONG_ROWS, max_steps=3, save_strategy="steps", save_steps=3, **how)
    trainer.train()
    moved = bits_differ(mtp, before)
    assert moved == {name for name in before if kind == "whole" or name.startswith("module.")}
    teacher = mtp.module.teacher
    assert (teacher is not None) == (kind == "whole" and supervision == HARD), "the only one that needs a copy"
    if teacher is not None:
        state = teacher.model.state_dict()
        assert all(torch.equal(tensor, before[f"model.{name}"]) for name, tensor in state.items())
        assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    # nobody stores it
    assert mtp.state_dict().keys() == before.keys()
    folder = tmp_path / "checkpoint-3"
    assert load_file(folder / "mtp_model.safetensors").keys() == mtp.module.state_dict().keys()
    assert (folder / "model.safetensors").exists() == (kind == "whole")
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    wanted = sum(t.nbytes for name, t in before.items() if kind == "whole" or name.startswith("module."))
    assert wanted <= stored < 1.1 * wanted + 20_000


def test_a_teacher_of_ones_own(tmp_path):
    def trainer(kind: str, teacher: nn.Module | None, supervision: str = SOFT) -> MTPTrainer:
        settings, mode = KINDS[kind]
        how = {
            "mtp_training_mode": mode,
            "mtp_supervision": supervision,
            "mtp_loss": "kl" if supervision == SOFT else "ce",
        }
        how |= {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True}
        args = MTPTrainingArguments(output_dir=str(tmp_path), **how)
        return MTPTrainer(make(**settings, **REGIONS), args, LONG_ROWS, teacher_model=teacher)

    other = tiny_model(seed=1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for kind in ("plain", "whole"):
        losses = []
        for teacher in (None, tiny_model(), other):  # the second: the same weights once more
            made = trainer(kind, teacher)
            made.train()
            losses.append(made.state.log_history[0]["mtp_loss"])
        assert losses[1] == pytest.approx(losses[0], rel=1e-5) and abs(losses[2] - losses[0]) > 0.05
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(ValueError, match="got a vocabulary of 90 tokens, the student has 97"):
        trainer("whole", tiny_model(vocab_size=90))
    with pytest.raises(ValueError, match="behind gated adapters the text is the target's"):
        trainer("gated", other)
    with pytest.raises(ValueError, match=f"mtp_supervision={DATA} asks none"):
        trainer("whole", other, DATA)


@pytest.mark.parametrize("mode", ["standalone", "joint"])
@pytest.mark.parametrize("method", ["sequential", "heads"])
def test_chains_too_have_a_teacher_that_stays(method, mode, tmp_path):
    mtp = make_any(method, depth=2)
    before = copied(mtp)
    logs = trained(mtp, tmp_path, LONG_ROWS, max_steps=2, mtp_training_mode=mode, mtp_supervision=HARD)
    assert bits_differ(mtp, before) == {name for name in before if mode == "joint" or name.startswith("module.")}
    assert (mtp.module.teacher is not None) == (mode == "joint") == ("ntp_loss" in logs[0])
    for name, tensor in mtp.module.teacher.model.state_dict().items() if mode == "joint" else ():
        assert torch.equal(tensor, before[f"model.{name}"])


@pytest.mark.parametrize("method", ["masked", "sequential"])
def test_the_teacher_of_a_model_that_others_have_trained_is_a_model_of_its_own(method, tmp_path):
    """TRL and accelerate leave forwards on a model whose closures hold that model, and deep copies keep closures."""
    model = tiny_model("gemma2")  # its logits have a cap of their own
    config = SFTConfig(str(tmp_path / "sft"), report_to=[], use_cpu=True, max_steps=1, save_strategy="no")
    had = SFTTrainer(model, config, train_dataset=Dataset.from_list(LONG_ROWS), processing_class=tiny_tokenizer())
    had.train()
    model.forward = convert_outputs_to_fp32(model.forward)
    settings = KINDS["whole"][0] if method == "masked" else {}
    mtp = get_mtp_model(model, {"method": method, "depth": 2, **settings})
    how = {"mtp_training_mode": "joint", "mtp_supervision": HARD, "max_steps": 1, "learning_rate": 0.1}
    args = MTPTrainingArguments(output_dir=str(tmp_path), save_strategy="no", report_to=[], use_cpu=True, **how)
    if method == "masked":
        with pytest.raises(ValueError, match="gradient_checkpointing: .* turn it off"):
            MTPTrainer(mtp, args, LONG_ROWS)  # TRL has turned it on
        model.gradient_checkpointing_disable()
    trainer, ids = MTPTrainer(mtp, args, LONG_ROWS), torch.arange(10, 20)[None]

    @torch.no_grad()
    def says(who: Any) -> torch.Tensor:
        return who.logits(who.forward_text(ids, torch.arange(10)[None]).post_norm_BRD)

    before = says(mtp.module.teacher)
    assert torch.equal(says(mtp.target), before)
    trainer.train()
    assert torch.equal(says(mtp.module.teacher), before) and off(says(mtp.target), before) > 0.01


@torch.no_grad()
def test_sampled_proposals_follow_the_modules_own_distribution():
    mtp, batch, draws = make(depth=2, sampler=False, proposal="sample"), to_batch(packed(ROWS)), 2000
    carries_BT = torch.zeros_like(batch.input_ids_BT, dtype=torch.bool)
    carries_BT[1, 3] = True
    piece = next(mtp.module.pieces(mtp.target, batch, carries_BT, 2))
    torch.manual_seed(0)
    drawn = torch.stack([propose_masks(mtp.module, mtp.target, piece)[1, 0] for _ in range(draws)])
    for k, state_D in enumerate((piece.owners_BOD[1, 0], piece.masks_BOKD[1, 0, 0])):
        probs_V = mtp.target.logits(state_D).softmax(-1)
        count_V = drawn[:, k].bincount(minlength=VOCAB)
        wrong = {"even": torch.full_like(probs_V, 1 / VOCAB), "sharp": (2 * probs_V.log()).softmax(-1)}
        for name, wanted_V in {"own": probs_V, "beside": probs_V.roll(1), **wrong}.items():
            statistic = float(((count_V - draws * wanted_V) ** 2 / (draws * wanted_V)).sum())
            assert (statistic < VOCAB + 6 * (2 * VOCAB) ** 0.5) == (name == "own"), name
    mtp.mtp_config.proposal = "argmax"
    first_BO = mtp.target.logits(piece.owners_BOD).argmax(-1)
    assert torch.equal(propose_masks(mtp.module, mtp.target, piece)[..., 0], first_BO)


@pytest.mark.parametrize("where", ["all", "regions"])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_cannot_be_seen(kind, where, tmp_path):
    """Regions of k rows have one token of text: then all tokens carry, whatever the micro-batch draws."""
    settings, mode = KINDS[kind]
    runs = []
    for size, steps in ((8, 1), (1, 8)):
        mtp = make(**settings, mask_positions=where, region_tokens=4, regions=1, k_min=4)
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 3}
        how = {"mtp_training_mode": mode, "mtp_supervision": SOFT, "mtp_loss": "kl", "mtp_depth_weights": "rows"}
        how |= {"mtp_loss_scaling_factor": 1.0}
        runs.append((mtp, trained(mtp, tmp_path, rows(8), **sizes, **how, **{**SGD, "learning_rate": 0.01})))
    names = ("loss", "mtp_loss", "grad_norm", "accuracy_1", "accuracy_3")
    assert_same_run(runs[1][1], runs[0][1], names if kind == "gated" else (*names, "ntp_loss"))
    assert_same_weights(runs[1][0], runs[0][0])
    assert float(column(runs[0][1], "loss").std()) > 1e-3


@pytest.mark.parametrize("supervision", [HARD, SOFT])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_weigh_alike(kind, supervision, tmp_path):
    """The paper's mean over all R * k rows, and what the trainer logs is that."""
    settings, mode = KINDS[kind]
    mtp = make(**settings, **REGIONS)
    if kind == "whole":
        mtp.module.teacher = Target(copy.deepcopy(mtp.model))
    how = {"mtp_supervision": supervision, "mtp_loss": "kl" if supervision == SOFT else "ce"}
    inputs = {"input_ids": torch.tensor([LONG_ROWS[0]["input_ids"]])}
    inputs["labels"] = inputs["input_ids"].clone().index_fill_(1, torch.tensor([0]), IGNORE_INDEX)
    choose_labels(mtp.module, [inputs], 7, 0, 0)
    out = mtp(**inputs, mtp_training_mode=mode, train_target=kind == "whole", **how)
    anchored = kind != "gated"
    counts_K1 = count_labels(to_batch(inputs), 3, None, VOCAB, anchored)
    losses = [*out["mtp"], *([out["anchor"]] if anchored else [])]
    carrying = int((inputs["mtp_labels"] != IGNORE_INDEX).any(-1).sum())
    k = 1 + int((inputs["mtp_labels"] != IGNORE_INDEX).any(1).sum())
    assert sum(int(loss.count) for loss in losses) == carrying * (k if anchored else k - 1) > 4, "spans are whole"
    mean = sum(float(loss.total.detach()) for loss in losses) / sum(int(loss.count) for loss in losses)
    _, parts = objective(out, counts_K1, scale=1.0, weights="rows", beta=0.6)
    assert float(parts["mtp"]) == pytest.approx(mean, rel=1e-5)
    if anchored:  # each text token is either of a span or of the prefix
        assert int(counts_K1[0]) == int(out["ntp"].count) == inputs["input_ids"].shape[1] - 1 - carrying
    plan = {"max_steps": 1, "per_device_train_batch_size": 1, "seed": 7, "mtp_depth_weights": "rows", **how}
    logs = trained(mtp, tmp_path, LONG_ROWS[:1], mtp_training_mode=mode, mtp_loss_scaling_factor=0.5, **plan, **SGD)
    assert logs[0]["mtp_loss"] == pytest.approx(mean, rel=1e-4)
    prefix = float(out["ntp"].total.detach() / out["ntp"].count) if anchored else 0.0
    assert logs[0]["loss"] == pytest.approx(0.5 * mean + prefix, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_evaluated_is_what_is_trained(kind, tmp_path):
    settings, mode = KINDS[kind]
    mtp = make(**settings, **REGIONS)
    plan = {"max_steps": 1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "eval_prompts": 0}
    plan |= {"mtp_training_mode": mode, "mtp_supervision": HARD, "learning_rate": 0.0}
    trainer = trainer_of(mtp, tmp_path, LONG_ROWS[:1], eval_dataset=LONG_ROWS[:1], **plan)
    with torch.no_grad():  # away from its teacher
        for parameter in mtp.model.parameters() if kind == "whole" else ():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    found = trainer.evaluate()
    trainer.train()
    wanted = next(entry for entry in trainer.state.log_history if "loss" in entry)
    names = [name for name in ("loss", "mtp_loss", "ntp_loss") if name in wanted]
    assert len(names) == (2 if kind == "gated" else 3)
    assert [found[f"eval_{name}"] for name in names] == pytest.approx([wanted[name] for name in names], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_by_bit(kind, tmp_path):
    settings, mode = KINDS[kind]
    plan = {"mtp_training_mode": mode, "mtp_supervision": SOFT, "mtp_loss": "kl", "max_steps": 4}
    plan |= {"save_strategy": "steps", "save_steps": 2, "learning_rate": 5e-3, "lr_scheduler_type": "cosine"}
    plan |= {"mtp_loss_scaling_factor": 1.0, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    whole = make(**settings, **REGIONS)
    wanted = trained(whole, tmp_path / "whole", LONG_ROWS, **plan)

    def resumed(folder: Path, teacher_of_checkpoint: bool = False) -> tuple[MTPModel, list[dict[str, float]]]:
        shutil.copytree(tmp_path / "whole" / "checkpoint-2", folder / "checkpoint-2")
        mtp = make(**settings, **REGIONS)
        trainer = trainer_of(mtp, folder, LONG_ROWS, **plan)
        with torch.no_grad():
            for parameter in mtp.module.parameters():
                parameter.zero_()
        if teacher_of_checkpoint:
            mtp.module.teacher = Target(type(mtp.model).from_pretrained(folder / "checkpoint-2"))
        trainer.train(resume_from_checkpoint=True)
        return mtp, [entry for entry in trainer.state.log_history if "loss" in entry]

    mtp, logs = resumed(tmp_path / "again")
    assert len(logs) == len(wanted) == 4 and torch.equal(column(logs, "loss"), column(wanted, "loss"))
    assert not bits_differ(mtp, copied(whole)) and len(set(column(wanted, "loss").tolist())) == 4
    if kind == "whole":  # the gate: the trained model as its own teacher
        mtp, logs = resumed(tmp_path / "wrong", teacher_of_checkpoint=True)
        assert bits_differ(mtp, copied(whole)) and column(logs, "loss")[2] != column(wanted, "loss")[2]


# -- decoding ----------------------------------------------------------------------------------------------------------


def merged(mtp: MTPModel) -> nn.Module:
    """The target with its adapters multiplied out, as anybody would."""
    model, adapters = copy.deepcopy(mtp.model), mtp.module.rows.adapters
    layers = Target(model).layers
    with torch.no_grad():
        for path in adapters.paths:
            lora, name = adapters.adapter(path)
            added = lora.lora_B.weight[lora.share(name)] @ lora.lora_A.weight
            layers.get_submodule(path).weight.add_(added * lora.scale)
    return model


PLAIN_VARIANTS: dict[str, dict[str, Any]] = {
    "sampler": {},
    "fused": {"fuse_weights": True, "lora_use_rslora": True},
    "few linears": {"lora_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("variant", PLAIN_VARIANTS)
def test_plain_adapters_decode_as_the_merged_model(variant, batch, drafted):  # noqa: F811
    mtp = knowing(target(), noise=0.6, lora_gate=False, **PLAIN_VARIANTS[variant])
    inputs, slots = BATCHES[batch]
    wanted = reference(merged(mtp), inputs, max_new_tokens=NEW).tolist()
    assert wanted != reference(target(), inputs, max_new_tokens=NEW).tolist(), "else nothing is shown"
    assert run(mtp, inputs, max_new_tokens=NEW, num_draft_tokens=0, slots=slots).sequences.tolist() == wanted
    accepted = refused = 0
    for layout in ("linear", "quadratic", "two_pass"):
        drafted.clear()
        out = run(mtp, inputs, max_new_tokens=NEW, draft_layout=layout, slots=slots)
        assert out.sequences.tolist() == wanted and out.stats.lossless
        accepted += total(out.stats.accepted)
        refused += total(out.stats.drafted) - total(out.stats.accepted)
        if layout == "quadratic" and batch != "one":
            check_drafts(mtp, drafted, layout)
    assert accepted > 0 and refused > 0


def test_plain_adapters_draft_what_the_merged_model_says_at_masks():
    mtp = make(lora_gate=False, sampler=False)
    model, ids = merged(mtp), torch.tensor([ROWS[0][0][0]])
    found = mtp.draft_logits(ids)
    with torch.no_grad():
        for t in range(ids.shape[1]):
            text = torch.cat([mtp.target.embed(ids[0, : t + 1]), mtp.module.rows.embedding])[None]
            wanted = model(inputs_embeds=text).logits[0, t + 1 :]
            assert off(found[0, t], wanted) < 1e-5
            assert off(found[0, t], mtp.model(inputs_embeds=text).logits[0, t + 1 :]) > 1e-3, "the gate: no adapters"


@pytest.mark.parametrize("settings", [{"lora_gate": False}, {"lora_rank": 0}], ids=["plain", "no adapters"])
def test_saved_and_loaded_it_drafts_the_same(settings, tmp_path, drafted):  # noqa: F811
    mtp, (inputs, slots) = knowing(target(), noise=0.6, **settings), BATCHES["five in two slots"]
    mtp.save_pretrained(tmp_path)
    loaded = MTPModel.from_pretrained(target(), tmp_path)
    assert loaded.mtp_config == mtp.mtp_config
    first = run(mtp, inputs, max_new_tokens=NEW, slots=slots, draft_layout="quadratic")
    once = list(drafted)
    second = run(loaded, inputs, max_new_tokens=NEW, slots=slots, draft_layout="quadratic")
    assert drafted == once * 2 and len(once) > 20 and first.sequences.tolist() == second.sequences.tolist()
    assert first.sequences.tolist() == reference(merged(mtp), inputs, max_new_tokens=NEW).tolist()
    assert total(first.stats.accepted) > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "the target"),
        ({"lora_rank": 0, "lora_gate": False}, "the target"),
        ({"lora_gate": False}, "the target with the module's adapters on, not the target alone"),
    ],
)
def test_a_lossless_output_says_whose_it_is(settings, words):
    mtp = knowing(target(), **settings)
    stats = run(mtp, BATCHES["one"][0], max_new_tokens=2).stats
    assert mtp.module.reference == mtp.reference == stats.reference == words


def test_a_whole_model_that_was_trained_speaks_for_itself(tmp_path):
    settings, mode = KINDS["whole"]
    mtp = make(**settings)
    assert mtp.reference == "the target"
    trainer = trainer_of(mtp, tmp_path, LONG_ROWS, max_steps=1, mtp_training_mode=mode, mtp_supervision=HARD)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    student = type(mtp.model).from_pretrained(tmp_path / "saved")
    loaded = MTPModel.from_pretrained(student, tmp_path / "saved")
    stats = run(loaded, BATCHES["one"][0], num_draft_tokens=2).stats
    assert stats.reference == "the trained student at k = 1, not the model it was trained from" and stats.lossless


# -- presets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["self-distill", "self-distill-1gpu", "glora-student-forced"])
def test_presets_train(name, tmp_path):
    preset = load_preset(name)
    mtp = get_mtp_model(tiny_model(), preset["module"])
    before = copied(mtp)
    few = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "warmup_steps": 0}
    data = [{"input_ids": [(7 * i * i + a) % 90 + 2 for i in range(170)]} for a in range(4)]
    trainer = trainer_of(mtp, tmp_path, data, **{**preset["training"], **few})
    assert all(len(row["input_ids"]) == (170 if "glora" in name else 160) for row in trainer.train_dataset)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(entry["mtp_loss"] > 0 for entry in logs)
    assert ("ntp_loss" in logs[0]) == (name != "glora-student-forced")
    moved = bits_differ(mtp, before)
    assert moved and any(n.startswith("model.") for n in moved) == (name != "glora-student-forced")
    config = mtp.mtp_config
    wanted = {"self-distill": (15, 2, 5), "self-distill-1gpu": (7, 8, 1), "glora-student-forced": (4, 2, 5)}[name]
    assert (config.depth, config.k_min, config.regions) == wanted


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k_max": 7, **REGIONS}, r"k_max: got 7 for regions of 18 // 3 = 6 rows.*wanted k_max of at most 6"),
        ({"k_max": 4, "mask_positions": "regions", "regions": 200}, r"k_max: got 4 for regions of 160 // 200 = 0 rows"),
        ({"k_max": 4, "k_min": 1, **REGIONS}, "k_min: got 1, wanted 2 to k_max = 4"),
        ({"k_max": 4, "k_min": 5, **REGIONS}, "k_min: got 5, wanted 2 to k_max = 4"),
        ({"fixed_k": 1, **REGIONS}, "depth: got 0"),
        ({**REGIONS, "regions": 0}, "region_tokens, regions: got 18 and 0, wanted at least 1 of both"),
        ({**REGIONS, "region_tokens": 0}, "region_tokens, regions: got 0 and 3, wanted at least 1 of both"),
        ({"k_max": 5, "depth": 2}, "k_max=5 and depth=2 disagree: depth is k - 1"),
        ({"fixed_k": 3, "depth": 3}, "fixed_k=3 and depth=3 disagree: depth is k - 1"),
        ({"fixed_k": 8, "k_max": 16}, "k_max=16"),
        ({"fixed_k": 5, "k_max": 9}, "k_max=9"),
        ({"prefix_loss_weight": -1.0}, "wanted none below 0"),
        ({"entropy_loss_weight": -1.0}, "wanted none below 0"),
    ],
)
def test_layouts_that_cannot_be_are_refused(settings, words):
    with pytest.raises((ConfigError, ValueError), match=words):
        MaskedConfig(**settings)


def test_k_is_another_name_of_depth():
    assert MaskedConfig(k_max=8) == MaskedConfig(depth=7) == MaskedConfig(depth=7, k_max=8)
    assert MaskedConfig(fixed_k=8) == MaskedConfig(depth=7, k_min=8) == MaskedConfig(fixed_k=8, k_max=8)


def test_a_hard_teacher_has_no_distribution(tmp_path):
    for supervision in (HARD, DATA):
        with pytest.raises(ValueError, match=f"mtp_loss: kl needs a distribution; with mtp_supervision={supervision}"):
            trainer_of(make(), tmp_path, mtp_supervision=supervision, mtp_loss="kl")


def test_what_trl_cannot_do_is_said(tmp_path):
    trl = pytest.importorskip("foretell.trl")
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    for supervision in (HARD, SOFT):
        with pytest.raises(ValueError, match="student_forced in joint mode needs a frozen copy.*MTPTrainer"):
            trl.SFTConfig(**settings, mtp_enabled=True, mtp_supervision=supervision)
    with pytest.raises(ValueError, match="lora_gate: plain adapters change the model itself"):
        sft_trainer(tmp_path, "standalone", lora_gate=False, sampler=False)


def test_texts_shorter_than_a_region_are_counted_and_skipped(tmp_path, capsys):
    short = [{"input_ids": list(range(2, 2 + n))} for n in (3, 5)]
    mtp = make(**REGIONS)
    trainer = trainer_of(mtp, tmp_path, [*LONG_ROWS, *short, {"input_ids": list(range(2, 8))}], max_steps=1)
    assert trainer.too_short == 2 and len(trainer.train_dataset) == len(LONG_ROWS) + 1
    assert "2 of 11 rows are shorter than a region of 6 tokens and are skipped" in capsys.readouterr().out
    trainer = trainer_of(mtp, tmp_path, LONG_ROWS, packing=True, max_length=64)
    assert trainer.too_short == 0 and "skipped" not in capsys.readouterr().out
    assert trainer_of(make(), tmp_path, [*LONG_ROWS, *short]).too_short == 0, "without regions no text is too short"
    with pytest.raises(ValueError, match=r"longest of 2 usable rows has 5 tokens, a region has 6: give longer rows"):
        trainer_of(mtp, tmp_path, short)
