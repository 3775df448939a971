"""The keys of the train positions: read from disk, or computed by the teacher whenever asked for.

Computed keys are the bytes of kept ones: a forward pass has fixed global boundaries, whoever asks.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from memdec.console import Progress
from memdec.data.corpus import TokenStream, block_batches, rows_between
from memdec.data.in_flight import InFlight, in_order, to_device
from memdec.data.shards import Shard
from memdec.modeling.key_layer import KeyRecorder

_KEYS_A_READ = 1 << 16


class Keys(Protocol):
    """float16 [size, width]; row id == train position."""

    @property
    def size(self) -> int: ...

    @property
    def width(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Keys [start, stop), as a new array. Cheapest when ranges follow one another."""
        ...

    def pick(self, ids: np.ndarray) -> np.ndarray:
        """Keys of rising ids, int64 [n]."""
        ...


class StoredKeys:
    """Keys in shards that follow one another."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self.shards = shards
        self.size = sum(map(len, shards))
        self.width = shards[0].shape[1]

    def read(self, start: int, stop: int) -> np.ndarray:
        return rows_between(self.shards, start, stop)

    def pick(self, ids: np.ndarray) -> np.ndarray:
        bounds = np.cumsum([0, *map(len, self.shards)])
        cuts = np.searchsorted(ids, bounds)
        parts = [
            shard[ids[start:stop] - first]
            for shard, first, start, stop in zip(self.shards, bounds, cuts, cuts[1:], strict=False)
        ]
        return np.concatenate(parts)


class ComputedKeys:
    """Keys made by forward passes of the teacher; the last pass is remembered.

    Args:
        recorder: around the teacher, which is on its device.
        shards: of the keys where they are kept; no pass reaches into the next one.
        batch_blocks: blocks of `block_size` tokens in a pass.
    """

    def __init__(
        self,
        recorder: KeyRecorder,
        stream: TokenStream,
        shards: Sequence[Shard],
        block_size: int,
        batch_blocks: int,
    ) -> None:
        self._recorder = recorder
        self._stream = stream
        self._passes = [
            bounds
            for shard in shards
            for bounds in block_batches(shard.start, shard.stop, block_size, batch_blocks)
        ]
        self._firsts = [first for first, _, _ in self._passes]
        self._last: tuple[int, np.ndarray] = (-1, np.empty(0))
        self.layer = recorder.name
        self.size = stream.positions
        # The logits are not needed, and at 150,000 tokens they would be the largest thing in memory.
        accepted = inspect.signature(recorder.model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.width = self._forward(0, 1, 1).result().shape[1]

    def of_shards(self, shards: Sequence[Shard]) -> Iterator[np.ndarray]:
        """Keys of whole shards, in order and in parts, one for each forward pass.

        The next pass runs while the keys of one are taken.
        """
        return in_order(
            self._forward(*self._passes[number])
            for shard in shards
            for number in self._containing(shard.start, shard.stop)
        )

    def read(self, start: int, stop: int) -> np.ndarray:
        known, remembered = self._last
        numbers = self._containing(start, stop)
        made = in_order(self._forward(*self._passes[n]) for n in numbers if n != known)
        parts = []
        for number in numbers:
            keys = remembered if number == known else next(made)
            first = self._passes[number][0]
            parts.append(keys[max(start - first, 0) : stop - first])
            self._last = (number, keys)
        return np.concatenate(parts)

    def _containing(self, start: int, stop: int) -> range:
        """The numbers of the passes that keys [start, stop) are in."""
        return range(bisect_right(self._firsts, start) - 1, bisect_left(self._firsts, stop))

    def _forward(self, first: int, last: int, rows: int) -> InFlight[np.ndarray]:
        """Keys of a pass over positions [first, last), float16 [last - first, width]."""
        inputs = {
            name: to_device(array, self._recorder.model.device)
            for name, array in self._stream.inputs(first, last, rows).items()
        }
        with self._recorder, torch.inference_mode():
            self._recorder.model(**inputs, use_cache=False, **self._options)
        keys = self._recorder.keys.flatten(0, 1).half()
        too_large = (
            f"the input of {self.layer} does not fit float16; name another layer with key_layer"
        )
        errors = {too_large: ~torch.isfinite(keys).all()}
        return InFlight([keys], lambda keys: keys.numpy(), errors)

    def pick(self, ids: np.ndarray) -> np.ndarray:
        parts = [np.empty((0, self.width), np.float16)]
        with Progress("keys to train the index", len(ids), "keys") as progress:
            for start in range(0, self.size, _KEYS_A_READ):
                stop = min(start + _KEYS_A_READ, self.size)
                chosen = ids[(ids >= start) & (ids < stop)]
                if len(chosen):
                    parts.append(self.read(start, stop)[chosen - start])
                    progress.advance(len(chosen))
        return np.concatenate(parts)
