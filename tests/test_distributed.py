"""One process and two train the same module: DDP and FSDP2, to rounding.

torchrun starts this file with two processes on the CPU (gloo); each plan writes what it logged and saved into its
folder, and the tests compare it with the same run in one process. Ranks get very different numbers of labels, so that a
mean of means shows.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments

from foretell.mtp import MTPModel, get_mtp_model
from foretell.training.regenerate import regenerate
from foretell.training.trainer import MTPTrainer, MTPTrainingArguments
from foretell.types import IGNORE_INDEX
from tests.tiny import VOCAB, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PROCESSES = 2
# SGD, and clipping only where the norm is compared too: neither may hide a wrong scale
BASE = {
    "max_steps": 4,
    "gradient_accumulation_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "eval_new_tokens": 4,
    "save_strategy": "no",
}
PLANS: dict[str, dict[str, Any]] = {
    "standalone": {"max_grad_norm": 0.0, "mtp_supervision": "teacher", "mtp_loss": "kl"},
    # one module for all depths: of rows without a label nothing but keys and values is used
    "shared": {"max_grad_norm": 0.0},
    # texts of 20 tokens are streamed in chunks, of 6 are not: ranks differ in how often they read the target
    "masked": {"max_grad_norm": 0.0, "mtp_supervision": "teacher", "mtp_loss": "kl"},
    # an epsilon beside which small gradients stay small: else Adam makes whole steps of their rounding
    "joint": {"max_grad_norm": 0.5, "mtp_training_mode": "joint", "optim": "adamw_torch", "adam_epsilon": 1e-2},
    # the whole model learns from a frozen copy of itself, which nobody shards or saves
    "forced": {
        "max_grad_norm": 0.5,
        "mtp_training_mode": "joint",
        "mtp_supervision": "student_forced",
        "mtp_depth_weights": "rows",
        "optim": "adamw_torch",
        "adam_epsilon": 1e-2,
    },
}
# foretell.trl's trainer, with the heads of the page's two distributed examples
SFT_PLANS: dict[str, dict[str, Any]] = {
    "identical": {"mtp_head_type": "identical", "mtp_init_strategy": "copy_lm_head", "max_grad_norm": 0.0},
    "ffn": {"mtp_head_type": "ffn", "mtp_num_layers": 3, "mtp_num_predictions": 3, **PLANS["joint"]},
}
ALL_PLANS = {**PLANS, **SFT_PLANS}
# a loss that is not finite on one rank
SPOILT: dict[str, dict[str, Any]] = {
    name: {**PLANS["joint"], "nonfinite_loss": "skip"} for name in ("skip", "skip-trl")
}
FROZEN = ("standalone", "masked", "shared")  # the target does not learn
MODULES: dict[str, dict[str, Any]] = {
    "masked": {"method": "masked", "depth": 2, "chunk_size": 8, "lora_rank": 4, "mask_tokens": "distinct"},
    "forced": {"method": "masked", "depth": 2, "lora_rank": 0, "sampler": False},
    "shared": {"method": "sequential", "depth": 2, "shared_module": True, "initialisation": "copy"},
}
SAVING = {"save_strategy": "steps", "save_steps": 2}
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for at in range(count):
        length = 6 + 14 * (at % 2)
        ids = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
        out.append({"input_ids": ids, "labels": [IGNORE_INDEX] * 4 + ids[4:]})
    return out


def train(plan: str, folder: Path, processes: int, resume: str | None = None, **arguments: Any) -> Any:
    model = tiny_model(tie_word_embeddings=plan == "joint")
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2 * PROCESSES // processes,
        "per_device_eval_batch_size": 2 * PROCESSES // processes,
        "report_to": [],
        "use_cpu": True,
        "ddp_backend": "gloo" if processes > 1 else None,
        **BASE,
        **{**ALL_PLANS, **SPOILT}[plan],
        **arguments,
    }
    if plan in SFT_PLANS or plan == "skip-trl":
        from foretell.trl import SFTConfig, SFTTrainer

        args = SFTConfig(mtp_enabled=True, mtp_dropout_prob=0.0, bf16=False, disable_tqdm=True, **given)
        train_set, eval_set = (Dataset.from_list(rows(count, seed)) for count, seed in ((24, 0), (8, 1)))
        trainer = SFTTrainer(model, args, None, train_set, eval_set, tiny_tokenizer())
    else:
        sequential = {"method": "sequential", "depth": 2, "initialisation": "copy"}
        torch.manual_seed(0)  # adapters start at random
        mtp = get_mtp_model(model, MODULES.get(plan, sequential))
        trainer = MTPTrainer(mtp, MTPTrainingArguments(**given), rows(24), eval_dataset=rows(8, seed=1))
    if plan in SPOILT:  # on one rank, in one step
        losses, bad = trainer._losses, int(os.environ.get("RANK", 0)) == processes - 1

        def spoilt(*args: Any) -> dict[str, Any]:
            out = losses(*args)
            if bad and trainer.state.global_step == 1 and trainer.mtp.training:
                out["mtp"][0].total = out["mtp"][0].total * float("inf")
            return out

        trainer._losses = spoilt
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


# -- what torchrun starts ----------------------------------------------------------------------------------------------


def allow_fsdp_on_a_cpu() -> None:
    """accelerate 1.15 drops the FSDP plugin where the devices are CPUs, without a word; torch's FSDP2 runs there."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    start = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if self.__dict__.get("fsdp_plugin") is not None:  # each further instance takes over the process's kind anew
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def sharding(trainer: MTPTrainer) -> dict[str, Any]:
    """Of parameters and optimizer states: numbers here, and numbers on all ranks."""
    from torch.distributed.tensor import DTensor

    def sizes(tensors: list[torch.Tensor]) -> list[int]:
        local = sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors)
        return [local, sum(t.numel() for t in tensors)]

    states = trainer.optimizer.state_dict()["state"].values()
    return {
        "units": sum(type(part).__name__.startswith("FSDP") for part in trainer.model.modules()),
        "parameters": sizes(list(trainer.model.parameters())),
        "optimizer": sizes([t for state in states for t in state.values() if torch.is_tensor(t) and t.dim() > 0]),
    }


def answers(folder: Path, prompts: int) -> tuple[list[list[int]], int]:
    """What the target says to the first prompts, each process its share; and how large this one's was."""
    rows = [
        {"input_ids": [at + 3, 5, 7][: 1 + at % 3], "labels": [IGNORE_INDEX] * (1 + at % 3)} for at in range(prompts)
    ]
    mtp = get_mtp_model(tiny_model(), {"method": "sequential", "depth": 1})
    store, stats = regenerate(mtp, rows, None, folder, max_new_tokens=8, slots=2)
    return [row["input_ids"] for row in store if bool(row["hidden_states"].abs().sum())], len(stats.records)


def worker(folder: Path) -> None:
    from accelerate.state import AcceleratorState, GradientState

    torch.set_num_threads(1)
    allow_fsdp_on_a_cpu()
    # DDP first: FSDP arguments leave marks in the environment
    jobs: list[tuple[str, str, dict, str | None]] = [("ddp", plan, {}, None) for plan in ALL_PLANS]
    jobs += [("fsdp", plan, FSDP, None) for plan in (*FROZEN, "forced", *SFT_PLANS)]
    jobs += [("ddp", plan, {}, None) for plan in SPOILT]
    jobs.sort(key=lambda job: job[0])
    jobs.append(("fsdp", "skip", FSDP, None))
    jobs.append(("fsdp", "joint", {**FSDP, **SAVING}, None))
    jobs.append(("fsdp-resumed", "joint", FSDP, str(folder / "fsdp-joint" / "checkpoint-2")))
    for name, plan, arguments, resume in jobs:
        trainer = train(plan, folder / f"{name}-{plan}", PROCESSES, resume, **copy.deepcopy(arguments))
        about = {
            "logs": trainer.state.log_history,
            "model": type(trainer.model_wrapped).__name__,
            "processes": trainer.accelerator.num_processes,
            "skipped": trainer.skipped,
            **sharding(trainer),
        }
        if trainer.is_world_process_zero():
            (folder / f"{name}-{plan}" / "about.json").write_text(json.dumps(about))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    answers(folder / "answers", 5)
    said = answers(folder / "answers", 11)
    (folder / f"answers-{os.environ['RANK']}.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
    sys.exit()


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, MTPTrainer]]:
    """(the folder in which two processes left their runs, the same runs in this process alone)."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    with subprocess.Popen(
        [*command, "-m", "tests.test_distributed", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        alone = {plan: train(plan, tmp_path_factory.mktemp(plan), 1) for plan in {**ALL_PLANS, **SPOILT}}
        said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said[-6000:]
    return folder, alone


@pytest.fixture
def two(runs: tuple[Path, Any]) -> Path:
    return runs[0]


@pytest.fixture
def one(runs: tuple[Path, dict[str, MTPTrainer]]) -> dict[str, MTPTrainer]:
    return runs[1]


def steps(logs: list[dict[str, float]]) -> list[dict[str, float]]:
    return [entry for entry in logs if "loss" in entry]


def evaluation(logs: list[dict[str, float]]) -> dict[str, float]:
    return {name: value for entry in logs for name, value in entry.items() if name.startswith("eval_")}


@pytest.mark.parametrize("plan", ALL_PLANS)
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_equal_one(way, plan, two, one):
    about = json.loads((two / f"{way}-{plan}" / "about.json").read_text())
    assert about["processes"] == PROCESSES
    name = "FSDPTRLModel" if plan in SFT_PLANS else "FSDPMTPModel"
    assert about["model"] == ("DistributedDataParallel" if way == "ddp" else name)
    wanted, found = steps(one[plan].state.log_history), steps(about["logs"])
    assert len(found) == len(wanted) == 4
    names = ["loss", "mtp_loss", "grad_norm", "accuracy_1", "accuracy_2", "ntp_loss"]
    if plan in FROZEN:
        names.remove("ntp_loss")
    for name in names:
        for step, (entry, other) in enumerate(zip(found, wanted, strict=True)):
            assert entry[name] == pytest.approx(other[name], rel=1e-5), f"{name} at step {step}"
    drift = sum(entry["loss"] - other["loss"] for entry, other in zip(found, wanted, strict=True)) / 4
    assert abs(drift) < 5e-6 * wanted[0]["loss"]
    wanted_evaluation, found_evaluation = evaluation(one[plan].state.log_history), evaluation(about["logs"])
    for name in ("eval_loss", "eval_mtp_loss", "eval_accuracy_1"):
        assert found_evaluation[name] == pytest.approx(wanted_evaluation[name], rel=1e-5), name
    if plan != "forced":  # its masks have hardly learned: one rounding decides a draft there
        assert found_evaluation["eval_tau"] == wanted_evaluation["eval_tau"]


@pytest.mark.parametrize("plan", ALL_PLANS)
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_what_two_processes_save_is_whole_and_equal(way, plan, two, one):
    folder, reference = two / f"{way}-{plan}", one[plan].mtp
    if plan not in FROZEN:
        model = AutoModelForCausalLM.from_pretrained(folder)
        for name, tensor in model.state_dict().items():
            assert torch.allclose(tensor, reference.model.state_dict()[name], rtol=1e-4, atol=2e-6), name
    else:
        model = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the saved fingerprint is that of the saved target
        loaded = MTPModel.from_pretrained(model, folder)
    for name, tensor in loaded.module.state_dict().items():
        assert torch.allclose(tensor, reference.module.state_dict()[name], rtol=1e-4, atol=2e-6), name
    start = get_mtp_model(tiny_model(), loaded.mtp_config).module.state_dict()
    assert any(not torch.equal(tensor, start[name]) for name, tensor in loaded.module.state_dict().items())


@pytest.mark.parametrize("run", ["ddp-skip", "ddp-skip-trl", "fsdp-skip"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(run, two, one):
    about, alone = json.loads((two / run / "about.json").read_text()), one[run.partition("-")[2]]
    assert about["skipped"] == alone.skipped == 1
    found, wanted = steps(about["logs"]), steps(alone.state.log_history)
    assert [entry["grad_norm"] for entry in found] == pytest.approx([e["grad_norm"] for e in wanted], rel=1e-4)
    loaded = MTPModel.from_pretrained(AutoModelForCausalLM.from_pretrained(two / run), two / run)
    for name, tensor in loaded.state_dict().items():
        assert torch.allclose(tensor, alone.mtp.state_dict()[name], rtol=1e-4, atol=2e-6), name


@pytest.mark.parametrize("plan", ALL_PLANS)
def test_fsdp_shards_parameters_and_optimizer_states(plan, two):
    about = json.loads((two / f"fsdp-{plan}" / "about.json").read_text())
    # the whole, the target's layers and the module's, each gathered only for itself
    assert about["units"] == 1 + 2 + {"standalone": 2, "joint": 2, "shared": 1}.get(plan, 0)
    for what in ("parameters", "optimizer"):
        local, whole = about[what]
        assert local < 0.6 * whole or (what == "optimizer" and plan in (*FROZEN, "identical")), what  # SGD: none
    assert json.loads((two / f"ddp-{plan}" / "about.json").read_text())["parameters"][0] == about["parameters"][1]


def test_fsdp_resumes_to_the_last_bit(two):
    logs = {
        name: steps(json.loads((two / f"{name}-joint" / "about.json").read_text())["logs"])
        for name in ("fsdp", "fsdp-resumed")
    }
    for entry, other in zip(logs["fsdp"], logs["fsdp-resumed"], strict=True):
        assert (entry["loss"], entry["grad_norm"]) == (other["loss"], other["grad_norm"])


def test_deepspeed_is_asked_for_by_transformers_own_words(tmp_path):
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("deepspeed is installed: its own runs are what to test then")
    config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    from foretell.trl import SFTConfig

    for arguments in (TrainingArguments, MTPTrainingArguments, SFTConfig):  # the same way in, the same words
        with pytest.raises(ImportError, match="deepspeed"):
            arguments(output_dir=str(tmp_path), deepspeed=config, use_cpu=True)


def test_two_processes_answer_each_a_share_of_the_prompts(two, tmp_path):
    wanted, made = answers(tmp_path, 11)
    said = [json.loads((two / f"answers-{rank}.json").read_text()) for rank in range(PROCESSES)]
    assert made == len(wanted) == 11 and said == [[wanted, 3], [wanted, 3]]  # 5 of them were there
    assert not list((two / "answers").glob("share-*"))
