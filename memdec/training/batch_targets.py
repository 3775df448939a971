"""Where a batch's target rows come from: read beside its blocks, made targets on the device.

Each row carries the position and the label it was made for, and each batch compares them with its
own: a mismatch is an error, never trimmed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from memdec.data.neighbours import Neighbours
from memdec.data.targets import NeighbourRows, TargetRows, TargetStore
from memdec.errors import MemdecError
from memdec.ops import SparseTargets

Batch = dict[str, Tensor]


class BatchTargets(Protocol):
    """What :class:`memdec.training.batches.BlockCollator` and the trainer ask of a teacher's rows."""

    def read(self, positions: np.ndarray, labels: np.ndarray) -> Batch:
        """A batch's part of its own, on the CPU, for int64 [rows] both; position -1 is padding."""
        ...

    def of(self, batch: Batch) -> SparseTargets:
        """A row for every label of the batch, empty where it is padding, on the batch's device."""
        ...


class NoTargets:
    """Empty rows: with alpha 0 the loss is cross-entropy."""

    def read(self, positions: np.ndarray, labels: np.ndarray) -> Batch:
        return {}

    def of(self, batch: Batch) -> SparseTargets:
        labels = batch["labels"]
        return SparseTargets(
            torch.zeros(labels.numel() + 1, dtype=torch.int64, device=labels.device),
            torch.empty(0, dtype=torch.int32, device=labels.device),
            torch.empty(0, dtype=torch.float32, device=labels.device),
        )


@dataclass(frozen=True)
class StoredTargets:
    """Distributions as they lie on disk; pinned where a GPU is to fetch them."""

    store: TargetStore
    pin_memory: bool = False

    def read(self, positions: np.ndarray, labels: np.ndarray) -> Batch:
        real = positions >= 0
        rows = self.store.gather(positions[real], pin_memory=self.pin_memory)
        check_rows(self.store.artefact.path, rows, positions[real], labels[real])
        row_starts = np.concatenate([[0], np.cumsum(real)])
        return {
            "target_indptr": torch.from_numpy(rows.targets.indptr.numpy()[row_starts]),
            "target_ids": rows.targets.token_ids,
            "target_probs": rows.targets.probs,
        }

    def of(self, batch: Batch) -> SparseTargets:
        return SparseTargets(batch["target_indptr"], batch["target_ids"], batch["target_probs"])


@dataclass(frozen=True)
class StoredNeighbours:
    """The `k` nearest of the kept neighbours, at a temperature: the device sums and sorts them."""

    store: TargetStore
    k: int
    temperature: float
    max_entries: int | None

    def read(self, positions: np.ndarray, labels: np.ndarray) -> Batch:
        real = positions >= 0
        rows = self.store.gather_neighbours(positions[real], self.k)
        check_rows(self.store.artefact.path, rows, positions[real], labels[real])
        found = rows.neighbours
        batch = {"neighbour_tokens": _spread(found.tokens, real, 0)}
        batch["neighbour_distances"] = _spread(found.distances, real, torch.inf)  # is no neighbour
        if found.units is not None:
            batch["neighbour_units"] = _spread(found.units, real, 1.0)
        return batch

    def of(self, batch: Batch) -> SparseTargets:
        neighbours = Neighbours(
            batch["neighbour_distances"], batch["neighbour_tokens"], batch.get("neighbour_units")
        )
        return neighbours.to_targets(self.temperature, self.max_entries)


def _spread(rows: Tensor, real: np.ndarray, padding: float) -> Tensor:
    """The rows in order where `real`, `padding` elsewhere."""
    if real.all():
        return rows
    spread = np.full((len(real), *rows.shape[1:]), padding, rows.numpy().dtype)
    spread[real] = rows.numpy()
    return torch.from_numpy(spread)


def check_rows(
    path: Path, rows: TargetRows | NeighbourRows, positions: np.ndarray, labels: np.ndarray
) -> None:
    """Raises :class:`MemdecError` unless each row was made for the position and label it is for."""
    found = np.stack([rows.positions.numpy(), rows.labels.numpy()])
    wrong = (found != np.stack([positions, labels])).any(axis=0)
    if wrong.any():
        first = int(wrong.argmax())
        raise MemdecError(
            f"{path}: expected a target row of position {positions[first]} with label "
            f"{labels[first]}, got position {found[0, first]} with label {found[1, first]}; "
            "make the targets again"
        )
