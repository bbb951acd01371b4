"""What a caller may say to generate, through either door: it is done as transformers does it, or refused by name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from drafters import knowing_mtp, leaning_model
from test_decode import Recorder, tokenizer
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
)
from transformers.generation import logits_process as lp

import foretell
from foretell.cli.generate import GenerateSettings
from foretell.config import ConfigError, parse
from foretell.decoding.generate import refuse_unsupported
from foretell.methods.heads import HeadsConfig
from foretell.mtp import MTPModel, get_mtp_model

IDS = torch.arange(10, 28).view(2, 9)


@functools.cache
def mtp() -> MTPModel:
    return knowing_mtp(leaning_model())


def through(door: str, ids: torch.Tensor = IDS, **settings: Any) -> Any:
    """generate by MTPModel's own door or by transformers'."""
    settings = {"max_new_tokens": 12, "do_sample": False, **settings}
    if door == "mtp":
        return mtp().generate(ids, **settings)
    return mtp().model.generate(ids, custom_generate=foretell.custom_generate(mtp()), **settings)


@pytest.fixture(params=["mtp", "model"])
def door(request: Any) -> str:
    return request.param


# -- what transformers keeps to itself ---------------------------------------------------------------------------------


def test_stop_strings_and_their_tokenizer_come_through(door):
    whole = mtp().model.generate(IDS, max_new_tokens=12, do_sample=False)
    stops = [tokenizer().decode(whole[b, 9 + 4 + b : 9 + 6 + b]) for b in (0, 1)]
    settings = {"stop_strings": stops, "tokenizer": tokenizer(), "eos_token_id": 2, "pad_token_id": 0}
    wanted = mtp().model.generate(IDS, max_new_tokens=12, do_sample=False, **settings)
    assert wanted.shape[1] < 9 + 12
    assert through(door, **settings).tolist() == wanted.tolist()


def test_stop_strings_without_a_tokenizer_are_refused(door):
    with pytest.raises(ValueError, match="tokenizer"):
        through(door, stop_strings=["a"])


def test_no_stop_strings_win_over_the_models_own(door, monkeypatch):
    monkeypatch.setattr(mtp().model.generation_config, "stop_strings", ["zzz"])
    try:
        wanted: Any = mtp().model.generate(IDS, max_new_tokens=12, do_sample=False, stop_strings=None).tolist()
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)[:40]):
            through(door, stop_strings=None)
    else:
        assert through(door, stop_strings=None).tolist() == wanted


@pytest.mark.parametrize("argument", [{"synced_gpus": True}, {"assistant_model": torch.nn.Linear(1, 1)}])
def test_what_ranks_or_assistants_need_is_refused_by_name(door, argument):
    with pytest.raises(ValueError, match=f"cannot honour: {next(iter(argument))}"):
        through(door, **argument)


def test_a_streamer_hears_the_prompt_once(door):
    theirs, ours = Recorder(), Recorder()
    mtp().model.generate(IDS[:1], max_new_tokens=12, do_sample=False, streamer=theirs)
    through(door, IDS[:1], streamer=ours)
    assert ours.told == theirs.told and ours.ends == 1


# -- our own arguments -------------------------------------------------------------------------------------------------


def test_own_arguments_in_the_call_are_honoured(door):
    out = through(door, num_draft_tokens=1, return_dict_in_generate=True)
    assert {v.depth for record in out.stats.records for v in record} == {1}
    with pytest.raises(ValueError, match="num_draft_tokens: got -1"):
        through(door, num_draft_tokens=-1)
    with pytest.raises(ValueError, match="num_draft_token"):
        through(door, num_draft_token=1)


def test_another_models_generate_is_refused():
    other = leaning_model()
    with pytest.raises(ValueError, match="custom_generate: got another model"):
        other.generate(IDS, max_new_tokens=4, custom_generate=foretell.custom_generate(mtp()))


def test_a_mask_of_another_width_is_refused(door):
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(2, 7\)|attention_mask"):
        through(door, attention_mask=torch.ones(2, 7, dtype=torch.long).index_fill(1, torch.tensor([0]), 0))
    for shape in ((2, 7), (2, 12), (3, 9)):
        with pytest.raises(ValueError, match="attention_mask.*wanted the same"):
            through(door, attention_mask=torch.ones(shape))
    with pytest.raises(ValueError, match=r"position_ids.*\(3, 2, 9\)"):
        through(door, position_ids=torch.arange(9).expand(3, 2, -1))


@pytest.mark.parametrize("flag", ["--temperature 0.5", "--top-k 3", "--top-p 0.9", "--min-p 0.1"])
def test_the_command_line_ignores_no_sampling_flag(flag, capsys):
    name = flag.split()[0][2:].replace("-", "_")
    with pytest.raises(ConfigError, match=f"{name}: got a value without --do-sample"):
        parse(GenerateSettings, ["model", "--prompt", "a", *flag.split()], prog="foretell generate")
    parse(GenerateSettings, ["model", "--prompt", "a", "--do-sample", *flag.split()], prog="foretell generate")


# -- processors and criteria -------------------------------------------------------------------------------------------


class Brackets(LogitsProcessor):
    """A grammar with a state: tokens 10-39 open, 40-69 close, never below 0 nor above 3 deep."""

    def __init__(self) -> None:
        self.depth: int | None = None

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.depth = 0 if self.depth is None else self.depth + (1 if 10 <= int(ids[0, -1]) < 40 else -1)
        keep = torch.zeros(97, dtype=torch.bool)
        keep[10:40], keep[40:70] = self.depth < 3, self.depth > 0
        return scores.masked_fill(~keep, -torch.inf)


class RowBias(LogitsProcessor):
    """Another bias for each row of the batch."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row in range(len(scores)):
            scores[row, 40 + row] += 5.0
        return scores


class Pushed(lp.TemperatureLogitsWarper):
    """A warper's subclass that reads the text."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter_add(1, (ids[:, -1:] * 7 + 3) % 97, torch.full_like(scores[:, :1], 40.0))


class LongestRow(StoppingCriteria):
    """Looks at the whole batch: all stop together, as soon as any row says a small token."""

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(ids),), bool((ids[:, 9 + 3 :] < 30).any()))


UNKNOWN: dict[str, dict[str, Any]] = {
    "grammar": {"logits_processor": [Brackets]},
    "row bias": {"logits_processor": [RowBias]},
    "subclass": {"logits_processor": [lambda: Pushed(0.7)]},
    "synthid": {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[3, 5, 7])},
    "encoder penalty": {"encoder_repetition_penalty": 3.0},
    "encoder n-grams": {"encoder_no_repeat_ngram_size": 1},
    "prefix function": {"prefix_allowed_tokens_fn": lambda row, ids: [5 + row, 6 + int(ids[-1]) % 5, 30]},
    "guidance": {"guidance_scale": 1.7},
    "whole batch": {"stopping_criteria": [LongestRow]},
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_may_know_more_than_one_text_runs_in_order_or_is_refused(case, door):
    """Without drafts it is called as transformers calls it; beside drafts it is refused by name."""

    def settings() -> dict[str, Any]:
        made = {}
        for name, value in UNKNOWN[case].items():
            made[name] = [make() for make in value] if isinstance(value, list) else value
        if isinstance(made.get("logits_processor"), list):
            made["logits_processor"] = LogitsProcessorList(made["logits_processor"])
        return made

    ids = IDS[:1] if case == "grammar" else IDS
    wanted = mtp().model.generate(ids, max_new_tokens=12, do_sample=False, **settings())
    assert wanted.tolist() != mtp().model.generate(ids, max_new_tokens=12, do_sample=False).tolist()
    out = through(door, ids, num_draft_tokens=0, return_dict_in_generate=True, **settings())
    assert out.sequences.tolist() == wanted.tolist()
    assert out.stats.lossless and [sum(e) for e in out.stats.emitted] == [wanted.shape[1] - 9] * len(ids)
    for n in (1, 3, "auto"):
        with pytest.raises(ValueError, match="cannot honour: .* beside drafts"):
            through(door, ids, num_draft_tokens=n, **settings())


def test_a_seed_holds_for_processors_in_order():
    def text(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        settings = {"do_sample": True, "logits_processor": LogitsProcessorList([RowBias()]), "num_draft_tokens": 0}
        return through("mtp", generator=generator, **settings).tolist()

    first = text(4)
    assert text(4) == first != text(5)


def test_who_says_that_it_knows_one_text_only_is_believed():
    """Marked processors and criteria run beside drafts; functions can be marked too."""

    def shifts(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter_add(1, (ids[:, -1:] * 7 + 3) % 97, torch.full_like(scores[:, :1], 40.0))

    def small(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return ids[:, -1] < 12

    shifts.of_one_text = small.of_one_text = True  # type: ignore[attr-defined]
    marked = Pushed(0.7)
    marked.of_one_text = True  # type: ignore[attr-defined]
    for processor in (shifts, marked):
        settings = {"logits_processor": LogitsProcessorList([processor]), "stopping_criteria": [small]}
        settings |= {"eos_token_id": 2, "pad_token_id": 0}
        wanted = mtp().model.generate(IDS, max_new_tokens=30, do_sample=False, **settings)
        for n in (0, 3):
            out = through("mtp", max_new_tokens=30, num_draft_tokens=n, drafter="mtp+lookup", **settings)
            assert out.tolist() == wanted.tolist()


class Nested(Brackets):
    """A grammar that says that it can be rolled back, and does not know what to do with a token that it forbids."""

    rolls_back = True
    calls = 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        Nested.calls += 1
        last = int(ids[0, -1])
        assert self.depth is None or (self.depth > 0 if 40 <= last < 70 else self.depth < 3 and 10 <= last < 40), last
        return super().__call__(ids, scores)


@pytest.mark.parametrize("drafts", [0, 1, 3, "auto"])
@pytest.mark.parametrize("drafter", ["mtp", "mtp+lookup"])
def test_a_grammar_that_can_be_rolled_back_runs_beside_drafts(drafts, drafter, door):
    for sample in (False, True):
        settings = {"max_new_tokens": 40, "do_sample": sample, "top_k": 5, "num_beams": 1}
        wanted = mtp().model.generate(IDS[:1], logits_processor=LogitsProcessorList([Brackets()]), **settings)
        nested, Nested.calls = Nested(), 0
        how = {"num_draft_tokens": drafts, "drafter": drafter, "return_dict_in_generate": True}
        out = through(door, IDS[:1], logits_processor=LogitsProcessorList([nested]), **how, **settings)
        depth = 0
        for token in out.sequences[0, IDS.shape[1] :].tolist():
            depth += 1 if 10 <= token < 40 else -1
            assert 10 <= token < 70 and 0 <= depth <= 3
        assert nested.depth is None  # it itself stays where it was
        if not sample:
            assert out.sequences.tolist() == wanted.tolist() and out.stats.lossless
        if drafts == 3:
            assert out.stats.tau > 1 and Nested.calls > 40, "accepted drafts were asked about, and others too"


def test_what_rolls_back_knows_one_text_only():
    for ids in (IDS, IDS[:2]):
        with pytest.raises(ValueError, match="cannot honour: Nested beside drafts"):
            through("mtp", ids, logits_processor=LogitsProcessorList([Nested()]), num_draft_tokens=2)


def test_the_draft_tree_asks_each_branch_from_where_its_parent_stood():
    """A count of the text's own: a branch that saw its sibling would count on."""

    class Counting(LogitsProcessor):
        rolls_back = True
        seen = 0

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return scores.scatter_add(1, torch.tensor([[(self.seen * 7) % 97]]), torch.full((1, 1), 40.0))

    class Ordinary(Counting):
        rolls_back = False

    model = leaning_model()
    heads = get_mtp_model(model, HeadsConfig(depth=2))
    wanted = model.generate(IDS[:1], max_new_tokens=24, do_sample=False, logits_processor=[Ordinary()])
    tree = [[0], [1], [2], [0, 0], [1, 0], [0, 1]]
    for how in ({"draft_tree": tree, "num_draft_tokens": 2}, {"drafter": "mtp+lookup", "num_draft_tokens": 2}):
        out = heads.generate(IDS[:1], max_new_tokens=24, do_sample=False, logits_processor=[Counting()], **how)
        assert out.tolist() == wanted.tolist()


def test_generate_takes_what_transformers_takes_in_its_places():
    given = GenerationConfig(max_new_tokens=9, do_sample=False)
    processors, criteria = [lp.SuppressTokensLogitsProcessor([5, 9])], [lambda ids, _: ids[:, -1] < 9]
    criteria[0].of_one_text = True  # type: ignore[attr-defined]
    for more in ((), (processors,), (processors, criteria), (None, criteria)):
        wanted = mtp().model.generate(IDS, given, *more)
        assert mtp().generate(IDS, given, *more, num_draft_tokens=2).tolist() == wanted.tolist()
    with pytest.raises(ValueError, match="synced_gpus"):
        mtp().generate(IDS, given, None, None, None, True)


def test_criteria_are_asked_once_a_token_in_order_with_the_callers_ids():
    class Recording(StoppingCriteria):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
            self.seen.append((ids.tolist(), scores))
            return len(self.seen) == 9

    padded, mask = torch.cat([torch.tensor([[7, 8]]), IDS[:1]], dim=1), torch.tensor([[0, 0, *[1] * 9]])
    theirs, ours = Recording(), Recording()
    settings = {"attention_mask": mask, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 30}
    wanted = mtp().model.generate(padded, stopping_criteria=[theirs], **settings)
    out = mtp().generate(padded, stopping_criteria=[ours], **settings)
    assert out.tolist() == wanted.tolist() and ours.seen == theirs.seen and len(ours.seen) == 9


def test_processors_see_the_callers_padding():
    """Padding by another id than pad_token_id, which an n-gram rule reads."""
    padded = torch.cat([torch.tensor([[12, 13], [21, 22]]), IDS], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    settings = {"attention_mask": mask, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 20}
    for rule in ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 1}, {"min_length": 25, "eos_token_id": 40}):
        wanted = mtp().model.generate(padded, **settings, **rule)
        assert mtp().generate(padded, num_draft_tokens=3, **settings, **rule).tolist() == wanted.tolist()


@pytest.mark.parametrize("slots", [64, 1])
def test_without_an_end_token_texts_go_on_until_all_have_ended(slots):
    """transformers fills up a text that a stop string has ended only where there is an end token."""
    whole = mtp().model.generate(IDS, max_new_tokens=20, do_sample=False)
    stops = [tokenizer().decode(whole[b, 9 + 4 + 5 * b : 9 + 6 + 5 * b]) for b in (0, 1)]
    settings = {"stop_strings": stops, "tokenizer": tokenizer(), "max_new_tokens": 20, "do_sample": False}
    wanted = mtp().model.generate(IDS, **settings)
    alone = [mtp().model.generate(row[None], **settings).shape[1] for row in IDS]
    assert alone[0] != alone[1] and wanted.shape[1] == max(alone) < 9 + 20
    for n in (0, 3):
        out = mtp().generate(IDS, num_draft_tokens=n, slots=slots, return_dict_in_generate=True, **settings)
        assert out.sequences.tolist() == wanted.tolist()
        assert [sum(e) for e in out.stats.emitted] == [wanted.shape[1] - 9] * 2


def test_token_types_of_text_mean_nothing_and_others_are_refused():
    kinds = torch.zeros_like(IDS)
    check = functools.partial(refuse_unsupported, GenerationConfig(max_new_tokens=4))
    for name in ("token_type_ids", "mm_token_type_ids"):
        check({name: kinds})
        with pytest.raises(ValueError, match=f"cannot honour: {name}"):
            check({name: kinds + 1})


def test_outputs_have_transformers_fields():
    out = through("mtp", return_dict_in_generate=True)
    theirs = mtp().model.generate(IDS, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out, type(theirs)) and set(vars(theirs)) <= set(vars(out))
    assert all(getattr(out, name) is None for name in vars(theirs) if name not in ("sequences", "stats"))


# -- every field of a generation config --------------------------------------------------------------------------------

# what each field is given; fields that are not here are named by the test below
FIELDS: dict[str, Any] = {
    "max_length": 15,
    "max_new_tokens": 5,
    "min_length": 20,
    "min_new_tokens": 10,
    "early_stopping": True,
    "max_time": 1000.0,
    "stop_strings": ["w"],
    "do_sample": False,
    "num_beams": 2,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {},
    "max_cache_len": 40,
    "temperature": 0.5,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 0.99,
    "top_h": 0.4,
    "typical_p": 0.01,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "repetition_penalty": 1.8,
    "encoder_repetition_penalty": 3.0,
    "length_penalty": 2.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[24], [10, 4], [60]],
    "renormalize_logits": True,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 7,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (3, 1.5),
    "suppress_tokens": [24, 10, 60, 4],
    "begin_suppress_tokens": list(range(40)),
    "sequence_bias": [[[24], -9.0], [[10, 4], 9.0]],
    "token_healing": True,
    "guidance_scale": 1.5,
    "watermarking_config": {"greenlist_ratio": 0.3, "bias": 6.0},
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 50,
    "bos_token_id": 12,
    "eos_token_id": [60, 24],
    "encoder_no_repeat_ngram_size": 1,
    "decoder_start_token_id": 3,
    "is_assistant": True,
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.3,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash",
    "compile_config": None,
    "disable_compile": True,
    "prefill_chunk_size": 4,
    "low_memory": True,
    "penalty_alpha": 0.5,
    "dola_layers": "high",
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "continuous_batching_config": None,
    "constraints": [object()],
    "force_words_ids": [[5]],
}
SAMPLED = {"do_sample": True, "top_k": 1}
WITH: dict[str, dict[str, Any]] = {
    **{name: SAMPLED for name in ("temperature", "min_p", "top_h", "epsilon_cutoff", "eta_cutoff")},
    **{name: {"do_sample": True} for name in ("top_k", "top_p", "typical_p")},
    **{name: {"eos_token_id": 60} for name in ("min_length", "min_new_tokens", "exponential_decay_length_penalty")},
    **{
        f"output_{name}": {"return_dict_in_generate": True}
        for name in ("attentions", "hidden_states", "scores", "logits")
    },
    "pad_token_id": {"eos_token_id": 60},
    "num_return_sequences": SAMPLED,
    "stop_strings": {"tokenizer": tokenizer(), "eos_token_id": 2, "pad_token_id": 0},
}


def test_every_field_is_known():
    """A new field of transformers' asks to be looked at."""
    known = {
        name for name in GenerationConfig().to_dict() if not name.startswith("_") and name != "transformers_version"
    }
    assert known <= set(FIELDS), known - set(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_honoured_or_refused(field):
    """The same tokens as transformers, or an error by name; where transformers itself refuses, so do we."""
    settings = {"max_new_tokens": 12, "do_sample": False, **WITH.get(field, {}), field: FIELDS[field]}
    if field == "max_length":
        del settings["max_new_tokens"]
    said = []
    for generate in (mtp().model.generate, functools.partial(mtp().generate, drafter="mtp+lookup")):
        try:
            out: Any = generate(IDS, **settings)
        except Exception as error:  # whatever it is that transformers misses
            said.append(str(error) if isinstance(error, ValueError) else "")
        else:
            said.append((out if isinstance(out, torch.Tensor) else out.sequences).tolist())
    wanted, got = said
    refused = isinstance(got, str) and any(part in got for part in (field, "generation mode", "LogitsProcessor"))
    assert got == wanted or refused or isinstance(wanted, str), got
    assert isinstance(got, str) or not isinstance(wanted, str), wanted
