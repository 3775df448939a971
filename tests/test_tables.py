"""The tables of a page are those that the script prints from the committed results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


RESULTS = ROOT / "benchmarks" / "results"
KINDS_OF_THE_TEACHER = ("indexes", "faults", "teacher", "whole", "processes")
OF_THE_TEACHER = [path for kind in KINDS_OF_THE_TEACHER for path in RESULTS.glob(f"*-{kind}.json")]
BENCHMARKS = ROOT / "benchmarks" / "table.py"
GCIDE = ROOT / "examples" / "gcide"
# Of each page: the script that prints its tables, and the results.
PAGES = {
    "teacher.md": (BENCHMARKS, OF_THE_TEACHER),
    "benchmarks.md": (
        BENCHMARKS,
        [path for path in RESULTS.glob("*.json") if path not in OF_THE_TEACHER],
    ),
    "gcide.md": (GCIDE / "table.py", [GCIDE / "results" / "h100.json"]),
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
