"""Learning from proposals of the module's own (arXiv 2602.06019): spans lie where the paper lays them, their losses are
those of plain autograd, one carrying token at a time, and the teacher reads what the module said, not the data.

The references are written from the paper's layout and from ordinary forwards over ordinary texts: transformers' own
logits for the teacher, and for the student a text with its masks behind it. What holds for every supervision of masks
stands in test_masked.py; training, decoding and refusals of this one in test_student_forced_runs.py.
"""

# B rows, T positions, O tokens that carry masks, K masks of each, V vocabulary, D hidden width.

from __future__ import annotations

import copy
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_masked_decode import knowing, target
from torch import Tensor, nn

from foretell.data.collate import to_batch
from foretell.methods.base import METHODS
from foretell.methods.reading import owners_of
from foretell.methods.student_forced import choose_regions
from foretell.models.target import Target
from foretell.mtp import MTPModel
from foretell.ops.shift import labels_of
from foretell.ops.tree import ancestors, depths, hang
from foretell.training.objective import choose_labels
from foretell.types import IGNORE_INDEX, PAD_DOCUMENT, Batch
from tests.test_masked import make
from tests.test_methods import COEFFICIENTS, FP32, REFERENCES, ROWS, assert_close, gradients, off, packed, plain_logits
from tests.test_methods import make as make_any
from tests.tiny import VOCAB

HARD, SOFT, DATA = "student_forced", "student_forced_soft", "student_forced_gt"
REGIONS = {"mask_positions": "regions", "region_tokens": 18, "regions": 3, "k_min": 4}  # k = 4 in regions of 6 rows
PLAIN = {"lora_gate": False, "sampler": False}
WHOLE = {"lora_rank": 0, "sampler": False}
Span = tuple[tuple[int, ...], tuple[int, ...], int, int]  # text seen, masks seen, own position, predicted position


# -- the paper's layout ------------------------------------------------------------------------------------------------


def paper_rows(tokens: int, width: int, k: int, offset: int) -> list[tuple[int, str, int]]:
    """(source token, kind, region) of each row of a text, region after region: P = W - (k - 1) tokens, then k - 1 masks
    over the tokens that the next region begins with; all of it `offset` to the left. The region that predicts the last
    token is the last one, and what follows is text.
    """
    text, rows_ = width - (k - 1), []
    for region in itertools.count():
        first = region * text - offset
        rows_ += [(s, "text", region) for s in range(max(first, 0), min(first + text, tokens))]
        last = first + text - 1
        if last >= tokens - 1:
            return rows_
        rows_ += [(s, "mask", region) for s in range(last + 1, last + k)]
        if last + k >= tokens - 1:
            return rows_ + [(s, "text", region + 1) for s in range(last + 1, tokens)]


def paper_spans(rows_: list[tuple[int, str, int]], tokens: int) -> set[Span]:
    """What each mask sees, text before it and earlier masks of its span, where it stands, and what it predicts."""
    out = set()
    for at, (source, kind, region) in enumerate(rows_):
        if kind == "mask":
            text = tuple(s for s, what, _ in rows_[:at] if what == "text")
            masks = tuple(s for s, what, own in rows_[:at] if what == "mask" and own == region)
            out.add((text, masks, source, min(source + 1, tokens - 1)))
    return out


def hung_spans(chosen_BTK: Tensor, batch: Batch) -> dict[tuple[int, int], set[Span]]:
    """The same of our token tree, for each row and document; tokens are numbered 1000 * document + position."""
    T, K = batch.input_ids_BT.shape[1], deepest(chosen_BTK)
    carries_BT = (chosen_BTK != IGNORE_INDEX).any(-1)
    owner_BO, valid_BO = owners_of(carries_BT, max(int(carries_BT.sum(1).amax()), 1))
    parents_BR, _ = hang(batch.document_BT, owner_BO, valid_BO, K)
    seen_BRR, place_BR = ancestors(parents_BR), depths(parents_BR)
    assert not seen_BRR[:, :T, T:].any(), "text sees no mask"
    out: dict[tuple[int, int], set[Span]] = {}
    for b, o in valid_BO.nonzero().tolist():
        owner = int(owner_BO[b, o])
        document = int(batch.document_BT[b, owner])
        for j in range(K):
            row = T + o * K + j
            text = batch.input_ids_BT[b, seen_BRR[b, row, :T]]
            masks = place_BR[b, T:][seen_BRR[b, row, T:]].tolist()
            predicted = int(chosen_BTK[b, owner, j])
            assert (text // 1000 == document).all() and predicted // 1000 == document and masks[-1] == place_BR[b, row]
            span = (tuple((text % 1000).tolist()), tuple(masks[:-1]), masks[-1], predicted % 1000)
            out.setdefault((b, document), set()).add(span)
    return out


def deepest(chosen_BTK: Tensor) -> int:
    return int((chosen_BTK != IGNORE_INDEX).flatten(0, 1).any(0).nonzero().amax()) + 1


def numbered(lengths: list[list[int]], padding: int) -> Batch:
    """Rows of documents of these lengths, whose tokens say where they stand."""
    rows_ = [[[1000 * d + p for p in range(n)] for d, n in enumerate(row)] for row in lengths]
    return to_batch(packed([[(ids, ids) for ids in row] for row in rows_], padding))


def drawn(chosen_BTK: Tensor, width: int) -> tuple[int, int]:
    """(k, offset) of a choice whose first document is long enough to show them."""
    k = deepest(chosen_BTK) + 1
    return k, width - k - int((chosen_BTK[0] != IGNORE_INDEX).any(-1).nonzero()[0])


@pytest.mark.parametrize("seed", range(40))
def test_masks_hang_where_the_paper_lays_them(seed):
    rng = random.Random(seed)
    width = rng.randint(3, 12)
    k_max = rng.randint(2, width)
    lengths = [[width + rng.randint(2, 30), *(rng.randint(1, 25) for _ in range(rng.randint(0, 3)))] for _ in range(2)]
    batch = numbered(lengths, padding=rng.randint(0, 4))
    k_min = rng.randint(2, k_max)

    def choose() -> Tensor:
        labels_BTK = labels_of(batch, k_max - 1)
        return choose_regions(labels_BTK, batch, width, k_min, torch.Generator().manual_seed(seed))

    chosen_BTK = choose()
    assert (chosen_BTK[batch.document_BT == PAD_DOCUMENT] == IGNORE_INDEX).all()
    k, offset = drawn(chosen_BTK, width)

    def paper(offset: int) -> dict[tuple[int, int], set[Span]]:
        """Each document by itself, in the same rhythm."""
        every = {(b, d): n for b, row in enumerate(lengths) for d, n in enumerate(row)}
        return {at: s for at, n in every.items() if (s := paper_spans(paper_rows(n, width, k, offset), n))}

    found = hung_spans(chosen_BTK, batch)
    assert found == paper(offset)
    assert width == k or found != paper(offset + 1 if offset < width - k else offset - 1), "the gate"
    # a token that is not trained is no label either, and nothing else changes
    holes_BT = torch.rand(batch.labels_BT.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    batch.labels_BT = batch.labels_BT.masked_fill(holes_BT, IGNORE_INDEX)
    labels_BT = [set(batch.labels_BT[b].tolist()) for b in range(2)]
    kept = [[[v if v in labels_BT[b] else IGNORE_INDEX for v in t] for t in chosen_BTK[b].tolist()] for b in range(2)]
    assert torch.equal(choose(), torch.tensor(kept))


def test_the_papers_figure():
    """18 rows, three regions, k = 3: 0-3|4,5, 4-7|8,9, 8-11|12,13, where | stands before masks."""
    mtp = make(depth=2, fixed_k=3, **{**REGIONS, "k_min": 2})
    batch, found = numbered([[15]], padding=0), {}
    for seed in range(40):
        chosen_BTK = mtp.module.choose(batch, torch.Generator().manual_seed(seed))
        assert chosen_BTK.shape == (1, 15, 2)
        spans = sorted(hung_spans(chosen_BTK, batch)[0, 0], key=lambda span: (len(span[0]), span[2]))
        found[drawn(chosen_BTK, 6)[1]] = [span[2:] for span in spans]
    assert found.keys() == {0, 1, 2, 3}
    assert found[0] == [(4, 5), (5, 6), (8, 9), (9, 10), (12, 13), (13, 14)]
    assert found[1] == [(3, 4), (4, 5), (7, 8), (8, 9), (11, 12), (12, 13)]  # a freed token behind
    assert found[3] == [(1, 2), (2, 3), (5, 6), (6, 7), (9, 10), (10, 11), (13, 14), (14, 14)]  # filled with the last


def test_every_k_meets_every_offset():
    width, seeds = 8, 1200
    batch = numbered([[40]], padding=0)
    labels_BTK = labels_of(batch, 4)
    found = Counter(
        drawn(choose_regions(labels_BTK, batch, width, 2, torch.Generator().manual_seed(seed)), width)
        for seed in range(seeds)
    )
    likely = {(k, offset): 1 / 4 / (width - k + 1) for k in range(2, 6) for offset in range(width - k + 1)}
    assert found.keys() == likely.keys()
    statistic = sum((found[pair] - seeds * p) ** 2 / (seeds * p) for pair, p in likely.items())
    assert statistic < 21 + 5 * (2 * 21) ** 0.5  # chi-square of 21 degrees of freedom
    same_seed = set()  # the gate: the released sampler
    for seed in range(seeds):
        one, other = (torch.Generator().manual_seed(seed) for _ in range(2))
        k = int(torch.randint(2, 6, (), generator=one))
        same_seed.add((k, int(torch.randint(width - k + 1, (), generator=other))))
    assert len(same_seed) < 0.8 * len(likely)


def test_a_fixed_k_is_always_the_same_and_its_offset_is_not():
    mtp, batch = make(fixed_k=4, **{**REGIONS, "k_min": 2}), numbered([[40]], padding=0)
    found = {drawn(mtp.module.choose(batch, torch.Generator().manual_seed(seed)), 6) for seed in range(60)}
    assert found == {(4, offset) for offset in range(3)}


def test_the_choice_depends_on_seed_step_micro_batch_and_rank_only():
    mtp = make(**{**REGIONS, "region_tokens": 60, "k_min": 2})
    ids_BT = torch.arange(60)[None]

    def chosen(seed: int, step: int, rank: int) -> list[tuple[int, int]]:
        torch.rand(seed + step + 1)  # whatever else was drawn before
        samples = [{"input_ids": ids_BT} for _ in range(12)]
        choose_labels(mtp.module, samples, seed, step, rank)
        return [drawn(sample["mtp_labels"], 20) for sample in samples]

    settings = list(itertools.product((0, 1), (0, 1), (0, 1)))
    every = [chosen(*setting) for setting in settings]
    assert every == [chosen(*setting) for setting in settings]
    assert all(one != other for one, other in itertools.combinations(every, 2))
    assert all(len(set(one)) > 6 for one in every), "each micro-batch draws anew"


# -- plain autograd ----------------------------------------------------------------------------------------------------


@contextmanager
def adapted(mtp: MTPModel, first: int) -> Iterator[None]:
    """Adapters on the rows from `first` on."""

    def hook(path: str) -> Any:
        lora, _ = mtp.module.rows.adapters.adapter(path)

        def add(_module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            change = args[0][:, first:] @ lora.lora_A.weight.T @ lora.lora_B.weight.T * lora.scale
            return torch.cat([out[:, :first], out[:, first:] + change], dim=1)

        return mtp.target.layers.get_submodule(path).register_forward_hook(add)

    handles = [hook(path) for path in mtp.module.rows.adapters.paths]
    yield
    for handle in handles:
        handle.remove()


class Hand:
    """Sums over a batch, and what one prediction adds to them."""

    def __init__(self, mtp: MTPModel, teacher: nn.Module, supervision: str, wrong: str = "") -> None:
        self.mtp, self.teacher, self.supervision, self.wrong = mtp, teacher, supervision, wrong
        kept = mtp.module.draft_vocab_ids
        self.kept = torch.arange(VOCAB) if kept is None else kept
        self.totals: list[Any] = [torch.zeros(()) for _ in range(mtp.mtp_config.depth)]
        self.counts = [0] * mtp.mtp_config.depth
        self.anchor: Any = torch.zeros(())
        self.prefix: Any = torch.zeros(())

    def read(self, text: Tensor, said: list[int], data: list[int]) -> Tensor:
        """The teacher's logits: row 0 at the text's last token, row j after j tokens of the proposal."""
        after = data if self.wrong == "data" else said
        with torch.no_grad():
            logits = self.teacher(input_ids=torch.cat([text, torch.tensor(after)])[None]).logits[0]
        first = len(text) - 1 - (self.wrong == "shift" and len(text) > 1)
        return logits[first : first + len(after) + 1]

    def loss(self, logp: Tensor, taught_V: Tensor, data: int, kept: Tensor) -> Tensor | None:
        """Of one row; None: its token is no draft token."""
        if self.supervision == SOFT:
            logq = taught_V[kept].log_softmax(-1)
            return (logq.exp() * (logq - logp)).sum()
        token = int(taught_V.argmax()) if self.supervision == HARD else data
        at = (kept == token).nonzero()
        return -logp[at[0, 0]] if len(at) else None

    def add(self, k: int, loss: Tensor | None) -> None:
        if loss is not None:
            self.totals[k], self.counts[k] = self.totals[k] + loss, self.counts[k] + 1

    def objective(self) -> Tensor:
        return sum(c * t for c, t in zip(COEFFICIENTS, self.totals)) + 0.3 * self.anchor + 0.2 * self.prefix


def by_masks(mtp: MTPModel, teacher: nn.Module, batch: Batch, chosen_BTK: Tensor, *how: str) -> Hand:
    """Every carrying token by itself: its text and its masks are an ordinary text, so are its text and its proposal."""
    hand, module, target, config = Hand(mtp, teacher, *how), mtp.module, mtp.target, mtp.mtp_config
    everything = torch.arange(VOCAB)
    for b, document in itertools.product(range(len(batch.input_ids_BT)), range(9)):
        column_T = (batch.document_BT[b] == document).nonzero()[:, 0]
        ids, labels, chosen = (values[b, column_T] for values in (batch.input_ids_BT, batch.labels_BT, chosen_BTK))
        for t in range(len(ids)):
            counted = [k for k in range(config.depth) if chosen[t, k] != IGNORE_INDEX]
            deep, label = max(counted, default=-1) + 1, int(labels[t + 1]) if t + 1 < len(ids) else IGNORE_INDEX
            masks = module.rows.embedding.expand(deep, -1) if len(module.rows.embedding) == 1 else module.rows.embedding
            text = torch.cat([target.embed(ids[: t + 1]), masks[:deep]])[None]
            with adapted(mtp, t + 1 if module.gated else 0):
                states = target.decoder(inputs_embeds=text, use_cache=False).last_hidden_state[0]
            own = plain_logits(mtp, states[t], detach=False).log_softmax(-1)
            if not counted:
                hand.prefix = hand.prefix - (own[label] * config.prefix_loss_weight if label != IGNORE_INDEX else 0.0)
                continue
            data = [int(ids[min(t + 1 + j, len(ids) - 1)]) for j in range(deep + 1)]
            chain, said = [int(own.argmax())], []
            for j, state in enumerate(states[t + 1 :]):
                if module.sampler is not None:
                    before = data[j] if hand.supervision == DATA else chain[j]
                    state = module.sampler(target.embed(torch.tensor([before])), state[None])[0]
                said.append(plain_logits(mtp, state, detach=False)[hand.kept].log_softmax(-1))
                chain.append(int(hand.kept[said[j].argmax()]))
            taught = hand.read(ids[: t + 1], chain[:deep], data[:deep])
            shown = [data[0], *data] if hand.wrong == "shift" else data
            for j in counted:
                hand.add(j, hand.loss(said[j], taught[j + 1], shown[j + 1], hand.kept))
                hand.totals[j] = hand.totals[j] - config.entropy_loss_weight * (said[j].exp() * said[j]).sum()
                right = data[j + 1] if hand.supervision == DATA else int(taught[j + 1].argmax())
                if config.free_running and chain[j + 1] != right:
                    break
            if 0 in counted and (hand.supervision != DATA or label != IGNORE_INDEX):
                hand.anchor = hand.anchor + hand.loss(own, taught[0], shown[0], everything)
    return hand


# settings, mode
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "gated": ({"mask_positions": 0.4}, "standalone"),
    "gated, regions, one mask": ({**REGIONS, "sampler": False, "mask_tokens": "shared"}, "standalone"),
    "all tokens, reduced vocabulary": ({"draft_vocab_size": 41}, "standalone"),
    "chunks": ({"chunk_size": 5, **REGIONS}, "standalone"),
    "plain": ({**PLAIN, "prefix_loss_weight": 0.6, **REGIONS}, "standalone"),
    "plain, sampler, reduced": ({"lora_gate": False, "draft_vocab_size": 41, "mask_positions": 0.4}, "standalone"),
    "whole": ({**WHOLE, "prefix_loss_weight": 0.6, **REGIONS}, "joint"),
    "whole, gated": ({"mask_positions": 0.4}, "joint"),
    "softcap": ({"architecture": "gemma2", **REGIONS}, "standalone"),
    "softcap, whole": ({"architecture": "gemma2", **WHOLE, **REGIONS}, "joint"),
    "free running": ({"knows": True, "free_running": True}, "standalone"),
    "free running, entropy": (
        {"knows": True, "free_running": True, "entropy_loss_weight": 0.3, "draft_vocab_size": 60},
        "standalone",
    ),
    "entropy, plain": ({**PLAIN, "entropy_loss_weight": 0.1, "mask_positions": 0.4}, "standalone"),
}


def shaken_copy(mtp: MTPModel) -> nn.Module:
    """A frozen copy of the target as the module's teacher; then the target moves away from it."""
    mtp.module.teacher = Target(copy.deepcopy(mtp.model).requires_grad_(False))
    with torch.no_grad():
        for parameter in mtp.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.02)
    return mtp.module.teacher.model


def differentiated(mtp: MTPModel, out: dict[str, Any] | Hand) -> dict[str, Tensor]:
    mtp.zero_grad()
    if isinstance(out, Hand):
        out.objective().backward()
    else:
        wanted = sum(c * loss.total for c, loss in zip(COEFFICIENTS, out["mtp"]))
        parts = [(0.3, out.get("anchor")), (0.2, out["ntp"])]
        (wanted + sum(c * loss.total for c, loss in parts if loss is not None)).backward()
    return gradients(mtp)


def held_against(mtp: MTPModel, mode: str, wrongs: list[str], found: dict, hand: Callable[..., Hand]) -> None:
    """Totals, counts and gradients of a forward against a reference, and against that with deliberate mistakes."""
    wanted, got = hand(), differentiated(mtp, found)
    assert [int(loss.count) for loss in found["mtp"]] == wanted.counts
    totals = torch.stack([loss.total for loss in found["mtp"]])
    assert off(totals, torch.stack(wanted.totals)) < FP32
    for name, part in (("anchor", wanted.anchor), ("ntp", wanted.prefix)):
        assert found.get(name) is None or off(found[name].total, part) < FP32
    gradient = differentiated(mtp, wanted)
    if mode == "standalone":
        gradient = {name: g for name, g in gradient.items() if name.startswith("module.")}
    assert_close(got, gradient, tolerance=1e-4)
    for factor in (0.0, 2.0, -1.0):
        with pytest.raises(AssertionError):
            assert_close({name: factor * g for name, g in got.items()}, gradient, tolerance=1e-4)
    for wrong in wrongs:
        with torch.no_grad():
            assert off(totals, torch.stack(hand(wrong).totals)) > 100 * FP32, wrong


@pytest.mark.parametrize("supervision", [HARD, SOFT, DATA])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_plain_autograd(case, supervision):
    settings, mode = dict(CASES[case][0]), CASES[case][1]
    mtp = knowing(target(), noise=0.9, **settings) if settings.pop("knows", False) else make(**settings)
    teacher = shaken_copy(mtp) if mode == "joint" else mtp.model
    inputs = packed(ROWS)
    chosen_BTK = mtp.module.choose(to_batch(inputs), torch.Generator().manual_seed(3))
    chosen_BTK = labels_of(to_batch(inputs), 3) if chosen_BTK is None else chosen_BTK
    found = mtp(
        **inputs,
        mtp_labels=chosen_BTK,
        mtp_supervision=supervision,
        mtp_loss="kl" if supervision == SOFT else "ce",
        mtp_training_mode=mode,
        train_target=mode == "joint",
        mtp_coefficients=torch.tensor(COEFFICIENTS),
    )
    learns_text = mode == "joint" or not mtp.module.gated
    assert (found["anchor"] is None, found["ntp"] is None) == (not learns_text,) * 2
    assert min(int(loss.count) for loss in found["mtp"]) > 0

    def hand(wrong: str = "") -> Hand:
        return by_masks(mtp, teacher, to_batch(inputs), chosen_BTK, supervision, wrong)

    held_against(mtp, mode, ["shift"] if supervision == DATA else ["data", "shift"], found, hand)


# -- chains that read what they drafted --------------------------------------------------------------------------------


def chain_row(
    plain: Any, ids: list[int], k: int, t: int, known: Tensor, own: Tensor, token: int, detach: bool
) -> Tensor:
    """Depth k + 1 at t, which reads a drafted token; the rows before it, which it sees, have read the data's."""
    block = plain.mtp.module.blocks[0 if plain.config.shared_module else k]
    before = plain.mtp.target.embed_tokens(torch.tensor([*ids[k + 1 : t + k + 1], token]))
    missing = torch.zeros(t + 1 - len(before), before.shape[1])
    table = torch.cat([before[:-1], missing, before[-1:]])[None]
    halves = [block.enorm(table.detach() if detach else table), block.hnorm(torch.cat([known[:, :t], own], dim=1))]
    return block.norm(plain.run_block(block.block, F.linear(torch.cat(halves, dim=-1), block.eh_proj.weight)))[:, -1:]


def by_chains(mtp: MTPModel, teacher: nn.Module, mode: str, *how: str) -> Hand:
    """Every labelled token by itself."""
    hand, plain, detach = Hand(mtp, teacher, *how), REFERENCES[mtp.mtp_config.method](mtp), mode == "standalone"
    K = mtp.mtp_config.depth
    for ids, labels in itertools.chain(*ROWS):
        with torch.no_grad() if detach else torch.enable_grad():
            after = plain.target_states(ids)[1]
        own_TV = plain_logits(mtp, after[0], detach).log_softmax(-1)
        hand.prefix = hand.prefix - sum(own_TV[t, v] for t, v in enumerate(labels[1:]) if v != IGNORE_INDEX)
        known = [after, *plain.states(ids, after, detach)]
        if mtp.mtp_config.method == "sequential":
            fused = plain.fused(mtp.module.blocks[0], plain.ahead(ids, 1, detach), after)
        for t in range(len(ids)):
            counted = [k for k, label in enumerate(labels[t + 2 : t + 2 + K]) if label != IGNORE_INDEX]
            if not counted:
                continue
            data = [ids[min(t + 1 + j, len(ids) - 1)] for j in range(K)]
            chain, said, own = [int(own_TV[t].argmax())], [], after[:, t : t + 1]
            rows = fused[:, :t] if mtp.mtp_config.method == "sequential" else after
            for k in range(K):
                token = data[k] if hand.wrong == "chain" else chain[k]
                if mtp.mtp_config.method == "sequential" and mtp.mtp_config.shared_module:
                    read = mtp.target.embed_tokens(torch.tensor([[token]]))
                    own, _, rows = plain.next_states(rows, read.detach() if detach else read, own)
                elif mtp.mtp_config.method == "sequential":
                    own = chain_row(plain, ids, k, t, known[k], own, token, detach)
                else:
                    own = known[k + 1][:, t : t + 1]
                said.append(plain_logits(mtp, own[0, 0], detach)[hand.kept].log_softmax(-1))
                chain.append(int(hand.kept[said[k].argmax()]))
            taught = hand.read(torch.tensor(ids[: t + 1]), chain[:K], data)
            for j in counted:
                hand.add(j, hand.loss(said[j], taught[j + 1], 0, hand.kept))
    return hand


CHAINS: dict[str, tuple[str, dict[str, Any], str]] = {
    "sequential": ("sequential", {}, "standalone"),
    "one module": ("sequential", {"shared_module": True}, "standalone"),
    "one module, reduced": ("sequential", {"shared_module": True, "draft_vocab_size": 41}, "standalone"),
    "sequential, softcap": ("sequential", {"architecture": "gemma2"}, "standalone"),
    "sequential, joint": ("sequential", {}, "joint"),
    "heads": ("heads", {}, "standalone"),
    "heads, reduced, joint": ("heads", {"draft_vocab_size": 41}, "joint"),
}


@pytest.mark.parametrize("supervision", [HARD, SOFT])
@pytest.mark.parametrize("case", CHAINS)
def test_chains_learn_on_what_they_drafted(case, supervision):
    method, settings, mode = CHAINS[case]
    mtp = make_any(method, depth=3, **settings).train()
    teacher = shaken_copy(mtp) if mode == "joint" else mtp.model
    how: dict[str, Any] = {"mtp_supervision": supervision, "mtp_loss": "kl" if supervision == SOFT else "ce"}
    found = mtp(**packed(ROWS), mtp_training_mode=mode, train_target=mode == "joint", **how)
    assert found["anchor"] is None and min(int(loss.count) for loss in found["mtp"]) > 2

    def hand(wrong: str = "") -> Hand:
        return by_chains(mtp, teacher, mode, supervision, wrong)

    held_against(mtp, mode, ["data", "shift", *(["chain"] if method == "sequential" else [])], found, hand)


@pytest.mark.parametrize("method", METHODS)
def test_where_all_proposals_are_the_targets_own_text_it_is_the_hard_teacher(method):
    mtp = make_any(method, depth=2).train()
    ids = mtp.model.generate(torch.tensor([[5]]), attention_mask=torch.ones(1, 1), max_new_tokens=20, do_sample=False)
    optimizer = torch.optim.AdamW(mtp.module.parameters(), lr=5e-3)
    for _ in range(60):  # by heart
        optimizer.zero_grad()
        sum(loss.total for loss in mtp(input_ids=ids)["mtp"]).backward()
        optimizer.step()

    def learned(ids: Tensor, supervision: str) -> tuple[Tensor, dict[str, Tensor]]:
        out = mtp(input_ids=ids, mtp_supervision=supervision)
        assert not torch.equal(ids, own) or all(int(loss.correct) == int(loss.count) > 15 for loss in out["mtp"])
        return torch.stack([loss.total.detach() for loss in out["mtp"]]), differentiated(mtp, out)

    own, other = ids, ids.flip(1)
    (totals, gradient), (wanted, wanted_gradient) = learned(own, HARD), learned(own, "teacher_hard")
    assert off(totals, wanted) < FP32
    assert_close(gradient, wanted_gradient, tolerance=1e-3)  # small ones: it has learned them
    assert off(learned(other, HARD)[0], learned(other, "teacher_hard")[0]) > 0.01, "elsewhere they differ"
