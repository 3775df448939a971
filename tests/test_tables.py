"""The tables of a page are those that the script prints from the committed results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


RESULTS = ROOT / "benchmarks" / "results"
OF_THE_TEACHER = [*RESULTS.glob("*-indexes.json"), *RESULTS.glob("*-faults.json")]
PAGES = {
    "teacher.md": OF_THE_TEACHER,
    "benchmarks.md": [path for path in RESULTS.glob("*.json") if path not in OF_THE_TEACHER],
}


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_a_page(page: str) -> None:
    assert PAGES[page]
    command = [sys.executable, str(ROOT / "benchmarks" / "table.py"), *map(str, PAGES[page])]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = (ROOT / "docs" / page).read_text().splitlines()
    for line in printed.splitlines():
        assert line in lines
