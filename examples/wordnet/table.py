"""Prints the tables of docs/wordnet.md from the committed results.

    python examples/wordnet/table.py examples/wordnet/results/nvidia-*.json

A result holds a build's ``eval/eval.json`` under "eval", the seconds of its stages, and the machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(path: Path) -> str:
    result = json.loads(path.read_text())
    machine, found = result["machine"], result["eval"]
    lines = [
        f"{found['positions']:,} held-out tokens ({found['split']} split); "
        f"{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}.",
        "",
        "| model | perplexity | 95 % interval | lmbda | parameters |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        low, high = row["interval"]
        lmbda = "" if row["lmbda"] is None else f"{row['lmbda']:.2f}"
        lines.append(
            f"| {row['name']} | {row['perplexity']:.2f} | {low:.2f} to {high:.2f} | {lmbda} "
            f"| {row['parameters'] / 1e6:.1f} M |"
        )
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in result["stage_seconds"].items())
    lines += ["", f"Seconds of the stages: {seconds}."]
    names = [row["name"] for row in found["rows"]]
    lines += [
        "",
        "Mean nll by how often the token occurs in the train split:",
        "",
        "| occurrences | tokens | " + " | ".join(names) + " |",
        "|---" * (2 + len(names)) + "|",
    ]
    for bucket in found["frequency"]:
        values = " | ".join(f"{bucket['nll'][name]:.2f}" for name in names)
        lines.append(f"| {bucket['bucket']} | {bucket['positions']:,} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(table(Path(name)) for name in sys.argv[1:]))
