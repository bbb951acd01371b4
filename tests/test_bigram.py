"""A bigram and a confidence head in every method's drafts: lossless as ever, and what draws and trees are told."""

# K depths.

from typing import Any

import pytest
import torch
from test_decode import CHEAP_ROWS

from foretell.config import ConfigError
from foretell.data.collate import to_batch
from foretell.methods.base import METHODS
from foretell.mtp import MTPModel, get_mtp_model
from foretell.types import Draft
from tests.tiny import VOCAB, tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential", "depth": 3, "shared_module": True},
    "heads": {"method": "heads", "depth": 3, "head_type": "medusa", "init_strategy": "copy_lm_head"},
    "heads shared": {"method": "heads", "depth": 3, "head_type": "ffn", "share_unembedding": True},
    "masked": {"method": "masked", "depth": 3, "sampler": False},
    "masked sampler": {"method": "masked", "depth": 3},
}
PROMPTS = torch.tensor([[5, 6, 7, 8, 9], [11, 3, 12, 3, 4]])


def make(kind: str, few: int | None = 61, **changes: Any) -> MTPModel:
    """A module whose bigram says a lot: it must matter what stood before."""
    settings = {**KINDS[kind], "markov_rank": 6, "confidence_head": True, "draft_vocab_size": few, **changes}
    mtp = get_mtp_model(tiny_model(), settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in mtp.module.named_parameters():
            scale = 3.0 if name == "bigram.after.weight" else 0.2
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    if few is not None:
        mtp.module.set_draft_vocabulary(torch.randperm(VOCAB, generator=generator)[:few].sort().values)
    mtp._curve = CHEAP_ROWS  # this machine's may leave masks out
    return mtp.eval()


def seen_drafts(mtp: MTPModel, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> list[tuple[list[int], Draft]]:
    """(text, draft) of every round of a decoding call."""
    found: list[tuple[list[int], Draft]] = []
    drafter = type(mtp.module.drafter(mtp.target))
    whole = drafter.draft

    def draft(self: Any, sequences: Any, lengths: Any, worth: Any = None) -> Any:
        out = whole(self, sequences, lengths, worth)
        found.extend((list(s.tokens), one) for s, one in zip(sequences, out, strict=True))
        return out

    monkeypatch.setattr(drafter, "draft", draft)
    mtp.generate(PROMPTS, max_new_tokens=12, **arguments)
    return found


def teacher_forced(mtp: MTPModel, tokens: list[int], depth: int) -> torch.Tensor:
    """[V] what the depth-th draft behind a text's last tokens is, given the drafts before it, by draft_logits."""
    base = len(tokens) - 1 - depth  # the position whose state the chain reads
    return mtp.draft_logits(torch.tensor([[*tokens, 0, 0, 0, 0]]))[0, base, depth - 1]


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_follow_the_bigram_and_say_how_sure_they_are(kind, monkeypatch):
    mtp = make(kind)
    found = [one for one in seen_drafts(mtp, monkeypatch, num_draft_tokens=3, do_sample=False) if len(one[1])]
    assert len(found) > 6
    blind = 0
    for text, draft in found:
        for i, token in enumerate(draft.tokens):
            before = [*text, *draft.tokens[:i]]
            logits_V = teacher_forced(mtp, before, i + 1)
            assert int(logits_V.argmax()) == token, (kind, i)
            bias = mtp.module.bigram.after(mtp.module.bigram.before(torch.tensor(before[-1])))
            without_V = logits_V[mtp.module.draft_vocab_ids] - bias
            blind += int(mtp.module.draft_vocab_ids[without_V.argmax()]) != token
            assert abs(draft.confidence[i] - float(torch.softmax(logits_V, -1).max())) > 1e-4, "the head's own word"
            assert 0 < draft.confidence[i] < 1
    assert blind > 6, "without the bigram other tokens would have been drafted"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [3, "auto"])
def test_lossless(kind, length):
    mtp = make(kind)
    plain = mtp.generate(PROMPTS, max_new_tokens=24, do_sample=False, num_draft_tokens=0)
    out = mtp.generate(
        PROMPTS, max_new_tokens=24, do_sample=False, num_draft_tokens=length, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences, plain) and out.stats.lossless
    wrong = plain.clone()
    wrong[0, -1] += 1
    assert not torch.equal(out.sequences, wrong)


@pytest.mark.parametrize("kind", ["sequential", "heads", "masked"])
def test_drawn_drafts_carry_what_they_were_drawn_of(kind, monkeypatch):
    mtp = make(kind)
    torch.manual_seed(0)
    drawn = {"do_sample": True, "draft_sample_method": "probabilistic", "top_k": 0}
    if kind == "masked":  # whether masks pay has no say here
        drawn["draft_layout"] = "quadratic"
    found = seen_drafts(mtp, monkeypatch, num_draft_tokens=3, **drawn)
    checked = 0
    for text, draft in (one for one in found if len(one[1])):
        for i in range(len(draft)):
            before = [*text, *draft.tokens[:i]]
            wanted_V = torch.softmax(teacher_forced(mtp, before, i + 1), -1)
            blind_V = torch.softmax(teacher_forced(mtp, [*before[:-1], (before[-1] + 1) % VOCAB], i + 1), -1)
            assert float((blind_V - wanted_V).abs().max()) > 1e-3, "the token before matters"
            torch.testing.assert_close(draft.probs[i], wanted_V, rtol=1e-3, atol=1e-5)
            checked += 1
    assert checked > 12


def test_a_tree_reads_the_bigram_below_each_of_its_guesses(monkeypatch):
    mtp = make("heads")
    tree = [(0,), (1,), (0, 0), (1, 0), (1, 1), (1, 0, 0)]
    plain = mtp.generate(PROMPTS, max_new_tokens=12, do_sample=False, num_draft_tokens=0)
    found = seen_drafts(mtp, monkeypatch, draft_tree=tree, do_sample=False)
    assert torch.equal(mtp.generate(PROMPTS, max_new_tokens=12, do_sample=False, draft_tree=tree), plain)
    whole = [one for one in found if len(one[1]) == len(tree)]
    assert len(whole) > 4
    for text, draft in whole:
        for i, ranks in enumerate(tree):
            path, at = [], draft.parents[i]
            while at >= 0:
                path, at = [draft.tokens[at], *path], draft.parents[at]
            best = teacher_forced(mtp, [*text, *path], len(ranks)).topk(2).indices
            assert int(best[ranks[-1]]) == draft.tokens[i]
        first, second = draft.confidence[:2]
        assert first + second <= 1 + 1e-6, "what the head leaves is shared among the others"


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_is_saved_and_loaded(kind, tmp_path):
    mtp = make(kind)
    mtp.save_pretrained(tmp_path)
    again = MTPModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(again.draft_logits(PROMPTS), mtp.draft_logits(PROMPTS))
    mtp.train()
    losses = mtp(input_ids=PROMPTS, labels=PROMPTS)["mtp"]
    sum(loss.total for loss in losses).backward()
    bigram = mtp.module.bigram
    assert all(p.grad is not None and bool(p.grad.any()) for p in bigram.parameters())
    assert all(p.grad is None for p in mtp.model.parameters())


def test_confidence_learns_acceptance_and_disturbs_nothing():
    """Its loss is the cross-entropy of whether a draft is right; other parameters get the gradient they had without."""
    mtp, bare = make("heads"), make("heads", confidence_head=False)
    own = {name: p for name, p in mtp.module.named_parameters() if "sure" not in name}
    bare.module.load_state_dict({**{name: p.detach() for name, p in own.items()},
                                 "draft_vocab_ids": mtp.module.draft_vocab_ids})  # fmt: skip
    found = []
    for model in (mtp, bare):
        losses = model(input_ids=PROMPTS, labels=PROMPTS)["mtp"]
        sum(loss.total for loss in losses).backward()
        found.append([float(loss.total.detach()) for loss in losses])
    for name, parameter in bare.module.named_parameters():
        torch.testing.assert_close(own[name].grad, parameter.grad, msg=name)
    logits = mtp.draft_logits(PROMPTS)
    rows = mtp.target.forward_text(PROMPTS, torch.arange(5).expand(2, 5))
    batch = to_batch({"input_ids": PROMPTS})
    extra = [with_it - without for with_it, without in zip(*found, strict=True)]
    states = list(mtp.module.depth_states(mtp.target, batch, rows.post_norm_BRD, detach=True))
    for k, states_BTD in enumerate(states, start=1):
        wanted = 0.0
        for b in range(2):
            for t in range(4 - k):
                label = int(PROMPTS[b, t + 1 + k])
                if label not in mtp.module.draft_vocab_ids:
                    continue
                sure = mtp.module.bigram.sureness(states_BTD[b, t][None], PROMPTS[b, t + k][None]).sigmoid()
                right = int(logits[b, t, k - 1].argmax()) == label
                wanted -= float((sure if right else 1 - sure).detach().log())
        assert extra[k - 1] == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_off_it_draws_no_random_number_and_holds_nothing():
    torch.manual_seed(0)
    first = get_mtp_model(tiny_model(), KINDS["sequential"]).module
    assert first.bigram is None and not any("bigram" in name for name, _ in first.named_parameters())
    for method in METHODS:
        with pytest.raises(ConfigError, match="markov_rank: got -1, wanted a whole number, 0 for none"):
            get_mtp_model(tiny_model(), {"method": method, "markov_rank": -1})


def test_an_adapter_that_is_exported_cannot_carry_it():
    with pytest.raises(ConfigError, match="noise masks without a sampler are made to be exported as a plain PEFT"):
        get_mtp_model(
            tiny_model(), {"method": "masked", "mask_tokens": "noise", "sampler": False, "confidence_head": True}
        )
