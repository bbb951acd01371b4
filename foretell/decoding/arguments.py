"""foretell's own arguments of a generate call: what they ask for, and what is wrong with them, before any work."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foretell.decoding.compose import Composed, as_drafter
from foretell.decoding.lookup import MAX_NGRAM, REMEMBERED, PromptLookup
from foretell.decoding.policies import SPANS, check_policy
from foretell.decoding.spans import span_drafts, threshold_of
from foretell.decoding.trees import Tree, check_tree
from foretell.types import Drafter, SequenceState, Warp

GUESSES = 4  # likeliest tokens of each step that "auto" chooses from
LAYOUTS = ("linear", "quadratic", "auto", "two_pass")
# what transformers' generate takes and does not hand on to a custom_generate
KEPT_BACK = ("tokenizer", "callers_streamer")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a call asks for, resolved; see MTPModel.generate. length: drafts a verification, or "auto"."""

    drafter: Any
    length: int | str
    layout: str | None
    tree: Tree | None
    masks: int
    policy: str
    threshold: float | None
    drawn: bool
    draft_dtype: str
    generator: torch.Generator | None
    slots: int
    history: int

    @classmethod
    def of(
        cls,
        mtp: Any,
        *,
        num_draft_tokens: int | str | None = None,
        policy: str = "lossless",
        confidence_threshold: float | None = None,
        drafter: str | Drafter | Sequence[Drafter] = "mtp",
        draft_sample_method: str = "greedy",
        draft_dtype: str = "auto",
        draft_tree: Sequence[Sequence[int]] | None = None,
        draft_layout: str | None = None,
        generator: torch.Generator | None = None,
        slots: int = 64,
        history: bool | int = False,
    ) -> Plan:
        """Raises ValueError for what does not fit the module, or each other."""
        check_policy(policy)
        threshold = threshold_of(policy, confidence_threshold)
        by_name = isinstance(drafter, str) and "mtp" in drafter.split("+")
        unknown = [] if not isinstance(drafter, str) else [n for n in drafter.split("+") if n not in ("mtp", "lookup")]
        if unknown:
            raise ValueError(f"drafter: got {drafter!r}, wanted 'mtp', 'lookup', 'mtp+lookup', or Drafter objects.")
        if not isinstance(drafter, str):
            _as_drafters(drafter)
        if policy in SPANS:
            drawn = None if draft_sample_method == "greedy" else draft_sample_method
            how = {"draft_tree": draft_tree, "draft_layout": draft_layout, "draft_sample_method": drawn}
            num_draft_tokens = span_drafts(policy, num_draft_tokens, mtp.module.longest_draft, drafter, **how)
        depth, module = mtp.mtp_config.depth, mtp.module
        usual = draft_layout or module.usual_layout
        length = depth + (usual == "two_pass") if num_draft_tokens is None else num_draft_tokens
        if not (length == "auto" or (isinstance(length, int) and not isinstance(length, bool) and length >= 0)):
            raise ValueError(f"num_draft_tokens: got {length!r}, wanted an integer of at least 0, or 'auto'.")
        lays = bool(module.lays_masks and by_name and length)
        if draft_layout is not None and (draft_layout not in LAYOUTS or not lays):
            raise ValueError(
                f"draft_layout: got {draft_layout!r} for method {mtp.mtp_config.method!r}, drafter {drafter!r} and "
                f"num_draft_tokens={length!r}, wanted one of {', '.join(LAYOUTS)} for a masked module that drafts."
            )
        layout = usual if lays and policy not in SPANS else None
        longest = depth + (layout == "two_pass") if layout else module.longest_draft
        if drafter == "mtp" and isinstance(length, int) and policy not in SPANS and longest and length > longest:
            raise ValueError(
                f"num_draft_tokens: got {length}, but this module drafts at most {longest} (depth={depth}); "
                "shared_module=True can be reused further."
            )
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
            raise ValueError(f"slots: got {slots!r}, wanted an integer of at least 1.")
        if draft_sample_method not in ("greedy", "probabilistic"):
            raise ValueError(f"draft_sample_method: got {draft_sample_method!r}, wanted 'greedy' or 'probabilistic'.")
        if not isinstance(history, int) or history < 0:
            raise ValueError(f"history: got {history!r}, wanted True, False or a number of tokens to remember.")
        looks = isinstance(drafter, str) and "lookup" in drafter.split("+")
        if history and (not looks or policy != "lossless" or draft_sample_method != "greedy"):
            raise ValueError(
                f"history: got {history!r} with drafter {drafter!r}, policy {policy!r} and {draft_sample_method!r} "
                "drafts, wanted 'lookup' among the drafters, policy 'lossless' and greedy drafts: else what was said "
                "before would have a say in the text. Leave it out, or change those."
            )
        like = next(module.parameters(), mtp.target.head.weight)
        own_dtype = str(like.dtype).removeprefix("torch.")
        if like.is_floating_point() and like.element_size() < 2:
            raise ValueError(
                f"module: got weights of {own_dtype}, wanted 16 bits or more: torch keeps such numbers but computes "
                "little with them. mtp.module.to(torch.bfloat16); draft_dtype='int8' drafts in fewer bits."
            )
        on_cpu = mtp.device.type == "cpu" and own_dtype in ("float32", "bfloat16")
        possible = ["auto", own_dtype, *(("bfloat16", "int8") if on_cpu else ())]
        if draft_dtype not in possible:
            raise ValueError(
                f"draft_dtype: got {draft_dtype!r} for a module of {own_dtype} on {mtp.device.type}, wanted one of "
                f"{', '.join(dict.fromkeys(possible))}."
            )
        if draft_dtype == "auto" and policy in SPANS:  # what the module says is the text
            draft_dtype = own_dtype
        tree = None if draft_tree is None else check_tree(draft_tree, depth)
        fixed = length not in (0, "auto") and draft_sample_method == "greedy"
        if tree is not None and not (module.guesses_trees and by_name and fixed):
            raise ValueError(
                "draft_tree: wanted parallel heads (method 'heads') among the drafters, num_draft_tokens of at least 1 "
                f"and greedy drafts; got method {mtp.mtp_config.method!r}, drafter {drafter!r}, "
                f"num_draft_tokens={length!r}, {draft_sample_method!r} drafts."
            )
        masks = depth
        if isinstance(length, int):  # in two passes the first draft is the target's own token
            masks = min(max(length - (layout == "two_pass"), 1), depth)
        return cls(
            drafter=drafter,
            length=length,
            layout=layout,
            tree=tree,
            masks=masks,
            policy=policy,
            threshold=threshold,
            drawn=draft_sample_method == "probabilistic",
            draft_dtype=draft_dtype,
            generator=generator,
            slots=slots,
            history=REMEMBERED if history is True else int(history),
        )

    def remember(self, space: Any, sequence: SequenceState) -> None:
        """Keep an answer that is whole, with what stood before its first token."""
        if self.history:
            space.history.add(sequence.tokens[max(sequence.prompt_length - MAX_NGRAM, 0) :], self.history)

    def drafters(self, mtp: Any, space: Any, warp: Warp | None) -> Drafter | None:
        """Who drafts in this workspace, with the module's part set up; warp: what drawn drafts go through, None where
        it drafts by argmax.
        """
        if self.length == 0:
            return None
        drafter = self.drafter
        if isinstance(drafter, str):
            names = sorted(drafter.split("+"), key=lambda name: name != "lookup")  # what costs nothing proposes first
            own: Any = mtp.drafter(space, warp is not None, self.draft_dtype) if "mtp" in names else None
            if own is not None:
                own.warp = warp
                own.guesses = GUESSES if self.length == "auto" and warp is None and self.layout in (None, "auto") else 1
            if own is not None and mtp.module.guesses_trees:
                own.tree = self.tree
            if own is not None and mtp.module.lays_masks:
                own.layout, own.masks = self.layout or "quadratic", self.masks
            lookup = PromptLookup(history=space.history if self.history else None)
            drafter = [own if name == "mtp" else lookup for name in names]
        several = _as_drafters(drafter)
        return several[0] if len(several) == 1 else Composed(several)


def _as_drafters(given: Any) -> list[Drafter]:
    return [as_drafter(one) for one in (given if isinstance(given, (list, tuple)) else [given])]


OWN = tuple(name for name in inspect.signature(Plan.of).parameters if name != "mtp")


def open_to_transformers() -> inspect.Signature:
    """The signature of a custom_generate that gets all that was given to transformers' generate.

    transformers (5.20 to 5.24) hands on what stands in the signature, and looks at it in a function that has taken the
    tokenizer, the streamer and others out of the caller's keywords. They go back in, under names that are asked for.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "_extract_generation_mode_kwargs":
        frame = frame.f_back
    if frame is not None:
        taken = {**frame.f_locals, **frame.f_locals.get("generation_mode_kwargs", {})}
        refused = [name for name in ("assistant_model", "synced_gpus") if taken.get(name)]
        if refused:  # further on transformers would ask for more about an assistant, and forget the other
            raise ValueError(
                f"foretell's generate cannot honour: {', '.join(refused)}. Who drafts stands in `drafter`, and ranks "
                "decode on their own."
            )
        for name in KEPT_BACK:
            value = taken.get(name.removeprefix("callers_"))
            if value is not None:
                frame.f_locals["kwargs"][name] = value
    names = ("model", "input_ids", *OWN, *KEPT_BACK)
    return inspect.Signature([inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names])
