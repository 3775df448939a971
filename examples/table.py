"""Prints the tables of a build's report.html, as Markdown, from what collect.py kept of it.

python examples/table.py examples/wordnet/results/two-cores.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from memdec.report.tables import Table, main_table, side_effects


def tables(path: Path) -> str:
    result = json.loads(path.read_text())
    machine, found = result["machine"], result["eval"]
    head = (
        f"{found['positions']:,} held-out tokens ({found['split']} split); {machine['device']}, "
        f"torch {machine['torch']}, transformers {machine['transformers']}."
    )
    main = main_table(found, result["row_seconds"], result["stage_seconds"])
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in result["stage_seconds"].items())
    return "\n".join(
        [
            head,
            "",
            *_lines(main),
            "",
            *_lines(side_effects(found)),
            "",
            f"Seconds of the stages: {seconds}; {sum(result['stage_seconds'].values()):.0f} in all.",
        ]
    )


def _lines(table: Table) -> Iterator[str]:
    yield f"| {' | '.join(table.head)} |"
    yield "|---" * len(table.head) + "|"
    for row in table.rows:
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    print("\n\n".join(tables(Path(name)) for name in sys.argv[1:]))
