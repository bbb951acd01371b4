"""State belongs to a call: threads, nested and broken calls, modes, memory, copies, and texts that are no numbers."""

# B sequences.

from __future__ import annotations

import copy
import functools
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from drafters import Branching, knowing_mtp, leaning_model
from test_decode import prompts, reference, run, texts
from test_heads import fitted as fitted_heads
from test_masked_decode import knowing as knowing_masks
from tiny import tiny_model
from torch import Tensor, nn

from foretell.data.cache import HiddenRecorder
from foretell.decoding.scores import RowScores
from foretell.methods.heads import HeadsConfig
from foretell.methods.masked import MaskedConfig
from foretell.methods.sequential import SequentialConfig
from foretell.models import kernels
from foretell.models.graphs import StaticSteps
from foretell.models.kernels import ROWS, Measured
from foretell.models.slot_cache import SlotStorage
from foretell.mtp import MTPModel, get_mtp_model
from foretell.types import Draft, Drafter, SequenceState

METHODS: dict[str, Callable[[], MTPModel]] = {
    "sequential": lambda: knowing_mtp(leaning_model(), noise=0.2),
    "heads": lambda: fitted_heads("mha_ffn"),
    "masked": lambda: knowing_masks(leaning_model(), noise=1.0),
}


NEVER = 96  # a token that no text here says: with an end token, rows of a batch end on their own


def say(model: Any, inputs: dict[str, Tensor], **settings: Any) -> list[list[int]]:
    settings = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 24, **settings}
    return model.generate(**inputs, **settings).tolist()


# -- calls beside each other -------------------------------------------------------------------------------------------


def beside(calls: list[Callable[[], Any]]) -> list[Any]:
    """What the calls give when each runs in a thread of its own, all at once."""
    got: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def work(i: int) -> None:
        start.wait()
        try:
            got[i] = calls[i]()
        except Exception as error:
            got[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


@pytest.mark.parametrize("method", METHODS)
def test_threads(method):
    """Batches of other sizes and lengths, lookup, drafting off, "auto", sampling: each as if it were alone."""
    mtp = METHODS[method]()
    mtp.release()
    inputs = [prompts(9), prompts(4, 12, 7), prompts(20, 3, seed=5), prompts(6, 6, 6, 6, 6, seed=6)]
    wanted = [say(mtp.model, one) for one in inputs]
    how: list[dict[str, Any]] = [
        {"num_draft_tokens": 3},
        {"num_draft_tokens": "auto", "slots": 2},
        {"num_draft_tokens": 2, "drafter": "mtp+lookup"},
        {"num_draft_tokens": 0},
    ]
    for turn in range(2):  # the second with the first one's workspaces, in other threads
        order = [(turn + i) % 4 for i in range(4)]
        got = beside([lambda i=i, k=k: say(mtp, inputs[i], **how[k]) for i, k in enumerate(order)])
        assert got == wanted
    assert len(mtp._workspaces._free) <= 4

    def drawn(i: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(i)
        settings = {"draft_sample_method": "probabilistic" if i % 2 else "greedy", "num_draft_tokens": 3}
        if method == "masked":  # of a fixed layout: "auto" follows the clock
            settings["draft_layout"] = "quadratic"
        return say(mtp, inputs[i], do_sample=True, generator=generator, **settings)

    alone = [drawn(i) for i in range(4)]
    assert beside([lambda i=i: drawn(i) for i in range(4)]) == alone != wanted


def test_threads_and_a_release_in_the_middle():
    mtp, inputs = METHODS["sequential"](), [prompts(9), prompts(4, 12, 7), prompts(20, 3, seed=5)]
    wanted = [say(mtp.model, one) for one in inputs]
    got = beside([*(lambda one=one: say(mtp, one, num_draft_tokens=3) for one in inputs), mtp.release])
    assert got == [*wanted, None]
    assert [say(mtp, one, num_draft_tokens=3) for one in inputs] == wanted


# -- calls inside calls, and calls that break --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [3, "auto"])
def test_a_criterion_may_generate_itself(method, length):
    """Each asks the same MTPModel for another text, in the middle of a round: both texts are the model's own."""
    mtp, outer, inner = METHODS[method](), prompts(9, 4, 12), prompts(6, 11, seed=3)
    mtp.release()
    wanted, inside = say(mtp.model, outer), say(mtp.model, inner, max_new_tokens=9)
    asked = []

    def criterion(ids: Tensor, _scores: Any) -> Tensor:
        if len(asked) < 4 and ids.shape[1] % 3 == 0:
            asked.append(say(mtp, inner, max_new_tokens=9, num_draft_tokens=length))
        return torch.zeros(len(ids), dtype=torch.bool)

    criterion.of_one_text = True  # type: ignore[attr-defined]
    assert say(mtp, outer, stopping_criteria=[criterion], num_draft_tokens=length, slots=2) == wanted
    assert asked == [inside] * 4
    assert say(mtp, inner, max_new_tokens=9, num_draft_tokens=length) == inside
    assert len(mtp._workspaces._free) == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("where", "error"), [("criterion", RuntimeError), ("processor", RuntimeError), ("streamer", KeyboardInterrupt)]
)
def test_a_call_that_breaks_leaves_nothing(method, where, error):
    mtp, inputs, times = METHODS[method](), prompts(9), [0]
    mtp.release()
    wanted = say(mtp.model, inputs)
    assert say(mtp, inputs, num_draft_tokens=3) == wanted

    def breaks(*_: Any) -> Any:
        times[0] += 1
        if times[0] == 7:
            raise error("here")
        return _[1] if where == "processor" else torch.zeros(1, dtype=torch.bool)

    class Streamer:
        put = staticmethod(breaks)

        def end(self) -> None:
            raise AssertionError("nothing ends well")

    breaks.of_one_text = True  # type: ignore[attr-defined]
    settings = {
        "criterion": {"stopping_criteria": [breaks]},
        "processor": {"logits_processor": [breaks]},
        "streamer": {"streamer": Streamer()},
    }[where]
    with pytest.raises(error, match="here"):
        say(mtp, inputs, num_draft_tokens=3, **settings)
    assert not mtp._workspaces._free and not mtp._workspaces._leased
    for batch in (inputs, prompts(4, 9, 13)):
        assert say(mtp, batch, num_draft_tokens=3) == say(mtp.model, batch)


def test_acceptance_is_learned_across_calls_and_given_back():
    mtp, inputs = METHODS["sequential"](), prompts(9)
    say(mtp, inputs, num_draft_tokens="auto")
    with mtp.workspace() as space:
        first = list(space.adaptive.values())
    for _ in range(4):
        say(mtp, inputs, num_draft_tokens="auto")
    with mtp.workspace() as space:
        assert first and list(space.adaptive.values()) == first
    cells = [*first[0]._trust.values(), *first[0]._depth.values()]
    before = [list(cell) for cell in cells]
    assert max(tried for _, tried in before) > first[0].DOUBTED
    with torch.no_grad():
        mtp.module.blocks[0].eh_proj.weight.mul_(2)
    with mtp.workspace() as space:
        mtp.drafter(space)
        assert list(space.adaptive.values()) == first
        for (old, tried), (accepted, now) in zip(before, cells, strict=True):  # as a start, and no more than that
            assert now == pytest.approx(min(tried, first[0].DOUBTED)) and accepted / now == pytest.approx(old / tried)
        mtp.release()
    assert not mtp._workspaces._free, "what was leased when all was given back does not come back"


@pytest.mark.parametrize("method", METHODS)
def test_who_rests_keeps_no_copies_of_weights_and_wakes_to_new_ones(method, monkeypatch):
    """Weights as they were, other values in place, other tensors; a call that still reads keeps its own."""
    monkeypatch.setattr(kernels, "choose", lambda seconds, *_: [next(n for n in seconds if n != "plain")] * len(ROWS))
    monkeypatch.setattr(kernels, "_known", {})
    mtp, inputs = METHODS[method](), prompts(9, 4)
    mtp.release()

    def check() -> None:
        for how in ({"num_draft_tokens": 0}, {"num_draft_tokens": 3}, {"num_draft_tokens": "auto"}):
            assert say(mtp, inputs, **how) == say(mtp.model, inputs)
            assert mtp.target._copy.is_fast
            mtp.rest()
            kept = [p.kept for p in mtp.target._copy.tree.modules() if isinstance(p, Measured)]
            assert any(kept) and sum(copy.nbytes for one in kept for copy in one.values()) == 0
            assert not mtp._workspaces._packed and not any(space._drafters for space in mtp._workspaces._free)

    check()
    logits = mtp.draft_logits(inputs["input_ids"][:1])  # a view without a call
    mtp.rest()
    assert torch.equal(mtp.draft_logits(inputs["input_ids"][:1]), logits)
    tree = mtp.target._copy.tree
    mtp.rest()
    with torch.no_grad():
        for weight in mtp.model.parameters():
            weight.mul_(1.1)
    check()
    assert mtp.target._copy.tree is tree, "what was found out about it is not asked again"
    mtp.model.lm_head.weight = nn.Parameter(mtp.model.lm_head.weight.detach().flip(0))
    check()

    def look(*_: Any) -> Tensor:
        mtp.rest()
        return torch.zeros(1, dtype=torch.bool)

    look.of_one_text = True  # type: ignore[attr-defined]
    assert say(mtp, inputs, num_draft_tokens=2, stopping_criteria=[look]) == say(mtp.model, inputs)


# -- modes and random numbers ------------------------------------------------------------------------------------------


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in model.named_modules()}


@pytest.mark.parametrize(
    ("method", "mode"), [*((method, "mixed") for method in METHODS), ("sequential", True), ("masked", False)]
)
def test_every_part_keeps_its_mode(method, mode):
    mtp, inputs = METHODS[method](), prompts(9, 4)
    wanted = say(mtp.model, inputs)
    for i, part in enumerate(mtp.modules()):
        part.training = i % 2 == 0 if mode == "mixed" else mode
    before, during = flags(mtp), []

    def look(*_: Any) -> Tensor:
        during.append(flags(mtp))
        return torch.zeros(1, dtype=torch.bool)

    look.of_one_text = True  # type: ignore[attr-defined]
    assert say(mtp, inputs, num_draft_tokens=2, stopping_criteria=[look]) == wanted
    mtp.draft_logits(inputs["input_ids"][:1])
    assert flags(mtp) == before and during and all(one == before for one in during)


def test_a_module_takes_the_mode_of_its_target():
    model = tiny_model("llama", attention_dropout=0.4)
    mtp, ids = get_mtp_model(model, SequentialConfig(depth=2)), torch.arange(10, 19)[None]
    assert not any(flags(mtp).values())
    wanted = say(model, prompts(9))
    assert say(mtp, prompts(9), num_draft_tokens=2) == wanted
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
    assert all(flags(get_mtp_model(model.train(), SequentialConfig(depth=1))).values())
    assert say(mtp.train(), prompts(9), num_draft_tokens=2) == wanted, "what decodes has no dropout"


@pytest.mark.parametrize(
    ("method", "length"), [*((m, n) for m in (*METHODS, "noise") for n in (3, "auto")), ("sequential", 0)]
)
def test_greedy_calls_draw_no_random_numbers(method, length):
    noise = MaskedConfig(depth=3, lora_rank=4, mask_tokens="noise", sampler=False)
    mtp = get_mtp_model(leaning_model(), noise) if method == "noise" else METHODS[method]()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for layout in (None, *(["two_pass", "quadratic"] if method == "noise" and length else [])):
        say(mtp, prompts(9, 4), num_draft_tokens=length, **({} if layout is None else {"draft_layout": layout}))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", [*METHODS, "few"])
def test_a_seeded_call_draws_from_its_generator_alone(method):
    mtp = knowing_mtp(leaning_model(), draft_vocab_size=40) if method == "few" else METHODS[method]()
    told = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        mtp.release()
        before, generator = torch.get_rng_state(), torch.Generator().manual_seed(5)
        how = {"do_sample": True, "generator": generator, "draft_sample_method": "probabilistic"}
        told.append(say(mtp, prompts(9, 4), num_draft_tokens=3, **how))
        assert torch.equal(torch.get_rng_state(), before)
    assert told[0] == told[1]


# -- copies ------------------------------------------------------------------------------------------------------------


def saved(mtp: MTPModel) -> MTPModel:
    buffer = io.BytesIO()
    torch.save(mtp, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
def test_a_copy_after_a_call_decodes_the_same_and_shares_no_state(method, copied):
    mtp, inputs = METHODS[method](), prompts(9, 4)
    first = run(mtp, inputs, max_new_tokens=24, num_draft_tokens=3)
    other = copied(mtp)
    assert other._workspaces is not mtp._workspaces and not other._workspaces._free
    out = run(other, inputs, max_new_tokens=24, num_draft_tokens=3)
    assert out.sequences.tolist() == first.sequences.tolist() and out.stats.accepted == first.stats.accepted
    shared = {p.data_ptr() for p in mtp.parameters()} & {p.data_ptr() for p in other.parameters()}
    assert not shared and other.target.model is other.model
    with torch.no_grad():  # the copy's weights are its own, in what decodes too
        other.model.get_output_embeddings().weight.copy_(-other.model.get_output_embeddings().weight)
    changed = say(other.model, inputs)
    assert say(other, inputs, num_draft_tokens=3) == changed != say(mtp.model, inputs)
    assert say(mtp, inputs, num_draft_tokens=3) == say(mtp.model, inputs)


# -- drafters of one's own ---------------------------------------------------------------------------------------------


class Repeats(Drafter):
    """Nothing but what it must have: it says the last token again."""

    name = "repeats"

    def draft(self, sequences: Any, lengths: list[int], worth: Any = None) -> list[Draft]:
        drafts = [Draft() for _ in sequences]
        for sequence, length, draft in zip(sequences, lengths, drafts, strict=True):
            for i in range(length):
                draft.add(sequence.tokens[-1], i - 1, 0.5, self.name)
        return drafts


class Foreign:
    """Written before there was a base class."""

    name = "foreign"
    open = start = observe = move = lambda *_: None
    draft = Repeats.draft


@pytest.mark.parametrize("length", [3, "auto"])
def test_a_drafter_needs_a_name_and_drafts_only(length):
    mtp, inputs = METHODS["sequential"](), prompts(9, 4, 12)
    wanted = say(mtp.model, inputs)
    for drafter in (Repeats(), Foreign(), [Repeats(), Foreign()]):
        assert say(mtp, inputs, num_draft_tokens=length, drafter=drafter, slots=2) == wanted
    out = run(mtp, inputs, max_new_tokens=24, num_draft_tokens=2, drafter=Foreign())
    assert out.stats.drafted[0][0] == 2
    for wrong in (object(), [Repeats(), None], 7):
        with pytest.raises(ValueError, match="drafter: got .*, wanted 'mtp', .*foretell.types.Drafter"):
            say(mtp, inputs, num_draft_tokens=2, drafter=wrong)


# -- memory ------------------------------------------------------------------------------------------------------------


def held_bytes(mtp: MTPModel) -> dict[str, int]:
    """Bytes of each storage that a workspace keeps: the target's cache and the drafter's."""
    found: dict[str, int] = {}

    def look(name: str, thing: Any) -> None:
        if isinstance(thing, SlotStorage):
            found[name] = sum(t.nbytes for parts in thing._storage.values() for t in parts)
        elif isinstance(thing, list):
            for i, one in enumerate(thing):
                look(f"{name}.{i}", one)

    for space in mtp._workspaces._free:
        look("cache", space.cache)
        for name, value in [pair for _, own in space._drafters.values() for pair in vars(own).items()]:
            look(name, value)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_short_texts_hold_little_however_long_they_might_get(method):
    """16 rows that end soon, with room asked for 32,768 tokens: at most twice what they used."""
    mtp, inputs = METHODS[method](), prompts(*[30] * 16)

    def stop(ids: Tensor, _scores: Any) -> Tensor:
        return torch.tensor([ids.shape[1] >= 60])

    stop.of_one_text = True  # type: ignore[attr-defined]
    settings = {"eos_token_id": NEVER, "stopping_criteria": [stop]}  # without one, texts go on until all have ended
    out = run(mtp, inputs, max_new_tokens=32768, num_draft_tokens=3, **settings)
    assert out.sequences.shape == (16, 60)
    held, config = held_bytes(mtp), mtp.model.config
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert 0 < held["cache"] <= 2 * 16 * 60 * a_token
    assert held.get("_states", 0) <= 2 * 16 * 60 * config.hidden_size * 4 * 4
    assert all(
        size <= 2 * 16 * 60 * config.hidden_size * 8 for name, size in held.items() if name.startswith("_caches")
    )
    mtp.release()
    assert not held_bytes(mtp)
    assert say(mtp, inputs, num_draft_tokens=3) == say(mtp.model, inputs)


def test_turns_of_a_chat_make_few_allocations(monkeypatch):
    mtp, inputs = METHODS["sequential"](), prompts(20)
    made, new = [0], Tensor.new_zeros

    def counted(self: Tensor, *shape: Any, **settings: Any) -> Tensor:
        made[0] += shape[0] > 200
        return new(self, *shape, **settings)

    monkeypatch.setattr(Tensor, "new_zeros", counted)
    counts, ids = [], inputs["input_ids"]
    for turn in range(10):
        turn_inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        out = mtp.generate(**turn_inputs, max_new_tokens=20, do_sample=False, pad_token_id=0, num_draft_tokens=3)
        assert out.tolist() == say(mtp.model, turn_inputs, max_new_tokens=20)
        ids = torch.cat([out, prompts(20, seed=turn)["input_ids"]], dim=1)
        counts.append(made[0])
        made[0] = 0
    assert sum(map(bool, counts)) <= 3, counts


def test_growth_in_the_middle_of_a_run(monkeypatch):
    """Storage that starts with next to nothing: trees, joiners, static steps; the texts are the model's own."""
    monkeypatch.setattr(SlotStorage, "LEAST", 8)
    monkeypatch.setattr(SlotStorage, "MORE", 1.0)
    inputs = prompts(11, 6, 14, 1, 40)
    for make in METHODS.values():
        mtp = make()
        wanted = reference(mtp.model, inputs, max_new_tokens=30)
        tree = Branching(texts(inputs, wanted), (2, 0, 3))
        for settings in ({}, {"drafter": tree}, {"drafter": "mtp+lookup"}, {"num_draft_tokens": "auto"}):
            settings = {"num_draft_tokens": 3, "slots": 3, **settings}
            assert run(mtp, inputs, max_new_tokens=30, **settings).sequences.tolist() == wanted.tolist()
        mtp.target.refresh()
        mtp.target.static = StaticSteps(mtp.target.forward_static, replayed=False)
        out = run(mtp, inputs, max_new_tokens=30, num_draft_tokens=0, slots=3)
        assert mtp.target.static is not None
        assert out.sequences.tolist() == wanted.tolist()


def test_one_long_text_after_many_short_ones_in_one_run():
    """15 of 16 sequences end early: the last one grows alone."""
    mtp, inputs = METHODS["sequential"](), prompts(*[8] * 16)
    ends = {b: 10 for b in range(15)}

    def stop(ids: Tensor, _scores: Any) -> Tensor:
        row = next(b for b in range(16) if torch.equal(ids[0, :8], inputs["input_ids"][b]))
        return torch.tensor([ids.shape[1] >= ends.get(row, 200)])

    stop.of_one_text = True  # type: ignore[attr-defined]
    settings = {"eos_token_id": NEVER, "stopping_criteria": [stop]}
    out = run(mtp, inputs, max_new_tokens=32000, num_draft_tokens=3, **settings)
    assert out.sequences.shape == (16, 200)
    with mtp.workspace() as space:
        assert 200 <= space.cache.size <= 2 * 200


# -- texts that are no numbers -----------------------------------------------------------------------------------------

BAD = 90  # a token whose state overflows


@functools.cache
def overflowing(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = leaning_model().to(dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = torch.inf
        model.get_output_embeddings().weight[BAD] = 0.0  # which it never says itself
    return model


def alone(model: nn.Module, rows: list[list[int]], new: int = 14) -> list[list[int]]:
    """The model's own continuation of each row by itself, up to new tokens."""
    return [
        model.generate(torch.tensor([row]), max_new_tokens=new, do_sample=False, pad_token_id=0)[0].tolist()
        for row in rows
    ]


def batch_of(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])}


class Proposing(Drafter):
    """Drafts a wrong token, whose state overflows, at the wanted place of an otherwise right chain."""

    name = "proposing"

    def __init__(self, truth: list[list[int]], at: int) -> None:
        self.truth, self.at = truth, at

    def draft(self, sequences: Any, lengths: list[int], worth: Any = None) -> list[Draft]:
        drafts = [Draft() for _ in sequences]
        for sequence, length, draft in zip(sequences, lengths, drafts, strict=True):
            n = len(sequence.tokens)
            for i in range(length):
                right = self.truth[sequence.index][n + i] if n + i < len(self.truth[sequence.index]) else 5
                draft.add(BAD if i == self.at else right, i - 1, 0.9, self.name)
        return drafts


@pytest.mark.parametrize(("at", "dtype"), [(0, torch.float32), (2, torch.float32), (1, torch.bfloat16)])
def test_a_draft_that_overflows_harms_nobody(at, dtype):
    """Not even its own text: a mask does not hide a NaN, neither in this forward nor from later ones."""
    model, rows = overflowing(dtype), [[7, 8, 9, 7, 8], [11, 12, 13, 11], [20, 21, 20, 21, 20]]
    wanted = alone(model, rows)
    assert not any(BAD in text for text in wanted)
    mtp = get_mtp_model(model, SequentialConfig(depth=1))
    for drafter in (Proposing(wanted, at), [Proposing(wanted, at), Branching(wanted, (2, 0))]):
        out = run(mtp, batch_of(rows), max_new_tokens=14, num_draft_tokens=3, drafter=drafter, slots=2)
        assert texts(batch_of(rows), out.sequences) == wanted


@pytest.mark.parametrize(
    ("method", "length"), [*((m, n) for m in METHODS for n in (3, "auto")), ("lookup", 3), ("", 0)]
)
def test_a_text_that_overflows_harms_no_other(method, length):
    """It stands in the middle of the batch, joins and leaves; slots are used again, in this call and in the next."""
    model = overflowing()
    rows = [[7, 8, 9, 7, 8], [3, BAD, 5], [11, 12, 13, 11], [BAD], [20, 21, 20, 21, 20], [4, 5, 6, BAD, 9, 9], [30, 31]]
    wanted = alone(model, rows)
    config = {"heads": HeadsConfig(depth=3, head_type="mha_ffn"), "masked": MaskedConfig(depth=3)}
    mtp = get_mtp_model(model, config.get(method, SequentialConfig(depth=3)))
    settings = {"drafter": "lookup"} if method == "lookup" else {}
    for slots in (64, 2):
        out = run(mtp, batch_of(rows), max_new_tokens=14, num_draft_tokens=length, slots=slots, **settings)
        assert texts(batch_of(rows), out.sequences) == wanted
        fine = [rows[0], rows[2], rows[4]]
        out = run(mtp, batch_of(fine), max_new_tokens=14, num_draft_tokens=length, slots=slots, **settings)
        assert texts(batch_of(fine), out.sequences) == [wanted[0], wanted[2], wanted[4]]


@pytest.mark.parametrize("layout", ["linear", "quadratic", "two_pass", "auto"])
def test_adapters_that_are_no_numbers_harm_no_text(layout):
    """Masks spoil the forward that they ride in; texts are the target's all the same, and so are later calls."""
    mtp, rows = knowing_masks(leaning_model(), noise=1.0), [[7, 8, 9, 7, 8], [11, 12, 13, 11]]
    wanted = alone(mtp.model, rows)
    with torch.no_grad():
        for name, parameter in mtp.module.named_parameters():
            if "lora_B" in name:
                parameter.fill_(torch.inf)
    for settings in (
        {"draft_layout": layout},
        {"drafter": "mtp+lookup", "draft_layout": layout},
        {"drafter": "lookup"},
    ):
        out = run(mtp, batch_of(rows), max_new_tokens=14, num_draft_tokens=3, **settings)
        assert texts(batch_of(rows), out.sequences) == wanted


def test_a_module_that_is_no_number_harms_no_text():
    for make in (lambda: knowing_mtp(leaning_model()), lambda: get_mtp_model(leaning_model(), HeadsConfig(depth=2))):
        mtp, inputs = make(), prompts(9, 4)
        wanted = say(mtp.model, inputs)
        with torch.no_grad():
            for parameter in mtp.module.parameters():
                parameter.fill_(torch.nan)
        for length in (2, "auto"):
            assert say(mtp, inputs, num_draft_tokens=length) == wanted
            how = {"do_sample": True, "draft_sample_method": "probabilistic"}
            say(mtp, inputs, num_draft_tokens=length, **how)


def test_recorded_states_of_a_good_text_beside_a_bad_one():
    model = overflowing()
    mtp, kept = get_mtp_model(model, SequentialConfig(depth=1)), {}
    rows = [[3, BAD, 5], [7, 8, 9, 7, 8], [20, 21, 20, 21, 20]]
    recorder = HiddenRecorder(mtp.module.source)
    with mtp.workspace() as space:
        space.decoder(mtp.target, None, watchers=[recorder]).run(
            [SequenceState(list(row), len(row), b) for b, row in enumerate(rows)],
            RowScores(None, do_sample=False),
            lambda s: len(s.new_tokens) == 8,
            max_tokens=20,
            slots=1,
            leave=lambda s: kept.__setitem__(s.index, (s.tokens, recorder.states(s))),
        )
    assert not kept[0][1].isfinite().all()
    for tokens, states in (kept[1], kept[2]):
        ids = torch.tensor([tokens[: len(states)]])
        with torch.no_grad():
            whole = mtp.target.forward_text(ids, torch.arange(ids.shape[1])[None]).post_norm_BRD[0]
        torch.testing.assert_close(states, whole, atol=1e-4, rtol=1e-4)
