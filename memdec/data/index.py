"""Nearest neighbours among the keys: exact by matrix product, or a FAISS index.

Exact search is ours because it is a matrix product and a top-k that PyTorch does as fast on a CPU
and anywhere on a GPU, and because FAISS leaves open which of several equal distances it returns.
Both kinds order by (squared L2 distance, id) and pad with (inf, -1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
import torch
from torch.nn.functional import pad

from memdec.console import Progress
from memdec.data.corpus import rows_between
from memdec.errors import MemdecError

EXACT = "Flat"
EXACT_UP_TO = 1 << 20

_QUERIES_A_BATCH = 1024
_KEYS_A_CHUNK = 1 << 16
_EDGE = 64
_RESIDENT_BYTES = 1 << 30  # on the CPU; on a GPU half of what is free
_TRAINING_KEYS_A_LIST = 64
_LEAST_LISTS = 256  # a product quantiser of 8 bits has that many centroids to train


def choose_index(spec: str, size: int, width: int) -> str:
    """Turns ``"auto"`` into a FAISS factory string and checks any other.

    Exact search up to a million keys. Above, inverted lists of float16 keys, their number the
    power of two nearest to four times the root of `size`.

    Raises:
        MemdecError: no factory string that FAISS knows, more lists than keys, or FAISS is missing.
    """
    if spec == "auto":
        lists = 1 << round(np.log2(4 * size**0.5))
        spec = EXACT if size <= EXACT_UP_TO else f"IVF{lists},SQfp16"
    if spec != EXACT:
        lists = _lists(_factory(spec, width))
        if lists > size:
            raise MemdecError(f"index {spec} has {lists} lists, more than the {size} keys")
    return spec


class ExactIndex:
    """Exact search over float16 keys.

    Distances are float32 sums around the mean key, which keeps the digits that
    ``|q|^2 + |x|^2 - 2 q.x`` would lose to a large common offset. Where memory allows, the centred
    keys are kept in float32; else they are made anew from the memory map for each batch of queries.
    """

    def __init__(self, shards: Sequence[np.ndarray], device: str) -> None:
        self._device = torch.device(device)
        self._shards = shards
        sample = torch.from_numpy(shards[0][:_KEYS_A_CHUNK]).to(self._device)
        self._centre = sample.float().mean(dim=0)
        room = _RESIDENT_BYTES
        if self._device.type == "cuda":
            room = torch.cuda.mem_get_info(self._device)[0] // 2
        is_resident = sum(shard.size for shard in shards) * 4 <= room
        self._resident = list(self._chunks()) if is_resident else None

    def _chunks(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """First id, centred keys [n, width] and their squared norms [n], in order of id."""
        for start, stop in _chunk_bounds(sum(map(len, self._shards))):
            keys = torch.from_numpy(rows_between(self._shards, start, stop)).to(self._device)
            keys = keys.float().sub_(self._centre)
            norms = keys.square().sum(1)
            # A matrix product may round its last few columns in another way than the rest; with
            # columns at infinity for an edge, equal keys are at equal distances.
            edge = -len(keys) % _EDGE
            yield start, pad(keys, (0, 0, 0, edge)), pad(norms, (0, edge), value=torch.inf)

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

    def _search_batch(
        self, queries: np.ndarray, k: int, exclude: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        centred = torch.from_numpy(queries.astype(np.float32)).to(self._device) - self._centre
        norms = centred.square().sum(1, keepdim=True)
        left_out = None if exclude is None else torch.from_numpy(exclude).to(self._device)
        best = torch.full((len(queries), k), torch.inf, device=self._device)
        ids = torch.full((len(queries), k), -1, device=self._device)
        for first, keys, key_norms in self._resident or self._chunks():
            distances = torch.addmm(key_norms, centred, keys.T, alpha=-2)
            distances.add_(norms).clamp_(min=0)
            if left_out is not None:
                inside = (left_out >= first) & (left_out < first + len(keys))
                rows = inside.nonzero().squeeze(1)
                distances[rows, left_out[rows] - first] = torch.inf
            near, columns = _smallest(distances, k)
            # Ids already found are lower than the new ones, so a stable sort keeps ties by id.
            near, order = torch.sort(torch.cat([best, near], dim=1), dim=1, stable=True)
            best = near[:, :k]
            ids = torch.cat([ids, columns + first], dim=1).gather(1, order[:, :k])
        ids = torch.where(torch.isinf(best), -1, ids)
        return best.cpu().numpy(), ids.cpu().numpy()


class FaissIndex:
    """A FAISS index read from its file."""

    def __init__(self, path: Path, nprobe: int) -> None:
        faiss = _faiss()
        self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        inverted_lists = faiss.try_extract_index_ivf(self._index)
        if inverted_lists is not None:
            inverted_lists.nprobe = nprobe

    def search(
        self, queries: np.ndarray, k: int, exclude: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """FAISS need not return a key first for itself, nor sort, nor find k: -1 is no neighbour."""
        wanted = k if exclude is None else k + 1
        wide = np.ascontiguousarray(queries, dtype=np.float32)
        distances, ids = self._index.search(wide, wanted)
        dropped = ids < 0
        if exclude is not None:
            dropped |= ids == exclude[:, None]
        distances = np.where(dropped, np.inf, distances.clip(min=0)).astype(np.float32)
        ids = np.where(dropped, -1, ids)
        order = np.lexsort((ids, distances), axis=1)[:, :k]
        return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)


def build_faiss(spec: str, shards: Sequence[np.ndarray], seed: int) -> Any:
    """Trains a FAISS index on a seeded sample of the keys and adds them all, in order of id.

    Raises:
        MemdecError: too few keys to train on.
    """
    index = _factory(spec, shards[0].shape[1])
    size = sum(map(len, shards))
    if not index.is_trained:
        wanted = min(size, max(_lists(index), _LEAST_LISTS) * _TRAINING_KEYS_A_LIST)
        chosen = np.sort(np.random.default_rng(seed).choice(size, wanted, replace=False))
        try:
            index.train(_rows(shards, chosen).astype(np.float32))
        except RuntimeError as error:
            raise MemdecError(
                f"FAISS cannot train {spec} on {wanted} keys: {_reason(error)}"
            ) from None
    with Progress(f"index {spec}", size, "keys") as progress:
        for start, stop in _chunk_bounds(size):
            index.add(rows_between(shards, start, stop).astype(np.float32))
            progress.advance(stop - start)
    return index


def write_faiss(index: Any, file: IO[bytes]) -> None:
    faiss = _faiss()
    faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def _smallest(distances: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k smallest of each row in order of (value, column)."""
    if k >= distances.shape[1]:
        return torch.sort(distances, dim=1, stable=True)
    if distances.device.type == "cpu":
        columns = _smallest_columns(distances.numpy(), k + 1)
    else:
        columns = distances.topk(k + 1, dim=1, largest=False).indices
    columns = torch.sort(columns, dim=1).values
    values, order = torch.sort(distances.gather(1, columns), dim=1, stable=True)
    columns = columns.gather(1, order)
    # Which of several values equal to the k-th were picked is chance: sort those rows whole.
    (tied,) = torch.nonzero(values[:, k] == values[:, k - 1], as_tuple=True)
    if len(tied):
        sorted_values, sorted_columns = torch.sort(distances[tied], dim=1, stable=True)
        values[tied], columns[tied] = sorted_values[:, : k + 1], sorted_columns[:, : k + 1]
    return values[:, :k], columns[:, :k]


def _smallest_columns(values: np.ndarray, count: int) -> torch.Tensor:
    """Columns of the `count` smallest of each row in any order; three times as fast as topk."""
    threads = torch.get_num_threads()
    columns = np.empty((len(values), count), np.int64)

    def select(rows: slice) -> None:
        columns[rows] = np.argpartition(values[rows], count - 1, axis=1)[:, :count]

    step = -(-len(values) // threads) or 1
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(select, [slice(at, at + step) for at in range(0, len(values), step)]))
    return torch.from_numpy(columns)


def _chunk_bounds(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, _KEYS_A_CHUNK):
        yield start, min(start + _KEYS_A_CHUNK, size)


def _rows(shards: Sequence[np.ndarray], ids: np.ndarray) -> np.ndarray:
    bounds = np.cumsum([0, *map(len, shards)])
    cuts = np.searchsorted(ids, bounds)
    parts = [
        shard[ids[start:stop] - first]
        for shard, first, start, stop in zip(shards, bounds, cuts, cuts[1:], strict=False)
    ]
    return np.concatenate(parts)


def _factory(spec: str, width: int) -> Any:
    try:
        return _faiss().index_factory(width, spec)
    except RuntimeError as error:
        raise MemdecError(
            f"FAISS makes no index of width {width} from {spec!r}: {_reason(error)}"
        ) from None


def _lists(index: Any) -> int:
    """Number of inverted lists, 0 for an index without."""
    inverted_lists = _faiss().try_extract_index_ivf(index)
    return inverted_lists.nlist if inverted_lists else 0


def _reason(error: RuntimeError) -> str:
    """FAISS's own words, without the place in its source that comes before them."""
    return str(error).rsplit(":", 1)[-1].strip()


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError:
        raise MemdecError(
            "an index other than Flat needs FAISS: pip install faiss-cpu (or faiss-gpu)"
        ) from None
    return faiss
