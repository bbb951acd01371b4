"""Two runs of foretell evaluate: what differs between them, and whether that is more than noise."""

# C chunks, N draws of a bootstrap.

from __future__ import annotations

from typing import Any

import numpy as np

from foretell.evaluation.measure import DRAWS

MUST_AGREE = ("prompts", "max_new_tokens", "temperature")  # else the tokens are of other questions


def compared(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Settings that differ, and of each way of both its speed and tau, second over first, with 95 % intervals.

    Raises ValueError where the two answered other questions.
    """
    other = [name for name in MUST_AGREE if first["identity"][name] != second["identity"][name]]
    if other or first["batch_size"] != second["batch_size"]:
        raise ValueError(
            f"these runs cannot be compared: another {', '.join(other) or 'batch_size'}. Measure both with the same "
            "--prompts, --limit, --max-new-tokens, --temperature and --batch-size."
        )
    for run in (first, second):
        if not run.get("tokens_equal", True):
            raise ValueError("these runs cannot be compared: one of them is not lossless, so its speed says nothing.")
    names = [way["name"] for way in first["ways"] if way["name"] in {other["name"] for other in second["ways"]}]
    return {
        "differs": _settings(first, second),
        "ways": {name: {"speed": _speed(first, second, name), "tau": _tau(first, second, name)} for name in names},
    }


def _settings(first: dict[str, Any], second: dict[str, Any]) -> dict[str, list[Any]]:
    found = {}
    for name in ("model", "module", "dtype", "drafter", "num_draft_tokens"):
        found[name] = [first.get(name), second.get(name)]
    for name in ("model", "module"):
        found[f"{name}'s weights"] = [first["identity"][name], second["identity"][name]]
    for name in ("cpu", "cores", "commit", "uncommitted_changes"):
        found[name] = [first["provenance"].get(name), second["provenance"].get(name)]
    versions = [run["provenance"].get("versions") or {} for run in (first, second)]
    for name in sorted(versions[0] | versions[1]):
        found[name] = [each.get(name) for each in versions]
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def _speed(first: dict[str, Any], second: dict[str, Any], name: str) -> dict[str, Any]:
    """Times as many tokens a second: prompts are paired, repeats are not."""
    rng, pace = np.random.default_rng(0), []
    C = len(first["chunks"])
    chunks_NC = rng.integers(C, size=(DRAWS, C))
    for run in (first, second):
        seconds_CR = np.array([chunk["seconds"][name] for chunk in run["chunks"]])
        tokens_C = np.array([chunk["tokens"][name] for chunk in run["chunks"]], dtype=float)
        R = seconds_CR.shape[1]
        repeats_NR = rng.integers(R, size=(DRAWS, R))
        drawn = np.median(seconds_CR[chunks_NC[:, :, None], repeats_NR[:, None, :]], axis=2).sum(1)
        pace.append((tokens_C.sum() / np.median(seconds_CR, axis=1).sum(), tokens_C[chunks_NC].sum(1) / drawn))
    return _interval(pace[1][0] / pace[0][0], pace[1][1] / pace[0][1], 1.0)


def _tau(first: dict[str, Any], second: dict[str, Any], name: str) -> dict[str, Any] | None:
    """More tokens a verification; None of ways whose verifications were not kept."""
    if any(run["ways"][-1]["name"] != name for run in (first, second)):
        return None
    rng, C = np.random.default_rng(1), len(first["chunks"])
    chunks_NC, taus = rng.integers(C, size=(DRAWS, C)), []
    for run in (first, second):
        emitted = np.array([chunk["tokens"][name] * len(chunk["rounds"]) for chunk in run["chunks"]], dtype=float)
        rounds = np.array([sum(chunk["rounds"]) for chunk in run["chunks"]], dtype=float)
        taus.append((emitted.sum() / rounds.sum(), emitted[chunks_NC].sum(1) / rounds[chunks_NC].sum(1)))
    return _interval(taus[1][0] - taus[0][0], taus[1][1] - taus[0][1], 0.0)


def _interval(value: float, drawn_N: np.ndarray, same: float) -> dict[str, Any]:
    low, high = (float(x) for x in np.quantile(drawn_N, [0.025, 0.975]))
    return {"value": float(value), "low": low, "high": high, "noise": low <= same <= high}


def in_words(found: dict[str, Any], first: str, second: str) -> str:
    """The comparison for people."""
    lines = [f"{second} against {first}"]
    lines += [f"  {name}: {was} -> {now}" for name, (was, now) in found["differs"].items()] or ["  same settings"]
    for name, of in found["ways"].items():
        speed = of["speed"]
        said = "noise" if speed["noise"] else "faster" if speed["value"] > 1 else "slower"
        lines.append(
            f"{name:<14}{speed['value']:.3f} times as fast ({speed['low']:.3f} to {speed['high']:.3f}): {said}"
        )
        if of["tau"]:
            tau = of["tau"]
            said = "noise" if tau["noise"] else "more" if tau["value"] > 0 else "fewer"
            lines.append(f"{'':<14}tau {tau['value']:+.3f} ({tau['low']:+.3f} to {tau['high']:+.3f}): {said}")
    return "\n".join(lines)
