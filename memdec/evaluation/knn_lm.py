"""The kNN-LM that a memory imitates (arXiv 1911.00172): its probability of each label."""

from __future__ import annotations

import numpy as np


def knn_label_log_probs(
    distances: np.ndarray, neighbor_tokens: np.ndarray, labels: np.ndarray, temperature: float
) -> np.ndarray:
    """log of the share of the label's neighbours, each weighing ``exp(-distance / temperature)``.

    Args:
        distances: float32 [positions, k], squared; +inf is no neighbour.
        neighbor_tokens: the token after each neighbour, [positions, k]; read only where there is one.
        labels: [positions].

    Returns:
        float32 [positions]; -inf where no neighbour has the label.
    """
    nearest = distances.min(axis=1, keepdims=True)
    nearest[np.isinf(nearest)] = 0.0
    weights = np.exp((nearest - distances).astype(np.float64) / temperature)
    share = np.where(neighbor_tokens == labels[:, None], weights, 0.0).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_probs = np.log(share) - np.log(weights.sum(axis=1))
    return np.nan_to_num(log_probs, nan=-np.inf, neginf=-np.inf).astype(np.float32)
