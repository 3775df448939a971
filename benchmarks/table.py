"""Prints results of this folder as Markdown tables: pytest-benchmark's, and other scripts'.

python benchmarks/table.py benchmarks/results/*.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from sources import kernel_sources_sha256


def _time(seconds: float) -> str:
    if seconds < 1e-4:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.3f} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def table(path: Path) -> str:
    """Of a result file, by what it holds."""
    result = json.loads(path.read_text())
    (kind,) = TABLES.keys() & result.keys()
    return TABLES[kind](result)


def kernels_table(result: dict) -> str:
    """One line a case: each contender's median time, share of the floor, speed-up over eager."""
    machine = result["machine_info"]
    cases: dict[tuple[str, str], dict[str, dict]] = {}
    for bench in result["benchmarks"]:
        extra = bench["extra_info"]
        seconds = extra.get("device_seconds", bench["stats"]["median"])
        share = extra["floor_bytes"] / extra["bandwidth"] / seconds
        memory = extra.get("peak_extra_bytes")
        cases.setdefault((extra["op"], extra["case"]), {})[extra["contender"]] = {
            "seconds": seconds,
            "share": share,
            "memory": memory,
            "goal": extra.get("goal"),
        }
    from_hidden = {key: found for key, found in cases.items() if "three products" in found}
    cases = {key: found for key, found in cases.items() if key not in from_hidden}
    contenders = ["dense eager", "eager", "compiled", "memdec"]
    used = [name for name in contenders if any(name in case for case in cases.values())]
    current = {kernel_sources_sha256("cpu"), kernel_sources_sha256("cuda")}
    simd = f" at level {machine['simd']}" if "simd" in machine else ""
    state = "as they are now" if machine["kernel_sources"] in current else "changed since"
    lines = [
        f"{machine['device']}, torch {machine['torch']}, Python {machine['python']}, "
        f"{machine['threads']} threads{simd}, kernels {machine['kernel_sources']}, {state}. Medians, cold "
        "cache.",
        "",
        "| op | case | " + " | ".join(used) + " | memdec: share of the floor | against eager |",
        "|---" * (len(used) + 4) + "|",
    ]
    with_memory = any(one["memory"] for found in cases.values() for one in found.values())
    if with_memory:
        lines[2:] = [lines[2] + " memdec: extra memory |", lines[3] + "---|"]
    with_goals = any("goal" in bench["extra_info"] for bench in result["benchmarks"])
    if with_goals:
        lines[2:] = [lines[2] + " goal | met |", lines[3] + "---|---|"]
    for (op, case), found in cases.items():
        times = [_time(found[name]["seconds"]) if name in found else "" for name in used]
        ours = found.get("memdec")
        share = f"{ours['share']:.2f}" if ours and ours["share"] else ""
        gain = ""
        if ours and "eager" in found:
            gain = f"{found['eager']['seconds'] / ours['seconds']:.1f} x"
        line = f"| {op} | {case} | " + " | ".join(times) + f" | {share} | {gain} |"
        if with_memory:
            line += f" {_size(ours['memory']) if ours and ours['memory'] else ''} |"
        lines.append(line + (_goal(found) if with_goals else ""))
    if not cases:
        del lines[1:]
    for (op, case), found in from_hidden.items():
        lines += ["", *_from_hidden_states(op, case, found)]
    return "\n".join(lines)


def _goal(found: dict[str, dict]) -> str:
    """Two columns: what memdec shall reach, and whether it does, in the same order."""
    ours = found.get("memdec")
    if not ours or not ours["goal"]:
        return "  |  |"
    shown, met = [], []
    for kind, goal in ours["goal"].items():
        if kind == "share":
            shown.append(f"{goal:.2f}")
            reached = ours["share"] >= goal
        elif kind == "seconds":
            shown.append(_time(goal))
            reached = ours["seconds"] <= goal
        else:
            rival = {"times_eager": "eager", "times_dense": "dense eager"}[kind]
            shown.append(f"{goal:g} x {rival}")
            reached = found[rival]["seconds"] >= goal * ours["seconds"]
        met.append("yes" if reached else "no")
    return f" {', '.join(shown)} | {', '.join(met)} |"


def _from_hidden_states(op: str, case: str, found: dict[str, dict]) -> list[str]:
    """A line a contender: its time, that in units of the matrix products alone, and its memory."""
    products = found["three products"]["seconds"]
    lines = [
        f"{op}: {case}",
        "",
        "| | time | x products | extra memory | goal | met |",
        "|---" * 6 + "|",
    ]
    for name, entry in found.items():
        memory = "" if entry["memory"] is None else f"{entry['memory'] / 1e9:.2f} GB"
        ratio = entry["seconds"] / products
        reached = {"seconds": entry["seconds"], "products": ratio, "bytes": entry["memory"]}
        goal = entry["goal"] or {}
        shown = {"seconds": _time, "products": "{:.2f} x".format, "bytes": _gigabytes}
        wanted = ", ".join(shown[kind](value) for kind, value in goal.items())
        met = "yes" if all(reached[kind] <= value for kind, value in goal.items()) else "no"
        lines.append(
            f"| {name} | {_time(entry['seconds'])} | {ratio:.2f} | {memory} | {wanted} | "
            f"{met if goal else ''} |"
        )
    return lines


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def training_table(result: dict) -> str:
    """One line a contender of training_step.py."""
    machine = result["machine_info"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}. "
        f"{result['setting']}.",
        "",
        "| trainer | compiled | tokens a second | of memdec, CE | time of a step | peak memory | "
        "GPU busy |",
        "|---" * 7 + "|",
    ]
    rates = {
        (row["contender"], row["compiled"]): row["tokens_per_second"]
        for row in result["training_step"]
    }
    for row in result["training_step"]:
        plain = rates.get(("memdec, CE", row["compiled"]))
        ratio = "" if plain is None else f"{row['tokens_per_second'] / plain:.3f}"
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f} GB"
        busy = "" if row["gpu_busy"] is None else f"{row['gpu_busy']:.0%}"
        lines.append(
            f"| {row['contender']} | {'yes' if row['compiled'] else 'no'} | "
            f"{row['tokens_per_second']:,.0f} | {ratio} | {_time(row['step_seconds'])} | {memory} | "
            f"{busy} |"
        )
    for compiled in sorted({compiled for _, compiled in rates}):
        rate = rates.get(("memdec, KL and CE", compiled), 0.0)
        plain = rates.get(("memdec, CE", compiled), float("inf"))
        goals = {
            "0.95 of plain CE": rate >= 0.95 * plain,
            "176,400 tokens a second": rate >= 176_400,
        }
        met = ", ".join(
            f"{goal}: {'met' if reached else 'not met'}" for goal, reached in goals.items()
        )
        lines += ["", f"KL and CE, {'compiled' if compiled else 'not compiled'}: {met}."]
    return "\n".join(lines)


def teacher_table(result: dict) -> str:
    """One line a stage of teacher.py: its rate, what that is of its floor, and the goals."""
    machine = result["machine_info"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}. "
        f"{result['setting']}.",
        "",
        "| stage | a second | against | share | goal | met | GPU busy | goal | met | peak memory |",
        "|---" * 10 + "|",
    ]
    for row in result["teacher"]:
        floor, share = row["floor"], row["share"]
        against = "" if floor is None else f"{row['floor_name']}: {floor:,.0f}"
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f} GB"
        goal, reached = row["goal"], share
        shown = "" if goal is None else f"{goal:.2f}"
        if row["rate_goal"] is not None:
            goal, reached = row["rate_goal"], row["rate"]
            shown = f"{goal:,.0f} a second"
        cells = [
            row["stage"],
            f"{row['rate']:,.0f} {row['unit']}",
            against,
            "" if share is None else f"{share:.2f}",
            *(shown, _met(reached, goal)),
            "" if row["gpu_busy"] is None else f"{row['gpu_busy']:.0%}",
            "" if row["busy_goal"] is None else f"{row['busy_goal']:.0%}",
            _met(row["gpu_busy"], row["busy_goal"]),
            memory,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def indexes_table(result: dict) -> str:
    """One line an index of indexes.py, and nprobe: size, speed, recall and what the kNN-LM is worth."""
    machine = result["machine_info"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, FAISS {machine['faiss']}. "
        f"{result['setting']}. The teacher alone: perplexity {result['teacher_perplexity']:.3f}.",
        "",
        f"| index | nprobe | bytes a key | seconds to build | queries a second | "
        f"recall@{result['k']} | temperature | lmbda | perplexity |",
        "|---" * 9 + "|",
    ]
    for row in result["indexes"]:
        cells = [
            row["index"],
            "" if row["nprobe"] is None else f"{row['nprobe']}",
            f"{row['bytes'] / result['keys']:,.0f}",
            f"{row['build_seconds']:,.0f}",
            f"{row['queries_per_second']:,.0f}",
            f"{row['recall']:.3f}",
            f"{row['temperature']:.3g}",
            f"{row['lmbda']:.2f}",
            f"{row['perplexity']:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def faults_table(result: dict) -> str:
    """One line a stage of tests/test_faults.py: where the kills met it, and what came of it."""
    machine = result["machine_info"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"Python {machine['python']}.",
        "",
        "| stage | seconds alone | kill -9 | before a first file | between files | with all files "
        "| run to the end | same bytes |",
        "|---" * 8 + "|",
    ]
    for stage, row in result["faults"].items():
        finished = [files for _, files in row["kills"]]
        nothing, everything = finished.count(0), finished.count(row["files"])
        cells = [
            stage,
            f"{row['seconds']:.1f}",
            f"{len(finished)}",
            f"{nothing}",
            f"{len(finished) - nothing - everything}",
            f"{everything}",
            f"{row['ends']}",
            "yes" if row["same_bytes"] else "NO",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def processes_table(result: dict) -> str:
    """One line a stage of processes.py: its rate in one process and in several, and the bytes."""
    machine = result["machine_info"]
    counts = list(result["processes"][0]["seconds"])
    heads = [f"{count} process{'' if int(count) == 1 else 'es'}" for count in counts]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}. "
        f"{result['setting']}.",
        "",
        f"| stage | a second, {heads[0]} | {heads[1]} | ratio | same bytes |",
        "|---" * 5 + "|",
    ]
    for row in result["processes"]:
        one, several = (row["count"] / taken for taken in row["seconds"].values())
        cells = [row["stage"], f"{one:,.0f} {row['unit']}", f"{several:,.0f}"]
        cells += [f"{several / one:.2f}", "yes" if row["same_bytes"] else "NO"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def whole_table(result: dict) -> str:
    """Of whole.py: one line a stage, what it took beside its plan; sizes; perplexities."""
    machine, planned = result["machine_info"], result["plan"]
    faiss = f", FAISS {machine['faiss']}" if "faiss" in machine else ""
    corpus = planned["corpus"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}{faiss}. "
        f"Planned for {'about ' if corpus['estimated'] else ''}{corpus['train']:,} train tokens.",
        "",
        "| stage | time | planned | disk | planned | memory | planned | GPU memory | planned | GPU busy |",
        "|---" * 10 + "|",
    ]
    needs = {need["stage"]: need for need in planned["needs"]}
    rows = [row for row in result["whole"] if row["finished"]]
    for row in rows:
        need = needs[row["stage"]]
        cells = [row["stage"], f"{row['seconds']:,.0f} s", f"{need['seconds']:,.0f} s"]
        for kind in ("disk", "memory", "gpu_memory"):
            cells += [_size(row[kind]), _size(need[kind])]
        cells.append(f"{row['busy_seconds'] / row['seconds']:.0%}" if row["gpu_memory"] else "")
        lines.append("| " + " | ".join(cells) + " |")
    took, said = (sum(one["seconds"] for one in ones) for ones in (rows, planned["needs"]))
    disk, kept = (sum(one["disk"] for one in ones) for ones in (rows, planned["needs"]))
    cells = ["all", f"{took:,.0f} s", f"{said:,.0f} s", _size(disk), _size(kept)]
    lines.append("| " + " | ".join([*cells, *[""] * 5]) + " |")
    lines += ["", *(f"{need['stage']}: {need['note']}." for need in needs.values() if need["note"])]
    if "eval" in result:
        lines += ["", *_whole_outcome(result)]
    return "\n".join(lines)


def _whole_outcome(result: dict) -> list[str]:
    found, sizes = result["eval"], result["sizes"]
    lines = [
        f"| {found['positions']:,} test tokens | perplexity | 95 % interval | lmbda | parameters "
        "| rare tokens | function words |",
        "|---" * 7 + "|",
    ]
    for row in found["rows"]:
        number = [
            "infinite" if x is None else f"{x:.2f}" for x in (row["perplexity"], *row["interval"])
        ]
        cells = [row["name"], number[0], f"{number[1]} to {number[2]}"]
        cells.append("" if row["lmbda"] is None else f"{row['lmbda']:.2f}")
        cells.append(f"{row['parameters'] / 1e6:.1f} M")
        for measure in ("tail_gain", "function_words"):  # infinite, or of no token, is None
            known = row["name"] != "base" and row[measure] is not None
            cells.append(f"{row[measure]:.2f}" if known else "")
        lines.append("| " + " | ".join(cells) + " |")
    if sizes.get("keys"):
        (memory,) = (2 * row["parameters"] for row in found["rows"] if row["name"] == "memory")
        lines += [
            "",
            f"The datastore has {_size(sizes['keys'])} of keys and {_size(sizes['index'])} of index. "
            f"In 16 bits, as the keys are, the memory has {memory / 1e6:,.0f} MB: "
            f"the keys {sizes['keys'] / memory:.1f} times as much.",
        ]
    return lines


def _size(count: int) -> str:
    if not count:
        return ""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _met(reached: float | None, goal: float | None) -> str:
    if reached is None or goal is None:
        return ""
    return "yes" if reached >= goal else "no"


TABLES: dict[str, Callable[[dict], str]] = {
    "benchmarks": kernels_table,
    "training_step": training_table,
    "teacher": teacher_table,
    "indexes": indexes_table,
    "faults": faults_table,
    "processes": processes_table,
    "whole": whole_table,
}

if __name__ == "__main__":
    print("\n\n".join(table(Path(name)) for name in sys.argv[1:]))
