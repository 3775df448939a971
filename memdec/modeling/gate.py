"""lmbda a token: how sure base and memory are, and which of them was right so far.

A small network reads, before a token is known, both models' :func:`confidence` and how much better
the memory than the base predicted the tokens before. It is fitted on validation, inside the domain.
Other text it has never seen, and there evidence bounds it: the mixture at the network's weight and
the base are two forecasters of one sequence, mixed by their posterior (fixed share, Herbster and
Warmuth 1998). Whatever the network does, the result loses to the base no more than ``log 2`` nats a
context and about :data:`SHARE` nats a token.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from memdec.config import require
from memdec.errors import MemdecError
from memdec.modeling.scan import Maps, scan

SHARE = 1e-3  # of the posterior that starts anew at every token, so that a change of text is seen
_KEPT = (0.8, 0.98)  # by the running means of gains at a token: the last few tokens, the last page
_LARGEST_GAIN = 5.0  # nats; one surprise must not drown the rest
MEANS = len(_KEPT)
FEATURES = 4 + MEANS
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
class Told:
    """What is known at each position of some contexts, the token there the last one known.

    Attributes:
        base, memory: log-probability that either gave the token, ``[rows, length]``; not used where
            a context begins.
        confidence: of base and memory in what follows it, ``[rows, length, 4]``.
        continues: bool ``[rows, length]``, False where a context begins (and at padding).
    """

    base: Tensor
    memory: Tensor
    confidence: Tensor
    continues: Tensor

    @property
    def gains(self) -> Tensor:
        """By how much the memory was better, float64; 0 where that is no number.

        So it is where neither gave the token any mass.
        """
        gains = self.memory.double() - self.base.double()
        return gains.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)

    def features(self, before: Tensor | None = None) -> Tensor:
        """The network's inputs, float64 ``[rows, length, FEATURES]``: confidence and mean gains.

        `before` are the means at the position before the first, ``[rows, MEANS]``.
        """
        keep, add = _float64((_KEPT, tuple(1 - keep for keep in _KEPT)), self.base.device)
        gains = self.gains.clamp(-_LARGEST_GAIN, _LARGEST_GAIN) * self.continues
        maps = (self.continues[..., None] * keep, gains[..., None] * add)
        before = gains.new_zeros(len(gains), MEANS) if before is None else before
        return torch.cat([self.confidence.double(), scan(_mean, _means, maps, before)], dim=-1)


def _mean(mean: Tensor, maps: Maps) -> Tensor:
    kept, added = maps
    return torch.addcmul(added, kept, mean)


def _means(first: Maps, second: Maps) -> Maps:
    return first[0] * second[0], _mean(first[1], second)


def posterior(gains: Tensor, continues: Tensor, before: Tensor | None = None) -> Tensor:
    """The weight of a forecaster against another, by the tokens up to each position.

    Args:
        gains: log-probability that it gave the token there, less the other's, ``[rows, length]``;
            NaN tells nothing.
        continues: bool ``[rows, length]``; where not, the weight is one half.
        before: the weight at the position before the first, float64 ``[rows]``.

    Returns:
        float64 ``[rows, length]``.
    """
    ratios = gains.double().nan_to_num(nan=0.0).clamp(-50, 50).exp()[..., None, None]
    # What a token does to the two weights, up to a factor: from either (rows) to either (columns).
    stay, leave = 1 - SHARE / 2, SHARE / 2
    base, memory = _float64((((0, 0), (leave, stay)), ((stay, leave), (0, 0))), gains.device)
    maps = torch.addcmul(base, ratios, memory)
    maps = torch.where(continues[..., None, None], maps, 0.5)
    before = maps.new_full((len(maps),), 0.5) if before is None else before
    return scan(_weight, _weights, (maps,), before)


def _weight(weight: Tensor, maps: Maps) -> Tensor:
    one, other = torch.lerp(maps[0][..., 1, :], maps[0][..., 0, :], weight[..., None]).unbind(-1)
    return one / (one + other)


def _weights(first: Maps, second: Maps) -> Maps:
    """Entries of a product differ by factors below ``4 * exp(50) / SHARE ** 2``: any may be the 1."""
    one, other = first[0], second[0]
    product = torch.addcmul(one[..., :1] * other[..., :1, :], one[..., 1:], other[..., 1:, :])
    return (product / product[..., :1, :1],)


@dataclass(frozen=True)
class Gate:
    """The network: ``output_weight @ tanh(hidden_weight @ features + hidden_bias) + output_bias``.

    The memory's weight is the sigmoid of it, times the posterior.

    :func:`memdec.evaluation.gate.fit_gate` makes one, and `MemoryDecoderForCausalLM` takes it in
    place of a number.

    Attributes:
        hidden_weight: a row of :data:`FEATURES` numbers for each hidden unit.
        hidden_bias, output_weight: a number for each hidden unit.

    Raises:
        MemdecError: the sizes differ, or a number is not finite.
    """

    hidden_weight: tuple[tuple[float, ...], ...]
    hidden_bias: tuple[float, ...]
    output_weight: tuple[float, ...]
    output_bias: float

    def __post_init__(self) -> None:
        rows = self.hidden_weight if isinstance(self.hidden_weight, tuple) else ()
        lists = (self.hidden_bias, self.output_weight, *rows)
        sizes = [len(one) if isinstance(one, tuple) else None for one in lists]
        fits = len(rows) > 0 and sizes == [len(rows)] * 2 + [FEATURES] * len(rows)
        require(fits, "the sizes of a gate", f"those of {FEATURES} features", sizes)
        values = [*sum(self.hidden_weight, ()), *self.hidden_bias, *self.output_weight]
        for value in (*values, self.output_bias):
            finite = isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
            require(finite, "a number of a gate", "finite", value)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """From the fields as JSON keeps them.

        Raises:
            MemdecError: no fields, or others, as of a gate of another kind.
        """
        names = [field.name for field in fields(cls)]
        found = list(saved) if isinstance(saved, Mapping) else []
        if set(found) != set(names):
            raise MemdecError(
                f"expected a gate with {', '.join(names)}, got {', '.join(found) or 'none'}: "
                "fit it anew, with eval"
            )
        return cls(**{name: _as_tuples(saved[name]) for name in names})

    @torch.no_grad()
    def states(self, told: Told, before: Tensor | None = None) -> Tensor:
        """Everything that the lmbda at a position follows from, and the next state.

        Args:
            before: the state at the position before the first, ``[rows, 2 + MEANS]``; None
                where there is no such position.

        Returns:
            float64 ``[rows, length, 2 + MEANS]``: the network's weight of the memory as a
            logit, the posterior of its mixture against the base, the mean gains.
        """
        features = told.features(None if before is None else before[:, 2:])
        hidden_weight, hidden_bias, output_weight = (
            _float64(values, features.device)
            for values in (self.hidden_weight, self.hidden_bias, self.output_weight)
        )
        hidden = torch.tanh(features @ hidden_weight.T + hidden_bias)
        logits = hidden @ output_weight + self.output_bias
        first = logits[:, :1] if before is None else before[:, :1]
        used = torch.cat([first, logits[:, :-1]], dim=1)  # when the token here was predicted
        gains = torch.logaddexp(logsigmoid(-used), logsigmoid(used) + told.gains)
        weights = posterior(gains, told.continues, None if before is None else before[:, 1])
        return torch.cat([torch.stack([logits, weights], dim=-1), features[..., 4:]], dim=-1)


def lmbda_of(states: Tensor) -> Tensor:
    """The memory's weight in what follows each position, float64 ``[...]``, from `Gate.states`."""
    return states[..., 0].sigmoid() * states[..., 1]


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _float64(values: tuple, device: torch.device) -> Tensor:
    """Constants where they are used; torch.compile, which warns of a cache, has them in its graph."""
    return (_constants if torch.compiler.is_compiling() else _kept_constants)(values, device)


def _constants(values: tuple, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


# Copying them at every token would take longer.
_kept_constants = lru_cache(maxsize=32)(_constants)
