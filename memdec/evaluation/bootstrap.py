"""Confidence intervals: whole documents are drawn again, since a document's tokens go together."""

from __future__ import annotations

import numpy as np

_FEWEST_DOCUMENTS = 20


def resampling_units(
    positions: int, documents: np.ndarray, block_size: int
) -> tuple[str, np.ndarray]:
    """What is drawn, ``"documents"`` or ``"blocks"``, and the number of each position's unit.

    Args:
        positions: how many positions of the stream are evaluated, from its start.
        documents: int64, where each document's first token lies in the stream.
    """
    labels = np.arange(1, positions + 1)
    owners = np.searchsorted(documents, labels, side="right") - 1
    if len(np.unique(owners)) >= _FEWEST_DOCUMENTS:
        return "documents", owners
    return "blocks", np.arange(positions) // block_size


def resampled_means(values: np.ndarray, units: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Means of each column over `samples` draws, with replacement, of as many units as there are.

    Args:
        values: [positions, columns]; every column sees the same draws, so differences are paired.
        units: int64 [positions], the unit of each position.

    Returns:
        float64 [samples, columns]; NaN throughout a column with an infinite value.
    """
    _, units = np.unique(units, return_inverse=True)
    counts = np.bincount(units)
    sums = np.stack([np.bincount(units, column) for column in values.T], axis=1)
    generator = np.random.default_rng(seed)
    means = np.empty((samples, values.shape[1]))
    with np.errstate(invalid="ignore"):
        for row in means:
            drawn = generator.integers(len(counts), size=len(counts))
            times = np.bincount(drawn, minlength=len(counts))
            row[:] = times @ sums / (times @ counts)
    return means


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the samples."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)
