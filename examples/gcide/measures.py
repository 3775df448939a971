"""Perplexity with its interval, from scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scores import Text

from memdec.evaluation.bootstrap import interval, resampled_means, resampling_units

SAMPLES = 1000


def perplexity(log_probs: np.ndarray, text: Text, block_size: int) -> dict[str, Any]:
    """nll, perplexity and its 95 % bootstrap interval; None where a probability is 0."""
    nll = -float(log_probs.mean(dtype=np.float64))
    if not math.isfinite(nll):
        return {"nll": None, "perplexity": None, "interval": None}
    _, units = resampling_units(text.positions, text.stream.documents, block_size)
    means = resampled_means(log_probs[:, None].astype(np.float64), units, SAMPLES, seed=0)
    low, high = interval(-means[:, 0])
    return {"nll": nll, "perplexity": math.exp(nll), "interval": [math.exp(low), math.exp(high)]}
