"""What every method shares: the settings' and the modules' base classes, the registry, and settings found by name."""

# B sequences, T positions, K depths, N rows flattened, D hidden width, V vocabulary, M vocabulary of the drafts.

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from foretell.config import ConfigError, from_dict
from foretell.data.vocabulary import frequent_tokens, usual_size
from foretell.methods.reading import below_text, owners_of
from foretell.models.bigram_head import BigramHead
from foretell.models.fast import fast_view
from foretell.models.target import Target, TargetRows, linear_of
from foretell.ops.losses import dpace, expected_length, linear_loss
from foretell.ops.sampling import draw, over_vocabulary, to_probs
from foretell.ops.shift import ahead, labels_of
from foretell.types import IGNORE_INDEX, Batch, LossSum

METHODS = {
    "sequential": "foretell.methods.sequential:SequentialConfig",
    "heads": "foretell.methods.heads:HeadsConfig",
    "masked": "foretell.methods.masked:MaskedConfig",
}

GradientMode = Literal["disabled", "standalone", "joint"]
Supervision = Literal["labels", "teacher", "teacher_hard", "student_forced", "student_forced_soft", "student_forced_gt"]
SOFT: tuple[Supervision, ...] = ("teacher", "student_forced_soft")  # learned from a distribution, by any kind of loss
LossKind = Literal["ce", "kl", "reverse_kl", "tv", "lk", "lk_hybrid", "e2e_tv"]
REREADS: tuple[Supervision, ...] = ("student_forced", "student_forced_soft")  # the teacher reads proposals
DepthWeights = Literal["uniform", "harmonic", "exponential", "rows", "dpace"]


@dataclass(kw_only=True)
class MTPConfig:
    """Settings of an MTP module; each method adds its own. `method` says which class a saved file means."""

    method: ClassVar[str] = ""
    free: ClassVar[frozenset[str]] = frozenset()  # settings that a resumed run may change: no number depends on them
    depth: int = field(default=1, metadata={"help": "K: how many tokens beyond the ordinary next one are predicted."})
    hidden_source: Literal["post_norm", "pre_norm"] = field(
        default="post_norm", metadata={"help": "The target's states after or before its final norm."}
    )
    draft_vocab_size: int | Literal["auto"] | None = field(
        default=None,
        metadata={"help": "Draft only the most frequent tokens, lossless all the same; auto: as many as usually pay."},
    )
    markov_rank: int = field(
        default=0, metadata={"help": "Rank of a bigram added to the drafts' logits (DSpark's Markov head); 0: none."}
    )
    confidence_head: bool = field(
        default=False, metadata={"help": "A head that learns whether a draft is accepted; trees grow by what it says."}
    )

    def build(self, target: Target) -> Any:
        """The method's nn.Module for a target, initialised."""
        raise TypeError(f"{type(self).__name__} describes no method; use one of {', '.join(METHODS)}.")

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, in plain sentences."""
        found = []
        if not isinstance(self.depth, int) or self.depth < 1:
            found.append(f"depth: got {self.depth!r}, wanted an integer of at least 1.")
        if isinstance(self.draft_vocab_size, int) and self.draft_vocab_size < 2:
            found.append(f"draft_vocab_size: got {self.draft_vocab_size}, wanted at least 2 tokens, or none for all.")
        if not isinstance(self.markov_rank, int) or self.markov_rank < 0:
            found.append(f"markov_rank: got {self.markov_rank!r}, wanted a whole number, 0 for none.")
        return found

    def __post_init__(self) -> None:
        found = self.problems()
        if found:
            raise ConfigError(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the method's name first."""
        return {"method": self.method, **asdict(self)}

    @staticmethod
    def from_any(source: MTPConfig | dict[str, Any] | str | Path) -> MTPConfig:
        """Settings themselves, a dict with `method`, a YAML file's path, or the name of a preset in recipes/."""
        if isinstance(source, MTPConfig):
            return source
        if isinstance(source, dict):
            values = dict(source)
            name = values.pop("method", None)
            if name not in METHODS:
                raise ConfigError([f"method: got {name!r}, wanted one of {', '.join(METHODS)}."])
            return from_dict(config_class(name), values)
        return MTPConfig.from_any(load_preset(source)["module"])


class MTPModule(nn.Module):
    """What the modules of all methods share: labels, losses and logits of each depth from its states.

    A method gives depth_states (what each depth's output head reads) and, if its heads are its own, unembedding.
    """

    guesses_trees = False  # whether its drafter has a `tree` to be told which guesses to propose
    lays_masks = False  # whether its drafts come of mask rows that ride in the target's forward
    usual_layout: str | None = None  # which rows carry masks, where the caller does not say; of modules that lay any
    shortest_text = 0  # tokens of a text below which there is nothing to train
    teacher: Target | None = None  # of proposals, where the target itself learns: a frozen copy, never saved
    reference = "the target"  # whose text a lossless output is
    reads_states = True  # whether the target's states are all it needs of a text, so that kept ones will do
    draft_vocab_ids: Tensor | None

    def __init__(self, config: MTPConfig, target: Target) -> None:
        super().__init__()
        size = config.draft_vocab_size
        self.chooses_vocabulary = size == "auto"  # training does, from what it reads
        if size == "auto":
            size = usual_size(target.vocab_size)
            config = replace(config, draft_vocab_size=size)
        self.config = config
        if size is not None and size > target.vocab_size:
            raise ValueError(f"draft_vocab_size: got {size}, wanted at most the model's {target.vocab_size}.")
        self._end_ids = [i for i in target.end_ids if i < target.vocab_size]
        # until set_draft_vocabulary: the lowest ids, often bytes and short words
        ids_M = None if size is None else frequent_tokens([], size, target.vocab_size, self._end_ids).to(target.device)
        self.register_buffer("draft_vocab_ids", ids_M)
        self.bigram: BigramHead | None = None
        if config.markov_rank or config.confidence_head:
            vocabulary = target.vocab_size if size is None else size
            self.bigram = BigramHead(target, config.markov_rank, config.confidence_head, vocabulary)

    @property
    def longest_draft(self) -> int:
        """Tokens beyond the target's own that it can say in one round."""
        return self.config.depth

    def set_draft_vocabulary(self, ids_M: Tensor) -> None:
        """Which tokens are drafted: sorted ids, as many as draft_vocab_size says."""
        if self.draft_vocab_ids is None or ids_M.shape != self.draft_vocab_ids.shape:
            raise ValueError(
                f"got {tuple(ids_M.shape)} draft tokens, wanted draft_vocab_size={self.config.draft_vocab_size}."
            )
        missing = sorted(set(self._end_ids) - set(ids_M.tolist()))
        if missing:
            raise ValueError(
                f"draft tokens: got {len(ids_M)} without the end tokens {missing}, wanted them among these: the end of "
                "a text could never be drafted. Put them in."
            )
        self.draft_vocab_ids.copy_(ids_M)
        self.chooses_vocabulary = False

    def frozen(self) -> list[nn.Parameter]:
        """Parameters that never learn."""
        return []

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters that weight decay leaves alone: gains of norms and biases."""
        return [parameter for parameter in self.parameters() if parameter.dim() < 2]

    def matrices(self) -> list[nn.Parameter]:
        """Weights that Muon is for: of linear maps between states, not of embeddings nor of output matrices."""
        linears = (part.weight for part in self.modules() if isinstance(part, nn.Linear))
        vocabulary = None if self.bigram is None or self.bigram.after is None else self.bigram.after.weight
        return [w for w in linears if w.requires_grad and w is not vocabulary and len(w) > 1]

    def as_peft(self, target: Target, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Settings and tensors of a plain PEFT adapter, where the module is one; state: its tensors, whole."""
        return None

    def text_learns(self, joint: bool) -> bool:
        """Whether training moves what ordinary tokens say: then they have a next-token loss of their own."""
        return joint

    def anchored(self, supervision: Supervision, joint: bool) -> bool:
        """Whether tokens that carry masks learn as those do (`LossSum` anchor), instead of the data's next token."""
        return False

    def read(self, target: Target, batch: Batch, learns: bool, joint: bool) -> TargetRows | None:
        """The target's states of a text, with gradient if it learns (joint: from the module too); None: the losses read
        it themselves.
        """
        with nullcontext() if learns else torch.no_grad():
            return target.forward_text(batch.input_ids_BT, batch.position_ids_BT)

    def choose(self, batch: Batch, generator: torch.Generator) -> Tensor | None:
        """[B, T, K] labels that a training step is to learn, where it learns a random part; None: all of them."""
        return None

    def source(self, rows: TargetRows) -> Tensor:
        """h^0 of the chain."""
        if self.config.hidden_source == "post_norm":
            return rows.post_norm_BRD
        assert rows.pre_norm_BRD is not None, "the target's forward must capture the states before its final norm"
        return rows.pre_norm_BRD

    def depth_states(self, target: Target, batch: Batch, source_BTD: Tensor, detach: bool) -> Iterator[Tensor]:
        """[B, T, D] for each depth, what its output head reads."""
        raise TypeError(f"{type(self).__name__} says nothing about its depths.")

    def taught_states(self, target: Target, batch: Batch, source_BTD: Tensor, detach: bool) -> Iterator[Tensor]:
        """depth_states of the rows that have a label of some depth; what others hold counts for nothing."""
        return self.depth_states(target, batch, source_BTD, detach)

    @staticmethod
    def embedded_ahead(target: Target, batch: Batch, k: int, detach: bool, at_BO: Tensor | None = None) -> Tensor:
        """[B, T, D] embeddings of the tokens k ahead, zeros where there are none; or [B, O, D], of columns at_BO."""
        ids_BT, inside_BT = ahead(batch.input_ids_BT, k, batch.document_BT, fill=0)
        if at_BO is not None:
            ids_BT, inside_BT = ids_BT.gather(1, at_BO), inside_BT.gather(1, at_BO)
        embedding_BTD = target.embed(ids_BT)
        embedding_BTD = embedding_BTD.detach() if detach else embedding_BTD
        return embedding_BTD * inside_BT[..., None].to(embedding_BTD.dtype)

    def propose(
        self, target: Target, batch: Batch, source_BTD: Tensor, owner_BO: Tensor, first_BO: Tensor, detach: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """(tokens [B, O, K], states of the depths [B, O, D]) of chains that start at chosen tokens with the target's
        own next tokens first_BO: depth k speaks of what follows token k of the chain, and depth k + 1 reads that.
        """
        ids, states = [first_BO], []
        for k, state_BTD in enumerate(self.depth_states(target, batch, source_BTD, detach), start=1):
            states.append(state_BTD.gather(1, owner_BO[..., None].expand(-1, -1, state_BTD.shape[2])))
            ids.append(self.guess(target, states[-1], k, ids[-1]))
        return torch.stack(ids[:-1], dim=-1), states

    @torch.no_grad()
    def guess(self, target: Target, states: Tensor, k: int, before: Tensor, sample: bool = False) -> Tensor:
        """[...] the tokens that depth k says, of states [..., D] and the tokens before: the likeliest or drawn ones, a
        chunk of rows at a time.
        """
        chosen = []
        for part_ND, before_N in zip(states.flatten(0, -2).split(256), before.flatten().split(256), strict=True):
            logits_NM = self.logits(target, part_ND, k, before_N)
            chosen.append(draw(to_probs(logits_NM)) if sample else logits_NM.argmax(-1))
        ids = torch.cat(chosen).view(states.shape[:-1])
        return ids if self.draft_vocab_ids is None else self.draft_vocab_ids[ids]

    def target_head(self, target: Target, detach: bool) -> tuple[Tensor, Tensor | None]:
        """The target's output head over the draft vocabulary: weight [M, D] and bias [M] or None."""
        weight, bias = target.head_matrix(detach)
        if self.draft_vocab_ids is not None:
            weight = weight.index_select(0, self.draft_vocab_ids)
            bias = None if bias is None else bias.index_select(0, self.draft_vocab_ids)
        return weight, bias

    def draft_head(self, target: Target, dtype: str) -> nn.Module:
        """target_head for decoding, in this draft_dtype: packed, its rows gathered once."""
        own = type(target.head) is not nn.Linear or dtype == str(target.head.weight.dtype).removeprefix("torch.")
        if self.draft_vocab_ids is None and own:
            return target.view().get_output_embeddings()
        weight, bias = self.target_head(target, detach=True)
        small = linear_of(weight, bias)
        if weight.dtype != target.dtype:  # a wide head over a narrow body
            small.register_forward_pre_hook(lambda _small, given: (given[0].to(weight.dtype),))
        return fast_view(nn.Sequential(small), dtype)[0]

    @torch.no_grad()
    def logits(self, target: Target, states: Tensor, k: int, before: Tensor) -> Tensor:
        """[..., M] of depth k, of states [..., D] and the tokens before the predicted ones."""
        weight_MD, bias_M = self.unembedding(target, k, detach=True)
        logits = F.linear(states, weight_MD.to(states.dtype), bias_M)
        return target.scaled(logits if self.bigram is None else self.bigram.added(logits, before))

    def unembedding(self, target: Target, depth: int, detach: bool) -> tuple[Tensor, Tensor | None]:
        """The output head of a depth (1-based), as target_head; by default the target's own."""
        return self.target_head(target, detach)

    def labels(self, batch: Batch) -> Tensor:
        """[B, T, K] labels of the depths, IGNORE_INDEX where a depth has nothing to learn."""
        return labels_of(batch, self.config.depth)

    def losses(
        self,
        target: Target,
        batch: Batch,
        rows: TargetRows | None,
        *,
        detach: bool,
        supervision: Supervision,
        kind: LossKind,
        coefficients_K: Tensor | None = None,
        dynamic: bool = False,
        depths: int | None = None,
    ) -> list[LossSum]:
        """One LossSum a depth. detach: `standalone`, no gradient to states, embeddings or output head of the target.

        rows: as `read` gave them. coefficients_K: what the depths' totals will be multiplied by; only a stream asks.
        dynamic: rows weigh as D-PACE says. depths: only so many learn; the others are not even read, and are zeros.
        """
        assert rows is not None, "this method reads the target's states"
        if supervision in REREADS:
            return self.losses_of_proposals(target, batch, rows, detach, supervision, kind, dynamic, depths)
        source_BTD, post_BTD = self.source(rows), rows.post_norm_BRD.detach()
        labels_BTK = self.labels(batch)
        if supervision == "teacher_hard":
            labels_BTK = self._argmax_labels(target, labels_BTK, post_BTD)
        if self.draft_vocab_ids is not None and supervision != "teacher":
            labels_BTK = self.to_draft_ids(labels_BTK, target.vocab_size)
        teacher_MD, teacher_bias_M = self.target_head(target, detach=True)
        T, D = post_BTD.shape[1], post_BTD.shape[2]
        learned, said = range(1, (depths or self.config.depth) + 1), []
        states = self.taught_states(target, batch, source_BTD.detach() if detach else source_BTD, detach)
        for k, state_BTD in zip(learned, states, strict=False):
            what: dict[str, Any] = {"labels_N": labels_BTK[..., k - 1].reshape(-1)}
            if supervision == "teacher":
                at = torch.arange(post_BTD.shape[0] * T, device=post_BTD.device)
                what |= {
                    "teacher_hidden_ND": post_BTD.reshape(-1, D),
                    "teacher_weight_MD": teacher_MD,
                    "teacher_bias_M": teacher_bias_M,
                    # position i of depth k learns from what the target says k later; past the row's end nothing counts
                    "teacher_rows_N": torch.where(at % T + k < T, at + k, at),
                }
            before_N = ahead(batch.input_ids_BT, k, batch.document_BT, fill=0)[0].flatten()
            said.append(self.depth_loss(target, state_BTD.reshape(-1, D), k, before_N, detach, kind, dynamic, **what))
        return self._all_depths(said, kind, dynamic)

    def depth_loss(
        self,
        target: Target,
        states_ND: Tensor,
        k: int,
        before_N: Tensor,
        detach: bool,
        kind: LossKind,
        dynamic: bool,
        **what: Any,
    ) -> tuple[LossSum, Tensor | None]:
        """(linear_loss of depth k, one row a group where depths are weighed together; [N] of the confidence's own loss,
        zero where nothing counts). what: labels and a teacher.
        """
        if kind == "e2e_tv" or dynamic:
            what = {"groups_N": torch.arange(len(states_ND), device=states_ND.device), "groups": len(states_ND), **what}
        found = linear_loss(
            **self.spoken(target, states_ND, k, before_N, detach), kind="tv" if kind == "e2e_tv" else kind, **what
        )
        return found, self._confidence_loss(states_ND, before_N, found.right_N, what["labels_N"])

    def spoken(self, target: Target, states_ND: Tensor, k: int, before_N: Tensor, detach: bool) -> dict[str, Any]:
        """What linear_loss takes of the student: depth k's states and head, the bigram in both."""
        weight_MD, bias_M = self.unembedding(target, k, detach)
        learned_from = 0 if weight_MD.requires_grad else weight_MD.shape[1]
        if self.bigram is not None:
            states_ND, weight_MD = self.bigram.widened(states_ND, weight_MD, before_N)
        shape = {"learned_from": learned_from} if weight_MD.requires_grad else {}
        return {"hidden_ND": states_ND, "weight_MD": weight_MD, "bias_M": bias_M, **shape, **target.loss_scaling}

    def _confidence_loss(
        self, states_ND: Tensor, before_N: Tensor, right_N: Tensor | None, labels_N: Tensor
    ) -> Tensor | None:
        if self.bigram is None or self.bigram.sure is None or right_N is None:
            return None
        sure_N = self.bigram.sureness(states_ND, before_N)
        loss_N = F.binary_cross_entropy_with_logits(sure_N, right_N.to(sure_N.dtype), reduction="none")
        return loss_N.masked_fill(labels_N == IGNORE_INDEX, 0.0)

    def _all_depths(self, said: list[tuple[LossSum, Tensor | None]], kind: str, dynamic: bool) -> list[LossSum]:
        """One LossSum a depth: rows weighed over their depths where the loss says so, and depths that do not learn now,
        connected to every parameter all the same: other ranks wait for the gradients.
        """
        out = [found for found, _ in said]
        if kind == "e2e_tv" or dynamic:
            out = expected_length(out) if kind == "e2e_tv" else dpace(out, kind)
        for found, (_, sure_N) in zip(out, said, strict=True):
            found.total = found.total if sure_N is None else found.total + sure_N.sum()
        if len(out) < self.config.depth:
            nothing = torch.zeros_like(out[0].count)
            whole = (
                p for p in self.parameters() if p.requires_grad and not hasattr(p, "full_tensor")
            )  # FSDP needs none
            idle = sum((0.0 * p.sum() for p in whole), 0.0 * out[0].total)
            out += [LossSum(idle, nothing, nothing) for _ in range(self.config.depth - len(out))]
        return out

    def losses_of_proposals(
        self,
        target: Target,
        batch: Batch,
        rows: TargetRows,
        detach: bool,
        supervision: Supervision,
        kind: LossKind,
        dynamic: bool,
        depths: int | None,
    ) -> list[LossSum]:
        """One LossSum a depth, of chains that read what they drafted (methods/student_forced.py says why).

        Every token with a label starts a chain. Rows of other positions that a chain attends to have read the data's
        tokens, as in drafting those before it have read known ones.
        """
        labels_BTK, teacher, D = self.labels(batch), self.teacher or target, target.hidden_size
        carries_BT = (labels_BTK != IGNORE_INDEX).any(-1)
        owner_BO, valid_BO = owners_of(carries_BT, max(int(carries_BT.sum(1).amax()), 1))
        with torch.no_grad():
            own_ND = rows.post_norm_BRD.gather(1, owner_BO[..., None].expand(-1, -1, D)).flatten(0, 1)
            at_N = torch.arange(len(own_ND), device=own_ND.device)
            first_BO = chosen_tokens(target.logits, own_ND, at_N).view_as(owner_BO)
        source_BTD = self.source(rows).detach() if detach else self.source(rows)
        ids_BOK, states = self.propose(target, batch, source_BTD, owner_BO, first_BO, detach)
        read_BOKD = below_text(teacher, batch, owner_BO, valid_BO, ids_BOK.shape[2]).reread(ids_BOK)
        teacher_MD, teacher_bias_M = self.target_head(teacher, detach=True)
        said = []
        for k, state_BOD in enumerate(states[:depths], start=1):
            counts_BO = (labels_BTK[..., k - 1].gather(1, owner_BO) != IGNORE_INDEX) & valid_BO
            read_ND = read_BOKD[:, :, k - 1].flatten(0, 1)
            what: dict[str, Any] = {}
            if supervision in SOFT:
                what = {"teacher_hidden_ND": read_ND, "teacher_weight_MD": teacher_MD}
                what |= {"teacher_bias_M": teacher_bias_M, "teacher_rows_N": at_N}
                label_N = first_BO.flatten()  # says no more than that the row counts
            else:
                label_N = chosen_tokens(teacher.logits, read_ND, at_N)
                label_N = label_N if self.draft_vocab_ids is None else self.to_draft_ids(label_N, target.vocab_size)
            what["labels_N"] = label_N.masked_fill(~counts_BO.flatten(), IGNORE_INDEX)
            before_N = ids_BOK[..., k - 1].flatten()
            said.append(self.depth_loss(target, state_BOD.flatten(0, 1), k, before_N, detach, kind, dynamic, **what))
        return self._all_depths(said, kind, dynamic)

    def to_draft_ids(self, labels: Tensor, vocab_size: int) -> Tensor:
        """Labels as indices into the draft vocabulary, IGNORE_INDEX where they are not in it."""
        table_V = labels.new_full((vocab_size,), IGNORE_INDEX)
        table_V[self.draft_vocab_ids] = torch.arange(len(self.draft_vocab_ids), device=labels.device)
        return torch.where(labels == IGNORE_INDEX, labels, table_V[labels.clamp(min=0)])

    @torch.no_grad()
    def _argmax_labels(self, target: Target, labels_BTK: Tensor, post_BTD: Tensor) -> Tensor:
        """The target's own choice in each counted label's place, a chunk of rows at a time."""
        choices_BT = labels_BTK.new_full(post_BTD.shape[:2], IGNORE_INDEX)
        T = choices_BT.shape[1]
        needed_BT = torch.zeros_like(choices_BT, dtype=torch.bool)
        for k in range(1, labels_BTK.shape[2] + 1):
            needed_BT[:, k:] |= labels_BTK[:, : T - k, k - 1] != IGNORE_INDEX
        at = needed_BT.nonzero()
        for part in at.split(256):
            choices_BT[part[:, 0], part[:, 1]] = target.logits(post_BTD[part[:, 0], part[:, 1]]).argmax(-1)
        out_BTK = torch.full_like(labels_BTK, IGNORE_INDEX)
        for k in range(1, labels_BTK.shape[2] + 1):
            counted_BT = labels_BTK[:, : T - k, k - 1] != IGNORE_INDEX
            out_BTK[:, : T - k, k - 1] = torch.where(counted_BT, choices_BT[:, k:], IGNORE_INDEX)
        return out_BTK

    @torch.no_grad()
    def draft_logits(self, target: Target, batch: Batch, rows: TargetRows) -> Tensor:
        """[B, T, K, V]: what depth k says at t about token t+1+k; -inf for tokens outside the draft vocabulary."""
        out = []
        for k, state_BTD in enumerate(self.depth_states(target, batch, self.source(rows), detach=True), start=1):
            logits = self.logits(target, state_BTD, k, ahead(batch.input_ids_BT, k, batch.document_BT, fill=0)[0])
            out.append(over_vocabulary(logits, self.draft_vocab_ids, target.vocab_size))
        return torch.stack(out, dim=2)


@torch.no_grad()
def chosen_tokens(
    logits: Callable[[Tensor], Tensor], states_ND: Tensor, rows_N: Tensor, sample: bool = False
) -> Tensor:
    """A model's own next tokens at these rows of its states, the likeliest or drawn ones; each row is asked once."""
    rows_U, at_N = rows_N.unique(return_inverse=True)
    found = (logits(states_ND[part]) for part in rows_U.split(256))
    return torch.cat([draw(to_probs(logits_NV)) if sample else logits_NV.argmax(-1) for logits_NV in found])[at_N]


def config_class(method: str) -> type[MTPConfig]:
    """The settings class of a method's name."""
    module, name = METHODS[method].split(":")
    return getattr(importlib.import_module(module), name)


def recipes_folder() -> Path:
    """Where the presets lie: beside the package in a checkout, inside it when installed."""
    beside = Path(__file__).parents[2] / "recipes"
    return beside if beside.is_dir() else Path(__file__).parents[1] / "recipes"


def load_preset(name: str | Path) -> dict[str, Any]:
    """{"module": settings of the module, "training": arguments} of a preset's name or a YAML file's path.

    Raises ConfigError for a name that is neither, listing the presets.
    """
    path = Path(name)
    if not path.is_file():
        path = recipes_folder() / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in recipes_folder().glob("*.yaml")))
        raise ConfigError([f"preset: got {str(name)!r}, wanted a YAML file or one of: {names}."])
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or not isinstance(values.get("module"), dict):
        raise ConfigError(
            [f"{path}: wanted a mapping with a `module` section (and `training`), got {type(values).__name__}."]
        )
    unknown = sorted(set(values) - {"module", "training", "about", "measured"})
    if unknown:
        raise ConfigError([f"{path}: unknown sections {', '.join(unknown)}; wanted about, module, training, measured."])
    return {"module": values["module"], "training": dict(values.get("training") or {})}
