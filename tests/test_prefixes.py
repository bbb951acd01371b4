"""What prompts begin with alike is read once: every text is what it is without, and what can go wrong is caught."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from drafters import knowing_mtp, leaning_model
from test_serving_engine import CHEAP_ROWS, alone, mtp_of, tokens_of
from tiny import VOCAB, tiny_model

from foretell.decoding import loop, prefixes
from foretell.decoding.prefixes import Prefixes, alike
from foretell.decoding.scores import RowScores
from foretell.methods.heads import HeadsConfig
from foretell.methods.sequential import SequentialConfig, SequentialDrafter
from foretell.models.slot_cache import SlotCache
from foretell.mtp import MTPModel, get_mtp_model
from foretell.serving.engine import Engine
from foretell.serving.requests import Request
from foretell.types import Draft, SequenceState, Watcher

MADE: dict[str, Any] = {
    # random targets, whose texts depend on all that they have read
    "qwen3": lambda: get_mtp_model(tiny_model("qwen3"), SequentialConfig(depth=3)),
    "deepseek_v3": lambda: get_mtp_model(tiny_model("deepseek_v3"), SequentialConfig(depth=2)),
    "gpt_neox": lambda: get_mtp_model(tiny_model("gpt_neox"), HeadsConfig(depth=2, head_type="cnn")),
    "one module": lambda: get_mtp_model(tiny_model("llama"), SequentialConfig(depth=2, shared_module=True)),
}
KINDS = [*MADE, "sequential", "shared", "heads", "masked", "windows"]


def made(kind: str) -> MTPModel:
    if kind not in MADE:
        return mtp_of(kind)
    torch.manual_seed(5)
    mtp = MADE[kind]()
    mtp._curve = CHEAP_ROWS
    return mtp


def talk(dice: random.Random, count: int) -> list[list[int]]:
    """Prompts of a few conversations that go on, of copies, and of texts that part anywhere."""
    system = [dice.randrange(3, VOCAB) for _ in range(dice.choice((18, 30)))]
    texts = [system + [dice.randrange(3, VOCAB) for _ in range(9)]]
    for _ in range(count - 1):
        before = dice.choice(texts)
        kept = before if dice.random() < 0.4 else before[: dice.randrange(10, len(before) + 1)]
        texts.append((kept + [dice.randrange(3, VOCAB) for _ in range(dice.choice((0, 1, 4, 20)))])[:90])
    return texts


def served(
    mtp: MTPModel, requests: list[Request], seed: int, **settings: Any
) -> tuple[list[list[int]], dict[str, Any]]:
    """Texts of these requests, some at once, some cancelled after their first piece; and what the engine counted."""
    dice, texts = random.Random(seed), []
    with Engine(mtp, slots=3, **settings) as engine:
        while requests:
            now, requests = requests[: (n := dice.randrange(1, 5))], requests[n:]
            running = [(engine.submit(one), dice.random() < 0.2) for one in now]
            for one, is_cancelled in running:
                pieces = iter(one)
                first = next(pieces)
                if is_cancelled:
                    one.cancel()
                told = tokens_of([first, *pieces])
                texts.append(told if not is_cancelled else told[: len(first.tokens)])
        counted = engine.metrics()
    return texts, counted


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_a_fresh_reading(kind, monkeypatch):
    monkeypatch.setattr(loop, "PIECE_ROWS", 9)
    monkeypatch.setattr(loop, "PADDING", 4)
    dice, mtp, requests = random.Random(kind), made(kind), []
    for prompt in talk(dice, 24):
        how: dict[str, Any] = dice.choice(({}, {"temperature": 0.8, "seed": dice.getrandbits(30)}))
        how |= dice.choice(({}, {"num_draft_tokens": 0}, {"num_draft_tokens": 2}))
        requests.append(Request(input_ids=prompt, max_new_tokens=dice.randrange(3, 12), **how))
    drafter = dice.choice(("mtp", "mtp+lookup"))
    fresh, without = served(mtp, requests, 1, drafter=drafter, prefix_caching=False)
    shared, counted = served(mtp, requests, 1, drafter=drafter)
    for one, other in zip(fresh, shared, strict=True):
        both = min(len(one), len(other))  # of a cancelled text, its first piece
        assert both and one[:both] == other[:both]
    assert without["prefix_hits"] == 0 < counted["prefix_queries"] == without["prefix_queries"]
    if kind == "windows":
        assert counted["prefix_hits"] == 0
    else:
        assert counted["prefix_hits"] > 0.05 * counted["prefix_queries"]


@pytest.mark.parametrize("wrong", ["rows", "length", "module"])
def test_the_twin_can_fail(wrong, monkeypatch):
    """Rows of another text, a token too many, or a module that believes it has read ahead."""
    if wrong == "rows":
        monkeypatch.setattr(SlotCache, "move", lambda cache, source, target, length: cache.clear(target))
    if wrong == "length":
        monkeypatch.setattr(prefixes, "alike", lambda one, other: min(alike(one, other) + 1, len(one), len(other)))
    if wrong == "module":
        monkeypatch.setattr(SequentialDrafter, "share", lambda *_: None)
    mtp, dice, tau = made("sequential" if wrong == "module" else "qwen3"), random.Random(2), {}
    requests = [Request(input_ids=p, max_new_tokens=12, num_draft_tokens=2) for p in talk(dice, 20)]
    texts = {}
    for share in (False, True):
        texts[share], counted = served(mtp, requests, 1, drafter="mtp", prefix_caching=share)
        tau[share] = counted["accepted_tokens"] / max(counted["draft_tokens"], 1)
    if wrong == "module":  # its drafts have no say in the text, but are worse
        assert tau[True] < 0.9 * tau[False]
    else:
        assert texts[False] != texts[True]


@pytest.mark.parametrize("kind", ["sequential", "shared", "heads", "gpt_neox", "one module"])
def test_a_module_drafts_the_same(kind, monkeypatch):
    """Its own cache is taken over too: each request verifies the same drafts as after a fresh reading."""
    mtp, system = made(kind), list(range(3, 45))
    asks = [Request(input_ids=[*system, 50 + i, 60, 61 + i], max_new_tokens=14, num_draft_tokens=2) for i in range(5)]
    asks.append(replace_prompt(asks[0], alone(kind, asks[0]) if kind not in MADE else [9, 8, 7]))
    asks.append(replace(asks[0], max_new_tokens=13))  # nothing is left to read
    drafter, records, drafts = type(mtp.drafter()), {}, {False: {}, True: {}}
    draft = drafter.draft

    def noted(own: Any, sequences: list[SequenceState], *how: Any) -> list[Draft]:
        made = draft(own, sequences, *how)
        drafts[share] |= {(s.index, len(s.tokens)): d.tokens for s, d in zip(sequences, made, strict=True)}
        return made

    monkeypatch.setattr(drafter, "draft", noted)
    for share in (False, True):
        with Engine(mtp, slots=3, drafter="mtp", prefix_caching=share) as engine:
            records[share] = [list(engine.submit(ask))[-1].stats.records for ask in asks]
            hits = engine.metrics()["prefix_hits"]
        assert (hits > 0) is share
    assert records[True] == records[False] and drafts[True] == drafts[False]


def replace_prompt(ask: Request, answer: list[int]) -> Request:
    """The next turn: what was asked and answered, and a little more."""
    return replace(ask, input_ids=[*ask.input_ids, *answer, 5, 6])


def test_a_conversation_reads_its_new_turn_only():
    mtp = made("sequential")
    with Engine(mtp, slots=2, drafter="mtp") as engine:
        history = list(range(3, 60))
        for turn in range(4):
            running = engine.submit(Request(input_ids=history, max_new_tokens=9))
            history = [*history, *tokens_of(list(running)), 70 + turn, 71]
            assert running.sequence.shared >= (running.prompt_tokens - 9 if turn else 0)
        assert engine.metrics()["prefix_hits"] < engine.metrics()["prefix_queries"] == 4 * 57 + (1 + 2 + 3) * 11


def test_new_weights_forget_what_was_read():
    torch.manual_seed(3)
    mtp = knowing_mtp(leaning_model())
    mtp._curve = CHEAP_ROWS
    ask = Request(input_ids=list(range(3, 60)), max_new_tokens=9)
    with Engine(mtp, slots=2, drafter="mtp") as engine:
        for _ in range(2):
            running = engine.submit(ask)
            list(running)
        assert running.sequence.shared > 0
        with torch.no_grad():
            mtp.model.get_input_embeddings().weight.mul_(-1)
        running = engine.submit(ask)
        told = tokens_of(list(running))
    ids = torch.tensor([list(ask.input_ids)])
    assert running.sequence.shared == 0
    assert told == mtp.model.generate(ids, max_new_tokens=9, pad_token_id=0)[0, 57:].tolist()


def test_who_reads_first_reads_for_all(monkeypatch):
    """Prompts that wait together are read once where they are alike, and padded little where they are not."""
    mtp, system = made("qwen3"), list(range(3, 53))
    prompts = [[*system, 60 + i, *range(20, 21 + i)] for i in range(6)]
    rules = rules_of(share=True)
    rules.beside = lambda: bool(run.active)  # known before the run begins, which else has slots for nobody else
    run = loop.Decoder(mtp.target).start([], rules)
    with mtp.target.reading():
        run.begin()
        for i, prompt in enumerate(prompts):
            run.admit(SequenceState(list(prompt), len(prompt), i, most_tokens=len(prompt) + 3))
        while run.step():
            pass
    fresh = sum(len(p) - 1 for p in prompts)
    assert run.stats.target_rows <= fresh - 5 * 50 + 6 * 3 + loop.PADDING


@pytest.mark.parametrize("kind", KINDS)
def test_answers_to_one_prompt_read_it_once(kind):
    """num_return_sequences: the texts are those of prompts that are read one by one, drawn or not, whoever drafts."""
    mtp, prompt = made(kind), torch.tensor([[5, *range(30, 67)]])
    both = torch.cat([prompt.expand(4, -1), torch.tensor([[7], [8], [7], [8]])], dim=1)
    for how in ({"num_draft_tokens": 0}, {"num_draft_tokens": 2}, {"drafter": "lookup"}, {"drafter": "mtp+lookup"}):
        for draws in (False, True):
            told, rows = [], []
            for share in (True, False):
                with pytest.MonkeyPatch.context() as patch:
                    if not share:
                        patch.setattr(loop.Rules, "share", property(lambda _: False, lambda *_: None), raising=False)
                    out = mtp.generate(both, max_new_tokens=9, do_sample=draws, pad_token_id=0,
                                       generator=torch.Generator().manual_seed(2), return_dict_in_generate=True,
                                       num_return_sequences=2 if draws else 1, **how)  # fmt: skip
                told.append(out.sequences.tolist())
                rows.append(out.stats.target_rows)
            assert told[0] == told[1]
            assert rows[0] == rows[1] if kind == "windows" else rows[0] <= rows[1] - 2 * 30 * (3 if draws else 1)


def test_nobody_waits_for_what_a_watcher_cannot_share():
    """Whoever must see every row sees them, in as few forwards as without."""
    mtp, forwards = made("qwen3"), []
    for share in (True, False):
        run = loop.Decoder(mtp.target, watchers=[Watcher()]).start(
            [SequenceState([*range(3, 53)], 50, i, most_tokens=52) for i in range(4)], rules_of(share=share)
        )
        with mtp.target.reading():
            forwards.append(run.go().target_forwards)
    assert forwards[0] == forwards[1]


def rules_of(**more: Any) -> loop.Rules:
    return loop.Rules(RowScores(None, False), lambda s: len(s.tokens) >= s.most_tokens, max_tokens=200, slots=6, **more)


def test_texts_that_have_ended_take_bounded_memory():
    """They give way before the cache grows beyond its share."""
    cache = SlotCache()
    cache.reserve(1, 100)
    like = torch.ones(1, 1, 2, 4)
    cache.parts(0, [like])
    row, texts = like[0, 0].nbytes, Prefixes(cache, [], 9, 0)
    texts.spare_bytes = row * 450
    for i in range(9):
        ended = SequenceState([7] * 90, 9, i, slot=0, cached=89, record=[None])  # type: ignore[list-item]
        assert texts.keep(ended, 1)
    assert [text.index for text in texts.kept] == [6, 7, 8]  # slots 1 to 3: four of 100 columns fit
    assert texts.top == 4 and cache.size <= 1.6 * 450
    texts.trim(300)
    assert texts.kept == []
    assert not texts.keep(SequenceState([7] * 90, 9, 9, slot=0, cached=89), 1)  # nobody has looked at its numbers


@pytest.mark.parametrize("seed", range(3))
def test_alike(seed):
    dice = random.Random(seed)
    for _ in range(200):
        one, other = ([dice.randrange(2) for _ in range(dice.randrange(9))] for _ in range(2))
        slow = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        assert alike(one, other) == slow
