"""Building a FAISS index, alone or in several processes, to the same bytes.

The keys of the sample and of the index are read in parts, a part a process; the main process trains
on the whole sample, all add to what it trained, and the parts are appended to each other. So the order
in a list is that of the ids, as if one process had added them all.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np

from memdec.console import Progress
from memdec.data.artefact import clear_disk_errors
from memdec.data.faiss_gpu import ListFiller, train_with, visible_gpus
from memdec.data.index import count_lists, load_faiss, make_index, plain_lists, reason
from memdec.data.keys import Keys
from memdec.errors import MemdecError

if TYPE_CHECKING:
    from accelerate import PartialState

_KEYS_A_CHUNK = 1 << 16
_TRAINING_KEYS_A_LIST = 64
_LEAST_LISTS = 256  # a product quantiser of 8 bits has that many centroids to train

T = TypeVar("T")


def build_faiss(
    processes: PartialState, work: Path, spec: str, keys: Keys, seed: int, device: str = "cpu"
) -> Any:
    """Trains a FAISS index on a seeded sample of the keys and adds them all, in order of id.

    An index that cannot be put together from parts (:func:`memdec.data.index.plain_lists`) the main
    process makes alone.

    Args:
        processes: they call this together, each with all the keys.
        work: a directory for what several processes hand over, which the main one makes anew.
        device: its GPU helps where FAISS has one.

    Returns:
        The index; in processes other than the main one there is no telling what is in it.

    Raises:
        MemdecError: too few keys to train on.
    """
    index = make_index(spec, keys.width)
    gpus = visible_gpus(device)
    lists = plain_lists(index)
    start, stop = _share(processes, keys.size, whole=lists is None)
    team = _Team(processes, work)
    if not index.is_trained:
        wanted = training_keys(count_lists(index), keys.size)
        chosen = np.sort(np.random.default_rng(seed).choice(keys.size, wanted, replace=False))
        own = keys.pick(chosen[(chosen >= start) & (chosen < stop)])
        sample = team.to_main("sample", own, _save_array, np.load)
        if processes.is_main_process:
            found = np.concatenate([*sample]).astype(np.float32)
            try:
                train_with(gpus, index, lists, found)
            except RuntimeError as error:
                raise MemdecError(
                    f"FAISS cannot train {spec} on {wanted} keys: {reason(error)}"
                ) from None
        index = team.from_main("trained", index, write_faiss, _read_faiss)
        lists = plain_lists(index)
    filler = None if lists is None else ListFiller(gpus, index, lists)
    with Progress(f"index {spec}", keys.size, "keys") as progress:
        for first in range(start, stop, _KEYS_A_CHUNK):
            last = min(first + _KEYS_A_CHUNK, stop)
            part = keys.read(first, last).astype(np.float32)
            if filler is None:
                index.add(part)
            else:
                filler.add(part, np.arange(first, last))
            known = (last - start) * keys.size // (stop - start)
            progress.advance(known - progress.count)
        if lists is not None:
            parts = team.to_main("part", index, write_faiss, _read_faiss)
            for part in itertools.islice(parts, 1, None):
                load_faiss().merge_into(index, part, False)
    return index


def training_keys(lists: int, size: int) -> int:
    """How many of `size` keys an index of so many lists is trained on."""
    return min(size, max(lists, _LEAST_LISTS) * _TRAINING_KEYS_A_LIST)


def _share(processes: PartialState, size: int, whole: bool) -> tuple[int, int]:
    """The keys that this process reads, in whole chunks; `whole`: the main process reads them all."""
    number, count = processes.process_index, processes.num_processes
    if whole:
        return (0, size) if processes.is_main_process else (0, 0)
    chunks = -(-size // _KEYS_A_CHUNK)
    start, stop = (chunks * part // count * _KEYS_A_CHUNK for part in (number, number + 1))
    return min(start, size), min(stop, size)


class _Team:
    """Hands values from process to process, through files."""

    def __init__(self, processes: PartialState, work: Path) -> None:
        self._processes = processes
        self._work = work
        if processes.num_processes > 1:
            if processes.is_main_process:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
            processes.wait_for_everyone()

    def to_main(
        self,
        name: str,
        value: T,
        save: Callable[[T, IO[bytes]], object],
        load: Callable[[str], T],
    ) -> Iterator[T]:
        """Every process's value, in order, in the main process; the others get none."""
        own, count = self._processes.process_index, self._processes.num_processes
        if own > 0:
            self._write(f"{name}-{own}", value, save)
        self._processes.wait_for_everyone()
        if own > 0:
            return iter(())
        others = (load(str(self._work / f"{name}-{other}")) for other in range(1, count))
        return itertools.chain([value], others)

    def from_main(
        self,
        name: str,
        value: T,
        save: Callable[[T, IO[bytes]], object],
        load: Callable[[str], T],
    ) -> T:
        """The main process's value in every process."""
        if self._processes.num_processes > 1 and self._processes.is_main_process:
            self._write(name, value, save)
        self._processes.wait_for_everyone()
        return value if self._processes.is_main_process else load(str(self._work / name))

    def _write(self, name: str, value: T, save: Callable[[T, IO[bytes]], object]) -> None:
        path = self._work / name
        with clear_disk_errors(path), open(path, "wb") as file:
            save(value, file)


def _save_array(array: np.ndarray, file: IO[bytes]) -> None:
    np.save(file, array)


def write_faiss(index: Any, file: IO[bytes]) -> None:
    faiss = load_faiss()
    faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def _read_faiss(path: str) -> Any:
    return load_faiss().read_index(path)
