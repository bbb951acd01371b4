"""Parallel heads: seven types by hand, blind to the future, drafting as they were trained, in chains and in trees."""

# B sequences, T positions, K depths, D hidden width, V vocabulary, S guesses.

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drafters import leaning_model
from test_decode import CHEAP_ROWS, prompts, reference
from tiny import VOCAB, tiny_model
from torch import Tensor, nn

import foretell
from foretell.config import ConfigError
from foretell.data.collate import to_batch
from foretell.decoding.trees import check_tree
from foretell.methods.heads import HeadsConfig
from foretell.models.mtp_heads import KERNEL, attention_heads
from foretell.mtp import MTPModel, get_mtp_model

TYPES = ["linear", "ffn", "mha_ffn", "cnn", "identical", "medusa", "layer"]
OWN_MATRIX = [kind for kind in TYPES if kind != "layer"]


def make(kind: str, model: nn.Module | None = None, seed: int = 0, **settings: Any) -> MTPModel:
    """Heads whose parameters all differ from their neutral start."""
    torch.manual_seed(seed)
    settings = {"depth": 3, "dropout": 0.0, **settings}
    mtp = get_mtp_model(model or tiny_model(), HeadsConfig(head_type=kind, **settings))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in mtp.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return mtp


# -- by hand -----------------------------------------------------------------------------------------------------------


def by_hand(mtp: MTPModel, states_TD: Tensor) -> Tensor:
    """[T, K, V] of one document, position by position: neither our attention nor our shifts."""
    kind, out = mtp.mtp_config.head_type, []
    for head in mtp.module.heads:
        x = states_TD
        if kind in ("linear", "ffn", "medusa", "identical"):
            x = torch.stack([_one_place(kind, head.body, row) for row in x])
        elif kind == "cnn":
            for conv in head.body.convs:
                x = torch.stack([_conv(conv, x, t) for t in range(len(x))])
        elif kind == "mha_ffn":
            for layer in head.body.stack:
                x = torch.stack([_attend(layer, x, t) for t in range(len(x))])
        matrix = mtp.target.head if head.output is None else head.output
        out.append(F.linear(x, matrix.weight, matrix.bias))
    return torch.stack(out, dim=1)


def _one_place(kind: str, body: nn.Module, x_D: Tensor) -> Tensor:
    for part in body.parts:
        if kind == "ffn":
            up, _, down, _ = part.part
            x_D = x_D + down.weight @ F.gelu(up.weight @ x_D + up.bias) + down.bias
        elif kind == "medusa":
            x_D = x_D + F.silu(part.part[0].weight @ x_D + part.part[0].bias)
        elif isinstance(part, nn.Linear):
            x_D = part.weight @ x_D + part.bias
        elif isinstance(part, nn.ReLU):
            x_D = x_D.clamp(min=0)
    return x_D


def _norm(norm: nn.LayerNorm, x_D: Tensor) -> Tensor:
    centred = x_D - x_D.mean()
    return centred / (centred.pow(2).mean() + norm.eps).sqrt() * norm.weight + norm.bias


def _conv(conv: nn.Module, x_TD: Tensor, t: int) -> Tensor:
    total = conv.taps[0].bias.clone()
    for back in range(KERNEL):
        if t - back >= 0:
            total = total + conv.taps[back].weight @ x_TD[t - back]
    return x_TD[t] + _norm(conv.norm, F.gelu(total))


def _attend(layer: nn.Module, x_TD: Tensor, t: int) -> Tensor:
    D = x_TD.shape[1]
    E = D // layer.heads
    q, k, v = (x_TD[: t + 1] @ layer.qkv.weight.T + layer.qkv.bias).split(D, dim=1)
    seen = []
    for h in range(layer.heads):
        at = slice(h * E, (h + 1) * E)
        seen.append((k[:, at] @ q[t, at] / math.sqrt(E)).softmax(0) @ v[:, at])
    x = _norm(layer.norm_1, x_TD[t] + layer.out.weight @ torch.cat(seen) + layer.out.bias)
    return _norm(layer.norm_2, x + layer.down.weight @ F.gelu(layer.up.weight @ x + layer.up.bias) + layer.down.bias)


VARIANTS = {
    "own matrix": {"share_unembedding": False},
    "shared matrix": {"share_unembedding": True},
    "two layers": {"num_layers": 2},
    "few tokens": {"draft_vocab_size": 41},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", OWN_MATRIX)  # layer: against the target's own layer, in test_methods
@torch.no_grad()
def test_types_by_hand(kind, variant):
    settings = VARIANTS[variant]
    if kind == "identical" and ("num_layers" in settings or settings.get("share_unembedding")):
        with pytest.raises(ConfigError, match="identical"):
            HeadsConfig(head_type=kind, **settings)
        return
    mtp = make(kind, **settings)
    ids = torch.arange(3, 12)[None]
    rows = mtp.target.forward_text(ids, torch.arange(9)[None])
    wanted, logits = by_hand(mtp, rows.post_norm_BRD[0]), mtp.draft_logits(ids)[0]
    if variant == "few tokens":
        kept = mtp.module.draft_vocab_ids
        assert (logits.isfinite().sum(-1) == 41).all()
        logits = logits[..., kept]
        wanted = wanted if wanted.shape[-1] == 41 else wanted[..., kept]
    assert torch.allclose(logits, wanted, atol=1e-4 * float(wanted.abs().max()))
    assert not torch.allclose(logits, wanted.roll(1, dims=1), atol=1e-2)
    assert not torch.allclose(logits[1:], wanted[:-1], atol=1e-2)


# -- what a head may see -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", TYPES)
def test_nothing_at_or_before_t_sees_what_comes_after(kind, layers):
    if kind == "identical" and layers == 2:
        return
    mtp = make(kind, num_layers=layers)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (1, 14), generator=generator)
    logits = mtp.draft_logits(ids)
    for t in (0, 5, 12):
        other = ids.clone()
        other[:, t + 1 :] = torch.randint(3, VOCAB, other[:, t + 1 :].shape, generator=generator)
        changed = mtp.draft_logits(other)
        assert torch.allclose(changed[:, : t + 1], logits[:, : t + 1], atol=1e-5)
        assert not torch.allclose(changed[:, t + 1 :], logits[:, t + 1 :], atol=1e-2), "the gate"


@pytest.mark.parametrize("kind", TYPES)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(kind):
    mtp = make(kind, num_layers=1 if kind == "identical" else 2)
    texts = [torch.arange(3, 10), torch.arange(20, 24), torch.arange(40, 49)]
    ids = torch.cat(texts)[None]
    places = torch.cat([torch.arange(len(text)) for text in texts])[None]
    batch = to_batch({"input_ids": ids, "position_ids": places})
    rows = mtp.target.forward_text(batch.input_ids_BT, batch.position_ids_BT)
    logits = mtp.module.draft_logits(mtp.target, batch, rows)[0]
    alone = torch.cat([mtp.draft_logits(text[None])[0] for text in texts])
    assert torch.allclose(logits, alone, atol=1e-4)


def test_head_k_learns_the_token_one_plus_k_ahead():
    """Against three loops, packed and masked."""
    mtp = make("linear")
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, VOCAB, (3, 15), generator=generator)
    documents = torch.tensor([[0] * 6 + [1] * 4 + [2] * 5, [0] * 15, [0] * 2 + [1] * 9 + [-1] * 4])
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    found = mtp.module.labels(to_batch({"input_ids": ids, "labels": labels, "document_ids": documents}))
    for b, t, k in itertools.product(range(3), range(15), range(1, 4)):
        ahead = t + 1 + k
        inside = ahead < 15 and documents[b, t] == documents[b, ahead] != -1
        assert found[b, t, k - 1] == (labels[b, ahead] if inside else -100)


# -- starts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OWN_MATRIX)
@torch.no_grad()
def test_copy_lm_head(kind):
    """The output matrix is the target's, whatever stands before it; where nothing does, so are the words."""
    torch.manual_seed(0)
    model = tiny_model("gpt_neox")  # its output matrix has a bias in these tests
    model.get_output_embeddings().bias = nn.Parameter(torch.randn(VOCAB))
    mtp = get_mtp_model(model, HeadsConfig(depth=2, head_type=kind, init_strategy="copy_lm_head", dropout=0.0))
    for head in mtp.module.heads:
        assert torch.equal(head.output.weight, mtp.target.head.weight)
        assert torch.equal(head.output.bias, mtp.target.head.bias)
        assert head.output.weight.data_ptr() != mtp.target.head.weight.data_ptr()
    ids = torch.arange(3, 12)[None]
    same = torch.allclose(mtp.draft_logits(ids)[:, :, 1], model(ids).logits, atol=1e-4)
    assert same == (kind in ("identical", "medusa", "linear"))


@torch.no_grad()
def test_a_copied_matrix_follows_the_draft_vocabulary():
    mtp = get_mtp_model(tiny_model(), HeadsConfig(head_type="medusa", draft_vocab_size=10))
    ids = torch.tensor([3, 5, 8, 13, 21, 34, 55, 60, 70, 80])
    mtp.module.set_draft_vocabulary(ids)
    assert all(torch.equal(head.output.weight, mtp.target.head.weight[ids]) for head in mtp.module.heads)


@pytest.mark.parametrize("strategy", ["kaiming_uniform", "kaiming_normal", "xavier_uniform", "xavier_normal"])
def test_strategies_of_initialisation(strategy):
    """The spread of weights is what the strategy says; biases are zero."""
    mtp = get_mtp_model(tiny_model(), HeadsConfig(head_type="ffn", init_strategy=strategy))
    up = mtp.module.heads[0].body.parts[0].part[0]
    fan_in, fan_out = 32, 128
    wanted = math.sqrt(2 / fan_in) if "kaiming" in strategy else math.sqrt(2 / (fan_in + fan_out))
    assert float(up.weight.detach().std()) == pytest.approx(wanted, rel=0.05)
    largest = float(up.weight.detach().abs().max())
    assert (largest <= wanted * math.sqrt(3) + 1e-6) == ("uniform" in strategy)
    assert not up.bias.any()


def test_sharing_the_output_matrix():
    """Asked for, or because the vocabulary is large; then a head is small."""
    small, asked = (get_mtp_model(tiny_model(), HeadsConfig(share_unembedding=s)) for s in (None, True))
    assert small.module.heads[0].output is not None and asked.module.heads[0].output is None
    large = get_mtp_model(tiny_model(vocab_size=65536), HeadsConfig())
    assert large.module.heads[0].output is None
    assert large.module.unembedding(large.target, 1, False)[0] is large.target.head.weight
    with pytest.raises(ConfigError, match="always shares"):
        HeadsConfig(head_type="layer", share_unembedding=False)


def test_bad_settings_come_in_one_error():
    with pytest.raises(ConfigError) as caught:
        HeadsConfig(depth=0, num_layers=0, dropout=1.0)
    assert all(name in str(caught.value) for name in ("depth", "num_layers", "dropout"))
    assert [attention_heads(width) for width in (4096, 576, 32, 20, 7)] == [32, 9, 8, 5, 7]


# -- memory ------------------------------------------------------------------------------------------------------------


def test_layer_heads_are_made_again_in_the_backward_pass():
    """Four heads leave less behind than one head's activations, so memory hardly grows with K (Meta, section 2)."""

    def kept(depth: int, training: bool) -> int:
        mtp, sizes = make("layer", depth=depth).train(training), {}
        ids = torch.arange(3, 63).view(2, 30)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), t)[1], lambda t: t
        ):
            mtp(input_ids=ids)
        return sum(sizes.values())

    assert kept(4, training=True) < kept(1, training=False) < kept(4, training=False) / 3


# -- drafting is what was trained --------------------------------------------------------------------------------------


@functools.cache
def fitted(kind: str, share: bool | None = None, draft_vocab_size: int | None = None) -> MTPModel:
    """Heads that learned some of a leaning model's own text, enough that drafts hold now and then."""
    model = leaning_model()
    text = model.generate(**prompts(6, 9, 8, 7, 6, 9, seed=5), max_new_tokens=24, do_sample=False, pad_token_id=0)
    torch.manual_seed(0)
    mtp = get_mtp_model(
        model,
        HeadsConfig(depth=3, head_type=kind, dropout=0.0, share_unembedding=share, draft_vocab_size=draft_vocab_size),
    ).train()
    if draft_vocab_size is not None:
        mtp.module.set_draft_vocabulary(text.unique().flip(0)[:draft_vocab_size].sort().values)
    optimizer = torch.optim.AdamW(mtp.module.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        sum(loss.total for loss in mtp(input_ids=text[:, -26:])["mtp"]).backward()
        optimizer.step()
    mtp.eval()
    mtp._curve = CHEAP_ROWS
    return mtp


def run(mtp: MTPModel, inputs: dict[str, Tensor], **settings: Any) -> Any:
    return mtp.generate(**inputs, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **settings)


INPUTS = {"one": prompts(9, seed=18), "three": prompts(7, 2, 11), "six": prompts(3, 8, 5, 1, 9, 6)}
SHAPES = ["one", "six"]
KINDS = [(kind, None, None) for kind in TYPES] + [("mha_ffn", True, None), ("ffn", None, 40), ("medusa", True, 40)]


@pytest.mark.parametrize("batch", SHAPES)
@pytest.mark.parametrize(("kind", "share", "few"), KINDS)
def test_lossless_in_every_shape(kind, share, few, batch):
    """Chain, tree, lengths that adapt, a shorter chain, few slots: the tokens are transformers' own."""
    mtp, inputs = fitted(kind, share, few), INPUTS[batch]
    wanted = reference(mtp.model, inputs, max_new_tokens=16).tolist()
    tree = foretell.cartesian_tree([3, 2, 1])
    accepted = {}
    for name, settings in {
        "chain": {"num_draft_tokens": 3},
        "tree": {"num_draft_tokens": 3, "draft_tree": tree},
        "auto": {"num_draft_tokens": "auto"},
        "with lookup": {"num_draft_tokens": "auto", "drafter": "mtp+lookup"},
        "few slots": {"num_draft_tokens": 3, "slots": 2},
    }.items():
        out = run(mtp, inputs, max_new_tokens=16, **settings)
        assert out.sequences.tolist() == wanted, name
        accepted[name] = sum(map(sum, out.stats.accepted))
    assert accepted["chain"] > 0 and accepted["tree"] >= accepted["chain"]
    assert accepted["few slots"] == accepted["chain"], "slots change the order of work, not what is drafted"


@pytest.mark.parametrize(("kind", "share", "few"), KINDS)
def test_drafts_are_the_best_of_draft_logits(kind, share, few, monkeypatch):
    """What a head drafts while decoding, through its cache or its few kept states, is what it says teacher-forced."""
    mtp, inputs = fitted(kind, share, few), INPUTS["three"]
    drafter = mtp.drafter()
    seen = []
    plain = type(drafter).draft

    def spy(self, sequences, lengths, worth=None):
        drafts = plain(self, sequences, lengths, worth)
        seen.extend((list(s.tokens[: s.cached]), d.tokens) for s, d in zip(sequences, drafts, strict=True) if len(d))
        return drafts

    monkeypatch.setattr(type(drafter), "draft", spy)
    run(mtp, inputs, max_new_tokens=16, num_draft_tokens=3)
    assert len(seen) > 15
    for text, tokens in seen:
        assert tokens == mtp.draft_logits(torch.tensor([text]))[0, -1].argmax(-1).tolist()


def test_no_drafter_is_made_where_none_is_asked():
    """Packing heads takes time and memory: not for lookup, and not with drafting off."""
    mtp = get_mtp_model(leaning_model(), HeadsConfig(depth=2))
    run(mtp, INPUTS["one"], max_new_tokens=4, num_draft_tokens=0)
    run(mtp, INPUTS["one"], max_new_tokens=4, num_draft_tokens=2, drafter="lookup")
    assert not mtp._workspaces._packed
    run(mtp, INPUTS["one"], max_new_tokens=4, num_draft_tokens=2)
    assert mtp._workspaces._packed


def test_one_reading_of_the_heads_a_round():
    mtp = fitted("medusa")
    drafter = mtp.drafter()
    before = drafter.calls
    out = run(mtp, INPUTS["one"], max_new_tokens=20, num_draft_tokens=3)
    assert drafter.calls - before <= out.stats.verifications


@pytest.mark.parametrize("kind", TYPES)
def test_saved_heads_draft_the_same(kind, tmp_path):
    mtp = fitted(kind)
    mtp.save_pretrained(tmp_path)
    loaded = MTPModel.from_pretrained(mtp.model, tmp_path)
    assert loaded.mtp_config == mtp.mtp_config
    runs = [run(m, INPUTS["three"], max_new_tokens=16, num_draft_tokens=3) for m in (mtp, loaded)]
    assert runs[0].stats.accepted == runs[1].stats.accepted and torch.equal(runs[0].sequences, runs[1].sequences)


def test_new_weights_are_drafted_with():
    mtp = fitted.__wrapped__("linear")
    first = run(mtp, INPUTS["one"], max_new_tokens=20, num_draft_tokens=3)
    with torch.no_grad():
        for head in mtp.module.heads:
            head.output.weight.mul_(-1)
    second = run(mtp, INPUTS["one"], max_new_tokens=20, num_draft_tokens=3)
    assert torch.equal(first.sequences, second.sequences)
    assert sum(map(sum, second.stats.accepted)) < sum(map(sum, first.stats.accepted))


@pytest.mark.parametrize("kind", ["medusa", "mha_ffn"])
@pytest.mark.parametrize("drafts", ["greedy", "probabilistic", "tree"])
def test_sampling_follows_the_target(kind, drafts):
    """Second and third sampled token of many texts against the exact distribution, as a chi-square of the target."""
    mtp = fitted(kind)
    ids = torch.tensor([[7, 9, 7, 9]]).repeat(600, 1)
    settings: dict[str, Any] = {"num_draft_tokens": 2, "temperature": 1.3, "top_k": 6, "do_sample": True}
    if drafts == "tree":
        settings["draft_tree"] = foretell.cartesian_tree([2, 2])
    else:
        settings["draft_sample_method"] = drafts
    out = mtp.generate(ids, max_new_tokens=3, generator=torch.Generator().manual_seed(3), **settings)[:, 4:]
    with torch.no_grad():
        first = _warped(mtp, torch.tensor([[7, 9, 7, 9]]))[0]
        second = torch.zeros(VOCAB)
        for token in first.nonzero()[:, 0]:
            second += first[token] * _warped(mtp, torch.tensor([[7, 9, 7, 9, int(token)]]))[0]
    for place, wanted in ((0, first), (1, second)):
        kept = wanted * len(out) > 5
        counts = torch.bincount(out[:, place], minlength=VOCAB).float()
        assert not counts[wanted == 0].any()
        chi = float(((counts - len(out) * wanted)[kept] ** 2 / (len(out) * wanted)[kept]).sum())
        freedom = int(kept.sum()) - 1
        assert chi < freedom + 4 * math.sqrt(2 * max(freedom, 1)) + 4, (place, chi, freedom)


def _warped(mtp: MTPModel, ids: Tensor) -> Tensor:
    logits = mtp.model(ids).logits[:, -1] / 1.3
    cut = logits.topk(6).values[:, -1:]
    return logits.masked_fill(logits < cut, -torch.inf).softmax(-1)


def test_typical_acceptance_of_a_tree_is_lossy_and_says_so():
    mtp, inputs = fitted("medusa"), INPUTS["one"]
    common = {**inputs, "max_new_tokens": 20, "do_sample": True, "temperature": 1.5, "return_dict_in_generate": True}
    common |= {"num_draft_tokens": 3, "draft_tree": foretell.cartesian_tree([3, 2, 1])}
    outs = {
        policy: mtp.generate(**common, policy=policy, generator=torch.Generator().manual_seed(1))
        for policy in ("typical", "lossless")
    }
    assert not outs["typical"].stats.lossless and outs["lossless"].stats.lossless
    assert outs["typical"].stats.policy == "typical" and outs["typical"].stats.tau >= 1


# -- trees -------------------------------------------------------------------------------------------------------------


def test_a_tree_of_width_one_is_the_chain():
    mtp = fitted("medusa")
    for inputs in INPUTS.values():
        chain = run(mtp, inputs, max_new_tokens=20, num_draft_tokens=3)
        tree = run(mtp, inputs, max_new_tokens=20, num_draft_tokens=3, draft_tree=foretell.cartesian_tree([1, 1, 1]))
        assert chain.stats.records == tree.stats.records and torch.equal(chain.sequences, tree.sequences)
    assert foretell.cartesian_tree([1, 1, 1]) == [(0,), (0, 0), (0, 0, 0)]


def test_cartesian_trees():
    assert foretell.cartesian_tree([2, 2]) == [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    assert len(foretell.cartesian_tree([4, 3, 2])) == 4 + 12 + 24
    for bad in ([], [0], [2, -1], [1.5]):
        with pytest.raises(ValueError, match="widths"):
            foretell.cartesian_tree(bad)


def test_a_calibrated_tree_is_the_best_of_its_size():
    """Against all trees of small sizes: none expects more tokens."""
    accuracy = [[0.5, 0.25, 0.1], [0.4, 0.2, 0.15]]

    def expected(tree: list[tuple[int, ...]]) -> float:
        return sum(math.prod(accuracy[k][rank] for k, rank in enumerate(node)) for node in tree)

    nodes = [(i,) for i in range(3)] + [(i, j) for i in range(3) for j in range(3)]
    for size in range(1, 6):
        tree = foretell.calibrated_tree(accuracy, size)
        assert len(tree) == size and check_tree(tree, 2) == tree
        best = 0.0
        for chosen in itertools.combinations(nodes, size):
            if all(len(node) == 1 or node[:-1] in chosen for node in chosen):
                best = max(best, expected(list(chosen)))
        assert expected(tree) == pytest.approx(best)
    # the cost decides the size: free rows take all that helps, dear rows nothing
    assert len(foretell.calibrated_tree(accuracy, cost=lambda rows: 1.0)) == 12
    assert foretell.calibrated_tree(accuracy, cost=lambda rows: float(rows)) == []
    middle = foretell.calibrated_tree(accuracy, cost=lambda rows: 1 + 0.15 * rows)
    assert 0 < len(middle) < 8
    with pytest.raises(ValueError, match="neither size nor cost"):
        foretell.calibrated_tree(accuracy)
    with pytest.raises(ValueError, match="accuracy"):
        foretell.calibrated_tree([[1.5]], 3)


def test_accuracy_of_the_guesses_calibrates_a_tree():
    mtp = fitted("medusa")
    text = mtp.model.generate(**INPUTS["six"], max_new_tokens=24, do_sample=False, pad_token_id=0)
    rows = [{"input_ids": row[-24:].tolist()} for row in text]
    accuracy = foretell.head_accuracy(mtp, rows, guesses=3)
    logits = torch.cat([mtp.draft_logits(torch.tensor([row["input_ids"]])) for row in rows])
    for k in range(3):
        hits = [0, 0, 0]
        for b, t in itertools.product(range(len(rows)), range(24 - 2 - k)):
            best = logits[b, t, k].topk(3).indices.tolist()
            if rows[b]["input_ids"][t + 2 + k] in best:
                hits[best.index(rows[b]["input_ids"][t + 2 + k])] += 1
        assert accuracy[k] == pytest.approx([h / (len(rows) * (22 - k)) for h in hits])
    tree = foretell.calibrated_tree(accuracy, size=8)
    wanted = reference(mtp.model, INPUTS["six"], max_new_tokens=20)
    out = run(mtp, INPUTS["six"], max_new_tokens=20, num_draft_tokens=3, draft_tree=tree)
    assert torch.equal(out.sequences, wanted)
    chain = run(mtp, INPUTS["six"], max_new_tokens=20, num_draft_tokens=3)
    assert out.stats.tau >= chain.stats.tau
    with pytest.raises(ValueError, match="no label"):
        foretell.head_accuracy(mtp, [{"input_ids": [3, 4, 5]}])


@pytest.mark.parametrize(
    "tree", [[(1, 0)], [(0,), (0,)], [()], [(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)], [(-1,)], [(0.5,)]]
)
def test_trees_that_are_none_are_refused(tree):
    with pytest.raises(ValueError, match="draft_tree"):
        run(fitted("medusa"), INPUTS["one"], max_new_tokens=4, num_draft_tokens=3, draft_tree=tree)


def test_a_tree_needs_heads_and_a_fixed_length():
    tree = foretell.cartesian_tree([2, 1])
    with pytest.raises(ValueError, match="parallel heads"):
        run(fitted("medusa"), INPUTS["one"], max_new_tokens=4, num_draft_tokens="auto", draft_tree=tree)
    for more in ({"num_draft_tokens": 0}, {"num_draft_tokens": 3, "drafter": "lookup"}):
        with pytest.raises(ValueError, match="among the drafters"):
            run(fitted("medusa"), INPUTS["one"], max_new_tokens=4, draft_tree=tree, **more)
    sequential = get_mtp_model(tiny_model(), {"method": "sequential", "depth": 2})
    with pytest.raises(ValueError, match="sequential"):
        run(sequential, INPUTS["one"], max_new_tokens=4, num_draft_tokens=2, draft_tree=tree)


@pytest.mark.parametrize("head_type", TYPES)
def test_heads_that_learn_draft_beside_a_bf16_target(head_type):
    mtp = get_mtp_model(tiny_model().to(torch.bfloat16), {"method": "heads", "depth": 2, "head_type": head_type})
    mtp.make_trainable()  # fp32 masters, as while training measures tau
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = mtp.generate(ids, max_new_tokens=8, do_sample=False, num_draft_tokens=0)
    assert torch.equal(mtp.generate(ids, max_new_tokens=8, do_sample=False), plain)
