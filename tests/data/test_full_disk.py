"""A disk that fills up in the middle of a stage: one clear line, and the rerun goes on from there."""

from __future__ import annotations

import errno
import os

import pytest
from data_tiny import contents, run_stage, set_small_shards

from memdec.errors import MemdecError


@pytest.mark.parametrize("name", ["prepare", "datastore", "targets"])
def test_a_disk_full_in_the_middle(tiny, datastore_dir, tmp_path, monkeypatch, name):
    values = {
        "prepare": {"tokenizer": str(tiny / "model"), "corpus": tiny / "corpus"},
        "datastore": {"model": str(tiny / "model"), "tokens": tiny / "tokens", "block_size": 32},
        "targets": {
            "tokens": tiny / "tokens",
            "datastore": datastore_dir,
            "k": 8,
            "temperature": 1.0,
        },
    }[name]
    set_small_shards(monkeypatch.setattr)
    run_stage(name, values, tmp_path / "undisturbed")
    synced = 0

    def fsync(descriptor: int) -> None:
        nonlocal synced
        synced += 1
        if synced >= 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fsync)
        with pytest.raises(
            MemdecError, match=r"the disk is full: .* could not be written"
        ) as error:
            run_stage(name, values, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    run_stage(name, values, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
