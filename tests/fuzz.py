"""Random calls against transformers' own generate, with a model that changes between them.

A case is one greedy call of a chain: a model, a module, then calls with something done to the live model in between.
Each case must give the tokens of the model's own generate, or be refused by a ValueError. Runs as a test for a while
(test_fuzz.py), longer with `make fuzz MINUTES=30`, and once more with `python tests/fuzz.py --seed 123`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import random
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from drafters import knowing_mtp, leaning_model
from tiny import ARCHITECTURES, VOCAB
from torch import Tensor, nn

from foretell import HeadsConfig, MaskedConfig, MTPModel, custom_generate, get_mtp_model
from foretell.decoding.adaptive import CostCurve

CALLS = 4  # of one chain
HEADS = ("linear", "ffn", "mha_ffn", "cnn", "medusa", "layer")


@dataclass
class Chain:
    """One seed's model with its module, and what was done so far, in words."""

    seed: int
    rng: random.Random
    model: nn.Module = field(default_factory=nn.Module)
    mtp: MTPModel | None = None
    told: list[str] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)

    @property
    def base(self) -> nn.Module:
        """The causal LM below an adapter."""
        return self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model


def start(chain: Chain) -> None:
    """A model, perhaps with an adapter, and a module of any method."""
    rng = chain.rng
    architecture = rng.choice(sorted(ARCHITECTURES))
    torch.manual_seed(chain.seed)
    model: Any = leaning_model(architecture)
    words = [architecture]
    if rng.random() < 0.35:
        # attention only: PEFT sends an MoE's experts another way, which not every kind of adapter knows
        places = [n for n, m in model.named_modules() if type(m) is nn.Linear and ("attention" in n or "attn" in n)]
        kinds = {name.rsplit(".", 1)[-1] for name in places}
        modules = rng.sample(sorted(kinds), min(2, len(kinds)))
        kind = rng.choice(["LoRA", "DoRA", "IA3", "LoHa"])
        words.append(f"{kind} on {modules}")
        model = peft.get_peft_model(model, adapter(kind, modules)).eval()
        shake(chain, [p for n, p in model.named_parameters() if p.requires_grad])
    chain.model = model
    method = rng.choice(["sequential", "sequential", "heads", "masked"])
    if method == "sequential":
        shared = rng.random() < 0.5
        chain.mtp = knowing_mtp(model, noise=rng.choice([0.0, 0.3]), shared_module=shared)
        words.append(f"sequential shared={shared}")
    elif method == "heads":
        kind = rng.choice(HEADS)
        chain.mtp = get_mtp_model(model, HeadsConfig(depth=3, head_type=kind))
        words.append(f"heads {kind}")
    else:
        settings: dict[str, Any] = {"mask_tokens": rng.choice(["shared", "distinct", "noise"])}
        settings["sampler"] = settings["mask_tokens"] != "noise" and rng.random() < 0.5
        if any(name.endswith("experts") for name, _ in model.named_modules()):
            settings["lora_modules"] = ["q_proj", "o_proj"] if architecture != "deepseek_v3" else ["o_proj"]
        chain.mtp = get_mtp_model(model, MaskedConfig(depth=3, lora_rank=2, **settings))
        shake(chain, list(chain.mtp.module.parameters()), 0.1)
        words.append(f"masked {settings}")
    chain.mtp._curve = CostCurve(rng.choice([{1: 1.0, 8: 1.1, 64: 2.0}, {1: 1.0, 2: 2.0, 4: 1.2, 64: 9.0}]))
    chain.told.append(", ".join(words))


def adapter(kind: str, modules: list[str]) -> peft.PeftConfig:
    """Settings of a small adapter."""
    if kind == "IA3":
        return peft.IA3Config(target_modules=modules, feedforward_modules=[])
    if kind == "LoHa":
        return peft.LoHaConfig(r=2, target_modules=modules)
    return peft.LoraConfig(r=2, target_modules=modules, use_dora=kind == "DoRA", init_lora_weights=False)


def shake(chain: Chain, parameters: list[Tensor], size: float = 0.3) -> None:
    """Random weights in place of those that do nothing yet."""
    generator = torch.Generator().manual_seed(chain.rng.randrange(2**31))
    with torch.no_grad():
        for parameter in parameters:
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


# -- what happens between two calls ------------------------------------------------------------------------------------


def linears(chain: Chain) -> list[tuple[str, nn.Linear]]:
    """Every plain linear of the model, by name."""
    return [(n, m) for n, m in chain.base.named_modules() if type(m) is nn.Linear]


def write_data(chain: Chain) -> str:
    """A weight written behind autograd's back."""
    name, parameter = chain.rng.choice(list(chain.base.named_parameters()))
    row = chain.rng.randrange(len(parameter))
    whole = chain.rng.random() < 0.5
    part = parameter.data if whole else parameter.data[row]
    part.mul_(chain.rng.choice([-1.0, 0.5, 2.0]))
    return f"{name}.data {'all' if whole else f'row {row}'} scaled"


def optimizer_step(chain: Chain) -> str:
    """A step of the fused optimizer, which leaves version counters alone."""
    parameters = list(chain.base.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = torch.randn_like(parameter)
    fused = chain.rng.random() < 0.7
    torch.optim.AdamW(parameters, lr=0.05, fused=fused).step()
    for parameter in parameters:
        parameter.grad = None
    return f"AdamW step, fused={fused}"


def replace_parameter(chain: Chain) -> str:
    """Another Parameter object in a linear's place."""
    name, linear = chain.rng.choice(linears(chain))
    linear.weight = nn.Parameter(linear.weight.detach() * 1.5)
    return f"{name}.weight replaced"


class Bent(nn.Module):
    """A linear and something behind it, as libraries wrap linears."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.inner = linear
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return torch.tanh(self.inner(x))


def replace_module(chain: Chain) -> str:
    """Another module in a linear's place: a linear again, or one that does more."""
    name, linear = chain.rng.choice([pair for pair in linears(chain) if "lm_head" not in pair[0]])
    new: nn.Module = copy.deepcopy(linear)
    with torch.no_grad():
        new.weight.mul_(0.7)  # type: ignore[operator]
    if chain.rng.random() < 0.4 and "gate" not in name:
        new = Bent(new)
    parent, _, last = name.rpartition(".")
    setattr(chain.base.get_submodule(parent), last, new)
    return f"{name} replaced by {type(new).__name__}"


def hook(chain: Chain) -> str:
    """A hook on any module whose output is a tensor, or one taken away again."""
    if chain.hooks and chain.rng.random() < 0.4:
        chain.hooks.pop().remove()
        return "a hook removed"
    name, module = chain.rng.choice([p for p in chain.base.named_modules() if type(p[1]).__name__ != "ModuleList"])
    factor = chain.rng.choice([0.5, 1.5])

    def scale(_module: nn.Module, _args: Any, out: Any) -> Any:
        return out * factor if torch.is_tensor(out) and out.is_floating_point() else out

    chain.hooks.append(module.register_forward_hook(scale))
    return f"hook on {name or 'the model'} ({type(module).__name__})"


def patch_forward(chain: Chain) -> str:
    """A forward set on the object, as accelerate and many notebooks do."""
    name, module = chain.rng.choice(linears(chain))
    plain = module.forward
    module.forward = lambda x: plain(x) * 1.3  # type: ignore[method-assign]
    return f"{name}.forward patched"


def switch_adapter(chain: Chain) -> str:
    """An adapter off, on, merged, taken apart or scaled."""
    if not isinstance(chain.model, peft.PeftModel):
        return write_data(chain)
    layers = [m for m in chain.model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    what = chain.rng.choice(["off", "on", "merge", "unmerge", "weights", "second"])
    if what in ("off", "on"):
        (
            chain.model.base_model.disable_adapter_layers
            if what == "off"
            else chain.model.base_model.enable_adapter_layers
        )()
    elif what == "merge":
        if not any(layer.merged for layer in layers):
            chain.model.merge_adapter()
    elif what == "unmerge":
        if all(layer.merged for layer in layers):
            chain.model.unmerge_adapter()
    elif what == "weights":
        shake(chain, [p for n, p in chain.model.named_parameters() if "default" in n])
    elif any(isinstance(module, Bent) for module in chain.model.modules()):
        return nothing(chain)  # PEFT knows plain linears only
    elif "second" not in chain.model.peft_config and not any(layer.merged for layer in layers):
        chain.model.add_adapter("second", copy.deepcopy(chain.model.peft_config["default"]))
        chain.model.set_adapter("second")
        shake(chain, [p for n, p in chain.model.named_parameters() if "second" in n])
        chain.model.eval()
    return f"adapter: {what}"


def interrupted(chain: Chain) -> str:
    """A call that dies in the middle."""
    count = chain.rng.randrange(1, 6)

    def dies(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        nonlocal count
        count -= 1
        if count < 0:
            raise KeyboardInterrupt
        return torch.zeros(len(ids), dtype=torch.bool)

    dies.of_one_text = True  # type: ignore[attr-defined]  # else it is refused beside drafts before it can die
    with contextlib.suppress(KeyboardInterrupt):
        ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(chain.seed))
        chain.mtp.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, stopping_criteria=[dies])
    return "a call was interrupted"


def module_weights(chain: Chain) -> str:
    """The module itself learns something."""
    for parameter in chain.mtp.module.parameters():
        parameter.data.mul_(1.1)
    return "the module's own weights written"


def round_trip(chain: Chain) -> str:
    """The whole thing copied."""
    if chain.hooks:
        return "nothing"
    chain.mtp = copy.deepcopy(chain.mtp)
    chain.model = chain.mtp.model
    return "deepcopy"


def released(chain: Chain) -> str:
    """Memory given back."""
    chain.mtp.release()
    return "released"


def train_mode(chain: Chain) -> str:
    """Modes toggled; nothing here has dropout, so that the text stays."""
    chain.model.train(chain.rng.random() < 0.5)
    return f"training={chain.model.training}"


def nothing(chain: Chain) -> str:
    """The same again."""
    return "nothing"


CHANGES: list[Callable[[Chain], str]] = [
    nothing, write_data, write_data, optimizer_step, replace_parameter, replace_module, hook, hook, patch_forward,
    switch_adapter, switch_adapter, switch_adapter, interrupted, module_weights, round_trip, released, train_mode,
]  # fmt: skip


# -- one call ----------------------------------------------------------------------------------------------------------


def draw_inputs(rng: random.Random) -> dict[str, Tensor]:
    """A left-padded batch; prompts repeat themselves, so that lookup finds something."""
    lengths = [rng.choice([1, 2, 5, 9, 14, 23, 40]) for _ in range(rng.choice([1, 1, 2, 3, 5]))]
    width, pad = max(lengths), rng.choice([0, 5])
    ids_BT = torch.full((len(lengths), width), pad)
    mask_BT = torch.zeros(len(lengths), width, dtype=torch.long)
    for b, length in enumerate(lengths):
        half = [rng.randrange(3, VOCAB) for _ in range(-(-length // 2))]
        ids_BT[b, width - length :] = torch.tensor((half + half)[:length])
        mask_BT[b, width - length :] = 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


def draw_settings(rng: random.Random) -> dict[str, Any]:
    """What both are told: stops, penalties and the like."""
    out: dict[str, Any] = {"max_new_tokens": rng.choice([1, 2, 7, 16, 24]), "do_sample": False, "pad_token_id": 0}
    if rng.random() < 0.5:
        out["eos_token_id"] = rng.sample(range(3, VOCAB), rng.choice([1, 4]))
    extras: dict[str, Callable[[], Any]] = {
        "repetition_penalty": lambda: rng.choice([0.8, 1.3]),
        "no_repeat_ngram_size": lambda: rng.choice([2, 3]),
        "min_new_tokens": lambda: rng.choice([1, 5]),
        "bad_words_ids": lambda: [[rng.randrange(3, VOCAB)], [rng.randrange(3, VOCAB), rng.randrange(3, VOCAB)]],
        "suppress_tokens": lambda: rng.sample(range(3, VOCAB), 3),
        "begin_suppress_tokens": lambda: rng.sample(range(3, VOCAB), 5),
        "forced_eos_token_id": lambda: rng.randrange(3, VOCAB),
        "forced_bos_token_id": lambda: rng.randrange(3, VOCAB),
        "sequence_bias": lambda: [[[rng.randrange(3, VOCAB)], 3.0], [[rng.randrange(3, VOCAB)] * 2, -4.0]],
        "exponential_decay_length_penalty": lambda: (2, 1.4) if "eos_token_id" in out else None,
        "encoder_repetition_penalty": lambda: 1.2,
        "renormalize_logits": lambda: True,
        "remove_invalid_values": lambda: True,
    }
    if rng.random() < 0.5:
        for name in rng.sample(sorted(extras), rng.choice([1, 1, 2])):
            out[name] = extras[name]()
    return out


def draw_drafting(rng: random.Random, mtp: MTPModel) -> dict[str, Any]:
    """What only foretell is told."""
    out: dict[str, Any] = {"drafter": rng.choice(["mtp", "mtp", "lookup", "mtp+lookup"])}
    out["num_draft_tokens"] = rng.choice([None, 0, 1, 2, 3, "auto", "auto"])
    if rng.random() < 0.4:
        out["slots"] = rng.choice([1, 2, 3])
    method = mtp.mtp_config.method
    drafts = out["num_draft_tokens"] not in (0, "auto") and out["drafter"] != "lookup"
    if method == "heads" and drafts and rng.random() < 0.5:
        out["draft_tree"] = rng.choice([[[0], [1], [0, 0]], [[0], [0, 0], [0, 1], [1], [1, 0], [0, 0, 0]]])
    if method == "masked" and drafts and rng.random() < 0.7:
        out["draft_layout"] = rng.choice(["linear", "quadratic", "auto", "two_pass"])
    if method != "masked" and rng.random() < 0.2:
        out["draft_sample_method"] = "probabilistic"  # of a greedy call: nothing is drawn
        out.pop("draft_tree", None)
    return out


@contextlib.contextmanager
def around(rng: random.Random) -> Iterator[str]:
    """What a call may stand in."""
    kind = rng.choice(["", "", "", "", "inference_mode", "no_grad"])
    with {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}.get(kind, contextlib.nullcontext)():
        yield kind


def call(chain: Chain, counts: collections.Counter) -> None:
    """One case: both texts, or a refusal."""
    rng, mtp = chain.rng, chain.mtp
    inputs, settings, drafting = draw_inputs(rng), draw_settings(rng), draw_drafting(rng, mtp)
    with around(rng) as kind:
        chain.told.append(
            f"{kind} generate({[int(n) for n in inputs['attention_mask'].sum(1)]}, {settings}, {drafting})"
        )
        wanted = chain.model.generate(**inputs, **settings)
        counts["cases"] += 1
        try:
            if rng.random() < 0.2:
                run = custom_generate(mtp, **drafting)
                got = chain.model.generate(**inputs, **settings, custom_generate=run)
            else:
                got = mtp.generate(**inputs, **settings, **drafting)
        except ValueError as error:
            counts[f"refused: {str(error)[:70]}"] += 1
            chain.told.append(f"refused: {error}")
            return
    assert torch.equal(got, wanted), f"got\n{got.tolist()}\nwanted\n{wanted.tolist()}"
    counts["equal"] += 1


def run_chain(seed: int, counts: collections.Counter) -> None:
    """All calls of a seed. Raises AssertionError with the whole story where a text differs or anything crashes."""
    chain = Chain(seed, random.Random(seed))
    try:
        start(chain)
        for i in range(CALLS):
            if i:
                chain.told.append(chain.rng.choice(CHANGES)(chain))
            call(chain, counts)
    except BaseException as error:
        story = "\n  ".join(chain.told)
        raise AssertionError(f"seed {seed}:\n  {story}\n{''.join(traceback.format_exception(error))[-3000:]}") from None


def fuzz(first: int, seconds: float) -> collections.Counter:
    """Seeds first, first + 1, ... until the time is over."""
    counts: collections.Counter = collections.Counter()
    end, seed = time.monotonic() + seconds, first
    while time.monotonic() < end:
        run_chain(seed, counts)
        seed += 1
    counts["chains"] = seed - first
    return counts


def main() -> None:
    """Long runs, which go on behind a find and list all of them at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--first", type=int, default=100_000, help="first seed of a long run")
    parser.add_argument("--seed", type=int, help="only this one")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    counts: collections.Counter = collections.Counter()
    if given.seed is not None:
        run_chain(given.seed, counts)
        print(dict(counts))
        return
    end, seed, found = time.monotonic() + 60 * given.minutes, given.first, []
    while time.monotonic() < end:
        try:
            run_chain(seed, counts)
        except AssertionError as error:
            found.append(seed)
            print(error, flush=True)
        seed += 1
    for name, count in counts.most_common():
        print(f"{count:7} {name}")
    print(f"{seed - given.first} chains, {len(found)} finds: {found}")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
