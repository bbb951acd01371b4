"""GRPO with a module in two processes: DDP and FSDP2 learn what one process learns, to rounding, and roll out with it.

torchrun starts this file (gloo). Rollouts are greedy and rewards go by a completion's place in its group, so that
nothing depends on which process draws which number.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from drafters import knowing_mtp, leaning_model
from peft import LoraConfig
from test_distributed import FSDP, allow_fsdp_on_a_cpu
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from foretell.mtp import MTPModel
from foretell.trl import GRPOConfig, GRPOTrainer

ROOT = Path(__file__).parents[1]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
PLANS: dict[str, dict[str, Any]] = {
    "standalone": {"mtp_training_mode": "standalone", "mtp_drafter": "mtp+history"},
    "joint": {"mtp_training_mode": "joint", "mtp_supervision": "teacher", "mtp_loss": "kl"},
    "lora": {"mtp_training_mode": "standalone"},
    "none": {"mtp_training_mode": "standalone", "mtp_drafter": "none"},
}


def by_place(completions: list[str], **_: Any) -> list[float]:
    return [float((i % 4) ** 2) for i in range(len(completions))]


def train(plan: str, folder: Path, processes: int, **more: Any) -> GRPOTrainer:
    knowing_mtp(leaning_model(), noise=0.1, depth=2).save_pretrained(folder / f"module{os.environ.get('RANK', '')}")
    rows = Dataset.from_list([{"prompt": " ".join(f"w{3 + (i * j) % 90}" for j in range(1, 4 - i % 2))}
                              for i in range(1, 9)])  # fmt: skip
    args = GRPOConfig(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=8 // processes, num_generations=4,
        gradient_accumulation_steps=2, max_completion_length=8, optim="sgd", learning_rate=0.05, mtp_learning_rate=0.05,
        lr_scheduler_type="constant", max_grad_norm=0.5, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, bf16=False, generation_kwargs={"do_sample": False}, num_speculative_tokens=2,
        ddp_backend="gloo" if processes > 1 else None, temperature=0.1, loss_type="dapo",
        mtp_module=str(folder / f"module{os.environ.get('RANK', '')}"), **PLANS[plan], **more,
    )  # fmt: skip
    peft = {"peft_config": LORA} if plan == "lora" else {}
    made = GRPOTrainer(leaning_model(), by_place, args, rows, processing_class=tiny_tokenizer(), **peft)
    made.train()
    made.save_model()
    return made


def worker(folder: Path) -> None:
    from accelerate.state import AcceleratorState, GradientState

    torch.set_num_threads(1)
    allow_fsdp_on_a_cpu()
    jobs = [("ddp", plan, {}) for plan in ("standalone", "joint", "lora")] + [
        ("fsdp", plan, FSDP) for plan in ("standalone", "joint", "none")
    ]
    for name, plan, arguments in jobs:
        path = folder / f"{name}-{plan}"
        path.mkdir(exist_ok=True)
        made = train(plan, path, 2, **copy.deepcopy(arguments))
        if made.is_world_process_zero():
            about = {"logs": made.state.log_history, "model": type(made.model_wrapped).__name__}
            (path / "about.json").write_text(json.dumps(about))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
    sys.exit()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, GRPOTrainer]]:
    """(the folder in which two processes left their runs, the same runs in this process alone)."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join(str(path) for path in (ROOT / "tests", ROOT, os.environ.get("PYTHONPATH", "")))
    with subprocess.Popen(
        [*command, str(ROOT / "tests" / "test_grpo_runs.py"), str(folder)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        alone = {plan: train(plan, tmp_path_factory.mktemp(plan), 1) for plan in PLANS}
        said, _ = process.communicate(timeout=250)
    assert process.returncode == 0, said[-6000:]
    return folder, alone


CASES = [("ddp", plan) for plan in ("standalone", "joint", "lora")] + [
    ("fsdp", plan) for plan in ("standalone", "joint", "none")
]


@pytest.mark.parametrize(("way", "plan"), CASES)
def test_two_processes_learn_and_draft_what_one_does(way, plan, runs):
    folder, alone = runs
    about = json.loads((folder / f"{way}-{plan}" / "about.json").read_text())
    assert about["model"] == ("DistributedDataParallel" if way == "ddp" else "FSDPTRLModel")
    made = alone[plan]
    logs = [[entry for entry in log if "loss" in entry] for log in (made.state.log_history, about["logs"])]
    assert len(logs[0]) == len(logs[1]) == 2
    for one, two in zip(*logs, strict=True):
        for name in ("loss", "mtp_loss", "reward", "completions/mean_length", "accuracy_1", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
        if "rollout/tau" in one:
            assert two["rollout/tau"] == pytest.approx(one["rollout/tau"], rel=0.2), "histories are each process's own"
            assert plan == "standalone" or two["rollout/tau"] == pytest.approx(one["rollout/tau"], rel=1e-3)
    base = leaning_model()
    if plan == "lora":
        from peft import PeftModel

        policy: Any = PeftModel.from_pretrained(base, folder / f"{way}-{plan}")
    else:
        policy = AutoModelForCausalLM.from_pretrained(folder / f"{way}-{plan}")
    mtp = MTPModel.from_pretrained(policy, folder / f"{way}-{plan}")
    for part, other in ((mtp.module, made.mtp.module), (mtp.model, made.mtp.model)):
        tensors = other.state_dict()
        for name, tensor in part.state_dict().items():
            assert torch.allclose(tensor, tensors[name], atol=2e-5), name
    before = knowing_mtp(leaning_model(), noise=0.1, depth=2).module.state_dict()
    assert any(not torch.allclose(tensor, before[name], atol=1e-4) for name, tensor in mtp.module.state_dict().items())
