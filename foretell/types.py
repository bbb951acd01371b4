"""Words that the layers share: a batch, a draft, a verdict, and what methods and decoding ask of each other.

Shape letters, used as suffixes in the whole package:
B sequences in a batch, T positions of a row, R rows of one token-tree forward, L positions visible in the cache,
K depths of an MTP module, N rows flattened, D hidden width, V vocabulary, M vocabulary of the drafts (M <= V).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Generator, Tensor

IGNORE_INDEX = -100  # torch's cross_entropy default: a label that no loss counts
PAD_DOCUMENT = -1  # document number of padding


@dataclass
class Batch:
    """One micro-batch, right-padded. Methods derive their own view of it; the loader knows no method.

    labels are token-aligned as in transformers (labels[b, t] is input_ids[b, t] or IGNORE_INDEX), never shifted.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    document_BT: Tensor  # which packed document a token belongs to, PAD_DOCUMENT on padding
    position_ids_BT: Tensor  # restarts in each document
    hidden_BTD: Tensor | None = None  # hidden states kept while the target decoded: no second forward
    mtp_labels_BTK: Tensor | None = None  # labels of the depths, where a collator gave them; else derived from labels


@dataclass
class LossSum:
    """A loss before the one division: sums and counts, so that accumulation and ranks cannot change a gradient."""

    total: Tensor  # scalar, differentiable: sum over counted rows
    count: Tensor  # scalar: number of counted rows
    correct: Tensor  # scalar: counted rows whose argmax is the label (or the teacher's argmax)
    right_N: Tensor | None = None  # of each row, where one loss was asked: whether it is one of `correct`


@dataclass
class Draft:
    """Proposed tokens of one sequence: a tree below its last token.

    parents[i] is the index in tokens of token i's parent, or -1 for the sequence's last token; parents come first.
    probs is None where tokens were chosen by argmax or lookup (they then carry one-hot probabilities), else a row [V]
    per token: the distribution it was SAMPLED from. Rejection sampling is exact only under this promise.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probs: list[Tensor | None] | None = None
    confidence: list[float] = field(
        default_factory=list
    )  # the drafter's own probability of each token, given its parent
    sources: list[str] = field(default_factory=list)  # name of the drafter each token is from
    shares: dict[int, float] = field(default_factory=dict)  # what its Verdict says, once there is one

    def __len__(self) -> int:
        return len(self.tokens)

    def drawn(self, i: int) -> bool:
        """Whether token i was drawn from a distribution; else it was chosen."""
        return self.probs is not None and self.probs[i] is not None

    def add(self, token: int, parent: int, confidence: float, source: str, probs_V: Tensor | None = None) -> int:
        """Append a token below its parent's index; returns its own."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.confidence.append(confidence)
        self.sources.append(source)
        if self.probs is not None:
            self.probs.append(probs_V)
        return len(self.tokens) - 1


@dataclass
class Verdict:
    """What verification decided for one sequence: the accepted path (indices into Draft.tokens), then one token."""

    path: list[int]
    token: int
    shares: dict[int, float] = field(default_factory=dict)  # of drawn drafts that were reached: sum of min(p, q)


@dataclass
class Verification:
    """What one target forward did for one sequence."""

    drafted: int  # proposed tokens, of all branches
    depth: int  # length of the longest branch
    accepted: int  # accepted drafts that were emitted (after the cut at EOS)
    emitted: int  # tokens emitted, the target's own included
    sources: list[str]  # who proposed each emitted token; "target" for its own


@dataclass
class SequenceState:
    """One sequence while it is decoded. tokens holds prompt and output; the last token is not in the cache yet."""

    tokens: list[int]
    prompt_length: int
    index: int  # row of the caller's batch
    slot: int = -1  # row of the caches
    cached: int = 0  # tokens whose keys and values are cached: all but the last between rounds, or but the last span
    padding: list[int] = field(default_factory=list)  # ids that stood before the prompt; logits processors see them
    record: list[Verification] = field(default_factory=list)
    done: bool = False
    broken: bool = False  # its own states are no numbers any more: nothing is drafted for it, its slot is wiped
    reread_at: int = 0  # length of the text when it was read anew, since the model turned by other angles from there on
    most_tokens: int = sys.maxsize  # that it will have, where that is known of it alone
    most_drafts: int = sys.maxsize  # deepest that are made for it
    shared: int = 0  # leading tokens of its prompt that another text's slot held already

    @property
    def read_as(self) -> int:
        """How long the text was when its first tokens were read: what angles may depend on."""
        return max(self.prompt_length, self.reread_at)

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_length :]


# [N, V] scores -> those after the caller's temperature, top-k and the like, which look at scores alone
Warp = Callable[["Tensor"], "Tensor"]
# (drafter's name, each sequence's draft so far[, what others drafted]) -> for which one more step is worth its time
Worth = Callable[..., list[bool]]


class Watcher:
    """Told of every token that the target reads; keeps what it likes of it, by slot. decoding/loop.py calls."""

    def open(self, slots: int, capacity: int) -> None:
        """A new run: at most so many sequences at once, of at most so many tokens. Storage may grow with their use."""

    def start(self, slot: int) -> None:
        """A new sequence takes this slot."""

    def shares(self, slot: int, length: int) -> int:
        """How many of the first `length` tokens of the sequence in a slot one that begins alike can `share`: what keeps
        nothing of what it observes says all of them.
        """
        return 0

    def share(self, source: int, target: int, length: int) -> None:
        """A new sequence takes slot target, which may be source; its first `length` tokens are those in slot source,
        and are not observed again.
        """
        self.start(target)

    def hold(self, slots: int) -> None:
        """So many first slots are taken now, whoever is told of next."""

    def observe(self, sequences: Sequence[SequenceState], rows: Any, kept: list[list[int]]) -> None:
        """The target has read tokens: rows kept[b] of its forward are sequence b's newest cached positions."""

    def move(self, source: int, target: int, length: int) -> None:
        """The sequence in one slot now lives in another."""


class Drafter(Watcher):
    """Proposes tokens for sequences. One of your own gives `name` and `draft`, and of the rest what it needs."""

    name = "drafter"
    calls = 0  # forwards so far: what a step of drafting is; 0 where it makes none
    generator: Generator | None = None  # of its draws: the caller's, set before each run
    scores: Any = (
        None  # whose draws its drafts are to meet, a RowScores; set before each run, None where drafts are judged
    )

    def draft(self, sequences: Sequence[SequenceState], lengths: list[int], worth: Worth | None = None) -> list[Draft]:
        """At most lengths[b] tokens deep for sequence b; all 0 asks for nothing and must cost nothing.

        worth(name, drafts) is asked before each further step: a sequence's False ends its chain there. A chain goes on
        from its draft's newest token.
        """
        raise TypeError(f"{type(self).__name__} drafts nothing.")

    def borrow(self, cache: Any) -> None:
        """The target's cache, before each run, for passes of one's own: they write beyond what is cached."""

    def carriers(
        self, sequences: Sequence[SequenceState], drafts: list[Draft], adaptive: Any
    ) -> tuple[int, list[list[int]]]:
        """(K, of each sequence the rows that carry a block of K masks in the forward that verifies these drafts: 0 its
        last token, i + 1 its draft i); (0, ...) where no masks are read.
        """
        return 0, []

    def timing(self, spent: tuple[float, int]) -> dict[str, tuple[float, int]]:
        """(seconds, steps) that each drafter within spent of the last draft."""
        return {self.name: spent}


class ModuleDrafter(Drafter):
    """A module's own: what can also commit its tokens unverified, as spans."""

    draft_vocab_ids: Tensor | None = None  # [M] the tokens that logits speak of; None: all
    sample = False  # draw drafts from the module's distribution, instead of its best guesses
    guesses = 1  # likeliest tokens that each step offers; the chain goes on from the first

    def another(self, sample: bool) -> ModuleDrafter:
        """A drafter with storage of its own over the same weights."""
        raise TypeError(f"{type(self).__name__} has no copies.")

    def span(self, masks: int) -> None:
        """The next forward reads the last span, and below it so many masks where the method lays any."""

    def span_logits(
        self, sequences: Sequence[SequenceState], drafts: list[Draft], k: int, asked: list[int], rows: Any
    ) -> Tensor:
        """[B, M] of depth k below the last span, which `rows` are of; anything for a sequence with asked[b] < k."""
        raise TypeError(f"{type(self).__name__} commits no spans.")
