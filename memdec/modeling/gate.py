"""lmbda a token: a logistic regression on how sure base and memory are before the token is known."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from memdec.config import require

_CHUNK_VALUES = 1 << 24


@torch.no_grad()
def confidence(logits: Tensor, vocab_size: int | None = None) -> Tensor:
    """How sure a model is of its next token.

    Args:
        logits: ``[..., V]``, any float dtype.
        vocab_size: the number of real tokens; columns from there on are padding.

    Returns:
        ``[..., 2]`` float32, without gradient: log of the largest probability, and entropy in nats.
        The arithmetic is float32, a chunk of rows at a time.
    """
    logits = logits[..., :vocab_size]
    width = logits.shape[-1]
    parts = []
    for rows in logits.reshape(-1, width).split(max(1, _CHUNK_VALUES // width)):
        probs = rows.float().softmax(-1)
        entropy = torch.special.entr(probs).sum(-1)
        parts.append(torch.stack([probs.amax(-1).log(), entropy], dim=-1))
    return torch.cat(parts).view(*logits.shape[:-1], 2)


@dataclass(frozen=True)
class Gate:
    """``lmbda = sigmoid(bias + sum of weight * feature)``; a field is the weight of its feature.

    :func:`memdec.evaluation.gate.fit_gate` makes one, and `MemoryDecoderForCausalLM` takes it in
    place of a number.

    Raises:
        MemdecError: a field is no finite number.
    """

    bias: float
    base_log_max: float
    base_entropy: float
    memory_log_max: float
    memory_entropy: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            finite = isinstance(value, (int, float)) and math.isfinite(value)
            require(finite, f"{field.name} of a gate", "a finite number", value)

    def lmbda(self, base: Tensor, memory: Tensor) -> Tensor:
        """The memory's weight ``[...]``, from the :func:`confidence` ``[..., 2]`` of both models."""
        return torch.sigmoid(
            self.bias
            + self.base_log_max * base[..., 0]
            + self.base_entropy * base[..., 1]
            + self.memory_log_max * memory[..., 0]
            + self.memory_entropy * memory[..., 1]
        )
