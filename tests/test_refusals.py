"""What generate cannot honour it refuses by name; it never ignores an argument silently. The same for models."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from drafters import Wrong, knowing_mtp, leaning_model
from tiny import tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, GenerationConfig

import foretell
from foretell.decoding.generate import refuse_unsupported
from foretell.methods.sequential import SequentialConfig
from foretell.models.slot_cache import CACHE_NAMES
from foretell.models.target import UnsupportedModelError
from foretell.mtp import MTPModel, get_mtp_model

IDS = torch.arange(10, 28).view(2, 9)


@functools.cache
def mtp() -> MTPModel:
    return knowing_mtp(leaning_model())


def refused(match: str, ids: torch.Tensor | None = IDS, **settings: Any) -> None:
    settings = {"max_new_tokens": 4, "do_sample": False, **settings}
    with pytest.raises(ValueError, match=match):
        mtp().generate(ids, **settings)


# -- arguments of generate ---------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "beams": ("beam_search", {"num_beams": 2}),
    "constraints": ("constrained_beam_search", {"num_beams": 2, "force_words_ids": [[5]]}),
    "prefix function": ("PrefixConstrainedLogitsProcessor", {"prefix_allowed_tokens_fn": lambda _b, _ids: [5, 6]}),
    "guidance": ("UnbatchedClassifierFreeGuidance", {"guidance_scale": 2.0}),
    "scores": ("output_scores=True", {"output_scores": True, "return_dict_in_generate": True}),
    "logits": ("output_logits=True", {"output_logits": True, "return_dict_in_generate": True}),
    "hidden states": ("output_hidden_states", {"output_hidden_states": True, "return_dict_in_generate": True}),
    "attentions": ("output_attentions", {"output_attentions": True, "return_dict_in_generate": True}),
    "static cache": ("cache_implementation='static'", {"cache_implementation": "static"}),
    "paged cache": ("cache_implementation='paged'", {"cache_implementation": "paged"}),
    "offloaded cache": ("cache_implementation='offloaded'", {"cache_implementation": "offloaded"}),
    "own cache": (r"(past_key_values|cache) .foretell brings its own cache", {"past_key_values": DynamicCache()}),
    "no cache": ("use_cache=False", {"use_cache": False}),
    "assistant": ("assistant_model", {"assistant_model": nn.Linear(1, 1)}),
    "transformers' lookup": ("assisted_generation", {"prompt_lookup_num_tokens": 3}),
    "contrastive": ("contrastive_search", {"penalty_alpha": 0.5, "top_k": 4}),
    "dola": ("dola_generation", {"dola_layers": "high"}),
    "synced_gpus": ("synced_gpus", {"synced_gpus": True}),
    "embeddings": ("inputs_embeds", {"inputs_embeds": torch.zeros(2, 9, 32)}),
    "positions": ("position_ids", {"position_ids": torch.arange(9)[None] + 3}),
    "typo": ("max_new_token'", {"max_new_token": 3}),
    "policy": ("unknown policy 'greedy', choose one of lossless, typical", {"policy": "greedy"}),
    "drafter": ("drafter: got 'mpt', wanted 'mtp', 'lookup'", {"drafter": "mpt"}),
    "no drafters": ("got no drafters", {"drafter": []}),
    "sample method": ("draft_sample_method: got 'best', wanted 'greedy'", {"draft_sample_method": "best"}),
    "slots": ("slots: got 0, wanted an integer of at least 1", {"slots": 0}),
    "too deep": ("got 4, but this module drafts at most 3", {"num_draft_tokens": 4}),
    "no tokenizer": ("tokenizer", {"stop_strings": ["a"]}),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_is_refused_by_name(argument):
    match, settings = ARGUMENTS[argument]
    refused(match, None if "inputs_embeds" in settings else IDS, **settings)


@pytest.mark.parametrize("argument", ["beams", "scores", "static cache", "no cache", "prefix function", "positions"])
def test_is_refused_through_custom_generate_too(argument):
    match, settings = ARGUMENTS[argument]
    with pytest.raises(ValueError, match=match):
        mtp().model.generate(IDS, max_new_tokens=4, custom_generate=foretell.custom_generate(mtp()), **settings)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_known_by_every_name(name):
    """transformers hands its own empty cache to every custom_generate; a user's is marked."""
    settings = GenerationConfig(max_new_tokens=4, max_length=13)
    model_kwargs = {"attention_mask": torch.ones_like(IDS), name: DynamicCache()}
    refuse_unsupported(settings, model_kwargs)
    model_kwargs[name]._is_user_defined = True
    with pytest.raises(ValueError, match=f"{name} .foretell brings its own cache"):
        refuse_unsupported(settings, model_kwargs)


@pytest.mark.parametrize("length", [-1, 1.5, True, "some", [3]])
def test_bad_draft_lengths(length):
    refused(r"num_draft_tokens: got .*, wanted an integer of at least 0, or 'auto'", num_draft_tokens=length)
    with pytest.raises(ValueError, match="num_draft_tokens"):
        foretell.custom_generate(mtp(), num_draft_tokens=length)


def test_all_that_is_wrong_is_named_at_once():
    refused(
        r"num_beams|beam_search.*output_scores=True.*use_cache=False",
        num_beams=2,
        output_scores=True,
        use_cache=False,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize(
    ("mask", "row"), [([1] * 7 + [0] * 2, "right"), ([1, 1, 0] + [1] * 6, "hole"), ([0] * 9, "nothing")]
)
def test_only_left_padding_is_read(mask, row):
    how = "This prompt is empty" if row == "nothing" else "padding_side='left'"
    refused(
        f"attention_mask of row 1 must be zeros .left padding. then ones.*{how}",
        attention_mask=torch.tensor([[1] * 9, mask]),
    )


def test_empty_prompts():
    refused("input_ids|attention_mask", torch.zeros(1, 0, dtype=torch.long))


def test_a_streamer_takes_one_sequence():
    class Streamer:
        def put(self, value: torch.Tensor) -> None: ...

        def end(self) -> None: ...

    refused("a streamer takes one sequence; got a batch of 2", streamer=Streamer())


def test_what_is_usual_is_not_refused():
    """Positions and masks that say what is so anyway, and settings at their defaults."""
    wanted = mtp().model.generate(IDS, max_new_tokens=4, do_sample=False)
    for settings in (
        {"position_ids": torch.arange(9)[None].expand(2, 9)},
        {"attention_mask": torch.ones(2, 9, dtype=torch.bool)},
        {"use_cache": True, "num_beams": 1, "cache_implementation": "dynamic"},
        {"max_time": 60.0},
    ):
        assert mtp().generate(IDS, max_new_tokens=4, do_sample=False, **settings).tolist() == wanted.tolist()
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    assert mtp().generate(IDS, generation_config=config).tolist() == wanted.tolist()
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), IDS], dim=1)
    mask = (padded > 0).long()
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    out = mtp().generate(padded, attention_mask=mask, position_ids=positions, max_new_tokens=4)
    assert out[:, 2:].tolist() == wanted.tolist()


def test_generation_without_a_prompt_starts_from_bos():
    wanted = mtp().model.generate(max_new_tokens=6, do_sample=False)
    assert mtp().generate(max_new_tokens=6, do_sample=False).tolist() == wanted.tolist()


def test_stop_strings_of_the_models_own_config_need_a_tokenizer(monkeypatch):
    monkeypatch.setattr(mtp().model.generation_config, "stop_strings", ["a"])
    refused("tokenizer")


def test_a_failed_call_leaves_nothing_behind():
    """The next call is whole: caches, slots and the training mode."""

    class Breaking(Wrong):
        def chain(self, sequence: Any, length: int) -> list[int]:
            raise RuntimeError("broken drafter")

    wanted = mtp().model.generate(IDS, max_new_tokens=8, do_sample=False)
    mtp().train()
    with pytest.raises(RuntimeError, match="broken drafter"):
        mtp().generate(IDS, max_new_tokens=8, drafter=Breaking(wanted.tolist()))
    assert mtp().training
    mtp().eval()
    assert mtp().generate(IDS, max_new_tokens=8, do_sample=False).tolist() == wanted.tolist()


# -- models ------------------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
UNSUPPORTED: dict[str, tuple[type, dict[str, Any], str]] = {
    "mamba": (AutoModelForCausalLM, {**SIZES, "state_size": 4}, "MambaForCausalLM .mamba. has .*state"),
    "mamba2": (
        AutoModelForCausalLM,
        {**SIZES, "num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
        "Mamba2ForCausalLM .mamba2. has .*state",
    ),
    "qwen3_next": (
        AutoModelForCausalLM,
        {
            **SIZES,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "Qwen3NextForCausalLM .qwen3_next. has layers of kind linear_attention",
    ),
    "t5": (
        AutoModelForSeq2SeqLM,
        {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        "T5ForConditionalGeneration .t5. is an encoder-decoder",
    ),
    "gpt2": (
        AutoModelForCausalLM,
        {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "GPT2LMHeadModel .gpt2. has no rotary positions",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_models_that_cannot_work_are_refused_by_name(name):
    auto, sizes, match = UNSUPPORTED[name]
    model = auto.from_config(AutoConfig.for_model(name, **sizes))
    with pytest.raises(UnsupportedModelError, match=match):
        get_mtp_model(model, SequentialConfig(depth=1))


def test_what_is_no_causal_model_is_refused():
    for model in (nn.Linear(2, 2), tiny_model().model):
        with pytest.raises(UnsupportedModelError, match="wanted a decoder-only causal LM"):
            get_mtp_model(model, SequentialConfig(depth=1))
    from transformers import AutoModelForSequenceClassification

    with pytest.raises(UnsupportedModelError, match="LlamaForSequenceClassification"):
        get_mtp_model(AutoModelForSequenceClassification.from_config(tiny_config()), SequentialConfig(depth=1))
