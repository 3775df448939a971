"""What the references share: they compute in float64, a chunk of rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

# A reference holds about six float64 matrices of a chunk at once.
_CHUNK_BYTES = 64 * 2**20
_BYTES_PER_VALUE = 6 * 8


def row_chunks(rows: int, cols: int) -> Iterator[slice]:
    """Slices of at most as many rows as keep a reference's extra memory near 64 MiB."""
    step = max(1, _CHUNK_BYTES // (_BYTES_PER_VALUE * max(cols, 1)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def log_softmax(logits: Tensor) -> Tensor:
    """Float64 log-softmax; NaN throughout for a row with a NaN, a +inf or no finite value."""
    return torch.log_softmax(logits.double(), dim=-1)


def in_range(ids: Tensor, vocab_size: int) -> Tensor:
    """Which ids name a token."""
    return (ids >= 0) & (ids < vocab_size)


def segment_sum(values: Tensor, indptr: Tensor) -> Tensor:
    """Sums of `values[indptr[i]:indptr[i + 1]]`, in order: no atomics, no synchronisation."""
    return torch.segment_reduce(values, "sum", offsets=indptr, unsafe=True)


def slot_rows(indptr: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The row of each slot (0 for a slot of no row), and which slots belong to a row."""
    positions = torch.arange(slots, device=indptr.device)
    rows = torch.searchsorted(indptr, positions, right=True) - 1
    inside = (positions >= indptr[0]) & (positions < indptr[-1])
    return torch.where(inside, rows, 0), inside
