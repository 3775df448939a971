"""Stages in several processes: the bytes of one, whoever dies in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_tiny import contents, needs_faiss, run_stage, start, start_team

from memdec.errors import MemdecError

Values = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _imports_done():
    """The first child waits for torch and transformers; the others start at once."""
    start(time.time).join()


def stage_values(tiny: Path, case: str) -> tuple[str, Values]:
    """A stage and its configuration, by the name of the case."""
    common = {"model": str(tiny / "model"), "tokens": tiny / "tokens", "device": "cpu"}
    stage, _, options = case.partition(" ")
    if stage == "datastore":
        index, _, keys = options.partition(", ")
        common |= {"index": index, "keep_keys": keys != "no keys", "block_size": 32}
        return stage, {**common, "batch_blocks": 2}
    common |= {"source": options, "datastore": tiny / "datastore", "k": 16}
    if options == "mixture":
        common |= {"top_m": 8, "batch_blocks": 2}
    return stage, common


@pytest.fixture(scope="module")
def alone(tiny, datastore_dir, tmp_path_factory) -> Callable[[str], dict[str, bytes]]:
    """What one process writes, made once a case."""
    made: dict[str, dict[str, bytes]] = {}

    def run(case: str) -> dict[str, bytes]:
        if case not in made:
            out = tmp_path_factory.mktemp("alone") / "out"
            finish(start_team(1, *stage_values(tiny, case), out))
            made[case] = contents(out)
        return made[case]

    return run


def finish(team: list) -> None:
    for process in team:
        process.join()
    assert [process.exitcode for process in team] == [0] * len(team)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(
    "case",
    [
        "datastore Flat",
        pytest.param("datastore IVF8,SQfp16", marks=needs_faiss),
        pytest.param("datastore PCA8,IVF8,PQ4x4, no keys", marks=needs_faiss),
        pytest.param("datastore HNSW8, no keys", marks=needs_faiss),
        "targets knn",
        "targets mixture",
    ],
)
def test_several_processes_write_the_bytes_of_one(case, processes, tiny, alone, tmp_path):
    stage, values = stage_values(tiny, case)
    finish(start_team(processes, stage, values, tmp_path / "out"))
    written = contents(tmp_path / "out")
    assert written == alone(case)
    # The last shard is short, and 10 or 13 do not divide evenly.
    assert json.loads(written["manifest.json"])["shards"] in (
        (0,) if "no keys" in case else (10, 13)
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", ["datastore Flat", "targets knn", "targets mixture"])
def test_two_gpus_write_the_bytes_of_one(case, tiny, datastore_dir, tmp_path):
    stage, values = stage_values(tiny, case)
    values["device"] = "cuda"
    for count in (1, 2):
        finish(start_team(count, stage, values, tmp_path / str(count)))
    assert contents(tmp_path / "2") == contents(tmp_path / "1")


@pytest.mark.parametrize("case", ["datastore Flat", "targets knn"])
@pytest.mark.parametrize("dying", [0, 1])
def test_one_of_them_dies_and_others_go_on_with_what_is_there(case, dying, tiny, alone, tmp_path):
    stage, values = stage_values(tiny, case)
    out = tmp_path / "out"
    team = start_team(2, stage, values, out, dying=dying, steps=7)
    team[dying].join()
    assert team[dying].exitcode == -signal.SIGKILL
    survivor = team[1 - dying]
    if survivor.is_alive():  # it may have noticed
        survivor.kill()
    survivor.join()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*/*") if path.suffix != ".tmp"}
    assert len(finished) >= 2
    recorded = [json.loads(path.read_text())["files"] for path in out.glob("progress*.json")]
    names = {out / name for files in recorded for name in files}
    assert len(names) >= 2
    finish(start_team(3, stage, values, out))
    assert contents(out) == alone(case)
    assert {path: path.stat().st_mtime_ns for path in names} == {
        path: finished[path] for path in names
    }, "a finished file was written again"


def test_while_one_of_them_lives_nobody_else_may_write(tiny, alone, tmp_path):
    """The main process has gone, and with it the lock of a process that writes alone."""
    stage, values = stage_values(tiny, "datastore Flat")
    out = tmp_path / "out"
    main, other = start_team(2, stage, values, out, dying=0, steps=7)
    while not (out / "progress-1.json").exists():  # the middle of its share
        assert other.is_alive()
    os.kill(other.pid, signal.SIGSTOP)
    main.join()
    assert main.exitcode == -signal.SIGKILL
    with pytest.raises(MemdecError, match=r"another process is writing .*out; wait for it to end"):
        run_stage(stage, values, out)
    other.kill()
    other.join()
    finish(start_team(1, stage, values, out))
    assert contents(out) == alone("datastore Flat")


def test_a_stage_that_is_done_is_left_alone(tiny, datastore_dir, tmp_path):
    stage, values = stage_values(tiny, "datastore Flat")
    out = tmp_path / "out"
    finish(start_team(1, stage, values, out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    finish(start_team(2, stage, values, out))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_the_main_process_refuses_all_refuse(tiny, datastore_dir, tmp_path):
    """None of them waits for one that has gone."""
    stage, values = stage_values(tiny, "datastore Flat")
    (tmp_path / "stranger").write_text("")
    team = start_team(2, stage, values, tmp_path)
    for process in team:
        process.join(30)
    assert [process.exitcode for process in team] == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["stranger"]


def test_accelerate_launches_the_command(tiny, datastore_dir, tmp_path):
    """With a single shard, so that one of the processes has none; and only the first one talks."""
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", *launch, "-m", "memdec", "datastore", "--device", "cpu"]
    command += ["--model", str(tiny / "model"), "--tokens", str(tiny / "tokens")]
    command += ["--block-size", "32", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("keys of train: ") == 1
    assert contents(tmp_path / "out") == contents(datastore_dir)
