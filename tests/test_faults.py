"""kill -9 at random moments of every stage, many times, then run on; and two runs at once.

pytest -m slow tests/test_faults.py -s                            # a few kills a stage, logged
MEMDEC_TEST_KILLS=50 pytest -m slow tests/test_faults.py -s
MEMDEC_TEST_FAULT_LOG=faults.json ...                             # and a line a stage in a file

The file is printed as a table by ``python benchmarks/table.py faults.json``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cpuinfo import get_cpu_info  # of pytest-benchmark
from killed import contents, start_stage

from memdec.data.corpus import PrepareConfig, prepare
from memdec.data.datastore import DatastoreConfig, datastore
from memdec.data.targets import TargetsConfig, targets
from memdec.errors import MemdecError
from memdec.evaluation.evaluate import evaluate
from memdec.evaluation.options import EvalConfig
from memdec.training.adapt import AdaptConfig, adapt
from memdec.training.distill import TrainConfig, train

KILLS = int(os.environ.get("MEMDEC_TEST_KILLS", "3"))

Stage = Callable[[Any, Path], object]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120 + 60 * KILLS)]


def stages(tiny) -> dict[str, tuple[Stage, Any]]:
    where = {"tokens": tiny.tokens, "device": "cpu"}
    training = {"epochs": 2, "validations": 2, "gradient_accumulation": 1, **where}
    searched = {"datastore": tiny.datastore, "k": 16, **where}
    evaluated = {"datastore": tiny.datastore, "targets": tiny.targets, "bootstrap": 20, **where}
    taught = {"targets": tiny.targets, "base": tiny.model, "teacher": tiny.model}
    keyed = {"model": tiny.model, "block_size": tiny.block_size, "batch_blocks": 1, **where}
    return {
        "prepare": (
            prepare,
            PrepareConfig(tokenizer=tiny.model, corpus=tiny.corpus, documents="line"),
        ),
        "adapt": (adapt, AdaptConfig(model=tiny.model, block_size=tiny.block_size, **training)),
        "datastore": (datastore, DatastoreConfig(**keyed)),
        "index, no keys": (
            datastore,
            DatastoreConfig(index="IVF8,SQfp16", keep_keys=False, **keyed),
        ),
        "targets": (targets, TargetsConfig(model=tiny.model, **searched)),
        "mixture": (
            targets,
            TargetsConfig(source="mixture", top_m=8, model=tiny.model, batch_blocks=1, **searched),
        ),
        "neighbours": (targets, TargetsConfig(keep="neighbours", model=tiny.model, **searched)),
        "train": (train, TrainConfig(**taught, **training)),
        "eval": (
            evaluate,
            EvalConfig(base=tiny.model, memory=tiny.model, block_size=tiny.block_size, **evaluated),
        ),
    }


needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="no FAISS")

NAMES = (
    *("prepare", "adapt", "datastore", pytest.param("index, no keys", marks=needs_faiss)),
    *("targets", "mixture", "neighbours", "train", "eval"),
)


@pytest.fixture(scope="module")
def log() -> Iterator[dict[str, Any]]:
    """A record a stage; written to the file that MEMDEC_TEST_FAULT_LOG names, passed or not."""
    records: dict[str, Any] = {}
    yield records
    if records and (path := os.environ.get("MEMDEC_TEST_FAULT_LOG")):
        machine = {
            "device": f"{get_cpu_info().get('brand_raw', platform.machine())}, 1 thread",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        text = json.dumps({"machine_info": machine, "faults": records}, indent=1)
        numbers = re.compile(r"\[\s+([^\[\]]*?)\s+\]")  # a kill in one line
        Path(path).write_text(
            numbers.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"
        )


def finish(process: BaseProcess) -> None:
    process.join()
    assert process.exitcode == 0


def undisturbed(stage: Stage, config: Any, out: Path) -> float:
    """Seconds of a run after the first, which waits for the imports."""
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        begin = time.monotonic()
        finish(start_stage(stage, config, out))
    return time.monotonic() - begin


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tiny, tmp_path, name, log):
    stage, config = stages(tiny)[name]
    seconds = undisturbed(stage, config, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    kills: list[tuple[float, int]] = []
    record = log[name] = {
        "seconds": round(seconds, 3),
        "files": len(json.loads((tmp_path / "whole" / "manifest.json").read_text())["files"]),
        "kills": kills,  # seconds after the start, and files finished by then
        "ends": 0,
        "same_bytes": False,
    }

    def end(out: Path) -> None:
        assert contents(out) == expected
        record["ends"] += 1

    generator = random.Random(name)
    while len(kills) < KILLS:
        out = tmp_path / f"killed-{record['ends']}"
        begin = time.monotonic()
        process = start_stage(stage, config, out)
        if generator.random() < 0.5:  # anywhere
            time.sleep(generator.uniform(0, seconds))
        else:  # while it writes, which may be a small part of the time
            wanted = generator.randint(0, record["files"])
            while process.is_alive() and finished_files(out) < wanted:
                time.sleep(0.0005)
            time.sleep(generator.uniform(0, 0.01))
        process.kill()
        wait = time.monotonic() - begin
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        if killed:
            kills.append((round(wait, 3), finished_files(out)))
        else:  # it had reached the end
            assert process.exitcode == 0
            end(out)
        if killed and generator.random() < 0.3:  # and so that the start is hit again
            finish(start_stage(stage, config, out))
            end(out)
    finish(start_stage(stage, config, out))
    end(out)
    record["same_bytes"] = True
    print(f"{name}: {len(kills)} kills within {seconds:.2f} s, {record['ends']} ends, all the same")


def finished_files(out: Path) -> int:
    """How many files a run counts as finished, in whatever state it was killed."""
    for record in ("manifest.json", "progress.json"):
        if (out / record).exists():
            return len(json.loads((out / record).read_text())["files"])
    return 0


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_in_the_same_directory_is_refused(tiny, tmp_path, name):
    """The first stands still when it has the directory, and goes on when the second is gone."""
    stage, config = stages(tiny)[name]
    undisturbed(stage, config, tmp_path / "whole")
    first = start_stage(stage, config, tmp_path / "out")
    while not (tmp_path / "out" / "progress.json").exists():
        assert first.is_alive(), "it ended before it was seen to write"
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        if (tmp_path / "out" / "manifest.json").exists():
            pytest.skip("the first run was over before it could be stopped")
        with pytest.raises(MemdecError, match=r"another process is writing .*; wait for it to end"):
            stage(config, tmp_path / "out")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(first.pid, signal.SIGCONT)
    finish(first)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
