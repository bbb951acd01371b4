"""The copy that decodes, held against the live model's own logits on a few rows: as a text, in steps over a cache, as a
small tree, and with a window narrow enough to matter.

No list of architectures says what works: what computes something else here is not used.
"""

# T tokens of the text, R rows of a step, V vocabulary.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foretell.models.live import shallow
from foretell.models.slot_cache import SlotCache

T, BRANCH = 10, 8  # two texts, the same up to token BRANCH
STEPS = (4, 2, 1)  # rows of the steps over a cache: each size of a step has kernels of its own
TREE = [-1, 0, 0, 2]  # below them: the last common token, each text's next one, and what follows the second
NARROW = 4
WINDOWS = ("sliding_window", "window", "attention_chunk_size")
PROBES = 3  # texts that are tried: where experts are chosen by nearly equal scores, rounding alone may differ
# the largest distance of a row's logits, as a share of their spread. Other orders of the same sums differ by some eps a
# layer: 1e-5 is seen in fp32, 0.03 in bf16; half a layer less is 0.1 and more
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.12}


@dataclass
class Verdict:
    """What a comparison gave. path: "fast" or "plain" (our attention and nothing else); differs: empty where nothing
    does; within: the longest text that is read as the model reads it, None if any is."""

    path: str
    differs: str = ""
    layer: str = ""
    within: int | None = None
    windows: dict[int, int] = field(default_factory=dict)  # by layer: how far it looks back, where not at everything
    distances: dict[str, float] = field(default_factory=dict)


def compare(target: Any, tree: nn.Module, path: str) -> Verdict:
    """The verdict on a copy, against what the target's model says itself."""
    verdict = Verdict(path)
    tolerance = tolerance_of(target)
    with at_rest(target.outer):
        for probe in range(PROBES):
            ids = few_texts(target, probe)
            wanted = target.outer(input_ids=ids, use_cache=False).logits[:, -T:]
            verdict.distances, failed = _distances(target, tree, ids, wanted, verdict.windows)
            verdict.differs = failed or _worst(verdict.distances, tolerance)
            if not verdict.differs:
                break
        if verdict.differs:
            verdict.layer = _first_other_layer(target, tree, ids, tolerance)
            return verdict
        for window in sorted(windows_of(target)):
            got, failed = _narrowed(target, tree, ids, wanted, window)
            if verdict.windows and (failed or _worst(got, tolerance)):  # it asks in which column a key stands
                verdict.windows = {}
                got, failed = _narrowed(target, tree, ids, wanted, window, rings=False)
            verdict.distances |= {f"{name}, window": value for name, value in got.items()}
            if failed or _worst(got, tolerance):
                verdict.within = window
                break
    return verdict


def _worst(distances: dict[str, float], tolerance: float) -> str:
    name = max(distances, key=lambda one: distances[one], default="")
    if not name or distances[name] <= tolerance:
        return ""
    return f"{name}: logits differ by {distances[name]:.3g} of their spread, wanted at most {tolerance:g}"


def tolerance_of(target: Any) -> float:
    """The largest distance between two ways of this model's that compute the same."""
    kinds = {p.dtype for p in target.model.parameters()}
    if torch.is_autocast_enabled(target.device.type):
        kinds.add(torch.get_autocast_dtype(target.device.type))
    if torch.get_float32_matmul_precision() != "highest" or not all(kind.is_floating_point for kind in kinds):
        kinds.add(torch.bfloat16)  # products in fewer bits, and quantized weights
    return max(TOLERANCE.get(kind, TOLERANCE[torch.bfloat16]) for kind in kinds)


def few_texts(target: Any, probe: int) -> Tensor:
    """[2, T]: ordinary tokens, none that the config knows by name."""
    named = {
        one
        for config in (target.model.config, target.config)
        for name, value in vars(config).items()
        if name.endswith(("_id", "_ids", "_index"))
        for one in (value if isinstance(value, list) else [value])
    }
    most = min(target.vocab_size, target.embed_tokens.weight.shape[0])
    spread = torch.linspace(0, most - 1, 4 * T + probe).long().unique().tolist()
    ids = [token for token in spread if token not in named]
    ids = ids if len(ids) > 1 else spread  # of a tiny vocabulary
    first, second = ids[1::2], ids[0::2]
    first, second = (row * -(-T // max(len(row), 1)) for row in (first, second))
    rows = [first[:T], [*first[:BRANCH], *second[: T - BRANCH]]]
    return torch.tensor(rows, device=target.embed_tokens.weight.device)


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The live model in eval mode for a moment: its attributes and the random numbers stay what they were."""
    before = [(part, dict(part.__dict__), dict(part._buffers)) for part in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng([device.index for device in devices]):
        for part, _, _ in before:
            part.training = False
        try:
            yield
        finally:
            for part, own, buffers in before:  # rotary modules remember the longest text
                for inside, was in ((part.__dict__, own), (part._buffers, buffers)):
                    for name in inside.keys() - was.keys():
                        del inside[name]
                    inside.update(was)


def _distances(
    target: Any, tree: nn.Module, ids: Tensor, wanted: Tensor, windows: dict[int, int] | None
) -> tuple[dict[str, float], str]:
    """(the largest distance of a row for each way of reading, what went wrong where something did). windows: the
    layers', which are found; None: all is kept, whatever they are.
    """
    found = {}
    try:
        with target.bare(tree):
            for name, got, rows in _readings(target, ids, wanted, windows):
                found[name] = distance(got, rows)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError) as error:
        return found, f"{type(error).__name__} in the copy's forward: {error}"
    return found, ""


def _readings(
    target: Any, ids: Tensor, wanted: Tensor, windows: dict[int, int] | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    def read(rows: Tensor, done: int, cache: SlotCache, **how: Any) -> Tensor:
        lengths_B = torch.tensor([done], device=ids.device)
        states = target.forward_rows(rows[None], lengths_B, cache, first=1, visible=done + len(rows), **how)
        return target.logits(states.post_norm_BRD, view=True)[0]

    target.windows_noted()
    yield "text", read(ids[0], 0, SlotCache(2, 64)), wanted[0]
    cache, done = SlotCache(2, 64), 0
    cache.SPARE = STEPS[0]  # so that a narrow window's ring goes round
    if windows is not None:
        windows.clear()
        windows.update(target.windows_noted())
        cache.open(windows)
    for rows in STEPS:
        got = read(ids[0, done : done + rows], done, cache, full=rows == 1)
        yield f"{rows} rows over a cache", got, wanted[0, done : done + rows]
        done += rows
    # a row for the last common token, one for each text's next, one below the second
    tokens = torch.stack([ids[0, done], ids[0, BRANCH], ids[1, BRANCH], ids[1, BRANCH + 1]])
    places = torch.tensor([[done, BRANCH, BRANCH, BRANCH + 1]], device=ids.device)
    parents = torch.tensor([TREE], device=ids.device)
    got = read(tokens, done, cache, position_ids_BR=places, parents_BR=parents)
    rows = torch.stack([wanted[0, done], wanted[0, BRANCH], wanted[1, BRANCH], wanted[1, BRANCH + 1]])
    yield "tree", got, rows
    if target.mask_rows is not None:  # rows of text come as embeddings beside those
        yield "text beside masks", read(ids[0], 0, SlotCache(2, 64), steps_BR=torch.zeros_like(ids[:1])), wanted[0]


def distance(got: Tensor, wanted: Tensor) -> float:
    """The largest distance of a row's numbers, as a share of their spread."""
    got, wanted = got.double(), wanted.double()
    counts = wanted.isfinite()
    away = torch.where(counts | (got != wanted), got - wanted, 0.0)
    away = torch.where(wanted.isnan(), 0.0, away)  # a text that overflows says nothing
    known = torch.where(counts, wanted, 0.0)
    spread = (known - known.mean(-1, keepdim=True)).norm(dim=-1) + 1e-6 * known.norm(dim=-1) + 1e-12
    share = away.norm(dim=-1) / spread
    return float("inf") if bool(share.isnan().any()) else float(share.max())


def windows_of(target: Any) -> set[int]:
    """Lengths that a model's config calls a window."""
    return {size for name in WINDOWS if isinstance(size := getattr(target.config, name, None), int) and size > 0}


def _narrowed(
    target: Any, tree: nn.Module, ids: Tensor, wanted: Tensor, window: int, rings: bool = True
) -> tuple[dict[str, float], str]:
    """Model and copy with a window of NARROW in place of theirs, so that a short text meets it."""

    by_window = narrowed(target.model, window)(input_ids=ids, use_cache=False).logits
    if torch.equal(by_window, wanted):
        return {}, ""  # no layer of this model looks through it
    return _distances(target, narrowed(tree, window), ids, by_window, {} if rings else None)


def narrowed(module: nn.Module, window: int) -> Any:
    """A model over the same weights with a window of NARROW in this one's place."""
    return shallow(module, lambda _path, _part: None, lambda n, v: NARROW if n in WINDOWS and v == window else v)


def _first_other_layer(target: Any, tree: Any, ids: Tensor, tolerance: float) -> str:
    """Which layer's states are the first to differ on a plain text."""
    states: list[list[Tensor]] = []
    for layers, read in (
        (target.layers, lambda: target.outer(input_ids=ids[:1], use_cache=False)),
        (tree.get_decoder().layers, lambda: next(_readings(target, ids, ids, None))),
    ):
        seen: list[Tensor] = []

        def note(_layer: Any, _args: Any, out: Any, seen: list[Tensor] = seen) -> None:
            seen.append((out[0] if isinstance(out, tuple) else out).detach())

        handles = [layer.register_forward_hook(note) for layer in layers]
        try:
            with target.bare(tree):
                read()
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError):
            pass
        finally:
            for handle in handles:
                handle.remove()
        states.append(seen)
    for index, (wanted, got) in enumerate(zip(*states)):
        if distance(got.flatten(0, -2), wanted.flatten(0, -2)) > tolerance:
            return f"layer {index} ({type(target.layers[index]).__name__})"
    if len(states[1]) < len(target.layers):
        return f"layer {len(states[1])} ({type(target.layers[len(states[1])]).__name__})"
    return "none on a plain text: the cache, the tree or the output head"
