"""Writing an artefact's shards: what is left of them, dealt out over the processes.

A shard is written and hashed while the next ones are made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import IO, TYPE_CHECKING, TypeVar

from memdec.console import Progress
from memdec.data.artefact import StageWriter

if TYPE_CHECKING:  # accelerate is slow to import, and --help does without
    from accelerate import PartialState

_WRITERS = 2  # one may wait for the disk while the other hashes; each holds a shard in memory

Part = TypeVar("Part", bound=Sized)


@dataclass(frozen=True)
class Shard:
    """The file that holds rows [start, stop)."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def cut(rows: int, length: int, name: Callable[[int], str]) -> list[Shard]:
    """Shards of `length` rows, the last one shorter; `name` names the file of a number."""
    starts = range(0, rows, length)
    return [Shard(name(i), start, min(start + length, rows)) for i, start in enumerate(starts)]


def write_shards(
    processes: PartialState,
    writer: StageWriter,
    shards: Sequence[Shard],
    make: Callable[[Sequence[Shard]], Iterable[Part]],
    save: Callable[[Shard, list[Part], IO[bytes]], object],
    description: str,
    unit: str,
) -> None:
    """Writes the shards that are not there yet, and returns when all processes have theirs.

    Args:
        processes: they call this together. The n-th of them takes every n-th shard that is left.
        make: given shards in order, yields their rows in order and in parts, ``len`` rows each; no
            part reaches into the next shard.
        save: writes a shard's parts into its open file.
        description: what is being made, for the progress bar, which shows the main process's share
            scaled to all of the rows.
        unit: name of a row there.
    """
    left = [shard for shard in shards if not writer.has(shard.name)]
    own = left[processes.process_index :: processes.num_processes]
    rows_left, own_rows = sum(map(len, left)), sum(map(len, own))
    total = sum(map(len, shards))
    writing: deque[Future[None]] = deque()
    with (
        Progress(description, total, unit, total - rows_left) as progress,
        ThreadPoolExecutor(_WRITERS) as writers,
    ):
        made = iter(make(own))
        done = 0
        for shard in own:
            parts: list[Part] = []
            rows = 0
            while rows < len(shard):
                parts.append(next(made))
                rows += len(parts[-1])
                known = total - rows_left + (done + rows) * rows_left // own_rows
                progress.advance(known - progress.count)
            done += rows
            if len(writing) == _WRITERS:
                writing.popleft().result()
            write = partial(save, shard, parts)
            writing.append(writers.submit(writer.write, shard.name, write))
        for written in writing:
            written.result()
        processes.wait_for_everyone()
