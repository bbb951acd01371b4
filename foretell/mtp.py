"""MTPModel: a target model together with its MTP module, as PeftModel is a model together with its adapter."""

# B sequences, T positions, K depths, D hidden width, V vocabulary.

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foretell.checkpoint import check_target, load_tensors, read_config, save_module, shipped
from foretell.data.collate import to_batch
from foretell.decoding.adaptive import COUNTED, COUNTED_STEP, AdaptiveLength, CostCurve, FixedLength
from foretell.decoding.arguments import Plan
from foretell.decoding.generate import MTPGenerate, MTPGenerateOutput
from foretell.decoding.lookup import History
from foretell.decoding.policies import SPANS
from foretell.decoding.spans import SpanLength
from foretell.decoding.workspaces import Workspace, Workspaces
from foretell.methods.base import MTPConfig
from foretell.methods.learning import Learning, in_eval_mode
from foretell.models.fast import copy_key
from foretell.models.target import Target
from foretell.types import Drafter, ModuleDrafter

LONGEST_AUTO = 10  # deepest draft that num_draft_tokens="auto" considers


class MTPModel(Learning):
    """`model` is the target, `module` what looks further ahead. The target's weights are never copied.

    What is not MTPModel's own is the target's, as with PeftModel: get_input_embeddings, num_parameters, ...
    """

    stores_target = False  # whether save_pretrained stores the target too: trainers say so of a target that learns
    is_quantized = False  # to trainers: a module of whole numbers learns beside the target, however that is stored

    def __init__(self, model: nn.Module, config: MTPConfig) -> None:
        super().__init__()
        self.model = model
        self.target = _target_of(model)
        self.module = config.build(self.target)
        self.mtp_config: MTPConfig = self.module.config  # with a size where "auto" was asked for
        self.notes: dict[str, Any] = {}  # what trained it; saved with it
        # the module takes the target's mode, and nobody changes the target's
        self.training = model.training
        self.module.train(model.training)
        self._workspaces = Workspaces()
        self._curve: CostCurve | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__"):
                raise
            return getattr(self.model, name)

    @property
    def config(self) -> Any:
        """The target's config, as transformers' Trainer wants to see it."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the target is."""
        return self.target.device

    @property
    def _no_split_modules(self) -> Any:
        """Layer classes that FSDP shards one by one: the target's, of which the module's blocks are too."""
        return getattr(self.model, "_no_split_modules", None)

    # -- storage -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
        """Write mtp_config.json and mtp_model.safetensors; and, if it learned with the module, the target (or its
        adapter) as its own save_pretrained stores it, which takes kwargs.

        state_dict: all tensors of this MTPModel, gathered elsewhere (sharded training).
        """
        target_state = None
        if state_dict is None:
            module_state, about_target = self.module.state_dict(), self.target.fingerprint()
        else:
            module_state = {n.removeprefix("module."): t for n, t in state_dict.items() if n.startswith("module.")}
            target_state = {n.removeprefix("model."): t for n, t in state_dict.items() if n.startswith("model.")}
            named = ((n.replace("_checkpoint_wrapped_module.", ""), p) for n, p in self.named_parameters())
            about_target = self.target.fingerprint({id(p): state_dict[n] for n, p in named if n in state_dict})
        peft = self.module.as_peft(self.target, module_state)
        save_module(module_state, self.mtp_config, about_target, folder, self.notes, peft)
        if self.stores_target:
            self.model.save_pretrained(folder, state_dict=target_state, **kwargs)

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | Path) -> MTPModel:
        """Load a module onto its target.

        Raises ValueError for another architecture, size or vocabulary and for missing, unknown or misshapen tensors, by
        name; warns when the target's weights are others than the module was trained for.
        """
        about = read_config(folder)
        mtp = cls._fitting(model, about, folder)
        load_tensors(mtp.module, folder)
        mtp.notes = about.get("notes") or {}
        return mtp

    @classmethod
    def _fitting(cls, model: nn.Module, about: dict[str, Any], folder: str | Path) -> MTPModel:
        check_target(about, _target_of(model), folder)
        return cls(model, MTPConfig.from_any(about["config"]))

    @classmethod
    def from_native(cls, model: nn.Module, folder: str | Path) -> MTPModel:
        """MTP weights that a checkpoint folder already carries and transformers drops on load. See
        foretell/native.py."""
        from foretell.native import read_native

        config, fill = read_native(_target_of(model), folder)
        mtp = cls(model, config)
        fill(mtp.module)
        return mtp

    # -- analysis ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draft_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T, K, V], teacher-forced: what depth k = 1..K says at position t about token t + 1 + k.

        The last entries of a row speak of tokens that are not there yet and read embeddings that are not either
        (zeros). For small inputs, analysis and tests: it holds B * T * K * V numbers.
        """
        inputs = {"input_ids": input_ids.to(self.device)}
        inputs["attention_mask"] = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).to(
            self.device
        )
        batch = to_batch(inputs)
        with in_eval_mode(self):
            rows = self.target.forward_text(batch.input_ids_BT, batch.position_ids_BT)
            return self.module.draft_logits(self.target, batch, rows)

    # -- decoding ------------------------------------------------------------------------------------------------------

    def generate(
        self,
        inputs: Tensor | None = None,
        *others: Any,
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
        **kwargs: Any,
    ) -> Tensor | MTPGenerateOutput:
        """As transformers' generate, several tokens a forward. Returns LongTensor [B, prompt + new], or an
        MTPGenerateOutput (sequences, stats) with return_dict_in_generate=True.

        num_draft_tokens: drafts a verification; the module's depth if None, 0 is drafting off, "auto" adapts to the
            machine's cost curve and to what gets accepted.
        policy: "lossless" (greedy: the target's own output; sampling: its distribution) or a lossy one. Under
            "static_k" and "confadapt" num_draft_tokens is the span k, the target's own token included; every forward
            commits k tokens, or the leading ones of at least confidence_threshold (0.9 if None), unverified.
        drafter: "mtp", "lookup", "mtp+lookup", or Drafter objects.
        draft_sample_method: "greedy" (the likeliest; where the target samples, what is likeliest to be its draw) or
            "probabilistic" (drawn from the module, kept by rejection sampling).
        draft_dtype: of the weights that draft: "float32", "bfloat16", "int8" (with rows of bf16), or "auto", what is
            fastest for each product by measurement. No verified text depends on it; lossy spans keep the module's own.
        draft_tree: for parallel heads, which guesses are verified together (foretell.cartesian_tree, calibrated_tree);
            None is a chain, and with "auto" those that pay.
        draft_layout: for mask tokens, which rows of a step carry masks: "linear" (the last draft), "quadratic" (every
            row), "auto" (those that pay on this machine) or "two_pass" (none: a forward of its own reads them); None
            is "auto", and for noise masks "two_pass".
        generator: seeds sampling. slots: sequences decoded at once; a larger batch is worked off continuously.
        history: lookup also copies from the answers of earlier calls that said so too: True, or how many tokens of them
            to remember. They stay in this MTPModel's memory until `release`.

        Everything else is transformers' (GenerationConfig, attention_mask with left padding, stop_strings with
        tokenizer, ...), by name or in its place. Raises ValueError naming what it cannot honour (beams, constraints,
        ...).
        """
        if kwargs.get("cache_implementation") == "paged":  # transformers goes another way before it asks for a run
            raise ValueError("foretell's generate cannot honour: cache_implementation='paged'. Leave it out.")
        run = MTPGenerate(
            self,
            num_draft_tokens=num_draft_tokens,
            policy=policy,
            confidence_threshold=confidence_threshold,
            drafter=drafter,
            draft_sample_method=draft_sample_method,
            draft_dtype=draft_dtype,
            draft_tree=draft_tree,
            draft_layout=draft_layout,
            generator=generator,
            slots=slots,
            history=history,
        )
        return self.model.generate(inputs, *others, custom_generate=run, **kwargs)

    def drafter(self, space: Workspace | None = None, sample: bool = False, dtype: str = "auto") -> ModuleDrafter:
        """A drafter over the module's and the output head's current weights, with storage of its own or a workspace's.

        Packed weights are shared by all of them, and made anew when the weights have changed.
        """
        self.target.refresh()  # the drafter borrows its packed head
        version = copy_key(self.module), self.target.head_key()
        packed = self._workspaces.packed(dtype, version, lambda: self.module.drafter(self.target, dtype=dtype))
        return packed.another(sample) if space is None else space.drafter(packed, sample, dtype)

    def workspace(self) -> AbstractContextManager[Workspace]:
        """Caches for a call of one's own: threads, and calls inside calls, each have theirs."""
        return self._workspaces.lease()

    def release(self) -> None:
        """Give back all memory that decoding keeps for the next call, which makes it anew: caches, packed weights, and
        what was learned for num_draft_tokens="auto", answers of history=....
        """
        self._workspaces.release()
        self.target.release()

    def rest(self) -> None:
        """Give back the memory of packed weights until the next call, which packs them anew: while a model trains, say.
        All else stays.
        """
        self._workspaces.rest()
        self.target.rest()

    @property
    def history(self) -> History:
        """The answers that calls with history=... remember."""
        return self._workspaces.history

    def cost_curve(self) -> CostCurve:
        """Seconds of one target forward against its rows, measured on first use."""
        with self._workspaces.lock:
            if self._curve is None:
                self._curve = CostCurve.measure(self.target)
            return self._curve

    def adaptive(self, space: Workspace, plan: Plan, do_sample: bool, counted: bool) -> AdaptiveLength:
        """Who decides lengths for num_draft_tokens="auto", and with a fixed length only the layout of masks; for
        drafters given by name, kept in the workspace between calls. counted: by counts of this call alone, without a
        clock.
        """
        given = self._curve is not None and not self._curve.measured
        curve = COUNTED if counted and not given else self.cost_curve()
        steps = dict.fromkeys(("mtp", "spans"), 0.0 if given else COUNTED_STEP) if counted else None
        made = AdaptiveLength(curve, LONGEST_AUTO, steps)
        if isinstance(plan.length, int):
            made = FixedLength(curve, plan.length, steps)
        if plan.policy in SPANS:
            longest = min(self.module.longest_draft, LONGEST_AUTO)
            made = SpanLength(curve, longest, plan.policy == "static_k", self.module.lays_masks, steps)
        if counted or not isinstance(plan.drafter, str):
            return made
        key = (plan.drafter, do_sample, plan.layout, plan.length, plan.policy, plan.threshold)
        return space.adaptive.setdefault(key, made)

    @property
    def reference(self) -> str:
        """Whose output "lossless" speaks of: a module may have changed the target itself."""
        how = self.notes.get("training") or {}
        if how.get("mtp_training_mode") == "joint" and str(how.get("mtp_supervision")).startswith("student_forced"):
            return "the trained student at k = 1, not the model it was trained from"
        return self.module.reference


def _target_of(model: nn.Module) -> Target:
    if isinstance(model, MTPModel):
        raise ValueError("model: got an MTPModel, which has its module; wanted the target alone: give its .model.")
    return Target(model)


def load_with_module(model: nn.Module, folder: str | Path | None) -> tuple[MTPModel, bool]:
    """(MTPModel, whether it has a trained module): of the folder, else the one that ships for this model, else none,
    for drafting by lookup.
    """
    found = folder or shipped(model)
    if found is None:
        return get_mtp_model(model, {"method": "sequential", "depth": 1}), False
    return MTPModel.from_pretrained(model, found), True


def custom_generate(mtp: MTPModel, **settings: Any) -> Callable[..., Tensor | MTPGenerateOutput]:
    """For transformers' extension point: model.generate(**inputs, custom_generate=foretell.custom_generate(mtp)).

    settings: foretell's own arguments of MTPModel.generate. They may stand in the call of model.generate as well.
    """
    return MTPGenerate(mtp, **settings)


def get_mtp_model(model: nn.Module, config: MTPConfig | dict[str, Any] | str | Path) -> MTPModel:
    """Give a causal LM an MTP module, as peft.get_peft_model gives it an adapter.

    config: settings, a dict with `method`, a YAML file's path, or a preset's name.
    Raises UnsupportedModelError for architectures that cannot work, ConfigError for bad settings.
    """
    return MTPModel(model, MTPConfig.from_any(config))
