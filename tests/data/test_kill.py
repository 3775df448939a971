"""kill -9 at random moments in each stage, run again: the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from data_tiny import contents, needs_faiss, stage_in_child, start

_KILLS = 4


@pytest.fixture(scope="module", autouse=True)
def _imports_done():
    """The first child waits for torch and transformers; the time of the others is their own."""
    start(os.getpid).join()


def _finish(name: str, values: dict[str, Any], out: Path) -> float:
    begin = time.monotonic()
    child = start(stage_in_child, name, values, out)
    child.join()
    assert child.exitcode == 0
    return time.monotonic() - begin


def _finished_files(out: Path) -> dict[Path, int]:
    """Files that the stage counts as finished, with the time of their last change."""
    try:
        names = json.loads((out / "progress.json").read_text())["files"]
    except FileNotFoundError:  # not begun, or done
        return {}
    return {out / name: (out / name).stat().st_mtime_ns for name in names}


def _kill_and_compare(name: str, values: dict[str, Any], tmp_path: Path) -> None:
    seconds = _finish(name, values, tmp_path / "undisturbed")
    out = tmp_path / "killed"
    generator = random.Random(name)
    for number in range(_KILLS):
        before = _finished_files(out)
        if number % 2:  # anywhere in the run
            child = start(stage_in_child, name, values, out)
            time.sleep(generator.uniform(0, seconds / 2))
            child.kill()
            child.join()
            assert child.exitcode in (0, -signal.SIGKILL)
        else:  # with one to three files more than before
            child = start(stage_in_child, name, values, out, generator.randint(3, 7))
            child.join()
            assert child.exitcode == -signal.SIGKILL or number > 0
        unchanged = {path: path.stat().st_mtime_ns for path in before}
        assert unchanged == before, "a finished file was written again"
    _finish(name, values, out)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_prepare(tiny, tmp_path):
    values = {"tokenizer": str(tiny / "model"), "corpus": tiny / "corpus", "max_tokens": 1500}
    _kill_and_compare("prepare", values, tmp_path)


@pytest.mark.parametrize(
    ("index", "keep_keys"),
    [
        ("Flat", True),
        pytest.param("IVF8,Flat", True, marks=needs_faiss),
        pytest.param("IVF8,Flat", False, marks=needs_faiss),
    ],
)
def test_datastore(tiny, tmp_path, index, keep_keys):
    values = {"model": str(tiny / "model"), "tokens": tiny / "tokens", "block_size": 32}
    values |= {"index": index, "keep_keys": keep_keys, "batch_blocks": 2, "device": "cpu"}
    _kill_and_compare("datastore", values, tmp_path)


@pytest.mark.parametrize("other", [{}, {"max_entries": 4}, {"keep": "neighbours"}])
def test_targets(tiny, datastore_dir, tmp_path, other):
    values = {"model": str(tiny / "model"), "tokens": tiny / "tokens", "datastore": datastore_dir}
    values |= {"k": 16, "device": "cpu", **other}
    _kill_and_compare("targets", values, tmp_path)
