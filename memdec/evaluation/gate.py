"""Fits the gate that chooses lmbda a token, on validation, in seconds."""

from __future__ import annotations

import math

import numpy as np
import torch

from memdec.evaluation.mixture import best_lmbda
from memdec.modeling.gate import Gate

_STEPS = 200
# Per squared weight of a standardised feature: keeps weights finite where a feature separates.
_RIDGE = 1e-5


def fit_gate(
    base: np.ndarray,
    memory: np.ndarray,
    base_confidence: np.ndarray,
    memory_confidence: np.ndarray,
) -> Gate:
    """The gate under which the mixture gives the labels the most probability.

    It starts as the best fixed lmbda (but not at 0 or 1, which a gate only nears) and each step of
    L-BFGS lowers the nll, so on the tokens it is fitted to it is no worse. The same arrays and
    number of threads give the same gate.

    Args:
        base, memory: log p(label), float32 [positions].
        base_confidence, memory_confidence: float32 [positions, 2], as
            :func:`memdec.modeling.gate.confidence` makes them.
    """
    known = np.isfinite(base) | np.isfinite(memory)  # where neither is, no lmbda helps
    features = np.concatenate([base_confidence, memory_confidence], axis=1)[known]
    features = torch.from_numpy(features.astype(np.float64))
    mean, scale = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    inputs = torch.cat([torch.ones(len(features), 1), (features - mean) / scale], dim=1)
    log_base, log_memory = (
        torch.from_numpy(part[known].astype(np.float64)) for part in (base, memory)
    )
    fixed = min(max(best_lmbda(base, memory)[0], 0.01), 0.99)
    weights = torch.zeros(inputs.shape[1], dtype=torch.float64)
    weights[0] = math.log(fixed / (1 - fixed))
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scores = inputs @ weights
        mixed = torch.logaddexp(
            torch.nn.functional.logsigmoid(-scores) + log_base,
            torch.nn.functional.logsigmoid(scores) + log_memory,
        )
        value = -mixed.mean() + _RIDGE * weights[1:].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    slopes = weights[1:].detach() / scale
    bias = weights[0].detach() - (slopes * mean).sum()
    return Gate(bias.item(), *slopes.tolist())
