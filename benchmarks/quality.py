"""tau at equal CPU seconds: recipes, optimisers, losses, heads, texts. One thread and the process's own time, so that
other work on the machine does not count.

    python benchmarks/quality.py [--answers DIR ...] [--model DIR] [--seconds 180] [--given FILE] [--only NAME ...]

Every row trains a new module on the same kept answers of the same target for the same seconds. tau is exact and needs
no decoding: a draft counts only while those before it are the answer's own tokens, so teacher-forced drafts along
held-out answers say how each round would end. Greedy: a draft holds if it is the token. Drawn at temperature 1, along
answers that were drawn so: it holds with min(1, p / q) of the token, which is what rejection sampling does to the same
text.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretell import MTPModel, get_mtp_model
from foretell.cli.demo import _chat, _prompts, load_model
from foretell.config import parse
from foretell.data.cache import HiddenStore
from foretell.data.collate import MTPCollator, to_batch
from foretell.data.vocabulary import frequent_tokens
from foretell.methods.base import config_class, load_preset
from foretell.models.target import TargetRows
from foretell.runtime import provenance, write_json_atomic
from foretell.training.budget import TimeBudget
from foretell.training.regenerate import eos_ids, regenerate
from foretell.training.trainer import MTPTrainer, MTPTrainingArguments

DEPTHS = 3  # drafts at which tau is told
HELD = 80  # answers that nothing is trained on

SOFT = {"mtp_supervision": "teacher"}
HEADS: dict[str, Any] = {"method": "heads", "depth": 3, "head_type": "medusa", "share_unembedding": True,
                         "init_strategy": "default", "dropout": 0.0, "shared_module": None}  # fmt: skip
# (name, settings of the module, arguments of the training, share of the answers, whether given texts are mixed in);
# None takes a setting of the demo's recipe away
ROWS: list[tuple[str, dict[str, Any], dict[str, Any], float, bool]] = [
    ("today's recipe", {}, {}, 1.0, False),
    ("again, another seed", {}, {"seed": 1}, 1.0, False),
    ("depth 1 first, half the time", {}, {"mtp_depth_one_first": 0.5}, 1.0, False),
    ("Muon 3e-3", {}, {"mtp_muon_learning_rate": 3e-3}, 1.0, False),
    ("Muon 3e-3, depth 1 first", {}, {"mtp_muon_learning_rate": 3e-3, "mtp_depth_one_first": 0.5}, 1.0, False),
    ("D-PACE", {}, {"mtp_depth_weights": "dpace"}, 1.0, False),
    ("teacher, ce", {}, SOFT, 1.0, False),
    ("teacher, kl", {}, SOFT | {"mtp_loss": "kl"}, 1.0, False),
    ("teacher, tv", {}, SOFT | {"mtp_loss": "tv"}, 1.0, False),
    ("teacher, e2e_tv", {}, SOFT | {"mtp_loss": "e2e_tv"}, 1.0, False),
    ("teacher, lk", {}, SOFT | {"mtp_loss": "lk"}, 1.0, False),
    ("teacher, lk_hybrid", {}, SOFT | {"mtp_loss": "lk_hybrid"}, 1.0, False),
    ("teacher, ce, D-PACE", {}, SOFT | {"mtp_depth_weights": "dpace"}, 1.0, False),
    ("bigram of rank 64", {"markov_rank": 64}, {}, 1.0, False),
    ("heads", HEADS, {}, 1.0, False),
    ("heads, bigram", HEADS | {"markov_rank": 64}, {}, 1.0, False),
    ("heads, bigram, confidence", HEADS | {"markov_rank": 64, "confidence_head": True}, {}, 1.0, False),
    ("an eighth of the answers", {}, {}, 0.125, False),
    ("an eighth, given texts", {}, {}, 0.125, True),
    ("hidden_layers", {"hidden_layers": [2, 15, 27]}, {}, 1.0, False),
    ("eagle3", {"hidden_layers": [2, 15, 27], "block": "eagle3"}, {}, 1.0, False),
]


@dataclass(kw_only=True)
class QualitySettings:
    """Flags of benchmarks/quality.py."""

    answers: list[str] = field(
        default_factory=list, metadata={"help": "Folders of kept answers; without them a small one is made."}
    )
    model: str | None = field(default=None, metadata={"help": "The model that gave them; SmolLM2 without it."})
    seconds: float = field(default=180.0, metadata={"help": "CPU seconds of each row, of one thread."})
    given: str | None = field(default=None, metadata={"help": "Texts that the target reads: any rows with answers."})
    given_seconds: float = field(default=60.0, metadata={"help": "CPU seconds of reading them, of the row's own."})
    only: list[str] = field(default_factory=list, metadata={"help": "Names of rows; all without it."})
    output: str = field(default="results/quality.json", metadata={"help": "Where the numbers go; rows are added."})
    work: str = field(default="runs/quality", metadata={"help": "Folder for answers that are made here."})


@torch.no_grad()
def row_batch(mtp: MTPModel, row: dict[str, Any]) -> tuple[Any, TargetRows, int]:
    """(batch of one answer, the target's states of it: kept ones if they are all that the module reads, where it
    begins).
    """
    batch = to_batch(MTPCollator(0)([row]))
    first = next(i for i, label in enumerate(row["labels"]) if label >= 0)
    rows = TargetRows(batch.hidden_BTD, None)
    if not mtp.module.reads_states:
        rows = mtp.target.forward_text(batch.input_ids_BT, batch.position_ids_BT)
    return batch, rows, first


@torch.no_grad()
def log_chances(mtp: MTPModel, row: dict[str, Any]) -> Tensor:
    """[T] log q of each token of an answer, by the target."""
    batch, rows, _ = row_batch(mtp, row)
    logits_TV = mtp.target.logits(rows.post_norm_BRD[0, :-1]).float()
    logq_T = logits_TV.log_softmax(-1).gather(1, batch.input_ids_BT[0, 1:, None])[:, 0]
    return torch.cat([logq_T.new_zeros(1), logq_T])


@torch.no_grad()
def holds(mtp: MTPModel, row: dict[str, Any], logq_T: Tensor | None) -> tuple[Tensor, int]:
    """([K, T] chance that depth k at position i is the token i + 1 + k and kept, where the answer begins). logq_T: of
    an answer that was drawn.
    """
    (batch, rows, first), module, target = row_batch(mtp, row), mtp.module, mtp.target
    ids_T, T = batch.input_ids_BT[0], batch.input_ids_BT.shape[1]
    chance_KT = torch.zeros(DEPTHS, T)
    kept, module.config.depth = module.config.depth, min(DEPTHS, module.longest_draft)
    try:
        for k, state_BTD in enumerate(module.depth_states(target, batch, module.source(rows), detach=True), start=1):
            at_N = torch.arange(max(first - 2, 0), T - 1 - k)
            if not len(at_N):
                break
            logits_NM = module.logits(target, state_BTD[0, at_N], k, ids_T[at_N + k])
            vocabulary_M = module.draft_vocab_ids
            token_N = ids_T[at_N + 1 + k]
            if logq_T is None:
                best_N = logits_NM.argmax(-1)
                said_N = best_N if vocabulary_M is None else vocabulary_M[best_N]
                chance_KT[k - 1, at_N] = (said_N == token_N).float()
                continue
            logp_NM = logits_NM.float().log_softmax(-1)
            place_N, inside_N = token_N, torch.ones_like(token_N, dtype=torch.bool)
            if vocabulary_M is not None:
                place_N = torch.searchsorted(vocabulary_M, token_N).clamp(max=len(vocabulary_M) - 1)
                inside_N = vocabulary_M[place_N] == token_N
            logp_N = logp_NM.gather(1, place_N[:, None])[:, 0]
            ratio_N = (logp_N - logq_T[at_N + 1 + k]).exp().clamp(max=1.0)
            chance_KT[k - 1, at_N] = torch.where(inside_N, ratio_N, 0.0)
    finally:
        module.config.depth = kept
    return chance_KT, first


def expected_rounds(chance_KT: Tensor, first: int, drafts: int) -> tuple[int, float]:
    """(tokens, expected rounds): as in decoding, the first round knows all of the prompt."""
    chance, T = chance_KT[:drafts].tolist(), chance_KT.shape[1]
    rounds = [0.0] * (T + drafts + 2)  # rounds[n]: still to come when token n is the last one that is known
    for n in reversed(range(first - 1, T - 1)):
        reach, total = 1.0, 1.0
        for k in range(drafts):
            held = chance[k][n - 1] if 0 < n < T - 1 - k else 0.0
            total += reach * (1 - held) * rounds[min(n + k + 1, T)]
            reach *= held
        rounds[n] = total + reach * rounds[min(n + drafts + 1, T)]
    return T - first, rounds[first - 1]


def taus(mtp: MTPModel, rows: list[dict[str, Any]], logq: list[Tensor] | None = None) -> list[float]:
    """Exact tau at 1, 2, ... drafts."""
    mtp.module.eval()
    found = [holds(mtp, row, None if logq is None else logq[i]) for i, row in enumerate(rows)]
    out = []
    for drafts in range(1, DEPTHS + 1):
        each = [expected_rounds(chance, first, drafts) for chance, first in found]
        out.append(sum(tokens for tokens, _ in each) / sum(rounds for _, rounds in each))
    return out


def kept_answers(settings: QualitySettings, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """All answers with their states, in an order of the seed."""
    folders = [Path(folder) for folder in settings.answers]
    if not folders:
        mtp = get_mtp_model(model, load_preset("demo")["module"])
        folders = [Path(settings.work) / "answers"]
        rows = [_chat(row) for row in _prompts(0)["train"][:480]]
        regenerate(mtp, rows, tokenizer, folders[0], max_new_tokens=96)
    stores = [HiddenStore.load(folder) for folder in folders]
    rows = [store[i] for store in stores for i in range(len(store))]
    rows = [row for row in rows if sum(label >= 0 for label in row["labels"]) > DEPTHS + 1]
    random.Random(0).shuffle(rows)
    return rows


def drawn_answers(settings: QualitySettings, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Answers drawn at temperature 1 to prompts that are in no training set."""
    mtp = get_mtp_model(model, load_preset("demo")["module"])
    text = (Path(__file__).parents[1] / "foretell/data/demo_prompts.jsonl").read_text(encoding="utf-8")
    prompts = [_chat(row) for row in map(json.loads, text.splitlines()) if row["split"] == "test"][:HELD]
    greedy = model.generation_config
    model.generation_config = type(greedy).from_dict(
        {**greedy.to_diff_dict(), "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    )
    try:
        store, _ = regenerate(mtp, prompts, tokenizer, Path(settings.work) / "drawn", max_new_tokens=64)
    finally:
        model.generation_config = greedy
    rows = [store[i] for i in range(len(store))]
    return [row for row in rows if sum(label >= 0 for label in row["labels"]) > DEPTHS + 1]


def given_texts(settings: QualitySettings, model: Any, tokenizer: Any) -> tuple[list[dict[str, Any]], float]:
    """(texts that the target has read, CPU seconds that took, as often as they are used)."""
    from foretell.data.formats import load_rows
    from foretell.training.regenerate import read_given

    assert settings.given is not None
    mtp = get_mtp_model(model, load_preset("demo")["module"])
    start, rows = time.process_time(), list(load_rows(settings.given))
    random.Random(0).shuffle(rows)
    folder = Path(settings.work) / f"given-{time.time_ns()}"
    with_deadline = lambda: time.process_time() - start > settings.given_seconds  # noqa: E731
    store = read_given(mtp, rows, tokenizer, folder, max_length=512, deadline=with_deadline)
    return [store[i] for i in range(len(store))], time.process_time() - start


def train(
    model: Any, tokenizer: Any, row: tuple, answers: list[dict[str, Any]], seconds: float, ids_M: Tensor
) -> tuple[MTPModel, dict[str, Any]]:
    """A module, and what its training was."""
    _, module, training, *_ = row
    preset = load_preset("demo")
    return train_for(model, {**preset["module"], **module}, {**preset["training"], **training}, answers, seconds, ids_M)


def train_for(
    model: Any,
    module: dict[str, Any],
    training: dict[str, Any],
    answers: list[dict[str, Any]],
    seconds: float,
    ids_M: Tensor,
) -> tuple[MTPModel, dict[str, Any]]:
    """A module that learned for so many seconds (None takes a setting away), and what that was; on a CPU seconds of
    this process, of which other work takes none.
    """
    training = {"seed": 0, "train_sampling_strategy": "group_by_length", **training}
    torch.manual_seed(training["seed"])
    mtp = get_mtp_model(model, {name: value for name, value in module.items() if value is not None})
    if module.get("draft_vocab_size"):
        mtp.module.set_draft_vocabulary(ids_M)
    on_cpu = mtp.device.type == "cpu"
    args = MTPTrainingArguments(
        **training, output_dir="runs/quality/training", max_steps=1_000_000, lr_scheduler_type="constant",
        save_strategy="no", report_to="none", logging_steps=20, use_cpu=on_cpu,
    )  # fmt: skip
    clock = TimeBudget(seconds, args.learning_rate, clock=time.process_time if on_cpu else time.monotonic)
    trainer = MTPTrainer(model=mtp, args=args, train_dataset=answers, callbacks=[clock])
    clock.trainer = trainer
    trainer.train()
    about = {"steps": trainer.state.global_step, "answer_tokens": clock.tokens, "seconds": clock.spent}
    return mtp, about | {"parameters": sum(p.numel() for p in mtp.module.parameters())}


def main() -> None:
    """Train and measure every row; what is known is written after each."""
    settings = parse(QualitySettings, prog="benchmarks/quality.py")
    torch.set_num_threads(1)
    model, tokenizer = load_model(settings.model, Path(settings.work) / "model")
    answers, drawn = kept_answers(settings, model, tokenizer), drawn_answers(settings, model, tokenizer)
    held, answers = answers[:HELD], answers[HELD:]
    size = load_preset("demo")["module"]["draft_vocab_size"]
    mtp = get_mtp_model(model, load_preset("demo")["module"])
    ids_M = frequent_tokens(answers, size, mtp.target.vocab_size, sorted(eos_ids(mtp, tokenizer)))
    logq = [log_chances(mtp, row) for row in drawn]
    path = Path(settings.output)
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": {}}
    result["provenance"] = provenance()
    result["answers"] = {"rows": len(answers), "tokens": sum(sum(x >= 0 for x in row["labels"]) for row in answers)}
    result["settings"] = {"seconds": settings.seconds, "given_seconds": settings.given_seconds, "held": len(held)}
    for row in ROWS:
        name, module, _, share, mixed = row
        method = config_class(module.get("method", "sequential"))
        unknown = set(module) - {"method"} - {f.name for f in dataclasses.fields(method)}
        skipped = any(module[name] is not None for name in unknown) or (mixed and settings.given is None)
        if skipped or (settings.only and name not in settings.only):
            continue
        mine, left = answers[: int(share * len(answers))], settings.seconds
        about: dict[str, Any] = {}
        if mixed:
            texts, spent = given_texts(settings, model, tokenizer)
            left -= spent
            mine = mine + texts
            about = {"given_tokens": sum(sum(x >= 0 for x in t["labels"]) for t in texts), "given_seconds": spent}
        mtp, found = train(model, tokenizer, row, mine, left, ids_M)
        about |= found | {"tau": taus(mtp, held), "tau_drawn": taus(mtp, drawn, logq)}
        result["rows"][name] = about
        write_json_atomic(path, result)
        print(name, json.dumps(about), flush=True)


if __name__ == "__main__":
    main()
