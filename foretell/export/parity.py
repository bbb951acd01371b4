"""The gate: a format's files, run by their reader's own layers under the engine's rule, against the module.

An engine knows nothing of our depths: it runs one layer again and again, each row one position further on, behind the
rows of the text. `Reader.said` does so with what was read from the files; `replay` says how many drafts an engine that
does so accepts.
"""

# B sequences, T positions, K depths, A anchors, D hidden width, V vocabulary.

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache

from foretell.data.collate import to_batch
from foretell.export.base import CONFIG, Format, Job
from foretell.methods.base import MTPModule
from foretell.models.refusals import differences, first_of
from foretell.models.target import Target, TargetRows

CLOSE = 1e-4  # of the logits' spread, in fp32
PROMPTS, LONGEST, ANCHORS = 4, 48, 6


class Reader(nn.Module):
    """A draft as an engine holds it: its parameters are called as the file's tensors. Here one layer for all depths.

    step(embedding_BTD, hidden_BTD, positions_BT, cache): [B, T, D] what the output head reads, and what the next depth
    does. zero_first: the engine gives the row at position 0 no embedding.
    """

    zero_first = False

    def fill(self, tensors: dict[str, Tensor], device: torch.device) -> Reader:
        """Every tensor has its place, every place its tensor: engines often do not ask. Raises ValueError."""
        if problems := differences(tensors, self.state_dict()):
            raise ValueError(f"the file's tensors are not the format's: {first_of(problems)}.")
        self.load_state_dict(tensors)
        return self.to(device).float().eval()

    def entry(self, rows: TargetRows) -> Tensor:
        """[B, T, D] what depth 1 reads of the target's states."""
        return rows.post_norm_BRD.float()

    def logits(self, state: Tensor, target: Target) -> Tensor:
        """[..., V] of the target's tokens, -inf where the draft has none."""
        return state @ target.head_matrix(detach=True)[0].float().T

    @torch.no_grad()
    def said(self, target: Target, ids_1T: Tensor, anchors: Sequence[int], K: int) -> Tensor:
        """[A, K, V]: each depth behind these rows when the text's own tokens are what was drafted before."""
        positions_1T = torch.arange(ids_1T.shape[1], device=ids_1T.device)[None]
        entry_1TD = self.entry(target.forward_text(ids_1T, positions_1T))
        ahead_1TD = F.embedding(ids_1T[:, 1:], target.embed_tokens.weight).float()  # of the token behind each row
        out = []
        if self.zero_first:
            ahead_1TD = ahead_1TD * (positions_1T[:, :-1, None] != 0)
        for t in anchors:
            cache, rows = DynamicCache(), slice(0, t + 1)
            chained = entry_1TD[:, rows]
            for k in range(1, K + 1):
                state, chained = self.step(ahead_1TD[:, rows], chained, positions_1T[:, rows], cache)
                out.append(self.logits(state[0, -1], target))
                rows, chained = slice(t + k, t + k + 1), chained[:, -1:]
        return torch.stack(out).view(len(anchors), K, -1)


class Draft(Format):
    """A format of two files, config.json and tensors, that a Reader runs."""

    reader: Callable[[dict[str, Any]], Reader]  # of config.json
    weights = "model.safetensors"

    @abstractmethod
    def misfits(self, job: Job) -> list[str]:
        """What the module's and the target's settings say against it."""

    @abstractmethod
    def settings(self, job: Job) -> dict[str, Any]:
        """config.json."""

    @abstractmethod
    def tensors(self, job: Job) -> dict[str, Tensor]:
        """By their names in the file."""

    def borrowed(self, job: Job) -> dict[str, Tensor]:
        """Those that are the target's own, which a file in bf16 rounds: they are held to that, and run as they are."""
        return {}

    @abstractmethod
    def lines(self, job: Job) -> list[str]:
        """How it is served, and what is lost."""

    def problems(self, job: Job) -> list[str]:
        """See Format. What settings, names and shapes do not tell (other norms, a factor, other angles), numbers do."""
        try:
            if found := self.misfits(job):
                return found
            reader, tensors = self.reader(self.settings(job)), self.tensors(job)
            if found := differences(tensors, reader.state_dict()):
                return found
            same_logits(job, self._filled(job, reader, tensors), texts(job, real=False)[:1])
        except Exception as problem:  # whatever code and configs of others raise where they miss something
            kind = f"{type(problem).__name__}: {str(problem)[:300]}"
            return [f"{job.target.config.model_type}'s layers, embedding or logits are more than it can say ({kind})"]
        return []

    def _filled(self, job: Job, reader: Reader, tensors: dict[str, Tensor]) -> Reader:
        own = {name: t.detach().cpu() for name, t in self.borrowed(job).items() if name in tensors}
        if others := [name for name, t in own.items() if not torch.equal(t.to(tensors[name].dtype), tensors[name])]:
            raise ValueError(f"check: {', '.join(others)}: not the target's own.")
        return reader.fill(tensors | own, job.target.device)

    def write(self, job: Job, folder: Path) -> list[str]:
        """See Format."""
        tensors = self.tensors(job)
        kind = str(next(t.dtype for t in tensors.values() if t.is_floating_point())).removeprefix("torch.")
        text = json.dumps({**self.settings(job), "torch_dtype": kind}, indent=2) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
        save_file(tensors, folder / self.weights, metadata={"format": "pt"})
        return self.lines(job)

    def check(self, job: Job, folder: Path) -> list[str]:
        """See Format."""
        tensors = load_file(folder / self.weights)
        reader = self.reader(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        found = same_logits(job, self._filled(job, reader, tensors), texts(job))
        return [f"{len(tensors)} tensors are the format's, name by name", *found]


@torch.no_grad()
def own_logits(module: MTPModule, target: Target, ids_1T: Tensor, zero_first: bool = False) -> Tensor:
    """[T, K, V], as MTPModel.draft_logits."""
    batch = to_batch({"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)})
    rows = target.forward_text(batch.input_ids_BT, batch.position_ids_BT)
    rows = TargetRows(*(None if states is None else states.float() for states in vars(rows).values()))

    def zero(_block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * (args[3] != 0)[..., None], *args[1:])

    hook = module.blocks[0].register_forward_pre_hook(zero) if zero_first else None  # type: ignore[index]
    said_TKV = module.draft_logits(target, batch, rows)[0]
    if hook is not None:
        hook.remove()
    return said_TKV


def texts(job: Job, real: bool = True) -> list[Tensor]:
    """[1, T] a few prompts of several kinds; without a tokenizer, tokens drawn at random."""
    if job.tokenizer is None or not real:
        size, drawn = (PROMPTS, 1, LONGEST), torch.Generator().manual_seed(0)
        return list(torch.randint(job.target.vocab_size, size, generator=drawn).to(job.target.device))
    lines = resources.files("foretell.data").joinpath("demo_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[:: len(lines) // PROMPTS][:PROMPTS]]
    found = [job.tokenizer(prompt, return_tensors="pt")["input_ids"][:, :LONGEST] for prompt in prompts]
    return [ids_1T.to(job.target.device) for ids_1T in found]


def same_logits(job: Job, reader: Reader, prompts: Sequence[Tensor]) -> list[str]:
    """Compare each depth; what was found. Raises ValueError naming the depths that differ."""
    far_K = torch.zeros(K := job.config.depth)
    for ids_1T in prompts:
        last = ids_1T.shape[1] - 1 - K
        anchors = sorted({round(i * last / (ANCHORS - 1)) for i in range(ANCHORS)})
        ours_AKV = own_logits(job.rounded, job.target, ids_1T, reader.zero_first)[anchors]
        far_K = far_K.maximum(distances(ours_AKV, reader.said(job.target, ids_1T, anchors, K)).cpu())
    return verdict(far_K, f"its reader's layers, {len(prompts)} prompts")


def distances(ours_AKV: Tensor, theirs_AKV: Tensor) -> Tensor:
    """[K] greatest difference, in spreads, over the tokens that the module drafts."""
    drafted_V = ours_AKV[0, 0].isfinite()
    ours_AKM, theirs_AKM = ours_AKV[..., drafted_V], theirs_AKV[..., drafted_V]
    far_AK = (ours_AKM - theirs_AKM).abs().amax(-1) / ours_AKM.std(-1)
    return far_AK.nan_to_num(nan=torch.inf).amax(0)


def verdict(far_K: Tensor, who: str) -> list[str]:
    """What to say of depths that are close; raises ValueError where one is not."""
    bad = [f"depth {k} by {far:.1e}" for k, far in enumerate(far_K.tolist(), start=1) if not far < CLOSE]
    if bad:
        said = f"check: logits of the files, run by {who}, differ from the module's, in spreads of the logits: "
        raise ValueError(f"{said}{', '.join(bad)}; wanted less than {CLOSE:.0e}.")
    return [f"logits of depths 1, 2, ... within {', '.join(f'{far:.0e}' for far in far_K.tolist())} spreads, by {who}"]


def replay(drafts_TK: Tensor, text: Sequence[int], prompt: int, end: int) -> list[int]:
    """[rounds, accepted at depth 1, 2, ...] as an engine counts them that drafts K tokens a round behind a known greedy
    text: the first answer token comes without drafts, rounds begin before `end`, and what they accept beyond it counts.

    drafts_TK: what each depth says at each row when the text's own tokens were drafted before; where they were not, the
    round has ended. text: K tokens longer than `end`, so that the last round can be told.
    """
    known, counts = prompt + 1, [0] * (drafts_TK.shape[1] + 1)
    while known < end:
        drafts = drafts_TK[known - 2].tolist()
        right = [draft == token for draft, token in zip(drafts, text[known:], strict=False)]
        accepted = [*right, False].index(False)
        for k in range(accepted + 1):
            counts[k] += 1
        known += accepted + 1
    return counts
