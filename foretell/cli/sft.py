"""foretell sft: TRL's own flags and YAML files (`trl sft`), plus the mtp_* fields of foretell.trl.SFTConfig."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code."""
    try:
        from trl import (
            DatasetMixtureConfig,
            ModelConfig,
            ScriptArguments,
            TrlParser,
            get_dataset,
            get_peft_config,
            get_quantization_config,
        )
    except ImportError as error:
        raise ValueError(f"foretell sft needs TRL ({error}): pip install 'foretell[trl]'.") from error
    from foretell.training.sft import SFTConfig, SFTTrainer

    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig), prog="foretell sft")
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
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
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
        return load_dataset(kind, data_files={script.dataset_train_split: str(path)})
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
