"""Tables of README.md and docs/ from results files, so that a number stands in one place.

    python benchmarks/tables.py [--check]

A table stands between two comments that name it; what has no results file yet stays as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def demo_table(result: dict[str, Any]) -> list[str]:
    """The comparisons of results/demo.json, with where they were measured."""
    domain, training, seconds = result.get("domain"), result["training"], result["seconds"]
    lines = _ways(result)
    if domain is not None:
        lines += ["", f"After training here, on eight held-out prompts of one kind ({domain['name']}):", ""]
        lines += _ways(domain)
    return [
        *lines,
        "",
        f"{result['model']}, fp32, {result['provenance']['cores']} cores, batch 1, greedy, interleaved, medians.",
        *(_equal(part) for part in (result, domain) if part is not None),
        f"The module{' of one kind' if domain is not None else ''} trained for {training['seconds']:.0f} s",
        f"at {training['answer_tokens_per_second']:.0f} answer tokens/s; {seconds['total'] / 60:.1f} minutes in all.",
        where(result["provenance"]),
    ]


def _ways(result: dict[str, Any]) -> list[str]:
    by_name = {way["name"]: way for way in result["ways"]}
    lines = [
        "| | tokens/s | tau | tau, 3 drafts | times drafting off | times transformers |",
        "|---|---|---|---|---|---|",
    ]
    for way in result["ways"]:
        rate = way["tokens_per_second"]
        fixed = f"{way['tau_fixed']:.2f}" if way.get("tau_fixed") else ""
        lines.append(
            f"| {way['label']} | {rate:.1f} | {way['tau']:.2f} | {fixed} | "
            f"{rate / by_name['off']['tokens_per_second']:.2f} | "
            f"{rate / by_name['transformers']['tokens_per_second']:.2f} |"
        )
    return lines


def _equal(result: dict[str, Any]) -> str:
    equal, repeats = result["equality"], len(result["ways"][0]["repeats"])
    return (
        f"{equal['equal']} of {equal['runs']} runs ({equal['prompts']} held-out prompts, {repeats} repeats) gave "
        "exactly the tokens of transformers' generate."
    )


def speed_table(result: dict[str, Any]) -> list[str]:
    """Decoding without a module beside transformers and llama.cpp's best lossless way."""
    lines = [
        "| | tokens/s | times transformers | of the memory's bandwidth | equal answers |",
        "|---|---|---|---|---|",
    ]
    found = result["decoding"]
    for dtype in ("float32", "bfloat16"):
        llama = [name for name in found if name.startswith("llama.cpp") and name.endswith(dtype)]
        best = max(llama, key=lambda name: found[name]["tokens_per_second"], default=None)
        ways = {
            f"transformers {dtype}": "transformers' generate",
            best: "llama.cpp, its best lossless way" + (f" ({best.split()[1]})" if best else ""),
            f"off old {dtype}": f"foretell of commit {str(result['old_commit'])[:10]}, drafting off",
            f"off new {dtype}": "foretell, drafting off",
            f"lookup new {dtype}": "foretell, prompt lookup",
        }
        for name, label in ways.items():
            if name in found:
                way, share = found[name], found[name].get("share_of_bandwidth")
                times = way["tokens_per_second"] / found[f"transformers {dtype}"]["tokens_per_second"]
                ties = f" (+ {way['near_ties']} near ties)" if way["near_ties"] else ""
                lines.append(
                    f"| {label}, {dtype} | {way['tokens_per_second']:.1f} | {times:.2f} | "
                    f"{'' if share is None else f'{share:.0%}'} | {way['equal']} of {way['answers']}{ties} |"
                )
    copies = ", ".join(f"{of['memory_over_weights']:.2f} ({name})" for name, of in result["copies"].items())
    return [
        *lines,
        "",
        f"SmolLM2-135M-Instruct, {result['provenance']['hardware']['threads']} threads, batch 1, greedy, interleaved.",
        f"A read of all weights makes {result['bandwidth_bytes_per_second'] / 1e9:.0f} GB/s;",
        "who drafts reads them less than once a token.",
        f"Memory in all, times the weights: {copies}.",
        where(result["provenance"]),
    ]


def ablation_table(result: dict[str, Any]) -> list[str]:
    """tau of each arm by number of drafts."""
    lines = [
        "| one thing changed | parameters | loss | tau, 1 draft | 2 drafts | 3 drafts |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in result["arms"].items():
        taus = [f"{runs[0][f'tau_{k}']:.3f}" if f"tau_{k}" in runs[0] else "" for k in (1, 2, 3)]
        lines.append(f"| {name} | {runs[0]['parameters'] / 1e6:.1f} M | {runs[0]['loss']:.3f} | {' | '.join(taus)} |")
    return [
        *lines,
        "",
        f"{result['steps']} steps of 4 answers, 16 held-out prompts decoded.",
        where(result["provenance"]),
    ]


def machine_table(result: dict[str, Any]) -> list[str]:
    """Tokens a second by size of batch."""
    ways = ["transformers", "off", "mtp", "mtp+lookup"]
    lines = ["| sequences | " + " | ".join(ways) + " | off / transformers |", "|---" * (len(ways) + 2) + "|"]
    races = {**result["decoding"]["float32"], "64, continuous": result.get("continuous", {})}
    for name, found in races.items():
        rates = [f"{found[way]['tokens_per_second']:.1f}" if way in found else "" for way in ways]
        if "off" in found:
            gain = found["off"]["tokens_per_second"] / found["transformers"]["tokens_per_second"]
            lines.append(f"| {name} | {' | '.join(rates)} | {gain:.2f} |")
    curve = "  ".join(f"{p['rows']}: {p['ms']:.1f}" for p in result["cost_curve"])
    failing = result["failing_text"]
    lost = 1 - failing["auto"]["tokens_per_second"] / failing["off"]["tokens_per_second"]
    memory = result["loss_memory"]
    return [
        *lines,
        "",
        f"Tokens a second. Milliseconds of a forward by rows: {curve}.",
        f'Text on which all drafts fail: "auto" is {100 * lost:.1f} % slower than drafting off.',
        f"Training: {result['training']['answer_tokens_per_second']:.0f} answer tokens/s.",
        f"Peak memory of the loss (4,096 rows, 49,152 tokens): {memory['fused_bytes'] / 2**20:.0f} MiB, "
        f"all logits at once {memory['naive_bytes'] / 2**20:.0f} MiB.",
        where(result["provenance"]),
    ]


def heads_table(result: dict[str, Any]) -> list[str]:
    """The seven types under one budget."""
    if "types" not in result:
        return ["Not measured in this results file yet: `python benchmarks/heads.py --part types`."]
    lines = [
        "| type | parameters | seconds | loss | accuracy of depth 1, 2, 3 | tau, chain | tau, tree (nodes) |",
        "|---|---|---|---|---|---|---|",
    ]
    found = result["types"]
    for kind in ("linear", "ffn", "mha_ffn", "cnn", "identical", "medusa", "layer"):
        about = found[kind]
        accuracy = ", ".join(f"{a[0]:.2f}" for a in about["accuracy"])
        nodes = about.get("tree_nodes") or len(about.get("tree", []))
        tree = f"{about['tau_tree']:.2f} ({nodes})" if nodes else "none pays"
        size = f"{about['parameters'] / 1e6:.1f} M | {about['seconds']:.0f} | {about['loss']:.2f}"
        lines.append(f"| `{kind}` | {size} | {accuracy} | {about['tau_chain']:.2f} | {tree} |")
    speed = "  ".join(f"{n} {w['tokens_per_second']:.1f}" for n, w in found["speed of medusa"].items())
    return [
        *lines,
        "",
        f"{found['steps']} steps of 4 answers. `medusa` at batch 1, tokens a second: {speed}.",
        where(found["provenance"]),
    ]


def step_table(result: dict[str, Any]) -> list[str]:
    """A step of SFT in time and memory."""
    lines = ["| vocabulary | | TRL without MTP | foretell | all logits at once |", "|---|---|---|---|---|"]
    for vocabulary, found in result["step"].items():
        if vocabulary != "provenance":
            cells = [
                f"{found['seconds'][w]:.2f} s ({found['times_trl'][w]:.2f}x)" for w in ("trl", "foretell", "naive")
            ]
            lines.append(f"| {int(vocabulary):,} | step | {' | '.join(cells)} |")
            peaks = result["memory"][vocabulary]
            cells = [
                f"{peaks[w]['peak'] / 2**20:,.0f} MiB ({peaks[w]['times_trl']:.2f}x)"
                for w in ("trl", "foretell", "naive")
            ]
            lines.append(f"| | peak memory | {' | '.join(cells)} |")
    return [*lines, "", where(result["step"]["provenance"])]


def masked_table(result: dict[str, Any]) -> list[str]:
    """Mask tokens: the step against the published design, long texts, and tau by setting."""
    lines = ["| a training step | two passes | published design | |", "|---|---|---|---|"]
    for depth, step in result.get("step", {}).items():
        if "seconds" not in step:
            continue
        seconds, faster = step["seconds"], step["times_faster"]
        lines.append(f"| {depth} | {seconds['two passes']:.1f} s | {seconds['published']:.1f} s | {faster:.2f}x |")
        if depth in result.get("memory", {}):
            found = result["memory"][depth]
            cells = [f"+{found['added'][design] / 2**20:,.0f} MiB" for design in ("two passes", "published")]
            lines.append(f"| {depth}, memory | {' | '.join(cells)} | {found['share_of_published']:.2f} of it |")
    if "layer" in result:
        seconds, faster = result["layer"]["seconds"], result["layer"]["times_faster"]
        cells = f"{seconds['two passes']:.1f} s | {seconds['published']:.1f} s | {faster:.2f}x |"
        lines.append(f"| vocabulary part alone, 151,936 tokens, K = 4 | {cells}")
    if "step" in result:
        lines += ["", f"SmolLM2-135M, fp32, one text, interleaved medians. {where(result['step']['provenance'])}"]
    if "stream" in result:
        lengths = [key for key in result["stream"] if key.isdigit()]
        lines += ["", "| tokens of one text | memory of the step | of which keys and values |", "|---|---|---|"]
        for key in lengths:
            found = result["stream"][key]
            cells = [f"{found[name] / 2**20:.0f} MiB" for name in ("added", "keys_and_values")]
            lines.append(f"| {int(key):,} | {' | '.join(cells)} |")
    if "long" in result:
        lines += ["", f"100,000 tokens, a tenth with masks: a step in {result['long']['seconds']:.0f} s."]
    if "tau" in result:
        lines += [
            "",
            "| small target, K = 4 | loss | accuracy of depth 1 to 4 | tau, linear | tau, quadratic |",
            "|---|---|---|---|---|",
        ]
        for part, mark in (("tau", ""), ("confirm", "SmolLM2: ")):
            for name, found in result.get(part, {}).items():
                if isinstance(found, dict) and "quadratic" in found:
                    accuracy = ", ".join(f"{a:.2f}" for a in found["accuracy"])
                    taus = f"{found['linear']['tau']:.3f} | {found['quadratic']['tau']:.3f}"
                    lines.append(f"| {mark}{name} | {found['loss']:.2f} | {accuracy} | {taus} |")
        steps = result["tau"]["steps"]
        lines += ["", f"{steps} steps of 8 answers, one seed. {where(result['tau']['provenance'])}"]
    return lines


def where(provenance: dict[str, Any]) -> str:
    """Hardware, day and commit."""
    cpu = provenance.get("cpu") or provenance["hardware"]["cpu"]
    time = provenance.get("time") or provenance["time_utc"]
    return f"{cpu}, {time[:10]}, commit {str(provenance['commit'])[:10]}."


def selfdistill_table(result: dict[str, Any]) -> list[str]:
    """What masks, modules and heads learn from; lossy and lossless decoding; speed by batch."""
    lines: list[str] = []

    def compared(part: str, what: str) -> None:
        for name, arms in result.get(part, {}).items():
            if not isinstance(arms, dict) or name == "provenance":
                continue
            depth = max(len(arm["accept_given"]) for arm in arms.values())
            heads = " | ".join(f"accept_given[{k}]" for k in range(1, depth + 1))
            lines.extend([f"| {what}{name} | tau | {heads} |", "|---" * (depth + 2) + "|"])
            for arm, found in arms.items():
                pairs = zip(found["accept_given"], found["accept_given_sd"], strict=True)
                cells = " | ".join(f"{a:.3f} ± {sd:.3f}" for a, sd in pairs)
                lines.append(f"| {arm} | {found['tau']:.3f} ± {found['tau_sd']:.3f} | {cells} |")
            lines.append("")
        if part in result:
            seeds = len(next(iter(arms.values()))["runs"])
            lines.extend([
                f"{result[part]['steps']} steps of 8 answers, mean and standard deviation of {seeds} seeds, lossless.",
                where(result[part]["provenance"]), "",
            ])  # fmt: skip

    compared("arms", "gated LoRA, K = 4: ")
    compared("chains", "K = 3: ")
    if "confirm" in result:
        lines += ["| SmolLM2-135M | tau | accept_given |", "|---|---|---|"]
        for arm, found in result["confirm"].items():
            if isinstance(found, dict) and "tau" in found:
                lines.append(f"| {arm} | {found['tau']:.3f} | {', '.join(f'{a:.3f}' for a in found['accept_given'])} |")
        lines += ["", f"{result['confirm']['steps']} steps of 4 answers, one seed.", ""]
    if "curve" in result:
        found = result["curve"]
        sets = list(found["target"])
        heads = " | ".join(f"{n}: tokens a forward | tokens agree | whole answers | accuracy" for n in sets)
        lines += [f"| | {heads} |", "|---" * (1 + 4 * len(sets)) + "|"]
        for method, points in found.items():
            if not isinstance(points, dict) or "drift" not in points:
                continue
            for way in ("static 1", "static 2", "static 3", "confadapt 0.95", "confadapt 0.9", "confadapt 0.6",
                        "lossless", "lossless, quadratic"):  # fmt: skip
                cells = [
                    f"{p['tau']:.2f} | {p['tokens_agree']:.3f} | {p['exact']:.3f} | "
                    + ("" if p["accuracy"] is None else f"{p['accuracy']:.3f}")
                    for p in (points[way][n] for n in sets)
                ]
                lines.append(f"| {method}: {way} | {' | '.join(cells)} |")
        accuracy = found["target"][sets[0]]["accuracy"]
        drifts = "; ".join(
            f"{m} {', '.join(f'{v:.4f}' for v in p['drift'].values())}"
            for m, p in found.items()
            if isinstance(p, dict) and "drift" in p
        )
        lines += ["", f"Agreement is with the untrained target's own answers (its accuracy: {accuracy:.3f}); lossless",
                  "outputs equal the trained model's at k = 1, which gated adapters alone leave untouched. Drift, the",
                  f"mean KL of that model from the target in nats a token ({', '.join(sets)}): {drifts}.",
                  where(found["provenance"]), ""]  # fmt: skip
    if "speed" in result:
        ways = list(next(v for k, v in result["speed"].items() if k.startswith("batch")))
        lines += ["| tokens/s (times off) | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
        for batch, found in result["speed"].items():
            if batch.startswith("batch"):
                cells = [f"{found[w]['tokens_per_second']:.1f} ({found[w]['times_off']:.2f})" for w in ways]
                lines.append(f"| {batch} | {' | '.join(cells)} |")
        lines += ["", "SmolLM2-135M, fp32, interleaved medians of 3.", where(result["speed"]["provenance"])]
    return lines


def rl_table(result: dict[str, Any]) -> list[str]:
    """Arms of benchmarks/rl.py: rollouts in CPU time, steps, tau."""
    arms = {arm: about for arm, about in result["arms"].items() if "tokens_per_cpu_second" in about}
    peak = {arm: f"{size / 2**30:.2f}" for arm, size in result.get("memory_bytes", {}).items()}
    steps = len(arms["off"]["steps"])
    lines = [
        "| | tokens a CPU second | times off | times TRL's | step, CPU s | in rollouts | tau | first to last third | "
        "reward | as off's | peak GiB |",
        "|---" * 11 + "|",
    ]
    for arm, about in arms.items():
        same = "/".join(map(str, about["same_as_off"])) if "same_as_off" in about else ""
        times = [f"{about[name]:.2f}" if name in about else "" for name in ("times_off", "times_trl")]
        lines.append(
            f"| {arm} | {about['tokens_per_cpu_second']:.1f} | {times[0]} | "
            f"{times[1]} | {about['step_cpu_seconds']:.1f} | {about['share_in_rollouts']:.0%} | "
            f"{about.get('tau', 1):.2f} | {about.get('tau_first', 1):.2f} to {about.get('tau_last', 1):.2f} | "
            f"{about['reward']:.2f} | {same} | {peak.get(arm, '')} |"
        )
    asked = result["settings"]
    return [
        *lines,
        "",
        f"SmolLM2-135M-Instruct, fp32, one thread, {steps} steps of {asked['group']} rollouts",
        f"of up to {asked['new_tokens']} tokens, temperature {asked['temperature']}, rate {asked['learning_rate']};",
        "the first step is left out. " + where(result["provenance"]),
    ]


def serve_table(result: dict[str, Any]) -> list[str]:
    """Tokens a second of `foretell serve` by clients, and how many times another server's that is."""
    asked = (name for name in result if isinstance(result[name], dict) and "foretell" in result[name])
    ways = [(name, result[rival][name]) for rival in asked for name in ("foretell, drafts off", rival)
            if name in result[rival]]  # fmt: skip
    ours, clients = result["transformers serve"]["foretell"], list(result["transformers serve"]["foretell"])
    names = [f"{n} client{'s' if int(n) > 1 else ''}" for n in clients]
    lines = [f"| | {' | '.join(names)} |", "|---" * (1 + len(clients)) + "|"]
    lines.append("| tokens a second | " + " | ".join(f"{ours[n]['tokens_per_second']:.0f}" for n in clients) + " |")
    for name, found in ways:
        cells = []
        for n in clients:
            low, high = found[n]["ours_against_it_spread"]
            cells.append(f"{found[n]['ours_against_it']:.2f}" + (f" ({low:.2f} to {high:.2f})" if low < high else ""))
        lines.append(f"| times {name} | {' | '.join(cells)} |")
    bare = result["decoder alone"]
    low, high = bare["decoder_against_server_spread"]
    return [
        *lines,
        "",
        f"SmolLM2-135M-Instruct, fp32, up to {result['new_tokens']} new tokens, greedy; medians of three interleaved",
        "repeats (64 clients once), the spread in brackets. Sixteen requests at once, the decoder alone in one call is",
        f"{bare['decoder_against_server']:.2f} ({low:.2f} to {high:.2f}) times as fast as through the server,",
        f"which holds {bare['server_memory_against_decoder']:.2f} times its memory. " + where(result["provenance"]),
    ]


def data_table(result: dict[str, Any]) -> list[str]:
    """Tokens a second of each stage from raw chats to a step, by build and processes."""
    stages = {
        "prompts": "`foretell prompts`: read, judged, written",
        "encode": "encoded, one turn a conversation",
        "encode-six": "encoded, six turns",
        "encode-ten": "encoded, one turn, ten times as many rows",
        "kept": "encoded rows found in the cache",
        "batches": "batches of 8 rows for a step",
        "answer": "answered by SmolLM2: {prompts} prompts, {new_tokens} tokens".format(**result["answers"]),
    }
    lines = ["| | old build | this build | times | this build, two processes |", "|---|---|---|---|---|"]
    for name, label in stages.items():
        found = {way: of["tokens_per_second"] for way, of in result["stages"].get(name, {}).items()}
        if "new 1" in found:
            old, two = found.get("old 1"), found.get("new 2")
            cells = ["" if old is None else f"{old:,.0f}", f"{found['new 1']:,.0f}"]
            cells += ["" if old is None else f"{found['new 1'] / old:.2f}", "" if two is None else f"{two:,.0f}"]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"Tokens a second by the clock, {result['rows']:,} questions and answers of GSM8K,",
        f"medians of {result['repeats']}; old: commit {result['old_commit'][:10]}.",
        "Answering takes both cores in either column.",
        where(result["provenance"]),
    ]


TABLES: list[tuple[str, str, str, Callable[[dict[str, Any]], list[str]]]] = [
    ("demo", "README.md", "demo", demo_table),
    ("speed", "README.md", "speed", speed_table),
    ("data", "docs/data.md", "data", data_table),
    ("second target", "docs/training.md", "second_target", demo_table),
    ("ablation", "docs/training.md", "ablation", ablation_table),
    ("machine", "docs/decoding.md", "machine", machine_table),
    ("heads", "docs/sft.md", "heads", heads_table),
    ("step", "docs/sft.md", "heads", step_table),
    ("masked", "docs/masked.md", "masked", masked_table),
    ("selfdistill", "docs/selfdistill.md", "selfdistill", selfdistill_table),
    ("rl", "docs/rl.md", "rl", rl_table),
    ("serve", "docs/serve.md", "serve", serve_table),
]


def main() -> int:
    """Write the tables; with --check only say whether they are up to date."""
    stale = False
    for name, page, results, table in TABLES:
        path, source = ROOT / page, ROOT / "results" / f"{results}.json"
        if not source.is_file():
            continue
        start = f"<!-- {name} table: generated by `python benchmarks/tables.py` from results/{results}.json -->"
        end = f"<!-- end of {name} table -->"
        text = path.read_text(encoding="utf-8")
        before, rest = text.split(start)
        lines = "\n".join(table(json.loads(source.read_text(encoding="utf-8"))))
        fresh = f"{before}{start}\n{lines}\n{end}{rest.split(end)[1]}"
        stale |= fresh != text
        if "--check" not in sys.argv:
            path.write_text(fresh, encoding="utf-8")
    return int(stale and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
