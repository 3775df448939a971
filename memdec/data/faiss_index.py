"""Searching in an index that FAISS made; the exact one is memdec.data.exact."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memdec.console import say_once
from memdec.data.exact import Found, pack, unpack
from memdec.data.faiss_gpu import MOST_NEIGHBOURS, copy_to_gpus, visible_gpus
from memdec.data.index import load_faiss, reason
from memdec.errors import MemdecError


class FaissIndex:
    """A FAISS index read from its file: memory-mapped, or copied to the GPUs of `device`; answers go there."""

    def __init__(self, path: Path, nprobe: int, device: str = "cpu") -> None:
        faiss = load_faiss()
        self._device = torch.device(device)
        self._pinned = self._device.type == "cuda" and torch.cuda.is_available()
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
        host = partial(torch.empty, pin_memory=self._pinned)
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
        if self._pinned:  # FAISS need not wait for a copy into pinned memory
            torch.cuda.synchronize(self._device)
        return True
