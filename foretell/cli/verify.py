"""foretell verify: is decoding with this module lossless? Exit status 0: yes, within what is said; 1: no, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from foretell.cli.loading import WorkloadSettings, load_target
from foretell.config import parse
from foretell.runtime import provenance, write_json_atomic


@dataclass(kw_only=True)
class VerifySettings(WorkloadSettings):
    """Flags of `foretell verify`."""

    limit: int | None = field(default=8, metadata={"help": "Prompts of each category; null for all."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest greedy answer, in tokens."})
    batch_size: int = field(default=4, metadata={"help": "Greedy answers are made one by one, and so many at once."})
    samples: int = field(default=512, metadata={"help": "Drawn behind each context, by each way of drafting; 0: none."})
    contexts: int = field(default=4, metadata={"help": "Prompts behind which is drawn."})
    temperature: float = field(default=1.0, metadata={"help": "Of the samples."})
    output: str | None = field(default=None, metadata={"help": "Where the numbers go, as JSON."})

    def problems(self) -> list[str]:
        """See config.check."""
        found = super().problems()
        if not self.temperature > 0:
            found.append(
                f"temperature: got {self.temperature}, wanted more than 0: greedy decoding is always compared."
            )
        if self.samples and self.samples < 100:
            found.append(f"samples: got {self.samples}, wanted at least 100 (or 0): fewer can prove nothing.")
        return found


def main(argv: Sequence[str]) -> int:
    """Run the verb; 0, or 1 where something is not as the model alone would have it."""
    settings = parse(VerifySettings, argv, prog="foretell verify")
    import torch

    from foretell.evaluation.losslessness import draftings, greedy, sampled
    from foretell.evaluation.measure import tensors_digest
    from foretell.evaluation.workloads import first_prompt, load_tasks
    from foretell.mtp import load_with_module

    tasks = load_tasks(settings.prompts, settings.limit)
    model, tokenizer = load_target(settings.model, settings.dtype)
    named = [(task.name, first_prompt(task, tokenizer)) for task in tasks]
    before = tensors_digest(dict(model.state_dict()))
    probe = torch.tensor([named[0][1]], device=model.device)
    with torch.no_grad():
        alone = model(probe).logits
    mtp, has_module = load_with_module(model, settings.module)
    result: dict[str, Any] = {
        "schema": "foretell.verify/1",
        "model": settings.model,
        "module": settings.module,
        "method": mtp.mtp_config.method if has_module else None,
        "dtype": str(mtp.target.dtype).removeprefix("torch."),
        "provenance": provenance(["foretell", "verify", *argv]),
        "prompts": len(named),
        "greedy": greedy(mtp, named, draftings(mtp, has_module, False), settings.max_new_tokens, settings.batch_size),
    }
    if settings.samples:
        contexts = [ids for _, ids in named[:: max(len(named) // settings.contexts, 1)]][: settings.contexts]
        ways = draftings(mtp, has_module, True)
        result["sampled"] = sampled(mtp, contexts, ways, settings.samples, settings.temperature, settings.seed)
    with torch.no_grad():
        result["logits_equal"] = bool(torch.equal(alone, model(probe).logits))
    result["weights_equal"] = before == tensors_digest(dict(model.state_dict()))
    result["lossless"] = not faults(result)
    if settings.output:
        write_json_atomic(settings.output, result)
    print(page(result))
    return 0 if result["lossless"] else 1


def faults(result: dict[str, Any]) -> list[str]:
    """All that is not as it should be, in words."""
    found = []
    for one in result["greedy"]:
        if one["faults"]:
            at = one["first_fault"]
            found.append(
                f"greedy, {one['way']}: {one['faults']} of {one['answers']} answers differ; first {at['prompt']} in a "
                f"batch of {at['batch_size']}, token {at['position'] + 1}: got {at['got']}, the model alone says "
                f"{at['wanted']}" + ("" if at["gap"] is None else f" (logits {at['gap']:.1f} steps apart)")
            )
    for test in result.get("sampled", {}).get("tests", []):
        if not test["passed"]:
            found.append(
                f"sampled, {test['way']}: p = {test['p_value']:.2g}, {test['impossible']} samples that the model alone "
                "never draws"
            )
    if not result["logits_equal"]:
        found.append("the model's own logits are others with the module beside it")
    if not result["weights_equal"]:
        found.append("the model's weights have changed")
    return found


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    what = result["method"] or "no module"
    lines = [f"{result['model']}, {result['dtype']}, {what}; {result['prompts']} prompts", ""]
    lines.append(f"{'greedy, against transformers generate':<44}{'equal':>12}{'near ties':>12}{'faults':>9}")
    for one in result["greedy"]:
        equal = f"{one['equal']} of {one['answers']}"
        lines.append(f"  {one['way']:<42}{equal:>12}{one['near_ties']:>12}{one['faults']:>9}")
    if "sampled" in result:
        drawn = result["sampled"]
        head = f"sampled, {drawn['samples']} behind each of {drawn['contexts']} contexts"
        lines += ["", f"{head:<44}{'chi-square':>12}{'freedom':>12}{'p':>9}"]
        for test in drawn["tests"]:
            lines.append(f"  {test['way']:<42}{test['chi_square']:>12.1f}{test['freedom']:>12}{test['p_value']:>9.3f}")
        if drawn["smallest_deviation"] is not None:
            lines.append(
                f"  power: likely drafts taken unasked in {100 * drawn['smallest_deviation']:.1f} % of samples are "
                f"caught 95 times in 100 (planted: {100 * drawn['planted_caught']:.0f}); false alarms: 1 run in 100"
            )
    lines += ["", f"weights unchanged: {result['weights_equal']}; logits beside the module: {result['logits_equal']}"]
    found = faults(result)
    lines += ["", "NOT LOSSLESS:", *(f"  {line}" for line in found)] if found else ["", "lossless, as far as this says"]
    return "\n".join(lines)
