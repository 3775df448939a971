"""Shards are dealt out, made in order, and only while they are left."""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from memdec.data.shards import cut, write_shards
from memdec.errors import MemdecError


class Writer:
    """Keeps what is written."""

    def __init__(self, *names: str) -> None:
        self.files = dict.fromkeys(names, b"")

    def has(self, name):
        return name in self.files

    def write(self, name, write):
        file = io.BytesIO()
        write(file)
        self.files[name] = file.getvalue()


def run(writer: Writer, rank: int = 0, count: int = 1, part: int = 3) -> list[str]:
    """Writes shards of 10 of 45 numbers, in parts of `part`; the names asked for, in order."""
    waited = []
    processes = SimpleNamespace(
        process_index=rank, num_processes=count, wait_for_everyone=lambda: waited.append(True)
    )
    shards = cut(45, 10, "shard {}".format)
    asked = []

    def make(shards):
        for shard in shards:
            asked.append(shard.name)
            for start in range(shard.start, shard.stop, part):
                yield np.arange(start, min(start + part, shard.stop), dtype=np.uint8)

    def save(shard, parts, file):
        numbers = np.concatenate(parts)
        assert numbers[0] == shard.start
        file.write(numbers.tobytes())

    write_shards(processes, writer, shards, make, save, "numbers", "numbers")
    assert waited == [True]
    return asked


@pytest.mark.parametrize("part", [1, 3, 10])
def test_one_process_writes_them_all(part):
    writer = Writer()
    assert run(writer, part=part) == [f"shard {number}" for number in range(5)]
    assert b"".join(writer.files.values()) == bytes(range(45))


def test_each_process_has_its_share_of_what_is_left():
    shares = [run(Writer("shard 1"), rank, 3) for rank in range(3)]
    assert shares == [["shard 0", "shard 4"], ["shard 2"], ["shard 3"]]


def test_nothing_is_left():
    assert run(Writer(*(f"shard {number}" for number in range(5)))) == []


def test_the_share_of_the_main_process_stands_for_all(capsys):
    run(Writer("shard 1"), 0, 2)
    assert "numbers: 35 numbers in" in capsys.readouterr().err


def test_a_shard_is_written_while_the_next_is_made():
    made = threading.Event()

    class Waiting(Writer):
        def write(self, name, write):
            if name == "shard 0":
                assert made.wait(10)
            super().write(name, write)

    class Made(SimpleNamespace):
        def __len__(self):
            return self.rows

    def make(shards):
        for shard in shards:
            if shard.name == "shard 1":
                made.set()
            yield Made(rows=len(shard))

    processes = SimpleNamespace(process_index=0, num_processes=1, wait_for_everyone=lambda: None)
    writer = Waiting()
    shards = cut(45, 10, "shard {}".format)
    write_shards(processes, writer, shards, make, lambda *_: None, "numbers", "numbers")
    assert len(writer.files) == 5


def test_a_shard_that_cannot_be_written_ends_the_stage():
    class Full(Writer):
        def write(self, name, write):
            if name == "shard 1":
                raise MemdecError("the disk is full")
            super().write(name, write)

    writer = Full()
    with pytest.raises(MemdecError, match="the disk is full"):
        run(writer)
    assert "shard 0" in writer.files
    assert "shard 4" not in writer.files
