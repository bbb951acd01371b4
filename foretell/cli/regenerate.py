"""foretell regenerate: the model answers prompts; a folder of answers that trains, resumes and is read by any tool."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from foretell.cli.loading import DTYPES, load_target
from foretell.config import parse


@dataclass(kw_only=True)
class RegenerateSettings:
    """Flags of `foretell regenerate`. The same command goes on where it was stopped."""

    model: str = field(metadata={"help": "The model that answers: a folder or hub name.", "positional": True})
    prompts: str = field(metadata={"help": "Prompts: a file of `foretell prompts`, or rows that train takes."})
    output: str = field(metadata={"help": "Folder for the answers; load_dataset and --data read it."})
    engine: Literal["foretell", "openai", "vllm"] = field(
        default="foretell",
        metadata={"help": "Our own decoder; an endpoint at --base-url; or vLLM, started by --python."},
    )
    base_url: list[str] | None = field(default=None, metadata={"help": "Of one or several OpenAI-compatible servers."})
    model_name: str | None = field(default=None, metadata={"help": "The name under which they serve the model."})
    python: str | None = field(default=None, metadata={"help": "With engine vllm: the Python of its environment."})
    vllm_args: str = field(default="", metadata={"help": "Further flags for vLLM, as one text."})
    concurrency: int = field(default=64, metadata={"help": "Requests in flight; of our own decoder texts at once."})
    retries: int = field(default=6, metadata={"help": "Of a request that fails, each after twice the wait before."})
    timeout: float = field(default=600.0, metadata={"help": "Seconds for one answer of an endpoint."})
    samples: int = field(default=1, metadata={"help": "Answers to each prompt; more than one must be drawn."})
    temperature: float | None = field(
        default=None, metadata={"help": "0 is greedy; without it the model's own generation config decides all."}
    )
    top_p: float | None = field(default=None, metadata={"help": "For drawing."})
    top_k: int | None = field(default=None, metadata={"help": "For drawing."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Longest answer, in tokens."})
    seed: int = field(default=0, metadata={"help": "Of what is drawn."})
    system_prompt: str | None = field(default=None, metadata={"help": "Before conversations that have none."})
    chat_template_kwargs: dict | None = field(
        default=None, metadata={"help": "For the chat template: '{enable_thinking: false}'."}
    )
    turns: Literal["all", "last"] = field(
        default="all", metadata={"help": "Of conversations: each answer anew, one after the other, or the last only."}
    )
    drop_truncated: bool = field(default=False, metadata={"help": "Leave cut answers out of the data."})
    shard: str = field(default="1/1", metadata={"help": "i/n, i from 1: this machine's part of the prompts."})
    keep_states: Literal["auto", "always", "never"] = field(
        default="auto",
        metadata={"help": "Keep the model's states for training; auto: if they fit a quarter of the free disk."},
    )
    module: str | None = field(
        default=None, metadata={"help": "Folder of an MTP module: it drafts, and its states are kept."}
    )
    drafter: str | None = field(
        default=None, metadata={"help": "Of our own decoder: mtp, lookup, mtp+lookup (default with a module) or none."}
    )
    skip_bad_rows: bool = field(default=False, metadata={"help": "Leave out prompts that cannot be read."})
    dtype: str = field(default="auto", metadata={"help": f"Of the model in our own decoder: {', '.join(DTYPES)}."})

    def problems(self) -> list[str]:
        """See config.check."""
        found, own = [], self.engine == "foretell"
        if self.engine == "openai" and not self.base_url:
            found.append("base_url: got none, wanted the URL of a server: --base-url http://127.0.0.1:8000.")
        if self.engine == "vllm" and not self.python:
            found.append("python: got none, wanted the Python of an environment that has vLLM.")
        others = {"base_url": ("openai",), "model_name": ("openai",), "python": ("vllm",), "vllm_args": ("vllm",)}
        others |= {"module": ("foretell",), "drafter": ("foretell",)}
        found += [
            f"{name}: got {getattr(self, name)!r} with engine {self.engine}, which it is not for."
            for name, engines in others.items()
            if getattr(self, name) and self.engine not in engines
        ]
        if not own and self.keep_states == "always":
            found.append(f"keep_states: got always with engine {self.engine}, which gives no states.")
        for name in ("samples", "max_new_tokens", "concurrency"):
            if getattr(self, name) < 1:
                found.append(f"{name}: got {getattr(self, name)}, wanted at least 1.")
        if self.retries < 0 or self.timeout <= 0:
            found.append(f"retries, timeout: got {self.retries}, {self.timeout}, wanted at least 0 and more than 0.")
        if self.temperature is not None and self.temperature < 0:
            found.append(f"temperature: got {self.temperature}, wanted at least 0.")
        if self.dtype not in DTYPES:
            found.append(f"dtype: got {self.dtype!r}, wanted one of {', '.join(DTYPES)}.")
        part = self.shard.split("/")
        if len(part) != 2 or not all(p.isdigit() for p in part) or not 0 <= int(part[0]) <= int(part[1]) != 0:
            found.append(f"shard: got {self.shard!r}, wanted i/n with i from 1 to n.")
        return found

    @property
    def part(self) -> tuple[int, int]:
        """This process's part, from 0, and how many there are: processes of torchrun share their machine's."""
        i, n = map(int, self.shard.split("/"))
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        return i % n + n * rank, n * world


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code: 1 where some prompts got no answer."""
    settings = parse(RegenerateSettings, argv, prog="foretell regenerate")
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from foretell.data.answers import AnswerFolder
    from foretell.data.encoded_cache import rows_hash, tokenizer_hash
    from foretell.data.formats import load_rows
    from foretell.training.answering import Asking, answer_prompts, names_of
    from foretell.training.endpoint import vllm_server

    rows = load_rows(settings.prompts, skip_bad=settings.skip_bad_rows)
    names = names_of(rows, settings.samples)
    fields = {name for at in range(len(rows)) for name in _fields(rows[at].get("messages") or rows[at].get("prompt"))}
    config = AutoConfig.from_pretrained(settings.model)
    try:
        generation = GenerationConfig.from_pretrained(settings.model)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    _set_sampling(generation, settings)
    if settings.samples > 1 and not generation.do_sample:
        raise ValueError(f"samples: got {settings.samples} of greedy answers, which are all the same: --temperature T.")
    about: dict[str, Any] = {
        "model": Path(settings.model).name if Path(settings.model).exists() else settings.model,  # wherever it lies
        "revision": getattr(config, "_commit_hash", None),
        "prompts": rows_hash(rows),
        "engine": settings.engine,
        "samples": settings.samples,
        "max_new_tokens": settings.max_new_tokens,
        "generation": {
            name: value for name, value in generation.to_diff_dict().items() if name != "transformers_version"
        },
        "system_prompt": settings.system_prompt,
        "chat_template_kwargs": settings.chat_template_kwargs,
        "turns": settings.turns,
    }
    if generation.do_sample:
        about["seed"] = settings.seed
    part, more = settings.part, {"drop_truncated": settings.drop_truncated}
    asking = Asking(
        system_prompt=settings.system_prompt,
        template=settings.chat_template_kwargs,
        turns=settings.turns,
        vocab_size=config.get_text_config().vocab_size,
    )
    about["states"] = None
    with contextlib.ExitStack() as open_:
        if settings.engine == "foretell":
            engine, tokenizer, ends = _own(settings, generation, rows, about, more)
        else:
            tokenizer = AutoTokenizer.from_pretrained(settings.model)
            ends = _ends(generation, tokenizer)
            urls = settings.base_url
            if settings.engine == "vllm":
                log = Path(settings.output) / f"vllm-{part[0]}.log"
                urls = [open_.enter_context(vllm_server(settings.python, settings.model, log, settings.vllm_args))]
            engine = _endpoint(settings, urls, tokenizer, ends, generation)
        about["tokenizer"] = tokenizer_hash(tokenizer)
        folder = AnswerFolder(settings.output, about, names, fields, part=part, **more)
        done = len(folder.mine) - len(folder.missing)
        print(f"{len(folder.mine)} answers are wanted here, {done} are there already", flush=True)
        outcome = answer_prompts(folder, rows, tokenizer, ends, asking, engine, samples=settings.samples, part=part[0])
    return _report(settings, outcome, engine)


def _fields(messages: Any) -> set[str]:
    return {name for message in messages for name in message} if isinstance(messages, list) else set()


def _set_sampling(generation: Any, settings: RegenerateSettings) -> None:
    """The flags, over the model's own generation config."""
    if settings.temperature == 0:
        generation.update(do_sample=False, temperature=None, top_p=None, top_k=None, min_p=None)
    elif settings.temperature is not None:
        generation.update(do_sample=True, temperature=settings.temperature)
    for name in ("top_p", "top_k"):
        value = getattr(settings, name)
        if value is not None and not generation.do_sample:
            raise ValueError(f"{name}: got {value} for greedy answers, wanted --temperature T above 0 with it.")
        generation.update(**({} if value is None else {name: value}))


def _own(
    settings: RegenerateSettings, generation: Any, rows: Any, about: dict[str, Any], more: dict[str, Any]
) -> tuple[Any, Any, set[int]]:
    """Our own decoder as an engine, its tokenizer, and what ends an answer; adds to what the manifest says."""
    from foretell.data.answers import MANIFEST, read_manifest
    from foretell.data.prompts import encode_prompt
    from foretell.methods.sequential import SequentialConfig
    from foretell.mtp import MTPModel, get_mtp_model
    from foretell.training.answering import OwnEngine
    from foretell.training.regenerate import Answering, eos_ids

    model, tokenizer = load_target(settings.model, settings.dtype)
    model.generation_config = generation
    mtp = (
        get_mtp_model(model, SequentialConfig(depth=1))
        if settings.module is None
        else MTPModel.from_pretrained(model, settings.module)
    )
    drafter = settings.drafter or ("none" if settings.module is None else "mtp+lookup")
    if "mtp" in drafter and settings.module is None:
        raise ValueError(f"drafter: got {drafter!r}, which needs a trained module: --module FOLDER.")
    about["target"] = mtp.target.fingerprint()
    ends = eos_ids(mtp, tokenizer)
    asks, output = settings.keep_states, Path(settings.output)
    some = [len(encode_prompt(rows[at], tokenizer)) for at in range(min(len(rows), 64))]
    each = (sum(some) / len(some) + settings.max_new_tokens) * mtp.target.hidden_size * mtp.target.dtype.itemsize
    room = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    size, free = each * len(rows) * settings.samples / settings.part[1], shutil.disk_usage(room).free
    keep = asks == "always" or (asks == "auto" and size < free / 4)
    if asks == "auto" and (output / MANIFEST).exists():
        keep = read_manifest(output)["width"] is not None  # as it was begun, however full the disk is by now
    if mtp.target.hidden_layers:
        if asks == "always":
            raise ValueError("keep_states: got always for a module that reads several layers, wanted never.")
        keep = False
    print(f"states of these answers: {size / 1e9:.2f} GB at most, {free / 1e9:.1f} GB are free: "
          f"{'kept' if keep else 'not kept'}", flush=True)  # fmt: skip
    if keep:
        about["states"] = about["hidden_source"] = mtp.mtp_config.hidden_source
        more |= {"width": mtp.target.hidden_size, "dtype": mtp.target.dtype}
    chosen = None if drafter == "none" else drafter
    answering = Answering(
        mtp, tokenizer, settings.max_new_tokens, keep, settings.concurrency, settings.seed, drafter=chosen
    )
    return OwnEngine(answering, ends), tokenizer, ends


def _endpoint(settings: RegenerateSettings, urls: list[str], tokenizer: Any, ends: set[int], generation: Any) -> Any:
    """A served model as an engine. What a request cannot say of the generation config is refused."""
    from foretell.training.endpoint import Endpoint

    request: dict[str, Any] = {"max_tokens": settings.max_new_tokens, "temperature": 0.0}
    given = generation.to_diff_dict()
    if generation.do_sample:
        top_k = 50 if generation.top_k is None else generation.top_k  # as transformers fills it in
        request |= {"temperature": given.get("temperature", 1.0), "top_k": top_k}
        request |= {name: given[name] for name in ("top_p", "min_p") if name in given}
    names = {"repetition_penalty": "repetition_penalty", "min_new_tokens": "min_tokens", "stop_strings": "stop"}
    request |= {ours: given[name] for name, ours in names.items() if given.get(name) is not None}
    said = {*names, "do_sample", "temperature", "top_k", "top_p", "min_p", "transformers_version", "use_cache"}
    said |= {"_from_model_config", "max_new_tokens", "max_length", "return_dict_in_generate", "cache_implementation"}
    said |= {name for name, value in given.items() if value in (None, False, 0, 1)}  # these do nothing
    others = [f"{n}={v!r}" for n, v in given.items() if n not in said and not n.endswith("_token_id")]
    if others:
        raise ValueError(f"generation config: got {', '.join(others)}, which endpoints cannot be asked; take it out.")
    return Endpoint(
        urls,
        settings.model if settings.engine == "vllm" else settings.model_name,
        settings.model,
        tokenizer,
        ends,
        request,
        seed=settings.seed,
        concurrency=settings.concurrency,
        retries=settings.retries,
        timeout=settings.timeout,
    )


def _ends(generation: Any, tokenizer: Any) -> set[int]:
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {i for i in (*ends, tokenizer.eos_token_id) if i is not None}


def _report(settings: RegenerateSettings, outcome: Any, engine: Any) -> int:
    counts = outcome.counts
    left = f", {counts['left_out']} left out" if counts.get("left_out") else ""
    print(f"{outcome.made} answers made now")
    tokens, trained = counts["tokens"], counts["trained_tokens"]
    print(f"{settings.output}: {counts['answers']} answers, {tokens:,} tokens, {trained:,} of them the model's; "
          f"{counts['truncated']} cut at {settings.max_new_tokens} tokens{left}")  # fmt: skip
    if settings.engine != "foretell":
        print(f"{engine.retried} requests were tried again; {counts['drifted']} answers drifted by tokenizing again")
    if not outcome.failures:
        return 0
    for name, reason in list(outcome.failures.items())[:10]:
        print(f"no answer: {name}: {reason}")
    print(f"{len(outcome.failures)} prompts got no answer; all are in {settings.output}/failures-*.jsonl, and the same "
          "command tries them again")  # fmt: skip
    return int(os.environ.get("WORLD_SIZE", "1") == "1")  # a process of torchrun would end the others
