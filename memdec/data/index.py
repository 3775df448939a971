"""Which index the keys get, by FAISS's factory strings, and what it costs.

Searching is memdec.data.exact's for :data:`EXACT`, and memdec.data.faiss_index's for all others.
Both order by (squared L2 distance, id) and pad with (inf, -1).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from memdec.errors import MemdecError

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


def product_quantiser(index: Any) -> Any | None:
    """What makes an index's codes of codewords of parts of a key; None where they are others."""
    return getattr(_without_transform(index), "pq", None)


def load_faiss() -> ModuleType:
    try:
        import faiss
    except ImportError:
        raise MemdecError(
            "an index other than Flat needs FAISS: pip install faiss-cpu "
            "(or, for GPUs, faiss-gpu-cuvs or faiss-gpu)"
        ) from None
    return faiss
