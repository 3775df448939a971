"""Which index the keys get, and searching in FAISS's. The exact one is memdec.data.exact.

Both kinds of index order by (squared L2 distance, id) and pad with (inf, -1).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from memdec.console import say_once
from memdec.errors import MemdecError

if TYPE_CHECKING:  # torch is slow to import, and --help does without
    from torch import Tensor

    from memdec.data.exact import Found

EXACT = "Flat"
EXACT_UP_TO = 1 << 20

_SAMPLE = 1 << 10  # keys of an index that is built to be measured


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
        index = make_index(spec, width)
        if isinstance(index, load_faiss().IndexIDMap):
            raise MemdecError(f"index {spec} maps ids; give it without, a key's id is its position")
        has_lists = load_faiss().try_extract_index_ivf(index) is not None
        if has_lists and not 0 < count_lists(index) <= size:
            raise MemdecError(
                f"index {spec} has {count_lists(index)} lists, expected 1 to {size}, the keys"
            )
    return spec


class FaissIndex:
    """A FAISS index read from its file: memory-mapped, or copied to the GPUs of `device`; answers go there."""

    def __init__(self, path: Path, nprobe: int, device: str = "cpu") -> None:
        import torch

        from memdec.data.faiss_gpu import copy_to_gpus, visible_gpus

        faiss = load_faiss()
        self._device = torch.device(device)
        try:
            self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise MemdecError(f"FAISS cannot read {path}: {reason(error)}") from None
        inverted_lists = faiss.try_extract_index_ivf(self._index)
        if inverted_lists is not None:
            inverted_lists.nprobe = min(nprobe, inverted_lists.nlist)
        gpus = visible_gpus(device)
        self._on_gpus = copy_to_gpus(self._index, gpus) if gpus else None

    def search(
        self, queries: np.ndarray, k: int, exclude: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        return self.find(queries, k, exclude).on_host().result()

    def find(self, queries: np.ndarray, k: int, exclude: np.ndarray | None) -> Found:
        """As :meth:`search`, on the device: there sorting costs little, on the host more than FAISS.

        FAISS need not return a key first for itself, nor sort, nor find k: -1 is no neighbour.
        """
        import torch

        from memdec.data.exact import Found, pack, unpack

        wanted = k if exclude is None else k + 1
        distances, ids, wrong = self._search(queries, wanted)
        dropped = ids < 0
        if exclude is not None:
            dropped |= ids == torch.from_numpy(np.array(exclude)).to(self._device)[:, None]
        distances = distances.clamp(min=0).abs()  # no -0.0, which would not be packed in order
        packed = pack(distances.masked_fill(dropped, torch.inf), ids.masked_fill(dropped, 0))
        distances, ids = unpack(packed.sort(dim=1).values[:, :k])
        return Found(distances, torch.where(torch.isinf(distances), -1, ids), wrong)

    def _search(self, queries: np.ndarray, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """What FAISS finds, on the device, and whether a query was none.

        By way of pinned memory, which a GPU reads and fills fast.
        """
        import torch

        host = partial(torch.empty, pin_memory=torch.cuda.is_available())
        given = torch.from_numpy(np.require(queries, requirements="W"))  # torch wants it writable
        wide = host(queries.shape).copy_(given).numpy()
        distances, ids = host(len(queries), k), host(len(queries), k, dtype=torch.int64)
        arrays = {"D": distances.numpy(), "I": ids.numpy()}
        if not self._search_on_gpus(wide, k, arrays):
            self._index.search(wide, k, **arrays)
        return (
            distances.to(self._device, non_blocking=True),
            ids.to(self._device, non_blocking=True),
            torch.tensor(not np.isfinite(wide).all()),
        )

    def _search_on_gpus(self, queries: np.ndarray, k: int, arrays: dict[str, np.ndarray]) -> bool:
        """Fills the arrays if there are GPUs that can."""
        import torch

        from memdec.data.faiss_gpu import MOST_NEIGHBOURS

        if self._on_gpus is None:
            return False
        if k > MOST_NEIGHBOURS:
            say_once(
                f"FAISS searches on the CPU: {k} neighbours (with the query's own) are asked for, "
                f"and on a GPU it finds at most {MOST_NEIGHBOURS}"
            )
            return False
        try:
            self._on_gpus.search(queries, k, **arrays)
        except RuntimeError as error:  # out of memory
            self._on_gpus = None
            say_once(f"FAISS searches on the CPU from now on: {reason(error)}")
            return False
        if torch.cuda.is_available():  # FAISS need not wait for a copy into pinned memory
            torch.cuda.synchronize(self._device)
        return True


def index_cost(spec: str, size: int, width: int) -> tuple[int, int]:
    """About how many bytes the file of a FAISS index has (codes, ids, centroids), and its lists."""
    index = make_index(spec, width)
    lists = count_lists(index)
    return size * _bytes_a_key(index) + lists * width * 4, lists


def _bytes_a_key(index: Any) -> int:
    """Of an index that is still empty; overwrites one without codes, such as a graph."""
    try:
        return int(index.sa_code_size()) + 8
    except RuntimeError:
        sample = np.random.default_rng(0).standard_normal((_SAMPLE, index.d), dtype=np.float32)
        index.train(sample)
        index.add(sample)
        return len(load_faiss().serialize_index(index)) // _SAMPLE


def make_index(spec: str, width: int) -> Any:
    """An empty FAISS index of a factory string.

    Raises:
        MemdecError: FAISS does not know it, or FAISS is missing.
    """
    faiss = load_faiss()
    try:
        index = faiss.index_factory(width, spec)
    except RuntimeError as error:
        raise MemdecError(
            f"FAISS makes no index of width {width} from {spec!r}: {reason(error)}"
        ) from None
    quantised = _without_transform(index)
    if isinstance(quantised, faiss.IndexIVFPQ | faiss.IndexPQ):
        # Sorts codes for a filter that is not used, seconds a byte of code.
        quantised.do_polysemous_training = False
    return index


def _without_transform(index: Any) -> Any:
    faiss = load_faiss()
    transformed = isinstance(index, faiss.IndexPreTransform)
    return faiss.downcast_index(index.index) if transformed else index


def plain_lists(index: Any) -> Any | None:
    """The inverted lists of an index in which every key has a code of its own, whoever adds it.

    They can be filled in parts and by others than the index itself.
    """
    faiss = load_faiss()
    inner = _without_transform(index)
    kinds = (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ)
    return inner if type(inner) in kinds else None


def count_lists(index: Any) -> int:
    """Number of inverted lists, 0 for an index without."""
    inverted_lists = load_faiss().try_extract_index_ivf(index)
    return inverted_lists.nlist if inverted_lists else 0


def reason(error: RuntimeError) -> str:
    """FAISS's own words, without the place in its source that comes before them."""
    return str(error).rsplit(":", 1)[-1].strip()


def load_faiss() -> ModuleType:
    try:
        import faiss
    except ImportError:
        raise MemdecError(
            "an index other than Flat needs FAISS: pip install faiss-cpu "
            "(or, for GPUs, faiss-gpu-cuvs or faiss-gpu)"
        ) from None
    return faiss
