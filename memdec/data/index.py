"""Which index the keys get, and FAISS's indexes. The exact one is memdec.data.exact.

Both kinds of index order by (squared L2 distance, id) and pad with (inf, -1).
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np

from memdec.console import Progress
from memdec.data.keys import Keys
from memdec.errors import MemdecError

EXACT = "Flat"
EXACT_UP_TO = 1 << 20

_KEYS_A_CHUNK = 1 << 16
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


def index_cost(spec: str, size: int, width: int) -> tuple[int, int]:
    """About how many bytes the file of a FAISS index has (codes, ids, centroids), and its lists."""
    index = _factory(spec, width)
    lists = _lists(index)
    return size * (index.sa_code_size() + 8) + lists * width * 4, lists


def build_faiss(spec: str, keys: Keys, seed: int) -> Any:
    """Trains a FAISS index on a seeded sample of the keys and adds them all, in order of id.

    Raises:
        MemdecError: too few keys to train on.
    """
    index = _factory(spec, keys.width)
    if not index.is_trained:
        wanted = min(keys.size, max(_lists(index), _LEAST_LISTS) * _TRAINING_KEYS_A_LIST)
        chosen = np.sort(np.random.default_rng(seed).choice(keys.size, wanted, replace=False))
        try:
            index.train(keys.pick(chosen).astype(np.float32))
        except RuntimeError as error:
            raise MemdecError(
                f"FAISS cannot train {spec} on {wanted} keys: {_reason(error)}"
            ) from None
    with Progress(f"index {spec}", keys.size, "keys") as progress:
        for start in range(0, keys.size, _KEYS_A_CHUNK):
            stop = min(start + _KEYS_A_CHUNK, keys.size)
            index.add(keys.read(start, stop).astype(np.float32))
            progress.advance(stop - start)
    return index


def write_faiss(index: Any, file: IO[bytes]) -> None:
    faiss = _faiss()
    faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


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
