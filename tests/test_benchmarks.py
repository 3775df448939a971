"""The benchmark scripts that no other test runs: whether they do, and their tables."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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


def test_index_parts(tmp_path):
    pytest.importorskip("faiss")
    given = [
        "--keys",
        3000,
        "--width",
        16,
        "--queries",
        100,
        "--k",
        8,
        "--rounds",
        1,
        "--nprobe",
        4,
    ]
    run("index_parts.py", *given, "--indexes", "IVF16,SQfp16", "--json", tmp_path / "now.json")
    (row,) = json.loads((tmp_path / "now.json").read_text())["index_parts"]
    assert row["index"] == "IVF16,SQfp16"
    assert min(row[f"{part}_bytes_a_second"] for part in ("read", "add", "write")) > 0
    assert min(row["train_share"], row["choose_share"]) > 0


def test_whole(tiny, tmp_path):
    """A run that is cut off counts, and goes on; each stage stands beside its plan."""
    pytest.importorskip("faiss")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"block_size: {tiny.block_size}\n"
        "prepare: {documents: line, validation_fraction: 0.15, test_fraction: 0.3}\n"
        "adapt: {epochs: 2, batch_blocks: 4}\n"
        "datastore: {index: 'IVF4,Flat'}\n"
        "targets: {source: mixture, k: 16, top_m: 8}\n"
        "train: {memory_layers: 1, epochs: 1}\n"
    )
    result = tmp_path / "now.json"
    given = ["--recipe", recipe, "--base", tiny.model, "--corpus", tiny.corpus]
    given += ["--out", tmp_path / "out", "--result", result, "--set"]
    with pytest.raises(AssertionError, match="no such"):
        run("whole.py", *given, "eval.others=[other=no-such]")
    cut_off = {row["stage"]: row for row in json.loads(result.read_text())["whole"]}
    assert cut_off["train"]["finished"]
    assert not cut_off["eval"]["finished"]
    shown = run("whole.py", *given, "eval.bootstrap=50")
    rows = {row["stage"]: row for row in json.loads(result.read_text())["whole"]}
    assert list(rows) == ["prepare", "adapt", "datastore", "targets", "train", "eval"]
    assert rows["train"] == cut_off["train"]
    assert rows["eval"]["starts"] == 2
    assert rows["eval"]["seconds"] > cut_off["eval"]["seconds"]
    needs = {need["stage"]: need for need in json.loads(result.read_text())["plan"]["needs"]}
    for row in rows.values():
        assert 0 < row["disk"] <= 1.5 * needs[row["stage"]]["disk"] + 100_000
    assert shown.endswith(run("table.py", result))
    assert "| kNN-LM |" in shown


def test_processes(tmp_path):
    shown = run("processes.py", "--tiny", "--out", tmp_path / "now.json")
    rows = json.loads((tmp_path / "now.json").read_text())["processes"]
    assert [row["stage"] for row in rows] == ["datastore", "targets"]
    assert all(row["same_bytes"] and min(row["seconds"].values()) > 0 for row in rows)
    assert shown.endswith(run("table.py", tmp_path / "now.json"))


def test_what_nvidia_smi_says(tmp_path, monkeypatch):
    """A stand-in that is busy with 2 GiB, and once does not know; of any other GPU it knows nothing."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        f"#!/bin/sh\n[ $2 = GPU-own ] || exit 6\nif [ -e {tmp_path}/asked ]; then echo '50, 2048'; else echo '[N/A], 1'; fi\n"
        f"touch {tmp_path}/asked\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    own = SimpleNamespace(uuid="own")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: own)
    gpu = importlib.import_module("gpu_busy").GpuBusy()
    begin = time.perf_counter()
    with gpu.watch():
        time.sleep(1)
    end = time.perf_counter()
    assert gpu.share(begin, end) == 0.5
    assert gpu.peak_bytes(begin, end) == 2 << 30
    assert gpu.share(end, end + 1) is gpu.peak_bytes(end, end + 1) is None


def test_goals_against_other_contenders(tmp_path):
    def bench(contender: str, seconds: float, **more: object) -> dict:
        extra = {"op": "op", "case": "case", "contender": contender, **more}
        extra |= {"floor_bytes": 4_000_000, "bandwidth": 1e9}  # 4 ms
        return {"stats": {"median": seconds}, "extra_info": extra}

    goal = {"times_eager": 7, "times_dense": 15, "share": 0.4}
    machine = {"device": "some", "torch": "2", "python": "3", "threads": 2, "kernel_sources": "0"}
    found = [bench("eager", 0.08), bench("dense eager", 0.14), bench("memdec", 0.01, goal=goal)]
    result = {"machine_info": machine, "benchmarks": found}
    (tmp_path / "now.json").write_text(json.dumps(result))
    last = run("table.py", tmp_path / "now.json").splitlines()[-1]
    assert last.endswith("| 0.40 | 8.0 x | 7 x eager, 15 x dense eager, 0.40 | yes, no, yes |")
