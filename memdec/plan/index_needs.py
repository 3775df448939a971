"""What an index of the datastore needs, and a search in it, by arithmetic; for memdec.plan.needs.

FAISS searches a copy of its index on the GPUs where it has any, takes this kind of index and the copy
fits beside what else the stage keeps there; else the CPU does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memdec.console import show_bytes
from memdec.plan.machine import Machine

# The share of a matrix product's rate that search and clustering reach in products, and how many
# times as long an operation takes in lists, which each query reads for itself; by who works. From
# benchmarks/results: products on a GPU from *-teacher.json and *-processes.json, its lists from
# *-whole.json; lists on the CPU from index/, the slowest there.
_REACHED = {"cpu": 0.65, "cuda": 0.4}
_IN_LISTS = {"cpu": 22, "cuda": 20}
# What the host does for an index beside that, whoever does the products; from index/ too.
_ADDED_A_SECOND = 0.3e9  # bytes of keys that one core reads and widens and two code into lists
_WRITTEN_A_SECOND = 0.43e9  # bytes of the file, with fsync and SHA-256
_WORKSPACE = 3 << 29  # that FAISS sets aside on each GPU
_PADDING = 16  # keys a list, which a GPU holds in groups of 32
_ROUNDS = 10  # of FAISS's clustering
_GROWTH = 2  # a list that is full moves to twice the room


@dataclass(frozen=True)
class IndexNeed:
    """What it takes to make an index, or to search in it.

    Attributes:
        host: bytes of memory.
        device: bytes on each GPU, or on the host for exact search there.
        note: who works, where that is a question.
    """

    seconds: float
    host: int = 0
    device: int = 0
    note: str = ""


@dataclass(frozen=True)
class IndexNeeds:
    """Of an index `spec`, not ``"auto"``, of `size` keys of `width`."""

    spec: str
    size: int
    width: int
    machine: Machine

    @property
    def exact(self) -> bool:
        from memdec.data.index import EXACT

        return self.spec == EXACT

    @property
    def bytes(self) -> int:
        """Of the index's file; exact search has none."""
        from memdec.data.index import index_cost

        return 0 if self.exact else index_cost(self.spec, self.size, self.width)[0]

    def to_build(self, beside: int) -> IndexNeed:
        """Clustering a sample, choosing each key's list, coding it there and writing the file.

        Args:
            beside: what else a GPU holds.
        """
        from memdec.data.build_index import training_keys
        from memdec.data.index import index_cost, make_index, plain_lists, product_quantiser

        if self.exact:
            return IndexNeed(0.0)
        lists = index_cost(self.spec, self.size, self.width)[1]
        sample = training_keys(lists, self.size)
        # The sample in two types at once, then the lists.
        host = _GROWTH * self.bytes + 8 * sample * self.width
        operations = 2 * (_ROUNDS * sample + self.size) * lists * self.width
        device = _WORKSPACE + 4 * lists * self.width
        handled = 2 * self.size * self.width / _ADDED_A_SECOND + self.bytes / _WRITTEN_A_SECOND
        index = make_index(self.spec, self.width)
        if (quantiser := product_quantiser(index)) is not None:
            handled += self._seconds(_coding(quantiser, sample, self.size), gpus=0)
        helped = plain_lists(index) is not None
        if self.machine.faiss_gpus and helped and self._fits(device + beside):
            return IndexNeed(self._seconds(operations, gpus=1) + handled, host, device)
        return IndexNeed(self._seconds(operations, gpus=0) + handled, host)

    def to_search(self, queries: int, k: int, nprobe: int, beside: int) -> IndexNeed:
        """The `k` nearest of each query, without itself; `beside`: what else a GPU holds."""
        from memdec.data.index import index_cost

        if self.exact:
            return self._to_search_all(queries)
        host, lists = index_cost(self.spec, self.size, self.width)
        one_each = 2 * queries * self.width
        in_lists = one_each * self.size * min(nprobe / lists, 1.0) if lists else 0.0
        operations = {"products": one_each * (lists or self.size), "in_lists": in_lists}
        gpus = len(self.machine.faiss_gpus)
        device = self._copy_bytes(gpus) if gpus else 0
        why_not = self._why_not_on_gpus(k, device, beside)
        if why_not is None:
            where = f"{gpus} GPUs" if gpus > 1 else "the GPU"
            note = f"FAISS searches a copy on {where}"
            return IndexNeed(self._seconds(**operations, gpus=gpus), host, device, note)
        note = f"FAISS searches on the CPU: {why_not}" if self.machine.device == "cuda" else ""
        return IndexNeed(self._seconds(**operations, gpus=0), host, note=note)

    def _to_search_all(self, queries: int) -> IndexNeed:
        if self.machine.device == "cuda":  # pairs of float16, three times the width
            resident = min(6 * self.size * self.width, self.machine.gpu_memory // 2)
            rate = _REACHED["cuda"] * self.machine.rates["bfloat16"]
            seconds = 6 * queries * self.size * self.width / rate
            return IndexNeed(seconds, device=resident + (4 << 30))
        rate = _REACHED["cpu"] * self.machine.rates["float32"]
        resident = min(4 * self.size * self.width, 1 << 30)
        return IndexNeed(2 * queries * self.size * self.width / rate, device=resident + (1 << 29))

    def _copy_bytes(self, gpus: int) -> int:
        """On each GPU: every list with its share of the keys, and what FAISS works in."""
        from memdec.data.index import count_lists, index_cost, make_index

        lists = count_lists(make_index(self.spec, self.width))
        keys = -(-self.size // gpus) + _PADDING * lists
        return index_cost(self.spec, keys, self.width)[0] + _WORKSPACE

    def _why_not_on_gpus(self, k: int, device: int, beside: int) -> str | None:
        from memdec.data.faiss_gpu import MOST_NEIGHBOURS, takes

        gpus = self.machine.faiss_gpus
        if not gpus:
            return "the one installed has no GPU"
        if k >= MOST_NEIGHBOURS:
            return f"{k + 1} neighbours with the query's own, a GPU finds {MOST_NEIGHBOURS}"
        if not self._fits(device + beside):
            free = show_bytes(max(self.machine.gpu_memory - beside, 0))
            return f"a copy needs {show_bytes(device)} of GPU memory, {free} are left"
        if not takes(self.spec, self.width, list(gpus)):
            return "no GPU takes such an index"
        return None

    def _fits(self, device: int) -> bool:
        return device <= self.machine.gpu_memory

    def _seconds(self, products: float, in_lists: float = 0.0, *, gpus: int) -> float:
        """Of so many operations in matrix products and in lists, on `gpus`, or on the CPU for 0."""
        rates = self.machine.rates
        who, rate = ("cuda", gpus * rates["float32"]) if gpus else ("cpu", rates["host"])
        return (products + _IN_LISTS[who] * in_lists) / (_REACHED[who] * rate)


def _coding(quantiser: Any, sample: int, size: int) -> float:
    """Operations of a product quantiser that finds its codewords in a sample and codes `size` keys.

    Each part of a key is compared with all its codewords: as much work as a product of the whole key
    with so many vectors. What FAISS trains on and how often is the quantiser's own.
    """
    clustering, codewords = quantiser.cp, quantiser.ksub
    trained = min(sample, clustering.max_points_per_centroid * codewords)
    return 2.0 * quantiser.d * codewords * (clustering.niter * trained + size)
