"""The benchmark scripts that no other test runs: whether they do, and their tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_teacher(tmp_path):
    shown = run("teacher.py", "--tiny", "--out", tmp_path / "now.json")
    rows = {row["stage"]: row for row in json.loads((tmp_path / "now.json").read_text())["teacher"]}
    assert rows["key extraction"]["count"] == rows["targets"]["count"] == 40_000
    assert all(row["rate"] > 0 for row in rows.values())
    assert shown.endswith(run("table.py", tmp_path / "now.json"))


def test_indexes(tiny, tmp_path):
    pytest.importorskip("faiss")
    given = ["--datastore", tiny.datastore, "--tokens", tiny.tokens, "--model", tiny.model]
    given += ["--k", 8, "--nprobe", 1, 4, "--json", tmp_path / "now.json"]
    shown = run("indexes.py", *given, "--indexes", "Flat", "IVF4,Flat", "IVF4,PQ8x4")
    result = json.loads((tmp_path / "now.json").read_text())
    exact, few, all_lists, *_ = result["indexes"]
    assert exact["recall"] == 1.0
    assert few["recall"] < all_lists["recall"]
    assert all_lists["recall"] > 0.99
    assert exact["perplexity"] < result["teacher_perplexity"]
    assert shown.endswith(run("table.py", tmp_path / "now.json"))
