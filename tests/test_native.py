"""MTP weights that checkpoints carry: synthetic ones in the published layouts, and the recipes they stand for."""

# T positions, K depths, D hidden width, V vocabulary.

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import VOCAB, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from foretell import MTPModel
from foretell.models.target import Target
from foretell.native import LAYOUTS, read_native

L, K = 2, 2  # layers of the tiny targets, modules of most checkpoints
FAMILIES = {"deepseek_v3": "deepseek", "glm4_moe": "deepseek", "qwen2": "mimo"}
CLOSE = {"rtol": 0.0, "atol": 1e-5}  # fp32; the wrong recipes below are off by more than a hundred times as much
T = 12


def random_like(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Values of a size that lets every tensor matter: norms around one, the rest spread."""
    noise = torch.randn(tensor.shape, generator=generator)
    if "norm" in name:
        return 1 + 0.3 * noise
    return noise * (0.05 if "correction_bias" in name else 0.3)


def mtp_tensors(layout: str, saved: dict[str, Tensor], modules: int, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of that many modules under their published names, written out here independently of the table."""
    generator = torch.Generator().manual_seed(seed)
    wide, norm = torch.empty(32, 64), torch.empty(32)
    last = {name.removeprefix(f"model.layers.{L - 1}."): t for name, t in saved.items() if f"layers.{L - 1}." in name}
    out = {}
    for k in range(modules):
        if layout == "deepseek":
            parts = {
                "enorm.weight": norm,
                "hnorm.weight": norm,
                "eh_proj.weight": wide,
                "shared_head.norm.weight": norm,
            }
            new = {f"model.layers.{L + k}.{name}": tensor for name, tensor in (last | parts).items()}
            out[f"model.layers.{L + k}.embed_tokens.weight"] = saved["model.embed_tokens.weight"].clone()
            out[f"model.layers.{L + k}.shared_head.head.weight"] = saved["lm_head.weight"].clone()
        else:
            names = ("token_layernorm.weight", "hidden_layernorm.weight", "final_layernorm.weight")
            parts = dict.fromkeys(names, norm) | {"input_proj.weight": wide}
            new = {f"model.mtp_layers.{k}.{name}": tensor for name, tensor in (last | parts).items()}
        out |= {name: random_like(name, tensor, generator) for name, tensor in new.items()}
    return out


def checkpoint(
    folder: Path, name: str, modules: int = K, sharded: bool = False, **changes: object
) -> dict[str, Tensor]:
    """Write a target and its MTP modules as they are published; returns the MTP tensors."""
    model = tiny_model(name, **changes)
    with torch.no_grad():  # with a norm of ones, states before and after it would look the same to the next norm
        model.model.norm.weight.uniform_(0.3, 1.7)
    model.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    mtp = mtp_tensors(FAMILIES[name], saved, modules)
    rewrite(folder, saved, mtp, sharded)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"num_nextn_predict_layers": modules}))
    return mtp


def rewrite(folder: Path, saved: dict[str, Tensor], mtp: dict[str, Tensor], sharded: bool = False) -> None:
    for old in folder.glob("*.safetensors*"):
        old.unlink()  # never written over: a loaded model may lie in the old file's memory map
    if not sharded:
        save_file(saved | mtp, folder / "model.safetensors", metadata={"format": "pt"})
        return
    # the module's tensors lie in two shards, one of them shared with the target's
    own, names = sorted(saved), sorted(mtp)
    shards = [own[:-3], own[-3:] + names[:5], names[5:]]
    home = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file({n: (saved | mtp)[n] for n in shard}, folder / file, metadata={"format": "pt"})
        home |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))


def change(folder: Path, *, drop: str = "", **new: Tensor) -> None:
    """Take a tensor out of a single-file checkpoint, or put others in."""
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(drop, None)
    rewrite(folder, tensors, new)


@pytest.fixture(autouse=True)
def _ignored_layers(monkeypatch):
    """The published models' layers behind the last are known to transformers by number; here they are 2 and 3."""
    from transformers import DeepseekV3ForCausalLM, Glm4MoeForCausalLM

    for cls in (DeepseekV3ForCausalLM, Glm4MoeForCausalLM):
        patterns = [rf"model\.layers\.{L + k}\..*" for k in range(K)]
        monkeypatch.setattr(cls, "_keys_to_ignore_on_load_unexpected", patterns)


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, (1, T), generator=torch.Generator().manual_seed(seed))


# -- the recipes -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def transformers_logits(model: torch.nn.Module, ids_1T: Tensor) -> list[Tensor]:
    """[T - k, V] for each depth k, by transformers' own MtpModel, read by transformers' own loader."""
    mtp = MtpModel.from_pretrained(model).eval()
    hidden = model.model(ids_1T).last_hidden_state
    out = []
    for k in range(1, len(mtp.layers) + 1):
        hidden = hidden[:, : T - k]
        places = torch.arange(1, T - k + 1)[None]
        hidden = mtp.forward_layer(k - 1, hidden, places, None, input_ids=ids_1T[:, k:])
        out.append(mtp._project_to_logits(hidden)[0])
    return out


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def rotate(x_HTE: Tensor, theta: float) -> Tensor:
    E = x_HTE.shape[-1]
    angle_TE = torch.arange(x_HTE.shape[1])[:, None] * theta ** (-torch.arange(0, E, 2) / E)
    cos, sin = angle_TE.cos(), angle_TE.sin()
    a, b = x_HTE.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@torch.no_grad()
def mimo_logits(model: torch.nn.Module, ids_1T: Tensor, tensors: dict[str, Tensor]) -> list[Tensor]:
    """[T - k, V] for each depth k: MiMo's module, written out in plain PyTorch."""
    before_norm = []
    handle = model.model.norm.register_forward_pre_hook(lambda _module, args: before_norm.append(args[0][0]))
    model.model(ids_1T)
    handle.remove()
    hidden_TD, out = before_norm[0], []
    theta = model.config.rope_parameters["rope_theta"]
    for k in range(1, K + 1):
        w = {n.removeprefix(f"model.mtp_layers.{k - 1}."): t for n, t in tensors.items() if f"layers.{k - 1}." in n}
        n = T - k
        token = rms(model.model.embed_tokens.weight[ids_1T[0, k:]], w["token_layernorm.weight"])
        x = torch.cat([rms(hidden_TD[:n], w["hidden_layernorm.weight"]), token], dim=-1) @ w["input_proj.weight"].T

        y = rms(x, w["input_layernorm.weight"])
        q, key, v = (y @ w[f"self_attn.{p}_proj.weight"].T + w[f"self_attn.{p}_proj.bias"] for p in "qkv")
        q, key, v = (z.view(n, -1, 8).transpose(0, 1) for z in (q, key, v))
        q, key = rotate(q, theta), rotate(key, theta)
        key, v = key.repeat_interleave(2, dim=0), v.repeat_interleave(2, dim=0)  # four heads over two
        scores = (q @ key.transpose(1, 2)) / 8**0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
        attended = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, 32)
        x = x + attended @ w["self_attn.o_proj.weight"].T

        y = rms(x, w["post_attention_layernorm.weight"])
        y = F.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
        x = x + y @ w["mlp.down_proj.weight"].T
        hidden_TD = rms(x, w["final_layernorm.weight"])
        out.append(model.lm_head(hidden_TD))
    return out


def expected(name: str, model: torch.nn.Module, tensors: dict[str, Tensor]) -> list[Tensor]:
    return mimo_logits(model, tokens(), tensors) if name == "qwen2" else transformers_logits(model, tokens())


def ours(mtp: MTPModel) -> list[Tensor]:
    logits_TKV = mtp.draft_logits(tokens())[0]
    return [logits_TKV[: T - k, k - 1] for k in range(1, logits_TKV.shape[1] + 1)]


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_drafts_what_the_family_defines(tmp_path, name, sharded):
    tensors = checkpoint(tmp_path, name, sharded=sharded)
    model = load(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mtp = MTPModel.from_native(model, tmp_path)
    assert mtp.mtp_config.depth == K and not mtp.mtp_config.shared_module
    for got, wanted in zip(ours(mtp), expected(name, model, tensors), strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE)
        assert wanted.std() > 0.1


WRONG = {
    "halves swapped": {
        "fusion_order": {"embedding_hidden": "hidden_embedding", "hidden_embedding": "embedding_hidden"}
    },
    "other hidden state": {"hidden_source": {"post_norm": "pre_norm", "pre_norm": "post_norm"}},
    "raw chain": {"chain_raw": {False: True}},
    "one module twice": {},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", FAMILIES)
def test_another_recipe_drafts_something_else(tmp_path, name, wrong):
    tensors = checkpoint(tmp_path, name)
    model = load(tmp_path)
    config, fill = read_native(Target(model), tmp_path)
    changed = {setting: other[getattr(config, setting)] for setting, other in WRONG[wrong].items()}
    mtp = MTPModel(model, dataclasses.replace(config, **changed))
    fill(mtp.module)
    if wrong == "one module twice":
        mtp.module.blocks[1] = mtp.module.blocks[0]
    first_changes = 1 if wrong in ("halves swapped", "other hidden state") else 2
    for k, (got, wanted) in enumerate(zip(ours(mtp), expected(name, model, tensors), strict=True), start=1):
        off = (got - wanted).abs().max()
        assert off > 100 * CLOSE["atol"] if k >= first_changes else off < CLOSE["atol"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_the_checkpoint_matters(tmp_path, name):
    """So that equality above means that each one found its place: the experts that twelve tokens choose, too."""
    tensors = checkpoint(tmp_path, name, modules=1)
    model = load(tmp_path)
    first = ours(MTPModel.from_native(model, tmp_path))[0]
    saved = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if n not in tensors}
    shared = ("embed_tokens.weight", "shared_head.head.weight")
    for tensor_name in [n for n in tensors if not n.endswith(shared)]:
        old = tensors[tensor_name]
        ramp = torch.linspace(0, 5, old.shape[0]).view(-1, *[1] * (old.dim() - 1))  # the router's bias only chooses
        rewrite(tmp_path, saved, tensors | {tensor_name: old + ramp})
        changed = ours(MTPModel.from_native(model, tmp_path))[0]
        assert (changed - first).abs().max() > 10 * CLOSE["atol"], tensor_name


# -- use ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("modules", "drafts"), [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_is_plain_greedy(tmp_path, name, modules, drafts):
    """A single module is run again for further depths, as engines do."""
    checkpoint(tmp_path, name, modules=modules)
    model = load(tmp_path)
    mtp = MTPModel.from_native(model, tmp_path)
    prompt = tokens(1)[:, :6]
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 24, "do_sample": False}
    wanted = model.generate(prompt, **arguments)
    got = mtp.generate(prompt, num_draft_tokens=drafts, return_dict_in_generate=True, **arguments)
    assert torch.equal(got.sequences, wanted)
    assert max(verification.depth for verification in got.stats.records[0]) == drafts


def test_saved_module_is_the_imported_one(tmp_path):
    checkpoint(tmp_path / "checkpoint", "glm4_moe")
    model = load(tmp_path / "checkpoint")
    mtp = MTPModel.from_native(model, tmp_path / "checkpoint")
    mtp.save_pretrained(tmp_path / "module")
    again = MTPModel.from_pretrained(model, tmp_path / "module")
    for got, wanted in zip(ours(again), ours(mtp), strict=True):
        assert torch.equal(got, wanted)


def test_target_and_module_may_be_half_precision(tmp_path):
    checkpoint(tmp_path, "deepseek_v3", modules=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with warnings.catch_warnings():  # the shared tensors are compared in the target's precision
        warnings.simplefilter("error")
        mtp = MTPModel.from_native(model, tmp_path)
    assert mtp.module.blocks[0].eh_proj.weight.dtype == torch.bfloat16
    assert mtp.draft_logits(tokens()).isfinite().all()


def test_shards_of_the_target_are_not_read(tmp_path):
    checkpoint(tmp_path, "qwen2", sharded=True)
    model = load(tmp_path)
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    MTPModel.from_native(model, tmp_path)


@pytest.mark.parametrize("part", ["shared_head.head", "embed_tokens"])
def test_another_head_or_embedding_is_warned_of(tmp_path, part, monkeypatch):
    monkeypatch.setattr("foretell.native._CHUNK_ROWS", 10)
    tensors = checkpoint(tmp_path, "deepseek_v3")
    model = load(tmp_path)
    other = tensors[f"model.layers.{L}.{part}.weight"].clone()
    other[-1, -1] += 1
    change(tmp_path, **{f"model.layers.{L}.{part}.weight": other})
    with pytest.warns(UserWarning, match=rf"model.layers.{L}.{part}.weight differs from the target's own") as caught:
        MTPModel.from_native(model, tmp_path)
    assert [Path(warning.filename).name for warning in caught] == ["test_native.py"]


def test_shared_tensors_may_be_left_out(tmp_path):
    checkpoint(tmp_path, "glm4_moe", modules=1)
    model = load(tmp_path)
    change(tmp_path, drop=f"model.layers.{L}.shared_head.head.weight")
    change(tmp_path, drop=f"model.layers.{L}.embed_tokens.weight")
    change(tmp_path, **{f"model.layers.{L}.self_attn.rotary_emb.inv_freq": torch.zeros(4)})  # old checkpoints
    assert MTPModel.from_native(model, tmp_path).mtp_config.depth == 1


# -- errors ------------------------------------------------------------------------------------------------------------


def refused(model: torch.nn.Module, folder: Path, said: str, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error, match=said) as caught:
        MTPModel.from_native(model, folder)
    return str(caught.value)


def test_a_folder_without_mtp_weights_says_what_was_looked_for(tmp_path):
    model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path)
    said = refused(model, tmp_path, "carries no MTP weights")
    for row in LAYOUTS.values():
        assert row.families in said
    for name in ("model.layers.{n}.eh_proj.weight", "model.mtp_layers.{n}.input_proj.weight", "mtp.fc.weight"):
        assert name in said


def test_no_folder_and_no_files(tmp_path):
    model = tiny_model("qwen2")
    refused(model, tmp_path / "absent", "no such folder", FileNotFoundError)
    (tmp_path / "config.json").write_text("{}")
    refused(model, tmp_path, "no safetensors files", FileNotFoundError)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("deepseek_v3", f"model.layers.{L}.hnorm.weight"),
        ("deepseek_v3", f"model.layers.{L + 1}.shared_head.norm.weight"),
        ("deepseek_v3", f"model.layers.{L}.mlp.experts.3.up_proj.weight"),
        ("glm4_moe", f"model.layers.{L}.mlp.gate.e_score_correction_bias"),
        ("qwen2", "model.mtp_layers.0.input_proj.weight"),
        ("qwen2", "model.mtp_layers.1.self_attn.k_proj.bias"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, name, tensor):
    checkpoint(tmp_path, name)
    model = load(tmp_path)
    change(tmp_path, drop=tensor)
    said = refused(model, tmp_path, f"missing {tensor}")
    assert said.count("missing model.") == 1 and "unknown" not in said


def test_unknown_and_misshapen_tensors_are_named(tmp_path):
    checkpoint(tmp_path, "deepseek_v3")
    model = load(tmp_path)
    change(tmp_path, **{f"model.layers.{L}.surprise.weight": torch.zeros(3)})
    refused(model, tmp_path, f"unknown model.layers.{L}.surprise.weight")
    change(tmp_path, drop=f"model.layers.{L}.surprise.weight")
    change(tmp_path, **{f"model.layers.{L}.mlp.experts.1.gate_proj.weight": torch.zeros(23, 32)})
    refused(model, tmp_path, r"experts.1.gate_proj.weight has shape \(23, 32\), wanted \(24, 32\)")


def test_nothing_is_written_when_a_tensor_does_not_fit(tmp_path):
    checkpoint(tmp_path, "qwen2")
    model = load(tmp_path)
    change(tmp_path, **{"model.mtp_layers.1.mlp.up_proj.weight": torch.zeros(5, 5)})
    config, fill = read_native(Target(model), tmp_path)
    module = config.build(Target(model))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match="up_proj"):
        fill(module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_quantised_module_is_refused(tmp_path):
    checkpoint(tmp_path, "deepseek_v3", modules=1)
    model = load(tmp_path)
    change(tmp_path, **{f"model.layers.{L}.self_attn.o_proj.weight_scale_inv": torch.ones(1, 1)})
    refused(model, tmp_path, "quantised: dequantise")


def test_a_target_that_ends_in_a_dense_layer_is_refused(tmp_path):
    checkpoint(tmp_path, "deepseek_v3", modules=1)
    dense = tiny_model("deepseek_v3", first_k_dense_replace=L)
    refused(dense, tmp_path, "of different kinds")


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2"])
def test_another_number_of_layers_is_refused(tmp_path, name):
    checkpoint(tmp_path, name)
    for layers in (1, 3):
        refused(tiny_model(name, num_hidden_layers=layers), tmp_path, f"got {L} layers .* wanted {layers} layers")
    (tmp_path / "config.json").unlink()  # the modules' own numbers tell it as well
    if name == "deepseek_v3":
        refused(tiny_model(name, num_hidden_layers=3), tmp_path, r"numbered \[2, 3\], wanted 3 layers")


@pytest.mark.parametrize("declared", [0, 1, 3])
def test_the_declared_depth_must_be_there(tmp_path, declared):
    checkpoint(tmp_path, "glm4_moe")
    model = load(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_nextn_predict_layers": declared}))
    refused(model, tmp_path, f"declares {declared} MTP modules, but there are tensors of {K}")


def test_another_kind_of_target_is_refused(tmp_path):
    checkpoint(tmp_path, "qwen2")
    refused(tiny_model("llama"), tmp_path, "weights of MiMo, got a target of type llama; wanted one of: qwen2")


def test_hybrid_families_are_refused_by_name(tmp_path):
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path)
    change(tmp_path, **{"mtp.fc.weight": torch.zeros(32, 64), "mtp.layers.0.input_layernorm.weight": torch.zeros(32)})
    said = refused(model, tmp_path, "MTP weights of Qwen3-Next, Qwen3.5")
    assert "linear attention" in said and "Wanted one of: DeepSeek-V3, GLM-4-MoE, MiMo" in said


def test_damaged_files_are_named(tmp_path):
    checkpoint(tmp_path, "qwen2", sharded=True)
    model = load(tmp_path)
    last = tmp_path / "model-00003-of-00003.safetensors"
    content = last.read_bytes()
    last.unlink()
    last.write_bytes(content[:-10])
    refused(model, tmp_path, "model-00003-of-00003.safetensors: truncated or damaged")
    last.unlink()
    refused(model, tmp_path, "model-00003-of-00003.safetensors: not there", FileNotFoundError)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    refused(model, tmp_path, "index.json: damaged")
