"""foretell sft: TRL's own flags and YAML files (`trl sft`), plus the mtp_* fields of foretell.trl.SFTConfig."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code."""
    ask_for_trl("foretell sft")
    from trl import ScriptArguments

    from foretell.training.sft import SFTConfig, SFTTrainer

    script, args, about = parsed("foretell sft", argv, ScriptArguments, SFTConfig)
    return run(SFTTrainer(args=args, **about), script)


def ask_for_trl(verb: str) -> None:
    """ValueError where it is not installed."""
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{verb} needs TRL ({error}): pip install 'foretell[trl]'.") from error


def parsed(verb: str, argv: Sequence[str], scripts: type, config: type) -> tuple[Any, Any, dict[str, Any]]:
    """(the script's arguments, the trainer's, what else the trainer is made of): TRL's flags and YAML files."""
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser, get_dataset, get_peft_config, get_quantization_config

    parser = TrlParser((scripts, config, ModelConfig, DatasetMixtureConfig), prog=verb)
    script, args, model, mixture = parser.parse_args_and_config(args=list(argv), fail_with_unknown_args=True)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": getattr(args, "trust_remote_code", False),
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    if not mixture.datasets and not script.dataset_name:
        raise ValueError("dataset_name: got none, wanted a datasets name, a folder, or a JSONL or parquet file.")
    dataset = get_dataset(mixture) if mixture.datasets else _load(script)
    return (
        script,
        args,
        {
            "model": model.model_name_or_path,
            "train_dataset": _split(dataset, "dataset_train_split", script),
            "eval_dataset": _split(dataset, "dataset_test_split", script) if args.eval_strategy != "no" else None,
            "quantization_config": get_quantization_config(model),
            "peft_config": get_peft_config(model),
        },
    )


def run(trainer: Any, script: Any) -> int:
    """Train, save, and push where that was asked for."""
    args = trainer.args
    given = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(given).lower() == "true" else given)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"saved in {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    return 0


def _load(script: Any) -> Any:
    """A datasets name or folder as TRL loads it, or one local file."""
    from datasets import load_dataset

    path = Path(script.dataset_name)
    if path.is_file():
        kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}.get(path.suffix)
        if kind is None:
            raise ValueError(f"dataset_name: got the file {path}, wanted .jsonl, .json, .parquet or .csv.")
        if not path.stat().st_size:
            raise ValueError(f"dataset_name: got {path}, which is empty.")
        return load_dataset(kind, data_files={script.dataset_train_split: str(path)})
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def _split(dataset: Any, name: str, script: Any) -> Any:
    split = getattr(script, name)
    if split not in dataset:
        raise ValueError(f"{name}: got {split!r}, wanted one of {', '.join(dataset)}.")
    return dataset[split]
