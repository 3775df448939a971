"""``memdec demo`` as a person runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest


def test_a_directory_of_something_else_is_refused(memdec, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    result = memdec("demo", "--out", tmp_path)
    assert result.exit_code == 1
    assert "holds thesis.txt, which is not of this command" in result.stderr
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "memdec", "demo", "--out", str(out)]
    start = time.monotonic()
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert time.monotonic() - start < 300, "more than five minutes, where the README says a few"
    rows = json.loads((out / "eval" / "eval.json").read_text())["rows"]
    perplexity = {row["name"]: row["perplexity"] for row in rows}
    assert {"base", "kNN-LM", "memory", "joint", "fine-tuned"} <= set(perplexity)
    assert perplexity["joint"] < 0.7 * perplexity["base"]
    assert run.stdout.count("[base]") == 3
    assert "Prompts with and without the memory" in (out / "report.html").read_text()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "training" not in again.stderr
