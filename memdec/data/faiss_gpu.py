"""FAISS on GPUs, where the installed FAISS has them: search, clustering, and choosing lists.

Codes are always made and kept by the index on the CPU, so no index is too large for a GPU to help
building it. What a GPU cannot do, or has no memory for, the CPU does, and says so once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from memdec.console import say_once
from memdec.data.index import load_faiss, make_index, reason

MOST_NEIGHBOURS = 2048  # that FAISS selects on a GPU


def gpus_of(device: str) -> list[int]:
    """The GPUs that FAISS may use for a torch device: its own, or all for ``"cuda"``."""
    wanted = torch.device(device)
    if wanted.type != "cuda":
        return []
    return [gpu for gpu in range(_count()) if wanted.index in (None, gpu)]


def visible_gpus(device: str) -> list[int]:
    """As :func:`gpus_of`; says so where a GPU is asked for and FAISS has none."""
    if torch.device(device).type == "cuda" and _count() == 0:
        say_once("FAISS works on the CPU: the one installed has no GPU (faiss-gpu-cuvs has)")
    return gpus_of(device)


def _count() -> int:
    faiss = load_faiss()
    return faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0


def takes(spec: str, width: int, gpus: list[int]) -> bool:
    """Whether a GPU searches this kind of index, tried with an empty one; says why not."""
    return copy_to_gpus(make_index(spec, width), gpus[:1]) is not None


def copy_to_gpus(index: Any, gpus: list[int]) -> Any | None:
    """A copy of the index for searching, its keys dealt out over the GPUs; None where none fits."""
    faiss = load_faiss()
    lists = faiss.try_extract_index_ivf(index)
    kind = type(faiss.downcast_index(lists)) if lists else None
    alone = len(gpus) == 1
    options = faiss.GpuClonerOptions() if alone else faiss.GpuMultipleClonerOptions()
    # float32 tables of more than a few bytes a key do not fit into a multiprocessor.
    options.useFloat16 = kind is faiss.IndexIVFPQ
    if kind is faiss.IndexIVFScalarQuantizer and hasattr(options, "use_cuvs"):
        options.use_cuvs = False  # which knows no such codes
    try:
        if alone:
            resources = faiss.StandardGpuResources()
            return faiss.index_cpu_to_gpu(resources, gpus[0], index, options)
        options.shard = True
        return faiss.index_cpu_to_gpus_list(index, options, gpus)
    except RuntimeError as error:
        say_once(f"FAISS searches on the CPU, not on a GPU: {reason(error)}")
        return None


def train_with(gpus: list[int], index: Any, lists: Any | None, sample: np.ndarray) -> None:
    """Trains an index; the centroids of its inverted `lists` are found on the first GPU."""
    faiss = load_faiss()
    if gpus and lists is not None:
        try:
            helper = _on_gpu(faiss.IndexFlatL2(lists.d), gpus[0])
            lists.clustering_index = helper
            # FAISS took it over and never frees it, nor the memory that was set aside for it.
            helper.thisown = True
            index.train(sample)
            return
        except RuntimeError as error:
            say_once(f"FAISS trains on the CPU, not on a GPU: {reason(error)}")
        finally:
            lists.clustering_index = None
    index.train(sample)


class ListFiller:
    """Adds keys to inverted lists; which list each goes into, most of the work, a GPU finds.

    Args:
        index: trained; `lists` themselves, or a transformation before them.
    """

    def __init__(self, gpus: list[int], index: Any, lists: Any) -> None:
        self._index = index
        self._lists = lists
        self._centroids = None
        if gpus:
            try:
                self._centroids = _on_gpu(load_faiss().downcast_index(lists.quantizer), gpus[0])
            except RuntimeError as error:
                self._give_up(error)

    def add(self, keys: np.ndarray, ids: np.ndarray) -> None:
        """Adds float32 keys [n, width] under their ids, int64 [n]."""
        if self._centroids is not None:
            faiss = load_faiss()
            moved = keys
            if self._index is not self._lists:
                chain = self._index.chain
                for number in range(chain.size()):
                    moved = faiss.downcast_VectorTransform(chain.at(number)).apply(moved)
            try:
                chosen = np.ascontiguousarray(self._centroids.search(moved, 1)[1].ravel())
            except RuntimeError as error:
                self._give_up(error)
            else:
                arrays = [faiss.swig_ptr(array) for array in (moved, ids, chosen)]
                self._lists.add_core(len(keys), *arrays)
                self._index.ntotal = self._lists.ntotal
                return
        self._index.add_with_ids(keys, ids)

    def _give_up(self, error: RuntimeError) -> None:
        self._centroids = None
        say_once(f"FAISS adds keys on the CPU, not on a GPU: {reason(error)}")


def _on_gpu(index: Any, gpu: int) -> Any:
    faiss = load_faiss()
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gpu, index)
