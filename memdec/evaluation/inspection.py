"""A text token by token: what ``memdec inspect`` finds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Inspection:
    """A text token by token.

    Attributes:
        tokens: what each token adds to the text.
        ids: of the tokens.
        log_probs: [tokens] each, in nats: ``base``, ``kNN-LM`` (with a datastore), ``memory`` and
            ``joint``.
        lmbda: the memory's weight at each token.
        adaptive: whether a gate chose it.
    """

    tokens: list[str]
    ids: list[int]
    log_probs: dict[str, np.ndarray]
    lmbda: np.ndarray
    adaptive: bool

    @property
    def gains(self) -> np.ndarray:
        """Change of log-probability, joint minus base, in nats."""
        return self.log_probs["joint"] - self.log_probs["base"]

    @property
    def perplexity(self) -> dict[str, float]:
        """By row; infinite where a token has probability 0."""
        with np.errstate(over="ignore"):
            return {name: float(np.exp(-row.mean())) for name, row in self.log_probs.items()}

    def listed(self, top: int | None) -> list[int]:
        """Which tokens a table lists: all, or the `top` largest gains, then the largest losses."""
        if top is None:
            return list(range(len(self.tokens)))
        order = np.argsort(-self.gains, kind="stable").tolist()
        gained = [index for index in order if self.gains[index] > 0]
        lost = [index for index in reversed(order) if self.gains[index] < 0]
        return [*gained[:top], *lost[:top]]

    def to_mapping(self) -> dict[str, Any]:
        """JSON of it: None stands for the logarithm of 0, and for an infinite perplexity."""

        def finite(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "perplexity": {name: finite(value) for name, value in self.perplexity.items()},
            "tokens": self.tokens,
            "ids": self.ids,
            "lmbda": self.lmbda.tolist(),
            "log_probs": {
                name: list(map(finite, row.tolist())) for name, row in self.log_probs.items()
            },
        }
