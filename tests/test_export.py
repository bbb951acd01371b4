"""Exports: what is written reads back as the module, by the reader's own code; wrong files and misfits are told."""

# T positions, K depths, D hidden width.

import copy
import dataclasses
import json
from pathlib import Path

import gguf
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_native import checkpoint, load
from tiny import VOCAB, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from foretell import HeadsConfig, MaskedConfig, MTPModel, SequentialConfig, get_mtp_model
from foretell.cli import main
from foretell.export import FORMATS, Job, export_module, load_for_export
from foretell.export.gguf import read_gguf, turned, write_gguf
from foretell.export.parity import Reader, own_logits, replay

K, ONE, DRAFTED = 3, {"depth": 3, "shared_module": True}, 20


def shaken(mtp: MTPModel, seed: int = 0) -> MTPModel:
    """Norms far from one, attention and everything else that matters."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in mtp.module.named_parameters():
            noise = torch.randn(weight.shape, generator=drawn)
            weight.copy_(1 + 0.5 * noise if "norm" in name else 0.4 * noise)
        if mtp.module.draft_vocab_ids is not None:
            drafted_M = torch.randperm(VOCAB, generator=drawn)[: mtp.mtp_config.draft_vocab_size]
            mtp.module.set_draft_vocabulary(drafted_M.sort()[0])
    return mtp


def target(name: str = "llama", **changes: object) -> torch.nn.Module:
    model = tiny_model(name, **changes)
    with torch.no_grad():  # with a norm of ones, states before and after it would look the same to the next norm
        model.model.norm.weight.uniform_(0.3, 1.7, generator=torch.Generator().manual_seed(1))
    return model


def sequential(name: str = "llama", changes: dict | None = None, **settings: object) -> MTPModel:
    return shaken(get_mtp_model(target(name, **changes or {}), SequentialConfig(**{**ONE, **settings})))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
EAGLE3 = {"block": "eagle3", "fusion_order": "embedding_hidden"}
CASES = {
    "mimo llama": ("mimo", lambda: sequential()),
    "mimo halves": ("mimo", lambda: sequential("llama", {}, fusion_order="hidden_embedding")),
    "mimo qwen2": ("mimo", lambda: sequential("qwen2")),
    "mimo mistral": ("mimo", lambda: sequential("mistral", {"sliding_window": None})),
    "mimo llama3": ("mimo", lambda: sequential("llama", {"rope_parameters": LLAMA3})),
    "mimo reduced": ("mimo", lambda: sequential("llama", {}, draft_vocab_size=DRAFTED)),
    "mimo one": ("mimo", lambda: sequential("llama", {}, depth=1, shared_module=False)),
    "eagle3 last": ("eagle3", lambda: sequential("llama", {}, **EAGLE3)),
    "eagle3 layers": (
        "eagle3",
        lambda: sequential("llama", {}, **EAGLE3, hidden_layers=[0, 1], draft_vocab_size=DRAFTED),
    ),
    "eagle3 published": ("eagle3", lambda: published()),
    "eagle3 published mistral": ("eagle3", lambda: published("mistral", sliding_window=None, head_dim=16)),
    "eagle3 all": ("eagle3", lambda: sequential("llama", {}, **EAGLE3, draft_vocab_size=VOCAB)),
    "eagle3 before the norm": ("eagle3", lambda: sequential("qwen2", {}, **EAGLE3, hidden_source="pre_norm")),
    "eagle3 qwen3": ("eagle3", lambda: sequential("qwen3", {}, **EAGLE3, draft_vocab_size=DRAFTED)),
    "medusa": ("medusa", lambda: heads(share_unembedding=False, num_layers=2)),
    "medusa shared": ("medusa", lambda: heads(share_unembedding=True)),
    "medusa reduced": ("medusa", lambda: heads(share_unembedding=True, draft_vocab_size=DRAFTED)),
    "medusa all": ("medusa", lambda: heads(share_unembedding=False, num_layers=2, draft_vocab_size=VOCAB)),
    "peft": ("peft", lambda: uno()),
    "hub": ("hub", lambda: heads(draft_vocab_size=DRAFTED)),
}


def published(name: str = "llama", hidden_layers: tuple = (0, 1, 3), **changes: object) -> MTPModel:
    """A head as EAGLE-3 has it, reading three of four layers."""
    how = {**EAGLE3, "fc_norm": False, "hidden_layers": list(hidden_layers), "draft_vocab_size": DRAFTED}
    return sequential(name, {"num_hidden_layers": 4, **changes}, **how)


def heads(**settings: object) -> MTPModel:
    return shaken(
        get_mtp_model(target(), HeadsConfig(**{"depth": K, "head_type": "medusa", "dropout": 0.0, **settings}))
    )


def uno(**settings: object) -> MTPModel:
    asked = {"depth": 2, "mask_tokens": "noise", "sampler": False, "lora_rank": 4, **settings}
    return shaken(get_mtp_model(target(), MaskedConfig(**asked)))


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_reads_back_as_the_module(tmp_path, case, dtype):
    to, make = CASES[case]
    said = export_module(make(), to, tmp_path / "out", check=True, dtype=dtype, licence="mit")
    assert any(line.startswith("checked: ") for line in said)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".gguf"}
    for path in files:
        if path.suffix == ".safetensors":
            kinds = {t.dtype for t in load_file(path).values() if t.is_floating_point()}
            assert kinds == {torch.bfloat16 if dtype else torch.float32}


# -- the names, written out independently of the code ------------------------------------------------------------------

LAYER = {f"{part}_proj.weight" for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o")}
LAYER |= {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")} | {"post_attention_layernorm.weight"}
MIMO = LAYER | {"input_layernorm.weight", "token_layernorm.weight", "hidden_layernorm.weight"}
MIMO |= {"final_layernorm.weight", "input_proj.weight"} | {f"self_attn.{part}_proj.bias" for part in "qkv"}
MIDLAYER = {f"midlayer.{name}" for name in LAYER | {"input_layernorm.weight", "hidden_norm.weight"}}
NAMES = {
    "mimo llama": {f"model.mtp_layers.0.{name}" for name in MIMO},
    "eagle3 last": MIDLAYER | {"fc.weight", "fc_norm.0.weight", "norm.weight", "lm_head.weight"},
    "eagle3 all": MIDLAYER | {"fc.weight", "fc_norm.0.weight", "norm.weight", "lm_head.weight"},
    "eagle3 layers": MIDLAYER
    | {"fc.weight", "fc_norm.0.weight", "fc_norm.1.weight", "norm.weight", "lm_head.weight", "d2t"},
    "eagle3 published": MIDLAYER | {"fc.weight", "norm.weight", "lm_head.weight", "d2t"},
    "medusa": {f"{h}.{i}.linear.{kind}" for h in range(K) for i in range(2) for kind in ("weight", "bias")}
    | {f"{h}.2.weight" for h in range(K)},
}


@pytest.mark.parametrize("case", NAMES)
def test_names_and_settings_are_the_engines(tmp_path, case):
    to, make = CASES[case]
    mtp = make()
    said = export_module(mtp, to, tmp_path / "out", model="some/model")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors, config = load_file(file), json.loads((tmp_path / "out" / "config.json").read_text())
    assert tensors.keys() == NAMES[case]
    assert f"vllm serve some/model {'--hf-overrides' if to == 'mimo' else '--speculative-config'}" in said[1]
    assert str(tmp_path / "out") in said[1] and f'"num_speculative_tokens": {K}' in said[1]
    if to == "mimo":
        assert config["architectures"] == ["MiMoForCausalLM"] and config["model_type"] == "qwen2"
        assert config["num_nextn_predict_layers"] == 1 and config["num_hidden_layers"] == 2
        assert """--hf-overrides '{"num_nextn_predict_layers": 1}'""" in said[1]
        assert not any(tensors[f"model.mtp_layers.0.self_attn.{part}_proj.bias"].any() for part in "qkv")
        own = mtp.module.blocks[0].eh_proj.weight  # [embedding | hidden] here, [hidden | embedding] there
        assert torch.equal(tensors["model.mtp_layers.0.input_proj.weight"], torch.cat([own[:, 32:], own[:, :32]], 1))
    if to == "eagle3":
        ids = mtp.mtp_config.hidden_layers or [2]  # numbers of layers run: the last state of a model of two layers
        assert config["eagle_aux_hidden_state_layer_ids"] == ids and config["num_aux_hidden_states"] == len(ids)
        plain = case == "eagle3 published"
        assert config["fc_norm"] is not plain and config["norm_before_fc"] is False
        theirs = [-1, 0, 2] if plain else ids  # SGLang counts a layer from its output, and reads this alone
        assert config["eagle_config"] == {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": theirs}
        assert any("--speculative-algorithm EAGLE3 " in line for line in said) is plain
        assert any(line.startswith("llama-server -m TARGET.gguf --spec-type draft-eagle3") for line in said) is plain
        assert (tmp_path / "out" / "model.gguf").exists() is plain
        assert config["speculators_config"]["verifier"]["name_or_path"] == "some/model"
        assert config["norm_before_residual"] is False and config["transformer_layer_config"]["model_type"] == "llama"
        if "d2t" in tensors:  # offsets
            assert torch.equal(tensors["d2t"] + torch.arange(DRAFTED), mtp.module.draft_vocab_ids)
            assert config["draft_vocab_size"] == DRAFTED


# -- wrong files -------------------------------------------------------------------------------------------------------


def swapped(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return tensors | {name: torch.cat(tensors[name].chunk(2, dim=1)[::-1], dim=1).contiguous()}


@pytest.fixture
def _one_text(monkeypatch):
    monkeypatch.setattr("foretell.export.parity.PROMPTS", 1)
    monkeypatch.setattr("foretell.export.parity.LONGEST", 16)


def wrong_files(case: str, tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor lost, every norm of ones, a matrix turned round: what engines load without a word."""
    out = {f"{name} left out": {n: t for n, t in tensors.items() if n != name} for name in tensors}
    out |= {f"{n} of ones": tensors | {n: torch.ones_like(t)} for n, t in tensors.items() if "norm" in n}
    out |= {f"{n} doubled": tensors | {n: 2 * t} for n, t in tensors.items() if t.is_floating_point() and t.any()}
    out |= {f"{n} negated": tensors | {n: -t} for n, t in tensors.items() if t.is_floating_point() and t.any()}
    out |= {"unknown": tensors | {"surprise.weight": torch.zeros(3)}}
    both = {"mimo llama": "model.mtp_layers.0.input_proj.weight", "eagle3 last": "midlayer.self_attn.q_proj.weight"}
    if case in both:
        out["halves swapped"] = swapped(tensors, both[case])
    if "d2t" in tensors:
        out["layers swapped"] = swapped(tensors, "fc.weight")
        out["d2t absolute"] = tensors | {"d2t": tensors["d2t"] + torch.arange(DRAFTED)}
    return out


@pytest.mark.usefixtures("_one_text")
@pytest.mark.parametrize("case", NAMES)
def test_wrong_files_are_caught(tmp_path, case):
    to, make = CASES[case]
    mtp = make()
    export_module(mtp, to, tmp_path / "out")
    form, job = FORMATS[to], Job(mtp=mtp, out=tmp_path, model="")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    assert form.check(job, tmp_path / "out")
    passed = []
    for wrong, changed in wrong_files(case, tensors).items():
        file.unlink()  # never written over: tensors may lie in its memory map
        save_file(changed, file)
        try:
            form.check(job, tmp_path / "out")
        except (ValueError, IndexError):
            continue
        passed.append(wrong)
    # scales that a norm behind them takes away again
    assert set(passed) <= {"fc.weight doubled"}


GGUF = {f"attn_{name}" for name in ("norm", "norm_2", "q", "k", "v", "output")} | {"ffn_norm"}
GGUF = {f"blk.0.{name}.weight" for name in GGUF | {"ffn_gate", "ffn_up", "ffn_down"}}
GGUF |= {"fc.weight", "output_norm.weight", "output.weight", "d2t"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_file_for_llama_cpp_says_what_its_reader_asks(tmp_path, dtype):
    """Names and keys of its source, written out; two rows that one angle turns stand side by side, ours half a head
    apart."""
    mtp = published(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    export_module(mtp, "eagle3", tmp_path / "out", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    wanted = {"block_count": 1, "target_layers": [0, 1, 3], "target_hidden_size": 32, "embedding_length": 32}
    wanted |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8, "vocab_size": VOCAB}
    wanted |= {"attention.value_length": 8, "rope.dimension_count": 8, "rope.freq_base": 5000.0, "context_length": 512}
    assert {name: keys[f"eagle3.{name}"] for name in wanted} == wanted and keys["general.architecture"] == "eagle3"
    assert keys["eagle3.attention.layer_norm_rms_epsilon"] == pytest.approx(mtp.model.config.rms_norm_eps)
    assert keys["tokenizer.ggml.model"] == "none"
    said = {one.name: one for one in reader.tensors}
    kinds, d2t = {name: one.tensor_type.name for name, one in said.items()}, said.pop("d2t")
    assert kinds.keys() == GGUF and kinds["d2t"] == "I64" and d2t.data.tolist() == mtp.module.draft_vocab_ids.tolist()
    tensors = {n: torch.tensor(gguf.quants.dequantize(one.data, one.tensor_type)) for n, one in said.items()}
    assert {kinds[name] for name in tensors if tensors[name].dim() == 2} == {"F32" if dtype == "fp32" else "BF16"}
    assert {kinds[name] for name in GGUF if name.endswith(("norm.weight", "norm_2.weight"))} == {"F32"}
    assert tensors["fc.weight"].shape == (32, 96)
    block = mtp.module.blocks[0].block
    for name, heads in (("q", 4), ("k", 2)):
        own = getattr(block.self_attn.inner, f"{name}_proj").weight
        own = own if dtype == "fp32" else own.bfloat16().float()
        for row in range(8 * heads):
            head, place = divmod(row, 8)
            ours = own[8 * head + place // 2 + 4 * (place % 2)]
            assert torch.equal(tensors[f"blk.0.attn_{name}.weight"][row], ours)
    assert torch.allclose(tensors["blk.0.ffn_down.weight"], block.mlp.down_proj.weight, atol=1e-2)


@pytest.mark.usefixtures("_one_text")
def test_wrong_files_for_llama_cpp_are_caught(tmp_path):
    mtp = published()
    export_module(mtp, "eagle3", tmp_path / "out")
    form, job, file = FORMATS["eagle3"], Job(mtp=mtp, out=tmp_path, model=""), tmp_path / "out" / "model.gguf"
    tensors, said = read_gguf(file, json.loads((file.parent / "config.json").read_text()))
    assert any(line.startswith("model.gguf: logits of depths") for line in form.check(job, file.parent))
    ids, q = "eagle_aux_hidden_state_layer_ids", "midlayer.self_attn.q_proj.weight"
    wrong = {f"{name} left out": ({n: t for n, t in tensors.items() if n != name}, said) for name in tensors}
    wrong |= {f"{n} negated": ({**tensors, n: -t}, said) for n, t in tensors.items() if n != "d2t"}
    wrong["q in transformers' order"] = ({**tensors, q: turned(q, tensors[q], said, False)}, said)
    wrong["layers swapped"] = (swapped(tensors, "fc.weight"), said)
    wrong["d2t of offsets"] = ({**tensors, "d2t": tensors["d2t"] - torch.arange(DRAFTED)}, said)
    for name, value in {"rope_theta": 100.0, "rms_norm_eps": 0.1}.items():
        wrong[name] = (tensors, {**said, name: value})
    wrong["layers"] = (tensors, {**said, ids: [0, 1, 2]})
    passed = []
    for name, how in wrong.items():
        write_gguf(file, *how)
        try:
            form.check(job, file.parent)
        except ValueError:
            continue
        passed.append(name)
    assert passed == []
    settings = json.loads((file.parent / "config.json").read_text())  # vLLM's file, of other layers
    (file.parent / "config.json").write_text(json.dumps({**settings, ids: [0, 1, 2]}))
    with pytest.raises(ValueError, match="depth 1 by"):
        form.check(job, file.parent)


OTHERS = {
    "norms": (lambda: sequential("llama", {}, **EAGLE3), ["not for SGLang and llama.cpp", "a norm of each state"]),
    "states": (lambda: published(hidden_layers=(1, 3)), ["not for SGLang and llama.cpp", "2 hidden_layers, not three"]),
    "biases": (lambda: published("qwen2"), ["not for SGLang and llama.cpp", "biases"]),
    "queries": (lambda: published("qwen3"), ["not for SGLang and llama.cpp", "norms of queries"]),
    "angles": (lambda: published(rope_parameters=LLAMA3), ["no model.gguf was written", "angles of type llama3"]),
    "layer": (lambda: published(hidden_act="gelu"), ["no model.gguf was written", "a layer with gelu"]),
}


@pytest.mark.usefixtures("_one_text")
@pytest.mark.parametrize("case", OTHERS)
def test_what_other_engines_cannot_read_is_said(tmp_path, case):
    make, wanted = OTHERS[case]
    *_, last = export_module(make(), "eagle3", tmp_path / "out")
    assert all(words in last for words in wanted)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}


def test_wrong_adapters_are_caught(tmp_path):
    mtp = uno()
    export_module(mtp, "peft", tmp_path / "out")
    form, job = FORMATS["peft"], Job(mtp=mtp, out=tmp_path, model="")
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in list(tensors)[:: len(tensors) // 3]:
        for changed in ({n: t for n, t in tensors.items() if n != name}, tensors | {name: -tensors[name]}):
            file.unlink()
            save_file(changed, file)
            with pytest.raises(ValueError, match="PEFT's logits differ"):
                form.check(job, tmp_path / "out")


@pytest.mark.parametrize("to", ["mimo", "eagle3"])
def test_states_of_the_wrong_side_of_the_norm_are_caught(tmp_path, to):
    """A module for states before the norm, written as one for states after it."""
    mtp = sequential("llama", {}, **(EAGLE3 if to == "eagle3" else {}), hidden_source="pre_norm")
    other = copy.copy(mtp)
    other.mtp_config = dataclasses.replace(mtp.mtp_config, hidden_source="post_norm")
    form, job = FORMATS[to], Job(mtp=other, out=tmp_path, model="")
    form.write(job, tmp_path)
    with pytest.raises(ValueError, match=r"differ from the module's.* depth 1 by"):
        form.check(job, tmp_path)


def test_a_failed_check_leaves_nothing(tmp_path, monkeypatch):
    mtp = sequential()
    right = Reader.said
    monkeypatch.setattr(Reader, "said", lambda *args: 1.01 * right(*args))
    with pytest.raises(ValueError, match="depth 1 by"):
        export_module(mtp, "mimo", tmp_path / "out", check=True)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_replay_counts_what_an_engine_accepts():
    """Against a plain loop that drafts each round anew from the text's tokens."""
    mtp = sequential("llama", {}, depth=2)
    prompt = torch.randint(2, VOCAB, (1, 6), generator=torch.Generator().manual_seed(0))
    text = mtp.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
    said = own_logits(mtp.module, mtp.target, text, zero_first=True)
    drafts = said.argmax(-1)
    known = text[0].tolist()
    # so that something is accepted: every third round right at depth 1, every sixth at both
    for t in range(0, len(known) - 3, 3):
        drafts[t, 0] = known[t + 2]
        drafts[t, 1] = known[t + 3] if t % 6 == 0 else -1
    wanted, at, end = [0, 0, 0], 7, 42
    while at < end:
        wanted[0] += 1
        accepted = 0
        for k in range(2):
            if int(drafts[at - 2, k]) != known[at + k]:
                break
            wanted[k + 1] += 1
            accepted += 1
        at += accepted + 1
    assert replay(drafts, known, 6, end) == wanted
    assert 0 < wanted[2] < wanted[1] < wanted[0]
    assert replay(drafts.roll(1, dims=0), known, 6, end) != wanted
    assert replay(drafts, known, 6, 8)[0] == 1, "a round that reaches beyond the end counts whole"


# -- what has no place -------------------------------------------------------------------------------------------------

REFUSED = {
    "two blocks": ("mimo", lambda: sequential("llama", {}, shared_module=False), ["shared_module: got 3 blocks"]),
    "several": (
        "mimo",
        lambda: sequential("llama", {}, hidden_source="pre_norm", chain_raw=True, markov_rank=2),
        ["hidden_source: got 'pre_norm'", "chain_raw: got True", "markov_rank"],
    ),
    "layers": ("mimo", lambda: sequential("llama", {}, hidden_layers=[0, 1]), ["hidden_layers: got [0, 1]"]),
    "norms of queries": ("mimo", lambda: sequential("qwen3"), ["unknown model.mtp_layers.0.self_attn.q_norm.weight"]),
    "bias": (
        "mimo",
        lambda: sequential("llama", {"attention_bias": True}),
        ["unknown model.mtp_layers.0.self_attn.o_proj.bias"],
    ),
    "window": (
        "mimo",
        lambda: sequential("mistral", {"sliding_window": 100}),
        ["sliding_window: the module's layer sees 100 rows"],
    ),
    "fused": (
        "mimo",
        lambda: sequential("phi3"),
        ["missing model.mtp_layers.0.self_attn.q_proj.weight", "unknown model.mtp_layers.0.mlp.gate_up_proj"],
    ),
    "head width": (
        "mimo",
        lambda: sequential("llama", {"head_dim": 16}),
        ["q_proj.weight has shape (64, 32), wanted (32, 32)"],
    ),
    "factors": (
        "mimo",
        lambda: sequential("granite", {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 3.0}),
        ["granite's layers, embedding or logits are more than it can say", "depth 1 by"],
    ),
    "gemma": ("eagle3", lambda: sequential("gemma2"), ["block: got 'mtp'", "target: got 'gemma2'"]),
    "embedding": ("mimo", lambda: sequential("gemma2"), ["gemma2's layers, embedding or logits are more"]),
    "block": ("eagle3", sequential, ["block: got 'mtp', wanted 'eagle3'", "What has: mimo, hub"]),
    "method": ("eagle3", lambda: heads(), ["method: got 'heads', wanted 'sequential'", "What has: medusa, hub"]),
    "own rows": ("medusa", lambda: heads(share_unembedding=False, draft_vocab_size=DRAFTED), ["draft_vocab_size"]),
    "head type": ("medusa", lambda: heads(head_type="linear"), ["head_type: got 'linear'", "What has: hub"]),
    "sampler": ("peft", lambda: uno(sampler=True), ["sampler: got True", "train the preset uno"]),
    "no family": ("native", sequential, ["target: got 'llama'", "deepseek_v3"]),
    "licence": ("hub", sequential, ["license: the model's own card names none"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_told_at_once_and_nothing_is_written(tmp_path, case):
    to, make, wanted = REFUSED[case]
    with pytest.raises(ValueError, match="has no place") as caught:
        export_module(make(), to, tmp_path / "out")
    for words in wanted:
        assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_model_that_trains_is_read_without_its_noise(tmp_path):
    mtp = sequential("llama", {"attention_dropout": 0.5}).train()
    assert export_module(mtp, "mimo", tmp_path / "out", check=True) and mtp.model.training and mtp.module.training


def test_a_target_with_adapters_is_not_the_one_that_is_served(tmp_path):
    model = peft.get_peft_model(target(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    mtp = get_mtp_model(model, SequentialConfig(**ONE))
    with pytest.raises(ValueError, match="has adapters, which the served one has not"):
        export_module(mtp, "mimo", tmp_path / "out")


def test_bad_requests(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    mtp = sequential()
    with pytest.raises(ValueError, match="to: got 'mimi'") as caught:
        export_module(mtp, "mimi", tmp_path / "full", dtype="fp16")
    for words in ("did you mean mimo?", "dtype: got 'fp16'", "not empty"):
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="wanted a new folder"):
        export_module(mtp, "mimo", tmp_path / "file")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert export_module(mtp, "mimo", tmp_path / "empty")
    narrow = get_mtp_model(tiny_model().bfloat16(), SequentialConfig(**ONE))
    with pytest.raises(ValueError, match="check: got a target in torch.bfloat16"):
        export_module(narrow, "mimo", tmp_path / "narrow", check=True)
    assert export_module(narrow, "mimo", tmp_path / "narrow", dtype="bf16")


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
def _ignored_layers(monkeypatch):
    """See test_native."""
    from transformers import DeepseekV3ForCausalLM, Glm4MoeForCausalLM

    for cls in (DeepseekV3ForCausalLM, Glm4MoeForCausalLM):
        monkeypatch.setattr(cls, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[23]\..*"])


@pytest.mark.usefixtures("_ignored_layers")
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "qwen2"])
def test_a_checkpoint_goes_round_to_the_bit(tmp_path, name, sharded):
    old = checkpoint(tmp_path / "base", name, sharded=sharded)
    model = load(tmp_path / "base")
    mtp = MTPModel.from_native(model, tmp_path / "base")
    said = export_module(mtp, "native", tmp_path / "same", model=tmp_path / "base", check=True)
    assert any("transformers" in line for line in said)
    every = [
        {n: t for file in (tmp_path / folder).glob("*.safetensors") for n, t in load_file(file).items()}
        for folder in ("base", "same")
    ]
    assert every[0].keys() == every[1].keys()
    assert all(torch.equal(every[1][name], tensor) for name, tensor in every[0].items())
    # another module, of other halves and one block, in place of the two
    settings = dataclasses.replace(mtp.mtp_config, depth=1, fusion_order="hidden_embedding")
    if name == "qwen2":
        settings = dataclasses.replace(settings, fusion_order="embedding_hidden")
    other = shaken(MTPModel(model, settings), 3)
    export_module(other, "native", tmp_path / "other", model=tmp_path / "same", check=True)
    again = MTPModel.from_native(load(tmp_path / "other"), tmp_path / "other")
    assert again.mtp_config.depth == 1 and again.mtp_config.fusion_order != settings.fusion_order
    ids = torch.randint(2, VOCAB, (1, 12))
    torch.testing.assert_close(again.draft_logits(ids), other.draft_logits(ids), rtol=0, atol=1e-4)
    index = json.loads((tmp_path / "other" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {path.name for path in (tmp_path / "other").glob("*.safetensors")}
    assert not any("layers.3." in name or "mtp_layers.1." in name for name in index if name in old)
    assert json.loads((tmp_path / "other" / "config.json").read_text())["num_nextn_predict_layers"] == 1


@pytest.mark.usefixtures("_ignored_layers")
def test_quantised_checkpoints_list_what_is_not(tmp_path):
    checkpoint(tmp_path / "base", "glm4_moe", modules=1)
    mtp = MTPModel.from_native(load(tmp_path / "base"), tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    values = json.loads(path.read_text())
    settings = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
    path.write_text(json.dumps(values | {"quantization_config": settings}))
    export_module(mtp, "native", tmp_path / "out", model=tmp_path / "base")
    listed = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert listed[0] == "lm_head" and {"model.layers.2.eh_proj", "model.layers.2.self_attn.q_proj"} <= set(listed)
    path.write_text(json.dumps(values | {"quantization_config": {"quant_method": "odd"}}))
    with pytest.raises(ValueError, match="quantization_config: got 'odd'"):
        export_module(mtp, "native", tmp_path / "odd", model=tmp_path / "base")


@pytest.mark.usefixtures("_ignored_layers")
def test_wrong_checkpoints_are_caught(tmp_path):
    checkpoint(tmp_path / "base", "glm4_moe", modules=1)
    mtp = MTPModel.from_native(load(tmp_path / "base"), tmp_path / "base")
    export_module(mtp, "native", tmp_path / "out", model=tmp_path / "base")
    form, job = FORMATS["native"], Job(mtp=mtp, out=tmp_path, model=str(tmp_path / "base"))
    file = tmp_path / "out" / "mtp.safetensors"
    tensors = load_file(file)
    for name in ("hnorm", "eh_proj", "shared_head.norm", "self_attn.q_proj"):
        file.unlink()
        save_file(
            tensors | {f"model.layers.2.{name}.weight": torch.ones_like(tensors[f"model.layers.2.{name}.weight"])}, file
        )
        with pytest.raises(ValueError, match=f"tensors differ: model.layers.2.{name}"):
            form.check(job, tmp_path / "out")
    swap = dataclasses.replace(mtp.mtp_config, fusion_order="hidden_embedding")  # written as if it had been another's
    other = copy.copy(mtp)
    other.mtp_config = swap
    file.unlink()
    save_file(form.tensors(Job(mtp=other, out=tmp_path, model="")), file)
    with pytest.raises(ValueError, match="eh_proj"):
        form.check(job, tmp_path / "out")


# -- people ------------------------------------------------------------------------------------------------------------


def saved(folder: Path, mtp: MTPModel) -> Path:
    mtp.model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    mtp.save_pretrained(folder / "module")
    return folder


def test_the_command(tmp_path, capsys):
    at = saved(tmp_path, sequential("llama", {}, draft_vocab_size=DRAFTED))
    flags = [str(at / "module"), "--model", str(at / "model"), "--check"]
    assert main(["export", *flags, "--to", "mimo", "--out", str(at / "out"), "--dtype", "fp32"]) == 0
    said = capsys.readouterr().out
    assert f"vllm serve {at / 'model'} --hf-overrides" in said and "sglang.launch_server" in said
    assert "lost: the draft vocabulary of 20 tokens" in said and "checked: logits of depths 1, 2, ... within" in said
    assert main(["export", *flags, "--to", "mimo", "--out", str(at / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["export", *flags, "--to", "medusa", "--out", str(at / "out2")]) == 2
    assert "What has: mimo, hub" in capsys.readouterr().err


def test_the_card(tmp_path):
    mtp = heads()
    mtp.notes = {"training": {"mtp_supervision": "teacher"}}
    at = saved(tmp_path, mtp)
    (at / "model" / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    about = json.loads((at / "module" / "mtp_config.json").read_text())
    about["provenance"]["command"] = ["foretell", "train", "model", "--data", "some/rows", "--depth", "3"]
    export_module(mtp, "hub", at / "out", model=at / "model", tokenizer=tiny_tokenizer(), about=about, check=True)
    card = (at / "out" / "README.md").read_text()
    for words in ("license: mit", "- some/rows", "foretell train model --data some/rows", "mtp_supervision: teacher"):
        assert words in card
    assert "| 3 | " in card and "base model: model" in card and "transformers 5." in card
    assert {path.suffix for path in (at / "out").iterdir()} == {".md", ".json", ".safetensors"}
    assert MTPModel.from_pretrained(mtp.model, at / "out").mtp_config == mtp.mtp_config


def test_files_keep_the_numbers_of_a_module_finer_than_its_target(tmp_path):
    """A module in fp32 beside a target in bf16."""
    mtp = sequential()
    at = saved(tmp_path, mtp)
    model = AutoModelForCausalLM.from_pretrained(at / "model", dtype=torch.bfloat16)
    loaded = load_for_export(model, at / "module")
    assert model.dtype == torch.bfloat16
    export_module(loaded, "mimo", tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")["model.mtp_layers.0.mlp.up_proj.weight"]
    assert torch.equal(got, mtp.module.blocks[0].block.mlp.up_proj.weight)


@pytest.mark.parametrize("case", ["eagle3 published", "medusa shared"])
@pytest.mark.parametrize("dtype", [None, "bf16", "fp32"])
def test_a_module_coarser_than_its_target(tmp_path, case, dtype):
    """The target's own tensors are rounded to what was asked for, once; without a wish to the module's type."""
    to, make = CASES[case]
    mtp = make()
    mtp.module.half()
    export_module(mtp, to, tmp_path / "out", dtype=dtype, check=True)
    tensors = load_file(next((tmp_path / "out").glob("*.safetensors")))
    wanted = {None: torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {wanted}
    own_MD = mtp.module.target_head(mtp.target, detach=True)[0]
    assert torch.equal(tensors["lm_head.weight" if to == "eagle3" else "0.1.weight"], own_MD.to(wanted))


def test_an_adapter_is_the_one_that_save_pretrained_writes(tmp_path):
    mtp = uno()
    mtp.save_pretrained(tmp_path / "saved")
    export_module(mtp, "peft", tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
