"""Neighbours in narrow types: what temperature and k make targets of, once they are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memdec.ops import SparseTargets, knn_scatter

_HALF_EXPONENT = 15  # a row's farthest neighbour lies below 2^15 units, half of what float16 holds
_NO_TOKEN = {torch.uint16: (1 << 16) - 1, torch.int32: -1}


@dataclass(frozen=True)
class Neighbours:
    """The k nearest of each row, nearest first; a missing one is at distance infinity, at the end.

    Attributes:
        distances: `[rows, k]`. float32: squared distances as they were found. float16: from the
            row's nearest, in the row's unit, so that nothing overflows and what a softmax tells
            apart is within 2^-11 of itself.
        tokens: `[rows, k]`, what follows each. uint16 where every token id is below 65,535, else
            int32; a missing neighbour has 65,535 or -1.
        units: `[rows]` float32, powers of two; None with float32 distances.
    """

    distances: Tensor
    tokens: Tensor
    units: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def pack(
        cls,
        distances: Tensor,
        tokens: Tensor,
        *,
        vocab_size: int,
        dtype: Literal["float16", "float32"],
    ) -> Neighbours:
        """From a search's answers `[rows, k]`, float32 and int32, on the CPU; -1 is no token."""
        missing = (tokens < 0) | ~(distances < torch.inf)
        distances = distances.masked_fill(missing, torch.inf)
        narrow = token_dtype(vocab_size)
        tokens = tokens.masked_fill(missing, _NO_TOKEN[narrow]).to(narrow)
        if dtype == "float32":
            return cls(distances, tokens)
        nearest = distances.amin(dim=1, keepdim=True)
        distances = torch.where(missing, torch.inf, distances - nearest)
        farthest = distances.masked_fill(missing, 0.0).amax(dim=1)
        exponents = torch.frexp(farthest).exponent.clamp(min=-100) - _HALF_EXPONENT
        units = torch.ldexp(torch.ones_like(farthest), exponents)
        return cls((distances / units[:, None]).half(), tokens, units)

    @staticmethod
    def cat(parts: Sequence[Neighbours]) -> Neighbours:
        """The rows of all parts in order."""
        units = [part.units for part in parts if part.units is not None]
        return Neighbours(
            torch.cat([part.distances for part in parts]),
            torch.cat([part.tokens for part in parts]),
            torch.cat(units) if units else None,
        )

    def to_targets(self, temperature: float, max_entries: int | None = None) -> SparseTargets:
        """Their distribution at a temperature, on their device; see :func:`memdec.ops.knn_scatter`."""
        distances = self.distances
        if self.units is not None:
            distances = distances.float() * self.units[:, None]
        return knn_scatter(
            distances, self.tokens.int(), temperature=temperature, max_entries=max_entries
        )


def token_dtype(vocab_size: int) -> torch.dtype:
    """The narrowest type for ids below `vocab_size` and a mark for none."""
    return torch.uint16 if vocab_size < 1 << 16 else torch.int32
