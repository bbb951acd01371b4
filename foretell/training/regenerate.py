"""What a module learns from, made by the target: its own answers, and given texts that it reads.

On-policy data: the target answers the prompts itself, as its own generate would, in continuous batches; a killed run
goes on, and several processes share the prompts.

What a module must predict is what the target will say, so the target's own answers are the cheapest large gain there is
(FastMTP: 1.67x -> 1.81x). The states that the target had while answering can be kept: training then needs no forward of
the target at all.
"""

# T tokens of an answer with its prompt, D hidden width.

from __future__ import annotations

import datetime
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from foretell.data.cache import HiddenRecorder, HiddenStore
from foretell.data.prompts import encode_prompts, encode_rows
from foretell.data.rows import GIVEN, detect_form
from foretell.decoding.generate import MTPGenerate
from foretell.decoding.stats import GenerationStats
from foretell.methods.base import chosen_tokens
from foretell.methods.learning import in_eval_mode
from foretell.mtp import MTPModel
from foretell.runtime import Progress
from foretell.types import IGNORE_INDEX, SequenceState

BATCH = 4096  # prompts that are prepared together
NOT_DECIDING = ("transformers_version", "_from_model_config", "return_dict_in_generate", "max_new_tokens", "max_length")


def eos_ids(mtp: MTPModel, tokenizer: Any) -> set[int]:
    """Every token that ends an answer."""
    return {i for i in (*mtp.target.end_ids, getattr(tokenizer, "eos_token_id", None)) if i is not None}


def regenerate(
    mtp: MTPModel,
    rows: Sequence[Any],
    tokenizer: Any,
    folder: str | Path,
    *,
    max_new_tokens: int = 256,
    keep_hidden: bool = True,
    slots: int = 64,
    seed: int = 0,
    skip_bad: bool = False,
    deadline: Callable[[], bool] | None = None,
) -> tuple[HiddenStore, GenerationStats | None]:
    """Answer the prompts of rows (any form with a prompt) and store answers, labels and states in folder.

    The answers are those of the model's own generate under its own generation config. Labels cover the answer only, its
    end token included; an answer cut at max_new_tokens ends in no such token. Answers that are stored already are not
    made again; a store made by another model or with other settings is refused. Where torch.distributed is set up, each
    process answers a share of the prompts on its own device, and all return the whole store.

    Args:
        mtp: the target, and whose module the states are kept for.
        rows: anything that `load_rows` takes.
        tokenizer: of the target.
        folder: of the store.
        max_new_tokens: longest answer.
        keep_hidden: keep the states that the module reads, where that is one a token.
        slots: answers that are decoded at once.
        seed: of answers that the generation config says to sample.
        skip_bad: leave out rows whose prompt cannot be encoded; they are counted and named in a warning.
        deadline: true: no further prompt is begun.

    Returns:
        The store, opened for reading, with the answers to these prompts in their order; and the stats of what this
        process made now (None if nothing was missing).
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("regenerate: got several processes that do not know each other; init_process_group first.")
    prompts, _ = encode_prompts(rows, tokenizer, mtp.target.vocab_size, skip_bad)
    by_key = {hashlib.sha256(json.dumps(p).encode()).hexdigest()[:24]: p for p in prompts}
    own = {
        name: value for name, value in mtp.model.generation_config.to_diff_dict().items() if name not in NOT_DECIDING
    }
    fingerprint: dict[str, Any] = {
        "target": mtp.target.fingerprint(),
        "max_new_tokens": max_new_tokens,
        "generation": own | {"eos_token_id": sorted(eos_ids(mtp, tokenizer))},
    }
    if own.get("do_sample"):
        fingerprint["seed"] = seed
    keep_hidden &= not mtp.target.hidden_layers
    if keep_hidden:
        fingerprint["hidden_source"] = mtp.mtp_config.hidden_source
    about: dict[str, Any] = {
        "fingerprint": fingerprint,
        "width": mtp.target.hidden_size if keep_hidden else None,
        "dtype": mtp.target.dtype if keep_hidden else torch.float32,
    }
    folder = Path(folder)
    together = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30)) if world > 1 else None
    if rank == 0:
        _merge(folder, about)  # shares of a run that was killed, of however many processes
    if together is not None:
        dist.barrier(together)
    done = set(HiddenStore.load(folder).keys())
    answering = Answering(mtp, tokenizer, max_new_tokens, keep_hidden, slots, seed, deadline)
    with HiddenStore(folder if world == 1 else folder / f"share-{rank}", **about) as store:
        stats = _answer_all(answering, store, list(by_key.items()), done, rank, world)
    if together is not None:
        dist.barrier(together)
        if rank == 0:
            _merge(folder, about)
        dist.barrier(together)
    return HiddenStore.load(folder, keys=list(by_key)), stats


def split_given(rows: Sequence[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(rows to answer, rows to read): rows of text are read, and of those with an answer as many as make the share."""
    texts = [i for i, row in enumerate(rows) if detect_form(row) == "text"]
    answered = [i for i, row in enumerate(rows) if detect_form(row) not in ("text", "prompt")]
    random.Random(seed).shuffle(answered)
    read = {*texts, *answered[: max(round(share * len(rows)) - len(texts), 0)]}
    return [row for i, row in enumerate(rows) if i not in read], [rows[i] for i in sorted(read)]


@torch.no_grad()
def read_given(
    mtp: MTPModel,
    rows: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    max_length: int = 1024,
    keep_hidden: bool = True,
    skip_bad: bool = False,
    deadline: Callable[[], bool] | None = None,
) -> HiddenStore:
    """A teacher on any text: the target reads rows as they stand, in prefill, far cheaper a token than answering.

    Labels are what it would say in each trained token's place, so they teach as its own answers do, under "labels" or a
    teacher's supervision alike; its states are kept as `regenerate`'s are. Arguments as there; what was read is not
    read again.
    """
    encoded, _ = encode_rows(rows, tokenizer, max_length, vocab_size=mtp.target.vocab_size, skip_bad=skip_bad)
    fingerprint: dict[str, Any] = {"target": mtp.target.fingerprint(), "given": True}
    keep_hidden &= not mtp.target.hidden_layers
    if keep_hidden:
        fingerprint["hidden_source"] = mtp.mtp_config.hidden_source
    width, dtype = (mtp.target.hidden_size, mtp.target.dtype) if keep_hidden else (None, torch.float32)
    by_key = {GIVEN + hashlib.sha256(json.dumps(row["input_ids"]).encode()).hexdigest()[:24]: row for row in encoded}
    with HiddenStore(folder, fingerprint=fingerprint, width=width, dtype=dtype) as store, in_eval_mode(mtp.model):
        missing = [(key, row) for key, row in by_key.items() if key not in store and len(row["input_ids"]) > 1]
        with Progress("given texts", total=len(missing), unit="texts") as bar:
            for key, row in missing:
                if deadline is not None and deadline():
                    break
                ids_1T = torch.tensor([list(row["input_ids"])], device=mtp.device)
                states = mtp.target.forward_text(ids_1T, torch.arange(ids_1T.shape[1], device=mtp.device)[None])
                at_N = (torch.tensor(list(row["labels"]), device=mtp.device) != IGNORE_INDEX).nonzero()[:, 0]
                at_N = at_N[at_N > 0]
                labels_T = torch.full_like(ids_1T[0], IGNORE_INDEX)
                labels_T[at_N] = chosen_tokens(mtp.target.logits, states.post_norm_BRD[0], at_N - 1)
                kept_TD = mtp.module.source(states)[0].cpu() if keep_hidden else None
                store.append(key, ids_1T[0].tolist(), labels_T.tolist(), kept_TD)
                bar.update(1)
    return HiddenStore.load(folder, keys=list(by_key))


def _merge(folder: Path, about: dict[str, Any]) -> None:
    """Make the store if there is none, and move what single processes answered into it."""
    with HiddenStore(folder, **about) as store:
        for share in sorted(folder.glob("share-*")):
            part = HiddenStore(share, **about)  # made with the same settings, or an error
            part.close()
            with HiddenStore.load(share) as part:
                for at, key in enumerate(part.keys()):
                    if key not in store:
                        row = part[at]
                        store.append(key, row["input_ids"], row["labels"], row.get("hidden_states"))
            shutil.rmtree(share)


def _answer_all(
    answering: Answering,
    store: HiddenStore,
    prompts: list[tuple[str, list[int]]],
    done: set[str],
    rank: int,
    world: int,
) -> GenerationStats | None:
    """Answer this process's share of the prompts that are not done; stats of what was made."""
    made: GenerationStats | None = None
    batches = answering.batches([(prompt, key) for key, prompt in prompts], done, world)[rank::world]
    done = done | set(store.keys())
    with Progress("answers", total=sum(len(batch) for _, batch in batches), unit="answers") as bar:

        def keep(key: str, sequence: SequenceState, states_TD: Tensor | None) -> None:
            if key not in done:
                done.add(key)
                labels = [IGNORE_INDEX] * sequence.prompt_length + sequence.new_tokens
                store.append(key, sequence.tokens, labels, states_TD)
                bar.update(1)

        for number, batch in batches:
            if answering.deadline is not None and answering.deadline():
                break
            stats = answering.some(batch, number, keep)
            if made is None:
                made = stats
            else:
                made.records += stats.records
    return made


class Answering:
    """How prompts are answered: transformers prepares processors, criteria and end tokens, our loop decodes."""

    def __init__(
        self,
        mtp: MTPModel,
        tokenizer: Any,
        max_new_tokens: int,
        keep_hidden: bool,
        slots: int,
        seed: int,
        deadline: Callable[[], bool] | None = None,
        drafter: str | None = None,
    ) -> None:
        self.mtp, self.seed, self.slots, self.deadline = mtp, seed, slots, deadline
        self.drafts = {"num_draft_tokens": 0} if drafter is None else {"num_draft_tokens": "auto", "drafter": drafter}
        self.recorder = HiddenRecorder(mtp.module.source) if keep_hidden else None
        config = mtp.model.generation_config
        self.samples = bool(config.do_sample)
        # processors that look for repeated runs of tokens would find some in padding
        self.pads = not config.no_repeat_ngram_size
        self.settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": sorted(eos_ids(mtp, tokenizer)) or None,
            "return_dict_in_generate": True,
            "use_cache": True,  # a model that was saved while it learned may say otherwise; the text is the same
        }
        if config.stop_strings:
            self.settings["tokenizer"] = tokenizer
        if config.pad_token_id is None and not self.settings["eos_token_id"]:
            self.settings["pad_token_id"] = 0

    def batches(self, prompts: list[tuple[list[int], Any]], done: set, world: int = 1) -> list[tuple[int, list]]:
        """Prompts that are answered in one run, each with its key, under the number that seeds what they draw.

        What is drawn depends on who is drawn beside it: such batches are the same in every run, and one of which
        anything is missing is answered again, whole.
        """
        groups: dict[int, list[tuple[list[int], Any]]] = {}
        for prompt, key in prompts:
            if self.samples or key not in done:
                groups.setdefault(0 if self.pads else len(prompt), []).append((prompt, key))
        missing = sum(len(group) for group in groups.values())
        size = self.slots if self.samples else max(1, min(BATCH, -(-missing // world)))
        cut = [group[first : first + size] for group in groups.values() for first in range(0, len(group), size)]
        return [(number, batch) for number, batch in enumerate(cut) if any(key not in done for _, key in batch)]

    def some(self, batch: list[tuple[list[int], Any]], number: int, keep: Callable) -> GenerationStats:
        """Answer prompts; keep is given the key, the sequence and its states of each as it ends."""
        mtp, width = self.mtp, max(len(prompt) for prompt, _ in batch)
        # filled up with a token that the prompt has anyway: what asks which tokens are there is told nothing new
        filled = [[prompt[0]] * (width - len(prompt)) + prompt for prompt, _ in batch]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch]

        def leave(sequence: SequenceState) -> None:
            states_TD, T = None, len(sequence.tokens)
            if self.recorder is not None:
                # the last token was never read by the target: its row is zeros, and no loss looks there
                states_TD = torch.zeros(T, mtp.target.hidden_size, dtype=mtp.target.dtype)
                states_TD[: T - 1] = self.recorder.states(sequence)[: T - 1]
            keep(batch[sequence.index][1], sequence, states_TD)

        run = MTPGenerate(
            mtp,
            slots=self.slots,
            generator=torch.Generator(mtp.device).manual_seed(self.seed * 1_000_003 + number),
            **self.drafts,
        )
        run.watchers = [] if self.recorder is None else [self.recorder]
        run.leave, run.stop_admitting = leave, self.deadline
        return mtp.model.generate(
            torch.tensor(filled, device=mtp.device),
            attention_mask=torch.tensor(mask, device=mtp.device),
            custom_generate=run,
            **self.settings,
        ).stats
