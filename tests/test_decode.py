"""Decoding: the tokens are transformers' own, the counts are what happened, and what was trained is what drafts."""

# B sequences, T prompt width.

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from drafters import Branching, Oracle, Scripted, Spy, Wrong, knowing_mtp, leaning_model
from tiny import ARCHITECTURES, VOCAB, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TextIteratorStreamer

import foretell
from foretell.data.cache import HiddenRecorder
from foretell.decoding import loop
from foretell.decoding.adaptive import CostCurve
from foretell.decoding.compose import Composed
from foretell.decoding.scores import RowScores
from foretell.decoding.stats import GenerationStats
from foretell.mtp import MTPModel
from foretell.types import SequenceState, Verification

# a machine on which drafting pays, so that "auto" drafts here whatever else this one is doing
CHEAP_ROWS = CostCurve({1: 1.0, 8: 1.1, 64: 2.0})


def prompts(*lengths: int, seed: int = 32) -> dict[str, Tensor]:
    """Left-padded prompts. Each says its first half twice, so that lookup finds something."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids_BT, mask_BT = torch.zeros(2, len(lengths), width, dtype=torch.long)
    for b, length in enumerate(lengths):
        half = torch.randint(3, VOCAB, (-(-length // 2),), generator=generator)
        ids_BT[b, width - length :] = torch.cat([half, half])[:length]
        mask_BT[b, width - length :] = 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


@functools.cache
def target(name: str = "llama") -> nn.Module:
    return leaning_model(name)


@functools.cache
def mtp_of(shared: bool = False) -> MTPModel:
    mtp = knowing_mtp(target(), shared_module=shared)
    mtp._curve = CHEAP_ROWS
    return mtp


# by the model itself: the id of one that is gone may be another's
_references: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


def reference(model: nn.Module, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    """What transformers' own greedy generate says."""
    known = _references.setdefault(model, {})
    key = f"{inputs['input_ids'].tolist()} {inputs['attention_mask'].tolist()} {settings}"
    if key not in known:
        known[key] = model.generate(**inputs, do_sample=False, pad_token_id=0, **settings)
    return known[key]


def texts(inputs: dict[str, Tensor], out_BT: Tensor) -> list[list[int]]:
    """Each sequence without its left padding (with the padding behind its end)."""
    return [row[int((mask == 0).sum()) :].tolist() for row, mask in zip(out_BT, inputs["attention_mask"], strict=True)]


def run(mtp: MTPModel, inputs: dict[str, Tensor], **settings: Any) -> Any:
    """Our greedy generate, with stats."""
    return mtp.generate(**inputs, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **settings)


DRAFTERS: dict[str, Callable[[list[list[int]]], Any]] = {
    "mtp": lambda truth: "mtp",
    "shared": lambda truth: "mtp",
    "lookup": lambda truth: "lookup",
    "mtp+lookup": lambda truth: "mtp+lookup",
    "oracle": lambda truth: Oracle(truth, (3, 0, 1, 2)),
    "wrong": Wrong,
    "tree": Branching,
    "oracle and tree": lambda truth: [Oracle(truth, (1, 2)), Branching(truth, (2, 0))],
}


def check_stats(stats: GenerationStats, new_tokens: list[int], drafter: str, n: int | str) -> None:
    assert stats.lossless and stats.policy == "lossless"
    assert [sum(e) for e in stats.emitted] == new_tokens
    for record in stats.records:
        for i, v in enumerate(record):
            assert 0 <= v.accepted <= v.depth <= v.drafted and len(v.sources) == v.emitted >= 1
            assert v.emitted == v.accepted + 1 or (i == len(record) - 1 and v.emitted == v.accepted)
            assert n == "auto" or v.depth <= n
    drafted, accepted = sum(map(sum, stats.drafted)), sum(map(sum, stats.accepted))
    assert drafter != "wrong" or accepted == 0
    # the gate of all these tests: something was accepted, and something refused; "auto" may find that nothing pays of
    # what a tiny module or a repetition says, but not of what is right
    if n != "auto" or "oracle" in drafter:
        assert (drafted > 0) == (n != 0) and (accepted > 0) == (n != 0 and drafter != "wrong")
        assert accepted < drafted or n in (0, "auto")


# -- losslessness ------------------------------------------------------------------------------------------------------

# prompts, slots, with several end tokens. One token is a prompt too: nothing is cached when drafting begins
BATCHES = {
    "one": (prompts(9, seed=18), 64, False),
    "two": (prompts(6, 9), 64, False),
    "five": (prompts(7, 2, 12, 1, 9, seed=33), 64, True),
    "five in two slots": (prompts(7, 1, 12, 4, 9, seed=33), 2, True),
}


def ends(model: nn.Module, inputs: dict[str, Tensor], new: int) -> list[int]:
    """End tokens that cut some of the sequences, each elsewhere."""
    T, whole_BT = inputs["input_ids"].shape[1], reference(model, inputs, max_new_tokens=new)
    return sorted({int(whole_BT[b, T + 3 + 4 * b]) for b in range(0, len(whole_BT), 2)})


def new_tokens_of(out_BT: Tensor, T: int, eos: list[int] | None) -> list[int]:
    counts = []
    for row in out_BT[:, T:].tolist():
        at = [i for i, token in enumerate(row) if token in (eos or [])]
        counts.append(at[0] + 1 if at else len(row))
    return counts


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(
    ("batch", "n"), [(batch, n) for batch in BATCHES for n in (1, 2, 3, "auto") if batch == "two" or n in (3, "auto")]
)
def test_greedy_is_transformers_own(batch, drafter, n):
    (inputs, slots, stops), mtp = BATCHES[batch], mtp_of(drafter == "shared")
    T = inputs["input_ids"].shape[1]
    eos = ends(mtp.model, inputs, 20) if stops else None
    wanted = reference(mtp.model, inputs, max_new_tokens=20, eos_token_id=eos)
    counts = new_tokens_of(wanted, T, eos)
    assert not stops or len(set(counts)) > 2, "the batch should end raggedly"
    proposer = DRAFTERS[drafter](texts(inputs, reference(mtp.model, inputs, max_new_tokens=20)))
    out = run(mtp, inputs, max_new_tokens=20, eos_token_id=eos, num_draft_tokens=n, drafter=proposer, slots=slots)
    assert out.sequences.tolist() == wanted.tolist()
    check_stats(out.stats, counts, drafter, n)


@pytest.mark.parametrize("drafter", ["mtp", "mtp+lookup", "tree"])
@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1)])
def test_prompts_of_one_token(lengths, drafter):
    """Nothing is cached when the first drafts are asked for."""
    inputs = prompts(*lengths)
    wanted = reference(target(), inputs, max_new_tokens=12)
    proposer = Branching(texts(inputs, wanted)) if drafter == "tree" else drafter
    out = run(mtp_of(), inputs, max_new_tokens=12, drafter=proposer)
    assert out.sequences.tolist() == wanted.tolist()
    assert out.stats.target_forwards == out.stats.verifications, "there is nothing to prefill"


@pytest.mark.parametrize("batch", BATCHES)
def test_drafting_off(batch):
    (inputs, slots, stops), mtp = BATCHES[batch], mtp_of()
    eos = ends(mtp.model, inputs, 20) if stops else None
    wanted = reference(mtp.model, inputs, max_new_tokens=20, eos_token_id=eos)
    out = run(mtp, inputs, max_new_tokens=20, eos_token_id=eos, num_draft_tokens=0, slots=slots)
    assert out.sequences.tolist() == wanted.tolist()
    check_stats(out.stats, new_tokens_of(wanted, inputs["input_ids"].shape[1], eos), "", 0)
    assert out.stats.draft_forwards == 0 and out.stats.tau == 1.0 and out.stats.accept_at == []


def test_a_shared_module_drafts_deeper_than_its_depth():
    inputs, mtp = prompts(9, 5), mtp_of(shared=True)
    out = run(mtp, inputs, max_new_tokens=30, num_draft_tokens=7)
    assert out.sequences.tolist() == reference(mtp.model, inputs, max_new_tokens=30).tolist()
    assert max(v.depth for record in out.stats.records for v in record) == 7
    assert max(map(max, out.stats.accepted)) > 3


def test_the_measured_cost_curve_is_lossless_too():
    inputs, mtp = prompts(9, 5), knowing_mtp(target())
    out = run(mtp, inputs, max_new_tokens=20, num_draft_tokens="auto")
    assert out.sequences.tolist() == reference(target(), inputs, max_new_tokens=20).tolist()
    curve = mtp.cost_curve()
    assert curve is mtp.cost_curve() and 0 < curve(1) <= curve(64) < 5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_and_its_reload(name, tmp_path):
    model = target(name)
    mtp = knowing_mtp(model, depth=2)
    inputs = prompts(11, 6, 14)
    wanted = reference(model, inputs, max_new_tokens=16)
    variety = sum(len(set(row[14:])) for row in wanted.tolist()) / 3
    assert variety > 6, "the text is too simple to show a mistake"
    out = run(mtp, inputs, max_new_tokens=16, drafter="mtp+lookup", slots=2)
    assert out.sequences.tolist() == wanted.tolist()
    sources = {s for record in out.stats.records for v in record for s in v.sources}
    assert {"mtp", "target"} <= sources
    assert any(v.drafted > v.depth for record in out.stats.records for v in record), "there should be trees"
    assert 0 < sum(map(sum, out.stats.accepted)) < sum(map(sum, out.stats.drafted))
    model.save_pretrained(tmp_path / "target")
    mtp.save_pretrained(tmp_path / "module")
    again = MTPModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "target"), tmp_path / "module")
    reloaded = run(again, inputs, max_new_tokens=16, drafter="mtp+lookup", slots=2)
    assert reloaded.sequences.tolist() == wanted.tolist()
    assert reloaded.stats.records == out.stats.records


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_tied_embeddings(name):
    """The output head is the embedding; plain tiny models, whose modules are mostly wrong."""
    model = tiny_model(name, tie_word_embeddings=True)
    inputs = prompts(11, 6)
    wanted = reference(model, inputs, max_new_tokens=16)
    for drafter in ("mtp+lookup", Branching(texts(inputs, wanted), (2, 1))):
        out = run(knowing_mtp(model), inputs, max_new_tokens=16, drafter=drafter)
        assert out.sequences.tolist() == wanted.tolist()


VARIANTS: dict[str, dict[str, Any]] = {
    "separate": {},
    "shared": {"shared_module": True},
    "shared, layers": {"shared_module": True, "hidden_layers": [0, 1]},
    "layers": {"hidden_layers": [1]},
    "eagle3": {"block": "eagle3", "draft_vocab_size": 90},
    "eagle3 shared layers": {"block": "eagle3", "shared_module": True, "hidden_layers": [0, 1]},
    "published": {"block": "eagle3", "shared_module": True, "hidden_layers": [0, 1], "fc_norm": False},
    "chain_raw": {"chain_raw": True},
    "pre_norm": {"hidden_source": "pre_norm"},
    "hidden_embedding": {"fusion_order": "hidden_embedding"},
    "shared chain_raw pre_norm": {"shared_module": True, "chain_raw": True, "hidden_source": "pre_norm"},
    "reduced vocabulary": {"draft_vocab_size": 40},
    "depth one": {"depth": 1},
    "depth five": {"depth": 5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_module(variant):
    inputs = prompts(11, 6)
    mtp = knowing_mtp(target(), **VARIANTS[variant])
    wanted = reference(target(), inputs, max_new_tokens=14)
    for drafter in ("mtp", "mtp+lookup"):
        out = run(mtp, inputs, max_new_tokens=14, drafter=drafter)
        assert out.sequences.tolist() == wanted.tolist()
        assert sum(map(sum, out.stats.accepted)) > 0


def test_a_reduced_vocabulary_drafts_its_own_tokens_only():
    inputs = prompts(11, 6)
    wanted = reference(target(), inputs, max_new_tokens=20)
    mtp = knowing_mtp(target(), draft_vocab_size=12)
    often = torch.bincount(wanted[:, 11:].reshape(-1), minlength=VOCAB).topk(12).indices.sort().values
    for ids in (torch.arange(50, 62), often):
        mtp.module.set_draft_vocabulary(ids)
        spy = Spy(mtp.drafter())
        out = run(mtp, inputs, max_new_tokens=20, drafter=spy)
        assert out.sequences.tolist() == wanted.tolist()
        drafted = {token for _, _, draft in spy.drafted for token in draft.tokens}
        assert drafted and drafted <= set(ids.tolist())
    assert sum(map(sum, out.stats.accepted)) > 5, "frequent tokens should be accepted: is the map the one that was set?"


# -- ends inside a draft -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(1, 10))
@pytest.mark.parametrize("kind", [Oracle, Branching])
def test_an_end_token_inside_a_draft(kind, place):
    """Everything is accepted, so that the end falls on each place of a draft, and on the target's own token."""
    inputs = prompts(9, 6)
    whole = reference(target(), inputs, max_new_tokens=20)
    eos = [int(whole[0, 9 + place - 1]), int(whole[1, 9 + 12])]
    wanted = reference(target(), inputs, max_new_tokens=20, eos_token_id=eos)
    out = run(
        mtp_of(), inputs, max_new_tokens=20, eos_token_id=eos, num_draft_tokens=3, drafter=kind(texts(inputs, whole))
    )
    assert out.sequences.tolist() == wanted.tolist()
    counts = new_tokens_of(wanted, 9, eos)
    assert [sum(e) for e in out.stats.emitted] == counts
    for accepted, emitted, count in zip(out.stats.accepted, out.stats.emitted, counts, strict=True):
        assert emitted == [4] * (count // 4) + [count % 4] * (count % 4 > 0)
        assert accepted == [min(e, 3) for e in emitted], "accepted drafts are counted up to the cut"


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("drafter", ["oracle", "tree", "mtp"])
def test_a_length_limit_inside_a_draft(drafter, new):
    inputs = prompts(9, 6)
    truth = texts(inputs, reference(target(), inputs, max_new_tokens=20))
    proposer = {"oracle": Oracle(truth), "tree": Branching(truth), "mtp": "mtp"}[drafter]
    for limit in ({"max_new_tokens": new}, {"max_length": 9 + new}):
        out = run(mtp_of(), inputs, num_draft_tokens=3, drafter=proposer, **limit)
        assert out.sequences.tolist() == reference(target(), inputs, **limit).tolist()
        assert out.sequences.shape[1] == 9 + new


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token. "abcdef" must be one: transformers' StopStringCriteria asks for it."""
    words = ["<pad>", "<s>", "</s>", "abcdef", *(f"{chr(97 + i % 26)}{i}" for i in range(4, VOCAB))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize("words", [1, 2, 3])
@pytest.mark.parametrize("drafter", ["oracle", "tree", "mtp+lookup"])
def test_a_stop_string_inside_a_draft(drafter, words):
    inputs = prompts(9, 6)
    whole = reference(target(), inputs, max_new_tokens=20)
    stops = [tokenizer().decode(whole[b, 9 + 5 + b : 9 + 5 + b + words]) for b in (0, 1)]
    # transformers pads what a stop string ended only where there is an end token too
    settings = {"max_new_tokens": 20, "stop_strings": stops, "eos_token_id": 2}
    wanted = target().generate(**inputs, do_sample=False, pad_token_id=0, tokenizer=tokenizer(), **settings)
    assert 9 + 5 < wanted.shape[1] < 9 + 20
    truth = texts(inputs, whole)
    proposer = {"oracle": Oracle(truth), "tree": Branching(truth)}.get(drafter, drafter)
    out = run(mtp_of(), inputs, num_draft_tokens=3, drafter=proposer, tokenizer=tokenizer(), **settings)
    assert out.sequences.tolist() == wanted.tolist()


def test_stop_strings_of_a_generation_config():
    inputs = prompts(9)
    whole = reference(target(), inputs, max_new_tokens=20)
    config = foretell_config(stop_strings=[tokenizer().decode(whole[0, 15:16])], max_new_tokens=20)
    wanted = target().generate(**inputs, generation_config=config, tokenizer=tokenizer())
    assert wanted.shape[1] <= 16
    got = mtp_of().generate(**inputs, generation_config=config, tokenizer=tokenizer())
    assert got.tolist() == wanted.tolist()
    assert config.stop_strings, "the caller's config is left alone"


def foretell_config(**settings: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(do_sample=False, pad_token_id=0, **settings)


# -- logits processors -------------------------------------------------------------------------------------------------

PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 9},
    "suppress_tokens": {"suppress_tokens": list(range(3, 50))},
    "bad_words_ids": {"bad_words_ids": [[n] for n in range(60, 90)] + [[5, 6]]},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "exponential_decay": {"exponential_decay_length_penalty": (3, 1.9)},
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 7},
}


@pytest.mark.parametrize("drafter", ["mtp+lookup", "oracle", "tree"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_logits_processors_see_every_row_as_the_end_of_its_own_text(name, drafter):
    inputs = prompts(11, 6, seed=7)
    whole = reference(target(), inputs, max_new_tokens=18)
    settings = {"max_new_tokens": 18, "eos_token_id": int(whole[0, 11 + 5]), **PROCESSORS[name]}
    wanted = reference(target(), inputs, **settings)
    plain = reference(target(), inputs, max_new_tokens=18, eos_token_id=int(whole[0, 11 + 5]))
    assert wanted.tolist() != plain.tolist(), "the processor should change the text"
    truth = texts(inputs, reference(target(), inputs, **settings))
    proposer = {"oracle": Oracle(truth, (3, 1, 2)), "tree": Branching(truth, (3, 2))}.get(drafter, drafter)
    out = run(mtp_of(), inputs, num_draft_tokens=3, drafter=proposer, **settings)
    assert out.sequences.tolist() == wanted.tolist()


# -- caches, slots, chunks ---------------------------------------------------------------------------------------------


def test_caches_are_reused_across_calls():
    """Small, large, small again, another drafter between: nothing of an earlier call is seen by a later one."""
    mtp = knowing_mtp(target())
    caches = []
    for lengths, new, drafter in [
        ((9, 4), 12, "mtp"),
        ((30, 2, 17, 8), 70, "mtp+lookup"),
        ((5,), 20, "mtp"),
        ((9, 4), 12, "lookup"),
        ((6, 11, 3), 20, "mtp"),
    ]:
        inputs = prompts(*lengths, seed=new)
        out = run(mtp, inputs, max_new_tokens=new, drafter=drafter)
        assert out.sequences.tolist() == reference(target(), inputs, max_new_tokens=new).tolist()
        with mtp.workspace() as space:
            caches.append(space.cache)
    assert all(cache is caches[0] for cache in caches)


@pytest.mark.parametrize("drafter", ["mtp", "mtp+lookup", "tree"])
def test_a_long_prompt_joins_a_long_text(drafter):
    """The newcomer brings many rows that no module has read, while its neighbour's cache is nearly full."""
    inputs, eos = prompts(62, 61, 60, 60, seed=4), 49
    whole = reference(target(), inputs, max_new_tokens=58)[:, 62:].tolist()
    assert [eos in text[:33] for text in whole] == [False] * 4 and eos in whole[1] and eos not in whole[0]
    wanted = reference(target(), inputs, max_new_tokens=58, eos_token_id=eos)
    truth = texts(inputs, reference(target(), inputs, max_new_tokens=58))
    proposer = Branching(truth) if drafter == "tree" else drafter
    out = run(knowing_mtp(target()), inputs, max_new_tokens=58, eos_token_id=eos, drafter=proposer, slots=2)
    assert out.sequences.tolist() == wanted.tolist()


def test_wide_trees_fit_up_to_the_last_token():
    """A drafter may be broader than two chains; near the length limit its rows must still find a place."""

    class Bush(Oracle):
        def _draft(self, sequence, length):
            draft = super()._draft(sequence, length)
            for token in range(40):
                if token != draft.tokens[0]:
                    draft.tokens.append(token)
                    draft.parents.append(-1)
                    draft.confidence.append(0.1)
                    draft.sources.append(self.name)
            return draft

    inputs = prompts(9, 6)
    wanted = reference(target(), inputs, max_new_tokens=54)
    truth = texts(inputs, wanted)
    out = run(knowing_mtp(target()), inputs, max_new_tokens=54, drafter=Bush(truth, (2, 1)), num_draft_tokens=2)
    assert out.sequences.tolist() == wanted.tolist()
    assert sum(map(sum, out.stats.accepted)) > 40


def test_slots_limit_what_is_decoded_at_once():
    """Also when the cache has room for more from an earlier call."""
    mtp, inputs = knowing_mtp(target()), prompts(7, 5, 12, 4, 9)
    for slots in (64, 2, 1):
        spy = Scripted()
        out = run(mtp, inputs, max_new_tokens=6, drafter=spy, slots=slots)
        assert out.sequences.tolist() == reference(target(), inputs, max_new_tokens=6).tolist()
        assert max(map(len, spy.asked)) == min(slots, 5)


@pytest.mark.parametrize("drafter", ["mtp", "oracle", "tree"])
@pytest.mark.parametrize(("rows", "tokens"), [(5, 10), (1, 1), (512, 20)])
def test_prompts_are_read_in_exact_chunks(drafter, rows, tokens, monkeypatch):
    inputs = prompts(23, 3, 12, 1)
    wanted = reference(target("mistral"), inputs, max_new_tokens=12)
    truth = texts(inputs, wanted)
    mtp = knowing_mtp(target("mistral"))
    proposers = {
        "mtp": lambda: "mtp",
        "oracle": lambda: Oracle(truth, (2, 0)),
        "tree": lambda: Branching(truth, (2, 0)),
    }
    whole = run(mtp, inputs, max_new_tokens=12, drafter=proposers[drafter]())
    monkeypatch.setattr(loop, "PREFILL_ROWS", rows)
    monkeypatch.setattr(loop, "PREFILL_TOKENS", tokens)
    out = run(mtp, inputs, max_new_tokens=12, drafter=proposers[drafter]())
    assert out.sequences.tolist() == whole.sequences.tolist() == wanted.tolist()
    assert out.stats.records == whole.stats.records
    prefills = {(5, 10): 5, (1, 1): 22 + 2 + 11, (512, 20): 4}[(rows, tokens)]
    assert out.stats.target_forwards - out.stats.verifications == prefills
    assert whole.stats.target_forwards - whole.stats.verifications == 1


def test_new_weights_are_seen():
    """Weights of the target or the module change between calls: packed copies and drafters must follow."""
    model = leaning_model()
    mtp, inputs = knowing_mtp(model, noise=0.3), prompts(11, 6, 9, 7, 8)  # five rows a step go through packed weights
    before = run(mtp, inputs, max_new_tokens=20).sequences.tolist()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0).clone())
        model.model.layers[0].mlp.down_proj.weight.mul_(2.0)
    assert check_chain(mtp, inputs, 20)[0] != before
    with torch.no_grad():
        mtp.module.blocks[0].eh_proj.weight.add_(0.02)
    check_chain(mtp, inputs, 20)


def test_another_dtype_between_calls():
    mtp, inputs = knowing_mtp(leaning_model()), prompts(9, 4)
    run(mtp, inputs, max_new_tokens=8)
    mtp.to(torch.float64)
    out = run(mtp, inputs, max_new_tokens=20)
    assert out.sequences.tolist() == mtp.model.generate(**inputs, max_new_tokens=20, do_sample=False).tolist()


# -- what was trained is what drafts -----------------------------------------------------------------------------------


def check_chain(
    mtp: MTPModel, inputs: dict[str, Tensor], new: int, beside: Any = None, **settings: Any
) -> tuple[list, dict[int, int]]:
    """Decode, and hold each draft against draft_logits of the final text, teacher-forced, where both read the same
    tokens: depth k wherever the k - 1 drafts before it stayed. Returns the tokens and the comparisons by depth.

    beside: another drafter, in one tree with the module.
    """
    spy = Spy(mtp.drafter())
    drafter = spy if beside is None else [beside, spy]
    out = run(mtp, inputs, max_new_tokens=new, drafter=drafter, **settings)
    wanted = mtp.model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=0)
    assert out.sequences.tolist() == wanted.tolist()
    compared: dict[int, int] = {}
    probs = [mtp.draft_logits(torch.tensor([t]))[0].softmax(-1) for t in texts(inputs, out.sequences)]  # [T, K, V] each
    shifted = 0
    for index, cached, draft in spy.drafted:
        text = texts(inputs, out.sequences)[index]
        for k, token in enumerate(draft.tokens, start=1):
            row_V = probs[index][cached - 1, k - 1]
            # confidences, not only choices: a module that read one stale row is off by far more than rounding
            assert draft.confidence[k - 1] == pytest.approx(float(row_V[token]), abs=2e-4)
            assert float(row_V.max() - row_V[token]) < 2e-4
            shifted += abs(float(probs[index][cached - 2, k - 1].max()) - draft.confidence[k - 1]) < 2e-4
            compared[k] = compared.get(k, 0) + 1
            if cached + k >= len(text) or text[cached + k] != token:
                break
    assert shifted < sum(compared.values()) / 4, "the row beside should not fit as well: the comparison sees nothing"
    return out.sequences.tolist(), compared


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_was_trained_is_what_drafts(name):
    _, compared = check_chain(knowing_mtp(target(name), noise=0.3), prompts(11, 6, 14), 16, slots=2)
    assert compared[1] > 15 and compared[2] > 3 and compared[3] > 0, compared


@pytest.mark.parametrize(
    ("variant", "name"), [*((variant, "llama") for variant in VARIANTS), ("shared chain_raw pre_norm", "gemma3_text")]
)
def test_what_was_trained_is_what_drafts_in_every_variant(variant, name):
    settings = VARIANTS[variant]
    _, compared = check_chain(knowing_mtp(target(name), noise=0.2, **settings), prompts(11, 6, 14), 16, slots=2)
    assert len(compared) >= min(settings.get("depth", 3), 3), compared


def test_what_was_trained_is_what_drafts_from_a_tree():
    """Accepted rows stand here and there in the tree: the module must be given their states and no others."""
    inputs = prompts(11, 6, 14)
    truth = texts(inputs, reference(target(), inputs, max_new_tokens=24))
    mtp = knowing_mtp(target(), noise=0.2)
    _, compared = check_chain(mtp, inputs, 24, beside=Branching(truth, (2, 0, 3)), slots=2)
    assert compared[1] > 15 and compared[2] > 3, compared


def test_recorded_states_are_those_of_the_text():
    """What training reads instead of a second forward: the states of every cached position, whatever was drafted."""
    inputs, mtp = prompts(11, 6, 14, 1), mtp_of()
    wanted = reference(target(), inputs, max_new_tokens=16)
    texts_of = texts(inputs, wanted)
    recorder = HiddenRecorder(lambda rows: rows.post_norm_BRD)
    decoder = loop.Decoder(mtp.target, Branching(texts_of, (2, 0, 1)))
    decoder.watchers.append(recorder)
    states: dict[int, Tensor] = {}
    sequences = [SequenceState(text[: len(text) - 16], len(text) - 16, b) for b, text in enumerate(texts_of)]
    decoder.run(
        sequences,
        RowScores(None, do_sample=False),
        lambda s: len(s.new_tokens) == 16,
        max_tokens=40,
        num_draft_tokens=3,
        slots=2,
        leave=lambda s: states.__setitem__(s.index, recorder.states(s)),
    )
    for sequence in sequences:
        assert sequence.tokens == texts_of[sequence.index]
        ids = torch.tensor([sequence.tokens])
        with torch.no_grad():
            whole = mtp.target.forward_text(ids, torch.arange(ids.shape[1])[None]).post_norm_BRD[0]
        kept = states[sequence.index]
        assert sequence.cached == len(kept) >= ids.shape[1] - 4, "all but what the last round emitted"
        torch.testing.assert_close(kept, whole[: len(kept)], atol=1e-4, rtol=1e-4)


def test_drafts_follow_when_the_asked_length_changes():
    """Depths that were not asked for catch up later, over rows of several rounds."""

    class Moody(Composed):
        def __init__(self, inner: Any) -> None:
            super().__init__([inner])
            self.inner, self.round = inner, 0

        def draft(self, sequences: Any, lengths: list[int], worth: Any = None) -> Any:
            self.round += 1
            return self.inner.draft(sequences, [(self.round * 2 + s.index) % 4 for s in sequences], worth)

    mtp = knowing_mtp(target(), noise=0.2)
    inner, inputs = mtp.drafter(), prompts(11, 6, 14)
    mtp.drafter = lambda sample=False: Moody(inner)
    _, compared = check_chain(mtp, inputs, 30, slots=2)
    assert len(compared) == 3


# -- accounting --------------------------------------------------------------------------------------------------------


class Counted:
    """Forwards that really happened."""

    def __init__(self) -> None:
        self.target = self.rows = self.original = self.blocks = 0


@contextmanager
def counting(mtp: MTPModel) -> Iterator[Counted]:
    """Hooks on the decoder that decodes, on the caller's own model, and on the module's blocks."""
    counted = Counted()

    def of_target(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        counted.target += 1
        counted.rows += kwargs["input_ids"].numel()

    def of(name: str) -> Callable[..., None]:
        return lambda *_: setattr(counted, name, getattr(counted, name) + 1)

    # the copy runs the hooks of the caller's model; its own forward would not get our cache
    hooks = [mtp.model.get_decoder().register_forward_pre_hook(of_target, with_kwargs=True)]
    plain = {"use_cache": False}.items()
    hooks += [
        mtp.model.get_decoder().register_forward_pre_hook(
            lambda _module, _args, kwargs: of("original")() if plain <= kwargs.items() else None, with_kwargs=True
        )
    ]
    view = mtp.drafter()._view
    hooks += [block.register_forward_pre_hook(of("blocks")) for block in view.blocks]
    counted.__init__()
    yield counted
    for hook in hooks:
        hook.remove()


def test_accounting_by_hand():
    inputs = prompts(5)
    truth = texts(inputs, reference(target(), inputs, max_new_tokens=40))
    oracle = Oracle(truth, (2, 0, 3, 1))
    with counting(mtp_of()) as counted:
        out = run(mtp_of(), inputs, max_new_tokens=10, num_draft_tokens=3, drafter=oracle)
    stats = out.stats
    assert stats.drafted == [[3, 3, 3, 3]]
    assert stats.accepted == [[2, 0, 3, 1]]
    assert stats.emitted == [[3, 1, 4, 2]]
    assert stats.tau == 10 / 4 and stats.mean_accepted == 6 / 4
    assert stats.accept_at == [3 / 4, 2 / 4, 1 / 4]
    assert stats.accept_given == [3 / 4, 2 / 3, 1 / 2]
    assert [v.sources for v in stats.records[0]] == [
        ["oracle", "oracle", "target"],
        ["target"],
        ["oracle", "oracle", "oracle", "target"],
        ["oracle", "target"],
    ]
    # the prompt but its last token, then four verifications of one row and three drafts
    assert (stats.target_forwards, stats.verifications, stats.target_rows) == (1 + 4, 4, 4 + 4 * 4)
    assert (counted.target, counted.rows, counted.original, counted.blocks) == (1 + 4, 4 + 4 * 4, 0, 0)
    assert stats.draft_forwards == 4 == oracle.calls
    summary = stats.summary()
    assert (summary["tokens"], summary["verifications"], summary["tau"]) == (10, 4, 2.5)


def test_accounting_at_the_cut():
    """Three drafts accepted a round, the end token is the sixth new one: the cut counts two of the second round's."""
    inputs = prompts(5)
    whole = reference(target(), inputs, max_new_tokens=40)
    eos = int(whole[0, 5 + 5])
    assert eos not in whole[0, 5 : 5 + 5]
    out = run(
        mtp_of(), inputs, max_new_tokens=20, eos_token_id=eos, num_draft_tokens=3, drafter=Oracle(texts(inputs, whole))
    )
    stats = out.stats
    assert (stats.drafted, stats.accepted, stats.emitted) == ([[3, 3]], [[3, 2]], [[4, 2]])
    assert stats.tau == 3.0 and stats.mean_accepted == 2.5
    assert stats.accept_at == [1.0, 1.0, 0.5] and stats.accept_given == [1.0, 1.0, 0.5]


def test_accounting_of_a_tree():
    """Six rows of a tree that is three deep: drafted counts all branches, depth the longest."""
    inputs = prompts(5)
    truth = texts(inputs, reference(target(), inputs, max_new_tokens=40))
    out = run(mtp_of(), inputs, max_new_tokens=5, num_draft_tokens=3, drafter=Branching(truth, (2, 1)))
    assert [(v.drafted, v.depth, v.accepted, v.emitted) for v in out.stats.records[0]] == [(8, 3, 2, 3), (8, 3, 1, 2)]
    assert out.stats.target_rows == 4 + 2 * 9
    assert out.stats.accept_at == [1.0, 0.5, 0.0]


def test_tau_of_rounds_with_drafts():
    """Rounds that drafted nothing count in tau, not in what the drafter is worth."""
    records = [[Verification(2, 2, 2, 3, []), Verification(0, 0, 0, 1, [])], [Verification(1, 1, 0, 1, [])]]
    stats = GenerationStats("lossless", True, records)
    assert stats.tau == 5 / 3 and stats.tau_drafted == 4 / 2 == stats.summary()["tau_drafted"]
    assert GenerationStats("lossless", True, [[Verification(0, 0, 0, 1, [])]]).tau_drafted == 0.0


def test_accept_given_stops_where_no_draft_got_that_far():
    inputs = prompts(5)
    truth = texts(inputs, reference(target(), inputs, max_new_tokens=40))
    stats = run(mtp_of(), inputs, max_new_tokens=6, num_draft_tokens=3, drafter=Oracle(truth, (1, 0))).stats
    assert stats.accept_at == [2 / 4, 0.0, 0.0] and stats.accept_given == [2 / 4, 0.0]


@pytest.mark.parametrize("accepts", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [1, 3])
def test_no_hidden_extra_pass(n, accepts):
    inputs, new = prompts(7, 7), 13
    truth = texts(inputs, reference(target(), inputs, max_new_tokens=40))
    with counting(mtp_of()) as counted:
        stats = run(mtp_of(), inputs, max_new_tokens=new, num_draft_tokens=n, drafter=Oracle(truth, (accepts,))).stats
    rounds = math.ceil(new / (1 + min(accepts, n)))
    assert stats.verifications == rounds and stats.target_forwards == counted.target == 1 + rounds
    assert stats.target_rows == counted.rows == 2 * 6 + rounds * 2 * (1 + n)
    assert counted.original == 0


def test_rows_of_a_ragged_batch():
    """One sequence accepts all, the other nothing: the first leaves, and the second goes on alone."""
    inputs = prompts(6, 4)
    truth = texts(inputs, reference(target(), inputs, max_new_tokens=40))
    oracle = Oracle(truth)
    oracle.chain = functools.partial(one_knows, oracle)
    with counting(mtp_of()) as counted:
        stats = run(mtp_of(), inputs, max_new_tokens=8, num_draft_tokens=3, drafter=oracle).stats
    assert stats.emitted == [[4, 4], [1] * 8]
    assert stats.target_rows == counted.rows == 2 * 5 + 2 * (2 * 4) + 6 * 4
    assert stats.target_forwards == counted.target == 1 + 8


def one_knows(oracle: Oracle, sequence: SequenceState, length: int) -> list[int]:
    truth, n = oracle.truth[sequence.index], len(sequence.tokens)
    return [(truth[n + i] + sequence.index) % VOCAB for i in range(length)]


@pytest.mark.parametrize("shared", [False, True])
def test_forwards_of_the_module(shared):
    """One forward of one block for each depth of each round, none at all with drafting off."""
    inputs, mtp = prompts(9, 5), mtp_of(shared)
    for n, drafter in ((0, "mtp"), (1, "mtp"), (3, "mtp"), (3, "mtp+lookup")):
        with counting(mtp) as counted:
            stats = run(mtp, inputs, max_new_tokens=12, num_draft_tokens=n, drafter=drafter).stats
        assert counted.blocks == stats.draft_forwards == n * stats.verifications
        assert counted.target == stats.target_forwards == 1 + stats.verifications
        assert counted.rows == stats.target_rows and counted.original == 0


# -- through transformers' own door ------------------------------------------------------------------------------------


class Recorder:
    """A streamer that keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[list[int]] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        assert not self.ends
        self.told.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("door", ["mtp", "model"])
def test_streamers_hear_every_token_once_and_in_order(door):
    inputs, mtp = prompts(9), mtp_of()
    whole = reference(target(), inputs, max_new_tokens=16)
    theirs, ours = Recorder(), Recorder()
    settings = {"max_new_tokens": 16, "eos_token_id": int(whole[0, 9 + 13]), "do_sample": False}
    target().generate(**inputs, streamer=theirs, **settings)
    if door == "mtp":
        out = mtp.generate(**inputs, streamer=ours, **settings)
    else:
        out = mtp.model.generate(**inputs, streamer=ours, custom_generate=foretell.custom_generate(mtp), **settings)
    assert ours.told == theirs.told and ours.ends == theirs.ends == 1
    assert [token for told in ours.told for token in told] == out[0].tolist() and len(out[0]) > 12
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True)
    mtp.generate(**inputs, streamer=streamer, **settings)
    assert "".join(streamer).split() == tokenizer().decode(out[0, 9:]).split()


def test_custom_generate_is_the_same_decoder():
    inputs, mtp = prompts(9, 4), mtp_of()
    wanted = reference(target(), inputs, max_new_tokens=16)
    for settings in ({}, {"num_draft_tokens": 0}, {"num_draft_tokens": 2, "drafter": "mtp+lookup", "slots": 1}):
        given = foretell.custom_generate(mtp, **settings)
        out = mtp.model.generate(
            **inputs, max_new_tokens=16, do_sample=False, custom_generate=given, return_dict_in_generate=True
        )
        assert out.sequences.tolist() == wanted.tolist()
        assert out.stats.records == run(mtp, inputs, max_new_tokens=16, **settings).stats.records
    plain = mtp.model.generate(**inputs, max_new_tokens=16, custom_generate=foretell.custom_generate(mtp))
    assert isinstance(plain, Tensor) and plain.dtype == torch.long


def test_generate_leaves_the_training_mode_alone():
    mtp = knowing_mtp(leaning_model(attention_dropout=0.5))
    inputs = prompts(9)
    wanted = mtp.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    for training in (True, False):
        mtp.train(training)
        assert mtp.generate(**inputs, max_new_tokens=12, do_sample=False).tolist() == wanted.tolist()
        assert mtp.training == mtp.model.training == mtp.module.training == training


# -- lossy policies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["mtp", "mtp+lookup", "tree"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_typical_is_lossy_says_so_and_always_goes_on(drafter, do_sample):
    inputs = prompts(9, 5)
    truth = texts(inputs, reference(target(), inputs, max_new_tokens=20))
    proposer = AnyBranching(truth) if drafter == "tree" else drafter
    torch.manual_seed(0)
    out = mtp_of().generate(
        **inputs,
        max_new_tokens=20,
        do_sample=do_sample,
        policy="typical",
        drafter=proposer,
        return_dict_in_generate=True,
    )
    assert not out.stats.lossless and out.stats.policy == out.stats.summary()["policy"] == "typical"
    assert out.sequences.shape[1] == 9 + 20 and [sum(e) for e in out.stats.emitted] == [20, 20]
    assert min(map(min, out.stats.emitted)) >= 1


class AnyBranching(Branching):
    """Under a lossy policy the text leaves the target's own, so the oracle must not insist on it."""

    def chain(self, sequence: SequenceState, length: int) -> list[int]:
        return [(sequence.tokens[-1] + 7 * i) % VOCAB for i in range(1, length + 1)]
