"""Mask tokens in training: two passes are one, chunks cannot be seen, adapters touch mask rows and nothing else.

What every method promises stands in test_methods.py, which also holds this one against plain autograd, one token at a
time. Decoding with masks: test_masked_decode.py.

Defects of the published trainer (MTP-GLoRA at ce20d67), and what would see them here:

     1 training cannot start            test_a_step_changes_masks_adapters_and_sampler_and_nothing_else
     2 masks in the teacher's context   test_text_states_are_those_of_the_target_whatever_the_masks
     3 a plain list of rows is refused  (all trainer tests here give one)
     4 long prompts are lost            test_a_prompt_longer_than_a_chunk_is_read
     5 too short an output crashes      test_outputs_shorter_than_the_depth_are_learned_as_far_as_they_go
     6 gate off at the last masks       test_the_last_masks_learn_the_end_of_the_text_through_their_adapters
     7 teacher of another prefix        test_teacher_and_student_speak_of_the_same_prefix
     8 bf16 without master weights      test_a_bf16_target_has_fp32_masters_that_move_by_tiny_steps
     9 inexact resume                   test_a_resumed_run_repeats_the_uninterrupted_one_bit_by_bit
    10 loss divided twice               test_accumulation_cannot_be_seen
    11 a build on several ranks hangs   none here: nothing is built beforehand
    12 subsets, fusion, rsLoRA          test_a_subset_of_linears, test_fused_adapters_can_say_what_separate_ones_say,
                                        test_the_scale_is_that_of_one_linear
    13 doubled BOS                      test_special_tokens_that_the_tokenizer_adds_by_itself (test_prompts.py)
    14 scripts that fail                none here
    15 unpinned transformers            requirements.lock
"""

# B sequences, T positions, O tokens that carry masks, K masks of each, R rows, L columns, H heads, E width of a head,
# D hidden width.

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from foretell.config import ConfigError
from foretell.data.collate import MTPCollator, to_batch
from foretell.methods import reading
from foretell.methods.base import MTPConfig
from foretell.methods.masked import MaskedConfig, one_pass
from foretell.methods.reading import columns_of
from foretell.models import comb_attention, self_check
from foretell.models import target as target_file
from foretell.models.comb_attention import CombKeys, dense_attention, tiled_attention
from foretell.models.gated_lora import GatedAdapters
from foretell.mtp import MTPModel, get_mtp_model
from foretell.ops.tree import depths, interval_mask_mod
from foretell.types import IGNORE_INDEX, PAD_DOCUMENT, Batch
from tests.test_methods import ROWS, assert_close, documents, gradients, off, packed
from tests.test_methods import make as make_any
from tests.test_trainer import (  # noqa: F401 (quick_collections is a fixture)
    SGD,
    assert_same_run,
    assert_same_weights,
    bits_differ,
    column,
    copied,
    quick_collections,
    rows,
    run,
    trainer_of,
)
from tests.test_tree import DOCUMENTS, comb
from tests.tiny import VOCAB, tiny_model, tiny_tokenizer
from tests.twins import brute_force_visible

# fp32 attention in an fp64 model: a few roundings of 6e-8 at each layer
EXACT = 1e-6
EVERYTHING = {"mask_loss_weight": 0.7, "label_loss_weight": 0.5, "tv_loss_weight": 0.3, "latent_loss_weight": 0.02}
TEACHER = {"mtp_supervision": "teacher", "mtp_loss": "kl"}
UNEQUAL = torch.tensor([1.0, 0.6, 0.36])  # weights of the depths


def make(architecture: str = "llama", **settings: Any) -> MTPModel:
    """A tiny model, and masks, adapters and a sampler whose parameters all differ from their neutral start."""
    return make_any("masked", architecture, **{"depth": 3, **settings}).train()


def padded(side: str) -> dict[str, Tensor]:
    """Three texts of different lengths, padded on one side."""
    texts, T = documents(9, 14, 5), 16
    ids, mask = torch.full((3, T), 7), torch.zeros(3, T, dtype=torch.long)
    labels = torch.full((3, T), IGNORE_INDEX)
    for b, (text, wanted) in enumerate(texts):
        at = slice(0, len(text)) if side == "right" else slice(T - len(text), T)
        ids[b, at], labels[b, at], mask[b, at] = torch.tensor(text), torch.tensor(wanted), 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


BATCHES = {"packed": packed(ROWS), "left": padded("left"), "right": padded("right")}


def learn(mtp: MTPModel, inputs: dict[str, Tensor], weights: Tensor = UNEQUAL, **mode: Any) -> tuple[Tensor, list]:
    """(totals [K], counts and correct guesses), after the weighted sum of the totals was differentiated."""
    mtp.zero_grad()
    losses = mtp(**inputs, mtp_coefficients=weights, **mode)["mtp"]
    sum(w * loss.total for w, loss in zip(weights, losses)).backward()
    return torch.stack([loss.total.detach() for loss in losses]), [(int(s.count), int(s.correct)) for s in losses]


# -- two passes are one ------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "distinct": {},
    "shared": {"mask_tokens": "shared"},
    "no sampler": {"sampler": False},
    "rank 1": {"lora_rank": 1},
    "rslora": {"lora_use_rslora": True, "lora_alpha": 3.0},
    "fused": {"fuse_weights": True},
    "subset": {"lora_modules": ["q_proj", "v_proj", "up_proj"]},
    "subset, fused": {"lora_modules": ["k_proj", "v_proj", "down_proj"], "fuse_weights": True},
    "biases": {"architecture": "qwen2"},
    "norms of queries and keys": {"architecture": "qwen3"},
    "window": {"architecture": "mistral"},
    "window, fused, shared": {"architecture": "mistral", "fuse_weights": True, "mask_tokens": "shared"},
    "softcap": {"architecture": "gemma2"},
    "softcap, no sampler": {"architecture": "gemma2", "sampler": False},
}


@torch.no_grad()
def two_passes(mtp: MTPModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """(text [B, T, D], masks [B, T, K, D]), put together from the pieces."""
    carries_BT = batch.document_BT != PAD_DOCUMENT
    text_BTD = torch.zeros(*carries_BT.shape, mtp.target.hidden_size, dtype=mtp.target.dtype)
    masks_BTKD = text_BTD[:, :, None].repeat(1, 1, mtp.mtp_config.depth, 1)
    for piece in mtp.module.pieces(mtp.target, batch, carries_BT):
        b_N, o_N = piece.valid_BO.nonzero(as_tuple=True)
        masks_BTKD[b_N, piece.owner_BO[b_N, o_N]] = piece.masks_BOKD[b_N, o_N]
        text_BTD[:, piece.first : piece.first + piece.text_BWD.shape[1]] = piece.text_BWD
    return text_BTD, masks_BTKD


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_passes_read_what_one_reads(variant):
    mtp = make(**VARIANTS[variant]).double()
    for (name, inputs), size in itertools.product(BATCHES.items(), (5, 512)):
        mtp.mtp_config.chunk_size = size
        batch = to_batch(inputs)
        with torch.no_grad():
            wanted = one_pass(mtp.module, mtp.target, batch)
        text_BT = batch.document_BT != PAD_DOCUMENT
        text_BTD, masks_BTKD = (states[text_BT] for states in two_passes(mtp, batch))
        assert off(text_BTD, wanted.post_norm_BRD[text_BT]) < EXACT, name
        assert off(masks_BTKD, wanted.piece.masks_BOKD[text_BT]) < EXACT, name
        assert off(masks_BTKD, wanted.piece.masks_BOKD[text_BT].roll(1, dims=1)) > 1e-2, "the gate"


def plain_totals(mtp: MTPModel, inputs: dict[str, Tensor]) -> Tensor:
    """[K] cross-entropies with the labels: text and masks in one forward, all logits, autograd; the target frozen."""
    batch, target = to_batch(inputs), mtp.target
    document_BT, labels_BT = batch.document_BT.tolist(), batch.labels_BT.tolist()
    B, T = batch.input_ids_BT.shape
    with target.constant():
        masks_BTKD = one_pass(mtp.module, target, batch).piece.masks_BOKD
    totals = []
    for k in range(1, mtp.mtp_config.depth + 1):
        at = [
            (b, t)
            for b, t in itertools.product(range(B), range(T - 1 - k))
            if document_BT[b][t] == document_BT[b][t + 1 + k] != PAD_DOCUMENT and labels_BT[b][t + 1 + k] >= 0
        ]
        b, t = torch.tensor(at).T
        state = masks_BTKD[b, t, k - 1]
        if mtp.module.sampler is not None:
            state = mtp.module.sampler(target.embed(batch.input_ids_BT[b, t + k]).detach(), state)
        logits = target.scaled(F.linear(state, target.head.weight.detach()))
        totals.append(F.cross_entropy(logits, batch.labels_BT[b, t + 1 + k], reduction="sum"))
    return torch.stack(totals)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_passes_learn_what_one_learns(variant):
    mtp = make(**VARIANTS[variant], chunk_size=6).double()
    for name, inputs in BATCHES.items():
        totals, _ = learn(mtp, inputs)
        found = gradients(mtp)
        mtp.zero_grad()
        wanted = plain_totals(mtp, inputs)
        (wanted * UNEQUAL).sum().backward()
        assert off(totals, wanted) < EXACT, name
        # transformers' norms stay in fp32, which a backward pass through wide adapters makes larger
        assert_close(found, gradients(mtp), tolerance=10 * EXACT)


def test_text_states_are_those_of_the_target_whatever_the_masks():
    mtp, inputs = make(chunk_size=5), BATCHES["packed"]
    batch = to_batch(inputs)
    text_BT = batch.document_BT != PAD_DOCUMENT
    before, _ = two_passes(mtp, batch)
    with torch.no_grad():
        plain = mtp.target.forward_text(batch.input_ids_BT, batch.position_ids_BT).post_norm_BRD
        one = one_pass(mtp.module, mtp.target, batch)
        assert off(before[text_BT], plain[text_BT]) < EXACT
        for parameter in mtp.module.parameters():
            parameter.add_(torch.randn_like(parameter))
        other = one_pass(mtp.module, mtp.target, batch)
    assert torch.equal(two_passes(mtp, batch)[0], before)
    assert torch.equal(other.post_norm_BRD[text_BT], one.post_norm_BRD[text_BT])
    assert off(other.piece.masks_BOKD, one.piece.masks_BOKD) > 0.1


# -- chunks ------------------------------------------------------------------------------------------------------------

LONG = packed([documents(11, 4, 9), documents(14, 2, seed=3), documents(22, seed=5)])  # and 3 to 11 of padding


@pytest.mark.parametrize("free_running", [False, True])
def test_chunks_cannot_be_seen(free_running):
    mtp = make(**EVERYTHING, free_running=free_running).double()
    wanted = learn(mtp, LONG, **TEACHER)
    gradient = gradients(mtp)
    assert gradient.keys() == {f"module.{name}" for name, _ in mtp.module.named_parameters()}
    for size in (4, 5, 6, 7, 10, 13, 26):
        mtp.mtp_config.chunk_size = size
        mtp.mtp_config.offload_keys = size == 7
        found = learn(mtp, LONG, **TEACHER)
        assert off(found[0], wanted[0]) < EXACT and found[1] == wanted[1], size
        assert_close(gradients(mtp), gradient, tolerance=EXACT)


def test_a_stream_serves_the_weights_of_the_depths_that_it_was_told():
    mtp = make(chunk_size=5)
    zero_sum = torch.tensor([1.0, -0.5, -0.5])

    def differentiate(weights: Tensor, told: Tensor | None) -> dict[str, Tensor]:
        mtp.zero_grad()
        losses = mtp(**LONG, mtp_coefficients=told)["mtp"]
        sum(w * loss.total for w, loss in zip(weights, losses)).backward()
        return gradients(mtp)

    for weights in (torch.ones(3), UNEQUAL, zero_sum):
        mtp.mtp_config.chunk_size = 512
        wanted = differentiate(weights, None)
        mtp.mtp_config.chunk_size = 5
        equal = weights[0] == weights[1]
        for told in (weights, -4 * weights, *([None] if equal else [])):  # up to one factor; unsaid they are equal
            assert_close(differentiate(weights, told), wanted, tolerance=1e-4)
    for weights, told in ((UNEQUAL, None), (UNEQUAL, UNEQUAL.flip(0)), (zero_sum, None), (UNEQUAL, torch.zeros(3))):
        with pytest.raises(ValueError, match="pass mtp_coefficients to the forward call"):
            differentiate(weights, told)


def test_an_mtp_loss_of_weight_zero_leaves_nothing_of_a_long_text(tmp_path):
    states = []
    for size in (4, 512):
        mtp = make(chunk_size=size)
        before = copied(mtp)
        arguments = {"mtp_loss_scaling_factor": 0.0, "train_target": True, "max_steps": 2}
        run(mtp, tmp_path, mtp_training_mode="standalone", **arguments, **SGD)
        assert all(name.startswith("model.") for name in bits_differ(mtp, before))
        states.append(copied(mtp))
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def peak_bytes(step: Any) -> int:
    """Most bytes allocated at once while a function runs, by the allocator's own account."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_memory_of_a_streamed_step_grows_by_keys_values_and_inputs_only(monkeypatch):
    monkeypatch.setattr(comb_attention, "TILE_NUMBERS", 2**16)
    monkeypatch.setattr(comb_attention, "TILE_COLUMNS", 512)
    model = {"num_hidden_layers": 1}

    def growth(chunk_size: int | None, short: int, long: int) -> float:
        """Bytes that each further token takes."""
        peaks = []
        for T in (short, long):
            mtp = make(depth=2, model=model, chunk_size=chunk_size or T, **EVERYTHING)
            inputs = {"input_ids": torch.arange(T)[None] % 90 + 2}
            peaks.append(peak_bytes(partial(learn, mtp, inputs, UNEQUAL[:2], **TEACHER)))
        return (peaks[1] - peaks[0]) / (long - short)

    keys_and_values = 2 * 2 * 8 * 4  # two heads of width 8, fp32, in the one layer
    numbers = 16 * 8  # at most sixteen whole numbers of a token: ids, labels of each depth, documents, columns, ...
    assert growth(256, 512, 1536) < keys_and_values + numbers
    assert growth(None, 256, 512) > 20 * (keys_and_values + numbers), "the gate: without a stream"


# -- attention ---------------------------------------------------------------------------------------------------------


def blocks_of(K: int, owners: int, L: int, window: int | None, seed: int = 0) -> CombKeys:
    """Two sequences of blocks with any owners in any documents; the first block of each sees nothing of the text."""
    generator = torch.Generator().manual_seed(seed)
    owner_BO = torch.randint(0, L, (2, owners), generator=generator)
    start_BO = (torch.rand(2, owners, generator=generator) * (owner_BO + 1)).long()
    last_BO = owner_BO.clone()
    last_BO[:, 0] = start_BO[:, 0] - 1
    start_BR, last_BR, owner_BR = (t.repeat_interleave(K, dim=1) for t in (start_BO, last_BO, owner_BO))
    keys = CombKeys(L)
    keys.begin(start_BR, last_BR, owner_BR + torch.arange(1, K + 1).repeat(owners), L, None, K)
    return keys


def text_rows(R: int, L: int) -> CombKeys:
    """The last R columns of packed texts read themselves, after those before them."""
    generator = torch.Generator().manual_seed(R)
    document_BL = (torch.rand(2, L, generator=generator) < 0.2).long().cumsum(1)
    column_BL, start_BL = columns_of(document_BL)
    keys = CombKeys(L)
    keys.begin(start_BL[:, L - R :], column_BL[:, L - R :], column_BL[:, L - R :], L, L - R, 0)
    return keys


# (query heads of a head, heads, masks of a block (0: text rows), blocks or rows, text columns, width of keys, values)
SHAPES = [(1, 1, 1, 1, 1, 4, 4), (2, 2, 2, 7, 11, 8, 8), (3, 1, 3, 5, 16, 4, 6), (1, 2, 4, 6, 9, 8, 4)]
SHAPES += [(2, 2, 0, 6, 13, 8, 8), (1, 3, 0, 9, 9, 4, 2)]


@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiled_attention_is_dense_attention(shape, window, monkeypatch):
    G, H, K, owners, L, E, narrow = shape
    keys = blocks_of(K, owners, L, window) if K else text_rows(owners, L)
    R = keys.last_BR.shape[1]
    generator = torch.Generator().manual_seed(1)
    sizes = [(G * H, R, E), (H, L, E), (H, L, narrow), (H, R, E), (H, R, narrow)]
    query, *others = (torch.randn(2, *size, generator=generator).requires_grad_() for size in sizes)
    text = [other.detach() for other in others[:2]]
    learned = (query, *others[2:]) if K else (query,)
    upstream = torch.randn(2, R, G * H, narrow, generator=generator)

    def by(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad(out, learned, upstream)]

    def dense(visible_BRL: Tensor) -> list[Tensor]:
        own = others[2:] if K else [other[:, :, :0] for other in others[2:]]
        return by(dense_attention(nn.Identity(), query, *text, *own, visible_BRL, scaling=0.3)[0])

    wanted = dense(keys.visible(window))
    largest = max(float(want.detach().norm()) for want in wanted)  # with a window of 1 some gradients are nothing
    for numbers, columns in ((1, 1), (200, 3), (4 * 2**20, 4096)):
        monkeypatch.setattr(comb_attention, "TILE_NUMBERS", numbers)
        monkeypatch.setattr(comb_attention, "TILE_COLUMNS", columns)
        out = tiled_attention(
            query, *text, *others[2:], keys.first(window), keys.last_BR, K, scale=0.3, window=window
        ).transpose(1, 2)
        for got, want in zip(by(out), wanted, strict=True):
            assert float((got - want).detach().norm()) <= 3 * EXACT * largest
    if L > 1 and K > 1 and window != 1:  # the gate: an owner that is one off, and a mask that sees the next one
        further = copy.copy(keys)
        further.last_BR = keys.last_BR - 1
        leaking = keys.visible(window)
        leaking[:, 0, L + 1] = True
        for wrong in (further.visible(window), leaking):
            assert any(off(got, want) > 1e-3 for got, want in zip(dense(wrong), wanted))


def tree_rule(masks: int, window: int | None, document_T: Tensor) -> Tensor:
    """bool [R, R] over the rows of a comb: walking parents, and counting positions for the window."""
    parents_BR, _ = comb(document_T[None], masks)
    position_R = depths(parents_BR)[0]
    apart_RR = position_R[:, None] - position_R
    seen_RR = brute_force_visible(parents_BR[0].tolist())
    return seen_RR if window is None else seen_RR & (apart_RR < window)


@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("masks", [1, 2, 3])
def test_what_rows_see_is_the_tree_rule(masks, window):
    B, T = DOCUMENTS.shape
    column_BT, start_BT = columns_of(DOCUMENTS)
    wanted = torch.stack([tree_rule(masks, window, document_T) for document_T in DOCUMENTS])
    keys = CombKeys(T)
    keys.begin(start_BT, column_BT, column_BT, T, 0, 0)
    assert torch.equal(keys.visible(window), wanted[:, :T, :T])
    owner_O = torch.tensor([0, 2, 3, 5])  # of no padding
    step_R, owner_R = torch.arange(1, masks + 1).repeat(4), owner_O.repeat_interleave(masks)
    owner_BR = owner_R.expand(B, -1)
    keys.begin(start_BT[:, owner_R], owner_BR, owner_BR + step_R, T, None, masks)
    row_R = T + owner_R * masks + step_R - 1
    seen = keys.visible(window)
    assert torch.equal(seen[..., :T], wanted[:, row_R, :T]) and torch.equal(seen[..., T:], wanted[:, row_R][..., row_R])
    keys.begin(start_BT[:, owner_R], owner_BR + 1, owner_BR + step_R, T, None, masks)  # the gate
    assert not torch.equal(keys.visible(window)[..., :T], wanted[:, row_R, :T])


@pytest.mark.parametrize(("K", "window"), [(0, None), (0, 3), (1, 3), (3, None), (3, 2)])
def test_flex_attention_is_dense_attention(K, window):
    keys = blocks_of(K, 6, 11, window) if K else text_rows(6, 11)
    R, L = keys.last_BR.shape[1], 11
    visible_BRL = keys.visible(window)
    rule = interval_mask_mod(keys.first(window), keys.last_BR, L, K, window)
    columns = L + R * bool(K)
    assert torch.equal(create_mask(rule, 2, 1, R, columns, device="cpu")[:, 0], visible_BRL)
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, n, m, 8, generator=generator) for n, m in ((4, R), (2, columns), (2, columns)))
    block_mask = keys.block_mask(window)
    assert keys.block_mask(window) is block_mask, "made once for all layers"
    found = flex_attention(query, key, value, block_mask=block_mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    nothing = key[:, :, :0]
    wanted, _ = dense_attention(nn.Identity(), query, key, value, nothing, nothing, visible_BRL, scaling=0.3)
    assert off(found, wanted) < EXACT
    if K:  # the gate
        visible_BRL = visible_BRL.clone()
        visible_BRL[:, K - 1, L + K] = True  # a mask that sees the next block
        wrong, _ = dense_attention(nn.Identity(), query, key, value, nothing, nothing, visible_BRL, scaling=0.3)
        assert off(found, wrong) > 1e-3


# -- gated LoRA --------------------------------------------------------------------------------------------------------


def two_linears() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(6, 5), "o_proj": nn.Linear(5, 6, bias=False)})])


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 8.0 / 4), (True, 8.0 / 2)])
def test_gated_lora_by_hand(use_rslora, scale):
    layers = two_linears()
    adapters = GatedAdapters(layers, "all-linear", rank=4, alpha=8.0, dropout=0.0, use_rslora=use_rslora, fuse=False)
    q, o = layers[0]["q_proj"], layers[0]["o_proj"]
    x = torch.randn(2, 3, 6)
    plain_q, plain = q(x), o(q(x))
    with torch.no_grad(), adapters.on(layers, torch.tensor([1, 4])):
        assert torch.equal(o(q(x)), plain), "B starts at zero"
    for parameter in adapters.parameters():
        nn.init.normal_(parameter)
    for gate in (torch.tensor([1, 4]), slice(2, 5), slice(None)):
        rows = torch.zeros(6, dtype=torch.bool)
        rows[gate] = True
        with adapters.on(layers, gate):
            first, second = q(x), o(q(x))
        wanted = plain_q.clone().view(6, 5)
        lora, _ = adapters.adapter("0.q_proj")
        for n in range(6):
            if rows[n]:
                wanted[n] = wanted[n] + scale * (lora.lora_B.weight @ (lora.lora_A.weight @ x.view(6, 6)[n]))
        assert torch.allclose(first.view(6, 5), wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(first.view(6, 5)[~rows], plain_q.view(6, 5)[~rows])
        assert torch.equal(second.view(6, 6)[~rows], plain.view(6, 6)[~rows])
        assert not torch.isclose(second.view(6, 6)[rows], plain.view(6, 6)[rows]).all(-1).any()
    assert torch.equal(o(q(x)), plain), "the gate is shut"


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scale_is_that_of_one_linear(use_rslora):
    settings = {"lora_rank": 9, "lora_alpha": 18.0, "lora_use_rslora": use_rslora}
    for fuse in (False, True):
        scales = {lora.scale for lora in make(fuse_weights=fuse, **settings).module.rows.adapters.adapters.values()}
        assert scales == {18.0 / 3 if use_rslora else 18.0 / 9}


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "v_proj", "up_proj"], ["k_proj", "gate_proj"]])
@pytest.mark.parametrize("use_rslora", [False, True])
@torch.no_grad()
def test_fused_adapters_can_say_what_separate_ones_say(use_rslora, modules):
    settings = {"lora_use_rslora": use_rslora, "lora_modules": modules, "lora_alpha": 3.0}
    apart, fused = make(**settings), make(fuse_weights=True, **settings)
    for name, tensor in fused.module.state_dict().items():
        if "adapters" not in name:
            tensor.copy_(apart.module.state_dict()[name])
    assert len(fused.module.rows.adapters.adapters) <= len(apart.module.rows.adapters.adapters)
    for lora in (fused.module.rows.adapters.adapter(path)[0] for path in fused.module.rows.adapters.paths):
        lora.lora_B.weight.zero_()
    for path in apart.module.rows.adapters.paths:
        mine, _ = apart.module.rows.adapters.adapter(path)
        lora, name = fused.module.rows.adapters.adapter(path)
        at = lora.names.index(name) * 4
        lora.lora_A.weight[at : at + 4] = mine.lora_A.weight
        lora.lora_B.weight[lora.share(name), at : at + 4] = mine.lora_B.weight
    ids = BATCHES["right"]["input_ids"]
    wanted = apart.draft_logits(ids)
    assert off(fused.draft_logits(ids), wanted) < 2 * EXACT
    lora.lora_B.weight.mul_(math.sqrt(3.0))  # the gate: a scale that follows the rank of three
    assert off(fused.draft_logits(ids), wanted) > 1e-3


class RowsThroughA(TorchDispatchMode):
    """How many rows each product with an A has: no other matrix here has a width that a rank of 7 divides."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.mm.default and args[1].shape[1] in (7, 14, 21):
            self.seen.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["llama", "olmo2"])
@pytest.mark.parametrize("fuse", [False, True])
@torch.no_grad()
def test_only_mask_rows_are_multiplied_by_adapters(fuse, architecture):
    mtp = make(architecture, chunk_size=6, fuse_weights=fuse, lora_rank=7)
    batch = to_batch(BATCHES["packed"])
    carries_BT = (mtp.module.labels(batch) != IGNORE_INDEX).any(-1)
    owners = 0
    with RowsThroughA() as rows:
        for piece in mtp.module.pieces(mtp.target, batch, carries_BT):
            assert set(rows.seen) == {3 * piece.owner_BO.numel()} and len(rows.seen) >= 2 * 4
            owners += piece.owner_BO.numel()
            rows.seen.clear()
        assert int(carries_BT.sum()) <= owners < carries_BT.numel()
        one_pass(mtp.module, mtp.target, batch)
        assert set(rows.seen) == {3 * carries_BT.numel()}
        rows.seen.clear()
        mtp.target.forward_text(batch.input_ids_BT, batch.position_ids_BT)
        assert not rows.seen


@pytest.mark.parametrize("fuse", [False, True])
def test_a_subset_of_linears(fuse):
    mtp = make(lora_modules=["q_proj", "k_proj", "down_proj"], fuse_weights=fuse)
    adapters = mtp.module.rows.adapters
    names = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]
    assert sorted(adapters.paths) == sorted(f"{layer}.{name}" for layer in range(2) for name in names)
    with adapters.on(mtp.target.layers, slice(None)):
        hooked = {path for path, part in mtp.target.layers.named_modules() if part._forward_hooks}
    assert hooked == set(adapters.paths)
    learn(mtp, BATCHES["packed"])
    assert all(gradient.any() for gradient in gradients(mtp.module).values())
    one = make(lora_modules="o_proj").module.rows.adapters
    assert one.paths == ["0.self_attn.o_proj", "1.self_attn.o_proj"]


def test_settings_that_cannot_be_are_refused_by_name():
    with pytest.raises(ConfigError) as error:
        MaskedConfig(
            use_dora=True,
            lora_bias=True,
            lora_rank=-1,
            lora_dropout=1.0,
            chunk_size=4,
            mask_positions=1.5,
            hidden_source="pre_norm",
            sampler_loss_weight=0.0,
            mask_tokens="noise",
            fuse_weights=True,
        )
    said = ("use_dora", "lora_bias", "lora_rank", "lora_dropout", "chunk_size: got 4", "mask_positions: got 1.5")
    said += ("hidden_source", "sampler_loss_weight", "fuse_weights")
    assert all(name in str(error.value) for name in said)
    for unknown in ({"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}, {"depht": 3}):
        with pytest.raises(ConfigError, match=f"{next(iter(unknown))}.*unknown name"):
            MTPConfig.from_any({"method": "masked", **unknown})
    for mask_positions in (0.0, -1.0, "some"):
        with pytest.raises(ConfigError, match="mask_positions"):
            MaskedConfig(mask_positions=mask_positions)
    for names in (["q_proj", "query"], "gate", ["lm_head"]):
        with pytest.raises(ValueError, match=r"lora_modules: (query|gate|lm_head) matches no linear.*up_proj"):
            make(lora_modules=names)


def test_draft_length_is_another_name_of_depth():
    assert MaskedConfig(draft_length=6) == MaskedConfig(depth=6) == MaskedConfig(depth=6, draft_length=6)
    assert MTPConfig.from_any({"method": "masked", "draft_length": 2}).to_dict()["depth"] == 2
    again = MTPConfig.from_any(MaskedConfig(draft_length=6).to_dict())
    assert again == MaskedConfig(depth=6)
    with pytest.raises(ValueError, match="draft_length=6 and depth=5 are one thing"):
        MaskedConfig(depth=5, draft_length=6)


def test_a_target_that_peft_wrapped_trains(tmp_path):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    mtp = get_mtp_model(wrapped, {"method": "masked", "depth": 3, "lora_rank": 4})
    assert mtp.module.rows.adapters.paths == make().module.rows.adapters.paths
    before = copied(mtp)
    logs = run(mtp, tmp_path, rows(2), max_steps=8, learning_rate=1e-2, lr_scheduler_type="constant")
    assert bits_differ(mtp, before) == {name for name in before if name.startswith("module.")}
    assert column(logs, "loss")[-1] < 0.9 * column(logs, "loss")[0]
    # the text is read through PEFT's adapters, and the masks too
    batch = to_batch(BATCHES["right"])
    text_BT = batch.document_BT != PAD_DOCUMENT
    text, masks = two_passes(mtp, batch)
    with torch.no_grad():
        assert off(text[text_BT], wrapped.model.model(input_ids=batch.input_ids_BT).last_hidden_state[text_BT]) < EXACT
    with wrapped.disable_adapter():
        without, other = two_passes(mtp, batch)
    assert off(without[text_BT], text[text_BT]) > 0.01 < off(other[text_BT], masks[text_BT])


# -- masks are no words ------------------------------------------------------------------------------------------------


def test_a_model_that_makes_more_of_tokens_than_their_embeddings_is_refused_by_name():
    """At once where it is so from the start, and in the next call where it became so."""

    def by_token(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        ids = kwargs.pop("input_ids", None)
        return args, kwargs if ids is None else {**kwargs, "inputs_embeds": 1.5 * decoder.embed_tokens(ids)}

    model = tiny_model()
    mtp, settings = get_mtp_model(model, MaskedConfig(depth=2)), {"max_new_tokens": 8, "do_sample": False}
    ids = torch.arange(10, 22)[None]
    assert mtp.generate(ids, **settings).tolist() == model.generate(ids, **settings).tolist()
    handle = model.model.register_forward_pre_hook(by_token, with_kwargs=True)
    for how in ({}, {"num_draft_tokens": 0}):
        with pytest.raises(ValueError, match="LlamaForCausalLM .llama. cannot be decoded exactly: text beside masks"):
            mtp.generate(ids, **settings, **how)
    with pytest.raises(ValueError, match="LlamaForCausalLM .llama. cannot be read with masks .its states"):
        get_mtp_model(model, MaskedConfig(depth=2))
    handle.remove()
    assert mtp.generate(ids, **settings).tolist() == model.generate(ids, **settings).tolist()


def test_a_window_that_attention_is_not_told_is_seen_before_it_is_reached(monkeypatch):
    model = tiny_model("mistral", sliding_window=40)  # longer than the texts of the check
    get_mtp_model(model, MaskedConfig(depth=2))
    monkeypatch.setattr(reading, "narrowed", lambda model, window: self_check.narrowed(model, window + 1))  # the same
    plain = comb_attention.comb_attention

    def everything(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    monkeypatch.setattr(target_file, "comb_attention", everything)
    get_mtp_model(model, MaskedConfig(depth=2))  # nothing is narrowed, so nothing is seen
    monkeypatch.setattr(reading, "narrowed", self_check.narrowed)
    with pytest.raises(ValueError, match="cannot be read with masks .its states"):
        get_mtp_model(model, MaskedConfig(depth=2))


def test_masks_never_enter_the_vocabulary(monkeypatch):
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the vocabulary must stay as it is")

    for tied, kind in itertools.product((False, True), ("shared", "distinct", "noise")):
        model = tiny_model(tie_word_embeddings=tied)
        monkeypatch.setattr(type(model), "resize_token_embeddings", forbidden)
        names, state = set(model.state_dict()), copy.deepcopy(model.state_dict())
        mtp = get_mtp_model(model, {"method": "masked", "mask_tokens": kind, "depth": 3})
        learn(mtp, BATCHES["packed"])
        assert set(model.state_dict()) == names
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
        assert mtp.target.vocab_size == VOCAB == len(mtp.target.embed_tokens.weight)
        assert mtp.draft_logits(BATCHES["right"]["input_ids"]).shape[-1] == VOCAB
        embedding = mtp.module.rows.embedding
        if kind == "noise":
            assert embedding is None
            continue
        assert embedding.shape == (1 if kind == "shared" else 3, 32)
        mean = sum(model.get_input_embeddings().weight.detach().double()) / VOCAB
        assert all(off(row, mean) < EXACT for row in embedding)


@pytest.mark.parametrize("settings", [{}, {"mask_tokens": "shared", "fuse_weights": True, "sampler": False}])
def test_saved_and_loaded_it_says_the_same(settings, tmp_path):
    mtp = make(**settings, train_masks=False)
    mtp.save_pretrained(tmp_path)
    loaded = MTPModel.from_pretrained(mtp.model, tmp_path)
    assert loaded.mtp_config == mtp.mtp_config
    ids = BATCHES["right"]["input_ids"]
    wanted = mtp.draft_logits(ids)
    assert torch.equal(loaded.draft_logits(ids), wanted)
    assert torch.equal(loaded.module.rows.embedding, mtp.module.rows.embedding)
    with torch.no_grad():
        loaded.module.rows.embedding.add_(0.1)  # the gate: it matters
    assert not torch.equal(loaded.draft_logits(ids), wanted)


@pytest.mark.parametrize("train_masks", [False, True])
def test_mask_embeddings_learn_or_stay(train_masks, tmp_path):
    mtp = make(train_masks=train_masks, chunk_size=7)
    before = copied(mtp)
    trainer = trainer_of(mtp, tmp_path, max_steps=2, weight_decay=0.1, learning_rate=1e-2)
    trainer.train()
    inside = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert (id(mtp.module.rows.embedding) in inside) == train_masks
    stayed = set() if train_masks else {"module.rows.embedding"}
    assert bits_differ(mtp, before) == {name for name in before if name.startswith("module.")} - stayed


def test_a_step_changes_masks_adapters_and_sampler_and_nothing_else(tmp_path):
    mtp = get_mtp_model(tiny_model(), {"method": "masked", "depth": 3, "chunk_size": 8})
    before = copied(mtp)
    run(mtp, tmp_path, max_steps=1)
    changed = bits_differ(mtp, before)
    # B starts at zero, so A moves from the second step on
    assert changed == {name for name in before if name.startswith("module.") and "lora_A" not in name}
    run(mtp, tmp_path, max_steps=2)
    assert bits_differ(mtp, before) == {name for name in before if name.startswith("module.")}


def test_a_bf16_target_has_fp32_masters_that_move_by_tiny_steps(tmp_path):
    mtp = get_mtp_model(tiny_model(), {"method": "masked", "depth": 3, "chunk_size": 8}).to(torch.bfloat16)
    logs = run(mtp, tmp_path, max_steps=4, learning_rate=2e-6, lr_scheduler_type="constant")
    assert {p.dtype for p in mtp.module.parameters()} == {torch.float32}
    assert {p.dtype for p in mtp.model.parameters()} == {torch.bfloat16}
    for norm in mtp.module.sampler.norms:  # ones at the start, whose neighbours in bf16 are 0.004 and 0.008 away
        moved = (norm.weight.detach() - 1).abs()
        assert (moved > 0).all() and float(moved.max()) < 1e-4
    full = run(get_mtp_model(tiny_model(), {"method": "masked", "depth": 3}), tmp_path, max_steps=4, learning_rate=2e-6)
    assert torch.allclose(column(logs, "loss"), column(full, "loss"), rtol=0.03)


def test_autocast_finds_about_the_gradients_of_fp32():
    # rotary positions make queries and keys fp32 again, beside values in bf16
    found = []
    for size, autocast in ((5, True), (512, True), (512, False)):
        mtp = make(chunk_size=size)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            losses = mtp(**LONG, **TEACHER)["mtp"]
        sum(loss.total for loss in losses).backward()
        found.append(gradients(mtp))
    assert {gradient.dtype for gradient in found[0].values()} == {torch.float32}
    for gradient in found[:2]:
        assert_close(gradient, found[2], tolerance=0.05)  # roundings of 0.004 in two wide layers


# -- losses ------------------------------------------------------------------------------------------------------------


def by_hand(mtp: MTPModel, inputs: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """[K] of each part of the loss, one prediction at a time, from the states of one pass. kind: of the first part."""
    batch, target, K = to_batch(inputs), mtp.target, mtp.mtp_config.depth
    rows = one_pass(mtp.module, target, batch)
    ids, labels = batch.input_ids_BT[0], batch.labels_BT[0]
    T, head = len(ids), target.head.weight
    parts = {name: torch.zeros(K, dtype=target.dtype) for name in ("sampler", "mask", "latent")}
    parts |= {f"{name} {of}": torch.zeros_like(parts["mask"]) for name in ("label", "tv") for of in ("sampler", "mask")}
    for t, k in itertools.product(range(T), range(1, K + 1)):
        if t + k + 1 >= T or labels[t + k + 1] == IGNORE_INDEX:
            continue
        mask, text = rows.piece.masks_BOKD[0, t, k - 1], rows.post_norm_BRD[0, t + k]
        teacher = (head @ text).softmax(-1)
        states = {"sampler": mtp.module.sampler(target.embed(ids[t + k])[None], mask[None])[0], "mask": mask}
        for name, state in states.items():
            logp = (head @ state).log_softmax(-1)
            truth = -logp[labels[t + k + 1]]
            parts[name][k - 1] += {"labels": truth, "kl": (teacher * (teacher.log() - logp)).sum()}[kind]
            parts[f"label {name}"][k - 1] += truth
            parts[f"tv {name}"][k - 1] += (teacher - logp.exp()).abs().sum() / 2
        parts["latent"][k - 1] += (mask - text).pow(2).sum()
    return parts


ONE = packed([documents(9, seed=6)], padding=1)
WEIGHTS = ("sampler_loss_weight", "mask_loss_weight", "label_loss_weight", "tv_loss_weight", "latent_loss_weight")


@pytest.mark.parametrize("kind", ["labels", "kl"])
@torch.no_grad()
def test_parts_of_the_loss_by_hand(kind):
    mode = TEACHER if kind == "kl" else {}
    mtp = make().double()
    parts = by_hand(mtp, ONE, kind)
    cases = [(1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (2, 0.5, 0, 0, 0), (1, 0, 0.5, 0, 0), (0.5, 2, 0.25, 0, 0)]
    cases += [(1, 0.5, 0, 2, 0), (1, 0, 0, 0, 3), (0.5, 0.25, 2, 3, 0.125)]
    for weights in cases:
        s, m, label, tv, latent = weights
        for name, weight in zip(WEIGHTS, weights, strict=True):
            setattr(mtp.mtp_config, name, weight)
        wanted = s * parts["sampler"] + m * parts["mask"] + latent * parts["latent"]
        if kind == "kl":  # the labels are the first part already, where there is no teacher
            wanted += label * (s * parts["label sampler"] + m * parts["label mask"])
        wanted += tv * (s * parts["tv sampler"] + m * parts["tv mask"])
        losses = mtp(**ONE, **mode)["mtp"]
        assert off(torch.stack([loss.total for loss in losses]), wanted) < EXACT, weights
        assert [int(loss.count) for loss in losses] == [
            sum(label >= 0 for label in ONE["labels"][0, 1 + k :].tolist()) for k in (1, 2, 3)
        ]


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_weight_counts_in_proportion(name):
    mtp = make(**EVERYTHING).double()

    def gradient(weight: float) -> dict[str, Tensor]:
        setattr(mtp.mtp_config, name, weight)
        learn(mtp, LONG, **TEACHER)
        return {name: p.grad.clone() for name, p in mtp.module.named_parameters() if p.grad is not None}

    none, one, two = gradient(0.0), gradient(1.0), gradient(2.0)
    once = {name: one[name] - none.get(name, 0.0) for name in one}
    assert_close({name: two[name] - none.get(name, 0.0) for name in two}, {n: 2 * g for n, g in once.items()}, EXACT)
    assert max(float(gradient.norm()) for gradient in once.values()) > 1e-2


def test_free_running_counts_while_earlier_guesses_are_the_data():
    mtp, T = make(free_running=True, chunk_size=7), 18
    ids = LONG["input_ids"][2:, :T].clone()
    for t in range(2, T - 4):  # a text in which guesses hold now and then: each is made of what stands before it
        guesses = mtp.draft_logits(ids)[0].argmax(-1)
        ids[0, t + 2] = guesses[t, 0]
    guesses = mtp.draft_logits(ids)[0].argmax(-1)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.2, IGNORE_INDEX)
    wanted, left_out = [0, 0, 0], 0
    for t in range(T):
        held = True
        for k in range(1, 4):
            if t + 1 + k < T and labels[0, t + 1 + k] != IGNORE_INDEX:
                wanted[k - 1] += held
                left_out += not held
                held = held and bool(guesses[t, k - 1] == ids[0, t + 1 + k])
    assert wanted[0] > wanted[1] > wanted[2] > 0 < left_out
    for supervision in ("labels", "teacher", "teacher_hard"):
        mtp.mtp_config.free_running = True
        found = [int(loss.count) for loss in mtp(input_ids=ids, labels=labels, mtp_supervision=supervision)["mtp"]]
        assert found == wanted, supervision
        mtp.mtp_config.free_running = False
        every = [int(loss.count) for loss in mtp(input_ids=ids, labels=labels, mtp_supervision=supervision)["mtp"]]
        assert every[0] == wanted[0] and sum(every) == sum(wanted) + left_out


def only(t: int, k: int, T: int, token: int) -> Tensor:
    """Labels of one prediction: depth k at position t."""
    labels_BTK = torch.full((1, T, 3), IGNORE_INDEX)
    labels_BTK[0, t, k - 1] = token
    return labels_BTK


@pytest.mark.parametrize("supervision", ["labels", "teacher", "teacher_hard"])
@torch.no_grad()
def test_teacher_and_student_speak_of_the_same_prefix(supervision):
    mtp = make(latent_loss_weight=0.1, tv_loss_weight=0.5, chunk_size=5)
    ids = torch.tensor([documents(14, seed=8)[0][0]])

    def total(ids: Tensor, t: int, k: int) -> Tensor:
        out = mtp(input_ids=ids, mtp_labels=only(t, k, 14, 5), mtp_supervision=supervision)["mtp"]
        assert [int(loss.count) for loss in out] == [int(i == k) for i in (1, 2, 3)]
        return out[k - 1].total

    for t, k in ((0, 1), (6, 3)):
        wanted = total(ids, t, k)
        for at in range(max(0, t - 2), t + k + 4):
            changed = ids.clone()
            changed[0, at] = (ids[0, at] + 1) % VOCAB
            # depth k at t speaks of token t + 1 + k: it and its teacher read all tokens before that and no other
            assert torch.equal(total(changed, t, k), wanted) == (at > t + k), (t, k, at)


def test_the_last_masks_learn_the_end_of_the_text_through_their_adapters():
    text = documents(8, seed=1)[0][0]
    data = [{"input_ids": [*text, 1], "labels": [IGNORE_INDEX] * 8 + [1]}]  # nothing but the end is learned
    inputs = MTPCollator(0)(data)
    mtp = make()
    for k in (1, 2, 3):
        weights = torch.eye(3)[k - 1]
        totals, counts = learn(mtp, inputs, weights, **TEACHER)
        assert [count for count, _ in counts] == [1, 1, 1]
        found = gradients(mtp.module)
        assert all(gradient.any() for name, gradient in found.items() if name != "rows.embedding")
        assert found["rows.embedding"][:k].any(-1).all() and not found["rows.embedding"][k:].any()
        hand = by_hand(mtp, inputs, "kl")["sampler"]
        assert off(totals, hand) < 1e-5


# -- which tokens carry masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["all", 0.25, "0.5", 1.0, 3, "5", 1000])
def test_as_many_tokens_carry_masks_as_asked(where):
    mtp = make(mask_positions=where)
    batch = to_batch(LONG)
    labels_BTK = mtp.module.labels(batch)
    carries_BT = (labels_BTK != IGNORE_INDEX).any(-1)
    chosen_BTK = mtp.module.choose(batch, torch.Generator().manual_seed(0))
    if where == "all":
        assert chosen_BTK is None
        return
    number = float(where)
    wanted = [math.ceil(n * number) if number < 1 else min(n, int(number)) for n in carries_BT.sum(1).tolist()]
    kept_BT = (chosen_BTK != IGNORE_INDEX).any(-1)
    assert kept_BT.sum(1).tolist() == wanted
    assert torch.equal(chosen_BTK[kept_BT], labels_BTK[kept_BT]), "a token that carries masks carries all of them"
    # all tokens are as likely
    drawn_BT = torch.zeros(carries_BT.shape)
    for seed in range(300):
        drawn_BT += (mtp.module.choose(batch, torch.Generator().manual_seed(seed)) != IGNORE_INDEX).any(-1)
    share_BT = (torch.tensor(wanted) / carries_BT.sum(1))[:, None].expand_as(carries_BT)
    assert not drawn_BT[~carries_BT].any()
    deviation_BT = (share_BT * (1 - share_BT) / 300).sqrt()
    assert ((drawn_BT / 300 - share_BT).abs() <= 6 * deviation_BT)[carries_BT].all()


def test_a_share_is_not_rounded_up_by_the_way_it_is_written():
    batch = to_batch({"input_ids": torch.arange(52)[None]})  # 50 tokens have something to learn; 0.3 has no end in bits
    chosen_BTK = make(mask_positions=0.3).module.choose(batch, torch.Generator())
    assert int((chosen_BTK != IGNORE_INDEX).any(-1).sum()) == 15


def test_the_choice_depends_on_seed_step_micro_batch_and_rank_only(tmp_path, monkeypatch):
    def chosen(step: int = 0, micro: int = 2, rank: int = 0, **arguments: Any) -> Tensor:
        trainer = trainer_of(make(mask_positions=2), tmp_path, **arguments)
        monkeypatch.setattr(type(trainer.args), "process_index", rank)
        trainer.state.global_step = step
        torch.rand(step + 1)  # whatever else was drawn before
        samples = [dict(LONG) for _ in range(3)]
        trainer._get_num_items_in_batch(samples, torch.device("cpu"))
        return samples[micro]["mtp_labels"]

    first = chosen()
    assert torch.equal(chosen(), first)
    others = [chosen(step=1), chosen(micro=1), chosen(seed=7), chosen(rank=1), first]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(others, 2))


def test_a_chosen_part_is_divided_by_its_own_count(tmp_path):
    mtp = make(mask_positions=1)
    logs = run(mtp, tmp_path, rows(4), max_steps=3, per_device_train_batch_size=4, learning_rate=0.0)
    every = run(make(), tmp_path, rows(4), max_steps=1, per_device_train_batch_size=4, learning_rate=0.0)
    losses = column(logs, "loss")
    assert len(set(losses.tolist())) == 3, "each step chooses anew"
    # of the size of a mean, though a step holds a small part of the predictions
    assert ((losses / column(every, "loss") - 1).abs() < 0.5).all()


RESUMED: dict[str, dict[str, Any]] = {
    "number": {"mask_positions": 2, "lora_dropout": 0.1},
    "share, workers, by length": {
        "mask_positions": 0.4,
        "dataloader_num_workers": 2,
        "train_sampling_strategy": "group_by_length",
    },
    "noise": {"mask_tokens": "noise", "sampler": False},
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_by_bit(case, tmp_path):
    ours = {name: value for name, value in RESUMED[case].items() if name in MaskedConfig.__dataclass_fields__}
    plan = {name: value for name, value in RESUMED[case].items() if name not in ours}
    plan |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole, resumed = make(chunk_size=7, **ours), make(chunk_size=7, **ours)
    wanted = run(whole, tmp_path, rows(6), **plan)
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()  # as if it was killed while this was written
    with torch.no_grad():
        for parameter in resumed.module.parameters():
            parameter.zero_()
    trainer = trainer_of(resumed, tmp_path, rows(6), **plan)
    with pytest.warns(UserWarning, match="checkpoint-4 was not written to its end"):
        trainer.train(resume_from_checkpoint=True)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert torch.equal(column(logs, "loss"), column(wanted, "loss")) and len(logs) == 4
    assert not bits_differ(resumed, copied(whole))
    assert len(set(column(wanted, "loss").tolist())) == 4


def test_accumulation_cannot_be_seen(tmp_path):
    runs = []
    for size, steps in ((4, 1), (1, 4)):
        mtp = make(chunk_size=6, **EVERYTHING)
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        weighing = {"mtp_depth_weights": "harmonic", **TEACHER}
        runs.append((mtp, run(mtp, tmp_path, max_steps=3, **sizes, **weighing, **{**SGD, "learning_rate": 0.01})))
    assert_same_run(runs[1][1], runs[0][1], ("loss", "mtp_loss", "grad_norm", "accuracy_1", "accuracy_3"))
    assert_same_weights(runs[1][0], runs[0][0])
    assert float(column(runs[0][1], "loss").std()) > 1e-3


# -- faults ------------------------------------------------------------------------------------------------------------


def test_outputs_shorter_than_the_depth_are_learned_as_far_as_they_go():
    text = documents(10, seed=4)[0][0]
    for output, size in itertools.product((1, 2), (4, 512)):
        labels = [IGNORE_INDEX] * (10 - output) + text[10 - output :]
        inputs = MTPCollator(0)([{"input_ids": text, "labels": labels}])
        mtp = make(chunk_size=size)
        totals, counts = learn(mtp, inputs)
        # the prompt's end looks ahead into its answer
        assert [count for count, _ in counts] == [output] * 3
        assert off(totals, plain_totals(mtp, inputs)) < 1e-5
    # shorter than the depth as a whole: padded so that others of its batch may be longer, and counted where it can be
    short = MTPCollator(0, min_length=5)([{"input_ids": text[:3]}])
    _, counts = learn(make(), short)
    assert [count for count, _ in counts] == [1, 0, 0]


def test_a_prompt_longer_than_a_chunk_is_read():
    text = documents(40, seed=9)[0][0]
    inputs = {"input_ids": torch.tensor([text]), "labels": torch.tensor([[IGNORE_INDEX] * 30 + text[30:]])}
    found = {}
    for size in (4, 11, 512):
        mtp = make(chunk_size=size).double()
        found[size] = learn(mtp, inputs), gradients(mtp)
    for size in (4, 11):
        assert off(found[size][0][0], found[512][0][0]) < EXACT and found[size][0][1] == found[512][0][1]
        assert_close(found[size][1], found[512][1], tolerance=EXACT)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, 0] += 1
    assert off(learn(mtp, other)[0], found[512][0][0]) > 1e-4, "its first token matters"


def test_a_row_without_labels_changes_nothing_for_those_beside_it():
    text, empty = documents(12, 15, seed=11)
    empty = (empty[0], [IGNORE_INDEX] * 15)
    for size in (4, 512):
        mtp = make(chunk_size=size, **EVERYTHING).double()
        wanted, gradient = learn(mtp, packed([[text]]), **TEACHER), gradients(mtp)
        for batch in ([[text], [empty]], [[empty], [text]], [[empty, text]]):
            found = learn(mtp, packed(batch), **TEACHER)
            assert off(found[0], wanted[0]) < EXACT and found[1] == wanted[1]
            assert_close(gradients(mtp), gradient, tolerance=EXACT)
        totals, counts = learn(mtp, packed([[empty], [empty]]), **TEACHER)
        assert not totals.any() and counts == [(0, 0)] * 3
        nothing = gradients(mtp)  # of every parameter, for ranks that wait for it
        assert nothing.keys() == gradient.keys() and not any(zeros.any() for zeros in nothing.values())


@pytest.mark.parametrize("chunk_size", [5, 512])
def test_numbers_that_are_not_finite_stop_the_run_or_are_skipped(chunk_size, tmp_path):
    def broken() -> MTPModel:
        mtp = make(chunk_size=chunk_size)
        with torch.no_grad():
            mtp.target.embed_tokens.weight[96] = torch.nan
        return mtp

    good = [{"input_ids": [i % 90 + 2 for i in range(a, a + 12)]} for a in range(3)]
    bad = {"input_ids": [5, 6, 7, 96, 8, 9, 10, 11, 12, 13, 14, 15]}
    mtp = broken()
    before = copied(mtp)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        run(mtp, tmp_path, [bad] * 4)
    assert bits_differ(mtp, before) == {"model.model.embed_tokens.weight"}, "where NaN is not NaN"
    skipping = {"per_device_train_batch_size": 1, "nonfinite_loss": "skip", "max_steps": 8, "max_grad_norm": 1.0}
    trainer = trainer_of(mtp, tmp_path, [*good, bad], **skipping)
    with pytest.warns(UserWarning, match="loss nan, batch skipped"):
        trainer.train()
    assert trainer.skipped == 2
    state = copied(mtp)
    assert all(t.isfinite().all() for name, t in state.items() if name.startswith("module."))
    assert bits_differ(mtp, before) >= {name for name in before if name.startswith("module.")}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"lora_rank": 2}, "lora_rank: the checkpoint has 4, this run 2"),
        ({"lora_alpha": 5.0}, "lora_alpha: the checkpoint has .*, this run 5.0"),  # whose tensors would fit
        ({"sampler": False}, "sampler: the checkpoint has True, this run False"),
        ({"mask_tokens": "noise"}, "mask_tokens: the checkpoint has 'distinct', this run 'noise'"),
        ({"fuse_weights": True}, "fuse_weights"),
        ({"depth": 4, "mask_positions": 5}, "depth: .*; mask_positions: "),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(other, words, tmp_path):
    make().save_pretrained(tmp_path)
    changed = make(**other)
    before = copied(changed)
    trainer = trainer_of(changed, tmp_path)
    with pytest.raises(ValueError, match=words):
        trainer._load_from_checkpoint(str(tmp_path))
    assert not bits_differ(changed, before)
    trainer_of(make(chunk_size=9), tmp_path)._load_from_checkpoint(str(tmp_path))  # no number depends on it


def test_gradient_checkpointing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gradient_checkpointing: with mask tokens a smaller chunk_size bounds memory"):
        trainer_of(make(), tmp_path, gradient_checkpointing=True)


def test_rotary_positions_that_depend_on_the_length_are_those_of_the_whole_text():
    # Phi-3's longrope: other frequencies in texts beyond a length. A chunk must be turned as the text is that it is of
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = {"rope_parameters": {**rope, "original_max_position_embeddings": 16}}
    mtp = make("phi3", model={**model, "original_max_position_embeddings": 16})
    for T in (30, 15):  # masks below the last tokens of the shorter one stand beyond the border
        batch = to_batch({"input_ids": torch.arange(T)[None] + 2})
        with torch.no_grad():
            wanted = mtp.target.forward_text(batch.input_ids_BT, batch.position_ids_BT).post_norm_BRD
            at_once = one_pass(mtp.module, mtp.target, batch).piece.masks_BOKD
        for size in (512, 8):
            mtp.mtp_config.chunk_size = size
            text_BTD, masks_BTKD = two_passes(mtp, batch)
            assert off(text_BTD, wanted) < EXACT, (T, size)
            assert off(masks_BTKD, at_once) < EXACT, (T, size)


# -- in TRL's trainer --------------------------------------------------------------------------------------------------


def sft_trainer(folder: Path, mode: str, **module: Any) -> Any:
    """TRL's trainer with masks, on four texts of 20 tokens."""
    trl = pytest.importorskip("foretell.trl")
    datasets = pytest.importorskip("datasets")
    module = {"method": "masked", "depth": 3, **module}
    (folder / "preset.yaml").write_text(yaml.safe_dump({"module": module, "training": {}}))
    args = trl.SFTConfig(
        output_dir=str(folder),
        mtp_enabled=True,
        mtp_preset=str(folder / "preset.yaml"),
        mtp_training_mode=mode,
        mtp_weight_decay_strategy="harmonic",
        max_steps=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    data = datasets.Dataset.from_list([{"input_ids": [(7 * i + a) % 90 + 2 for i in range(20)]} for a in range(4)])
    return trl.SFTTrainer(tiny_model(), args, train_dataset=data, processing_class=tiny_tokenizer())


def test_trl_learns_texts_longer_than_a_chunk(tmp_path):
    trainer = sft_trainer(tmp_path, "standalone", chunk_size=6)
    before = copied(trainer.mtp)
    trainer.train()
    assert bits_differ(trainer.mtp, before)


def test_trl_chooses_the_tokens_that_carry_masks(tmp_path):
    trainer = sft_trainer(tmp_path, "standalone", mask_positions=2)
    trainer.train()
    assert next(int(loss.count) for loss in trainer.mtp.losses["mtp"]) <= 2 * 4


def test_joint_training_in_trl_reaches_the_target(tmp_path):
    trainer = sft_trainer(tmp_path, "joint")
    mtp = trainer.mtp.train()
    trainer.compute_loss(mtp, trainer.data_collator([trainer.train_dataset[i] for i in range(2)]))
    sum(loss.total for loss in mtp.losses["mtp"]).backward()
    assert gradients(mtp.model).keys() == {name for name, _ in mtp.model.named_parameters()}
