"""The tables of a page are those that the script prints from the committed results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", ["indexes", "faults"])
def test_the_tables_of_the_teachers_page(kind):
    results = sorted((ROOT / "benchmarks" / "results").glob(f"*-{kind}.json"))
    command = [sys.executable, str(ROOT / "benchmarks" / "table.py"), *map(str, results)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "teacher.md").read_text()
    assert results
    for line in printed.splitlines():
        assert line in page.splitlines()
