"""The tables of a page are those that the script prints from the committed results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


RESULTS = ROOT / "benchmarks" / "results"
OF_THE_TEACHER = [*RESULTS.glob("*-indexes.json"), *RESULTS.glob("*-faults.json")]
BENCHMARKS = ROOT / "benchmarks" / "table.py"
GCIDE = ROOT / "examples" / "gcide"
WORDNET = ROOT / "examples" / "wordnet" / "results"
# Of each page: the script that prints its tables, and the results.
PAGES = {
    "teacher.md": (BENCHMARKS, OF_THE_TEACHER),
    "benchmarks.md": (
        BENCHMARKS,
        [path for path in RESULTS.glob("*.json") if path not in OF_THE_TEACHER],
    ),
    "gcide.md": (GCIDE / "table.py", [GCIDE / "results" / "h100.json"]),
    "tutorial.md": (ROOT / "examples" / "table.py", [WORDNET / "two-cores.json"]),
}


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_a_page(page: str) -> None:
    script, results = PAGES[page]
    assert results
    command = [sys.executable, str(script), *map(str, results)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = (ROOT / "docs" / page).read_text().splitlines()
    for line in printed.splitlines():
        assert line in lines


def test_what_the_commands_of_the_tutorial_print() -> None:
    """Every line of its text blocks is one of the transcript; an ellipsis stands for lines left out."""
    transcript = (WORDNET / "two-cores.txt").read_text().splitlines()
    page = (ROOT / "docs" / "tutorial.md").read_text()
    blocks = re.findall(r"^```text\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    shown = [line for block in blocks for line in block.splitlines() if line != "..."]
    assert len(shown) > 50
    assert [line for line in shown if line not in transcript] == []
