"""Positions: every kind of rotary angles on both sides of its border, the model's length, prompts of any length.

The reference is what a fresh copy of the model generates for each row alone: transformers keeps the frequencies of the
longest text so far in the module, so that a model's own second call may differ from its first.
"""

# B sequences, T positions.

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from drafters import Oracle, Spy, knowing_mtp, leaning_model
from packaging.version import Version
from tiny import tiny_model
from torch import Tensor, nn

from foretell.decoding import loop
from foretell.methods import chain, sequential
from foretell.methods.heads import HeadsConfig
from foretell.methods.masked import MaskedConfig
from foretell.methods.sequential import SequentialConfig
from foretell.models.attention import RowMasks
from foretell.models.target import TargetRows
from foretell.mtp import MTPModel, get_mtp_model
from foretell.types import SequenceState

BORDER = 32
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [16.0] * 4}


def texts(*lengths: int) -> list[Tensor]:
    """Prompts of these lengths, each [T]."""
    return [(torch.arange(n) * 7 + 11 * i) % 90 + 3 for i, n in enumerate(lengths)]


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """One batch, left-padded."""
    T = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(T - len(row)), row]) for row in rows])
    mask = torch.stack([(torch.arange(T) >= T - len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def own(model: nn.Module, rows: list[Tensor], new: int = 12) -> list[list[int]]:
    """What fresh copies of the model generate, each row alone."""
    out = []
    for row in rows:
        ids = row[None]
        fresh = copy.deepcopy(model)
        told = fresh.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        out.append(told[0, len(row) :].tolist())
    return out


def ours(mtp: MTPModel, rows: list[Tensor], new: int = 12, **settings: Any) -> list[list[int]]:
    """The same from foretell, all rows in one batch."""
    batch = padded(rows)
    out = mtp.generate(**batch, max_new_tokens=new, do_sample=False, **settings)
    return out[:, batch["input_ids"].shape[1] :].tolist()


# -- angles ------------------------------------------------------------------------------------------------------------

LONG = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": BORDER,
    "rope_theta": 100.0,
    **FACTORS,
}
# before 5.22 transformers' own second forward beyond the border ended in an UnboundLocalError
BY_LAYER = {**LONG, **({} if Version(transformers.__version__) >= Version("5.22") else {"rope_type": "linear"})}
DYNAMIC = {"rope_type": "dynamic", "factor": 16.0, "rope_theta": 100.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 100.0}
BORDERED = {"original_max_position_embeddings": BORDER}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", PLAIN),
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}),
    "dynamic": ("llama", DYNAMIC),
    "yarn": ("llama", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0, **BORDERED}),
    "longrope": ("qwen3", LONG),
    "llama3": ("llama", {**LLAMA3, **BORDERED}),
    "proportional": ("llama", {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5}),
    "by layer: dynamic": ("gemma3_text", {"full_attention": DYNAMIC, "sliding_attention": PLAIN}),
    "by layer: both": ("gemma3_text", {"full_attention": BY_LAYER, "sliding_attention": DYNAMIC}),
    "by layer: longrope": ("gemma3_text", {"full_attention": PLAIN, "sliding_attention": BY_LAYER}),
    "complex numbers": ("deepseek_v2", DYNAMIC),
    "its config asked for": ("granite_swa", DYNAMIC),
    "read anew": ("phi3", LONG),
    "read anew, scaled": ("phimoe", {**LONG, "short_mscale": 1.0, "long_mscale": 3.0}),
}
MORE = {
    "phi3": BORDERED,
    "phimoe": {**BORDERED, "num_local_experts": 4},
    "gemma3_text": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "deepseek_v2": {
        "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 4,
    },
}  # fmt: skip
TURNING = [kind for kind, (_, rope) in ROPES.items() if "dynamic" in str(rope) or "longrope" in str(rope)]


def turning(kind: str, make: Any = tiny_model) -> nn.Module:
    """A model whose angles have their border at 32 tokens."""
    name, rope = ROPES[kind]
    length = 4 * BORDER if "longrope" in str(rope) and "dynamic" not in str(rope) else BORDER
    return make(name, max_position_embeddings=length, rope_parameters=rope, **MORE.get(name, {}))


@pytest.mark.parametrize("kind", ROPES)
def test_angles_are_those_of_each_text_alone(kind, monkeypatch):
    """Below the border, across it in the prompt and while decoding, beyond; chunks, right and wrong drafts, slots."""
    model = turning(kind)
    rows = texts(5, 27, 31, 32, 33, 50)
    wanted = own(model, rows, 8)
    mtp = knowing_mtp(model)
    truth = [row.tolist() + new for row, new in zip(rows, wanted, strict=True)]
    for chunk, drafts in ((512, 0), (512, 3), (7, 2), (7, 5)):
        monkeypatch.setattr(loop, "PREFILL_ROWS", chunk)
        drafter = Oracle(truth, (2, 5, 0, 1))
        told = ours(mtp, rows, 8, num_draft_tokens=drafts, drafter=drafter, slots=drafts + 2)
        assert told == wanted, (chunk, drafts)
    if kind in TURNING:  # the model itself says other words where it is asked for all of them at once
        batch = padded(rows)
        at_once = copy.deepcopy(model).generate(**batch, max_new_tokens=8, do_sample=False)
        assert at_once[:, batch["input_ids"].shape[1] :].tolist() != wanted


@pytest.mark.parametrize("method", ["sequential", "masked", "two passes", "layer"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope", "read anew"])
def test_modules_draft_across_the_border(kind, method):
    model = turning(kind, leaning_model)
    rows = texts(29, 31, 34, 3)
    mtp = knowing_mtp(model) if method == "sequential" else module_of(method.replace("two passes", "masked"), model)
    wanted = own(model, rows, 7)
    layout = {"draft_layout": "two_pass"} if method == "two passes" else {}
    for drafts in (2, "auto"):
        assert ours(mtp, rows, 7, num_draft_tokens=drafts, **layout) == wanted, drafts


@pytest.mark.parametrize("kind", ["dynamic", "by layer: both", "read anew, scaled"])
def test_nothing_depends_on_what_was_read_before_nor_is_left_behind(kind):
    model = turning(kind)
    first, second = texts(60, 34)
    wanted = own(model, [first, second])
    mtp = knowing_mtp(model)

    def state() -> list[Any]:
        rotary = mtp.target.decoder.rotary_emb
        return [
            str(value)
            for name, value in sorted({**vars(rotary), **rotary._buffers}.items())
            if name[0] != "_" and name != "training"
        ]

    before = state()
    assert [ours(mtp, [row])[0] for row in (first, second)] == wanted
    mtp(input_ids=first[None])
    assert state() == before
    model.generate(first[None], max_new_tokens=12, do_sample=False)  # leaves its frequencies there
    key = mtp.target._copy.key
    assert ours(mtp, [second]) == wanted[1:]
    assert mtp.target._copy.key == key, "what a rotary module remembers makes no copy stale"


def test_spans_and_kept_states_follow_a_text_that_is_read_anew(tmp_path):
    from tiny import tiny_tokenizer

    from foretell.training.regenerate import regenerate

    model = turning("read anew", leaning_model)
    rows = texts(29, 5, 40)
    mtp = knowing_mtp(model)
    assert ours(mtp, rows, policy="static_k", num_draft_tokens=1) == own(model, rows)  # spans of the target's own token
    assert len(ours(mtp, rows, policy="static_k")) == 3
    questions = [{"input_ids": [*rows[0].tolist(), 5], "labels": [-100] * len(rows[0]) + [5]}]
    store, _ = regenerate(mtp, questions, tiny_tokenizer(), tmp_path, max_new_tokens=8)
    ids, states_TD = torch.tensor(store[0]["input_ids"])[None], store[0]["hidden_states"]
    assert ids.shape[1] > BORDER + 1
    wanted_TD = mtp.target.forward_text(ids, torch.arange(ids.shape[1])[None]).post_norm_BRD[0]
    torch.testing.assert_close(states_TD[:-1], wanted_TD[:-1], rtol=1e-4, atol=1e-4)


# -- the model's length ------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": BORDER}


@pytest.mark.parametrize("rope", [None, YARN], ids=["plain", "yarn"])
def test_prompts_of_the_models_length_and_longer_are_read_as_transformers_reads_them(rope):
    model = leaning_model("qwen2", max_position_embeddings=BORDER, **({"rope_parameters": rope} if rope else {}))
    rows = texts(BORDER - 1, BORDER, BORDER + 1, 2 * BORDER)
    assert ours(knowing_mtp(model), rows) == own(model, rows)


def test_training_rows_are_cut_to_max_length_only(tmp_path):
    from foretell.training.trainer import MTPTrainer, MTPTrainingArguments

    model = leaning_model("qwen2", max_position_embeddings=BORDER, rope_parameters=YARN)
    rows = [{"input_ids": list(range(3, 53))}] * 4
    for length, wanted in ((128, 50), (40, 40), (None, 50)):
        args = MTPTrainingArguments(str(tmp_path), max_length=length, max_steps=1, use_cpu=True, report_to=[])
        trainer = MTPTrainer(get_mtp_model(model, SequentialConfig(depth=2)), args, train_dataset=rows)
        assert {len(row["input_ids"]) for row in trainer.train_dataset} == {wanted}


def test_regenerated_answers_go_beyond_the_models_length(tmp_path):
    from tiny import tiny_tokenizer

    from foretell.training.regenerate import regenerate

    model = leaning_model("qwen2", max_position_embeddings=BORDER, rope_parameters=YARN)
    rows = texts(BORDER - 4, BORDER + 2)
    questions = [{"input_ids": [*row.tolist(), 5], "labels": [-100] * len(row) + [5]} for row in rows]
    store, _ = regenerate(knowing_mtp(model), questions, tiny_tokenizer(), tmp_path, max_new_tokens=12)
    # 1 is the end token of the tokenizer
    cut = [new[: new.index(1) + 1] if 1 in new else new for new in own(model, rows)]
    wanted = [row.tolist() + new for row, new in zip(rows, cut, strict=True)]
    assert sorted(list(row["input_ids"]) for row in store.rows()) == sorted(wanted)


# -- prompts of one token, and long ones -------------------------------------------------------------------------------

HEADS = ["linear", "ffn", "mha_ffn", "cnn", "identical", "medusa", "layer"]
METHODS: dict[str, Any] = {
    "sequential": lambda: SequentialConfig(depth=2),
    "shared": lambda: SequentialConfig(depth=2, shared_module=True),
    "masked": lambda: MaskedConfig(depth=2, lora_rank=4),
    **{kind: functools.partial(HeadsConfig, depth=2, head_type=kind) for kind in HEADS},
}


def module_of(method: str, model: nn.Module | None = None) -> MTPModel:
    """A module of any method, its parameters off their neutral start."""
    torch.manual_seed(3)
    mtp = get_mtp_model(model or leaning_model(), METHODS[method]()).eval()
    with torch.no_grad():
        for parameter in mtp.module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return mtp


@pytest.mark.parametrize("method", METHODS)
def test_prompts_of_one_token_beside_longer_ones(method):
    mtp = module_of(method)
    for lengths in ((1, 1, 6), (1,), (1, 9, 1, 1, 4)):
        rows = texts(*lengths)
        wanted = own(mtp.model, rows, 5)
        for settings in ({"num_draft_tokens": 1}, {"slots": 2}, {"num_draft_tokens": "auto"}):
            assert ours(mtp, rows, 5, **settings) == wanted, (lengths, settings)
        assert len(ours(mtp, rows, 5, policy="static_k")) == len(rows)


@pytest.mark.parametrize("method", ["sequential", "shared"])
def test_texts_that_wait_to_be_read_draft_the_same(method, monkeypatch):
    mtp, rows, drafted = module_of(method), texts(150, 2, 90, 1, 9), {}
    for waiting in (1000, 64, 5, 0):  # the longest is read by the step that drafts, or on the way
        monkeypatch.setattr(sequential, "WAITING", waiting)
        for settings in ({"num_draft_tokens": 2}, {"num_draft_tokens": 2, "slots": 2}):
            spy = Spy(mtp.drafter())
            told = ours(mtp, rows, 12, drafter=spy, **settings)
            found = told, sorted((at, draft.tokens) for _, at, draft in spy.drafted)
            assert drafted.setdefault("first", found) == found and any(tokens for _, tokens in found[1])


@torch.no_grad()
def test_sixteen_prompts_of_sixteen_thousand_tokens_leave_keys_and_values_only():
    # before: the states of every position, of every depth, kept on both sides of each
    model = tiny_model(num_attention_heads=1, num_key_value_heads=1, head_dim=8, num_hidden_layers=1)
    mtp, S, T, R, D = module_of("shared", model), 16, 16_000, 512, 32
    states_1TD = torch.randn(1, T, D, generator=torch.Generator().manual_seed(0))
    text = texts(T + 1)[0].tolist()

    def read(slots: list[int], chunk: int) -> Any:
        drafter = mtp.drafter().another(False)
        drafter.open(S, T + 4)
        for slot in slots:
            sequence = SequenceState(text, T, index=slot, slot=slot)
            drafter.start(slot)
            for at in range(0, T, chunk):
                rows = TargetRows(states_1TD[:, at : at + chunk], None)
                sequence.cached = min(at + chunk, T)
                drafter.observe([sequence], rows, [list(range(rows.post_norm_BRD.shape[1]))])
        return drafter, drafter.draft([sequence], [3])[0].tokens

    (drafter, tokens), (_, whole) = read([S - 1], R), read([0], T)  # one of the sixteen is read: time
    assert tokens == whole and len(set(tokens)) > 1
    kept, waiting = (
        sum(flat.nbytes for parts in storage._storage.values() for flat in parts)
        for storage in (drafter._cache, drafter._states)
    )
    a_token = 2 * 8 * 4 + 8  # key, value, and the token itself
    assert S * T * a_token <= kept <= 1.7 * S * T * a_token
    assert waiting <= 1.7 * S * (R + sequential.WAITING) * D * 4, "states of a chunk, not of a text"


@pytest.mark.parametrize("method", ["sequential", "shared", "mha_ffn", "layer"])
def test_modules_read_prompts_in_pieces_and_draft_the_same(method, monkeypatch):
    mtp, rows = module_of(method), texts(23, 2, 40, 1, 9)
    drafted, widths = {}, []
    plain = RowMasks.begin

    def begin(self, lengths_B, visible, rows, **masks):
        if self is not mtp.target._masks:
            widths.append(len(lengths_B) * rows)
        return plain(self, lengths_B, visible, rows, **masks)

    monkeypatch.setattr(RowMasks, "begin", begin)
    for size in (1000, 9, 1):
        monkeypatch.setattr(chain, "READ_ROWS", size)
        monkeypatch.setattr(chain, "FEW_ROWS", min(size, 2))
        spy = Spy(mtp.drafter())
        widths.clear()
        told = ours(mtp, rows, 8, drafter=spy)
        drafted[size] = told, [(at, draft.tokens) for _, at, draft in spy.drafted]
        assert not widths or max(widths) <= max(size, len(rows) * min(size, 2))
    assert drafted[1000][1] and drafted[9] == drafted[1000] == drafted[1]


def test_a_module_reads_a_long_prompt_with_small_masks(monkeypatch):
    # what was asked for before: a mask of the whole prompt by the whole prompt for every row of the batch
    mtp, largest, plain = module_of("sequential"), [0], RowMasks.get

    def get(self, *args):
        mask = plain(self, *args)
        largest[0] = max(largest[0], 0 if mask is None else mask.numel())
        return mask

    monkeypatch.setattr(RowMasks, "get", get)
    rows = texts(900, 1100)
    assert ours(mtp, rows, 2) == own(mtp.model, rows, 2)
    assert largest[0] <= 2 * 2 * 512 * 1152, "two prompts, two heads a group, a piece of 512 rows of the target"


@pytest.mark.parametrize("kind", ["layer", "mha_ffn"])
def test_heads_draft_what_they_say_of_the_whole_text_where_the_cache_has_an_older_name(kind):
    mtp = module_of(kind, leaning_model("gpt_neox"))
    spy, rows = Spy(mtp.drafter()), texts(9, 1, 4)
    ours(mtp, rows, 8, drafter=spy, num_draft_tokens=2)
    text = {i: row.tolist() + new for i, (row, new) in enumerate(zip(rows, own(mtp.model, rows, 8), strict=True))}
    seen = [(text[index][:cached], draft.tokens) for index, cached, draft in spy.drafted if len(draft)]
    assert len(seen) > 10
    for read, tokens in seen:
        assert tokens == mtp.draft_logits(torch.tensor([read]))[0, -1].argmax(-1).tolist()
