"""What README.md and docs/*.md show is run as it stands there, with a tiny model and a few rows under the names used.

Only what stands in STANDS_FOR is changed: names of a hub become folders here, and long runs a step.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from tiny import VOCAB, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from foretell.cli import main
from foretell.methods.heads import HeadsConfig
from foretell.methods.masked import MaskedConfig
from foretell.mtp import get_mtp_model

ROOT = Path(__file__).parents[1]
FILES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
STANDS_FOR = {
    "Qwen/Qwen2.5-0.5B": "MODEL",
    "Qwen2.5-0.5B-MTP": "out",
    '"trl-lib/Capybara", split': '"json", data_files="chats.jsonl", split',
    "--dataset_name trl-lib/Capybara": "--dataset_name chats.jsonl",
    "--dataset_name DATA": "--dataset_name chats.jsonl",
    "max_steps=2000": "max_steps=1, use_cpu=True",
    "max_steps=1000": "max_steps=1, use_cpu=True",
    "mtp_loss_weight=0.5)": "mtp_loss_weight=0.5, max_steps=1, use_cpu=True)",
    "SFTConfig(\n": "SFTConfig(\n    use_cpu=True,\n",
    "max_new_tokens=128": "max_new_tokens=12",
    "GRPOConfig(output_dir": "GRPOConfig(max_steps=1, use_cpu=True, max_completion_length=4, output_dir",
}


def snippets(file: str, kind: str) -> list[str]:
    """Blocks of a kind in a file, for this machine."""
    found = re.findall(rf"```{kind}\n(.*?)```", (ROOT / file).read_text(), re.S)
    for name, here in STANDS_FOR.items():
        found = [block.replace(name, here) for block in found]
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MODEL, a model with a chat template, and chats.jsonl, where commands run."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w9 ' if m.role == 'user' else 'w10 ' }}{{ m.content }}{{ ' w1 ' }}{% endfor %}"
        "{{ 'w10 ' if add_generation_prompt else '' }}"
    )
    tokenizer.save_pretrained("MODEL")
    tiny_model().save_pretrained("MODEL")
    generator = torch.Generator().manual_seed(0)
    with Path("chats.jsonl").open("w") as file:
        for _ in range(16):
            said = [" ".join(f"w{i}" for i in torch.randint(11, VOCAB, (8,), generator=generator)) for _ in range(2)]
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said)]
            file.write(json.dumps({"messages": turns}) + "\n")
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", [file for file in FILES if snippets(file, "python")])
def test_python_in_the_documents_runs(file, folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained("MODEL"), tiny_tokenizer().from_pretrained("MODEL")
    names: dict[str, Any] = {"path": "MODEL", "folder": "out", "AutoModelForCausalLM": AutoModelForCausalLM}
    names |= {"model": model, "tokenizer": tokenizer, "inputs": {"input_ids": torch.arange(11, 20)[None]}}
    names["rows"] = load_dataset("json", data_files="chats.jsonl", split="train")
    for block in snippets(file, "python"):
        if "GRPOTrainer" in block:
            get_mtp_model(model, {"method": "sequential", "depth": 1}).save_pretrained("MODULE")
            names |= {"policy": model, "reward": lambda completions, **_: [float(len(text)) for text in completions]}
            names["rows"] = Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(11, 19)])
        if "MTPTrain" in block:  # what was imported further up on the page
            exec("from foretell import MTPTrainer, MTPTrainingArguments, get_mtp_model", names)
        elif "trainer." not in block and "mtp" not in names:
            names["mtp"] = get_mtp_model(model, MaskedConfig(depth=7))
        elif "calibrated_tree" in block:
            names["mtp"] = get_mtp_model(model, HeadsConfig(depth=3))
            names["rows"] = [{"input_ids": list(range(11, 40))}]
        exec(block, names)


# what a verb is told beside its line, here only
QUICK = {
    "sft": ["--use_cpu"],
    "verify": ["--samples", "100"],
    "evaluate": ["--repeats", "1"],
    "regenerate": ["--max-new-tokens", "8"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", ["README.md", "docs/data.md", "docs/sft.md"])
def test_commands_in_the_documents_run(file, folder, capsys):
    ran = 0
    for block in snippets(file, "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.partition("$ ")[2], comments=True)
            if words[:1] == ["foretell"]:
                assert main([*words[1:], *QUICK.get(words[1], [])]) == 0, line
                ran += 1
                said = capsys.readouterr().out
                assert said.strip(), f"nothing was printed by {line}"
    assert ran == {"README.md": 8, "docs/data.md": 4, "docs/sft.md": 1}[file]


def test_a_snippet_that_does_not_run_is_seen(folder):
    with pytest.raises(NameError):
        exec(snippets("docs/decoding.md", "python")[0], {"inputs": {}})
