"""Spans that nobody verifies: what is committed is what the paper's rule says, as a slow twin computes it."""

# B sequences, T prompt width, K = k - 1 tokens beyond the target's own, V vocabulary, L cached columns, N numbers.

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from drafters import Wrong, knowing_mtp, leaning_model
from test_decode import Recorder, prompts, reference, texts, tokenizer
from test_heads import fitted as fitted_heads
from test_masked_decode import BATCHES, fitted, knowing, run, target, total
from test_sampling import LEAST_P, count, p_value, processors
from test_sampling import V as SMALL
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers.generation import logits_process as lp

import foretell
from foretell.cli import main
from foretell.decoding.adaptive import AdaptiveLength, CostCurve
from foretell.decoding.loop import Decoder
from foretell.decoding.policies import LOSSY, SPANS
from foretell.decoding.spans import SpanDecoder, SpanLength
from foretell.decoding.verify import verify
from foretell.models.slot_cache import SlotCache
from foretell.mtp import MTPModel, get_mtp_model
from foretell.types import Draft, SequenceState

K = 3  # depth of fitted()
NEW = 20
THRESHOLDS = (1e-6, 0.3, 0.6, 0.9, 1.0)
NEAREST = 1e-5  # confidences nearer to a threshold than this may fall on either side, by rounding

CHEAP = CostCurve({1: 1.0, 4096: 1.001})
DEAR = CostCurve({1: 1.0, 64: 64.0})


def sharp(mtp: MTPModel, times: float = 12.0, name: str = "llama") -> MTPModel:
    """The same on a target whose logits are so many times as large: these random models are sure of nothing."""
    model = leaning_model(name)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(times)
    made = get_mtp_model(model, mtp.mtp_config)
    made.module.load_state_dict(mtp.module.state_dict())
    made._curve = mtp._curve
    return made.eval()


@functools.cache
def mixed(sampler: bool = True) -> MTPModel:
    """Sure of some rows of the target and of the masks, unsure of others."""
    return sharp(knowing(target(), noise=0.6), 16.0) if sampler else sharp(fitted(sampler=False))


# -- the slow twin -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def twin(
    mtp: MTPModel, prompt: list[int], new: int, k: int, threshold: float | None, ends: tuple[int, ...] = (), **more: Any
) -> tuple[list[int], list[int]]:
    """(text, tokens of each span) of one sequence, every row of every span from a forward of the whole text.

    threshold None: static k. penalty: transformers' repetition penalty on every row's logits.
    """
    text, spans = list(prompt), []
    while True:
        span: list[int] = []
        for j in range(k):  # row 1 is the target's, row j + 1 that of mask j
            ids = torch.tensor([text + span])
            logits_V = mtp.model(ids).logits[0, -1] if j == 0 else mtp.draft_logits(ids)[0, len(text) - 1, j - 1]
            confidence = float(logits_V.float().softmax(-1).max())
            if threshold is not None:
                assert threshold == 1.0 or abs(confidence - threshold) > NEAREST, "take another threshold"
                if confidence < threshold and j > 0:
                    break
            if "penalty" in more:
                logits_V = lp.RepetitionPenaltyLogitsProcessor(more["penalty"])(ids, logits_V[None].float())[0]
            span.append(int(logits_V.argmax()))
            if threshold is not None and confidence < threshold:
                break
        for n, token in enumerate(span, start=1):
            text.append(token)
            if token in ends or len(text) == len(prompt) + new:
                return text, [*spans, n]
        spans.append(len(span))


_told: WeakKeyDictionary[MTPModel, dict[str, tuple[list[int], list[int]]]] = WeakKeyDictionary()


def twins(mtp: MTPModel, inputs: dict[str, Tensor], *rule: Any, **more: Any) -> list[tuple[list[int], list[int]]]:
    """The twin of each sequence of a batch."""
    found = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        known, key = _told.setdefault(mtp, {}), f"{ids[mask == 1].tolist()} {rule} {more}"
        if key not in known:
            known[key] = twin(mtp, ids[mask == 1].tolist(), *rule, **more)
        found.append(known[key])
    return found


def check(out: Any, inputs: dict[str, Tensor], wanted: list[tuple[list[int], list[int]]]) -> None:
    """Token by token and span by span."""
    for text, (wanted_text, _) in zip(texts(inputs, out.sequences), wanted, strict=True):
        assert text[: len(wanted_text)] == wanted_text and not any(text[len(wanted_text) :])
    assert out.stats.emitted == [spans for _, spans in wanted]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("sampler", [True, False], ids=["sampler", "masks alone"])
def test_confadapt_is_its_twin(sampler, batch):
    mtp, (inputs, slots), seen = mixed(sampler), BATCHES[batch], set()
    for threshold in THRESHOLDS:
        for k in (2, K + 1):
            settings = {"confidence_threshold": threshold, "num_draft_tokens": k, "slots": slots}
            out = run(mtp, inputs, policy="confadapt", max_new_tokens=NEW, **settings)
            check(out, inputs, twins(mtp, inputs, NEW, k, threshold))
            seen |= {(k, threshold < 0.01, n) for each in out.stats.emitted for n in each[:-1]}
    lengths = {n for k, tiny, n in seen if k == K + 1 and not tiny}
    assert len(lengths) > 2 - (batch == "one") and {n for _, tiny, n in seen if tiny} == {2, K + 1}, (
        "the gate: spans of many lengths"
    )


@pytest.mark.parametrize("batch", BATCHES)
def test_static_k_is_its_twin_and_commits_exactly_k(batch):
    mtp, (inputs, slots) = mixed(), BATCHES[batch]
    for k in range(1, K + 2):
        out = run(mtp, inputs, policy="static_k", num_draft_tokens=k, max_new_tokens=NEW, slots=slots)
        check(out, inputs, twins(mtp, inputs, NEW, k, None))
        assert all(set(each[:-1]) <= {k} and each[-1] == (NEW % k or k) for each in out.stats.emitted)
        assert out.stats.tau == pytest.approx(NEW / math.ceil(NEW / k))
    default = run(mtp, inputs, policy="static_k", max_new_tokens=NEW, slots=slots)
    assert default.stats.records == out.stats.records, "depth + 1 if not given"


@pytest.mark.parametrize("rule", [("static_k", None), ("confadapt", 0.6)])
def test_ends_inside_a_span(rule):
    """End tokens and length limits in each place of a text: nothing after them is ever emitted."""
    (policy, threshold), mtp, inputs, cut = rule, mixed(), BATCHES["three"][0], 0
    common = {"policy": policy, "confidence_threshold": threshold}
    whole = [
        text[int(mask.sum()) :]
        for (text, _), mask in zip(twins(mtp, inputs, NEW, K + 1, threshold), inputs["attention_mask"], strict=True)
    ]
    for place in range(9):
        ends = (whole[0][place], whole[2][12])
        out = run(mtp, inputs, max_new_tokens=NEW, eos_token_id=list(ends), **common)
        check(out, inputs, twins(mtp, inputs, NEW, K + 1, threshold, ends))
        short = run(mtp, inputs, max_new_tokens=place + 1, **common)
        check(short, inputs, twins(mtp, inputs, place + 1, K + 1, threshold))
        assert [sum(each) for each in short.stats.emitted] == [place + 1] * 3
        for stats in (out.stats, short.stats):
            cut += sum(policy == "static_k" and record[-1].emitted <= K for record in stats.records)
            assert all(v.emitted == v.accepted + 1 == len(v.sources) for record in stats.records for v in record)
    assert cut > 10 or policy == "confadapt"


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_neox"])
def test_windows_and_soft_caps(name):
    mtp, inputs = sharp(knowing(target(name), noise=0.6), name=name), prompts(11, 6, 14)
    for threshold in (None, 0.45):
        settings = {"policy": "static_k"} if threshold is None else {"policy": "confadapt"}
        out = run(mtp, inputs, max_new_tokens=16, confidence_threshold=threshold, slots=2, **settings)
        check(out, inputs, twins(mtp, inputs, 16, K + 1, threshold))
        assert out.stats.tau > 1.3


OTHERS: dict[str, Callable[[], MTPModel]] = {
    "sequential": lambda: knowing_mtp(target(), noise=0.4),
    "one module for all depths": lambda: knowing_mtp(target(), noise=0.4, shared_module=True),
    "reduced vocabulary": lambda: knowing(target(), noise=0.6, draft_vocab_size=60),
    "masks alone, reduced": lambda: fitted(sampler=False, draft_vocab_size=60),
    "distinct masks": lambda: knowing(target(), noise=0.6, mask_tokens="distinct"),
    "heads": lambda: fitted_heads("medusa"),
    "heads that attend": lambda: fitted_heads("mha_ffn"),
    "heads, reduced": lambda: fitted_heads("ffn", None, 40),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_module_can_commit_spans(name):
    mtp = sharp(OTHERS[name]())
    for batch in ("one", "five in two slots"):
        inputs, slots = BATCHES[batch]
        for threshold, k in ((None, 4), (0.45, 4), (0.3, 3)):
            settings = {"policy": "static_k"} if threshold is None else {"policy": "confadapt"}
            settings |= {"num_draft_tokens": k, "confidence_threshold": threshold, "slots": min(slots, 2)}
            out = run(mtp, inputs, max_new_tokens=13, **settings)
            check(out, inputs, twins(mtp, inputs, 13, k, threshold))
    assert out.stats.tau > 1.2, "the gate: something was committed beyond the target's own"
    assert 0 < out.stats.draft_forwards <= 2 * out.stats.verifications


def test_a_module_reused_at_every_depth_goes_deeper_than_it_was_trained():
    mtp, inputs = knowing_mtp(target(), noise=0.4, shared_module=True), BATCHES["one"][0]
    out = run(mtp, inputs, max_new_tokens=NEW, policy="static_k", num_draft_tokens=10)
    assert out.stats.emitted == [[10, 10]]


@pytest.mark.parametrize("batch", BATCHES)
def test_a_span_of_one_is_greedy_and_so_is_certainty(batch):
    mtp, (inputs, slots) = mixed(), BATCHES[batch]
    wanted = reference(mtp.model, inputs, max_new_tokens=NEW).tolist()
    for settings in (
        {"policy": "static_k", "num_draft_tokens": 1},
        {"policy": "confadapt", "num_draft_tokens": 1, "confidence_threshold": 0.01},
        {"policy": "confadapt", "confidence_threshold": 1.0},
    ):
        out = run(mtp, inputs, max_new_tokens=NEW, slots=slots, **settings)
        assert out.sequences.tolist() == wanted and out.stats.tau == 1.0 and not out.stats.lossless
    spans = run(mtp, inputs, max_new_tokens=NEW, slots=slots, policy="static_k")
    assert spans.sequences.tolist() != wanted, "the gate: lossy"


def test_logits_processors_reach_every_row():
    mtp, (inputs, slots) = mixed(), BATCHES["five in two slots"]
    for threshold in (None, 0.6):
        settings = {"policy": "static_k"} if threshold is None else {"policy": "confadapt"}
        settings |= {"confidence_threshold": threshold, "slots": slots, "max_new_tokens": NEW}
        wanted = twins(mtp, inputs, NEW, K + 1, threshold, penalty=1.3)
        assert wanted != twins(mtp, inputs, NEW, K + 1, threshold)
        check(run(mtp, inputs, repetition_penalty=1.3, **settings), inputs, wanted)


def test_stop_strings_streamers_and_transformers_own_door():
    mtp, inputs = mixed(), BATCHES["one"][0]
    settings = {"policy": "confadapt", "confidence_threshold": 0.3}
    ((text, spans),) = twins(mtp, inputs, NEW, K + 1, 0.3)
    new = text[9:]
    place = next(i for i in range(4, 12) if new[i] not in new[:i])
    stopping = {"stop_strings": [tokenizer().decode(new[place])], "tokenizer": tokenizer()}
    out = run(mtp, inputs, max_new_tokens=NEW, **stopping, **settings)
    assert out.sequences[0, 9:].tolist() == new[: place + 1]
    told, through = Recorder(), Recorder()
    out = run(mtp, inputs, max_new_tokens=NEW, streamer=told, **settings)
    door = foretell.custom_generate(mtp, **settings)
    again = mtp.model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0, streamer=through, custom_generate=door
    )
    assert again.tolist() == out.sequences.tolist() == [text] and told.told == through.told and told.ends == 1
    assert out.stats.emitted == [spans]


def test_no_mask_is_kept():
    """Every cached column is what a forward of the text leaves there."""
    mtp, (inputs, slots) = mixed(), BATCHES["five in two slots"]
    kept: dict[int, tuple[list[int], Tensor]] = {}
    plain = Decoder.run

    def spy(self, *args: Any, **kwargs: Any) -> Any:
        def leave(sequence: SequenceState) -> None:
            first = sequence.slot * self.cache.capacity
            kept[sequence.index] = sequence.tokens[: sequence.cached], columns(self.cache, first, sequence.cached)

        return plain(self, *args, **{**kwargs, "leave": leave})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "run", spy)
        run(mtp, inputs, max_new_tokens=NEW, policy="confadapt", confidence_threshold=0.3, slots=slots)
    for index, (text, found_LN) in kept.items():
        L, cache = len(text), SlotCache(1, 64)
        assert int(inputs["attention_mask"][index].sum()) + NEW - K - 2 < L
        mtp.target.forward_rows(torch.tensor([text]), torch.zeros(1, dtype=torch.long), cache, visible=L)
        plain_LN = columns(cache, 0, L)
        torch.testing.assert_close(found_LN, plain_LN, atol=1e-4, rtol=1e-4)
        assert not torch.isclose(found_LN[1:], plain_LN[:-1], atol=1e-2).all(1).any(), "the gate"


def columns(cache: SlotCache, first: int, length: int) -> Tensor:
    """[L, N] all keys and values of a slot."""
    parts = [
        flat[first : first + length].flatten(1) for layer in sorted(cache._storage) for flat in cache._storage[layer]
    ]
    return torch.cat(parts, dim=1).clone()


# -- sampling ----------------------------------------------------------------------------------------------------------

START = [1, 0, 6, 3]


@functools.cache
def tiny() -> MTPModel:
    """Eight tokens, so that every distribution is known exactly."""
    model = leaning_model(vocab_size=SMALL, initializer_range=0.05)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3.0)
    return knowing(model, noise=0.6)


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "all": {"temperature": 0.8, "top_k": 6, "top_p": 0.9},
    "penalty": {"repetition_penalty": 1.5},
}


def processed(logits_V: Tensor, text: list[int], rule: dict[str, Any]) -> Tensor:
    """The distribution of one row, by transformers' processors."""
    scores, ids = logits_V[None].float(), torch.tensor([text])
    if "repetition_penalty" in rule:
        scores = lp.RepetitionPenaltyLogitsProcessor(rule["repetition_penalty"])(ids, scores)
    for processor in processors(rule):
        scores = processor(ids, scores)
    return scores[0].double().softmax(-1)


@torch.no_grad()
def exact(mtp: MTPModel, rule: dict[str, Any], threshold: float | None) -> Tensor:
    """[V, V] of the first two tokens under k = 2: the target's own, then the mask's, or where that is too unsure the
    target's of the next forward.
    """
    own_V = mtp.model(torch.tensor([START])).logits[0, -1]
    first_V, sure = processed(own_V, START, rule), threshold is None or float(own_V.softmax(-1).max()) >= threshold
    rows = []
    for token in range(SMALL):
        ids = torch.tensor([[*START, token]])
        row_V = mtp.draft_logits(ids)[0, len(START) - 1, 0]
        if threshold is not None and not (sure and float(row_V.softmax(-1).max()) >= threshold):
            row_V = mtp.model(ids).logits[0, -1]
        rows.append(first_V[token] * processed(row_V, [*START, token], rule))
    return torch.stack(rows)


def drawn(mtp: MTPModel, rule: dict[str, Any], threshold: float | None, seed: int = 0) -> Tensor:
    ids = torch.tensor([START]).repeat(900, 1)
    return mtp.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        max_new_tokens=2,
        slots=256,
        policy="static_k" if threshold is None else "confadapt",
        confidence_threshold=threshold,
        num_draft_tokens=2,
        generator=torch.Generator().manual_seed(seed),
        **{"top_k": 0, **rule},
    )[:, len(START) :]


@pytest.mark.parametrize("rule", RULES)
def test_spans_are_drawn_from_their_rows(rule):
    """The first token from the target, the second from the mask below the prompt's last token, as processed."""
    mtp = tiny()
    seen, probs = count(drawn(mtp, RULES[rule], None)), exact(mtp, RULES[rule], None)
    assert p_value(seen, probs.view(-1)) > LEAST_P
    assert p_value(seen.view(SMALL, SMALL).sum(0), probs.sum(0)) > LEAST_P
    unprocessed = RULES["plain"] if RULES[rule] else {"temperature": 1.6}
    for other in ({"threshold": 1.0, "rule": RULES[rule]}, {"threshold": None, "rule": unprocessed}):
        wrong = exact(mtp, **other).view(-1).clamp(min=1e-9)
        assert p_value(seen, wrong / wrong.sum()) < LEAST_P / 1e4, "the gate: neither the target's own nor unprocessed"


def test_confidence_is_before_processors():
    """A high temperature makes no row unsure; some tokens have a mask that is sure after them, others do not."""
    mtp, rule, threshold = tiny(), {"temperature": 2.0}, 0.42
    with torch.no_grad():
        own_V = mtp.model(torch.tensor([START])).logits[0, -1]
        ids = [torch.tensor([[*START, token]]) for token in range(SMALL)]
        sure = [float(mtp.draft_logits(each)[0, len(START) - 1, 0].softmax(-1).max()) > threshold for each in ids]
    assert float(own_V.softmax(-1).max()) > threshold > float((own_V / 2).softmax(-1).max()), "the gate"
    assert 0 < sum(sure) < SMALL
    seen = count(drawn(mtp, rule, threshold))
    assert p_value(seen, exact(mtp, rule, threshold).view(-1)) > LEAST_P
    for other in (1e-6, 1.0):
        assert p_value(seen, exact(mtp, rule, other).view(-1)) < LEAST_P / 100, (
            "the gate: of tokens that are committed, and of those that are not"
        )


def test_a_seed_fixes_the_text():
    mtp, (inputs, slots) = mixed(), BATCHES["five in two slots"]

    def text(seed: int, state: int) -> list[list[int]]:
        torch.manual_seed(state)
        settings = {"policy": "confadapt", "confidence_threshold": 0.3, "do_sample": True, "temperature": 1.5}
        generator = torch.Generator().manual_seed(seed)
        return mtp.generate(**inputs, max_new_tokens=NEW, slots=slots, generator=generator, **settings).tolist()

    assert text(4, 1) == text(4, 2) != text(5, 1)


def test_a_seed_fixes_noise_masks_too():
    mtp, inputs = knowing(target(), 1.0, mask_tokens="noise"), BATCHES["three"][0]
    found = set()
    for state in range(3):
        torch.manual_seed(state)
        generator = torch.Generator().manual_seed(5)
        out = mtp.generate(**inputs, max_new_tokens=NEW, policy="static_k", do_sample=False, generator=generator)
        found.add(str(out.tolist()))
    assert len(found) == 1


# -- what it says of itself --------------------------------------------------------------------------------------------


def test_stats_say_what_was_done():
    mtp, (inputs, slots) = mixed(), BATCHES["five in two slots"]
    for policy, threshold in (("static_k", None), ("confadapt", 0.6), ("confadapt", None)):
        out = run(
            mtp,
            inputs,
            policy=policy,
            confidence_threshold=threshold,
            num_draft_tokens=3,
            max_new_tokens=NEW,
            slots=slots,
        )
        stats, summary = out.stats, out.stats.summary()
        assert summary["policy"] == stats.policy == policy and stats.lossless is summary["lossless"] is False
        used = None if policy == "static_k" else threshold or 0.9
        assert summary["confidence_threshold"] == stats.confidence_threshold == used
        assert summary["reference"] == "the target" and summary["tokens"] == 5 * NEW
        for record in stats.records:
            for v in record:
                assert (v.drafted, v.depth) == (2, 2) and v.emitted == v.accepted + 1
                assert v.sources == ["target"] + ["mtp"] * v.accepted
        assert stats.tau == total(stats.emitted) / sum(map(len, stats.records))
        assert policy in LOSSY and policy in SPANS
    lossless = run(mtp, inputs, max_new_tokens=4).stats.summary()
    assert lossless["lossless"] and lossless["confidence_threshold"] is None


def test_the_reference_is_the_modules_word(monkeypatch):
    mtp, inputs = mixed(), BATCHES["one"][0]
    assert mtp.reference == "the target"
    monkeypatch.setattr(type(mtp.module), "reference", "the trained student", raising=False)
    for settings in ({}, {"policy": "static_k"}, {"num_draft_tokens": 0}):
        assert run(mtp, inputs, max_new_tokens=4, **settings).stats.summary()["reference"] == "the trained student"


def test_rows_are_those_of_the_last_span_and_its_masks():
    """One forward a span: the tokens of the span before, read again, and k - 1 masks."""
    mtp, inputs = mixed(), BATCHES["one"][0]
    for k in (2, K + 1):
        settings = {"policy": "confadapt", "confidence_threshold": 0.6, "num_draft_tokens": k}
        stats = run(mtp, inputs, max_new_tokens=NEW, **settings).stats
        spans = stats.emitted[0]
        assert stats.verifications == len(spans) and len(set(spans)) > 1
        assert stats.target_rows == 8 + sum(m + k - 1 for m in [1, *spans[:-1]])
    one = run(mtp, inputs, max_new_tokens=NEW, policy="static_k", num_draft_tokens=1).stats
    assert one.target_rows == 8 + NEW and one.draft_forwards == 0


def test_the_last_span_fits_into_the_cache():
    """Its masks stand behind the longest text there may be, and those of sequences that go on do, too."""
    mtp, inputs = mixed(), prompts(11, 11, 11, 11)
    for k in (2, 3, 4):
        settings = {"policy": "confadapt", "confidence_threshold": 0.5, "num_draft_tokens": k}
        whole = run(mtp, inputs, max_new_tokens=64, **settings).sequences
        mtp.release()
        assert run(mtp, inputs, max_new_tokens=64 - 11, **settings).sequences.tolist() == whole[:, :64].tolist()


def test_lossless_decoding_before_and_after_is_as_ever():
    """The two decoders do not leave each other anything."""
    mtp, (inputs, slots) = mixed(), BATCHES["five in two slots"]
    wanted = reference(mtp.model, inputs, max_new_tokens=NEW).tolist()
    spans = []
    for _ in range(2):
        for layout in ("quadratic", "two_pass", None):
            out = run(mtp, inputs, max_new_tokens=NEW, slots=slots, draft_layout=layout)
            assert out.sequences.tolist() == wanted and out.stats.lossless
            spans.append(run(mtp, inputs, max_new_tokens=NEW, slots=slots, policy="static_k").sequences.tolist())
    assert all(each == spans[0] for each in spans)


# -- bad input ---------------------------------------------------------------------------------------------------------

STATIC, ADAPT = {"policy": "static_k"}, {"policy": "confadapt"}
BAD: list[tuple[dict[str, Any], str]] = [
    ({**STATIC, "num_draft_tokens": 0}, "num_draft_tokens: got 0 .*1 to 4"),
    ({**STATIC, "num_draft_tokens": -2}, "num_draft_tokens: got -2"),
    ({**STATIC, "num_draft_tokens": K + 2}, f"num_draft_tokens: got {K + 2} .*static_k.*1 to {K + 1}"),
    ({**ADAPT, "num_draft_tokens": K + 2}, f"num_draft_tokens: got {K + 2}"),
    ({**STATIC, "num_draft_tokens": True}, "num_draft_tokens: got True"),
    ({**STATIC, "num_draft_tokens": 2.0}, "num_draft_tokens: got 2.0"),
    ({**STATIC, "num_draft_tokens": "many"}, "num_draft_tokens: got 'many'.*auto"),
    ({**STATIC, "confidence_threshold": 0.9}, "confidence_threshold: got 0.9 with policy 'static_k'.*confadapt"),
    ({"confidence_threshold": 0.9}, "confidence_threshold: got 0.9 with policy 'lossless'"),
    ({"policy": "typical", "confidence_threshold": 0.9}, "confidence_threshold: got 0.9 with policy 'typical'"),
    *[
        ({**ADAPT, "confidence_threshold": bad}, "confidence_threshold: got .*above 0 and at most 1")
        for bad in (0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf, True, "0.9", [0.9])
    ],
    ({**STATIC, "draft_tree": [(0,)]}, "draft_tree: got .*static_k.*verifies no drafts"),
    *[({**ADAPT, "draft_layout": name}, f"draft_layout: got '{name}'.*confadapt") for name in ("linear", "auto")],
    ({**STATIC, "drafter": "lookup"}, "drafter: got 'lookup' with policy 'static_k', wanted 'mtp'"),
    ({**ADAPT, "drafter": "mtp+lookup"}, "drafter: got 'mtp.lookup'"),
    ({**ADAPT, "drafter": []}, "drafter: got "),
    ({**ADAPT, "drafter": Wrong([[]])}, "drafter: got "),
    ({**STATIC, "draft_sample_method": "probabilistic"}, "draft_sample_method: got 'probabilistic'"),
    ({"policy": "confadapted"}, "unknown policy 'confadapted', choose one of lossless, typical, static_k, confadapt"),
]


@pytest.mark.parametrize(("settings", "words"), BAD, ids=[str(settings)[:60] for settings, _ in BAD])
def test_bad_input_is_named_before_any_work(settings, words, monkeypatch):
    monkeypatch.setattr(Decoder, "run", lambda *args, **kwargs: pytest.fail("decoding has begun"))
    with pytest.raises(ValueError, match=words):
        run(knowing(target()), BATCHES["one"][0], max_new_tokens=4, **settings)


def test_verification_knows_no_spans():
    for policy in SPANS:
        with pytest.raises(ValueError, match="unverified"):
            verify([Draft()], torch.zeros(1, 1, 4), policy=policy)


def test_the_command_line_marks_what_is_lossy(tmp_path, capsys, monkeypatch):
    mtp = get_mtp_model(tiny_model(), {"method": "masked", "depth": 2, "lora_rank": 4})
    mtp.model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    mtp.save_pretrained(tmp_path / "module")
    words = ["generate", str(tmp_path / "model"), "--prompt", "w5 w9 w5", "--max-new-tokens", "6"]
    module = ["--module", str(tmp_path / "module")]
    flags = ["--policy", "confadapt", "--confidence-threshold", "0.01", "--num-draft-tokens", "3", "--stats"]
    assert main([*words, *module, *flags]) == 0
    said = capsys.readouterr()
    assert said.out.strip() and "[lossy: policy confadapt" in said.err and '"confidence_threshold": 0.01' in said.err
    assert '"tau": 3.0' in said.err and "the target here" not in said.err
    monkeypatch.setattr(type(mtp.module), "reference", "the trained student", raising=False)
    assert main([*words, *module, "--policy", "static_k"]) == 0
    said = capsys.readouterr().err
    assert "[lossy: policy static_k" in said and "the target here: the trained student" in said
    assert main([*words, *module]) == 0 and "lossy" not in capsys.readouterr().err
    assert main([*words, "--policy", "static_k"]) == 2 and "--module" in capsys.readouterr().err
    assert main([*words, *module, *flags[:2], "--confidence-threshold", "1.5"]) == 2
    assert "confidence_threshold: got 1.5" in capsys.readouterr().err


# -- spans that adapt --------------------------------------------------------------------------------------------------


def auto(curve: CostCurve, batch: str, **settings: Any) -> Any:
    mtp, (inputs, slots) = mixed(), BATCHES[batch]
    mtp.release()
    mtp._curve = curve
    return run(mtp, inputs, num_draft_tokens="auto", slots=slots, **{"max_new_tokens": 60, **settings})


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("rule", [("static_k", None), ("confadapt", 1e-6)])
def test_rows_that_are_free_make_whole_spans(rule, batch):
    out = auto(CHEAP, batch, policy=rule[0], confidence_threshold=rule[1])
    spans = [n for each in out.stats.emitted for n in each[:-1]]
    assert set(spans[-5:]) == {K + 1} and sum(n == K + 1 for n in spans) > 0.7 * len(spans), spans


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("rule", [("static_k", None), ("confadapt", 1e-6)])
def test_rows_that_are_dear_make_none_but_for_probes(rule, batch):
    out = auto(DEAR, batch, policy=rule[0], confidence_threshold=rule[1], max_new_tokens=100)
    spans = [n for each in out.stats.emitted for n in each]
    assert spans.count(1) > 0.8 * len(spans) and 1 < max(spans) <= 3, spans
    assert [v.drafted for record in out.stats.records for v in record].count(0) > 0.8 * len(spans)
    if batch == "one":  # a probe lays as many masks as it offers, no more
        read = [n + v.drafted for n, v in zip([1, *spans], out.stats.records[0])]
        assert out.stats.target_rows == 8 + sum(read)


def test_where_nothing_is_sure_no_masks_are_read():
    out = auto(CostCurve({1: 1.0, 64: 10.0}), "one", policy="confadapt", confidence_threshold=1.0, max_new_tokens=300)
    drafted = out.stats.drafted[0]
    assert out.stats.tau == 1.0 and 0 < sum(d > 0 for d in drafted[20:]) < 0.1 * len(drafted)
    assert out.sequences.tolist() == reference(mixed().model, BATCHES["one"][0], max_new_tokens=300).tolist()


def test_the_rate_is_tokens_over_seconds():
    """Against its definition, by simulation: rounds that always offer K, each token held with its chance."""
    rng = random.Random(0)
    for batch, masks, held in ((1, True, 0.7), (4, True, 0.5), (6, False, 0.8)):
        one = SpanLength(CostCurve({1: 1.0, 4: 2.0, 4096: 2.0 + 4092 * 0.25}), 4, False, masks, {"spans": 0.3})
        one.begin_round([9] * batch)
        one._depth = {("spans", k): [held * 1000, 1000.0] for k in range(1, 5)}
        for K_ in range(5):
            tokens, seconds, longest = 0, 0.0, 1
            for _ in range(4000):
                spans = [1 + next((i for i in range(K_) if rng.random() > held), K_) for _ in range(batch)]
                steps = min(max(spans), K_)
                seconds += one.curve(batch * (longest + K_ * masks)) + 0.3 * steps
                tokens, longest = tokens + sum(spans), max(spans)
            assert one.rate(K_) == pytest.approx(tokens / seconds, rel=0.04), (batch, K_)


def test_costs_alone_decide_where_all_is_committed():
    """Static k: whatever was told."""
    curve = CostCurve({1: 1.0, 8: 1.5, 64: 20.0})
    one = SpanLength(curve, 5, True, True, {"spans": 0.0})
    for batch in (1, 3):
        for _ in range(30):
            one.begin_round([9] * batch)
            one.learn_span(3, [0] * batch, batch, 4 * batch, 0, 0.0, 0.0)
        for K_ in range(6):
            assert one.rate(K_) == pytest.approx(batch * (1 + K_) / curve(batch * (1 + 2 * K_)))


def test_chances_are_shares():
    one = SpanLength(CHEAP, 4, False, True)
    one.begin_round([9])
    for _ in range(50):
        for committed in (0, 3, 1, 2):
            one.learn_span(3, [committed], 1, 4, 0, 0.0, 0.0)
    assert [one._held(k) for k in (1, 2, 3)] == pytest.approx([3 / 4, 2 / 3, 1 / 2], abs=0.04)
    assert one._held(4) == one._held(3), "not seen yet: as the one before it"


def test_it_learns_what_is_committed_and_notices_a_change():
    one = SpanLength(CostCurve({1: 1.0, 64: 8.0}), 6, False, True)
    rng, offers = random.Random(1), []
    for held in [0.05] * 150 + [0.97] * 150 + [0.05] * 150:
        offered = one.span(1)
        committed = next((i for i in range(offered) if rng.random() > held), offered)
        one.learn_span(offered, [committed], 1, 1 + offered, 0, 0.0, 0.0)
        offers.append(offered)
    assert sum(offers[100:150]) < 20 and sum(offers[400:]) < 20
    assert sum(offers[250:300]) > 50 * 4, "a probe finds out, and the spans grow from there"


def test_the_clock_has_the_last_word(monkeypatch):
    """Rows that should be free take far longer than the curve says: plain rounds find out."""
    correct, surprise = AdaptiveLength._correct, [1.0]

    def by_the_curve(self, rows, seconds):
        return correct(self, rows, self.curve(rows) * (surprise[0] if rows > 1 else 1.0))

    monkeypatch.setattr(AdaptiveLength, "_correct", by_the_curve)
    curve = CostCurve({1: 1.0, 64: 1.01}, measured=True)
    free = auto(curve, "one", policy="static_k", max_new_tokens=100).stats
    assert free.tau > 2.5
    surprise[0] = 12.0
    assert auto(curve, "one", policy="static_k", max_new_tokens=100).stats.tau < 1.6


def test_what_was_learned_stays_with_its_rule():
    mtp, inputs = mixed(), BATCHES["one"][0]
    mtp.release()
    mtp._curve = CHEAP
    for settings in (STATIC, ADAPT, {**ADAPT, "confidence_threshold": 0.5}, ADAPT, {}):
        run(mtp, inputs, num_draft_tokens="auto", max_new_tokens=6, **settings)
    with mtp.workspace() as space:
        kinds = [type(one) is SpanLength for one in space.adaptive.values()]
        assert len(kinds) == 4 and sum(kinds) == 3
        assert isinstance(space.decoder(mtp.target, None, "static_k"), SpanDecoder)
        assert type(space.decoder(mtp.target, None)) is Decoder


def test_what_was_waited_between_probes_outlives_a_call():
    length = SpanLength(CostCurve({1: 1.0, 64: 64.0}), longest=4, certain=False, masks=True)

    def probes(rounds: int) -> int:
        length.begin()
        found = 0
        for _ in range(rounds):
            K = length.span(1)
            found += K > 0
            length.learn_span(K, [0], 1, 1 + K, K, 0.0, 1.0)
        return found

    first, later = probes(48), [probes(48) for _ in range(4)][-1]
    assert first >= 3 and 1 <= later <= 2, "rows are dear and nothing is ever committed"
