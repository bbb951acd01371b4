"""The engine: each request gets what it would get alone, whoever joins, leaves or fails beside it."""

# T positions of a text, V vocabulary.

from __future__ import annotations

import functools
import gc
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from drafters import Branching, Oracle, knowing_mtp, leaning_model
from tiny import VOCAB, tiny_model
from torch import nn

from foretell.decoding import loop
from foretell.decoding.adaptive import CostCurve
from foretell.decoding.scores import AnswerPenalties, OwnScores, RowScores
from foretell.methods.heads import HeadsConfig
from foretell.methods.masked import MaskedConfig
from foretell.methods.sequential import SequentialConfig
from foretell.mtp import MTPModel, get_mtp_model
from foretell.serving import engine as engines
from foretell.serving.engine import Engine
from foretell.serving.requests import Closed, Full, Piece, Request, Running
from foretell.types import SequenceState

CHEAP_ROWS = CostCurve({1: 1.0, 8: 1.1, 64: 2.0})  # drafting pays
MODULES: dict[str, Any] = {
    "sequential": lambda: knowing_mtp(leaning_model()),
    "shared": lambda: knowing_mtp(leaning_model(), shared_module=True),
    # of a target whose text depends on all that it has read
    "far": lambda: get_mtp_model(tiny_model(), SequentialConfig(depth=2)),
    "windows": lambda: knowing_mtp(leaning_model("gemma3_text")),
    "heads": lambda: get_mtp_model(leaning_model(), HeadsConfig(depth=2, head_type="mha_ffn")),
    "masked": lambda: get_mtp_model(leaning_model(), MaskedConfig(depth=2, lora_rank=4, lora_alpha=4.0)),
    "noise": lambda: get_mtp_model(leaning_model(), MaskedConfig(depth=2, mask_tokens="noise")),
}


@functools.cache
def mtp_of(kind: str) -> MTPModel:
    torch.manual_seed(3)
    mtp = MODULES[kind]()
    mtp._curve = CHEAP_ROWS
    return mtp


@contextmanager
def engine(kind: str = "sequential", **settings: Any) -> Iterator[Engine]:
    made = Engine(mtp_of(kind), **{"slots": 3, **settings})
    try:
        yield made
    finally:
        made.close(drain=False)


def alone(kind: str, request: Request, **changes: Any) -> list[int]:
    """What generate says to this request, without drafts where they have no say."""
    mtp, length = mtp_of(kind), len(request.input_ids)
    how: dict[str, Any] = {"do_sample": bool(request.temperature), "max_new_tokens": request.max_new_tokens}
    if request.temperature:
        how |= {"temperature": request.temperature, "top_k": 50 if request.top_k is None else max(request.top_k, 0)}
        how |= {"generator": torch.Generator().manual_seed(request.seed)}
    how |= {n: getattr(request, n) for n in ("top_p", "min_p", "repetition_penalty") if getattr(request, n) is not None}
    if request.presence_penalty or request.frequency_penalty or request.logit_bias:
        given = request.presence_penalty, request.frequency_penalty, request.logit_bias
        how["logits_processor"] = [AnswerPenalties(length, *given)]
    if request.stop_token_ids:
        how["eos_token_id"] = list(request.stop_token_ids)
    how |= {"num_draft_tokens": 0, "pad_token_id": 0, **changes}
    ids = torch.tensor([list(request.input_ids)])
    return mtp.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, length:].tolist()


def some_request(dice: random.Random, most_new: int = 24, **changes: Any) -> Request:
    """Anything that a client may ask for. A prompt says its beginning twice, so that lookup finds something."""
    begin = [dice.randrange(3, VOCAB) for _ in range(dice.choice((1, 2, 5, 9, 20, 40)))]
    asked: dict[str, Any] = {"input_ids": begin + begin[: dice.randrange(len(begin) + 1)]}
    asked["max_new_tokens"] = dice.randrange(1, most_new)
    if dice.random() < 0.5:
        asked |= {
            "temperature": dice.choice((0.4, 1.0)),
            "top_k": dice.choice((None, -1, 5)),
            "seed": dice.getrandbits(40),
        }
        asked |= dice.choice(({}, {"top_p": 0.8}, {"min_p": 0.02}))
    asked |= dice.choice(({}, {}, {"repetition_penalty": 1.3}, {"presence_penalty": 0.7, "frequency_penalty": -0.4}))
    asked |= dice.choice(({}, {}, {"logit_bias": {5: 4.0, 9: -100}}))
    asked |= dice.choice(({}, {"num_draft_tokens": dice.randrange(3)}, {"num_draft_tokens": "auto"}))
    asked |= dice.choice(({}, {}, {"stop_token_ids": [dice.randrange(VOCAB) for _ in range(4)]}))
    asked |= dice.choice(({}, {"logprobs": 2}))
    return Request(**asked | changes)


def tokens_of(pieces: list[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.tokens]


def check_pieces(running: Running, pieces: list[Piece], whole: list[int]) -> None:
    """Pieces that belong together, and their text; of what was cancelled the beginning."""
    last, text, request = pieces[-1], tokens_of(pieces), running.request
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1) and all(p.tokens for p in pieces[:-1])
    assert last.finish_reason in (("stop", "length", "cancelled") if running.cancelled else ("stop", "length")), (
        last.error
    )
    assert text == (whole[: len(text)] if last.finish_reason == "cancelled" else whole)
    if last.finish_reason != "cancelled":
        ended = text[-1] in request.stop_token_ids
        assert (last.finish_reason, last.stop_token) == (("stop", text[-1]) if ended else ("length", None))
    assert last.stats is not None and sum(last.stats.emitted[0]) == len(text) == sum(len(p.sources) for p in pieces)
    assert [s for p in pieces for s in p.sources] == [s for v in last.stats.records[0] for s in v.sources]
    for piece in pieces if text else ():
        assert (piece.logprobs is None) == (request.logprobs is None or not piece.tokens)
    assert list(running) == []


# -- equal to generate -------------------------------------------------------------------------------------------------

CASES = [
    ("far", "mtp+lookup"),
    ("sequential", "mtp"),
    ("sequential", "lookup"),
    ("shared", "mtp+lookup"),
    ("windows", "mtp+lookup"),
]
CASES += [("heads", "mtp"), ("masked", "mtp+lookup"), ("noise", "mtp")]


@pytest.mark.parametrize(("kind", "drafter"), CASES)
def test_each_gets_what_it_would_get_alone(kind, drafter, monkeypatch):
    monkeypatch.setattr(loop, "PIECE_ROWS", 7)  # prompts take several rounds to read
    monkeypatch.setattr(engines, "LONG_PROMPT", 31)  # and some are long
    dice = random.Random(f"{kind} {drafter}")
    requests = [some_request(dice) for _ in range(14)]
    wholes = [alone(kind, request) for request in requests]
    with engine(kind, drafter=drafter, num_draft_tokens=dice.choice((None, "auto"))) as served:
        open_runs: dict[int, tuple[Running, Iterator[Piece], list[Piece]]] = {}
        waiting, cancelled, sources = list(range(len(requests))), set(), set()
        while waiting or open_runs:
            if waiting and (not open_runs or dice.random() < 0.4):
                i = waiting.pop()
                running = served.submit(requests[i])
                open_runs[i] = running, iter(running), []
                if dice.random() < 0.2:
                    cancelled.add(i)
            i = dice.choice(list(open_runs))
            running, pieces, got = open_runs[i]
            got.append(next(pieces))
            if i in cancelled and dice.random() < 0.5:
                running.cancel()
            if got[-1].finish_reason:
                del open_runs[i]
                check_pieces(running, got, wholes[i])
                sources.update(s for p in got for s in p.sources)
        counts = served.metrics()
    assert counts["running"] == counts["waiting"] == counts["requests"]["error"] == 0
    assert sum(counts["requests"].values()) == len(requests)
    assert counts["prompt_tokens"] == sum(len(r.input_ids) for r in requests)
    assert sum(counts["accepted_per_position"]) == counts["accepted_tokens"] <= counts["draft_tokens"]
    # the gate: somebody drafted, and in most cases somebody was right
    assert counts["draft_tokens"] and (counts["accepted_tokens"] or kind in ("far", "heads", "masked", "noise"))
    assert sources <= {"target", *drafter.split("+"), "lookup+mtp", "mtp+lookup"}


@pytest.mark.parametrize("kind", ["sequential", "heads", "masked"])
def test_lossy_policies_say_what_generate_says_with_them(kind):
    dice = random.Random(4)
    settings: list[dict[str, Any]] = [{"policy": "typical"}, {"policy": "static_k", "num_draft_tokens": 2}]
    settings += [{"policy": "confadapt", "confidence_threshold": 0.3}]
    settings += [one | {"temperature": 0.9, "seed": 5} for one in settings]
    bare = {"top_p": None, "min_p": None, "top_k": 0, "stop_token_ids": (), "logprobs": None, "logit_bias": {}}
    plain = {"temperature": None, "num_draft_tokens": None, **bare}
    requests = [some_request(dice, 16, **plain | one) for one in settings for _ in range(2)]
    with engine(kind) as served:
        runs = [served.submit(request) for request in requests]
        got = [list(running) for running in runs]
    for request, running, pieces in zip(requests, runs, got, strict=True):
        how = {"policy": request.policy, "confidence_threshold": request.confidence_threshold}
        if kind == "masked" and request.policy == "typical" and not request.temperature:
            with engine(kind) as served:  # generate asks a clock there which rows carry masks
                whole = tokens_of(list(served.submit(request)))
        else:
            whole = alone(kind, request, num_draft_tokens=request.num_draft_tokens, **how)
        check_pieces(running, pieces, whole)
        assert not running.lossless and not pieces[-1].stats.lossless and pieces[-1].stats.policy == request.policy


def test_the_models_own_generation_config_holds_where_a_request_says_nothing():
    model = leaning_model()
    model.generation_config.update(
        do_sample=True, temperature=0.5, top_k=4, repetition_penalty=1.4, eos_token_id=[7, 30]
    )
    mtp = knowing_mtp(model)
    ids = torch.tensor([[5, 9, 40, 5, 9]])
    want = mtp.generate(ids, max_new_tokens=30, generator=torch.Generator().manual_seed(3), pad_token_id=0)[0, 5:]
    greedy = mtp.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)[0, 5:]
    with Engine(mtp, num_draft_tokens=2) as served:
        ask = Request(input_ids=[5, 9, 40, 5, 9], max_new_tokens=30, seed=3)
        assert tokens_of(list(served.submit(ask))) == want.tolist()
        assert tokens_of(list(served.submit(replace(ask, temperature=0)))) == greedy.tolist() != want.tolist()
        free = list(served.submit(replace(ask, ignore_eos=True, temperature=0)))
        assert len(tokens_of(free)) == 30 and free[-1].finish_reason == "length"


def test_many_threads_submit_at_once():
    dice = random.Random(6)
    requests = [some_request(dice) for _ in range(12)]
    wholes, got = [alone("shared", request) for request in requests], {}

    def client(mine: range) -> None:
        for i in mine:
            running = served.submit(requests[i])
            got[i] = running, list(running)

    with engine("shared", drafter="mtp+lookup", slots=4) as served:
        clients = [threading.Thread(target=client, args=(range(i, 12, 4),)) for i in range(4)]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
    for i, (running, pieces) in got.items():
        check_pieces(running, pieces, wholes[i])
    assert len(got) == 12


def test_who_shares_a_run():
    """All but what changes how a round is drafted, and much longer texts, for which all others would have to wait."""
    plain = Request(input_ids=[3] * 9, max_new_tokens=2)
    same = [{"temperature": 1.0, "seed": 1}, {"presence_penalty": 1}, {"logprobs": 2}, {"input_ids": [4] * 400}]
    other = [{"num_draft_tokens": "auto"}, {"policy": "typical"}, {"policy": "static_k"}, {"policy": "confadapt"}]
    with engine(num_draft_tokens=2) as served:

        def kind(**changes: Any) -> tuple:
            running = served.submit(replace(plain, **changes))
            list(running)
            return served._kind(running)

        assert {kind(**one) for one in (*same, {"num_draft_tokens": 0}, {"num_draft_tokens": 3})} == {kind()}
        assert len({kind(), *(kind(**one) for one in other)}) == 5
    with engine("masked") as served:
        assert len({kind(num_draft_tokens=n) for n in (0, 1, 2, "auto")}) == 4
    lengths = (5, 2047, 2048, 4095, 4096)
    sizes = [max(n, engines.LONG_PROMPT).bit_length() for n in lengths]
    assert sizes == [11, 11, 12, 12, 13]


# -- the loop, step by step --------------------------------------------------------------------------------------------


def joined_run(mtp: MTPModel, drafter: Any, slots: int, leave: list, emitted: dict[int, list[int]]) -> loop.Run:
    def finished(sequence: SequenceState) -> bool:
        return len(sequence.new_tokens) >= sequence.most_tokens - sequence.prompt_length

    rules = loop.Rules(RowScores(None, False), finished, max_tokens=400, num_draft_tokens=3, slots=slots, share=True)
    rules.beside = lambda: bool(run.active)
    rules.leave = leave.append
    rules.emit = lambda sequence, tokens: emitted.setdefault(sequence.index, []).extend(tokens)
    run = loop.Decoder(mtp.target, drafter).start([], rules)
    run.begin()
    return run


@pytest.mark.parametrize("kind", ["oracle", "tree", "mtp", "heads", "windows"])
def test_any_order_of_joining_and_cancelling(kind, monkeypatch):
    """Slots are taken, left and closed up while prompts are read; each text stays the target's own."""
    monkeypatch.setattr(loop, "PIECE_ROWS", 5)
    of = {"oracle": "far", "tree": "far", "mtp": "sequential"}.get(kind, kind)
    dice, mtp = random.Random(kind), mtp_of(of)
    prompts = [[dice.randrange(3, VOCAB) for _ in range(dice.choice((1, 3, 8, 30, 60)))] for _ in range(24)]
    for i in range(0, len(prompts), 2):  # some begin alike
        prompts[i] = [*prompts[dice.randrange(len(prompts))][: dice.randrange(60)], *prompts[i]]
    new = [dice.randrange(1, 20) for _ in prompts]
    truth = []
    for prompt, count in zip(prompts, new, strict=True):
        truth.append(mtp.model.generate(torch.tensor([prompt]), max_new_tokens=count + 4, pad_token_id=0)[0].tolist())
    scripted = {"oracle": lambda: Oracle(truth, (3, 0, 1, 2)), "tree": lambda: Branching(truth, (2, 0, 1))}
    drafter = scripted[kind]() if kind in scripted else mtp.drafter()
    left: list[SequenceState] = []
    emitted: dict[int, list[int]] = {}
    closed_up = 0
    with mtp.target.reading():
        run = joined_run(mtp, drafter, 4, left, emitted)
        todo = [SequenceState(list(p), len(p), i, most_tokens=len(p) + new[i]) for i, p in enumerate(prompts)]
        cancelled = set()
        while todo or run.waiting or run.reading or run.active:
            for _ in range(dice.randrange(3) if todo else 0):
                if todo:
                    run.admit(todo.pop())
            everyone = [*run.active, *run.reading, *run.waiting]
            if everyone and dice.random() < 0.12:
                sequence = dice.choice(everyone)
                cancelled.add(sequence.index)
                run.cancel(sequence)
            slots_before = {s.index: s.slot for s in run.reading}
            run.step()
            assert [s.slot for s in run.active + run.reading] == list(range(len(run.active) + len(run.reading)))
            behind = [s.slot for s in run.prefixes.kept]
            assert len(set(behind)) == len(behind) and all(s >= len(run.active) + len(run.reading) for s in behind)
            assert not any(s.done for s in run.active + run.reading)
            closed_up += any(slots_before.get(s.index, s.slot) != s.slot for s in run.reading)
    assert sorted(s.index for s in left) == list(range(len(prompts))) and cancelled
    for sequence in left:
        got, whole = emitted.get(sequence.index, []), truth[sequence.index][sequence.prompt_length :]
        assert got == sequence.new_tokens
        assert got == whole[: len(got)] and (len(got) == new[sequence.index] or sequence.index in cancelled)
    assert closed_up  # the gate: somebody moved while being read


def test_a_long_prompt_does_not_hold_up_who_runs(monkeypatch):
    monkeypatch.setattr(loop, "PIECE_ROWS", 16)
    mtp, emitted, rows = mtp_of("sequential"), {}, []
    with mtp.target.reading():
        run = joined_run(mtp, None, 4, [], emitted)
        run.admit(SequenceState([5, 6, 7], 3, 0, most_tokens=3 + 60))
        run.step()
        for i, length in ((1, 200), (2, 10)):
            run.admit(SequenceState([9] * length, length, i, most_tokens=length + 5))
        while 1 not in emitted:
            before = run.stats.target_rows, len(emitted[0]), run.stats.target_forwards
            run.step()
            rows.append(run.stats.target_rows - before[0])
            assert len(emitted[0]) == before[1] + 1  # a token each round
            assert run.stats.target_forwards <= before[2] + 2
        assert max(rows) <= 16 + 3 and 200 / 16 <= len(rows) <= 200 / 16 + 3
        assert len(emitted[2]) >= 5 and len(emitted[1]) == 1  # the short one has not waited for the long one


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("head_type", ["cnn", "mha_ffn", "layer", None])
def test_a_prompt_of_one_token_joins_who_drafts(head_type, rows):
    """In a slot that its drafter has never seen: it has nothing to read there."""
    settings: Any = SequentialConfig(depth=2) if head_type is None else HeadsConfig(depth=2, head_type=head_type)
    mtp, prompts = get_mtp_model(leaning_model(), settings), [[5, 9, 40], [7, 8, 9], [4], [3]]
    rules = loop.Rules(RowScores(None, False), lambda s: False, max_tokens=60, num_draft_tokens=2, slots=6)
    rules.beside = lambda: bool(run.active)
    run = loop.Decoder(mtp.target, mtp.drafter()).start([], rules)
    texts = [SequenceState(list(p), len(p), i, most_tokens=60) for i, p in enumerate(prompts)]
    with mtp.target.reading():
        run.begin()
        for text in texts[:2]:
            run.admit(text)
        for _ in range(4):
            run.step()
        for text in texts[2 : 2 + rows]:
            run.admit(text)
        for _ in range(4):
            run.step()
    for text in texts[: 2 + rows]:
        ids = torch.tensor([text.tokens[: text.prompt_length]])
        whole = mtp.model.generate(ids, max_new_tokens=len(text.new_tokens), do_sample=False, pad_token_id=0)
        assert text.tokens == whole[0].tolist()


@pytest.mark.parametrize("holds", [True, False])
def test_who_is_read_keeps_its_slot_while_others_grow(holds, monkeypatch):
    """And the check can fail: storage that is not told who is read gives that slot up."""
    from foretell.models.slot_cache import SlotCache

    if not holds:
        monkeypatch.setattr(SlotCache, "hold", lambda cache, slots: None)
    monkeypatch.setattr(loop, "PIECE_ROWS", 1)
    mtp, emitted, prompt = mtp_of("far"), {}, list(range(3, 43))
    whole = mtp.model.generate(torch.tensor([prompt]), max_new_tokens=5, pad_token_id=0)[0, len(prompt) :].tolist()
    with mtp.target.reading():
        run = joined_run(mtp, None, 2, [], emitted)
        run.admit(SequenceState([5, 6, 7] * 40, 120, 0, most_tokens=330))
        run.step()
        run.step()
        run.admit(SequenceState(list(prompt), len(prompt), 1, most_tokens=len(prompt) + 5))
        while len(emitted.get(1, [])) < 5:
            run.step()
    assert (emitted[1] == whole) is holds


# -- one fails, others do not notice -----------------------------------------------------------------------------------


def test_an_error_of_one_request_is_its_own(monkeypatch):
    right = AnswerPenalties.__call__

    def wrong(self: AnswerPenalties, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.presence == 1.5 and ids.shape[1] - self.prompt_length >= 4:
            raise ArithmeticError("boom")
        return right(self, ids, scores)

    monkeypatch.setattr(AnswerPenalties, "__call__", wrong)
    dice = random.Random(1)
    good = [some_request(dice, num_draft_tokens=2, max_new_tokens=15, stop_token_ids=()) for _ in range(4)]
    bad = Request(input_ids=[4, 5, 6], max_new_tokens=20, presence_penalty=1.5, num_draft_tokens=2)
    wholes = [alone("sequential", request) for request in good]
    with engine(slots=5) as served:
        running = [served.submit(request) for request in (*good, bad)]
        pieces = [list(one) for one in running]
        assert tokens_of(list(served.submit(good[0]))) == wholes[0]  # and later ones are served
        ends = served.metrics()["requests"]
    for one, got, whole in zip(running, pieces, wholes, strict=False):
        check_pieces(one, got, whole)
    assert pieces[-1][-1].finish_reason == "error" and "ArithmeticError: boom" in pieces[-1][-1].error
    assert len(tokens_of(pieces[-1])) <= 4
    assert ends == {"stop": 0, "length": 5, "cancelled": 0, "error": 1}


@pytest.mark.parametrize("kind", ["sequential", "heads", "masked"])
def test_a_round_that_breaks_halfway_loses_and_repeats_nothing(kind, monkeypatch):
    """What it appended was not handed out: everybody goes on from what was, in runs of their own."""
    real, calls = loop.Run._round, []

    def breaks(run: loop.Run) -> Any:
        emitted = real(run)
        calls.append(len(run.active))
        if len(calls) in (3, 9):
            raise MemoryError("for a while")
        return emitted

    dice = random.Random(2)
    requests = [some_request(dice, max_new_tokens=14, logprobs=1) for _ in range(5)]
    wholes = [alone(kind, request) for request in requests]
    monkeypatch.setattr(loop.Run, "_round", breaks)
    with engine(kind, num_draft_tokens=2) as served:
        running = [served.submit(request) for request in requests]
        for one, whole in zip(running, wholes, strict=True):
            pieces = list(one)
            if pieces[-1].finish_reason == "error":  # whose run broke a second time
                assert "MemoryError" in pieces[-1].error and tokens_of(pieces) == whole[: len(tokens_of(pieces))]
            else:
                check_pieces(one, pieces, whole)
        assert served.metrics()["requests"]["error"] <= 1


BAD = 90  # a token whose state overflows


def overflowing() -> nn.Module:
    model = leaning_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = torch.inf
        model.get_output_embeddings().weight[BAD] = 0.0  # which it never says itself
    return model


def test_a_prompt_that_overflows_leaves_nothing_behind(monkeypatch):
    """Cancelled while it is read, when nobody has looked at its numbers yet; who comes to its slot reads its own."""
    monkeypatch.setattr(loop, "PIECE_ROWS", 2)
    mtp, emitted, left = get_mtp_model(overflowing(), SequentialConfig(depth=2)), {}, []
    prompts = [[7, 8, 9], [BAD] * 40, [11, 12, 13, 11], list(range(20, 45))]
    todo = [SequenceState(list(p), len(p), i, most_tokens=len(p) + 12) for i, p in enumerate(prompts)]
    todo[0].most_tokens = 60
    with mtp.target.reading():
        run = joined_run(mtp, mtp.drafter(), 3, left, emitted)
        for i, until in ((0, lambda: todo[0].record), (1, lambda: todo[1].cached > 20)):
            run.admit(todo[i])
            while not until():
                run.step()
        assert not todo[1].record
        run.cancel(todo[1])
        monkeypatch.setattr(loop, "PIECE_ROWS", 64)  # the next two share a forward
        run.admit(todo[2])
        run.admit(todo[3])
        while run.step():
            pass
    assert sorted(s.index for s in left) == [0, 1, 2, 3]
    for i in (0, 2, 3):
        new = todo[i].most_tokens - len(prompts[i])
        whole = mtp.model.generate(torch.tensor([prompts[i]]), max_new_tokens=new, pad_token_id=0)
        assert emitted[i] == whole[0, len(prompts[i]) :].tolist()


def test_a_reader_that_fails_is_cancelled():
    def fails(piece: Piece) -> None:
        raise OSError("the client is gone")

    ask = Request(input_ids=[4, 5, 6], max_new_tokens=300)
    with engine() as served:
        gone = served.submit(ask, fails)
        assert tokens_of(list(served.submit(replace(ask, max_new_tokens=9)))) == alone(
            "sequential", replace(ask, max_new_tokens=9)
        )
        served.close()
    assert gone.cancelled and served.metrics()["requests"] == {"stop": 0, "length": 1, "cancelled": 1, "error": 0}


def test_a_model_that_cannot_be_read_tells_everybody_and_serves_again_once_it_is_whole():
    mtp = knowing_mtp(leaning_model())
    ask = Request(input_ids=[4, 5, 6], max_new_tokens=6)
    with Engine(mtp, num_draft_tokens=2) as served:
        whole = tokens_of(list(served.submit(ask)))
        mtp.model.prepare_inputs_for_generation = lambda input_ids, attention_mask, **kwargs: {}
        for running in [served.submit(ask), served.submit(ask)]:
            (refused,) = running
            assert refused.finish_reason == "error" and "is not transformers' own" in refused.error
        del mtp.model.prepare_inputs_for_generation
        assert tokens_of(list(served.submit(ask))) == whole


# -- the queue ---------------------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_back_and_whom_it_has_it_serves():
    go_on, begun = threading.Event(), threading.Event()

    def slow(piece: Piece) -> None:
        begun.set()
        go_on.wait(60)

    ask = Request(input_ids=[4, 5, 6], max_new_tokens=8)
    with engine(slots=1, max_queued=2) as served:
        first = served.submit(ask, slow)
        assert begun.wait(60)
        waiting = [served.submit(ask), served.submit(replace(ask, max_new_tokens=3))]
        counts = served.metrics()
        assert (counts["running"], counts["waiting"]) == (1, 2)
        with pytest.raises(Full) as full:
            served.submit(ask)
        assert full.value.retry_after >= 1 and served.metrics()["rejected"] == 1
        waiting[0].cancel()
        go_on.set()
        pieces = list(waiting[0])
        assert [(p.tokens, p.finish_reason) for p in pieces] == [([], "cancelled")]
        assert tokens_of(list(waiting[1])) == alone("sequential", replace(ask, max_new_tokens=3))
        served.close()
        assert set(first.seconds) == {"admitted", "first", "ended"}
        with pytest.raises(Closed):
            served.submit(ask)


def test_close_drains_or_cancels():
    ask = Request(input_ids=[4, 5, 6], max_new_tokens=30)
    served = Engine(mtp_of("sequential"), slots=2)
    running = [served.submit(ask) for _ in range(5)]
    served.close()
    assert [list(one)[-1].finish_reason for one in running] == ["length"] * 5
    served = Engine(mtp_of("sequential"), slots=2)
    running = [served.submit(replace(ask, max_new_tokens=400)) for _ in range(5)]
    served.close(drain=False)
    assert {list(one)[-1].finish_reason for one in running} <= {"cancelled", "length"}
    assert served.metrics()["running"] == served.metrics()["waiting"] == 0


WRONG: dict[str, dict[str, Any]] = {
    "input_ids: got none": {"input_ids": []},
    "input_ids: got \\[97\\]": {"input_ids": [3, 97]},
    "input_ids: got 512 tokens, wanted fewer than the 512": {"input_ids": [3] * 512},
    "max_new_tokens: got 510 after a prompt of 3": {"max_new_tokens": 510},
    "max_new_tokens: got 0": {"max_new_tokens": 0},
    "temperature: got -1": {"temperature": -1},
    "temperature: got nan": {"temperature": float("nan")},
    "top_p: got 0": {"top_p": 0},
    "top_k: got 2.5": {"top_k": 2.5},
    "min_p: got 1.2": {"min_p": 1.2},
    "repetition_penalty: got 0": {"repetition_penalty": 0},
    "presence_penalty: got 3": {"presence_penalty": 3},
    "logit_bias: got 99": {"logit_bias": {99: 1}},
    "logit_bias: got 101": {"logit_bias": {9: 101}},
    "seed: got 'x'": {"seed": "x"},
    "stop_token_ids: got -1": {"stop_token_ids": [-1]},
    "logprobs: got 21": {"logprobs": 21},
    "logprobs: got 2 with policy 'static_k'": {"logprobs": 2, "policy": "static_k"},
    "unknown policy 'best'": {"policy": "best"},
    "num_draft_tokens: got 4": {"num_draft_tokens": 4},
    "num_draft_tokens: got True": {"num_draft_tokens": True},
    "num_draft_tokens: got 'auto' with policy 'typical'": {"num_draft_tokens": "auto", "policy": "typical"},
    "confidence_threshold: got 0.5": {"confidence_threshold": 0.5},
    "(?s)temperature: got -2.*seed: got 1.5": {"temperature": -2, "seed": 1.5},
}


def test_bad_requests_are_refused_at_once():
    with engine() as served:
        for said, changes in WRONG.items():
            with pytest.raises(ValueError, match=said):
                served.submit(Request(**{"input_ids": [3, 4, 5], "max_new_tokens": 5, **changes}))
        assert served.metrics()["prompt_tokens"] == 0
    for said, wrong in {"drafter": {"drafter": "x"}, "max_queued": {"max_queued": -1}, "slots": {"slots": 0}}.items():
        with pytest.raises(ValueError, match=said):
            Engine(mtp_of("sequential"), **wrong)
    with pytest.raises(ValueError, match="wanted an MTPModel"):
        Engine(tiny_model())


# -- what is told with the tokens --------------------------------------------------------------------------------------


def test_log_probabilities_are_the_models_own():
    ask = Request(input_ids=[4, 5, 6, 4, 5], max_new_tokens=12, temperature=0.7, top_k=5, seed=1, logprobs=3)
    with engine() as served:
        both = [list(served.submit(one)) for one in (ask, replace(ask, num_draft_tokens=3), replace(ask, logprobs=0))]
    for pieces in both[:2]:
        ids = [*ask.input_ids, *tokens_of(pieces)]
        with torch.no_grad():
            want_TV = mtp_of("sequential").model(torch.tensor([ids])).logits[0, 4:-1].log_softmax(-1)
        own = [x for p in pieces for x in p.logprobs]
        assert own == pytest.approx(want_TV[range(12), ids[5:]].tolist(), abs=1e-4)  # fp32, other shapes
        top = [one for p in pieces for one in p.top_logprobs]
        assert [[i for i, _ in one] for one in top] == want_TV.topk(3).indices.tolist()
        assert [[x for _, x in one] for one in top] == [
            pytest.approx(row, abs=1e-4) for row in want_TV.topk(3).values.tolist()
        ]
    assert both[2][0].top_logprobs == [[] for _ in both[2][0].tokens] and both[2][0].logprobs is not None


def test_penalties_are_openais():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence + bias[j], c counting the answer alone."""
    ids = torch.tensor([[3, 3, 7, 5, 5, 5, 8]])
    scores = torch.linspace(-1, 1, 12)[None]
    want = scores[0].tolist()
    for token in range(12):
        count = [5, 5, 5, 8].count(token)
        want[token] += -0.25 * count - 0.5 * (count > 0) + {2: 1.5, 5: -3.0}.get(token, 0.0)
    got = AnswerPenalties(3, 0.5, 0.25, {2: 1.5, 5: -3.0})(ids, scores)
    assert got[0].tolist() == pytest.approx(want)
    for other in ((0, 0.5, 0.25), (3, -0.5, 0.25), (3, 0.25, 0.5)):
        assert AnswerPenalties(*other, {2: 1.5, 5: -3.0})(ids, scores)[0].tolist() != pytest.approx(want)


def test_scores_of_one_kind_are_made_together():
    from transformers.generation import logits_process as lp

    def made(temperature: float, k: int, seed: int) -> RowScores:
        warpers = [lp.TemperatureLogitsWarper(temperature), lp.TopKLogitsWarper(k)]
        return RowScores(warpers, True, torch.Generator().manual_seed(seed))

    texts = [SequenceState([1], 1, 7 + i) for i in range(6)]
    own = OwnScores()
    all_of = [made(0.5, 3, 0), RowScores(None, False), made(0.5, 3, 1), made(0.5, 4, 1), RowScores(None, False)]
    all_of.append(RowScores([lp.RepetitionPenaltyLogitsProcessor(1.2)], False))
    for text, scores in zip(texts, all_of, strict=True):
        own.give(text, scores)
    assert [list(rows) for _, rows in own.parts(texts)] == [[0, 2], [1, 4], [3], [5]]
    shared = own.parts(texts)[0][0]
    assert [shared.dice(7, 3), shared.dice(9, 3)] == [all_of[0].dice(0, 3), all_of[2].dice(0, 3)]
    own.take(texts[0])
    assert own.parts(texts[2:3])[0][0].dice(9, 3) == all_of[2].dice(0, 3)


# -- memory ------------------------------------------------------------------------------------------------------------


def sizes(served: Engine, mtp: MTPModel) -> dict[str, int]:
    gc.collect()
    spaces = mtp._workspaces._free
    held = [tensor for space in spaces for parts in space.cache._storage.values() for tensor in parts]
    kinds = (Running, Piece, SequenceState, RowScores, loop.Run)
    counts = {kind.__name__: sum(type(x) is kind for x in gc.get_objects()) for kind in kinds}
    counts |= {"spaces": len(spaces), "bytes": sum(x.nbytes for x in held), "leased": len(mtp._workspaces._leased)}
    counts["tensors"] = sum(type(x) in (torch.Tensor, nn.Parameter) for x in gc.get_objects())
    return counts | {"kept": len(served._queue) + len(served._taken)}


def test_memory_stays_flat():
    def serve(count: int) -> None:
        for i in range(0, count, 4):
            kinds = ({}, {"temperature": 0.9, "seed": i}, {"num_draft_tokens": 2, "logprobs": 1}, {"policy": "typical"})
            asks = [
                Request(input_ids=[3 + (i + j) % 90, 4, 5], max_new_tokens=4, **kind) for j, kind in enumerate(kinds)
            ]
            together = threading.Event()  # who else is there must not depend on time
            served.submit(asks[0], lambda _, gate=together: gate.wait(60))
            running = [served.submit(ask) for ask in asks]
            running[i % 4].cancel()
            together.set()
            for one in running:
                list(one)

    mtp = knowing_mtp(leaning_model())
    mtp._curve = CHEAP_ROWS
    served = Engine(mtp, slots=4)
    serve(20)
    served.close()
    served = Engine(mtp, slots=4)
    serve(20)
    served.close()
    early = sizes(served, mtp)
    served = Engine(mtp, slots=4)
    serve(200)
    served.close()
    late = sizes(served, mtp)
    assert abs(late.pop("tensors") - early.pop("tensors")) <= 5 and late == early  # 180 more requests would show
    assert early["Running"] == early["Run"] == early["leased"] == early["kept"] == 0
