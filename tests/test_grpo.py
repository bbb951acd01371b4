"""TRL's GRPOTrainer with drafts in its rollouts and a module that learns from them."""

# B sequences, T positions, K depths.

from __future__ import annotations

import copy
import gc
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from drafters import knowing_mtp, leaning_model
from peft import LoraConfig, get_peft_model
from scipy.stats import chi2_contingency, ks_2samp
from test_decode import tokenizer
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from foretell.cli import main
from foretell.data.collate import to_batch
from foretell.mtp import MTPModel, get_mtp_model
from foretell.ops.shift import labels_of
from foretell.trl import GRPOConfig, GRPOTrainer
from foretell.types import IGNORE_INDEX

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
BASE: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_steps": 3,
    "logging_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8,
    "learning_rate": 1e-3, "gradient_accumulation_steps": 2, "temperature": 0.2,
}  # fmt: skip
TIMES = ("runtime", "per_second", "step_time", "seconds")


def liked(completions: list[str], **_: Any) -> list[float]:
    return [sum(int(word[1:]) % 7 for word in text.split()) / 10 for text in completions]


def prompts(count: int = 8) -> Dataset:
    return Dataset.from_list([{"prompt": " ".join(f"w{3 + (i * j) % 90}" for j in range(1, 3 + i % 3))}
                              for i in range(1, count + 1)])  # fmt: skip


def trainer(folder: Path, model: nn.Module | None = None, plain: bool = False, **settings: Any) -> Any:
    given = {n: settings.pop(n) for n in ("peft_config", "eval_dataset", "rollout_func", "optimizers", "callbacks")
             if n in settings}  # fmt: skip
    rewards = settings.pop("reward_funcs", liked)
    config, kind = (trl.GRPOConfig, trl.GRPOTrainer) if plain else (GRPOConfig, GRPOTrainer)
    args = config(output_dir=str(folder), **{**BASE, **settings})
    return kind(
        model=leaning_model() if model is None else model, reward_funcs=rewards, args=args,
        train_dataset=prompts(), processing_class=tiny_tokenizer(), **given,
    )  # fmt: skip


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a module that drafts well for leaning_model()."""
    folder = tmp_path_factory.mktemp("module")
    knowing_mtp(leaning_model(), noise=0.1, depth=2).save_pretrained(folder)
    return str(folder)


def copied(part: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in part.state_dict().items()}


def same(part: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in part.state_dict().items())


def timeless(made: Any) -> list[dict[str, float]]:
    return [{k: v for k, v in e.items() if not k.endswith(TIMES)} for e in made.state.log_history]


def column(made: Any, name: str) -> list[float]:
    return [entry[name] for entry in made.state.log_history if name in entry]


def step_inputs(made: Any) -> dict[str, Any]:
    """A micro-batch of the first step, as Trainer hands it to compute_loss."""
    made.model.train()
    made.create_optimizer()
    made.current_gradient_accumulation_steps = 2
    return made._prepare_inputs(next(iter(made.get_train_dataloader())))


# -- what it is beside TRL ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_off_and_disabled_and_standalone_are_trl_to_the_bit(peft, module, tmp_path):
    """The policy, and with nothing set the logs; clipping is on, and the module's own gradients are large."""
    settings = {"max_grad_norm": 0.05, "peft_config": peft} if peft else {"max_grad_norm": 0.05}
    plain = trainer(tmp_path, plain=True, **settings)
    plain.train()
    wanted = copied(plain.model)
    off = trainer(tmp_path, **settings)
    off.train()
    assert same(off.model, wanted) and timeless(off) == timeless(plain) and len(timeless(off)) == 4
    for mode in ("disabled", "standalone"):
        how = {} if mode == "disabled" else {"mtp_loss_scaling_factor": 100.0}
        made = trainer(tmp_path, mtp_module=module, mtp_drafter="none", mtp_training_mode=mode, **settings, **how)
        before = copied(made.mtp.module)
        made.train()
        assert same(made.mtp.model, wanted), mode
        assert same(made.mtp.module, before) == (mode == "disabled")
        assert column(made, "reward") == column(plain, "reward")
    joint = trainer(tmp_path, mtp_module=module, mtp_drafter="none", mtp_training_mode="joint", **settings)
    joint.train()
    assert not same(joint.mtp.model, wanted), "the gate sees a leak"


@pytest.mark.parametrize("drafter", ["mtp", "mtp+history"])
@pytest.mark.parametrize("how", [{}, {"repetition_penalty": 1.3, "min_p": 0.01, "temperature": 1.0, "top_k": 9}],
                         ids=["plain", "shaped"])  # fmt: skip
def test_greedy_rollouts_are_trls(drafter, how, module, tmp_path):
    settings = {"generation_kwargs": {"do_sample": False}, "mtp_module": module, **how}
    texts = [
        trainer(tmp_path, mtp_drafter=name, num_speculative_tokens=2, **settings)._generate_single_turn(
            [[5, 9, 7], [8], [5, 9, 7]], None, {}, 4
        )[0]
        for name in ("none", drafter)
    ]
    assert texts[0] == texts[1] and len(texts[0][0]) == 8


def test_drawn_rollouts_are_distributed_as_trls(module, tmp_path):
    """Two-sample chi-square over whole texts of three tokens; the means of groups as rewards see them, too."""
    settings = {"max_completion_length": 3, "top_k": 3, "top_p": 0.95, "temperature": 0.3, "mtp_module": module}
    rolled, groups = [], []
    for drafter, shift in (("none", {}), ("mtp+history", {}), ("mtp", {"temperature": 0.9})):
        made = trainer(tmp_path, mtp_drafter=drafter, num_speculative_tokens=2, **settings | shift)
        torch.manual_seed(7 if drafter == "none" else 8)
        texts = made._generate_single_turn([[5, 9, 7]] * 1200, None, {}, 4)[0]
        rolled.append(Counter(map(tuple, texts)))
        rewards = torch.tensor(liked([" ".join(f"w{t}" for t in text) for text in texts])).view(-1, 4)
        groups.append((rewards.mean(1).numpy(), rewards.std(1).numpy()))
        if made.decoder is not None:
            assert sum(v.accepted for record in made._turns[-1][1] for v in record) > 100, "drafts have a say"
    frequent = [text for text, count in (rolled[0] + rolled[1]).items() if count >= 10]

    def p_value(a: Counter, b: Counter) -> float:
        table = [[c[text] for text in frequent] + [1200 - sum(c[text] for text in frequent)] for c in (a, b)]
        table = [[row[i] for i in range(len(table[0])) if table[0][i] + table[1][i]] for row in table]
        return chi2_contingency(table).pvalue

    assert len(frequent) > 4
    assert p_value(rolled[0], rolled[1]) > 1e-3
    assert p_value(rolled[0], rolled[2]) < 1e-6, "another temperature is seen"
    assert all(ks_2samp(a, b).pvalue > 1e-3 for a, b in zip(groups[0], groups[1], strict=True))


def test_drafts_do_not_change_what_is_drawn(module, tmp_path):
    """Seeds fix a run, whoever drafts: rewards, policies and lengths are the same step by step."""
    runs = []
    own = {"mtp_module": module}
    for settings in (own | {"num_speculative_tokens": 0}, own, {"mtp_drafter": "history"},
                     own | {"mtp_drafter": "mtp+lookup", "num_speculative_tokens": 2}):  # fmt: skip
        made = trainer(tmp_path, **settings)
        made.train()
        runs.append((column(made, "reward"), column(made, "completions/mean_length"), column(made, "grad_norm")))
    assert all(a == pytest.approx(b, rel=1e-4) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_a_stop_string_ends_a_rollout_and_nothing_is_padded(module, tmp_path):
    """Each text is TRL's own up to where its stop string is whole; TRL itself has no tokenizer for it."""
    made = trainer(tmp_path, mtp_module=module, max_completion_length=12, num_speculative_tokens=2,
                   generation_kwargs={"do_sample": False})  # fmt: skip
    made._tokenizer, asked = tokenizer(), [[5, 9, 7], [8, 20], [30, 31]]
    whole = made._generate_single_turn(asked, None, {}, 4)[0]
    made.generation_config.stop_strings = [made._tokenizer.decode(whole[b][3 + b : 5 + b]) for b in (0, 1)]
    cut = made._generate_single_turn(asked, None, {}, 4)[0]
    for short, long in zip(cut, whole, strict=True):
        said = [made._tokenizer.decode(long[: n + 1]) for n in range(len(long))]
        ends = [
            n + 1 for n, text in enumerate(said) if any(stop in text for stop in made.generation_config.stop_strings)
        ]
        assert short == long[: ends[0] if ends else len(long)]
    assert len(cut[0]) < len(whole[0]) and len(cut[1]) < len(whole[1])


# -- the module's loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_nothing_of_the_modules_loss_reaches_the_policy(tied, checkpointing, depth, tmp_path):
    folder = tmp_path / "module"
    get_mtp_model(tiny_model(tie_word_embeddings=tied), {"method": "sequential", "depth": depth}).save_pretrained(
        folder
    )
    reached = {}
    for mode in ("standalone", "joint"):
        made = trainer(tmp_path, tiny_model(tie_word_embeddings=tied), mtp_module=str(folder), mtp_training_mode=mode,
                       gradient_checkpointing=checkpointing)  # fmt: skip
        inputs, policy_loss = step_inputs(made), made._compute_loss
        made._compute_loss = lambda *given, whole=policy_loss: 0.0 * whole(*given)
        made.compute_loss(made.model, inputs).backward()
        grads = {n: p.grad for n, p in made.mtp.model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        reached[mode] = set(grads)
        still = [n for n, p in made.mtp.module.named_parameters() if p.grad is None or not bool(p.grad.any())]
        assert all("enorm" in name for name in still), "what starts at zero behind it gives it no gradient"
    assert reached["standalone"] == set() and ("joint" not in reached or len(reached["joint"]) > 10)


def test_the_modules_gradient_knows_no_reward(module, tmp_path):
    """Advantages of the other sign, and larger ones: the same gradient to the bit; another for the policy."""
    found = []
    for factor in (1.0, -1.0, 3.0):
        made = trainer(tmp_path, mtp_module=module, mtp_training_mode="standalone")
        inputs = step_inputs(made)
        inputs["advantages"] = inputs["advantages"] * factor
        made.compute_loss(made.model, inputs).backward()
        found.append(
            [{n: p.grad.clone() for n, p in part.named_parameters()} for part in (made.mtp.module, made.mtp.model)]
        )
    (one, policy), (other, flipped), (third, _) = found
    assert all(torch.equal(one[n], other[n]) and torch.equal(one[n], third[n]) for n in one)
    assert all(torch.allclose(policy[n], -flipped[n], atol=1e-6) for n in policy)
    assert any(bool(g.abs().max() > 1e-4) for g in policy.values())


def test_the_loss_is_its_definition(module, tmp_path):
    """Cross-entropy of what was said, by loops over positions; two micro-batches of different numbers of labels."""
    made = trainer(tmp_path, mtp_module=module, mtp_training_mode="standalone", max_steps=1, learning_rate=0.0,
                   mtp_learning_rate=0.0, optim="sgd")  # fmt: skip
    made.train()
    sums, counts, shifted = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    for micro in made._buffered_inputs:
        for b in range(len(micro["prompt_ids"])):
            prompt = micro["prompt_ids"][b][micro["prompt_mask"][b] == 1]
            said = micro["completion_ids"][b][micro["completion_mask"][b] == 1]
            ids = torch.cat([prompt, said])
            with torch.no_grad():
                logits_TKV = made.mtp.draft_logits(ids[None])[0].log_softmax(-1)
            for k in (1, 2):
                for t in range(len(ids) - 1 - k):
                    if t + 1 + k >= len(prompt):
                        sums[k - 1] -= logits_TKV[t, k - 1, ids[t + 1 + k]]
                        shifted[k - 1] -= logits_TKV[t, k - 1, ids[t + k]]
                        counts[k - 1] += 1
    assert column(made, "mtp_loss")[0] == pytest.approx(float((sums / counts).mean()), rel=1e-4)
    assert abs(float((shifted / counts).mean()) - column(made, "mtp_loss")[0]) > 1e-2, "a shifted label is seen"


def test_masks_of_two_turns():
    """Prompt, tool output, padding on both sides and a text that was cut: labels of depths 1 and 2 by hand."""
    n = IGNORE_INDEX
    inputs = {
        "prompt_ids": torch.tensor([[0, 11, 12], [13, 14, 15]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[21, 22, 31, 32, 23, 24], [25, 26, 27, 0, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
        "tool_mask": torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]]),
    }
    labels_BTK = labels_of(to_batch(GRPOTrainer._text(inputs)), 2)
    assert labels_BTK[..., 0].tolist() == [[n, 21, 22, n, n, 23, 24, n, n], [n, 25, 26, 27, n, n, n, n, n]]
    assert labels_BTK[..., 1].tolist() == [[n, 22, n, n, 23, 24, n, n, n], [25, 26, 27, n, n, n, n, n, n]]


@pytest.mark.parametrize("mode", ["standalone", "joint"])
def test_a_batch_of_nothing_is_finite(mode, module, tmp_path):
    """Every text was cut and is masked: no label, no number that is none, no gradient."""
    made = trainer(tmp_path, mtp_module=module, mtp_training_mode=mode, mask_truncated_completions=True, max_steps=1,
                   max_completion_length=2, generation_kwargs={"min_new_tokens": 2})  # fmt: skip
    inputs = step_inputs(made)
    assert not bool(inputs["completion_mask"].any())
    loss = made.compute_loss(made.model, inputs)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not any(bool(p.grad.any()) for p in made.mtp.module.parameters() if p.grad is not None)


@pytest.mark.parametrize("mode", ["joint"])
def test_accumulation_cannot_be_seen(mode, module, tmp_path):
    runs = []
    for batch, steps in ((8, 1), (2, 4)):
        made = trainer(tmp_path, mtp_module=module, mtp_training_mode=mode, per_device_train_batch_size=batch,
                       gradient_accumulation_steps=steps, optim="sgd", max_grad_norm=0.0, max_steps=1)  # fmt: skip
        made.train()
        runs.append((copied(made.mtp), column(made, "mtp_loss")[0]))
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-5)
    assert all(torch.allclose(runs[0][0][n], runs[1][0][n], atol=2e-6) for n in runs[0][0])


@pytest.mark.parametrize("preset", ["fastmtp", "medusa", "mtp-glora"])
def test_new_modules_by_preset(preset, tmp_path):
    made = trainer(
        tmp_path, mtp_preset=preset, mtp_num_layers=2, mtp_warmup_steps=1, max_steps=2, num_speculative_tokens=1
    )
    assert made.mtp.mtp_config.depth == 2 and made.args.mtp_training_mode == "standalone"
    before = copied(made.mtp.module)
    made.train()
    assert not same(made.mtp.module, before) and all(map(math.isfinite, column(made, "mtp_loss")))
    assert "accept_at_1" not in made.state.log_history[0] and "accept_at_1" in made.state.log_history[1], "it warms up"


# -- who drafts, and who rolls out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora", "merged"])
def test_who_rolls_out_and_drafts_is_who_was_just_trained(kind, module, tmp_path):
    """Before each rollout: the trainer's decoder and one made new of copies of what learned say and draft the same."""
    model = leaning_model() if kind == "full" else get_peft_model(leaning_model(), copy.deepcopy(LORA))
    made = trainer(tmp_path, model, mtp_module=module, mtp_training_mode="standalone", num_speculative_tokens=2,
                   mtp_learning_rate=3e-2, learning_rate=3e-2, max_steps=4)  # fmt: skip
    ids, seen, roll = torch.tensor([[5, 9, 7], [8, 3, 20]]), [], made._generate_single_turn

    def watched(*given: Any) -> Any:
        if kind == "merged":
            made.mtp.model.merge_adapter()
        fresh = MTPModel(copy.deepcopy(made.mtp.model), made.mtp.mtp_config)
        fresh.module.load_state_dict(made.mtp.module.state_dict())
        fresh.eval()
        how = {"do_sample": False, "max_new_tokens": 12, "num_draft_tokens": 2, "return_dict_in_generate": True}
        outs = [mtp.generate(inputs=ids, **how) for mtp in (made.decoder, fresh)]
        assert torch.equal(outs[0].sequences, outs[1].sequences) and outs[0].stats.accepted == outs[1].stats.accepted
        weights = torch.cat([p.flatten() for p in made.mtp.module.parameters()]).double().sum()
        seen.append((outs[0].sequences.tolist(), float(weights), sum(map(sum, outs[0].stats.accepted))))
        out = roll(*given)
        if kind == "merged":
            made.mtp.model.unmerge_adapter()
        return out

    made._generate_single_turn = watched
    made.train()
    assert len(seen) == 4 and len({weights for _, weights, _ in seen}) == 4, "the module moved before each rollout"
    assert seen[0][0] != seen[-1][0], "so did the policy's text"
    assert seen[0][2] > 0, "drafts are accepted"


def test_it_learns_to_draft_one_text(tmp_path):
    """A new module on a policy that says nearly the same each time: drafts come to be accepted, the loss falls."""
    made = trainer(tmp_path, mtp_preset="fastmtp", mtp_num_layers=1, mtp_learning_rate=1e-2, max_steps=16,
                   learning_rate=0.0, temperature=0.05, num_speculative_tokens=1, max_completion_length=16,
                   mtp_warmup_steps=2)  # fmt: skip
    made.train()
    taus, losses = column(made, "rollout/tau"), column(made, "mtp_loss")
    assert taus[0] == 1.0 and taus[-1] > 1.25 and losses[-1] < 0.9 * losses[0]
    assert column(made, "accept_at_1")[-1] > 0.3 and len(column(made, "rollout/tokens_per_second")) == 16


def test_history_is_saved_bounded_and_used(tmp_path):
    made = trainer(tmp_path, mtp_drafter="history", max_steps=6, learning_rate=0.0, temperature=0.05,
                   num_speculative_tokens=3, max_completion_length=16, save_strategy="steps", save_steps=6)  # fmt: skip
    made.train()
    taus = column(made, "rollout/tau")
    assert taus[-1] > 1.5 > 0 and taus[-1] > 1.05 * column(trainer_of_lookup(tmp_path), "rollout/tau")[-1]
    texts = made.decoder.history.texts()
    assert len(texts) == 48 and json.loads((tmp_path / "checkpoint-6" / "mtp_history_0.json").read_text()) == texts
    assert not (tmp_path / "checkpoint-6" / "mtp_config.json").exists(), "there is no module"


def trainer_of_lookup(folder: Path) -> Any:
    made = trainer(folder, mtp_drafter="lookup", max_steps=6, learning_rate=0.0, temperature=0.05,
                   num_speculative_tokens=3, max_completion_length=16)  # fmt: skip
    made.train()
    return made


def test_a_module_learns_from_what_others_roll_out(module, tmp_path):
    """rollout_func with its mask: nothing drafts, and only what the policy said is learned."""

    def roll(asked: list[str], made: Any) -> dict[str, Any]:
        ids = [made.processing_class(text)["input_ids"] for text in asked]
        said = [[20, 21, 30, 31, 22, 23] for _ in ids]
        return {"prompt_ids": ids, "completion_ids": said, "logprobs": [[-1.0] * 6 for _ in ids],
                "env_mask": [[1, 1, 0, 0, 1, 1] for _ in ids]}  # fmt: skip

    made = trainer(tmp_path, mtp_module=module, mtp_training_mode="standalone", mtp_drafter="none", rollout_func=roll,
                   max_steps=1)  # fmt: skip
    made.train()
    assert made._rolled_K1[1:].tolist() == [8 * 4, 8 * 4 - 8 * 0] or made._rolled_K1[1].item() <= 8 * 4
    assert math.isfinite(column(made, "mtp_loss")[0])
    with pytest.raises(ValueError, match="rollout_func: it generates by itself"):
        trainer(tmp_path, mtp_module=module, rollout_func=roll)


def test_evaluation_rolls_out_too(module, tmp_path):
    made = trainer(tmp_path, mtp_module=module, mtp_training_mode="standalone", eval_dataset=prompts(4),
                   per_device_eval_batch_size=4)  # fmt: skip
    metrics = made.evaluate()
    assert math.isfinite(metrics["eval_mtp_loss"]) and "eval_rollout/tau" in made.state.log_history[-1]


# -- what is stored ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "peft"), [("disabled", None), ("standalone", LORA), ("joint", None), ("joint", LORA)])
def test_policy_and_module_are_saved(mode, peft, module, tmp_path):
    made = trainer(tmp_path, mtp_module=module, mtp_training_mode=mode, **({"peft_config": peft} if peft else {}))
    made.train()
    made.save_model(tmp_path / "out")
    if peft:
        policy = trl.trainer.grpo_trainer.PeftModel.from_pretrained(leaning_model(), tmp_path / "out")
    else:
        policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    mtp = MTPModel.from_pretrained(policy, tmp_path / "out")
    assert same(mtp.module, copied(made.mtp.module))
    ids = torch.tensor([[5, 9, 7]])
    how = {"do_sample": False, "max_new_tokens": 12, "num_draft_tokens": 2, "return_dict_in_generate": True}
    outs = [one.generate(inputs=ids, **how) for one in (made.mtp, mtp)]
    assert torch.equal(outs[0].sequences, outs[1].sequences) and outs[0].stats.accepted == outs[1].stats.accepted


@pytest.mark.parametrize("mode", ["disabled", "joint"])
def test_a_resumed_run_repeats_the_uninterrupted_one(mode, module, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "mtp_training_mode": mode,
                "mtp_module": module, "mtp_drafter": "mtp+history", "num_speculative_tokens": 2}  # fmt: skip
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    (tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").unlink()  # killed while it was written
    resumed = trainer(tmp_path / "whole", **settings)
    with pytest.warns(UserWarning, match="not written to its end"):
        resumed.train(resume_from_checkpoint=True)
    assert same(resumed.mtp, copied(whole.mtp))
    assert [timeless(resumed)[i] for i in (2, 3)] == [timeless(whole)[i] for i in (2, 3)]
    assert resumed.decoder.history.texts() == whole.decoder.history.texts()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mtp_training_mode": "standalone"}, "mtp_training_mode: wanted mtp_module, mtp_preset or mtp_drafter"),
        ({"num_speculative_tokens": 3}, "num_speculative_tokens: wanted mtp_module"),
        ({"mtp_drafter": "mtp"}, "wanted mtp_module or mtp_preset beside it"),
        ({"mtp_drafter": "suffix"}, "mtp_drafter: got 'suffix', wanted one of mtp, lookup, history"),
        ({"mtp_module": "M", "mtp_preset": "fastmtp"}, "got both"),
        ({"mtp_preset": "fastmtp", "mtp_training_mode": "disabled"}, "never learns"),
        ({"mtp_module": "M", "num_speculative_tokens": "many"}, "wanted a number of at least 0, or auto"),
        ({"mtp_module": "M", "mtp_warmup_steps": 4}, "a module that learns"),
        ({"mtp_module": "M", "num_speculative_tokens": 3}, "this module drafts at most 2"),
        ({"mtp_module": "M", "mtp_num_layers": 3}, "the module in .* has 2"),
        ({"mtp_module": "nowhere"}, "nowhere"),
        ({"mtp_module": "M", "use_vllm": True}, "use_vllm: vLLM rolls out"),
        ({"mtp_module": "M", "use_transformers_continuous_batching": True}, "use_transformers_continuous_batching"),
        ({"mtp_module": "M", "generation_kwargs": {"num_beams": 2}}, "beam"),
        ({"mtp_module": "M", "cache_implementation": "static"}, "cache_implementation='static'"),
        ({"mtp_drafter": "lookup", "generation_kwargs": {"guidance_scale": 2.0}}, "beside drafts"),
        ({"mtp_module": "M", "mtp_training_mode": "joint", "mtp_supervision": "student_forced"}, "frozen copy"),
        ({"mtp_module": "M", "mtp_training_mode": "standalone", "mtp_loss": "kl"}, "needs a distribution"),
        ({"mtp_module": "M", "sync_ref_model": True, "beta": 0.1}, "sync_ref_model"),
    ],
)  # fmt: skip
def test_bad_settings_are_said_before_the_first_rollout(settings, said, module, tmp_path):
    settings = {name: module if value == "M" else value for name, value in settings.items()}
    leaning_model().save_pretrained(tmp_path / "policy")
    with pytest.raises((ValueError, OSError), match=said):
        trainer(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path / "policy"), **settings)


def test_a_module_of_another_model_and_a_frozen_policy_are_refused(module, tmp_path):
    with pytest.raises(ValueError, match="hidden_size"):
        trainer(tmp_path, tiny_model(hidden_size=16), mtp_module=module)
    for mode in ("joint", "standalone"):
        with pytest.raises(ValueError, match="no parameter of the model asks for a gradient"):
            trainer(tmp_path, leaning_model().requires_grad_(False), mtp_module=module, mtp_training_mode=mode)
    with pytest.raises(ValueError, match="got an MTPModel"):
        trainer(tmp_path, knowing_mtp(leaning_model()), mtp_module=module)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda completions, **_: [math.nan] * len(completions), "gave nan to completion 0"),
        (lambda completions, **_: [1.0, -math.inf] * (len(completions) // 2), "gave -inf to completion 1"),
        (lambda completions, **_: [1.0], "returned 1 rewards, but 8 were expected"),
        (lambda completions, **_: None, "gave NoneType, wanted a list"),
    ],
)
def test_rewards_that_are_none(given, said, module, tmp_path):
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, mtp_module=module, reward_funcs=[liked, given]).train()


def test_a_reward_may_not_apply(module, tmp_path):
    def sometimes(completions: list[str], **_: Any) -> list[float | None]:
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    async def later(completions: list[str], **_: Any) -> list[float]:
        return [0.5] * len(completions)

    made = trainer(tmp_path, mtp_module=module, reward_funcs=[sometimes, later], max_steps=1)
    made.train()
    assert column(made, "rewards/sometimes/mean") == [1.0] and column(made, "rewards/later/mean") == [0.5]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")]
)
def test_a_rollout_that_does_not_fit_says_what_to_lower(error, module, tmp_path):
    made = trainer(tmp_path, mtp_module=module)

    def full(*_: Any, **__: Any) -> None:
        raise error

    made.decoder.generate = full
    with pytest.raises(type(error), match="lower per_device_train_batch_size, steps_per_generation"):
        made.train()


class Peak(TrainerCallback):
    """Kept tensors after each step, in numbers."""

    def __init__(self) -> None:
        self.kept: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step < 3:
            return

        gc.collect()
        self.kept.append(sum(x.numel() for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)))


def test_memory_stays_flat(module, tmp_path):
    watch = Peak()
    made = trainer(tmp_path, mtp_module=module, mtp_training_mode="standalone", mtp_drafter="mtp+history", max_steps=5,
                   generation_kwargs={"min_new_tokens": 8}, num_speculative_tokens=2, callbacks=[watch])  # fmt: skip
    made.train()
    assert len(watch.kept) == 3 and max(watch.kept[1:]) <= 1.02 * watch.kept[0], watch.kept
    assert made.decoder.target._copy.rests, "no copies of weights while it learns"


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line_reads_yaml(module, tmp_path):
    leaning_model().save_pretrained(tmp_path / "policy")
    tiny_tokenizer().save_pretrained(tmp_path / "policy")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts()))
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {tmp_path / 'policy'}\ndataset_name: {tmp_path / 'data.jsonl'}\n"
        f"output_dir: {tmp_path / 'out'}\nreward_funcs: [get_soft_overlong_punishment]\nmtp_module: {module}\n"
        "mtp_training_mode: standalone\nmtp_drafter: mtp+history\nnum_speculative_tokens: 2\nmax_steps: 1\n"
        "per_device_train_batch_size: 4\nnum_generations: 4\nmax_completion_length: 6\nuse_cpu: true\nbf16: false\n"
        "report_to: none\n"
    )
    assert main(["grpo", "--config", str(tmp_path / "run.yaml")]) == 0
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert MTPModel.from_pretrained(policy, tmp_path / "out").mtp_config.depth == 2
    assert main(["grpo", "--config", str(tmp_path / "run.yaml"), "--reward_funcs", "nobody"]) == 2
