"""What the examples share: four flags, and data by name or from a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets import load_dataset


def arguments(model: str) -> argparse.Namespace:
    """The flags, with an example's own model as default."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=model, help="a hub name or a transformers folder")
    parser.add_argument("--dataset", default="trl-lib/Capybara", help="a datasets name, or a JSONL file in TRL's forms")
    parser.add_argument("--output_dir", default=f"runs/{Path(model).name}-MTP")
    parser.add_argument("--max_steps", type=int, default=-1, help="-1: as many as the epochs have")
    parser.add_argument("--cpu", action="store_true", help="no GPU, and no bf16")
    return parser.parse_args()


def load(name: str) -> Any:
    """The training rows."""
    if Path(name).is_file():
        return load_dataset("json", data_files=name, split="train")
    return load_dataset(name, split="train")
