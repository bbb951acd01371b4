"""economize 0.3.2 for benchmarks/leaderboard.py, run by an environment of its own (leaderboard.sh): orders come as
lines of JSON on standard input, answers go as such lines to standard output.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import economize
import torch
from economize.techniques.eagle3 import Eagle3Config
from economize.techniques.medusa import MedusaConfig
from economize.techniques.vendor_mtp import VendorMTPConfig
from economize.train import Example, fit
from transformers import AutoModelForCausalLM

# its own settings but for what a few minutes need: a shared head, as many unrolled steps as are drafted
TECHNIQUES: dict[str, Any] = {
    "eagle3": lambda layers: Eagle3Config(aux_layers=(2, layers // 2, layers - 3), head="shared", train_steps=3),
    "mtp": lambda layers: VendorMTPConfig(train_steps=3),
    "medusa": lambda layers: MedusaConfig(num_heads=3, head="shared"),
}
BATCH = 4
FEW = 3  # steps that tell what one costs


class Enough(Exception):
    """The seconds are spent."""


def resident() -> dict[str, int]:
    """Bytes of this process now, and at most since it was last asked to forget (Linux)."""
    lines = open("/proc/self/status").read().splitlines()  # noqa: SIM115
    return {n: 1024 * int(next(x for x in lines if x.startswith(n)).split()[1]) for n in ("VmRSS", "VmHWM")}


def seconds() -> float:
    """Of this process on a CPU, of which other work takes none."""
    return time.monotonic() if torch.cuda.is_available() else time.process_time()


class Peer:
    """One model, and what is attached to it."""

    def __init__(self, folder: str, rows: str) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
        self.layers = self.base.config.num_hidden_layers
        ends = self.base.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.rows = rows
        self.models: dict[str, tuple[Any, int]] = {}

    def examples(self) -> list[Any]:
        """Answers that the target gave, each token behind the prompt a target of its own."""
        made = []
        for row in json.loads(open(self.rows).read()):  # noqa: SIM115
            ids = torch.tensor(row["input_ids"])
            mask = torch.tensor([int(label >= 0) for label in row["labels"][1:]] + [0])  # where the NEXT one counts
            made.append(Example(ids, mask))
        return made

    def train(self, technique: str, lr: float, budget: float, seed: int, folder: str) -> dict[str, Any]:
        torch.set_num_threads(1)
        examples, tokens, start = self.examples(), [], seconds()
        answer = sum(int(example.loss_mask.sum()) for example in examples) / len(examples)
        open("/proc/self/clear_refs", "w").write("5")  # noqa: SIM115  the peak starts again from here
        before = resident()["VmRSS"]

        def fresh() -> Any:
            return economize.apply(self.base, TECHNIQUES[technique](self.layers))

        def told(record: dict[str, Any]) -> None:
            tokens.append(BATCH * answer)
            if seconds() - start > budget:
                raise Enough

        how = {"batch_size": BATCH, "lr": lr, "seed": seed, "log_every": 1, "warmup_steps": 5}
        ends: list[float] = []
        fit(fresh(), examples, steps=FEW, callbacks=[lambda record: ends.append(seconds())], **how)
        each = ends[-1] - ends[-2]  # the first one prepares what the others find
        steps = max(int((budget - (seconds() - start)) / each), 1)
        model = fresh()
        with contextlib.suppress(Enough):
            fit(model, examples, steps=steps, callbacks=[told], **how)
        spent, peak = seconds() - start, resident()["VmHWM"]
        model.save_pretrained(folder)
        read = sum(tokens) + FEW * BATCH * answer  # the steps that told the cost read answers too
        about = {"steps": len(tokens), "answer_tokens": read, "seconds": spent, "memory_bytes": peak - before}
        return about | {"parameters": sum(p.numel() for p in model.technique_parameters())}

    def load(
        self, name: str, folder: str, prompts: list[list[int]], tokens: int, threads: int, cycles: list[int]
    ) -> dict[str, Any]:
        """Attach, and choose the tokens a cycle by time."""
        torch.set_num_threads(threads)
        model, paces = economize.load(self.base, folder), {}
        for cycle in cycles:
            self.models[name] = (model, cycle)
            self.decode(name, prompts[:1], tokens)  # what is made once is not measured
            spent = written = rounds = 0.0
            for prompt in prompts:
                found = self.decode(name, [prompt], tokens)
                spent, written = spent + found["seconds"], written + len(found["tokens"][0])
                rounds += found["cycles"]
            paces[cycle] = {"tokens_per_second": written / spent, "tau": written / rounds}
        best = max(paces, key=lambda cycle: paces[cycle]["tokens_per_second"])
        self.models[name] = (model, best)
        return {"cycle": best, "tau": paces[best]["tau"], "paces": paces}

    def decode(self, name: str, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        model, cycle = self.models[name]
        ids = [torch.tensor(prompt, device=self.base.device) for prompt in prompts]
        stop, how = sorted(self.ends), economize.DecodeConfig(cycle_length=cycle)
        start = time.perf_counter()
        if len(ids) == 1:
            made = [model.decode(ids[0], tokens, decoding=how, stop=stop)]
        else:
            made = model.decode_batch(ids, tokens, decoding=how, stop=stop)
        spent = time.perf_counter() - start
        rows = []
        for one in made:
            row = one.tokens.tolist()
            at = next((i for i, token in enumerate(row) if token in self.ends), len(row) - 1)
            rows.append(row[: at + 1])
        return {"seconds": spent, "tokens": rows, "cycles": sum(len(one.acceptance) + 1 for one in made)}


def main() -> None:
    """Work off orders until the input ends."""
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    peer = None
    for line in sys.stdin:
        order = json.loads(line)
        what = order.pop("do")
        try:
            if what == "start":
                peer, answer = Peer(**order), {"economize": economize.__version__, "torch": torch.__version__}
            else:
                answer = getattr(peer, what)(**order)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
