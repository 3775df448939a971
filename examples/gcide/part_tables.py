"""Prints the tables of docs/gcide-more.md from a result of cloze.py, bases.py, transfer.py, decoding.py.

python examples/gcide/part_tables.py examples/gcide/results/parts.json [part ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from table import machine

Part = Mapping[str, Any]

# Decoding overhead in the paper (arXiv 2508.09874).
PAPER = {"base": 1.0, "base and memory": 1.28, "kNN-LM": 2.17, "in-context retrieval": 1.51}


def cloze(part: Part) -> Iterator[str]:
    """Right answers in per cent; of the base with its interval, of others with the difference."""
    for how, title in (
        ("plain", "By log-probability"),
        ("by_character", "By log-probability a character"),
    ):
        yield f"{title}, per cent of right answers; chance is {100 / part['options']:.0f}."
        yield ""
        yield f"| text | task | questions | {' | '.join(part['models'])} |"
        yield "|---" * (3 + len(part["models"])) + "|"
        for task in part["tasks"]:
            cells = [_accuracy(name, task["models"][name][how]) for name in part["models"]]
            head = f"| {_text(task['text'])} | {task['task']} | {task['questions']}"
            yield f"{head} | {' | '.join(cells)} |"
        yield ""


def _accuracy(name: str, found: Mapping[str, Any]) -> str:
    share = f"{100 * found['accuracy']:.1f}"
    if name == "base":
        low, high = found["interval"]
        return f"{share} ({100 * low:.1f} to {100 * high:.1f})"
    half = (found["from_base_interval"][1] - found["from_base_interval"][0]) / 2
    return f"{share} ({100 * found['from_base']:+.1f} ± {100 * half:.1f})"


def bases(part: Part) -> Iterator[str]:
    yield f"The memory alone: {part['memory_alone']['perplexity']:.2f}."
    yield ""
    yield "| base | alone | 95 % interval | with the memory | 95 % interval | lmbda |"
    yield "|---|---|---|---|---|---|"
    for row in part["rows"]:
        cells = [
            cell
            for how in ("alone", "joint")
            for cell in (
                f"{row[how]['perplexity']:.2f}",
                " to ".join(f"{end:.2f}" for end in row[how]["interval"]),
            )
        ]
        yield f"| {row['name']} | {' | '.join(cells)} | {row['lmbda']:.2f} |"


def transfer(part: Part) -> Iterator[str]:
    seen = part["tokens_seen"]
    yield f"Tokens seen: the memory {seen['memory']:,}, each moved one {seen['moved']:,}."
    yield ""
    joint = part.get("joint")
    both = {} if joint is None else {row["name"]: row for row in joint["rows"]}
    yield "| memory | tokens of test | bits a byte | beside the moved base | lmbda |"
    yield "|---|---|---|---|---|"
    for row in part["rows"]:
        beside = both.get(row["name"])
        cells = ["", ""] if beside is None else [f"{beside['bits']:.3f}", f"{beside['lmbda']:.2f}"]
        yield f"| {row['name']} | {row['tokens']:,} | {row['bits']:.3f} | {' | '.join(cells)} |"
    if joint is not None:
        yield ""
        yield f"Bits a byte of the base {joint['old_base']:.3f}, of the moved base {joint['base']:.3f}."


def decoding(part: Part) -> Iterator[str]:
    lengths = part["lengths"]
    yield (
        f"{part['dtype']}, prompts of {lengths['prompt']} tokens, {lengths['new']} new ones, "
        f"{lengths['retrieved']} retrieved; medians of {lengths['repeats']} rounds, of a token its quartiles too."
    )
    yield ""
    batches = sorted({row["batch"] for row in part["rows"]})
    heads = [
        f"batch {batch}: {what}"
        for batch in batches
        for what in ("ms a token", "overhead", "whole answer, ms", "overhead")
    ]
    yield f"| path | | {' | '.join(heads)} | the paper's |"
    yield "|---" * (3 + len(heads)) + "|"
    found = {(row["path"], row["name"], row["batch"]): row for row in part["rows"]}
    for path, name in dict.fromkeys((row["path"], row["name"]) for row in part["rows"]):
        cells = []
        for batch in batches:
            row, base = found.get((path, name, batch)), found.get((path, "base", batch))
            if row is None or base is None:
                cells += [""] * 4
                continue
            low, high = row["quartiles"]
            token = f"{1e3 * row['token']:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f})"
            for what, cell in (("token", token), ("answer", f"{1e3 * row['answer']:.2f}")):
                cells += [cell, f"{row[what] / base[what]:.2f}"]
        yield f"| {path} | {name} | {' | '.join(cells)} | {PAPER[name]:.2f} |"


TABLES: dict[str, Callable[[Part], Iterator[str]]] = {
    "cloze": cloze,
    "bases": bases,
    "transfer": transfer,
    "decoding": decoding,
    "decoding of other shapes": decoding,
}


def _text(name: str) -> str:
    return "GCIDE" if name == "test" else name


def tables(path: Path, names: list[str]) -> Iterator[str]:
    result = json.loads(path.read_text())
    for name in names or TABLES:
        if name not in result:
            continue
        yield machine(result[name])
        yield ""
        yield from TABLES[name](result[name])
        yield ""


if __name__ == "__main__":
    print("\n".join(tables(Path(sys.argv[1]), sys.argv[2:])).rstrip())
