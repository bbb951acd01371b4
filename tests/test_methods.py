"""What every method promises in training: its gradients go where the mode says, its losses are those that plain
autograd finds over all logits, and neither packing nor padding can be seen in a number.

The reference is the recipe (DeepSeek-V3 report, arXiv 2412.19437, section 2.2) written again: one document at a time,
dense masks, eager attention, all logits at once. Generic tests run for every method of METHODS and need a settings line
in SETTINGS; a method's own reference stands in REFERENCES.
"""

# B rows, T positions, K depths, D hidden width, V vocabulary, M draft vocabulary.

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foretell.data.collate import to_batch
from foretell.methods.base import METHODS, MTPConfig, config_class
from foretell.methods.sequential import SequentialConfig
from foretell.models.mtp_block import _gain
from foretell.mtp import MTPModel, get_mtp_model
from foretell.training.objective import count_labels
from foretell.training.regenerate import regenerate
from foretell.training.trainer import MTPTrainer, MTPTrainingArguments
from foretell.types import IGNORE_INDEX, PAD_DOCUMENT
from tests.tiny import ARCHITECTURES, VOCAB, tiny_model

# what a method is tested with: settings under which every parameter matters from the first step on
SETTINGS: dict[str, dict[str, Any]] = {
    "sequential": {"initialisation": "copy"},
    # the other types: test_heads.py. Behind the target's final norm, so that all of the target is on the way
    "heads": {"head_type": "layer", "dropout": 0.0, "hidden_source": "post_norm"},
    "masked": {"mask_tokens": "distinct", "lora_rank": 4, "lora_alpha": 4.0},  # more of it: test_masked.py
}
# one module for all depths has another attention than a module for each
CASES = [*METHODS, "shared", "layers", "eagle3"]
OTHER_FORM = ("phi3", "olmo2", "gpt_neox", "deepseek_v3")  # layers that cannot be EAGLE-3's
PAIRS = [(m, a) for m in CASES for a in ARCHITECTURES if m != "eagle3" or a not in OTHER_FORM]
PAIRS.append(("published", "llama"))
SUPERVISIONS = [
    ("labels", "ce"),
    ("teacher", "ce"),
    ("teacher", "kl"),
    ("teacher", "reverse_kl"),
    ("teacher", "tv"),
    ("teacher_hard", "ce"),
]
# fp32 on paths that sum in another order: tens of roundings of 6e-8, amplified by a few layers with wide weights
FP32 = 2e-5
# weights of the depths in a differentiated sum: unequal and of both signs, so that swapped depths show
COEFFICIENTS = (1.0, -0.7, 0.45)
Document = tuple[list[int], list[int]]  # ids, labels


def settings(method: str, **changes: Any) -> MTPConfig:
    if method == "shared":
        return settings("sequential", shared_module=True, **changes)
    if method == "layers":
        return settings("sequential", **{"shared_module": True, "hidden_layers": [0, 1], **changes})
    if method == "eagle3":
        return settings("layers", block="eagle3", **changes)
    if method == "published":
        return settings("eagle3", fc_norm=False, **changes)
    return config_class(method)(**{**SETTINGS[method], **changes})


def make(method: str, architecture: str = "llama", model: dict | None = None, **changes: Any) -> MTPModel:
    """A tiny model with a module whose parameters all differ from their neutral start, norms included."""
    mtp = get_mtp_model(tiny_model(architecture, **(model or {})), settings(method, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mtp.module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.15 if parameter.dim() == 1 else 0.3 / math.sqrt(parameter.shape[-1])))
    if getattr(mtp.module, "draft_vocab_ids", None) is not None:
        chosen = torch.randperm(VOCAB, generator=generator)[: len(mtp.module.draft_vocab_ids)]
        mtp.module.set_draft_vocabulary(chosen.sort().values)
    return mtp


def documents(*lengths: int, seed: int = 2) -> list[Document]:
    """Random documents in which about a third of the tokens is not trained."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for length in lengths:
        ids = torch.randint(2, VOCAB, (length,), generator=generator)
        masked = torch.rand(length, generator=generator) < 0.35
        out.append((ids.tolist(), torch.where(masked, IGNORE_INDEX, ids).tolist()))
    return out


ROWS = [documents(11, 4, 9), documents(14, 2, seed=3)]  # the second row ends in padding


def packed(rows: list[list[Document]], padding: int = 3) -> dict[str, Tensor]:
    """Rows of documents as the collator would give them."""
    T = max(sum(len(ids) for ids, _ in row) for row in rows) + padding
    columns: dict[str, list] = {"input_ids": [], "labels": [], "document_ids": [], "position_ids": []}
    for row in rows:
        filling = T - sum(len(ids) for ids, _ in row)
        columns["input_ids"].append([t for ids, _ in row for t in ids] + [0] * filling)
        columns["labels"].append([t for _, labels in row for t in labels] + [IGNORE_INDEX] * filling)
        numbers = [n for n, (ids, _) in enumerate(row) for _ in ids]
        columns["document_ids"].append(numbers + [PAD_DOCUMENT] * filling)
        columns["position_ids"].append([p for ids, _ in row for p in range(len(ids))] + [0] * filling)
    batch = {name: torch.tensor(values) for name, values in columns.items()}
    return {**batch, "attention_mask": (batch["document_ids"] != PAD_DOCUMENT).long()}


def backward(mtp: MTPModel, inputs: dict[str, Tensor], **mode: Any) -> list[Any]:
    """The depths' losses, after their weighted sum was differentiated."""
    mtp.zero_grad()
    losses = mtp(**inputs, **mode)["mtp"]
    sum(c * loss.total for c, loss in zip(COEFFICIENTS, losses)).backward()
    return losses


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def off(got: Tensor, wanted: Tensor) -> float:
    """Distance as a part of the wanted tensor's norm: 1 for zeros, 2 for a flipped sign, 1 for twice as much."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = FP32) -> None:
    """Each gradient against its own size, except where it is nothing but rounding beside the largest."""
    assert got.keys() == wanted.keys()
    floor = 1e-4 * max(float(w.norm()) for w in wanted.values())
    for name, gradient in wanted.items():
        distance = float((got[name].double() - gradient.double()).norm())
        assert distance <= tolerance * max(float(gradient.norm()), floor), name


def test_the_comparison_itself_can_fail():
    wanted = {"a": torch.randn(5), "b": 1e-3 * torch.randn(4)}
    assert_close(wanted, wanted)
    for wrong in (torch.zeros(4), -wanted["b"], 2 * wanted["b"], wanted["b"] * (1 + 1e-3)):
        with pytest.raises(AssertionError):
            assert_close({**wanted, "b": wrong}, wanted)


def test_every_method_is_tested():
    assert SETTINGS.keys() == METHODS.keys() == REFERENCES.keys()


# -- where gradients go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "architecture"), PAIRS)
def test_a_training_step_on_every_architecture(method, architecture):
    mtp = make(method, architecture, depth=2).train()
    losses = backward(mtp, packed(ROWS))
    assert all(torch.isfinite(loss.total) and loss.total > 0 for loss in losses)
    counts = count_labels(to_batch(packed(ROWS)), 2, None, VOCAB)
    assert [int(loss.count) for loss in losses] == counts[1:].tolist()
    found = gradients(mtp.module)
    assert found and all(torch.isfinite(g).all() for g in found.values())
    assert all(float(g.norm()) > 0 for g in found.values())
    assert not gradients(mtp.model)


@pytest.mark.parametrize("method", METHODS)
def test_one_batch_is_learned_by_heart(method):
    mtp = make(method, depth=2).train()
    inputs = packed([documents(16, 8)])
    optimizer = torch.optim.AdamW(mtp.module.parameters(), lr=5e-3)
    started = [int(loss.correct) for loss in mtp(**inputs)["mtp"]]
    for _ in range(60):
        optimizer.zero_grad()
        losses = mtp(**inputs)["mtp"]
        sum(loss.total for loss in losses).backward()
        optimizer.step()
    assert all(int(loss.correct) == int(loss.count) > 5 for loss in losses)
    assert max(started) <= 2


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("method", CASES)
def test_standalone_gives_the_target_exactly_nothing(method, depth, tied, checkpointing):
    # the target trains too (as under RL), its own loss times zero: what is left is what leaks from the module
    mtp = make(method, depth=depth, model={"tie_word_embeddings": tied}).train()
    assert (mtp.target.head.weight is mtp.target.embed_tokens.weight) == tied
    inputs = packed(ROWS)
    wanted_losses = backward(mtp, inputs)
    wanted = gradients(mtp.module)
    if checkpointing and method == "masked":
        with pytest.raises(ValueError, match="chunk_size"):
            mtp.activation_checkpointing_enable()
    elif checkpointing:
        mtp.activation_checkpointing_enable()
        assert mtp.target.layers[0].gradient_checkpointing
        assert any(getattr(part, "gradient_checkpointing", False) for part in mtp.module.modules())
    found = {}
    for sign in (0.0, 1.0, -1.0):
        mtp.zero_grad()
        out = mtp(**inputs, mtp_training_mode="standalone", train_target=True)
        mtp_loss = sum(c * loss.total for c, loss in zip(COEFFICIENTS, out["mtp"]))
        (sign * out["ntp"].total + mtp_loss).backward()
        found[sign] = gradients(mtp.module), gradients(mtp.model)
    assert all(torch.equal(loss.total, other.total) for loss, other in zip(out["mtp"], wanted_losses))
    assert found[0.0][1].keys() == {name for name, _ in mtp.model.named_parameters()}
    assert all(not gradient.any() for gradient in found[0.0][1].values())
    assert all(gradient.any() for gradient in found[1.0][1].values())
    # and the main loss leaks nothing into the module: not one bit, whatever its sign
    for sign in (0.0, 1.0, -1.0):
        assert found[sign][0].keys() == wanted.keys()
        assert all(gradient.any() and torch.equal(gradient, wanted[n]) for n, gradient in found[sign][0].items())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", METHODS)
def test_joint_gives_the_target_a_gradient_everywhere(method, tied):
    mtp = make(method, depth=2, model={"tie_word_embeddings": tied}).train()
    backward(mtp, packed(ROWS), mtp_training_mode="joint", train_target=True)
    found = gradients(mtp.model)
    assert found.keys() == {name for name, _ in mtp.model.named_parameters()}
    assert all(gradient.any() for gradient in found.values())
    stored = gradients(mtp)
    if method == "masked":
        return  # bounded by chunks instead
    mtp.gradient_checkpointing_enable()  # its older name
    backward(mtp, packed(ROWS), mtp_training_mode="joint", train_target=True)
    assert_close(gradients(mtp), stored, tolerance=1e-6)  # recomputed by the same kernels


def train(mtp: MTPModel, folder: Any, **arguments: Any) -> MTPTrainer:
    rows = [{"input_ids": ids, "labels": labels} for row in ROWS for ids, labels in row if set(labels[1:]) != {-100}]
    args = {"max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": [], "use_cpu": True}
    trainer = MTPTrainer(mtp, MTPTrainingArguments(output_dir=str(folder), **{**args, **arguments}), rows)
    trainer.train()
    return trainer


@pytest.mark.parametrize("mode", ["disabled", "standalone", "joint"])
@pytest.mark.parametrize("method", METHODS)
def test_training_changes_what_the_mode_says_and_not_one_bit_else(method, mode, tmp_path):
    mtp = make(method, depth=2)
    before = copy.deepcopy(mtp.state_dict())
    train(mtp, tmp_path, mtp_training_mode=mode, weight_decay=0.1)
    changed = {name for name, tensor in mtp.state_dict().items() if not torch.equal(tensor, before[name])}
    target = {name for name in before if name.startswith("model.")}
    wanted = {"disabled": target, "standalone": before.keys() - target, "joint": before.keys()}[mode]
    assert changed == set(wanted)


# -- the reference -----------------------------------------------------------------------------------------------------


def dense_mask(T: int, window: int | None) -> Tensor:
    """[1, 1, T, T] to be added to attention scores: -inf for what a position must not see."""
    at = torch.arange(T)
    seen = at[:, None] >= at[None, :]
    if window is not None:
        seen &= at[:, None] - at[None, :] < window
    return torch.zeros(T, T).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def last_window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return config.sliding_window if kinds[-1] == "sliding_attention" else None
    return getattr(config, "sliding_window", None)


class Plain:
    """A module by its recipe, on one document. Blocks are the target's own layer with eager attention, that borrows the
    module's parameters: neither our attention function, nor our masks, nor our shifts.
    """

    def __init__(self, mtp: MTPModel) -> None:
        self.mtp, self.config = mtp, mtp.mtp_config
        twin = copy.deepcopy(mtp.target.model)
        twin.set_attn_implementation("eager")
        self.decoder = mtp.target.model.get_decoder()
        self.layer = twin.get_decoder().layers[-1].train(mtp.training)

    def target_states(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """(before, after the final norm) of the target, [1, T, D]."""
        before: list[Tensor] = []
        hook = self.mtp.target.norm.register_forward_pre_hook(lambda _m, args: before.append(args[0]))
        after = self.decoder(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
        hook.remove()
        return before[0], after

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """[1, T, D] -> [1, T, D]."""
        T = hidden.shape[1]
        position_ids = torch.arange(T)[None]
        rotary = self.decoder.rotary_emb
        kinds = getattr(self.mtp.target.config, "layer_types", None)
        by_type = self.mtp.target.config.model_type == "gemma3_text"
        places = rotary(hidden, position_ids, kinds[-1]) if by_type else rotary(hidden, position_ids)
        mask = dense_mask(T, last_window(self.mtp.target.config))
        raw = torch.func.functional_call(
            self.layer,
            {**dict(block.named_parameters()), **dict(block.named_buffers())},
            (hidden,),
            {"attention_mask": mask, "position_ids": position_ids, "position_embeddings": places},
        )
        return raw[0] if isinstance(raw, tuple) else raw

    def __call__(self, ids: list[int], detach: bool = True) -> tuple[list[Tensor], Tensor]:
        """(each depth's states [1, T, D], the target's states after its final norm)."""
        with torch.no_grad() if detach else torch.enable_grad():
            before, after = self.target_states(ids)
        source = before if self.config.hidden_source == "pre_norm" else after
        if getattr(self.config, "hidden_layers", None):  # transformers' own: number i after i layers, 0 the embedding
            with torch.no_grad() if detach else torch.enable_grad():
                found = self.decoder(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
            entry, states = self.mtp.module.entry, [found.hidden_states[i] for i in self.config.hidden_layers]
            if self.config.fc_norm:
                states = [norm(state) for norm, state in zip(entry.norms, states, strict=True)]
            source = F.linear(torch.cat(states, dim=-1), entry.fc.weight)
        return list(self.states(ids, source, detach)), after.detach()


class PlainSequential(Plain):
    """DeepSeek-V3's chain; of one module for all depths EAGLE's, every chain of every token by itself."""

    def fused(self, block: nn.Module, embedding: Tensor, hidden: Tensor) -> Tensor:
        """What the block's layer reads."""
        if self.config.block == "eagle3":
            return torch.cat([block.enorm(embedding), hidden], dim=-1)
        halves = [block.enorm(embedding), block.hnorm(hidden)]
        if self.config.fusion_order == "hidden_embedding":
            halves.reverse()
        return F.linear(torch.cat(halves, dim=-1), block.eh_proj.weight)

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Of EAGLE-3's kind each of the layer's projections says the sum of what two products say."""
        if self.config.block == "mtp":
            return super().run_block(block, hidden)
        (embedding, hidden), attention, narrow, hooks = hidden.chunk(2, dim=-1), block.self_attn.inner, nn.Module(), []
        for name, part in self.layer.self_attn.named_children():
            if name in ("q_proj", "k_proj", "v_proj"):
                own = getattr(attention, name).weight
                said = embedding @ own[:, : embedding.shape[-1]].T
                hooks.append(part.register_forward_hook(lambda _m, _args, out, said=said: out + said))
        parameters = {n.replace("self_attn.inner.", "self_attn."): p for n, p in block.named_parameters()}
        for name in parameters:
            if name.startswith("self_attn.") and name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                parameters[name] = parameters[name][:, embedding.shape[-1] :]
        narrow.named_parameters, narrow.named_buffers = parameters.items, dict(block.named_buffers()).items
        try:
            return super().run_block(narrow, hidden)
        finally:
            for hook in hooks:
                hook.remove()

    def next_states(self, known: Tensor, embedding: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(what the head reads, what the next depth receives, all rows so far) of one more row [1, 1, D]."""
        block = self.mtp.module.blocks[0]
        rows = torch.cat([known, self.fused(block, embedding, hidden)], dim=1)
        raw = self.run_block(block.block, rows)[:, -1:]
        state = block.norm(raw)
        return state, raw if self.config.chain_raw or self.config.block == "eagle3" else state, rows

    def ahead(self, ids: list[int], k: int, detach: bool) -> Tensor:
        """[1, T, D] embeddings of the tokens k ahead, zeros where there are none."""
        found = self.mtp.target.embed_tokens(torch.tensor([ids[k:]], dtype=torch.long))
        missing = found.new_zeros(1, len(ids) - found.shape[1], found.shape[2])
        return torch.cat([found.detach() if detach else found, missing], dim=1)

    def states(self, ids: list[int], source: Tensor, detach: bool) -> Iterator[Tensor]:
        """[1, T, D] of each depth: what the head reads."""
        K = self.config.depth
        if not self.config.shared_module and K > 1:
            yield from self.by_depth(ids, source, detach)
            return
        of_token, tables = [], [self.ahead(ids, k, detach) for k in range(1, K + 1)]
        text = self.fused(self.mtp.module.blocks[0], tables[0], source)
        for t in range(len(ids)):
            rows, hidden, of_token = text[:, :t], source[:, t : t + 1], [*of_token, []]
            for table in tables:
                state, hidden, rows = self.next_states(rows, table[:, t : t + 1], hidden)
                of_token[t].append(state)
        yield from (torch.cat(states, dim=1) for states in zip(*of_token, strict=True))

    def by_depth(self, ids: list[int], source: Tensor, detach: bool) -> Iterator[Tensor]:
        """[1, T, D] of each depth: what the head reads."""
        hidden = source
        for k, block in enumerate(self.mtp.module.blocks, start=1):
            raw = self.run_block(block.block, self.fused(block, self.ahead(ids, k, detach), hidden))
            state = block.norm(raw)
            hidden = raw if self.config.chain_raw else state
            yield state


class PlainHeads(Plain):
    """Meta's heads: one layer each."""

    def states(self, ids: list[int], source: Tensor, detach: bool) -> Iterator[Tensor]:
        """[1, T, D] of each depth: what the head reads."""
        for head in self.mtp.module.heads:
            hidden = source
            for block in head.body.stack:
                hidden = self.run_block(block, hidden)
            yield head.body.norm(hidden)


class PlainMasked(Plain):
    """Every token of the text by itself: what stands before it, it, and K masks behind it are an ordinary text."""

    def states(self, ids: list[int], source: Tensor, detach: bool) -> Iterator[Tensor]:
        """[1, T, D] of each depth: what the head reads."""
        T, K, module = len(ids), self.config.depth, self.mtp.module
        weights = {n: p.detach() if detach else p for n, p in self.decoder.named_parameters()}
        table = self.mtp.target.embed_tokens(torch.tensor(ids))
        table = table.detach() if detach else table
        of_token = []
        for t in range(T):
            text = torch.cat([table[: t + 1], module.rows.embedding])[None]
            hooks = [self.adapt(path, t + 1) for path in module.rows.adapters.paths]
            options = {"inputs_embeds": text, "position_ids": torch.arange(t + 1 + K)[None], "use_cache": False}
            out = torch.func.functional_call(self.decoder, weights, (), options).last_hidden_state
            for hook in hooks:
                hook.remove()
            of_token.append(out[:, t + 1 :])
        masks = torch.stack(of_token, dim=1)  # [1, T, K, D]
        first, second = module.sampler.linears
        for k in range(1, K + 1):
            before = torch.cat([table[k:], torch.zeros_like(table[:k])])[None, :T]
            y = F.silu(F.linear(torch.cat([before, masks[:, :, k - 1]], dim=-1), first.weight))
            y = rms(y, module.sampler.norms[0].weight, module.sampler.norms[0].eps)
            z = F.silu(F.linear(y, second.weight))
            yield y + rms(z, module.sampler.norms[1].weight, module.sampler.norms[1].eps)

    def adapt(self, path: str, first: int) -> Any:
        """Adapters on the rows from `first` on."""
        lora, _ = self.mtp.module.rows.adapters.adapter(path)

        def add(_module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            change = args[0][:, first:] @ lora.lora_A.weight.T @ lora.lora_B.weight.T
            return torch.cat([out[:, :first], out[:, first:] + change], dim=1)  # alpha / r is 1 here

        return self.mtp.target.layers.get_submodule(path).register_forward_hook(add)


REFERENCES: dict[str, Callable[[MTPModel], Any]] = {
    "sequential": PlainSequential,
    "heads": PlainHeads,
    "masked": PlainMasked,
}


def plain_logits(mtp: MTPModel, states: Tensor, detach: bool) -> Tensor:
    """All logits, by the words of the target's config."""
    head, config = mtp.target.head, mtp.target.config
    weight, bias = head.weight, getattr(head, "bias", None)
    if detach:
        weight, bias = weight.detach(), bias.detach() if bias is not None else None
    logits = F.linear(states, weight, bias)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain_losses(
    mtp: MTPModel,
    docs: list[Document],
    supervision: str,
    kind: str,
    detach: bool,
    shift: int = 0,
    dynamic: bool = False,
) -> list:
    """(total, count, correct) of each depth over documents, by plain autograd. shift: a deliberate mistake."""
    reference = REFERENCES[mtp.mtp_config.method](mtp)
    kept = getattr(mtp.module, "draft_vocab_ids", None)
    kept = torch.arange(VOCAB) if kept is None else kept
    place = {int(token): at for at, token in enumerate(kept)}
    K = mtp.mtp_config.depth
    out = [[torch.zeros(()), 0, 0] for _ in range(K)]
    for ids, labels in docs:
        states, after = reference(ids, detach)
        with torch.no_grad():
            teacher = plain_logits(mtp, after[0], detach)
        said_of: dict[int, dict[int, Tensor]] = {i: {} for i in range(len(ids))}  # by place and depth
        for k in range(1, K + 1):
            student = plain_logits(mtp, states[k - 1][0], detach)[:, kept]
            bigram = mtp.module.bigram
            if bigram is not None:  # before scaling, as the head's own products
                before = torch.tensor([*ids[k:], *ids[:k]])[: len(ids)]
                cap = getattr(mtp.target.config, "final_logit_softcapping", None)
                assert cap is None, "the plain way adds to what was scaled already"
                student = student + bigram.before.weight[before] @ bigram.after.weight.T
            student = student.log_softmax(-1)
            for i in range(len(ids) - k - 1):
                label = labels[i + k + 1 - shift]
                if label == IGNORE_INDEX:
                    continue
                said = teacher[i + k]  # the target at i + k speaks of token i + k + 1, as depth k does at i
                logp, logq = student[i], said[kept].log_softmax(-1)
                if supervision == "teacher":
                    p, q = logp.exp(), logq.exp()
                    loss = {
                        "ce": -(q * logp).sum(),
                        "kl": (q * (logq - logp)).sum(),
                        "reverse_kl": (p * (logp - logq)).sum(),
                        "tv": (p - q).abs().sum() / 2,
                        "e2e_tv": (p - q).abs().sum() / 2,
                        "lk": -torch.minimum(p, q).sum().log(),
                    }[kind]
                    wanted = int(logq.argmax())
                else:
                    token = label if supervision == "labels" else int(said.argmax())
                    if token not in place:
                        continue
                    wanted = place[token]
                    loss = -logp[wanted]
                said_of[i][k] = loss
                out[k - 1][1] += 1
                out[k - 1][2] += int(logp.argmax()) == wanted
        for rows in said_of.values():
            for k, loss in rows.items():
                if kind == "e2e_tv":
                    loss = 1 - torch.stack([1 - one for j, one in rows.items() if j <= k]).prod()
                elif dynamic:
                    reach = [torch.stack([0.5 * torch.exp(-rows[i].detach()) + 0.5 for i in rows if i <= m]).prod()
                             for m in rows if m >= k]  # fmt: skip
                    loss = sum(reach) * loss
                out[k - 1][0] = out[k - 1][0] + loss
    return out


VARIANTS = {
    "llama": {},
    "reduced": {"draft_vocab_size": 41},
    "softcap": {"architecture": "gemma2", "model": {"final_logit_softcapping": 4.0}},
    "bias-reduced-pre": {"architecture": "gpt_neox", "draft_vocab_size": 41, "hidden_source": "pre_norm"},
}


@pytest.mark.parametrize("mode", ["standalone", "joint"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("method", "supervision", "kind"),
    [*((m, *how) for m in METHODS for how in SUPERVISIONS), ("shared", "labels", "ce"), ("layers", "teacher", "kl")],
)
def test_losses_equal_plain_autograd_over_all_logits(method, supervision, kind, variant, mode):
    options = dict(VARIANTS[variant])
    if method == "masked":
        options.pop("hidden_source", None)  # masks are read where ordinary tokens are
    mtp = make(method, depth=3, **options).train()
    # as close to the target as a trained module is, so that drafts are sometimes right
    losses = backward(
        mtp,
        packed(ROWS),
        mtp_training_mode=mode,
        mtp_supervision=supervision,
        mtp_loss=kind,
        train_target=mode == "joint",
    )
    found = gradients(mtp)
    mtp.zero_grad()
    docs = [doc for row in ROWS for doc in row]
    wanted = plain_losses(mtp, docs, supervision, kind, detach=mode == "standalone")
    sum(c * total for c, (total, _, _) in zip(COEFFICIENTS, wanted)).backward()
    for loss, (total, count, correct) in zip(losses, wanted, strict=True):
        assert off(loss.total, total) < FP32
        assert (int(loss.count), int(loss.correct)) == (count, correct)
    assert int(losses[0].count) >= int(losses[2].count) > 3
    assert_close(found, gradients(mtp), tolerance=1e-4)  # gradients sum over positions, whose parts partly cancel
    # the gate sees a label that is one place off
    if supervision == "labels":
        shifted = plain_losses(mtp, docs, supervision, kind, detach=True, shift=1)
        assert all(off(loss.total, total) > 100 * FP32 for loss, (total, _, _) in zip(losses, shifted, strict=True))


@pytest.mark.parametrize(("mode", "rank"), [("standalone", 0), ("standalone", 4), ("joint", 4)])
@pytest.mark.parametrize(
    ("supervision", "kind", "dynamic"), [("teacher", "lk", True), ("teacher", "e2e_tv", False), ("labels", "ce", True)]
)
@pytest.mark.parametrize("method", METHODS)
def test_depths_of_a_row_together_equal_plain_autograd(method, supervision, kind, dynamic, rank, mode):
    """With rank, a bigram goes through every method's logits."""
    mtp = make(method, depth=3, draft_vocab_size=41, markov_rank=rank).train()
    arguments = {"mtp_training_mode": mode, "mtp_supervision": supervision, "mtp_loss": kind}
    losses = backward(mtp, packed(ROWS), train_target=mode == "joint", mtp_dynamic=dynamic, **arguments)
    found = gradients(mtp)
    mtp.zero_grad()
    docs = [doc for row in ROWS for doc in row]
    wanted = plain_losses(mtp, docs, supervision, kind, detach=mode == "standalone", dynamic=dynamic)
    sum(c * total for c, (total, _, _) in zip(COEFFICIENTS, wanted)).backward()
    for loss, (total, count, correct) in zip(losses, wanted, strict=True):
        assert off(loss.total, total) < FP32
        assert (int(loss.count), int(loss.correct)) == (count, correct)
    assert_close(found, gradients(mtp), tolerance=1e-4)
    apart = plain_losses(mtp, docs, supervision, "tv" if kind == "e2e_tv" else kind, detach=True)
    assert all(off(loss.total, total) > 0.01 for loss, (total, _, _) in zip(losses[1:], apart[1:], strict=True))


@pytest.mark.parametrize("supervision", ["labels", "teacher", "teacher_hard"])
@pytest.mark.parametrize("method", METHODS)
def test_a_loss_never_counts_more_rows_than_it_is_divided_by(method, supervision, tmp_path):
    mtp = make(method, depth=3, draft_vocab_size=41)
    args = MTPTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], mtp_supervision=supervision, disable_tqdm=True
    )
    trainer = MTPTrainer(mtp, args, [{"input_ids": list(range(2, 12))}])
    others = [token for token in range(2, VOCAB) if token not in mtp.module.draft_vocab_ids]
    for inputs in (packed(ROWS), packed([[(others[:20], others[:20])]])):  # in the second no label is a draft token
        trainer._get_num_items_in_batch([inputs], torch.device("cpu"))
        counts = trainer._counts_K1
        losses = mtp(**inputs, mtp_supervision=supervision)["mtp"]
        assert all(int(loss.count) <= int(count) for loss, count in zip(losses, counts[1:], strict=True))
        if (
            supervision != "teacher_hard"
        ):  # there the target's choice may be no draft token: it counts, with a loss of 0
            assert [int(loss.count) for loss in losses] == counts[1:].tolist()


@pytest.mark.parametrize("method", CASES)
def test_an_all_masked_batch_is_finite_and_changes_nothing(method):
    mtp = make(method, depth=2).train()
    inputs = packed(ROWS)
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORE_INDEX)
    for supervision, kind in SUPERVISIONS:
        losses = backward(mtp, inputs, mtp_supervision=supervision, mtp_loss=kind)
        assert all(float(loss.total.detach()) == 0 and int(loss.count) == 0 for loss in losses)
        assert all(not gradient.any() for gradient in gradients(mtp.module).values())


# -- packing and padding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("method", CASES)
def test_packed_training_equals_one_document_at_a_time(method, depth):
    mtp = make(method, depth=depth).train()
    losses = backward(mtp, packed(ROWS), mtp_training_mode="joint", train_target=True)
    found = gradients(mtp)
    mtp.zero_grad()
    totals, counts = torch.zeros(depth), torch.zeros(depth)
    for ids, labels in (doc for row in ROWS for doc in row):
        if len(ids) < depth + 2:
            continue  # nothing to predict, and refused as a row of its own
        alone = mtp(
            input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), mtp_training_mode="joint", train_target=True
        )["mtp"]
        sum(c * loss.total for c, loss in zip(COEFFICIENTS, alone)).backward()
        totals += torch.stack([loss.total.detach() for loss in alone])
        counts += torch.stack([loss.count for loss in alone])
    assert off(torch.stack([loss.total for loss in losses]), totals) < FP32
    assert [int(loss.count) for loss in losses] == counts.tolist()
    assert_close(found, gradients(mtp))


def document_logits(mtp: MTPModel, ids: list[int]) -> Tensor:
    return mtp.draft_logits(torch.tensor([ids]))[0]


@pytest.mark.parametrize(("method", "architecture"), PAIRS)
def test_states_do_not_see_across_documents_on_any_architecture(method, architecture):
    # mixture layers may gather tokens of other documents into one matrix product, never into a number
    mtp = make(method, architecture, depth=2)
    batch = to_batch(packed(ROWS))
    with torch.no_grad():
        rows = mtp.target.forward_text(batch.input_ids_BT, batch.position_ids_BT)
        logits = mtp.module.draft_logits(mtp.target, batch, rows)
    for b, row in enumerate(ROWS):
        start = 0
        for ids, _ in row:
            here = logits[b, start : start + len(ids)]
            assert off(here, document_logits(mtp, ids)) < FP32
            start += len(ids)


@pytest.mark.parametrize(("method", "architecture"), PAIRS)
def test_padding_is_seen_by_nobody(method, architecture):
    mtp = make(method, architecture, depth=2)
    texts = [ids for row in ROWS for ids, _ in row]
    T = max(map(len, texts)) + 2
    for side in ("right", "left"):
        ids, mask = torch.full((len(texts), T), 7), torch.zeros(len(texts), T, dtype=torch.long)
        for b, text in enumerate(texts):
            at = slice(0, len(text)) if side == "right" else slice(T - len(text), T)
            ids[b, at], mask[b, at] = torch.tensor(text), 1
        logits = mtp.draft_logits(ids, mask)
        for b, text in enumerate(texts):
            assert off(logits[b][mask[b] == 1], document_logits(mtp, text)) < FP32, side
    with_mask = mtp.draft_logits(torch.tensor([texts[0]]), torch.ones(1, len(texts[0])))
    assert torch.equal(with_mask[0], document_logits(mtp, texts[0]))


# -- the recipe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "architecture"), PAIRS)
def test_draft_logits_follow_the_recipe_on_every_architecture(method, architecture):
    mtp = make(method, architecture, depth=3)
    ids = ROWS[1][0][0]
    with torch.no_grad():
        states, _ = REFERENCES[mtp.mtp_config.method](mtp)(ids)
        wanted = torch.stack([plain_logits(mtp, state[0], detach=True) for state in states], dim=1)
    logits = document_logits(mtp, ids)
    assert logits.shape == (len(ids), 3, VOCAB)
    for k in range(3):
        assert off(logits[:, k], wanted[:, k]) < FP32
        assert off(logits[:, k], wanted[:, (k + 1) % 3]) > 100 * FP32


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def llama_layer_by_hand(layer: nn.Module, config: Any, x_TD: Tensor) -> Tensor:
    """A Llama layer in plain matrix products, position by position."""
    T, heads, groups = len(x_TD), config.num_attention_heads, config.num_key_value_heads
    E = config.hidden_size // heads
    angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, E, 2) / E)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def turned(x: Tensor) -> Tensor:  # [T, heads, E]
        other = torch.cat([-x[..., E // 2 :], x[..., : E // 2]], dim=-1)
        return x * cos[:, None] + other * sin[:, None]

    a, eps = layer.self_attn, config.rms_norm_eps
    normed = rms(x_TD, layer.input_layernorm.weight, eps)
    q = turned((normed @ a.q_proj.weight.T).view(T, heads, E))
    k = turned((normed @ a.k_proj.weight.T).view(T, groups, E))
    v = (normed @ a.v_proj.weight.T).view(T, groups, E)
    attended = torch.zeros(T, heads, E)
    for t in range(T):
        for h in range(heads):
            g = h // (heads // groups)
            scores = (k[: t + 1, g] @ q[t, h]) / math.sqrt(E)
            attended[t, h] = scores.softmax(-1) @ v[: t + 1, g]
    x_TD = x_TD + attended.reshape(T, -1) @ a.o_proj.weight.T
    normed = rms(x_TD, layer.post_attention_layernorm.weight, eps)
    m = layer.mlp
    return x_TD + (F.silu(normed @ m.gate_proj.weight.T) * (normed @ m.up_proj.weight.T)) @ m.down_proj.weight.T


@pytest.mark.parametrize("chain_raw", [False, True], ids=["chain-normed", "chain-raw"])
@pytest.mark.parametrize("fusion_order", ["embedding_hidden", "hidden_embedding"])
@pytest.mark.parametrize("hidden_source", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("shared_module", [False, True], ids=["separate", "shared"])
def test_sequential_by_hand(shared_module, hidden_source, fusion_order, chain_raw):
    options = {"hidden_source": hidden_source, "fusion_order": fusion_order, "chain_raw": chain_raw}
    mtp = make("sequential", depth=3, shared_module=shared_module, **options)
    with torch.no_grad():
        mtp.target.norm.weight.mul_(torch.linspace(0.3, 2.0, 32))  # else pre and post norm look alike to hnorm
    assert len(mtp.module.blocks) == (1 if shared_module else 3)
    config, ids = mtp.target.config, torch.tensor(ROWS[0][0][0])
    with torch.no_grad():
        hidden = mtp.model.model.embed_tokens.weight[ids]
        for layer in mtp.target.layers:
            hidden = llama_layer_by_hand(layer, config, hidden)
        if hidden_source == "post_norm":
            hidden = rms(hidden, mtp.target.norm.weight, config.rms_norm_eps)
        source, wanted, chains = hidden, [], []
        for k in range(1, 4):
            block = mtp.module.blocks[0 if shared_module else k - 1]

            def fused(k: int, hidden: Tensor, block: Any = block) -> Tensor:
                embedding = torch.zeros(len(ids), 32)
                embedding[: len(ids) - k] = mtp.model.model.embed_tokens.weight[ids[k:]]
                e = rms(embedding, block.enorm.weight, config.rms_norm_eps)
                h = rms(hidden, block.hnorm.weight, config.rms_norm_eps)
                W = block.eh_proj.weight  # [D, 2D]: columns of the first half, then of the second
                first, second = (e, h) if fusion_order == "embedding_hidden" else (h, e)
                return first @ W[:, :32].T + second @ W[:, 32:].T

            if shared_module:  # each row behind depth 1 of the text up to its chain's start, and the chain so far
                text, own = fused(1, source), fused(k, hidden)
                chains.append(own[:, None])
                rows = [torch.cat([text[:t], *(c[t] for c in chains)]) for t in range(len(ids))]
                raw = torch.stack([llama_layer_by_hand(block.block, config, row)[-1] for row in rows])
            else:
                raw = llama_layer_by_hand(block.block, config, fused(k, hidden))
            state = rms(raw, block.norm.weight, config.rms_norm_eps)
            wanted.append(state @ mtp.model.lm_head.weight.T)
            hidden = raw if chain_raw else state
    logits = document_logits(mtp, ids.tolist())
    assert off(logits, torch.stack(wanted, dim=1)) < FP32


def test_a_reduced_vocabulary_drafts_nothing_else():
    full, mtp = make("sequential", depth=2), make("sequential", depth=2, draft_vocab_size=41)
    ids = ROWS[0][0][0]
    wanted, logits, kept = document_logits(full, ids), document_logits(mtp, ids), mtp.module.draft_vocab_ids
    outside = torch.ones(VOCAB, dtype=torch.bool)
    outside[kept] = False
    assert len(kept) == 41 and torch.equal(logits[..., kept], wanted[..., kept])
    assert (logits[..., outside] == float("-inf")).all()
    with pytest.raises(ValueError, match="draft tokens, wanted draft_vocab_size=41"):
        mtp.module.set_draft_vocabulary(torch.arange(7))
    with pytest.raises(ValueError, match="draft_vocab_size: got 98, wanted at most the model's 97"):
        make("sequential", draft_vocab_size=98)


def test_kept_states_give_the_loss_of_the_live_forward():
    for source in ("post_norm", "pre_norm"):
        mtp = make("sequential", depth=2, hidden_source=source)
        inputs = packed(ROWS)
        batch = to_batch(inputs)
        rows = mtp.target.forward_text(batch.input_ids_BT, batch.position_ids_BT)
        kept = (rows.post_norm_BRD if source == "post_norm" else rows.pre_norm_BRD).detach()
        for supervision, kind in SUPERVISIONS:
            mode = {"mtp_supervision": supervision, "mtp_loss": kind}
            live, wanted = backward(mtp, inputs, **mode), gradients(mtp.module)
            stored = backward(mtp, {**inputs, "hidden_states": kept}, **mode)
            assert all(torch.equal(a.total, b.total) for a, b in zip(live, stored, strict=True))
            found = gradients(mtp.module)
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("source", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox"])
def test_a_sequential_module_starts_as_one_more_last_layer(architecture, source):
    """Its copied layer reads the direction of the target's last state at the residual stream's size, from fusion
    weights near one: the size stands in the gains of both norms."""
    target = make("sequential", architecture, hidden_source=source).target
    with torch.no_grad():
        target.norm.weight.mul_(torch.linspace(0.5, 2.0, 32))  # else pre and post norm look alike
        mtp = get_mtp_model(target.model, SequentialConfig(depth=1, hidden_source=source))
        block = mtp.module.block(1)
        ids = torch.arange(3, 35)[None]
        rows = target.forward_text(ids, torch.arange(32)[None])
        hidden = mtp.module.source(rows)
        read = block.eh_proj(torch.cat([block.enorm(target.embed(ids)), block.hnorm(hidden)], dim=-1))
        state = rows.pre_norm_BRD
        if architecture == "gpt_neox":  # LayerNorm: without the mean, which the norm takes away, and without its bias
            state = state - state.mean(-1, keepdim=True)
        likeness = torch.cosine_similarity(read, state, dim=-1)
        size = state.pow(2).mean(-1).sqrt().median()
    assert likeness.min() > (0.9 if source == "post_norm" and architecture == "gpt_neox" else 0.99)
    assert 0.5 < float(read.pow(2).mean(-1).sqrt().median() / size) < 2.0
    assert 0.2 < float(block.eh_proj.weight[:, 32:].diagonal().abs().median()) < 5.0
    torch.testing.assert_close(*(float(_gain(norm, hidden[0, 0]).mean()) for norm in (block.enorm, block.hnorm)))


@pytest.mark.parametrize("ids", [[2], [1, 0], [1, 1], [-1, 0], [0, 9], ["1"], [0.5]])
def test_hidden_layers_that_are_none_are_refused(ids):
    with pytest.raises(ValueError, match="hidden_layers: got .* wanted ascending numbers .* to 1 of this model"):
        make("layers", hidden_layers=ids)


def test_a_store_keeps_no_states_for_several_layers(tmp_path):
    mtp = make("layers", depth=2)
    rows = [{"input_ids": [3, 5, 7], "labels": [IGNORE_INDEX] * 3}]
    store, _ = regenerate(mtp, rows, None, tmp_path / "store", max_new_tokens=4)
    assert store.width is None and "hidden_states" not in store[0]
    train_args = {"output_dir": str(tmp_path), "max_steps": 1, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    before = mtp.module.entry.fc.weight.clone()
    MTPTrainer(mtp, MTPTrainingArguments(**train_args), store).train()
    assert not torch.equal(mtp.module.entry.fc.weight, before)


def test_an_entry_of_several_states_starts_as_the_last():
    mtp = get_mtp_model(tiny_model(), SequentialConfig(depth=1, hidden_layers=[0, 1]))
    states = torch.randn(2, 3, 64)
    torch.testing.assert_close(mtp.module.entry(states), mtp.module.entry.norms[1](states[..., 32:]))
    plain = SequentialConfig(depth=1, hidden_layers=[0, 1], block="eagle3", fc_norm=False)
    torch.testing.assert_close(get_mtp_model(tiny_model(), plain).module.entry(states), states[..., 32:])


@pytest.mark.parametrize("changes", [{"block": "mtp", "hidden_layers": [0, 1]}, {"block": "eagle3"}])
def test_norms_that_are_none_cannot_be_left_out(changes):
    with pytest.raises(ValueError, match="fc_norm: got False, wanted True where block is not 'eagle3' or"):
        SequentialConfig(depth=1, fc_norm=False, **changes).build(make("sequential").target)


@pytest.mark.parametrize("architecture", OTHER_FORM)
def test_layers_of_another_form_are_refused(architecture):
    with pytest.raises(ValueError, match="block: got 'eagle3' for .* wanted attention whose .* Use block='mtp'"):
        make("eagle3", architecture)
    with pytest.raises(ValueError, match="fusion_order: got 'hidden_embedding', wanted 'embedding_hidden' with block"):
        make("eagle3", fusion_order="hidden_embedding")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_an_eagle3_block_starts_as_the_last_layer(architecture):
    """On the state that layer wrote, whatever the embedding is; no longer once weights for the embedding are set."""
    target = make("sequential", architecture).target
    mtp = get_mtp_model(target.model, SequentialConfig(depth=1, hidden_source="pre_norm", block="eagle3"))
    block, plain, inputs = mtp.module.block(1), Plain(mtp), packed([documents(9)], padding=0)
    rows = target.forward_text(inputs["input_ids"], inputs["position_ids"])
    read = next(mtp.module.depth_states(target, to_batch(inputs), rows.pre_norm_BRD, True))
    with torch.no_grad():
        wanted = target.norm(plain.run_block(target.layers[-1], rows.pre_norm_BRD))
        assert off(read, wanted) < FP32
        block.block.self_attn.inner.v_proj.weight[:, :32] += 0.1
    changed = next(mtp.module.depth_states(target, to_batch(inputs), rows.pre_norm_BRD, True))
    assert off(changed, wanted) > 0.01
