"""Mixing two models when only the labels' log-probabilities matter: any lmbda costs nothing."""

from __future__ import annotations

import numpy as np

LMBDAS = np.linspace(0.0, 1.0, 51)


def mix_log_probs(base: np.ndarray, other: np.ndarray, lmbda: float | np.ndarray) -> np.ndarray:
    """log((1 - lmbda) * p_base + lmbda * p_other), float64, elementwise; -inf is a probability of 0.

    `lmbda` is one number, or one a position.
    """
    lmbda = np.asarray(lmbda, np.float64)
    with np.errstate(divide="ignore"):
        return np.logaddexp(
            np.log1p(-lmbda) + base.astype(np.float64), np.log(lmbda) + other.astype(np.float64)
        )


def lmbda_curve(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Mean negative log-probability of the mixture at each of :data:`LMBDAS`, in nats."""
    return np.array([-mix_log_probs(base, other, lmbda).mean() for lmbda in LMBDAS.tolist()])


def best_lmbda(base: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The lmbda of the grid with the least nll, the lower one of equals, and that nll."""
    curve = lmbda_curve(base, other)
    best = int(curve.argmin())
    return round(float(LMBDAS[best]), 6), float(curve[best])
