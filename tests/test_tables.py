"""The tables of a page are those that the script prints from the committed results."""

from __future__ import annotations

import re
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
WORDNET = ROOT / "examples" / "wordnet" / "results"
# Of each page: the script that prints its tables, and the results.
PAGES = {
    "teacher.md": (BENCHMARKS, OF_THE_TEACHER),
    "benchmarks.md": (
        BENCHMARKS,
        [path for path in RESULTS.glob("*.json") if path not in OF_THE_TEACHER],
    ),
    "gcide.md": (
        GCIDE / "table.py",
        [path for path in (GCIDE / "results").glob("h*.json") if "marks" not in path.name],
    ),
    "gcide-more.md": (GCIDE / "part_tables.py", [GCIDE / "results" / "parts.json"]),
    "wordnet.md": (WORDNET.parent / "table.py", list(WORDNET.glob("nvidia-*.json"))),
    "tutorial.md": (ROOT / "examples" / "table.py", [WORDNET / "two-cores.json"]),
}


def printed(script: Path, results: list[Path]) -> list[str]:
    assert results
    command = [sys.executable, str(script), *map(str, results)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_a_page(page: str) -> None:
    lines = (ROOT / "docs" / page).read_text().splitlines()
    for line in printed(*PAGES[page]):
        assert line in lines


def test_the_seconds_on_a_gpu_in_the_tutorial() -> None:
    lines = printed(WORDNET.parent / "table.py", [WORDNET / "nvidia-h100-80gb-hbm3.json"])
    (seconds,) = (line for line in lines if line.startswith("Seconds of the stages"))
    assert seconds in (ROOT / "docs" / "tutorial.md").read_text().splitlines()


def test_what_the_commands_of_the_tutorial_print() -> None:
    """Every line of its text blocks is one of the transcript; an ellipsis stands for lines left out."""
    transcript = (WORDNET / "two-cores.txt").read_text().splitlines()
    page = (ROOT / "docs" / "tutorial.md").read_text()
    blocks = re.findall(r"^```text\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    shown = [line for block in blocks for line in block.splitlines() if line != "..."]
    assert len(shown) > 50
    assert [line for line in shown if line not in transcript] == []
