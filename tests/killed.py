"""Runs a stage in a process that kills itself, as ``kill -9`` would, at a chosen moment."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["memdec.training.trainer", "memdec.training.distill", "memdec.data.sources"]
)

# So that a tiny corpus has many files, between which a kill can fall.
_SMALL_SHARDS = {
    "memdec.data.corpus": ("SHARD_TOKENS", 300),
    "memdec.data.datastore": ("SHARD_POSITIONS", 160),
    "memdec.data.targets": ("SHARD_ROWS", 128),
}

# The moments: the n-th call of one of these is not reached.
MOMENTS = ("forward pass", "part of a checkpoint", "rename", "result", "manifest")


def run_killed(
    stage: Callable[[Any, Path], object], config: Any, out: Path, moment: str, count: int
) -> bool:
    """Runs the stage up to the `count`-th `moment`; whether it was killed before its end."""
    process = _SERVER.Process(target=_run, args=(stage, config, out, moment, count))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


def start_stage(stage: Callable[[Any, Path], object], config: Any, out: Path) -> BaseProcess:
    """Starts the stage in a process with one thread and small shards, whose words are nobody's."""
    process = _SERVER.Process(target=_run_quietly, args=(stage, config, out))
    process.start()
    return process


def _run_quietly(stage: Callable[[Any, Path], object], config: Any, out: Path) -> None:
    import torch

    torch.set_num_threads(1)
    for module, (name, value) in _SMALL_SHARDS.items():
        setattr(importlib.import_module(module), name, value)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
    ):
        stage(config, out)


def _run(
    stage: Callable[[Any, Path], object], config: Any, out: Path, moment: str, count: int
) -> None:
    import torch

    from memdec.data.artefact import StageWriter
    from memdec.training.trainer import BlockTrainer

    torch.set_num_threads(1)
    owner, name = {
        "forward pass": (BlockTrainer, "compute_loss"),
        "part of a checkpoint": (torch, "save"),
        "rename": (os, "replace"),
        "result": (StageWriter, "write_directory"),
        "manifest": (StageWriter, "finish"),
    }[moment]
    original = getattr(owner, name)
    calls = 0

    def until_killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, until_killed)
    stage(config, out)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of an artefact that has to be the same in each run."""
    logs = {"timing.json", "log.jsonl", ".lock"}
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in logs
    }
