"""Exact nearest neighbours: a matrix product, and the k smallest of each of its rows.

Ours because PyTorch does both as fast on a CPU and anywhere on a GPU, and because FAISS leaves open
which of several equal distances it returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from memdec.data.corpus import rows_between
from memdec.errors import MemdecError

_QUERIES_A_BATCH = 1024
_KEYS_A_BLOCK = {"cpu": 1 << 16, "cuda": 1 << 19}  # times a batch: the distances that are written
_NUMBERS_A_BLOCK = 1 << 28  # of wide keys fewer make a block
_KEYS_OF_THE_CENTRE = 1 << 16
_RESIDENT_BYTES = 1 << 30  # on the CPU; on a GPU half of what is free
_GROUP = 64  # widest group of columns; a block is padded to whole ones
_LENGTH = 128.0  # of the longest key in halves, so that its square fits one
_NORM_UNIT = 256.0  # of a query's norm, which may exceed every key's
_ALIGNMENT = 8  # columns of float16 that are 16 bytes, as tensor cores want them


class ExactIndex:
    """Exact search over float16 keys, in order of (squared L2 distance, id).

    Distances are float32 sums around the mean key, which keeps the digits that
    ``|q|^2 + |x|^2 - 2 q.x`` would lose to a large common offset. Where memory allows, the prepared
    keys stay; else they are made anew from the memory map for each batch of queries.

    Args:
        shards: float16 [n, width] each.
        device: where to search.
        halves: multiply pairs of float16 in tensor cores (:class:`_HalfBlock`) instead of float32;
            by default where the device and this torch can.
    """

    def __init__(
        self, shards: Sequence[np.ndarray], device: str, halves: bool | None = None
    ) -> None:
        self._device = torch.device(device)
        self._shards = shards
        self._size = sum(map(len, shards))
        self._halves = _multiplies_halves(self._device) if halves is None else halves
        sample = torch.from_numpy(shards[0][:_KEYS_OF_THE_CENTRE]).to(self._device)
        self._centre = sample.float().mean(dim=0)
        room = _RESIDENT_BYTES
        if self._device.type == "cuda":
            room = torch.cuda.mem_get_info(self._device)[0] // 2
        bytes_a_number = 6 if self._halves else 4
        is_resident = sum(shard.size for shard in shards) * bytes_a_number <= room
        self._resident = list(self._blocks()) if is_resident else None

    def search(
        self, queries: np.ndarray, k: int, exclude: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        found = [
            self._search_batch(
                queries[start : start + _QUERIES_A_BATCH],
                k,
                None if exclude is None else exclude[start : start + _QUERIES_A_BATCH],
            )
            for start in range(0, max(len(queries), 1), _QUERIES_A_BATCH)
        ]
        return (
            np.concatenate([distances for distances, _ in found]),
            np.concatenate([ids for _, ids in found]),
        )

    def _blocks(self) -> Iterator[_Block]:
        """The prepared keys, in order of id."""
        keys_a_block = _KEYS_A_BLOCK.get(self._device.type, _KEYS_A_BLOCK["cpu"])
        keys_a_block = min(keys_a_block, _NUMBERS_A_BLOCK // len(self._centre))
        make = _HalfBlock.make if self._halves else _FloatBlock.make
        for start in range(0, self._size, keys_a_block):
            stop = min(start + keys_a_block, self._size)
            keys = torch.from_numpy(rows_between(self._shards, start, stop)).to(self._device)
            # A matrix product may round its last few columns in another way than the rest; with
            # columns at infinity for an edge, equal keys are at equal distances.
            yield make(start, keys.float().sub_(self._centre), self._centre)

    def _search_batch(
        self, queries: np.ndarray, k: int, exclude: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        centred = torch.from_numpy(queries.astype(np.float32)).to(self._device) - self._centre
        left_out = None if exclude is None else torch.from_numpy(exclude).to(self._device)[:, None]
        best = _pack(
            torch.full((len(queries), k), torch.inf, device=self._device),
            torch.zeros(1, dtype=torch.int64, device=self._device),
        )
        for block in self._resident or self._blocks():
            distances = block.distances(centred)
            if left_out is not None:
                column = (left_out - block.first).clamp(0, distances.shape[1] - 1)
                other = left_out != column + block.first
                kept = torch.where(other, distances.gather(1, column), torch.inf)
                distances.scatter_(1, column, kept)
            near, columns = _unpack(smallest(distances, k))
            near = _pack(near * block.unit, columns + block.first)
            best = torch.cat([best, near], dim=1).sort(dim=1).values[:, :k]
        near, ids = _unpack(best)
        ids = torch.where(torch.isinf(near), -1, ids)
        if torch.isnan(near).any() or (self._size > 1 and (ids[:, 0] < 0).any()):
            raise MemdecError(
                "a query is not a number, or too far from all keys to tell them apart; "
                "expected keys of the same layer of the same model"
            )
        return near.cpu().numpy(), ids.cpu().numpy()


def smallest(distances: Tensor, k: int) -> Tensor:
    """The k smallest of each row by (value, column), at least 0: packed, in order.

    Looks at each number once: the k smallest lie in the k groups of columns whose least numbers are
    smallest, ties by group. So only these are sorted. No order is left open, and nothing waits for
    the device.

    Args:
        distances: float32 [n, columns]; columns a multiple of 64.
        k: how many; all columns if there are fewer.

    Returns:
        int64 [n, min(k, columns)]; :func:`_unpack` makes values and columns of it.
    """
    columns = distances.shape[1]
    # Group minima and candidates, columns / group + k * group, are fewest at this width.
    group = min(1 << max(round(np.log2(columns / k) / 2), 0), _GROUP)
    if columns // group <= k:
        return _smallest_of(distances.clamp(min=0), k)
    grouped = distances.unflatten(1, (-1, group))
    chosen = _smallest_of(grouped.amin(dim=2).clamp_(min=0), k) & _ID
    chosen = chosen.sort(dim=1).values  # candidates in the order of their columns
    candidates = grouped.gather(1, chosen[:, :, None].expand(-1, -1, group)).flatten(1)
    packed = _smallest_of(candidates.clamp_(min=0), k)
    places = packed & _ID
    return packed - places + chosen.gather(1, places // group) * group + places % group


def _smallest_of(values: Tensor, k: int) -> Tensor:
    """As :func:`smallest`, by looking at each number many times."""
    packed = _pack(values, torch.arange(values.shape[1], device=values.device))
    return packed.topk(min(k, values.shape[1]), dim=1, largest=False).values


_ID = (1 << 32) - 1


def _pack(values: Tensor, ids: Tensor) -> Tensor:
    """float32 values of at least 0 and ids below 2^32 as int64 that sort by (value, id)."""
    return torch.add(ids, values.view(torch.int32), alpha=1 << 32)


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    return (packed >> 32).int().view(torch.float32), packed & _ID


class _Block(Protocol):
    """Keys from id `first` on, prepared for the product; `unit` times its distances are the true ones."""

    @property
    def first(self) -> int: ...

    @property
    def unit(self) -> float: ...

    def distances(self, queries: Tensor) -> Tensor:
        """Of centred queries [n, width]: float32 [n, keys and padding], infinite at the padding."""
        ...


@dataclass(frozen=True)
class _FloatBlock:
    first: int
    unit: float
    keys: Tensor  # float32 [keys and padding, width]
    norms: Tensor

    @classmethod
    def make(cls, first: int, keys: Tensor, centre: Tensor) -> _FloatBlock:
        edge = -len(keys) % _GROUP
        norms = keys.square().sum(1)
        return cls(first, 1.0, pad(keys, (0, 0, 0, edge)), pad(norms, (0, edge), value=torch.inf))

    def distances(self, queries: Tensor) -> Tensor:
        products = torch.addmm(self.norms, queries, self.keys.T, alpha=-2)
        return products.add_(queries.square().sum(1, keepdim=True))


@dataclass(frozen=True)
class _HalfBlock:
    """Keys as sums of two float16, for one product in tensor cores with float32 sums.

    Of ``(q + q') (x + x')`` the last term is below float32's own rounding, so three products are
    enough: they are one, of rows ``[x, x', x]`` with ``[q, q, q']``. The norms are columns too, each
    the sum of three float16; then the product is the distance, written once and never touched
    again. A power of two scales the keys to where float16 is densest.
    """

    first: int
    unit: float
    keys: Tensor  # float16 [keys and padding, 3 width + 6 and alignment]

    @classmethod
    def make(cls, first: int, keys: Tensor, centre: Tensor) -> _HalfBlock:
        """Overwrites `keys`."""
        count, width = keys.shape
        norms = keys.square().sum(1, keepdim=True)
        # Queries are no longer than the centre's length allows, even where all keys are equal.
        length = float(torch.maximum(norms.max().sqrt(), centre.norm() / 8).clamp(min=1e-12))
        scale = 2.0 ** np.floor(np.log2(_LENGTH / length))
        shape = (count + -count % _GROUP, 3 * width + 6 + -(3 * width + 6) % _ALIGNMENT)
        rows = keys.new_zeros(shape, dtype=torch.float16)
        high, low, again, rest = rows[:count].split(
            [width, width, width, shape[1] - 3 * width], dim=1
        )
        keys.mul_(scale)  # in place here and below: a block is large
        high.copy_(keys)
        low.copy_(keys.sub_(high))
        again.copy_(high)
        rest[:, :3] = torch.cat(_split(norms * scale**2, 3), dim=1)
        rest[:, 3:6] = _NORM_UNIT
        rows[count:, 3 * width] = torch.inf
        return cls(first, 1.0 / scale**2, rows)

    def distances(self, queries: Tensor) -> Tensor:
        queries = queries * self.unit**-0.5
        high, low = _split(queries * -2, 2)
        norms = _split(queries.square().sum(1, keepdim=True) / _NORM_UNIT, 3)
        ones = torch.ones_like(high[:, :3])
        rows = torch.cat([high, high, low, ones, *norms], dim=1)
        return _half_product(pad(rows, (0, -rows.shape[1] % _ALIGNMENT)), self.keys)


def _split(values: Tensor, parts: int) -> list[Tensor]:
    """float16 tensors that sum to `values`, each with the next 11 bits."""
    found = []
    for _ in range(parts):
        found.append(values.half())
        values = values - found[-1].float()
    return found


def _half_product(queries: Tensor, keys: Tensor) -> Tensor:
    """``queries @ keys.T``, float32 from float16."""
    if queries.is_cuda:
        return torch.mm(queries, keys.T, out_dtype=torch.float32)
    return queries.float() @ keys.float().T


def _multiplies_halves(device: torch.device) -> bool:
    """Whether this torch multiplies float16 into float32 on the device."""
    if device.type != "cuda":
        return False
    probe = torch.zeros(16, 16, dtype=torch.float16, device=device)
    try:
        _half_product(probe, probe)
    except (TypeError, RuntimeError):  # torch before 2.8
        return False
    return True
