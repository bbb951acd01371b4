"""Layers that look through a window keep and read that much however long the text; the slow twin keeps everything."""

# B sequences, R rows of a step, V vocabulary.

from __future__ import annotations

import functools
import itertools
import math
import random
import statistics
import time
from typing import Any

import pytest
import torch
from architectures import build
from drafters import Branching, knowing_mtp, leaning_model
from test_decode import prompts, reference, run, texts
from tiny import tiny_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from foretell.decoding import loop
from foretell.decoding.compose import Composed
from foretell.decoding.loop import Decoder
from foretell.decoding.scores import RowScores
from foretell.methods import chain
from foretell.methods.heads import HeadsConfig
from foretell.methods.masked import MaskedConfig
from foretell.models.graphs import StaticSteps
from foretell.models.slot_cache import Ring, SlotCache, SlotRows, cache_name
from foretell.models.target import Target
from foretell.mtp import get_mtp_model
from foretell.ops.tree import chain_mask, row_mask
from foretell.types import Draft, SequenceState

WINDOW, SPARE = 7, 5


@pytest.fixture
def spare(monkeypatch):
    """Few rows to spare, so that rings go round within short texts."""
    monkeypatch.setattr(SlotCache, "SPARE", SPARE)
    monkeypatch.setattr(loop, "PREFILL_ROWS", SPARE)
    monkeypatch.setattr(chain, "READ_ROWS", SPARE)


@functools.cache
def sliding(name: str = "mistral", **changes: Any) -> Target:
    return Target(tiny_model(name, seed=3, spread=2.0, sliding_window=WINDOW, **changes))


# -- against a cache that keeps everything -----------------------------------------------------------------------------


class Both:
    """The same steps over a cache with rings and one that keeps all columns."""

    def __init__(self, target: Target, rng: random.Random) -> None:
        self.target, self.rng = target, rng
        self.caches = SlotCache(), SlotCache()
        self.caches[0].open(target.windows)
        self.lengths: list[int] = []
        self.worst = 0.0

    def tokens(self, B: int, R: int) -> Tensor:
        return torch.tensor([[self.rng.randint(3, 90) for _ in range(R)] for _ in range(B)])

    def step(self, counts: list[int], first: int = 0, parents: list[list[int]] | None = None, **how: Any) -> None:
        """counts[b] rows of each sequence from slot `first` on; the two must say the same of them."""
        B, R, lengths = len(counts), max(counts), self.lengths[first : first + len(counts)]
        ids_BR, lengths_B = self.tokens(B, R), torch.tensor(lengths)
        if parents is not None:
            parents = [[*one, *[-2] * (R - len(one))] for one in parents]
            depths = [loop._depths(one) for one in parents]
            how["position_ids_BR"] = lengths_B[:, None] + torch.tensor(depths)
            how["parents_BR"] = torch.tensor(parents)
        ragged = min(counts) < R
        if ragged:
            how["valid_rows_B"] = torch.tensor(counts)
        if not ragged and len(set(lengths)) == 1 and self.rng.random() < 0.8:
            how["start"] = lengths[0]
        how["full"] = R == 1 and "start" in how
        got, wanted = (
            self.target.forward_rows(ids_BR, lengths_B, cache, first=first, visible=max(lengths) + R, **how)
            for cache in self.caches
        )
        for b, count in enumerate(counts):
            apart = (got.post_norm_BRD[b, :count] - wanted.post_norm_BRD[b, :count]).abs().max()
            self.worst = max(self.worst, float(apart))

    def join(self) -> None:
        """Two sequences come, and are read in pieces."""
        first = len(self.lengths)
        self.lengths += [0, 0]
        for _ in range(self.rng.randint(1, 6)):
            counts = [self.rng.randint(1, SPARE) for _ in range(2)]
            self.step(counts, first)
            self.lengths[first:] = [n + c for n, c in zip(self.lengths[first:], counts, strict=True)]

    def round(self) -> None:
        """A tree or a chain of each, of which a path stays."""
        most = 3 * SPARE if self.rng.random() < 0.05 else SPARE
        counts = [self.rng.randint(1, most) for _ in self.lengths]
        if self.rng.random() < 0.4:
            counts = [counts[0]] * len(counts)
        tree = self.rng.random() < 0.5
        parents = [[-1, *(self.rng.randrange(r) if tree else r - 1 for r in range(1, count))] for count in counts]
        self.step(counts, parents=parents if tree else None)
        if self.rng.random() < 0.2:  # none of it stands: what it has written is wiped, and it is read again
            for cache in self.caches:
                for slot, length in enumerate(self.lengths):
                    cache.clear(slot, length)
            self.step(counts, parents=parents if tree else None)
        paths = [self.path(one) for one in parents]
        for cache in self.caches:
            cache.keep(list(range(len(paths))), self.lengths, paths)
        self.lengths = [length + len(path) for length, path in zip(self.lengths, paths, strict=True)]

    def path(self, parents: list[int]) -> list[int]:
        at, path = self.rng.randrange(len(parents)), []
        while at >= 0:
            path.append(at)
            at = parents[at]
        return path[::-1]

    def leave(self) -> None:
        slot, last = self.rng.randrange(len(self.lengths)), self.lengths.pop()
        if slot < len(self.lengths):
            for cache in self.caches:
                cache.move(len(self.lengths), slot, last)
            self.lengths[slot] = last


def apart(target: Target, seed: int, rounds: int = 60) -> float:
    """The largest distance of a state over many random rounds."""
    rng = random.Random(seed)
    both = Both(target, rng)
    for _ in range(rounds):
        if len(both.lengths) < 2:
            both.join()
        both.round()
        if rng.random() < 0.08:
            both.leave()
    assert all(ring.width > WINDOW + SPARE - 1 for ring in both.caches[0].rings.values()), "some steps needed more room"
    return both.worst


# states are of size 1; sums in another order differ by 1e-5
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_many_random_rounds_say_what_keeping_everything_says(spare, name, seed):
    assert apart(sliding(name), seed) < 1e-4


def one_short(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ring.__init__

    def less(self: Ring, window: int, spare: int) -> None:
        right(self, window, spare)
        self.width -= 1

    monkeypatch.setattr(Ring, "__init__", less)


def wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ring.clear
    monkeypatch.setattr(Ring, "clear", lambda self, slot, first=0: right(self, slot, 0))


def unmoved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ring, "keep", lambda *_: None)


def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ring.make_room

    def forget(self: Ring, first: int, lengths_B: Tensor, rows: int) -> None:
        right(self, first, torch.zeros_like(lengths_B), rows)

    monkeypatch.setattr(Ring, "make_room", forget)


@pytest.mark.parametrize("fault", [one_short, wiped, unmoved, unread])
def test_the_rounds_see_what_is_wrong(spare, monkeypatch, fault):
    target = sliding()
    target.refresh()  # judged by a ring that is right
    fault(monkeypatch)
    assert max(apart(target, seed) for seed in (0, 1)) > 1e-2


@pytest.mark.parametrize("window", [None, 3, 7])
def test_masks_of_some_columns_are_those_columns_of_the_mask_of_all(window):
    generator = torch.Generator().manual_seed(5)
    lengths_B, valid_B, total = torch.tensor([2, 9, 14]), torch.tensor([4, 1, 3]), 18
    parents_BR = torch.tensor([[-1, 0, 0, 1], [-1, -2, -2, -2], [-1, 0, 1, -2]])
    kept_BL = torch.stack([torch.randperm(total, generator=generator)[:12] for _ in range(3)])
    kept_BL[1, 3] = kept_BL[2, 0] = -1
    for make in (
        lambda columns: row_mask(parents_BR, lengths_B, columns, window),
        lambda columns: chain_mask(4, lengths_B, columns, valid_B, window),
        lambda columns: chain_mask(4, lengths_B, columns, None, window),
    ):
        every_BRL, got_BRL = make(total), make(kept_BL)
        for b in range(3):
            there = kept_BL[b] >= 0
            assert torch.equal(got_BRL[b][:, there], every_BRL[b][:, kept_BL[b][there]])
            assert not got_BRL[b][:, ~there].any()


# -- which layers, and the texts ---------------------------------------------------------------------------------------


SLIDING: dict[str, Any] = {
    "mistral": {},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
}


@functools.cache
def model_of(name: str) -> nn.Module:
    return leaning_model(name, **SLIDING[name]) if name in SLIDING else build(name)


@functools.cache
def mtp_of(name: str) -> Any:
    if name == "gemma3n_text":  # no layer of it can be copied
        return get_mtp_model(model_of(name), HeadsConfig(depth=1))
    return knowing_mtp(model_of(name))


def test_windows_are_what_the_layers_are_told():
    for name, windows in {
        "mistral": {0: 7, 1: 7},
        "gemma3_text": {0: 7, 2: 7},
        "qwen2": {1: 7},
        "gpt_oss": {0: 7, 2: 7},
        "phi3": {0: 7, 1: 7},
    }.items():
        assert mtp_of(name).target.windows == windows
    # a window that a config speaks of and no layer looks through, and masks that a model changes
    assert Target(build("qwen2")).windows == {} and Target(build("doge")).windows == {}


NEW = 40  # several rings
CASES = [(name, kind) for name in ("gemma3_text", "mistral", "gpt_oss") for kind in ("off", "lookup", "mtp", "tree")]
CASES += [("cohere2", "mtp+lookup"), ("phi3", "tree"), ("qwen2", "mtp+lookup"), ("gemma3n_text", "lookup")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_texts_are_transformers_own_past_several_windows(spare, name, kind):
    model, mtp = model_of(name), mtp_of(name)
    for inputs, slots in ((prompts(11), 4), (prompts(15, 3, 26), 4), (prompts(4, 30, 9), 2)):
        wanted = reference(model, inputs, max_new_tokens=NEW)
        drafter = {"off": "mtp", "tree": Branching(texts(inputs, wanted))}.get(kind, kind)
        how = {"num_draft_tokens": 0 if kind == "off" else 3, "drafter": drafter, "slots": slots}
        out = run(mtp, inputs, max_new_tokens=NEW, **how)
        assert out.sequences.tolist() == wanted.tolist()
        with mtp.workspace() as space:
            widths = {ring.width for ring in space.cache.rings.values()}
        assert max(widths) < WINDOW + 2 * 16 < NEW, "trees need more room than chains"


class Proposed(Composed):
    """Remembers what was drafted."""

    def draft(self, *given: Any) -> list[Draft]:
        drafts = super().draft(*given)
        self.seen += [(draft.tokens, draft.confidence) for draft in drafts]
        return drafts


@pytest.mark.parametrize("shape", [{"shared_module": True}, {"shared_module": False}, {"head_type": "layer"}])
def test_modules_of_a_windowed_layer_draft_what_they_would_if_they_kept_everything(spare, monkeypatch, shape):
    model, seen, widths = model_of("mistral"), [], []
    if "head_type" in shape:
        mtp = get_mtp_model(model, HeadsConfig(depth=2, **shape))
    else:
        mtp = knowing_mtp(model, noise=0.1, **shape)
    for rings in (True, False):
        with monkeypatch.context() as patch:
            if not rings:
                patch.setattr(SlotCache, "open", lambda self, windows=None: SlotRows.open(self))
            drafter = Proposed([mtp.drafter(dtype="float32")])
            drafter.seen = []
            for inputs, slots in ((prompts(15, 3, 26), 4), (prompts(4, 30, 9), 2)):
                run(mtp, inputs, max_new_tokens=NEW, drafter=drafter, num_draft_tokens=2, slots=slots)
            (inner,) = drafter.drafters
            caches = inner._caches if "head_type" in shape else [inner._cache]
            widths.append([ring.width for cache in caches for ring in cache.rings.values()])
        seen.append(drafter.seen)
    assert set(widths[0]) == {WINDOW + SPARE - 1} and not widths[1]
    assert [tokens for tokens, _ in seen[0]] == [tokens for tokens, _ in seen[1]] and len(seen[0]) > 60
    sure = [torch.tensor([p for _, one in mine for p in one]) for mine in seen]
    assert float((sure[0] - sure[1]).abs().max()) < 1e-4 < float((sure[0] - sure[1].roll(1)).abs().max())


def test_more_rows_than_there_is_room_for_make_room(spare):
    """Masks below every row: more of them than a ring has to spare."""
    model = model_of("mistral")
    mtp = get_mtp_model(model, MaskedConfig(depth=3, lora_rank=2))
    inputs = prompts(15, 3, 26)
    wanted = reference(model, inputs, max_new_tokens=NEW)
    out = run(mtp, inputs, max_new_tokens=NEW, num_draft_tokens=3, draft_layout="quadratic")
    assert out.sequences.tolist() == wanted.tolist() and sum(map(sum, out.stats.drafted)) > 0
    with mtp.workspace() as space:
        assert all(ring.width >= WINDOW + 15 for ring in space.cache.rings.values())


@pytest.mark.parametrize("kind", ["off", "mtp+lookup", "tree"])
def test_steps_of_static_shape_go_round_too(spare, kind):
    model, mtp = model_of("gemma3_text"), knowing_mtp(model_of("gemma3_text"))
    mtp.target.view()
    mtp.target.static = StaticSteps(mtp.target.forward_static, replayed=False)
    for inputs in (prompts(11), prompts(15, 3, 26)):
        wanted = reference(model, inputs, max_new_tokens=NEW)
        drafter = {"off": "mtp", "tree": Branching(texts(inputs, wanted))}.get(kind, kind)
        out = run(mtp, inputs, max_new_tokens=NEW, num_draft_tokens=0 if kind == "off" else 3, drafter=drafter)
        assert out.sequences.tolist() == wanted.tolist()


def test_a_step_that_goes_round_waits_for_nothing(spare, monkeypatch):
    monkeypatch.setattr("foretell.models.fast._can_pack", lambda module: False)
    target, cache, long = Target(tiny_model("gemma2")), SlotCache(), {"dtype": torch.long}
    cache.open(target.windows)
    for R in (3, SPARE):
        parents = torch.arange(-1, R - 1).repeat(2, 1)
        buffers = [torch.zeros(2, R, **long), torch.zeros(2, **long), torch.zeros(2, R, **long)]
        arguments = (*buffers, parents, torch.tensor([R, 2]), 64, cache)
        target.forward_static(*arguments)
        with FakeTensorMode(allow_non_fake_inputs=True):
            target.forward_static(*arguments)


def test_a_layer_that_asks_where_a_key_stands_keeps_everything():
    model = tiny_model("mistral", sliding_window=20)
    kind = type(model.model.layers[0].self_attn)
    named = cache_name(kind.forward)

    class Counting(kind):
        """Its first columns count for more."""

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            kwargs[named] = Fading(kwargs.get(named))
            return super().forward(hidden_states, *args, **kwargs)

    class Fading:
        def __init__(self, cache: Any) -> None:
            self.cache = cache

        def update(self, key: Tensor, value: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
            if self.cache is not None:
                key, value = self.cache.update(key, value, *more, **named)
            return key, value * (1 + (torch.arange(value.shape[2]) < 3)[:, None])

    for layer in model.model.layers:
        layer.self_attn.__class__ = Counting
    target = Target(model)
    assert target.windows == {} and target.verdict()["within"] is None
    assert not target.verdict()["differs"]


# -- memory and time ---------------------------------------------------------------------------------------------------


def decoded(target: Target, length: int, new: int, B: int = 1) -> tuple[Decoder, list[float]]:
    """(the decoder after so many tokens behind a prompt of this length, CPU time of each)."""
    decoder, times = Decoder(target), []
    tokens = [[(7 * i * (b + 1)) % 90 + 3 for i in range(length - 3 * b)] for b in range(B)]
    sequences = [SequenceState(one, len(one), b) for b, one in enumerate(tokens)]

    def finished(sequence: SequenceState) -> bool:
        times.append(time.thread_time())
        return len(sequence.new_tokens) >= new

    decoder.run(sequences, RowScores([], False), finished, max_tokens=length + new)
    return decoder, [after - before for before, after in itertools.pairwise(times)]


def columns_kept(cache: SlotCache) -> dict[int, int]:
    """By layer, the columns that all slots have together."""
    stores = {layer: cache.rings[cache.windows[layer]] if layer in cache.windows else cache for layer in range(2)}
    return {layer: len(store.held(layer)[0]) - 1 for layer, store in stores.items()}


def test_what_is_kept_of_a_window_does_not_grow_with_the_text():
    target = Target(tiny_model("gemma2", sliding_window=WINDOW, max_position_embeddings=4096))
    kept = {length: columns_kept(decoded(target, length, 4, B=3)[0].cache) for length in (700, 1500)}
    assert kept[700][0] == kept[1500][0] == 3 * (WINDOW + SlotCache.SPARE - 1)
    assert kept[700][1] >= 3 * 700 and kept[1500][1] >= 3 * 1500, "the other layer sees everything"


def test_a_round_at_8192_tokens_takes_no_longer_than_at_512():
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 20000}
    target = Target(tiny_model("mistral", spread=1.0, sliding_window=256, **sizes))
    least = {length: math.inf for length in (512, 8192)}
    for _ in range(3):  # in turns, since other work makes both slower
        for length in least:
            least[length] = min(least[length], statistics.median(decoded(target, length, 24)[1][4:]))
    assert least[8192] < 1.5 * least[512]
