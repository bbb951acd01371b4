"""foretell as a model of lm-evaluation-harness (`--model foretell`): its own hf model, whose texts our decoder writes;
and the same tasks by several policies, for `foretell evaluate --tasks`.

Likelihoods are the target's, by the harness's own code. Its cache of answers is keyed by the request alone, so a file
is marked with the weights and settings that filled it, and another's is refused.
"""

# B texts, T positions, N draws of a bootstrap.

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from yaml import YAMLError

from foretell.config import nearest
from foretell.decoding.arguments import Plan
from foretell.decoding.policies import SPANS
from foretell.decoding.stats import GenerationStats
from foretell.evaluation.measure import DRAWS, digest, tensors_digest
from foretell.mtp import load_with_module

MARK = "foretell"  # in a cache of answers: who filled it


class StopTexts(StoppingCriteria):
    """One of these texts among the newest tokens, as the harness looks for them (two tokens further back than the text
    is long, and never into the prompt); a function of one text, so that drafts can be asked about.
    """

    of_one_text = True

    def __init__(self, tokenizer: Any, texts: Sequence[str], width: int) -> None:
        self.tokenizer, self.width = tokenizer, width
        self.tails = [(text, len(tokenizer.encode(text, add_special_tokens=False)) + 2) for text in texts]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        rows = input_ids[:, self.width :].tolist()
        found = [any(text in self.tokenizer.decode(row[-n:]) for text, n in self.tails) for row in rows]
        return torch.tensor(found, device=input_ids.device)


@register_model("foretell")
class ForetellLM(HFLM):
    """module: a trained module's folder; without it the one that ships for the model, else lookup alone. The others are
    MTPModel.generate's, and what is left is the harness's own hf model's.
    """

    def __init__(
        self,
        pretrained: Any,
        module: str | None = None,
        num_draft_tokens: int | str | None = "auto",
        drafter: str | None = None,
        policy: str = "lossless",
        confidence_threshold: float | None = None,
        draft_layout: str | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("mixed_precision_dtype") is not None:
            raise ValueError("mixed_precision_dtype: foretell decodes in the weights' own type; give dtype instead.")
        super().__init__(pretrained, **kwargs)
        self.mtp, self.trained = load_with_module(self.model, module)
        if policy in SPANS and num_draft_tokens == "auto":
            num_draft_tokens = None  # under "auto" a clock would have a say in unverified text
        how = {"confidence_threshold": confidence_threshold, "draft_layout": draft_layout}
        self.choose(policy=policy, num_draft_tokens=num_draft_tokens, drafter=drafter, **how)

    def choose(
        self, *, policy: str, num_draft_tokens: int | str | None, drafter: str | None = None, **how: Any
    ) -> None:
        """How the texts from here on are written; ValueError for what does not fit."""
        usual = ("mtp" if policy in SPANS else "mtp+lookup") if self.trained else "lookup"
        how = {name: value for name, value in how.items() if value is not None}
        how |= {"policy": policy, "num_draft_tokens": num_draft_tokens, "drafter": drafter or usual}
        if not self.trained and (policy in SPANS or "mtp" in how["drafter"]):
            raise ValueError(f"policy {policy!r}, drafter {how['drafter']!r}: wanted a trained module, module=FOLDER.")
        Plan.of(self.mtp, **how)
        self.how, self.lossless = how, policy == "lossless"
        self.records: list[list[Any]] = []  # of each text that was written so

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        if not kwargs.get("do_sample"):
            kwargs.pop("temperature", None)  # 0, by which the harness says greedy
        out = self.mtp.generate(
            context,
            max_length=max_length,
            stopping_criteria=StoppingCriteriaList([StopTexts(self.tokenizer, stop, context.shape[1])]),
            pad_token_id=self.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            **self.how,
            **kwargs,
        )
        self.records += out.stats.records
        return out.sequences

    def key(self) -> str:
        """Of everything that an answer depends on beside its request."""
        weights = [tensors_digest(dict(part.state_dict())) for part in (self.mtp.model, self.mtp.module)]
        about = [self.how, str(self.mtp.target.dtype), self.batch_size, self.max_length, self.truncation]
        about += [str(self.model.generation_config), str(self.softmax_dtype), self.prefix_token_id]
        about += [self.tokenizer.get_vocab(), self.eot_token_id]
        return digest([weights, about, self.add_bos_token, self.think_end_token, self.chat_template_args])

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Raises ValueError for a file of answers that others gave."""
        kept = cache_hook.dbdict
        if kept is not None:
            if len(kept) and kept.get(MARK) != self.key():
                raise ValueError(
                    f"use_cache: {kept.filename} holds answers of another model, module, policy or setting, which the "
                    "harness would give as this one's. Name another file, or delete that one."
                )
            kept[MARK] = self.key()
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """And how the texts were written, with what it took."""
        stats = GenerationStats(self.how["policy"], self.lossless, self.records)
        about = {"lossless": self.lossless, "reference": self.mtp.reference, "texts": len(self.records)}
        about |= {"tokens_per_forward": stats.tau, "mean_accepted": stats.mean_accepted}
        return super().get_model_info() | {"foretell": self.how | about}


def load_harness_tasks(names: Sequence[str]) -> tuple[Any, list[Any]]:
    """(task manager, what simple_evaluate takes) of names that the harness knows and of YAML files.

    Raises ValueError naming all that there are not.
    """
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    files = {name: sorted(glob.glob(name)) for name in names if name.endswith((".yaml", ".yml"))}
    manager = TaskManager(include_defaults=len(files) < len(names))  # reading all of the harness's takes seconds
    found: list[Any] = []
    missing = [f"{name} (no such file)" for name, paths in files.items() if not paths]
    for name in names:
        if name in files:
            try:
                found += [load_yaml(path, resolve_func=True) for path in files[name]]
            except YAMLError as error:
                raise ValueError(f"tasks: {name}: {error}") from error
            continue
        known = manager.match_tasks([name])
        found += known
        if not known:
            missing.append(f"{name!r}{nearest(name, manager.all_tasks)}")
    if missing:
        raise ValueError(
            f"tasks: got {', '.join(missing)}; wanted names that `lm_eval ls tasks` lists, or YAML files of tasks."
        )
    return manager, found


def run_tasks(lm: HFLM, tasks: tuple[Any, list[Any]], limit: int | None, seed: int) -> dict[str, Any]:
    """Scores {task: {metric: {value, stderr, each}}}, those of each document where their mean is the score; and the
    answers as texts, [task, document, answers] each, but for samples, which nobody gives twice.
    """
    from lm_eval import simple_evaluate

    logger = logging.getLogger("lm_eval")
    level, manager = logger.level, tasks[0]
    logger.setLevel(logging.ERROR)
    try:
        made = simple_evaluate(
            model=lm, tasks=tasks[1], task_manager=manager, limit=limit,
            torch_random_seed=seed, bootstrap_iters=1000,
        )  # fmt: skip
    finally:
        logger.setLevel(level)
    scores: dict[str, Any] = {}
    for task, metrics in made["results"].items():
        samples = made["samples"].get(task, [])
        for name, value in metrics.items():
            metric, comma, filtered = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            rows = sorted((s for s in samples if s["filter"] == filtered), key=lambda s: s["doc_id"])
            each = [row.get(metric) for row in rows]
            whole = all(isinstance(v, int | float) for v in each) and len(each) > 0
            error = metrics.get(f"{metric}_stderr,{filtered}")
            scores.setdefault(task, {})[name] = {
                "value": value,
                "stderr": error if isinstance(error, float) else None,
                "each": [float(v) for v in each] if whole and np.isclose(np.mean(each), value) else None,
            }
    texts = [
        [task, row["doc_id"], row["resps"]]
        for task, rows in sorted(made["samples"].items())
        for row in sorted({row["doc_id"]: row for row in rows}.values(), key=lambda row: row["doc_id"])
        if not any(_drawn(how) for asked in row["arguments"] for how in asked)
    ]
    return json.loads(json.dumps({"scores": scores, "texts": texts}))  # as it is read back from a file


def _drawn(how: Any) -> bool:
    """Whether these arguments of a request, as the harness reads them, ask for a sample."""
    given = how if isinstance(how, dict) else {"do_sample": False}
    asked = given.get("do_sample")
    return float(given.get("temperature", 0.0)) > 0 if asked is None else bool(asked)


def with_interval(score: dict[str, Any], base: dict[str, Any] | None = None) -> dict[str, Any]:
    """A score with a 95 % interval over other documents of the kind, by bootstrap, else by the harness's standard
    error; and its difference from another way's on the same documents, paired.
    """
    found: dict[str, Any] = {"value": score["value"], "low": None, "high": None}
    if score["each"] is not None:
        found["low"], found["high"] = _bootstrap(np.array(score["each"]), np.ones(len(score["each"])))
        if base is not None and base["each"] is not None:
            moved = np.array(score["each"]) - np.array(base["each"])
            low, high = _bootstrap(moved, np.ones(len(moved)))
            found["difference"] = {"value": float(moved.mean()), "low": low, "high": high}
    elif score["stderr"] is not None:
        wide = 1.96 * score["stderr"]
        found["low"], found["high"] = score["value"] - wide, score["value"] + wide
    return found


def tokens_per_forward(records: Sequence[Sequence[Any]]) -> dict[str, Any] | None:
    """Of texts, with a 95 % interval over other texts of the kind; None where none was written."""
    if not records:
        return None
    tokens = np.array([sum(v.emitted for v in record) for record in records], dtype=float)
    forwards = np.array([len(record) for record in records], dtype=float)
    low, high = _bootstrap(tokens, forwards)
    return {"value": float(tokens.sum() / forwards.sum()), "low": low, "high": high, "texts": len(records)}


def _bootstrap(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """Of the ratio of the sums."""
    at_NB = np.random.default_rng(0).integers(len(above), size=(DRAWS, len(above)))
    low, high = np.quantile(above[at_NB].sum(1) / below[at_NB].sum(1), [0.025, 0.975])
    return float(low), float(high)


def same_answers(given: list[Any], wanted: list[Any]) -> dict[str, Any]:
    """How many documents were answered alike (texts, or likelihoods to the digit), and the first that was not."""
    pairs = list(zip(given, wanted, strict=True))
    other = [[*a[:2], a[2], b[2]] for a, b in pairs if a != b]
    first = dict(zip(("task", "document", "got", "wanted"), other[0])) if other else None
    return {"documents": len(pairs), "equal": len(pairs) - len(other), "first_difference": first}
