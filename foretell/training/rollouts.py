"""Rollouts of a trainer of TRL's through the lossless decoder, and an MTP module that learns from them. docs/rl.md.

One generation: TRL's _generate -> _generate_single_turn (below) -> MTPModel.generate at the trainer's settings. One
micro-batch: MTPTraining.compute_loss -> _losses (below) -> TRL's own loss, whose forward leaves the module's losses.
The module's loss knows the texts and who wrote which token of them; it never sees a reward.
"""

# B sequences, T positions, K depths.

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from foretell.data.collate import to_batch
from foretell.decoding.arguments import Plan
from foretell.decoding.generate import refuse_unsupported
from foretell.decoding.lookup import REMEMBERED
from foretell.methods.base import MTPConfig
from foretell.mtp import MTPModel
from foretell.training.mtp_training import MTPTraining
from foretell.training.objective import choose_labels
from foretell.training.rollout_arguments import RolloutArguments
from foretell.training.tau import whole
from foretell.training.trl_training import TRLModel, TRLTraining
from foretell.types import IGNORE_INDEX, Verification

HISTORY = "mtp_history_{}.json"  # what a process remembers of its rollouts, in a checkpoint
LOOKED_AT = 1000  # rows whose prompts are looked at before anything starts
# of drafters that need no module: nothing of it is asked
BARE = {"method": "heads", "depth": 1, "head_type": "linear", "share_unembedding": True}


class RolloutTraining(TRLTraining):
    """Between TRLTraining and a trainer of TRL's that generates. Without any of RolloutArguments it does nothing."""

    of_trl: Any  # the trainer below
    tells_logprobs = True  # whether its _generate_single_turn gives (completions, log-probabilities), not them alone
    decoder: MTPModel | None = None  # who rolls out; None: TRL

    def __init__(self, model: Any, *more: Any, **kwargs: Any) -> None:
        given = inspect.signature(self.of_trl.__init__).bind(self, model, *more, **kwargs).arguments
        args = given.get("args")
        asked = isinstance(args, RolloutArguments) and args.mtp_asked
        if asked:
            given["reward_funcs"] = _checked(given.get("reward_funcs"))
            if found := self._refuse_rollouts(args, given):
                raise ValueError("; ".join(found))
        super().__init__(**{name: value for name, value in given.items() if name != "self"})
        if asked:
            self._prepare_rollouts(args)

    def _refuse_rollouts(self, args: Any, given: dict[str, Any]) -> list[str]:
        found = self._refuse(given) if args.mtp_has_module else []
        if given.get("environment_factory") is None:  # which brings prompts by itself
            for name in ("train_dataset", "eval_dataset"):
                found += _without_prompts(name, given.get(name))
        if given.get("rollout_func") is not None and args.mtp_drafter != "none":
            found.append("rollout_func: it generates by itself, so nothing would draft; say mtp_drafter='none'")
        return found

    def _prepare_rollouts(self, args: Any) -> None:
        policy: Any = getattr(self, "model")  # noqa: B009 (TRL gives it no type)
        if self._is_vlm:
            raise ValueError(f"{type(policy).__name__}: wanted a text model; MTP modules and drafts are of text only.")
        if getattr(args, "sync_ref_model", False) and args.mtp_has_module:
            raise ValueError("sync_ref_model: TRL copies the trainer's model, which has a module here; leave it out.")
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            got = "deepspeed" if self.is_deepspeed_enabled else "fsdp_version 1"
            raise ValueError(f"{got}: wanted DDP or FSDP2: rollouts here read whole parameters.")
        self._turns: list[tuple[float, list[list[Verification]], int]] = []  # of this generation
        self._rolled_K1: Tensor | None = None
        with torch.random.fork_rng():  # the same texts with another module, or with none
            if args.mtp_has_module:
                self._put_beside(self._with_module(policy, args))
            if args.mtp_drafter != "none":
                self.decoder = self.mtp if args.mtp_has_module else MTPModel(policy, MTPConfig.from_any(BARE))
                self._try_settings()

    @staticmethod
    def _with_module(policy: nn.Module, args: Any) -> TRLModel:
        if args.mtp_module is not None:
            mtp = TRLModel.from_pretrained(policy, args.mtp_module)
            if args.mtp_num_layers not in (None, mtp.mtp_config.depth):
                raise ValueError(
                    f"mtp_num_layers: got {args.mtp_num_layers}, but the module in {args.mtp_module} has "
                    f"{mtp.mtp_config.depth}; leave it out."
                )
            return mtp
        return TRLModel(policy, args.mtp_config())

    def _try_settings(self) -> None:
        """Whatever the decoder cannot honour is said before the first rollout: two short texts are decoded."""
        config = copy.deepcopy(self.generation_config)
        config.min_length, config.min_new_tokens, config.max_new_tokens = 0, None, 2
        Plan.of(self.decoder, **self._drafting(warm=True))
        refuse_unsupported(config, {})
        if self.is_fsdp_enabled:  # some processes may not have the weights yet
            return
        with torch.no_grad():
            ids_BT = torch.full((2, 2), self._tokenizer.pad_token_id, device=self.decoder.device)
            self._decode(ids_BT, torch.ones_like(ids_BT), config)
        self.decoder.history.clear()

    # -- rolling out ---------------------------------------------------------------------------------------------------

    def _drafting(self, warm: bool) -> dict[str, Any]:
        """Of MTPModel.generate: a module that still warms up does not draft."""
        args: Any = self.args
        names = [name for name in args.mtp_drafter.split("+") if name != "mtp" or warm]
        looks = [name for name in names if name in ("lookup", "history")]
        return {
            "drafter": "+".join([*(["mtp"] if "mtp" in names else []), *(["lookup"] if looks else [])]) or "mtp",
            "num_draft_tokens": args.draft_tokens if names else 0,
            "history": "history" in names,
        }

    def _decode(self, ids_BT: Tensor, mask_BT: Tensor, config: Any) -> Any:
        """As MTPModel.generate, with the trainer's settings standing for the policy's own too."""
        policy, before = self.decoder.model, self.decoder.model.generation_config
        config = policy.generation_config = copy.deepcopy(config)
        config.return_dict_in_generate = True
        # TRL hangs its fused loss on the model itself, where a GPU's recorded steps would have to look out for it
        inner = self.decoder.target.model.__dict__
        fused = inner.pop("forward", None)
        try:
            return self.decoder.generate(
                ids_BT,
                attention_mask=mask_BT,
                generation_config=config,
                tokenizer=self._tokenizer if config.stop_strings else None,
                synced_gpus=False,  # what is sharded is whole now
                **self._drafting(self.state.global_step >= self.args.mtp_warmup_steps),
            )
        finally:
            policy.generation_config = before
            if fused is not None:
                inner["forward"] = fused

    def _generate_single_turn(
        self, prompt_ids: list, images: Any, multimodal_fields: Any, *more: Any, **kw: Any
    ) -> Any:
        """As TRL's: completions without padding, and of log-probabilities None."""
        if not self.args.mtp_asked:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *more, **kw)
        start = time.perf_counter()
        if self.decoder is None:
            with self._policy_alone():
                out = super()._generate_single_turn(prompt_ids, images, multimodal_fields, *more, **kw)
            tokens = sum(map(len, out[0] if self.tells_logprobs else out))
            self._turns.append((time.perf_counter() - start, [], tokens))
            return out
        if not all(map(len, prompt_ids)):
            raise ValueError("prompt: got an empty one, wanted at least one token to go on from.")
        T, device = max(map(len, prompt_ids)), self.decoder.device
        pad = self._tokenizer.pad_token_id
        ids_BT = torch.tensor([[pad] * (T - len(ids)) + list(ids) for ids in prompt_ids], device=device)
        mask_BT = torch.tensor([[0] * (T - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
        with _saying_what_to_lower(self.args), torch.no_grad(), whole(self.decoder, self.accelerator):
            out = self._decode(ids_BT, mask_BT, self.generation_config)
        records = out.stats.records
        lengths = [sum(v.emitted for v in record) for record in records]
        texts = [row[:n] for row, n in zip(out.sequences[:, T:].tolist(), lengths, strict=True)]
        texts = [text[: next((i + 1 for i, t in enumerate(text) if t in self.eos_token_ids), None)] for text in texts]
        self._turns.append((time.perf_counter() - start, records, sum(map(len, texts))))
        return (texts, None) if self.tells_logprobs else texts

    @contextmanager
    def _policy_alone(self) -> Iterator[None]:
        """While this is open TRL finds the policy without its module, whose own generate is another."""
        wrapped, policy = self.model_wrapped, self.model_wrapped if self.mtp is None else self.mtp.model
        with whole(self.model, self.accelerator):
            self.model_wrapped = policy
            try:
                yield
            finally:
                self.model_wrapped = wrapped

    def _generate(self, prompts: list) -> Any:
        out = super()._generate(prompts)
        if self.args.mtp_asked:
            self._note_rollouts("train" if self.model.training else "eval")
        if self.decoder is not None:
            self.decoder.rest()  # the policy's update makes all of it stale, and needs the memory
        return out

    def _note_rollouts(self, mode: str) -> None:
        """Of all ranks, for TRL's next log: tokens are summed, seconds are the slowest rank's."""
        turns, self._turns = self._turns, []
        every = [v for _, records, _ in turns for record in records for v in record]
        depth = max((v.depth for v in every), default=0)
        reached = [[sum(v.depth >= k and v.accepted >= a for v in every) for a in (k, 0)] for k in range(1, depth + 1)]
        mine = (sum(t for t, _, _ in turns), sum(n for _, _, n in turns), sum(v.emitted for v in every), len(every))
        ranks = gather_object([(*mine, reached)])
        seconds, (tokens, emitted, count) = max(r[0] for r in ranks), (sum(r[i] for r in ranks) for i in (1, 2, 3))
        found = {"rollout/seconds": seconds, "rollout/tokens_per_second": tokens / max(seconds, 1e-9)}
        if self.decoder is not None:
            found["rollout/tau"] = emitted / max(count, 1)
            for k in range(max(len(r[4]) for r in ranks)):
                accepted, drafted = (sum(r[4][k][i] for r in ranks if k < len(r[4])) for i in (0, 1))
                found[f"accept_at_{k + 1}"] = accepted / drafted
        for name, value in found.items():
            self._metrics[mode][name].append(value)

    # -- learning from them --------------------------------------------------------------------------------------------

    def _learns(self) -> bool:
        return self.mtp is not None and self.args.mtp_training_mode != "disabled"

    @staticmethod
    def _text(inputs: dict[str, Any]) -> dict[str, Tensor]:
        """A micro-batch of TRL's as any other: labels are what the policy said, no prompt, tool output or padding."""
        prompt_BT, said_BT = inputs["prompt_mask"], inputs["completion_mask"]
        own_BT = said_BT * inputs["tool_mask"] if "tool_mask" in inputs else said_BT
        ids_BT = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        learned_BT = torch.cat([torch.zeros_like(prompt_BT), own_BT], dim=1)
        return {
            "input_ids": ids_BT,
            "attention_mask": torch.cat([prompt_BT, said_BT], dim=1),
            "labels": ids_BT.masked_fill(learned_BT == 0, IGNORE_INDEX),
        }

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """As TRL's; of new rollouts the labels of each depth are counted, over the whole generation and all ranks."""
        before = getattr(self, "_buffered_inputs", None)
        inputs = super()._prepare_inputs(generation_batch)
        if self._learns() and self.model.training and self._buffered_inputs is not before:
            texts = [self._text(micro) for micro in self._buffered_inputs]
            state = self.args.seed, self.state.global_step, self.args.process_index
            choose_labels(self.mtp.module, texts, *state)
            for micro, text in zip(self._buffered_inputs, texts, strict=True):
                micro["mtp_text"] = text
            counts_K1 = torch.stack([super(RolloutTraining, self)._count(text) for text in texts]).sum(0)
            self._rolled_K1 = self.accelerator.reduce(counts_K1.to(self.accelerator.device), "sum")
        return inputs

    def _count(self, inputs: dict[str, Any]) -> Tensor:
        return super()._count(inputs.get("mtp_text") or self._text(inputs))

    def _divisors(self, inputs: dict[str, Any], num_items_in_batch: Any) -> tuple[Tensor, bool]:
        """A step takes so many of a generation's micro-batches as TRL's own loss supposes."""
        if not self.model.training or self._rolled_K1 is None:
            return self._count(inputs), False
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return self._rolled_K1 * share if share != 1 else self._rolled_K1, True

    def compute_loss(self, model: nn.Module, inputs: Any, *more: Any, **kwargs: Any) -> Any:
        """TRL's, with the module's beside it where one learns."""
        if self._learns():
            return super().compute_loss(model, inputs, *more, **kwargs)
        return super(MTPTraining, self).compute_loss(model, inputs, *more, **kwargs)

    def _losses(
        self, model: nn.Module, inputs: dict[str, Any], counts_K1: Tensor, num_items: Any, outputs: bool, ranks: int
    ) -> dict[str, Any]:
        plain, batch = super(MTPTraining, self).compute_loss, to_batch(inputs.get("mtp_text") or self._text(inputs))
        own, losses = self._asked(batch, counts_K1, lambda: plain(model, inputs, outputs))
        return {**losses, "ntp": None, "own": own, "outputs": None}

    def measure_tau(self, rows: Any = None) -> dict[str, float]:
        """Nothing: an evaluation of rollouts decodes, and says so as eval_rollout/tau."""
        return {}

    # -- what a process remembers --------------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.decoder is not None and "history" in self.args.mtp_drafter:
            path = Path(output_dir) / HISTORY.format(self.args.process_index)
            path.write_text(json.dumps(self.decoder.history.texts()), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None or self.decoder is None or "history" not in self.args.mtp_drafter:
            return
        path = Path(checkpoint) / HISTORY.format(self.args.process_index)
        if not path.is_file():
            warnings.warn(f"{path} is not there: this process starts with an empty history.", stacklevel=2)
            return
        self.decoder.history.clear()
        for text in json.loads(path.read_text(encoding="utf-8")):
            self.decoder.history.add(text, REMEMBERED)


def _without_prompts(name: str, rows: Any) -> list[str]:
    """What is wrong with a dataset's prompts, as far as its columns and first rows say; other objects are TRL's."""
    if isinstance(rows, dict):
        return [problem for key, part in rows.items() for problem in _without_prompts(f"{name}[{key!r}]", part)]
    if isinstance(rows, Dataset) and (
        not len(rows) or rows.format["type"] == "custom"
    ):  # columns made as they are read
        return [] if len(rows) else [f"{name}: got no rows"]
    columns = rows.column_names if isinstance(rows, (Dataset, IterableDataset)) else None  # None: nobody knows
    if columns is not None and "prompt" not in columns:
        return [f"{name}: got columns {', '.join(columns)}; wanted prompt among them"]
    first = rows.select_columns("prompt")[:LOOKED_AT]["prompt"] if isinstance(rows, Dataset) else []
    wrong = [(at, prompt) for at, prompt in enumerate(first) if not isinstance(prompt, (str, list))]
    return [f"{name}: got the prompt {p!r} in row {at}, wanted a text or a conversation" for at, p in wrong[:1]]


def _checked(rewards: Any) -> Any:
    """Reward functions that refuse what is no number. None is TRL's word for a reward that does not apply."""
    if isinstance(rewards, list):
        return [_checked(reward) for reward in rewards]
    if rewards is None or isinstance(rewards, (str, nn.Module)):
        return rewards
    if not callable(rewards):
        raise ValueError(f"reward_funcs: got {rewards!r}, wanted a function, a model or a model's name.")
    name = getattr(rewards, "__name__", type(rewards).__name__)

    def numbers(found: Any) -> Any:
        try:
            values = list(found)
        except TypeError as error:
            raise ValueError(f"reward_funcs: {name} gave {type(found).__name__}, wanted a list of numbers.") from error
        for at, reward in enumerate(values):
            try:
                fine = reward is None or math.isfinite(reward)
            except (TypeError, ValueError, OverflowError, RuntimeError):
                fine = False
            if not fine:
                raise ValueError(
                    f"reward_funcs: {name} gave {reward!r} to completion {at}, wanted a finite number, or None where "
                    "it does not apply."
                )
        return values

    call = rewards if inspect.isroutine(rewards) else type(rewards).__call__
    if inspect.iscoroutinefunction(call):

        async def later(*args: Any, **kwargs: Any) -> Any:
            return numbers(await rewards(*args, **kwargs))

        return _named(later, rewards, name)
    return _named(lambda *args, **kwargs: numbers(rewards(*args, **kwargs)), rewards, name)


def _named(function: Callable[..., Any], like: Any, name: str) -> Any:
    functools.update_wrapper(function, like)
    function.__name__ = name
    return function


@contextmanager
def _saying_what_to_lower(args: Any) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
        if not full:
            raise
        texts = args.per_device_train_batch_size * args.steps_per_generation
        raise type(error)(
            f"a rollout of {texts} texts of up to {args.max_completion_length} new tokens does not fit into memory: "
            "lower per_device_train_batch_size, steps_per_generation or max_completion_length, or "
            f"num_speculative_tokens. ({error})"
        ) from error
