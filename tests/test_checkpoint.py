"""What is saved loads bit for bit, or says by name why not; what cannot be written leaves what was there before."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import foretell.checkpoint
from foretell.config import ConfigError
from foretell.methods.base import MTPConfig
from foretell.models.target import UnsupportedModelError
from foretell.mtp import MTPModel, get_mtp_model
from foretell.training.trainer import MTPTrainer, MTPTrainingArguments
from tests.test_prompts import make_tokenizer
from tests.tiny import ARCHITECTURES, VOCAB, tiny_config, tiny_model

CONFIG, WEIGHTS = "mtp_config.json", "mtp_model.safetensors"


def make(architecture: str = "llama", model: dict | None = None, **changes: Any) -> MTPModel:
    config = {"method": "sequential", "depth": 2, "initialisation": "random", **changes}
    return get_mtp_model(tiny_model(architecture, **(model or {})), config)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a module for tiny_model()."""
    folder = tmp_path / "saved"
    make().save_pretrained(folder)
    return folder


def bits(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a saved module."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


# -- round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_module_comes_back_bit_for_bit(architecture, tmp_path):
    mtp = make(architecture)
    mtp.notes = {"rows": 3}
    mtp.save_pretrained(tmp_path / "new" / "folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = MTPModel.from_pretrained(mtp.model, tmp_path / "new" / "folder")
    wanted = mtp.module.state_dict()
    assert loaded.module.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.module.state_dict().items())
    assert (loaded.mtp_config, loaded.notes) == (mtp.mtp_config, {"rows": 3})
    ids = torch.randint(2, VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.draft_logits(ids), mtp.draft_logits(ids))
    torch.manual_seed(9)
    other = get_mtp_model(mtp.model, mtp.mtp_config)  # the same settings without the weights draft something else
    assert not torch.allclose(other.draft_logits(ids), mtp.draft_logits(ids))


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 3, "shared_module": True},
        {"hidden_source": "pre_norm", "fusion_order": "hidden_embedding", "chain_raw": True},
        {"block": "eagle3", "shared_module": True, "hidden_layers": [0, 1]},
        {"block": "eagle3", "shared_module": True, "hidden_layers": [0, 1], "fc_norm": False},
        {"draft_vocab_size": 31},
    ],
)
def test_every_setting_comes_back(changes, tmp_path):
    mtp = make(**changes)
    if "draft_vocab_size" in changes:
        mtp.module.set_draft_vocabulary(torch.randperm(VOCAB)[:31].sort().values)
    mtp.save_pretrained(tmp_path / "saved")
    loaded = MTPModel.from_pretrained(mtp.model, tmp_path / "saved")
    assert loaded.mtp_config == mtp.mtp_config
    ids = torch.randint(2, VOCAB, (1, 9))
    assert torch.equal(loaded.draft_logits(ids), mtp.draft_logits(ids))


def test_what_the_folder_says_of_itself(saved):
    about = json.loads((saved / CONFIG).read_text())
    mtp = make()
    assert set(bits(saved)) == {CONFIG, WEIGHTS}  # the target is not copied
    assert about["parameters"] == sum(p.numel() for p in mtp.module.parameters()) and about["dtype"] == "float32"
    assert about["target"]["architecture"] == "LlamaForCausalLM" and about["target"]["vocab_size"] == VOCAB
    assert about["config"]["method"] == "sequential" and about["config"]["depth"] == 2
    assert {"foretell", "torch", "transformers"} <= set(
        json.dumps(about["provenance"]).replace('"', " ").replace(":", " ").split()
    )


# -- another target ----------------------------------------------------------------------------------------------------


def test_another_target_is_refused_by_what_differs(saved):
    for model, words in (
        (
            tiny_model("qwen2"),
            "architecture: module was trained for 'LlamaForCausalLM', this model has 'Qwen2ForCausalLM'",
        ),
        (tiny_model(hidden_size=16), "hidden_size: module was trained for 32, this model has 16"),
        (tiny_model(vocab_size=50), "vocab_size: module was trained for 97, this model has 50"),
        (tiny_model(num_hidden_layers=3), "num_hidden_layers: module was trained for 2, this model has 3"),
    ):
        with pytest.raises(ValueError, match="does not fit this model") as error:
            MTPModel.from_pretrained(model, saved)
        assert words in str(error.value) and str(saved) in str(error.value)
    with pytest.raises(ValueError, match="does not fit this model") as error:  # all differences at once
        MTPModel.from_pretrained(tiny_model("qwen3", hidden_size=16, vocab_size=50), saved)
    assert all(word in str(error.value) for word in ("architecture", "hidden_size", "vocab_size"))


def test_other_weights_are_a_warning(saved):
    other = tiny_model(seed=1)
    with pytest.warns(UserWarning, match="trained for other weights of this architecture") as caught:
        loaded = MTPModel.from_pretrained(other, saved)
    assert caught[0].filename == __file__  # it points at the caller
    ids = torch.randint(2, VOCAB, (1, 7))
    wanted = other.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=8, do_sample=False), wanted)
    # one changed number of the last layer is enough, and the head counts too
    for name in ("model.layers.1.self_attn.q_proj.weight", "lm_head.weight"):
        model = tiny_model()
        with torch.no_grad():
            model.get_parameter(name)[0, 0] += 0.5
        with pytest.warns(UserWarning, match="other weights"):
            MTPModel.from_pretrained(model, saved)


# -- damaged folders ---------------------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_named(saved):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["blocks.1.enorm.weight"]
        tensors["blocks.2.extra"] = torch.zeros(3)
        tensors["blocks.0.eh_proj.weight"] = torch.zeros(32, 63)

    rewrite(saved, change)
    with pytest.raises(ValueError, match="does not fit the module its config describes") as error:
        MTPModel.from_pretrained(tiny_model(), saved)
    for words in (
        "missing blocks.1.enorm.weight",
        "unknown blocks.2.extra",
        "blocks.0.eh_proj.weight has shape (32, 63), wanted (32, 64)",
        str(saved / WEIGHTS),
    ):
        assert words in str(error.value)


def test_many_missing_tensors_are_counted(saved):
    rewrite(saved, lambda tensors: [tensors.pop(name) for name in list(tensors)[1:]])
    with pytest.raises(ValueError, match=r"missing .*; and \d+ more"):
        MTPModel.from_pretrained(tiny_model(), saved)


@pytest.mark.parametrize("kept", [0, 6, 1000, -100])
def test_a_truncated_weights_file(saved, kept):
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=r"mtp_model\.safetensors: truncated or damaged .* copy the folder again"):
        MTPModel.from_pretrained(tiny_model(), saved)


def test_missing_files_and_folders(saved, tmp_path):
    (saved / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"mtp_model\.safetensors: not there; the folder is incomplete"):
        MTPModel.from_pretrained(tiny_model(), saved)
    (saved / CONFIG).rename(saved / "other.json")
    with pytest.raises(FileNotFoundError, match=r"mtp_config\.json: not there \(found: \['other\.json'\]\)"):
        MTPModel.from_pretrained(tiny_model(), saved)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        MTPModel.from_pretrained(tiny_model(), tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"format": 1}', '{"format": 1, "config": {}, "target": {}}', "\x00\xff", "utf-16"],
)
def test_a_damaged_config_file(saved, text):
    data = json.dumps({"format": 1}).encode("utf-16") if text == "utf-16" else text.encode("latin-1")
    (saved / CONFIG).write_bytes(data)
    with pytest.raises(ValueError, match=r"mtp_config\.json: damaged .* copy the folder again"):
        MTPModel.from_pretrained(tiny_model(), saved)


def test_a_config_from_elsewhere(saved):
    about = json.loads((saved / CONFIG).read_text())

    def refused(words: str, **changes: Any) -> None:
        (saved / CONFIG).write_text(json.dumps({**about, **changes}))
        with pytest.raises(ValueError, match=re.escape(words)):
            MTPModel.from_pretrained(tiny_model(), saved)

    refused("format 2, this foretell reads 1", format=2)
    refused("method: got 'medusa2', wanted one of", config={**about["config"], "method": "medusa2"})
    refused("depht: unknown name, did you mean depth?", config={**about["config"], "depht": 3})
    refused("depth: got 'two' (str), wanted a whole number", config={**about["config"], "depth": "two"})
    refused("missing blocks.2.enorm.weight", config={**about["config"], "depth": 3})
    refused("unknown blocks.1.block.input_layernorm.weight", config={**about["config"], "depth": 1})


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_folder_whole(saved, monkeypatch):
    before = bits(saved)
    mtp = make(depth=3)

    def full(tensors: Any, path: Any, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(foretell.checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        mtp.save_pretrained(saved)
    assert bits(saved) == before and [path.name for path in saved.parent.iterdir()] == [saved.name]
    MTPModel.from_pretrained(tiny_model(), saved)
    # the second file is refused by the disk: the first must not have taken its place already
    monkeypatch.undo()
    write = Path.write_text

    def full_later(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.name == CONFIG:
            raise OSError(28, "No space left on device")
        return write(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full_later)
    with pytest.raises(OSError, match="No space left on device"):
        mtp.save_pretrained(saved)
    monkeypatch.undo()
    assert bits(saved) == before and [path.name for path in saved.parent.iterdir()] == [saved.name]
    mtp.save_pretrained(saved)
    assert MTPModel.from_pretrained(tiny_model(), saved).mtp_config.depth == 3


def test_a_full_disk_in_training_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    from foretell.training.mtp_training import last_complete_checkpoint

    save = foretell.checkpoint.save_file

    def full_at_two(tensors: Any, path: Path, **kwargs: Any) -> None:
        if "checkpoint-2" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path, **kwargs)

    monkeypatch.setattr(foretell.checkpoint, "save_file", full_at_two)
    trainer = trainer_of(
        [{"input_ids": list(range(2, 12))}] * 4, tmp_path, save_strategy="steps", save_steps=1, max_steps=3
    )
    with pytest.raises(OSError, match="No space left on device"):
        trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty checkpoint-2 may be passed over
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    MTPModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-1")


def test_saving_over_a_file_and_beside_others(saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="got a file, wanted a folder"):
        make().save_pretrained(tmp_path / "file")
    (saved / "README.md").write_text("mine")
    make(depth=1).save_pretrained(saved)
    assert (saved / "README.md").read_text() == "mine"
    assert MTPModel.from_pretrained(tiny_model(), saved).mtp_config.depth == 1


# -- settings ----------------------------------------------------------------------------------------------------------


def test_all_problems_of_the_settings_come_in_one_error():
    with pytest.raises(ConfigError) as error:
        MTPConfig.from_any({"method": "sequential", "depth": 0, "draft_vocab_size": 1})
    assert len(error.value.problems) == 2
    for words in ("depth: got 0, wanted an integer of at least 1", "draft_vocab_size: got 1, wanted at least 2"):
        assert words in str(error.value)
    with pytest.raises(ConfigError) as error:
        MTPConfig.from_any({"method": "sequential", "depht": 2, "fusion_order": "both", "chain_raw": "maybe"})
    assert len(error.value.problems) == 3
    for words in ("depht: unknown name, did you mean depth?", "fusion_order: got 'both'", "chain_raw: got 'maybe'"):
        assert words in str(error.value)
    for depth in (-1, 1.5, None, True):
        with pytest.raises(ConfigError, match="depth: got"):
            MTPConfig.from_any({"method": "sequential", "depth": depth})
    with pytest.raises(ConfigError, match="method: got None, wanted one of sequential"):
        MTPConfig.from_any({"depth": 2})
    with pytest.raises(ConfigError, match="wanted a YAML file or one of"):
        MTPConfig.from_any("no-such-preset")


def test_models_that_cannot_work_are_refused_by_name():
    from transformers import AutoModelForCausalLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    mamba = AutoModelForCausalLM.from_config(tiny_config("mamba", **sizes))
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM \(mamba\) has layers of kind linear_attention"):
        get_mtp_model(mamba, {"method": "sequential"})
    with pytest.raises(UnsupportedModelError, match="got Linear, wanted a decoder-only causal LM"):
        get_mtp_model(torch.nn.Linear(2, 2), {"method": "sequential"})


# -- data --------------------------------------------------------------------------------------------------------------


def trainer_of(data: Any, folder: Path, tokenizer: Any = None, depth: int = 2, **arguments: Any) -> MTPTrainer:
    args = MTPTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], **{"max_steps": 1, "save_strategy": "no", **arguments}
    )
    return MTPTrainer(make(depth=depth), args, data, processing_class=tokenizer)


def refused(words: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
        trainer_of(*args, **kwargs)


def test_bad_data_is_named_by_file_and_line(tmp_path):
    tokenizer, path = make_tokenizer(), tmp_path / "rows.jsonl"

    def file(*lines: str) -> str:
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    good = '{"text": "one two three four five"}'
    refused("rows.jsonl: the file is empty", file(""), tmp_path, tokenizer)
    refused(
        "rows.jsonl, line 2: got '{\"text\":', wanted one JSON object", file(good, '{"text": '), tmp_path, tokenizer
    )
    refused("rows.jsonl, line 3: text: got an empty string", file(good, good, '{"text": " "}'), tmp_path, tokenizer)
    refused(
        "rows.jsonl, line 1: unknown form: got the columns ['txt']", file('{"txt": "one"}', good), tmp_path, tokenizer
    )
    refused("rows.jsonl, line 2: messages[0]: got the role", file(good, '{"messages": [{}]}'), tmp_path, tokenizer)
    with pytest.raises(ValueError, match="(?s)line 1: .*line 3: ") as error:  # several at once
        trainer_of(file("nonsense", good, "[]"), tmp_path, tokenizer)
    assert "line 2" not in str(error.value)
    refused("nowhere.jsonl: no such file", str(tmp_path / "nowhere.jsonl"), tmp_path, tokenizer)
    refused("rows: no rows, wanted at least one", [], tmp_path)
    ids = [2, 3, 4, 5, 6]
    wrong = [{"input_ids": ids}, {"input_ids": ids, "labels": [2, 3, 5, 5, 6]}]
    refused("rows[1]: labels[2]: got 5, wanted input_ids[2] = 4 or -100; labels are token-aligned", wrong, tmp_path)


def test_a_shifted_label_column_is_refused(tmp_path):
    ids = list(range(10, 20))
    refused("not shifted", [{"input_ids": ids, "labels": [*ids[1:], -100]}], tmp_path)


def test_data_that_does_not_fit_the_model_or_the_depth(tmp_path):
    tokenizer = make_tokenizer()
    refused("train_dataset: text needs processing_class", [{"text": "one two"}], tmp_path)
    tokenizer.add_tokens([f"new{n}" for n in range(60)])
    refused("wanted ids below the target's vocabulary of 97", [{"text": "one two new59"}], tmp_path, tokenizer)
    refused("rows[0]: got token id 97, wanted ids below", [{"input_ids": [2, 3, 97, 4, 5]}], tmp_path)
    refused(
        "the longest of 2 usable rows has 4 tokens, but depth 3 needs at least 5",
        [{"input_ids": [2, 3, 4, 5]}] * 2,
        tmp_path,
        depth=3,
    )
    refused("no row left to train on", [{"input_ids": [2, 3, 4], "labels": [-100] * 3}], tmp_path)
    with pytest.warns(UserWarning, match=r"1 of 2 rows were cut at max_length=6"):
        trainer = trainer_of([{"input_ids": list(range(2, 12))}, {"input_ids": [2, 3, 4, 5]}], tmp_path, max_length=6)
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) == 6
    # max_length cuts, and not the model's own 512: rotary positions go on, as transformers reads them
    assert len(trainer_of([{"input_ids": [5] * 600}], tmp_path).train_dataset[0]["input_ids"]) == 600


def test_a_prompt_shorter_than_the_depth_is_named():
    mtp = make(depth=3)
    ids = torch.tensor([[2, 3, 4, 5]])
    with pytest.raises(ValueError, match=r"depth must be in \[1, T-2\] = \[1, 2\] for rows of T=4 tokens, got 3"):
        mtp(input_ids=ids)
    assert mtp.draft_logits(ids).shape == (1, 4, 3, VOCAB)
