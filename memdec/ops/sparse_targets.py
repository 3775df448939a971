"""Next-token distributions that are zero almost everywhere, as rows of (token, probability)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from memdec.ops import _reference


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """N sparse distributions in CSR form; row i is `[indptr[i], indptr[i + 1])` of the buffers.

    `knn_scatter` makes them: a row's entries by falling probability, ties by token id, summing to
    1, or no entry when no neighbour is valid. Anybody may build one: token ids distinct within a
    row, in any order; a probability of 0 contributes nothing. The buffers may be longer than the
    rows: slots outside `[indptr[0], indptr[-1])` are ignored by every consumer.

    A pytree, so that it goes through `torch.compile` and collate functions.

    Attributes:
        indptr: `[N + 1]` int64, rising. `indptr[0]` is above 0 in a slice.
        token_ids: `[slots]` int32.
        probs: `[slots]` float32.
        dropped_mass: `[N]` float32, the mass that `max_entries` cut off each row before it was
            renormalised; None when nothing was cut.
    """

    indptr: Tensor
    token_ids: Tensor
    probs: Tensor
    dropped_mass: Tensor | None = None

    def __len__(self) -> int:
        """The number of rows."""
        return self.indptr.shape[0] - 1

    def __getitem__(self, rows: slice) -> "SparseTargets":
        """Consecutive rows, `t[a:b]`. The buffers are shared, nothing is copied."""
        if not isinstance(rows, slice):
            raise TypeError(f"SparseTargets takes a slice of rows, got {type(rows).__name__}")
        if rows.step not in (None, 1):
            raise ValueError(f"SparseTargets takes slices with step 1, got {rows.step}")
        size = len(self)  # not rows.indices(size), which torch.compile cannot trace

        def bound(index: int | None, default: int) -> int:
            if index is None:
                return default
            return min(max(index + size if index < 0 else index, 0), size)

        start, stop = bound(rows.start, 0), bound(rows.stop, size)
        stop = max(start, stop)
        dropped = None if self.dropped_mass is None else self.dropped_mass[start:stop]
        return SparseTargets(self.indptr[start : stop + 1], self.token_ids, self.probs, dropped)

    @staticmethod
    def cat(parts: "Sequence[SparseTargets]") -> "SparseTargets":
        """The rows of all parts in order, trimmed as by `compact`. Synchronises.

        A part without `dropped_mass` counts as one that dropped nothing if another part has it.
        """
        if not parts:
            raise ValueError("SparseTargets.cat needs at least one part, got none")
        parts = [part.compact() for part in parts]
        indptr = [parts[0].indptr]
        end = parts[0].token_ids.shape[0]
        for part in parts[1:]:
            indptr.append(part.indptr[1:] + end)
            end += part.token_ids.shape[0]
        dropped = None
        if any(part.dropped_mass is not None for part in parts):
            dropped = torch.cat(
                [
                    part.probs.new_zeros(len(part))
                    if part.dropped_mass is None
                    else part.dropped_mass
                    for part in parts
                ]
            )
        return SparseTargets(
            torch.cat(indptr),
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part.probs for part in parts]),
            dropped,
        )

    def compact(self) -> "SparseTargets":
        """The same rows with `indptr[0]` = 0 and no spare slot. Synchronises; shares no buffer."""
        start, end = self.indptr[[0, -1]].tolist()
        return SparseTargets(
            self.indptr - start,
            self.token_ids[start:end].clone(),
            self.probs[start:end].clone(),
            self.dropped_mass,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SparseTargets":
        """The same targets on another device, spare slots included."""
        return _pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(device, non_blocking=non_blocking), self
        )

    def to_dense(self, vocab_size: int) -> Tensor:
        """`[N, vocab_size]` float32, for tests and for looking at. Synchronises.

        Raises ValueError when a token id is outside [0, vocab_size).
        """
        check_token_values(self.indptr, self.token_ids, vocab_size)
        rows, inside = _reference.slot_rows(self.indptr, self.token_ids.shape[0])
        dense = self.probs.new_zeros(len(self), vocab_size)
        dense[rows[inside], self.token_ids[inside].long()] = self.probs[inside]
        return dense

    def validate(self, vocab_size: int | None = None) -> "SparseTargets":
        """Returns self, or raises TypeError or ValueError where it breaks a rule. Synchronises."""
        check_targets(self)
        slots = self.token_ids.shape[0]
        lengths = self.indptr.diff()
        if bool((lengths < 0).any()) or self.indptr[0] < 0 or self.indptr[-1] > slots:
            raise ValueError(f"indptr must rise from 0 or more to at most {slots}, the slots")
        check_token_values(self.indptr, self.token_ids, vocab_size)
        token_ids, probs = (_used(self.indptr, slots) for slots in (self.token_ids, self.probs))
        rows = torch.arange(len(self), device=token_ids.device).repeat_interleave(lengths)
        pairs = rows << 32 | token_ids
        if pairs.unique().shape != pairs.shape:
            raise ValueError("token_ids must be distinct within a row")
        if not bool(((probs >= 0) & (probs <= 1)).all()):
            raise ValueError("probs must be from 0 to 1")
        return self


def check_targets(targets: SparseTargets) -> None:
    """Types, dtypes, shapes and devices of the parts, without looking at values."""
    if not isinstance(targets, SparseTargets):
        raise TypeError(f"targets must be SparseTargets, got {type(targets).__name__}")
    indptr, token_ids, probs = targets.indptr, targets.token_ids, targets.probs
    if (
        indptr.dtype != torch.int64
        or token_ids.dtype != torch.int32
        or probs.dtype != torch.float32
    ):
        raise TypeError(
            "targets must hold indptr int64, token_ids int32 and probs float32, got "
            f"{indptr.dtype}, {token_ids.dtype} and {probs.dtype}"
        )
    if indptr.dim() != 1 or indptr.shape[0] == 0:
        raise ValueError(f"targets.indptr must have shape [rows + 1], got {tuple(indptr.shape)}")
    if token_ids.dim() != 1 or token_ids.shape != probs.shape:
        raise ValueError(
            "targets.token_ids and targets.probs must have one shape [slots], got "
            f"{tuple(token_ids.shape)} and {tuple(probs.shape)}"
        )
    if indptr.device != token_ids.device or indptr.device != probs.device:
        raise ValueError(
            f"targets must lie on one device, got {indptr.device}, {token_ids.device} and "
            f"{probs.device}"
        )


def check_token_values(indptr: Tensor, token_ids: Tensor, vocab_size: int | None) -> None:
    """ValueError for a token id outside [0, vocab_size) in a row. Synchronises."""
    token_ids = _used(indptr, token_ids)
    highest = torch.iinfo(torch.int32).max if vocab_size is None else vocab_size - 1
    wrong = (token_ids < 0) | (token_ids > highest)
    if bool(wrong.any()):
        raise ValueError(f"token ids must be from 0 to {highest}, got {int(token_ids[wrong][0])}")


def _used(indptr: Tensor, slots: Tensor) -> Tensor:
    """The slots that belong to a row. Synchronises."""
    start, stop = indptr[[0, -1]].clamp(min=0).tolist()
    return slots[start:stop]


def _flatten(targets: SparseTargets) -> tuple[list[Any], None]:
    return [targets.indptr, targets.token_ids, targets.probs, targets.dropped_mass], None


_pytree.register_pytree_node(
    SparseTargets,
    _flatten,
    lambda parts, _: SparseTargets(*parts),
    serialized_type_name="memdec.ops.SparseTargets",
)
