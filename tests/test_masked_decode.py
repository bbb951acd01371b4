"""Drafting with mask tokens: lossless in every layout, what was trained is what drafts, and no mask is ever kept."""

# B sequences, T prompt width, K masks of a block, R rows of a step, D hidden width, V vocabulary, L cached columns.

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drafters import leaning_model
from peft import PeftModel
from test_decode import CHEAP_ROWS, Recorder, ends, new_tokens_of, prompts, reference, texts, tokenizer
from test_sampling import LEAST_P, PROMPT, count, exact, p_value
from test_sampling import V as SMALL
from test_sampling import mtp as small_mtp
from tiny import ARCHITECTURES, VOCAB, tiny_model
from torch import Tensor, nn

import foretell
from foretell.decoding.adaptive import AdaptiveLength, CostCurve, FixedLength
from foretell.decoding.arguments import LAYOUTS
from foretell.decoding.loop import Decoder
from foretell.methods.masked import MaskedConfig
from foretell.methods.masked_drafter import MaskedDrafter
from foretell.models.fast import FusedLayer
from foretell.models.gated_lora import GatedLinear
from foretell.models.slot_cache import SlotCache
from foretell.mtp import MTPModel, get_mtp_model
from foretell.ops.tree import depths, lay_masks
from foretell.types import Draft, SequenceState

K = 3
NEW = 20
FEW = 15  # steps after which about half of the drafts hold
# prompts, slots. One token is a prompt too; five sequences of several lengths move between two slots
BATCHES = {
    "one": (prompts(9, seed=18), 64),
    "three": (prompts(7, 2, 11), 64),
    "five in two slots": (prompts(7, 1, 12, 4, 9, seed=33), 2),
}


@functools.cache
def target(name: str = "llama") -> nn.Module:
    return leaning_model(name)


@functools.cache
def fitted(steps: int = 40, **settings: Any) -> MTPModel:
    """A module that learned the target's own text of the prompts here, nearly all of it: some drafts are refused."""
    model, ids = target(), []
    for inputs, _ in BATCHES.values():
        ids += texts(inputs, reference(model, inputs, max_new_tokens=NEW + 4))
    ids_BT = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    mask_BT = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in ids], batch_first=True)
    torch.manual_seed(0)
    mtp = get_mtp_model(model, MaskedConfig(**{"depth": K, "lora_rank": 8, **settings})).train()
    mtp.make_trainable()
    optimizer = torch.optim.AdamW([p for p in mtp.module.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = mtp(input_ids=ids_BT, attention_mask=mask_BT)["mtp"]
        (sum(loss.total for loss in losses) / sum(loss.count for loss in losses)).backward()
        optimizer.step()
    mtp._curve = CHEAP_ROWS
    return mtp.eval()


def shaken(mtp: MTPModel, seed: int = 7, spread: float = 0.1) -> MTPModel:
    """Embeddings and adapters away from their neutral start, so that all of them count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mtp.module.rows.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return mtp


def knowing(model: nn.Module, noise: float = 0.3, **settings: Any) -> MTPModel:
    """Untrained, yet it drafts well on a leaning_model: the sampler mostly says the embedding it reads.

    noise: how much of a mask's state it mixes in, through random weights.
    """
    torch.manual_seed(0)
    mtp = shaken(get_mtp_model(model, MaskedConfig(**{"depth": K, "lora_rank": 4, **settings})))
    if mtp.mtp_config.draft_vocab_size is not None:  # not the lowest, so that the map counts
        mtp.module.set_draft_vocabulary(torch.arange(VOCAB)[-mtp.mtp_config.draft_vocab_size :])
    mtp._curve = CHEAP_ROWS
    D, generator = mtp.target.hidden_size, torch.Generator().manual_seed(8)
    with torch.no_grad():
        size = mtp.target.embed(torch.arange(mtp.target.vocab_size)).pow(2).mean().sqrt()
        first, second = (linear.weight for linear in mtp.module.sampler.linears)
        first[:, :D] = torch.eye(D) * 0.1 / size  # so small that SiLU is nearly linear; the norm undoes it
        first[:, D:] = torch.randn(D, D, generator=generator) * 0.1 * noise / D**0.5
        second.zero_()
    return mtp


def run(mtp: MTPModel, inputs: dict[str, Tensor], **settings: Any) -> Any:
    """Our greedy generate, with stats."""
    return mtp.generate(**inputs, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **settings)


def total(lists: list[list[int]]) -> int:
    return sum(map(sum, lists))


# -- losslessness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drafts_are_accepted_fully_and_partly(layout):
    """The gate of all that follows: drafts of full length that were accepted whole, in part, and not at all."""
    mtp, seen, emitted = fitted(), set(), []
    for inputs, slots in BATCHES.values():
        stats = run(mtp, inputs, max_new_tokens=NEW, draft_layout=layout, slots=slots).stats
        seen |= {v.accepted for record in stats.records for v in record[:-1] if v.depth == K + (layout == "two_pass")}
        emitted += [e for each in stats.emitted for e in each]
    assert sum(emitted) / len(emitted) > 2
    # in two passes the first draft is the target's own
    assert seen >= ({1, 2, K + 1} if layout == "two_pass" else {0, 1, K})


@pytest.mark.parametrize("drafter", ["mtp", "mtp+lookup"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_is_transformers_own(layout, drafter):
    mtp = fitted()
    for name, (inputs, slots) in BATCHES.items():
        T = inputs["input_ids"].shape[1]
        eos = ends(mtp.model, inputs, NEW) if len(inputs["input_ids"]) == 5 else None
        wanted = reference(mtp.model, inputs, max_new_tokens=NEW, eos_token_id=eos)
        for n in (1, 2, K, "auto"):
            settings = {"num_draft_tokens": n, "draft_layout": layout, "drafter": drafter, "slots": slots}
            out = run(mtp, inputs, max_new_tokens=NEW, eos_token_id=eos, **settings)
            assert out.sequences.tolist() == wanted.tolist(), (name, n)
            assert [sum(e) for e in out.stats.emitted] == new_tokens_of(wanted, T, eos)
            assert out.stats.lossless and total(out.stats.accepted) > 0, (name, n)
            assert n == "auto" or max(v.depth for record in out.stats.records for v in record) == n


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name):
    inputs, mtp = prompts(11, 6, 14), knowing(target(name))
    wanted = reference(mtp.model, inputs, max_new_tokens=16)
    out = run(mtp, inputs, max_new_tokens=16, draft_layout="quadratic", slots=2)
    assert out.sequences.tolist() == wanted.tolist()
    assert total(out.stats.accepted) > 8 and max(map(max, out.stats.accepted)) > 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ends_inside_a_draft(layout):
    """An end token in each place of the text, and a length limit there."""
    mtp, inputs = fitted(), BATCHES["three"][0]
    whole, cut = reference(mtp.model, inputs, max_new_tokens=NEW), 0
    for place in range(1, 10):
        for settings in (
            {"max_new_tokens": NEW, "eos_token_id": [int(whole[0, 11 + place - 1]), int(whole[2, 11 + 12])]},
            {"max_new_tokens": place},
        ):
            out = run(mtp, inputs, draft_layout=layout, **settings)
            assert out.sequences.tolist() == reference(mtp.model, inputs, **settings).tolist()
            cut += sum(record[-1].emitted == record[-1].accepted for record in out.stats.records)
    assert cut > 10, "ends should fall on drafts, not only on the target's own tokens"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_processors_and_stop_strings(layout):
    mtp, inputs = fitted(), BATCHES["three"][0]
    whole = reference(mtp.model, inputs, max_new_tokens=NEW)
    penalty = {"max_new_tokens": NEW, "repetition_penalty": 1.3}
    wanted = reference(mtp.model, inputs, **penalty)
    assert wanted.tolist() != whole.tolist()
    out = run(mtp, inputs, draft_layout=layout, **penalty)
    assert out.sequences.tolist() == wanted.tolist() and total(out.stats.accepted) > 0
    stops = [tokenizer().decode(whole[b, 11 + 5 + b : 11 + 7 + b]) for b in range(3)]
    stopping = {"max_new_tokens": NEW, "stop_strings": stops, "eos_token_id": 2, "tokenizer": tokenizer()}
    wanted = mtp.model.generate(**inputs, do_sample=False, pad_token_id=0, **stopping)
    assert 11 + 5 < wanted.shape[1] < 11 + NEW
    assert run(mtp, inputs, draft_layout=layout, **stopping).sequences.tolist() == wanted.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_streamers_and_transformers_own_door(layout):
    mtp, inputs = fitted(), BATCHES["one"][0]
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    theirs, ours, through = Recorder(), Recorder(), Recorder()
    wanted = mtp.model.generate(**inputs, streamer=theirs, **settings)
    mtp.generate(**inputs, streamer=ours, draft_layout=layout, **settings)
    door = foretell.custom_generate(mtp, draft_layout=layout)
    out = mtp.model.generate(**inputs, streamer=through, custom_generate=door, **settings)
    assert out.tolist() == wanted.tolist()
    assert ours.told == through.told == theirs.told and ours.ends == through.ends == 1


def test_blocks_beside_another_drafter_beyond_the_text():
    """Beside lookup there are more rows that carry masks than the module drafts alone: the cache grows."""
    mtp, far = knowing(target(), noise=1.0), 0
    for seed in (0, 1, 5, 7):
        inputs = prompts(8, seed=seed)
        out = run(mtp, inputs, max_new_tokens=36, drafter="mtp+lookup", draft_layout="quadratic")
        assert out.sequences.tolist() == reference(target(), inputs, max_new_tokens=36).tolist()
        cached = 7
        for v in out.stats.records[0]:
            far += cached + (1 + v.drafted) * (1 + K) > 8 + 36
            cached += v.emitted
    assert far > 2


# -- sampling ----------------------------------------------------------------------------------------------------------


@functools.cache
def small() -> MTPModel:
    """Masks on the target of test_sampling, whose distribution is known exactly."""
    return knowing(small_mtp().model, noise=0.6)


@pytest.mark.parametrize(
    ("layout", "drafts", "drafter"),
    [
        ("quadratic", "greedy", "mtp"),
        ("quadratic", "probabilistic", "mtp"),
        ("two_pass", "greedy", "mtp"),
        ("two_pass", "probabilistic", "mtp"),
        ("linear", "probabilistic", "mtp"),
        ("auto", "probabilistic", "mtp+lookup"),
    ],
)
def test_sampling_follows_the_target(layout, drafts, drafter):
    ids = torch.tensor([PROMPT]).repeat(700, 1)
    out = small().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        max_new_tokens=4,
        generator=torch.Generator().manual_seed(0),
        slots=256,
        return_dict_in_generate=True,
        draft_layout=layout,
        draft_sample_method=drafts,
        drafter=drafter,
    )
    drafted, accepted = total(out.stats.drafted), total(out.stats.accepted)
    assert out.stats.lossless and 0.05 * drafted < accepted < 0.95 * drafted
    new_BN = out.sequences[:, len(PROMPT) :]
    # the second to fourth token hang on drafts: fewer cells see a smaller error
    probs, seen = exact("plain", 3), count(new_BN[:, :3])
    assert p_value(seen, probs) > LEAST_P
    assert p_value(seen.view(SMALL, -1).sum(0), probs.view(SMALL, -1).sum(0)) > LEAST_P
    assert p_value(count(new_BN).view(-1, SMALL).sum(0), exact("plain", 4).view(-1, SMALL).sum(0)) > LEAST_P


# -- drafting is what was trained --------------------------------------------------------------------------------------

Seen = list[tuple[list[int], list[int], list[float]]]  # text so far, drafts, their confidences


@pytest.fixture
def drafted(monkeypatch) -> Seen:
    """Everything that masked drafters propose."""
    seen: Seen = []
    plain = MaskedDrafter.draft

    def spy(self, sequences, lengths, worth=None):
        drafts = plain(self, sequences, lengths, worth)
        seen.extend((list(s.tokens), list(d.tokens), list(d.confidence)) for s, d in zip(sequences, drafts) if len(d))
        return drafts

    monkeypatch.setattr(MaskedDrafter, "draft", spy)
    return seen


def check_drafts(mtp: MTPModel, seen: Seen, layout: str, tolerance: float = 2e-4) -> None:
    """Draft k is the best of draft_logits at the last cached token, the sampler reading the drafts before it.

    In two passes the first draft is the target's next token, and the masks hang below the token before that one.
    """
    if layout == "two_pass":
        for text, tokens, confidences in seen:
            with torch.no_grad():
                own_V = mtp.model(torch.tensor([text])).logits[0, -1].float().softmax(-1)
            assert float(own_V.max() - own_V[tokens[0]]) < tolerance
            assert confidences[0] == pytest.approx(float(own_V[tokens[0]]), abs=tolerance)
        seen = [(text + tokens[:1], tokens[1:], confidences[1:]) for text, tokens, confidences in seen]
    rows = [torch.tensor(text + tokens) for text, tokens, _ in seen]
    ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask_BT = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    probs_BTKV = mtp.draft_logits(ids_BT, mask_BT).float().softmax(-1)
    compared, beside = 0, 0
    for b, (text, tokens, confidences) in enumerate(seen):
        t = len(text) - 2
        for k, (token, confidence) in enumerate(zip(tokens, confidences, strict=True)):
            row_V = probs_BTKV[b, t, k]
            # confidences, not only choices: masks below a stale row are off by far more than rounding
            assert confidence == pytest.approx(float(row_V[token]), abs=tolerance)
            assert float(row_V.max() - row_V[token]) < tolerance
            compared += 1
            others = [probs_BTKV[b, t - 1, k]] * (t > 0) + [probs_BTKV[b, t, k - 1]] * (k > 0)
            beside += any(abs(float(other_V.max()) - confidence) < tolerance for other_V in others)
    assert compared > 30 and beside < compared / 4, "rows and depths beside should not fit: else nothing is compared"


@pytest.mark.parametrize("drafter", ["mtp", "mtp+lookup"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_trained_is_what_drafts(layout, drafter, drafted):
    """Through accepted paths of all lengths, moves between slots, and rows of a tree that are not the module's own."""
    mtp, (inputs, slots) = fitted(FEW), BATCHES["five in two slots"]
    out = run(mtp, inputs, max_new_tokens=NEW, draft_layout=layout, drafter=drafter, slots=slots)
    assert 0 < total(out.stats.accepted) < total(out.stats.drafted)
    check_drafts(mtp, drafted, layout)


VARIANTS: dict[str, dict[str, Any]] = {
    "distinct masks": {"mask_tokens": "distinct"},
    "fused": {"fuse_weights": True, "lora_use_rslora": True},
    "few linears": {"lora_modules": ["q_proj", "v_proj", "down_proj"]},
    "reduced vocabulary": {"draft_vocab_size": 60},
    "depth one": {"depth": 1},
    "depth six": {"depth": 6},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_drafts_as_it_was_trained(variant, drafted):
    mtp, inputs = knowing(target(), noise=0.6, **VARIANTS[variant]), prompts(11, 6, 14)
    out = run(mtp, inputs, max_new_tokens=30, draft_layout="quadratic")
    assert out.sequences.tolist() == reference(target(), inputs, max_new_tokens=30).tolist()
    check_drafts(mtp, drafted, "quadratic")


def test_without_a_sampler_masks_speak_for_themselves(drafted):
    mtp, (inputs, slots) = fitted(sampler=False), BATCHES["three"]
    out = run(mtp, inputs, max_new_tokens=NEW, draft_layout="quadratic", slots=slots)
    assert out.sequences.tolist() == reference(mtp.model, inputs, max_new_tokens=NEW).tolist()
    assert total(out.stats.accepted) > 10
    check_drafts(mtp, drafted, "quadratic")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_trained_is_what_drafts_in_every_architecture(name, drafted):
    """Windows, scaled embeddings, soft-caps, experts, compressed keys; fused layers and single linears."""
    mtp = knowing(target(name), noise=0.6)
    run(mtp, prompts(11, 6, 14), max_new_tokens=12, draft_layout="quadratic")
    check_drafts(mtp, drafted, "quadratic")
    view = list(mtp.target.view().modules())
    fused = any(isinstance(part, FusedLayer) and part.added for part in view)
    assert fused == (name in ("llama", "qwen2", "qwen3", "mistral"))
    assert fused != any(isinstance(part, GatedLinear) for part in view)


def test_what_is_trained_is_what_drafts_in_other_precisions(drafted):
    """In fp64 no packed weights: the model's own layers, with the adapters' products added."""
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.1)):
        drafted.clear()
        mtp = knowing(copy.deepcopy(target()).to(dtype), noise=0.6)
        inputs = prompts(11, 6, 14)
        out = run(mtp, inputs, max_new_tokens=16, draft_layout="quadratic")
        if dtype == torch.float64:
            assert not any(isinstance(part, FusedLayer) for part in mtp.target.view().modules())
            assert out.sequences.tolist() == reference(mtp.model, inputs, max_new_tokens=16).tolist()
            check_drafts(mtp, drafted, "quadratic", tolerance)
        else:  # two orders of rounding to 8 bits: most choices are the same
            same = [
                mtp.draft_logits(torch.tensor([text]))[0, -2, 0].argmax() == tokens[0] for text, tokens, _ in drafted
            ]
            assert len(same) > 15 and sum(same) > 0.8 * len(same)


# -- layouts -----------------------------------------------------------------------------------------------------------


def rows_of(stats: Any, prompt: int, masks: Callable[[int], int]) -> bool:
    """Whether the rows of a single sequence are its prompt's, and in each step one, the drafts, and that many masks."""
    return stats.target_rows == prompt - 1 + sum(1 + d + masks(d) for d in stats.drafted[0])


@pytest.mark.parametrize("n", [1, 2, K])
def test_linear_drafts_again_only_if_all_was_accepted(n):
    refused = again = 0
    for inputs, _ in BATCHES.values():
        for b in range(len(inputs["input_ids"])):
            one = {name: value[b : b + 1, inputs["attention_mask"][b].argmax() :] for name, value in inputs.items()}
            stats = run(fitted(FEW), one, max_new_tokens=NEW, num_draft_tokens=n, draft_layout="linear").stats
            assert stats.drafted[0][0] == 0
            for before, after in itertools.pairwise(stats.records[0]):
                assert after.drafted == (n if before.accepted == before.drafted else 0)
                refused += before.accepted < before.drafted
                again += before.accepted == before.drafted == n
            assert rows_of(stats, one["input_ids"].shape[1], lambda d: n)
    assert refused > 2 and again > 2


@pytest.mark.parametrize("n", [1, 2, K])
def test_quadratic_always_drafts_again(n):
    """Also where the first draft was refused, which takes a block below the last verified token: (n + 1)^2 rows."""
    refused = 0
    for inputs, slots in BATCHES.values():
        settings = {"num_draft_tokens": n, "draft_layout": "quadratic", "slots": slots}
        stats = run(fitted(FEW), inputs, max_new_tokens=NEW, **settings).stats
        assert all(each == [0] + [n] * (len(each) - 1) for each in stats.drafted)
        refused += sum(v.accepted == 0 for record in stats.records for v in record[1:-1])
        if len(stats.records) == 1:
            assert rows_of(stats, inputs["input_ids"].shape[1], lambda d: (1 + d) * n)
            assert sum(1 + d + (1 + d) * n == (n + 1) ** 2 for d in stats.drafted[0]) == len(stats.drafted[0]) - 1
    assert refused > 2


@pytest.mark.parametrize("n", [1, 2, K])
def test_two_passes_give_one_token_for_sure(n):
    """The first pass knows the next token exactly: a verification gives it, the accepted masks', and its own."""
    mtp, inputs = fitted(), BATCHES["one"][0]
    stats = run(mtp, inputs, max_new_tokens=NEW, num_draft_tokens=n, draft_layout="two_pass").stats
    assert set(stats.drafted[0]) == {n} and stats.accept_at[0] == 1.0
    assert min(stats.emitted[0][:-1]) >= 2
    assert rows_of(stats, 9, lambda d: 0)
    # the first pass, then the sampler once a mask
    assert stats.draft_forwards == stats.verifications * (1 + n - 1)
    linear = run(mtp, inputs, max_new_tokens=NEW, num_draft_tokens=n, draft_layout="linear").stats
    assert stats.verifications <= linear.verifications


@pytest.mark.parametrize("drafter", ["mtp", "mtp+lookup"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_kept_is_the_accepted_path_and_no_mask(layout, drafter):
    """Every cached column is what plain decoding leaves there."""
    mtp, (inputs, _) = fitted(), BATCHES["five in two slots"]
    kept = {name: columns(mtp, inputs, name, drafter) for name in ("off", layout)}
    for index, plain_LN in kept["off"].items():
        found_LN = kept[layout][index]
        L = min(len(plain_LN), len(found_LN))
        assert int(inputs["attention_mask"][index].sum()) + NEW - 2 - K < L
        # the sums of other shapes, through a few layers
        torch.testing.assert_close(found_LN[:L], plain_LN[:L], atol=1e-4, rtol=1e-4)
        assert not torch.isclose(found_LN[1:L], plain_LN[: L - 1], atol=1e-2).all(1).any(), "the gate"


def columns(mtp: MTPModel, inputs: dict[str, Tensor], layout: str, drafter: str) -> dict[int, Tensor]:
    """[L, N] all keys and values of each sequence when it leaves."""
    kept: dict[int, Tensor] = {}
    # a door of our own to the decoder, which tells of each sequence that leaves
    settings: dict[str, Any] = {"num_draft_tokens": 0} if layout == "off" else {"draft_layout": layout}
    plain = Decoder.run

    def spy(self, *args: Any, **kwargs: Any) -> Any:
        def leave(sequence: SequenceState) -> None:
            cache = self.cache
            at = slice(sequence.slot * cache.capacity, sequence.slot * cache.capacity + sequence.cached)
            parts = [flat[at].flatten(1) for layer in sorted(cache._storage) for flat in cache._storage[layer]]
            kept[sequence.index] = torch.cat(parts, dim=1).clone()

        return plain(self, *args, **{**kwargs, "leave": leave})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "run", spy)
        run(mtp, inputs, max_new_tokens=NEW, drafter=drafter, slots=2, **settings)
    return kept


# -- ordinary tokens are the target's ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt_neox", "deepseek_v3"])
def test_masks_change_nothing_for_ordinary_rows(name):
    """Two sequences of different lengths, each four tokens and a block below the second and the fourth."""
    mtp = shaken(get_mtp_model(target(name), MaskedConfig(depth=2, lora_rank=4)))
    ids = torch.randint(3, VOCAB, (2, 4), generator=torch.Generator().manual_seed(3)).tolist()
    parents = [[-1, 0, 1, 2], [-1, 0, 1, 2]]
    plain_BRD = step(mtp, ids, parents, None)
    _, steps = lay_masks(parents, ids, 2, [[3, 1], [1, 3]])
    first_BRD = step(mtp, ids, parents, steps)
    torch.testing.assert_close(first_BRD[:, :4], plain_BRD, atol=1e-5 * float(plain_BRD.abs().max()), rtol=1e-5)
    other_BRD = step(shaken(mtp, seed=9, spread=1.0), ids, parents, steps)
    assert torch.equal(other_BRD[:, :4], first_BRD[:, :4]), "not one bit of an adapter reaches an ordinary row"
    assert not torch.isclose(other_BRD[:, 4:], first_BRD[:, 4:], atol=1e-2).all(-1).any(), "the gate"


def step(mtp: MTPModel, ids: list[list[int]], parents: list[list[int]], steps: list[list[int]] | None) -> Tensor:
    """States of these rows on top of a text of five and one of three tokens."""
    mtp.target.refresh()
    cache, lengths_B = SlotCache(2, 40), torch.tensor([5, 3])
    text_BT = torch.arange(10, 20).view(2, 5)
    mtp.target.forward_rows(text_BT, torch.zeros_like(lengths_B), cache, visible=5, valid_rows_B=lengths_B)
    depths = []
    for row_parents in parents:
        depth: list[int] = []
        for parent in row_parents:
            depth.append(0 if parent < 0 else depth[parent] + 1)
        depths.append(depth)
    return mtp.target.forward_rows(
        torch.tensor(ids),
        lengths_B,
        cache,
        position_ids_BR=lengths_B[:, None] + torch.tensor(depths),
        parents_BR=torch.tensor(parents),
        visible=5 + len(ids[0]),
        steps_BR=None if steps is None else torch.tensor(steps),
    ).post_norm_BRD


@torch.no_grad()
def test_each_mask_reads_its_own_embedding():
    steps_BR, text_BRD = torch.tensor([[0, 1, 2, 0], [3, 0, 2, 1]]), torch.randn(2, 4, 32)
    for kind in ("distinct", "shared"):
        rows = shaken(get_mtp_model(target(), MaskedConfig(depth=3, mask_tokens=kind))).module.rows
        for b, i in itertools.product(range(2), range(4)):
            step = int(steps_BR[b, i])
            own_D = rows.embedding[step - 1 if kind == "distinct" else 0]
            wanted_D = own_D if step else text_BRD[b, i]
            assert torch.equal(rows.embed(text_BRD, steps_BR)[b, i], wanted_D)
    noise = get_mtp_model(target(), MaskedConfig(depth=3, mask_tokens="noise")).module.rows
    found_BRD, every_VD = noise.embed(text_BRD, steps_BR), target().get_input_embeddings().weight
    assert torch.equal(found_BRD[steps_BR == 0], text_BRD[steps_BR == 0])
    for row_D in found_BRD[steps_BR > 0]:
        assert (every_VD == row_D).all(-1).any(), "noise is some token's embedding"


def test_without_drafts_no_mask_is_read():
    """Broken adapters cannot be noticed where nobody reads a mask, nor does any row come of one."""
    mtp, inputs = knowing(target()), BATCHES["three"][0]
    with torch.no_grad():
        for parameter in mtp.module.parameters():
            parameter.fill_(float("nan"))
    out = run(mtp, inputs, max_new_tokens=NEW, num_draft_tokens=0)
    assert out.sequences.tolist() == reference(target(), inputs, max_new_tokens=NEW).tolist()
    assert out.stats.target_rows == 3 * 10 + 3 * NEW and out.stats.draft_forwards == 0


# -- where masks pay ---------------------------------------------------------------------------------------------------

FLAT = CostCurve({1: 1.0, 4096: 1.001})
MILD = CostCurve({1: 1.0, 64: 3.0})
STEEP = CostCurve({1: 1.0, 64: 64.0})


def chain(n: int, confidence: float = 0.5) -> Draft:
    draft = Draft()
    for i in range(n):
        draft.add(i, i - 1, confidence, "mtp")
    return draft


def adaptive(curve: CostCurve, share: float, batch: int = 1, longest: int = 4, kind: type = FixedLength) -> Any:
    """One that has seen this share of drafts accepted, for a while; told that drafting itself takes no time."""
    rng, made = random.Random(0), kind(curve, longest, {})
    for _ in range(100):
        made.begin_round([10**6] * batch)
        drafts = [chain(longest, share) for _ in range(batch)]
        told = []
        for _ in drafts:
            right = next((i for i in range(longest) if rng.random() > share), longest)
            told.append([*range(right), 50])
        made.learn(drafts, told, {}, batch * (1 + longest))
    made.begin_round([10**6] * batch)
    return made


def test_free_rows_all_carry_whole_blocks():
    for batch, n in ((1, 4), (3, 2)):
        masks, rows = adaptive(FLAT, 0.8, batch).paying_blocks("mtp", [chain(n)] * batch, 4)
        assert masks == 4 and [sorted(each) for each in rows] == [list(range(n + 1))] * batch


def test_dear_rows_and_hopeless_drafts_carry_none_but_a_probe_now_and_then():
    for curve, share in ((STEEP, 0.3), (MILD, 0.0)):
        one = adaptive(curve, share)
        laid = []
        for _ in range(300):
            masks, rows = one.paying_blocks("mtp", [chain(0)], 4)
            assert (masks == 0) == (not any(rows))
            assert masks <= 2, "a probe is small"
            if masks:
                laid.append(rows)
        assert 3 <= len(laid) <= 12 and all(rows == [[0]] for rows in laid)


def test_blocks_hang_where_the_path_is_likely_to_end():
    """Dear rows, but not too dear: one block, below the refused draft's parent or the last token."""
    for chances, wanted in (([0.95, 0.95, 0.95], 3), ([0.95, 0.05, 0.9], 1), ([0.05, 0.9, 0.9], 0)):
        one = adaptive(MILD, 0.7)
        draft = chain(3)
        draft.confidence = chances
        one._table.clear()  # chances as the drafts say
        _, rows = one.paying_blocks("mtp", [draft], 4)
        assert rows[0] and rows[0][0] == wanted, (chances, rows)


def test_blocks_are_the_best_by_their_definition():
    """Of all numbers of masks and blocks those that gain most tokens, less the time they take at the rate of now."""
    rng, some = random.Random(2), set()
    for _ in range(120):
        batch = rng.choice([1, 1, 2, 4])
        curve = CostCurve({1: 1.0, 8: 1.0 + rng.random(), 64: 2.5 + 6 * rng.random()})
        one = adaptive(curve, rng.random(), batch)
        one._wait["masks"] = 10**6  # no probe
        drafts = [chain(rng.randint(0, 4), rng.random()) for _ in range(batch)]
        rate, base = one._rate, batch * (1 + max(map(len, drafts)))
        ends = []
        for draft in drafts:
            reached = [1.0, *one.chances(draft), 0.0]
            ends.append([a - b for a, b in itertools.pairwise(reached)])
        values = {(0, 0): 0.0}
        for masks in range(1, 5):
            gains = []
            for m in range(1, masks + 1):
                tokens = sum(math.prod(one._holds("mtp", k) for k in range(1, i + 1)) for i in range(1, m + 1))
                gains.append(tokens - rate * (one.cost(batch * (1 + m)) - one.cost(batch)) / batch)
            for groups in range(1, 6):
                likely = sum(sum(sorted(each)[::-1][:groups]) for each in ends)
                taken = one.cost(base + batch * groups * masks) - one.cost(base)
                values[masks, groups] = max(*gains, 0.0) * likely - rate * taken
        masks, rows = one.paying_blocks("mtp", drafts, 4)
        groups = max(map(len, rows))
        assert values[masks, groups] == pytest.approx(max(values.values()), abs=1e-9)
        for each, row in zip(ends, rows, strict=True):
            assert sorted(each[i] for i in row) == pytest.approx(sorted(sorted(each)[::-1][:groups])[-len(row) :])
        some.add((masks, groups))
    assert len(some) > 5 and (0, 0) in some


def test_a_fixed_length_stays_fixed():
    """Whatever rows cost and whatever was accepted: only the masks' layout adapts."""
    one = adaptive(STEEP, 0.0, batch=2)
    drafts = [chain(4), chain(2)]
    assert one.begin_round([2, 2]) == [4, 4] and one.worth("mtp", [chain(3)] * 2) == [True, True]
    assert one.prune(drafts) is drafts
    free = AdaptiveLength(STEEP, 4)
    free.begin_round([9, 9])
    assert [len(d) for d in free.prune(drafts)] == [0, 0], "the gate"


def test_what_is_verified_does_not_hang_on_what_was_drawn():
    """Who drops drawn tokens for being unlikely keeps others than were promised, and the text is not the target's."""
    rng, kept = random.Random(3), {"drawn": set(), "chosen": set()}
    for _ in range(60):
        curve = CostCurve({1: 1.0, 64: 1.0 + 0.2 * 63})
        parents = [-1, *[rng.randrange(-1, i) for i in range(1, 5)]]
        for kind, probs in (("drawn", torch.ones(VOCAB) / VOCAB), ("chosen", None)):
            found = []
            for _ in range(3):
                draft = Draft(probs=[] if kind == "drawn" else None)
                for i, parent in enumerate(parents):
                    draft.add(10 * i + rng.randrange(10), parent, rng.random(), "mtp", probs)
                # of five tokens in tens, the tens tell where each stood
                found.append(tuple(token // 10 for token in AdaptiveLength(curve, 8).prune([draft])[0].tokens))
            kept[kind].add(len(set(found)))
    assert kept["drawn"] == {1} and max(kept["chosen"]) > 1


def masks_read(stats: Any, prompt: int) -> int:
    """Mask rows of a single sequence."""
    return stats.target_rows - (prompt - 1) - sum(1 + d for d in stats.drafted[0])


@pytest.mark.parametrize("n", [K, "auto"])
def test_auto_follows_the_machine(n):
    """The same module and text on two machines."""
    mtp, inputs = copy.copy(fitted()), BATCHES["one"][0]
    told = {}
    for name, curve in (("flat", FLAT), ("steep", STEEP)):
        mtp.release()
        mtp._curve = curve
        for layout in ("auto", "quadratic"):
            length = n if layout == "auto" else K
            out = run(mtp, inputs, max_new_tokens=60, num_draft_tokens=length, draft_layout=layout)
            assert out.sequences.tolist() == reference(mtp.model, inputs, max_new_tokens=60).tolist()
            told[name, layout] = out.stats
    flat, steep, all_rows = told["flat", "auto"], told["steep", "auto"], told["flat", "quadratic"]
    if n == K:
        assert flat.tau > 0.9 * all_rows.tau and masks_read(flat, 9) > 0.7 * masks_read(all_rows, 9)
    assert flat.tau > 1.5
    assert masks_read(steep, 9) < 0.1 * masks_read(all_rows, 9)


# -- rows of a step ----------------------------------------------------------------------------------------------------


def test_lay_masks_against_its_definition():
    """A block is a chain below its row, each mask says which it is, a sequence with fewer blocks is filled up."""
    rng = random.Random(4)
    for _ in range(100):
        batch, rows, masks = rng.randint(1, 3), rng.randint(1, 5), rng.randint(1, 4)
        parents = [[-1, *[rng.randrange(i) for i in range(1, rows)]] for _ in range(batch)]
        ids = [[rng.randrange(3, 90) for _ in range(rows)] for _ in range(batch)]
        carriers = [rng.sample(range(rows), rng.randint(0, rows)) for _ in range(batch)]
        before = copy.deepcopy((parents, ids))
        blocks, steps = lay_masks(parents, ids, masks, carriers)
        R = rows + masks * max(map(len, carriers))
        for b in range(batch):
            assert len(parents[b]) == len(ids[b]) == len(steps[b]) == R
            assert (parents[b][:rows], ids[b][:rows]) == (before[0][b], before[1][b]) and not any(steps[b][:rows])
            assert list(blocks[b]) == carriers[b]
            taken = set(range(rows))
            for row, first in blocks[b].items():
                mine = list(range(first, first + masks))
                assert steps[b][first : first + masks] == list(range(1, masks + 1))
                assert [parents[b][i] for i in mine] == [row, *mine[:-1]]
                assert not taken & set(mine) and min(mine) >= rows
                taken |= set(mine)
            assert all(parents[b][i] == -2 and steps[b][i] == 0 for i in set(range(R)) - taken)


def test_a_mask_stands_as_far_behind_its_token_as_it_looks_ahead(monkeypatch):
    """Positions, embeddings and parents of the rows that the target is really given, ragged ones among them."""
    mtp, (inputs, slots) = knowing(target(), mask_tokens="distinct"), BATCHES["five in two slots"]
    plain, ragged, blocks = type(mtp.target).forward_rows, 0, 0

    def spy(self, ids_BR, lengths_B, cache, **given):
        nonlocal ragged, blocks
        if given.get("steps_BR") is not None:
            parents_BR = given.get("parents_BR")
            if parents_BR is None:  # a chain: the self-check's
                parents_BR = (torch.arange(ids_BR.shape[1]) - 1).expand_as(ids_BR)
            depth_BR = depths(parents_BR)
            if given.get("position_ids_BR") is not None:
                depth_BR = given["position_ids_BR"] - lengths_B[:, None]
            for ids, step, parent, depth in zip(ids_BR, given["steps_BR"], parents_BR, depth_BR):
                for i in (step > 0).nonzero()[:, 0].tolist():
                    token = i
                    while step[token]:
                        token = int(parent[token])
                    assert depth[i] == depth[token] + step[i] and ids[i] == 0
                    blocks += int(step[i]) == 1
                ragged += int((parent == -2).any())
        return plain(self, ids_BR, lengths_B, cache, **given)

    monkeypatch.setattr(type(mtp.target), "forward_rows", spy)
    for layout in ("linear", "quadratic"):
        out = run(mtp, inputs, max_new_tokens=NEW, draft_layout=layout, slots=slots)
        assert out.sequences.tolist() == reference(mtp.model, inputs, max_new_tokens=NEW).tolist()
    assert blocks > 20 and ragged > 0


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"draft_layout": "cubic"}, "draft_layout.*cubic.*linear, quadratic, auto, two_pass"),
        ({"draft_layout": "linear", "drafter": "lookup"}, "draft_layout.*lookup"),
        ({"draft_layout": "linear", "num_draft_tokens": 0}, "draft_layout.*num_draft_tokens=0"),
        ({"num_draft_tokens": K + 1, "draft_layout": "quadratic"}, f"num_draft_tokens: got {K + 1}.*at most {K}"),
        ({"num_draft_tokens": -1, "draft_layout": "quadratic"}, "num_draft_tokens: got -1"),
        ({"draft_tree": [(0,)]}, "draft_tree"),
    ],
)
def test_what_masks_cannot_do_is_said(settings, words):
    with pytest.raises(ValueError, match=words):
        run(knowing(target()), BATCHES["one"][0], max_new_tokens=4, **settings)


def test_only_masks_have_a_layout():
    sequential = get_mtp_model(tiny_model(), {"method": "sequential", "depth": 2})
    with pytest.raises(ValueError, match="draft_layout.*sequential"):
        run(sequential, BATCHES["one"][0], max_new_tokens=4, draft_layout="quadratic")


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["distinct masks", "fused", "reduced vocabulary"])
def test_a_saved_module_drafts_the_same(variant, tmp_path, drafted):
    mtp, (inputs, _) = knowing(target(), **VARIANTS[variant]), BATCHES["three"]
    mtp.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mtp_config.json", "mtp_model.safetensors"}
    loaded = MTPModel.from_pretrained(target(), tmp_path)
    assert loaded.mtp_config == mtp.mtp_config
    first = run(mtp, inputs, max_new_tokens=NEW, draft_layout="quadratic")
    once = list(drafted)
    second = run(loaded, inputs, max_new_tokens=NEW, draft_layout="quadratic")
    assert drafted == once * 2 and first.stats.records == second.stats.records and len(once) > 20


@pytest.mark.parametrize("part", ["lora_B", "embedding", "sampler"])
def test_new_weights_are_drafted_with(part, tmp_path, drafted):
    """Changed in place, and loaded in place: the packed adapters and the drafter must follow."""
    mtp, (inputs, _) = knowing(target(), noise=0.9), BATCHES["three"]
    mtp.save_pretrained(tmp_path)
    runs = []
    for change in ("none", "changed", "loaded"):
        drafted.clear()
        with torch.no_grad():
            for name, parameter in mtp.module.named_parameters():
                if change == "changed" and part in name:
                    parameter.neg_() if part == "embedding" else parameter.add_(0.3)
        if change == "loaded":
            foretell.checkpoint.load_tensors(mtp.module, tmp_path)
        out = run(mtp, inputs, max_new_tokens=NEW, draft_layout="quadratic")
        assert out.sequences.tolist() == reference(target(), inputs, max_new_tokens=NEW).tolist()
        check_drafts(mtp, drafted, "quadratic")
        runs.append(list(drafted))
    assert runs[0] == runs[2] != runs[1]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"lora_alpha": 24.0}),
        ("llama", {"lora_use_rslora": True, "lora_modules": ["q_proj", "down_proj"]}),
        ("gpt_neox", {}),
        # PEFT takes gate_proj, up_proj and down_proj of a model with experts for the experts'
        ("deepseek_v3", {"lora_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]}),
    ],
)
@torch.no_grad()
def test_noise_masks_are_an_adapter_that_peft_loads(name, settings, tmp_path):
    """What engines load: with all rows adapted, our model and theirs say the same."""
    config = MaskedConfig(depth=2, mask_tokens="noise", sampler=False, lora_rank=4, **settings)
    mtp = shaken(get_mtp_model(target(name), config))
    mtp.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    plain = mtp.model(ids).logits
    with mtp.module.rows.adapters.on(mtp.target.layers, slice(None)):
        ours = mtp.model(ids).logits
    theirs = PeftModel.from_pretrained(copy.deepcopy(target(name)), tmp_path)(ids).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5 * float(ours.abs().max()), rtol=1e-5)
    assert not torch.allclose(plain, ours, atol=1e-2), "the adapter should matter"
    assert torch.equal(mtp.model(ids).logits, plain), "closed, the gate leaves nothing behind"


@pytest.mark.parametrize("settings", [{}, {"mask_tokens": "noise"}, {"sampler": False}])
def test_what_is_more_than_an_adapter_is_not_written_as_one(settings, tmp_path):
    get_mtp_model(target(), MaskedConfig(depth=2, **settings)).save_pretrained(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("adapter")]


def test_noise_masks_draft_in_two_passes_unless_told_otherwise():
    mtp, (inputs, slots) = knowing(target(), mask_tokens="noise"), BATCHES["five in two slots"]
    wanted = reference(mtp.model, inputs, max_new_tokens=NEW)
    for settings in ({}, {"draft_layout": "quadratic"}):
        out = run(mtp, inputs, max_new_tokens=NEW, slots=slots, **settings)
        assert out.sequences.tolist() == wanted.tolist()
        assert (out.stats.accept_at[0] == 1.0) == (not settings)
        assert total(out.stats.accepted) > total([[1] * len(each) for each in out.stats.drafted]) * (not settings) + 5


# -- with lookup -------------------------------------------------------------------------------------------------------


def test_masks_and_lookup_share_one_tree(drafted):
    """Every row of the merged tree carries a block, so that the module drafts again wherever the path ended."""
    mtp, inputs = knowing(target()), BATCHES["one"][0]
    out = run(mtp, inputs, max_new_tokens=40, drafter="mtp+lookup", draft_layout="quadratic")
    stats = out.stats
    assert out.sequences.tolist() == reference(target(), inputs, max_new_tokens=40).tolist()
    assert rows_of(stats, 9, lambda d: (1 + d) * K), "one forward a step, over rows of both and their masks"
    assert len(drafted) == stats.verifications - 1 and all(len(tokens) == K for _, tokens, _ in drafted)
    check_drafts(mtp, drafted, "quadratic")
    record = stats.records[0]
    said = [source for v in record for source in v.sources]
    assert {"mtp", "lookup", "lookup+mtp", "target"} <= set(said)
    assert len(said) == 40 and sum(s != "target" for s in said) == sum(v.accepted for v in record)
    # a token that both propose is one row, and there are trees: more rows than the deepest branch
    both = [v for v in record if v.drafted > v.depth]
    assert both and all(v.drafted <= 2 * K for v in record)
    after = [b.drafted for a, b in itertools.pairwise(record) if len(a.sources) > 1 and a.sources[-2] == "lookup"]
    assert after and min(after) >= K


def test_the_longest_draft_is_that_of_the_layout_asked_for():
    mtp = fitted()
    inputs, _ = next(iter(BATCHES.values()))
    for _ in range(2):  # whatever the call before has asked for
        run(mtp, inputs, max_new_tokens=4, draft_layout="two_pass", num_draft_tokens=K + 1)
        with pytest.raises(ValueError, match="at most 3"):
            run(mtp, inputs, max_new_tokens=4, draft_layout="quadratic", num_draft_tokens=K + 1)


def test_a_seed_fixes_the_text_of_noise_masks_too():
    mtp = knowing(target(), 1.0, mask_tokens="noise")
    inputs, _ = next(iter(BATCHES.values()))
    texts_found = set()
    for other in range(4):
        torch.manual_seed(other)
        seeded = torch.Generator().manual_seed(5)
        out = mtp.generate(
            **inputs, max_new_tokens=24, draft_layout="quadratic", num_draft_tokens=2, do_sample=True, generator=seeded
        )
        texts_found.add(str(out.tolist()))
    assert len(texts_found) == 1


def test_noise_adapters_that_peft_would_misread_are_refused():
    settings = MaskedConfig(depth=2, mask_tokens="noise", sampler=False)
    with pytest.raises(ValueError, match="in a model with experts"):
        get_mtp_model(tiny_model("deepseek_v3"), settings)
