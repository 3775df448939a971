"""kill -9 at random moments of every stage, many times, then run on; and two runs at once.

pytest -m slow tests/test_faults.py -s                            # a few kills a stage, logged
MEMDEC_TEST_KILLS=50 pytest -m slow tests/test_faults.py -s
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from killed import contents, start_stage

from memdec.data.corpus import PrepareConfig, prepare
from memdec.data.datastore import DatastoreConfig, datastore
from memdec.data.targets import TargetsConfig, targets
from memdec.errors import MemdecError
from memdec.evaluation.evaluate import EvalConfig, evaluate
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


NAMES = ("prepare", "adapt", "datastore", "targets", "mixture", "neighbours", "train", "eval")


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
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tiny, tmp_path, name):
    stage, config = stages(tiny)[name]
    seconds = undisturbed(stage, config, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    generator = random.Random(name)
    kills = wholes = 0
    while kills < KILLS:
        out = tmp_path / f"killed-{wholes}"
        process = start_stage(stage, config, out)
        time.sleep(generator.uniform(0, seconds))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
        else:  # it had reached the end
            assert process.exitcode == 0
            assert contents(out) == expected
            shutil.rmtree(out)
            wholes += 1
        if process.exitcode and generator.random() < 0.3:  # and so that the start is hit again
            finish(start_stage(stage, config, out))
            assert contents(out) == expected
            shutil.rmtree(out)
            wholes += 1
    finish(start_stage(stage, config, out))
    assert contents(out) == expected
    print(
        f"{name}: {kills} kills within {seconds:.2f} s, {wholes + 1} ends, all with the same bytes"
    )


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
