"""Drafters for tests: scripted ones that need no model, and a target with a module that knows most of its text."""

# V vocabulary.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny import tiny_model
from torch import Tensor, nn

from foretell.decoding.compose import Composed
from foretell.methods.sequential import SequentialConfig
from foretell.models.mtp_block import _set_gain, residual_size
from foretell.mtp import MTPModel, get_mtp_model
from foretell.types import Draft, Drafter, SequenceState, Worth

# architecture: how far the target leans on its last token, and a seed whose text is neither constant nor unpredictable
LEAN = {
    "qwen2": (3.0, 2),
    "gemma2": (15.0, 0),
    "gemma3_text": (28.0, 0),
    "phi3": (3.0, 2),
    "olmo2": (90.0, 0),
    "qwen3_moe": (3.0, 2),
    "mixtral": (4.0, 1),
    "deepseek_v3": (3.0, 0),
}


def leaning_model(name: str = "llama", **changes: object) -> nn.Module:
    """A tiny target whose embeddings outweigh its layers, so that its next token depends mostly on its last one."""
    lean, seed = LEAN.get(name, (3.0, 1))
    model = tiny_model(name, seed, **{"tie_word_embeddings": False, **changes})
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(lean)
    return model


def knowing_mtp(model: nn.Module, noise: float = 0.0, **settings: object) -> MTPModel:
    """A module that reads only the embedding of the token k ahead, as a leaning_model nearly does: it drafts well.

    noise: how much of random weights is mixed into its fusions (each depth its own), so that all inputs count.
    """
    mtp = get_mtp_model(model, SequentialConfig(**{"depth": 3, **settings}))
    D = mtp.target.hidden_size
    at = D if settings.get("fusion_order") == "hidden_embedding" else 0
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        size = mtp.target.embed(torch.arange(mtp.target.vocab_size)).pow(2).mean().sqrt()
        for block in mtp.module.blocks if settings.get("block") != "eagle3" else ():
            for norm in (block.enorm, block.hnorm):
                _set_gain(norm, 1.0)  # the size stands in the fusion here
            block.eh_proj.weight.copy_(torch.randn(D, 2 * D, generator=generator) * noise * size / D**0.5)
            block.eh_proj.weight[:, at : at + D] += torch.eye(D) * size
        if settings.get("block") == "eagle3":
            _know_by_attention(mtp, noise, generator)
    return mtp


def _know_by_attention(mtp: MTPModel, noise: float, generator: torch.Generator) -> None:
    """Each row attends to itself and adds its embedding to its state, as far as the values are wide."""
    D = mtp.target.hidden_size
    if mtp.module.config.hidden_layers:  # states of size one
        size = mtp.module.entry.fc.weight.max() if mtp.module.config.fc_norm else residual_size(mtp.target)
        mtp.module.entry.fc.weight.div_(size)
    for block in mtp.module.blocks:
        attention = block.block.self_attn.inner
        q, k, v, o = (getattr(attention, f"{name}_proj").weight for name in "qkvo")
        _set_gain(block.enorm, 1.0)
        _set_gain(block.block.input_layernorm, 1.0)
        heads = attention.num_key_value_groups
        taken = torch.linalg.qr(torch.randn(D, len(v), generator=generator)).Q.T
        seen = 3.0 * taken.view(-1, attention.head_dim, D)
        k.copy_(torch.cat([seen.reshape(-1, D), torch.zeros(len(k), D)], dim=1))
        q.copy_(torch.cat([seen.repeat_interleave(heads, 0).reshape(-1, D), torch.zeros(len(q), D)], dim=1))
        v.copy_(torch.cat([2.0 * taken, torch.zeros_like(taken)], dim=1))
        o.copy_(taken.view(-1, attention.head_dim, D).repeat_interleave(heads, 0).reshape(-1, D).T / heads)
        for weight in (q, k, v):
            weight.add_(torch.randn(weight.shape, generator=generator) * noise / D**0.5)


class Scripted(Drafter):
    """Base of the scripted drafters; it proposes nothing. It also holds the loop to its protocol: every cached
    position of every sequence is observed once and in order, in the slot where the sequence lives, also after it moved.
    """

    name = "scripted"
    confidence = 0.5  # what it says of every token
    width = 1  # tokens of a step

    def __init__(self) -> None:
        self.calls = 0  # rounds in which something was asked for
        self.asked: list[list[int]] = []  # lengths of each round
        self.moves = 0
        self.proposed = 0  # tokens, before anybody pruned them
        self.proposed_at: list[int] = []  # the same before each round

    def open(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.seen = [0] * slots

    def start(self, slot: int) -> None:
        self.seen[slot] = 0

    def observe(self, sequences: Sequence[SequenceState], rows: Any, kept: list[list[int]]) -> None:
        for sequence, path in zip(sequences, kept, strict=True):
            self.seen[sequence.slot] += len(path)
            assert self.seen[sequence.slot] == sequence.cached <= self.capacity
            assert path == sorted(set(path)) and all(0 <= row < rows.post_norm_BRD.shape[1] for row in path)

    def move(self, source: int, target: int, length: int) -> None:
        assert self.seen[source] == length and source != target
        self.seen[target] = length
        self.moves += 1

    def draft(self, sequences: Sequence[SequenceState], lengths: list[int], worth: Worth | None = None) -> list[Draft]:
        assert [s.slot for s in sequences] == list(range(len(sequences))), "active sequences stand in slots 0, 1, ..."
        assert all(s.cached == len(s.tokens) - 1 for s in sequences), "all but the last token are in the cache"
        self.asked.append(list(lengths))
        self.proposed_at.append(self.proposed)
        self.calls += any(lengths)
        whole = [self._draft(s, length) for s, length in zip(sequences, lengths, strict=True)]
        drafts = whole if worth is None else self.cut(whole, worth)
        self.proposed += sum(map(len, drafts))
        return drafts

    def cut(self, whole: list[Draft], worth: Worth) -> list[Draft]:
        """So many of the drafts' tokens as are worth it, `width` a step."""
        drafts = [Draft(probs=None if d.probs is None else []) for d in whole]
        open_B = [len(d) > 0 for d in whole]
        while any(open_B):
            open_B = [o and goes for o, goes in zip(open_B, worth(self.name, drafts), strict=True)]
            for b, draft in enumerate(drafts):
                at = len(draft)
                for i in range(at, min(at + self.width, len(whole[b])) if open_B[b] else at):
                    probs_V = None if whole[b].probs is None else whole[b].probs[i]
                    draft.add(whole[b].tokens[i], whole[b].parents[i], whole[b].confidence[i], self.name, probs_V)
                open_B[b] = open_B[b] and len(draft) < len(whole[b])
        return drafts

    def _draft(self, sequence: SequenceState, length: int) -> Draft:
        draft = Draft()
        for token in self.chain(sequence, length):
            add(draft, token, len(draft) - 1, self.name, confidence=self.confidence)
        return draft

    def chain(self, sequence: SequenceState, length: int) -> list[int]:
        """Tokens to propose, at most length."""
        return []


def add(
    draft: Draft, token: int, parent: int, source: str, probs_V: Tensor | None = None, confidence: float = 0.5
) -> int:
    """Append a token; returns its index."""
    return draft.add(token, parent, confidence, source, probs_V)


class Oracle(Scripted):
    """Drafts the true continuation up to the script's next length, then tokens that are wrong.

    truth: for each sequence's index, prompt and continuation. script: accept lengths, used up one a verification and
    sequence, in a circle.
    """

    name = "oracle"

    def __init__(self, truth: Sequence[Sequence[int]], script: Sequence[int] = (10**6,), vocabulary: int = 97) -> None:
        super().__init__()
        self.truth, self.script, self.vocabulary = [list(t) for t in truth], list(script), vocabulary
        self.turn = [0] * len(self.truth)

    def chain(self, sequence: SequenceState, length: int) -> list[int]:
        truth, n = self.truth[sequence.index], len(sequence.tokens)
        assert sequence.tokens == truth[:n], "the text so far is not the target's own"
        right = self.script[self.turn[sequence.index] % len(self.script)]
        self.turn[sequence.index] += 1
        tokens = []
        for i in range(length):
            known = truth[n + i] if n + i < len(truth) else 0
            tokens.append(known if i < right else (known + 1 + i) % self.vocabulary)
        return tokens


class Wrong(Oracle):
    """Never right."""

    name = "wrong"

    def __init__(self, truth: Sequence[Sequence[int]], vocabulary: int = 97) -> None:
        super().__init__(truth, (0,), vocabulary)


class Branching(Oracle):
    """Trees: below each right token first a wrong one, with a child that is right elsewhere, then the right one."""

    name, width = "branching", 3

    def _draft(self, sequence: SequenceState, length: int) -> Draft:
        draft, at = Draft(), -1
        right = self.chain(sequence, length)
        for depth, token in enumerate(right):
            wrong = add(draft, (token + 1) % self.vocabulary, at, self.name)
            if depth + 1 < length:
                add(draft, right[depth + 1], wrong, self.name)
            at = add(draft, token, at, self.name)
        return draft


class Sampling(Scripted):
    """Draws drafts from a fixed distribution of the next token given the last, and says so: probs_VV[last] is the row.

    width: siblings drawn at each node, of which the last is followed.
    """

    name = "sampling"

    def __init__(self, probs_VV: Tensor, width: int = 1) -> None:
        super().__init__()
        self.probs_VV, self.width = probs_VV, width

    def _draft(self, sequence: SequenceState, length: int) -> Draft:
        draft, at, last = Draft(probs=[]), -1, sequence.tokens[-1]
        for _ in range(length):
            q_V, below = self.probs_VV[last], at
            for _ in range(self.width):
                last = int(torch.multinomial(q_V, 1, generator=self.generator))
                at = add(draft, last, below, self.name, q_V)
        return draft


class Spy(Composed):
    """Passes everything on to a drafter and keeps what it drafted: (sequence's index, its cached tokens, draft)."""

    def __init__(self, inner: Drafter) -> None:
        super().__init__([inner])
        self.inner = inner
        self.drafted: list[tuple[int, int, Draft]] = []

    def draft(self, sequences: Sequence[SequenceState], lengths: list[int], worth: Worth | None = None) -> list[Draft]:
        drafts = self.inner.draft(sequences, lengths, worth)
        self.drafted += [(s.index, s.cached, d) for s, d in zip(sequences, drafts, strict=True)]
        return drafts
