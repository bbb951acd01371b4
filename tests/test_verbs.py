"""foretell train, generate and inspect, as a user types them, on a tiny model in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from foretell.cli import main
from foretell.mtp import MTPModel

COMMON = (
    "--max-steps 3 --per-device-train-batch-size 2 --use-cpu --report-to none --save-strategy no --eval-new-tokens 4"
)
METHODS = {
    "default": ("", "sequential"),
    "sequential": ("--method sequential --depth 2 --shared-module", "sequential"),
    "medusa": ("--method heads --head-type medusa --depth 3", "heads"),
    "masked": ("--method masked --depth 2 --lora-rank 4 --mask-positions 3", "masked"),
    "noise masks": ("--preset uno --depth 2 --warmup-steps 0", "masked"),
    "preset": ("--preset meta-heads", "heads"),
    "preset, changed": ("--preset=medusa --depth 2", "heads"),
    "file": ("--config {folder}/run.yaml", "heads"),
}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """model/ and data.jsonl in a folder."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    with (tmp_path / "data.jsonl").open("w") as file:
        for _ in range(24):
            ids = torch.randint(3, VOCAB, (12,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(f"w{i}" for i in ids)}) + "\n")
    (tmp_path / "run.yaml").write_text("method: heads\nhead_type: cnn\ndepth: 2\n")
    return tmp_path


@pytest.mark.parametrize("name", METHODS)
def test_train_generate_inspect(name, stored, capsys):
    flags, method = METHODS[name]
    out = stored / "out"
    words = ["train", str(stored / "model"), "--data", str(stored / "data.jsonl"), "--output-dir", str(out)]
    assert main([*words, *flags.format(folder=stored).split(), *COMMON.split()]) == 0
    saved = out if (out / "model.safetensors").exists() else stored / "model"  # a joint preset changes the target
    mtp = MTPModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved), out)
    assert mtp.mtp_config.method == method
    assert mtp.mtp_config.depth == (3 if name in ("default", "medusa", "preset") else 2)
    capsys.readouterr()
    assert main(["generate", str(saved), "--module", str(out), "--prompt", "w5 w9 w5", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["inspect", str(out)]) == 0
    assert method in capsys.readouterr().out


def test_an_unknown_method_is_named(stored, capsys):
    assert main(["train", str(stored / "model"), "--data", "x", "--method", "hydra"]) == 2
    assert "hydra" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "wanted"), [("llama", "fast"), ("gpt_neox_japanese", "refused"), ("gpt2", "refused")])
def test_inspect_says_how_a_model_is_decoded(name, wanted, tmp_path, capsys):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert type(model).__name__ in said and wanted in said
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert wanted in (found["verdict"], found.get("path"))
    if wanted == "refused":
        assert found["why"] in said and found["architecture"] in found["why"]
    else:
        assert max(found["distances"].values()) < 1e-4 and len(found["distances"]) > 2
