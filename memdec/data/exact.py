"""Exact nearest neighbours: a matrix product, and the k smallest of each of its rows.

Ours because PyTorch multiplies as fast on a CPU and anywhere on a GPU, and because FAISS leaves open
which of several equal distances it returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from memdec._native import kernels_for, launch_on
from memdec.console import say
from memdec.data.corpus import rows_between
from memdec.data.in_flight import InFlight, in_order, to_device

_QUERIES_A_BATCH = 1024
_KEYS_A_BLOCK = {"cpu": 1 << 16, "cuda": 1 << 19}  # times a batch: the distances that are written
_NUMBERS_A_BLOCK = 1 << 28  # of wide keys fewer make a block
_KEYS_OF_THE_CENTRE = 1 << 16
_RESIDENT_BYTES = 1 << 30  # on the CPU; on a GPU half of what is free
_GROUP = 64  # widest group of columns; a block is padded to whole ones
_LENGTH = 128.0  # of the longest key in halves, so that its square fits one
_NORM_UNIT = 256.0  # of a query's norm, which may exceed every key's
_ALIGNMENT = 8  # columns of float16 that are 16 bytes, as tensor cores want them


WRONG_QUERY = (
    "a query is not a number, or too far from all keys to tell them apart; "
    "expected keys of the same layer of the same model"
)


@dataclass(frozen=True)
class Found:
    """Neighbours of n queries, where they were found; perhaps still being looked for there.

    Attributes:
        distances: squared, float32 [n, k]; infinite where there is no neighbour.
        ids: int64 [n, k]; -1 where there is none.
        wrong: a bool; whether a query was none, for an :class:`InFlight` to check.
    """

    distances: Tensor
    ids: Tensor
    wrong: Tensor

    def on_host(self) -> InFlight[tuple[np.ndarray, np.ndarray]]:
        """Distances and ids on their way, with the error that a wrong query is."""
        return InFlight(
            [self.distances, self.ids],
            lambda distances, ids: (distances.numpy(), ids.numpy()),
            {WRONG_QUERY: self.wrong},
        )


class ExactIndex:
    """Exact search over float16 keys, in order of (squared L2 distance, id).

    Distances are float32 sums around the mean key, which keeps the digits that
    ``|q|^2 + |x|^2 - 2 q.x`` would lose to a large common offset. Where memory allows, the prepared
    keys stay; else they are made anew from the memory map for each batch of queries. Blocks of keys
    have fixed boundaries, so on any number of devices of one kind the answers are the same bits.

    Args:
        shards: float16 [n, width] each.
        devices: where to search. Several share the keys; ``"cuda"`` is the current GPU, or all that
            are visible when the keys do not fit into one but into all of them.
        halves: multiply pairs of float16 in tensor cores (:class:`_HalfBlock`) instead of float32;
            by default where the device and this torch can.
    """

    def __init__(
        self, shards: Sequence[np.ndarray], devices: str | Sequence[str], halves: bool | None = None
    ) -> None:
        names = [devices] if isinstance(devices, str) else devices
        self._devices = [torch.device(name) for name in names]
        self._shards = shards
        self._size = sum(map(len, shards))
        self._halves = _multiplies_halves(self._devices[0]) if halves is None else halves
        sample = torch.from_numpy(shards[0][:_KEYS_OF_THE_CENTRE]).to(self._devices[0])
        self._centre = sample.float().mean(dim=0)
        needed = sum(shard.size for shard in shards) * (6 if self._halves else 4)
        if devices == "cuda" and needed > _room(self._devices):
            every = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
            if needed <= _room(every):
                say(f"exact search: the keys are spread over {len(every)} GPUs")
                self._devices = every
        keys_a_block = _KEYS_A_BLOCK.get(self._devices[0].type, _KEYS_A_BLOCK["cpu"])
        keys_a_block = min(keys_a_block, _NUMBERS_A_BLOCK // len(self._centre))
        self._starts = range(0, self._size + keys_a_block, keys_a_block)
        self._resident: list[list[_Block]] | None = None
        if needed <= _room(self._devices):
            count = len(self._devices)
            self._resident = [
                list(self._blocks(device, number, count))
                for number, device in enumerate(self._devices)
            ]

    def search(
        self, queries: np.ndarray, k: int, exclude: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        batches = self._batches(queries, k, exclude)
        found = list(in_order(batch.on_host() for batch in batches))
        return (
            np.concatenate([distances for distances, _ in found]),
            np.concatenate([ids for _, ids in found]),
        )

    def find(self, queries: np.ndarray, k: int, exclude: np.ndarray | None) -> Found:
        """As :meth:`search`, on the first device and without waiting for it."""
        found = list(self._batches(queries, k, exclude))
        return Found(
            torch.cat([batch.distances for batch in found]),
            torch.cat([batch.ids for batch in found]),
            torch.stack([batch.wrong for batch in found]).any(),
        )

    def _batches(self, queries: np.ndarray, k: int, exclude: np.ndarray | None) -> Iterator[Found]:
        for start in range(0, max(len(queries), 1), _QUERIES_A_BATCH):
            stop = start + _QUERIES_A_BATCH
            left_out = None if exclude is None else exclude[start:stop]
            best, *others = [
                self._nearest(device, blocks, queries[start:stop], k, left_out)
                for device, blocks in self._parts()
            ]
            if others:
                others = [part.to(best.device, non_blocking=True) for part in others]
                best = torch.cat([best, *others], dim=1).sort(dim=1).values[:, :k]
            distances, ids = unpack(best)
            ids = torch.where(torch.isinf(distances), -1, ids)
            wrong = torch.isnan(distances).any()
            if self._size > 1:
                wrong |= (ids[:, 0] < 0).any()
            yield Found(distances, ids, wrong)

    def _parts(self) -> Iterable[tuple[torch.device, Iterable[_Block]]]:
        """Each device with its blocks: kept there, or made anew for the first one."""
        if self._resident is None:
            return [(self._devices[0], self._blocks(self._devices[0], 0, 1))]
        return zip(self._devices, self._resident, strict=True)

    def _blocks(self, device: torch.device, number: int, count: int) -> Iterator[_Block]:
        """Every `count`-th block of prepared keys from the `number`-th on."""
        centre = self._centre.to(device)
        make = _HalfBlock.make if self._halves else _FloatBlock.make
        for start, stop in list(pairwise(self._starts))[number::count]:
            rows = rows_between(self._shards, start, min(stop, self._size))
            # A matrix product may round its last few columns in another way than the rest; with
            # columns at infinity for an edge, equal keys are at equal distances.
            yield make(start, torch.from_numpy(rows).to(device).float().sub_(centre), centre)

    def _nearest(
        self,
        device: torch.device,
        blocks: Iterable[_Block],
        queries: np.ndarray,
        k: int,
        exclude: np.ndarray | None,
    ) -> Tensor:
        """The k nearest among the blocks, packed and in order, on their device."""
        centred = to_device(np.array(queries), device).float() - self._centre.to(device)
        left_out = None if exclude is None else to_device(np.array(exclude), device)[:, None]
        best = pack(
            torch.full((len(queries), k), torch.inf, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
        for block in blocks:
            distances = block.distances(centred)
            if left_out is not None:
                column = (left_out - block.first).clamp(0, distances.shape[1] - 1)
                other = left_out != column + block.first
                kept = torch.where(other, distances.gather(1, column), torch.inf)
                distances.scatter_(1, column, kept)
            best = _keep_nearest(best, distances, block)
        return best


def _room(devices: Sequence[torch.device]) -> int:
    """Bytes of prepared keys that may stay on all of them together, in equal shares."""
    least = min(
        torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _RESIDENT_BYTES
        for device in devices
    )
    return least * len(devices)


def _keep_nearest(best: Tensor, distances: Tensor, block: _Block) -> Tensor:
    """The k nearest of the best so far, packed, int64 [n, k], and of a block's distances."""
    k = best.shape[1]
    kernels = kernels_for("cuda") if best.is_cuda else None
    if kernels is None or k > kernels.max_nearest:
        near, columns = unpack(smallest(distances, k))
        near = pack(near * block.unit, columns + block.first)
        return torch.cat([best, near], dim=1).sort(dim=1).values[:, :k]
    kernels.keep_nearest(
        *launch_on(best.device),
        *distances.shape,
        distances.data_ptr(),
        block.unit,
        block.first,
        k,
        best.data_ptr(),
    )
    return best


def smallest(distances: Tensor, k: int) -> Tensor:
    """The k smallest of each row by (value, column), at least 0: packed, in order.

    Looks at each number once: the k smallest lie in the k groups of columns whose least numbers are
    smallest, ties by group. So only these are sorted. No order is left open, and nothing waits for
    the device.

    Args:
        distances: float32 [n, columns]; columns a multiple of 64.
        k: how many; all columns if there are fewer.

    Returns:
        int64 [n, min(k, columns)]; :func:`unpack` makes values and columns of it.
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
    packed = pack(values, torch.arange(values.shape[1], device=values.device))
    return packed.topk(min(k, values.shape[1]), dim=1, largest=False).values


_ID = (1 << 32) - 1


def pack(values: Tensor, ids: Tensor) -> Tensor:
    """float32 values of at least 0 and ids below 2^32 as int64 that sort by (value, id)."""
    return torch.add(ids, values.view(torch.int32), alpha=1 << 32)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
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
        ones = high.new_ones(len(high), 3)
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
