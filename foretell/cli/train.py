"""foretell train: give a target an MTP module and train it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from foretell.cli.loading import DTYPES, chat_template, load_target
from foretell.config import ConfigError, parse_settings, to_yaml
from foretell.methods.base import METHODS, MTPConfig, config_class, load_preset


@dataclass(kw_only=True)
class TrainSettings:
    """What `foretell train` needs beside the module's settings and the training arguments."""

    model: str = field(metadata={"help": "Target: a transformers folder or hub name.", "positional": True})
    method: str = field(default="sequential", metadata={"help": f"Architecture of the module: {', '.join(METHODS)}."})
    data: str = field(metadata={"help": "Training rows: JSONL, parquet, a folder of them, or a datasets name."})
    eval_data: str | None = field(
        default=None, metadata={"help": "Evaluation rows; without them the last 5 % of data."}
    )
    preset: str | None = field(default=None, metadata={"help": "A preset of recipes/ or a YAML file like them."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last complete checkpoint in output_dir."})
    regenerate: bool = field(
        default=False, metadata={"help": "The target answers the prompts itself first (resumable)."}
    )
    regenerate_max_new_tokens: int = field(default=256, metadata={"help": "Longest answer, in tokens."})
    given_share: float = field(
        default=0.0,
        metadata={
            "help": "With regenerate: share of the rows that the target reads as they stand instead of answering "
            "them; rows of text are always read."
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "Of the training rows: a file, a name of TRL's (qwen3_training, ...), or auto (TRL's for it)."
        },
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Random weights from the model's config (joint training)."}
    )
    teacher_model: str | None = field(
        default=None, metadata={"help": "Student-forced: who reads the proposals, if not the model as it is now."}
    )
    dtype: str = field(default="auto", metadata={"help": f"Of the target: {', '.join(DTYPES)}."})

    def problems(self) -> list[str]:
        """See config.check."""
        found = []
        if self.dtype not in DTYPES:
            found.append(f"dtype: got {self.dtype!r}, wanted one of {', '.join(DTYPES)}.")
        if self.regenerate_max_new_tokens < 2:
            found.append(f"regenerate_max_new_tokens: got {self.regenerate_max_new_tokens}, wanted at least 2.")
        if not 0 <= self.given_share <= 1 or (self.given_share and not self.regenerate):
            found.append(f"given_share: got {self.given_share}, wanted 0 to 1, and only with --regenerate.")
        return found


def preset_values(name: str) -> dict[str, Any]:
    """What a preset sets, by the names of fields."""
    loaded = load_preset(name)
    return {**loaded["module"], **loaded["training"]}


def module_settings(argv: Sequence[str]) -> type[MTPConfig]:
    """The settings class that flags and files will be read into: which one it is stands among them."""
    given: dict[str, str] = {}
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name in ("--method", "--preset", "--config"):
            given[name[2:]] = value or following
    if Path(given.get("config", "")).is_file():
        values = yaml.safe_load(Path(given["config"]).read_text(encoding="utf-8"))
        given = {**(values if isinstance(values, dict) else {}), **given}
    if given.get("preset"):
        given.setdefault("method", load_preset(given["preset"])["module"].get("method", ""))
    method = given.get("method", TrainSettings.method)
    if method not in METHODS:
        raise ConfigError([f"method: got {method!r}, wanted one of {', '.join(METHODS)}."])
    return config_class(method)


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code."""
    from foretell.training.trainer import MTPTrainingArguments

    classes: list[type] = [TrainSettings, module_settings(argv), MTPTrainingArguments]
    settings, module, args = parse_settings(classes, argv, prog="foretell train", preset=preset_values)
    if args.output_dir is None:
        raise ValueError(
            "output_dir: got none, wanted a folder for checkpoints and the final module: --output-dir DIR."
        )
    from foretell.data.encoded_cache import default_root
    from foretell.data.formats import load_rows
    from foretell.data.prompts import encode_rows
    from foretell.data.rows import detect_form
    from foretell.mtp import get_mtp_model
    from foretell.training.draft_vocabulary import choose_draft_vocabulary
    from foretell.training.regenerate import read_given, regenerate, split_given
    from foretell.training.trainer import MTPTrainer, teacher_problems

    args.device  # noqa: B018 sets up the processes of torchrun, each with its device
    rows = load_rows(settings.data, skip_bad=args.skip_bad_rows)
    if settings.eval_data is not None:
        train_rows, eval_rows = rows, load_rows(settings.eval_data, split="test", skip_bad=args.skip_bad_rows)
    else:
        held = max(1, min(64, len(rows) // 20))
        train_rows, eval_rows = rows.part(slice(-held)) or rows, rows.part(slice(-held, None))
    model, tokenizer = load_target(settings.model, settings.dtype, settings.from_scratch)
    mtp = get_mtp_model(model, module)
    teacher = None if settings.teacher_model is None else load_target(settings.teacher_model, settings.dtype)[0]
    if wrong := teacher_problems(mtp, args, teacher):  # before the target answers anything
        raise ValueError("; ".join(wrong))
    reader = tokenizer
    if settings.chat_template is not None:
        reader = copy.deepcopy(tokenizer)  # the one that is saved keeps its own template
        reader.chat_template = chat_template(settings.chat_template, tokenizer)

    def encoded(rows: Any) -> Any:
        vocab_size, skip = mtp.target.vocab_size, args.skip_bad_rows
        settings = (args.max_length, args.assistant_only_loss, vocab_size, skip, args.num_proc)
        return encode_rows(rows, reader, *settings, cache=default_root())[0]

    def answered(rows: Any) -> Any:
        return regenerate(
            mtp,
            rows,
            tokenizer,
            Path(args.output_dir) / "answers",
            max_new_tokens=settings.regenerate_max_new_tokens,
            keep_hidden=not args.trains_target and mtp.module.reads_states,
            seed=args.seed,
            skip_bad=args.skip_bad_rows,
        )[0]

    # evaluation rows first: what is wrong with them is said before the target answers thousands of prompts
    prompts_only = settings.regenerate and any(detect_form(row) == "prompt" for row in eval_rows)
    eval_set = answered(eval_rows) if prompts_only else encoded(eval_rows)
    counts: dict[str, int] = {}
    if settings.regenerate:
        asked, given = split_given(train_rows, settings.given_share, args.seed)
        train_set = answered(asked) if asked else []
        if given:
            texts = read_given(
                mtp,
                given,
                reader,
                Path(args.output_dir) / "given",
                max_length=args.max_length or 2**31,
                keep_hidden=not args.trains_target and mtp.module.reads_states,
                skip_bad=args.skip_bad_rows,
            )
            counts = {"answers": len(train_set), "given_texts": len(texts)}
            counts["given_tokens"] = sum(sum(label >= 0 for label in row["labels"]) for row in texts.rows())
            train_set = [*train_set, *texts]
            print(f"{counts['answers']} answers, {len(texts)} given texts of {counts['given_tokens']:,} tokens")
    else:
        train_set = encoded(train_rows)
    if module.draft_vocab_size is not None:
        print(choose_draft_vocabulary(mtp, tokenizer, train_set, eval_set))
    trainer = MTPTrainer(
        model=mtp,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        teacher_model=teacher,
    )
    mtp.notes["training"] |= counts
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    (Path(args.output_dir) / "run.yaml").write_text(to_yaml(settings, module, args), encoding="utf-8")
    trainer.train(resume_from_checkpoint=True if settings.resume else None)
    metrics = trainer.measure_tau()
    trainer.save_model(args.output_dir)
    if metrics:
        print("  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    print(f"module saved in {args.output_dir}")
    return 0
